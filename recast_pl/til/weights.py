"""Pieces that generate or change weights."""

from pathlib import Path

import torch
from rich.console import RenderableType
from torch import Tensor, nn

from recast_pl.decomposition.bank import Decomposition, decompose
from recast_pl.decomposition.surgery import install
from recast_pl.decomposition.targets import BankLayout
from recast_pl.errors import DecompositionError
from recast_pl.til.piece import Piece, check_state


class Recast(Piece):
    """RECAST: a task is the coefficients with which frozen templates are mixed into weights (equations 1, 2).

    Args:
        layout: Which weights, and how they share templates: solved in closed form when training starts.
        decomposition: Path of a `decomposition.safetensors` to use instead, from `MimicryModule` or a run.
        learning_rate: Rate of the coefficients; None for that of the head. About ten times that does well.

    Raises:
        DecompositionError: If neither or both of layout and decomposition are given.
    """

    def __init__(
        self,
        layout: BankLayout | None = None,
        decomposition: str | None = None,
        learning_rate: float | None = None,
    ) -> None:
        super().__init__(learning_rate)
        if (layout is None) == (decomposition is None):
            given = "neither" if layout is None else "both"
            raise DecompositionError(f"Recast needs a layout or a decomposition file; {given} is given")
        self.layout, self.path = layout, None if decomposition is None else Path(decomposition)
        self.decomposition = Decomposition(())

    def attach(self, network: nn.Module) -> None:
        """Decomposes the network, or takes the decomposition given, and puts it in place."""
        if self.path is not None:
            self.decomposition = Decomposition.load(self.path)
        else:
            assert self.layout is not None
            self.decomposition = decompose(network, self.layout)
        self.parameters = install(network, self.decomposition)

    @torch.no_grad()
    def begin_task(self) -> None:
        """Every task starts from the coefficients of the pretrained weights."""
        for bank in self.decomposition.banks:
            for name, values in zip(bank.group.targets, bank.coefficients, strict=True):
                self.parameters[name].data = values.to(self.parameters[name].device, copy=True)  # (K, n)

    def task_state(self) -> dict[str, Tensor]:
        """The mean over the sets of each weight's coefficients, one after the other (Σ n,).

        One tensor, because a file spends some 80 bytes on naming each. The mean is all that equation 2 uses.
        """
        means = [parameter.detach().mean(0) for parameter in self.parameters.values()]
        return {"coefficients": torch.cat(means).cpu()}

    @torch.no_grad()
    def load_task_state(self, state: dict[str, Tensor]) -> None:
        """Takes the means back as a single set (1, n), for which equation 2 gives the very same bits."""
        sizes = [parameter.shape[1] for parameter in self.parameters.values()]
        check_state("Recast", state, {"coefficients": (sum(sizes),)})
        pieces = state["coefficients"].split(sizes)
        for parameter, mean in zip(self.parameters.values(), pieces, strict=True):
            parameter.data = mean[None].to(parameter.device, copy=True)  # (1, n)

    def describe(self) -> list[RenderableType]:
        """The table of groups, templates and coefficients."""
        return [self.decomposition.table()]

    def save_shared(self, folder: Path) -> None:
        """Writes `decomposition.safetensors`: later sessions use its bits, however they would solve it."""
        path = folder / "decomposition.safetensors"
        if not path.exists():
            self.decomposition.save(path)

    def load_shared(self, folder: Path) -> None:
        """Uses the run folder's decomposition."""
        path = folder / "decomposition.safetensors"
        if path.exists():
            self.path = path
