"""The server within the test process: answers, batches, limits, added tasks, and errors."""

import asyncio
import dataclasses
import errno
import io
import json
import logging
import os
import re
import shutil
import socket
import struct
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from conftest import ROOT
from fastapi import FastAPI
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from test_patch_tools import INVALID
from test_predictor import FOOD, SIGNS, patches, run, tuned  # noqa: F401

import recast_pl
from recast_pl import Signature
from recast_pl.cli import main
from recast_pl.errors import PatchError
from recast_pl.inference.server.app import create_app
from recast_pl.inference.server.decoding import Decoders
from recast_pl.inference.server.limits import Limits
from recast_pl.inference.server.log_filter import LogFilter
from recast_pl.inference.server.warm_up import WarmUp

LOCAL = "http://localhost:8000"
IMAGE = FOOD[0].read_bytes()
TOKEN = "a secret, with umlauts: ä"
ADDING = {"Authorization": b"Bearer " + TOKEN.encode(), "Content-Type": "application/octet-stream"}


@pytest.fixture(scope="module")
def predictor(run):  # noqa: F811
    return recast_pl.load(run)


@pytest.fixture
def model(predictor):
    """The predictor; tasks that a test adds are removed after it."""
    before = predictor.tasks
    yield predictor
    for task in set(predictor.tasks) - set(before):
        predictor.remove(task)


@pytest.fixture
def serve(model, monkeypatch):
    """Starts servers and returns clients of them."""
    clients = []
    monkeypatch.setattr(WarmUp, "begin", lambda _: None)  # it would classify an image

    def make(token=None, hosts=("localhost",), app=None, **limits):
        limits = Limits(**{"timeout": 120} | limits)  # so that a busy machine does not matter
        app = create_app(model, limits, token, hosts, **(app or {}))
        clients.append(TestClient(app, base_url=LOCAL, raise_server_exceptions=False).__enter__())
        return clients[-1]

    yield make
    for client in clients:
        client.__exit__(None, None, None)


def ask(client, image=IMAGE, task="food", name="image.jpg"):
    return client.post("/predict", data={"task": task}, files={"image": (name, image)})


