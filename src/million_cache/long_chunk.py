"""Attention of many new tokens over a non-empty cache: a second turn, or a prefill in chunks.

Attention from codes reads every code once for a few queries. With hundreds of queries that is slower than decoding a code
once and multiplying matrices, so here the cache is decoded, some thousand tokens at a time, into a workspace whose size
does not depend on the length, and PyTorch's FlashAttention does the rest. Results over the parts of the cache merge by
their log-sum-exp.
"""

from __future__ import annotations

import torch
from torch import Tensor

import million_ops
from million_cache.cache import MillionLayer

WORKSPACE = 1 << 25  # elements of one decoded tensor: 64 MiB of 16-bit numbers
LEAST = 1024  # tokens decoded at once
QUERIES = 512  # from here on decoding pays: by arithmetic, at 32k tokens, the op takes longer from about 300 on


def serves(q: Tensor) -> bool:
    """Whether `attend_long` is for these queries [B, Hq, n, D]: many, on a GPU that runs FlashAttention, 16 bit, and neither
    while tracing nor while a graph is captured, which would hold the length fixed."""
    return (
        q.shape[2] >= QUERIES
        and q.is_cuda
        and q.dtype != torch.float32
        and q.shape[3] % 8 == 0
        and q.shape[3] <= 256
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp: q [B, H, n, D], k and v [B, H, T, D] -> ([B, H, n, D], [B, H, n] fp32).

    On GPUs FlashAttention, for 16-bit tensors alone; on CPUs PyTorch's counterpart.
    """
    if q.is_cuda:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out, lse[..., : q.shape[2]].float()


class Merged:
    """Attention over several disjoint sets of tokens, as their results come: fp32."""

    def __init__(self) -> None:
        self.out = self.lse = None  # [..., D], [...]

    def add(self, out: Tensor, lse: Tensor) -> None:
        if self.out is None:
            self.out, self.lse = out.float(), lse
            return
        total = torch.logaddexp(self.lse, lse)
        self.out.lerp_(out.float(), (lse - total).exp()[..., None])
        self.lse = total


def cached(layer: MillionLayer, begin: int, end: int, rows: slice, start: int, sinks: int, ring: int) -> tuple[Tensor, Tensor]:
    """Keys and values [b, H, end - begin, D] of slots ``begin`` .. ``end - 1``, in the model's dtype: exact before slot ``sinks`` and
    from ``ring`` on, else from codes. The rows begin at slot ``start``."""
    books, results = layer.books, []
    R, origin = layer.state.recent_tokens, layer.clock.origin[rows]
    for i, (codebook, inverse, inv_freq, name) in enumerate(
        (
            (books.k_codebook, books.k_transform_inv, books.inv_freq, "k_layout"),
            (books.v_codebook, None, None, "v_layout"),
        )
    ):
        tile = million_ops.layout_by_id(layer.geometry[name]).tile_tokens
        first = begin // tile
        x = million_ops.pq_dequantize(
            layer.codes[i][rows, :, first : -(-end // tile)], codebook, inverse, inv_freq, origin, layer.geometry[name], layer.dtype,
            books.frame_tokens, books.rope_interleaved, first_slot=first * tile,
        )[:, :, begin - first * tile : end - first * tile]  # fmt: skip
        if begin < sinks:
            x[:, :, : sinks - begin] = layer.sinks[i][rows, :, begin - start : min(sinks, end) - start]
        slot = max(begin, ring)
        while slot < end:  # once, or twice where the ring wraps around
            at = slot % R
            upto = min(end, slot + R - at)
            x[:, :, slot - begin : upto - begin] = layer.ring[i][rows, :, at : at + upto - slot]
            slot = upto
        results.append(x)
    return results[0], results[1]


def _attend(
    layer: MillionLayer, q: Tensor, k: Tensor, v: Tensor, scale: float, rows: slice, start: int, past: int, ring_lo: int
) -> Tensor:
    """`attend_long` for rows that begin at the same slot."""
    B, Hq, n, D = q.shape
    H = k.shape[1]
    packed = q.reshape(B, H, Hq // H * n, D)  # the group is more queries
    own = flash(q, k.repeat_interleave(Hq // H, 1), v.repeat_interleave(Hq // H, 1), scale, causal=True)
    merged = Merged()
    merged.add(own[0].reshape(packed.shape), own[1].reshape(packed.shape[:3]))
    sinks = min(start + layer.state.sink_tokens, past)  # where they end
    ring = max(ring_lo, past - layer.state.recent_tokens, sinks)
    step = max(LEAST, WORKSPACE // (B * H * D))
    for begin in range(start, past, step):
        merged.add(*flash(packed, *cached(layer, begin, min(begin + step, past), rows, start, sinks, ring), scale))
    return merged.out.view(B, Hq, n, D).transpose(1, 2).to(q.dtype)


def attend_long(layer: MillionLayer, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor | None:
    """Causal attention of n new tokens, not yet appended, over a layer and themselves: what `MillionLayer.attend` gives, except
    that every query sees the recent tokens before the chunk exactly, not only those in its own window.

    Args:
        q: [B, Hq, n, D]; k, v: [B, H, n, D].

    Returns:
        [B, n, Hq, D], or None where it does not apply: a row has no valid token before the chunk, or the chunk does not fit,
        which compiled steps can hide from the host's count and the append reports.

    Waits for the device once a forward, to learn the length.
    """
    past, ring_lo, starts = layer.clock.on_host(layer.layer_idx)
    if max(starts) >= past or past + q.shape[2] > layer.max_cache_len:
        return None
    most = max(1, WORKSPACE // (LEAST * k.shape[1] * k.shape[3]))  # rows at once
    parts, begin = [], 0
    while begin < len(starts):
        end = begin + 1
        while end < min(begin + most, len(starts)) and starts[end] == starts[begin]:
            end += 1
        rows = slice(begin, end)
        parts.append(_attend(layer, q[rows], k[rows], v[rows], scale, rows, starts[begin], past, ring_lo))
        begin = end
    return parts[0] if len(parts) == 1 else torch.cat(parts)
