"""Chosen directions: which entries are chosen, where their values go, and what a patch holds of them."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_all_methods import VIT, fit
from test_methods import Two
from torch import nn

from recast_pl import Chosen, TaskPatch, TILModule
from recast_pl.data.batches import TaskSplit
from recast_pl.errors import MethodError, PatchError
from recast_pl.methods.adaptation import ATTENTION, MLP


def attached(piece, network):
    network.requires_grad_(False)
    piece.attach(network)
    return piece


def singular(weight, rank):
    """UΣ and Vᵀ in double precision, the largest entry of a direction on the left being positive."""
    u, s, vt = np.linalg.svd(weight.double().numpy())
    signs = np.array([np.sign(max(u[:, k], key=abs)) for k in range(rank)])
    return u[:, :rank] * s[:rank] * signs, vt[:rank] * signs[:, None]


class Recorded(Chosen):
    """Keeps the head that the entries were chosen with."""

    def begin_training(self, head):
        self.head = copy.deepcopy(head)
        super().begin_training(head)


@pytest.mark.parametrize("diagonal", [True, False])
def test_the_entries_are_those_of_the_largest_gradient_in_a_float64_copy(diagonal, data, tmp_path):
    for image in sorted((tmp_path / "first" / "class0").iterdir())[:4]:
        image.unlink()  # so that the classes differ in size
    torch.manual_seed(0)
    plain = copy.deepcopy(VIT.build(32)).double()
    torch.manual_seed(0)
    piece = Recorded(count=20, rank=3, diagonal=diagonal, batches=None, targets=[MLP, ATTENTION])
    module = TILModule(VIT, [piece], balanced=True, label_smoothing=0.1)
    fit(module, data, max_epochs=0)
    images, labels = (torch.cat(part) for part in zip(*module.batches("train"), strict=True))
    assert len(labels.bincount().unique()) > 1
    weights = [plain.net.get_parameter(name).requires_grad_() for name in piece.adaptations]
    logits = piece.head.double()(plain(images.double()))
    errors = F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    gradients = torch.autograd.grad((errors / labels.bincount()[labels]).sum(), weights)
    entries = []
    for weight, gradient in zip(weights, gradients, strict=True):
        left, right = singular(weight.detach(), 3)
        core = np.abs(left.T @ gradient.numpy() @ right.T)
        entries.append(core.diagonal() if diagonal else core.flatten())
    ranked = np.concatenate(entries).argsort()[::-1]
    assert sorted(ranked[:20].tolist()) == piece.indices.tolist()
    assert ranked[:20].max() >= 60  # which the first weights do not have
    assert module.task_parameters == piece.values.numel() == 20


@pytest.mark.parametrize("kind", ["sgd", "logistic", "lda"])
def test_entries_are_chosen_with_a_solved_head_of_every_kind(kind, data):
    torch.manual_seed(0)
    piece = Recorded(count=5, rank=2)
    module = TILModule(VIT, [piece], head=kind)
    module.build(32)
    fit(module, data, max_epochs=0)
    with torch.no_grad():
        images, labels = (torch.cat(part) for part in zip(*module.batches("train"), strict=True))
        right = (piece.head(module.backbone(images)).argmax(1) == labels).float().mean()
    assert right > 0.9
    assert torch.equal(piece.head.weight, module.head.weight) == (kind != "sgd")


def test_a_choice_reads_each_training_image_once(data, monkeypatch):
    read, plain = [], TaskSplit.__getitems__

    class Counting(Chosen):
        def begin_training(self, head):
            read.clear()
            super().begin_training(head)
            self.read = sum(read)

    monkeypatch.setattr(TaskSplit, "__getitems__", lambda split, keys: read.append(len(keys)) or plain(split, keys))
    piece = Counting(count=5, rank=2, batches=2)
    module = TILModule(VIT, [piece])
    fit(module, data, max_epochs=0)
    assert piece.read == data.sizes["train"] > 2 * data.batch_size
    assert module.batch_count("train") == sum(1 for _ in module.batches("train"))


@pytest.mark.parametrize("diagonal", [True, False])
def test_a_value_belongs_to_the_entry_of_its_number(diagonal):
    torch.manual_seed(1)
    network = Two()
    before = [layer.weight.detach().clone() for layer in (network.first, network.second)]
    piece = attached(Chosen(count=3, rank=3, diagonal=diagonal, targets=["first", "second"]), network)
    assert torch.equal(network.first.weight, before[0])
    numbers, wanted = (
        ([1, 2, 5], [(0, 1, 1), (0, 2, 2), (1, 2, 2)]) if diagonal else ([1, 8, 12], [(0, 0, 1), (0, 2, 2), (1, 1, 0)])
    )
    values = [0.5, -2.0, 1.5]
    piece.load_task_state(
        {"indices": torch.tensor(numbers, dtype=torch.uint8)[:, None], "values": torch.tensor(values)}
    )
    by_hand = [weight.double().numpy() for weight in before]
    for (layer, a, b), value in zip(wanted, values, strict=True):
        left, right = singular(before[layer], 3)
        by_hand[layer] = by_hand[layer] + value * np.outer(left[:, a], right[b])
    for layer, weight in zip((network.first, network.second), by_hand, strict=True):
        assert np.allclose(layer.weight.detach().numpy(), weight, atol=1e-5)


def test_a_weight_without_a_chosen_entry_takes_no_part_in_a_step():
    network = Two()
    piece = attached(Chosen(count=2, rank=3, targets=["first", "second"]), network)
    piece.load_task_state({"indices": torch.tensor([[3], [5]], dtype=torch.uint8), "values": torch.ones(2)})
    assert network.first.weight is network.first.parametrizations.weight.original
    assert not network.first(torch.rand(1, 6)).requires_grad
    network(torch.rand(1, 6)).sum().backward()
    assert piece.values.grad.count_nonzero() == 2


class Lesson:
    """Training images that are their own number, in batches of these sizes."""

    def __init__(self, sizes):
        self.parts = torch.arange(sum(sizes)).split(list(sizes))

    def batches(self, split):
        assert split == "train"
        return ((part[:, None], part) for part in self.parts)

    def batch_count(self, split):
        assert split == "train"
        return len(self.parts)


@pytest.mark.parametrize(
    ("sizes", "batches", "step", "seen"),
    [([4, 4, 4, 2], None, 1, [4, 4, 4, 2]), ([4, 4, 4, 2], 2, 2, [4, 3]), ([2] * 9, 3, 3, [2, 2, 2]), ([3], 8, 1, [3])],
)
def test_the_gradient_sees_evenly_spaced_images(sizes, batches, step, seen):
    piece = Chosen(batches=batches)
    piece.learner = Lesson(sizes)
    found = list(piece._sample())
    assert torch.cat([labels for _, labels in found]).tolist() == list(range(0, sum(sizes), step))
    assert [len(labels) for _, labels in found] == seen
    assert all(torch.equal(images[:, 0], labels) for images, labels in found)


def test_48_entries_of_vit_small_take_192_bytes(tmp_path):
    torch.manual_seed(0)
    network = nn.ModuleList(nn.Linear(20, 20) for _ in range(48))  # as many weights as ViT-S has
    piece = attached(Chosen(diagonal=False, targets=["weight"]), network)
    chosen = torch.randperm(piece.total)[:48].sort().values
    piece.load_training_state({"indices": chosen})
    state = piece.task_state()
    assert piece.total == 48 * 256
    assert sum(tensor.nbytes for tensor in state.values()) == 48 * (2 + 4)
    facts = {"image_size": 8, "mean": [0.5] * 3, "std": [0.5] * 3, "base": "0" * 64}
    head = {"weight": torch.randn(2, 6), "bias": torch.zeros(2)}
    empty = TaskPatch("t", ["a", "b"], head, [{}], ["Chosen"], **facts).compacted(4)
    patch = TaskPatch("t", ["a", "b"], head, [state], ["Chosen"], **facts).compacted(4)
    described = 40  # bytes at most for names, types and shapes
    assert 192 < len(patch.to_bytes()) - len(empty.to_bytes()) <= 192 + described
    patch.save(tmp_path / "patch")
    piece.begin_task()
    piece.load_task_state(TaskPatch.load(tmp_path / "patch").pieces[0])
    assert torch.equal(piece.indices, chosen)


@pytest.mark.parametrize(
    ("indices", "named"),
    [
        (torch.tensor([[1], [1]], dtype=torch.uint8), "do not ascend"),
        (torch.tensor([[2], [1]], dtype=torch.uint8), "do not ascend"),
        (torch.tensor([[1], [6]], dtype=torch.uint8), "exceed 6"),
        (torch.tensor([[1, 0], [2, 0]], dtype=torch.uint8), "another method"),
        (torch.tensor([[1], [2]]), "torch.int64"),
    ],
)
def test_a_patch_of_other_entries_is_refused(indices, named):
    piece = attached(Chosen(count=2, rank=3, targets=["first", "second"]), Two())
    with pytest.raises(PatchError, match=named):
        piece.load_task_state({"indices": indices, "values": torch.zeros(2)})


@pytest.mark.parametrize(
    ("piece", "named"),
    [
        (lambda: Chosen(count=0), "count=0 and batches=8"),
        (lambda: Chosen(batches=0), "count=48 and batches=0"),
        (lambda: Chosen(rank=6, targets=["first"]), "Chosen: rank=6 must be from 1 to 5 for first.weight"),
        (lambda: Chosen(count=7, rank=3, targets=["weight"]), "count=7 exceeds the 6 entries"),
    ],
)
def test_an_invalid_setting_is_named(piece, named):
    with pytest.raises(MethodError, match=named):
        attached(piece(), Two())
