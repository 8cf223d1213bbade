"""torch.compile: one graph, no recompile, no clone of a buffer, and the tokens of eager."""

from __future__ import annotations

import re

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor.cudagraph_trees import get_manager
from torch._inductor.utils import run_and_get_code
from transformers import CompileConfig

from million_cache import MillionStaticCache, PQConfig, disable, enable
from tests.cache.lossless import RecordingCache, lossless_codebooks, lossless_for
from tests.cache.tiny_models import tiny_gemma3, tiny_llama

# Layers that differ in everything they can differ in.
CONFIG = PQConfig(2, 4, frame_tokens=8, recent_tokens=4, sink_tokens=2, allocation=[(2, 4), (8, 2)])
MAX_LEN = 64


@pytest.fixture(scope="module")
def ids(device):
    return torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(4)).to(device)


@pytest.fixture(scope="module")
def model_and_books(ids):
    model = tiny_llama().to(ids.device)
    recording = RecordingCache(model.config)
    with torch.no_grad():
        model(ids, past_key_values=recording)
    books = lossless_codebooks(model, [recording], CONFIG)
    enable(model)
    yield model, books
    disable(model)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def new_cache(model, books, batch=2):
    return MillionStaticCache(model.config, books, MAX_LEN, batch, model.device, torch.float32)


def steps(step, model, cache, ids, prefill=12):
    """Eager prefill, then one call of ``step`` a token: the logits of every step."""
    with torch.no_grad():
        model(ids[:, :prefill], past_key_values=cache)
        return torch.cat(
            [step(ids[:, i : i + 1], past_key_values=cache).logits for i in range(prefill, ids.shape[1])], 1
        )


def test_one_graph_and_no_recompile(model_and_books, ids):
    """Across frame and ring borders, for a second cache object, after a reset and after a deepcopy-free crop."""
    model, books = model_and_books
    want = steps(model, model, new_cache(model, books), ids)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    cache = new_cache(model, books)
    torch.testing.assert_close(steps(compiled, model, cache, ids), want)
    assert counter.frame_count == 1
    torch.testing.assert_close(steps(compiled, model, new_cache(model, books), ids), want)
    cache.reset()
    torch.testing.assert_close(steps(compiled, model, cache, ids), want)
    cache.crop(-7)
    with torch.no_grad():
        again = torch.cat([compiled(ids[:, i : i + 1], past_key_values=cache).logits for i in range(33, 40)], 1)
    torch.testing.assert_close(again, want[:, -7:], rtol=1e-2, atol=1e-2)  # after a crop more keys come from codes
    assert counter.frame_count == 1


def test_no_recompile_at_the_edge_of_a_sliding_window(ids):
    """One graph for a window of 8 tokens that is filling, full and far behind; again after a reset."""
    model = tiny_gemma3().to(ids.device)
    books = lossless_for(model, ids, CONFIG)
    enable(model)
    try:
        want = steps(model, model, new_cache(model, books), ids, prefill=3)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        cache = new_cache(model, books)
        torch.testing.assert_close(steps(compiled, model, cache, ids, prefill=3), want)
        cache.reset()
        torch.testing.assert_close(steps(compiled, model, cache, ids, prefill=12), want[:, 9:], rtol=1e-3, atol=1e-3)
        assert counter.frame_count == 1
    finally:
        disable(model)


def test_compiled_prefill(model_and_books, ids):
    """fullgraph from the very first forward, when the cache was allocated before."""
    model, books = model_and_books
    cache = new_cache(model, books)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        got = compiled(ids[:, :12], past_key_values=cache).logits
        want = model(ids[:, :12], past_key_values=new_cache(model, books)).logits
        torch.testing.assert_close(got, want)
        got = compiled(ids[:, 12:13], past_key_values=cache).logits
        eager = new_cache(model, books)
        model(ids[:, :12], past_key_values=eager)
        torch.testing.assert_close(got, model(ids[:, 12:13], past_key_values=eager).logits)


def test_an_unallocated_cache_cannot_be_compiled_into(model_and_books, ids):
    model, books = model_and_books
    cache = MillionStaticCache(model.config, books, MAX_LEN)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="batch_size="), torch.no_grad():
        compiled(ids[:, :12], past_key_values=cache)


def test_inductor_inserts_no_clone(model_and_books, ids):
    """The generated code of a decode step allocates nothing as large as a code buffer and clones no buffer."""
    model, books = model_and_books
    cache = new_cache(model, books)
    with torch.no_grad():
        want = model(ids[:, :12], past_key_values=cache).logits
        compiled = torch.compile(model, fullgraph=True)
        _, (code, *_) = run_and_get_code(lambda: compiled(ids[:, 12:13], past_key_values=cache))
    assert code.count("torch.ops.million_ops.pq_append_.default(") == model.config.num_hidden_layers
    assert code.count("torch.ops.million_ops.pq_attention.default(") == model.config.num_hidden_layers
    # A clone would be a buffer of inductor's own, whatever its shape: the append must get the graph's inputs themselves.
    for call in re.findall(r"torch\.ops\.million_ops\.pq_append_\.default\((.*)\)", code):
        arguments = re.findall(r"(?:reinterpret_tensor\((?:[^()]|\([^()]*\))*\)|[^,])+", call)
        assert all(re.fullmatch(r"\s*arg\d+_1", x) for x in arguments[6:12]), call  # k_codes .. v_sinks
    assert "uint8" not in "".join(line for line in code.splitlines() if "= empty_strided" in line)
    assert want.isfinite().all()


