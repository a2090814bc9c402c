"""Ternary block by block from disk: for a model that does not fit into memory.

Each decoder block is read, rounded with its errors compensated, trained towards what the dense
block puts out, and written packed into the run (``blocks/``); memory holds one block and the
activations of the text. The dense and the ternary model read the held-out text side by side, so
that both are measured on the way. A stopped run goes on at the first block that is not finished:
activations are computed again from the finished ones, to the same bits.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ternq
from ternq import checkpoint, hf, metrics, origin, outlines, packing, processes, runs, stop
from ternq import corpus as corpora
from ternq.calibrate import Started, on, run, start_block, use
from ternq.errors import RecipeError
from ternq.files import write_json
from ternq.linear import TernaryLinear, group_rule, prepare, ternary_layers
from ternq.memory import free_memory
from ternq.modeling_ternq import features
from ternq.perplexity import BLOCK
from ternq.precision import products
from ternq.prepared import Prepared, described, refuse_own_code, text_of
from ternq.progress import Event, Progress, ignore
from ternq.recipe import Recipe, Training
from ternq.reconstruct import rows_at_once, work
from ternq.source import Source, of_stored, stored_names
from ternq.ternary import TernaryWeight
from ternq.walk import Walk

WHO = ("teacher", "untrained", "student")


@dataclass
class Streamed(Prepared):
    """What `prepare_run` found: teacher and student are skeletons, and ``walk`` reads weights."""

    walk: Walk | None = None

    @property
    def dense_model(self) -> hf.Loaded:
        """The teacher, without weights."""
        assert self.teacher is not None
        return self.teacher

    @property
    def settings(self) -> Training:
        """Those of the recipe."""
        return self.recipe.training

    @property
    def length(self) -> int:
        """Tokens in a block of the held-out text."""
        longest = min(BLOCK, outlines.max_length(self.dense_model.model))
        return min(longest, len(self.corpus.held_out))


def prepare_run(
    model: str,
    recipe: Recipe,
    *,
    teacher: str | None = None,
    device: str = "cpu",
    offline: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = ignore,
    cache: Path | None = None,
    record: dict[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> Streamed:
    """Check a dense checkpoint and open the text; nothing is held but what lies outside blocks.

    Of the held-out text as many tokens are kept as are calibrated on, since both pass through every
    block.

    Raises:
        InputError: not a folder of safetensors, damaged, or not dense.
        RecipeError: what needs the whole model: another teacher, text that it writes itself.
    """
    if teacher is not None:
        raise RecipeError("Block by block, the teacher is the model itself.", "Leave it out.")
    loaded, folder = hf.outline(model, offline=offline)
    training = recipe.training
    text, note = open_text(loaded, recipe, record, offline, progress)
    student = replace(loaded, model=outlines.skeleton(folder))
    selection = prepare(student.model, recipe.scheme, training.ste)
    walk = Walk(model, folder, device)
    progress(Event("load", "Reading the checkpoint once, to know that it is whole"))
    recipe = replace(recipe, base=walk.fingerprint(progress), version=ternq.__version__)
    notes = [*notes]
    if training.start == "closed-form":
        said = "Start: block by block it is the reconstructed one; --start closed-form is for a "
        notes.append(said + "model that fits.")
    notes += [rule] if (rule := group_rule(selection, recipe.scheme.group_size)) else []
    notes += [note] if note else []
    for said in notes:
        progress(Event("plan", said))
    return Streamed(recipe, loaded, student, selection, text, notes, recipe.base, walk=walk)


def open_text(
    loaded: hf.Loaded,
    recipe: Recipe,
    record: dict[str, Any] | None,
    offline: bool,
    progress: Progress,
) -> tuple[corpora.Corpus, str | None]:
    """The text for a model without weights, and what is to be said of it.

    Raises:
        InputError: the model brings code; the text is missing, empty or no text.
        RecipeError: text that the model would write itself.
    """
    refuse_own_code(loaded)
    training = recipe.training
    specs, note = text_of(loaded, training.data, record, offline)
    if corpora.has_own_text(specs):
        raise RecipeError(
            "Block by block the model cannot write its own text: it is never whole in memory.",
            "Name a text with --data.",
        )
    text = corpora.corpus(loaded, recipe, specs, offline=offline, progress=progress, cache=None)
    text.held_out = text.held_out[: max(2, training.calibration * training.sequence_length)]
    return text, note


def train_run(
    prepared: Streamed,
    out: Path,
    record: dict[str, Any],
    *,
    time_limit: float | None,
    progress: Progress,
) -> dict[str, Any]:
    """Make every block, or go on with the first that is not; the fields of `distill.train_run`.

    ``untrained`` is the closed form, before anything was calibrated.

    Raises:
        StoppedError, InterruptedByUser: on request, or at the time limit; the same command goes on.
    """
    processes.refuse_many("Going block by block")
    began = time.monotonic()
    before = float(record.get("seconds", 0.0))
    check = stop.Check(time_limit)
    if "student" not in record:
        maker = _Maker(prepared, out, record, check)
        for index in range(len(maker.walk.blocks)):
            check(f"Stopped before block {index + 1} of {len(maker.walk.blocks)}")
            maker.make(index)
            record["seconds"] = before + time.monotonic() - began
            write_json(out / origin.RUN_FILE, record)
            _say(record, index, len(maker.walk.blocks), progress)
        record |= {who: maker.measured(who) for who in WHO}
        record["start"] = maker.said()
        write_json(out / origin.RUN_FILE, record)
    stop.not_polled()
    return _report(prepared, out, record, time.monotonic() - began)


def source(prepared: Streamed, out: Path) -> Source:
    """What was made, tensor by tensor: layers of the run, what lies outside of the checkpoint."""
    walk = prepared.walk
    assert walk is not None
    modules = tuple(ternary_layers(prepared.student.model))
    skeleton, scheme = prepared.dense_model.model, prepared.recipe.scheme
    made: dict[str, checkpoint.TensorFolder] = {}
    for path in sorted((out / runs.BLOCKS).glob("*.safetensors")):
        made |= dict.fromkeys(tensors := checkpoint.TensorFolder(path.parent, path.name), tensors)
    ternary = stored_names(modules)
    others = {}
    for name, file in walk.names.items():
        found = made.get(name, walk.tensors)
        own = name if name in made else file
        if name not in ternary:
            others[name] = (found.dtypes[own], found.shapes[own])

    def layer(name: str) -> TernaryWeight:
        columns = features(skeleton.get_submodule(name))[0]
        stored = {part: made[part][part] for part in stored_names([name]) if part in made}
        return _weight(stored, name, columns, scheme.group_size)

    def tensor(name: str) -> Tensor:
        return made[name][name] if name in made else walk.dense(name)

    return of_stored(
        prepared.dense_model, walk.folder, out, modules, others, scheme, layer=layer, tensor=tensor
    )


def layer_diagnostics(prepared: Streamed, made: Source) -> list[dict[str, Any]]:
    """Of every ternary layer, as `ternq.weights.layer_diagnostics`, one layer at a time."""
    walk, found = prepared.walk, []
    assert walk is not None
    for name, weight in made.layers():
        wanted = walk.dense(f"{name}.weight").float()
        wanted = wanted.t() if name in made.transposed else wanted
        norm = float(wanted.norm())
        zeros = 1 - int(weight.codes.count_nonzero()) / weight.codes.numel()
        error = float((wanted - weight.dequantized()).norm()) / norm if norm else None
        found.append({"name": name, "zero_share": zeros, "error": error})
    return found


def fits(loaded_bytes: int, device: str) -> bool:
    """Whether a packed model of so many bytes can be loaded: its tables grow to float32."""
    return 3 * loaded_bytes < free_memory(torch.device(device))


# --- one block after another ----------------------------------------------------------------------


class _Maker:
    """The streams of activations, between one block and the next."""

    def __init__(
        self, prepared: Streamed, out: Path, record: dict[str, Any], check: Callable[..., None]
    ) -> None:
        assert prepared.walk is not None
        self.prepared, self.walk, self.out, self.record = prepared, prepared.walk, out, record
        self.check, self.settings = check, prepared.settings
        self.names = list(ternary_layers(prepared.student.model))
        self.ids = torch.stack(list(islice(prepared.corpus.blocks, self.settings.calibration)))
        rows = prepared.length
        held = prepared.corpus.held_out
        self.held = held[: len(held) // rows * rows].view(-1, rows)
        self.calls = self.walk.calls(self.ids, rows_at_once(self.settings))
        self.held_calls = self.walk.calls(self.held, 1)
        self.dense = self.own = [call.hidden for call in self.calls[0]]
        self.streams = {who: [call.hidden for call in self.held_calls[0]] for who in WHO}
        self.autocast = products(self.settings, self.walk.device)

    def make(self, index: int) -> None:
        """One block: the dense one first, then what becomes of it, then what it puts out."""
        block, settings = self.walk.block(index), self.settings
        calls, self.calls[index] = self.calls[index], []
        held, self.held_calls[index] = self.held_calls[index], []
        self._pass_on("teacher", block, held)
        self.dense = run(block, on(calls, self.dense), self.autocast)
        layers = put_in(block, self.walk.within(index), self.names, self.prepared.recipe)
        self._pass_on("untrained", block, held)
        now = on(calls, self.own)
        path = self.out / runs.BLOCKS / f"{index:05d}.safetensors"
        finished = self.record.setdefault("blocks", [])
        if index >= len(finished):
            done, seed = Started(), self.prepared.recipe.seed + index
            self.own = start_block(
                block, layers, now, done, self.autocast, self.dense,
                settings=settings, seed=seed, check=self.check,
            )  # fmt: skip
            path.parent.mkdir(exist_ok=True)
            checkpoint.save_tensors(_stored(block, self.walk.within(index), layers), path)
            finished.append(vars(done))
        else:
            _put_back(checkpoint.load_tensors(path), block, self.walk.within(index), layers)
            self.own = run(block, now, self.autocast)
        self._pass_on("student", block, held)

    def measured(self, who: str) -> dict[str, Any]:
        """The perplexity of the dense, the closed-form or the finished model."""
        losses = self.walk.losses(self.held, self.streams[who])
        return described(
            self.prepared,
            {
                "token_perplexity": float(losses.mean().exp()),
                "blocks": len(self.held),
                "block_length": self.held.shape[1],
                "tokens": self.held.numel(),
            },
        )

    def said(self) -> list[str]:
        """What was done, in sentences."""
        whole = Started()
        for found in self.record["blocks"]:
            whole.add_all(Started(**found))
        return whole.said(self.ids)

    def _pass_on(self, who: str, block: nn.Module, calls: Any) -> None:
        plain: AbstractContextManager[Any] = nullcontext()
        self.streams[who] = run(block, on(calls, self.streams[who]), plain)


def put_in(
    block: nn.Module, prefix: str, names: Iterable[str], recipe: Recipe
) -> dict[str, TernaryLinear]:
    """Ternary layers in the place of a block's own, at their closed form; by full name."""
    found = {}
    for name in names:
        if name.startswith(prefix):
            own = name.removeprefix(prefix)
            layer = block.get_submodule(own)
            found[name] = TernaryLinear.from_dense(layer, recipe.scheme, recipe.training.ste)
            block.set_submodule(own, found[name])
    return found


