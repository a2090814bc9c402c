"""Which parameters learn, by which optimizer, at which rate."""

import torch
from torch import nn

from ternq.linear import TernaryLinear
from ternq.modeling_ternq import is_linear
from ternq.recipe import Training
from ternq.schedule import decays, rate

BETAS = (0.9, 0.95)


def optimizer(student: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """AdamW over the latent weights, over scales and shifts, and over norms and biases.

    Embeddings, output head and linear weights that were skipped stay as the teacher has them; from
    scratch they learn as well: embeddings and head without weight decay, as norms and biases.
    """
    head = getattr(student, "get_output_embeddings", lambda: None)()
    scale_lr = settings.lr if settings.scale_lr is None else settings.scale_lr
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "scales": [], "rest": []}
    seen: set[int] = set()
    for module in student.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            kind = _kind(module, name)
            if kind is None and settings.from_scratch:
                plain = isinstance(module, nn.Embedding) or module is head
                kind = "rest" if plain else "weights"
            parameter.requires_grad_(kind is not None)
            if kind is not None:
                groups[kind].append(parameter)
    decay = {"weights": settings.weight_decay}
    rates = {"weights": settings.lr, "scales": scale_lr, "rest": settings.lr}
    return torch.optim.AdamW(
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
        betas=BETAS,
    )


def _kind(module: nn.Module, name: str) -> str | None:
    if isinstance(module, TernaryLinear):
        if name == "weight":
            return "weights"
        return "scales" if name.startswith("weight_") else "rest"
    if isinstance(module, nn.Embedding) or (is_linear(module) and name == "weight"):
        return None
    return "rest"


def set_rate(optimizer: torch.optim.Optimizer, step: int, steps: int, settings: Training) -> float:
    """Give every group its rate and weight decay of this step; returns the rate of the weights."""
    now, decaying = rate(step, steps, settings), decays(step, steps, settings)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * now
        group["weight_decay"] = group["first_decay"] if decaying else 0.0
    return settings.lr * now
