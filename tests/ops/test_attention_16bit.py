"""Attention of 16-bit models, on a GPU the tensor core kernel: errors within 1.5 times those of decoding to fp16 and attending."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from million_ops import dispatch, has_kernels, layouts_for, reference
from million_ops.layout import MMA_SHAPES
from tests.ops import oracle
from tests.ops.layer_state import NAN, make_layer

ops = torch.ops.million_ops
pytestmark = pytest.mark.skipif(not has_kernels("cpu"), reason="needs the compiled CPU kernels")
FACTOR = 1.5  # times the error of the same maths in fp16 PyTorch


def check(layer, n=1, group=1, mask=None):
    args = layer.attention_args(*layer.new_tokens(n, group), mask)
    out, lse = ops.pq_attention_lse(*args)
    plain, _ = reference.pq_attention_lse(*args, decoded=torch.float16)
    truth, true_lse = oracle.attention(*args)
    assert out.dtype == layer.dtype and out.is_contiguous() and lse.dtype == torch.float32
    error, bound = ((x.double() - truth).norm() for x in (out, plain))
    assert error <= FACTOR * bound + 1e-6 * truth.norm()
    # Rounding the query to fp16 moves a score by at most 2^-11 of its absolute terms, and no score moves the LSE by more.
    q, codebook = args[0].double(), layer.codebooks["k_codebook"].double()
    inverse = layer.codebooks["k_transform_inv"]
    widest = codebook.norm(dim=-1).amax(1).norm(dim=-1).amax() * (
        1.0 if inverse is None else torch.linalg.matrix_norm(inverse.double(), 2).amax()
    )
    widest = max(widest, args[1].double().norm(dim=-1).amax())
    shift = 2**-10 * layer.head_dim**-0.5 * q.norm(dim=-1).amax() * widest
    seen = true_lse > -float("inf")
    assert torch.equal(lse > -float("inf"), seen)
    assert not seen.any() or (lse.double() - true_lse)[seen].abs().max() <= shift + 1e-5
    for _ in range(3):  # bit for bit the same every time
        assert torch.equal(ops.pq_attention(*args), out)


def heads_for(rows):
    """KV heads for so many query rows of each: the error of a row whose softmax picks one token is a matter of luck, and one may be
    four times as unlucky."""
    return 4 if rows < 3 else 1


def layer_of(**options):
    return make_layer(**{"dtype": torch.float16, "head_dim": 128, "heads": 1, **options})


def kernels_of(args) -> set[str]:
    """Names of the GPU kernels that attention with these arguments launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ops.pq_attention(*args)
        torch.cuda.synchronize()
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("past", [0, 1, 4, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000, 3000])
@pytest.mark.parametrize(
    ("n", "group", "head_dim"),
    [(1, 1, 128), (2, 1, 128), (1, 4, 128), (3, 2, 128), (1, 8, 128), (4, 4, 128), (1, 2, 256), (1, 4, 256), (1, 8, 256)],
)  # fmt: skip
def test_lengths(past, n, group, head_dim):
    layer = layer_of(
        past=past, batch=2, heads=heads_for(n * group), start=[0, 2], recent=16, frame_tokens=256, head_dim=head_dim
    )
    check(layer, n, group)


@pytest.mark.parametrize("group", [*range(1, 10), 12, 16])
@pytest.mark.parametrize(("n", "head_dim"), [(1, 128), (2, 128), (5, 128), (16, 128), (1, 256), (3, 256)])
def test_groups_and_chunks(group, n, head_dim):
    check(layer_of(past=300, head_dim=head_dim), n, group)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("k_dim", "v_dim"), [(2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (4, 2), (2, 8)])
@pytest.mark.parametrize("group", [1, 3, 6, 16])
def test_head_dims_and_subspaces(head_dim, k_dim, v_dim, group):
    check(layer_of(past=333, heads=2, head_dim=head_dim, k_dim=k_dim, v_dim=v_dim), group=group)


def test_strides_of_the_inverse():
    """Stored column after column it is used as it is, in any other order copied."""
    layer = layer_of(past=300, heads=2)
    args = layer.attention_args(*layer.new_tokens(1, 4))
    want, inverse = ops.pq_attention(*args), args[5]
    wide = torch.empty(2, 128, 256, dtype=inverse.dtype)[..., ::2].copy_(inverse)
    for other in (inverse.contiguous(), wide, inverse.flip(0).flip(0)):
        assert torch.equal(ops.pq_attention(*args[:5], other, *args[6:]), want)


