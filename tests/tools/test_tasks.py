"""Long-context tasks: examples hide what they say where they say, and answers are those of greedy decoding from the cache."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, StaticCache

from million_cache import MillionStaticCache, disable, enable
from million_cache import tasks as module
from million_cache.loading import shipped_text
from million_cache.tasks import TASKS, WINDOW, Example, answer, make_examples, run_tasks, summary
from tests.cache.lossless import RecordingCache, lossless_codebooks

TEXT = shipped_text("evaluation")


def examples(tokenizer, task: str, length: int = 1024, **options) -> list[Example]:
    return make_examples(tokenizer, TEXT, task, length, **options)


# -- examples --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_what_is_asked_for_is_hidden_once_before_the_window(tokenizer, task):
    (example,) = examples(tokenizer, task, depths=[0.5])
    text = tokenizer.decode(example.haystack)
    before = tokenizer.decode(example.haystack[:-WINDOW])
    assert 1024 - 150 < len(example.haystack) <= 1024  # short of it by less than a line
    for question, right in example.questions:
        fact = tokenizer.decode(torch.cat((question, right))).split("\n")[-1]
        fact = fact[fact.rfind("Variable ") :] if task == "variables" else fact.rsplit("? ", 1)[-1]
        assert text.count(fact) == before.count(fact) == 1, fact


@pytest.mark.parametrize(("task", "count"), [("needle", 1), ("multikey", 4), ("lookup", 4), ("variables", 6)])
def test_questions(tokenizer, task, count):
    (example,) = examples(tokenizer, task, depths=[0.0])
    assert len(example.questions) == count
    answers = [tokenizer.decode(a) for _, a in example.questions]
    assert len(set(answers)) == count
    assert all(a[0] == " " for a in answers)
    if task != "variables":
        assert all(a[1:].isdigit() and len(a) == 1 + module.DIGITS for a in answers)


def test_needles_lie_at_their_depth(tokenizer):
    depths = [0.0, 0.25, 0.5, 0.75, 1.0]
    for example, depth in zip(examples(tokenizer, "needle", 2048, depths=depths), depths):
        assert example.depth == depth
        text = tokenizer.decode(example.haystack)
        place = len(tokenizer(text[: text.index("The special magic number")]).input_ids)
        # A line of the text has at most some 150 tokens.
        assert abs(place - depth * (2048 - WINDOW)) < 150
    first, *_, last = examples(tokenizer, "needle", 2048, depths=depths)
    assert "magic" in tokenizer.decode(first.haystack[:120])
    assert "magic" in tokenizer.decode(last.haystack[-WINDOW - 150 : -WINDOW])


def test_a_seed_means_the_same_examples_and_another_one_others(tokenizer):
    first, same, other = (examples(tokenizer, "multikey", samples=2, seed=s) for s in (3, 3, 4))
    assert all(torch.equal(a.haystack, b.haystack) for a, b in zip(first, same))
    assert not torch.equal(first[0].haystack, first[1].haystack)
    assert not torch.equal(first[0].haystack, other[0].haystack)
    # Whatever else is asked for.
    alone = examples(tokenizer, "needle", depths=[0.5], seed=3)[0]
    among = examples(tokenizer, "needle", depths=[0.0, 0.5], seed=3)[1]
    assert torch.equal(alone.haystack, among.haystack)


def test_more_pairs_than_there_are_keys(tokenizer, monkeypatch):
    monkeypatch.setattr("million_cache.tasks.ADJECTIVES", ["small"])
    with pytest.raises(ValueError, match=r"lookup: the haystack needs more than the .* keys that there are"):
        examples(tokenizer, "lookup", 2048)


def test_haystacks_open_as_a_prompt_does(tokenizer):
    class WithBos:
        bos_token_id = 0

        def __call__(self, text, add_special_tokens=True, **kwargs):
            encoded = tokenizer(text, add_special_tokens=False, **kwargs)
            if add_special_tokens:
                encoded["input_ids"] = [0, *encoded.input_ids]
            return encoded

    (example,) = examples(WithBos(), "lookup")
    assert example.haystack[0] == 0 and not (example.haystack[1:] == 0).any()
    assert all(0 not in question for question, _ in example.questions)


def test_impossible_examples_are_refused(tokenizer):
    with pytest.raises(ValueError, match="unknown task 'sing', choose one of needle"):
        examples(tokenizer, "sing")
    with pytest.raises(ValueError, match="depths must be from 0 to 1"):
        examples(tokenizer, "needle", depths=[1.5])
    with pytest.raises(ValueError, match="256 tokens are too few"):
        examples(tokenizer, "multikey", 256)
    # Enough tokens, but the only line that fits is shorter than the window.
    with pytest.raises(ValueError, match="600 tokens are too few"):
        make_examples(tokenizer, "word " * 300, "needle", 600)
    with pytest.raises(ValueError, match="the text is too short"):
        make_examples(tokenizer, "One line.\nAnd another.", "needle", 1024)


def test_a_tokenizer_that_joins_question_and_answer_is_refused():
    class Joins:
        bos_token_id = None

        def __call__(self, text, **kwargs):
            return type("Encoded", (), {"input_ids": [hash(text)] if text else []})

    with pytest.raises(ValueError, match="joins the end"):
        module._Words(Joins()).split("two plus two is", " 4")


# -- answers ---------------------------------------------------------------------------------------------------------------


def prompt(seed: int, length: int = 200) -> Example:
    """Random tokens, with two random questions of which the second is longer than a chunk."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(2, 512, (n,), generator=g)  # noqa: E731
    return Example("needle", length, 0.5, draw(length), ((draw(7), draw(3)), (draw(90), draw(5))))


