"""The command `sweep`: points trained with several seeds, continued, and shown in tables and a figure."""

import csv
import json
import shlex

import numpy as np
import pytest
import yaml
from conftest import ROOT

from recast_pl.cli import main
from recast_pl.reporting.plots import Mark, plot_marks
from recast_pl.runs.metrics import spread

SWEEPS = sorted(path.stem for path in (ROOT / "configs" / "sweeps").glob("*.yaml"))
RECAST = {"targets": ["${targets}"], "groups": "${groups}", "templates": 2}
PIECES = [{"class_path": "recast_pl.Recast", "init_args": {"layout": RECAST}}]
MODEL = {"class_path": "recast_pl.TILModule", "init_args": {"pieces": PIECES}}
GRID = {
    "base": ["vit.yaml"],
    "seeds": [1, 2],
    "grid": {"groups": [6, 3], "targets": {"attention": r"attn\.qkv\.weight", "MLP": r"mlp\.fc[12]\.weight"}},
    "config": {"model": MODEL},
}


@pytest.fixture
def sweep(tiny_fit, tmp_path):
    """Makes the command line of `sweep` for a file with the given content, on two small tasks and a tiny ViT."""

    def words(content, *more, options=()):
        path = tmp_path / "mine.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        given = shlex.join(tiny_fit("--trainer.max_epochs", "1", "--trainer.logger", "false", *options)[5:])
        return ["sweep", "--config", str(path), "--output", str(tmp_path / "out"), "--options", given, *more]

    return words


def rows(path):
    return list(csv.DictReader(path.open()))


def summary(path):
    return json.loads((path / "summary.json").read_text())


def test_a_grid_is_trained_tabulated_drawn_and_continued(sweep, tmp_path, capsys):
    out, grid = tmp_path / "out", {"groups": [6, 3], "targets": {"both MLP": r"mlp\.fc[12]\.weight"}}
    content = {**GRID, "grid": grid}
    assert main(sweep(content, "--seeds", "1")) == 0
    names = ["groups-6_both-MLP", "groups-3_both-MLP"]
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == sorted(names)
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for name in names for path in (out / name / "1").rglob("*")}
    assert main(sweep(content)) == 0
    printed = capsys.readouterr()
    assert "2 of 4 runs are finished" in printed.err
    assert printed.out.count("task 1 of 2") == 2  # seed 2 of each point
    assert "sweep.md" in printed.out
    assert before.items() <= {path: path.stat().st_mtime_ns for path in out.rglob("*")}.items()  # untouched
    table = rows(out / "sweep.csv")
    assert [(row["point"], row["groups"], row["targets"]) for row in table] == [
        (name, name[7], "both MLP") for name in names
    ]
    for row in table:
        assert row["numbers per task"] == str(2 * 24)
        values = [summary(out / row["point"] / seed)["average_accuracy"] for seed in "12"]
        assert row["seeds"] == "2"
        assert row["average accuracy %"] == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
        config = yaml.safe_load((out / row["point"] / "1" / "config.yaml").read_text())
        layout = config["model"]["init_args"]["pieces"][0]["init_args"]["layout"]
        assert layout["groups"] == int(row["groups"])  # a number, not text
        assert layout["targets"] == [grid["targets"]["both MLP"]]
    assert (out / "sweep.md").read_text().count("\n") == 4
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    svg = (out / "sweep.svg").read_text()
    assert all(f"<!-- {text} -->" in svg for text in ("both MLP", "groups", "average accuracy (%)"))
    content["grid"]["targets"]["both MLP"] = r"fc1\.weight"  # a changed point is not mixed with its old runs
    assert main(sweep(content)) == 2
    assert "model differs from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"grid": {"groups": []}}, "no points"),
        ({"grid": {}}, "no points"),
        ({"grid": {"groups": [6]}}, "${targets}"),
        ({"grid": {"groups": [[6]]}}, "needs a label"),
        (
            {"grid": {"groups": [6, 3], "targets": "a", "depth": [1, 2]}},
            "'groups-6_a_depth-1' and 'groups-6_a_depth-2'",
        ),
        ({"grid": {"groups": {"a b": 6, "a/b": 3}, "targets": "x"}}, "'a-b_x'"),
        ({"grid": {"a": [True], "b": [None]}, "config": {"data": {"seed": "${a}", "root": ["${b}", "${c}"]}}}, "${c}"),
        ({"grid": {"a": [True, "a true"]}, "config": {"data": "${a}"}}, "'a-true'"),
        ({"x": "depth"}, "'depth' is not a key"),
        ({"over": "depth"}, "'depth' is not a key"),
        ({"over": "task_parameters"}, "'task_parameters' is not a key"),
        ({"series": ["task_parameters"]}, "'task_parameters' is not a key"),
        ({"points": [{"groups": 6}]}, "both of grid and points"),
        ({"gird": {}}, "'gird'"),
        ({"seeds": ["one"]}, "'one'"),
        ({"seeds": 1}, "seeds is 1"),
        ({"config": {**GRID["config"], "trainer": {"max_epoch": 1}}}, "max_epoch"),
        ({"base": ["nothing.yaml"]}, "nothing.yaml"),
    ],
)
def test_errors_are_one_line_before_any_training(change, named, sweep, tmp_path, capsys):
    assert main(sweep({**GRID, **change})) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert named in error
    assert not list(tmp_path.glob("out/**/config.yaml"))


