"""Reads and writes files that are either complete or absent: atomic writes, checksums and locks."""

import errno
import hashlib
import json
import os
import secrets
import stat
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO
from uuid import uuid4

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from recast_pl.errors import RecastError, StorageError
from recast_pl.terminal import open_console

_FAULTS = "ENOSPC EDQUOT EFBIG EACCES EPERM EROFS ENOTDIR EISDIR ENOENT EEXIST ELOOP ENAMETOOLONG EBUSY ENXIO EIO"

STORAGE_FAULTS = frozenset(getattr(errno, name) for name in _FAULTS.split() if hasattr(errno, name))
"""Error numbers of a failed write that the user can fix, such as a full disk."""

STANDARD_OUTPUT = "-"
"""The name of standard output where a command takes the name of an output file."""

_PART = ".part"  # suffix of a file that is being written

_METADATA_KEY = "recast_pl"  # a single key, because safetensors keeps several keys in no fixed order


def write_atomic(path: str | Path, content: bytes | str | Iterable[str]) -> None:
    """Writes a file atomically: readers see the old content or the new content, even after a crash, never a part.

    Symbolic links are followed, and a file that exists keeps its permissions. Pipes, devices and the streams of this
    process, such as `/dev/stdout`, cannot be replaced: they are written directly.

    Args:
        path: The file; `-` is standard output. Missing folders are created.
        content: Bytes, or text to encode as UTF-8, also in parts, which are written as they come. In names of files
            that are not UTF-8, bytes stay what they are.

    Raises:
        StorageError: If the disk is full or writing is not allowed; the old content stays.
    """
    path, parts = Path(path), _encoded(content)
    with writing(path):
        stream = _find_stream(path)
        if stream is not None:
            _write_stream(stream, parts)
        elif path.exists() and not path.is_file():
            with path.open("wb") as file:
                file.writelines(parts)
        else:
            _replace(Path(os.path.realpath(path)), parts)


def write_once(path: Path, content: bytes) -> bool:
    """Writes a file unless it exists; if several processes try at the same time, one of them succeeds.

    Returns:
        Whether the file has this content now.

    Raises:
        StorageError: If the file cannot be written.
    """
    draft = path.with_name(f".{uuid4().hex}{_PART}")
    write_atomic(draft, content)
    with writing(path):
        try:
            path.hardlink_to(draft)  # unlike a rename, it fails if the path exists
        except OSError:
            if not path.exists():  # the file system has no hard links
                draft.replace(path)
        draft.unlink(missing_ok=True)
    return path.read_bytes() == content


def is_standard_output(path: str | Path) -> bool:
    """Whether `write_atomic` would write to standard output, so that messages must go elsewhere."""
    return _find_stream(Path(path)) is sys.stdout


def _encoded(content: bytes | str | Iterable[str]) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
    else:
        for part in [content] if isinstance(content, str) else content:
            yield part.encode(errors="surrogateescape")


def _find_stream(path: Path) -> TextIO | None:
    """Standard output or standard error, if the path is a name of it; None otherwise."""
    if str(path) == STANDARD_OUTPUT:
        return sys.stdout
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # such as a notebook's stream, which is not a file
            if os.path.samestat(path.stat(), os.fstat(stream.fileno())):
                return stream
    return None


def _write_stream(stream: Any, parts: Iterable[bytes]) -> None:
    """Writes bytes to a text stream, after the text that it holds."""
    try:
        stream.flush()
        try:
            descriptor = stream.fileno()
        except (OSError, ValueError, AttributeError):  # a notebook's stream takes text only
            stream.write(b"".join(parts).decode(errors="replace"))
        else:
            # not the stream itself, which may write a part only if it is unbuffered
            with open(descriptor, "wb", closefd=False) as file:
                file.writelines(parts)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        open_console().on_broken_pipe()


