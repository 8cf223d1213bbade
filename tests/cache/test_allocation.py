"""Bits by layer: the knapsack against trying everything, the costs against measured KL, and the codebooks in use."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import pytest
import torch

from million_cache import Codebooks, MillionStaticCache, PQConfig
from million_cache.calibration import calibrate_all
from million_cache.calibration.allocation import PAIRS, allocate, measure_costs, served_pairs
from million_cache.calibration.finetune import QuantisedModel
from million_cache.codebook import CONFIG_NAME
from million_cache.evaluate import evaluate
from million_ops.layout import MMA_SHAPES, SUBSPACE_DIMS
from tests.cache.test_calibration import quick, tokens
from tests.cache.tiny_models import tiny_gemma3, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:codebooks trained on")
BUDGET = PQConfig(k_subspace_dim=4, v_subspace_dim=4, frame_tokens=64, recent_tokens=16, sink_tokens=2)


def lopsided():
    """A model whose second layer hardly matters."""
    model = tiny_llama()
    model.lm_head.weight.data *= 0.3
    model.model.layers[1].self_attn.o_proj.weight.data *= 0.05
    return model


@pytest.fixture(scope="module")
def allocated():
    model = lopsided()
    return model, quick(model, tokens(2400), BUDGET, context=300, sensitivity_tokens=1200, allocate=True)


# -- knapsack -------------------------------------------------------------------------------------------------------------


def size(pair: tuple[int, int]) -> int:
    return 8 // pair[0] + 8 // pair[1]


@pytest.mark.parametrize("pairs", [PAIRS, MMA_SHAPES[64], MMA_SHAPES[96]])
@pytest.mark.parametrize("budget", [(4, 4), (2, 4), (4, 8), (2, 2), (8, 8)])
def test_the_choice_is_the_best_of_all(pairs, budget):
    if all(size(pair) > size(budget) for pair in pairs):
        with pytest.raises(ValueError, match=r"none of .* fits a budget of"):
            allocate({0: torch.zeros(2, 3)}, pairs, budget)
        return
    g = torch.Generator().manual_seed(sum(budget) + len(pairs))
    costs = {i: torch.rand(2, 3, generator=g).mul(3).exp().sort(1).values for i in (0, 2, 3, 7)}

    def cost(i: int, pair: tuple[int, int]) -> float:
        return sum(float(costs[i][row, SUBSPACE_DIMS.index(d)]) for row, d in enumerate(pair))

    found = allocate(costs, pairs, budget)
    assert list(found) == list(costs) and set(found.values()) <= set(pairs)
    assert sum(map(size, found.values())) <= 4 * size(budget)
    every = (c for c in product(pairs, repeat=4) if sum(map(size, c)) <= 4 * size(budget))
    best = min(sum(map(cost, costs, choice)) for choice in every)
    assert sum(cost(i, pair) for i, pair in found.items()) == pytest.approx(best)


def test_layers_get_what_the_tensor_core_kernel_serves():
    assert served_pairs(128, (4, 4)) == MMA_SHAPES[128]
    assert served_pairs(80, (4, 4)) == PAIRS
    assert served_pairs(96, (2, 4)) == PAIRS  # the general kernel's already


# -- costs ----------------------------------------------------------------------------------------------------------------


def test_costs_are_about_the_kl_of_one_layer_alone():
    """To second order, and as if errors at different positions were independent: the right size and order."""
    model = lopsided()
    books = {
        d: quick(model, tokens(2400), replace(BUDGET, k_subspace_dim=d, v_subspace_dim=d), sensitivity_tokens=0).layers
        for d in SUBSPACE_DIMS
    }
    texts = list(tokens(4000, seed=5).view(20, 200))
    costs = measure_costs(model, texts, books, 16, 2, torch.Generator().manual_seed(0))
    assert costs[0].shape == costs[1].shape == (2, 3)
    # The first layer's values depend on the token alone, and there are fewer tokens than centroids.
    assert costs[0][1].max() < 1e-5 * costs[0][0].min()
    for cost in (costs[0][0], *costs[1]):
        assert (cost.diff() > 0).all()  # fewer bits cost more
    for column, d in enumerate(SUBSPACE_DIMS):
        for i in (0, 1):
            with torch.no_grad():
                alone = QuantisedModel(model, {i: books[d][i]}, 16, 2)
                kl = sum(alone.kl(ids, 0).item() for ids in texts) / len(texts)
            assert 0.4 < costs[i][:, column].sum() / kl < 2.5
    assert costs[0].sum() > 10 * costs[1].sum()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.config._attn_implementation == "sdpa"


# -- calibration ----------------------------------------------------------------------------------------------------------


def test_bits_go_to_the_layer_that_matters(allocated):
    model, books = allocated
    (k0, v0), (k1, v1) = books.config.allocation
    assert size((k0, v0)) > size((4, 4)) > size((k1, v1))
    assert books.config.bits_per_element <= 2
    for i, (k, v) in enumerate(books.config.allocation):
        layer, report = books.layers[i], books.report[i]
        assert (layer.k_codebook.shape[3], layer.v_codebook.shape[3]) == (k, v)
        assert (report.k_energy.shape[1], report.v_distortion.shape[1]) == (32 // k, 32 // v)
    uniform = quick(model, tokens(2400), BUDGET, context=300, sensitivity_tokens=1200)
    unseen = tokens(1800, seed=11).view(6, 300)
    mixed, same = (evaluate(model, x, unseen) for x in (books, uniform))
    assert mixed["kl"] < 0.8 * same["kl"]
    assert mixed["bits_per_element"] == books.config.bits_per_element
    assert mixed["cache_bytes"] <= same["cache_bytes"]


def test_bytes_are_those_allocated(allocated):
    model, books = allocated
    cache = MillionStaticCache(model, books, 300, 2, dtype=torch.float32)
    assert cache.cache_bytes == MillionStaticCache.required_bytes(model.config, books, 300, 2, torch.float32)
    codes = sum(x.numel() for name, x in cache.named_tensors().items() if "codes" in name)
    assert codes == 2 * 2 * 320 * sum(32 // d for pair in books.config.allocation for d in pair)  # 5 tiles of 64
    elements = 2 * 2 * 320 * 32 * 4
    assert cache.bits_per_element == pytest.approx(8 * codes / elements)


@pytest.mark.parametrize("compact", [False, True])
def test_it_survives_the_disk(allocated, tmp_path, compact):
    model, books = allocated
    books.save_pretrained(tmp_path, compact=compact)
    again = Codebooks.from_pretrained(tmp_path)
    assert again.config == books.config
    header = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert header["format_version"] == 3
    kl = [evaluate(model, x, tokens(200, seed=3)[None])["kl"] for x in (books, again)]
    assert kl[1] == pytest.approx(kl[0], rel=0.2 if compact else 0)
    assert "each layer's own" in (tmp_path / "README.md").read_text()
    header["config"]["allocation"].reverse()
    (tmp_path / CONFIG_NAME).write_text(json.dumps(header))
    with pytest.raises(ValueError, match="layer 0: k_codebook must be"):
        Codebooks.from_pretrained(tmp_path)
    header["config"]["allocation"].append([2, 2])
    (tmp_path / CONFIG_NAME).write_text(json.dumps(header))
    with pytest.raises(ValueError, match="bits are allocated to 3 layers, got 2"):
        Codebooks.from_pretrained(tmp_path)


def test_layers_of_other_kinds_are_left_out():
    """Gemma-3: sliding-window layers have no codes, so no share of the budget."""
    books = quick(tiny_gemma3(), tokens(2400), BUDGET, allocate=True)
    assert len(books.config.allocation) == len(books.layers) < books.fingerprint.num_layers


def test_fine_tuning_and_resuming_with_layers_of_their_own(tmp_path, monkeypatch):
    from tests.cache.test_resume import assert_same, interrupt

    model = lopsided()
    options = {"context": 300, "iterations": 2, "sensitivity_tokens": 900, "finetune_steps": 2, "progress": False}
    run = lambda **kw: calibrate_all(model, tokens(2400), [BUDGET], allocate=True, **options, **kw)  # noqa: E731
    want, done = run(), []
    assert want[0].provenance["allocate"] is True
    while True:
        with monkeypatch.context() as patch:
            names = interrupt(patch, 2)
            try:
                found = run(resume_dir=tmp_path)
                break
            except KeyboardInterrupt:
                done += names
    assert sum(name.startswith("allocation-0-") for name in done) == 4
    assert found[0].config == want[0].config
    assert_same(found, want)
    with pytest.raises(ValueError, match=r"allocate \(true, now false\)"):
        calibrate_all(model, tokens(2400), [BUDGET], **options, resume_dir=tmp_path)


@pytest.mark.parametrize("dim", [2, 8])
def test_a_budget_without_a_choice_changes_nothing(dim):
    config = replace(BUDGET, k_subspace_dim=dim, v_subspace_dim=dim)
    one, other = (quick(lopsided(), config=config, allocate=x) for x in (True, False))
    assert one.config == other.config == config
    assert torch.equal(one.layers[1].k_codebook, other.layers[1].k_codebook)


def test_allocation_needs_gradients_and_chooses_itself():
    with pytest.raises(ValueError, match="allocate needs sensitivity_tokens > 0"):
        quick(tiny_llama(), tokens(2400), BUDGET, sensitivity_tokens=0, allocate=True)
    with pytest.raises(ValueError, match=r"nor what is held out to allocate bits: got 682, give at least 1634"):
        quick(tiny_llama(), tokens(1200), BUDGET, allocate=True)
    with pytest.raises(ValueError, match="it cannot be given"):
        quick(tiny_llama(), config=replace(BUDGET, allocation=[(2, 8), (4, 4)]))


@pytest.mark.parametrize("pairs", [[(2, 3)], [(2,)], [(2, 4, 8)]])
def test_an_allocation_is_pairs_of_known_widths(pairs):
    with pytest.raises(ValueError, match="allocation must be pairs of"):
        replace(BUDGET, allocation=pairs)


def test_an_allocation_and_its_bits():
    config = replace(BUDGET, allocation=[[2, 8], [4, 4], [8, 8]])
    assert config == PQConfig(**json.loads(json.dumps(config.to_dict())))
    assert hash(config) == hash(replace(config))
    assert config.kv_bits == (pytest.approx(7 / 3), pytest.approx(4 / 3))
    assert config.bits_per_element == pytest.approx(11 / 6)
    assert config.subspace_dims(3) == ((2, 8), (4, 4), (8, 8))
    assert BUDGET.subspace_dims(2) == ((4, 4), (4, 4))
    assert "allocation" not in BUDGET.to_dict()
