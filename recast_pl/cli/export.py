"""The command `export`: exports trained tasks as models that do not need this program."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from recast_pl.cli.options import declare_data_root, declare_trust, opened
from recast_pl.errors import ExportError, PatchError, RunError
from recast_pl.files import is_standard_output, write_atomic
from recast_pl.inference.export.bank import Bank
from recast_pl.inference.export.exported import noise
from recast_pl.inference.export.formats import FORMATS, ExportFormat, Format
from recast_pl.inference.export.measure import compare, test_images
from recast_pl.inference.export.precision import GraphPrecision, narrowed
from recast_pl.inference.export.web import page_files
from recast_pl.learning.router import Router
from recast_pl.runs.evaluation import choose_patch, restore
from recast_pl.runs.folder import RunFolder
from recast_pl.terminal import open_console


def declare(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--run_dir", type=str, required=True, help="Folder of a run.")
    parser.add_argument("--task", type=str | None, help="Name of a trained task; onnx_bank and web have all.")
    parser.add_argument("--patch", type=str | None, help="Or a patch file, as 'patch average' and 'quantize' write.")
    parser.add_argument(
        "--format",
        type=ExportFormat,
        required=True,
        help="safetensors: the weights of a plain timm or torchvision model; onnx and torch_export: a graph; "
        "onnx_bank: one graph for all tasks, and for each task a file with its inputs to the graph; web: a "
        "folder with a page that classifies images in the browser.",
    )
    parser.add_argument(
        "--output",
        type=str | None,
        help="File, or a folder for web; - for standard output (default: TASK.ENDING, bank.onnx or web in DIR/export).",
    )
    parser.add_argument(
        "--precision",
        type=GraphPrecision | None,
        help="How onnx, onnx_bank and web store the frozen weights (default: fp32; fp16 for web). Heads and what "
        "changes from task to task stay as they are.",
    )
    parser.add_argument(
        "--opset", type=int | None, help="Version of ONNX's operators for onnx, onnx_bank and web (default: PyTorch's)."
    )
    declare_data_root(parser)
    declare_trust(parser)


def run(parser: ArgumentParser, config: Namespace) -> int:
    """Writes the model, and prints how far its logits are from the run's, what it costs, and how to use it."""
    _check(config)
    run_dir, init = opened(config)
    folder, chosen = RunFolder(run_dir), FORMATS[config.format]
    trained = [*folder.load_patches().values()] if chosen.has_all else []
    patches = trained or [choose_patch(folder, config.task, config.patch)]
    restore(init.model, folder, patches[0].image_size)
    init.model.activate(patches[0])
    router = _router(folder) if chosen.has_all and init.model.isolated else None
    bank = chosen.make(init.model, patches, router, config.opset)

    path = _path(config.output, folder, f"{'bank' if chosen.has_all else patches[0].task}{chosen.ending}", chosen)
    precision: GraphPrecision = config.precision or ("fp16" if chosen.is_page else "fp32")
    graph = narrowed(bank.model.content, precision)
    files = _files(path, bank, graph)
    if chosen.is_page:
        own = {file.name: content for file, content in files.items()}
        page = page_files(own, patches[0], init.data.root / "cache")
        files |= {path.with_name(name): content for name, content in page.items()}
    for file, content in files.items():
        write_atomic(file, content)
    console = open_console(stderr=is_standard_output(path))
    written = [f"written: {file} ({len(content):,} bytes)" for file, content in files.items()]
    if chosen.is_page:
        written.append(f"all together: {sum(map(len, files.values())):,} bytes; open {path.parent} from any web server")
    compared = f"largest difference from the run's logits: {bank.model.difference:.1e}"
    console.print(*written, compared, f"use: {bank.model.usage}", sep="\n", soft_wrap=True)
    if chosen.is_graph:
        images = test_images(init.data, {patch.task: patch.classes for patch in patches})
        graphs = {"fp32": bank.model.content} | {precision: graph}
        console.print(compare(graphs, bank.tasks, images, noise(patches[0])[:1]))
    return 0


def _path(output: str | None, folder: RunFolder, name: str, chosen: Format) -> Path:
    """Where to write the model; the output of a page is its folder."""
    if chosen.is_page:
        return Path(output or folder.export / "web") / name
    return Path(output or folder.export / name)


def _router(folder: RunFolder) -> Router | None:
    """Finds the task of an image; None if a task has no signature."""
    try:
        return Router(files.load_signature() for files in folder.trained())
    except (RunError, PatchError):
        return None


def _files(path: Path, bank: Bank, model: bytes) -> dict[Path, bytes]:
    """All files to write: the model, and beside it those of the tasks and the router."""
    files = {path: model}
    files |= {path.with_suffix(f".{task}.safetensors"): content for task, content in bank.files.items()}
    # the name of a task could be "router"
    return files | ({} if bank.router is None else {path.with_name(f"{path.stem}_router.safetensors"): bank.router})


def _check(config: Namespace) -> None:
    """Raises ExportError if options do not go with the format."""
    name, chosen = config.format, FORMATS[config.format]
    if not chosen.is_graph and (config.precision not in (None, "fp32") or config.opset is not None):
        raise ExportError(f"--format {name} has no --precision and no --opset; leave them out, or choose onnx")
    if not chosen.has_all:
        return
    if config.task or config.patch:
        raise ExportError(
            f"--format {name} exports all tasks of the run; leave out --task and --patch, or choose onnx for one task"
        )
    path = Path(config.output or "bank.onnx")
    if chosen.is_page:
        if is_standard_output(path) or (path.exists() and not path.is_dir()):
            raise ExportError(f"--format {name} writes a folder, and --output {path} is not one")
    elif is_standard_output(path) or (path.exists() and not path.is_file()):
        raise ExportError(
            f"--format {name} writes a file for each task beside --output {path}, which must be the name of a file"
        )
