"""Reading, mixing, packing and holding out text."""

import gzip
import json
import lzma
import random
import socket
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pyarrow
import pytest
import tiny
import torch
from pyarrow import parquet

from ternq import corpus, data
from ternq import text as sources
from ternq.errors import InputError, RecipeError
from ternq.progress import Event, ignore
from ternq.recipe import Recipe, Training
from ternq.sampling import drawn
from ternq.text import read_documents


def read(path: Path | str, **options: object) -> list[str]:
    return list(read_documents(str(path), **options))  # type: ignore[arg-type]


def jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return path


def test_every_format_holds_the_same_documents(tmp_path: Path) -> None:
    documents = [f"document {i} é" for i in range(30)]
    plain = jsonl(tmp_path / "a.jsonl", documents)
    with lzma.open(tmp_path / "b.jsonl.xz", "wb") as xz:
        xz.write(plain.read_bytes())
    with gzip.open(tmp_path / "c.json.gz", "wb") as gz:
        gz.write(plain.read_bytes())
    parquet.write_table(
        pyarrow.table({"text": documents}), tmp_path / "d.parquet", row_group_size=7
    )
    for i, document in enumerate(documents):
        (tmp_path / "e").mkdir(exist_ok=True)
        (tmp_path / "e" / f"{i}.txt").write_text(document, encoding="utf-8-sig")
    for name in ("a.jsonl", "b.jsonl.xz", "c.json.gz", "d.parquet", "e"):
        assert sorted(read(tmp_path / name)) == sorted(documents), name


def test_order_depends_on_the_seed_alone(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(5000)])
    first = read(path, seed=1)
    assert first == read(path, seed=1)
    assert first != read(path, seed=2)
    assert sorted(first) == sorted(read(path, seed=2))


def test_long_text_is_cut_at_blank_lines_without_loss(tmp_path: Path) -> None:
    whole = "\n\n".join(tiny.text(200, seed) for seed in range(80)) + "x" * 3 * sources.PASSAGE
    (tmp_path / "a.txt").write_text(whole)
    cut = list(sources._passages(tmp_path / "a.txt"))
    assert "".join(cut) == whole == sources.whole_documents(str(tmp_path / "a.txt"))[0]
    assert len(cut) > 4
    assert max(map(len, cut)) <= sources.PASSAGE
    assert cut[0].endswith("\n\n")


def test_whole_text_keeps_the_order(tmp_path: Path) -> None:
    jsonl(tmp_path / "b.jsonl", ["one", "two"])
    (tmp_path / "c.txt").write_text("three")
    assert sources.whole_documents(str(tmp_path))[0] == "one\n\ntwo\n\nthree"


def test_a_local_folder_in_the_hubs_layout_is_streamed(tmp_path: Path) -> None:
    rows = [{"text": f"document {i}", "url": "x"} for i in range(50)]
    held = [{"text": "validation", "url": "x"}]
    splits = {"train": ("en/train.json", rows), "validation": ("en/val.json", held)}
    tiny.hub_dataset(tmp_path / "someone" / "set", splits, "en")
    found = read(tmp_path / "someone" / "set", offline=True)
    assert sorted(found) == sorted(row["text"] for row in rows)


def test_a_hub_id_while_offline_is_refused_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(InputError, match="on the hub, and ternq is offline"):
        read_documents("allenai/c4", offline=True)
    with pytest.raises(InputError, match="on the hub"):
        data.mixed(["allenai/c4"])
    assert time.monotonic() - start < 1


