"""Every way of attending that a supported model family brings, through `generate`: tokens of the dense cache, padded or not, compiled or not."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from million_cache.cache import MillionLayer
from million_cache.models import full_attention_layers
from tests.cache.test_generate import GREEDY, LOGITS, assert_same_text, dense_then_million, mask_of, prompt
from tests.cache.tiny_models import FAMILIES

# Where `generate` compiles on a GPU: one of each kind of rotation and one with dense layers. Compiling takes longest of all,
# and `test_compiled_step` traces every family.
COMPILED = ("llama", "gptneox", "cohere", "smollm3", "gemma3")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def family_model(family, device):
    return FAMILIES[family]().to(device)


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
def test_generate_matches_dense(family, family_model, padded):
    model = family_model
    ids = prompt(model, 2)
    mask = mask_of(ids, padded)
    counters.clear()
    arguments = {**GREEDY, **LOGITS, "disable_compile": family not in COMPILED}
    want, got, (cache,) = dense_then_million(
        model,
        lambda make: model.generate(ids, attention_mask=mask, past_key_values=make(), **arguments),
        start=(1 - mask).sum(-1) if padded else None,
    )
    assert assert_same_text(want, got).any()
    assert not counters["graph_break"]
    quantised = [i for i, layer in enumerate(cache.layers) if isinstance(layer, MillionLayer)]
    assert quantised == full_attention_layers(model.config)


def test_compiled_step(family_model):
    """One token through torch.compile(fullgraph=True) gives the logits of eager."""
    model = family_model
    ids = prompt(model, 2)

    def run(make):
        cache = make()
        with torch.no_grad():
            model(ids, past_key_values=cache)
            # The dense run records this token too, so that the codes hold it.
            return model(ids[:, :1], past_key_values=cache).logits

    def compiled(make):
        cache = make()
        step = torch.compile(model, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            model(ids, past_key_values=cache)
            return (step if isinstance(cache.layers[-1], MillionLayer) else model)(
                ids[:, :1], past_key_values=cache
            ).logits

    torch._dynamo.reset()
    allocate = {"batch_size": 2, "device": model.device, "dtype": model.dtype}
    _, eager, _ = dense_then_million(model, run, **allocate)
    want, got, _ = dense_then_million(model, compiled, **allocate)
    torch.testing.assert_close(got, eager)
    assert (got - want).abs().max() <= 2e-2 * want.abs().max()
