"""Fuzz the readers of artefacts from coverage, with atheris (libFuzzer).

atheris is no dependency: it goes into an environment of its own, beside the project.

    python3 -m venv FUZZ && FUZZ/bin/pip install -q -c constraints.txt -e . atheris
    FUZZ/bin/python bench/fuzz_reader.py tensors -max_total_time=300

The first word is the file that is fuzzed: ``tensors`` (model.safetensors), ``config``
(config.json), ``manifest`` (ternq.json) or ``tokenizer`` (tokenizer.json); the others of a fixed
tiny artefact stay as they are, and the manifest is made anew unless it is the one. What follows
goes to libFuzzer. An input is either the file itself, or says how to edit the good one, so that
JSON stays JSON. `ternq.pack.verify` may refuse it as `InputError` or `VerificationError`, in one
line; or take it, and then the model that loads must hold what the file holds. Anything else, 20
seconds, or 4 GB of memory is a finding. What was found: docs/security.md.
"""

import json
import logging
import os
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "critical"
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import atheris
import torch

with atheris.instrument_imports(include=["ternq", "json"]):
    import tiny

    from ternq import checkpoint, files, hf, pack, publish
    from ternq.errors import InputError, VerificationError
    from ternq.linear import prepare
    from ternq.recipe import Scheme

FILES = {
    "tensors": "model.safetensors",
    "config": "config.json",
    "manifest": "ternq.json",
    "tokenizer": "tokenizer.json",
}
LIMITS = ["-timeout=20", "-rss_limit_mb=4096", "-max_len=40000", "-print_final_stats=1"]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**62, 2**70, 0.5, float("nan"), float("inf"), "",
    "x", "../x", "a\nb", "\ud800", [], {}, ["x"], {"": 1}, "llama", "gpt2", "mixtral", "float16",
    "F64",
]  # fmt: skip


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    found: list[tuple[Any, Any]] = []
    level = [content]
    while level:
        at = level.pop()
        keys: list[Any] = list(at) if isinstance(at, dict) else list(range(len(at)))
        found += [(at, key) for key in keys]
        level += [at[key] for key in keys if isinstance(at[key], dict | list)]
    return found


def edit(content: Any, draw: Any) -> None:
    """Some values replaced, removed, exchanged or added."""
    for _ in range(draw.ConsumeIntInRange(1, 4)):
        found = places(content)
        if not found:
            return
        at, key = found[draw.ConsumeIntInRange(0, len(found) - 1)]
        other, name = found[draw.ConsumeIntInRange(0, len(found) - 1)]
        kind = draw.ConsumeIntInRange(0, 5)
        if kind == 0:
            del at[key]
        elif kind == 1:
            at[key] = json.loads(json.dumps(other[name]))
        elif kind == 2:
            at[key] = draw.ConsumeInt(draw.ConsumeIntInRange(1, 9))
        elif kind == 3:
            at[key] = draw.ConsumeUnicode(draw.ConsumeIntInRange(0, 20))
        elif kind == 4 and isinstance(at, dict):
            at[draw.ConsumeUnicode(12) or str(name)] = at[key]
        else:
            at[key] = VALUES[draw.ConsumeIntInRange(0, len(VALUES) - 1)]


def edited_json(good: bytes, draw: Any) -> bytes:
    content = json.loads(good)
    edit(content, draw)
    return json.dumps(content).encode()


def edited_manifest(good: bytes, draw: Any) -> bytes:
    """Without its own hash, which would hide all else."""
    content = json.loads(good)
    del content["manifest"]
    edit(content, draw)
    return json.dumps(content).encode()


def edited_tensors(good: bytes, draw: Any) -> bytes:
    """Another header before the same values, or other values behind the same header."""
    size = int.from_bytes(good[:8], "little")
    header, body = good[8 : 8 + size], bytearray(good[8 + size :])
    if draw.ConsumeBool():
        for _ in range(draw.ConsumeIntInRange(1, 8)):
            body[draw.ConsumeIntInRange(0, len(body) - 1)] = draw.ConsumeIntInRange(0, 255)
        return good[: 8 + size] + bytes(body)
    text = edited_json(header, draw)
    return struct.pack("<Q", len(text)) + text + bytes(body)


EDITS = {"tensors": edited_tensors, "manifest": edited_manifest}


def check(folder: Path) -> bool:
    """Whether `verify` takes a folder; AssertionError if it says so and it is not so."""
    try:
        pack.verify(folder)
    except (InputError, VerificationError) as error:
        assert error.message.isprintable(), repr(error.message)
        return False
    stored = checkpoint.TensorFolder(folder)
    loaded = hf.load(str(folder), dtype=torch.float32, offline=True).model.state_dict()
    for name in stored:
        same = torch.equal(loaded[name], stored[name].to(loaded[name].dtype))
        assert same or not stored[name].isfinite().all(), name
    return True


def target(kind: str, folder: Path) -> Callable[[bytes], None]:
    """What libFuzzer calls: the first byte says whether the rest is the file or its editing."""
    path = folder / FILES[kind]
    good = path.read_bytes()
    change = EDITS.get(kind, edited_json)
    taken: list[bool] = []

    def one(data: bytes) -> None:
        new = data[1:]
        if data[:1] != b"=":
            new = change(good, atheris.FuzzedDataProvider(data[1:]))
        path.write_bytes(new)
        if kind != "manifest":
            publish.write_manifest(folder)
        taken.append(check(folder))
        if len(taken) % 1000 == 0:
            print(f"{len(taken)} inputs, {sum(taken)} of them taken", file=sys.stderr)

    return one


def main() -> None:
    kind, *options = sys.argv[1:]
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    for module in (publish, files):
        module.sync = lambda _: None  # no waiting for the disk
    model = tiny.model()
    prepare(model, Scheme(group_size=7, shift=True))
    with tempfile.TemporaryDirectory() as home:
        folder, corpus = Path(home, "artefact"), Path(home, "corpus")
        own = hf.Loaded(model, tiny.tokenizer(), "tiny", "tiny", "run", None, torch.float32)
        pack.pack(own, folder)
        corpus.mkdir()
        (corpus / "good").write_bytes(b"=" + (folder / FILES[kind]).read_bytes())
        (corpus / "edit").write_bytes(b"+" + bytes(range(64)))
        atheris.Setup([sys.argv[0], *LIMITS, *options, str(corpus)], target(kind, folder))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
