"""An artefact loads everywhere it says: with ternq, without it, in stock programs, and again."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Demo
from test_pack import loaded, logits, student
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import ternq  # noqa: F401  registers the quantizer
from ternq import checkpoint, hf, outlines
from ternq.errors import InputError, VerificationError
from ternq.modeling_ternq import PackedLinear
from ternq.pack import pack
from ternq.publish import read_manifest, write_manifest

WITHOUT_TERNQ = "import sys; sys.modules['ternq'] = None\n"  # `import ternq` fails from here on


@pytest.fixture(scope="module", params=["keep", "int8"])
def artefact(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact with ordinary embeddings, and one with 8-bit ones."""
    out = tmp_path_factory.mktemp("loading") / "tiny-ternary"
    pack(loaded(student("llama-tied")), out, embeddings=request.param)
    return out


def python(
    program: str, *arguments: Any, modules: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program that has no ternq, with a cache of its own for code that models bring."""
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "warning"}
    environment |= {"HF_MODULES_CACHE": str(modules)} if modules else {}
    command = [sys.executable, "-c", WITHOUT_TERNQ + program, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def memory(model: nn.Module) -> int:
    """Bytes of parameters and buffers, shared ones once."""
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.nbytes for t in tensors.values())


PROGRAM = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder, again = sys.argv[1:]
refused = 0
for options in ({}, {"dtype": "float32"}):  # neither ternq nor the folder's code
    try:
        AutoModelForCausalLM.from_pretrained(folder, **options)
    except RuntimeError:
        refused += 1
print("refused", refused, file=sys.stderr)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = torch.arange(20).view(2, 10)
model(input_ids=ids)  # torch's first pass in a process may round otherwise, later ones agree
logits = model(input_ids=ids).logits.float()
text = pipeline("text-generation", model=folder, trust_remote_code=True)("w3 w4", max_new_tokens=4)
model.save_pretrained(again)
tokenizer.save_pretrained(again)
second = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
same = torch.equal(second(input_ids=ids).logits.float(), logits)
name = type(model).__name__
print(json.dumps([logits.tolist(), text[0]["generated_text"], same, name]))
"""


def test_without_ternq_its_own_code_loads_runs_and_saves_it(artefact: Path, tmp_path: Path) -> None:
    """Where that is trusted; else it fails, and names ternq, as the card does."""
    done = python(PROGRAM, artefact, tmp_path / "again", modules=tmp_path / "modules")
    assert done.returncode == 0, done.stderr
    why, refusals, _ = done.stderr.partition("refused 2")
    assert refusals and "got ternq" in why
    theirs, text, same, name = json.loads(done.stdout.splitlines()[-1])
    first = (artefact / "README.md").read_text().split("---\n")[2].splitlines()[0]
    assert first.startswith("Load it with `import ternq`") and "trust_remote_code" in first
    assert same and text.startswith("w3 w4") and name == "TernqLlamaForCausalLM"
    ours = AutoModelForCausalLM.from_pretrained(artefact)
    assert torch.equal(torch.tensor(theirs), logits(ours))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")  # with ternq, no code trusted
    assert torch.equal(logits(again), logits(ours))
    assert type(again).__module__.startswith("transformers.models")


def test_with_ternq_the_folders_code_is_not_used(artefact: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(artefact, trust_remote_code=True)
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(layers) == 14


def test_ternq_never_runs_the_code_in_an_artefact(artefact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(artefact, folder)
    code = folder / "modeling_ternq.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + code.read_text())
    write_manifest(folder)
    hf.load(str(folder), trust_remote_code=True)
    assert not (tmp_path / "ran").exists()


def test_a_move_that_fails_leaves_the_layer_as_it_was(artefact: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(artefact)
    before = logits(model)
    layer = next(m for m in model.modules() if isinstance(m, PackedLinear))

    def full(tensor: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        layer._apply(full)
    assert layer.weight_scale.dtype == torch.float16
    assert torch.equal(logits(model), before)


def test_pipelines_and_placement(artefact: Path) -> None:
    text = pipeline("text-generation", model=str(artefact))("w3 w4", max_new_tokens=4)
    assert text[0]["generated_text"].startswith("w3 w4")
    plain = AutoModelForCausalLM.from_pretrained(artefact)
    placed = AutoModelForCausalLM.from_pretrained(artefact, device_map="auto")
    assert torch.equal(logits(plain), logits(placed))


def test_memory_is_about_the_file(tmp_path: Path) -> None:
    for embeddings in ("keep", "int8"):
        out = tmp_path / embeddings
        pack(loaded(student("llama-tied")), out, embeddings=embeddings)
        model = AutoModelForCausalLM.from_pretrained(out)
        stored = sum(t.nbytes for t in checkpoint.load_tensors(out / checkpoint.TENSORS).values())
        assert memory(model) <= 1.25 * (out / checkpoint.TENSORS).stat().st_size
        assert memory(model) <= stored + 1000  # rotary frequencies are not in the file


def test_it_is_pushed_whole(
    artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.errors import EntryNotFoundError
    from transformers.utils import hub

    class Hub:
        """What the hub would have been asked."""

        def create_repo(self, name: str, **_: Any) -> Any:
            return type("Repo", (), {"repo_id": f"me/{name}"})

        def list_repo_tree(self, *_: Any, **__: Any) -> list[Any]:
            return []

        def create_branch(self, *_: Any, **__: Any) -> None: ...

        def create_commit(self, repo_id: str, operations: Sequence[Any], **_: Any) -> None:
            for operation in operations:
                with operation.as_file() as file:
                    (tmp_path / operation.path_in_repo).write_bytes(file.read())

    def no_card(*_: Any, **__: Any) -> None:
        raise EntryNotFoundError("there")

    monkeypatch.setattr(hub, "hf_api", Hub)
    monkeypatch.setattr(hub.ModelCard, "load", no_card)
    model = AutoModelForCausalLM.from_pretrained(artefact)
    model.push_to_hub("mine")
    AutoTokenizer.from_pretrained(artefact).save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


TASK = """
task: ours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}]
"""


@pytest.mark.slow
def test_the_stock_lm_eval_command(demo: Demo, tmp_path: Path) -> None:
    """Not ternq's: lm-eval's own program, which trusts the folder's code and has no ternq."""
    model = demo.folder / "demo-ternary"
    rows = "".join(json.dumps({"text": f"def read(x): return x + {i}"}) + "\n" for i in range(3))
    (tmp_path / "data.jsonl").write_text(rows)
    (tmp_path / "ours.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    program = (
        "from lm_eval.__main__ import cli_evaluate\n"
        f"sys.argv = ['lm_eval', 'run', '--model', 'hf', '--tasks', 'ours', '--device', 'cpu',\n"
        f"  '--model_args', 'pretrained={model},trust_remote_code=True',\n"
        f"  '--include_path', {str(tmp_path)!r}, '--batch_size', '2']\n"
        "cli_evaluate()"
    )
    done = python(program, modules=tmp_path / "modules")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "word_perplexity" in done.stdout


def test_an_artefact_on_the_hub_is_one_too(
    artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checked by its manifest, without its own code; known for ternary before it is loaded."""
    cache = tmp_path / "models--somebody--tiny-ternary"
    folder = cache / "snapshots" / "0123abcd"
    shutil.copytree(artefact, folder)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abcd")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    name = "somebody/tiny-ternary"
    found = hf.load(name, offline=True, trust_remote_code=True)
    assert (found.kind, found.path, found.name) == ("packed", folder, "tiny-ternary")
    assert type(found.model).__module__.startswith("transformers.")
    assert outlines.blueprint(name, offline=True).scheme is not None
    assert pack(name, tmp_path / "again", offline=True)["verify"]["ok"]
    dense = pack(name, tmp_path / "dense", format="dense", offline=True)["weights"]
    packed = read_manifest(folder)["weights"]
    assert dense["zero_share"] == packed["zero_share"]
    assert dense["bpw_total"] == dense["bpw_file"] > 16
    (folder / "config.json").write_text("{}")
    with pytest.raises(VerificationError, match="config.json has 2 bytes"):
        hf.load(name, offline=True)
    with pytest.raises(InputError, match="not in the local cache"):
        hf.load("somebody/else", offline=True)


def test_without_a_network_nobody_waits_for_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its library would try for half a minute, file by file; here it is not asked at all."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("ternq.text._cut_off", lambda: True)
    with pytest.raises(InputError, match="not in the local cache"):
        hf.load("somebody/else")
    with pytest.raises(InputError, match="not in the local cache"):
        hf.drawn("somebody/else", seed=0)
    with pytest.raises(InputError, match="not in the local cache"):
        hf.outline("somebody/else")
    with pytest.raises(InputError, match="not in the local cache"):
        outlines.blueprint("somebody/else")
