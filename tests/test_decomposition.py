"""Targets and groups, the closed form, equations 1 and 2, installation in networks, and the file."""

import copy
import io
import re

import numpy as np
import pytest
import timm
import torch
import torchvision
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from recast_pl import BackboneConfig, BankLayout, Decomposition, TaskPatch, decompose, install
from recast_pl.decomposition.bank import TemplateBank
from recast_pl.decomposition.parametrization import Mixture
from recast_pl.decomposition.solve import project
from recast_pl.decomposition.targets import find_targets, group_targets
from recast_pl.errors import DecompositionError
from recast_pl.files import pack_tensors

MLP, ATTENTION = r"mlp\.fc[12]\.weight", r"attn\.qkv\.weight"
SQUARE_VIT = {f"blocks.{i}.mlp.fc{j}.weight": (8, 8) for i in range(12) for j in (1, 2)}


class Stack(nn.Module):
    def __init__(self, make, layers):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(make() for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            attention = isinstance(layer, nn.MultiheadAttention)
            x = layer(x, x, x, need_weights=False)[0] if attention else layer(x)
        return x

    def __getitem__(self, index):
        return self.layers[index]


def linears(layers=4, size=6):
    return Stack(lambda: nn.Linear(size, size), layers)


def convolutions(layers=4):
    return Stack(lambda: nn.Conv2d(4, 4, 3, padding=1), layers)


def attentions(layers=2):
    return Stack(lambda: nn.MultiheadAttention(8, 2, batch_first=True), layers)


def rows(weights):
    return np.stack([w.detach().double().numpy().ravel() for w in weights])


def truncated_svd(weights, n):
    """The best approximation of rank n of the stacked weights, by numpy in float64."""
    u, s, v = np.linalg.svd(rows(weights), full_matrices=False)
    return (u[:, :n] * s[:n]) @ v[:n]


def relative(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def coefficient_count(decomposition):
    return sum(bank.coefficients.numel() for bank in decomposition.banks)


# grouping


def test_consecutive_layers_of_one_kind_share_a_bank():
    groups = group_targets(SQUARE_VIT, BankLayout([MLP], groups=6, templates=2))
    expected = [tuple(f"blocks.{2 * g + i}.mlp.fc{j}.weight" for i in (0, 1)) for j in (1, 2) for g in range(6)]
    assert [group.targets for group in groups] == expected
    assert {(group.shape, group.templates) for group in groups} == {((8, 8), 2)}
    assert len({group.name for group in groups}) == 12


def test_equal_shapes_of_two_kinds_do_not_share():
    names = [f"layer1.{i}.conv{j}.weight" for i in (1, 2) for j in (1, 2)]
    groups = group_targets(dict.fromkeys(names, (4, 4, 3, 3)), BankLayout([]))
    assert [group.targets for group in groups] == [tuple(names[0::2]), tuple(names[1::2])]


def test_one_kind_of_two_shapes_does_not_share():
    groups = group_targets({"0.weight": (2, 2), "1.weight": (2, 3), "2.weight": (2, 2)}, BankLayout([]))
    assert [group.targets for group in groups] == [("0.weight", "2.weight"), ("1.weight",)]
    assert len({group.name for group in groups}) == 2  # the file uses the names as keys


def test_the_last_group_holds_the_rest():
    shapes = {f"{i}.weight": (2, 2) for i in range(7)}
    groups = group_targets(shapes, BankLayout([], layers_per_group=3))
    assert [len(group.targets) for group in groups] == [3, 3, 1]
    assert [group.templates for group in groups] == [3, 3, 1]  # as many as needed to be exact


@pytest.mark.parametrize(
    ("layout", "named"),
    [
        (BankLayout([], groups=5), "groups=5 does not divide the 12"),
        (BankLayout([], groups=24), "groups=24"),
        (BankLayout([], groups=6, templates=3), "templates=3"),
        (BankLayout([], layers_per_group=5, templates=3), "templates=3"),  # the last group has 2 layers
        (BankLayout([], groups=6, layers_per_group=2), "groups=6 and layers_per_group=2"),
        (BankLayout([], groups=0), "groups=0"),
        (BankLayout([], layers_per_group=0), "layers_per_group=0"),
        (BankLayout([], templates=0), "templates=0"),
        (BankLayout([], coefficient_sets=0), "coefficient_sets=0"),
        (BankLayout([], groups=-1), "groups=-1"),
    ],
)
def test_a_layout_that_does_not_fit_names_the_value(layout, named):
    with pytest.raises(DecompositionError, match=re.escape(named)):
        group_targets(SQUARE_VIT, layout)


@pytest.mark.parametrize("pattern", [r"mlp\.fc3", "(", r"0\.bias"])
def test_a_pattern_that_matches_nothing_is_named(pattern):
    with pytest.raises(DecompositionError, match=re.escape(repr(pattern))):
        find_targets(linears(), [r"weight", pattern])


def test_only_linear_convolution_and_attention_layers_have_targets():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "n": nn.LayerNorm(2), "c": nn.Conv2d(2, 2, 1), "x": attentions(1)})
    found = find_targets(model, ["."])
    names = ["a.weight", "c.weight", "x.layers.0.in_proj_weight", "x.layers.0.out_proj.weight"]
    assert list(found) == names
    assert all(found[name] is model.get_parameter(name) for name in names)


