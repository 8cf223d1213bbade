"""Writes docs/models.md from what is measured on the models that the tests run; `test_models_table` fails when it is out of date.

PYTHONPATH=src:. python -m tests.cache.models_table
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from million_cache.loading import KNOWN_MODELS
from million_cache.models import check_supported, full_attention_layers, head_dim, kv_heads, measure_rotations
from tests.cache.tiny_models import FAMILIES, REFUSED

PAGE = Path(__file__).parents[2] / "docs" / "models.md"

# Rows of the checkpoints that `test_models_table` loads where they are on the machine, and checks there; keys: `KNOWN_MODELS`.
CHECKPOINTS = {
    "smollm2": "| SmolLM2-135M-Instruct | `LlamaForCausalLM` | 30 of 30 | 9 x 3 x 64 | half, 64 of 64 |",
    "gemma3-270m": "| Gemma-3 270M | `Gemma3ForCausalLM` | 3 of 18 | 4 x 1 x 256 | half, 256 of 256 |",
}

HEADER = """\
<!-- Written by `python -m tests.cache.models_table`; tests/cache/test_models_table.py checks it. -->

# Models

A model works if its decoder layers hand ordinary keys and values to transformers' attention interface. Which layers can be
quantised follows from the configuration, and how keys rotate is measured, so most models need no code here.
`million_cache.enable` and `MillionStaticCache` refuse the others, with the reason.

## Tested

Tiny models of these classes with random weights, in float32: with lossless codes `generate` gives the text of the dense cache,
with left padding and without, and `torch.compile(fullgraph=True)` traces a decode step and repeats its logits
(`tests/cache/test_architectures.py`).

| model | quantised layers | rotation: pairing, channels | what is special |
| --- | --- | --- | --- |
"""

REAL = """
Checkpoints, with lossless codes of a prompt with left padding (`tests/cache/test_models_table.py`, where they are on the machine):

| checkpoint | model | quantised layers | query heads x KV heads x head_dim | rotation: pairing, channels |
| --- | --- | --- | --- | --- |
"""

REASONS = """
Layers that are not quantised are sliding-window ones: they keep a dense cache of their window. *Channels* are those of a head
that rotate with the position; "none" is a layer whose keys do not.

## Refused

| model | reason given |
| --- | --- |
"""

FOOTER = """
Also refused: a head_dim that is no multiple of 8; dynamic NTK or longrope with a `max_cache_len` beyond the length at which the
model changes its frequencies; layers that differ in head_dim; a model whose attention is not PyTorch's
`scaled_dot_product_attention` or goes past transformers' attention interface; and, when it is asked for in a forward,
`output_attentions=True`, dropout, a bias on the scores, a paged cache.
"""


def rotations(model: PreTrainedModel) -> str:
    """Kinds and channels of the quantised layers' rotations, in the order of the layers, each once."""
    seen = {}
    for rotation in measure_rotations(model).values():
        channels = 0 if rotation.inv_freq is None else 2 * rotation.inv_freq.numel()
        seen[f"{rotation.kind}, {channels} of {head_dim(model.config)}" if channels else rotation.kind] = None
    return "; ".join(seen)


def quantised(model: PreTrainedModel) -> str:
    return f"{len(full_attention_layers(model.config))} of {model.config.get_text_config().num_hidden_layers}"


def checkpoint_row(name: str, model: PreTrainedModel) -> str:
    config = model.config.get_text_config()
    heads = f"{config.num_attention_heads} x {kv_heads(config)} x {head_dim(config)}"
    return (
        f"| {KNOWN_MODELS[name].title} | `{type(model).__name__}` | {quantised(model)} | {heads} | {rotations(model)} |"
    )


def family_row(family: str) -> str:
    model = FAMILIES[family]()
    special = FAMILIES[family].__doc__.strip().splitlines()[0].rstrip(".")
    return f"| `{type(model).__name__}` | {quantised(model)} | {rotations(model)} | {special} |"


def refused_row(name: str) -> str:
    try:
        check_supported(REFUSED[name][0]())
    except NotImplementedError as error:
        return f"| {name} | {error} |"
    raise AssertionError(f"{name} is not refused")


def page() -> str:
    """The whole of docs/models.md."""
    families, checkpoints, refused = map(family_row, FAMILIES), CHECKPOINTS.values(), map(refused_row, REFUSED)
    rows = [HEADER, *(f"{row}\n" for row in families), REAL, *(f"{row}\n" for row in checkpoints)]
    return "".join([*rows, REASONS, *(f"{row}\n" for row in refused), FOOTER])


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
