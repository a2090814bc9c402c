"""Text to blocks of token ids: weighted mixes, packing, held-out text, the teacher's own text.

Sources are documents (plain strings) from `ternq.text`; whatever is drawn here depends on nothing
but the texts and the seed, so that a stopped run finds its place again by counting blocks.
"""

import hashlib
import math
import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternq.errors import InputError, RecipeError
from ternq.memory import cache_bytes, free_memory
from ternq.progress import Event, Progress, ignore
from ternq.sampling import drawn
from ternq.text import Source, open_source, shuffled

SELF = "self"
"""The source that stands for text written by the teacher."""

AT_ONCE = 2**14  # tokens that a teacher writes side by side, where memory allows; more gain nothing


def parse_mix(specs: Sequence[str]) -> list[tuple[str, float]]:
    """Read ``NAME`` or ``NAME=WEIGHT`` (weight 1 where none is given); a bad weight is refused."""
    return [_parse(spec) for spec in specs]


def mixed(
    specs: Sequence[str],
    *,
    seed: int = 0,
    offline: bool = False,
    progress: Progress = ignore,
    written: Sequence[str] = (),
    without: Collection[bytes] = frozenset(),
) -> Iterator[str]:
    """An endless weighted mix: each source's share of the characters follows its weight.

    ``written`` are the documents that stand for ``self``; documents whose `fingerprint` is in
    ``without`` are left out. A source that ends is begun again in another order.
    """
    parts = _sources(specs, offline, progress, written)
    streams = [_endless(name, source, seed, without, progress) for name, source, _ in parts]
    return _interleave(streams, [weight for *_, weight in parts])


def blocks(documents: Iterable[str], tokenizer: Any, length: int) -> Iterator[Tensor]:
    """Pack documents, each ended by EOS (else BOS, else nothing), into int64 blocks [length].

    Nothing is lost between documents or blocks; only what is left at the very end (less than one
    block) is dropped.
    """
    tokens: list[int] = []
    stream = iter(documents)
    while group := list(islice(stream, 16)):
        for ids in encode(group, tokenizer):
            tokens += ids
        whole = len(tokens) // length * length
        yield from torch.tensor(tokens[:whole], dtype=torch.int64).view(-1, length)
        tokens = tokens[whole:]


