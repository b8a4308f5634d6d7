"""The reconstructions of figure 5: bases of the closed form, an encoder of coefficients, and an autoencoder."""

import json
import math
import re

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY_VIT
from lightning import Trainer
from torch import nn

from recast_pl import (
    BackboneConfig,
    BankLayout,
    CoefficientEncoder,
    Decomposition,
    MimicryModule,
    TemplateAutoencoder,
    decompose,
)
from recast_pl.cli import main
from recast_pl.errors import DecompositionError

SCALE = 8  # of templates in closed form; coefficients are divided by it
MLP = r"mlp\.fc[12]\.weight"
VIT = BackboneConfig("vit_tiny_patch16_224", "random", TINY_VIT | {"depth": 2})
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def layers(count=4, size=6):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(size, size + 1) for _ in range(count)))


def rows(tensors):
    return np.stack([t.detach().double().numpy().ravel() for t in tensors])


def dense(model):
    return rows(layer.weight for layer in model)


def reconstructed(decomposition):
    return rows(decomposition.reconstruct().values())


# bases


@pytest.mark.parametrize("basis", ["svd", "layers", "random"])
def test_every_basis_of_as_many_templates_as_layers_is_exact(basis):
    model = layers()
    found = decompose(model, BankLayout(["weight"], layers_per_group=2, coefficient_sets=2, basis=basis))
    assert np.abs(reconstructed(found) - dense(model)).max() < 1e-6


def test_the_default_basis_keeps_its_exact_values():
    # products of integers are exact, so the result is that of LAPACK, and no change here may alter it
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        model[1].weight.copy_(torch.tensor([[2.0, 0.0], [1.0, -1.0]]))
    (bank,) = decompose(model, BankLayout(["weight"], templates=1)).banks
    gram = dense(model) @ dense(model).T
    vector = np.linalg.eigh(gram)[1][:, -1]
    vector = vector * np.sign(vector[np.abs(vector).argmax()])
    assert (SCALE * bank.coefficients).flatten().tolist() == vector.astype(np.float32).tolist()
    assert np.abs(rows(bank.templates) - SCALE * vector @ dense(model)).max() < 1e-5
    explicit = decompose(model, BankLayout(["weight"], templates=1, basis="svd"))
    assert explicit.fingerprint == decompose(model, BankLayout(["weight"], templates=1)).fingerprint


def test_the_basis_of_layers_has_exactly_the_weights_as_templates():
    model = layers()
    for bank in decompose(model, BankLayout(["weight"], layers_per_group=2, coefficient_sets=2, basis="layers")).banks:
        for name, template, sets in zip(bank.group.targets, bank.templates, bank.coefficients, strict=True):
            assert torch.equal(template, SCALE * model.get_parameter(name))
            assert sets.tolist() == [[float(name == other) / SCALE for other in bank.group.targets]] * 2


@pytest.mark.parametrize("n", [2, 4])
def test_a_random_basis_is_a_rotation_of_the_singular_one_with_the_same_error(n):
    model = layers()
    plain, rotated = (decompose(model, BankLayout(["weight"], templates=n, basis=b)) for b in ("svd", "random"))
    a, b = (SCALE * d.banks[0].coefficients[:, 0].double().numpy() for d in (plain, rotated))  # (L, n)
    rotation = a.T @ b
    assert rotation @ rotation.T == pytest.approx(np.eye(n), abs=1e-6)
    assert 0.1 < np.abs(rotation).max() < 0.995  # neither the identity nor a permutation
    assert rotation.T @ rows(plain.banks[0].templates) == pytest.approx(rows(rotated.banks[0].templates), abs=1e-5)
    assert reconstructed(rotated) == pytest.approx(reconstructed(plain), abs=1e-6)


