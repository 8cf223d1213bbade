"""The cache by itself: bytes, errors, crop, reset, reorder, recovery."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from million_cache import PRESETS, Codebooks, MillionStaticCache, PQConfig, disable, enable
from million_cache.cache import CROP_KEEPS, MillionLayer
from million_cache.models import cache_argument
from million_cache.state import Clock
from tests.cache.lossless import RecordingCache, lossless_codebooks, lossless_for
from tests.cache.tiny_models import tiny_gemma3, tiny_gptneo, tiny_llama, tiny_phi3_long

CONFIG = PQConfig(k_subspace_dim=2, v_subspace_dim=4, frame_tokens=8, recent_tokens=4, sink_tokens=2)
MAX_LEN = 64
VOCABULARY = 97


@pytest.fixture(scope="module")
def model(device):
    return tiny_llama().to(device)


@pytest.fixture(scope="module")
def ids(device):
    return torch.randint(3, VOCABULARY, (2, MAX_LEN), generator=torch.Generator().manual_seed(4)).to(device)


@pytest.fixture(scope="module")
def books(model, ids):
    """Lossless for `ids`, both rows, all of their 64 tokens."""
    return lossless_for(model, ids, CONFIG)


@pytest.fixture
def enabled(model):
    enable(model)
    yield model
    disable(model)


def logits(model, ids, cache) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


def close(got, want):
    # Centroids are fp16: two layers of it leave about 1e-3 of the logits' scale.
    assert (got - want).abs().max() <= 5e-3 * want.abs().max()


# -- append, crop, reorder, reset against a dense model -------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("feed"), st.integers(1, 20)),
            st.tuples(st.just("crop"), st.integers(1, 12)),
            st.tuples(st.just("swap"), st.just(0)),
            st.tuples(st.just("reset"), st.just(0)),
            st.tuples(st.just("copy"), st.just(0)),
        ),
        max_size=12,
    )
)
def test_any_history_equals_the_dense_model(model, books, ids, history):
    """Feed chunks, drop tokens, swap rows, copy and reset in any order: the next logits are those of the dense model."""
    enable(model)
    try:
        cache = MillionStaticCache(model.config, books, MAX_LEN)
        past, rows = 0, [0, 1]
        for action, n in [*history, ("feed", 1)]:
            if action == "feed":
                n = min(n, MAX_LEN - past)
                if n == 0:
                    continue
                got = logits(model, ids[rows, past : past + n], cache)
                past += n
                want = logits(model, ids[rows, :past], DynamicCache(config=model.config))[:, -n:]
                close(got, want)
            elif action == "crop":
                n = min(n, past)
                cache.crop(-n)
                past -= n
            elif action == "swap" and past:
                cache.reorder_cache(torch.tensor([1, 0]))
                rows = rows[::-1]
            elif action == "reset":
                cache.reset()
                past, rows = 0, [0, 1]
            elif action == "copy":
                cache = copy.deepcopy(cache)
            assert int(cache.get_seq_length()) == past
    finally:
        disable(model)


@pytest.mark.filterwarnings("ignore:these codebooks were trained for the last")
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 31, 32, 33, 63])
@pytest.mark.parametrize("recent", [0, 1, 4, 64])
def test_a_chunk_equals_single_steps(enabled, books, ids, n, recent):
    # Coarse codes, so that a key taken from the window instead of the codes would show.
    layers = {
        i: replace(
            layer,
            k_codebook=(layer.k_codebook.float().clamp(-3, 3) + 0.1).half(),
            v_codebook=(layer.v_codebook.float().clamp(-3, 3) + 0.1).half(),
        )
        for i, layer in books.layers.items()
    }
    coarse = Codebooks(books.config, books.fingerprint, layers)
    chunk, single = (MillionStaticCache(enabled.config, coarse, MAX_LEN, recent_tokens=recent) for _ in range(2))
    for cache in (chunk, single):
        logits(enabled, ids[:, :1], cache)
    one = logits(enabled, ids[:, 1 : 1 + n], chunk)
    many = torch.cat([logits(enabled, ids[:, i : i + 1], single) for i in range(1, 1 + n)], 1)
    assert (one - many).abs().max() <= 1e-5 * many.abs().max()
    if recent == 0 and n > 8:  # and the codes were coarse enough to be seen
        dense = logits(enabled, ids[:, : 1 + n], DynamicCache(config=enabled.config))[:, 1:]
        assert (one - dense).abs().max() > 1e-2 * dense.abs().max()


def test_a_forward_that_dies_leaves_no_trace(enabled, books, ids):
    cache = MillionStaticCache(enabled.config, books, MAX_LEN)
    logits(enabled, ids[:, :20], cache)
    boom = enabled.model.layers[1].input_layernorm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(
            enabled, ids[:, 30:37].flip(0), cache
        )  # other tokens than the ones below: what they wrote must not be read
    boom.remove()
    assert int(cache.get_seq_length()) == 20
    got = torch.cat([logits(enabled, ids[:, 20:23], cache), logits(enabled, ids[:, 23:24], cache)], 1)
    close(got, logits(enabled, ids[:, :24], DynamicCache(config=enabled.config))[:, 20:])


def test_cropping_after_a_forward_that_died(enabled, books, ids):
    """What the dead forward wrote over the ring must not be served after a crop either."""
    cache = MillionStaticCache(enabled.config, books, MAX_LEN)
    logits(enabled, ids[:, :20], cache)
    boom = enabled.model.layers[1].input_layernorm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(enabled, ids[:, 30:34].flip(0), cache)
    boom.remove()
    cache.crop(-1)
    close(
        logits(enabled, ids[:, 19:23], cache), logits(enabled, ids[:, :23], DynamicCache(config=enabled.config))[:, 19:]
    )


def test_the_window_returns_after_a_crop(device):
    """``ring_lo`` never lies beyond the kept tokens: what is fed from there on is in the ring again."""
    clock = Clock(1, 128, 0, torch.device(device))
    clock.begin(4000)
    clock.commit()
    clock.crop(1)
    assert clock.time.tolist() == [3999, 3999, 3872]  # slot 3871 was overwritten by 3999
    clock.crop(3499)
    assert clock.time.tolist() == [500, 500, 500]
    clock.begin(300)  # dies, after writing over the whole ring
    clock.begin(2)
    assert clock.time.tolist() == [500, 502, 500]
    clock.crop(500)
    assert clock.time.tolist() == [0, 0, 0]


def test_a_forward_that_dies_on_a_model_with_sliding_layers(device):
    """Sliding layers keep a count of their own and cannot give tokens back: the cache asks for a reset instead of going on wrong."""
    model = tiny_gemma3().to(device)
    books = random_codebooks(model, CONFIG)
    enable(model)
    cache = MillionStaticCache(model.config, books, 40)
    ids = torch.arange(3, 50, device=device)[None]
    logits(model, ids[:, :20], cache)
    with pytest.raises(ValueError, match="nothing was written"):
        logits(model, ids[:, :21], cache)
    assert {int(layer.get_seq_length()) for layer in cache.layers} == {20}
    boom = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model, ids[:, 20:24], cache)
    boom.remove()
    with pytest.raises(RuntimeError, match="did not finish"):
        logits(model, ids[:, 20:24], cache)
    cache.reset()
    logits(model, ids[:, :20], cache)
    disable(model)


@pytest.mark.parametrize("implementation", ["million", "sdpa", "eager"])
@pytest.mark.parametrize("chunks", [(40,), (3, 4, 1, 1, 1, 9, 1, 20), (1,) * 40, (12, 28)], ids=str)
def test_sliding_layers_in_chunks(device, implementation, chunks):
    """Whatever fills a window of 8 tokens, and whoever attends: the logits of the dense model; again after reset, reorder and deepcopy."""
    model = tiny_gemma3().to(device)
    ids = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(2)).to(device)
    books = lossless_for(model, ids, CONFIG)
    want = logits(model, ids, DynamicCache(config=model.config))
    enable(model) if implementation == "million" else model.set_attn_implementation(implementation)
    cache = MillionStaticCache(model.config, books, 44)

    def feed(cache, ids):
        return [logits(model, x, cache) for x in ids.split(chunks, 1)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it dequantises
        close(torch.cat(feed(cache, ids), 1), want)
        cache.reset()
        close(torch.cat(feed(cache, ids.flip(0)), 1), want.flip(0))
        addresses = [x.data_ptr() for x in cache.named_tensors().values()]
        cache.reorder_cache(torch.tensor([1, 0], device=device))
        assert addresses == [x.data_ptr() for x in cache.named_tensors().values()]
        twin = copy.deepcopy(cache)
        for each in (cache, twin):  # with the rows in the order of ids again
            got = logits(model, ids[:, :3], each)
            more = logits(model, torch.cat((ids, ids[:, :3]), 1), DynamicCache(config=model.config))[:, -3:]
            assert (got - more).abs().max() <= 0.2 * more.abs().max()  # these tokens have no codes of their own
        with pytest.raises(NotImplementedError, match="SlidingLayer cannot be cropped"):
            cache.crop(-1)
    disable(model)


def test_sliding_layers_are_cropped_where_nothing_is_overwritten(device):
    model = tiny_gemma3(sliding_window=40).to(device)
    ids = torch.randint(3, 97, (2, 30), generator=torch.Generator().manual_seed(2)).to(device)
    books = lossless_for(model, ids, CONFIG)
    want = logits(model, ids, DynamicCache(config=model.config))
    enable(model)
    cache = MillionStaticCache(model.config, books, 30, 2, device, torch.float32)
    logits(model, torch.cat((ids[:, :20], ids[:, :5]), 1), cache)
    cache.crop(-8)
    close(logits(model, ids[:, 17:], cache), want[:, 17:])
    cache.crop(-30)
    close(logits(model, ids, cache), want)
    with pytest.raises(ValueError, match="31 cannot be dropped"):
        cache.crop(-31)
    disable(model)


def test_a_token_hidden_from_the_newest_query_alone(enabled, ids):
    """A 4-D mask: what some query of it sees is no padding, and later steps without a mask see it."""
    n = 12
    mask = torch.ones(n, n, dtype=torch.bool, device=ids.device).tril()
    mask[-4:, :6] = False
    mask = mask[None, None].expand(2, 1, n, n)

    def run(cache):
        with torch.no_grad():
            first = enabled(ids[:, :n], attention_mask=mask, past_key_values=cache).logits
            return torch.cat([first, enabled(ids[:, n : n + 1], past_key_values=cache).logits], 1)

    dense = RecordingCache(enabled.config)
    want = run(dense)
    cache = MillionStaticCache(enabled.config, lossless_codebooks(enabled, [dense], CONFIG), MAX_LEN)
    close(run(cache), want)
    assert cache.state.clocks[0].start.tolist() == [0, 0]


def test_padding_that_sees_itself(enabled, books, ids):
    """A 4-D mask whose padded tokens see themselves, lest their softmax is empty: they are padding all the same."""
    n, start = 12, 3
    mask = torch.ones(n, n, dtype=torch.bool, device=ids.device).tril()
    mask[:, :start] = False
    mask |= torch.eye(n, dtype=torch.bool, device=ids.device)
    cache = MillionStaticCache(enabled.config, books, MAX_LEN)
    with torch.no_grad():
        enabled(ids[:, :n], attention_mask=mask[None, None].expand(2, 1, n, n), past_key_values=cache)
    assert cache.state.clocks[0].start.tolist() == [start, start]


def in_chunks(model, ids, cache) -> torch.Tensor:
    """Logits of the first 20 tokens: a prefill, a step and a chunk."""
    return torch.cat([model(x, past_key_values=cache).logits for x in ids[:, :20].split((10, 1, 9), 1)], 1)


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["lazily", "in fp32"])
@pytest.mark.parametrize("enable_it", [True, False], ids=["enabled", "dequantised"])
@pytest.mark.filterwarnings("ignore:attention implementation")
def test_autocast(model, books, ids, enable_it, dtype):
    """Keys are rotated in fp32 there and values are not: the cache holds both in autocast's dtype, as the dense attention reads them, or
    in the one that it was allocated with."""
    if enable_it:
        enable(model)
    try:
        with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16):
            now = {} if dtype is None else {"batch_size": 2, "device": ids.device, "dtype": dtype}
            cache = MillionStaticCache(model.config, books, MAX_LEN, **now)
            got, want = (in_chunks(model, ids, x) for x in (cache, DynamicCache(config=model.config)))
        exact = logits(model, ids[:, :20], DynamicCache(config=model.config))
    finally:
        disable(model)
    assert all(x.dtype == (dtype or torch.bfloat16) for x in (*cache.layers[0].ring, *cache.layers[0].sinks))
    assert (got.float() - exact).norm() <= 1.5 * (want.float() - exact).norm()


@pytest.mark.parametrize("now", [{}, {"batch_size": 2, "dtype": torch.bfloat16}], ids=["lazily", "at once"])
def test_autocast_with_sliding_layers(device, ids, now):
    model = tiny_gemma3().to(device)
    now = now and {"device": ids.device, **now}
    cache = MillionStaticCache(model.config, lossless_for(model, ids[:, :20], CONFIG), MAX_LEN, **now)
    exact = logits(model, ids[:, :20], DynamicCache(config=model.config))
    enable(model)
    with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16):
        got, want = (in_chunks(model, ids, x) for x in (cache, DynamicCache(config=model.config)))
    assert all(x.keys.dtype == torch.bfloat16 for x in cache.layers if not isinstance(x, MillionLayer))
    assert (got.float() - exact).norm() <= 1.5 * (want.float() - exact).norm()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3])
def test_a_cache_made_and_copied_in_inference_mode(device, ids, make):
    """Both are good outside of it."""
    model = make().to(device)
    enable(model)
    books = lossless_for(model, ids[:, :20], CONFIG)
    want = logits(model, ids[:, :20], DynamicCache(config=model.config))[:, 10:]
    with torch.inference_mode():
        cache = MillionStaticCache(model.config, books, MAX_LEN)
        model(ids[:, :10], past_key_values=cache)
        twin = copy.deepcopy(cache)
    for each in (cache, twin):
        close(logits(model, ids[:, 10:20], each), want)


def test_a_cache_allocated_in_inference_mode(device, ids):
    """Its buffers are written outside of it too, those of sliding layers as well."""
    model = tiny_gemma3().to(device)
    enable(model)
    cache = MillionStaticCache(model.config, lossless_for(model, ids[:, :20], CONFIG), MAX_LEN)
    with torch.inference_mode():
        model(ids[:, :10], past_key_values=cache)
    cache.reset()
    close(logits(model, ids[:, :20], cache), logits(model, ids[:, :20], DynamicCache(config=model.config)))


def test_a_forward_that_records_gradients(device, ids):
    """What a cache keeps of it are its tokens, not its graph: a copy can be made of sliding layers too."""
    model = tiny_gemma3().to(device)
    enable(model)
    cache = MillionStaticCache(model.config, random_codebooks(model, CONFIG), MAX_LEN)
    for i in range(3):
        model(ids[:, i : i + 1], past_key_values=cache)
    assert not any(x.requires_grad for x in cache.named_tensors().values())
    copy.deepcopy(cache)


def test_models_in_wrappers(model, books):
    """`torch.compile`'s and peft's: the model inside is checked."""

    class Wrapped(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def get_base_model(self):
            return self.model

    for wrapped in (torch.compile(model), Wrapped(model)):
        assert MillionStaticCache(wrapped, books, MAX_LEN).state.fingerprint_seen
    with pytest.raises(ValueError, match="another model"):
        MillionStaticCache(torch.compile(tiny_llama(seed=7)), books, MAX_LEN)


def test_a_window_longer_than_the_cache(model, books):
    """Nothing is allocated for tokens that cannot come."""
    kw = {"batch_size": 2, "dtype": torch.float32, "recent_tokens": 100_000, "sink_tokens": 1000}
    cache = MillionStaticCache(model.config, books, MAX_LEN, **kw)
    assert cache.layers[0].ring[0].shape[2] == cache.layers[0].sinks[0].shape[2] == MAX_LEN
    pq = replace(CONFIG, recent_tokens=100_000, sink_tokens=1000)
    assert cache.cache_bytes == MillionStaticCache.required_bytes(model.config, pq, MAX_LEN, 2, torch.float32)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("batch_size", 0), ("batch_size", 1.5), ("dtype", torch.float64), ("dtype", torch.int8), ("first_position", 1.5)],
)
def test_impossible_arguments(model, books, argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be .*, got {value}"):
        MillionStaticCache(model.config, books, MAX_LEN, **{argument: value})


def test_a_sliding_window_that_is_longer_than_every_sequence():
    """It holds for caches within it: beyond, the window would slide over codes."""
    model = tiny_phi3_long(sliding_window=600)
    books = random_codebooks(model, CONFIG)
    MillionStaticCache(model.config, books, 600)
    with pytest.raises(ValueError, match="sliding window of 600 tokens; max_cache_len must be at most that, got 601"):
        MillionStaticCache(model.config, books, 601)


def test_enable_refuses_attention_that_is_not_its_own(monkeypatch):
    """A model that transformers runs without SDPA, and one that never asks for an attention function: they would give other text."""
    with pytest.raises(NotImplementedError, match="gpt_neo: its attention is not PyTorch's"):
        enable(tiny_gptneo())
    model = tiny_llama()
    monkeypatch.setattr(model, "set_attn_implementation", lambda name: None)
    with pytest.raises(NotImplementedError, match="does not hand keys and values"):
        enable(model)
    assert model.config._attn_implementation == "sdpa"
    MillionStaticCache(model.config, random_codebooks(model, CONFIG), MAX_LEN)  # as of a model that was never enabled


def test_enable_again_after_other_weights(books):
    """The model is measured anew, so that a cache made from its config is refused as one made from the model is."""
    model, other = tiny_llama(), tiny_llama(seed=7)
    enable(model)
    MillionStaticCache(model.config, books, MAX_LEN)
    model.load_state_dict(other.state_dict())
    enable(model)
    with pytest.raises(ValueError, match="calibrated for another model"):
        MillionStaticCache(model.config, books, MAX_LEN)
    disable(model)
    assert model.config._attn_implementation == "sdpa"


def test_enable_leaves_modes_alone():
    model = tiny_llama().train()
    model.model.layers[0].eval()
    enable(model)
    assert model.training and model.model.layers[1].training and not model.model.layers[0].training


def test_enable_after_the_name_was_set(ids):
    """`enable` also records a model, and a copy of one, that runs the attention function already."""
    model = tiny_llama().to(ids.device)
    model.set_attn_implementation("million")
    for each in (model, copy.deepcopy(model)):
        enable(each)
        logits(each, ids[:, :4], MillionStaticCache(each.config, random_codebooks(each, CONFIG), 16))
        disable(each)
        assert each.config._attn_implementation == "sdpa"


def test_dequantising_forgets_the_padding_of_before(model, books, ids):
    """Rows that started late in a million prompt start at slot 0 when the same cache dequantises another."""
    cache = MillionStaticCache(model.config, books, MAX_LEN)
    mask = torch.ones_like(ids[:, :20])
    mask[:, :10] = 0
    enable(model)
    with torch.no_grad():
        model(ids[:, :20], attention_mask=mask, past_key_values=cache)
    cache.crop(-20)
    disable(model)
    logits(model, ids[:, :20], cache)
    got = logits(model, ids[:, 20:24], cache)
    close(got, logits(model, ids[:, :24], DynamicCache(config=model.config))[:, 20:])


# -- bytes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("length", [1, 64, 100, 8192])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3], ids=["llama", "gemma3"])
def test_required_bytes_are_the_bytes(make, preset, length):
    model = make()
    books = random_codebooks(model, PRESETS[preset])
    need = MillionStaticCache.required_bytes(model.config, books, length, 3, torch.bfloat16)
    cache = MillionStaticCache(model.config, books, length, batch_size=3, dtype=torch.bfloat16)
    assert cache.cache_bytes == need


@pytest.mark.parametrize(("preset", "share"), [("4bit", 1 / 4), ("3bit", 3 / 16), ("2bit", 1 / 8), ("1bit", 1 / 16)])
def test_memory_is_saved(preset, share):
    model = tiny_llama()
    books = random_codebooks(model, PRESETS[preset])
    cache = MillionStaticCache(model.config, books, 8192, batch_size=1, dtype=torch.bfloat16)
    dense = StaticCache(model.config, 8192)
    dense.early_initialization(1, 2, 32, torch.bfloat16, torch.device("cpu"))
    dense_bytes = sum(x.nbytes for layer in dense.layers for x in (layer.keys, layer.values))
    window = PRESETS[preset].recent_tokens + PRESETS[preset].sink_tokens
    assert cache.cache_bytes <= (share + window / 8192 + 0.005) * dense_bytes
    assert cache.bits_per_element == 16 * share
    assert cache.bits_per_element_total == pytest.approx(16 * cache.cache_bytes / dense_bytes)
    assert cache.codebook_bytes == books.nbytes


def random_codebooks(model, config):
    """Codebooks of the right shapes for ``model``; their centroids mean nothing."""
    recording = RecordingCache(model.config)
    with torch.no_grad():
        model(torch.arange(3, 20, device=model.device)[None], past_key_values=recording)
    return lossless_codebooks(model, [recording], config)


# -- errors -----------------------------------------------------------------------------------------------------------------


def test_more_tokens_than_fit(enabled, books, ids):
    cache = MillionStaticCache(enabled.config, books, 16)
    logits(enabled, ids[:, :14], cache)
    before = [x.clone() for layer in cache.layers for x in layer.buffers()]
    with pytest.raises(ValueError, match=r"14 tokens and max_cache_len is 16: 3 more do not fit; nothing was written"):
        logits(enabled, ids[:, 14:17], cache)
    assert all(torch.equal(x, y) for x, y in zip(before, [x for layer in cache.layers for x in layer.buffers()]))
    assert int(cache.get_seq_length()) == 14
    logits(enabled, ids[:, 14:16], cache)  # and it still works


def test_a_prompt_longer_than_the_cache(enabled, books, ids):
    cache = MillionStaticCache(enabled.config, books, 16)
    with pytest.raises(ValueError, match=r"17 more do not fit|covers 17 tokens"):
        enabled.generate(ids[:, :17], past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize("enable_it", [True, False], ids=["enabled", "dequantised"])
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.filterwarnings("ignore:attention implementation")
def test_generating_past_the_end(request, model, books, ids, padded, enable_it):
    """The step that does not fit raises, not a token later, though it is compiled on a GPU and transformers may drop a mask of ones."""
    if enable_it:
        request.getfixturevalue("enabled")
    mask = torch.ones_like(ids[:, :10])
    mask[1, : 3 * padded] = 0
    cache = MillionStaticCache(model.config, books, 16)

    def generate(new):
        return model.generate(
            ids[:, :10], attention_mask=mask, max_new_tokens=new, do_sample=False, **cache_argument(model, cache)
        )

    assert generate(7).shape[1] == 17  # the last token is not fed
    cache.reset()
    for _ in range(20):
        cache.get_mask_sizes(1, 0)  # masks of forwards that never come are no tokens
    assert generate(7).shape[1] == 17
    cache.reset()
    with pytest.raises(ValueError, match=r"16 tokens and max_cache_len is 16: 1 more|covers 17 tokens"):
        generate(9)
    cache.check()  # nothing was dropped
    assert int(cache.get_seq_length()) == 16


def test_steps_that_make_their_masks_are_counted(enabled, books, ids):
    """Compiled with its mask, a forward is not seen by the host; the next that is, compiled or not, is refused if it does not fit."""
    cache = MillionStaticCache(enabled.config, books, 16)
    step = torch.compile(enabled, fullgraph=True)
    with torch.no_grad():
        logits(enabled, ids[:, :10], cache)
        for i in range(10, 14):
            logits(step, ids[:, i : i + 1], cache)
        assert cache.state.counted is None  # so that it asks the clock, which on a CPU it always does
        logits(enabled, ids[:, 14:16], cache)
        with pytest.raises(ValueError, match="16 tokens and max_cache_len is 16: 1 more"):
            logits(enabled, ids[:, :1], cache)
        with pytest.raises(ValueError, match="16 tokens and max_cache_len is 16: 1 more"):
            cache.get_mask_sizes(1, 0)


def test_the_sticky_overflow_flag(enabled, books, ids):
    """What a captured graph does: the clock runs on, tokens are dropped, the next host call says so."""
    cache = MillionStaticCache(enabled.config, books, 64)  # a whole tile, so that nothing lies behind it
    logits(enabled, ids[:, :64], cache)
    clock = cache.layers[0].clock
    clock.begin(2)
    k = torch.randn(2, 2, 2, 32, device=ids.device)
    before = [x.clone() for x in cache.layers[0].codes]
    cache.layers[0].append(k, k)
    cache.state.commit()
    assert all(torch.equal(x, y) for x, y in zip(before, cache.layers[0].codes))
    calls = [cache.check, lambda: cache.crop(-1), cache.reset]
    if ids.device.type == "cpu":
        calls.insert(0, cache.get_seq_length)  # on a GPU it would make every step wait
    for call in calls:
        with pytest.raises(RuntimeError, match="66 tokens were given to a cache of max_cache_len 64"):
            call()
    cache.check()  # the reset was done all the same
    assert cache.get_seq_length() == 0


def test_another_batch_size(enabled, books, ids):
    cache = MillionStaticCache(enabled.config, books, 16, batch_size=1, device=ids.device, dtype=torch.float32)
    with pytest.raises(ValueError, match="batch size 1, got 2"):
        logits(enabled, ids[:, :4], cache)


def test_another_dtype(enabled, books, ids):
    cache = MillionStaticCache(enabled.config, books, 16, batch_size=2, device=ids.device, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"bfloat16 on .*, got torch.float32"):
        logits(enabled, ids[:, :4], cache)


def test_codebooks_of_another_model(enabled, books, ids):
    other = tiny_llama(seed=5).to(ids.device)
    with pytest.raises(ValueError, match="another model"):
        MillionStaticCache(other, books, 16)
    cache = MillionStaticCache(other.config, books, 16)  # same shapes: a config cannot tell
    enable(other)
    try:
        with pytest.raises(ValueError, match="another model"):
            logits(other, ids[:, :4], cache)
        with pytest.raises(ValueError, match="another model"):
            MillionStaticCache(other.config, books, 16)
    finally:
        disable(other)
    MillionStaticCache(enabled, books, 16)


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 3}, {"num_key_value_heads": 4}, {"head_dim": 64}, {"vocab_size": 99}], ids=str
)
def test_codebooks_of_another_shape(books, change):
    with pytest.raises(ValueError, match="another model"):
        MillionStaticCache(tiny_llama(**change).config, books, 16)


def test_switching_on_a_cache_with_tokens(model, books, ids):
    cache = MillionStaticCache(model.config, books, 32)
    enable(model)
    logits(model, ids[:, :5], cache)
    disable(model)
    with pytest.raises(RuntimeError, match="reset"):
        logits(model, ids[:, 5:6], cache)
    cache.reset()
    logits(model, ids[:, :5], cache)
    enable(model)
    try:
        with pytest.raises(RuntimeError, match="reset"):
            logits(model, ids[:, 5:6], cache)
    finally:
        disable(model)


def test_set_attn_implementation_is_not_enable(books, ids):
    other = tiny_llama().to(ids.device)
    other.set_attn_implementation("million")
    with pytest.raises(RuntimeError, match=r"call million_cache.enable\(model\)"):
        logits(other, ids[:, :4], MillionStaticCache(other.config, books, 16))


def test_cropping(enabled, books, ids):
    cache = MillionStaticCache(enabled.config, books, 32)
    logits(enabled, ids[:, :8], cache)
    with pytest.raises(ValueError, match="holds 8 tokens, 9 cannot be dropped"):
        cache.crop(-9)
    if CROP_KEEPS:
        cache.crop(9)
    else:
        with pytest.raises(ValueError, match="negative number of tokens to drop"):
            cache.crop(3)
    cache.crop(0)
    assert int(cache.get_seq_length()) == 8
    cache.crop(-8)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("length", [0, -1, 2.5, None])
def test_impossible_lengths(model, books, length):
    with pytest.raises(ValueError, match="max_cache_len must be a positive integer"):
        MillionStaticCache(model.config, books, length)


def test_output_attentions_is_refused(enabled, books, ids):
    cache = MillionStaticCache(enabled.config, books, 32)
    with pytest.raises((NotImplementedError, ValueError), match="output_attentions"), torch.no_grad():
        enabled(ids[:, :4], past_key_values=cache, output_attentions=True)


def test_biased_masks_are_refused(enabled, books, ids):
    cache = MillionStaticCache(enabled.config, books, 32)
    mask = torch.randn(2, 1, 4, 4, device=ids.device)
    with pytest.raises(NotImplementedError, match="bias"), torch.no_grad():
        enabled(ids[:, :4], attention_mask=mask, past_key_values=cache)


def test_dropout_is_refused(books, ids):
    model = tiny_llama(attention_dropout=0.1).to(ids.device)
    enable(model)
    model.train()
    try:
        with pytest.raises(NotImplementedError, match="dropout"):
            model(ids[:, :4], past_key_values=MillionStaticCache(model.config, books, 16))
    finally:
        model.eval()
        disable(model)


def test_buffers_have_one_address_for_life(enabled, books, ids):
    cache = MillionStaticCache(enabled.config, books, 32, batch_size=2, device=ids.device, dtype=torch.float32)
    layers = [x for x in cache.layers if isinstance(x, MillionLayer)]
    addresses = [x.data_ptr() for layer in layers for x in (*layer.buffers(), *layer.clock.tensors())]
    logits(enabled, ids[:, :9], cache)
    logits(enabled, ids[:, 9:10], cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    cache.crop(-3)
    cache.reset()
    assert addresses == [x.data_ptr() for layer in layers for x in (*layer.buffers(), *layer.clock.tensors())]
