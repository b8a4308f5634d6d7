"""The states of very many tasks in little memory."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from recast_pl.errors import PatchError

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
        self._parts: dict[tuple[int, str], Tensor] = {}  # (room, *shape), by piece and name
        self._used, self._free = 0, list[int]()

    @property
    def numbers(self) -> int:
        """How many numbers a task has."""
        return sum(part[0].numel() for part in self._parts.values())

    def add(self, states: Sequence[Mapping[str, Tensor]]) -> int:
        """Keeps copies of a task's states.

        Args:
            states: One for each piece, with names and shapes that are the same for every task.

        Returns:
            The task's row.

        Raises:
            PatchError: If the numbers are of another type than those of the tasks before.
        """
        parts = {(i, name): tensor for i, state in enumerate(states) for name, tensor in state.items()}
        for key, tensor in parts.items():
            if key in self._parts and self._parts[key].dtype != tensor.dtype:
                raise PatchError(
                    f"the patch holds {key[1]} as {tensor.dtype}, other tasks hold it as {self._parts[key].dtype}; "
                    "learn the task anew"
                )
        row = self._free.pop() if self._free else self._next()
        for key, tensor in parts.items():
            if key not in self._parts:
                self._parts[key] = torch.empty(self._room, *tensor.shape, dtype=tensor.dtype)
            self._parts[key][row] = tensor
        return row

    def remove(self, row: int) -> None:
        """Gives a row to the next task."""
        self._free.append(row)

    def of(self, rows: int | Tensor) -> list[State]:
        """States of each piece: of one task, as views, or of those in several rows (T,), copied (T, *shape)."""
        states: list[State] = [{} for _ in range(self._pieces)]
        for (piece, name), part in self._parts.items():
            states[piece][name] = part[rows]
        return states

    def _next(self) -> int:
        if self._used == self._room:
            self._room += self._room // 2 + 1
            for key, part in self._parts.items():
                grown = torch.empty(self._room, *part.shape[1:], dtype=part.dtype)
                grown[: len(part)] = part
                self._parts[key] = grown
        self._used += 1
        return self._used - 1
