"""Gradient descent on the centroids of all layers together, against the KL divergence to the model with an exact cache.

k-means serves each subspace of each head alone, for keys and values that are themselves exact. What the predictions lose comes
of all layers together: attention's exponential prefers tokens whose key was rounded upwards (it is convex, so noise on the
keys moves attention's mass), and later layers see what earlier ones lost. So all centroids are trained together, through the
model, as the cache will use them: each query sees its recent tokens and the sinks exactly and everything older through its
codes, at a random place in its frame.

Codes are discrete: each pass assigns them anew, nearest centroid, as the cache will; the gradient reaches a centroid through
the tokens that have its code, and passes on to the keys and values as if they were not quantised (straight-through, Bengio
et al., arXiv 1308.3432; without that, as good within 1 % on SmolLM2 at 1 bit).

There are about as many centroids as tokens to train them on, and one bad step can ruin all layers. So part of the text is
held out; what is returned is the average of the iterates that did best on it, or the start if none did better. A state that
does worse than the best by more than `WORSE` is given up for the best, at half the rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from million_cache.calibration.checkpoint import GENERATOR, Checkpoint
from million_cache.calibration.collect import attending
from million_cache.calibration.kmeans import assign
from million_cache.calibration.windowed import windowed_attention
from million_cache.codebook import LayerCodebooks
from million_cache.models import evaluating
from million_ops.reference import from_frame, to_frame

# How far a step moves a centroid, relative to the distance to its neighbour. SmolLM2 at 1 bit, 15 steps: 0.02 took the held-out
# KL from 0.0479 to 0.0293, 0.06 to 0.0336 on a detour.
LEARNING_RATE = 0.02
BATCH = 4  # sequences a step
HELD_OUT = 8  # one sequence in so many is held out, at most MOST_HELD_OUT
MOST_HELD_OUT = 6
CHECKS = 10  # how often in a training the held-out sequences are looked at
WARM_UP = 0.1  # of the steps; then the rate falls to 0 along a cosine
BETAS = (0.9, 0.95)  # of Adam
AVERAGE = 0.8  # decay a step of the averaged iterate
WORSE = 1.1  # times the best held-out KL
ROWS = 256  # positions whose probabilities are held at once
# A smaller gradient moves a centroid by as much less. Attention's weights reach e^-50, and the square of such a gradient loses its
# bits in fp32, below 1e-45 all of them: divided by its root, a centroid that no query cares about went a thousand times too far.
SMALLEST = 1e-18


class CentroidAdam:
    """Adam that moves a centroid as a whole, in units of the distance to its nearest neighbour.

    Centroids of rare, large keys lie far apart, those of frequent ones close together.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters  # [H, 256, S, d] fp32 each, with gradients
        self.scales = [_spacing(p.detach()) for p in parameters]
        self.first = [torch.zeros_like(p) for p in parameters]
        self.second = [torch.zeros_like(p[..., :1]) for p in parameters]
        self.steps = 0

    def reset(self) -> None:
        """Forget all gradients so far."""
        for x in (*self.first, *self.second):
            x.zero_()
        self.steps = 0

    def clear(self) -> None:
        """Drop the parameters' gradients."""
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step from the parameters' gradients, which are cleared."""
        self.steps += 1
        b1, b2 = BETAS
        for p, scale, first, second in zip(self.parameters, self.scales, self.first, self.second):
            if p.grad is not None:
                first.lerp_(p.grad, 1 - b1)
                second.lerp_(p.grad.square().mean(-1, keepdim=True), 1 - b2)
                size = (second / (1 - b2**self.steps)).sqrt()
                p -= rate * scale * first / (1 - b1**self.steps) / size.clamp(min=SMALLEST)
        self.clear()


def _spacing(centroids: Tensor) -> Tensor:
    """Distance of each centroid to the nearest other one, [H, 256, S, 1]; at least a tenth of the mean in its subspace."""
    x = centroids.transpose(1, 2)
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    distance.diagonal(dim1=-2, dim2=-1).fill_(math.inf)
    nearest = distance.amin(-1)
    return torch.maximum(nearest, 0.1 * nearest.mean(-1, keepdim=True)).transpose(1, 2)[..., None]


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
        return slots, torch.full((1,), -shift, dtype=torch.int32, device=self.k.device)

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


