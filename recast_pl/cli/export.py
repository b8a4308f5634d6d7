"""The command `export`: exports a trained task as a model that does not need this program."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from recast_pl.cli.options import declare_trust, opened
from recast_pl.errors import ExportError
from recast_pl.files import is_standard_output, write_atomic
from recast_pl.inference.export import FORMATS, ExportFormat, bank_inputs
from recast_pl.runs.evaluation import choose_patch, restore
from recast_pl.runs.folder import RunFolder
from recast_pl.terminal import open_console


def declare(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--run_dir", type=str, required=True, help="Folder of a run.")
    parser.add_argument("--task", type=str | None, help="Name of a trained task; not for onnx_bank, which has all.")
    parser.add_argument("--patch", type=str | None, help="Or a patch file, as 'patch average' and 'quantize' write.")
    parser.add_argument(
        "--format",
        type=ExportFormat,
        required=True,
        help="safetensors: the weights of a plain timm or torchvision model; onnx and torch_export: a graph; "
        "onnx_bank: one graph for all tasks of RECAST, and for each task a file with its inputs to the graph.",
    )
    parser.add_argument(
        "--output", type=str | None, help="File; - for standard output (default: DIR/export/TASK.ENDING, or bank.onnx)."
    )
    declare_trust(parser)


def run(parser: ArgumentParser, config: Namespace) -> int:
    """Writes the model, and prints how far its logits are from the run's and how to use it."""
    _check_bank(config)
    run_dir, init = opened(config)

    export, ending = FORMATS[config.format]
    fed = RunFolder(run_dir).load_patches() if config.format == "onnx_bank" else {}
    patch = next(iter(fed.values())) if fed else choose_patch(RunFolder(run_dir), config.task, config.patch)
    restore(init.model, RunFolder(run_dir), patch.image_size)
    init.model.activate(patch)
    exported = export(init.model, patch)
    path = Path(config.output or RunFolder(run_dir).export / f"{'bank' if fed else patch.task}{ending}")
    files = {path: exported.content}
    files |= {path.with_suffix(f".{name}.safetensors"): bank_inputs(init.model, task) for name, task in fed.items()}
    for file, content in files.items():
        write_atomic(file, content)
    written = [f"written: {file} ({len(content):,} bytes)" for file, content in files.items()]
    compared = f"largest difference from the run's logits: {exported.difference:.1e}"
    console = open_console(stderr=is_standard_output(path))
    console.print(*written, compared, f"use: {exported.usage}", sep="\n", soft_wrap=True)
    return 0


def _check_bank(config: Namespace) -> None:
    """Raises ExportError if a bank, which has all tasks in several files, cannot be exported as asked."""
    if config.format != "onnx_bank":
        return
    if config.task or config.patch:
        raise ExportError(
            "--format onnx_bank exports all tasks of the run; leave out --task and --patch, or choose onnx for one task"
        )
    path = Path(config.output or "bank.onnx")
    if is_standard_output(path) or (path.exists() and not path.is_file()):
        raise ExportError(
            f"--format onnx_bank writes a file for each task beside --output {path}, which must be the name of a file"
        )
