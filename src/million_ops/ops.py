"""The public functions: one per op, with what the op computes. `_schema.py` has the schemas, `reference.py` the plain truth.

Layer state
-----------
`pq_append_` and the attention ops share the arguments that make up one cache layer. B rows (sequences), H KV heads, D
channels, S_k and S_v subspaces, R recent tokens, N sink tokens:

==================  =======================  ==========================================================================
``k_codebook``      [H, 256, S_k, d] fp16    centroids of the transformed keys; S_k * d = D, d one of 2, 4, 8
``v_codebook``      [H, 256, S_v, d] fp16    centroids of the values
``k_transform``     [H, D, D] fp32 or None   T, applied to keys before they are encoded (append)
``k_transform_inv`` [H, D, D] fp32 or None   its inverse (attention); fp16 with ``k_layout`` mma_k: `layout.Layout.inverse`
``inv_freq``        [rotary / 2] fp32, None  the model's RoPE frequencies; None: this layer's keys are not rotated
``k_codes``         packed uint8             `layout.Layout.packed_shape` of ``k_layout``
``v_codes``         packed uint8             the same of ``v_layout``
``k_ring, v_ring``  [B, H, R, D]             the last R tokens as the model gave them, slot modulo R; R may be 0
``k_sinks, ...``    [B, H, N, D]             slots ``start[b] .. start[b] + N - 1`` as the model gave them; N may be 0
``clock``           [3] int64                past (tokens before this forward), total, ring_lo (oldest slot the ring may serve)
``start``           [B] int32                first valid slot of a row (left padding before it)
``origin``          [B] int32                position of slot 0, may be negative
``offset``          int                      tokens of this forward that were appended already: the new tokens
                                             occupy slots ``past + offset .. past + offset + n - 1``
``frame_tokens``    int                      F; 0: no frames, keys are encoded as the model gave them
==================  =======================  ==========================================================================

Slot s of frame ``f = s // F`` is encoded as ``T R(-t_f) k`` with ``t_f = f F + origin[b]`` and R the model's rotation, so that
codebooks only ever see rotations within a frame; attention turns the query the same way, ``T^-T R(-t_f) q``, and the dot
product is unchanged.

All ops raise ValueError or RuntimeError for a wrong shape, dtype or device, naming the argument, what was given and what
is needed. None synchronises with the device or allocates by a length that only the device knows. They are for inference: no
gradient passes through them.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.million_ops


def pq_encode(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest centroid in every subspace (MILLION, arXiv 2504.03661, section 3).

    Args:
        x: vectors [B, H, T, D], fp32, bf16 or fp16.
        codebook: centroids [H, 256, S, d] fp16, S * d = D.

    Returns:
        Codes [B, H, T, S] uint8. Distances are fp32; the lowest index wins a tie.
    """
    return _ops.pq_encode(x, codebook)


