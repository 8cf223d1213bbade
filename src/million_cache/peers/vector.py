"""Vector quantisers: CQ (Zhang et al., arXiv 2405.03917) and MILLION as published (arXiv 2504.03661).

CQ couples c neighbouring channels of a head and gives them one code of b bits, "c8b" for b = 8. Keys are those before RoPE.
Centroids are learnt for every layer, head and channel group by k-means that weights each vector with the squared norm of
its gradient (section 3.3, Fisher-guided centroids). Nothing stays exact.

MILLION quantises keys after RoPE, without a transform; all heads and layers share one set of codebooks, one a subspace.
The last 128 tokens stay exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from million_cache.calibration.kmeans import assign, kmeans, seed
from million_cache.peers.base import Peer, Quantised, Sample, Tokens, Window
from million_ops.layout import CENTROIDS

CODE_BITS = 8
ITERATIONS = 15
MOST = 1 << 16  # vectors that shared codebooks are trained on


def split(x: Tensor, channels: int) -> Tensor:
    """[H, N, D] to sub-vectors [H * S, N, d] of d neighbouring channels."""
    return x.unflatten(2, (-1, channels)).transpose(1, 2).flatten(0, 1).contiguous()


def join(points: Tensor, heads: int) -> Tensor:
    """The inverse of `split`."""
    return points.unflatten(0, (heads, -1)).transpose(1, 2).flatten(2)


def lookup(points: Tensor, centroids: Tensor) -> Tensor:
    """Nearest centroid of every point. points [G, N, d], centroids [G, 256, d] -> [G, N, d]."""
    codes, _ = assign(points, centroids)
    return centroids.gather(1, codes[..., None].expand_as(points))


def weighted_kmeans(points: Tensor, weight: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Centroids [G, 256, d] that minimise ``sum_n w_n |x_n - c|^2`` (Lloyd). points [G, N, d], weight [G, N]."""
    G, _, d = points.shape
    centroids = seed(points)
    weight = weight.double()
    for _ in range(iterations):
        codes, distance = assign(points, centroids)
        flat = (codes + torch.arange(G, device=codes.device)[:, None] * CENTROIDS).view(-1)
        mass = torch.bincount(flat, weight.reshape(-1), G * CENTROIDS).view(G, CENTROIDS)
        total = torch.stack(
            [torch.bincount(flat, (weight * points[..., j]).reshape(-1), G * CENTROIDS) for j in range(d)], -1
        ).view(G, CENTROIDS, d)
        centroids = (total / mass.clamp(min=1e-300)[..., None]).float()
        empty = mass <= 0
        if empty.any():  # an idle centroid goes to one of the vectors that cost most
            worst = (weight * distance).topk(int(empty.sum(1).max()), 1).indices
            rank = (empty.cumsum(1) - 1).clamp(min=0)
            spare = points.gather(1, worst.gather(1, rank.clamp(max=worst.shape[1] - 1))[..., None].expand(-1, -1, d))
            centroids = torch.where(empty[..., None], spare, centroids)
    return centroids


class VectorPeer(Peer):
    """Keys and values through tables of centroids, [H * S, 256, d] a layer, for keys and for values."""

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.state: dict[int, tuple[Tensor, Tensor]] = {}

    def quantise(self, layer: int, tokens: Tokens) -> tuple[Quantised, Quantised]:
        def one(x: Tensor, centroids: Tensor) -> Quantised:
            out = join(lookup(split(x, self.channels), centroids), len(x))
            return Quantised(out, codes=CODE_BITS * x.numel() / self.channels)

        k, v = self.state[layer]
        return one(tokens.keys, k), one(tokens.values, v)

    @property
    def codebook_bytes(self) -> int:
        tables = {x.data_ptr(): 2 * x.numel() for state in self.state.values() for x in state}
        return sum(tables.values())


class CQ(VectorPeer):
    """Coupled quantisation, ``channels`` of them to a code of 8 bits."""

    paper = "arXiv 2405.03917"
    before_rope = True
    fisher = True

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.name = f"cq-{channels}c8b"

    def calibrate(self, samples: dict[int, Sample]) -> None:
        def fit(x: Tensor, fisher: Tensor) -> Tensor:
            return weighted_kmeans(split(x, self.channels), split(fisher, self.channels).sum(-1)).half().float()

        self.state = {i: (fit(s.keys, s.key_fisher), fit(s.values, s.value_fisher)) for i, s in samples.items()}


class Published(VectorPeer):
    """MILLION as published."""

    paper = "arXiv 2504.03661"
    window = Window(recent=128)

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.name = f"million-paper-{CODE_BITS // channels}"

    def calibrate(self, samples: dict[int, Sample]) -> None:
        generator = torch.Generator().manual_seed(0)

        def fit(name: str) -> Tensor:
            rows = torch.cat([getattr(s, name).flatten(0, 1) for s in samples.values()])  # [layers * H * N, D]
            some = torch.randperm(len(rows), generator=generator)[:MOST].to(rows.device)
            return kmeans(split(rows[None, some], self.channels), ITERATIONS, generator).half().float()  # [S, 256, d]

        k, v = fit("rotated_keys"), fit("values")
        heads = len(next(iter(samples.values())).values)
        self.shared = k, v
        self.state = {i: (k.repeat(heads, 1, 1), v.repeat(heads, 1, 1)) for i in samples}

    @property
    def codebook_bytes(self) -> int:
        return 2 * sum(x.numel() for x in self.shared) if self.state else 0
