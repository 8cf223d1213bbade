"""`pq_encode` and `pq_decode` against their definitions."""

import pytest
import torch

from million_ops import pq_decode, pq_encode, reference
from million_ops.layout import HEAD_DIMS, SUBSPACE_DIMS
from tests.tolerances import CODE_DISTANCE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def distances(x, codebook):
    """[B, H, T, S, 256] float64."""
    B, H, T, _ = x.shape
    _, _, S, d = codebook.shape
    table = codebook.double().permute(0, 2, 1, 3)[:, None]  # [H, 1, S, 256, d]
    return (x.double().view(B, H, T, S, 1, d) - table).square().sum(-1)


def assert_nearest(codes, x, codebook):
    all_distances = distances(x, codebook)
    best = all_distances.amin(-1)
    got = all_distances.gather(-1, codes.long()[..., None])[..., 0]
    assert (got <= best * (1 + CODE_DISTANCE) + 1e-12).all()


@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 8, 40])
@pytest.mark.parametrize("d", SUBSPACE_DIMS)
@pytest.mark.parametrize("tokens", [1, 3, 17, 64, 70])
def test_nearest_centroid(head_dim, d, tokens):
    codebook = torch.randn(2, 256, head_dim // d, d).half()
    x = torch.randn(2, 2, tokens, head_dim)
    codes = pq_encode(x, codebook)
    assert codes.shape == (2, 2, tokens, head_dim // d) and codes.dtype == torch.uint8 and codes.is_contiguous()
    assert_nearest(codes, x, codebook)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_strides(dtype):
    codebook = torch.randn(3, 256, 32, 2).half()
    x = torch.randn(2, 40, 3, 64).to(dtype).transpose(1, 2)
    codes = pq_encode(x, codebook)
    assert_nearest(codes, x, codebook)
    assert torch.equal(codes, pq_encode(x.contiguous(), codebook))
    assert torch.equal(codes, pq_encode(x.repeat_interleave(2, -1)[..., ::2], codebook))
    assert torch.equal(codes, pq_encode(x.float(), codebook))


@pytest.mark.parametrize("d", SUBSPACE_DIMS)
@pytest.mark.parametrize("tokens", [1, 40])
def test_lowest_index_wins_a_tie(d, tokens):
    """Every centroid stands three times in the codebook; points midway between two centroids, as well."""
    distinct = torch.randn(1, 64, 64 // d, d).half()
    codebook = distinct.repeat(1, 4, 1, 1)
    assert (pq_encode(torch.randn(1, 1, tokens, 64), codebook) < 64).all()
    grid = torch.arange(256.0).half().view(1, 256, 1, 1).expand(1, 256, 64 // d, d)
    assert (pq_encode(torch.full((1, 1, tokens, 64), 77.5), grid.contiguous()) == 77).all()


@pytest.mark.parametrize("d", SUBSPACE_DIMS)
def test_one_token_and_many_give_the_same_codes(d):
    """Bit for bit, near ties included: the coarse grid makes many."""
    codebook = (torch.randn(2, 256, 64 // d, d) * 4).round().div(4).half()
    x = (torch.randn(1, 2, 130, 64) * 16).round() / 16
    x = torch.where(torch.rand_like(x) < 0.5, x, x * 1.0001)
    codes = pq_encode(x, codebook)
    for t in range(130):
        assert torch.equal(pq_encode(x[:, :, t : t + 1], codebook), codes[:, :, t : t + 1])


def test_far_outliers_keep_their_precision():
    """Distances are taken from differences: |x|^2 - 2 x c + |c|^2 in fp32 would fail here."""
    codebook = (torch.randn(1, 256, 32, 2) + 3000).half()
    x = torch.randn(1, 1, 50, 64) + 3000
    assert_nearest(pq_encode(x, codebook), x, codebook)


def test_extreme_values():
    codebook = torch.randn(1, 256, 32, 2)
    codebook[0, 5], codebook[0, 6], codebook[0, 7] = 65504.0, 6e-8, -65504.0  # largest and smallest of fp16
    codebook = codebook.half()
    x = torch.cat([codebook[:, i].float().reshape(1, 1, 1, 64) for i in (5, 6, 7)], 2)
    assert (pq_encode(x, codebook)[0, 0] == torch.tensor([5, 6, 7])[:, None]).all()
    assert (pq_encode(torch.full((1, 1, 1, 64), float("nan")), codebook) == 0).all()


@pytest.mark.parametrize("d", SUBSPACE_DIMS)
@pytest.mark.parametrize("tokens", [1, 40])
def test_infinite_tokens(d, tokens):
    """Every centroid is infinitely far from them: the lowest index. Their neighbours' codes stay right."""
    codebook = torch.randn(2, 256, 64 // d, d).half()
    x = torch.randn(1, 2, tokens, 64)
    want = pq_encode(x, codebook)
    x[:, :, ::3, 0], x[:, :, ::3, -1] = float("inf"), -float("inf")
    want[:, :, ::3, 0] = want[:, :, ::3, -1] = 0
    assert torch.equal(pq_encode(x, codebook), want)


@pytest.mark.parametrize("d", SUBSPACE_DIMS)
@pytest.mark.parametrize("size", [1e-3, 3e-5, 1e-6])
def test_tiny_centroids(d, size):
    """Down to fp16's subnormal numbers, and squares of distances that are small beside nothing else."""
    codebook = (torch.randn(2, 256, 64 // d, d) * size).half()
    x = torch.randn(1, 2, 150, 64) * size
    x[:, :, ::7] *= 1000  # far from all of them
    best = distances(x, codebook)
    got = best.gather(-1, pq_encode(x, codebook).long()[..., None])[..., 0]
    assert (got <= best.amin(-1) * (1 + CODE_DISTANCE)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", SUBSPACE_DIMS)
@pytest.mark.parametrize("tokens", [0, 1, 33, 200])
def test_decode(dtype, d, tokens):
    codebook = (torch.randn(3, 256, 72 // d, d) * torch.logspace(-6, 3, 256).view(1, 256, 1, 1)).half()
    codes = torch.randint(0, 256, (2, 3, tokens, 72 // d), dtype=torch.uint8)
    x = pq_decode(codes, codebook, dtype)
    assert x.dtype == dtype and x.shape == (2, 3, tokens, 72) and x.is_contiguous()
    assert torch.equal(x, reference.pq_decode(codes, codebook, dtype))
    assert torch.equal(x, pq_decode(codes.transpose(1, 2).contiguous().transpose(1, 2), codebook, dtype))


def test_decode_rounds_to_nearest_even():
    """Every finite half as a centroid, in every dtype: bf16 rounds it, the others keep it."""
    halves = torch.arange(65536).to(torch.uint16).view(torch.float16)
    halves = halves[halves.isfinite()][: 247 * 256].view(1, 247, 256).transpose(1, 2)  # [1, 256, 247]
    for i in range(0, 240, 8):
        codebook = halves[:, :, i : i + 8].reshape(1, 256, 4, 2).contiguous()
        codes = torch.arange(256, dtype=torch.uint8)[None, None, :, None].expand(1, 1, 256, 4)
        for dtype in DTYPES:
            want = codebook.view(1, 1, 256, 8).to(dtype)
            assert torch.equal(pq_decode(codes, codebook, dtype).view(-1), want.reshape(-1))


def test_encoding_no_token():
    codebook = torch.randn(2, 256, 32, 2).half()
    for encode in (pq_encode, reference.pq_encode):
        assert encode(torch.randn(1, 2, 0, 64), codebook).shape == (1, 2, 0, 32)
        assert encode(torch.randn(0, 2, 3, 64), codebook).shape == (0, 2, 3, 32)
