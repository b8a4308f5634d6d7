"""aTLAS: a task is how much each parameter moves along what other tasks have changed.

Zhang et al., "Knowledge Composition using Task Vectors with Learned Anisotropic Scaling", NeurIPS 2024.

    θ'_b = θ_b + Σ_j λ_jb·τ_jb

θ_b are the parameters of the pretrained network, each weight or bias a block b of its own. The task vector τ_j is the
difference of network j, fine-tuned on another task, to the pretrained one. Only λ is trained; it starts at 0.

Deviation: the authors keep the zero-shot head of CLIP; here each task has a head of its own.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from recast_pl.errors import MethodError, one_line
from recast_pl.files import pack_tensors, read_tensors, write_atomic
from recast_pl.methods.adaptation import Adaptation, CompactPiece
from recast_pl.methods.piece import Piece

_FILE = "vectors.safetensors"


class Composition(Adaptation):
    """A parameter plus a weighted sum of J task vectors.

    Args:
        vectors: τ (J, *shape).
    """

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        # a frozen parameter, so that a patch of other vectors is refused, as it belongs to another base
        self.vectors = nn.Parameter(vectors, requires_grad=False)
        self.coefficients = nn.Parameter(vectors.new_zeros(len(vectors)))

    def reset(self, weight: Tensor) -> None:
        """All coefficients are 0, so that nothing changes."""
        nn.init.zeros_(self.coefficients)

    def change(self, weight: Tensor) -> Tensor:
        """θ + Σ_j λ_j·τ_j."""
        return weight + (self.coefficients @ self.vectors.flatten(1)).view_as(weight)


class ATLAS(CompactPiece[Composition]):
    """aTLAS (Zhang et al., 2024): for each parameter, a trained sum of what other tasks have changed in it.

    Args:
        vectors: Files of networks that were fine-tuned on other tasks (any sequence): patches of `FullFineTune`, or
            weights by name in the format of safetensors. A folder stands for all `.safetensors` files in it. A run
            folder keeps what it needs of them.
        targets: Regular expressions for names of parameters that all files hold; by default all of them.
        learning_rate: Learning rate of the coefficients; None for that of the head. 0.1 is that of the authors' code.

    Raises:
        MethodError: If a file cannot be read, if parameters have other shapes than those of the network, or if the
            piece is in a method twice.
    """

    linear = True

    def __init__(
        self, vectors: tuple[str, ...], targets: tuple[str, ...] = (".",), learning_rate: float | None = 0.1
    ) -> None:
        super().__init__(targets, learning_rate)
        self.paths = tuple(vectors)
        self._networks: dict[str, Tensor] = {}
        self._vectors: dict[str, Tensor] = {}  # of the run folder

    def join(self, pieces: Sequence[Piece]) -> None:
        """Refuses a second piece, as one takes any number of vectors."""
        super().join(pieces)
        if self.number:
            raise MethodError("ATLAS is in the method twice; list all vectors in one of them")

    def owners(self, network: nn.Module) -> dict[str, tuple[nn.Module, str]]:
        """The parameters of the network that all files hold; raises MethodError if shapes differ."""
        modules, owners = dict(network.named_modules()), dict[str, tuple[nn.Module, str]]()
        for name, tensor in (self._vectors or self._networks).items():
            path, _, attribute = name.rpartition(".")
            module = modules.get(path)
            if module is None or not _is_parameter(module, attribute):
                continue
            owners[name] = module, attribute
            found, wanted = tuple(tensor.shape[1:]), tuple(getattr(module, attribute).shape)
            if found != wanted:
                raise MethodError(
                    f"ATLAS: {name} is {found} in the vectors and {wanted} in the network; take vectors of the same "
                    "backbone and data.image_size"
                )
        return owners

    def attach(self, network: nn.Module) -> None:
        """Reads the vectors, and puts a composition on every target."""
        if not self._vectors:
            self._networks = read_networks(self.paths)
        super().attach(network)
        self._networks = {}  # the compositions hold all that is needed

    def adapt(self, name: str, weight: Tensor) -> Composition:
        """The difference of each fine-tuned network to the present one, or what the run folder has of it."""
        return Composition(
            self._vectors[name].to(weight) if self._vectors else self._networks[name].to(weight) - weight
        )

    def save_base(self, folder: Path) -> None:
        """Writes the task vectors, so that the run needs no other files."""
        path = folder / _FILE
        if not path.exists():
            write_atomic(path, pack_tensors({name: each.vectors for name, each in self.adaptations.items()}, {}))

    def load_base(self, folder: Path) -> None:
        """Uses the task vectors of the run folder."""
        path = folder / _FILE
        if path.exists():
            self._vectors = read_tensors(path, MethodError)[0]


def read_networks(paths: Sequence[str]) -> dict[str, Tensor]:
    """Reads the parameters of J networks.

    Args:
        paths: Files, or folders of files.

    Returns:
        The parameters that all files hold in one shape, by name and sorted by it (J, *shape).

    Raises:
        MethodError: If no file is found, or one cannot be read.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        files += sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise MethodError(f"ATLAS: vectors={list(paths)} hold no .safetensors file; fine-tune on other tasks first")
    networks = [_read(file) for file in files]
    common = sorted(set(networks[0]).intersection(*networks[1:]))
    columns = {name: [network[name] for network in networks] for name in common}
    # heads differ in shape, as other tasks have other classes
    return {name: torch.stack(column) for name, column in columns.items() if len({t.shape for t in column}) == 1}


def _read(file: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as cause:
        raise MethodError(
            f"ATLAS: {file} cannot be read ({one_line(cause)}); give patches of FullFineTune, or .safetensors files of "
            "weights"
        ) from cause
    return {re.sub(r"^pieces/\d+/", "", name): tensor.float() for name, tensor in tensors.items()}


def _is_parameter(module: nn.Module, attribute: str) -> bool:
    return attribute in dict(module.named_parameters(recurse=False)) or parametrize.is_parametrized(module, attribute)
