"""Long-context tasks that need no network: needles in a haystack, and synthetic tasks in the manner of RULER.

Each example is a haystack and questions about it. The haystack is prefilled into the cache, where it becomes codes; then each
question and its answer go through the decode path, on a copy of that cache. What is asked for always lies before the exact
window, so it is answered from codes. The dense cache of the same model answers the same questions.

The tasks follow RULER (Hsieh et al., arXiv 2404.06654) in what they hide and how they ask for it, and are easier where small
models would fail with any cache: see `TASKS`.
"""

from __future__ import annotations

import bisect
import copy
import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase, StaticCache

from million_cache.attention import DECODE_CHUNK, disable, enable
from million_cache.cache import MillionStaticCache
from million_cache.codebook import Codebooks
from million_cache.models import cache_argument

SINKS = 12  # tokens that no introduction is shorter than
WINDOW = 160  # tokens that always follow the last hidden fact, and so push it out of the presets' exact window of 128
DIGITS = 5  # of the numbers that are asked for
ADJECTIVES = (
    "amber", "bitter", "broken", "calm", "clever", "cold", "copper", "crimson", "dusty", "early", "frozen", "gentle", "golden",
    "hidden", "hollow", "humble", "iron", "lonely", "loud", "narrow", "northern", "pale", "patient", "purple", "quiet", "rapid",
    "rusty", "silent", "silver", "sleepy", "smooth", "southern", "steep", "stormy", "tall", "tiny", "velvet", "warm", "wild",
    "wooden",
)  # fmt: skip
NOUNS = (
    "anchor", "badger", "barrel", "beacon", "bridge", "candle", "castle", "cedar", "comet", "compass", "copper", "desert",
    "dragon", "engine", "falcon", "feather", "garden", "glacier", "hammer", "harbor", "island", "kettle", "ladder", "lantern",
    "meadow", "mirror", "mountain", "orchard", "otter", "pepper", "pigeon", "planet", "rabbit", "river", "saddle", "shadow",
    "spider", "temple", "tiger", "violin", "walnut", "window",
)  # fmt: skip


@dataclass(frozen=True)
class Example:
    """A haystack and what is asked about it.

    Attributes:
        task: a key of `TASKS`.
        length: tokens of haystack asked for.
        depth: of the needle, from 0 (start) to 1 (just before the window); None for facts all over the haystack.
        haystack: int64 [T], T at most ``length``.
        questions: pairs of question and answer, int64 [n] each. The answer follows its question at once.
    """

    task: str
    length: int
    depth: float | None
    haystack: Tensor
    questions: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class Answer:
    """How a cache answered one question.

    Attributes:
        logprob: log-probability of the whole right answer, nats.
        right: whether greedy decoding gives it.
        tokens: what is most likely at each place of the answer, after its right beginning.
    """

    logprob: float
    right: bool
    tokens: tuple[int, ...]


# ------------------------------------------------------------------------------------------------------- making examples


@dataclass(frozen=True)
class _Facts:
    """What a task hides: an introduction, lines of text, and questions with answers.

    ``together``: the lines follow each other, at the example's depth; else they are spread evenly, in their order.
    ``filler``: None for text around the lines, else a function that gives another line that nobody asks for.
    """

    introduction: str
    lines: Sequence[str]
    questions: Sequence[tuple[str, str]]
    together: bool = False
    filler: Callable[[], str] | None = None


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10 ** (DIGITS - 1), 10**DIGITS))


def _names(rng: random.Random, count: int) -> list[str]:
    every = [f"{a} {n}" for a in ADJECTIVES for n in NOUNS]
    return rng.sample(every, count)


def _needles(rng: random.Random, count: int, asked: int, together: bool) -> _Facts:
    names = _names(rng, count)
    numbers = {name: _number(rng) for name in names}
    lines = [f"\nThe special magic number for the {name} is {numbers[name]}.\n" for name in names]
    questions = [
        (
            f"\n\nWhat is the special magic number for the {name}? The special magic number for the {name} is",
            f" {numbers[name]}",
        )
        for name in rng.sample(names, asked)
    ]
    return _Facts(
        "Special magic numbers are hidden in the following text. Memorize them.\n\n", lines, questions, together
    )


