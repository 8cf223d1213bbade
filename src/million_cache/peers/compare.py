"""The program behind ``million compare``: peers and our presets on one text, as one table, one JSON file and one picture."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from million_cache.codebook import Codebooks
from million_cache.config import PRESETS, PQConfig
from million_cache.evaluate import evaluate
from million_cache.loading import UserError, atomic_path, contexts, origin
from million_cache.peers import EQUAL, PEERS
from million_cache.peers.harness import evaluate_peers, record
from million_cache.programs import calibrate_text

WINDOWS = ("equal", "own")
OURS = "this package"  # in the column "paper"
Row = dict[str, Any]
Text = tuple[str, str]  # its name and itself


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    calibration: Text,
    evaluation: Text,
    out: Path,
    *,
    peers: Iterable[str] = tuple(PEERS),
    windows: Iterable[str] = WINDOWS,
    codebooks: Iterable[tuple[str, Codebooks]] | None = None,
    tokens: int = 8192,
    context: int = 2048,
    chunks: int = 4,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Score peers and codebooks and write ``out`` with the suffixes json, md and png, anew after every row.

    Where ``out`` is there already and is about the same model, texts and sizes, its other rows stay.

    Args:
        name: of the model.
        peers: keys of `PEERS`.
        windows: ``equal`` (4 sinks, 128 recent tokens: our presets' own) and ``own`` (the peer's paper's).
        codebooks: names and codebooks of this model to score, see `row_title`; None: calibrate every preset on the same tokens.
        tokens: of calibration, in whole contexts, for peers and presets.
        context, chunks: tokens of a context, contexts to score.
        say: where a line goes after every row; None: standard error.

    Returns:
        What the JSON file holds: the settings, and ``rows``.

    Raises:
        UserError: an unknown peer or window, or a text that is too short.
    """
    say = say or Console(stderr=True).print
    peers, windows = list(peers), list(windows)
    for given, known in ((peers, PEERS), (windows, WINDOWS)):
        if unknown := [x for x in given if x not in known]:
            raise UserError(f"unknown: {', '.join(unknown)}; choose from {', '.join(known)}")
    train = contexts(tokenizer, calibration[1], context, max(1, tokens // context), calibration[0])
    test = contexts(tokenizer, evaluation[1], context, chunks, evaluation[0])
    result: dict[str, Any] = {
        "model": name,
        "context": context,
        "contexts": chunks,
        "calibration_tokens": train.numel(),
        "calibration_text_sha256": sha256(calibration[1]),
        "text_sha256": sha256(evaluation[1]),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
    }
    rows = _kept(out, result)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    result |= {"text": evaluation[0], "calibration_text": calibration[0], "rows": rows}

    def done(row: Row) -> None:
        row["versions"] = versions
        rows[:] = [x for x in rows if (x["peer"], x["window"]) != (row["peer"], row["window"])] + [row]
        rows.sort(key=lambda x: (-x["bits_per_element"], x["peer"], x["window"]))
        write(result, out)
        say(
            f"{row['peer']} ({row['window']} window): {row['bits_per_element']:.2f} bit, KL {row['kl']:.5f}, {row['seconds']:.0f} s"
        )

    asked = {x: PEERS[x]() for x in peers}
    if asked:
        started = time.perf_counter()
        sample = record(model, train, any(p.fisher for p in asked.values()))
        say(f"Recorded {train.numel()} tokens for calibration in {time.perf_counter() - started:.0f} s")
        dense: list[torch.Tensor] = []
        for peer in asked.values():
            for window in windows:
                chosen = EQUAL if window == "equal" else peer.window
                (row,) = evaluate_peers(model, [(peer, chosen)], test, sample, dense)
                done({**row, "window": window})
        del sample, dense
    if codebooks is None:
        presets = [PQConfig.preset(p) for p in PRESETS]
        found = calibrate_text(model, tokenizer, calibration[1], calibration[0], presets, tokens, context)
        for books in found:
            books.provenance |= {"model": name, **origin(name)}
        codebooks = zip(PRESETS, found)
    for given, books in codebooks:
        title = row_title(given, books.config.to_dict(), books.provenance)
        done({"peer": title, **_ours(evaluate(model, books, test), books)})
    return result


def row_title(name: str, config: dict[str, Any], calibration: dict[str, Any]) -> str:
    """What a row of ours is called: its codebooks' name, and what was done beyond k-means with one width for all layers.

    Args:
        name: of the codebooks.
        config, calibration: their `PQConfig` and provenance, as JSON has them.
    """
    beyond = {"bits by layer": config.get("allocation"), "tuned": _steps(calibration)}
    return ", ".join([f"million {name}", *(x for x, was_done in beyond.items() if was_done)])


def _steps(calibration: dict[str, Any]) -> int:
    """Of fine-tuning, by the provenance of codebooks."""
    return calibration.get("finetune_steps", 0)


def sha256(text: str) -> str:
    """Of a text's UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def _kept(out: Path, settings: dict[str, Any]) -> list[Row]:
    """Rows of an earlier run with the same settings."""
    path = out.with_name(out.name + ".json")
    if not path.exists():
        return []
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        if any(before.get(k) != v for k, v in settings.items()):
            return []
        # Until November 2026 versions were kept once a file, and rows of ours had nothing in their names of how they were made.
        rows = [{"versions": before.get("versions"), **row} for row in before["rows"]]
        for row in rows:
            if row["paper"] == OURS and row["peer"].count(",") == 0:
                row["peer"] = row_title(row["peer"].removeprefix("million "), row["config"], row["calibration"])
        return rows
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is not the result of an earlier comparison; remove it or choose another name") from error  # fmt: skip


def _ours(result: dict[str, Any], books: Codebooks) -> Row:
    """A row from the result of `evaluate`."""
    same = ("kl", "top1", "perplexity", "perplexity_dense", "kl_by_context", "codebook_bytes", "seconds", "sink_tokens", "recent_tokens")  # fmt: skip
    window = (result["sink_tokens"], result["recent_tokens"])
    return {
        "paper": OURS,
        "window": "equal" if window == (EQUAL.sinks, EQUAL.recent) else "own",
        **{k: result[k] for k in same},
        "k_block": 0,
        "v_block": 0,
        "bits_per_element": result["bits_per_element"],
        "bits_codes": result["bits_per_element"],
        "bits_scales": 0.0,
        "bits_outliers": 0.0,
        "exact_tokens": float(sum(window)),
        # Window and sinks are held twice, as codes and as they are.
        "bits_per_element_total": 16 * result["cache_bytes_16bit"] / result["dense_cache_bytes_16bit"],
        "config": books.config.to_dict(),
        "calibration": books.provenance,
    }


# ----------------------------------------------------------------------------------------------------------------- files


def write(result: dict[str, Any], out: Path) -> None:
    """Write ``out`` as json, md and png."""
    with atomic_path(out.with_name(out.name + ".json")) as partial:
        partial.write_text(json.dumps(result, indent=2) + os.linesep, encoding="utf-8")
    with atomic_path(out.with_name(out.name + ".md")) as partial:
        partial.write_text(markdown(result), encoding="utf-8")
    with atomic_path(out.with_name(out.name + ".png")) as partial:
        plot(result, partial)


def markdown(result: dict[str, Any]) -> str:
    """The table, with what its columns mean."""
    rows = {w: {x["peer"]: x for x in result["rows"] if x["window"] == w} for w in WINDOWS}
    names = list(dict.fromkeys(x["peer"] for x in result["rows"]))
    dense = result["rows"][0]["perplexity_dense"] if result["rows"] else float("nan")
    lines = [
        f"# Quality of quantised caches: {result['model']}",
        "",
        f"{result['contexts']} contexts of {result['context']} tokens of `{Path(result['text']).name}`, every position scored, "
        f"{result['dtype']}; calibration on {result['calibration_tokens']} tokens of `{Path(result['calibration_text']).name}`; "
        f"perplexity of the dense cache {dense:.4f}. KL is the mean KL(dense || quantised) of the next-token distribution in nats, "
        "top-1 the share of positions where both predict the same token.",
        "",
        "`million ...` rows went through this package's cache and decode path; the others are fake quantisers written from the "
        "papers (`src/million_cache/peers`), in one forward in which each query sees its exact window as it is and everything "
        "else dequantised. Bits an element of what is quantised are codes + scales (zero points, norms, pointers) + outliers "
        "with their indices; \"total\" is that of a cache of one context with its exact tokens at 16 bit. Codebooks are apart.",
        "",
        f"*Equal window*: {EQUAL.sinks} first and {EQUAL.recent} last tokens exact for everyone. *Own window*: the paper's.",
        "",
        "| method | bits | codes + scales + outliers | KL, equal window | top-1 | perplexity | KL, own window | own total bits | codebooks, MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name in names:
        equal, own = rows["equal"].get(name), rows["own"].get(name)
        any_ = equal or own
        parts = " + ".join(f"{any_[f'bits_{x}']:.2f}" for x in ("codes", "scales", "outliers"))
        title = f"**{name}**" if any_["paper"] == OURS else name
        lines.append(
            f"| {title} | {any_['bits_per_element']:.2f} | {parts} | "
            + (f"{equal['kl']:.5f} | {equal['top1']:.4f} | {equal['perplexity']:.3f} | " if equal else "| | | ")
            + (f"{own['kl']:.5f} | {own['bits_per_element_total']:.2f} | " if own else "| | ")
            + f"{any_['codebook_bytes'] / 1e6:.2f} |"
        )
    if notes := _notes(result):
        lines += ["", "Codebooks from other text or with steps of gradient descent:", "", *notes]
    return "\n".join(lines) + "\n"


def _notes(result: dict[str, Any]) -> list[str]:
    """Of each of our rows that was not calibrated as the heading says: how it was."""
    found = {}
    for row in result["rows"]:
        if row["paper"] != OURS:
            continue
        made = row["calibration"]
        tokens, steps = made.get("tokens"), _steps(made)
        other_text = made.get("text_sha256") != result["calibration_text_sha256"]
        if other_text or steps or tokens != result["calibration_tokens"]:
            sources = (made.get("text") or "unknown text").split(" + ")
            text = " + ".join(x if x.startswith("dataset:") else Path(x).name for x in sources)
            found[row["peer"]] = f"- {row['peer']}: {tokens} tokens of `{text}`" + (f", {steps} steps" if steps else "")
    return list(found.values())


def plot(result: dict[str, Any], path: Path) -> None:
    """KL against bits an element, logarithmic, at equal windows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    rows = [x for x in result["rows"] if x["window"] == "equal" and x["kl"] > 0]
    ours: dict[bool, dict[float, list[float]]] = {}  # tuned or not: KLs by bits
    families: dict[str, list[tuple[float, float]]] = {}
    for x in rows:
        if x["paper"] != OURS:
            family = x["peer"].rstrip("0123456789cb").rstrip("-") if x["peer"] not in ("fp8", "nvfp4") else x["peer"]
            families.setdefault(family, []).append((x["bits_per_element"], x["kl"]))
            axis.annotate(x["peer"], (x["bits_per_element"], x["kl"]), fontsize=7, xytext=(4, 3), textcoords="offset points")  # fmt: skip
        else:
            same = ours.setdefault(_steps(x["calibration"]) > 0, {})
            same.setdefault(x["bits_per_element"], []).append(x["kl"])
    for family, points in families.items():
        axis.plot(*zip(*sorted(points)), "o:", label=family, markersize=5, linewidth=0.8)
    for tuned, by_bits in sorted(ours.items()):
        label = "million (this package)" + (", tuned" if tuned else "")
        # The line joins the best of each width; others, such as the same with one width for all layers, are stars alone.
        best = sorted((bits, min(kls)) for bits, kls in by_bits.items())
        axis.plot(*zip(*best), "r*-" if tuned else "k*-", label=label, markersize=12, linewidth=2)
        others = [(bits, kl) for bits, kls in by_bits.items() for kl in kls if kl > min(kls)]
        if others:
            axis.plot(*zip(*others), "r*" if tuned else "k*", markersize=8)
    axis.set(
        yscale="log",
        xlabel="bits an element (codes + scales + outliers)",
        ylabel="KL(dense || quantised), nats",
        title=f"{result['model']}: {EQUAL.sinks} first and {EQUAL.recent} last tokens exact for everyone",
    )
    axis.grid(True, which="both", alpha=0.25)
    if families or ours:
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
