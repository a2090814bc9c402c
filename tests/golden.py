"""The golden artefact of format version 1: numbers by formula, written once, read for ever.

`python tests/golden.py` wrote ``tests/golden/v1`` and is run again only for a new version of the
format. `tests/test_format.py` reads the folder and writes it anew, to the same bytes.
"""

import shutil
import sys
from pathlib import Path

import tiny
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ternq.artefact import write
from ternq.files import read_json
from ternq.linear import select
from ternq.modeling_ternq import features
from ternq.outlines import skeleton
from ternq.progress import ignore
from ternq.publish import write_manifest
from ternq.recipe import Scheme
from ternq.source import Source
from ternq.states import unique_state
from ternq.ternary import TernaryWeight, n_groups

FOLDER = Path(__file__).parent / "golden" / "v1"
GROUP_SIZE = 8


def numbers(rows: int, columns: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and shifts of a layer: every code, ragged groups, and no group of one value."""
    r, c = torch.arange(rows).unsqueeze(1), torch.arange(columns)
    groups = torch.arange(n_groups(columns, GROUP_SIZE))
    codes = ((r * 5 + c * c + layer) % 3 - 1).to(torch.int8)
    codes[:, ::GROUP_SIZE], codes[:, 1::GROUP_SIZE] = 1, -1
    scale = ((r + groups) % 5 + 1).half() / 8
    shift = ((r + 2 * groups + layer) % 4 - 1).half() / 16
    return codes, scale, shift


def base(folder: Path) -> LlamaForCausalLM:
    """Configuration and tokenizer of the model, and the model with dense tensors by formula."""
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=256,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        steps = torch.arange(parameter.numel()) * 37 % 101 - 50
        parameter.data = steps.view(parameter.shape) / 64
    model.config.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return model


def source(folder: Path) -> Source:
    """The model as something to pack."""
    model = base(folder)
    modules = tuple(select(model, Scheme(group_size=GROUP_SIZE)).chosen)
    others = {
        name: tensor
        for name, tensor in unique_state(model).items()
        if name.removesuffix(".weight") not in modules
    }

    def layer(name: str) -> TernaryWeight:
        columns, rows = features(model.get_submodule(name))
        return TernaryWeight(*numbers(rows, columns, modules.index(name)), GROUP_SIZE)

    return Source(
        name="golden",
        base=folder,
        config=read_json(folder / "config.json"),
        skeleton=skeleton(folder),
        modules=modules,
        others={name: (t.dtype, tuple(t.shape)) for name, t in others.items()},
        group_size=GROUP_SIZE,
        shift=True,
        dtype=torch.float32,
        layer=layer,
        tensor=others.__getitem__,
    )


def make(folder: Path) -> None:
    """Write the artefact, with 8-bit embeddings."""
    own = folder / "base"
    own.mkdir(parents=True)
    write(source(own), folder, torch.bfloat16, True, ignore)
    shutil.rmtree(own)
    write_manifest(folder, {"format": "ternq"})


if __name__ == "__main__":
    if FOLDER.exists():
        sys.exit(f"{FOLDER} is there: a published version of the format does not change")
    make(FOLDER)
