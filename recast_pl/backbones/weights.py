"""Reads weight files."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from recast_pl.errors import BackboneError

if TYPE_CHECKING:
    from recast_pl.backbones.backbone import BackboneConfig


def existing(weights: str) -> Path:
    path = Path(weights).expanduser()
    if not path.is_file():
        raise BackboneError(f"weights {weights!r} is no file; give 'hub', 'random' or the path of a file")
    return path


def read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state.get("state_dict", state)  # type: ignore[return-value]


def load_into(net: nn.Module, path: Path, config: "BackboneConfig") -> None:
    try:
        net.load_state_dict(read_file(path))
    except Exception as cause:  # a damaged file can make torch.load raise nearly anything
        raise not_loaded(config, cause) from cause


def drop_classifier(net: nn.Module, name: str) -> None:
    """Replaces the last linear layer, which is the classifier of every torchvision model that has one."""
    linears = [path for path, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise BackboneError(f"torchvision's {name!r} has no linear classifier; choose another backbone")
    parent, _, attribute = linears[-1].rpartition(".")
    setattr(net.get_submodule(parent), attribute, nn.Identity())


def not_loaded(config: "BackboneConfig", cause: Exception) -> BackboneError:
    return BackboneError(
        f"cannot build backbone {config.name!r} with weights {config.weights!r}: {one_line(cause)}; "
        "check that name, weights and model.backbone.args belong together"
    )


def one_line(cause: Exception) -> str:
    text = " ".join(str(cause).split()) or type(cause).__name__
    return text if len(text) <= 300 else text[:297] + "..."
