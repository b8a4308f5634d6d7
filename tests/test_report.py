"""The report: its numbers compared with the runs, missing runs, and the page in a browser."""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
from datetime import date
from html.parser import HTMLParser
from importlib.metadata import version
from urllib.parse import unquote, unquote_to_bytes, urljoin, urlsplit

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_run_folder import a_patch, store

from recast_pl.cli import main
from recast_pl.runs.class_results import class_results
from recast_pl.runs.folder import RunFolder
from recast_pl.runs.origin import origin

TASKS = ("food", "signs")
METHODS = {  # numbers per task, bytes shared, pieces
    "probe": (0, 0, "LinearProbe"),
    "recast": (144, 0, "Recast"),
    "recast_melo": (18_576, 0, "Recast + LoRA"),
    "ewc": (21_000_000, 86_000_000, "FineTune + EWC"),
}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def write_run(folder, seed, method, accuracies, backbone="vit_small", **facts):
    """Writes a summary like that of `fit`, with invented accuracies after the last task."""
    numbers, shared, pieces = METHODS.get(method, (48, 0, "Recast"))
    tasks = [
        {"name": name, "accuracy": accuracy, "task_parameters": numbers, "patch_bytes": 1000 + seed}
        for name, accuracy in zip(TASKS, accuracies, strict=False)
    ]
    summary = {
        **{"method": pieces, "backbone": backbone, "seed": seed, "tasks": tasks, "shared_bytes": shared},
        "unlearnt": list(TASKS[len(accuracies) :]),
        "accuracy_matrix": [[None] * len(tasks), list(accuracies)][-len(tasks) :],
        **{"average_accuracy": float(np.mean(accuracies)), "average_anytime_accuracy": 50.0, "forgetting": 0.0},
        **facts,
    }
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def compared(tmp_path):
    """A comparison of four methods and two seeds, in which some runs are missing."""
    folder, generator, accuracies = tmp_path / "all runs" / "compared", np.random.default_rng(0), {}
    for method in METHODS:
        for seed in (7, 42):
            accuracies[method, seed] = generator.uniform(40, 90, 2).round(4).tolist()
            if (method, seed) not in {("ewc", 42), ("recast_melo", 42)}:
                write_run(folder / method / str(seed), seed, method, accuracies[method, seed])
    write_run(folder / "ewc" / "42", 42, "ewc", [99.0])
    plan = {"points": {name: {} for name in METHODS}, "seeds": [7, 42]}
    (folder / "plan.json").write_text(json.dumps(plan))
    return folder, accuracies


class Page(HTMLParser):
    """Tables by caption as lists of rows by heading, links, images and the text."""

    def __init__(self, path):
        super().__init__()
        self.tables, self.links, self.images, self.scripts, self.text = {}, [], [], 0, ""
        self.inside, self.rows, self.caption = None, [], ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "table":
            self.rows, self.caption = [], ""
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        self.inside = tag if tag in ("td", "th", "caption") else self.inside
        self.links += [attributes["href"]] if tag == "a" else []
        self.images += [attributes] if tag == "img" else []
        self.scripts += tag == "script"

    def handle_endtag(self, tag):
        if tag == "table":
            header, *rows = self.rows
            self.tables[self.caption] = [dict(zip(header, row, strict=True)) for row in rows]
        self.inside = None if tag == self.inside else self.inside

    def handle_data(self, data):
        self.text += data
        if self.inside in ("td", "th"):
            self.rows[-1][-1] += data
        elif self.inside == "caption":
            self.caption += data


def report(*folders, output):
    assert main(["report", "--runs", *map(str, folders), "--output", str(output)]) == 0
    return Page(output / "report.html")


