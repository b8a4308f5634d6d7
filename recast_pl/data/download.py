"""Files from the network: fetched with resume, checked, and unpacked without trust."""

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from recast_pl.errors import DataError
from recast_pl.files import STORAGE_FAULTS

ATTEMPTS = 5

PAUSE = 1.0  # seconds before the second attempt, doubled before each further one

_TIMEOUT = 60.0  # seconds without a byte

_BLOCK = 1 << 20

_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")


def is_archive(name: str) -> bool:
    """Whether `extract` unpacks a file of that name."""
    return name.endswith(_ARCHIVES)


def fetch(url: str, target: Path, md5: str | None) -> None:
    """Downloads a file, going on where an earlier attempt was cut off; does nothing if the file is there.

    What has arrived is kept in `target.part` when the connection fails for good, and goes when it is wrong.

    Args:
        url: Its address.
        target: Where to put it; in place only when it is whole.
        md5: Its MD5 checksum as published; None if none is.

    Raises:
        DataError: If it cannot be had, or is not what was published.
    """
    if target.exists():
        _check_md5(target, md5, f"remove {target}, or replace it by the file from {url}")
        return
    part = target.with_name(target.name + ".part")
    resumed = part.exists()
    with _progress(target.name) as advance:
        _fetch_part(url, part, advance)
    try:
        _check_md5(part, md5, f"try again; if it stays so, the file at {url} has changed")
    except DataError:
        part.unlink()
        if not resumed:
            raise
        fetch(url, target, md5)  # the kept part may have been of another file
        return
    part.replace(target)


def extract(archive: Path, folder: Path, wanted: str | None = None) -> list[Path]:
    """Unpacks an archive into a folder: into a temporary one first, so that what is in place is whole.

    Args:
        archive: A tar or zip file.
        folder: Gets the top-level entries of the archive.
        wanted: An entry that the archive must have; None for any content.

    Returns:
        The entries' new places.

    Raises:
        DataError: If the archive is damaged, lacks the wanted entry, or has members that are links, devices or
            outside of the folder; then nothing is unpacked.
        OSError: If the disk is full or must not be written.
    """
    temporary = folder / f".{archive.name}.unpacked"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        unpack = _unpack_zip if archive.name.endswith(".zip") else _unpack_tar
        unpack(archive, temporary)
        if wanted is not None and not (temporary / wanted).exists():
            raise DataError(f"{archive.name} does not hold {wanted!r}, so that there would be no {folder / wanted}")
        return move_into(folder, temporary)
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError) as cause:
        raise DataError(f"cannot unpack {archive} into {folder} ({cause}); remove the archive and try again") from cause
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_into(folder: Path, temporary: Path) -> list[Path]:
    """Moves what a temporary folder holds into another; a file that is there already stays.

    Returns:
        The new places.

    Raises:
        DataError: If a folder of the same name is there; then nothing is moved.
    """
    entries = {entry: folder / entry.name for entry in sorted(temporary.iterdir())}
    for place in entries.values():
        if place.is_dir():
            raise DataError(f"{place} exists and is not complete; move it away and try again")
    folder.mkdir(parents=True, exist_ok=True)
    return [entry.replace(place) for entry, place in entries.items() if not place.exists()]


def _fetch_part(url: str, part: Path, advance: Callable[[int, int | None], None]) -> None:
    for attempt in range(ATTEMPTS):
        time.sleep(PAUSE * 2 ** (attempt - 1) if attempt else 0)
        try:
            _append(url, part, advance)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                part.unlink(missing_ok=True)  # longer than the file: begin anew
            elif error.code < 500 and error.code != http.HTTPStatus.TOO_MANY_REQUESTS:
                raise DataError(
                    f"cannot download {url}: HTTP {error.code} {error.reason}; if it has moved, put the file at "
                    f"{part.with_suffix('')} yourself"
                ) from error
            failure: Exception = error
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in STORAGE_FAULTS:  # not the network's
                raise
            failure = error
        else:
            return
    kept = f"{part.stat().st_size:,} bytes are kept in {part}; " if part.exists() else ""
    raise DataError(
        f"cannot download {url} ({failure}) in {ATTEMPTS} attempts; {kept}run the command again"
    ) from failure


def _append(url: str, part: Path, advance: Callable[[int, int | None], None]) -> None:
    """Downloads what the part lacks.

    Raises:
        OSError: If the connection ends before the file does.
    """
    had = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "recast_pl", "Accept-Encoding": "identity"} | ({"Range": f"bytes={had}-"} if had else {})
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT) as response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            had = 0  # the server sends all of it
        length = response.headers.get("Content-Length")
        total = None if length is None else had + int(length)
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab" if had else "wb") as file:
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


def _unpack_tar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in tar:
            if not (member.isreg() or member.isdir()):
                raise DataError(
                    f"{archive.name} holds {member.name!r}, a link or a device, which is refused; do not use it"
                )
            _check_inside(archive, member.name)
            tar.extract(member, folder, filter=_without_mode)


def _without_mode(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    """Filters like `tarfile.data_filter`, but lets the umask decide the permissions instead of the archive."""
    return tarfile.data_filter(member, folder).replace(mode=None, deep=False)  # type: ignore[arg-type]


def _unpack_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise DataError(
                    f"{archive.name} holds {member.filename!r}, a link or a device, which is refused; do not use it"
                )
            _check_inside(archive, member.filename)
            file.extract(member, folder)


def _check_inside(archive: Path, name: str) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{archive.name} holds {name!r}, which is outside of its folder and refused; do not use it")


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int | None], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
