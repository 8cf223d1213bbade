"""Peers against what their papers say: formulas written anew here, optimality, bits; and the harness against `evaluate`."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from million_cache import Codebooks
from million_cache.calibration.windowed import windowed_attention
from million_cache.evaluate import evaluate
from million_cache.models import Rotation
from million_cache.peers import EQUAL, PEERS, Peer, Quantised, Tokens, Window
from million_cache.peers.base import Sample, lloyd_1d, nearest, turn
from million_cache.peers.compare import markdown, row_title
from million_cache.peers.duo import far_attention
from million_cache.peers.floats import E2M1, e2m1, nvfp4
from million_cache.peers.harness import evaluate_peers, record
from million_cache.peers.kivi import per_channel, per_token
from million_cache.peers.kvquant import value_range
from million_cache.peers.ours import Ours
from million_cache.peers.qaq import attention_window, bits_for, find_target
from million_cache.peers.turboquant import TurboQuant, random_rotation, sphere_levels
from million_cache.peers.vector import join, lookup, split, weighted_kmeans

H, N, D = 2, 96, 64
NONE = Rotation("none")
HALF = Rotation("half", 1e4 ** -(torch.arange(D // 2) / (D // 2)))


def sample(heads=H, rows=1024, dim=D, rotation=HALF, seed=0, queries=256) -> Sample:
    """Keys and values with a few large channels, as models have, and gradients."""
    g = torch.Generator().manual_seed(seed)
    size = 1 + 9 * (torch.rand(dim, generator=g) > 0.9)
    k, v, kg, vg = (torch.randn(heads, rows, dim, generator=g) for _ in range(4))
    positions = torch.arange(rows)
    keys = turn(k * size + size, positions, rotation)
    return Sample(keys, v, positions, rotation, kg, vg, torch.randn(2 * heads, queries, dim, generator=g), dim**-0.5)


def tokens_of(s: Sample, peer: Peer, n=N, recent=8) -> Tokens:
    keys = s.keys if peer.before_rope else s.rotated_keys
    queries = s.queries[:, : s.queries.shape[1]]
    return Tokens(keys[:, :n], s.values[:, :n], torch.arange(n), queries[:, :n], s.rotated_keys[:, :n], s.scale, recent)


def calibrated(name: str, s: Sample) -> Peer:
    peer = PEERS[name]()
    peer.calibrate({0: s})
    return peer


def bits(quantised: Quantised) -> float:
    return (quantised.codes + quantised.scales + quantised.outliers) / quantised.x.numel()


# -- KIVI, int4 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [2, 4])
def test_kivi_keys_are_rounded_in_groups_of_32_tokens_of_a_channel(width):
    x = torch.randn(H, N, D) * 3
    got = per_channel(x, width, 32).x
    for h, d in ((0, 0), (1, 17), (1, 63)):
        for start in range(0, N, 32):
            group = x[h, start : start + 32, d].tolist()
            zero = float(torch.tensor(min(group)).half())
            scale = float(torch.tensor((max(group) - min(group)) / (2**width - 1)).half())
            want = [min(max(round((e - zero) / scale), 0), 2**width - 1) * scale + zero for e in group]
            torch.testing.assert_close(got[h, start : start + 32, d], torch.tensor(want), rtol=1e-5, atol=1e-5)


def test_kivi_values_are_rounded_in_groups_of_32_channels_of_a_token():
    x = torch.randn(H, N, D)
    got = per_token(x, 2, 32).x
    group = x[1, 5, 32:]
    zero, scale = group.min().half().float(), ((group.max() - group.min()) / 3).half().float()
    assert len(got[1, 5, 32:].unique()) == 4
    assert ((got[1, 5, 32:] - group).abs() <= scale / 2 + 0.01).all()
    torch.testing.assert_close(got[1, 5, 32:].min(), zero)


def test_a_last_group_that_is_not_full_has_its_own_range():
    x = torch.randn(H, 40, D)
    torch.testing.assert_close(per_channel(x, 4, 32).x[:, 32:], per_channel(x[:, 32:], 4, 8).x)


@pytest.mark.parametrize(
    "name, want",
    [
        ("kivi-2", 3.0), ("kivi-4", 5.0), ("int4-32", 5.0), ("int4-64", 4.5), ("fp8", 8.0), ("nvfp4", 4.5), ("cq-2c8b", 4.0), ("cq-4c8b", 2.0),
        ("cq-8c8b", 1.0), ("million-paper-4", 4.0), ("million-paper-2", 2.0), ("million-paper-1", 1.0), ("turboquant-4", 4.25),
        ("turboquant-2", 2.25), ("turboquant-3", 3.25),
    ],
)  # fmt: skip
def test_bits_an_element_are_those_of_the_paper(name, want):
    s = sample(rows=300)
    peer = calibrated(name, s)
    k, v = peer.quantise(0, tokens_of(s, peer))
    assert bits(k) == bits(v) == want


@pytest.mark.parametrize("name", list(PEERS))
def test_every_peer_gives_keys_and_values_back(name):
    s = sample(rows=512)
    peer = calibrated(name, s)
    tokens = tokens_of(s, peer)
    for q, x in zip(peer.quantise(0, tokens), (tokens.keys, tokens.values)):
        assert q.x.shape == x.shape
        assert q.x.isfinite().all()
        # QAQ gives tokens that nothing looks at next to no bits, and a range that large channels set.
        assert (q.x - x).square().mean() < (1.2 if "qaq" in name else 0.9) * x.square().mean()
    assert peer.codebook_bytes >= 0


# -- KVQuant ---------------------------------------------------------------------------------------------------------------


def test_scalar_lloyd_finds_the_quantiser_of_a_gaussian():
    """Max (1960): four levels for a unit Gaussian are +-0.4528 and +-1.510, with distortion 0.1175."""
    x = torch.linspace(-6, 6, 200001, dtype=torch.float64)
    levels = lloyd_1d(x, (-x.square() / 2).exp(), 4, iterations=5000)
    torch.testing.assert_close(levels, torch.tensor([-1.510, -0.4528, 0.4528, 1.510]), atol=2e-3, rtol=0)
    assert math.isclose((x.float() - levels[nearest(x.float(), levels)]).square().mul((-x.square() / 2).exp()).sum()
                        / (-x.square() / 2).exp().sum(), 0.1175, rel_tol=2e-3)  # fmt: skip


def test_fisher_weights_move_the_datatype():
    x = torch.linspace(-1, 1, 2001)
    weight = torch.where(x > 0.5, 1.0, 0.0)
    assert (lloyd_1d(x, weight, 4) > 0).sum() >= 3


@pytest.mark.parametrize("width", [2, 3, 4])
def test_kvquant_bits_at_the_shape_of_its_paper(width):
    """LLaMA-7B: 4096 channels, 1 % outliers of 32 bit: 4.32 to 4.33 bits an element for nuq4 (the paper's table 1)."""
    s = sample(heads=32, rows=512, dim=128, rotation=NONE)
    peer = calibrated(f"kvquant-{width}", s)
    quantised = peer.quantise(0, tokens_of(s, peer, n=256))
    assert abs(sum(map(bits, quantised)) / 2 - (width + 0.33)) < 0.03


def test_kvquant_outliers_are_one_percent_and_exact():
    s = sample(rows=4096)
    peer = calibrated("kvquant-3", s)
    tokens = tokens_of(s, peer, n=4096)
    k, v = peer.quantise(0, tokens)
    share = (k.x == tokens.keys).float().mean()
    assert 0.008 < share < 0.012
    assert math.isclose(k.outliers / 32 / k.x.numel(), share, rel_tol=0.05)
    flat = tokens.values.transpose(0, 1).flatten(1)
    got = v.x.transpose(0, 1).flatten(1)
    for pick in (flat.argmax(1), flat.argmin(1)):
        torch.testing.assert_close(got.gather(1, pick[:, None]), flat.gather(1, pick[:, None]))
    mask, middle, half = value_range(flat)
    assert mask.sum(1).eq(2).all()  # round(0.5 % of 128) at either end
    rest = ((flat - middle) / half)[~mask]
    assert rest.min() >= -1.0001 and rest.max() <= 1.0001
    # 8 levels for each channel, besides the outliers
    channel = k.x[0, :, 3][k.x[0, :, 3] != tokens.keys[0, :, 3]]
    assert len(channel.unique()) <= 8


def test_q_norm_keeps_mean_and_deviation():
    from million_cache.peers.kvquant import signposts

    x = torch.randn(20000).clamp(-1, 1) * 0.3 + 0.1
    posts, out = signposts(x, torch.ones_like(x), 2, q_norm=True)
    coded = out[nearest(x, posts)]
    torch.testing.assert_close(coded.mean(), x.mean(), atol=1e-3, rtol=0)
    torch.testing.assert_close(coded.std(), x.std(), atol=1e-3, rtol=0)


def test_keys_are_quantised_before_rope():
    """The same key at another position gets the same codes."""
    s = sample()
    for name in ("kvquant-4", "cq-4c8b"):
        assert calibrated(name, s).before_rope
    torch.testing.assert_close(turn(s.keys, s.positions, HALF), s.rotated_keys, atol=1e-3, rtol=1e-4)
    norm = s.k_grad.square().sum(-1)
    torch.testing.assert_close(s.key_fisher.sum(-1), norm, atol=1e-3, rtol=1e-4)


# -- CQ, MILLION as published ----------------------------------------------------------------------------------------------


def test_weighted_kmeans_ends_at_weighted_means():
    g = torch.Generator().manual_seed(1)
    points, weight = torch.randn(2, 4096, 2, generator=g), torch.rand(2, 4096, generator=g).square()
    centroids = weighted_kmeans(points, weight, 100)
    codes = torch.cdist(points, centroids).argmin(-1)
    for c in range(0, 256, 37):
        mine = codes[0] == c
        want = (weight[0, mine, None] * points[0, mine]).sum(0) / weight[0, mine].sum()
        torch.testing.assert_close(centroids[0, c], want, atol=0.03, rtol=0)

    def cost(table):
        return (weight * (lookup(points, table) - points).square().sum(-1)).sum()

    assert cost(centroids) < cost(weighted_kmeans(points, torch.ones_like(weight), 100))


def test_sub_vectors_are_neighbouring_channels():
    x = torch.arange(2 * 3 * 8.0).view(2, 3, 8)
    parts = split(x, 4)
    assert parts.shape == (4, 3, 4)
    assert torch.equal(parts[3, 2], x[1, 2, 4:])
    assert torch.equal(join(parts, 2), x)


def test_million_as_published_shares_one_set_of_codebooks():
    peer = PEERS["million-paper-2"]()
    peer.calibrate({0: sample(seed=0), 5: sample(seed=1)})
    assert torch.equal(peer.state[0][0], peer.state[5][0])
    assert torch.equal(peer.state[0][0][: D // 4], peer.state[0][0][D // 4 :])  # both heads
    assert peer.codebook_bytes == 2 * 2 * (D // 4) * 256 * 4
    assert not peer.before_rope
    assert peer.window == Window(recent=128)


# -- TurboQuant ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width, distortion", [(1, 0.36), (2, 0.117), (3, 0.03), (4, 0.009)])
def test_turboquant_reaches_the_distortion_of_its_theorem(width, distortion):
    """Theorem 1: 0.36, 0.117, 0.03, 0.009 of the squared norm at 1, 2, 3, 4 bits, whatever the vector."""
    dim = 128
    levels = sphere_levels(dim, width)
    x = torch.zeros(500, dim)
    x[:, 0] = 5.0
    x[:250, 1] = -3.0
    total = 0.0
    for seed in range(4):
        rotation = random_rotation(dim, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(dim), atol=1e-5, rtol=0)
        norm = x.norm(dim=1, keepdim=True)
        turned = x / norm @ rotation.T
        total += ((levels[nearest(turned, levels)] @ rotation * norm - x) / norm).square().sum(1).mean().item() / 4
    assert abs(total / distortion - 1) < 0.15


def test_qjl_makes_inner_products_unbiased():
    q, k = torch.randn(D), torch.randn(1, 1, D)
    levels = {1: sphere_levels(D, 1), 2: sphere_levels(D, 2)}
    found = []
    for seed in range(300):
        peer, g = TurboQuant(2, qjl=True), torch.Generator().manual_seed(seed)
        peer.levels = levels
        peer.state[0] = (random_rotation(D, g), random_rotation(D, g), torch.randn(D, D, generator=g))
        found.append(peer.quantise(0, Tokens(k, k, torch.arange(1), k, k, 1.0, 1))[0].x[0, 0] @ q)
    found = torch.stack(found)
    assert abs(found.mean() - q @ k[0, 0]) < 4 * found.std() / math.sqrt(300)
    assert TurboQuant(3, qjl=True).name == "turboquant-3-qjl"


# -- small floats ----------------------------------------------------------------------------------------------------------


def test_e2m1_rounds_to_the_nearest_and_ties_to_even():
    x = torch.linspace(-7, 7, 5001)
    grid = torch.cat((-E2M1.flip(0), E2M1))
    want = (x.clamp(-6, 6)[:, None] - grid).abs().amin(1)
    torch.testing.assert_close((e2m1(x) - x.clamp(-6, 6)).abs(), want)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert e2m1(ties).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]  # even mantissas
    assert torch.equal(e2m1(-ties), -e2m1(ties))


def test_nvfp4_has_a_scale_for_every_16_channels():
    x = torch.randn(3, 5, 64)
    scale = x.abs().max() / (6 * 448)
    got = nvfp4(x, scale)
    for start in range(0, 64, 16):
        block = x[1, 2, start : start + 16]
        step = (block.abs().max() / 6 / scale).to(torch.float8_e4m3fn).float() * scale
        torch.testing.assert_close(got[1, 2, start : start + 16], e2m1(block / step) * step)
    assert ((got - x).abs() <= x.abs().amax() / 6 * 1.1).all()
    assert not nvfp4(torch.zeros(1, 1, 16), scale).any()


def test_fp8_is_e4m3_with_the_layers_scale():
    s = sample()
    peer = calibrated("fp8", s)
    k, _ = peer.quantise(0, tokens_of(s, peer))
    x = s.rotated_keys[:, :N]
    normal = x.abs() > s.rotated_keys.abs().max() / 448 * 2**-6
    assert ((k.x - x).abs()[normal] <= x.abs()[normal] * 2**-4 * 1.001).all()  # 3 bits of mantissa


# -- QAQ -------------------------------------------------------------------------------------------------------------------


def test_qaq_sees_what_the_window_gives_a_token():
    recent, T = 5, 20
    q, k = torch.randn(4, T, D), torch.randn(2, T, D)
    top, move = attention_window(q, k, 0.3, recent)
    for j in (0, 7, 19):
        most, moved = 0.0, 0.0
        for i in range(j, min(j + recent, T)):
            for h in range(4):
                a = (q[h, i] @ k[h // 2, : i + 1].T * 0.3).softmax(0)
                jacobian = torch.diag(a) - a[:, None] * a[None]
                most, moved = max(most, a[j].item()), max(moved, jacobian[:, j].abs().max().item())
        assert math.isclose(top[j], most, rel_tol=1e-4)
        assert math.isclose(move[j], moved, rel_tol=1e-3)


def test_qaq_gives_the_bits_that_the_error_asks_for():
    span, seen = torch.rand(500) * 4, torch.rand(500)
    target = find_target(seen, span, 3.0)
    got = bits_for(seen, span, target)
    assert abs(got.mean() - 3) < 0.05
    # With n bits the largest error of round-to-nearest is span / (2 (2^n - 1)), which must be at most target / seen.
    error = span / (2 * (2**got - 1))
    assert (error <= target / seen * 1.0001).all()
    fewer = span / (2 * (2 ** (got - 1) - 1))
    assert (fewer[got > 1] >= target / seen[got > 1] * 0.999).all()


def test_qaq_bits_are_counted_token_by_token():
    s = sample()
    peer = calibrated("qaq-3", s)
    k, v = peer.quantise(0, tokens_of(s, peer, n=256, recent=128))
    assert abs((k.codes + v.codes) / k.x.numel() / 2 - 3) < 0.5
    assert k.scales == v.scales == (16 + 16 + 4) * 256
    assert k.outliers == 2 * 32 * 256


# -- DuoAttention ----------------------------------------------------------------------------------------------------------


def test_duo_keeps_half_of_the_heads():
    s = sample(heads=4, queries=400)
    peer = calibrated("duo-50", s)
    k, _ = peer.quantise(0, tokens_of(s, peer))
    assert k.dropped.sum() == 2
    assert bits(k) == 8
    far = far_attention(s.queries, s.rotated_keys[:, :400], s.scale, peer.window)
    assert set(far.topk(2).indices.tolist()) == set((~k.dropped).nonzero()[:, 0].tolist())


# -- windows and the harness -----------------------------------------------------------------------------------------------


def test_windows_by_hand():
    assert Window(recent=3).first_exact(6).tolist() == [0, 0, 0, 1, 2, 3]
    assert Window().first_exact(3).tolist() == [1, 2, 3]
    assert Window(k_block=4).first_exact(10, 4).tolist() == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]
    assert EQUAL.exact_tokens(2048) == 132
    assert Window(recent=128, k_block=128).exact_tokens(2048) == 128
    assert Window().exact_tokens(10) == 0


@pytest.mark.parametrize(
    "window", [Window(2, 7), Window(), Window(0, 300), Window(3, 5, k_block=16), Window(0, 0, k_block=32, v_block=32)]
)
@pytest.mark.parametrize("drop", [False, True])
def test_each_query_sees_its_window(window, drop):
    T = 300  # more than a block of queries
    q, k, v, kq, vq = (torch.randn(n, T, 8) for n in (4, 2, 2, 2, 2))
    kq[:, : window.sinks], vq[:, : window.sinks] = k[:, : window.sinks], v[:, : window.sinks]
    dropped = torch.tensor([False, True]) if drop else None
    first = (window.first_exact(T, x) for x in (window.k_block, window.v_block))
    got = windowed_attention(q, k, v, kq, vq, *first, 0.5, dropped, window.sinks)
    for i in (0, 1, 31, 32, 255, 256, 299):
        first_k = i - i % window.k_block if window.k_block else max(0, i + 1 - window.recent)
        first_v = i - i % window.v_block if window.v_block else max(0, i + 1 - window.recent)
        for h in range(4):
            g = h // 2
            keys, values = torch.cat((kq[g, :first_k], k[g, first_k : i + 1])), torch.cat((vq[g, :first_v], v[g, first_v : i + 1]))  # fmt: skip
            scores = keys @ q[h, i] * 0.5
            if drop and g == 1:
                scores[window.sinks : first_k] = -math.inf
            torch.testing.assert_close(
                got[h, i], (scores.softmax(0) @ values).nan_to_num(), atol=1e-4, rtol=1e-4, equal_nan=True
            ) if scores.isfinite().any() else None


@pytest.fixture(scope="module")
def parts(tokens):
    return tokens[:320].view(2, 160)


@pytest.fixture(scope="module")
def recorded(model, tokens):
    return record(model, tokens[2000:3024].view(4, 256), fisher=True)


def test_our_codes_in_the_harness_score_as_in_evaluate(model, books, parts):
    peer = Ours(books)
    (got,) = evaluate_peers(model, [(peer, peer.window)], parts)
    want = evaluate(model, books, parts)
    assert want["kl"] > 1e-3
    assert math.isclose(got["kl"], want["kl"], rel_tol=1e-3)
    assert math.isclose(got["perplexity"], want["perplexity"], rel_tol=1e-5)
    assert got["bits_per_element"] == want["bits_per_element"]
    assert abs(got["top1"] - want["top1"]) < 0.01


def test_a_peer_that_loses_nothing_scores_nothing(model, parts):
    class Exact(Peer):
        before_rope = True

        def quantise(self, layer, tokens):
            return Quantised(tokens.keys, 16 * tokens.keys.numel()), Quantised(
                tokens.values, 16 * tokens.values.numel()
            )

    (got,) = evaluate_peers(model, [(Exact(), Window())], parts)
    assert abs(got["kl"]) < 1e-6 and got["top1"] == 1 and got["bits_per_element"] == 16


def test_fisher_is_the_gradient_of_the_loss(model, tokens):
    """By a finite difference in one value of one layer."""
    ids = tokens[:64].view(1, 64)
    got = record(model, ids, fisher=True)[1].v_grad
    head, slot, channel = (int(x) for x in torch.unravel_index(got.abs().argmax(), got.shape))

    def loss(shift: float) -> float:
        def moved(module, args, out):
            out = out.clone()
            out[0, slot, head * got.shape[2] + channel] += shift
            return out

        hook = model.model.layers[1].self_attn.v_proj.register_forward_hook(moved)
        try:
            with torch.no_grad():
                logits = model(ids).logits[0].double()
                return torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum").item()
        finally:
            hook.remove()

    want = (loss(1e-2) - loss(-1e-2)) / 2e-2
    assert math.isclose(got[head, slot, channel].item(), want, rel_tol=1e-2)
    assert all(p.requires_grad for p in model.parameters())


def test_a_window_shorter_than_a_group_is_refused(model, parts):
    with pytest.raises(ValueError, match="32 tokens together"):
        evaluate_peers(model, [(PEERS["kivi-2"](), Window(recent=8))], parts)


def test_more_bits_lose_less(model, parts, recorded):
    window = Window(sinks=4, recent=32)
    order = (("kivi-4", "kivi-2"), ("turboquant-4", "turboquant-2"), ("kvquant-4", "kvquant-2"))
    for better, worse in order:
        rows = evaluate_peers(model, [(PEERS[better](), window), (PEERS[worse](), window)], parts, recorded)
        assert rows[0]["kl"] < rows[1]["kl"]


# -- the program -----------------------------------------------------------------------------------------------------------


def test_compare_writes_table_json_and_picture(million, model_dir, books_dir, tmp_path):
    out = tmp_path / "quality"
    args = ("compare", "--model", model_dir, "--tokens", 512, "--context", 256, "--chunks", 1, "--out", out)
    result = million(*args, "--peer", "kivi-2", "--peer", "fp8", "--codebooks", books_dir)
    assert result.exit_code == 0, result.stderr
    got = json.loads((tmp_path / "quality.json").read_text())
    assert {(x["peer"], x["window"]) for x in got["rows"]} == {
        ("kivi-2", "equal"), ("kivi-2", "own"), ("fp8", "equal"), ("fp8", "own"), ("million tiny-1bit", "own"),
    }  # fmt: skip
    assert (tmp_path / "quality.png").read_bytes()[:4] == b"\x89PNG"
    table = (tmp_path / "quality.md").read_text()
    assert "| kivi-2 | 3.0" in table
    # Another run of the same settings adds to it.
    result = million(*args, "--peer", "nvfp4", "--window", "equal", "--codebooks", "none")
    assert result.exit_code == 0, result.stderr
    rows = json.loads((tmp_path / "quality.json").read_text())["rows"]
    assert len(rows) == 6
    assert [x["bits_per_element"] for x in rows] == sorted((x["bits_per_element"] for x in rows), reverse=True)
    assert markdown(got) == table


def test_compare_keeps_tuned_codebooks_apart(million, model_dir, books_dir, tmp_path):
    """In rows of their own, with how they were made; every row has the versions that it was measured with."""
    books = Codebooks.from_pretrained(books_dir)
    tuned = tmp_path / books_dir.name  # the same name
    made = {"tokens": 4096, "text": "texts/other.txt", "text_sha256": "0" * 64, "finetune_steps": 10}
    replace(books, provenance=made).save_pretrained(tuned)
    args = ("compare", "--model", model_dir, "--tokens", 512, "--context", 256, "--chunks", 1, "--peer", "none")
    args += ("--out", tmp_path / "quality")
    assert million(*args, "--codebooks", books_dir).exit_code == 0
    before = json.loads((tmp_path / "quality.json").read_text())
    before["versions"] = before["rows"][0].pop("versions") | {"torch": "2.10.0"}  # as it was until November 2026
    (tmp_path / "quality.json").write_text(json.dumps(before))
    result = million(*args, "--codebooks", tuned)
    assert result.exit_code == 0, result.stderr
    rows = {x["peer"]: x for x in json.loads((tmp_path / "quality.json").read_text())["rows"]}
    assert set(rows) == {"million tiny-1bit", "million tiny-1bit, tuned"}
    assert rows["million tiny-1bit"]["versions"]["torch"] == "2.10.0"
    assert rows["million tiny-1bit, tuned"]["versions"]["torch"] == torch.__version__
    assert "- million tiny-1bit, tuned: 4096 tokens of `other.txt`, 10 steps" in (tmp_path / "quality.md").read_text()
    mixed = replace(books.config, allocation=[(4, 8)]).to_dict()
    assert row_title("2bit", mixed, made) == "million 2bit, bits by layer, tuned"


def test_compare_reads_its_own_older_files(million, model_dir, books_dir, tmp_path):
    """A tuned row of before, without that in its name, is replaced and not doubled; sources of a mix keep their names; the plot
    takes tuned rows, and several of one width."""
    books = Codebooks.from_pretrained(books_dir)
    made = {"tokens": 4096, "text": "/a/one.txt + dataset:org/name", "text_sha256": "0" * 64, "finetune_steps": 10}
    window = {"sink_tokens": 4, "recent_tokens": 128}  # the one that is drawn
    for name in ("1bit", "other"):
        config = replace(books.config, **window)
        replace(books, provenance=made, config=config).save_pretrained(tmp_path / name)
    args = ("compare", "--model", model_dir, "--tokens", 512, "--context", 256, "--chunks", 1, "--peer", "none")
    args += ("--out", tmp_path / "quality", "--codebooks", tmp_path / "1bit", "--codebooks", tmp_path / "other")
    assert million(*args).exit_code == 0
    before = json.loads((tmp_path / "quality.json").read_text())
    for row in before["rows"]:
        row["peer"] = row["peer"].removesuffix(", tuned")
    (tmp_path / "quality.json").write_text(json.dumps(before))
    assert million(*args).exit_code == 0
    rows = json.loads((tmp_path / "quality.json").read_text())["rows"]
    assert [x["peer"] for x in rows] == ["million 1bit, tuned", "million other, tuned"]
    assert all(x["window"] == "equal" and x["kl"] > 0 for x in rows)
    assert "4096 tokens of `one.txt + dataset:org/name`, 10 steps" in (tmp_path / "quality.md").read_text()
    (tmp_path / "quality.json").write_text(json.dumps(before | {"rows": ["text"]}))
    result = million(*args)
    assert result.exit_code == 1 and "is not the result of an earlier comparison" in result.stderr


def test_compare_refuses_what_it_does_not_know(million, model_dir, tmp_path):
    result = million("compare", "--model", model_dir, "--out", tmp_path / "q", "--peer", "nonsense")
    assert result.exit_code == 1
    assert "kivi-2" in result.stderr
