"""What the commands do once their arguments are read: calibrate a text, generate, evaluate, each with its progress shown."""

from __future__ import annotations

import hashlib
import importlib.metadata
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StaticCache, TextStreamer

from million_cache.attention import disable, enable
from million_cache.cache import MillionStaticCache
from million_cache.calibration import calibrate
from million_cache.codebook import Codebooks
from million_cache.config import PQConfig
from million_cache.evaluate import evaluate, tensor_bytes, with_window
from million_cache.loading import UserError, contexts, hub_reachable


def load_codebooks(source: str) -> Codebooks:
    """Codebooks from a directory or a hub id. Raises UserError when there are none."""
    path = Path(source).expanduser()
    try:
        if path.exists() or source.count("/") != 1 or source.startswith((".", "/", "~")) or not hub_reachable():
            return Codebooks.from_pretrained(path)
        return Codebooks.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error


def calibrate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    source: str,
    config: PQConfig,
    tokens: int,
    context: int = 2048,
    seed: int = 0,
    sensitivity_tokens: int = 8192,
) -> Codebooks:
    """Codebooks from the start of ``text``, with the text's name and SHA-256 in their provenance.

    Args:
        source: what to call the text.
        tokens: how many to use, in whole contexts: the rest of the division is left out.
        context: tokens of one forward.
        sensitivity_tokens: how many also run backwards, see `calibrate`.

    Raises:
        UserError: the text holds fewer tokens.
        ValueError: too few tokens for the number of centroids.
    """
    context = min(context, tokens)
    ids = contexts(tokenizer, text, context, tokens // context, source)
    books = calibrate(model, ids, config, seed=seed, context=context, sensitivity_tokens=sensitivity_tokens)
    books.provenance |= {"text": source, "text_sha256": _sha256(text)}
    return books


# ------------------------------------------------------------------------------------------------------------ generation


@dataclass
class Generation:
    """One greedy run: what it said, how fast, and what its cache took."""

    prompt_tokens: int
    tokens: list[int]
    text: str
    prefill_seconds: float
    tokens_per_second: float
    cache_bytes: int
    cache_bytes_16bit: int
    bits_per_element_total: float


class _Clock(TextStreamer):
    """Notes when each token arrives, and prints the text as it grows if asked to."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: bool):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.times = show, []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if self.show:
            super().put(value)

    def end(self) -> None:
        if self.show:
            super().end()


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> torch.Tensor:
    """Token ids ``[1, T]`` int64 of a prompt, inside the model's chat template if it has one and ``chat`` is set.

    Raises:
        UserError: nothing is left to continue.
    """
    if chat and tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
    else:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
    if ids.shape[1] == 0:
        raise UserError("the prompt is empty")
    return ids.long()


@torch.no_grad()
def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    codebooks: Codebooks | None,
    prompt: str,
    max_new_tokens: int,
    *,
    recent_tokens: int | None = None,
    sink_tokens: int | None = None,
    chat: bool = True,
    stream: bool = False,
) -> Generation:
    """Generate greedily with a `MillionStaticCache`, or with a dense `StaticCache` of the same length without codebooks.

    Args:
        codebooks: of this model, None for the dense cache.
        chat: put the prompt into the model's chat template, if it has one.
        stream: print the text to standard output as it comes.

    Returns:
        The run; tokens a second are those of decode steps, prefill apart.
    """
    ids = encode_prompt(tokenizer, prompt, chat).to(model.device)
    length = ids.shape[1] + max_new_tokens
    clock = _Clock(tokenizer, stream)
    try:
        if codebooks is None:
            disable(model)
            cache = StaticCache(config=model.config, max_cache_len=length)
        else:
            enable(model)
            cache = MillionStaticCache(model, codebooks, length, recent_tokens=recent_tokens, sink_tokens=sink_tokens)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=clock,
        )
    finally:
        disable(model)
    new = output[0, ids.shape[1] :].tolist()
    _, first, *rest = clock.times  # the prompt itself, the token that the prefill gives, the decode steps
    decode = rest[-1] - first if rest else 0.0
    return Generation(
        prompt_tokens=ids.shape[1],
        tokens=new,
        text=tokenizer.decode(new, skip_special_tokens=True),
        prefill_seconds=first - clock.times[0],
        tokens_per_second=len(rest) / decode if decode else 0.0,
        **_sizes(model, cache, length, codebooks, recent_tokens, sink_tokens),
    )


def _sizes(
    model: PreTrainedModel,
    cache: StaticCache,
    length: int,
    codebooks: Codebooks | None,
    recent_tokens: int | None,
    sink_tokens: int | None,
) -> dict[str, Any]:
    """The size fields of `Generation`: measured in the model's dtype, computed for a model of 16 bit."""
    itemsize = model.dtype.itemsize
    if codebooks is None:
        measured = tensor_bytes(cache)
        return {
            "cache_bytes": measured,
            "cache_bytes_16bit": measured * 2 // itemsize,
            "bits_per_element_total": 8.0 * itemsize,
        }
    config = with_window(codebooks.config, recent_tokens, sink_tokens)
    at_16bit = MillionStaticCache.required_bytes(
        model.config, config, length, dtype=torch.bfloat16, device_type=model.device.type
    )
    return {
        "cache_bytes": cache.cache_bytes,
        "cache_bytes_16bit": at_16bit,
        "bits_per_element_total": cache.bits_per_element_total,
    }


# ------------------------------------------------------------------------------------------------------------ evaluation


def evaluate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    codebooks: Codebooks,
    text: str,
    source: str,
    context: int,
    count: int,
    **options: Any,
) -> dict[str, Any]:
    """`evaluate` on the first ``count`` contexts of a text, with a progress bar; adds what the text and the codebooks were.

    Raises:
        UserError: the text is too short.
    """
    parts = contexts(tokenizer, text, context, count, source)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,}/{task.total:,} tokens"), TimeElapsedColumn(),
        TimeRemainingColumn(), console=Console(stderr=True), transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task("Evaluating", total=parts.numel())
        result = evaluate(model, codebooks, parts, progress=lambda done: bar.advance(task, done), **options)
    return {
        **result,
        "text": source,
        "text_sha256": _sha256(text),
        "calibration": codebooks.provenance,
        "versions": {**result["versions"], "million": importlib.metadata.version("million")},
    }


