"""Ternary weights to a packed artefact, or to another program's format, proved before published.

A model that is ternary comes in as a `Source`, from wherever it is; ternq's own format is written
by `ternq.artefact` and proved by `ternq.proof`, others by `ternq.formats`.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ternq import artefact, checkpoint, formats, hf, intake, origin, outlines, packing, proof
from ternq.card import card
from ternq.errors import InputError, RecipeError, ResourceError
from ternq.files import free_disk
from ternq.formats import Options
from ternq.hf import Loaded
from ternq.linear import Dense, decoder_blocks, dense_parts, packed_layers
from ternq.modeling_ternq import is_linear
from ternq.progress import Event, Progress, ignore
from ternq.publish import (
    EXPORT_MANIFEST,
    MANIFEST,
    check_output,
    read_manifest,
    staging,
    verify_files,
    write_manifest,
)
from ternq.source import Source, of_model
from ternq.weights import embeddings as embeddings_of
from ternq.weights import stored_dtype, with_file

Measure = Callable[[Path], Mapping[str, Any]]
"""What is measured of a new artefact before it is published; goes into its card and the result."""


def pack(
    model: str | Loaded | Source,
    out: Path,
    *,
    format: str = "ternq",
    embeddings: str = "keep",
    group_size: int | None = None,
    skip: tuple[str, ...] = (),
    options: Options | None = None,
    overwrite: bool = False,
    keep_dtype: bool = False,
    offline: bool = False,
    progress: Progress = ignore,
    extra: Mapping[str, Any] | None = None,
    measure: Measure | None = None,
    plan: bool = False,
) -> dict[str, Any]:
    """Write a ternary model as an artefact at ``out``; returns the contract's fields.

    ``model`` is a run, an artefact, a checkpoint that is ternary by value, a model in memory, or a
    source that is open.
    ``extra`` goes into the manifest. What is finished already, asked for again of the same files,
    is left as it is. Before the folder gets its name it is read again and compared:
    every tensor to the bit; of a model that fits, also the logits. A ``plan`` checks all that can
    be checked without packing, writes nothing, and returns what would be written; of too little
    room ``fits`` tells.

    Raises:
        InputError: the model is not ternary.
        RecipeError: ``out`` exists, or is the model itself; or a format that cannot hold it.
        ResourceError: no room, or no permission.
        VerificationError: what was written is not what was given; nothing is published.
    """
    options = options or Options()
    _check_request(format, embeddings, keep_dtype, options)
    name = MANIFEST if format == "ternq" else EXPORT_MANIFEST
    asked = _digest(model, format, embeddings, group_size, skip, vars(options), keep_dtype)
    finished = None
    if asked and not overwrite and (out / name).is_file():
        manifest = read_manifest(out, name)
        if manifest.get("asked_sha256") == asked:
            verify_files(out, name)  # what is finished must also be whole
            progress(Event("done", f"{out} is finished already, of the same; nothing to do"))
            finished = {key: manifest.get(key) for key in ("format", "weights", "verify", "files")}
    if finished is None:
        check_output(out, overwrite)
    elif not plan:
        return {"out": str(out), **finished}
    with _opened(model, group_size, skip, offline, progress) as source:
        _refuse_input(model, out)
        _refuse_dense(source, format)
        if plan:
            if format == "ternq":
                _stored(source, keep_dtype, options.exact)
            else:
                formats.module(format).check(source, options)
            return _planned(source, format, options, out)
        _check_room(source, format, options, out)
        with staging(out, overwrite) as staged:
            if format == "ternq":
                made = _ternq(source, staged, embeddings, keep_dtype, options.exact, progress)
            else:
                made = _foreign(source, staged, format, options, progress)
            made |= measure(staged) if measure else {}
            about = {**source.about, **made, **(extra or {})}
            file = next((path.name for path in staged.glob("*.gguf")), "")
            text = card(out.name, source, about, file)
            (staged / "README.md").write_text(text, encoding="utf-8")
            kept = {k: v for k, v in about.items() if k not in ("notes", "dense_layers")}
            kept |= {"asked_sha256": asked} if asked else {}
            manifest = write_manifest(staged, kept, name)
    return {"out": str(out), "files": manifest["files"], **made}


def _planned(source: Source, format: str, options: Options, out: Path) -> dict[str, Any]:
    """What would be written, and ``seconds`` of packing and reading back, by one layer's rate."""
    needed, free = _room(source, format, options, out)
    linear = _linear(source)
    return {
        "plan": True,
        "out": str(out),
        "format": format,
        "weights": {
            "parameters": source.parameters,
            "coverage": linear / source.parameters,
            "bytes": needed,
            "bytes_dense_bf16": 2 * source.parameters,
        },
        "disk": {"needed": needed, "free": free},
        "seconds": {"total": _seconds(source, linear)},
        "dense_layers": [vars(d) for d in _dense(source)],
        "notes": list(source.notes),
        "fits": needed <= free,
        "reason": None if needed <= free else _no_room(needed, free, out),
    }


