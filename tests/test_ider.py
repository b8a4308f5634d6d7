"""IDER: its formulas against a small network worked out in NumPy."""

import numpy as np
import pytest
import timm
import torch
from conftest import TINY_VIT
from test_sharing import learner, some, step_of
from torch import nn

from recast_pl import IDER, FineTune
from recast_pl.errors import MethodError
from recast_pl.methods.buffer import Samples

CLASSES = 7  # that the second input has room for; the tests have five


class Blocks(nn.Module):
    """(B, 3, 4, 4) to (B, 6) by two blocks."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(48, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))

    def forward(self, images):
        tokens = self.embed(images.flatten(1))[:, None]  # (B, 1, 6)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens[:, 0]


def started(**settings):
    """A module in a task of three classes after one of two, whose second input is not zero any more."""
    piece = IDER(classes=CLASSES, per_class=20, **settings)
    module = learner(FineTune(), piece, old=(2,), backbone="test_ider.Blocks")
    shake(module)
    piece.begin_task()  # what the network is now, is the teacher
    before = weights(module)
    shake(module)
    module.plain_images = torch.rand(4, 3, 4, 4)
    return module, piece, before


def shake(module):
    with torch.no_grad():
        for parameter in [*module.backbone.parameters(), *module.old_heads.parameters(), *module.head.parameters()]:
            parameter.add_(0.3 * torch.randn_like(parameter))


def weights(module):
    heads = torch.cat([h.weight for h in (*module.old_heads, module.head)])
    biases = torch.cat([h.bias for h in (*module.old_heads, module.head)])
    named = {name: p.detach().clone().numpy() for name, p in module.backbone.net.named_parameters()}
    scaled = {"mean": module.backbone.mean.numpy(), "std": module.backbone.std.numpy()}
    return named | scaled | {"heads": heads.detach().clone().numpy(), "biases": biases.detach().clone().numpy()}


def softmax(z):
    return np.exp(z) / np.exp(z).sum(1, keepdims=True)


def by_hand(w, images, second=None):
    """f: logits (B, 5) of images with a second input (B, 5), or the empty one."""
    y = np.full((len(images), CLASSES), 1 / CLASSES)
    if second is not None:
        y = np.concatenate([second, np.zeros((len(images), CLASSES - second.shape[1]))], 1)
    x = ((images.numpy() - w["mean"]) / w["std"]).reshape(len(images), -1) @ w["embed.weight"].T + w["embed.bias"]
    x = np.tanh(x @ w["blocks.0.0.weight"].T + w["blocks.0.0.bias"])
    added = y @ w["blocks.1.0.added.linear.weight"].T + w["blocks.1.0.added.linear.bias"]
    x = x + np.where(added > 0, added, 0.01 * added)
    x = np.tanh(x @ w["blocks.1.0.weight"].T + w["blocks.1.0.bias"])
    return x @ w["heads"].T + w["biases"]


def supervised(w, images, labels, empty):
    first = by_hand(w, images, None if empty else np.eye(5)[labels])
    twice = (first, by_hand(w, images, softmax(first)))
    return sum(-np.log(softmax(z)[np.arange(len(labels)), labels]).mean() for z in twice) / 2


def distance(w, before, images):
    first = by_hand(w, images)
    return np.mean((first[:, :2] - by_hand(before, images, softmax(first))[:, :2]) ** 2)


def stored(piece):
    images = (torch.rand(4, 3, 4, 4) * 255).to(torch.uint8)
    labels, tasks = torch.tensor([1, 2, 0, 0]), torch.tensor([0, 1, 0, 1])
    piece.buffer.classes = 5
    piece.buffer.add(Samples(images, labels, tasks, torch.zeros(4, 3)))
    return images.double() / 255, np.array([1, 4, 0, 2])  # among the classes of both tasks


@pytest.mark.parametrize("empty", [0.0, 1.0])
def test_all_terms_of_a_later_task(empty):
    module, piece, before = started(alpha=0.3, beta=0.7, empty=empty)
    replayed, classes = stored(piece)
    images, labels = some(4, 3)
    step, w = step_of(module, images, labels), weights(module)
    wanted = supervised(w, images, labels.numpy() + 2, empty) + 0.7 * supervised(w, replayed, classes, empty)
    wanted += 0.3 * (distance(w, before, images) + distance(w, before, replayed))
    loss = piece.loss(step) + module.loss(step.logits, labels)
    assert float(loss) == pytest.approx(wanted, rel=1e-9)
    assert len(piece.buffer) == 8
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    found = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    assert all(g.abs().sum() > 0 for g in found.values())
    # the gradient of a weight before the second input, of one behind it, and of the second input itself
    for name in ("embed.weight", "blocks.1.0.weight", "blocks.1.0.added.linear.weight"):
        moved = [w | {name: w[name] + delta * np.eye(*w[name].shape)} for delta in (1e-5, -1e-5)]
        up, down = (
            supervised(v, images, labels.numpy() + 2, empty)
            + 0.7 * supervised(v, replayed, classes, empty)
            + 0.3 * (distance(v, before, images) + distance(v, before, replayed))
            for v in moved
        )
        ours = float(found[f"backbone.net.{name}"].diagonal().sum())
        assert ours == pytest.approx((up - down) / 2e-5, rel=1e-5)


def test_the_first_task_has_neither_a_teacher_nor_at_first_a_replay():
    piece = IDER(classes=CLASSES)
    module = learner(FineTune(), piece, backbone="test_ider.Blocks")
    module.plain_images = torch.rand(4, 3, 4, 4)
    images, labels = some(4, 3)
    step = step_of(module, images, labels)
    loss = piece.loss(step) + module.loss(step.logits, labels)
    w = weights(module)
    first = by_hand(w, images)
    assert (w["blocks.1.0.added.linear.weight"] == 0).all()  # the pretrained network is unchanged
    wanted = -np.log(softmax(first)[np.arange(4), labels.numpy()]).mean()  # so both passes are the same
    assert float(loss) == pytest.approx(wanted, rel=1e-9)
    assert not piece.memory.tensors


def test_the_first_input_of_a_batch_is_empty_with_probability_p():
    _, piece, _ = started(empty=0.3)
    images, labels = some(4, 3)
    empty, count = piece.outputs(images), 0
    for _ in range(200):
        count += piece.passes(images, empty, labels)[0] is empty
    assert 0.2 < count / 200 < 0.4


def test_the_two_replayed_terms_draw_their_images_independently(monkeypatch):
    module, piece, _ = started()
    piece.buffer.classes = 5
    images = torch.arange(40, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    zeros = torch.zeros(40, dtype=torch.long)
    piece.buffer.add(Samples(images, zeros, zeros, torch.zeros(40, 2)))
    drawn, draw = [], piece.buffer.draw
    monkeypatch.setattr(piece.buffer, "draw", lambda count: drawn.append(draw(count)) or drawn[-1])
    piece.loss(step_of(module, *some(4, 3)))
    first, second = (set(d.images[:, 0, 0, 0].tolist()) for d in drawn)
    assert first != second


@pytest.mark.parametrize(
    ("name", "args", "block"),
    [
        ("vit_tiny_patch16_224", TINY_VIT | {"img_size": 16}, "blocks.6"),
        ("resnet18", {}, "layer3.0"),
        ("tf_efficientnet_lite0", {}, "blocks.3.0"),
    ],
)
def test_the_second_input_enters_before_the_middle_block(name, args, block):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=0, **args).eval()
    images = torch.rand(2, 3, 16, 16)
    plain = network(images)
    piece = IDER(classes=4)
    piece.attach(network)
    assert torch.equal(network(images), plain)
    nn.init.normal_(piece.second.linear.weight)
    seen = []
    network.get_submodule(block).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network(images)
    with piece.second.of(torch.tensor([[0.0, 1], [0.5, 0.5]])):
        given = network(images)
    assert not torch.equal(given, plain)
    weight = piece.second.linear.weight
    added = [nn.functional.leaky_relu(weight @ y) for y in torch.tensor([[0.25] * 4, [0, 1, 0, 0]])]
    difference = seen[1][0] - seen[0][0]  # of the first image: its second input less the empty one
    axis = 0 if difference.ndim == 3 else -1  # channels
    wanted = (added[1] - added[0]).view(-1, *[1] * (difference.ndim - 1 if axis == 0 else 0))
    torch.testing.assert_close(difference, wanted.expand_as(difference), atol=1e-4, rtol=1e-4)


def test_what_tasks_share_holds_the_second_input_and_the_buffer():
    _, piece, _ = started()
    stored(piece)
    state = piece.shared_state()
    _, other, _ = started()
    other.load_shared_state(state)
    assert all(torch.equal(other.shared_state()[name], tensor) for name, tensor in state.items())
    assert "weight" not in piece.training_state()  # a checkpoint has it among the parameters


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: IDER(alpha=-1), "alpha=-1"),
        (lambda: IDER(beta=-1), "beta=-1"),
        (lambda: IDER(empty=2), "empty=2"),
        (lambda: IDER(classes=0), "classes=0"),
        (lambda: IDER(per_class=3, total=4), "per_class=3 or total=4"),
        (lambda: IDER().attach(nn.Sequential(nn.Linear(2, 2))), "IDER: targets .* match none"),
        (lambda: IDER().attach(nn.ModuleDict({"blocks": nn.Sequential(nn.Tanh())})), "cannot extend a Tanh"),
        (
            lambda: learner(FineTune(), IDER(classes=4), classes=3, old=(2,), backbone="test_ider.Blocks"),
            "classes=4 are fewer than the 5 of the tasks so far",
        ),
    ],
)
def test_an_invalid_setting_is_named(make, named):
    with pytest.raises(MethodError, match=named):
        make()
