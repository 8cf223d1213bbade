"""Padding masks of decode steps: what the host knows of them, and that asking does not make it wait for the device."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.masking_utils import and_masks, sliding_window_causal_mask_function

from million_cache import MillionStaticCache, attention, disable, enable
from million_cache.attention import million_mask
from million_cache.state import PaddingCheck
from tests.cache.lossless import RecordingCache, lossless_codebooks, lossless_for
from tests.cache.test_cache import CONFIG, close
from tests.cache.tiny_models import tiny_llama, tiny_phi3_long

KV_LENGTH = 64


def falls(rows: list[list[int]]) -> torch.Tensor:
    valid = torch.tensor(rows).bool()
    return valid[:, :-1] > valid[:, 1:]


# -- the deferred answer, on any device -----------------------------------------------------------------------------------


def test_left_padding_is_no_hole():
    check = PaddingCheck()
    mask = [[1, 1, 1], [0, 0, 1], [0, 0, 0]]
    for _ in range(4):
        assert check.step(falls(mask)) is False
        mask = [[*row, 1] for row in mask]
    check.arrived()
    assert check.holes is False


def test_a_hole_counts_from_the_step_after_its_own():
    """The token that is masked as it comes sees itself in its own step; only later ones must not see it."""
    check = PaddingCheck()
    assert check.step(falls([[1, 1]])) is False
    assert check.step(falls([[1, 1, 1]])) is False
    assert check.step(falls([[1, 1, 1, 0]])) is False
    assert check.step(falls([[1, 1, 1, 0, 1]])) is True
    assert check.step(falls([[1, 1, 1, 0, 1, 1]])) is True


def test_a_hole_of_before_is_known_at_once():
    assert PaddingCheck().step(falls([[1, 0, 1], [1, 1, 1]])) is True


@pytest.mark.parametrize("late", ["step", "arrived"])
def test_a_mask_that_changes_behind_its_back_raises(late):
    check = PaddingCheck()
    check.step(falls([[1, 1, 1]]))
    check.step(falls([[1, 0, 1, 1]]))
    with pytest.raises(RuntimeError, match="hides tokens that the mask before it did not"):
        check.arrived() if late == "arrived" else check.step(falls([[1, 0, 1, 1, 1]]))


def test_a_prefill_tells_of_the_step_before_it():
    check = PaddingCheck()
    check.step(falls([[1, 1, 1]]))
    check.step(falls([[1, 0, 1, 1]]))
    with pytest.raises(RuntimeError, match="hides tokens that the mask before it did not"):
        check.know(falls([[1, 0, 1, 1, 1, 1]]))


@pytest.mark.parametrize("columns", [3, 4, 6])
def test_a_mask_of_another_length_is_asked_about(columns):
    """A step without a mask between, a forward that died and came again, a crop: not the mask of before and one column."""
    check = PaddingCheck()
    check.know(falls([[1, 1, 1]]))
    check.step(falls([[1, 1, 1, 1]]))
    assert check.step(falls([[1, 0] + [1] * (columns - 2)])) is True
    check.arrived()


def test_a_forward_that_died_counts_for_nothing():
    check = PaddingCheck()
    check.know(falls([[1, 1, 1]]))
    check.step(falls([[1, 0, 1, 1]]))
    assert check.step(falls([[1, 1, 1, 1]])) is False


def test_answers_outlive_inference_mode():
    check = PaddingCheck()
    with torch.inference_mode():
        check.step(falls([[1, 1]]))
        check.step(falls([[1, 1, 1]]))
    assert check.step(falls([[1, 1, 1, 1]])) is False


def test_a_reset_forgets_what_was_asked():
    check = PaddingCheck()
    check.step(falls([[1, 1, 1]]))
    check.step(falls([[1, 0, 1, 1]]))
    twin = copy.deepcopy(check)
    for fresh in (twin, check):
        fresh.reset()
        assert fresh.step(falls([[1, 1]])) is False


# -- through the model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(device):
    model = tiny_llama().to(device)
    enable(model)
    yield model
    disable(model)


@pytest.fixture(scope="module")
def ids(device):
    return torch.randint(3, 97, (2, 30), generator=torch.Generator().manual_seed(4)).to(device)


@pytest.fixture(scope="module")
def books(model, ids):
    return lossless_for(model, ids, CONFIG)


def test_holes_that_appear_while_decoding(model, ids, device):
    """Row 1 masks two tokens as they come. Every valid token's logits are those of the dense model with the same masks."""
    mask = torch.ones_like(ids)
    mask[1, 13] = mask[1, 14] = 0
    positions = torch.arange(30, device=device)[None].expand(2, -1)

    def run(cache):
        logits = []
        with torch.no_grad():
            for i, j in [(0, 10), *((i, i + 1) for i in range(10, 24))]:
                out = model(
                    ids[:, i:j], attention_mask=mask[:, :j], position_ids=positions[:, i:j], past_key_values=cache
                )
                logits.append(out.logits)
        return torch.cat(logits, 1)[mask[:, :24].bool()]

    recording = RecordingCache(model.config)
    want = run(recording)
    cache = MillionStaticCache(model.config, lossless_codebooks(model, [recording], CONFIG), KV_LENGTH)
    close(run(cache), want)
    assert cache.state.padding.holes is True
    cache.check()
    mask[1, 13:15] = 1
    assert (
        run(DynamicCache(config=model.config)).flatten()[-97:] - want.flatten()[-97:]
    ).abs().max() > 0.1  # it matters


