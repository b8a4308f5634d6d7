"""The report: its numbers compared with the runs, missing runs, and the page in a browser."""

import json
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recast_pl.cli import main

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


def test_numbers_equal_those_of_the_linked_runs(compared, tmp_path):
    folder, accuracies = compared
    page = report(folder, output=tmp_path / "out")
    table = {row["run"]: row for row in page.tables["Tables 1 and 2: accuracy on vit_small"]}
    by_task = {row["run"]: row for row in page.tables["Table 4: accuracy on each task % on vit_small"]}
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
    targets = [(tmp_path / "out" / link).resolve() for link in page.links]
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
    assert page.images[0]["alt"].startswith("Figure 4")
    text = (output / "report.md").read_text()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert pictures == ["figures/compared_parameters.png"]
    for picture in pictures:
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
        assert (output / picture.replace(".png", ".svg")).read_text().startswith("<?xml")
    links = re.findall(r"\[\d+\]\(<(.*?)>\)", text)
    assert len(links) == 2 * 6  # two tables
    assert all((output / link).is_file() for link in links)
    (events,) = (output / "tensorboard" / "report").glob("events.*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    assert accumulator.Tags()["images"] == ["compared_parameters"]


def test_markup_in_names_is_escaped(tmp_path):
    write_run(tmp_path / "a & <b>|`x`" / "recast", 1, "recast", [50.0, 60.0])
    page = report(tmp_path / "a & <b>|`x`", output=tmp_path / "out")
    assert "a & <b>|`x`" in page.text
    assert [(tmp_path / "out" / link).is_file() for link in page.links] == [True, True]
    assert r"a & \<b\>\|\`x\`" in (tmp_path / "out" / "report.md").read_text()


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
    facts = {"backbone": "vit_small", "weights": 14_155_776, "similarity": 0.98765, "epochs": 1000, "seconds": 36.2}
    (tmp_path / "in" / "mimicry").mkdir()
    more = {"cpu_percent": 3.71, "gpu_gigabytes": None}
    (tmp_path / "in" / "mimicry" / "mimicry.json").write_text(json.dumps({**facts, **more}))
    page = report(tmp_path / "in", output=tmp_path / "out")
    captions = [image["alt"] for image in page.images]
    numbers = [re.match(r"Figure (\d+\w?)", caption) for caption in captions]
    assert {number[1] for number in numbers if number} == {"3", "4", "5", "6", "9a"}
    assert "Accuracy by groups; larger markers train more numbers" in captions
    (row,) = page.tables["Table 5: cost of fitting templates"]
    assert list(row.values()) == ["mimicry", "vit_small", "14,155,776", "–", "3.7", "36.2", "1,000", "36.2", "98.77"]


@pytest.mark.parametrize("place", ["empty", "nothing"])
def test_a_folder_without_runs_is_refused(place, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["report", "--runs", str(tmp_path / place), "--output", str(tmp_path / "out")]) == 2
    assert f"{tmp_path / place} holds no run" in capsys.readouterr().err


def test_the_report_reads_what_the_commands_write(tiny_fit, tmp_path):
    options = shlex.join(tiny_fit("--trainer.max_epochs", "1", "--trainer.logger", "false")[5:])
    words = ["compare", "--base", "vit.yaml", "--configs", "methods/recast.yaml", "--seeds", "1", "--options", options]
    assert main([*words, "--output", str(tmp_path / "in" / "compared")]) == 0
    fit = ["fit", "--config", "mimicry_resnet34.yaml", "--run_dir", str(tmp_path / "in" / "fitted")]
    fit += ["--model.backbone.name", "torchvision/resnet18", "--model.backbone.weights", "random"]
    assert main([*fit, "--trainer.max_epochs", "2", "--model.image_size", "32", "--trainer.accelerator", "cpu"]) == 0
    page = report(tmp_path / "in", output=tmp_path / "out")
    assert "Not finished" not in page.text
    (row,) = page.tables["Tables 1 and 2: accuracy on vit_tiny_patch16_224"]
    summary = json.loads((tmp_path / "in" / "compared" / "recast" / "1" / "summary.json").read_text())
    assert summary["unlearnt"] == []
    assert row["average accuracy %"] == f"{summary['average_accuracy']:.2f}"
    (row,) = page.tables["Table 5: cost of fitting templates"]
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
