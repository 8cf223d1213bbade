"""DuoAttention (Xiao et al., arXiv 2410.10819), approximately: half of the KV heads keep everything, half stream.

A streaming head sees 64 sinks and the last 256 tokens; the others keep the whole cache at 16 bit. The paper learns which
is which by optimising gates on synthetic recall; here the heads that, on calibration text, give most of their attention to
tokens further back stay whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from million_cache.peers.base import FLOAT16, Peer, Quantised, Sample, Tokens, Window

SHARE = 0.5  # of the heads keep everything
QUERY_BLOCK = 256


def far_attention(queries: Tensor, keys: Tensor, scale: float, window: Window) -> Tensor:
    """Mean share of attention that goes beyond a streaming head's window, the largest of each group [H].

    queries [Hq, T, D], keys [H, T, D] rotated.
    """
    H, T, D = keys.shape
    grouped = queries.reshape(H, -1, T, D)
    total = queries.new_zeros(H, grouped.shape[1])
    for a in range(0, T, QUERY_BLOCK):
        b = min(a + QUERY_BLOCK, T)
        rows, columns = torch.arange(a, b, device=keys.device)[:, None], torch.arange(b, device=keys.device)
        scores = grouped[:, :, a:b] @ keys[:, None, :b].transpose(2, 3) * scale
        share = scores.masked_fill(columns > rows, -torch.inf).softmax(-1)
        far = (columns >= window.sinks) & (columns <= rows - window.recent)
        total += (share * far).sum((2, 3))
    return total.amax(1) / T


class Duo(Peer):
    """Half of the heads dense, half with sinks and recent tokens alone."""

    name, paper = "duo-50", "arXiv 2410.10819"
    window = Window(sinks=64, recent=256)

    def __init__(self) -> None:
        self.streams: dict[int, Tensor] = {}

    def calibrate(self, samples: dict[int, Sample]) -> None:
        far = {}
        for i, s in samples.items():
            T, sinks = s.queries.shape[1], int(s.positions[0])
            far[i] = far_attention(s.queries[:, sinks:], s.rotated_keys[:, : T - sinks], s.scale, type(self).window)
        cut = torch.cat(list(far.values())).quantile(1 - SHARE)
        self.streams = {i: x < cut for i, x in far.items()}

    def quantise(self, layer: int, tokens: Tokens) -> tuple[Quantised, Quantised]:
        streams = self.streams[layer]
        bits = FLOAT16 * tokens.keys.numel() * (~streams).float().mean().item()
        k, v = (Quantised(x, codes=bits, dropped=streams) for x in (tokens.keys, tokens.values))
        return k, v
