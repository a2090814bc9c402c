"""A teacher that is run once: what its last block puts out is kept on disk, its decoder is dropped.

From the output of the last block, the teacher's own final norm and head give its logits again.
Beside the ``k`` largest logits of each token it is smaller (two bytes a channel, where a logit and
its place take six), loses no probability, and serves OFF at the last block; what it needs is that
norm and head stay in memory.

On disk: shards of ids int32 ``[blocks, tokens]`` and features bfloat16 ``[blocks, tokens, hidden]``
in the order of the run, and a list of the shards that are whole, each with its hash. Features are
found again by the ids of their block, so whoever asks need not know a place in the text.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternq import checkpoint, stop
from ternq.blocks import BlockOutputs
from ternq.errors import InputError, RecipeError, ResourceError
from ternq.files import free_disk, read_json, write_json
from ternq.head import HeadInput
from ternq.linear import decoder_blocks
from ternq.progress import Event, Progress, ignore

LIST = "teacher.json"
SHARD_BYTES = 2**26
STAGE = "cache teacher"


def cache_bytes(tokens: int, hidden: int) -> int:
    """What the cache of so many tokens takes on disk."""
    return tokens * (2 * hidden + 4)


class TeacherCache:
    """Shards of a run's blocks in a folder; ``key`` says of what, and another one begins anew."""

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self.folder, self.key = folder, key
        self.shards: list[dict[str, Any]] = []
        self._where: dict[bytes, tuple[int, int]] = {}  # of a block's ids: shard and row
        self._held: tuple[int, Tensor] | None = None  # the shard that was read last
        found = read_json(folder / LIST) if (folder / LIST).is_file() else {}
        if found.get("key") == key:
            self.shards = found["shards"]
        elif folder.is_dir():
            shutil.rmtree(folder)
        for index in range(len(self.shards)):
            self._enter(index, self._ids(index))

    def __len__(self) -> int:
        """Blocks that are kept."""
        return sum(shard["blocks"] for shard in self.shards)

    def add(self, ids: Tensor, features: Tensor) -> None:
        """Keep one more shard: ids ``[blocks, tokens]``, features ``[blocks, tokens, hidden]``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name, features = f"blocks-{len(self.shards):06d}.safetensors", features.bfloat16()
        checkpoint.save_tensors({"ids": ids.int(), "features": features}, self.folder / name)
        self.shards.append({"file": name, "blocks": len(ids), "sha256": _sha256(features)})
        write_json(self.folder / LIST, {"key": self.key, "shards": self.shards})
        self._enter(len(self.shards) - 1, ids)

    def blocks(self) -> Iterator[Tensor]:
        """The ids of every block, in the order of the run: int64 ``[tokens]``."""
        for index in range(len(self.shards)):
            yield from self._ids(index)

    def features(self, ids: Tensor) -> Tensor:
        """What the last block put out for ids ``[blocks, tokens]``; `InputError` if damaged."""
        places = [self._where[_key(row)] for row in ids.cpu()]
        return torch.stack([self._shard(index)[row] for index, row in places])

    def _shard(self, index: int) -> Tensor:
        if self._held is None or self._held[0] != index:
            shard = self.shards[index]
            path = self.folder / shard["file"]
            features = checkpoint.load_tensors(path)["features"]
            if _sha256(features) != shard["sha256"]:
                raise InputError(
                    f"{path} is damaged: its hash is another.",
                    f"Remove {self.folder}; it is made again.",
                )
            self._held = index, features
        return self._held[1]

    def _ids(self, index: int) -> Tensor:
        file = checkpoint.TensorFolder(self.folder, self.shards[index]["file"])
        return file["ids"].long()

    def _enter(self, index: int, ids: Tensor) -> None:
        for row, block in enumerate(ids):
            self._where[_key(block)] = index, row


class CachedTeacher:
    """A teacher whose blocks put out what a cache holds; their weights are gone."""

    def __init__(self, model: Any, cache: TeacherCache) -> None:
        self.model, self.cache = model, cache
        self._hidden: Tensor | None = None
        self._replay()

    def recall(self, ids: Tensor) -> Tensor:
        """Have the blocks put out what they did for ids ``[blocks, tokens]``, float32; that."""
        self._hidden = self.cache.features(ids).to(ids.device).float()
        return self._hidden

    @torch.no_grad()
    def _replay(self) -> None:
        """Put the cache in the place of the blocks, if the model's output is the same with it."""
        device = self.model.get_output_embeddings().weight.device
        ids = torch.arange(4, device=device).unsqueeze(0)
        blocks, outputs = decoder_blocks(self.model)[1], []
        hook = blocks[-1].register_forward_hook(lambda *given: outputs.append(given[2]))
        expected = self.model(input_ids=ids, use_cache=False).logits
        hook.remove()
        tupled = isinstance(outputs[0], tuple)
        self._hidden = outputs[0][0] if tupled else outputs[0]
        for block in blocks:
            vars(block)["forward"] = lambda *_, **__: (self._hidden,) if tupled else self._hidden
        if not torch.equal(self.model(input_ids=ids, use_cache=False).logits, expected):
            for block in blocks:
                del vars(block)["forward"]
            raise RecipeError(
                f"The logits of {type(self.model).__name__} are not those of its last block alone.",
                "Leave --cache-teacher out.",
            )
        for block in blocks:
            block.to("meta")


