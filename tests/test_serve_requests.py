"""The server within the test process: kinds of requests, deleted tasks, readiness, the log, other origins and paths."""

import asyncio
import base64
import dataclasses
import errno
import json
import logging
import re
import threading
from functools import partial

import pytest
import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient
from test_predictor import FOOD, SIGNS, patches, run, tuned  # noqa: F401
from test_serve import ADDING, LOCAL, TOKEN, ask, metrics, model, predictor, renamed, serve, until  # noqa: F401

from recast_pl.cli import main
from recast_pl.errors import RunError, StorageError
from recast_pl.inference.following import Follower, forget_received, keep_received
from recast_pl.inference.server.app import create_app
from recast_pl.inference.server.decoding import Decoders
from recast_pl.inference.server.limits import Limits
from recast_pl.inference.server.log_filter import RateFilter
from recast_pl.inference.server.request_log import ACCESS_LOG
from recast_pl.runs.folder import RunFolder

CONTENTS = [path.read_bytes() for path in FOOD[:3]]
TEXTS = [base64.b64encode(content).decode() for content in CONTENTS]
JPEG = {"Content-Type": "image/jpeg"}


def test_every_kind_of_body_gives_the_same_answer(serve):  # noqa: F811
    client = serve()
    wanted = [ask(client, content).json() for content in CONTENTS]
    files = [("image", ("a.jpg", content)) for content in CONTENTS]
    renamed = [("images", file) for _, file in files]
    single = [
        client.post("/predict?task=food", content=CONTENTS[0], headers=JPEG),
        client.post("/predict", json={"image": TEXTS[0], "task": "food"}),
        client.post("/predict?task=food", json={"image": "data:image/jpeg;base64," + TEXTS[0]}),
        client.post("/predict?task=signs", data={"task": "food"}, files=files[:1]),  # the form goes first
    ]
    for answer in single:
        assert answer.json() == wanted[0]
    several = [
        client.post("/predict", data={"task": "food"}, files=files),
        client.post("/predict", data={"task": "food"}, files=renamed),
        client.post("/predict", json={"images": TEXTS, "task": "food"}),
    ]
    for answer in several:
        for found, one in zip(answer.json(), wanted, strict=True):
            assert found["probabilities"] == pytest.approx(one["probabilities"], abs=1e-5)
    assert len(client.post("/predict?task=food", files=renamed[:1]).json()) == 1
    assert "familiar" in client.post("/predict", content=CONTENTS[0], headers=JPEG).json()
    assert "familiar" in client.post("/predict?task=auto", content=CONTENTS[0], headers=JPEG).json()


def test_the_most_probable_classes_alone(serve, model):  # noqa: F811
    client, wanted = serve(), model.predict(FOOD[0], "food")[0].ranked(2)
    for answer in (
        client.post("/predict?task=food&top_k=2", content=CONTENTS[0], headers=JPEG),
        client.post("/predict", data={"task": "food", "top_k": "2"}, files={"image": CONTENTS[0]}),
        client.post("/predict", json={"image": TEXTS[0], "task": "food", "top_k": 2}),
    ):
        found = answer.json()["probabilities"]
        assert list(found) == list(wanted)
        assert found == pytest.approx(wanted, abs=1e-5)
    assert (
        len(client.post("/predict?task=food&top_k=99", content=CONTENTS[0], headers=JPEG).json()["probabilities"]) == 5
    )


BAD = {  # body, status, part of the error
    "not json": (b"{", 422, "the body is not JSON"),
    "deep": (b"[" * 100_000, 422, "the body is not JSON"),
    "list": (b"[]", 422, "needs either 'image' or 'images'"),
    "both": (b'{"image": "", "images": []}', 422, "needs either 'image' or 'images'"),
    "none": (b'{"images": []}', 422, "with at least one"),
    "many": (json.dumps({"images": [""] * 33}).encode(), 413, "has 33 images; send at most 32"),
    "number": (b'{"image": 3}', 422, "is not a text in base64"),
    "no base64": ('{"image": "ä?"}'.encode(), 422, "is not a text in base64"),
    "no image": (b'{"image": "aGVsbG8="}', 422, "of an unknown format"),
    "one of them": (json.dumps({"images": [TEXTS[0], "aGVsbG8="]}).encode(), 422, "image 2: the image cannot be read"),
    "task": (json.dumps({"image": TEXTS[0], "task": 3}).encode(), 422, "task must be a text"),
    **{
        f"top_k {value!r}": (json.dumps({"image": TEXTS[0], "top_k": value}).encode(), 422, "give a whole number above")
        for value in (0, -1, True, 1.5, "x", "²", [])
    },
}


