"""Runs opened elsewhere: another device, another folder, another caller; and what a run may not do when opened."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
import torchvision
import yaml
from conftest import RESNET, ROOT, learn
from safetensors.torch import save_file

import recast_pl
from recast_pl.cli import main
from recast_pl.config.run import open_run
from recast_pl.errors import RunError
from recast_pl.learning.device import evaluation_settings, find_device, usable_precision
from recast_pl.methods import templates

PICTURE = str(ROOT / "data/clipart/signs/flags/000.jpg")


@pytest.fixture
def run(clipart_run, tmp_path):
    """A copy of a trained run, whose config may be changed."""
    return shutil.copytree(clipart_run, tmp_path / "logs" / "run")


def change(run, **sections):
    """Merges entries into sections of a run's config.yaml."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    for section, entries in sections.items():
        config[section] |= entries
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def commands(run, output):
    """All commands that open a run and compute, with their options."""
    patch = str(next((run / "patches").glob("*.safetensors")))
    predict = ["predict", "--task", "signs", "--images", PICTURE, "--output", str(output / "labels.csv")]
    export = ["export", "--task", "signs", "--format", "safetensors", "--output", str(output / "signs.safetensors")]
    analyze = ["analyze", "--output", str(output / "analysis")]
    quantize = ["patch", "quantize", patch, "--output", str(output / "half.safetensors")]
    found = (["test"], predict, export, analyze, quantize, ["patch", "verify", patch])
    return [[*words, "--run_dir", str(run)] for words in found]


# devices


OF_A_CLUSTER = {"accelerator": "gpu", "devices": 4, "num_nodes": 2, "strategy": "ddp", "precision": "16-mixed"}


@pytest.mark.filterwarnings("ignore:.*cannot compute in precision.*")
def test_a_run_of_a_cluster_works_on_one_cpu(run, tmp_path):
    change(run, trainer=OF_A_CLUSTER)
    for words in commands(run, tmp_path):
        assert main(words) == 0, words
    for device in (None, "cpu", "auto", torch.device("cpu")):
        assert recast_pl.load(run, device=device).predict(PICTURE, "signs")[0].task == "signs"


@pytest.mark.parametrize(
    "settings",
    [
        {"accelerator": "gpu"},
        {"accelerator": "cuda", "devices": [1]},
        {"accelerator": "tpu", "devices": "auto"},
        {"precision": "transformer-engine"},
        {"accelerator": {"class_path": "lightning.pytorch.accelerators.CUDAAccelerator"}},
        {"strategy": {"class_path": "lightning.pytorch.strategies.FSDPStrategy"}},
        {"plugins": [{"class_path": "lightning.pytorch.plugins.environments.SLURMEnvironment"}]},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*cannot compute in precision.*")
def test_a_run_of_another_machine_works_on_this_one(settings, run):
    change(run, trainer=settings)
    assert main(["test", "--run_dir", str(run)]) == 0
    assert recast_pl.load(run).predict(PICTURE, "signs")


def test_objects_that_only_training_needs_are_not_made(run):
    logger = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"project": "x"}}
    change(run, trainer={"callbacks": [{"class_path": "no_such_module.Callback"}], "logger": logger})
    assert main(["test", "--run_dir", str(run)]) == 0


@pytest.mark.filterwarnings("ignore:.*cannot compute in precision.*")
def test_a_precision_that_the_device_lacks_becomes_single_precision(run):
    change(run, trainer={"precision": "16-mixed"})
    wanted = recast_pl.load(run).predict(PICTURE, "signs")
    change(run, trainer={"precision": None})
    assert recast_pl.load(run).predict(PICTURE, "signs") == wanted
    change(run, trainer={"precision": "bf16-mixed"})  # a CPU can do it
    assert recast_pl.load(run).predict(PICTURE, "signs") != wanted