def _stored(block: nn.Module, prefix: str, layers: dict[str, TernaryLinear]) -> dict[str, Tensor]:
    """A finished block by full names: packed codes, scales, shifts; all else as it was learned."""
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        numbers = layer.numbers()
        found[f"{name}.weight"] = packing.pack_base3(numbers.codes)
        found[f"{name}.weight_scale"] = numbers.scale
        if numbers.shift is not None:
            found[f"{name}.weight_shift"] = numbers.shift
    state = {f"{prefix}{name}": tensor for name, tensor in block.state_dict().items()}
    return found | {name: state[name] for name in state.keys() - found.keys()}


def _put_back(
    stored: dict[str, Tensor], block: nn.Module, prefix: str, layers: dict[str, TernaryLinear]
) -> None:
    """Make a block what it was when it was stored."""
    for name, layer in layers.items():
        use(layer, _weight(stored, name, layer.in_features, layer.group_size).dequantized())
    parts = stored_names(layers)
    state = block.state_dict()
    for name in stored.keys() - parts:
        state[name.removeprefix(prefix)].copy_(stored[name])


def _weight(stored: dict[str, Tensor], name: str, columns: int, group_size: int) -> TernaryWeight:
    codes = packing.unpack_base3(stored[f"{name}.weight"], columns, check=True)
    shift = stored.get(f"{name}.weight_shift")
    return TernaryWeight(codes, stored[f"{name}.weight_scale"], shift, group_size)


