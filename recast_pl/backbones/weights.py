"""Weight files."""

from pathlib import Path

from timm.models import load_state_dict
from torch import Tensor

from recast_pl.errors import BackboneError


def find_file(weights: str) -> Path:
    """The path of a weight file; raises BackboneError if there is no such file."""
    path = Path(weights).expanduser()
    if not path.is_file():
        raise BackboneError(f"weights {weights!r} is not a file; give 'hub', 'random' or the path of a file")
    return path


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file by name; pickled objects other than tensors are refused.

    The file may be a checkpoint of a training that keeps them under `state_dict` or `model`, and the names may have the
    prefix `module.` of distributed training.
    """
    state: dict[str, Tensor] = load_state_dict(str(path), weights_only=True)
    return state
