"""The program ``million``: thin commands over the package. Heavy imports wait until a command needs them."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

app = typer.Typer(
    name="million",
    help="Product-quantised KV cache: calibrate codebooks, generate from codes, measure what they cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()
err = Console(stderr=True)
settings = {"debug": False}
MOST_POOR = 5  # heads that `calibrate` warns of, a preset


class Preset(str, Enum):
    """Names of `million_cache.PRESETS`, repeated here so that ``--help`` need not load PyTorch."""

    BIT4 = "4bit"
    BIT3 = "3bit"
    BIT2 = "2bit"
    BIT1 = "1bit"


class Dtype(str, Enum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


Model = Annotated[
    str, typer.Option(help="Hub id, local directory, GGUF file, `smollm2` (the demo's model), or `gemma3-270m`.")
]
Books = Annotated[
    str, typer.Option(help="Directory that `million calibrate` wrote, hub id, or `smollm2-4bit` or `-2bit` (shipped).")
]
Recent = Annotated[int | None, typer.Option(min=0, help="Last tokens that stay exact. Default: the codebooks' own.")]
Sinks = Annotated[int | None, typer.Option(min=0, help="First tokens that stay exact. Default: the codebooks' own.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
ModelDtype = Annotated[Dtype | None, typer.Option(help="Default: float32 on a CPU, bfloat16 elsewhere.")]


@app.callback()
def main(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    settings["debug"] = debug


@contextlib.contextmanager
def mistakes() -> Iterator[None]:
    """Turn what a user can mend into one paragraph on stderr and exit status 1."""
    from million_cache.loading import UserError

    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: err.print(
                Text.assemble(("warning: ", "yellow"), str(message)), soft_wrap=True
            )
            yield
    except (UserError, ValueError, NotImplementedError, OSError) as error:
        if settings["debug"]:
            raise
        err.print(Text.assemble(("error: ", "bold red"), " ".join(str(error).split())), soft_wrap=True)
        raise typer.Exit(1) from error


def _load(model: str, device: str, dtype: Dtype | None) -> tuple[Any, Any]:
    import torch

    from million_cache.loading import load_model

    with err.status(f"Loading {model} (a GGUF file takes about 20 s)"):
        return load_model(model, device, getattr(torch, dtype.value) if dtype else None)


@app.command()
def demo(
    preset: Annotated[Preset, typer.Option(help="Bits of a cached element.")] = Preset.BIT4,
    max_new_tokens: Annotated[int, typer.Option(min=2, max=4096, help="Tokens to generate.")] = 64,
    prompt: Annotated[
        str | None, typer.Option(help="What to ask the model. Default: a page of text and a task.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Calibrate on this text.")] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Calibrate on the text in the package, instead of taking its codebooks.")
    ] = False,
) -> None:
    """SmolLM2-135M with a dense and with a quantised cache, side by side: texts, bytes, quality, speed."""
    with mistakes():
        from million_cache.demo import run_demo

        run_demo(console, preset.value, max_new_tokens, prompt, text, calibrate)


@app.command()
def calibrate(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory to write the codebooks to; a checkpoint's own will do.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="UTF-8 file, or `dataset:NAME` or `dataset:NAME,CONFIG` of the hub (again for more, in turns). Default: the text in the "
            "package."
        ),
    ] = None,
    preset: Annotated[
        list[Preset],
        typer.Option(help="Bits of a cached element (again for more: directories OUT-4bit, OUT-2bit ...)."),
    ] = (Preset.BIT4,),
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text to use, in whole contexts.")] = 8192,
    context: Annotated[int, typer.Option(min=16, help="Tokens of one forward.")] = 2048,
    seed: Annotated[int, typer.Option(min=0, help="Of the k-means start and the random positions.")] = 0,
    sensitivity_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens that also run backwards, for better codebooks; 0: none, faster.")
    ] = 8192,
    allocate: Annotated[
        bool,
        typer.Option(
            "--allocate",
            help="Layers, keys and values get bits of their own, by what the predictions lose, within the preset's bytes (3bit and 2bit).",
        ),
    ] = False,
    finetune_steps: Annotated[
        int,
        typer.Option(
            min=0,
            help="Steps of gradient descent on the centroids, for better ones: for a GPU, on a CPU each takes minutes.",
        ),
    ] = 0,
    held_out: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Tokens behind those used to measure the KL on, more than stay exact; 0: none. Default: 512 or more.",
        ),
    ] = None,
    recent: Annotated[
        int | None, typer.Option(min=0, help="Last tokens that stay exact, stored as the default.")
    ] = None,
    sinks: Annotated[
        int | None, typer.Option(min=0, help="First tokens that stay exact, stored as the default.")
    ] = None,
    compact: Annotated[
        bool, typer.Option("--compact", help="Store in less than half the space, at up to 1 % more distortion.")
    ] = False,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Forget what an interrupted run left in OUT/unfinished, instead of going on."),
    ] = False,
    device: Device = "cpu",
    dtype: ModelDtype = None,
) -> None:
    """Train codebooks for a model on a text and write them to a directory; several presets share the work.

    After an interruption the same command goes on: what is finished is kept in OUT/unfinished until the codebooks are written.
    """
    with mistakes():
        from million_cache.calibration.checkpoint import delete_checkpoint, is_checkpoint
        from million_cache.codebook import Codebooks
        from million_cache.config import PQConfig
        from million_cache.evaluate import with_window
        from million_cache.loading import origin, read_texts
        from million_cache.programs import calibrate_text, held_out_kl
        from million_cache.report import poor_heads

        out = out.expanduser()
        if len(preset) > 1 and out.name in ("", ".."):
            raise ValueError(f"a directory for each preset cannot be named after {out}: give a name")
        outs = [out] if len(preset) == 1 else [out.with_name(f"{out.name}-{p.value}") for p in preset]
        for directory in outs:
            if directory.is_file():
                raise ValueError(f"{directory} is a file; give a directory to write to")
            if directory.is_dir():
                _check_permission(directory)
        most = 16 * tokens  # characters: few tokenizers make longer tokens
        source, body = read_texts(text, most) if text else _text(None, "calibration")
        configs = [with_window(PQConfig.preset(p.value), recent, sinks) for p in preset]
        if held_out and held_out <= (exact := configs[0].recent_tokens + configs[0].sink_tokens):
            raise ValueError(f"--held-out {held_out} tokens would all stay exact: give more than {exact}, or 0")
        unfinished = outs[0] / "unfinished"
        if restart:
            delete_checkpoint(unfinished)
        elif is_checkpoint(unfinished):
            err.print(f"Going on with the calibration in {unfinished}.", soft_wrap=True)
        loaded, tokenizer = _load(model, device, dtype)
        try:
            found = calibrate_text(
                loaded,
                tokenizer,
                body,
                source,
                configs,
                tokens,
                context,
                seed=seed,
                sensitivity_tokens=sensitivity_tokens,
                allocate=allocate,
                finetune_steps=finetune_steps,
                resume_dir=unfinished,
            )
        except KeyboardInterrupt:
            err.print(f"Interrupted. The same command goes on from {unfinished}.", soft_wrap=True)
            raise
        for codebooks, directory in zip(found, outs):
            codebooks.provenance |= {"model": model, **origin(model)}
            codebooks.save_pretrained(directory, compact=compact)
            size, bits = codebooks.nbytes / 1e6, codebooks.config.bits_per_element
            err.print(f"Wrote {directory} ({size:.1f} MB of codebooks, {bits:.4g} bit).")
            for layer, kind, head, ratio, times in poor_heads(codebooks)[:MOST_POOR]:
                said = f"layer {layer}, {kind} of KV head {head}: distortion is {ratio:.3f} of the energy, {times:.1f} times the upper quartile of the heads"
                err.print(Text.assemble(("warning: ", "yellow"), said), soft_wrap=True)
        delete_checkpoint(unfinished)
        if held_out == 0:
            return
        written = [Codebooks.from_pretrained(directory) for directory in outs]  # as they will be used
        kl = held_out_kl(loaded, tokenizer, written, body, tokens, held_out)
        for codebooks, value, directory in zip(written, kl, outs):
            codebooks.save_pretrained(directory)
            unseen, bits = codebooks.provenance["held_out"]["tokens"], codebooks.config.bits_per_element
            err.print(f"KL to the dense cache on {unseen} tokens not trained on: {value:.5f} ({bits:.4g} bit).")
        if not kl:
            err.print("The text has no tokens left to measure on.")


@app.command()
def generate(
    model: Model,
    codebooks: Books,
    prompt: Annotated[str, typer.Option(help="What to ask; `-` reads it from standard input.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 128,
    recent: Recent = None,
    sinks: Sinks = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the model's chat template.")
    ] = False,
    device: Device = "cpu",
    dtype: ModelDtype = None,
) -> None:
    """Generate greedily with a quantised cache; the text goes to standard output as it comes."""
    with mistakes():
        from million_cache.programs import generate_text, load_codebooks

        books = load_codebooks(codebooks)
        if prompt == "-":
            prompt = typer.get_text_stream("stdin").read()
        loaded, tokenizer = _load(model, device, dtype)
        run = generate_text(
            loaded,
            tokenizer,
            books,
            prompt,
            max_new_tokens,
            recent_tokens=recent,
            sink_tokens=sinks,
            chat=not raw,
            stream=True,
        )
        err.print(
            f"{run.prompt_tokens} + {len(run.tokens)} tokens, {run.tokens_per_second:.1f} tokens/s, cache {run.cache_bytes / 1e6:.2f} MB"
        )


@app.command()
def evaluate(
    model: Model,
    codebooks: Books,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text, disjoint from the calibration's. Default: the one in the package.")
    ] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a context.")] = 2048,
    chunks: Annotated[int, typer.Option(min=1, help="Contexts to score.")] = 4,
    recent: Recent = None,
    sinks: Sinks = None,
    position_offset: Annotated[int, typer.Option(min=0, help="Position of each context's first token.")] = 0,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the result here too.")] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Store the result with the codebooks (a directory), for their model card.")
    ] = False,
    device: Device = "cpu",
    dtype: ModelDtype = None,
) -> None:
    """KL, top-1 agreement and perplexity against the dense cache, every position scored through the decode path."""
    with mistakes():
        from million_cache.card import EVALUATION_KEYS
        from million_cache.loading import atomic_path
        from million_cache.programs import evaluate_text, load_codebooks, result_table

        if json_out:
            _check_writable(json_out, is_file=True)
        if record and not Path(codebooks).expanduser().is_dir():
            raise ValueError(f"cannot record the result with the codebooks: {codebooks} is not a directory")
        if record:
            _check_permission(Path(codebooks).expanduser())
        books = load_codebooks(codebooks)
        source, body = _text(text, "evaluation")
        loaded, tokenizer = _load(model, device, dtype)
        result = evaluate_text(
            loaded,
            tokenizer,
            books,
            body,
            source,
            context,
            chunks,
            recent_tokens=recent,
            sink_tokens=sinks,
            position_offset=position_offset,
        )
        result = {**result, "model": model, "codebooks": codebooks}
        console.print(result_table(result))
        if json_out:
            with atomic_path(json_out) as partial:
                partial.write_text(json.dumps(result, indent=2) + os.linesep, encoding="utf-8")
        if record:
            books.provenance["evaluation"] = {key: result[key] for key in EVALUATION_KEYS}
            books.save_pretrained(Path(codebooks).expanduser())


@app.command()
def tasks(
    model: Model,
    codebooks: Annotated[list[str], typer.Option(help="As for `million evaluate` (again for more).")],
    out: Annotated[Path, typer.Option(help="Write OUT.json and OUT.md.")],
    task: Annotated[
        list[str] | None, typer.Option(help="needle, multikey, lookup, variables (again for more). Default: all.")
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(min=256, help="Tokens of haystack (again for more). Default: 512, 1024, 2048.")
    ] = None,
    depth: Annotated[
        list[float] | None,
        typer.Option(
            min=0, max=1, help="Of the needle, 0 is the start (again for more). Default: 0, 0.25, 0.5, 0.75, 1."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Haystacks a task and length, and depth for `needle`.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of the haystacks and what is hidden in them.")] = 0,
    text: Annotated[Path | None, typer.Option(help="What to hide things in. Default: the text in the package.")] = None,
    recent: Recent = None,
    sinks: Sinks = None,
    device: Device = "cpu",
    dtype: ModelDtype = None,
) -> None:
    """Long-context tasks: needles in a haystack, key-value lookup, variable tracking, beside the dense cache."""
    with mistakes():
        from million_cache.programs import evaluate_tasks, tasks_table

        _check_writable(out)
        books = _named_codebooks(codebooks)
        loaded, tokenizer = _load(model, device, dtype)
        given = {"tasks": task, "lengths": length, "depths": depth}
        result = evaluate_tasks(
            loaded,
            tokenizer,
            model,
            books,
            _text(text, "evaluation"),
            out,
            samples=samples,
            seed=seed,
            recent_tokens=recent,
            sink_tokens=sinks,
            **{name: value for name, value in given.items() if value},
        )
        console.print(tasks_table(result))
        err.print(f"Wrote {out}.json and .md.")


@app.command()
def harness(
    model: Model,
    codebooks: Annotated[list[str], typer.Option(help="As for `million evaluate` (again for more).")],
    task: Annotated[list[str], typer.Option(help="Of lm-evaluation-harness: hellaswag, gsm8k ... (again for more).")],
    out: Annotated[Path, typer.Option(help="Write OUT.json and OUT.md.")],
    few_shot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question. Default: the task's own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of a task. Default: all.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 1,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Most tokens of a request. Default: the model's own.")
    ] = None,
    include: Annotated[Path | None, typer.Option(help="Directory with tasks of your own (YAML).")] = None,
    recent: Recent = None,
    sinks: Sinks = None,
    device: Device = "cpu",
    dtype: ModelDtype = None,
) -> None:
    """Tasks of lm-evaluation-harness through the decode path, beside the dense cache (needs `pip install "million[harness]"`)."""
    with mistakes():
        _check_writable(out)
        try:
            from million_cache.harness import run_harness
        except ModuleNotFoundError as error:
            raise ValueError(
                f'`million harness` needs lm-evaluation-harness ({error}): pip install "million[harness]"'
            ) from error

        books = _named_codebooks(codebooks)
        loaded, tokenizer = _load(model, device, dtype)
        result = run_harness(
            loaded, tokenizer, model, books, task, out, few_shot=few_shot, limit=limit, batch_size=batch_size, max_length=max_length,
            include=include, recent_tokens=recent, sink_tokens=sinks,
        )  # fmt: skip
        for row in result["rows"]:
            console.print(f"{row['task']} {row['metric']} {row['cache']}: {row['value']:.4f}", soft_wrap=True)
        err.print(f"Wrote {out}.json and .md.")


@app.command()
def compare(
    model: Model,
    out: Annotated[Path, typer.Option(help="Write OUT.json, OUT.md and OUT.png; other rows of an equal run stay.")],
    peer: Annotated[
        list[str] | None, typer.Option(help="A peer (again for more), `none` for none. Default: every one.")
    ] = None,
    window: Annotated[
        list[str] | None,
        typer.Option(
            help="`equal`: 4 first and 128 last tokens exact, as ours; `own`: as the peer's paper. Default: both."
        ),
    ] = None,
    codebooks: Annotated[
        list[str] | None,
        typer.Option(help="Ours to score (again for more), `none` for none. Default: calibrate every preset."),
    ] = None,
    calibration: Annotated[Path | None, typer.Option(help="UTF-8 text. Default: the text in the package.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text to score. Default: the one in the package.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of calibration, in whole contexts.")] = 8192,
    context: Annotated[int, typer.Option(min=16, help="Tokens of a context.")] = 2048,
    chunks: Annotated[int, typer.Option(min=1, help="Contexts to score.")] = 4,
    device: Device = "cpu",
    dtype: ModelDtype = None,
) -> None:
    """Other systems' quantised caches (fake quantisers, from their papers) and ours, on one text, in one table."""
    with mistakes():
        from million_cache.peers import PEERS
        from million_cache.peers.compare import WINDOWS
        from million_cache.peers.compare import compare as run_comparison

        _check_writable(out)
        books = _named_codebooks([] if codebooks == ["none"] else codebooks or ()).items()
        loaded, tokenizer = _load(model, device, dtype)
        run_comparison(
            loaded,
            tokenizer,
            model,
            _text(calibration, "calibration"),
            _text(text, "evaluation"),
            out,
            peers=[] if peer == ["none"] else peer or list(PEERS),
            windows=window or WINDOWS,
            codebooks=books if codebooks else None,
            tokens=tokens,
            context=context,
            chunks=chunks,
        )
        err.print(f"Wrote {out}.json, .md and .png.")


