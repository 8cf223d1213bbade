"""What a layer does besides attention of one token alone, on a GPU: a decode step's whole layer, and a long second turn.

The layer: norms, projections, MLP with random weights, and between them attention and append. Ratio and time are of attention and
append, what they add to the layer: between two attentions hundreds of megabytes of weights pass through the L2 cache, so that
neither caches nor codebooks nor the kernel's own instructions are there, and the kernel before does not let the next start early.
That is what a model's step sees; `bench_pq_attention` times the kernel alone. Baselines: SDPA by cuDNN and by FlashAttention after
`index_copy_` of the key and the value, in the same layer.

For many new tokens over a full cache FlashAttention in fp16, and the op itself, which reads the codes once for every few queries.
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

MLP = {"SmolLM2": 1536, "Llama-3-8B": 14336, "Llama-2-7B": 11008, "Qwen-like": 18944, "Gemma-3-12B": 15360}  # channels
STEPS = [(shape, tokens) for shape in SHAPES for tokens in (1024, 2048, 8192, 32768)]


def weights(hidden: int, heads: int, kv_heads: int, head_dim: int, mlp: int, dtype) -> dict[str, torch.Tensor]:
    """Of a decoder layer, on the default device; a product keeps the size of its input."""
    shapes = {
        "q": (heads * head_dim, hidden), "k": (kv_heads * head_dim, hidden), "v": (kv_heads * head_dim, hidden),
        "o": (hidden, heads * head_dim), "gate": (mlp, hidden), "up": (mlp, hidden), "down": (hidden, mlp),
    }  # fmt: skip
    return {name: torch.randn(shape, dtype=dtype) / shape[1] ** 0.5 for name, shape in shapes.items()}


def decoder_layer(w, heads, attend, x):
    """A decoder layer of one token a row, x [B, hidden], around ``attend(q, k, v)``, all [B, heads, 1, D]; rotation is left out."""
    B, hidden = x.shape
    y = F.rms_norm(x, (hidden,))
    q, k, v = (F.linear(y, w[name]).view(B, n, 1, -1) for name, n in zip("qkv", heads))
    x = x + F.linear(attend(q, k, v).reshape(B, -1), w["o"])
    y = F.rms_norm(x, (hidden,))
    return x + F.linear(F.silu(F.linear(y, w["gate"])) * F.linear(y, w["up"]), w["down"])


@pytest.mark.parametrize(("shape", "tokens"), STEPS)
def bench_pq_step(compare, device, shape, tokens):
    """Attention and append of one token within a decoder layer, against SDPA and `index_copy_` of the key and the value."""
    if device == "cpu":
        pytest.skip("the parts are measured")
    B, H, G, D = SHAPES[shape]
    pq, dtype = PRESETS["4bit"], torch.bfloat16
    size = B * H * tokens * D  # bytes of codes
    heads, mlp = (H * G, H, H), next(x for name, x in MLP.items() if shape.startswith(name))
    torch.manual_seed(0)
    with torch.device(device):
        first = weights(H * G * D, H * G, H, D, mlp, dtype)
        models = [first] + [
            {name: x.clone() for name, x in first.items()}
            for _ in range(1, copies(device, sum(x.nbytes for x in first.values())))
        ]
        layers = [
            make_layer(
                batch=B, heads=H, head_dim=D, k_dim=pq.k_subspace_dim, v_dim=pq.v_subspace_dim, past=tokens - 1, capacity=tokens,
                recent=pq.recent_tokens, sinks=pq.sink_tokens, frame_tokens=pq.frame_tokens, dtype=dtype,
            )
            for _ in range(copies(device, size))
        ]  # fmt: skip
        dense = [[torch.randn(B, H, tokens, D, dtype=dtype) for _ in range(2)] for _ in range(copies(device, 4 * size))]
        position, x = torch.tensor([tokens - 1]), torch.randn(B, H * G * D, dtype=dtype)

    def step(layer, q, k, v):
        out = torch.ops.million_ops.pq_attention(*layer.attention_args(q, k, v))
        torch.ops.million_ops.pq_append_(*layer.append_args(k, v, after=out))
        return out

    def dense_step(kernel, cache, q, k, v):
        for buffer, new in zip(cache, (k, v)):
            buffer.index_copy_(2, position, new)
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(q, *cache, enable_gqa=True)

    def within(steps):
        count = max(len(models), len(steps))
        return [partial(decoder_layer, models[i % len(models)], heads, steps[i % len(steps)], x) for i in range(count)]

    kernels = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention": SDPBackend.FLASH_ATTENTION}
    compare(
        within([partial(step, layer) for layer in layers]),
        {name: within([partial(dense_step, kernel, cache) for cache in dense]) for name, kernel in kernels.items()},
        besides=within([lambda q, k, v: q]),
        case="4bit, with the append, in a layer", shape=shape, tokens=tokens, dtype="bfloat16",
    )  # fmt: skip


@pytest.mark.parametrize("baseline", ["FlashAttention", "pq_attention"])
@pytest.mark.parametrize("n", [128, 512, 2048])
@pytest.mark.parametrize("tokens", [8192, 32768])
def bench_long_chunk(compare, device, tokens, n, baseline):
    """A second turn: many new tokens over a full cache, Llama-3-8B's shape, without their append.

    Against FlashAttention fp16, and against the op, which `long_chunk.LEAST_PAIRS` chooses between. FlashAttention reads keys and
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
