"""How codes are packed in memory: the one Python statement of it (`csrc/common/pq_layout.h` is the C++ one).

A cache holds the codes of one layer's keys (or values) as ``[B, H, tiles, tile_tokens * S]`` uint8: tiles of
``tile_tokens`` consecutive slots, each tile a permutation of its ``tile_tokens x S`` codes that suits the kernel that
reads it. A layout is that permutation: `Layout.offset(t, m, S)` is the byte of subspace ``m`` of the tile's token ``t``.
`pack` and `unpack` convert from and to the plain order ``[B, H, T, S]``; everything else treats packed codes as opaque.

To add a layout: one row in `LAYOUTS`, one branch in `pq_layout.h`. Nothing may import from this file's users.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CENTROIDS = 256  # 8-bit codes
SUBSPACE_DIMS = (2, 4, 8)  # channels that share a code (d_m): 4, 2 and 1 bit an element
HEAD_DIMS = (64, 96, 128, 256)  # what the compiled kernels are tested for; the reference takes any multiple of d_m


@dataclass(frozen=True)
class Layout:
    """One packing of codes: ``offset(t, m, S)`` maps (token in tile, subspace) to a byte of the tile."""

    id: int
    name: str
    tile_tokens: int
    offset: Callable[[Tensor, Tensor, int], Tensor]

    def tiles(self, capacity: int) -> int:
        """Tiles that hold ``capacity`` tokens."""
        return -(-capacity // self.tile_tokens)

    def packed_shape(self, batch: int, heads: int, capacity: int, subspaces: int) -> tuple[int, int, int, int]:
        """Shape of the packed buffer for ``capacity`` tokens, rounded up to whole tiles."""
        return batch, heads, self.tiles(capacity), self.tile_tokens * subspaces

    def permutation(self, subspaces: int, device: torch.device | str = "cpu") -> Tensor:
        """``[tile_tokens, S]`` int64: the byte of each (token, subspace) inside a tile."""
        t = torch.arange(self.tile_tokens, device=device)[:, None]
        m = torch.arange(subspaces, device=device)[None, :]
        return self.offset(t, m, subspaces)


LAYOUTS: tuple[Layout, ...] = (
    # Token after token: what a person would write down, and the order of `pq_encode`'s result.
    Layout(0, "plain", 1, lambda t, m, S: t * S + m),
    # Subspace after subspace, 64 tokens (one cache line) each: the CPU kernels keep one subspace's table in L1 while
    # they walk over the tile's tokens, and a lane of a GPU's warp reads its subspaces' codes 16 tokens at a time.
    Layout(1, "rows64", 64, lambda t, m, S: m * 64 + t),
)


def layout_by_id(layout_id: int) -> Layout:
    """The layout that a cache or an op names by number. Raises ValueError for an unknown one."""
    if not 0 <= layout_id < len(LAYOUTS):
        known = ", ".join(f"{x.id} ({x.name})" for x in LAYOUTS)
        raise ValueError(f"unknown layout_id {layout_id}; this version knows {known}")
    return LAYOUTS[layout_id]


def layout_for(device_type: str, head_dim: int, subspace_dim: int, group: int) -> Layout:
    """The layout that the kernels of a device family read.

    Args:
        device_type: ``torch.device.type``.
        head_dim: channels of a head.
        subspace_dim: channels that share a code (d_m).
        group: query heads a KV head.
    """
    del head_dim, subspace_dim, group  # faster GPU kernels will want layouts that depend on them
    return LAYOUTS[1] if device_type in ("cpu", "cuda") else LAYOUTS[0]


def pack(codes: Tensor, layout: Layout, capacity: int | None = None) -> Tensor:
    """Codes in plain order ``[B, H, T, S]`` uint8 to the packed buffer of at least ``capacity`` (default T) tokens.

    Slots behind T are zero. Raises ValueError for a wrong rank or dtype, or when T exceeds ``capacity``.
    """
    if codes.ndim != 4 or codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8 [B, H, T, S], got {codes.dtype} {tuple(codes.shape)}")
    B, H, T, S = codes.shape
    capacity = T if capacity is None else capacity
    if capacity < T:
        raise ValueError(f"{T} tokens do not fit a capacity of {capacity}")
    shape = layout.packed_shape(B, H, capacity, S)
    plain = codes.new_zeros(B, H, shape[2] * layout.tile_tokens, S)
    plain[:, :, :T] = codes
    packed = torch.empty_like(plain).view(shape)
    packed[..., layout.permutation(S, codes.device).reshape(-1)] = plain.view(shape)
    return packed


def unpack(packed: Tensor, layout: Layout, subspaces: int) -> Tensor:
    """The packed buffer back to plain order ``[B, H, tiles * tile_tokens, S]`` uint8. Raises ValueError if the shapes do not fit."""
    if packed.ndim != 4 or packed.shape[3] != layout.tile_tokens * subspaces:
        raise ValueError(
            f"layout {layout.name} with {subspaces} subspaces needs [B, H, tiles, {layout.tile_tokens * subspaces}], "
            f"got {tuple(packed.shape)}"
        )
    B, H, tiles, _ = packed.shape
    plain = packed[..., layout.permutation(subspaces, packed.device).reshape(-1)]
    return plain.view(B, H, tiles * layout.tile_tokens, subspaces)
