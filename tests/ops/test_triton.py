"""The Triton kernels, called directly: on the GPU where there is one, else in Triton's interpreter, in a process of its own.

The interpreter is chosen by an environment variable that triton reads when it is imported, so `test_in_the_interpreter`
runs this file again in a process that has it, and nothing of it reaches other tests. State is made on the CPU, where the
definition and the reference are computed too, and moved to the GPU for the kernels.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from million_ops import LAYOUTS, pack, reference, unpack
from tests.ops import oracle
from tests.ops.layer_state import NAN, make_layer
from tests.tolerances import assert_as_good_as

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
HAS_TRITON = importlib.util.find_spec("triton") is not None

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
runs_kernels = pytest.mark.skipif(
    not HAS_TRITON or not (ON_GPU or INTERPRETED), reason="needs triton and a GPU, or its interpreter"
)
only_gpu = pytest.mark.skipif(not HAS_TRITON or not ON_GPU, reason="needs triton and a GPU")


@pytest.fixture(autouse=True)
def device():
    """Instead of the fixture for all tests of the ops: the default device stays the CPU."""
    return DEVICE


@pytest.fixture
def kernels():
    """`million_ops.triton_kernels`, imported no earlier than needed, so that collecting this file imports no triton."""
    from million_ops import triton_kernels

    return triton_kernels


def moved(args):
    return tuple(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in args)


def attend(kernels, args):
    return tuple(x.cpu() for x in kernels.pq_attention_lse(*moved(args)))


def compare(kernels, args):
    """Output and LSE of the kernels are as near to the truth as the fp32 reference's."""
    out, lse = attend(kernels, args)
    (plain, plain_lse), (truth, true_lse) = reference.pq_attention_lse(*args), oracle.attention(*args)
    assert out.shape == plain.shape and out.dtype == plain.dtype and lse.shape == plain_lse.shape
    assert out.is_contiguous() and lse.dtype == torch.float32
    assert_as_good_as(out, plain, truth)
    assert_as_good_as(lse, plain_lse, true_lse)


def check(kernels, layer, n=1, group=1, mask=None, **kwargs):
    compare(kernels, layer.attention_args(*layer.new_tokens(n, group), mask, **kwargs))


# --- In a process of its own -------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.skipif(INTERPRETED or ON_GPU, reason="the kernels run in this process")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def compile_kernel(kernel, target, options, constants, **pointers):
    """Compiles a kernel to the target's machine code, as its first launch would; integers are 32 bits."""
    from triton.compiler import ASTSource

    signature = {
        p.name: "constexpr" if p.name in constants else pointers.get(p.name, "fp32" if p.name == "scale" else "i32")
        for p in kernel.params
    }
    return triton_compile(ASTSource(kernel, signature, constexprs=constants), target=target, options=options)


