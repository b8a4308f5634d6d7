"""Neural Mimicry: templates and coefficients fitted to a teacher's weights by gradient (algorithm 2)."""

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
from recast_pl.decomposition.autoencoder import FreeTemplates, TemplateSource
from recast_pl.decomposition.bank import Bank, Decomposition
from recast_pl.decomposition.targets import BankLayout, Group, find_targets, group_targets
from recast_pl.errors import DecompositionError

_LOSSES: dict[str, Callable[..., Tensor]] = {"smooth_l1": F.smooth_l1_loss, "mse": F.mse_loss}

_BLOCK = 1 << 17  # columns whose loss is differentiated at a time, so that they stay in the cache


class MimicryModule(LightningModule):
    """Fits template banks and coefficients to the weights of a pretrained network (equation 3).

    Train it with a plain `Trainer.fit(module)`: an epoch is one update of every group, since there is no data.
    The groups are independent problems, each with an optimizer of its own, so that the gradients of one at a
    time are in memory. The closed form (`recast_pl.decompose`) is better and faster; this is the paper's way.

    Args:
        backbone: The teacher.
        layout: Which of its weights, and how they share templates.
        image_size: Height and width in pixels for which the teacher is built; weights do not depend on it.
        source: Makes, from the weights (L, *shape) of a group and n, where its templates come from: `FreeTemplates`, or
            `TemplateAutoencoder`.
        loss: `smooth_l1`, or `mse`. As weights are far below 1, the first is half the second, but for the clipping.
        loss_scale: Factor of the loss, which is a mean over the numbers of a layer, summed over layers.
        noise_std: σ of the Gaussian noise added to the coefficients in training only; 0 for none.
        gradient_clip: Largest norm of a group's gradient; 0 for no limit.
        optimizer: Makes an optimizer from parameters.
        lr_scheduler: Makes a schedule, stepped at every epoch, from an optimizer.
        similarity_every: Epochs between two records of the similarity of each layer, and of all.

    Raises:
        DecompositionError: If the layout does not fit the teacher, or asks for a basis, of which only the closed form
            has a choice (when training starts).
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        layout: BankLayout,
        image_size: int = 224,
        source: Callable[[Tensor, int], TemplateSource] = FreeTemplates,
        loss: Literal["smooth_l1", "mse"] = "smooth_l1",
        loss_scale: float = 2.0,
        noise_std: float = 1e-4,
        gradient_clip: float = 1.0,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = lambda p: RMSprop(p, lr=0.1),
        lr_scheduler: Callable[[Optimizer], LRScheduler] = lambda o: StepLR(o, step_size=200, gamma=0.1),
        similarity_every: int = 10,
    ) -> None:
        super().__init__()
        self.backbone, self.layout, self.image_size = backbone, layout, image_size
        self.source = source
        self.loss, self.loss_scale, self.noise_std = _LOSSES[loss], loss_scale, noise_std
        self.gradient_clip, self.similarity_every = gradient_clip, similarity_every
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.automatic_optimization = False
        self.groups: list[Group] = []
        self._scratch = torch.empty(0)  # the gradient of one group's templates at a time
        self.teacher, self.coefficients = nn.ParameterList(), nn.ParameterList()  # of each group
        self.sources = nn.ModuleList()

    def configure_model(self) -> None:
        """Loads the teacher and draws the start: templates as their source says, coefficients orthogonal."""
        if self.groups:
            return
        if self.layout.basis != "svd":
            raise DecompositionError(
                f"basis={self.layout.basis!r} is a choice of the closed form; leave it out, as MimicryModule fits "
                "templates of its own"
            )
        weights = find_targets(self.backbone.build(self.image_size).net, self.layout.targets)
        self.groups = group_targets({name: tuple(w.shape) for name, w in weights.items()}, self.layout)
        for group in self.groups:
            dense = torch.stack([weights[name].detach() for name in group.targets])  # (L, *shape)
            self.teacher.append(nn.Parameter(dense, requires_grad=False))
            self.sources.append(self.source(dense, group.templates))
            sets = [torch.empty(self.layout.coefficient_sets, group.templates) for _ in group.targets]
            self.coefficients.append(nn.Parameter(torch.stack([nn.init.orthogonal_(s) for s in sets])))

    def configure_optimizers(self) -> Any:
        """One optimizer and one schedule for each group."""
        optimizers = [self.optimizer(self._trained(i)) for i in range(len(self.groups))]
        return optimizers, [self.lr_scheduler(o) for o in optimizers]

    def train_dataloader(self) -> DataLoader[int]:
        """One batch an epoch, of nothing: the weights are the data."""
        return DataLoader(range(1))  # type: ignore[arg-type]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """One update of every group."""
        optimizers = self.optimizers()
        total = torch.zeros((), device=self.device)
        for i, optimizer in enumerate(optimizers if isinstance(optimizers, list) else [optimizers]):
            total += self.set_gradients(i)
            self.limit_gradients(i)
            optimizer.step()
            optimizer.zero_grad()
        self.log("mimicry/loss", total, on_step=False, on_epoch=True, prog_bar=True)

    def on_train_epoch_end(self) -> None:
        """Steps the schedules; now and then records how similar each layer has become."""
        schedulers = self.lr_schedulers()
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            scheduler.step()  # type: ignore[union-attr]
        self.log("mimicry/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        if self.current_epoch % self.similarity_every == 0 or self.current_epoch + 1 == self.trainer.max_epochs:
            self._log_similarity()

    @property
    def templates(self) -> list[Tensor]:
        """The templates (n, *shape) of each group as they stand."""
        return [source(dense) for source, dense in zip(self.sources, self.teacher, strict=True)]

    @torch.no_grad()
    def decomposition(self) -> Decomposition:
        """The fit as it stands.

        Raises:
            DecompositionError: If the module has not been trained.
        """
        if not self.groups:
            raise DecompositionError("MimicryModule holds no templates yet; call Trainer.fit(module) first")
        parts = zip(self.groups, self.templates, self.coefficients, strict=True)
        return Decomposition(tuple(Bank(g, t.detach().cpu(), c.detach().cpu()) for g, t, c in parts))

    @torch.no_grad()
    def similarities(self) -> dict[str, float]:
        """Cosine similarity of each reconstructed weight to the teacher's, by target."""
        result: dict[str, float] = {}
        parts = zip(self.groups, self.teacher, self.templates, self.coefficients, strict=True)
        for group, teacher, templates, coefficients in parts:
            weights = coefficients.mean(1) @ templates.flatten(1)  # (L, D)
            found = F.cosine_similarity(weights, teacher.flatten(1), dim=1)
            result |= dict(zip(group.targets, found.tolist(), strict=True))
        return result

    def set_gradients(self, index: int) -> Tensor:
        """Sets the gradients of a group, block by block of columns: no dense weight is ever held whole.

        The gradient of the coefficients sums over blocks, that of the templates is laid out in them.

        Args:
            index: Position of the group.

        Returns:
            The group's term of equation 3, and what the source of its templates adds, a scalar.
        """
        source, coefficients, dense = self._source(index), self.coefficients[index], self.teacher[index]
        noise = self.noise_std * torch.randn_like(coefficients)
        mixed = (coefficients + noise).mean(1)  # (L, n): equation 2, of equation 3's noisy sets
        templates, term = source.draw(dense)  # (n, *shape)
        flat, teacher, leaf = templates.detach().flatten(1), dense.flatten(1), mixed.detach()
        if self._scratch.numel() < templates.numel() or self._scratch.device != templates.device:
            self._scratch = torch.empty_like(templates).flatten()
        whole = self._scratch[: templates.numel()].view_as(templates)
        gradient, leaf_gradient = whole.flatten(1), torch.zeros_like(leaf)
        total = torch.zeros((), device=self.device)
        for start in range(0, flat.shape[1], _BLOCK):
            columns = slice(start, start + _BLOCK)
            weights = (leaf @ flat[:, columns]).requires_grad_()  # (L, columns)
            loss = self.loss(weights, teacher[:, columns], reduction="sum") * (self.loss_scale / flat.shape[1])
            (slope,) = torch.autograd.grad(loss, weights)
            torch.mm(leaf.T, slope, out=gradient[:, columns])
            leaf_gradient += slope @ flat[:, columns].T
            total += loss.detach()
        mixed.backward(leaf_gradient)
        source.receive(templates, term, whole)
        return total + term.detach()

    def limit_gradients(self, index: int) -> None:
        """Scales the gradients of a group down to the largest norm; where they are below, reads them only once."""
        trained = self._trained(index)
        norm = get_total_norm([p.grad for p in trained if p.grad is not None])
        if 0 < self.gradient_clip < norm:
            clip_grads_with_norm_(trained, self.gradient_clip, norm)

    def _source(self, index: int) -> TemplateSource:
        source = self.sources[index]
        assert isinstance(source, TemplateSource)
        return source

    def _trained(self, index: int) -> list[nn.Parameter]:
        return [*self.sources[index].parameters(), self.coefficients[index]]

    def _log_similarity(self) -> None:
        similarities = self.similarities()
        self.log("mimicry/similarity", sum(similarities.values()) / len(similarities), prog_bar=True)
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                tagged = {f"similarity/{name}": value for name, value in similarities.items()}
                logger.log_metrics(tagged, step=self.current_epoch)
