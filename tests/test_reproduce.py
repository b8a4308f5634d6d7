"""The command `reproduce`: tables and figures of the paper, ours beside the published values."""

import csv
import itertools
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import time

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY_VIT
from test_stream import patches, read_summary

from recast_pl import Decomposition, SequentialTaskDataModule, TaskConfig
from recast_pl.cli import main
from recast_pl.data.catalogue import PAPER
from recast_pl.data.tasks import choose_images, split_images
from recast_pl.decomposition.analysis import analyze
from recast_pl.runs.folder import RunFolder

pytest_plugins = ["fixtures_catalogue"]

FOLDER = ROOT / "configs" / "paper"
TABLES = {name: yaml.safe_load((FOLDER / f"{name}.yaml").read_text()) for name in ("table1", "table2")}
ONE_EPOCH = ["--trainer.max_epochs", "1"]  # some methods set their own number
QUIET = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}


def rows(path):
    return list(csv.DictReader(path.open()))


@pytest.fixture
def overlay(tmp_path):
    """Writes a config to lay over those of the paper, for a quick run; returns its path."""

    def write(backbone, trainer=None, **data):
        content = {
            "model": {"init_args": {"backbone": backbone}},
            "data": {"batch_size": 64, "num_workers": 0, **data},
            "trainer": {**QUIET, "max_epochs": 1, **(trainer or {})},
        }
        (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
        return str(tmp_path / "small.yaml")

    return write


TINY = {"name": "vit_tiny_patch16_224", "weights": "random", "args": TINY_VIT}


@pytest.fixture
def own_table(image_folder, overlay, tmp_path, monkeypatch):
    """A table 1 of three rows, in the working folder's own configs/, on two small folders of images."""
    tasks = [{"name": name, "path": str(image_folder(name, 2, seed=seed))} for seed, name in enumerate(("a", "b"))]
    points = [
        {"name": "probe", "method": {"a probe": "methods/probe.yaml"}, "published": {"average": 50, "b": 40.25}},
        {"name": "lost", "method": {"lost": "lost.yaml"}, "published": {"average": 60, "spread": 0.5, "a": 70}},
        {"name": "recast", "method": {"RECAST": "methods/recast_vit.yaml"}},
    ]
    piece = {"class_path": "recast_pl.Recast", "init_args": {"decomposition": "nowhere.safetensors"}}
    lost = {"model": {"class_path": "recast_pl.TILModule", "init_args": {"pieces": [piece]}}}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lost.yaml").write_text(yaml.safe_dump(lost))
    (tmp_path / "configs" / "paper").mkdir(parents=True)
    (tmp_path / "configs" / "paper" / "protocol.yaml").write_text("data: {}")
    content = {"base": ["vit.yaml"], "seeds": [1, 2], "points": points, "x": "method", "notes": ["A note."]}
    (tmp_path / "configs" / "paper" / "table1.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return ["reproduce", "--table", "1", "--base", overlay(TINY, tasks=tasks, image_size=32)]


def test_a_table_shows_ours_beside_the_published_values_and_what_is_missing(own_table, tmp_path, capsys):
    out = tmp_path / "logs" / "paper" / "table1"
    assert main(own_table) == 2  # the second row has no templates
    printed = capsys.readouterr()
    assert "run the same command again" in printed.err
    for text in ("a probe", "missing", "0 of 2", "60.00 ± 0.50", "paper: b", "A note.", "sweep_published.md"):
        assert text in printed.out
    assert main(["report", "--runs", str(out), "--output", str(tmp_path / "report")]) == 0
    report = (tmp_path / "report" / "report.md").read_text()
    assert "beside the published values" in report
    assert "60.00 ± 0.50" in report
    (tmp_path / "lost.yaml").write_text((ROOT / "configs" / "methods" / "melo.yaml").read_text())
    shutil.rmtree(out / "lost")
    assert main([*own_table, "--seeds", "1"]) == 0
    shutil.rmtree(out / "lost" / "1" / "patches")
    (out / "lost" / "1" / "summary.json").unlink()
    assert main(own_table) == 0
    assert "3 of 6 runs are finished" in capsys.readouterr().err
    for row, name in zip(rows(out / "sweep_published.csv"), ("probe", "lost", "recast"), strict=True):
        runs = [read_summary(out / name / seed) for seed in "12"]
        values = [run["average_accuracy"] for run in runs]
        assert row["ours %"] == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
        theirs = {"probe": 50, "lost": 60}.get(name)
        assert row["difference"] == ("" if theirs is None else f"{np.mean(values) - theirs:+.2f}")
        assert row["paper %"].split(" ")[0] == ("" if theirs is None else f"{theirs:.2f}")
        assert row["numbers per task"] == f"{runs[0]['tasks'][0]['task_parameters']:,}"
        assert row["seeds"] == "2"
    table = rows(out / "sweep_tasks.csv")
    finals = [read_summary(out / "recast" / seed)["accuracy_matrix"][-1] for seed in "12"]
    means, deviations = np.mean(finals, 0), np.std(finals, 0, ddof=1)
    assert [table[2]["a %"], table[2]["b %"]] == [f"{m:.2f} ± {d:.2f}" for m, d in zip(means, deviations, strict=True)]
    assert [(row["paper: a"], row["paper: b"]) for row in table] == [("", "40.25"), ("70.00", ""), ("", "")]
    assert (out / "sweep_published.md").read_text().endswith("\nA note.\n")


@pytest.mark.parametrize("words", [[], ["--table", "3"], ["--figure", "2"], ["--table", "1", "--figure", "3"]])
def test_what_the_paper_does_not_have_is_refused(words, capsys):
    assert main(["reproduce", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "table1, table2, table4" in error.replace("figure10, figure3, ", "")


def test_files_refuse_wrong_entries(tmp_path, capsys):
    for text, named in (
        ("points: [{a: 1, published: {average: high}}]", "published"),
        ("points: [{a: 1, published: 85}]", "published"),
        ("fits: {one: alone.yaml}", "fits has one"),
        ("seeds: [1]", "neither grid nor points"),
        ("after: [nowhere.yaml]", "nowhere.yaml"),
    ):
        (tmp_path / "mine.yaml").write_text(text)
        assert main(["sweep", "--config", str(tmp_path / "mine.yaml"), "--output", str(tmp_path / "out")]) == 2
        assert named in capsys.readouterr().err


# what the files say


def test_the_published_values_are_those_that_the_paper_prints(shared):
    paper = (shared / "paper" / "recast_iclr2025.txt").read_text()
    table4 = paper.partition("Table 4: Model Performance")[2].partition("Table 5")[0]
    found = 0
    for point in itertools.chain(*(table["points"] for table in TABLES.values())):
        values = point.get("published", {})
        if values:
            average = f"{values['average']}" + (f"±{values['spread']}" if "spread" in values else "")
            assert average in paper.replace(" ±", "±"), point["name"]
        if set(PAPER) <= values.keys():
            assert "\t".join(str(values[name]) for name in PAPER) in table4, point["name"]
            found += 1
    assert found == len([line for line in table4.splitlines() if line.count("\t") == 6]) - 1  # but for the header


def test_the_data_are_those_of_the_paper():
    data = SequentialTaskDataModule(
        tuple(
            TaskConfig(task["name"], images=task.get("images"))
            for task in yaml.safe_load((FOLDER / "protocol.yaml").read_text())["data"]["tasks"]
        )
    )
    assert [task.name for task in data.tasks] == list(PAPER)
    names = [f"jpg/image_{number:05d}.jpg" for number in range(1, 8190)]
    chosen = choose_images(names, data.tasks[0].images, 42)
    assert len(chosen) == len(set(chosen.tolist())) == 6553
    splits = split_images(np.zeros(6553, dtype=np.int64), [""] * 6553, [names[index] for index in chosen], 42)
    shares = [len(splits[split]) / 6553 for split in ("train", "val", "test")]
    assert shares == pytest.approx([0.7, 0.15, 0.15], abs=0.015)  # 3 standard deviations
    assert set(choose_images(names, 100, 42)) < set(choose_images(names, 200, 42))
    assert set(choose_images(names, 100, 42)) != set(choose_images(names, 100, 43))
    assert choose_images(names, None, 42).tolist() == list(range(8189))


# whole tables and figures


@pytest.fixture
def six(publish, tmp_path):
    """Publishes the six data sets of the paper, in their authors' formats; returns the folder to download into."""
    for name in PAPER:
        publish(name)
    return tmp_path / "sets"


@pytest.mark.release
def test_table_2_is_killed_and_resumed_with_the_same_bytes(six, overlay, tmp_path, capsys):
    wide = {"name": "vit_tiny_patch16_224", "weights": "random"}  # of a density of 1e-5 an entry is left
    small, out = overlay(wide, {"limit_train_batches": 1}, image_size=16), tmp_path / "out" / "table2"
    words = ["reproduce", "--table", "2", "--data_root", str(six), "--base", small, "--seeds", "1"]
    words += ["--output", str(out.parent), "--options", shlex.join(ONE_EPOCH)]
    process = multiprocessing.get_context("fork").Process(target=main, args=(words,))  # keeps the changed catalogue
    process.start()
    end = time.monotonic() + 600
    while not (out / "melo" / "1" / "patches" / "00_flowers.safetensors").exists():
        assert process.is_alive()
        assert time.monotonic() < end
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert 1 <= len(patches(out / "melo" / "1")) < 6
    assert not (out / "recast_melo" / "1").exists()
    capsys.readouterr()
    assert main(words) == 0
    printed = capsys.readouterr()
    assert "5 of 14 runs are finished" in printed.err
    assert "missing" not in printed.out
    table = {row["method"]: row for row in rows(out / "sweep_published.csv")}
    assert len(table) == len(TABLES["table2"]["points"]) == 14
    assert all([task["name"] for task in read_summary(path)["tasks"]] == list(PAPER) for path in out.glob("*/1"))
    assert table["RECAST"]["numbers per task"] == "96"
    assert table["RECAST"]["paper %"] == "85.00 ± 0.10"
    assert table["RECAST + DoRA"]["paper %"] == table["RECAST + DoRA"]["difference"] == ""
    names = ("vit.yaml", "paper/protocol.yaml", small, "methods/melo.yaml")
    configs = itertools.chain(*(("--config", name) for name in names))
    whole = ["--seed_everything", "1", "--data.root", str(six), "--run_dir", str(tmp_path / "whole")]
    assert main(["fit", *configs, *ONE_EPOCH, *whole]) == 0
    assert patches(tmp_path / "whole") == patches(out / "melo" / "1")


@pytest.mark.release
def test_table_4_uses_the_runs_of_tables_2_and_1_with_real_networks(six, overlay, tmp_path, capsys):
    tasks = [{"name": "cifar10"}]
    small = overlay({"weights": "random"}, {"limit_train_batches": 1}, tasks=tasks, image_size=32)
    words = ["--data_root", str(six), "--base", small, "--seeds", "1", "--output", str(tmp_path / "out")]
    words += ["--options", shlex.join(ONE_EPOCH)]
    assert main(["reproduce", "--table", "4", *words]) == 0
    numbers = {}
    for name, table in TABLES.items():
        made = rows(tmp_path / "out" / name / "sweep_tasks.csv")
        assert len(made) == len(table["points"])
        assert [row["paper: cifar10"] for row in made] == [
            f"{point['published']['cifar10']:.2f}" if "cifar10" in point.get("published", {}) else ""
            for point in table["points"]
        ]
        for row in rows(tmp_path / "out" / name / "sweep_published.csv"):
            numbers[name, row["method"]] = int(row["numbers per task"].replace(",", ""))
            assert "missing" not in row.values()
            assert row["difference"] == ""  # to an average over six sets
    vit = {"ViT-Small": 0, "RECAST": 96, "MeLo": 18432, "DoRA": 41472, "RoSA (sparse MLP)": 120, "AdaptFormer": 13836}
    resnet = {"ResNet-34": 0, "RECAST": 168, "CLR": 76608}
    counts = {("table2", row): n for row, n in vit.items()} | {("table1", row): n for row, n in resnet.items()}
    assert counts.items() <= numbers.items()
    capsys.readouterr()
    assert main(["reproduce", "--table", "1", *words]) == 0
    assert "12 of 12 runs are finished" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [3, *(pytest.param(number, marks=pytest.mark.release) for number in (4, 5, 7, 8))])
def test_every_figure_runs(number, six, overlay, tmp_path, monkeypatch, capsys):
    real = {"name": "vit_small_patch16_224", "weights": "random"}  # figure 4 names points by its numbers
    backbone, task = real if number == 4 else TINY, {"name": "cifar10"}
    small = overlay(backbone, {"limit_train_batches": 1}, tasks=[task], image_size=32)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for file in (tmp_path / "configs" / "mimicry").glob("vae_*.yaml"):
        file.write_text(file.read_text().replace("2500", "20"))
    monkeypatch.chdir(tmp_path)
    out, words = tmp_path / "out", ["--data_root", str(six), "--base", small, "--seeds", "1", "--output", "out"]
    if number == 3:  # its backbones are large
        words += ["--options", shlex.join(["--model.backbone", json.dumps(TINY)])]
    assert main(["reproduce", "--figure", str(number), *words]) == 0
    assert "missing" not in capsys.readouterr().out
    table = rows(out / f"figure{number}" / "sweep.csv")
    content = yaml.safe_load((FOLDER / f"figure{number}.yaml").read_text())
    assert len(table) == len(content.get("points") or list(itertools.product(*content["grid"].values())))
    assert (out / f"figure{number}" / "sweep.png").is_file()
    for row in table if number == 4 else ():
        assert row["numbers per task"].replace(",", "") == row["point"].rpartition("-")[2]
    for row in table if number in (7, 8) else ():
        layers = {"attention": 12, "MLP": 24, "both": 36}[row["targets"]]
        assert row["numbers per task"] == str(layers * (12 // int(row["groups"])) * int(row.get("K", 1)))
    if number == 3:
        untuned = [out / "figure3" / row["point"] / "1" for row in table if row["method"] == "RECAST without tuning"]
        assert len(untuned) == 4
        for run in untuned:
            kept = Decomposition.load(run / "decomposition.safetensors")
            before = torch.cat([c.mean(0) for bank in kept.banks for c in bank.coefficients])
            assert torch.equal(RunFolder(run).load_patches()["cifar10"].pieces[0]["coefficients"], before)
    if number == 5:
        check_fits(out / "figure6", words, capsys)


def check_fits(folder, words, capsys):
    """Checks figures 6, 9 and 10, which show the fits of figure 5; one is run again, as if it had been killed."""
    fits = {row["fit"]: row for row in rows(folder / "fits.csv")}
    assert list(fits) == ["smooth_l1", "mse", "noise", "vae_mse", "vae_smooth_l1"]
    groups = analyze(Decomposition.load(folder / "mse" / "decomposition.safetensors")).groups
    for column, measured in (
        ("mean Frobenius distance of templates", [group.frobenius for group in groups]),
        ("mean entropy of singular values (nats)", [group.entropy for group in groups]),
        ("mean cosine similarity", [group.similarity_mean for group in groups]),
    ):
        assert float(fits["mse"][column]) == pytest.approx(np.mean(measured), abs=1e-4)
    before = (folder / "mse" / "decomposition.safetensors").read_bytes()
    (folder / "mse" / "mimicry.json").unlink()
    (folder / "mse" / "decomposition.safetensors").unlink()
    capsys.readouterr()
    assert main(["reproduce", "--figure", "6", *words, "--engine", "Processes", "--engine.workers", "1"]) == 0
    assert "4 of 5 runs are finished" in capsys.readouterr().err
    assert (folder / "mse" / "decomposition.safetensors").read_bytes() == before
    for number in ("9", "10"):
        assert main(["reproduce", "--figure", number, *words]) == 0
        assert "5 of 5 runs are finished" in capsys.readouterr().err
    assert all((folder / f"fits_{key}.png").is_file() for key in ("frobenius", "entropy_mean", "similarity_mean"))
