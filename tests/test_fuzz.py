"""Files that nobody should have written: every reader of artefacts ends in one sentence.

Damage comes in two kinds. With the manifest as it was, every change must be found. Behind a
manifest that was made anew, as an adversary would, only `InputError` and `VerificationError` may
come out; or the artefact is valid, and then what loads is what the file holds, to the bit.
`bench/fuzz_reader.py` does the same from coverage.
"""

import json
import os
import random
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ternq import checkpoint, cli, files, hf, intake, publish
from ternq.errors import InputError, TernqError, VerificationError
from ternq.hf import Loaded
from ternq.linear import prepare
from ternq.pack import pack, verify
from ternq.progress import ignore
from ternq.recipe import Scheme
from ternq.source import open_artefact

Change = Callable[[Path], None]
REFUSED = (InputError, VerificationError)
pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and torch: not tested here
QUICK = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FEW = settings(QUICK, max_examples=25)  # where each loads a model
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Nothing waits for a disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "sync", lambda _: None)
        patch.setattr(files, "sync", lambda _: None)
        yield


def make(out: Path, **options: Any) -> dict[str, bytes]:
    """An artefact of one block with the smallest of everything; its files."""
    model = tiny.model()
    prepare(model, Scheme(group_size=7, shift=True))
    pack(
        Loaded(model, tiny.tokenizer(), "tiny", "tiny", "run", None, torch.float32), out, **options
    )
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a good artefact."""
    return make(tmp_path_factory.mktemp("whole") / "tiny")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a good artefact with an index."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "SHARD_BYTES", 9000)
        return make(tmp_path_factory.mktemp("sharded") / "tiny")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "artefact"


def put(folder: Path, content: dict[str, bytes]) -> Path:
    """A folder that holds these files and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return folder


def take_in(folder: Path) -> None:
    with intake.opened(
        str(folder),
        group_size=None,
        skip=(),
        offline=True,
        progress=ignore,
    ) as source:
        for _, weight in source.layers():
            weight.dequantized()
        for name in source.others:
            source.tensor(name)


READERS: dict[str, Callable[[Path], Any]] = {
    "verify": verify,
    "open": open_artefact,
    "load": lambda folder: hf.load(str(folder), offline=True),
    "intake": take_in,
}


def outcome(reader: Callable[[Path], Any], folder: Path) -> TernqError | None:
    """What a reader refuses a folder with; anything but a sentence of status 3 or 6 fails."""
    try:
        reader(folder)
    except REFUSED as error:
        assert error.exit_code in (3, 6)
        for text in filter(None, (error.message, error.hint)):
            assert text.isprintable()
            assert 10 < len(text) < 1200
        return error
    return None


def refused(folder: Path, reader: str = "verify") -> str:
    error = outcome(READERS[reader], folder)
    assert error is not None, f"{reader} took it"
    return error.message


def consistent(folder: Path) -> None:
    """Refused in words, by all readers; or valid, and what loads is what the file holds."""
    errors = {name: outcome(reader, folder) for name, reader in READERS.items()}
    if errors["verify"] is not None:
        return
    assert not any(errors.values()), errors
    stored = checkpoint.TensorFolder(folder)
    loaded = hf.load(str(folder), dtype=torch.float32, offline=True).model.state_dict()
    for name in stored:
        assert torch.equal(loaded[name], stored[name].to(loaded[name].dtype)), name


def remade(folder: Path, content: dict[str, bytes]) -> Path:
    """The files behind a manifest that fits them."""
    put(folder, {name: data for name, data in content.items() if name != publish.MANIFEST})
    publish.write_manifest(folder)
    return folder


# --- the manifest as it was: every change is found ------------------------------------------------


def flipped(data: bytes, byte: int, bit: int) -> bytes:
    return data[:byte] + bytes([data[byte] ^ 1 << bit]) + data[byte + 1 :]