@pytest.mark.parametrize("targets", [[], "weight"], ids=["empty", "text"])
def test_targets_must_be_a_list_of_patterns(targets):
    with pytest.raises(DecompositionError, match=re.escape(f"targets={targets!r} must be a list")):
        decompose(linears(), BankLayout(targets))


def test_a_pattern_that_matches_other_weights_only_names_one():
    model = nn.Sequential(
        nn.Linear(2, 2), nn.LayerNorm(2), torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    )
    for pattern, name in ((r"1\.", "1.weight"), (r"2\.weight", "2.weight")):
        with pytest.raises(DecompositionError, match=re.escape(f"(such as 0.weight), only {name}, which")):
            find_targets(model, [pattern])


@pytest.mark.parametrize("patterns", [["weight"], [r"0\.weight"]], ids=["both", "one"])
def test_a_tied_weight_is_refused(patterns):
    model = linears()
    model[2].weight = model[0].weight
    with pytest.raises(DecompositionError, match=r"layers\.0\.weight and layers\.2\.weight are one tied weight"):
        decompose(model, BankLayout(patterns))


def test_a_layer_that_is_used_twice_is_one_target():
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    model = nn.Sequential(first, second, first)
    x = torch.randn(3, 6)
    before = model(x)
    _, _, coefficients = installed(model)
    assert list(coefficients) == ["0.weight", "1.weight"]
    torch.testing.assert_close(model(x), before)


def test_resnet34_has_168_coefficients_without_the_first_block_of_each_stage():
    model = torchvision.models.resnet34()
    layout = BankLayout([r"layer\d\.[1-9]\d*\.conv[12]\.weight"], coefficient_sets=2)
    targets = find_targets(model, layout.targets)
    groups = group_targets({name: tuple(w.shape) for name, w in targets.items()}, layout)
    assert sum(2 * g.templates * len(g.targets) for g in groups) == 168  # baselines.md
    blocks = {tuple(map(int, re.findall(r"\d+", name)[:2])) for name in targets}
    assert blocks == {(stage, i) for stage, depth in ((1, 3), (2, 4), (3, 6), (4, 3)) for i in range(1, depth)}


# the closed form


@pytest.mark.parametrize("make", [linears, convolutions])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_fewer_templates_than_layers_give_the_truncated_svd(make, n):
    model = make()
    weights = [layer.weight for layer in model.layers]
    found = decompose(model, BankLayout(["weight"], templates=n)).reconstruct()
    best = truncated_svd(weights, n)
    assert relative(rows(found.values()), best) < 1e-6
    assert relative(best, rows(weights)) > 1e-2  # the best is lossy, so returning the weights would fail


@pytest.mark.parametrize("sets", [1, 2, 3])
def test_as_many_templates_as_layers_are_exact(sets):
    model = linears()
    found = decompose(model, BankLayout(["weight"], coefficient_sets=sets))
    assert found.banks[0].coefficients.shape == (4, sets, 4)
    assert relative(rows(found.reconstruct().values()), rows([layer.weight for layer in model.layers])) < 1e-6


def test_equal_layers_are_decomposed_without_division_by_zero():
    model = linears()
    for layer in model.layers:
        nn.init.ones_(layer.weight)
    found = decompose(model, BankLayout(["weight"])).reconstruct()
    assert relative(rows(found.values()), np.ones((4, 36))) < 1e-6


def nan(model):
    model[1].weight.data[0, 0] = torch.nan


