"""LoRA whose patch keeps 4 or 8 bits of each number, which makes it a quarter or half as large as in half precision.

    W' = W + (alpha / r) · B·A as in `recast_pl.methods.lora`; when a task ends, each part of A and of B becomes s·q

q are whole numbers of at most 2^(bits − 1) − 1, and s is the step with the least squared error. Training knows nothing
of it: numbers are rounded to the nearest afterwards, without regard to the images of the task. Tasks cannot be merged;
use `LoRA` for that.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from recast_pl.errors import MethodError
from recast_pl.methods.adaptation import ATTENTION, CONVOLUTIONS, CompactState, Part
from recast_pl.methods.lora import LoRA
from recast_pl.methods.piece import check_state
from recast_pl.methods.rounding import choose_steps, nearest_codes, pack_codes, packed_width, unpack_codes


class RoundedLoRA(CompactState, LoRA):
    """LoRA whose numbers are rounded to few bits when a task ends.

    Args:
        bits: Of each number in the patch of a task: 8 or 4.
        rank: r.
        alpha: α; None for r, so that the factor is 1.
        targets: Regular expressions for names of weights.
        parts: Which parts of fused query-key-value weights to adapt (any sequence); None for q and v.
        learning_rate: Learning rate of all parameters; None for that of the head.
        shared: Whether all weights of one shape and with the same parts have the same A and B.

    Raises:
        MethodError: If the rank is below 1, there are no parts, or the bits are others.
    """

    linear = False

    def __init__(
        self,
        bits: Literal[8, 4] = 4,
        rank: int = 1,
        alpha: float | None = None,
        targets: tuple[str, ...] = (ATTENTION, CONVOLUTIONS),
        parts: tuple[Part, ...] | None = None,
        learning_rate: float | None = None,
        shared: bool = False,
    ) -> None:
        super().__init__(rank, alpha, targets, parts, learning_rate, shared)
        if bits not in (8, 4):
            raise MethodError(f"RoundedLoRA: bits={bits} must be 8 or 4")
        self.bits = bits

    def end_task(self) -> None:
        """Rounds what was trained."""
        self.load_task_state(self.task_state())

    def task_state(self) -> dict[str, Tensor]:
        """The codes of all numbers (bytes,), parameter after parameter, and the step of each part (parts,)."""
        parts = [part.detach().cpu().double().flatten() for p in self.parameters.values() for part in p]
        rows = pad_sequence(parts, batch_first=True)
        steps = choose_steps(rows, self.bits)
        codes = nearest_codes(rows, steps.double()[:, None], self.bits).to(torch.int8)
        joined = torch.cat([row[: len(part)] for row, part in zip(codes, parts, strict=True)])
        return {"codes": pack_codes(joined[None], self.bits)[0], "steps": steps.float()}

    @torch.no_grad()
    def load_task_state(self, state: dict[str, Tensor]) -> None:
        """Loads codes times steps."""
        sizes = self._sizes()
        shapes = {"codes": (packed_width(sum(sizes), self.bits),), "steps": (len(sizes),)}
        check_state(type(self).__name__, state, shapes, codes=torch.uint8)
        for parameter, (numbers,) in self.unpack({name: tensor[None] for name, tensor in state.items()}).items():
            parameter.copy_(numbers)

    def unpack(self, states: Mapping[str, Tensor]) -> dict[Tensor, Tensor]:
        """Codes times steps of T tasks (T, *shape) for each parameter."""
        sizes = torch.tensor(self._sizes())
        owners = torch.arange(len(sizes)).repeat_interleave(sizes)
        steps = states["steps"].float()[:, owners.to(states["steps"].device)]  # (T, Σ)
        codes = unpack_codes(states["codes"], len(owners), self.bits)
        return super().unpack({"numbers": codes * steps})

    def _sizes(self) -> list[int]:
        """How many numbers each part of each parameter has."""
        return [parameter[0].numel() for parameter in self.parameters.values() for _ in parameter]