def metrics(client):
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def chunk(kind, data):
    """A part of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


class Held:
    """Blocks a predictor until `go` is set, records its batches, and counts the images that are decoded."""

    def __init__(self, model, monkeypatch):
        self.batches, self.decoded, self.go = [], 0, threading.Event()
        predict, decode = model.predict_tensors, Decoders.decode

        def held(images, tasks):
            self.batches.append(list(tasks))
            assert self.go.wait(20)
            return predict(images, tasks)

        async def counted(*arguments):
            image = await decode(*arguments)
            self.decoded += 1
            return image

        monkeypatch.setattr(model, "predict_tensors", held)
        monkeypatch.setattr(Decoders, "decode", counted)

    def ask_first(self, client, pool, image=IMAGE):
        """The answer to come of a request that is alone in the first batch."""
        asked = pool.submit(ask, client, image)
        until(lambda: self.batches)
        return asked

    def wait_for(self, client, images):
        """Waits until that many images are decoded and queued."""
        until(lambda: self.decoded == images)
        assert client.get("/health").is_success  # answered by the thread that queues the last one


def test_answers_are_those_of_the_library(serve, model):
    client = serve()
    for task, paths in (("food", FOOD), ("signs", SIGNS)):
        for path, wanted in zip(paths, model.predict(paths, task), strict=True):
            answer = ask(client, path.read_bytes(), task)
            assert answer.status_code == 200
            found = answer.json()
            assert found["probabilities"] == pytest.approx(wanted.probabilities, abs=1e-5)
            assert found | {"probabilities": None, "probability": None} == dataclasses.asdict(wanted) | {
                "probabilities": None,
                "probability": None,
            }
            assert found["probability"] == found["probabilities"][found["label"]]
    tasks = [{"name": name, "classes": model.classes(name)} for name in ("food", "signs")]
    assert client.get("/tasks").json() == tasks
    assert client.get("/health").json() == {"status": "ok", "tasks": 2, "waiting": 0, "decoding_seconds": 0}


def test_waiting_requests_are_classified_together_whatever_their_tasks(serve, model, monkeypatch):
    first, *others = [
        ("food", FOOD[0]),
        *zip(("food", "signs") * 3, (FOOD[1], SIGNS[0], FOOD[2], SIGNS[1], FOOD[0], SIGNS[2]), strict=True),
    ]
    wanted = [model.predict(path, task)[0] for task, path in (first, *others)]
    held, client = Held(model, monkeypatch), serve(batch_size=4)
    with ThreadPoolExecutor(7) as pool:
        asked = [held.ask_first(client, pool, first[1].read_bytes())]
        asked += [pool.submit(ask, client, path.read_bytes(), task) for task, path in others]
        held.wait_for(client, images=7)
        assert metrics(client)["recast_pl_waiting_images",] == 7
        held.go.set()
        answers = [future.result().json() for future in asked]
    assert [len(batch) for batch in held.batches] == [1, 4, 2]
    assert any(set(batch) == {"food", "signs"} for batch in held.batches)
    for answer, prediction in zip(answers, wanted, strict=True):
        assert answer["task"] == prediction.task
        assert answer["probabilities"] == pytest.approx(prediction.probabilities, abs=1e-5)
    found = metrics(client)
    assert (found["recast_pl_batch_images_count",], found["recast_pl_batch_images_sum",]) == (3, 7)
    assert found["recast_pl_requests_total", "/predict", "200"] == 7
    assert found["recast_pl_request_seconds_count", "/predict"] == 7
    assert (found["recast_pl_tasks",], found["recast_pl_waiting_images",]) == (2, 0)


def test_a_batch_has_a_limited_number_of_pixels(serve, model, monkeypatch):
    monkeypatch.setattr("recast_pl.inference.server.batching._BATCH_PIXELS", 2 * model.image_size("food") ** 2)
    held, client = Held(model, monkeypatch), serve()
    with ThreadPoolExecutor(6) as pool:
        asked = [held.ask_first(client, pool), *(pool.submit(ask, client) for _ in range(5))]
        held.wait_for(client, images=6)
        held.go.set()
        assert [future.result().status_code for future in asked] == [200] * 6
    assert [len(batch) for batch in held.batches] == [1, 2, 2, 1]


def test_a_full_queue_says_when_to_try_again(serve, model, monkeypatch):
    held, client = Held(model, monkeypatch), serve(queue_size=2)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(ask, client) for _ in range(2)]
        until(lambda: client.get("/health").json()["waiting"] == 2)
        refused = ask(client)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json() == {"error": "2 images are waiting; try again later"}
        held.go.set()
        assert [future.result().status_code for future in asked] == [200, 200]
    assert ask(client).status_code == 200


def test_a_request_that_times_out_is_not_computed(serve, model, monkeypatch):
    held, client = Held(model, monkeypatch), serve(timeout=3)
    until(lambda: ask(client, b"no image").status_code == 422)  # a process that decodes has started
    with ThreadPoolExecutor(3) as pool:
        for asked in [held.ask_first(client, pool), *(pool.submit(ask, client) for _ in range(2))]:
            answer = asked.result()
            assert (answer.status_code, answer.json()["error"][:33]) == (504, "there was no answer in 3 seconds;")
    assert client.get("/health").json()["waiting"] == 0
    held.go.set()
    until(lambda: ask(client, SIGNS[0].read_bytes(), "signs").status_code == 200)  # on a busy machine not the first
    assert {task for batch in held.batches[1:] for task in batch} == {"signs"}


def together(client, held, tasks, meanwhile):
    """The answers to requests that are classified in one batch; `meanwhile` is called while they wait."""
    with ThreadPoolExecutor(len(tasks) + 1) as pool:
        first = held.ask_first(client, pool)
        asked = [pool.submit(ask, client, task=task) for task in tasks]
        held.wait_for(client, images=len(tasks) + 1)
        meanwhile()
        held.go.set()
        assert first.result().status_code == 200
        return [future.result() for future in asked]


BROKEN = {  # how a task breaks while requests wait, the status of its requests, part of their error
    "removed": (lambda task: None, 404, "no task is named 'bad'; the tasks are food, signs"),
    "misfit": (lambda task: dataclasses.replace(task, weight=task.weight[:, 1:]), 500, "the server failed"),
    "state": (
        lambda task: dataclasses.replace(task, state=task.state._replace(content=b"1234")),
        *(500, "the server failed"),
    ),
    "not finite": (
        lambda task: dataclasses.replace(task, weight=torch.full_like(task.weight, torch.inf)),
        *(500, "task 'bad' gives probabilities that are not finite; train it again"),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_task_that_fails_spoils_only_its_own_requests(name, run, serve, model, monkeypatch):  # noqa: F811
    change, status, message = BROKEN[name]
    model.add_patch(tuned(patches(run)["food"], "bad", 1))
    wanted = {task: model.predict(FOOD[0], task)[0].probabilities for task in ("food", "signs")}

    def break_it():
        broken = change(model._tasks["bad"])
        model.remove("bad")
        if broken:
            model._tasks["bad"] = broken

    held, client = Held(model, monkeypatch), serve()
    tasks = ["signs", "bad", "food", "bad", "signs"]
    for answer, task in zip(together(client, held, tasks, break_it), tasks, strict=True):
        if task == "bad":
            assert (answer.status_code, message in answer.json()["error"]) == (status, True), answer.text
        else:
            assert answer.json()["probabilities"] == pytest.approx(wanted[task], abs=1e-5)
    assert len(held.batches[1]) == 5
    assert ask(client, task="signs").status_code == 200


def jpeg_of_scans(count, side=7000):
    """A small file of a large grey image that is a progressive JPEG with many scans."""
    Image.new("L", (side, side), 90).save(content := io.BytesIO(), "JPEG", progressive=True)
    start, *scans = content.getvalue().removesuffix(b"\xff\xd9").split(b"\xff\xda")
    last = b"\xff\xda" + scans[-1]
    return b"\xff\xda".join([start, *scans]) + last * (count - len(scans)) + b"\xff\xd9"


def test_an_image_of_very_many_scans_is_refused_before_it_is_decoded(serve):
    client = serve()
    assert ask(client).status_code == 200  # a process that decodes has started
    for scans in (101, 1300, 5000):
        content = jpeg_of_scans(scans)
        start = time.monotonic()
        answer = ask(client, content)
        assert (answer.status_code, answer.json()["error"][:37]) == (422, "the image has more than 100 scans; sa")
        assert time.monotonic() - start < 2
    assert ask(client, jpeg_of_scans(100, side=64)).status_code == 200


def test_bytes_that_only_look_like_scans_are_not_counted(serve):
    client, marks = serve(), b"\xff\xda" * 200
    video = IMAGE + marks  # as cameras append one
    comment = IMAGE[:2] + b"\xff\xfe" + (len(marks) + 2).to_bytes(2) + marks + IMAGE[2:]
    for content in (video, comment):
        assert ask(client, content).json() == ask(client, IMAGE).json()


def test_large_images_do_not_delay_small_ones(serve):
    client, large = serve(), jpeg_of_scans(12)
    with ThreadPoolExecutor(4) as pool:
        slow = [pool.submit(ask, client, large) for _ in range(4)]
        until(lambda: client.get("/health").json()["waiting"] == 4)
        time.sleep(0.2)  # until they are being decoded
        assert ask(client).status_code == 200
        assert not any(future.done() for future in slow)
        assert {future.result().status_code for future in slow} == {200}


def test_the_limit_of_pixels_may_be_above_or_below_pillows_own(serve, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    Image.new("L", (200, 200)).save(content := io.BytesIO(), "PNG")
    assert ask(serve(max_pixels=40_000), content.getvalue()).status_code == 200
    refused = ask(serve(max_pixels=39_999), content.getvalue())
    assert (refused.status_code, "has 40000 pixels" in refused.json()["error"]) == (413, True)
    assert Image.MAX_IMAGE_PIXELS == 10_000  # this process is left alone


def test_a_failure_shows_no_details_and_does_not_stop_the_server(serve, model, monkeypatch, caplog):
    client = serve()
    with monkeypatch.context() as patch:
        patch.setattr(model, "predict_tensors", lambda *_: 1 / 0)
        answer = ask(client)
    assert answer.status_code == 500
    assert answer.json() == {"error": "the server failed at this request; see its log"}
    assert ask(client).status_code == 200
    assert metrics(client)["recast_pl_requests_total", "/predict", "500"] == 1


def png(width, height):
    """An image that is large according to its header only."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def gif(width, height):
    """A small screen with a larger frame."""
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00;"
    return b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6) + frame


