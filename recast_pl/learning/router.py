"""A router: finds the task of an image from its features by the frozen network. It has a closed form.

    P = ((1 − ρ)·S/f + ρ·tr(S)/(f·D)·I)⁻¹ with the sum S of the scatters of all tasks, and f = images − classes
    s_c(x) = xᵀPμ_c − ½·μ_cᵀPμ_c for every class c of every task: linear discriminant analysis with equal priors
    p(task | x) = the sum of softmax(s(x)/T) over the classes of the task

ρ has a closed form, too ("oracle approximating shrinkage": Chen, Wiesel, Eldar and Hero, "Shrinkage Algorithms for MMSE
Covariance Estimation", IEEE Transactions on Signal Processing 2010, equation 23, without the terms 2/D, as in
scikit-learn). T is the temperature at which the tasks of validation images are most probable.

An image is strange if it is far from all classes, or between tasks. Two numbers are added up: the squared Mahalanobis
distance (x − μ)ᵀP(x − μ) to the nearest class, and 1 − max p(task | x), each less its mean over validation images and
divided by its standard deviation there. Where tasks are alike, the sum tells images of a task that was left out from
known ones better than either number; images unlike all tasks, the distance alone tells better
(`benchmarks/frozen_routing.py`).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from recast_pl.errors import PatchError, RunError
from recast_pl.learning.compact import narrowed
from recast_pl.learning.signature import Signature

_SAMPLE = 4096  # validation images of all tasks together
_SCORES = 2**22  # of them that are computed; with many classes, fewer images are used

_CHUNK = 2**18  # scores that are in memory at a time, which fit into the cache of a processor

_TINY = 1e-9  # of the mean variance, added to the variance of each direction

_ROUNDING = 1e-6  # of the largest element of a matrix, so that rounding leaves no negative eigenvalue

_HOTTEST, _COLDEST = 3.0, -2.0  # decimal logarithms of the temperatures to choose from

_TIE = 1e-4  # cross-entropy for a factor of ten; of temperatures that are equally good, it chooses that nearest to 1


@dataclass(frozen=True)
class Routes:
    """Where a router sends images.

    Args:
        tasks: Probability of each task (B, T), in the router's order of tasks.
        familiar: For each image (B,), the share of the known validation images that are at least as strange. If images
            below 0.05 are refused, 5 % of the images that belong to a task are.
    """

    tasks: Tensor
    familiar: Tensor


class Router:
    """Finds the tasks of images; it needs the signature of each task, in any order.

    It keeps the mean of each class in half precision, and one matrix for all. To add or remove a task, make another
    router from the signatures that are left; sums are exact, so that nothing of the task stays.

    Args:
        signatures: Those of different tasks on one base. Each is used once and can be read from its file on demand.

    Raises:
        RunError: If there is no signature, or a task comes twice.
        PatchError: If signatures belong to different bases or image sizes.
    """

    def __init__(self, signatures: Iterable[Signature]) -> None:
        pool = _Pool()
        for signature in signatures:
            pool.add(signature)
        if pool.first is None:
            raise RunError("a router needs the signature of at least one task; make signatures with 'patch sign'")
        self.image_size = pool.first.image_size
        """Height and width of the images in pixels."""
        self.tasks: list[str] = pool.tasks
        """Names of the tasks."""
        self.classes: list[list[str]] = pool.classes
        """Class names of each task."""
        counts = torch.tensor([len(names) for names in self.classes])
        self.task_of = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(counts)
        """Position of the task of each class (K,)."""
        self._solve(pool)
        self.temperature = 1.0
        self._strange = torch.zeros(0)
        features, labels = pool.sample(_SAMPLE, len(self.task_of))
        if len(labels):
            self._calibrate(features, labels)

    def _solve(self, pool: "_Pool") -> None:
        """Solves the discriminant. Features are counted from the mean of all classes, which changes no probability."""
        means = torch.cat(pool.means).double()
        precision, self.shrinkage = precision_matrix(pool.scatter, pool.free)
        known = torch.cat(pool.counts) > 0
        self._centre = narrowed(means[known].mean(0).float()).double()  # the same bits in any order of tasks
        self._means = narrowed((means - self._centre).float())  # (K, D)
        wide = self._means.double()
        self._bias = (-((wide @ precision) * wide).sum(1) / 2).masked_fill(~known, -torch.inf).float()  # (K,)
        self._precision = precision.float()

    def _calibrate(self, features: Tensor, labels: Tensor) -> None:
        """Fits the temperature, and how strange images are, to validation images (V, D) of tasks (V,)."""
        rows = max(1, _CHUNK // len(self.task_of))
        parts = list(zip(features.split(rows), labels.split(rows), strict=True))
        self.temperature = fit_temperature(lambda: ((self.scores(part), tasks) for part, tasks in parts), self.task_of)
        evidence = torch.cat([self._evidence(part, self.scores(part)) for part, _ in parts])  # (V, 2)
        self._usual, self._spread = evidence.mean(0), evidence.std(0, correction=0).clamp_min(1e-6)
        self._strange = ((evidence - self._usual) / self._spread).sum(1).sort().values

    @property
    def nbytes(self) -> int:
        """Bytes in memory that grow with the number of classes."""
        return sum(tensor.nbytes for tensor in (self._means, self._bias, self.task_of))

    @property
    def linear(self) -> dict[str, Tensor]:
        """The scores as one product s(x) = W·(x − centre) + b.

        `weight` is W (K, D), and `bias` is b (K,). Without `centre` (D,), small differences of features would be lost.
        """
        weight = self._means.double() @ self._precision.double()
        return {"weight": weight.float(), "bias": self._bias, "centre": self._centre.float()}

    @property
    def strangeness(self) -> dict[str, Tensor]:
        """What finds `Routes.familiar` without this class; nothing if there are no validation images.

        P is S·L·Lᵀ·S with the diagonal matrix S. `factor` (D·(D + 1)/2,) in half precision is the lower triangle L, row
        by row; `scale` (D,) is S. `usual` and `spread` (2,) are means and standard deviations of the squared distance
        and of 1 − max p(task | x), and `strange` (V,) the sums of validation images in ascending order.
        """
        if not len(self._strange):
            return {}
        precision = self._precision.double()
        precision.diagonal().add_(_ROUNDING * precision.diagonal().max())
        factor = torch.linalg.cholesky(precision)
        scale = factor.abs().amax(1)
        rows, columns = torch.tril_indices(*factor.shape)
        triangle = (factor / scale[:, None])[rows, columns].half()
        numbers = {"usual": self._usual, "spread": self._spread, "strange": self._strange}
        return {"factor": triangle, "scale": scale.float()} | {name: t.float() for name, t in numbers.items()}

    def scores(self, features: Tensor) -> Tensor:
        """Scores s (B, K) of the classes of all tasks for features (B, D); the largest is that of the likeliest."""
        x = (features.detach().cpu().double() - self._centre).float() @ self._precision  # (B, D)
        return torch.addmm(self._bias, x, self._means.float().T)

    def route(self, features: Tensor) -> Routes:
        """Finds the tasks of images from their features (B, D), on any device.

        Raises:
            PatchError: If a feature is NaN or infinite.
        """
        if not features.isfinite().all():
            raise PatchError("the frozen network gives NaN or infinity for an image; check the weights of its backbone")
        scores = self.scores(features)
        probabilities = task_probabilities(scores, self.task_of, self.temperature)
        if not len(self._strange):
            return Routes(probabilities, torch.ones(len(features)))
        strange = ((self._evidence(features, scores) - self._usual) / self._spread).sum(1)
        below = torch.searchsorted(self._strange, strange)
        count = len(self._strange)
        return Routes(probabilities, (count - below + 1) / (count + 1))

    def _evidence(self, features: Tensor, scores: Tensor) -> Tensor:
        """Squared distance to the nearest class, and 1 less the probability of the likeliest task (B, 2)."""
        x = (features.detach().cpu().double() - self._centre).float()
        distance = ((x @ self._precision) * x).sum(1) - 2 * scores.amax(1)
        likeliest = task_probabilities(scores, self.task_of, self.temperature).amax(1)
        return torch.stack([distance, 1 - likeliest], 1)


class _Pool:
    """Sums over the signatures of all tasks, and some of their validation images."""

    def __init__(self) -> None:
        self.tasks, self.classes = list[str](), list[list[str]]()
        self.means, self.counts = list[Tensor](), list[Tensor]()
        self.free = 0  # images less classes
        self.first: Signature | None = None
        self._held_out: list[Tensor] = []

    def add(self, signature: Signature) -> None:
        """Adds a task."""
        if self.first is None:
            width = signature.means.shape[1]
            self.first, self.scatter = signature, torch.zeros(width, width, dtype=torch.float64)
        signature.check(self.first.base, self.first.image_size)
        if signature.task in self.tasks:
            raise RunError(f"task {signature.task!r} has two signatures; give each task one")
        if not signature.is_small:
            self.scatter += signature.scatter.matrix
            self.free += int(signature.counts.sum()) - len(signature.classes)
        self.tasks.append(signature.task)
        self.classes.append(signature.classes)
        self.means.append(signature.means.float())  # as the file keeps them
        self.counts.append(signature.counts)
        features = signature.held_out.features
        self._held_out.append(narrowed(_spaced(features, _SAMPLE // len(self.tasks))))

    def sample(self, most: int, classes: int) -> tuple[Tensor, Tensor]:
        """Features (V, D) of validation images, about as many of each task, and the positions of their tasks (V,)."""
        each = max(1, min(most, _SCORES // classes) // len(self.tasks))
        parts = [_spaced(features, each).float() for features in self._held_out]
        sizes = torch.tensor([len(part) for part in parts])
        return torch.cat(parts), torch.arange(len(parts)).repeat_interleave(sizes)


def _spaced(values: Tensor, count: int) -> Tensor:
    """Up to `count` rows, at least one, evenly spaced."""
    chosen = torch.linspace(0, len(values) - 1, min(max(1, count), len(values))).round().long()
    return values[chosen]


def precision_matrix(scatter: Tensor, free: int) -> tuple[Tensor, float]:
    """The inverse P of the shrunk covariance.

    Args:
        scatter: S (D, D), in double precision.
        free: f, the degrees of freedom.

    Returns:
        P (D, D), the identity if S is 0, as where each class has one image; and the shrinkage ρ, from 0 to 1.
    """
    width = len(scatter)
    covariance = scatter / max(1, free)
    variance = float(covariance.trace()) / width
    if not variance > 0:
        return torch.eye(width, dtype=scatter.dtype), 1.0
    shrinkage = oas_shrinkage(covariance, free)
    shrunk = (1 - shrinkage) * covariance
    shrunk.diagonal().add_((shrinkage + _TINY) * variance)
    return torch.cholesky_inverse(torch.linalg.cholesky(shrunk)), shrinkage


def oas_shrinkage(covariance: Tensor, free: int) -> float:
    """The shrinkage ρ, from 0 to 1, of a covariance (D, D) with some degrees of freedom."""
    mean = float(covariance.trace()) / len(covariance)
    square = float(covariance.square().mean())
    apart = (free + 1) * (square - mean**2 / len(covariance))
    return min(1.0, (square + mean**2) / apart) if apart > 0 else 1.0


def task_probabilities(scores: Tensor, task_of: Tensor, temperature: float) -> Tensor:
    """Probabilities (B, T) of tasks from scores (B, K) of classes, which belong to tasks (K,)."""
    classes = (scores / temperature).softmax(1)
    tasks = classes.new_zeros(len(scores), int(task_of[-1]) + 1)
    return tasks.index_add_(1, task_of, classes)


def fit_temperature(scored: Callable[[], Iterable[tuple[Tensor, Tensor]]], task_of: Tensor) -> float:
    """The temperature at which the tasks of images are most probable; 1 if all have the same task.

    Args:
        scored: Gives all images in groups (V_i), so that the scores of few are in memory: scores of the classes of all
            tasks (V_i, K), and positions of their own tasks (V_i,). It is called three times.
        task_of: Position of the task of each class (K,), in ascending order.
    """
    if not int(task_of[-1]):
        return 1.0
    best, step = (_HOTTEST + _COLDEST) / 2, (_HOTTEST - _COLDEST) / 10
    for _ in range(3):  # each time on a grid that is five times as fine
        exponents = torch.tensor([best + step * k for k in range(-5, 6)], dtype=torch.float64)
        parts = torch.stack([_log_probabilities(exponents, task_of, *group) for group in scored()])  # (groups, 1 + 11)
        count, *sums = parts.sum(0)
        best = float(exponents[(-torch.stack(sums) / count + _TIE * exponents.abs()).argmin()])
        step /= 5
    return float(10**best)


def _log_probabilities(exponents: Tensor, task_of: Tensor, scores: Tensor, tasks: Tensor) -> Tensor:
    """The number of images, and the sum of log p(own task | image) at each temperature 10^exponent (1 + E,)."""
    largest = scores.amax(1, keepdim=True)
    own, apart = _own_scores(scores, task_of, tasks) - largest, scores - largest
    powers, sums = torch.empty_like(apart), [float(len(tasks))]
    for exponent in exponents.tolist():
        whole = torch.mul(apart, 10**-exponent, out=powers).exp_().sum(1)
        found = (own * 10**-exponent).exp().sum(1) / whole  # (V,)
        sums.append(float(found.clamp_min(1e-30).log().sum()))
    return torch.tensor(sums, dtype=torch.float64)


def _own_scores(scores: Tensor, task_of: Tensor, tasks: Tensor) -> Tensor:
    """The scores of the classes of each image's own task (V, C), -infinity after them where others have more."""
    sizes = torch.bincount(task_of)
    places = torch.arange(int(sizes.max()))
    first = (sizes.cumsum(0) - sizes)[tasks]
    own = scores.gather(1, (first[:, None] + places).clamp_max(scores.shape[1] - 1))
    return own.masked_fill(places >= sizes[tasks][:, None], -torch.inf)
