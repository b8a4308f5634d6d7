"""The server's decoding processes: images that are slow, need much memory or make the decoder fail."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from test_predictor import FOOD, run  # noqa: F401
from test_serve import ask, chunk, jpeg_of_scans, metrics, model, predictor, serve, until  # noqa: F401

from recast_pl.inference.server import decoder, decoding


def decoders():
    """The processes that decode images for this one."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent, words = stat.read_text().rsplit(")", 1)[1].split()[1], (stat.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(parent) == os.getpid() and b"server.decoder" in words:
            found.append(int(stat.parent.name))
    return found


def lost(client):
    return {reason: metrics(client)["recast_pl_lost_decoders_total", reason] for reason in ("time", "stuck", "crash")}


def with_small_parts(image, end, part, count):
    """A file with many small parts that have no meaning, in front of `end`."""
    image.save(content := io.BytesIO(), "JPEG" if part[:1] == b"\xff" else "PNG")
    before, after = content.getvalue()[:end], content.getvalue()[end:]
    return before + part * count + after


@pytest.mark.parametrize(("end", "part"), [(2, b"\xff\xe0\0\2"), (33, chunk(b"abCd", b"")), (-12, chunk(b"abCd", b""))])
def test_an_image_of_very_many_parts_is_given_up(end, part, serve, monkeypatch):  # noqa: F811
    for name in ("_QUICK_SECONDS", "_SECONDS"):
        monkeypatch.setattr(decoding, name, 0.15)
    client, image = serve(), Image.new("RGB", (50, 50))
    assert ask(client, with_small_parts(image, end, part, 100)).status_code == 200
    answer = ask(client, with_small_parts(image, end, part, 500_000))
    assert (answer.status_code, "takes more than 0.15 seconds" in answer.json()["error"]) == (422, True)
    assert lost(client) == {"time": 2, "stuck": 0, "crash": 0}
    assert ask(client).status_code == 200


def test_an_image_that_is_not_read_quickly_gets_a_second_try(serve, monkeypatch):  # noqa: F811
    monkeypatch.setattr(decoding, "_QUICK_SECONDS", 0.05)
    client = serve()
    assert ask(client, jpeg_of_scans(60, side=3900)).status_code == 200
    assert lost(client) == {"time": 1, "stuck": 0, "crash": 0}


def test_a_jpeg_of_1300_scans_is_refused_at_once(shared, serve):  # noqa: F811
    client, content = serve(), (shared / "cases" / "many_scans.jpg").read_bytes()
    assert ask(client).status_code == 200  # a process has started
    start = time.monotonic()
    answer = ask(client, content)
    assert (answer.status_code, answer.json()["error"][:37]) == (422, "the image has more than 100 scans; sa")
    assert time.monotonic() - start < 2


GREEDY = """
import io, sys
from PIL import Image
from recast_pl.inference.server import decoder
Image.new("RGB", (8000, 8000)).save(content := io.BytesIO(), "PNG")
decoder._limit(max_pixels=0)  # leaves 128 MiB; these pixels take 256 MB
request = decoder.REQUEST.pack(10**8, 32, 32, 60, len(content.getvalue())) + content.getvalue()
decoder.serve(io.BytesIO(request), sys.stdout.buffer, 10**8)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_an_image_that_needs_too_much_memory_is_refused():
    said = subprocess.run([sys.executable, "-c", GREEDY], capture_output=True, check=True).stdout
    head, text = said[: decoder.ANSWER.size], said[decoder.ANSWER.size :].decode()
    assert decoder.ANSWER.unpack(head) == (413, len(text))
    assert text == "decoding the image takes too much memory; send a smaller one"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_a_process_that_is_stuck_is_replaced_and_holds_up_no_other_image(serve, monkeypatch):  # noqa: F811
    monkeypatch.setattr(os, "cpu_count", lambda: 2)  # two quick processes
    before = decoders()
    client = serve(timeout=4.0)
    assert ask(client).status_code == 200
    (process,) = set(decoders()) - set(before)
    os.kill(process, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        stuck = pool.submit(ask, client)
        until(lambda: client.get("/health").json()["decoding_seconds"] > 0.5)
        assert metrics(client)["recast_pl_decoding_seconds",] > 0.5
        assert ask(client, FOOD[1].read_bytes()).status_code == 200
        assert not stuck.done()
        assert stuck.result().status_code in (503, 504)
    until(lambda: lost(client)["stuck"] == 1)
    assert client.get("/health").json()["decoding_seconds"] == 0
    assert process not in decoders()
    assert ask(client).status_code == 200


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_a_process_that_has_crashed_costs_no_answer(serve):  # noqa: F811
    before, client = decoders(), serve()
    wanted = ask(client).json()
    (process,) = set(decoders()) - set(before)
    os.kill(process, signal.SIGKILL)
    assert ask(client).json() == wanted
    assert lost(client) == {"time": 0, "stuck": 0, "crash": 1}


def test_a_process_that_cannot_start_is_tried_again(serve, monkeypatch):  # noqa: F811
    client = serve()

    def fail(*words, **settings):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(decoding.subprocess, "Popen", fail)
        for _ in range(9):  # more often than there are processes
            answer = ask(client)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert ask(client).status_code == 200


def test_the_processes_end_with_the_application(serve):  # noqa: F811
    before = decoders()
    client = serve()
    assert ask(client).status_code == 200
    assert len(decoders()) > len(before)
    client.__exit__(None, None, None)
    assert set(decoders()) <= set(before)
    client.__enter__()
    assert ask(client).status_code == 200  # it starts again