FILE = ("image.jpg", IMAGE)
REFUSED = {  # request, status, part of the error
    "unknown task": ({"data": {"task": "fool"}, "files": {"image": FILE}}, 404, "the tasks are food, signs"),
    "path as task": (
        {"data": {"task": "../../etc/passwd"}, "files": {"image": FILE}},
        404,
        "no task is named '../../etc/passwd'",
    ),
    "none as task": ({"data": {"task": "none"}, "files": {"image": FILE}}, 404, "no task is named 'none'"),
    "two tasks": ({"data": {"task": ["food", "signs"]}, "files": {"image": FILE}}, 422, "2 fields 'task'; send one"),
    "task as file": ({"files": {"image": FILE, "task": FILE}}, 422, "fields 'task'; send one, with text"),
    "image as text": (
        {"data": {"task": "food", "image": "text"}, "files": {"x": FILE}},
        422,
        "the form has 1 fields 'image', not all with a file",
    ),
    "two names": ({"files": [("image", FILE), ("images", FILE)]}, 422, "send 'image' once"),
    "many images": ({"data": {"task": "food"}, "files": [("image", FILE)] * 33}, 400, "Too many files"),
    "long task": ({"data": {"task": "x" * 5000}, "files": {"image": FILE}}, 400, "exceeded maximum size"),
    "no form": (
        {"content": b"x", "headers": {"Content-Type": "text/plain"}},
        *(415, "text/plain; send it with Content-Type: multipart/form-data or application/json or image/*"),
    ),
    "nothing": ({}, 415, "the body has no content type"),
    "no boundary": ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "Missing boundary"),
    "torn form": (
        {"content": b"rubbish", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
        *(400, "Invalid multipart"),
    ),
    "empty": ({"data": {"task": "food"}, "files": {"image": ("a.jpg", b"")}}, 422, "the image cannot be read"),
    "text": ({"data": {"task": "food"}, "files": {"image": ("a.jpg", b"hello")}}, 422, "of an unknown format); send a"),
    "torn": ({"data": {"task": "food"}, "files": {"image": ("a.jpg", IMAGE[:2000])}}, 422, "(image file is truncated"),
    "postscript": (
        {
            "data": {"task": "food"},
            "files": {"image": ("a.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")},
        },
        422,
        "of an unknown format",
    ),
    "large": (
        {"data": {"task": "food"}, "files": {"image": ("a.png", png(9000, 9000))}},
        413,
        "has 81000000 pixels, more than the 50000000 allowed",
    ),
    "huge": (
        {"data": {"task": "food"}, "files": {"image": ("a.png", png(99_999, 99_999))}},
        413,
        "far too many pixels",
    ),
    "gif": ({"data": {"task": "food"}, "files": {"image": ("a.gif", gif(9000, 9000))}}, 413, "has 81000000 pixels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_unusable_request_gets_a_clear_error(name, serve):
    words, status, message = REFUSED[name]
    client = serve()
    answer = client.post("/predict", **words)
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]
    assert "Traceback" not in answer.text
    assert " at 0x" not in answer.text
    assert ask(client).status_code == 200


def test_an_image_may_have_any_mode_but_not_too_many_pixels(serve, model):
    client = serve(max_pixels=64 * 32)
    for mode in ("RGBA", "L", "P", "I;16"):
        small, large = (
            Image.new(mode, (64, height), 7) if mode != "RGBA" else Image.new(mode, (64, height)) for height in (32, 33)
        )
        for image, status in ((small, 200), (large, 413)):
            image.save(content := io.BytesIO(), "PNG")
            answer = ask(client, content.getvalue())
            assert answer.status_code == status
        wanted = model.predict(small, "food")[0].probabilities
        small.save(content := io.BytesIO(), "PNG")
        assert ask(client, content.getvalue()).json()["probabilities"] == pytest.approx(wanted, abs=1e-5)


def test_file_names_are_not_used(serve, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    client = serve(token=TOKEN)
    for name in (str(tmp_path / "evil.jpg"), "../evil.jpg", "/etc/passwd", "nul\0l.jpg", "x" * 4000):
        assert ask(client, name=name).status_code == 200
    assert list(tmp_path.iterdir()) == []
    assert not (tmp_path.parent / "evil.jpg").exists()


def scope(*headers):
    """The ASGI scope of a request with a form."""
    always = [(b"host", b"localhost"), (b"content-type", b"multipart/form-data; boundary=x")]
    where = {"path": "/predict", "query_string": b"", "root_path": "", "scheme": "http"}
    return {"type": "http", "method": "POST", **where, "headers": [*always, *headers]}


def raw(app, chunks, headers=(), pause=0.0):
    """An application's answer to a body in chunks, and how many chunks it has read."""
    sent, taken = [], 0

    async def receive():
        nonlocal taken
        await asyncio.sleep(pause if taken < len(chunks) else 99)
        taken += 1
        return {"type": "http.request", "body": chunks[taken - 1], "more_body": taken < len(chunks)}

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope(*headers), receive, send))
    return sent[0]["status"], b"".join(m.get("body", b"") for m in sent).decode(), taken


