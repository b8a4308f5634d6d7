"""Methods whose tasks share weights: their formulas against numbers worked out by hand, float64 and NumPy."""

import math
from collections import Counter

import lightning as L
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import TINY_VIT
from test_all_methods import QUIET
from torch import nn

from recast_pl import (
    DERPP,
    ERACE,
    EWC,
    HAT,
    IDER,
    L2P,
    NAPAVQ,
    BackboneConfig,
    BankLayout,
    FineTune,
    FullFineTune,
    GDumb,
    GradientSums,
    Growth,
    Hypernetwork,
    InfLoRA,
    LinearProbe,
    LoRA,
    LwF,
    Recast,
    SequentialTaskDataModule,
    TaskConfig,
    TaskPatch,
    TILModule,
    WeightAligning,
)
from recast_pl.errors import MethodError, PatchError
from recast_pl.learning.checkpoint import trainable_state
from recast_pl.learning.patch import SharedState
from recast_pl.methods.buffer import Buffer, Samples
from recast_pl.methods.derpp import logit_distance
from recast_pl.methods.hat import UnitMask
from recast_pl.methods.inflora import Subspace, design
from recast_pl.methods.piece import Step

INF = torch.inf


def two_layers():
    """(B, 3, 4, 4) to (B, 5)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.Tanh(), nn.Linear(6, 5))


class Module(TILModule):
    """Without a datamodule: augments nothing."""

    plain_images = None

    def augment(self, images, tasks):
        return images


def learner(*pieces, classes=3, old=(), backbone="test_sharing.two_layers", size=4):
    """A module in the middle of a task after tasks with `old` classes, in float64."""
    torch.manual_seed(0)
    module = Module(BackboneConfig(backbone, "random"), pieces)
    module.build(size)
    for count in old:
        module.old_heads.append(nn.Linear(module.backbone.num_features, count))
        module.old_tasks.append(f"old{len(module.old_tasks)}")
    module.double()
    module.begin_task("task", [str(i) for i in range(classes)])
    return module.double()


def some(count, classes, size=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, size, size, dtype=torch.float64, generator=generator)
    return images, torch.randint(classes, (count,), generator=generator)


def step_of(module, images, labels):
    features = module.backbone(images)
    return Step(images, labels, features, module.own_logits(features, torch.full_like(labels, len(module.old_heads))))


def give(module, *batches):
    module.batches = lambda split: iter(batches)


def kept(ewc, kind):
    """What EWC remembers of each weight, `fisher` or `anchor`."""
    tensors = ewc.memory.tensors.items()
    return {name.removeprefix(f"{kind}:"): tensor for name, tensor in tensors if name.startswith(kind)}


# heads


def test_each_image_gets_the_logits_of_its_own_head_and_no_others():
    module = learner(FineTune(), old=(2, 4))
    images, _ = some(3, 3)
    features = module.backbone(images)
    logits = module.own_logits(features, torch.tensor([1, 0, 2]))
    assert torch.allclose(logits[0], module.old_heads[1](features[0]), atol=1e-12)
    assert torch.allclose(logits[1, :2], module.old_heads[0](features[1]), atol=1e-12)
    assert logits[1, 2:].tolist() == [-INF, -INF]
    assert torch.allclose(logits[2, :3], module.head(features[2]), atol=1e-12)
    loss = F.cross_entropy(logits, torch.tensor([3, 1, 2]))
    by_hand = -(logits[0].log_softmax(0)[3] + logits[1, :2].log_softmax(0)[1] + logits[2, :3].log_softmax(0)[2]) / 3
    assert torch.allclose(loss, by_hand)
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    assert all(g.isfinite().all() for g in gradients)


# penalties


def per_sample_fisher(module, images, labels):
    names, weights = zip(*module.backbone.named_parameters(), strict=True)

    def loss(weights, image, label):
        features = torch.func.functional_call(module.backbone, dict(zip(names, weights, strict=True)), image[None])
        return F.cross_entropy(module.head(features), label[None])

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, images, labels)
    return {name: g.detach().square().mean(0) for name, g in zip(names, gradients, strict=True)}


def test_fisher_information_is_the_mean_of_squared_gradients_of_single_images():
    ewc = EWC()
    module = learner(FineTune(), ewc)
    images, labels = some(7, 3)
    give(module, (images[:4], labels[:4]), (images[4:], labels[4:]))
    wanted = per_sample_fisher(module, images, labels)
    ewc.end_task()
    assert kept(ewc, "fisher").keys() == wanted.keys()
    for name, fisher in kept(ewc, "fisher").items():
        assert torch.allclose(fisher, wanted[name])
    loss = F.cross_entropy(module(images), labels)
    of_batch = torch.autograd.grad(loss, list(module.backbone.parameters()))
    assert not any(torch.allclose(g.square(), f) for g, f in zip(of_batch, kept(ewc, "fisher").values(), strict=True))


def test_the_penalty_of_ewc_is_the_sum_over_tasks():
    ewc = EWC(strength=3.0)
    module = learner(FineTune(), ewc)
    tasks = []
    assert ewc.loss(None) is None
    for seed in (1, 2, 3):
        images, labels = some(5, 3, seed=seed)
        give(module, (images, labels))
        fisher = per_sample_fisher(module, images, labels)
        tasks.append((fisher, {n: p.detach().clone() for n, p in module.backbone.named_parameters()}))
        ewc.end_task()
        with torch.no_grad():
            for parameter in module.backbone.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    ewc.load_shared_state(ewc.shared_state())

    def both():
        weights = dict(module.backbone.named_parameters())
        by_hand = sum(1.5 * (f[name] * (p - then[name]) ** 2).sum() for f, then in tasks for name, p in weights.items())
        return ewc.loss(None), by_hand

    ours, by_hand = both()
    weights = list(module.backbone.parameters())
    gradients = zip(*(torch.autograd.grad(x, weights) for x in (ours, by_hand)), strict=True)
    assert all(torch.allclose(a, b) for a, b in gradients)
    with torch.no_grad():
        module.backbone.net[1].weight.add_(0.3)
    ours_after, by_hand_after = both()
    assert torch.allclose(ours_after - ours, by_hand_after - by_hand)  # equal but for a constant
    ewc_alone = EWC(strength=3.0)
    module = learner(FineTune(), ewc_alone)
    give(module, some(5, 3))
    ewc_alone.end_task()
    assert ewc_alone.loss(None) == 0  # at the task's own weights


def test_lwf_distils_every_old_head_at_temperature_two():
    lwf = LwF()
    module = learner(FineTune(), lwf, old=(2, 4))
    images, labels = some(6, 3)
    before = module.backbone(images).detach()
    old = [head(before).detach().numpy() for head in module.old_heads]
    with torch.no_grad():
        for parameter in [*module.backbone.parameters(), *module.old_heads.parameters()]:
            parameter.add_(0.2 * torch.randn_like(parameter))
    step = step_of(module, images, labels)
    now = [head(step.features).detach().numpy() for head in module.old_heads]

    def softmax(z):
        return np.exp(z / 2) / np.exp(z / 2).sum(1, keepdims=True)

    by_hand = sum(-(softmax(z0) * np.log(softmax(z))).sum(1).mean() for z0, z in zip(old, now, strict=True))
    loss = lwf.loss(step)
    assert float(loss) == pytest.approx(by_hand, rel=1e-10)
    gradients = torch.autograd.grad(loss, list(module.old_heads.parameters()))
    assert all(g.abs().sum() > 0 for g in gradients)  # old heads are trained, too


def test_weight_aligning_trains_one_classifier_and_distils_its_old_classes():
    aligning = WeightAligning()
    module = learner(FineTune(), aligning, old=(2, 4))
    images, labels = some(6, 3)
    with torch.no_grad():
        before = torch.cat([head(module.backbone(images)) for head in module.old_heads], 1).numpy()
        for parameter in [*module.backbone.parameters(), *module.old_heads.parameters()]:
            parameter.add_(0.2 * torch.randn_like(parameter))
    step = step_of(module, images, labels)
    with torch.no_grad():
        now = torch.cat([head(step.features) for head in (*module.old_heads, module.head)], 1).numpy()

    def softmax(z):
        return np.exp(z) / np.exp(z).sum(1, keepdims=True)

    classified = -np.log(softmax(now)[np.arange(6), 6 + labels.numpy()]).mean()
    distilled = -(softmax(before / 2) * np.log(softmax(now[:, :6] / 2))).sum(1).mean()
    by_hand = classified / 3 + distilled * 2 / 3  # 6 of 9 classes are old
    loss = aligning.loss(step)
    assert float(loss + module.loss(step.logits, labels)) == pytest.approx(by_hand, rel=1e-10)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(loss, list(module.old_heads.parameters())))
    rows, direction = module.head.weight.detach().clone(), module.head.bias.detach().clone()
    aligning.end_task()
    norms = [w.norm() for head in module.old_heads for w in head.weight]
    assert float(module.head.weight.norm(dim=1).mean()) == pytest.approx(float(sum(norms)) / 6, rel=1e-10)
    torch.testing.assert_close(F.normalize(module.head.weight), F.normalize(rows))
    assert torch.equal(module.head.bias, direction)


@pytest.mark.parametrize("make", [LwF, WeightAligning])
def test_the_first_task_has_no_teacher(make):
    piece = make()
    module = learner(FineTune(), piece)
    before = module.head.weight.detach().clone()
    assert piece.loss(step_of(module, *some(2, 3))) is None
    piece.end_task()
    assert torch.equal(module.head.weight, before)


# replay


def samples(count, task=0, labels=None, logits=None, size=2):
    labels = torch.arange(count) % 2 if labels is None else torch.as_tensor(labels)
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, size, size).contiguous()
    logits = torch.zeros(count, 0) if logits is None else logits
    return Samples(images, labels, torch.full((count,), task), logits)


def test_a_reservoir_keeps_every_image_with_equal_probability():
    counts, rounds = Counter(), 400
    for seed in range(rounds):
        buffer = Buffer(False, None, 10)
        buffer.added[9, 9] = 0
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
        for part in samples(40).take(order).labels.new_tensor(range(40)).split(7):
            buffer.add(samples(40).take(order[part]))
        assert len(buffer) == 10
        counts.update(int(image[0, 0, 0]) for image in buffer.kept.images)
    assert len(counts) == 40
    spread = math.sqrt(rounds * 0.25 * 0.75)
    assert all(abs(count - rounds / 4) < 4.5 * spread for count in counts.values())


def test_the_reservoir_does_not_prefer_early_or_late_positions():
    kept = torch.zeros(40)
    for offset in range(300):  # the choice follows from how many were added before
        buffer = Buffer(False, None, 10)
        buffer.add(samples(40))
        kept[buffer.kept.images[:, 0, 0, 0].long()] += 1
        buffer = Buffer(False, None, 10)
        for part in range(0, 40, 1 + offset % 8):
            buffer.add(samples(40).take(torch.arange(part, min(40, part + 1 + offset % 8))))
        kept[buffer.kept.images[:, 0, 0, 0].long()] += 1
    assert kept[:20].sum() > 0.2 * kept.sum()
    assert kept[20:].sum() > 0.2 * kept.sum()


def test_the_capacity_grows_with_the_classes_seen():
    buffer = Buffer(False, 3, None)
    buffer.classes = 2
    buffer.add(samples(20))
    assert len(buffer) == buffer.capacity == 6
    buffer.classes = 4
    buffer.add(samples(3, task=1))
    assert len(buffer) == 9
    assert buffer.kept.tasks[6:].tolist() == [1, 1, 1]  # new slots are filled first


def test_a_balanced_buffer_keeps_classes_equally_frequent():
    buffer = Buffer(True, None, 12)
    buffer.add(samples(30, task=0))
    assert len(buffer) == 12  # one task may have it all
    buffer.add(samples(40, task=1, labels=[0] * 30 + [1] * 10))
    buffer.add(samples(2, task=2, labels=[0, 0]))
    counts = Counter(zip(buffer.kept.tasks.tolist(), buffer.kept.labels.tolist(), strict=True))
    assert counts[2, 0] == 2
    assert sorted(counts.values()) == [2, 2, 2, 3, 3]
    assert sum(counts.values()) == 12


def test_a_class_that_is_full_keeps_its_images_with_equal_probability():
    counts = Counter()
    for start in range(500):
        buffer = Buffer(True, None, 4)
        buffer.added[5, 5] = 1000 * start  # another stream of random numbers
        for part in torch.arange(20).split(3):
            buffer.add(samples(20, labels=[0] * 20).take(part))
        counts.update(buffer.kept.images[:, 0, 0, 0].tolist())
    assert len(counts) == 20
    assert all(abs(count - 100) < 4.5 * math.sqrt(500 * 0.2 * 0.8) for count in counts.values())


def test_a_buffer_is_restored_from_its_state():
    for balanced in (False, True):
        whole, parts = Buffer(balanced, 2, None), Buffer(balanced, 2, None)
        for index in range(6):
            more = samples(5, task=index % 2, logits=torch.randn(5, 1 + index % 3))
            for buffer in (whole, parts):
                buffer.classes = 4
                buffer.add(more)
            fresh = Buffer(balanced, 2, None)
            fresh.load_state(parts.state())
            parts = fresh
        assert all(torch.equal(a, b) for a, b in zip(whole.kept, parts.kept, strict=True))
        with pytest.raises(PatchError, match="does not fit"):
            Buffer(balanced, 1, None).load_state(whole.state())
        with pytest.raises(PatchError, match="no buffer"):
            Buffer(balanced, 2, None).load_state({})
    empty = Buffer(False, 2, None)
    empty.load_state(Buffer(False, 2, None).state())
    assert len(empty) == 0


class Invert(nn.Module):
    def forward(self, image):
        return 255 - image


@pytest.mark.parametrize("guard", [ERACE, DERPP, GDumb])
def test_a_buffer_holds_plain_images_which_training_augments_as_their_tasks_ask(guard, image_folder):
    torch.manual_seed(0)
    first = TaskConfig("first", str(image_folder("first", size=4)), transforms=[Invert()])
    second = TaskConfig("second", str(image_folder("second", classes=2, size=4, seed=1)), flip=False)
    data = SequentialTaskDataModule([first, second], image_size=4, batch_size=6)
    piece = guard(per_class=4, total=None)
    module = TILModule(BackboneConfig("test_sharing.two_layers", "random"), [FineTune(), piece])
    plain, inputs, trained, own_logits = [], [], [], module.own_logits

    def watch(features, tasks):
        trained.extend(zip(tasks.tolist(), inputs[-1], strict=True))
        return own_logits(features, tasks)

    module.build(4).register_forward_pre_hook(lambda _, args: inputs.append((args[0] * 255).round().to(torch.uint8)))
    module.own_logits = watch
    for index in range(2):
        data.select(index)
        L.Trainer(max_epochs=3, accelerator="cpu", num_sanity_val_steps=0, **QUIET).fit(module, datamodule=data)
        plain += [image for images, *_ in data.plain_dataloader("train") for image in images]

    def is_one_of(images, image):
        return any(torch.equal(image, other) for other in images)

    assert len(piece.buffer) == 20
    assert all(is_one_of(plain, image) for image in piece.buffer.kept.images)
    unmirrored = {0: [255 - image for image in plain], 1: plain}
    mirrored = {task: [image.flip(-1) for image in images] for task, images in unmirrored.items()}
    assert all(is_one_of(unmirrored[task] + mirrored[task], image) for task, image in trained)
    assert {task for task, image in trained if is_one_of(mirrored[task], image)} == {0}
    assert {task for task, image in trained if is_one_of(unmirrored[task], image)} == {0, 1}


def test_images_are_stored_without_loss():
    piece = ERACE(per_class=4)
    module = learner(FineTune(), piece, classes=2)
    pixels = torch.arange(2 * 48, dtype=torch.uint8).view(2, 3, 4, 4)
    module.plain_images = pixels.double() / 255
    piece.keep(step_of(module, torch.rand(2, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 1])))
    assert torch.equal(piece.buffer.kept.images, pixels)


def test_the_incoming_loss_of_er_ace_compares_only_the_classes_of_its_batch():
    piece = ERACE(per_class=5)
    module = learner(FineTune(), piece, classes=4, old=(2,))
    images, _ = some(3, 4)
    module.plain_images = images
    labels = torch.tensor([0, 2, 2])
    step = step_of(module, images, labels)
    ours = F.cross_entropy(piece.incoming(step.logits, labels), labels)
    present = step.logits[:, [0, 2]]
    assert torch.allclose(ours, F.cross_entropy(present, torch.tensor([0, 1, 1])))
    assert not torch.allclose(ours, F.cross_entropy(step.logits, labels))
    assert piece.loss(step) is None  # nothing to replay yet
    assert len(piece.buffer) == 3
    replayed = piece.loss(step)
    stored = piece.buffer.kept  # the same three, offered again, lie behind
    by_hand = F.cross_entropy(module(stored.images[:3].double() / 255), stored.labels[:3])  # over all four classes
    assert float(replayed) == pytest.approx(float(by_hand), rel=1e-6)


def test_the_two_terms_of_der():
    piece = DERPP(alpha=0.7, beta=0.4, per_class=10)
    module = learner(FineTune(), piece, classes=3, old=(2,))
    module.plain_images = torch.rand(2, 3, 4, 4)
    stored = torch.tensor([[1.0, 2.0, -INF], [0.5, -0.5, 1.5]])
    images = (torch.rand(2, 3, 4, 4) * 255).to(torch.uint8)
    piece.buffer.add(Samples(images, torch.tensor([1, 2]), torch.tensor([0, 1]), stored))
    x = images.double() / 255
    first, second = module.old_heads[0](module.backbone(x[:1]))[0], module.head(module.backbone(x[1:]))[0]
    dark = (((first - stored[0, :2]) ** 2).mean() + ((second - stored[1]) ** 2).mean()) / 2
    again = -(first.log_softmax(0)[1] + second.log_softmax(0)[2]) / 2
    ours = piece.loss(step_of(module, *some(2, 3)))  # draws both
    assert float(ours) == pytest.approx(float(0.7 * dark + 0.4 * again), rel=1e-6)
    wanted = torch.autograd.grad(0.7 * dark + 0.4 * again, list(module.parameters()))
    for a, b in zip(torch.autograd.grad(ours, list(module.parameters())), wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-8)


def test_the_draws_of_der_are_independent(monkeypatch):
    piece = DERPP(per_class=50)
    module = learner(FineTune(), piece, classes=2)
    module.plain_images = torch.rand(8, 3, 4, 4)
    piece.buffer.add(samples(40, logits=torch.zeros(40, 2), size=4))
    drawn, draw = [], Buffer.draw

    def spy(self, *args):
        drawn.append(draw(self, *args))
        return drawn[-1]

    monkeypatch.setattr(Buffer, "draw", spy)
    piece.loss(step_of(module, *some(8, 2)))
    first, second = (set(d.images[:, 0, 0, 0].tolist()) for d in drawn)
    assert len(first) == len(second) == 8
    assert first != second


def test_logits_of_narrow_heads_count_as_much_as_those_of_wide_ones():
    now, then = torch.tensor([[1.0, 3.0, -INF], [1.0, 1.0, 1.0]]), torch.tensor([[0.0, 0.0, -INF], [0.0, 0.0, 0.0]])
    assert float(logit_distance(now, then)) == pytest.approx(((1 + 9) / 2 + 1) / 2)
    assert float(logit_distance(now[:1], then[:1, :2])) == pytest.approx(5)


def test_gdumb_starts_over_on_its_buffer_alone():
    piece = GDumb(total=6)
    module = learner(FineTune(), piece, classes=2, old=(2,))
    start = {n: p.detach().clone() for n, p in module.backbone.named_parameters()}
    piece.buffer.add(samples(8, size=4))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    heads = [p.detach().clone() for p in (*module.old_heads.parameters(), *module.head.parameters())]
    images, labels = some(8, 2)
    give(module, (images, labels))
    seen = []
    module.train_on = lambda *tensors: seen.append(tensors)
    piece.begin_fit()
    assert all(torch.allclose(p, start[n]) for n, p in module.backbone.named_parameters())
    after = [*module.old_heads.parameters(), *module.head.parameters()]
    assert not any(torch.allclose(a, b) for a, b in zip(after, heads, strict=True))
    pixels, kept_labels, tasks = seen[0]
    assert pixels.shape == (6, 3, 4, 4)
    assert sorted(Counter(zip(tasks.tolist(), kept_labels.tolist(), strict=True)).values()) == [1, 1, 2, 2]
    piece.begin_fit()  # resumed: it neither fills the buffer nor starts over
    assert torch.equal(seen[1][0], pixels)


# masks on units


def test_the_gradient_of_a_mask_is_compensated_for_annealing():
    units = UnitMask(5, 400.0).double()
    e = torch.tensor([-5.0, -0.3, 0.0, 0.04, 2.0], dtype=torch.float64)
    with torch.no_grad():
        units.embedding.copy_(e)
    upstream = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0], dtype=torch.float64)
    for s in (1 / 400, 1.0, 20.0, 400.0):
        units.scale = s
        mask = units.mask()
        assert torch.allclose(mask, 1 / (1 + torch.exp(-s * e)))
        (gradient,) = torch.autograd.grad((mask * upstream).sum(), units.embedding)
        plain = s / (1 + torch.exp(-s * e)) / (1 + torch.exp(s * e)) * upstream
        compensation = 400 / s * (torch.cosh(torch.clamp(s * e, -50, 50)) + 1) / (torch.cosh(e) + 1)
        assert torch.allclose(gradient, plain * compensation, rtol=1e-9, atol=1e-12)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.flat, self.fc1, self.act, self.fc2 = nn.Flatten(), nn.Linear(48, 4), nn.ReLU(), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(self.flat(x))))


def test_weights_move_as_far_as_their_units_are_free():
    hat = HAT(sparsity=0.0)
    module = learner(FineTune(), hat, backbone="test_sharing.Mlp")
    net = module.backbone.net
    images, labels = some(6, 3)

    def step(**options):
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.ndim], lr=0.1, **options)
        hat.begin_step(1.0)
        gradients = torch.autograd.grad(F.cross_entropy(module(images), labels), list(before_params()))
        for parameter, gradient in zip(before_params(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        hat.end_step()
        names = [n for n, _ in net.named_parameters()]
        return {n: (dict(net.named_parameters())[n] - before[n], g) for n, g in zip(names, gradients, strict=True)}

    def before_params():
        return [p for _, p in net.named_parameters()]

    moved = step()
    assert torch.allclose(moved["fc1.weight"][0], -0.1 * moved["fc1.weight"][1])  # nothing is in use yet
    used = torch.tensor([1.0, 0.0, 0.25, 0.9], dtype=torch.float64)
    hat.memory.keep({"fc2": used})
    moved = step()
    free = 1 - used
    assert torch.allclose(moved["fc1.weight"][0], -0.1 * free[:, None] * moved["fc1.weight"][1])
    assert torch.allclose(moved["fc1.bias"][0], -0.1 * free * moved["fc1.bias"][1])
    assert torch.allclose(moved["fc2.weight"][0], -0.1 * free[None] * moved["fc2.weight"][1])
    assert (moved["fc2.bias"][0] == 0).all()  # it joins no masked unit
    moved = step(weight_decay=0.5, momentum=0.9)
    assert (moved["fc1.weight"][0][0] == 0).all()
    assert (moved["fc2.weight"][0][:, 0] == 0).all()


@pytest.mark.parametrize("order", [1, -1])
def test_weights_are_protected_whatever_the_order_of_the_pieces(order):
    hat = HAT()
    module = learner(*(FineTune(), hat)[::order], backbone="test_sharing.Mlp")
    hat.memory.keep({"fc2": torch.ones(4)})
    hat.begin_step(0.0)
    before = {n: p.detach().clone() for n, p in module.backbone.net.named_parameters()}
    with torch.no_grad():
        for parameter in module.backbone.net.parameters():
            parameter.add_(1.0)
    hat.end_step()
    kept = [n for n, p in module.backbone.net.named_parameters() if torch.equal(p, before[n])]
    assert sorted(kept) == ["fc1.bias", "fc1.weight", "fc2.bias", "fc2.weight"]


def test_a_weight_between_two_masked_units_is_as_free_as_the_less_used_one():
    hat = HAT()
    network = timm.create_model("resnet26t", num_classes=0)  # three convolutions a block
    hat.attach(network)
    weights = dict(network.named_parameters())
    a, b = torch.rand(64), torch.rand(64)
    used = {name: torch.ones_like(mask.embedding) for name, mask in hat.masks.items()}
    hat.memory.keep(used | {"layer1.0.conv2": a, "layer1.0.conv3": b})

    def freedom(name):
        return hat.freedom(name, weights[name])

    between = freedom("layer1.0.conv2.weight").expand(64, 64, 3, 3)[..., 0, 0]
    by_hand = torch.tensor([[1 - min(float(b[i]), float(a[j])) for j in range(64)] for i in range(64)])
    assert torch.allclose(between, by_hand)
    assert torch.allclose(freedom("layer1.0.bn2.weight"), 1 - b)
    assert freedom("layer1.0.bn3.weight") == 0
    assert freedom("conv1.0.weight").expand(24, 3, 3, 3).sum() == 0


def test_used_units_are_the_maximum_of_all_masks_and_sparsity_counts_the_others():
    hat = HAT(sparsity=2.0)
    module = learner(FineTune(), hat, backbone="test_sharing.Mlp")
    units = hat.masks["fc2"]
    with torch.no_grad():
        units.embedding.copy_(torch.tensor([1.0, -1.0, 0.001, -0.002]))
    hat.end_task()
    first = torch.sigmoid(400 * units.embedding.detach())
    assert torch.allclose(hat.memory.tensors["fc2"], first)
    with torch.no_grad():
        units.embedding.copy_(torch.tensor([-1.0, -1.0, 1.0, 0.5]))
    expected = 2.0 * (units.at(units.hardest) * (1 - first)).sum() / (1 - first).sum()
    assert torch.allclose(hat.loss(None), expected)
    hat.end_task()
    assert torch.allclose(hat.memory.tensors["fc2"], torch.maximum(first, units.at(units.hardest)))
    with torch.no_grad():
        units.embedding.fill_(9.0)
    hat.begin_step(0.0)
    assert units.scale == pytest.approx(1 / 400)
    hat.begin_step(0.5)
    assert units.scale == pytest.approx(200, rel=1e-3)
    hat.end_step()
    assert units.scale == 400
    assert (units.embedding == 6).all()
    assert module.head is not None


# subspaces


def covariance(dimensions, rank, seed, scale=1.0):
    rows = np.random.default_rng(seed).normal(size=(200, rank)) @ np.random.default_rng(seed + 50).normal(
        size=(rank, dimensions)
    )
    return torch.from_numpy(scale * rows.T @ rows)


def dual_gpm(space, matrix, threshold):
    """A step of the authors' `update_DualGPM`: (basis, "remove" or "retain") in NumPy, None before the first task."""
    d = len(matrix)
    if space is None:
        u, s, _ = np.linalg.svd(matrix)
        r = max(int(np.sum(np.cumsum(s**2) / (s**2).sum() < threshold)), 1)
        basis, kind = u[:, :r], "remove"
    else:
        basis, kind = space
        inside = basis @ basis.T @ matrix
        rest = matrix - inside if kind == "remove" else inside
        u, s, _ = np.linalg.svd(rest)
        total, r = (np.linalg.svd(matrix)[1] ** 2).sum(), 0
        if kind == "remove":
            held = (total - (s**2).sum()) / total
            while r < d and held < threshold:
                held, r = held + s[r] ** 2 / total, r + 1
            basis = np.hstack([basis, u[:, :r]])
        else:
            left = (s**2).sum() / total
            while r < d and left >= 1 - threshold:
                left, r = left - s[r] ** 2 / total, r + 1
            kept = basis - u[:, :r] @ u[:, :r].T @ basis
            basis = np.linalg.svd(kept)[0][:, : basis.shape[1] - r]
    if kind == "remove" and basis.shape[1] > d / 2:
        basis, kind = np.linalg.svd(basis)[0][:, basis.shape[1] :], "retain"
    return basis, kind