def needle(rng: random.Random) -> _Facts:
    """RULER's single needle: one sentence with a number, at a depth, in running text."""
    return _needles(rng, 1, 1, together=True)


def multikey(rng: random.Random) -> _Facts:
    """RULER's multi-key needles: 8 sentences of the same form all over the text, 4 of which are asked for."""
    return _needles(rng, 8, 4, together=False)


def lookup(rng: random.Random) -> _Facts:
    """RULER's hardest retrieval: the haystack is nothing but pairs of key and value; 4 of them are asked for."""
    count = len(ADJECTIVES) * len(NOUNS)
    every = iter(_names(rng, count))

    def pair() -> str:
        if (name := next(every, None)) is None:
            raise ValueError(
                f"lookup: the haystack needs more than the {count} keys that there are; give a shorter length"
            )
        return f"{name}: {_number(rng)}\n"

    asked = [(next(every), _number(rng)) for _ in range(4)]
    return _Facts(
        "A list of keys and their values follows. Memorize it.\n\n",
        [f"{name}: {number}\n" for name, number in asked],
        [(f"\nThe value of one key in the list above is repeated here:\n{name}:", f" {number}") for name, number in asked],
        filler=pair,
    )  # fmt: skip


def variables(rng: random.Random) -> _Facts:
    """RULER's variable tracking: 3 chains, each of a number and a copy of it, all over the text.

    RULER asks for a whole chain; here each of its 2 links is asked for, the second one given the first.
    """
    names = rng.sample(NOUNS, 6)
    chains = [(names[i], names[3 + i], _number(rng)) for i in range(3)]
    values = [f"Variable {a} has the value {number}." for a, _, number in chains]
    copies = [f"Variable {b} is a copy of {a}." for a, b, _ in chains]
    questions = [
        question
        for (a, b, number), copied in zip(chains, copies)
        for question in (
            (f"\n\nVariable {b} is a copy of", f" {a}"),
            (f"\n\n{copied} Variable {a} has the value", f" {number}"),
        )
    ]
    introduction = "Variables and their values are hidden in the following text. Memorize them.\n\n"
    return _Facts(introduction, [f"\n{line}\n" for line in values + copies], questions)


TASKS: dict[str, Callable[[random.Random], _Facts]] = {
    "needle": needle,
    "multikey": multikey,
    "lookup": lookup,
    "variables": variables,
}


class _Words:
    """A tokenizer that gives plain token ids, and the tokens that a prompt opens with."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        opening = tokenizer("").input_ids
        self.opening = opening[:1] if tokenizer.bos_token_id in opening[:1] else []

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def split(self, question: str, answer: str) -> tuple[Tensor, Tensor]:
        """Tokens of a question and of the answer that continues it. Raises ValueError if a token holds parts of both."""
        both, first = self(question + answer), self(question)
        if both[: len(first)] != first:
            raise ValueError(f"the tokenizer joins the end of {question!r} with the beginning of {answer!r}")
        return torch.tensor(first), torch.tensor(both[len(first) :])


def make_examples(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    task: str,
    length: int,
    *,
    depths: Sequence[float] = (0.0, 0.5, 1.0),
    samples: int = 1,
    seed: int = 0,
) -> list[Example]:
    """Examples of one task and length: ``samples``, or so many at each depth where a task has depths.

    Args:
        text: what the facts are hidden in; each example takes a piece of it that begins at a random line.
        task: a key of `TASKS`.
        length: most tokens of a haystack; it falls short of that by less than a line of text.
        depths: of the needle, from 0 to 1, among the tokens before the last `WINDOW` of the haystack.
        seed: of everything random; an example depends on it and on task, length, depth and its number alone.

    Raises:
        ValueError: an unknown task, a depth out of range, a haystack too short for its facts, a text shorter than it, or one with more
            pairs than `lookup` has keys.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}, choose one of {', '.join(TASKS)}")
    if not all(0 <= d <= 1 for d in depths):
        raise ValueError(f"depths must be from 0 to 1, got {list(depths)}")
    words = _Words(tokenizer)
    lines = [words(line + "\n") for line in text.split("\n")]
    examples = []
    places: Sequence[float | None] = depths if task == "needle" else (None,)
    for depth in places:
        for number in range(samples):
            rng = random.Random(f"{seed} {task} {length} {depth} {number}")
            examples.append(_example(words, lines, task, length, depth, rng))
    return examples


