"""The compact file of a patch: a fixed header, short metadata, and tensors without names for each.

safetensors describes every tensor in JSON and pads it, which is more than the coefficients of a task take. This
container needs nothing but the standard library. All numbers are little-endian:

    4    `RCST`
    1    version of the format: 1
    1    bits per weight of the head: 8, 4 or 2
    4    bytes of the metadata
    32   SHA-256 of the base
    24   mean and standard deviation of the channels, 3 + 3 numbers in single precision
    …    metadata: JSON in raw deflate, a list of task, classes, method, image size, metrics, D, and for each piece a
         list of its tensors, each as [name, type, *shape]
    …    tensors: codes, steps and bias of the head, then those of the pieces in the order of the metadata
    32   SHA-256 of all bytes before
"""

import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recast_pl.errors import PatchError, one_line
from recast_pl.files import sha256
from recast_pl.learning.quantization import RoundedHead
from recast_pl.methods.rounding import pack_codes, packed_width, unpack_codes

_MAGIC, _VERSION = b"RCST", 1

_HEADER = struct.Struct("<4sBBI32s6f")

_CHECKSUM = 32  # bytes

_MOST_METADATA = 2**24  # bytes when inflated, so that a small file cannot fill the memory

_MOST_NUMBERS, _MOST_DIMENSIONS = 2**40, 8  # of a tensor; torch fails on more, whatever the size of the file

_IN_JSON = ("task", "classes", "method", "image_size", "metrics")

_TYPES = {"f2": torch.float16, "f4": torch.float32, "u1": torch.uint8, "i4": torch.int32, "i8": torch.int64}

_NAMES = {dtype: name for name, dtype in _TYPES.items()}

_ENOUGH = 1e-3  # relative error that half precision may have; numbers in its range have less than half of that

Content = tuple[dict[str, Any], RoundedHead, list[dict[str, Tensor]]]
"""The facts of a patch by name, its head, and the state of each piece."""


def narrowed(tensor: Tensor) -> Tensor:
    """A tensor in the type that the file keeps: fractions in half precision, or in single where that is too coarse."""
    if not tensor.is_floating_point():
        return tensor
    half, exact = tensor.half(), tensor.double()
    fits = bool(half.isfinite().all()) and (half.double() - exact).norm() <= _ENOUGH * exact.norm()
    return half if fits else tensor.float()


