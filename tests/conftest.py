"""What several test files share: the demo's artefact, made once; the C kernels."""

import gc
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from filelock import FileLock

from ternq.kernels import build as builder
from ternq.kernels import native

os.environ["HF_HUB_OFFLINE"] = "1"  # for the programs that tests start; of this process: `no_hub`

ISAS = ("portable", "avx2", "avx512") if platform.machine() == "x86_64" else ("portable", "neon")
ROOT = Path(__file__).parent.parent
STEPS = "2"


@dataclass(frozen=True)
class Demo:
    """A working folder that holds ``demo-ternary``, and what making it printed."""

    folder: Path
    printed: str

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A program in the folder, with this Python's ``ternq`` and ``python`` on the path."""
        tools = str(Path(sys.executable).parent)
        environment = os.environ | {
            "TERNQ_DEMO_STEPS": STEPS,
            "COLUMNS": "80",
            "PATH": tools + os.pathsep + os.environ["PATH"],
        }
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done


def pytest_collection_finish() -> None:
    """What was imported stays; to look through it at every collection of garbage takes long."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Results of these tests are kept with them, not in the user's cache."""
    os.environ["TERNQ_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def no_hub() -> None:
    """No test asks the hub: it would wait for answers, try again, and depend on them."""
    from huggingface_hub import set_client_factory

    class Nobody:
        """Stands for the client of a hub."""

        def request(self, *given: Any, **options: Any) -> None:
            pytest.fail(f"asked the hub: {given} {options}")

        stream = post = head = request

        def get(self, *_: Any, **__: Any) -> None:
            """It asks by itself what programs call it, before anything else."""
            raise ConnectionError

        def close(self) -> None: ...

    factory: Any = Nobody
    set_client_factory(factory)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to train on."""
    return checkpoints.text_file(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder."""
    return checkpoints.folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little held-out text: tiny models train in less than they are measured in."""
    monkeypatch.setattr("ternq.corpus.HELD_OUT_TOKENS", 256)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """``demo-ternary``, two steps trained by ``examples/python_api.py``; and a text beside it.

    Made once for all processes of the tests, each of which has a copy of its own.
    """
    own = tmp_path_factory.mktemp("demo")
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with FileLock(shared / "demo.lock"):
        made, printed = shared / "demo-made", shared / "demo-printed"
        if not printed.is_file():
            made.mkdir()
            text = (ROOT / "ternq" / "recipe.py").read_text(encoding="utf-8")
            (made / "notes.txt").write_text(text[:3000], encoding="utf-8")
            done = Demo(made, "").run("python", str(ROOT / "examples" / "python_api.py"))
            printed.write_text(done.stdout, encoding="utf-8")
    shutil.copytree(made, own, dirs_exist_ok=True)
    return Demo(own, printed.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def lib(tmp_path_factory: pytest.TempPathFactory) -> native.Native:
    """The library as installed, or else compiled now."""
    found, _ = native.load()
    if found is not None:
        return found
    path = tmp_path_factory.mktemp("kernels") / "_native.so"
    failure = builder.build(path)
    if failure is not None:
        pytest.skip(failure)
    return native.Native(path)


@pytest.fixture(params=ISAS)
def isa(request: Any, lib: native.Native) -> Iterator[str]:
    if not lib.use_isa(request.param):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    lib.use_isa(None)