def all_found(folder: Path, name: str, data: bytes, places: list[tuple[int, int]]) -> None:
    for byte, bit in places:
        (folder / name).write_bytes(flipped(data, byte, bit))
        with pytest.raises(REFUSED):  # a version of 3 is a later one
            publish.verify_files(folder)
    (folder / name).write_bytes(data)
    publish.verify_files(folder)


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_every_bit_of_the_manifest_counts(whole: dict[str, bytes], folder: Path, step: int) -> None:
    """Free text, white space, names and numbers of it included."""
    data = whole[publish.MANIFEST]
    end = len(data) - 120  # the hash of itself, and what stands around it
    places = [
        (byte, bit) for byte in [*range(0, end, step), *range(end, len(data))] for bit in range(8)
    ]
    all_found(put(folder, whole), publish.MANIFEST, data, places)


def flip_some(whole: dict[str, bytes], folder: Path, step: int) -> int:
    put(folder, whole)
    draw, count = random.Random(0), 0
    for name, data in whole.items():
        places = [(byte, draw.randrange(8)) for byte in range(0, len(data), step)]
        all_found(folder, name, data, places)
        count += len(places)
    return count


def test_a_flipped_bit_in_any_region_of_any_file_is_found(
    whole: dict[str, bytes], folder: Path
) -> None:
    assert flip_some(whole, folder, 17) > 2000


@pytest.mark.slow
def test_a_flipped_bit_in_any_byte_of_any_file_is_found(
    whole: dict[str, bytes], folder: Path
) -> None:
    assert flip_some(whole, folder, 1) == sum(map(len, whole.values()))


@QUICK
@given(data=st.data())
def test_any_change_of_any_file_is_found(
    whole: dict[str, bytes], folder: Path, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(whole)))
    old = whole[name]
    at = data.draw(st.integers(0, len(old)))
    new = data.draw(
        st.one_of(
            st.just(old[:at]),
            st.binary(min_size=1, max_size=40).map(lambda b: old + b),
            st.binary(min_size=1, max_size=40).map(lambda b: old[:at] + b + old[at:]),
            st.binary(max_size=40).map(lambda b: old[:at] + b + old[at + len(b) :]),
            st.just(old[at:] + old[:at]),
            st.binary(max_size=200),
        )
    )
    put(folder, {**whole, name: new})
    for reader in READERS:
        assert (
            new == old or (reader == "open" and name != publish.MANIFEST) or refused(folder, reader)
        )


@pytest.mark.parametrize("name", ["config.json", "README.md", "tokenizer.json"])
def test_a_missing_and_an_additional_file_are_found(
    whole: dict[str, bytes], folder: Path, name: str
) -> None:
    put(folder, {n: data for n, data in whole.items() if n != name})
    assert "is missing" in refused(folder)
    put(folder, {**whole, f"more-{name}": b"{}"})
    assert "not listed" in refused(folder)


def test_swapped_files_are_found(sharded: dict[str, bytes], folder: Path) -> None:
    first, second = [name for name in sharded if name.endswith(".safetensors")][:2]
    put(folder, {**sharded, first: sharded[second], second: sharded[first]})
    assert first in refused(folder)


def test_a_manifest_of_before_it_had_a_hash_is_read(whole: dict[str, bytes], folder: Path) -> None:
    manifest = json.loads(whole[publish.MANIFEST])
    del manifest["manifest"]
    put(folder, {**whole, publish.MANIFEST: json.dumps(manifest).encode()})
    assert verify(folder)["verify"]["ok"]


def test_files_of_a_hub_cache_are_links_and_are_read(
    whole: dict[str, bytes], folder: Path, tmp_path: Path
) -> None:
    """Links out of the folder are allowed: what counts is what is read, and that is hashed."""
    put(tmp_path / "blobs", whole)
    folder.mkdir()
    for name in whole:
        (folder / name).symlink_to(Path("..", "blobs", name))
    assert verify(folder)["verify"]["ok"]
    (tmp_path / "blobs" / "config.json").write_bytes(b"{}")
    assert "config.json" in refused(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes there")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_is_not_waited_for(whole: dict[str, bytes], folder: Path, name: str) -> None:
    put(folder, {n: data for n, data in whole.items() if n != name})
    os.mkfifo(folder / name)
    for reader in READERS:
        assert refused(folder, reader)


# --- the manifest itself --------------------------------------------------------------------------

JSON_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 2**31, 2**63, 2**70, -(2**70), 0.5, 1e308, float("nan"),
    float("inf"), "", "x", "..", "../x", "/etc/passwd", "a/b", "a\nb", "\x1b[31mred", "\ud800",
    "x" * 5000, [], {}, [[]], ["x"], [None], {"x": 1}, {"": ""}, [1, "x", None, {}],
]  # fmt: skip


