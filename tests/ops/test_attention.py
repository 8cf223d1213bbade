"""`pq_attention` and `pq_attention_lse`, compiled, against the definition in float64."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from million_ops import has_kernels, reference
from million_ops.layout import HEAD_DIMS, SUBSPACE_DIMS
from tests.ops import oracle
from tests.ops.layer_state import LAYOUT_PAIRS, NAN, make_layer
from tests.tolerances import assert_as_good_as

ops = torch.ops.million_ops
pytestmark = pytest.mark.skipif(not has_kernels("cpu"), reason="needs the compiled CPU kernels")


def check(layer, n=1, group=1, mask=None, **kwargs):
    """The op's output and LSE are as near to the truth as the fp32 reference's."""
    args = layer.attention_args(*layer.new_tokens(n, group), mask, **kwargs)
    (out, lse), (plain, plain_lse), (truth, true_lse) = (
        ops.pq_attention_lse(*args),
        reference.pq_attention_lse(*args),
        oracle.attention(*args),
    )
    assert out.dtype == layer.dtype and out.is_contiguous() and lse.dtype == torch.float32
    assert_as_good_as(out, plain, truth)
    assert_as_good_as(lse, plain_lse, true_lse)
    assert torch.equal(ops.pq_attention(*args), out)


@pytest.mark.parametrize("past", [0, 1, 4, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000])
@pytest.mark.parametrize("n", [1, 3])
def test_lengths(past, n):
    check(make_layer(past=past, batch=2, start=[0, 2]), n, group=2)


@pytest.mark.parametrize("n", [2, 15, 16, 17, 33, 64, 70])
def test_chunks(n):
    check(make_layer(past=150, heads=1), n, group=3)


@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 8, 40, 72])
@pytest.mark.parametrize("d", SUBSPACE_DIMS)
def test_head_dims(head_dim, d):
    check(make_layer(past=140, head_dim=head_dim, k_dim=d, v_dim=d), 2, group=2)


@pytest.mark.parametrize(("k_dim", "v_dim"), list(itertools.product(SUBSPACE_DIMS, SUBSPACE_DIMS)))
@pytest.mark.parametrize("layouts", LAYOUT_PAIRS, ids=str)
def test_subspaces_and_layouts(k_dim, v_dim, layouts):
    check(make_layer(past=140, k_dim=k_dim, v_dim=v_dim, layouts=layouts, capacity=150), 2, group=2)


def test_different_layouts_of_keys_and_values():
    """A plain buffer of 150 slots beside one of whole tiles: slots behind the shorter one hold nothing."""
    layer = make_layer(past=145, layouts=(1, 1))
    args = list(layer.attention_args(*layer.new_tokens(9, 2)))
    args[8] = make_layer(past=145, capacity=150, layouts=(0, 0)).buffers["v_codes"]
    args[-1] = 0
    assert_as_good_as(ops.pq_attention(*args), reference.pq_attention(*args), oracle.attention(*args)[0])


@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("n", [1, 5])
def test_groups(group, n):
    check(make_layer(past=130), n, group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 20])
def test_dtypes(dtype, n, device):
    if device == "cuda" and dtype != torch.float32:
        pytest.skip("16-bit models have their own kernel and bounds: test_attention_16bit.py")
    check(make_layer(past=200, dtype=dtype), n, group=3)


@pytest.mark.parametrize("frame_tokens", [0, 1, 48, 64, 100, 128])
@pytest.mark.parametrize(("rotary", "interleaved"), [(None, False), (None, True), (32, False), (16, True), (0, False)])
def test_frames_and_rotations(frame_tokens, rotary, interleaved):
    layer = make_layer(past=260, frame_tokens=frame_tokens, rotary=rotary, interleaved=interleaved, shift=6000)
    check(layer, 3, group=2)


@pytest.mark.parametrize("transform", [True, False])
@pytest.mark.parametrize("recent", [0, 1, 16, 200])
@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_windows(transform, recent, sinks):
    check(make_layer(past=150, recent=recent, sinks=sinks, transform=transform), 9, group=2)


def test_window_shortened_by_a_crop():
    layer = make_layer(past=150, recent=32)
    layer.clock[2] = 140  # the ring holds nothing older
    layer.buffers["k_ring"][:, :, torch.arange(118, 140) % 32] = NAN
    layer.buffers["v_ring"][:, :, torch.arange(118, 140) % 32] = NAN
    check(layer, 5, group=2)


@pytest.mark.parametrize("start", [0, 1, 5, 63, 64, 100, 149, 150, 152, 400])
def test_padding(start):
    """Rows of different padding in one batch, up to a row whose queries see nothing, or nothing but themselves."""
    check(make_layer(past=150, batch=2, start=[start, 3]), 4, group=2)


def test_queries_that_see_nothing_get_zeros():
    layer = make_layer(past=20, batch=2, start=[23, 0])
    q, k, v = layer.new_tokens(5, 2)
    k[0, :, :3], v[0, :, :3], q[0, :, :3] = NAN, NAN, NAN
    out, lse = ops.pq_attention_lse(*layer.attention_args(q, k, v))
    assert (out[0, :3] == 0).all() and (lse[0, :, :3] == -float("inf")).all()
    assert out.isfinite().all() and lse[0, :, 3:].isfinite().all() and lse[1].isfinite().all()


@pytest.mark.parametrize("slots", [90, 200, 300])
@pytest.mark.parametrize("density", [0.02, 0.5, 1.0])
def test_masks_with_holes(slots, density):
    layer = make_layer(past=150, batch=2, start=[0, 9])
    check(layer, 20, group=2, mask=torch.rand(2, 1, 20, slots) < density)
    # One row of the mask for all queries, as an expanded view.
    check(layer, 3, group=2, mask=(torch.rand(2, 1, 1, slots) < density).expand(2, 1, 3, slots))


def test_tokens_hidden_by_the_mask_may_hold_anything():
    layer = make_layer(past=60, recent=16)
    mask = torch.ones(1, 1, 3, 63, dtype=torch.bool)
    mask[..., [1, 50, 61]] = False  # a sink, a slot of the ring, a new token
    q, k, v = layer.new_tokens(3)
    clean = ops.pq_attention_lse(*layer.attention_args(q, k, v, mask))
    for side in "kv":
        layer.buffers[f"{side}_sinks"][:, :, 1] = NAN
        layer.buffers[f"{side}_ring"][:, :, 50 % 16] = NAN
    k[:, :, 1], v[:, :, 1] = NAN, float("inf")
    for a, b in zip(ops.pq_attention_lse(*layer.attention_args(q, k, v, mask)), clean):
        assert torch.equal(a, b) and a.isfinite().all()


def test_nan_in_a_query_stays_with_its_head():
    layer = make_layer(past=100)
    q, k, v = layer.new_tokens(2, 2)
    q[0, 3, 1] = NAN
    out = ops.pq_attention(*layer.attention_args(q, k, v))
    assert out[0, 1, 3].isnan().all()
    out[0, 1, 3] = 0
    assert out.isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 30.0])
def test_scales(scale):
    check(make_layer(past=150), 2, group=2, scale=scale)


@pytest.mark.parametrize("n", [1, 2, 16, 33, 64])
@pytest.mark.parametrize("start", [0, 70])
def test_a_chunk_equals_single_steps(n, start):
    layer = make_layer(past=100, recent=64, start=[start], capacity=192)
    q, k, v = layer.new_tokens(n, 2)
    chunk, chunk_lse = ops.pq_attention_lse(*layer.attention_args(q, k, v))
    for j in range(n):
        one = q[:, :, j : j + 1], k[:, :, j : j + 1], v[:, :, j : j + 1]
        # `offset` instead of an advanced clock: the same slots.
        out, lse = ops.pq_attention_lse(*layer.attention_args(*one, offset=j))
        ops.pq_append_(*layer.append_args(*one[1:], offset=j))
        torch.testing.assert_close(chunk[:, j : j + 1], out, rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(chunk_lse[:, :, j : j + 1], lse, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("n", [1, 40])
def test_halves_merge_by_lse(n):
    """Attention over two disjoint sets of tokens (masks), merged by their LSE, is attention over all of them."""
    layer = make_layer(past=300)
    new = layer.new_tokens(n, 2)
    half = torch.rand(1, 1, n, 300 + n) < 0.5
    (out1, lse1), (out2, lse2), (out, lse) = (
        ops.pq_attention_lse(*layer.attention_args(*new, mask)) for mask in (half, ~half, None)
    )
    both = torch.logaddexp(lse1, lse2)
    merged = sum(o * (x - both).exp().transpose(1, 2)[..., None] for o, x in ((out1, lse1), (out2, lse2)))
    torch.testing.assert_close(merged, out, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(both, lse, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("n", [1, 50])
def test_result_does_not_depend_on_the_number_of_threads(n):
    layer = make_layer(past=900, heads=3)
    args = layer.attention_args(*layer.new_tokens(n, 3))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.pq_attention_lse(*args))
    finally:
        torch.set_num_threads(threads)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


def test_strides_do_not_matter():
    layer = make_layer(past=100)
    q, k, v = layer.new_tokens(4, 2)
    want = ops.pq_attention(*layer.attention_args(q, k, v))
    odd = [torch.empty(*x.shape[:3], 2 * x.shape[3])[..., ::2].copy_(x) for x in (q, k, v)]
    for new in (odd, [x.contiguous() for x in (q, k, v)]):
        assert torch.equal(ops.pq_attention(*layer.attention_args(*new)), want)
    codebook = layer.codebooks["v_codebook"]
    layer.codebooks["v_codebook"] = codebook.transpose(1, 2).contiguous().transpose(1, 2)
    layer.start, layer.clock = torch.zeros(2, dtype=torch.int32)[::2], layer.clock.repeat_interleave(2)[::2]
    assert torch.equal(ops.pq_attention(*layer.attention_args(q, k, v)), want)


@pytest.mark.parametrize("past", [-5, 500, 1 << 40, 1 << 62, -(1 << 62)])
@pytest.mark.parametrize("start", [-7, 0, 1 << 30])
def test_a_senseless_clock_stays_inside_the_buffers(past, start):
    layer = make_layer(past=100, start=[start], capacity=128)
    for name in ("k_ring", "v_ring", "k_sinks", "v_sinks"):
        layer.buffers[name] = layer.buffers[name].nan_to_num()
    layer.clock[:2] = past
    out, _ = ops.pq_attention_lse(*layer.attention_args(*layer.new_tokens(3, 2)))
    assert out.isfinite().all()
    ops.pq_append_(*layer.append_args(*layer.new_tokens(70)[1:]))


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_older_instruction_sets(isa):
    """This file's and the append's central cases again in a process that is held to an older instruction set."""
    if "MILLION_CPU_ISA" in os.environ:
        pytest.skip("this is that process")
    cases = "test_dtypes or (test_head_dims and 72) or (test_chunks and 17) or test_options or test_decode or tie"
    files = [
        os.path.join(os.path.dirname(__file__), x) for x in ("test_attention.py", "test_append.py", "test_encode.py")
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", cases, *files]
    done = subprocess.run(command, env={**os.environ, "MILLION_CPU_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
