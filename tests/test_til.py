"""TILModule: what a patch stores and refuses, learning rates, the linear probe, and methods that do not work."""

import dataclasses

import lightning as L
import pytest
import torch
from test_all_methods import QUIET, RESNET, VIT, VIT_MLP, fit
from torch import nn

import recast_pl as rp
from recast_pl import BackboneConfig, BankLayout, LinearProbe, Recast, TaskPatch, TILModule
from recast_pl.errors import DecompositionError, MethodError, PatchError, RunError
from recast_pl.learning.features import Features
from recast_pl.learning.probe import fit_probe
from recast_pl.methods.piece import Piece


def test_averaging_many_sets_loses_no_bit_when_a_patch_is_loaded(data):
    # the mean of seven equal numbers need not be that number again, hence the single set
    torch.manual_seed(0)
    module = TILModule(VIT, [Recast(dataclasses.replace(VIT_MLP, coefficient_sets=7), learning_rate=0.1)])
    patch = fit(module, data)
    assert module.task_parameters == 24 * 2 * 7
    for _ in range(2):
        module.activate(patch)
        again = module.patch({})
        assert torch.equal(again.pieces[0]["coefficients"], patch.pieces[0]["coefficients"])
        patch = again
    assert module.task_parameters == 24 * 2


def test_a_patch_stores_the_mean_over_the_sets():
    piece = Recast(VIT_MLP)
    piece.attach(VIT.build(32).net)
    values = [torch.randn(2, 2, dtype=torch.float64) for _ in piece.parameters]
    for parameter, value in zip(piece.parameters.values(), values, strict=True):
        parameter.data = value.float()
    expected = torch.cat([(v[0].float().double() + v[1].float().double()) / 2 for v in values])
    assert torch.allclose(piece.task_state()["coefficients"].double(), expected, atol=1e-7)


@pytest.mark.parametrize(
    ("targets", "sets", "trained", "stored"),
    [
        (r"mlp\.fc[12]\.weight", 2, 96, 48),
        (r"mlp\.fc[12]\.weight", 1, 48, 48),
        (r"attn\.qkv\.weight", 2, 48, 24),
        (r"attn\.qkv\.weight", 1, 24, 24),
        (r"(attn\.qkv|mlp\.fc[12])\.weight", 2, 144, 72),
    ],
)
def test_parameters_and_patch_bytes_of_the_real_vit(vit_weights, tmp_path, targets, sets, trained, stored):
    backbone = BackboneConfig("vit_small_patch14_dinov2", vit_weights)
    module = TILModule(backbone, [Recast(BankLayout([targets], 6, templates=2, coefficient_sets=sets))])
    module.build(98)
    module.begin_task("task", ["a", "b", "c"])
    patch = module.patch({"accuracy": 100.0})
    assert module.task_parameters == trained
    assert sum(t.numel() for state in patch.pieces for t in state.values()) == stored
    patch.save(tmp_path / "patch.safetensors")
    head_bytes = 4 * sum(t.numel() for t in patch.head.values())
    assert (tmp_path / "patch.safetensors").stat().st_size - head_bytes < 4000


def test_resnet34_trains_the_counts_of_the_release():
    module = TILModule(
        BackboneConfig("torchvision/resnet34", "random"),
        [Recast(BankLayout([r"layer\d\.[1-9]\d*\.conv[12]\.weight"], coefficient_sets=2))],
    )
    module.build(32)
    assert module.task_parameters == 168


def _patch(module, **changes):
    module.build(32)
    module.begin_task("task", ["a", "b"])
    return dataclasses.replace(module.patch({}), **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"base": "0" * 64}, "base 000000000000"),
        (lambda p: {"method": ["LoRA"]}, "LoRA"),
        (lambda p: {"classes": ["a", "b", "c"]}, "head"),
        (lambda p: {"pieces": [{"coefficients": torch.zeros(7)}]}, "7"),
        (lambda p: {"pieces": [{"other": torch.zeros(48)}]}, "other"),
        (lambda p: {"pieces": [{"coefficients": torch.full((48,), torch.nan)}]}, "NaN"),
        (lambda p: {"head": p.head | {"bias": torch.tensor([torch.inf, 0])}}, "bias"),
    ],
)
def test_a_patch_that_does_not_fit_is_refused(change, message):
    module = TILModule(VIT, [Recast(VIT_MLP)])
    patch = _patch(module)
    with pytest.raises(PatchError, match=message):
        module.activate(dataclasses.replace(patch, **change(patch)))


def test_a_patch_is_refused_where_one_bit_of_the_base_differs():
    torch.manual_seed(0)
    module = TILModule(VIT, [LinearProbe()])
    patch = _patch(module)
    torch.manual_seed(0)
    other = TILModule(dataclasses.replace(VIT, mean=(0.5, 0.5, 0.4999)), [LinearProbe()])
    other.build(32)
    with pytest.raises(PatchError, match="belongs to base"):
        other.activate(patch)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"\xff" * 8 + b[8:], lambda b: b""])
def test_a_damaged_patch_file_is_refused(tmp_path, damage):
    path = tmp_path / "patch.safetensors"
    _patch(TILModule(VIT, [LinearProbe()])).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(PatchError, match=r"patch\.safetensors"):
        TaskPatch.load(path)


def test_equal_patches_are_equal_files(tmp_path):
    patch = _patch(TILModule(VIT, [Recast(VIT_MLP)]))
    assert len({patch.to_bytes() for _ in range(5)}) == 1
    patch.save(str(tmp_path / "a"))
    assert TaskPatch.load(str(tmp_path / "a")).to_bytes() == patch.to_bytes()


