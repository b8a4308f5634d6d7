"""Linear heads that are solved on cached features: logistic regression, linear discriminant analysis, and ridge."""

from collections.abc import Callable, Iterator
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recast_pl.errors import RunError
from recast_pl.learning.features import Features
from recast_pl.linalg import eigen

HeadKind = Literal["sgd", "logistic", "lda", "ridge"]

_FOLDS = 3

_DECAYS = [10.0**exponent for exponent in (1, 0, -1, -2, -3, -4)]
"""Weight decays of logistic regression to choose from, strongest first; features have a mean variance of 1."""

_ROUGH, _CONVERGED = 1e-3, 1e-7
"""Largest entry of the gradient of a mean over images at which L-BFGS stops: to compare decays, and in the end."""

_SHRINKAGES = torch.logspace(-4, 0, 13, dtype=torch.float64)
"""Shrinkages of a covariance, and strengths of a ridge, to choose from; relative to the mean variance of a feature."""

_TINY = 1e-9
"""Least variance of a direction; the mean variance is 1."""

_SMOOTHING = 0.01
"""Label smoothing of the loss that calibrates scores: without it, those that are always right would have no limit."""

_TEMPERATURES = torch.logspace(-2, 2, 41, dtype=torch.float64)
"""Factors of scores to choose from, by which they are calibrated."""

_SMALL = 10**7
"""Images × features × classes below which a head is solved on the CPU; a GPU waits for thousands of short kernels.

That was seen beside an H200 with about 10⁶. Where the two are equally fast was not measured.
"""


def solve_head(
    kind: HeadKind, train: Features, classes: int, balanced: bool = False, smoothing: float = 0.0
) -> nn.Linear:
    """Solves a head on the features of the training images, in double precision.

    Args:
        kind: `logistic`, `lda` or `ridge`.
        train: Features (N, D) and labels (N,).
        classes: C, the number of classes; each needs at least one image.
        balanced: Whether every class has the same weight, however many images it has.
        smoothing: Label smoothing of logistic regression, from 0 to 1.

    Returns:
        The head, in single precision on the device of the features.
    """
    device = train.features.device
    on_cpu = device.type == "mps" or train.features.numel() * classes < _SMALL  # MPS has no double precision
    x = (train.features.cpu() if on_cpu else train.features).double()
    y = train.labels.to(x.device)
    mean, scale = x.mean(0), x.var(0, correction=0).mean().sqrt().clamp_min(1e-12)
    weights = class_weights(y, classes)[y] if balanced else torch.ones_like(y, dtype=x.dtype)
    weight, bias = _SOLVERS[kind]((x - mean) / scale, y, classes, weights, smoothing)
    head = nn.Linear(x.shape[1], classes)
    with torch.no_grad():
        head.weight.copy_(weight / scale)
        head.bias.copy_(bias - weight @ mean / scale)
    return head.to(device)


def check_head_options(kind: str, smoothing: float) -> None:
    """Raises RunError if an option of the head is out of range, or label smoothing does not go with its kind."""
    if kind not in get_args(HeadKind):
        raise RunError(f"model.head={kind!r} is unknown; choose one of {', '.join(get_args(HeadKind))}")
    if not 0 <= smoothing < 1:
        raise RunError(f"model.label_smoothing={smoothing} must be at least 0 and below 1")
    if smoothing and kind in ("lda", "ridge"):
        raise RunError(f"model.label_smoothing={smoothing} does not go with head {kind}; choose logistic or sgd, or 0")


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """Weights (C,) in double precision with which all classes count the same; their mean over the images is 1."""
    counts = torch.bincount(labels, minlength=classes).double()
    return len(labels) / ((counts > 0).sum() * counts.clamp_min(1))