@pytest.mark.parametrize("name", BAD)
def test_an_unusable_json_body_gets_a_clear_error(name, serve):  # noqa: F811
    body, status, message = BAD[name]
    answer = serve().post("/predict", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, message in answer.json()["error"]) == (status, True), answer.text


def test_a_request_of_more_images_than_may_wait_is_refused(serve):  # noqa: F811
    client = serve(queue_size=2)
    answer = client.post("/predict", json={"images": TEXTS, "task": "food"})
    assert (answer.status_code, answer.json()["error"]) == (413, "the request has 3 images; send fewer in one request")
    assert len(client.post("/predict", json={"images": TEXTS[:2], "task": "food"}).json()) == 2
    assert client.get("/health").json()["waiting"] == 0


def test_work_for_a_client_that_has_left_is_dropped(model, monkeypatch):  # noqa: F811
    app, left, asked = create_app(model, Limits(timeout=60)), [], threading.Event()

    async def decode(self, content, size):
        asked.set()
        try:
            await asyncio.sleep(60)
        finally:
            left.append(content)

    monkeypatch.setattr(Decoders, "decode", decode)
    headers = [(b"host", b"localhost"), (b"content-type", b"image/jpeg")]
    where = {"path": "/predict", "query_string": b"task=food", "root_path": "", "scheme": "http"}
    messages = [{"type": "http.request", "body": CONTENTS[0]}, {"type": "http.disconnect"}]
    sent = []

    async def receive():
        if len(messages) == 1:
            assert await asyncio.to_thread(asked.wait, 20)
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", **where, "headers": headers}
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 20))
    assert left == [CONTENTS[0]]
    assert sent[0]["status"] == 499
    assert TestClient(app, base_url=LOCAL).get("/health").json()["waiting"] == 0


def test_an_added_task_is_deleted_for_good_and_those_of_the_run_stay(serve, run, model, tmp_path):  # noqa: F811
    folder = RunFolder(tmp_path / "run")
    stored = {"keep": partial(keep_received, folder), "forget": partial(forget_received, folder)}
    added = tuned(patches(run)["food"], "added task", 1)
    for app in ({}, stored):
        client = serve(token=TOKEN, app=app)
        assert client.delete("/tasks/added%20task", headers=ADDING).status_code == 404
        assert client.post("/tasks", content=added.to_bytes(), headers=ADDING).status_code == 201
        assert folder.received.finished_names() == (["added task"] if app else [])
        for headers, status in (({}, 401), ({"Authorization": "Bearer x"}, 401)):
            assert client.delete("/tasks/added%20task", headers=headers).status_code == status
        answer = client.delete("/tasks/added%20task", headers=ADDING)
        assert (answer.status_code, answer.json()) == (200, {"name": "added task", "classes": added.classes})
        assert model.tasks == ["food", "signs"]
        assert folder.received.finished_names() == []
        assert client.delete("/tasks/added%20task", headers=ADDING).status_code == 404
        refused = client.delete("/tasks/food", headers=ADDING)
        assert (refused.status_code, "take it out there, with 'remove'" in refused.json()["error"]) == (409, True)
        assert ask(client).status_code == 200
        assert metrics(client)["recast_pl_requests_total", "/tasks/{name}", "409"] == 1
    assert serve().delete("/tasks/food", headers=ADDING).status_code == 403


def test_a_task_received_before_a_restart_is_deleted_too(serve, run, model, tmp_path):  # noqa: F811
    folder = RunFolder(tmp_path / "run")
    keep_received(folder, added := tuned(patches(run)["food"], "added", 1), added.to_bytes(), None)
    lines = []
    follower = Follower(model, folder, lines.append)
    follower.look()
    client = serve(token=TOKEN, app={"forget": partial(forget_received, folder)})
    assert client.delete("/tasks/added", headers=ADDING).status_code == 200
    follower.look()
    assert model.tasks == ["food", "signs"]
    assert lines == ["task added is added"]


def test_a_task_that_is_deleted_while_the_folder_is_read_does_not_come_back(serve, run, model, tmp_path, monkeypatch):  # noqa: F811
    folder, add, answers = RunFolder(tmp_path / "run"), model.add_patch, []
    added = tuned(patches(run)["food"], "added", 1)
    keep_received(folder, added, added.to_bytes(), None)
    client = serve(token=TOKEN, app={"forget": partial(forget_received, folder)})
    model.add_patch(added)
    deleting = threading.Thread(target=lambda: answers.append(client.delete("/tasks/added", headers=ADDING)))

    def add_late(*words, **settings):
        deleting.start()
        deleting.join(1)
        return add(*words, **settings)

    monkeypatch.setattr(model, "add_patch", add_late)
    Follower(model, folder, lambda line: None).look()  # it finds a task that it does not know
    deleting.join()
    assert answers[0].status_code == 200
    assert model.tasks == ["food", "signs"]


