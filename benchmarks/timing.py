"""The fastest of many calls, on any device."""

from __future__ import annotations

import time

import torch


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


REPLAYS = 10


def replayed(function):
    """``function`` as a CUDA graph: what a compiled decode step launches, without Python's time in it."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
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


def fastest(function, device: str, seconds: float = 0.1) -> float:
    """Seconds of the fastest call within about ``seconds``, three calls at least; on a GPU, of its CUDA graph."""
    if device == "cuda":
        function = replayed(function)
    function()
    best, calls, stop = float("inf"), 0, time.perf_counter() + seconds
    while calls < 3 or time.perf_counter() < stop:
        best, calls = min(best, call_seconds(function, device)), calls + 1
    return best
