"""`CacheState` counts on the host, which on a GPU must not ask the device in every step: with a clock that plays a GPU's."""

from __future__ import annotations

import itertools

import pytest
import torch

from million_cache.state import CacheState

LENGTH = 1000


class GPUClock:
    """What `CacheState` uses of a `Clock`, and how often it reads it."""

    device = torch.device("cuda")

    def __init__(self):
        self.past = self.reads = 0

    @property
    def time(self):
        return self

    def __getitem__(self, index):
        assert index == 0
        self.reads += 1
        return self.past

    def commit(self):
        pass


class Forwards:
    """The kinds of forwards of n tokens, as the state hears of them, and what they do to the clock."""

    def __init__(self, monkeypatch):
        self.state, self.clock, self.capturing = CacheState(None, None, 0, 0, 0), GPUClock(), False
        self.state.clocks.append(self.clock)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)

    def _run(self, n):
        self.clock.past += n
        self.state.empty = False

    def eager(self, n):
        self.state.announce_mask(n, LENGTH)
        self.eager_with_a_mask_of_its_own(n)

    def eager_with_a_mask_of_its_own(self, n):
        self.state.announce(n, LENGTH)
        self.clock.past += n
        self.state.commit()

    def compiled(self, n):
        self.state.announce_mask(n, LENGTH)
        self._run(n)

    def compiled_with_its_mask(self, n):
        if self.clock.past + n <= LENGTH:  # nobody would see it
            self.state.counted = None  # as `MillionStaticCache.get_mask_sizes` does while tracing
            self._run(n)

    def finished_by_compiled_code(self, n):
        self.state.announce(n, LENGTH)
        self._run(n)

    def dies(self, n):
        self.state.announce_mask(n, LENGTH)
        self.state.announce(n, LENGTH)

    def captured(self, n):
        self.capturing = True
        try:
            self.state.announce_mask(n, LENGTH)
            self.state.announce(n, LENGTH)
            if not self.state.empty:
                self.state.commit()
        finally:
            self.capturing = False

    def cropped(self, n):
        self.clock.past -= min(n, self.clock.past)
        self.state.recount(self.clock.past)

    def filled_by_compiled_code(self, n):
        if self.state.empty:  # with a mask of the caller's: else nobody sees it
            self._run(n)


KINDS = [getattr(Forwards, x) for x in vars(Forwards) if not x.startswith("_")]


@pytest.mark.parametrize(
    "kinds", list(itertools.product(KINDS, repeat=2)), ids=lambda x: "-".join(y.__name__ for y in x)
)
def test_what_does_not_fit_is_refused_and_nothing_else(monkeypatch, kinds):
    """Two kinds at a time: a mixture of all would put the count in order again and again."""
    forwards = Forwards(monkeypatch)
    clock = forwards.clock
    for which, n in zip(torch.randint(2, (400,)).tolist(), torch.randint(1, 12, (400,)).tolist()):
        past = clock.past
        try:
            kinds[which](forwards, n)
        except ValueError as e:
            assert past + n > LENGTH and f"the cache holds {past} tokens" in str(e)
            assert clock.past == past
        assert clock.past <= LENGTH


@pytest.mark.parametrize(("kind", "reads"), [("eager", 10), ("compiled", 1)])  # 10: the room that is left is halved
def test_the_clock_is_read_seldom(monkeypatch, kind, reads):
    forwards = Forwards(monkeypatch)
    for _ in range(LENGTH):
        getattr(forwards, kind)(1)
    assert forwards.clock.reads <= reads
    with pytest.raises(ValueError, match="1000 tokens and max_cache_len is 1000: 1 more"):
        getattr(forwards, kind)(1)


def test_cropped_to_nothing_and_filled_unseen(monkeypatch):
    forwards = Forwards(monkeypatch)
    forwards.eager(5)
    forwards.cropped(5)
    forwards.filled_by_compiled_code(LENGTH - 3)
    forwards.eager(3)
    with pytest.raises(ValueError, match="1000 tokens and max_cache_len is 1000: 1 more"):
        forwards.eager(1)
