"""What calibration needs of a model's activations: sampled keys and values, and the queries' second moments.

The text runs through the model context by context with an attention function that looks on. Kept of every quantised layer
are at most `SAMPLE_TOKENS` rows of keys and values, in the model's dtype on the CPU, and one [D, D] matrix a KV head, so
memory does not grow with the text: ``2 * SAMPLE_TOKENS * H * D`` elements a layer (SmolLM2, fp32: 48 MiB a layer at most).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from million_cache.models import evaluating, full_attention_layers

ATTENTION = "million_calibration"
SAMPLE_TOKENS = 32768


@dataclass
class LayerSensitivity:
    """How much the predictions depend on one layer's quantised keys and values (`sensitivity.py`). CPU, fp32 or as said.

    Attributes:
        key_moment: [H, D, D] fp64, the sum over tokens of ``g g^T``, g the gradient of a key as the model rotated it.
        key_gradients: [H, N, D] of the sampled rows; NaN in rows that were not looked at.
        value_energy: [H, N], the squared norms of the gradients of values; NaN likewise.
    """

    key_moment: Tensor
    key_gradients: Tensor
    value_energy: Tensor


@dataclass
class LayerSample:
    """Rows of one layer. H KV heads, N rows, D channels.

    Attributes:
        keys, values: [H, N, D], the model's dtype, CPU; keys rotated as the model gave them.
        query_moment: [H, D, D] fp64, the sum over queries of ``q q^T``, over the group of query heads of each KV head.
        sensitivity: of the rows, in their order; None if it was not measured.
    """

    keys: Tensor
    values: Tensor
    query_moment: Tensor
    sensitivity: LayerSensitivity | None = None

    @property
    def key_moment(self) -> Tensor:
        """Weight of the keys' distortion, [H, D, D] fp64, any scale: of the gradients; of the queries for heads without any."""
        if self.sensitivity is None:
            return self.query_moment
        known = self.sensitivity.key_moment.diagonal(dim1=1, dim2=2).sum(-1) > 0
        return torch.where(known[:, None, None], self.sensitivity.key_moment, self.query_moment)


@dataclass
class _Recorder:
    """Collects what the attention function sees. ``keep`` holds the rows of the current context to keep."""

    layers: set[int]
    keep: Tensor | None = None
    keys: dict[int, list[Tensor]] = field(default_factory=dict)
    values: dict[int, list[Tensor]] = field(default_factory=dict)
    moments: dict[int, Tensor] = field(default_factory=dict)

    def record(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        for name, x in (("queries", query), ("keys", key), ("values", value)):
            bad = ~x[0].isfinite().all(-1).all(-1)
            if bad.any():
                head = bad.nonzero()[0].item() // (x.shape[1] // key.shape[1])
                raise ValueError(f"layer {layer}, KV head {head}: the {name} hold NaN or inf")
        keep = self.keep.to(key.device)
        for store, x in ((self.keys, key), (self.values, value)):
            store.setdefault(layer, []).append(x[0].index_select(1, keep).cpu())
        # [H, group * T, D]: KV head h serves the query heads h * group ..
        q = query[0].float().reshape(key.shape[1], -1, key.shape[3])
        moment = (q.transpose(1, 2) @ q).double().cpu()
        self.moments[layer] = self.moments.get(layer, 0) + moment

    def attention(self, module, query, key, value, attention_mask, **kwargs):
        """`sdpa_attention_forward` that looks on."""
        for name in ("softcap", "s_aux", "position_bias"):
            if kwargs.get(name) is not None:
                raise NotImplementedError(f"{type(module).__name__}: attention with {name} is not supported")
        if module.layer_idx in self.layers:
            self.record(module.layer_idx, query, key, value)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


@contextmanager
def attending(model: PreTrainedModel, function: Callable) -> Iterator[None]:
    """Run the model with an attention function, then with its own again."""
    config = model.config
    own = {"": config._attn_implementation}
    own |= {k: c._attn_implementation for k in config.sub_configs if (c := getattr(config, k, None)) is not None}
    AttentionInterface.register(ATTENTION, function)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    try:
        model.set_attn_implementation(ATTENTION)
        yield
    finally:
        model.set_attn_implementation(own)


def collect(
    model: PreTrainedModel, sequences: list[Tensor], skip: int, generator: torch.Generator, advance: Callable[[], None]
) -> tuple[dict[int, LayerSample], list[Tensor]]:
    """Run sequences of token ids through the model and sample its attention's inputs.

    Args:
        sequences: token ids [T] each, at positions 0 ..
        skip: first tokens of each sequence whose keys and values are left out (a cache keeps them exact).
        generator: chooses the rows, if there are more than `SAMPLE_TOKENS`.
        advance: called after each sequence.

    Returns:
        Sample of each full-attention layer, and each sequence's rows: their positions [n] int64, the same for every layer.

    Raises:
        ValueError: NaN or inf in queries, keys or values.
        NotImplementedError: the model does not call the attention function that transformers registers.
    """
    layers = full_attention_layers(model.config)
    recorder = _Recorder(set(layers))
    total = sum(len(s) - skip for s in sequences)
    kept = []
    with evaluating(model), attending(model, recorder.attention):
        for ids in sequences:
            rows = torch.arange(skip, len(ids))
            if total > SAMPLE_TOKENS:
                share = len(rows) * SAMPLE_TOKENS // total
                rows = rows[torch.randperm(len(rows), generator=generator)[:share].sort().values]
            recorder.keep = rows
            kept.append(rows)
            ids = ids[None].to(model.device)
            model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            missing = [i for i in layers if len(recorder.keys.get(i, ())) != len(kept)]
            if missing:
                raise NotImplementedError(
                    f"{type(model).__name__} does not run its attention through transformers' AttentionInterface "
                    f"(layers {missing}), so its queries cannot be seen and its cache cannot be attended from codes"
                )
            advance()
    samples = {
        i: LayerSample(torch.cat(recorder.keys.pop(i), 1), torch.cat(recorder.values.pop(i), 1), recorder.moments[i])
        for i in layers
    }
    return samples, kept