def _seconds(source: Source, linear: int) -> float:
    """What packing takes, and reading back, by the first layer."""
    if not source.modules:
        return 0.0
    began = time.monotonic()
    codes = source.layer(source.modules[0]).codes
    packing.unpack_base3(packing.pack_base3(codes), codes.shape[1], check=True)
    return (time.monotonic() - began) * linear / codes.numel()


def verify(
    folder: Path,
    model: str | None = None,
    *,
    offline: bool = False,
    progress: Progress = ignore,
) -> dict[str, Any]:
    """Check an artefact, and with ``model`` that it is what that run or checkpoint holds.

    Raises what `ternq.proof.verify` raises.
    """
    if (folder / EXPORT_MANIFEST).is_file():
        if model is not None:
            raise RecipeError(
                f"'{folder}' is an export; only a ternq artefact is compared with its model.",
                "Leave MODEL out to check its files.",
            )
        manifest = verify_files(folder, EXPORT_MANIFEST)
        note = f"The files are as they were made; no reader of {manifest.get('format')} was run."
        return {
            "format": manifest.get("format"),
            "weights": manifest.get("weights"),
            "files": manifest["files"],
            "verify": {"checked": 0, "max_abs_logit_diff": None, "ok": True},
            "notes": [note],
        }
    if model is None:
        return proof.verify(folder, progress=progress)
    read_manifest(folder)  # that it is an artefact; its files are hashed below
    with intake.opened(
        model,
        group_size=None,
        skip=(),
        offline=offline,
        progress=progress,
        like=outlines.packed_config(folder),
    ) as source:
        return proof.verify(folder, source, progress=progress)


@contextmanager
def _opened(
    model: str | Loaded | Source,
    group_size: int | None,
    skip: tuple[str, ...],
    offline: bool,
    progress: Progress,
) -> Iterator[Source]:
    if isinstance(model, str):
        with intake.opened(
            model,
            group_size=group_size,
            skip=skip,
            offline=offline,
            progress=progress,
        ) as source:
            yield source
        return
    if isinstance(model, Source):
        yield model
        return
    if packed_layers(model.model):
        raise InputError(f"'{model.source}' is packed already.", "Name its folder.")
    with tempfile.TemporaryDirectory() as folder:
        hf.save_base(model, Path(folder))
        yield of_model(model, Path(folder))


def _digest(model: str | Loaded | Source, *request: Any) -> str | None:
    """What is asked for, of which files (by size and time), as a hash; None without files."""
    path = origin.local_path(model) if isinstance(model, str) else None
    if path is None:
        return None
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    said = json.dumps([str(path.resolve()), stats, request], default=str)
    return hashlib.sha256(said.encode()).hexdigest()


def _check_request(format: str, embeddings: str, keep_dtype: bool, options: Options) -> None:
    """Refuse options that do not fit each other, before anything is opened."""
    if format not in ("ternq", *formats.MODULES):
        raise RecipeError(
            f"There is no format '{format}'.", f"Known: {', '.join(formats.MODULES)}."
        )
    if embeddings not in ("keep", "int8"):
        raise RecipeError(f"--embeddings is 'keep' or 'int8', not '{embeddings}'.")
    if format == "ternq" and (options.encoding or options.lossy):
        raise RecipeError("--encoding and --lossy are of other formats.", "Name one with --format.")
    if options.exact and options.lossy:
        raise RecipeError("--exact refuses any rounding, and --lossy allows it.", "Leave one out.")
    if options.exact and embeddings == "int8":
        raise RecipeError("--exact refuses any rounding, and --embeddings int8 rounds.")
    if format != "ternq" and (embeddings != "keep" or keep_dtype):
        flag = "--keep-dtype" if keep_dtype else f"--embeddings {embeddings}"
        raise RecipeError(f"{flag} is of the format ternq, not of {format}.")


