"""Small floating-point formats: fp8 (e4m3) as vLLM's and TensorRT-LLM's caches have it, and NVFP4.

fp8 has one scale a layer for keys and one for values, from calibration, so that the largest element becomes 448.
NVFP4 has e2m1 elements in blocks of 16 channels, an e4m3 scale a block, and one fp32 scale a tensor that puts the largest
block scale at 448 (NVIDIA, "Introducing NVFP4"; OCP MX specification for e2m1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from million_cache.peers.base import Peer, Quantised, Sample, Tokens

E4M3_MAX = 448.0
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
BLOCK = 16


def e4m3(x: Tensor) -> Tensor:
    """x rounded to fp8 e4m3, saturating."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype)


def e2m1(x: Tensor) -> Tensor:
    """x rounded to fp4 e2m1, saturating at 6; ties to the even mantissa."""
    grid = E2M1.to(x.device)
    size = x.abs().clamp(max=6.0)
    upper = torch.bucketize(size, grid).clamp(max=7)  # grid[upper - 1] < size <= grid[upper]
    lower = (upper - 1).clamp(min=0)
    down, up = size - grid[lower], grid[upper] - size
    # Grid entries alternate between mantissas 0 and 1, so the even one has the even index.
    pick = torch.where((down < up) | ((down == up) & (lower % 2 == 0)), lower, upper)
    return grid[pick] * x.sign()


def nvfp4(x: Tensor, scale: Tensor) -> Tensor:
    """x [..., D] through NVFP4 with the tensor's scale (fp32 scalar)."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    step = e4m3(blocks.abs().amax(-1, keepdim=True) / 6 / scale) * scale
    return (e2m1(blocks / step.clamp(min=1e-30)) * step).flatten(-2)


class _Scaled(Peer):
    """One scale a layer for keys and values each: the largest element of calibration becomes ``largest``."""

    largest: float

    def __init__(self) -> None:
        self.state: dict[int, tuple[Tensor, Tensor]] = {}

    def calibrate(self, samples: dict[int, Sample]) -> None:
        self.state = {
            i: (s.rotated_keys.abs().max() / self.largest, s.values.abs().max() / self.largest)
            for i, s in samples.items()
        }

    @property
    def codebook_bytes(self) -> int:
        return 8 * len(self.state)


class Fp8(_Scaled):
    """fp8 e4m3, one scale a tensor."""

    name, paper, largest = "fp8", "vLLM, TensorRT-LLM", E4M3_MAX

    def quantise(self, layer: int, tokens: Tokens) -> tuple[Quantised, Quantised]:
        pairs = zip((tokens.keys, tokens.values), self.state[layer])
        k, v = (Quantised(e4m3(x / s) * s, codes=8 * x.numel()) for x, s in pairs)
        return k, v


class Nvfp4(_Scaled):
    """NVFP4."""

    name, paper, largest = "nvfp4", "NVIDIA Blackwell", 6 * E4M3_MAX

    def quantise(self, layer: int, tokens: Tokens) -> tuple[Quantised, Quantised]:
        pairs = zip((tokens.keys, tokens.values), self.state[layer])
        k, v = (Quantised(nvfp4(x, s), codes=4 * x.numel(), scales=8 * x.numel() / BLOCK) for x, s in pairs)
        return k, v
