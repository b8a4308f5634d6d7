"""Weight files."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from recast_pl.errors import BackboneError


def find_file(weights: str) -> Path:
    """The path of a weight file; raises BackboneError if there is no such file."""
    path = Path(weights).expanduser()
    if not path.is_file():
        raise BackboneError(f"weights {weights!r} is not a file; give 'hub', 'random' or the path of a file")
    return path


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file by name; pickled objects other than tensors are refused."""
    if path.suffix == ".safetensors":
        return load_file(path)
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state.get("state_dict", state)  # type: ignore[return-value]
