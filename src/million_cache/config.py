"""What a quantised cache is made of: bits, frames, window and sinks."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from million_ops.layout import SUBSPACE_DIMS


@dataclass(frozen=True)
class PQConfig:
    """Bits and window of a product-quantised cache.

    Codes are always 8 bit, so ``subspace_dim`` channels that share a code give ``8 / subspace_dim`` bits an element.

    Args:
        k_subspace_dim: channels of a key that share a code: 2, 4 or 8.
        v_subspace_dim: the same for values.
        frame_tokens: slots of a RoPE frame, 0 for none (see ``docs`` of `million_ops.ops`). Short frames raise quality at
            low bits and cost work in attention.
        recent_tokens: tokens a query sees exactly, its own included; 0 and 1 both leave only its own.
        sink_tokens: first tokens of a sequence, kept exact for ever.
        allocation: channels a code of (keys, values) of each quantised layer, in their order, where the layers differ
            (``calibrate(allocate=True)``); then ``k_subspace_dim`` and ``v_subspace_dim`` are those of the budget. Empty: the
            same for all.

    Raises:
        ValueError: a value out of range.
    """

    k_subspace_dim: int
    v_subspace_dim: int
    frame_tokens: int
    recent_tokens: int = 128
    sink_tokens: int = 4
    allocation: Sequence[tuple[int, int]] = ()

    def __post_init__(self) -> None:
        for name in ("k_subspace_dim", "v_subspace_dim"):
            if getattr(self, name) not in SUBSPACE_DIMS:
                raise ValueError(f"{name} must be one of {SUBSPACE_DIMS}, got {getattr(self, name)}")
        for name in ("frame_tokens", "recent_tokens", "sink_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} must be an integer >= 0, got {value!r}")
        pairs = tuple(tuple(pair) for pair in self.allocation)  # JSON has lists
        if any(len(pair) != 2 or not set(pair) <= set(SUBSPACE_DIMS) for pair in pairs):
            raise ValueError(f"allocation must be pairs of {SUBSPACE_DIMS}, got {self.allocation!r}")
        object.__setattr__(self, "allocation", pairs)

    @classmethod
    def preset(cls, name: str) -> PQConfig:
        """One of `PRESETS`: ``4bit``, ``3bit``, ``2bit``, ``1bit``. Raises ValueError for another name."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}, choose one of {', '.join(PRESETS)}")
        return PRESETS[name]

    def subspace_dims(self, layers: int) -> tuple[tuple[int, int], ...]:
        """Channels a code of (keys, values) of each of a model's quantised layers. Raises ValueError if they are allocated to another number."""
        if len(self.allocation) not in (0, layers):
            raise ValueError(f"bits are allocated to {len(self.allocation)} layers, got {layers}")
        return self.allocation or ((self.k_subspace_dim, self.v_subspace_dim),) * layers

    @property
    def kv_bits(self) -> tuple[float, float]:
        """Mean bits of an element of the cached keys and of the values, codes alone."""
        pairs = self.allocation or self.subspace_dims(1)
        return tuple(sum(8 / d for d in dims) / len(pairs) for dims in zip(*pairs))

    @property
    def bits_per_element(self) -> float:
        """Mean bits of a cached element, codes alone."""
        return sum(self.kv_bits) / 2

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, the inverse of ``PQConfig(**d)``; without ``allocation`` if that is empty."""
        return {k: v for k, v in asdict(self).items() if k != "allocation" or v}


PRESETS = {
    "4bit": PQConfig(k_subspace_dim=2, v_subspace_dim=2, frame_tokens=2048),
    "3bit": PQConfig(k_subspace_dim=2, v_subspace_dim=4, frame_tokens=1024),
    "2bit": PQConfig(k_subspace_dim=4, v_subspace_dim=4, frame_tokens=256),
    "1bit": PQConfig(k_subspace_dim=8, v_subspace_dim=8, frame_tokens=128),
}


def package_version() -> str:
    """Of this package; "source" where it is imported from a tree that nobody installed."""
    try:
        return importlib.metadata.version("million")
    except importlib.metadata.PackageNotFoundError:
        return "source"
