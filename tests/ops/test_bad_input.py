"""Every wrong argument: an exception that names it, from the compiled op, the reference and the fake alike."""

import pytest
import torch

from million_ops import has_kernels, layout_by_id, pack, reference, unpack
from tests.ops.layer_state import make_layer

ops = torch.ops.million_ops
ERRORS = (ValueError, RuntimeError)
NAMES = [
    "k", "v", "k_codebook", "v_codebook", "k_transform", "inv_freq", "k_codes", "v_codes", "k_ring", "v_ring", "k_sinks",
    "v_sinks", "clock", "start", "origin", "offset", "frame_tokens", "rope_interleaved", "k_layout", "v_layout",
]  # fmt: skip
LAYER_ERRORS = {
    "k rank": ("k", lambda x: x[0], "k must be .*got"),
    "k dtype": ("k", lambda x: x.double(), "k must be .*float64"),
    "no token": ("k v", lambda x: x[:, :, :0], "no token"),
    "v shape": ("v", lambda x: x[:, :, :1], "v must be"),
    "v dtype": ("v", lambda x: x.half(), "v must be .*float32"),
    "k_codebook rank": ("k_codebook", lambda x: x[0], "k_codebook must be"),
    "k_codebook heads": ("k_codebook", lambda x: x[:1], "k_codebook must be"),
    "k_codebook centroids": ("k_codebook", lambda x: x[:, :128], "k_codebook must be"),
    "k_codebook dtype": ("k_codebook", lambda x: x.float(), "k_codebook must be .*float16"),
    "k_codebook head_dim": ("k_codebook", lambda x: x[:, :, :16], "k_codebook covers 16 x 2 = 32 channels"),
    "v_codebook subspace": ("v_codebook", lambda x: x.reshape(2, 256, 4, 16), "v_codebook: 16 channels"),
    "transform shape": ("k_transform", lambda x: x[:, :8], "k_transform(_inv)? must be"),
    "transform dtype": ("k_transform", lambda x: x.double(), "k_transform(_inv)? must be .*float32"),
    "inv_freq long": ("inv_freq", lambda x: torch.ones(33), "inv_freq must be"),
    "inv_freq empty": ("inv_freq", lambda x: x[:0], "inv_freq must be"),
    "inv_freq dtype": ("inv_freq", lambda x: x.double(), "inv_freq must be"),
    "k_codes shape": ("k_codes", lambda x: x[..., :-1].contiguous(), "k_codes must be packed as rows64"),
    "k_codes heads": ("k_codes", lambda x: x[:, :1].contiguous(), "k_codes must be"),
    "v_codes dtype": ("v_codes", lambda x: x.to(torch.int8), "v_codes must be .*uint8"),
    "v_codes strides": ("v_codes", lambda x: x.repeat(1, 1, 2, 1)[:, :, ::2], "v_codes must be contiguous"),
    "k_layout": ("k_layout", lambda x: 99, "unknown layout_id 99"),
    "v_layout": ("v_layout", lambda x: -1, "unknown layout_id -1"),
    "other layout": ("v_layout", lambda x: 0, "v_codes must be packed as plain"),
    "k_ring shape": ("k_ring", lambda x: x[..., :8].contiguous(), "k_ring must be"),
    "v_ring length": ("v_ring", lambda x: x[:, :, :8].contiguous(), "v_ring must be shaped like k_ring"),
    "k_ring dtype": ("k_ring", lambda x: x.half(), "k_ring must be"),
    "k_ring strides": ("k_ring", lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), "k_ring must be contiguous"),
    "k_sinks shape": ("k_sinks", lambda x: x[:, :1].contiguous(), "k_sinks must be"),
    "v_sinks length": ("v_sinks", lambda x: x[:, :, :1].contiguous(), "v_sinks must be shaped like k_sinks"),
    "clock shape": ("clock", lambda x: x[:2], "clock must be"),
    "clock dtype": ("clock", lambda x: x.int(), "clock must be .*int64"),
    "start shape": ("start", lambda x: x.repeat(3), "start must be"),
    "start dtype": ("start", lambda x: x.long(), "start must be .*int32"),
    "origin dtype": ("origin", lambda x: x.float(), "origin must be .*int32"),
    "offset": ("offset", lambda x: -1, "offset must not be negative"),
    "frame_tokens": ("frame_tokens", lambda x: -1, "frame_tokens must not be negative"),
    "device": ("k_ring", lambda x: x.to("meta"), "k_ring is|device|meta"),
}  # fmt: skip
ATTENTION_ERRORS = {
    "q shape": (0, lambda x: x[:, :, :1], "q must be"),
    "q head_dim": (0, lambda x: x[..., :32], "q must be"),
    "q dtype": (0, lambda x: x.half(), "q must be"),
    "q heads": (0, lambda x: x[:, :3], "q has 3 heads, which is not a multiple of the 2 KV heads"),
    "no q head": (0, lambda x: x[:, :0], "q has 0 heads"),
    "mask shape": (16, lambda x: x[:, :, :1], "mask must be"),
    "mask dtype": (16, lambda x: x.float(), "mask must be .*bool"),
}
APPENDS = [ops.pq_append_, reference.pq_append_]
ATTENTIONS = [ops.pq_attention, ops.pq_attention_lse, reference.pq_attention]