def stored_tensors(head: RoundedHead, pieces: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """All tensors as they are in the file, in order, by name."""
    codes = pack_codes(head.codes, head.bits)
    stored = {"head/0/codes": codes, "head/0/steps": head.steps, "head/0/bias": head.bias}
    states = {f"pieces/{i}/{name}": state[name] for i, state in enumerate(pieces) for name in sorted(state)}
    return stored | {name: narrowed(tensor) for name, tensor in states.items()}


def pack_compact(facts: Mapping[str, Any], head: RoundedHead, pieces: Sequence[Mapping[str, Tensor]]) -> bytes:
    """The content of a compact file; equal patches give equal bytes.

    Args:
        facts: All facts of the patch by name.
        head: Its head.
        pieces: The state of each piece.
    """
    stored = stored_tensors(head, pieces)
    states = [[_describe(name, stored[f"pieces/{i}/{name}"]) for name in sorted(s)] for i, s in enumerate(pieces)]
    listed = [*(facts[name] for name in _IN_JSON), head.codes.shape[1], states]
    text = json.dumps(listed, allow_nan=False, separators=(",", ":")).encode()
    metadata = zlib.compress(text, 9, -zlib.MAX_WBITS)
    base = bytes.fromhex(facts["base"])
    header = _HEADER.pack(_MAGIC, _VERSION, head.bits, len(metadata), base, *facts["mean"], *facts["std"])
    content = header + metadata + b"".join(map(_to_bytes, stored.values()))
    return content + bytes.fromhex(sha256(content))


def is_compact(path: Path) -> bool:
    """Whether a file exists and begins like a compact patch."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def read_compact(path: Path) -> Content:
    """Reads a file that `pack_compact` made; the facts are not checked.

    Raises:
        PatchError: If the file is damaged, or was written by another version.
    """
    try:
        content = path.read_bytes()
        version = content[len(_MAGIC)]
        if version != _VERSION:
            raise PatchError(f"{path} is a compact patch of format {version}, not {_VERSION}; check the path")
        if content[-_CHECKSUM:].hex() != sha256(content[:-_CHECKSUM]):
            raise PatchError(f"{path} is damaged (its checksum is wrong); create it again")
        return _unpack(content[:-_CHECKSUM])
    except (OSError, struct.error, zlib.error, ValueError, KeyError, IndexError, TypeError, RecursionError) as cause:
        raise PatchError(f"{path} is incomplete or damaged ({one_line(cause)}); create it again") from cause


def _unpack(content: bytes) -> Content:
    """Raises ValueError and others if the content is wrong; sizes are checked before memory is taken."""
    _, _, bits, length, base, *colours = _HEADER.unpack_from(content)
    start = _HEADER.size + length
    *listed, features, states = json.loads(_inflate(content[_HEADER.size : start]))
    facts = dict(zip(_IN_JSON, listed, strict=True)) | {"base": base.hex(), "mean": colours[:3], "std": colours[3:]}
    if bits not in (8, 4, 2):
        raise ValueError(f"the head has {bits} bits per weight")
    classes = len(facts["classes"])
    kinds = [(torch.uint8, (classes, packed_width(features, bits))), (torch.bfloat16, (classes,))]
    kinds.append((torch.float32, (classes,)))
    kinds += [(_TYPES[kind], tuple(shape)) for state in states for _, kind, *shape in state]
    tensors = iter(_read(content[start:], kinds))
    codes, steps, bias = (next(tensors) for _ in range(3))
    pieces = [{name: next(tensors) for name, *_ in state} for state in states]
    named = all(isinstance(name, str) for piece in pieces for name in piece)
    if not named or any(len(piece) != len(state) for piece, state in zip(pieces, states, strict=True)):
        raise ValueError("a tensor has no name, or that of another")
    return (
        facts,
        RoundedHead(bits, unpack_codes(codes, features, bits).to(torch.int8), steps, bias),
        [
            {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in piece.items()}
            for piece in pieces
        ],
    )


def _read(content: bytes, kinds: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> list[Tensor]:
    """Tensors of these types and shapes, which must be exactly the content."""
    for _, shape in kinds:
        whole = len(shape) <= _MOST_DIMENSIONS and all(type(size) is int and size >= 0 for size in shape)
        if not whole or math.prod(max(1, size) for size in shape) > _MOST_NUMBERS:
            raise ValueError(f"a tensor has the shape {str(shape)[:80]}")
    sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in kinds]
    if sum(sizes) != len(content):
        raise ValueError(f"it holds {len(content)} bytes of tensors, not {sum(sizes)}")
    tensors, start = [], 0
    for (dtype, shape), size in zip(kinds, sizes, strict=True):
        part = bytearray(content[start : start + size])  # torch wants memory that may be written to
        flat = torch.frombuffer(part, dtype=dtype) if size else torch.empty(0, dtype=dtype)
        tensors.append(flat.reshape(shape))
        start += size
    return tensors


def _describe(name: str, tensor: Tensor) -> list[Any]:
    if tensor.dtype not in _NAMES:
        raise PatchError(f"{name!r:.80} has the type {tensor.dtype}, which compact patches do not have")
    return [name, _NAMES[tensor.dtype], *tensor.shape]


def _to_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _inflate(content: bytes) -> bytes:
    decoder = zlib.decompressobj(-zlib.MAX_WBITS)
    text = decoder.decompress(content, _MOST_METADATA)
    if not decoder.eof or decoder.unused_data:
        raise ValueError("the metadata is cut off, too long, or followed by something else")
    return text