@torch.no_grad()
def by_hand(model, example: Example, question: int) -> tuple[float, list[int]]:
    """Log-probability of the right answer and the likeliest tokens, from one dense forward of everything."""
    asked, right = example.questions[question]
    ids = torch.cat((example.haystack, asked, right))[None]
    log_p = model(ids).logits[0, -len(right) - 1 : -1].log_softmax(-1)
    return log_p.gather(1, right[:, None]).sum().item(), log_p.argmax(-1).tolist()


def test_the_dense_cache_answers_as_the_plain_model(model):
    example = prompt(0)
    got = answer(model, DynamicCache(config=model.config), example)
    for i, (found, (_, right)) in enumerate(zip(got, example.questions)):
        logprob, tokens = by_hand(model, example, i)
        assert math.isclose(found.logprob, logprob, rel_tol=1e-4)
        assert list(found.tokens) == tokens
        assert found.right == (tokens == right.tolist())


@torch.no_grad()
def greedy(model, cache, example: Example, question: int) -> list[int]:
    """One token at a time from the cache, as `generate` does it."""
    asked, right = example.questions[question]
    model(example.haystack[None], past_key_values=cache)
    said = [int(model(asked[None, i : i + 1], past_key_values=cache).logits[0, -1].argmax()) for i in range(len(asked))][-1:]  # fmt: skip
    while len(said) < len(right):
        said.append(int(model(torch.tensor([said[-1:]]), past_key_values=cache).logits[0, -1].argmax()))
    return said


def test_right_is_what_greedy_decoding_from_codes_gives(model, books):
    """The greedy text from the cache, one token at a time, is right when `answer` says so, and wrong when it says so."""
    example = prompt(1)
    enable(model)
    try:
        said = [greedy(model, MillionStaticCache(model, books, 320), example, i) for i in (0, 1)]
        likely = tuple((q, torch.tensor(s)) for (q, _), s in zip(example.questions, said))
        wrong = tuple((q, torch.cat((a[:-1], (a[-1:] + 1) % 512))) for q, a in likely)
        for questions, want in ((likely, True), (wrong, False)):
            got = answer(model, MillionStaticCache(model, books, 320), replace(example, questions=questions))
            assert [x.right for x in got] == [want, want]
    finally:
        disable(model)


def test_lossless_codes_answer_as_the_dense_cache_and_coarse_ones_do_not(model, books):
    """So what is answered comes from codes: only they differ."""
    example = prompt(2, length=150)
    recording = RecordingCache(model.config)
    with torch.no_grad():
        everything = torch.cat((example.haystack, *example.questions[1]))[None]
        model(everything, past_key_values=recording)
    lossless = lossless_codebooks(model, [recording], replace(books.config, recent_tokens=0, sink_tokens=0))
    only = replace(example, questions=example.questions[1:])
    rows = run_tasks(model, [only], {"lossless": lossless, "coarse": books}, recent_tokens=0, sink_tokens=0)
    dense, same, coarse = (r["logprob"] for r in rows)
    assert [r["cache"] for r in rows] == ["dense", "lossless", "coarse"]
    assert abs(same - dense) < 0.02 * abs(coarse - dense)
    assert rows[1]["tokens"] == rows[0]["tokens"]
    assert math.isclose(dense, by_hand(model, example, 1)[0], rel_tol=1e-4)


