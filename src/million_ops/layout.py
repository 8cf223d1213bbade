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
# Channels that share a code, of keys and of values, that the tensor core kernel is built for (csrc/cuda/attention_mma_*.cu).
MMA_SHAPES = {
    64: ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8)),
    96: ((2, 2), (4, 4)),
    128: ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8)),
    256: ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8)),
}
HEAD_DIMS = (64, 96, 128, 256)  # what the compiled kernels are tested for; the reference takes any multiple of d_m


@dataclass(frozen=True)
class Layout:
    """One packing of codes: ``offset(t, m, S)`` maps (token in tile, subspace) to a byte of the tile."""

    id: int
    name: str
    tile_tokens: int
    offset: Callable[[Tensor, Tensor, int], Tensor]
    subspace_step: int = 1  # S is a multiple of this
    half_inverse: bool = False  # attention over keys packed so takes the transform's inverse in fp16

    def inverse(self, transform_inv: Tensor) -> Tensor:
        """``k_transform_inv`` [H, D, D] fp32 as the attention ops want it for keys packed so: fp32, or fp16.

        fp16 comes with the matrices stored column after column, as kernels read them without a copy; to make it once and
        keep it is the caller's part.
        """
        return transform_inv.mT.half().contiguous().mT if self.half_inverse else transform_inv

    def tiles(self, capacity: int) -> int:
        """Tiles that hold ``capacity`` tokens."""
        return -(-capacity // self.tile_tokens)

    def packed_shape(self, batch: int, heads: int, capacity: int, subspaces: int) -> tuple[int, int, int, int]:
        """Shape of the packed buffer for ``capacity`` tokens, rounded up to whole tiles. Raises ValueError for an S it cannot pack."""
        if subspaces % self.subspace_step:
            raise ValueError(
                f"layout {self.name} packs multiples of {self.subspace_step} subspaces, got {subspaces} subspaces"
            )
        return batch, heads, self.tiles(capacity), self.tile_tokens * subspaces

    def permutation(self, subspaces: int, device: torch.device | str = "cpu") -> Tensor:
        """``[tile_tokens, S]`` int64: the byte of each (token, subspace) inside a tile."""
        t = torch.arange(self.tile_tokens, device=device)[:, None]
        m = torch.arange(subspaces, device=device)[None, :]
        return self.offset(t, m, subspaces)


def _rotation_width(steps: int, step: Tensor) -> Tensor:
    """Lookup steps go in groups of 4, then 2, then 1; within a group lanes take them in rotated order."""
    return torch.where(step < steps // 4 * 4, 4, torch.where(step < steps // 2 * 2, 2, 1))


def _lane_byte(lane: Tensor, at: Tensor) -> Tensor:
    """Byte ``at`` of a lane's codes: a warp reads 16 bytes a lane at a time."""
    return at // 16 * 512 + lane * 16 + at % 16


# Both serve tensor core instructions whose operands a warp looks up, lane l = 4 n + c holding column n and depths of its c.
# A table row lies across the 32 banks of shared memory, so lanes that look up the same subspace of different tokens at the
# same time would conflict. Therefore lanes take their steps in an order rotated (xor) by what would make them collide, and
# the kernel undoes the rotation in the other operand. `csrc/cuda/attention_mma.cuh` says how.


def _mma_k(t: Tensor, m: Tensor, S: int) -> Tensor:
    """Keys: a step looks up four subspaces, one for each c, of eight tokens, one for each n; steps rotate with n."""
    steps, c, step = S // 4, m % 4, m // 4
    width = _rotation_width(steps, step)
    batch, n, half = t % 4, (t >> 2) % 4 * 2 + (t >> 4) % 2, (t >> 5) ^ ((t >> 2) & 1)
    own = step ^ (((n & 3) ^ (2 * half)) & (width - 1))
    return _lane_byte(4 * n + c, (2 * batch + half) * steps + own)


def _mma_v(t: Tensor, m: Tensor, S: int) -> Tensor:
    """Values: a step looks up eight subspaces, one for each n, of sixteen tokens, four for each c; steps rotate with c."""
    steps, step = S // 8, m // 8
    width = _rotation_width(steps, step)
    base = step // width * width
    n, c = (m - 8 * base) // width, (t >> 2) % 4
    own = base + (((m - 8 * base) % width) ^ (c & (width - 1)))
    return _lane_byte(4 * n + c, ((t >> 4) * steps + own) * 4 + t % 4)


LAYOUTS: tuple[Layout, ...] = (
    # Token after token: what a person would write down, and the order of `pq_encode`'s result.
    Layout(0, "plain", 1, lambda t, m, S: t * S + m),
    # Subspace after subspace, 64 tokens (one cache line) each: the CPU kernels keep one subspace's table in L1 while
    # they walk over the tile's tokens, and a lane of a GPU's warp reads its subspaces' codes 16 tokens at a time.
    Layout(1, "rows64", 64, lambda t, m, S: m * 64 + t),
    # Keys and values in the order in which lanes look them up for tensor cores.
    Layout(2, "mma_k", 64, _mma_k, subspace_step=8, half_inverse=True),
    Layout(3, "mma_v", 64, _mma_v, subspace_step=8),
)


def layout_by_id(layout_id: int) -> Layout:
    """The layout that a cache or an op names by number. Raises ValueError for an unknown one."""
    if not 0 <= layout_id < len(LAYOUTS):
        known = ", ".join(f"{x.id} ({x.name})" for x in LAYOUTS)
        raise ValueError(f"unknown layout_id {layout_id}; this version knows {known}")
    return LAYOUTS[layout_id]


def mma_table_pages(head_dim: int, k_subspace_dim: int, v_subspace_dim: int) -> int | None:
    """64 KiB pages of shared memory that the smallest lookup tables of layouts ``mma_k`` and ``mma_v`` take, or None where they do not apply.

    A page has a row of 256 bytes for each of 256 codes, for keys and values together if that holds both; GPUs with more shared
    memory take larger tables with fewer bank conflicts. With head_dim 256 a block has keys' or values' alone. `csrc/cuda/attention_tables.cuh` lays them out.
    """
    if (k_subspace_dim, v_subspace_dim) not in MMA_SHAPES.get(head_dim, ()):
        return None
    return -(-2 * head_dim // 256) if head_dim > 128 else -(-2 * 2 * head_dim // 256)


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
