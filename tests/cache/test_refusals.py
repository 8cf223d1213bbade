"""What the cache refuses before it writes or allocates: too little memory, another device, another model, a model that was disabled."""

from __future__ import annotations

import copy
import re

import pytest
import torch

from million_cache import PRESETS, MillionStaticCache, disable, enable
from million_cache import cache as cache_module
from million_cache.cache import MillionLayer, free_bytes
from tests.cache.test_cache import CONFIG, random_codebooks
from tests.cache.tiny_models import tiny_gemma3, tiny_llama

OutOfMemory = torch.cuda.OutOfMemoryError


@pytest.fixture(scope="module")
def model(device):
    return tiny_llama().to(device)


@pytest.fixture
def enabled_model(model):
    enable(model)
    yield model
    disable(model)


@pytest.fixture
def ids(device):
    return torch.arange(3, 23, device=device)[None]


@pytest.fixture
def memory(monkeypatch):
    """Sets how many bytes a device is said to have free."""

    def say(count: int) -> None:
        monkeypatch.setattr(cache_module, "free_bytes", lambda device: count)

    return say


def forward(model, ids, cache):
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


# -- memory -----------------------------------------------------------------------------------------------------------------


def test_free_bytes_are_the_drivers_and_the_allocators(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 120)
    assert free_bytes(torch.device("cuda", 0)) == 1180
    assert free_bytes(torch.device("cpu")) is None


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3], ids=["llama", "gemma3"])
@pytest.mark.parametrize("share", [0.9, 0.6, 0.3])
def test_what_fits_is_said_and_fits(make, share, memory):
    """The message's length and presets are right: each one is accepted, and nothing more than it is."""
    model, length, batch = make(), 8192, 3
    books = random_codebooks(model, PRESETS["4bit"])
    needed = MillionStaticCache.required_bytes(model.config, books, length, batch, torch.float32)
    available = int(share * needed)
    memory(available)
    with pytest.raises(OutOfMemory, match="nothing was allocated") as error:
        MillionStaticCache(model.config, books, length, batch, dtype=torch.float32)
    message = str(error.value)
    assert f"needs {needed / 1e9:.2f} GB on cpu for {batch} x {length} tokens at 4 bits" in message
    assert f"{available / 1e9:.2f} GB are free" in message
    fits = int(re.search(r"max_cache_len (\d+) with these codebooks", message)[1])
    cache = MillionStaticCache(model.config, books, fits, batch, dtype=torch.float32)
    assert cache.cache_bytes <= available
    with pytest.raises(OutOfMemory):
        MillionStaticCache(model.config, books, fits + 64, batch, dtype=torch.float32)
    for name, pq in PRESETS.items():
        takes = MillionStaticCache.required_bytes(model.config, pq, length, batch, torch.float32)
        assert (f"preset {name} (" in message) == (name != "4bit" and takes <= available)
        if name != "4bit" and takes <= available:
            MillionStaticCache(model.config, random_codebooks(model, pq), length, batch, dtype=torch.float32)


def test_nothing_fits(memory):
    model = tiny_llama()
    memory(1000)
    with pytest.raises(OutOfMemory, match=r"No shorter length and no preset fits\.$"):
        MillionStaticCache(model.config, random_codebooks(model, CONFIG), 4096, 1)


def test_the_window_counts(memory):
    """A window given to the cache, not the codebooks' own, decides what is needed."""
    model = tiny_llama()
    books = random_codebooks(model, CONFIG)
    memory(MillionStaticCache.required_bytes(model.config, books, 256, 1, torch.float32))
    MillionStaticCache(model.config, books, 256, 1, dtype=torch.float32)
    with pytest.raises(OutOfMemory):
        MillionStaticCache(model.config, books, 256, 1, dtype=torch.float32, recent_tokens=64)


def test_the_first_forward_allocates_nothing_that_does_not_fit(enabled_model, ids, memory):
    """Without batch_size= the first forward finds out, in its first layer, and the cache can be used when there is room."""
    cache = MillionStaticCache(enabled_model.config, random_codebooks(enabled_model, CONFIG), 256)
    memory(20_000)
    with pytest.raises(OutOfMemory, match=r"for 1 x 256 tokens"):
        forward(enabled_model, ids, cache)
    assert not any(layer.is_initialized for layer in cache.layers) and cache.cache_bytes == 0
    memory(1 << 40)
    assert forward(enabled_model, ids, cache).isfinite().all()