def broken(args, names, change, shift=0):
    args = list(args)
    for name in names.split():
        index = NAMES.index(name)
        index += shift + (2 if shift and index >= NAMES.index("offset") else 0)  # attention: q first, mask and scale
        args[index] = change(args[index])
    return args


@pytest.mark.parametrize("case", LAYER_ERRORS)
def test_layer_arguments(case):
    names, change, message = LAYER_ERRORS[case]
    layer = make_layer(past=70)
    q, k, v = layer.new_tokens(2, 2)
    untouched = layer.clone()
    for op in APPENDS:
        with pytest.raises(ERRORS, match=message):
            op(*broken(layer.append_args(k, v), names, change))
    for op in ATTENTIONS:
        with pytest.raises(ERRORS, match=message):
            op(*broken(layer.attention_args(q, k, v), names, change, 1))
    for name, x in layer.buffers.items():
        assert torch.equal(x.nan_to_num(7), untouched.buffers[name].nan_to_num(7)), (
            f"{name} was written before the error"
        )


def test_dtype_of_the_inverse():
    """fp16 where keys are packed for tensor cores, else fp32; nothing is converted silently."""
    for layouts, dtype, message in (
        ((1, 1), torch.float16, "k_transform_inv must be torch.float32, got torch.float16"),
        ((2, 3), torch.float32, "k_transform_inv of codes packed as mma_k must be torch.float16, got torch.float32"),
    ):
        layer = make_layer(past=70, head_dim=128, layouts=layouts, dtype=torch.float16)
        layer.codebooks["k_transform_inv"] = layer.codebooks["k_transform_inv"].to(dtype)
        for op in ATTENTIONS:
            with pytest.raises(ERRORS, match=message):
                op(*layer.attention_args(*layer.new_tokens(1)))


@pytest.mark.parametrize("case", ATTENTION_ERRORS)
def test_attention_arguments(case):
    index, change, message = ATTENTION_ERRORS[case]
    layer = make_layer(past=70)
    args = list(layer.attention_args(*layer.new_tokens(2, 2), mask=torch.ones(1, 1, 2, 72, dtype=torch.bool)))
    args[index] = change(args[index])
    for op in ATTENTIONS:
        with pytest.raises(ERRORS, match=message):
            op(*args)


@pytest.mark.parametrize(("op", "change", "message"), [
    ("pq_encode", lambda x, codes, book: (x[0], book), "x must be"),
    ("pq_encode", lambda x, codes, book: (x.double(), book), "x must be .*float64"),
    ("pq_encode", lambda x, codes, book: (x[..., :32], book), "codebook covers 32 x 2 = 64 channels, but head_dim is 32"),
    ("pq_encode", lambda x, codes, book: (x, book.float()), "codebook must be .*float16"),
    ("pq_encode", lambda x, codes, book: (x, book[:1]), "codebook must be"),
    ("pq_decode", lambda x, codes, book: (codes[0], book, torch.float32), "codes must be"),
    ("pq_decode", lambda x, codes, book: (codes.int(), book, torch.float32), "codes must be .*uint8"),
    ("pq_decode", lambda x, codes, book: (codes[..., :16], book, torch.float32), "codes have 16 subspaces, the codebook 32"),
    ("pq_decode", lambda x, codes, book: (codes, book[:, :9], torch.float32), "codebook must be"),
    ("pq_decode", lambda x, codes, book: (codes, book, torch.float64), "dtype must be"),
])  # fmt: skip
def test_encode_and_decode_arguments(op, change, message):
    x, codes = torch.randn(1, 2, 3, 64), torch.zeros(1, 2, 3, 32, dtype=torch.uint8)
    args = change(x, codes, torch.randn(2, 256, 32, 2).half())
    for function in (getattr(ops, op), getattr(reference, op)):
        with pytest.raises(ERRORS, match=message):
            function(*args)


