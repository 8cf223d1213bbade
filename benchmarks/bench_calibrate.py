"""How long a calibration takes, and how much memory, for models of the shapes in `generation.SHAPES`: random weights, random tokens.

Baseline: one forward over the same tokens, without which nobody calibrates. `pytest --benchmark-only benchmarks/bench_calibrate.py`
takes the tiny model. Any other:

    python -m benchmarks.bench_calibrate --model llama3-8b --tokens 65536 --finetune-steps 10 --save

Seconds are by phase, as the codebooks' provenance has them; k-means of random keys and values does the work of real ones. A step of
fine-tuning runs four contexts forwards twice and backwards once. ``--save`` merges the row into ``results/calibrate.json``.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks.conftest import RESULTS, merge_rows
from benchmarks.generation import SHAPES, build_model, model_config, peak_bytes, reset_peak
from benchmarks.timing import synchronize
from million_cache import PRESETS, calibrate

NAME = "calibrate"  # of the file in results/
KEY = ("model", "layers", "preset", "tokens", "context", "sensitivity_tokens", "allocate", "finetune_steps")


@torch.no_grad()
def forward_seconds(model, tokens: torch.Tensor, context: int) -> float:
    """Of a forward over ``tokens`` in contexts, without a cache; the fastest of two."""
    device, best = model.device.type, float("inf")
    for _ in range(2):
        synchronize(device)
        begin = time.perf_counter()
        for piece in tokens.split(context):
            model(piece[None].to(model.device), use_cache=False, logits_to_keep=1)
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best


def measure(
    shape: str, layers: int | None, preset: str, tokens: int, device: str, dtype: torch.dtype, context: int = 2048, **options
) -> dict:  # fmt: skip
    """Seconds by phase and in all, seconds of the baseline, peak GB (1e9 bytes; None on a CPU). ``options``: of `calibrate`."""
    model = build_model(model_config(shape, layers), device, dtype)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (tokens,), generator=generator)
    forward = forward_seconds(model, ids, context)
    reset_peak(device)
    begin = time.perf_counter()
    books = calibrate(model, ids, PRESETS[preset], context=context, progress=False, **options)
    total, peak = time.perf_counter() - begin, peak_bytes(device)
    made = books.provenance
    return {
        "model": shape, "layers": model.config.num_hidden_layers, "preset": preset, "tokens": tokens, "context": context,
        **{x: made[x] for x in ("sensitivity_tokens", "allocate", "finetune_steps")},
        "dtype": str(dtype).removeprefix("torch."), "seconds": made["seconds"], "seconds_total": round(total, 2),
        "forward_seconds": round(forward, 2), "peak_gb": None if peak is None else peak / 1e9,
        "codebooks_gb": books.nbytes / 1e9,
    }  # fmt: skip


def bench_calibrate(benchmark):
    row = benchmark.pedantic(
        lambda: measure("tiny", None, "2bit", 2048, "cpu", torch.float32, 512, sensitivity_tokens=1024), rounds=1
    )
    benchmark.extra_info.update(row, baseline="forward")


def main(arguments: list[str] | None = None) -> int:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=SHAPES, default="llama3-8b" if gpu else "tiny")
    add("--layers", type=int, help="of a smaller model; nothing is extrapolated")
    add("--preset", choices=PRESETS, default="4bit")
    add("--tokens", type=int, default=65536 if gpu else 4096)
    add("--context", type=int, default=2048)
    add("--sensitivity-tokens", type=int, default=16384 if gpu else 2048)
    add("--allocate", action="store_true")
    add("--finetune-steps", type=int, default=0)
    add("--save", action="store_true", help=f"merge into {NAME}.json")
    add("--out", type=Path, default=RESULTS, help="directory for --save")
    add("--device", choices=["cuda", "cpu"], default="cuda" if gpu else "cpu")
    options = parser.parse_args(arguments)
    row = measure(
        options.model, options.layers, options.preset, options.tokens, options.device,
        torch.float32 if options.device == "cpu" else torch.bfloat16, options.context,
        sensitivity_tokens=options.sensitivity_tokens, allocate=options.allocate, finetune_steps=options.finetune_steps,
    )  # fmt: skip
    print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    if options.save:
        merge_rows(options.out / f"{NAME}.json", "rows", KEY, [row])
    return 0


if __name__ == "__main__":
    sys.exit(main())
