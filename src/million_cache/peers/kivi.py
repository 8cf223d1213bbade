"""KIVI (Liu et al., arXiv 2402.02750): keys quantised per channel, values per token, in groups of 32, asymmetrically.

Keys are those after RoPE. A group of keys is 32 tokens of one channel, a group of values 32 channels of one token; each
has an fp16 scale and an fp16 minimum (section 3.2; ``uniform``). The last tokens stay exact: values of the last 128, keys
until a block of 128 is full (Algorithm 1, residual length R).
"""

from __future__ import annotations

import torch
from torch import Tensor

from million_cache.peers.base import FLOAT16, Peer, Quantised, Tokens, Window, uniform


def per_channel(x: Tensor, bits: int, group: int) -> Quantised:
    """Groups of ``group`` tokens of one channel. x [H, N, D]; a last group that is not full counts as one."""
    H, N, D = x.shape
    short = -N % group
    # Copies of the last token change neither the minimum nor the maximum of their group.
    whole = torch.cat((x, x[:, -1:].expand(H, short, D)), 1).view(H, -1, group, D)
    out = uniform(whole, bits, 2).view(H, -1, D)[:, :N]
    return Quantised(out, codes=bits * x.numel(), scales=2 * FLOAT16 * whole.numel() / group)


def per_token(x: Tensor, bits: int, group: int) -> Quantised:
    """Groups of ``group`` channels of one token. x [H, N, D], D a multiple of the group."""
    grouped = x.unflatten(2, (-1, group))
    out = uniform(grouped, bits, 3).flatten(2)
    return Quantised(out, codes=bits * x.numel(), scales=2 * FLOAT16 * x.numel() / group)


class Kivi(Peer):
    """KIVI at some number of bits."""

    paper = "arXiv 2402.02750"
    window = Window(recent=128, k_block=128)

    def __init__(self, bits: int, group: int = 32) -> None:
        self.name, self.bits, self.group = f"kivi-{bits}", bits, group

    def quantise(self, layer: int, tokens: Tokens) -> tuple[Quantised, Quantised]:
        return per_channel(tokens.keys, self.bits, self.group), per_token(tokens.values, self.bits, self.group)


class Int4(Peer):
    """Keys and values per token, 4 bit, as transformers' ``QuantizedCache`` does with quanto.

    Its defaults: groups of 64 channels, asymmetric; everything is quantised whenever 128 tokens have come together.
    """

    paper = "transformers QuantoQuantizedCache"
    window = Window(k_block=128, v_block=128)

    def __init__(self, channels: int) -> None:
        self.name, self.channels = f"int4-{channels}", channels

    def quantise(self, layer: int, tokens: Tokens) -> tuple[Quantised, Quantised]:
        return per_token(tokens.keys, 4, self.channels), per_token(tokens.values, 4, self.channels)