@pytest.mark.parametrize(("change", "message"), [
    ({"codes": lambda x: x[0]}, "codes must be"),
    ({"codes": lambda x: x.int()}, "codes must be .*uint8"),
    ({"codes": lambda x: x[..., :16]}, "codes must be packed as rows64"),
    ({"layout": lambda x: 7}, "unknown layout_id 7"),
    ({"layout": lambda x: 0}, "codes must be packed as plain"),
    (
        {
            "layout": lambda x: 2, "codes": lambda x: x[..., : 64 * 4], "codebook": lambda x: torch.randn(2, 256, 4, 8).half(),
            "transform_inv": lambda x: None, "inv_freq": lambda x: None,
        },
        "codes cannot be packed as mma_k: 4 subspaces are not a multiple of 8",
    ),
    ({"codebook": lambda x: x.float()}, "codebook must be .*float16"),
    ({"codebook": lambda x: x[:1]}, "codebook must be"),
    ({"transform_inv": lambda x: x[:, :32]}, "transform_inv must be"),
    ({"transform_inv": lambda x: x.bfloat16()}, "transform_inv must be .*float16"),
    ({"inv_freq": lambda x: torch.zeros(33)}, "inv_freq must be"),
    ({"inv_freq": lambda x: x.half()}, "inv_freq must be .*float32"),
    ({"origin": lambda x: x[:0]}, "origin must be"),
    ({"origin": lambda x: x.long()}, "origin must be .*int32"),
    ({"dtype": lambda x: torch.float64}, "dtype must be"),
    ({"frame_tokens": lambda x: -1}, "frame_tokens must not be negative"),
    ({"first_slot": lambda x: -64}, "first_slot must not be negative"),
])  # fmt: skip
def test_dequantize_arguments(change, message):
    args = {
        "codes": torch.zeros(1, 2, 3, 64 * 32, dtype=torch.uint8), "codebook": torch.randn(2, 256, 32, 2).half(),
        "transform_inv": torch.randn(2, 64, 64), "inv_freq": torch.ones(32), "origin": torch.zeros(1, dtype=torch.int32), "layout": 1,
        "dtype": torch.float16, "frame_tokens": 64, "rope_interleaved": False, "first_slot": 0,
    }  # fmt: skip
    ops.pq_dequantize(*args.values())
    for name, how in change.items():
        args[name] = how(args[name])
    for function in (ops.pq_dequantize, reference.pq_dequantize):
        with pytest.raises(ERRORS, match=message):
            function(*args.values())


def test_layout_arguments():
    codes, layout = torch.zeros(1, 2, 10, 4, dtype=torch.uint8), layout_by_id(1)
    for call, message in (
        (lambda: layout_by_id(4), "unknown layout_id 4"),
        (lambda: pack(codes, layout_by_id(2)), "mma_k packs multiples of 8 subspaces, got 4"),
        (lambda: pack(codes[0], layout), "codes must be uint8"),
        (lambda: pack(codes.int(), layout), "codes must be uint8"),
        (lambda: pack(codes, layout, 9), "do not fit a capacity of 9"),
        (lambda: unpack(codes, layout, 4), "needs .*256"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.skipif(not has_kernels("cpu"), reason="needs the compiled CPU kernels")
def test_what_cannot_be_allocated():
    """PyTorch's stable ABI throws without a reason; ours says that memory is what is missing."""
    codes = torch.zeros(1, 1, 1, 4, dtype=torch.uint8).expand(1, 1, 1 << 44, 4)
    with pytest.raises(RuntimeError, match="out of memory: the result"):
        ops.pq_decode(codes, torch.zeros(1, 256, 4, 2, dtype=torch.float16), torch.float32)
