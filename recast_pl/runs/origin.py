"""When, where and with which versions a task was trained."""

import os
import platform
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

import torch

_PACKAGES = ("recast-pl", "torch", "torchvision", "lightning", "timm")


class Origin(TypedDict):
    """Facts about how something was made; the date is in ISO format, with the offset of the time zone."""

    date: str
    versions: dict[str, str]
    machine: str


def origin(device: torch.device | None = None) -> Origin:
    """The present date, versions and machine.

    Args:
        device: Where it is computed; None for no mention of a device other than the processor.
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):  # code that runs without being installed
            versions[package] = version(package)
    parts = [platform.node(), f"{platform.system()} {platform.machine()}", _processor()]
    if device is not None and device.type != "cpu":
        parts.append(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)
    return Origin(
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        versions=versions,
        machine=", ".join(part for part in parts if part),
    )


def _processor() -> str:
    """Name of this machine's processor, and its number of cores."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"
