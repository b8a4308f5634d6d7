"""The best templates and coefficients in closed form.

The flattened weights of a group are the rows of an L×D matrix W. The eigenvectors of its L×L Gram matrix WWᵀ, computed
in float64, are the left singular vectors of W. The leading n of them, U, give templates s·UᵀW and coefficients U/s:
exact for n = L, and the least-squares optimum for n < L (Eckart and Young, 1936). Templates s·(UR)ᵀW and coefficients
UR/s with any rotation R give the same weights; the choice of R is called the *basis*.

The scale s = 8 acts as a learning rate: a step of Adam moves a coefficient by the rate, whatever s is. With s = 8, the
paper's rate of 2e-3 for head and coefficients works. It is also the scale of the paper's own fits: at the published
rates, their templates end about 8 times as large as those of s = 1.
"""

from typing import Literal

import torch
from torch import Tensor

from recast_pl.linalg import eigen

Basis = Literal["svd", "layers", "random"]

_SCALE = 8.0  # a power of 2, so that it changes no digit

_CHUNK = 1 << 16  # columns converted to float64 at a time, so that the matrix is never copied at once


def solve_group(weights: list[Tensor], templates: int, basis: Basis = "svd", seed: int = 0) -> tuple[Tensor, Tensor]:
    """Decomposes the weights of a group.

    Args:
        weights: L tensors of one shape, type and device.
        templates: n, at most L.
        basis: Which of the equally good solutions to return, see `recast_pl.BankLayout`.
        seed: Seed of a random basis.

    Returns:
        Templates s·UᵀW (n, *shape) in the type of the weights, and coefficients U/s (L, n) in float32.
    """
    stacked = torch.stack([w.detach().flatten() for w in weights])  # (L, D)
    if basis == "layers":
        columns = torch.eye(len(stacked), templates, dtype=torch.float64, device=stacked.device)  # (L, n)
    else:
        columns = _leading_vectors(stacked, templates)
    if basis == "random":
        columns = columns @ _rotation(templates, seed).to(columns)
    bank = (_SCALE * columns.T).to(stacked) @ stacked  # (n, D)
    return bank.view(templates, *weights[0].shape), columns.float() / _SCALE


def project(weight: Tensor, templates: Tensor) -> Tensor:
    """Computes the least-squares coefficients of a weight on the templates of a bank.

    It solves the n×n normal equations in float64, which is more accurate than least squares on two long float32
    vectors: 5e-8 instead of up to 2e-4.

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
    """Computes the inner products of the rows of (A, D) and (B, D) in float64: a matrix (A, B)."""
    total = left.new_zeros(len(left), len(right), dtype=torch.float64)
    for a, b in zip(left.split(_CHUNK, dim=1), right.split(_CHUNK, dim=1), strict=True):
        total += a.double() @ b.double().T
    return total


def _leading_vectors(stacked: Tensor, count: int) -> Tensor:
    """The leading left singular vectors (L, n), each with its largest entry positive."""
    _, vectors = eigen(gram(stacked, stacked))  # ascending eigenvalues
    leading: Tensor = vectors.flip(1)[:, :count]
    return leading * leading.gather(0, leading.abs().argmax(0, keepdim=True)).sign()


def _rotation(size: int, seed: int) -> Tensor:
    """A uniformly drawn orthogonal matrix (Mezzadri, 2007)."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    rotation: Tensor = q * r.diagonal().sign()
    return rotation
