"""ONNX graphs: tracing a network into one, and running it."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recast_pl.errors import ExportError
from recast_pl.inference.export.exported import tracing
from recast_pl.optional_imports import extra

_BYTES = 2**31 - 2**20
"""Bytes of weights that fit into an ONNX file, whose limit is 2 GiB with the graph."""

_OLDEST, _NEWEST = 18, 23
"""The opsets that PyTorch can write."""


@torch.no_grad()
def trace(
    network: nn.Module,
    inputs: dict[str, Tensor],
    shapes: dict[str, Any],
    outputs: list[str],
    facts: Mapping[str, Any],
    opset: int | None,
) -> bytes:
    """Traces a network into an ONNX file.

    Args:
        network: Its forward pass has the inputs as named arguments.
        inputs: Example of each input.
        shapes: For each input the dimensions that may have any length.
        outputs: Names of the outputs.
        facts: The metadata.
        opset: Version of ONNX's operators; None for that of PyTorch's exporter.

    Raises:
        ExportError: If the network cannot be traced, is too large for a file, or the opset is not one of PyTorch's.
    """
    extra("onnx", "export"), extra("onnxscript", "export")
    if opset is not None and not _OLDEST <= opset <= _NEWEST:
        raise ExportError(f"--opset {opset} must be from {_OLDEST} to {_NEWEST}")
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    if size > _BYTES:
        raise ExportError(f"{size / 1e9:.1f} GB of weights are too many for an ONNX file; choose torch_export")
    with tracing():
        program: Any = torch.onnx.export(
            network,
            kwargs=inputs,
            dynamic_shapes=shapes,
            output_names=outputs,
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    texts = {name: fact if isinstance(fact, str) else json.dumps(fact) for name, fact in facts.items()}
    program.model.metadata_props.update(texts)
    model = program.model_proto
    for node in model.graph.node:  # where in the code of PyTorch it comes from, which no reader needs
        del node.metadata_props[:]
        node.doc_string = ""
    content: bytes = model.SerializeToString()
    return content


class Session:
    """A graph in ONNX Runtime, on one core, as on a small device.

    Args:
        content: The file.
    """

    def __init__(self, content: bytes) -> None:
        runtime = extra("onnxruntime", "export")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits (B, classes) of a graph's inputs."""
        (logits,) = self._session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})
        return torch.from_numpy(logits)
