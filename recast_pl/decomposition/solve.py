"""The best templates and coefficients in closed form.

A group's flattened weights are the rows of an L×D matrix W. Its L×L Gram matrix WWᵀ in float64 has as its
eigenvectors the left singular vectors of W; the leading n of them, U, give templates UᵀW and coefficients U:
the least-squares optimum for n < L (Eckart and Young, 1936) and exact for n = L. Any rotation UR of them spans the
same templates, and gives the same weights from other numbers: such a choice is a *basis*.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Basis = Literal["svd", "layers", "random"]

_CHUNK = 1 << 16  # columns turned into float64 at a time: the matrix is never copied whole


def solve_group(weights: list[Tensor], templates: int, basis: Basis = "svd", seed: int = 0) -> tuple[Tensor, Tensor]:
    """Decomposes the weights of a group.

    Args:
        weights: L tensors of one shape.
        templates: n ≤ L.
        basis: Which orthonormal columns U (L, n), see `recast_pl.BankLayout`.
        seed: Of a random basis.

    Returns:
        Templates UᵀW (n, *shape) in the type of the weights, and coefficients U (L, n) in float32.
    """
    stacked = torch.stack([w.detach().flatten() for w in weights])  # (L, D)
    columns = _BASES[basis](stacked, templates, seed)  # (L, n)
    bank = columns.T.to(stacked) @ stacked  # (n, D)
    return bank.view(templates, *weights[0].shape), columns.float()


def project(weight: Tensor, templates: Tensor) -> Tensor:
    """The least-squares coefficients of a weight on a template bank.

    The n×n normal equations in float64 are more accurate than float32 least squares on two long vectors.

    Args:
        weight: (*shape).
        templates: (n, *shape).

    Returns:
        Coefficients (n,) in float32.
    """
    flat = templates.detach().flatten(1)
    right = gram(flat, weight.detach().flatten()[None])  # (n, 1)
    inverse: Tensor = torch.linalg.pinv(gram(flat, flat), hermitian=True)
    return (inverse @ right)[:, 0].float()


def gram(left: Tensor, right: Tensor) -> Tensor:
    """Inner products in float64 of the rows of (A, D) and (B, D): a matrix (A, B)."""
    total = left.new_zeros(len(left), len(right), dtype=torch.float64)
    for a, b in zip(left.split(_CHUNK, dim=1), right.split(_CHUNK, dim=1), strict=True):
        total += a.double() @ b.double().T
    return total


def _leading(stacked: Tensor, templates: int, _: int) -> Tensor:
    """The leading left singular vectors (L, n), each with its largest entry positive."""
    _values, vectors = torch.linalg.eigh(gram(stacked, stacked))  # ascending eigenvalues
    leading: Tensor = vectors.flip(1)[:, :templates]  # (L, n)
    return leading * leading.gather(0, leading.abs().argmax(0, keepdim=True)).sign()


def _identity(stacked: Tensor, templates: int, _: int) -> Tensor:
    return torch.eye(len(stacked), templates, dtype=torch.float64, device=stacked.device)


def _rotated(stacked: Tensor, templates: int, seed: int) -> Tensor:
    """The leading singular vectors times an orthogonal matrix (n, n), uniformly drawn (Mezzadri, 2007)."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(templates, templates, dtype=torch.float64, generator=generator))
    rotation: Tensor = q * r.diagonal().sign()
    return _leading(stacked, templates, seed) @ rotation.to(stacked.device)


_BASES: dict[Basis, Callable[[Tensor, int, int], Tensor]] = {"svd": _leading, "layers": _identity, "random": _rotated}