def _ternq(
    source: Source,
    folder: Path,
    embeddings: str,
    keep_dtype: bool,
    exact: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Write and prove ternq's own format; what is said of it."""
    dtype, note = _stored(source, keep_dtype, exact)
    if note:
        progress(Event("pack", note))
    with torch.no_grad():
        written = artefact.write(source, folder, dtype, embeddings == "int8", progress)
        _refuse_rounding(source, exact)
        verified = proof.prove(source, folder, written, progress)
    return {
        "format": "ternq",
        "weights": with_file(written.tally.summary(), folder),
        "verify": verified | {"rounded": source.rounded, "int8_error": written.int8_errors},
        "dense_layers": [vars(d) for d in _dense(source)],
        "dtype_note": note,
        "notes": list(source.notes),
    }


def _stored(source: Source, keep_dtype: bool, exact: bool) -> tuple[torch.dtype, str | None]:
    """The type of what is not ternary, and what is to be said of it."""
    dtype = stored_dtype(source.dtype, keep_dtype)
    note = _dtype_note(source.dtype, dtype)
    if note and exact:
        raise RecipeError(f"--exact: {note}", "Pass --keep-dtype.")
    return dtype, note


def _foreign(
    source: Source, folder: Path, format: str, options: Options, progress: Progress
) -> dict[str, Any]:
    """Write another program's format, which its module proves; what is said of it."""
    exported = formats.module(format).export(source, folder, options, progress)
    _refuse_rounding(source, options.exact)
    linear = _linear(source)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {
        "format": format,
        "encoding": exported.encoding,
        "weights": {
            "coverage": linear / source.parameters,
            "bpw_linear": exported.bits / linear if linear else None,
            "bpw_embeddings": _embedding_bits(source, format, exported.encoding),
            "bpw_total": 8 * size / source.parameters,
            "bpw_file": 8 * size / source.parameters,
            "bytes": size,
            "bytes_dense_bf16": 2 * source.parameters,
            "zero_share": _zeros(source) / linear if linear else None,
            "parameters": source.parameters,
        },
        "verify": {
            "checked": exported.checked,
            "max_abs_logit_diff": None,
            "ok": True,
            "reader": exported.reader,
            "rounded": source.rounded | exported.rounded,
            "lost": exported.lost,
        },
        "dense_layers": [vars(d) for d in _dense(source)],
        "notes": [*source.notes, *exported.notes],
    }


def _zeros(source: Source) -> int:
    """Codes that are zero, of all layers."""
    return sum(int((source.layer(name).codes == 0).sum()) for name in source.modules)


def _embedding_bits(source: Source, format: str, encoding: str) -> float | None:
    """Bits a weight of the embeddings in another format; None for a model that has none."""
    tables = [source.others.get(f"{name}.weight") for name in embeddings_of(source.skeleton)]
    if not any(tables):
        return None
    if format == "gguf":  # which keeps every dense matrix in its type
        return float(8 * max(table[0].itemsize for table in tables if table))
    return 32.0 if "float32" in encoding else 16.0


def _refuse_dense(source: Source, format: str) -> None:
    if not source.modules and format != "dense":
        raise InputError(
            f"'{source.name}' is a dense run (--method float): there are no codes to pack.",
            "--format dense writes it as a folder for transformers.",
        )


def _refuse_rounding(source: Source, exact: bool) -> None:
    if exact and source.rounded:
        name, error = max(source.rounded.items(), key=lambda item: item[1])
        raise RecipeError(
            f"--exact: float16 does not hold the scales of {len(source.rounded)} layers, such as "
            f"{name} (error {error:.2g} of the scale).",
            "Leave --exact out to allow this one rounding.",
        )


def _refuse_input(model: str | Loaded | Source, out: Path) -> None:
    if isinstance(model, Source):
        path: Path | None = model.base
    else:
        path = origin.local_path(model) if isinstance(model, str) else model.path
    where = None if path is None else path.resolve()
    if where is not None and out.resolve() in [where, *where.parents]:
        raise RecipeError(f"{out} holds the model itself.", "Choose another name with -o.")
    if where is not None and where.is_dir() and where in out.resolve().parents:
        raise RecipeError(f"{out} lies inside the model.", "Choose another place with -o.")


def _check_room(source: Source, format: str, options: Options, out: Path) -> None:
    """`ResourceError` if the disk has no room for the output, about."""
    size, free = _room(source, format, options, out)
    if size > free:
        raise ResourceError(
            _no_room(size, free, out), "Free some space, or choose another place with -o."
        )


def _no_room(size: int, free: int, out: Path) -> str:
    return f"{out} takes {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free."


def _room(source: Source, format: str, options: Options, out: Path) -> tuple[int, int]:
    """Bytes that the output takes, about, and bytes that are free."""
    wide = 32 if options.encoding == "float32" else 16
    bits = {"ternq": 1.6 + 32 / source.group_size, "dense": wide}.get(format, 5)
    linear = _linear(source)
    size = int(bits * linear / 8 + wide / 8 * (source.parameters - linear))
    return size, free_disk(out)


def _linear(source: Source) -> int:
    """Weights of the ternary layers."""
    return sum(columns * rows for columns, rows in map(source.size, source.modules))


def _dtype_note(of_model: torch.dtype, stored: torch.dtype) -> str | None:
    if of_model == stored:
        return None
    return (
        f"Tensors that stay dense are {checkpoint.dtype_name(of_model)} in the model and "
        f"{checkpoint.dtype_name(stored)} in the file; --keep-dtype keeps them."
    )


def _dense(source: Source) -> list[Dense]:
    """What stays dense, and why; a linear layer inside the blocks was skipped."""
    if not source.modules:
        return []
    blocks = decoder_blocks(source.skeleton)[0] + "."
    inside = {n for n, m in source.skeleton.named_modules() if is_linear(m)}
    ternary = set(source.modules)
    skipped = {n for n in inside - ternary if n.startswith(blocks)}
    return list(dense_parts(source.skeleton, ternary, skipped))
