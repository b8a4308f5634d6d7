"""What pieces share whose patches keep 8, 4, 2 or 1 bits of each number, where half precision takes 16.

What a task has added to each part of a parameter becomes s·q. q are whole numbers of at most 2^(bits − 1) − 1, with
1 bit the signs ±1, and s is the step with the least squared error. Training knows nothing of it, but numbers are
rounded to the nearest for each validation: so the best epoch is that of the rounded network, on whose features a head
is solved, too. The tasks of such a piece cannot be merged.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from recast_pl.errors import MethodError
from recast_pl.methods.adaptation import CompactState
from recast_pl.methods.piece import check_state
from recast_pl.methods.rounding import choose_steps, nearest_codes, pack_codes, packed_width, unpack_codes

Bits = Literal[8, 4, 2, 1]


class RoundedState(CompactState):
    """A piece whose numbers are rounded to few bits. Name it before the method in a class's bases.

    The parts of a parameter are its rows; a vector is a single part.
    """

    linear: ClassVar[bool] = False
    bits: Bits
    _exact: dict[str, Tensor]

    def choose_bits(self, bits: Bits) -> None:
        """Sets how many bits a number keeps; raises MethodError if they are not 8, 4, 2 or 1."""
        if bits not in (8, 4, 2, 1):
            raise MethodError(f"{type(self).__name__}: bits={bits} must be 8, 4, 2 or 1")
        self.bits, self._exact = bits, {}

    def origin(self, name: str) -> Tensor:
        """What a parameter is at code 0 (*shape), so that the difference to it is rounded; by default a scalar of 0."""
        return torch.zeros(())

    def begin_validation(self) -> None:
        """Rounds what is trained, until validation ends."""
        self._exact = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.load_task_state(self.task_state())

    def end_validation(self) -> None:
        """Restores what was rounded."""
        if self._exact:
            self._load(self._exact, self.parameters)
            self._exact = {}

    def end_task(self) -> None:
        """Rounds what was trained."""
        self.load_task_state(self.task_state())
        self._exact = {}

    def task_state(self) -> dict[str, Tensor]:
        """The codes of all numbers (bytes,), parameter after parameter, and the step of each part (parts,)."""
        rows = [_parts(self._added(name, parameter)) for name, parameter in self.parameters.items()]
        steps = [choose_steps(each, self.bits) for each in rows]
        codes = [nearest_codes(r, s.double()[:, None], self.bits).flatten() for r, s in zip(rows, steps, strict=True)]
        joined = torch.cat(codes).to(torch.int8)
        return {"codes": pack_codes(joined[None], self.bits)[0], "steps": torch.cat(steps).float()}

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
    """A parameter (*shape) as its parts (parts, numbers of a part)."""
    return parameter.flatten(1) if parameter.ndim > 1 else parameter[None]
