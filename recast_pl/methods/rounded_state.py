"""What pieces share whose patches keep 4 or 8 bits of each number, a quarter or half of what half precision takes.

When a task ends, what it has added to each part of a parameter becomes s·q. q are whole numbers of at most
2^(bits − 1) − 1, and s is the step with the least squared error. Training knows nothing of it: numbers are rounded to
the nearest afterwards, without regard to the images of the task. So the tasks of such a piece cannot be merged.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from recast_pl.errors import MethodError
from recast_pl.methods.adaptation import CompactState
from recast_pl.methods.piece import check_state
from recast_pl.methods.rounding import choose_steps, nearest_codes, pack_codes, packed_width, unpack_codes

Bits = Literal[8, 4]


class RoundedState(CompactState):
    """A piece whose numbers are rounded to few bits when a task ends. Name it before the method in a class's bases.

    The parts of a parameter are its rows; a vector is a single part.
    """

    linear: ClassVar[bool] = False
    bits: Bits

    def choose_bits(self, bits: Bits) -> None:
        """Sets how many bits a number keeps; raises MethodError if they are neither 8 nor 4."""
        if bits not in (8, 4):
            raise MethodError(f"{type(self).__name__}: bits={bits} must be 8 or 4")
        self.bits = bits

    def origin(self, name: str) -> Tensor:
        """What a parameter is at code 0 (*shape), so that the difference to it is rounded; by default a scalar of 0."""
        return torch.zeros(())

    def end_task(self) -> None:
        """Rounds what was trained."""
        self.load_task_state(self.task_state())

    def task_state(self) -> dict[str, Tensor]:
        """The codes of all numbers (bytes,), parameter after parameter, and the step of each part (parts,)."""
        parts = [part.flatten() for name, p in self.parameters.items() for part in _parts(self._added(name, p))]
        rows = pad_sequence(parts, batch_first=True)
        steps = choose_steps(rows, self.bits)
        codes = nearest_codes(rows, steps.double()[:, None], self.bits).to(torch.int8)
        joined = torch.cat([row[: len(part)] for row, part in zip(codes, parts, strict=True)])
        return {"codes": pack_codes(joined[None], self.bits)[0], "steps": steps.float()}

    def _added(self, name: str, parameter: Tensor) -> Tensor:
        """What the task has added to a parameter (*shape), in double precision."""
        return parameter.detach().cpu().double() - self.origin(name).cpu()

    @torch.no_grad()
    def load_task_state(self, state: dict[str, Tensor]) -> None:
        """Loads codes times steps."""
        sizes = self._sizes()
        shapes = {"codes": (packed_width(sum(sizes), self.bits),), "steps": (len(sizes),)}
        check_state(type(self).__name__, state, shapes, codes=torch.uint8)
        for parameter, (numbers,) in self.unpack({name: tensor[None] for name, tensor in state.items()}).items():
            parameter.copy_(numbers)

    def unpack(self, states: Mapping[str, Tensor]) -> dict[Tensor, Tensor]:
        """Codes times steps of T tasks (T, *shape) for each parameter, added to where it starts."""
        sizes = torch.tensor(self._sizes())
        owners = torch.arange(len(sizes)).repeat_interleave(sizes)
        steps = states["steps"].float()[:, owners.to(states["steps"].device)]  # (T, Σ)
        codes = unpack_codes(states["codes"], len(owners), self.bits)
        added = super().unpack({"numbers": codes * steps})
        return {p: added[p] + self.origin(name).to(added[p]) for name, p in self.parameters.items()}

    def _sizes(self) -> list[int]:
        """How many numbers each part of each parameter has."""
        return [part.numel() for parameter in self.parameters.values() for part in _parts(parameter)]


def _parts(parameter: Tensor) -> Tensor:
    """A parameter (*shape) as its parts (parts, …)."""
    return parameter if parameter.ndim > 1 else parameter[None]