@QUICK
@given(key=st.sampled_from(["ternq_format", "files", "path", "bytes", "sha256", "manifest"]),
       value=st.sampled_from(JSON_VALUES), drop=st.booleans())  # fmt: skip
def test_manifests_of_wrong_types_are_refused(
    whole: dict[str, bytes], folder: Path, key: str, value: Any, drop: bool
) -> None:
    manifest = json.loads(whole[publish.MANIFEST])
    del manifest["manifest"]
    place = manifest["files"][1] if key in manifest["files"][1] else manifest
    if drop:
        place.pop(key, None)
    else:
        place[key] = value
    put(folder, {**whole, publish.MANIFEST: json.dumps(manifest).encode()})
    for reader in READERS:
        error = outcome(READERS[reader], folder)
        unchanged = (key == "manifest" and (drop or value is None)) or reader == "open"
        assert error is not None or unchanged
        if reader == "open" and key not in ("bytes", "sha256", "path"):
            assert error is not None or unchanged


TWICE = {
    "ternq.json": (b'"ternq_format": 1,', b'"ternq_format": 1, "ternq_format": 1,'),
    "config.json": (b'"vocab_size"', b'"vocab_size": 9, "vocab_size"'),
}


@pytest.mark.parametrize("name", sorted(TWICE))
def test_a_name_that_stands_twice_is_refused(
    whole: dict[str, bytes], folder: Path, name: str
) -> None:
    put(folder, {**whole, name: whole[name].replace(*TWICE[name])})
    if name != publish.MANIFEST:
        publish.write_manifest(folder)
    for reader in READERS:
        assert "stands twice" in refused(folder, reader)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"[]", "no JSON object"),
        (b"\xff\xfe", "not JSON"),
        (b'{"ternq_format": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not JSON"),
        (b'{"x": ' + b"[" * 200 + b"]" * 200 + b"}", "nested"),
        (b'{"x": NaN}', "no format version"),
        (b"\x00" * 100, "not JSON"),
    ],
)
@pytest.mark.parametrize("name", ["ternq.json", "config.json"])
def test_json_that_is_none(
    whole: dict[str, bytes], folder: Path, name: str, content: bytes, words: str
) -> None:
    put(folder, {**whole, name: content})
    if name != publish.MANIFEST:
        publish.write_manifest(folder)
        words = "" if "version" in words else words
    for reader in READERS:
        assert words in refused(folder, reader)


def test_a_file_too_large_to_be_json_is_not_read(whole: dict[str, bytes], folder: Path) -> None:
    put(folder, whole)
    with (folder / publish.MANIFEST).open("r+b") as file:
        file.truncate(2**40)  # takes no room
    assert "too large" in refused(folder)


# --- a later version ------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", sorted(READERS))
def test_a_later_format_is_refused_by_name(
    whole: dict[str, bytes], folder: Path, reader: str
) -> None:
    manifest = whole[publish.MANIFEST].replace(b'"ternq_format": 1', b'"ternq_format": 2')
    error = outcome(READERS[reader], put(folder, {**whole, publish.MANIFEST: manifest}))
    assert isinstance(error, InputError)
    assert "ternq format 2" in error.message
    assert error.hint == "Install a newer ternq."


@pytest.mark.parametrize("reader", sorted(READERS))
def test_a_later_configuration_is_refused_by_name(
    whole: dict[str, bytes], folder: Path, reader: str
) -> None:
    config = whole["config.json"].replace(b'"format_version": 1', b'"format_version": 2')
    error = outcome(READERS[reader], remade(folder, {**whole, "config.json": config}))
    assert isinstance(error, InputError)
    assert "ternq format 2" in error.message
    assert error.hint == "Install a newer ternq."


