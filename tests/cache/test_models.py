"""Which models are accepted, how their keys rotate, and what identifies them."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache

from million_cache.models import (
    Fingerprint,
    cache_argument,
    check_length,
    check_supported,
    fingerprint,
    full_attention_layers,
    head_dim,
    kv_heads,
    measure_rotations,
)
from tests.cache.tiny_models import (
    FAMILIES,
    REFUSED,
    tiny_cohere,
    tiny_gemma3,
    tiny_gptj,
    tiny_gptneox,
    tiny_llama,
    tiny_qwen2,
    tiny_qwen3,
    tiny_smollm3,
)

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "short_factor": [1.0 + 0.1 * i for i in range(16)],
    "long_factor": [2.0 + 0.2 * i for i in range(16)],
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "attention_factor": 1.7,
    "original_max_position_embeddings": 128,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


class LearnedPositions(nn.Module):
    """Makes keys depend on the position in a way that no rotation explains."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding
        self.positions = nn.Parameter(torch.randn(64, embedding.embedding_dim))

    def forward(self, ids):
        return self.embedding(ids) + self.positions[: ids.shape[-1]]


def kinds(model) -> dict[int, tuple[str, int]]:
    """Kind and rotating channels of every measured layer."""
    return {
        i: (r.kind, 0 if r.inv_freq is None else 2 * r.inv_freq.numel()) for i, r in measure_rotations(model).items()
    }