PART = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'


def test_a_body_that_is_too_large_is_refused_before_it_is_kept(model):
    app = create_app(model, Limits(max_body=100_000))
    chunks = [PART, *[bytes(10_000)] * 1_000]
    status, text, taken = raw(app, chunks)
    assert (status, taken) == (413, 11)
    assert "larger than 100000 bytes" in text
    status, text, taken = raw(app, chunks, [(b"content-length", b"10000000")])
    assert (status, taken) == (413, 161)  # sixteen times the limit is read and dropped, for proxies that still send
    status, text, taken = raw(app, chunks, [(b"content-length", b"10000000"), (b"expect", b"100-continue")])
    assert (status, taken) == (413, 0)
    status, _, taken = raw(app, [PART, bytes(99_000), b"\r\n--x--\r\n"])
    assert (status, taken) == (422, 3)


def test_the_bodies_of_all_requests_together_are_bounded(model):
    app = create_app(model, Limits(max_body=1_000, timeout=0.2))
    ended = []

    async def one():
        chunks = iter([PART + bytes(900 - len(PART))])

        async def receive():
            body = next(chunks, None)
            if body is None:
                await asyncio.sleep(9)
            return {"type": "http.request", "body": body, "more_body": True}

        async def send(message):
            ended.append(
                (message["status"], dict(message["headers"]).get(b"retry-after"))
            ) if "status" in message else None

        await app(scope(), receive, send)

    async def many(count):
        await asyncio.gather(*(one() for _ in range(count)))

    for _ in range(2):  # the second time shows that the memory is free again
        ended.clear()
        asyncio.run(many(30))
        assert sorted(ended) == [(408, None)] * 17 + [(503, b"1")] * 13


