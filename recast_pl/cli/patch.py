"""The command `patch`: shows, checks and converts patches, the files of trained tasks."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace
from lightning import Trainer

from recast_pl.cli.options import declare_data_root, declare_device, declare_trust, opened
from recast_pl.cli.patch_merge import arithmetic, declare_arithmetic, declare_merge, declare_split, merge, split
from recast_pl.config.paths import check_images
from recast_pl.config.run import STRICT
from recast_pl.errors import PatchError, RunError
from recast_pl.files import is_standard_output, write_atomic
from recast_pl.learning.patch import BITS, TaskPatch
from recast_pl.learning.quantization import Moments
from recast_pl.learning.trainer import TrainerFactory
from recast_pl.reporting.tables import difference_tables, patch_tables
from recast_pl.runs.evaluation import activate, measure, restore, split_features
from recast_pl.runs.folder import RunFolder
from recast_pl.runs.patch_tools import FULL_PRECISION, average_patches, compare_patches, quantize_patch
from recast_pl.runs.signing import sign_run
from recast_pl.terminal import open_console


def declare(parser: ArgumentParser) -> None:
    """Adds the actions of the command."""
    actions = parser.add_subcommands(dest="action")
    for name, text in (
        ("show", "Show the contents of patches."),
        ("diff", "Show the differences between two patches."),
        ("verify", "Check that patches are undamaged and fit a run."),
        ("average", "Average patches of one task, for example from several seeds."),
        ("quantize", "Write a patch in half precision, or compactly."),
    ):
        action = ArgumentParser(description=text, **STRICT)
        count = {"diff": 2, "quantize": 1, "verify": "*"}.get(name, "+")
        none = " (default: all versions of all tasks of the run)" if name == "verify" else ""
        action.add_argument("files", type=str, nargs=count, help=f"Patch files{none}.")
        if name in ("verify", "quantize"):
            images = "whose training images choose how the head is rounded, and whose test images measure it"
            use = "that the patches must fit" if name == "verify" else f"{images} (default: neither)"
            action.add_argument("--run_dir", type=str | None, help=f"Folder of a run {use}.")
            declare_trust(action)
        if name == "quantize":
            precision = "fp16 for half precision, int8, int4 or int2 for a compact file, fp32 to convert back."
            choices = Literal["fp16", "int8", "int4", "int2", "fp32"]
            action.add_argument("--patch_precision", type=choices, default="fp16", help=precision)
            declare_data_root(action)
            declare_device(action)
        if name in ("average", "quantize"):
            action.add_argument(
                "--output", type=str, required=True, help="File of the new patch; - for standard output."
            )
        if name == "average":
            weights = "Weights of the patches (default: equal)."
            action.add_argument("--weights", type=float, nargs="+", default=[], help=weights)
        actions.add_subcommand(name, action, help=text)
    _declare_sign(actions)
    declare_merge(actions)
    declare_split(actions)
    declare_arithmetic(actions)


def _declare_sign(actions: Any) -> None:
    text = "Make the signatures that 'predict --task auto' needs, for a run that has none."
    action = ArgumentParser(description=text, **STRICT)
    run_dir = "Folder of a run; training images of tasks without a signature are read."
    action.add_argument("--run_dir", type=str, required=True, help=run_dir)
    output = "Folder for small signatures of all tasks, to hand on with their patches (default: none are written)."
    action.add_argument("--output", type=str | None, help=output)
    declare_data_root(action)
    declare_device(action)
    declare_trust(action)
    actions.add_subcommand("sign", action, help=text)


def run(parser: ArgumentParser, config: Namespace) -> int:
    """Runs one of the actions."""
    actions = {"show": _show, "diff": _diff, "verify": _verify, "average": _average, "quantize": _quantize}
    others = {"sign": _sign, "merge": merge, "split": split, "arithmetic": arithmetic}
    options = config[config.action]
    if config.action in others:
        others[config.action](options)
    else:
        actions[config.action]([Path(file) for file in options.files], options)
    return 0


def _show(paths: list[Path], options: Namespace) -> None:
    for path in paths:
        open_console().print(*patch_tables(TaskPatch.load(path), path), crop=False)


def _diff(paths: list[Path], options: Namespace) -> None:
    first, second = (TaskPatch.load(path) for path in paths)
    open_console().print(*difference_tables(compare_patches(first, second)), crop=False)


def _verify(paths: list[Path], options: Namespace) -> None:
    init = None if options.run_dir is None else opened(options)[1]
    for path in paths or _all_versions(options.run_dir):
        patch = TaskPatch.load(path)
        if init is not None:
            try:
                restore(init.model, RunFolder(options.run_dir), patch.image_size)
                init.model.activate(patch)
            except PatchError as cause:
                raise PatchError(f"{path}: {cause}") from cause
        fits = "" if init is None else f", and fits {options.run_dir}"
        open_console().print(f"{path}: intact{fits}", soft_wrap=True)


def _all_versions(run_dir: str | None) -> list[Path]:
    """The patches of all tasks of a run in all versions, each as its record describes it."""
    if run_dir is None:
        raise PatchError("no patch is named; give files, or the --run_dir whose patches are verified")
    folder = RunFolder(run_dir)
    found = [files for present in folder.trained() for files in folder.versions(present).values()]
    for files in found:
        files.load()
        if files.signature.is_file():
            files.load_signature()
    return [files.patch for files in found]


def _average(paths: list[Path], options: Namespace) -> None:
    _write(average_patches([TaskPatch.load(path) for path in paths], options.weights), options.output, "not measured")


def _quantize(paths: list[Path], options: Namespace) -> None:
    patch, precision = TaskPatch.load(paths[0]), options.patch_precision
    if options.run_dir is None:
        note = "not measured; give --run_dir to round the head with training images, and to measure the accuracy"
        _write(quantize_patch(patch, precision), options.output, note)
        return
    init, index, evaluator = _open_task(patch, options)
    moments = None
    if precision in BITS:
        activate(init.model, init.data, index, patch.compacted(BITS[precision]))  # the states that the file will keep
        moments = Moments.of(split_features(init.model, init.data, "train", evaluator).features)
    smaller = quantize_patch(patch, precision, moments)
    before, after = (measure(init.model, init.data, index, each, evaluator) for each in (patch, smaller))
    smaller = replace(smaller, metrics={**smaller.metrics, FULL_PRECISION: before, "accuracy": after})
    _write(smaller, options.output, f"test accuracy {before:.2f} % before, {after:.2f} % after")


def _sign(options: Namespace) -> None:
    folder, signed = RunFolder(options.run_dir), list[str]()
    if not all(files.signature.is_file() for files in folder.finished().values()):
        _, init = opened(options)
        check_images(init.data)
        signed += sign_run(init.model, init.data, folder, TrainerFactory(init.trainer).for_evaluation())
    made = ", ".join(signed) if signed else "none, because every task has one"
    open_console().print(f"signatures made in {options.run_dir}: {made}", soft_wrap=True)
    if options.output is not None:
        for files in folder.finished().values():
            files.load_signature().small().save(Path(options.output) / files.signature.name)
        open_console().print(f"small signatures written: {options.output}", soft_wrap=True)


def _open_task(patch: TaskPatch, options: Namespace) -> tuple[Any, int, Trainer]:
    """What the configuration of a patch's run describes, with the network built; the task's position; an evaluator."""
    run_dir, init = opened(options)
    names = [task.name for task in init.data.tasks]
    if patch.task not in names:
        raise RunError(f"{run_dir} has no task {patch.task!r}, only {', '.join(names)}; give the run of the patch")
    check_images(init.data)
    init.data.prepare_data()
    restore(init.model, RunFolder(run_dir), patch.image_size)
    return init, names.index(patch.task), TrainerFactory(init.trainer).for_evaluation()


def _write(patch: TaskPatch, output: str, note: str) -> None:
    content = patch.to_bytes()
    write_atomic(output, content)
    console = open_console(stderr=is_standard_output(output))
    console.print(f"written: {output} ({len(content):,} bytes); {note}", soft_wrap=True)