@pytest.mark.parametrize("version", [True, 1.0, "1", 0, -1, None, [], float("nan")])
def test_a_version_that_is_none_is_refused(
    whole: dict[str, bytes], folder: Path, version: Any
) -> None:
    config = json.loads(whole["config.json"])
    config["quantization_config"]["format_version"] = version
    remade(folder, {**whole, "config.json": json.dumps(config).encode()})
    for reader in READERS:
        assert refused(folder, reader)


# --- config.json ----------------------------------------------------------------------------------

FAMILIES = [
    "gpt2", "mixtral", "mamba", "bart", "opt", "jamba", "t5", "xlnet", "bert", "nemotron_h", "nope",
    "gemma3", "llama4", "qwen3_moe", 5, None,
]  # fmt: skip
LIES: dict[str, Any] = {
    "vocab_size": [2**31, 2**40, 0, -1, 258, "257", 257.0],
    "hidden_size": [2**31, 2**62, 2**70, 0, 8, -16],
    "head_dim": [2**31, 0, 7],
    "num_attention_heads": [2**14, 0, 3, -2],
    "num_hidden_layers": [10**9, 0, -1, 2, 20],
    "num_labels": [10**9, 2**31],
    "intermediate_size": [10**7, 0],
    "pad_token_id": [2**62, "x"],
    "hidden_act": ["nope", 5, None],
    "rms_norm_eps": ["x", float("nan")],
    "rope_parameters": [{"rope_type": "nope"}, [], 5],
    "model_type": FAMILIES,
    "dtype": ["load", "int8", 5, None, [], {"": "float32"}],
    "tie_word_embeddings": [True, "x"],
    "is_encoder_decoder": [True],
    "transformers_weights": ["other.safetensors", "../model.safetensors"],
    "attn_implementation": ["owner/kernel", {"": "owner/kernel"}],
    "_attn_implementation_internal": ["owner/kernel"],
    "text_config": [{"num_hidden_layers": 10**9}, {"hidden_size": 3}],
    "quantization_config": [None, [], "x", {}, {"quant_method": "gptq"}],
}
QUANTIZATION_LIES: dict[str, Any] = {
    "group_size": [0, -7, 2**70, 8, 7.0, "7", True, None],
    "shift": [1, None, False, "true"],
    "codec": ["zip", None, 5],
    "modules": [None, [], "lm_head", ["../x"], [LAYER, LAYER], [1], [""], ["a\nb"], ["\ud800"]],
    "int8_modules": [["lm_head"], ["model"], ["zzz"], ["model.norm"], [""], [f"{LAYER}.x"], {}],
}


@pytest.mark.parametrize("key", sorted(LIES) + sorted(QUANTIZATION_LIES))
def test_a_configuration_that_lies_is_refused(
    whole: dict[str, bytes], folder: Path, key: str
) -> None:
    for value in (LIES | QUANTIZATION_LIES)[key]:
        config = json.loads(whole["config.json"])
        (config["quantization_config"] if key in QUANTIZATION_LIES else config)[key] = value
        remade(folder, {**whole, "config.json": json.dumps(config).encode()})
        for reader in ("verify", "load"):
            error = outcome(READERS[reader], folder)
            assert error is not None or (key, value) == ("dtype", None), (key, value)


@FEW
@given(data=st.data())
def test_any_value_anywhere_in_a_configuration(
    whole: dict[str, bytes], folder: Path, data: st.DataObject
) -> None:
    config = json.loads(whole["config.json"])
    place = config
    if data.draw(st.booleans()):
        place = config["quantization_config"]
    more = ["torch_dtype", "layer_types", "id2label", "sliding_window", "auto_map", "head_dim"]
    key = data.draw(st.sampled_from(sorted(place) + more))
    place[key] = data.draw(st.sampled_from(JSON_VALUES))
    if data.draw(st.integers(0, 3)) == 0:
        config.pop(data.draw(st.sampled_from(sorted(config))))
    consistent(remade(folder, {**whole, "config.json": json.dumps(config).encode()}))


