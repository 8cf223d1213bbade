"""Host-side checks of the ops' arguments, shared by the fakes and the reference; the compiled kernels repeat them in C++.

Every message names the argument, what was given and what is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from million_ops.layout import CENTROIDS, SUBSPACE_DIMS, layout_by_id

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _shape(name: str, x: Tensor, want: tuple[int | None, ...], says: str) -> None:
    ok = x.ndim == len(want) and all(w is None or g == w for g, w in zip(x.shape, want))
    shown = "[" + ", ".join("*" if w is None else str(w) for w in want) + "]"
    _require(ok, f"{name} must be {says} {shown}, got {tuple(x.shape)}")


def _dtype(name: str, x: Tensor, *want: torch.dtype) -> None:
    _require(x.dtype in want, f"{name} must be {' or '.join(map(str, want))}, got {x.dtype}")


def _device(name: str, x: Tensor, other: Tensor) -> None:
    _require(x.device == other.device, f"{name} is on {x.device}, the other tensors on {other.device}")


def _codebook(name: str, codebook: Tensor, heads: int | None, head_dim: int | None) -> None:
    _shape(name, codebook, (heads, CENTROIDS, None, None), "[KV heads, centroids, subspaces, channels a subspace]")
    _dtype(name, codebook, torch.float16)
    S, d = codebook.shape[2:]
    _require(d in SUBSPACE_DIMS, f"{name}: {d} channels a subspace, supported are {SUBSPACE_DIMS}")
    _require(
        head_dim is None or S * d == head_dim,
        f"{name} covers {S} x {d} = {S * d} channels, but head_dim is {head_dim}",
    )


def check_encode(x: Tensor, codebook: Tensor) -> None:
    """x [B, H, T, D] float against codebook [H, 256, S, d] fp16."""
    _shape("x", x, (None, None, None, None), "[B, H, T, D]")
    _dtype("x", x, *FLOATS)
    _codebook("codebook", codebook, x.shape[1], x.shape[3])
    _device("codebook", codebook, x)


def check_decode(codes: Tensor, codebook: Tensor, dtype: torch.dtype) -> None:
    """codes [B, H, T, S] uint8 against codebook [H, 256, S, d] fp16."""
    _shape("codes", codes, (None, None, None, None), "[B, H, T, S]")
    _dtype("codes", codes, torch.uint8)
    _codebook("codebook", codebook, codes.shape[1], None)
    _require(
        codes.shape[3] == codebook.shape[2], f"codes have {codes.shape[3]} subspaces, the codebook {codebook.shape[2]}"
    )
    _require(dtype in FLOATS, f"dtype must be one of {FLOATS}, got {dtype}")
    _device("codebook", codebook, codes)


def _codes(name: str, codes: Tensor, codebook: Tensor, layout_id: int, batch: int | None, heads: int) -> None:
    layout, S = layout_by_id(layout_id), codebook.shape[2]
    _require(
        S % layout.subspace_step == 0,
        f"{name} cannot be packed as {layout.name}: {S} subspaces are not a multiple of {layout.subspace_step}",
    )
    _shape(name, codes, (batch, heads, None, layout.tile_tokens * S), f"packed as {layout.name}")
    _dtype(name, codes, torch.uint8)


def _frequencies(inv_freq: Tensor, head_dim: int) -> None:
    _require(
        inv_freq.ndim == 1 and 0 < 2 * inv_freq.shape[0] <= head_dim,
        f"inv_freq must be [rotary dimensions / 2] with at most {head_dim // 2} entries, got {tuple(inv_freq.shape)}",
    )
    _dtype("inv_freq", inv_freq, torch.float32)


def check_dequantize(
    codes: Tensor, codebook: Tensor, transform_inv: Tensor | None, inv_freq: Tensor | None, origin: Tensor, layout: int,
    dtype: torch.dtype, frame_tokens: int, rope_interleaved: bool, first_slot: int,
) -> None:  # fmt: skip
    """Packed codes [B, H, tiles, bytes of a tile] against codebook [H, 256, S, d] fp16, with what undoes transform and rotation."""
    _shape("codes", codes, (None, None, None, None), "[B, H, tiles, bytes of a tile]")
    B, H = codes.shape[:2]
    _codebook("codebook", codebook, H, None)
    D = codebook.shape[2] * codebook.shape[3]
    _codes("codes", codes, codebook, layout, B, H)
    _require(dtype in FLOATS, f"dtype must be one of {FLOATS}, got {dtype}")
    if transform_inv is not None:
        _shape("transform_inv", transform_inv, (H, D, D), "[KV heads, D, D]")
        _dtype("transform_inv", transform_inv, torch.float32, torch.float16)
    if inv_freq is not None:
        _frequencies(inv_freq, D)
    _shape("origin", origin, (B,), "[B]")
    _dtype("origin", origin, torch.int32)
    _require(frame_tokens >= 0, f"frame_tokens must not be negative, got {frame_tokens}")
    _require(first_slot >= 0, f"first_slot must not be negative, got {first_slot}")
    for name, x in (
        ("codebook", codebook),
        ("transform_inv", transform_inv),
        ("inv_freq", inv_freq),
        ("origin", origin),
    ):
        if x is not None:
            _device(name, x, codes)


def _check_layer(
    k, v, k_codebook, v_codebook, transform, inv_freq, k_codes, v_codes, k_ring, v_ring, k_sinks, v_sinks, clock, start, origin,
    offset, frame_tokens, k_layout, v_layout, attends=False,
) -> None:  # fmt: skip
    _shape("k", k, (None, None, None, None), "[B, H, n, D]")
    B, H, n, D = k.shape
    _shape("v", v, (B, H, n, D), "shaped like k,")
    _dtype("k", k, *FLOATS)
    _dtype("v", v, k.dtype)
    _require(n >= 1, "k holds no token (n = 0)")
    _codebook("k_codebook", k_codebook, H, D)
    _codebook("v_codebook", v_codebook, H, D)
    if transform is not None:
        name = "k_transform_inv" if attends else "k_transform"
        _shape(name, transform, (H, D, D), "[KV heads, D, D]")
        if attends and layout_by_id(k_layout).half_inverse:
            _dtype(f"{name} of codes packed as {layout_by_id(k_layout).name}", transform, torch.float16)
        else:
            _dtype(name, transform, torch.float32)
    if inv_freq is not None:
        _frequencies(inv_freq, D)
    for name, codes, codebook, layout_id in (
        ("k_codes", k_codes, k_codebook, k_layout),
        ("v_codes", v_codes, v_codebook, v_layout),
    ):
        _codes(name, codes, codebook, layout_id, B, H)
        _require(codes.is_contiguous(), f"{name} must be contiguous, its strides are {codes.stride()}")
    _shape("k_ring", k_ring, (B, H, None, D), "[B, H, recent tokens, D]")
    _shape("v_ring", v_ring, tuple(k_ring.shape), "shaped like k_ring,")
    _shape("k_sinks", k_sinks, (B, H, None, D), "[B, H, sink tokens, D]")
    _shape("v_sinks", v_sinks, tuple(k_sinks.shape), "shaped like k_sinks,")
    for name, x in (("k_ring", k_ring), ("v_ring", v_ring), ("k_sinks", k_sinks), ("v_sinks", v_sinks)):
        _dtype(name, x, k.dtype)
        _require(x.is_contiguous(), f"{name} must be contiguous, its strides are {x.stride()}")
    _shape("clock", clock, (3,), "(past, total, ring_lo)")
    _dtype("clock", clock, torch.int64)
    for name, x in (("start", start), ("origin", origin)):
        _shape(name, x, (B,), "[B]")
        _dtype(name, x, torch.int32)
    _require(offset >= 0, f"offset must not be negative, got {offset}")
    _require(frame_tokens >= 0, f"frame_tokens must not be negative, got {frame_tokens}")
    tensors = dict(
        v=v, k_codebook=k_codebook, v_codebook=v_codebook, k_transform=transform, inv_freq=inv_freq, k_codes=k_codes, v_codes=v_codes,
        k_ring=k_ring, v_ring=v_ring, k_sinks=k_sinks, v_sinks=v_sinks, clock=clock, start=start, origin=origin,
    )  # fmt: skip
    for name, x in tensors.items():
        if x is not None:
            _device(name, x, k)


def check_append(
    k, v, k_codebook, v_codebook, k_transform, inv_freq, k_codes, v_codes, k_ring, v_ring, k_sinks, v_sinks, clock, start, origin,
    offset, frame_tokens, rope_interleaved, k_layout, v_layout,
) -> None:  # fmt: skip
    """Arguments of `pq_append_`."""
    _check_layer(
        k, v, k_codebook, v_codebook, k_transform, inv_freq, k_codes, v_codes, k_ring, v_ring, k_sinks, v_sinks, clock, start, origin,
        offset, frame_tokens, k_layout, v_layout,
    )  # fmt: skip


def check_attention(
    q, k, v, k_codebook, v_codebook, k_transform_inv, inv_freq, k_codes, v_codes, k_ring, v_ring, k_sinks, v_sinks, clock, start, origin,
    mask, scale, offset, frame_tokens, rope_interleaved, k_layout, v_layout,
) -> None:  # fmt: skip
    """Arguments of `pq_attention` and `pq_attention_lse`."""
    _check_layer(
        k, v, k_codebook, v_codebook, k_transform_inv, inv_freq, k_codes, v_codes, k_ring, v_ring, k_sinks, v_sinks, clock, start, origin,
        offset, frame_tokens, k_layout, v_layout, attends=True,
    )  # fmt: skip
    B, H, n, D = k.shape
    _shape("q", q, (B, None, n, D), "[B, query heads, n, D] with the B, n, D of k,")
    _dtype("q", q, k.dtype)
    _device("q", q, k)
    _require(
        q.shape[1] > 0 and q.shape[1] % H == 0, f"q has {q.shape[1]} heads, which is not a multiple of the {H} KV heads"
    )
    if mask is not None:
        _shape("mask", mask, (B, 1, n, None), "[B, 1, n, slots]")
        _dtype("mask", mask, torch.bool)
        _device("mask", mask, k)
