"""Folders of results: written aside, proved, and published by rename with a manifest.

A command writes into a hidden sibling of its output; the manifest (`ternq.json`, with the SHA-256
of every file) is its last file, and one rename gives the folder its final name. Killed at any
moment, there is either nothing under that name or all of it, and what was there is not lost.

A manifest ends with the SHA-256 of itself, taken with zeros in that place, so that a changed byte
of it is found too. It says nothing about who wrote it. Manifests without it are read as before.
"""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ternq.errors import InputError, RecipeError, ResourceError, VerificationError
from ternq.files import (
    as_json,
    existing_ancestor,
    parse_json,
    plain_name,
    read_json,
    read_small,
    renamed,
    sha256,
    sync,
    writing,
)

MANIFEST = "ternq.json"
EXPORT_MANIFEST = "ternq-export.json"  # of a folder in another program's format
CHECKPOINT = "state.json"  # of a training checkpoint, which is a folder with a manifest too
FORMAT_VERSION = 1
_VERSION_KEYS = {
    MANIFEST: "ternq_format",
    EXPORT_MANIFEST: "ternq_export",
    CHECKPOINT: "ternq_checkpoint",
}
_SELF = "manifest"  # the key of the manifest's own hash; the prefix tells it if the key is damaged
_SELF_PREFIX = "sha256:"
_NO_HASH = _SELF_PREFIX + 64 * "0"
# the files that mark a folder as made by ternq, and a key that each has
_MADE_HERE = (*_VERSION_KEYS.items(), ("run.json", "ternq_run"))


def check_output(out: Path, overwrite: bool = False) -> None:
    """Refuse, before any work, an output that exists (`RecipeError`) or cannot be written.

    With ``overwrite`` an existing folder is replaced only if ternq made it or it is empty. A
    place that cannot be written is a `ResourceError`.
    """
    if out.name in ("", ".."):
        raise RecipeError(f"'{out}' is no name for a new folder.", "Give -o a name.")
    if any("\ud800" <= c <= "\udfff" for c in str(out)):
        raise RecipeError(f"'{out}' is no name in UTF-8.", "Give -o another name.")
    _recover(out)
    if out.exists() or out.is_symlink():
        if not overwrite:
            raise RecipeError(
                f"{out} exists already.", "Choose another name with -o, or pass --overwrite."
            )
        if not _replaceable(out):
            raise RecipeError(
                f"{out} is not something ternq made, so --overwrite does not delete it.",
                "Choose another name with -o.",
            )
    home = existing_ancestor(out.parent)
    if not home.is_dir():
        raise ResourceError(f"{out} cannot be written: {home} is not a folder.")
    if not os.access(home, os.W_OK | os.X_OK):
        raise ResourceError(
            f"{out} cannot be written: no permission to write in {home.absolute()}.",
            "Choose another place with -o.",
        )


