"""`export`: hands a learnt task out as a model that needs nothing of this program."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from recast_pl.config.run_config import open_run
from recast_pl.errors import ExportError
from recast_pl.files import write_atomic
from recast_pl.inference.export import FORMATS, ExportFormat, bank_inputs
from recast_pl.runs.evaluation import choose_patch, open_task
from recast_pl.runs.folder import load_patches


def declare(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--run_dir", type=str, required=True, help="Folder of a run.")
    parser.add_argument("--task", type=str | None, help="Name of a learnt task; onnx_bank is of all.")
    parser.add_argument("--patch", type=str | None, help="Or a file of one, as 'patch average' or 'quantize' write it.")
    parser.add_argument(
        "--format",
        type=ExportFormat,
        required=True,
        help="safetensors: the weights of a plain model of timm or torchvision; onnx and torch_export: a graph; "
        "onnx_bank: a graph for all tasks of RECAST, and beside it for each task a file of what the graph is fed.",
    )
    parser.add_argument("--output", type=str | None, help="File (default: DIR/export/TASK.ENDING, or bank.onnx).")


def run(config: Namespace) -> int:
    """Writes the model, and says how far its logits are from the run's, and how to use it."""
    if config.format == "onnx_bank" and (config.task or config.patch):
        raise ExportError(
            "--format onnx_bank exports all tasks of the run; leave out --task and --patch, or choose onnx for one task"
        )
    run_dir, init = open_run(config.run_dir)
    export, ending = FORMATS[config.format]
    fed = load_patches(run_dir) if config.format == "onnx_bank" else {}
    patch = next(iter(fed.values())) if fed else choose_patch(run_dir, config.task, config.patch)
    open_task(init.model, run_dir, patch)
    exported = export(init.model, patch)
    path = Path(config.output or run_dir / "export" / f"{'bank' if fed else patch.task}{ending}")
    files = {path: exported.content}
    files |= {path.with_suffix(f".{name}.safetensors"): bank_inputs(init.model, task) for name, task in fed.items()}
    for file, content in files.items():
        write_atomic(file, content)
    written = [f"written: {file} ({len(content):,} bytes)" for file, content in files.items()]
    compared = f"largest difference of logits from the run's: {exported.difference:.1e}"
    Console().print(
        *written, compared, f"use: {exported.usage}", sep="\n", soft_wrap=True, highlight=False, markup=False
    )
    return 0
