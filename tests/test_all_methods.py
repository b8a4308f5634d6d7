"""What holds for every method: what is trained, what is kept, what a patch brings back.

A method is one line of `METHODS`.
"""

import functools
import json
import subprocess
import sys
import tempfile

import lightning as L
import pytest
import torch
from conftest import ROOT, TINY_VIT, two_tiny_tasks
from lightning.pytorch.plugins.precision import MixedPrecision
from safetensors.torch import save_file

import recast_pl as rp
from recast_pl import (
    BackboneConfig,
    BankLayout,
    SequentialTaskDataModule,
    SharedState,
    TaskConfig,
    TaskPatch,
    TILModule,
)
from recast_pl.learning.acceleration import OutputChanges
from recast_pl.learning.checkpoint import trainable_state
from recast_pl.learning.heads import solve_head
from recast_pl.methods.adaptation import ATTENTION, CONVOLUTIONS, MLP

VIT = BackboneConfig("vit_tiny_patch16_224", "random", TINY_VIT)
RESNET = BackboneConfig("resnet10t", "random", {"zero_init_last": False})  # else no gradient reaches its convolutions
VIT_MLP = BankLayout([r"mlp\.fc[12]\.weight"], layers_per_group=2, templates=2, coefficient_sets=2)
VIT_ATTENTION = BankLayout([r"attn\.qkv"], layers_per_group=4, templates=2, coefficient_sets=3)
RESNET_CONV = BankLayout([r"conv\d\.weight"])


def recast(layout=VIT_MLP):
    return rp.Recast(layout, learning_rate=2.5e-3)


FOLDER = tempfile.TemporaryDirectory()  # of this process


@functools.cache
def vectors(name):
    """Files of two networks that were fine-tuned, or rather shaken."""
    backbone = {"vit": VIT, "resnet": RESNET}[name]
    files = [f"{FOLDER.name}/{name}{seed}.safetensors" for seed in range(2)]
    with torch.random.fork_rng(devices=[]):
        for seed, file in enumerate(files):
            torch.manual_seed(seed)
            network = backbone.build(32).net
            save_file({key: p + 0.1 * torch.randn_like(p) for key, p in network.named_parameters()}, file)
    return files