def authors_a(space, matrix, rank):
    """The rows of A that the authors' `_train` makes for a task, in NumPy."""
    if space is not None:
        inside = space[0] @ space[0].T @ matrix
        matrix = matrix - inside if space[1] == "remove" else inside
    return np.linalg.svd(matrix)[0][:, :rank].T / math.sqrt(3)


def decaying(seed, decay, d=24):
    """Σ x·xᵀ of inputs whose k-th direction has the variance decay^k."""
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]
    return (q * decay ** np.arange(d)) @ q.T


# the factor between variances, and the dimensions that the authors' formula keeps after each of five tasks
@pytest.mark.parametrize(
    ("decay", "sizes", "kinds"),
    [
        (0.4, [1, 3, 5, 8, 11], ["remove"] * 5),
        (0.75, [5, 10, 9, 5, 2], ["remove", "remove", "retain", "retain", "retain"]),
    ],
)
def test_the_space_and_a_are_those_of_the_authors_code(decay, sizes, kinds):
    ours, theirs, found = Subspace(torch.empty(24, 0, dtype=torch.float64), False), None, []
    eye = torch.eye(24, dtype=torch.float64)
    for task in range(5):
        matrix = decaying(task, decay)
        a = design(torch.from_numpy(matrix), ours if task else None, 2).numpy()
        expected = authors_a(theirs, matrix, 2)
        assert np.allclose(a.T @ a, expected.T @ expected, atol=1e-8)  # singular vectors have no sign
        threshold = 0.95 + (1 - 0.95) * task / 5
        ours, theirs = ours.grow(torch.from_numpy(matrix), threshold), dual_gpm(theirs, matrix, threshold)
        onto_rest = eye.numpy() - theirs[0] @ theirs[0].T if theirs[1] == "remove" else theirs[0] @ theirs[0].T
        assert ours.basis.shape == theirs[0].shape
        assert ours.complement == (theirs[1] == "retain")
        assert np.allclose(ours.outside(eye).numpy(), onto_rest, atol=1e-8)
        found.append((ours.basis.shape[1], theirs[1]))
    assert found == list(zip(sizes, kinds, strict=True))