def result_table(result: dict[str, Any]) -> Table:
    """The result of `evaluate` for a terminal."""
    table = Table(title=f"{result['contexts']} contexts of {result['context']} tokens, {result['seconds']:.0f} s")
    for column in ("", "dense", "million"):
        table.add_column(column, justify="left" if column == "" else "right")
    dense_bits = 8 * torch.empty(0, dtype=getattr(torch, result["dtype"])).element_size()
    rows = (
        ("KL to the dense cache", "", f"{result['kl']:.5f}"),
        ("top-1 agreement", "", f"{result['top1']:.4f}"),
        ("perplexity", f"{result['perplexity_dense']:.4f}", f"{result['perplexity']:.4f}"),
        (f"cache, {result['dtype']}", megabytes(result["dense_cache_bytes"]), megabytes(result["cache_bytes"])),
        ("cache, 16-bit model", megabytes(result["dense_cache_bytes_16bit"]), megabytes(result["cache_bytes_16bit"])),
        ("bits an element, codes", "", f"{result['bits_per_element']:.2f}"),
        ("bits an element, total", f"{dense_bits}", f"{result['bits_per_element_total']:.2f}"),
        ("codebooks", "", megabytes(result["codebook_bytes"])),
    )
    for row in rows:
        table.add_row(*row)
    return table


def megabytes(count: int) -> str:
    """Bytes in units of 10^6."""
    return f"{count / 1e6:.2f} MB"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
