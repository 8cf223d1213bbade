"""What every peer is made of: what calibration gives it, what it gives back, and which tokens it leaves exact."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from million_cache.models import Rotation
from million_ops.reference import rotate

FLOAT16 = 16  # bits of a scale, a zero point, a norm or an outlier's value


@dataclass(frozen=True)
class Window:
    """Which keys and values a query sees exactly. The query at slot p sees ``[0, sinks)`` and a run that ends at p.

    Attributes:
        sinks: first tokens of a sequence, never quantised.
        recent: last tokens, the query's own included; 0: even its own are quantised.
        k_block, v_block: if not 0, keys (values) are quantised in whole blocks of so many tokens, and exact until then:
            the run is as long as what is left of the division. It replaces ``recent``.
    """

    sinks: int = 0
    recent: int = 0
    k_block: int = 0
    v_block: int = 0

    def first_exact(self, tokens: int, block: int = 0) -> Tensor:
        """First slot of each query's exact run, int64 [tokens]; ``p + 1`` where there is none."""
        slots = torch.arange(tokens)
        return slots - slots % block if block else (slots + 1 - self.recent).clamp(min=0)

    def exact_tokens(self, tokens: int) -> float:
        """Tokens a cache of so many keeps at 16 bit, the mean of keys and values."""
        total = 0
        for block in (self.k_block, self.v_block):
            first = int(self.first_exact(tokens, block)[-1])
            total += tokens - max(first, self.sinks) + min(self.sinks, tokens)
        return total / 2


EQUAL = Window(sinks=4, recent=128)  # ours, for a comparison at equal terms


@dataclass
class Tokens:
    """Consecutive tokens of one layer, for a peer to quantise. H KV heads, N tokens, D channels.

    Attributes:
        keys: [H, N, D] fp32, without their rotation where the peer asks for that.
        values: [H, N, D] fp32.
        slots: [N] int64, consecutive.
        queries: [Hq, T, D] fp32 of the whole text, and with them
        all_keys: [H, T, D] fp32, rotated: what a method that looks at attention needs.
        scale: of the scores.
        recent: tokens that a query sees exactly.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    queries: Tensor
    all_keys: Tensor
    scale: float
    recent: int


@dataclass
class Quantised:
    """What quantising gave, and its cost in bits: codes, scales (also zero points, norms, pointers), outliers (and indices).

    Attributes:
        x: [H, N, D] fp32, dequantised.
        dropped: [H] bool, heads that keep nothing but what is exact; None: no head.
    """

    x: Tensor
    codes: float
    scales: float = 0.0
    outliers: float = 0.0
    dropped: Tensor | None = None


@dataclass
class Sample:
    """What calibration saw of one layer, all sequences one after the other. H KV heads, N tokens, D channels.

    Attributes:
        rotated_keys, values: [H, N, D] fp32.
        positions: [N] int64, in each token's own sequence.
        rotation: of the keys, as measured.
        k_grad, v_grad: [H, N, D] fp32, gradients of the text's loss, for rotated keys; None if nobody asked for them.
        queries: [Hq, T, D] fp32, of the first sequence (its T tokens are the first ones of N).
        scale: of the scores.
    """

    rotated_keys: Tensor
    values: Tensor
    positions: Tensor
    rotation: Rotation
    k_grad: Tensor | None
    v_grad: Tensor | None
    queries: Tensor
    scale: float

    @cached_property
    def keys(self) -> Tensor:
        """Keys before RoPE, [H, N, D]."""
        return turn(self.rotated_keys, -self.positions, self.rotation)

    @cached_property
    def key_fisher(self) -> Tensor:
        """Diagonal of the empirical Fisher information of the keys before RoPE, [H, N, D]: squared gradients."""
        return turn(self.k_grad, -self.positions, self.rotation).square()

    @cached_property
    def value_fisher(self) -> Tensor:
        """The same of the values."""
        return self.v_grad.square()

    def without_sinks(self, sinks: int) -> Sample:
        """Without the first tokens of every sequence."""
        keep = self.positions >= sinks
        cut = {
            n: x[:, keep] for n in ("rotated_keys", "values", "k_grad", "v_grad") if (x := getattr(self, n)) is not None
        }
        return replace(self, positions=self.positions[keep], **cut)


def turn(x: Tensor, positions: Tensor, rotation: Rotation) -> Tensor:
    """Rotate keys by positions, with the layer's measured rotation. x [H, N, D] fp32, positions [N]."""
    if rotation.inv_freq is None:
        return x
    return rotate(x, positions, rotation.inv_freq.to(x.device), rotation.kind == "interleaved")