def test_a_is_orthogonal_to_the_inputs_of_old_tasks():
    space = Subspace(torch.empty(20, 0, dtype=torch.float64), False)
    for seed in range(4):
        current = covariance(20, 6, seed)
        directions = design(current, space, 4)
        stored = torch.eye(20, dtype=torch.float64) - space.outside(torch.eye(20, dtype=torch.float64))
        assert float((directions @ stored).abs().max()) < 1e-5
        assert torch.allclose(3 * directions @ directions.T, torch.eye(4, dtype=torch.float64), atol=1e-8)
        space = space.grow(current, 0.6)
    assert space.complement or space.basis.shape[1] > 0


def test_after_the_first_task_the_space_holds_what_the_energy_needs_and_no_more():
    first, second = covariance(12, 12, 3), covariance(12, 12, 4)
    space = Subspace(torch.empty(12, 0, dtype=torch.float64), False).grow(first, 0.7)
    grown = space.grow(second, 0.7)
    held = 1 - grown.outside(second).square().sum() / second.square().sum()
    fewer = 1 - Subspace(grown.basis[:, :-1], False).outside(second).square().sum() / second.square().sum()
    assert not grown.complement
    assert fewer < 0.7 <= held
    assert grown.grow(second, 0.7).basis.shape == grown.basis.shape  # the same inputs ask for nothing more