def complex_weight(model):
    model[2].weight = nn.Parameter(model[2].weight.to(torch.complex64))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (nan, "layers.1.weight (torch.float32) is not all finite"),
        (complex_weight, "layers.2.weight (torch.complex64) is not all finite real"),
        (lambda model: model.to("meta"), "layers.0.weight is on the meta device"),
        (lambda model: model[3].half(), "layers.0.weight is torch.float32 on cpu but layers.3.weight is torch.float16"),
    ],
    ids=["NaN", "complex", "meta", "mixed types"],
)
def test_weights_that_cannot_share_a_bank_are_named(change, named):
    model = linears()
    decomposition = decompose(model, BankLayout(["weight"]))
    change(model)
    for action in (lambda: decompose(model, BankLayout(["weight"])), lambda: install(model, decomposition)):
        with pytest.raises(DecompositionError, match=re.escape(named)):
            action()
    assert not any("template" in name or "original" in name for name in model.state_dict())


def test_a_weight_without_a_shape_is_named():
    with pytest.raises(DecompositionError, match=r"0\.weight has no shape yet"):
        decompose(nn.Sequential(nn.LazyLinear(3)), BankLayout(["weight"]))


def transposed(model):
    for layer in model.layers:
        layer.weight.data = layer.weight.data.mT.contiguous().mT
    return model


@pytest.mark.parametrize(
    "model",
    [
        transposed(linears()),
        convolutions().to(memory_format=torch.channels_last),
        linears().requires_grad_(False),
        linears().double(),
    ],
    ids=["not contiguous", "channels last", "frozen", "double"],
)
def test_any_stored_form_of_the_weights_is_decomposed(model):
    dense = {name: w.detach().clone() for name, w in find_targets(model, ["weight"]).items()}
    _, _, coefficients = installed(model)
    for name, weight in dense.items():
        torch.testing.assert_close(
            model.get_submodule(name.removesuffix(".weight")).weight, weight, rtol=1e-5, atol=1e-6
        )
    assert all(p.requires_grad for p in coefficients.values())


def test_projection_is_least_squares_in_double_precision():
    generator = np.random.default_rng(0)
    first = generator.standard_normal(600_000)
    # two long, nearly parallel templates, and a weight outside their span
    templates = np.stack([first, first + 1e-3 * generator.standard_normal(600_000)]).astype(np.float32)
    weight = (0.7 * templates[0] - 0.3 * templates[1] + generator.standard_normal(600_000)).astype(np.float32)
    wanted = np.linalg.lstsq(templates.T.astype(np.float64), weight.astype(np.float64), rcond=None)[0]
    found = project(torch.from_numpy(weight).view(600, 1000), torch.from_numpy(templates).view(2, 600, 1000))
    assert found.numpy() == pytest.approx(wanted, rel=1e-6)
    single = torch.linalg.lstsq(torch.from_numpy(templates.T), torch.from_numpy(weight)[:, None]).solution[:, 0]
    assert abs(single.numpy() - wanted).max() > 1e-5  # float32 would fail


def test_a_decomposition_does_not_change_the_model():
    model = linears()
    before = copy.deepcopy(model.state_dict())
    decompose(model, BankLayout(["weight"], templates=2))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# equations 1 and 2


@pytest.mark.parametrize("sets", [1, 2, 5])
def test_mixing_is_the_mean_over_sets_of_sums_over_templates(sets):
    torch.manual_seed(0)
    templates = torch.randn(3, 4, 2, dtype=torch.float64)
    coefficients = torch.randn(sets, 3, dtype=torch.float64)
    explicit = sum(sum(c[i] * templates[i] for i in range(3)) for c in coefficients) / sets
    torch.testing.assert_close(TemplateBank(templates).mix(coefficients), explicit, rtol=1e-14, atol=1e-14)


# a real network


@pytest.fixture(scope="module")
def dinov2(vit_weights):
    return BackboneConfig("vit_small_patch14_dinov2", vit_weights).build(98).net


@pytest.mark.parametrize(
    ("targets", "sets", "count"),
    [([MLP], 2, 96), ([MLP], 1, 48), ([ATTENTION], 2, 48), ([ATTENTION], 1, 24), ([MLP, ATTENTION], 2, 144)],
)
def test_vit_small_has_the_published_number_of_coefficients(targets, sets, count):
    with torch.device("meta"):  # only shapes are needed
        model = timm.create_model("vit_small_patch16_224")
    shapes = {name: tuple(w.shape) for name, w in find_targets(model, targets).items()}
    layout = BankLayout(targets, groups=6, templates=2, coefficient_sets=sets)
    assert sum(sets * g.templates * len(g.targets) for g in group_targets(shapes, layout)) == count  # baselines.md


