"""Generation with whole models: time of a decode step, time to the first token, peak memory, tokens/s, longest context.

Random weights in the shapes of Llama-3.1-8B and Llama-2-7B, bfloat16. The baselines are named by cache:

* ``static``: transformers' StaticCache and SDPA, compiled; ``static-cudnn``, ``static-flash``: the same with one cuDNN or
  FlashAttention kernel over the valid tokens, the strongest 16-bit decode attention in PyTorch;
* ``dynamic``: DynamicCache, eager; ``quanto-4bit``, ``hqq-4bit``: transformers' QuantizedCache, eager;
* ``million-4bit``, ``-3bit``, ``-2bit``, ``-1bit``: compiled like ``static``.

`pytest --benchmark-only benchmarks/bench_generate.py` runs a small selection (a tiny model where there is no GPU). Any other:

    python -m benchmarks.bench_generate --model llama3-8b --batch 1 --tokens 32768 --caches million-4bit,static --save

``--weights int8`` or ``int4`` quantises the decoder layers by torchao, weights alone, under every cache that is named; such rows
stand by themselves and are compared with baselines of the same weights.

One line a case is printed at once; ``--save`` merges each result into ``results/generate.json`` when it is there and rewrites
the table and the plot beside it. A case that does not fit, whose package is missing or that fails is recorded as that.
With ``--layers`` fewer layers are measured and times and bytes are **extrapolated** to the whole model: what is in every layer
is multiplied, embedding and vocabulary projection are measured apart. Such rows are marked with ``~``. Steps of caches that grow
are not extrapolated.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

from benchmarks.conftest import RESULTS, machine, machine_label, processor
from benchmarks.generation import (
    KINDS,
    SHAPES,
    WEIGHTS,
    Kind,
    attending,
    build_model,
    compiling,
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
    prefill_seconds,
    quantise_weights,
    reset_peak,
    weight_bytes,
)
from benchmarks.timing import synchronize

DTYPE = torch.bfloat16
NAME = "generate"  # of the files in results/
BASELINES = ("static", "static-cudnn")  # whose time the table divides by each row's
KEY = ("processor", "model", "weights", "batch", "tokens", "cache")  # what makes two results the same case
LONGEST = 1 << 26  # tokens beyond which nobody asks what fits
# Each new length costs tens of milliseconds a step however many layers there are, presumably cuDNN's plan for it.
NOT_EXTRAPOLATED = "not extrapolated: a step of a cache that grows is more than its layers; leave --layers out"


@dataclass(frozen=True)
class Case:
    """What is measured: ``tokens`` is the length after the timed step, and the length of the prompt for the time to the first
    token. ``layers``: how many are measured, None for all."""

    model: str
    batch: int
    tokens: int
    cache: str
    layers: int | None = None
    device: str = "cuda"
    weights: str = "bf16"  # of `WEIGHTS`

    @property
    def processor(self) -> str:
        return processor(self.device)

    @property
    def kind(self) -> Kind:
        return KINDS[self.cache]

    @property
    def name(self) -> str:
        layers = f" ({self.layers} layers)" if self.layers else ""
        return f"{self.model}{layers}, {self.weights}, batch {self.batch}, {self.tokens} tokens, {self.cache}"

    @property
    def factor(self) -> float:
        """Layers of the whole model, over those measured."""
        return 1.0 if self.layers is None else model_config(self.model).num_hidden_layers / self.layers

    def whole_peak_gb(self) -> float | None:
        """`peak_bytes` with the weights, codebooks and cache of the layers that are not measured; None on a CPU."""
        peak, whole, measured = peak_bytes(self.device), self.bytes(), self.bytes(layers=self.layers)
        more = sum(whole[x] - measured[x] for x in ("weights", "codebooks", "cache"))
        return None if peak is None else (peak + more) / 1e9

    def bytes(self, tokens: int | None = None, layers: int | None = None) -> dict[str, int]:
        """Bytes of weights, codebooks, cache and least workspace for ``tokens`` (default: the case's), by default of all layers."""
        config, tokens = model_config(self.model, layers), tokens or self.tokens
        return {
            "weights": weight_bytes(self.model, layers, DTYPE.itemsize, self.weights),
            "codebooks": self.kind.codebook_bytes(config),
            "cache": self.kind.cache_bytes(config, tokens, self.batch, DTYPE, self.device),
            "workspace": self.kind.workspace_bytes(config, tokens, self.batch, DTYPE),
        }

    def longest(self, memory: int) -> int:
        """Tokens a row for which weights, codebooks, cache and least workspace fit ``memory`` bytes, by arithmetic."""
        return largest(lambda tokens: tokens <= LONGEST and sum(self.bytes(tokens).values()) <= memory)


def decode(case: Case, model, timer: Callable, backend: str) -> dict:
    """A decode step: compiled and captured, over a filled cache, timed by ``timer(step, device)`` in seconds.

    Times are in ms where the name says so, else in s; bytes in GB (1e9). ``ms``, ``tokens_per_s`` and ``peak_gb`` are of the whole
    model. Raises whatever goes wrong, `torch.OutOfMemoryError` included.
    """
    begin, factor = time.perf_counter(), case.factor
    head = head_seconds(model, case.batch, case.device) if factor != 1 else 0.0
    with compiling(case.weights), attending(model, case.kind, case.tokens):
        cache = case.kind.make(model, case.tokens, case.batch)
        fill(cache, model, case.tokens - 1, case.batch)
        synchronize(case.device)
        filled = time.perf_counter()
        reset_peak(case.device)
        step = decode_step(model, case.kind, cache, case.batch, backend)
        compiled = time.perf_counter()
        seconds = timer(step, case.device)
        whole = extrapolated(seconds, head, factor)
        return {
            "ms": whole * 1e3, "tokens_per_s": case.batch / whole, "peak_gb": case.whole_peak_gb(), "ms_measured": seconds * 1e3,
            "fill_s": filled - begin, "compile_s": compiled - filled,
        }  # fmt: skip


def prefill(case: Case, model, repeats: int) -> dict:
    """The time to the first token, seconds, of the whole model, and the peak memory with it. Raises whatever goes wrong."""
    reset_peak(case.device)
    with attending(model, case.kind, case.tokens):
        seconds = prefill_seconds(
            model, lambda: case.kind.make(model, case.tokens, case.batch), case.tokens, case.batch, repeats
        )
    return {"seconds": seconds * case.factor, "peak_gb": case.whole_peak_gb(), "seconds_measured": seconds}


def impossible(case: Case) -> str | None:
    """Why a case need not be tried: its package is not installed, or what it needs at least is more than the GPU has."""
    if missing := case.kind.missing():
        return f"not installed: {missing}"
    memory, needed = device_bytes(case.device), sum(case.bytes().values())
    if memory is not None and needed > memory:
        return f"does not fit: needs {needed / 1e9:.0f} GB"
    return None


def attempt(case: Case, phase: Callable[[], dict]) -> dict:
    """What ``phase`` returns with ``status`` "ok", or in ``status`` why there is nothing; never raises."""
    result = {"status": impossible(case), "layers": case.layers or model_config(case.model).num_hidden_layers}
    if result["status"]:
        return result
    try:
        free_memory(case.device)
        result |= phase() | {"status": "ok"}
    except Exception as error:
        text = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
        result["status"] = "does not fit: out of memory" if is_out_of_memory(error) else f"failed: {text}"
    with suppress(RuntimeError):  # a kernel that died takes the device with it: `device_lost`
        free_memory(case.device)  # not in `except`, whose traceback holds tensors
    return result


def run_case(case: Case, model, phases=("decode",), *, backend="inductor", timer: Callable = mean_seconds, repeats=2) -> dict:  # fmt: skip
    """The result of one case: `KEY`, what is known by arithmetic, and `attempt` for "decode" and "prefill", as far as asked."""
    entry: dict = {name: getattr(case, name) for name in KEY}
    parts, memory = case.bytes(), device_bytes(case.device)
    entry |= {"cache_gb": parts["cache"] / 1e9, "required_gb": sum(parts.values()) / 1e9}
    if memory is not None:
        entry["longest_tokens"] = case.longest(memory)
    if "prefill" in phases:
        entry["prefill"] = attempt(case, lambda: prefill(case, model, repeats))
    if "decode" in phases and case.factor != 1 and case.kind.grows:
        entry["decode"] = {"status": NOT_EXTRAPOLATED, "layers": case.layers}
    elif "decode" in phases:
        entry["decode"] = attempt(case, lambda: decode(case, model, timer, backend))
    return entry


def device_lost(device: str) -> bool:
    """Whether an illegal access or the like has made every further call on the device fail."""
    try:
        synchronize(device)
    except RuntimeError:
        return True
    return False


def about(entry: dict, phase: str) -> str:
    """A tilde for figures that are extrapolated."""
    return "" if entry[phase]["layers"] == model_config(entry["model"]).num_hidden_layers else "~"


def line(entry: dict) -> str:
    """One printed line of a result."""
    parts = []
    for phase in (x for x in ("decode", "prefill") if x in entry):
        x, tilde = entry[phase], about(entry, phase)
        if x["status"] != "ok":
            parts.append(f"{phase} {x['status']}")
            continue
        if phase == "decode":
            text = f"{tilde}{x['ms']:.2f} ms/token, {tilde}{x['tokens_per_s']:.0f} tokens/s (compile {x['compile_s']:.0f} s, "
            text += f"fill {x['fill_s']:.1f} s)"
        else:
            text = f"first token {tilde}{x['seconds']:.3f} s"
        parts.append(text + ("" if x["peak_gb"] is None else f", peak {tilde}{x['peak_gb']:.1f} GB"))
    name = f"{entry['model']} {entry['weights']} b{entry['batch']} {entry['tokens']} {entry['cache']}"
    return f"{name}: {'; '.join(parts)}; cache {entry['cache_gb']:.2f} GB"


class Results:
    """``generate.json``, ``.md`` and ``.png`` in a directory.

    Starts from what the directory, else ``benchmarks/results``, holds. Of the same case (`KEY`) a new "decode" or "prefill"
    replaces the old one; figures are not replaced by a failure, nor by those of fewer layers.
    """

    def __init__(self, directory: Path):
        self.path = directory / f"{NAME}.json"
        source = self.path if self.path.exists() else RESULTS / f"{NAME}.json"
        stored = json.loads(source.read_text()) if source.exists() else {"machines": {}, "cases": []}
        self.machines: dict[str, dict] = stored["machines"]
        self.cases = {self.key(x): x for x in stored["cases"]}

    @staticmethod
    def key(entry: dict) -> tuple:
        return tuple(entry[name] for name in KEY)

    def add(self, entry: dict) -> None:
        here = machine()
        label = machine_label(here)
        self.machines[label] = here
        merged = dict(self.cases.get(self.key(entry), {}))
        for name, value in entry.items():
            if name in ("decode", "prefill"):
                old = merged.get(name, {"status": "", "layers": 0})
                worse = value["status"] != "ok" or value["layers"] < old["layers"]
                if old["status"] == "ok" and worse:
                    continue
                value = value | {"machine": label}
            merged[name] = value
        self.cases[self.key(entry)] = merged
        used = {x[phase]["machine"] for x in self.cases.values() for phase in ("decode", "prefill") if phase in x}
        self.machines = {name: self.machines[name] for name in sorted(used)}

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        order = {name: i for i, name in enumerate((*SHAPES, *WEIGHTS, *KINDS))}
        cases = sorted(
            self.cases.values(), key=lambda x: (x["processor"], order[x["model"]], order[x["weights"]], x["batch"], x["tokens"], order[x["cache"]])
        )  # fmt: skip
        self.path.write_text(json.dumps({"machines": self.machines, "cases": cases}, indent=1) + "\n")
        self.path.with_suffix(".md").write_text(table(cases, self.machines))
        if any(figure(x, "decode", "ms") for x in cases):
            plot(cases, self.path.with_suffix(".png"))


def figure(entry: dict, phase: str, field: str) -> float | None:
    """A figure of a result, None where there is none."""
    return entry.get(phase, {}).get(field)


def table(cases: list[dict], machines: dict[str, dict]) -> str:
    """Markdown: for every GPU (or CPU) one row a case, with its speed relative to the baselines at the same model, weights, batch and
    length."""

    def place(entry: dict) -> tuple:
        return tuple(entry[name] for name in KEY if name != "cache")

    by_cache = {(place(x), x["cache"]): x for x in cases}

    def cell(entry: dict, phase: str, field: str, form: str) -> str:
        value = figure(entry, phase, field)
        return "" if value is None else about(entry, phase) + format(value, form)

    def relative(entry: dict, baseline: str, phase: str, field: str) -> str:
        """The baseline's time over the row's."""
        other = by_cache.get((place(entry), baseline), {})
        base, own = figure(other, phase, field), figure(entry, phase, field)
        if not base or not own or entry["cache"] == baseline:
            return ""
        return f"{base / own:.2f}"

    def where(entry: dict) -> str:
        """The machines of a row, by their letters in the list above the table."""
        used = dict.fromkeys(entry[phase].get("machine") for phase in ("decode", "prefill") if phase in entry)
        return ", ".join(letters[x] for x in used if x in letters)

    letters = {label: chr(ord("A") + i) for i, label in enumerate(machines)}

    heads = [
        "model", "weights", "batch", "tokens", "cache", "ms a step", "tokens/s", *(f"x {name}" for name in BASELINES), "first token, s", "first token x static",
        "cache, GB", "peak of decode, GB", "peak with prefill, GB", "longest context", "on", "note",
    ]  # fmt: skip
    rows: dict[str, list] = {}
    for x in cases:
        notes = dict.fromkeys(x[phase]["status"] for phase in ("decode", "prefill") if phase in x)
        layers = {x[phase]["layers"] for phase in ("decode", "prefill") if phase in x and about(x, phase)}
        note = "; ".join(
            [*(n.replace("|", "/") for n in notes if n != "ok"), *(f"~ from {n} layers" for n in sorted(layers))]
        )
        rows.setdefault(x["processor"], []).append([
            x["model"], x["weights"], str(x["batch"]), str(x["tokens"]), x["cache"], cell(x, "decode", "ms", ".2f"),
            cell(x, "decode", "tokens_per_s", ".0f"), *(relative(x, name, "decode", "ms") for name in BASELINES),
            cell(x, "prefill", "seconds", ".3f"), relative(x, "static", "prefill", "seconds"), f"{x['cache_gb']:.2f}",
            cell(x, "decode", "peak_gb", ".1f"), cell(x, "prefill", "peak_gb", ".1f"), str(x.get("longest_tokens", "")), where(x), note,
        ])  # fmt: skip
    text = [
        "# Generation",
        "",
        "Written by `python -m benchmarks.bench_generate --save`, whose docstring says what the caches are. bfloat16, random weights; "
        "*int8*, *int4*: the decoder layers' by torchao. A "
        "step at a fixed length, in a CUDA graph where the cache compiles. *x NAME*: the time of NAME over the row's, above 1: faster. "
        "*~*: extrapolated from fewer layers. *longest context*: tokens a row for which weights, codebooks, cache and the least workspace "
        "fit the GPU, by arithmetic. *on*: the machine, by its letter below.",
        "",
        *(f"- {letters[label]}: {label}" for label in machines),
    ]
    for name, own in rows.items():
        text += ["", f"## {name}", "", *("| " + " | ".join(x) + " |" for x in (heads, ["---"] * len(heads), *own))]
    return "\n".join(text) + "\n"


def plot(cases: list[dict], path: Path) -> None:
    """Milliseconds a step: a panel for every GPU (or CPU), in it a group of bars for every model, batch and length, in that one for
    every cache that was timed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [x for x in cases if figure(x, "decode", "ms")]
    names = [name for name in KINDS if any(x["cache"] == name for x in timed)]
    panels: dict[str, dict[tuple, dict]] = {}  # of a processor's groups, milliseconds by cache
    for x in timed:
        group = x["model"], x["weights"], x["batch"], x["tokens"]
        panels.setdefault(x["processor"], {}).setdefault(group, {})[x["cache"]] = x["decode"]["ms"]
    most = max(len(groups) for groups in panels.values())
    sheet, axes = pyplot.subplots(len(panels), figsize=(2 + 1.6 * most, 4.5 * len(panels)), squeeze=False)
    for axis, (title, groups) in zip(axes[:, 0], panels.items()):
        for at, own in enumerate(groups.values()):
            width = 0.85 / len(own)
            for i, name in enumerate(x for x in names if x in own):
                color = f"C{list(KINDS).index(name)}"
                bars = axis.bar(at + (i - (len(own) - 1) / 2) * width, own[name], width, color=color)
                axis.bar_label(bars, fmt="%.3g", fontsize=6)
        axis.set_xticks(
            range(len(groups)),
            [f"{m}{'' if w == 'bf16' else ' ' + w}\nbatch {b}\n{t} tokens" for m, w, b, t in groups],
            fontsize=8,
        )
        axis.set(title=title, ylabel="ms a decode step", yscale="log", xlim=(-0.6, most - 0.4))
        axis.grid(True, axis="y", which="both", alpha=0.2)
        handles = [pyplot.Rectangle((0, 0), 1, 1, color=f"C{list(KINDS).index(name)}") for name in names]
        axis.legend(handles, names, fontsize=7)
    sheet.tight_layout()
    sheet.savefig(path, dpi=110)
    pyplot.close(sheet)


# -- pytest ------------------------------------------------------------------------------------------------------------------

# A GPU minute or two: 4 layers, extrapolated. The whole model takes the command line.
SELECTION = {
    "cpu": Case("tiny", 2, 256, "static", device="cpu"),
    "cuda": Case("llama3-8b", 1, 32768, "static", layers=4),
}
_models: dict[str, object] = {}  # one a device for the session


@pytest.mark.parametrize("name", ["static", "static-cudnn", "dynamic", "million-4bit", "million-2bit"])
def bench_generate(benchmark, request, device, name):
    """A decode step. ``--save-results`` merges GPU results into ``results/generate.json``."""
    case = replace(SELECTION[device], cache=name)
    if case.factor != 1 and case.kind.grows:
        pytest.skip(NOT_EXTRAPOLATED)
    if device not in _models:
        _models[device] = build_model(model_config(case.model, case.layers), device, DTYPE)

    def timer(step: Callable, device: str) -> float:
        benchmark.pedantic(lambda: (step(), synchronize(device)), rounds=10, warmup_rounds=2)
        return mean_seconds(step, device)

    phases = ("prefill", "decode")
    entry = run_case(case, _models[device], phases, backend=default_backend(device), timer=timer, repeats=1)
    for phase in phases:
        assert entry[phase]["status"] == "ok", entry[phase]["status"]
    benchmark.extra_info.update(entry)
    benchmark.name += f" ({entry['decode']['ms']:.2f} ms)"
    if device == "cuda" and request.config.getoption("--save-results"):
        results = Results(RESULTS)
        results.add(entry)
        results.save()


# -- command line ------------------------------------------------------------------------------------------------------------


def default_backend(device: str) -> str:
    """Of torch.compile. On a CPU only for trying the code out: without inductor's minutes of C++ compilation."""
    return "inductor" if device == "cuda" else "aot_eager"


def _numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def _names(known) -> object:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [x for x in names if x not in known]:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; choose from {', '.join(known)}")
        return names

    return parse


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    caches = ["static", "static-cudnn", "dynamic", "quanto-4bit", "hqq-4bit", "million-4bit", "million-2bit"]
    add = parser.add_argument
    add("--model", type=_names(SHAPES), default=["llama3-8b" if gpu else "tiny"], help=", ".join(SHAPES))
    add("--batch", type=_numbers, default=[1, 8, 32] if gpu else [2])
    add("--tokens", type=_numbers, default=[1024, 8192, 32768, 131072] if gpu else [256])
    add("--caches", type=_names(KINDS), default=caches, help=", ".join(KINDS))
    add("--weights", type=_names(WEIGHTS), default=["bf16"], help=f"{', '.join(WEIGHTS)}; int8 and int4 need torchao")
    add("--layers", type=int, help="measure so many and extrapolate: compiles faster")
    add("--ttft", action="store_true", help="also measure the time to the first token and the peak memory of prefill")
    add("--no-decode", action="store_true", help="no decode step: with --ttft, nothing is compiled")
    add("--steps", type=int, default=20, help="decode steps in a row that are timed, three times")
    add("--repeats", type=int, default=2, help="prefills that are timed, after a short one")
    add("--minutes", type=float, default=float("inf"), help="begin no case after so many minutes")
    add("--save", action="store_true", help=f"merge into {NAME}.json and rewrite {NAME}.md and {NAME}.png")
    add("--out", type=Path, default=RESULTS, help="directory for --save; a new one starts from benchmarks/results")
    add("--device", choices=["cuda", "cpu"], default="cuda" if gpu else "cpu")
    add("--backend", help="of torch.compile; inductor, on a CPU aot_eager")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run every combination of the options; exit status 1 if a case failed otherwise than for lack of memory or a package."""
    options = parse_arguments(arguments)
    device, begin, failed = options.device, time.perf_counter(), 0
    phases = [x for x, wanted in (("prefill", options.ttft), ("decode", not options.no_decode)) if wanted]
    measuring = {
        "backend": options.backend or default_backend(device), "repeats": options.repeats,
        "timer": partial(mean_seconds, steps=options.steps),
    }  # fmt: skip
    results = Results(options.out)
    for shape, weights in product(options.model, options.weights):
        model = build_model(model_config(shape, options.layers), device, DTYPE)
        quantise_weights(model, weights)
        free_memory(device)
        print(
            f"{shape} {weights}: {model.config.num_hidden_layers} layers after {time.perf_counter() - begin:.0f} s",
            flush=True,
        )
        layers = options.layers if model.config.num_hidden_layers != model_config(shape).num_hidden_layers else None
        cases = [
            Case(shape, batch, tokens, name, layers, device, weights)
            for batch in options.batch
            for tokens in options.tokens
            for name in options.caches
        ]
        for i, case in enumerate(cases):
            if time.perf_counter() - begin > 60 * options.minutes:
                print(
                    f"{options.minutes} minutes are over; not run: {'; '.join(x.name for x in cases[i:])}", flush=True
                )
                return 1
            entry = run_case(case, model, phases, **measuring)
            print(f"[{time.perf_counter() - begin:4.0f} s] {line(entry)}", flush=True)
            failed += any(entry[phase]["status"].startswith("failed") for phase in phases)
            if options.save:
                results.add(entry)
                results.save()
            if device_lost(device):
                print(f"the device is lost; not run: {'; '.join(x.name for x in cases[i + 1 :])}", flush=True)
                return 1
        del model
        free_memory(device)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
