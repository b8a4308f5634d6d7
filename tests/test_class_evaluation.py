"""One label space: accuracies among the classes of all tasks so far, from the command line."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, TINY_VIT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import recast_pl
from recast_pl.cli import main
from recast_pl.config.run import open_run
from recast_pl.errors import RunError
from recast_pl.files import read_sealed_json, sealed_json
from recast_pl.runs.evaluation import restore
from recast_pl.runs.folder import RunFolder

CLIPART = ROOT / "data" / "clipart"
TASKS = ("food", "signs", "people")


def words(run, *more, tasks=TASKS, method="vit.yaml"):
    listed = [{"name": name, "path": str(CLIPART / name)} for name in tasks]
    base = [] if method == "vit.yaml" else ["--config", "vit.yaml"]
    return [
        *("fit", *base, "--config", method, "--run_dir", str(run), "--data.tasks", json.dumps(listed)),
        *("--model.backbone.name", "vit_tiny_patch16_224", "--model.backbone.weights", "random"),
        *("--model.backbone.args", json.dumps(TINY_VIT), "--data.image_size", "32"),
        *("--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"),
        *("--trainer.logger", "false", *more),
    ]


def fit(run, *more, **settings):
    assert main(words(run, *more, **settings)) == 0
    return run


def resume(run, *more):
    assert main(["fit", "--run_dir", str(run), "--resume", "true", *more]) == 0


def summary(run):
    return json.loads((run / "summary.json").read_text())


def rows(run):
    return {path.name: path.read_bytes() for path in sorted((run / "class_evaluation").iterdir())}


def patches(run):
    return {path.name: path.read_bytes() for path in sorted((run / "patches").iterdir())}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("classes") / "run", "--evaluation", "class", "--trainer.logger", "true")


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_accuracies_are_those_of_predictions_without_a_task(trained):
    _, init = open_run(trained)
    data = init.data
    data.prepare_data()
    for count in (1, 2, 3):
        row = read_sealed_json(trained / "class_evaluation" / f"{count - 1:02d}_{TASKS[count - 1]}.json", RunError)
        model = recast_pl.load(trained, tasks=TASKS[:count])
        starts = [0, 5, 10]
        for index, name in enumerate(TASKS[:count]):
            data.select(index)
            split = data.plain_dataloader("test").dataset
            pixels, labels, _ = split.__getitems__(range(len(split)))
            routed, joint = row["accuracies"]["routed"][name], row["accuracies"]["joint"][name]
            answers = model.route_tensors(pixels, refuse=0)
            wanted = [(name, data.classes[label]) for label in labels.tolist()]
            right = sum((each.task, each.label) == answer for each, answer in zip(answers, wanted, strict=True))
            assert routed == pytest.approx(100 * right / len(labels), abs=1e-3)
            best = model.router.scores(model._frozen_features(pixels)).argmax(1)
            assert joint == pytest.approx(100 * float((best == starts[index] + labels).double().mean()), abs=1e-3)
        assert list(row["accuracies"]["routed"]) == list(row["accuracies"]["oracle"]) == list(TASKS[:count])
    assert row["accuracies"]["routed"] != row["accuracies"]["joint"]


def test_the_summary_has_averages_after_each_task_and_at_the_end(trained):
    found = summary(trained)
    curves = found["class_accuracies"]
    assert list(curves) == ["oracle", "routed", "joint"]
    for index, path in enumerate(sorted((trained / "class_evaluation").iterdir())):
        for measure, by_task in read_sealed_json(path, RunError)["accuracies"].items():
            assert curves[measure][index] == pytest.approx(sum(by_task.values()) / (index + 1))
    for measure, curve in curves.items():
        assert found[f"{measure}_accuracy"] == curve[-1]
    assert found["oracle_accuracy"] == pytest.approx(found["average_accuracy"])
    assert curves["oracle"][0] == curves["routed"][0]  # the first task is always found
    logged = EventAccumulator(str(trained / "tensorboard" / "stream")).Reload()
    assert logged.Scalars("classes/routed")[-1].value == pytest.approx(found["routed_accuracy"])
    assert logged.Scalars("classes/routed")[-1].step == 3


def test_rows_are_the_same_bytes_whoever_trained_the_tasks_and_whenever(trained, tmp_path, capsys):
    parts = tmp_path / "parts"
    fit(parts, "--evaluation", "class", "--only", "people")
    resume(parts, "--only", "food")
    assert not (parts / "class_evaluation").exists()
    resume(parts)
    assert rows(parts) == rows(trained)
    assert summary(parts)["class_accuracies"] == summary(trained)["class_accuracies"]
    accuracy = summary(trained)["routed_accuracy"]
    assert "accuracy % over all 14 classes: oracle" in (output := capsys.readouterr().out)
    assert f"routed {accuracy:.2f}" in output


def test_rows_that_are_missing_or_of_other_patches_are_measured_again(run):
    before = rows(run)
    first, second, third = sorted((run / "class_evaluation").iterdir())
    second.unlink()
    row = read_sealed_json(third, RunError)
    row["patches"], row["accuracies"]["routed"]["food"] = "0" * 64, 100.0
    third.write_text(sealed_json(row))
    resume(run)
    assert rows(run) == before
    first.write_text(first.read_text().replace("40", "41"))
    assert main(["fit", "--run_dir", str(run), "--resume", "true"]) == 2


def test_a_finished_run_is_evaluated_later_and_keeps_its_patches(trained, tmp_path):
    plain = fit(tmp_path / "plain")
    assert "routed_accuracy" not in summary(plain)
    before, config = patches(plain), (plain / "config.yaml").read_bytes()
    assert before == patches(trained)  # the evaluation between two tasks changes nothing of the second
    resume(plain, "--evaluation", "class")
    assert (patches(plain), rows(plain)) == (before, rows(trained))
    assert (plain / "config.yaml").read_bytes() == config
    assert summary(plain)["class_accuracies"] == summary(trained)["class_accuracies"]


JOINT = ["NCM", "LDA", {"class_path": "recast_pl.RanPAC", "init_args": {"dimensions": 200}}, "recast_pl.FeCAM"]


def test_other_classifiers_are_measured_beside_the_router(run, trained, tmp_path, capsys):
    chosen = ("--evaluation", "class", "--joint", json.dumps(JOINT))
    fit(tmp_path / "new", *chosen, "--only", "signs")  # which task comes first does not matter
    resume(tmp_path / "new")
    assert list(summary(tmp_path / "new")["class_accuracies"]) == [
        *("oracle", "routed", "joint", "NCM", "LDA", "RanPAC", "FeCAM"),
    ]
    assert patches(tmp_path / "new") == patches(trained)
    resume(run, *chosen)  # rows that lack a measure are measured again
    assert rows(run) == rows(tmp_path / "new")
    (run / "class_evaluation" / "02_people.json").unlink()  # the earlier rows are kept now
    resume(run, *chosen)
    assert rows(run) == rows(tmp_path / "new")
    found = read_sealed_json(run / "class_evaluation" / "02_people.json", RunError)["accuracies"]
    assert (
        found["joint"]
        == read_sealed_json(trained / "class_evaluation" / "02_people.json", RunError)["accuracies"]["joint"]
    )
    assert "RanPAC" in capsys.readouterr().out
    model, (_, init) = recast_pl.load(run), open_run(run)
    init.data.prepare_data()
    classifier, tests = recast_pl.NCM(), []
    for index, start in enumerate((0, 5, 10)):
        init.data.select(index)
        for split in ("train", "test"):
            images = init.data.plain_dataloader(split).dataset
            pixels, labels, _ = images.__getitems__(range(len(images)))
            features = model._frozen_features(pixels)
            if split == "train":
                classifier.update(features, labels + start)
            else:
                tests.append((features, labels + start))
    for name, (features, labels) in zip(TASKS, tests, strict=True):
        right = (classifier.scores(features).argmax(1) == labels).double().mean()
        assert found["NCM"][name] == pytest.approx(100 * float(right), abs=1e-3)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--joint", '["NCM"]'], "add --evaluation class"),
        (["--evaluation", "class", "--joint", '["NCM", "NCM"]'], "two classifiers of one class"),
        (
            ["--evaluation", "class", "--joint", '[{"class_path": "RanPAC", "init_args": {"dimensions": 0}}]'],
            "dimensions=0 must be at least 1",
        ),
        (["--evaluation", "classes"], "evaluation"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_one_line(options, fault, tmp_path, capsys):
    assert main(words(tmp_path / "run", *options)) == 2
    error = capsys.readouterr().err
    assert fault in error
    assert error.count("\n") == 1


def test_tasks_that_share_weights_are_refused_before_anything_is_read(tmp_path, capsys):
    assert main(words(tmp_path / "run", "--evaluation", "class", method="methods/ewc.yaml")) == 2
    error = capsys.readouterr().err
    assert "--evaluation class finds tasks by the features of a frozen network, but tasks share what" in error
    assert not (tmp_path / "run" / "patches").exists()


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """A run of `WeightAligning`, evaluated by its joint head."""
    run = tmp_path_factory.mktemp("aligned") / "run"
    return fit(run, "--evaluation", "class", method="methods/weight_aligning.yaml")


def test_the_joint_head_classifies_among_the_classes_of_all_tasks(aligned):
    _, init = open_run(aligned)
    init.data.prepare_data()
    folder = RunFolder(aligned)
    restore(init.model, folder, 32)
    right, start = {}, 0
    for index, name in enumerate(TASKS):
        init.data.select(index)
        found = []
        for batch in init.data.plain_dataloader("test"):
            images, labels = init.data.on_after_batch_transfer(batch, 0)
            with torch.no_grad():
                features = init.model.backbone(images)
                logits = torch.cat([head(features) for head in init.model.old_heads], 1)
            found.append(logits.argmax(1) == start + labels)
        right[name] = 100 * float(torch.cat(found).double().mean())
        start += len(init.data.classes)
    last = read_sealed_json(aligned / "class_evaluation" / "02_people.json", RunError)["accuracies"]
    assert last["joint"] == pytest.approx(right, abs=1e-4)
    result = summary(aligned)
    assert last["oracle"] == dict(zip(TASKS, result["accuracy_matrix"][-1], strict=True))  # with what was forgotten
    assert result["joint_accuracy"] == pytest.approx(sum(right.values()) / 3, abs=1e-3)
    assert result["oracle_accuracy"] == pytest.approx(result["average_accuracy"])
    assert "routed_accuracy" not in result
    norms = [float(head.weight.norm(dim=1).mean()) for head in init.model.old_heads]
    assert norms[2] == pytest.approx(float(torch.cat([h.weight for h in init.model.old_heads[:2]]).norm(dim=1).mean()))


def test_tables_of_several_runs_have_the_measures_that_one_of_them_has(trained, aligned, tmp_path):
    for name, run in (("recast", trained), ("aligned", aligned)):
        shutil.copytree(run, tmp_path / "runs" / name)
    assert main(["report", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "out")]) == 0
    lines = (tmp_path / "out" / "report.md").read_text().splitlines()
    start = next(index for index, line in enumerate(lines) if "routed accuracy %" in line)
    header, _, *found = ([cell.strip() for cell in line.split("|")] for line in lines[start : start + 4])
    cells = {row[1]: dict(zip(header, row, strict=True)) for row in found}
    assert cells["aligned"]["routed accuracy %"] == ""
    assert cells["recast"]["routed accuracy %"] == f"{summary(trained)['routed_accuracy']:.2f}"
    for name, run in (("recast", trained), ("aligned", aligned)):
        assert cells[name]["joint accuracy %"] == f"{summary(run)['joint_accuracy']:.2f}"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["napa_vq", "ider"])
def test_other_methods_of_one_classifier_are_measured_by_it_too(method, tmp_path):
    result = summary(fit(tmp_path / "run", "--evaluation", "class", method=f"methods/{method}.yaml"))
    assert result["joint_accuracy"] <= result["oracle_accuracy"]  # the best of all classes is the best of its head
    assert len(result["class_accuracies"]["joint"]) == len(TASKS)


def test_what_a_later_task_has_changed_is_not_measured_any_more(aligned, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(aligned, run)
    before = (run / "class_evaluation" / "02_people.json").read_bytes()
    (run / "class_evaluation" / "02_people.json").unlink()
    resume(run)  # the network still is as the last task left it
    assert (run / "class_evaluation" / "02_people.json").read_bytes() == before
    (run / "class_evaluation" / "00_food.json").unlink()
    assert main(["fit", "--run_dir", str(run), "--resume", "true"]) == 2
    assert "accuracies after task 'food' can only be measured before the next task" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pieces", "options", "fault"),
    [
        (["FineTune", "LwF", "HAT"], [], "each task has numbers of HAT of its own"),
        (["FineTune", "LwF"], ["--joint", '["NCM"]'], "--joint reads the features of a frozen network"),
    ],
)
def test_a_joint_head_needs_one_network(pieces, options, fault, tmp_path, capsys):
    given = ["--model.pieces", json.dumps([{"class_path": f"recast_pl.{name}"} for name in pieces])]
    assert main(words(tmp_path / "run", "--evaluation", "class", *given, *options)) == 2
    assert fault in capsys.readouterr().err


def test_a_task_without_a_signature_is_refused_with_the_remedy(run, capsys):
    (run / "signatures" / "01_signs.safetensors").unlink()
    shutil.rmtree(run / "class_evaluation")
    assert main(["fit", "--run_dir", str(run), "--resume", "true"]) == 2
    assert "task 'signs' has no signature; make it with 'patch sign" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("method", ["piggyback", "chosen", "clr", "finetune_each"])
def test_every_isolated_method_is_evaluated_and_trains_the_same(method, tmp_path):
    config = f"methods/{method}.yaml"
    plain = fit(tmp_path / "plain", tasks=TASKS[:2], method=config)
    found = fit(tmp_path / "found", "--evaluation", "class", tasks=TASKS[:2], method=config)
    assert patches(plain) == patches(found)
    assert len(rows(found)) == 2
