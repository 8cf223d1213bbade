"""Weights quantised by torchao together with the cache: the same codebooks, calibration, generate, compiled steps."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache

from million_cache import MillionStaticCache, PQConfig, calibrate, disable, enable
from million_cache.models import fingerprint
from tests.cache.test_generate import GREEDY, LOGITS, assert_same_text, dense_then_million, prompt
from tests.cache.tiny_models import tiny_llama

pytest.importorskip("torchao", reason="torchao is not installed", exc_type=ImportError)

# Rounding of logits: int8 models run in float32; those with int4 must be bfloat16, 2^-8 a rounding
# (an H200 gave 0.043).
ROUNDING = {"int8": 5e-3, "int4": 6e-2}


@pytest.fixture(scope="module", params=ROUNDING)
def weights(request, device) -> str:
    if request.param == "int4" and device == "cpu":
        pytest.skip("torchao's int4 format that needs no other package, TILE_PACKED_TO_4D, is for GPUs")
    return request.param


@pytest.fixture(scope="module")
def original(weights, device):
    """The model before, of a head_dim that tensor cores serve."""
    return tiny_llama(head_dim=64).to(device, torch.float32 if weights == "int8" else torch.bfloat16)


@pytest.fixture(scope="module")
def model(original, weights, device):
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    model = tiny_llama(head_dim=64).to(device, original.dtype)
    # set_inductor_config would switch float32 products to TF32 for every test after this one.
    if weights == "int8":
        quantize_(model.model, Int8WeightOnlyConfig(set_inductor_config=False))
    else:
        quantize_(
            model.model,
            Int4WeightOnlyConfig(group_size=32, int4_packing_format="tile_packed_to_4d", set_inductor_config=False),
        )
    changed = model.model.layers[0].self_attn.q_proj.weight
    assert type(changed) is not torch.nn.Parameter and type(changed).__module__.startswith("torchao")
    return model


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_it_is_the_same_model(original, model):
    """Codebooks of the unquantised model serve the quantised one, and the other way round."""
    assert fingerprint(original).matches(fingerprint(model)) == []
    assert fingerprint(model).matches(fingerprint(original)) == []


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
def test_generate(model, weights, padded, device):
    """Text of the dense cache of the same quantised model; on a GPU, where `generate` compiles, by one graph inside CUDA graphs."""
    ids = prompt(model, 2)
    mask = torch.ones_like(ids)
    mask[1, : 3 * padded] = 0
    want, got, _ = dense_then_million(
        model,
        lambda make: model.generate(ids, attention_mask=mask, past_key_values=make(), **GREEDY, **LOGITS),
        start=(1 - mask).sum(-1),
    )
    assert_same_text(want, got, rounding=ROUNDING[weights])
    if device == "cuda":
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"] and counters["inductor"]["cudagraph_skips"] == 0


def test_compiled_step(model, weights):
    """torch.compile(fullgraph=True) of a step gives eager's logits."""
    ids = prompt(model, 2)

    def run(make, step):
        cache = make()
        with torch.no_grad():
            model(ids, past_key_values=cache)
            return step(ids[:, :1], past_key_values=cache).logits

    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    allocate = {"batch_size": 2, "device": model.device, "dtype": model.dtype}
    _, eager, _ = dense_then_million(model, lambda make: run(make, model), **allocate)
    _, got, _ = dense_then_million(
        model, lambda make: run(make, step if make.__name__ == "quantised" else model), **allocate
    )
    assert (got - eager).abs().max() <= ROUNDING[weights] * eager.abs().max()


def test_calibrate(original, model, weights, device):
    """Codebooks calibrated on the quantised model, and on the original one, predict what its dense cache predicts."""
    tokens = torch.randint(3, 97, (4200,), generator=torch.Generator().manual_seed(1))
    pq = PQConfig(2, 2, 64, recent_tokens=8, sink_tokens=2)
    # The gradients that weigh the codebooks' errors do not pass torchao's int4 product, which has no derivative.
    without = {"sensitivity_tokens": 0} if weights == "int4" else {}
    ids = prompt(model, 2, 96, seed=3)
    with torch.no_grad():
        want = model(ids, past_key_values=DynamicCache(config=model.config)).logits.float().log_softmax(-1)
    enable(model)
    try:
        for source, options in ((model, without), (original, {})):
            books = calibrate(source, tokens, pq, iterations=2, progress=False, **options)
            cache = MillionStaticCache(model, books, 96, 2, device, model.dtype)
            with torch.no_grad():
                got = [model(ids[:, i : i + 8], past_key_values=cache).logits for i in range(0, 96, 8)]
            got = torch.cat(got, 1).float().log_softmax(-1)
            kl = (want.exp() * (want - got)).sum(-1).mean()
            mean = (want.exp() * (want - want.exp().mean((0, 1)).log())).sum(-1).mean()
            assert kl <= 0.2 * mean, (float(kl), float(mean))  # mean: what knowing nothing of the context costs
    finally:
        disable(model)