def pq_decode(codes: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """Centroids of codes: the table lookup alone, without transform or rotation (`pq_dequantize` undoes those).

    Args:
        codes: [B, H, T, S] uint8.
        codebook: [H, 256, S, d] fp16.
        dtype: dtype of the result.

    Returns:
        [B, H, T, S * d] of ``dtype``.
    """
    return _ops.pq_decode(codes, codebook, dtype)


def pq_dequantize(
    codes: Tensor, codebook: Tensor, transform_inv: Tensor | None, inv_freq: Tensor | None, origin: Tensor, layout: int,
    dtype: torch.dtype, frame_tokens: int = 0, rope_interleaved: bool = False, first_slot: int = 0,
) -> Tensor:  # fmt: skip
    """Packed codes back to keys (or values) as the model gave them: ``R(t_f) T^-1`` times the centroids.

    Args:
        codes: packed as ``layout``, [B, H, tiles, tile_tokens * S] uint8. Part of a cache's tiles or rows is read where it lies.
        codebook: [H, 256, S, d] fp16.
        transform_inv: T^-1, [H, D, D] fp32 or fp16 (`layout.Layout.inverse`); None where vectors were encoded as they are.
        inv_freq: [rotary / 2] fp32; None for values, and for keys that are not rotated.
        origin: [B] int32, position of slot 0.
        layout: id of the codes' layout.
        dtype: dtype of the result.
        frame_tokens: F; 0: no frames.
        rope_interleaved: pairs of channels are neighbours.
        first_slot: slot of the first tile's first token.

    Returns:
        [B, H, tiles * tile_tokens, D] of ``dtype``. Slots that were never written hold noise. Products and rotation are fp32.
    """
    return _ops.pq_dequantize(
        codes, codebook, transform_inv, inv_freq, origin, layout, dtype, frame_tokens, rope_interleaved, first_slot
    )


def pq_append_(
    k: Tensor, v: Tensor, k_codebook: Tensor, v_codebook: Tensor, k_transform: Tensor | None, inv_freq: Tensor | None,
    k_codes: Tensor, v_codes: Tensor, k_ring: Tensor, v_ring: Tensor, k_sinks: Tensor, v_sinks: Tensor,
    clock: Tensor, start: Tensor, origin: Tensor, *,
    offset: int = 0, frame_tokens: int = 0, rope_interleaved: bool = False, k_layout: int = 0, v_layout: int = 0,
    after: Tensor | None = None,
) -> None:  # fmt: skip
    """Encode n new tokens and write them, in place, to codes, ring and sinks.

    k, v [B, H, n, D] are the new tokens as the model's attention would use them (rotated keys). A token whose slot lies
    behind the buffers is dropped: the caller sees that in ``clock`` (`million_cache.MillionStaticCache.check`). A chunk
    longer than the ring leaves its last R tokens there. Other arguments: *Layer state*. The clock is only read.

    ``after``: the result of these tokens' attention, which reads the buffers as they were. Its values do not matter, but
    compilers then know the order: without it they may move the append before the attention, and copy the buffers to make that
    right. On a GPU one token is then written beside that attention, which must be the last to have read the buffers.
    """
    _ops.pq_append_(
        k, v, k_codebook, v_codebook, k_transform, inv_freq, k_codes, v_codes, k_ring, v_ring, k_sinks, v_sinks, clock, start, origin,
        offset, frame_tokens, rope_interleaved, k_layout, v_layout, after,
    )  # fmt: skip


def pq_attention(
    q: Tensor, k: Tensor, v: Tensor, k_codebook: Tensor, v_codebook: Tensor, k_transform_inv: Tensor | None, inv_freq: Tensor | None,
    k_codes: Tensor, v_codes: Tensor, k_ring: Tensor, v_ring: Tensor, k_sinks: Tensor, v_sinks: Tensor,
    clock: Tensor, start: Tensor, origin: Tensor, mask: Tensor | None = None, *,
    scale: float, offset: int = 0, frame_tokens: int = 0, rope_interleaved: bool = False, k_layout: int = 0, v_layout: int = 0,
) -> Tensor:  # fmt: skip
    """Causal attention of the n newest tokens over the cache and themselves, from codes.

    Called before the new tokens are appended: the cache is read as of slot ``past + offset - 1``. The query at slot p sees
    every slot ``start[b] <= s <= p`` (that ``mask`` allows), with the key and value of slot s taken from

    * ``k, v`` if s is one of the new tokens (exact),
    * the sinks, if ``s < start[b] + N`` (exact),
    * the ring, if ``s > p - R`` and ``s >= ring_lo`` (exact: R counts the query's own token),
    * the codes otherwise.

    So for n <= max(R, 1) a chunk gives what n single steps give, to rounding.

    Args:
        q: [B, H * group, n, D]; query head ``h * group + g`` reads KV head h.
        k, v: the new tokens, [B, H, n, D], as the model gave them.
        mask: bool [B, 1, n, slots], True where a query may look; slots behind its end are not seen. None: causal only.
        scale: factor on ``q . k`` before the softmax.

    Softmax and accumulation are fp32. Other arguments: *Layer state*.

    Returns:
        [B, n, H * group, D] contiguous, dtype of q. A query that sees nothing (left padding) gets zeros.
    """
    return _ops.pq_attention(
        q, k, v, k_codebook, v_codebook, k_transform_inv, inv_freq, k_codes, v_codes, k_ring, v_ring, k_sinks, v_sinks, clock, start,
        origin, mask, scale, offset, frame_tokens, rope_interleaved, k_layout, v_layout,
    )  # fmt: skip


def pq_attention_lse(
    q: Tensor, k: Tensor, v: Tensor, k_codebook: Tensor, v_codebook: Tensor, k_transform_inv: Tensor | None, inv_freq: Tensor | None,
    k_codes: Tensor, v_codes: Tensor, k_ring: Tensor, v_ring: Tensor, k_sinks: Tensor, v_sinks: Tensor,
    clock: Tensor, start: Tensor, origin: Tensor, mask: Tensor | None = None, *,
    scale: float, offset: int = 0, frame_tokens: int = 0, rope_interleaved: bool = False, k_layout: int = 0, v_layout: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`pq_attention` with the log-sum-exp of the scaled scores, so that results over disjoint sets of tokens merge exactly.

    Returns:
        (out as `pq_attention`, lse [B, H * group, n] fp32, natural logarithm, -inf for a query that sees nothing).
    """
    return _ops.pq_attention_lse(
        q, k, v, k_codebook, v_codebook, k_transform_inv, inv_freq, k_codes, v_codes, k_ring, v_ring, k_sinks, v_sinks, clock, start,
        origin, mask, scale, offset, frame_tokens, rope_interleaved, k_layout, v_layout,
    )  # fmt: skip
