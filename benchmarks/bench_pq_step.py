"""What a layer does besides attention of one token alone, on a GPU: the whole decode step, and a long second turn.

Baselines: for the step, SDPA by cuDNN and by FlashAttention after `index_copy_` of the key and the value, over several caches in turn
(`timing.copies`); for many new tokens over a full cache FlashAttention in fp16, and the op itself, which reads the codes once for
every few queries.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from benchmarks.bench_pq_attention import SHAPES
from benchmarks.timing import copies
from million_cache.config import PRESETS
from million_cache.long_chunk import attend_long
from tests.ops.layer_state import make_layer

STEPS = [(shape, tokens) for shape in SHAPES for tokens in (2048, 32768)]


@pytest.mark.parametrize(("shape", "tokens"), STEPS)
def bench_pq_step(compare, device, shape, tokens):
    """A layer's whole step, attention and append of one token, against SDPA and `index_copy_` of the key and the value."""
    if device == "cpu":
        pytest.skip("the parts are measured")
    B, H, G, D = SHAPES[shape]
    pq, dtype = PRESETS["4bit"], torch.float16
    size = B * H * tokens * D  # bytes of codes
    torch.manual_seed(0)
    with torch.device(device):
        layers = [
            make_layer(
                batch=B, heads=H, head_dim=D, k_dim=pq.k_subspace_dim, v_dim=pq.v_subspace_dim, past=tokens - 1, capacity=tokens,
                recent=pq.recent_tokens, sinks=pq.sink_tokens, frame_tokens=pq.frame_tokens, dtype=dtype,
            )
            for _ in range(copies(device, size))
        ]  # fmt: skip
        q, k, v = layers[0].new_tokens(1, G)
        dense = [[torch.randn(B, H, tokens, D, dtype=dtype) for _ in range(2)] for _ in range(copies(device, 4 * size))]
        position = torch.tensor([tokens - 1])

    def step(layer):
        out = torch.ops.million_ops.pq_attention(*layer.attention_args(q, k, v))
        torch.ops.million_ops.pq_append_(*layer.append_args(k, v, after=out))

    def dense_step(kernel, keys, values):
        keys.index_copy_(2, position, k), values.index_copy_(2, position, v)
        with sdpa_kernel(kernel):
            F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

    kernels = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention": SDPBackend.FLASH_ATTENTION}
    compare(
        [partial(step, layer) for layer in layers],
        {name: [partial(dense_step, kernel, *cache) for cache in dense] for name, kernel in kernels.items()},
        case="4bit, with the append", shape=shape, tokens=tokens, dtype="float16",
    )  # fmt: skip


@pytest.mark.parametrize("baseline", ["FlashAttention", "pq_attention"])
@pytest.mark.parametrize("n", [512, 2048])
@pytest.mark.parametrize("tokens", [8192, 32768])
def bench_long_chunk(compare, device, tokens, n, baseline):
    """A second turn: many new tokens over a full cache, Llama-3-8B's shape, without their append.

    Against FlashAttention fp16, and against the op, which `long_chunk.QUERIES` chooses between. FlashAttention reads keys and
    values that are repeated for the heads of a group: with this many queries arithmetic is what takes its time.
    """
    if device == "cpu":
        pytest.skip("a CPU takes the op")
    pq, dtype = PRESETS["4bit"], torch.float16
    B, H, G, D = SHAPES["Llama-3-8B: 1 x 8 x 4 x 128"]
    torch.manual_seed(0)
    with torch.device(device):
        state = make_layer(
            batch=B, heads=H, head_dim=D, k_dim=pq.k_subspace_dim, v_dim=pq.v_subspace_dim, past=tokens, capacity=tokens + n,
            recent=pq.recent_tokens, sinks=pq.sink_tokens, frame_tokens=pq.frame_tokens, dtype=dtype,
        )  # fmt: skip
        q, k, v = state.new_tokens(n, G)
        args = state.attention_args(q, k, v)
        keys, values = (torch.randn(B, H * G, tokens + n, D, dtype=dtype) for _ in range(2))
    bias = causal_lower_right(n, tokens + n)
    names = "k_codebook", "v_codebook", "k_transform_inv", "inv_freq"
    layer = SimpleNamespace(  # what `attend_long` reads of a `MillionLayer`
        clock=SimpleNamespace(on_host=lambda layer_idx: (tokens, 0, [0] * B), origin=state.origin),
        layer_idx=0,
        max_cache_len=tokens + n,
        state=SimpleNamespace(recent_tokens=pq.recent_tokens, sink_tokens=pq.sink_tokens),
        books=SimpleNamespace(
            **{x: state.codebooks[x] for x in names}, frame_tokens=pq.frame_tokens, rope_interleaved=False
        ),
        codes=[state.buffers["k_codes"], state.buffers["v_codes"]],
        ring=[state.buffers["k_ring"], state.buffers["v_ring"]],
        sinks=[state.buffers["k_sinks"], state.buffers["v_sinks"]],
        geometry={"k_layout": state.layouts[0], "v_layout": state.layouts[1]},
        dtype=dtype,
    )
    baselines = {
        "FlashAttention": lambda: F.scaled_dot_product_attention(q, keys, values, attn_mask=bias),
        "pq_attention": lambda: torch.ops.million_ops.pq_attention(*args),
    }
    compare(
        lambda: attend_long(layer, q, k, v, D**-0.5), {baseline: baselines[baseline]},
        case=f"4bit, {n} new tokens", shape="Llama-3-8B: 1 x 8 x 4 x 128", tokens=tokens, dtype="float16",
    )  # fmt: skip
