"""Calibration: the parts against their definitions, the whole on tiny models, and every refusal."""

from __future__ import annotations

import importlib.metadata
import sys
from dataclasses import replace

import pytest
import torch

from million_cache.calibration import MIN_TOKENS, calibrate, calibrate_all
from million_cache.calibration.collect import collect
from million_cache.calibration.kmeans import assign, kmeans, seed, update
from million_cache.calibration.sensitivity import DRAW, draw_tokens, measure_sensitivity, row_weights
from million_cache.calibration.train import framed_keys, spread_weights
from million_cache.calibration.transform import average_over_rotation, deal, key_transform
from million_cache.config import PQConfig, package_version
from million_cache.models import measure_rotations
from million_ops.reference import rotate
from tests.cache.conftest import no_gpu
from tests.cache.test_models import DYNAMIC, LearnedPositions
from tests.cache.tiny_models import tiny_cohere, tiny_gemma3, tiny_gptneo, tiny_gptneox, tiny_llama, tiny_smollm3

CONFIG = PQConfig(k_subspace_dim=4, v_subspace_dim=8, frame_tokens=64)
pytestmark = pytest.mark.filterwarnings("ignore:codebooks trained on")


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, (count,), generator=torch.Generator().manual_seed(seed))


def quick(model, ids=None, config=CONFIG, **kw):
    """`calibrate` on as little as it takes."""
    ids = tokens(1200) if ids is None else ids
    return calibrate(model, ids, config, **{"context": 256, "iterations": 2, "progress": False, **kw})


def spd(heads: int, dim: int, seed: int) -> torch.Tensor:
    x = torch.randn(heads, dim, 3 * dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x *= torch.logspace(-2, 2, dim, dtype=torch.float64)[:, None]  # spread like real keys
    return x @ x.transpose(1, 2) / (3 * dim)


# -- k-means --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("G", "N", "d"), [(1, 300, 2), (5, 1031, 4), (3, 700, 8)])
def test_assign_finds_the_nearest(G, N, d):
    g = torch.Generator().manual_seed(N)
    points, centroids = torch.randn(G, N, d, generator=g), torch.randn(G, 256, d, generator=g)
    codes, distance = assign(points, centroids)
    exact = (points[:, :, None].double() - centroids[:, None].double()).square().sum(-1)
    chosen = exact.gather(2, codes[..., None])[..., 0]
    torch.testing.assert_close(chosen, exact.amin(2), rtol=1e-4, atol=1e-5)  # near ties may go either way
    torch.testing.assert_close(distance.double(), chosen, rtol=1e-4, atol=1e-5)


def test_update_is_the_mean_and_revives_empty_centroids():
    points = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [9.0, 9.0]]])
    codes, distance = torch.tensor([[7, 7, 7]]), torch.tensor([[1.0, 1.0, 50.0]])
    means = update(points, codes, distance)
    torch.testing.assert_close(means[0, 7], points[0].mean(0))
    assert torch.equal(means[0, 0], points[0, 2])  # the worst-served point
    assert means.isfinite().all()


@pytest.mark.parametrize("d", [2, 4, 8])
def test_kmeans_finds_separate_clusters(d):
    g = torch.Generator().manual_seed(d)
    centres = torch.randn(4, 256, d, generator=g) * torch.tensor([1.0, 10.0, 1e-3, 1e3])[:, None, None]
    points = centres.repeat(1, 5, 1)
    found = kmeans(points, 8, torch.Generator().manual_seed(0))
    left = assign(points, found)[1].mean(1) / points.var(1).sum(-1)
    assert left.max() < 1e-2  # random points as centroids leave 0.15


def test_seeding_beats_random_points_on_heavy_tails():
    g = torch.Generator().manual_seed(0)
    points = torch.randn(8, 4096, 2, generator=g) / torch.rand(8, 4096, 1, generator=g).clamp(min=1e-2)
    random = points[:, :256]
    error = {}
    for name, centroids in (("tree", seed(points)), ("random", random)):
        for _ in range(4):
            centroids = update(points, *assign(points, centroids))
        error[name] = assign(points, centroids)[1].mean()
    assert error["tree"] < 0.7 * error["random"]


