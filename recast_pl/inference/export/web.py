"""A folder with a page that classifies images in the browser, for any static host: nothing is sent anywhere."""

import hashlib
import json
import os
import tarfile
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path

from recast_pl.data.download import fetch
from recast_pl.errors import DataError, ExportError, one_line
from recast_pl.files import sha256
from recast_pl.inference.export.exported import preprocessing
from recast_pl.learning.patch import TaskPatch

_PAGE = Path(__file__).with_name("page")

_WORKER = "worker.js"

_VERSION = "1.22.0"

_SHA256 = "e293551f9d36d003e293d0f2937fee7b3dfdcef76d71d1449b55e2d4157c7aea"

_MIRROR = "npm_config_registry"
"""Environment variable with the address of an npm registry, as npm itself reads it."""

_RUNTIME = {  # not .mjs, which some hosts do not know as a script
    "ort.js": "package/dist/ort.wasm.min.js",
    "ort-wasm.js": "package/dist/ort-wasm-simd-threaded.mjs",
    "ort-wasm.wasm": "package/dist/ort-wasm-simd-threaded.wasm",
}
"""The files of onnxruntime-web that the page needs, by their names beside it."""


def page_files(bank: Mapping[str, bytes], patch: TaskPatch, cache: Path) -> dict[str, bytes]:
    """The files of the page beside the graph, the tasks and the router, by name.

    Args:
        bank: The graph `bank.onnx` and the safetensors files of tasks and router, by name.
        patch: One of the tasks.
        cache: Folder that keeps the package onnxruntime-web, which is downloaded once.

    Raises:
        ExportError: If the package cannot be downloaded, or is not the published one.
    """
    names = [name for name in bank if name.endswith(".safetensors")]
    about = {"files": names, "base": patch.base, "resize": preprocessing(patch)["resize"]}
    page = {path.name: path.read_bytes() for path in sorted(_PAGE.iterdir()) if path.is_file()}
    page |= {"tasks.json": json.dumps(about).encode()} | _runtime(cache)
    page[_WORKER] = _with_checksums(page.pop(_WORKER), {**bank, **page})
    return page


def _with_checksums(worker: bytes, files: Mapping[str, bytes]) -> bytes:
    """The worker that keeps files in the browser, which takes no others than these.

    A browser that sees a worker of other bytes fetches the files again.
    """
    sums = {name: f"sha256-{b64encode(hashlib.sha256(content).digest()).decode()}" for name, content in files.items()}
    listed = json.dumps(sums)
    return f'const VERSION = "{sha256(listed.encode())}", FILES = {listed};\n'.encode() + worker


def _runtime(cache: Path) -> dict[str, bytes]:
    """The files of onnxruntime-web by their names beside the page."""
    registry = os.environ.get(_MIRROR, "https://registry.npmjs.org").rstrip("/")
    archive = cache / f"onnxruntime-web-{_VERSION}.tgz"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        fetch(f"{registry}/onnxruntime-web/-/{archive.name}", archive, None)
    except (DataError, OSError) as cause:
        raise ExportError(
            f"the page needs onnxruntime-web {_VERSION}, which cannot be downloaded ({one_line(cause)}); put "
            f"{archive.name} of the npm registry into {cache}, or set {_MIRROR} to a mirror"
        ) from cause
    if sha256(archive.read_bytes()) != _SHA256:
        raise ExportError(f"{archive} is not the published onnxruntime-web {_VERSION}; remove it and try again")
    with tarfile.open(archive) as package:
        return {name: _read(package, member) for name, member in _RUNTIME.items()}


def _read(package: tarfile.TarFile, member: str) -> bytes:
    file = package.extractfile(member)
    assert file is not None  # the checksum is that of a package that has it
    return file.read()
