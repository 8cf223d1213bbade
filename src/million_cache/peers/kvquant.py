"""KVQuant (Hooper et al., arXiv 2401.18079): non-uniform scalar codes, keys per channel before RoPE, values per token.

* Range (section 3.4): of a key channel, from percentiles of calibration data; of a value token, from the token itself.
  A vector is shifted and scaled so that its range is [-1, 1].
* Outliers (section 3.4): what lies outside, 1 % of each vector, is stored exactly and sparsely.
* Datatype (section 3.3, "nuq"): 2^b signposts a layer for keys and 2^b for values, by k-means on the scaled data without
  outliers, each element weighted by its Fisher information (squared gradient of the loss).
* Q-Norm (section 3.6), at 2 bit: signposts are shifted and scaled so that mean and deviation survive quantisation.
* The first token is exact (section 3.5).

A vector of values is one token of all heads together, as in the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from million_cache.peers.base import FLOAT16, Peer, Quantised, Sample, Tokens, Window, lloyd_1d, nearest

SHARE = 0.01  # of the elements are outliers
INDEX, POINTER = 16, 32  # bits of an outlier's index and of a sparse row's or column's start
MOST = 1 << 20  # elements that the datatype is fitted to


def signposts(scaled: Tensor, fisher: Tensor, bits: int, q_norm: bool) -> tuple[Tensor, Tensor]:
    """Datatype of a layer: what data are compared with and what they become, [2^bits] fp32 each, sorted.

    Args:
        scaled: [N] in [-1, 1], outliers left out.
        fisher: [N].
    """
    posts = lloyd_1d(scaled, fisher, 2**bits)
    if not q_norm:
        return posts, posts
    out = posts[nearest(scaled, posts)]
    scale = scaled.std() / out.std().clamp(min=1e-12)
    return posts, (posts - out.mean()) * scale + scaled.mean()


def value_range(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outliers of every token of x [N, C], the ``SHARE / 2`` largest and smallest, and the range of the rest.

    Returns:
        mask [N, C] bool, middle and half range [N, 1].
    """
    count = max(1, round(SHARE / 2 * x.shape[1]))
    mask = torch.zeros_like(x, dtype=torch.bool)
    for largest in (True, False):
        mask.scatter_(1, x.topk(count, 1, largest=largest).indices, True)
    inf = torch.full_like(x, torch.inf)
    high = torch.where(mask, -inf, x).amax(1, keepdim=True)
    low = torch.where(mask, inf, x).amin(1, keepdim=True)
    return mask, (high + low) / 2, ((high - low) / 2).clamp(min=1e-12)


class KVQuant(Peer):
    """KVQuant at some number of bits, with 1 % outliers."""

    paper = "arXiv 2401.18079"
    window = Window(sinks=1)
    before_rope = True
    fisher = True

    def __init__(self, bits: int) -> None:
        self.name, self.bits = f"kvquant-{bits}", bits
        self.state: dict[int, tuple[Tensor, ...]] = {}

    def calibrate(self, samples: dict[int, Sample]) -> None:
        self.state = {}
        for i, sample in samples.items():
            keys, fisher = sample.keys, sample.key_fisher
            ends = torch.tensor([SHARE / 2, 1 - SHARE / 2], device=keys.device)
            low, high = keys.quantile(ends, 1, keepdim=True)  # [H, 1, D] each
            middle, half = (high + low) / 2, ((high - low) / 2).clamp(min=1e-12)
            k_posts = self._fit((keys - middle) / half, fisher)
            values, fisher = (x.transpose(0, 1).flatten(1) for x in (sample.values, sample.value_fisher))
            _, v_middle, v_half = value_range(values)
            v_posts = self._fit((values - v_middle) / v_half, fisher)
            self.state[i] = (middle, half, *k_posts, *v_posts)

    def _fit(self, scaled: Tensor, fisher: Tensor) -> tuple[Tensor, Tensor]:
        inside = scaled.abs() <= 1
        x, weight = scaled[inside], fisher[inside]
        if len(x) > MOST:
            some = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:MOST].to(x.device)
            x, weight = x[some], weight[some]
        return signposts(x, weight, self.bits, q_norm=self.bits == 2)

    def quantise(self, layer: int, tokens: Tokens) -> tuple[Quantised, Quantised]:
        middle, half, k_in, k_out, v_in, v_out = self.state[layer]
        H, N, D = tokens.keys.shape
        scaled = (tokens.keys - middle) / half
        outlier = scaled.abs() > 1
        keys = torch.where(outlier, tokens.keys, k_out[nearest(scaled, k_in)] * half + middle)
        k = Quantised(
            keys, codes=self.bits * keys.numel(), scales=POINTER * N, outliers=(FLOAT16 + INDEX) * int(outlier.sum())
        )
        flat = tokens.values.transpose(0, 1).flatten(1)
        mask, v_middle, v_half = value_range(flat)
        v_middle, v_half = v_middle.half().float(), v_half.half().float()
        values = torch.where(mask, flat, v_out[nearest((flat - v_middle) / v_half, v_in)] * v_half + v_middle)
        v = Quantised(
            values.view(N, H, D).transpose(0, 1), codes=self.bits * values.numel(), scales=(POINTER + 2 * FLOAT16) * N,
            outliers=(FLOAT16 + INDEX) * int(mask.sum()),
        )  # fmt: skip
        return k, v

    @property
    def codebook_bytes(self) -> int:
        return sum(2 * x.numel() for state in self.state.values() for x in state)
