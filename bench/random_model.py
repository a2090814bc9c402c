"""A packed model of any shape with random weights, to measure speed on; whatever it says is noise.

    python bench/random_model.py SmolLM2-ternary 2048x8192x24x32x32 -o big
    python bench/random_model.py SmolLM2-ternary 2048x8192x24x32x32 -o big-gguf --gguf
    python bench/generate.py big --llama llama/bin/python --gguf big-gguf/random-TQ2_0.gguf

The first argument lends configuration and tokenizer; the shape is hidden size, MLP, blocks, heads
and heads of keys and values. Layers have scale and shift for groups of 128 columns; with ``--gguf``
one scale for 256, as TQ2_0 has it. Embeddings have 8 bits a weight, those of GGUF 16 (llama.cpp's
own `llama-quantize --allow-requantize ... TQ2_0` makes less of them).
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternq import outlines
from ternq.formats import Options
from ternq.modeling_ternq import features, is_linear
from ternq.pack import pack
from ternq.source import Source
from ternq.ternary import TernaryWeight


def base(lender: Path, shape: str, folder: Path) -> dict[str, Any]:
    """Write configuration and tokenizer of the model; returns the configuration."""
    for path in lender.glob("*.json"):
        if "token" in path.name:
            shutil.copyfile(path, folder / path.name)
    config: dict[str, Any] = json.loads((lender / "config.json").read_text())
    names = ("hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads")
    config |= dict(zip(names, map(int, shape.split("x")), strict=True))
    for name in ("quantization_config", "auto_map", "head_dim"):
        config.pop(name, None)
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return config


def source(folder: Path, config: dict[str, Any], group_size: int, shift: bool) -> Source:
    """The random weights, made as they are asked for."""
    skeleton = outlines.skeleton(folder)
    inside = {n: m for n, m in skeleton.named_modules() if is_linear(m) and ".layers." in n}
    weights = {f"{name}.weight" for name in inside}
    tied = set(getattr(skeleton, "all_tied_weights_keys", {}))
    others = {
        name: (torch.bfloat16, tuple(t.shape))
        for name, t in skeleton.state_dict().items()
        if name not in weights | tied
    }
    random = torch.Generator().manual_seed(0)

    def layer(name: str) -> TernaryWeight:
        columns, rows = features(inside[name])
        groups = (rows, -(-columns // group_size))
        codes = torch.randint(-1, 2, (rows, columns), generator=random, dtype=torch.int8)
        size = columns**-0.5
        scale = (torch.rand(groups, generator=random) + 0.5).mul_(size).half()
        moved = torch.randn(groups, generator=random).mul_(0.05 * size).half() if shift else None
        return TernaryWeight(codes, scale, moved, group_size)

    def tensor(name: str) -> Tensor:
        shape = others[name][1]
        made = torch.randn(shape, generator=random) if len(shape) > 1 else torch.ones(shape)
        return made.bfloat16()

    return Source(
        name="random", base=folder, config=config, skeleton=skeleton, modules=tuple(inside),
        others=others, group_size=group_size, shift=shift, dtype=torch.bfloat16,
        layer=layer, tensor=tensor,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("lender", type=Path, help="a folder with configuration and tokenizer")
    parser.add_argument("shape", help="hidden x MLP x blocks x heads x heads of keys and values")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--gguf", action="store_true", help="TQ2_0 for llama.cpp")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = base(asked.lender, asked.shape, folder)
        if asked.gguf:
            made = source(folder, config, 256, False)
            result = pack(made, asked.out, format="gguf", options=Options(encoding="TQ2_0"))
        else:
            result = pack(source(folder, config, 128, True), asked.out, embeddings="int8")
    print(f"{asked.out}: {result['weights']['parameters']:,} parameters")


if __name__ == "__main__":
    main()
