"""QAQ (Dong et al., arXiv 2403.04643): the bits of each token follow from how much attention it gets; outliers stay exact.

An error in a key or value moves the attention's output; QAQ bounds that movement and gives each token the bits it needs
(section 4, as its released evaluator computes it). With scores a, T tokens and the targets e_k, e_v:

    largest error of a value:  sqrt(e_v) / (T a_j)              a_j: the most that a query in the window gives token j
    largest error of a key:    sqrt(e_k / D) / (T q J_j)        J_j: the most of max_i |d a_i / d s_j|, q: a query's size
    bits:                      ceil(log2(range / (2 error) + 1)), between 2 (at a mean of 2: 1) and 8, as its grid search

A token's keys (values) of all heads of a layer share bits, range and outliers: 1 % of them, half at each end, in fp16.
The future is guessed from the attention window (section 4.4): a token is quantised when it leaves the exact window, with
what the queries in there gave it. The targets are found on calibration data, for the mean bits that the name promises.
The paper grows a token's bits back from the original on the CPU when attention returns; this does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from million_cache.peers.base import FLOAT16, Peer, Quantised, Sample, Tokens, Window

SHARE = 0.01
MOST_BITS = 8
WIDTH = 4  # bits that say how many bits a token has
INDEX = 16
QUERY_BLOCK = 256


def attention_window(queries: Tensor, keys: Tensor, scale: float, recent: int) -> tuple[Tensor, Tensor]:
    """What the queries j .. j + recent - 1 give to token j: the most of it, and the most that its score can move theirs.

    Args:
        queries: [Hq, T, D]; keys: [H, T, D], rotated.

    Returns:
        ``max a_j`` and ``max_i |d a_i / d s_j| = a_j max(1 - a_j, max_{i != j} a_i)`` over those queries and all heads, [T].
    """
    H, T, D = keys.shape
    grouped = queries.reshape(H, -1, T, D)
    top, move = queries.new_zeros(T), queries.new_zeros(T)
    for a in range(0, T, QUERY_BLOCK):
        b, lo = min(a + QUERY_BLOCK, T), max(0, a - recent + 1)
        rows, columns = torch.arange(a, b, device=keys.device)[:, None], torch.arange(b, device=keys.device)
        scores = grouped[:, :, a:b] @ keys[:, None, :b].transpose(2, 3) * scale
        share = scores.masked_fill(columns > rows, -torch.inf).softmax(-1)
        two = share.topk(min(2, b), -1).values
        band = share[..., lo:].masked_fill(columns[lo:] <= rows - recent, 0)
        other = torch.where(band == two[..., :1], two[..., -1:], two[..., :1])
        jacobian = band * torch.maximum(1 - band, other)
        top[lo:b] = torch.maximum(top[lo:b], band.amax((0, 1, 2)))
        move[lo:b] = torch.maximum(move[lo:b], jacobian.amax((0, 1, 2)))
    return top, move


def outliers_and_range(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of every row of x [N, C]: outliers (mask [N, C]), the least and the most of the rest [N, 1]."""
    count = max(1, round(SHARE / 2 * x.shape[1]))
    mask = torch.zeros_like(x, dtype=torch.bool)
    for largest in (True, False):
        mask.scatter_(1, x.topk(count, 1, largest=largest).indices, True)
    inf = torch.full_like(x, torch.inf)
    return mask, torch.where(mask, inf, x).amin(1, keepdim=True), torch.where(mask, -inf, x).amax(1, keepdim=True)


def bits_for(sensitivity: Tensor, span: Tensor, target: float, least: int = 0) -> Tensor:
    """``clamp(ceil(log2(span sensitivity / (2 target) + 1)))``: the error allowed is ``target / sensitivity``. All [N]."""
    return (span * sensitivity / (2 * target) + 1).log2().ceil().clamp(least, MOST_BITS)


def find_target(sensitivity: Tensor, span: Tensor, bits: float, least: int = 0) -> float:
    """The target at which the mean of `bits_for` is ``bits``, by bisection of its logarithm."""
    low, high = -30.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        more = bits_for(sensitivity, span, 2.0**middle, least).mean().item() > bits
        low, high = (middle, high) if more else (low, middle)
    return 2.0**high


class QAQ(Peer):
    """QAQ with targets for some mean number of bits."""

    paper = "arXiv 2403.04643"
    window = Window(recent=128)
    group = 2  # it needs a window to look at

    def __init__(self, bits: int) -> None:
        self.name, self.bits = f"qaq-{bits}", bits
        self.least = min(2, bits - 1)
        self.targets = (1.0, 1.0)

    def calibrate(self, samples: dict[int, Sample]) -> None:
        spans, sensitivities = ([], []), ([], [])
        for sample in samples.values():
            T = sample.queries.shape[1]
            sinks = int(sample.positions[0])
            # The first sequence without its sinks; its queries still see them, which changes little of what others get.
            keys, values = sample.rotated_keys[:, : T - sinks], sample.values[:, : T - sinks]
            window = attention_window(sample.queries[:, sinks:], keys, sample.scale, EXPECTED_WINDOW)
            for n, (x, seen) in enumerate(((keys, window[1]), (values, window[0]))):
                _, low, high = outliers_and_range(x.transpose(0, 1).flatten(1))
                spans[n].append((high - low)[:, 0])
                sensitivities[n].append(seen)
        k, v = (find_target(torch.cat(s), torch.cat(r), self.bits, self.least) for s, r in zip(sensitivities, spans))
        self.targets = k, v

    def _one(self, x: Tensor, sensitivity: Tensor, target: float) -> Quantised:
        H, N, D = x.shape
        flat = x.transpose(0, 1).flatten(1)
        mask, low, high = outliers_and_range(flat)
        bits = bits_for(sensitivity, (high - low)[:, 0], target, self.least)[:, None]
        levels = torch.exp2(bits) - 1
        step = ((high - low) / levels.clamp(min=1)).half().float()
        low = low.half().float()
        codes = torch.minimum(((flat - low) / step.clamp(min=1e-30)).round().clamp(min=0), levels)
        out = torch.where(mask, flat, codes * step + low)
        return Quantised(
            out.view(N, H, D).transpose(0, 1), codes=bits.sum().item() * H * D, scales=(2 * FLOAT16 + WIDTH) * N,
            outliers=(FLOAT16 + INDEX) * int(mask.sum()),
        )  # fmt: skip

    def quantise(self, layer: int, tokens: Tokens) -> tuple[Quantised, Quantised]:
        top, move = attention_window(tokens.queries, tokens.all_keys, tokens.scale, tokens.recent)
        k_target, v_target = self.targets
        return (
            self._one(tokens.keys, move[tokens.slots], k_target),
            self._one(tokens.values, top[tokens.slots], v_target),
        )


EXPECTED_WINDOW = QAQ.window.recent
