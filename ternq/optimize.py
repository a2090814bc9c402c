"""Which parameters learn, by which optimizer, at which rate; its states taken apart for a file.

AdamW is torch's. Its states in 8 bits, bfloat16 weights rounded at random and states on the host
are torchao's, an optional package that enters here only.
"""

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ternq import processes
from ternq.errors import RecipeError
from ternq.linear import TernaryLinear
from ternq.modeling_ternq import is_linear
from ternq.recipe import Training
from ternq.schedule import decays, rate

BETAS = (0.9, 0.95)
_PIECES = ("codes", "scale")  # of torchao's 8-bit state; the rest follows from them


def refuse(settings: Training, device: str, crew: processes.Crew) -> None:
    """`RecipeError` if the optimizer that the settings ask for is not to be had."""
    if settings.offload and crew.count > 1:
        raise RecipeError(
            "--offload is of one process: it copies gradients before others have added theirs.",
            "Leave --offload out.",
        )
    eight, rounded = settings.optimizer != "adamw", settings.latent != "float32"
    if crew.sharded and (eight or rounded):
        one = f"--optimizer {settings.optimizer}" if eight else f"--latent {settings.latent}"
        raise RecipeError(
            f"{one} does not go with parameters in shards (FSDP).",
            "Leave it out, or launch without --use_fsdp.",
        )
    if settings.offload and not device.startswith("cuda"):
        raise RecipeError(
            f"--offload moves optimizer states from a GPU to the host; --device is {device}.",
            "Leave --offload out.",
        )
    if _needs_torchao(settings) and importlib.util.find_spec("torchao") is None:
        wanted = "--offload" if settings.offload else f"--optimizer {settings.optimizer}"
        wanted = wanted if settings.latent == "float32" else f"--latent {settings.latent}"
        raise RecipeError(f"{wanted} needs the package torchao.", "pip install 'ternq[8bit]'")


def optimizer(student: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """AdamW over the latent weights, over scales and shifts, and over norms and biases.

    Embeddings, output head and linear weights that were skipped stay as the teacher has them; from
    scratch they learn as well: embeddings and head without weight decay, as norms and biases.
    Where ``--train`` freezes the weights, norms and biases are frozen too.
    """
    head = getattr(student, "get_output_embeddings", lambda: None)()
    scale_lr = settings.peak_lr if settings.scale_lr is None else settings.scale_lr
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "scales": [], "rest": []}
    seen: set[int] = set()
    for module in student.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            kind = kind_of(module, name)
            if kind is None and settings.from_scratch:
                plain = isinstance(module, nn.Embedding) or module is head
                kind = "rest" if plain else "weights"
            kind = None if kind == "rest" and settings.train != "all" else kind
            parameter.requires_grad_(kind is not None)
            if kind is not None:
                groups[kind].append(parameter)
    decay = {"weights": settings.weight_decay}
    rates = {"weights": settings.peak_lr, "scales": scale_lr, "rest": settings.peak_lr}
    return _adamw(
        [
            {
                "params": p,
                "lr": rates[k],
                "peak_lr": rates[k],
                "weight_decay": decay.get(k, 0.0),
                "first_decay": decay.get(k, 0.0),
            }
            for k, p in groups.items()
            if p
        ],
        settings,
    )


def _adamw(groups: list[dict[str, Any]], settings: Training) -> torch.optim.Optimizer:
    if not _needs_torchao(settings):
        # one pass over memory; torch's other loops make five and more, with temporaries
        return torch.optim.AdamW(groups, betas=BETAS, fused=True)
    from torchao.optim import AdamW8bit, CPUOffloadOptimizer, _AdamW

    options: dict[str, Any] = {"betas": BETAS}
    made: Any = torch.optim.AdamW
    if settings.optimizer != "adamw" or settings.latent != "float32":
        made = AdamW8bit if settings.optimizer == "adamw-8bit" else _AdamW
        options["bf16_stochastic_round"] = settings.latent == "bfloat16"
    if settings.offload:
        options["optimizer_class"], made = made, CPUOffloadOptimizer
    found: torch.optim.Optimizer = made(groups, **options)
    return found


def _needs_torchao(settings: Training) -> bool:
    return settings.offload or settings.optimizer != "adamw" or settings.latent != "float32"


def kind_of(module: nn.Module, name: str) -> str | None:
    if isinstance(module, TernaryLinear):
        if name in ("weight", "adapter_a", "adapter_b"):
            return "weights"
        return "scales" if name.startswith("weight_") else "rest"
    if isinstance(module, nn.Embedding) or (is_linear(module) and name == "weight"):
        return None
    return "rest"


