"""Plain PyTorch implementations of every op: the truth that kernels are tested against, on any device.

Written to be read, not to be fast: whole-cache tensors, fp32 throughout, no loop over tokens. They never read a length on
the host, so they are safe in a CUDA graph. Registered under ``CompositeExplicitAutograd``: a compiled kernel for the
tensors' device wins over them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from million_ops._checks import check_append, check_attention, check_decode, check_dequantize, check_encode
from million_ops.layout import layout_by_id, unpack

ENCODE_CHUNK = 1 << 22  # distances held at once, so that a long prefill does not hold T x S x 256 floats


def pq_encode(x: Tensor, codebook: Tensor) -> Tensor:
    """``code[b,h,t,m] = argmin_c sum_d (x[b,h,t,m,d] - codebook[h,c,m,d])^2``, the lowest index on ties."""
    check_encode(x, codebook)
    B, H, T, _ = x.shape
    _, C, S, d = codebook.shape
    table = codebook.float().permute(0, 2, 1, 3).unsqueeze(1)  # [H, 1, S, C, d]
    codes = torch.empty(B, H, T, S, dtype=torch.uint8, device=x.device)
    step = max(1, ENCODE_CHUNK // max(1, B * H * S * C))
    for t in range(0, T, step):
        part = x[:, :, t : t + step].float().reshape(B, H, min(step, T - t), S, 1, d)
        distance = (part - table).square().sum(-1)  # [B, H, t, S, C]
        codes[:, :, t : t + step] = distance.argmin(-1).to(torch.uint8)
    return codes


def pq_decode(codes: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """``x[b,h,t,m,:] = codebook[h, code[b,h,t,m], m, :]``."""
    check_decode(codes, codebook, dtype)
    _, H, _, S = codes.shape
    h = torch.arange(H, device=codes.device)[:, None, None]
    m = torch.arange(S, device=codes.device)
    return codebook[h, codes.long(), m].flatten(-2).to(dtype)


def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor, interleaved: bool) -> Tensor:
    """RoPE: rotate pair i of the first ``2 len(inv_freq)`` channels of x by ``positions * inv_freq[i]``; the rest passes through.

    x [..., T, D] fp32; positions broadcast against [..., T]. Pairs are (i, i + rotary / 2), or (2 i, 2 i + 1) when interleaved.
    A pure rotation: the scale that YaRN and longrope put on cos and sin stays in the keys.
    """
    half = inv_freq.shape[0]
    angle = positions[..., None].float() * inv_freq
    cos, sin = angle.cos(), angle.sin()
    rotary, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = rotary[..., 0::2], rotary[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = rotary[..., :half], rotary[..., half:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned, rest), -1)


def frame_positions(slots: Tensor, origin: Tensor, frame_tokens: int) -> Tensor:
    """``t_f`` of the frame that holds each slot: ``slot // F * F + origin[b]``. slots [T] -> [B, 1, T]."""
    return ((slots // frame_tokens * frame_tokens)[None, :] + origin[:, None])[:, None, :]


def to_frame(k: Tensor, slots: Tensor, origin: Tensor, transform: Tensor | None, inv_freq: Tensor | None, frame_tokens: int,
             interleaved: bool) -> Tensor:  # fmt: skip
    """Keys as the model gave them to what is encoded: ``T R(-t_f) k``. k [B, H, T, D] -> fp32."""
    x = k.float()
    if inv_freq is not None and frame_tokens > 0:
        x = rotate(x, -frame_positions(slots, origin, frame_tokens), inv_freq, interleaved)
    return x if transform is None else x @ transform.transpose(-1, -2)


def from_frame(x: Tensor, slots: Tensor, origin: Tensor, transform_inv: Tensor | None, inv_freq: Tensor | None, frame_tokens: int,
               interleaved: bool) -> Tensor:  # fmt: skip
    """The way back: ``R(t_f) T^-1 x``. x [B, H, T, D] fp32 -> fp32."""
    if transform_inv is not None:
        x = x @ transform_inv.float().transpose(-1, -2)
    if inv_freq is not None and frame_tokens > 0:
        x = rotate(x, frame_positions(slots, origin, frame_tokens), inv_freq, interleaved)
    return x


def pq_dequantize(codes: Tensor, codebook: Tensor, transform_inv: Tensor | None, inv_freq: Tensor | None, origin: Tensor, layout: int,
                  dtype: torch.dtype, frame_tokens: int = 0, rope_interleaved: bool = False, first_slot: int = 0) -> Tensor:  # fmt: skip
    """See `million_ops.pq_dequantize`."""
    check_dequantize(
        codes, codebook, transform_inv, inv_freq, origin, layout, dtype, frame_tokens, rope_interleaved, first_slot
    )
    plain = unpack(codes, layout_by_id(layout), codebook.shape[2])
    slots = first_slot + torch.arange(plain.shape[2], device=codes.device)
    x = torch.ops.million_ops.pq_decode(plain, codebook, torch.float32)
    return from_frame(x, slots, origin, transform_inv, inv_freq, frame_tokens, rope_interleaved).to(dtype)


def _write_rows(buffer: Tensor, slots: Tensor, keep: Tensor, rows: Tensor) -> None:
    """``buffer[b, :, slots[b, i]] = rows[b, :, i]`` where ``keep[b, i]``; slots that are not kept are left as they are.

    Without a host read, so a write that is dropped becomes a write of what stands there already. Kept slots are distinct
    per row; dropped ones are sent to a spare last row, so that none can undo a kept write.
    """
    B, _, length, _ = buffer.shape
    if length == 0:
        return
    spare = torch.cat((buffer, buffer[:, :, :1]), 2)
    b = torch.arange(B, device=buffer.device)[:, None]
    spare.transpose(1, 2)[b, torch.where(keep, slots, length)] = rows.transpose(1, 2).to(buffer.dtype)
    buffer.copy_(spare[:, :, :length])


def pq_append_(k, v, k_codebook, v_codebook, k_transform, inv_freq, k_codes, v_codes, k_ring, v_ring, k_sinks, v_sinks, clock, start,
               origin, offset, frame_tokens, rope_interleaved, k_layout, v_layout, after=None) -> None:  # fmt: skip
    """See `million_ops.pq_append_`."""
    del after
    check_append(k, v, k_codebook, v_codebook, k_transform, inv_freq, k_codes, v_codes, k_ring, v_ring, k_sinks, v_sinks, clock, start,
                 origin, offset, frame_tokens, rope_interleaved, k_layout, v_layout)  # fmt: skip
    B, H, n, _ = k.shape
    slots = clock[0] + offset + torch.arange(n, device=k.device)
    x = to_frame(k, slots, origin, k_transform, inv_freq, frame_tokens, rope_interleaved)
    for new, codebook, codes, layout_id in ((x, k_codebook, k_codes, k_layout), (v, v_codebook, v_codes, v_layout)):
        layout = layout_by_id(layout_id)
        S = codebook.shape[2]
        encoded = torch.ops.million_ops.pq_encode(new, codebook)
        where = slots // layout.tile_tokens * (layout.tile_tokens * S)
        byte = where[:, None] + layout.permutation(S, k.device)[slots % layout.tile_tokens]  # [n, S]
        flat = codes.view(B, H, -1, 1)
        rows = encoded.reshape(B, H, n * S, 1)
        byte = byte.reshape(1, -1).expand(B, -1)
        _write_rows(flat, byte, byte < flat.shape[2], rows)
    R = k_ring.shape[2]
    if R > 0:  # a chunk longer than the ring leaves its last R tokens
        last = slots[max(0, n - R) :]
        keep = torch.ones(B, last.shape[0], dtype=torch.bool, device=k.device)
        for new, ring in ((k, k_ring), (v, v_ring)):
            _write_rows(ring, (last % R).expand(B, -1), keep, new[:, :, max(0, n - R) :])
    rank = slots[None, :] - start[:, None]  # 0 for a row's first valid token
    for new, sinks in ((k, k_sinks), (v, v_sinks)):
        _write_rows(sinks, rank, (rank >= 0) & (rank < sinks.shape[2]), new)


def pq_attention_lse(q, k, v, k_codebook, v_codebook, k_transform_inv, inv_freq, k_codes, v_codes, k_ring, v_ring, k_sinks, v_sinks,
                     clock, start, origin, mask, scale, offset, frame_tokens, rope_interleaved, k_layout, v_layout,
                     decoded=torch.float32):  # fmt: skip
    """See `million_ops.pq_attention`. fp32 throughout; two copies of every cached token, the exact one and the coded one.

    ``decoded``: dtype that decoded keys and values pass through; with a 16-bit one this is what a cache that decodes to the
    model's dtype and attends would compute, the yardstick of kernels for 16-bit models.
    """
    check_attention(q, k, v, k_codebook, v_codebook, k_transform_inv, inv_freq, k_codes, v_codes, k_ring, v_ring, k_sinks, v_sinks,
                    clock, start, origin, mask, scale, offset, frame_tokens, rope_interleaved, k_layout, v_layout)  # fmt: skip
    B, Hq, n, D = q.shape
    H, R, sinks = k.shape[1], k_ring.shape[2], k_sinks.shape[2]
    k_coded = pq_dequantize(
        k_codes, k_codebook, k_transform_inv, inv_freq, origin, k_layout, decoded, frame_tokens, rope_interleaved
    ).float()
    v_coded = pq_dequantize(v_codes, v_codebook, None, None, origin, v_layout, decoded).float()
    # K and V may be packed in tiles of different length; slots behind the shorter buffer hold nothing.
    T = min(k_coded.shape[2], v_coded.shape[2])
    first = clock[0] + offset  # slot of the first new token
    slots = torch.arange(T, device=q.device)
    query = first + torch.arange(n, device=q.device)

    # Columns: the T slots of the cache, then the n new tokens.
    column = torch.cat((slots, query))
    is_new = torch.arange(T + n, device=q.device) >= T
    visible = (column[None, :] <= query[:, None]) & (is_new | (column < first))  # [n, T + n]
    visible = visible[None] & (column[None, None, :] >= start[:, None, None])  # [B, n, T + n]
    if mask is not None:
        M = mask.shape[3]
        allowed = mask[:, 0][..., column.clamp(max=M - 1)] & (column < M)
        visible = visible & allowed

    rank = slots[None, :] - start[:, None]
    in_sinks = (rank >= 0) & (rank < sinks)  # [B, T]
    in_ring = (slots[None, :] > query[:, None] - R) & (slots >= torch.maximum(clock[2], first - R))  # [n, T]
    exact = torch.cat(
        (in_sinks[:, None, :] | in_ring[None], torch.ones(B, n, n, dtype=torch.bool, device=q.device)), -1
    )

    def exact_rows(ring: Tensor, first_rows: Tensor, new: Tensor) -> Tensor:
        old = torch.zeros(B, H, T, D, device=q.device)
        if R > 0:
            old = ring.float()[:, :, slots % R]
        if sinks > 0:
            at = rank.clamp(0, sinks - 1)[:, None, :, None].expand(B, H, T, D)
            old = torch.where(in_sinks[:, None, :, None], first_rows.float().gather(2, at), old)
        return torch.cat((old, new.float()), 2)

    def by_head(x: Tensor) -> Tensor:
        return x.repeat_interleave(Hq // H, 1)

    pad = torch.zeros(B, H, n, D, device=q.device)
    k_exact, v_exact = by_head(exact_rows(k_ring, k_sinks, k)), by_head(exact_rows(v_ring, v_sinks, v))
    k_coded, v_coded = by_head(torch.cat((k_coded[:, :, :T], pad), 2)), by_head(torch.cat((v_coded[:, :, :T], pad), 2))
    exact, visible = exact[:, None], visible[:, None]
    qf = q.float()
    scores = torch.where(exact, qf @ k_exact.transpose(-1, -2), qf @ k_coded.transpose(-1, -2)) * scale
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = scores.logsumexp(-1)
    # A query that sees nothing (left padding) gets zeros and an LSE of -inf, never NaN.
    p = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    # Slots that nobody may see can hold anything, NaN included: 0 * NaN must not reach the sum.
    seen = visible.any(2).transpose(-1, -2)  # [B, 1, T + n, 1]-like: any query of the row sees the column
    v_exact, v_coded = (
        v_exact.masked_fill(~seen.view(B, 1, -1, 1), 0.0),
        v_coded.masked_fill(~seen.view(B, 1, -1, 1), 0.0),
    )
    out = (p * exact) @ v_exact + (p * ~exact) @ v_coded
    return out.transpose(1, 2).to(q.dtype).contiguous(), lse


def pq_attention(*args) -> Tensor:
    """See `million_ops.pq_attention`."""
    return pq_attention_lse(*args)[0]


IMPLEMENTATIONS = {
    "pq_encode": pq_encode,
    "pq_decode": pq_decode,
    "pq_dequantize": pq_dequantize,
    "pq_append_": pq_append_,
    "pq_attention": pq_attention,
    "pq_attention_lse": pq_attention_lse,
}
