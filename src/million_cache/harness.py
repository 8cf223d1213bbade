"""lm-evaluation-harness (`lm_eval`) with quantised caches beside the dense one.

Its models score a text in one forward, which a cache would not change: a prefill attends exactly. Here the first token goes into
the cache alone and the rest in chunks of at most 64, which attend to codes just as single decode steps do (`evaluate`); what
is generated follows an exact prefill, as for users.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from million_cache.attention import disable, enable
from million_cache.cache import MillionStaticCache
from million_cache.codebook import Codebooks
from million_cache.evaluate import CHUNK
from million_cache.loading import UserError
from million_cache.models import cache_argument, fingerprint
from million_cache.programs import described, versions, write_results
from million_cache.state import refuse_other_model


class MillionLM(HFLM):
    """A model with a `MillionStaticCache` for `lm_eval.simple_evaluate(model=...)`.

    Args:
        model: a causal language model in evaluation mode; it is enabled for each request and left disabled.
        tokenizer: its own.
        codebooks: of this model.
        recent_tokens, sink_tokens: exact last and first tokens; default: the codebooks' own.
        options: of `HFLM`, such as ``batch_size`` and ``max_length``.

    Raises:
        ValueError: codebooks of another model, at the first request.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, codebooks: Codebooks, *, recent_tokens: int | None = None,
        sink_tokens: int | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", **options)
        self.codebooks, self.window = codebooks, {"recent_tokens": recent_tokens, "sink_tokens": sink_tokens}

    def _cache(self, batch: int, tokens: int) -> MillionStaticCache:
        return MillionStaticCache(
            self.model, self.codebooks, tokens, batch, self.model.device, self.model.dtype, **self.window
        )

    @torch.no_grad()
    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits [batch, tokens, vocabulary] of ``inps`` [batch, tokens], which are padded on the right: no token sees padding."""
        tokens = inps.shape[1]
        cuts = [0, *range(1, tokens, CHUNK), tokens] if tokens > 1 else [0, tokens]
        enable(self.model)
        try:
            taken = cache_argument(self.model, self._cache(*inps.shape))
            pieces = [self.model(inps[:, a:b], use_cache=True, **taken).logits for a, b in itertools.pairwise(cuts)]
        finally:
            disable(self.model)
        return torch.cat(pieces, 1)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Continues ``context`` [batch, tokens], padded on the left, to ``max_length`` tokens at most."""
        enable(self.model)
        try:
            taken = cache_argument(self.model, self._cache(context.shape[0], max_length))
            return super()._model_generate(context, max_length, stop, **options, **taken)
        finally:
            disable(self.model)


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    codebooks: dict[str, Codebooks],
    tasks: Sequence[str],
    out: Path,
    *,
    few_shot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    max_length: int | None = None,
    include: Path | None = None,
    recent_tokens: int | None = None,
    sink_tokens: int | None = None,
) -> dict[str, Any]:
    """Tasks of lm-evaluation-harness with the dense cache and with each codebook; writes ``out`` with the suffixes json and md.

    Args:
        name: of the model.
        codebooks: by name.
        tasks: names; most download their data from the hub.
        few_shot: examples before each question; default: the task's own.
        limit: questions of a task; default: all.
        max_length: most tokens of a request; default: the model's own.
        include: directory with more tasks (YAML).

    Returns:
        What the JSON file holds: the settings, and ``rows`` of task, metric (with its filter), cache and value.

    Raises:
        UserError: a task is unknown, or its data cannot be loaded.
        ValueError: codebooks of another model.
    """
    options = {"batch_size": batch_size, "max_length": max_length}
    models = {"dense": HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", **options)}
    window = {"recent_tokens": recent_tokens, "sink_tokens": sink_tokens}
    models |= {title: MillionLM(model, tokenizer, books, **window, **options) for title, books in codebooks.items()}
    for books in codebooks.values():
        refuse_other_model(books, fingerprint(model))  # before hours of the dense cache
    manager = TaskManager(include_path=str(include) if include else None)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise UserError(f"lm-evaluation-harness {lm_eval.__version__} has no task called {', '.join(unknown)}")
    rows = []
    for title, lm in models.items():
        try:
            found = lm_eval.simple_evaluate(
                model=lm, tasks=list(tasks), num_fewshot=few_shot, limit=limit, task_manager=manager, log_samples=False,
                bootstrap_iters=0,
            )  # fmt: skip
        except (OSError, RuntimeError) as error:  # what `datasets` raises
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserError(f"the data of {', '.join(tasks)} cannot be loaded: {error}") from error
        for task, values in found["results"].items():
            for key, value in values.items():
                metric, _, filtered = key.partition(",")  # several filters of an answer may be scored
                if isinstance(value, (int, float)) and filtered and not metric.endswith("_stderr"):
                    rows.append({"task": task, "metric": key.removesuffix(",none"), "cache": title, "value": value})
    result = {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "few_shot": few_shot,
        "limit": limit,
        "codebooks": described(codebooks, recent_tokens, sink_tokens),
        "versions": versions() | {"lm_eval": lm_eval.__version__},
        "rows": rows,
    }
    write_results(out, result, harness_markdown(result))
    return result


def harness_markdown(result: dict[str, Any]) -> str:
    """A row a task and metric, a column a cache."""
    caches = ["dense", *result["codebooks"]]
    places = dict.fromkeys((row["task"], row["metric"]) for row in result["rows"])
    values = {(row["task"], row["metric"], row["cache"]): row["value"] for row in result["rows"]}
    limit = "all questions" if result["limit"] is None else f"the first {result['limit']} questions of a task"
    return "\n".join(
        [
            f"# lm-evaluation-harness: {result['model']}",
            "",
            f"`million harness`, lm_eval {result['versions']['lm_eval']}, {result['dtype']}, {limit}. Texts are scored through the "
            "decode path: first one token, then chunks of 64.",
            "",
            f"| task | metric | {' | '.join(caches)} |",
            f"| --- | --- |{' --- |' * len(caches)}",
            *(
                f"| {task} | {metric} | {' | '.join(f'{values[task, metric, cache]:.4f}' for cache in caches)} |"
                for task, metric in places
            ),
            "",
        ]
    )