ON_BOTH = {
    "probe": lambda: [rp.LinearProbe()],
    "melo": lambda: [rp.LoRA()],
    "lora-r2": lambda: [rp.LoRA(rank=2, alpha=3, targets=[MLP, ATTENTION, CONVOLUTIONS], parts=["q", "k"])],
    "lora-shared": lambda: [rp.LoRA(targets=[MLP, ATTENTION, CONVOLUTIONS], shared=True)],
    "rounded-lora": lambda: [rp.RoundedLoRA(targets=[MLP, ATTENTION, CONVOLUTIONS])],
    "rounded-lora-shared": lambda: [rp.RoundedLoRA(8, rank=2, parts="qkv", shared=True)],
    "one-bit-lora": lambda: [rp.RoundedLoRA(1, targets=[MLP, ATTENTION, CONVOLUTIONS])],
    "dora": lambda: [rp.DoRA()],
    "dora-norms": lambda: [rp.DoRA(train_magnitude=False)],
    "rosa": lambda: [rp.LoRA(parts="qkv"), rp.RoSA(0.003, 2, [ATTENTION, CONVOLUTIONS])],
    "rosa-sparse": lambda: [rp.RoSA(0.001, warm_up=2)],
    "rosa-relative": lambda: [rp.RoSA(0.1, warm_up=2, relative=True)],
    "piggyback": lambda: [rp.Piggyback(learning_rate=1e-2)],
    "adaptformer": lambda: [rp.AdaptFormer(rank=4, dropout=0)],  # the ReLU of a single unit may be dead
    "dropout": lambda: [rp.AdaptFormer(rank=4, dropout=0.5)],
    "clr": lambda: [rp.CLR()],
    "finetune": lambda: [rp.FullFineTune()],
    "scale": lambda: [rp.Scale(learning_rate=2e-2)],
    "spectral": lambda: [rp.Spectral(learning_rate=2e-2)],
    "chosen": lambda: [rp.Chosen(count=7, rank=2, learning_rate=2e-2)],
    "tinylora": lambda: [rp.TinyLoRA(count=3, tied=2, learning_rate=2e-2)],
    "unilora": lambda: [rp.UniLoRA(count=20, learning_rate=2e-2)],
    "lift": lambda: [rp.LIFT(rank=2, every=4, learning_rate=2e-2)],
    "kappa": lambda: [rp.KappaTune()],
    "bias": lambda: [rp.PartialFineTune()],
    "rounded-bias": lambda: [
        rp.RoundedFineTune(targets=[r"bias$", r"blocks\.1\.mlp\.fc1\.weight$", r"layer1\.0\.conv1\.weight$"])
    ],
    "one-bit-norm": lambda: [rp.RoundedFineTune(1, [r"(norm|bn)\w*\.(weight|bias)$"])],
    "norm": lambda: [rp.PartialFineTune([r"(norm|bn)\w*\.(weight|bias)$"])],
    "l2sp": lambda: [rp.Scale(learning_rate=2e-2), rp.L2SP(0.1)],
    "cotta": lambda: [rp.Scale(learning_rate=2e-2), rp.CoTTA(rate=1e-2, views=2)],
    "projection": lambda: [rp.Projection(8)],
    "projection+finetune": lambda: [rp.FullFineTune(), rp.Projection(8)],
    "sequential": lambda: [rp.FineTune()],
    "ewc": lambda: [rp.FineTune(), rp.EWC()],
    "lwf": lambda: [rp.FineTune(), rp.LwF()],
    "wa": lambda: [rp.FineTune(), rp.WeightAligning()],
    "napa": lambda: [rp.FineTune(), rp.NAPAVQ(temperature=10)],  # at 0.1 the classes are too far apart for gradients
    "gdumb": lambda: [rp.FineTune(), rp.GDumb()],
    "classp": lambda: [rp.FineTune(None), rp.GradientSums()],
    "erace": lambda: [rp.FineTune(), rp.ERACE(per_class=4)],
    "derpp": lambda: [rp.FineTune(), rp.DERPP(per_class=None, total=9)],
    "ider": lambda: [rp.FineTune(), rp.IDER(empty=0.5, per_class=4)],
    "hat": lambda: [rp.FineTune(), rp.HAT()],
}
ON_VIT = {
    "atlas": lambda: [rp.ATLAS(vectors("vit"))],
    "recast+atlas": lambda: [recast(), rp.ATLAS(vectors("vit"), [r"mlp"])],
    "recast": lambda: [recast()],
    "two-recasts": lambda: [recast(), recast(VIT_ATTENTION)],
    "recast+adaptformer": lambda: [recast(), rp.AdaptFormer(dropout=0)],
    "recast+melo": lambda: [recast(), rp.LoRA()],
    "recast+dora-mlp": lambda: [recast(), rp.DoRA(targets=[MLP])],
    "recast+dora-norms": lambda: [recast(), rp.DoRA(targets=[MLP], train_magnitude=False)],
    "recast+rosa": lambda: [recast(), rp.LoRA(targets=[MLP]), rp.RoSA(0.003, 2)],
    "recast+rosa-relative": lambda: [recast(), rp.RoSA(0.003, 2, relative=True), rp.LoRA(targets=[MLP])],
    "recast+rosa-sparse": lambda: [recast(), rp.RoSA(0.001, 2)],
    "recast+spectral": lambda: [recast(), rp.Spectral(learning_rate=2e-2)],
    "recast+chosen": lambda: [recast(), rp.Chosen(count=9, rank=4, diagonal=False, learning_rate=2e-2)],
    "recast+lift": lambda: [recast(), rp.LIFT(every=2, learning_rate=2e-2)],
    "recast+l2sp": lambda: [recast(), rp.L2SP(0.1)],
    "recast+projection": lambda: [recast(), rp.Projection(8)],
    "recast+growth": lambda: [recast(), rp.Growth(learning_rate=2e-2)],
    "lossy": lambda: [recast(VIT_ATTENTION)],
    "loraxs": lambda: [rp.LoRAXS(learning_rate=2e-2)],
    "headscale": lambda: [rp.HeadScale(learning_rate=2e-2)],
    "recast+unilora": lambda: [recast(), rp.UniLoRA(targets=[MLP])],
    "inflora": lambda: [rp.InfLoRA(rank=3)],
    "hypernetwork": lambda: [rp.Hypernetwork(VIT_ATTENTION, size=3, hidden=5)],
    "ewc+erace": lambda: [rp.FineTune(), rp.EWC(), rp.ERACE(per_class=4)],
    "l2p": lambda: [rp.L2P()],
}
ON_RESNET = {
    "atlas": lambda: [rp.ATLAS(vectors("resnet"))],
    "recast": lambda: [recast(RESNET_CONV)],
    "recast+piggyback": lambda: [recast(RESNET_CONV), rp.Piggyback(learning_rate=1e-2)],
    "recast+clr": lambda: [recast(RESNET_CONV), rp.CLR()],
    "inflora": lambda: [rp.InfLoRA(rank=3, targets=[r"layer1\.\d+\.conv\d\.weight$"])],
    "hypernetwork": lambda: [rp.Hypernetwork(RESNET_CONV, size=3, hidden=5)],
}
OPTIMIZERS = {"classp": functools.partial(rp.CLASSP, lr=1e-3, threshold=0.0)}
"""Of methods that are nothing without theirs; here every entry moves, but not far."""


