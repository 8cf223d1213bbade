"""Tiny random models, one for each way of attending that matters here. CPU, a fraction of a second each.

Weights are larger than a trained model's, so that attention is not uniform and a wrong key shows in the logits. No function
needs a network. ``kw`` goes to the configuration.
"""

from __future__ import annotations

import torch
import transformers
from transformers import PreTrainedModel

COMMON = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.2,
}


def _tiny(name: str, seed: int, config_name: str | None = None, **kw) -> PreTrainedModel:
    """``transformers.<name>ForCausalLM`` with `COMMON` and ``kw`` as its configuration."""
    config = getattr(transformers, config_name or f"{name}Config")(**{**COMMON, **kw})
    return _build(name, config, seed)


def _build(name: str, config, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def tiny_llama(seed: int = 0, **kw) -> PreTrainedModel:
    """Half-split rotation of every channel, two query heads a KV head."""
    return _tiny("Llama", seed, **kw)


def tiny_qwen2(seed: int = 0, **kw) -> PreTrainedModel:
    """Biases on queries, keys and values."""
    return _tiny("Qwen2", seed, **kw)


def tiny_qwen3(seed: int = 0, **kw) -> PreTrainedModel:
    """Norms on queries and keys; head_dim is not hidden_size / heads."""
    return _tiny("Qwen3", seed, **{"head_dim": 64, **kw})


def tiny_mistral(seed: int = 0, **kw) -> PreTrainedModel:
    """No sliding window, as in the later releases."""
    return _tiny("Mistral", seed, **{"sliding_window": None, **kw})


def tiny_phi3(seed: int = 0, **kw) -> PreTrainedModel:
    """One projection for queries, keys and values."""
    return _tiny("Phi3", seed, **{"sliding_window": None, **kw})


def tiny_phi3_long(seed: int = 0, **kw) -> PreTrainedModel:
    """A sliding window longer than the longest sequence, as Phi-3-mini-128k has: no window at all."""
    return _tiny("Phi3", seed, **{"sliding_window": 2 * COMMON["max_position_embeddings"], **kw})


def tiny_gptneox(seed: int = 0, **kw) -> PreTrainedModel:
    """A quarter of the channels rotates; no grouped queries."""
    model_kw = {k: v for k, v in COMMON.items() if k != "num_key_value_heads"} | kw
    return _build("GPTNeoX", transformers.GPTNeoXConfig(**model_kw), seed)


def tiny_cohere(seed: int = 0, **kw) -> PreTrainedModel:
    """Interleaved rotation."""
    return _tiny("Cohere", seed, **kw)


def tiny_gptj(seed: int = 0, **kw) -> PreTrainedModel:
    """Interleaved and partial rotation from a table of sines."""
    common = {k: v for k, v in COMMON.items() if k not in ("intermediate_size", "num_key_value_heads")}
    return _build("GPTJ", transformers.GPTJConfig(**{**common, "rotary_dim": 16, **kw}), seed)


def tiny_gptneo(seed: int = 0) -> PreTrainedModel:
    """Does not use transformers' attention interface."""
    config = transformers.GPTNeoConfig(
        hidden_size=128, num_layers=2, num_heads=4, attention_types=[[["global"], 2]], vocab_size=COMMON["vocab_size"],
        max_position_embeddings=512, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return _build("GPTNeo", config, seed)


def tiny_smollm3(seed: int = 0, **kw) -> PreTrainedModel:
    """Every second layer does not rotate its keys."""
    return _tiny("SmolLM3", seed, **{"no_rope_layer_interval": 2, "no_rope_layers": [1, 0], **kw})


def tiny_gemma3(seed: int = 0, **kw) -> PreTrainedModel:
    """Sliding and full layers in turns, each kind with frequencies of its own."""
    gemma = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "head_dim": 32,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "tie_word_embeddings": False,  # tied ones would repeat one token for ever
    }
    return _tiny("Gemma3", seed, config_name="Gemma3TextConfig", **{**gemma, **kw})


def tiny_granite(seed: int = 0, **kw) -> PreTrainedModel:
    """Scores are scaled by a number of the configuration, as are residuals and logits."""
    multipliers = {"attention_multiplier": 0.25, "residual_multiplier": 0.7, "logits_scaling": 0.5}
    return _tiny("Granite", seed, **{**multipliers, **kw})


def tiny_olmo2(seed: int = 0, **kw) -> PreTrainedModel:
    """Norms on all queries and all keys of a token at once, and after attention instead of before."""
    return _tiny("Olmo2", seed, **kw)


FAMILIES = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "mistral": tiny_mistral,
    "phi3": tiny_phi3,
    "phi3 128k": tiny_phi3_long,
    "gptneox": tiny_gptneox,
    "cohere": tiny_cohere,
    "smollm3": tiny_smollm3,
    "gemma3": tiny_gemma3,
    "granite": tiny_granite,
    "olmo2": tiny_olmo2,
}

# Configurations that are refused: what the model is called, and a word of the reason.
REFUSED = {
    "DeepSeek-V2, V3": (lambda: transformers.DeepseekV3Config(num_hidden_layers=2), "latent"),
    "Gemma-2": (lambda: transformers.Gemma2Config(num_hidden_layers=2), "softcap"),
    "Gemma-3n": (lambda: transformers.Gemma3nTextConfig(), "reuse"),
    "GPT-OSS": (lambda: transformers.GptOssConfig(num_hidden_layers=2), "sinks"),
    "Qwen3-Next": (lambda: transformers.Qwen3NextConfig(num_hidden_layers=4), "hybrid"),
    "Mistral with a sliding window (7B v0.1)": (
        lambda: transformers.MistralConfig(num_hidden_layers=2, sliding_window=16),
        "no full-attention layer",
    ),
    "BLOOM": (lambda: transformers.BloomConfig(), "ALiBi"),
    "MPT": (lambda: transformers.MptConfig(), "ALiBi"),
    "Falcon with ALiBi": (lambda: transformers.FalconConfig(alibi=True), "ALiBi"),
    "Doge": (lambda: transformers.DogeConfig(num_hidden_layers=2), "mask"),
    "T5": (lambda: transformers.T5Config(), "encoder-decoder"),
}