def test_a_gpu_says_so_before_it_allocates(model):
    if model.device.type != "cuda":
        pytest.skip("needs a GPU")
    books = random_codebooks(model, PRESETS["4bit"])
    books.to(model.device)
    before = torch.cuda.memory_allocated()
    with pytest.raises(OutOfMemory, match=r"free; nothing was allocated. These fit: max_cache_len \d+"):
        MillionStaticCache(model.config, books, 1 << 34, 1, model.device)
    assert torch.cuda.memory_allocated() == before


# -- devices ----------------------------------------------------------------------------------------------------------------


def test_a_cache_on_another_device(enabled_model, ids):
    """The meta device stands for a second one on the CPU; on a GPU it is the trap of leaving device= out."""
    elsewhere = "meta" if ids.device.type == "cpu" else "cpu"
    books = random_codebooks(enabled_model, CONFIG)
    cache = MillionStaticCache(enabled_model.config, books, 32, 1, elsewhere, torch.float32)
    with pytest.raises(
        ValueError, match=rf"on {elsewhere}, got torch.float32 on {ids.device}; nothing was written.*device="
    ):
        forward(enabled_model, ids, cache)
    assert cache.get_seq_length() == 0


# -- models -----------------------------------------------------------------------------------------------------------------


def test_another_model_of_the_same_shape(enabled_model, ids):
    """A cache that was made for one model, and is enabled for it, given to another: not only its own config is asked."""
    other = tiny_llama(seed=5).to(ids.device)
    books = random_codebooks(enabled_model, CONFIG)
    cache = MillionStaticCache(enabled_model, books, 32)
    enable(other)
    try:
        with pytest.raises(ValueError, match="another model"):
            forward(other, ids, cache)
    finally:
        disable(other)
    cache.reset()
    forward(enabled_model, ids, cache)


def test_a_copy_of_the_model(enabled_model, ids):
    """A copy has a config of its own: it must be enabled, and then it may use the cache."""
    twin = copy.deepcopy(enabled_model)
    books = random_codebooks(enabled_model, CONFIG)
    cache = MillionStaticCache(enabled_model, books, 32)
    with pytest.raises(RuntimeError, match=r"call million_cache.enable\(model\)"):
        forward(twin, ids, cache)
    cache.reset()
    enable(twin)
    try:
        got = forward(twin, ids, cache)
    finally:
        disable(twin)
    torch.testing.assert_close(got, forward(enabled_model, ids, MillionStaticCache(enabled_model, books, 32)))


def test_a_copy_that_runs_another_attention(enabled_model, ids):
    """The cache goes by the config that it was made with, which is not the copy's."""
    twin = copy.deepcopy(enabled_model)
    twin.set_attn_implementation("sdpa")
    with pytest.raises(AttributeError, match=r"does not run the million attention function"):
        forward(twin, ids, MillionStaticCache(enabled_model, random_codebooks(enabled_model, CONFIG), 32))


def test_a_compiled_step_after_disable(model, ids):
    """The graph was made for codes: after disable(model) the next step is refused, not run on the old graph."""
    books = random_codebooks(model, CONFIG)
    enable(model)
    cache = MillionStaticCache(model.config, books, 32, 1, ids.device, torch.float32)
    torch._dynamo.reset()
    step = torch.compile(model, backend="eager")
    forward(model, ids, cache)
    forward(step, ids[:, :1], cache)
    disable(model)
    with pytest.raises(Exception, match=r"reset\(\) the cache before enable\(model\) or disable\(model\)"):
        forward(step, ids[:, :1], cache)
    torch._dynamo.reset()
    cache.reset()
    forward(model, ids, cache)  # and from a reset on it works, dequantising
    assert isinstance(cache.layers[0], MillionLayer) and int(cache.get_seq_length()) == ids.shape[1]
