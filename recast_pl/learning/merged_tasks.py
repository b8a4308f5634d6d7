"""The file of merged tasks: numbers that all of them share, their heads, and perhaps a mask for each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recast_pl.errors import PatchError, one_line
from recast_pl.files import pack_tensors, read_tensors, write_atomic
from recast_pl.learning.compact import narrowed
from recast_pl.learning.merging import flatten, unflatten
from recast_pl.learning.patch import TaskPatch
from recast_pl.learning.quantization import RoundedHead
from recast_pl.methods.rounding import pack_codes, unpack_codes

_FORMAT = 1

_OF_EACH = ("task", "classes", "image_size", "mean", "std", "metrics")
"""Facts that tasks may have of their own."""


@dataclass(frozen=True)
class MergedTasks:
    """Several tasks that use the same numbers, or some of the same.

    Args:
        tasks: The task of each head; their states are not used.
        pieces: The merged state of each piece of the method.
        masks: Which of the N numbers each task uses (T, N), bool; the others are those that every task starts from.
            None if all tasks use all.
        how: The way of merging, and its settings.
    """

    tasks: list[TaskPatch]
    pieces: list[dict[str, Tensor]]
    masks: Tensor | None
    how: dict[str, Any]

    @property
    def bits(self) -> int | None:
        """Bits of each weight of the heads in the file; None if they are in full precision, or differ."""
        found = {task.rounded.bits if task.rounded else None for task in self.tasks}
        return found.pop() if len(found) == 1 else None

    def as_read(self) -> "MergedTasks":
        """A copy with the numbers that the file keeps: in half precision if the heads are compact."""
        if self.bits is None:
            return self
        return replace(self, pieces=[{name: narrowed(t).float() for name, t in state.items()} for state in self.pieces])

    def patch(self, index: int, start: Sequence[Mapping[str, Tensor]]) -> TaskPatch:
        """The patch of one task; `start` are the states that every task starts from."""
        state = self.pieces
        if self.masks is not None:
            numbers = torch.where(self.masks[index], flatten(state), flatten(start))
            state = unflatten(numbers, like=state)
        return replace(self.tasks[index], pieces=state)

    def to_bytes(self) -> bytes:
        """The content of a file. The merge of one task that uses all numbers is the file of its patch."""
        if len(self.tasks) == 1 and self.masks is None:
            return replace(self.tasks[0], pieces=self.pieces).to_bytes()
        first, bits = self.tasks[0], self.bits
        facts = {"format": _FORMAT, "kind": "merged", "base": first.base, "method": first.method, "how": self.how}
        facts |= {"bits": bits, "features": first.head["weight"].shape[1]}
        facts |= {"tasks": [[task.facts[name] for name in _OF_EACH] for task in self.tasks]}
        tensors = _join_heads(self.tasks, bits)
        for index, state in enumerate(self.pieces):
            tensors |= {f"pieces/{index}/{n}": narrowed(t) if bits is not None else t for n, t in state.items()}
        if self.masks is not None:
            tensors["masks"] = pack_codes(self.masks.to(torch.int8), 1)
        return pack_tensors(tensors, facts)

    def save(self, path: str | Path) -> None:
        """Writes the file atomically."""
        write_atomic(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> "MergedTasks":
        """Reads a file that `save` wrote; raises PatchError if it is missing, damaged or of another kind or format."""
        tensors, facts = read_tensors(path, PatchError)
        found, version = facts.get("kind"), facts.get("format")
        if (found, version) != ("merged", _FORMAT):
            what = f"a {found!r:.40} of format {version!r:.40}"
            raise PatchError(f"{path} is {what}, not merged tasks of format {_FORMAT}; give a file of 'patch merge'")
        try:
            return cls._from_parts(tensors, facts)
        except (PatchError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as cause:
            raise PatchError(f"{path} is damaged ({one_line(cause)}); merge the patches again") from cause

    @classmethod
    def _from_parts(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> "MergedTasks":
        pieces: list[dict[str, Tensor]] = [{} for _ in facts["method"]]
        for name, tensor in tensors.items():
            if name.startswith("pieces/"):
                _, index, key = name.split("/", 2)
                pieces[int(index)][key] = tensor.float() if tensor.is_floating_point() else tensor
        listed = [dict(zip(_OF_EACH, values, strict=True)) for values in facts["tasks"]]
        classes = [len(each["classes"]) for each in listed]
        heads = _split_heads(tensors, facts["bits"], facts["features"], classes)
        tasks = []
        for (head, rounded), each in zip(heads, listed, strict=True):
            common = {"pieces": pieces, "method": facts["method"], "base": facts["base"]}
            tasks.append(TaskPatch(**each, **common, head=head, rounded=rounded))
            tasks[-1].validate()
        masks = tensors.get("masks")
        numbers = sum(tensor.numel() for state in pieces for tensor in state.values())
        return cls(tasks, pieces, None if masks is None else _unpack_bits(masks, numbers), dict(facts["how"]))


def _join_heads(tasks: Sequence[TaskPatch], bits: int | None) -> dict[str, Tensor]:
    """The heads of all tasks below one another: naming each tensor costs 80 bytes."""
    if bits is None:
        parts = [{"weight": task.head["weight"].float(), "bias": task.head["bias"].float()} for task in tasks]
    else:
        rounded = [task.rounded for task in tasks if task.rounded is not None]
        parts = [{"codes": pack_codes(r.codes, r.bits), "steps": r.steps, "bias": r.bias} for r in rounded]
    return {f"heads/{name}": torch.cat([part[name] for part in parts]) for name in parts[0]}


def _split_heads(
    tensors: Mapping[str, Tensor], bits: int | None, features: int, classes: Sequence[int]
) -> list[tuple[dict[str, Tensor], RoundedHead | None]]:
    """The inverse of `_join_heads`."""
    names = ("weight", "bias") if bits is None else ("codes", "steps", "bias")
    parts = list(zip(*(tensors[f"heads/{name}"].split(list(classes)) for name in names), strict=True))
    if bits is None:
        return [({"weight": weight.clone(), "bias": bias.clone()}, None) for weight, bias in parts]
    rounded = [
        RoundedHead(bits, unpack_codes(c, features, bits).to(torch.int8), s.clone(), b.clone()) for c, s, b in parts
    ]
    return [(head.state, head) for head in rounded]


def _unpack_bits(packed: Tensor, count: int) -> Tensor:
    """Masks (T, `count`) that `pack_codes` packed with 1 bit; `unpack_codes` takes 36 times the memory."""
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
    found: Tensor = bits.flatten(1).bool()
    if found.shape[1] - count not in range(8):
        raise ValueError(f"the masks have {found.shape[1]} bits for {count} numbers")
    return found[:, :count]