def test_a_random_basis_is_reproducible_and_differs_between_groups():
    layout = BankLayout(["weight"], layers_per_group=2, basis="random")
    torch.manual_seed(1)
    first = decompose(layers(), layout)
    torch.manual_seed(2)
    second = decompose(layers(), layout)
    assert first.fingerprint == second.fingerprint
    plain = decompose(layers(), BankLayout(["weight"], layers_per_group=2))
    turns = [
        SCALE**2 * (p.coefficients[:, 0].T @ r.coefficients[:, 0]).numpy()
        for p, r in zip(plain.banks, first.banks, strict=True)
    ]
    assert np.abs(turns[0] - turns[1]).max() > 0.1


@pytest.mark.parametrize(
    ("layout", "named"),
    [
        (BankLayout(["weight"], templates=2, basis="layers"), ["basis='layers'", "templates=2", "4 layers", "svd"]),
        (BankLayout(["weight"], basis="qr"), ["basis='qr'", "svd, layers, random"]),
    ],
)
def test_an_impossible_basis_is_refused(layout, named):
    with pytest.raises(DecompositionError) as error:
        decompose(layers(), layout)
    assert all(part in str(error.value) for part in named)


def test_the_gradient_fit_refuses_a_basis():
    module = MimicryModule(VIT, BankLayout([MLP], basis="random"), image_size=32)
    with pytest.raises(DecompositionError, match="closed form"):
        module.configure_model()


def test_the_command_line_sets_the_basis(tiny_fit, tmp_path):
    layout = {"targets": [MLP], "groups": 1, "basis": "layers"}
    pieces = [{"class_path": "recast_pl.Recast", "init_args": {"layout": layout}}]
    small = ("--model.backbone.args", json.dumps(TINY_VIT | {"depth": 2}))
    assert (
        main(tiny_fit("--model.pieces", json.dumps(pieces), *small, "--trainer.max_epochs", "1", "--only", "first"))
        == 0
    )
    bank = Decomposition.load(tmp_path / "run" / "decomposition.safetensors").banks[0]
    assert torch.equal(SCALE * bank.coefficients[:, 0], torch.eye(2))


# the autoencoder


def source(shape=(3, 10, 6), count=2, seed=0, **settings):
    torch.manual_seed(seed)
    weights = torch.randn(shape) / 10
    return TemplateAutoencoder(weights, count, **{"patch": 4, "hidden": 8} | settings), weights


def module(loss="mse", seed=0, **settings):
    torch.manual_seed(seed)
    small = {"patch": 4, "hidden": 16} | settings
    return MimicryModule(
        VIT,
        BankLayout([MLP], coefficient_sets=2),
        image_size=32,
        source=lambda dense, n: TemplateAutoencoder(dense, n, **small),
        loss=loss,
        noise_std=0.0,
        weight_scale=None,
        optimizer=lambda p: torch.optim.Adam(p, lr=2e-2),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 150),
    )


@pytest.mark.parametrize("shape", [(3, 10, 6), (2, 8, 8), (2, 5, 3, 3, 3), (1, 1, 1)], ids=str)
def test_templates_have_the_shape_of_the_weights_for_any_patch(shape):
    encoder, weights = source(shape)
    assert encoder(weights).shape == encoder.draw(weights)[0].shape == (2, *shape[1:])


def test_a_patch_of_a_template_depends_only_on_the_weights_of_that_patch():
    encoder, weights = source((2, 8, 8))
    moved = weights.clone()
    moved[0, 0, 0] += 1.0
    change = (encoder(moved) - encoder(weights)).abs().sum(0)  # (8, 8)
    assert change[:4, :4].min() > 0
    assert change[4:].max() == change[:, 4:].max() == 0


def test_the_term_of_the_loss_is_the_divergence_of_two_normal_distributions():
    encoder, weights = source((2, 8, 8), kl_weight=0.5)
    _, term = encoder.draw(weights)
    mean, log_variance = encoder._encode(weights)
    normal = torch.distributions.Normal(mean.double(), (log_variance.double() / 2).exp())
    wanted = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean()
    assert term.item() == pytest.approx(0.5 * weights.double().square().mean().item() * wanted.item(), rel=1e-5)


