"""IDER: a network that reads its own prediction must not change it, and neither may the network before the task.

Liu, Li, Gao, Li, Kong, Sun and Huang, "IDER: IDempotent Experience Replay for Reliable Continual Learning", ICLR 2026.
The formulas are read from the authors' code.

    f(x, y): half of the blocks, + LeakyReLU(A·y + a), the other blocks, and the heads of all tasks as one classifier
    L(x, y) = ½·[cross-entropy(f(x, y*), y) + cross-entropy(f(x, softmax f(x, y*)), y)]
    D(x) = ‖f(x, 0) − f₀(x, softmax f(x, 0))‖², the mean over the old classes
    loss = L(new) + α·[D(new) + D(replayed)] + β·L(replayed), D from the second task on

f₀ is the network before the task; 0 the empty input, in which all classes have the same probability; y* the label as a
one-hot vector, or 0 with probability P, drawn for a batch. The two replayed terms draw their images independently. D
has a gradient through the second input of f₀, too. Where labels are not known, the second input is 0. The authors'
settings have P = 1, so that y* is never the label, and a buffer that is balanced by class.

Deviations: D of new and replayed images have one weight α, that of replayed images in the settings for CIFAR-100; that
of new images is 0.4 there. A and a start at 0, so that the pretrained network is unchanged. The second input has room
for `classes` classes, of which the heads have those learnt so far, so D leaves out the new ones. In place of the third
stage of a ResNet-18, the input enters before the middle block of any network, at all tokens of a transformer. The
buffer is balanced as that of `GDumb` is.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recast_pl.errors import MethodError
from recast_pl.methods.buffer import Replay
from recast_pl.methods.piece import Piece, Step, copies
from recast_pl.methods.second_input import SecondInput


class IDER(Replay):
    """Idempotent experience replay (Liu et al., 2026): the network reads its own prediction and must confirm it.

    List it after `FineTune`, which trains the weights. `--evaluation class` measures the heads of all tasks as one
    classifier. A step takes seven passes through the network, or up to nine with labels.

    Args:
        alpha: α, the weight of the squared distance from what the network before the task makes of a prediction.
        beta: β, the weight of replayed images.
        empty: P, the probability that the first second input of a batch is empty and not the labels.
        classes: How many classes of all tasks together the second input has room for.
        per_class: Images kept of each class; None to bound them in total.
        total: Images kept in total; None to bound them by class.
        learning_rate: Learning rate of A and a; None for that of the head.

    Raises:
        MethodError: If α or β is negative, P not from 0 to 1, there is no room for a class, or unless exactly one bound
            is given.
    """

    solvable_head = False
    second: SecondInput
    """The second input of the network; set by `attach`."""

    def __init__(
        self,
        alpha: float = 0.5,
        beta: float = 1.0,
        empty: float = 1.0,
        classes: int = 1000,
        per_class: int | None = 120,
        total: int | None = None,
        learning_rate: float | None = None,
    ) -> None:
        super().__init__(True, per_class, total)
        if alpha < 0 or beta < 0 or not 0 <= empty <= 1:
            raise MethodError(f"IDER: alpha={alpha} and beta={beta} must not be negative, empty={empty} be from 0 to 1")
        if classes < 1:
            raise MethodError(f"IDER: classes={classes} must be at least 1")
        self.alpha, self.beta, self.empty, self.classes = alpha, beta, empty, classes
        self.learning_rate = learning_rate

    def join(self, pieces: Sequence[Piece]) -> None:
        """The second input belongs to the network that is copied before a task."""
        super().join(pieces)
        self.protected = [*self.protected, self]

    def attach(self, network: nn.Module) -> None:
        """Adds the second input before the middle block; raises a MethodError if the network has no blocks."""
        self.second = SecondInput.enter("IDER", network, self.classes)
        self.parameters = dict(self.second.linear.named_parameters())

    def begin_task(self) -> None:
        """Raises the capacity of the buffer, and copies the network and the heads of earlier tasks.

        Raises:
            MethodError: If the second input has no room for the classes of the task.
        """
        super().begin_task()
        needed = sum(head.out_features for head in self._heads())
        if needed > self.classes:
            raise MethodError(f"IDER: classes={self.classes} are fewer than the {needed} of the tasks so far; set more")
        self.remember_network()

    def loss(self, step: Step) -> Tensor:
        """All terms, less the cross-entropy of the own head; then the batch is offered to the buffer."""
        own, first = self._heads()[-1].out_features, self._joint(step.features)
        old = first.shape[1] - own
        twice = self.passes(step.images, first, old + step.labels)
        # the own classes come first, as the labels count them
        likely = [self.learner.loss(logits.roll(own, 1), step.labels) for logits in twice]
        term = torch.stack(likely).mean() - self.learner.loss(step.logits, step.labels)
        if old:
            term = term + self.alpha * self.distance(step.images, first)
        if len(self.buffer):
            images, samples = self.draw_images(step)
            starts = torch.tensor([0, *accumulate(head.out_features for head in self._heads())])
            labels = starts.to(samples.tasks)[samples.tasks] + samples.labels
            twice = self.passes(images, self.outputs(images), labels)
            term = term + self.beta * torch.stack([F.cross_entropy(logits, labels) for logits in twice]).mean()
            if old:
                images, _ = self.draw_images(step)
                term = term + self.alpha * self.distance(images, self.outputs(images))
        self.keep(step)
        return term

    def outputs(self, images: Tensor, second: Tensor | None = None) -> Tensor:
        """f: logits of all classes so far (B, K) of images with a second input (B, K), or the empty one."""
        backbone, _ = self.learner.current()
        if second is None:
            return self._joint(backbone(images))
        with self.second.of(second):
            return self._joint(backbone(images))

    def passes(self, images: Tensor, empty: Tensor, labels: Tensor) -> list[Tensor]:
        """f(x, y*) and f(x, softmax f(x, y*)), both (B, K), where `empty` is f(x, 0)."""
        first = empty
        if torch.rand(()) >= self.empty:
            first = self.outputs(images, F.one_hot(labels, empty.shape[1]).to(empty.dtype))
        return [first, self.outputs(images, first.softmax(1))]

    def distance(self, images: Tensor, first: Tensor) -> Tensor:
        """D, the mean over images, where `first` (B, K) is f(x, 0)."""
        with self.second.of(first.softmax(1)):
            before = torch.cat(self.logits_before(images), 1)  # (B, old classes)
        return F.mse_loss(first[:, : before.shape[1]], before)

    def shared_state(self) -> dict[str, Tensor]:
        """A, a and the buffer."""
        return copies(self.parameters) | self.buffer.state()

    def load_shared_state(self, state: dict[str, Tensor]) -> None:
        """Loads A, a and the buffer."""
        self._load({name: state[name] for name in self.parameters if name in state}, self.parameters)
        self.buffer.load_state(state)

    def _heads(self) -> list[Any]:
        return [*self.learner.old_heads, self.learner.current()[1]]

    def _joint(self, features: Tensor) -> Tensor:
        return torch.cat([head(features) for head in self._heads()], 1)
