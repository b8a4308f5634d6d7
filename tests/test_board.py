"""The command `board`: methods on streams, with a rate chosen on validation images, as results and a page."""

import itertools
import json
import re
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, TINY_VIT
from scipy.stats import ttest_rel

from recast_pl.cli import main
from recast_pl.cli.comparing import Here
from recast_pl.cli.parser import command_parser
from recast_pl.config.elements import parse_options
from recast_pl.files import sealed_json
from recast_pl.reporting.board import results_text
from recast_pl.reporting.plots import Mark, line_styles, plot_panels
from recast_pl.runs.metrics import spread
from recast_pl.studies.engines import Processes

RATES = [2.0e-3, 3.0e-1]
METHODS = {
    "probe": "methods/probe.yaml",
    "scale": [{"class_path": "recast_pl.Scale", "init_args": {"targets": ["fc1"]}}],
    "lora": "methods/melo.yaml",
}


@pytest.fixture
def board(image_folder, tmp_path):
    """Makes the command line of `board` for two streams of small folders on a tiny ViT; `change` updates the file."""
    for name, classes in (("first", 3), ("second", 2)):
        image_folder(name, classes, seed=classes)
    backbone = {"name": "vit_tiny_patch16_224", "weights": "random", "args": TINY_VIT}
    model = {"class_path": "recast_pl.TILModule", "init_args": {"backbone": backbone}}
    quick = {"max_epochs": 1, "logger": False, "enable_progress_bar": False, "accelerator": "cpu"}

    def stream(*tasks):
        listed = [{"name": name, "path": f"${{photos}}/{name}"} for name in tasks]
        data = {"tasks": listed, "image_size": 32, "batch_size": 4}
        return {"base": ["vit.yaml"], "config": {"model": model, "data": data, "trainer": quick}}

    def words(*more, **change):
        streams = {"both": stream("first", "second"), "one": stream("second")}
        content = {"seeds": [1, 2], "rates": RATES, "methods": METHODS, "streams": streams}
        content |= {"variables": {"photos": "nowhere"}} | change
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        folders = ["--output", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
        return ["board", "--config", str(tmp_path / "mine.yaml"), *folders, "--variables", f"photos={tmp_path}", *more]

    return words


def read(path):
    return json.loads(path.read_text())


def numbers(results):
    """Accuracies and sizes of each run, without the time."""
    return {s: {t: {**v, "seconds": 0} for t, v in run.items()} for s, run in results["runs"].items()}


def test_the_rate_is_chosen_on_validation_and_results_agree_with_the_runs(board, tmp_path, capsys):
    small = ["--options", "--patch_precision int4"]
    words = board("--streams", "both", "--methods", "probe", "scale", "--seeds", "1", *small)
    assert main(words) == 0
    out, runs = tmp_path / "out" / "both", tmp_path / "runs" / "both"
    assert sorted(path.name for path in out.iterdir()) == ["probe.json", "scale.json"]
    assert sorted(path.name for path in (runs / "scale").glob("*/[0-9]")) == ["1", "1"]
    means = {}
    for rate in RATES:
        tasks = read(runs / "scale" / f"rate-{rate:g}" / "1" / "summary.json")["tasks"]
        accuracy, loss = (np.mean([task[f"validation_{key}"] for task in tasks]) for key in ("accuracy", "loss"))
        means[rate] = (-accuracy, loss)
        config = yaml.safe_load((runs / "scale" / f"rate-{rate:g}" / "1" / "config.yaml").read_text())["model"]
        assert config["init_args"]["pieces"][0]["init_args"]["learning_rate"] == rate
        assert config["init_args"]["optimizer"]["init_args"]["lr"] == 2e-3  # the head's
    best, found = min(means, key=means.get), read(out / "scale.json")
    assert found["rate"] == best
    wanted = {str(rate): {"validation_accuracy": -a, "validation_loss": b} for rate, (a, b) in means.items()}
    assert found["rates"] == {rate: pytest.approx(values, abs=1e-4) for rate, values in wanted.items()}
    for seed, run in found["runs"].items():
        summary = read(runs / "scale" / f"rate-{best:g}" / seed / "summary.json")
        for task in summary["tasks"]:
            assert run[task["name"]] == pytest.approx({key: task[key] for key in run[task["name"]]}, abs=1e-4)
            patch = next((runs / "scale" / f"rate-{best:g}" / seed / "patches").glob(f"*_{task['name']}.recast"))
            assert run[task["name"]]["patch_bytes"] == patch.stat().st_size
    probe = read(out / "probe.json")
    assert (probe["rate"], probe["rates"]) == (None, {})
    assert all(task["task_parameters"] == 0 for run in probe["runs"].values() for task in run.values())
    (made,) = found["measured"]
    assert made["seeds"] == [1]
    _, m, package, *recorded = shlex.split(made["command"])
    assert (m, package, recorded[0]) == ("-m", "recast_pl", "board")
    parser = command_parser("board")
    assert parser.parse_args(recorded[1:]) == parser.parse_args(words[1:])
    assert set(made["versions"]) == {"recast-pl", "torch"}
    text = (out / "scale.json").read_text()
    assert len([line for line in text.splitlines() if "test_images" in line]) == 1  # one line for each run
    assert "against the probe" in (tmp_path / "out" / "board.md").read_text()
    assert "against the probe" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("first", "second", "chosen"),
    [
        ([(80, 0.9), (80, 0.9)], [(70, 0.1), (70, 0.1)], 0),  # accuracy comes before loss
        ([(80, 0.9), (60, 0.5)], [(70, 0.1), (70, 0.1)], 1),  # equal means of accuracy: the mean of losses
        ([(90, 0.2), (50, 0.2)], [(71, 0.9), (71, 0.9)], 1),  # all tasks count, not the best one
        ([(80, 0.5), (60, 0.5)], [(60, 0.5), (80, 0.5)], 0),  # nothing differs: the first rate
    ],
)
def test_the_best_rate_has_the_highest_mean_accuracy_then_the_lowest_mean_loss(first, second, chosen, board, tmp_path):
    """The runs are finished already, with given validation results, and test results that say the opposite."""
    for rate, results in zip(RATES, (first, second), strict=True):
        for seed in (1, 2):
            tasks = [
                {"name": name, "validation_accuracy": accuracy if seed == 1 else 50, "validation_loss": loss}
                | {"accuracy": 100 - accuracy, "probe_accuracy": 10.0, "seconds": 1.0, "task_parameters": 12}
                | {"patch_bytes": 267, "train_images": 18, "test_images": 3}
                for name, (accuracy, loss) in zip(("first", "second"), results, strict=True)
            ]
            accuracies = [task["accuracy"] for task in tasks]
            measures = dict.fromkeys(("average_accuracy", "average_anytime_accuracy", "forgetting"), 0.0)
            summary = {"method": "Scale", "backbone": "vit", "seed": seed, "tasks": tasks, "unlearnt": [], **measures}
            path = tmp_path / "runs" / "both" / "scale" / f"rate-{rate:g}" / str(seed) / "summary.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps({**summary, "accuracy_matrix": [[accuracies[0], None], accuracies]}))
            made = {"date": f"2026-01-0{seed}", "versions": {"torch": "2.11.0"}, "machine": f"machine {seed}"}
            record = sealed_json({"task": {"name": "first"}, "origin": made})
            for file, content in (("patches/00_first.recast", ""), ("tasks/00_first.json", record)):
                (path.parent / file).parent.mkdir()
                (path.parent / file).write_text(content)
    assert main(board("--streams", "both", "--methods", "scale")) == 0
    found = read(tmp_path / "out" / "both" / "scale.json")
    assert found["rate"] == RATES[chosen]
    assert list(found["runs"]) == ["1", "2"]
    made = [(each["date"], each["machine"], each["seeds"]) for each in found["measured"]]  # where the runs were trained
    assert made == [("2026-01-01", "machine 1", [1]), ("2026-01-02", "machine 2", [2])]


def test_the_runs_of_all_methods_are_one_batch_for_the_engine(board, tmp_path, monkeypatch):
    """First every rate of every method, then the remaining seeds; so that many workers have something to do."""
    batches = []

    def run(self, commands):
        batches.append([Path(words[words.index("--run_dir") + 1]) for words in commands])
        yield from (Here().run(commands))

    monkeypatch.setattr(Processes, "run", run)
    own = {"lora": {"config": "methods/melo.yaml", "rates": [5.0e-3]}}
    words = board("--streams", "one", "--engine", "Processes", methods=METHODS | own)
    assert main(words) == 0
    names = [[path.relative_to(tmp_path / "runs" / "one").as_posix() for path in batch] for batch in batches]
    rate = read(tmp_path / "out" / "one" / "scale.json")["rate"]
    search = [f"scale/rate-{rate:g}/1" for rate in RATES]
    alone = ["lora/rate-0.005/1", "lora/rate-0.005/2"]  # a single rate needs no choice
    assert names == [["probe/fixed/1", "probe/fixed/2", *search, *alone], [f"scale/rate-{rate:g}/2"]]
    assert read(tmp_path / "out" / "one" / "lora.json")["rate"] == 5.0e-3
    assert len(read(tmp_path / "out" / "one" / "probe.json")["runs"]) == 2


@pytest.mark.slow
def test_an_interrupted_board_continues_to_the_same_numbers_and_new_seeds_extend_it(board, tmp_path, capsys):
    chosen = ["--streams", "one", "--methods", "scale"]
    whole = board(*chosen, "--output", str(tmp_path / "whole"))
    assert main([*whole, "--runs", str(tmp_path / "other")]) == 0
    arguments = {"number": int(signal.SIGTERM), "task": "second", "epoch": 0, "marker": str(tmp_path / "signalled")}
    callbacks = [{"class_path": "crash_callbacks.SignalOnce", "init_args": arguments}]
    stopping = ["--seeds", "1", "--options", shlex.join(["--trainer.callbacks", json.dumps(callbacks)])]
    capsys.readouterr()
    assert main(board(*chosen, *stopping)) == 128 + signal.SIGTERM
    assert "run the same command again to continue" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(board(*chosen, *stopping)) == 0  # the callback stops a run only once
    path = tmp_path / "out" / "one" / "scale.json"
    before = path.read_bytes()
    capsys.readouterr()
    assert main(board(*chosen, *stopping)) == 0
    assert "task 1 of 1" not in capsys.readouterr().out
    assert path.read_bytes() == before
    assert main(board(*chosen, "--seeds", "2", "1")) == 0
    assert capsys.readouterr().out.count("task 1 of 1") == 1  # seed 2, at the rate that is known
    found, expected = read(path), read(tmp_path / "whole" / "one" / "scale.json")
    assert numbers(found) == numbers(expected)
    assert list(found["runs"]) == ["1", "2"]
    assert [found[key] for key in ("rate", "rates")] == [expected[key] for key in ("rate", "rates")]
    assert [made["seeds"] for made in found["measured"]] == [[1], [2]]
    for change in ({"rates": [1.0e-3]}, {"methods": METHODS | {"scale": METHODS["lora"]}}):
        assert main(board(*chosen, "--seeds", "3", **change)) == 2
        assert "scale.json was measured with other settings; move it away" in capsys.readouterr().err
    path.write_text(results_text({k: v for k, v in found.items() if k != "settings"}))  # as earlier versions wrote it
    assert main(board(*chosen, "--seeds", "3", rates=[1.0e-3])) == 2
    assert "which is not among the rates" in capsys.readouterr().err


def write_results(folder, stream, method, accuracies, **sizes):
    """Writes the results of a method: accuracies (seeds, tasks)."""
    task = {"probe_accuracy": 0.0, "seconds": 2.0, "train_images": 30, "test_images": 10, **sizes}
    runs = {
        str(seed): {f"task{i}": {**task, "accuracy": accuracy} for i, accuracy in enumerate(row)}
        for seed, row in enumerate(accuracies)
    }
    made = {"command": "", "date": "", "machine": "a machine", "seeds": list(range(len(runs))), "versions": {}}
    content = {"stream": stream, "method": method, "rate": 2e-3, "rates": {}, "runs": runs, "measured": [made]}
    (folder / stream).mkdir(parents=True, exist_ok=True)
    (folder / stream / f"{method}.json").write_text(results_text(content))


def section(page, title):
    """The rows of the table in a section of a page, by their first cell."""
    part = page.partition(f"## {title}\n")[2].partition("\n## ")[0]
    lines = [re.split(r"\s*\|\s*", line.replace("\\", ""))[1:-1] for line in part.splitlines() if line[:1] == "|"]
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}


def test_the_page_is_made_from_results_alone_with_the_intervals_of_scipy(tmp_path):
    generator = np.random.default_rng(0)
    shifts = {"probe": 0, "lora": 6, "few": 4, "noise": 0, "harm": -5}
    scores = {}
    for stream in ("first", "second"):
        difficulty = 60 + 10 * generator.standard_normal((5, 1))  # of a seed's split, which pairing removes
        for method, shift in shifts.items():
            scores[stream, method] = (difficulty + shift + generator.standard_normal((5, 3))).round(4)
            sizes = {"task_parameters": 48, "patch_bytes": 1000 + 100 * abs(shift)}
            write_results(tmp_path, stream, method, scores[stream, method], **sizes)
    write_results(tmp_path, "second", "alone", scores["second", "few"][:1], task_parameters=1, patch_bytes=10)
    assert main(["board", "--output", str(tmp_path)]) == 0
    page = (tmp_path / "board.md").read_text()
    verdicts = set()
    for stream in ("first", "second"):
        rows = section(page, stream)
        assert [row["bytes of a whole task"] for row in rows.values()][-1] == "1,600"
        for method in shifts:
            ours = scores[stream, method].mean(1)
            assert rows[method]["accuracy %"] == f"{ours.mean():.2f} ± {ours.std(ddof=1):.2f}"
            for baseline, column in (("probe", "against the probe"), ("lora", "against LoRA r 1")):
                if method == baseline:
                    assert rows[method][column] == "–"
                    continue
                theirs = scores[stream, baseline].mean(1)
                low, high = ttest_rel(ours, theirs).confidence_interval(0.95)
                verdict = "better" if low > 0 else "worse" if high < 0 else "not distinguishable"
                verdicts.add(verdict)
                mean = (ours - theirs).mean()
                assert rows[method][column] == f"{mean:+.2f} [{low:+.2f}, {high:+.2f}] {verdict}"
    assert verdicts == {"better", "worse", "not distinguishable"}
    assert section(page, "second")["alone"]["against the probe"].endswith(" one seed")
    gains = {
        method: np.mean(
            [scores[stream, method].mean() - scores[stream, "probe"].mean() for stream in ("first", "second")]
        )
        for method in ("few", "lora")
    }
    summary = section(page, "All streams")
    assert summary["few"]["share of LoRA's gain"] == f"{100 * gains['few'] / gains['lora']:.0f} %"
    assert (summary["lora"]["share of LoRA's gain"], summary["lora"]["streams shared"]) == ("100 %", "2")
    assert (summary["alone"]["first"], summary["alone"]["streams shared"]) == ("–", "1")
    few, probe = (
        np.mean([scores[stream, name].mean(1) for stream in ("first", "second")], 0) for name in ("few", "probe")
    )
    low, high = ttest_rel(few, probe).confidence_interval(0.95)
    assert summary["few"]["mean of all streams"] == f"{(few - probe).mean():+.2f} [{low:+.2f}, {high:+.2f}] better"
    assert summary["alone"]["mean of all streams"] == "–"
    axis = "bytes of a whole task, head included"
    svg = (tmp_path / "figures" / "board_accuracy.svg").read_text()
    assert all(f"<!-- {text} -->" in svg for text in ("first", "second", *shifts, axis))
    mean = (tmp_path / "figures" / "board_mean.svg").read_text()
    assert [f"<!-- {text} -->" in mean for text in (*shifts, axis, "alone")] == [True] * 6 + [False]
    before = page, svg
    assert main(["board", "--output", str(tmp_path)]) == 0
    after = (tmp_path / "board.md").read_text(), (tmp_path / "figures" / "board_accuracy.svg").read_text()
    assert after == before


def test_panels_have_one_legend_and_a_logarithmic_axis():
    panels = {name: [Mark(method, 10.0**i, spread([50, 60])) for i, method in enumerate("ab")] for name in "1234"}
    figure = plot_panels(panels, "bytes")
    assert [axes.axison for axes in figure.axes] == [True] * 4 + [False] * 2
    assert {axes.get_xscale() for axes in figure.axes[:4]} == {"log"}
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    (narrow,) = plot_panels({"1": [Mark("a", 4600, spread([50, 60])), Mark("b", 4700, spread([50, 60]))]}, "bytes").axes
    low, high = narrow.get_xlim()
    assert high / low == pytest.approx(10)
    assert low < 4600
    assert high > 4700
    sizes = {f"m{i}": 10 ** (3 + i / 4) for i in range(17)}  # from 1 kB to 10 MB
    figure = plot_panels({title: [Mark(name, x, spread([50, 60])) for name, x in sizes.items()] for title in "123"}, "")
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels() if label.get_text()]
    assert len(boxes) >= 4
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_lines_of_a_figure_look_different():
    styles = [(colour, marker) for colour, marker, _ in itertools.islice(line_styles(), 72)]
    assert len(set(styles)) == 72