def test_code_beside_the_model_is_never_run(
    whole: dict[str, bytes], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even asked for: transformers would wait for an answer on stdin."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass X: pass\n".encode()
    config = json.loads(whole["config.json"])
    for kind in ("llama", "nope"):
        config["model_type"] = kind
        config["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.X")
        settings = json.loads(whole["tokenizer_config.json"])
        settings["auto_map"] = {"AutoTokenizer": ["evil.X", None]}
        content = {"config.json": config, "tokenizer_config.json": settings}
        made = {name: json.dumps(c).encode() for name, c in content.items()}
        remade(folder, {**whole, **made, "evil.py": code})
        for reader in READERS.values():
            outcome(reader, folder)
    assert not (tmp_path / "ran").exists()


# --- tensors --------------------------------------------------------------------------------------


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


HEADER_LIES: dict[str, list[Any]] = {
    "data_offsets": [
        [0, 0], [0, 2**40], [2**63, 2**63 + 512], [-512, 0], [512, 0], [1, 513], ["a", "b"], [0],
        None, [0, 512, 1024], [0.0, 512.0], [2**64, 2**64],
    ],
    "shape": [[], [2**62, 2**62], [-16, -32], [2**31, 0], [16, 17], [1] * 1000, None, "x", [1.5]],
    "dtype": ["F64", "F8_E4M3", "U8", "I8", "BOOL", "F4", "nope", None, 5],
}  # fmt: skip


@pytest.mark.parametrize("key", sorted(HEADER_LIES))
@pytest.mark.parametrize("name", [f"{LAYER}.weight", f"{LAYER}.weight_scale", "lm_head.weight"])
def test_a_header_that_lies_is_refused(
    whole: dict[str, bytes], folder: Path, key: str, name: str
) -> None:
    for value in HEADER_LIES[key]:
        header, body = parts(whole[checkpoint.TENSORS])
        if header[name][key] == value:
            continue
        header[name][key] = value
        remade(folder, {**whole, checkpoint.TENSORS: joined(header, body)})
        for reader in READERS:
            assert refused(folder, reader)


def renamed_to(new: str) -> Callable[[dict[str, Any], bytes], bytes]:
    def change(header: dict[str, Any], body: bytes) -> bytes:
        header[new] = header.pop("lm_head.weight")
        return joined(header, body)

    return change


def twice(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header)
    entry = json.dumps("lm_head.weight") + ": " + json.dumps(header["lm_head.weight"])
    return joined((text[:-1] + ", " + entry + "}").encode(), body)


def hole(header: dict[str, Any], body: bytes) -> bytes:
    for entry in header.values():
        if "data_offsets" in entry:
            entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]
    return joined(header, bytes(8) + body)


def overlap(header: dict[str, Any], body: bytes) -> bytes:
    header["lm_head.weight"]["data_offsets"] = header["model.embed_tokens.weight"]["data_offsets"]
    return joined(header, body)


def metadata(value: Any) -> Callable[[dict[str, Any], bytes], bytes]:
    return lambda header, body: joined({**header, "__metadata__": value}, body)


FILES: dict[str, Callable[[dict[str, Any], bytes], bytes]] = {
    "empty": lambda header, body: b"",
    "seven bytes": lambda header, body: bytes(7),
    "no header": lambda header, body: struct.pack("<Q", 0) + body,
    "header length beyond the end": lambda header, body: struct.pack("<Q", 2**40) + body,
    "header length beyond all": lambda header, body: struct.pack("<Q", 2**64 - 1) + body,
    "header is a list": lambda header, body: joined([], body),
    "header is a number": lambda header, body: joined(5, body),
    "header not UTF-8": lambda header, body: joined(b'{"\xff": 1}', body),
    "header nested": lambda header, body: joined(b"[" * 10**5, body),
    "header without tensors": lambda header, body: joined({}, b""),
    "tensor is null": lambda header, body: joined({**header, "lm_head.weight": None}, body),
    "name of a parent": renamed_to("../../x"),
    "empty name": renamed_to(""),
    "name with a line": renamed_to("a\nb\x1b[2J"),
    "lone surrogate": renamed_to("\ud800"),
    "very long name": renamed_to("x" * 10**6),
    "name twice": twice,
    "metadata is a list": metadata([]),
    "metadata holds a number": metadata({"format": 5}),
    "hole at the beginning": hole,
    "overlap": overlap,
    "more at the end": lambda header, body: joined(header, body + bytes(9)),
    "less at the end": lambda header, body: joined(header, body[:-9]),
}


