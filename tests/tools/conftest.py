"""A tiny Llama with a tiny tokenizer on disk, its codebooks, and the real SmolLM2, each made once a session."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from typer.testing import CliRunner

from million_cache import PQConfig, calibrate
from million_cache.calibration import calibrate_all
from million_cache.cli import app
from million_cache.loading import load_model, shipped_text
from tests.tools.tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def model():
    return tiny_llama()


@pytest.fixture(scope="session")
def tokens(tokenizer):
    """int64 [N] of the shipped evaluation text."""
    return torch.tensor(tokenizer(shipped_text("evaluation"), verbose=False).input_ids)


@pytest.fixture(scope="session")
def books(model, tokenizer):
    """1 bit codebooks of the tiny model, window and sinks as small as they get: everything that can differ does."""
    ids = torch.tensor(tokenizer(shipped_text("calibration"), verbose=False).input_ids[:4200])
    config = PQConfig(k_subspace_dim=8, v_subspace_dim=8, frame_tokens=128, recent_tokens=8, sink_tokens=2)
    return calibrate(model, ids, config, context=512, iterations=3, progress=False)


@pytest.fixture(scope="session")
def model_dir(model, tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "tiny"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def books_dir(books, tmp_path_factory):
    directory = tmp_path_factory.mktemp("books") / "tiny-1bit"
    books.save_pretrained(directory)
    return directory


@pytest.fixture
def million(monkeypatch):
    """Run ``million`` with arguments; ``.exit_code``, ``.stdout``, ``.stderr``. Calibration is short."""
    monkeypatch.setattr("million_cache.programs.calibrate_all", partial(calibrate_all, iterations=2))
    return lambda *args, **kwargs: CliRunner().invoke(app, [str(x) for x in args], **kwargs)


@pytest.fixture(scope="session")
def smollm2():
    """The demo's model and tokenizer, fetched as the demo fetches them."""
    return load_model("smollm2")
