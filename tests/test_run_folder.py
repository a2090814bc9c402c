"""What a run's folder may hold when a command begins, and what it leaves when it is removed."""

import json
from pathlib import Path

import pytest

from ternq import origin, runs
from ternq.errors import InputError, RecipeError
from ternq.snapshots import CHECKPOINTS


def test_a_start_that_was_cut_off_begins_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / runs.OWN_TEXT_FILE).write_text("{}")
    (run / origin.BASE_FOLDER).mkdir()
    assert runs.existing(run, resume=None, overwrite=False) is None


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match="no run of ternq"):
        runs.existing(tmp_path, resume=None, overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_nothing_to_resume_and_a_run_that_must_not_go_on(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run to resume"):
        runs.existing(tmp_path / "run", resume=True, overwrite=False)
    (tmp_path / origin.RUN_FILE).write_text('{"experiment": 7}')
    with pytest.raises(RecipeError, match="not ternq's"):
        runs.existing(tmp_path, resume=None, overwrite=True)
    record = {"ternq_run": runs.FORMAT_VERSION, "recipe": {}, "modules": [], "dtype": "float32"}
    (tmp_path / origin.RUN_FILE).write_text(json.dumps(record))
    assert runs.existing(tmp_path, resume=True, overwrite=False) is not None
    with pytest.raises(RecipeError, match="holds a run"):
        runs.existing(tmp_path, resume=False, overwrite=False)


def test_a_removed_run_leaves_nothing_but_what_is_not_its_own(tmp_path: Path) -> None:
    for name in ("run", "shared"):
        folder = tmp_path / name
        for inner in (f"{CHECKPOINTS}/step-00000002", f"{CHECKPOINTS}/step-3.part"):
            (folder / inner).mkdir(parents=True)
            (folder / inner / "state.json").write_text("{}")
        (folder / origin.RUN_FILE).write_text("{}")
    (tmp_path / "shared" / "thesis.txt").write_text("mine")
    runs.remove(tmp_path / "run")
    runs.remove(tmp_path / "shared")
    assert not (tmp_path / "run").exists()
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["thesis.txt"]
