"""Calibrations that were interrupted go on, to what one that was not gives, and never from another's parts."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from million_cache.calibration import calibrate_all, checkpoint
from million_cache.calibration.checkpoint import Checkpoint, delete_checkpoint
from tests.cache.test_calibration import CONFIG, tokens
from tests.cache.test_models import YARN
from tests.cache.tiny_models import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:codebooks trained on")
CONFIGS = replace(CONFIG, recent_tokens=16), replace(CONFIG, recent_tokens=16, k_subspace_dim=8)


def run(model=None, ids=None, configs=CONFIGS, **kw):
    """`calibrate_all` with everything that can be interrupted in it."""
    options = {"context": 256, "iterations": 2, "sensitivity_tokens": 512, "finetune_steps": 3, "progress": False}
    model, ids = model or tiny_llama(), tokens(1200) if ids is None else ids
    return calibrate_all(model, ids, configs, **{**options, **kw})


def assert_same(found, want):
    for one, other in zip(found, want, strict=True):
        assert one.layers.keys() == other.layers.keys()
        for i in one.layers:
            mine, theirs = one.layers[i], other.layers[i]
            assert (mine.frame_tokens, mine.rope_interleaved) == (theirs.frame_tokens, theirs.rope_interleaved)
            for a, b in ((mine.tensors, theirs.tensors), (vars(one.report[i]), vars(other.report[i]))):
                assert a.keys() == b.keys()
                assert all(torch.equal(a[name], b[name]) for name in a)
        same = {"date": "", "seconds": {}}
        assert one.provenance | same == other.provenance | same


@pytest.fixture
def subsampled(monkeypatch):
    """So that reading draws rows, as it does from a long text."""
    monkeypatch.setattr(sys.modules["million_cache.calibration.collect"], "SAMPLE_TOKENS", 1000)


def interrupt(monkeypatch, after: int):
    """Ctrl-C when the part after the next ``after`` ones has been made, before it is kept. Gives the parts that are kept."""
    names, save = [], Checkpoint.save

    def once_more(self, name, *args, **kw):
        if len(names) == after:
            raise KeyboardInterrupt
        names.append(name)
        save(self, name, *args, **kw)

    monkeypatch.setattr(Checkpoint, "save", once_more)
    return names


def test_it_goes_on_from_anywhere_bit_for_bit(tmp_path, monkeypatch, subsampled):
    want = run()
    done = []
    while True:
        with monkeypatch.context() as patch:
            names = interrupt(patch, 1)
            try:
                found = run(resume_dir=tmp_path / "deep" / "state")
                break
            except KeyboardInterrupt:
                done += names
    assert_same(found, want)
    assert done == [
        *(f"read-{n}" for n in range(5)), "sensitivity-0", "sensitivity-2",
        *(x for n in range(2) for x in (f"layer-{n}-0-0", f"layer-{n}-0-1", *[f"tuning-{n}"] * 3)),
    ][:-1]  # fmt: skip


def test_it_reads_no_text_again_once_the_layers_are_trained(tmp_path, monkeypatch):
    want = run(resume_dir=tmp_path)
    assert not list(tmp_path.glob("read-*")) and not list(tmp_path.glob("sensitivity-*"))

    def not_again(*args, **kw):
        raise AssertionError("it reads the text")

    monkeypatch.setattr("million_cache.calibration.collect", not_again)
    assert_same(run(resume_dir=tmp_path), want)
    delete_checkpoint(tmp_path)
    assert not tmp_path.exists()
    delete_checkpoint(tmp_path)  # nothing to do


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, r"seed \(0, now 1\)"),
        ({"ids": tokens(1200, seed=1)}, "differs in text:"),
        ({"configs": CONFIGS[::-1]}, r"k_subspace_dim \(\[4, 8\], now \[8, 4\]\)"),
        ({"configs": CONFIGS[:1]}, r"v_subspace_dim \(\[8, 8\], now \[8\]\)"),
        ({"context": 300}, r"text; context \(256, now 300\)"),
        ({"finetune_steps": 4}, r"finetune_steps \(3, now 4\)"),
        ({"sensitivity_tokens": 0}, r"sensitivity_contexts \(2, now 0\)"),
        ({"model": tiny_llama(seed=1)}, "differs in weights:"),
        ({"model": tiny_llama(rope_parameters=YARN)}, "differs in model_config:"),
        ({"model": tiny_llama().bfloat16()}, r"model_dtype \(\"torch.float32\", now \"torch.bfloat16\"\)"),
    ],
)
def test_another_calibration_is_refused(tmp_path, monkeypatch, change, named):
    interrupt(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        run(resume_dir=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=named):
        run(resume_dir=tmp_path, **change)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_one_weight_that_differs_is_noticed(tmp_path, monkeypatch):
    """A merged adapter leaves norms and embeddings, so the fingerprint, as they are."""
    interrupt(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        run(resume_dir=tmp_path)
    model = tiny_llama()
    model.model.layers[1].self_attn.v_proj.weight.data *= 1.01
    with pytest.raises(ValueError, match="differs in weights:"):
        run(model, resume_dir=tmp_path)


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for act in (lambda: run(resume_dir=tmp_path), lambda: delete_checkpoint(tmp_path)):
        with pytest.raises(ValueError, match="is not what an unfinished calibration leaves"):
            act()
    with pytest.raises(ValueError, match="is not what an unfinished calibration leaves"):
        run(resume_dir=tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_damaged_part_is_made_again(tmp_path):
    want = run(resume_dir=tmp_path)
    part = tmp_path / "layer-1-0-0.safetensors"
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="layer-1-0-0.safetensors cannot be read and is made again"):
        assert_same(run(resume_dir=tmp_path), want)
    (tmp_path / checkpoint.SETTINGS_NAME).write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        run(resume_dir=tmp_path)


def test_without_room_it_goes_on_without(tmp_path, monkeypatch):
    """A disk that is full must not cost the calibration."""
    save_file, calls = checkpoint.save_file, []

    def full(*args, **kw):
        calls.append(args)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        save_file(*args, **kw)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.warns(UserWarning, match="cannot go on from here if interrupted: .*No space left"):
        found = run(resume_dir=tmp_path / "state")
    assert len(calls) == 4 and not (tmp_path / "state").exists()
    assert_same(found, run())
