"""Parses every command that the pages and the benchmarks themselves give for a benchmark."""

import argparse
import re
import runpy
import shlex
import sys

import pytest
import torch
from conftest import ROOT

BENCHMARKS = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py"))
PAGES = [ROOT / "README.md", *(ROOT / "benchmarks").glob("*.*"), *(ROOT / "docs").rglob("*.md")]


def commands():
    """File and words of each command: a line of a block, or code in backticks that may go over lines."""
    found = set()
    for page in PAGES:
        if page.suffix in (".py", ".md"):
            text = re.sub(r"\\\n\s*", " ", page.read_text())
            lines = re.findall(
                r"^(?:    |[A-Z_]+=\S+ )*(?:uv run )?python benchmarks/(\w+\.py)(.*)$", text, re.MULTILINE
            )
            inline = re.findall(r"(?<!`)`(?:[A-Z_]+=\S+ )?(?:uv run )?python benchmarks/(\w+\.py)([^`]*)`", text)
            found |= {(name, " ".join(rest.split())) for name, rest in lines + inline if "`" not in rest}
    return sorted(found)


def test_every_benchmark_has_a_command():
    assert {name for name, _ in commands()} == set(BENCHMARKS)


@pytest.mark.parametrize(("name", "rest"), commands())
def test_its_options_are_known(name, rest, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def stop(*args):
        parse(*args)
        raise StopIteration  # before it works

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", [name, *shlex.split(re.sub(r"\$\([^)]*\)", "FILE", rest))])
    with pytest.raises(StopIteration):
        runpy.run_path(str(ROOT / "benchmarks" / name), run_name="__main__")
    assert torch.is_grad_enabled()  # as later tests need it
