"""Projection: heads that read few fixed directions of wide features, stored once for all tasks.

    logits = H·P·f(x) + b, where the rows of P (width, D) are the leading left singular directions of the last weight
    with D outputs

It is not from a paper. Behind a narrow layer, such as the 320 channels that EfficientNet expands to 1280, much of what
features vary in lies in the directions that the layer writes to, so its weight gives them without any image.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import RenderableType
from torch import Tensor, nn

from recast_pl.decomposition.targets import weight_owners
from recast_pl.errors import MethodError
from recast_pl.files import pack_tensors, read_tensors, write_atomic
from recast_pl.methods.piece import Piece


class Projection(Piece):
    """Heads of `width` columns on wide features: a fixed projection of the features, stored once in the run folder.

    It trains nothing. It stands alone, or beside pieces that do. It pays only behind a narrow layer, and costs
    accuracy: 3 points with 128 of the 1,280 features of EfficientNet-Lite0, 2 with 256 (`benchmarks/projection.py`).
    So take `--patch_precision int4` first, which costs next to nothing. All probe accuracies of a run are those of the
    projected features.

    Args:
        width: Number of features that heads read, below that of the backbone.

    Raises:
        MethodError: If `width` is below 1, not below the number of features D, or above what the last layer with D
            outputs has of singular directions; if no layer has D outputs; or if the method has two projections.
    """

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        if width < 1:
            raise MethodError(f"Projection: width={width} must be at least 1")
        self.width = width
        self.matrix = torch.empty(0)
        """P (width, D); empty before it is loaded or computed."""

    def join(self, pieces: Sequence[Piece]) -> None:
        """Refuses a second projection, whose directions would be those of other features."""
        super().join(pieces)
        if self.number:
            raise MethodError("Projection is in the method twice; leave one of them out")

    def project(self, network: nn.Module, features: int) -> Tensor:
        """The matrix of the run folder, or else the leading directions of the last weight with D outputs."""
        if not len(self.matrix):
            self.matrix = leading_directions(network, features, self.width)
        if self.matrix.shape != (self.width, features):
            raise MethodError(
                f"Projection: the run folder's {_FILE} is {tuple(self.matrix.shape)}, not {(self.width, features)} as "
                "width and backbone are now; use those of the run, or another run folder"
            )
        return self.matrix

    def describe(self) -> list[RenderableType]:
        """How many features heads read."""
        width, features = self.matrix.shape
        return [f"heads read {width:,} directions of {features:,} features, stored once in {_FILE}"]

    def save_base(self, folder: Path) -> None:
        """Writes the matrix, because other machines compute the same directions to other bits."""
        path = folder / _FILE
        if not path.exists():
            write_atomic(path, pack_tensors({"matrix": self.matrix}, {}))

    def load_base(self, folder: Path) -> None:
        """Uses the run folder's matrix."""
        path = folder / _FILE
        if path.exists():
            self.matrix = read_tensors(path, MethodError)[0]["matrix"]


_FILE = "projection.safetensors"


def leading_directions(network: nn.Module, features: int, width: int) -> Tensor:
    """The leading left singular vectors of the last weight with as many outputs as there are features.

    Args:
        network: A network from images to features; its weights are looked through in its own order.
        features: D.
        width: How many vectors.

    Returns:
        Orthonormal rows (width, D), the leading one first.

    Raises:
        MethodError: If there is no such weight, or it has fewer directions.
    """
    weights = [getattr(module, attribute) for module, attribute in weight_owners(network).values()]
    wide = [weight for weight in weights if len(weight) == features]
    if not wide:
        raise MethodError(f"Projection: no layer has {features:,} outputs, as the features have; leave Projection out")
    matrix = wide[-1].detach().flatten(1).double().cpu().numpy()  # (D, columns)
    largest = min(features - 1, matrix.shape[1])
    if width > largest:
        raise MethodError(
            f"Projection: width={width} must be from 1 to {largest:,}, for {features:,} features behind a layer of "
            f"{matrix.shape[1]:,} inputs"
        )
    left = np.linalg.svd(matrix, full_matrices=False)[0][:, :width].T  # (width, D)
    # a singular direction has no sign: the largest entry is made positive, as in lora_xs.py
    signs = np.sign(np.take_along_axis(left, np.abs(left).argmax(1, keepdims=True), 1))
    return torch.from_numpy(left * signs).float()