def arguments(name, backbone, pieces):
    """Makes the arguments of a module."""
    return lambda: (backbone, pieces(), *(OPTIMIZERS[key] for key in (name,) if key in OPTIMIZERS))


METHODS = {
    f"{name}-{suffix}": arguments(name, backbone, pieces)
    for suffix, backbone, methods in (("vit", VIT, ON_BOTH | ON_VIT), ("resnet", RESNET, ON_BOTH | ON_RESNET))
    for name, pieces in methods.items()
}
ISOLATED = {name: make for name, make in METHODS.items() if all(piece.isolated for piece in make()[1])}
# every method on one backbone
ONCE = [name for name in METHODS if name.endswith("-vit") or name.split("-resnet")[0] + "-vit" not in METHODS]
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(params=METHODS)
def module(request):
    torch.manual_seed(0)
    return TILModule(*METHODS[request.param]())


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


class History:
    """A module that has learnt two tasks, with what it was before them and after the first."""

    def __init__(self, name, data):
        self.name, self.data = name, data
        self.images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        self.module = module = self.fresh()
        self.start, self.before = module.backbone(self.images).detach(), snapshot(module)
        self.first = fit(module, data)
        self.after, self.signature = snapshot(module), module.signature
        trained = {id(p) for piece in module.pieces for p in piece.parameters.values()}
        named = module.backbone.named_parameters(remove_duplicate=False)
        self.trained = {key for key, parameter in named if id(parameter) in trained}
        self.with_gradients = [p for p in module.parameters() if p.grad is not None and not p.requires_grad]
        module.activate(self.first)
        self.outputs = logits(module, self.images)
        self.second = fit(module, data, index=1)

    def fresh(self):
        torch.manual_seed(0)
        module = TILModule(*METHODS[self.name]())
        module.build(32)
        return module

    def restored(self, folder):
        """A fresh module with the state that tasks share, read from a file."""
        module = self.fresh()
        if not module.isolated:
            self.module.shared_state().save(folder / "shared.safetensors")
            module.load_shared_state(SharedState.load(folder / "shared.safetensors"))
        return module


