"""Measures how well the task of an image is found by class means and one shared covariance, without any training.

    uv run python benchmarks/frozen_routing.py --weights dinov2_vits14.safetensors --size 70 --manifests emoji/*.csv

Streams are clip art, clip art and digits, the manifests, and these with clip art. Numbers are percentages of the test
images, averaged over seeds, except for bytes and passes.

The first table: images whose task is the likeliest, or among the two likeliest, and whose class is the likeliest of all
classes of all tasks (joint); by the nearest class mean, and by the router with means in several precisions (int8 with
one scale a class), and with features projected onto the leading principal directions of the first task's classes.

The second table: accuracy where the class is that of the likeliest task's own head (one), where the second likeliest
task is asked, too (two), the same with a temperature for each head, which fits its validation images best
(calibrated), and where the task is known (oracle). Heads are on the same frozen features, so that this is the routed
accuracy of `LinearProbe`. The last column counts passes of the network for both candidates.

The third table: how well images of a task that was left out are told from known ones, averaged over the tasks: the area
under the ROC curve; unknown images that are not refused where 5 % of the known test images are; and what is refused
with a threshold set on validation images to 5 %.

The fourth table: classifiers over all classes of all tasks, how many of the test images they classify correctly, the
kilobytes a class of their sums in single precision, and the seconds of processor time to learn and solve a stream.
RanPAC has the paper's 10,000 random features on clip art alone, where it takes a minute and 4 GB of memory.
"""

import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from small_patches import Split, read_features, read_options
from torch import Tensor, nn

from recast_pl import LDA, NCM, FeCAM, JointClassifier, RanPAC
from recast_pl.inference.prediction import Candidates, Prediction, find_candidates
from recast_pl.learning.features import Features
from recast_pl.learning.heads import HeadKind, solve_head
from recast_pl.learning.router import Router, precision_matrix
from recast_pl.learning.signature import Signature

CLIPART = ["food", "people", "recreation", "signs"]

MAHALANOBIS, LARGEST = "Mahalanobis distance", "largest score of a class"

HEADS: tuple[HeadKind, ...] = ("logistic", "lda", "ridge")

Tasks = Mapping[str, Mapping[str, Split]]


def streams(tasks: Tasks) -> dict[str, list[str]]:
    """Names of the tasks of each stream."""
    others = [name for name in tasks if name not in (*CLIPART, "digits")]
    found = {"clip art": CLIPART, "clip art, digits": [*CLIPART, "digits"]}
    return found | ({"manifests": others, "manifests, clip art": [*others, *CLIPART]} if others else {})


def sign(name: str, splits: Mapping[str, Split]) -> Signature:
    """The signature of a task, from features in any number of dimensions."""
    classes = [str(label) for label in range(int(splits["train"][1].max()) + 1)]
    return Signature.of(Features(*splits["train"]), Features(*splits["val"]), name, classes, "0" * 64, 1)


def test_images(tasks: Tasks, names: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, D) of the test images of some tasks, positions of the tasks (N,), and classes within them (N,)."""
    parts = [tasks[name]["test"] for name in names]
    sizes = torch.tensor([len(labels) for _, labels in parts])
    owners = torch.arange(len(parts)).repeat_interleave(sizes)
    return torch.cat([x for x, _ in parts]), owners, torch.cat([y for _, y in parts])


def rounded(signature: Signature, precision: str) -> Signature:
    """A signature whose means are as a file of this precision would keep them."""
    means, limit = signature.means, {"int8": 127, "int4": 7}.get(precision)
    if limit is not None:
        scale = (means.abs().amax(1, keepdim=True) / limit).half().double()
        means = (means / scale).round() * scale
    return Signature(**{**vars(signature), "means": means})


def projected(tasks: Tasks, names: Sequence[str], width: int) -> Tasks:
    """Tasks whose features are multiplied by the leading principal directions of the first one's (width, D)."""
    first = tasks[names[0]]["train"][0].double()
    rows = torch.linalg.svd(first - first.mean(0), full_matrices=False)[2][:width].float()
    return {name: {s: (x @ rows.T, y) for s, (x, y) in tasks[name].items()} for name in names}


def accuracies(router: Router, images: tuple[Tensor, Tensor, Tensor]) -> list[float]:
    """How many images have their task first, among the first two, and their class first of all."""
    x, owners, labels = images
    order = router.route(x).tasks.argsort(dim=1, descending=True)
    sizes = torch.bincount(router.task_of.long())
    joint = router.scores(x).argmax(1) == (sizes.cumsum(0) - sizes)[owners] + labels
    hits = (order[:, 0] == owners, (order[:, :2] == owners[:, None]).any(1), joint)
    return [100 * float(hit.double().mean()) for hit in hits]


def nearest_mean(signatures: Sequence[Signature], images: tuple[Tensor, Tensor, Tensor]) -> list[float]:
    """The same by the nearest class mean."""
    x, owners, labels = images
    near = torch.stack([torch.cdist(x.double(), s.means).amin(1) for s in signatures], 1).argsort(dim=1)
    every = torch.cat([s.means for s in signatures])
    sizes = torch.tensor([len(s.classes) for s in signatures])
    joint = torch.cdist(x.double(), every).argmin(1) == (sizes.cumsum(0) - sizes)[owners] + labels
    hits = (near[:, 0] == owners, (near[:, :2] == owners[:, None]).any(1), joint)
    return [100 * float(hit.double().mean()) for hit in hits]


