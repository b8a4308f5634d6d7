"""Uses of PyTorch beyond its documented interface."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList


@contextmanager
def fixed_weights(weights: Mapping[ParametrizationList, Tensor]) -> Iterator[None]:
    """A context in which parametrizations return given weights (*shape), but in the current thread only.

    `torch.nn.utils.parametrize.cached` is not used because its cache serves all threads: a thread that trains would
    read weights that it cached at an earlier step as soon as another thread enters the context.

    PyTorch 2.11 to 2.15 get a parametrized weight by calling its `ParametrizationList`.
    """
    fixed, thread = dict(weights), threading.get_ident()

    def forward(parametrization: ParametrizationList, generate: Callable[[], Tensor]) -> Tensor:
        here = threading.get_ident() == thread
        return fixed[parametrization] if here and parametrization in fixed else generate()

    with ExitStack() as stack:
        stack.callback(fixed.clear)  # another thread may have kept this `forward` as its own fallback
        for parametrization in fixed:
            generate = partial(forward, parametrization, parametrization.forward)
            stack.enter_context(replaced_forward(parametrization, generate))
        yield


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A context in which a module computes something else, within its hooks.

    PyTorch 2.11 to 2.15 call the `forward` of the instance.
    """
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether hooks run before or after the forward pass of a module.

    PyTorch 2.11 to 2.15 keep them in `_forward_pre_hooks` and `_forward_hooks`, and have no public way to list them.
    """
    return bool(module._forward_hooks or module._forward_pre_hooks)


def convolve(layer: nn.Conv2d, images: Tensor, weight: Tensor) -> Tensor:
    """Convolves images as a layer does, with its padding and stride, but with another weight and without its bias.

    `nn.Conv2d._conv_forward` of PyTorch 2.11 to 2.15 takes the weight and the bias as arguments.

    Args:
        layer: The layer.
        images: (B, C, H, W).
        weight: (M, C, kH, kW).

    Returns:
        (B, M, H', W').
    """
    output: Tensor = layer._conv_forward(images, weight, None)
    return output


def scale_schedule(state: dict[str, Any], group: int, factor: float) -> None:
    """Scales the learning rates of the parameter group at an index, in the `state_dict` of a schedule.

    The schedules of PyTorch 2.11 to 2.15 keep one rate for each group in `base_lrs` and `_last_lr`; `SequentialLR` and
    `ChainedScheduler` keep the states of their parts in `_schedulers`.
    """
    for key in state.keys() & {"base_lrs", "_last_lr"}:  # new lists, because parts may share theirs
        state[key] = [rate * factor if index == group else rate for index, rate in enumerate(state[key])]
    for part in state.get("_schedulers", ()):
        scale_schedule(part, group, factor)
