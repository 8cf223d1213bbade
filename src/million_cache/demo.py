"""``million demo``: SmolLM2-135M with a dense and with a quantised cache, side by side, in half a minute on two cores."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import million_ops
from million_cache.codebook import Codebooks
from million_cache.config import PQConfig, package_version
from million_cache.loading import SMOLLM2, cache_dir, fetch, load_model, read_text, shipped_codebooks, shipped_text
from million_cache.models import fingerprint
from million_cache.programs import Generation, calibrate_text, evaluate_text, generate_text, load_codebooks, megabytes

CALIBRATION_TOKENS = 8192
SENSITIVITY_TOKENS = 2048  # a backward pass of each takes longer than all the rest; these few bring most of the gain
EVALUATION_CONTEXT, EVALUATION_CONTEXTS = 1024, 2
PAGE = 2  # part of the shipped evaluation text that the default prompt shows: a tutorial of argparse
PAGE_CHARACTERS = 3300  # about a thousand tokens: beyond the exact window, so that the answer comes from codes
QUESTION = "Write a short Python program that uses argparse with an option --verbose."


def default_prompt() -> str:
    """A page of the shipped evaluation text, and a task about it."""
    page = shipped_text("evaluation").split("\n=====\n")[PAGE][:PAGE_CHARACTERS]
    return f"{page}\n\n{QUESTION}"


@contextlib.contextmanager
def stage(console: Console, title: str) -> Iterator[None]:
    """Announce a step, then say how long it took."""
    console.print(f"[bold]{title}[/] ...", highlight=False)
    started = time.perf_counter()
    yield
    console.print(f"    done in {time.perf_counter() - started:.1f} s", highlight=False)


def demo_codebooks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, preset: str, text: Path | None, calibrate: bool
) -> tuple[Codebooks, str]:
    """Codebooks for the demo, and where they come from.

    The package's own if it has some of this preset and neither ``text`` nor ``calibrate`` asks for others; else calibrated ones,
    which are kept in the user's cache by model, config and text.
    """
    name = f"{SMOLLM2.name}-{preset}"
    if text is None and not calibrate and name in shipped_codebooks():
        return load_codebooks(name), "they come with the package"
    source, body = (
        (str(text), read_text(text)) if text else ("the shipped calibration text", shipped_text("calibration"))
    )
    config = PQConfig.preset(preset)
    key = json.dumps(
        [
            package_version(),
            fingerprint(model).to_dict(),
            config.to_dict(),
            body,
            CALIBRATION_TOKENS,
            SENSITIVITY_TOKENS,
        ],
        sort_keys=True,
    )
    directory = cache_dir() / "demo" / hashlib.sha256(key.encode()).hexdigest()[:16]
    with contextlib.suppress(OSError, ValueError):  # absent, or left by another version: calibrate anew
        return Codebooks.from_pretrained(directory), "they were calibrated in an earlier run"
    (books,) = calibrate_text(
        model, tokenizer, body, source, [config], CALIBRATION_TOKENS, sensitivity_tokens=SENSITIVITY_TOKENS
    )
    books.save_pretrained(directory)
    return books, f"calibrated on {CALIBRATION_TOKENS} tokens"


def run_demo(
    console: Console,
    preset: str = "4bit",
    max_new_tokens: int = 64,
    prompt: str | None = None,
    text: Path | None = None,
    calibrate: bool = False,
) -> dict:
    """Load, generate twice, evaluate, and print what came out.

    Args:
        console: where to print.
        preset: one of `million_cache.PRESETS`.
        max_new_tokens: tokens to generate with either cache.
        prompt: what to ask; default: a page of text with a task.
        text: calibrate on it.
        calibrate: calibrate on the shipped text, even where the package has codebooks (`shipped_codebooks`).

    Returns:
        ``dense`` and ``million`` (`Generation`), ``evaluation`` (as `evaluate` returns it), ``equal_tokens``.

    Raises:
        UserError: the model cannot be fetched, or the text cannot be read or is too short.
    """
    started = time.perf_counter()
    kernels = "compiled kernels" if million_ops.has_kernels("cpu") else "PyTorch reference, slow: no compiled kernels"
    console.print(f"MILLION {preset} on the CPU ({kernels})", highlight=False)
    fetch(SMOLLM2)
    with stage(console, "1/4 Loading SmolLM2-135M-Instruct (about 20 s)"):
        model, tokenizer = load_model(SMOLLM2.name)
    with stage(console, f"2/4 Codebooks for {preset} (up to two minutes if they have to be calibrated, once)"):
        books, whence = demo_codebooks(model, tokenizer, preset, text, calibrate)
        console.print(f"    {whence}", highlight=False)
    with stage(console, f"3/4 Generating {max_new_tokens} tokens with either cache (about 10 s)"):
        prompt = prompt or default_prompt()
        dense = generate_text(model, tokenizer, None, prompt, max_new_tokens)
        million = generate_text(model, tokenizer, books, prompt, max_new_tokens)
    tokens = EVALUATION_CONTEXT * EVALUATION_CONTEXTS
    with stage(console, f"4/4 Scoring {tokens} tokens of held-out text through the decode path (about 15 s)"):
        result = evaluate_text(
            model,
            tokenizer,
            books,
            shipped_text("evaluation"),
            "the shipped evaluation text",
            EVALUATION_CONTEXT,
            EVALUATION_CONTEXTS,
        )
    equal = next((i for i, (a, b) in enumerate(zip(dense.tokens, million.tokens)) if a != b), None)
    equal = min(len(dense.tokens), len(million.tokens)) if equal is None else equal
    console.print(texts_table(dense, million, preset))
    console.print(figures_table(dense, million, books, result))
    console.print(
        f"The first {equal} of {len(dense.tokens)} tokens are equal. "
        f"Everything took {time.perf_counter() - started:.0f} s.",
        highlight=False,
    )
    return {"dense": dense, "million": million, "evaluation": result, "equal_tokens": equal}


def texts_table(dense: Generation, million: Generation, preset: str) -> Table:
    """Both texts, side by side."""
    table = Table(title=f"{dense.prompt_tokens} tokens of prompt, greedy", show_lines=True, expand=True)
    table.add_column("dense cache", ratio=1)
    table.add_column(f"million {preset}", ratio=1)
    table.add_row(dense.text.strip(), million.text.strip())
    return table


def figures_table(dense: Generation, million: Generation, books: Codebooks, result: dict) -> Table:
    """Bytes, bits, speed and quality of both caches."""
    table = Table()
    for column in ("", "dense", "million", "million / dense"):
        table.add_column(column, justify="left" if column == "" else "right")

    def compare(name: str, a: float, b: float, shown) -> None:
        table.add_row(name, shown(a), shown(b), f"{b / a:.3f}" if a else "")

    length = dense.prompt_tokens + len(dense.tokens)
    compare(f"cache, {length} tokens, float32 model", dense.cache_bytes, million.cache_bytes, megabytes)
    compare("the same, 16-bit model", dense.cache_bytes_16bit, million.cache_bytes_16bit, megabytes)
    table.add_row("codebooks (once a model)", "", megabytes(books.nbytes), "")
    table.add_row("bits an element, codes", "", f"{books.config.bits_per_element:.2f}", "")
    table.add_row("bits an element, with window", "32", f"{million.bits_per_element_total:.2f}", "")
    compare("decode, tokens/s", dense.tokens_per_second, million.tokens_per_second, lambda x: f"{x:.1f}")
    table.add_section()
    table.add_row("KL to dense, held-out text", "", f"{result['kl']:.5f}", "")
    table.add_row("top-1 agreement, held-out text", "", f"{result['top1']:.4f}", "")
    compare("perplexity, held-out text", result["perplexity_dense"], result["perplexity"], lambda x: f"{x:.3f}")
    return table
