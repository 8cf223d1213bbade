"""Which layouts the kernels of a device read: a new cache asks once and keeps the ids."""

from __future__ import annotations

import torch

from million_ops._loader import has_kernels
from million_ops.layout import LAYOUTS, Layout, mma_table_pages

# Shared memory that the tensor core kernel needs beside its pages: kScratch in csrc/cuda/kernels.h, 34 KiB, and the few bytes
# by which the second copy of a table is moved.
MMA_SCRATCH = 35 << 10


def layouts_for(
    device: torch.device | str, head_dim: int, k_subspace_dim: int, v_subspace_dim: int, dtype: torch.dtype
) -> tuple[Layout, Layout]:
    """The layouts of keys and values that the kernels of ``device`` read.

    The tensor core kernel's, for 16-bit models where its tables fit the GPU's shared memory; else the one that every kernel
    reads. Both have tiles of 64 tokens.

    Args:
        device: where the cache will be.
        head_dim: channels of a head.
        k_subspace_dim: channels of a key that share a code (d_m).
        v_subspace_dim: the same for values.
        dtype: the model's.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        return LAYOUTS[0], LAYOUTS[0]
    pages = mma_table_pages(head_dim, k_subspace_dim, v_subspace_dim)
    if device.type == "cuda" and dtype != torch.float32 and pages and has_kernels("cuda"):
        shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
        if (pages << 16) + MMA_SCRATCH <= shared:
            return LAYOUTS[2], LAYOUTS[3]
    return LAYOUTS[1], LAYOUTS[1]
