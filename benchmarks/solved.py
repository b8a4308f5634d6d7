"""Compares solving a task's 48 chosen directions as a least-squares problem with training them by Adam.

    uv run python benchmarks/solved.py --weights dinov2_vits14.safetensors --tasks emoji/faces.csv --results logs/solved

Solvers minimise half the squared errors of ridge regression on indicators of the classes, where each image is
predicted by the head of all others. The head is eliminated (variable projection), and the strength of the ridge is
chosen by the same errors. Gauss-Newton takes its matrix from backward passes along three random directions of scores,
damps it as Levenberg and Marquardt do, and linearises at most twice. L-BFGS is scaled by such a matrix at the start.
Adam trains as `fit` does, from the same head, at the rate that is best on validation images of the first seed.

Every way keeps the epoch or step with the best validation accuracy under a logistic head. Work is counted in passes of
the network over the training images after the start; a backward pass, without gradients of weights, counts as one.
Differences to Adam are in percentage points, with a 95 % interval over tasks and seeds.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import sem, t
from torch import Tensor, nn

from recast_pl import BackboneConfig, SequentialTaskDataModule, TaskConfig
from recast_pl.decomposition.targets import weight_owners
from recast_pl.files import write_atomic
from recast_pl.learning.acceleration import skip_unread_tokens
from recast_pl.learning.features import Features
from recast_pl.learning.heads import solve_head
from recast_pl.methods.adaptation import EVERY_LAYER
from recast_pl.methods.lora_xs import SingularDirections
from recast_pl.methods.piece import select

RATES = (2e-3, 8e-3, 3.2e-2)
COUNT, RANK, BATCH = 48, 16, 32
EPOCHS, FEW = 10, 4
PASSES = 3 * FEW  # of an epoch: forward, backward, and forward for the features that the head is solved on

Images = tuple[Tensor, Tensor]
"""Images (N, 3, S, S) in [0, 1] and labels (N,)."""


class Network:
    """A frozen network whose layers are changed along singular directions, as `Chosen` does.

    Args:
        backbone: As `model.backbone.name`.
        weights: As `model.backbone.weights`.
        size: Height and width of images.
    """

    def __init__(self, backbone: str, weights: str, size: int) -> None:
        self.backbone = BackboneConfig(backbone, weights).build(size).requires_grad_(False)
        skip_unread_tokens(self.backbone.net, size)
        self.total = 0
        owners = weight_owners(self.backbone.net)
        for name in select("Chosen", owners, EVERY_LAYER):
            layer: Any = owners[name][0]
            layer.register_forward_hook(
                self._change(SingularDirections(layer.weight, RANK, True), self.total), prepend=True
            )
            self.total += RANK
        self.entries, self.values = torch.arange(self.total), torch.zeros(self.total)

    def _change(self, core: SingularDirections, first: int) -> Callable[[Any, Any, Tensor], Tensor]:
        def add(layer: Any, inputs: Any, output: Tensor) -> Tensor:
            own = torch.where((self.entries >= first) & (self.entries < first + RANK))[0]
            places = self.entries[own] - first
            hidden = inputs[0] @ core.right[places].T * self.values[..., None, own]  # (B, tokens, m)
            return output + hidden @ core.left[:, places].T if len(own) else output

        return add

    def __call__(self, images: Tensor, values: Tensor) -> Tensor:
        """Features (B, D) with values of the entries: (k,), or one set for each image (B, k)."""
        self.values = values
        features: Tensor = self.backbone(images)
        return features

    @torch.no_grad()
    def features(self, images: Images, values: Tensor) -> Features:
        """Features of many images."""
        parts = [self(batch, values) for batch in images[0].split(BATCH)]
        return Features(torch.cat(parts), images[1])

    def choose(self, images: Images, head: nn.Linear) -> None:
        """Chooses the entries with the largest gradients of cross-entropy."""
        self.entries = torch.arange(self.total)
        values, sums = torch.zeros(self.total, requires_grad=True), torch.zeros(self.total)
        for batch, labels in zip(images[0].split(BATCH), images[1].split(BATCH), strict=True):
            loss = F.cross_entropy(head(self(batch, values)), labels, reduction="sum")
            sums += torch.autograd.grad(loss, values)[0]
        self.entries = sums.abs().topk(COUNT).indices.sort().values


class Task:
    """A task at its start: its images, and the entries and the head that every way starts with.

    Args:
        network: The network.
        images: Images of the splits.
        flip: Whether training mirrors images at random.
    """

    def __init__(self, network: Network, images: dict[str, Images], flip: bool) -> None:
        self.network, self.images, self.flip = network, images, flip
        self.train, self.labels = images["train"]
        self.classes = int(self.labels.max()) + 1
        network.entries = torch.arange(0)
        self.zeros = torch.zeros(COUNT)
        self.start = network.features(images["train"], self.zeros)
        network.choose(images["train"], solve_head("logistic", self.start, self.classes))
        self.entries = network.entries


class Way:
    """One way to fit a task, with the passes over the training images that it has made and its best state."""

    def __init__(self, task: Task) -> None:
        self.task, self.passes = task, 0
        self.best, self.log = (-1.0, 0.0), list[tuple[float, float]]()
        self.head = self.judge(task.zeros, task.start)

    def features(self, values: Tensor) -> Features:
        """Features of the training images."""
        self.passes += 1
        return self.task.network.features(self.task.images["train"], values)

    def judge(self, values: Tensor, train: Features) -> nn.Linear:
        """Solves the head on training features of some values, and keeps both unless those before were better."""
        head = solve_head("logistic", train, self.task.classes)
        accuracy, loss = self.task.network.features(self.task.images["val"], values).score(head)
        if (accuracy, -loss) > self.best:
            self.best, self.state = (accuracy, -loss), (values.detach().clone(), head)
        return head

    def results(self) -> dict[str, Any]:
        """Accuracies in percent and cross-entropy of the best state so far, and what it took."""
        values, head = self.state
        accuracy, loss = self.task.network.features(self.task.images["test"], values).score(head)
        val = {"val": 100 * self.best[0], "val_loss": -self.best[1]}
        return val | {"accuracy": 100 * accuracy, "loss": loss, "passes": self.passes, "log": self.log}


def adam(task: Task, rate: float) -> Iterator[Way]:
    """Trains values and head by Adam with a rate for the values; returns after each epoch, the head solved again."""
    way, network = Way(task), task.network
    values = torch.zeros(COUNT, requires_grad=True)
    head = nn.Linear(way.head.in_features, task.classes)
    groups: list[Any] = [{"params": [values], "lr": rate}, {"params": head.parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, weight_decay=1e-6)
    head.load_state_dict(way.head.state_dict())
    while True:
        for batch in torch.randperm(len(task.labels)).split(BATCH):
            mirrored = (torch.rand(len(batch), 1, 1, 1) < 0.5) & task.flip
            inputs = torch.where(mirrored, task.train[batch].flip(-1), task.train[batch])
            loss = F.cross_entropy(head(network(inputs, values)), task.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        way.passes += 2
        head.load_state_dict(way.judge(values, way.features(values)).state_dict())
        yield way


class LeftOut:
    """Errors of ridge regression where each image is left out, as a function of the features.

    Args:
        features: Features (N, D) that choose the strength of the ridge.
        labels: (N,).
    """

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.target = F.one_hot(labels).double()
        self.unit = torch.eye(len(labels), dtype=torch.float64)
        x = features.double() - features.double().mean(0)
        strengths = float(x.square().sum() / len(x)) * torch.logspace(-4, 1, 16, dtype=torch.float64)
        self.strength = min(strengths, key=lambda strength: float(self.loss(features, strength)))

    def rest(self, features: Tensor, strength: Tensor | None = None) -> Tensor:
        """I − H (N, N) of the hat matrix H."""
        x = features.double() - features.double().mean(0)
        kernel = x @ x.T
        hat = torch.linalg.solve(kernel + (self.strength if strength is None else strength) * self.unit, kernel)
        return self.unit - hat - 1 / len(x)

    def loss(self, features: Tensor, strength: Tensor | None = None) -> Tensor:
        """Half the mean squared error. An image's error grows by 1/(1 − h) when it is left out."""
        rest = self.rest(features, strength)
        errors = rest @ self.target / rest.diagonal()[:, None]
        return errors.square().sum() / 2 / len(errors)

    def head(self, features: Tensor) -> Tensor:
        """The weight (D, C) of the head of all images."""
        x = features.double() - features.double().mean(0)
        return x.T @ torch.linalg.solve(x @ x.T + self.strength * self.unit, self.target)


