"""What the commands do once their arguments are read: calibrate a text, generate, evaluate text and tasks, each with its progress shown."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StaticCache, TextStreamer

from million_cache.attention import disable, enable
from million_cache.cache import MillionStaticCache
from million_cache.calibration import calibrate_all
from million_cache.codebook import Codebooks
from million_cache.config import PQConfig, package_version
from million_cache.evaluate import evaluate, tensor_bytes, with_window
from million_cache.loading import UserError, atomic_path, contexts, hub_reachable, shipped_codebooks
from million_cache.models import cache_argument
from million_cache.tasks import TASKS, make_examples, run_tasks, summary


def load_codebooks(source: str) -> Codebooks:
    """Codebooks from a directory, the name of shipped ones (`shipped_codebooks`), or a hub id.

    Raises:
        UserError: there are none.
    """
    path = Path(source).expanduser()
    try:
        if not path.exists() and source in shipped_codebooks():
            with importlib.resources.as_file(shipped_codebooks()[source]) as directory:
                return Codebooks.from_pretrained(directory)
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
    configs: Sequence[PQConfig],
    tokens: int,
    context: int = 2048,
    **options: Any,
) -> list[Codebooks]:
    """Codebooks from the start of ``text``, one a configuration, with the text's name and SHA-256 in their provenance.

    Args:
        source: what to call the text.
        configs: with the same window and sinks.
        tokens: how many to use, in whole contexts: the rest of the division is left out.
        context: tokens of one forward.
        options: for `calibrate_all`: ``seed``, ``sensitivity_tokens``, ``allocate``, ``finetune_steps``, ``resume_dir``.

    Raises:
        UserError: the text holds fewer tokens.
        ValueError: too few tokens for the number of centroids.
    """
    context = min(context, tokens)
    ids = contexts(tokenizer, text, context, tokens // context, source)
    found = calibrate_all(model, ids, configs, context=context, **options)
    for books in found:
        books.provenance |= {"text": source, "text_sha256": _sha256(text)}
    return found


def held_out_kl(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    codebooks: Sequence[Codebooks],
    text: str,
    used: int,
    tokens: int | None = None,
) -> list[float]:
    """What to expect: KL to the dense cache through the decode path, nats, on a piece of a text that was not calibrated on.

    Args:
        codebooks: with the same window and sinks; each keeps its figure in ``provenance["held_out"]``.
        used: tokens of the text that calibration has seen, from its start.
        tokens: of the piece; default 512, or 256 more than the exact ones if that is more.

    Returns:
        A figure for each of ``codebooks``; none if the text ends before.
    """
    window = codebooks[0].config.recent_tokens + codebooks[0].config.sink_tokens
    tokens = tokens or max(512, window + 256)
    rows = 1 + -(-used // (tokens - 1))  # contexts so long, of which the last begins behind what was used
    try:
        piece = contexts(tokenizer, text, tokens, rows, "the text")[-1:]
    except UserError:
        return []
    with progress_bar("Measuring on unseen text", len(codebooks) * tokens, "tokens") as advance:
        found = [evaluate(model, books, piece, progress=advance)["kl"] for books in codebooks]
    for books, kl in zip(codebooks, found):
        books.provenance["held_out"] = {"kl": kl, "tokens": tokens}
    return found


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
            **cache_argument(model, cache),
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
    with progress_bar("Evaluating", parts.numel(), "tokens") as advance:
        result = evaluate(model, codebooks, parts, progress=advance, **options)
    return {
        **result,
        "text": source,
        "text_sha256": _sha256(text),
        "calibration": codebooks.provenance,
        "versions": versions(),
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


# ----------------------------------------------------------------------------------------------------- long-context tasks


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    codebooks: dict[str, Codebooks],
    text: tuple[str, str],
    out: Path,
    *,
    tasks: Sequence[str] = tuple(TASKS),
    lengths: Sequence[int] = (512, 1024, 2048),
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    samples: int = 2,
    seed: int = 0,
    recent_tokens: int | None = None,
    sink_tokens: int | None = None,
) -> dict[str, Any]:
    """`run_tasks` on fresh examples, with a progress bar; writes ``out`` with the suffixes json and md.

    Args:
        name: of the model.
        codebooks: by name.
        text: name and content of what the facts are hidden in.
        tasks, lengths, depths, samples, seed: see `make_examples`; each task at each length.

    Returns:
        What the JSON file holds: the settings, ``summary`` by task and length, ``all_lengths`` by task, ``needle`` by length and
        depth, and ``rows``.

    Raises:
        UserError: an unknown task, or impossible lengths, depths or windows.
    """
    try:
        examples = [
            example
            for task in tasks
            for length in lengths
            for example in make_examples(tokenizer, text[1], task, length, depths=depths, samples=samples, seed=seed)
        ]
        with progress_bar("Answering", len(examples), "examples") as advance:
            rows = run_tasks(
                model, examples, codebooks, recent_tokens=recent_tokens, sink_tokens=sink_tokens, progress=lambda: advance(1)
            )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from error
    tables = {
        "summary": summary(rows),
        "all_lengths": summary(rows, ("task",)),
        "needle": summary([r for r in rows if r["task"] == "needle"], ("length", "depth")),
    }
    for row in rows:
        row["answer"], row["said"] = (tokenizer.decode(row.pop(key)) for key in ("answer", "tokens"))
    result = {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "text": text[0],
        "text_sha256": _sha256(text[1]),
        "seed": seed,
        "samples": samples,
        "codebooks": described(codebooks, recent_tokens, sink_tokens),
        "versions": versions(),
        **tables,
        "rows": rows,
    }
    write_results(out, result, tasks_markdown(result))
    return result


def tasks_table(result: dict[str, Any]) -> Table:
    """The result of `evaluate_tasks` for a terminal: one row a task, length and cache."""
    table = Table(title=f"Answered through the decode path, {result['model']}", box=SIMPLE, padding=(0, 1, 0, 0))
    for column in _TASK_COLUMNS:
        name = column in ("task", "cache")
        table.add_column(column, justify="left" if name else "right", no_wrap=name)
    for cells in _task_cells(result["summary"] + result["all_lengths"]):
        table.add_row(*cells)
    return table


_TASK_COLUMNS = ("task", "tokens", "cache", "n", "accuracy", "log p", "change", "flips", "same")


def _task_cells(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            r["task"], str(r.get("length", "all")), r["cache"], str(r["questions"]), f"{r['accuracy']:.3f}", f"{r['logprob']:.3f}",
            *(("", "", "") if r["cache"] == "dense" else (f"{r['logprob_change']:+.3f}", str(r["flips"]), f"{r['same']:.3f}")),
        )
        for r in rows
    ]  # fmt: skip


def tasks_markdown(result: dict[str, Any]) -> str:
    """The tables of `evaluate_tasks`' result, with what their columns mean."""
    caches = ["dense", *result["codebooks"]]
    lines = [
        f"# Long-context tasks: {result['model']}",
        "",
        f"Facts hidden in `{Path(result['text']).name}`, {result['dtype']}, seed {result['seed']}. A haystack of so many tokens is "
        "prefilled into the cache; n questions and their answers go through the decode path, and the facts lie before the exact window. "
        "Accuracy: share of questions whose answer greedy decoding gives to the last token. log p: mean log-probability of the "
        "whole right answer, nats; change: to the dense cache. Flips: questions that only one of both answers rightly; same: "
        "share of questions in which both find the same tokens most likely throughout. Tasks: `million_cache/tasks.py`.",
        "",
        f"| {' | '.join(_TASK_COLUMNS)} |",
        "| " + " | ".join("---" for _ in _TASK_COLUMNS) + " |",
        *(f"| {' | '.join(cells)} |" for cells in _task_cells(result["summary"] + result["all_lengths"])),
    ]  # fmt: skip
    if result["needle"]:
        found = {(r["length"], r["depth"], r["cache"]): r for r in result["needle"]}
        depths = sorted({r["depth"] for r in result["needle"]})
        lines += [
            "",
            "Needle by depth (0: start of the haystack, 1: just before the window), accuracy and log p:",
            "",
            f"| tokens | cache | {' | '.join(f'{d:g}' for d in depths)} |",
            "| --- | --- |" + " --- |" * len(depths),
        ]
        for length in dict.fromkeys(r["length"] for r in result["needle"]):
            for cache in caches:
                cells = [found[length, d, cache] for d in depths]
                shown = " | ".join(f"{c['accuracy']:.2f} ({c['logprob']:.2f})" for c in cells)
                lines.append(f"| {length} | {cache} | {shown} |")
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def progress_bar(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A bar on standard error; gives what advances it."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,}/{task.total:,} " + unit), TimeElapsedColumn(),
        TimeRemainingColumn(), console=Console(stderr=True), transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)


def versions() -> dict[str, str]:
    """Of everything that figures may depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "million": package_version(),
    }


def megabytes(count: int) -> str:
    """Bytes in units of 10^6."""
    return f"{count / 1e6:.2f} MB"


def described(codebooks: dict[str, Codebooks], recent_tokens: int | None, sink_tokens: int | None) -> dict[str, Any]:
    """What results say of codebooks, by name: the configuration they ran with, and their provenance."""
    return {
        title: {"config": with_window(x.config, recent_tokens, sink_tokens).to_dict(), "calibration": x.provenance}
        for title, x in codebooks.items()
    }


def write_results(out: Path, result: dict[str, Any], markdown: str) -> None:
    """``out`` with the suffixes json and md, each whole or not at all."""
    for suffix, content in (("json", json.dumps(result, indent=1) + os.linesep), ("md", markdown)):
        with atomic_path(out.with_name(f"{out.name}.{suffix}")) as partial:
            partial.write_text(content, encoding="utf-8")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
