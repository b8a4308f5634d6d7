"""Figures 6, 9 and 10: templates and coefficients that were found in different ways, side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from recast_pl.reporting.plots import Mark
from recast_pl.runs.metrics import Spread, spread

BANK_FIGURES = {
    "frobenius": ("diversity of templates", "mean Frobenius distance of templates", "9a"),
    "entropy": ("versatility of templates", "mean entropy of singular values (nats)", "9b"),
    "similarity_mean": ("similarity of coefficients", "mean cosine similarity", "10"),
}
"""What is measured, the label of its axis, and the number of the figure by group, by key in `analysis.json`."""

Banks = Mapping[str, Sequence[Mapping[str, Any]]]
"""The groups in `analysis.json`, whose names end in `:NUMBER`, by name of the decomposition."""


def group_marks(banks: Banks, key: str) -> list[Mark]:
    """Returns a point for each decomposition and group number: the mean over the kinds of layers."""
    return [
        Mark(name, number, Spread(spread(values).mean))
        for name, groups in banks.items()
        for number, values in _by_number(groups, key).items()
    ]


def mean_marks(banks: Banks, key: str) -> list[Mark]:
    """Returns a bar for each decomposition: the mean over its groups; none where the measure does not exist."""
    means = {name: [g[key] for g in groups if g.get(key) is not None] for name, groups in banks.items()}
    return [Mark("", name, Spread(spread(values).mean)) for name, values in means.items() if values]


def _by_number(groups: Sequence[Mapping[str, Any]], key: str) -> dict[int, list[float]]:
    by_number: dict[int, list[float]] = {}
    for group in groups:
        if group.get(key) is not None:
            by_number.setdefault(int(group["name"].rpartition(":")[2]), []).append(group[key])
    return by_number