def test_recast_needs_a_layout_or_a_file():
    with pytest.raises(DecompositionError, match="neither"):
        Recast()
    with pytest.raises(DecompositionError, match="both"):
        Recast(VIT_MLP, "file")


def test_each_piece_has_its_own_learning_rate(data):
    module = TILModule(VIT, [Recast(VIT_MLP, learning_rate=0.5)])
    fit(module, data, max_epochs=1)
    groups = {g["name"]: g for g in module.configure_optimizers()[0][0].param_groups}
    assert groups["head"]["initial_lr"] == 2e-3
    assert groups["Recast"]["initial_lr"] == 0.5
    assert sum(p.numel() for p in groups["Recast"]["params"]) == 96


def test_parameter_groups_of_two_pieces_of_a_class_have_names_of_their_own():
    module = TILModule(VIT, [rp.LoRA(), rp.LoRA(targets=["mlp"]), rp.Growth(), rp.Growth(rank=2)])
    module.build(32)
    module.begin_task("task", ["a", "b"])
    names = [group["name"] for group in module.configure_optimizers()[0][0].param_groups]
    assert names == ["head", "LoRA", "LoRA_1", "Growth factors", "Growth_1 factors"]


@pytest.mark.parametrize(
    ("backbone", "pieces", "named"),
    [
        (RESNET, lambda: [rp.AdaptFormer(), rp.CLR()], "CLR and a piece before it extend the same Conv2d"),
        (VIT, lambda: [rp.AdaptFormer(), rp.AdaptFormer()], "AdaptFormer and a piece before it extend the same"),
        (RESNET, lambda: [rp.FineTune(), rp.HAT(), rp.CLR()], "CLR and a piece before it extend the same Conv2d"),
        (VIT, lambda: [rp.L2P(), rp.L2P()], "L2P and a piece before it extend the same"),
    ],
)
def test_pieces_that_extend_the_same_module_are_refused(backbone, pieces, named):
    with pytest.raises(MethodError, match=named):
        TILModule(backbone, pieces()).build(32)


class _Penalty(Piece):
    """A piece that only adds to the loss, and so changes the head's bias."""

    def loss(self, step):
        assert step.images.ndim == 4
        assert step.features.shape[0] == step.labels.shape[0]
        return 100 * step.logits[:, 0].mean()


def test_terms_of_pieces_reach_the_loss(data):
    torch.manual_seed(0)
    plain = TILModule(VIT, [LinearProbe()], head="sgd")
    fit(plain, data)
    torch.manual_seed(0)
    penalised = TILModule(VIT, [_Penalty()], head="sgd")
    fit(penalised, data)
    assert penalised.head.bias[0] < plain.head.bias[0]


def test_a_warm_start_is_the_probe_and_counts_before_training(data):
    module = TILModule(VIT, [LinearProbe()], head="sgd", warm_start=True)
    seen = {}

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            batches = [trainer.strategy.batch_to_device(b, pl_module.device) for b in data.plain_dataloader("val")]
            correct = torch.cat([pl_module(x).argmax(1) == y for x, y in batches])
            seen["accuracy"] = float(correct.double().mean())

    fit(module, data, callbacks=[Look()])
    assert seen["accuracy"] == module.probes.start[0]


def test_the_probe_follows_the_gradient_of_cross_entropy():
    head = nn.Linear(6, 3).double()
    start = [p.detach().clone().requires_grad_() for p in head.parameters()]
    features = Features(torch.randn(11, 6).double(), torch.randint(0, 3, (11,)))
    loss = nn.functional.cross_entropy(nn.functional.linear(features.features, *start), features.labels)
    gradients = torch.autograd.grad(loss, start)
    fit_probe(head, features, features, 1, 11, lambda p: (torch.optim.SGD(p, lr=0.5), None))
    for parameter, before, gradient in zip(head.parameters(), start, gradients, strict=True):
        torch.testing.assert_close(parameter, before - 0.5 * gradient)


def test_the_probe_keeps_its_best_epoch():
    torch.manual_seed(0)
    features = torch.randn(60, 5)
    labels = (features[:, 0] > 0).long()
    train, validation = Features(features[:40], labels[:40]), Features(features[40:], labels[40:])
    head = nn.Linear(5, 2)

    def configure(parameters):  # so large a rate that accuracy swings
        optimizer = torch.optim.SGD(parameters, lr=50.0)
        return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)

    best = fit_probe(head, train, validation, 20, 40, configure)
    assert validation.score(head)[0] == best
    fit_probe(last := nn.Linear(5, 2), train, validation, 1, 40, configure)
    assert best >= validation.score(last)[0]


def test_a_missing_call_is_named(data):
    module = TILModule(VIT, [LinearProbe()])
    with pytest.raises(RunError, match="build"):
        module.begin_task("task", ["a", "b"])
    module.build(32)
    with pytest.raises(RunError, match="activate"):
        module(torch.rand(1, 3, 32, 32))
    loader = torch.utils.data.DataLoader([0])
    with pytest.raises(RunError, match="datamodule"):
        L.Trainer(**QUIET, max_epochs=1, accelerator="cpu").fit(TILModule(VIT, [LinearProbe()]), loader)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_a_trainer_that_would_round_the_base_is_refused(precision, data):
    trainer = L.Trainer(**QUIET, max_epochs=1, accelerator="cpu", precision=precision)
    with pytest.raises(RunError, match=f"use --trainer.precision {precision.replace('true', 'mixed')}"):
        trainer.fit(TILModule(VIT, [LinearProbe()]), datamodule=data)