def head_temperature(head: nn.Linear, validation: Split) -> float:
    """The temperature of the least cross-entropy of validation images."""
    x, labels = validation
    logits = head(x).detach()
    return float(min(10 ** torch.linspace(-1, 1, 101), key=lambda t: float(F.cross_entropy(logits / t, labels))))


def routed(tasks: Tasks, names: Sequence[str], router: Router, kind: HeadKind) -> list[float]:
    """Accuracy by one candidate, two, two with calibrated heads and the true task, and passes for two candidates."""
    x, owners, labels = test_images(tasks, names)
    plain, calibrated = {}, {}
    for name in names:
        train = Features(*tasks[name]["train"])
        head = solve_head(kind, train, int(train.labels.max()) + 1)
        plain[name] = head(x).detach().softmax(1)
        calibrated[name] = (head(x).detach() / head_temperature(head, tasks[name]["val"])).softmax(1)

    def prediction(image: int, task: str, probabilities: Mapping[str, Tensor] = plain) -> Prediction:
        row = probabilities[task][image].tolist()
        best = max(range(len(row)), key=row.__getitem__)
        return Prediction(task, str(best), row[best], {})

    def right(answers: Iterator[Prediction]) -> float:
        truth = zip(owners.tolist(), labels.tolist(), strict=True)
        pairs = zip(answers, truth, strict=True)
        return 100 * float(np.mean([(a.task, a.label) == (names[task], str(label)) for a, (task, label) in pairs]))

    candidates: list[Candidates] = find_candidates(router.tasks, router.route(x), refuse=0)
    one = right(prediction(i, each.asked[0]) for i, each in enumerate(candidates))
    two = right(each.answer([prediction(i, task) for task in each.asked]) for i, each in enumerate(candidates))
    same = right(
        each.answer([prediction(i, task, calibrated) for task in each.asked]) for i, each in enumerate(candidates)
    )
    oracle = right(prediction(i, names[task]) for i, task in enumerate(owners.tolist()))
    return [one, two, same, oracle, float(np.mean([len(each.asked) for each in candidates]))]


def rejection(tasks: Tasks, names: Sequence[str], unknown: str) -> dict[str, list[float]]:
    """Measures of each score for images of an unknown task: AUROC, FPR at 95 %, and refused known and unknown ones."""
    signatures = [sign(name, tasks[name]) for name in names]
    router = Router(signatures)
    known = scores(router, signatures, test_images(tasks, names)[0])
    other = scores(router, signatures, tasks[unknown]["test"][0])
    validation = scores(router, signatures, torch.cat([tasks[name]["val"][0] for name in names]))
    for each in (known, other, validation):
        each["Mahalanobis distance and largest score"] = sum(
            (each[way] - validation[way].mean()) / validation[way].std() for way in (MAHALANOBIS, LARGEST)
        )
    found = {}
    for way, values in known.items():
        labels = np.r_[np.zeros(len(values)), np.ones(len(other[way]))]
        area = roc_auc_score(labels, np.r_[values, other[way]])
        missed = (other[way] <= np.quantile(values, 0.95)).mean()
        threshold = np.quantile(validation[way], 0.95)
        found[way] = [100 * v for v in (area, missed, (values > threshold).mean(), (other[way] > threshold).mean())]
    return found


def scores(router: Router, signatures: Sequence[Signature], x: Tensor) -> dict[str, np.ndarray]:
    """How strange images are, by several scores."""
    logits, routes = router.scores(x), router.route(x)
    evidence = router._evidence(x, logits)
    counts = torch.cat([s.counts for s in signatures]).double()[:, None]
    means = torch.cat([s.means for s in signatures])
    centre = (counts * means).sum(0) / counts.sum()
    total = sum(s.scatter.matrix for s in signatures) + (counts * (means - centre)).T @ (means - centre)
    apart = x.double() - centre
    background = ((apart @ precision_matrix(total, int(counts.sum()) - 1)[0]) * apart).sum(1)
    return {
        MAHALANOBIS: evidence[:, 0].numpy(),
        "relative Mahalanobis distance": (evidence[:, 0] - background).numpy(),
        LARGEST: -logits.amax(1).numpy(),
        "energy": -(logits / router.temperature).logsumexp(1).numpy(),
        "1 − largest probability of a class": -(logits / router.temperature).softmax(1).amax(1).numpy(),
        "1 − largest probability of a task": evidence[:, 1].numpy(),
        "the sum that the router uses": -routes.familiar.numpy(),
    }