@pytest.mark.parametrize(
    "content",
    [
        *("[1", "- 1", "points: [1]", "points: [{groups: {a: 1, b: 2}}]", "seeds: [1]"),
        "{x: rate, points: [{name: a, rate: 1}, {name: b, rate: [2]}]}",  # a list has no label
    ],
)
def test_malformed_files_are_refused(content, sweep, capsys):
    assert main(sweep(content)) == 2
    assert capsys.readouterr().err.startswith("recast_pl: error: ")


def test_the_order_of_tasks_matters_only_to_methods_with_shared_weights(sweep, tiny_fit, tmp_path, capsys):
    content = {
        "base": ["vit.yaml"],
        "grid": {
            "method": ["methods/recast_vit.yaml", "methods/finetune.yaml"],
            "data.order_seed": {"a": None, "b": 3},
        },
        "over": "data.order_seed",
        "x": "method",
    }
    assert main(sweep(content, "--seeds", "1")) == 0
    out = tmp_path / "out"
    isolated, shared = rows(out / "sweep_over_order_seed.csv")
    assert (isolated["method"], isolated["values of data.order_seed"]) == ("recast_vit", "2")
    assert (isolated["range"], isolated["largest change of a task"]) == ("0.00", "0.00")
    final = []
    for order, names in (("a", ["first", "second"]), ("b", ["second", "first"])):
        run = summary(out / f"finetune_{order}" / "1")
        assert [task["name"] for task in run["tasks"]] == names
        final.append(dict(zip(names, run["accuracy_matrix"][-1], strict=True)))
    means = [np.mean(list(values.values())) for values in final]
    assert shared["average accuracy %"] == f"{np.mean(means):.2f} ± {np.std(means, ddof=1):.2f}"
    assert shared["range"] == f"{max(means) - min(means):.2f}"
    assert shared["largest change of a task"] == f"{max(abs(final[0][t] - final[1][t]) for t in final[0]):.2f}"
    assert "over data.order_seed" in capsys.readouterr().out
    words = ("--config", "methods/recast_vit.yaml", "--data.order_seed", "3", "--trainer.max_epochs", "1")
    assert main(tiny_fit(*words, "--seed_everything", "1")) == 0  # `fit` with the options of a point
    ours, theirs = (sorted((run / "patches").iterdir()) for run in (out / "recast_vit_b" / "1", tmp_path / "run"))
    assert [path.name for path in ours] == ["00_second.safetensors", "01_first.safetensors"]
    assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]


def test_a_negative_order_seed_is_refused(tiny_fit, capsys):
    assert main(tiny_fit("--data.order_seed", "-1")) == 2
    assert "order_seed=-1" in capsys.readouterr().err


@pytest.mark.parametrize("length", [3, 15, 30, 60])
def test_the_legend_fits_into_the_picture(length):
    marks = [Mark(str(i) * length, 24 * i, spread([70.0, 72.0 + i]), 24 * i) for i in range(1, 8)]
    figure = plot_marks(marks, "task_parameters")
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert 0 <= box.y0 < box.y1 <= figure.bbox.y1
    assert len(legend.get_texts()) == 7


LONGEST = "task_order"


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(s, marks=[pytest.mark.release] * (s == LONGEST)) for s in SWEEPS])
def test_every_shipped_sweep_runs(name, tiny_fit, image_folder, tmp_path, monkeypatch):
    given = tiny_fit("--trainer.max_epochs", "1", "--trainer.logger", "false")[5:]
    if name == "imbalance":  # which leaves a tenth of the images of a class
        given += ["--data.tasks", json.dumps([{"name": "many", "path": str(image_folder("many", images=24))}])]
    elif name != "task_order":  # one task shows that a point trains; only an order needs two
        tasks = given.index("--data.tasks") + 1
        given[tasks] = json.dumps(json.loads(given[tasks])[:1])
    for path in tmp_path.rglob("*.png"):  # `domain` tells makers by the ends of names
        path.rename(path.with_stem(f"{path.stem}_{('fluent', 'google', 'openmoji', 'twitter')[int(path.stem) % 4]}"))
    out = tmp_path / "out"
    words = ["sweep", "--config", f"sweeps/{name}.yaml", "--output", str(out), "--seeds", "1"]
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--options", shlex.join(given)]) == 0
    table = rows(out / "sweep.csv")
    content = yaml.safe_load((ROOT / "configs" / "sweeps" / f"{name}.yaml").read_text())
    points = content.get("points") or list(np.ndindex(*(len(values) for values in content["grid"].values())))
    assert len(table) == len(points)
    for row in rows(out / "sweep_over_order_seed.csv") if name == "task_order" else ():
        if row["method"] in ("recast_vit", "melo", "adaptformer", "recast_melo"):
            assert row["largest change of a task"] == "0.00"
    assert (out / "sweep.png").is_file()
