"""The type in which training makes its products: float32, or bfloat16 by autocast."""

from dataclasses import replace

import torch

from ternq.recipe import Training


def has_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 matrix products of its own, and does not emulate them.

    A card that is only planned for is taken to have them.
    """
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return True
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported())
    return False


def products(settings: Training, device: torch.device | str) -> torch.autocast:
    """A context in which products are made in the type of ``settings``, or what suits the device.

    It may be entered again.
    """
    device = torch.device(device)
    bf16 = has_bf16(device) if settings.dtype is None else settings.dtype == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def with_products(settings: Training, device: str) -> tuple[Training, list[str]]:
    """The settings with a type of products, and what is to be said of it."""
    try:
        own = has_bf16(torch.device(device))
    except RuntimeError:  # no device of torch's: whoever loads the model says so
        return settings, []
    if settings.dtype is None:
        return replace(settings, dtype="bfloat16" if own else "float32"), []
    slow = settings.dtype == "bfloat16" and not own
    said = [f"Products in bfloat16, which {device} has to emulate: it will be slow."]
    return settings, said if slow else []
