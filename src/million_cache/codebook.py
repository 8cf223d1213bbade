"""Codebooks of a model: centroids, key transform and rotation of every quantised layer, and their files.

On disk a directory, possibly a checkpoint's own, holds

* ``million_codebooks.safetensors``: ``layers.<i>.<name>`` for the tensors of `LayerCodebooks` and `LayerReport`, or, in less
  than half the space, what `compact_tensors` makes of the former;
* ``million_config.json``: format version, `PQConfig`, the model's `Fingerprint`, the scalars of each layer, provenance, and
  the SHA-256 of the tensor file, so that a pair that does not belong together is noticed;
* ``README.md``, a model card (`card.py`), unless that is somebody else's: nothing reads it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from million_cache.card import CARD_NAME, MARK, may_write_card, model_card
from million_cache.config import PQConfig
from million_cache.models import Fingerprint
from million_ops.layout import CENTROIDS, Layout

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

FORMAT = "million-codebooks"
FORMAT_VERSION = (
    3  # of layers with bits of their own; else 2 of compact storage, and 1 without it, for older releases to read
)
TENSORS_NAME = "million_codebooks.safetensors"
CONFIG_NAME = "million_config.json"


def invert(matrices: Tensor) -> Tensor:
    """Inverse of each of ``matrices`` [H, D, D]. Raises torch.linalg.LinAlgError for a singular one.

    One at a time: for a batch, torch 2.13 calls MKL's threaded LU from several threads at once, and with D = 256 on two cores
    that was seen to hang for good.
    """
    return torch.stack([torch.linalg.inv(x) for x in matrices])


@dataclass
class LayerCodebooks:
    """Everything that one layer's codes are made and read with. H KV heads, D channels, S subspaces of d channels.

    Attributes:
        k_codebook: [H, 256, S_k, d] fp16, centroids of the keys after frame rotation and transform.
        v_codebook: [H, 256, S_v, d] fp16, centroids of the values.
        k_transform: [H, D, D] fp32, T: a key k is encoded as ``T k``.
        k_transform_inv: [H, D, D] fp32, its inverse; queries pass its transpose.
        inv_freq: [rotary / 2] fp32, radians a token; None: keys are not rotated by frame.
        rope_interleaved: pairs (2 i, 2 i + 1) instead of (i, i + rotary / 2).
        frame_tokens: slots of a RoPE frame; 0 where ``inv_freq`` is None.
    """

    k_codebook: Tensor
    v_codebook: Tensor
    k_transform: Tensor
    k_transform_inv: Tensor
    inv_freq: Tensor | None
    rope_interleaved: bool
    frame_tokens: int

    @property
    def kv_heads(self) -> int:
        return self.k_codebook.shape[0]

    @property
    def head_dim(self) -> int:
        return self.k_codebook.shape[2] * self.k_codebook.shape[3]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, without ``inv_freq`` if there is none."""
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def inverse_for(self, layout: Layout) -> Tensor:
        """``k_transform_inv`` as attention over keys packed as ``layout`` wants it, always the same tensor.

        Raises ValueError where the layout wants fp16 and that does not hold its numbers.
        """
        if layout.id not in self._inverses:
            exact, inverse = self.k_transform_inv, layout.inverse(self.k_transform_inv)
            if (
                layout.half_inverse
                and ((inverse.float() - exact).norm(dim=(1, 2)) > 1e-3 * exact.norm(dim=(1, 2))).any()
            ):
                raise ValueError(
                    f"k_transform_inv has heads with entries up to {exact.abs().amax((1, 2)).tolist()}; the tensor core kernel holds it "
                    f"in fp16, which does not fit such numbers: give k_transform another scale"
                )
            self._inverses[layout.id] = inverse
        return self._inverses[layout.id]

    @cached_property
    def _inverses(self) -> dict[int, Tensor]:
        return {}

    def to(self, device: torch.device | str) -> LayerCodebooks:
        """The same on another device."""
        # Contiguous, as the kernels want them: an inverse from linalg is not, and would be copied in every call.
        moved = {name: t.to(device).contiguous() for name, t in self.tensors.items()}
        return LayerCodebooks(
            **{"inv_freq": None, **moved}, rope_interleaved=self.rope_interleaved, frame_tokens=self.frame_tokens
        )

    def compact_tensors(self) -> dict[str, Tensor]:
        """What compact storage holds of `tensors`: at 4 bit 1 % more distortion of the keys and values, at fewer bits less.

        A centroid's entries are uint8, in equal steps over the range of their channel of a subspace: ``offset + scale * x`` with
        both [H, S, d] fp32. (float8_e4m3 costs 5 to 10 % at 4 bit.) The transform is fp16, relative to its largest entry in a
        head, [H, 1, 1] fp32; its inverse is not stored.

        Raises ValueError where centroids lie so far apart that such steps would not tell most of them from each other.
        """
        found = {}
        for name in ("k_codebook", "v_codebook"):
            x = getattr(self, name).float()
            low, high = x.amin(1), x.amax(1)
            scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).tiny)
            most = x.quantile(0.9, dim=1) - x.quantile(0.1, dim=1)  # 0: most are equal, and equal they stay
            lost = (8 * scale > most) & (most > 0)
            if lost.any():
                raise ValueError(
                    f"{name}: in {int(lost.sum())} of {low.numel()} channels a few centroids lie so far away (up to "
                    f"{x.abs().amax(1)[lost].max():.4g}) that 8-bit steps would make most of the others equal; save these codebooks in "
                    f"full, with compact=False, or run the same `million calibrate` without --compact"
                )
            found[name] = ((x - low[:, None]) / scale[:, None]).round().to(torch.uint8)
            found |= {f"{name}_offset": low, f"{name}_scale": scale}
        size = self.k_transform.abs().amax((1, 2), keepdim=True)
        found |= {"k_transform": (self.k_transform / size).half(), "k_transform_scale": size}
        if self.inv_freq is not None:
            found["inv_freq"] = self.inv_freq
        return found

    @staticmethod
    def expand(found: dict[str, Tensor]) -> dict[str, Tensor]:
        """`tensors` of what `compact_tensors` gave. Raises KeyError if one is missing."""
        found = dict(found)
        for name in ("k_codebook", "v_codebook"):
            offset, scale = (found.pop(f"{name}_{x}")[:, None] for x in ("offset", "scale"))
            found[name] = (offset + scale * found[name].float()).half()
        found["k_transform"] = found["k_transform"].float() * found.pop("k_transform_scale")
        found["k_transform_inv"] = invert(found["k_transform"].double()).float()
        return found

    def check(self, config: PQConfig, where: str, dims: tuple[int, int] | None = None) -> None:
        """Raise ValueError, beginning with ``where``, unless shapes, dtypes and values fit each other and ``config``.

        ``dims``: channels a code of keys and of values; None: those of ``config``, which allocates none to single layers.
        """

        def need(tensor: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(
                    f"{where}: {name} must be {list(shape)} {dtype}, got {list(tensor.shape)} {tensor.dtype}"
                )

        if self.k_transform.ndim != 3:
            raise ValueError(
                f"{where}: k_transform must be [kv_heads, head_dim, head_dim], got {list(self.k_transform.shape)}"
            )
        H, D = self.k_transform.shape[:2]
        for name, d in zip("kv", dims or (config.k_subspace_dim, config.v_subspace_dim)):
            need(getattr(self, f"{name}_codebook"), f"{name}_codebook", (H, CENTROIDS, D // d, d), torch.float16)
        need(self.k_transform, "k_transform", (H, D, D), torch.float32)
        need(self.k_transform_inv, "k_transform_inv", (H, D, D), torch.float32)
        if self.inv_freq is not None:
            if self.inv_freq.ndim != 1 or 2 * self.inv_freq.numel() > D or self.inv_freq.dtype != torch.float32:
                raise ValueError(
                    f"{where}: inv_freq must be [rotary / 2] torch.float32 with rotary <= {D}, "
                    f"got {list(self.inv_freq.shape)} {self.inv_freq.dtype}"
                )
        elif self.frame_tokens:
            raise ValueError(f"{where}: frame_tokens must be 0 for keys that are not rotated, got {self.frame_tokens}")
        if self.frame_tokens not in (0, config.frame_tokens):
            raise ValueError(f"{where}: frame_tokens must be 0 or {config.frame_tokens}, got {self.frame_tokens}")
        for name, tensor in self.tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{where}: {name} holds NaN or inf")


@dataclass
class LayerReport:
    """What calibration measured of a layer, on its own sample. H KV heads, S subspaces, all fp32 [H, S].

    Energy is the mean squared distance of a sub-vector to the subspace's mean, distortion to its centroid; of the keys after
    the transform, so in units of the query-weighted error, scaled by head; of the values as they are.
    """

    k_energy: Tensor
    k_distortion: Tensor
    v_energy: Tensor
    v_distortion: Tensor


@dataclass
class Codebooks:
    """Codebooks of a model's full-attention layers, keyed by the model's layer index.

    Attributes:
        config: bits, frames and window they were made for.
        fingerprint: the model they belong to.
        provenance: tokens, text, seed, versions, date; free-form JSON.
        report: energy and distortion by layer; empty for codebooks that were not calibrated.
        compact: whether they were loaded from compact storage.

    Raises:
        ValueError: a layer whose tensors do not fit each other, the config or the fingerprint.
    """

    config: PQConfig
    fingerprint: Fingerprint
    layers: dict[int, LayerCodebooks]
    provenance: dict[str, Any] = field(default_factory=dict)
    report: dict[int, LayerReport] = field(default_factory=dict)
    compact: bool = False
    _moved: dict[torch.device, dict[int, LayerCodebooks]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if set(self.layers) != set(self.fingerprint.full_attention_layers):
            raise ValueError(
                f"codebooks are needed for layers {list(self.fingerprint.full_attention_layers)}, got {sorted(self.layers)}"
            )
        for i, dims in zip(sorted(self.layers), self.config.subspace_dims(len(self.layers))):
            self.layers[i].check(self.config, f"layer {i}", dims)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that a cache needs (the report is not among them)."""
        return sum(layer.nbytes for layer in self.layers.values())

    def to(self, device: torch.device | str) -> dict[int, LayerCodebooks]:
        """The layers on a device. Made once a device: every cache there shares the tensors."""
        device = torch.empty(0, device=device).device  # with the index, so that "cuda" and "cuda:0" are one
        if device not in self._moved:
            self._moved[device] = {i: layer.to(device) for i, layer in self.layers.items()}
        return self._moved[device]

    def save_pretrained(self, directory: str | os.PathLike, *, compact: bool | None = None) -> None:
        """Write the files to ``directory``, which may hold others. Beside a checkpoint or a README of yours, no model card is written.

        ``compact`` takes less than half the space, and changes the centroids and the transform a little, see
        `LayerCodebooks.compact_tensors`; None: as they were loaded.

        They are written to a folder of their own and renamed, so an interruption leaves either the old state or the new one; between the
        renames of two existing files it can leave a pair that `from_pretrained` refuses.
        """
        directory = Path(directory).expanduser()
        compact = self.compact if compact is None else compact
        directory.parent.mkdir(parents=True, exist_ok=True)
        # Inside it if it exists: it may be a mount point, and a rename stays on one file system.
        place = directory if directory.exists() else directory.parent
        staging = place / f".{directory.name}.{uuid.uuid4().hex[:8]}.tmp"
        staging.mkdir()
        try:
            save_file(self._named_tensors(compact), staging / TENSORS_NAME, metadata={"format": FORMAT})
            header = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION if self.config.allocation else 2 if compact else 1,
                "storage": "compact" if compact else "full",
                "tensors_sha256": _sha256(staging / TENSORS_NAME),
                "config": self.config.to_dict(),
                "fingerprint": self.fingerprint.to_dict(),
                "layers": {
                    str(i): {"rope_interleaved": layer.rope_interleaved, "frame_tokens": layer.frame_tokens}
                    for i, layer in self.layers.items()
                },
                "provenance": self.provenance,
            }
            (staging / CONFIG_NAME).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
            # safetensors makes its file readable by its owner alone; this one obeys the umask.
            (staging / TENSORS_NAME).chmod((staging / CONFIG_NAME).stat().st_mode & 0o777)
            names = [TENSORS_NAME, CONFIG_NAME]
            if may_write_card(directory):
                (staging / CARD_NAME).write_text(model_card(self), encoding="utf-8")
                names.append(CARD_NAME)
            if directory.exists():
                for name in names:
                    os.replace(staging / name, directory / name)
            else:
                os.rename(staging, directory)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Upload what `save_pretrained` writes to a Hugging Face hub repository, in one commit; `from_pretrained` takes its id.

        Arguments are those of transformers' ``PushToHubMixin``, whose own code would write a card of its own.

        Args:
            repo_id: ``"name"`` or ``"organisation/name"``; created if it is not there. A checkpoint's, or one with a
                card that is not ours, keeps its card.
            commit_message: default ``"Upload million codebooks"``.
            commit_description: the commit's longer text.
            private: of a repository that is created; None: as the organisation has it, else public.
            token: of the hub; None: the one that ``hf auth login`` stored.
            revision: branch to commit to, created if it is not there; None: the main one.
            create_pr: open a pull request instead of committing.

        Returns:
            The commit; ``.commit_url`` and, of a pull request, ``.pr_url`` say where it is.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: the hub refuses (no such organisation, no right to write, ...).
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            # As `may_write_card`, of what the repository holds.
            keep = api.file_exists(repo_id, "config.json", revision=revision)
            if not keep and api.file_exists(repo_id, CARD_NAME, revision=revision):
                there = Path(api.hf_hub_download(repo_id, CARD_NAME, revision=revision))
                keep = MARK not in there.read_text(encoding="utf-8", errors="replace")
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or "Upload million codebooks",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                ignore_patterns=[CARD_NAME] if keep else None,
            )

    def _named_tensors(self, compact: bool) -> dict[str, Tensor]:
        of = {i: layer.compact_tensors() if compact else layer.tensors for i, layer in self.layers.items()}
        named = {f"layers.{i}.{name}": t for i, tensors in of.items() for name, t in tensors.items()}
        named |= {f"layers.{i}.{name}": t for i, report in self.report.items() for name, t in vars(report).items()}
        # Clones: layers may share a tensor (inv_freq), which safetensors refuses.
        return {name: t.detach().cpu().contiguous().clone() for name, t in named.items()}

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | os.PathLike, *, subfolder: str = "", **hub_kwargs) -> Codebooks:
        """Load codebooks, onto the CPU, from a local directory or a Hugging Face hub repository.

        Args:
            path_or_hub_id: a directory, else the id of a repository.
            subfolder: folder inside it.
            hub_kwargs: for `huggingface_hub.hf_hub_download`: ``revision``, ``token``, ``cache_dir``, ...

        Raises:
            FileNotFoundError: no such directory or repository, or a file is missing in it.
            ValueError: a truncated or foreign file, an unknown format version, missing or wrong tensors, or files that do
                not belong together; the message says which.
        """
        config_path, tensors_path = _locate(path_or_hub_id, subfolder, hub_kwargs)
        header = _read_header(config_path)
        named = _read_tensors(tensors_path)
        if _sha256(tensors_path) != header.get("tensors_sha256"):
            raise ValueError(f"{tensors_path} is not the tensor file that {config_path.name} was written with")
        try:
            layers, report = {}, {}
            for key, scalars in header["layers"].items():
                own = {n.removeprefix(f"layers.{key}."): t for n, t in named.items() if n.startswith(f"layers.{key}.")}
                measured = {f.name: own.pop(f.name) for f in fields(LayerReport) if f.name in own}
                if header.get("storage") == "compact":
                    own = LayerCodebooks.expand(own)
                if measured:
                    report[int(key)] = LayerReport(**measured)
                layers[int(key)] = LayerCodebooks(
                    **{"inv_freq": None, **own},
                    rope_interleaved=bool(scalars["rope_interleaved"]),
                    frame_tokens=int(scalars["frame_tokens"]),
                )
            return cls(
                config=PQConfig(**header["config"]),
                fingerprint=Fingerprint.from_dict(header["fingerprint"]),
                layers=layers,
                provenance=header["provenance"],
                report=report,
                compact=header.get("storage") == "compact",
            )
        except KeyError as error:
            raise ValueError(f"{config_path}: {error} is missing") from error
        except (
            TypeError,
            AttributeError,
            RuntimeError,
        ) as error:  # a constructor names the missing or unknown tensor or field
            raise ValueError(f"{config_path.parent}: missing or unknown entries: {error}") from error
        except ValueError as error:
            raise ValueError(f"{config_path.parent}: {error}") from error


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _locate(source: str | os.PathLike, subfolder: str, hub_kwargs: dict[str, Any]) -> tuple[Path, Path]:
    """Paths of the two files, downloaded if ``source`` is not a directory."""
    names = (CONFIG_NAME, TENSORS_NAME)
    directory = Path(source).expanduser() / subfolder
    if Path(source).expanduser().exists():
        for name in names:
            if not (directory / name).is_file():
                raise FileNotFoundError(
                    f"{directory} has no {name}: not a codebook directory, or not completely written"
                )
        return directory / names[0], directory / names[1]
    text = str(source)
    if not isinstance(source, str) or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise FileNotFoundError(f"no such directory: {text}")

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

    try:
        found = [hf_hub_download(text, name, subfolder=subfolder or None, **hub_kwargs) for name in names]
    except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"no directory {text}, and no codebooks in a hub repository of that name: {error}"
        ) from error
    return Path(found[0]), Path(found[1])


def _read_header(path: Path) -> dict[str, Any]:
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{path} does not describe {FORMAT}")
    version = header.get("format_version")
    if version not in range(1, FORMAT_VERSION + 1):
        raise ValueError(f"{path} has format version {version!r}; this release reads versions 1 to {FORMAT_VERSION}")
    if header.get("storage", "full") not in ("full", "compact"):
        raise ValueError(f"{path}: unknown storage {header['storage']!r}")
    return header


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise ValueError(f"{path} is a safetensors file, but not one of {FORMAT}")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
