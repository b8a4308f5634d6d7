"""`analyze`: what a decomposition looks like, in numbers and pictures."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning import seed_everything
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from recast_pl.backbones.backbone import BackboneConfig
from recast_pl.cli.parser import new_parser
from recast_pl.config.run_config import read_run
from recast_pl.data.datamodule import SequentialTaskDataModule
from recast_pl.data.images import FileDataset, find_images
from recast_pl.decomposition.analysis import Analysis, analyze, displacements
from recast_pl.decomposition.bank import Decomposition
from recast_pl.decomposition.mimicry import MimicryModule
from recast_pl.decomposition.similarity import feature_similarity, weight_similarity
from recast_pl.errors import DataError, RunError
from recast_pl.files import json_text, write_atomic
from recast_pl.learning.til_module import TILModule
from recast_pl.reporting.analysis_plots import (
    plot_coefficient_similarity,
    plot_displacements,
    plot_feature_similarity,
    plot_template_diversity,
)
from recast_pl.reporting.analysis_tables import analysis_sheets
from recast_pl.reporting.plots import write_figure
from recast_pl.runs.evaluation import sample_images, trained_coefficients
from recast_pl.runs.folder import RunFolder

_IMAGES = 16  # of the first task, where none are named

_BATCH = 4  # images whose features are held at once, of all layers


@dataclass(frozen=True)
class _Subject:
    """What is analysed, and what is known of it."""

    decomposition: Decomposition
    output: Path
    backbone: BackboneConfig | None
    image_size: int
    seed: int = 42
    data: SequentialTaskDataModule | None = None
    coefficients: dict[str, Tensor] | None = None


def declare(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--run_dir", type=str | None, help="Folder of a run, of tasks or of MimicryModule.")
    parser.add_argument("--decomposition", type=str | None, help="Or a decomposition.safetensors by itself.")
    parser.add_argument("--backbone", type=BackboneConfig | None, help="Of the file, to compare weights and features.")
    parser.add_argument("--image_size", type=int, default=224, help="Of images for a file's backbone, in pixels.")
    parser.add_argument(
        "--images",
        type=str,
        nargs="+",
        default=[],
        help=f"Images, or folders of them, to compare features on (default: {_IMAGES} test images of the first task).",
    )
    parser.add_argument("--output", type=str | None, help="Folder (default: DIR/analysis, or FILE's own/analysis).")


def run(config: Namespace) -> int:
    """Analyses a decomposition, prints tables, and writes `analysis.json`, `analysis.md`, and pictures."""
    parser = new_parser("analyze")
    declare(parser)
    config = parser.instantiate(config)
    paths = find_images([Path(image) for image in config.images])
    subject = _of_file(config) if config.run_dir is None else _of_run(config)
    if paths and subject.backbone is None:
        raise RunError("--images compares features, which needs the network; name it by --backbone")
    console = Console()
    images = _images(subject, paths, console)
    analysis = _analyze(subject, images)
    sheets = analysis_sheets(analysis)
    console.print(*(sheet.printed() for sheet in sheets))
    write_atomic(subject.output / "analysis.md", "\n".join(sheet.markdown() for sheet in sheets))
    for name, figure in _figures(analysis).items():
        write_figure(figure, subject.output / name)
    write_atomic(subject.output / RunFolder.ANALYSIS, json_text(analysis.content()))
    console.print(f"analysis: {subject.output}", soft_wrap=True)
    return 0


def _of_file(config: Namespace) -> _Subject:
    if config.decomposition is None:
        raise RunError("there is nothing to analyse; give --run_dir, or --decomposition and a file")
    path = Path(config.decomposition)
    output = path.parent / "analysis" if config.output is None else Path(config.output)
    return _Subject(Decomposition.load(path), output, config.backbone, config.image_size)


def _of_run(config: Namespace) -> _Subject:
    for option in ("decomposition", "backbone"):
        if config[option] is not None:
            raise RunError(f"--{option} is not for --run_dir, which has its own; leave out either")
    run_dir, init = read_run(config.run_dir)
    path = RunFolder(run_dir).decomposition
    if not path.is_file():
        raise RunError(f"{run_dir} holds no decomposition; give a run whose method has Recast, or of MimicryModule")
    decomposition = Decomposition.load(path)
    output = RunFolder(run_dir).analysis if config.output is None else Path(config.output)
    model, seed = init.model, init.seed_everything
    if isinstance(model, MimicryModule):
        return _Subject(decomposition, output, model.backbone, model.image_size, seed)
    assert isinstance(model, TILModule)
    learnt = trained_coefficients(model, RunFolder(run_dir))
    return _Subject(decomposition, output, model.backbone_config, init.data.image_size, seed, init.data, learnt)


def _images(subject: _Subject, paths: Sequence[Path], console: Console) -> Tensor | None:
    """Images (N, 3, S, S) to compare features on; None for none."""
    if paths:
        files = FileDataset(paths, subject.image_size)
        return torch.stack([files[index][0] for index in range(len(files))])
    if subject.data is None:
        return None
    subject.data.tasks = subject.data.tasks[:1]  # the others' images need not be at hand
    try:
        return sample_images(subject.data, _IMAGES)
    except DataError as error:  # not asked for: the rest is worth having
        console.print(f"features are not compared, for want of images: {error}", soft_wrap=True)
        return None


def _analyze(subject: _Subject, images: Tensor | None) -> Analysis:
    analysis = analyze(subject.decomposition)
    moved = {t: displacements(subject.decomposition, c) for t, c in (subject.coefficients or {}).items()}
    analysis = replace(analysis, displacements=moved)
    if subject.backbone is None:
        return analysis
    seed_everything(subject.seed, verbose=False)  # random weights, if the run began with them, are found again
    backbone = subject.backbone.build(subject.image_size)
    analysis = replace(analysis, targets=weight_similarity(subject.decomposition, backbone.net))
    if images is None:
        return analysis
    return replace(analysis, features=feature_similarity(subject.decomposition, backbone, images.split(_BATCH)))


def _figures(analysis: Analysis) -> dict[str, Figure]:
    figures = {
        "template_diversity": plot_template_diversity(analysis.groups),
        "coefficient_similarity": plot_coefficient_similarity(analysis.groups),
    }
    if analysis.features:
        figures["feature_similarity"] = plot_feature_similarity(analysis.features)
    if analysis.displacements:
        figures["coefficient_displacement"] = plot_displacements(analysis.displacements)
    return figures
