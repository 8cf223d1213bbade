"""Triton kernels of `pq_encode`, `pq_attention` and `pq_attention_lse`, for GPUs that the compiled CUDA library does not serve.

Attention, for a query at slot p of row b and KV head h, with q_f = T^-T R(-t_f) q for the frame f of a slot and c the
centroids of the slot's codes:

    score(s) = scale * q . k(s)      exact keys: sinks, ring, new tokens
    score(s) = scale * q_f . c(s)    coded keys
    out      = sum_s softmax(score)(s) v(s)

One program takes a block of query rows (row ``j * group + g`` is token j of query head ``h * group + g``), and one split
of the slots: it walks over its share of the coded tiles, a frame at a time, then over its share of the exact tokens, and
leaves a numerator, a maximum and a denominator a row. A second kernel merges the splits. What must be known on the host
(grid, workspace) follows from shapes alone; the clock is read in the kernels.

Channels go through the kernels in two halves, even and odd ones: a centroid is then d / 2 words of 32 bits, whatever d.
Everything that reaches a tensor core is fp16, where centroids are exact. A query is scaled by a power of two and split into
the sum of two fp16 numbers, which keeps fp32's precision; exact tokens are scaled likewise, and they and the probabilities
are split too if the model is fp32.

Only plain Triton: the kernels also run in its interpreter (``TRITON_INTERPRET=1`` before triton is imported, CPU tensors).
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from million_ops import reference
from million_ops._checks import check_attention, check_encode
from million_ops.layout import layout_by_id

MAX_HEAD_DIM = 256
READABLE_LAYOUTS = (0, 1)  # plain and rows64
MIN_SPLIT_TOKENS = 128  # below, a split costs more than it saves
PROGRAMS_PER_SM = 2  # what fits its registers at once
INTERPRETED_SMS = 2

# Probabilities carry a factor of 2^12, so that fp16 holds those of rare tokens too; it is taken off with the denominator.
_SHIFT = tl.constexpr(12.0)
_ROWS64 = tl.constexpr(64)


# --- Encode ------------------------------------------------------------------------------------------------------------


@triton.jit
def _encode_kernel(
    x, codebook, codes,
    x_stride_b, x_stride_h, x_stride_t, x_stride_d, book_stride_h, book_stride_c, book_stride_m, book_stride_d,
    H, T, S, groups,
    d: tl.constexpr, BLOCK_T: tl.constexpr, SUBSPACES: tl.constexpr,
):  # fmt: skip
    """``codes[b,h,t,m] = argmin_c sum_d (x[b,h,t,m,d] - codebook[h,c,m,d])^2``, BLOCK_T tokens x SUBSPACES subspaces a program."""
    pid = tl.program_id(0)
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    t = (pid // groups) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, 256)
    x += b.to(tl.int64) * x_stride_b + h.to(tl.int64) * x_stride_h
    codebook += h.to(tl.int64) * book_stride_h
    codes += tl.program_id(1).to(tl.int64) * T * S
    first = (pid % groups) * SUBSPACES
    for m in range(first, tl.minimum(first + SUBSPACES, S)):
        distance = tl.zeros([BLOCK_T, 256], tl.float32)
        for e in tl.static_range(d):
            value = tl.load(x + t.to(tl.int64) * x_stride_t + (m * d + e) * x_stride_d, mask=t < T, other=0.0)
            centroid = tl.load(codebook + c * book_stride_c + m * book_stride_m + e * book_stride_d)
            # From differences: |x|^2 - 2 x c + |c|^2 would lose far outliers.
            difference = value.to(tl.float32)[:, None] - centroid.to(tl.float32)[None, :]
            distance += difference * difference
        best = tl.min(distance, axis=1)
        code = tl.min(tl.where(distance == best[:, None], c[None, :], 256), axis=1)
        code = tl.where(code == 256, 0, code)  # NaN equals nothing: code 0, as the reference
        tl.store(codes + t.to(tl.int64) * S + m, code.to(tl.uint8), mask=t < T)


# --- Attention ---------------------------------------------------------------------------------------------------------


@triton.jit
def _unit(largest):
    """A power of two u with ``largest / u`` in [2^13, 2^14): what is divided by it fits fp16, and nothing that matters underflows."""
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(largest > 1e-25, power * (1.0 / 8192.0), 1.0)


@triton.jit
def _halves(x):
    """fp32 x as the sum of two fp16 numbers. The second is zero for what an fp16 or bf16 model computed, divided by `_unit`."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _scaled_product(high, low, y):
    """``(high + low) @ y`` in the precision of fp32, on tensor cores. y fp32."""
    unit = _unit(tl.max(tl.max(tl.abs(y), axis=1), axis=0))
    y_high, y_low = _halves(y / unit)
    product = tl.dot(low, y_high)
    product = tl.dot(high, y_low, product)
    return tl.dot(high, y_high, product) * unit