def test_a_real_vit_is_decomposed_exactly(dinov2):
    layout = BankLayout([MLP, ATTENTION], groups=6, templates=2, coefficient_sets=2)
    decomposition = decompose(dinov2, layout)
    assert coefficient_count(decomposition) == 144
    weights = decomposition.reconstruct()
    assert max(relative(rows([w]), rows([dinov2.get_parameter(name)])) for name, w in weights.items()) <= 1e-6
    images = torch.randn(4, 3, 98, 98, generator=torch.Generator().manual_seed(0))
    network = copy.deepcopy(dinov2)
    install(network, decomposition)
    with torch.no_grad():
        torch.testing.assert_close(network(images), dinov2(images), rtol=0, atol=1e-4)


def test_one_template_for_two_real_layers_is_their_leading_singular_direction(dinov2):
    decomposition = decompose(dinov2, BankLayout([MLP], groups=6, templates=1))
    generated = decomposition.reconstruct()
    for bank in (decomposition.banks[0], decomposition.banks[-1]):
        weights = [dinov2.get_parameter(name) for name in bank.group.targets]
        assert relative(rows([generated[name] for name in bank.group.targets]), truncated_svd(weights, 1)) < 1e-6


# installation


def installed(model=None, **layout):
    model = linears() if model is None else model
    decomposition = decompose(model, BankLayout([r"(in_proj_)?weight"], **layout))
    return model, decomposition, install(model, decomposition)


def templates_of(model):
    return {name: p for name, p in model.named_parameters() if name.endswith("templates")}


def test_every_bank_appears_once_in_the_state_dict():
    model, decomposition, _ = installed(layers_per_group=2)
    storages = [value.data_ptr() for value in model.state_dict().values()]
    assert len(storages) == len(set(storages))
    banks = [value for name, value in model.state_dict().items() if "templates" in name]
    assert all(torch.equal(a, b.templates) for a, b in zip(banks, decomposition.banks, strict=True))
    numbers = sum(value.numel() for value in model.state_dict().values())
    assert numbers == 4 * 6 + 2 * (2 * 36) + 4 * 2  # biases, templates, coefficients


def test_only_coefficients_and_other_parameters_are_trained():
    model, _, coefficients = installed()
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in coefficients.values()} | {id(layer.bias) for layer in model.layers}


def test_the_pretrained_parameter_is_not_written_to():
    model, tied = linears(2), nn.Linear(6, 6)
    original = tied.weight = model[0].weight
    before = original.detach().clone()
    installed(model, templates=1)  # lossy, so that a write of the generated weight would show
    assert not torch.allclose(model[0].weight, before, atol=1e-3)
    assert torch.equal(original, before)
    assert tied.weight is original


def test_templates_take_over_the_type_of_the_network():
    decomposition = decompose(linears(), BankLayout(["weight"]))
    model = linears().bfloat16()
    install(model, decomposition)
    weights = [layer.weight for layer in model.layers]
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    assert relative(rows(weights), rows([layer.weight for layer in linears().layers])) < 1e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_templates_take_over_the_device_of_the_network():
    decomposition = decompose(linears(), BankLayout(["weight"]))
    model = linears().cuda()
    coefficients = install(model, decomposition)
    assert {p.device.type for p in (*model.parameters(), *coefficients.values())} == {"cuda"}
    assert model(torch.randn(3, 6, device="cuda")).isfinite().all()


def test_the_decomposition_is_not_changed_by_training_its_network():
    model, decomposition, coefficients = installed()
    before = decomposition.fingerprint
    with torch.no_grad():
        for values in (*coefficients.values(), *templates_of(model).values()):
            values.add_(1)
    assert Decomposition(decomposition.banks).fingerprint == before


@pytest.mark.parametrize(
    ("make", "shape"),
    [(linears, (3, 6)), (convolutions, (3, 4, 5, 5)), (attentions, (3, 5, 8))],
    ids=["linear", "convolution", "attention"],
)
@pytest.mark.parametrize("training", [True, False])
def test_the_output_of_every_kind_of_layer_stays(make, shape, training):
    plain = make().train(training)
    model, _, coefficients = installed(copy.deepcopy(plain))
    assert len(coefficients) >= 2
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)
        next(iter(coefficients.values())).add_(1)
        assert (model(x) - plain(x)).abs().max() > 1e-3


