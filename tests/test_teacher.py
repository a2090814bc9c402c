"""A teacher that is run once: what it is remembered by, and that stopping changes nothing."""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from test_train import BLOCK, random_blocks, trainer
from torch import Tensor

from ternq import corpus, distill, origin, runs, stop, teacher
from ternq.errors import InputError, RecipeError, ResourceError, StoppedError
from ternq.recipe import Training
from ternq.teacher import CachedTeacher, TeacherCache, cache_bytes, cached_teacher

KEY = {"teacher": "one"}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "SHARD_BYTES", 2 * 3 * BLOCK * 36)  # three blocks
    monkeypatch.setattr(corpus, "HELD_OUT_TOKENS", 256)


def cached(model: Any, folder: Path, count: int = 8, **options: Any) -> CachedTeacher:
    usual: dict[str, Any] = {"rows": 1, "autocast": nullcontext()}
    cache = TeacherCache(folder, KEY)
    return cached_teacher(model, random_blocks(), count, cache, **usual | options)


def first(count: int = 4) -> Tensor:
    stream = random_blocks()
    return torch.stack([next(stream) for _ in range(count)])


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "gpt-neox", "phi", "gemma"])
def test_norm_and_head_give_the_logits_again(kind: str, tmp_path: Path) -> None:
    model, ids = checkpoints.model(kind), first()
    with torch.no_grad():
        expected = copy.deepcopy(model)(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        found = cached(model, tmp_path)
        last = found.recall(ids)
        logits = found.model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    assert last.dtype == torch.float32 and last.shape == (4, BLOCK, 36)
    divergence = (expected.exp() * (expected - logits)).sum(-1)
    assert 0 < divergence.mean() < 1e-3  # the rounding of the features, and nothing else
    torch.testing.assert_close(logits, expected, rtol=0.02, atol=0.05)


def test_the_decoder_is_gone(tmp_path: Path) -> None:
    found = cached(checkpoints.model("llama"), tmp_path)
    left = {n for n, p in found.model.named_parameters() if not p.is_meta}
    assert left == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


@pytest.mark.parametrize("weights", [{"off": 0.0}, {"off": 0.0, "ce": 0.5}, {"off": 2.0}])
def test_the_loss_is_that_of_the_teacher(weights: dict[str, float], tmp_path: Path) -> None:
    made, ids = trainer(tmp_path, **weights), first()
    expected = made.objective(ids)[1]
    made.learn_from(cached(made.teacher, tmp_path / "cache"))
    terms = made.objective(ids)[1]
    assert terms["kl"].item() == pytest.approx(expected["kl"].item(), rel=0.01)
    if weights["off"]:  # at the last block alone
        assert "cosine_0" not in terms
        last = expected["cosine_1"].item()
        assert terms["cosine_1"].item() == pytest.approx(last, rel=1e-3)
        assert terms["off"].item() == pytest.approx(1 - last, rel=1e-2)


def test_the_text_comes_from_the_cache(tmp_path: Path) -> None:
    made = trainer(tmp_path, steps=2)
    made.learn_from(cached(made.teacher, tmp_path / "cache", rows=3))
    assert torch.equal(torch.stack(list(made.blocks)), first(8))
    made.learn_from(made.teacher)
    made.run()
    assert made.step == 2 and next(made.blocks, None) is None


def test_what_was_run_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    polled = iter(range(1, 100))
    with monkeypatch.context() as stopping:
        stopping.setattr(stop, "requested", lambda: "SIGTERM" if next(polled) == 5 else None)
        with pytest.raises(StoppedError, match="5 blocks of 8"):
            cached(checkpoints.model("llama"), tmp_path)
    assert len(TeacherCache(tmp_path, KEY)) == 5
    model, calls = checkpoints.model("llama"), []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    again = cached(model, tmp_path)
    assert len(calls) == 3 + 2  # and one look at the model, with its decoder and without
    whole = cached(checkpoints.model("llama"), tmp_path / "whole")
    assert torch.equal(again.cache.features(first(8)), whole.cache.features(first(8)))


def test_a_shard_that_was_being_written_counts_for_nothing(tmp_path: Path) -> None:
    cached(checkpoints.model("llama"), tmp_path, 3)
    (tmp_path / "blocks-000001.safetensors").write_bytes(b"half")
    assert len(TeacherCache(tmp_path, KEY)) == 3
    found = cached(checkpoints.model("llama"), tmp_path)
    assert len(found.cache) == 8 and found.recall(first(8)).shape[0] == 8


def test_another_teacher_begins_anew(tmp_path: Path) -> None:
    cached(checkpoints.model("llama"), tmp_path)
    assert len(TeacherCache(tmp_path, {"teacher": "another"})) == 0
    assert not tmp_path.exists()


def test_another_text_is_refused(tmp_path: Path) -> None:
    cached(checkpoints.model("llama"), tmp_path, 3)
    with pytest.raises(InputError, match="not the one that the teacher was run on"):
        cached_teacher(
            checkpoints.model("llama"),
            random_blocks(seed=1),
            8,
            TeacherCache(tmp_path, KEY),
            rows=1,
            autocast=nullcontext(),
        )


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    found = cached(checkpoints.model("llama"), tmp_path)
    path = tmp_path / "blocks-000000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="blocks-000000.safetensors is damaged"):
        TeacherCache(tmp_path, KEY).features(first())
    assert found.cache.folder == tmp_path


def test_disk_is_looked_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = cache_bytes(8 * BLOCK, 36)
    assert needed == 8 * BLOCK * (72 + 4)
    monkeypatch.setattr("ternq.teacher.free_disk", lambda _: needed - 1)
    with pytest.raises(ResourceError, match="GB of disk"):
        cached(checkpoints.model("llama"), tmp_path)


def test_the_size_is_the_one_foretold(tmp_path: Path) -> None:
    cached(checkpoints.model("llama"), tmp_path, 8)
    size = sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    assert 0 <= size - cache_bytes(8 * BLOCK, 36) < 3 * 300  # headers of three shards


def test_a_cache_that_nothing_asks_for_is_refused() -> None:
    with pytest.raises(RecipeError, match="nothing needs a teacher"):
        Training(cache_teacher=True, off=0.0, kl=0.0, ce=1.0)


def test_a_run_stopped_and_continued_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoints.folder(tmp_path / "model")
    text = checkpoints.text_file(tmp_path / "text.jsonl")
    recipe = checkpoints.recipe(source, text, steps=4, cache_teacher=True)
    outs = [tmp_path / "whole", tmp_path / "parts"]
    whole = distill.distill(str(source), outs[0], recipe, offline=True)
    with monkeypatch.context() as stopping:
        polled = iter(range(1, 100))
        stopping.setattr(stop, "requested", lambda: "SIGTERM" if next(polled) in (2, 6) else None)
        for said in ("4 blocks of 8", "after step 3 of 4"):
            with pytest.raises(StoppedError, match=said):
                distill.distill(str(source), outs[1], recipe, offline=True)
    assert (outs[1] / runs.TEACHER_FOLDER).is_dir()
    parts = distill.distill(str(source), outs[1], recipe, offline=True)
    assert parts["student"] == whole["student"]
    contents = [checkpoints.contents(out)[origin.STUDENT_FILE] for out in outs]
    assert contents[0] == contents[1]
    assert not (outs[1] / runs.TEACHER_FOLDER).exists()
    assert any("last block alone" in note for note in parts["notes"])