def linearise(way: Way, values: Tensor, features: Tensor, objective: LeftOut, sketches: int) -> tuple[Tensor, Tensor]:
    """Gradient (k,) of the left-out loss, and its Gauss-Newton matrix (k, k) from some directions of scores.

    The derivative of errors neglects that of the projection, as Kaufman does: −(1 − h)⁻¹·(I − H)·dF·W.
    """
    task = way.task
    way.passes += 2 + sketches
    leaf = features.clone().requires_grad_()
    outer = torch.autograd.grad(objective.loss(leaf), leaf)[0]  # (N, D)
    basis = torch.linalg.svd(torch.ones(1, task.classes).double()).Vh[1:]  # scores sum to 1
    mixing = torch.linalg.qr(torch.randn(len(basis), sketches).double()).Q.T * (len(basis) / sketches) ** 0.5
    rows = ((mixing @ basis) @ objective.head(features).T).float()  # (sketches, D)
    gradient, products = torch.zeros(COUNT), list[Tensor]()
    for images, part in zip(task.train.split(BATCH), outer.split(BATCH), strict=True):
        each = values.detach().repeat(len(images), 1).requires_grad_()
        found = task.network(images, each)
        own, *others = (
            torch.autograd.grad(found, each, outputs, retain_graph=True)[0]
            for outputs in (part, *(row.expand_as(found) for row in rows))
        )
        gradient += own.sum(0)
        products.append(torch.stack(others))
    rest = objective.rest(features)
    errors = (rest / rest.diagonal()[:, None]) @ torch.cat(products, 1).double()  # (sketches, N, k)
    return gradient.double(), torch.einsum("snk,snl->kl", errors, errors) / len(features)