def test_a_task_that_cannot_be_deleted_stays(serve, run, model, tmp_path, monkeypatch):  # noqa: F811
    folder = RunFolder(tmp_path / "run")
    client = serve(token=TOKEN, app={"forget": partial(forget_received, folder)})
    keep_received(folder, added := tuned(patches(run)["food"], "added", 1), added.to_bytes(), None)
    model.add_patch(added)

    def fail(path, missing_ok):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", fail)
        with pytest.raises(StorageError, match="cannot delete task 'added'"):
            forget_received(folder, "added")
        answer = client.delete("/tasks/added", headers=ADDING)
    assert (answer.status_code, "see the server's disk" in answer.json()["error"]) == (500, True)
    assert "added" in model.tasks


def test_a_server_is_ready_when_it_has_warmed_up(model, monkeypatch):  # noqa: F811
    go, done, predict = threading.Event(), [], model.predict_tensors

    def held(images, tasks):
        assert go.wait(20)
        done.append(list(tasks))
        return predict(images, tasks)

    monkeypatch.setattr(model, "predict_tensors", held)
    monkeypatch.setattr(model, "_router", None)
    with TestClient(create_app(model), base_url=LOCAL) as client:
        answer = client.get("/ready")
        assert (answer.status_code, answer.json()) == (503, {"error": "the server is starting; try again later"})
        assert answer.headers["retry-after"] == "1"
        assert client.get("/health").status_code == 200
        go.set()
        until(lambda: client.get("/ready").status_code == 200)
        assert client.get("/ready").json() == {"status": "ready"}
        assert client.head("/ready").status_code == 200
        assert done[0] == ["food"]
        assert model._router is not None
        assert metrics(client)["recast_pl_batch_images_count",] == 0


def test_a_server_that_cannot_decode_is_not_ready_but_alive(model, monkeypatch):  # noqa: F811
    monkeypatch.setattr("recast_pl.inference.server.decoding._PROGRAM", "no.such.program")
    with TestClient(create_app(model), base_url=LOCAL) as client:
        until(lambda: "cannot be decoded" in client.get("/ready").json()["error"])
        assert client.get("/health").json()["status"] == "ok"


def test_a_task_that_fails_does_not_keep_a_server_from_being_ready(model, monkeypatch):  # noqa: F811
    def fail(images, tasks):
        raise RunError("bad")

    monkeypatch.setattr(model, "predict_tensors", fail)
    with TestClient(create_app(model), base_url=LOCAL) as client:
        until(lambda: client.get("/ready").status_code == 200)


def test_each_request_has_an_identifier_and_a_line_in_the_log(serve, model, caplog, monkeypatch):  # noqa: F811
    client = serve()
    with caplog.at_level(logging.INFO, ACCESS_LOG):
        assert client.get("/health", headers={"X-Request-ID": "abc-1"}).headers["x-request-id"] == "abc-1"
        own = client.get("/no%0Awhere", headers={"X-Request-ID": "two words"}).headers["x-request-id"]
        monkeypatch.setattr(model, "predict_tensors", lambda *_: 1 / 0)
        failed = ask(client)
    assert re.fullmatch("[0-9a-f]{32}", own)
    lines = [record.getMessage() for record in caplog.records if record.name == ACCESS_LOG]
    number = r"\d+ ms"
    assert re.fullmatch(f"GET /health 200 {number} abc-1", lines[0])
    assert re.fullmatch(rf"GET /no\\nwhere 404 {number} {own}", lines[1])
    assert re.fullmatch(f"POST /predict 500 {number} {failed.headers['x-request-id']}", lines[2])


def test_the_access_log_has_a_bounded_number_of_lines(monkeypatch):
    log, clock, lines = logging.getLogger("test of the rate"), [10.0], []
    log.addFilter(RateFilter(3))
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log.addHandler(handler)
    monkeypatch.setattr("recast_pl.inference.server.log_filter.time.monotonic", lambda: clock[0])
    for _ in range(5):
        log.error("line %d", 1)
    clock[0] = 11.0
    log.error("line %d", 2)
    log.error("line %d", 2)
    assert lines == ["line 1"] * 3 + ["(2 more were left out)\nline 2", "line 2"]