def test_accuracy_over_all_classes_is_shown_of_runs_that_measured_it(tmp_path):
    for seed, routed in ((7, 40.0), (42, 50.0)):
        curves = {"oracle": [90.0, 80.0], "routed": [90.0, routed], "NCM": [60.0, 20.0 + routed]}
        write_run(tmp_path / "runs" / "with" / str(seed), seed, "with", [80.0, 80.0], class_accuracies=curves)
    write_run(tmp_path / "runs" / "without" / "7", 7, "without", [70.0, 80.0])
    page = report(tmp_path / "runs", output=tmp_path / "report")
    ((row,),) = (rows for caption, rows in page.tables.items() if "over the classes of all tasks" in caption)
    assert row == {"run": "with", "oracle": "80.00 ± 0.00", "routed": "45.00 ± 7.07", "NCM": "65.00 ± 7.07"}


def test_numbers_equal_those_of_the_linked_runs(compared, tmp_path):
    folder, accuracies = compared
    page = report(folder, output=tmp_path / "out")
    table = {
        row["run"]: row
        for row in page.tables["compared on vit_small: accuracy and size of each run (tables 1 and 2 of the paper)"]
    }
    by_task = {
        row["run"]: row
        for row in page.tables["compared on vit_small: accuracy on each task in % (table 4 of the paper)"]
    }
    assert list(table) == ["ewc", "probe", "recast", "recast_melo"]  # methods with shared weights come first
    assert [table["ewc"]["tasks"], table["recast"]["tasks"]] == ["shared", "apart"]
    for method in ("probe", "recast"):
        values = np.array([accuracies[method, seed] for seed in (7, 42)])
        means = values.mean(1)
        assert table[method]["average accuracy %"] == f"{means.mean():.2f} ± {means.std(ddof=1):.2f}"
        for task, column in zip(TASKS, values.T, strict=True):
            assert by_task[method][task] == f"{column.mean():.2f} ± {column.std(ddof=1):.2f}"
        assert table[method]["seeds"] == by_task[method]["seeds"] == "7 42"
        assert table[method]["numbers per task"] == f"{METHODS[method][0]:,}"
        assert table[method]["bytes per task"] == "1,024"  # mean of 1,007 and 1,042
    assert table["ewc"]["average accuracy %"] == f"{np.mean(accuracies['ewc', 7]):.2f}"
    targets = [(tmp_path / "out" / unquote(link)).resolve() for link in page.links]
    assert all(target.exists() for target in targets)
    assert {folder / method / "7" / "summary.json" for method in METHODS} <= set(targets)


def test_missing_runs_are_listed_and_left_out_of_tables(compared, tmp_path, capsys):
    folder, _ = compared
    (folder / "begun" / "3").mkdir(parents=True)
    (folder / "begun" / "3" / "config.yaml").write_text("model: {}")
    page = report(folder, output=tmp_path / "out")
    assert f"{folder}/ewc/42: only food trained" in page.text
    assert f"{folder}/recast_melo/42: not begun" in page.text
    assert f"{folder}/begun/3: no task is trained" in page.text
    assert "99.00" not in page.text
    assert "3 unfinished runs" in capsys.readouterr().out
    assert "begun" not in {row["run"] for rows in page.tables.values() for row in rows}


