"""Computes the same results with less work.

It skips unused tokens, generates weights once for each evaluation, and trains small changes of frozen weights through
the outputs of their layers.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Callback, Trainer
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from recast_pl.compat.torch import fixed_weights, has_forward_hooks
from recast_pl.decomposition.bank import TemplateBank
from recast_pl.decomposition.parametrization import Inputs, Mixture, multiplies_only
from recast_pl.methods.adaptation import Adaptation
from recast_pl.rules import ImageSize, height_and_width

_TOKENWISE = ("attn.proj", "mlp")
"""The modules in a block of timm's or torchvision's vision transformers that transform each token independently."""


def skip_unread_tokens(network: nn.Module, image_size: ImageSize) -> None:
    """Makes the last block of a vision transformer transform only the leading tokens that the features depend on.

    If the features are read from the class token, they do not depend on what the last block does to the other tokens
    after its attention; this is a sixteenth of the work of a training step of ViT-S. Which tokens count is measured,
    not derived from the kind of pooling. The network stays as it is if all tokens count, if none of its blocks has
    such modules, or if it has hooks already, because a piece's hook must not see the zeros of skipped tokens.

    Args:
        network: Maps images (B, 3, S, S) to features (B, D); the pieces are attached.
        image_size: Height and width of the images.
    """
    if any(has_forward_hooks(module) for module in network.modules()):
        return
    for module in _last_tokenwise(network):
        counts = _count_read_tokens(network, module, image_size)
        if counts is not None and counts[0] < counts[1]:
            _narrow(module, *counts)


class MergedWeights:
    """Generates all weights of a network once, for many batches of evaluation.

    The weights are written into memory that is kept from task to task, because allocating it again would take several
    times as long as filling it.
    """

    def __init__(self) -> None:
        self._memory: dict[nn.Module, Tensor] = {}

    @contextmanager
    def of(self, network: nn.Module) -> Iterator[None]:
        """A context in which the current thread uses a network's weights as they are now, without gradients."""
        with torch.no_grad():
            weights = self._generate(network)
        with fixed_weights(weights):
            yield

    def free(self) -> None:
        """Releases the memory."""
        self._memory.clear()

    def _generate(self, network: nn.Module) -> dict[ParametrizationList, Tensor]:
        weights: dict[ParametrizationList, Tensor] = {}
        mixed: dict[TemplateBank, dict[ParametrizationList, Tensor]] = {}
        for module in network.modules():
            if not isinstance(module, ParametrizationList):
                continue
            first, coefficients = module[0], getattr(module, "original0", None)
            if len(module) == 1 and isinstance(first, Mixture) and isinstance(coefficients, Tensor):
                mixed.setdefault(first.bank, {})[module] = coefficients
            else:
                weight = module()
                weights[module] = self._allocate(module, weight.shape, weight).copy_(weight)
        for bank, layers in mixed.items():  # all layers of a bank together, so that its templates are read only once
            memory = self._allocate(bank, (len(layers), *bank.templates.shape[1:]), bank.templates)  # (L, *shape)
            bank.mix(torch.stack(list(layers.values())), out=memory)
            weights.update(zip(layers, memory, strict=True))
        return weights

    def _allocate(self, owner: nn.Module, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """The owner's memory (*shape), with the type and device of `like`."""
        memory = self._memory.get(owner)
        if memory is None or (memory.shape, memory.dtype, memory.device) != (shape, like.dtype, like.device):
            with torch.inference_mode(mode=False):  # tensors of the inference mode cannot be written to outside of it
                memory = self._memory[owner] = torch.empty(shape, dtype=like.dtype, device=like.device)
        return memory


class OutputChanges:
    """Adds small changes of frozen weights to the outputs of their layers, in training.

    The weight of such a layer needs no gradient then, which is a third of the work of its training step.

    Args:
        network: The network; the pieces are attached.
    """

    def __init__(self, network: nn.Module) -> None:
        self.chains: dict[nn.Module, Any] = {}
        """The parametrizations of the weight, by layer."""
        for module in network.modules():
            if multiplies_only(module) and parametrize.is_parametrized(module, "weight"):
                chain: Any = module.parametrizations["weight"]  # type: ignore[index]
                if all(isinstance(p, Adaptation) and p.has_product and p.trains_by_products for p in chain):
                    self.chains[module] = chain

    @contextmanager
    def apply(self) -> Iterator[None]:
        """A context in which the current thread trains so."""
        chains = {module: chain for module, chain in self.chains.items() if not chain.original.requires_grad}
        thread = threading.get_ident()

        def add(module: Any, args: Any, output: Tensor) -> Tensor | None:
            if threading.get_ident() != thread:
                return None
            inputs = Inputs(module, args[0])
            y = inputs.products(output)
            for change in chains[module]:
                change.product(inputs, y)
            return inputs.output(y)

        with ExitStack() as stack:
            stack.enter_context(fixed_weights({chain: chain.original for chain in chains.values()}))
            for module in chains:
                stack.enter_context(module.register_forward_hook(add, prepend=True))
            yield


class EvaluateMerged(Callback):
    """Generates the weights once for each validation and each test; tells a test how to classify images."""

    def __init__(self) -> None:
        self._context = ExitStack()

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Generates the weights as a patch would hold them, until validation ends."""
        for piece in pl_module.pieces:
            piece.begin_validation()
            self._context.callback(piece.end_validation)
        self._context.enter_context(pl_module.merged())

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Sets `answer` of the module."""
        pl_module.answer = self._context.enter_context(pl_module.testing())()

    def _release(self, trainer: Trainer, pl_module: Any, exception: BaseException | None = None) -> None:
        self._context.close()
        pl_module.answer = None
        if trainer.state.fn == "fit":
            pl_module.merged_weights.free()  # training needs the memory more

    on_validation_end = on_test_end = _release
    on_exception = _release  # later training in this process must not use these weights


def _last_tokenwise(network: nn.Module) -> list[nn.Module]:
    """The tokenwise modules of the last block; empty if there are no blocks with an `mlp`."""
    modules = dict(network.named_modules())
    blocks = [name.removesuffix(".mlp") for name in modules if name.endswith(".mlp")]
    return [modules[name] for part in _TOKENWISE if (name := f"{blocks[-1]}.{part}") in modules] if blocks else []


@torch.enable_grad()
def _count_read_tokens(network: nn.Module, module: nn.Module, image_size: ImageSize) -> tuple[int, int] | None:
    """Measures how many leading tokens of a module's output (B, N, D) the features depend on.

    Returns:
        The position after the last token with a gradient, and N; None if the module's output has another shape, or if
        the features depend on no token, or on other tokens than the gradient shows (as a maximum over tokens does).
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, *height_and_width(image_size), generator=generator).to(next(network.parameters()))
    outputs: list[Tensor | None] = []

    def track(_: nn.Module, __: Any, output: Any) -> Any:
        tokens = isinstance(output, Tensor) and output.ndim == 3
        outputs.append(output.detach().requires_grad_() if tokens else None)
        return output if outputs[-1] is None else outputs[-1].clone()  # the network may change a clone in place

    with module.register_forward_hook(track):
        features = network(image)
    if len(outputs) != 1 or outputs[0] is None or not features.requires_grad:
        return None
    weights = torch.rand(features.shape, generator=generator).to(features)  # the plain sum of normed features is flat
    (gradient,) = torch.autograd.grad((features * weights).sum(), outputs[0], allow_unused=True)  # (1, N, D)
    if gradient is None or not gradient.any():
        return None
    read = int(gradient[0].any(1).nonzero().max()) + 1
    noise = 1e3 * torch.randn(gradient.shape, generator=generator).to(gradient)
    with module.register_forward_hook(lambda _, __, output: torch.cat([output[:, :read], noise[:, read:]], 1)):
        unchanged = torch.equal(network(image), features)
    return (read, gradient.shape[1]) if unchanged else None


def _narrow(module: nn.Module, read: int, total: int) -> None:
    """Makes a module transform only the first `read` of `total` tokens; the others of its output are zeros."""

    def narrow(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0][:, :read],) if inputs[0].shape[1] == total else inputs  # (B, N, D) to (B, read, D)

    def widen(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return F.pad(output, (0, 0, 0, total - read)) if output.shape[1] == read else output  # to (B, N, D)

    module.register_forward_pre_hook(narrow)
    module.register_forward_hook(widen)
