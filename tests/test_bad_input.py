"""What a person can get wrong, through the command line: a sentence, a status, and no traces."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from ternq import checkpoint, cli, corpus, files, origin, snapshots
from ternq.text import read_documents
from ternq.writer import write_tensors

QUICK = ["--steps", "2", "--batch-size", "2", "--sequence-length", "16", "--group-size", "16",
         "--start", "closed-form"]  # fmt: skip


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A folder of its own, little text, and everything of the process as before afterwards."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(corpus, "HELD_OUT_TOKENS", 256)
    monkeypatch.setattr("ternq.samples.TOKENS", 2)
    monkeypatch.setenv("COLUMNS", "200")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    environment = dict(os.environ)
    yield
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model`` and ``text.jsonl``, not to be changed."""
    folder = tmp_path_factory.mktemp("shared")
    checkpoints.folder(folder / "model")
    checkpoints.text_file(folder / "text.jsonl")
    return folder


@pytest.fixture
def model(shared: Path) -> Path:
    return shared / "model"


@pytest.fixture
def text(shared: Path) -> Path:
    return shared / "text.jsonl"


@pytest.fixture
def damaged(model: Path, tmp_path: Path) -> Path:
    """A copy of the model to damage."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.fixture
def ternq(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Run a command line; its JSON, after what holds for every failure has been seen."""

    def run(*arguments: object) -> dict[str, Any]:
        status = cli.run([*map(str, arguments), "--json"])
        said = capsys.readouterr()
        payload: dict[str, Any] = json.loads(said.out)
        assert payload["exit_code"] == status
        assert "Traceback" not in said.err
        if status:
            message = payload["error"]["message"]
            assert message in " ".join(said.err.split()) or len(message) > 150
            assert message.strip() == message
            assert "\n" not in message
            assert 15 < len(message) < 400
        return payload

    return run


def refused(payload: dict[str, Any], status: int, *words: str, out: str | None = "out") -> None:
    """The status, words of the message, and nothing under the final name."""
    assert payload["exit_code"] == status, payload["error"]
    message = payload["error"]["message"]
    for word in words:
        assert word in message, message
    assert payload["status"] == "failed"
    if out is not None:
        assert not [p.name for p in Path.cwd().iterdir() if p.name.strip(".").startswith(out)]


def set_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


# No model


Change = Callable[[Path], None]


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


def damaged_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": 3}))


def config_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def config_of_nothing(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def config_of_an_unknown_kind(folder: Path) -> None:
    set_config(folder, model_type="never-heard-of", architectures=["NeverForCausalLM"])


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def header_only_begun(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20])


def empty_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def noise(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)


def lacking_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def of_another_shape(folder: Path) -> None:
    set_config(folder, intermediate_size=52)


