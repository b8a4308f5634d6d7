"""Each test fails when a library changes a private part that the package uses."""

import copy
import signal
import socket
import threading
import time
from contextlib import nullcontext

import lightning as L
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import TINY_VIT
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, SequentialLR, StepLR

from recast_pl.compat.lightning import ignore_signals
from recast_pl.compat.timm import refuse_missing_weights
from recast_pl.compat.torch import convolve, fixed_weights, has_forward_hooks
from recast_pl.errors import RunError
from recast_pl.learning.checkpoint import change_rates


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.fixture
def layer():
    layer = nn.Linear(3, 2)
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def in_another_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_fixed_weights_replace_generated_ones_until_the_context_ends(layer):
    chain, generated, fixed = layer.parametrizations.weight, layer.weight.clone(), torch.ones(2, 3)
    with fixed_weights({chain: fixed}):
        assert layer.weight is fixed
        with fixed_weights({chain: 2 * fixed}):
            assert torch.equal(layer.weight, 2 * fixed)
        assert layer.weight is fixed
    with pytest.raises(ZeroDivisionError), fixed_weights({chain: fixed}):
        raise ZeroDivisionError
    assert torch.equal(layer.weight, generated)
    assert "forward" not in vars(chain)


def test_fixed_weights_are_for_one_thread_and_one_module(layer):
    generated, fixed = layer.weight.clone(), torch.ones(2, 3)
    with fixed_weights({layer.parametrizations.weight: fixed}):
        assert torch.equal(in_another_thread(lambda: layer.weight), generated)
        duplicate = copy.deepcopy(layer)
        assert torch.equal(duplicate.weight, generated)
    with torch.no_grad():
        duplicate.parametrizations.weight.original.zero_()
    assert not duplicate.weight.any()


def test_fixed_weights_of_threads_that_overlap_do_not_outlive_them(layer):
    chain = layer.parametrizations.weight
    other_entered, own_left = threading.Event(), threading.Event()

    def other():
        with fixed_weights({chain: torch.ones(2, 3)}):
            other_entered.set()
            assert own_left.wait(30)

    with fixed_weights({chain: torch.zeros(2, 3)}):
        thread = threading.Thread(target=other)
        thread.start()
        assert other_entered.wait(30)
        assert not layer.weight.any()
    own_left.set()
    thread.join()
    assert torch.equal(layer.weight, 2 * chain.original)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("settings", [{}, {"with_kwargs": True}])
def test_hooks_are_found(register, settings):
    module = nn.Identity()
    assert not has_forward_hooks(module)
    handle = getattr(module, register)(lambda *_: None, **settings)
    assert has_forward_hooks(module)
    handle.remove()
    assert not has_forward_hooks(module)


def test_a_convolution_with_another_weight_keeps_the_settings_of_the_layer():
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, padding_mode="circular")
    images, weight = torch.rand(2, 4, 9, 9), torch.rand(6, 2, 3, 3)
    padded = F.pad(images, (1, 1, 1, 1), mode="circular")
    torch.testing.assert_close(convolve(layer, images, weight), F.conv2d(padded, weight, None, 2, 0, 2, 2))


SCHEDULES = {
    "step": lambda o: StepLR(o, 3, 0.1),
    "cosine": lambda o: CosineAnnealingLR(o, 8),
    "lambda": lambda o: LambdaLR(o, lambda epoch: 0.9**epoch),
    "warm-up": lambda o: SequentialLR(o, [LinearLR(o), LambdaLR(o, lambda epoch: 0.9**epoch)], [5]),
}


def start(rates, schedule):
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "lr": r, "name": "a"} for r in rates])
    return optimizer, schedule(optimizer)


def rates_of(optimizer, schedule, epochs):
    found = []
    for _ in range(epochs):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_task_resumed_with_other_rates_follows_their_schedule(name):
    expected = rates_of(*start([0.5, 0.1, 0.0], SCHEDULES[name]), 8)
    optimizer, schedule = start([0.2, 0.1, 0.0], SCHEDULES[name])
    rates_of(optimizer, schedule, 4)
    states = {"optimizer_states": [optimizer.state_dict()], "lr_schedulers": [schedule.state_dict()]}
    checkpoint = copy.deepcopy(states)
    optimizer, schedule = start([0.5, 0.1, 0.0], SCHEDULES[name])
    change_rates(checkpoint, optimizer)
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    schedule.load_state_dict(checkpoint["lr_schedulers"][0])
    found = rates_of(optimizer, schedule, 4)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected[4:]))


def test_a_rate_of_0_cannot_be_changed_in_the_middle_of_its_schedule():
    optimizer, schedule = start([0.0], SCHEDULES["step"])
    checkpoint = {"optimizer_states": [optimizer.state_dict()], "lr_schedulers": [schedule.state_dict()]}
    with pytest.raises(RunError, match="the learning rate of a was 0 so far; keep it at 0"):
        change_rates(checkpoint, start([0.1], SCHEDULES["step"])[0])


class OneStep(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def training_step(self, batch):
        self.handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("slurm", [False, True])
def test_a_trainer_leaves_signals_alone(slurm, monkeypatch):
    if slurm:
        for name in ("SLURM_NTASKS", "SLURM_JOB_ID", "SLURM_JOB_NAME"):
            monkeypatch.setenv(name, "1")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer, module = L.Trainer(**quiet, max_epochs=1, accelerator="cpu", enable_model_summary=False), OneStep()
    ignore_signals(trainer)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    trainer.fit(module, torch.utils.data.DataLoader([0]))
    assert module.handlers == before


@pytest.mark.parametrize("removed", [[], ["blocks.3.mlp.fc1.weight"]])
def test_weights_that_timm_leaves_at_random_are_noticed(removed, tmp_path):
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY_VIT).state_dict()
    save_file({name: tensor for name, tensor in state.items() if name not in removed}, tmp_path / "vit.safetensors")
    overlay = {"file": str(tmp_path / "vit.safetensors")}
    settings = {"pretrained": True, "pretrained_cfg_overlay": overlay, "num_classes": 0, **TINY_VIT}
    refusal = pytest.raises(ValueError, match=f"Missing keys.*{removed[0]}") if removed else nullcontext()
    with refusal, refuse_missing_weights():
        timm.create_model("vit_tiny_patch16_224", **settings)


async def page(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"0" * (1 << 24 if scope["path"] == "/long" else 1)})


@pytest.mark.parametrize("request_text", ["", "GET / HTTP/1.1\r\nHost: a\r\n", "GET /long HTTP/1.1\r\nHost: a\r\n\r\n"])
def test_a_client_that_sends_or_reads_nothing_is_cut_off(request_text):
    uvicorn = pytest.importorskip("uvicorn")
    from recast_pl.compat.uvicorn import BoundedProtocol

    config = uvicorn.Config(page, http=BoundedProtocol, log_level="error", timeout_keep_alive=1, lifespan="off")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            client = socket.create_connection(listener.getsockname())
            client.sendall(request_text.encode())
            end = time.monotonic() + 30
            while not server.server_state.connections and time.monotonic() < end:
                time.sleep(0.05)
            assert server.server_state.connections
            while server.server_state.connections and time.monotonic() < end:
                time.sleep(0.05)
            assert not server.server_state.connections
            client.close()
        finally:
            server.should_exit = True
            thread.join()
