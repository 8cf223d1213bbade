"""What calibration needs of a model's activations: sampled keys and values, and the queries' second moments.

The text runs through the model context by context with an attention function that looks on. Kept of every quantised layer
are at most `SAMPLE_TOKENS` rows of keys and values, in the model's dtype on the CPU, and one [D, D] matrix a KV head, so
memory does not grow with the text: ``2 * SAMPLE_TOKENS * H * D`` elements a layer (SmolLM2, fp32: 48 MiB a layer at most).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from million_cache.calibration.checkpoint import Checkpoint
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
    """Collects what the attention function sees of one context. ``keep`` holds the rows to keep.

    ``found`` has ``<layer>.keys``, ``.values`` and ``.moment``, as in `LayerSample`; ``calls`` the layers seen.
    """

    layers: set[int]
    keep: Tensor | None = None
    found: dict[str, Tensor] = field(default_factory=dict)
    calls: list[int] = field(default_factory=list)

    def record(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        for name, x in (("queries", query), ("keys", key), ("values", value)):
            bad = ~x[0].isfinite().all(-1).all(-1)
            if bad.any():
                head = bad.nonzero()[0].item() // (x.shape[1] // key.shape[1])
                raise ValueError(f"layer {layer}, KV head {head}: the {name} hold NaN or inf")
        keep = self.keep.to(key.device)
        for name, x in (("keys", key), ("values", value)):
            self.found[f"{layer}.{name}"] = x[0].index_select(1, keep).cpu()
        # [H, group * T, D]: KV head h serves the query heads h * group ..
        q = query[0].float().reshape(key.shape[1], -1, key.shape[3])
        self.found[f"{layer}.moment"] = (q.transpose(1, 2) @ q).double().cpu()
        self.calls.append(layer)

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
    model: PreTrainedModel,
    sequences: list[Tensor],
    skip: int,
    generator: torch.Generator,
    advance: Callable[[], None],
    saved: Checkpoint | None = None,
) -> tuple[dict[int, LayerSample], list[Tensor]]:
    """Run sequences of token ids through the model and sample its attention's inputs.

    Args:
        sequences: token ids [T] each, at positions 0 ..
        skip: first tokens of each sequence whose keys and values are left out (a cache keeps them exact).
        generator: chooses the rows, if there are more than `SAMPLE_TOKENS`.
        advance: called after each sequence.
        saved: keeps each sequence's part, ``read-<number>``.

    Returns:
        Sample of each full-attention layer, and each sequence's rows: their positions [n] int64, the same for every layer.

    Raises:
        ValueError: NaN or inf in queries, keys or values.
        NotImplementedError: the model does not call the attention function that transformers registers.
    """
    layers = full_attention_layers(model.config)
    saved = saved or Checkpoint()
    recorder = _Recorder(set(layers))
    total = sum(len(s) - skip for s in sequences)
    kept, parts = [], []

    def read(ids: Tensor, rows: Tensor) -> dict[str, Tensor]:
        recorder.keep, recorder.found, recorder.calls = rows, {}, []
        ids = ids[None].to(model.device)
        model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        missing = [i for i in layers if recorder.calls.count(i) != 1]
        if missing:
            raise NotImplementedError(
                f"{type(model).__name__} does not run its attention through transformers' AttentionInterface "
                f"(layers {missing}), so its queries cannot be seen and its cache cannot be attended from codes"
            )
        return recorder.found

    with evaluating(model), attending(model, recorder.attention):
        for number, ids in enumerate(sequences):
            rows = torch.arange(skip, len(ids))
            if total > SAMPLE_TOKENS:
                share = len(rows) * SAMPLE_TOKENS // total
                rows = rows[torch.randperm(len(rows), generator=generator)[:share].sort().values]
            kept.append(rows)
            parts.append(saved.once(f"read-{number}", generator, partial(read, ids, rows)))
            advance()
    samples = {}
    for i in layers:
        keys, values, moments = ([part.pop(f"{i}.{name}") for part in parts] for name in ("keys", "values", "moment"))
        samples[i] = LayerSample(torch.cat(keys, 1), torch.cat(values, 1), sum(moments))
    return samples, kept
