"""What holds for every method: what is trained, what is kept, what a patch brings back."""

import dataclasses
import json
import subprocess
import sys

import lightning as L
import pytest
import torch
from conftest import ROOT, TINY_VIT
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from recast_pl import (
    CLR,
    DERPP,
    ERACE,
    EWC,
    HAT,
    L2P,
    AdaptFormer,
    BackboneConfig,
    BankLayout,
    DoRA,
    FineTune,
    FullFineTune,
    GDumb,
    Growth,
    InfLoRA,
    LinearProbe,
    LoRA,
    LoRAXS,
    LwF,
    Piggyback,
    Recast,
    RoSA,
    Scale,
    SequentialTaskDataModule,
    SharedState,
    Spectral,
    TaskConfig,
    TaskPatch,
    TILModule,
)
from recast_pl.errors import DecompositionError, PatchError, RunError
from recast_pl.learning.checkpoint import trainable_state
from recast_pl.learning.probe import Features, fit_probe
from recast_pl.methods.adaptation import ATTENTION, CONVOLUTIONS, MLP
from recast_pl.methods.piece import Piece

VIT = BackboneConfig("vit_tiny_patch16_224", "random", TINY_VIT)
RESNET = BackboneConfig("resnet10t", "random", {"zero_init_last": False})  # else no gradient reaches its convolutions
VIT_MLP = BankLayout([r"mlp\.fc[12]\.weight"], groups=6, templates=2, coefficient_sets=2)
RESNET_CONV = BankLayout([r"conv\d\.weight"])

METHODS = {
    "probe-vit": lambda: (VIT, [LinearProbe()]),
    "probe-resnet": lambda: (RESNET, [LinearProbe()]),
    "recast-vit": lambda: (VIT, [Recast(VIT_MLP, learning_rate=2e-2)]),
    "recast-resnet": lambda: (RESNET, [Recast(RESNET_CONV, learning_rate=2e-2)]),
    **{
        f"{name}-{backbone}": lambda method=method, config=config: (config, method())
        for name, method in {
            "melo": lambda: [LoRA()],
            "lora-r2": lambda: [LoRA(rank=2, alpha=3, targets=[MLP, ATTENTION, CONVOLUTIONS], parts=["q", "k"])],
            "dora": lambda: [DoRA()],
            "rosa": lambda: [LoRA(parts="qkv"), RoSA(0.003, 2, [ATTENTION, CONVOLUTIONS])],
            "rosa-sparse": lambda: [RoSA(0.001, warm_up=2)],
            "piggyback": lambda: [Piggyback(learning_rate=1e-2)],
            "adaptformer": lambda: [AdaptFormer(rank=4)],  # of one unit, a ReLU may be dead
            "clr": lambda: [CLR()],
            "finetune": lambda: [FullFineTune()],
            "scale": lambda: [Scale(learning_rate=2e-2)],
            "spectral": lambda: [Spectral(learning_rate=2e-2)],
        }.items()
        for backbone, config in (("vit", VIT), ("resnet", RESNET))
    },
    **{
        f"recast+{name}-vit": lambda method=method: (VIT, [Recast(VIT_MLP, learning_rate=2e-2), *method()])
        for name, method in {
            "adaptformer": lambda: [AdaptFormer()],
            "melo": lambda: [LoRA()],
            "dora-mlp": lambda: [DoRA(targets=[MLP])],
            "rosa": lambda: [LoRA(targets=[MLP]), RoSA(0.003, 2)],
            "rosa-sparse": lambda: [RoSA(0.001, 2)],
        }.items()
    },
    "recast+piggyback-resnet": lambda: (RESNET, [Recast(RESNET_CONV), Piggyback(learning_rate=1e-2)]),
    "recast+clr-resnet": lambda: (RESNET, [Recast(RESNET_CONV), CLR()]),
    **{
        f"{name}-{backbone}": lambda method=method, config=config: (config, method())
        for name, method in {
            "sequential": lambda: [FineTune()],
            "ewc": lambda: [FineTune(), EWC()],
            "lwf": lambda: [FineTune(), LwF()],
            "gdumb": lambda: [FineTune(), GDumb()],
            "erace": lambda: [FineTune(), ERACE(per_class=4)],
            "derpp": lambda: [FineTune(), DERPP(per_class=None, total=9)],
            "hat": lambda: [FineTune(), HAT()],
        }.items()
        for backbone, config in (("vit", VIT), ("resnet", RESNET))
    },
    "loraxs-vit": lambda: (VIT, [LoRAXS(learning_rate=2e-2)]),
    "recast+spectral-vit": lambda: (VIT, [Recast(VIT_MLP, learning_rate=2e-2), Spectral(learning_rate=2e-2)]),
    "inflora-vit": lambda: (VIT, [InfLoRA(rank=3)]),
    "inflora-resnet": lambda: (RESNET, [InfLoRA(rank=3, targets=[r"layer1\.\d+\.conv\d\.weight$"])]),
    "ewc+erace-vit": lambda: (VIT, [FineTune(), EWC(), ERACE(per_class=4)]),
    "recast+growth-vit": lambda: (VIT, [Recast(VIT_MLP, learning_rate=2e-2), Growth(learning_rate=2e-2)]),
    "l2p-vit": lambda: (VIT, [L2P()]),
    "lossy-vit": lambda: (VIT, [Recast(BankLayout([r"attn\.qkv"], groups=3, templates=2, coefficient_sets=3))]),
}
ISOLATED = {name: make for name, make in METHODS.items() if all(piece.isolated for piece in make()[1])}
SHARED = {name: make for name, make in METHODS.items() if name not in ISOLATED}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture
def data(image_folder):
    tasks = [TaskConfig(n, str(image_folder(n, c, seed=c))) for n, c in (("first", 3), ("second", 2))]
    return SequentialTaskDataModule(tasks, image_size=32, batch_size=4)