def _example(
    words: _Words, lines: list[list[int]], task: str, length: int, depth: float | None, rng: random.Random
) -> Example:
    facts = TASKS[task](rng)
    opening = words.opening + words(facts.introduction)
    hidden = [words(line) for line in facts.lines]
    room = length - len(opening) - sum(map(len, hidden))
    filler: list[list[int]] = []
    start = rng.randrange(len(lines))
    while room > 0:
        if facts.filler:
            line = words(facts.filler())
        else:
            if len(filler) == len(lines):
                raise ValueError(f"the text is too short to hide facts in {length} tokens of it")
            line = lines[(start + len(filler)) % len(lines)]
        room -= len(line)
        if room >= 0:
            filler.append(line)
    # Where each line of filler begins, in tokens; what is hidden goes before one that leaves a window's worth after it.
    begins = [0, *itertools.accumulate(map(len, filler))]
    room = begins[-1] - WINDOW
    if room < 0:
        raise ValueError(f"{task}: {length} tokens are too few for its facts and a window of {WINDOW} after them")
    pieces = list(filler)
    for i in reversed(range(len(hidden))):
        place = room * (depth if facts.together else (i + rng.random()) / len(hidden))
        pieces.insert(bisect.bisect_right(begins, place) - 1, hidden[i])
    haystack = torch.tensor([*opening, *(token for piece in pieces for token in piece)])
    return Example(task, length, depth, haystack, tuple(words.split(q, a) for q, a in facts.questions))


# --------------------------------------------------------------------------------------------------------------- answering


@torch.no_grad()
def answer(model: PreTrainedModel, cache: Cache, example: Example) -> list[Answer]:
    """Prefill an example's haystack into an empty cache, then answer each question from a copy of it.

    A question and its right answer go in as chunks of at most `DECODE_CHUNK` tokens, which attend as single steps do. Greedy
    decoding gives the right answer if and only if each of its tokens is the most likely one after those before it, so one
    pass says both whether it does and how likely the answer is.

    Args:
        model: with the attention function that goes with the cache (`enable`, `disable`).
        cache: empty, for at least the haystack and the longest question with its answer. It holds the haystack afterwards.

    Returns:
        An `Answer` a question.
    """
    haystack = example.haystack[None].to(model.device)
    model.base_model(input_ids=haystack, use_cache=True, **cache_argument(model.base_model, cache))
    answers = []
    for question, right in example.questions:
        own = copy.deepcopy(cache)
        inputs = torch.cat((question, right[:-1]))[None].to(model.device)
        positions = haystack.shape[1] + torch.arange(inputs.shape[1], device=model.device)[None]
        parts = [
            model(a, position_ids=b, use_cache=True, **cache_argument(model, own)).logits[0].float()
            for a, b in zip(inputs.split(DECODE_CHUNK, 1), positions.split(DECODE_CHUNK, 1))
        ]
        log_p = torch.cat(parts)[len(question) - 1 :].log_softmax(-1).cpu()
        best = log_p.argmax(-1)
        total = log_p.gather(1, right[:, None]).double().sum().item()
        answers.append(Answer(total, torch.equal(best, right), tuple(best.tolist())))
    return answers


