"""Single files: written under a temporary name and renamed, read without trust.

Nothing is ever half written under a final name, and a full or forbidden disk is said in words.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ternq.errors import InputError, ResourceError

_MAX_JSON = 64 * 2**20  # the index of the largest models has under 20
_MAX_DEPTH = 64  # of objects and lists in one another
REFUSALS = {
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than the file system allows",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EIO: "the device reports an error",
}


def write_json(path: Path, content: Any) -> None:
    """Write JSON under a temporary name, then rename: never half a file under ``path``."""
    with renamed(path) as temporary:
        temporary.write_bytes(as_json(content).encode("utf-8"))


def as_json(content: Any) -> str:
    """JSON as all files of ternq have it: indented, and every character as itself."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `InputError` if it is missing, damaged or no object.

    A name that stands twice in one object is damage: programs differ in which one they take. So is
    nesting that other readers of the file could not follow.
    """
    return parse_json(read_small(path), path)


def read_small(path: Path) -> bytes:
    """The bytes of a small file; `InputError` if it is missing, no plain file, or too large."""
    try:
        if not path.is_file() and path.exists():  # a pipe would be waited for
            raise InputError(f"{path} is not a file.")
        with path.open("rb") as file:
            content = file.read(_MAX_JSON + 1)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    if len(content) > _MAX_JSON:
        raise InputError(f"{path} is too large to be what it should be.")
    return content


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """The object that the bytes of ``path`` hold; `InputError` as of `read_json`."""
    try:
        found = json.loads(content.decode("utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: it is not JSON ({error}).") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged: it holds no JSON object.")
    if _depth(found) > _MAX_DEPTH:
        raise InputError(f"{path} is damaged: it is nested more than {_MAX_DEPTH} deep.")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twice[:80]!r} stands twice in one object")
    return content


def _depth(content: Any) -> int:
    """How deep lists and objects lie in one another, counted to one more than is allowed."""
    depth, level = 0, [content]
    while level and depth <= _MAX_DEPTH:
        inside = [part.values() if isinstance(part, dict) else part for part in level]
        level = [item for part in inside for item in part if isinstance(item, dict | list)]
        depth += 1
    return depth


def plain_name(name: Any) -> bool:
    """Whether ``name`` is a relative path with forward slashes that stays inside its folder.

    >>> plain_name("model.safetensors"), plain_name("../x"), plain_name("/etc/passwd")
    (True, False, False)
    """
    if not isinstance(name, str) or not name or re.search(r"[\x00-\x1f\\:]", name):
        return False
    parts = name.split("/")
    return not PurePosixPath(name).is_absolute() and not {"", ".", ".."} & set(parts)


@contextlib.contextmanager
def renamed(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that takes its place when the block ends well."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with writing(path):
        try:
            yield temporary
            sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk, missing permission and their like into a `ResourceError` about ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        where = error.filename or path
        raise ResourceError(
            f"{where} cannot be written: {REFUSALS[error.errno]}.",
            f"{free_disk(path) / 1e9:.1f} GB are free there; -o chooses another place.",
        ) from error


def free_disk(path: Path) -> int:
    """Bytes free on the disk that holds ``path``, which need not exist yet."""
    return shutil.disk_usage(existing_ancestor(path)).free


def existing_ancestor(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def sync(path: Path) -> None:
    """Have the disk hold a file or folder now (folders cannot be opened on Windows)."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
