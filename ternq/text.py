"""One source of text: a file, a folder or a dataset of the hub, as an iterator of documents.

A source is read once from front to back, so that text larger than memory is no special case;
shuffling is done on the way, in a bounded buffer, and depends on nothing but the seed. Small local
formats are read here, so that `datasets` is imported only for what lies in the hub's layout.
"""

import bz2
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import queue
import random
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from ternq import stop
from ternq.errors import InputError, StoppedError
from ternq.progress import Event, Progress, ignore

PASSAGE = 16_384
"""Characters of a passage: a longer text file is cut, at blank lines, into documents of this."""

Source = Callable[[int], Iterator[str]]
"""A source begun with a seed; begun again with another it gives another order."""

STALL_SAID = 60.0
"""Seconds without text from the hub after which that is said, and again after as many."""

STALL_ENDS = 600.0
"""Seconds without text from the hub after which a command stops, to be gone on with."""

_READ_AHEAD = 64  # documents of a stream
_BUFFER_DOCUMENTS, _BUFFER_CHARACTERS = 1024, 32_000_000
_CONFIGS = {"allenai/c4": "en"}
_UNPACK: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
}
_KINDS = "A text file ends in .txt, .jsonl or .parquet (.gz, .xz and .bz2 are unpacked)."


def read_documents(
    spec: str, *, seed: int = 0, offline: bool = False, progress: Progress = ignore
) -> Iterator[str]:
    """The documents of one source, shuffled by ``seed``.

    ``spec`` is a .txt, .jsonl or .parquet file, a folder of them, a folder in the hub's layout, or
    a hub id (``id:config`` where the dataset has several). Raises `InputError` at once for a source
    that is missing or not to be had offline, and on the way for one that is empty or no text.
    """
    return open_source(spec, offline, progress)(seed)


def whole_documents(spec: str) -> tuple[str, list[str]]:
    """All text of a local file or folder, in order; and its documents.

    The passages of a text file are its documents, and make up its text as they are; documents of
    other files, and files, are joined by a blank line.
    """
    path = Path(spec).expanduser()
    if not path.exists():
        raise InputError(f"There is no file or folder '{spec}'.", "Local text was to be read.")
    files = _files(path) if path.is_dir() else [path]
    parts = [list(_file(file, None)) for file in files]
    joints = ["" if _kind(file) == ".txt" else "\n\n" for file in files]
    text = "\n\n".join(joint.join(part) for joint, part in zip(joints, parts, strict=True))
    if not text.strip():
        raise InputError(f"'{spec}' holds no text.")
    return text, [document for part in parts for document in part if document.strip()]


def open_source(spec: str, offline: bool = False, progress: Progress = ignore) -> Source:
    """The source that ``spec`` names (see `read_documents`), checked but not yet read."""
    path = Path(spec).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        _kind(path)
        stamps = {path: _stamp(path)}
        return lambda seed: _documents(stamps, spec, seed)
    if looks_local(spec):
        raise InputError(f"There is no file or folder '{spec}'.", "--data names text to train on.")
    if is_offline(offline):
        raise InputError(
            f"The dataset '{spec}' is on the hub, and ternq is offline.",
            "Name a local .txt, .jsonl or .parquet file or folder, or 'self'.",
        )
    progress(Event("data", f"streaming {spec} from the hub"))
    name, _, config = spec.partition(":")
    chosen = config or _CONFIGS.get(name)
    return lambda seed: _awaited(name, lambda: _dataset(name, chosen, seed), progress)


def _folder(path: Path) -> Source:
    if _has_hub_layout(path):
        return lambda seed: _dataset(str(path), None, seed)
    stamps = {file: _stamp(file) for file in _files(path)}
    return lambda seed: _documents(stamps, str(path), seed)


def _files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and _format(file))
    if not files:
        raise InputError(f"The folder '{folder}' holds no text.", _KINDS)
    return files


def _has_hub_layout(path: Path) -> bool:
    """Whether a README in the hub's form says which file is which split."""
    readme = path / "README.md"
    head = readme.read_text(errors="replace")[:4096] if readme.is_file() else ""
    return head.startswith("---") and "\nconfigs:" in head


def looks_local(spec: str) -> bool:
    """Whether a name can only be that of a file or folder."""
    return (
        spec.startswith((".", "/", "~"))
        or "\\" in spec
        or spec.count("/") > 1
        or _format(Path(spec)) is not None
    )