def test_the_basis_of_the_complement_means_the_same_space():
    def guarded(space):
        return torch.eye(12, dtype=torch.float64) - space.outside(torch.eye(12, dtype=torch.float64))

    first, second = covariance(12, 12, 5), covariance(12, 12, 6, 3.0)
    space = Subspace(torch.empty(12, 0, dtype=torch.float64), False).grow(first, 0.9999)
    assert space.complement  # more than half of the dimensions are in it
    assert space.basis.shape[1] <= 6
    direct = Subspace(torch.linalg.svd(guarded(space))[0][:, : 12 - space.basis.shape[1]], False)
    assert torch.allclose(guarded(direct), guarded(space), atol=1e-10)
    assert torch.allclose(guarded(direct.grow(second, 0.99)), guarded(space.grow(second, 0.99)), atol=1e-8)


def test_a_has_no_row_for_directions_that_the_inputs_do_not_have():
    directions = design(covariance(10, 2, 1), None, 4)
    assert (directions[2:] == 0).all()
    assert float(directions[:2].norm()) > 0.1
    assert design(covariance(3, 3, 1), None, 5).shape == (5, 3)


def test_inflora_observes_the_inputs_of_linear_layers_and_convolutions():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1, stride=2)
            self.layer = nn.Linear(16, 5)

        def forward(self, x):
            return self.layer(self.conv(x).flatten(1))

    piece = InfLoRA(rank=2, targets=["weight"])
    torch.manual_seed(0)
    network = Both()
    piece.attach(network)

    class Lesson:
        def current(self):
            return network, None

        def batches(self, split):
            yield from ((x, None) for x in images.split(2))

    images = torch.rand(5, 3, 4, 4)
    piece.learner = Lesson()
    sums = piece._covariances()
    inner = network.conv(images).flatten(1).detach().double()
    assert torch.allclose(sums["layer.weight"], inner.T @ inner, atol=1e-4)
    weight = torch.randn(4, 3, 3, 3)
    rows = torch.linalg.eigvalsh(sums["conv.weight"])
    assert rows.shape == (27,)
    # Σ‖w·x‖² over all positions is both Σ of squared outputs and w·Σxxᵀ·w
    outputs = F.conv2d(images, weight, padding=1, stride=2).double()
    flat = weight.flatten(1).double()
    assert torch.allclose((flat @ sums["conv.weight"] * flat).sum(), outputs.square().sum(), rtol=1e-5)
    assert not any(module._forward_pre_hooks for module in (network.conv, network.layer))