def test_the_output_of_a_sequential_network_stays():
    plain = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model, _, _ = installed(copy.deepcopy(plain))
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x), plain(x))


def test_a_deep_copy_is_independent():
    model, _, _ = installed()
    twin, x = copy.deepcopy(model), torch.randn(3, 6)
    before = model(x)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        for name, value in twin.named_parameters():
            if name.endswith("original0") or "templates" in name:
                value.mul_(2)
    assert torch.equal(model(x), before)
    for ours, theirs in zip(twin.layers, model.layers, strict=True):  # both coefficients and templates are its own
        torch.testing.assert_close(ours.weight, 4 * theirs.weight)


def test_functional_call_accepts_other_coefficients():
    model, _, coefficients = installed()
    names = {id(p): name for name, p in model.named_parameters()}
    doubled = {names[id(p)]: 2 * p.detach() for p in coefficients.values()}
    x = torch.randn(3, 6)
    plain = linears()
    wanted = x
    for layer in plain.layers:
        wanted = wanted @ (2 * layer.weight).T + layer.bias
    torch.testing.assert_close(torch.func.functional_call(model, doubled, x), wanted)


def test_autocast_leaves_the_generated_weight_in_full_precision():
    model, _, _ = installed()
    outside = model[0].weight
    with torch.autocast("cpu", torch.bfloat16):
        inside = model[0].weight
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16  # autocast is on
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


def test_an_assigned_weight_is_projected_on_the_bank():
    model, decomposition, coefficients = installed(templates=2, coefficient_sets=3)
    dense = torch.randn(6, 6)
    model[1].weight = dense
    basis = rows(decomposition.banks[0].templates).T
    wanted = np.linalg.lstsq(basis, dense.double().numpy().ravel(), rcond=None)[0]
    assert coefficients["layers.1.weight"].detach().numpy() == pytest.approx(np.tile(wanted, (3, 1)), rel=1e-5)
    assert model[1].weight.detach().numpy().ravel() == pytest.approx(basis @ wanted, abs=1e-6)


def test_gradients_of_coefficients_are_inner_products_with_the_templates():
    model, decomposition, coefficients = installed(linears(2), templates=2, coefficient_sets=3)
    x = torch.randn(5, 6)
    (model[0](x) ** 2).sum().backward()
    values = x.double().numpy()
    weight, bias = (t.detach().double().numpy() for t in (model[0].weight, model[0].bias))
    of_weight = 2 * (values @ weight.T + bias).T @ values  # d Σ(xWᵀ+b)² / dW
    wanted = rows(decomposition.banks[0].templates) @ of_weight.ravel() / 3
    assert coefficients["layers.0.weight"].grad.numpy() == pytest.approx(np.tile(wanted, (3, 1)), rel=1e-5, abs=1e-5)
    assert [p.grad for p in templates_of(model).values()] == [None]


def test_installing_twice_is_refused_and_changes_nothing():
    model, decomposition, _ = installed()
    names = list(model.state_dict())
    with pytest.raises(DecompositionError, match=re.escape("layers.0.weight")):
        install(model, decomposition)
    assert list(model.state_dict()) == names


def test_generated_weights_cannot_be_decomposed_again():
    model, _, _ = installed()
    with pytest.raises(
        DecompositionError, match=r"none of the 0 weights .* only layers\.0\.weight, which is generated already"
    ):
        decompose(model, BankLayout(["weight"]))


@pytest.mark.parametrize(
    ("other", "named"), [(linears(4, size=5), r"\(5, 5\)"), (linears(3), r"3\.weight"), (nn.Identity(), r"0\.weight")]
)
def test_a_network_with_other_shapes_is_refused_before_any_change(other, named):
    decomposition = decompose(linears(), BankLayout(["weight"]))
    with pytest.raises(DecompositionError, match=named):
        install(other, decomposition)
    assert not any("template" in name or "original" in name for name in other.state_dict())


def test_reconstructed_weights_load_into_a_plain_network():
    model, decomposition, _ = installed(templates=2)
    plain = linears()
    plain.load_state_dict(plain.state_dict() | decomposition.reconstruct())
    x = torch.randn(3, 6)
    assert torch.equal(plain(x), model(x))
    assert not any(isinstance(module, Mixture) for module in plain.modules())


@pytest.mark.slow
def test_a_compiled_network_computes_the_same():
    model, _, coefficients = installed()
    x = torch.randn(3, 6)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    eager = torch.autograd.grad(model(x).sum(), coefficients.values())
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), coefficients.values()), eager)


