"""The main job, end to end on the real model, shorter than the demo: calibrate, generate, evaluate, inspect."""

from __future__ import annotations

import json

import pytest

from million_cache import demo
from million_cache.demo import run_demo


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


def test_the_demo_prints_both_texts_and_every_figure(directory, monkeypatch, tmp_path, smollm2):
    from rich.console import Console

    from million_cache import Codebooks

    if not directory.exists():
        pytest.skip("needs the codebooks of the test above")
    monkeypatch.setenv("MILLION_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "load_model", lambda name: smollm2)
    monkeypatch.setattr(demo, "fetch", lambda model: None)
    monkeypatch.setattr(demo, "EVALUATION_CONTEXT", 256)
    monkeypatch.setattr(demo, "EVALUATION_CONTEXTS", 1)
    calls = []

    def short(*args, **options):
        calls.append(args)
        return Codebooks.from_pretrained(directory)

    monkeypatch.setattr(demo, "calibrate_text", short)
    console = Console(record=True, width=120)
    result = run_demo(console, "4bit", max_new_tokens=32)
    said = console.export_text()
    # Greedy text from 4 bit codes is the dense cache's.
    assert result["equal_tokens"] == len(result["dense"].tokens) == 32
    assert result["million"].prompt_tokens > 800  # far beyond the exact window
    for words in (
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
    run_demo(console, "4bit", max_new_tokens=2, prompt="Hello")
    assert len(calls) == 1  # the second run found the codebooks in the user's cache