def test_a_body_that_arrives_too_slowly_times_out(model):
    status, text, taken = raw(create_app(model, Limits(timeout=0.3)), [PART] + [b"x"] * 100, pause=0.05)
    assert status == 408
    assert "did not arrive in 0.3 seconds" in text
    assert taken < 10


def test_a_client_that_leaves_is_no_failure_of_the_server(model, capfd, caplog):
    app = create_app(model, token="t")
    for path, kind in (("/predict", b"multipart/form-data; boundary=x"), ("/tasks", b"application/octet-stream")):
        messages = iter([{"type": "http.request", "body": PART, "more_body": True}, {"type": "http.disconnect"}])
        headers = [(b"host", b"localhost"), (b"content-type", kind), (b"authorization", b"Bearer t")]

        async def receive(messages=messages):
            return next(messages)

        async def send(message):
            pass

        asyncio.run(app(scope() | {"path": path, "headers": headers}, receive, send))
    client = TestClient(app, base_url=LOCAL)
    counts = {labels: count for labels, count in metrics(client).items() if labels[0] == "recast_pl_requests_total"}
    assert counts == {("recast_pl_requests_total", path, "499"): 1 for path in ("/predict", "/tasks")}
    assert "Traceback" not in caplog.text + capfd.readouterr().err


def test_the_log_names_a_failure_that_repeats_once():
    log, written = logging.getLogger("test of the log"), io.StringIO()
    log.addHandler(logging.StreamHandler(written))
    log.addFilter(LogFilter())
    for _ in range(5000):
        for number in (errno.EMFILE, errno.EINVAL):
            log.error("no more connections\n%s", "detail", exc_info=OSError(number, os.strerror(number)))
        log.error("another failure")
    text = written.getvalue()
    assert text.count("too many connections are open (Too many open files)") == 1
    assert text.count("another failure") == text.count("Invalid argument") == 1
    assert len(text.splitlines()) < 12


def test_the_servers_own_page_works_behind_a_proxy_that_replaces_the_host(serve):
    client = serve()
    origin = {"Origin": "https://public.example"}  # the host is localhost:8000
    refused = client.post("/predict", data={"task": "food"}, files={"image": FILE}, headers=origin)
    assert (refused.status_code, "use the server's own page" in refused.json()["error"]) == (403, True)
    (sent,) = re.findall(r"""headers: \{("[\w-]+": "\w+")\}""", client.get("/").text)  # by the page's own script
    own = json.loads(f"{{{sent}}}")
    for header in (own, {"Sec-Fetch-Site": "same-origin"}):
        words = {"data": {"task": "food"}, "files": {"image": FILE}, "headers": {**origin, **header}}
        assert client.post("/predict", **words).status_code == 200
    for site in ("cross-site", "same-site", "none"):
        assert client.get("/tasks", headers={**origin, "Sec-Fetch-Site": site}).status_code == 403
    asked = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": next(iter(own))}
    preflight = client.options("/predict", headers=asked)  # what a browser asks before another site may send the header
    assert preflight.status_code == 403
    assert not [name for name in preflight.headers if name.startswith("access-control")]


def test_the_application_works_within_another_one(model, monkeypatch):
    outer = FastAPI()
    outer.mount("/vision/recast", create_app(model))
    (wanted,) = model.predict(FOOD[0], "food")
    for context in (True, False):  # with and without the start of the outer application
        client = TestClient(outer, base_url=LOCAL)
        with client if context else nullcontext():
            for _ in range(2):
                answer = client.post("/vision/recast/predict", data={"task": "food"}, files={"image": FILE})
                assert answer.status_code == 200
                assert answer.json()["probabilities"] == pytest.approx(wanted.probabilities, abs=1e-5)
    page = client.get("/vision/recast/")
    assert page.status_code == 200
    assert not re.search(r"""(fetch|ask)\(["']/""", page.text)  # its addresses are relative
    families = text_string_to_metric_families(client.get("/vision/recast/metrics").text)
    counts = {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}
    assert counts["recast_pl_requests_total", "/predict", "200"] == 4


def test_an_application_that_was_stopped_starts_again(model):
    app = create_app(model)
    for _ in range(2):
        with TestClient(app, base_url=LOCAL) as client:
            assert ask(client).status_code == 200


