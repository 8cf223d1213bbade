"""What has to be known of a model: which layers can be quantised, how their keys are rotated, and which model it is.

The rotation is measured, never read from attributes: architectures differ in the pairing of channels, in the share of
channels that rotate, and from layer to layer, and no attribute says so. To support a model that needs special treatment,
or to refuse one: one row in `REFUSED_TYPES` or one check in `check_supported`.
"""

from __future__ import annotations

import base64
import hashlib
import inspect
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from million_ops.reference import rotate

PROBE_TOKENS = 12  # enough to tell rotations apart, few enough that a forward costs nothing
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # mean relative error of a channel; 16 bit: below
PROBE_TOLERANCE_16BIT = 0.1
EMBEDDING_ROWS = 64  # rows of the embedding that identify a model, evenly spaced over the vocabulary
EMBEDDING_CHANNELS = 8  # first channels of each row
EMBEDDING_TOLERANCE = 0.3  # relative; 4-bit embeddings are off by 0.1, another model's by 1.4
FREQUENCY_TOLERANCE = 0.02  # of the mean logarithm of the frequencies; buffers cast to bf16 are off by 0.002

REFUSED_TYPES = {
    "bloom": "ALiBi positions are a bias on the scores, which attention from codes does not add",
    "mpt": "ALiBi positions are a bias on the scores, which attention from codes does not add",
    "gpt_oss": "attention sinks (a learned logit per head) are not part of attention from codes",
    "granite_swa": "attention sinks (a learned logit per head) are not part of attention from codes",
    "granitemoe_swa": "attention sinks (a learned logit per head) are not part of attention from codes",
    "mimo_v2_flash": "attention sinks (a learned logit per head) are not part of attention from codes",
    "flint": "attention sinks (a learned logit per head) are not part of attention from codes",
    "diffllama": "it subtracts two attentions over halves of the values, which attention from codes does not do",
    "doge": "it computes its mask from the values that the cache returns, which are codes",
    "jetmoe": "its experts repeat keys and values between the cache and the attention function",
}


@dataclass(frozen=True)
class Rotation:
    """How a layer rotates its keys with the position.

    Attributes:
        kind: ``"none"`` (keys do not depend on the position), ``"half"`` (pairs (i, i + rotary / 2)), ``"interleaved"``
            (pairs (2 i, 2 i + 1)) or ``"unknown"`` (M-RoPE, learned positions, ...).
        inv_freq: [rotary / 2] fp32, radians a token, a clone of the model's; None for "none" and "unknown". The scale of
            cos and sin that YaRN and longrope apply is not part of the rotation.
    """

    kind: str
    inv_freq: Tensor | None = None


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The decoder's part of a configuration that may also describe an image or audio tower."""
    return config.get_text_config(decoder=True)


def kv_heads(config: PreTrainedConfig) -> int:
    """KV heads of an attention layer."""
    config = _one_geometry(config)
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def head_dim(config: PreTrainedConfig) -> int:
    """Channels of a head."""
    config = _one_geometry(config)
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _one_geometry(config: PreTrainedConfig) -> PreTrainedConfig:
    """The text configuration, if all its layers have heads alike. Raises NotImplementedError if not (Gemma-4)."""
    config = text_config(config)
    for name in ("head_dim", "num_key_value_heads"):
        try:
            getattr(config, name, None)
        except RuntimeError as error:  # transformers' AmbiguousGlobalPerLayerAttributeError
            raise NotImplementedError(f"{config.model_type}: layers that differ in {name} are not supported") from error
    return config


def full_attention_layers(config: PreTrainedConfig) -> list[int]:
    """Indices of the layers whose cache grows with the sequence, as transformers itself classifies them, and of those whose sliding
    window is longer than the longest sequence (Phi-3 with 128k tokens)."""
    return list(_windows(config))


def _windows(config: PreTrainedConfig) -> dict[int, float]:
    """Tokens that a query of each of the `full_attention_layers` can see."""
    config = text_config(config)
    longest = getattr(config, "max_position_embeddings", None) or math.inf
    found = {}
    for i, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) is DynamicLayer:
            found[i] = math.inf
        elif type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= longest:
            found[i] = layer.sliding_window
    return found


