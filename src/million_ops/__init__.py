"""PQ encode and PQ attention as ``torch.library`` custom ops. Importing touches no GPU and no transformers."""

from million_ops import _loader, _schema  # noqa: F401  defines the ops, then loads what implements them
from million_ops._loader import backends, has_kernels
from million_ops.dispatch import layouts_for
from million_ops.layout import LAYOUTS, Layout, layout_by_id, pack, unpack
from million_ops.ops import pq_append_, pq_attention, pq_attention_lse, pq_decode, pq_dequantize, pq_encode

__all__ = [
    "LAYOUTS",
    "Layout",
    "backends",
    "has_kernels",
    "layout_by_id",
    "layouts_for",
    "pack",
    "pq_append_",
    "pq_attention",
    "pq_attention_lse",
    "pq_decode",
    "pq_dequantize",
    "pq_encode",
    "unpack",
]
