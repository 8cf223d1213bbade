"""Lossless codes: codebooks whose centroids are a recorded run's own vectors.

With at most 256 vectors a KV head, centroid t of every subspace can be vector t's own sub-vector after frame rotation and
transform; encoding then finds it and nothing is lost but the rounding of centroids to fp16. So the real ops, real frames
and a real transform run, and a cache built on them must give the tokens of the dense cache.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from million_cache.codebook import Codebooks, LayerCodebooks, invert
from million_cache.config import PQConfig
from million_cache.models import fingerprint, full_attention_layers, measure_rotations
from million_ops.layout import CENTROIDS
from million_ops.reference import to_frame


class RecordingCache(DynamicCache):
    """A DynamicCache that remembers every key and value it was ever given, with its slot and row."""

    def __init__(self, config):
        super().__init__(config=config)
        self.seen: list[tuple[int, int, Tensor, Tensor]] = []

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        past = int(self.get_seq_length(layer_idx)) if layer_idx < len(self.layers) else 0
        self.seen.append((layer_idx, past, key_states.detach().cpu().clone(), value_states.detach().cpu().clone()))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def well_conditioned(heads: int, dim: int, seed: int) -> Tensor:
    """Random transforms [H, D, D] fp32: neither orthogonal nor far from it, so that a forgotten inverse shows and fp16 suffices."""
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(heads, dim, dim, generator=g))
    scale = 0.5 + torch.rand(heads, dim, 1, generator=g)
    return q * scale


def lossless_codebooks(model, recordings: list[RecordingCache], config: PQConfig, start: Tensor | None = None,
                       first_position: int = 0) -> Codebooks:  # fmt: skip
    """Codebooks that reproduce everything the recordings hold.

    Args:
        model: the model they were recorded from.
        recordings: caches of dense runs of the same prompts.
        config: d_m, frames and window to test.
        start: [B] left padding of each row in the runs, None for none.
        first_position: as `MillionStaticCache`.
    """
    text = model.config.get_text_config(decoder=True)
    rotations = measure_rotations(model)
    layers, quantised = {}, full_attention_layers(text)
    for i, (k_dim, v_dim) in zip(quantised, config.subspace_dims(len(quantised))):
        rotation = rotations[i]
        inv_freq = None if rotation.inv_freq is None else rotation.inv_freq.cpu()
        frame_tokens = config.frame_tokens if inv_freq is not None else 0
        keys, values = [], []
        for recording in recordings:
            for layer, past, k, v in recording.seen:
                if layer != i:
                    continue
                B, H, n, D = k.shape
                transform = well_conditioned(H, D, seed=i)
                rows = torch.zeros(B, dtype=torch.long)
                if start is not None:
                    rows += start.cpu().repeat_interleave(B // len(start))
                slots = past + torch.arange(n)
                x = to_frame(
                    k,
                    slots,
                    first_position - rows,
                    transform,
                    inv_freq,
                    frame_tokens,
                    rotation.kind == "interleaved",
                )
                keep = (slots[None, :] >= rows[:, None]).reshape(-1)  # padding is never read
                keys.append(x.transpose(0, 1).reshape(H, B * n, D)[:, keep])
                values.append(v.float().transpose(0, 1).reshape(H, B * n, D)[:, keep])
        layers[i] = LayerCodebooks(
            k_codebook=_codebook(torch.cat(keys, 1), k_dim),
            v_codebook=_codebook(torch.cat(values, 1), v_dim),
            k_transform=transform,
            k_transform_inv=invert(transform),
            inv_freq=inv_freq,
            rope_interleaved=rotation.kind == "interleaved",
            frame_tokens=frame_tokens,
        )
    return Codebooks(config=config, fingerprint=fingerprint(model), layers=layers, provenance={"test": "lossless"})


@torch.no_grad()
def lossless_for(model, ids: Tensor, config: PQConfig) -> Codebooks:
    """Codebooks that are lossless for the keys and values of ids [B, T] in one dense forward."""
    recording = RecordingCache(model.config)
    model(ids, past_key_values=recording)
    return lossless_codebooks(model, [recording], config)


def _codebook(rows: Tensor, d: int) -> Tensor:
    H, T, D = rows.shape
    if T > CENTROIDS:
        raise ValueError(f"{T} recorded vectors do not fit {CENTROIDS} centroids: record a shorter run")
    codebook = torch.full((H, CENTROIDS, D), 1000.0)  # unused centroids lie where no vector is
    codebook[:, :T] = rows
    return codebook.view(H, CENTROIDS, D // d, d).half()