@pytest.fixture(scope="module")
def two_tasks(tmp_path_factory):
    return two_tiny_tasks(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module", params=METHODS)
def history(request, two_tasks):
    return History(request.param, two_tasks)


def test_only_the_declared_parameters_change_and_the_next_task_starts_from_the_pretrained_features(history):
    module = history.module
    for name, after in history.after.items():  # batch normalisation's statistics are in it, too
        changed = not torch.equal(after, history.before[name])
        # InfLoRA has moved B into the sum, Growth has made a template of it
        ended = (".A", ".merged", ".B", ".left", ".right", ".coefficients")
        kept = name.endswith(ended) and not module.isolated
        assert changed == (name in history.trained) or kept, name
    assert not history.with_gradients
    if module.isolated:
        module.begin_task("other", ["a", "b"])
        assert torch.equal(module.backbone(history.images), history.start)


def train_means(module, data):
    """Mean features of the classes of the current task of the data, by the network as it is."""
    (images, labels), *others = (data.on_after_batch_transfer(b, 0) for b in data.plain_dataloader("train"))
    images = torch.cat([images, *(each for each, _ in others)])
    labels = torch.cat([labels, *(each for _, each in others)])
    with torch.no_grad():
        features = module.backbone(images)
    return torch.stack([features[labels == label].mean(0) for label in range(len(data.classes))])


def test_signatures_are_of_the_network_that_every_task_starts_from(history):
    module, data, signature = history.module, history.data, history.signature
    assert (signature is not None) == module.isolated
    if signature is not None:
        data.select(0)
        torch.manual_seed(5)  # what a piece draws changes nothing
        module.begin_task(data.task_name, data.classes)
        assert (signature.task, signature.classes) == ("first", data.classes)
        assert (signature.base, signature.image_size) == (module.base, 32)
        torch.testing.assert_close(train_means(module, data), signature.means.float(), rtol=1e-3, atol=1e-4)


def test_later_tasks_change_the_old_only_through_what_they_share(history, tmp_path):
    module, images = history.module, history.images
    module.activate(history.second)
    assert logits(module, images).shape == (3, 2)
    module.activate(history.first)
    now = logits(module, images)
    if module.isolated:
        assert torch.equal(now, history.outputs)
    elif not {"HAT", "Growth"} & set(module.method):  # they protect units, or templates, of old tasks
        assert not torch.equal(now, history.outputs)
    restored = history.restored(tmp_path)
    for patch in (history.second, history.first):
        restored.activate(patch)
    assert torch.equal(logits(restored, images), now)
    for ours, theirs in zip(restored.shared_state().pieces, module.shared_state().pieces, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_patch_file_gives_identical_logits_in_a_fresh_module(history, tmp_path):
    module, images, patch = history.module, history.images, history.second
    restored = history.restored(tmp_path)
    patch.save(tmp_path / "patch.safetensors")
    compact = [patch.compacted(bits) for bits in (4, 8)]
    for bits, small in zip((4, 8), compact, strict=True):
        small.save(tmp_path / f"{bits}.recast")
    for stored, path in zip((patch, *compact), ("patch.safetensors", "4.recast", "8.recast"), strict=True):
        module.activate(stored)
        restored.activate(read := TaskPatch.load(tmp_path / path))
        assert torch.equal(logits(restored, images), logits(module, images))
        assert read.to_bytes() == (tmp_path / path).read_bytes()


def test_a_patch_in_half_precision_loads_and_unpacks_in_that_of_the_network(module):
    module.build(32)
    module.begin_task("first", ["a", "b"])
    for piece in module.pieces:
        state = {n: t.half() if t.is_floating_point() else t for n, t in piece.task_state().items()}
        piece.load_task_state(state)
        assert {p.dtype for p in piece.parameters.values()} <= {torch.float32}
        unpacked = piece.unpack({n: t[None] for n, t in state.items()})
        for tensor, (values,) in (unpacked or {}).items():
            assert values.dtype == tensor.dtype
            assert torch.equal(values, tensor)


@pytest.mark.parametrize("module", ONCE, indirect=True)
def test_trains_in_bf16_mixed(module, two_tasks):
    patch = fit(module, two_tasks, precision="bf16-mixed", max_epochs=1, limit_train_batches=2)
    states = [*patch.pieces, *module.shared_state().pieces]
    numbers = [t for state in states for name, t in state.items() if t.is_floating_point() and name != "logits"]
    assert all(t.dtype in (torch.float32, torch.float64) and t.isfinite().all() for t in numbers)


class Change(L.Callback):
    """How training has changed everything that is trained."""

    def on_train_start(self, trainer, pl_module):
        self.before = trainable_state(pl_module)

    def on_train_end(self, trainer, pl_module):
        self.values = {name: value - self.before[name] for name, value in trainable_state(pl_module).items()}


class Losses(L.Callback):
    """What validation has measured, and what was trained after each epoch."""

    def __init__(self):
        self.validated, self.trained = [], []

    def on_validation_epoch_end(self, trainer, pl_module):
        self.validated.append([float(trainer.callback_metrics[name]) for name in ("val/accuracy", "val/loss")])

    def on_train_epoch_end(self, trainer, pl_module):
        self.trained.append(trainable_state(pl_module))


@pytest.mark.parametrize("validation", [1.0, 0])
@pytest.mark.parametrize(("rounded", "exact"), [("one-bit-lora", "lora"), ("one-bit-norm", "norm")])
def test_rounded_methods_validate_what_they_store_and_train_exact_numbers(rounded, exact, validation, two_tasks):
    found = {}
    for name in (rounded, exact):
        pieces = ON_BOTH[name]() if name != "lora" else [rp.LoRA(targets=[MLP, ATTENTION, CONVOLUTIONS])]
        for piece in pieces:
            piece.learning_rate = 0.05
        torch.manual_seed(0)
        module, losses = TILModule(VIT, pieces, head="sgd"), Losses()
        patch = fit(module, two_tasks, max_epochs=3, callbacks=[losses], limit_val_batches=validation)
        found[name] = module, losses, patch
    module, losses, patch = found[rounded]
    others = found[exact][1].trained
    assert len(others) == 3
    for mine, other in zip(losses.trained, others, strict=True):
        assert all(torch.equal(mine[name], value) for name, value in other.items())
    assert not all(torch.equal(value, dict(module.named_parameters())[name]) for name, value in others[-1].items())
    if validation:
        module.activate(patch)
        trainer = L.Trainer(accelerator="cpu", **QUIET)
        (again,) = trainer.validate(module, datamodule=two_tasks, verbose=False)
        assert [again["val/accuracy"], again["val/loss"]] in [pytest.approx(each) for each in losses.validated]
        assert [each[1] for each in losses.validated] != [each[1] for each in found[exact][1].validated]


def test_the_head_of_a_rounded_task_is_solved_on_rounded_features(two_tasks):
    module = TILModule(VIT, [rp.RoundedFineTune(1, [r"norm\w*\.(weight|bias)$"], 0.05)], head="lda")
    for validation in (1.0, 0):
        two_tasks.select(0)
        trainer = L.Trainer(max_epochs=2, accelerator="cpu", limit_val_batches=validation, **QUIET)
        trainer.fit(module, datamodule=two_tasks)
        (train,) = module.features("train")
        solved = solve_head("lda", train, len(module.classes))
        torch.testing.assert_close(module.current()[1].weight, solved.weight, rtol=1e-3, atol=1e-3)
        assert any(not torch.equal(p, module.pieces[0].start[n]) for n, p in module.pieces[0].parameters.items())


QUICK = ("recast-vit", "clr-resnet")
# methods whose tasks share weights may treat batches one by one: they draw from a buffer, or harden masks;
# dropout drops others in each batch
EXACT = [name for name in ISOLATED if name in (*ONCE, *QUICK) and not name.startswith("dropout")]
STEPS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.release) for name in EXACT]