def test_the_page_is_self_contained_and_the_files_of_markdown_exist(compared, tmp_path):
    output = tmp_path / "out"
    page = report(compared[0], output=output)
    source = (output / "report.html").read_text()
    assert page.scripts == 0
    assert not re.search(r'(src|href)="(https?:)?//', source)
    assert [image["src"].partition(",")[0] for image in page.images] == ["data:image/svg+xml;base64"]
    assert page.images[0]["alt"].startswith(
        "compared: average accuracy against the count of numbers that a task trains"
    )
    text = (output / "report.md").read_text()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert pictures == ["figures/compared_parameters.png"]
    for picture in pictures:
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
        assert (output / picture.replace(".png", ".svg")).read_text().startswith("<?xml")
    links = re.findall(r"\[\d+\]\(<(.*?)>\)", text)
    assert len(links) == 2 * 6  # two tables
    assert all((output / unquote(link)).is_file() for link in links)
    (events,) = (output / "tensorboard" / "report").glob("events.*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    assert accumulator.Tags()["images"] == ["compared_parameters"]


def test_markup_in_names_is_escaped(tmp_path):
    write_run(tmp_path / "a & <b>|`x`" / "recast", 1, "recast", [50.0, 60.0])
    page = report(tmp_path / "a & <b>|`x`", output=tmp_path / "out")
    assert "a & <b>|`x`" in page.text
    assert [(tmp_path / "out" / unquote(link)).is_file() for link in page.links] == [True, True]
    assert r"a & \<b\>\|\`x\`" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    "name", ["a#b", "a?b", "a%20b", "javascript:alert(1)", "http:", "$x_{$", "_x", "ä b", "\udcff"]
)
def test_links_lead_to_folders_of_any_name(name, tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / name / "recast" / str(seed), seed, "recast", [50.0, 60.0])
    write_run(tmp_path / name / name / "1", 1, "probe", [50.0, 60.0])
    (tmp_path / name / "begun").mkdir()
    (tmp_path / name / "begun" / "config.yaml").write_text("model: {}")
    page = report(tmp_path / name, output=tmp_path / "out")
    assert len(page.links) == 7  # three runs in two tables, and the one that is not finished
    for link in page.links:
        assert urlsplit(link).scheme == ""
        address = urlsplit(urljoin(f"file://{tmp_path}/out/report.html", link))
        assert (address.query, address.fragment) == ("", "")
        assert os.path.exists(unquote_to_bytes(address.path)), link
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", (tmp_path / "out" / "report.md").read_text()):
        assert re.fullmatch(r"figures/\w+\.png", picture, re.ASCII)
        assert (tmp_path / "out" / picture).is_file()


def test_figures_of_folders_of_one_name_have_their_own_files(tmp_path):
    for place, accuracy in (("x", 50.0), ("y", 90.0)):
        for method in ("probe", "recast"):
            write_run(tmp_path / place / "same" / method / "1", 1, method, [accuracy, 60.0])
    report(tmp_path / "x", tmp_path / "y", output=tmp_path / "out")
    first, second = (tmp_path / "out" / "figures" / f"{name}_parameters.png" for name in ("same", "same_2"))
    assert first.read_bytes() != second.read_bytes()


def write_records(run, tasks):
    """Adds the records and patches that a run would have; pairs of (class, predicted class) by task."""
    folder = RunFolder(run)
    for index, (task, (names, pairs)) in enumerate(tasks.items()):
        made = origin() | {"date": "2026-01-02T03:04:05+00:00", "machine": "a machine"}
        classes = class_results(names, np.array(pairs))
        record = {"task": {"name": task, "accuracy": 50.0}, "accuracies": {task: 50.0}}
        files = folder.files(index, task)
        store(files, a_patch(task), record | {"classes": classes, "origin": made})


def test_the_report_says_when_and_where_it_and_the_runs_were_made(tmp_path):
    write_run(tmp_path / "in" / "recast" / "1", 1, "recast", [50.0, 60.0])
    write_records(tmp_path / "in" / "recast" / "1", {"food": (["a", "b"], [[0, 0]])})
    page = report(tmp_path / "in", output=tmp_path / "out")
    assert f"Written on {date.today().isoformat()}" in page.text
    assert f"recast-pl {version('recast-pl')}" in page.text
    assert platform.node() in page.text
    (row,) = page.tables["in: origin of the runs"]
    assert (row["trained"], row["machine"], row["seed"]) == ("2026-01-02 03:04", "a machine", "1")
    assert f"torch {version('torch')}" in row["versions"]


