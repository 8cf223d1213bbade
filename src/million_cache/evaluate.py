"""How far a quantised cache moves a model's predictions, measured through the decode path that users run.

A prefill into an empty cache is exact and would score nothing. So a first token goes into the cache alone and the rest in
chunks of at most 64, which attend to codes just as single steps do; every position is scored against a dense prefill.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from million_cache.attention import disable, enable
from million_cache.cache import MillionStaticCache
from million_cache.codebook import Codebooks
from million_cache.config import PQConfig
from million_cache.models import cache_argument

CHUNK = 64  # most tokens of one forward through the decode path
REFERENCE_BYTES = 1 << 29  # reference logits held at once: one prefill of 2048 tokens at SmolLM2's vocabulary


@dataclass
class Scores:
    """Sums over the scored positions of a text; the means are properties."""

    positions: int = 0
    targets: int = 0
    kl_sum: float = 0.0
    agreements: int = 0
    nll_sum: float = 0.0
    nll_dense_sum: float = 0.0
    kl_by_context: list[float] = field(default_factory=list)

    def add(self, logits: Tensor, dense: Tensor, targets: Tensor) -> None:
        """Score positions in a row.

        Args:
            logits: ``[n, vocabulary]`` of the model with the quantised cache, any float dtype.
            dense: the same of the reference.
            targets: the tokens that follow, ``[n]`` int64, or ``[n - 1]`` at the end of a text.
        """
        log_p, log_q = dense.float().log_softmax(-1), logits.float().log_softmax(-1)
        self.positions += len(log_p)
        self.targets += len(targets)
        self.kl_sum += F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).double().sum().item()
        self.agreements += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        self.nll_sum += F.nll_loss(log_q[: len(targets)], targets, reduction="none").double().sum().item()
        self.nll_dense_sum += F.nll_loss(log_p[: len(targets)], targets, reduction="none").double().sum().item()

    @property
    def kl(self) -> float:
        """Mean KL(dense || quantised) of the next-token distribution, nats."""
        return self.kl_sum / self.positions

    @property
    def top1(self) -> float:
        """Share of positions where both predict the same token."""
        return self.agreements / self.positions

    @property
    def perplexity(self) -> float:
        """Of the quantised cache."""
        return math.exp(self.nll_sum / self.targets)

    @property
    def perplexity_dense(self) -> float:
        """Of the reference."""
        return math.exp(self.nll_dense_sum / self.targets)


def tensor_bytes(cache: StaticCache) -> int:
    """Bytes of the key and value tensors of a dense static cache; 0 before its first use."""
    return sum(
        x.numel() * x.element_size()
        for layer in cache.layers
        if layer.is_initialized
        for x in (layer.keys, layer.values)
    )


def with_window(config: PQConfig, recent_tokens: int | None = None, sink_tokens: int | None = None) -> PQConfig:
    """``config`` with another exact window or other sinks, where they are given."""
    given = {"recent_tokens": recent_tokens, "sink_tokens": sink_tokens}
    return replace(config, **{k: v for k, v in given.items() if v is not None})


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    codebooks: Codebooks,
    contexts: Tensor,
    *,
    recent_tokens: int | None = None,
    sink_tokens: int | None = None,
    position_offset: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Compare a model with a `MillionStaticCache` to itself with a dense cache.

    Args:
        model: a causal language model in evaluation mode; it is left disabled.
        codebooks: of this model.
        contexts: int64 ``[contexts, tokens]``, scored independently of each other.
        recent_tokens: the exact window; default: the codebooks' own.
        sink_tokens: exact first tokens; default: the codebooks' own.
        position_offset: position of each context's first token, for both caches.
        progress: called with the number of tokens done since the last call.

    Returns:
        ``kl`` (mean KL(dense || quantised), nats), ``top1`` (agreement), ``perplexity`` and ``perplexity_dense`` over every
        position; ``bits_per_element`` (codes) and ``bits_per_element_total`` (window and sinks too); ``cache_bytes`` and
        ``dense_cache_bytes`` (measured, in the model's dtype), both again as ``..._16bit`` (computed, at 16 bit);
        ``codebook_bytes``; ``kl_by_context``, and what was measured, with which versions, in how many ``seconds``.

    Raises:
        ValueError: fewer than 2 tokens a context, or codebooks of another model.
    """
    if contexts.ndim != 2 or contexts.shape[0] < 1 or contexts.shape[1] < 2:
        raise ValueError(f"contexts must be [contexts, at least 2 tokens], got {tuple(contexts.shape)}")
    started = time.perf_counter()
    tokens = contexts.shape[1]
    contexts = contexts.to(model.device)
    positions = position_offset + torch.arange(tokens, device=model.device)[None]
    text_config = model.config.get_text_config(decoder=True)
    piece = max(CHUNK, REFERENCE_BYTES // (4 * text_config.vocab_size) // CHUNK * CHUNK)
    disable(model)
    dense = StaticCache(config=model.config, max_cache_len=tokens)
    cache = MillionStaticCache(
        model.config,
        codebooks,
        tokens,
        recent_tokens=recent_tokens,
        sink_tokens=sink_tokens,
        first_position=position_offset,
    )
    scores = Scores()

    def logits_of(context: Tensor, start: int, end: int, past: StaticCache) -> Tensor:
        inputs = context[None, start:end]
        taken = cache_argument(model, past)
        return model(inputs, position_ids=positions[:, start:end], use_cache=True, **taken).logits[0]

    try:
        for context in contexts:
            before = scores.kl_sum
            for start in range(0, tokens, piece):
                end = min(start + piece, tokens)
                disable(model)
                reference = logits_of(context, start, end, dense)
                enable(model)
                b = start
                while b < end:
                    a, b = b, min(b + CHUNK, end) if b else 1
                    scores.add(
                        logits_of(context, a, b, cache), reference[a - start : b - start], context[a + 1 : b + 1]
                    )
                    if progress:
                        progress(b - a)
            scores.kl_by_context.append((scores.kl_sum - before) / tokens)
            dense.reset()
            cache.reset()
    finally:
        disable(model)
    config = with_window(codebooks.config, recent_tokens, sink_tokens)
    dense_cache_bytes = tensor_bytes(dense)
    return {
        "kl": scores.kl,
        "top1": scores.top1,
        "perplexity": scores.perplexity,
        "perplexity_dense": scores.perplexity_dense,
        "bits_per_element": cache.bits_per_element,
        "bits_per_element_total": cache.bits_per_element_total,
        "cache_bytes": cache.cache_bytes,
        "dense_cache_bytes": dense_cache_bytes,
        "cache_bytes_16bit": MillionStaticCache.required_bytes(
            model.config, config, tokens, dtype=torch.bfloat16, device_type=model.device.type
        ),
        "dense_cache_bytes_16bit": dense_cache_bytes * 2 // model.dtype.itemsize,
        "codebook_bytes": cache.codebook_bytes,
        "kl_by_context": scores.kl_by_context,
        "positions": scores.positions,
        "contexts": len(contexts),
        "context": tokens,
        "chunk": CHUNK,
        "position_offset": position_offset,
        "recent_tokens": config.recent_tokens,
        "sink_tokens": config.sink_tokens,
        "config": config.to_dict(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seconds": time.perf_counter() - started,
    }
