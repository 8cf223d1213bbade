"""`evaluate` measures what it says: zero where nothing is lost, the plain loss where the reference is concerned."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from transformers import StaticCache

from million_cache import MillionStaticCache
from million_cache import evaluate as module
from million_cache.evaluate import Scores, evaluate, tensor_bytes
from million_cache.loading import UserError, contexts, shipped_text
from tests.cache.lossless import RecordingCache, lossless_codebooks

CONTEXT = 160


@pytest.fixture(scope="module")
def parts(tokens):
    return tokens[: 2 * CONTEXT].view(2, CONTEXT)


@pytest.fixture(scope="module")
def scored(model, books, parts):
    return evaluate(model, books, parts)


def test_coarse_codes_cost_something(scored):
    assert scored["kl"] > 1e-3
    assert scored["top1"] < 1
    assert scored["perplexity"] != scored["perplexity_dense"]


def test_a_window_as_long_as_the_context_loses_nothing(model, books, parts):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "these codebooks were trained for")  # not of a larger window, nor their own
        result = evaluate(model, books, parts, recent_tokens=CONTEXT)
    assert abs(result["kl"]) < 1e-6
    assert result["top1"] == 1
    assert math.isclose(result["perplexity"], result["perplexity_dense"], rel_tol=1e-5)


def test_lossless_codes_lose_nothing(model, books, parts):
    recording = RecordingCache(model.config)
    with torch.no_grad():
        model(parts[:1], past_key_values=recording)
    config = replace(books.config, recent_tokens=0, sink_tokens=0)
    lossless = lossless_codebooks(model, [recording], config)
    result = evaluate(model, lossless, parts[:1])
    assert abs(result["kl"]) < 1e-4  # centroids are fp16
    with pytest.warns(UserWarning, match="trained for the last 8 and the first 2 tokens exact; with 0 and 0 they lose"):
        without = evaluate(model, books, parts[:1], recent_tokens=0, sink_tokens=0)
    assert result["kl"] < without["kl"] / 100


def test_dense_perplexity_is_the_plain_loss(model, parts, scored):
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss.item() for row in parts]
    assert math.isclose(scored["perplexity_dense"], math.exp(sum(losses) / len(losses)), rel_tol=1e-5)


def test_every_position_of_every_context_is_scored(scored):
    assert scored["positions"] == 2 * CONTEXT
    assert len(scored["kl_by_context"]) == 2
    assert math.isclose(sum(scored["kl_by_context"]) / 2, scored["kl"], rel_tol=1e-9)


def test_the_score_is_that_of_single_steps(model, books, parts):
    """A hand-written loop of one token at a time, through `enable` and the cache, gives the same KL."""
    from million_cache import disable, enable

    with torch.no_grad():
        want = model(parts[:1]).logits[0].log_softmax(-1)
        cache = MillionStaticCache(model, books, CONTEXT)
        enable(model)
        try:
            got = [model(parts[:1, i : i + 1], past_key_values=cache).logits[0] for i in range(CONTEXT)]
        finally:
            disable(model)
    kl = (want.exp() * (want - torch.cat(got).log_softmax(-1))).sum(-1).mean().item()
    assert math.isclose(evaluate(model, books, parts[:1])["kl"], kl, rel_tol=1e-3)


def test_a_reference_in_pieces_is_the_same(model, books, parts, scored, monkeypatch):
    monkeypatch.setattr(module, "REFERENCE_BYTES", 4 * 512 * 64)
    result = evaluate(model, books, parts)
    assert math.isclose(result["kl"], scored["kl"], rel_tol=1e-3)
    assert math.isclose(result["perplexity_dense"], scored["perplexity_dense"], rel_tol=1e-5)


def test_positions_are_shifted_for_both_caches(model, books, parts, scored):
    shifted = evaluate(model, books, parts, position_offset=3000)
    assert shifted["position_offset"] == 3000
    assert math.isclose(shifted["perplexity_dense"], scored["perplexity_dense"], rel_tol=1e-3)  # RoPE is relative
    assert math.isclose(shifted["kl"], scored["kl"], rel_tol=0.02)  # and so are frames


def test_bytes_are_those_of_the_tensors(model, books, parts, scored):
    dense = StaticCache(config=model.config, max_cache_len=CONTEXT)
    with torch.no_grad():
        model(parts[:1], past_key_values=dense)
    assert scored["dense_cache_bytes"] == tensor_bytes(dense) == 2 * 2 * 2 * 64 * CONTEXT * 4
    assert scored["dense_cache_bytes_16bit"] == scored["dense_cache_bytes"] // 2
    assert scored["cache_bytes"] == MillionStaticCache.required_bytes(
        model.config, books.config, CONTEXT, dtype=torch.float32
    )
    assert scored["cache_bytes_16bit"] < scored["cache_bytes"] < scored["dense_cache_bytes"]
    assert scored["codebook_bytes"] == books.nbytes


def test_the_model_is_left_disabled(model, scored):
    assert model.config._attn_implementation != "million"


def test_progress_adds_up(model, books, parts):
    done = []
    evaluate(model, books, parts[:1], progress=done.append)
    assert sum(done) == CONTEXT
    assert max(done) <= 64


@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (64,)])
def test_contexts_of_no_use_are_refused(model, books, shape):
    with pytest.raises(ValueError, match="contexts must be"):
        evaluate(model, books, torch.zeros(shape, dtype=torch.long))


def test_scores_by_hand():
    scores = Scores()
    dense = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    other = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    scores.add(other, dense, torch.tensor([1]))
    assert math.isclose(scores.kl, (0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)) / 2, rel_tol=1e-5)
    assert math.isclose(scores.perplexity, 1 / 0.75, rel_tol=1e-5)
    assert math.isclose(scores.perplexity_dense, 2, rel_tol=1e-5)
    assert scores.top1 == 0.5  # a tie goes to the lower index


# -- contexts --------------------------------------------------------------------------------------------------------------


def test_contexts_follow_each_other(tokenizer, tokens):
    got = contexts(tokenizer, shipped_text("evaluation"), 100, 3, "it")
    assert torch.equal(got.flatten(), tokens[:300])


def test_each_context_opens_as_a_prompt_does(tokenizer, tokens):
    class WithBos:
        bos_token_id = 0

        def __call__(self, text, add_special_tokens=True, **kwargs):
            encoded = tokenizer(text, add_special_tokens=False, **kwargs)
            if add_special_tokens:
                encoded["input_ids"] = [0, *encoded.input_ids]
            return encoded

    got = contexts(WithBos(), shipped_text("evaluation"), 100, 3, "it")
    assert got.shape == (3, 100)
    assert got[:, 0].tolist() == [0, 0, 0]
    assert torch.equal(got[:, 1:].flatten(), tokens[:297])


def test_a_text_that_is_too_short_says_what_is_needed(tokenizer):
    with pytest.raises(UserError, match=r"it holds \d+ tokens, but 4 contexts of 100 need 400"):
        contexts(tokenizer, "short", 100, 4, "it")