# prompts


@pytest.fixture
def prompted():
    torch.manual_seed(3)
    network = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=0, **TINY_VIT).eval()
    network.requires_grad_(False)
    images = torch.rand(4, 3, 16, 16)
    query = network(images)
    piece = L2P(pool=6, length=2, chosen=3, strength=0.5)
    piece.attach(network)
    return network, piece, images, query


def test_prompts_are_those_whose_keys_are_nearest_to_the_query(prompted):
    network, piece, images, query = prompted
    features = network(images)
    keys, prompts = (piece.parameters[name].detach().numpy() for name in ("keys", "prompts"))
    q = query.numpy()
    cosine = q @ keys.T / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(keys, axis=1)
    nearest = np.argsort(-cosine, axis=1)[:, :3]
    loss = piece.loss(None)
    assert float(loss) == pytest.approx(-0.5 * np.take_along_axis(cosine, nearest, 1).sum(1).mean(), rel=1e-5)
    tokens = torch.from_numpy(prompts[nearest]).flatten(1, 2)  # (B, 6, D)
    x = network.norm_pre.forward(network.patch_drop(network._pos_embed(network.patch_embed(images))))
    x = network.blocks(torch.cat([tokens, x], 1))
    by_hand = F.layer_norm(x, (32,), network.norm.weight, network.norm.bias, network.norm.eps)[:, :6].mean(1)
    assert torch.allclose(features, by_hand, atol=1e-5)
    (gradient,) = torch.autograd.grad(features.sum() + loss, piece.parameters["prompts"], retain_graph=True)
    chosen = set(nearest.flatten().tolist())
    assert {i for i in range(6) if gradient[i].abs().sum() > 0} == chosen
    (gradient,) = torch.autograd.grad(loss, piece.parameters["keys"])
    assert {i for i in range(6) if gradient[i].abs().sum() > 0} == chosen


