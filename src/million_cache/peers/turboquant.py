"""TurboQuant (Zandieh et al., arXiv 2504.19874): a random rotation, then the optimal scalar quantiser of what it makes.

A vector is split into its norm (fp16) and direction. A random rotation makes each coordinate of the direction follow the
density ``(1 - x^2)^((D - 3) / 2)`` (Lemma 1) whatever the data, so one Lloyd-Max quantiser serves all coordinates
(Algorithm 1, TurboQuant_mse). With ``qjl`` keys take b - 1 bits so and one bit a coordinate for the sign of a random
projection of the residual, which makes inner products unbiased (Algorithm 2, TurboQuant_prod); values never do.
Keys are those after RoPE; nothing needs calibration.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from million_cache.peers.base import FLOAT16, Peer, Quantised, Sample, Tokens, lloyd_1d, nearest

GRID = 1 << 16


def sphere_levels(dim: int, bits: int) -> Tensor:
    """Lloyd-Max centroids [2^bits] fp32 of one coordinate of a uniformly random direction in ``dim`` dimensions."""
    x = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID * 2 - 1
    log_density = (dim - 3) / 2 * torch.log1p(-x.square())
    return lloyd_1d(x, log_density.exp(), 2**bits, iterations=2000)


def random_rotation(dim: int, generator: torch.Generator) -> Tensor:
    """Uniformly random orthogonal matrix [dim, dim] fp32: Q of a Gaussian matrix, the signs of R's diagonal put right."""
    q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()


class TurboQuant(Peer):
    """TurboQuant at some number of bits, plain or with QJL on the keys' residual."""

    paper = "arXiv 2504.19874"

    def __init__(self, bits: int, qjl: bool = False) -> None:
        self.name, self.bits, self.qjl = f"turboquant-{bits}{'-qjl' if qjl else ''}", bits, qjl
        self.state: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.levels: dict[int, Tensor] = {}

    def calibrate(self, samples: dict[int, Sample]) -> None:
        generator = torch.Generator().manual_seed(0)
        for i, sample in samples.items():
            D, device = sample.values.shape[-1], sample.values.device
            if not self.levels:
                self.levels = {b: sphere_levels(D, b).to(device) for b in {self.bits, self.bits - self.qjl}}
            gauss = torch.randn(D, D, generator=generator)
            rotations = random_rotation(D, generator), random_rotation(D, generator), gauss
            self.state[i] = tuple(x.to(device) for x in rotations)

    def _scalar(self, x: Tensor, rotation: Tensor, bits: int) -> Tensor:
        norm = x.norm(dim=-1, keepdim=True).half().float()
        turned = x / norm.clamp(min=1e-12) @ rotation.T
        levels = self.levels[bits]
        return levels[nearest(turned, levels)] @ rotation * norm

    def quantise(self, layer: int, tokens: Tokens) -> tuple[Quantised, Quantised]:
        k_rotation, v_rotation, gauss = self.state[layer]
        vectors, D = tokens.keys.shape[0] * tokens.keys.shape[1], tokens.keys.shape[2]
        keys = self._scalar(tokens.keys, k_rotation, self.bits - self.qjl)
        norms = FLOAT16 * vectors
        if self.qjl:
            residual = tokens.keys - keys
            size = residual.norm(dim=-1, keepdim=True).half().float()
            keys = keys + math.sqrt(math.pi / 2) / D * size * ((residual @ gauss.T).sign() @ gauss)
        k = Quantised(keys, codes=self.bits * keys.numel(), scales=norms * (1 + self.qjl))
        values = self._scalar(tokens.values, v_rotation, self.bits)
        return k, Quantised(values, codes=self.bits * values.numel(), scales=norms)

    @property
    def codebook_bytes(self) -> int:
        # Rotations at 16 bit; an implementation could draw them from a seed.
        return sum(2 * x.numel() for state in self.state.values() for x in state[: 2 + self.qjl])
