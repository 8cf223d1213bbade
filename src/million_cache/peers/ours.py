"""This package's own codes as a fake quantiser, so that the harness of the peers can be checked against `evaluate`."""

from __future__ import annotations

import torch
from torch import Tensor

from million_cache.codebook import Codebooks
from million_cache.peers.base import Peer, Quantised, Tokens, Window
from million_ops import pq_decode, pq_encode
from million_ops.reference import from_frame, to_frame


class Ours(Peer):
    """`Codebooks` of the model that is evaluated."""

    paper = "this package"

    def __init__(self, codebooks: Codebooks, name: str = "ours") -> None:
        config = codebooks.config
        self.name, self.books = name, codebooks
        self.window = Window(sinks=config.sink_tokens, recent=max(1, config.recent_tokens))

    def quantise(self, layer: int, tokens: Tokens) -> tuple[Quantised, Quantised]:
        books = self.books.to(tokens.keys.device)[layer]
        frame = (books.inv_freq, books.frame_tokens, books.rope_interleaved)
        origin = torch.zeros(1, dtype=torch.int32, device=tokens.keys.device)

        def through(x: Tensor, codebook: Tensor) -> Tensor:
            return pq_decode(pq_encode(x.contiguous(), codebook), codebook, torch.float32)

        x = to_frame(tokens.keys[None], tokens.slots, origin, books.k_transform, *frame)
        keys = from_frame(through(x, books.k_codebook), tokens.slots, origin, books.k_transform_inv, *frame)[0]
        values = through(tokens.values[None], books.v_codebook)[0]
        k_bits, v_bits = (8 / c.shape[3] * keys.numel() for c in (books.k_codebook, books.v_codebook))
        return Quantised(keys, codes=k_bits), Quantised(values, codes=v_bits)

    @property
    def codebook_bytes(self) -> int:
        return self.books.nbytes