def test_the_query_depends_on_neither_prompts_nor_the_batch(prompted):
    network, piece, images, query = prompted
    together = network(images)
    assert torch.equal(piece.pool.query, query)
    assert not piece.pool.query.requires_grad
    alone = torch.cat([network(image[None]) for image in images])
    assert torch.allclose(alone, together, atol=1e-5)


def test_l2p_works_on_the_vision_transformers_of_torchvision_too():
    import torchvision

    network = torchvision.models.VisionTransformer(16, 8, 2, 2, 12, 16).eval()
    network.heads = nn.Identity()
    plain = network(torch.rand(2, 3, 16, 16))
    L2P().attach(network)
    assert network(torch.rand(2, 3, 16, 16)).shape == plain.shape
    with pytest.raises(MethodError, match="needs a vision transformer"):
        L2P().attach(torchvision.models.resnet18())


# hypernetwork


def three_layers():
    """(B, 3, 4, 4) to (B, 5); two weights have one shape."""
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))


def generator(piece):
    """The numbers of a generator, all different, in float64."""
    numbers, random = {}, np.random.default_rng(4)
    for name, parameter in piece.parameters.items():
        numbers[name] = random.normal(0, 0.4, parameter.shape)
        parameter.data = torch.tensor(numbers[name])
    return numbers


