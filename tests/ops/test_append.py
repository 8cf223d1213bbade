"""`pq_append_` against the reference, the packed layouts, and the conventions about positions."""

import pytest
import torch

from million_ops import LAYOUTS, layout_by_id, pack, pq_append_, pq_encode, reference, unpack
from million_ops.layout import HEAD_DIMS, SUBSPACE_DIMS
from tests.ops import oracle
from tests.ops.layer_state import LAYOUT_PAIRS, make_layer

ops = torch.ops.million_ops


def clear_codebooks(layer):
    """Centroids on a coarse grid, far apart: the rounding of a rotation cannot change a code."""
    for side in "kv":
        H, _, S, d = layer.codebooks[f"{side}_codebook"].shape
        cells = torch.arange(256)
        digits = [cells // 16**i % 16 if d == 2 else cells // 4**i % 4 if d == 4 else cells >> i & 1 for i in range(d)]
        grid = torch.stack(digits, -1).float() - 0.5
        layer.codebooks[f"{side}_codebook"] = grid[None, :, None].expand(H, 256, S, d).half().contiguous()
    return layer


# The tensor core layouts are for 16-bit models.
DTYPE_OF = {(0, 0): torch.float32, (1, 1): torch.float32, (2, 3): torch.bfloat16}


def assert_same_buffers(a, b):
    for name, x in a.buffers.items():
        assert torch.equal(x.nan_to_num(7), b.buffers[name].nan_to_num(7)), name


def assert_matches_reference(layer, n, offset=0):
    _, k, v = layer.new_tokens(n)
    plain = layer.clone()
    reference.pq_append_(*plain.append_args(k, v, offset))
    clock = layer.clock.clone()
    ops.pq_append_(*layer.append_args(k, v, offset))
    assert torch.equal(layer.clock, clock)
    # A code may differ where two centroids are equally near to rounding; everything else is equal bit for bit.
    for name in ("k_codes", "v_codes"):
        written = (
            k.shape[0]
            * k.shape[1]
            * n
            * plain.buffers[name].shape[3]
            / layout_by_id(layer.layouts[name == "v_codes"]).tile_tokens
        )
        assert (layer.buffers[name] != plain.buffers[name]).sum() <= 1 + 1e-3 * written
        plain.buffers[name] = layer.buffers[name]
    assert_same_buffers(layer, plain)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("d", SUBSPACE_DIMS)
@pytest.mark.parametrize("layouts", LAYOUT_PAIRS, ids=str)
@pytest.mark.parametrize("n", [1, 5, 90])
def test_matches_the_reference(head_dim, d, layouts, n):
    if layouts[0] == 2 and head_dim // d % 8:
        pytest.skip("these layouts pack multiples of 8 subspaces")
    layer = make_layer(
        past=100, batch=2, head_dim=head_dim, k_dim=d, v_dim=d, layouts=layouts, start=[0, 98], capacity=200,
        dtype=DTYPE_OF[layouts],
    )  # fmt: skip
    assert_matches_reference(layer, n)


@pytest.mark.parametrize("head_dim, rotary", [(8, 2), (16, 6), (32, 32), (40, 18), (80, 78), (112, 112), (200, 6)])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("n", [1, 64, 131])
def test_other_head_dims_and_odd_halves(head_dim, rotary, interleaved, n):
    layer = make_layer(past=70, head_dim=head_dim, rotary=rotary, interleaved=interleaved, layouts=(1, 1), capacity=300)
    assert_matches_reference(layer, n)


@pytest.mark.parametrize("past", [0, 1, 15, 16, 17, 63, 64, 65])
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 64, 65, 130])
def test_lengths(past, n):
    assert_matches_reference(make_layer(past=past, heads=1), n)


@pytest.mark.parametrize("options", [
    {"transform": False}, {"rotary": 0}, {"rotary": 32}, {"rotary": 16, "interleaved": True}, {"frame_tokens": 0},
    {"frame_tokens": 48}, {"recent": 0}, {"sinks": 0}, {"recent": 1}, {"dtype": torch.bfloat16}, {"dtype": torch.float16},
    {"shift": 6000}, {"k_dim": 2, "v_dim": 8}, {"batch": 3, "start": [0, 50, 10]},
], ids=str)  # fmt: skip
def test_options(options):
    assert_matches_reference(make_layer(past=40, **options), 30)


@pytest.mark.parametrize("capacity", [100, 128])
@pytest.mark.parametrize("layouts", LAYOUT_PAIRS, ids=str)
@pytest.mark.parametrize("n", [1, 40, 200])
@pytest.mark.parametrize("past", [90, 127, 128, 500])
def test_tokens_behind_the_buffers_are_dropped(capacity, layouts, n, past):
    layer = make_layer(past=90, capacity=capacity, layouts=layouts, dtype=DTYPE_OF[layouts])
    layer.clock[:2] = past
    assert_matches_reference(layer, n)