def check_supported(config: PreTrainedConfig) -> None:
    """Refuse a model that a product-quantised cache cannot serve.

    Raises:
        NotImplementedError: MLA, score softcap, attention sinks, hybrid linear attention, ALiBi, encoder-decoder, layers
            that share keys and values, or no full-attention layer; the message says which.
        ValueError: a head_dim that is not a multiple of 8.
    """
    if config.is_encoder_decoder:
        raise NotImplementedError(
            f"{config.model_type}: encoder-decoder models keep a second cache, which is not supported"
        )
    config = text_config(config)
    name = config.model_type
    if name in REFUSED_TYPES:
        raise NotImplementedError(f"{name}: {REFUSED_TYPES[name]}")
    if getattr(config, "kv_lora_rank", None):
        raise NotImplementedError(
            f"{name}: multi-head latent attention (kv_lora_rank) caches latents, not keys and values"
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise NotImplementedError(f"{name}: a softcap on attention scores (attn_logit_softcapping) is not supported")
    if getattr(config, "alibi", False):
        raise NotImplementedError(f"{name}: {REFUSED_TYPES['bloom']}")
    if getattr(config, "num_kv_shared_layers", 0):
        raise NotImplementedError(f"{name}: layers that reuse the keys and values of others are not supported")
    recurrent = {"linear_attention", "conv", "mamba", "hybrid", "hybrid_sliding"}
    found = recurrent & set(getattr(config, "layer_types", None) or ())
    if found:
        raise NotImplementedError(f"{name}: hybrid models with {', '.join(sorted(found))} layers are not supported")
    if not full_attention_layers(config):
        raise NotImplementedError(
            f"{name}: no full-attention layer, so the cache does not grow and nothing is worth quantising"
        )
    if head_dim(config) % 8:
        raise ValueError(f"{name}: head_dim must be a multiple of 8, got {head_dim(config)}")


def check_length(config: PreTrainedConfig, max_cache_len: int) -> None:
    """Refuse a length at which the model would change its RoPE frequencies under cached keys, or slide its window over them.

    Raises:
        ValueError: dynamic NTK or longrope and ``max_cache_len`` beyond the original length; or beyond the window of layers that are
            quantised because it is longer than the model's longest sequence.
    """
    config = text_config(config)
    window = min(_windows(config).values(), default=math.inf)
    if window < max_cache_len:
        raise ValueError(
            f"{config.model_type}: quantised layers have a sliding window of {window} tokens; max_cache_len must be at most that, got "
            f"{max_cache_len}"
        )
    parameters = getattr(config, "rope_parameters", None) or {}
    # One dictionary, or one for each layer type (Gemma-3).
    for rope in [parameters, *(p for p in parameters.values() if isinstance(p, dict))]:
        kind = rope.get("rope_type")
        if kind not in ("dynamic", "longrope"):
            continue
        original = (
            rope.get("original_max_position_embeddings")
            or getattr(config, "original_max_position_embeddings", None)
            or config.max_position_embeddings
        )
        if max_cache_len > original:
            raise ValueError(
                f"{config.model_type}: {kind} RoPE changes its frequencies beyond {original} tokens, under keys that are "
                f"already cached; max_cache_len must be at most {original}, got {max_cache_len}"
            )


class _KeyRecorder(DynamicCache):
    """A cache that also keeps the keys each layer hands over."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.recorded: dict[int, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        self.recorded[layer_idx] = key_states
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; the mode of every module is restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def undisturbed() -> Iterator[None]:
    """What a caller's `torch.autocast` and `torch.inference_mode` would change is as without them: dtypes, and that gradients exist."""
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))  # which turns gradients on
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _frequencies(model: nn.Module) -> list[Tensor]:
    """Every distinct set of RoPE frequencies among the model's buffers, fp32 clones."""
    found: list[Tensor] = []
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            frequencies = buffer.detach().float().clone().flatten()
        elif name.endswith("embed_positions") and buffer.ndim == 2 and buffer.shape[0] > 1:
            # GPT-J keeps a table of (sin, cos); position 1 gives the angle of one step.
            sin, cos = buffer[1].detach().double().chunk(2)
            frequencies = torch.atan2(sin, cos).float()
        else:
            continue
        if not any(frequencies.shape == f.shape and torch.equal(frequencies, f) for f in found):
            found.append(frequencies)
    return found


