"""The formats of an export, by name."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from recast_pl.inference.export.bank import Bank, export_bank
from recast_pl.inference.export.exported import Exported
from recast_pl.inference.export.models import export_onnx, export_safetensors, export_torch
from recast_pl.learning.patch import TaskPatch
from recast_pl.learning.router import Router
from recast_pl.learning.til_module import TILModule

ExportFormat = Literal["safetensors", "onnx", "torch_export", "onnx_bank", "web"]

_BITS = 4
"""Of each weight of the heads on a page, whose tasks are to be small."""


class Format(NamedTuple):
    """A format of an export.

    Args:
        make: Exports some tasks, the first of which is active, with a router and an opset as `export_bank` takes them.
        ending: Of the file.
        is_graph: Whether it is an ONNX graph.
        has_all: Whether it holds all tasks of a run, and not one.
        is_page: Whether it is a folder with a page.
    """

    make: Callable[[TILModule, Sequence[TaskPatch], Router | None, int | None], Bank]
    ending: str
    is_graph: bool = False
    has_all: bool = False
    is_page: bool = False


def _plain(export: Callable[[TILModule, TaskPatch], Exported]) -> Callable[..., Bank]:
    return lambda module, patches, router, opset: Bank(export(module, patches[0]))


def _onnx(module: TILModule, patches: Sequence[TaskPatch], router: Router | None, opset: int | None) -> Bank:
    return Bank(export_onnx(module, patches[0], opset), {patches[0].task: {}})


def _web(module: TILModule, patches: Sequence[TaskPatch], router: Router | None, opset: int | None) -> Bank:
    """A bank whose heads have few bits: of 4, unless the patches have stored others."""
    return export_bank(module, [p if p.rounded else p.compacted(_BITS) for p in patches], router, opset)


FORMATS: dict[ExportFormat, Format] = {
    "safetensors": Format(_plain(export_safetensors), ".safetensors"),
    "onnx": Format(_onnx, ".onnx", is_graph=True),
    "torch_export": Format(_plain(export_torch), ".pt2"),
    "onnx_bank": Format(export_bank, ".onnx", is_graph=True, has_all=True),
    "web": Format(_web, ".onnx", is_graph=True, has_all=True, is_page=True),
}
