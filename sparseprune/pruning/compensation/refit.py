"""What stands in for removed weights: the survivors, refitted, or two thin factors."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["low_rank_factors", "refit_survivors"]


def refit_survivors(weight: Tensor, mask: Tensor, second_moment: Tensor, iterations: int = 30) -> Tensor:
    """weight: `[N, K]`; mask: bool `[N, K]`; second_moment H: `[K, K]`, E x x^T, positive definite; returns S `[N, K]`.

    S is zero where the mask is False and minimises tr((W - S) H (W - S)^T): every row by itself is the least-squares
    fit of the dense row's outputs by its survivors. Conjugate gradients on all rows at once, scaled by H's diagonal,
    starting from the masked weights, so that it never ends worse than them.
    """
    scale = second_moment.diagonal().clamp_min(torch.finfo(second_moment.dtype).tiny)
    kept = mask.to(weight.dtype)
    fit = weight * kept
    residual = ((weight - fit) @ second_moment) * kept
    direction = scaled = residual / scale
    product = (residual * scaled).sum(1, keepdim=True)
    start = product.clone()
    for _ in range(iterations):
        image = (direction @ second_moment) * kept
        curvature = (direction * image).sum(1, keepdim=True)
        # A row that has converged (or is empty) stays where it is.
        active = (product > 1e-12 * start) & (curvature > 0)
        if not bool(active.any()):
            break
        length = torch.where(active, product / curvature.clamp_min(1e-38), torch.zeros_like(product))
        fit = fit + length * direction
        residual = residual - length * image
        scaled = residual / scale
        after = (residual * scaled).sum(1, keepdim=True)
        direction = (
            scaled + torch.where(active, after / product.clamp_min(1e-38), torch.zeros_like(product)) * direction
        )
        product = torch.where(active, after, product)
    return fit * kept


def low_rank_factors(missing: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A `[r, K]`, B `[N, r]` that minimise tr((M - B A) H (M - B A)^T) for H = root root^T: the SVD of M root, cut
    at r.
    """
    weighted = missing @ root
    width = min(rank + 8, *weighted.shape)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(weighted.shape[1], width, generator=generator).to(weighted)
    basis = torch.linalg.qr(weighted @ start).Q
    for _ in range(4):
        basis = torch.linalg.qr(weighted @ (weighted.T @ basis)).Q
    left, values, right = torch.linalg.svd(basis.T @ weighted, full_matrices=False)
    scale = values[:rank].sqrt()
    b = (basis @ left[:, :rank]) * scale
    a = torch.linalg.solve_triangular(root, right[:rank] * scale[:, None], upper=False, left=False)
    # Row-major, as a file brings them back: a BLAS may round a product with the transposed form otherwise.
    return a.contiguous(), b.contiguous()
