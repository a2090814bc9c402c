"""Memory: what is free on a device, and what this process, a model or its cache holds."""

import contextlib
import ctypes
import gc
import sys
from pathlib import Path
from typing import Any

import psutil
import torch


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = int(psutil.virtual_memory().available)
    return min(available, _left_in_container() or available)


def give_back() -> None:
    """Hand memory that nothing refers to back to the system, which glibc would keep."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def resident() -> int:
    """Bytes of this process that lie in memory."""
    return int(psutil.Process().memory_info().rss)


def peak() -> int:
    """The largest resident size of this process.

    Linux says it exactly; its ``ru_maxrss`` would begin at the size of the process that started it.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def model_bytes(model: Any) -> int:
    """Bytes of parameters and buffers; what two of them share counts once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({(t.data_ptr(), t.nbytes): t.nbytes for t in tensors}.values())


def cache_bytes(model: Any, tokens: int) -> int:
    """What keys and values of so many tokens take, in float32."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    return int(8 * tokens * config.num_hidden_layers * keys * size)


def _left_in_container() -> int | None:
    """Bytes that a container's limit leaves; None where there is none, or none is told."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return int(limit) - used if limit.isdecimal() else None