def cached_teacher(
    model: Any,
    blocks: Iterator[Tensor],
    count: int,
    cache: TeacherCache,
    *,
    rows: int,
    autocast: Any,
    reason: Callable[[], str | None] | None = None,
    progress: Progress = ignore,
) -> CachedTeacher:
    """Run the teacher on the next ``count`` blocks, ``rows`` at a time, where they are not kept.

    ``reason`` says why to stop, if that is to be; by default a signal.

    Raises:
        ResourceError: the disk has no room; InputError: the text is not that of the shards kept;
        StoppedError, InterruptedByUser: a signal; what was run is kept.
    """
    done = len(cache)
    if done < count:
        _skip(blocks, cache)
        _fill(model, blocks, count, cache, rows, autocast, reason or stop.requested, progress)
    return CachedTeacher(model, cache)


def _skip(blocks: Iterator[Tensor], cache: TeacherCache) -> None:
    for kept in cache.blocks():
        if not torch.equal(next(blocks), kept):
            raise InputError(
                "The text is not the one that the teacher was run on.",
                f"Remove {cache.folder}, if the text may be another.",
            )


@torch.no_grad()
def _fill(
    model: Any,
    blocks: Iterator[Tensor],
    count: int,
    cache: TeacherCache,
    rows: int,
    autocast: Any,
    asked: Callable[[], str | None],
    progress: Progress,
) -> None:
    device = model.get_output_embeddings().weight.device
    kept: list[tuple[Tensor, Tensor]] = []
    done = len(cache)
    while done < count:
        ids = torch.stack([next(blocks) for _ in range(min(rows, count - done))])
        with autocast, BlockOutputs(model) as outputs, HeadInput(model):
            model(input_ids=ids.to(device), use_cache=False)
        features = outputs.features[-1].bfloat16().cpu()
        if not kept:
            _refuse_without_room(cache.folder, (count - done) * ids.shape[1], features.shape[2])
        kept.append((ids, features))
        done += len(ids)
        progress(Event(STAGE, done=done, total=count))
        reason = asked() if done < count else None
        if reason or done == count or sum(f.nbytes for _, f in kept) >= SHARD_BYTES:
            cache.add(*(torch.cat(parts) for parts in zip(*kept, strict=True)))
            kept = []
        if reason:
            said = (
                f"Stopped after the teacher's {done} blocks of {count} ({reason}); they are kept."
            )
            raise stop.ended(reason, said, "The same command goes on from there.")


def _refuse_without_room(folder: Path, tokens: int, hidden: int) -> None:
    needed, free = cache_bytes(tokens, hidden), free_disk(folder)
    if needed > free:
        raise ResourceError(
            f"The teacher's outputs take {needed / 1e9:.1f} GB of disk, and {free / 1e9:.1f} GB "
            f"are free at {folder}.",
            "Leave --cache-teacher out, or choose another disk with -o.",
        )


def _key(ids: Tensor) -> bytes:
    return hashlib.blake2b(ids.int().numpy().tobytes(), digest_size=16).digest()


def _sha256(features: Tensor) -> str:
    raw = features.contiguous().view(torch.int16)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()
