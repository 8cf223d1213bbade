"""`torch.library.opcheck`: schema, fake, and what torch.compile needs of every op."""

import pytest
import torch

from tests.ops.layer_state import make_layer

ops = torch.ops.million_ops
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYERS = [
    {"past": 70},
    {"past": 70, "recent": 0, "sinks": 0, "rotary": 0, "transform": False, "k_dim": 2, "v_dim": 8},
    {"past": 70, "batch": 2, "start": [0, 9], "k_dim": 4, "v_dim": 4, "layouts": (0, 0)},
]
CASES = [(LAYERS[0], x) for x in DTYPES] + [(x, torch.bfloat16) for x in LAYERS[1:]]


def layer_of(options, dtype):
    layer = make_layer(**options, dtype=dtype)
    layer.buffers = {name: x.nan_to_num() for name, x in layer.buffers.items()}  # opcheck compares buffers
    return layer


@pytest.mark.parametrize("dtype", DTYPES)
def test_encode_and_decode(dtype):
    codebook = torch.randn(2, 256, 32, 2).half()
    torch.library.opcheck(ops.pq_encode.default, (torch.randn(1, 5, 2, 64).to(dtype).transpose(1, 2), codebook))
    codes = torch.randint(0, 256, (1, 2, 5, 32), dtype=torch.uint8)
    torch.library.opcheck(ops.pq_decode.default, (codes, codebook, dtype))


@pytest.mark.parametrize(("options", "dtype"), CASES)
def test_dequantize(options, dtype):
    layer = layer_of(options, dtype)
    books = layer.codebooks
    torch.library.opcheck(
        ops.pq_dequantize.default,
        (layer.buffers["k_codes"], books["k_codebook"], books["k_transform_inv"], books["inv_freq"], layer.origin, layer.layouts[0],
         dtype, layer.frame_tokens, False, 64),
    )  # fmt: skip


@pytest.mark.parametrize(("options", "dtype"), CASES)
def test_append(options, dtype):
    layer = layer_of(options, dtype)
    torch.library.opcheck(ops.pq_append_.default, layer.append_args(*layer.new_tokens(3)[1:]))


@pytest.mark.parametrize(("options", "dtype"), CASES)
@pytest.mark.parametrize("masked", [False, True])
def test_attention(options, dtype, masked):
    layer = layer_of(options, dtype)
    mask = torch.rand(layer.start.shape[0], 1, 3, 80) < 0.7 if masked else None
    args = layer.attention_args(*layer.new_tokens(3, 2), mask)
    torch.library.opcheck(ops.pq_attention.default, args)
    torch.library.opcheck(ops.pq_attention_lse.default, args)


def test_one_graph():
    """Append and attention compile into one graph with the eager result."""
    layer = layer_of(LAYERS[0], torch.float32)
    new = layer.new_tokens(3, 2)

    def step(layer, q, k, v):
        out = ops.pq_attention(*layer.attention_args(q, k, v))
        ops.pq_append_(*layer.append_args(k, v))
        return out + 1

    compiled = layer.clone()
    out = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled, *new)
    assert torch.equal(out, step(layer, *new))
    assert all(torch.equal(x, compiled.buffers[name]) for name, x in layer.buffers.items())
