"""What a decomposition looks like, in numbers: appendix A.3 and section 3.3 of the paper.

The paper's groups gather all modules of a layer, such as both weights of an MLP; here each kind of weight has groups
and banks of its own, and every number is of one such group.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from recast_pl.decomposition.bank import Bank, Decomposition
from recast_pl.decomposition.similarity import FeatureSimilarity, TargetSimilarity
from recast_pl.decomposition.solve import gram


@dataclass(frozen=True)
class Scaling:
    """The numbers that weights are made of, before and after (section 3.3).

    Args:
        dense: Numbers of the weights, L·M·d² with d² those of one weight.
        templates: Numbers of the templates, G·n·d²·M.
        coefficients: L·M·n·K, all of which a task trains.
        kept: L·M·n, the means over the K sets, which a task keeps.
        approximation: Σ d²·(L−n) over groups: the paper's d²·M·(L−G·n), which leaves the coefficients out.
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


@dataclass(frozen=True)
class PaperScaling:
    """The paper's symbols, where one value of each holds for the whole network.

    Args:
        d2: d², the numbers of one weight.
        modules: M, kinds of weights.
        layers: L, weights of each kind.
        groups: G, banks of each kind.
        templates: n.
        coefficient_sets: K.
    """

    d2: int
    modules: int
    layers: int
    groups: int
    templates: int
    coefficient_sets: int

    @property
    def approximation(self) -> int:
        """S ≈ d²·M·(L − G·n)."""
        return self.d2 * self.modules * (self.layers - self.groups * self.templates)


@dataclass(frozen=True)
class GroupAnalysis:
    """One group of layers that share a bank.

    Args:
        name: Of the group, `KIND:NUMBER`.
        targets: Names of its L weights.
        shape: Of each weight.
        templates: n.
        coefficient_sets: K.
        frobenius: Σ_{i<j} ‖T_i − T_j‖_F / (n(n−1)), as the paper prints it: half the mean over pairs. NaN for n = 1.
        frobenius_mean: The mean over pairs. NaN for n = 1.
        entropy: Mean over templates of the entropy of their singular values, in nats; NaN if a template is 0.
        entropy_limit: The largest entropy that the shape allows, ln min(rows, columns), in nats.
        similarity: Cosines of the coefficients of each two layers, (L, L).
        similarity_mean: Their mean over pairs of different layers. NaN for L = 1.
        scaling: Numbers saved.
    """

    name: str
    targets: tuple[str, ...]
    shape: tuple[int, ...]
    templates: int
    coefficient_sets: int
    frobenius: float
    frobenius_mean: float
    entropy: float
    entropy_limit: float
    similarity: tuple[tuple[float, ...], ...]
    similarity_mean: float
    scaling: Scaling

    @property
    def kind(self) -> str:
        """The name without the number of the group."""
        return self.name.rpartition(":")[0]

    @property
    def number(self) -> int:
        """Of the group, within its kind."""
        return int(self.name.rpartition(":")[2])


@dataclass(frozen=True)
class Analysis:
    """All that is known of a decomposition.

    Args:
        groups: The groups.
        scaling: Numbers saved, in all.
        paper: The paper's symbols; None where groups differ in them.
        targets: Weights compared; empty without the backbone.
        features: Features compared, in the order in which they are computed; empty without images.
        displacements: ‖ΔC‖ of each weight, by learnt task; empty without any.
    """

    groups: tuple[GroupAnalysis, ...]
    scaling: Scaling
    paper: PaperScaling | None
    targets: tuple[TargetSimilarity, ...] = ()
    features: tuple[FeatureSimilarity, ...] = ()
    displacements: dict[str, dict[str, float]] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """What `analysis.json` holds: NaN is null, and S stands beside what it is made of."""
        content = asdict(self)
        for entry, group in zip(content["groups"], self.groups, strict=True):
            entry["scaling"]["saved"] = group.scaling.saved
        content["scaling"]["saved"] = self.scaling.saved
        if self.paper is not None:
            content["paper"]["approximation"] = self.paper.approximation
        without_nan: dict[str, Any] = _without_nan(content)
        return without_nan


def analyze(decomposition: Decomposition) -> Analysis:
    """All that a decomposition tells by itself.

    Args:
        decomposition: The decomposition.
    """
    groups = tuple(_analyze_group(bank) for bank in decomposition.banks)
    return Analysis(groups, _scaling(decomposition.banks), _paper_scaling(decomposition))