# -- rotations ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (tiny_llama, {0: ("half", 32), 1: ("half", 32)}),
        (tiny_qwen3, {0: ("half", 64), 1: ("half", 64)}),
        (tiny_gptneox, {0: ("half", 8), 1: ("half", 8)}),
        (tiny_cohere, {0: ("interleaved", 32), 1: ("interleaved", 32)}),
        (tiny_gptj, {0: ("interleaved", 16), 1: ("interleaved", 16)}),
        (tiny_smollm3, {0: ("half", 32), 1: ("none", 0)}),
        (tiny_gemma3, {1: ("half", 32), 3: ("half", 32)}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotations_are_measured(make, expected, dtype):
    assert kinds(make().to(dtype)) == expected


def test_gemma3_full_layers_have_their_own_frequencies():
    model = tiny_gemma3()
    theta = model.config.rope_parameters["full_attention"]["rope_theta"]
    inv_freq = measure_rotations(model)[1].inv_freq
    torch.testing.assert_close(inv_freq, theta ** -(torch.arange(0, 32, 2) / 32), rtol=1e-5, atol=0)


@pytest.mark.parametrize("rope", [YARN, LONGROPE], ids=["yarn", "longrope"])
def test_attention_scaling_is_not_part_of_the_rotation(rope):
    rotations = measure_rotations(tiny_llama(rope_parameters=rope))
    assert {r.kind for r in rotations.values()} == {"half"}


def test_inv_freq_is_a_clone():
    model = tiny_llama()
    buffer = next(b for name, b in model.named_buffers() if name.endswith("inv_freq"))
    measured = measure_rotations(model)[0].inv_freq
    before = measured.clone()
    buffer.mul_(2)  # longrope rewrites it in place
    assert torch.equal(measured, before) and measured.dtype == torch.float32


def test_huge_key_biases_do_not_hide_the_rotation():
    """Qwen2's biases in slowly rotating channels are hundreds of times the rest of a key."""
    model = tiny_qwen2()
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data[15] = 1000.0
    assert {kind for kind, _ in kinds(model).values()} == {"half"}


def test_unknown_rotation():
    model = tiny_llama()
    model.model.embed_tokens = LearnedPositions(model.model.embed_tokens)
    assert kinds(model) == {0: ("unknown", 0), 1: ("unknown", 0)}


def test_measuring_leaves_the_model_as_it_was():
    model = tiny_llama().train()
    measure_rotations(model)
    assert model.training and model.config._attn_implementation == "sdpa"


# -- which models are accepted --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_supported(family):
    config = FAMILIES[family]().config
    check_supported(config)
    assert kv_heads(config) == (4 if family == "gptneox" else 2)
    assert head_dim(config) == (64 if family == "qwen3" else 32)


def test_full_attention_layers_follow_transformers():
    assert full_attention_layers(tiny_gemma3().config) == [1, 3]
    assert full_attention_layers(tiny_llama().config) == [0, 1]


@pytest.mark.parametrize(("config", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused_with_the_reason(config, reason):
    with pytest.raises(NotImplementedError, match=reason):
        check_supported(config())


def test_head_dim_must_be_a_multiple_of_8():
    with pytest.raises(ValueError, match="multiple of 8, got 12"):
        check_supported(transformers.LlamaConfig(hidden_size=48, num_attention_heads=4))


@pytest.mark.parametrize(("rope", "original"), [(LONGROPE, 64), (DYNAMIC, 512)], ids=["longrope", "dynamic"])
def test_length_beyond_which_frequencies_change(rope, original):
    config = tiny_llama(rope_parameters=rope).config
    check_length(config, original)
    with pytest.raises(ValueError, match=f"at most {original}, got {original + 1}"):
        check_length(config, original + 1)


def test_any_length_with_fixed_frequencies():
    check_length(tiny_llama(rope_parameters=YARN).config, 1 << 20)
    check_length(tiny_gemma3().config, 1 << 20)


# -- fingerprints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_fingerprint_does_not_depend_on_the_dtype(family, dtype):
    model = FAMILIES[family]()
    original = fingerprint(model)
    assert original.matches(fingerprint(model.to(dtype))) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_fingerprint_tells_weights_apart(family):
    different = fingerprint(FAMILIES[family](seed=1))
    assert any("embedding" in d for d in fingerprint(FAMILIES[family](seed=0)).matches(different))


def test_fingerprint_survives_quantised_weights():
    """As GGUF and weight-only loads leave them: every matrix rounded to 4 bits in groups of 32, the norms exact."""
    model = tiny_llama()
    original = fingerprint(model)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            groups = parameter.data.view(-1, 32)
            low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
            step = ((high - low) / 15).clamp(min=1e-9)
            parameter.data.copy_((((groups - low) / step).round() * step + low).view_as(parameter))
    assert original.matches(fingerprint(model)) == []


def test_fingerprint_sees_a_changed_norm_and_rotation():
    model = tiny_llama()
    original = fingerprint(model)
    model.model.layers[1].input_layernorm.weight.data[3] = 1.5
    assert [d.split(":")[0] for d in original.matches(fingerprint(model))] == ["input-norm weights"]
    other = fingerprint(tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}))
    assert [d.split(":")[0] for d in original.matches(other)] == ["rotation of layer 0", "rotation of layer 1"]


def test_fingerprint_round_trip():
    original = fingerprint(tiny_smollm3())
    again = Fingerprint.from_dict(json.loads(json.dumps(original.to_dict())))
    assert again == original and original.matches(again) == []
    with pytest.raises(ValueError, match="not a model fingerprint"):
        Fingerprint.from_dict({"model_type": "llama"})


def test_config_differences():
    original = fingerprint(tiny_llama())
    assert original.config_differences(tiny_llama(seed=1).config) == []
    found = original.config_differences(tiny_llama(num_hidden_layers=3, num_key_value_heads=4).config)
    assert any(d.startswith("num_layers: 2, 3") for d in found) and any(d.startswith("kv_heads: 2, 4") for d in found)
    assert original.matches(fingerprint(tiny_qwen2()))[0].startswith("model_type: llama, qwen2")


def test_the_name_of_the_cache_argument():
    """As the model's own forward has it, whatever the release; and the model takes it without a warning."""

    class Before:
        def forward(self, input_ids, past_key_values=None): ...

    class After:
        def forward(self, input_ids, cache=None): ...

    assert cache_argument(Before(), None) == {"past_key_values": None}
    assert cache_argument(After(), None) == {"cache": None}
    model = tiny_llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        cache = DynamicCache(config=model.config)
        model(torch.tensor([[3, 4]]), **cache_argument(model, cache))
        assert cache.get_seq_length() == 2
        model.generate(
            torch.tensor([[3, 4]]), **cache_argument(model, DynamicCache(config=model.config)), max_new_tokens=2
        )


@pytest.mark.parametrize("name", ["head_dim", "num_key_value_heads"])
def test_layers_that_differ_in_geometry(name):
    """Gemma-4's configuration raises a RuntimeError for what differs from layer to layer."""

    class Config:
        model_type = "gemma4_text"

        def get_text_config(self, decoder):
            return self

        def __getattr__(self, attribute):
            raise RuntimeError(f"{name!r} is a per-layer attribute") if attribute == name else AttributeError(attribute)

    with pytest.raises(NotImplementedError, match=f"gemma4_text: layers that differ in {name} are not supported"):
        (head_dim if name == "head_dim" else kv_heads)(Config())
