"""The main job, end to end on the real model, shorter than the demo: calibrate, generate, evaluate, inspect."""

from __future__ import annotations

import hashlib
import json

import pytest
from rich.console import Console

from million_cache import Codebooks, MillionStaticCache, demo
from million_cache.demo import run_demo
from million_cache.loading import shipped_codebooks, shipped_text
from million_cache.programs import load_codebooks


@pytest.fixture(autouse=True)
def loaded(smollm2, monkeypatch):
    """Every program gets the one loaded model: loading it takes 20 s."""
    monkeypatch.setattr("million_cache.loading.load_model", lambda name, *_: smollm2)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("smollm2") / "books"


def test_calibrate_evaluate_inspect(million, directory, tmp_path):
    result = million(
        "calibrate", "--model", "smollm2", "--preset", "4bit", "--tokens", 2048, "--context", 1024, "--out", directory,
        "--sensitivity-tokens", 1024,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    result = million(
        "evaluate",
        "--model",
        "smollm2",
        "--codebooks",
        directory,
        "--context",
        512,
        "--chunks",
        1,
        "--json",
        tmp_path / "r.json",
    )
    assert result.exit_code == 0, result.stderr
    got = json.loads((tmp_path / "r.json").read_text())
    # 2048 tokens of calibration are few; the presets' figures in README.md are from 8192.
    assert 0 < got["kl"] < 0.01
    assert got["top1"] > 0.95
    assert abs(got["perplexity"] / got["perplexity_dense"] - 1) < 0.02
    # A quarter of the 16-bit cache, its window and sinks, and the clock.
    assert got["cache_bytes_16bit"] <= (0.25 + (128 + 4) / 512 + 0.005) * got["dense_cache_bytes_16bit"]
    assert got["bits_per_element"] == 4
    result = million("inspect", directory)
    assert result.exit_code == 0, result.stderr
    assert " 29 " in result.stdout


@pytest.fixture
def short_demo(monkeypatch, tmp_path, smollm2):
    """`run_demo` with the one loaded model, a short evaluation and an empty user's cache; what it says, and its result."""
    monkeypatch.setenv("MILLION_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "load_model", lambda name: smollm2)
    monkeypatch.setattr(demo, "fetch", lambda model: None)
    monkeypatch.setattr(demo, "EVALUATION_CONTEXT", 256)
    monkeypatch.setattr(demo, "EVALUATION_CONTEXTS", 1)

    def run(preset, **options):
        console = Console(record=True, width=120)
        result = run_demo(console, preset, **options)
        return console.export_text(), result

    return run


def test_the_demo_prints_both_texts_and_every_figure(short_demo, monkeypatch):
    monkeypatch.setattr(demo, "calibrate_text", lambda *args, **options: pytest.fail("it calibrated"))
    said, result = short_demo("4bit", max_new_tokens=32)
    # Greedy text from 4 bit codes is the dense cache's.
    assert result["equal_tokens"] == len(result["dense"].tokens) == 32
    assert result["million"].prompt_tokens > 800  # far beyond the exact window
    assert 0 < result["evaluation"]["kl"] < 0.005
    for words in (
        "they come with the package",
        "dense cache",
        "million 4bit",
        "codebooks",
        "bits an element",
        "tokens/s",
        "KL",
        "top-1",
        "16-bit model",
    ):
        assert words in said
    assert result["dense"].text.split()[0] in said


def test_the_demo_calibrates_once_if_asked_to(short_demo, directory, monkeypatch, tmp_path):
    if not directory.exists():
        pytest.skip("needs the codebooks of the test above")
    calls = []

    def short(model, tokenizer, body, source, *args, **options):
        calls.append(source)
        return [Codebooks.from_pretrained(directory)]

    monkeypatch.setattr(demo, "calibrate_text", short)
    options = {"max_new_tokens": 2, "prompt": "Hello"}
    assert "calibrated on 8192 tokens" in short_demo("4bit", calibrate=True, **options)[0]
    assert "calibrated in an earlier run" in short_demo("4bit", calibrate=True, **options)[0]
    (tmp_path / "mine.txt").write_text("My own text.")
    short_demo("4bit", text=tmp_path / "mine.txt", **options)
    assert calls == ["the shipped calibration text", str(tmp_path / "mine.txt")]


@pytest.mark.parametrize("name", ["smollm2-4bit", "smollm2-2bit"])
def test_shipped_codebooks_are_of_this_model_and_text(name, smollm2, model):
    books = load_codebooks(name)
    assert f"{books.config.bits_per_element:g}bit" in name
    assert books.provenance["text_sha256"] == hashlib.sha256(shipped_text("calibration").encode()).hexdigest()
    MillionStaticCache(smollm2[0], books, 64)
    with pytest.raises(ValueError, match="another model"):
        MillionStaticCache(model, books, 64)


def test_shipped_codebooks_are_small():
    assert set(shipped_codebooks()) == {"smollm2-4bit", "smollm2-2bit"}
    files = [file for directory in shipped_codebooks().values() for file in directory.iterdir()]
    assert sum(len(file.read_bytes()) for file in files) < 8e6


def test_codebooks_are_good_for_needles(million, tmp_path):
    """From 4 bit codes the model finds a number that a dense cache finds, and is as sure of it."""
    result = million(
        "tasks", "--model", "smollm2", "--codebooks", "smollm2-4bit", "--task", "needle", "--length", 512, "--depth", 0.3, "--samples",
        1, "--out", tmp_path / "tasks",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    dense, ours = json.loads((tmp_path / "tasks.json").read_text())["summary"]
    assert dense["accuracy"] == ours["accuracy"] == 1
    assert abs(ours["logprob_change"]) < 0.5