def classification_loss(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy, the mean over images.

    Args:
        logits: (B, C); minus infinity for classes that the head of an image does not have.
        labels: (B,).
        weights: Weights of the images (B,); None for 1.
        smoothing: Label smoothing, over the classes that the head of an image has.
    """
    if weights is None and not smoothing:
        return F.cross_entropy(logits, labels)
    errors, known = F.cross_entropy(logits, labels, reduction="none"), logits.isfinite()
    uniform = -logits.log_softmax(1).masked_fill(~known, 0).sum(1) / known.sum(1)
    errors = (1 - smoothing) * errors + smoothing * uniform
    return errors.mean() if weights is None else (weights * errors).mean()


Solution = tuple[Tensor, Tensor]
"""Weight (C, D) and bias (C,) of a head."""


def solve_logistic(x: Tensor, y: Tensor, classes: int, weights: Tensor, smoothing: float) -> Solution:
    """Logistic regression to convergence by L-BFGS, with the weight decay that 3-fold cross-validation chooses.

    Args:
        x: Features (N, D) of mean 0.
        y: Labels (N,).
        classes: C.
        weights: Weights of the images (N,).
        smoothing: Label smoothing.
    """
    values, vectors = eigen((weights[:, None] * x).T @ x / weights.sum())
    used = values > 1e-12 * values.max()  # with few images, most directions are empty
    values, vectors = values[used], vectors[:, used]
    x = x @ vectors  # a rotation, which changes no norm
    train, left_out = _folds(y)
    x_train, y_train, weights_train = x[train], y[train], weights[train]
    solutions = x.new_zeros(len(train), classes, x.shape[1]), x.new_zeros(len(train), classes)
    losses: list[float] = []
    for decay in _DECAYS:
        solutions = _minimise(x_train, y_train, values, weights_train, smoothing, decay, solutions, _ROUGH)
        losses.append(_loss(x, y, weights * left_out, solutions))
        if losses[-1] > min(losses):  # weaker decays overfit more, and take longest
            break
    decay = _DECAYS[losses.index(min(losses))]
    start = solutions[0].mean(0, keepdim=True), solutions[1].mean(0, keepdim=True)
    (weight,), (bias,) = _minimise(x[None], y[None], values, weights[None], smoothing, decay, start, _CONVERGED)
    return weight @ vectors.T, bias


def _loss(x: Tensor, y: Tensor, weights: Tensor, solutions: Solution) -> float:
    """The cross-entropy of several heads, each on the images that have a weight (F, N) for it."""
    logs = (x @ solutions[0].mT + solutions[1][:, None]).log_softmax(2)
    return -float((weights * logs[:, torch.arange(len(y), device=y.device), y]).sum())


def _folds(y: Tensor) -> tuple[Tensor, Tensor]:
    """Which images (F, M) to train on, and masks (F, N) of those left out, for each fold.

    The images of a class are spread over all folds. All train on equally many, so one image may be in neither.
    """
    order = torch.argsort(y, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(y), device=y.device)
    count = min(_FOLDS, len(y))
    masks = place % count == torch.arange(count, device=y.device)[:, None]
    size = int((~masks).sum(1).min())
    return torch.stack([torch.nonzero(~mask)[:size, 0] for mask in masks]), masks


def _minimise(
    x: Tensor,
    y: Tensor,
    values: Tensor,
    weights: Tensor,
    smoothing: float,
    decay: float,
    start: Solution,
    tolerance: float,
) -> Solution:
    """Minimises cross-entropy plus decay/2·‖W‖² by L-BFGS, for F sets of images at once.

    Args:
        x: Features (F, N, D) in the eigenvectors of their covariance.
        y: Labels (F, N).
        values: Eigenvalues (D,). They give the curvature in each direction; steps are scaled by it, because L-BFGS then
            needs several times fewer of them.
        weights: Weights of the images (F, N).
        smoothing: Label smoothing.
        decay: The weight decay.
        start: Where to start: (F, C, D) and (F, C).
        tolerance: The largest entry of the gradient at which to stop.

    Returns:
        Weights (F, C, D) and biases (F, C).
    """
    classes = start[1].shape[1]
    scale = (values / classes + decay).rsqrt()  # (D,)
    scaled = torch.cat([x * scale, x.new_ones(*x.shape[:-1], 1)], -1)  # (F, N, D + 1)
    decays = torch.cat([decay * scale.square(), x.new_zeros(1)])
    shares = (weights / weights.sum(1, keepdim=True).clamp_min(_TINY))[:, :, None]
    targets = shares * ((1 - smoothing) * F.one_hot(y, classes) + smoothing / classes)  # (F, N, C)
    steps = torch.cat([start[0] / scale, start[1][:, :, None]], 2)  # (F, C, D + 1)
    optimizer = torch.optim.LBFGS([steps], 1.0, 500, None, tolerance, 1e-12, 20, "strong_wolfe")

    def closure() -> Tensor:  # the gradient is written out, because autograd takes as long as everything else
        logs, pull = (scaled @ steps.mT).log_softmax(2), decays * steps
        steps.grad = (shares * logs.exp() - targets).mT @ scaled + pull
        return (pull * steps).sum() / 2 - (targets * logs).sum()

    optimizer.step(closure)
    return steps[:, :, :-1] * scale, steps[:, :, -1]


def solve_lda(x: Tensor, y: Tensor, classes: int, weights: Tensor, smoothing: float) -> Solution:
    """Linear discriminant analysis with one shrunk covariance S for all classes; arguments as for `solve_logistic`.

        S_γ = (1 − γ)·S + γ·(tr S / D)·I

    γ is the one with which most images are recognised when each is left out (then, the smallest cross-entropy). Leaving
    one out changes a class mean and S by a term of rank one, so that no system is solved again (Sherman and Morrison).
    """
    counts = torch.bincount(y, minlength=classes).double()
    means = x.new_zeros(classes, x.shape[1]).index_add_(0, y, x) / counts[:, None]
    own = x - means[y]
    values, vectors = eigen(own.T @ own)
    priors = torch.bincount(y, weights, classes) / weights.sum()
    x, own, means, values = x @ vectors, own @ vectors, means @ vectors, values.clamp_min(0)
    free = max(1, len(x) - classes)
    trace = values.sum() / len(values)
    scores = (_lda_left_out(float(g), x, y, own, means, values, counts, priors) for g in _SHRINKAGES)
    judged = weights * (counts[y] > 1)  # the only image of a class cannot be recognised without itself
    gamma, temperature = _choose(scores, y, judged)
    precision = free / ((1 - gamma) * values + gamma * trace).clamp_min(_TINY)  # (D,)
    weight = means * precision
    bias = priors.log() - (weight * means).sum(1) / 2
    return temperature * (weight @ vectors.T), temperature * bias


def _lda_left_out(
    gamma: float, x: Tensor, y: Tensor, own: Tensor, means: Tensor, values: Tensor, counts: Tensor, priors: Tensor
) -> Tensor:
    """Scores (N, C) of each image by a discriminant that has not seen it, in the eigenvectors of the scatter.

    Args:
        gamma: The shrinkage.
        x: Features (N, D).
        y: Labels (N,).
        own: Features without the mean of the class (N, D).
        means: Means of the classes (C, D).
        values: Eigenvalues of the scatter within classes (D,).
        counts: Images of each class (C,).
        priors: Prior probabilities (C,).
    """
    n = counts[y]
    factor = n / (n - 1).clamp_min(1)  # the scatter loses factor·d·dᵀ, and d grows by it
    free = max(1, len(x) - 1 - len(means))
    trace = (values.sum() - factor * own.square().sum(1)).clamp_min(0) / len(values)  # (N,)
    precision = free / ((1 - gamma) * values + gamma * trace[:, None]).clamp_min(_TINY)  # (N, D)
    gain = (1 - gamma) * factor / free
    d = precision * own
    spread = (d * own).sum(1)  # dᵀ·P·d
    correction = gain / (1 - gain * spread).clamp_min(1e-6)
    square = (precision * x * x).sum(1, keepdim=True) - 2 * (precision * x) @ means.T + precision @ means.square().T
    cross = (d * x).sum(1, keepdim=True) - d @ means.T  # (N, C)
    rows = torch.arange(len(y), device=y.device)
    square[rows, y], cross[rows, y] = factor**2 * spread, factor * spread
    scores: Tensor = priors.log() - (square + correction[:, None] * cross.square()) / 2
    return scores


def solve_ridge(x: Tensor, y: Tensor, classes: int, weights: Tensor, smoothing: float) -> Solution:
    """Ridge regression on indicators of the classes; arguments as for `solve_logistic`.

    The strength is the one with which most images are recognised when each is left out. The prediction for an image
    that is left out has the closed form y − (y − ŷ) / (1 − h), with h the image's entry of the hat matrix.
    """
    root = weights.sqrt()[:, None]
    target = F.one_hot(y, classes).to(x)
    mean, level = (weights @ x) / weights.sum(), (weights @ target) / weights.sum()
    rows, goal = root * (x - mean), root * (target - level)
    values, vectors = eigen(rows.T @ rows)
    values = values.clamp_min(0)
    rotated, moments = rows @ vectors, vectors.T @ (rows.T @ goal)
    strengths = values.mean().clamp_min(_TINY) * _SHRINKAGES.to(x) * 10
    share = weights / weights.sum()

    def left_out(strength: Tensor) -> Tensor:
        inverse = 1 / (values + strength)
        residual = goal - rotated @ (inverse[:, None] * moments)
        hat = rotated.square() @ inverse + share
        scores: Tensor = target - residual / (root * (1 - hat[:, None]).clamp_min(1e-6))
        return scores

    strength, temperature = _choose((left_out(s) for s in strengths), y, weights, strengths)
    weight = temperature * (vectors @ (moments / (values + strength)[:, None])).T
    return weight, temperature * level - weight @ mean


def _choose(
    scores: Iterator[Tensor], y: Tensor, weights: Tensor, settings: Tensor = _SHRINKAGES
) -> tuple[float, float]:
    """The setting whose left-out scores recognise most images, and the factor of the scores that calibrates it."""
    best, chosen = (-1.0, 0.0), (0.0, 1.0)
    for setting, score in zip(settings, scores, strict=True):
        right = float(weights[score.argmax(1) == y].sum())
        losses = torch.stack([_calibration_loss(t * score, y, weights) for t in _TEMPERATURES])
        if (right, -float(losses.min())) > best:
            best, chosen = (right, -float(losses.min())), (float(setting), float(_TEMPERATURES[int(losses.argmin())]))
    return chosen


def _calibration_loss(scores: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    errors = F.cross_entropy(scores, y, reduction="none", label_smoothing=_SMOOTHING)
    return (weights * errors).sum()


_SOLVERS: dict[str, Callable[[Tensor, Tensor, int, Tensor, float], Solution]] = {
    "logistic": solve_logistic,
    "lda": solve_lda,
    "ridge": solve_ridge,
}