def test_templates_of_a_training_step_are_noisy_and_final_ones_are_not():
    encoder, weights = source()
    assert torch.equal(encoder(weights), encoder(weights))
    assert not torch.equal(encoder.draw(weights)[0], encoder.draw(weights)[0])


@pytest.mark.parametrize("loss", ["mse", "smooth_l1"])
def test_gradients_of_the_encoder_match_autograd(loss):
    fit = module(loss)
    fit.configure_model()
    wanted, found = [], []
    for index in range(len(fit.groups)):
        torch.manual_seed(5)
        found.append(fit.set_gradients(index).item())
        trained = fit._trained(index)
        gradients = [p.grad.clone() for p in trained]
        torch.manual_seed(5)
        torch.randn_like(fit.coefficients[index])  # the noise of the coefficients, which σ = 0 removes
        templates, term = fit.sources[index].draw(fit.teacher[index])
        weights = torch.einsum("lkn,noi->lkoi", fit.coefficients[index], templates).mean(1)  # (L, out, in)
        losses = {"mse": nn.MSELoss(), "smooth_l1": nn.SmoothL1Loss()}
        total = 2 * sum(losses[loss](w, t) for w, t in zip(weights, fit.teacher[index], strict=True)) + term
        wanted.append(total.item())
        for ours, theirs in zip(gradients, torch.autograd.grad(total, trained), strict=True):
            assert theirs.abs().max() > 0
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_fit_reproduces_the_weights_from_the_latent_means(tmp_path):
    fit = module()
    fit.configure_model()
    start = min(fit.weight_cosines().values())
    Trainer(max_epochs=150, accelerator="cpu", **QUIET).fit(fit)
    assert start < 0.5
    assert min(fit.weight_cosines().values()) > 0.985  # the similarity in the paper
    fit.decomposition().save(tmp_path / "d.safetensors")
    loaded = Decomposition.load(tmp_path / "d.safetensors")
    for bank, encoder, teacher in zip(loaded.banks, fit.sources, fit.teacher, strict=True):
        assert torch.equal(bank.templates, encoder(teacher))
    names = [name for group in fit.groups for name in group.targets]
    dense = dict(zip(names, (w for stack in fit.teacher for w in stack), strict=True))
    for name, weight in loaded.reconstruct().items():
        a, b = (t.detach().double().numpy().ravel() for t in (weight, dense[name]))
        cosine = a @ b / math.sqrt((a @ a) * (b @ b))
        assert fit.weight_cosines()[name] == pytest.approx(cosine, abs=1e-5)


def test_fewer_latent_variables_lose_a_part_of_the_weights():
    similarities = []
    for latent in (None, 8):  # for the 2·4² weights of a patch
        fit = module(latent=latent)
        Trainer(max_epochs=30, accelerator="cpu", **QUIET).fit(fit)
        similarities.append(sum(fit.weight_cosines().values()) / len(fit.weight_cosines()))
    assert similarities[0] - similarities[1] > 0.2


@pytest.mark.parametrize("setting", [{"patch": 0}, {"hidden": 0}, {"latent": 0}, {"kl_weight": -1.0}], ids=str)
def test_a_setting_out_of_range_is_named(setting):
    ((name, value),) = setting.items()
    with pytest.raises(DecompositionError, match=re.escape(f"{name}={value}")):
        source(**setting)


OVERLAYS = sorted({p.stem for p in (ROOT / "configs" / "mimicry").glob("*.yaml")} - {"published_resnet34"})