def test_results_by_class_of_compared_runs(tmp_path):
    right, wrong = [[0, 0], [0, 0], [1, 1]], [[0, 1], [0, 0], [1, 1]]
    for method, pairs, accuracy in (("probe", wrong, 50.0), ("recast", right, 80.0)):
        for seed in (1, 2):
            run = tmp_path / "in" / method / str(seed)
            write_run(run, seed, method, [accuracy, accuracy])
            write_records(run, {"food": (["<b>apple", "pear"], pairs), "signs": (["x", "y"], right)})
    page = report(tmp_path / "in", output=tmp_path / "out")
    rows = page.tables["in on vit_small: recall of each class in %, just after the training of its task"]
    assert rows[0] == {"task": "food", "class": "<b>apple", "probe": "50.00", "recast": "100.00"}
    assert len(rows) == 4
    (row,) = page.tables["in on vit_small: the most frequent confusions"]
    assert list(row.values()) == ["probe", "food", "<b>apple", "pear", "2"]  # of both seeds
    titles = [image["alt"] for image in page.images if "by class and predicted class" in image["alt"]]
    assert len(titles) == 2  # a picture for each task of the best run
    assert all("recast" in title for title in titles)


def test_a_thousand_classes_give_tables_of_bounded_size(tmp_path):
    generator = np.random.default_rng(0)
    write_run(tmp_path / "in" / "recast" / "1", 1, "recast", [50.0, 60.0])
    names = [f"class {index}" for index in range(1000)]
    write_records(tmp_path / "in" / "recast" / "1", {"food": (names, generator.integers(0, 1000, (20_000, 2)))})
    page = report(tmp_path / "in", output=tmp_path / "out")
    (caption,) = (caption for caption in page.tables if "each class" in caption)
    assert caption.endswith("the 60 lowest of 1,000 classes")
    assert len(page.tables[caption]) == 60
    assert {row["recall %"] for row in page.tables[caption]} == {"0.00"}
    assert len(page.tables["in on vit_small: the most frequent confusions"]) == 20
    assert not page.images


def test_backbones_sweeps_and_reconstructions_get_their_figures(tmp_path):
    for backbone, accuracy in (("vit_small", 60.0), ("vit_base", 70.0)):
        for method in ("probe", "recast"):
            write_run(tmp_path / "in" / backbone / method / "1", 1, method, [accuracy, 80.0], backbone)
    points = {f"groups-{g}": {"groups": g, "targets": "MLP"} for g in (6, 1)}
    plan = {"points": points, "seeds": [1], "x": "groups", "series": ["targets"]}
    for name in points:
        write_run(tmp_path / "in" / "figure7" / name / "1", 1, name, [50.0, 60.0])
    (tmp_path / "in" / "figure7" / "plan.json").write_text(json.dumps(plan))
    for index, name in enumerate(("mse", "vae")):
        run = tmp_path / "in" / "figure5" / name / "1"
        write_run(run, 1, name, [50.0, 60.0 + index])
        piece = {"class_path": "recast_pl.Recast", "init_args": {"decomposition": f"{name}.safetensors"}}
        (run / "config.yaml").write_text(json.dumps({"model": {"init_args": {"pieces": [piece]}}}))
        groups = [{"name": f"blocks.*.fc1.weight:{g}", "frobenius": 1.0 + g, "entropy": None} for g in (0, 1)]
        (run / "analysis").mkdir()
        (run / "analysis" / "analysis.json").write_text(json.dumps({"groups": groups}))
    facts = {"backbone": "vit_small", "weights": 14_155_776, "weight_cosine": 0.98765, "epochs": 1000, "seconds": 36.2}
    (tmp_path / "in" / "mimicry").mkdir()
    more = {"cpu_percent": 3.71, "gpu_gigabytes": None}
    (tmp_path / "in" / "mimicry" / "mimicry.json").write_text(json.dumps({**facts, **more}))
    older = {**facts, **more, "similarity": facts["weight_cosine"]}
    del older["weight_cosine"]
    (tmp_path / "in" / "older").mkdir()
    (tmp_path / "in" / "older" / "mimicry.json").write_text(json.dumps(older))
    (tmp_path / "in" / "imagenet").mkdir()
    compared = {"backbone": "vit_small", "images": 50_000, "dense_accuracy": 74.6, "decomposed_accuracy": 73.0}
    compared |= {"agreement": 97.5, "weight_cosine": 0.9785, "feature_similarity": 0.986}
    (tmp_path / "in" / "imagenet" / "imagenet.json").write_text(json.dumps(compared))
    page = report(tmp_path / "in", output=tmp_path / "out")
    captions = [image["alt"] for image in page.images]
    numbers = [re.search(r"\(figure (\d+\w?) of the paper\)", caption) for caption in captions]
    assert {number[1] for number in numbers if number} == {"3", "4", "5", "6", "9a"}
    assert "figure7: average accuracy by groups; larger markers train more numbers" in captions
    rows = page.tables["Cost of fitting templates (table 5 of the paper)"]
    values = ["vit_small", "14,155,776", "–", "3.7", "36.2", "1,000", "36.2", "98.77"]
    assert [list(row.values()) for row in rows] == [["mimicry", *values], ["older", *values]]
    assert list(rows[0])[-1] == "weight cosine (%)"
    (row,) = page.tables["The pretrained classifier, dense and decomposed (table 6 of the paper)"]
    assert (row["weight cosine (%)"], row["feature similarity (%)"]) == ("97.85", "98.60")


