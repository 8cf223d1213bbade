"""Codebooks from a model and a few thousand tokens of text."""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from datetime import datetime, timezone
from functools import partial
from typing import Any

import torch
import transformers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import PreTrainedModel

from million_cache.calibration.allocation import allocate as choose
from million_cache.calibration.allocation import measure_costs, served_pairs
from million_cache.calibration.checkpoint import GENERATOR, Checkpoint
from million_cache.calibration.collect import LayerSample, collect
from million_cache.calibration.finetune import finetune, useful_sequences
from million_cache.calibration.sensitivity import measure_sensitivity
from million_cache.calibration.train import train_layer
from million_cache.codebook import Codebooks, LayerCodebooks, LayerReport
from million_cache.config import PQConfig, package_version
from million_cache.loading import origin
from million_cache.models import check_length, check_supported, fingerprint, measure_rotations, undisturbed
from million_ops.layout import CENTROIDS, SUBSPACE_DIMS

MIN_TOKENS = 4 * CENTROIDS  # below, most centroids would be single tokens
GOOD_TOKENS = 16 * CENTROIDS
# Of the text, in whole contexts, held out of k-means to judge the widths by. On what k-means has seen wide subspaces look too good:
# the KL of SmolLM2 at 2 bit, 0.0088 without allocation, is 0.0068 judged by that, and 0.0056 by three other contexts.
ALLOCATION_SHARE, ALLOCATION_TOKENS = 4, 8192
ALLOCATION_PASSES = 4  # at least, over fewer contexts again with other draws


def _sequences(tokens: Tensor, context: int, skip: int) -> list[Tensor]:
    """Rows of ``tokens`` cut into contexts, without pieces that leave nothing after the first ``skip`` tokens."""
    if tokens.ndim not in (1, 2) or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens must be integers [T] or [B, T], got {tokens.dtype} {list(tokens.shape)}")
    pieces = [piece for row in torch.atleast_2d(tokens).cpu().long() for piece in row.split(context)]
    return [piece for piece in pieces if len(piece) > skip]