def change_in_an_epoch(name, folder, batch_size, **settings):
    """The change by plain gradient descent on 18 images: the negative gradient, if one batch holds them all."""
    torch.manual_seed(0)
    backbone, pieces = METHODS[name]()
    for piece in pieces:
        piece.learning_rate = None
    module = TILModule(backbone, pieces, optimizer=lambda p: torch.optim.SGD(p, lr=1.0), head="sgd")
    data = SequentialTaskDataModule([TaskConfig("first", str(folder), flip=False)], 32, batch_size=batch_size)
    change = Change()
    fit(module, data, max_epochs=1, callbacks=[change], **settings)
    return change.values


@pytest.mark.parametrize("name", STEPS)
def test_accumulated_half_batches_equal_a_whole_one_and_clipping_bounds_the_step(name, image_folder):
    folder = image_folder("first", 3)
    whole = change_in_an_epoch(name, folder, 16)
    halves = change_in_an_epoch(name, folder, 8, accumulate_grad_batches=2)
    norm = torch.stack([value.norm() for value in whole.values()]).norm()
    clipped = change_in_an_epoch(name, folder, 16, gradient_clip_val=float(norm) / 4)
    assert norm > 1e-3
    for key, value in whole.items():
        assert torch.allclose(halves[key], value, atol=1e-5 * float(norm)), key
        assert torch.allclose(clipped[key], value / 4, atol=1e-5 * float(norm)), key