@pytest.mark.parametrize("kind", sorted(FILES))
def test_a_file_that_is_no_safetensors_file(
    whole: dict[str, bytes], folder: Path, kind: str
) -> None:
    data = FILES[kind](*parts(whole[checkpoint.TENSORS]))
    remade(folder, {**whole, checkpoint.TENSORS: data})
    for reader in READERS:
        assert refused(folder, reader)


def test_reordered_tensors_that_are_named_rightly_are_the_same_model(
    whole: dict[str, bytes], folder: Path
) -> None:
    header, body = parts(whole[checkpoint.TENSORS])
    names = [name for name in header if name != "__metadata__"]
    backwards = {name: header[name] for name in reversed(names)}
    remade(folder, {**whole, checkpoint.TENSORS: joined(backwards, body)})
    consistent(folder)
    assert verify(folder)["verify"]["ok"]


@QUICK
@given(data=st.data())
def test_any_bytes_in_the_tensors_behind_a_good_manifest(
    whole: dict[str, bytes], folder: Path, data: st.DataObject
) -> None:
    old = whole[checkpoint.TENSORS]
    header = 8 + int.from_bytes(old[:8], "little")
    at = data.draw(st.one_of(st.integers(0, header), st.integers(0, len(old) - 1)))
    new = data.draw(st.binary(min_size=1, max_size=8))
    changed = old[:at] + new + old[at + len(new) :]
    consistent(remade(folder, {**whole, checkpoint.TENSORS: changed[: len(old)]}))


@FEW
@given(data=st.data())
def test_any_bytes_in_another_file_behind_a_good_manifest(
    whole: dict[str, bytes], folder: Path, data: st.DataObject
) -> None:
    names = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    name = data.draw(st.sampled_from(names))
    at = data.draw(st.integers(0, len(whole[name]) - 1))
    new = data.draw(st.one_of(st.binary(max_size=4), st.sampled_from([b"[", b"9", b"null", b"-"])))
    over = data.draw(st.integers(0, 8))
    changed = whole[name][:at] + new + whole[name][at + over :]
    consistent(remade(folder, {**whole, name: changed}))


# --- shards and other weights ---------------------------------------------------------------------


def index(change: Callable[[dict[str, str]], Any]) -> Callable[[dict[str, bytes]], None]:
    def damage(content: dict[str, bytes]) -> None:
        found = json.loads(content[checkpoint.INDEX])
        changed = change(found["weight_map"])
        found["weight_map"] = found["weight_map"] if changed is None else changed
        content[checkpoint.INDEX] = json.dumps(found).encode()

    return damage


def names_all(value: Any) -> Callable[[dict[str, bytes]], None]:
    return index(lambda where: dict.fromkeys(where, value))


def drop_one(where: dict[str, str]) -> None:
    where.pop("lm_head.weight")


def add_one(where: dict[str, str]) -> None:
    where["another"] = where["lm_head.weight"]


def exchange(where: dict[str, str]) -> None:
    where["lm_head.weight"], where[f"{LAYER}.weight"] = (
        where[f"{LAYER}.weight"],
        where["lm_head.weight"],
    )


def add_file(name: str) -> Callable[[dict[str, bytes]], None]:
    def damage(content: dict[str, bytes]) -> None:
        content[name] = b"x"

    return damage


