"""Template banks, and the decomposition of a network as a value that can be solved, saved, loaded and inspected."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from recast_pl.decomposition.quantization import QuantizedTemplates, TemplatePrecision
from recast_pl.decomposition.solve import project, solve_group
from recast_pl.decomposition.targets import BankLayout, Group, check_values, find_targets, group_targets
from recast_pl.errors import DecompositionError
from recast_pl.files import fingerprint, pack_tensors, read_tensors, write_atomic

_FORMAT = 1


class TemplateBank(nn.Module):
    """The templates T_i that a group of layers shares, frozen.

    Args:
        templates: (n, *shape).
    """

    def __init__(self, templates: Tensor) -> None:
        super().__init__()
        # a frozen parameter, not a buffer: DDP broadcasts buffers at every step
        self.templates = nn.Parameter(templates, requires_grad=False)

    def mix(self, coefficients: Tensor, out: Tensor | None = None) -> Tensor:
        """Mixes the templates into a weight by equations 1 and 2, or into the weights of several layers at once.

        Args:
            coefficients: K sets of n coefficients (K, n), or those of L layers (L, K, n).
            out: Memory for the result, which then has no gradients; None for new memory.

        Returns:
            The weight (*shape), or weights (L, *shape): Σ_i mean_k(C_ki)·T_i, which equals mean_k Σ_i C_ki·T_i.
        """
        # in half precision, a weight would lose the small changes that its coefficients can express
        with torch.autocast(coefficients.device.type, enabled=False):
            mean, templates = coefficients.mean(-2).to(self.templates), self.templates.flatten(1)  # (…, n), (n, D)
            if out is None:
                flat = mean @ templates  # (…, D)
            else:  # as matrices, because torch would resize a vector that it writes to
                flat = torch.mm(mean.view(-1, mean.shape[-1]), templates, out=out.view(-1, templates.shape[1]))
        return flat.view(*mean.shape[:-1], *self.templates.shape[1:])


@dataclass(frozen=True)
class Bank:
    """The templates of one group and the coefficients of its layers.

    Args:
        group: The layers.
        templates: (n, *shape).
        coefficients: (L, K, n).
        quantized: The codes of the templates, which a file keeps in their place; None for templates in full precision.
    """

    group: Group
    templates: Tensor
    coefficients: Tensor
    quantized: QuantizedTemplates | None = None

    def rounded(self, precision: TemplatePrecision) -> "Bank":
        """The bank with rounded templates, and the coefficients that then come nearest to its weights.

        Each of the K sets moves by as much as their mean, which is all that a weight depends on.
        """
        quantized = QuantizedTemplates.of(self.templates, precision)
        templates, means = quantized.templates(), self.coefficients.mean(1)  # (L, n)
        nearest = [project(mean.to(self.templates) @ self.templates.flatten(1), templates) for mean in means]
        moved = self.coefficients + (torch.stack(nearest).to(means) - means)[:, None]
        return Bank(self.group, templates, moved, quantized)

    def tensors(self) -> dict[str, Tensor]:
        """What a file keeps, by name."""
        stored = {"templates": self.templates} if self.quantized is None else self.quantized.tensors()
        return {**stored, "coefficients": self.coefficients}


@dataclass(frozen=True)
class Scaling:
    """How many numbers a decomposition takes and saves (section 3.3).

    Args:
        dense: Numbers of the weights, L·M·d² with d² those of one weight.
        templates: Numbers of the templates, G·n·d²·M.
        coefficients: L·M·n·K, all of which a task trains.
        kept: L·M·n, the means over the K sets, which a task keeps.
        approximation: Σ d²·(L−n) over groups: the paper's d²·M·(L−G·n), which leaves out the coefficients.
    """

    dense: int
    templates: int
    coefficients: int
    kept: int
    approximation: int

    @property
    def saved(self) -> int:
        """S = dense − (templates + coefficients)."""
        return self.dense - self.templates - self.coefficients

    @classmethod
    def of(cls, banks: Sequence[Bank]) -> "Scaling":
        """Counts the numbers of some groups."""
        layers = [(len(bank.group.targets), bank.templates[0].numel(), len(bank.templates)) for bank in banks]
        return cls(
            dense=sum(count * size for count, size, _ in layers),
            templates=sum(n * size for _, size, n in layers),
            coefficients=sum(bank.coefficients.numel() for bank in banks),
            kept=sum(count * n for count, _, n in layers),
            approximation=sum(size * (count - n) for count, size, n in layers),
        )


@dataclass(frozen=True)
class Decomposition:
    """Template banks and coefficients that stand for some weights of a network: one bank for each group."""

    banks: tuple[Bank, ...]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, templates and coefficients."""
        return fingerprint(self._tensors())

    @property
    def kinds(self) -> dict[str, list[Bank]]:
        """The banks of each kind of weight."""
        kinds: dict[str, list[Bank]] = {}
        for bank in self.banks:
            kinds.setdefault(bank.group.kind, []).append(bank)
        return kinds

    def reconstruct(self) -> dict[str, Tensor]:
        """The dense weight of each target by name, from equations 1 and 2."""
        return {
            name: TemplateBank(bank.templates).mix(coefficients)
            for bank in self.banks
            for name, coefficients in zip(bank.group.targets, bank.coefficients, strict=True)
        }

    def rounded(self, precision: TemplatePrecision) -> "Decomposition":
        """The decomposition with templates of another precision (see `recast_pl.BankLayout`)."""
        if precision == "full":
            return self
        return Decomposition(tuple(bank.rounded(precision) for bank in self.banks))

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file atomically."""
        groups = [asdict(bank.group) for bank in self.banks]
        facts = {"format": _FORMAT, "kind": "decomposition", "groups": groups}
        write_atomic(path, pack_tensors(self._tensors(), facts))

    @classmethod
    def load(cls, path: str | Path) -> "Decomposition":
        """Reads a file that `save` wrote; raises DecompositionError if it is missing, damaged or of another kind."""
        tensors, metadata = read_tensors(path, DecompositionError)
        if metadata.get("kind") != "decomposition" or metadata.get("format") != _FORMAT:
            kind, version = metadata.get("kind"), metadata.get("format")
            raise DecompositionError(
                f"{path} is a {kind} of format {version}, not a decomposition of format {_FORMAT}; "
                "give the decomposition.safetensors of a run"
            )
        try:
            decomposition = cls(tuple(_read_bank(entry, tensors) for entry in metadata["groups"]))
        except (KeyError, TypeError, ValueError, AttributeError) as cause:
            raise DecompositionError(f"{path} is incomplete ({cause}); decompose the backbone again") from cause
        if not decomposition.banks or tensors.keys() != decomposition._tensors().keys():
            raise DecompositionError(f"{path} does not hold the tensors of its groups; decompose the backbone again")
        return decomposition

    def table(self) -> Table:
        """A table for the terminal, with a row for each kind of weight."""
        table = Table(title="Decomposition", box=box.SIMPLE, title_justify="left", padding=0)
        table.add_column("weights", overflow="fold")
        for column in ("shape", "layers", "groups", "templates", "coeffs", "saved"):
            table.add_column(column, justify="right", no_wrap=True)
        for kind, banks in self.kinds.items():
            shapes = {"×".join(map(str, bank.group.shape)) for bank in banks}
            table.add_row(kind, shapes.pop() if len(shapes) == 1 else f"{len(shapes)} shapes", *_counts(banks))
        table.add_section()
        table.add_row("total", "", *_counts(self.banks))
        return table

    def _tensors(self) -> dict[str, Tensor]:
        return {f"{bank.group.name}/{part}": tensor for bank in self.banks for part, tensor in bank.tensors().items()}


def decompose(model: nn.Module, layout: BankLayout) -> Decomposition:
    """Decomposes weights of a network in closed form (see `recast_pl.decomposition.solve`).

    Args:
        model: Any module; it is not changed.
        layout: Which weights, and how they share templates. For K > 1, all sets are equal.

    Raises:
        DecompositionError: If the layout does not fit the model, or the weights of a group have no finite values or
            differ in type or device.
    """
    targets = find_targets(model, layout.targets)
    groups = group_targets({name: tuple(w.shape) for name, w in targets.items()}, layout)
    return Decomposition(tuple(_solve(group, targets, layout) for group in groups)).rounded(layout.precision)


def _solve(group: Group, targets: Mapping[str, Tensor], layout: BankLayout) -> Bank:
    weights = {name: targets[name] for name in group.targets}
    check_values(weights)
    seed = zlib.crc32(group.name.encode())
    templates, coefficients = solve_group(list(weights.values()), group.templates, layout.basis, seed)
    return Bank(group, templates, coefficients[:, None].repeat(1, layout.coefficient_sets, 1))  # (L, K, n)


def _read_bank(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Bank:
    group = Group(entry["name"], tuple(entry["targets"]), tuple(entry["shape"]), entry["templates"])
    coefficients = tensors[f"{group.name}/coefficients"]
    quantized = _read_codes(group, tensors) if f"{group.name}/codes" in tensors else None
    templates = tensors[f"{group.name}/templates"] if quantized is None else quantized.templates()
    layers, sets, count = coefficients.shape
    expected = (len(group.targets), group.templates, (group.templates, *group.shape))
    if (layers, count, tuple(templates.shape)) != expected or sets < 1:
        raise ValueError(f"templates or coefficients of group {group.name} have a wrong shape")
    if not (templates.isfinite().all() and coefficients.isfinite().all()):
        raise ValueError(f"templates or coefficients of group {group.name} are NaN or infinite")
    return Bank(group, templates, coefficients, quantized)


def _read_codes(group: Group, tensors: Mapping[str, Tensor]) -> QuantizedTemplates:
    codes, scales, exponent = (tensors[f"{group.name}/{part}"] for part in ("codes", "scales", "exponent"))
    shapes = ((group.templates, *group.shape), (group.templates, group.shape[0]), ())
    if (codes.shape, scales.shape, exponent.shape) != shapes or codes.dtype != torch.int8 or not exponent > 0:
        raise ValueError(f"the rounded templates of group {group.name} have a wrong shape, type or exponent")
    return QuantizedTemplates(codes, scales, exponent)


def _counts(banks: Sequence[Bank]) -> list[str]:
    scaling = Scaling.of(banks)
    layers = sum(len(bank.group.targets) for bank in banks)
    templates = sum(len(bank.templates) for bank in banks)
    return [f"{n:,}" for n in (layers, len(banks), templates, scaling.coefficients, scaling.saved)]
