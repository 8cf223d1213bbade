"""How benchmarks run: `pytest --benchmark-only` (all of them), options ``--refcheck`` and ``--save-results``.

Every case runs its baseline in the same process, before and after itself, and reports ``ratio``, the baseline's time over
its own (above 1: faster), from the fastest of many rounds: a neighbour on the machine can only add time. Without
``--benchmark-only`` nothing here is collected.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.timing import fastest, synchronize
from million_ops import backends, has_kernels

RESULTS = Path(__file__).parent / "results"
DEVICES = [x for x in ("cpu", "cuda") if has_kernels(x) and (x == "cpu" or torch.cuda.is_available())]


def pytest_addoption(parser):
    group = parser.getgroup("million benchmarks")
    group.addoption("--refcheck", action="store_true", help="compare every benchmarked result with the reference")
    group.addoption("--save-results", action="store_true", help="write benchmarks/results/*.json and *.png")


def pytest_ignore_collect(collection_path, config):
    wanted = config.getoption("benchmark_only", False) or config.getoption("benchmark_enable", False)
    return True if collection_path.name.startswith("bench_") and not wanted else None


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


def chip(device: str) -> str:
    """What results call the processor: ``cpu``, or the GPU's model, as ``h100`` or ``h200``."""
    if device != "cuda":
        return device
    words = re.findall(r"[a-z0-9]+", processor(device).lower())
    return next((x for x in words if re.search(r"\d", x)), device)


class Comparison:
    """One benchmark against its baselines; collects what ``--save-results`` writes."""

    def __init__(self, benchmark, config, device: str, name: str):
        self.benchmark, self.config, self.device, self.name = benchmark, config, device, name

    def __call__(self, function, baselines: dict, besides=None, **case) -> None:
        """Times ``function`` and ``baselines`` (name to function, or to seconds known already); the fastest counts. Several functions
        do the same to different data: `timing.fastest`. ``besides``: what both sides do besides, whose time is taken off on a GPU."""
        known = {name: x for name, x in baselines.items() if isinstance(x, float)}
        timed = {name: fastest(x, self.device) for name, x in baselines.items() if name not in known}
        rounds = max(5, min(2000, int(0.2 / fastest(function, self.device, 0.05))))
        one = function if callable(function) else function[0]
        self.benchmark.pedantic(lambda: (one(), synchronize(self.device)), rounds=rounds, warmup_rounds=2)
        for name in timed:
            timed[name] = min(timed[name], fastest(baselines[name], self.device))
        baseline, seconds = min((known | timed).items(), key=lambda x: x[1])
        mine = fastest(function, "cuda", 0.2) if self.device == "cuda" else self.benchmark.stats.stats.min
        if besides is not None:
            common = fastest(besides, self.device)
            case |= {"whole_us": mine * 1e6, "whole_baseline_us": seconds * 1e6}
            seconds, mine = seconds - common, mine - common
        self.benchmark.extra_info.update(case, baseline=baseline, baseline_us=seconds * 1e6, ratio=seconds / mine)
        self.benchmark.name += f" ({seconds / mine:.2f}x {baseline})"
        results = self.config.stash.setdefault(RESULTS_KEY, {}).setdefault(f"{chip(self.device)}_{self.name}", [])
        results.append(
            {**case, "us": mine * 1e6, "baseline": baseline, "baseline_us": seconds * 1e6, "ratio": seconds / mine}
        )


RESULTS_KEY = pytest.StashKey[dict]()


@pytest.fixture
def compare(benchmark, request, device) -> Comparison:
    return Comparison(benchmark, request.config, device, request.module.__name__.rpartition("bench_")[2])


@pytest.fixture
def refcheck(request) -> bool:
    return request.config.getoption("--refcheck")


def processor(device: str) -> str:
    """The name of the GPU or CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.partition(": ")[2] for x in lines if x.startswith("model name")), platform.processor())


def machine() -> dict:
    """What a figure depends on."""
    gpu = driver = copies = None
    if torch.cuda.is_available():
        here = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        there = torch.empty_like(here)
        copies = round(2 * here.numel() / fastest(lambda: there.copy_(here), "cuda", 0.2) / 1e12, 2)
        gpu = processor("cuda")
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = (
            subprocess.run(query, capture_output=True, text=True).stdout.strip() if shutil.which(query[0]) else None
        )
    return {
        "cpu": processor("cpu"),
        "gpu": gpu,
        "driver": driver,
        "copy_tb_per_s": copies,  # read and written
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernels": {name: state for name, state in backends().items() if not state.startswith("missing")},
        "date": time.strftime("%Y-%m-%d"),
    }


def machine_label(here: dict) -> str:
    """What results call a `machine`."""
    return f"{here['gpu'] or here['cpu']}, torch {here['torch']}, {here['date']}"


def merge_rows(
    path: Path, section: str, key: Sequence[str], rows: list[dict], keep: Callable[[dict, dict], bool] = lambda old, new: False
) -> None:  # fmt: skip
    """Merge rows into a section of a JSON file, which is made where it is not there; each says on which `machine` it was measured.

    One with the same ``key`` fields replaces the old one, unless ``keep(old, new)``. Machines that no row names are dropped.
    """
    stored = json.loads(path.read_text()) if path.exists() else {}
    here = machine()
    machines = stored.pop("machines", {}) | {machine_label(here): here}
    known = {tuple(x[name] for name in key): x for x in stored.get(section, [])}
    for x in rows:
        place = tuple(x[name] for name in key)
        if place not in known or not keep(known[place], x):
            known[place] = x | {"machine": machine_label(here)}
    stored[section] = list(known.values())
    used = sorted({x["machine"] for section_rows in stored.values() for x in section_rows})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machines": {x: machines[x] for x in used}, **stored}, indent=1) + "\n")


def pytest_sessionfinish(session):
    if not session.config.getoption("--save-results", False):
        return
    RESULTS.mkdir(exist_ok=True)
    for name, cases in session.config.stash.get(RESULTS_KEY, {}).items():
        path = RESULTS / f"{name}.json"
        path.write_text(json.dumps({"machine": machine(), "cases": cases}, indent=1) + "\n")
        if all("tokens" in x and "shape" in x for x in cases):
            plot([x for x in cases if "capacity" not in x], path.with_suffix(".png"))


def plot(cases: list[dict], path: Path) -> None:
    """Time against length, one panel a shape, one line a case; baselines dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(x["shape"] for x in cases))
    columns = min(4, len(shapes))
    rows = -(-len(shapes) // columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(6 * columns, 4.5 * rows), squeeze=False)
    for panel in panels.flat[len(shapes) :]:
        panel.set_visible(False)
    for panel, shape in zip(panels.flat, shapes):
        lines: dict[str, dict[int, float]] = {}
        for x in (x for x in cases if x["shape"] == shape):
            lines.setdefault(f"{x['case']}, {x['dtype']}", {})[x["tokens"]] = x["us"]
            lines.setdefault(f"baseline, {x['dtype']}", {})[x["tokens"]] = x["baseline_us"]
        for label, points in lines.items():
            style = (
                "k--" if label.startswith("baseline") and "float32" in label else "k:" if "baseline" in label else "o-"
            )
            panel.plot(list(points), list(points.values()), style, label=label, markersize=3)
        panel.set(title=shape, xlabel="tokens", ylabel="us", xscale="log", yscale="log")
        panel.grid(True, which="both", alpha=0.2)
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
