"""The model card of codebooks: README.md with the hub's metadata, what they are, their figures, and how to use them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from million_cache.codebook import Codebooks
    from million_cache.config import PQConfig

CARD_NAME = "README.md"
MARK = "<!-- written by million_cache: replaced when the codebooks are saved again -->"
EVALUATION_KEYS = (  # of what `million_cache.evaluate.evaluate` returns
    "kl", "top1", "perplexity", "perplexity_dense", "contexts", "context", "text", "text_sha256", "cache_bytes_16bit",
    "dense_cache_bytes_16bit", "recent_tokens", "sink_tokens", "position_offset",
)  # fmt: skip
TAGS = ("million", "kv-cache", "product-quantization", "quantization")


def _shown(source: str) -> str:
    """A text's source without the directories of somebody's disk; datasets of the hub (``dataset:owner/name``) whole."""
    name = source.removeprefix("dataset:")
    hub = name != source and name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
    return source if hub else source[: len(source) - len(name)] + Path(name).name


def may_write_card(directory: Path) -> bool:
    """Whether a directory's card is ours to write: not beside a checkpoint, and not over somebody else's README."""
    if (directory / "config.json").exists():
        return False
    path = directory / CARD_NAME
    return not path.exists() or MARK in path.read_text(encoding="utf-8", errors="replace")


def model_card(codebooks: Codebooks) -> str:
    """The text of the card.

    ``base_model`` and ``license`` of the metadata are those of the codebooks' provenance, where they are known; a model that
    was loaded from a directory has no id to give. The figures are those of calibration (``report``) and, if it has been run with
    ``--record``, of evaluation (``provenance["evaluation"]``).
    """
    from huggingface_hub import ModelCardData

    provenance, config = codebooks.provenance, codebooks.config
    base = _base_model(provenance)
    metadata = ModelCardData(
        base_model=base, library_name="million", license=provenance.get("license"), tags=list(TAGS), pipeline_tag="text-generation"
    )  # fmt: skip
    f = codebooks.fingerprint
    shape = f"{f.model_type}, {f.num_layers} layers, {f.kv_heads} KV heads of {f.head_dim} channels"
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        MARK,
        f"# {config.bits_per_element:.4g}-bit codebooks for the KV cache of {base or 'a ' + f.model_type + ' model'}",
        "Product-quantisation codebooks for [MILLION](https://arxiv.org/abs/2504.03661), a key-value cache of codes for Hugging "
        "Face transformers. They hold no weights: they go with the model they were calibrated on, and are refused for any other.",
        _usage(base),
        "## What they are",
        _table(
            {
                "model": shape,
                "bits a cached element": _bits(config),
                "layers with codes": f"{len(codebooks.layers)} of {f.num_layers}",
                "exact tokens": f"the last {config.recent_tokens} and the first {config.sink_tokens}",
                "RoPE frames": f"{config.frame_tokens} tokens" if config.frame_tokens else "none",
                "size in memory": f"{codebooks.nbytes / 1e6:.1f} MB, once a model",
            }
        ),
        "## Figures",
        *_evaluation(provenance.get("evaluation")),
        *_distortion(codebooks),
    ]
    if known := {k: str(provenance[k]) for k in ("text", "tokens", "seed", "date") if k in provenance}:
        if "text" in known:  # not where it lies on somebody's disk
            sources = known["text"].split(" + ")
            known["text"] = " + ".join(_shown(x) for x in sources)
        if provenance.get("finetune_steps"):
            known["fine-tuning"] = f"{provenance['finetune_steps']} steps"
            if held_out := provenance.get("finetune_held_out_kl"):
                known["fine-tuning"] += f", KL on held-out text {held_out[0]:.5f} to {held_out[1]:.5f}"
        if held_out := provenance.get("held_out"):
            known["KL on text not trained on"] = f"{held_out['kl']:.5f} ({held_out['tokens']} tokens)"
        parts += ["## Calibration", _table(known)]
    return "\n\n".join(parts) + "\n"


def _bits(config: PQConfig) -> str:
    keys, values = config.kv_bits
    apart = ", each layer's own" if config.allocation else ""
    return f"{config.bits_per_element:.4g} (keys {keys:.3g}, values {values:.3g}{apart})"


def _base_model(provenance: dict[str, Any]) -> str | None:
    """A hub id, if the calibration found one (`loading.origin`): later nobody can tell one from a relative directory."""
    name = provenance.get("base_model")
    return name if isinstance(name, str) and name.count("/") == 1 else None


def _usage(base: str | None) -> str:
    model = f'"{base}"' if base else "MODEL"
    return f"""```python
from transformers import AutoModelForCausalLM
from million_cache import Codebooks, MillionStaticCache, enable

model = AutoModelForCausalLM.from_pretrained({model})
codebooks = Codebooks.from_pretrained("THIS_REPOSITORY")  # its id, or a directory
enable(model)
cache = MillionStaticCache(model, codebooks, max_cache_len=4096)
output = model.generate(**inputs, past_key_values=cache)
```"""


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in rows.items())])


def _evaluation(result: dict[str, Any] | None) -> list[str]:
    """What `million evaluate --record` stored, against the same model with a dense cache."""
    if not result:
        return []
    return [
        f"Against the dense cache, on {result['contexts']} contexts of {result['context']} tokens of {Path(result['text']).name}, every "
        f"position scored through the decode path, the last {result['recent_tokens']} and the first {result['sink_tokens']} tokens exact:",
        _table(
            {
                "KL(dense \\|\\| quantised), nats": f"{result['kl']:.5f}",
                "top-1 agreement": f"{result['top1']:.4f}",
                "perplexity (dense)": f"{result['perplexity']:.3f} ({result['perplexity_dense']:.3f})",
                "bits an element with the exact tokens, 16-bit model": f"{16 * result['cache_bytes_16bit'] / result['dense_cache_bytes_16bit']:.2f}",
            }
        ),
    ]


def _distortion(codebooks: Codebooks) -> list[str]:
    """Distortion relative to energy, over all layers, and where it is worst."""
    if not codebooks.report:
        return []
    rows = {}
    for kind, name in (("k", "keys"), ("v", "values")):
        ratios = {}
        for i, report in codebooks.report.items():
            energy, distortion = (getattr(report, f"{kind}_{x}").double().mean(1) for x in ("energy", "distortion"))
            for head, ratio in enumerate((distortion / energy.clamp(min=1e-30)).tolist()):
                ratios[i, head] = ratio
        (layer, head), worst = max(ratios.items(), key=lambda x: x[1])
        mean = sum(ratios.values()) / len(ratios)
        rows[name] = f"{mean:.4f} (worst: {worst:.4f}, layer {layer}, KV head {head})"
    return ["Distortion relative to the energy on the calibration text, mean over heads:", _table(rows)]
