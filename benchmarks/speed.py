"""Measures training, evaluation, task switching, linear probe, memory and start-up on a real ViT-S/14 at 98×98.

    uv run python benchmarks/speed.py --weights dinov2_vits14.safetensors

Contenders take turns; a ratio is the median over rounds. The references are plain training loops of timm's network with
AdamW and clipped gradients: LoRA of PEFT with rank 1 on query and value (after a split of the fused layer in three),
and full fine-tuning. Memory is the size of the weights plus the peak growth of the resident set, in one process for
each contender.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from decomposition import PeakMemory
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim import AdamW

from recast_pl import (
    BackboneConfig,
    BankLayout,
    Chosen,
    LoRA,
    Recast,
    SequentialTaskDataModule,
    Spectral,
    TaskConfig,
    TILModule,
)
from recast_pl.decomposition.bank import TemplateBank
from recast_pl.learning.acceleration import OutputChanges
from recast_pl.learning.features import Features
from recast_pl.learning.probe import fit_probe

BACKBONE, SIZE, BATCH = "vit_small_patch14_dinov2", 98, 16
MLP, ATTENTION = r"mlp\.fc[12]\.weight", r"attn\.qkv\.weight"
FOOD = TaskConfig("food", "data/clipart/food")


def layout(*targets):
    return BankLayout(list(targets), groups=6, templates=2, coefficient_sets=2)


def backbone(weights):
    return BackboneConfig(BACKBONE, weights)


def images(count):
    """Clip-art images (count, 3, 98, 98) and their labels."""
    data = SequentialTaskDataModule([FOOD], image_size=SIZE, batch_size=190)
    data.prepare_data()
    pixels, labels, *_ = next(iter(data.plain_dataloader("train")))
    return pixels[:count] / 255, labels[:count]


class SplitQKV(nn.Module):
    """Query, key and value as separate layers, because PEFT adapts whole layers."""

    def __init__(self, fused):
        super().__init__()
        rows = zip(("query", "key", "value"), fused.weight.chunk(3), fused.bias.chunk(3), strict=True)
        for name, weight, bias in rows:
            layer = nn.Linear(fused.in_features, fused.in_features)
            layer.load_state_dict({"weight": weight, "bias": bias})
            setattr(self, name, layer)

    def forward(self, x):
        return torch.cat((self.query(x), self.key(x), self.value(x)), -1)


def peft_lora(weights):
    network = backbone(weights).build(SIZE).requires_grad_(False)
    for block in network.net.blocks:
        block.attn.qkv = SplitQKV(block.attn.qkv)
    adapted = get_peft_model(network, LoraConfig(r=1, lora_alpha=1, target_modules=["query", "value"]))
    return nn.Sequential(adapted, nn.Linear(network.num_features, 5))


def full(weights):
    network = backbone(weights).build(SIZE)
    return nn.Sequential(network, nn.Linear(network.num_features, 5))


def recast(*targets, tokens=1.0):
    def make(weights):
        module = TILModule(backbone(weights), (Recast(layout(*targets), gradient_tokens=tokens),))
        module.build(SIZE)
        module.begin_task("food", list("abcde"))
        return module.train()

    return make


class Trained(nn.Module):
    """A module that computes as in its own training step."""

    def __init__(self, module):
        super().__init__()
        self.module, self.changes = module, OutputChanges(module.current()[0])

    def forward(self, x):
        with self.changes.apply():
            return self.module(x)


def small(piece):
    def make(weights):
        module = TILModule(backbone(weights), (piece(),))
        module.build(SIZE)
        module.begin_task("food", list("abcde"))
        return Trained(module.train())

    return make


def chosen():
    """48 entries drawn at random."""
    piece = Chosen()
    piece.begin_task = lambda: piece.load_training_state(
        {"indices": torch.randperm(piece.total)[: piece.count].sort().values}
    )
    return piece


CONTENDERS = {
    "PEFT LoRA, r 1, q and v": peft_lora,
    "LoRA, r 1, q and v": small(LoRA),
    "spectral templates": small(Spectral),
    "chosen directions": small(chosen),
    "full fine-tuning": full,
    "RECAST, MLP": recast(MLP),
    "RECAST, MLP, gradient_tokens 0.25": recast(MLP, tokens=0.25),
    "RECAST, attention": recast(ATTENTION),
    "RECAST, attention, gradient_tokens 0.25": recast(ATTENTION, tokens=0.25),
}


def steps(network, x, y):
    """Runs one training step at each `next`."""
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = AdamW(trained, lr=1e-3)
    while True:
        F.cross_entropy(network(x), y).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield


def seconds(action):
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def turns(actions, rounds, warm_up=2):
    """Seconds of each action in each round."""
    found = {name: [] for name in actions}
    for number in range(warm_up + rounds):
        for name, action in actions.items():
            taken = seconds(action)
            if number >= warm_up:
                found[name].append(taken)
    return found


def ratio(found, name, reference):
    return statistics.median(a / b for a, b in zip(found[name], found[reference], strict=True))


def training(weights, rounds):
    x, y = images(BATCH)
    running = {name: steps(make(weights), x, y) for name, make in CONTENDERS.items()}
    found = turns({name: lambda s=step: next(s) for name, step in running.items()}, rounds)
    for name, taken in found.items():
        of_full, of_lora = (ratio(found, name, other) for other in ("full fine-tuning", "PEFT LoRA, r 1, q and v"))
        print(
            f"step, {name}: {1000 * statistics.median(taken):.0f} ms, {of_full:.2f} × full, {of_lora:.2f} × LoRA",
            flush=True,
        )


def generation(weights, rounds):
    """Prints the part of a training step with 64 images that generates weights."""
    step, mix, inside = steps(CONTENDERS["RECAST, MLP"](weights), *images(64)), TemplateBank.mix, []

    def timed(bank, coefficients, out=None):
        start = time.perf_counter()
        weight = mix(bank, coefficients, out)
        inside.append(time.perf_counter() - start)
        return weight

    TemplateBank.mix = timed
    parts = []
    for _ in range(rounds):
        inside.clear()
        whole = seconds(lambda: next(step))
        parts.append(sum(inside) / whole)
    TemplateBank.mix = mix
    print(f"part of a step with 64 images that generates weights: {statistics.median(parts):.4f}", flush=True)


def evaluation(weights, rounds):
    plain, module = full(weights).eval(), recast(MLP, ATTENTION)(weights).eval()
    x, _ = images(64)
    patch = module.patch({})
    dense = module.pieces[0].decomposition.reconstruct()
    copies = {name: torch.empty_like(weight) for name, weight in dense.items()}

    def ours():
        with module.merged():
            for _ in range(4):
                module(x)

    def theirs():
        for _ in range(4):
            plain(x)

    def switch():
        module.activate(patch)
        with module.merged():
            pass

    def copy():
        for name, weight in dense.items():
            copies[name].copy_(weight)

    with torch.inference_mode():
        found = turns({"recast": ours, "timm": theirs}, rounds)
        print(
            f"evaluating 256 images, relative to the plain timm network: {ratio(found, 'recast', 'timm'):.3f}",
            flush=True,
        )
        found = turns({"switch": switch, "copy": copy}, 10 * rounds)
        print(
            f"switching the task with {len(dense)} weights, relative to copying them: {ratio(found, *found):.2f}",
            flush=True,
        )


def probe(weights, rounds):
    """Compares the time of 100 epochs on cached features with that of computing the features."""
    module = recast(MLP)(weights).eval()
    x, y = (part.split(60) for part in images(180))
    features = {}

    @torch.no_grad()
    def forward():
        with module.merged():
            features["train"] = Features(torch.cat([module.backbone(part) for part in x]), torch.cat(y))

    def fit():
        head = nn.Linear(module.backbone.num_features, 5)
        configure = lambda p: module._configure([{"params": list(p)}])  # noqa: E731
        fit_probe(head, features["train"], features["train"], 100, BATCH, configure)

    found = turns({"forward": forward, "probe": fit}, rounds)
    print(f"probe, features and 100 epochs, in passes over the data: {1 + ratio(found, 'probe', 'forward'):.2f}")


def memory(weights, rounds):
    found = {}
    for name in CONTENDERS:
        command = [sys.executable, __file__, "--weights", weights, "--contender", name]
        runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(rounds)]
        found[name] = statistics.median(json.loads(run.stdout) for run in runs)
    for name, size in found.items():
        print(f"memory, {name}: {size:.0f} MB, {size / found['PEFT LoRA, r 1, q and v']:.2f} × LoRA", flush=True)


def contender(name, weights):
    """Prints the megabytes of the weights plus the peak growth over five steps."""
    network = CONTENDERS[name](weights)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    step = steps(network, *images(BATCH))
    watched = PeakMemory()
    with watched:
        for _ in range(5):
            next(step)
    print(json.dumps((sum(p.nbytes for p in network.parameters()) + watched.peak) / 1e6))


def start_up(_, rounds):
    command = [sys.executable, "-m", "recast_pl", "--help"]
    found = turns({"help": lambda: subprocess.run(command, capture_output=True, check=True)}, rounds)
    print(f"python -m recast_pl --help: {statistics.median(found['help']):.2f} s")


PARTS = (training, generation, evaluation, probe, memory, start_up)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="safetensors of timm's vit_small_patch14_dinov2")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--parts", nargs="+", choices=[part.__name__ for part in PARTS], help="default: all")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.contender:
        contender(options.contender, options.weights)
        return
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for part in PARTS:
        if not options.parts or part.__name__ in options.parts:
            part(options.weights, options.rounds)


if __name__ == "__main__":
    main()