# the file


@pytest.fixture
def decomposition():
    return decompose(linears(), BankLayout(["weight"], layers_per_group=2, coefficient_sets=2))


def test_saving_and_loading_keeps_every_bit(decomposition, tmp_path):
    path = tmp_path / "new" / "decomposition.safetensors"
    decomposition.save(path)
    loaded = Decomposition.load(path)
    assert loaded.fingerprint == decomposition.fingerprint
    for ours, theirs in zip(decomposition.banks, loaded.banks, strict=True):
        assert ours.group == theirs.group
        assert torch.equal(ours.templates, theirs.templates)
        assert torch.equal(ours.coefficients, theirs.coefficients)
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_equal_decompositions_give_equal_bytes(decomposition, tmp_path):
    decomposition.save(tmp_path / "a")
    decompose(linears(), BankLayout(["weight"], layers_per_group=2, coefficient_sets=2)).save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("part", ["templates", "coefficients"])
def test_one_number_changes_the_fingerprint(part):
    decomposition, other = (decompose(linears(), BankLayout(["weight"])) for _ in range(2))
    assert other.fingerprint == decomposition.fingerprint
    values = getattr(other.banks[0], part).flatten()
    values[-1] = torch.nextafter(values[-1], torch.tensor(torch.inf))
    changed = {"templates": other.banks[0].templates, "coefficients": other.banks[0].coefficients}
    changed[part] = values.view_as(changed[part])
    bank = type(other.banks[0])(other.banks[0].group, **changed)
    assert Decomposition((bank,)).fingerprint != decomposition.fingerprint


def _patch():
    return TaskPatch("t", ["a", "b"], {"weight": torch.ones(2, 3)}, [], [], 32, [0.5] * 3, [0.5] * 3, "0" * 64)


GROUP = {"name": "g:0", "targets": ["g.weight"], "shape": [3, 3], "templates": 2}
FACTS = {"format": 1, "kind": "decomposition", "groups": [GROUP]}
TENSORS = {"g:0/templates": torch.ones(2, 3, 3), "g:0/coefficients": torch.ones(1, 1, 2), "other": torch.ones(1)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:20]), "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: save_file({"weight": torch.ones(2)}, path), "not written by recast_pl"),
        (lambda path: _patch().save(path), "is a patch"),
        (lambda path: path.write_bytes(pack_tensors({}, {"format": 2, "kind": "decomposition"})), "format 2"),
        (lambda path: path.write_bytes(pack_tensors({}, {"format": 1, "kind": "decomposition"})), "incomplete"),
        (lambda path: path.write_bytes(pack_tensors({}, FACTS | {"groups": []})), "does not hold"),
        (lambda path: path.write_bytes(pack_tensors(TENSORS, FACTS)), "does not hold"),
        (
            lambda path: path.write_bytes(pack_tensors(TENSORS | {"g:0/coefficients": torch.ones(2, 2)}, FACTS)),
            "incomplete",
        ),
        (
            lambda path: path.write_bytes(pack_tensors(TENSORS | {"g:0/templates": torch.ones(2, 3)}, FACTS)),
            "wrong shape",
        ),
    ],
    ids=[
        "missing",
        "truncated",
        "header",
        "empty",
        "foreign",
        "patch",
        "newer",
        "bare",
        "no groups",
        "extra",
        "flat",
        "shape",
    ],
)
def test_an_unusable_file_is_refused(decomposition, tmp_path, damage, message):
    path = tmp_path / "decomposition.safetensors"
    decomposition.save(path)
    damage(path)
    with pytest.raises(DecompositionError, match=message) as error:
        Decomposition.load(path)
    assert str(path) in str(error.value)


def test_the_table_counts_layers_groups_templates_coefficients_and_savings(decomposition):
    text = io.StringIO()
    Console(file=text, width=100).print(decomposition.table())
    # 4 layers of 36 numbers, less 4 templates of 36, less 4·2·2 coefficients
    lines = [line.split() for line in text.getvalue().splitlines()]
    assert ["layers.*.weight", "6×6", "4", "2", "4", "16", "-16"] in lines
    assert ["total", "4", "2", "4", "16", "-16"] in lines


def test_the_table_of_a_real_network_fits_a_terminal_of_80_columns(dinov2):
    text = io.StringIO()
    Console(file=text, width=80).print(decompose(dinov2, BankLayout([MLP, ATTENTION], groups=6, templates=1)).table())
    assert "…" not in text.getvalue()
