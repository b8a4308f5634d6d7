"""The command line: configs, help, one-line errors with exit status 2, permissions of files, and `compare`."""

import csv
import gc
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import weakref

import numpy as np
import pytest
import yaml
from conftest import ROOT, TINY_VIT
from lightning.pytorch.cli import LightningArgumentParser

from recast_pl.cli import main
from recast_pl.cli.interruption import is_main_process
from recast_pl.data.download import extract

CONFIGS = sorted({path.name for path in (ROOT / "configs").glob("*.yaml")})
METHODS = sorted(path.stem for path in (ROOT / "configs" / "methods").glob("*.yaml"))
ON_RESNET = ("recast_resnet34", "recast_clr", "recast_piggyback")
ON_OTHERS = dict.fromkeys(ON_RESNET, ("resnet34.yaml", "torchvision/resnet34"))
ON_OTHERS["recast_projection"] = ("quickstart.yaml", "mobilenetv2_050")
# optimizer, rate, epochs and clipping where the authors of a method have their own
PROTOCOLS = {
    "inflora": ("torch.optim.Adam", 5e-4, 10, None),
    "l2p": ("torch.optim.Adam", 0.03, 100, None),
    "hat": ("torch.optim.SGD", 0.05, 100, 10_000),
    "classp": ("recast_pl.CLASSP", 0.2, 100, None),  # which has no weight decay
    "napa_vq": ("torch.optim.AdamW", 0.2, 100, 1),
}


def test_collections_leave_imported_modules_out_and_find_the_garbage_of_earlier_commands(monkeypatch):
    class Cycle:
        pass

    garbage, found = [], []

    def command(argv):
        found.append(gc.get_freeze_count())
        gc.collect()
        return 3

    monkeypatch.setattr("recast_pl.cli.parser.run", command)
    for _ in range(2):
        assert main(["test"]) == 3
        cycle = Cycle()
        cycle.itself = cycle
        garbage.append(weakref.ref(cycle))
        del cycle
    assert garbage[0]() is None
    assert found[0] >= found[1] > 1000