# --- what is said of it ---------------------------------------------------------------------------


def _say(record: dict[str, Any], index: int, total: int, progress: Progress) -> None:
    distances = record["blocks"][index]["distances"]
    values = {"distance": min(distances[0])} if distances else {}
    progress(Event("reconstruct", done=index + 1, total=total, values=values))


def _report(
    prepared: Streamed, out: Path, record: dict[str, Any], seconds: float
) -> dict[str, Any]:
    settings, recipe = prepared.settings, prepared.recipe
    pairs = [pair for block in record["blocks"] for pair in block["distances"]]
    pairs = [(before, min(before, after)) for before, after in pairs]  # else it was put back
    metrics.drop_later(out, 0)
    for index, (_, after) in enumerate(pairs, 1):
        metrics.append(out, {"step": index, "loss": after})
    means = [sum(side) / len(pairs) for side in zip(*pairs, strict=True)] if pairs else [None, None]
    steps, tokens = work(settings)
    made = replace(recipe, training=replace(settings, data=prepared.corpus.specs))
    return {
        "model": recipe.model,
        **{who: record[who] for who in WHO},
        "recipe": made.to_json(),
        "training": {
            "steps": steps,
            "tokens": tokens,
            "tokens_per_second": tokens / record["seconds"] if pairs else None,
            "loss_first": means[0],
            "loss_last": means[1],
            "seconds": record["seconds"],
        },
        "dense_layers": [vars(d) for d in prepared.selection.dense],
        "notes": prepared.notes
        + record["start"]
        + ["Untrained is the closed form, before calibration; a step is one of each block."],
        "seconds": seconds,
    }
