"""Eigenvectors of matrices that may be of low rank."""

import torch
from torch import Tensor


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a symmetric matrix without negative eigenvalues, in double precision.

    LAPACK's solver for symmetric matrices gives up on some matrices with many equal eigenvalues, such as the scatter of
    few images in a wide feature space. The singular values of such a matrix are its eigenvalues.

    Args:
        matrix: (D, D).

    Returns:
        Eigenvalues (D,) in ascending order, and the eigenvectors as columns (D, D).
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        vectors, values, _ = torch.linalg.svd(matrix)
        values, vectors = values.flip(0), vectors.flip(1)
    return values, vectors
