"""A tiny model, its tokenizer, and tiny datasets in the hub's layout, all made in code."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ternq.hf import Loaded

WORDS = ["the", "a", "cat", "dog", "sat", "on", "mat", "and", "ran", "to", "see", "red", ",", "."]


def text(words: int, seed: int = 0) -> str:
    """So many words, drawn at random."""
    drawn = torch.randint(len(WORDS), (words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in drawn)


def tokenizer(end: str | None = "<eos>") -> PreTrainedTokenizerFast:
    """Bytes as tokens; no merges."""
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=letters, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end)


def model(vocabulary: int = 257, positions: int = 64, seed: int = 0) -> LlamaForCausalLM:
    """A Llama of one block."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=vocabulary - 1,
    )
    return LlamaForCausalLM(config).eval()


def loaded(seed: int = 0, **options: Any) -> Loaded:
    """What `ternq.hf.load` would give."""
    own = model(seed=seed, **options)
    return Loaded(own, tokenizer(), "tiny", "tiny", "dense", None, torch.float32)


Splits = dict[str, tuple[str, list[dict[str, Any]]]]


def hub_dataset(folder: Path, splits: Splits, config: str) -> None:
    """Write a dataset as the hub lays it out: ``{split: (file, rows)}``."""
    hub_configs(folder, {config: splits})


def hub_configs(folder: Path, configs: dict[str, Splits]) -> None:
    """The same of a dataset with several configurations."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, (name, rows) in splits.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            lines += [f"  - split: {split}", f"    path: {name}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
