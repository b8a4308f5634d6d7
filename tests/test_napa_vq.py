"""NAPA-VQ: its formulas against numbers worked out by hand and by loops in NumPy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_sharing import give, learner, some, step_of

from recast_pl import NAPAVQ, FineTune
from recast_pl.errors import MethodError, PatchError


def squares(x, m):
    return np.array([[((a - b) ** 2).sum() for b in m] for a in x])


def navq(x, y, m, edges, k):
    """The loss NA and the edges after it, image by image and edge by edge."""
    d, e, count = squares(x, m), edges.copy(), len(m)
    won, tied = np.zeros(count), np.zeros((count, count))
    for row in d:
        order = np.argsort(row)
        won[order[0]] += 1
        tied[order[0], order[:k]] += 1
    for i in range(count):
        for j in range(count):
            e[i, j] = max(e[i, j], float(tied[i, j] > 0)) * 0.9 ** (won[i] - tied[i, j])
            if e[i, j] < 0.9**10:
                e[i, j] = 0
    losses = []
    for row, label in zip(d, y, strict=True):
        beside = [j for j in range(count) if j != label and e[label, j] > 0]
        w = np.exp(-row[beside] / 1000)
        losses.append(max(0.0, row[label] - (w / w.sum() * row[beside]).sum() if beside else row[label]))
    return np.mean(losses), (e + e.T) / 2


def classified(x, y, m, temperature):
    z = -np.sqrt(squares(x, m)) / temperature
    return np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(len(y)), y])


def begun(classes, old=(), **settings):
    piece = NAPAVQ(**settings)
    module = learner(FineTune(), piece, classes=classes, old=old)
    return module, piece


def line(piece, edges, image, label):
    """NA of one image between five coding vectors 0, 1, 2, 4 and 8 on a line."""
    piece.memory.tensors["edges"].copy_(edges)
    vectors = torch.tensor([[0.0], [1], [2], [4], [8]], dtype=torch.float64)
    features = torch.tensor([[image]], dtype=torch.float64)
    loss = piece.separation(features, torch.tensor([label]), vectors)
    return float(loss), piece.memory.tensors["edges"]


def test_an_image_ties_its_nearest_classes_and_is_pushed_from_the_neighbours_of_its_own():
    _, piece = begun(5, neighbours=2)
    edges = torch.eye(5, dtype=torch.float64)
    loss, edges = line(piece, edges.clone(), 0.25, 1)  # nearest are 0 and 1; class 1 has no neighbours yet
    assert loss == 0.75**2
    assert edges[0].tolist() == [1, 0.5, 0, 0, 0]  # the mean of both directions
    loss, edges = line(piece, edges.clone(), 0.25, 1)
    assert loss == 0.75**2 - 0.25**2
    assert edges[0].tolist() == [1, 0.75, 0, 0, 0]
    loss, edges = line(piece, edges.clone(), 0.9, 1)  # nearer to its own vector than to its neighbour
    assert loss == 0
    for count in range(1, 13):
        edges[0, 3], edges[3, 0] = 0.9 ** (count - 1), 0
        _, edges = line(piece, edges.clone(), 0.25, 0)
        faded = 0.9**count / 2 if count < 11 else 0
        if count != 10:  # on the limit, rounding decides
            assert float(edges[0, 3]) == pytest.approx(faded)
    _, edges = line(piece, torch.eye(5, dtype=torch.float64), 3.75, 1)
    assert edges[3].tolist() == [0, 0, 0.5, 1, 0]


@pytest.mark.parametrize("k", [1, 3, 15])
def test_na_and_edges_of_a_batch_are_those_of_single_images(k):
    random = np.random.default_rng(k)
    _, piece = begun(5, neighbours=k)
    edges = random.uniform(0, 1, (5, 5)) * (random.random((5, 5)) < 0.4)
    np.fill_diagonal(edges, 1)
    piece.memory.tensors["edges"].copy_(torch.from_numpy(edges))
    for _ in range(3):
        x, y, m = 20 * random.normal(size=(9, 6)), random.integers(5, size=9), 20 * random.normal(size=(5, 6))
        features, vectors = (torch.from_numpy(each).requires_grad_() for each in (x, m))
        loss = piece.separation(features, torch.from_numpy(y), vectors)
        expected, edges = navq(x, y, m, edges, k)
        assert loss.item() == pytest.approx(expected, rel=1e-10)
        np.testing.assert_allclose(piece.memory.tensors["edges"].numpy(), edges, rtol=1e-12)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [features, vectors]))


def test_images_that_do_not_count_leave_the_edges():
    _, piece = begun(5)
    before = piece.memory.tensors["edges"].clone()
    vectors = torch.rand(5, 6, dtype=torch.float64)
    piece.separation(torch.rand(3, 6, dtype=torch.float64), torch.tensor([0, 1, 2]), vectors, counts=False)
    assert torch.equal(piece.memory.tensors["edges"], before)


def second_task(**settings):
    """A module in its second task, of three classes after two, which has learnt something of both."""
    module, piece = begun(2, **settings)
    give(module, some(8, 2, seed=4))
    piece.begin_training(None)
    give(module, some(8, 2, seed=4))
    piece.end_task()
    module.old_heads.append(module.head)
    module.begin_task("next", ["a", "b", "c"])
    module.double()
    give(module, some(9, 3, seed=5))
    piece.begin_training(None)
    with torch.no_grad():
        for parameter in [*module.backbone.parameters(), module.head.weight]:
            parameter.add_(0.2 * torch.randn_like(parameter))
    piece.end_step()
    return module, piece


def test_the_loss_of_a_later_task():
    module, piece = second_task(neighbours=2, temperature=0.5, prototypes=3.0, distillation=2.0)
    images, labels = some(6, 3)
    kept = {name: tensor.clone().numpy() for name, tensor in piece.memory.tensors.items()}
    step = step_of(module, images, labels)
    x = step.features.detach().numpy()
    m = np.concatenate([kept["vectors"][:2], module.head.weight.detach().numpy()])
    y = labels.numpy() + 2
    na, edges = navq(x, y, m, kept["edges"], 2)
    torch.manual_seed(3)
    i = torch.randint(2, (6,))
    j = torch.multinomial(torch.from_numpy(edges)[i].gt(0).double(), 1)[:, 0].numpy()
    gamma = 0.5 + torch.rand(6, 1, dtype=torch.float64).numpy() / 2
    p = kept["prototypes"]
    z = gamma * p[i.numpy()] + (1 - gamma) * p[j]
    again, _ = navq(z, i.numpy(), m, edges, 2)
    names = {name.removeprefix("backbone:") for name in kept if name.startswith("backbone:")}
    before = {name: torch.from_numpy(kept[f"backbone:{name}"]) for name in names}
    moved = x - torch.func.functional_call(module.backbone, before, (images,)).detach().numpy()
    by_hand = classified(x, y, m, 0.5) + na + 3 * classified(z, i.numpy(), m, 0.5) + again
    by_hand += 2 * np.sqrt((moved**2).sum())
    torch.manual_seed(3)
    loss = piece.loss(step)
    assert (loss + module.loss(step.logits, labels)).item() == pytest.approx(by_hand, rel=1e-9)
    assert names == dict(module.backbone.named_parameters()).keys()
    gradients = torch.autograd.grad(loss, [module.head.weight, *module.backbone.parameters()])
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in gradients)
    assert not any(p.requires_grad for p in module.old_heads.parameters())  # old coding vectors stay


def test_the_first_task_has_no_prototypes_and_no_teacher():
    module, piece = begun(3, temperature=0.5)
    step = step_of(module, *some(4, 3))
    x, m, y = step.features.detach().numpy(), module.head.weight.detach().numpy(), step.labels.numpy()
    by_hand = classified(x, y, m, 0.5) + navq(x, y, m, np.eye(3), 15)[0]
    assert float(piece.loss(step) + module.loss(step.logits, step.labels)) == pytest.approx(by_hand, rel=1e-9)
    assert piece.shared_state() == {}


def test_no_gradient_is_infinite_where_features_have_not_moved():
    module, piece = second_task()
    state = piece.training_state()
    piece.remember_network()
    piece.memory.keep(piece.memory.tensors | state | {"prototypes": state["vectors"]})  # of distance 0, too
    loss = piece.loss(step_of(module, *some(4, 3)))
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(module.backbone.parameters())))


def test_coding_vectors_start_at_class_means_and_a_head_names_the_nearest_one_then_the_one_of_highest_cosine():
    module, piece = begun(3)
    (images, labels), (more, others) = some(8, 3), some(7, 3, seed=2)
    give(module, (images, labels), (more, others))
    piece.begin_training(None)
    with torch.no_grad():
        features, both = module.backbone(torch.cat([images, more])), torch.cat([labels, others])
    means = np.stack([features[both == c].numpy().mean(0) for c in range(3)])
    np.testing.assert_allclose(module.head.weight.detach().numpy(), means, rtol=1e-10)
    np.testing.assert_allclose(piece.memory.tensors["prototypes"].numpy(), means, rtol=1e-10)
    x = torch.randn(50, 5, dtype=torch.float64)
    assert module.head(x).argmax(1).tolist() == squares(x.numpy(), means).argmin(1).tolist()
    with torch.no_grad():
        for parameter in module.backbone.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        features = module.backbone(torch.cat([images, more]))
    give(module, (images, labels), (more, others))
    piece.end_task()
    np.testing.assert_allclose(piece.memory.tensors["vectors"].numpy(), means, rtol=1e-10)
    cosine = F.normalize(x).numpy() @ (means / np.linalg.norm(means, axis=1)[:, None]).T
    assert module.head(x).argmax(1).tolist() == cosine.argmax(1).tolist()
    means = np.stack([features[both == c].numpy().mean(0) for c in range(3)])
    np.testing.assert_allclose(piece.memory.tensors["prototypes"].numpy(), means, rtol=1e-10)


def test_what_is_shared_is_of_learnt_tasks_and_a_resumed_task_has_its_classes_too():
    _, piece = second_task()
    state = piece.shared_state()
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        "edges": (2, 2),
        "vectors": (2, 5),
        "prototypes": (2, 5),
    }
    training = piece.training_state()
    assert training["prototypes"].shape == (5, 5)
    other, again = begun(2)
    other.old_heads.append(other.head)
    again.load_shared_state(state)
    other.begin_task("next", ["a", "b", "c"])
    again.load_training_state(training)
    assert all(torch.equal(again.training_state()[name], tensor.float()) for name, tensor in training.items())
    with pytest.raises(PatchError, match="NAPAVQ"):
        again.load_shared_state(state | {"edges": torch.zeros(3, 3)})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"neighbours": 0}, "neighbours=0"),
        ({"temperature": 0.0}, "temperature=0"),
        ({"prototypes": -1.0}, "prototypes=-1"),
        ({"distillation": -1.0}, "distillation=-1"),
    ],
)
def test_an_invalid_setting_is_named(settings, named):
    with pytest.raises(MethodError, match=named):
        NAPAVQ(**settings)