def _format(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in _UNPACK
    kind = "".join(suffixes[-2:-1] if packed else suffixes[-1:])
    if kind == ".json":
        kind = ".jsonl"
    return kind if kind in {".txt", ".jsonl"} or (kind == ".parquet" and not packed) else None


def _kind(path: Path) -> str:
    kind = _format(path)
    if kind is None:
        raise InputError(f"'{path}' is not a text file that ternq reads.", _KINDS)
    return kind


_READ: dict[str, Callable[[Path, random.Random | None], Iterator[str]]] = {
    ".txt": lambda path, rng: _passages(path),
    ".jsonl": lambda path, rng: _lines(path),
    ".parquet": lambda path, rng: _parquet(path, rng),
}


def _documents(stamps: Mapping[Path, Any], name: str, seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    order = list(stamps)
    rng.shuffle(order)
    return shuffled(chain.from_iterable(_unchanged(p, stamps[p], rng) for p in order), rng, name)


def _unchanged(path: Path, stamp: Any, rng: random.Random) -> Iterator[str]:
    """The documents of one file; `InputError` if it is no longer as its ``stamp`` says."""
    yield from _file(path, rng)
    if _stamp(path) != stamp:
        raise InputError(f"'{path}' changed while it was in use.", "Text must stay as it is.")


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:  # reading it says so
        return None
    return stat.st_size, stat.st_mtime_ns


def _file(path: Path, rng: random.Random | None) -> Iterator[str]:
    """The documents of one file; whatever is wrong with it is an `InputError` that names it."""
    try:
        yield from _READ[_kind(path)](path, rng)
    except GeneratorExit:  # first, as nothing of this module may be left when Python ends
        raise
    except UnicodeDecodeError as error:
        raise InputError(
            f"'{path}' is not UTF-8 text (byte 0x{error.object[error.start]:02x})."
        ) from error
    except (lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise InputError(f"'{path}' cannot be read: {first_line(error)}") from error


def _text(path: Path) -> IO[str]:
    unpack = _UNPACK.get(path.suffix.lower(), partial(Path.open, mode="rb"))
    return io.TextIOWrapper(unpack(path), encoding="utf-8-sig")


def _passages(path: Path) -> Iterator[str]:
    """A text file, cut at blank lines (else at ends of lines, else anywhere) where it is long."""
    with _text(path) as file:
        text = ""
        while piece := file.read(4 * PASSAGE):
            if "\0" in piece:
                raise InputError(f"'{path}' is binary, not text: it holds NUL bytes.")
            text += piece
            while len(text) > PASSAGE:
                cut = _cut(text)
                yield text[:cut]
                text = text[cut:]
        if text:
            yield text


def _cut(text: str) -> int:
    for mark in ("\n\n", "\n"):
        found = text.rfind(mark, PASSAGE // 2, PASSAGE)
        if found >= 0:
            return found + len(mark)
    return PASSAGE


def _lines(path: Path) -> Iterator[str]:
    with _text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _row_text(_json(line, path, number), f"'{path}', line {number}")


def _json(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"'{path}', line {number}, is not JSON: {error.msg}.") from error
    except RecursionError:
        raise InputError(f"'{path}', line {number}, is JSON nested too deeply.") from None


def _row_text(row: Any, where: str) -> str:
    if not isinstance(row, dict) or "text" not in row:
        has = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise InputError(f"{where} has no column 'text'.", f"Its columns: {has or 'none'}.")
    text = row["text"]
    if text is not None and not isinstance(text, str):
        raise InputError(f"{where}: 'text' is not text but {type(text).__name__}.")
    return _characters(text or "")


def _characters(text: str) -> str:
    """The same, with U+FFFD for halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _parquet(path: Path, rng: random.Random | None) -> Iterator[str]:
    """Row groups in the order of ``rng`` (None: as stored); only the column ``text`` is read."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _row_text(dict.fromkeys(names), f"'{path}'")
            groups = list(range(file.num_row_groups))
            if rng is not None:
                rng.shuffle(groups)
            for batch in file.iter_batches(256, row_groups=groups, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    yield _row_text({"text": text}, f"'{path}'")
    except pyarrow.ArrowException as error:
        raise InputError(f"'{path}' is damaged: {first_line(error)}") from error


def _dataset(name: str, config: str | None, seed: int) -> Iterator[str]:
    stream = load_split(name, config, "train", streaming=True)
    if stream.column_names and "text" not in stream.column_names:
        _row_text(dict.fromkeys(stream.column_names), f"The dataset '{name}'")
    rows = _unbroken(name, stream.shuffle(seed=seed, buffer_size=_BUFFER_DOCUMENTS))
    return _not_empty(name, (_row_text(row, f"The dataset '{name}'") for row in rows))


def _unbroken(name: str, rows: Iterable[Any]) -> Iterator[Any]:
    """The rows of a dataset; whatever its libraries raise on the way is an `InputError`."""
    try:
        yield from rows
    except Exception as error:
        raise InputError(f"The dataset '{name}' broke off: {first_line(error)}") from error


def _awaited(name: str, begin: Callable[[], Iterator[str]], progress: Progress) -> Iterator[str]:
    """The documents of a stream, read ahead by a thread, so that a stall is noticed.

    Their order is the stream's, and what it raises is raised here, in its place. A thread that
    waits for the network does not keep Python from ending.

    Raises:
        StoppedError: nothing came for `STALL_ENDS` seconds, or SIGTERM came meanwhile;
            InterruptedByUser: Ctrl-C did.
    """
    line: queue.Queue[tuple[str | None, BaseException | None]] = queue.Queue(_READ_AHEAD)
    closed = threading.Event()

    def put(document: str | None, error: BaseException | None = None) -> None:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                line.put((document, error), timeout=0.2)
                break

    def read() -> None:
        try:
            for document in begin():
                put(document)
                if closed.is_set():
                    return
            put(None)
        except BaseException as error:  # raised where the text is wanted
            put(None, error)

    threading.Thread(target=read, daemon=True, name=f"text of {name}").start()
    try:
        while (document := _next(name, line, progress)) is not None:
            yield document
    finally:
        closed.set()


def _next(name: str, line: "queue.Queue[Any]", progress: Progress) -> str | None:
    """The next document of a line, None at its end; a stall is said, and at last is an error."""
    began, said = time.monotonic(), 1
    while True:
        with contextlib.suppress(queue.Empty):
            document, error = line.get(timeout=min(1.0, STALL_SAID))
            if error is not None:
                raise error
            return document  # type: ignore[no-any-return]
        waited = time.monotonic() - began
        if (request := stop.pending()) is not None:
            raise stop.ended(request, f"Stopped while waiting for text from {name} ({request}).")
        if waited >= STALL_ENDS:
            raise StoppedError(f"No text came from {name} for {waited:.0f} s.", "Is it reachable?")
        if waited >= said * STALL_SAID:
            said += 1
            progress(Event("data", f"no text from {name} for {waited:.0f} s", level="warning"))


def _not_empty(name: str, documents: Iterable[str]) -> Iterator[str]:
    """Documents with something in them; none at all is an `InputError`."""
    empty = True
    for document in documents:
        if document.strip():
            empty = False
            yield document
    if empty:
        raise InputError(f"'{name}' holds no text.")


def shuffled(documents: Iterable[str], rng: random.Random, name: str) -> Iterator[str]:
    """The documents in the order of ``rng``, within a bounded buffer; none is an `InputError`."""
    return _not_empty(name, _buffered(documents, rng))


def _buffered(documents: Iterable[str], rng: random.Random) -> Iterator[str]:
    """Swap each document with a random one of the buffer."""
    buffer: list[str] = []
    characters = 0
    for document in documents:
        if len(buffer) < _BUFFER_DOCUMENTS and characters < _BUFFER_CHARACTERS:
            buffer.append(document)
            characters += len(document)
            continue
        at = rng.randrange(len(buffer))
        characters += len(document) - len(buffer[at])
        yield buffer[at]
        buffer[at] = document
    rng.shuffle(buffer)
    yield from buffer


def load_split(
    path: str, config: str | None, split: str, *, files: Any = None, streaming: bool = False
) -> Any:
    """One split of a dataset in the hub's layout, from the hub or a local folder.

    Raises `InputError` where it cannot be had; the message names the dataset.
    """
    import datasets
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    datasets.disable_progress_bars()
    what = f"'{path}'" + (f" ({config})" if config else "")
    try:
        return datasets.load_dataset(
            path, config, split=split, data_files=files, streaming=streaming,
            verification_mode="no_checks", cache_dir=cache_of(path),
        )  # fmt: skip
    except (DatasetNotFoundError, FileNotFoundError) as error:
        raise InputError(f"The dataset {what} is not to be had: {first_line(error)}") from error
    except (OfflineModeIsEnabled, ConnectionError, HfHubHTTPError) as error:
        raise InputError(
            f"The hub could not be reached for the dataset {what}: {first_line(error)}",
            "Name a local file or folder instead.",
        ) from error
    except (ValueError, OSError, datasets.exceptions.DatasetGenerationError) as error:
        raise InputError(f"The dataset {what} cannot be read: {first_line(error)}") from error


def cache_of(dataset: str) -> str | None:
    """Where `datasets` may keep what it makes of a local folder; None for a dataset of the hub.

    Its own cache knows a local folder by its last name and its README alone, and would give the
    rows of another folder, or those of before a change: ours depends on every file's path, size
    and time.
    """
    if not Path(dataset).is_dir():
        return None
    import datasets

    digest = hashlib.blake2b(digest_size=12)
    for file in sorted(Path(dataset).resolve().rglob("*")):
        stat = file.stat()
        digest.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "ternq" / digest.hexdigest())


def is_offline(offline: bool = False) -> bool:
    """Whether the hub is out of reach: by option, by its own variables, or without a network.

    The hub's library would try an address that cannot be resolved for half a minute.
    """
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    yes = {"1", "ON", "YES", "TRUE"}
    return offline or any(os.environ.get(name, "").upper() in yes for name in names) or _cut_off()


def _cut_off() -> bool:
    if getproxies():  # then the proxy resolves names
        return False
    hub = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        socket.getaddrinfo(hub.hostname, hub.port or 443)
    except OSError:
        return True
    return False


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