def test_generate_compiles_by_itself(model_and_books, ids):
    """generate's own compilation (forced on the CPU) gives eager's tokens, padded and unpadded, without a new graph."""
    model, books = model_and_books
    graphs = []

    def backend(graph, inputs):  # a function, because generate copies the configuration
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    config = CompileConfig(backend=backend, mode=None, fullgraph=True)
    config._compile_all_devices = True
    arguments = {"max_new_tokens": 10, "do_sample": False}
    mask = torch.ones_like(ids[:, :12])
    mask[1, :5] = 0
    for attention_mask in (torch.ones_like(mask), mask):
        want = model.generate(
            ids[:, :12], attention_mask=attention_mask, past_key_values=new_cache(model, books), **arguments
        )
        got = model.generate(
            ids[:, :12],
            attention_mask=attention_mask,
            past_key_values=new_cache(model, books),
            compile_config=config,
            **arguments,
        )
        assert torch.equal(want, got)
    assert len(graphs) == 1


def test_cuda_graphs(model_and_books, ids):
    """mode="reduce-overhead" captures the step: no skip, the tokens of eager at every length, a second cache and a reset included."""
    model, books = model_and_books
    if ids.device.type != "cuda":
        pytest.skip("needs a GPU")
    counters.clear()
    want = steps(model, model, new_cache(model, books), ids)
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True)

    def compiled(*args, **kwargs):
        torch.compiler.cudagraph_mark_step_begin()
        out = step(*args, **kwargs)
        out.logits = out.logits.clone()  # the graph's next replay overwrites it
        return out

    cache = new_cache(model, books)
    for again in (cache, new_cache(model, books), cache):
        again.reset()
        torch.testing.assert_close(steps(compiled, model, again, ids), want, rtol=1e-3, atol=1e-3)
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0


# What users may ask `generate` to compile with; None is its own choice, mode="reduce-overhead" with breaks allowed.
CONFIGS = {
    "automatic": None,
    "fullgraph": {"mode": "reduce-overhead", "fullgraph": True},
    "max-autotune": {"mode": "max-autotune", "fullgraph": True},
}


@pytest.mark.parametrize("config", CONFIGS)
def test_generate_uses_cuda_graphs(model_and_books, ids, config):
    """On a GPU `generate` compiles one decode graph and replays it: over frame, ring and tile borders, for a second prompt, a second cache
    object, a padded batch and a cache that was reset. A recompilation raises; no graph break, no step outside CUDA graphs."""
    model, books = model_and_books
    if ids.device.type != "cuda":
        pytest.skip("needs a GPU")
    counters.clear()
    arguments = {"max_new_tokens": 16, "do_sample": False}
    compiled = {} if CONFIGS[config] is None else {"compile_config": CompileConfig(**CONFIGS[config])}
    mask = torch.ones_like(ids[:, :12])
    padded = mask.clone()
    padded[1, :5] = 0
    reused = new_cache(model, books)
    runs = [
        (0, mask, reused),
        (3, mask, new_cache(model, books)),
        (0, padded, new_cache(model, books)),
        (5, padded, reused),
    ]
    # Products by cuBLAS alone: what autotuning would choose for them is not ours, and takes minutes.
    with torch._dynamo.config.patch(error_on_recompile=True), inductor.patch(max_autotune_gemm_backends="ATEN"):
        for start, attention_mask, cache in runs:
            prompt = ids[:, start : start + 12]
            eager = new_cache(model, books)
            want = model.generate(
                prompt, attention_mask=attention_mask, past_key_values=eager, disable_compile=True, **arguments
            )
            cache.reset()
            got = model.generate(prompt, attention_mask=attention_mask, past_key_values=cache, **compiled, **arguments)
            assert torch.equal(want, got)
        reused.reset()
        long = model.generate(
            prompt,
            attention_mask=padded,
            past_key_values=reused,
            **compiled,
            **arguments | {"max_new_tokens": MAX_LEN - 12},
        )
        assert torch.equal(long[:, : got.shape[1]], got) and long.shape[1] == MAX_LEN
    reused.check()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert counters["inductor"]["cudagraph_skips"] == 0
    manager = get_manager(ids.device.index or 0, create_if_none_exists=False)
    assert any(manager.roots.values()), "no CUDA graph was recorded"


def test_a_compiled_model_generates(model_and_books, ids):
    """`model.compile()` by the user: generate runs a graph for the prefill and one for every decode step, padded or not."""
    model, books = model_and_books
    arguments = {"max_new_tokens": 20, "do_sample": False, "disable_compile": True}
    mask = torch.ones_like(ids[:, :12])
    mask[1, :5] = 0

    def generate(start, attention_mask, cache):
        prompt = ids[:, start : start + 12]
        return model.generate(prompt, attention_mask=attention_mask, past_key_values=cache, **arguments)

    runs = [(0, mask), (3, mask), (1, mask)]
    want = [generate(*run, new_cache(model, books)) for run in runs]
    counter = CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter, fullgraph=True)
    try:
        got = [generate(*run, new_cache(model, books)) for run in runs]
        assert counter.frame_count == 2
        got.append(generate(0, torch.ones_like(mask), new_cache(model, books)))
        assert counter.frame_count == 3  # a prefill without padding has no mask; decode has the same graph
    finally:
        model._compiled_call_impl = None
    want.append(generate(0, torch.ones_like(mask), new_cache(model, books)))
    assert all(torch.equal(x, y) for x, y in zip(want, got, strict=True))
