"""What a run's folder may hold when a command begins, and what it leaves when it is removed."""

from pathlib import Path

import pytest

from ternq import distill, hf
from ternq.errors import InputError, RecipeError


def test_a_start_that_was_cut_off_begins_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / distill.OWN_TEXT_FILE).write_text("{}")
    (run / hf.BASE_FOLDER).mkdir()
    assert distill._existing(run, overwrite=False, resume=None) is False


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match="no run of ternq"):
        distill._existing(tmp_path, overwrite=overwrite, resume=None)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_nothing_to_resume_and_a_run_that_must_not_go_on(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run to resume"):
        distill._existing(tmp_path / "run", overwrite=False, resume=True)
    (tmp_path / hf.RUN_FILE).write_text("{}")
    assert distill._existing(tmp_path, overwrite=False, resume=True) is True
    with pytest.raises(RecipeError, match="holds a run"):
        distill._existing(tmp_path, overwrite=False, resume=False)


def test_a_removed_run_leaves_nothing_but_what_is_not_its_own(tmp_path: Path) -> None:
    for name in ("run", "shared"):
        folder = tmp_path / name
        for inner in (f"{distill.CHECKPOINTS}/step-00000002", f"{distill.CHECKPOINTS}/step-3.part"):
            (folder / inner).mkdir(parents=True)
            (folder / inner / "state.json").write_text("{}")
        (folder / hf.RUN_FILE).write_text("{}")
    (tmp_path / "shared" / "thesis.txt").write_text("mine")
    distill.remove_run(tmp_path / "run")
    distill.remove_run(tmp_path / "shared")
    assert not (tmp_path / "run").exists()
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["thesis.txt"]