def gauss_newton(task: Task, sketches: int) -> Way:
    """Makes steps of Gauss-Newton while the passes last, and notes their predicted and actual decreases."""
    way, values, features, damping = Way(task), task.zeros, task.start.features, 0.1
    linear: tuple[LeftOut, Tensor, Tensor] | None = None
    while way.passes + (1 if linear else 3 + sketches) <= PASSES:
        if linear is None:
            objective = LeftOut(features, task.labels)
            linear = objective, *linearise(way, values, features, objective, sketches)
        objective, gradient, matrix = linear
        ridge = damping * (matrix.diagonal() + matrix.diagonal().mean()).diag()
        step = -torch.linalg.solve(matrix + ridge, gradient)
        found = way.features(values + step.float())
        predicted = -float(gradient @ step + step @ matrix @ step / 2)
        actual = float(objective.loss(features) - objective.loss(found.features))
        way.log.append((predicted, actual))
        damping *= 0.2 if actual > 0.75 * predicted else 1 if actual > 0.25 * predicted else 5
        if actual > 0:
            values, features, linear = values + step.float(), found.features, None
            way.judge(values, found)
    return way


def lbfgs(task: Task) -> Way:
    """Makes steps of L-BFGS while the passes last, on values scaled by the curvature at the start."""
    way, known = Way(task), [task.start]
    objective = LeftOut(task.start.features, task.labels)
    matrix = linearise(way, task.zeros, task.start.features, objective, 1)[1]
    scale = (matrix.diagonal() + matrix.diagonal().mean()).rsqrt().float()
    scaled = torch.zeros(COUNT, requires_grad=True)

    def closure() -> float:
        values = (scale * scaled).detach()
        features = known.pop() if known else way.features(values)
        way.judge(values, features)
        leaf = features.features.clone().requires_grad_()
        loss = objective.loss(leaf)
        (outer,) = torch.autograd.grad(loss, leaf)
        scaled.grad, inner = torch.zeros(COUNT), values.requires_grad_()
        way.passes += 2
        for images, part in zip(task.train.split(BATCH), outer.split(BATCH), strict=True):
            scaled.grad += scale * torch.autograd.grad(task.network(images, inner), inner, part)[0]
        return float(loss.detach())

    evaluations = (PASSES - way.passes + 1) // 3
    torch.optim.LBFGS([scaled], max_iter=evaluations, max_eval=evaluations, line_search_fn="strong_wolfe").step(closure)
    return way


def by_adam(task: Task, rate: float) -> dict[str, dict[str, Any]]:
    """Results of Adam after few epochs and after all."""
    ways = zip(range(1, EPOCHS + 1), adam(task, rate), strict=False)
    return {trained(rate, epoch): way.results() for epoch, way in ways if epoch in (FEW, EPOCHS)}


SOLVERS: dict[str, Callable[[Task], Way]] = {
    "Gauss-Newton": lambda task: gauss_newton(task, 3),
    "L-BFGS": lbfgs,
}


