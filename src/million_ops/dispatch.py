"""Which layouts the kernels of a device read: a new cache asks once and keeps the ids."""

from __future__ import annotations

import os

import torch

from million_ops._loader import has_kernels
from million_ops.layout import LAYOUTS, Layout, mma_table_pages


def mma_scratch(head_dim: int) -> int:
    """Bytes of shared memory that the tensor core kernel needs beside its pages: ``scratch_bytes`` in csrc/cuda/kernels.h."""
    return (56 if head_dim > 128 else 34) << 10


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block can have on a GPU; fewer if ``MILLION_GPU_SHARED`` (KiB) says so, to run on a large GPU
    what smaller ones get: the compiled kernels read the same variable."""
    limit = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    given = os.environ.get("MILLION_GPU_SHARED")
    return min(limit, int(given) << 10) if given else limit


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
    if (
        device.type == "cuda"
        and dtype != torch.float32
        and pages
        and has_kernels("cuda")
        and (pages << 16) + mma_scratch(head_dim) <= shared_memory(device)
    ):
        return LAYOUTS[2], LAYOUTS[3]
    return LAYOUTS[1], LAYOUTS[1]
