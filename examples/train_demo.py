"""Train the small language model that ships inside ternq (``ternq ternarize demo``).

The text is what every Python installation carries: the sources of the standard library and the
language reference in ``pydoc_data``. It is split *by module* into training, development and
held-out text, by the SHA-256 of the module's path, so that the split depends on nothing else.
Left out are test suites (not every installation has them), the generated tables of ``encodings``
and anything that pip installed.

    python examples/train_demo.py --out build/demo

writes a Hugging Face folder (Llama architecture, bf16 safetensors, byte-level BPE tokenizer), the
three texts as ``*.jsonl.xz`` and ``training.json`` with the held-out loss during training. About an
hour on two CPU cores; killed, it goes on from its last checkpoint. Needs torch and transformers.
"""

import argparse
import hashlib
import json
import lzma
import math
import os
import platform
import sysconfig
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EXCLUDED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
EXCLUDED |= {"encodings", "ensurepip"}
HELD_OUT_BYTES, DEV_BYTES, TRAIN_SAMPLE_BYTES = 200_000, 100_000, 2_000_000
LARGEST_HELD_OUT_MODULE = 60_000  # bytes: no single module dominates the held-out text
END = "<|endoftext|>"
SCHEDULE = 2000  # steps of the cosine that annealing leaves


def modules() -> list[dict[str, str]]:
    """The standard library's modules as ``{"source": path, "text": source}``, in hash order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, names, files in os.walk(root):
        names[:] = sorted(n for n in names if n not in EXCLUDED and not n.startswith("config-"))
        for name in sorted(files):
            if not name.endswith(".py") or name.startswith("_sysconfigdata"):
                continue
            path = Path(folder, name)
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                found.append({"source": path.relative_to(root).as_posix(), "text": text})
    return sorted(found, key=lambda m: hashlib.sha256(m["source"].encode()).hexdigest())


def take(docs: list[dict[str, str]], size: int, largest: int) -> tuple[list, list]:
    """The first documents that make up ``size`` bytes, none above ``largest``; and the others."""
    taken, rest, total = [], [], 0
    for doc in docs:
        length = len(doc["text"].encode())
        if total < size and length <= largest:
            taken.append(doc)
            total += length
        else:
            rest.append(doc)
    return taken, rest


def write_texts(out: Path) -> dict[str, list[dict[str, str]]]:
    """Split the modules, and write the parts that the package ships."""
    held_out, rest = take(modules(), HELD_OUT_BYTES, LARGEST_HELD_OUT_MODULE)
    dev, train = take(rest, DEV_BYTES, LARGEST_HELD_OUT_MODULE)
    sample, _ = take(train, TRAIN_SAMPLE_BYTES, LARGEST_HELD_OUT_MODULE)
    for name, docs in (("heldout", held_out), ("dev", dev), ("train", sample)):
        lines = "".join(json.dumps(doc, ensure_ascii=False) + "\n" for doc in docs)
        data = lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME)
        (out / f"{name}.jsonl.xz").write_bytes(data)
    return {"train": train, "heldout": held_out, "dev": dev}


def train_tokenizer(docs: list[dict[str, str]], vocab: int, out: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the training text alone."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((d["text"] for d in docs), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END)
    tokenizer.save_pretrained(out)
    return tokenizer


def tokens(tokenizer: PreTrainedTokenizerFast, docs: list[dict[str, str]]) -> torch.Tensor:
    """All documents one after the other, each begun by the end-of-text token: int64 ``[n]``."""
    ids: list[int] = []
    for doc in docs:
        ids.append(tokenizer.eos_token_id)
        ids += tokenizer(doc["text"])["input_ids"]
    return torch.tensor(ids)


@torch.no_grad()
def bits_per_byte(model: torch.nn.Module, ids: torch.Tensor, n_bytes: int, length: int) -> float:
    """Mean over non-overlapping blocks, each predicted without what stood before it."""
    model.eval()
    blocks = ids[: len(ids) // length * length].view(-1, length)
    losses = [model(input_ids=b, labels=b).loss.item() for b in blocks.split(8)]
    weights = [len(b) for b in blocks.split(8)]
    model.train()
    mean = sum(a * b for a, b in zip(losses, weights, strict=True)) / sum(weights)
    return mean / math.log(2) * len(ids) / n_bytes


def rate(step: int, steps: int, anneal_at: int | None) -> float:
    """Warm-up over 100 steps, then a cosine to 0.

    Annealing begins a shorter cosine, from the rate then reached to 0 at ``steps``, where the first
    one was drawn for ``SCHEDULE`` steps: the rate stays high for long, and the end is known late.
    """
    if anneal_at is None or step < anneal_at:
        over = steps if anneal_at is None else SCHEDULE
        return min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / over))
    share = (step - anneal_at) / (steps - anneal_at)
    return rate(anneal_at - 1, steps, anneal_at) * 0.5 * (1 + math.cos(math.pi * share))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--anneal-at", type=int, default=500, help="step where the rate comes down")
    parser.add_argument("--batch", type=int, default=8, help="blocks a step")
    parser.add_argument("--length", type=int, default=1024, help="tokens a block")
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--mlp", type=int, default=640)
    parser.add_argument("--lr", type=float, default=8e-3)
    parser.add_argument("--stop-at", type=int, default=None, help="stop at this step (for trials)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    texts = write_texts(args.out)
    tokenizer = train_tokenizer(texts["train"], args.vocab, args.out)
    train_ids, dev_ids, held_ids = (
        tokens(tokenizer, texts[k]) for k in ("train", "dev", "heldout")
    )
    n_bytes = {k: sum(len(d["text"].encode()) for d in v) for k, v in texts.items()}
    print({k: (len(v), n_bytes[k]) for k, v in texts.items()}, len(train_ids), flush=True)

    config = LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.mlp,
        num_hidden_layers=args.layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=args.length, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(
            o,
            lambda s: rate(s, args.steps, args.anneal_at),
        )
        for o in optimizers
    ]
    history, start = [], 0
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for scheduler in schedulers:
            scheduler.last_epoch = state["step"]
        history, start = state["history"], state["step"]

    began = time.time()
    for step in range(start, args.steps):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        at = torch.randint(len(train_ids) - args.length, (args.batch,), generator=generator)
        batch = torch.stack([train_ids[i : i + args.length] for i in at.tolist()])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        done = step + 1
        if done % 20 == 0:
            speed = (done - start) * batch.numel() / (time.time() - began)
            print(f"step {done}/{args.steps} loss {loss.item():.4f} {speed:.0f} tok/s", flush=True)
        if done % max(1, args.steps // 10) == 0 or done in (args.steps, args.stop_at):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                bpb = bits_per_byte(model, dev_ids, n_bytes["dev"], args.length)
                held = bits_per_byte(model, held_ids, n_bytes["heldout"], args.length)
            history.append({"step": done, "dev_bits_per_byte": bpb, "heldout_bits_per_byte": held})
            print(history[-1], flush=True)
            torch.save(
                {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                 "step": done, "history": history}, checkpoint,
            )  # fmt: skip
        if done == args.stop_at:
            return

    # The one rounding to bf16 happens here, so that what is measured is what ships.
    model.to(torch.bfloat16).save_pretrained(args.out)
    weights = load_file(args.out / "model.safetensors")
    save_file(weights, args.out / "model.safetensors", metadata={"format": "pt"})
    final = bits_per_byte(model.float(), held_ids, n_bytes["heldout"], args.length)
    record = {
        "heldout_bits_per_byte": final, "history": history, "steps": args.steps,
        "tokens": args.steps * args.batch * args.length, "seed": args.seed, "lr": args.lr,
        "bytes": n_bytes, "train_tokens": len(train_ids), "python": platform.python_version(),
        "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(record)


if __name__ == "__main__":
    main()