class Peer(ABC):
    """One system of the literature as a fake quantiser: keys and values go in, what its cache would give back comes out.

    A peer holds its own state (`calibrate` fills it), by layer. Subclasses say what they quantise with and what that costs.

    Attributes:
        name: of the row.
        paper: where it is from.
        window: which tokens its own paper leaves exact.
        before_rope: keys are quantised before RoPE.
        fisher: `calibrate` needs gradients.
        group: tokens that are quantised together; a window must be at least as long.
    """

    name: str = ""
    paper: str = ""
    window: Window = Window()
    before_rope: bool = False
    fisher: bool = False
    group: int = 1

    def calibrate(self, samples: dict[int, Sample]) -> None:  # noqa: B027  most need none
        """Fit the state to calibration data. Called anew for every window, with the window's sinks left out of the samples."""

    @abstractmethod
    def quantise(self, layer: int, tokens: Tokens) -> tuple[Quantised, Quantised]:
        """Keys and values of a layer as the cache would give them back."""

    @property
    def codebook_bytes(self) -> int:
        """Bytes that the method needs once a model, whatever the length."""
        return 0


@dataclass
class Tally:
    """Bits and elements of all that was quantised."""

    elements: int = 0
    bits: dict[str, float] = field(default_factory=lambda: {"codes": 0.0, "scales": 0.0, "outliers": 0.0})

    def add(self, quantised: Quantised) -> None:
        self.elements += quantised.x.numel()
        for name in self.bits:
            self.bits[name] += getattr(quantised, name)

    def per_element(self, name: str) -> float:
        return self.bits[name] / max(1, self.elements)

    @property
    def bits_per_element(self) -> float:
        return sum(map(self.per_element, self.bits))


# ------------------------------------------------------------------------------------------------------ common quantisers


def uniform(x: Tensor, bits: int, dim: int) -> Tensor:
    """Asymmetric round-to-nearest over ``dim``: ``round((x - min) / s) s + min``, ``s = (max - min) / (2^bits - 1)``.

    Scale and minimum are rounded to fp16, as they are stored.
    """
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    step = ((high - low) / (2**bits - 1)).half().float()
    low = low.half().float()
    codes = ((x - low) / step.clamp(min=1e-30)).round_().clamp_(0, 2**bits - 1)
    return codes * step + low


def lloyd_1d(x: Tensor, weight: Tensor, levels: int, iterations: int = 100) -> Tensor:
    """Scalar quantiser that minimises the weighted squared error (Lloyd 1982): sorted centroids [levels] fp32.

    Args:
        x, weight: [N]; weights not negative.
    """
    order = x.argsort()
    x, weight = x[order].double(), weight[order].double()
    mass = torch.cat((weight.new_zeros(1), weight.cumsum(0)))
    moment = torch.cat((weight.new_zeros(1), (weight * x).cumsum(0)))
    # Start at the quantiles of a density flatter than the data's: Lloyd alone hardly moves centroids into the tails.
    flat = (weight.mean() * 0.3 + weight).cumsum(0)
    at = (torch.arange(levels, dtype=torch.float64, device=x.device) + 0.5) / levels * flat[-1]
    centroids = 0.5 * x[torch.searchsorted(flat, at).clamp(max=len(x) - 1)]
    centroids = centroids + 0.5 * torch.linspace(float(x[0]), float(x[-1]), levels, dtype=x.dtype, device=x.device)
    for _ in range(iterations):
        cuts = torch.searchsorted(x, (centroids[1:] + centroids[:-1]) / 2)
        edge = torch.cat((cuts.new_zeros(1), cuts, cuts.new_full((1,), len(x))))
        m = mass[edge[1:]] - mass[edge[:-1]]
        new = (moment[edge[1:]] - moment[edge[:-1]]) / m.clamp(min=1e-300)
        new = torch.where(m > 0, new, centroids).sort().values
        if torch.equal(new, centroids):
            break
        centroids = new
    return centroids.float()


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest of sorted scalar centroids [levels], for every element of x."""
    return torch.bucketize(x, (centroids[1:] + centroids[:-1]) / 2)