@pytest.mark.parametrize("place", ["empty", "nothing"])
def test_a_folder_without_runs_is_refused(place, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["report", "--runs", str(tmp_path / place), "--output", str(tmp_path / "out")]) == 2
    assert f"{tmp_path / place} holds no run" in capsys.readouterr().err


def test_the_report_reads_what_the_commands_write(tiny_fit, tmp_path):
    options = shlex.join(tiny_fit("--trainer.max_epochs", "1", "--trainer.logger", "false")[5:])
    words = ["compare", "--base", "vit.yaml", "--configs", "methods/recast_vit.yaml", "--seeds", "1"]
    words += ["--options", options]
    assert main([*words, "--output", str(tmp_path / "in" / "compared")]) == 0
    fit = ["fit", "--config", "mimicry_resnet34.yaml", "--run_dir", str(tmp_path / "in" / "fitted")]
    fit += ["--model.backbone.name", "torchvision/resnet18", "--model.backbone.weights", "random"]
    assert main([*fit, "--trainer.max_epochs", "2", "--model.image_size", "32", "--trainer.accelerator", "cpu"]) == 0
    page = report(tmp_path / "in", output=tmp_path / "out")
    assert "Not finished" not in page.text
    (row,) = page.tables[
        "compared on vit_tiny_patch16_224: accuracy and size of each run (tables 1 and 2 of the paper)"
    ]
    summary = json.loads((tmp_path / "in" / "compared" / "recast_vit" / "1" / "summary.json").read_text())
    assert summary["unlearnt"] == []
    assert row["average accuracy %"] == f"{summary['average_accuracy']:.2f}"
    (row,) = page.tables["Cost of fitting templates (table 5 of the paper)"]
    assert (row["run"], row["epochs"], row["peak GPU memory (GB)"]) == ("fitted", "2", "–")
    assert float(row["seconds"]) > 0
    assert float(row["cores busy (%)"]) > 0


# A browser is optional: without one, also on CI, only this test is skipped.
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_a_browser_without_a_network_shows_every_image_and_logs_nothing(compared, tmp_path):
    output = tmp_path / "out"
    page = report(compared[0], output=output)
    script = """<script>addEventListener("load", () => { document.body.dataset.widths =
      JSON.stringify([...document.images].map(image => image.naturalWidth)) })</script>"""
    source = (output / "report.html").read_text()
    (output / "probed.html").write_text(source.replace("</body>", f"{script}</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    options += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom"]
    command = [CHROMIUM, *options, "--virtual-time-budget=10000", f"file://{output}/probed.html"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600)
    widths = re.search(r'data-widths="\[(.*?)\]"', process.stdout)
    assert widths, process.stderr[-2000:]
    assert len(widths[1].split(",")) == len(page.images) > 0
    assert all(int(width) > 100 for width in widths[1].split(","))
    assert "CONSOLE" not in process.stderr
    assert "<table>" in process.stdout
