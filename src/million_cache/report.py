"""What calibration recorded of a set of codebooks, as tables for a terminal and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from million_cache.loading import UserError, atomic_path

if TYPE_CHECKING:
    from rich.table import Table

    from million_cache.codebook import Codebooks

KINDS = ("k", "v")


def stacked(codebooks: Codebooks, kind: str) -> tuple[Tensor, Tensor]:
    """Energy and distortion of keys (``"k"``) or values (``"v"``), each ``[layers, KV heads, subspaces]`` fp32.

    NaN behind the last subspace of layers that have fewer than others.

    Raises:
        UserError: the codebooks carry no report (they were not made by `calibrate`).
    """
    if not codebooks.report:
        raise UserError("these codebooks carry no report: they were not made by `million calibrate`")
    reports = [codebooks.report[i] for i in sorted(codebooks.report)]
    energy, distortion = ([getattr(x, f"{kind}_{what}").T for x in reports] for what in ("energy", "distortion"))
    # By subspace first, as pad_sequence pads the first dimension.
    return tuple(pad_sequence(x, True, torch.nan).transpose(1, 2) for x in (energy, distortion))


POOR = 3.0  # times the distortion that three quarters of the heads stay under


def poor_heads(codebooks: Codebooks) -> list[tuple[int, str, int, float, float]]:
    """Heads that quantise badly, the worst first: layer, "keys" or "values", KV head, distortion over energy, and
    that in multiples of the upper quartile of all heads with as many bits (of which there must be more than three for one to
    stand out).

    Raises:
        UserError: no report.
    """
    found = []
    for kind, name in zip(KINDS, ("keys", "values")):
        energy, distortion = stacked(codebooks, kind)
        subspaces = (~energy.isnan()).sum(-1)
        ratio = distortion.nanmean(-1) / energy.nanmean(-1).clamp(min=1e-30)
        times = torch.zeros_like(ratio)
        for same in (subspaces == count for count in subspaces.unique()):
            times[same] = ratio[same] / ratio[same].quantile(0.75).clamp(min=1e-30)
        layers = sorted(codebooks.report)
        for row, head in (times > POOR).nonzero().tolist():
            found.append((layers[row], name, head, ratio[row, head].item(), times[row, head].item()))
    return sorted(found, key=lambda x: -x[-1])


def layer_table(codebooks: Codebooks) -> Table:
    """Two rows a layer, keys and values: energy, distortion and their ratio, means over heads and subspaces, and the worst head."""
    from rich.table import Table

    table = Table(title="Mean over heads and subspaces\n(distortion / energy: 0 is lossless, 1 is one centroid)")
    table.add_column("layer", justify="right")
    table.add_column("")
    for column in ("energy", "distortion", "ratio", "worst head", "its ratio"):
        table.add_column(column, justify="right")
    parts = [(name, *stacked(codebooks, kind)) for name, kind in zip(("keys", "values"), KINDS)]
    for row, layer in enumerate(sorted(codebooks.report)):
        for name, energy, distortion in parts:
            e, d = energy[row].nanmean(-1), distortion[row].nanmean(-1)
            ratio = d / e.clamp(min=1e-30)
            worst = int(ratio.argmax())
            cells = (
                f"{e.mean():.4g}",
                f"{d.mean():.4g}",
                f"{d.mean() / e.mean():.4f}",
                str(worst),
                f"{ratio[worst]:.4f}",
            )
            table.add_row(str(layer) if name == "keys" else "", name, *cells)
    return table


def subspace_table(codebooks: Codebooks, layer: int) -> Table:
    """One row a subspace of one layer: energy and distortion of every KV head, keys and values.

    Raises:
        UserError: the codebooks have no such layer.
    """
    from rich.table import Table

    stacked(codebooks, "k")
    if layer not in codebooks.report:
        raise UserError(
            f"there is no layer {layer}; the codebooks have layers {', '.join(map(str, sorted(codebooks.report)))}"
        )
    report = codebooks.report[layer]
    heads = len(report.k_energy)
    table = Table(title=f"Layer {layer}: energy / distortion by subspace")
    table.add_column("subspace", justify="right")
    for name in ("keys", "values"):
        for head in range(heads):
            table.add_column(f"{name}\nhead {head}", justify="right", overflow="fold")
    for m in range(max(report.k_energy.shape[1], report.v_energy.shape[1])):
        cells = [str(m)]
        for kind in KINDS:
            energy, distortion = getattr(report, f"{kind}_energy"), getattr(report, f"{kind}_distortion")
            for head in range(heads):
                cells.append(f"{energy[head, m]:.3g} / {distortion[head, m]:.3g}" if m < energy.shape[1] else "")
        table.add_row(*cells)
    return table


def plot(codebooks: Codebooks, path: Path) -> None:
    """Heat maps of log10 energy and log10 distortion, keys and values: a row a layer and KV head, a column a subspace.

    Raises:
        UserError: no report, a format that matplotlib does not write, or no directory to write into.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    figure = Figure(figsize=(12, 9), layout="constrained")
    known = FigureCanvasAgg(figure).get_supported_filetypes()
    if path.suffix.lstrip(".") not in known:
        raise UserError(
            f"cannot draw a {path.suffix or 'file without extension'}; choose one of {', '.join(sorted(known))}"
        )
    layers = sorted(codebooks.report)
    axes = figure.subplots(2, 2)
    for row, (kind, name) in enumerate(zip(KINDS, ("keys", "values"))):
        for column, (measure, values) in enumerate(zip(("energy", "distortion"), stacked(codebooks, kind))):
            axis = axes[row][column]
            heads = values.shape[1]
            image = axis.imshow(
                values.flatten(0, 1).clamp(min=1e-12).log10().numpy(), aspect="auto", interpolation="nearest"
            )
            axis.set(title=f"{name}: log10 {measure}", xlabel="subspace", ylabel=f"layer ({heads} KV heads each)")
            step = max(1, len(layers) // 10)
            axis.set_yticks([i * heads for i in range(0, len(layers), step)], [str(i) for i in layers[::step]])
            figure.colorbar(image, ax=axis)
    config = codebooks.config
    figure.suptitle(f"{config.bits_per_element:.4g} bit codebooks, frames of {config.frame_tokens} tokens")
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=120)
