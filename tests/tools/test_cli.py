"""Every command and flag of ``million`` on a tiny model: what it writes, what it says, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace

import pytest
import torch

from million_cache import PRESETS, Codebooks
from million_cache.calibration.finetune import CentroidAdam
from million_cache.card import CARD_NAME
from million_cache.cli import Preset
from million_cache.codebook import CONFIG_NAME, TENSORS_NAME, LayerReport
from million_cache.evaluate import evaluate
from million_cache.loading import shipped_text
from million_cache.report import poor_heads
from tests.tools.tiny import tiny_llama

JSON_KEYS = {
    "kl", "top1", "perplexity", "perplexity_dense", "bits_per_element", "bits_per_element_total", "cache_bytes", "dense_cache_bytes",
    "codebook_bytes",
}  # fmt: skip


def test_help_names_every_command(million):
    result = million("--help")
    assert result.exit_code == 0
    for command in ("demo", "calibrate", "generate", "evaluate", "tasks", "compare", "inspect", "push"):
        assert command in result.stdout
        assert million(command, "--help").exit_code == 0


def test_presets_of_the_program_are_those_of_the_package():
    assert [x.value for x in Preset] == list(PRESETS)


# -- calibrate -------------------------------------------------------------------------------------------------------------


def test_calibrate_writes_codebooks_with_their_provenance(million, model_dir, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("In the beginning was the word, and the word was a token. " * 300)
    out = tmp_path / "books"
    result = million(
        "calibrate", "--model", model_dir, "--text", text, "--preset", "2bit", "--tokens", 2100, "--context", 512, "--seed", 3,
        "--recent", 16, "--sinks", 1, "--device", "cpu", "--dtype", "float32", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert {x.name for x in out.iterdir()} == {CONFIG_NAME, TENSORS_NAME, CARD_NAME}
    books = Codebooks.from_pretrained(out)
    assert (books.config.recent_tokens, books.config.sink_tokens, books.config.bits_per_element) == (16, 1, 2)
    assert books.provenance["text"] == str(text)
    assert len(books.provenance["text_sha256"]) == 64
    assert (books.provenance["tokens"], books.provenance["seed"]) == (4 * 512, 3)
    assert "2 bit" in result.stderr
    assert "warning: codebooks trained on" in " ".join(result.stderr.split())


def test_calibrate_takes_the_shipped_text_by_default(million, model_dir, tmp_path):
    result = million(
        "calibrate", "--model", model_dir, "--preset", "1bit", "--tokens", 2048, "--out", tmp_path / "books"
    )
    assert result.exit_code == 0, result.stderr
    assert "shipped" in Codebooks.from_pretrained(tmp_path / "books").provenance["text"]


def test_calibrate_says_what_to_expect(million, model_dir, tokenizer, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(shipped_text("calibration")[:20000])
    run = (
        "calibrate",
        "--model",
        model_dir,
        "--text",
        text,
        "--tokens",
        2048,
        "--context",
        512,
        "--recent",
        8,
        "--preset",
        "1bit",
    )
    result = million(*run, "--held-out", 300, "--out", tmp_path / "books")
    assert result.exit_code == 0, result.stderr
    books = Codebooks.from_pretrained(tmp_path / "books")
    held_out = books.provenance["held_out"]
    assert held_out["tokens"] == 300
    assert f"on 300 tokens not trained on: {held_out['kl']:.5f} (1 bit)" in " ".join(result.stderr.split())
    assert "| KL on text not trained on |" in (tmp_path / "books" / CARD_NAME).read_text()
    # Row 7 of 300 tokens begins at token 2100, behind the 2048 that were used.
    ids = torch.tensor(tokenizer(text.read_text(), verbose=False).input_ids[2100:2400])[None]
    assert evaluate(tiny_llama(), books, ids)["kl"] == pytest.approx(held_out["kl"], rel=1e-3)
    refused = million(*run, "--held-out", 12, "--out", tmp_path / "none")
    assert refused.exit_code == 1 and "would all stay exact: give more than 12" in " ".join(refused.stderr.split())
    assert "held_out" not in calibrated(million(*run, "--held-out", 0, "--out", tmp_path / "none"), tmp_path / "none")
    text.write_text(shipped_text("calibration")[:5000])
    result = million(*run, "--out", tmp_path / "short")
    assert "no tokens left" in result.stderr and "held_out" not in calibrated(result, tmp_path / "short")


def calibrated(result, directory):
    """Provenance of what `million calibrate` wrote."""
    assert result.exit_code == 0, result.stderr
    return Codebooks.from_pretrained(directory).provenance


def test_poor_heads_are_named(books):
    assert poor_heads(books) == []
    report = dict(books.report)
    bad = report[1].k_distortion.clone()
    bad[1] *= 10
    report[1] = replace(report[1], k_distortion=bad)
    ((layer, kind, head, ratio, times),) = poor_heads(replace(books, report=report))
    assert (layer, kind, head) == (1, "keys", 1)
    assert times > 3 and ratio == pytest.approx(float(bad[1].mean() / report[1].k_energy[1].mean()))


def test_heads_with_fewer_bits_are_no_poor_heads(books):
    """They are compared with heads that have as many."""

    def layer(subspaces, ratio):
        energy = torch.ones(8, subspaces)
        return LayerReport(energy, ratio * energy, energy, ratio * energy)

    report = {0: layer(8, 0.1), 1: layer(8, 0.1), 2: layer(4, 0.5)}
    assert poor_heads(replace(books, report=report)) == []
    report[2].v_distortion[3] *= 10
    ((number, kind, head, ratio, times),) = poor_heads(replace(books, report=report))
    assert (number, kind, head) == (2, "values", 3)
    assert (ratio, times) == (pytest.approx(5), pytest.approx(10))


def test_calibrate_several_presets_at_once(million, model_dir, tmp_path):
    run = ("calibrate", "--model", model_dir, "--tokens", 2048, "--context", 512, "--finetune-steps", 1, "--compact")
    result = million(*run, "--preset", "1bit", "--preset", "2bit", "--out", tmp_path / "both")
    assert result.exit_code == 0, result.stderr
    result = million(*run, "--preset", "1bit", "--out", tmp_path / "alone")
    assert {x.name for x in tmp_path.iterdir()} == {"both-1bit", "both-2bit", "alone"}
    both, alone, other = (Codebooks.from_pretrained(tmp_path / x) for x in ("both-1bit", "alone", "both-2bit"))
    assert torch.equal(both.layers[1].v_codebook, alone.layers[1].v_codebook)
    assert both.compact and both.provenance["finetune_steps"] == 1
    assert other.config.bits_per_element == 2


def test_calibrate_allocates_bits(million, model_dir, tmp_path):
    out, picture, scores = tmp_path / "books", tmp_path / "books.png", tmp_path / "scores.json"
    result = million(
        "calibrate", "--model", model_dir, "--preset", "2bit", "--tokens", 2048, "--context", 512, "--allocate", "--out", out
    )  # fmt: skip
    assert calibrated(result, out)["allocate"] is True
    books = Codebooks.from_pretrained(out)
    assert len(books.config.allocation) == 2 and books.config.bits_per_element <= 2
    assert len({k for k, _ in books.config.allocation}) == 2  # else the tables below are of the plain kind
    result = million("inspect", out, "--plot", picture)
    assert result.exit_code == 0, result.stderr
    assert "nan" not in result.stdout and picture.stat().st_size > 10_000
    for layer in (0, 1):
        result = million("inspect", out, "--layer", layer)
        assert result.exit_code == 0, result.stderr
        k, v = books.config.allocation[layer]
        subspaces = {int(x) for x in re.findall(r"^│ +(\d+) │", result.stdout, re.MULTILINE)}
        assert subspaces == set(range(64 // min(k, v)))
    result = million(
        "evaluate", "--model", model_dir, "--codebooks", out, "--context", 256, "--chunks", 1, "--json", scores
    )
    assert result.exit_code == 0, result.stderr
    found = json.loads(scores.read_text())
    assert found["bits_per_element"] == pytest.approx(books.config.bits_per_element)
    assert found["config"]["allocation"] == [list(pair) for pair in books.config.allocation]
    assert_says(
        million("calibrate", "--model", model_dir, "--out", out, "--allocate", "--sensitivity-tokens", 0),
        "allocate needs",
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_save_leaves_no_half_codebooks(million, model_dir, tmp_path, monkeypatch, error):
    def interrupted(*args, **kwargs):
        raise error

    monkeypatch.setattr("million_cache.codebook.save_file", interrupted)
    result = million(
        "calibrate", "--model", model_dir, "--preset", "1bit", "--tokens", 2048, "--out", tmp_path / "books"
    )
    assert result.exit_code != 0
    assert [x.name for x in (tmp_path / "books").iterdir()] == ["unfinished"]


def test_an_interrupted_calibration_goes_on(million, model_dir, tmp_path, monkeypatch):
    """Ctrl-C in the second of three steps of fine-tuning."""
    run = (
        "calibrate",
        "--model",
        model_dir,
        "--preset",
        "1bit",
        "--tokens",
        2048,
        "--context",
        512,
        "--finetune-steps",
        3,
    )
    want = million(*run, "--held-out", 0, "--out", tmp_path / "at-once")
    assert want.exit_code == 0, want.stderr
    out, step, steps = tmp_path / "books", CentroidAdam.step, []

    def interrupted(self, rate):
        steps.append(rate)
        if len(steps) == 2:
            raise KeyboardInterrupt
        step(self, rate)

    monkeypatch.setattr(CentroidAdam, "step", interrupted)
    result = million(*run, "--out", out)
    assert result.exit_code != 0
    assert "The same command goes on from" in result.stderr
    assert [x.name for x in out.iterdir()] == ["unfinished"]
    assert_says(million(*run, "--out", out, "--seed", 5), "seed (0, now 5)")
    assert_says(million("evaluate", "--model", model_dir, "--codebooks", out), "not completely written")
    result = million(*run, "--held-out", 0, "--out", out)
    assert result.exit_code == 0, result.stderr
    assert "Going on with the calibration in" in result.stderr
    assert len(steps) == 4  # the second again, and the third
    assert {x.name for x in out.iterdir()} == {CONFIG_NAME, TENSORS_NAME, CARD_NAME}
    assert (out / TENSORS_NAME).read_bytes() == (tmp_path / "at-once" / TENSORS_NAME).read_bytes()


def test_an_interrupted_calibration_can_be_forgotten(million, model_dir, tmp_path, monkeypatch):
    run = ("calibrate", "--model", model_dir, "--preset", "1bit", "--tokens", 2048, "--held-out", 0, "--out", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            "million_cache.calibration.train_layer", lambda *args, **kw: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert million(*run).exit_code != 0
    assert (tmp_path / "unfinished").is_dir()
    result = million(*run, "--seed", 5, "--restart")
    assert result.exit_code == 0, result.stderr
    assert "Going on" not in result.stderr and not (tmp_path / "unfinished").exists()
    assert Codebooks.from_pretrained(tmp_path).provenance["seed"] == 5
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "symphony.txt").write_text("in B minor")
    for extra in ((), ("--restart",)):
        assert_says(million(*run, *extra), "is not what an unfinished calibration leaves")


# -- generate --------------------------------------------------------------------------------------------------------------


def test_generate_prints_the_text_alone_on_stdout(million, model, tokenizer, model_dir, books_dir):
    prompt = "In the beginning God created the heaven and the earth."
    # A window as long as everything: the greedy text is the dense one.
    result = million(
        "generate", "--model", model_dir, "--codebooks", books_dir, "--prompt", prompt, "--max-new-tokens", 12, "--recent", 256,
        "--sinks", 0, "--raw", "--device", "cpu", "--dtype", "float32",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[
        0, ids.shape[1] :
    ]
    assert result.stdout.strip() == tokenizer.decode(want, skip_special_tokens=True).strip()
    assert f"{ids.shape[1]} + {len(want)} tokens" in " ".join(result.stderr.split())


def test_generate_reads_the_prompt_from_stdin(million, model_dir, books_dir):
    arguments = ("generate", "--model", model_dir, "--codebooks", books_dir, "--max-new-tokens", 4)
    piped = million(*arguments, "--prompt", "-", input="And the earth")
    given = million(*arguments, "--prompt", "And the earth")
    assert piped.exit_code == 0, piped.stderr
    assert piped.stdout == given.stdout


# -- evaluate --------------------------------------------------------------------------------------------------------------


def test_evaluate_writes_every_key_and_honours_every_flag(million, model_dir, books_dir, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("And it came to pass, that a query met a key, and the key was a code. " * 100)
    out = tmp_path / "result.json"
    result = million(
        "evaluate", "--model", model_dir, "--codebooks", books_dir, "--text", text, "--context", 160, "--chunks", 2, "--recent", 16,
        "--sinks", 1, "--position-offset", 50, "--device", "cpu", "--dtype", "float32", "--json", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    got = json.loads(out.read_text())
    assert set(got) >= JSON_KEYS
    assert (got["contexts"], got["context"], got["positions"]) == (2, 160, 320)
    assert (got["recent_tokens"], got["sink_tokens"], got["position_offset"]) == (16, 1, 50)
    assert got["model"] == str(model_dir)
    assert got["text"] == str(text)
    assert {"torch", "transformers", "million"} <= set(got["versions"])
    assert got["seconds"] > 0
    assert got["bits_per_element"] == 1
    assert "KL" in result.stdout
    assert {x.name for x in tmp_path.iterdir()} == {"text.txt", "result.json"}


def test_where_results_cannot_go_is_said_first(million, model_dir, books_dir, tmp_path, monkeypatch):
    """Before anything is evaluated or trained: directories in place of a file, and those that cannot be written to."""
    monkeypatch.setattr("million_cache.programs.evaluate_text", lambda *a, **kw: pytest.fail("it evaluates"))
    run = ("evaluate", "--model", model_dir, "--codebooks", books_dir)
    assert_says(million(*run, "--json", tmp_path), "it is a directory")
    assert_says(million(*run, "--json", "."), "it is a directory")
    assert_says(
        million("calibrate", "--model", model_dir, "--out", "..", "--preset", "4bit", "--preset", "2bit"), "give a name"
    )
    refused = set()
    monkeypatch.setattr("million_cache.cli.os.access", lambda path, mode: mode != os.W_OK or path not in refused)
    refused.add(tmp_path)
    assert_says(million(*run, "--json", tmp_path / "x.json"), "no permission to write")
    assert_says(million("calibrate", "--model", model_dir, "--out", tmp_path), "no permission to write")
    shutil.copytree(books_dir, tmp_path / "books")
    refused.add(tmp_path / "books")
    assert_says(million(*run[:3], "--codebooks", tmp_path / "books", "--record"), "no permission to write")


def test_evaluate_takes_the_codebooks_own_window_and_the_shipped_text(million, model_dir, books_dir, tmp_path):
    result = million(
        "evaluate",
        "--model",
        model_dir,
        "--codebooks",
        books_dir,
        "--context",
        128,
        "--chunks",
        1,
        "--json",
        tmp_path / "r.json",
    )
    assert result.exit_code == 0, result.stderr
    got = json.loads((tmp_path / "r.json").read_text())
    assert (got["recent_tokens"], got["sink_tokens"]) == (8, 2)
    assert "shipped" in got["text"]


def test_evaluate_records_the_result_in_the_card(million, model_dir, books_dir, tmp_path):
    shutil.copytree(books_dir, tmp_path / "books")
    run = ("evaluate", "--model", model_dir, "--context", 128, "--chunks", 1, "--record", "--json", tmp_path / "r.json")
    result = million(*run, "--codebooks", tmp_path / "books")
    assert result.exit_code == 0, result.stderr
    kl = json.loads((tmp_path / "r.json").read_text())["kl"]
    books = Codebooks.from_pretrained(tmp_path / "books")
    assert books.provenance["evaluation"]["kl"] == kl
    assert f"{kl:.5f}" in (tmp_path / "books" / CARD_NAME).read_text()
    assert_says(million(*run, "--codebooks", "org/books"), "org/books is not a directory")


def test_push_says_where_the_commit_is(million, books_dir, monkeypatch):
    def push(self, repo_id, **options):
        assert (repo_id, options) == ("me/books", {"private": True, "commit_message": "Hi"})
        return type("Commit", (), {"commit_url": "https://hub/commit/1"})

    monkeypatch.setattr(Codebooks, "push_to_hub", push)
    result = million("push", books_dir, "me/books", "--private", "--message", "Hi")
    assert result.stdout == "https://hub/commit/1\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_keeps_the_old_result(million, model_dir, books_dir, tmp_path, monkeypatch, error):
    out = tmp_path / "result.json"
    out.write_text("old")

    def interrupted(*args, **kwargs):
        raise error("disk full")

    monkeypatch.setattr("os.replace", interrupted)
    result = million(
        "evaluate", "--model", model_dir, "--codebooks", books_dir, "--context", 64, "--chunks", 1, "--json", out
    )
    assert result.exit_code != 0
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


# -- inspect ---------------------------------------------------------------------------------------------------------------


def test_inspect_shows_keys_and_values_of_every_layer(million, books_dir):
    """Whole, in the 80 columns of a terminal."""
    result = million("inspect", books_dir)
    assert result.exit_code == 0, result.stderr
    assert "energy" in result.stdout and "distortion" in result.stdout and "…" not in result.stdout
    rows = [x.strip("│ ").split("│") for x in result.stdout.splitlines() if "keys" in x or "values" in x]
    assert len(rows) == 2 * len(Codebooks.from_pretrained(books_dir).layers)
    assert all(0 < float(row[-1]) < 1 for row in rows)


def test_inspect_shows_one_layer_by_subspace(million, books_dir):
    result = million("inspect", books_dir, "--layer", 1)
    assert result.exit_code == 0, result.stderr
    rows = [x for x in result.stdout.splitlines() if "/" in x and x.strip("│ ")[:1].isdigit()]
    assert len(rows) == 64 // 8


@pytest.mark.parametrize("suffix, magic", [("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_inspect_draws_a_picture(million, books_dir, tmp_path, suffix, magic):
    picture = tmp_path / f"books.{suffix}"
    result = million("inspect", books_dir, "--plot", picture)
    assert result.exit_code == 0, result.stderr
    assert picture.read_bytes().startswith(magic)
    assert list(tmp_path.iterdir()) == [picture]


# -- mistakes --------------------------------------------------------------------------------------------------------------


def assert_says(result, *words):
    """Exit status 1, one paragraph on stderr with these words in it, no traceback."""
    said = " ".join(result.stderr.split())
    assert result.exit_code == 1, (result.exit_code, said)
    assert "Traceback" not in said
    assert said.startswith("error:") or "error:" in said
    for word in words:
        assert word in said, (word, said)


def test_missing_things_are_named(million, model_dir, books_dir, tmp_path):
    evaluate = ("evaluate", "--context", 64, "--chunks", 1)
    gone = tmp_path / "gone"
    assert_says(million(*evaluate, "--model", gone, "--codebooks", books_dir), str(gone))
    assert_says(million(*evaluate, "--model", model_dir, "--codebooks", gone), str(gone))
    assert_says(million(*evaluate, "--model", model_dir, "--codebooks", "gone"), "gone")
    assert_says(million(*evaluate, "--model", model_dir, "--codebooks", books_dir, "--text", gone), str(gone))
    assert_says(
        million(*evaluate, "--model", model_dir, "--codebooks", books_dir, "--json", gone / "x.json"), str(gone)
    )
    assert_says(million("inspect", gone), str(gone))
    assert_says(million("inspect", books_dir, "--plot", gone / "x.png"), str(gone))
    assert_says(million("inspect", books_dir, "--plot", tmp_path / "x.tune"), ".tune", "png")
    assert_says(million("inspect", books_dir, "--layer", 7), "no layer 7")
    assert_says(million("calibrate", "--model", model_dir, "--text", gone, "--out", tmp_path / "o"), str(gone))
    assert list(tmp_path.iterdir()) == []


def test_models_that_are_none(million, books_dir, tmp_path):
    generate = ("generate", "--codebooks", books_dir, "--prompt", "x")
    (tmp_path / "model.bin").write_bytes(b"x")
    assert_says(million(*generate, "--model", tmp_path / "model.bin"), ".gguf")
    assert_says(million(*generate, "--model", tmp_path), "config.json")
    assert_says(million(*generate, "--model", "no-such/model-at-all"), "no-such/model-at-all")


def test_devices_that_are_none(million, model_dir, books_dir):
    generate = ("generate", "--model", model_dir, "--codebooks", books_dir, "--prompt", "x")
    assert_says(million(*generate, "--device", "abacus"), "abacus")
    if not torch.cuda.is_available():
        assert_says(million(*generate, "--device", "cuda"), "cuda")


def test_texts_that_do_not_do(million, model_dir, books_dir, tmp_path):
    evaluate = ("evaluate", "--model", model_dir, "--codebooks", books_dir, "--text", tmp_path / "t")
    (tmp_path / "t").write_text("too short")
    assert_says(million(*evaluate), "8192", "longer text")
    (tmp_path / "t").write_text("  \n")
    assert_says(million(*evaluate), "empty")
    (tmp_path / "t").write_bytes(b"\xff\xfe\xfd")
    assert_says(million(*evaluate), "UTF-8")
    assert_says(
        million("generate", "--model", model_dir, "--codebooks", books_dir, "--prompt", "", "--raw"), "prompt is empty"
    )


def test_too_little_calibration_text(million, model_dir, tmp_path):
    calibrate = ("calibrate", "--model", model_dir, "--out", tmp_path / "books")
    (tmp_path / "t").write_text("too short")
    assert_says(million(*calibrate, "--text", tmp_path / "t"), "8192")
    assert_says(million(*calibrate, "--tokens", 20), "256")
    assert_says(million(*calibrate, "--out", tmp_path / "t"), "is a file")
    assert not (tmp_path / "books").exists()


def test_codebooks_of_another_model(million, tokenizer, books_dir, tmp_path):
    tiny_llama(seed=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for command in (("generate", "--prompt", "x"), ("evaluate", "--context", 64, "--chunks", 1)):
        assert_says(million(*command, "--model", tmp_path, "--codebooks", books_dir), "another model")


def test_damaged_codebooks(million, books_dir, tmp_path):
    for name in (CONFIG_NAME, TENSORS_NAME):
        (tmp_path / name).write_bytes((books_dir / name).read_bytes()[:1000])
    assert_says(million("inspect", tmp_path), str(tmp_path))


def test_two_rows_of_one_name_are_refused(million, model_dir, books_dir, tmp_path):
    for where in ("a", "b"):
        shutil.copytree(books_dir, tmp_path / where / "same")
    twice = [x for where in ("a", "b") for x in ("--codebooks", tmp_path / where / "same")]
    shutil.copytree(books_dir, tmp_path / "dense")
    for codebooks, name in ((twice, "same"), (["--codebooks", tmp_path / "dense"], "dense")):
        result = million("tasks", "--model", model_dir, *codebooks, "--out", tmp_path / "out")
        assert result.exit_code == 1 and f"a row called '{name}'" in " ".join(result.stderr.split())


def test_wrong_usage_exits_with_2(million, tmp_path):
    assert million("calibrate").exit_code == 2
    assert million("demo", "--preset", "5bit").exit_code == 2
    assert million("evaluate", "--model", "m", "--codebooks", "b", "--context", 0).exit_code == 2
    assert million("sing").exit_code == 2


def test_debug_shows_the_traceback(million, tmp_path):
    result = million("--debug", "inspect", tmp_path / "gone")
    assert result.exit_code == 1
    assert result.exception is not None
    assert not isinstance(result.exception, SystemExit)
