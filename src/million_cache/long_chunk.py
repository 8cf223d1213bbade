"""Attention of many new tokens over a non-empty cache: a second turn, or a prefill in chunks.

Attention from codes reads every code once for a few queries. With a hundred queries that is slower than decoding a code
once and multiplying matrices, so here the cache is decoded, some ten thousand tokens at a time, into a workspace whose size
does not depend on the length (the last part also has the new tokens), and PyTorch's FlashAttention does the rest. Results over
the parts of the cache merge by their log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import million_ops
from million_cache.cache import MillionLayer

WORKSPACE = 1 << 25  # elements of one decoded tensor: 64 MiB of 16-bit numbers
LEAST = 1024  # tokens decoded at once
# Of queries and keys: with fewer the op takes no longer than the host needs to launch all this, 0.3 ms.
LEAST_PAIRS = 1 << 25


def serves(q: Tensor) -> bool:
    """Whether `attend_long` can take these queries [B, Hq, n, D]: 16 bit, on an NVIDIA GPU that runs FlashAttention, and neither
    while tracing nor while a graph is captured, which would hold the length fixed. (AMD's FlashAttention aligns the causal mask of
    fewer queries than keys at the other end.)"""
    return (
        q.is_cuda
        and torch.version.hip is None
        and q.dtype != torch.float32
        and q.shape[3] % 8 == 0
        and q.shape[3] <= 256
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp: q [B, Hq, n, D], k and v [B, H, T, D] -> ([B, Hq, n, D], [B, Hq, n] fp32).

    ``causal``: the last query sees everything, the one before it all but the last key, and so on. On GPUs FlashAttention, for
    16-bit tensors alone; on CPUs PyTorch's counterpart, which knows neither groups nor such a mask.
    """
    if q.is_cuda:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    else:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        n, T = q.shape[2], k.shape[2]
        mask = torch.full((n, T), float("-inf"), dtype=q.dtype).triu(T - n + 1)[None, None] if causal else None
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=mask, scale=scale
        )
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


@dataclass(frozen=True)
class Where:
    """Slots of rows that begin at the same one: where they begin, where sinks end, from where the ring holds, and the first new one."""

    start: int
    sinks: int
    ring: int
    past: int


def stretch(
    layer: MillionLayer, rows: slice, at: Where, begin: int, end: int, new: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Keys and values [b, H, end - begin, D] of slots ``begin`` .. ``end - 1``, in the model's dtype: from codes, but sinks, recent
    and new tokens exactly."""
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
        if begin < at.sinks:
            x[:, :, : at.sinks - begin] = layer.sinks[i][rows, :, begin - at.start : min(at.sinks, end) - at.start]
        slot, ring_end = max(begin, at.ring), min(end, at.past)
        while slot < ring_end:  # once, or twice where the ring wraps around
            place = slot % R
            upto = min(ring_end, slot + R - place)
            x[:, :, slot - begin : upto - begin] = layer.ring[i][rows, :, place : place + upto - slot]
            slot = upto
        if end > at.past:
            x[:, :, at.past - begin :] = new[i]
        results.append(x)
    return results[0], results[1]


def _attend(
    layer: MillionLayer, q: Tensor, k: Tensor, v: Tensor, scale: float, rows: slice, start: int, past: int, ring_lo: int
) -> Tensor:
    """`attend_long` for rows that begin at the same slot."""
    B, Hq, n, D = q.shape
    H = k.shape[1]
    sinks = min(start + layer.state.sink_tokens, past)
    at = Where(start, sinks, max(ring_lo, past - layer.state.recent_tokens, sinks), past)
    # All but the last stretch: every query sees all of it, so a group's heads are more queries.
    group = H, Hq // H
    begin, step, merged = start, max(LEAST, WORKSPACE // (B * H * D)), Merged()
    while past - begin > step:
        packed = q.reshape(B, H, group[1] * n, D)
        out, lse = flash(packed, *stretch(layer, rows, at, begin, begin + step, (k, v)), scale)
        merged.add(out.unflatten(2, (group[1], n)), lse.unflatten(2, (group[1], n)))
        begin += step
    out, lse = flash(q, *stretch(layer, rows, at, begin, past + n, (k, v)), scale, causal=True)
    if merged.out is None:
        return out.transpose(1, 2)
    merged.add(out.unflatten(1, group), lse.unflatten(1, group))
    return merged.out.to(q.dtype).permute(0, 3, 1, 2, 4).flatten(2, 3)


def attend_long(layer: MillionLayer, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor | None:
    """Causal attention of n new tokens, not yet appended, over a layer and themselves: what `MillionLayer.attend` gives, except
    that every query sees the recent tokens before the chunk exactly, not only those in its own window.

    Args:
        q: [B, Hq, n, D]; k, v: [B, H, n, D].

    Returns:
        [B, n, Hq, D], or None where it does not apply: there are too few queries and keys for it, a row has no valid token
        before the chunk, or the chunk does not fit, which compiled steps can hide from the host's count and the append reports.

    Waits for the device once a forward, to learn the length.
    """
    queries = q.shape[:3].numel()
    if queries * layer.max_cache_len < LEAST_PAIRS:  # known without waiting
        return None
    past, ring_lo, starts = layer.clock.on_host(layer.layer_idx)
    few = queries * past < LEAST_PAIRS
    if few or max(starts) >= past or past + q.shape[2] > layer.max_cache_len:
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