def test_misaligned_inverse(device):
    if device != "cuda":
        pytest.skip("the CPU reads it number by number")
    layer = layer_of(past=300, heads=2)
    args = layer.attention_args(*layer.new_tokens(1, 4))
    moved = torch.empty(2 * 128 * 128 + 1, dtype=torch.float16)[1:].view(2, 128, 128).mT.copy_(args[5])
    with pytest.raises(RuntimeError, match="the transform's inverse must be aligned to 16 bytes"):
        ops.pq_attention(*args[:5], moved, *args[6:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 4, 8, 16])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_dtypes(dtype, group, head_dim):
    check(layer_of(past=700, dtype=dtype, head_dim=head_dim), group=group)


@pytest.mark.parametrize(("head_dim", "group"), [(128, 4), (128, 8), (128, 16), (256, 4), (256, 8)])
def test_many_splits(head_dim, group, device):
    """More than a cluster merges: partial results and the kernel that merges them."""
    layer = layer_of(past=40_000, heads=2, head_dim=head_dim, frame_tokens=2048)
    check(layer, group=group)
    if device == "cuda":
        assert any("merge" in name for name in kernels_of(layer.attention_args(*layer.new_tokens(1, group))))


@pytest.mark.parametrize(
    ("past", "recent"),
    [(0, 16), (1, 16), (40, 16), (256, 16), (257, 16), (600, 16), (2068, 16), (2069, 16), (2200, 16), (9000, 16), (500, 600), (3000, 600)],
)  # fmt: skip
@pytest.mark.parametrize(("head_dim", "group"), [(128, 1), (128, 4), (128, 8), (128, 16), (256, 4), (256, 8)])
def test_short_texts_in_a_large_cache(past, recent, head_dim, group, device):
    """The number of splits comes from the capacity: many find nothing to do, how many differs from row to row."""
    if device == "cpu":
        pytest.skip("its kernels do not split a row, and the reference decodes the whole cache")
    layer = layer_of(
        past=past, capacity=40_000, batch=2, heads=2, start=[0, min(past, 200)], recent=recent, head_dim=head_dim
    )
    check(layer, group=group)


def heads_of_two_waves(batch, device):
    """KV heads with which blocks of one row of the batch each are more than run at once, and blocks of two rows are not, so that two
    rows share a block."""
    if device == "cpu" or layouts_for(device, 128, 2, 2, torch.float16)[0].name != "mma_k":
        pytest.skip("of blocks of the tensor core kernel")
    return torch.cuda.get_device_properties(0).multi_processor_count // ((batch + 1) // 2)


@pytest.mark.parametrize(
    ("past", "start"),
    [(0, [0, 0]), (1, [0, 1]), (4, [2, 0]), (31, [0, 31]), (64, [0, 3]), (129, [0, 0]), (150, [150, 1]), (150, [0, 152]), (700, [0, 690]),
     (700, [650, 3]), (3000, [0, 0]), (300, [0, 5, 100]), (700, [0, 690, 2])],
)  # fmt: skip
@pytest.mark.parametrize("frame_tokens", [48, 256])
def test_rows_that_share_a_block(past, start, frame_tokens, device):
    heads = heads_of_two_waves(len(start), device)
    check(layer_of(past=past, batch=len(start), start=start, heads=heads, frame_tokens=frame_tokens, shift=500))


@pytest.mark.parametrize(
    ("head_dim", "k_dim", "v_dim"), [(64, 2, 2), (96, 2, 2), (96, 4, 4), (128, 2, 4), (128, 4, 8), (128, 8, 8)]
)
def test_shapes_of_rows_that_share_a_block(head_dim, k_dim, v_dim, device):
    heads = heads_of_two_waves(3, device)
    shape = dict(head_dim=head_dim, k_dim=k_dim, v_dim=v_dim)
    check(layer_of(past=333, batch=3, start=[7, 0, 40], heads=heads, dtype=torch.bfloat16, **shape))


@pytest.mark.parametrize("recent", [0, 16, 200])
@pytest.mark.parametrize("sinks", [0, 40])
def test_windows_of_rows_that_share_a_block(recent, sinks, device):
    heads = heads_of_two_waves(2, device)
    check(layer_of(past=350, batch=2, start=[0, 320], heads=heads, recent=recent, sinks=sinks, rotary=64))


def test_masks_of_rows_that_share_a_block(device):
    layer = layer_of(past=350, batch=3, start=[0, 9, 300], heads=heads_of_two_waves(3, device))
    check(layer, mask=torch.rand(3, 1, 1, 400) < 0.5)


