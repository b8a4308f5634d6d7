"""Files from the network: downloaded with resume, checked, and unpacked without trusting the archive."""

import gzip
import hashlib
import http.client
import shutil
import stat
import tarfile
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

from recast_pl.errors import DataError
from recast_pl.files import STORAGE_FAULTS

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
"""Endings of the files that `extract` unpacks."""

ATTEMPTS = 5

PAUSE = 1.0  # seconds before the second attempt, doubled before each further one

_TIMEOUT = 60.0  # seconds without a byte

_BLOCK = 1 << 20

_Advance = Callable[[int, int | None], None]  # takes the bytes that have arrived, and those of the file if known


def fetch(url: str, target: Path, md5: str | None) -> None:
    """Downloads a file, continuing where an earlier attempt stopped; does nothing but check if the file is there.

    While the file is incomplete it is called `target.part`, which stays if the connection fails for good.

    Args:
        url: Its address.
        target: Where to put it, once it is complete.
        md5: The published MD5 checksum; None if there is none.

    Raises:
        DataError: If it cannot be downloaded, or has another checksum.
    """
    if target.exists():
        _check_md5(target, md5, f"remove {target}, or replace it by the file from {url}")
        return
    part = target.with_name(target.name + ".part")
    resumed = part.exists()
    with Progress(*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn()) as progress:
        task = progress.add_task(target.name, total=None)
        _fetch_part(url, part, lambda done, total: progress.update(task, completed=done, total=total))
    try:
        _check_md5(part, md5, f"try again; if the error stays, the file at {url} has changed")
    except DataError:
        part.unlink()
        if not resumed:
            raise
        fetch(url, target, md5)  # the earlier part may have been of another file
        return
    part.replace(target)


def extract(archive: Path, folder: Path, wanted: str | None = None) -> list[Path]:
    """Unpacks an archive, into a temporary folder first, and returns the new places of its top-level entries.

    Args:
        archive: A tar or zip file.
        folder: Receives the top-level entries of the archive.
        wanted: An entry that the archive must have; None to accept any content.

    Raises:
        DataError: If the archive is damaged, lacks the wanted entry, or has members that are links, devices or
            outside of the folder. Then nothing is unpacked.
        OSError: If the folder cannot be written.
    """
    temporary = folder / f".{archive.name}.unpacked"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _unpack(archive, temporary)
        if wanted is not None and not (temporary / wanted).exists():
            raise DataError(f"{archive.name} does not contain {wanted!r}, which is needed at {folder / wanted}")
        return move_into(folder, temporary)
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError) as cause:
        raise DataError(f"cannot unpack {archive} into {folder} ({cause}); remove the archive and try again") from cause
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_into(folder: Path, temporary: Path) -> list[Path]:
    """Moves the content of a temporary folder into another one, and returns its new places.

    A file that is there already stays. Moved files get the permissions that the user's umask gives to new files,
    whatever their archive says.

    Raises:
        DataError: If a folder of the same name is there; then nothing is moved.
    """
    entries = {entry: folder / entry.name for entry in sorted(temporary.iterdir())}
    for place in entries.values():
        if place.is_dir():
            raise DataError(f"{place} exists and is not complete; move it away and try again")
    mode = stat.S_IMODE(temporary.stat().st_mode)  # of a new folder, which tells the umask
    for path in temporary.rglob("*"):
        if not path.is_symlink():
            path.chmod(mode if path.is_dir() else mode & 0o666)
    folder.mkdir(parents=True, exist_ok=True)
    return [entry.replace(place) for entry, place in entries.items() if not place.exists()]


def _fetch_part(url: str, part: Path, advance: _Advance) -> None:
    for attempt in range(ATTEMPTS):
        time.sleep(PAUSE * 2 ** (attempt - 1) if attempt else 0)
        try:
            _append(url, part, advance)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                part.unlink(missing_ok=True)  # it is longer than the file: start again
            elif error.code < 500 and error.code != http.HTTPStatus.TOO_MANY_REQUESTS:
                raise DataError(
                    f"cannot download {url}: HTTP {error.code} {error.reason}; if it has moved, put the file at "
                    f"{part.with_suffix('')} yourself"
                ) from error
            failure: Exception = error
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in STORAGE_FAULTS:  # of the disk, not of the network
                raise
            failure = error
        else:
            return
    kept = f"{part.stat().st_size:,} bytes are kept in {part}; " if part.exists() else ""
    raise DataError(
        f"cannot download {url} ({failure}) in {ATTEMPTS} attempts; {kept}run the command again"
    ) from failure


def _append(url: str, part: Path, advance: _Advance) -> None:
    """Downloads what the part lacks; raises OSError if the connection ends before the file does."""
    start = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "recast_pl", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT) as response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            start = 0  # the server sends the file from its beginning
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab" if start else "wb") as file:
            while block := response.read(_BLOCK):
                file.write(block)
                advance(file.tell(), total)
            end = file.tell()
    if total is not None and end < total:
        raise ConnectionError(f"the connection was cut after {end:,} of {total:,} bytes")


def _check_md5(path: Path, md5: str | None, remedy: str) -> None:
    if md5 is None:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != md5:
        raise DataError(
            f"{path.name.removesuffix('.part')} has checksum {found} rather than the published {md5}; {remedy}"
        )


def _unpack(archive: Path, folder: Path) -> None:
    if archive.name.endswith(".zip"):
        with zipfile.ZipFile(archive) as packed:
            for item in packed.infolist():
                kind = stat.S_IFMT(item.external_attr >> 16)
                _check_member(archive, item.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
                packed.extract(item, folder)
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            _check_member(archive, member.name, member.isreg() or member.isdir())
            tar.extract(member, folder, filter="data")


def _check_member(archive: Path, name: str, is_plain: bool) -> None:
    """Refuses a member that is not a plain file or folder, or lies outside of the archive's folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    if is_plain and not path.is_absolute() and ".." not in path.parts:
        return
    fault = "lies outside of its folder" if is_plain else "is a link or a device"
    raise DataError(f"{archive.name} is not safe to unpack: its member {name!r} {fault}; do not use it")
