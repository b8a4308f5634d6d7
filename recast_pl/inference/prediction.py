"""What a predictor answers: how a task classifies an image, also where the task was to be found first."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from recast_pl.learning.router import Routes
from recast_pl.rules import NO_TASK

REFUSE = 0.05
"""The share of images of known tasks that may be refused, unless another is asked for."""

WORTH_A_LOOK = 0.18
"""The probability from which on the second likeliest task classifies the image, too.

Where tasks are alike, at most 56 % of images have such a task (`benchmarks/frozen_routing.py`).
"""


@dataclass(frozen=True)
class Prediction:
    """How a task classifies an image: the most probable class, and the probabilities of all classes by name."""

    task: str
    label: str
    probability: float
    probabilities: dict[str, float]

    @classmethod
    def of(cls, task: str, classes: Sequence[str], probabilities: Sequence[float]) -> "Prediction":
        """From the probability of each class."""
        best = max(range(len(classes)), key=probabilities.__getitem__)
        return cls(task, classes[best], probabilities[best], dict(zip(classes, probabilities, strict=True)))

    def ranked(self, count: int | None) -> dict[str, float]:
        """The `count` most probable classes and their probabilities, in descending order; None for all."""
        return dict(sorted(self.probabilities.items(), key=lambda item: -item[1])[:count])


@dataclass(frozen=True)
class Choice:
    """Another task that an image may belong to.

    Args:
        task: Its name.
        task_probability: The probability that the image belongs to it.
        label: The class that it gives the image; None if the task was so improbable that it was not asked.
        probability: The probability of that class within the task; None if it was not asked.
    """

    task: str
    task_probability: float
    label: str | None = None
    probability: float | None = None


@dataclass(frozen=True)
class RoutedPrediction(Prediction):
    """The answer for an image whose task was found. Probabilities of classes are those within the task.

    Args:
        task_probability: The probability that the image belongs to the task.
        familiar: The share of the known validation images that are at least as strange as this one.
        second: The second choice; None if there is only one task. If the image was refused, the first choice.

    The task of a refused image is `none`; it has no class, and its probabilities are 0.
    """

    task_probability: float
    familiar: float
    second: Choice | None


@dataclass(frozen=True)
class Candidates:
    """The tasks to try for an image: names and probabilities of the likeliest one or two, and whether it is refused."""

    tasks: list[tuple[str, float]]
    familiar: float
    refused: bool

    @property
    def asked(self) -> list[str]:
        """The tasks that are to classify the image."""
        if self.refused:
            return []
        return [task for place, (task, p) in enumerate(self.tasks) if not place or p >= WORTH_A_LOOK]

    def answer(self, found: Sequence[Prediction]) -> RoutedPrediction:
        """The answer, from the predictions of the tasks that were asked.

        It is the class of the highest p(task)·p(class | task); if several are equal, that of the task that comes first.
        """
        choices = [Choice(task, p) for task, p in self.tasks]
        if self.refused:
            return RoutedPrediction(NO_TASK, "", 0.0, {}, 0.0, self.familiar, choices[0])
        for place, one in enumerate(found):
            choices[place] = Choice(one.task, self.tasks[place][1], one.label, one.probability)
        best = max(range(len(found)), key=lambda place: self.tasks[place][1] * found[place].probability)
        others = [choice for place, choice in enumerate(choices) if place != best]
        chosen, p = found[best], self.tasks[best][1]
        return RoutedPrediction(
            chosen.task,
            chosen.label,
            chosen.probability,
            chosen.probabilities,
            p,
            self.familiar,
            next(iter(others), None),
        )


def find_candidates(names: Sequence[str], routes: Routes, refuse: float) -> list[Candidates]:
    """The candidates of each image; of tasks that are equally likely, the first come first.

    Args:
        names: Names of the tasks (T,).
        routes: Where the router sends B images.
        refuse: The share of known images that may be refused.
    """
    values, order = _first_two(routes.tasks)
    rows = zip(values.tolist(), order.tolist(), routes.familiar.tolist(), strict=True)
    return [
        Candidates([(names[task], p) for p, task in zip(ps, tasks, strict=True)], familiar, familiar < refuse)
        for ps, tasks, familiar in rows
    ]


def _first_two(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """The two largest of each row (B, T), in descending order, and where they are."""
    values, order = probabilities.sort(dim=1, descending=True, stable=True)
    return values[:, :2], order[:, :2]
