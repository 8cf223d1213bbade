"""Other systems for quantised caches, re-implemented from their papers as fake quantisers, for comparison only.

One file a family; a new one subclasses `Peer` and gets a line in `PEERS`. `million compare` puts them in one table with ours.
"""

from __future__ import annotations

from collections.abc import Callable

from million_cache.peers.base import EQUAL, Peer, Quantised, Sample, Tokens, Window
from million_cache.peers.duo import Duo
from million_cache.peers.floats import Fp8, Nvfp4
from million_cache.peers.kivi import Int4, Kivi
from million_cache.peers.kvquant import KVQuant
from million_cache.peers.qaq import QAQ
from million_cache.peers.turboquant import TurboQuant
from million_cache.peers.vector import CQ, Published

_MAKERS: list[Callable[[], Peer]] = [
    Fp8,
    lambda: Kivi(4),
    lambda: Int4(32),
    lambda: Int4(64),
    Nvfp4,
    lambda: KVQuant(4),
    lambda: TurboQuant(4),
    lambda: TurboQuant(4, qjl=True),
    lambda: QAQ(4),
    lambda: CQ(2),
    lambda: Published(2),
    lambda: KVQuant(3),
    lambda: TurboQuant(3),
    lambda: QAQ(3),
    lambda: Kivi(2),
    lambda: KVQuant(2),
    lambda: TurboQuant(2),
    lambda: QAQ(2),
    lambda: CQ(4),
    lambda: Published(4),
    lambda: CQ(8),
    lambda: Published(8),
    Duo,
]
PEERS: dict[str, Callable[[], Peer]] = {make().name: make for make in _MAKERS}  # by what `--peer` calls them

__all__ = ["EQUAL", "PEERS", "Peer", "Quantised", "Sample", "Tokens", "Window"]
