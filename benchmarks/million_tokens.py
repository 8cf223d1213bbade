"""Decode at a context of a million tokens on one GPU, and the longest context that fits 80 and 141 GB, for Llama-3.1-8B.

    python -m benchmarks.million_tokens --preset 4bit --tokens 1048576 --save
    python -m benchmarks.million_tokens --longest --presets 4bit,3bit,2bit,1bit --save

The cache is filled with random keys and values through the public append op, 8192 tokens at a time; weights are random. The
longest context is measured, not calculated: under a cap on PyTorch's memory the real weights and codebooks stand, real caches
are allocated, and in what is left a chunk of a prefill (2048 tokens behind 16384) and a decode step must run; the length is
bisected. Workspaces do not depend on how many tokens are cached, so the rest of the cache stays empty. A limit beyond the GPU's
memory cannot be measured: there bytes are added up, with the workspace that was measured, and ``measured`` is false. GB are 1e9
bytes of PyTorch's allocator: the CUDA context, about half a gigabyte, comes on top.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.bench_generate import default_backend
from benchmarks.conftest import RESULTS, merge_rows
from benchmarks.generation import (
    KINDS,
    SHAPES,
    attending,
    build_model,
    decode_step,
    device_bytes,
    extrapolated,
    fill,
    free_memory,
    head_seconds,
    is_out_of_memory,
    largest,
    mean_seconds,
    model_config,
    peak_bytes,
    random_codebooks,
    reset_peak,
    weight_bytes,
)
from benchmarks.timing import synchronize
from million_cache import PRESETS, MillionStaticCache
from million_cache.models import cache_argument

DTYPE = torch.bfloat16
NAME = "million_tokens"  # of the file in results/
STEP = 8192  # tokens to which the longest context is found
LONGEST = 1 << 26  # tokens that no GPU holds
CHUNK, BEHIND = (
    2048,
    32768,
)  # tokens of the prefill that must fit, and of the cache before it: a full workspace of `long_chunk`


def decode_at(shape: str, preset: str, tokens: int, layers: int | None, device: str, backend: str) -> dict:
    """Time per token and memory of a decode step at ``tokens`` tokens, batch 1.

    Returns milliseconds, GB (1e9 bytes) and seconds, as named. With ``layers``, ``ms`` is extrapolated to the whole model, and
    bytes are those of the layers that are there.
    """
    kind, whole = KINDS[f"million-{preset}"], model_config(shape)
    reset_peak(device)
    model = build_model(model_config(shape, layers), device, DTYPE)
    config = model.config
    factor = whole.num_hidden_layers / config.num_hidden_layers
    head = head_seconds(model, 1, device) if factor != 1 else 0.0
    with attending(model, kind, tokens):
        cache = kind.make(model, tokens, 1)
        begin = time.perf_counter()
        fill(cache, model, tokens - 1, 1)
        synchronize(device)
        filled = time.perf_counter()
        step = decode_step(model, kind, cache, 1, backend)
        compiled = time.perf_counter()
        seconds = mean_seconds(step, device)
        cache.check()
    peak = peak_bytes(device)
    return {
        "model": shape, "preset": preset, "tokens": tokens, "layers": config.num_hidden_layers,
        "ms": extrapolated(seconds, head, factor) * 1e3, "ms_measured": seconds * 1e3,
        "weights_gb": sum(x.nbytes for x in model.parameters()) / 1e9, "codebooks_gb": cache.codebook_bytes / 1e9,
        "cache_gb": cache.cache_bytes / 1e9, "peak_gb": None if peak is None else peak / 1e9,
        "dense_cache_gb": KINDS["static"].cache_bytes(config, tokens, 1, DTYPE, device) / 1e9,
        "fill_s": filled - begin, "compile_s": compiled - filled,
    }  # fmt: skip


def longest_context(
    shape: str, preset: str, limits: list[float], layers: int | None, device: str, model=None
) -> list[dict]:
    """The most tokens (batch 1, a multiple of `STEP`) of which a cache can be allocated, prefilled and decoded with under each
    limit, GB. ``model``: of this shape, on the device; without one, or beyond its memory, bytes are added up.

    ``workspace_gb``: most bytes besides weights, codebooks and cache in the longest that fits, and for limits that could not be
    measured added there. ``dense_tokens``: of a dense 16-bit cache, by arithmetic.
    """
    kind, config, memory = KINDS[f"million-{preset}"], model_config(shape, layers), device_bytes(device)
    weights = weight_bytes(shape, layers, DTYPE.itemsize)
    workspace, books = 0, None

    def cache_bytes(tokens: int) -> int:
        return kind.cache_bytes(config, tokens, 1, DTYPE, device)

    def fits_by_arithmetic(tokens: int, limit: float) -> bool:
        return (
            tokens <= LONGEST and weights + kind.codebook_bytes(config) + cache_bytes(tokens) + workspace <= limit * 1e9
        )

    @torch.no_grad()
    def fits(tokens: int) -> bool:
        nonlocal workspace
        if cache_bytes(tokens) > memory:
            return False
        cache, found = None, True
        reset_peak(device)
        try:
            cache = MillionStaticCache(model, books, tokens, 1, device, DTYPE)
            fill(cache, model, min(BEHIND, tokens - CHUNK - 1), 1)
            for n in (CHUNK, 1):
                ids = torch.zeros(1, n, dtype=torch.long, device=device)
                logits = model(ids, use_cache=True, logits_to_keep=1, **cache_argument(model, cache)).logits
            if not bool(logits.isfinite().all()):
                raise RuntimeError("logits are not finite")
            if (peak := peak_bytes(device)) is not None:
                workspace = peak - weights - kind.codebook_bytes(config) - cache_bytes(tokens)
        except Exception as error:  # the op's own allocations raise a plain RuntimeError
            if not is_out_of_memory(error):
                raise
            found = False
        cache = logits = None
        free_memory(device)
        return found

    def measure(limit: float) -> int:
        with attending(model, kind, 0):
            free_memory(device)
            torch.cuda.set_per_process_memory_fraction(limit * 1e9 / memory)
            try:
                return largest(fits, STEP)
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0)

    if model is not None:
        books = random_codebooks(model, kind.pq)
        books.to(device)  # what every cache will share
    results = []
    for limit in sorted(limits):
        measured = model is not None and limit * 1e9 <= memory
        tokens = measure(limit) if measured else largest(partial(fits_by_arithmetic, limit=limit), STEP)
        dense = KINDS["static"].cache_bytes(config, 1, 1, DTYPE, device)
        results.append({
            "model": shape, "preset": preset, "limit_gb": limit, "layers": config.num_hidden_layers, "measured": measured,
            "status": "ok",
            "tokens": tokens, "cache_gb": cache_bytes(tokens) / 1e9 if tokens else 0.0, "workspace_gb": workspace / 1e9,
            "dense_tokens": max(0, int(limit * 1e9 - weights) // dense),
        })  # fmt: skip
    return results


def attempt(name: str, function) -> list[dict]:
    """The results of ``function``, or one that says why there is none. Prints a line each, at once."""
    try:
        found = function()
        results = found if isinstance(found, list) else [found]
    except Exception as error:
        text = str(error).strip().partition("\n")[0][:300]
        results = [{"status": "out of memory" if is_out_of_memory(error) else f"failed: {type(error).__name__}: {text}"}]  # fmt: skip
    for x in results:
        print(f"{name}: " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in x.items()), flush=True)  # fmt: skip
    return results


def keep(old: dict, new: dict) -> bool:
    """Whether a row stays: arithmetic replaces no measurement, nor arithmetic with a workspace that was measured."""
    measured = old.get("measured", False) or old.get("workspace_gb", 0) > new.get("workspace_gb", 0)
    return measured and not new.get("measured", True)


def save(directory: Path, section: str, key: tuple[str, ...], results: list[dict]) -> None:
    """Merge results into ``million_tokens.json``, at first a copy of that in ``benchmarks/results``."""
    path = directory / f"{NAME}.json"
    if not path.exists() and (RESULTS / path.name).exists():
        directory.mkdir(parents=True, exist_ok=True)
        shutil.copy(RESULTS / path.name, path)
    merge_rows(path, section, key, results, keep)


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 if anything asked for gave no figures."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=SHAPES, default="llama3-8b" if gpu else "tiny")
    add("--presets", "--preset", default="4bit", help=f"one or more of {', '.join(PRESETS)}, with commas")
    add("--tokens", type=int, default=1 << 20 if gpu else 1024)
    add("--layers", type=int, help="a model of so many layers: times are extrapolated, bytes are not")
    add("--longest", action="store_true", help="find the longest context instead of timing a step")
    add("--limits", default="80,141", help="of memory for --longest, GB")
    add("--save", action="store_true", help=f"merge into {NAME}.json")
    add("--out", type=Path, default=RESULTS, help="directory for --save; a new one starts from benchmarks/results")
    add("--device", choices=["cuda", "cpu"], default="cuda" if gpu else "cpu")
    add("--backend", help="of torch.compile; inductor, on a CPU aot_eager")
    options = parser.parse_args(arguments)
    shape, layers, device = options.model, options.layers, options.device
    if unknown := [x for x in options.presets.split(",") if x not in PRESETS]:
        parser.error(f"unknown preset {', '.join(unknown)}; choose from {', '.join(PRESETS)}")
    model = None
    if options.longest and device_bytes(device) is not None:
        model = build_model(model_config(shape, layers), device, DTYPE)  # one for all presets
    complete = True
    for preset in options.presets.split(","):
        name = f"{shape} {preset}"
        if options.longest:
            limits = [float(x) for x in options.limits.split(",")]
            section, key = "longest", ("model", "preset", "limit_gb", "layers")
            results = attempt(name, lambda p=preset, x=limits: longest_context(shape, p, x, layers, device, model))
            done = [x for x in results if x["status"] == "ok"]
        else:
            section, key = "decode", ("model", "preset", "tokens", "layers")
            backend = options.backend or default_backend(device)
            results = attempt(name, lambda p=preset, b=backend: decode_at(shape, p, options.tokens, layers, device, b))
            done = [x for x in results if "ms" in x]
        complete = complete and len(done) == len(results)
        if options.save and done:
            save(options.out, section, key, done)
        free_memory(device)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
