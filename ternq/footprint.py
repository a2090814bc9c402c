"""What training holds in memory at its peak, counted before anything is loaded.

Student, teacher and optimizer are built of tensors that have shapes and no memory (torch's fake
tensors), one training step runs on them by the code that trains, and every storage alive is
counted. So the count follows the code, whatever architecture, options and losses it runs; nothing
is guessed but what lies outside of torch.
"""

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ternq.corpus import HELD_OUT_TOKENS
from ternq.frozen import made_on_host
from ternq.linear import decoder_blocks
from ternq.optimize import take_step
from ternq.outlines import max_length
from ternq.perplexity import BLOCK, block_losses, rows_that_fit
from ternq.precision import products, with_products
from ternq.processes import Crew
from ternq.progress import ignore
from ternq.recipe import Scheme, Training
from ternq.student import student_of
from ternq.train import Trainer
from ternq.walk import bytes_needed

EXACT = 8  # blocks up to which all are run; of deeper models, that number and half of it


@dataclass(frozen=True)
class Footprint:
    """Bytes at the peak of training, by kind, and what they are of.

    ``weights`` of teacher and student, ``optimizer`` its states, ``step`` what a step takes beside
    them at its peak: activations, gradients, rounded weights. ``loading`` is held before some of it
    is let go of, as dense weights are that become codes; ``host`` is what another memory than the
    device's holds of all that: models as they are loaded, an optimizer that is moved there.
    ``start`` is what a start that reads text takes beside them, estimated from shapes.
    ``evaluation`` is what measuring a perplexity takes, before training and after it. ``rough``
    says why it could only be estimated from the shapes; None where it was counted.
    """

    weights: int
    optimizer: int
    step: int
    loading: int = 0
    host: int = 0
    start: int = 0
    evaluation: int = 0
    rough: str | None = None

    @property
    def total(self) -> int:
        """All of it."""
        training = self.weights + self.optimizer + self.step
        return max(self.loading + self.start, training, self.weights + self.evaluation)


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every storage alive, and answers for numbers that do not exist."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1  # what .item() gives of a tensor that has no value: true, finite, one
        found = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            # a state in 8 bits is a tensor around others, with nothing of its own
            if isinstance(leaf, Tensor) and not hasattr(leaf, "__tensor_flatten__"):
                self._count(leaf.untyped_storage())
        return found

    def _count(self, storage: Any) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def footprint(
    build: Callable[[], Any],
    scheme: Scheme,
    settings: Training,
    device: str,
    crew: Crew | None = None,
) -> Footprint:
    """Count one training step of the model that ``build`` makes, in memory of ``device``.

    Of a ``crew`` every process has its rows of the batch, and one such device; ``host`` is what all
    take together. Models of more than 8 blocks are counted with 4 and 8 of them, and the rest as
    these differ.
    """
    blocks, crew = _depth(build), crew or Crew()
    settings = _share(settings, crew.count)
    try:
        if blocks <= EXACT:
            return _counted(build, scheme, settings, device, blocks, crew)
        half, whole = (
            _counted(build, scheme, settings, device, n, crew) for n in (EXACT // 2, EXACT)
        )
    except RuntimeError as error:  # a model that looks into its tensors, say
        return roughly(build, settings, str(error).strip().partition("\n")[0])
    return _extended(half, whole, EXACT // 2, blocks - EXACT)


def _share(settings: Training, count: int) -> Training:
    """The settings of one process of so many, as far as memory goes."""
    rows = max(1, settings.batch_size // count)
    micro = min(settings.micro_batch_size or rows, rows)
    return replace(settings, batch_size=rows - rows % micro, micro_batch_size=micro)


def _extended(a: Footprint, b: Footprint, between: int, more: int) -> Footprint:
    one, two = vars(a), vars(b)
    grown = {k: two[k] + (two[k] - one[k]) * more // between for k in two if k != "rough"}
    return Footprint(**grown)


def roughly(build: Callable[[], Any], settings: Training, reason: str) -> Footprint:
    """An estimate from shapes, made at once: of float32 and AdamW, with every weight trained."""
    with torch.device("meta"):
        model = build()
    everything = sum(p.numel() for p in model.parameters())
    linear = sum(p.numel() for p in decoder_blocks(model)[1].parameters())
    config, blocks = model.config.get_text_config(), len(decoder_blocks(model)[1])
    mlp = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    tokens = (settings.micro_batch_size or settings.batch_size) * settings.sequence_length
    # a block keeps about 12 vectors of the hidden size and 4 of the MLP's; recomputed ones keep 1
    wide = 12 * config.hidden_size + 4 * mlp
    kept = config.hidden_size if settings.gradient_checkpointing else wide
    activations = 4 * tokens * (kept * blocks + wide + 3 * config.vocab_size)
    start, both = _start(model, settings), 8 * everything
    return Footprint(both, 8 * linear, 9 * linear + activations, both, start=start, rough=reason)


def _depth(build: Callable[[], Any]) -> int:
    with torch.device("meta"):
        return len(decoder_blocks(build())[1])


def _counted(
    build: Callable[[], Any],
    scheme: Scheme,
    settings: Training,
    device: str,
    blocks: int,
    crew: Crew,
) -> Footprint:
    size = settings.micro_batch_size or settings.batch_size
    few = min(settings.batch_size, 2 * size)  # the second adds to the gradients of the first
    offload = settings.offload  # what is to lie on the host is counted like everything else, here
    settings = replace(settings, batch_size=few, offload=False)
    with warnings.catch_warnings(), FakeTensorMode(), _Alive() as alive:
        warnings.filterwarnings("ignore", "Accessing the data pointer")  # by deepcopy
        teacher, twin = build(), build()  # as fake tensors are not to be copied
        for model in (teacher, twin):
            del decoder_blocks(model)[1][blocks:]
        loaded = sum(p.nbytes for p in teacher.parameters())
        student = student_of(teacher, scheme, settings, twin)[0]
        start = _start(teacher, settings)
        if settings.from_scratch and settings.objective == "ce":
            teacher = None
        del twin, model
        alive.peak = alive.now
        if teacher is not None:
            teacher.requires_grad_(False)  # autocast would keep what it makes of it
        ids = torch.zeros(settings.sequence_length, dtype=torch.int64)
        trainer = Trainer(
            student=student,
            teacher=teacher,
            blocks=repeat(ids),
            settings=settings,
            steps=1,
            folder=Path(),
            progress=ignore,
            alone=True,
        )
        typed = with_products(settings, device)[0]
        trainer.objective.autocast = products(typed, "cpu")  # where fake tensors are
        weights, loading = alive.now, alive.peak
        on_host = made_on_host(settings, device)
        # what is not made there is loaded there, one model after the other
        host = loading if on_host else 0 if device.startswith("cpu") else loaded
        for parameter in filter(lambda p: p.requires_grad, student.parameters()):
            parameter.grad = torch.zeros_like(parameter)
        take_step(trainer.optimizer, settings, seed=0, step=0, norm=0.0)  # makes its states
        trainer.optimizer.zero_grad()
        held = alive.peak = alive.now
        trainer.one_step()
        step, alive.peak, before = alive.peak - held, alive.now, alive.now
        with torch.no_grad():
            block_losses(student.eval(), _held_out(student))
        evaluation = alive.peak - before
        if crew.sharded:
            alive.peak = before
            trainer.objective.train()(ids.expand(size, -1))
            forward = alive.peak - before
    states = held - weights
    if offload:  # there lie states, and a copy of each weight that learns and of its gradient
        learns = sum(p.nbytes for p in student.parameters() if p.requires_grad)
        host, states = max(host, states + 2 * learns), 0
    found = Footprint(
        weights=weights,
        optimizer=states,
        step=step,
        loading=0 if on_host else loading,
        host=host * crew.count,
        start=start,
        evaluation=evaluation,
    )
    return _sharded(found, student, teacher, forward, crew.count) if crew.sharded else found


def _sharded(whole: Footprint, student: Any, teacher: Any, forward: int, count: int) -> Footprint:
    """The same where ``count`` processes share the parameters, block by block (FSDP 2).

    The teacher is whole everywhere, and so are codes, which are no parameters. What a step makes
    whole for a while are two blocks, one of them fetched ahead, and all that lies outside of them;
    ``forward`` is the peak of a step before there are gradients.
    """
    theirs = {id(p) for p in teacher.parameters()} if teacher is not None else set()
    own = {id(p): p.nbytes for p in student.parameters()}
    inside = [sum(p.nbytes for p in b.parameters()) for b in decoder_blocks(student)[1]]
    outside = sum(own.values()) - sum(inside)
    once = sum(size for key, size in own.items() if key in theirs)  # counted with the teacher
    gradients = sum(p.nbytes for p in student.parameters() if p.requires_grad)
    kept = whole.weights - (sum(own.values()) - once)
    step = max(forward, whole.step - gradients) + gradients // count
    return replace(
        whole,
        weights=kept + sum(own.values()) // count,
        optimizer=whole.optimizer // count,
        step=step + outside + 2 * max(inside),
        evaluation=whole.evaluation + outside + 2 * max(inside),
    )


def _start(teacher: Any, settings: Training) -> int:
    """What compensating and reconstructing one block after another take beside the models."""
    return bytes_needed(teacher, settings) if settings.calibrated else 0


def _held_out(model: Any) -> Tensor:
    """As many rows of the held-out text as are measured at once."""
    length = min(BLOCK, max_length(model))
    rows = min(rows_that_fit(model, length), max(1, HELD_OUT_TOKENS // length))
    return torch.zeros(rows, length, dtype=torch.int64)
