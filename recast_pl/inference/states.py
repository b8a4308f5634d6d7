"""The states of very many tasks in little memory."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]
"""What one piece keeps of a task: its tensors by name; or of T tasks, each tensor (T, *shape)."""


class TaskStates:
    """What the pieces keep of each task, as rows of one tensor for each of their parts, on the CPU.

    Tensors and dictionaries of its own would cost a task kilobytes; a row costs its numbers. Room grows by half.

    Args:
        pieces: Number of pieces.
        rows: Tasks to have room for at first.
    """

    def __init__(self, pieces: int, rows: int = 0) -> None:
        self._pieces, self._room = pieces, rows
        self._parts: dict[_Part, Tensor] = {}  # (room, *shape)
        self._kinds: dict[tuple[_Part, ...], tuple[_Part, ...]] = {}  # each once, so that a row has but a reference
        self._rows, self._free = list[tuple[_Part, ...]](), list[int]()

    def add(self, states: Sequence[Mapping[str, Tensor]]) -> int:
        """Keeps copies of a task's states.

        Args:
            states: One for each piece.

        Returns:
            The task's row.
        """
        named = [(i, name, tensor) for i, state in enumerate(states) for name, tensor in state.items()]
        parts = {_Part(i, name, tuple(tensor.shape), tensor.dtype): tensor for i, name, tensor in named}
        kind = self._kinds.setdefault(tuple(parts), tuple(parts))
        row = self._free.pop() if self._free else self._next()
        self._rows[row] = kind
        for part, tensor in parts.items():
            if part not in self._parts:
                self._parts[part] = torch.empty(self._room, *part.shape, dtype=part.dtype)
            self._parts[part][row] = tensor
        return row

    def remove(self, row: int) -> None:
        """Gives a row to the next task."""
        self._free.append(row)

    def numbers(self, row: int) -> int:
        """How many numbers a task has."""
        return sum(math.prod(part.shape) for part in self._rows[row])

    def of(self, row: int) -> list[State]:
        """States of each piece of a task, as views."""
        return self._take(self._rows[row], row)

    def alike(self, rows: Sequence[int]) -> bool:
        """Whether tasks consist of the same parts, so that `of_all` has them together."""
        return len({id(self._rows[row]) for row in rows}) == 1

    def of_all(self, rows: Sequence[int]) -> list[State]:
        """States of each piece of T tasks that are alike, copied (T, *shape)."""
        return self._take(self._rows[rows[0]], torch.tensor(rows))

    def _take(self, kind: tuple["_Part", ...], rows: int | Tensor) -> list[State]:
        states: list[State] = [{} for _ in range(self._pieces)]
        for part in kind:
            states[part.piece][part.name] = self._parts[part][rows]
        return states

    def _next(self) -> int:
        if len(self._rows) == self._room:
            self._room += self._room // 2 + 1
            for key, part in self._parts.items():
                grown = torch.empty(self._room, *part.shape[1:], dtype=part.dtype)
                grown[: len(part)] = part
                self._parts[key] = grown
        self._rows.append(())
        return len(self._rows) - 1


class _Part(NamedTuple):
    """One tensor of what tasks keep."""

    piece: int
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
