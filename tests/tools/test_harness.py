"""lm-evaluation-harness through the decode path: with everything exact it says what the dense cache says, from codes it does not."""

from __future__ import annotations

import json

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from million_cache.harness import MillionLM, run_harness
from million_cache.loading import UserError, shipped_text
from million_cache.state import enabled

CHOICE = """
task: choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
CONTINUE = """
task: continue
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{max_gen_toks: 8, until: ["@@"], do_sample: false}}
metric_list: [{{metric: exact_match}}]
filter_list:
  - {{name: all, filter: [{{function: take_first}}]}}
  - {{name: first, filter: [{{function: regex, regex_pattern: "(.)"}}, {{function: take_first}}]}}
"""


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory):
    """Two tasks on a file here: choosing how a text goes on, and continuing it."""
    directory = tmp_path_factory.mktemp("tasks")
    text, file = shipped_text("evaluation"), directory / "questions.jsonl"
    rows = [
        {
            "text": text[i : i + 900 + i % 7],
            "choices": [text[i + 907 : i + 930], text[i // 2 : i // 2 + 20]],
            "answer": 0,
        }
        for i in range(0, 8000, 1600)
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    for name, template in (("choose", CHOICE), ("continue", CONTINUE)):
        (directory / f"{name}.yaml").write_text(template.format(file=file))
    return directory


@pytest.fixture
def make(model, tokenizer, books):
    return lambda **window: MillionLM(model, tokenizer, books, batch_size=2, **window)


def test_an_exact_window_scores_as_the_dense_cache(model, tokenizer, make):
    ids = torch.randint(2, 500, (2, 200))
    dense = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal")._model_call(ids)
    torch.testing.assert_close(make(recent_tokens=256)._model_call(ids), dense, rtol=1e-3, atol=1e-3)
    coded = make()._model_call(ids)
    assert coded.shape == dense.shape
    assert (coded - dense)[:, 100:].abs().max() > 0.1  # it does go through codes
    assert enabled(model.config) is None


@pytest.mark.parametrize("tokens", [1, 2, 65, 66])
def test_lengths_around_a_chunk(make, model, tokens):
    ids = torch.randint(2, 500, (1, tokens))
    torch.testing.assert_close(make(recent_tokens=256)._model_call(ids), model(ids).logits, rtol=1e-3, atol=1e-3)


def test_generation_goes_through_the_cache(make, model, tokenizer):
    ids = torch.randint(2, 500, (1, 150))
    options = {"max_length": 166, "stop": [], "attention_mask": torch.ones_like(ids)}
    dense = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal")._model_generate(ids, **options)
    assert torch.equal(make(recent_tokens=256)._model_generate(ids, **options), dense)
    assert not torch.equal(make()._model_generate(ids, **options), dense)


def test_the_command_writes_a_table(million, model_dir, books_dir, tasks_dir, tmp_path):
    result = million(
        "harness", "--model", model_dir, "--codebooks", books_dir, "--task", "choose", "--task", "continue", "--include", tasks_dir,
        "--out", tmp_path / "scores", "--batch-size", 2, "--recent", 1024,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["codebooks"]["tiny-1bit"]["config"]["recent_tokens"] == 1024
    values = {(row["task"], row["metric"], row["cache"]): row["value"] for row in found["rows"]}
    assert {cache for _, _, cache in values} == {"dense", "tiny-1bit"}
    assert {(task, metric) for task, metric, _ in values} == {
        ("choose", "acc"), ("continue", "exact_match,all"), ("continue", "exact_match,first"),
    }  # fmt: skip
    for (task, metric, cache), value in values.items():
        assert value == values[task, metric, "dense"], cache  # all of it lies in the window
    assert "| choose | acc | " in (tmp_path / "scores.md").read_text()


def test_an_unknown_task_is_named(model, tokenizer, books, tmp_path):
    with pytest.raises(UserError, match="no task called nonsense"):
        run_harness(model, tokenizer, "tiny", {"ours": books}, ["nonsense"], tmp_path / "x")
