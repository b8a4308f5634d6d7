"""The same network for less work: what features do not read, or what is known already, is not computed."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Callback, Trainer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from recast_pl.decomposition.bank import TemplateBank
from recast_pl.decomposition.parametrization import Mixture

_ROWWISE = ("attn.proj", "mlp")
"""What transforms each token by itself in a block of timm's or torchvision's vision transformers."""


def skip_unread_tokens(network: nn.Module, image_size: int) -> None:
    """Lets the last block of a vision transformer transform only the leading tokens that its features depend on.

    Features that are read from the class token alone do not depend on what the last block does to the other tokens
    after its attention: a sixteenth of the work of a training step of ViT-S. Which tokens count is not guessed from
    the kind of pooling, but taken from the gradient. Nothing happens where every token counts, where there are no
    such blocks, or where a piece listens in with hooks, since the tokens left out come out as zeros.

    Args:
        network: From images (B, 3, S, S) to features (B, D), its pieces attached.
        image_size: S.
    """
    if any(module._forward_hooks or module._forward_pre_hooks for module in network.modules()):
        return
    for module in _last_rowwise(network):
        read = _tokens_read(network, module, image_size)
        if read is not None and read[0] < read[1]:
            _narrow(module, *read)


class MergedWeights:
    """Generates weights once, for many batches of evaluation, into memory that is kept for the next task.

    Fresh memory would cost several times what filling it does.
    """

    def __init__(self) -> None:
        self._memory: dict[int, Tensor] = {}

    @contextmanager
    def of(self, network: nn.Module) -> Iterator[None]:
        """Within it, weights are as they are at its begin, and nothing can be trained.

        Args:
            network: With generated weights.
        """
        with parametrize.cached():
            with torch.no_grad():
                self._fill(network)
            yield

    def free(self) -> None:
        """Gives the memory back."""
        self._memory.clear()

    def _fill(self, network: nn.Module) -> None:
        mixed: dict[TemplateBank, dict[tuple[int, str], Tensor]] = {}
        for module in network.modules():
            for name, chain in getattr(module, "parametrizations", {}).items():
                key, first = (id(module), name), chain[0]
                if len(chain) == 1 and isinstance(first, Mixture):
                    mixed.setdefault(first.bank, {})[key] = chain.original0
                else:
                    weight = getattr(module, name)
                    parametrize._cache[key] = self._room(id(chain), weight, weight.shape).copy_(weight)
        for bank, layers in mixed.items():  # together, so that templates are read once for all layers of a group
            weights = self._room(id(bank), bank.templates, (len(layers), *bank.templates.shape[1:]))  # (L, *shape)
            bank.mix(torch.stack(list(layers.values())), out=weights)
            parametrize._cache.update(zip(layers, weights, strict=True))

    def _room(self, key: int, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        memory = self._memory.get(key)
        if memory is None or memory.device != like.device:
            with torch.inference_mode(mode=False):  # or it could not be written to outside of inference
                memory = self._memory[key] = torch.empty(shape, dtype=like.dtype, device=like.device)
        return memory


class EvaluateMerged(Callback):
    """Evaluates and predicts on merged weights."""

    def __init__(self) -> None:
        self._open = ExitStack()

    def _merge(self, trainer: Trainer, pl_module: Any) -> None:
        self._open.enter_context(pl_module.merged())

    def _release(self, trainer: Trainer, pl_module: Any, exception: BaseException | None = None) -> None:
        self._open.close()
        if trainer.state.fn == "fit":
            pl_module.merged_weights.free()  # training has better use for it

    on_validation_start = on_test_start = on_predict_start = _merge
    on_validation_end = on_test_end = on_predict_end = _release
    on_exception = _release  # or training in the same process would go on with these weights


def _last_rowwise(network: nn.Module) -> list[nn.Module]:
    """The row-wise modules of the last block."""
    modules = dict(network.named_modules())
    blocks = [name.removesuffix(".mlp") for name in modules if name.endswith(".mlp")]
    return [modules[name] for part in _ROWWISE if (name := f"{blocks[-1]}.{part}") in modules] if blocks else []


def _tokens_read(network: nn.Module, module: nn.Module, image_size: int) -> tuple[int, int] | None:
    """How many leading tokens of a module's output count for the features, and how many there are."""
    kept: list[Tensor] = []

    def watch(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    handle = module.register_forward_hook(watch)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        features = network(torch.rand(1, 3, image_size, image_size, generator=generator).to(next(network.parameters())))
        handle.remove()
        if len(kept) != 1 or kept[0].ndim != 3:
            return None
        weights = torch.rand(features.shape, generator=generator).to(features)  # a plain sum of normed features is flat
        (gradient,) = torch.autograd.grad((features * weights).sum(), kept)  # (1, N, D)
    read = gradient[0].any(1).nonzero()
    return int(read.max()) + 1, gradient.shape[1]


def _narrow(module: nn.Module, read: int, total: int) -> None:
    def narrow(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0][:, :read],) if inputs[0].shape[1] == total else inputs  # (B, N, D) to (B, read, D)

    def widen(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return F.pad(output, (0, 0, 0, total - read)) if output.shape[1] == read else output  # to (B, N, D)

    module.register_forward_pre_hook(narrow)
    module.register_forward_hook(widen)