def triton_compile(*args, **kwargs):
    import triton

    return triton.compile(*args, **kwargs)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="decorated for the interpreter")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "d", "rows"),
    [("fp32", 256, 2, 16), ("fp32", 32, 2, 16), ("bf16", 64, 4, 64), ("bf16", 128, 2, 32), ("fp16", 40, 8, 16)],
)
def test_attention_compiles_without_a_gpu(kernels, dtype, head_dim, d, rows, arch):
    """The interpreter accepts programs that the compiler refuses; the compiler needs no GPU."""
    compiler = pytest.importorskip("triton.backends.compiler")
    floats = dict.fromkeys(["q", "k", "v", "k_ring", "v_ring", "k_sinks", "v_sinks"], f"*{dtype}")
    others = dict(
        k_book="*i32", v_book="*i32", transform_inv="*fp32", inv_freq="*fp32", k_codes="*u8", v_codes="*u8", clock="*i64",
        start="*i32", origin="*i32", mask="*u8", part_out="*fp32", part_top="*fp32", part_total="*fp32",
    )  # fmt: skip
    constants = dict(
        D=head_dim, ROWS=rows, TOKENS=32 if head_dim > 128 else 64, WORDS=max(16, head_dim // 2) if head_dim != 40 else 32,
        W_K=d // 2, W_V=1, K_LAYOUT=rows == 16, V_LAYOUT=1, ROTATE=head_dim != 40, INTERLEAVED=d == 4, TRANSFORM=head_dim != 40,
        MASK=d == 4, FULL=dtype == "fp32", q_stride_d=1, k_stride_d=1, v_stride_d=1,
    )  # fmt: skip
    if d == 8:  # what Triton makes constants of at the launch
        constants |= dict.fromkeys(("n", "group", "H", "T", "R", "N", "F", "tiles_per_frame", "half", "row_blocks"), 1)
    options = dict(num_warps=8 if rows == 64 or head_dim > 128 else 4, num_stages=1, enable_fp_fusion=True)
    target = compiler.GPUTarget("cuda", arch, 32)
    compiled = compile_kernel(kernels._attention_kernel, target, options, constants, **floats, **others)
    assert compiled.metadata.shared <= 64 << 10  # also of GPUs with little


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="decorated for the interpreter")
def test_the_other_kernels_compile_without_a_gpu(kernels):
    compiler = pytest.importorskip("triton.backends.compiler")
    target = compiler.GPUTarget("cuda", 80, 32)
    for constants in (dict(d=2, BLOCK_T=32, SUBSPACES=8), dict(d=8, BLOCK_T=4, SUBSPACES=1, T=1, S=1, H=1, groups=1)):
        pointers = dict(x="*bf16", codebook="*fp16", codes="*u8")
        options = dict(num_warps=4, enable_fp_fusion=False)
        compile_kernel(kernels._encode_kernel, target, options, constants, **pointers)
    for constants in (dict(SPLITS=128), dict(SPLITS=1, n=1, group=1, H=1, splits=1)):
        pointers = dict(part_out="*fp32", part_top="*fp32", part_total="*fp32", out="*bf16", lse="*fp32")
        options = dict(num_warps=4, enable_fp_fusion=True)
        constants |= dict(D=96, CHANNELS=128, BLOCK=16)
        compile_kernel(kernels._merge_kernel, target, options, constants, **pointers)


def python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="of the other process")
def test_registration():
    """``MILLION_GPU=triton`` takes the compiled CUDA kernels out; triton itself is imported by the first call."""
    code = (
        "import sys, torch, million_ops; found = million_ops.backends(); before = 'triton' in sys.modules;"
        "assert not before or torch.cuda.is_available();"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key;"
        "print(found['cuda'], '|', found['triton'], '|', has('million_ops::pq_attention_lse', 'CUDA'))"
    )
    cuda, triton, registered = python(code, MILLION_GPU="triton").split(" | ")
    assert cuda.startswith("missing: ")
    assert triton.startswith("available") and registered.strip() == "True"