def test_head_requests_are_answered_like_get_without_a_body(serve):
    client = serve()
    for path in ("/", "/tasks", "/health", "/metrics", "/openapi.json"):
        assert client.head(path).status_code == client.get(path).status_code == 200
        assert client.head(path).headers["content-type"] == client.get(path).headers["content-type"]
    assert client.head("/predict").status_code == 405


def test_the_description_names_errors_and_the_token(serve):
    document = serve(token=TOKEN).get("/openapi.json").json()
    predict, add = (document["paths"][path]["post"] for path in ("/predict", "/tasks"))
    assert {"200", "403", "404", "408", "413", "415", "422", "500", "503", "504"} <= predict["responses"].keys()
    assert {"201", "401", "403", "409", "413", "415", "422"} <= add["responses"].keys()
    (scheme,) = document["components"]["securitySchemes"].items()
    assert scheme[1]["type"] == "http"
    assert scheme[1]["scheme"] == "bearer"
    assert add["security"] == [{scheme[0]: []}]
    assert "security" not in predict
    assert predict["requestBody"]["content"]["multipart/form-data"]["schema"]["required"] == ["image"]
    assert list(add["requestBody"]["content"]) == ["application/octet-stream", "multipart/form-data"]
    assert "task_probability" in document["components"]["schemas"]["RoutedPrediction"]["properties"]
    for responses in (predict["responses"], add["responses"], document["paths"]["/tasks"]["get"]["responses"]):
        for status, response in responses.items():
            if int(status) >= 400:
                (reference,) = response["content"]["application/json"]["schema"].values()
                schema = document["components"]["schemas"][reference.rpartition("/")[2]]
                assert schema["properties"].keys() == {"error"}


def test_requests_of_other_sites_are_refused(serve):
    client = serve()
    refused = client.get("/health", headers={"Host": "evil.example"})
    assert (refused.status_code, refused.json()["error"][:32]) == (403, "host 'evil.example' is not allow")
    for origin in ("http://evil.example", "null", "http://localhost:9000", "http://localhost:8000.evil.example"):
        assert client.get("/tasks", headers={"Origin": origin}).status_code == 403
    answer = client.get("/tasks", headers={"Origin": LOCAL})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert serve(hosts=("*",)).get("/health", headers={"Host": "any.example"}).status_code == 200
    assert serve(hosts=("::1",)).get("/health", headers={"Host": "[::1]:8000"}).status_code == 200
    assert client.get("/health", headers={"Host": "[::1"}).status_code == 403


