"""A few steps of gradient descent on the centroids, against the KL divergence to the model with an exact cache.

k-means serves each subspace of each head alone, for keys and values that are themselves exact. What the predictions lose comes
of all layers together: attention's exponential prefers tokens whose key was rounded upwards (it is convex, so noise on the
keys moves attention's mass), and later layers see what earlier ones lost. So all centroids of all layers are trained
together, through the model, as the cache will use them: each query sees its recent tokens and the sinks exactly and
everything older through its codes.

Codes are discrete: each step assigns them anew, nearest centroid, as the cache will; the gradient reaches a centroid through
the tokens that have its code, and passes on to the keys and values as if they were not quantised (straight-through, Bengio
et al., arXiv 1308.3432).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from million_cache.calibration.collect import attending
from million_cache.calibration.kmeans import assign
from million_cache.calibration.windowed import windowed_attention
from million_cache.codebook import LayerCodebooks
from million_cache.models import evaluating
from million_ops.reference import from_frame, to_frame

LEARNING_RATE = (
    0.003  # of the first step; falls to 0 along a cosine. 0.02 made SmolLM2's KL at 1 bit 2.5 times as large at once
)
BETAS = (0.9, 0.95)  # of Adam
ROWS = 256  # positions whose probabilities are held at once


class CentroidAdam:
    """Adam with one step size a head and subspace.

    Adam's division by the gradient's size, element by element, would move a centroid that few tokens have as far as one that
    many have, on little evidence. Here the second moment is the mean over the centroids of a subspace.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters  # [H, 256, S, d] fp32 each, with gradients
        # Values are not normalised, so steps are relative to how far a head's centroids lie from zero.
        self.scales = [p.detach().square().mean((1, 2, 3), keepdim=True).sqrt() for p in parameters]
        self.first = [torch.zeros_like(p) for p in parameters]
        self.second = [torch.zeros_like(p[:, :1, :, :1]) for p in parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step from the parameters' gradients, which are cleared."""
        self.steps += 1
        b1, b2 = BETAS
        for p, scale, first, second in zip(self.parameters, self.scales, self.first, self.second):
            if p.grad is None:
                continue
            first.lerp_(p.grad, 1 - b1)
            second.lerp_(p.grad.square().mean((1, 3), keepdim=True), 1 - b2)
            size = (second / (1 - b2**self.steps)).sqrt()
            p -= rate * scale * first / (1 - b1**self.steps) / size.clamp(min=1e-30)
            p.grad = None


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """Codes of x [H, T, D] fp32 with centroids [H, 256, S, d] fp32: int64 [H, T, S]."""
    H, T, _ = x.shape
    S, d = centroids.shape[2:]
    points = x.view(H, T, S, d).transpose(1, 2).reshape(H * S, T, d)
    codes, _ = assign(points, centroids.transpose(1, 2).reshape(H * S, -1, d))
    return codes.view(H, S, T).transpose(1, 2)


def decoded(codes: Tensor, centroids: Tensor) -> Tensor:
    """Centroids of codes [H, T, S]: [H, T, D], differentiable with respect to the centroids [H, 256, S, d]."""
    return centroids.gather(1, codes[..., None].expand(-1, -1, -1, centroids.shape[3])).flatten(2)


class TrainedLayer:
    """One layer's keys and values through its codes, with centroids that are being trained: ``k``, ``v`` [H, 256, S, d] fp32."""

    def __init__(self, books: LayerCodebooks, device: torch.device) -> None:
        self.books = books.to(device)
        self.k, self.v = (c.float().requires_grad_() for c in (self.books.k_codebook, self.books.v_codebook))

    def _frame(self, tokens: int, shift: int) -> tuple[Tensor, Tensor]:
        """Slots and origin of ``tokens`` tokens at positions 0 .., the first of which lies in slot ``shift``."""
        slots = torch.arange(shift, shift + tokens, device=self.k.device)
        return slots, torch.tensor([-shift], dtype=torch.int32, device=self.k.device)

    @torch.no_grad()
    def codes(self, k: Tensor, v: Tensor, shift: int) -> tuple[Tensor, Tensor]:
        """Codes [H, T, S] int64 of k and v [H, T, D] fp32 at positions 0 .., in slots ``shift`` .. of the frames."""
        b = self.books
        rope = b.inv_freq, b.frame_tokens, b.rope_interleaved
        x = to_frame(k[None], *self._frame(k.shape[1], shift), b.k_transform, *rope)[0]
        return nearest(x, self.k), nearest(v, self.v)

    def dequantised(self, k_codes: Tensor, v_codes: Tensor, shift: int) -> tuple[Tensor, Tensor]:
        """Keys and values [H, T, D] fp32 of codes, differentiable with respect to the centroids."""
        b = self.books
        rope = b.inv_freq, b.frame_tokens, b.rope_interleaved
        x = decoded(k_codes, self.k)[None]
        k = from_frame(x, *self._frame(x.shape[2], shift), b.k_transform_inv, *rope)[0]
        return k, decoded(v_codes, self.v)

    def result(self) -> LayerCodebooks:
        """The layer with its trained centroids, on the CPU."""
        k, v = (c.detach().half().cpu() for c in (self.k, self.v))
        return replace(self.books.to("cpu"), k_codebook=k, v_codebook=v)


def kl_divergence(logits: Tensor, dense: Tensor) -> Tensor:
    """Mean over positions of KL(dense || logits) in nats; logits [T, vocabulary]. Frees its intermediates as it goes."""
    total = logits.new_zeros((), dtype=torch.float32)
    for a, b in zip(logits.split(ROWS), dense.split(ROWS)):
        total = total + checkpoint(_kl_sum, a, b, use_reentrant=False, preserve_rng_state=False)
    return total / len(logits)


def _kl_sum(logits: Tensor, dense: Tensor) -> Tensor:
    log_q, log_p = logits.float().log_softmax(-1), dense.float().log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def finetune(
    model: PreTrainedModel,
    sequences: list[Tensor],
    layers: dict[int, LayerCodebooks],
    recent_tokens: int,
    sink_tokens: int,
    steps: int,
    generator: torch.Generator,
    *,
    learning_rate: float = LEARNING_RATE,
    advance: Callable[[float], None] = lambda kl: None,
) -> dict[int, LayerCodebooks]:
    """Train the centroids of all layers together. A step is one forward of a sequence with the exact cache, and one forward
    and one backward pass with the quantised one.

    Args:
        sequences: token ids [T] each, at positions 0 ..; those that the window covers are left out. Steps take them in turn,
            in a new random order each time, at a random place in their frames.
        layers: every full-attention layer's codebooks, from k-means.
        recent_tokens, sink_tokens: exact tokens of the cache.
        steps: of gradient descent; 0 returns ``layers``.
        generator: on the CPU.
        learning_rate: of the first step, relative to the centroids' root mean square in each head.
        advance: called after each step with the KL before it, mean over the sequence's positions, in nats.

    Returns:
        The layers with other centroids; transforms and frames as they were. On the CPU.

    Raises:
        ValueError: every sequence is all window, or the KL is not finite.
    """
    useful = [s for s in sequences if len(s) > recent_tokens + sink_tokens]
    if steps and not useful:
        raise ValueError(f"every sequence lies within the window of {recent_tokens} + {sink_tokens} exact tokens")
    trained = {i: TrainedLayer(layer, model.device) for i, layer in layers.items()}
    optimiser = CentroidAdam([c for layer in trained.values() for c in (layer.k, layer.v)])
    frame = max((layer.frame_tokens for layer in layers.values()), default=0) or 1
    shift = 0

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        if module.layer_idx not in trained:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        layer = trained[module.layer_idx]
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        first = (torch.arange(key.shape[2], device=key.device) + 1 - max(1, recent_tokens)).clamp(min=0)
        at = shift
        codes = layer.codes(key[0].float(), value[0].float(), at)

        def attend(q: Tensor, k: Tensor, v: Tensor, *centroids: Tensor) -> Tensor:
            q, k, v = q.float(), k.float(), v.float()
            back = layer.dequantised(*codes, at)
            # Straight-through: the value is the centroid's, the gradient also that of the exact key.
            through = (y + (x - x.detach()) for x, y in zip((k, v), back))
            kq, vq = (torch.cat((x[:, :sink_tokens], y[:, sink_tokens:]), 1) for x, y in zip((k, v), through))
            return windowed_attention(q, k, v, kq, vq, first, first, scale).to(query.dtype)

        # The centroids are arguments so that the checkpoint sees that something wants a gradient.
        out = checkpoint(
            attend, query[0], key[0], value[0], layer.k, layer.v, use_reentrant=False, preserve_rng_state=False
        )
        return out.transpose(0, 1)[None], None

    wanted = [(p, p.requires_grad) for p in model.parameters()]
    order: list[int] = []
    try:
        model.requires_grad_(False)
        for step in range(steps):
            order = order or torch.randperm(len(useful), generator=generator).tolist()
            ids = useful[order.pop()][None].to(model.device)
            shift = int(torch.randint(frame, (), generator=generator))
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
            with evaluating(model):
                dense = model(**inputs).logits[0]
                with attending(model, attention), torch.enable_grad():
                    kl = kl_divergence(model(**inputs).logits[0], dense)
                    kl.backward()
            if not kl.isfinite():
                raise ValueError(f"fine-tuning: the KL of step {step} is {kl.item()}")
            optimiser.step(learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps)))
            advance(kl.item())
    finally:
        for p, before in wanted:
            p.requires_grad_(before)
    return {i: layer.result() for i, layer in trained.items()}
