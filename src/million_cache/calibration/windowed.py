"""Attention of a whole text at once as a quantised cache gives it token by token: recent tokens exact, older ones not."""

from __future__ import annotations

import math

import torch
from torch import Tensor

QUERY_BLOCK = 256  # queries whose scores are held at once on a CPU
SCORES_GPU = 1 << 26  # scores held at once on a GPU, where few large operations are faster


def windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kq: Tensor,
    vq: Tensor,
    first_k: Tensor,
    first_v: Tensor,
    scale: float,
    hidden_before: Tensor | None = None,
    sinks: int = 0,
) -> Tensor:
    """Causal attention in which the query at slot p takes keys from ``first_k[p]`` on from k, older ones from kq.

    Args:
        q: [Hq, T, D]; k, v: exact, [H, T, D]; kq, vq: what the cache gives back, [H, T, D] (sinks exact).
        first_k, first_v: [T] int64, not decreasing, at most p + 1: where each query's exact keys and values begin. On the
            CPU they cost a GPU no wait.
        hidden_before: [H] bool, heads that see nothing before ``first_k`` but the sinks; None: no head.
        sinks: first tokens that such heads see.

    Returns:
        [Hq, T, D]; differentiable.
    """
    H, T, D = k.shape
    grouped = q.reshape(H, -1, T, D)
    group = grouped.shape[1]
    step = QUERY_BLOCK if q.device.type == "cpu" else max(QUERY_BLOCK, SCORES_GPU // (len(q) * T))
    out = []
    for a in range(0, T, step):
        b = min(a + step, T)
        n = b - a
        rows, columns = torch.arange(a, b, device=q.device)[:, None], torch.arange(b, device=q.device)
        block = grouped[:, :, a:b].reshape(H, group * n, D) * scale
        scores = (block @ kq[:, :b].transpose(1, 2)).view(H, group, n, b)
        # Left of ``lo`` everything comes from kq, for every query of the block.
        lo, begin = min(int(first_k[a]), b), first_k[a:b, None].to(q.device)
        exact = (block @ k[:, lo:b].transpose(1, 2)).view(H, group, n, b - lo)
        mixed = torch.where(columns[lo:] >= begin, exact, scores[..., lo:])
        mixed = mixed.masked_fill(columns[lo:] > rows, -math.inf)
        scores = torch.cat((scores[..., :lo], mixed), -1)
        if hidden_before is not None:
            far = (columns >= sinks) & (columns < begin)
            scores = scores.masked_fill(hidden_before[:, None, None, None] & far, -math.inf)
        weights = scores.softmax(-1)
        lo = min(int(first_v[a]), b)
        inside = columns[lo:] >= first_v[a:b, None].to(q.device)
        near = weights[..., lo:]
        coded = torch.cat((weights[..., :lo], near.masked_fill(inside, 0)), -1)
        x = coded.view(H, group * n, b) @ vq[:, :b]
        x = x + near.masked_fill(~inside, 0).reshape(H, group * n, b - lo) @ v[:, lo:b]
        out.append(x.view(H, group, n, D))
    return torch.cat(out, 2).flatten(0, 1)
