"""Tiny random checkpoints of many architectures on disk, a text to train on, and small recipes."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from transformers import AutoModelForCausalLM

from ternq.recipe import Recipe, Scheme, Training
from ternq.train import Trainer

VOCABULARY = 257
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
LLAMA: dict[str, Any] = {**SMALL, "num_key_value_heads": 1, "tie_word_embeddings": False}
TIED = {"tie_word_embeddings": True}
BIASED = {"attention_bias": True, "mlp_bias": True}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 36,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 64,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "initializer_range": 0.2,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", LLAMA),
    "llama-tied-bias": ("LlamaConfig", {**LLAMA, **TIED, **BIASED}),
    "opt": ("OPTConfig", {**SMALL, "ffn_dim": 50, "word_embed_proj_dim": 36, "init_std": 0.2}),
    "opt-untied-no-bias": (
        "OPTConfig",
        {
            **SMALL,
            "ffn_dim": 50,
            "word_embed_proj_dim": 36,
            "init_std": 0.2,
            "tie_word_embeddings": False,
            "enable_bias": False,
        },
    ),
    "mistral": ("MistralConfig", LLAMA),
    "qwen2": ("Qwen2Config", LLAMA),
    "qwen2-tied": ("Qwen2Config", {**LLAMA, **TIED}),
    "qwen3": ("Qwen3Config", {**LLAMA, "head_dim": 12}),
    "gemma": ("GemmaConfig", {**LLAMA, **TIED, "head_dim": 12}),
    "gpt-neox": ("GPTNeoXConfig", SMALL),
    "phi": ("PhiConfig", SMALL),
    "gpt2": ("GPT2Config", GPT2),
}
FUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {**LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {
            **LLAMA,
            "head_dim": 12,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 24,
        },
    ),
}


def model(kind: str, seed: int = 0) -> Any:
    """A random model."""
    name, options = (CONFIGS | FUSED)[kind]
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(getattr(transformers, name)(**options)).eval()


def folder(
    path: Path, kind: str = "llama", *, dtype: torch.dtype = torch.float32, **saving: Any
) -> Path:
    """A random model saved with its tokenizer."""
    model(kind).to(dtype).save_pretrained(path, **saving)
    tiny.tokenizer().save_pretrained(path)
    return path


def text_file(path: Path, lines: int = 300) -> Path:
    """Documents of a sentence each."""
    rows = "".join(f'{{"text": "{tiny.text(9, seed=i)}"}}\n' for i in range(lines))
    path.write_text(rows)
    return path


def recipe(model: Path | str, data: Path, group_size: int = 16, **training: Any) -> Recipe:
    """A training of a moment: two steps of two blocks."""
    usual = {"steps": 2, "batch_size": 2, "sequence_length": 16, "data": (str(data),),
             "start": "closed-form"}  # fmt: skip
    return Recipe(
        model=str(model),
        scheme=Scheme(group_size=group_size),
        training=Training(**usual | training),
    )


def counted_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of every training step from now on."""
    steps: list[int] = []
    one_step = Trainer.one_step

    def counted(self: Trainer) -> dict[str, float]:
        steps.append(self.step)
        return one_step(self)

    monkeypatch.setattr(Trainer, "one_step", counted)
    return steps


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder and what is in it, as a hash."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
