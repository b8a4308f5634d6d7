"""Measures a server under load: good clients, and among them slow readers, broken uploads and bombs.

    uv run python benchmarks/load.py logs/mine IMAGE … --clients 200 --seconds 60

One client in five is bad, in turn: it reads its answer one byte a second; sends half an image and leaves; sends a
truncated JPEG; a PNG that claims 60,000 x 60,000 pixels; a JPEG of 1,300 scans. A good client sends an image, waits for
the answer, checks its class, and sends the next; where the server asks to try again, because it is full (503) or too
slow for the time limit (504), it does. It is lost if it gets no answer, another error or another class. Times of good
requests hold these repetitions. Memory and seconds of the processor are those of the server with the processes that
decode.
"""

import argparse
import asyncio
import contextlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import numpy as np
from PIL import Image

import recast_pl

Action = Callable[[aiohttp.ClientSession, int], Awaitable[None]]

_LONGEST = 120  # seconds until a request without an answer is lost


@dataclass
class Counts:
    """Seconds of good requests, how many of them were tried again by status, what was lost, and bad ones by kind."""

    seconds: list[float] = field(default_factory=list)
    again: Counter[int] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    bad: Counter[str] = field(default_factory=Counter)


def png_of_a_large_size() -> bytes:
    """A small PNG whose header claims 60,000 x 60,000 pixels."""
    Image.new("L", (8, 8)).save(content := io.BytesIO(), "PNG")
    start, size = content.getvalue(), (60_000).to_bytes(4, "big")
    header = b"IHDR" + size + size + start[24:29]
    return start[:12] + header + zlib.crc32(header).to_bytes(4, "big") + start[33:]


def jpeg_of_scans(count: int = 1300, side: int = 7000) -> bytes:
    """A progressive JPEG of 7,000 x 7,000 pixels that repeats its last scan."""
    Image.new("L", (side, side), 90).save(content := io.BytesIO(), "JPEG", progressive=True)
    start, *scans = content.getvalue().removesuffix(b"\xff\xd9").split(b"\xff\xda")
    return b"\xff\xda".join([start, *scans, *[scans[-1]] * (count - len(scans))]) + b"\xff\xd9"


def head(url: str, task: str, length: int) -> bytes:
    """The head of a request that sends an image of some bytes."""
    lines = [f"POST /predict?task={task} HTTP/1.1", f"Host: {urlsplit(url).netloc}", "Content-Type: image/jpeg"]
    return "\r\n".join([*lines, f"Content-Length: {length}", "Connection: close", "", ""]).encode()


