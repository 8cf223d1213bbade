"""What the layers of a cache share: the clock of each device, the flags of a prompt, and which models are enabled."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from million_cache.codebook import Codebooks
from million_cache.models import Fingerprint

ATTENTION = "million"  # the name under which the attention function is registered with transformers


@dataclass(frozen=True)
class Enabled:
    """What `enable` recorded of a model.

    Attributes:
        fingerprint: which model it is.
        previous_attention: its attention implementation before.
        devices: of its parameters.
    """

    fingerprint: Fingerprint
    previous_attention: str
    devices: frozenset[torch.device]


# Which models are enabled: id of the text config -> (the config, weakly; what was recorded). Keyed by the config because
# that is all a cache is given, and kept outside of it because configs are saved to disk.
_enabled: dict[int, tuple[weakref.ref, Enabled]] = {}


def record_enabled(config: PreTrainedConfig, record: Enabled) -> None:
    """Remember that the model of this text config was enabled."""
    key = id(config)
    _enabled[key] = (weakref.ref(config, lambda _: _enabled.pop(key, None)), record)


def enabled(config: PreTrainedConfig) -> Enabled | None:
    """What was recorded of the enabled model that has this text config, None if it is not enabled."""
    entry = _enabled.get(id(config))
    return None if entry is None else entry[1]


def forget_enabled(config: PreTrainedConfig) -> str | None:
    """Undo `record_enabled`; returns the attention implementation of before, None if the model was not enabled."""
    entry = _enabled.pop(id(config), None)
    return None if entry is None else entry[1].previous_attention


class Clock:
    """Where all layers of one device are in time: static tensors that only in-place operations touch.

    ``time`` [3] int64 is (past, total, ring_lo): tokens of all finished forwards, tokens after the running one, oldest slot
    that the rings may serve. A forward begins in the device's first quantised layer (``total = past + n``) and is committed
    by the model's last (``past = total``). One that died in between leaves ``past < total``: the next begins again at
    ``past``, and as the dead one may have overwritten ring slots, serves those from codes.
    ``start`` [B] int32 is the first valid slot of each row, ``origin`` [B] int32 the position of slot 0.
    """

    def __init__(self, batch_size: int, recent_tokens: int, first_position: int, device: torch.device):
        self.recent_tokens, self.first_position = recent_tokens, first_position
        self.time = torch.zeros(3, dtype=torch.int64, device=device)
        self.start = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.origin = torch.full((batch_size,), first_position, dtype=torch.int32, device=device)
        self._on_host: tuple[int, int, list[int]] | None = None
        self._asked = -1  # the last layer that wanted it
        self.mark_static()

    def tensors(self) -> tuple[Tensor, ...]:
        return self.time, self.start, self.origin

    def mark_static(self) -> None:
        for x in self.tensors():
            torch._dynamo.mark_static_address(x)

    def on_host(self, layer_idx: int) -> tuple[int, int, list[int]]:
        """(past, ring_lo, start) for a layer's attention. Waits for the device where a forward's first layer asks: one that does
        not follow the last that asked. Not while tracing."""
        if self._on_host is None or layer_idx <= self._asked:
            past, _, ring_lo = self.time.tolist()
            self._on_host = past, ring_lo, self.start.tolist()
        self._asked = layer_idx
        return self._on_host

    def begin(self, n: int) -> None:
        past, total, ring_lo = self.time.unbind()
        self.time.copy_(torch.stack((past, past + n, self._ring_begin(past, total, ring_lo, total > past))))

    def commit(self) -> None:
        _, total, ring_lo = self.time.unbind()
        self.time.copy_(torch.stack((total, total, ring_lo)))

    def crop(self, n: int) -> None:
        past, total, ring_lo = self.time.unbind()
        kept = past - n
        self.time.copy_(torch.stack((kept, kept, self._ring_begin(kept, total, ring_lo, total > kept))))

    def _ring_begin(self, kept: Tensor, written: Tensor, ring_lo: Tensor, dropped: Tensor) -> Tensor:
        """``ring_lo`` when of ``written`` tokens only ``kept`` stay: the dropped ones overwrote every ring slot before
        ``written - R``. What is fed from slot ``kept`` on is written anew, so it never lies beyond that."""
        overwritten = torch.minimum(torch.maximum(ring_lo, written - self.recent_tokens), kept)
        return torch.where(dropped, overwritten, ring_lo)

    def set_start(self, start: Tensor) -> None:
        """Fix ``start`` (and with it ``origin``) of the rows that hold no valid token yet. start [B] int32."""
        past = self.time[0]
        start = torch.where((past == 0) | (self.start >= past), start, self.start)
        self.start.copy_(start)
        self.origin.copy_(self.first_position - start)

    def reset(self) -> None:
        self.time.zero_()
        self.start.zero_()
        self.origin.fill_(self.first_position)


class PaddingCheck:
    """Whether the 2-D mask of decode steps has holes (masked tokens after a row's first valid one), without waiting for the device.

    Which mask attention needs depends on that, so the host must know; but asking the device stalls every step. A decode
    step's mask is the one before it and a column for its own token, and whether that column is masked shows in no result of
    its own step: the query always sees itself. So a step may use the answer about the mask before it, which was copied
    while that step ran. A mask that changed in older columns makes that answer wrong: it raises one step late, or in
    `MillionStaticCache.check`; who knows that it changed calls `MillionStaticCache.forget_mask` first.
    """

    def __init__(self) -> None:
        self.holes: bool | None = None  # of the newest mask whose answer has arrived; None: nothing is known
        self._columns = 0  # of the last mask's `falls`
        self._answer: Tensor | None = None  # [2] bool on the host: holes before the last column, a hole in it
        self._copied: torch.cuda.Event | None = None
        self._pending = False

    def know(self, falls: Tensor) -> bool:
        """Ask the device about a forward's mask, and wait. falls as in `step`. Returns whether it has holes. Raises as `step`."""
        columns = falls.shape[1]
        if columns == self._columns:
            self._pending = False  # the forward before did not finish: nothing of it counts
        self.arrived()
        self.holes, self._columns = bool(falls.any()), columns
        return self.holes

    def step(self, falls: Tensor) -> bool:
        """Whether the mask of a decode step has holes that its query must not see.

        falls: bool [B, length - 1] on the device, True where the next column is masked and the column itself is not.
        Raises RuntimeError if the mask of the step before had changed in columns that were there already.
        """
        if self.holes is None or falls.shape[1] != self._columns + 1:  # not the last forward's mask and one column
            return self.know(falls)
        self.arrived()
        self._columns += 1
        if self._answer is None:
            on_gpu = falls.device.type == "cuda"
            with torch.inference_mode(False):  # later steps may run outside of it
                self._answer = torch.empty(2, dtype=torch.bool, pin_memory=on_gpu)
            self._copied = torch.cuda.Event() if on_gpu else None
        self._answer[0].copy_(falls[:, :-1].any(), non_blocking=True)
        self._answer[1].copy_(falls[:, -1:].any(), non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(falls.device))
        self._pending = True
        return self.holes

    def arrived(self) -> None:
        """Take in the answer about the last step's mask, which was copied before that step's forward began. Raises as `step`."""
        if not self._pending:
            return
        if self._copied is not None:
            self._copied.synchronize()
        used, self._pending = self.holes, False
        older, newest = self._answer.tolist()
        self.holes = older or newest
        if older and not used:
            raise RuntimeError(
                "the attention mask of the last decode step hides tokens that the mask before it did not: that step still saw them and "
                "its result is wrong; call the cache's forget_mask() before a forward of one token whose mask hides what the last one showed"
            )

    def reset(self) -> None:
        self.holes, self._columns, self._pending = None, 0, False

    def __deepcopy__(self, memo: dict) -> PaddingCheck:
        return PaddingCheck()  # an event cannot be copied; the twin asks anew


class CacheState:
    """What the layers of one cache share: configuration, clocks, and the Python flags that flip at most once a prompt."""

    def __init__(
        self, config: PreTrainedConfig, codebooks: Codebooks, recent_tokens: int, sink_tokens: int, first_position: int
    ):
        self.config, self.codebooks = config, codebooks
        self.recent_tokens, self.sink_tokens, self.first_position = recent_tokens, sink_tokens, first_position
        self.clocks: list[Clock] = []
        self.empty = True  # no forward has finished since the last reset
        self.counted: int | None = None  # tokens by the host's count, see `_make_room`; None: not known
        self.feeding: int | None = None  # tokens of an eager forward that has begun and not finished
        self.rolls_back = True  # whether a forward that dies leaves no trace: not with layers that keep their own count
        self.million = False  # whether the tokens it holds came through the million attention function
        self.fingerprint_seen = False
        self.twin: Enabled | None = None  # a copy of the model, with a config of its own, that was found to be the same
        self.warned_dequantising = False
        self.padding = PaddingCheck()

    def clock(self, batch_size: int, device: torch.device) -> tuple[Clock, bool]:
        """The device's clock, and whether the caller is the first to ask for it (then it begins every forward)."""
        for clock in self.clocks:
            if clock.time.device == device:
                return clock, False
        self.clocks.append(Clock(batch_size, self.recent_tokens, self.first_position, device))
        return self.clocks[-1], True

    def start(self, device: torch.device) -> Tensor:
        """First valid slot of each row, int32 [B], on a device, as far as the quantised layers know; [1] before there is a clock."""
        if not self.clocks:
            return torch.zeros(1, dtype=torch.int32, device=device)
        return next((c for c in self.clocks if c.time.device == device), self.clocks[0]).start.to(device)

    def commit(self) -> None:
        for clock in self.clocks:
            clock.commit()
        if not torch.compiler.is_compiling():
            before = 0 if self.empty else self.counted
            self.counted = None if before is None or self.feeding is None else before + self.feeding
            self.feeding = None
        if self.empty:
            self.empty = False

    def recount(self, tokens: int) -> None:
        """The cache was reset or cropped: what it holds now."""
        self.empty = tokens == 0
        self.counted = tokens or None  # a compiled forward may be what fills it
        self.feeding = None

    def announce(self, n: int, max_cache_len: int) -> None:
        """An eager forward of n tokens is about to begin: raise if it cannot, before any layer has written anything."""
        if self.feeding is not None and not self.rolls_back:
            raise RuntimeError(
                "the forward before this one did not finish, and the model's sliding-window layers cannot take its tokens back: reset() "
                "the cache"
            )
        self._make_room(n, max_cache_len)
        self.feeding = n

    def announce_mask(self, n: int, max_cache_len: int) -> None:
        """A mask for a forward of n more tokens is asked for outside of compiled code, the forward itself may be compiled. Raises
        ValueError if they do not fit."""
        self._make_room(n, max_cache_len)
        if self.counted is not None:
            self.counted += n

    def _make_room(self, n: int, max_cache_len: int) -> None:
        """Raise ValueError if n more tokens do not fit.

        Reading the clock is free on the CPU. On a GPU it would wait for the device in every step: there the host counts, too much
        rather than too little (an eager forward counts twice, when its mask is asked for and when it has finished), and reads the
        clock only when by that count the cache is full: as often as the room that is left can be halved. What Python does not see
        at all, compiled forwards with a 4-D mask of the user's and replays of a graph that the user captured, the op drops when
        the cache is full, and `check` reports it.
        """
        if self.feeding is not None:
            self.counted = None  # the forward before died, or was finished by compiled code
        if self.empty:
            past = 0
        else:
            time = self.clocks[0].time
            past = None if time.device.type == "cpu" else self.counted
            if past is None or past + n > max_cache_len:
                if time.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                    return
                past = int(time[0])
            self.counted = past
        if past + n > max_cache_len:
            raise ValueError(
                f"the cache holds {past} tokens and max_cache_len is {max_cache_len}: {n} more do not fit; nothing was written"
            )

    def check_model(self, config: PreTrainedConfig) -> None:
        """Refuse codebooks of another model than the one with this text config, as far as `enable` recorded which it is.

        Raises:
            RuntimeError: the model was not enabled.
            ValueError: the codebooks were calibrated for another model.
        """
        own = config is self.config
        if own and self.fingerprint_seen:
            return
        record = enabled(config)
        if record is None:
            raise RuntimeError(
                f"the attention implementation is {ATTENTION!r} but this model was not enabled: call million_cache.enable(model) "
                "before the first forward, it checks that codebooks belong to the model"
            )
        if record is not self.twin:
            refuse_other_model(self.codebooks, record.fingerprint)
        if own:
            self.fingerprint_seen = True
        else:
            self.twin = record


def refuse_other_model(codebooks: Codebooks, seen: Fingerprint) -> None:
    """Raise ValueError naming every difference between the codebooks' model and the one at hand."""
    differences = codebooks.fingerprint.matches(seen)
    if differences:
        raise ValueError("these codebooks were calibrated for another model: " + "; ".join(differences))
