"""Calibration text from files, from datasets, and from several of them in turns."""

from __future__ import annotations

import json

import pytest

from million_cache.loading import PIECE, UserError, contexts, read_dataset, read_texts


@pytest.fixture
def files(tmp_path):
    paths = []
    for name, length in (("a", 2 * PIECE + 5), ("b", PIECE)):
        paths.append(tmp_path / f"{name}.txt")
        paths[-1].write_text(name * length)
    return [str(path) for path in paths]


@pytest.fixture
def dataset(tmp_path):
    """A directory that the package `datasets` can read: 100 rows."""
    directory = tmp_path / "rows"
    directory.mkdir()
    rows = [{"number": i, "title": f"title {i}", "text": f"line {i} " + "x" * 50} for i in range(100)]
    (directory / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return str(directory)


def test_one_file_stays_as_it_is(files):
    assert read_texts(files[:1], 10) == (files[0], "a" * (2 * PIECE + 5))


def test_several_come_in_turns_and_whole(files):
    name, text = read_texts(files, 10**6)
    assert name == " + ".join(files)
    assert text == "\n".join(["a" * PIECE, "b" * PIECE, "a" * PIECE, "a" * 5])


def test_all_sources_are_among_the_first_tokens(files):
    _, text = read_texts(files, 16 * 100)  # 100 tokens
    assert set(text[:100]) == {"a", "b", "\n"}


def test_rows_without_text_are_left_out(tmp_path):
    rows = [{"text": "one", "url": "u"}, {"text": None, "url": "u"}, {"text": "three", "url": "u"}]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert read_dataset(str(tmp_path), 100) == "one\nthree"


def test_a_dataset_is_read_as_far_as_wanted(dataset):
    text = read_dataset(dataset, 500)
    assert text.startswith("line 0 x") and "title" not in text
    assert 500 <= len(text) < 600
    assert len(read_dataset(dataset, 10**6).splitlines()) == 100


def test_calibrating_on_a_file_and_a_dataset(million, model_dir, dataset, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("In the beginning was the word, and it was long. " * 300)
    result = million(
        "calibrate", "--model", model_dir, "--text", words, "--text", f"dataset:{dataset}", "--tokens", 2048, "--context", 256,
        "--sensitivity-tokens", 0, "--preset", "1bit", "--out", tmp_path / "books",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    provenance = json.loads((tmp_path / "books" / "million_config.json").read_text())["provenance"]
    assert provenance["text"] == f"{words} + dataset:{dataset}"


def test_datasets_that_do_not_do(dataset, tmp_path, tokenizer):
    (tmp_path / "numbers").mkdir()
    (tmp_path / "numbers" / "train.jsonl").write_text('{"number": 1}')
    with pytest.raises(UserError, match="no column of text among number"):
        read_dataset(str(tmp_path / "numbers"), 10)
    with pytest.raises(UserError, match="cannot read dataset:"):
        read_dataset(str(tmp_path / "absent"), 10)
    with pytest.raises(UserError, match="contexts of 512 need"):
        contexts(tokenizer, read_dataset(dataset, 10), 512, 9, "it")
