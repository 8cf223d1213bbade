"""What of a calibration is finished, on disk, so that one that was interrupted goes on.

A directory holds ``calibration.json``, the settings that everything in it depends on, and one safetensors file a finished part: a
sequence read, its gradients, a layer's codebooks, the state of fine-tuning. A part's file also holds the state of the random
generator after it, so what follows is the same whether the part was made or loaded. Files are written beside their place and
renamed: one that is there is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SETTINGS_NAME = "calibration.json"
GENERATOR = "generator"
SHOWN = 40  # characters of a setting that an error shows; hashes are longer


class Checkpoint:
    """Finished parts of one calibration.

    Args:
        directory: made if it is not there; None: nothing is kept, and nothing found.
        settings: all that the parts depend on, JSON by name.

    Raises:
        ValueError: the directory holds a calibration with other settings (says which), or something else.
    """

    def __init__(self, directory: str | os.PathLike | None = None, settings: dict[str, Any] | None = None) -> None:
        self.directory = None if directory is None else Path(directory).expanduser()
        if self.directory is None:
            return
        settings = json.loads(json.dumps(settings or {}))  # as they come back from the file
        if not is_checkpoint(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._write(SETTINGS_NAME, lambda path: path.write_text(json.dumps(settings, indent=2), encoding="utf-8"))
            return
        try:
            before = json.loads((self.directory / SETTINGS_NAME).read_text(encoding="utf-8"))
            differences = [
                _difference(k, before, settings) for k in settings | before if before.get(k) != settings.get(k)
            ]
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.directory / SETTINGS_NAME} is damaged, delete {self.directory}: {error}"
            ) from error
        if differences:
            raise ValueError(
                f"{self.directory} holds an unfinished calibration that differs in {'; '.join(differences)}: give it the same "
                "arguments to go on with it, or delete it (`--restart`) to start over"
            )

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and scalars of a part, as `save` got them and ``generator``; None if it is not there, or cannot be read."""
        path = self._path(name)
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a mapping
                return tensors, json.loads(file.metadata()["scalars"])
        except (SafetensorError, OSError) as error:
            warnings.warn(f"{path} cannot be read and is made again: {error}", stacklevel=2)
            return None

    def save(self, name: str, tensors: dict[str, Tensor], generator: torch.Generator, **scalars: Any) -> None:
        """Keep a part, in place of one of that name. Without room on the disk: warns, deletes all parts, and keeps no more.

        Args:
            generator: whose state belongs to the part.
            scalars: whatever JSON takes.
        """
        path = self._path(name)
        if path is None:
            return
        # Clones: safetensors refuses tensors that share memory.
        kept = {key: x.detach().cpu().contiguous().clone() for key, x in tensors.items()}
        kept[GENERATOR] = generator.get_state()
        try:
            self._write(path.name, lambda path: save_file(kept, path, metadata={"scalars": json.dumps(scalars)}))
        except (OSError, SafetensorError) as error:
            shutil.rmtree(self.directory, ignore_errors=True)
            warnings.warn(f"cannot go on from here if interrupted: {path} could not be written: {error}", stacklevel=2)
            self.directory = None

    def once(self, name: str, generator: torch.Generator, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of a part: loaded, with the generator put where it was after making them, or made and kept."""
        found = self.load(name)
        if found is None:
            tensors = make()
            self.save(name, tensors, generator)
            return tensors
        generator.set_state(found[0].pop(GENERATOR))
        return found[0]

    def drop(self, prefix: str) -> None:
        """Delete the parts whose names begin with ``prefix``: nothing needs them any more."""
        for path in self.directory.glob(f"{prefix}*.safetensors") if self.directory else ():
            path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path | None:
        return None if self.directory is None else self.directory / f"{name}.safetensors"

    def _write(self, name: str, write: Callable[[Path], Any]) -> None:
        partial = self.directory / f".{name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            write(partial)
            os.replace(partial, self.directory / name)
        finally:
            partial.unlink(missing_ok=True)


def delete_checkpoint(directory: str | os.PathLike) -> None:
    """Delete what an unfinished calibration has left in ``directory``, and the directory; nothing if it is not there.

    Raises:
        ValueError: the directory holds something else.
    """
    if is_checkpoint(Path(directory)):
        shutil.rmtree(directory)


def is_checkpoint(directory: Path) -> bool:
    """Whether it holds a calibration; False if it is empty or not there. Raises ValueError for something else."""
    if (directory / SETTINGS_NAME).is_file():
        return True
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(
            f"{directory} is there, and is not what an unfinished calibration leaves: give another, or delete it"
        )
    return False


def _difference(name: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    shown = [json.dumps(x.get(name)) for x in (before, now)]
    return f"{name} ({shown[0]}, now {shown[1]})" if max(map(len, shown)) <= SHOWN else name