def test_kmeans_of_one_repeated_point():
    found = kmeans(torch.ones(2, 600, 4), 3, torch.Generator().manual_seed(0))
    assert torch.equal(found, torch.ones(2, 256, 4))


# -- transform ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [2, 4, 8])
def test_transform_keeps_products_and_weights_distances(d):
    covariance, weight = spd(3, 32, 1), spd(3, 32, 2)
    transform, inverse = key_transform(covariance, weight, d)
    g = torch.Generator().manual_seed(3)
    q, k = torch.randn(3, 50, 32, generator=g), torch.randn(3, 50, 32, generator=g)
    # T^-T q . T k = q . k
    products = (q @ inverse) @ (k @ transform.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(products, q @ k.transpose(1, 2), rtol=1e-3, atol=1e-3)
    # |T k|^2 is k^T W k, but for the scale of a head and the floor of the weights
    plain = (k @ transform.transpose(1, 2)).double().square().sum(-1)
    level = weight.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    floored = weight / level + 1e-3 * torch.eye(32)
    weighted = torch.einsum("hnd,hde,hne->hn", k.double(), floored, k.double())
    ratio = plain / weighted
    torch.testing.assert_close(ratio, ratio.mean(1, keepdim=True).expand_as(ratio), rtol=1e-3, atol=0)


def test_transformed_keys_are_uncorrelated_and_balanced():
    covariance, weight = spd(2, 32, 1), spd(2, 32, 2)
    transform, _ = key_transform(covariance, weight, 4)
    after = transform.double() @ covariance @ transform.double().transpose(1, 2)
    variance = after.diagonal(dim1=1, dim2=2)
    off = after - torch.diag_embed(variance)
    assert off.abs().max() < 1e-3 * variance.max()
    torch.testing.assert_close(variance.mean(1), torch.ones(2, dtype=torch.float64), rtol=1e-3, atol=0)
    products = variance.log().view(2, 8, 4).sum(-1)
    assert (products.amax(1) - products.amin(1)).max() < 0.2 * (variance.amax(1) / variance.amin(1)).log().min()


def test_deal_is_balanced_and_complete():
    order = deal(torch.tensor([128.0, 64, 32, 16, 8, 4, 2, 1]), 2)
    assert sorted(order.tolist()) == list(range(8))
    assert order.view(4, 2).sum(1).tolist() == [7, 7, 7, 7]  # largest with smallest


def test_transform_of_degenerate_moments():
    zero = torch.zeros(2, 16, 16)
    transform, inverse = key_transform(zero, zero, 2)
    assert transform.isfinite().all() and inverse.isfinite().all()
    covariance = torch.zeros(1, 16, 16)
    covariance[0, 0, 0] = 1
    transform, inverse = key_transform(covariance, covariance, 2)
    torch.testing.assert_close(transform @ inverse, torch.eye(16)[None], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("interleaved", [False, True])
def test_query_moments_averaged_over_rotation(interleaved):
    """Against the average over many positions, and the same for queries of any position."""
    g = torch.Generator().manual_seed(0)
    inv_freq = torch.tensor([1.0, 0.61, 0.37])
    q = torch.randn(1, 40, 10, generator=g)

    def moment(position: int) -> torch.Tensor:
        turned = rotate(q, torch.full((40,), position), inv_freq, interleaved)
        return turned.transpose(1, 2) @ turned

    averaged = average_over_rotation(moment(0), 6, interleaved)
    torch.testing.assert_close(averaged, average_over_rotation(moment(977), 6, interleaved), rtol=1e-4, atol=1e-3)
    many = sum(moment(p) for p in range(4000)) / 4000
    torch.testing.assert_close(averaged, many, rtol=0, atol=0.02 * many.abs().max().item())
    assert torch.equal(average_over_rotation(moment(0), 0, interleaved), moment(0))


# -- collecting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_llama, tiny_gptneox, tiny_cohere])
def test_unrotated_keys_do_not_depend_on_the_position(make):
    """Of equal tokens all keys are one key, and at offset t of a frame that key rotated by t."""
    model = make()
    rotation = measure_rotations(model)[0]
    samples, (positions,) = collect(model, [torch.full((40,), 7)], 0, torch.Generator(), lambda: None)
    still = framed_keys(samples[0].keys, positions, torch.zeros(40, dtype=torch.long), rotation)
    torch.testing.assert_close(still, samples[0].keys[:, :1].expand_as(still), rtol=1e-3, atol=1e-4)
    shifted = framed_keys(samples[0].keys, positions, torch.full((40,), 5), rotation)
    torch.testing.assert_close(shifted, samples[0].keys[:, 5:6].expand_as(shifted), rtol=1e-3, atol=1e-4)


def test_collected_rows_and_moments():
    model = tiny_llama()
    ids = tokens(50)
    samples, rows = collect(model, [ids[:30], ids[30:]], 4, torch.Generator(), lambda: None)
    assert [x.tolist() for x in rows] == [[*range(4, 30)], [*range(4, 20)]]
    assert samples[1].keys.shape == samples[1].values.shape == (2, 42, 32)
    with torch.no_grad():
        cache = model(ids[None, :30]).past_key_values
    torch.testing.assert_close(samples[1].keys[:, :26], cache.layers[1].keys[0, :, 4:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(samples[1].values[:, :26], cache.layers[1].values[0, :, 4:], rtol=1e-4, atol=1e-5)
    # Layer 0, whose queries are easily had: the group of KV head 0 is query heads 0 and 1.
    layer = model.model.layers[0]
    hidden = layer.input_layernorm(model.model.embed_tokens(ids))
    norms = layer.self_attn.q_proj(hidden).detach().view(50, 2, 2 * 32).square().sum((0, 2))
    traces = samples[0].query_moment.diagonal(dim1=1, dim2=2).sum(-1)
    torch.testing.assert_close(traces.float(), norms, rtol=1e-3, atol=0)  # rotation keeps norms


def test_collecting_is_bounded(monkeypatch):
    monkeypatch.setattr(sys.modules[collect.__module__], "SAMPLE_TOKENS", 60)
    sequences = [tokens(100, seed=i) for i in range(3)]
    samples, rows = collect(tiny_llama(), sequences, 4, torch.Generator().manual_seed(0), lambda: None)
    positions = torch.cat(rows)
    assert samples[0].keys.shape[1] == len(positions) == 60
    assert positions.min() >= 4 and positions.max() > 50


def test_the_models_attention_is_restored():
    model = tiny_llama()
    model.set_attn_implementation("eager")
    collect(model, [tokens(20)], 0, torch.Generator(), lambda: None)
    assert model.config._attn_implementation == "eager"
    model.model.layers[1].self_attn.k_proj.weight.data[40] = float("nan")
    with pytest.raises(ValueError, match="layer 1, KV head 1: the keys hold NaN or inf"):
        collect(model, [tokens(20)], 0, torch.Generator(), lambda: None)
    assert model.config._attn_implementation == "eager"


# -- sensitivity ----------------------------------------------------------------------------------------------------------


def test_sensitivity_predicts_the_kl_of_noise_on_the_keys():
    """Noise of variance s^2 along u on every quantised key of a head moves the predictions by s^2 / 2 u^T W u in all."""
    from million_cache.calibration.collect import attending
    from million_cache.calibration.windowed import windowed_attention

    model = tiny_llama()
    model.lm_head.weight.data *= 8  # predictions that something moves
    ids, recent, sinks, layer, head = tokens(120), 8, 2, 0, 1
    generator = torch.Generator().manual_seed(0)
    every = [torch.arange(120)] * 40
    moment = measure_sensitivity(model, [ids] * 40, every, range(40), recent, sinks, generator)[layer].key_moment
    assert moment.shape == (2, 32, 32) and moment.dtype == torch.float64
    u = torch.linalg.eigh(moment[head]).eigenvectors[:, -1]
    size = 0.05
    want = size**2 / 2 * (u @ moment[head] @ u).item() / 40
    noise = torch.zeros(2, 120, 32)

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        copy = key[0].clone()
        if module.layer_idx == layer:
            copy[:, sinks:] += noise[:, sinks:]
        first = (torch.arange(120) + 1 - recent).clamp(min=0)
        out = windowed_attention(query[0], key[0], value[0], copy, value[0], first, first, scaling)
        return out.transpose(0, 1)[None], None

    got = []
    with torch.no_grad(), attending(model, attention):
        dense = model(ids[None]).logits[0].log_softmax(-1)
        for _ in range(40):
            noise[head] = size * torch.randn(120, 1, generator=generator) * u.float()
            other = model(ids[None]).logits[0].log_softmax(-1)
            got.append((dense.exp() * (dense - other)).sum().item())
    assert want > 1e-5
    assert abs(sum(got) / len(got) / want - 1) < 0.4


def test_drawn_tokens_have_the_models_probabilities():
    """More rows than are looked at together; tokens of probability 0 at both ends and in the middle never come."""
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    logits = p.log().expand(40 * DRAW + 3, 6)
    got = draw_tokens(logits, torch.Generator().manual_seed(0))
    assert got.shape == (len(logits),) and got.dtype == torch.int64
    share = torch.bincount(got, minlength=6) / len(got)
    assert not share[p == 0].any()
    torch.testing.assert_close(share, p, rtol=0, atol=4 * (0.25 / len(got)) ** 0.5)
    assert torch.equal(got, draw_tokens(logits, torch.Generator().manual_seed(0)))
    assert not torch.equal(got, draw_tokens(logits, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_predictions_without_probabilities(bad):
    logits = torch.zeros(DRAW + 5, 7)
    logits[-1, 3] = bad
    with pytest.raises(ValueError, match="the model's predictions hold NaN or inf"):
        draw_tokens(logits, torch.Generator())


@no_gpu
def test_a_seed_draws_the_same_tokens_on_a_gpu():
    logits = 3 * torch.randn(300, 5000, generator=torch.Generator().manual_seed(0))
    here, there = (draw_tokens(logits.to(x), torch.Generator().manual_seed(0)).cpu() for x in ("cpu", "cuda"))
    assert (here != there).sum() <= 1  # where rounding moves a border


def test_sensitivity_ends_where_the_window_does():
    """Nothing looks at a copy that lies in its window; the model is left as it was."""
    model = tiny_llama()
    model.model.layers[0].self_attn.k_proj.weight.requires_grad_(False)
    parts, rows = [tokens(40), tokens(50)], [torch.arange(2, 40), torch.arange(2, 50)]
    got = measure_sensitivity(model, parts, rows, [0], 40, 2, torch.Generator())
    assert not got[0].key_moment.any() and not got[1].key_moment.any()
    got = measure_sensitivity(model, parts, rows, [1], 4, 2, torch.Generator())[1]
    assert got.key_gradients.shape == (2, 38 + 48, 32) and got.value_energy.shape == (2, 38 + 48)
    assert got.key_gradients[:, :38].isnan().all() and got.value_energy[:, :38].isnan().all()  # not chosen
    # The last 3 keys are in the window of every query that sees them.
    assert got.key_gradients[:, 38:-4].ne(0).all() and not got.key_gradients[:, -4:].any()
    g = got.key_gradients[:, 38:].double()
    torch.testing.assert_close(got.key_moment, g.transpose(1, 2) @ g, rtol=1e-4, atol=1e-12)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert [n for n, on in flags.items() if not on] == ["model.layers.0.self_attn.k_proj.weight"]
    assert model.config._attn_implementation == "sdpa"
    assert all(p.grad is None for p in model.parameters())


def test_row_weights_have_mean_one_and_unknown_rows_weigh_one():
    energy = torch.tensor([[1.0, 3.0, torch.nan, 0.0], [0.0, 0.0, torch.nan, 0.0]])
    got = row_weights(energy, 1.0)
    assert got[0, 2] == 1 and torch.equal(got[1], torch.ones(4))
    torch.testing.assert_close(got[0, [0, 1, 3]].mean(), torch.tensor(1.0))
    assert got[0, 1] > got[0, 0] > got[0, 3] > 0


def test_weighted_kmeans_serves_what_weighs_more():
    g = torch.Generator().manual_seed(0)
    points = torch.randn(3, 4000, 2, generator=g)
    weights = torch.where(points[..., 0] > 0, 20.0, 1.0)
    plain, weighted = (kmeans(points, 8, torch.Generator().manual_seed(0), w) for w in (None, weights))

    def cost(centroids):
        return (assign(points, centroids)[1] * weights).sum()

    assert cost(weighted) < 0.97 * cost(plain)
    codes, distance = torch.tensor([[7, 7, 9]]), torch.ones(1, 3)
    means = update(points[:1, :3], codes, distance, torch.tensor([[1.0, 3.0, 2.0]]))
    torch.testing.assert_close(means[0, 7], (points[0, 0] + 3 * points[0, 1]) / 4)
    torch.testing.assert_close(means[0, 9], points[0, 2])


def test_points_far_out_weigh_more():
    points = torch.randn(4, 4000, 2, generator=torch.Generator().manual_seed(0))
    weights = spread_weights(points, 1.0)
    plain, spread = (kmeans(points, 8, torch.Generator().manual_seed(0), w) for w in (None, weights))
    errors = [assign(points, c)[1] for c in (plain, spread)]
    far = points.norm(dim=-1) > 2
    assert errors[1][far].mean() < 0.96 * errors[0][far].mean()
    assert (errors[1] * weights).mean() < 0.95 * (errors[0] * weights).mean()
    assert errors[1].mean() < 1.05 * errors[0].mean()
    assert torch.equal(spread_weights(torch.full((1, 300, 2), 3.0), 0.5), torch.ones(1, 300))
    torch.testing.assert_close(spread_weights(7 * points + 5, 1.0), weights)


def test_without_sensitivity_the_queries_are_the_weight():
    model = tiny_llama()
    plain, weighted = quick(model, sensitivity_tokens=0), quick(model)
    assert plain.provenance["sensitivity_tokens"] == 0 and weighted.provenance["sensitivity_tokens"] == 1200
    assert not torch.equal(plain.layers[0].k_transform, weighted.layers[0].k_transform)
    wide = PQConfig(k_subspace_dim=4, v_subspace_dim=8, frame_tokens=64, recent_tokens=300)
    assert quick(model, config=wide).provenance["sensitivity_tokens"] == 0  # contexts of 256 are all window


# -- the whole ------------------------------------------------------------------------------------------------------------


def test_calibrated_codebooks_reproduce_keys_and_values(tmp_path):
    model = tiny_llama()
    books = quick(model)
    assert set(books.layers) == {0, 1} and books.fingerprint.num_layers == 2
    for i, layer in books.layers.items():
        report = books.report[i]
        assert layer.frame_tokens == 64 and not layer.rope_interleaved
        assert (report.k_distortion < 0.5 * report.k_energy).all() and (report.v_distortion < report.v_energy).all()
        eye = torch.eye(32).expand(2, 32, 32)
        torch.testing.assert_close(layer.k_transform @ layer.k_transform_inv, eye, rtol=0, atol=1e-3)
    assert books.provenance["tokens"] == 1200 and books.provenance["seed"] == 0
    books.save_pretrained(tmp_path / "books")
    again = type(books).from_pretrained(tmp_path / "books")
    assert torch.equal(again.layers[1].k_codebook, books.layers[1].k_codebook)


def test_deterministic_for_a_seed():
    model = tiny_llama()
    first, same, other = quick(model), quick(model), quick(model, seed=1)
    for i, layer in first.layers.items():
        for name, tensor in layer.tensors.items():
            assert torch.equal(same.layers[i].tensors[name], tensor), name
    assert not torch.equal(first.layers[0].k_codebook, other.layers[0].k_codebook)


def test_several_configurations_at_once_are_those_alone():
    model, other = tiny_llama(), PQConfig(k_subspace_dim=8, v_subspace_dim=4, frame_tokens=0)
    options = {"context": 256, "iterations": 2, "progress": False, "finetune_steps": 1, "seed": 5}
    ids = tokens(1200)
    both = calibrate_all(model, ids, [CONFIG, other], **options)
    for config, found in zip((CONFIG, other), both):
        alone = calibrate(model, ids, config, **options)
        assert found.config == alone.config == config
        for i, layer in alone.layers.items():
            assert all(torch.equal(found.layers[i].tensors[name], t) for name, t in layer.tensors.items())
    for configs in ([], [CONFIG, replace(CONFIG, recent_tokens=7)]):
        with pytest.raises(ValueError, match="same recent_tokens and sink_tokens"):
            calibrate_all(model, ids, configs, **options)


def test_rows_and_one_long_text_are_the_same():
    model = tiny_llama()
    ids = tokens(1280)
    flat, rows = quick(model, ids), quick(model, ids.view(5, 256))
    assert torch.equal(flat.layers[0].v_codebook, rows.layers[0].v_codebook)


def test_layers_without_rotation_have_no_frames():
    books = quick(tiny_smollm3())
    assert (books.layers[0].frame_tokens, books.layers[1].frame_tokens) == (64, 0)
    assert books.layers[1].inv_freq is None


def test_no_frames_asked_for():
    books = quick(tiny_llama(), config=PQConfig(k_subspace_dim=4, v_subspace_dim=8, frame_tokens=0))
    assert {layer.frame_tokens for layer in books.layers.values()} == {0}


def test_sliding_layers_are_left_out():
    books = quick(tiny_gemma3())
    assert set(books.layers) == {1, 3}


def test_partial_and_interleaved_rotations():
    assert quick(tiny_gptneox()).layers[0].inv_freq.numel() == 4
    assert quick(tiny_cohere()).layers[0].rope_interleaved


def test_bf16_model():
    model = tiny_llama()
    books = quick(model)
    half = quick(model.to(torch.bfloat16))
    assert books.fingerprint.matches(half.fingerprint) == []
    assert half.layers[0].k_transform.dtype == torch.float32


def test_progress_bar(capsys):
    quick(tiny_llama(), progress=True)
    assert "Training codebooks" in capsys.readouterr().out


# -- refusals -------------------------------------------------------------------------------------------------------------


def test_unknown_rotation_warns_or_raises():
    model = tiny_llama()
    model.model.embed_tokens = LearnedPositions(model.model.embed_tokens)
    model.model.embed_tokens.num_embeddings = 97
    short = {"ids": tokens(1200).view(-1, 60), "context": 60}
    with pytest.raises(ValueError, match=r"layers \[0, 1\].*frames are required"):
        quick(model, require_frames=True, **short)
    with pytest.warns(UserWarning, match="without frames"):
        books = quick(model, **short)
    assert books.layers[0].frame_tokens == 0 and books.layers[0].inv_freq is None


def test_too_few_tokens():
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"at least 1024 tokens.*got 500, give at least 1044"):
        quick(model, tokens(508))
    quick(model, tokens(1044), iterations=1)


@pytest.mark.filterwarnings("default:codebooks trained on")
def test_few_tokens_warn():
    with pytest.warns(UserWarning, match="poor; give at least 4096"):
        quick(tiny_llama(), iterations=1)


@pytest.mark.parametrize("bad", [torch.rand(2000), torch.zeros(2, 3, 500, dtype=torch.long)])
def test_tokens_of_the_wrong_kind(bad):
    with pytest.raises(ValueError, match="tokens must be integers"):
        quick(tiny_llama(), bad)


def test_tokens_outside_the_vocabulary():
    with pytest.raises(ValueError, match=r"must be in \[0, 97\), got 3 .. 200"):
        quick(tiny_llama(), torch.cat((torch.tensor([3, 200]), tokens(MIN_TOKENS * 2).clamp(max=96))))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("projection", ["q_proj", "v_proj"])
def test_activations_that_are_not_finite(projection, value):
    model = tiny_llama()
    getattr(model.model.layers[0].self_attn, projection).weight.data[-1] = value
    with pytest.raises(ValueError, match=r"layer 0, KV head 1: the (queries|values) hold NaN or inf"):
        quick(model)


def test_centroid_beyond_fp16():
    model = tiny_llama()
    model.model.layers[1].self_attn.v_proj.weight.data[:32] *= 1e6
    with pytest.raises(ValueError, match="layer 1, values, KV head 0: a centroid exceeds fp16"):
        quick(model)


def test_huge_keys_are_scaled_into_range():
    model = tiny_llama()
    model.model.layers[1].self_attn.k_proj.weight.data *= 1e6
    assert quick(model).layers[1].k_codebook.abs().max() < 1000


def test_context_beyond_the_original_length():
    with pytest.raises(ValueError, match="at most 512"):
        quick(tiny_llama(rope_parameters=DYNAMIC), tokens(3000), context=1024)


def test_model_without_the_attention_interface():
    with pytest.raises(NotImplementedError, match="AttentionInterface"):
        quick(tiny_gptneo())


def test_unsupported_model_is_refused_before_anything_runs():
    model = tiny_llama()
    model.config.attn_logit_softcapping = 30.0
    with pytest.raises(NotImplementedError, match="softcap"):
        quick(model)


def test_version_of_a_tree_that_is_not_installed(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert package_version() == "source"


@pytest.mark.parametrize(
    "around", [lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode], ids=["autocast", "inference_mode"]
)
def test_what_the_caller_is_in_changes_nothing(around):
    """Distances of k-means in bf16 were garbage, and gradients do not exist in inference mode."""
    arguments = {"config": replace(CONFIG, recent_tokens=16), "sensitivity_tokens": 512, "finetune_steps": 1}
    model = tiny_llama()
    want = quick(model, **arguments)
    with around():
        found = quick(model, **arguments)
    for i, layer in want.layers.items():
        assert all(torch.equal(x, found.layers[i].tensors[name]) for name, x in layer.tensors.items())
    assert found.fingerprint == want.fingerprint


def test_what_cannot_be_calibrated_is_said_at_once(monkeypatch):
    monkeypatch.setattr("million_cache.calibration.measure_rotations", lambda model: pytest.fail("the model has run"))
    with pytest.raises(TypeError, match=r"tokens must be a tensor of token ids, .* got list"):
        quick(tiny_llama(), [1, 2, 3])
    with pytest.raises(TypeError, match=r"must be a PQConfig, .* got '4bit'"):
        quick(tiny_llama(), config="4bit")
    with pytest.raises(ValueError, match="float32, bfloat16 or float16, got float64"):
        quick(tiny_llama().double())
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError), match="CUDA"):
            quick(tiny_llama(), device="cuda")


def test_what_is_left_out_is_said():
    """Gradients of contexts that the window covers, and bits by layer where there is one choice."""
    with pytest.warns(UserWarning, match="no context is longer than the 300 tokens that stay exact"):
        books = quick(tiny_llama(), config=replace(CONFIG, recent_tokens=300, sink_tokens=0))
    assert books.provenance["sensitivity_tokens"] == 0
    config = PQConfig(k_subspace_dim=2, v_subspace_dim=2, frame_tokens=64, recent_tokens=16)
    with pytest.warns(UserWarning, match="allocate leaves no choice at 4 bits"):
        books = quick(tiny_llama(), tokens(2000), config, allocate=True, sensitivity_tokens=512)
    assert books.provenance["allocate"] is False and not books.config.allocation