@pytest.mark.parametrize("config", CONFIGS)
def test_every_shipped_config_parses_and_prints_itself(config, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", config, "--print_config"])
    assert stop.value.code == 0
    printed, shipped = yaml.safe_load(capsys.readouterr().out), yaml.safe_load((ROOT / "configs" / config).read_text())
    assert printed["model"]["class_path"] == shipped["model"]["class_path"]
    assert printed["trainer"]["max_epochs"] == shipped["trainer"]["max_epochs"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_config_changes_only_the_method_and_its_protocol(method, capsys):
    base = "resnet34.yaml" if method in ON_RESNET else "vit.yaml"
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", base, "--config", f"methods/{method}.yaml", "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    printed, trainer = config["model"]["init_args"], config["trainer"]
    shipped = yaml.safe_load((ROOT / "configs" / "methods" / f"{method}.yaml").read_text())["model"]["init_args"]
    classes = [[piece["class_path"] for piece in settings["pieces"]] for settings in (printed, shipped)]
    assert classes[0] == classes[1]
    plain = yaml.safe_load((ROOT / "configs" / base).read_text())["model"]["init_args"]
    assert printed["backbone"]["name"] == plain["backbone"]["name"]
    optimizer = printed["optimizer"]["init_args"]
    assert optimizer.get("weight_decay", 0) == (
        0 if method in PROTOCOLS else plain["optimizer"]["init_args"]["weight_decay"]
    )
    found = (printed["optimizer"]["class_path"], optimizer["lr"], trainer["max_epochs"], trainer["gradient_clip_val"])
    assert found == PROTOCOLS.get(method, ("torch.optim.AdamW", 2e-3, 100, 1))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_evaluates_to_the_same_numbers(method, tiny_fit, tmp_path):
    words = tiny_fit("--config", f"methods/{method}.yaml", "--trainer.max_epochs", "1")
    if method == "atlas":
        each = tiny_fit(
            "--config", "methods/finetune_each.yaml", "--trainer.max_epochs", "1", run_dir=tmp_path / "each"
        )
        assert main(each) == 0
        words += ["--model.pieces.vectors", json.dumps([str(tmp_path / "each" / "patches")])]
    elif method.endswith("rosa_sparse"):  # 1e-5 of the entries is less than one in so small a network
        words += ["--model.pieces.density", "0.001"]
    elif method in ON_OTHERS:
        words[2], words[words.index("vit_tiny_patch16_224")] = ON_OTHERS[method]
        words[words.index(json.dumps(TINY_VIT))] = "{}"
    assert main(words) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["forgetting"] == 0 or summary["shared_bytes"] > 0
    assert main(["test", "--run_dir", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.startswith(("vit", "dino"))])
def test_every_vit_config_runs_on_a_small_vit(config, tiny_fit, tmp_path):
    words = tiny_fit("--trainer.max_epochs", "1")
    words[2] = config
    if config == "vit_large.yaml":  # its 12 groups need more than 12 layers
        words[words.index(json.dumps(TINY_VIT))] = json.dumps(TINY_VIT | {"depth": 24})
    assert main(words) == 0
    trained = json.loads((tmp_path / "run" / "summary.json").read_text())["tasks"][0]["task_parameters"]
    expected = {"vit_attention.yaml": 48, "vit_best.yaml": 48, "vit_all.yaml": 144, "vit_large.yaml": 192}
    assert trained == expected.get(config, 96)


@pytest.mark.parametrize(
    ("config", "backbone", "numbers"),
    [("resnet34.yaml", "torchvision/resnet34", 168), ("cnn_best.yaml", "tf_efficientnet_lite0", 48)],
)
def test_the_configs_of_convolutional_networks_run(config, backbone, numbers, tiny_fit, tmp_path):
    words = tiny_fit("--trainer.max_epochs", "1")
    words[2] = config
    at = words.index("--model.backbone.name")
    words[at + 1] = backbone
    at = words.index("--model.backbone.args")
    del words[at : at + 2]
    assert main(words) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["tasks"][0]["task_parameters"] == numbers


def test_the_resnet_mimicry_config_runs_and_a_finished_fit_stays(tmp_path, capsys):
    run = ["fit", "--config", "mimicry_resnet34.yaml", "--run_dir", str(tmp_path / "run"), "--trainer.max_epochs", "1"]
    small = ["--model.backbone.name", "torchvision/resnet18", "--model.backbone.weights", "random"]
    words = [*run, *small, "--model.image_size", "32", "--trainer.enable_progress_bar", "false"]
    assert main(words) == 0
    fitted = (tmp_path / "run" / "decomposition.safetensors").read_bytes()
    assert main([*words, "--resume", "true", "--trainer.max_epochs", "2"]) == 0
    assert "fitted already" in capsys.readouterr().out
    assert (tmp_path / "run" / "decomposition.safetensors").read_bytes() == fitted


def test_the_quickstart_trains_on_real_images_with_real_weights(tmp_path):
    run = tmp_path / "run"
    few = ["--trainer.max_epochs", "1", "--data.image_size", "64", "--trainer.enable_progress_bar", "false"]
    task = ["--data.tasks", json.dumps([{"name": "signs", "path": "data/clipart/signs"}])]
    assert main(["fit", "--config", "quickstart.yaml", "--run_dir", str(run), *few, *task]) == 0
    (row,) = json.loads((run / "summary.json").read_text())["tasks"]
    assert row["probe_accuracy"] > 50  # of 5 classes: the pretrained weights are loaded into the right places
    assert row["accuracy"] > 50
    assert row["task_parameters"] == 69


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--data.tasks", '[{"name": "flowrs"}]'], ["'flowrs'", "path"]),
        (["--data.tasks", '[{"name": "x", "path": "/no/such/folder"}]'], ["/no/such/folder", "path"]),
        (["--data.tasks", "[]"], ["data.tasks", "list at least one"]),
        (["--data.tasks", '[{"nam": "x"}]'], ["nam"]),
        (["--data.batch_size", "0"], ["batch_size=0", "at least 1"]),
        (["--data.batch_size", "many"], ["data.batch_size", "many"]),
        (["--data.image_size", "4"], ["'vit_tiny_patch16_224'"]),
        (["--model.backbone.name", "vit_smal_patch16_224"], ["'vit_smal_patch16_224'", "vit_small_patch16_224"]),
        (["--model.backbone.name", "no.such.factory"], ["no.such.factory"]),
        (["--model.backbone.weights", "/no/such/file.pth"], ["/no/such/file.pth", "hub"]),
        (["--model.pieces", '[{"class_path": "Nope"}]'], ["Nope"]),
        (
            ["--model.pieces", '[{"class_path": "Recast", "init_args": {"layout": {"targets": ["fc9"]}}}]'],
            ["'fc9'", "correct the pattern"],
        ),
        (
            [
                "--model.pieces",
                '[{"class_path": "Recast", "init_args": {"layout": {"targets": ["fc1"], "groups": 5}}}]',
            ],
            ["groups=5", "1, 2, 3, 4, 6, 12"],
        ),
        (
            ["--model.pieces", '[{"class_path": "Recast", "init_args": {"decomposition": "/no/file"}}]'],
            ["/no/file", "does not exist"],
        ),
        (["--trainer.accelerator", "cuda"], ["CUDAAccelerator", "cpu"]),
        (["--config", "nope.yaml"], ["nope.yaml", "quickstart.yaml"]),
        (["--trainer.max_epoch", "3"], ["max_epoch"]),
        (["--no_such_option", "3"], ["no_such_option"]),
    ],
)
def test_user_errors_are_one_line_with_status_2(words, named, tiny_fit, capsys, tmp_path):
    assert main(tiny_fit(*words)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    message = lines[-1]
    assert message.startswith("recast_pl: error: ")
    assert all(name in message for name in named), message
    assert not (tmp_path / "run").exists()  # so the corrected command needs no other --run_dir


def test_an_existing_run_folder_is_not_touched(tiny_fit, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("work")
    assert main(tiny_fit()) == 2
    assert "--resume true" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious"]


@pytest.mark.parametrize("damage", ["empty", "text", "other"])
def test_wrong_weights_are_reported_in_one_line(damage, tiny_fit, tmp_path, capsys):
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "weights.safetensors"
    path.write_bytes({"empty": b"", "text": b"not weights at all", "other": b""}[damage])
    if damage == "other":
        save_file({"some.weight": torch.zeros(3)}, path)
    assert main(tiny_fit("--model.backbone.weights", path)) == 2
    err = capsys.readouterr().err.strip()
    assert str(path) in err
    assert "\n" not in err


@pytest.mark.parametrize("command", [["test"], ["predict", "--task", "t", "--images", "i", "--output", "o"]])
def test_commands_on_a_folder_that_is_not_a_run(command, tmp_path, capsys):
    assert main([*command, "--run_dir", str(tmp_path)]) == 2
    assert "config.yaml" in capsys.readouterr().err


def test_predict_of_an_unknown_task_or_an_unreadable_image(tiny_fit, tmp_path, capsys):
    assert main(tiny_fit("--trainer.max_epochs", "1")) == 0
    predict = ["predict", "--run_dir", str(tmp_path / "run"), "--output", str(tmp_path / "o.csv")]
    assert main([*predict, "--task", "third", "--images", "i.png"]) == 2
    assert "trained are first, second" in capsys.readouterr().err
    (tmp_path / "text.jpg").write_text("not an image")
    assert main([*predict, "--task", "first", "--images", str(tmp_path / "text.jpg")]) == 2
    assert "text.jpg" in capsys.readouterr().err
    assert not (tmp_path / "o.csv").exists()


def test_an_overriding_list_of_tasks_inherits_nothing_from_the_one_before(tiny_fit, capsys):
    # both lists have two tasks: `flip` and `path` of the first list must not leak into the second
    words = tiny_fit("--data.tasks", '[{"name": "digits"}, {"name": "second"}]')
    words[words.index("--data.tasks") + 1] = '[{"name": "a", "path": "p", "flip": false}, {"name": "b", "path": "p"}]'
    assert main(words) == 2
    assert "unknown task 'second'" in capsys.readouterr().err


def test_a_config_in_the_working_folder_comes_first(tiny_fit, tmp_path, monkeypatch, capsys):
    (tmp_path / "vit.yaml").write_text("seed_everything: 7\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "vit.yaml", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["seed_everything"] == 7


def test_help_shows_the_commands_and_their_options(capsys):
    def help_of(*words):
        with pytest.raises(SystemExit) as stop:
            main([*words, "--help"])
        assert stop.value.code == 0
        return capsys.readouterr().out

    assert all(command in help_of() for command in ("fit", "test", "predict"))
    fit = help_of("fit")
    for option in ("--run_dir", "--resume", "--seed_everything", "--data.tasks", "--data.image_size", "--model"):
        assert option in fit
    assert "--images" in help_of("predict")


def test_python_m_runs_the_same_command():
    command = [sys.executable, "-m", "recast_pl", "test", "--run_dir", "/no/such/run"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 2
    assert process.stderr.startswith("recast_pl: error: /no/such/run is not a run folder")


def test_help_imports_nothing_heavy():
    code = "import sys; from recast_pl.cli import main\ntry: main(['--help'])\nfinally: print(sorted(sys.modules))"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "compare" in process.stdout
    assert "'recast_pl.cli'" in process.stdout
    assert not any(f"'{name}'" in process.stdout for name in ("torch", "lightning", "jsonargparse", "numpy"))


@pytest.mark.parametrize(("words", "named"), [([], "a command is missing"), (["train"], "invalid choice: 'train'")])
def test_a_missing_or_unknown_command_is_one_line(words, named, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert named in error
    assert "fit" in error
    assert error.count("\n") == 1


def test_all_public_names_can_be_imported():
    import recast_pl

    assert {"TILModule", "Recast", "EWC", "SequentialTaskDataModule"} <= set(recast_pl.__all__)
    assert all(getattr(recast_pl, name).__name__ == name for name in recast_pl.__all__)
    with pytest.raises(AttributeError):
        _ = recast_pl.nothing


def test_fit_declares_its_options_once(tiny_fit, tmp_path, monkeypatch):
    assert main(tiny_fit("--trainer.max_epochs", "1")) == 0
    declared, declare = [], LightningArgumentParser.add_lightning_class_args
    monkeypatch.setattr(
        LightningArgumentParser,
        "add_lightning_class_args",
        lambda parser, cls, key, **settings: declared.append(key) or declare(parser, cls, key, **settings),
    )
    assert main(["fit", "--run_dir", str(tmp_path / "run"), "--resume", "true"]) == 0
    assert declared == ["model", "data", "trainer"]


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"RANK": "0", "NODE_RANK": "1"}, True),  # torchrun sets RANK in every process
        ({"RANK": "1", "LOCAL_RANK": "0"}, False),
        ({"LOCAL_RANK": "1"}, False),
        ({"NODE_RANK": "1"}, False),  # the first process of the second node
        ({"SLURM_PROCID": "1"}, False),
    ],
)
def test_only_the_first_process_of_all_nodes_is_the_main_one(variables, first, monkeypatch):
    for name in ("RANK", "NODE_RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_main_process() == first


@pytest.mark.parametrize("mask", [0o077, 0o022])
def test_permissions_of_files_and_folders_follow_the_umask(mask, tiny_fit, tmp_path, monkeypatch):
    words = tiny_fit("--trainer.max_epochs", "1")
    image = str(next((tmp_path / "first").rglob("*.png")))
    archive = tmp_path / "set.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(ROOT / "configs" / "methods", "methods")
    new = [tmp_path / name for name in ("run", "labels.csv", "data", "unpacked")]
    monkeypatch.setenv("RECAST_PL_DATA", str(tmp_path / "data"))
    before = os.umask(mask)
    try:
        assert main(words) == 0
        predict = ["predict", "--run_dir", str(tmp_path / "run"), "--task", "first", "--images", image]
        assert main([*predict, "--output", str(tmp_path / "labels.csv")]) == 0
        extract(archive, tmp_path / "unpacked")
    finally:
        os.umask(before)
    for path in (path for top in new for path in (top, *top.rglob("*"))):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


# comparing


def test_compare_trains_methods_and_seeds_and_continues_where_it_stopped(tiny_fit, tmp_path, capsys):
    options = tiny_fit("--trainer.max_epochs", "1")[5:]  # without fit, config and run folder
    words = ["compare", "--base", "vit.yaml", "--configs", "methods/probe.yaml", "methods/melo.yaml"]
    words += ["--output", str(tmp_path / "table"), "--options", shlex.join(options), "--seeds", "1"]
    assert main(words) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "table").rglob("patches/*.safetensors")}
    assert main([*words, "2"]) == 0
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "table").rglob("patches/*.safetensors")}
    assert len(before) == 4
    assert len(after) == 8
    assert before.items() <= after.items()  # nothing was trained twice
    assert "comparison.md" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "table" / "comparison.csv").open()))
    assert [row["method"] for row in rows] == ["probe", "melo"]
    assert [row["numbers per task"] for row in rows] == ["0", f"{12 * 2 * (32 + 32):,}"]
    for row in rows:
        assert row["seeds"] == "2"
        runs = [tmp_path / "table" / row["method"] / seed / "summary.json" for seed in "12"]
        values = [json.loads(run.read_text())["average_accuracy"] for run in runs]
        assert row["average accuracy %"] == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
    table = (tmp_path / "table" / "comparison.md").read_text().splitlines()
    assert len(table) == 4
    assert {line.count("|") for line in table} == {10}


