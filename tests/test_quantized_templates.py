"""Templates of 8 bits: the rounding by hand, the file, and runs and fits that use them."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_VIT, clipart_words
from lightning.pytorch import Trainer
from torch import nn

import recast_pl
from recast_pl import BackboneConfig, BankLayout, Decomposition, MimicryModule, decompose
from recast_pl.cli import main
from recast_pl.decomposition.quantization import QuantizedTemplates
from recast_pl.decomposition.similarity import weight_similarity
from recast_pl.errors import DecompositionError
from recast_pl.files import pack_tensors, read_tensors

PRECISIONS = ("int8", "int8_power")


def network(layers=4, size=32):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(size, size) for _ in range(layers)))


def gaussian():
    templates = torch.randn(2, 16, 200, generator=torch.Generator().manual_seed(1))
    templates[0, 3] = 0  # a row without any scale
    return templates


def power_by_hand(templates, exponent):
    """Codes and templates in numpy, with the formula of the papers."""
    rows = templates.double().numpy()
    largest = np.abs(rows).max(2, keepdims=True)
    ratios = np.divide(rows, largest, out=np.zeros_like(rows), where=largest > 0)
    codes = np.rint(127 * np.sign(ratios) * np.abs(ratios) ** exponent)
    return codes, np.sign(codes) * (np.abs(codes) / 127) ** (1 / exponent) * largest


def squared_error(templates, exponent):
    return np.square(power_by_hand(templates, exponent)[1] - templates.double().numpy()).sum()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_codes_and_templates_are_those_of_the_formula(precision):
    templates = gaussian()
    quantized = QuantizedTemplates.of(templates, precision)
    codes, values = power_by_hand(templates, quantized.exponent.item())
    assert quantized.codes.dtype == torch.int8
    assert np.abs(quantized.codes.numpy() - codes).max() <= 1  # where a ratio is halfway between two levels
    assert np.mean(quantized.codes.numpy() == codes) > 0.999
    scale = templates.abs().amax(2, keepdim=True)
    np.testing.assert_allclose(quantized.templates(), values, atol=float(scale.max()) / 127)
    assert not quantized.templates()[0, 3].any()


def test_evenly_spaced_levels_are_off_by_at_most_half_a_step():
    templates = gaussian()
    quantized = QuantizedTemplates.of(templates, "int8")
    step = templates.abs().amax(2, keepdim=True) / 127
    assert ((quantized.templates() - templates).abs() <= 0.5001 * step).all()


def test_the_exponent_has_nearly_the_least_error_of_all():
    templates = gaussian()
    found = QuantizedTemplates.of(templates, "int8_power").exponent.item()
    best = min(squared_error(templates, exponent) for exponent in np.linspace(0.3, 1.5, 121))
    assert squared_error(templates, found) < 1.01 * best
    assert squared_error(templates, found) < 0.9 * squared_error(templates, 1.0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_coefficients_are_solved_again(precision):
    model = network()
    layout = BankLayout(["weight"], templates=3)
    full, rounded = decompose(model, layout), decompose(model, BankLayout(**vars(layout) | {"precision": precision}))
    weights = np.stack([w.numpy().ravel() for w in full.reconstruct().values()]).astype(float)
    flat = rounded.banks[0].templates.flatten(1).double().numpy()
    expected = np.linalg.lstsq(flat.T, weights.T, rcond=None)[0].T
    np.testing.assert_allclose(rounded.banks[0].coefficients[:, 0], expected, atol=1e-6)


def test_differences_between_sets_stay():
    generator = torch.Generator().manual_seed(2)
    bank = decompose(network(), BankLayout(["weight"], coefficient_sets=2)).banks[0]
    bank = type(bank)(bank.group, bank.templates, torch.randn(4, 2, 4, generator=generator))
    rounded = bank.rounded("int8")
    torch.testing.assert_close(rounded.coefficients.diff(dim=1), bank.coefficients.diff(dim=1))
    before, after = (Decomposition((each,)).reconstruct().values() for each in (bank, rounded))
    for old, new in zip(before, after, strict=True):
        assert (new - old).norm() < 0.02 * old.norm()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_file_has_a_quarter_of_the_bytes_and_gives_the_same_bits(precision, tmp_path):
    full, rounded = (decompose(network(), BankLayout(["weight"], precision=p)) for p in ("full", precision))
    full.save(tmp_path / "full")
    rounded.save(tmp_path / "rounded")
    assert (tmp_path / "rounded").stat().st_size < 0.4 * (tmp_path / "full").stat().st_size  # the header is 1 kB
    loaded = Decomposition.load(tmp_path / "rounded")
    assert loaded.fingerprint == rounded.fingerprint != full.fingerprint
    for name, weight in loaded.reconstruct().items():
        assert torch.equal(weight, rounded.reconstruct()[name])
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "rounded").read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        {"codes": torch.zeros(4, 32, 32)},
        {"codes": torch.zeros(4, 32, 31, dtype=torch.int8)},
        {"scales": torch.ones(4)},
        {"scales": torch.full((4, 32), torch.nan)},
        {"exponent": torch.tensor(0.0)},
        {"exponent": torch.ones(2)},
    ],
    ids=["type", "shape", "scales", "NaN", "exponent", "exponents"],
)
def test_a_file_with_unusable_codes_is_refused(damage, tmp_path):
    path = tmp_path / "decomposition.safetensors"
    bank = decompose(network(), BankLayout(["weight"], precision="int8")).banks[0]
    Decomposition((bank,)).save(path)
    tensors, facts = read_tensors(path, DecompositionError)
    changed = {f"{bank.group.name}/{part}": tensor for part, tensor in damage.items()}
    path.write_bytes(pack_tensors(tensors | changed, facts))
    with pytest.raises(DecompositionError, match="incomplete"):
        Decomposition.load(path)


def test_an_unknown_precision_names_the_choices():
    with pytest.raises(DecompositionError, match="precision='int4' is unknown; choose one of full, int8, int8_power"):
        decompose(network(), BankLayout(["weight"], precision="int4"))


def test_weights_of_a_real_vit_hardly_change(vit_weights):
    network, errors = BackboneConfig("vit_small_patch14_dinov2", str(vit_weights)).build(98).net, {}
    for precision in PRECISIONS:
        layout = BankLayout([r"mlp\.fc[12]\.weight"], groups=6, templates=2, precision=precision)
        found = weight_similarity(decompose(network, layout), network)
        errors[precision] = max(each.relative_error for each in found)
    assert errors["int8_power"] < errors["int8"] < 0.03


def test_neural_mimicry_rounds_what_it_has_fitted(tmp_path):
    backbone = BackboneConfig("vit_tiny_patch16_224", "random", args=TINY_VIT)
    layout = BankLayout([r"mlp\.fc[12]\.weight"], groups=6, templates=2, precision="int8")
    module = MimicryModule(backbone, layout, image_size=32)
    Trainer(max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False).fit(module)
    module.decomposition().save(tmp_path / "fitted")
    tensors, _ = read_tensors(tmp_path / "fitted", DecompositionError)
    assert {tensor.dtype for name, tensor in tensors.items() if name.endswith("/codes")} == {torch.int8}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_learns_tests_and_predicts_with_them(precision, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    layout = {"targets": [r"mlp\.fc[12]\.weight"], "groups": 6, "precision": precision}
    pieces = [{"class_path": "Recast", "init_args": {"layout": layout}}]
    model = ["--model.backbone.name", "vit_tiny_patch16_224", "--model.backbone.weights", "random"]
    model += ["--model.backbone.args", json.dumps(TINY_VIT), "--model.pieces", json.dumps(pieces)]
    run = tmp_path / "run"
    assert main(clipart_words(["--config", "vit.yaml", *model, "--data.batch_size", "64"], run)) == 0
    loaded = Decomposition.load(run / "decomposition.safetensors")
    assert all(bank.quantized is not None for bank in loaded.banks)
    accuracies = json.loads((run / "summary.json").read_text())
    assert main(["test", "--run_dir", str(run)]) == 0, capsys.readouterr().err
    assert json.loads((run / "summary.json").read_text()) == accuracies
    image = next((ROOT / "data" / "clipart" / "signs").rglob("*.jpg"))
    assert recast_pl.load(run).predict(image, "signs")[0].probability > 0