def run_tasks(
    model: PreTrainedModel,
    examples: Iterable[Example],
    codebooks: dict[str, Codebooks],
    *,
    recent_tokens: int | None = None,
    sink_tokens: int | None = None,
    progress: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Answer every example with the dense cache and with each set of codebooks.

    Args:
        model: a causal language model in evaluation mode; it is left disabled.
        codebooks: of this model, by name.
        recent_tokens, sink_tokens: exact tokens; default: the codebooks' own. At most `WINDOW` recent ones and `SINKS` first ones,
            or the cache would answer from them.
        progress: called after each example.

    Returns:
        A row for each example, question and cache: ``task``, ``length``, ``depth``, ``example`` (its number), ``question``,
        ``cache`` (``dense`` or a name), ``right``, ``logprob`` (nats, of the whole answer), ``tokens``, ``answer``, ``context``
        (tokens of the haystack).

    Raises:
        ValueError: a window longer than `WINDOW`, more sinks than `SINKS`, or codebooks of another model.
    """
    for name, books in codebooks.items():
        recent = books.config.recent_tokens if recent_tokens is None else recent_tokens
        sinks = books.config.sink_tokens if sink_tokens is None else sink_tokens
        if sinks > SINKS:
            raise ValueError(f"{name}: {sinks} sinks can hold the answer; give at most {SINKS}")
        if recent > WINDOW:
            raise ValueError(f"{name}: a window of {recent} tokens can hold the answer; give at most {WINDOW}")
    rows = []
    try:
        for number, example in enumerate(examples):
            longest = max(len(q) + len(a) for q, a in example.questions)
            capacity = len(example.haystack) + longest
            for name in ("dense", *codebooks):
                if name == "dense":
                    disable(model)
                    cache = StaticCache(config=model.config, max_cache_len=capacity)
                else:
                    enable(model)
                    cache = MillionStaticCache(
                        model.config, codebooks[name], capacity, recent_tokens=recent_tokens, sink_tokens=sink_tokens
                    )
                for i, got in enumerate(answer(model, cache, example)):
                    rows.append(
                        {
                            "task": example.task,
                            "length": example.length,
                            "depth": example.depth,
                            "example": number,
                            "question": i,
                            "context": len(example.haystack),
                            "cache": name,
                            "right": got.right,
                            "logprob": got.logprob,
                            "tokens": list(got.tokens),
                            "answer": example.questions[i][1].tolist(),
                        }
                    )
            progress()
    finally:
        disable(model)
    return rows


def summary(rows: list[dict[str, Any]], by: Sequence[str] = ("task", "length")) -> list[dict[str, Any]]:
    """Means of `run_tasks`' rows over the questions that share ``by`` and the cache, in the order in which they came.

    Returns:
        For each: the fields of ``by``, ``cache``, ``questions``, ``accuracy``, ``logprob`` (mean, nats, of a whole answer),
        ``logprob_change`` (mean difference to the dense cache's), ``flips`` (questions that only one of both got right), and
        ``same`` (share of questions in which the most likely tokens are the dense cache's at every place of the answer).
    """
    dense = {(r["example"], r["question"]): r for r in rows if r["cache"] == "dense"}
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((*(row[x] for x in by), row["cache"]), []).append(row)
    result = []
    for key, group in groups.items():
        pairs = [(r, dense[r["example"], r["question"]]) for r in group]
        n = len(group)
        result.append(
            {
                **dict(zip((*by, "cache"), key)),
                "questions": n,
                "accuracy": sum(r["right"] for r in group) / n,
                "logprob": math.fsum(r["logprob"] for r in group) / n,
                "logprob_change": math.fsum(r["logprob"] - d["logprob"] for r, d in pairs) / n,
                "flips": sum(r["right"] != d["right"] for r, d in pairs),
                "same": sum(r["tokens"] == d["tokens"] for r, d in pairs) / n,
            }
        )
    return result