def test_unknown_paths(serve):
    client = serve()
    assert "GET /nowhere; docs/howto/serving.md" in client.get("/nowhere").json()["error"]
    assert client.get("/nowhere").status_code == client.get("/redoc").status_code == 404
    assert client.get("/predict").status_code == 405
    assert metrics(client)["recast_pl_requests_total", "other", "404"] == 3
    document = client.get("/openapi.json").json()
    assert "multipart/form-data" in document["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert {"label", "probability"} < document["components"]["schemas"]["Prediction"]["properties"].keys()


def routed(client, image, **data):
    return client.post("/predict", data=data, files={"image": ("image.jpg", image)})


def test_the_task_of_an_image_is_found_as_the_library_finds_it(serve, model):
    client = serve()
    paths = [*FOOD, *SIGNS, *sorted((ROOT / "data" / "clipart" / "people").rglob("*.jpg"))[::8]]
    predictions = model.predict(paths)
    for path, prediction in zip(paths, predictions, strict=True):
        answer = routed(client, path.read_bytes())
        assert answer.status_code == 200
        found, wanted = answer.json(), dataclasses.asdict(prediction)
        assert list(found) == list(wanted)
        for name in ("task", "label"):
            assert found[name] == wanted[name]
        for name in ("probability", "probabilities", "task_probability", "familiar"):
            assert found[name] == pytest.approx(wanted[name], abs=1e-4)
        assert found["second"] == pytest.approx(wanted["second"], abs=1e-4)
    assert {found.task for found in predictions} == {"food", "signs", "none"}
    refused = sum(found.task == "none" for found in predictions)
    counts = metrics(client)
    assert counts["recast_pl_routed_images_total", "refused"] == refused
    assert counts["recast_pl_routed_images_total", "found"] == len(paths) - refused
    assert routed(client, IMAGE, task="auto").json() == routed(client, IMAGE).json()
    assert ask(client).json().keys() == {"task", "label", "probability", "probabilities"}


def test_images_with_and_without_a_task_are_classified_together(serve, model, monkeypatch):
    paths = sorted((ROOT / "data" / "clipart" / "food").rglob("*.jpg"))
    sure = [(path, found) for path, found in zip(paths, model.predict(paths), strict=True) if found.label]
    sure.sort(key=lambda pair: pair[1].task_probability * (1 if pair[1].task == "food" else -1))
    wanted = dict([sure[0], *sure[-2:]])  # the first belongs to the signs, the others to food alone
    assert [(found.task, found.second.label) for found in wanted.values()][1:] == [("food", None)] * 2
    batches, predict, route = [], model.predict_tensors, model.route_tensors
    monkeypatch.setattr(model, "route_tensors", lambda images: batches.append(len(images)) or route(images))

    def maybe_failing(images, tasks):
        if failing and "signs" in tasks:
            raise PatchError("task 'signs' is bad")
        return predict(images, tasks)

    for failing in (False, True):
        monkeypatch.setattr(model, "predict_tensors", maybe_failing)
        held, client = Held(model, monkeypatch), serve()
        batches.clear()
        with ThreadPoolExecutor(5) as pool:
            first = held.ask_first(client, pool)
            named = pool.submit(ask, client, FOOD[1].read_bytes(), "food")
            found = {path: pool.submit(routed, client, path.read_bytes()) for path in wanted}
            held.wait_for(client, images=5)
            held.go.set()
            assert first.result().status_code == named.result().status_code == 200
            for path, future in found.items():
                asked = {wanted[path].task, *([wanted[path].second.task] if wanted[path].second.label else [])}
                answer = future.result()
                if failing and "signs" in asked:
                    assert (answer.status_code, answer.json()["error"]) == (500, "task 'signs' is bad")
                else:
                    assert answer.json()["label"] == wanted[path].label
        assert batches == [3, 1, 1, 1] if failing else [3]


def renamed(run, name):  # noqa: F811
    """The signature of the task "food" under another name."""
    return dataclasses.replace(Signature.load(run / "signatures" / "00_food.safetensors"), task=name)


def test_a_server_that_cannot_find_tasks_says_so(run, serve, model, tmp_path):  # noqa: F811
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "signatures")
    client = TestClient(create_app(recast_pl.load(copy)), base_url=LOCAL)
    answer = routed(client, IMAGE)
    assert (answer.status_code, "'patch sign'" in answer.json()["error"]) == (422, True)
    assert str(tmp_path) not in answer.text
    assert ask(client).status_code == 200
    model.add_patch(tuned(patches(run)["food"], "added", 1))  # without its signature
    answer = routed(serve(), IMAGE)
    assert (answer.status_code, "a signature is missing or does not fit" in answer.json()["error"]) == (422, True)


def test_a_task_is_added_with_its_signature(run, serve, model):  # noqa: F811
    added, client = tuned(patches(run)["food"], "added", 1), serve(token=TOKEN)
    signature, headers = renamed(run, "added"), {"Authorization": ADDING["Authorization"]}

    def add(**files):
        files = {name: (name, content) for name, content in files.items()}
        return client.post("/tasks", files=files, headers=headers)

    for files, message in (
        ({"signature": signature.to_bytes()}, "0 fields 'patch'; send one, with a file"),
        ({"patch": added.to_bytes(), "signature": b"x"}, "the signature is damaged"),
        ({"patch": added.to_bytes(), "signature": added.to_bytes()}, "the signature is not a signature of format"),
        ({"patch": added.to_bytes(), "signature": renamed(run, "food").to_bytes()}, "is not that of task 'added'"),
        (
            {"patch": added.to_bytes(), "signature": dataclasses.replace(signature, base="0" * 64).to_bytes()},
            "belongs to base 000000000000",
        ),
    ):
        answer = add(**files)
        assert (answer.status_code, message in answer.json()["error"]) == (422, True), answer.text
        assert "/tmp" not in answer.text
    assert model.tasks == ["food", "signs"]
    answer = add(patch=added.to_bytes(), signature=signature.to_bytes())
    assert (answer.status_code, answer.json()["name"]) == (201, "added")
    found = routed(client, IMAGE).json()
    assert {found["task"], found["second"]["task"]} == {"food", "added"}  # which have the same signature
    assert found["task_probability"] == pytest.approx(found["second"]["task_probability"])
    assert add(patch=added.to_bytes()).status_code == 409
    model.remove("added")
    assert add(patch=added.to_bytes()).status_code == 201
    assert routed(client, IMAGE).status_code == 422


