"""The gradient fit: equation 3 against autograd in float64, its initial values, its result and its command line."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_VIT
from lightning import Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recast_pl import BackboneConfig, BankLayout, CoefficientEncoder, Decomposition, MimicryModule
from recast_pl.cli import main
from recast_pl.decomposition import mimicry
from recast_pl.errors import DecompositionError

VIT = BackboneConfig("vit_tiny_patch16_224", "random", TINY_VIT | {"depth": 4})
MLP = BankLayout([r"mlp\.fc[12]\.weight"], groups=2, templates=2, coefficient_sets=2)
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
RATE = 1024.0  # a step is a difference of numbers near 1, so a large one keeps more digits of the gradient


def dense_weights(module):
    pairs = zip(module.groups, module.teacher, strict=True)
    return {name: weight for group, stack in pairs for name, weight in zip(group.targets, stack, strict=True)}


def started(layout=MLP, seed=0, **settings):
    torch.manual_seed(seed)
    sgd = {"optimizer": lambda p: torch.optim.SGD(p, lr=RATE), "noise_std": 0, "gradient_clip": 0}
    sgd |= {"coefficient_rate": 1, "weight_scale": None}
    module = MimicryModule(VIT, layout, image_size=32, **sgd | settings)
    module.configure_model()
    return module


def fit(module, epochs=1):
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", **QUIET)
    trainer.fit(module)
    return trainer


def values(module):
    return [p.detach().clone() for p in (*module.templates, *module.coefficients)]


def steps(module):
    """The change of templates and coefficients in one epoch, divided by minus the learning rate."""
    before = values(module)
    trainer = fit(module)
    return [(b - a) / RATE for b, a in zip(before, values(module), strict=True)], trainer


def equation_3(module, loss, scale):
    """Loss and gradients with all K weights of every layer written out, in float64."""
    teachers = {name: w.detach().double() for name, w in dense_weights(module).items()}
    templates = [t.detach().double().requires_grad_() for t in module.templates]
    coefficients = [c.detach().double().requires_grad_() for c in module.coefficients]
    total = 0.0
    for group, bank, layers in zip(module.groups, templates, coefficients, strict=True):
        for name, sets in zip(group.targets, layers, strict=True):
            weights = [sum(c * t for c, t in zip(one, bank, strict=True)) for one in sets]
            total = total + scale * loss(torch.stack(weights).mean(0), teachers[name])
    return total.item(), torch.autograd.grad(total, [*templates, *coefficients])


@pytest.mark.parametrize("name", ["smooth_l1", "mse"])
@pytest.mark.parametrize("block", [1 << 18, 100], ids=["whole", "blocks"])
@pytest.mark.parametrize("layout", [MLP, BankLayout([r"mlp\.fc[12]\.weight"], coefficient_sets=3)], ids=["2x2", "1x4"])
def test_one_step_follows_the_gradient_of_equation_3(monkeypatch, name, block, layout):
    monkeypatch.setattr(mimicry, "_BLOCK", block)  # 100 does not divide the 4096 columns
    module = started(layout, loss=name, loss_scale=3.0)
    with torch.no_grad():
        for weight in module.teacher:
            weight.mul_(100)  # so that both branches of the smooth loss are used
            assert 0.1 < (weight.abs() > 1).float().mean() < 0.9
    wanted_loss, wanted = equation_3(module, {"smooth_l1": F.smooth_l1_loss, "mse": F.mse_loss}[name], 3.0)
    found, trainer = steps(module)
    for step, gradient in zip(found, wanted, strict=True):
        torch.testing.assert_close(step.double(), gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()) + 1e-9)
    assert float(trainer.callback_metrics["mimicry/loss"]) == pytest.approx(wanted_loss, rel=1e-5)


def encoder_of_the_release(dense, templates, layers, sets, loss):
    """The loss of one group with its encoder and all K weights of every layer written out, in float64.

    Args:
        dense: The weights (L, out, in).
        templates: (n, out, in).
        layers: Weight and bias of each of the three layers, in turn.
        sets: K.
        loss: A mean over all entries of a group.
    """
    hidden = dense.flatten(1)
    for weight, bias in (layers[:2], layers[2:4]):
        hidden = hidden @ weight.T + bias
        hidden = torch.where(hidden > 0, hidden, 0.01 * hidden)
    coefficients = (hidden @ layers[4].T + layers[5]).view(len(dense), sets, len(templates))
    weights = [torch.stack([(c.view(-1, 1, 1) * templates).sum(0) for c in one]).mean(0) for one in coefficients]
    return loss(torch.stack(weights), dense), coefficients


@pytest.mark.parametrize("name", ["smooth_l1", "mse"])
def test_one_step_of_the_encoder_follows_autograd_through_the_formula_of_the_release(name):
    module = started(coefficient_source=CoefficientEncoder, loss=name, loss_scale=0.5)
    loss = {"smooth_l1": F.smooth_l1_loss, "mse": F.mse_loss}[name]
    wanted_loss, wanted = 0.0, []
    for index, dense in enumerate(module.teacher):
        dense.data.mul_(100)  # so that both branches of the smooth loss are used
        trained = [p.detach().double().requires_grad_() for p in module._trained(index)]
        assert [tuple(p.shape) for p in trained[1:]] == [(8, dense[0].numel()), (8,), (8, 8), (8,), (4, 8), (4,)]
        total, coefficients = encoder_of_the_release(dense.double(), trained[0], trained[1:], 2, loss)
        torch.testing.assert_close(module.coefficients[index].double(), coefficients, rtol=1e-4, atol=1e-5)
        wanted += torch.autograd.grad(total, trained)
        wanted_loss += total.item()
    before = [p.detach().clone() for index in range(4) for p in module._trained(index)]
    trainer = fit(module)
    after = [p.detach() for index in range(4) for p in module._trained(index)]
    assert float(trainer.callback_metrics["mimicry/loss"]) == pytest.approx(wanted_loss, rel=1e-5)
    for old, new, gradient in zip(before, after, wanted, strict=True):
        assert gradient.abs().max() > 0
        step = (old - new).double() / RATE
        torch.testing.assert_close(step, gradient, rtol=1e-3, atol=2e-5 * float(gradient.abs().max()) + 1e-9)


def test_the_loss_of_each_group_has_the_factor_of_its_pattern():
    factors = {r"fc1\.weight": 3.5, r"fc2\.weight": 2.5}
    (plain, _), (weighted, _) = steps(started(loss_scale=1.0)), steps(started(loss_scale=factors))
    kinds = [group.kind for group in started().groups] * 2  # templates, then coefficients
    assert [kind.count("fc1") for kind in kinds] == [1, 1, 0, 0] * 2
    for kind, one, other in zip(kinds, plain, weighted, strict=True):
        wanted = 3.5 if "fc1" in kind else 2.5
        torch.testing.assert_close(wanted * one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize(
    ("factors", "named"),
    [
        ({r"fc1\.weight": 3.5}, ["only 'fc1", "blocks.0.mlp.fc2.weight", "add one"]),
        ({r"blocks\.0": 3.5, r"fc2": 2.5}, ["no pattern for all weights", "blocks.0.mlp.fc1.weight"]),
        ({"fc[": 1.0}, ["loss_scale 'fc['", "regular expression"]),
    ],
)
def test_a_group_without_a_factor_is_refused(factors, named):
    with pytest.raises(DecompositionError) as error:
        started(loss_scale=factors)
    assert all(part in str(error.value) for part in named)


def test_the_gradient_of_each_group_is_clipped_to_the_largest_norm():
    module = started(gradient_clip=1e-3)
    _, wanted = equation_3(module, F.smooth_l1_loss, 2.0)
    found, _ = steps(module)
    groups = len(module.groups)
    for i in range(groups):
        step, gradient = (torch.cat([part[i].flatten(), part[groups + i].flatten()]) for part in (found, wanted))
        assert float(gradient.norm()) > 1e-3
        torch.testing.assert_close(step.double(), gradient * (1e-3 / gradient.norm()), rtol=1e-3, atol=1e-8)


def test_noise_changes_the_loss_but_not_the_coefficients():
    # with a rate of 0, only the noise changes
    losses = []
    for std in (0.0, 0.5):
        module = started(noise_std=std, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
        before = module.decomposition().fingerprint
        losses.append(float(fit(module).callback_metrics["mimicry/loss"]))
        assert module.decomposition().fingerprint == before
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize("start", ["across_layers", "per_layer"])
def test_initial_coefficients_are_orthogonal_and_templates_have_kaiming_scale(start):
    module = started(start=start)
    assert len(module.groups) == 4
    for coefficients in module.coefficients:  # (L, K, n), all of them 2
        across = start == "across_layers"
        assert torch.equal(coefficients[:, 0], coefficients[:, 1]) == across
        assert not torch.allclose(coefficients[0], coefficients[1])
        for sets in coefficients.transpose(0, 1) if across else coefficients:  # (L, n) or (K, n)
            torch.testing.assert_close(sets @ sets.T, torch.eye(2))
    for group, templates in zip(module.groups, module.templates, strict=True):
        for template in templates:
            assert template.std().item() == pytest.approx(math.sqrt(2 / group.shape[1]), rel=0.1)
        assert not torch.allclose(templates[0], templates[1])


def test_coefficients_train_at_their_own_rate():
    (whole, _), (slow, _) = steps(started()), steps(started(coefficient_rate=0.1))
    templates = len(whole) // 2
    for one, other in zip(whole[:templates], slow[:templates], strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(whole[templates:], slow[templates:], strict=True):
        torch.testing.assert_close(0.1 * one, other, rtol=1e-3, atol=1e-9)


def test_the_size_of_the_weights_changes_the_templates_in_proportion_and_nothing_else(monkeypatch):
    build = BackboneConfig.build
    found = {}
    for size in (0.1, 1.0, 10.0):

        def sized(self, image_size, factor=size):
            backbone = build(self, image_size)
            for parameter in backbone.net.parameters():
                parameter.data.mul_(factor)
            return backbone

        monkeypatch.setattr(BackboneConfig, "build", sized)
        torch.manual_seed(0)
        module = MimicryModule(VIT, MLP, image_size=32, lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 50))
        fit(module, 120)
        cosines = module.weight_cosines().values()
        assert min(cosines) > 0.9999
        assert max(cosines) <= 1 + 1e-12
        found[size] = module.decomposition().reconstruct()
    for name, weight in found[1.0].items():
        torch.testing.assert_close(found[0.1][name], 0.1 * weight, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found[10.0][name], 10 * weight, rtol=1e-3, atol=1e-3)


def test_initial_values_depend_on_the_seed():
    fingerprints = [started(seed=seed).decomposition().fingerprint for seed in (0, 0, 1)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_the_teacher_is_neither_trained_nor_changed():
    module = started()
    before = [weight.detach().clone() for weight in module.teacher]
    fit(module, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, module.teacher, strict=True))


def test_a_fit_reproduces_the_weights():
    layout = BankLayout([r"mlp\.fc[12]\.weight"], groups=2)
    adam = {"optimizer": lambda p: torch.optim.Adam(p, lr=0.05), "gradient_clip": 1.0, "noise_std": 1e-4}
    module = started(layout, lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 100, 0.1), **adam)
    for weight in module.teacher:
        weight.data.mul_(10)  # from the σ of 0.02 in timm to the initial scale of the templates
    start, _ = equation_3(module, F.smooth_l1_loss, 2.0)
    assert max(module.weight_cosines().values()) < 0.5
    trainer = fit(module, 200)
    end, _ = equation_3(module, F.smooth_l1_loss, 2.0)
    assert end < 1e-4 * start
    assert min(module.weight_cosines().values()) > 0.999
    assert float(trainer.callback_metrics["mimicry/weight_cosine"]) > 0.999


def test_similarities_are_cosines_of_reconstructed_weights():
    module = started()
    weights = module.decomposition().reconstruct()
    for name, similarity in module.weight_cosines().items():
        ours, theirs = (w.detach().double().numpy().ravel() for w in (weights[name], dense_weights(module)[name]))
        cosine = ours @ theirs / math.sqrt((ours @ ours) * (theirs @ theirs))
        assert similarity == pytest.approx(cosine, abs=1e-5)


def test_the_schedule_is_stepped_every_epoch():
    module = started(lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=2, gamma=0.5))
    trainer = fit(module, 5)
    assert {o.param_groups[0]["lr"] for o in trainer.optimizers} == {RATE / 4}
    assert float(trainer.callback_metrics["mimicry/lr"]) == RATE / 4


def test_an_untrained_module_has_no_decomposition():
    with pytest.raises(DecompositionError, match=r"Trainer\.fit"):
        MimicryModule(VIT, MLP).decomposition()


def test_a_layout_that_does_not_fit_the_teacher_is_refused():
    module = MimicryModule(VIT, BankLayout([r"mlp\.fc[12]\.weight"], groups=3), image_size=32)
    with pytest.raises(DecompositionError, match="groups=3"):
        fit(module)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss", "l1"),
        ("noise_std", -1.0),
        ("gradient_clip", -1.0),
        ("similarity_every", 0),
        ("start", "zero"),
        ("weight_scale", 0.0),
    ],
)
def test_a_setting_out_of_range_is_named(name, value):
    with pytest.raises(DecompositionError, match=re.escape(f"{name}={value!r}")):
        MimicryModule(VIT, MLP, **{name: value})


def test_a_teacher_that_is_not_finite_is_refused(tmp_path):
    state = VIT.build(32).net.state_dict()
    state["blocks.1.mlp.fc1.weight"][0, 0] = torch.inf
    torch.save(state, tmp_path / "weights.pth")
    module = MimicryModule(replace(VIT, weights=str(tmp_path / "weights.pth")), MLP, image_size=32)
    with pytest.raises(DecompositionError, match=r"blocks\.1\.mlp\.fc1\.weight .* not all finite"):
        module.configure_model()


def test_the_command_line_writes_a_decomposition_that_recast_can_use(tmp_path, image_folder, capsys):
    run_dir, tiny = tmp_path / "mimicry", ["--model.backbone.name", "vit_tiny_patch16_224"]
    tiny += ["--model.backbone.weights", "random", "--model.backbone.args", json.dumps(TINY_VIT)]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "11"]
    words = ["fit", "--config", "mimicry_vit.yaml", *tiny, "--model.image_size", "32", "--run_dir", str(run_dir)]
    assert main([*words, *quiet]) == 0
    mean = json.loads((run_dir / "mimicry.json").read_text())["weight_cosine"]
    printed = " ".join(capsys.readouterr().out.split())
    assert f"mean {mean:.4f}, lowest" in printed
    assert "or use the closed form" in printed  # after so few epochs
    assert (run_dir / "config.yaml").is_file()
    assert not list(run_dir.rglob("*.ckpt"))  # each would be as large as the network
    decomposition = Decomposition.load(run_dir / "decomposition.safetensors")
    assert sum(bank.coefficients.numel() for bank in decomposition.banks) == 96
    (events,) = {path.parent for path in run_dir.rglob("events.out.tfevents.*")}
    log = EventAccumulator(str(events)).Reload()
    tags = log.Tags()["scalars"]
    layers = {f"weight_cosine/blocks.{i}.mlp.fc{j}.weight" for i in range(12) for j in (1, 2)}
    assert {"mimicry/loss", "mimicry/lr", "mimicry/weight_cosine"} | layers <= set(tags)
    assert {event.step for event in log.Scalars(min(layers))} == {0, 10}

    asked = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": str(tmp_path)}}
    once = ["--trainer.max_epochs", "1", "--trainer.callbacks", json.dumps([asked])]
    assert main([*words, "--run_dir", str(tmp_path / "other"), *quiet, *once]) == 0
    assert len(list(tmp_path.glob("*.ckpt"))) == 1

    piece = {"class_path": "Recast", "init_args": {"decomposition": str(run_dir / "decomposition.safetensors")}}
    tasks = [{"name": "colours", "path": str(image_folder("colours", images=6))}]
    data = ["--data.tasks", json.dumps(tasks), "--data.image_size", "32", "--data.batch_size", "8"]
    words = ["fit", "--config", "vit.yaml", *tiny, "--model.pieces", json.dumps([piece]), *data]
    assert main([*words, "--run_dir", str(tmp_path / "run"), *quiet]) == 0
    used = Decomposition.load(tmp_path / "run" / "decomposition.safetensors")
    assert used.fingerprint == decomposition.fingerprint


REAL = {"mlp": "mlp.fc[12].weight", "qkv": "attn.qkv.weight"}


@pytest.mark.parametrize(
    ("weights", "seed"),
    [("mlp", 42), ("qkv", 42)] + [pytest.param(w, s, marks=pytest.mark.release) for w in REAL for s in (1, 2)],
)
def test_the_shipped_settings_fit_every_weight_of_a_real_network(weights, seed, vit_weights, tmp_path):
    words = ["fit", "--config", "mimicry_vit.yaml", "--run_dir", str(tmp_path / "run"), "--seed_everything", str(seed)]
    words += ["--model.backbone.name", "vit_small_patch14_dinov2", "--model.backbone.weights", vit_weights]
    words += ["--model.layout.targets", json.dumps([REAL[weights]]), "--model.image_size", "70"]
    assert main([*words, "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]) == 0
    network = BackboneConfig("vit_small_patch14_dinov2", vit_weights).build(70).net.state_dict()
    fitted = Decomposition.load(tmp_path / "run" / "decomposition.safetensors").reconstruct()
    assert len(fitted) == {"mlp": 24, "qkv": 12}[weights]
    for name, weight in fitted.items():
        ours, theirs = weight.double().flatten(), network[name].double().flatten()
        assert float(ours @ theirs / ours.norm() / theirs.norm()) >= 0.9999, name


@pytest.mark.release
@pytest.mark.parametrize("seed", [42, 1, 2])
def test_the_shipped_settings_fit_every_convolution_of_resnet34(seed, tmp_path):
    words = [
        "fit",
        "--config",
        "mimicry_resnet34.yaml",
        "--run_dir",
        str(tmp_path / "run"),
        "--seed_everything",
        str(seed),
    ]
    words += ["--model.backbone.weights", "random", "--trainer.enable_progress_bar", "false"]
    assert main([*words, "--trainer.accelerator", "cpu"]) == 0
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents.*")).parent)).Reload()
    last = {t: events.Scalars(t)[-1].value for t in events.Tags()["scalars"] if t.startswith("weight_cosine/")}
    assert len(last) == 24
    assert min(last.values()) >= 0.9999