def test_compare_reports_forgetting_shared_bytes_and_transfer(tiny_fit, tmp_path):
    options = tiny_fit("--trainer.max_epochs", "1")[5:]
    folder = tmp_path / "table"
    words = ["compare", "--base", "vit.yaml", "--configs", "methods/finetune_each.yaml", "methods/finetune.yaml"]
    words += ["--output", str(folder), "--options", shlex.join(options), "--seeds", "1", "--alone", "finetune_each"]
    assert main(words) == 0
    each, finetune = csv.DictReader((folder / "comparison.csv").open())
    assert (each["forgetting"], each["bytes shared"], each["forward transfer"]) == ("0.00", "0", "0.00")
    summary, alone = (
        json.loads((folder / n / "1" / "summary.json").read_text()) for n in ("finetune", "finetune_each")
    )
    assert finetune["bytes shared"] == f"{summary['shared_bytes']:,}"
    assert int(finetune["bytes shared"].replace(",", "")) > 100_000
    gain = summary["tasks"][1]["accuracy"] - alone["tasks"][1]["accuracy"]
    assert finetune["forward transfer"] == f"{gain:.2f}"
    (folder / "finetune" / "2").mkdir()  # like a run interrupted after its first task
    (folder / "finetune" / "2" / "summary.json").write_text(json.dumps({**summary, "seed": 2, "tasks": [1]}))
    assert main(words) == 0
    assert [row["seeds"] for row in csv.DictReader((folder / "comparison.csv").open())] == ["1", "1"]


