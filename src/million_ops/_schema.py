"""Every op of the namespace ``million_ops``: its schema, its tags and its fake, and nothing else.

Implementations live elsewhere: `reference.py` (plain PyTorch, registered for every device), ``csrc/`` (compiled, wins
where it is loaded). Defining the schemas here, once, in Python, keeps one truth for all of them and works with every
torch from 2.4 on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from million_ops._checks import check_append, check_attention, check_decode, check_dequantize, check_encode
from million_ops.layout import layout_by_id

NAMESPACE = "million_ops"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

# What a cache layer is made of; both stateful ops take it in this order (`Layer state` in `ops.py` explains each).
_CODEBOOKS = "Tensor k_codebook, Tensor v_codebook, Tensor? {transform}, Tensor? inv_freq"
_STATE = (
    "Tensor{a} k_codes, Tensor{b} v_codes, Tensor{c} k_ring, Tensor{d} v_ring, Tensor{e} k_sinks, Tensor{f} v_sinks, "
    "Tensor clock, Tensor start, Tensor origin"
)
_GEOMETRY = "int offset, int frame_tokens, bool rope_interleaved, int k_layout, int v_layout"
_READ = dict.fromkeys("abcdef", "")
_WRITE = {x: f"({x}!)" for x in "abcdef"}

SCHEMAS = {
    "pq_encode": "(Tensor x, Tensor codebook) -> Tensor",
    "pq_decode": "(Tensor codes, Tensor codebook, ScalarType dtype) -> Tensor",
    "pq_dequantize": (
        "(Tensor codes, Tensor codebook, Tensor? transform_inv, Tensor? inv_freq, Tensor origin, int layout, ScalarType dtype, "
        "int frame_tokens, bool rope_interleaved, int first_slot) -> Tensor"
    ),
    "pq_append_": (
        f"(Tensor k, Tensor v, {_CODEBOOKS.format(transform='k_transform')}, {_STATE.format(**_WRITE)}, {_GEOMETRY}, "
        "Tensor? after=None) -> ()"
    ),
    "pq_attention": (
        f"(Tensor q, Tensor k, Tensor v, {_CODEBOOKS.format(transform='k_transform_inv')}, {_STATE.format(**_READ)}, "
        f"Tensor? mask, float scale, {_GEOMETRY}) -> Tensor"
    ),
    "pq_attention_lse": (
        f"(Tensor q, Tensor k, Tensor v, {_CODEBOOKS.format(transform='k_transform_inv')}, {_STATE.format(**_READ)}, "
        f"Tensor? mask, float scale, {_GEOMETRY}) -> (Tensor, Tensor)"
    ),
}

for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=TAGS)


def _fake(name: str):
    return torch.library.register_fake(f"{NAMESPACE}::{name}", lib=LIBRARY)


@_fake("pq_encode")
def _(x: Tensor, codebook: Tensor) -> Tensor:
    check_encode(x, codebook)
    return x.new_empty((*x.shape[:3], codebook.shape[2]), dtype=torch.uint8)


@_fake("pq_decode")
def _(codes: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
    check_decode(codes, codebook, dtype)
    return codes.new_empty((*codes.shape[:3], codebook.shape[2] * codebook.shape[3]), dtype=dtype)


@_fake("pq_dequantize")
def _(
    codes: Tensor, codebook: Tensor, transform_inv, inv_freq, origin: Tensor, layout: int, dtype: torch.dtype, *args
) -> Tensor:
    check_dequantize(codes, codebook, transform_inv, inv_freq, origin, layout, dtype, *args)
    B, H, tiles, _ = codes.shape
    _, _, S, d = codebook.shape
    return codes.new_empty((B, H, tiles * layout_by_id(layout).tile_tokens, S * d), dtype=dtype)


@_fake("pq_append_")
def _(*args, after: Tensor | None = None) -> None:
    check_append(*args[:20])


@_fake("pq_attention")
def _(q: Tensor, *args) -> Tensor:
    check_attention(q, *args)
    B, Hq, n, D = q.shape
    return q.new_empty((B, n, Hq, D))


@_fake("pq_attention_lse")
def _(q: Tensor, *args) -> tuple[Tensor, Tensor]:
    check_attention(q, *args)
    B, Hq, n, D = q.shape
    return q.new_empty((B, n, Hq, D)), q.new_empty((B, Hq, n), dtype=torch.float32)
