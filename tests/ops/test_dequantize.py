"""`pq_dequantize` against its definition, in every layout."""

import os
import subprocess
import sys

import pytest
import torch

from million_ops import LAYOUTS, pack, pq_decode, pq_dequantize, reference
from million_ops.reference import frame_positions, from_frame, rotate
from tests.tolerances import assert_as_good_as

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def parts(head_dim, d, tokens, layout, *, batch=2, heads=3, transform=torch.float32, rotary=None):
    """Arguments of the op up to ``layout``, and the codes in plain order."""
    plain = torch.randint(0, 256, (batch, heads, tokens, head_dim // d), dtype=torch.uint8)
    codebook = torch.randn(heads, 256, head_dim // d, d).half()
    inverse = None
    if transform is not None:
        inverse = torch.eye(head_dim) + torch.randn(heads, head_dim, head_dim) * (0.3 / head_dim**0.5)
        if transform == torch.float16:
            inverse = LAYOUTS[2].inverse(inverse)
    rotary = head_dim if rotary is None else rotary
    inv_freq = 10000.0 ** (-torch.arange(0, rotary, 2) / rotary) if rotary else None
    origin = torch.randint(-300, 300, (batch,), dtype=torch.int32)
    return (pack(plain, layout), codebook, inverse, inv_freq, origin, layout.id), plain


def check(args, plain, dtype, frame_tokens=0, interleaved=False, first_slot=0):
    codes, codebook, inverse, inv_freq, origin, layout = args
    got = pq_dequantize(*args, dtype, frame_tokens, interleaved, first_slot)
    assert got.dtype == dtype and got.is_contiguous()
    assert got.shape == (*codes.shape[:2], codes.shape[2] * LAYOUTS[layout].tile_tokens, codebook[0, 0].numel())
    T = plain.shape[2]
    slots = first_slot + torch.arange(T)
    centroids = pq_decode(plain, codebook, torch.float32)
    rotates = inv_freq is not None and frame_tokens > 0
    if inverse is None and not rotates:
        assert torch.equal(got[:, :, :T], centroids.to(dtype))
        return
    truth = centroids.double() if inverse is None else centroids.double() @ inverse.double().mT
    if rotates:
        truth = rotate(truth, frame_positions(slots, origin, frame_tokens), inv_freq, interleaved)
    plain_torch = from_frame(centroids, slots, origin, inverse, inv_freq, frame_tokens, interleaved).to(dtype)
    assert_as_good_as(got[:, :, :T], plain_torch, truth)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: x.name)
@pytest.mark.parametrize("d", [2, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("transform", [None, torch.float32, torch.float16], ids=str)
def test_shapes(head_dim, d, layout, transform):
    if head_dim // d % layout.subspace_step:
        pytest.skip("the layout does not pack so few subspaces")
    args, plain = parts(head_dim, d, 300, layout, transform=transform)
    for dtype in DTYPES:
        check(args, plain, dtype, frame_tokens=128)


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=lambda x: x.name)
@pytest.mark.parametrize(("head_dim", "d"), [(8, 8), (24, 2), (72, 4), (80, 8), (104, 2), (136, 8), (200, 2)])
def test_other_head_dims(head_dim, d, layout):
    for transform in (None, torch.float32, torch.float16):
        args, plain = parts(head_dim, d, 130, layout, transform=transform, rotary=head_dim // 8 * 4)
        for dtype in DTYPES:
            check(args, plain, dtype, frame_tokens=32)


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[2]], ids=lambda x: x.name)
@pytest.mark.parametrize("tokens", [0, 1, 31, 63, 64, 65, 127, 128, 129, 1000])
def test_lengths(tokens, layout):
    for dtype in DTYPES:
        args, plain = parts(128, 2, tokens, layout, transform=torch.float16)
        check(args, plain, dtype, frame_tokens=256)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [0, 2, 32, 64, 96])
@pytest.mark.parametrize("transform", [None, torch.float16], ids=str)
def test_rotation(rotary, interleaved, transform):
    """Frames of every length, borders within a tile, tiles that begin anywhere, positions far out."""
    args, plain = parts(96, 2, 200, LAYOUTS[2], transform=transform, rotary=rotary)
    for frame_tokens, first_slot in (
        (0, 0),
        (1, 0),
        (7, 0),
        (48, 64),
        (64, 128),
        (100, 704),
        (2048, 1984),
        (1 << 40, 64),
    ):
        check(args, plain, torch.float16, frame_tokens, interleaved, first_slot)
    check(args, plain, torch.bfloat16, 2048, interleaved, 1 << 20)


@pytest.mark.parametrize("d", [2, 4])
def test_part_of_a_cache(d):
    """Rows and tiles of a larger buffer, read where they lie, and one that is not: equal to the same of the whole."""
    for layout in LAYOUTS[1:]:
        args, _ = parts(64, d, 640, layout, batch=4)
        codes, *books, origin, layout_id = args
        whole = pq_dequantize(*args, torch.float16, 64)
        for rows, begin, end in ((slice(None), 3, 7), (slice(1, 3), 0, 10), (slice(3, 4), 9, 10)):
            got = pq_dequantize(
                codes[rows, :, begin:end], *books, origin[rows], layout_id, torch.float16, 64, first_slot=64 * begin
            )
            assert torch.equal(got, whole[rows, :, 64 * begin : 64 * end])
        odd = torch.empty(codes.numel() + 1, dtype=torch.uint8)[1:].view(codes.shape).copy_(codes)
        assert torch.equal(pq_dequantize(odd, *books, origin, layout_id, torch.float16, 64), whole)
        strided = codes.transpose(2, 3).contiguous().transpose(2, 3)
        assert torch.equal(pq_dequantize(strided, *books, origin, layout_id, torch.float16, 64), whole)


def test_many_tiles():
    """More than there are blocks, and more rows than multiprocessors."""
    for batch, heads, tokens in ((1, 1, 64 * 700), (40, 8, 64 * 3)):
        args, plain = parts(64, 2, tokens, LAYOUTS[2], batch=batch, heads=heads, transform=torch.float16)
        check(args, plain, torch.float16, 2048)


def test_large_numbers():
    """Beyond fp16 a key is infinite, as it is for torch."""
    args, _ = parts(64, 2, 64, LAYOUTS[1])
    codes, codebook, *rest = args
    codebook = codebook.float().mul(30000).clamp(-65504, 65504).half()
    for dtype in DTYPES:
        got, want = (f(codes, codebook, *rest, dtype, 64, False, 0) for f in (pq_dequantize, reference.pq_dequantize))
        assert want.isinf().any() == (dtype == torch.float16)  # else the test says nothing
        assert (got.isinf() == want.isinf()).float().mean() > 0.999 and not got.isnan().any()


def test_a_smaller_gpu(device):
    """With 163 KiB of shared memory keys' codebook stays in the L2 cache."""
    if device != "cuda":
        pytest.skip("of GPUs")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "cuda and not smaller"]
    env = os.environ | {"MILLION_GPU_SHARED": "163"}
    done = subprocess.run(command, env=env, cwd=os.getcwd(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