SHARDS: dict[str, Callable[[dict[str, bytes]], None]] = {
    "outside": names_all("../tiny/model.safetensors"),
    "absolute": names_all("/etc/passwd"),
    "missing": names_all("model-00009-of-00009.safetensors"),
    "empty": names_all(""),
    "a number": names_all(5),
    "no map": index(lambda where: []),
    "empty map": index(lambda where: {}),
    "one name less": index(drop_one),
    "one name more": index(add_one),
    "files exchanged": index(exchange),
    "an adapter": add_file("adapter_config.json"),
    "a pickle": add_file("pytorch_model.bin"),
    "weights of nobody": add_file("extra.safetensors"),
    "both": add_file("model.safetensors"),
}


@pytest.mark.parametrize("kind", sorted(SHARDS))
def test_an_index_that_lies_and_weights_that_nobody_checks(
    sharded: dict[str, bytes], folder: Path, kind: str
) -> None:
    content = dict(sharded)
    SHARDS[kind](content)
    remade(folder, content)
    for reader in READERS:
        assert refused(folder, reader)


def test_exchanged_shards_are_the_same_model_or_refused(
    sharded: dict[str, bytes], folder: Path
) -> None:
    consistent(remade(folder, sharded))
    first, second = [name for name in sharded if name.endswith(".safetensors")][:2]
    remade(folder, {**sharded, first: sharded[second], second: sharded[first]})
    assert "does not say where" in refused(folder)


def test_a_tensor_in_two_shards_is_refused(sharded: dict[str, bytes], folder: Path) -> None:
    first, second = [name for name in sharded if name.endswith(".safetensors")][:2]
    remade(folder, {**sharded, second: sharded[first]})
    assert "both hold" in refused(folder)


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"config.json": b"{"}, 6),
        ({"model.safetensors": b"\xff" * 64}, 6),
        ({"ternq.json": b"[" * 10**5}, 6),
        ({"ternq.json": b'{"ternq_format": 2}'}, 3),
        ({"evil\n.txt": b""}, 6),
    ],
)
@pytest.mark.parametrize("command", [["pack", "--verify"], ["generate"]])
def test_the_command_line_says_it(
    whole: dict[str, bytes],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, bytes],
    status: int,
    command: list[str],
) -> None:
    put(folder, {**whole, **change})
    text = ["hello"] if command == ["generate"] else []
    assert cli.run([*command, str(folder), *text, "--json"]) == status
    said = capsys.readouterr()
    payload = json.loads(said.out)
    assert payload["exit_code"] == status
    assert payload["error"]["message"].isprintable()
    assert "Traceback" not in said.err


# --- against the model it was made from -----------------------------------------------------------


@pytest.fixture(scope="module")
def model(whole: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another copy, for the model that it was made from."""
    return put(tmp_path_factory.mktemp("model") / "tiny", whole)


def moved(name: str, row: int) -> Change:
    def change(folder: Path) -> None:
        stored = checkpoint.load_tensors(folder / checkpoint.TENSORS)
        flat = stored[name].view(torch.uint8)
        flat[row, ..., 0] ^= 1
        checkpoint.save_tensors(stored, folder / checkpoint.TENSORS)

    return change


def other_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (moved(f"{LAYER}.weight_scale", 3), "the first is row 3"),
        (moved("model.embed_tokens.weight", 200), "1 of its 257 rows differ, the first is row 200"),
        (moved("lm_head.weight", 7), "the first is row 7"),
        (other_config, "rms_norm_eps is 0.5 here"),
    ],
)
def test_what_verifies_alone_is_compared_with_the_model_row_by_row(
    whole: dict[str, bytes], model: Path, folder: Path, change: Change, words: str
) -> None:
    put(folder, whole)
    assert any("Every row" in note for note in verify(folder, str(model))["notes"])
    change(folder)
    publish.write_manifest(folder)
    assert verify(folder)["verify"]["ok"]
    with pytest.raises(VerificationError, match=words):
        verify(folder, str(model))


def test_code_that_is_not_ours_is_said(whole: dict[str, bytes], folder: Path) -> None:
    assert not any("trust_remote_code" in note for note in verify(put(folder, whole))["notes"])
    name = "modeling_ternq.py"
    remade(folder, {**whole, name: whole[name] + b"import os\n"})
    assert any(f"{name} is not the code" in note for note in verify(folder)["notes"])
