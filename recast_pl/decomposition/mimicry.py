"""Neural Mimicry: templates and coefficients fitted by gradient to the weights of a teacher (algorithm 2)."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer, RMSprop
from torch.optim.lr_scheduler import LRScheduler, StepLR
from torch.utils.data import DataLoader

from recast_pl.backbones.backbone import BackboneConfig
from recast_pl.decomposition.bank import Bank, Decomposition
from recast_pl.decomposition.sources import CoefficientSource, FreeCoefficients, FreeTemplates, TemplateSource
from recast_pl.decomposition.targets import (
    BankLayout,
    Group,
    check_least,
    check_values,
    compiled,
    find_targets,
    group_targets,
)
from recast_pl.errors import DecompositionError

_LOSSES: dict[str, Callable[..., Tensor]] = {"smooth_l1": F.smooth_l1_loss, "mse": F.mse_loss}

_BLOCK = 1 << 17  # columns to differentiate at a time, so that they stay in the processor's cache


def _factor(scale: float | dict[str, float], group: Group) -> float:
    """The factor of the loss of a group; raises DecompositionError if no pattern is found in all names."""
    if isinstance(scale, float | int):
        return scale
    for pattern, factor in scale.items():
        if all(map(compiled(pattern, "loss_scale").search, group.targets)):
            return factor
    raise DecompositionError(
        f"loss_scale has no pattern for all weights of group {group.name} (such as {group.targets[0]}), only "
        f"{', '.join(map(repr, scale)) or 'none'}; add one"
    )


class MimicryModule(LightningModule):
    """Fits template banks and coefficients to the weights of a pretrained network (equation 3).

    Train it with a plain `Trainer.fit(module)`. An epoch is one update of every group, since there is no data. The
    groups are independent problems with an optimizer each, so that only the gradients of one group at a time are in
    memory. This is the paper's way; the closed form (`recast_pl.decompose`) is exact and faster.

    Three defaults differ from the paper, whose rate of 0.1 moves every entry of a template by 1.0 in the first steps:
    RMSprop divides each gradient by its running size, which is biased towards 0 at first. The coefficients of a group
    then become almost linearly dependent, and stay so. `configs/mimicry/published.yaml` restores the paper's values.

    Args:
        backbone: The teacher.
        layout: Which of its weights to fit, and how they share templates.
        image_size: Height and width in pixels for which to build the teacher; the weights do not depend on it.
        source: Creates the source of a group's templates from its weights (L, *shape) and n: `FreeTemplates` or
            `TemplateAutoencoder`.
        coefficient_source: Creates the source of a group's coefficients from its weights (L, *shape) and initial
            coefficients (L, K, n): `FreeCoefficients` or `CoefficientEncoder`.
        loss: `smooth_l1` or `mse`. Weights are far below 1, where the first is half the second.
        loss_scale: Factor of the loss, which is a mean over the entries of a weight, summed over layers. One number, or
            a number for each regular expression: a group takes that of the first one found in all names of its weights.
            RMSprop divides a gradient by its size, so a factor matters only if it decides whether gradients are
            clipped, or if they are as small as RMSprop's `eps`.
        noise_std: σ of the Gaussian noise added to the coefficients in training only; 0 for none.
        gradient_clip: Largest norm of the gradient of a group; 0 for no limit.
        start: Initial values of free coefficients. `across_layers`: the L×n matrix of a group has orthonormal columns,
            the same for all K sets. `per_layer`: the K×n matrix of each layer is orthogonal, as in the paper.
        weight_scale: Root mean square that the weights of a group are scaled to for the fit, so that one learning rate
            suits weights of any size; 0.015 is that of a ViT-S. None to fit them as they are, as in the paper.
        coefficient_rate: Learning rate of the coefficients, in learning rates of the templates; 1 in the paper.
        optimizer: Creates an optimizer from parameter groups.
        lr_scheduler: Creates a schedule, stepped at every epoch, from an optimizer.
        similarity_every: Log the weight cosines every so many epochs, and after the last.

    Raises:
        DecompositionError: If a setting is out of range; when training starts, if the layout does not fit the teacher
            or sets `basis`, which is a choice of the closed form.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        layout: BankLayout,
        image_size: int = 224,
        source: Callable[[Tensor, int], TemplateSource] = FreeTemplates,
        coefficient_source: Callable[[Tensor, Tensor], CoefficientSource] = FreeCoefficients,
        loss: Literal["smooth_l1", "mse"] = "smooth_l1",
        loss_scale: float | dict[str, float] = 2.0,
        noise_std: float = 1e-4,
        gradient_clip: float = 1.0,
        start: Literal["across_layers", "per_layer"] = "across_layers",
        weight_scale: float | None = 0.015,
        coefficient_rate: float = 0.1,
        optimizer: Callable[[Iterable[Any]], Optimizer] = lambda p: RMSprop(p, lr=0.02),
        lr_scheduler: Callable[[Optimizer], LRScheduler] = lambda o: StepLR(o, step_size=25, gamma=0.1),
        similarity_every: int = 10,
    ) -> None:
        super().__init__()
        if loss not in _LOSSES:
            raise DecompositionError(f"loss={loss!r} is unknown; choose one of {', '.join(_LOSSES)}")
        if start not in ("across_layers", "per_layer"):
            raise DecompositionError(f"start={start!r} is unknown; choose across_layers or per_layer")
        if weight_scale is not None and not weight_scale > 0:
            raise DecompositionError(f"weight_scale={weight_scale} must be above 0; leave it out for the default")
        check_least(0, noise_std=noise_std, gradient_clip=gradient_clip)
        check_least(1, similarity_every=similarity_every)
        self.backbone, self.layout, self.image_size = backbone, layout, image_size
        self.source, self.coefficient_source = source, coefficient_source
        self.loss, self.loss_scale, self.noise_std = _LOSSES[loss], loss_scale, noise_std
        self.loss_scales: list[float] = []  # of each group
        self.start, self.weight_scale, self.coefficient_rate = start, weight_scale, coefficient_rate
        self.gradient_clip, self.similarity_every = gradient_clip, similarity_every
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.automatic_optimization = False
        self.groups: list[Group] = []
        self._scratch = torch.empty(0)  # memory for the gradient of the templates, one group at a time
        self.scales: list[float] = []  # of each group: what its weights are multiplied by
        self.teacher = nn.ParameterList()  # (L, *shape) of each group
        self.sources, self.coefficient_sources = nn.ModuleList(), nn.ModuleList()

    def configure_model(self) -> None:
        """Loads the teacher and creates the sources of templates and coefficients."""
        if self.groups:
            return
        if self.layout.basis != "svd":
            raise DecompositionError(
                f"basis={self.layout.basis!r} is a choice of the closed form, MimicryModule fits its own templates; "
                "leave it out"
            )
        weights = find_targets(self.backbone.build(self.image_size).net, self.layout.targets)
        self.groups = group_targets({name: tuple(w.shape) for name, w in weights.items()}, self.layout)
        self.loss_scales = [_factor(self.loss_scale, group) for group in self.groups]
        for group in self.groups:
            check_values({name: weights[name] for name in group.targets})
            dense = torch.stack([weights[name].detach() for name in group.targets])  # (L, *shape)
            scale = 1.0 if self.weight_scale is None else self.weight_scale / dense.square().mean().sqrt().item()
            self.scales.append(scale)
            dense *= scale
            self.teacher.append(nn.Parameter(dense, requires_grad=False))
            self.sources.append(self.source(dense, group.templates))
            self.coefficient_sources.append(self.coefficient_source(dense, self._start_coefficients(group)))

    def _start_coefficients(self, group: Group) -> Tensor:
        """Initial coefficients (L, K, n) of a group."""
        sets = self.layout.coefficient_sets
        if self.start == "across_layers":
            matrix = nn.init.orthogonal_(torch.empty(len(group.targets), group.templates))
            return matrix[:, None].repeat(1, sets, 1)
        return torch.stack([nn.init.orthogonal_(torch.empty(sets, group.templates)) for _ in group.targets])

    def configure_optimizers(self) -> Any:
        """Creates one optimizer and one schedule for each group; the coefficients have their own learning rate."""
        optimizers = [self.optimizer(self._parameter_groups(i)) for i in range(len(self.groups))]
        for optimizer in optimizers:
            optimizer.param_groups[1]["lr"] *= self.coefficient_rate
        return optimizers, [self.lr_scheduler(o) for o in optimizers]

    def _parameter_groups(self, index: int) -> list[dict[str, Any]]:
        sources = (self.sources[index], self.coefficient_sources[index])
        return [{"params": list(source.parameters())} for source in sources]

    def train_dataloader(self) -> DataLoader[int]:
        """One dummy batch per epoch: the weights are the data."""
        return DataLoader(range(1))  # type: ignore[arg-type]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """Updates every group once."""
        optimizers = self.optimizers()
        total = torch.zeros((), device=self.device)
        for i, optimizer in enumerate(optimizers if isinstance(optimizers, list) else [optimizers]):
            total += self.set_gradients(i)
            self.limit_gradients(i)
            optimizer.step()
            optimizer.zero_grad()
        self.log("mimicry/loss", total, on_step=False, on_epoch=True, prog_bar=True)

    def on_train_epoch_end(self) -> None:
        """Steps the schedules and logs the weight cosines when they are due."""
        schedulers = self.lr_schedulers()
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            scheduler.step()  # type: ignore[union-attr]
        self.log("mimicry/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        if self.current_epoch % self.similarity_every and self.current_epoch + 1 != self.trainer.max_epochs:
            return
        cosines = self.weight_cosines()
        self.log("mimicry/weight_cosine", sum(cosines.values()) / len(cosines), prog_bar=True)
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                tagged = {f"weight_cosine/{name}": value for name, value in cosines.items()}
                logger.log_metrics(tagged, step=self.current_epoch)

    @property
    def templates(self) -> list[Tensor]:
        """The current templates (n, *shape) of each group."""
        return [source(dense) for source, dense in zip(self.sources, self.teacher, strict=True)]

    @property
    def coefficients(self) -> list[Tensor]:
        """The current coefficients (L, K, n) of each group."""
        return [source(dense) for source, dense in zip(self.coefficient_sources, self.teacher, strict=True)]

    @torch.no_grad()
    def decomposition(self) -> Decomposition:
        """The current templates and coefficients; raises DecompositionError if the module has not been trained."""
        if not self.groups:
            raise DecompositionError("MimicryModule holds no templates yet; call Trainer.fit(module) first")
        parts = zip(self.groups, self.templates, self.scales, self.coefficients, strict=True)
        banks = tuple(Bank(g, t.detach().cpu() / s, c.detach().cpu()) for g, t, s, c in parts)
        return Decomposition(banks).rounded(self.layout.precision)

    @torch.no_grad()
    def weight_cosines(self) -> dict[str, float]:
        """Cosine similarity of each generated weight to the teacher's, by the name of the weight."""
        result: dict[str, float] = {}
        parts = zip(self.groups, self.teacher, self.templates, self.coefficients, strict=True)
        for group, teacher, templates, coefficients in parts:
            weights = coefficients.mean(1) @ templates.flatten(1)  # (L, D)
            # single precision may exceed 1, and not every device has double
            found = F.cosine_similarity(weights.cpu().double(), teacher.flatten(1).cpu().double(), dim=1)
            result |= dict(zip(group.targets, found.tolist(), strict=True))
        return result

    def set_gradients(self, index: int) -> Tensor:
        """Computes the gradients of the group at a position by hand, so that no dense weight is ever held complete.

        Returns:
            The group's term of equation 3 plus the source's own term of the loss, a scalar.
        """
        source, dense = self.sources[index], self.teacher[index]
        assert isinstance(source, TemplateSource)  # the type checker forgets this
        coefficients = self.coefficient_sources[index](dense)  # (L, K, n)
        noise = self.noise_std * torch.randn_like(coefficients)
        mixed = (coefficients + noise).mean(1)  # (L, n): equation 2, with the noise of equation 3
        templates, term = source.draw(dense)  # (n, *shape)
        if self._scratch.numel() < templates.numel() or self._scratch.device != templates.device:
            self._scratch = torch.empty_like(templates).flatten()
        gradient = self._scratch[: templates.numel()].view_as(templates)
        factor = self.loss_scales[index]
        loss, mixed_gradient = self._differentiate(mixed.detach(), templates.detach(), dense, gradient, factor)
        mixed.backward(mixed_gradient)
        source.receive(templates, term, gradient)
        return loss + term.detach()

    def _differentiate(
        self, mixed: Tensor, templates: Tensor, dense: Tensor, gradient: Tensor, factor: float
    ) -> tuple[Tensor, Tensor]:
        """Computes the loss of a group and the gradient of its coefficients (L, n), block by block of columns.

        It writes the gradient of the templates (n, *shape) to `gradient`.
        """
        flat, teacher, flat_gradient = templates.flatten(1), dense.flatten(1), gradient.flatten(1)
        total, mixed_gradient = torch.zeros((), device=mixed.device), torch.zeros_like(mixed)
        for start in range(0, flat.shape[1], _BLOCK):
            columns = slice(start, start + _BLOCK)
            weights = (mixed @ flat[:, columns]).requires_grad_()  # (L, columns)
            loss = self.loss(weights, teacher[:, columns], reduction="sum") * (factor / flat.shape[1])
            (slope,) = torch.autograd.grad(loss, weights)
            torch.mm(mixed.T, slope, out=flat_gradient[:, columns])
            mixed_gradient += slope @ flat[:, columns].T
            total += loss.detach()
        return total, mixed_gradient

    def limit_gradients(self, index: int) -> None:
        """Scales the gradients of a group down to `gradient_clip`. Gradients below it are read only once."""
        trained = self._trained(index)
        norm = get_total_norm([p.grad for p in trained if p.grad is not None])
        if 0 < self.gradient_clip < norm:
            clip_grads_with_norm_(trained, self.gradient_clip, norm)

    def _trained(self, index: int) -> list[nn.Parameter]:
        return [*self.sources[index].parameters(), *self.coefficient_sources[index].parameters()]
