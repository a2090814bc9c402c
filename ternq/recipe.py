"""What a ternary model is (`Scheme`) and how it is made (`Training`): frozen, checked, JSON.

Each number lives here once: its type, default, help text, command-line flag and JSON key come from
one field. The scheme travels in ``config.json``, since it is needed to read a layer; the training
part lies beside the result and is never needed to load it. Standard library only, so that
``ternq --help`` costs nothing.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from ternq.errors import RecipeError

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent / "demo"
DEMO_STEPS = "TERNQ_DEMO_STEPS"  # shortens the demo; documented in the README
Ste = Literal["identity", "ttq"]
Start = Literal["closed-form", "compensated", "reconstructed"]
Train = Literal["all", "scales", "low-rank"]
Optimizer = Literal["adamw", "adamw-8bit"]
Latent = Literal["float32", "bfloat16"]
Dtype = Literal["float32", "bfloat16"]
TeacherDtype = Literal["float32", "bfloat16", "int8"]
Method = Literal["dlt", "rtn", "gptq", "absmean", "twn", "pt2", "billm", "float"]
BASELINES = ("rtn", "gptq", "absmean", "twn", "pt2", "billm")  # ternarize only rounds by them
NOT_TERNARY = ("rtn", "gptq", "billm")  # those of them that make other layers than ternary ones
CALIBRATED = ("gptq", "pt2", "billm")  # those of them that look at a layer's inputs
BITS = (2, 3, 4, 8)
Grid = Literal["minmax", "mse", "fit"]
USUAL_LR = 1e-3  # moves codes far from where they are: for a start that is poor
GENTLE_LR = 1e-4  # for codes that fit already, which the usual rate would undo first
LARGEST_SEED = 2**32 - 1  # NumPy's, by which lm-eval draws
_LARGEST = 10**12  # of any count: beyond all use, and still a number that can be worked with
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"start": "compensated", "calibration": 32, "tokens": 100_000},
    "balanced": {"start": "reconstructed", "calibration": 64, "reconstruction_epochs": 5,
                 "train": "scales", "tokens": 300_000},
    "best": {"start": "reconstructed", "calibration": 512, "reconstruction_epochs": 2,
             "train": "scales", "tokens": 1_000_000},
}  # fmt: skip
Objective = Literal["distill", "ce"]
Schedule = Literal["linear", "cosine"]
Part = TypeVar("Part", "Scheme", "Training")


def option(default: Any, help: str, *, hidden: bool = False, off: str | None = None) -> Any:
    """A dataclass field that is also a command-line option; ``off`` is what turns it off."""
    return field(default=default, metadata={"help": help, "hidden": hidden, "off": off})


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Ternary layers"""

    group_size: int = option(128, "Input columns that share one scale and shift.")
    shift: bool = option(True, "Learn a shift beside the scale (DLT), or none.")
    skip: tuple[str, ...] = option((), "Linear layers to leave dense, as a glob.")
    method: Method = option("dlt", "dlt, rtn, gptq, absmean, twn, pt2 or billm.")
    bits: int | None = option(None, "Of rtn and gptq: 2, 3, 4 or 8. [default: 2]", hidden=True)
    symmetric: bool = option(
        False, "Of rtn and gptq: levels around 0, no zero point.", hidden=True, off="--asymmetric"
    )

    grid: Grid = option(
        "minmax", "Levels of rtn and gptq: the ends, shrunk ends, or fitted.", hidden=True
    )

    def __post_init__(self) -> None:
        self._check_grid()
        if self.group_size < 1:
            raise RecipeError(
                f"--group-size is {self.group_size}; a group has at least one column.",
                "The default is 128.",
            )

    def _check_grid(self) -> None:
        given = {"bits": self.bits, "symmetric": self.symmetric, "grid": self.grid != "minmax"}
        one = next((flag(name) for name, value in given.items() if value not in (None, False)), "")
        if one and self.method not in ("rtn", "gptq"):
            raise RecipeError(f"{one} is of --method rtn and gptq, not of {self.method}.")
        if self.bits is not None and self.bits not in BITS:
            raise RecipeError(f"--bits is {self.bits}; it is 2, 3, 4 or 8.")
        if self.method == "pt2" and not self.shift:
            raise RecipeError("--method pt2 has a shift; --no-shift is of --method dlt.")