def _replace(path: Path, parts: Iterable[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
    temporary = path.with_name(f".{secrets.token_hex(8)}{_PART}")  # not tempfile, whose files do not follow the umask
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode)
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            with suppress(PermissionError):  # some file systems have no permissions
                temporary.chmod(mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Converts an OSError into a StorageError that names the path and the cause.

    Args:
        path: The file or folder that the block writes.

    Raises:
        StorageError: If the block fails with one of `STORAGE_FAULTS`.
    """
    try:
        yield
    except OSError as cause:
        if cause.errno not in STORAGE_FAULTS:
            raise
        raise StorageError(
            f"cannot write {path} ({cause}); free some space, allow writing there, or choose another folder; "
            "everything that was finished is kept"
        ) from cause


def remove_unfinished(folder: Path) -> None:
    """Removes the temporary files that a killed `write_atomic` left in a folder, where nobody may be writing now."""
    for part in folder.rglob(f".*{_PART}"):
        part.unlink(missing_ok=True)


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Lets one process at a time run the block; the others print a message and wait.

    Args:
        path: The lock file.
        what: What the block does, for the message.

    Raises:
        OSError: If the lock file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        open_console(stderr=True).print(f"waiting for another process: {what}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def json_text(content: Any) -> str:
    """Returns indented JSON for a file; refuses NaN, which JSON does not have."""
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def read_json(path: Path, error: type[RecastError], **entries: type) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Args:
        path: The file.
        error: The type of error to raise.
        entries: Required entries and their types.

    Raises:
        RecastError: (as `error`) If the file is missing or damaged, or an entry is missing or has another type.
    """
    try:
        content = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as cause:
        raise error(f"cannot read {path} ({cause}); restore it") from cause
    for name, kind in entries.items():
        if not isinstance(content.get(name), kind):
            raise error(f"{path} is damaged ({name!r} is missing or not of type {kind.__name__}); restore it")
    return content


def sealed_json(content: Mapping[str, Any]) -> str:
    """Returns JSON for a file, with a checksum of its content."""
    return json_text({**content, "checksum": sha256(_json(content).encode())})


def read_sealed_json(path: Path, error: type[RecastError]) -> dict[str, Any]:
    """Reads a file that `sealed_json` made.

    Args:
        path: The file.
        error: The type of error to raise.

    Raises:
        RecastError: (as `error`) If the file is missing or its content has changed.
    """
    content = read_json(path, error)
    checksum = content.pop("checksum", None)
    if checksum != sha256(_json(content).encode()):
        raise error(f"{path} is damaged (its checksum is wrong); restore it")
    return content


def pack_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """Returns the bytes of a safetensors file with a checksum; equal content gives equal bytes.

    Args:
        tensors: Tensors by name, on any device and of any layout.
        metadata: Anything that JSON can hold.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    sealed = {**metadata, "checksum": _checksum(contiguous, metadata)}
    return save(contiguous, metadata={_METADATA_KEY: _json(sealed)})


def read_tensors(path: str | Path, error: type[RecastError]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a file that `pack_tensors` made.

    Args:
        path: The file.
        error: The type of error to raise.

    Returns:
        The tensors by name, and the metadata.

    Raises:
        RecastError: (as `error`) If the file is missing, damaged or from another program.
    """
    path = Path(path)
    if not path.is_file():
        raise error(f"{path} does not exist; check the path")
    if any("\ud800" <= character <= "\udfff" for character in str(path)):
        raise error(f"{path} has a name that is not UTF-8, which safetensors cannot open; rename it")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(json.loads((file.metadata() or {})[_METADATA_KEY]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        intact = metadata.pop("checksum") == _checksum(tensors, metadata)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as cause:
        raise error(f"{path} is damaged or was not written by recast_pl ({cause}); create it again") from cause
    if not intact:
        raise error(f"{path} is damaged (its checksum is wrong); create it again")
    return tensors, metadata


def is_whole_checkpoint(path: Path) -> bool:
    """Returns whether a checkpoint can be read and all of its parts match their checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            # testzip ignores these two fields, but torch would load garbage from a member of wrong size or a folder
            stored = all(m.compress_size == m.file_size and not m.external_attr for m in archive.infolist())
            if not stored or archive.testzip() is not None:
                return False
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        return False
    return True


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Computes the SHA-256 of the names, types, shapes and bits of tensors, in order of name.

    Args:
        tensors: Tensors by name, on any device.

    Returns:
        64 hexadecimal digits, equal for equal tensors on every machine.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(np.ascontiguousarray(flat.view(torch.uint8).numpy()).data)
    return digest.hexdigest()


def sha256(content: bytes) -> str:
    """Returns the SHA-256 of bytes as 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    return sha256(f"{_json(metadata)}\n{fingerprint(tensors)}".encode())


def _json(content: Any) -> str:
    return json.dumps(content, sort_keys=True, allow_nan=False)