def test_without_a_network_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def unresolved(*_: object) -> None:
        raise socket.gaierror("Name or service not known")

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sources, "getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    assert not sources.is_offline()
    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    assert sources.is_offline()
    monkeypatch.setattr(sources, "getproxies", lambda: {"https": "proxy"})
    assert not sources.is_offline()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\n ", "holds no text"),
        ("a.txt", b"abc\0def", "NUL"),
        ("a.txt", b"abc\xff\xfe", "not UTF-8"),
        ("a.jsonl", b'{"body": "x", "title": "y"}\n', "no column 'text'"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2, is not JSON"),
        ("a.jsonl", b'{"text": 3}\n', "not text but int"),
        ("a.jsonl", b"[1]\n", "no column 'text'"),
        ("a.parquet", b"PAR1 nothing", "damaged"),
        ("a.jsonl.xz", b"not xz", "cannot be read"),
        ("a.txt.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\3", "cannot be read"),
        ("a.bin", b"text", "not a text file that ternq reads"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert name in caught.value.message


def test_columns_are_named(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"body": ["x"], "title": ["y"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError) as caught:
        read(tmp_path / "a.parquet")
    assert caught.value.hint == "Its columns: body, title."


def test_missing_sources(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no file or folder"):
        read_documents("./nothing.txt")
    with pytest.raises(InputError, match="no file or folder"):
        read_documents("nothing.txt")
    with pytest.raises(InputError, match="holds no text"):
        read_documents(str(tmp_path / "empty"))


def test_mix_is_parsed(tmp_path: Path) -> None:
    odd = tmp_path / "a=2.txt"
    odd.write_text("x")
    assert data.parse_mix(["a/b", "c.txt=0.25", str(odd)]) == [
        ("a/b", 1.0),
        ("c.txt", 0.25),
        (str(odd), 1.0),
    ]
    for bad in ("a=b", "a=0", "a=-1", "a=nan", "a=inf", "=1"):
        with pytest.raises(RecipeError):
            data.parse_mix([bad])
    with pytest.raises(RecipeError):
        data.mixed([])


def test_shares_follow_the_weights_and_sources_begin_again(tmp_path: Path) -> None:
    a = jsonl(tmp_path / "a.jsonl", ["a" * random.Random(i).randint(1, 90) for i in range(40)])
    b = jsonl(tmp_path / "b.jsonl", ["b" * random.Random(i).randint(1, 90) for i in range(4000)])
    said: list[Event] = []
    specs = [f"{a}=3", str(b)]
    drawn = "".join(islice(data.mixed(specs, progress=said.append), 2000))
    assert drawn.count("a") / len(drawn) == pytest.approx(0.75, abs=0.005)
    assert [(e.level, e.message) for e in said] == [
        ("warning", f"{a} ended after 40 documents; begun again")
    ]
    again = "".join(islice(data.mixed(specs), 2000))
    assert again == drawn


def test_blocks_are_the_joined_documents() -> None:
    tok = tiny.tokenizer()
    documents = [tiny.text(n, n) for n in range(1, 60)]
    joined = "".join(d + "<eos>" for d in documents)
    expected = tok(joined)["input_ids"]
    found = list(data.blocks(documents, tok, 32))
    assert torch.cat(found).tolist() == expected[: len(expected) // 32 * 32]
    assert found[0].dtype == torch.int64
    assert all(block.shape == (32,) for block in found)


def test_without_a_separator_documents_touch() -> None:
    tok = tiny.tokenizer(end=None)
    (block,) = data.blocks(["abc", "def"], tok, 6)
    assert tok.decode(block) == "abcdef"


def test_held_out_documents_are_never_trained_on(tmp_path: Path) -> None:
    documents = [f"{i:04d}" + "." * 11 for i in range(100)]
    path = jsonl(tmp_path / "a.jsonl", documents + documents[:50])  # with duplicates
    tok = tiny.tokenizer()
    held, train = data.split_held_out([str(path)], tok, 32, 5, seed=3)
    assert held.shape == (5, 32)
    held_names = {d for d in tok.decode(held.flatten()).split("<eos>") if d}
    assert len(held_names) == 10
    seen = torch.cat(list(islice(train, 400)))  # several times the file
    seen_names = set(tok.decode(seen).split("<eos>")[:-1])
    assert seen_names == set(documents) - held_names


def test_split_is_deterministic(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [tiny.text(50, i) for i in range(50)])
    one, first = data.split_held_out([str(path)], tiny.tokenizer(), 64, 4, seed=5)
    two, second = data.split_held_out([str(path)], tiny.tokenizer(), 64, 4, seed=5)
    assert torch.equal(one, two)
    for a, b in zip(islice(first, 50), second, strict=False):
        assert torch.equal(a, b)


def test_too_short_a_text_says_what_is_needed(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ["abcdefg"] * 1 + ["hijklmn"])
    with pytest.raises(InputError, match="has 16 tokens; 64 are held out"):
        data.split_held_out([str(path)], tiny.tokenizer(), 32, 2)
    with pytest.raises(InputError, match="all 2 of its documents are held out"):
        data.split_held_out([str(path)], tiny.tokenizer(), 16, 1)


def test_own_text_can_be_mixed_in() -> None:
    found = set(islice(data.mixed([data.SELF], written=["one", "two"]), 10))
    assert found == {"one", "two"}
    with pytest.raises(InputError, match="'self' holds no text"):
        next(data.mixed([data.SELF]))


def test_teacher_text_is_sampled_from_the_teacher() -> None:
    """Oracle: a bigram model; the shares of next tokens are its probabilities."""

    class Bigram(torch.nn.Module):
        device = torch.device("cpu")
        table = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.5, 1e-9], [0.3, 0.3, 0.4]]).log()

        def forward(self, ids: torch.Tensor, **options: object) -> object:
            out = self.table[ids]
            return type("Out", (), {"logits": out, "past_key_values": None})

    tok = type("Tok", (), {"bos_token_id": 0, "eos_token_id": 1})
    ids = data.teacher_text(Bigram(), tok, 40, 300, seed=1, batch_size=40)
    assert ids.shape == (40, 300)
    assert bool((ids[:, 0] == 0).all())
    counts = torch.zeros(3, 3)
    counts.index_put_((ids[:, :-1].flatten(), ids[:, 1:].flatten()), torch.ones(1), accumulate=True)
    assert torch.allclose(counts / counts.sum(1, keepdim=True), Bigram.table.exp(), atol=0.03)


def test_teacher_text_with_the_cache_of_a_real_model() -> None:
    model = tiny.model()
    model.train()
    said: list[Event] = []
    one = data.teacher_text(
        model, tiny.tokenizer(), 5, 20, seed=7, batch_size=2, progress=said.append
    )
    two = data.teacher_text(model, tiny.tokenizer(), 5, 20, seed=7)
    assert torch.equal(one, two)  # at once or not
    assert [event.done for event in said] == [2, 4, 5]
    assert model.training
    generator = torch.Generator().manual_seed(7)
    ids, draws = (
        torch.full((5, 1), 256),
        torch.rand(5, 19, 1, dtype=torch.float64, generator=generator),
    )
    with torch.no_grad():
        for step in range(19):
            chances = model.eval()(ids, use_cache=False).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, drawn(chances, draws[:, step])], dim=1)
    assert torch.equal(ids, one)


