"""Gradient descent on the centroids: its parts against the kernels and the decode path, what it gains, and its guard."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import million_ops
from million_cache.calibration.checkpoint import Checkpoint
from million_cache.calibration.finetune import CentroidAdam, QuantisedModel, decoded, finetune, nearest
from million_cache.config import PQConfig
from million_cache.evaluate import evaluate
from tests.cache.test_calibration import CONFIG, quick, tokens
from tests.cache.tiny_models import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:codebooks trained on")


@pytest.fixture(scope="module")
def untuned():
    """A model and codebooks that gradient descent can mend: the centroids of k-means, all of them too short."""
    model = tiny_llama()
    model.lm_head.weight.data *= 0.3  # predictions of a random model are chaotic enough
    books = quick(model, config=PQConfig(2, 2, frame_tokens=64, recent_tokens=16, sink_tokens=2))
    layers = {
        i: replace(layer, k_codebook=0.8 * layer.k_codebook, v_codebook=0.8 * layer.v_codebook)
        for i, layer in books.layers.items()
    }
    return model, replace(books, layers=layers)


def tuned(untuned, steps: int, ids=None, learning_rate: float = 0.1, saved=None):
    """What `finetune` makes of them, and the held-out KL that it told of after each step."""
    model, books = untuned
    seen: list[float] = []
    found = finetune(
        model, list(tokens(2400, seed=9).view(12, 200) if ids is None else ids), books.layers, 16, 2, steps,
        torch.Generator().manual_seed(0), learning_rate=learning_rate, advance=seen.append, saved=saved,
    )  # fmt: skip
    return found, seen


def same_centroids(one, other) -> bool:
    return all(torch.equal(getattr(one[i], x), getattr(other[i], x)) for i in one for x in ("k_codebook", "v_codebook"))


def test_its_codes_are_those_of_the_kernels(untuned):
    layer = untuned[1].layers[0]
    x = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(1))
    codes = nearest(x, layer.v_codebook.float())
    want = million_ops.pq_encode(x[None], layer.v_codebook)[0]
    assert (codes == want).float().mean() > 0.99  # near ties may go either way
    back = million_ops.pq_decode(codes.to(torch.uint8)[None], layer.v_codebook, torch.float32)[0]
    assert torch.equal(decoded(codes, layer.v_codebook.float()), back)


@pytest.mark.parametrize("frame_tokens", [0, 64])
def test_its_kl_is_that_of_the_decode_path(frame_tokens):
    model = tiny_llama()
    config = replace(CONFIG, frame_tokens=frame_tokens, recent_tokens=16, sink_tokens=2)
    books, ids = quick(model, config=config), tokens(200, seed=9)
    with torch.no_grad():
        kl = [QuantisedModel(model, books.layers, 16, 2).kl(ids, shift).item() for shift in (0, 30)]
    want = evaluate(model, books, ids[None])["kl"]
    assert want > 1e-3
    assert abs(kl[0] / want - 1) < 1e-3
    # Another place in the frames is about as good as any other, but not the same.
    assert abs(kl[1] / want - 1) < (0.3 if frame_tokens else 1e-3)
    assert (kl[0] != kl[1]) == bool(frame_tokens)


def test_fine_tuning_lowers_the_kl_of_unseen_text(untuned):
    model, books = untuned
    found, seen = tuned(untuned, 20)
    assert len(seen) == 20 and 0 < found.step <= 20
    assert found.after == min(seen) < 0.97 * found.before
    unseen = tokens(600, seed=11).view(3, 200)
    before, after = (evaluate(model, replace(books, layers=x), unseen)["kl"] for x in (books.layers, found.layers))
    assert after < 0.94 * before
    for i, layer in found.layers.items():
        assert not torch.equal(layer.k_codebook, books.layers[i].k_codebook)
        assert not torch.equal(layer.v_codebook, books.layers[i].v_codebook)
        assert torch.equal(layer.k_transform, books.layers[i].k_transform)
        layer.check(books.config, "tuned")


@pytest.mark.parametrize("rate", [1e9, float("nan"), float("inf")])
def test_an_absurd_rate_gives_the_start(untuned, rate):
    found, seen = tuned(untuned, 5, learning_rate=rate)
    assert len(seen) == 5 and not min(seen) < found.before
    assert (found.after, found.step) == (found.before, 0)
    assert same_centroids(found.layers, untuned[1].layers)


def test_it_recovers_from_a_bad_step(untuned, monkeypatch):
    """Gradients that are thrown far once do not spoil the steps after them."""
    step, calls = CentroidAdam.step, []

    def bad_once(self, rate):
        calls.append(rate)
        step(self, 10_000 * rate if len(calls) == 6 else rate)

    monkeypatch.setattr(CentroidAdam, "step", bad_once)
    found, seen = tuned(untuned, 20)
    assert seen[5] > 1.1 * found.before
    assert found.step > 6 and found.after < found.before
    assert calls[6] < 0.6 * calls[5]


def test_fine_tuning_leaves_the_model_alone_and_is_deterministic(untuned):
    model, books = untuned
    one, again = (tuned(untuned, 3)[0] for _ in range(2))
    assert one.step and same_centroids(one.layers, again.layers) and one.after == again.after
    assert not same_centroids(one.layers, books.layers)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("bad_step", [None, 4])
def test_fine_tuning_goes_on_bit_for_bit(untuned, tmp_path, monkeypatch, bad_step):
    """Whichever step it was interrupted after; also when it has gone back to the best state at a lower rate."""
    step, calls = CentroidAdam.step, []

    def sometimes_bad(self, rate):
        calls.append(rate)
        step(self, 10_000 * rate if self.steps + 1 == bad_step and len(calls) == bad_step else rate)

    monkeypatch.setattr(CentroidAdam, "step", sometimes_bad)
    want, seen = tuned(untuned, 8)
    assert want.step > 0 and want.after < want.before
    rates, calls[:] = list(calls), []
    assert bad_step is None or rates[bad_step] < 0.6 * rates[bad_step - 1]
    advanced = 0
    while advanced < 8:
        with monkeypatch.context() as patch:
            if advanced < 7:
                save, kept = Checkpoint.save, []

                def interrupted(self, *args, save=save, kept=kept, **kw):
                    if kept:
                        raise KeyboardInterrupt
                    kept.append(save(self, *args, **kw))

                patch.setattr(Checkpoint, "save", interrupted)
            try:
                found, told = tuned(untuned, 8, saved=Checkpoint(tmp_path))
                advanced = 8
            except KeyboardInterrupt:
                calls.pop()  # the step that was lost
                advanced += 1
    assert calls == rates
    assert told[-1] == seen[-1] and len(told) == 8
    assert (found.before, found.after, found.step) == (want.before, want.after, want.step)
    assert same_centroids(found.layers, want.layers)


def test_fine_tuning_needs_something_beyond_the_window_and_something_to_hold_out(untuned):
    with pytest.raises(ValueError, match=r"at least 2 sequences longer than the window of 16 \+ 2 exact tokens.*got 1"):
        tuned(untuned, 1, [tokens(18), tokens(30)])
    with pytest.raises(ValueError, match="at least 2 sequences"):
        quick(untuned[0], tokens(1100), context=2000, finetune_steps=1)


def test_steps_are_relative_to_the_distance_of_centroids():
    """Whatever the size of the gradient; a centroid moves as a whole, one without a gradient stays."""
    p = torch.zeros(1, 256, 1, 2)
    p[0, :, 0, 0] = torch.cat((torch.arange(1.0, 129.0), -20 * torch.arange(1.0, 129.0)))
    start = p.clone()
    p.requires_grad_()
    optimiser = CentroidAdam([p])
    p.grad = torch.tensor([3.0, 4.0]) * torch.logspace(-3, 3, 256)[None, :, None, None]
    p.grad[0, 7] = 0
    optimiser.step(0.1)
    assert p.grad is None
    moved = (start - p.detach())[0, :, 0]
    direction = torch.tensor([3.0, 4.0]) / 12.5**0.5
    assert not moved[7].any()
    torch.testing.assert_close(moved[200], 0.1 * 20 * direction, rtol=1e-3, atol=0)
    torch.testing.assert_close(
        moved[20], 0.1 * 1.05 * direction, rtol=1e-3, atol=0
    )  # a tenth of the mean distance, (1 + 20) / 2


@pytest.mark.parametrize("size", [1e-21, 1e-25, 1e-38])
def test_a_gradient_too_small_to_square_moves_nothing(size):
    """Its square is a subnormal number or 0 in fp32; divided by the root of that, a centroid goes a thousand times too far."""
    p = torch.randn(1, 256, 4, 2)
    start = p.clone()
    optimiser = CentroidAdam([p.requires_grad_()])
    for _ in range(3):
        p.grad = torch.full_like(p, size)
        optimiser.step(0.1)
    torch.testing.assert_close(p.detach(), start, rtol=0, atol=1e-3)


def test_calibration_fine_tunes_if_asked_to(untuned):
    config = replace(CONFIG, recent_tokens=16)
    plain, found = (quick(untuned[0], config=config, finetune_steps=n) for n in (0, 6))
    assert (plain.provenance["finetune_steps"], found.provenance["finetune_steps"]) == (0, 6)
    before, after = found.provenance["finetune_held_out_kl"]
    step = found.provenance["finetune_best_step"]
    assert 0 < after <= before and (after < before) == (step > 0)
    assert torch.equal(plain.layers[1].k_codebook, found.layers[1].k_codebook) == (step == 0)
    assert torch.equal(plain.layers[1].k_transform, found.layers[1].k_transform)
    assert "finetune_best_step" not in plain.provenance
    with pytest.raises(ValueError, match="finetune_steps >= 0"):
        quick(untuned[0], finetune_steps=-1)