@app.command()
def push(
    codebooks: Annotated[Path, typer.Argument(help="Directory that `million calibrate` wrote.")],
    repo_id: Annotated[str, typer.Argument(help="`name` or `organisation/name` on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="If the repository is new.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
) -> None:
    """Upload codebooks and their model card to the Hugging Face hub, with the token of `hf auth login`."""
    with mistakes():
        from million_cache.programs import load_codebooks

        commit = load_codebooks(str(codebooks)).push_to_hub(repo_id, private=private or None, commit_message=message)
        console.print(commit.commit_url, soft_wrap=True)


@app.command()
def inspect(
    codebooks: Annotated[
        str, typer.Argument(help="Directory that `million calibrate` wrote, hub id, or shipped ones.")
    ],
    plot: Annotated[Path | None, typer.Option(help="Draw heat maps to this file (png, pdf, svg).")] = None,
    layer: Annotated[int | None, typer.Option(min=0, help="Show one layer subspace by subspace.")] = None,
) -> None:
    """Energy and distortion per layer, head and subspace, as a table and a picture."""
    with mistakes():
        from million_cache import report
        from million_cache.programs import load_codebooks

        books = load_codebooks(codebooks)
        console.print(report.layer_table(books) if layer is None else report.subspace_table(books, layer))
        if plot:
            report.plot(books, plot)
            err.print(f"Wrote {plot}.")


def _check_writable(out: Path, is_file: bool = False) -> None:
    """Before any work: ``out`` is a file, or what the names of files begin with. Raises ValueError if it is no name, is a directory in
    place of the file, or has no directory that can be written to."""
    if out.name in ("", "..") or (is_file and out.is_dir()):
        raise ValueError(f"cannot write {out}: it is a directory")
    if not out.parent.is_dir():
        raise ValueError(f"cannot write {out}: there is no directory {out.parent}")
    _check_permission(out.parent)


def _check_permission(directory: Path) -> None:
    """Before any work. Raises ValueError if nothing can be written into a directory."""
    if not os.access(directory, os.W_OK):
        raise ValueError(f"no permission to write to {directory}")


def _named_codebooks(sources: Iterable[str]) -> dict[str, Any]:
    """Codebooks by the last part of their source, without its `codebooks-`. Raises ValueError if two have the same, or "dense"."""
    from million_cache.programs import load_codebooks

    named: dict[str, Any] = {}
    for source in sources:
        name = Path(source).name.removeprefix("codebooks-")
        if name in named or name == "dense":
            raise ValueError(f"{source}: the results have a row called {name!r} already; rename the directory")
        named[name] = load_codebooks(source)
    return named


def _text(path: Path | None, shipped: str) -> tuple[str, str]:
    """Name and content of a text file, or of the shipped text."""
    from million_cache.loading import read_text, shipped_text

    return (str(path), read_text(path)) if path else (f"the shipped {shipped} text", shipped_text(shipped))