@pytest.mark.parametrize("row", [0, 1])
def test_what_the_other_row_holds(row, device):
    """Nothing that one row of the batch holds shows in the result of another in the same block."""
    layer = layer_of(past=300, batch=2, heads=heads_of_two_waves(2, device))
    q, k, v = layer.new_tokens(1)
    clean = ops.pq_attention_lse(*layer.attention_args(q, k, v))
    for x in (q, k, v, *(layer.buffers[f"{side}_{part}"] for side in "kv" for part in ("sinks", "ring"))):
        x[1 - row] = NAN
    dirty = ops.pq_attention_lse(*layer.attention_args(q, k, v))
    assert all(torch.equal(a[row], b[row]) for a, b in zip(clean, dirty)) and dirty[0][1 - row].isnan().all()


def shapes_of_blocks(args) -> set:
    """Template arguments of the tensor core kernel's launches for these arguments: head_dim, channels of a key's subspace and of a
    value's, query rows, whether tables are narrow, rows of the batch."""
    names = [name for name in kernels_of(args) if "attend_kernel" in name]
    return {tuple(name.split("Shape<")[1].split(">")[0].split(", ")) for name in names}


def test_rows_do_share_a_block(device):
    """The tests above are of that kernel, and a batch that all runs at once is not."""
    heads = heads_of_two_waves(2, device)
    for count, rows in ((heads, "2"), (heads // 2, "1")):
        layer = layer_of(past=300, batch=2, heads=count)
        assert {shape[5] for shape in shapes_of_blocks(layer.attention_args(*layer.new_tokens(1)))} == {rows}


@pytest.mark.parametrize(
    ("batch", "heads", "group", "rows"), [(8, 4, 1, 2), (8, 4, 4, 4), (8, 4, 8, 8), (8, 4, 16, 16), (1, 4, 8, 4)]
)
def test_query_rows_of_a_block(batch, heads, group, rows, device):
    """As many as there are, up to 16, where all multiprocessors have something to do; fewer for one row of the batch."""
    if device == "cpu" or layouts_for(device, 128, 2, 2, torch.float16)[0].name != "mma_k":
        pytest.skip("of blocks of the tensor core kernel")
    if dispatch.shared_memory(torch.device(device)) < 188 << 10:
        rows = min(rows, 8)
    layer = layer_of(past=4000 if batch > 1 else 1000, batch=batch, heads=heads)
    assert {shape[3] for shape in shapes_of_blocks(layer.attention_args(*layer.new_tokens(1, group)))} == {str(rows)}


@pytest.mark.parametrize("frame_tokens", [0, 1, 48, 64, 100, 128, 2048])
@pytest.mark.parametrize(("rotary", "interleaved"), [(None, False), (64, True), (0, False)])
@pytest.mark.parametrize(("head_dim", "group"), [(128, 1), (128, 4), (128, 8), (128, 16), (256, 4), (256, 1), (256, 8)])
def test_frames(frame_tokens, rotary, interleaved, head_dim, group):
    layer = layer_of(
        past=460,
        heads=heads_for(group),
        frame_tokens=frame_tokens,
        rotary=rotary,
        interleaved=interleaved,
        shift=6000,
        head_dim=head_dim,
    )
    check(layer, group=group)


@pytest.mark.parametrize("transform", [True, False])
@pytest.mark.parametrize("recent", [0, 1, 16, 200])
@pytest.mark.parametrize("sinks", [0, 1, 4, 40])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_windows(transform, recent, sinks, head_dim):
    layer = layer_of(
        past=350, recent=recent, sinks=sinks, transform=transform, head_dim=head_dim, heads=4
    )  # see `heads_for`
    check(layer, 3, group=2)


@pytest.mark.parametrize("start", [0, 1, 5, 63, 64, 100, 149, 150, 152, 400])
@pytest.mark.parametrize(("head_dim", "group"), [(128, 2), (128, 4), (256, 2)])
def test_padding(start, head_dim, group):
    check(layer_of(past=150, batch=2, start=[start, 3], head_dim=head_dim), 4, group=group)


@pytest.mark.parametrize("slots", [90, 200, 400])
@pytest.mark.parametrize("density", [0.02, 0.5])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_masks_with_holes(slots, density, head_dim):
    layer = layer_of(past=350, batch=2, start=[0, 9], head_dim=head_dim)
    check(layer, 6, group=2, mask=torch.rand(2, 1, 6, slots) < density)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_what_nobody_sees_may_hold_anything(head_dim, n):
    layer = layer_of(past=300, recent=16, head_dim=head_dim)
    mask = torch.ones(1, 1, n, 300 + n, dtype=torch.bool)
    mask[..., [1, 290, 301]] = False  # a sink, a slot of the ring, a new token
    q, k, v = layer.new_tokens(n)
    clean = ops.pq_attention_lse(*layer.attention_args(q, k, v, mask))
    for side, new in (("k", k), ("v", v)):
        layer.buffers[f"{side}_sinks"][:, :, 1] = NAN
        layer.buffers[f"{side}_ring"][:, :, 290 % 16] = NAN
        new[:, :, 1] = NAN
    dirty = ops.pq_attention_lse(*layer.attention_args(q, k, v, mask))
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty))


