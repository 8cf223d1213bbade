"""Encoding, appending and decoding.

Baselines: `pq_encode` against `torch.cdist` and `argmin`, one batch of all subspaces; `pq_append_` of one token and of a prefill
against what a dense static cache does with it (``index_copy_`` of the keys and the values); `pq_decode` against copying as many bytes as it
writes.
"""

import pytest
import torch

from million_cache.config import PRESETS
from million_ops import reference
from tests.ops.layer_state import make_layer

SHAPES = {"SmolLM2-135M: 3 x 64": (3, 64), "Llama-3-8B: 8 x 128": (8, 128)}  # KV heads, head_dim
PRESET_NAMES = ["4bit", "2bit", "1bit"]
TOKENS = 2048  # a prefill

ops = torch.ops.million_ops
cases = pytest.mark.parametrize(("shape", "preset"), [(s, p) for s in SHAPES for p in PRESET_NAMES])


def vectors_and_codebook(device, shape, preset, tokens=TOKENS):
    torch.manual_seed(0)
    (H, D), d = SHAPES[shape], PRESETS[preset].k_subspace_dim
    return torch.randn(1, H, tokens, D, device=device), torch.randn(H, 256, D // d, d, device=device).half()


@cases
def bench_pq_encode(compare, refcheck, device, shape, preset):
    x, codebook = vectors_and_codebook(device, shape, preset)
    H, _, S, d = codebook.shape
    points = x.view(H, TOKENS, S, d).transpose(1, 2).reshape(H * S, TOKENS, d)
    centroids = codebook.float().transpose(1, 2).reshape(H * S, 256, d)
    if refcheck:
        assert (ops.pq_encode(x, codebook) != reference.pq_encode(x, codebook)).float().mean() < 1e-4
    compare(
        lambda: ops.pq_encode(x, codebook), {"cdist + argmin": lambda: torch.cdist(points, centroids).argmin(-1)},
        case=preset, shape=shape, op="pq_encode", dtype="float32",
    )  # fmt: skip


@cases
@pytest.mark.parametrize("tokens", [1, 32768])
def bench_pq_append(compare, device, shape, preset, tokens):
    if device == "cpu" and tokens > 1:
        pytest.skip("takes seconds on a CPU")
    torch.manual_seed(0)
    (H, D), config = SHAPES[shape], PRESETS[preset]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.device(device):
        layer = make_layer(
            heads=H, head_dim=D, k_dim=config.k_subspace_dim, v_dim=config.v_subspace_dim, past=1000, capacity=1024 + tokens,
            recent=config.recent_tokens, sinks=config.sink_tokens, frame_tokens=config.frame_tokens, dtype=dtype,
        )  # fmt: skip
        _, k, v = layer.new_tokens(tokens)
        args = layer.append_args(k, v)
        keys, values = (torch.zeros(1, H, 1024 + tokens, D, dtype=dtype) for _ in range(2))
        position = 1000 + torch.arange(tokens)
    compare(
        lambda: ops.pq_append_(*args),
        {"index_copy_ of k and v": lambda: (keys.index_copy_(2, position, k), values.index_copy_(2, position, v))},
        case=f"{preset}, {tokens} tokens", shape=shape, op="pq_append_", dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip


@cases
def bench_pq_decode(compare, refcheck, device, shape, preset):
    x, codebook = vectors_and_codebook(device, shape, preset)
    codes, copy = ops.pq_encode(x, codebook), torch.empty_like(x)
    if refcheck:
        assert torch.equal(ops.pq_decode(codes, codebook, x.dtype), reference.pq_decode(codes, codebook, x.dtype))
    compare(
        lambda: ops.pq_decode(codes, codebook, x.dtype), {"copy": lambda: copy.copy_(x)},
        case=preset, shape=shape, op="pq_decode", dtype="float32",
    )  # fmt: skip