@dataclass(frozen=True, kw_only=True)
class Training:
    """Training"""

    tokens: int | None = option(None, "Tokens to train on. [default: what fits in two hours]")
    steps: int | None = option(None, "Optimizer steps, instead of --tokens.")
    data: tuple[str, ...] = option((), "Hub dataset, text file, folder, 'self'; NAME=WEIGHT.")
    batch_size: int = option(4, "Blocks of text in one optimizer step.")
    micro_batch_size: int | None = option(None, "Blocks at once; the rest is accumulated.")
    sequence_length: int = option(256, "Tokens in a block.")
    lr: float | None = option(None, "Peak learning rate of the weights. [default: 1e-3 or 1e-4]")
    scale_lr: float | None = option(None, "Peak rate of scales and shifts. [default: --lr]")
    warmup: float = option(0.05, "Share of the steps spent warming up.")
    weight_decay: float = option(0.0, "AdamW's decay, on the linear weights.")
    clip: float = option(1.0, "Largest global norm of the gradient.")
    off: float = option(10.0, "Weight of OFF, the feature cosine loss.")
    kl: float = option(1.0, "Weight of the divergence from the teacher's logits.")
    ce: float = option(0.0, "Weight of the next-token cross-entropy.")
    ste: Ste = option("identity", "Gradient of the rounding: identity, or scale outside the zone.")
    start: Start | None = option(
        None,
        "First codes: by threshold, errors compensated, or blocks trained as well. "
        "[default: reconstructed]",
    )
    calibration: int = option(64, "Blocks of text for a start that is not the closed form.")
    reconstruction_epochs: int = option(5, "Passes over that text in which a block is trained.")
    reconstruction_lr: float = option(1e-3, "Peak learning rate of a block trained by itself.")
    reconstruction_softened: float = option(
        0.0, "Share of a block's steps with CAT-Q's softened rounding, which hardens."
    )
    block_by_block: bool = option(
        False, "Only compensate and reconstruct, one block at a time from disk, in little memory."
    )
    gradient_checkpointing: bool = option(False, "Recompute activations to save memory.")
    dtype: Dtype | None = option(
        None, "Products of training. [default: bfloat16 where the device makes them]"
    )
    teacher_dtype: TeacherDtype = option("float32", "What the teacher's weights are held in.")
    cache_teacher: bool = option(False, "Run the teacher once, and keep its output on disk.")
    checkpoint_minutes: float = option(10.0, "Minutes between checkpoints.")
    train: Train = option("all", "What learns: all, scales and shifts only, or an adapter too.")
    rank: int = option(32, "Rank of the adapter of --train low-rank.")
    optimizer: Optimizer = option("adamw", "AdamW, or AdamW with states in 8 bits (torchao).")
    latent: Latent = option("float32", "Latent weights: float32, or bfloat16 (torchao).")
    offload: bool = option(False, "Optimizer states in the host's memory (CUDA, torchao).")
    keep_checkpoints: int = option(2, "Checkpoints that are kept.")
    retreats: int = option(0, "Times to go back when training diverges, each with half the rate.")
    objective: Objective = option("distill", "Learn from a teacher, or from text alone (ce).")
    from_scratch: bool = option(False, "Draw the weights; MODEL gives only its configuration.")
    schedule: Schedule = option("linear", "How the rate decays after warm-up.")
    lr_second: float | None = option(None, "Peak rate from half of the steps on. [default: --lr]")
    decay_until: float = option(1.0, "Share of the steps after which weight decay ends.")

    def __post_init__(self) -> None:
        if self.tokens is not None and self.steps is not None:
            raise RecipeError("--tokens and --steps were both given.", "Name one of them.")
        counts = ("batch_size", "micro_batch_size", "sequence_length", "calibration", "rank")
        for name in (*counts, "keep_checkpoints"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{flag(name)} is {value}; it is at least 1.")
        many = ("tokens", "steps", "retreats", "reconstruction_epochs")
        for name in many:
            if (getattr(self, name) or 0) < 0:
                raise RecipeError(f"{flag(name)} is negative.")
        for name in (*counts, "keep_checkpoints", *many):
            if (getattr(self, name) or 0) > _LARGEST:
                raise RecipeError(f"{flag(name)} is too large; it is at most {_LARGEST:,}.")
        rates = ("lr", "lr_second", "scale_lr", "reconstruction_lr")
        shares = ("warmup", "weight_decay", "clip", "off", "kl", "ce", "decay_until")
        for name in (*rates, *shares, "checkpoint_minutes"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise RecipeError(f"{flag(name)} is {value}; it is a finite number, at least 0.")
        if self.sequence_length < 2:
            raise RecipeError("--sequence-length is 1; predicting needs at least 2 tokens.")
        self._check_schedule()
        if self.objective == "ce":
            self._only_cross_entropy()
        if self.off == self.kl == self.ce == 0:
            raise RecipeError("--off, --kl and --ce are all 0.", "Nothing would be learned.")
        if self.cache_teacher and self.retreats:
            raise RecipeError(
                "--retreats reads on in the text, of which --cache-teacher keeps no more than "
                "the steps need.",
                "Leave one of them out.",
            )
        if self.cache_teacher and self.off == self.kl == 0:
            raise RecipeError(
                "--cache-teacher with --off 0 and --kl 0: nothing needs a teacher.",
                "Leave --cache-teacher out.",
            )
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise RecipeError(
                f"--micro-batch-size {self.micro_batch_size} does not divide "
                f"--batch-size {self.batch_size}."
            )
        if self.train != "all" and self.latent != "float32":
            raise RecipeError(
                f"--latent {self.latent} is for weights that learn; --train {self.train} "
                "freezes them, in one byte each.",
                "Leave --latent out.",
            )

    @property
    def calibrated(self) -> bool:
        """Whether the first codes take text to be found."""
        return self.start in ("compensated", "reconstructed")

    @property
    def passes(self) -> int:
        """Passes over the text of the start in which a block is trained."""
        untrained = ("compensated",) if self.block_by_block else ("compensated", "closed-form")
        return 0 if self.start in untrained else self.reconstruction_epochs

    @property
    def peak_lr(self) -> float:
        """``lr``, or what suits the start."""
        return self.lr if self.lr is not None else self.usual_lr()

    def usual_lr(self, ternary: bool = False) -> float:
        """The rate for a start, or for a model that is ``ternary``; frozen codes stay anyhow."""
        fitting = not self.from_scratch and (ternary or self.start == "reconstructed")
        return GENTLE_LR if fitting and self.train == "all" else USUAL_LR

    def _check_schedule(self) -> None:
        for name in ("warmup", "decay_until", "reconstruction_softened"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"{flag(name)} is {getattr(self, name)}; it is a share, 0 to 1.")
        if self.lr_second is not None and self.lr == 0:
            raise RecipeError("--lr-second is a second peak of a rate that --lr 0 switches off.")

    def _only_cross_entropy(self) -> None:
        """Take the teacher's terms out, unless they were asked for by other than their defaults."""
        usual = defaults(Training)
        if self.teacher_dtype != "float32":
            raise RecipeError(
                f"--objective ce has no teacher that --teacher-dtype {self.teacher_dtype} is of.",
                "Leave --teacher-dtype out.",
            )
        for name in ("off", "kl"):
            if getattr(self, name) not in (0, usual[name]):
                raise RecipeError(
                    f"--objective ce learns from text alone; {flag(name)} {getattr(self, name):g} "
                    "is a term of the teacher.",
                    f"Leave {flag(name)} out, or --objective.",
                )
            object.__setattr__(self, name, 0.0)
        object.__setattr__(self, "ce", self.ce or 1.0)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one model was made. ``base`` is a fingerprint of the weights trained from."""

    model: str
    scheme: Scheme = Scheme()
    training: Training = Training()
    seed: int = 0
    base: str = ""
    version: str = ""

    @property
    def only_rounds(self) -> bool:
        """Whether it is a baseline's, see `untrained`."""
        rounds = self.scheme.method in BASELINES and self.training.steps == 0
        return rounds and not self.training.from_scratch

    def to_json(self) -> dict[str, Any]:
        """Plain values, lists for tuples."""
        return {k: _plain(v) for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Recipe":
        """The inverse of `to_json`; unknown keys and wrong types are a `RecipeError`."""
        if not isinstance(data, Mapping) or not _is_seed(data.get("seed", 0)):
            raise RecipeError(
                "Not a recipe: an object with a model, a scheme, a training and a seed, which is "
                f"0 to {LARGEST_SEED:,}."
            )
        parts = dict(data)
        unknown = set(parts) - {f.name for f in fields(cls)}
        if unknown or not isinstance(parts.get("model"), str):
            raise RecipeError(
                f"Not a recipe: {'unknown key ' + sorted(unknown)[0] if unknown else 'no model'}."
            )
        parts["scheme"] = from_mapping(Scheme, parts.get("scheme", {}))
        parts["training"] = from_mapping(Training, parts.get("training", {}))
        return cls(**parts)

    def differences(self, other: "Recipe") -> list[str]:
        """What differs in the other recipe and in what is computed, a sentence each."""
        mine, theirs = _flat(self.to_json()), _flat(other.to_json())
        return [
            f"{key}: {theirs.get(key)} there, {mine[key]} here"
            for key in mine
            if mine[key] != theirs.get(key) and key not in _NOT_COMPARED
        ]


# When checkpoints are written, and how many are kept, does not change what is computed.
_NOT_COMPARED = {
    "training.checkpoint_minutes",
    "training.keep_checkpoints",
    "model",
    "version",
}


def default_recipe(model: str) -> Recipe:
    """The recipe that flags change: the defaults, and for ``demo`` the settings shipped with it."""
    if model != DEMO:
        return Recipe(model=model)
    settings = json.loads((DEMO_FOLDER / "recipe.json").read_text(encoding="utf-8"))
    if (steps := demo_steps()) is not None:
        settings["steps"] = steps
    return Recipe(model=model, training=from_mapping(Training, settings))


def demo_steps() -> int | None:
    """The steps that a shortened demo is trained for; None where it is not shortened."""
    steps = os.environ.get(DEMO_STEPS)
    if not steps:
        return None
    if not steps.isdecimal():
        raise RecipeError(f"{DEMO_STEPS} is '{steps}'; it is a number of steps.")
    return int(steps)


def with_start(recipe: Recipe, ternary: bool) -> Training:
    """The training with a start, where none was asked for.

    A dense model is reconstructed before DLT trains it; one that is ``ternary`` keeps its codes.
    """
    training = recipe.training
    if training.start is not None:
        return training
    dense = recipe.scheme.method == "dlt" and not training.from_scratch and not ternary
    return replace(training, start="reconstructed" if dense else "closed-form")


def with_rate(training: Training, ternary: bool) -> Training:
    """The training with a rate that suits its start, where none was asked for."""
    if training.lr is not None:
        return training
    return replace(training, lr=training.usual_lr(ternary))


_LOSS = ("lr", "lr_second", "scale_lr", "off", "kl", "ce", "optimizer", "retreats")
_END_TO_END = (
    *_LOSS, "train", "latent", "offload", "objective", "cache_teacher", "teacher_dtype",
    "gradient_checkpointing", "checkpoint_minutes", "keep_checkpoints",
)  # fmt: skip
_BLOCKS = ("reconstruction_epochs", "reconstruction_lr", "reconstruction_softened")
_STEPS = ("warmup", "schedule", "weight_decay", "decay_until", "clip", "ste")  # of blocks, too


def idle(recipe: Recipe) -> list[str]:
    """The settings other than usual that nothing reads, a sentence each; the start is chosen."""
    training, method = recipe.training, recipe.scheme.method
    unread: dict[str, str] = {}
    if recipe.only_rounds:
        names = (*_END_TO_END, *_BLOCKS, *_STEPS, "start", "rank")
        unread |= dict.fromkeys(names, f"--method {method} only rounds")
    elif training.block_by_block:
        unread |= dict.fromkeys(("tokens", "steps", *_END_TO_END), "nothing is trained end to end")
    elif 0 in (training.tokens, training.steps):
        unread |= dict.fromkeys(_LOSS, "nothing is trained end to end")
    if not training.passes and training.start != "reconstructed":
        unread |= dict.fromkeys(_BLOCKS, "no block is trained by itself")
    if not (training.calibrated or training.block_by_block or method in CALIBRATED):
        unread["calibration"] = "no text is read before training"
    if training.block_by_block and training.passes:
        unread["batch_size"] = "a block is trained on one block of text a step"
    if training.train == "scales" and not training.passes:
        unread |= dict.fromkeys(("ste", "weight_decay"), "no weight learns")
    if training.train == "scales" and training.scale_lr is not None:
        unread["lr"] = "scales and shifts, which alone learn, have --scale-lr"
    if training.train != "low-rank":
        unread["rank"] = "there is no adapter"
    if not training.weight_decay:
        unread["decay_until"] = "there is no weight decay"
    usual = defaults(Training) | {"lr": training.usual_lr(), "start": "closed-form"}
    if training.objective == "ce":
        usual |= {"off": 0.0, "kl": 0.0, "ce": 1.0}  # as it sets them
    given = {name: getattr(training, name) for name in usual if name in unread}
    return [
        f"{flag(name)}{'' if value is True else f' {value}'} changes nothing: {unread[name]}."
        for name, value in given.items()
        if value not in (None, usual[name])
    ]


def refuse_scratch(recipe: Recipe) -> None:
    """`RecipeError` for `ternarize`, which compares with the model that it is given."""
    if recipe.training.from_scratch or recipe.scheme.method == "float":
        raise RecipeError(
            "ternarize makes a trained model ternary; a model from scratch is ternq distill's.",
            "ternq distill MODEL --from-scratch --objective ce -o RUN, then ternq pack RUN",
        )


def untrained(recipe: Recipe) -> Recipe:
    """The recipe as `ternarize` takes it: a baseline has no steps of training.

    Raises:
        RecipeError: it asks for some.
    """
    method, training = recipe.scheme.method, recipe.training
    if method not in BASELINES:
        return recipe
    if training.tokens or training.steps:
        one = "--tokens" if training.tokens else "--steps"
        other = ", or ternq distill --from-scratch" if method == "absmean" else ""
        raise RecipeError(
            f"--method {method} only rounds: there is nothing for {one} to train.",
            f"Leave it out, or take --method dlt{other}.",
        )
    return replace(recipe, training=replace(training, tokens=None, steps=0))


def refuse_untrained(recipe: Recipe) -> None:
    """`RecipeError` for `distill` where method or strategy leave no student to train."""
    if recipe.training.block_by_block:
        raise RecipeError(
            "--block-by-block leaves no student that could be trained on.",
            "ternq ternarize makes the packed model so.",
        )
    method = recipe.scheme.method
    if method in BASELINES and method != "absmean":
        raise RecipeError(
            f"--method {method} only rounds: there is nothing to train.",
            f"ternq ternarize MODEL --method {method} makes the model.",
        )


def refuse_preset(recipe: Recipe, preset: str) -> None:
    """`RecipeError` where there is no start and no training for a preset to choose."""
    method, scratch = recipe.scheme.method, recipe.training.from_scratch
    if preset != "auto" and (scratch or method != "dlt"):
        one = "--from-scratch" if scratch else f"--method {method}"
        raise RecipeError(
            f"--preset {preset} says how a trained model is started and trained by DLT; with {one} "
            "there is no such choice.",
            "Leave --preset out.",
        )


def display_name(model: str) -> str:
    """The last part of a hub id or path, without ``.gguf``; default outputs are named after it.

    >>> display_name("meta-llama/Meta-Llama-3-8B")
    'Meta-Llama-3-8B'
    """
    path = Path(model)
    name = (path.resolve() if path.exists() else path).name
    return name.removesuffix(".gguf")


def _is_seed(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_SEED


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def from_mapping(part: type[Part], data: Mapping[str, Any]) -> Part:
    """Build a `Scheme` or `Training` from JSON, checking names and types."""
    if not isinstance(data, Mapping):
        raise RecipeError(f"Not a recipe: its {part.__name__.lower()} is no object.")
    hints = get_type_hints(part)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        known = ", ".join(sorted(hints))
        raise RecipeError(f"Unknown setting '{unknown[0]}'.", f"Known: {known}.")
    values: dict[str, Any] = {}
    for name, value in data.items():
        value = tuple(value) if isinstance(value, list) else value
        if not _fits(value, hints[name]):
            raise RecipeError(f"Setting '{name}' is {value!r}, which is not {hints[name]}.")
        values[name] = value
    return part(**values)


def merge(part: Part, overrides: Mapping[str, Any]) -> Part:
    """The same settings with those of ``overrides`` that are not None put in their place."""
    return replace(part, **{k: v for k, v in overrides.items() if v is not None})


def defaults(part: type[Any]) -> dict[str, Any]:
    """Name -> default of every field."""
    return {f.name: f.default for f in fields(part) if f.default is not MISSING}


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return value in get_args(hint)
    if origin is tuple:
        return isinstance(value, tuple) and all(isinstance(v, str) for v in value)
    if origin is not None:  # X | None
        return any(_fits(value, a) for a in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
