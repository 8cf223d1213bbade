"""The benchmarks of whole models, on a tiny one: what they time is a decode step, and no case takes the others with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import bench_calibrate, bench_generate, generation, million_tokens
from benchmarks.bench_generate import Case, impossible
from benchmarks.conftest import chip, processor
from benchmarks.generation import KINDS, attending, build_model, decode_step, fill, largest, model_config
from million_cache import MillionStaticCache

TOKENS, BATCH = 96, 2
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny():
    return build_model(model_config("tiny"), "cpu", torch.float32)


@torch.no_grad()
def logits_of_step(model, name: str, backend: str = "eager") -> torch.Tensor:
    """Logits of a step over the same random keys and values for every kind, the same again when it is repeated."""
    kind = KINDS[name]
    with attending(model, kind, TOKENS):
        cache = kind.make(model, TOKENS, BATCH)
        torch.manual_seed(1)
        fill(cache, model, TOKENS - 1, BATCH)
        step = decode_step(model, kind, cache, BATCH, backend)
        first, second = step(), step()
        if not kind.grows:
            torch.testing.assert_close(first, second, rtol=0, atol=0)
            assert int(cache.get_seq_length()) == TOKENS - 1  # the newest token is taken back
        if isinstance(cache, MillionStaticCache):
            cache.check()
        return first


def test_static_steps_agree(tiny):
    """The valid prefix without a mask gives what the masked buffer gives, and million's attention is not far."""
    dense = logits_of_step(tiny, "static", "aot_eager")
    torch.testing.assert_close(logits_of_step(tiny, "static-cudnn"), dense)
    torch.testing.assert_close(logits_of_step(tiny, "static-flash"), dense)
    assert (logits_of_step(tiny, "million-4bit") - dense).norm() < dense.norm()
    assert logits_of_step(tiny, "dynamic").shape == dense.shape
    assert tiny.config._attn_implementation == "sdpa"


def test_fill_appends_what_attention_would(tiny):
    """The codes of a prefill are those of its keys and values, appended as `fill` appends."""
    ids = torch.randint(512, (BATCH, 40))
    with attending(tiny, KINDS["million-4bit"], 40), torch.no_grad():
        books = generation.random_codebooks(tiny, KINDS["million-4bit"].pq)
        dense = KINDS["static"].make(tiny, 40, BATCH)
        tiny(ids, past_key_values=dense)
        prefilled, appended = (
            MillionStaticCache(tiny.config, books, 40, BATCH, "cpu", torch.float32) for _ in range(2)
        )
        tiny(ids, past_key_values=prefilled)
        for i, layer in enumerate(dense.layers):
            generation.append(appended, layer.keys, layer.values, i)
        for a, b in zip(prefilled.layers, appended.layers):
            assert all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers()))
        assert int(appended.get_seq_length()) == 40


def test_results_are_merged(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_generate, "head_seconds", lambda *args: 1e-6)  # the tiny model's is as long as a layer
    arguments = [
        "--device",
        "cpu",
        "--model",
        "tiny",
        "--batch",
        "1",
        "--tokens",
        "64",
        "--save",
        "--out",
        str(tmp_path),
    ]
    arguments += ["--backend", "eager", "--steps", "2"]
    assert bench_generate.main([*arguments, "--caches", "million-2bit,hqq-4bit", "--ttft"]) == 0
    assert bench_generate.main([*arguments, "--caches", "static,million-2bit", "--layers", "1"]) == 0
    assert bench_generate.main([*arguments, "--caches", "dynamic", "--layers", "1"]) == 0
    assert "tokens/s" in capsys.readouterr().out
    stored = json.loads((tmp_path / "generate.json").read_text())
    cases = {x["cache"]: x for x in stored["cases"] if x["model"] == "tiny"}
    assert cases["hqq-4bit"]["decode"]["status"] == "not installed: hqq"
    assert cases["million-2bit"]["decode"]["layers"] == 2  # not replaced by one layer's
    assert cases["million-2bit"]["prefill"]["seconds"] > 0
    assert cases["static"]["decode"]["layers"] == 1
    # A step of a cache that grows is not one layer's times their number.
    assert cases["dynamic"]["decode"]["status"] == bench_generate.NOT_EXTRAPOLATED
    assert cases["static"]["decode"]["ms"] > cases["static"]["decode"]["ms_measured"]
    assert cases["static"]["decode"]["machine"] in stored["machines"]
    text = (tmp_path / "generate.md").read_text()
    assert "~ from 1 layers" in text and "| million-2bit |" in text
    assert (tmp_path / "generate.png").stat().st_size > 0