def test_a_teacher_writes_on_the_device_that_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model()
    went: list[str] = []
    monkeypatch.setattr(type(model), "to", lambda self, device: went.append(str(device)))
    said: list[Event] = []
    for free in (10**9, 10):
        monkeypatch.setattr(corpus, "free_memory", lambda device, free=free: free)
        with corpus._lent(model, "cuda", said.append):
            pass
    with corpus._lent(model, "cpu", said.append):
        pass
    assert went == ["cuda", "cpu"]
    assert [str(event.message) for event in said] == [
        "The teacher does not fit on cuda as it is: it writes its text on cpu"
    ]


def test_a_teacher_writes_as_much_at_once_as_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of one block with 2 heads of 8, in float32, are 128 bytes a token."""
    model = tiny.model()
    assert data.side_by_side(model, 256) == 64
    vocabulary = model.get_output_embeddings().out_features
    for free, rows in ((8 * 5 * (128 * 256 + 32 * vocabulary), 5), (0, 1)):
        monkeypatch.setattr(data, "free_memory", lambda device, free=free: free)
        assert data.side_by_side(model, 256) == rows


@pytest.mark.parametrize(
    ("mix", "share", "written"), [(("self",), 1.0, 496), (("self=6", "{text}=2"), 0.75, 376)]
)
def test_a_teacher_writes_its_share_of_the_text(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mix: tuple[str, ...],
    share: float,
    written: int,
) -> None:
    """Of the tokens of training and calibration (480 blocks here), beside 16 blocks held out."""
    text = jsonl(
        tmp_path / "a.jsonl", ["the cat sat on the mat " * 40 + str(i) for i in range(900)]
    )
    specs = tuple(part.format(text=text) for part in mix)
    asked: list[int] = []
    seeds: list[int] = []
    capitals = tiny.tokenizer()("AZ")["input_ids"]

    def teacher_text(
        model: object, tok: object, n_blocks: int, length: int, seed: int, **_: object
    ) -> object:
        asked.append(n_blocks)
        seeds.append(seed)
        return torch.randint(capitals[0], capitals[1] + 1, (n_blocks, length))

    monkeypatch.setattr(data, "teacher_text", teacher_text)
    training = Training(tokens=448 * 256, calibration=32, start="compensated")
    recipe = Recipe(model="tiny", training=training)
    options = {"offline": True, "progress": ignore, "cache": tmp_path}
    for _ in range(2):  # what is kept is not written again
        opened = corpus.corpus(tiny.loaded(), recipe, specs, **options)  # type: ignore[arg-type]
    assert asked == [written]
    blocks = torch.stack(list(islice(opened.blocks, 300)))
    own = ((blocks >= capitals[0]) & (blocks <= capitals[1])).float().mean()
    assert float(own) == pytest.approx(share, abs=0.03)
    assert len(opened.held_out) == 62 * 256
    later = replace(recipe, base="what a run has made")
    corpus.corpus(tiny.loaded(), later, specs, **options)  # type: ignore[arg-type]
    assert asked == [written] * 2 and seeds[0] != seeds[1]