@pytest.mark.parametrize("group", [2, 4, 8, 16])
def test_a_bad_query_is_not_hidden(group):
    layer = layer_of(past=300)
    q, k, v = layer.new_tokens(1, group)
    q[:, 1] = NAN
    out = ops.pq_attention(*layer.attention_args(q, k, v))
    assert out[:, :, 1].isnan().all() and out[:, :, [i for i in range(group) if i != 1]].isfinite().all()


@pytest.mark.parametrize("factor", [1e-4, 300.0])
def test_small_and_large_queries(factor):
    layer = layer_of(past=500)
    q, k, v = layer.new_tokens(1, 4)
    args = layer.attention_args(q * factor, k, v)
    truth = oracle.attention(*args)[0]
    plain = reference.pq_attention(*args)
    error, bound = ((x.double() - truth).norm() for x in (ops.pq_attention(*args), plain))
    # Large scores pick single tokens; rounding the query may pick another only where two are that near.
    assert error <= 4 * bound + 2e-2 * (factor > 1) * truth.norm()


@pytest.mark.parametrize("scale", [-0.1, 0.0, 0.3])
def test_any_scale(scale):
    layer = layer_of(past=300)
    args = layer.attention_args(*layer.new_tokens(1, 4), scale=scale)
    truth = oracle.attention(*args)[0]
    plain = reference.pq_attention_lse(*args, decoded=torch.float16)[0]
    error, bound = ((x.double() - truth).norm() for x in (ops.pq_attention(*args), plain))
    assert error <= FACTOR * bound + 1e-3 * truth.norm()


@pytest.mark.parametrize(("kib", "head_dims"), [(48, ()), (99, (64,)), (163, (64, 96, 128)), (227, (64, 96, 128, 256))])
def test_layouts_by_shared_memory(monkeypatch, kib, head_dims):
    """Which head_dims the tensor core kernel's tables fit, of GPUs from a GeForce to an H100."""
    limit = SimpleNamespace(shared_memory_per_block_optin=227 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: limit)
    monkeypatch.setattr(dispatch, "has_kernels", lambda device: True)
    monkeypatch.setenv("MILLION_GPU_SHARED", str(kib))
    for head_dim, shapes in MMA_SHAPES.items():
        for k_dim, v_dim in shapes:
            k, v = layouts_for("cuda", head_dim, k_dim, v_dim, torch.float16)
            assert (k.name, v.name) == (("mma_k", "mma_v") if head_dim in head_dims else ("rows64", "rows64"))


MOST = "(test_lengths or test_groups_and_chunks or test_head_dims_and_subspaces or test_windows)"
MORE = (
    "(test_frames or test_padding or test_masks_with_holes or test_what_nobody_sees or test_a_bad_query or test_dtypes)"
)


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ("MILLION_GPU_SHARED=163", f"{MOST} and not 256"),
        ("MILLION_GPU_SHARED=99", f"{MOST} and not 256"),
        ("MILLION_GPU_TABLES=wide", f"{MOST} and not 256"),
        ("MILLION_GPU_TABLES=single", f"{MOST} and not 256"),
        ("MILLION_GPU_ROWS=8", MOST),
        ("MILLION_GPU_ROWS=8", MORE),
        ("MILLION_GPU_ROWS=16", f"{MOST} and not 256"),
        ("MILLION_GPU_ROWS=16", f"{MORE} and not 256"),
    ],
)
def test_other_gpus(device, setting, names):
    """Narrow tables, and the general kernel, as a GPU with less shared memory takes them; wide ones, which long caches on one with
    faster memory get, and of those keys' table once, which a short text in such a cache gets; blocks of as many query rows as long
    caches and batches get."""
    if device != "cuda":
        pytest.skip("of GPUs")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", f"cuda and {names}"]
    env = os.environ | dict([setting.split("=")])
    done = subprocess.run(command, env=env, cwd=os.getcwd(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