def unrolled(numbers, embedding):
    """What the generator makes for an embedding: the GRU of Cho et al. (2014) with torch's order of gates, in NumPy."""

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    state, made = np.zeros(numbers["cell.weight_hh"].shape[1]), []
    for layer in numbers["layers"]:
        from_input = numbers["cell.weight_ih"] @ np.concatenate([embedding, layer]) + numbers["cell.bias_ih"]
        from_state = numbers["cell.weight_hh"] @ state + numbers["cell.bias_hh"]
        (r, z, n), (r_, z_, n_) = np.split(from_input, 3), np.split(from_state, 3)
        update = sigmoid(z + z_)
        state = (1 - update) * np.tanh(n + sigmoid(r + r_) * n_) + update * state
        made.append(numbers["output.weight"] @ state)
    return np.array(made)


def changes(numbers, embedding):
    return unrolled(numbers, embedding) - unrolled(numbers, np.zeros_like(embedding))


def generating(**settings):
    piece = Hypernetwork(BankLayout([r"[35]\.weight"], templates=2), size=3, hidden=4, **settings)
    return piece, learner(piece, backbone="test_sharing.three_layers")


def test_a_generator_starts_each_task_from_the_pretrained_weights_and_makes_coefficients_layer_by_layer():
    plain = BackboneConfig("test_sharing.three_layers", "random")
    piece, module = generating()
    torch.manual_seed(0)
    pretrained = plain.build(4).net.double()
    net = module.backbone.net
    for index in (3, 5):
        assert torch.allclose(net[index].weight, pretrained[index].weight, atol=1e-6)
    start = [net[index].weight.detach().numpy() for index in (3, 5)]
    numbers = generator(piece)
    (bank,) = piece.decomposition.banks
    assert bank.group.targets == ("3.weight", "5.weight")
    for weight, index, change in zip(start, (3, 5), changes(numbers, numbers["embedding"]), strict=True):
        wanted = weight + np.einsum("i,irc->rc", change, bank.templates.double().numpy())
        assert np.allclose(net[index].weight.detach().numpy(), wanted, atol=1e-6)
    module.begin_task("next", ["a", "b"])
    assert all(np.array_equal(net[i].weight.detach().numpy(), w) for i, w in zip((3, 5), start, strict=True))
    assert not net[3].parametrizations.weight.original0.requires_grad


def test_the_penalty_is_the_mean_over_earlier_tasks_of_squared_changes():
    piece, module = generating(strength=0.3)
    assert piece.loss(None) is None
    before = generator(piece)
    embeddings = [before["embedding"], np.array([0.5, -1.0, 2.0])]
    piece.end_task()
    module.begin_task("next", ["a", "b"])
    assert not piece.generator.embedding.any()
    piece.generator.embedding.data = torch.tensor(embeddings[1])
    after = before | {"output.weight": before["output.weight"] + 0.1, "layers": before["layers"] * 1.5}
    for name in ("output.weight", "layers"):
        piece.parameters[name].data = torch.from_numpy(after[name])
    wanted = 0.3 * np.square(changes(after, embeddings[0]) - changes(before, embeddings[0])).sum()
    loss = piece.loss(None)
    assert loss.item() == pytest.approx(wanted, rel=1e-12)
    assert torch.autograd.grad(loss, piece.generator.embedding, allow_unused=True) == (None,)
    piece.end_task()  # what is kept of the first task is what the generator makes for it now
    kept = piece.memory.tensors
    assert np.allclose(kept["embeddings"], embeddings, atol=0)
    assert np.allclose(kept["changes"], [changes(after, e) for e in embeddings], atol=1e-12)
    last = after | {"cell.bias_hh": after["cell.bias_hh"] - 0.2}
    piece.parameters["cell.bias_hh"].data = torch.from_numpy(last["cell.bias_hh"])
    distances = [np.square(changes(last, e) - changes(after, e)).sum() for e in embeddings]
    assert piece.loss(None).item() == pytest.approx(0.3 * np.mean(distances), rel=1e-12)
    assert Hypernetwork(BankLayout(["weight"]), strength=0).loss(None) is None