def test_pages_of_allowed_origins_use_the_server(serve):  # noqa: F811
    client = serve(app={"origins": ["https://shop.example"]})
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type,x-request-id"}
    allowed = client.options("/predict", headers={"Origin": "https://shop.example", **asked})
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://shop.example")
    files = {"image": CONTENTS[0]}
    answer = client.post("/predict", data={"task": "food"}, files=files, headers={"Origin": "https://shop.example"})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://shop.example")
    missing = client.post("/predict", data={"task": "no"}, files=files, headers={"Origin": "https://shop.example"})
    assert (missing.status_code, missing.headers["access-control-allow-origin"]) == (404, "https://shop.example")
    for origin in ("https://evil.example", "https://shop.example.evil.example", "null"):
        refused = client.post("/predict", data={"task": "food"}, files=files, headers={"Origin": origin})
        assert (refused.status_code, "access-control-allow-origin" in refused.headers) == (403, False)
        assert (
            "access-control-allow-origin" not in client.options("/predict", headers={"Origin": origin, **asked}).headers
        )
    everyone = serve(app={"origins": ["*"]}).get("/tasks", headers={"Origin": "https://any.example"})
    assert (everyone.status_code, everyone.headers["access-control-allow-origin"]) == (200, "*")


def test_a_path_of_a_proxy_may_be_passed_on_or_removed(serve):  # noqa: F811
    client = serve(app={"root_path": "/recast/"})
    for path in ("/recast/health", "/health"):
        assert client.get(path).json()["status"] == "ok"
    assert client.get("/openapi.json").json()["servers"] == [{"url": "/recast"}]
    assert metrics(client)["recast_pl_requests_total", "/health", "200"] == 2
    page = client.get("/recast/docs").text
    for address in ("/recast/docs/swagger-ui.css", "/recast/docs/swagger-ui-bundle.js", "/recast/openapi.json"):
        assert re.search(f"""["']{address}["']""", page)
        assert client.get(address).status_code == 200


def test_the_docs_load_nothing_from_elsewhere(model):  # noqa: F811
    outer = FastAPI()
    outer.mount("/vision", create_app(model))
    for client, root in (
        (TestClient(create_app(model), base_url=LOCAL), ""),
        (TestClient(outer, base_url=LOCAL), "/vision"),
    ):
        page = client.get(f"{root}/docs")
        assert page.status_code == 200
        assert "default-src 'none'" in page.headers["content-security-policy"]
        addresses = re.findall(r"""(?:src|href)=["']([^"']*)|url: ["']([^"']*)""", page.text)
        addresses = [first or second for first, second in addresses]
        assert f"{root}/openapi.json" in addresses
        for address in addresses:
            assert address == "data:," or client.get(address).status_code == 200
        assert "http" not in "".join(addresses)
    assert client.get("/vision/docs/__init__.py").status_code == 404


def test_the_description_names_all_bodies_and_options(serve):  # noqa: F811
    paths = serve(token=TOKEN).get("/openapi.json").json()["paths"]
    predict, delete = paths["/predict"]["post"], paths["/tasks/{name}"]["delete"]
    assert list(predict["requestBody"]["content"]) == ["multipart/form-data", "application/json", "image/*"]
    assert {(each["name"], each["in"]) for each in predict["parameters"]} == {("task", "query"), ("top_k", "query")}
    assert delete["security"]
    assert {"200", "401", "403", "404", "409", "500"} <= delete["responses"].keys()
    assert "503" in paths["/ready"]["get"]["responses"]


def test_the_command_serves_patches_beside_the_run(run, tmp_path, monkeypatch, capsys):  # noqa: F811
    more = dataclasses.replace(patches(run)["food"], task="more")
    more.save(file := tmp_path / "patches" / "02_more.safetensors")
    renamed(run, "more").save(tmp_path / "signatures" / "02_more.safetensors")
    apps, log = [], logging.getLogger(ACCESS_LOG)
    for name in ("handlers", "level"):  # the command changes them
        monkeypatch.setattr(log, name, getattr(log, name))
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: apps.append(server.config.app))
    monkeypatch.setenv("RECAST_PL_TOKEN", TOKEN)
    words = ["serve", "--run_dir", str(run), "--port", "0", "--device", "cpu", "--patches", str(file)]
    assert main([*words, "--root_path", "/recast", "--allowed_origins", "https://shop.example"]) == 0
    assert "serving food, signs, more at http://127.0.0.1:" in capsys.readouterr().out
    client = TestClient(apps[0], base_url=LOCAL)
    assert [task["name"] for task in client.get("/recast/tasks").json()] == ["food", "signs", "more"]
    assert "familiar" in client.post("/predict", content=CONTENTS[0], headers=JPEG).json()  # its signature was found
    assert client.delete("/tasks/more", headers=ADDING).status_code == 409
    assert client.get("/tasks", headers={"Origin": "https://shop.example"}).status_code == 200
    assert main([*words, str(file)]) == 2
    assert "more" in capsys.readouterr().err
    assert main([*words, "--root_path", "recast"]) == 2
    assert "root_path is 'recast'; give a path that begins with a slash" in capsys.readouterr().err