def set_rate(
    optimizer: torch.optim.Optimizer, step: int, steps: int, settings: Training, factor: float = 1.0
) -> float:
    """Give every group its rate and weight decay of this step; returns the rate of the weights.

    Rates are multiplied by ``factor``.
    """
    now, decaying = factor * rate(step, steps, settings), decays(step, steps, settings)
    for group in optimizer.param_groups:
        group["weight_decay"] = group["first_decay"] if decaying else 0.0
        _put_rate(group, group["peak_lr"] * now)
    return settings.peak_lr * now


def _put_rate(group: dict[str, Any], lr: float) -> None:
    if isinstance(group["lr"], Tensor):  # torchao's
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


@contextlib.contextmanager
def on_trial(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Steps within have a rate of 0, and the optimizer forgets them afterwards."""
    for group in optimizer.param_groups:
        _put_rate(group, 0.0)
    yield
    for group in optimizer.param_groups:
        _put_rate(group, group["peak_lr"])
    inner: Any = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
    host = getattr(inner, "optim_dict", None)  # of torchao's offloading, which holds several
    for part in [inner] if host is None else [*host.values(), inner.d_opt]:
        if part is not None:
            part.state.clear()


def take_step(
    optimizer: torch.optim.Optimizer, settings: Training, *, seed: int, step: int, norm: float
) -> None:
    """One step of the optimizer; ``norm`` is the gradients' before they were clipped.

    Rounding at random draws from the seed and the step alone, so a resumed run draws the same.
    """
    if not _needs_torchao(settings):
        optimizer.step()
        return
    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
    if settings.offload:
        _clip_on_host(inner, settings.clip, norm)
    on_gpu = bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
    with contextlib.ExitStack() as around:
        if settings.offload or not on_gpu:  # on the CPU torchao would want a C++ compiler
            around.enter_context(torch.compiler.set_stance("force_eager"))
        devices = [torch.cuda.current_device()] if on_gpu else []
        around.enter_context(torch.random.fork_rng(devices))
        torch.manual_seed((seed * 1_000_003 + step) % 2**63)
        optimizer.step()


def _clip_on_host(optimizer: Any, clip: float, norm: float) -> None:
    """Clip the copies of gradients on the host, which were made in the backward pass, unclipped."""
    if not clip or norm <= clip:
        return
    optimizer.stream.synchronize()
    for host in optimizer.param_d2h_map.values():
        host.grad.mul_(clip / (norm + 1e-6))


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state, tensors and numbers, named ``[part.]parameter.name[.piece]``.

    A part is one of the optimizers that torchao's offloading keeps; pieces are those of a state in
    8 bits.
    """
    found: dict[str, Any] = {}
    for part, state in _parts(optimizer.state_dict()).items():
        for index, values in state["state"].items():
            for key, value in values.items():
                name = f"{part}{index}.{key}"
                if hasattr(value, "codes"):  # torchao's
                    found |= {f"{name}.{piece}": getattr(value, piece) for piece in _PIECES}
                else:
                    found[name] = value
    return found


def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Any]) -> None:
    """Put `state_tensors` back into an optimizer of the same settings and parameters.

    The parameters must be restored before: copies of them on the host are refreshed here.
    """
    whole = optimizer.state_dict()
    parts = _parts(whole)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for state in parts.values():
        state["state"] = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"((?:[\w-]+\.)??)(\d+)\.(\w+?)(?:\.(codes|scale))?", name)
        assert found is not None
        part, index, key, piece = found.groups()
        state = parts[part]["state"].setdefault(int(index), {})
        if piece is None:
            plain = part or not isinstance(tensor, Tensor)
            state[key] = tensor if plain else processes.placed(tensor, parameters[int(index)])
        elif piece == "codes":
            state[key] = _eight_bits(tensor, tensors[f"{part}{index}.{key}.scale"], key)
    optimizer.load_state_dict(whole)
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    for device, host in getattr(inner, "param_d2h_map", {}).items():
        host.copy_(device.detach())


def _parts(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    if "offloaded" not in state:
        return {"": state}
    parts = {f"host-{i}.": s for i, s in enumerate(state["offloaded"])}
    return parts | ({"device.": state["on-device"]} if "on-device" in state else {})


def _eight_bits(codes: Tensor, scale: Tensor, key: str) -> Tensor:
    from torchao.optim.subclass_8bit import OptimState8bit

    block = codes.numel() // scale.numel()
    state = OptimState8bit.zeros(codes.shape, key == "exp_avg", block)
    state.codes, state.scale = codes, scale
    return state  # type: ignore[no-any-return]