def encode(documents: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each document, with the separator that `blocks` puts behind it."""
    encoded = tokenizer(list(documents), add_special_tokens=False, verbose=False)
    end = separator(tokenizer)
    tail = [] if end is None else [end]
    return [list(ids) + tail for ids in encoded["input_ids"]]


def separator(tokenizer: Any) -> int | None:
    """The token between documents: EOS, else BOS, else none."""
    end = tokenizer.eos_token_id
    return tokenizer.bos_token_id if end is None else end  # type: ignore[no-any-return]


def split_held_out(
    specs: Sequence[str],
    tokenizer: Any,
    length: int,
    n_blocks: int,
    *,
    seed: int = 0,
    offline: bool = False,
    progress: Progress = ignore,
    written: Sequence[str] = (),
) -> tuple[Tensor, Iterator[Tensor]]:
    """Held-out blocks [n_blocks, length] and the endless training blocks [length] beside them.

    The first documents of the mix are held out until the blocks are full; they, and any document
    equal to one of them, are never trained on. Raises `InputError` for too short a text.
    """
    parts = _sources(specs, offline, progress, written)
    once = _interleave([source(seed) for _, source, _ in parts], [weight for *_, weight in parts])
    held_out, names = _fill(once, tokenizer, length, n_blocks)
    rest = mixed(
        specs, seed=seed, offline=offline, progress=progress, written=written, without=names
    )
    train = blocks(rest, tokenizer, length)
    return held_out, chain([next(train)], train)


@torch.no_grad()
def teacher_text(
    model: Any,
    tokenizer: Any,
    n_blocks: int,
    length: int,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress = ignore,
) -> Tensor:
    """Blocks [n_blocks, length] that the model writes itself, sampled at temperature 1.

    Each begins with BOS (else EOS, else a random token); an end of text is not a stop, the model
    writes on. This is the data-free text of LLM-QAT (Liu et al. 2023, arXiv 2305.17888). How many
    blocks are written at once does not change what is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    starts = _first_tokens(model, tokenizer, n_blocks, generator)
    draws = torch.rand(n_blocks, length - 1, dtype=torch.float64, generator=generator)
    rows = batch_size or side_by_side(model, length)
    was_training, done = model.training, []
    model.eval()
    for start, own in zip(torch.split(starts, rows), torch.split(draws, rows), strict=True):
        done.append(_sample(model, start, own))
        progress(Event("text", done=sum(map(len, done)), total=n_blocks))
    model.train(was_training)
    return torch.cat(done)


def side_by_side(model: Any, length: int) -> int:
    """Blocks of so many tokens that a teacher writes at once.

    What it keeps of them, counted in float32, has an eighth of the free memory at most.
    """
    size = cache_bytes(model, length) + 32 * model.get_output_embeddings().out_features
    fits = free_memory(model.device) // 8 // size
    return int(max(1, min(AT_ONCE // length, fits)))


def fingerprint(document: str) -> bytes:
    """What a held-out document is known by."""
    return hashlib.blake2b(document.encode(errors="surrogatepass"), digest_size=16).digest()


def _parse(spec: str) -> tuple[str, float]:
    name, equals, text = spec.rpartition("=")
    if not equals or Path(spec).exists():
        return spec, 1.0
    try:
        weight = float(text)
    except ValueError as error:
        raise RecipeError(
            f"--data {spec}: '{text}' is not a number.", "Write NAME=WEIGHT, as in c4.txt=0.5."
        ) from error
    if not name or not (math.isfinite(weight) and weight > 0):
        raise RecipeError(f"--data {spec}: a weight is a finite number above 0.")
    return name, weight


# -- several sources -------------------------------------------------------------------------------


def _sources(
    specs: Sequence[str], offline: bool, progress: Progress, written: Sequence[str]
) -> list[tuple[str, Source, float]]:
    if not specs:
        raise RecipeError("No text was named.", "Name some with --data.")
    return [
        (name, _own(written) if name == SELF else open_source(name, offline, progress), weight)
        for name, weight in parse_mix(specs)
    ]


def _own(written: Sequence[str]) -> Source:
    def begin(seed: int) -> Iterator[str]:
        return shuffled(written, random.Random(seed), SELF)

    return begin


def _endless(
    name: str, source: Source, seed: int, without: Collection[bytes], progress: Progress
) -> Iterator[str]:
    """Begin again, in another order, whenever the source ends."""
    for turn in count():
        seen = given = 0
        for document in source(seed + turn):
            seen += 1
            if fingerprint(document) not in without:
                given += 1
                yield document
        if not given:
            raise InputError(
                f"'{name}' is too short: all {seen} of its documents are held out for evaluation.",
                "Name more text with --data.",
            )
        if turn == 0:
            said = f"{name} ended after {given} documents; begun again"
            progress(Event("data", said, level="warning"))


def _interleave(streams: Sequence[Iterator[str]], weights: Sequence[float]) -> Iterator[str]:
    """Always the next document of the stream that is furthest behind its share of the text."""
    given = dict.fromkeys(range(len(streams)), 0.0)
    while given:
        at = min(given, key=given.__getitem__)
        document = next(streams[at], None)
        if document is None:
            del given[at]
            continue
        given[at] += len(document) / weights[at]
        yield document


def _fill(
    documents: Iterator[str], tokenizer: Any, length: int, n_blocks: int
) -> tuple[Tensor, set[bytes]]:
    """The first blocks [n_blocks, length] and the fingerprints of the documents they are from."""
    names: set[bytes] = set()
    tokens: list[int] = []
    needed = length * n_blocks
    while len(tokens) < needed and (document := next(documents, None)) is not None:
        names.add(fingerprint(document))
        tokens += encode([document], tokenizer)[0]
    if len(tokens) < needed:
        raise InputError(
            f"The text is too short: it has {len(tokens):,} tokens; {needed:,} are held out for "
            f"evaluation ({n_blocks} blocks of {length}), and training needs some beside.",
            "Name more text with --data.",
        )
    return torch.tensor(tokens[:needed]).view(n_blocks, length), names


# -- the teacher's own text ------------------------------------------------------------------------


def _first_tokens(model: Any, tokenizer: Any, rows: int, generator: torch.Generator) -> Tensor:
    begin = tokenizer.bos_token_id
    begin = tokenizer.eos_token_id if begin is None else begin
    if begin is None:
        vocabulary = model.get_output_embeddings().out_features
        return torch.randint(vocabulary, (rows, 1), generator=generator)
    return torch.full((rows, 1), begin)


def _sample(model: Any, ids: Tensor, draws: Tensor) -> Tensor:
    """Continue ids [rows, 1] by a token for each of ``draws`` [rows, n], uniform in [0, 1)."""
    past = None
    for at in torch.split(draws, 1, dim=1):
        out = model(ids[:, -1:].to(model.device), past_key_values=past, use_cache=True)
        past = out.past_key_values
        chances = out.logits[:, -1].float().softmax(-1).cpu()
        ids = torch.cat([ids, drawn(chances, at)], dim=1)
    return ids