def test_only_clients_with_the_token_add_tasks(run, serve, model):  # noqa: F811
    food = patches(run)["food"]
    added = tuned(food, "added", 1)
    refused = serve().post("/tasks", content=added.to_bytes(), headers=ADDING)
    assert (refused.status_code, "RECAST_PL_TOKEN set" in refused.json()["error"]) == (403, True)
    client = serve(token=TOKEN)
    for given in (None, "", "Bearer", "Bearer wrong", "Basic " + "x", b"Basic " + TOKEN.encode(), TOKEN.encode()):
        headers = {**ADDING, "Authorization": given}
        answer = client.post(
            "/tasks", content=added.to_bytes(), headers={k: v for k, v in headers.items() if v is not None}
        )
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert model.tasks == ["food", "signs"]
    answer = client.post("/tasks", content=added.to_bytes(), headers=ADDING)
    assert (answer.status_code, answer.json()) == (201, {"name": "added", "classes": food.classes})
    assert [task["name"] for task in client.get("/tasks").json()] == ["food", "signs", "added"]
    (wanted,) = model.predict(FOOD[0], "added")
    assert wanted.probabilities != pytest.approx(model.predict(FOOD[0], "food")[0].probabilities, abs=1e-4)
    assert ask(client, task="added").json()["probabilities"] == pytest.approx(wanted.probabilities, abs=1e-5)
    again = client.post("/tasks", content=added.to_bytes(), headers=ADDING)
    assert (again.status_code, again.json()["error"]) == (409, "there is a task 'added' already; rename the new one")


def test_a_patch_that_does_not_belong_is_not_served(run, serve, model):  # noqa: F811
    food = dataclasses.replace(patches(run)["food"], task="more")
    content, client = food.to_bytes(), serve(token=TOKEN, max_body=1_000_000)
    torn = content[:200] + bytes([content[200] ^ 1]) + content[201:]
    for body, status, message in (
        (b"", 422, "the patch is damaged"),
        (content[:-10], 422, "the patch is damaged"),
        (torn, 422, "the patch is damaged"),
        (dataclasses.replace(food, base="0" * 64).to_bytes(), 422, "belongs to base 000000000000"),
        (dataclasses.replace(food, method=["LoRA"]).to_bytes(), 422, "is of method ['LoRA']"),
        (dataclasses.replace(food, classes=food.classes[1:]).to_bytes(), 422, "the patch cannot be used: the head has"),
        (bytes(1_000_001), 413, "larger than 1000000 bytes"),
    ):
        answer = client.post("/tasks", content=body, headers=ADDING)
        assert (answer.status_code, message in answer.json()["error"]) == (status, True), answer.text
        assert "/tmp" not in answer.text
    wrong = client.post("/tasks", content=content, headers={**ADDING, "Content-Type": "application/json"})
    assert wrong.status_code == 415
    assert model.tasks == ["food", "signs"]


def test_an_invalid_patch_is_not_served(run, serve, model):  # noqa: F811
    food, client = dataclasses.replace(patches(run)["food"], task="more"), serve(token=TOKEN)
    for change, named in INVALID.values():
        answer = client.post("/tasks", content=change(food).to_bytes(), headers=ADDING)
        assert (answer.status_code, named in answer.json()["error"]) == (422, True), answer.text
        assert len(answer.text) < 700
    assert model.tasks == ["food", "signs"]


def test_a_patch_whose_image_size_or_numbers_do_not_fit_the_network_is_not_served(run, serve, model):  # noqa: F811
    food, client = dataclasses.replace(patches(run)["food"], task="more"), serve(token=TOKEN)
    whole = [{name: tensor.round().long() for name, tensor in piece.items()} for piece in food.pieces]
    for changes, message in (
        ({"image_size": 48}, "does not take 48×48 images"),
        ({"pieces": whole}, "coefficients of Recast as torch.int64"),
    ):
        answer = client.post("/tasks", content=dataclasses.replace(food, **changes).to_bytes(), headers=ADDING)
        assert (answer.status_code, message in answer.json()["error"]) == (422, True), answer.text
    assert model.tasks == ["food", "signs"]
    assert ask(client).status_code == 200


def test_the_page_loads_nothing_from_elsewhere(serve):
    answer = serve().get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"""(src|href)=(?!"data:)|https?://|@import|url\(""", answer.text)
    assert "innerHTML" not in answer.text


def refused(capsys, *words):
    assert main(["serve", "--run_dir", "nowhere", *words]) == 2
    return capsys.readouterr().err


def test_a_server_that_cannot_start_says_why_in_one_line(capsys, monkeypatch):
    assert "nowhere" in refused(capsys, "--port", "0")
    assert "batch_size is 0; give a finite number above 0" in refused(capsys, "--batch_size", "0")
    assert "timeout is inf" in refused(capsys, "--timeout", ".inf")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot listen at 127.0.0.1, port {port}" in refused(capsys, "--port", port)
    assert "cannot listen at 127.0.0.1, port 70000" in refused(capsys, "--port", "70000")
    monkeypatch.setitem(sys.modules, "python_multipart", None)
    assert 'python_multipart is not installed; pip install "recast-pl[serve]"' in refused(capsys)