@pytest.mark.parametrize(
    ("precision", "device", "usable"),
    [
        (16, "cpu", "32-true"),
        ("16-true", "cpu", "32-true"),
        ("bf16-mixed", "cpu", "bf16-mixed"),
        ("64-true", "cpu", "64-true"),
        (None, "cpu", None),
        ("64-true", "mps", "32-true"),
        ("16-mixed", "mps", "16-mixed"),
        ("16-mixed", "cuda:1", "16-mixed"),
        ("bf16-mixed", "cuda", "32-true"),  # an older GPU
    ],
)
@pytest.mark.filterwarnings("ignore:.*cannot compute in precision.*")
def test_what_each_device_can_compute_in(precision, device, usable, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert usable_precision(precision, torch.device(device)) == usable


@pytest.fixture
def machine(monkeypatch):
    """Makes torch report another machine."""

    def make(kind, count=1):
        device = None if kind == "cpu" else torch.device(kind)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: device)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0 if device is None else count)

    return make


@pytest.mark.parametrize(
    ("kind", "name", "found"),
    [
        ("cpu", None, "cpu"),
        ("cuda", "auto", "cuda"),
        ("cuda", "cuda:1", "cuda:1"),
        ("cuda", "cpu", "cpu"),
        ("cuda", "cpu:0", "cpu"),
        ("mps", None, "mps"),
        ("xpu", None, "cpu"),  # Lightning does not know it
    ],
)
def test_the_named_device_or_what_the_machine_has(kind, name, found, machine):
    machine(kind, 2)
    assert find_device(name) == torch.device(found)


def test_a_gpu_by_number_reaches_the_trainer(machine):
    machine("cuda", 2)
    settings = evaluation_settings(OF_A_CLUSTER | {"max_epochs": 3}, find_device("cuda:1"))
    assert settings == {"accelerator": "cuda", "devices": [1], "precision": "16-mixed", "max_epochs": 3}


@pytest.mark.parametrize(
    ("kind", "name", "named"),
    [
        ("cpu", "cuda", ["'cuda' is not on this machine, which has cpu"]),
        ("cuda", "cuda:2", ["'cuda:2'", "cuda:0 to cuda:1"]),
        ("cuda", "mps", ["'mps'", "cuda"]),
        ("cpu", "gpu", ["'gpu' is unknown", "auto, cpu, cuda"]),
        ("cpu", "xpu", ["'xpu' is not on this machine"]),
    ],
)
def test_a_device_that_is_not_there_is_one_line(kind, name, named, run, machine, tmp_path, capsys):
    machine(kind, 2)
    with_device = [words for words in commands(run, tmp_path) if words[0] != "export" and words[1] != "verify"]
    imagenet = ["imagenet", "--backbone.name", "torchvision/resnet18", "--backbone.weights", "random"]
    imagenet += ["--layout.targets", '["layer4.*conv2.weight"]', "--images", "data/clipart/signs", "--output", "x"]
    for words in [*with_device, imagenet, ["serve", "--run_dir", str(run), "--port", "0"]]:
        assert main([*words, "--device", name]) == 2, words
        (line,) = capsys.readouterr().err.splitlines()
        assert all(text in line for text in named), line
    with pytest.raises(RunError):
        recast_pl.load(run, device=name)


# folders


def fit_words(*more):
    """The command line of `fit` in the project, whose paths are all relative."""
    tasks = json.dumps([{"name": name, "path": f"images/{name}"} for name in ("first", "second")])
    few = [
        "--data.tasks",
        tasks,
        "--data.image_size",
        "32",
        "--trainer.max_epochs",
        "1",
        "--trainer.accelerator",
        "cpu",
    ]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]
    return ["fit", *RESNET[:4], "--model.backbone.weights", "w.safetensors", *few, *quiet, *more]


@pytest.fixture
def project(tmp_path, image_folder, monkeypatch):
    """The working folder of a run, with its images and weights."""
    image_folder("project/images/first", 3)
    image_folder("project/images/second", 2)
    folder = tmp_path / "project"
    monkeypatch.chdir(folder)
    save_file(torchvision.models.resnet18().state_dict(), "w.safetensors")
    assert main(fit_words("--run_dir", "logs/run")) == 0
    return folder


