"""torch.export of a decode step: the cache is the program's state, in this process and after a load."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from million_cache import MillionStaticCache, disable, enable
from million_cache.cache import SlidingLayer
from million_cache.export import DecodeStep
from tests.cache.lossless import lossless_for
from tests.cache.test_compile import CONFIG, MAX_LEN
from tests.cache.tiny_models import tiny_gemma3, tiny_llama

PREFILL = 12


@pytest.fixture(scope="module")
def ids(device):
    return torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(4)).to(device)


@pytest.fixture(scope="module")
def model(device):
    model = tiny_llama().to(device)
    enable(model)
    yield model
    disable(model)


@pytest.fixture(scope="module")
def books(model, ids):
    return lossless_for(model, ids, CONFIG)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def new_cache(model, books):
    return MillionStaticCache(model.config, books, MAX_LEN, 2, model.device, torch.float32)


def decode(step, ids, start, begin=PREFILL):
    """``step`` for every token of ids [2, T] from slot ``begin`` on; positions follow from ``start`` [2]. Logits [2, T - begin, V]."""
    slots = torch.arange(ids.shape[1], device=ids.device)
    positions = (slots - start[:, None]).clamp(min=0)
    return torch.cat([step(ids[:, i : i + 1], positions[:, i : i + 1]) for i in range(begin, ids.shape[1])], 1)


@torch.no_grad()
def test_the_cache_is_the_state(model, books, ids, tmp_path):
    """Over frame and ring borders, of a padded batch prefilled in eager: the module in this process, and a loaded one, repeat eager."""
    mask = torch.ones_like(ids[:, :PREFILL])
    mask[1, :5] = 0
    start = torch.tensor([0, 5], device=ids.device)

    def prefilled():
        cache = new_cache(model, books)
        model(
            ids[:, :PREFILL],
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=cache,
        )
        return cache

    want = decode(DecodeStep(model, prefilled()), ids, start)
    cache = prefilled()
    step = DecodeStep(model, cache)
    program = torch.export.export(step, step.example(), strict=True)
    assert int(cache.get_seq_length()) == PREFILL  # exporting ran nothing
    torch.export.save(program, tmp_path / "step.pt2")

    mutated = {
        spec.target
        for spec in program.run_decompositions().graph_signature.output_specs
        if spec.kind.name == "BUFFER_MUTATION"
    }
    assert mutated == set(cache.named_tensors())

    close(decode(program.module(), ids, start), want)
    assert int(cache.get_seq_length()) == ids.shape[1]  # its tensors are the module's
    loaded = torch.export.load(tmp_path / "step.pt2").module()
    close(decode(loaded, ids, start), want)
    assert int(cache.get_seq_length()) == ids.shape[1]  # and not the loaded one's


@torch.no_grad()
def test_exported_from_an_empty_cache(model, books, ids, tmp_path):
    """A program that never saw a prefill takes the prompt token by token; its state can be emptied again."""
    start = torch.zeros(2, dtype=torch.int64, device=ids.device)
    want = decode(DecodeStep(model, new_cache(model, books)), ids, start, begin=0)
    cache = new_cache(model, books)
    step = DecodeStep(model, cache)
    torch.export.save(torch.export.export(step, step.example(), strict=True), tmp_path / "step.pt2")
    assert cache.get_seq_length() == 0 and cache.state.empty
    program = torch.export.load(tmp_path / "step.pt2").module()
    close(decode(program, ids, start, begin=0), want)
    buffers = dict(program.named_buffers())
    for name in ("clock0_time", "clock0_start", "clock0_origin"):
        buffers[name].zero_()
    close(decode(program, ids, start, begin=0), want)


# -- sliding-window layers ---------------------------------------------------------------------------------------------------

WINDOW = 8  # of tiny_gemma3: the 40 tokens of `ids` cross its edge five times


@pytest.fixture(scope="module")
def gemma(device):
    """Sliding, full, sliding, full; or a sliding layer behind the last full one too."""
    model = tiny_gemma3(
        num_hidden_layers=5, layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
    )
    assert model.config.sliding_window == WINDOW
    model = model.to(device)
    enable(model)
    yield model
    disable(model)


@pytest.mark.parametrize(("prefill", "batch"), [(0, 1), (3, 1), (WINDOW - 1, 2), (12, 2)])
@torch.no_grad()
def test_sliding_layers(gemma, ids, tmp_path, batch, prefill):
    """A step exported before, at and behind the window's edge repeats the eager steps and the dense model far beyond it, and the
    eager cache goes on from where the program left it."""
    ids = ids[:batch]
    books = lossless_for(gemma, ids, CONFIG)
    start = torch.zeros(batch, dtype=torch.int64, device=ids.device)

    def prefilled():
        cache = MillionStaticCache(gemma.config, books, MAX_LEN, batch, gemma.device, torch.float32)
        if prefill:
            gemma(ids[:, :prefill], past_key_values=cache)
        return cache

    dense = gemma(ids, past_key_values=DynamicCache(config=gemma.config)).logits[:, prefill:]
    want = decode(DecodeStep(gemma, prefilled()), ids, start, begin=prefill)
    assert (want - dense).abs().max() <= 2e-2 * dense.abs().max()
    cache = prefilled()
    step = DecodeStep(gemma, cache)
    program = torch.export.export(step, step.example(), strict=True)
    torch.export.save(program, tmp_path / "step.pt2")
    close(decode(torch.export.load(tmp_path / "step.pt2").module(), ids, start, begin=prefill), want)
    got = decode(program.module(), ids[:, :30], start, begin=prefill)
    close(got, want[:, : 30 - prefill])
    assert {int(layer.cumulative_length) for layer in cache.layers if isinstance(layer, SlidingLayer)} == {30}
    if prefill:  # else the cache does not know that it is no longer empty
        close(gemma(ids[:, 30:35], past_key_values=cache).logits, want[:, 30 - prefill : 35 - prefill])
        close(decode(program.module(), ids, start, begin=35), want[:, 35 - prefill :])


@torch.no_grad()
def test_sliding_layers_hide_padding(gemma, ids, device):
    """The program of a padded batch, which is given no mask, repeats `generate`'s steps, which are given one."""
    books = lossless_for(gemma, ids, CONFIG)
    padding = 5  # still inside the window when decoding begins
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def prefilled():
        cache = MillionStaticCache(gemma.config, books, MAX_LEN, 2, gemma.device, torch.float32)
        gemma(ids[:, :7], attention_mask=mask[:, :7], position_ids=positions[:, :7], past_key_values=cache)
        return cache

    cache = prefilled()
    want = torch.cat(
        [
            gemma(
                ids[:, i : i + 1],
                attention_mask=mask[:, : i + 1],
                position_ids=positions[:, i : i + 1],
                past_key_values=cache,
            ).logits
            for i in range(7, ids.shape[1])
        ],
        1,
    )
    cache = prefilled()
    step = DecodeStep(gemma, cache)
    program = torch.export.export(step, step.example(), strict=True).module()
    close(decode(program, ids, torch.tensor([0, padding], device=ids.device), begin=7), want)
    hidden = gemma(ids[:, :1], position_ids=positions[:, :1], past_key_values=prefilled()).logits
    cache = prefilled()
    cache.state.clocks[0].start.zero_()  # it is the padding that makes the difference
    shown = gemma(ids[:, :1], position_ids=positions[:, :1], past_key_values=cache).logits
    assert (hidden[1] - shown[1]).abs().max() > 1e-2


def test_what_cannot_be_exported(model, books):
    with pytest.raises(RuntimeError, match="no buffers yet"):
        DecodeStep(model, MillionStaticCache(model.config, books, MAX_LEN))
    disabled = tiny_llama(seed=1).to(model.device)
    cache = MillionStaticCache(model.config, books, MAX_LEN, 2, model.device, torch.float32)
    with pytest.raises(RuntimeError, match="enable"):
        DecodeStep(disabled, cache)


def test_layers_that_count_in_python_cannot_be_exported(gemma, ids):
    cache = MillionStaticCache(gemma.config, lossless_for(gemma, ids, CONFIG), MAX_LEN, 2, gemma.device, torch.float32)
    cache.layers[0] = StaticCache(gemma.config, MAX_LEN).layers[0]
    with pytest.raises(NotImplementedError, match="StaticSlidingWindowLayer cannot be exported"):
        DecodeStep(gemma, cache)
