"""The base of methods whose weights are mixed from templates that a group of layers shares."""

from collections.abc import Sequence
from itertools import count, takewhile
from pathlib import Path

from rich.console import RenderableType
from torch import nn

from recast_pl.decomposition.bank import Decomposition, decompose
from recast_pl.decomposition.parametrization import install
from recast_pl.decomposition.targets import BankLayout
from recast_pl.errors import DecompositionError
from recast_pl.methods.piece import Piece


class TemplatePiece(Piece):
    """A piece that replaces weights by mixtures of templates; its parameters are the coefficients (K, n) by weight.

    Args:
        layout: Which weights share templates, and how many; they are solved in closed form when training starts.
        decomposition: Path of a `decomposition.safetensors` to use instead, from `MimicryModule` or another run.
        learning_rate: Learning rate of the parameters; None for that of the head.

    Raises:
        DecompositionError: If neither or both of layout and decomposition are given.
    """

    def __init__(self, layout: BankLayout | None, decomposition: str | None, learning_rate: float | None) -> None:
        super().__init__(learning_rate)
        if (layout is None) == (decomposition is None):
            given = "neither" if layout is None else "both"
            owner = type(self).__name__
            raise DecompositionError(f"{owner} needs a layout or a decomposition file; {given} is given")
        self.layout, self.path = layout, None if decomposition is None else Path(decomposition)
        self.decomposition = Decomposition(())

    def join(self, pieces: Sequence[Piece]) -> None:
        """Counts all pieces of this kind before, as each needs a file of its own."""
        self.number = sum(isinstance(piece, TemplatePiece) for piece in pieces[: pieces.index(self)])

    def attach(self, network: nn.Module) -> None:
        """Decomposes the network, or loads the given decomposition, and installs it."""
        if self.path is not None:
            self.decomposition = Decomposition.load(self.path)
        elif self.layout is not None:
            self.decomposition = decompose(network, self.layout)
        self.parameters = install(network, self.decomposition)

    def describe(self) -> list[RenderableType]:
        """The table of groups, templates and coefficients."""
        return [self.decomposition.table()]

    def save_base(self, folder: Path) -> None:
        """Writes the decomposition, so that later sessions use the same bits even if they would solve for others."""
        path = decomposition_file(folder, self.number)
        if not path.exists():
            self.decomposition.save(path)

    def load_base(self, folder: Path) -> None:
        """Uses the run folder's decomposition."""
        path = decomposition_file(folder, self.number)
        if path.exists():
            self.path = path


def decomposition_file(folder: Path, number: int) -> Path:
    """Where a run folder keeps the decomposition of the `TemplatePiece` whose `number` this is."""
    return folder / f"decomposition{f'_{number}' if number else ''}.safetensors"


def load_decompositions(folder: Path) -> Decomposition:
    """The banks of all pieces of a run folder that have templates, or of its `MimicryModule`.

    Raises:
        DecompositionError: If there is none, or a file is damaged.
    """
    others = takewhile(Path.exists, (decomposition_file(folder, number) for number in count(1)))
    paths = [decomposition_file(folder, 0), *others]
    return Decomposition(tuple(bank for path in paths for bank in Decomposition.load(path).banks))