@triton.jit
def _turned(
    q,
    row,
    row_ok,
    channel,
    stride_d,
    t,
    inv_freq,
    half,
    D: tl.constexpr,
    ROTATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Channels of ``R(-t) q`` [rows, channels] fp32. ``row`` [rows]: offsets of the query rows."""
    x = tl.load(
        q + row[:, None] + (channel * stride_d)[None, :], mask=row_ok[:, None] & (channel < D)[None, :], other=0.0
    )
    x = x.to(tl.float32)
    if ROTATE:
        if INTERLEAVED:
            second = channel % 2 == 1
            pair = channel // 2
            partner = tl.where(second, channel - 1, channel + 1)
        else:
            second = channel >= half
            pair = tl.where(second, channel - half, channel)
            partner = tl.where(second, channel - half, channel + half)
        turns = channel < 2 * half
        angle = t * tl.load(inv_freq + pair, mask=turns, other=0.0)
        sine = tl.where(second, -tl.sin(angle), tl.sin(angle))
        y = tl.load(q + row[:, None] + (partner * stride_d)[None, :], mask=row_ok[:, None] & turns[None, :], other=0.0)
        x = x * tl.cos(angle)[None, :] + y.to(tl.float32) * sine[None, :]
    return x


@triton.jit
def _frame_query(
    q, row, row_ok, stride_d, t, transform_inv, inv_freq, half,
    D: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, TRANSFORM: tl.constexpr,
):  # fmt: skip
    """``q_f / unit`` as high and low fp16 parts of even and odd channels [rows, words], and unit [rows]."""
    word = tl.arange(0, WORDS)
    if TRANSFORM:
        even = tl.zeros([ROWS, WORDS], tl.float32)
        odd = tl.zeros([ROWS, WORDS], tl.float32)
        for i in range(0, D, 32):
            channel = i + tl.arange(0, 32)
            x = _turned(q, row, row_ok, channel, stride_d, t, inv_freq, half, D, ROTATE, INTERLEAVED)
            unit = _unit(tl.max(tl.abs(x), axis=1))
            high, low = _halves(x / unit[:, None])
            at = transform_inv + channel[:, None] * D + 2 * word[None, :]
            inside = (channel < D)[:, None] & (2 * word < D)[None, :]
            even += _scaled_product(high, low, tl.load(at, mask=inside, other=0.0)) * unit[:, None]
            odd += _scaled_product(high, low, tl.load(at + 1, mask=inside, other=0.0)) * unit[:, None]
    else:
        even = _turned(q, row, row_ok, 2 * word, stride_d, t, inv_freq, half, D, ROTATE, INTERLEAVED)
        odd = _turned(q, row, row_ok, 2 * word + 1, stride_d, t, inv_freq, half, D, ROTATE, INTERLEAVED)
    unit = _unit(tl.maximum(tl.max(tl.abs(even), axis=1), tl.max(tl.abs(odd), axis=1)))
    even_high, even_low = _halves(even / unit[:, None])
    odd_high, odd_low = _halves(odd / unit[:, None])
    return even_high, even_low, odd_high, odd_low, unit


@triton.jit
def _centroids(
    codes, book, word, slot, live, S, stride_c, stride_m, D: tl.constexpr, W: tl.constexpr, LAYOUT: tl.constexpr
):
    """Even and odd channels of the centroids of coded slots, fp16 [words, slots]; zeros where ``live`` [slots] is False.

    codes: the head's packed codes; book: its centroids as words of two channels, W words a centroid.
    """
    m = word // W
    slot = slot.to(tl.int64)
    if LAYOUT == 0:
        at = (slot * S)[None, :] + m[:, None]
    else:
        at = (slot // _ROWS64 * (_ROWS64 * S) + slot % _ROWS64)[None, :] + (m * _ROWS64)[:, None]
    keep = (2 * word < D)[:, None] & live[None, :]
    code = tl.load(codes + at, mask=keep, other=0).to(tl.int32)
    both = tl.load(book + code * stride_c + (m * stride_m + word % W)[:, None], mask=keep, other=0)
    even = (both & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    odd = ((both >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    return even, odd


@triton.jit
def _exact(sinks, ring, new, channel, sink_at, ring_at, new_at, stride_d, in_sinks, in_ring, is_new, D: tl.constexpr):
    """Channels of exact tokens, fp32 [channels, tokens]: each token is in one of the three places at most, else zero."""
    inside = (channel < D)[:, None]
    at = channel[:, None]
    x = tl.load(sinks + sink_at[None, :] + at, mask=inside & in_sinks[None, :], other=0.0).to(tl.float32)
    x += tl.load(ring + ring_at[None, :] + at, mask=inside & in_ring[None, :], other=0.0).to(tl.float32)
    x += tl.load(new + new_at[None, :] + at * stride_d, mask=inside & is_new[None, :], other=0.0).to(tl.float32)
    return x


@triton.jit
def _weighted(weight, value, FULL: tl.constexpr):
    """``weight @ value^T``: weight [rows, tokens] fp32, value [channels, tokens] fp32; weights are rounded to fp16 unless FULL."""
    unit = _unit(tl.max(tl.max(tl.abs(value), axis=1), axis=0))
    value = tl.trans(value / unit)
    value_high, value_low = _halves(value)
    high, low = _halves(weight)
    product = tl.dot(high, value_high)
    if FULL:
        product = tl.dot(low, value_high, product)
        product = tl.dot(high, value_low, product)
    return product * unit


@triton.jit
def _softmax_step(score, top, total):
    """Online softmax in base 2. score [rows, tokens], top and total [rows].

    Returns probabilities relative to the new top (times 2^_SHIFT), the factor for what was summed so far, top, total.
    """
    new_top = tl.maximum(top, tl.max(score, axis=1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet: 2^-inf, not NaN
    p = tl.exp2(score - base[:, None] + _SHIFT)
    factor = tl.exp2(top - base)
    return p, factor, new_top, total * factor + tl.sum(p, axis=1)


@triton.jit(do_not_specialize=["offset"])
def _attention_kernel(
    q, k, v, k_book, v_book, transform_inv, inv_freq, k_codes, v_codes, k_ring, v_ring, k_sinks, v_sinks, clock, start, origin, mask,
    part_out, part_top, part_total,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, mask_stride_b, mask_stride_n, mask_stride_s,
    k_book_stride_h, k_book_stride_c, k_book_stride_m, v_book_stride_h, v_book_stride_c, v_book_stride_m,
    k_codes_stride_h, v_codes_stride_h,
    scale, offset, n, group, H, T, R, N, mask_slots, F, tiles_per_frame, half, S_k, S_v, row_blocks,
    D: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WORDS: tl.constexpr, W_K: tl.constexpr, W_V: tl.constexpr,
    K_LAYOUT: tl.constexpr, V_LAYOUT: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, TRANSFORM: tl.constexpr,
    MASK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """One block of query rows over one split of the slots; see the head of this file.

    part_out [B * H, splits, n * group, D], part_top and part_total [B * H, splits, n * group], fp32. A split that
    a row sees nothing of leaves the total 0.
    """
    bh = tl.program_id(0) // row_blocks
    block = tl.program_id(0) % row_blocks
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    bh = bh.to(tl.int64)

    word = tl.arange(0, WORDS)
    r = block * ROWS + tl.arange(0, ROWS)
    row_ok = r < n * group
    token = r // group
    row = b * q_stride_b + (h * group + r % group) * q_stride_h + token.to(tl.int64) * q_stride_n
    last_token = (tl.minimum((block + 1) * ROWS, n * group) - 1) // group

    first = tl.load(clock) + offset  # slot of the first new token
    begin = tl.load(start + b).to(tl.int64)
    turn = tl.load(origin + b).to(tl.int64)
    p = first + token  # slot of a row's query
    ring_from = tl.maximum(tl.load(clock + 2), first - R)
    held = tl.minimum(tl.maximum(first, 0), T)  # slots before the new tokens that the buffers hold
    # A query reads slot s from its code if s < max(p - R + 1, ring_from). Clamped to the buffers, slots fit 32 bits.
    coded_from = tl.minimum(tl.maximum(begin + N, 0), T).to(tl.int32)
    coded_to = tl.minimum(tl.maximum(tl.maximum(p - R + 1, ring_from), 0), held).to(tl.int32)
    last_to = tl.minimum(tl.maximum(tl.maximum(first + last_token - R + 1, ring_from), 0), held).to(tl.int32)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out_even = tl.zeros([ROWS, WORDS], tl.float32)
    out_odd = tl.zeros([ROWS, WORDS], tl.float32)

    # Coded slots, in tiles that do not cross frames; a split takes a run of consecutive tiles.
    tile_from = coded_from // F * tiles_per_frame + coded_from % F // TOKENS
    last = tl.maximum(last_to - 1, 0)
    tile_to = last // F * tiles_per_frame + last % F // TOKENS + 1
    tile_to = tl.where(coded_from < last_to, tile_to, tile_from)
    share = (tile_to - tile_from + splits - 1) // splits
    tile_from = tile_from + split * share
    tile_to = tl.minimum(tile_from + share, tile_to)
    frame_from = tile_from // tiles_per_frame
    frame_to = tl.where(tile_from < tile_to, (tile_to + tiles_per_frame - 1) // tiles_per_frame, frame_from)
    k_codes += bh * k_codes_stride_h
    v_codes += bh * v_codes_stride_h
    k_book += h * k_book_stride_h
    v_book += h * v_book_stride_h
    for frame in range(frame_from, frame_to):
        t = (turn + frame * F).to(tl.float32)
        even_high, even_low, odd_high, odd_low, unit = _frame_query(
            q, row, row_ok, q_stride_d, t, transform_inv + h * D * D, inv_freq, half, D, ROWS, WORDS, ROTATE, INTERLEAVED, TRANSFORM
        )  # fmt: skip
        frame_tile = frame * tiles_per_frame
        frame_end = tl.minimum((frame + 1) * F, last_to)
        for tile in range(tl.maximum(tile_from, frame_tile), tl.minimum(tile_to, frame_tile + tiles_per_frame)):
            slot = frame * F + (tile - frame_tile) * TOKENS + tl.arange(0, TOKENS)
            live = (slot >= coded_from) & (slot < frame_end)
            visible = live[None, :] & (slot[None, :] < coded_to[:, None]) & row_ok[:, None]
            if MASK:
                at = (
                    b * mask_stride_b
                    + token.to(tl.int64)[:, None] * mask_stride_n
                    + slot.to(tl.int64)[None, :] * mask_stride_s
                )
                visible = visible & (tl.load(mask + at, mask=visible & (slot < mask_slots)[None, :], other=0) != 0)
            even, odd = _centroids(
                k_codes, k_book, word, slot, live, S_k, k_book_stride_c, k_book_stride_m, D, W_K, K_LAYOUT
            )
            score = tl.dot(even_low, even)
            score = tl.dot(odd_low, odd, score)
            score = tl.dot(even_high, even, score)
            score = tl.dot(odd_high, odd, score)
            score = tl.where(visible, score * (unit * scale)[:, None], float("-inf"))
            weight, factor, top, total = _softmax_step(score, top, total)
            even, odd = _centroids(
                v_codes, v_book, word, slot, live, S_v, v_book_stride_c, v_book_stride_m, D, W_V, V_LAYOUT
            )
            even, odd = tl.trans(even), tl.trans(odd)
            high, low = _halves(weight)
            out_even = tl.dot(high, even, out_even * factor[:, None])
            out_odd = tl.dot(high, odd, out_odd * factor[:, None])
            if FULL:
                out_even = tl.dot(low, even, out_even)
                out_odd = tl.dot(low, odd, out_odd)

    # Exact tokens: sinks, ring, new tokens, one after the other; tiles are dealt to the splits from the last one, which
    # has the fewest coded tiles.
    even_high, even_low, odd_high, odd_low, unit = _frame_query(
        q, row, row_ok, q_stride_d, 0.0, transform_inv, inv_freq, half, D, ROWS, WORDS, False, False, False
    )
    k_new = k + b * k_stride_b + h * k_stride_h
    v_new = v + b * v_stride_b + h * v_stride_h
    tiles = (N + R + last_token + TOKENS) // TOKENS
    for tile in range(splits - 1 - split, tiles, splits):
        i = tile * TOKENS + tl.arange(0, TOKENS)
        in_sinks = i < N
        in_ring = (i >= N) & (i < N + R)
        is_new = (i >= N + R) & (i < N + R + n)
        slot = tl.where(in_sinks, begin + i, first - R - N + i)
        cached = (slot >= 0) & (slot < held)
        in_sinks = in_sinks & cached
        window = in_ring
        in_ring = in_ring & cached & (slot >= ring_from) & (slot >= begin + N)
        is_new = is_new & (slot >= begin)
        visible = (in_sinks | in_ring | is_new)[None, :] & (slot[None, :] <= p[:, None]) & row_ok[:, None]
        visible = visible & ((slot[None, :] > p[:, None] - R) | (window == 0)[None, :])
        if MASK:
            at = b * mask_stride_b + token.to(tl.int64)[:, None] * mask_stride_n + slot[None, :] * mask_stride_s
            inside = (slot >= 0) & (slot < mask_slots)
            visible = visible & (tl.load(mask + at, mask=visible & inside[None, :], other=0) != 0)
        # What none of the rows sees may hold anything, NaN included.
        seen = tl.max(visible.to(tl.int32), axis=0) > 0
        in_sinks = in_sinks & seen
        in_ring = in_ring & seen
        is_new = is_new & seen
        sink_at = (bh * N + i) * D
        # No tl.where here: where in_ring is False, nothing is read, and Triton 3.6 fails to compile such a one.
        ring_at = (bh * R + slot % tl.maximum(R, 1)) * D
        new_i = (i - N - R).to(tl.int64)
        k_at, v_at = new_i * k_stride_n, new_i * v_stride_n
        even = _exact(
            k_sinks, k_ring, k_new, 2 * word, sink_at, ring_at, k_at, k_stride_d, in_sinks, in_ring, is_new, D
        )
        odd = _exact(
            k_sinks, k_ring, k_new, 2 * word + 1, sink_at, ring_at, k_at, k_stride_d, in_sinks, in_ring, is_new, D
        )
        k_unit = _unit(tl.maximum(tl.max(tl.abs(even), axis=0), tl.max(tl.abs(odd), axis=0)))
        k_even_high, k_even_low = _halves(even / k_unit[None, :])
        k_odd_high, k_odd_low = _halves(odd / k_unit[None, :])
        score = tl.dot(even_high, k_even_high)
        score = tl.dot(odd_high, k_odd_high, score)
        if FULL:
            score = tl.dot(even_low, k_even_high, score)
            score = tl.dot(even_high, k_even_low, score)
            score = tl.dot(odd_low, k_odd_high, score)
            score = tl.dot(odd_high, k_odd_low, score)
        score = tl.where(visible, score * (unit * scale)[:, None] * k_unit[None, :], float("-inf"))
        weight, factor, top, total = _softmax_step(score, top, total)
        even = _exact(
            v_sinks, v_ring, v_new, 2 * word, sink_at, ring_at, v_at, v_stride_d, in_sinks, in_ring, is_new, D
        )
        odd = _exact(
            v_sinks, v_ring, v_new, 2 * word + 1, sink_at, ring_at, v_at, v_stride_d, in_sinks, in_ring, is_new, D
        )
        out_even = out_even * factor[:, None] + _weighted(weight, even, FULL)
        out_odd = out_odd * factor[:, None] + _weighted(weight, odd, FULL)

    part = (bh * splits + split) * n * group + r
    tl.store(part_top + part, top, mask=row_ok)
    tl.store(part_total + part, total, mask=row_ok)
    at = part_out + (part * D)[:, None] + 2 * word[None, :]
    inside = row_ok[:, None] & (2 * word < D)[None, :]
    tl.store(at, out_even, mask=inside)
    tl.store(at + 1, out_odd, mask=inside)


@triton.jit
def _merge_kernel(
    part_out, part_top, part_total, out, lse, n, group, H, splits,
    D: tl.constexpr, CHANNELS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One query row: its splits' numerators over its splits' denominators. out [B, n, H * group, D], lse [B, H * group, n]."""
    r = (tl.program_id(0) % (n * group)).to(tl.int64)
    bh = (tl.program_id(0) // (n * group)).to(tl.int64)
    head = bh % H * group + r % group
    channel = tl.arange(0, CHANNELS)
    part = bh * splits * n * group + r  # and n * group more for the next split

    all_splits = tl.arange(0, SPLITS)
    all_at = part + all_splits.to(tl.int64) * n * group
    totals = tl.load(part_total + all_at, mask=all_splits < splits, other=0.0)
    tops = tl.load(part_top + all_at, mask=(all_splits < splits) & (totals != 0), other=float("-inf"))
    top = tl.max(tops, axis=0)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.where(totals != 0, totals * tl.exp2(tops - base), 0.0), axis=0)

    numerator = tl.zeros([CHANNELS], tl.float32)
    for i in range(0, splits, BLOCK):
        split = i + tl.arange(0, BLOCK)
        at = part + split.to(tl.int64) * n * group
        seen = tl.load(part_total + at, mask=split < splits, other=0.0) != 0  # true for NaN, which must stay
        weight = tl.exp2(tl.load(part_top + at, mask=seen, other=float("-inf")) - base)
        x = tl.load(
            part_out + (at * D)[:, None] + channel[None, :], mask=seen[:, None] & (channel < D)[None, :], other=0.0
        )
        numerator += tl.sum(x * weight[:, None], axis=0)
    nothing = total == 0.0
    result = numerator / tl.where(nothing, 1.0, total)
    b, token = bh // H, r // group
    tl.store(
        out + ((b * n + token) * (H * group) + head) * D + channel, result.to(out.dtype.element_ty), mask=channel < D
    )
    # Scores are in base 2, the result is a natural logarithm.
    value = (top + (tl.log2(tl.where(nothing, 1.0, total)) - _SHIFT)) * 0.6931471805599453
    tl.store(lse + (b * H * group + head) * n + token, tl.where(nothing, float("-inf"), value))


# --- Host --------------------------------------------------------------------------------------------------------------


def _on(x: Tensor):
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else INTERPRETED_SMS


def _words(codebook: Tensor) -> Tensor:
    """A codebook [H, 256, S, d] fp16 as words of two channels, [H, 256, S, d / 2] int32."""
    aligned = codebook.stride(3) == 1 and codebook.data_ptr() % 4 == 0 and not any(x % 2 for x in codebook.stride()[:3])
    return (codebook if aligned else codebook.clone(memory_format=torch.contiguous_format)).view(torch.int32)


def pq_encode(x: Tensor, codebook: Tensor) -> Tensor:
    """See `million_ops.pq_encode`. x [B, H, T, D], codebook [H, 256, S, d] fp16 -> [B, H, T, S] uint8."""
    check_encode(x, codebook)
    B, H, T, _ = x.shape
    _, _, S, d = codebook.shape
    codes = torch.empty(B, H, T, S, dtype=torch.uint8, device=x.device)
    if codes.numel() == 0:
        return codes
    tokens = min(32, max(4, triton.next_power_of_2(T)))
    # A decode step has too few tokens to fill the device unless every subspace is a program's own.
    subspaces = 8 if T > 32 else 1
    groups = triton.cdiv(S, subspaces)
    with _on(x):
        # Without contraction to fused multiply-adds, so that near ties fall as in the reference.
        _encode_kernel[(triton.cdiv(T, tokens) * groups, B * H)](
            x, codebook, codes, *x.stride(), *codebook.stride(), H, T, S, groups,
            d=d, BLOCK_T=tokens, SUBSPACES=subspaces, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return codes


def pq_attention_lse(
    q: Tensor, k: Tensor, v: Tensor, k_codebook: Tensor, v_codebook: Tensor, k_transform_inv: Tensor | None, inv_freq: Tensor | None,
    k_codes: Tensor, v_codes: Tensor, k_ring: Tensor, v_ring: Tensor, k_sinks: Tensor, v_sinks: Tensor,
    clock: Tensor, start: Tensor, origin: Tensor, mask: Tensor | None,
    scale: float, offset: int, frame_tokens: int, rope_interleaved: bool, k_layout: int, v_layout: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `million_ops.pq_attention_lse`. A head_dim or layout that these kernels do not read goes to the reference."""
    check_attention(q, k, v, k_codebook, v_codebook, k_transform_inv, inv_freq, k_codes, v_codes, k_ring, v_ring, k_sinks, v_sinks,
                    clock, start, origin, mask, scale, offset, frame_tokens, rope_interleaved, k_layout, v_layout)  # fmt: skip
    B, Hq, n, D = q.shape
    H, R, N = k.shape[1], k_ring.shape[2], k_sinks.shape[2]
    group = Hq // H
    if D > MAX_HEAD_DIM or D % 2 or k_layout not in READABLE_LAYOUTS or v_layout not in READABLE_LAYOUTS:
        return reference.pq_attention_lse(
            q, k, v, k_codebook, v_codebook, k_transform_inv, inv_freq, k_codes, v_codes, k_ring, v_ring, k_sinks, v_sinks,
            clock, start, origin, mask, scale, offset, frame_tokens, rope_interleaved, k_layout, v_layout,
        )  # fmt: skip
    out = torch.empty(B, n, Hq, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, Hq, n, dtype=torch.float32, device=q.device)
    if B == 0 or H == 0:
        return out, lse

    T = min(codes.shape[2] * layout_by_id(i).tile_tokens for codes, i in ((k_codes, k_layout), (v_codes, v_layout)))
    framed = inv_freq is not None and frame_tokens > 0
    frame = min(frame_tokens, max(T, 1)) if framed else max(T, 1)  # slots behind T hold nothing
    rows_total = n * group
    rows = 16 if rows_total <= 16 else 32 if rows_total <= 32 or D > 128 else 64
    tokens = min(64 if D <= 128 else 32, max(16, triton.next_power_of_2(frame)))
    row_blocks = triton.cdiv(rows_total, rows)
    programs = B * H * row_blocks
    # From the capacity, never from the length, which only the device knows. With many rows there is one split, so the
    # workspace stays within what fills the device once, or the size of the result.
    splits = max(1, min(PROGRAMS_PER_SM * _processors(q.device) // programs, triton.cdiv(T + R, MIN_SPLIT_TOKENS)))
    workspace = torch.empty(B * H * splits * rows_total, D + 2, dtype=torch.float32, device=q.device).view(-1)
    part_out, part_top, part_total = workspace.split([x * B * H * splits * rows_total for x in (D, 1, 1)])

    k_book, v_book = _words(k_codebook), _words(v_codebook)
    transform = q if k_transform_inv is None else k_transform_inv.contiguous()
    allowed = None if mask is None else mask.view(torch.uint8)
    with _on(q):
        _attention_kernel[(programs, splits)](
            q, k, v, k_book, v_book, transform, inv_freq.contiguous() if framed else q, k_codes, v_codes, k_ring, v_ring, k_sinks,
            v_sinks, clock.contiguous(), start.contiguous(), origin.contiguous(), q if allowed is None else allowed,
            part_out, part_top, part_total, *q.stride(), *k.stride(), *v.stride(),
            *((0, 0, 0) if allowed is None else (allowed.stride(0), allowed.stride(2), allowed.stride(3))),
            *k_book.stride()[:3], *v_book.stride()[:3], k_codes.shape[2] * k_codes.shape[3], v_codes.shape[2] * v_codes.shape[3],
            scale * math.log2(math.e), offset, n, group, H, T, R, N, 0 if allowed is None else allowed.shape[3],
            frame, triton.cdiv(frame, tokens), inv_freq.shape[0] if framed else 0, k_codebook.shape[2], v_codebook.shape[2], row_blocks,
            D=D, ROWS=rows, TOKENS=tokens, WORDS=max(16, triton.next_power_of_2(D // 2)),
            W_K=k_codebook.shape[3] // 2, W_V=v_codebook.shape[3] // 2, K_LAYOUT=k_layout, V_LAYOUT=v_layout,
            ROTATE=framed, INTERLEAVED=bool(rope_interleaved), TRANSFORM=k_transform_inv is not None,
            MASK=allowed is not None, FULL=q.dtype == torch.float32,
            num_warps=8 if rows == 64 or D > 128 else 4, enable_fp_fusion=True,
            num_stages=1,  # prefetched tiles would need more shared memory than some GPUs have
        )  # fmt: skip
        _merge_kernel[(B * H * rows_total,)](
            part_out, part_top, part_total, out, lse, n, group, H, splits,
            D=D, CHANNELS=triton.next_power_of_2(D), SPLITS=triton.next_power_of_2(splits), BLOCK=16, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse


def pq_attention(*args) -> Tensor:
    """See `million_ops.pq_attention`."""
    return pq_attention_lse(*args)[0]


IMPLEMENTATIONS = {
    "pq_encode": pq_encode,
    "pq_attention": pq_attention,
    "pq_attention_lse": pq_attention_lse,
}
