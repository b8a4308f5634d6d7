"""Measures the closed form on a real ViT-S/14, and one epoch of Neural Mimicry against the published formulation.

    uv run python benchmarks/decomposition.py --weights dinov2_vits14.safetensors

Each contender of Neural Mimicry runs in its own process. They take turns, and each round gives one ratio. Memory is the
size of teacher and templates, which both contenders hold, plus the peak growth of the resident set.
"""

import argparse
import ctypes
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from recast_pl import BackboneConfig, BankLayout, MimicryModule, decompose
from recast_pl.decomposition.similarity import weight_similarity
from recast_pl.decomposition.targets import find_targets, group_targets

ALL = BankLayout([r"(attn\.qkv|mlp\.fc[12])\.weight"], groups=6, templates=2)
MLP = BankLayout([r"mlp\.fc[12]\.weight"], groups=6, templates=2, coefficient_sets=2)
EPOCHS, WARM_UP = 12, 3


def backbone(weights):
    return BackboneConfig("vit_small_patch14_dinov2", weights)


def closed_form(weights):
    """Seconds of seven decompositions, and the largest relative error of a weight."""
    net = backbone(weights).build(98).net
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        decomposition = decompose(net, ALL)
        seconds.append(time.perf_counter() - start)
    return seconds, max(target.relative_error for target in weight_similarity(decomposition, net))


class Published(nn.Module):
    """Equation 3 as in the published loop: for each layer, it stacks K dense weights and averages them."""

    def __init__(self, weights):
        super().__init__()
        targets = find_targets(backbone(weights).build(98).net, MLP.targets)
        self.groups = group_targets({n: tuple(w.shape) for n, w in targets.items()}, MLP)
        self.teacher = {name: w.detach() for name, w in targets.items()}
        kaiming = (nn.init.kaiming_normal_(torch.empty(g.templates, *g.shape)) for g in self.groups)
        self.templates = nn.ParameterList(nn.Parameter(t) for t in kaiming)
        layers = [name for g in self.groups for name in g.targets]
        self.coefficients = nn.ParameterList(nn.Parameter(nn.init.orthogonal_(torch.empty(2, 2))) for _ in layers)

    def loss(self):
        total, coefficients = 0, iter(self.coefficients)
        for group, templates in zip(self.groups, self.templates, strict=True):
            for name in group.targets:
                noisy = next(coefficients) + 1e-4 * torch.randn(2, 2)
                dense = [(c.view(-1, 1, 1) * templates).sum(0) for c in noisy]
                total = total + 2 * F.smooth_l1_loss(torch.stack(dense).mean(0), self.teacher[name])
        return total


def published_epochs(weights):
    module = Published(weights)
    yield 4 * sum(t.numel() for t in [*module.teacher.values(), *module.templates])
    optimizer = torch.optim.RMSprop(module.parameters(), lr=0.1)
    while True:
        optimizer.zero_grad()
        loss = module.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        yield loss.item()


def our_epochs(weights):
    """The training step of `MimicryModule` without the loop of Lightning."""
    module = MimicryModule(backbone(weights), MLP, image_size=98)
    module.configure_model()
    yield 4 * sum(t.numel() for t in [*module.teacher, *module.templates])
    optimizers, _ = module.configure_optimizers()
    while True:
        total = 0.0
        for index, optimizer in enumerate(optimizers):
            total += float(module.set_gradients(index))
            module.limit_gradients(index)
            optimizer.step()
            optimizer.zero_grad()
        yield total


class PeakMemory(threading.Thread):
    """Samples the resident set every millisecond; `peak` is its largest growth in bytes since the start."""

    def __init__(self):
        super().__init__(daemon=True)
        self.start_size, self.peak, self.running = self.size(), 0, True

    @staticmethod
    def size():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def run(self):
        while self.running:
            self.peak = max(self.peak, self.size() - self.start_size)
            time.sleep(0.001)

    def __enter__(self):
        self.start()

    def __exit__(self, *_):
        self.running = False
        self.join()


CONTENDERS = {"published": published_epochs, "recast_pl": our_epochs}


def contender(name, weights):
    """Prints the median seconds of an epoch, the peak memory in MB, and the last loss."""
    torch.manual_seed(0)
    epochs = CONTENDERS[name](weights)
    held = next(epochs)  # bytes of the teacher and the templates
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # returns the memory freed after loading to the system
    memory = PeakMemory()
    with memory:  # not during the timing, which the sampling would disturb
        for _ in range(WARM_UP):
            next(epochs)
    seconds = []
    for _ in range(EPOCHS):
        start = time.perf_counter()
        loss = next(epochs)
        seconds.append(time.perf_counter() - start)
    print(json.dumps([statistics.median(seconds), (held + memory.peak) / 1e6, loss]))


def mimicry(weights, rounds):
    """The printed numbers of each contender in each round."""
    results = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name, found in results.items():
            command = [sys.executable, __file__, "--weights", weights, "--contender", name]
            found.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="safetensors of timm's vit_small_patch14_dinov2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        contender(options.contender, options.weights)
        return
    seconds, error = closed_form(options.weights)
    print(
        f"closed form, attention and MLP, G 6, n 2: first {seconds[0]:.3f} s, median {statistics.median(seconds):.3f} s"
    )
    print(f"largest relative error of a weight: {error:.1e}")
    results = mimicry(options.weights, options.rounds)
    for name, found in results.items():
        medians = [statistics.median(column) for column in zip(*found, strict=True)]
        print(f"mimicry, {name}: {medians[0] * 1000:.0f} ms per epoch, {medians[1]:.0f} MB, loss {medians[2]:.4f}")
    for index, quantity in enumerate(("time", "memory")):
        pairs = zip(results["recast_pl"], results["published"], strict=True)
        print(f"ratio of {quantity}, median of rounds: {statistics.median(a[index] / b[index] for a, b in pairs):.2f}")


if __name__ == "__main__":
    main()