def test_a_run_is_not_tied_to_the_folder_it_was_started_in(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["test"], ["analyze"], ["predict", "--task", "first", "--images", PICTURE, "--output", "o.csv"]):
        assert main([*words, "--run_dir", "project/logs/run"]) == 0
    text = (project / "logs/run/config.yaml").read_text()
    (project / "logs/run/patches/01_second.safetensors").unlink()
    assert main(["fit", "--run_dir", "project/logs/run", "--resume", "true"]) == 0
    assert (project / "logs/run/config.yaml").read_text() == text  # its paths are still relative
    assert main(["test", "--run_dir", "project/logs/run"]) == 0


def test_a_project_can_be_moved_with_its_run(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    project.rename(tmp_path / "elsewhere")
    assert main(["test", "--run_dir", "elsewhere/logs/run"]) == 0


def test_a_run_can_be_moved_out_of_its_project(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (project / "logs/run").rename(tmp_path / "run")
    assert main(["test", "--run_dir", "run"]) == 0


def test_the_working_folder_comes_first(project, tmp_path, monkeypatch):
    shutil.copytree(project, tmp_path / "other")
    monkeypatch.chdir(tmp_path / "other")
    _, init = open_run(project / "logs/run")
    assert [task.path for task in init.data.tasks] == ["images/first", "images/second"]
    assert init.model.backbone_config.weights == "w.safetensors"


def test_a_default_data_root_is_found_too(project, tmp_path, monkeypatch):
    monkeypatch.delenv("RECAST_PL_DATA")
    (project / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    assert open_run("project/logs/run")[1].data.root == project / "data"


def test_a_run_without_a_record_of_its_start_still_opens(project, tmp_path, monkeypatch, capsys):
    (project / "logs/run/start.json").unlink()
    assert main(["test", "--run_dir", "logs/run"]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["test", "--run_dir", "project/logs/run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'w.safetensors', not found in the working folder or in project/logs/run;" in line
    assert "project/logs/run/config.yaml" in line


def test_images_that_were_moved_are_named_and_can_be_given(project, capsys):
    (project / "images").rename(project / "photos")
    quantize = ["patch", "quantize", "logs/run/patches/00_first.safetensors", "--output", "half.safetensors"]
    for words in (["test"], quantize):
        assert main([*words, "--run_dir", "logs/run"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "'first' are not at" in line
        assert "--data_root" in line
        assert main([*words, "--run_dir", "logs/run", "--data_root", "photos"]) == 0
    assert main(["analyze", "--run_dir", "logs/run"]) == 0
    assert "--data_root" in capsys.readouterr().out
    tasks = json.dumps([{"name": name, "path": f"photos/{name}"} for name in ("first", "second")])
    (project / "logs/run/patches/01_second.safetensors").unlink()
    assert main(["fit", "--run_dir", "logs/run", "--resume", "true", "--data.tasks", tasks]) == 0


def test_a_whole_relative_path_is_looked_for_in_the_data_root(project):
    (project / "disk").mkdir()
    (project / "images").rename(project / "disk" / "images")
    assert main(["test", "--run_dir", "logs/run", "--data_root", "disk"]) == 0


def test_missing_weights_are_named_with_where_they_were_looked_for(project, tmp_path, monkeypatch, capsys):
    (project / "w.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    assert main(["test", "--run_dir", "project/logs/run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(text in line for text in ("'w.safetensors'", str(project), "config.yaml"))


def test_templates_may_be_a_file_named_by_a_relative_path(project, tmp_path, monkeypatch):
    shutil.copy("logs/run/decomposition.safetensors", "d.safetensors")
    piece = json.dumps([{"class_path": "Recast", "init_args": {"decomposition": "d.safetensors"}}])
    assert main(fit_words("--run_dir", "logs/second", "--model.pieces", piece)) == 0
    monkeypatch.chdir(tmp_path)
    (project / "logs/second/patches/01_second.safetensors").unlink()
    assert main(["fit", "--run_dir", "project/logs/second", "--resume", "true"]) == 0


def test_patches_of_another_kind_of_machine_fit_if_the_templates_are_given(project, monkeypatch, capsys):
    solve = templates.decompose

    def solve_to_other_bits(*args):
        decomposition = solve(*args)
        for bank in decomposition.banks:
            bank.templates.mul_(1 + 1e-6)
        return decomposition

    patch = "logs/run/patches/00_first.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(templates, "decompose", solve_to_other_bits)
        assert main(fit_words("--run_dir", "logs/other")) == 0
        assert main(["patch", "verify", patch, "--run_dir", "logs/other"]) == 2
        assert "give its decomposition.safetensors as decomposition" in capsys.readouterr().err
        given = ["--model.pieces.layout", "null", "--model.pieces.decomposition", "logs/run/decomposition.safetensors"]
        assert main(fit_words("--run_dir", "logs/same", *given)) == 0
        assert main(["patch", "verify", patch, "--run_dir", "logs/same"]) == 0


# threads, and the caller's settings


def test_a_run_loads_in_many_threads_and_leaves_the_working_folder_alone(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted, results, folders, done = recast_pl.load("logs/run").predict(PICTURE, "signs"), [], set(), threading.Event()

    def watch():
        while not done.is_set():
            folders.add(os.getcwd())

    def work():
        results.append(recast_pl.load("logs/run").predict(PICTURE, "signs"))

    watcher, workers = threading.Thread(target=watch), [threading.Thread(target=work) for _ in range(6)]
    watcher.start()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    done.set()
    watcher.join()
    assert results == [wanted] * 6
    assert folders == {str(tmp_path)}


def test_another_default_type_of_tensors_changes_nothing(run):
    wanted = recast_pl.load(run).predict(PICTURE, "signs")
    torch.set_default_dtype(torch.float64)
    try:
        model = recast_pl.load(run)
        assert model.predict(PICTURE, "signs") == wanted
        model.remove("signs")
        model.add_patch(run / "patches" / "00_signs.safetensors")
        assert model.predict(PICTURE, "signs") == wanted
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_load_prints_nothing(run):
    code = f"import recast_pl; print(len(recast_pl.load({str(run)!r}).predict({PICTURE!r}, 'signs')))"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (process.stdout, process.stderr) == ("1\n", "")


# code of others


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A module `own_code` that leaves a trace when it is imported."""
    trace, folder = tmp_path / "imported", tmp_path / "lib"
    folder.mkdir()
    code = f"""
        from pathlib import Path

        import torch
        import torchvision
        from recast_pl import LinearProbe
        from torchvision.transforms.v2 import Identity

        Path({str(trace)!r}).touch()

        def network():
            net = torchvision.models.resnet18()
            net.fc = torch.nn.Identity()
            return net

        class Own(LinearProbe):
            pass

        class Rate(torch.optim.SGD):
            pass

        def rate(epoch):
            return 1.0
    """
    (folder / "own_code.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(folder)
    yield trace
    sys.modules.pop("own_code", None)


OWN = {
    "backbone": {"backbone": {"name": "own_code.network", "weights": "hub"}},
    "piece": {"pieces": [{"class_path": "own_code.Own"}]},
    "optimizer": {"optimizer": {"class_path": "own_code.Rate", "init_args": {"lr": 0.1}}},
    "function": {
        "lr_scheduler": {
            "class_path": "torch.optim.lr_scheduler.LambdaLR",
            "init_args": {"lr_lambda": "own_code.rate"},
        }
    },
    "text": {"optimizer": "own_code.Rate"},
    "argument": {"backbone": {"name": "torchvision/resnet18", "args": {"norm_layer": {"class_path": "own_code.Own"}}}},
}


@pytest.mark.parametrize("kind", OWN)
def test_code_of_others_is_not_imported(kind, run, tmp_path, library, capsys):
    change_model(run, OWN[kind])
    every = [*commands(run, tmp_path), ["serve", "--run_dir", str(run), "--port", "0"]]
    for words in every if kind == "piece" else every[:1]:
        assert main(words) == 2, words
        (line,) = capsys.readouterr().err.splitlines()
        assert "own_code." in line
        assert "--trust" in line
        assert str(run / "config.yaml") in line
    with pytest.raises(RunError, match="trust=True"):
        recast_pl.load(run)
    assert not library.exists()


def change_model(run, entries):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["init_args"] |= entries
    (run / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize(
    "entries",
    [
        {"backbone": {"name": "torch.hub.load", "args": {"repo_or_dir": ".", "model": "x", "source": "local"}}},
        {"backbone": {"name": "timm.models.load_checkpoint"}},
        {"backbone": {"name": "recast_pl.cli.main", "args": {"args": []}}},
        {"backbone": {"name": "recast_pl.backbones.weights.load_state_dict", "args": {"weights_only": False}}},
        {"backbone": {"name": "resnet10t", "args": {"checkpoint_path": "x.pth"}}},
        {"lr_scheduler": {"class_path": "torch.optim.lr_scheduler.LambdaLR", "init_args": {"lr_lambda": "__main__.x"}}},
        {"backbone": "other.yaml"},
        {"pieces": ["other.yaml"]},
        {"pieces": [{"class_path": "recast_pl.studies.engines.ThreadPoolExecutor"}]},
        {"optimizer": {"class_path": "os.system", "init_args": {"command": "touch trace"}}},
        {"optimizer": {"class_path": "torch.optim.Optimizer.load_state_dict"}},
        {"lr_scheduler": {"class_path": "torch.load"}},
    ],
    ids=str,
)
def test_functions_of_known_libraries_that_do_anything_are_refused(entries, run, capsys):
    change_model(run, entries)
    assert main(["test", "--run_dir", str(run)]) == 2
    assert "--trust" in capsys.readouterr().err


def test_a_model_may_not_be_loaded_from_a_pickle(run, tmp_path, capsys):
    config = yaml.safe_load((run / "config.yaml").read_text())
    path = "lightning.pytorch.LightningModule.load_from_checkpoint"
    config["model"] = {"class_path": path, "init_args": {"checkpoint_path": "x.ckpt"}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["test", "--run_dir", str(run)]) == 2
    assert "--trust" in capsys.readouterr().err


def test_transforms_of_others_are_not_imported(run, library, capsys):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["tasks"][0]["transforms"] = [{"class_path": "own_code.Identity"}]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["test", "--run_dir", str(run)]) == 2
    assert "own_code.Identity" in capsys.readouterr().err
    config["data"]["tasks"][0]["transforms"] = [{"class_path": "torchvision.transforms.v2.RandomGrayscale"}]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["test", "--run_dir", str(run)]) == 0
    assert not library.exists()


def test_own_code_runs_if_it_is_trusted(library, tmp_path):
    pieces = json.dumps([{"class_path": "own_code.Own"}])
    run = learn(
        [*RESNET[:2], "--model.backbone.name", "own_code.network", "--model.pieces", pieces],
        tmp_path / "own",
        names=("signs",),
    )
    assert main(["test", "--run_dir", str(run)]) == 2
    for words in commands(run, tmp_path):
        if words[0] not in ("export", "analyze"):  # which need a known architecture, and templates
            assert main([*words, "--trust"]) == 0, words
    assert recast_pl.load(run, trust=True).tasks == ["signs"]
    assert library.exists()
    assert main(["fit", "--run_dir", str(run), "--resume", "true"]) == 0  # the user's own options are trusted


@pytest.mark.parametrize("name", ["timm.models.resnet.resnet10t", "torchvision.models.resnet18"])
def test_models_of_known_libraries_need_no_trust(name, run):
    change_model(run, {"backbone": {"name": name, "weights": "random"}})
    open_run(run)
