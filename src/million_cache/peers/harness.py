"""Peers through a model: calibration data for them, and their scores, measured as `million_cache.evaluate` measures ours.

Every position's query sees the keys and values of its exact window as they are and all others dequantised, in one forward
of the whole text. That equals decoding token by token with the method's cache, as long as what a token becomes depends on
no token that comes after it leaves the window; `tests/tools/test_peers.py` holds our own codes to `evaluate`'s KL.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from million_cache.calibration.collect import attending
from million_cache.calibration.windowed import windowed_attention
from million_cache.evaluate import CHUNK, Scores
from million_cache.models import Rotation, check_supported, evaluating, full_attention_layers, measure_rotations
from million_cache.peers.base import Peer, Sample, Tally, Tokens, Window, turn

# ------------------------------------------------------------------------------------------------------------- calibration


def record(model: PreTrainedModel, contexts: Tensor, fisher: bool, advance: Callable[[], None] = lambda: None) -> dict[int, Sample]:  # fmt: skip
    """Keys, values and, for Fisher information, their gradients, of every full-attention layer.

    Args:
        contexts: int64 [contexts, tokens], at positions 0 .. each.
        fisher: run the loss of the next token backwards (memory: one context's activations).
        advance: called after each context.

    Raises:
        NotImplementedError: a model that `check_supported` refuses.
    """
    check_supported(model.config)
    layers = full_attention_layers(model.config)
    rotations = measure_rotations(model)
    seen: dict[int, dict[str, Any]] = {i: {"k": [], "v": [], "kg": [], "vg": []} for i in layers}
    live: dict[int, tuple[Tensor, Tensor]] = {}

    def watch(module, query, key, value, attention_mask, scaling=None, **kwargs):
        i = module.layer_idx
        if i in seen:
            if fisher:
                key.retain_grad()
                value.retain_grad()
                live[i] = key, value
            seen[i]["k"].append(key[0].detach().float())
            seen[i]["v"].append(value[0].detach().float())
            seen[i].setdefault("q", query[0].detach().float())
            seen[i]["scale"] = query.shape[3] ** -0.5 if scaling is None else scaling
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    wanted = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    # No weight wants a gradient, so the graph has to begin with the embedded tokens.
    hook = model.get_input_embeddings().register_forward_hook(lambda m, x, out: out.detach().requires_grad_(fisher))
    try:
        with evaluating(model), attending(model, watch), torch.set_grad_enabled(fisher):
            for ids in contexts.to(model.device):
                logits = model(ids[None], use_cache=False).logits[0]
                if fisher:
                    F.cross_entropy(logits[:-1].float(), ids[1:], reduction="sum").backward()
                    for i, (key, value) in live.items():
                        seen[i]["kg"].append(key.grad[0].float())
                        seen[i]["vg"].append(value.grad[0].float())
                    live.clear()
                del logits
                advance()
    finally:
        hook.remove()
        for p, want in wanted.items():
            p.requires_grad_(want)
    positions = torch.arange(contexts.shape[1], device=model.device).repeat(len(contexts))

    def sample(i: int) -> Sample:
        x = seen.pop(i)
        grads = (torch.cat(x["kg"], 1), torch.cat(x["vg"], 1)) if fisher else (None, None)
        return Sample(torch.cat(x["k"], 1), torch.cat(x["v"], 1), positions, rotations[i], *grads, x["q"], x["scale"])

    return {i: sample(i) for i in layers}


@dataclass
class _Attention:
    """The attention function that stands for a peer's cache."""

    peer: Peer
    window: Window
    rotations: dict[int, Rotation]
    tally: Tally = field(default_factory=Tally)

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        layer = module.layer_idx
        if layer not in self.rotations:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        q, k, v = query[0].float(), key[0].float(), value[0].float()
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        sinks = self.window.sinks
        slots = torch.arange(sinks, k.shape[1], device=k.device)
        kq, vq, dropped = k, v, None
        if len(slots):
            rotation = self.rotations[layer]
            keys = turn(k[:, sinks:], -slots, rotation) if self.peer.before_rope else k[:, sinks:]
            tokens = Tokens(keys, v[:, sinks:], slots, q, k, scale, self.window.recent)
            of_keys, of_values = self.peer.quantise(layer, tokens)
            self.tally.add(of_keys)
            self.tally.add(of_values)
            back = turn(of_keys.x, slots, rotation) if self.peer.before_rope else of_keys.x
            kq, vq = torch.cat((k[:, :sinks], back), 1), torch.cat((v[:, :sinks], of_values.x), 1)
            dropped = of_keys.dropped
        first_k, first_v = (
            self.window.first_exact(k.shape[1], x).to(k.device) for x in (self.window.k_block, self.window.v_block)
        )
        out = windowed_attention(q, k, v, kq, vq, first_k, first_v, scale, dropped, sinks)
        return out.transpose(0, 1)[None].to(query.dtype), None


# -------------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate_peers(
    model: PreTrainedModel,
    entries: list[tuple[Peer, Window]],
    contexts: Tensor,
    calibration: dict[int, Sample] | None = None,
    dense: list[Tensor] | None = None,
) -> list[dict[str, Any]]:
    """Score peers against the dense model, each with a window.

    Args:
        model: a causal language model; its attention implementation is restored.
        entries: peers and the windows to give them.
        contexts: int64 [contexts, tokens], scored independently, every position.
        calibration: what `record` gave, of other text, with gradients if a peer asks for them; None if no peer needs any.
        dense: the reference's logits, [tokens, vocabulary] a context; an empty list is filled, for the next call.

    Returns:
        For each entry: ``peer``, ``paper``, ``kl`` (nats), ``top1``, ``perplexity``, ``perplexity_dense``, ``kl_by_context``;
        bits an element of what is quantised: ``bits_per_element`` = ``bits_codes`` + ``bits_scales`` + ``bits_outliers``;
        ``exact_tokens`` and ``bits_per_element_total`` of a cache of that length with those at 16 bit; ``codebook_bytes``.

    Raises:
        ValueError: a window shorter than the tokens a peer quantises together.
    """
    tokens = contexts.shape[1]
    rotations = {i: r for i, r in measure_rotations(model).items() if i in full_attention_layers(model.config)}
    contexts = contexts.to(model.device)
    results = []
    dense = [] if dense is None else dense
    if not dense:
        with evaluating(model):
            dense += [model(ids[None], use_cache=False).logits[0] for ids in contexts]
    for peer, window in entries:
        longest = min(x for x in (window.recent or tokens, window.k_block or tokens))
        if peer.group > 1 and (longest < peer.group or not (window.recent or window.k_block)):
            raise ValueError(
                f"{peer.name} quantises {peer.group} tokens together and cannot have a window of {window.recent}"
            )
        started = time.perf_counter()
        if calibration is not None:
            peer.calibrate({i: s.without_sinks(window.sinks) for i, s in calibration.items()})
        scores, attention = Scores(), _Attention(peer, window, rotations)
        with evaluating(model), attending(model, attention):
            for ids, reference in zip(contexts, dense):
                before = scores.kl_sum
                logits = model(ids[None], use_cache=False).logits[0]
                for a in range(0, tokens, CHUNK):
                    b = min(a + CHUNK, tokens)
                    scores.add(logits[a:b], reference[a:b], ids[a + 1 : b + 1])
                scores.kl_by_context.append((scores.kl_sum - before) / tokens)
        tally, exact = attention.tally, window.exact_tokens(tokens)
        results.append(
            {
                "peer": peer.name,
                "paper": peer.paper,
                "sink_tokens": window.sinks,
                "recent_tokens": window.recent,
                "k_block": window.k_block,
                "v_block": window.v_block,
                "kl": scores.kl,
                "top1": scores.top1,
                "perplexity": scores.perplexity,
                "perplexity_dense": scores.perplexity_dense,
                "kl_by_context": scores.kl_by_context,
                "bits_per_element": tally.bits_per_element,
                **{f"bits_{name}": tally.per_element(name) for name in tally.bits},
                "exact_tokens": exact,
                "bits_per_element_total": (16 * exact + tally.bits_per_element * (tokens - exact)) / tokens,
                "codebook_bytes": peer.codebook_bytes,
                "seconds": time.perf_counter() - started,
            }
        )
    return results