@pytest.mark.release
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_trains_in_fp16_with_scaled_gradients_that_may_overflow(module, device, two_tasks):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    if device == "cpu" and module.backbone_config is RESNET:
        pytest.skip("convolutions in fp16 take minutes on a CPU")
    module.head_kind = "sgd"  # so that the probe is trained, too
    # so that the first steps overflow, whatever the method, and the scale soon falls to one with which they do not
    scaler = torch.amp.GradScaler(device, init_scale=2.0**40, backoff_factor=2.0**-4)
    change = Change()
    settings = {"accelerator": "gpu", "devices": 1} if device == "cuda" else {}
    precision = MixedPrecision("16-mixed", device, scaler)
    patch = fit(module, two_tasks, max_epochs=4, plugins=[precision], callbacks=[change], **settings)
    assert scaler.get_scale() < 2.0**40
    assert any(value.count_nonzero() for value in change.values.values())
    states = [patch.head, *patch.pieces, *module.shared_state().pieces]
    assert all(t.isfinite().all() for state in states for t in state.values())


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


def begun(module, distance):
    """What a module trains in a task that has begun, moved at random."""
    module.build(32)
    module.begin_task("first", ["a", "b"])
    trained = [p for piece in module.pieces for p in piece.parameters.values()]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(distance * torch.randn_like(parameter))
    return trained


BY_OUTPUTS = {
    *("melo", "lora-r2", "lora-shared", "rounded-lora", "rounded-lora-shared", "one-bit-lora"),
    *("spectral", "chosen", "loraxs", "tinylora"),
    *("recast+melo", "recast+spectral", "recast+chosen"),  # on attention, where RECAST is not
}
"""Methods that train through the outputs of their layers."""


def test_changes_of_outputs_train_as_changes_of_weights_do(module, request):
    trained = begun(module, 0.05)
    images = torch.rand(2, 3, 32, 32)
    backbone, _ = module.current()
    backbone.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_()
    features = [backbone.eval()(images)]
    changes = OutputChanges(backbone)
    name = request.node.callspec.params["module"]
    assert bool(changes.chains) == (name.rpartition("-")[0] in BY_OUTPUTS)
    with changes.apply():
        features.append(backbone(images))
    torch.testing.assert_close(*features, atol=1e-5, rtol=1e-5)
    if trained:
        gradients = [torch.autograd.grad(f.square().sum(), trained, materialize_grads=True) for f in features]
        torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.release
@pytest.mark.parametrize("name", ONCE)
def test_compiles_into_one_graph(name):
    backbone, *others = METHODS[name]()
    if backbone is VIT:
        backbone = BackboneConfig(VIT.name, VIT.weights, TINY_VIT | {"depth": 6})  # each block takes its time
    module = TILModule(backbone, *others)
    torch._dynamo.reset()  # or graphs of the module before would be taken for those of this one
    images = torch.rand(2, 3, 32, 32)
    trained = begun(module, 0.01)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(images), module(images), atol=1e-5)
    parameters = [*trained, *module.head.parameters()]
    gradients = [torch.autograd.grad(f(images).sum(), parameters, allow_unused=True) for f in (compiled, module)]
    for ours, plain in zip(*gradients, strict=True):
        assert (ours is None and plain is None) or torch.allclose(ours, plain, atol=1e-4)