def overlaid(name, run_dir):
    small = {"name": "vit_tiny_patch16_224", "weights": "random", "args": TINY_VIT | {"depth": 2}}
    return [
        *("fit", "--config", "mimicry_vit.yaml", "--config", f"mimicry/{name}.yaml", "--run_dir", str(run_dir)),
        *("--model.backbone", json.dumps(small), "--model.layout.groups", "1", "--model.image_size", "32"),
        *("--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "2"),
    ]


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_shipped_reconstruction_runs(name, tmp_path):
    assert main(overlaid(name, tmp_path)) == 0
    settings = yaml.safe_load((tmp_path / "config.yaml").read_text())["model"]["init_args"]
    assert settings["loss"] == ("mse" if "mse" in name else "smooth_l1")
    assert settings["noise_std"] == (1e-4 if name in ("noise", "published") else 0)
    rates = {"vae": 2e-3, "autoencoder": 3e-2, "published": 0.1}
    assert settings["optimizer"]["init_args"]["lr"] == rates.get(name.split("_")[0], 0.02)
    templates = "TemplateAutoencoder" if "autoencoder" in name else "FreeTemplates"
    assert settings["source"]["class_path"] == f"recast_pl.{templates}"
    coefficients = "CoefficientEncoder" if "vae" in name else "FreeCoefficients"
    assert settings["coefficient_source"]["class_path"] == f"recast_pl.{coefficients}"
    assert len(Decomposition.load(tmp_path / "decomposition.safetensors").banks) == 2


@pytest.mark.parametrize("loss", ["mse", "smooth_l1"])
def test_the_encoder_has_the_settings_of_the_release(loss, tmp_path):
    assert main(overlaid(f"vae_{loss}", tmp_path)) == 0
    settings = yaml.safe_load((tmp_path / "config.yaml").read_text())["model"]["init_args"]
    assert settings["coefficient_source"]["init_args"] == {"hidden": 8}
    assert settings["loss_scale"] == 0.5  # the mean over the two layers of a group
    assert [settings[key] for key in ("weight_scale", "coefficient_rate", "gradient_clip")] == [None, 1, 0]
    assert settings["optimizer"]["class_path"] == "torch.optim.RMSprop"
    schedule = settings["lr_scheduler"]
    assert schedule["class_path"].endswith("CosineAnnealingLR")
    assert schedule["init_args"]["T_max"] == 2500
    shipped = yaml.safe_load((ROOT / "configs" / "mimicry" / f"vae_{loss}.yaml").read_text())
    assert shipped["trainer"]["max_epochs"] == 2500


def test_only_the_coefficients_that_the_encoder_gives_are_kept(tmp_path):
    torch.manual_seed(0)
    fit = MimicryModule(
        VIT,
        BankLayout([MLP], coefficient_sets=2),
        image_size=32,
        coefficient_source=CoefficientEncoder,
        noise_std=0.0,
        coefficient_rate=1.0,
        optimizer=lambda p: torch.optim.Adam(p, lr=1e-2),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 300),
    )
    Trainer(max_epochs=300, accelerator="cpu", **QUIET).fit(fit)
    assert min(fit.weight_cosines().values()) > 0.985  # the lowest similarity in the paper
    fit.decomposition().save(tmp_path / "d.safetensors")
    loaded = Decomposition.load(tmp_path / "d.safetensors")
    assert sum(bank.coefficients.numel() for bank in loaded.banks) == 4 * 2 * 2
    parts = zip(loaded.banks, fit.coefficient_sources, fit.teacher, strict=True)
    for bank, encoder, teacher in parts:
        assert torch.equal(bank.coefficients, encoder(teacher))
        assert not torch.allclose(bank.coefficients[0], bank.coefficients[1])  # each layer has its own


def test_the_saved_config_of_a_fit_reproduces_its_bytes(tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    assert main(overlaid("vae_mse", first)) == 0
    assert main(["fit", "--config", str(first / "config.yaml"), "--run_dir", str(again)]) == 0
    assert (first / "decomposition.safetensors").read_bytes() == (again / "decomposition.safetensors").read_bytes()


def test_the_reconstructions_of_figure_5_are_shipped():
    pairs = {f"{source}_{loss}" for source in ("autoencoder", "vae") for loss in ("mse", "smooth_l1")}
    assert set(OVERLAYS) == pairs | {"mse", "noise", "published", "smooth_l1"}
