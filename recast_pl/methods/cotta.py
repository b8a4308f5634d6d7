"""CoTTA: a task adapts to unlabelled test images while it classifies them.

Wang, Fink, Van Gool and Dai, "Continual Test-Time Domain Adaptation", CVPR 2022. For each batch of test images x:

    y' = f(x; teacher)                                        where the trained task is sure: max f(x; source) ≥ p
       = mean of f(aᵢ(x); teacher) over N random views aᵢ     elsewhere                                (equations 2–4)
    student ← one step of Adam on −Σ_c y'_c log f(x; student)_c                                         (equation 1)
    teacher ← α·teacher + (1 − α)·student                                                               (equation 2)
    student ← source, for each number with probability q                                            (equations 7–8)

f is the softmax, y' is the answer, and source, student and teacher are numbers of the same network. p is the 5 %
quantile of max f(x; source) on the validation images of the task.

The published code decides for a batch as a whole whether to average over views, and averages logits. The paper
averages predictions, for each image, and so does this implementation.

Deviations: what adapts are the numbers that the other pieces train, such as the 48 coefficients of `Recast`; the
authors adapt all weights and the classifier (`FineTune` comes close). Views are as theirs, but not mirrored, because
some tasks do not survive that, and without gamma. Each test starts from the trained task, and leaves it as it was.
"""

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchvision.transforms import v2

from recast_pl.errors import MethodError
from recast_pl.methods.piece import Classifier, Piece, check_state

QUANTILE = 0.05
"""The share of validation images of which a trained task is not sure."""


class CoTTA(Piece):
    """Continual test-time adaptation (Wang et al., 2022) of what the other pieces train; list it last.

    Training is left alone. `fit`, `test` and `robustness` measure the task while it adapts, batch after batch, in the
    order of the test images. `predict`, `serve` and `export` use the task as it was trained.

    Args:
        rate: Learning rate of Adam at test time.
        smoothing: α.
        views: N; 0 to never average over views.
        restore: q.

    Raises:
        MethodError: If a value is out of range.
    """

    adapts = True

    def __init__(self, rate: float = 1e-3, smoothing: float = 0.999, views: int = 32, restore: float = 0.01) -> None:
        if rate <= 0 or views < 0 or not 0 <= smoothing <= 1 or not 0 <= restore <= 1:
            raise MethodError(
                f"CoTTA: rate={rate} must be positive, views={views} at least 0, and smoothing={smoothing} and "
                f"restore={restore} from 0 to 1"
            )
        super().__init__()
        self.rate, self.smoothing, self.views, self.restore = rate, smoothing, views, restore
        self.threshold = torch.zeros(1)
        self._others: Sequence[Piece] = ()

    def join(self, pieces: Sequence[Piece]) -> None:
        """Remembers the other pieces; raises MethodError if it is not the last one, or tasks share weights."""
        super().join(pieces)
        self._others = pieces[:-1]
        if pieces[-1] is not self or any(isinstance(piece, CoTTA) for piece in self._others):
            raise MethodError("CoTTA: list it once, as the last piece")
        if shared := [type(piece).__name__ for piece in self._others if not piece.isolated]:
            raise MethodError(
                f"CoTTA: tasks of {', '.join(shared)} share weights; use pieces with a state for each task"
            )

    def attach(self, network: nn.Module) -> None:
        """Raises MethodError if the other pieces train nothing."""
        if not any(piece.parameters for piece in self._others):
            raise MethodError("CoTTA: no piece before it trains any number; add one, such as Recast")

    def begin_task(self) -> None:
        """Is sure of every image, until the task is trained."""
        self.threshold = torch.zeros(1)

    def end_task(self) -> None:
        """Finds how sure the trained task is of its validation images."""
        backbone, head = self.learner.current()
        with torch.no_grad():
            sure = [_confidence(head(backbone(images))).float().cpu() for images, _ in self.learner.batches("val")]
        self.threshold = torch.cat(sure).quantile(QUANTILE)[None]

    def task_state(self) -> dict[str, Tensor]:
        """The confidence below which answers are averaged over views (1,)."""
        return {"threshold": self.threshold.clone()}

    def load_task_state(self, state: dict[str, Tensor]) -> None:
        """Loads what `task_state` returned; raises PatchError if that is something else."""
        check_state("CoTTA", state, {"threshold": (1,)})
        self.threshold = state["threshold"].float()

    def unpack(self, states: Mapping[str, Tensor]) -> dict[Tensor, Tensor]:
        """Nothing of the network is set: predictions are those of the task as it was trained."""
        return {}

    def adapting(self, network: Classifier) -> Classifier:
        """A function that gives logarithms of probabilities (B, C), and adapts to each batch.

        Its random numbers depend on how many batches came before, and on nothing else.
        """
        numbers = [parameter for piece in self._others for parameter in piece.parameters.values()]
        source, step = _values(numbers), 0
        student, teacher = source, source
        optimizer = torch.optim.Adam(numbers, self.rate)

        def classify(images: Tensor) -> Tensor:
            nonlocal student, teacher, step
            with torch.inference_mode(mode=False), torch.enable_grad(), isolate_rng():
                torch.manual_seed(step)
                images, step = images.clone(), step + 1  # tensors of the inference mode have no gradient
                answer = self._answer(network, images, numbers, source, teacher)
                _set(numbers, student)
                optimizer.zero_grad()
                (-(answer * network(images).log_softmax(1)).sum(1).mean()).backward()
                optimizer.step()
                moved, kept = _values(numbers), self.smoothing
                teacher = [kept * old + (1 - kept) * new for old, new in zip(teacher, moved, strict=True)]
                student = [
                    torch.where(torch.rand_like(new) < self.restore, old, new)
                    for old, new in zip(source, moved, strict=True)
                ]
                _set(numbers, source)
                optimizer.zero_grad()
            return answer.clamp_min(torch.finfo(answer.dtype).tiny).log()

        return classify

    @torch.no_grad()
    def _answer(
        self,
        network: Classifier,
        images: Tensor,
        numbers: Sequence[nn.Parameter],
        source: Sequence[Tensor],
        teacher: Sequence[Tensor],
    ) -> Tensor:
        """Probabilities y' (B, C) by the teacher."""
        _set(numbers, source)
        unsure = _confidence(network(images)) < self.threshold.to(images.device)
        _set(numbers, teacher)
        answer = network(images).softmax(1)
        if self.views and unsure.any():
            change = _views(images)
            viewed = [network(change(images[unsure])).softmax(1) for _ in range(self.views)]
            answer[unsure] = torch.stack(viewed).mean(0)
        return answer


def _confidence(logits: Tensor) -> Tensor:
    return logits.softmax(1).amax(1)


def _values(numbers: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in numbers]


@torch.no_grad()
def _set(numbers: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(numbers, values, strict=True):
        parameter.copy_(value)


def _views(images: Tensor) -> v2.Transform:
    """The authors' random views of images (B, 3, S, S) in [0, 1], with the same random numbers for a batch."""
    height, width = images.shape[-2:]
    return v2.Compose(
        [
            v2.ColorJitter(brightness=(0.6, 1.4), contrast=(0.7, 1.3), saturation=(0.5, 1.5), hue=0.06),
            v2.Pad([width // 2, height // 2], padding_mode="edge"),
            v2.RandomAffine((-15, 15), translate=(1 / 16, 1 / 16), scale=(0.9, 1.1)),
            v2.CenterCrop([height, width]),
            v2.GaussianBlur(5, sigma=(0.001, 0.5)),
            v2.GaussianNoise(sigma=0.005, clip=True),
        ]
    )
