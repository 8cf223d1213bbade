"""The fastest of many calls, on any device."""

from __future__ import annotations

import time

import torch


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def fastest(function, device: str, seconds: float = 0.1) -> float:
    """Seconds of the fastest call within about ``seconds``, three calls at least."""
    function()
    best, calls, stop = float("inf"), 0, time.perf_counter() + seconds
    while calls < 3 or time.perf_counter() < stop:
        synchronize(device)
        begin = time.perf_counter()
        function()
        synchronize(device)
        best, calls = min(best, time.perf_counter() - begin), calls + 1
    return best
