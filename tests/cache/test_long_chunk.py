"""Chunks longer than `DECODE_CHUNK` on a non-empty cache, decoded to a workspace: against the dense model, and part by part."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

import million_ops
from million_cache import MillionStaticCache, PQConfig, disable, enable, long_chunk
from million_cache.attention import DECODE_CHUNK
from tests.cache.lossless import RecordingCache, lossless_codebooks, lossless_for
from tests.cache.tiny_models import tiny_gemma3, tiny_llama

CONFIG = PQConfig(k_subspace_dim=2, v_subspace_dim=4, frame_tokens=16, recent_tokens=8, sink_tokens=2)
LENGTH, PAST = 128, 40  # tokens of a row, and of its first turn
SERVES = long_chunk.serves  # which the fixture replaces


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """The long way on the CPU too and in fp32, a few tokens of the cache at a time. Tells how often it was gone."""
    used = []
    attend = long_chunk.attend_long

    def counted(*args):
        result = attend(*args)
        used.append(result is not None)
        return result

    monkeypatch.setattr(long_chunk, "serves", lambda q: True)
    monkeypatch.setattr(long_chunk, "attend_long", counted)
    monkeypatch.setattr(long_chunk, "WORKSPACE", 1)
    monkeypatch.setattr(long_chunk, "LEAST", 13)
    monkeypatch.setattr(long_chunk, "LEAST_PAIRS", 0)
    return used


MODELS = {"llama": tiny_llama, "gemma3": tiny_gemma3, "head_dim 256": lambda: tiny_llama(head_dim=256)}


@pytest.fixture(params=MODELS)
def model(device, request):
    model = MODELS[request.param]().to(device, dtype(device))
    enable(model)
    yield model
    disable(model)


def dtype(device) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.float16  # what FlashAttention takes there


@pytest.fixture(scope="module")
def ids(device):
    return torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(3)).to(device)


def close(got, want, device):
    bound = 5e-3 if device == "cpu" else 3e-2
    assert (got - want).abs().max() <= bound * want.abs().max()


@torch.no_grad()
def prefilled(device, ids):
    """The first layer of a cache of `PAST` tokens."""
    model = tiny_llama().to(device, dtype(device))
    enable(model)
    cache = MillionStaticCache(model.config, lossless_for(model, ids, CONFIG), LENGTH)
    model(ids[:, :PAST], past_key_values=cache)
    disable(model)
    return cache.layers[0]


@torch.no_grad()
def two_turns(model, ids, cache, mask=None, third=4):
    """Logits of a long second turn and of a few decode steps after it."""
    results, begin = [], 0
    for end in (PAST, LENGTH - third, *range(LENGTH - third + 1, LENGTH + 1)):
        more = {} if mask is None else {"attention_mask": mask[:, :end]}
        if mask is not None:
            more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, begin:end]
        results.append(model(ids[:, begin:end], past_key_values=cache, **more).logits)
        begin = end
    return torch.cat(results[1:], 1)


@pytest.mark.filterwarnings("ignore:these codebooks were trained for the last")
@pytest.mark.parametrize("recent", [0, 1, 8, 64])
@pytest.mark.parametrize("sinks", [0, 2, 50])
def test_lossless_codes_give_the_dense_model(model, ids, device, everywhere, recent, sinks):
    books = lossless_for(model, ids, CONFIG)
    cache = MillionStaticCache(model.config, books, LENGTH, recent_tokens=recent, sink_tokens=sinks)
    got = two_turns(model, ids, cache)
    assert everywhere and all(everywhere)
    close(got, two_turns(model, ids, DynamicCache(config=model.config)), device)


@pytest.mark.parametrize("start", [(0, 5), (7, 7), (39, 0), (0, 60)])
def test_left_padding(device, ids, everywhere, start):
    model = tiny_llama().to(device, dtype(device))
    start = torch.tensor(start, device=device)
    mask = (torch.arange(LENGTH, device=device) >= start[:, None]).long()
    recording = RecordingCache(model.config)
    want = two_turns(model, ids, recording, mask)
    enable(model)
    books = lossless_codebooks(model, [recording], CONFIG, start=start)
    got = two_turns(model, ids, MillionStaticCache(model.config, books, LENGTH), mask)
    disable(model)
    assert everywhere and any(everywhere) == (int(start.max()) < PAST)  # a row that begins in the chunk takes the ops
    valid = mask[:, PAST:].bool()
    close(got[valid], want[valid], device)


def test_after_a_crop(device, ids, everywhere):
    """The ring has lost what a crop uncovered: those tokens come from codes."""
    model = tiny_llama().to(device, dtype(device))
    enable(model)
    cache = MillionStaticCache(model.config, lossless_for(model, ids, CONFIG), LENGTH)
    with torch.no_grad():
        model(ids[:, :PAST], past_key_values=cache)
        cache.crop(-5)
        got = model(ids[:, PAST - 5 :], past_key_values=cache).logits
        disable(model)
        want = model(ids).logits[:, PAST - 5 :]
    assert all(everywhere) and everywhere
    close(got, want, device)


def test_which_tokens_are_exact(device, ids):
    """With codes that lose much: sinks, the ring and the chunk are exact for every query, what lies between is not."""
    model = tiny_llama().to(device, dtype(device))
    enable(model)
    books = lossless_for(model, torch.randint(3, 97, (1, 64), device=device), CONFIG)  # other text
    cache = MillionStaticCache(model.config, books, LENGTH)
    with torch.no_grad():
        model(ids[:, :PAST], past_key_values=cache)
    disable(model)
    layer, n = cache.layers[0], DECODE_CHUNK + 5
    q = torch.randn(2, 4, n, 32, device=device, dtype=dtype(device))
    k, v = torch.randn(2, 2, 2, n, 32, device=device, dtype=dtype(device))
    layer.clock.begin(n)
    got = long_chunk.attend_long(layer, q, k, v, 0.2)
    keys, values = [], []
    slots = torch.arange(PAST, device=device)
    exact = (slots < CONFIG.sink_tokens) | (slots >= PAST - CONFIG.recent_tokens)
    b = books.to(torch.device(device))[0]
    for i, (to, new, codebook, inverse, inv_freq, layout) in enumerate(
        (
            (keys, k, b.k_codebook, b.k_transform_inv, b.inv_freq, layer.geometry["k_layout"]),
            (values, v, b.v_codebook, None, None, layer.geometry["v_layout"]),
        )
    ):
        old = million_ops.pq_dequantize(
            layer.codes[i], codebook, inverse, inv_freq, layer.clock.origin, layout, new.dtype, b.frame_tokens
        )[:, :, :PAST]
        held = layer.ring[i][:, :, slots % CONFIG.recent_tokens].clone()
        held[:, :, : CONFIG.sink_tokens] = layer.sinks[i]
        assert (held - old)[:, :, exact].abs().max() > 0.1  # else the test says nothing
        to.append(torch.cat((torch.where(exact[:, None], held, old), new), 2).repeat_interleave(2, 1))
    seen = torch.arange(PAST + n, device=device) <= PAST + torch.arange(n, device=device)[:, None]
    want = F.scaled_dot_product_attention(q, keys[0], values[0], attn_mask=seen, scale=0.2).transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-5 if device == "cpu" else 5e-3)


def test_what_serves(device, ids, monkeypatch):
    """16-bit queries on a GPU that runs FlashAttention, if there are enough of them and of keys."""
    q = torch.zeros(1, 4, 100, 64, device=device, dtype=torch.float16)
    assert SERVES(q) == (device == "cuda")
    for other in (q.float(), q[..., :60], torch.cat([q] * 5, -1)):
        assert not SERVES(other)
    layer, n = prefilled(device, ids), DECODE_CHUNK + 5
    layer.clock.begin(n)
    q, k = (torch.randn(2, heads, n, 32, device=device, dtype=dtype(device)) for heads in (4, 2))
    for least, taken in ((2 * 4 * n * PAST, True), (2 * 4 * n * PAST + 1, False)):
        monkeypatch.setattr(long_chunk, "LEAST_PAIRS", least)
        assert (long_chunk.attend_long(layer, q, k, k, 0.2) is not None) == taken


def test_more_than_fits(device, ids):
    """Where compiled steps have filled the cache unseen, the ops take the chunk and the overflow is reported."""
    layer, n = prefilled(device, ids), DECODE_CHUNK + 5
    layer.clock.time[:2] = LENGTH - n + 1
    layer.clock.begin(n)
    q, k = (torch.randn(2, heads, n, 32, device=device, dtype=dtype(device)) for heads in (4, 2))
    assert long_chunk.attend_long(layer, q, k, k, 0.2) is None
    layer.clock.time[:2] = LENGTH - n
    assert long_chunk.attend_long(layer, q, k, k, 0.2) is not None


def test_who_takes_it(device, ids, everywhere):
    """Short chunks and prefills into an empty cache do not."""
    model = tiny_llama().to(device, dtype(device))
    enable(model)
    cache = MillionStaticCache(model.config, lossless_for(model, ids, CONFIG), LENGTH)
    with torch.no_grad():
        model(ids[:, : DECODE_CHUNK + 1], past_key_values=cache)
        cache.reset()
        for begin in (0, PAST):
            model(ids[:, begin : begin + DECODE_CHUNK], past_key_values=cache)
        assert not everywhere
    disable(model)
