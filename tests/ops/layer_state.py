"""A random cache layer with every argument of the stateful ops, as a test or benchmark wants it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from million_ops import layout_by_id, layouts_for

NAN = float("nan")
LAYOUT_PAIRS = ((0, 0), (1, 1), (2, 3))  # ids of the layouts of keys and values that go together


@dataclass
class LayerState:
    """Arguments of `pq_append_` and the attention ops (see `million_ops.ops`), in the schemas' names."""

    codebooks: dict[str, Tensor | None]  # k_codebook, v_codebook, k_transform, k_transform_inv, inv_freq
    buffers: dict[str, Tensor]  # k_codes .. v_sinks: what append writes
    clock: Tensor
    start: Tensor
    origin: Tensor
    frame_tokens: int
    interleaved: bool
    layouts: tuple[int, int]  # of keys, of values
    heads: int
    head_dim: int
    dtype: torch.dtype

    def geometry(self, offset: int) -> tuple:
        return offset, self.frame_tokens, self.interleaved, *self.layouts

    def append_args(self, k: Tensor, v: Tensor, offset: int = 0, after: Tensor | None = None) -> tuple:
        c = self.codebooks
        return (k, v, c["k_codebook"], c["v_codebook"], c["k_transform"], c["inv_freq"], *self.buffers.values(),
                self.clock, self.start, self.origin, *self.geometry(offset), after)  # fmt: skip

    def attention_args(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None,
                       offset: int = 0) -> tuple:  # fmt: skip
        c = self.codebooks
        scale = self.head_dim**-0.5 if scale is None else scale
        return (q, k, v, c["k_codebook"], c["v_codebook"], c["k_transform_inv"], c["inv_freq"], *self.buffers.values(),
                self.clock, self.start, self.origin, mask, scale, *self.geometry(offset))  # fmt: skip

    def clone(self) -> LayerState:
        return replace(self, buffers={name: x.clone() for name, x in self.buffers.items()}, clock=self.clock.clone())

    def new_tokens(self, n: int, group: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k, v of n tokens, strided as transformers' projections leave them."""
        B = self.start.shape[0]

        def strided(heads: int) -> Tensor:
            return torch.randn(B, n, heads, self.head_dim).to(self.dtype).transpose(1, 2)

        return strided(self.heads * group), strided(self.heads), strided(self.heads)


def make_layer(*, batch: int = 1, heads: int = 2, head_dim: int = 64, k_dim: int = 2, v_dim: int = 2, past: int = 0,
               capacity: int | None = None, recent: int = 16, sinks: int = 4, frame_tokens: int = 64, start=None, shift: int = 0,
               transform: bool = True, rotary: int | None = None, interleaved: bool = False, layouts: tuple[int, int] | None = None,
               dtype: torch.dtype = torch.float32) -> LayerState:  # fmt: skip
    """A layer whose ``past`` tokens are random codes with matching random ring and sinks; what nobody may see is NaN.

    Args:
        rotary: rotated channels; None for all of them, 0 for a layer without rotation.
        start: first valid slot of each row.
        layouts: ids of the layouts of keys and values; None for those that the default device's kernels read.
        shift: added to every position (``origin = shift - start``).
    """
    capacity = past + 128 if capacity is None else capacity
    rotary = head_dim if rotary is None else rotary
    start = torch.zeros(batch, dtype=torch.int32) if start is None else torch.tensor(start, dtype=torch.int32)
    k_transform = k_inverse = None
    if transform:
        k_transform = torch.eye(head_dim) + torch.randn(heads, head_dim, head_dim) * (0.3 / head_dim**0.5)
        # One at a time: see `million_cache.codebook.invert`.
        k_inverse = torch.stack([torch.linalg.inv(x.double()) for x in k_transform]).float()
    device = torch.get_default_device()
    chosen = tuple(x.id for x in layouts_for(device, head_dim, k_dim, v_dim, dtype))
    layouts = chosen if layouts is None else layouts
    if device.type == "cuda" and layouts not in (chosen, (1, 1)):
        pytest.skip("there is no CUDA kernel for these layouts, dtype and shapes")
    buffers = {}
    for side, d, layout in zip("kv", (k_dim, v_dim), layouts):
        shape = layout_by_id(layout).packed_shape(batch, heads, capacity, head_dim // d)
        buffers[f"{side}_codes"] = torch.randint(0, 256, shape, dtype=torch.uint8)
    slots = torch.arange(past)
    for name, length in (("ring", recent), ("sinks", sinks)):
        for side in "kv":
            x = torch.full((batch, heads, length, head_dim), NAN)
            for b in range(batch):
                held = slots[-length:] % length if name == "ring" and length else slots[slots >= start[b]] - start[b]
                x[b, :, held[held < length]] = torch.randn(heads, int((held < length).sum()), head_dim)
            buffers[f"{side}_{name}"] = x.to(dtype)
    return LayerState(
        codebooks={
            "k_codebook": torch.randn(heads, 256, head_dim // k_dim, k_dim).half(),
            "v_codebook": torch.randn(heads, 256, head_dim // v_dim, v_dim).half(),
            "k_transform": k_transform,
            "k_transform_inv": layout_by_id(layouts[0]).inverse(k_inverse) if transform else None,
            "inv_freq": 10000.0 ** (-torch.arange(0, rotary, 2) / rotary) if rotary else None,
        },
        buffers={name: buffers[name] for name in ("k_codes", "v_codes", "k_ring", "v_ring", "k_sinks", "v_sinks")},
        clock=torch.tensor([past, past, 0]),
        start=start,
        origin=shift - start,
        frame_tokens=frame_tokens,
        interleaved=interleaved,
        layouts=layouts,
        heads=heads,
        head_dim=head_dim,
        dtype=dtype,
    )  # fmt: skip