def shard_missing(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensors(folder, layout, tensors.__getitem__, shard_bytes=50_000)
    (folder / "model.safetensors").unlink()
    next(folder.glob("model-00002*")).unlink()


def not_finite(value: float) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change


def quantized(method: str) -> Change:
    def change(folder: Path) -> None:
        set_config(folder, quantization_config={"quant_method": method, "bits": 4})

    return change


DAMAGE: dict[str, tuple[Change, str]] = {
    "no config": (no_config, "no model"),
    "no weights": (no_weights, "no safetensors"),
    "no tokenizer": (no_tokenizer, "no tokenizer"),
    "damaged tokenizer": (damaged_tokenizer, "no tokenizer"),
    "config is no JSON": (config_is_no_json, "config"),
    "config of nothing": (config_of_nothing, "model"),
    "unknown kind": (config_of_an_unknown_kind, "never-heard-of"),
    "truncated": (truncated, "safetensors"),
    "header only begun": (header_only_begun, "safetensors"),
    "empty file": (empty_file, "safetensors"),
    "noise": (noise, "safetensors"),
    "lacking a tensor": (lacking_a_tensor, "up_proj"),
    "another shape": (of_another_shape, "cannot be loaded"),
    "shard missing": (shard_missing, "model-00002"),
    "NaN": (not_finite(float("nan")), "up_proj"),
    "Inf": (not_finite(float("-inf")), "up_proj"),
    "gptq": (quantized("gptq"), "already quantized (gptq)"),
    "awq": (quantized("awq"), "already quantized (awq)"),
    "bitsandbytes": (quantized("bitsandbytes"), "already quantized (bitsandbytes)"),
    "fp8": (quantized("fp8"), "already quantized (fp8)"),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_a_folder_that_is_no_good_model(
    kind: str, damaged: Path, text: Path, ternq: Callable[..., dict[str, Any]]
) -> None:
    change, word = DAMAGE[kind]
    change(damaged)
    before = checkpoints.contents(damaged)
    payload = ternq("ternarize", damaged, "-o", "out", "--data", text, *QUICK)
    refused(payload, 3, word, damaged.name)
    assert checkpoints.contents(damaged) == before


@pytest.mark.parametrize("command", ["distill", "pack", "eval", "generate"])
def test_every_command_refuses_a_damaged_model(
    command: str, damaged: Path, text: Path, ternq: Callable[..., dict[str, Any]]
) -> None:
    truncated(damaged)
    own: dict[str, list[object]] = {
        "distill": ["-o", "out", "--data", text],
        "pack": ["-o", "out"],
        "eval": ["--tasks", text],
        "generate": ["hello"],
    }
    refused(ternq(command, damaged, *own[command]), 3, "safetensors")


ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForMaskedLM", {}),
    "bert without architecture": ("BertConfig", "BertModel", {}),
    "t5": ("T5Config", "T5ForConditionalGeneration", {"d_model": 16, "d_kv": 8, "d_ff": 16}),
    "vit": ("ViTConfig", "ViTForImageClassification", {"image_size": 16, "patch_size": 8}),
    "classifier": ("LlamaConfig", "LlamaForSequenceClassification", {"num_key_value_heads": 2}),
}


@pytest.mark.parametrize("kind", list(ENCODERS))
def test_a_model_that_does_not_write_text(
    kind: str, tmp_path: Path, text: Path, ternq: Callable[..., dict[str, Any]]
) -> None:
    config, architecture, own = ENCODERS[kind]
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"intermediate_size": 16, "vocab_size": checkpoints.VOCABULARY, "num_layers": 1}
    if kind in ("t5", "vit"):
        small.pop("vocab_size" if kind == "vit" else "hidden_size")
    made = getattr(transformers, architecture)(getattr(transformers, config)(**small | own))
    made.save_pretrained(tmp_path / "other")
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    payload = ternq("ternarize", tmp_path / "other", "-o", "out", "--data", text, *QUICK)
    refused(payload, 3, "not a causal language model")


def test_files_that_are_no_model(
    model: Path, text: Path, tmp_path: Path, ternq: Callable[..., dict[str, Any]]
) -> None:
    (tmp_path / "a.gguf").write_bytes(b"not GGUF at all")
    (tmp_path / "b.gguf").write_bytes(b"GGUF" + bytes(range(200)))
    (tmp_path / "c.gguf").write_bytes(b"")
    for name in ("a.gguf", "c.gguf"):
        refused(ternq("ternarize", tmp_path / name, "-o", "out"), 3, "not a GGUF file")
    refused(ternq("ternarize", tmp_path / "b.gguf", "-o", "out"), 3, "b.gguf")
    weights = model / "model.safetensors"
    refused(ternq("ternarize", weights, "-o", "out"), 3, "is a file, but not a .gguf file")
    refused(ternq("ternarize", tmp_path / "nowhere.gguf", "-o", "out"), 3, "There is no file")
    refused(ternq("ternarize", "./nowhere", "-o", "out"), 3, "There is no file or folder")


def test_a_dense_model_is_not_packed(model: Path, ternq: Callable[..., dict[str, Any]]) -> None:
    refused(ternq("pack", model, "-o", "out"), 3, "not ternary")


# The hub