def test_times_of_different_processors_are_not_compared():
    def case(cache, ms, gpu, weights="bf16"):
        common = {
            "processor": gpu,
            "model": "llama3-8b",
            "weights": weights,
            "batch": 1,
            "tokens": 1024,
            "cache_gb": 1.0,
        }
        phase = {"status": "ok", "layers": 32, "ms": ms, "tokens_per_s": 1.0, "peak_gb": 1.0, "machine": "a"}
        return {**common, "cache": cache, "decode": phase}

    def ratio(here, there, weights="bf16"):
        rows = bench_generate.table(
            [case("static-cudnn", 6.0, here), case("million-4bit", 2.0, there, weights)], {"a": {}}
        )
        return "| 3.00 |" in rows

    assert ratio("GPU one", "GPU one")
    assert not ratio("GPU one", "GPU two")
    assert not ratio("GPU one", "GPU one", weights="int8")


def test_another_processor_replaces_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_generate, "RESULTS", tmp_path / "none")
    results = bench_generate.Results(tmp_path)
    entry = {"model": "tiny", "weights": "bf16", "batch": 1, "tokens": 64, "cache": "static", "cache_gb": 1.0}
    phase = {"status": "ok", "tokens_per_s": 1.0, "peak_gb": 1.0}
    for name, layers, ms in (("one", 2, 7.0), ("two", 1, 2.0), ("two", 2, 4.0), ("two", 1, 5.0)):
        results.add(entry | {"processor": name, "decode": phase | {"layers": layers, "ms": ms}})
    results.add(entry | {"processor": "two", "decode": {"status": "does not fit: out of memory", "layers": 2}})
    results.save()
    stored = json.loads((tmp_path / "generate.json").read_text())["cases"]
    assert {x["processor"]: x["decode"]["ms"] for x in stored if x["model"] == "tiny"} == {"one": 7.0, "two": 4.0}
    text = (tmp_path / "generate.md").read_text()
    assert text.index("## one") < text.index("| 7.00 |") < text.index("## two") < text.index("| 4.00 |")


