"""The server as a process: the documented commands, many clients, slow clients, a browser, and shutdown."""

import asyncio
import dataclasses
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, contextmanager, suppress
from urllib.parse import urlsplit

import aiohttp
import pytest
from conftest import ROOT
from prometheus_client.parser import text_string_to_metric_families
from test_predictor import FOOD, SIGNS, patches, run  # noqa: F401
from test_report import CHROMIUM
from test_serve import jpeg_of_scans, renamed

import recast_pl
import recast_pl.cli

pytestmark = pytest.mark.slow
TIMEOUT = 20  # seconds, enough for a request on a busy machine


TOKEN = "secret"
HEAD = "POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\n"
TASK = b'--x\r\nContent-Disposition: form-data; name="task"\r\n\r\nfood\r\n'
FILE = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
PAGE = ROOT / "docs" / "howto" / "serving.md"
START, REQUESTS, MORE = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)[:3]


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):  # noqa: F811
    """The folder in which the documented commands run."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "data").symlink_to(ROOT / "data")
    shutil.copytree(run, folder / "logs" / "mine")
    people = dataclasses.replace(patches(run)["food"], task="people")
    people.save(folder / "more" / "patches" / "02_people.safetensors")
    renamed(run, "people").save(folder / "more" / "signatures" / "02_people.safetensors")
    return folder


@contextmanager
def started(folder, *more, prefix=(), **settings):
    """The process and the URL of the documented server, with more options."""
    shutil.rmtree(folder / "logs" / "mine" / "received", ignore_errors=True)  # what tests before have added
    with restarted(folder, *more, prefix=prefix, **settings) as server:
        yield server


@contextmanager
def restarted(folder, *more, prefix=(), **settings):
    """The same, with the tasks that were added to a server before."""
    (words,) = re.findall(r"python (-m recast_pl serve .*)", START)
    command = [*prefix, sys.executable, *shlex.split(words), "--port", "0", *more]
    environment = os.environ | {"RECAST_PL_TOKEN": TOKEN}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, text=True, **settings) as process:
        try:
            yield process, re.search(r"http://\S+(?=;)", process.stdout.readline())[0]
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def server(folder):
    """The process and the URL of the documented server; it is stopped after the last test."""
    with started(folder, "--timeout", str(TIMEOUT), "--queue_size", "16") as (process, url):
        yield process, url
        end(process, url)


def connect(url):
    address = urlsplit(url)
    return socket.create_connection((address.hostname, address.port))


def is_ready(url):
    try:
        with urllib.request.urlopen(f"{url}/ready"):
            return True
    except urllib.error.HTTPError:
        return time.sleep(0.1)


def refuses(url):
    try:
        connect(url).close()
    except ConnectionRefusedError:
        return True
    return time.sleep(0.1)


def end(process, url):
    """Checks that a server refuses connections after SIGTERM, but answers requests in progress."""
    body = TASK + FILE + FOOD[0].read_bytes() + b"\r\n--x--\r\n"
    with connect(url) as connection:
        connection.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body[:500])
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert any(refuses(url) for _ in range(100))  # soon
        connection.sendall(body[500:])
        connection.settimeout(20)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b'"task":"food"' in answer
    assert process.wait(60) == 0


def counts_of(url):
    with urllib.request.urlopen(f"{url}/metrics") as response:
        families = text_string_to_metric_families(response.read().decode())
        return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_the_documented_commands(server, folder, run):  # noqa: F811
    said = []
    for command in REQUESTS.replace("\\\n", " ").strip().splitlines():
        words = shlex.split(command.replace("http://127.0.0.1:8000", server[1]).replace("$RECAST_PL_TOKEN", TOKEN))
        curl = subprocess.run([*words, "-s", "--fail-with-body"], cwd=folder, capture_output=True, text=True)
        assert curl.returncode == 0, curl.stdout
        said.append(curl.stdout)
    assert json.loads(said[0])["task"] == "signs"
    assert {"task", "task_probability", "familiar", "second"} < json.loads(said[1]).keys()
    assert {"food", "signs"} <= {task["name"] for task in json.loads(said[2])}
    assert json.loads(said[3]) == []  # too few images to tell whether they have drifted
    assert json.loads(said[4])["status"] == "ok"
    assert 'recast_pl_requests_total{path="/predict",status="200"}' in said[5]
    assert json.loads(said[6]) == {"name": "people", "classes": patches(run)["food"].classes}
    assert len(list((folder / "logs" / "mine" / "patches").iterdir())) == 2  # the run itself has not changed


def test_the_documented_bodies_and_the_deletion_of_a_task(folder, tmp_path):
    mine = tmp_path / "logs" / "mine"
    shutil.copytree(folder / "logs" / "mine", mine, ignore=shutil.ignore_patterns("received"))
    (tmp_path / "data").symlink_to(ROOT / "data")
    people = [str(folder / "more" / "patches" / "02_people.safetensors")]
    signature = str(folder / "more" / "signatures" / "02_people.safetensors")
    with started(tmp_path) as (_, url):
        files = ["-F", f"patch=@{people[0]}", "-F", f"signature=@{signature}"]
        words = ["curl", "-s", "--fail-with-body", "-H", f"Authorization: Bearer {TOKEN}", *files, f"{url}/tasks"]
        assert subprocess.run(words).returncode == 0
        said = []
        for command in MORE.strip().splitlines():
            line = command.replace("http://127.0.0.1:8000", url).replace("curl", "curl -s --fail-with-body")
            bash = ["bash", "-c", line]
            done = subprocess.run(
                bash, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"RECAST_PL_TOKEN": TOKEN}
            )
            assert done.returncode == 0, done.stdout
            said.append(json.loads(done.stdout))
        assert (said[0]["task"], len(said[0]["probabilities"])) == ("signs", 3)
        assert [one["task"] for one in said[1]] == ["signs", "signs"]
        assert said[2]["label"] == said[0]["label"]
        assert said[3]["name"] == "people"
        assert tasks_of(url) == ["food", "signs"]
    with restarted(tmp_path, "--patches", *people) as (_, url):
        assert tasks_of(url) == ["food", "signs", "people"]  # from the option alone
        with urllib.request.urlopen(f"{url}/openapi.json") as response:
            assert json.loads(response.read())["openapi"].startswith("3.")
        request = urllib.request.Request(f"{url}/tasks/people", method="DELETE")
        request.add_header("Authorization", f"Bearer {TOKEN}")
        with pytest.raises(urllib.error.HTTPError, match="409"):
            urllib.request.urlopen(request)
        request = urllib.request.Request(f"{url}/predict", (FOOD[0]).read_bytes(), {"Content-Type": "image/jpeg"})
        with urllib.request.urlopen(request) as response:
            assert "familiar" in json.loads(response.read())  # its signature was found


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


NGINX = """
user root; daemon off; pid nginx.pid; error_log stderr;
events {{}}
http {{
    access_log off; client_body_temp_path body; proxy_temp_path proxy;
    fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    server {{ listen 127.0.0.1:{port}; {block} }}
}}
"""
CADDY = "{{ admin off\n auto_https off\n }}\nhttp://127.0.0.1:{port} {{\n{block}\n}}\n"
PROXIES = {
    "nginx": (NGINX, lambda folder: ["/usr/sbin/nginx", "-p", str(folder), "-c", "conf"]),
    "caddy": (CADDY, lambda folder: ["caddy", "run", "--adapter", "caddyfile", "--config", "conf"]),
}


@contextmanager
def proxy(name, server, folder):
    """The URL of a proxy with the documented settings, in front of a server."""
    (block,) = re.findall(rf"```{name}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    template, command = PROXIES[name]
    port = free_port()
    block = block.replace("127.0.0.1:8000", urlsplit(server).netloc)
    (folder / "conf").write_text(template.format(port=port, block=block))
    environment = os.environ | {"HOME": str(folder)}
    with subprocess.Popen(command(folder), cwd=folder, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + 30
            while refuses(url := f"http://127.0.0.1:{port}"):
                assert time.monotonic() < end
                assert process.poll() is None
            yield url
        finally:
            process.terminate()


@pytest.mark.parametrize("name", PROXIES)
def test_the_documented_proxies(name, folder, run, tmp_path):  # noqa: F811
    if not shutil.which(PROXIES[name][1](tmp_path)[0]):
        pytest.skip(f"{name} is not installed")
    (wanted,) = recast_pl.load(run).predict(FOOD[0], "food")
    with started(folder, "--root_path", "/recast") as (_, server), proxy(name, server, tmp_path) as url:
        while not is_ready(server):
            pass
        for path in ("/", "/docs", "/docs/swagger-ui.css", "/openapi.json", "/tasks", "/ready"):
            with urllib.request.urlopen(f"{url}/recast{path}") as response:
                assert response.status == 200
                assert len(response.headers["X-Request-ID"]) >= 32
        big = FOOD[0].read_bytes() + bytes(3_000_000)  # more than nginx itself allows
        # as the page sends it, although the proxy has another name
        headers = {"Content-Type": "image/jpeg", "Origin": "https://www.example.org", "X-Requested-With": "recast_pl"}
        request = urllib.request.Request(f"{url}/recast/predict?task=food", big, headers)
        with urllib.request.urlopen(request) as response:
            assert json.loads(response.read())["probabilities"] == pytest.approx(wanted.probabilities, abs=1e-5)
        del headers["X-Requested-With"]
        # a proxy must not see the connection close while it still sends
        request = urllib.request.Request(f"{url}/recast/predict?task=food", big, headers)
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(request)
        with pytest.raises(urllib.error.HTTPError, match="413"):
            urllib.request.urlopen(f"{url}/recast/predict?task=food", bytes(20_000_001))


def test_connections_above_the_limit_are_refused_and_the_log_tells_of_requests(folder, tmp_path):
    with (
        (tmp_path / "log").open("w") as log,
        started(folder, "--connections", "5", stderr=log) as (_, url),
        ExitStack() as stack,
    ):
        open_ones = [stack.enter_context(connect(url)) for _ in range(5)]
        time.sleep(0.5)
        late = stack.enter_context(connect(url))
        late.settimeout(10)
        answer = b"".join(iter(lambda: late.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"Retry-After: 1" in answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {
            "error": "too many connections are open; try again later"
        }
        open_ones[0].sendall(
            b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Request-ID: mine\r\nConnection: close\r\n\r\n"
        )
        assert b'"status":"ok"' in b"".join(iter(lambda: open_ones[0].recv(65536), b""))
    assert re.search(r"^[\d-]+ [\d:,]+ GET /health 200 \d+ ms mine$", (tmp_path / "log").read_text(), re.MULTILINE)


def tasks_of(url):
    with urllib.request.urlopen(f"{url}/tasks") as response:
        return [task["name"] for task in json.loads(response.read())]


def test_an_added_task_outlives_a_restart_and_changes_of_the_run_take_effect(folder, tmp_path):
    mine = tmp_path / "logs" / "mine"
    shutil.copytree(folder / "logs" / "mine", mine, ignore=shutil.ignore_patterns("received"))
    (post,) = (line for line in REQUESTS.replace("\\\n", " ").splitlines() if "RECAST_PL_TOKEN" in line)
    with started(tmp_path) as (_, url):
        words = shlex.split(post.replace("http://127.0.0.1:8000", url).replace("$RECAST_PL_TOKEN", TOKEN))
        assert subprocess.run([*words, "-s", "--fail-with-body"], cwd=folder, capture_output=True).returncode == 0
    with restarted(tmp_path) as (_, url):
        assert tasks_of(url) == ["food", "signs", "people"]
        assert recast_pl.cli.main(["remove", "--run_dir", str(mine), "--task", "food"]) == 0
        assert any(tasks_of(url) == ["signs", "people"] or time.sleep(0.2) for _ in range(100))
        assert recast_pl.cli.main(["rename", "--run_dir", str(mine), "--task", "signs", "--name", "boards"]) == 0
        assert any(tasks_of(url) == ["people", "boards"] or time.sleep(0.2) for _ in range(100))


def memory(process):
    """Resident bytes of a process."""
    return 1024 * int(subprocess.run(["ps", "-o", "rss=", "-p", str(process.pid)], capture_output=True).stdout)


async def one_client(session, url, jobs, counts):
    """Sends requests until each is answered, and tries again where the server asks for it."""
    for path, task, wanted in jobs:
        while True:
            form = aiohttp.FormData({"task": task})
            form.add_field("image", path.read_bytes(), filename="image.jpg")
            async with session.post(f"{url}/predict", data=form) as response:
                counts[response.status] = counts.get(response.status, 0) + 1
                answer = await response.json()
                if response.status == 200:
                    assert answer["task"] == task
                    assert answer["probabilities"] == pytest.approx(wanted.probabilities, abs=1e-5)
                    break
                assert (response.status, response.headers["Retry-After"]) == (503, "1")
            await asyncio.sleep(random.uniform(0.5, 1.5))


def test_250_clients_get_right_answers_in_bounded_memory(server, run):  # noqa: F811
    process, url = server
    model = recast_pl.load(run)
    known = [
        (path, task, wanted)
        for task, paths in (("food", FOOD), ("signs", SIGNS))
        for path, wanted in zip(paths, model.predict(paths, task), strict=True)
    ]

    async def load(clients, images):
        counts = {}
        connections = aiohttp.TCPConnector(limit=0, force_close=True)  # the server may just be closing an open one
        async with aiohttp.ClientSession(connector=connections, timeout=aiohttp.ClientTimeout(120)) as session:
            await asyncio.gather(
                *(one_client(session, url, random.choices(known, k=images), counts) for _ in range(clients))
            )
        return counts

    asyncio.run(load(50, 2))
    before, bytes_before = counts_of(url), memory(process)
    counts = asyncio.run(load(250, 6))
    assert counts[200] == 250 * 6
    assert counts.get(503, 0) > 0  # 250 are more than 16
    assert memory(process) - bytes_before < 100e6
    grown = {name: value - before.get(name, 0) for name, value in counts_of(url).items()}
    for status, count in counts.items():
        assert grown["recast_pl_requests_total", "/predict", str(status)] == count
    assert grown["recast_pl_batch_images_sum",] == 250 * 6
    # images wait for each other in batches; how many depends on how fast processes decode them
    assert grown["recast_pl_batch_images_sum",] > 2 * grown["recast_pl_batch_images_count",]


def trickle(url, begin, until):
    """The server's answer to a client that sends a byte every now and then; b"" if the server hangs up."""
    said = b""
    with connect(url) as connection:
        connection.sendall(begin)
        connection.settimeout(0.2)
        while time.monotonic() < until:
            try:
                more = connection.recv(65536)
            except TimeoutError:
                with suppress(ConnectionError):  # recv will tell
                    connection.sendall(b"x" if begin and not said else b"")
            except ConnectionError:
                return said
            else:
                if not more:
                    return said
                said += more  # head and body may arrive apart
    raise AssertionError("the server waits without end")


