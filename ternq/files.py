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
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ternq.errors import InputError, ResourceError

_MAX_JSON = 256 * 2**20
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
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with renamed(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `InputError` if it is missing, damaged or no object."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise InputError(f"{path} is too large to be what it should be.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: it is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: it holds no JSON object.")
    return content


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