@pytest.fixture(params=METHODS)
def module(request):
    torch.manual_seed(0)
    backbone, pieces = METHODS[request.param]()
    return TILModule(backbone, pieces)


@pytest.fixture(params=ISOLATED)
def isolated(request):
    torch.manual_seed(0)
    return TILModule(*ISOLATED[request.param]())


@pytest.fixture(params=SHARED)
def sharing(request):
    torch.manual_seed(0)
    module = TILModule(*SHARED[request.param]())
    module.build(32)
    return module


def fit(module, data, index=0, **settings):
    data.select(index)
    trainer = L.Trainer(**{"max_epochs": 2, "accelerator": "cpu", "num_sanity_val_steps": 0, **QUIET, **settings})
    trainer.fit(module, datamodule=data)
    return module.patch({})


def snapshot(module):
    return {name: t.clone() for name, t in module.backbone.state_dict(keep_vars=False).items()}


def logits(module, images):
    module.eval()
    with torch.no_grad():
        return module(images)


def test_only_the_declared_parameters_change(module, data):
    module.build(32)
    before = snapshot(module)
    fit(module, data)
    trained = {id(p) for piece in module.pieces for p in piece.parameters.values()}
    own = {n for n, p in module.backbone.named_parameters(remove_duplicate=False) if id(p) in trained}
    for name, after in snapshot(module).items():  # batch normalisation's statistics are in it, too
        changed = not torch.equal(after, before[name])
        # InfLoRA has moved B into the sum, Growth has made a template of it
        ended = (".A", ".merged", ".B", ".left", ".right", ".coefficients")
        kept = name.endswith(ended) and not module.isolated
        assert changed == (name in own) or kept, name
    assert all(p.grad is None for p in module.parameters() if not p.requires_grad)


def test_old_logits_are_bit_identical_after_later_tasks(isolated, data):
    module = isolated
    images = torch.rand(3, 3, 32, 32)
    first = fit(module, data)
    module.activate(first)
    before = logits(module, images)
    second = fit(module, data, index=1)
    module.activate(second)
    assert logits(module, images).shape == (3, 2)
    module.activate(first)
    assert torch.equal(logits(module, images), before)


def test_a_patch_file_gives_identical_logits_in_a_fresh_process_like_module(module, data, tmp_path, request):
    module.build(32)
    images = torch.rand(3, 3, 32, 32)
    patch = fit(module, data)
    module.activate(patch)
    expected = logits(module, images)
    patch.save(tmp_path / "patch.safetensors")
    module.shared_state().save(tmp_path / "shared.safetensors")
    torch.manual_seed(0)
    fresh = TILModule(*METHODS[request.node.callspec.params["module"]]())
    fresh.build(32)
    if not fresh.isolated:
        fresh.load_shared_state(SharedState.load(tmp_path / "shared.safetensors"))
    fresh.activate(TaskPatch.load(tmp_path / "patch.safetensors"))
    assert torch.equal(logits(fresh, images), expected)