class QuantisedModel:
    """A model whose attention sees older keys and values through codes, all positions of a sequence at once."""

    def __init__(
        self, model: PreTrainedModel, layers: dict[int, LayerCodebooks], recent_tokens: int, sink_tokens: int
    ) -> None:
        self.model = model
        self.layers = {i: TrainedLayer(layer, model.device) for i, layer in layers.items()}
        self.recent_tokens, self.sink_tokens = max(1, recent_tokens), sink_tokens
        self.shift = 0

    @property
    def centroids(self) -> list[Tensor]:
        return [c for layer in self.layers.values() for c in (layer.k, layer.v)]

    @torch.no_grad()
    def load(self, centroids: list[Tensor]) -> None:
        """Take other centroids, in the order of `centroids`."""
        for mine, other in zip(self.centroids, centroids):
            mine.copy_(other)

    def kl(self, ids: Tensor, shift: int) -> Tensor:
        """Mean KL to the exact cache of token ids [T] at positions 0 .., the first in slot ``shift``; differentiable if gradients are on."""
        ids = ids[None].to(self.model.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        self.shift = shift
        with torch.no_grad():
            dense = self.model(**inputs).logits[0]
        with attending(self.model, self._attention):
            return kl_divergence(self.model(**inputs).logits[0], dense)

    def _attention(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        if module.layer_idx not in self.layers:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        layer, shift, sinks = self.layers[module.layer_idx], self.shift, self.sink_tokens
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        first = (torch.arange(key.shape[2]) + 1 - self.recent_tokens).clamp(min=0)
        codes = layer.codes(key[0].float(), value[0].float(), shift)

        def attend(q: Tensor, k: Tensor, v: Tensor, *centroids: Tensor) -> Tensor:
            q, k, v = q.float(), k.float(), v.float()
            back = layer.dequantised(*codes, shift)
            # Straight-through: the value is the centroid's, the gradient also that of the exact key.
            through = (y + (x - x.detach()) for x, y in zip((k, v), back))
            kq, vq = (torch.cat((x[:, :sinks], y[:, sinks:]), 1) for x, y in zip((k, v), through))
            return windowed_attention(q, k, v, kq, vq, first, first, scale).to(query.dtype)

        # The centroids are arguments so that the checkpoint sees that something wants a gradient.
        out = checkpoint(
            attend, query[0], key[0], value[0], layer.k, layer.v, use_reentrant=False, preserve_rng_state=False
        )
        return out.transpose(0, 1)[None], None


@dataclass
class Finetuned:
    """What `finetune` gives.

    Attributes:
        layers: with other centroids; transforms and frames as they were. On the CPU.
        before, after: mean KL on the held-out sequences, in nats, of the start and of ``layers``.
        step: after which ``layers`` were found; 0: the start.
    """

    layers: dict[int, LayerCodebooks]
    before: float
    after: float
    step: int


def useful_sequences(sequences: list[Tensor], recent_tokens: int, sink_tokens: int) -> list[Tensor]:
    """Those in which a query sees codes. Raises ValueError if they are fewer than `finetune` needs."""
    useful = [s for s in sequences if len(s) > max(1, recent_tokens) + sink_tokens]
    if len(useful) < 2:
        raise ValueError(
            f"fine-tuning needs at least 2 sequences longer than the window of {recent_tokens} + {sink_tokens} exact tokens, "
            f"one of them to hold out; got {len(useful)}"
        )
    return useful


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """No parameter of the model wants a gradient."""
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.requires_grad_(False)
        with evaluating(model):
            yield
    finally:
        for p, before in wanted:
            p.requires_grad_(before)


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
    saved: Checkpoint | None = None,
    name: str = "tuning",
) -> Finetuned:
    """Train the centroids of all layers together.

    A step is, for each of `BATCH` sequences, one forward with the exact cache, and one forward and one backward pass with the
    quantised one.

    Args:
        sequences: token ids [T] each, at positions 0 ..; those that the window covers are left out. One in `HELD_OUT`, drawn at
            random, is held out; steps take the others in turn, in a new random order each time, at a random place in their frames.
        layers: every full-attention layer's codebooks, from k-means.
        recent_tokens, sink_tokens: exact tokens of the cache.
        steps: of gradient descent, at least 1.
        generator: on the CPU.
        learning_rate: the highest; how far a step moves a centroid, relative to the distance to its neighbour.
        advance: called after each step, also one that was loaded, with the last KL on the held-out sequences.
        saved, name: keeps the state after each step, in place of the one before, as the part ``name``.

    Raises:
        ValueError: fewer than 2 sequences are longer than the window.
    """
    useful = useful_sequences(sequences, recent_tokens, sink_tokens)
    order = torch.randperm(len(useful), generator=generator).tolist()
    held = min(MOST_HELD_OUT, max(1, len(useful) // HELD_OUT))
    frame = max((layer.frame_tokens for layer in layers.values()), default=0) or 1

    def place() -> int:
        return int(torch.randint(frame, (), generator=generator))

    held_out = [(useful[i], place()) for i in order[:held]]
    training = [useful[i] for i in order[held:]]
    quantised = QuantisedModel(model, layers, recent_tokens, sink_tokens)
    optimiser = CentroidAdam(quantised.centroids)
    current, average = ([c.detach().clone() for c in quantised.centroids] for _ in range(2))
    every = max(1, steps // CHECKS)

    def score(centroids: list[Tensor]) -> float:
        """KL of the held-out sequences with these centroids as the cache will have them, in fp16."""
        for mine, now in zip(current, quantised.centroids):
            mine.copy_(now.detach())
        quantised.load([c.half().float() for c in centroids])
        found = sum(quantised.kl(ids, shift).item() for ids, shift in held_out) / held
        quantised.load(current)
        return found

    saved = saved or Checkpoint()
    with frozen(model):
        best, best_step = [c.clone() for c in average], 0
        share, queue, done = 1.0, [], 0
        state = {
            "now": quantised.centroids,
            "average": average,
            "best": best,
            "first": optimiser.first,
            "second": optimiser.second,
        }
        if found := saved.load(name):
            tensors, scalars = found
            generator.set_state(tensors.pop(GENERATOR))
            with torch.no_grad():
                for key, x in tensors.items():
                    what, number = key.split(".")
                    state[what][int(number)].copy_(x)
            before, kl, best_kl, best_step, share, queue, done, optimiser.steps = (
                scalars[x]
                for x in ("before", "kl", "best_kl", "best_step", "share", "queue", "done", "optimiser_steps")
            )
            for _ in range(done):
                advance(kl)
        else:
            before = kl = best_kl = score(average)
        for step in range(done + 1, steps + 1):
            losses = []
            for _ in range(min(BATCH, len(training))):
                queue = queue or torch.randperm(len(training), generator=generator).tolist()
                with torch.enable_grad():
                    loss = quantised.kl(training[queue.pop()], place())
                    loss.backward()
                losses.append(loss.item())
            warm = max(1, round(WARM_UP * steps))
            rate = learning_rate * share * min(1, step / warm)
            rate *= 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm + 1)))
            broken = not math.isfinite(sum(losses))
            if broken:
                optimiser.clear()
            else:
                optimiser.step(rate)
                for mean, now in zip(average, quantised.centroids):
                    mean.lerp_(now.detach(), 1 - AVERAGE)
            if broken or step % every == 0 or step == steps:
                kl = score(average)
                if broken or not kl <= WORSE * best_kl:
                    share /= 2
                    quantised.load(best)
                    optimiser.reset()
                    for mean, mine in zip(average, best):
                        mean.copy_(mine)
                elif kl < best_kl:
                    best_kl, best_step = kl, step
                    for mine, mean in zip(best, average):
                        mine.copy_(mean)
            saved.save(
                name, {f"{what}.{i}": x for what, xs in state.items() for i, x in enumerate(xs)}, generator, before=before, kl=kl,
                best_kl=best_kl, best_step=best_step, share=share, queue=queue, done=step, optimiser_steps=optimiser.steps,
            )  # fmt: skip
            advance(kl)
        quantised.load(best)
        found = {i: layer.result() for i, layer in quantised.layers.items()}
    return Finetuned(found if best_step else dict(layers), before, best_kl, best_step)
