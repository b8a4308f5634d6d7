"""A web server that can fail, and what tests of the catalogue share."""

import gzip
import multiprocessing
import re
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import numpy as np
import pytest
import torchvision.datasets
from fixtures_sets import make, md5, number_of

from recast_pl import SequentialTaskDataModule, TaskConfig
from recast_pl.cli import main
from recast_pl.data import download
from recast_pl.data.catalogue import CATALOGUE
from recast_pl.data.sources import open_source, prepare_source

SPLITS = ("train", "val", "test")


# the server


@dataclass
class Fault:
    """A fault of the answers to some requests.

    Args:
        times: Number of requests that it affects.
        status: HTTP status to send instead of the file; 0 to send the file.
        cut: Bytes of the body after which the connection ends; None for all.
        reset: Whether the connection ends as after a crash.
        ranges: Whether the server answers requests for a part of a file.
        length: Whether the server sends the length of the body.
        delay: Seconds before the answer.
    """

    times: int = 1_000_000
    status: int = 0
    cut: int | None = None
    reset: bool = False
    ranges: bool = True
    length: bool = True
    delay: float = 0.0


class Server:
    """Serves bytes by path on loopback, with faults, and records (path, Range header) of each request."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.requests: list[tuple[str, str | None]] = []
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        """Stops it and frees its port."""
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def fail(self, path: str, *faults: Fault) -> None:
        """Makes the next requests of a path fail, with one fault after the other."""
        self.faults[path] = [replace(fault) for fault in faults]

    def note(self, path: str, wanted: str | None) -> Fault:
        """Records a request, and returns the fault of its answer."""
        with self._lock:
            self.requests.append((path, wanted))
            faults = self.faults.get(path, [])
            if not faults:
                return Fault()
            faults[0].times -= 1
            return faults.pop(0) if not faults[0].times else faults[0]


class _Handler(BaseHTTPRequestHandler):
    owner: Server

    def do_GET(self) -> None:
        path, wanted = self.path.partition("?")[0], self.headers["Range"]
        fault = self.owner.note(path, wanted)
        time.sleep(fault.delay)
        content = self.owner.files.get(path)
        if fault.status or content is None:
            self.send_error(fault.status or 404)
            return
        begin = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and fault.ranges else None
        if begin is not None and begin >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = content[begin or 0 :]
        self.send_response(200 if begin is None else 206)
        if begin is not None:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        if fault.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: fault.cut])
        if fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.connection.close()

    def log_message(self, *words: object) -> None:
        pass


# the catalogue


@pytest.fixture
def server(monkeypatch):
    """A server on loopback; downloads do not pause between attempts."""
    monkeypatch.setattr(download, "PAUSE", 0)
    server = Server()
    yield server
    server.close()


@pytest.fixture
def publish(server, monkeypatch):
    """Replaces an entry of the catalogue by a tiny data set on the server; returns the paths of its files there."""

    def to_server(name, **contents):
        made, row, files = make(name), CATALOGUE[name], []
        for file in row.files:
            url = urlsplit(file.url)
            base = url.path.rpartition("/")[2]
            content = contents.get(base.partition(".")[0], made.downloads[base])
            server.files[url.path] = content
            address = server.url + url.path + (f"?{url.query}" if url.query else "")
            files.append(replace(file, url=address, md5=file.md5 and md5(content)))
        counts = dict(Counter(made.splits))
        row = replace(row, files=tuple(files), classes=len(made.classes), images=counts)
        monkeypatch.setitem(CATALOGUE, name, row)
        for attribute, value in (made.checks or {}).items():
            monkeypatch.setattr(getattr(torchvision.datasets, row.reader), attribute, value)
        return [urlsplit(file.url).path for file in files]

    return to_server


@pytest.fixture
def refused(capsys):
    """Runs a command that must fail, and returns the one line that it prints."""

    def run(*words):
        capsys.readouterr()
        assert main(list(map(str, words))) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("recast_pl: error: ")
        return lines[0]

    return run


def prepare(root, *names):
    return main(["data", "prepare", *names, "--image_size", "16", "--root", str(root)])


def verify(root, *names):
    return main(["data", "verify", *names, "--root", str(root)])


def put(root, tree):
    for name, content in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def tree_of(root):
    """All files below a folder except locks and decoded images."""
    files = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if not path.is_dir()}
    return {name: p.read_bytes() for name, p in files.items() if not re.match(r"cache/|\.\w+\.lock$", name)}


def stream(name, root, seed=42, **settings):
    return SequentialTaskDataModule((TaskConfig(name),), 16, 4, seed=seed, root=str(root), **settings)


def numbers(source):
    """The number of the picture that each image of a source shows."""
    return [number_of(source.images.decode(index, 32)) for index in range(len(source.labels))]


def split_numbers(name, root, **settings):
    """The numbers of the pictures in each split of a task."""
    data = stream(name, root, **settings)
    data.setup("fit")
    shown = np.array(numbers(open_source(TaskConfig(name), root)))
    return {split: shown[data.plain_dataloader(split).dataset.indices].tolist() for split in SPLITS}


def check_source(source, made):
    shown = numbers(source)
    assert sorted(shown) == list(range(len(made.labels)))  # every picture once
    assert source.labels.tolist() == [made.labels[number] for number in shown]
    assert list(source.splits) == [made.splits[number] for number in shown]
    assert list(source.classes) == made.classes


def prepare_twice_at_once(name, root):
    """Prepares a data set in two processes, and returns their exit codes."""
    context = multiprocessing.get_context("fork")  # which keeps the changed catalogue
    start = context.Barrier(2)

    def work():
        start.wait()
        prepare_source(TaskConfig("task", dataset=name), root)

    processes = [context.Process(target=work) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    return [process.exitcode for process in processes]


# a data set that torchvision downloads


def idx(array):
    """An array in MNIST's file format."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def digits(count, first):
    """Grey images (N, 28, 28) of one value each, and labels."""
    values = np.arange(first, first + count)
    images = np.broadcast_to(values[:, None, None], (count, 28, 28)).copy()
    images[:, :14] = 0  # the upper half is black
    return images, values % 10


def mnist():
    files = {}
    for part, (images, labels) in (("train", digits(80, 100)), ("t10k", digits(20, 200))):
        files |= {f"{part}-images-idx3-ubyte": idx(images), f"{part}-labels-idx1-ubyte": idx(labels)}
    return files


@pytest.fixture
def mnist_server(server, monkeypatch):
    packed = {f"{name}.gz": gzip.compress(content) for name, content in mnist().items()}
    server.files |= {f"/{name}": content for name, content in packed.items()}
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"{server.url}/"])
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", [(n, md5(c)) for n, c in packed.items()])
    return server