def test_a_hub_id_while_offline(text: Path, ternq: Callable[..., dict[str, Any]]) -> None:
    for extra in ([], ["--offline"]):
        payload = ternq("ternarize", "owner/name", "-o", "out", "--data", text, *extra)
        refused(payload, 3, "owner/name", "offline")
    refused(ternq("ternarize", "nonsense", "-o", "out", "--offline"), 3, "nonsense")
    refused(ternq("ternarize", "a b/c?", "-o", "out", "--offline"), 3, "a b/c?")


def hub_says(kind: str) -> Exception:
    from huggingface_hub import errors

    response = SimpleNamespace(headers={}, request=None)
    found: Exception = getattr(errors, kind)("said by the hub", response=response)
    return found


@pytest.mark.parametrize(
    ("kind", "word"),
    [("GatedRepoError", "gated"), ("RepositoryNotFoundError", "The hub has no model")],
)
def test_gated_and_misspelt(
    kind: str, word: str, monkeypatch: pytest.MonkeyPatch, ternq: Callable[..., dict[str, Any]]
) -> None:
    def ask(*_: Any, **__: Any) -> None:
        raise OSError("as transformers wraps it") from hub_says(kind)

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", ask)
    payload = ternq("ternarize", "owner/name", "-o", "out")
    refused(payload, 3, word, "owner/name")
    assert payload["error"]["hint"]


# Text


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


TEXTS: dict[str, tuple[str, str | bytes, str]] = {
    "empty": ("t.txt", "", "no text"),
    "blank": ("t.txt", " \n\n \n", "no text"),
    "empty jsonl": ("t.jsonl", "", "no text"),
    "NUL bytes": ("t.txt", b"abc\0def" * 100, "binary"),
    "not UTF-8": ("t.txt", b"abc\xff\xfe" * 100, "not UTF-8"),
    "too short": ("t.txt", "The cat sat on the mat.", "too short"),
    "one document": ("t.jsonl", '{"text": "%s"}\n' % ("cat " * 200), "too short"),
    "no JSON": ("t.jsonl", "text\n", "line 1, is not JSON"),
    "no column": ("t.jsonl", '{"content": "x"}\n', "no column 'text'"),
    "no parquet": ("t.parquet", b"PAR1 and then nothing", "damaged"),
    "unknown kind": ("t.docx", b"PK", "not a text file"),
}


@pytest.mark.parametrize("kind", list(TEXTS))
def test_text_that_is_no_good(
    kind: str, model: Path, tmp_path: Path, ternq: Callable[..., dict[str, Any]]
) -> None:
    name, content, word = TEXTS[kind]
    path = write(tmp_path / name, content)
    payload = ternq("ternarize", model, "-o", "out", "--data", path, *QUICK)
    refused(payload, 3, word)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)


def test_text_that_is_not_there(
    model: Path, tmp_path: Path, ternq: Callable[..., dict[str, Any]]
) -> None:
    (tmp_path / "folder").mkdir()
    ask = ["ternarize", model, "-o", "out", *QUICK, "--data"]
    refused(ternq(*ask, tmp_path / "nowhere.txt"), 3, "There is no file or folder")
    refused(ternq(*ask, tmp_path / "folder"), 3, "holds no text")
    refused(ternq(*ask, "owner/data", "--offline"), 3, "owner/data", "offline")
    refused(ternq(*ask, f"{tmp_path}/x.txt=much"), 2, "not a number")


# Options


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--group-size", "0"], "at least one column"),
        (["--group-size", "-1"], "at least one column"),
        (["--group-size", "51"], "longest row (50)"),
        (["--skip", "no_such_layer"], "matches no linear layer"),
        (["--skip", "*q_proj", "--skip", "typo"], "'typo' matches no linear layer"),
        (["--skip", "*"], "leaves no layer"),
        (["--skip", "*mlp*", "--skip", "*attn*"], "leaves no layer"),
        (["--lr", "nan"], "--lr"),
        (["--lr", "-1"], "--lr"),
        (["--tokens", "5", "--steps", "5"], "both given"),
        (["--sequence-length", "1"], "at least 2"),
        (["--batch-size", "0"], "at least 1"),
        (["--off", "0", "--kl", "0", "--ce", "0"], "all 0"),
        (["--no-such-option"], "no-such-option"),
    ],
)
def test_options_that_cannot_be(
    options: list[str], word: str, model: Path, text: Path, ternq: Callable[..., dict[str, Any]]
) -> None:
    own = dict(zip(QUICK[::2], QUICK[1::2], strict=True))
    if "--tokens" in options:
        own.pop("--steps")
    rest = [v for k, v in own.items() if k not in options for v in (k, v)]
    payload = ternq("ternarize", model, "-o", "out", "--data", text, *rest, *options)
    refused(payload, 2, word)


