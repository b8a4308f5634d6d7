"""The actions `patch merge`, `patch split` and `patch arithmetic`."""

from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from recast_pl.cli.options import declare_data_root, declare_device, declare_trust, opened
from recast_pl.config.run import STRICT
from recast_pl.errors import PatchError
from recast_pl.files import is_standard_output, write_atomic
from recast_pl.learning.merged_tasks import MergedTasks
from recast_pl.learning.merging import MERGERS
from recast_pl.learning.patch import TaskPatch
from recast_pl.learning.trainer import TrainerFactory
from recast_pl.reporting.tables import merge_table
from recast_pl.runs.evaluation import restore
from recast_pl.runs.folder import RunFolder
from recast_pl.runs.patch_arithmetic import add_robustness
from recast_pl.runs.patch_merging import check_mergeable, merge_patches, start_states
from recast_pl.terminal import open_console


def declare_merge(actions: Any) -> None:
    """Adds `patch merge`."""
    text = "Merge patches of several tasks into one file, whose tasks share their numbers and keep their heads."
    action = ArgumentParser(description=text, **STRICT)
    method = (
        "arithmetic: add the changes; ties: add where signs agree; tall: add, with a mask for each task; consensus: "
        "add where two tasks agree; adamerging: a factor for each layer and task."
    )
    action.add_argument("--method", type=Literal[tuple(MERGERS)], required=True, help=method)
    action.add_argument("files", type=str, nargs="+", help="Patch files, one of each task.")
    run_dir = "Folder of the run of the patches; its validation images choose, its test images measure."
    action.add_argument("--run_dir", type=str, required=True, help=run_dir)
    action.add_argument("--output", type=str, required=True, help="File to write; - for standard output.")
    scale = (
        "Factor of the changes (default: 1 with ties, 0.3 at the start of adamerging, else the best of 0.05, 0.1, … 1 "
        "on validation images); not with tall."
    )
    action.add_argument("--scale", type=float | None, help=scale)
    keep = "With ties: share of the numbers of each change to keep, the largest (default: 0.2)."
    action.add_argument("--keep", type=float | None, help=keep)
    action.add_argument("--steps", type=int | None, help="With adamerging: steps of its optimizer (default: 500).")
    declare_data_root(action)
    declare_device(action)
    declare_trust(action)
    actions.add_subcommand("merge", action, help=text)


def declare_split(actions: Any) -> None:
    """Adds `patch split`."""
    text = "Write a patch for each task of a merged file, which all commands take."
    action = ArgumentParser(description=text, **STRICT)
    action.add_argument("file", type=str, help="A file that 'patch merge' wrote.")
    action.add_argument("--run_dir", type=str, required=True, help="Folder of the run of the patches.")
    action.add_argument(
        "--output", type=str, required=True, help="Folder to write the patches to, as TASK.safetensors."
    )
    declare_trust(action)
    actions.add_subcommand("split", action, help=text)


def declare_arithmetic(actions: Any) -> None:
    """Adds `patch arithmetic`."""
    text = "Add what made one task robust to patches of other tasks (robust weight signatures)."
    action = ArgumentParser(description=text, **STRICT)
    action.add_argument("files", type=str, nargs="+", help="Patch files of the tasks to change.")
    robust = "Patch of a task that was trained on degraded images, by the same method from the same base."
    action.add_argument("--robust", type=str, required=True, help=robust)
    clean = "Patch of the same task, trained on the images as they are."
    action.add_argument("--clean", type=str, required=True, help=clean)
    action.add_argument("--run_dir", type=str, required=True, help="Folder of the run of the patches to change.")
    output = "Folder to write the patches to, as TASK.safetensors."
    action.add_argument("--output", type=str, required=True, help=output)
    layers = "How many of the weights that a task changes get something added, from the first of the network."
    action.add_argument("--layers", type=int, default=7, help=layers)
    scale = "Factor of what is added; 0 leaves tasks as they are."
    action.add_argument("--scale", type=float, default=1.0, help=scale)
    declare_data_root(action)
    declare_device(action)
    declare_trust(action)
    actions.add_subcommand("arithmetic", action, help=text)


def merge(options: Namespace) -> None:
    """Merges patches, measures them, and writes the file."""
    kind = MERGERS[options.method]
    given = {name: options[name] for name in ("scale", "keep", "steps") if options[name] is not None}
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if others := given.keys() - known:
        name = min(others)
        raise PatchError(f"--{name} {given[name]} has no meaning for --method {options.method}; leave it out")
    patches = [TaskPatch.load(file) for file in options.files]
    run_dir, init = opened(options)
    restore(init.model, RunFolder(run_dir), patches[0].image_size)
    evaluator = TrainerFactory(init.trainer).for_evaluation()
    merged, rows = merge_patches(init.model, init.data, patches, options.method, kind(**given), evaluator)
    content = merged.to_bytes()
    write_atomic(options.output, content)
    console = open_console(stderr=is_standard_output(options.output))
    console.print(merge_table(rows), crop=False)
    alone = sum(Path(file).stat().st_size for file in options.files)
    settings = ", ".join(f"{name} {value}" for name, value in merged.how.items() if name != "method")
    console.print(f"{options.method}: {settings}", soft_wrap=True)
    console.print(f"written: {options.output} ({len(content):,} bytes; the patches have {alone:,})", soft_wrap=True)


def split(options: Namespace) -> None:
    """Writes the patches of merged tasks."""
    merged, (run_dir, init) = MergedTasks.load(options.file), opened(options)
    restore(init.model, RunFolder(run_dir), merged.tasks[0].image_size)
    check_mergeable(init.model, [*merged.tasks])
    start = start_states(init.model.pieces)
    for index, task in enumerate(merged.tasks):
        path = Path(options.output) / f"{task.task}.{'safetensors' if task.rounded is None else 'recast'}"
        patch = merged.patch(index, start)
        init.model.check_patch(patch)
        patch.save(path)
        open_console().print(f"written: {path} ({path.stat().st_size:,} bytes)", soft_wrap=True)


def arithmetic(options: Namespace) -> None:
    """Adds a robust weight signature to patches, and measures them."""
    robust, clean, *patches = (TaskPatch.load(file) for file in (options.robust, options.clean, *options.files))
    run_dir, init = opened(options)
    restore(init.model, RunFolder(run_dir), patches[0].image_size)
    evaluator = TrainerFactory(init.trainer).for_evaluation()
    changed, rows = add_robustness(
        init.model, init.data, robust, clean, patches, options.layers, options.scale, evaluator
    )
    open_console().print(merge_table(rows, "changed"), crop=False)
    for patch in changed:
        path = Path(options.output) / f"{patch.task}.safetensors"
        patch.save(path)
        open_console().print(f"written: {path} ({path.stat().st_size:,} bytes)", soft_wrap=True)