def _rotation_of(keys: Tensor, candidates: list[Tensor]) -> Rotation:
    """The rotation R with ``k(p) = R(p) k(0)`` for keys [H, P, D] of equal tokens, or "unknown"."""
    tolerance = PROBE_TOLERANCE.get(keys.dtype, PROBE_TOLERANCE_16BIT)
    keys = keys.float()
    size = keys.square().mean(1).sqrt()  # [H, D]
    first = keys[:, :1].expand_as(keys)
    positions = torch.arange(keys.shape[1], device=keys.device)

    def error(expected: Tensor) -> float:
        # Per channel, so that a few huge key biases (Qwen2) do not drown the channels that tell.
        relative = (keys - expected).square().mean(1).sqrt() / size.clamp(min=1e-30)
        return torch.where(size > 0, relative.clamp(max=1.0), 0.0).mean().item()

    errors = [(error(first), Rotation("none"))]
    for inv_freq in candidates:
        inv_freq = inv_freq.to(keys.device)
        if 2 * inv_freq.numel() <= keys.shape[-1]:
            for kind in ("half", "interleaved"):
                expected = rotate(first, positions, inv_freq, kind == "interleaved")
                errors.append((error(expected), Rotation(kind, inv_freq)))
    best = min(errors, key=lambda e: e[0])
    return best[1] if best[0] <= tolerance and size.any() else Rotation("unknown")


def cache_argument(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """``cache`` as the keyword argument of a model's call and of its ``generate``: named ``cache``, or ``past_key_values`` in
    transformers before 5.24."""
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}


def measure_rotations(model: PreTrainedModel) -> dict[int, Rotation]:
    """Measure how each full-attention layer rotates its keys, by one forward of 12 equal tokens.

    In a sequence of one token repeated, the hidden states of a layer are the same at all positions, so its keys differ
    by the rotation alone: ``k(p) = R(p) k(0)``. That is compared with no rotation and with both pairings of every set of
    frequencies among the model's buffers.

    Returns:
        Rotation for each full-attention layer's index.
    """
    config = text_config(model.config)
    token = (config.vocab_size // 2) % config.vocab_size
    ids = torch.full((1, PROBE_TOKENS), token, device=model.device)
    cache = _KeyRecorder(config)
    with undisturbed(), evaluating(model):
        taken = cache_argument(model.base_model, cache)
        model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **taken)
    candidates = _frequencies(model)
    return {
        i: _rotation_of(cache.recorded[i][0], candidates) for i in full_attention_layers(config) if i in cache.recorded
    }


def _decoder_layers(model: nn.Module, count: int) -> nn.ModuleList:
    """The list of decoder layers: the first ModuleList of that length whose members own parameters."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and any(True for _ in module.parameters()):
            return module
    raise NotImplementedError(f"{type(model).__name__} has no list of {count} decoder layers")


def _input_norm(layer: nn.Module) -> Tensor | None:
    """Weight of a decoder layer's input norm, or of its first norm when that has another name; None without one."""
    named = getattr(getattr(layer, "input_layernorm", None), "weight", None)
    if named is not None:
        return named
    norms = (p for name, p in layer.named_parameters() if p.ndim == 1 and ("norm" in name or "ln" in name))
    return next(norms, None)


def _norm_hash(model: PreTrainedModel, layers: int) -> str:
    """SHA-256 over every layer's input-norm weight, rounded to bf16 so that the dtype it was loaded in does not matter."""
    digest = hashlib.sha256()
    for layer in _decoder_layers(model, layers):
        weight = _input_norm(layer)
        if weight is not None:
            digest.update(weight.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _embedding_sketch(model: PreTrainedModel, vocabulary: int) -> str:
    """A few embedding entries as base64 of bf16, looked up through the module: that works for quantised ones too."""
    embedding = model.get_input_embeddings()
    ids = torch.linspace(0, vocabulary - 1, EMBEDDING_ROWS, dtype=torch.float64).long().to(model.device)
    with undisturbed(), evaluating(model):
        rows = embedding(ids)[:, :EMBEDDING_CHANNELS]
    return base64.b64encode(rows.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()).decode()


def _sketch_values(sketch: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(sketch)), dtype=torch.bfloat16).float()


