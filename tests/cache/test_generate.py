"""The integration table: with lossless codes, every way of generating gives the tokens of the dense cache."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache

from million_cache import MillionStaticCache, PQConfig, disable, enable
from tests.cache.lossless import RecordingCache, lossless_codebooks
from tests.cache.tiny_models import tiny_gemma3, tiny_llama

CONFIG = PQConfig(k_subspace_dim=2, v_subspace_dim=4, frame_tokens=8, recent_tokens=4, sink_tokens=2)
NEW = 20
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


@pytest.fixture(scope="module")
def model(device):
    return tiny_llama().to(device)


def prompt(model, batch: int, length: int = 9, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed)).to(model.device)


STARTS = {1: [3], 2: [0, 3], 4: [0, 2, 4, 6]}  # first valid slot of each row, by batch size


def left_padding(ids: torch.Tensor) -> torch.Tensor:
    """The mask [B, T] of rows that begin at `STARTS`."""
    mask = torch.ones_like(ids)
    for b, start in enumerate(STARTS[len(ids)]):
        mask[b, :start] = 0
    return mask


@pytest.fixture(params=[1, 4], ids=["batch 1", "batch 4"])
def batch(request) -> int:
    return request.param


def mask_of(ids: torch.Tensor, padded: bool) -> torch.Tensor:
    return left_padding(ids) if padded else torch.ones_like(ids)


FEATURES = {
    "greedy": GREEDY,
    "sampling": {"max_new_tokens": NEW, "do_sample": True, "top_k": 20},
    "num_return_sequences": {"max_new_tokens": 12, "do_sample": True, "num_return_sequences": 3},
    "chunked prefill": {**GREEDY, "prefill_chunk_size": 4},
    "chunked prefill by one": {**GREEDY, "prefill_chunk_size": 1},
    "beams": {**GREEDY, "max_new_tokens": 12, "num_beams": 3},
}


# What compiles on a GPU beside greedy decoding; there compiling takes longest of all, and other features would compile the same graph.
COMPILED = ("sampling", "chunked prefill")

LOGITS = {"output_logits": True, "return_dict_in_generate": True}
ROUNDING = 5e-3  # of the logits' scale: what fp16 centroids leave, see test_cache.close


def assert_same_text(
    want, got, sampled: bool = False, rows: torch.Tensor | None = None, rounding=ROUNDING
) -> torch.Tensor:
    """Two outputs of `generate` with `LOGITS` are the same text, but for ties that rounding decides.

    In every row the logits agree up to the first token that differs, and there the dense model itself has both candidates
    within rounding (or the draw was different, if ``sampled``; then logits alone are compared). ``rows``: bool [B], the ones to
    compare; default all. Returns bool [B]: rows that are equal to the end.
    """
    logits, ours = (torch.stack(x.logits, 1) for x in (want, got))
    n = logits.shape[1]
    text, our_text = want.sequences[:, -n:], got.sequences[:, -n:]
    allowed = rounding * logits.abs().max()
    equal = torch.ones(len(text), dtype=torch.bool) if rows is None else rows.clone()
    for b in equal.nonzero().flatten().tolist():
        parted = (text[b] != our_text[b]).nonzero().flatten().tolist()
        end = parted[0] + 1 if parted else n
        assert (logits[b, :end] - ours[b, :end]).abs().max() <= allowed
        if parted:
            equal[b] = False
            here = logits[b, parted[0]]
            assert sampled or (here[text[b, parted[0]]] - here[our_text[b, parted[0]]]).abs() <= 2 * allowed
    assert len(text[:, -8:].unique()) > 4  # a loop on one token would hide an error
    return equal


def dense_then_million(model, run, config=CONFIG, start=None, max_cache_len=48, **cache_kwargs):
    """``run(cache_factory)`` with recording dense caches, then with lossless quantised ones; both results."""
    recordings: list[RecordingCache] = []

    def recording():
        recordings.append(RecordingCache(model.config))
        return recordings[-1]

    torch.manual_seed(7)
    want = run(recording)
    books = lossless_codebooks(model, recordings, config, start)
    enable(model)
    try:
        caches = []

        def quantised():
            caches.append(MillionStaticCache(model.config, books, max_cache_len, **cache_kwargs))
            return caches[-1]

        torch.manual_seed(7)
        got = run(quantised)
    finally:
        disable(model)
    return want, got, caches


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("feature", FEATURES)
def test_generate_matches_dense(model, feature, padded, batch):
    ids = prompt(model, batch)
    mask = mask_of(ids, padded)
    # On a GPU generate compiles the forwards of a chunked prefill, so the cache must be allocated before.
    allocate = {"batch_size": batch, "device": model.device, "dtype": model.dtype} if "chunked" in feature else {}
    compiled = feature == "greedy" or (batch == 4 and feature in COMPILED)
    eager = {} if compiled else {"disable_compile": True}
    beams = "num_beams" in FEATURES[feature]
    output = {"output_scores": True, "return_dict_in_generate": True} if beams else LOGITS
    want, got, caches = dense_then_million(
        model,
        lambda cache: model.generate(
            ids, attention_mask=mask, past_key_values=cache(), **FEATURES[feature], **eager, **output
        ),
        start=(1 - mask).sum(-1) if padded else None,
        **allocate,
    )
    if beams:  # a row may end in another beam whose score rounding cannot tell from the best
        equal = (want.sequences == got.sequences).all(-1)
        assert (want.sequences_scores - got.sequences_scores).abs().max() <= ROUNDING
    else:
        equal = assert_same_text(want, got, FEATURES[feature]["do_sample"])
    assert FEATURES[feature]["do_sample"] or 2 * equal.sum() >= len(equal)
    got = got.sequences
    tokens = got.shape[1] - 1  # the last one was never fed
    assert int(caches[0].get_seq_length()) in (tokens, tokens - 1)


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
def test_inputs_embeds(model, padded, batch):
    ids = prompt(model, batch)
    mask = mask_of(ids, padded)
    embeds = model.get_input_embeddings()(ids).detach()
    want, got, _ = dense_then_million(
        model,
        lambda cache: model.generate(
            inputs_embeds=embeds, attention_mask=mask, past_key_values=cache(), **GREEDY, **LOGITS
        ),
        start=(1 - mask).sum(-1) if padded else None,
    )
    assert_same_text(want, got)


MIXED = replace(CONFIG, allocation=[(8, 2), (2, 4)])


@pytest.mark.parametrize(
    "config", [CONFIG, MIXED, PQConfig(8, 8, 0, 0, 0), PQConfig(4, 2, 16, 1, 0), PQConfig(2, 2, 8, 64, 8)], ids=str
)
def test_every_window(model, config):
    """No window, no sinks, no frames, and a window longer than the run; layers with bits of their own."""
    ids = prompt(model, 2)
    want, got, _ = dense_then_million(
        model, lambda cache: model.generate(ids, past_key_values=cache(), **GREEDY), config
    )
    assert torch.equal(want, got)


old_transformers = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.17"),
    reason="transformers 5.4 refuses subclasses of StaticCache in assisted decoding, and prompt lookup without an eos token",
)


@old_transformers
def test_prompt_lookup(model):
    ids = prompt(model, 1, 4).repeat(1, 4)  # repeats, so that the lookup proposes and is refused
    want, got, _ = dense_then_million(
        model, lambda cache: model.generate(ids, past_key_values=cache(), prompt_lookup_num_tokens=3, **GREEDY)
    )
    assert torch.equal(want, got)


@old_transformers
def test_assisted_decoding(model):
    assistant = tiny_llama(seed=3).to(model.device)
    ids = prompt(model, 1)
    want, got, _ = dense_then_million(
        model, lambda cache: model.generate(ids, past_key_values=cache(), assistant_model=assistant, **GREEDY)
    )
    assert torch.equal(want, got)


def test_multi_turn(model, batch):
    first, second = prompt(model, batch), prompt(model, batch, 5, seed=2)

    def run(make):
        cache = make()
        one = model.generate(first, past_key_values=cache, max_new_tokens=8, do_sample=False, **LOGITS)
        ids = torch.cat((one.sequences, second), 1)
        return one, model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False, **LOGITS)

    want, got, _ = dense_then_million(model, run)
    equal = assert_same_text(want[0], got[0])
    assert equal.any()
    assert_same_text(want[1], got[1], rows=equal)


def test_padding_between_turns(model, batch):
    """A mask with holes: the second turn is padded on the left, in the middle of the sequence."""
    first, second = prompt(model, batch), prompt(model, batch, 5, seed=2)
    hole = torch.ones_like(second)
    hole[-1, :2] = 0

    def run(make):
        cache = make()
        one = model.generate(first, past_key_values=cache, max_new_tokens=6, do_sample=False, **LOGITS)
        mask = torch.cat((torch.ones_like(one.sequences), hole), 1)
        ids = torch.cat((one.sequences, second), 1)
        return one, model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=8, do_sample=False, **LOGITS
        )

    want, got, _ = dense_then_million(model, run)
    equal = assert_same_text(want[0], got[0])
    assert equal.any()
    assert_same_text(want[1], got[1], rows=equal)


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
def test_prefix_by_deepcopy(model, padded, batch):
    prefix = prompt(model, batch)
    mask = mask_of(prefix, padded)
    tails = [prompt(model, batch, 4, seed=s) for s in (5, 6)]

    def run(make):
        cache = make()
        with torch.no_grad():
            model(prefix, attention_mask=mask, past_key_values=cache)
        results = []
        for tail in tails:
            twin = copy.deepcopy(cache)
            known = len(getattr(cache, "seen", ()))
            ids, m = torch.cat((prefix, tail), 1), torch.cat((mask, torch.ones_like(tail)), 1)
            results.append(
                model.generate(ids, attention_mask=m, past_key_values=twin, max_new_tokens=8, do_sample=False, **LOGITS)
            )
            if isinstance(cache, RecordingCache):
                cache.seen.extend(twin.seen[known:])
        return results

    want, got, caches = dense_then_million(model, run, start=(1 - mask).sum(-1) if padded else None)
    for tail_want, tail_got in zip(want, got, strict=True):
        assert_same_text(tail_want, tail_got)
    assert int(caches[0].get_seq_length()) == prefix.shape[1]  # the prefix itself was not touched


def test_reset_and_reuse(model):
    """The same cache object for another prompt, with and without padding, keeps its buffers and forgets the first prompt."""
    ids, other = prompt(model, 2), prompt(model, 2, 7, seed=9)
    mask = left_padding(other)

    def run(make):
        cache = make()
        one = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
        if isinstance(cache, MillionStaticCache):
            addresses = [x.data_ptr() for layer in cache.layers for x in layer.buffers()]
            cache.reset()
            assert cache.get_seq_length() == 0
        else:
            seen, cache = cache.seen, make()
            cache.seen = seen
        # rows start elsewhere now: the recorded frames of this prompt are those of its own padding, so compare unpadded
        two = model.generate(other, past_key_values=cache, max_new_tokens=8, do_sample=False)
        if isinstance(cache, MillionStaticCache):
            assert addresses == [x.data_ptr() for layer in cache.layers for x in layer.buffers()]
            cache.reset()
            three = model.generate(other, attention_mask=mask, past_key_values=cache, max_new_tokens=1, do_sample=False)
            assert cache.layers[0].clock.start.tolist() == [0, 3] and cache.layers[0].clock.origin.tolist() == [0, -3]
            assert three.shape == (2, 8)
        return torch.cat((one, two), 1)

    want, got, _ = dense_then_million(model, run)
    assert torch.equal(want, got)


def test_without_enable_the_cache_dequantises(model):
    ids = prompt(model, 2)
    recording = RecordingCache(model.config)
    want = model.generate(ids, past_key_values=recording, **GREEDY)
    cache = MillionStaticCache(model.config, lossless_codebooks(model, [recording], CONFIG), 48)
    with pytest.warns(UserWarning, match="enable"):
        got = model.generate(ids, past_key_values=cache, disable_compile=True, **GREEDY)
    assert torch.equal(want, got)


@pytest.mark.parametrize("padded", [False, True])
def test_an_enabled_model_with_windows_runs_other_caches_as_before(device, padded):
    """Past its window of 8 tokens too."""
    model = tiny_gemma3().to(device)
    ids = prompt(model, 2, 14)
    mask = left_padding(ids) if padded else torch.ones_like(ids)

    def answers():
        short = {"attention_mask": mask[:, :5], **GREEDY}
        static = {"cache_implementation": "static", "disable_compile": True}
        yield model.generate(ids[:, :5], **short)
        yield model.generate(ids, attention_mask=mask, **GREEDY)
        yield model.generate(ids, attention_mask=mask, **static, **GREEDY)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            for end in range(5, 15):  # a mask that covers more than the window
                begin = 0 if end == 5 else end - 1
                yield model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits

    want = list(answers())
    enable(model)
    for x, y in zip(answers(), want, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def test_an_enabled_model_runs_other_caches_as_before(model):
    ids, mask = prompt(model, 2), left_padding(prompt(model, 2))
    want = model.generate(ids, attention_mask=mask, **GREEDY)
    enable(model)
    try:
        assert torch.equal(want, model.generate(ids, attention_mask=mask, **GREEDY))
        assert torch.equal(
            want, model.generate(ids, attention_mask=mask, past_key_values=DynamicCache(config=model.config), **GREEDY)
        )
        static = {"cache_implementation": "static", "disable_compile": True}
        assert torch.equal(want, model.generate(ids, attention_mask=mask, **static, **GREEDY))
    finally:
        disable(model)
    assert model.config._attn_implementation == "sdpa"