def test_the_first_question_leaves_no_trace_in_the_second(model, books):
    example = prompt(3)
    both = run_tasks(model, [example], {"x": books})
    alone = run_tasks(model, [replace(example, questions=example.questions[1:])], {"x": books})
    assert [r["logprob"] for r in both if r["question"] == 1] == pytest.approx([r["logprob"] for r in alone], rel=1e-6)
    assert model.config._attn_implementation != "million"


def test_a_window_that_holds_the_answer_is_refused(model, books):
    with pytest.raises(ValueError, match="x: 13 sinks can hold the answer"):
        run_tasks(model, [prompt(1)], {"x": books}, sink_tokens=13)
    with pytest.raises(ValueError, match="x: a window of 200 tokens can hold the answer"):
        run_tasks(model, [prompt(0)], {"x": books}, recent_tokens=200)


def test_the_static_dense_cache_is_as_long_as_needed(model, monkeypatch):
    made = []
    monkeypatch.setattr(module, "StaticCache", lambda config, max_cache_len: made.append(max_cache_len) or StaticCache(config=config, max_cache_len=max_cache_len))  # fmt: skip
    assert len(run_tasks(model, [prompt(0)], {})) == 2
    assert made == [200 + 95]


def test_summary_by_hand():
    def row(example, cache, right, logprob, tokens):
        return {"task": "t", "length": 1, "example": example, "question": 0, "cache": cache, "right": right, "logprob": logprob, "tokens": tokens}  # fmt: skip

    rows = [
        row(0, "dense", True, -1.0, [1]), row(0, "x", True, -2.0, [1]),
        row(1, "dense", True, -1.0, [1]), row(1, "x", False, -4.0, [2]),
    ]  # fmt: skip
    dense, x = summary(rows)
    assert (dense["accuracy"], dense["logprob"], dense["flips"], dense["same"]) == (1, -1, 0, 1)
    assert x == {
        "task": "t", "length": 1, "cache": "x", "questions": 2, "accuracy": 0.5, "logprob": -3, "logprob_change": -2, "flips": 1,
        "same": 0.5,
    }  # fmt: skip


# -- the command -----------------------------------------------------------------------------------------------------------


def test_tasks_writes_its_files(million, model_dir, books_dir, tmp_path):
    out = tmp_path / "tasks"
    result = million(
        "tasks", "--model", model_dir, "--codebooks", books_dir, "--out", out, "--task", "needle", "--task", "lookup", "--length", 400,
        "--length", 500, "--depth", 0, "--depth", 1, "--samples", 1, "--seed", 5, "--recent", 16, "--sinks", 1, "--device", "cpu",
        "--dtype", "float32",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    got = json.loads((tmp_path / "tasks.json").read_text())
    assert {(r["task"], r["length"]) for r in got["rows"]} == {(t, n) for t in ("needle", "lookup") for n in (400, 500)}
    assert len(got["rows"]) == 2 * (2 * 2 * 1 + 2 * 4)  # caches; lengths x depths, lengths x questions
    assert got["codebooks"]["tiny-1bit"]["config"]["recent_tokens"] == 16
    assert {r["depth"] for r in got["needle"]} == {0, 1}
    assert (got["seed"], got["model"]) == (5, str(model_dir))
    assert all(r["answer"][1:].isdigit() for r in got["rows"])
    written = (tmp_path / "tasks.md").read_text()
    assert "| needle | 400 | tiny-1bit | 2 |" in written and "| 500 | dense |" in written
    assert "| lookup | all | tiny-1bit | 8 |" in written
    assert "needle" in result.stdout and "tiny-1bit" in result.stdout
    assert {x.name for x in tmp_path.iterdir()} == {"tasks.json", "tasks.md"}


def test_mistakes_are_named(million, model_dir, books_dir, tmp_path):
    run = ("tasks", "--model", model_dir, "--codebooks", books_dir)
    for arguments, words in (
        (("--out", tmp_path / "gone" / "x"), "there is no directory"),
        (("--out", "."), "it is a directory"),
        (("--out", tmp_path / "x", "--task", "sing"), "unknown task"),
        (("--out", tmp_path / "x", "--length", 256, "--task", "multikey"), "too few"),
        (("--out", tmp_path / "x", "--length", 400, "--task", "needle", "--recent", 300), "can hold the answer"),
    ):
        result = million(*run, *arguments)
        assert result.exit_code == 1
        assert words in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []
