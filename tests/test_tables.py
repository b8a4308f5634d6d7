"""Tables on the terminal: no column is lost, however narrow it is, and names are not read as markup."""

import io
import re
import shlex
from pathlib import Path

import pytest
import torch
from rich.console import Console

from recast_pl import TaskPatch
from recast_pl.cli import main
from recast_pl.data.catalogue import CATALOGUE
from recast_pl.reporting.measures import MEASURES
from recast_pl.reporting.tables import catalogue_table, evaluation_table, patch_tables, stream_table, terminal_table

COLUMNS = ["method", "seeds", *(f"measure {index} of a run" for index in range(9))]
NAMES = ["finetune_each", "recast_melo[x]", "a very long name of a method that somebody likes"]
ROWS = [
    [name, "3", *(f"{column}{row}.{column}5 ± 0.{column}2" for column in range(9))] for row, name in enumerate(NAMES)
]


def shown(renderable, width, terminal=True):
    """What is printed."""
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    console.print(renderable, crop=False)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 120, 300])
def test_every_column_is_shown_on_a_terminal_of_any_width(width):
    text = shown(terminal_table((COLUMNS, ROWS), title="comparison"), width)
    assert max(map(len, text.splitlines())) <= width
    assert text.count("comparison") == 1
    assert all(cell in text for row in ROWS for cell in row[1:])
    assert all(text.count("measure") % 9 == 0 and word in text for column in COLUMNS for word in column.split())
    assert "…" not in text
    assert ("".join(text.split()).count("finetune_each") > 1) == (width < 200)  # each part names its rows


def test_a_file_gets_one_table_as_wide_as_its_content():
    lines = shown(terminal_table((COLUMNS, ROWS)), 80, terminal=False).splitlines()
    (header,) = (line for line in lines if "method" in line and "seeds" in line)
    assert header.split("  ")[0].strip() == "method"
    assert all(column in header for column in COLUMNS)
    for row in ROWS:
        (line,) = (line for line in lines if row[0] in line)
        assert all(cell in line for cell in row)


@pytest.mark.parametrize("width", [40, 80])
def test_the_other_tables_fold_too(width, tmp_path):
    tasks = [
        {"name": name, "classes": 3, "train_images": 12345, "probe_accuracy": 99.0, "accuracy": 98.0, "seconds": 12.0}
        | {"task_parameters": 21_000_000, "patch_bytes": 84_000_000}
        for name in ("[red]", NAMES[2])
    ]
    summary = {"method": "Recast", "backbone": "vit", "seed": 1, "tasks": tasks, "forgetting": 8.0}
    summary |= {"accuracy_matrix": [[98.0, None], [90.0, 97.0]], "backward_transfer": -8.0, "shared_bytes": 0}
    summary |= {"average_accuracy": 93.5, "wall_seconds": 3.0}
    text = shown(stream_table(summary), width)
    for part in ("[red]", "21,000,000", "84,000,000", "12345", "93.50", "seconds", "numbers", "at the", "99.00"):
        assert part in text, part
    last = "".join(shown(stream_table(summary, most=1), width).split())
    assert all(part in last for part in ("97.00", "93.50", "thelast1of2tasks;listshowsall"))
    assert "[red]" not in last
    text = shown(evaluation_table([("[red]", 50.0, 50.0), (NAMES[2], 50.0, 49.0)]), width)
    assert all(part in text for part in ("[red]", "50.0000", "49.0000", "equal", "DIFFERENT"))
    text = shown(catalogue_table(CATALOGUE, Path("data")), width)
    assert all(name in text and data_set.title.split()[0] in text for name, data_set in CATALOGUE.items())
    assert all(f"{sum(data_set.images.values()):,}" in text for data_set in CATALOGUE.values())
    head = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
    patch = TaskPatch("t", ["[red]", "[/]"], head, [], [], 32, [0.5] * 3, [0.5] * 3, "0" * 64)
    patch.save(tmp_path / "t.safetensors")
    text = "".join(shown(table, width) for table in patch_tables(patch, tmp_path / "t.safetensors"))
    assert all(part in text for part in ("[red], [/]", "head/0/weight", "float32", "24"))


def test_compare_shows_every_measure_on_a_narrow_terminal(tiny_fit, tmp_path, monkeypatch, capsys):
    options = shlex.join(tiny_fit("--trainer.max_epochs", "1", "--trainer.logger", "false")[5:])
    words = ["compare", "--base", "vit.yaml", "--configs", "methods/probe.yaml", "--seeds", "1", "--options", options]
    words += ["--output", str(tmp_path / "compared")]
    assert main(words) == 0
    (header,) = (line for line in capsys.readouterr().out.splitlines() if "method" in line and "seeds" in line)
    measures = [name for name in MEASURES if name not in ("routed accuracy %", "joint accuracy %")]  # recorded by none
    assert all(measure in header for measure in measures)  # in a pipe
    assert "routed" not in header
    assert "joint" not in header
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "50")
    assert main(words) == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    table = text[: text.index("table: ")]
    assert max(map(len, table.splitlines())) <= 50
    assert table.count("probe") == 2  # two parts
    heads = " ".join(table.split())
    assert all(word in heads for measure in measures for word in measure.split())