def test_a_shared_state_of_another_generator_is_refused():
    piece, _ = generating()
    piece.end_task()
    state = piece.shared_state()
    with pytest.raises(PatchError, match="embeddings"):
        piece.load_shared_state(state | {"embeddings": state["embeddings"][:, :2]})
    with pytest.raises(PatchError, match="output"):
        piece.load_shared_state({name: tensor for name, tensor in state.items() if "output" not in name})


# refusals


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: EWC(-1), "strength=-1"),
        (lambda: LwF(temperature=0), "temperature=0"),
        (lambda: WeightAligning(temperature=0), "WeightAligning: temperature=0"),
        (lambda: GDumb(per_class=3), "per_class=3 or total=4400"),
        (lambda: ERACE(per_class=None), "per_class=None"),
        (lambda: DERPP(per_class=0), "per_class=0"),
        (lambda: DERPP(alpha=-1), "alpha=-1"),
        (lambda: HAT(hardest=1), "hardest=1"),
        (lambda: HAT().attach(nn.Linear(2, 2)), "no two consecutive layers"),
        (lambda: InfLoRA(rank=0), "rank=0"),
        (lambda: InfLoRA(energy=1.5), "energy=1.5"),
        (lambda: InfLoRA(targets=["conv"]).attach(timm.create_model("mobilenetv2_050")), "grouped"),
        (lambda: L2P(pool=3, chosen=4), "chosen=4"),
        (lambda: Hypernetwork(BankLayout(["weight"]), hidden=0), "hidden=0"),
        (lambda: Hypernetwork(BankLayout(["weight"]), strength=-1), "strength=-1"),
    ],
)
def test_an_invalid_setting_is_named(make, named):
    with pytest.raises(MethodError, match=named):
        make()


def guards():
    return [EWC(), LwF(), ERACE(), DERPP(), GDumb(), HAT(), WeightAligning(), NAPAVQ(), IDER(), GradientSums()]


@pytest.mark.parametrize("index", range(len(guards())))
def test_a_guard_with_nothing_to_protect_is_refused(index):
    for others in (
        [LinearProbe()],
        [LoRA()],
        [Recast(BankLayout(["weight"]))],
        [FullFineTune()],
        [InfLoRA()],
        [Hypernetwork(BankLayout(["weight"]))],
        [EWC(), Growth()],
        [LwF(), HAT()],
    ):
        pieces = [piece for piece in others if type(piece) is not type(guards()[index])]
        with pytest.raises(MethodError, match=r"no piece (before|beside) it trains such weights; list FineTune"):
            TILModule(BackboneConfig("test_sharing.two_layers", "random"), [*pieces, guards()[index]])


@pytest.mark.parametrize("index", range(len(guards())))
def test_a_guard_listed_too_early_or_twice_is_refused(index):
    backbone, guard, again = BackboneConfig("test_sharing.Mlp", "random"), guards()[index], guards()[index]
    if isinstance(guard, HAT):
        TILModule(backbone, [guard, FineTune()])  # any order will do
    else:
        with pytest.raises(MethodError, match="list FineTune before it"):
            TILModule(backbone, [guard, FineTune()])
    with pytest.raises(MethodError, match="listed twice"):
        TILModule(backbone, [FineTune(), guard, again])


def test_guards_protect_what_tasks_share_and_nothing_else():
    ewc, lora = EWC(), LoRA(targets=["weight"])
    module = learner(lora, FineTune(), ewc)
    give(module, some(3, 3))
    ewc.end_task()
    assert not [name for name in ewc.memory.tensors if name.endswith((".A", ".B"))]
    hat, lora = HAT(), LoRA(targets=["weight"])
    module = learner(FineTune(), lora, hat, backbone="test_sharing.Mlp")
    hat.memory.keep({"fc2": torch.ones(4)})
    hat.begin_step(0.0)
    with torch.no_grad():
        for piece in (module.pieces[0], lora):
            for parameter in piece.parameters.values():
                parameter.fill_(7.0)
    hat.end_step()
    assert all((p == 7).all() for p in lora.parameters.values())
    assert not any((p == 7).any() for n, p in module.pieces[0].parameters.items() if n.startswith("fc"))


def test_what_guards_remember_moves_with_the_module():
    ewc, lwf, hat = EWC(), LwF(), HAT()
    module = learner(FineTune(), ewc, lwf, hat, backbone="test_sharing.Mlp", old=(2,)).float()
    images, labels = some(3, 3)
    give(module, (images.float(), labels))
    for guard in (ewc, hat):
        guard.end_task()
    module.double()
    assert {t.dtype for guard in (ewc, lwf, hat) for t in guard.memory.tensors.values()} == {torch.float64}
    assert all(len(guard.memory.tensors) for guard in (ewc, lwf, hat))
    assert not any(p.requires_grad for p in module.memories.parameters())
    assert not [n for n in trainable_state(module) if n.startswith("memories")]


def test_a_shared_state_that_does_not_fit_is_refused(tmp_path):
    module = learner(FineTune(), EWC(), old=())
    give(module, some(3, 3))
    module.pieces[1].end_task()
    state = module.shared_state()
    path = tmp_path / "shared.safetensors"
    state.save(path)
    assert SharedState.load(path).nbytes == state.nbytes > 0
    with pytest.raises(PatchError, match=r"\['FineTune', 'EWC'\].*not of \['FineTune'\]"):
        learner(FineTune()).load_shared_state(SharedState.load(path))
    with pytest.raises(PatchError, match="not a patch"):
        TaskPatch.load(path)
    module.patch({}).save(tmp_path / "patch.safetensors")
    with pytest.raises(PatchError, match="not a shared state"):
        SharedState.load(tmp_path / "patch.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(PatchError, match=r"shared\.safetensors"):
        SharedState.load(path)
    for broken in ({}, {"fisher:net.1.weight": torch.zeros(1)}):
        with pytest.raises(PatchError, match="EWC"):
            module.pieces[1].load_shared_state(broken)