def test_a_task_starts_from_the_pretrained_features(isolated, data):
    module = isolated
    module.build(32)
    images = torch.rand(2, 3, 32, 32)
    start = module.backbone(images).detach()
    fit(module, data)
    module.begin_task("other", ["a", "b"])
    assert torch.equal(module.backbone(images), start)


def test_old_tasks_are_used_with_what_is_shared_after_the_last(sharing, data, tmp_path, request):
    module, images = sharing, torch.rand(3, 3, 32, 32)
    first = fit(module, data)
    module.activate(first)
    before = logits(module, images)
    second = fit(module, data, index=1)
    module.shared_state().save(tmp_path / "shared.safetensors")
    module.activate(first)
    expected = logits(module, images)
    assert expected.shape == before.shape
    if not {"HAT", "Growth"} & set(module.method):  # whose units, or templates, of old tasks are kept
        assert not torch.equal(expected, before)
    torch.manual_seed(0)
    fresh = TILModule(*SHARED[request.node.callspec.params["sharing"]]())
    fresh.build(32)
    fresh.load_shared_state(SharedState.load(tmp_path / "shared.safetensors"))
    for patch in (second, first):
        fresh.activate(patch)
    assert torch.equal(logits(fresh, images), expected)
    for ours, theirs in zip(fresh.shared_state().pieces, module.shared_state().pieces, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_trains_in_bf16_mixed(module, data):
    patch = fit(module, data, precision="bf16-mixed")
    states = [*patch.pieces, *module.shared_state().pieces]
    numbers = [t for state in states for name, t in state.items() if t.is_floating_point() and name != "logits"]
    assert all(t.dtype in (torch.float32, torch.float64) and t.isfinite().all() for t in numbers)


class Change(L.Callback):
    """What training has done to all that is trained."""

    def on_train_start(self, trainer, pl_module):
        self.before = trainable_state(pl_module)

    def on_train_end(self, trainer, pl_module):
        self.values = {name: value - self.before[name] for name, value in trainable_state(pl_module).items()}


QUICK = ("recast-vit", "clr-resnet")
# methods whose tasks share weights may look at each batch by itself: they draw from a buffer, or harden masks
STEPS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ISOLATED]


def change_in_an_epoch(name, folder, batch_size, **settings):
    """Of plain gradient descent on 18 images: with all of them in a batch, the negative gradient."""
    torch.manual_seed(0)
    backbone, pieces = METHODS[name]()
    for piece in pieces:
        piece.learning_rate = None
    module = TILModule(backbone, pieces, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    data = SequentialTaskDataModule([TaskConfig("first", str(folder), flip=False)], 32, batch_size=batch_size)
    change = Change()
    fit(module, data, max_epochs=1, callbacks=[change], **settings)
    return change.values


@pytest.mark.parametrize("name", STEPS)
def test_half_batches_that_are_accumulated_are_a_whole_one_and_clipping_bounds_the_step(name, image_folder):
    folder = image_folder("first", 3)
    whole = change_in_an_epoch(name, folder, 18)
    halves = change_in_an_epoch(name, folder, 9, accumulate_grad_batches=2)
    norm = torch.stack([value.norm() for value in whole.values()]).norm()
    clipped = change_in_an_epoch(name, folder, 18, gradient_clip_val=float(norm) / 4)
    assert norm > 1e-3
    for key, value in whole.items():
        assert torch.allclose(halves[key], value, atol=1e-5 * float(norm)), key
        assert torch.allclose(clipped[key], value / 4, atol=1e-5 * float(norm)), key


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_trains_in_fp16_with_gradients_that_are_scaled_and_may_overflow(module, device, data):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    if device == "cpu" and module.backbone_config is RESNET:
        pytest.skip("convolutions in fp16 take minutes on a CPU")
    scaler = torch.amp.GradScaler(device, init_scale=2.0**40)  # so that the first steps overflow, whatever the method
    change = Change()
    settings = {"accelerator": "gpu", "devices": 1} if device == "cuda" else {}
    precision = MixedPrecision("16-mixed", device, scaler)
    patch = fit(module, data, max_epochs=8, plugins=[precision], callbacks=[change], **settings)
    assert scaler.get_scale() < 2.0**40
    assert any(value.count_nonzero() for value in change.values.values())
    states = [patch.head, *patch.pieces, *module.shared_state().pieces]
    assert all(t.isfinite().all() for state in states for t in state.values())


# every method on one backbone
ONCE = [name for name in METHODS if name.endswith("-vit") or name.split("-resnet")[0] + "-vit" not in METHODS]


@pytest.mark.slow
def test_two_processes_end_with_the_same_state(image_folder, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(ROOT / "tests" / "two_processes.py")
    words = [*launch, script, str(image_folder("first", 3)), str(tmp_path), *ONCE]
    process = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert process.returncode == 0, process.stderr[-2000:]
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert list(one) == ONCE
    assert [name for name in ONCE if one[name] != other[name]] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ONCE)
def test_compiles_into_one_graph(name, data):
    backbone, pieces = METHODS[name]()
    module = TILModule(backbone, pieces)
    torch._dynamo.reset()  # or graphs of the module before would be taken for those of this one
    images = torch.rand(2, 3, 32, 32)
    module.build(32)
    module.begin_task("first", ["a", "b"])
    trained = [p for piece in module.pieces for p in piece.parameters.values()]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.01 * torch.randn_like(parameter))
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(images), module(images), atol=1e-5)
    parameters = [*trained, *module.head.parameters()]
    gradients = [torch.autograd.grad(f(images).sum(), parameters, allow_unused=True) for f in (compiled, module)]
    for ours, plain in zip(*gradients, strict=True):
        assert (ours is None and plain is None) or torch.allclose(ours, plain, atol=1e-4)


