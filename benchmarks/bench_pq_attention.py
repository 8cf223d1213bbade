"""Decode attention of one token. Baseline: the fastest of PyTorch's ways to SDPA with grouped heads, over a dense cache of the
same dtype. On the CPU those are ``enable_gqa`` and transformers' ``pack_gqa``, which treats the group as query tokens; on a GPU
cuDNN and FlashAttention."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import fastest
from million_cache.config import PRESETS
from million_ops import reference
from tests.ops.layer_state import make_layer

SHAPES = {  # KV heads, group, head_dim
    "SmolLM2-135M: 3 x 3 x 64": (3, 3, 64),
    "Llama-3-8B: 8 x 4 x 128": (8, 4, 128),
}
TOKENS = (1024, 8192, 32768, 131072)
LONGEST_ON_CPU = 32768
REFCHECK_ELEMENTS = 8192 * 8 * 128  # the reference holds several copies of the cache in fp32

_baselines: dict = {}


def sdpa(device, shape, tokens, dtype) -> dict[str, float]:
    """Seconds of each way, measured once a session for all presets."""
    key = device, shape, tokens, dtype
    if key not in _baselines:
        H, G, D = SHAPES[shape]
        q = torch.randn(1, H * G, 1, D, device=device).to(dtype)
        k, v = (torch.randn(1, H, tokens, D, device=device).to(dtype) for _ in range(2))
        packed = q.view(1, H, G, D)
        ways = {
            "SDPA enable_gqa": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
            "SDPA pack_gqa": lambda: F.scaled_dot_product_attention(packed, k, v),
        }
        kernels = dict.fromkeys(ways)
        if device == "cuda":
            kernels = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention": SDPBackend.FLASH_ATTENTION}
            ways = dict.fromkeys(kernels, ways["SDPA enable_gqa"])
        _baselines[key] = {}
        for name, way in ways.items():
            with sdpa_kernel(kernels[name]) if kernels[name] else nullcontext():
                _baselines[key][name] = fastest(way, device, 0.3)
    return _baselines[key]


@pytest.mark.parametrize("preset", ["4bit", "2bit", "1bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES)
def bench_pq_attention(compare, refcheck, device, shape, tokens, dtype, preset):
    if device == "cuda" and dtype is torch.float32:
        pytest.skip("PyTorch's fast attention kernels are for 16 bit")
    if device == "cpu" and tokens > LONGEST_ON_CPU:
        pytest.skip("takes minutes on a CPU")
    H, G, D = SHAPES[shape]
    config = PRESETS[preset]
    torch.manual_seed(0)
    layer = make_layer(
        heads=H, head_dim=D, k_dim=config.k_subspace_dim, v_dim=config.v_subspace_dim, past=tokens - 1, capacity=tokens,
        recent=config.recent_tokens, sinks=config.sink_tokens, frame_tokens=config.frame_tokens, dtype=dtype,
    )  # fmt: skip
    args = layer.attention_args(*layer.new_tokens(1, G))
    args = tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in args)
    if refcheck and tokens * H * D <= REFCHECK_ELEMENTS:
        close = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(torch.ops.million_ops.pq_attention(*args), reference.pq_attention(*args), **close)
    compare(
        lambda: torch.ops.million_ops.pq_attention(*args), sdpa(device, shape, tokens, dtype),
        case=preset, shape=shape, tokens=tokens, dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
