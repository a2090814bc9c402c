"""Output folders, manifests and safetensors: whole or absent, checked, never trusted."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ternq import publish as publishing
from ternq.checkpoint import INDEX, TensorFolder, load_tensors, save_tensors
from ternq.errors import InputError, RecipeError, ResourceError, VerificationError
from ternq.files import free_disk, plain_name, read_json, write_json, writing
from ternq.publish import (
    MANIFEST,
    check_output,
    newest_artefact,
    publish,
    read_manifest,
    staging,
    verify_files,
    write_manifest,
)
from ternq.writer import write_tensors


def make(folder: Path, text: str = "one") -> Path:
    """A published artefact with two files, one in a subfolder."""
    with staging(folder) as staged:
        (staged / "sub").mkdir()
        (staged / "a.txt").write_text(text)
        (staged / "sub" / "b.txt").write_text("two")
        write_manifest(staged, {"kind": "test"})
    return folder


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


# Output folders


def test_staging_publishes_and_leaves_nothing_else(tmp_path: Path) -> None:
    out = make(tmp_path / "deep" / "out")
    assert names(out.parent) == {"out"}
    assert verify_files(out)["kind"] == "test"


def test_published_permissions_are_those_of_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with staging(tmp_path / "out") as staged:
            save_tensors({"w": torch.zeros(1)}, staged / "model.safetensors")
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), staging(tmp_path / "out") as staged:
        (staged / "half").write_text("x")
        raise error
    assert names(tmp_path) == set()


def test_existing_output_is_kept(tmp_path: Path) -> None:
    out = make(tmp_path / "out", "old")
    with pytest.raises(RecipeError, match="exists already"), staging(out):
        pytest.fail("began to write")
    assert (out / "a.txt").read_text() == "old"
    with staging(out, overwrite=True) as staged:
        (staged / "a.txt").write_text("new")
    assert names(tmp_path) == {"out"}
    assert names(out) == {"a.txt"}


def test_failed_overwrite_keeps_the_old(tmp_path: Path) -> None:
    out = make(tmp_path / "out", "old")
    with pytest.raises(ValueError, match="late"), staging(out, overwrite=True):
        raise ValueError("late")
    assert (out / "a.txt").read_text() == "old"
    assert names(tmp_path) == {"out"}


def test_overwrite_never_deletes_what_ternq_did_not_make(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    check_output(home, overwrite=True)  # empty: nothing to lose
    (home / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(make(tmp_path / "out"))
    for out in (home, tmp_path / "file", tmp_path / "link"):
        with pytest.raises(RecipeError, match="not something ternq made"):
            check_output(out, overwrite=True)


@pytest.mark.parametrize("name", [".", "..", "/", "a/.."])
def test_names_that_name_no_new_folder(name: str) -> None:
    with pytest.raises(RecipeError, match="no name"):
        check_output(Path(name), overwrite=True)


def test_output_below_a_file_or_in_a_forbidden_place(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match="not a folder"):
        check_output(tmp_path / "file" / "out")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ResourceError, match="no permission"):
        check_output(tmp_path / "out")


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "no space"), (errno.EROFS, "read-only"), (errno.EACCES, "permission")],
)
def test_full_or_forbidden_disk_is_said(tmp_path: Path, number: int, words: str) -> None:
    with pytest.raises(ResourceError, match=words), staging(tmp_path / "out"):
        raise OSError(number, "so the system says")
    assert names(tmp_path) == set()


def test_other_os_errors_are_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError), writing(tmp_path):
        raise ConnectionError(errno.ECONNRESET, "reset")


def test_killed_between_the_renames_the_old_comes_back(tmp_path: Path) -> None:
    out = make(tmp_path / "out", "old")
    out.rename(tmp_path / ".out.replaced-0123abcd")
    with pytest.raises(RecipeError, match="exists already"):
        check_output(out)
    assert verify_files(out)
    assert names(tmp_path) == {"out"}


def test_a_second_rename_that_fails_undoes_the_first(tmp_path: Path) -> None:
    out = make(tmp_path / "out", "old")
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "absent", out, overwrite=True)
    assert (out / "a.txt").read_text() == "old"
    assert names(tmp_path) == {"out"}


def test_what_a_killed_command_left_is_swept(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from ternq.publish import staging\n"
        "with staging(Path(sys.argv[1])) as s: (s / 'x').write_text('x'); os._exit(9)"
    )
    out = tmp_path / "out"
    root = Path(publishing.__file__).parents[1]
    subprocess.run([sys.executable, "-c", script, str(out)], cwd=root, check=False)
    left = names(tmp_path)
    assert len(left) == 1 and ".out.staging-" in left.pop()
    make(out)
    assert names(tmp_path) == {"out"}


def test_a_staging_folder_in_use_is_not_swept(tmp_path: Path) -> None:
    with staging(tmp_path / "out") as first:
        (first / "a").write_text("first")
        with pytest.raises(RuntimeError), staging(tmp_path / "out"):
            raise RuntimeError
        assert (first / "a").exists()
    assert names(tmp_path) == {"out"}


def test_newest_artefact(tmp_path: Path) -> None:
    assert newest_artefact(tmp_path) is None
    for age, name in ((30, "b"), (10, "a"), (20, "c"), (0, ".hidden")):
        make(tmp_path / name)
        os.utime(tmp_path / name / MANIFEST, ns=(10**18 - age, 10**18 - age))
    assert newest_artefact(tmp_path) == tmp_path / "a"
    assert newest_artefact(tmp_path / "b") == tmp_path / "b"


def test_free_disk_of_a_path_to_be(tmp_path: Path) -> None:
    assert free_disk(tmp_path / "not" / "yet") > 0


# Manifests


def test_manifest_lists_every_file(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    manifest = read_manifest(out)
    assert [f["path"] for f in manifest["files"]] == ["a.txt", "sub/b.txt"]
    assert manifest["files"][0]["bytes"] == 3
    # printf one | sha256sum
    assert manifest["files"][0]["sha256"] == (
        "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    )


def test_verify_names_what_is_wrong(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    (out / "a.txt").write_text("0ne")
    with pytest.raises(VerificationError, match=r"a\.txt has changed"):
        verify_files(out)
    (out / "a.txt").write_text("longer")
    with pytest.raises(VerificationError, match=r"a\.txt has 6 bytes"):
        verify_files(out)
    (out / "a.txt").unlink()
    with pytest.raises(VerificationError, match=r"a\.txt is missing"):
        verify_files(out)
    (out / "a.txt").write_text("one")
    (out / ".gitattributes").write_text("hubs add such names")
    assert verify_files(out)
    (out / "sub" / "pytorch_model.bin").write_text("surprise")
    with pytest.raises(VerificationError, match=r"pytorch_model\.bin is not listed"):
        verify_files(out)


def test_a_linked_folder_is_not_part_of_an_artefact(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    (out / "more").symlink_to(make(tmp_path / "elsewhere"))
    with pytest.raises(VerificationError, match="more is not listed"):
        verify_files(out)


def test_a_pipe_under_a_listed_name_does_not_hang(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    (out / "a.txt").unlink()
    os.mkfifo(out / "a.txt")
    with pytest.raises(VerificationError, match="missing"):
        verify_files(out)


GOOD: dict[str, Any] = {"path": "a.txt", "bytes": 3, "sha256": "0" * 64}
BAD_ENTRIES: list[Any] = [
    [],
    {},
    "a.txt",
    [3],
    [GOOD, GOOD],
    *(
        [{**GOOD, "path": p}]
        for p in ("../a", "/etc/passwd", "a/../../b", "", ".", "a//b", "c:\\x", "a\0", 7, MANIFEST)
    ),
    *([{**GOOD, "bytes": b}] for b in (-1, 2**63, 1.5, "3", None, True)),
    *([{**GOOD, "sha256": s}] for s in ("", "0" * 63, "z" * 64, None, 5)),
]


@pytest.mark.parametrize("entries", BAD_ENTRIES)
def test_impossible_entries_are_refused(tmp_path: Path, entries: Any) -> None:
    write_json(tmp_path / MANIFEST, {"ternq_format": 1, "files": entries})
    with pytest.raises(VerificationError):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "[" * 100_000, '{"ternq_format": true}'])
def test_damaged_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(VerificationError):
        read_manifest(tmp_path)


def test_no_manifest_and_a_later_format_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a ternq artefact"):
        read_manifest(tmp_path)
    write_json(tmp_path / MANIFEST, {"ternq_format": 2, "files": [GOOD]})
    with pytest.raises(InputError, match="format 2"):
        read_manifest(tmp_path)


def test_plain_names() -> None:
    assert all(map(plain_name, ("a", "a/b.txt", "a b", "ä", "..a")))
    assert not any(map(plain_name, ("a/", "/a", "a\\b", "a:b", "a\n", None)))


# JSON and tensors


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert names(tmp_path) == {"x.json"}
    with pytest.raises(InputError, match="does not exist"):
        read_json(tmp_path / "y.json")


def test_tensors_round_trip(tmp_path: Path) -> None:
    base = torch.arange(12, dtype=torch.float32)
    tensors = {
        "codes": torch.tensor([[1, 2]], dtype=torch.uint8),
        "half": torch.tensor([1.5], dtype=torch.float16),
        "brain": torch.tensor(3.0, dtype=torch.bfloat16),
        "view": base[2:5],
        "transposed": base.view(3, 4).T,
        "same": base,
        "alias": base,
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "empty": torch.zeros(0, 4),
    }
    save_tensors(tensors, tmp_path / "x.safetensors")
    loaded = load_tensors(tmp_path / "x.safetensors")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor.detach())
    assert names(tmp_path) == {"x.safetensors"}
    assert (tmp_path / "x.safetensors").stat().st_size < 1000  # the view is stored alone


def test_sharded_equals_whole(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(7)}
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensors(tmp_path, layout, tensors.__getitem__, shard_bytes=100)
    assert (tmp_path / "model-00001-of-00004.safetensors").is_file()
    folder = TensorFolder(tmp_path)
    assert set(folder) == set(tensors)
    assert folder.shapes["t3"] == (10,)
    assert all(torch.equal(folder[name], tensors[name]) for name in tensors)
    assert read_json(tmp_path / INDEX)["metadata"]["total_size"] == 7 * 40
    with pytest.raises(InputError, match="no tensor x"):
        folder["x"]


def corrupt(data: bytes) -> dict[str, bytes]:
    return {
        "truncated": data[:-5],
        "half": data[: len(data) // 2],
        "empty": b"",
        "text": b"version https://git-lfs.github.com/spec/v1\n",
        "huge header": b"\xff" * 8 + data[8:],
        "negative shape": data.replace(b"[30,40]", b"[3,-40]"),
        "huge shape": data.replace(b"[30,40]", b"[99,99]"),
        "pickle": b"\x80\x04\x95" + data,
    }


@pytest.mark.parametrize("kind", sorted(corrupt(b"")))
def test_damaged_tensors_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    save_tensors({"w": torch.zeros(30, 40)}, path)
    path.write_bytes(corrupt(path.read_bytes())[kind])
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        load_tensors(path)
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        TensorFolder(tmp_path)


def test_missing_tensors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_tensors(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="neither"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize("where", [None, {}, [], {"w": "../x"}, {"w": "/x"}, {"w": 3}, {"w": {}}])
def test_an_index_names_only_files_of_its_folder(tmp_path: Path, where: Any) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": where}))
    with pytest.raises(InputError, match="damaged"):
        TensorFolder(tmp_path)


def test_saving_where_it_is_impossible(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError):
        save_tensors({"w": torch.zeros(1)}, tmp_path / "file" / "x.safetensors")
    assert names(tmp_path) == {"file"}
