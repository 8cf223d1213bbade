"""docs/models.md says what the tests measure, of tiny models and, where they are installed, of checkpoints."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM

from million_cache.cache import MillionLayer
from million_cache.loading import KNOWN_MODELS, cache_dir, installed
from million_cache.models import full_attention_layers
from tests.cache.models_table import CHECKPOINTS, PAGE, checkpoint_row, page
from tests.cache.test_generate import LOGITS, assert_same_text, dense_then_million, left_padding

ROUNDING = 1e-2  # of the logits' scale: fp16 centroids through 30 layers


def test_the_page_is_what_is_measured():
    assert PAGE.read_text(encoding="utf-8") == page(), "run PYTHONPATH=src:. python -m tests.cache.models_table"


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request):
    """(name, model in float32 on the CPU) of a checkpoint that is installed or was fetched before: nothing is downloaded."""
    known = KNOWN_MODELS[request.param]
    file = installed(known) or cache_dir() / known.file
    if importlib.util.find_spec("gguf") is None or not known.is_file(file):
        pytest.skip(f"{known.title} is not here")
    # Not `loading.load_model`: the tokenizer in a GGUF file takes as long as the weights, and is not needed.
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return request.param, model.eval()


def test_checkpoint(checkpoint):
    name, model = checkpoint
    assert checkpoint_row(name, model) == CHECKPOINTS[name]
    ids = torch.randint(10, 30_000, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = left_padding(ids)
    want, got, (cache,) = dense_then_million(
        model,
        lambda make: model.generate(
            ids,
            attention_mask=mask,
            past_key_values=make(),
            pad_token_id=0,
            eos_token_id=None,
            max_new_tokens=8,
            do_sample=False,
            **LOGITS,
        ),
        start=(1 - mask).sum(-1),
    )
    equal = assert_same_text(want, got, rounding=ROUNDING)
    assert equal.any()
    quantised = [i for i, layer in enumerate(cache.layers) if isinstance(layer, MillionLayer)]
    assert quantised == full_attention_layers(model.config)
