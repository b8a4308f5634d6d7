"""Fixtures: shared real data, small image folders, command lines, and trained runs."""

import atexit
import json
import os
import subprocess
import sys
import urllib.request
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads only slow down tiny networks
# some virtual machines claim to have AMX, but the first product in bf16 ends in SIGILL
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import numpy as np
import pytest
from PIL import Image

pytest.register_assert_rewrite("fixtures_sets", "fixtures_catalogue")

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
TINY_TASKS = {"first": 3, "second": 2}
TINY_VIT = {"patch_size": 8, "embed_dim": 32, "depth": 12, "num_heads": 2}


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "test_readme" not in item.nodeid)  # start the longest test first


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)  # paths in configs are relative to it


@pytest.fixture(scope="session", autouse=True)
def _data_root(tmp_path_factory):
    """Keeps data sets and caches of all tests in one temporary folder, also those of processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECAST_PL_DATA", str(tmp_path_factory.getbasetemp() / "data"))
        yield


@pytest.fixture(scope="session")
def shared():
    if not SHARED.is_dir():
        assert os.environ.get("CI") != "true", f"{SHARED} is missing, but CI needs it"
        pytest.skip("the shared data is missing")
    return SHARED


@pytest.fixture(scope="session")
def vit_weights(shared):
    return str(shared / "weights" / "dinov2_vits14.fp16.safetensors")


def write_images(path, classes=3, images=8, size=32, seed=0):
    """Writes CLASS/NNN.png; each class has its own colour, so that a model can learn it."""
    generator = np.random.default_rng(seed)
    for label in range(classes):
        folder = path / f"class{label}"
        folder.mkdir(parents=True)
        colour = generator.integers(0, 256, 3)
        for index in range(images):
            noise = generator.integers(-40, 40, (size, size, 3))
            pixels = np.clip(colour + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{index:03d}.png")
    return path


@pytest.fixture
def image_folder(tmp_path):
    """Writes images as `write_images` does, into a folder of the test with the given name."""
    return lambda name, *args, **settings: write_images(tmp_path / name, *args, **settings)


def two_tiny_tasks(folder):
    """Two tasks, of three and of two classes, whose images are written into a folder."""
    from recast_pl import SequentialTaskDataModule, TaskConfig

    paths = {name: write_images(folder / name, classes, seed=classes) for name, classes in TINY_TASKS.items()}
    return SequentialTaskDataModule([TaskConfig(n, str(p)) for n, p in paths.items()], image_size=32, batch_size=4)


@pytest.fixture
def data(tmp_path):
    return two_tiny_tasks(tmp_path)


def tiny_words(folder):
    """Writes images of two small tasks; returns a function that makes the command line of `fit` on a tiny ViT."""
    folders = {name: write_images(folder / name, classes, seed=classes) for name, classes in TINY_TASKS.items()}

    def words(*more, run_dir=None):
        tasks = [{"name": name, "path": str(path)} for name, path in folders.items()]
        return [
            *("fit", "--config", "vit.yaml", "--run_dir", str(run_dir or folder / "run")),
            *("--model.backbone.name", "vit_tiny_patch16_224", "--model.backbone.weights", "random"),
            *("--model.backbone.args", json.dumps(TINY_VIT)),
            *("--data.tasks", json.dumps(tasks), "--data.image_size", "32", "--data.batch_size", "4"),
            *("--trainer.max_epochs", "3", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"),
            *("--trainer.logger", "false"),  # TensorBoard's figures would take a sixth of the time
            *map(str, more),
        ]

    return words


@pytest.fixture
def tiny_fit(tmp_path):
    """Makes the command line of `fit` for two small tasks on a tiny ViT; further options override."""
    return tiny_words(tmp_path)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The run that `tiny_fit()` makes, with TensorBoard, which no test changes; its images are beside it."""
    from recast_pl.cli import main

    os.chdir(ROOT)
    folder = tmp_path_factory.mktemp("tiny")
    assert main(tiny_words(folder)("--trainer.logger", "true")) == 0
    return folder / "run"


RANDOM = ["--model.backbone.weights", "random"]
RESNET = [*("--config", "resnet34.yaml", "--model.backbone.name", "torchvision/resnet18"), *RANDOM]


@contextmanager
def fork_server(*prefix, folder=ROOT):
    """Starts `fork_server.py` in a folder; gives a function that sends it requests, and its process."""
    command = [*prefix, sys.executable, str(ROOT / "tests" / "fork_server.py")]
    pipe, environment = subprocess.PIPE, {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    with subprocess.Popen(command, cwd=folder, env=environment, stdin=pipe, stdout=pipe, text=True) as process:

        def ask(**request):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        try:
            yield ask, process
        finally:
            process.stdin.close()


@cache
def forks():
    """Starts a `fork_server.py` that ends with this process; returns the function that sends it requests."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(fork_server())[0]


def clipart_words(words, run, size=32, names=("signs", "people")):
    """Makes the command line of `fit` for real images and very little training."""
    tasks = [{"name": name, "path": f"data/clipart/{name}"} for name in names]
    few = ["--data.tasks", json.dumps(tasks), "--data.image_size", str(size), "--trainer.max_epochs", "1"]
    quick = [
        "--trainer.limit_train_batches",
        "3",
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.logger",
        "false",
    ]
    return ["fit", *words, "--run_dir", str(run), *few, *quick, "--trainer.accelerator", "cpu"]


def learn(*args, **settings):
    """Runs such a command line; returns the run folder."""
    from recast_pl.cli import main

    words = clipart_words(*args, **settings)
    assert main(words) == 0
    return Path(words[words.index("--run_dir") + 1])


@pytest.fixture(scope="session")
def clipart_run(tmp_path_factory):
    """A run of RECAST on a ResNet-18, which no test changes: tasks `signs` and `people` at 32 pixels."""
    os.chdir(ROOT)
    return learn(RESNET, tmp_path_factory.mktemp("clipart") / "run")


@cache
def reaches_npm():
    """Whether the npm registry answers, from which the page of `export --format web` comes."""
    name = "npm_config_registry"  # in lower case, as npm reads it
    registry = os.environ.get(name, "https://registry.npmjs.org").rstrip("/")
    with suppress(OSError), urllib.request.urlopen(f"{registry}/onnxruntime-web/latest", timeout=30) as response:
        return response.status == 200
    return False
