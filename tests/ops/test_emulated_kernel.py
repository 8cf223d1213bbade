"""The tensor core kernel's sources on an emulated GPU (emulator/gpu.h), against the reference: what CUDA code can be run where there
is no GPU. Races, and what a compiler or a GPU makes of the code, are for tests on a GPU (test_attention_16bit.py)."""

import ctypes
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from million_ops import dispatch, reference
from tests.ops import oracle
from tests.ops.layer_state import NAN, make_layer

CSRC = Path(__file__).parents[2] / "csrc"
FACTOR = 3.0  # times the error of the same maths in fp16 PyTorch: one row may be unlucky, a row that is wrong is a thousand times it
SUBSPACES = {64: [(2, 4)], 96: [(4, 4)], 128: [(2, 2), (4, 8)], 256: [(2, 2)]}  # as compiled in emulator/attention.cpp


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """Path of the compiled emulator: the kernel's sources with another ptx.cuh."""
    compiler = os.environ.get("CXX", "g++")
    if platform.machine() != "x86_64" or shutil.which(compiler) is None:
        pytest.skip("the emulated GPU needs a C++ compiler and x86-64")
    folder = tmp_path_factory.mktemp("emulator")
    (folder / "half.cpp").write_text("_Float16 x;")
    if subprocess.run([compiler, "-fsyntax-only", folder / "half.cpp"], capture_output=True).returncode:
        pytest.skip(f"the emulated GPU needs a C++ compiler with _Float16, g++ 12 or newer, not this {compiler}")
    shutil.copytree(CSRC, folder / "csrc")
    shutil.copytree(Path(__file__).parent / "emulator", folder / "csrc" / "cuda", dirs_exist_ok=True)
    cuda = folder / "csrc" / "cuda"
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-w", f"-I{cuda / 'include'}"]
    sources = [cuda / "attention.cpp", cuda / "gpu.cpp"]
    done = subprocess.run([*command, *sources, "-o", folder / "emulated.so"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "emulated.so"


@pytest.fixture(scope="session")
def kernels(build, tmp_path_factory):
    """Libraries by tables ("" chooses by the number of tokens): a copy each, as it asks the environment once."""
    loaded = {}

    def load(tables: str):
        if tables not in loaded:
            path = shutil.copy(build, tmp_path_factory.mktemp("tables") / f"emulated_{tables}.so")
            loaded[tables] = ctypes.CDLL(str(path))
        return loaded[tables]

    return load


@pytest.fixture(autouse=True)
def device():
    """On the CPU alone, in place of the one of conftest.py."""


def attend(kernel, args, splits, rows, multiprocessors):
    """What the kernel gives for arguments of `pq_attention_lse`, with so many splits and query rows of a block."""
    (q, k, v, k_codebook, v_codebook, inverse, inv_freq, k_codes, v_codes, k_ring, v_ring, k_sinks, v_sinks, clock, start, origin,
     mask, scale, offset, frame_tokens, interleaved, k_layout, v_layout) = args  # fmt: skip
    B, heads, n, D = q.shape
    H, G = k.shape[1], heads // k.shape[1]
    assert offset == 0
    slots = 64 * min(k_codes.shape[2], v_codes.shape[2])
    framed = inv_freq is not None and frame_tokens > 0
    frames = max(1, -(-slots // frame_tokens)) if framed else 1
    out, lse = torch.full((B, n, heads, D), NAN, dtype=q.dtype), torch.full((B, heads, n), NAN)
    prepared = torch.full((B * H * frames * -(-n * G // rows) * rows * D,), NAN, dtype=torch.float16)
    partials = torch.full((B * heads * n * splits * (D + 2),), NAN)

    def pointer(x):
        return 0 if x is None else x.data_ptr()

    def strided(x):
        assert x.stride(3) == 1
        return [x.data_ptr(), *(s * x.element_size() for s in x.stride()[:3])]

    def coded(codes, codebook, layout_id):
        assert codebook.is_contiguous()
        return [codes.data_ptr(), codebook.data_ptr(), *codebook.shape[2:], layout_id, 64 * codes.shape[2]]

    call = [
        B, H, D, n, {torch.bfloat16: 1, torch.float16: 2}[q.dtype], *strided(q), *strided(k), *strided(v),
        *coded(k_codes, k_codebook, k_layout), *coded(v_codes, v_codebook, v_layout), pointer(inverse),
        pointer(inv_freq) if framed else 0, inv_freq.numel() if framed else 0, frame_tokens, interleaved,
        *map(pointer, (k_ring, v_ring, k_sinks, v_sinks)), k_ring.shape[2], k_sinks.shape[2],
        *map(pointer, (clock, start, origin, mask)), 0 if mask is None else mask.shape[3], *map(pointer, (out, lse)),
        G, splits, rows, multiprocessors, frames, *map(pointer, (prepared, partials)),
    ]  # fmt: skip
    assert kernel((ctypes.c_int64 * len(call))(*map(int, call)), ctypes.c_float(scale)) == 0
    return out, lse


@pytest.fixture
def check(kernels, monkeypatch):
    def check(*, n=1, group=1, rows=4, splits=1, multiprocessors=132, mask=None, tables="", schedules=(), **options):
        monkeypatch.setenv("MILLION_GPU_TABLES", tables) if tables else None
        defaults = dict(dtype=torch.float16, head_dim=128, heads=4 if n * group < 3 else 2, layouts=(2, 3))
        layer = make_layer(**(defaults | options))
        args = layer.attention_args(*layer.new_tokens(n, group), mask)
        library = kernels(tables)
        out, lse = attend(library.emulated_attention, args, splits, rows, multiprocessors)
        for seed in schedules:
            library.emulated_schedule(seed)
            again = attend(library.emulated_attention, args, splits, rows, multiprocessors)
            library.emulated_schedule(0)
            assert torch.equal(again[0], out) and torch.equal(again[1], lse)
        plain, _ = reference.pq_attention_lse(*args, decoded=torch.float16)
        truth, true_lse = oracle.attention(*args)
        error, bound = ((x.double() - truth).norm() for x in (out, plain))
        assert error <= FACTOR * bound + 1e-6 * truth.norm()
        seen = true_lse > -float("inf")
        assert torch.equal(lse > -float("inf"), seen)
        torch.testing.assert_close(lse[seen], true_lse[seen].float(), rtol=2e-3, atol=2e-2)

    return check


# Query heads of a KV head, rows of a block.
ROWS = [(1, 4), (2, 4), (3, 4), (4, 4), (6, 4), (7, 8), (8, 8), (11, 16), (16, 16), (16, 8)]


@pytest.mark.parametrize("past", [0, 1, 33, 64, 129, 400])
@pytest.mark.parametrize(("group", "rows"), ROWS)
def test_rows(check, past, group, rows):
    check(past=past, group=group, rows=rows, splits=1 + past // 200)


@pytest.mark.parametrize(
    ("head_dim", "k_dim", "v_dim"), [(D, k, v) for D, shapes in SUBSPACES.items() for k, v in shapes]
)
@pytest.mark.parametrize(("group", "rows"), [(1, 4), (4, 4), (8, 8), (16, 16)])
def test_head_dims_and_subspaces(check, head_dim, k_dim, v_dim, group, rows):
    check(
        past=333, group=group, rows=min(rows, 8 if head_dim > 128 else 16), head_dim=head_dim, k_dim=k_dim, v_dim=v_dim
    )


@pytest.mark.parametrize("splits", [2, 3, 5, 20])
@pytest.mark.parametrize(
    ("group", "rows", "head_dim"), [(1, 4, 128), (4, 4, 128), (8, 8, 128), (16, 16, 128), (9, 8, 128), (8, 8, 256)]
)
def test_splits(check, splits, group, rows, head_dim):
    """Of clusters, which merge by themselves, and of more blocks, of which some have nothing to do."""
    check(past=700, group=group, rows=rows, splits=splits, head_dim=head_dim, frame_tokens=256)


@pytest.mark.parametrize("frame_tokens", [0, 1, 48, 100])
@pytest.mark.parametrize(
    ("group", "rows", "head_dim"), [(1, 4, 128), (4, 4, 128), (8, 8, 128), (16, 16, 128), (8, 8, 256)]
)
def test_frames(check, frame_tokens, group, rows, head_dim):
    check(past=460, group=group, rows=rows, head_dim=head_dim, frame_tokens=frame_tokens, shift=6000)


@pytest.mark.parametrize(
    ("transform", "rotary", "interleaved"), [(False, None, False), (True, 64, True), (True, 0, False)]
)
@pytest.mark.parametrize(("group", "rows"), [(4, 4), (8, 8), (16, 16)])
def test_transform_and_rotation(check, transform, rotary, interleaved, group, rows):
    check(past=300, group=group, rows=rows, transform=transform, rotary=rotary, interleaved=interleaved)


@pytest.mark.parametrize(("recent", "sinks"), [(0, 0), (1, 40), (200, 4)])
@pytest.mark.parametrize(("n", "group", "rows"), [(3, 1, 4), (4, 2, 8), (4, 4, 16), (5, 4, 16), (3, 4, 4)])
def test_windows_and_new_tokens(check, recent, sinks, n, group, rows):
    check(past=350, recent=recent, sinks=sinks, n=n, group=group, rows=rows, splits=2)


@pytest.mark.parametrize("start", [1, 63, 100, 149, 152])
@pytest.mark.parametrize(("group", "rows"), [(1, 4), (2, 8), (4, 16)])
def test_padding(check, start, group, rows):
    check(past=150, batch=2, start=[start, 3], n=4, group=group, rows=rows, splits=2)


@pytest.mark.parametrize("density", [0.02, 0.5])
@pytest.mark.parametrize(("group", "rows"), [(2, 4), (2, 8), (2, 16)])
def test_masks_with_holes(check, density, group, rows):
    check(past=350, batch=2, start=[0, 9], n=6, group=group, rows=rows, mask=torch.rand(2, 1, 6, 400) < density)


@pytest.mark.parametrize("tables", ["wide", "single", "narrow"])
@pytest.mark.parametrize(("group", "rows"), [(1, 4), (4, 4), (8, 8)])
def test_tables(check, tables, group, rows):
    check(past=400, group=group, rows=rows, splits=2, tables=tables)


@pytest.mark.parametrize(("group", "rows"), [(4, 4), (8, 8), (16, 16)])
def test_bfloat16(check, group, rows):
    check(past=333, group=group, rows=rows, dtype=torch.bfloat16)


@pytest.mark.parametrize(("start", "multiprocessors"), [([0, 0], 1), ([0, 170], 1), ([30, 0, 200], 2)])
@pytest.mark.parametrize("frame_tokens", [64, 48])
def test_rows_of_the_batch_that_share_a_block(check, start, multiprocessors, frame_tokens):
    check(past=200, batch=len(start), heads=1, start=start, multiprocessors=multiprocessors, frame_tokens=frame_tokens)


SHAPES = [
    (1, 4, 128),
    (2, 4, 128),
    (4, 4, 128),
    (8, 8, 128),
    (16, 16, 128),
    (4, 4, 256),
    (8, 8, 256),
]  # group, rows, head_dim


@pytest.mark.parametrize(
    ("group", "rows", "head_dim", "batch", "splits"),
    [(*shape, 1, splits) for shape in SHAPES for splits in (1, 3)] + [(1, 4, 128, 2, 1)],
)
@pytest.mark.parametrize("frame_tokens", [48, 512])
def test_any_order_of_warps(check, group, rows, head_dim, batch, splits, frame_tokens):
    """Bit for bit the same; two rows of the batch share the last one's block."""
    check(
        past=1500, group=group, rows=rows, head_dim=head_dim, splits=splits, batch=batch, heads=1, frame_tokens=frame_tokens,
        multiprocessors=1 if batch > 1 else 132, schedules=range(1, 6),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "tokens", "rows", "splits"),
    [
        ((1, 8, 4, 128), 2048, 4, {8}),
        ((1, 8, 4, 128), 4096, 4, {8}),
        ((1, 8, 4, 128), 8192, 4, {14, 15}),
        ((1, 8, 4, 128), 16384, 4, {15, 16}),
        ((1, 8, 4, 128), 32768, 4, {15}),
        ((1, 8, 4, 128), 1 << 20, 4, {16}),
        ((1, 4, 4, 128), 2048, 4, {8}),
        ((1, 4, 4, 128), 8192, 4, {16}),  # a cluster
        ((1, 3, 3, 64), 2048, 4, {8}),
        ((1, 3, 3, 64), 8192, 4, {16}),
        ((1, 3, 3, 64), 32768, 4, {32}),
        ((8, 8, 4, 128), 32768, 4, {2}),
        ((8, 32, 1, 128), 32768, 4, {1}),
        ((1, 4, 4, 128), 32768, 4, set(range(28, 33))),  # 33 would take every multiprocessor
        ((1, 3, 3, 64), 131072, 4, {42, 43}),
        ((1, 8, 2, 256), 2048, 4, {7}),
        ((1, 8, 2, 256), 8192, 4, {7}),
        ((1, 2, 4, 256), 32768, 4, set(range(28, 33))),
        ((8, 4, 8, 128), 32768, 8, {4}),
        ((1, 4, 8, 128), 2048, 4, {8}),
        ((1, 4, 8, 128), 12288, 8, {16}),
        ((1, 4, 8, 128), 131072, 8, {30, 31, 32}),
        ((8, 4, 8, 128), 1024, 8, {3}),
        ((8, 4, 16, 128), 2048, 16, {4}),
        ((8, 4, 16, 128), 32768, 16, {4}),
        ((1, 8, 8, 128), 8192, 8, {14}),
        ((1, 4, 16, 128), 8192, 8, {8}),
        ((1, 8, 16, 128), 8192, 16, {13}),
        ((1, 4, 16, 128), 32768, 16, set(range(27, 32))),
        ((1, 8, 16, 128), 131072, 16, {15, 16}),
        ((1, 2, 8, 256), 2048, 4, set(range(8, 12))),
        ((8, 2, 8, 256), 4096, 8, {4}),
        ((8, 2, 8, 256), 32768, 8, {4}),
    ],
)
def test_what_was_measured_to_be_fast(kernels, shape, tokens, rows, splits):
    """Query rows of a block and splits, of 132 multiprocessors: the choices of csrc/cuda/attention_plan.h that NOTES.md has times for."""
    B, H, group, D = shape
    of_block, of_row = divmod(
        kernels("").emulated_plan(*map(ctypes.c_int64, (B, H, D, 4 if D == 64 else 2, group, tokens))), 1000
    )
    assert of_block == rows and of_row in splits


def test_shared_memory_that_python_counts_with(kernels):
    assert all(dispatch.mma_scratch(D) == kernels("").emulated_scratch_bytes(ctypes.c_int64(D)) for D in SUBSPACES)