def classifiers(tasks: Tasks, names: Sequence[str]) -> Iterator[tuple[str, list[float]]]:
    """Accuracy in percent, kilobytes a class, and seconds of each classifier over all classes of some tasks."""
    x, owners, labels = test_images(tasks, names)
    sizes = torch.tensor([int(tasks[name]["train"][1].max()) + 1 for name in names])
    starts = sizes.cumsum(0) - sizes
    truth, classes = starts[owners] + labels, int(sizes.sum())

    def row(scores: Tensor, numbers: int, began: float) -> list[float]:
        right = 100 * float((scores.argmax(1) == truth).double().mean())
        return [right, 4 * numbers / classes / 1000, time.process_time() - began]

    began, width = time.process_time(), x.shape[1]
    router = Router([sign(name, tasks[name]) for name in names])
    yield "the router", row(router.scores(x), classes * width + width**2, began)
    sizes_of_ranpac = (2000, 5000, 10_000) if list(names) == CLIPART else (2000, 5000)
    ways: dict[str, JointClassifier] = {"NCM": NCM(), "LDA": LDA(), "FeCAM": FeCAM()}
    for way, classifier in (ways | {f"RanPAC, M = {size:,}": RanPAC(size) for size in sizes_of_ranpac}).items():
        began = time.process_time()
        for name, start in zip(names, starts, strict=True):
            images, own = tasks[name]["train"]
            classifier.update(images, own + start)
        yield way, row(classifier.scores(x), classifier.numbers, began)


def print_classifiers(by_seed: Sequence[Tasks]) -> None:
    """Prints the table of classifiers over all classes."""
    print("\n| stream | classes | classifier | joint | kB a class | seconds |\n|---|---:|---|---:|---:|---:|")
    for stream, names in streams(by_seed[0]).items():
        rows: dict[str, list[list[float]]] = {}
        for tasks in by_seed:
            for way, values in classifiers(tasks, names):
                rows.setdefault(way, []).append(values)
        classes = sum(int(by_seed[0][name]["train"][1].max()) + 1 for name in names)
        for way, of_seeds in rows.items():
            right, size, seconds = np.mean(of_seeds, 0)
            print(f"| {stream} | {classes} | {way} | {right:.1f} | {size:,.1f} | {seconds:.1f} |", flush=True)


def main() -> None:
    found = read_features(read_options(__doc__))
    seeds = sorted({name.rpartition(" ")[2] for name in found})
    by_seed = [{n.rpartition(" ")[0]: s for n, s in found.items() if n.endswith(f" {seed}")} for seed in seeds]
    kinds = streams(by_seed[0])
    width = next(iter(found.values()))["train"][0].shape[1]
    print("| stream | tasks | classes | way | task | of two | joint | bytes a class |")
    print("|---|---:|---:|---|---:|---:|---:|---:|")
    for stream, names in kinds.items():
        rows: dict[tuple[str, int | None], list[list[float]]] = {}
        for tasks in by_seed:
            signatures, images = [sign(name, tasks[name]) for name in names], test_images(tasks, names)
            rows.setdefault(("nearest mean, fp32", 4 * width), []).append(nearest_mean(signatures, images))
            for way, size in {"fp16": 2 * width, "int8": width + 2, "int4": width // 2 + 2}.items():
                router = Router(rounded(signature, way) for signature in signatures)
                rows.setdefault((f"router, {way}", size + 4), []).append(accuracies(router, images))
            for columns in (128, 64):
                smaller = projected(tasks, names, columns)
                router = Router(sign(name, smaller[name]) for name in names)
                row = accuracies(router, test_images(smaller, names))
                rows.setdefault((f"router, fp16, {columns} directions", 2 * columns + 4), []).append(row)
        classes = sum(int(by_seed[0][name]["train"][1].max()) + 1 for name in names)
        for (way, size), values in rows.items():
            cells = " | ".join(f"{mean:.1f}" for mean in np.mean(values, 0))
            print(f"| {stream} | {len(names)} | {classes} | {way} | {cells} | {size:,} |")
    print("\n| stream | head | one | two | calibrated | oracle | passes for two |\n|---|---|---:|---:|---:|---:|---:|")
    for stream, names in kinds.items():
        for kind in HEADS:
            values = [routed(t, names, Router(sign(name, t[name]) for name in names), kind) for t in by_seed]
            *shares, passes = np.mean(values, 0)
            cells = " | ".join(f"{share:.1f}" for share in shares)
            print(f"| {stream} | {kind} | {cells} | {1 + passes:.2f} |", flush=True)
    print("\n| known | unknown | score | AUROC | not refused at 95 % | known refused | unknown refused |")
    print("|---|---|---|---:|---:|---:|---:|")
    pairs = {
        (stream, "each task in turn"): [([n for n in names if n != u], u) for u in names]
        for stream, names in kinds.items()
    }
    pairs |= {(stream, "digits"): [(names, "digits")] for stream, names in kinds.items() if "digits" not in names}
    for (stream, unknown), cases in pairs.items():
        measured = [rejection(tasks, *case) for tasks in by_seed for case in cases]
        for way in measured[0]:
            cells = " | ".join(f"{mean:.1f}" for mean in np.mean([each[way] for each in measured], 0))
            print(f"| {stream} | {unknown} | {way} | {cells} |")
    print_classifiers(by_seed)


if __name__ == "__main__":
    main()
