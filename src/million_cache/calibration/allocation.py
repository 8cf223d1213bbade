"""Bits by layer at a fixed budget: keys and values of each layer get the subspaces that the predictions need most.

What an error of one layer's keys or values costs is estimated where it enters the model, at the attention's output: with o_p the
output for query p as it is, o'_p with the keys (or the values) read from codes, and G_p the gradient at o_p of the negative
log-likelihood of tokens drawn from the model's own predictions, ``KL = 1/2 E[(G_p . (o'_p - o_p))^2]`` to second order (the Fisher
information is the Hessian of the KL; see `sensitivity.py`). The softmax and the errors of all tokens that a query attends to are
in it, exactly. It adds over layers and over keys and values, so the best choice for a number of bytes is a knapsack.

SmolLM2: the sums over all layers are 0.5 to 0.8 of the measured KL with all keys, or all values, at one width. What does not do:
products of a key's or value's own gradient and error, summed token by token as if they were independent, make values look
three to seven times too cheap. KVTuner (arXiv 2502.04420) and QAQ (arXiv 2403.04643) choose bits by layer for scalar quantisers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from million_cache.calibration.checkpoint import Checkpoint
from million_cache.calibration.collect import attending
from million_cache.calibration.finetune import TrainedLayer, frozen
from million_cache.calibration.sensitivity import backward_of_drawn_tokens
from million_cache.calibration.windowed import windowed_attention
from million_cache.codebook import LayerCodebooks
from million_ops.layout import MMA_SHAPES, SUBSPACE_DIMS

PAIRS = tuple((k, v) for k in SUBSPACE_DIMS for v in SUBSPACE_DIMS)


def measure_costs(
    model: PreTrainedModel,
    sequences: Sequence[Tensor],
    candidates: dict[int, dict[int, LayerCodebooks]],
    recent_tokens: int,
    sink_tokens: int,
    generator: torch.Generator,
    advance: Callable[[], None] = lambda: None,
    saved: Checkpoint | None = None,
    name: str = "allocation",
) -> dict[int, Tensor]:
    """Expected KL of each layer's keys alone and values alone from codes, everything else exact.

    One forward and one backward pass a sequence, and attention ``1 + 2 * len(candidates)`` times.

    Args:
        sequences: token ids [T] each, at positions 0 ...
        candidates: codebooks of every full-attention layer, by channels a code (d_m of keys and of values).
        recent_tokens, sink_tokens: exact tokens of the cache.
        generator: on the CPU, draws tokens and places in the frames.
        advance: called after each sequence.
        saved, name: keeps each sequence's part, ``<name>-<number>``.

    Returns:
        For each layer [2, candidates] fp64, nats a position: keys and values, in the order of ``candidates``.
    """
    saved = saved or Checkpoint()
    layers = next(iter(candidates.values()))
    seen: dict[int, tuple[Tensor, Tensor, Tensor, float, Tensor]] = {}

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling=None, **kwargs):
        out, weights = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
        if module.layer_idx in layers:
            if not out.requires_grad:  # of the first layer: nothing before it wants a gradient
                out.requires_grad_()
            out.retain_grad()
            scale = query.shape[3] ** -0.5 if scaling is None else scaling
            seen[module.layer_idx] = (query[0].detach(), key[0].detach(), value[0].detach(), scale, out)
        return out, weights

    @torch.no_grad()
    def costs(layer: int, shift: int) -> Tensor:
        *states, scale, out = seen.pop(layer)
        q, k, v = (x.float() for x in states)
        gradient = out.grad[0].float().transpose(0, 1)  # [Hq, T, D], as windowed_attention gives its result
        first = (torch.arange(k.shape[1]) + 1 - max(1, recent_tokens)).clamp(min=0)
        attend = partial(windowed_attention, q, k, v, first_k=first, first_v=first, scale=scale)
        exact = attend(kq=k, vq=v)
        found = torch.zeros(2, len(candidates), dtype=torch.float64)
        for column, books in enumerate(candidates.values()):
            trained = TrainedLayer(books[layer], k.device)
            coded = trained.dequantised(*trained.codes(k, v, shift), shift)
            kq, vq = (torch.cat((x[:, :sink_tokens], y[:, sink_tokens:]), 1) for x, y in zip((k, v), coded))
            for row, output in enumerate((attend(kq=kq, vq=v), attend(kq=k, vq=vq))):
                found[row, column] = ((output - exact) * gradient).sum((0, 2)).double().square().mean().cpu() / 2
        return found

    def run(ids: Tensor) -> dict[str, Tensor]:
        backward_of_drawn_tokens(model, ids, generator)
        # One place in the frames a sequence, as a cache would have it.
        frame = max(x.frame_tokens for x in layers.values()) or 1
        shift = int(torch.randint(frame, (), generator=generator))
        return {str(i): costs(i, shift) for i in layers}

    total = {i: torch.zeros(2, len(candidates), dtype=torch.float64) for i in layers}
    with frozen(model), attending(model, attention), torch.enable_grad():
        for number, ids in enumerate(sequences):
            part = saved.once(f"{name}-{number}", generator, partial(run, ids))
            for i in layers:
                total[i] += part[str(i)] / len(sequences)
            advance()
    return total


def served_pairs(head_dim: int, budget: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Channels a code of keys and of values that a layer may get: what the tensor core kernel serves, if it serves ``budget``."""
    served = MMA_SHAPES.get(head_dim, ())
    return served if budget in served else PAIRS


def allocate(
    costs: dict[int, Tensor], pairs: Sequence[tuple[int, int]], budget: tuple[int, int]
) -> dict[int, tuple[int, int]]:
    """The choice of least cost for no more bytes than ``budget``, channels a code of keys and of values, takes in every layer.

    Args:
        costs: by layer, [2, 3]: of keys and of values at each of `SUBSPACE_DIMS`.
        pairs: channels a code of keys and of values that a layer may get.

    Returns:
        One of ``pairs`` for each layer. Raises ValueError if all of them take more.
    """
    most = max(SUBSPACE_DIMS)  # bytes in units of what `most` channels take at 8 / most bits
    bytes_in_all = len(costs) * sum(most // d for d in budget)
    # By bytes spent: the least cost, and the choices behind it as a linked list.
    best: dict[int, tuple[float, Any]] = {0: (0.0, None)}
    for cost in costs.values():
        options = [
            (most // k + most // v, float(cost[0, SUBSPACE_DIMS.index(k)] + cost[1, SUBSPACE_DIMS.index(v)]), (k, v))
            for k, v in pairs
        ]
        after: dict[int, tuple[float, Any]] = {}
        for spent, (so_far, chosen) in best.items():
            for size, more, pair in options:
                total = spent + size
                if total <= bytes_in_all and (total not in after or so_far + more < after[total][0]):
                    after[total] = (so_far + more, (pair, chosen))
        best = after
    if not best:
        raise ValueError(f"none of {list(pairs)} fits a budget of {budget} channels a code")
    chosen, found = min(best.values(), key=lambda x: x[0])[1], []
    while chosen:
        pair, chosen = chosen
        found.append(pair)
    return dict(zip(costs, reversed(found)))
