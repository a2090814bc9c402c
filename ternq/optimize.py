"""Which parameters learn, by which optimizer, at which rate."""

import torch
from torch import nn

from ternq.linear import TernaryLinear
from ternq.modeling_ternq import is_linear
from ternq.recipe import Training

BETAS = (0.9, 0.95)


def optimizer(student: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """AdamW over the latent weights, over scales and shifts, and over norms and biases.

    Embeddings, output head and linear weights that were skipped stay as the teacher has them.
    """
    scale_lr = settings.lr if settings.scale_lr is None else settings.scale_lr
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "scales": [], "rest": []}
    seen: set[int] = set()
    for module in student.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            kind = kind_of(module, name)
            parameter.requires_grad_(kind is not None)
            if kind is not None:
                groups[kind].append(parameter)
    decay = {"weights": settings.weight_decay}
    rates = {"weights": settings.lr, "scales": scale_lr, "rest": settings.lr}
    return torch.optim.AdamW(
        [
            {"params": p, "lr": rates[k], "peak_lr": rates[k], "weight_decay": decay.get(k, 0.0)}
            for k, p in groups.items()
            if p
        ],
        betas=BETAS,
    )


def kind_of(module: nn.Module, name: str) -> str | None:
    if isinstance(module, TernaryLinear):
        if name == "weight":
            return "weights"
        return "scales" if name.startswith("weight_") else "rest"
    if isinstance(module, nn.Embedding) or (is_linear(module) and name == "weight"):
        return None
    return "rest"


def set_rate(optimizer: torch.optim.Optimizer, step: int, steps: int, settings: Training) -> float:
    """Give every group its rate of this step; returns that of the weights."""
    now = rate(step, steps, settings.warmup)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * now
    return settings.lr * now


def rate(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up to 1, then linear decay to 0 after the last step."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return (step + 1) / (rising + 1)
    return max(0.0, (steps - step) / max(1, steps - rising))