def test_the_widest_group_that_fits(
    model: Path, text: Path, ternq: Callable[..., dict[str, Any]]
) -> None:
    ask = ["ternarize", model, "-o", "out", "--data", text, *QUICK[:-2], "--group-size", "50"]
    assert ternq(*ask)["exit_code"] == 0


# Output


def test_output_that_exists(model: Path, text: Path, ternq: Callable[..., dict[str, Any]]) -> None:
    Path("out").mkdir()
    mine = write(Path("out/thesis.txt"), "years of work")
    ask = ["-o", "out", "--data", text, *QUICK]
    for command in ("ternarize", "distill"):
        refused(ternq(command, model, *ask), 2, "out", "exists", out=None)
        refused(ternq(command, model, *ask, "--overwrite"), 2, "out", out=None)
    assert mine.read_text() == "years of work"
    assert [p.name for p in Path.cwd().iterdir()] == ["out"]


def test_output_of_another_recipe(
    model: Path, text: Path, ternq: Callable[..., dict[str, Any]]
) -> None:
    ask = ["ternarize", model, "-o", "out", "--data", text, *QUICK]
    assert ternq(*ask)["exit_code"] == 0
    before = checkpoints.contents(Path("out"))
    assert ternq(*ask)["exit_code"] == 0  # finished already
    planned = ternq(*ask, "--plan")
    assert planned["exit_code"] == 0 and planned["plan"]
    for extra in ([], ["--plan"]):
        refused(ternq(*ask, "--lr", "0.05", *extra), 2, "another recipe", "lr", out=None)
    assert ternq(*ask, "--lr", "0.05", "--overwrite", "--plan")["exit_code"] == 0
    refused(ternq(*ask, "--no-shift"), 2, "another recipe", "shift", out=None)
    assert checkpoints.contents(Path("out")) == before
    assert ternq(*ask, "--lr", "0.05", "--overwrite")["exit_code"] == 0
    assert checkpoints.contents(Path("out")) != before
    assert {p.name for p in Path.cwd().iterdir()} == {"out", "out.report"}
    ask = ["distill", model, "-o", "run", "--data", text, *QUICK]
    assert ternq(*ask)["exit_code"] == 0
    assert ternq(*ask, "--plan")["exit_code"] == 0


def test_the_model_is_never_the_output(
    damaged: Path, text: Path, ternq: Callable[..., dict[str, Any]]
) -> None:
    before = checkpoints.contents(damaged)
    for extra in ([], ["--overwrite"]):
        payload = ternq("ternarize", damaged, "-o", damaged, "--data", text, *QUICK, *extra)
        refused(payload, 2, out=None)
    assert checkpoints.contents(damaged) == before


@pytest.mark.parametrize("command", ["ternarize", "distill"])
def test_output_below_a_file(
    command: str, model: Path, text: Path, ternq: Callable[..., dict[str, Any]]
) -> None:
    write(Path("file"), "a file")
    payload = ternq(command, model, "-o", "file/out", "--data", text, *QUICK)
    refused(payload, 4, "file/out")
    assert Path("file").read_text() == "a file"


