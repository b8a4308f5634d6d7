"""ONNX graphs whose frozen weights take fewer bits.

    fp16    weights in half precision
    int8    w ≈ s·q with whole numbers q from −127 to 127, and a step s for each block of up to 64 neighbours in a row

Only how weights are stored changes. ONNX Runtime unpacks them once, when it loads the graph, and computes in single
precision: most weights of a bank depend on what a task has learnt, so that 8 bits of them are not known beforehand.
Low-rank corrections, heads, biases and statistics of normalisations stay in single precision.
"""

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from recast_pl.optional_imports import extra

GraphPrecision = Literal["fp32", "fp16", "int8"]
"""How a graph stores the frozen weights."""

_BLOCK = 64  # numbers that share a step, which then is 6 % of their bytes

_LEAST = 1024  # numbers of a weight that is worth it

_KEPT = ("head.", ".left", ".right")
"""Parts of names of what stays in single precision: heads, and the singular directions of low-rank corrections."""


def narrowed(content: bytes, precision: GraphPrecision) -> bytes:
    """An ONNX file in which the frozen weights are stored in another precision.

    Args:
        content: The file, with weights in single precision.
        precision: How to store them.
    """
    if precision == "fp32":
        return content
    onnx, store = extra("onnx", "export"), _half if precision == "fp16" else _whole
    model = onnx.load_from_string(content)
    graph, kept, nodes = model.graph, [], []
    for weight in graph.initializer:
        if weight.data_type != onnx.TensorProto.FLOAT or not _is_weight(weight.name, weight.dims):
            kept.append(weight)
            continue
        values = onnx.numpy_helper.to_array(weight)
        tensors, unpacking = store(onnx.helper, weight.name, values)
        kept += [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()]
        nodes += unpacking
    nodes += graph.node
    for field, items in ((graph.initializer, kept), (graph.node, nodes)):
        copies = [type(item).FromString(item.SerializeToString()) for item in items]
        del field[:]
        field.extend(copies)
    packed: bytes = model.SerializeToString()
    return packed


def _is_weight(name: str, shape: list[int]) -> bool:
    return len(shape) > 1 and math.prod(shape) >= _LEAST and not any(part in name for part in _KEPT)


def _half(helper: Any, name: str, values: NDArray[np.float32]) -> tuple[dict[str, NDArray[Any]], list[Any]]:
    """The tensors to store in place of a weight, and the nodes that make the weight of them."""
    limit = np.finfo(np.float16).max
    stored = {f"{name}:half": values.clip(-limit, limit).astype(np.float16)}
    return stored, [helper.make_node("Cast", [f"{name}:half"], [name], to=1)]  # 1 is single precision


def _whole(helper: Any, name: str, values: NDArray[np.float32]) -> tuple[dict[str, NDArray[Any]], list[Any]]:
    """The same for whole numbers."""
    codes, steps = rounded(values)
    parts: dict[str, NDArray[Any]] = {"codes": codes, "steps": steps, "shape": np.array(values.shape, dtype=np.int64)}
    names = {part: f"{name}:{part}" for part in (*parts, "wide", "blocks")}
    nodes = [
        helper.make_node("Cast", [names["codes"]], [names["wide"]], to=1),
        helper.make_node("Mul", [names["wide"], names["steps"]], [names["blocks"]]),
        helper.make_node("Reshape", [names["blocks"], names["shape"]], [name]),
    ]
    return {names[part]: array for part, array in parts.items()}, nodes


def rounded(values: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Whole numbers (blocks, size) and steps (blocks, 1) of a weight, whose rows consist of whole blocks."""
    rows = [math.prod(values.shape[axis:]) for axis in range(values.ndim - 1, 0, -1)]
    row = next((row for row in rows if row >= 8), values.size)
    size = max(size for size in range(1, _BLOCK + 1) if row % size == 0)
    blocks = values.reshape(-1, size)
    steps = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    steps[steps == 0] = 1
    return np.rint(blocks / steps).astype(np.int8), steps