def deaf(url):
    """How many answers a client gets that sends many requests and reads late."""
    with connect(url) as connection:
        connection.settimeout(10)
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 3000)
        time.sleep(TIMEOUT)
        said = b""
        with suppress(ConnectionError):
            said = b"".join(iter(lambda: connection.recv(1 << 20), b""))
    return said.count(b"HTTP/1.1 200")


def test_slow_clients_are_cut_off_and_do_not_delay_others(server):
    _, url = server

    async def among(begins):
        until = time.monotonic() + 2 * TIMEOUT
        slow = [asyncio.to_thread(trickle, url, begin, until) for begin in begins]
        waiting = asyncio.gather(*slow, asyncio.to_thread(deaf, url))
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(TIMEOUT / 2)) as session:
            for _ in range(5):
                form = aiohttp.FormData({"task": "food"})
                form.add_field("image", FOOD[0].read_bytes(), filename="image.jpg")
                async with session.post(f"{url}/predict", data=form) as response:
                    assert response.status == 200
                await asyncio.sleep(0.2)
        return await waiting

    head, body = (HEAD + "X-Slow: ").encode(), f"{HEAD}Content-Length: 9999\r\n\r\n".encode() + FILE
    nothing, heads, bodies, chunked, answers = asyncio.run(
        among([b"", head, body, f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode()])
    )
    assert nothing == heads == b""
    assert bodies.startswith(b"HTTP/1.1 408 ")
    assert b"did not arrive in 20 seconds" in bodies
    assert answers < 3000
    assert chunked.startswith(b"HTTP/1.1 4")  # its length is not a number