@pytest.mark.parametrize("command", ["ternarize", "distill"])
def test_output_without_permission(
    command: str,
    model: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    ternq: Callable[..., dict[str, Any]],
) -> None:
    """As on a read-only disk, which stops even a superuser."""
    make = Path.mkdir

    def mkdir(path: Path, *arguments: Any, **options: Any) -> None:
        if Path.cwd() in path.absolute().parents:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        make(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    refused(ternq(command, model, "-o", "out", "--data", text, *QUICK), 4, "out", "read-only")


def full_at(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No space from the first file on whose name holds ``what``."""
    plain = files.sync
    seen: list[Path] = []

    def sync(path: Path) -> None:
        if what in path.name:
            seen.append(path)
        if seen:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        plain(path)

    monkeypatch.setattr(files, "sync", sync)


@pytest.mark.parametrize(
    "what", ["run.json", "student.safetensors", "optimizer", "state", "model", "config", "ternq"]
)
def test_a_disk_that_runs_full(
    what: str,
    model: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    ternq: Callable[..., dict[str, Any]],
) -> None:
    before = checkpoints.contents(model)
    steps = checkpoints.counted_steps(monkeypatch)
    ask = ["ternarize", model, "-o", "out", "--data", text, *QUICK]
    with monkeypatch.context() as full:
        full_at(what, full)
        payload = ternq(*ask)
    assert payload["exit_code"] == 4, payload["error"]
    assert "no space is left" in payload["error"]["message"]
    assert not Path("out").exists()
    assert {p.name for p in Path.cwd().iterdir()} <= {"out.run"}
    assert checkpoints.contents(model) == before
    assert ternq(*ask)["exit_code"] == 0  # once there is room, the same command goes on
    assert {p.name for p in Path.cwd().iterdir()} == {"out", "out.report"}
    if what in ("model", "config", "ternq"):
        assert steps == [0, 1]  # and does not train again


def test_a_disk_that_safetensors_finds_full(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch, ternq: Callable[..., dict[str, Any]]
) -> None:
    from safetensors import SafetensorError

    def save(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", save)
    payload = ternq("distill", model, "-o", "out", "--data", text, *QUICK)
    refused(payload, 4, "no space is left", out=None)
    assert not snapshots.checkpoints(Path("out"))
    assert not Path("out", origin.STUDENT_FILE).exists()


def test_a_disk_that_is_too_small_is_seen_before_anything_is_packed(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch, ternq: Callable[..., dict[str, Any]]
) -> None:
    for where in ("pack", "plan"):
        monkeypatch.setattr(f"ternq.{where}.free_disk", lambda _: 100)
    payload = ternq("ternarize", model, "-o", "out", "--data", text, *QUICK)
    assert payload["exit_code"] == 4
    assert not Path("out").exists()
    plan = ternq("ternarize", model, "-o", "out", "--data", text, *QUICK, "--plan")
    assert plan["exit_code"] == 4
    assert "disk" in plan["error"]["message"]


# Resume


@pytest.mark.parametrize("command", ["ternarize", "distill"])
def test_resume_with_nothing_to_resume(
    command: str, model: Path, text: Path, ternq: Callable[..., dict[str, Any]]
) -> None:
    payload = ternq(command, model, "-o", "out", "--data", text, *QUICK, "--resume")
    refused(payload, 3, "resume", "out")


@pytest.mark.parametrize("command", ["ternarize", "distill"])
def test_resume_with_another_recipe(
    command: str, model: Path, text: Path, ternq: Callable[..., dict[str, Any]]
) -> None:
    ask = [command, model, "-o", "out", "--data", text, *QUICK]
    stopped = ternq(*ask, "--time-limit", "0.001s")
    assert (stopped["exit_code"], stopped["status"]) == (75, "stopped")
    run = Path("out" if command == "distill" else "out.run")
    before = checkpoints.contents(run)
    for other in (["--lr", "0.05"], ["--seed", "9"], ["--group-size", "12"]):
        for extra in ([], ["--resume"]):
            refused(ternq(*ask, *other, *extra), 2, "another recipe", out=None)
    refused(ternq(*ask, "--no-resume"), 2, "holds a run", out=None)
    assert checkpoints.contents(run) == before
    assert ternq(*ask, "--resume")["exit_code"] == 0


def test_a_damaged_run_is_said(
    model: Path, text: Path, ternq: Callable[..., dict[str, Any]]
) -> None:
    ask = ["distill", model, "-o", "out", "--data", text, *QUICK]
    assert ternq(*ask, "--time-limit", "0.001s")["exit_code"] == 75
    (saved,) = snapshots.checkpoints(Path("out"))
    whole = (saved / "student.safetensors").read_bytes()
    write(saved / "student.safetensors", whole[:-9])
    refused(ternq(*ask), 3, "is damaged", "student.safetensors has", out=None)
    write(saved / "student.safetensors", whole)
    write(Path("out/run.json"), "{")
    refused(ternq(*ask), 3, "run.json is damaged", out=None)
    write(Path("out/run.json"), "{}")
    refused(ternq(*ask), 2, "run.json", out=None)


def break_bytes(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def break_values(path: Path) -> None:
    tensors = load_file(path)
    next(t for n, t in tensors.items() if n.endswith("weight_scale"))[0, 0] = float("nan")
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("damage", [break_bytes, break_values])
def test_a_damaged_artefact_has_a_status_of_its_own(
    damage: Change, model: Path, text: Path, ternq: Callable[..., dict[str, Any]]
) -> None:
    assert ternq("ternarize", model, "-o", "out", "--data", text, *QUICK)["exit_code"] == 0
    damage(Path("out/model.safetensors"))
    for ask in (["pack", "--verify", "out"], ["eval", "out", "--tasks", text]):
        refused(ternq(*ask), 6, out=None)
    refused(ternq("generate", "out", "hello"), 6, out=None)
    refused(ternq("distill", "out", "-o", "more", "--data", text, *QUICK), 6, out="more")


# Devices, divergence, and a plan


def test_a_device_that_is_not_there(
    model: Path, text: Path, ternq: Callable[..., dict[str, Any]]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    ask = ["ternarize", model, "-o", "out", "--data", text, *QUICK, "--device"]
    refused(ternq(*ask, "cuda"), 4, "cuda")
    assert ternq(*ask, "toaster")["exit_code"] in (2, 4)


def test_divergence(model: Path, text: Path, ternq: Callable[..., dict[str, Any]]) -> None:
    ask = ["ternarize", model, "-o", "out", "--data", text, *QUICK, "--steps", "6", "--lr", "1e30"]
    payload = ternq(*ask)
    assert payload["exit_code"] == 7, payload["error"]
    assert not Path("out").exists()
    assert not Path("out.run", origin.STUDENT_FILE).exists()


def test_a_plan_writes_nothing(
    model: Path, text: Path, ternq: Callable[..., dict[str, Any]]
) -> None:
    payload = ternq("ternarize", model, "-o", "out", "--data", text, *QUICK, "--plan")
    assert payload["exit_code"] == 0
    assert payload["fits"]
    assert not list(Path.cwd().iterdir())


# What a shell or a pipeline gets wrong


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--tasks", ""], "--tasks is empty"),
        (["--tasks", "{text},"], "--tasks is empty"),
        (["--tasks", "{text}", "--device", ""], "--device is empty"),
        (["--tasks", "{text}", "--baseline", " "], "--baseline is empty"),
        (["--tasks", "{text}", "--fail-if-size-above", ""], "--fail-if-size-above"),
        (["--tasks", "{text}", "--fail-if-bpw-above", ""], "--fail-if-bpw-above: ''"),
        (["--tasks", "{text}", "--fail-if-ppl-above", ""], "--fail-if-ppl-above: ''"),
        (["--tasks", "{text}", "--seed", "-1"], "'--seed'"),
        (["--tasks", "{text}", "--seed", str(2**32)], "'--seed'"),
        (["--tasks", "{text}", "--html", "{text}"], "would damage"),
    ],
)
def test_a_variable_that_is_not_set_lets_nothing_pass(
    model: Path, text: Path, ternq: Callable[..., dict[str, Any]], given: list[str], said: str
) -> None:
    before = text.read_bytes()
    refused(ternq("eval", model, *(part.format(text=text) for part in given)), 2, said)
    assert text.read_bytes() == before


def test_a_text_named_by_nothing_is_not_the_folder(
    model: Path, ternq: Callable[..., dict[str, Any]]
) -> None:
    refused(ternq("ternarize", model, "-o", "out", "--data", "", *QUICK), 2, "--data is empty")


def test_a_finished_artefact_tells_of_itself_wherever_it_lies(
    model: Path, text: Path, ternq: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another folder; without the report beside it; beside a run that was given up."""
    first = ternq("ternarize", model, "-o", "out", "--data", text, *QUICK)
    assert first["exit_code"] == 0
    again = ["ternarize", model, "--data", text, *QUICK, "--fail-if-ppl-above", "1e9"]
    Path("below").mkdir()
    with monkeypatch.context() as moved:
        moved.chdir("below")
        there = ternq(*again, "-o", "../out")
        assert there["out"] == "../out" and list(there["results"]) == [str(model), "../out"]
        assert list(there["layers"]) == ["../out"]
        assert there["results"]["../out"] == first["results"]["out"] != there["results"][str(model)]
    longer = [*QUICK, "--steps", "50", "--overwrite", "--time-limit", "0.001s"]  # the last counts
    stopped = ternq("ternarize", model, "-o", "out", "--data", text, *longer)
    assert stopped["exit_code"] == 75 and Path("out.run").is_dir()
    assert ternq(*again, "-o", "out")["exit_code"] == 0
    shutil.rmtree("out.run")
    shutil.rmtree("out.report")
    alone = ternq(*again, "-o", "out")
    assert alone["exit_code"] == 0 and alone["results"]["out"] == first["results"]["out"]
    assert "report.json is gone" in str(alone["notes"])


def test_what_lies_in_an_artefact_unlisted_is_seen_of_kept_results_too(
    model: Path, text: Path, ternq: Callable[..., dict[str, Any]]
) -> None:
    assert ternq("ternarize", model, "-o", "out", "--data", text, *QUICK)["exit_code"] == 0
    assert ternq("eval", "out", "--tasks", text, "--num-fewshot", "3")["exit_code"] == 0
    Path("out", "extra.bin").write_bytes(b"x")
    payload = ternq("eval", "out", "--tasks", text, "--num-fewshot", "3")
    refused(payload, 6, "extra.bin is not listed", out=None)
    Path("out", "extra.bin").unlink()
    refused(
        ternq("eval", "out", "--tasks", text, "--html", "out/page.html"),
        2,
        "would damage",
        out=None,
    )


def test_half_a_character_and_deep_brackets(
    model: Path, ternq: Callable[..., dict[str, Any]]
) -> None:
    Path("half.jsonl").write_text('{"text": "abc \\ud800 def"}\n' * 200)
    assert ternq("eval", model, "--tasks", "half.jsonl")["exit_code"] == 0
    assert list(read_documents("half.jsonl"))[0] == "abc \ufffd def"
    Path("deep.jsonl").write_text('{"text": ' + "[" * 100_000 + "\n")
    payload = ternq("eval", model, "--tasks", "deep.jsonl")
    refused(payload, 3, "line 1, is JSON nested too deeply", out=None)


@pytest.mark.parametrize("part", [{"scheme": None}, {"training": []}, {"seed": True}])
def test_a_recipe_of_other_parts(
    model: Path, ternq: Callable[..., dict[str, Any]], part: dict[str, Any]
) -> None:
    Path("recipe.json").write_text(json.dumps({"model": str(model)} | part))
    payload = ternq("ternarize", model, "-o", "out", "--recipe", "recipe.json")
    refused(payload, 2, "Not a recipe")


def test_a_gate_on_a_text_with_a_colon_in_its_name(
    model: Path, text: Path, ternq: Callable[..., dict[str, Any]]
) -> None:
    Path("a:b.jsonl").write_bytes(text.read_bytes())
    gate = ["--fail-if-ppl-above", "a:b.jsonl=1e9"]
    assert ternq("eval", model, "--tasks", "a:b.jsonl", *gate)["exit_code"] == 0


def test_json_is_printed_whatever_stdout_takes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ternq", "pack", "n\u00f6 \udcff", "--json"],
        env=os.environ | {"PYTHONIOENCODING": "ascii:strict"},
        capture_output=True,
        timeout=100,
    )
    assert done.returncode == 2
    assert "is no name in UTF-8" in json.loads(done.stdout)["error"]["message"]
