"""Measures training steps in images per second at 224×224 on one GPU, from uint8 images in host memory.

    uv run python benchmarks/gpu.py
    uv run python benchmarks/gpu.py --backbone resnet34 --batch 256

Each step copies a uint8 batch from pinned memory, converts it on the device, and trains head and method. Weights are
random, which takes the same time. `published` follows the description in the paper: fp32 without TF32 or cuDNN, and
for each weight a stack of K = 2 dense mixtures and their mean. Rates are medians over rounds.
"""

import argparse
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.optim import AdamW

from recast_pl import BackboneConfig, BankLayout, FullFineTune, LoRA, Recast, TILModule, decompose

LAYOUTS = {
    "vit": BankLayout([r"mlp\.fc[12]\.weight"], groups=6, templates=2, coefficient_sets=2),
    "resnet": BankLayout([r"layer\d\.\d+\.conv\d\.weight"], groups=6, templates=2, coefficient_sets=2),
}
CLASSES = 100


@dataclass(frozen=True)
class Settings:
    """The options of a contender."""

    pieces: str
    bf16: bool = False
    compiled: bool = False
    channels_last: bool = False
    fused: bool = False
    cudnn: bool = True

    def __str__(self):
        on = [name for name in ("bf16", "compiled", "channels_last", "fused") if getattr(self, name)]
        return ", ".join([self.pieces, *on]) if self.cudnn else f"{self.pieces}, fp32, no cuDNN"


def contenders(convolutional):
    """The published way, and then each option that could help, alone and together with the others."""
    yield Settings("published", cudnn=False)
    for pieces in ("RECAST", "LoRA", "full fine-tuning"):
        yield Settings(pieces)
        yield Settings(pieces, bf16=True)
        yield Settings(pieces, bf16=True, fused=True)
        if convolutional:
            yield Settings(pieces, bf16=True, channels_last=True)
        yield Settings(pieces, bf16=True, compiled=True, channels_last=convolutional, fused=True)


class DenseStack(nn.Module):
    """Equation 2 as described: the mean of K stacked dense weights."""

    def __init__(self, templates):
        super().__init__()
        self.templates = nn.Parameter(templates, requires_grad=False)

    def forward(self, coefficients):
        mixtures = [sum(c * t for c, t in zip(row, self.templates, strict=True)) for row in coefficients]
        return torch.stack(mixtures).mean(0)

    def right_inverse(self, weight):
        return (torch.zeros(2, len(self.templates)),)


def published(config, layout, size):
    network = config.build(size).requires_grad_(False)
    for bank in decompose(network.net, layout).banks:
        for name, coefficients in zip(bank.group.targets, bank.coefficients, strict=True):
            path, _, attribute = name.rpartition(".")
            module = network.net.get_submodule(path)
            parametrize.register_parametrization(module, attribute, DenseStack(bank.templates))
            original = getattr(module.parametrizations, attribute).original0
            original.data = coefficients.clone()
            original.requires_grad_()
    return nn.Sequential(network, nn.Linear(network.num_features, CLASSES))


def build(settings, options, layout):
    config = BackboneConfig(options.backbone, "random")
    if settings.pieces == "published":
        return published(config, layout, options.size)
    pieces = {"RECAST": lambda: Recast(layout), "LoRA": LoRA, "full fine-tuning": FullFineTune}
    module = TILModule(config, (pieces[settings.pieces](),))
    module.build(options.size)
    module.begin_task("task", [str(number) for number in range(CLASSES)])
    return module.train()


class Contender:
    """Trains on batches of random images."""

    def __init__(self, settings, options, layout):
        self.settings, self.device = settings, torch.device(options.device)
        module = build(settings, options, layout).to(self.device)
        if settings.channels_last:
            module = module.to(memory_format=torch.channels_last)
        self.trained = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = AdamW(self.trained, lr=1e-4, fused=settings.fused or None)
        self.network = torch.compile(module) if settings.compiled else module
        shape = (4, options.batch, 3, options.size, options.size)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8)
        self.images = self.images.pin_memory() if self.device.type == "cuda" else self.images
        self.labels = torch.randint(0, CLASSES, (options.batch,), device=self.device)

    def step(self, number):
        images = self.images[number % 4].to(self.device, non_blocking=True).float().div_(255)
        if self.settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16):
            loss = F.cross_entropy(self.network(images), self.labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def rate(self, steps):
        """Images per second."""
        with torch.backends.cudnn.flags(enabled=self.settings.cudnn):
            self.wait()
            start = time.perf_counter()
            for number in range(steps):
                self.step(number)
            self.wait()
        return steps * len(self.labels) / (time.perf_counter() - start)

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(settings, options, layout):
    """Median, lowest and highest rate, and peak memory in MiB, which is None without CUDA."""
    torch.manual_seed(0)
    if options.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    contender = Contender(settings, options, layout)
    contender.rate(3)  # compiles and warms up
    rates = [contender.rate(options.steps) for _ in range(options.rounds)]
    peak = torch.cuda.max_memory_allocated() / 2**20 if options.device == "cuda" else None
    torch.compiler.reset()
    return statistics.median(rates), min(rates), max(rates), peak


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=20, help="steps in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    name = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    print(
        f"{options.backbone}, {options.size}×{options.size}, batch {options.batch}; {name}, torch {torch.__version__}"
    )
    print("| contender | images/s | range | relative to published | peak MiB |\n|---|---|---|---|---|")
    layout = LAYOUTS["resnet" if "resnet" in options.backbone else "vit"]
    reference = None
    for settings in contenders("resnet" in options.backbone):
        rate, low, high, peak = measure(settings, options, layout)
        reference = reference or rate
        memory = "" if peak is None else f"{peak:,.0f}"
        row = f"| {settings} | {rate:,.1f} | {low:,.1f} to {high:,.1f} | {rate / reference:.2f}× | {memory} |"
        print(row, flush=True)  # a compiled contender takes a minute


if __name__ == "__main__":
    main()
