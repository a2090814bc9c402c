"""The processes that train one model together: which this one is, what they share and agree upon.

A launcher (``torchrun``, ``accelerate launch``) starts them and says who is who in the environment.
Process 0 is the main one: it alone writes and speaks, and after training it goes on alone. Without
a launcher every function here is that of one process, and changes nothing. torch is imported when
processes meet, since the command line asks here who it is.
"""

import atexit
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from ternq.errors import RecipeError, TernqError

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")

LONGEST_WAIT = timedelta(hours=6)  # for the main process, as it measures or has text written


def launched() -> bool:
    """Whether a launcher started this process, possibly beside others."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ["RANK"]) if launched() else 0


def count() -> int:
    """How many processes there are."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def is_main() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


@dataclass(frozen=True)
class Crew:
    """Processes that train together, each with a device; whether they share the parameters."""

    count: int = 1
    sharded: bool = False


def crew() -> Crew:
    """Those of this training."""
    return Crew(count(), sharding() is not None)


def device_of(name: str) -> str:
    """The device of this process: of ``cuda``, the card that the launcher's local rank names."""
    local = os.environ.get("LOCAL_RANK") if launched() else None
    return f"cuda:{local}" if name == "cuda" and local is not None else name


def refuse_many(what: str) -> None:
    """`RecipeError` where several processes were started for what one does."""
    if count() > 1:
        raise RecipeError(f"{what} is the work of one process, not of {count()}.")


def is_lost(error: BaseException) -> bool:
    """Whether an error says no more than that another process has ended."""
    signs = ("closed by peer", "reset by peer", "Broken pipe", "ncclRemoteError")
    return count() > 1 and isinstance(error, RuntimeError) and any(s in str(error) for s in signs)


# -- meeting ---------------------------------------------------------------------------------------


def join(device: str) -> None:
    """Meet the other processes, if there are any; once is enough."""
    if not launched() or _met():
        return
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=LONGEST_WAIT)
    atexit.register(leave)


def leave() -> None:
    """Part: from here on each process is alone."""
    if _met():
        import torch.distributed as dist

        dist.destroy_process_group()


def _met() -> bool:
    if not launched():
        return False
    import torch.distributed as dist

    return dist.is_initialized()


def gather(value: T) -> list[T]:
    """Everybody's value, in the order of the processes."""
    if not _met():
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def from_main(make: Callable[[], T]) -> T:
    """What ``make`` returns in the main process, which alone calls it; or raises, everywhere."""
    if not _met():
        return make()
    import torch.distributed as dist

    sent: list[Any] = [None, None]
    if is_main():
        try:
            sent[0] = make()
        except TernqError as error:
            sent[1] = error
    dist.broadcast_object_list(sent, src=0)
    if sent[1] is not None:
        raise sent[1]
    return sent[0]  # type: ignore[no-any-return]


def main_first(make: Callable[[], T]) -> T:
    """What ``make`` returns here, called once the main process has done with it (and cached it)."""
    made = [make()] if is_main() else []
    gather(None)
    return made[0] if made else make()


# -- one batch, one record -------------------------------------------------------------------------


def share(batch: "Tensor") -> "Tensor":
    """This process's rows of a batch ``[blocks, tokens]``; together they are the batch."""
    refuse_uneven(len(batch))
    return batch.chunk(count())[rank()]


def refuse_uneven(batch_size: int, many: int | None = None, who: str = "processes") -> None:
    """`RecipeError` if so ``many`` cannot share a batch: gradients are means of equal shares."""
    many = many or count()
    if batch_size % many:
        raise RecipeError(
            f"--batch-size {batch_size} cannot be shared evenly among {many} {who}.",
            "Blocks of one step are shared among them; name a multiple.",
        )


def mean(values: Mapping[str, float]) -> dict[str, float]:
    """The mean of each value over the equal shares of a batch."""
    everyone = gather(dict(values))
    return {name: sum(one[name] for one in everyone) / len(everyone) for name in values}


def agreed(reason: str | None, due: bool) -> tuple[str | None, bool]:
    """Why all stop after this step, if anybody must; whether all save now, if anybody would."""
    reasons, dues = zip(*gather((reason, due)), strict=True)
    return next(filter(None, reasons), None), any(dues)


# -- parameters in shards (FSDP2) ------------------------------------------------------------------


def sharding() -> dict[str, Any] | None:
    """Accelerate's settings where FSDP was asked for (``accelerate launch --use_fsdp``), or None.

    Raises:
        RecipeError: an engine was asked for that does not train ternary layers here.
    """
    asked = {n for n in ("FSDP", "DEEPSPEED", "MEGATRON_LM") if _yes(f"ACCELERATE_USE_{n}")}
    version = os.environ.get("FSDP_VERSION", "2")
    if asked - {"FSDP"} or (asked and version != "2"):
        engine = "FSDP 1" if asked == {"FSDP"} else min(asked - {"FSDP"})
        raise RecipeError(
            f"{engine} was asked of accelerate; ternq trains with DDP or FSDP 2.",
            "accelerate launch --use_fsdp --fsdp_version 2 ...",
        )
    if not asked or not launched():
        return None
    return {
        "reshard_after_forward": _yes("FSDP_RESHARD_AFTER_FORWARD", "true"),
        "offload": _yes("FSDP_OFFLOAD_PARAMS"),
    }


def _yes(name: str, default: str = "false") -> bool:
    return os.environ.get(name, default).lower() in ("true", "1", "yes")


def shard(root: "nn.Module", blocks: "nn.ModuleList") -> bool:
    """Shard the parameters of ``root`` block by block, if asked for; whether they are now shards.

    What lies outside the blocks is one more unit, whole while ``root`` runs.
    """
    settings = sharding()
    if settings is None:
        return False
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    policy = CPUOffloadPolicy() if settings["offload"] else OffloadPolicy()
    again = settings["reshard_after_forward"]
    for block in blocks:
        fully_shard(block, reshard_after_forward=again, offload_policy=policy)
    fully_shard(root, offload_policy=policy)
    return True


def is_sharded(tensor: Any) -> bool:
    """Whether this process has only its part of a tensor."""
    if not _met():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Any) -> Any:
    """This process's rows of a tensor in shards; another tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Any) -> Any:
    """A tensor in shards, put together for everybody; another tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def over_shards(numbers: Sequence[float], tensor: Any) -> list[float]:
    """Sums over all processes, where they were taken of shards such as ``tensor``."""
    if not is_sharded(tensor):
        return list(numbers)
    return [sum(values) for values in zip(*gather(list(numbers)), strict=True)]


def gathered(tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Tensors as one process has them: shards are put together, on the main process's CPU.

    All processes must call it; others than the main one get nothing for a tensor in shards.
    """
    found = {}
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            full = whole(tensor)
            if is_main():
                found[name] = full.cpu()
        else:
            found[name] = tensor
    return found


def placed(tensor: "Tensor", like: Any) -> "Tensor":
    """The inverse of `gathered`, for one tensor: its shard, if ``like`` (of its shape) is one."""
    if not is_sharded(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    there = tensor.to(like.device_mesh.device_type)
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)