@pytest.mark.parametrize("told", [True, False], ids=["told", "untold"])
def test_an_older_token_masked_while_decoding(model, books, ids, device, told):
    """Right where it costs nothing to ask, or the cache is told; else an error that comes late."""

    def run(cache):
        mask = torch.ones_like(ids)
        positions = torch.arange(30, device=device)[None].expand(2, -1)
        with torch.no_grad():
            for i, j in [(0, 10), (10, 11), (11, 12), (12, 13)]:
                if i == 12:
                    mask[0, 6] = 0
                    if told and isinstance(cache, MillionStaticCache):
                        cache.forget_mask()
                out = model(
                    ids[:, i:j], attention_mask=mask[:, :j], position_ids=positions[:, i:j], past_key_values=cache
                )
        return out.logits

    recording = RecordingCache(model.config)
    want = run(recording)
    cache = MillionStaticCache(model.config, lossless_codebooks(model, [recording], CONFIG), KV_LENGTH)
    got = run(cache)
    if told or device == "cpu":
        cache.check()
        close(got, want)
    else:
        with pytest.raises(RuntimeError, match="its result is wrong"):
            cache.check()


def test_a_decode_step_does_not_wait_for_the_device(model, books, ids, device):
    """PyTorch raises at any synchronisation: none in a whole eager decode step of a padded batch, its mask included."""
    if device != "cuda":
        pytest.skip("needs a GPU")
    cache = MillionStaticCache(model.config, books, KV_LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad():
        model(ids[:, :10], attention_mask=mask[:, :10], past_key_values=cache)
        for i in range(10, 14):  # the first step asks, the second makes the place for answers
            model(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for i in range(14, 20):
                model(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert cache.state.padding.holes is False
    cache.check()
    assert int(cache.get_seq_length()) == 20


def test_the_mask_is_one_pair_a_row(model, books, ids):
    """The pair is what it says, from the mask that `generate` hands over."""
    cache = MillionStaticCache(model.config, books, KV_LENGTH)
    mask = torch.ones_like(ids[:, :10])
    mask[1, :5] = 0
    with torch.no_grad():
        model(ids[:, :10], attention_mask=mask, past_key_values=cache)
    longer = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
    for _ in range(3):
        pair = million_mask(2, 1, KV_LENGTH, cache.get_seq_length(), attention_mask=longer, device=ids.device)
        assert pair.dtype == torch.int32 and pair[:, 0, 0].tolist() == [[0, 10], [5, 10]]
    longer[0, 3] = 0
    assert million_mask(2, 1, KV_LENGTH, 0, attention_mask=longer, device=ids.device).shape == (2, 1, 1, KV_LENGTH)
    assert attention.expand_mask(pair, 1, 12)[1, 0, 0].tolist() == [False] * 5 + [True] * 6 + [False]


def test_a_window_that_covers_the_cache_is_none(device):
    """One pair a row too, as transformers hands over the mask of a model whose sliding window is longer than the cache; not with packed
    sequences, which transformers combines with the window."""
    model = tiny_phi3_long().to(device)
    ids = torch.arange(3, 23, device=device)[None].expand(2, -1)
    window = model.config.sliding_window
    arguments = {
        "mask_function": sliding_window_causal_mask_function(window),
        "local_size": window,
        "device": device,
        "allow_is_causal_skip": False,
    }
    pair = million_mask(2, 1, KV_LENGTH, torch.tensor(10, device=device), **arguments)
    assert pair.dtype == torch.int32 and pair[:, 0, 0].tolist() == [[0, 10]] * 2
    packed = and_masks(arguments["mask_function"], lambda b, h, q, kv: kv > 2)
    dense = million_mask(2, 1, KV_LENGTH, torch.tensor(10, device=device), **{**arguments, "mask_function": packed})
    assert dense[0, 0, 0].tolist() == [2 < i <= 10 for i in range(KV_LENGTH)]
    assert (
        million_mask(2, 1, KV_LENGTH, torch.tensor(10, device=device), **{**arguments, "local_size": 30}).dtype
        == torch.bool
    )
    seen = []
    enable(model)
    cache = MillionStaticCache(model.config, lossless_for(model, ids, CONFIG), KV_LENGTH)
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["attention_mask"]), with_kwargs=True)
    with torch.no_grad():
        model(ids[:, :10], past_key_values=cache)
        model(ids[:, 10:11], past_key_values=cache)
    assert seen[0] is None and seen[-1].shape == (2, 1, 1, 2)
