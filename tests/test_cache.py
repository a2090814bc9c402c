"""Results that are kept: found again under the same key only, and never believed when damaged."""

import json
from pathlib import Path

import pytest

from ternq.cache import Cache, default_folder
from ternq.progress import Event

KEY = {"model": "aa", "task": "piqa", "limit": None}
RESULT = {"values": {"acc": 0.5}}


def test_what_was_put_is_found_under_the_same_key_only(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.get(KEY) is None
    cache.put(KEY, RESULT)
    assert Cache(tmp_path).get(dict(reversed(KEY.items()))) == RESULT
    for name, value in {"model": "bb", "task": "sciq", "limit": 10, "more": 1}.items():
        assert cache.get(KEY | {name: value}) is None


@pytest.mark.parametrize("content", ["", "[]", "{", '{"schema": 1}', "\0"])
def test_a_damaged_file_is_not_believed(tmp_path: Path, content: str) -> None:
    cache = Cache(tmp_path)
    cache.put(KEY, RESULT)
    (file,) = tmp_path.rglob("*.json")
    file.write_text(content)
    assert cache.get(KEY) is None
    cache.put(KEY, RESULT)
    assert cache.get(KEY) == RESULT


def test_a_file_under_the_name_of_another_is_not_believed(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put(KEY, RESULT)
    (file,) = tmp_path.rglob("*.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"key": KEY | {"limit": 3}}))
    assert cache.get(KEY) is None


def test_without_a_folder_nothing_is_kept(tmp_path: Path) -> None:
    cache = Cache(None)
    cache.put(KEY, RESULT)
    assert cache.get(KEY) is None
    assert not cache.keeps


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    said: list[Event] = []
    (tmp_path / "results").write_text("a file")
    cache = Cache(tmp_path, said.append)
    cache.put(KEY, RESULT)
    cache.put(KEY, RESULT)
    assert [event.level for event in said] == ["warning"]
    assert "not kept" in str(said[0].message)


def test_the_folder_is_the_users_cache_or_the_one_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TERNQ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert default_folder() == Path("cache/ternq")
    monkeypatch.setenv("TERNQ_CACHE", "mine")
    assert default_folder() == Path("mine")