def take(data: SequentialTaskDataModule, split: str, count: int, seed: int) -> Images:
    """At most so many images of a split, evenly from its classes."""
    parts = [data.on_after_batch_transfer(batch, 0) for batch in data.plain_dataloader(split)]
    images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]
    order = order[torch.arange(min(count, len(order))) * len(order) // min(count, len(order))]
    return images[order], labels[order]


def fit(
    data: SequentialTaskDataModule, network: Network, flip: bool, count: int, rates: Iterable[float]
) -> dict[str, dict[str, Any]]:
    """Results of all ways on the current task of the data."""
    counts = {"train": count, "val": count // 2, "test": 10**6}
    images = {split: take(data, split, most, data.seed) for split, most in counts.items()}
    task = Task(network, images, flip)
    torch.manual_seed(data.seed)
    found = {"probe": Way(task).results()}
    for name, solve in SOLVERS.items():
        start = time.process_time()
        way = solve(task)
        seconds = time.process_time() - start
        found[name] = way.results() | {"seconds": seconds}
    for rate in rates:
        found |= by_adam(task, rate)
    return found


def measure(options: argparse.Namespace, tasks: list[TaskConfig]) -> dict[str, list[dict[str, Any]]]:
    """Results of each way for the seeds of each task; those in files are not computed again."""
    network = Network(options.backbone, options.weights, options.size)
    found: dict[str, list[dict[str, Any]]] = {}
    for index, task in enumerate(tasks):
        rates = set(RATES)
        for seed in options.seeds:
            file = options.results / f"{task.name}-{seed}.json"
            if not file.exists():
                data = SequentialTaskDataModule(tasks, image_size=options.size, batch_size=BATCH, seed=seed)
                data.prepare_data()
                data.select(index)
                write_atomic(file, json.dumps(fit(data, network, task.flip, options.images, rates), indent=1).encode())
            ways = json.loads(file.read_text())
            if seed == options.seeds[0]:
                chosen = max(RATES, key=lambda r: (ways[trained(r)]["val"], -ways[trained(r)]["val_loss"]))
                rates = {chosen}
            for epochs in (FEW, EPOCHS):
                ways[trained(None, epochs)] = ways[trained(chosen, epochs)]
            found.setdefault(task.name, []).append(ways)
    return found


def trained(rate: float | None = None, epochs: int = EPOCHS) -> str:
    """The name of Adam with some epochs and a rate; None for the chosen one."""
    return f"Adam, {epochs} epochs, {'chosen rate' if rate is None else f'{rate:g}'}"


def interval(values: Any) -> str:
    """Mean and 95 % interval."""
    return f"{np.mean(values):+.2f} ± {t.ppf(0.975, len(values) - 1) * sem(values):.2f}"


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_small_patch14_dinov2", help="as model.backbone.name")
    parser.add_argument("--weights", required=True, help="as model.backbone.weights")
    parser.add_argument("--tasks", type=Path, nargs="*", default=[], help="folders or CSV files of more tasks")
    parser.add_argument("--size", type=int, default=56)
    parser.add_argument("--images", type=int, default=80, help="at most so many training images of a task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1998, 3142592])
    parser.add_argument("--results", type=Path, required=True, help="folder that keeps results for the next time")
    options = parser.parse_args()
    tasks = [TaskConfig("digits", flip=False), *(TaskConfig(path.stem, str(path)) for path in options.tasks)]
    options.results.mkdir(parents=True, exist_ok=True)
    found = measure(options, tasks)
    print_ways(found)
    print_decreases(found)


def print_ways(found: dict[str, list[dict[str, Any]]]) -> None:
    """Prints a row for each way: accuracies by task, and differences to Adam over tasks and seeds."""
    print(f"| way | passes | {' | '.join(f'{task} %' for task in found)} | cross-entropy | points | cross-entropy |")
    print(f"|---|{'---:|' * (4 + len(found))}")
    runs = [run for seeds in found.values() for run in seeds]
    reference = np.array([(run[trained()]["accuracy"], run[trained()]["loss"]) for run in runs])
    for way in ("probe", *SOLVERS, trained(epochs=FEW), trained()):
        values = np.array([(run[way]["accuracy"], run[way]["loss"]) for run in runs])
        gains = values - reference
        passes = max(run[way]["passes"] for run in runs)
        accuracies = [f"{np.mean([run[way]['accuracy'] for run in seeds]):.2f}" for seeds in found.values()]
        shown = f"{interval(gains[:, 0])} | {interval(gains[:, 1])}" if way != trained() else "|"
        print(f"| {way} | {passes} | {' | '.join(accuracies)} | {values[:, 1].mean():.3f} | {shown} |")


def print_decreases(found: dict[str, list[dict[str, Any]]]) -> None:
    """Prints what Gauss-Newton's steps were to gain and what they gained, in the mean over seeds."""
    print("\n| task | step | predicted decrease | actual decrease |\n|---|---:|---:|---:|")
    for task, runs in found.items():
        for step, decreases in enumerate(zip(*(run["Gauss-Newton"]["log"] for run in runs), strict=False), start=1):
            predicted, actual = np.mean(decreases, 0)
            print(f"| {task} | {step} | {predicted:.4f} | {actual:.4f} |")


if __name__ == "__main__":
    main()