def test_offset_continues_a_forward():
    """Three appends with an offset are one append."""
    layer = make_layer(past=30)
    _, k, v = layer.new_tokens(70)
    whole = layer.clone()
    pq_append_(*whole.append_args(k, v)[:15], frame_tokens=64, k_layout=layer.layouts[0], v_layout=layer.layouts[1])
    for a, b in ((0, 1), (1, 33), (33, 70)):
        ops.pq_append_(*layer.append_args(k[:, :, a:b], v[:, :, a:b], offset=a))
    assert_same_buffers(layer, whole)


@pytest.mark.parametrize("layouts", LAYOUT_PAIRS, ids=str)
@pytest.mark.parametrize("d", SUBSPACE_DIMS)
def test_layout_is_the_one_that_python_describes(layouts, d):
    """Codes that C++ packed, unpacked in Python, are `pq_encode`'s of the same vectors; the rest stays as it was."""
    layer = make_layer(past=0, capacity=150, transform=False, frame_tokens=0, k_dim=d, v_dim=d, layouts=layouts,
                       dtype=DTYPE_OF[layouts])  # fmt: skip
    for name in ("k_codes", "v_codes"):
        layer.buffers[name].fill_(201)
    layer.clock[:2] = 20
    _, k, v = layer.new_tokens(77)
    ops.pq_append_(*layer.append_args(k, v))
    for x, side, layout in zip((k, v), "kv", layouts):
        plain = unpack(layer.buffers[f"{side}_codes"], layout_by_id(layout), 64 // d)
        assert torch.equal(plain[:, :, 20:97], pq_encode(x, layer.codebooks[f"{side}_codebook"]))
        assert (plain[:, :, :20] == 201).all() and (plain[:, :, 97:] == 201).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: x.name)
@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 200])
@pytest.mark.parametrize("subspaces", [8, 12, 64])
def test_pack_and_unpack(layout, tokens, subspaces):
    if subspaces % layout.subspace_step:
        pytest.skip("the layout packs other numbers of subspaces")
    codes = torch.randint(0, 256, (2, 3, tokens, subspaces), dtype=torch.uint8)
    packed = pack(codes, layout, tokens + 70)
    assert packed.shape == layout.packed_shape(2, 3, tokens + 70, subspaces) and packed.is_contiguous()
    plain = unpack(packed, layout, subspaces)
    assert torch.equal(plain[:, :, :tokens], codes) and (plain[:, :, tokens:] == 0).all()
    assert (
        layout.permutation(subspaces, codes.device).flatten().sort()[0] == torch.arange(layout.tile_tokens * subspaces)
    ).all()


@pytest.mark.parametrize("start", [0, 1, 100])
@pytest.mark.parametrize("shift", [0, 6000])
@pytest.mark.parametrize("interleaved", [False, True])
def test_same_codes_for_any_padding_and_position(start, shift, interleaved):
    """A key's codes depend on its offset in the frame, not on the row's padding nor on a shift of all positions.

    Keys as a model gives them, rotated by their true position (slot - start + shift). The wrong convention
    (t_f = f F without the origin) turns them by start or shift and changes nearly all codes.
    """
    tokens, F = 200, 64
    layer = clear_codebooks(
        make_layer(past=0, capacity=tokens + start, start=[start], shift=shift, frame_tokens=F, transform=False,
                   interleaved=interleaved, recent=0, sinks=0)
    )  # fmt: skip
    inv_freq = layer.codebooks["inv_freq"]
    codes = torch.randint(0, 256, (1, 2, tokens + start, 32), dtype=torch.uint8)
    in_frame = oracle.centroids_of(pack(codes, LAYOUTS[0]), 0, layer.codebooks["k_codebook"])
    # The key whose frame coordinates are these centroids stands at slot s: turned by its frame's position.
    keys = torch.empty_like(in_frame)
    for s in range(tokens + start):
        keys[:, :, s] = oracle.turn(in_frame[:, :, s], s // F * F - start + shift, inv_freq, interleaved)
    ops.pq_append_(*layer.append_args(keys.float(), torch.randn(1, 2, tokens + start, 64)))
    assert torch.equal(
        unpack(layer.buffers["k_codes"], layout_by_id(layer.layouts[0]), 32)[:, :, : tokens + start], codes
    )


def test_ring_and_sinks_keep_the_bits():
    layer = make_layer(past=0, recent=16, sinks=4, start=[7], dtype=torch.bfloat16)
    _, k, v = layer.new_tokens(50)
    ops.pq_append_(*layer.append_args(k, v))
    for new, side in ((k, "k"), (v, "v")):
        ring, sinks = layer.buffers[f"{side}_ring"], layer.buffers[f"{side}_sinks"]
        assert torch.equal(sinks, new[:, :, 7:11])
        assert torch.equal(ring[:, :, torch.arange(34, 50) % 16], new[:, :, 34:50])
