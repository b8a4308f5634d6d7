"""Accuracy without the name of the task, as `predict --task auto` answers, after every task of a stream."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from recast_pl.data.datamodule import SequentialTaskDataModule
from recast_pl.errors import RunError
from recast_pl.inference.joint_heads import JointHeads
from recast_pl.inference.prediction import Candidates, Prediction, find_candidates
from recast_pl.learning.compact import narrowed
from recast_pl.learning.features import Features
from recast_pl.learning.router import Router
from recast_pl.learning.til_module import TILModule
from recast_pl.methods.joint_classifier import JointClassifier
from recast_pl.runs.class_rows import Accuracies, ClassEvaluation
from recast_pl.runs.evaluation import percent_right, split_features
from recast_pl.runs.folder import TaskFiles


def class_evaluation(module: TILModule, classifiers: Sequence[JointClassifier] = ()) -> ClassEvaluation:
    """How a method is measured: by its joint head if it trains one, or else by the router and further classifiers.

    Raises:
        RunError: If classifiers are given beside a joint head, or two are of one class.
    """
    if not any(piece.keeps_heads for piece in module.pieces):
        return RoutedEvaluation(classifiers)
    if classifiers:
        raise RunError("--joint reads the features of a frozen network, but tasks share weights; leave it out")
    return JointHeads()


class RoutedEvaluation:
    """Measures the router with the heads of the tasks, and the router alone over the classes of all tasks.

    Features of test images by the frozen network are computed once, and kept in half precision. What a task answers
    for an image is computed when the router first asks for it, and kept.

    Args:
        classifiers: Further classifiers over the classes of all tasks, each another measure, named after its class.

    Raises:
        RunError: If two classifiers are of one class.
    """

    def __init__(self, classifiers: Sequence[JointClassifier] = ()) -> None:
        self._classifiers = {type(classifier).__name__: classifier for classifier in classifiers}
        if len(self._classifiers) < len(classifiers):
            raise RunError("--joint has two classifiers of one class; measure them in two runs, or by --resume true")
        self.measures: Sequence[str] = ("routed", "joint", *self._classifiers)
        self._taught = 0  # tasks whose training images the classifiers have seen
        self._tests: dict[str, Features] = {}
        self._answers: dict[tuple[str, str], _Answers] = {}  # by the task asked, and the task of the images

    def check(self, module: TILModule) -> None:
        """Raises RunError if tasks share weights."""
        sharing = [type(piece).__name__ for piece in module.pieces if not piece.isolated]
        if sharing:
            raise RunError(
                "--evaluation class finds tasks by the features of a frozen network, but tasks share what "
                f"{sharing[0]} trains; leave it out, or use a method that keeps tasks apart or trains all heads, "
                "such as WeightAligning"
            )

    def measure(
        self, module: TILModule, data: SequentialTaskDataModule, files: Sequence[TaskFiles], evaluator: Trainer
    ) -> Accuracies:
        """Measures all tasks of some files, as `ClassEvaluation` describes."""
        router = Router(each.load_signature() for each in files)
        starts = [0, *itertools.accumulate(len(names) for names in router.classes)]
        for index in range(self._taught, len(files) if self._classifiers else 0):
            train = _frozen(module, data, index, "train", evaluator)
            for classifier in self._classifiers.values():
                classifier.update(train.features, train.labels.cpu() + starts[index])
        self._taught = len(files)
        found: Accuracies = {measure: {} for measure in self.measures}
        for index, each in enumerate(files):
            test = self._test_images(module, data, index, evaluator)
            x, labels = test.features.float(), test.labels
            candidates = find_candidates(router.tasks, router.route(x), refuse=0)
            self._ask(module, data, index, files, candidates, evaluator)
            right = torch.tensor([self._is_right(c, i, each.task, labels) for i, c in enumerate(candidates)])
            found["routed"][each.task] = percent_right(right)
            scores = {"joint": router.scores(x)} | {name: c.scores(x) for name, c in self._classifiers.items()}
            for measure, of_classes in scores.items():
                found[measure][each.task] = percent_right(of_classes.argmax(1) == starts[index] + labels)
        module.cpu()
        return found

    def _test_images(
        self, module: TILModule, data: SequentialTaskDataModule, index: int, evaluator: Trainer
    ) -> Features:
        """Features of the test images of a task by the network that every task starts from, in half precision."""
        name = data.tasks[index].name
        if name not in self._tests:
            test = _frozen(module, data, index, "test", evaluator)
            self._tests[name] = Features(narrowed(test.features.cpu()), test.labels.cpu())
        return self._tests[name]

    def _ask(
        self,
        module: TILModule,
        data: SequentialTaskDataModule,
        index: int,
        files: Sequence[TaskFiles],
        candidates: Sequence[Candidates],
        evaluator: Trainer,
    ) -> None:
        """Lets each candidate task classify the test images of a task that it has not classified before."""
        own = data.tasks[index].name
        data.select(index)
        for each in files:
            answers = self._answers.setdefault((each.task, own), _Answers.none(len(candidates)))
            asked = [i for i, c in enumerate(candidates) if each.task in c.asked and answers.labels[i] < 0]
            if not asked:
                continue
            module.activate(each.load()[0])
            images = split_features(module, data, "test", evaluator, asked)
            head = module.current()[1]
            with torch.no_grad():
                best = head(images.features.to(head.weight.dtype)).softmax(1).float().cpu().max(1)
            answers.labels[asked], answers.probabilities[asked] = best.indices, best.values

    def _is_right(self, candidates: Candidates, image: int, task: str, labels: Tensor) -> bool:
        """Whether the answer for a test image of a task is this task and the image's class."""
        found = [self._answers[asked, task].prediction(asked, image) for asked in candidates.asked]
        answer = candidates.answer(found)
        return (answer.task, answer.label) == (task, str(int(labels[image])))


@dataclass(frozen=True)
class _Answers:
    """What a task takes images for: labels (N,), -1 where it was not asked, and their probabilities (N,)."""

    labels: Tensor
    probabilities: Tensor

    @classmethod
    def none(cls, count: int) -> "_Answers":
        return cls(torch.full((count,), -1), torch.zeros(count))

    def prediction(self, task: str, image: int) -> Prediction:
        return Prediction(task, str(int(self.labels[image])), float(self.probabilities[image]), {})


def _frozen(module: TILModule, data: SequentialTaskDataModule, index: int, split: str, evaluator: Trainer) -> Features:
    """Features of images of a task by the network that every task starts from."""
    data.select(index)
    with isolate_rng():
        module.begin_task(data.task_name, data.classes)
    return split_features(module, data, split, evaluator)