@pytest.mark.parametrize(
    ("more", "change", "named"),
    [
        (["--streams", "three"], {}, "no stream 'three'; choose from both, one"),
        (["--methods", "magic"], {}, "no method 'magic'; choose from probe, scale, lora"),
        (["--variables", "photos=nowhere"], {}, "nowhere/first"),
        (["--variables", "emoji=here"], {}, "no variable 'emoji'"),
        (["--variables", "photos"], {}, "write NAME=VALUE"),
        ([], {"methods": {"mine": "methods/mine.yaml"}}, "methods/mine.yaml"),
        ([], {"methods": {"a/b": "methods/probe.yaml"}}, "'a/b' cannot name a file"),
        ([], {"methods": {"a": 1}}, "method 'a' is 1"),
        ([], {"methods": {"a": {"config": "methods/melo.yaml", "rates": ["fast"]}}}, "method 'a': rate 'fast'"),
        ([], {"methods": {"a": {"config": "methods/melo.yaml", "rate": [1]}}}, "method 'a' has no entry 'rate'"),
        (["--streams", "both"], {"methods": {"ewc": "methods/ewc.yaml"}}, "tasks share what FineTune trains"),
        ([], {"rates": ["fast"]}, "rate 'fast'"),
        ([], {"rates": []}, "no rates"),
        ([], {"seeds": ["one"]}, "'one' is not an integer"),
        ([], {"streams": {"one": {"bases": []}}}, "'bases'"),
        ([], {"streams": {"one": 1}}, "stream 'one' is 1"),
        (["--options", "--resume true"], {}, "--resume"),
    ],
)
def test_errors_are_one_line_before_any_training(more, change, named, board, tmp_path, capsys):
    assert main(board(*more, **change)) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert named in error
    assert not list(tmp_path.glob("runs/**/summary.json"))


def test_results_that_cannot_be_compared_are_refused(tmp_path, capsys):
    assert main(["board", "--output", str(tmp_path)]) == 2
    assert "has no results" in capsys.readouterr().err
    for images in (10, 11):
        write_results(tmp_path, "one", f"m{images}", [[50.0]], task_parameters=1, patch_bytes=9, test_images=images)
    assert main(["board", "--output", str(tmp_path)]) == 2
    assert "other test images than m10" in capsys.readouterr().err
    (tmp_path / "one" / "m11.json").write_text("{")
    assert main(["board", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


BOARDS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "configs" / "board").glob("*.yaml")}


@pytest.mark.parametrize(
    ("board_name", "stream"), [(name, stream) for name, entry in BOARDS.items() for stream in entry.get("streams", ())]
)
def test_every_shipped_stream_is_accepted_with_every_method(board_name, stream, shared, tmp_path, monkeypatch):
    """All command lines are parsed and all images are found; nothing is trained."""
    planned = []
    monkeypatch.setattr("recast_pl.cli.board.run_studies", lambda boards, _: planned.extend(boards[0].trials) or 1)
    emoji = f"emoji={shared / 'data' / 'emoji'}"
    words = [
        "--config",
        f"board/{board_name}.yaml",
        "--streams",
        stream,
        stream,
        "--variables",
        emoji,
        "--engine",
        "Processes",
    ]
    words += ["--output", str(tmp_path / "out"), "--runs", str(tmp_path / "runs"), "--data_root", str(tmp_path)]
    assert main(["board", *words]) == 1
    assert all(list(trial.options[:2]) == ["--data.root", str(tmp_path)] for trial in planned)
    parser, recorded = command_parser("board"), shlex.split(planned[0].command)
    assert parser.parse_args(recorded[4:]) == parse_options(parser, words)  # which finds the config
    methods = BOARDS[board_name]["methods"] | BOARDS[board_name]["streams"][stream].get("methods", {})
    assert len(planned) == len(methods)
    own = {name: len(method["rates"]) for name, method in methods.items() if isinstance(method, dict)}
    assert {trial.method: len(trial.points) for trial in planned} == {
        name: 1 if name.startswith("probe") else own.get(name, len(BOARDS[board_name]["rates"])) for name in methods
    }


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["emoji", "emoji_lite0"])
def test_every_method_of_the_shipped_board_fits_the_network_of_its_stream(stream, shared, tmp_path, monkeypatch):
    planned = []
    monkeypatch.setattr("recast_pl.cli.board.run_studies", lambda boards, _: planned.extend(boards[0].trials) or 1)
    words = ["--variables", f"emoji={shared / 'data' / 'emoji'}", "weights=random", "--streams", stream]
    words += ["--output", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
    assert main(["board", "--config", "board/small.yaml", *words]) == 1
    fit, numbers = command_parser("fit"), {}
    for trial in planned:
        parts = fit.instantiate(parse_options(fit, trial.points[0].words))
        parts.model.build(parts.data.image_size)
        parts.model.begin_task("birds", ["owl", "wren"])
        numbers[trial.method] = sum(p.numel() for p in parts.model.current()[0].parameters() if p.requires_grad)
    assert numbers.pop("probe") == 0
    assert min(numbers.values()) > 0
    assert numbers["chosen"] == 48