def test_averaging_many_sets_loses_no_bit_when_a_patch_returns(data):
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


def test_recast_wants_a_layout_or_a_file():
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


class _Penalty(Piece):
    """A piece that only adds to the loss, and thereby turns the head's bias."""

    def loss(self, step):
        assert step.images.ndim == 4
        assert step.features.shape[0] == step.labels.shape[0]
        return 100 * step.logits[:, 0].mean()


def test_terms_of_pieces_reach_the_loss(data):
    torch.manual_seed(0)
    plain = TILModule(VIT, [LinearProbe()])
    fit(plain, data)
    torch.manual_seed(0)
    penalised = TILModule(VIT, [_Penalty()])
    fit(penalised, data)
    assert penalised.head.bias[0] < plain.head.bias[0]


def test_a_warm_start_is_the_probe_and_counts_before_training(data):
    module = TILModule(VIT, [LinearProbe()], warm_start=True)
    seen = {}

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            batches = [trainer.strategy.batch_to_device(b, pl_module.device) for b in data.plain_dataloader("val")]
            correct = torch.cat([pl_module(x).argmax(1) == y for x, y in batches])
            seen["accuracy"] = float(correct.double().mean())

    fit(module, data, callbacks=[Look()])
    assert seen["accuracy"] == module.probe_score[0]


def test_the_probe_follows_the_gradient_of_cross_entropy():
    head = nn.Linear(6, 3).double()
    start = [p.detach().clone().requires_grad_() for p in head.parameters()]
    features = Features(torch.randn(11, 6).double(), torch.randint(0, 3, (11,)))
    loss = nn.functional.cross_entropy(nn.functional.linear(features.features, *start), features.labels)
    gradients = torch.autograd.grad(loss, start)
    fit_probe(head, features, features, 1, 11, lambda p: ([torch.optim.SGD(p, lr=0.5)], []))
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
        return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer)]

    best = fit_probe(head, train, validation, 20, 40, configure)
    assert validation.score(head)[0] == best
    fit_probe(last := nn.Linear(5, 2), train, validation, 1, 40, configure)
    assert best >= validation.score(last)[0]


def test_what_was_forgotten_is_said(data):
    module = TILModule(VIT, [LinearProbe()])
    with pytest.raises(RunError, match="build"):
        module.begin_task("task", ["a", "b"])
    module.build(32)
    with pytest.raises(RunError, match="activate"):
        module(torch.rand(1, 3, 32, 32))
    loader = torch.utils.data.DataLoader([0])
    with pytest.raises(RunError, match="datamodule"):
        L.Trainer(**QUIET, max_epochs=1, accelerator="cpu").fit(TILModule(VIT, [LinearProbe()]), loader)