@contextlib.contextmanager
def staging(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A hidden sibling of ``out`` to write into: published on success, removed on any failure.

    Raises what `check_output` raises, and `ResourceError` when the disk is full or read-only.
    """
    check_output(out, overwrite)
    with writing(out), contextlib.ExitStack() as stack:
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        folder = _sibling(out, "staging")
        folder.mkdir()
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.enter_context(_claimed(folder))
        yield folder
        publish(folder, out, overwrite)


def publish(staged: Path, out: Path, overwrite: bool = False) -> None:
    """Give ``staged`` the name ``out`` by one rename; an old ``out`` steps aside first.

    Killed between the two renames, the old folder lies under a hidden name, and the next command
    that names ``out`` puts it back.
    """
    aside = None
    if out.exists() or out.is_symlink():
        check_output(out, overwrite)
        aside = _sibling(out, "replaced")
        out.rename(aside)
    try:
        staged.rename(out)
    except OSError:
        if aside is not None:
            aside.rename(out)
        raise
    sync(out.parent)
    if aside is not None:
        _discard(out, aside)


def newest_artefact(folder: Path) -> Path | None:
    """The folder with the newest manifest: ``folder`` itself or a direct subfolder, else None."""
    candidates = [folder, *(p for p in folder.iterdir() if not p.name.startswith("."))]
    found = [p for p in candidates if (p / MANIFEST).is_file()]
    return max(found, key=lambda p: (p / MANIFEST).stat().st_mtime_ns, default=None)


def write_manifest(
    folder: Path, extra: Mapping[str, Any] | None = None, name: str = MANIFEST
) -> dict[str, Any]:
    """Write the manifest, with size and SHA-256 of every file of ``folder``; returns its content.

    ``name`` is `EXPORT_MANIFEST` for a folder in another program's format.
    """
    files = [
        {"path": file, "bytes": (folder / file).stat().st_size, "sha256": sha256(folder / file)}
        for file in _files(folder, name)
    ]
    for file in _files(folder, name):
        sync(folder / file)
    manifest = {**(extra or {}), _VERSION_KEYS[name]: FORMAT_VERSION, "files": files}
    manifest = {k: v for k, v in manifest.items() if k != _SELF} | {_SELF: _NO_HASH}
    text = as_json(manifest).encode("utf-8")
    manifest[_SELF] = _SELF_PREFIX + hashlib.sha256(text).hexdigest()
    with renamed(folder / name) as temporary:
        temporary.write_bytes(_with_last(text, _NO_HASH, manifest[_SELF]))
    sync(folder)
    return manifest


def report_folder(out: Path) -> Path:
    """What lies beside an artefact: records of its training, and pages for people."""
    return out.parent / f"{out.name}.report"


def manifest_of(folder: Path) -> str | None:
    """The manifest's name in an artefact, or in a dense folder, a baseline's; None without one."""
    names = (MANIFEST, EXPORT_MANIFEST)
    return next((name for name in names if (folder / name).is_file()), None)


def read_manifest(folder: Path, name: str = MANIFEST) -> dict[str, Any]:
    """The checked content of the manifest.

    Raises `InputError` if there is none or it is of a later format, `VerificationError` if it is
    damaged or names a path outside the folder.
    """
    path = folder / name
    if not path.is_file():
        raise InputError(
            f"{folder} is not a ternq artefact: it has no {name}.",
            "`ternq ternarize MODEL` makes one.",
        )
    try:
        content = read_small(path)
        manifest = parse_json(content, path)
    except InputError as error:
        raise VerificationError(error.message, error.hint) from error
    version = manifest.get(_VERSION_KEYS[name])
    _refuse_later(folder, version)
    if type(version) is not int or version != FORMAT_VERSION:
        raise VerificationError(f"{path} names no format version.")
    _check_self(path, content, manifest)
    _check_entries(path, manifest.get("files"))
    return manifest


def verify_files(folder: Path, name: str = MANIFEST) -> dict[str, Any]:
    """Check that the files of ``folder`` are those of its manifest, to the bit; returns it.

    Raises `VerificationError` naming the file that is missing, changed, or not listed. Names that
    begin with a dot are not looked at (hubs and file browsers add them).
    """
    manifest = read_manifest(folder, name)
    listed = {entry["path"]: entry for entry in manifest["files"]}
    for file in sorted(set(_files(folder, name)) - set(listed)):
        raise VerificationError(f"{folder / file} is not listed in {name}.")
    for file, entry in listed.items():
        path = folder / file
        if not path.is_file():
            raise VerificationError(f"{path} is missing.")
        if path.stat().st_size != entry["bytes"]:
            raise VerificationError(
                f"{path} has {path.stat().st_size} bytes; {name} says {entry['bytes']}."
            )
        if sha256(path) != entry["sha256"]:
            raise VerificationError(f"{path} has changed: its SHA-256 is not that of {name}.")
    refuse_later_config(folder)
    return manifest


def refuse_later_config(folder: Path) -> None:
    """`InputError` if ``config.json`` is of a later version of the format; other damage passes."""
    found = None
    with contextlib.suppress(InputError):
        found = read_json(folder / "config.json").get("quantization_config")
    if isinstance(found, dict) and found.get("quant_method") == "ternq":
        _refuse_later(folder, found.get("format_version"))


def _refuse_later(folder: Path, version: Any) -> None:
    if type(version) is int and version > FORMAT_VERSION:
        raise InputError(
            f"{folder} has ternq format {version}; this program reads format {FORMAT_VERSION}.",
            "Install a newer ternq.",
        )


def _files(folder: Path, manifest: str) -> list[str]:
    """Relative names of the files to list, sorted; the manifest and dot names are left out."""
    names = []
    for root, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        links = [f for f in folders if (Path(root) / f).is_symlink()]
        here = Path(root).relative_to(folder)
        names += [(here / f).as_posix() for f in files + links if not f.startswith(".")]
    return sorted(name for name in names if name != manifest)


def _check_self(path: Path, content: bytes, manifest: Mapping[str, Any]) -> None:
    """Refuse a manifest that is not what its own hash says; one without a hash is older."""
    stated = manifest.get(_SELF)
    marked = [v for v in manifest.values() if isinstance(v, str) and v.startswith(_SELF_PREFIX)]
    if stated is None and not marked:
        return
    own = ""
    if isinstance(stated, str) and len(stated) == len(_NO_HASH):
        own = hashlib.sha256(_with_last(content, stated, _NO_HASH)).hexdigest()
    if stated != _SELF_PREFIX + own:
        raise VerificationError(f"{path} has changed: its SHA-256 is not the one at its end.")


def _with_last(text: bytes, old: str, new: str) -> bytes:
    """``text`` with another string in the last place where ``old`` stands."""
    return new.encode().join(text.rsplit(old.encode(errors="replace"), 1))


def _check_entries(path: Path, entries: Any) -> None:
    if not isinstance(entries, list) or not entries:
        raise VerificationError(f"{path} lists no files.")
    seen = set()
    for entry in entries:
        if not isinstance(entry, dict) or not plain_name(entry.get("path")):
            raise VerificationError(f"{path} lists something that is not a file of its folder.")
        name, size, digest = entry["path"], entry.get("bytes"), entry.get("sha256")
        if type(size) is not int or not 0 <= size < 2**63:
            raise VerificationError(f"{path} gives {name} an impossible size.")
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise VerificationError(f"{path} gives {name} no SHA-256.")
        if name in seen or name == path.name:
            raise VerificationError(f"{path} lists {name} where it may not.")
        seen.add(name)


def _sibling(out: Path, role: str) -> Path:
    return out.absolute().parent / f".{out.name}.{role}-{secrets.token_hex(4)}"


def _siblings(out: Path, role: str) -> list[Path]:
    name = re.compile(rf"\.{re.escape(out.name)}\.{role}-[0-9a-f]{{8}}")
    parent = out.absolute().parent
    if not parent.is_dir():
        return []
    return [p for p in parent.iterdir() if name.fullmatch(p.name)]


def _recover(out: Path) -> None:
    """Put back what a killed `publish` had moved aside."""
    aside = _siblings(out, "replaced")
    if aside and not out.exists():
        with contextlib.suppress(OSError):
            max(aside, key=lambda p: p.lstat().st_mtime_ns).rename(out)


def _sweep(out: Path) -> None:
    """Remove what killed commands left: staging folders nobody holds, and replaced outputs."""
    for folder in _siblings(out, "staging"):
        with contextlib.suppress(OSError), _claimed(folder):
            shutil.rmtree(folder, ignore_errors=True)
    if out.exists():
        for aside in _siblings(out, "replaced"):
            _discard(out, aside)


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Hold a folder by a lock that dies with the process; OSError if another one holds it."""
    if sys.platform == "win32":  # no such lock there, and open folders cannot be removed
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _replaceable(out: Path) -> bool:
    if not out.is_dir() or out.is_symlink():
        return False
    return not any(out.iterdir()) or any(_says(out / name, key) for name, key in _MADE_HERE)


def _says(path: Path, key: str) -> bool:
    """Whether a file is one of ours, and not another program's of the same name."""
    with contextlib.suppress(InputError):
        return key in read_json(path)
    return False


def _discard(out: Path, aside: Path) -> None:
    """Delete a replaced output, under a name that says it is no longer whole."""
    doomed = _sibling(out, "staging")
    aside.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
