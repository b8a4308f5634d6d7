"""The device to compute on, and the settings of a trainer that fit it."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from recast_pl.errors import RunError

_OF_TRAINING = (
    *("accelerator", "devices", "num_nodes", "strategy", "plugins"),  # the machines that it was on
    *("callbacks", "logger", "profiler"),  # objects that an evaluation does not use
)

_KNOWN = ("cuda", "mps")  # the accelerators that Lightning knows too


def find_device(name: str | torch.device | None = None) -> torch.device:
    """Finds a device of this machine.

    Args:
        name: `cpu`, `cuda`, `cuda:1` or `mps`; None or `auto` for an accelerator if there is one, else the CPU.

    Raises:
        RunError: If there is no such device.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type not in _KNOWN:
        accelerator = torch.device("cpu")
    if name is None or name == "auto":
        return accelerator
    try:
        device = torch.device(name)
    except RuntimeError as cause:
        raise RunError(f"device {str(name)!r} is unknown; choose auto, cpu, cuda, cuda:N or mps") from cause
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.accelerator.device_count() if device.type == accelerator.type else 0
    if (device.index or 0) >= count:
        there = f"{accelerator}:0 to {accelerator}:{count - 1}" if count else str(accelerator)
        raise RunError(f"device {str(name)!r} is not on this machine, which has {there}; choose auto or one of these")
    return device


def evaluation_settings(settings: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The settings of a trainer that evaluates a run in one process on a device, wherever the run was trained.

    Args:
        settings: Those of the run's trainer.
        device: As `find_device` returns it.
    """
    kept = {name: value for name, value in settings.items() if name not in _OF_TRAINING}
    devices = 1 if device.index is None else [device.index]
    precision = usable_precision(kept.get("precision"), device)
    return kept | {"accelerator": device.type, "devices": devices, "precision": precision}


def usable_precision(precision: Any, device: torch.device) -> Any:
    """The precision of a run (None for the default), or single precision if the device cannot compute in it."""
    name = str(precision)
    impossible = {
        "cpu": name.startswith(("16", "transformer-engine")),  # Lightning would take bf16, which is less precise
        "mps": name.startswith(("64", "transformer-engine")),
        "cuda": name.startswith("bf16") and not (device.type == "cuda" and torch.cuda.is_bf16_supported()),
    }
    if not impossible.get(device.type, False):
        return precision
    rank_zero_warn(f"{device} cannot compute in precision {name}, in which the run was trained; it computes in 32-true")
    return "32-true"
