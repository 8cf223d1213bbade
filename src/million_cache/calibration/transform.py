"""The linear transform of the keys that precedes their codes: OPQ's balanced eigenbasis, with query weights.

A quantised key matters through ``q . k``, so the error of a key k' for k is ``(k - k')^T W (k - k')`` with
``W = E[q q^T]``. In the basis ``W^(1/2) k`` that is the plain Euclidean distance which k-means minimises. There the eigenbasis
of the keys' covariance decorrelates the channels, and its eigenvalues are dealt to the subspaces so that their products are
equal: with the same number of bits for every subspace that minimises the distortion of Gaussian data (Ge, He, Ke, Sun,
"Optimized Product Quantization", TPAMI 2014, section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Weight that every channel gets beside its own, relative to the mean: keeps W invertible, and channels that no calibration
# query looked at from being thrown away.
WEIGHT_FLOOR = 1e-3


def average_over_rotation(moment: Tensor, rotary: int, interleaved: bool) -> Tensor:
    """Second moments of queries, averaged over all positions of their rotation.

    A rotation by a uniformly random angle leaves of a pair's 2 x 2 block the mean of its diagonal, and nothing of what
    joins the pair with other channels.

    Args:
        moment: [H, D, D].
        rotary: channels that rotate, the first ones; 0 returns ``moment``.
        interleaved: pairs (2 i, 2 i + 1) instead of (i, i + rotary / 2).
    """
    out = moment.clone()
    if rotary:
        diagonal = moment.diagonal(dim1=1, dim2=2)[:, :rotary]
        pairs = diagonal.unflatten(1, (-1, 2)) if interleaved else diagonal.unflatten(1, (2, -1))
        mean = pairs.mean(2 if interleaved else 1, keepdim=True).expand_as(pairs).flatten(1)
        out[:, :rotary] = 0
        out[:, :, :rotary] = 0
        out[:, :rotary, :rotary] = torch.diag_embed(mean)
    return out


def deal(eigenvalues: Tensor, subspace_dim: int) -> Tensor:
    """Deal dimensions to subspaces so that the products of their eigenvalues are balanced.

    Greedy, from the largest: each goes to the subspace with the smallest product so far that is not full.

    Args:
        eigenvalues: [D], descending.

    Returns:
        Order [D] int64: dimensions of subspace 0, then of subspace 1, ...
    """
    count = len(eigenvalues) // subspace_dim
    logs = eigenvalues.clamp(min=eigenvalues[0].clamp(min=1e-30) * 1e-12).log().tolist()
    members: list[list[int]] = [[] for _ in range(count)]
    # Logarithms relative to the smallest are not negative, so that fuller never means smaller.
    product = [0.0] * count
    for i, value in enumerate(logs):
        s = min((s for s in range(count) if len(members[s]) < subspace_dim), key=product.__getitem__)
        members[s].append(i)
        product[s] += value - logs[-1]
    return torch.tensor([i for m in members for i in m])


def key_transform(covariance: Tensor, weight: Tensor, subspace_dim: int) -> tuple[Tensor, Tensor]:
    """The transform T of a layer's keys and its inverse, ``T = s P U^T W^(1/2)``.

    U is the eigenbasis of ``W^(1/2) C W^(1/2)``, P deals its dimensions to subspaces, and s scales a head's keys to a mean
    variance of 1, in the middle of fp16's range.

    Args:
        covariance: C [H, D, D], of the keys as they are encoded (in their frames).
        weight: W [H, D, D], the queries' second moments; positive semidefinite, any scale.
        subspace_dim: channels that share a code.

    Returns:
        T and its inverse, [H, D, D] fp32 each.
    """
    H, D, _ = covariance.shape
    covariance, weight = covariance.double(), weight.double()
    eye = torch.eye(D, dtype=torch.float64, device=weight.device)
    level = weight.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    weight = torch.where(level > 0, weight / level.clamp(min=1e-300), eye) + WEIGHT_FLOOR * eye
    values, vectors = torch.linalg.eigh(weight)
    root = (vectors * values.sqrt()[:, None]) @ vectors.transpose(1, 2)
    root_inv = (vectors / values.sqrt()[:, None]) @ vectors.transpose(1, 2)
    energy, basis = torch.linalg.eigh(root @ covariance @ root)
    energy, basis = energy.clamp(min=0).flip(1), basis.flip(2)  # descending
    order = torch.stack([deal(e, subspace_dim) for e in energy.cpu()]).to(basis.device)
    basis = basis.gather(2, order[:, None].expand(H, D, D))
    scale = energy.mean(1).clamp(min=1e-30).rsqrt()[:, None, None]
    transform = scale * basis.transpose(1, 2) @ root
    inverse = root_inv @ basis / scale
    return transform.float(), inverse.float()
