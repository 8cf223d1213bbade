"""The fastest of many calls, on any device."""

from __future__ import annotations

import math
import time
from functools import partial

import torch


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


REPLAYS = 10
MOST_COPIES = 512
SWEEP = 8  # times the L2 cache, which does not forget in order: one kernel read the same 134 MB 10 % faster than several such caches in turn
GRAPH_SECONDS = 1e-3  # what a CUDA graph lasts at least: launching one takes 1 to 2 us, which is not the calls' time


def copies(device: str, size: int) -> int:
    """How many caches of ``size`` bytes to read in turn, so that none is still in the GPU's L2 cache when its turn comes again: in a
    model's step gigabytes are read between two reads of one layer's cache. 1 on a CPU."""
    if device == "cpu":
        return 1
    return max(1, min(MOST_COPIES, -(-SWEEP * torch.cuda.get_device_properties(0).L2_cache_size // size)))


def replayed(*calls):
    """The calls, one after the other, as one CUDA graph: what a compiled decode step launches, without Python's time in it."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def call_seconds(function, device: str) -> float:
    """One call on the CPU; on a GPU the mean of `REPLAYS` calls, by the device's own clock."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(REPLAYS):
            function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / REPLAYS / 1e3
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def fastest(calls, device: str, seconds: float = 0.1) -> float:
    """Seconds of the fastest call within about ``seconds``, three at least. ``calls``: a function, or several that do the same to
    different data. On a GPU they are one CUDA graph, again and again for `GRAPH_SECONDS`, and the time is the mean of what each
    adds to a chain of small kernels: a kernel that starts before the one before it has ended must not overlap itself."""
    calls = [calls] if callable(calls) else list(calls)
    if device != "cuda":
        return _least(calls[0], device, seconds)
    calls *= max(1, math.ceil(GRAPH_SECONDS / call_seconds(replayed(*calls), device)))
    small = partial(torch.zeros(1024, device=device).add_, 1)
    chain = replayed(*[f for call in calls for f in (small, call)]), replayed(*[small] * len(calls))
    together, alone = (_least(function, device, seconds) for function in chain)
    return (together - alone) / len(calls)


def _least(function, device: str, seconds: float) -> float:
    function()
    best, count, stop = float("inf"), 0, time.perf_counter() + seconds
    while count < 3 or time.perf_counter() < stop:
        best, count = min(best, call_seconds(function, device)), count + 1
    return best
