"""A batch in which every image has a task of its own, beside switching from task to task, on a real ViT-S/14.

    uv run python benchmarks/mixed.py --weights dinov2_vits14.safetensors
    uv run python benchmarks/mixed.py --weights random --device cuda --size 224

64 images of 64 tasks of RECAST on the MLPs (24 weights, n = 2) or, with `--method spectral`, of spectral templates.
Each task of `--method chosen` has entries drawn at random; real tasks share more of them, which costs less. With
`--run_dir`, tasks have the numbers of the trained tasks of a run, in turn, which needs the run's method and size. The
contenders take turns, and the median of the ratios of all rounds is printed. `switching` activates each image's task
and runs the merged network for it; `one by one` is the same within the library; `weights` and `products` are one pass
for all tasks, in which every layer uses that strategy; `rule` lets each layer choose as
`recast_pl.inference.mixed_batch` does. `one task` is an ordinary pass as if all images were of one task, which no pass
for several tasks can beat. Before that, the memory of 10,000 tasks is measured, without their heads and class names.
"""

import argparse
import dataclasses
import resource
import statistics
import time
from pathlib import Path

import torch

from recast_pl import (
    AdaptFormer,
    BackboneConfig,
    BankLayout,
    Chosen,
    LoRA,
    Predictor,
    Recast,
    Spectral,
    TaskPatch,
    TILModule,
)

BACKBONE = "vit_small_patch14_dinov2"
MLP = BankLayout([r"mlp\.fc[12]\.weight"], groups=6, templates=2, coefficient_sets=2)
METHODS = {
    **{"recast": lambda: Recast(MLP), "spectral": Spectral, "chosen": Chosen},
    **{"lora": LoRA, "adaptformer": AdaptFormer},
}


def build(options):
    """A module, and as many trained tasks as asked for."""
    piece = METHODS[options.method]()
    module = TILModule(BackboneConfig(BACKBONE, options.weights), (piece,))
    module.build(options.size)
    module.begin_task("task", list("abcde"))
    patch = module.patch({})
    states = [moved(piece) for _ in range(options.tasks)]
    if options.run_dir:
        trained = [TaskPatch.load(path).pieces[0] for path in sorted(options.run_dir.glob("patches/*"))]
        states = [trained[i % len(trained)] for i in range(options.tasks)]
    tasks = [dataclasses.replace(patch, task=f"task{i}", pieces=[state]) for i, state in enumerate(states)]
    return module.to(options.device).eval(), tasks


def moved(piece):
    """The state of another task: the time that it takes does not depend on the values."""
    if isinstance(piece, Chosen):
        piece.load_training_state({"indices": torch.randperm(piece.total)[: piece.count].sort().values})
    state = piece.task_state()
    numbers = {n: t for n, t in state.items() if t.is_floating_point()}
    return state | {n: t + 0.1 * (float(t.abs().mean()) or 1.0) * torch.randn_like(t) for n, t in numbers.items()}


def wait(device):
    if device != "cpu":
        torch.accelerator.synchronize()


def turns(actions, options):
    """Seconds of each action in each round, after one round that is not counted; on a CPU those of the processor."""
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    found = {name: [] for name in actions}
    for number in range(1 + options.rounds):
        for name, action in actions.items():
            wait(options.device)
            start = clock()
            action()
            wait(options.device)
            if number:
                found[name].append(clock() - start)
    return found


@torch.no_grad()
def speed(module, patches, options):
    predictor = Predictor(module)
    for patch in patches:
        predictor.add_patch(patch)
    images = torch.rand(options.images, 3, options.size, options.size, device=options.device)
    mixed = predictor._network
    tasks = [task.state for task in predictor._tasks.values()]
    counts = [len(part) for part in torch.arange(options.images).tensor_split(options.tasks)]

    def switching():
        parts = []
        for patch, part in zip(patches, images.split(counts), strict=True):
            for image in part:
                module.activate(patch)
                with module.merged():
                    parts.append(module.backbone(image[None]))
        return torch.cat(parts)

    def one_task():
        with module.merged():
            module.backbone(images)

    layers = mixed.layers(images, tasks)
    actions = {"switching": switching, "one by one": lambda: mixed.one_by_one(images, tasks, counts)}
    for name, products in (("weights", False), ("products", True), ("rule", None)):
        actions[name] = lambda products=products: mixed.together(images, tasks, counts, layers, products)
    wanted = switching()
    for name, action in actions.items():
        print(f"{name}: largest difference from switching {(action() - wanted).abs().max():.1e}")
    found = turns(actions | {"one task": one_task}, options)
    for name, taken in found.items():
        gain = statistics.median(a / b for a, b in zip(found["switching"], taken, strict=True))
        print(f"{name}: {1000 * statistics.median(taken):.0f} ms, {gain:.2f} times as fast as switching", flush=True)


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def memory(module, patches):
    """Prints the memory of tasks that share their heads and class names with one patch."""
    predictor, patch = Predictor(module), patches[0]
    predictor.add_patch(patch)
    before = resident()
    for number in range(10_000):
        predictor.add_patch(dataclasses.replace(patch, task=f"more{number}"))
    print(f"10,000 tasks: {(resident() - before) / 1e6:.1f} MB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help=f"safetensors of timm's {BACKBONE}, or random")
    parser.add_argument("--method", choices=list(METHODS), default="recast")
    parser.add_argument("--run_dir", type=Path, help="run whose tasks are used")
    parser.add_argument("--size", type=int, default=98, help="height and width of images")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--tasks", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"{options.images} images of {options.tasks} tasks, {options.size}×{options.size}, {options.device}")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    module, patches = build(options)
    memory(module, patches)
    speed(module, patches, options)


if __name__ == "__main__":
    main()
