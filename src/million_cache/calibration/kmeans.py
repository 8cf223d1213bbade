"""k-means of many small problems at once: one for each head and subspace.

Assignment is a matrix product: with ``x' = (-2 x, 1, |x|^2)`` and ``c' = (c, |c|^2, 1)``, ``x' . c' = |x - c|^2``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from million_ops.layout import CENTROIDS

# Scores held at once: what a CPU core's L2 holds, or enough to fill a GPU.
SCORES_CPU, SCORES_GPU = 1 << 18, 1 << 26
SUBSAMPLE = 4  # all but the last iterations look at this fraction of the points, if that leaves enough of them
MIN_SUBSAMPLE = 8 * CENTROIDS
POLISH = 3  # iterations over all points at the end


def assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid of every point.

    Args:
        points: [G, N, d] fp32.
        centroids: [G, 256, d] fp32.

    Returns:
        Index [G, N] int64, and squared distance [G, N] fp32, to about 5 digits.
    """
    G, N, _ = points.shape
    ones = torch.ones_like(points[..., :1])
    x = torch.cat((-2 * points, ones, points.square().sum(-1, keepdim=True)), -1).transpose(1, 2).contiguous()
    c = torch.cat((centroids, centroids.square().sum(-1, keepdim=True), torch.ones_like(centroids[..., :1])), -1)
    # An argmin over 256 floats is slow on CPU, a minimum is not: so the index takes the place of the distance's last 8 bits.
    # Non-negative floats order like their bits; negative ones are rounding errors of zero, and any of them will do.
    index = torch.arange(CENTROIDS, dtype=torch.int32, device=points.device)[:, None]
    best = torch.empty(G, N, dtype=torch.int32, device=points.device)
    budget = (SCORES_CPU if points.device.type == "cpu" else SCORES_GPU) // CENTROIDS
    step_n = min(N, max(512, budget // G))
    step_g = max(1, budget // step_n)
    for g in range(0, G, step_g):
        for n in range(0, N, step_n):
            scores = torch.bmm(c[g : g + step_g], x[g : g + step_g, :, n : n + step_n]).view(torch.int32)
            torch.amin(scores.bitwise_and_(-CENTROIDS).bitwise_or_(index), 1, out=best[g : g + step_g, n : n + step_n])
    return (best & (CENTROIDS - 1)).long(), (best & -CENTROIDS).view(torch.float32).clamp_(min=0)


def update(points: Tensor, codes: Tensor, distance: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of each centroid's points, [G, 256, d]; a centroid without points moves to one of the worst-served points.

    ``weights`` [G, N], positive, weigh the mean and what "worst" is.
    """
    G, N, d = points.shape
    flat = (codes + torch.arange(G, device=codes.device)[:, None] * CENTROIDS).reshape(-1)
    count = torch.bincount(flat, minlength=G * CENTROIDS).view(G, CENTROIDS)
    mass, weighted = count.clamp(min=1), points.double()
    if weights is not None:
        weighted = weighted * weights[..., None]
        distance = distance * weights
        mass = torch.bincount(flat, weights.reshape(-1).double(), G * CENTROIDS).view(G, CENTROIDS).clamp(min=1e-300)
    total = torch.stack([torch.bincount(flat, weighted[..., j].reshape(-1), G * CENTROIDS) for j in range(d)], -1)
    means = (total.view(G, CENTROIDS, d) / mass[..., None]).to(points.dtype)
    empty = count == 0
    most = int(empty.sum(1).max())
    if most:
        worst = distance.topk(min(most, N), 1).indices
        rank = (empty.cumsum(1) - 1).clamp(0, worst.shape[1] - 1)
        spare = points.gather(1, worst.gather(1, rank)[..., None].expand(-1, -1, d))
        means = torch.where(empty[..., None], spare, means)
    return means


def seed(points: Tensor) -> Tensor:
    """First centroids [G, 256, d]: means of the cells of a tree of cuts.

    The root owns 256 centroids. A cell that owns several is cut at its mean, across the channel that varies most in it, and
    its halves share them in proportion to ``e^(d / (d + 2))``, e the half's sum of squared distances to its mean: the density
    of centroids that is optimal for many of them (Zador; Gersho, "Asymptotically optimal block quantization", 1979). So
    outliers get centroids at once, which Lloyd's algorithm alone would take hundreds of iterations to send there. As good as
    k-means++ at a tenth of its 256 passes, and deterministic.
    """
    G, N, d = points.shape
    size = G * CENTROIDS
    x = points.double()
    channels, squares = x.unbind(-1), x.square().unbind(-1)
    # A cell is named by its first centroid; the cells of group g are g * 256 .. g * 256 + 255.
    base = torch.arange(G, device=points.device) * CENTROIDS
    cell = base.repeat_interleave(N)
    owned = torch.zeros(size, dtype=torch.int64, device=points.device)
    owned[base] = CENTROIDS
    everyone = torch.arange(size, device=points.device)
    while True:
        count = torch.bincount(cell, minlength=size).clamp(min=1)
        mean = torch.stack([torch.bincount(cell, c.reshape(-1), size) / count for c in channels], -1)
        if int(owned.max()) == 1:
            return mean.view(G, CENTROIDS, d).float()
        square = torch.stack([torch.bincount(cell, c.reshape(-1), size) / count for c in squares], -1)
        axis = (square - mean.square()).argmax(-1)
        value = x.gather(2, axis[cell].view(G, N, 1)).view(-1)
        upper = value > mean.gather(1, axis[:, None])[:, 0][cell]
        half = 2 * cell + upper
        count = torch.bincount(half, minlength=2 * size).clamp(min=1)
        error = sum(
            torch.bincount(half, s.reshape(-1), 2 * size)
            - torch.bincount(half, c.reshape(-1), 2 * size).square() / count
            for c, s in zip(channels, squares)
        )
        share = error.clamp(min=1e-30).pow(d / (d + 2)).view(size, 2)
        lower_gets = (owned * share[:, 0] / share.sum(1)).round().long()
        lower_gets = torch.minimum(lower_gets.clamp(min=1), owned - 1)
        cut = owned > 1
        cell = cell + torch.where(cut[cell] & upper, lower_gets[cell], 0)
        upper_gets = (owned - lower_gets)[cut]
        owned = torch.where(cut, lower_gets, owned)
        owned[(everyone + lower_gets)[cut]] = upper_gets


def kmeans(points: Tensor, iterations: int, generator: torch.Generator, weights: Tensor | None = None) -> Tensor:
    """256 centroids of each group of points (Lloyd's algorithm).

    Args:
        points: [G, N, d] fp32, N >= 256.
        iterations: of Lloyd's algorithm; all but the last `POLISH` on a subsample.
        generator: on the CPU, chooses the subsample.
        weights: [G, N], positive, of the points' squared distances; None: all the same.

    Returns:
        Centroids [G, 256, d] fp32.
    """
    N = points.shape[1]
    size = max(N // SUBSAMPLE, min(N, MIN_SUBSAMPLE))
    some = torch.randperm(N, generator=generator)[:size].to(points.device)
    sample, sample_weights = points[:, some], None if weights is None else weights[:, some]
    centroids = seed(sample)
    for i in range(iterations):
        part, weight = (points, weights) if i >= iterations - POLISH else (sample, sample_weights)
        centroids = update(part, *assign(part, centroids), weight)
    return centroids