def test_connections_above_the_limit_of_files_do_not_fill_the_log(folder, tmp_path):
    limited = ["bash", "-c", 'ulimit -n 64; exec "$@"', "bash"]
    with (
        (tmp_path / "log").open("w") as log,
        started(folder, prefix=limited, stderr=log) as (process, url),
        ExitStack() as stack,
    ):
        for _ in range(400):
            stack.enter_context(connect(url))
        time.sleep(4)
        stack.close()
        assert counts_of(url)["recast_pl_tasks",] == 2  # it goes on
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert any("too many connections are open" in line for line in lines)
    assert len(lines) < 30


def test_images_that_would_decode_slowly_do_not_delay_the_end(folder):
    body = TASK + FILE + jpeg_of_scans(5000) + b"\r\n--x--\r\n"
    with started(folder) as (process, url), ExitStack() as stack:
        for _ in range(4):
            connection = stack.enter_context(connect(url))
            connection.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        process.wait(120)
        assert time.monotonic() - start < 10


class Browser:
    """Chromium, controlled through its own protocol."""

    def __init__(self, socket):
        self.socket, self.count, self.said = socket, 0, []

    async def __call__(self, method, **words):
        self.count += 1
        await self.socket.send_json({"id": self.count, "method": method, "params": words})
        async for message in self.socket:
            content = json.loads(message.data)
            if content.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.said.append(content["params"])
            if content.get("id") == self.count:
                assert "error" not in content, content
                return content["result"]
        raise AssertionError("the browser has closed")

    async def value(self, expression):
        found = await self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return found["result"].get("value")

    async def until(self, expression):
        end = time.monotonic() + 30
        while not await self.value(expression):
            assert time.monotonic() < end, (expression, await self.value("document.body.innerText"), self.said)
            await asyncio.sleep(0.05)

    async def key(self, name, code):
        for kind in ("rawKeyDown", "keyUp"):
            await self("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)


@contextmanager
def chromium(folder, *more):
    """The debugging URL of a Chromium that resolves no host names, so that it cannot load anything from a network."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0"]
    options += ["--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    process = subprocess.Popen(
        [CHROMIUM, *options, *more, f"--user-data-dir={folder}", "about:blank"], stderr=subprocess.DEVNULL
    )
    try:
        port, end = folder / "DevToolsActivePort", time.monotonic() + 60
        while not (port.is_file() and port.read_text().count("\n")):
            assert time.monotonic() < end
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port.read_text().split()[0]}"
    finally:
        process.terminate()
        process.wait(30)


ROWS = """[...document.querySelectorAll("article tr")].map(row => [row.cells[0].textContent,
  row.querySelector(".bar").getBoundingClientRect().width, row.querySelector("td").textContent])"""
FACTS = """[...document.querySelectorAll("article dt")].map(name => [name.textContent, name.nextSibling.textContent])"""
SHAPES = [(320, 640, "light"), (320, 640, "dark"), (1280, 800, "light"), (1280, 800, "dark")]


def shown(prediction):
    return f"{prediction.label}, {100 * prediction.probability:.1f} %" if prediction.label else "None of these tasks"


async def visit(browser, url, model, broken, odd, axe):
    async def expect(*predictions):
        await browser.until("document.querySelectorAll('article .answer').length === " + str(len(predictions)))
        wanted = [shown(prediction) for prediction in predictions]
        await browser.until(
            "JSON.stringify([...document.querySelectorAll('.answer')].map(p => p.textContent)) ==="
            f"{json.dumps(json.dumps(wanted, separators=(',', ':'), ensure_ascii=False))}"
        )
        if len(predictions) > 1:
            return
        (one,) = predictions
        ranked = sorted(one.probabilities.items(), key=lambda item: -item[1])
        rows = await browser.value(ROWS)
        assert [(name, percent) for name, _, percent in rows] == [(n, f"{100 * p:.1f} %") for n, p in ranked]

    for domain in ("Log", "Runtime", "Page", "DOM"):
        await browser(f"{domain}.enable")
    await browser("Page.navigate", url=url)
    await browser.until("document.querySelectorAll('option').length > 1")

    async def choose(*paths):
        root = (await browser("DOM.getDocument"))["root"]["nodeId"]
        node = await browser("DOM.querySelector", nodeId=root, selector="#file")
        await browser("DOM.setFileInputFiles", nodeId=node["nodeId"], files=[str(path) for path in paths])

    async def expect_found(path):
        (wanted,) = model.predict(path)
        await expect(wanted)
        facts, second = dict(await browser.value(FACTS)), wanted.second
        if wanted.task == "none":
            assert facts["Likeliest"] == f"{second.task}, {100 * second.task_probability:.1f} %"
        else:
            assert facts["Task"] == f"{wanted.task}, {100 * wanted.task_probability:.1f} %"
            assert facts["Second choice"].startswith(f"{second.task}, {100 * second.task_probability:.1f} %")
        assert facts["At least as unusual"] == f"{100 * wanted.familiar:.1f} % of known images"

    assert await browser.value("results.children.length") == 0
    assert await browser.value("task.selectedOptions[0].textContent") == "find the task"
    await choose(FOOD[1])
    await expect_found(FOOD[1])
    assert await browser.value("document.querySelector('article img').naturalWidth") > 0
    await choose(odd)
    await expect_found(odd)
    # by keyboard: the task, its classes, then the file
    await browser.key("Tab", 9)
    assert await browser.value("document.activeElement.id") == "task"
    for name in ("food", "signs"):
        await browser.key("ArrowDown", 40)
        await browser.until(f"known.firstChild.textContent === '{len(model.classes(name))} classes of {name}'")
        await expect(*model.predict(odd, name))
        listed = await browser.value("[...known.querySelectorAll('li')].map(item => item.textContent)")
        assert listed == model.classes(name)
    await browser.key("Tab", 9)
    assert await browser.value("document.activeElement.tagName") == "SUMMARY"
    await browser.key("Tab", 9)
    assert await browser.value("document.activeElement.id") == "file"
    tree = (await browser("Accessibility.getFullAXTree"))["nodes"]
    named = {(n["role"]["value"], n["name"]["value"]) for n in tree if "name" in n and not n["ignored"]}
    assert ("combobox", "Task") in named
    assert any(role == "button" and "Choose images, drop or paste them here" in name for role, name in named)
    # by mouse
    x, y = await browser.value("(b => [b.x + b.width / 2, b.y + b.height / 2])(drop.getBoundingClientRect())")

    async def drag(*paths):
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            await browser("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    await drag(SIGNS[2])
    await expect(*model.predict(SIGNS[2], "signs"))
    # several images, of which one cannot be read; then the same ones again
    for _ in range(2):
        await drag(SIGNS[0], broken, SIGNS[1])
        await expect(*model.predict(SIGNS[:2], "signs"))
        await browser.until("status_.textContent.startsWith('3 images: ')")
        (said,) = await browser.value("[...document.querySelectorAll('article .error')].map(p => p.textContent)")
        assert said.startswith("the image cannot be read")
    # the same image again, after the server had to refuse it, and a pasted one
    for _ in range(2):
        await choose(FOOD[0])
        await expect(*model.predict(FOOD[0], "signs"))
    await browser.value("results.replaceChildren()")
    await browser.value("again.click()")
    await expect(*model.predict(FOOD[0], "signs"))
    await browser.value(
        "(data => { data.items.add(new File([images[0]], 'p.jpg'));"
        "dispatchEvent(new ClipboardEvent('paste', {clipboardData: data})) })(new DataTransfer())"
    )
    await browser.until("document.querySelector('h2')?.textContent === 'p.jpg'")
    await expect(*model.predict(FOOD[0], "signs"))
    # many tasks, of many classes
    await browser.value(
        "tasks = Array.from({length: 1000}, (_, i) => ({name: 'task ' + i, classes: ['cat ' + i, 'dog']})),"
        "finder.hidden = false, search.value = 'CAT 77', offer()"
    )
    assert await browser.value("matches.textContent") == "11 of 1000 tasks"
    assert (await browser.value("[...task.options].map(each => each.value)"))[:3] == ["auto", "task 77", "task 770"]
    await browser.value("search.value = '', offer(), task.value = 'auto'")
    # many classes
    found = "{task: 'x', probabilities: {a: .1, b: .05, c: .2, d: .3, e: .15, f: .12, g: .08}}"
    first, rest = await browser.value(
        f"list({found}).map(e => [e.tagName, ...[...e.querySelectorAll('summary, th')].map(t => t.textContent)])"
    )
    assert first == ["TABLE", "d", "c", "e", "f", "a"]
    assert rest == ["DETAILS", "2 other classes", "g", "b"]
    # small and large, light and dark
    await choose(FOOD[1], broken)
    await browser.until("status_.textContent.startsWith('2 images: ')")
    for width, height, scheme in SHAPES:
        await browser(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        await browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        assert await browser.value("document.documentElement.scrollWidth") <= width
        if axe:
            await browser.value(axe)
            said = await browser.value(
                "axe.run().then(found => found.violations.map(each => each.id + each.nodes[0].html))"
            )
            assert said == []
    assert await browser.value("location.href") == url
    return browser.said


@pytest.fixture(scope="session")
def axe(tmp_path_factory):
    """The script that checks whether a page can be used by everybody; None where npm cannot get it."""
    folder = tmp_path_factory.mktemp("axe")
    with suppress(OSError, subprocess.SubprocessError):
        subprocess.run(["npm", "pack", "--silent", "axe-core@4"], cwd=folder, check=True, timeout=60)
        with tarfile.open(next(folder.glob("*.tgz"))) as archive:
            return archive.extractfile("package/axe.min.js").read().decode()


# A browser is not a dependency: where none is installed, as on CI, this test is skipped.
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_the_page_works_by_mouse_and_by_keyboard(folder, run, tmp_path, axe):  # noqa: F811
    model = recast_pl.load(run)
    (broken := tmp_path / "broken.jpg").write_bytes(b"no image")
    people = sorted((ROOT / "data" / "clipart" / "people").rglob("*.jpg"))
    odd = next(path for path, found in zip(people, model.predict(people), strict=True) if found.task == "none")

    async def browse(debugger, url):
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{debugger}/json/list") as response:
                (page,) = [tab for tab in json.loads(await response.text()) if tab["type"] == "page"]
            async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as connection:
                return await visit(Browser(connection), f"{url}/", model, broken, odd, axe)

    with started(folder) as (_, url), chromium(tmp_path / "profile") as debugger:
        said = asyncio.run(browse(debugger, url))
    unexpected = [entry for entry in said if "422" not in json.dumps(entry)]
    assert unexpected == []
