"""Attention from the definition, in float64, one query at a time: written apart from `million_ops.reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from million_ops import layout_by_id, unpack


def turn(x: Tensor, position: int, inv_freq: Tensor, interleaved: bool) -> Tensor:
    """RoPE by ``position`` (negative: back). The angle is fp32, as models compute it; the rest float64. x [..., D]."""
    angle = (torch.tensor(float(position), dtype=torch.float32) * inv_freq).double()
    half, pairs = len(inv_freq), x.clone()
    first = torch.arange(half) * 2 if interleaved else torch.arange(half)
    second = first + 1 if interleaved else first + half
    a, b = x[..., first], x[..., second]
    pairs[..., first] = a * angle.cos() - b * angle.sin()
    pairs[..., second] = a * angle.sin() + b * angle.cos()
    return pairs


def centroids_of(packed: Tensor, layout: int, codebook: Tensor) -> Tensor:
    """Packed codes to vectors [B, H, T, D] float64."""
    H, _, S, _ = codebook.shape
    codes = unpack(packed, layout_by_id(layout), S).long()
    heads = torch.arange(H)[:, None, None]
    return codebook.double()[heads, codes, torch.arange(S)].flatten(-2)


def attention(q, k, v, k_codebook, v_codebook, k_transform_inv, inv_freq, k_codes, v_codes, k_ring, v_ring, k_sinks, v_sinks,
              clock, start, origin, mask, scale, offset, frame_tokens, rope_interleaved, k_layout, v_layout):  # fmt: skip
    """(out [B, n, Hq, D], lse [B, Hq, n]) in float64, from the sentences of `million_ops.pq_attention`."""
    B, Hq, n, D = q.shape
    H, R, N = k.shape[1], k_ring.shape[2], k_sinks.shape[2]
    past, _, ring_lo = clock.tolist()
    first = past + offset
    k_coded, v_coded = centroids_of(k_codes, k_layout, k_codebook), centroids_of(v_codes, v_layout, v_codebook)
    if k_transform_inv is not None:
        k_coded = k_coded @ k_transform_inv.double().transpose(-1, -2)
    out, lse = torch.zeros(B, n, Hq, D, dtype=torch.float64), torch.full((B, Hq, n), -float("inf"), dtype=torch.float64)
    held = min(first, k_coded.shape[2], v_coded.shape[2])  # slots before the new tokens that the buffers hold
    slots = torch.cat((torch.arange(held), torch.arange(first, first + n)))
    is_new = slots >= first

    def exact(b: int, new: Tensor, ring: Tensor, sinks: Tensor, in_sinks: Tensor) -> Tensor:
        rows = torch.zeros(H, len(slots), D, dtype=torch.float64)
        if R:
            rows[:, ~is_new] = ring[b, :, slots[~is_new] % R].double()
        rows[:, in_sinks] = sinks[b, :, slots[in_sinks] - start[b]].double()
        rows[:, is_new] = new[b].double()
        return rows

    for b in range(B):
        coded_k, coded_v = (torch.cat((x[b, :, :held], x.new_zeros(H, n, D)), 1) for x in (k_coded, v_coded))
        if inv_freq is not None and frame_tokens:
            for f in range(-(-held // frame_tokens)):
                frame = slice(f * frame_tokens, min(held, (f + 1) * frame_tokens))
                coded_k[:, frame] = turn(
                    coded_k[:, frame], f * frame_tokens + int(origin[b]), inv_freq, rope_interleaved
                )
        in_sinks = ~is_new & (slots >= start[b]) & (slots < start[b] + N)
        exact_k, exact_v = exact(b, k, k_ring, k_sinks, in_sinks), exact(b, v, v_ring, v_sinks, in_sinks)
        for j in range(n):
            p = first + j
            seen = (slots >= start[b]) & (slots <= p)
            if mask is not None:
                allowed = torch.zeros(max(first + n, mask.shape[3]), dtype=torch.bool)
                allowed[: mask.shape[3]] = mask[b, 0, j]
                seen &= allowed[slots]
            if not seen.any():
                continue
            is_exact = (is_new | in_sinks | ((slots > p - R) & (slots >= ring_lo)))[:, None]
            K, V = torch.where(is_exact, exact_k, coded_k)[:, seen], torch.where(is_exact, exact_v, coded_v)[:, seen]
            scores = torch.einsum("hgd,htd->hgt", q[b, :, j].double().view(H, -1, D), K) * scale
            lse[b, :, j] = scores.logsumexp(-1).flatten()
            out[b, j] = (scores.softmax(-1) @ V).flatten(0, 1)
    return out, lse