@only_gpu
def test_the_ops_of_a_gpu_without_compiled_kernels():
    code = (
        "import sys, torch, million_ops; from million_ops import reference, triton_kernels\n"
        "called = []\n"
        "for name, f in list(triton_kernels.IMPLEMENTATIONS.items()):\n"
        "    triton_kernels.IMPLEMENTATIONS[name] = lambda *a, f=f, name=name: called.append(name) or f(*a)\n"
        "x, book = torch.randn(1, 2, 9, 64).cuda(), torch.randn(2, 256, 32, 2).half().cuda()\n"
        "assert torch.equal(million_ops.pq_encode(x, book), reference.pq_encode(x, book))\n"
        "from tests.ops.layer_state import make_layer\n"
        "layer = make_layer(past=100)\n"
        "args = layer.attention_args(*layer.new_tokens(3, 2))\n"
        "args = [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]\n"
        "out, lse = torch.ops.million_ops.pq_attention_lse(*args)\n"
        "torch.testing.assert_close(out, reference.pq_attention(*args), rtol=1e-4, atol=1e-5)\n"
        "assert torch.equal(torch.ops.million_ops.pq_attention(*args), out)\n"
        "print(called)"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = os.pathsep.join([root, *sys.path])
    called = python(code, MILLION_GPU="triton", PYTHONPATH=path)
    assert "pq_encode" in called and "pq_attention_lse" in called and "'pq_attention'" in called


# --- Encode ------------------------------------------------------------------------------------------------------------


def encode(kernels, x, codebook):
    return kernels.pq_encode(x.to(DEVICE), codebook.to(DEVICE)).cpu()


@runs_kernels
@pytest.mark.parametrize(("head_dim", "d", "tokens"), [(64, 2, 1), (24, 2, 70), (32, 4, 33), (64, 8, 3), (8, 8, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_those_of_the_reference(kernels, head_dim, d, tokens, dtype):
    codebook = torch.randn(2, 256, head_dim // d, d).half()
    x = torch.randn(2, tokens, 2, head_dim).to(dtype).transpose(1, 2)
    codes = encode(kernels, x, codebook)
    assert codes.dtype == torch.uint8 and codes.is_contiguous()
    assert torch.equal(codes, reference.pq_encode(x, codebook))


@runs_kernels
@pytest.mark.parametrize("d", [2, 8])
def test_lowest_index_wins_a_tie(kernels, d):
    codebook = torch.randn(1, 64, 32 // d, d).half().repeat(1, 4, 1, 1)
    x = torch.randn(1, 1, 40, 32)
    codes = encode(kernels, x, codebook)
    assert (codes < 64).all() and torch.equal(codes, reference.pq_encode(x, codebook))
    grid = torch.arange(256.0).half().view(1, 256, 1, 1).expand(1, 256, 32 // d, d)
    assert (encode(kernels, torch.full((1, 1, 3, 32), 77.5), grid) == 77).all()
    coarse = (torch.randn(2, 256, 32 // d, d) * 4).round().div(4).half()
    x = (torch.randn(1, 2, 40, 32) * 16).round() / 16
    assert torch.equal(encode(kernels, x, coarse), reference.pq_encode(x, coarse))


@runs_kernels
def test_encode_extremes(kernels):
    codebook = torch.randn(1, 256, 16, 2)
    codebook[0, 5], codebook[0, 6], codebook[0, 7] = 65504.0, 6e-8, -65504.0
    codebook = codebook.half()
    x = torch.cat([codebook[:, i].float().reshape(1, 1, 1, 32) for i in (5, 6, 7)], 2)
    assert (encode(kernels, x, codebook)[0, 0] == torch.tensor([5, 6, 7])[:, None]).all()
    for value in (NAN, float("inf")):
        assert (encode(kernels, torch.full((1, 1, 2, 32), value), codebook) == 0).all()
    far = torch.randn(1, 1, 20, 32) + 3000
    shifted = (torch.randn(1, 256, 16, 2) + 3000).half()
    assert torch.equal(encode(kernels, far, shifted), reference.pq_encode(far, shifted))
    assert encode(kernels, torch.randn(1, 1, 0, 32), codebook).shape == (1, 1, 0, 16)


# --- Attention ---------------------------------------------------------------------------------------------------------


@runs_kernels
@pytest.mark.parametrize("past", [0, 1, 17, 63, 64, 65, 129])
@pytest.mark.parametrize("n", [1, 3])
def test_lengths(kernels, past, n):
    check(kernels, make_layer(past=past, batch=2, heads=1, head_dim=32, start=[0, 2]), n, group=2)


@runs_kernels
@pytest.mark.parametrize(("head_dim", "d"), [(8, 8), (8, 2), (40, 4), (96, 8), (128, 2), (256, 4), (248, 2)])
def test_head_dims(kernels, head_dim, d):
    check(kernels, make_layer(past=70, heads=1, head_dim=head_dim, k_dim=d, v_dim=d), 2, group=2)


def repacked(args, k_layout, v_layout, capacity):
    """The arguments with codes of ``capacity`` slots in other layouts; `make_layer` on the CPU packs as rows64."""
    args = list(args)
    for at, codebook, layout in ((7, args[3], k_layout), (8, args[4], v_layout)):
        plain = unpack(args[at], LAYOUTS[1], codebook.shape[2])[:, :, :capacity]
        args[at] = pack(plain, LAYOUTS[layout])
    return [*args[:-2], k_layout, v_layout]


@runs_kernels
@pytest.mark.parametrize(("k_dim", "v_dim"), [(2, 4), (2, 8), (4, 2), (8, 2), (8, 4)])
def test_subspaces(kernels, k_dim, v_dim):
    layer = make_layer(past=70, heads=2, head_dim=32, k_dim=k_dim, v_dim=v_dim)
    compare(kernels, repacked(layer.attention_args(*layer.new_tokens(1, 2)), 0, 0, 75))


@runs_kernels
@pytest.mark.parametrize("layouts", [(0, 1), (1, 0)])
def test_different_layouts_of_keys_and_values(kernels, layouts):
    """A plain buffer of 147 slots beside one of whole tiles: slots behind the shorter one hold nothing."""
    layer = make_layer(past=145, heads=1, head_dim=32)
    compare(kernels, repacked(layer.attention_args(*layer.new_tokens(9, 2)), *layouts, 147))


@runs_kernels
@pytest.mark.parametrize(("n", "group"), [(1, 1), (1, 7), (1, 17), (5, 3), (20, 5), (70, 1)])
def test_rows(kernels, n, group):
    """Up to two blocks of query rows, and chunks beyond the ring."""
    check(kernels, make_layer(past=90, heads=2 if n < 20 else 1, head_dim=32), n, group)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 20])
def test_dtypes(kernels, dtype, n):
    check(kernels, make_layer(past=150, dtype=dtype), n, group=3)


@runs_kernels
@pytest.mark.parametrize(("frame_tokens", "past"), [(0, 140), (1, 30), (48, 140), (64, 140), (100, 140), (1000, 140)])
@pytest.mark.parametrize(("rotary", "interleaved"), [(None, False), (None, True), (16, False), (8, True), (0, False)])
def test_frames_and_rotations(kernels, frame_tokens, past, rotary, interleaved):
    layer = make_layer(past=past, heads=1, head_dim=32, frame_tokens=frame_tokens, rotary=rotary, interleaved=interleaved,
                       shift=6000, start=[3], recent=4, transform=frame_tokens != 48)  # fmt: skip
    check(kernels, layer, group=2)


@runs_kernels
@pytest.mark.parametrize(("recent", "sinks"), [(0, 0), (0, 4), (1, 0), (1, 1), (100, 0), (7, 70)])
def test_window_and_sinks(kernels, recent, sinks):
    layer = make_layer(past=80, heads=1, head_dim=32, recent=recent, sinks=sinks, start=[2])
    check(kernels, layer, 3, group=2)


@runs_kernels
def test_after_a_crop_and_with_an_offset(kernels):
    layer = make_layer(past=140, heads=1, head_dim=32, recent=32)
    layer.clock[2] = 140  # the ring holds nothing older
    layer.buffers["k_ring"][:, :, torch.arange(118, 140) % 32] = NAN
    layer.buffers["v_ring"][:, :, torch.arange(118, 140) % 32] = NAN
    check(kernels, layer, 5, group=2)
    layer = make_layer(past=140, heads=1, head_dim=32)
    layer.clock[0] = 133
    check(kernels, layer, 2, group=2, offset=7)


@runs_kernels
@pytest.mark.parametrize("start", [1, 5, 63, 64, 149, 150, 152, 400])
def test_padding(kernels, start):
    layer = make_layer(past=150, batch=2, heads=1, head_dim=32, start=[start, 3])
    check(kernels, layer, 4, group=2)


@runs_kernels
def test_queries_that_see_nothing_get_zeros(kernels):
    layer = make_layer(past=20, batch=2, head_dim=32, start=[23, 0])
    q, k, v = layer.new_tokens(5, 2)
    k[0, :, :3], v[0, :, :3], q[0, :, :3] = NAN, NAN, NAN
    out, lse = attend(kernels, layer.attention_args(q, k, v))
    assert (out[0, :3] == 0).all() and (lse[0, :, :3] == -float("inf")).all()
    assert out.isfinite().all() and lse[0, :, 3:].isfinite().all() and lse[1].isfinite().all()


@runs_kernels
@pytest.mark.parametrize("slots", [90, 300])
@pytest.mark.parametrize("density", [0.02, 0.5])
def test_masks_with_holes(kernels, slots, density):
    layer = make_layer(past=120, batch=2, heads=1, head_dim=32, start=[0, 9])
    check(kernels, layer, 9, group=2, mask=torch.rand(2, 1, 9, slots) < density)
    check(kernels, layer, 3, group=2, mask=(torch.rand(2, 1, 1, slots) < density).expand(2, 1, 3, slots))


@runs_kernels
def test_tokens_hidden_by_the_mask_may_hold_anything(kernels):
    layer = make_layer(past=60, head_dim=32)
    mask = torch.ones(1, 1, 3, 63, dtype=torch.bool)
    mask[..., [1, 50, 61]] = False  # a sink, a slot of the ring, a new token
    q, k, v = layer.new_tokens(3)
    clean = attend(kernels, layer.attention_args(q, k, v, mask))
    for side in "kv":
        layer.buffers[f"{side}_sinks"][:, :, 1] = NAN
        layer.buffers[f"{side}_ring"][:, :, 50 % 16] = NAN
    k[:, :, 1], v[:, :, 1] = NAN, float("inf")
    for a, b in zip(attend(kernels, layer.attention_args(q, k, v, mask)), clean):
        assert torch.equal(a, b) and a.isfinite().all()


@runs_kernels
def test_nan_in_a_query_stays_with_its_head(kernels):
    layer = make_layer(past=100, head_dim=32)
    q, k, v = layer.new_tokens(2, 2)
    q[0, 3, 1] = NAN
    out, lse = attend(kernels, layer.attention_args(q, k, v))
    assert out[0, 1, 3].isnan().all() and lse[0, 3, 1].isnan()
    out[0, 1, 3] = 0
    assert out.isfinite().all()


@runs_kernels
@pytest.mark.parametrize("scale", [0.0, 0.01, 30.0])
def test_scales(kernels, scale):
    check(kernels, make_layer(past=100, heads=1, head_dim=32), 2, group=2, scale=scale)


@runs_kernels
@pytest.mark.parametrize("factor", [1e-8, 1e6])
def test_magnitudes_beyond_fp16(kernels, factor):
    """Queries, exact keys and values of any size; centroids are fp16 and stay."""
    layer = make_layer(past=100, heads=1, head_dim=32, recent=200)
    q, k, v = layer.new_tokens(2, 2)
    for side in "kv":
        for name in ("ring", "sinks"):
            layer.buffers[f"{side}_{name}"] *= factor
    compare(kernels, layer.attention_args(q / factor, k * factor, v * factor))


@runs_kernels
@pytest.mark.parametrize("processors", [1, 20])
def test_many_splits(kernels, monkeypatch, processors):
    """As many splits as a GPU would make of a long cache, some of them with nothing to do."""
    monkeypatch.setattr(kernels, "_processors", lambda device: processors)
    monkeypatch.setattr(kernels, "MIN_SPLIT_TOKENS", 16)
    for past in (3, 200):
        layer = make_layer(past=past, heads=1, head_dim=32, capacity=320, frame_tokens=48, recent=40)
        check(kernels, layer, 2, group=2)


@runs_kernels
def test_strides_do_not_matter(kernels):
    layer = make_layer(past=70, head_dim=32)
    q, k, v = layer.new_tokens(4, 2)
    mask = torch.rand(1, 1, 4, 74) < 0.7
    want = attend(kernels, layer.attention_args(q, k, v, mask))
    odd = [torch.empty(*x.shape[:3], 2 * x.shape[3])[..., ::2].copy_(x) for x in (q, k, v)]
    codebook, transform = layer.codebooks["v_codebook"], layer.codebooks["k_transform_inv"]
    layer.codebooks["v_codebook"] = codebook.transpose(1, 2).contiguous().transpose(1, 2)
    layer.codebooks["k_transform_inv"] = transform.mT.contiguous().mT
    layer.start, layer.clock = torch.zeros(2, dtype=torch.int32)[::2], layer.clock.repeat_interleave(2)[::2]
    for a, b in zip(attend(kernels, layer.attention_args(*odd, mask.mT.contiguous().mT)), want):
        assert torch.equal(a, b)
    layer.codebooks["k_codebook"] = layer.codebooks["k_codebook"].repeat_interleave(2, -1)[..., ::2]
    for a, b in zip(attend(kernels, layer.attention_args(q, k, v, mask)), want):
        assert torch.equal(a, b)


@runs_kernels
@pytest.mark.parametrize("past", [-5, 500, 1 << 40, 1 << 62, -(1 << 62)])
@pytest.mark.parametrize("start", [-7, 0, 1 << 30])
def test_a_senseless_clock_stays_inside_the_buffers(kernels, past, start):
    layer = make_layer(past=70, heads=1, head_dim=32, start=[start], capacity=128)
    for name in ("k_ring", "v_ring", "k_sinks", "v_sinks"):
        layer.buffers[name] = layer.buffers[name].nan_to_num()
    layer.clock[:2] = past
    out, _ = attend(kernels, layer.attention_args(*layer.new_tokens(3, 2)))
    assert out.isfinite().all()


@runs_kernels
def test_what_the_kernels_do_not_read_goes_to_the_reference(kernels):
    layer = make_layer(past=10, heads=1, head_dim=264)
    args = layer.attention_args(*layer.new_tokens(1))
    assert torch.equal(attend(kernels, args)[0], attend(reference, args)[0])


@runs_kernels
def test_bad_arguments_are_named(kernels):
    layer = make_layer(past=10, head_dim=32)
    q, k, v = layer.new_tokens(1)
    with pytest.raises(ValueError, match=r"^v must be"):
        kernels.pq_attention(*moved(layer.attention_args(q, k, v[..., :16])))
    with pytest.raises(ValueError, match=r"^codebook"):
        kernels.pq_encode(k.to(DEVICE), layer.codebooks["k_codebook"].float().to(DEVICE))


@only_gpu
def test_long_cache(kernels):
    """Splits and frames of a real size, in the dtypes of models."""
    for dtype in (torch.bfloat16, torch.float32):
        layer = make_layer(past=9000, heads=2, head_dim=128, frame_tokens=2048, recent=128, dtype=dtype)
        args = layer.attention_args(*layer.new_tokens(1, 4))
        (out, lse), (plain, plain_lse) = attend(kernels, args), reference.pq_attention_lse(*args)
        torch.testing.assert_close(out.float(), plain.float(), rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(lse, plain_lse, rtol=1e-5, atol=1e-5)


@only_gpu
def test_replayed_graph_follows_the_clock(kernels):
    """No length is read on the host: a captured graph serves every step."""
    layer = make_layer(past=200, heads=2, head_dim=64, capacity=256)
    args = list(moved(layer.attention_args(*layer.new_tokens(1, 2))))
    clock = args[13]
    kernels.pq_attention_lse(*args)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = kernels.pq_attention_lse(*args)
    for past in (200, 150, 190):
        clock[:2] = past
        graph.replay()
        want, want_lse = kernels.pq_attention_lse(*args)
        assert torch.equal(out, want) and torch.equal(lse, want_lse)
