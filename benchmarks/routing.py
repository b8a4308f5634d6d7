"""Measures trained tasks where nobody names the task of an image: methods with the router, and LDA alone.

    python benchmarks/routing.py --weights dinov2_vits14.safetensors --emoji emoji --device cuda --output logs/routing

Streams are `clipart`, `emoji` (the manifests TASK.csv in the folder `--emoji`), `both` of them, and `digits`, which is
clip art and digits. Every seed shuffles the order of tasks. The methods keep tasks apart, so a task is the same in each
stream: it is trained once for each seed and method, and a stream puts its tasks together in the shuffled order.

There is one JSON for each stream, seed and method in the folder `--output`. A run that was interrupted continues there;
several processes may share the folder, each with other `--seeds`. At the end comes a table of all JSONs of the folder,
means and standard deviations over seeds. Accuracies are percentages of test images, averages over tasks:

- oracle: the task is known; routed: task and class are found by the router and the heads of up to two tasks
- joint: the class is the likeliest of all by the router's discriminant, or by LDA
- gain: the routed accuracy less the joint accuracy of LDA alone
- task, of two: the task is the likeliest, or among the two likeliest
- AUROC, missed: each task in turn is left out. How well its images are told from known ones by how familiar the router
  finds them, and which percentage of them is not refused where 5 % of the known ones are
- bytes a class: the patches, and what the router keeps; without the matrix that all classes share
- passes, ms: passes of the network for an image, and milliseconds for an image in batches of 64, routed; then the same
  milliseconds where the task is known

It needs no jsonargparse.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import StepLR

from recast_pl import (
    LDA,
    BackboneConfig,
    BankLayout,
    FullFineTune,
    LinearProbe,
    LoRA,
    Piece,
    Predictor,
    Recast,
    Router,
    SequentialTaskDataModule,
    Signature,
    TaskConfig,
    TILModule,
    load,
)
from recast_pl.files import json_text, write_atomic
from recast_pl.learning.features import Features
from recast_pl.learning.trainer import TrainerFactory
from recast_pl.runs.evaluation import split_features
from recast_pl.runs.folder import RunFolder
from recast_pl.runs.stream import Stream

CLIPART = Path(__file__).parents[1] / "data" / "clipart"
PICTURES = ["food", "people", "recreation", "signs"]
EMOJI = [f"emoji_{n}" for n in ("activities", "animals", "faces", "food", "objects", "people", "symbols", "travel")]
STREAMS = {"clipart": PICTURES, "emoji": EMOJI, "both": [*PICTURES, *EMOJI], "digits": [*PICTURES, "digits"]}

METHODS: dict[str, Callable[[], Piece]] = {
    "probe": LinearProbe,
    "recast": lambda: Recast(BankLayout([r"mlp\.fc[12]\.weight"], groups=6, templates=2, coefficient_sets=2)),
    "lora": LoRA,
    "full": FullFineTune,
}
ALONE = "lda"

SETTINGS = ("backbone", "size", "epochs", "rate", "batch", "head")

COLUMNS = {
    **{"oracle": "oracle", "routed": "routed", "joint": "joint", "gain": "gain", "task": "task", "of_two": "of two"},
    **{"auroc": "AUROC", "missed": "missed", "bytes_per_class": "bytes a class", "passes": "passes", "ms": "ms"},
    "known_ms": "ms, known",
}

Measures = dict[str, Any]
Frozen = Mapping[str, Mapping[str, Features]]
"""Features of the frozen network, on the CPU, by task and split."""


def declare_runs(parser: argparse.ArgumentParser) -> None:
    """Adds the options that a `Seed` reads."""
    parser.add_argument("--output", type=Path, required=True, help="folder of the results, and of runs below it")
    parser.add_argument("--weights", required=True, help="as model.backbone.weights")
    parser.add_argument("--backbone", default="vit_small_patch14_dinov2", help="as model.backbone.name")
    parser.add_argument("--emoji", type=Path, help="folder of the manifests")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1998, 3142592])
    parser.add_argument("--size", type=int, default=98)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rate", type=float, default=8e-3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--head", default="logistic", help="as model.head")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    declare_runs(parser)
    parser.add_argument("--streams", nargs="+", choices=STREAMS, default=list(STREAMS))
    parser.add_argument("--methods", nargs="+", choices=[ALONE, *METHODS], default=[ALONE, "probe", "recast"])
    return parser.parse_args()


class Seed:
    """The tasks of one seed, in shuffled order: their images, their features, and their runs."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.options, self.seed = options, seed
        wanted = {name for stream in options.streams for name in STREAMS[stream]}
        tasks = [TaskConfig(name, str(CLIPART / name)) for name in PICTURES] + [TaskConfig("digits", flip=False)]
        if options.emoji:
            paths = {name: options.emoji / f"{name.removeprefix('emoji_')}.csv" for name in EMOJI}
            tasks += [TaskConfig(name, str(path)) for name, path in paths.items()]
        settings = {"image_size": options.size, "batch_size": options.batch, "seed": seed, "order_seed": seed}
        self.data = SequentialTaskDataModule(tuple(tasks), **settings)
        self.order = [task.name for task in self.data.tasks]
        if missing := wanted - set(self.order):
            raise SystemExit(f"the streams need {', '.join(sorted(missing))}; give --emoji FOLDER, or other --streams")
        self.wanted = [name for name in self.order if name in wanted]
        self.data.prepare_data()

    @property
    def trainers(self) -> TrainerFactory:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0}
        accelerator = torch.device(self.options.device).type
        return TrainerFactory(
            {"max_epochs": self.options.epochs, "gradient_clip_val": 1.0, "accelerator": accelerator, "devices": 1}
            | quiet
        )

    def module(self, method: str) -> TILModule:
        """A method, not yet built."""
        options = self.options
        return TILModule(
            BackboneConfig(options.backbone, options.weights),
            (METHODS[method](),),
            optimizer=lambda p: AdamW(p, lr=options.rate, weight_decay=1e-6),
            lr_scheduler=lambda o: StepLR(o, step_size=max(1, options.epochs // 2), gamma=0.3),
            head=options.head,
        )

    @cache  # noqa: B019 - a few seeds
    def train(self, method: str) -> RunFolder:
        """Trains the wanted tasks by a method, unless they are; returns their run."""
        folder = self.options.output / "runs" / f"{method}-{self.seed}"
        Stream(self.module(method), self.data, folder, self.trainers, self.seed, precision="int4").run(self.wanted)
        return RunFolder(folder)

    @property
    @cache  # noqa: B019
    def frozen(self) -> Frozen:
        """Features of all wanted tasks by the frozen network."""
        module, evaluator = self.module("probe"), self.trainers.for_evaluation()
        module.build(self.options.size)
        found: dict[str, dict[str, Features]] = {}
        for name in self.wanted:
            self.data.select(self.order.index(name))
            module.begin_task(name, self.data.classes)
            for split in ("train", "val", "test"):
                each = split_features(module, self.data, split, evaluator)
                found.setdefault(name, {})[split] = Features(each.features.cpu(), each.labels.cpu())
        return found

    def test_images(self, name: str) -> Tensor:
        """The test images of a task, uint8 (N, 3, S, S)."""
        self.data.select(self.order.index(name))
        batches = [self.data.on_after_batch_transfer(batch, 0)[0] for batch in self.data.plain_dataloader("test")]
        return (255 * torch.cat(batches)).round().to(torch.uint8)

    def measure(self, method: str, names: Sequence[str]) -> Measures:
        """All measures of a method on some tasks."""
        if method == ALONE:
            return measure_alone(self.frozen, names)
        files = self.train(method).finished()
        first = self.module(method)
        predictor = load(self.train(method).path, first, self.options.device, list(names))
        signatures = [files[name].load_signature() for name in names]
        patches = sum(files[name].load_record()["task"]["patch_bytes"] for name in names)
        images = {name: self.test_images(name) for name in names}
        classes = sum(len(signature.classes) for signature in signatures)
        size = (patches + predictor.router.nbytes) / classes
        found = measure_routed(predictor, images, self.frozen)
        return {**found, **measure_rejection(self.frozen, signatures), "bytes_per_class": size}


def measure_alone(frozen: Frozen, names: Sequence[str]) -> Measures:
    """LDA over the classes of all tasks, without anything trained."""
    classifier, owner, start = LDA(), list[int](), dict[str, int]()
    for index, name in enumerate(names):
        train, start[name] = frozen[name]["train"], len(owner)
        classifier.update(train.features, train.labels + start[name])
        owner += [index] * (int(train.labels.max()) + 1)
    rows: dict[str, Measures] = {}
    for index, name in enumerate(names):
        test = frozen[name]["test"]
        scores = classifier.scores(test.features)
        own = torch.tensor(owner) == index
        best = torch.stack([scores[:, torch.tensor(owner) == i].amax(1) for i in range(len(names))], 1)
        order = best.argsort(dim=1, descending=True)
        rows[name] = {
            "oracle": percent(scores.masked_fill(~own, -torch.inf).argmax(1) == test.labels + start[name]),
            "joint": percent(scores.argmax(1) == test.labels + start[name]),
            "task": percent(order[:, 0] == index),
            "of_two": percent((order[:, :2] == index).any(1)),
        }
    width = next(iter(frozen.values()))["test"].features.shape[1]
    return {"tasks": rows, **means(rows), "bytes_per_class": 4 * (width + 1), "passes": 1.0}


def measure_routed(predictor: Predictor, images: Mapping[str, Tensor], frozen: Frozen) -> Measures:
    """Trained tasks with the router, as `Predictor` answers without the name of a task."""
    router, rows = predictor.router, dict[str, Measures]()
    starts = dict(zip(router.tasks, torch.tensor([0, *map(len, router.classes)]).cumsum(0).tolist(), strict=False))
    first = next(iter(images.values()))[:64]
    predictor.route_tensors(first, refuse=0)  # warms up
    found, ms = timed(lambda x, _: predictor.route_tensors(x, refuse=0), images)
    known, known_ms = timed(lambda x, task: predictor.predict_tensors(x, [task] * len(x)), images)
    asked = 0
    for task in images:
        test = frozen[task]["test"]
        truth = [predictor.classes(task)[label] for label in test.labels.tolist()]
        labels = [(task, label) for label in truth]
        asked += sum(1 + (each.second is not None and each.second.label is not None) for each in found[task])
        order = router.route(test.features).tasks.argsort(dim=1, descending=True)
        index = router.tasks.index(task)
        rows[task] = {
            "oracle": share([each.label for each in known[task]], truth),
            "routed": share([(each.task, each.label) for each in found[task]], labels),
            "joint": percent(router.scores(test.features).argmax(1) == test.labels + starts[task]),
            "task": percent(order[:, 0] == index),
            "of_two": percent((order[:, :2] == index).any(1)),
        }
    passes = 1 + asked / sum(map(len, images.values()))
    return {"tasks": rows, **means(rows), "passes": passes, "ms": ms, "known_ms": known_ms}


def timed(predict: Callable[[Tensor, str], list[Any]], images: Mapping[str, Tensor]) -> tuple[dict[str, Any], float]:
    """Predictions by task, and milliseconds for an image."""
    began = time.perf_counter()
    found = {task: predict(x, task) for task, x in images.items()}
    return found, 1000 * (time.perf_counter() - began) / sum(map(len, images.values()))


def measure_rejection(frozen: Frozen, signatures: Sequence[Signature]) -> Measures:
    """AUROC, and unknown images that are not refused, in percent, averages over tasks that are left out in turn."""
    areas, missed = list[float](), list[float]()
    for unknown in signatures:
        others = [each for each in signatures if each is not unknown]
        router = Router(others)
        known = torch.cat([router.route(frozen[each.task]["test"].features).familiar for each in others]).double()
        other = router.route(frozen[unknown.task]["test"].features).familiar.double()
        truth = torch.cat([torch.zeros(len(known)), torch.ones(len(other))])
        areas.append(100 * float(roc_auc_score(truth, -torch.cat([known, other]))))
        missed.append(percent(other >= known.quantile(0.05)))
    return {"auroc": statistics.mean(areas), "missed": statistics.mean(missed)}


def percent(right: Tensor) -> float:
    return 100 * float(right.double().mean())


def share(found: Sequence[Any], truth: Sequence[Any]) -> float:
    return 100 * statistics.mean(a == b for a, b in zip(found, truth, strict=True))


def means(rows: Mapping[str, Measures]) -> Measures:
    """Averages over tasks."""
    return {measure: statistics.mean(row[measure] for row in rows.values()) for measure in next(iter(rows.values()))}


def check_settings(options: argparse.Namespace) -> None:
    """Keeps the settings beside the results, so that a folder never mixes two of them."""
    own = {name: getattr(options, name) for name in SETTINGS} | {"emoji": options.emoji is not None}
    file = options.output / "settings.json"
    if file.exists() and (kept := json.loads(file.read_text())) != own:
        raise SystemExit(f"{file} has {kept}, and these options have {own}; name another --output")
    write_atomic(file, json_text(own).encode())


def print_table(folder: Path) -> None:
    """Prints what all results of a folder say."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*-*-*.json"))]
    alone = {(each["stream"], each["seed"]): each["joint"] for each in results if each["method"] == ALONE}
    print("\n| stream | method | seeds |", " | ".join(COLUMNS.values()), "|")
    print("|---|---|---:|" + "---:|" * len(COLUMNS))
    for stream in STREAMS:
        for method in (ALONE, *METHODS):
            rows = [each for each in results if (each["stream"], each["method"]) == (stream, method)]
            for each in rows:
                if "routed" in each and (stream, each["seed"]) in alone:
                    each["gain"] = each["routed"] - alone[stream, each["seed"]]
            if rows:
                print(f"| {stream} | {method} | {len(rows)} |", " | ".join(cell(rows, name) for name in COLUMNS), "|")


def cell(rows: Sequence[Measures], name: str) -> str:
    """Mean, and for accuracies the standard deviation over seeds; empty where it was not measured."""
    values = [row[name] for row in rows if name in row]
    if not values:
        return ""
    mean = statistics.mean(values)
    if name == "bytes_per_class":
        return f"{mean:,.0f}"
    if name in ("passes", "ms", "known_ms"):
        return f"{mean:.2f}"
    return f"{mean:.1f}" if len(values) < 2 else f"{mean:.1f} ± {statistics.stdev(values):.1f}"


def main() -> None:
    warnings.filterwarnings("ignore")
    options = read_options()
    check_settings(options)
    for seed in options.seeds:
        tasks: Seed | None = None
        for stream in options.streams:
            for method in options.methods:
                file = options.output / f"{stream}-{seed}-{method}.json"
                if file.exists():
                    continue
                tasks = tasks or Seed(options, seed)
                names = [name for name in tasks.order if name in STREAMS[stream]]
                facts = {"stream": stream, "seed": seed, "method": method, "order": names}
                device = torch.cuda.get_device_name() if options.device == "cuda" else options.device
                facts |= {"device": device, "torch": torch.__version__}
                write_atomic(file, json_text({**facts, **tasks.measure(method, names)}).encode())
                print(file.name, flush=True)
    print_table(options.output)


if __name__ == "__main__":
    main()