@pytest.mark.parametrize(
    ("gpu", "name"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA GeForce RTX 4090", "4090"), ("GPU", "cuda")],
)  # fmt: skip
def test_results_of_a_gpu_have_its_name(monkeypatch, gpu, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
    assert (chip("cuda"), chip("cpu")) == (name, "cpu")


def test_quantised_weights(tmp_path):
    """int8 weights under both caches, in rows of their own that replace nothing of bf16; int4 says that it needs a GPU."""
    pytest.importorskip("torchao", reason="torchao is not installed", exc_type=ImportError)
    old = {
        "processor": processor("cpu"),
        "model": "tiny",
        "weights": "bf16",
        "batch": 1,
        "tokens": 64,
        "cache": "static",
        "cache_gb": 0.0,
    }
    old["decode"] = {"status": "ok", "layers": 2, "ms": 1e9, "tokens_per_s": 1.0, "peak_gb": None, "machine": "old"}
    (tmp_path / "generate.json").write_text(json.dumps({"machines": {"old": {}}, "cases": [old]}))
    arguments = ["--device", "cpu", "--model", "tiny", "--batch", "1", "--tokens", "64", "--steps", "2"]
    arguments += ["--caches", "static,million-4bit", "--save", "--out", str(tmp_path)]
    assert bench_generate.main([*arguments, "--weights", "int8", "--ttft"]) == 0
    cases = {(x["weights"], x["cache"]): x for x in json.loads((tmp_path / "generate.json").read_text())["cases"]}
    assert set(cases) == {("bf16", "static"), ("int8", "static"), ("int8", "million-4bit")}
    assert cases["bf16", "static"]["decode"]["ms"] == 1e9
    assert all(cases["int8", x]["decode"]["status"] == "ok" for x in ("static", "million-4bit"))
    rows = [x for x in (tmp_path / "generate.md").read_text().splitlines() if x.startswith("| tiny")]
    assert [x.split(" | ")[1] for x in rows] == ["bf16", "int8", "int8"]
    with pytest.raises(NotImplementedError, match="for GPUs"):
        bench_generate.main([*arguments, "--weights", "int4"])


def test_quantised_weights_are_used_and_counted():
    """The step's products are int8's: logits are near and not the same; bytes are those that torchao allocated."""
    pytest.importorskip("torchao", reason="torchao is not installed", exc_type=ImportError)
    model = build_model(model_config("tiny"), "cpu", torch.bfloat16)
    dense = logits_of_step(model, "million-4bit").float()
    generation.quantise_weights(model, "int8")
    assert 0 < (logits_of_step(model, "million-4bit").float() - dense).norm() < 0.1 * dense.norm()

    def allocated(x) -> int:
        parts = getattr(x, "tensor_data_names", None)
        return sum(getattr(x, name).nbytes for name in parts) if parts else x.nbytes

    counted = generation.weight_bytes("tiny", weights="int8")
    assert counted == sum(allocated(x) for x in model.parameters()) < generation.weight_bytes("tiny")
    case = Case("llama3-8b", 1, 1024, "static")
    by_weights = {x: replace(case, weights=x).bytes()["weights"] for x in generation.WEIGHTS}
    layers = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)  # elements
    assert by_weights["bf16"] - by_weights["int4"] == layers * 2 - layers // 2 - layers // 128 * 4
    with pytest.raises(ValueError, match="one of bf16, int8, int4"):
        generation.quantise_weights(model, "int3")


def test_a_failure_is_recorded_and_stops_nothing(tmp_path, monkeypatch):
    arguments = [
        "--device",
        "cpu",
        "--model",
        "tiny",
        "--batch",
        "1",
        "--tokens",
        "32",
        "--save",
        "--out",
        str(tmp_path),
    ]
    arguments += ["--backend", "eager", "--steps", "1"]
    assert bench_generate.main([*arguments, "--caches", "dynamic"]) == 0
    works = bench_generate.decode_step

    def broken(model, kind, *rest):
        if kind.name == "static-flash":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if kind.name != "million-4bit":
            raise RuntimeError("no such kernel\nand more")
        return works(model, kind, *rest)

    monkeypatch.setattr(bench_generate, "decode_step", broken)
    assert bench_generate.main([*arguments, "--caches", "static,static-flash,dynamic,million-4bit"]) == 1
    stored = json.loads((tmp_path / "generate.json").read_text())["cases"]
    status = {x["cache"]: x["decode"]["status"] for x in stored if x["model"] == "tiny"}
    assert status == {
        "static": "failed: RuntimeError: no such kernel", "static-flash": "does not fit: out of memory", "dynamic": "ok",
        "million-4bit": "ok",
    }  # fmt: skip


def test_what_does_not_fit_is_not_tried(monkeypatch):
    for module in (bench_generate, generation):
        monkeypatch.setattr(module, "device_bytes", lambda device: int(80e9))
    assert impossible(Case("llama2-7b", 8, 32768, "static")) == "does not fit: needs 151 GB"
    assert (
        impossible(Case("llama2-7b", 8, 32768, "static", layers=4)) == "does not fit: needs 151 GB"
    )  # the whole model's
    assert impossible(Case("llama2-7b", 8, 32768, "million-4bit")) is None
    case = Case("llama3-8b", 1, 32768, "static-cudnn")
    assert case.bytes()["cache"] == 2 * 32 * 8 * 128 * 32768 * 2
    assert case.longest(int(80e9)) == (80e9 - case.bytes()["weights"]) // (2 * 32 * 8 * 128 * 2) // 1024 * 1024


def test_largest():
    assert largest(lambda n: n <= 999_999) == 976 * 1024
    assert largest(lambda n: n <= 5000, step=10) == 5000
    assert largest(lambda n: False) == 0


def test_million_tokens(monkeypatch, tmp_path):
    monkeypatch.setattr(million_tokens, "RESULTS", tmp_path / "none")
    arguments = ["--device", "cpu", "--save", "--out", str(tmp_path)]
    assert million_tokens.main([*arguments, "--model", "tiny", "--tokens", "20000", "--backend", "eager"]) == 0
    assert million_tokens.main([*arguments, "--model", "llama3-8b", "--longest", "--presets", "4bit,1bit"]) == 0
    monkeypatch.setattr(million_tokens, "head_seconds", lambda *args: 1e-6)
    assert (
        million_tokens.main([*arguments, "--model", "tiny", "--tokens", "600", "--layers", "1", "--backend", "eager"])
        == 0
    )
    stored = json.loads((tmp_path / "million_tokens.json").read_text())
    step, part = stored["decode"]
    assert part["layers"] == 1 and part["ms"] > 1.9 * part["ms_measured"]
    assert step["tokens"] == 20000 and step["ms"] > 0 and step["cache_gb"] < 0.3 * step["dense_cache_gb"]
    assert step["machine"] in stored["machines"]
    assert not any(x["measured"] for x in stored["longest"])
    longest = {(x["preset"], x["limit_gb"]): x["tokens"] for x in stored["longest"]}
    assert longest["4bit", 80] > 1 << 20  # a million tokens in 80 GB
    assert longest["1bit", 80] > 3 * longest["4bit", 80]


def test_under_pytest():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--benchmark-only",
        "-p",
        "no:cacheprovider",
        "-k",
        "cpu and million-2bit",
    ]
    # A worker of pytest-xdist runs no benchmarks.
    env = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run([*command, "benchmarks/bench_generate.py"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.filterwarnings("error:attention implementation")  # else dequantising is what is measured
def test_longest_context_by_allocation(monkeypatch, tmp_path):
    """The path that a GPU takes, with the sum of bytes in the place of its cap: a prefill chunk and a step run in every cache that is
    tried, what is beyond the memory is arithmetic and says so, and arithmetic does not replace a measurement."""
    for module in (million_tokens, generation):
        monkeypatch.setattr(module, "device_bytes", lambda device: 20_000_000)
    caps, seen = [], []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", caps.append)
    monkeypatch.setattr(million_tokens, "BEHIND", 200)
    monkeypatch.setattr(million_tokens, "CHUNK", 100)
    works = million_tokens.fill

    def watched(cache, model, tokens, batch):
        seen.append(cache)
        works(cache, model, tokens, batch)

    monkeypatch.setattr(million_tokens, "fill", watched)
    monkeypatch.setattr(million_tokens, "free_memory", lambda device: seen and seen[-1].check())
    arguments = [
        "--device",
        "cpu",
        "--model",
        "tiny",
        "--longest",
        "--preset",
        "2bit",
        "--save",
        "--out",
        str(tmp_path),
    ]
    assert million_tokens.main([*arguments, "--limits", "0.01,0.03"]) == 0
    assert caps == [0.5, 1.0]
    lengths = {int(x.get_seq_length()) for x in seen}
    assert max(lengths) == million_tokens.BEHIND + million_tokens.CHUNK + 1
    rows = {
        x["limit_gb"]: x
        for x in json.loads((tmp_path / "million_tokens.json").read_text())["longest"]
        if x["model"] == "tiny"
    }
    assert rows[0.01]["measured"] and rows[0.01]["tokens"] % million_tokens.STEP == 0
    assert 0.018 < rows[0.01]["cache_gb"] <= 0.02
    assert not rows[0.03]["measured"] and rows[0.03]["cache_gb"] < 0.03
    monkeypatch.setattr(million_tokens, "device_bytes", lambda device: None)
    assert million_tokens.main([*arguments, "--limits", "0.01,0.04"]) == 0
    again = {
        x["limit_gb"]: x
        for x in json.loads((tmp_path / "million_tokens.json").read_text())["longest"]
        if x["model"] == "tiny"
    }
    assert again[0.01] == rows[0.01] and not again[0.04]["measured"]


@pytest.mark.filterwarnings("error:attention implementation")  # else dequantising is what is measured
def test_longest_context_stops_where_memory_ends(monkeypatch):
    """Out of memory is an answer, any other error is one of its own."""
    monkeypatch.setattr(million_tokens, "device_bytes", lambda device: 1 << 40)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda fraction: None)
    monkeypatch.setattr(million_tokens, "BEHIND", 200)
    monkeypatch.setattr(million_tokens, "CHUNK", 100)
    model = build_model(model_config("tiny"), "cpu", torch.bfloat16)

    def allocate(error):
        def make(config, books, tokens, *rest):
            if tokens > 5 * million_tokens.STEP:
                raise error
            return MillionStaticCache(config, books, tokens, *rest)

        return make

    monkeypatch.setattr(million_tokens, "MillionStaticCache", allocate(RuntimeError("CUDA error: out of memory")))
    (found,) = million_tokens.longest_context("tiny", "4bit", [80.0], None, "cpu", model)
    assert found["tokens"] == 5 * million_tokens.STEP and found["measured"]
    monkeypatch.setattr(million_tokens, "MillionStaticCache", allocate(RuntimeError("no such kernel")))
    with pytest.raises(RuntimeError, match="no such kernel"):
        million_tokens.longest_context("tiny", "4bit", [80.0], None, "cpu", model)


def test_bytes_are_the_allocated_ones(tiny):
    for name in ("million-4bit", "million-1bit", "static"):
        kind = KINDS[name]
        with attending(tiny, kind, TOKENS):
            cache = kind.make(tiny, TOKENS, BATCH)
            fill(cache, tiny, 1, BATCH)
        predicted = kind.cache_bytes(tiny.config, TOKENS, BATCH, torch.float32, "cpu")
        if isinstance(cache, MillionStaticCache):
            assert cache.cache_bytes == predicted
            assert 0 <= cache.codebook_bytes - kind.codebook_bytes(tiny.config) < 1000  # the frequencies
        else:
            assert sum(x.keys.nbytes + x.values.nbytes for x in cache.layers) == predicted


def test_calibration_is_timed_by_phase(tmp_path):
    arguments = [
        "--device",
        "cpu",
        "--model",
        "tiny",
        "--tokens",
        "2048",
        "--context",
        "512",
        "--sensitivity-tokens",
        "512",
    ]
    arguments += ["--preset", "2bit", "--save", "--out", str(tmp_path)]
    for more in ([], [], ["--allocate", "--finetune-steps", "1"]):
        assert bench_calibrate.main([*arguments, *more]) == 0
    stored = json.loads((tmp_path / "calibrate.json").read_text())
    plain, tuned = stored["rows"]
    assert plain["machine"] in stored["machines"]
    assert set(plain["seconds"]) == {"reading", "sensitivity", "k-means"}
    assert set(tuned["seconds"]) == {*plain["seconds"], "allocation", "fine-tuning"}
    for row in stored["rows"]:
        assert all(x > 0 for x in row["seconds"].values())
        assert sum(row["seconds"].values()) <= row["seconds_total"] + 0.03  # each is rounded


def test_noise_is_not_extrapolated():
    assert generation.extrapolated(3e-3, 1e-3, 4.0) == pytest.approx(9e-3)
    with pytest.raises(RuntimeError, match="a step took 1 ms, its head alone 2: too noisy"):
        generation.extrapolated(1e-3, 2e-3, 4.0)
