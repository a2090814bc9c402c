"""A dense checkpoint on disk, walked one decoder block at a time.

The model is a skeleton without memory. What lies outside its blocks is small and is read at once,
but for the two tables: of the input embedding only the rows of the ids at hand are read, and the
output head goes by in parts. A block is read when it is wanted, and is gone when its reader lets go
of it. What comes before and after the blocks is the model's own code: it runs with blocks that hand
on what they get (`ternq.blocks.Passing`), so that no architecture is named here.
"""

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ternq import checkpoint, outlines
from ternq.blocks import Call, Passing, calls_of
from ternq.errors import InputError
from ternq.linear import decoder_blocks
from ternq.modeling_ternq import features, is_linear
from ternq.progress import Event, Progress, ignore
from ternq.recipe import Training

TOKENS_AT_ONCE = 512  # whose logits are held at once
_ROWS = 8192  # of a table that are held in float32 at once


class Walk:
    """The model in ``folder``, of which ``source`` is the name; everything is read as float32.

    Raises:
        InputError: tensors are missing, damaged, or not those of the configuration.
    """

    def __init__(self, source: str, folder: Path, device: str = "cpu") -> None:
        self.source, self.folder, self.device = source, folder, torch.device(device)
        self.tensors = checkpoint.TensorFolder(folder)
        self.model = outlines.skeleton(folder, buffers=True).eval().requires_grad_(False)
        self.names = self._names()
        self.prefix, self.blocks = decoder_blocks(self.model)
        self._embedding = self.model.get_input_embeddings()
        self._embedding.padding_idx = None  # its rows are renumbered
        self._head = self.model.get_output_embeddings()
        ends = {id(self._embedding.weight), id(self._head.weight)}
        named = dict(self.model.named_parameters(remove_duplicate=False))
        self._tables = {n for n, p in named.items() if id(p) in ends}
        self._table = self._file_of(self._embedding)
        self._head_table = self._file_of(self._head)
        inside = f"{self.prefix}."
        outside = [n for n in self.names if not n.startswith(inside) and n not in self._tables]
        for name in outside:
            self._put(self.model, name, self._read(name))
        for name, buffer in list(self.model.named_buffers()):
            if not name.startswith(inside):
                self._put(self.model, name, buffer.to(self.device))
        self._head.forward = self._logits
        self._passing: Passing | None = None

    def block(self, index: int) -> nn.Module:
        """The decoder block of this number, with its weights, in evaluation mode."""
        block = copy.deepcopy(self.blocks[index])
        within = self.within(index)
        for name in self.names:
            if name.startswith(within):
                self._put(block, name.removeprefix(within), self._read(name))
        return block.to(self.device)

    def within(self, index: int) -> str:
        """What the names of all in this block begin with."""
        return f"{self.prefix}.{index}."

    def calls(self, ids: Tensor, rows: int) -> list[list[Call]]:
        """For every block, how each batch of ``rows`` of ids ``[blocks, length]`` calls it.

        Activations are there for the first block only. Raises `InputError` where the blocks are not
        called one after another.
        """
        self._passing = Passing(self.blocks, self.block(0).forward)
        with self._rows_of(ids):
            return calls_of(self.model, self.blocks, self._passing, torch.split(ids, rows))

    @torch.no_grad()
    def losses(self, ids: Tensor, hidden: list[Tensor]) -> Tensor:
        """Mean negative log likelihood of each block of ids ``[blocks, length]``, float64.

        ``hidden`` is what the last decoder block puts out, ``[1, length, hidden]`` for each.
        """
        means = []
        for row, states in zip(ids.to(self.device), hidden, strict=True):
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            for first in range(0, len(row) - 1, TOKENS_AT_ONCE):
                part = slice(first, min(first + TOKENS_AT_ONCE, len(row) - 1))
                logits = self._after_blocks(row[part], states[:, part])
                targets = row[part.start + 1 : part.stop + 1]
                total += F.cross_entropy(logits.float(), targets, reduction="sum").double()
            means.append(total / (len(row) - 1))
        return torch.stack(means).cpu()

    def fingerprint(self, progress: Progress = ignore) -> str:
        """`ternq.states.fingerprint` of the model loaded in float32; reads everything once.

        Raises:
            InputError: a value is not finite.
        """
        digest = hashlib.sha256()
        state = self.model.state_dict()
        for done, name in enumerate(sorted(state), 1):
            tensor = self._stored(name)
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            digest.update(f"{name}{tuple(tensor.shape)}{dtype}".encode())
            for part in torch.split(tensor, _ROWS) if tensor.ndim else [tensor]:
                values = part.to(dtype).contiguous()
                if bad := int((~torch.isfinite(values)).sum()):
                    raise InputError(f"'{self.source}' has {bad} NaN or Inf values in {name}.")
                raw: Any = values.reshape(-1).view(torch.uint8).numpy()
                digest.update(memoryview(raw))
            progress(Event("load", done=done, total=len(state)))
        return digest.hexdigest()[:16]

    def dense(self, name: str) -> Tensor:
        """A tensor of the model as it is stored."""
        return self.tensors[self.names[name]]

    # -- what is read --------------------------------------------------------------------------

    def _names(self) -> dict[str, str]:
        """Name in the model -> name in the files; tied tensors have one name only."""
        found = outlines.names_in_files(self.model, self.tensors)
        tied = getattr(self.model, "all_tied_weights_keys", {})
        for name, source in tied.items():
            if name in found and source in found:
                if not torch.equal(self.tensors[found[name]], self.tensors[found[source]]):
                    raise InputError(f"'{self.source}' ties {name} to {source}, but they differ.")
                del found[name]
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if name not in found and tied.get(name) not in found:
                raise InputError(
                    f"'{self.source}' lacks weights that its configuration asks for, such as "
                    f"{name}."
                )
            shape = self.tensors.shapes[found[name]] if name in found else parameter.shape
            if tuple(shape) != tuple(parameter.shape):
                raise InputError(
                    f"'{self.source}' holds {found[name]} as {[*shape]}; its configuration asks "
                    f"for {[*parameter.shape]}."
                )
        return found

    def _read(self, name: str) -> Tensor:
        tensor = self.dense(name)
        plain = tensor.float() if tensor.is_floating_point() else tensor
        return plain.to(self.device, copy=plain is tensor)  # a copy, not a view of the file

    def _stored(self, name: str) -> Tensor:
        tied = getattr(self.model, "all_tied_weights_keys", {})
        file = self.names.get(name) or self.names.get(tied.get(name, ""))
        found = self.model.get_buffer(name) if file is None else self.tensors[file]
        return found.cpu()

    def _file_of(self, module: nn.Module) -> str:
        """The file's name of a table, which may be tied to another's."""
        weight = module.weight
        owners = [
            n
            for n, p in self.model.named_parameters(remove_duplicate=False)
            if p is weight and n in self.names
        ]
        return self.names[owners[0]]

    @staticmethod
    def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
        parent, _, own = name.rpartition(".")
        owner = module.get_submodule(parent)
        if own in owner._parameters:
            owner._parameters[own] = nn.Parameter(tensor, requires_grad=False)
        else:
            owner._buffers[own] = tensor

    # -- before and after the blocks -----------------------------------------------------------

    @contextmanager
    def _rows_of(self, ids: Tensor) -> Iterator[None]:
        """While open, the input embedding has the rows of ``ids``, and no others."""
        wanted = torch.unique(ids).cpu()
        rows = self.tensors[self._table][wanted].float().to(self.device)
        empty, where = self._embedding.weight, wanted.to(self.device)
        self._embedding.weight = nn.Parameter(rows, requires_grad=False)
        handle = self._embedding.register_forward_pre_hook(
            lambda module, args: (torch.searchsorted(where, args[0]), *args[1:])
        )
        try:
            yield
        finally:
            handle.remove()
            self._embedding.weight = empty

    def _after_blocks(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Logits ``[tokens, vocabulary]`` of activations ``[1, tokens, hidden]``."""
        assert self._passing is not None  # calls() comes first
        with self._rows_of(ids), self._passing as passing:
            passing.result = hidden
            logits: Tensor = self.model(input_ids=ids[None], use_cache=False).logits[0]
            passing.result = None
        return logits

    def _logits(self, hidden: Tensor) -> Tensor:
        """The output head, part by part."""
        rows = self.tensors.shapes[self._head_table][0]
        logits = hidden.new_empty(*hidden.shape[:-1], rows)
        table: Any = self.tensors[self._head_table]
        for first in range(0, rows, _ROWS):
            part = table[first : first + _ROWS].float().to(self.device)
            logits[..., first : first + _ROWS] = F.linear(hidden, part)
        return logits if self._head.bias is None else logits + self._head.bias


def bytes_needed(skeleton: Any, training: Training) -> int:
    """Bytes that going block by block takes at its peak, from shapes alone.

    Latent weights, their gradients, two moments, the rounded weights and the start of the largest
    block; or the Hessian of the widest layer beside its factors in float64; and the activations of
    the text, and a part of the largest table. The program itself takes about 0.6 GB more.
    """
    config = skeleton.config.get_text_config()
    blocks = nn.ModuleList(decoder_blocks(skeleton)[1])
    block = max(sum(p.numel() for p in b.parameters()) for b in blocks)
    linears = [features(m) for m in blocks.modules() if is_linear(m)]
    widest = max((columns for columns, _ in linears), default=config.hidden_size)
    largest = max((columns * rows for columns, rows in linears), default=0)
    rounding = 2 * 4 * block + (4 + 4 * 8) * widest**2 + 5 * 4 * largest
    softened = 2 * 4 if training.reconstruction_softened else 0
    reconstruction = (4 + 4 + 2 * 4 + 4 + 4 + softened) * block + 6 * 4 * largest
    tokens = training.calibration * training.sequence_length
    activations = (2 * 2 + 3) * 4 * tokens * config.hidden_size  # in and out, of both; held out
    inside = training.sequence_length * 4 * (16 * config.hidden_size + 8 * widest)
    table = 4 * (_ROWS * config.hidden_size + 2 * TOKENS_AT_ONCE * config.vocab_size)
    work = max(rounding, reconstruction) if training.passes else rounding
    return int(work + activations + inside + table)