def test_compare_reports_errors(tmp_path, capsys):
    words = ["compare", "--output", str(tmp_path), "--configs"]
    assert main([*words, "methods/probe.yaml", "probe.yaml"]) == 2
    assert "two methods are named 'probe'" in capsys.readouterr().err
    assert main([*words, "methods/probe.yaml", "--alone", "melo"]) == 2
    assert "--alone 'melo' is not one of" in capsys.readouterr().err
    assert main([*words, "methods/nothing.yaml", "--base", "vit.yaml"]) == 2
    assert "methods/nothing.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--options", "--run_dir elsewhere"], "--run_dir"),
        (["--options=--resume=false"], "--resume"),
        (["--options", "--seed_everything 3"], "--seed_everything"),
        (["--options", "--trainer.devices 2", "--engine", "Processes"], "--trainer.devices"),
        (["--options", "'open"], "correct the quotes"),
    ],
)
def test_compare_refuses_options_that_it_sets_itself(words, named, tmp_path, capsys):
    compare = ["compare", "--base", "vit.yaml", "--configs", "methods/probe.yaml", "--output", str(tmp_path / "out")]
    assert main([*compare, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is OpenMP's runtime of torch on Linux")
def test_idle_threads_of_openmp_spin_briefly():
    kept = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = "from recast_pl.cli import main; main(['fit', '--help'])"  # imports torch, whose OpenMP prints its settings
    environment = kept | {"OMP_DISPLAY_ENV": "verbose"}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stderr
    assert "GOMP_SPINCOUNT = '1000'" in printed


@pytest.mark.parametrize(("name", "value"), [("GOMP_SPINCOUNT", "77"), ("OMP_WAIT_POLICY", "active")])
def test_how_long_threads_of_openmp_spin_is_left_to_the_user(name, value, monkeypatch):
    for setting in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(setting, raising=False)
    monkeypatch.setenv(name, value)
    assert main([]) == 2
    assert os.environ.get("GOMP_SPINCOUNT") == {"GOMP_SPINCOUNT": value}.get(name)


def test_a_system_without_hangup_signals_is_supported(tiny_fit, monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP")
    assert main(tiny_fit("--trainer.max_epochs", "1")) == 0


# options of one piece or one task


def printed(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *words, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def pieces_of(config):
    return {
        piece["class_path"].rpartition(".")[2]: piece.get("init_args", {})
        for piece in config["model"]["init_args"]["pieces"]
    }


MELO = ["--config", "vit.yaml", "--config", "methods/melo.yaml"]
BOTH = ["--config", "vit.yaml", "--config", "methods/recast_melo.yaml"]


@pytest.mark.parametrize(
    ("words", "piece", "changed"),
    [
        ([*MELO, "--model.pieces.rank", "4"], "LoRA", {"rank": 4}),
        ([*MELO, "--model.init_args.pieces.rank=4"], "LoRA", {"rank": 4}),
        (
            [*MELO, "--model.pieces.LoRA.rank", "4", "--model.pieces.0.learning_rate=1e-3"],
            "LoRA",
            {"rank": 4, "learning_rate": 1e-3},
        ),
        ([*MELO, "--model.pieces.targets", '["qkv"]'], "LoRA", {"targets": ["qkv"]}),
        ([*BOTH, "--model.pieces.recast.learning_rate", "0.5"], "Recast", {"learning_rate": 0.5}),
        ([*BOTH, "--model.pieces.1.learning_rate", "0.5"], "LoRA", {"learning_rate": 0.5}),
        ([*BOTH, "--model.pieces.rank", "2", "--model.pieces.rank", "3"], "LoRA", {"rank": 3}),
    ],
    ids=lambda value: " ".join(value[4:]) if isinstance(value, list) else "",
)
def test_one_argument_of_a_piece_can_be_changed(words, piece, changed, capsys):
    before, after = pieces_of(printed(capsys, *words[:4])), pieces_of(printed(capsys, *words))
    assert after == before | {piece: before[piece] | changed}


def test_an_argument_within_an_argument_and_one_task_can_be_changed(capsys):
    words = [
        "--model.pieces.layout.groups",
        "3",
        "--data.tasks.signs.path",
        "/elsewhere",
        "--data.tasks.0.flip",
        "false",
    ]
    config = printed(capsys, "--config", "quickstart.yaml", *words)
    assert pieces_of(config)["Recast"]["layout"]["groups"] == 3
    assert pieces_of(config)["Recast"]["layout"]["targets"] == [r"conv_pwl?\.weight"]
    tasks = {task["name"]: task for task in config["data"]["tasks"]}
    assert tasks["signs"]["path"] == "/elsewhere"
    assert [name for name in tasks if "flip" in tasks[name]] == ["food", "digits"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([*MELO, "--model.pieces.rnk", "4"], ["--model.pieces.rnk", "LoRA"]),
        ([*MELO, "--model.pieces.LoRA.rnk", "4"], ["takes no 'rnk'", "rank"]),
        ([*MELO, "--model.pieces.rank", "many"], ["rank", "many"]),
        ([*MELO, "--model.pieces.rank"], ["--model.pieces.rank has no value"]),
        ([*MELO, "--model.pieces.1.rank", "4"], ["--model.pieces.1.rank", "LoRA"]),
        ([*BOTH, "--model.pieces.learning_rate", "4"], ["Recast and LoRA", "--model.pieces.Recast."]),
        ([*MELO, "--model.pieces.rank.x", "4"], ["'rank' has no entries"]),
        (["--config", "quickstart.yaml", "--data.tasks.flip", "false"], ["food and people", "--data.tasks.food."]),
        (["--config", "quickstart.yaml", "--data.tasks.sign.flip", "false"], ["--data.tasks.sign.flip", "signs"]),
    ],
    ids=lambda value: " ".join(value[2:]) if isinstance(value, list) else "",
)
def test_an_option_that_fits_no_piece_or_several_is_one_line(words, named, capsys):
    assert main(["fit", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(text in line for text in named), line


def test_a_run_and_a_comparison_take_options_of_a_piece(tiny_fit, tmp_path):
    rank = ["--config", "methods/melo.yaml", "--model.pieces.rank", "2"]
    assert main(tiny_fit("--trainer.max_epochs", "1", *rank, "--only", "first")) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert pieces_of(config)["LoRA"]["rank"] == 2
    rate = ["--model.pieces.learning_rate", "1e-3"]  # a rate may change when a run is resumed
    assert main(["fit", "--run_dir", str(tmp_path / "run"), "--resume", "true", *rate]) == 0
    options = [*tiny_fit("--trainer.max_epochs", "1")[5:], *rank[2:]]
    words = ["compare", "--base", "vit.yaml", "--configs", "methods/melo.yaml", "--output", str(tmp_path / "table")]
    words += ["--seeds", "1", "--options", shlex.join(options)]
    assert main(words) == main(words) == 0
    assert pieces_of(yaml.safe_load((tmp_path / "table/melo/1/config.yaml").read_text()))["LoRA"]["rank"] == 2


# resuming, and what went wrong before


def test_a_run_is_resumed_however_true_is_spelt(tiny_fit, tmp_path):
    assert main(tiny_fit("--trainer.max_epochs", "1", "--config", "methods/probe.yaml")) == 0
    for words in (["--resume", "True"], ["--resume", "yes"], ["--resume=on"], ["--resume"]):
        assert main(["fit", *words, "--run_dir", str(tmp_path / "run")]) == 0, words
    assert main(["fit", "--run_dir", str(tmp_path / "run"), "--resume"]) == 0


def test_a_mistyped_run_folder_is_named_with_those_beside_it(tiny_fit, tmp_path, capsys):
    run = tmp_path / "logs" / "2026-01-01"
    assert main(tiny_fit("--trainer.max_epochs", "1", run_dir=run)) == 0
    wrong = str(tmp_path / "logs" / "2026-01-10")
    for words in (["fit", "--resume", "true"], ["test"], ["serve"]):
        assert main([*words, "--run_dir", wrong]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{wrong} is not a run folder: it does not exist (did you mean {run}?)" in line
    assert main(["test", "--run_dir", str(tmp_path / "logs")]) == 2
    assert f"the last run in it is {run}" in capsys.readouterr().err
    assert main(["fit", "--resume", "true", "--run_dir", str(tmp_path / "logs")]) == 2
    assert f"the last run in it is {run}" in capsys.readouterr().err


def test_options_can_be_corrected_after_a_failed_start(tiny_fit, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(tiny_fit("--model.optimizer.init_args.lr", "1e30")) == 2
    assert (run / "config.yaml").exists()
    capsys.readouterr()
    for words in (["--data.batch_size", "8"], ["--data.batch_size", "8", "--resume"]):
        assert main(tiny_fit(*words)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"delete {run}" in line or "delete the folder" in line
    shutil.rmtree(run)
    assert main(tiny_fit("--data.batch_size", "8", "--trainer.max_epochs", "1")) == 0
    assert main(tiny_fit("--data.batch_size", "4", "--resume")) == 2
    assert "delete" not in capsys.readouterr().err


# environment variables in YAML


def test_a_config_may_name_environment_variables(tiny_fit, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("IMAGES", str(tmp_path))
    monkeypatch.setenv("BATCH", "5")
    monkeypatch.setenv("NAME", "first: #1")  # read as text, although it looks like YAML
    (tmp_path / "own.yaml").write_text(
        """
        data:
          batch_size: ${BATCH}
          root: "${NAME}/${BATCH}"  # ${NOT_SET} in a comment is no variable
          tasks: [{name: first, path: "${IMAGES}/first"}]
        """
    )
    own = ["--config", str(tmp_path / "own.yaml")]
    data = printed(capsys, "--config", "vit.yaml", *own)["data"]
    assert (data["batch_size"], data["root"]) == (5, "first: #1/5")
    assert data["tasks"] == [{"name": "first", "path": f"{tmp_path}/first"}]
    words = tiny_fit("--trainer.max_epochs", "1", "--config", "methods/probe.yaml")
    at = words.index("--data.tasks")
    del words[at : at + 2]
    assert main([*words, *own, "--data.root", str(tmp_path / "data")]) == 0
    monkeypatch.delenv("IMAGES")  # a run keeps the values that it was trained with
    assert main(["test", "--run_dir", str(tmp_path / "run")]) == 0


def test_a_variable_that_is_not_set_is_named(tmp_path, capsys):
    (tmp_path / "own.yaml").write_text("data: {root: '${NO_SUCH_VARIABLE}/x'}")
    assert main(["fit", "--config", "vit.yaml", "--config", str(tmp_path / "own.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "${NO_SUCH_VARIABLE} in own.yaml names an environment variable that is not set" in line
    (tmp_path / "imagenet.yaml").write_text("images: ${NO_SUCH_VARIABLE}")
    assert main(["imagenet", "--config", str(tmp_path / "imagenet.yaml"), "--output", str(tmp_path)]) == 2
    assert "${NO_SUCH_VARIABLE}" in capsys.readouterr().err
