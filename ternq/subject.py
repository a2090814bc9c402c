"""A model that is measured: loaded when it has to be, known by a hash of its content."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ternq import hf, origin, states
from ternq.errors import InputError
from ternq.files import sha256
from ternq.hf import Loaded
from ternq.kernels import choice
from ternq.progress import Progress, ignore
from ternq.publish import manifest_of, read_manifest, verify_files
from ternq.text import is_offline
from ternq.weights import weights_summary

_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py")


@dataclass(frozen=True)
class World:
    """Where models are computed, and how they may be had."""

    device: str = "cpu"
    dtype: torch.dtype | None = None
    offline: bool = False
    trust_remote_code: bool = False
    int8_activations: bool = False


@dataclass
class Subject:
    """A model, loaded when something has to be measured of it; and what was found."""

    model: str | Loaded
    world: World
    progress: Progress = ignore
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As the results name it."""
        return self.model if isinstance(self.model, str) else self.model.name

    @cached_property
    def loaded(self) -> Loaded:
        """The live model."""
        if isinstance(self.model, str):
            return hf.load(self.model, **vars(self.world), progress=self.progress)
        return self.model

    def check(self) -> None:
        """`InputError` where the model cannot be there, before anything is measured of another."""
        if not isinstance(self.model, str):
            return
        if (path := origin.local_path(self.model)) is not None:
            origin.refuse_no_model(self.model, path)
        elif is_offline(self.world.offline):
            origin.refuse_not_cached(self.model)

    def release(self) -> None:
        """Let go of the live model."""
        self.__dict__.pop("loaded", None)

    @cached_property
    def identity(self) -> str:
        """A hash of the model's content: of its files, or of what was loaded where those change."""
        files = _files(self.model) if isinstance(self.model, str) else []
        if not files:
            return _live(self.loaded)
        known = _verified(files)
        found = hashlib.sha256()
        for file in files:
            digest = known.get(file.name) or sha256(file)
            found.update(f"{file.name}\0{digest}\0".encode())
        return found.hexdigest()

    def summary(self) -> dict[str, Any]:
        """What it weighs: ``{kind, parameters, bytes, bpw_linear, bpw_total}``, as it is stored.

        ``bytes`` are those of the weights, ``file_bytes`` those of all files, where they are known;
        ``kernel`` of a packed model is what made its products.
        """
        if self.loaded.kind != "packed":
            return self._weights()
        int8 = ", int8 activations" if self.world.int8_activations else ""
        return self._weights() | {"kernel": choice(self.world.device) + int8}

    def _weights(self) -> dict[str, Any]:
        loaded = self.loaded
        path = loaded.path
        if path is not None and (name := manifest_of(path)):
            manifest = read_manifest(path, name)
            size = sum(file["bytes"] for file in manifest["files"])
            return {"kind": loaded.kind, **manifest["weights"], "file_bytes": size}
        if loaded.kind != "dense":
            return {"kind": loaded.kind} | weights_summary(loaded.model, loaded.dtype)
        count = loaded.model.num_parameters()
        own = {"kind": loaded.kind, "parameters": count}
        if files := _files(loaded.source) or _on_the_hub(loaded):
            own["file_bytes"] = sum(file.stat().st_size for file in files)
        if path is not None and path.is_file():  # a GGUF file: embeddings may have other bits
            size = path.stat().st_size
            return own | {"bytes": size, "bpw_linear": None, "bpw_total": 8 * size / count}
        bits = 8 * loaded.dtype.itemsize
        return own | {"bytes": count * bits // 8, "bpw_linear": bits, "bpw_total": bits}


def _files(model: str) -> list[Path]:
    """The files that a local model consists of; none for a run, which changes, and on the hub."""
    path = origin.local_path(model)
    if path is None or (path / origin.RUN_FILE).is_file():
        return []
    if path.is_file():
        return [path]
    return _of_folder(path)


def _verified(files: list[Path]) -> dict[str, str]:
    """SHA-256 by name of an artefact's files, which are checked: kept results are of these alone.

    Nothing where the model has no manifest, or is one file.
    """
    folder = files[0].parent
    name = manifest_of(folder)
    if name is None or folder / name not in files:
        return {}
    return {entry["path"]: entry["sha256"] for entry in verify_files(folder, name)["files"]}


def _of_folder(folder: Path) -> list[Path]:
    return sorted(file for kind in _FILES for file in folder.glob(kind))


def _on_the_hub(loaded: Loaded) -> list[Path]:
    """The files of a checkpoint on the hub, in the local cache."""
    if loaded.path is not None:
        return []
    try:
        folder = origin.model_folder(loaded.source, None, offline=True)
    except InputError:  # made in memory
        return []
    return _of_folder(folder)


def _live(loaded: Loaded) -> str:
    """A hash of parameters, configuration and tokenizer."""
    core = getattr(loaded.tokenizer, "backend_tokenizer", None)
    words = core.to_str() if core is not None else str(sorted(loaded.tokenizer.get_vocab()))
    parts = (states.fingerprint(loaded.model), loaded.model.config.to_json_string(), words)
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
