"""Numbers that describe a decomposition: appendix A.3 and section 3.3 of the paper.

A group of the paper holds all modules of its layers, such as both weights of an MLP. Here each kind of weight has its
own groups and banks, and every number describes one such group.
"""

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from recast_pl.decomposition.bank import Bank, Decomposition, Scaling
from recast_pl.decomposition.similarity import FeatureSimilarity, TargetSimilarity, mean_cosine, reported
from recast_pl.decomposition.solve import gram
from recast_pl.errors import DecompositionError


@dataclass(frozen=True)
class PaperScaling:
    """The paper's symbols, for a network in which each has a single value.

    Args:
        d2: d², the number of entries of one weight.
        modules: M, the number of kinds of weights.
        layers: L, the number of weights of each kind.
        groups: G, the number of banks of each kind.
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
    """The numbers of one group of layers that share a bank.

    Args:
        name: Name of the group, `KIND:NUMBER`.
        targets: Names of its L weights.
        shape: Shape of each weight.
        templates: n.
        coefficient_sets: K.
        frobenius: Σ_{i<j} ‖T_i − T_j‖_F / (n(n−1)), as printed (appendix A.3): half the mean over pairs. NaN for n = 1.
        frobenius_mean: The mean over pairs of templates. NaN for n = 1.
        entropy: Mean over templates of the entropy of their singular values, in nats; NaN if a template is 0.
        entropy_limit: The largest possible entropy, ln min(rows, columns), in nats.
        similarity: Cosine similarity of the K·n coefficients of every two layers, (L, L); NaN if a layer has only 0.
        similarity_mean: Its mean over pairs of different layers. NaN for L = 1.
        scaling: Numbers that the group takes and saves.
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
        """The number of the group within its kind."""
        return int(self.name.rpartition(":")[2])


@dataclass(frozen=True)
class Analysis:
    """The result of analysing a decomposition.

    Args:
        groups: The numbers of each group.
        scaling: Numbers that the decomposition takes and saves, in total.
        paper: The paper's symbols; None if groups differ in them.
        targets: Comparison of the weights; empty without the backbone.
        features: Comparison of the features, in the order of computation; empty without images.
        displacements: ‖ΔC‖ of each weight, for each trained task; empty without tasks.
    """

    groups: tuple[GroupAnalysis, ...]
    scaling: Scaling
    paper: PaperScaling | None
    targets: tuple[TargetSimilarity, ...] = ()
    features: tuple[FeatureSimilarity, ...] = ()
    displacements: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def weight_cosine(self) -> float | None:
        """The cosine of a generated with the pretrained weight, mean over weights; None without the backbone."""
        return mean_cosine(self.targets) if self.targets else None

    @property
    def feature_similarity(self) -> float | None:
        """The cosine of an output in both networks, mean over images and blocks; None without images."""
        names = reported({feature.name: feature.kind for feature in self.features})
        means = [feature.mean for feature in self.features if feature.name in names]
        return statistics.mean(means) if means else None

    def content(self) -> dict[str, Any]:
        """The content of `analysis.json`: with the means and the savings S, and null for NaN and infinity."""
        content = {"weight_cosine": self.weight_cosine, "feature_similarity": self.feature_similarity, **asdict(self)}
        for entry, group in zip(content["groups"], self.groups, strict=True):
            entry["scaling"]["saved"] = group.scaling.saved
        content["scaling"]["saved"] = self.scaling.saved
        if self.paper is not None:
            content["paper"]["approximation"] = self.paper.approximation
        finite: dict[str, Any] = _finite(content)
        return finite


def analyze(decomposition: Decomposition) -> Analysis:
    """Analyses a decomposition without its network."""
    groups = tuple(_analyze_group(bank) for bank in decomposition.banks)
    return Analysis(groups, Scaling.of(decomposition.banks), _paper_scaling(decomposition))


def displacements(decomposition: Decomposition, coefficients: Tensor) -> dict[str, float]:
    """Measures how far a task has moved coefficients from the pretrained ones: ‖ΔC‖ of each weight by name.

    Args:
        decomposition: The decomposition that the task started from.
        coefficients: The task's coefficients, averaged over sets, weight after weight as in the decomposition (Σ n,).

    Raises:
        DecompositionError: If the number of coefficients is not that of the decomposition.
    """
    means = {n: m for b in decomposition.banks for n, m in zip(b.group.targets, b.coefficients.mean(1), strict=True)}
    counts = [len(mean) for mean in means.values()]
    if coefficients.shape != (sum(counts),):
        raise DecompositionError(
            f"the task has coefficients of shape {tuple(coefficients.shape)}, the decomposition has {sum(counts)}; "
            "give the decomposition of the task's run"
        )
    parts = zip(means.items(), coefficients.split(counts), strict=True)
    return {name: float((part - mean).double().norm()) for (name, mean), part in parts}


def _analyze_group(bank: Bank) -> GroupAnalysis:
    layers, sets, n = bank.coefficients.shape
    flat = bank.templates.flatten(1)  # (n, D)
    distances = [float((a.double() - b.double()).norm()) for i, a in enumerate(flat) for b in flat[i + 1 :]]
    frobenius_mean = sum(distances) / len(distances) if distances else math.nan
    vectors = bank.coefficients.detach().double().flatten(1)  # (L, K·n)
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    similarity = unit @ unit.T  # (L, L)
    rows, columns = bank.templates[0].flatten(1).shape
    return GroupAnalysis(
        name=bank.group.name,
        targets=bank.group.targets,
        shape=bank.group.shape,
        templates=n,
        coefficient_sets=sets,
        frobenius=frobenius_mean / 2,
        frobenius_mean=frobenius_mean,
        entropy=sum(map(_entropy, bank.templates)) / n,
        entropy_limit=math.log(min(rows, columns)),
        similarity=tuple(map(tuple, similarity.tolist())),
        similarity_mean=float(similarity[*torch.triu_indices(layers, layers, offset=1)].mean()),
        scaling=Scaling.of([bank]),
    )


def _entropy(template: Tensor) -> float:
    """The entropy H = −Σ p_i ln p_i of p_i = σ_i / Σσ; the paper does not say how σ becomes a distribution."""
    matrix = template.flatten(1)  # (rows, columns); of a convolution, (c_out, c_in·k·k)
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    # of the smaller Gram matrix, in float64: singular values below 1e-8 of the largest are inexact, and hardly count
    values = torch.linalg.eigvalsh(gram(short, short)).clamp_min(0).sqrt()
    return float(torch.special.entr(values / values.sum()).sum())


def _paper_scaling(decomposition: Decomposition) -> PaperScaling | None:
    kinds = decomposition.kinds
    sizes = {(b.templates[0].numel(), *b.coefficients.shape[1:]) for b in decomposition.banks}
    counts = {(sum(len(b.group.targets) for b in banks), len(banks)) for banks in kinds.values()}
    if len(sizes) != 1 or len(counts) != 1:
        return None
    ((d2, sets, templates),), ((layers, groups),) = sizes, counts
    return PaperScaling(d2, len(kinds), layers, groups, templates, sets)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