class Load:
    """Clients of a server.

    Args:
        url: Its address.
        task: Name of the task that is asked.
        images: Contents of images, and the class of each.
        seconds: How long the clients begin new requests.
    """

    def __init__(self, url: str, task: str, images: Sequence[tuple[bytes, str]], seconds: float) -> None:
        self.url, self.task, self.images = url, task, images
        self.end, self.counts = time.monotonic() + seconds, Counts()
        half = images[0][0][: len(images[0][0]) // 2]
        self.bombs = {"large png": png_of_a_large_size(), "many scans": jpeg_of_scans(), "truncated": half}

    async def run(self, clients: int) -> None:
        """Lets the clients work until the time is over."""
        bad = itertools.cycle([self.read_slowly, self.leave, *(self.bomb_of(kind) for kind in self.bombs)])
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(_LONGEST)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            work = [self.repeat(next(bad) if k % 5 == 4 else self.good, session, k) for k in range(clients)]
            await asyncio.gather(*work)

    async def repeat(self, action: Action, session: aiohttp.ClientSession, start: int) -> None:
        """Does the same again and again."""
        for count in itertools.count(start):
            if time.monotonic() > self.end:
                return
            await action(session, count)

    async def post(self, session: aiohttp.ClientSession, content: bytes) -> tuple[int, Mapping[str, object], float]:
        """Status, answer, and seconds after which to try again."""
        address, headers = f"{self.url}/predict?task={self.task}", {"Content-Type": "image/jpeg"}
        async with session.post(address, data=content, headers=headers) as response:
            return response.status, await response.json(), float(response.headers.get("Retry-After", 0))

    async def good(self, session: aiohttp.ClientSession, count: int) -> None:
        """A request that must be answered."""
        content, label = self.images[count % len(self.images)]
        start = time.monotonic()
        while True:
            try:
                status, answer, wait = await self.post(session, content)
            except (aiohttp.ClientError, TimeoutError) as cause:
                self.counts.lost.append(repr(cause))
                return
            if status not in (503, 504):
                break
            self.counts.again[status] += 1
            await asyncio.sleep(wait or 1)
        if status == 200 and answer["label"] == label:
            self.counts.seconds.append(time.monotonic() - start)
        else:
            self.counts.lost.append(f"{status} {answer}")

    def bomb_of(self, kind: str) -> Action:
        """A client that sends a file which costs much, or cannot be read."""

        async def send(session: aiohttp.ClientSession, count: int) -> None:
            try:
                answer, _, _ = await self.post(session, self.bombs[kind])
            except (aiohttp.ClientError, TimeoutError) as cause:
                self.counts.bad[f"{kind}: {type(cause).__name__}"] += 1
            else:
                self.counts.bad[f"{kind}: {answer}"] += 1
            await asyncio.sleep(1)

        return send

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection with a small buffer for answers."""
        address = urlsplit(self.url)
        return await asyncio.open_connection(address.hostname, address.port, limit=64)

    async def read_slowly(self, session: aiohttp.ClientSession, count: int) -> None:
        """Asks for the page, and reads a byte a second of it."""
        reader, writer = await self.connect()
        writer.write(f"GET / HTTP/1.1\r\nHost: {urlsplit(self.url).netloc}\r\n\r\n".encode())
        for _ in range(10):
            if time.monotonic() > self.end or not await reader.read(1):
                break
            await asyncio.sleep(1)
        self.counts.bad["slow reader"] += 1
        writer.close()

    async def leave(self, session: aiohttp.ClientSession, count: int) -> None:
        """Sends half an image, and leaves."""
        content = self.images[0][0]
        _, writer = await self.connect()
        writer.write(head(self.url, self.task, len(content)) + content[: len(content) // 2])
        await asyncio.sleep(1)
        self.counts.bad["left"] += 1
        writer.close()


def seconds_to_list(url: str) -> float:
    """The least of five times that the server takes to list its tasks."""
    while True:
        with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(f"{url}/ready"):
            break
        time.sleep(0.2)
    found = []
    for _ in range(5):
        start = time.monotonic()
        with urllib.request.urlopen(f"{url}/tasks") as response:
            response.read()
        found.append(time.monotonic() - start)
    return min(found)


def taken(process: int) -> tuple[int, float]:
    """Resident bytes, and seconds of the processor, of a process and of those that it started."""
    folder, memory, ticks = Path(f"/proc/{process}"), 0, 0
    with contextlib.suppress(OSError):  # one that decodes has just ended
        memory = int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        ticks = sum(map(int, (folder / "stat").read_text().rpartition(")")[2].split()[11:15]))  # with ended children
    seconds = ticks / os.sysconf("SC_CLK_TCK")
    with contextlib.suppress(OSError):
        for children in folder.glob("task/*/children"):
            for child in children.read_text().split():
                more = taken(int(child))
                memory, seconds = memory + more[0], seconds + more[1]
    return memory, seconds


async def watch(server: int, seen: list[tuple[int, float]]) -> None:
    """Notes twice a second what a server takes."""
    while True:
        seen.append(taken(server))
        await asyncio.sleep(0.5)


async def measure(load: Load, clients: int, server: int) -> list[tuple[int, float]]:
    """Runs the clients; returns what the server has taken over time."""
    seen: list[tuple[int, float]] = []
    watching = asyncio.create_task(watch(server, seen))
    await load.run(clients)
    watching.cancel()
    return seen


def main() -> None:
    """Starts a server, and prints what was measured as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    model = recast_pl.load(options.run_dir, device="cpu")
    task = model.tasks[0]
    labels = [found.label for found in model.predict(options.images, task)]
    images = [(path.read_bytes(), label) for path, label in zip(options.images, labels, strict=True)]
    command = [sys.executable, "-m", "recast_pl", "serve", "--run_dir", str(options.run_dir), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://\S+(?=;)", server.stdout.readline())
            assert found is not None
            listing = seconds_to_list(found[0])
            load = Load(found[0], task, images, options.seconds)
            seen = asyncio.run(measure(load, options.clients, server.pid))
        finally:
            server.terminate()
    counts = load.counts
    half, most = (round(1000 * value) for value in np.percentile(counts.seconds, [50, 99]))
    print(
        json.dumps(
            {
                "clients": options.clients,
                "seconds": options.seconds,
                "tasks": len(model.tasks),
                "list_ms": round(1000 * listing, 1),
                "answered": len(counts.seconds),
                "lost": len(counts.lost),
                "lost_examples": counts.lost[:3],
                "tried_again": counts.again,
                "median_ms": half,
                "p99_ms": most,
                "memory_mb": {"first": round(seen[0][0] / 1e6), "largest": round(max(seen)[0] / 1e6)},
                "processor_seconds": round(seen[-1][1] - seen[0][1], 1),
                "bad": dict(sorted(counts.bad.items())),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
