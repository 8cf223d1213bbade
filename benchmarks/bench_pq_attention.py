"""Decode attention of one token. Baseline: the fastest of PyTorch's ways to SDPA with grouped heads, over a dense cache of the
same dtype. On the CPU those are ``enable_gqa`` and transformers' ``pack_gqa``, which treats the group as query tokens; on a GPU
cuDNN and FlashAttention, in CUDA graphs like our own call. Key transform, frames, 128 recent tokens and 4 sinks are on.

On a GPU every side reads several caches in turn, so that none is in the L2 cache (`timing.copies`), as in a model's step."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import copies, fastest
from million_cache.config import PRESETS
from million_ops import reference
from tests.ops.layer_state import make_layer

SHAPES = {  # batch, KV heads, group, head_dim
    "SmolLM2-135M: 1 x 3 x 3 x 64": (1, 3, 3, 64),
    "Llama-3-8B: 1 x 8 x 4 x 128": (1, 8, 4, 128),
    "Llama-3-8B: 8 x 8 x 4 x 128": (8, 8, 4, 128),
    "Llama-2-7B: 8 x 32 x 1 x 128": (8, 32, 1, 128),
    "Qwen-like: 8 x 4 x 8 x 128": (8, 4, 8, 128),
    "Qwen3-235B: 8 x 4 x 16 x 128": (8, 4, 16, 128),
    "Gemma-3-12B: 1 x 8 x 2 x 256": (1, 8, 2, 256),
    "Gemma-3-12B: 8 x 8 x 2 x 256": (8, 8, 2, 256),
}
CONFIGS = {
    "4bit": PRESETS["4bit"],
    "4bit, frames of 256": replace(PRESETS["4bit"], frame_tokens=256),
    "2bit": PRESETS["2bit"],
    "2bit, frames of 2048": replace(PRESETS["2bit"], frame_tokens=2048),
    "1bit": PRESETS["1bit"],
}
TOKENS = {"cpu": (1024, 8192, 32768), "cuda": (2048, 8192, 32768, 131072, 1 << 20)}
LONGEST_BATCH = 32768
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float16",)}
REFCHECK_ELEMENTS = 8192 * 8 * 128  # the reference holds several copies of the cache in fp32

_baselines: dict = {}


def sdpa(device, shape, tokens, dtype) -> dict[str, float]:
    """Seconds of each way; measured once a session for all configurations."""
    key = device, shape, tokens, dtype
    if key not in _baselines:
        B, H, G, D = SHAPES[shape]
        q = torch.randn(B, H * G, 1, D, device=device).to(dtype)
        count = copies(device, 2 * B * H * tokens * D * dtype.itemsize)
        caches = [[torch.randn(B, H, tokens, D, device=device, dtype=dtype) for _ in range(2)] for _ in range(count)]
        packed = q.view(B, H, G, D)
        ways = {
            "SDPA enable_gqa": lambda k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
            "SDPA pack_gqa": lambda k, v: F.scaled_dot_product_attention(packed, k, v),
        }
        kernels = dict.fromkeys(ways)
        if device == "cuda":
            kernels = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention": SDPBackend.FLASH_ATTENTION}
            ways = dict.fromkeys(kernels, ways["SDPA enable_gqa"])
        _baselines[key] = {}
        for name, way in ways.items():
            calls = [partial(way, *cache) for cache in caches]
            with sdpa_kernel(kernels[name]) if kernels[name] else nullcontext():
                _baselines[key][name] = fastest(calls, device, 0.3 if device == "cpu" else 0.1)
    return _baselines[key]


def attention_calls(device, shape, pq, tokens, dtype, capacity=None, most=None) -> list:
    """Calls of the op over different caches that have ``tokens`` tokens with the new one; at most ``most`` of them."""
    B, H, G, D = shape
    count = copies(device, B * H * tokens * (D // pq.k_subspace_dim + D // pq.v_subspace_dim))
    with torch.device(device):  # which decides the layouts
        layers = [
            make_layer(
                batch=B, heads=H, head_dim=D, k_dim=pq.k_subspace_dim, v_dim=pq.v_subspace_dim, past=tokens - 1,
                capacity=capacity or tokens, recent=pq.recent_tokens, sinks=pq.sink_tokens, frame_tokens=pq.frame_tokens, dtype=dtype,
            )
            for _ in range(min(count, most or count))
        ]  # fmt: skip
        return [
            partial(torch.ops.million_ops.pq_attention, *layer.attention_args(*layer.new_tokens(1, G)))
            for layer in layers
        ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", sorted({x for lengths in TOKENS.values() for x in lengths}))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("config", CONFIGS)
def bench_pq_attention(compare, refcheck, device, shape, tokens, dtype, config):
    B, H, _, D = SHAPES[shape]
    if tokens not in TOKENS[device] or dtype not in DTYPES[device]:
        pytest.skip("not measured on this device")
    if B > 1 and (device == "cpu" or tokens > LONGEST_BATCH):
        pytest.skip("takes too long or too much memory")
    if "frames" in config and (device == "cpu" or (tokens, B) not in ((32768, 8), (1 << 20, 1))):
        pytest.skip("frames are compared at two lengths")
    pq, dtype = CONFIGS[config], getattr(torch, dtype)
    torch.manual_seed(0)
    calls = attention_calls(device, SHAPES[shape], pq, tokens, dtype)
    if refcheck and tokens * B * H * D <= REFCHECK_ELEMENTS:
        close = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(calls[0](), reference.pq_attention(*calls[0].args), **close)
    baselines = sdpa(device, shape, tokens, dtype)
    compare(calls, baselines, case=config, shape=shape, tokens=tokens, dtype=str(dtype).removeprefix("torch."))


def bench_large_cache(compare, device):
    """2048 tokens in a cache for 131072, against a cache that they fill: the number of splits comes from the capacity, the length is
    known on the device alone."""
    name, tokens, capacity = "Llama-3-8B: 1 x 8 x 4 x 128", 2048, 131072
    dtype = torch.float16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    full, large = (
        attention_calls(device, SHAPES[name], PRESETS["4bit"], tokens, dtype, slots, most=64)
        for slots in (tokens, capacity)
    )
    compare(
        large, {"a full cache": full}, case="4bit", shape=name, tokens=tokens, dtype=str(dtype).removeprefix("torch."),
        capacity=capacity,
    )  # fmt: skip
