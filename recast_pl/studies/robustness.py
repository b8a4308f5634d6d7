"""The robustness of several runs side by side, with differences paired by image."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from scipy.special import ndtri
from torch import Tensor

from recast_pl.config.paths import check_images
from recast_pl.data.corruptions import CORRUPTIONS, SEVERITIES, Condition
from recast_pl.errors import RunError
from recast_pl.learning.calibration import calibration_error
from recast_pl.learning.trainer import TrainerFactory
from recast_pl.reporting.board import Difference
from recast_pl.reporting.robustness import Robustness, RunScores, TaskScores
from recast_pl.runs.collection import Collection, Run
from recast_pl.runs.evaluation import rounded
from recast_pl.runs.origin import origin
from recast_pl.runs.robustness import CLEAN, MEASURES, Answers, Attacks, TaskRobustness, measure_robustness

_CONFIDENCE = 0.95

Measured = Mapping[str, TaskRobustness]
"""The answers of a run by task."""

Pair = tuple[str, Sequence[int], Tensor]
"""A task, positions of images in its data (N), and a difference for each image (N,)."""


def join_runs(collections: Sequence[Collection]) -> dict[str, list[Run]]:
    """All finished runs by name; those of one name differ in their seed.

    Raises:
        RunError: If there is none, or runs in two folders have one name.
    """
    joined: dict[str, list[Run]] = {}
    for collection in collections:
        for name, runs in collection.runs.items():
            if name in joined:
                first = joined[name][0].folder.path
                raise RunError(f"two runs are named {name!r}: {first} and {runs[0].folder.path}; rename one folder")
            joined[name] = runs
    if not joined:
        unfinished = [f"{run} ({why})" for collection in collections for run, why in collection.unfinished.items()]
        raise RunError(f"no run is finished: {', '.join(unfinished)}; finish it with fit --resume true")
    return joined


def study_robustness(
    runs: Mapping[str, Sequence[Run]],
    baseline: str,
    attacks: Attacks,
    limit: int | None,
    opened: Callable[[Path], Namespace],
    report: Callable[[str], None],
) -> Robustness:
    """Measures runs, and compares each with a baseline.

    Args:
        runs: The runs by name; those of one name differ in their seed.
        baseline: The name of the runs that others are compared with.
        attacks: The attacks.
        limit: The most test images of a task; None for all.
        opened: Opens a run folder.
        report: Is told in one line what has been measured.

    Raises:
        RunError: If there is no such baseline, or a run was tested on other images than the baseline.
    """
    if baseline not in runs:
        raise RunError(f"--baseline {baseline!r} is not one of the runs; choose from {', '.join(runs)}")
    measured: dict[str, dict[str, Measured]] = {name: {} for name in runs}
    scores: dict[str, dict[str, RunScores]] = {name: {} for name in runs}
    for name in sorted(runs, key=lambda name: name != baseline):  # the baseline first
        for run in runs[name]:
            seed = str(run.summary["seed"])
            found = measured[name][seed] = _measure(run, attacks, limit, opened)
            scores[name][seed] = _run_scores(run, found)
            report(f"measured: {name}, seed {seed}, {len(found)} tasks")
            if seed in measured[baseline]:
                _check_same_images(run, found, measured[baseline][seed], baseline)
    others = {name: found for name, found in measured.items() if name != baseline}
    return Robustness(
        baseline=baseline,
        images=limit,
        epsilons=list(attacks.epsilons),
        steps=attacks.steps,
        runs=scores,
        differences={name: _differences(found, measured[baseline]) for name, found in others.items()},
        origin=origin(),
    )


def paired_difference(pairs: Iterable[Pair]) -> Difference:
    """The mean difference in percent with a 95 % interval over images; tasks and seeds have the same weight.

    The standard error is that of the means over images of each task and seed. An image that several seeds have tested
    counts as one (clustered residuals). So the interval says how much other test images of these tasks might change.

    Args:
        pairs: For each task and seed, the differences of its images.
    """
    listed = list(pairs)
    residuals: dict[tuple[str, int], float] = defaultdict(float)
    for task, positions, values in listed:
        count = len(values)
        share = math.sqrt(count / max(1, count - 1)) / (count * len(listed))
        for position, residual in zip(positions, (values - values.mean()).tolist(), strict=True):
            residuals[task, position] += share * residual
    mean = sum(float(values.mean()) for *_, values in listed) / len(listed)
    half = float(ndtri((1 + _CONFIDENCE) / 2)) * math.sqrt(sum(value**2 for value in residuals.values()))
    mean, low, high = (rounded(100 * value) for value in (mean, mean - half, mean + half))
    return Difference(mean, (low, high))


def _measure(run: Run, attacks: Attacks, limit: int | None, opened: Callable[[Path], Namespace]) -> Measured:
    init = opened(run.folder.path)
    check_images(init.data)
    evaluator = TrainerFactory(init.trainer).for_evaluation()
    return dict(measure_robustness(init.model, init.data, run.folder, evaluator, attacks, limit))


def _check_same_images(run: Run, found: Measured, other: Measured, baseline: str) -> None:
    """Raises RunError if differences between two runs of one seed cannot be paired by image."""
    for task in found.keys() & other.keys():
        if (found[task].images, found[task].positions) != (other[task].images, other[task].positions):
            raise RunError(
                f"{run.folder.path} has other test images of task {task!r} than {baseline}; compare runs of the same "
                "data and seed"
            )


def _differences(ours: Mapping[str, Measured], theirs: Mapping[str, Measured]) -> dict[str, dict[str, Any]]:
    """The differences of all measures on the tasks and seeds that two runs share; empty if they share none."""
    pairs = [
        (task, found, theirs[seed][task])
        for seed in ours
        if seed in theirs
        for task, found in ours[seed].items()
        if task in theirs[seed]
    ]
    if not pairs:
        return {}
    differences: dict[str, dict[str, Any]] = {}
    gains: dict[str, list[Tensor]] = {m: [a.shares(m) - b.shares(m) for _, a, b in pairs] for m in MEASURES}
    lost = [worse - clean for worse, clean in zip(gains["corrupted"], gains["clean"], strict=True)]
    for measure, values in (gains | {"corrupted − clean": lost}).items():
        images = ((task, found.positions, value) for (task, found, _), value in zip(pairs, values, strict=True))
        differences[measure] = paired_difference(images)._asdict()
    return differences


def _run_scores(run: Run, found: Measured) -> RunScores:
    return RunScores(
        folder=str(run.folder.path),
        task_parameters=max(task["task_parameters"] for task in run.summary["tasks"]),
        tasks={name: _task_scores(task) for name, task in found.items()},
        calibration=_calibration(list(found.values())),
    )


def _task_scores(task: TaskRobustness) -> TaskScores:
    accuracy: dict[str, dict[str, float]] = {}
    for condition, answers in task.answers.items():
        share = float(answers.correct.double().mean())
        accuracy.setdefault(condition.kind, {})[f"{condition.level:g}"] = rounded(100 * share)
    errors = _errors([task.answers[CLEAN]])
    return TaskScores(
        images=len(task.positions), temperature=rounded(task.temperature), accuracy=accuracy, calibration=errors
    )


def _calibration(tasks: Sequence[TaskRobustness]) -> dict[str, list[float]]:
    """Calibration errors over the images of all tasks together, by severity; `0` are images as they are."""
    chosen: dict[str, list[Condition]] = {"0": [CLEAN]}
    chosen |= {str(severity): [Condition(name, severity) for name in CORRUPTIONS] for severity in SEVERITIES}
    chosen["corrupted"] = list(chain.from_iterable(chosen[str(severity)] for severity in SEVERITIES))
    return {key: _errors([task.answers[c] for task in tasks for c in found]) for key, found in chosen.items()}


def _errors(parts: Sequence[Answers]) -> list[float]:
    """Expected calibration errors in percent, before and after temperature scaling."""
    correct = torch.cat([part.correct for part in parts])
    confidences = (torch.cat([getattr(part, name) for part in parts]) for name in ("confidence", "calibrated"))
    return [rounded(calibration_error(confidence, correct)) for confidence in confidences]