@dataclass(frozen=True)
class Fingerprint:
    """Identifies a model whatever it was loaded as (fp32, bf16, quantised weights, GGUF).

    Attributes:
        rotations: per full-attention layer ``(layer, kind, rotary channels, mean log frequency)``.
        norm_hash: SHA-256 of every layer's input-norm weight, rounded to bf16.
        embedding: 64 x 8 embedding entries, base64 of bf16. Compared with a tolerance, because quantised checkpoints
            quantise the embedding and a hash of it would differ.
    """

    model_type: str
    num_layers: int
    full_attention_layers: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    rotations: tuple[tuple[int, str, int, float], ...] = field(repr=False)
    norm_hash: str = field(repr=False)
    embedding: str = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON, the inverse of `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Fingerprint:
        """From `to_dict`'s result, also after a round trip through JSON. Raises ValueError for other keys or types."""
        try:
            data = dict(data)
            data["full_attention_layers"] = tuple(int(i) for i in data["full_attention_layers"])
            data["rotations"] = tuple((int(i), str(k), int(n), float(f)) for i, k, n, f in data["rotations"])
            _sketch_values(data["embedding"])
            return cls(**data)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a model fingerprint: {error}") from error

    def config_differences(self, config: PreTrainedConfig) -> list[str]:
        """What already the configuration says against this being the model; empty if nothing."""
        return _differences(asdict(self), _config_part(config))

    def matches(self, other: Fingerprint) -> list[str]:
        """Differences to another model in words, "what: this one's, other's"; empty if they are the same model."""
        config_part = {k: v for k, v in asdict(other).items() if k not in ("rotations", "norm_hash", "embedding")}
        found = _differences(asdict(self), config_part)
        if found:
            return found  # weights of another architecture need no comparison
        for mine, theirs in zip(self.rotations, other.rotations):
            if mine[:3] != theirs[:3] or abs(mine[3] - theirs[3]) > FREQUENCY_TOLERANCE:
                found.append(f"rotation of layer {mine[0]}: {_rotation_text(mine)}, {_rotation_text(theirs)}")
        if self.norm_hash != other.norm_hash:
            found.append(f"input-norm weights: {self.norm_hash[:12]}, {other.norm_hash[:12]} (SHA-256)")
        mine, theirs = _sketch_values(self.embedding), _sketch_values(other.embedding)
        off = (mine - theirs).norm() / mine.norm().clamp(min=1e-30)
        if not off <= EMBEDDING_TOLERANCE:
            found.append(f"embedding: entries differ by {off:.0%} of their size")
        return found


def _rotation_text(rotation: tuple[int, str, int, float]) -> str:
    _, kind, channels, log_frequency = rotation
    return f"{kind} over {channels} channels, mean log frequency {log_frequency:.3f}" if channels else kind


def _config_part(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a `Fingerprint` that a configuration alone determines."""
    config = text_config(config)
    return {
        "model_type": config.model_type,
        "num_layers": config.num_hidden_layers,
        "full_attention_layers": tuple(full_attention_layers(config)),
        "heads": config.num_attention_heads,
        "kv_heads": kv_heads(config),
        "head_dim": head_dim(config),
        "vocabulary": config.vocab_size,
    }


def _differences(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return [f"{name}: {mine[name]}, {value}" for name, value in theirs.items() if mine[name] != value]


def fingerprint(model: PreTrainedModel, rotations: dict[int, Rotation] | None = None) -> Fingerprint:
    """Fingerprint of a loaded model; costs one forward of 12 tokens unless ``rotations`` (`measure_rotations`) is given."""
    rotations = measure_rotations(model) if rotations is None else rotations
    known = _config_part(model.config)
    summary = []
    for i, rotation in sorted(rotations.items()):
        f = rotation.inv_freq
        if f is None:
            summary.append((i, rotation.kind, 0, 0.0))
        else:  # a frequency of zero (Gemma-4's unrotated pairs) has no logarithm
            mean_log = f.double().clamp(min=1e-12).log().mean().item()
            summary.append((i, rotation.kind, 2 * f.numel(), round(mean_log, 4)))
    return Fingerprint(
        **known,
        rotations=tuple(summary),
        norm_hash=_norm_hash(model, known["num_layers"]),
        embedding=_embedding_sketch(model, known["vocabulary"]),
    )
