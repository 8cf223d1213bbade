"""Which errors of quantised keys and values the model's predictions feel: gradients and their second moments.

Moving a key k_j by e_j changes the predictions by ``KL = 1/2 E[(sum_j g_j . e_j)^2]`` to second order, with g_j the gradient
with respect to k_j of the negative log-likelihood of tokens *drawn from the model's own predictions* (the Fisher information
is the Hessian of the KL). So the weight of the keys' distortion is ``W = E[g g^T]``, and tokens whose gradient is large
count for more in k-means (as in CQ, arXiv 2405.03917); values likewise.

The queries' moments, which would be the weight if every query counted the same, are dominated by queries that look at
the first token or nearby; both are exact in the cache. The gradient here is that of the copies which the cache quantises:
each query sees its recent tokens and the sinks as they are, and only what lies further back through the copy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from million_cache.calibration.checkpoint import Checkpoint
from million_cache.calibration.collect import LayerSensitivity, attending
from million_cache.calibration.windowed import windowed_attention
from million_cache.models import evaluating, full_attention_layers

DRAW = 256  # positions whose probabilities are held at once
DAMPING = 0.1
# KL of SmolLM2 with (key, value) power, first two evaluation contexts; 2 bit: (0, 0) .0106, (.5, .5) .0089, (.5, 1) .0088;
# 1 bit: (.5, .5) .0456, (.5, 1) .0445, (1, 1) .0460.
KEY_POWER, VALUE_POWER = 0.5, 1.0


def draw_tokens(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token of each row's probabilities, by inversion of their cumulative sum: `torch.multinomial` wants a random number of every
    entry, and from a generator on the CPU that takes longer than the model.

    Args:
        logits: [T, vocabulary].
        generator: on the CPU, so that a seed means the same on every device.

    Returns:
        [T] int64, on the logits' device.

    Raises:
        ValueError: a row has no probabilities: it holds NaN or inf.
    """
    uniform = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator).to(logits.device)
    drawn = []
    for part, u in zip(logits.split(DRAW), uniform.split(DRAW)):
        cumulative = part.float().softmax(-1).cumsum(-1, dtype=torch.float64)
        if not cumulative[:, -1].isfinite().all():
            raise ValueError("the model's predictions hold NaN or inf")
        # right: never a token of probability 0. The bound: u times the sum may round up to the sum.
        found = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)[:, 0]
        drawn.append(found.clamp(max=logits.shape[1] - 1))
    return torch.cat(drawn)


def backward_of_drawn_tokens(model: PreTrainedModel, ids: Tensor, generator: torch.Generator) -> None:
    """One forward of token ids [T], and one backward pass of the negative log-likelihood of tokens drawn from the predictions."""
    ids = ids[None].to(model.device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].float()
    F.cross_entropy(logits, draw_tokens(logits.detach(), generator), reduction="sum").backward()


def measure_sensitivity(
    model: PreTrainedModel,
    sequences: list[Tensor],
    rows: list[Tensor],
    chosen: list[int],
    recent_tokens: int,
    sink_tokens: int,
    generator: torch.Generator,
    advance: Callable[[], None] = lambda: None,
    saved: Checkpoint | None = None,
) -> dict[int, LayerSensitivity]:
    """Gradients of quantised keys and values.

    One forward and one backward pass a chosen sequence; the attention's scores are computed again on the way back instead
    of kept, all other activations of a sequence are in memory at once.

    Args:
        sequences: token ids [T] each, at positions 0 ...
        rows: positions of each sequence whose gradients are wanted, [n] int64.
        chosen: which sequences to run.
        recent_tokens, sink_tokens: exact tokens of the cache.
        generator: on the CPU, draws the tokens.
        advance: called after each sequence.
        saved: keeps each sequence's part, ``sensitivity-<number>``.

    Returns:
        For each full-attention layer, with N the rows of all sequences. All is zero where no query looks further back than
        the window.
    """
    layers = full_attention_layers(model.config)
    copies: dict[int, tuple[Tensor, Tensor]] = {}
    parts: dict[int, dict[str, Tensor]] = {}
    saved = saved or Checkpoint()

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        if module.layer_idx not in layers:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        # What is added to the copies that the cache would quantise: nothing, but it has a gradient.
        shifts = torch.zeros_like(key[0], requires_grad=True), torch.zeros_like(value[0], requires_grad=True)
        copies[module.layer_idx] = shifts
        first = (torch.arange(key.shape[2], device=key.device) + 1 - max(1, recent_tokens)).clamp(min=0)

        def attend(q: Tensor, k: Tensor, v: Tensor, *shifts: Tensor) -> Tensor:
            q, k, v = q.float(), k.float(), v.float()
            kq, vq = (torch.cat((x[:, :sink_tokens], (x + s)[:, sink_tokens:]), 1) for x, s in zip((k, v), shifts))
            return windowed_attention(q, k, v, kq, vq, first, first, scale).to(query.dtype)

        out = checkpoint(attend, query[0], key[0], value[0], *shifts, use_reentrant=False, preserve_rng_state=False)
        return out.transpose(0, 1)[None], None

    def run(ids: Tensor, keep: Tensor) -> dict[str, Tensor]:
        backward_of_drawn_tokens(model, ids, generator)
        found = {}
        for i, shifts in copies.items():
            g, h = (torch.zeros_like(s) if s.grad is None else s.grad for s in shifts)
            g, h = g.float(), h.float()
            found[f"{i}.moment"] = (g.transpose(1, 2) @ g).double().cpu()
            found[f"{i}.keys"] = g.cpu()[:, keep]
            found[f"{i}.values"] = h.square().sum(-1).cpu()[:, keep]
        copies.clear()
        return found

    wanted = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.requires_grad_(False)
        with evaluating(model), attending(model, attention), torch.enable_grad():
            for number, (ids, keep) in enumerate(zip(sequences, rows)):
                if number in chosen:
                    parts[number] = saved.once(f"sensitivity-{number}", generator, partial(run, ids, keep))
                    advance()
    finally:
        for p, before in wanted:
            p.requires_grad_(before)

    def whole(name: str) -> Tensor:
        """Parts [H, n, ...] of all sequences one after the other; NaN for those that were not run."""
        known = {number: part.pop(name) for number, part in parts.items()}
        H, _, *rest = next(iter(known.values())).shape
        return torch.cat(
            [
                x if (x := known.get(n)) is not None else torch.full((H, len(r), *rest), torch.nan)
                for n, r in enumerate(rows)
            ],
            1,
        )

    return {
        i: LayerSensitivity(
            sum(part.pop(f"{i}.moment") for part in parts.values()), whole(f"{i}.keys"), whole(f"{i}.values")
        )
        for i in layers
        if parts
    }


def row_weights(energy: Tensor, power: float) -> Tensor:
    """Weights of rows in k-means, [H, N] with mean 1 a head, from their energies [H, N] (NaN: unknown, weight 1).

    Damped, for one drawn token makes a noisy estimate of a row's energy: ``(energy / mean + DAMPING) ^ power``.
    """
    known = ~energy.isnan()
    energy = energy.nan_to_num(0.0)
    count = known.sum(1, keepdim=True).clamp(min=1)
    mean = energy.sum(1, keepdim=True) / count
    weight = (energy / mean.clamp(min=1e-30) + DAMPING).pow(power)
    weight = weight / (torch.where(known, weight, 0).sum(1, keepdim=True) / count).clamp(min=1e-30)
    return torch.where(known & (mean > 0), weight, 1.0)
