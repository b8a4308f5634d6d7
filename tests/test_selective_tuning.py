"""What LIFT, KappaTune and CLASSP select, against numpy in double precision."""

import copy

import numpy as np
import pytest
import torch
from test_all_methods import VIT, fit
from torch import nn

from recast_pl import CLASSP, LIFT, FineTune, GradientSums, KappaTune, TILModule
from recast_pl.errors import MethodError, PatchError, RunError
from recast_pl.methods.kappa_tune import condition_number


class Network(nn.Module):
    """A convolution and two matrices, (B, 3, 4, 4) to (B, 6)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 2, stride=2)
        self.first, self.second = nn.Linear(32, 5), nn.Linear(5, 6)

    def forward(self, x):
        return self.second(self.first(self.conv(x).flatten(1)).tanh())


def network(seed=0):
    torch.manual_seed(seed)
    return Network().requires_grad_(False)


def largest_entries(weight, rank):
    """Places of the (m + n)·r entries that are largest in the best approximation of rank r."""
    matrix = weight.detach().double().flatten(1).numpy()
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    approximation = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return set(np.argsort(-np.abs(approximation).ravel(), kind="stable")[: sum(matrix.shape) * rank].tolist())


def changed(after, before):
    return set((after != before).flatten().nonzero().flatten().tolist())


def train(net, piece, optimizer, steps, first=0):
    for step in range(first, first + steps):
        piece.begin_step(0.0)
        images = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        net(images).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        piece.end_step()


# LIFT


@pytest.mark.parametrize("rank", [1, 2])
def test_lift_trains_the_largest_entries_of_the_best_approximation_and_no_others(rank):
    net = network()
    before = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    piece = LIFT(rank=rank, targets=["conv", "first"])
    piece.attach(net)
    assert torch.equal(net.conv.weight, before["conv.weight"])
    optimizer = torch.optim.AdamW(piece.parameters.values(), lr=1e-3, weight_decay=0.1)
    train(net, piece, optimizer, 5)
    for name, layer in (("conv.weight", net.conv), ("first.weight", net.first)):
        wanted = largest_entries(before[name], rank)
        assert len(wanted) == sum(before[name].flatten(1).shape) * rank
        assert changed(layer.weight, before[name]) == wanted  # all others are the same, bit for bit
    assert torch.equal(net.second.weight, before["second.weight"])
    assert piece.task_parameters == rank * (8 + 12 + 5 + 32)
    assert len(piece.task_state()["values"]) == piece.task_parameters


def test_lift_chooses_again_from_the_present_weight_and_lets_the_rest_keep_its_value():
    net = network()
    start = net.first.weight.detach().clone()
    piece = LIFT(every=3, targets=["first"])
    piece.attach(net)
    optimizer = torch.optim.AdamW(piece.parameters.values(), lr=0.2, weight_decay=0.1)
    train(net, piece, optimizer, 3)
    middle = net.first.weight.detach().clone()
    train(net, piece, optimizer, 3, first=3)
    once, twice = largest_entries(start, 1), largest_entries(middle, 1)
    assert changed(middle, start) == once
    assert changed(net.first.weight, middle) == twice  # momentum moves none that rests
    assert once - twice
    assert twice - once
    state = piece.task_state()
    assert set(state["indices"].tolist()) == once | twice
    assert state["indices"].dtype == torch.int32
    values = dict(zip(state["indices"].tolist(), state["values"].tolist(), strict=True))
    for place in once - twice:
        assert start.flatten()[place] + torch.tensor(values[place]) == middle.flatten()[place]


@pytest.mark.parametrize("interrupted", [2, 3, 5])
def test_lift_resumes_between_and_at_choices_byte_for_byte(interrupted):
    def begin():
        net = network()
        piece = LIFT(every=3, targets=["conv", "first"])
        piece.attach(net)
        return net, piece, torch.optim.AdamW(piece.parameters.values(), lr=0.2)

    net, piece, optimizer = begin()
    train(net, piece, optimizer, 8)
    wanted = piece.task_state()
    net, piece, optimizer = begin()
    train(net, piece, optimizer, interrupted)
    kept = copy.deepcopy([net.state_dict(), piece.training_state(), optimizer.state_dict()])
    net, piece, optimizer = begin()
    loads = (net.load_state_dict, piece.load_training_state, optimizer.load_state_dict)
    for load, state in zip(loads, kept, strict=True):
        load(state)
    train(net, piece, optimizer, 8 - interrupted, first=interrupted)
    assert all(torch.equal(piece.task_state()[name], wanted[name]) for name in wanted)


def test_lift_loads_what_it_stored_and_nothing_else():
    net, piece = network(), LIFT(targets=["conv", "first"])
    piece.attach(net)
    train(net, piece, torch.optim.SGD(piece.parameters.values(), lr=0.1), 1)
    state, weights = piece.task_state(), [net.conv.weight.detach().clone(), net.first.weight.detach().clone()]
    piece.begin_task()
    assert piece.task_state()["values"].shape == (0,)
    piece.load_task_state(piece.task_state())
    piece.load_task_state(state)
    assert torch.equal(net.conv.weight, weights[0])
    assert torch.equal(net.first.weight, weights[1])
    for indices in (state["indices"].flip(0), state["indices"] + 96 + 160, state["indices"] - 256):
        with pytest.raises(PatchError, match="ascend, or exceed 256"):
            piece.load_task_state(state | {"indices": indices.int()})
    with pytest.raises(PatchError, match="belongs to another method"):
        piece.load_task_state(state | {"indices": state["indices"][1:]})


def test_a_task_that_lift_leaves_as_it_was_is_used(data):
    module = TILModule(VIT, [LIFT()])
    module.build(32)
    module.begin_task("other", ["a", "b"])
    images = torch.rand(2, 3, 32, 32)
    wanted = module.eval()(images)
    patch = module.patch({})
    fit(module, data)
    module.activate(patch)
    assert torch.equal(module.eval()(images), wanted)


# KappaTune


def test_kappa_tune_trains_the_weights_with_the_lowest_condition_numbers():
    net = network()
    kappa = {
        name: np.linalg.cond(weight.detach().double().flatten(1).numpy())
        for name, weight in net.named_parameters()
        if weight.ndim > 1
    }
    for name, number in kappa.items():
        assert condition_number(net.get_parameter(name)) == pytest.approx(number, rel=1e-9)
    lowest = sorted(kappa, key=kappa.get)
    for share, count in ((0.01, 1), (0.6, 1), (0.7, 2), (1.0, 3)):
        piece = KappaTune(share=share, targets=[r"weight$"])
        piece.attach(copy.deepcopy(net))
        assert set(piece.parameters) == set(lowest[:count])


def test_what_kappa_tune_does_not_choose_stays_as_it_is():
    net = network()
    before = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    piece = KappaTune(share=0.4, targets=[r"weight$"])
    piece.attach(net)
    train(net, piece, torch.optim.AdamW(piece.parameters.values(), lr=0.1), 2)
    (chosen,) = piece.parameters
    assert [name for name, weight in net.named_parameters() if not torch.equal(weight, before[name])] == [chosen]


def test_a_singular_weight_has_an_infinite_condition_number_and_comes_last():
    assert condition_number(torch.zeros(3, 2)) == float("inf")
    assert condition_number(torch.diag(torch.tensor([4.0, 0.5, 0.0]))) == float("inf")
    assert condition_number(torch.diag(torch.tensor([4.0, 0.5]))) == 8
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    for layer, entries in zip(net, ([1.0, 0.0], [1e6, 1.0], [3.0, 1.0]), strict=True):
        layer.weight.data = torch.diag(torch.tensor(entries))
    net.requires_grad_(False)
    piece = KappaTune(share=0.67, targets=["weight"])
    piece.attach(net)
    assert list(piece.parameters) == ["1.weight", "2.weight"]


# CLASSP


@pytest.mark.parametrize("power", [1.0, 2.0, 1.5])
def test_classp_follows_the_rule_of_the_paper(power):
    generator = np.random.default_rng(0)
    weight, summed = generator.normal(size=(3, 4)), np.zeros((3, 4))
    parameter = nn.Parameter(torch.from_numpy(weight.copy()))
    optimizer = CLASSP([parameter], lr=0.2, threshold=0.5, power=power, epsilon=1e-5)
    start, moved = weight.copy(), np.zeros((3, 4), dtype=bool)
    for step in range(6):
        gradient = 0.6 * generator.normal(size=(3, 4))
        parameter.grad = torch.from_numpy(gradient.copy())
        if step == 3:  # a new optimizer goes on from the state of the old one
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = CLASSP([parameter])
            optimizer.load_state_dict(state)
        optimizer.step()
        for i, j in np.ndindex(3, 4):
            if gradient[i, j] ** 2 > 0.5:
                summed[i, j] += abs(gradient[i, j]) ** power
                weight[i, j] -= 0.2 * gradient[i, j] / (1e-5 + summed[i, j]) ** (1 / power)
                moved[i, j] = True
        np.testing.assert_allclose(parameter.detach().numpy(), weight, rtol=1e-12)
        np.testing.assert_allclose(optimizer.state[parameter]["sum"].numpy(), summed, rtol=1e-12)
    assert 0 < moved.sum() < 12
    assert (parameter.detach().numpy()[~moved] == start[~moved]).all()


def test_classp_with_power_2_and_no_threshold_is_adagrad():
    weights = [nn.Parameter(torch.ones(5, dtype=torch.float64)) for _ in range(2)]
    optimizers = [CLASSP([weights[0]], 0.1, 0.0, 2.0, 1e-30), torch.optim.Adagrad([weights[1]], 0.1, eps=1e-15)]
    for step in range(4):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = torch.sin(torch.arange(5.0) + step).double()
            optimizer.step()
    torch.testing.assert_close(*weights, rtol=1e-12, atol=0)


def test_sums_of_gradients_go_on_in_the_next_task_and_in_a_fresh_module(data):
    def module():
        torch.manual_seed(0)
        made = TILModule(VIT, [FineTune(None), GradientSums()], lambda p: CLASSP(p, lr=1e-4, threshold=1e-6), None)
        made.build(32)
        return made

    first = module()
    fit(first, data)
    sums = first.pieces[1].shared_state()
    assert any(summed.any() for summed in sums.values())
    fresh = module()
    fresh.load_shared_state(first.shared_state())
    optimizer = CLASSP(fresh.pieces[0].parameters.values())
    fresh.pieces[1].begin_optimizer(optimizer)
    for name, weight in fresh.backbone.named_parameters():
        assert torch.equal(optimizer.state[weight]["sum"], sums[name])
    fit(first, data, index=1)
    later = first.pieces[1].shared_state()
    assert all((later[name] >= sums[name]).all() for name in sums)
    assert any((later[name] > sums[name]).any() for name in sums)


def test_an_optimizer_without_sums_is_refused(data):
    with pytest.raises(MethodError, match=r"GradientSums: optimizer AdamW keeps no sums .* recast_pl\.CLASSP"):
        fit(TILModule(VIT, [FineTune(), GradientSums()]), data)


@pytest.mark.parametrize(
    ("make", "error", "named"),
    [
        (lambda: LIFT(every=0), MethodError, "LIFT: every=0 must be at least 1"),
        (lambda: LIFT(rank=0, targets=["first"]).attach(network()), MethodError, "LIFT: rank=0 must be from 1 to 4"),
        (lambda: LIFT(rank=5, targets=["first"]).attach(network()), MethodError, "rank=5 .* for first.weight"),
        (lambda: KappaTune(share=0), MethodError, "KappaTune: share=0 must be above 0"),
        (lambda: KappaTune(share=1.1), MethodError, "share=1.1"),
        (
            lambda: KappaTune(targets=["nothing"]).attach(network()),
            MethodError,
            "KappaTune: targ",
        ),
        (
            lambda: KappaTune(targets=["first"]).attach(network()),
            MethodError,
            "first.bias has 1 di",
        ),
        (lambda: CLASSP([torch.zeros(1)], threshold=-1.0), RunError, "CLASSP: lr=0.2 and threshold=-1.0 must not"),
        (lambda: CLASSP([torch.zeros(1)], power=0), RunError, "CLASSP: power=0 and epsilon=1e-05 must be above 0"),
    ],
)
def test_an_invalid_value_is_named(make, error, named):
    with pytest.raises(error, match=named):
        make()