def frobenius_diversity(templates: Tensor) -> tuple[float, float]:
    """How far the templates of a bank are from one another (appendix A.3).

    Args:
        templates: (n, *shape).

    Returns:
        avg_frobenius = Σ_{i<j} ‖T_i − T_j‖_F / (n(n−1)), as printed, which is half the mean over the n(n−1)/2 pairs;
        and that mean. NaN for n = 1, which has no pairs.
    """
    flat = templates.flatten(1)  # (n, D)
    pairs = [float((a.double() - b.double()).norm()) for i, a in enumerate(flat) for b in flat[i + 1 :]]
    mean = sum(pairs) / len(pairs) if pairs else math.nan
    return mean / 2, mean


def singular_value_entropy(template: Tensor) -> float:
    """How evenly a template uses its directions (appendix A.3).

    The paper does not say how singular values become a distribution. Here p_i = σ_i / Σσ, and H = −Σ p_i ln p_i.

    Args:
        template: (rows, ...), flattened to (rows, columns): a convolution's to (c_out, c_in·k·k).

    Returns:
        H in nats, between 0 and ln min(rows, columns); NaN if the template is 0.
    """
    matrix = template.flatten(1)
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    # by the smaller Gram matrix in float64: what singular values below 1e-8 of the first lose, entropy does not show
    values = torch.linalg.eigvalsh(gram(short, short)).clamp_min(0).sqrt()
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum())


def coefficient_similarity(coefficients: Tensor) -> Tensor:
    """Whether layers of a group mix templates alike: the intra-group coefficient similarity (appendix A.3).

    Args:
        coefficients: (L, K, n).

    Returns:
        Cosines in float64 of all K·n coefficients of each two layers, (L, L); NaN where all of a layer's are 0.
    """
    flat = coefficients.detach().double().flatten(1)  # (L, K·n)
    unit: Tensor = flat / flat.norm(dim=1, keepdim=True)
    return unit @ unit.T


def displacements(decomposition: Decomposition, coefficients: Tensor) -> dict[str, float]:
    """How far a task has moved the coefficients from the pretrained ones.

    Args:
        decomposition: What the task started from.
        coefficients: Its mean coefficients, weight after weight as in the decomposition (Σ n,).

    Returns:
        ‖ΔC‖ by weight, in the Euclidean norm over the n means.
    """
    found: dict[str, float] = {}
    start = 0
    for bank in decomposition.banks:
        for name, means in zip(bank.group.targets, bank.coefficients.mean(1), strict=True):
            found[name] = float((coefficients[start : start + len(means)] - means).double().norm())
            start += len(means)
    return found


def _analyze_group(bank: Bank) -> GroupAnalysis:
    layers, sets, n = bank.coefficients.shape
    frobenius, frobenius_mean = frobenius_diversity(bank.templates)
    entropies = [singular_value_entropy(template) for template in bank.templates]
    similarity = coefficient_similarity(bank.coefficients)  # (L, L)
    rows, columns = bank.templates[0].flatten(1).shape
    return GroupAnalysis(
        name=bank.group.name,
        targets=bank.group.targets,
        shape=bank.group.shape,
        templates=n,
        coefficient_sets=sets,
        frobenius=frobenius,
        frobenius_mean=frobenius_mean,
        entropy=sum(entropies) / n,
        entropy_limit=math.log(min(rows, columns)),
        similarity=tuple(map(tuple, similarity.tolist())),
        similarity_mean=float(similarity[*torch.triu_indices(layers, layers, offset=1)].mean()),
        scaling=_scaling([bank]),
    )


def _scaling(banks: Sequence[Bank]) -> Scaling:
    layers = [(len(bank.group.targets), bank.templates[0].numel(), len(bank.templates)) for bank in banks]
    return Scaling(
        dense=sum(count * size for count, size, _ in layers),
        templates=sum(n * size for _, size, n in layers),
        coefficients=sum(bank.coefficients.numel() for bank in banks),
        kept=sum(count * n for count, _, n in layers),
        approximation=sum(size * (count - n) for count, size, n in layers),
    )


def _paper_scaling(decomposition: Decomposition) -> PaperScaling | None:
    banks: dict[str, list[Bank]] = {}
    for bank in decomposition.banks:
        banks.setdefault(bank.group.kind, []).append(bank)
    sizes = {(b.templates[0].numel(), *b.coefficients.shape[1:]) for b in decomposition.banks}
    counts = {(sum(len(b.group.targets) for b in of_kind), len(of_kind)) for of_kind in banks.values()}
    if len(sizes) != 1 or len(counts) != 1:
        return None
    ((d2, sets, templates),), ((layers, groups),) = sizes, counts
    return PaperScaling(d2, len(banks), layers, groups, templates, sets)


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content
