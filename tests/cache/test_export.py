"""torch.export of a decode step: the cache is the program's state, in this process and after a load."""

from __future__ import annotations

import pytest
import torch

from million_cache import MillionStaticCache, disable, enable
from million_cache.export import DecodeStep
from tests.cache.lossless import lossless_for
from tests.cache.test_cache import random_codebooks
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


def test_what_cannot_be_exported(model, books):
    with pytest.raises(RuntimeError, match="no buffers yet"):
        DecodeStep(model, MillionStaticCache(model.config, books, MAX_LEN))
    gemma = tiny_gemma3().to(model.device)
    cache = MillionStaticCache(gemma.config, random_codebooks(gemma, CONFIG), MAX_LEN, 2, model.device, torch.float32)
    with pytest.raises(RuntimeError, match="enable"):
        DecodeStep(gemma, cache)
    enable(gemma)
    try:
        with pytest.raises(NotImplementedError, match="StaticSlidingWindowLayer cannot be exported"):
            DecodeStep(gemma, cache)
    finally:
        disable(gemma)