def _spread(sequences: list[Tensor], tokens: int, window: int) -> list[int]:
    """Indices of sequences of about ``tokens`` in all, evenly spread over those that are longer than the window."""
    useful = [i for i, s in enumerate(sequences) if len(s) > window]
    if not useful or tokens <= 0:
        return []
    count = min(len(useful), max(1, -(-tokens // max(len(sequences[i]) for i in useful))))
    return [useful[i * len(useful) // count] for i in range(count)]


def _weights_hash(model: PreTrainedModel) -> str:
    """Of the first entries of every parameter: a `Fingerprint` is that of the model, this is that of one load of it."""
    found = hashlib.sha256()
    for name, p in model.named_parameters():
        plain = type(p.data) is Tensor and not p.is_meta
        found.update(name.encode() + f"{type(p.data).__name__} {p.dtype} {list(p.shape)}".encode())
        found.update(p.detach().flatten()[:64].float().cpu().numpy().tobytes() if plain else b"")
    return found.hexdigest()


def _config_hash(model: PreTrainedModel) -> str:
    """Of everything in the configuration that may change what the layers compute, RoPE's parameters among it."""
    others = "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"
    values = {key: x for key, x in model.config.to_dict().items() if key not in others}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def _settings(
    model: PreTrainedModel, sequences: list[Tensor], configs: Sequence[PQConfig], device: torch.device, **others: Any
) -> dict[str, Any]:
    """All that the codebooks depend on, for `Checkpoint`."""
    text = hashlib.sha256(repr([len(s) for s in sequences]).encode())
    text.update(torch.cat(sequences).to(torch.int32).numpy().tobytes())
    return {
        "model": model.config.name_or_path,
        "weights": _weights_hash(model),
        "model_config": _config_hash(model),
        "model_dtype": str(model.dtype),
        "model_device": model.device.type,
        "device": device.type,
        "text": text.hexdigest(),
        **{f.name: [getattr(c, f.name) for c in configs] for f in fields(PQConfig)},
        **others,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "million": package_version(),
    }


def _candidates(config: PQConfig) -> list[PQConfig]:
    """One for each of `SUBSPACE_DIMS`, from which a mix is made; the configuration alone where its bytes leave no choice."""
    if config.k_subspace_dim == config.v_subspace_dim in (min(SUBSPACE_DIMS), max(SUBSPACE_DIMS)):
        return [config]
    return [replace(config, k_subspace_dim=d, v_subspace_dim=d) for d in SUBSPACE_DIMS]


def _put_together(
    costs: dict[int, Tensor],
    config: PQConfig,
    books: list[dict[int, LayerCodebooks]],
    reports: list[dict[int, LayerReport]],
) -> tuple[PQConfig, dict[int, LayerCodebooks], dict[int, LayerReport]]:
    """The configuration with its bits allocated by ``costs``, and layers with the keys of one of its candidates and the values of another."""
    budget, head_dim = (config.k_subspace_dim, config.v_subspace_dim), next(iter(books[0].values())).head_dim
    found = choose(costs, served_pairs(head_dim, budget), budget)
    layers, report = {}, {}
    for i, (k, v) in sorted(found.items()):
        of_keys, of_values = SUBSPACE_DIMS.index(k), SUBSPACE_DIMS.index(v)
        layers[i] = replace(books[of_keys][i], v_codebook=books[of_values][i].v_codebook)
        values = reports[of_values][i]
        report[i] = replace(reports[of_keys][i], v_energy=values.v_energy, v_distortion=values.v_distortion)
    return replace(config, allocation=[found[i] for i in sorted(found)]), layers, report


def _loaded_or(
    train: Callable[[], tuple[LayerCodebooks, LayerReport]], saved: Checkpoint, name: str, generator: torch.Generator
) -> tuple[LayerCodebooks, LayerReport]:
    """A layer that was trained before, or that is trained and kept now."""
    if found := saved.load(name):
        tensors, scalars = found
        generator.set_state(tensors.pop(GENERATOR))
        report = LayerReport(**{f.name: tensors.pop(f.name) for f in fields(LayerReport)})
        return LayerCodebooks(**{"inv_freq": None, **tensors}, **scalars), report
    books, report = train()
    scalars = {"rope_interleaved": books.rope_interleaved, "frame_tokens": books.frame_tokens}
    saved.save(name, books.tensors | vars(report), generator, **scalars)
    return books, report


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the time that the block takes to ``seconds[phase]``: of this run, little where it goes on after an interruption."""
    begin = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - begin


@contextmanager
def _progress(show: bool) -> Iterator[Progress]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, disable=not show) as bar:
        yield bar


def calibrate(
    model: PreTrainedModel,
    tokens: Tensor,
    config: PQConfig,
    *,
    seed: int = 0,
    context: int = 2048,
    iterations: int = 8,
    sensitivity_tokens: int = 8192,
    allocate: bool = False,
    finetune_steps: int = 0,
    require_frames: bool = False,
    progress: bool = True,
    device: torch.device | str | None = None,
    resume_dir: str | os.PathLike | None = None,
) -> Codebooks:
    """Train a model's codebooks on text: a transform of the keys (`transform.py`) and k-means (`kmeans.py`) a layer and KV head.

    Keys are un-rotated with the measured rotation and rotated again by a random offset inside a frame; each layer and KV head
    gets a transform that balances energy over the subspaces, weighted by how much the predictions feel an error in each
    direction (`sensitivity.py`), and k-means centroids. A layer whose keys do not rotate has no frames; one whose rotation is not recognised neither, with a warning.

    Args:
        model: any causal model that `check_supported` accepts, in float32, bfloat16 or float16, also with quantised weights.
            `torch.autocast` around the call has no effect.
        tokens: token ids [T] or [B, T]; rows are cut into contexts. 8192 tokens of mixed text are good, more are a little better.
        config: bits, frames and window.
        seed: of everything random; the result is the same for the same seed on one machine.
        context: tokens of a forward.
        iterations: of k-means. 30 leave 1 to 2 % less distortion on text that was not trained on, in four times the time.
        sensitivity_tokens: how many of the tokens also run backwards through the model, in whole contexts spread over the text;
            0: none, with the queries' second moments as the weight instead, at lower quality. A backward pass takes two to
            four times as long as a forward and holds the activations of one context.
        allocate: give the keys and the values of each layer bits of their own, by what their errors cost the predictions, within the
            bytes that ``config`` takes (`allocation.py`); ``config.allocation`` of the result says which. A quarter of the text, at most
            8192 tokens in whole contexts, is held out to judge by. k-means takes three times as long, and four contexts run
            backwards once more, with seven times the attention.
        finetune_steps: of gradient descent on all centroids together, against the KL to the exact cache (`finetune.py`), each on
            four contexts; one context in eight is held out to judge by. The report's distortions are those before it.
        require_frames: raise instead of warn when a layer's rotation is not recognised.
        progress: show progress bars.
        device: where k-means runs; None: the model's.
        resume_dir: directory, made if it is not there, in which finished parts are kept: contexts read, layers, steps. The same
            call after an interruption goes on with them, to the result of one that was not interrupted. It takes as much disk
            as the sample of the activations takes memory (see `collect.py`; gradients as much again); delete it
            (`delete_checkpoint`) when the codebooks are saved. None: nothing is kept.

    Raises:
        TypeError: tokens that are no tensor, or a configuration that is no `PQConfig`.
        ValueError: a float64 model, too few tokens (says how many are needed; fine-tuning wants two contexts), ids outside the
            vocabulary, NaN or inf in the activations or the predictions, a centroid beyond fp16 (says layer and head), a context
            beyond the model's RoPE, frames required and not possible, or a ``resume_dir`` with other arguments' calibration (says
            which differ) or other files.
        NotImplementedError: a model that cannot be served, see `check_supported`.
    """
    (codebooks,) = calibrate_all(
        model, tokens, [config], seed=seed, context=context, iterations=iterations, sensitivity_tokens=sensitivity_tokens,
        allocate=allocate, finetune_steps=finetune_steps, require_frames=require_frames, progress=progress, device=device,
        resume_dir=resume_dir,
    )  # fmt: skip
    return codebooks


def calibrate_all(
    model: PreTrainedModel,
    tokens: Tensor,
    configs: Sequence[PQConfig],
    *,
    seed: int = 0,
    context: int = 2048,
    iterations: int = 8,
    sensitivity_tokens: int = 8192,
    allocate: bool = False,
    finetune_steps: int = 0,
    require_frames: bool = False,
    progress: bool = True,
    device: torch.device | str | None = None,
    resume_dir: str | os.PathLike | None = None,
) -> list[Codebooks]:
    """`calibrate` for several configurations with the same window and sinks; the text runs through the model once for all.

    Arguments and errors are those of `calibrate`; so is the result for each configuration.

    Raises:
        ValueError: no configuration, or windows or sinks that differ.
    """
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens must be a tensor of token ids, [T] or [B, T], got {type(tokens).__name__}")
    for c in configs:
        if not isinstance(c, PQConfig):
            raise TypeError(f"a configuration must be a PQConfig, such as PQConfig.preset('4bit'), got {c!r}")
    if model.dtype == torch.float64:
        raise ValueError("the model must be in float32, bfloat16 or float16, got float64")
    device = torch.device(model.device if device is None else device)
    torch.empty(0, device=device)  # raises where there is none
    if len({(c.recent_tokens, c.sink_tokens) for c in configs}) != 1:
        raise ValueError("configurations that are calibrated together need the same recent_tokens and sink_tokens")
    if any(c.allocation for c in configs):
        raise ValueError("calibration chooses the allocation itself (allocate=True), it cannot be given")
    config = configs[0]
    check_supported(model.config)
    check_length(model.config, context)
    if iterations < 1 or finetune_steps < 0 or context <= config.sink_tokens:
        raise ValueError(
            f"need iterations >= 1, finetune_steps >= 0 and context > {config.sink_tokens} sink tokens, got {iterations}, "
            f"{finetune_steps} and {context}"
        )
    with undisturbed():  # no gradient goes through what was made in inference mode, token ids among it
        text = sequences = _sequences(tokens.clone(), context, config.sink_tokens)
    window = config.recent_tokens + config.sink_tokens
    # Configurations to train for each that is asked for: itself, or those whose layers it is put together from.
    parts = [_candidates(c) if allocate else [c] for c in configs]
    judges: list[Tensor] = []
    if any(len(tried) > 1 for tried in parts):
        held = _spread(text, min(sum(map(len, text)) // ALLOCATION_SHARE, ALLOCATION_TOKENS), window)
        sequences = [s for i, s in enumerate(text) if i not in held]
        judges = [text[i] for i in held] * -(-ALLOCATION_PASSES // max(1, len(held)))
    rows = sum(len(s) - config.sink_tokens for s in sequences)
    if rows < MIN_TOKENS:
        contexts = -(-MIN_TOKENS // (context - config.sink_tokens))
        least, apart = MIN_TOKENS + contexts * config.sink_tokens, ""
        if judges:
            least = least * ALLOCATION_SHARE // (ALLOCATION_SHARE - 1) + context
            apart = ", nor what is held out to allocate bits"
        raise ValueError(
            f"{CENTROIDS} centroids need at least {MIN_TOKENS} tokens of text, the first {config.sink_tokens} of every sequence "
            f"not counted{apart}: got {rows}, give at least {least} in sequences of {context}"
        )
    if rows < GOOD_TOKENS:
        warnings.warn(f"codebooks trained on {rows} tokens are poor; give at least {GOOD_TOKENS}", stacklevel=3)
    vocabulary = model.get_input_embeddings().num_embeddings
    low, high = min(int(s.min()) for s in text), max(int(s.max()) for s in text)
    if low < 0 or high >= vocabulary:
        raise ValueError(f"token ids must be in [0, {vocabulary}), got {low} .. {high}")
    if finetune_steps:
        useful_sequences(text, config.recent_tokens, config.sink_tokens)

    rotations = measure_rotations(model)
    unknown = [i for i, r in rotations.items() if r.kind == "unknown"]
    if unknown and any(c.frame_tokens for c in configs):
        message = f"the rotation of the keys of layers {unknown} is not one that frames can undo"
        if require_frames:
            raise ValueError(f"{message}, and frames are required")
        warnings.warn(
            f"{message}; they are encoded without frames, at lower quality beyond {context} tokens", stacklevel=3
        )

    generator = torch.Generator().manual_seed(seed)
    chosen = _spread(sequences, sensitivity_tokens, window)
    if sensitivity_tokens and not chosen:
        warnings.warn(
            f"no context is longer than the {window} tokens that stay exact, so the gradients cannot be measured: the codebooks are worse for it",
            stacklevel=3,
        )
    for c, tried in zip(configs, parts):
        if allocate and len(tried) == 1:
            warnings.warn(
                f"allocate leaves no choice at {c.bits_per_element:g} bits: every layer has the same", stacklevel=3
            )
    if allocate and not chosen:
        raise ValueError(
            "bits are allocated by gradients: allocate needs sensitivity_tokens > 0 and several contexts beyond the window"
        )
    saved = Checkpoint()
    if resume_dir is not None:
        settings = _settings(
            model, text, configs, device, context=context, seed=seed, iterations=iterations,
            sensitivity_contexts=len(chosen), allocate=allocate, finetune_steps=finetune_steps,
        )  # fmt: skip
        saved = Checkpoint(resume_dir, settings)
    shared: dict[str, float] = {}
    with _progress(progress) as bar, undisturbed():
        samples: dict[int, LayerSample] = {}
        positions = torch.empty(0)
        names = [f"layer-{n}-{m}-{i}" for n, tried in enumerate(parts) for m in range(len(tried)) for i in rotations]
        if not all(saved.load(name) for name in names):
            task = bar.add_task("Reading text", total=len(sequences))
            with _timed(shared, "reading"):
                samples, rows_of = collect(
                    model, sequences, config.sink_tokens, generator, lambda: bar.advance(task), saved
                )
            positions = torch.cat(rows_of)
            if chosen:
                task = bar.add_task("Measuring sensitivity", total=len(chosen))
                with _timed(shared, "sensitivity"):
                    found = measure_sensitivity(
                        model, sequences, rows_of, chosen, config.recent_tokens, config.sink_tokens, generator,
                        lambda: bar.advance(task), saved,
                    )  # fmt: skip
                for i, sensitivity in found.items():
                    samples[i].sensitivity = sensitivity
                found.clear()
        state, trained = generator.get_state(), []
        for n, (config, tried) in enumerate(zip(configs, parts)):
            seconds = dict(shared)
            title = "Training codebooks" + (f", {config.bits_per_element:g} bit" if len(configs) > 1 else "")
            task = bar.add_task(title, total=len(tried) * len(rotations))
            books: list[dict[int, LayerCodebooks]] = []
            reports: list[dict[int, LayerReport]] = []
            for m, one in enumerate(tried):
                last = n == len(configs) - 1 and m == len(tried) - 1
                generator.set_state(state)  # so that the others do not matter
                layers, report = {}, {}
                for i in sorted(rotations):
                    train = partial(
                        train_layer, samples.get(i) if not last else samples.pop(i, None), positions, rotations[i], one,
                        iterations=iterations, generator=generator, device=device, name=f"layer {i}",
                    )  # fmt: skip
                    with _timed(seconds, "k-means"):
                        layers[i], report[i] = _loaded_or(train, saved, f"layer-{n}-{m}-{i}", generator)
                    bar.advance(task)
                books.append(layers)
                reports.append(report)
                if last:
                    for prefix in ("read-", "sensitivity-"):
                        saved.drop(prefix)
            if len(tried) > 1:
                task = bar.add_task("Allocating bits", total=len(judges))
                with _timed(seconds, "allocation"):
                    costs = measure_costs(
                        model, judges, dict(zip(SUBSPACE_DIMS, books)), config.recent_tokens,
                        config.sink_tokens, generator, partial(bar.advance, task), saved, f"allocation-{n}",
                    )  # fmt: skip
                config, layers, report = _put_together(costs, config, books, reports)
            tuned = {}
            if finetune_steps:
                title = title.replace("Training codebooks", "Fine-tuning")
                task = bar.add_task(title, total=finetune_steps)

                def show(kl: float, task=task, title=title) -> None:
                    bar.update(task, advance=1, description=f"{title}, held-out KL {kl:.4f}")

                with _timed(seconds, "fine-tuning"):
                    found = finetune(
                        model, text, layers, config.recent_tokens, config.sink_tokens, finetune_steps, generator, advance=show,
                        saved=saved, name=f"tuning-{n}",
                    )  # fmt: skip
                layers = found.layers
                tuned = {"finetune_held_out_kl": [found.before, found.after], "finetune_best_step": found.step}
            seconds = {phase: round(x, 2) for phase, x in seconds.items()}
            trained.append((config, layers, report, {"allocate": len(tried) > 1, "seconds": seconds, **tuned}))

    used = torch.cat(text)
    provenance = {
        "model": model.config.name_or_path,
        **origin(model.config.name_or_path),
        "tokens": len(used),
        "tokens_sha256": hashlib.sha256(used.to(torch.int32).numpy().tobytes()).hexdigest(),
        "context": context,
        "seed": seed,
        "iterations": iterations,
        "sensitivity_tokens": sum(len(sequences[i]) for i in chosen),
        "finetune_steps": finetune_steps,
        "model_dtype": str(model.dtype).removeprefix("torch."),
        "device": device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    whose = fingerprint(model, rotations)
    return [Codebooks(config, whose, layers, provenance | own, report) for config, layers, report, own in trained]
