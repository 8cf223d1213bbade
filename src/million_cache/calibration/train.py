"""Codebooks of one layer from its sampled keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from million_cache.calibration.collect import LayerSample
from million_cache.calibration.kmeans import assign, kmeans
from million_cache.calibration.sensitivity import KEY_POWER, VALUE_POWER, row_weights
from million_cache.calibration.transform import average_over_rotation, key_transform
from million_cache.codebook import LayerCodebooks, LayerReport, invert
from million_cache.config import PQConfig
from million_cache.models import Rotation
from million_ops.reference import rotate

# Of `spread_weights`. KL of SmolLM2 with (keys, values), four evaluation contexts; 2 bit: (0, 0) .0091, (.5, 0) .0089, (1, 0) .0084,
# (0, .5) .0089, (1, .5) .0083; 1 bit: .0434, .0418, .0412, .0417, .0394.
KEY_SPREAD, VALUE_SPREAD = 1.0, 0.5


def spread_weights(points: Tensor, power: float) -> Tensor:
    """Weights of points in k-means by how far out they are: `row_weights` of their squared distances to the mean.

    The least mean squared error leaves the outskirts to few centroids. But large keys are those that attention picks, and new text
    goes beyond the sample there. Errors of points far out weigh more, so some centroids move outwards.

    Args:
        points: [G, N, d] fp32.

    Returns:
        [G, N] with mean 1 a group.
    """
    return row_weights((points - points.mean(1, keepdim=True)).square().sum(-1), power)


def framed_keys(keys: Tensor, positions: Tensor, offsets: Tensor, rotation: Rotation) -> Tensor:
    """Keys as they look at other offsets of a frame: ``R(offset) R(-position) k``.

    Args:
        keys: [H, N, D], rotated by the model for ``positions`` [N].
        offsets: [N], where in its frame each key is put.
        rotation: the layer's, "half" or "interleaved".

    Returns:
        [H, N, D] fp32.
    """
    return rotate(keys.float(), offsets - positions, rotation.inv_freq, rotation.kind == "interleaved")


def _codebook(
    x: Tensor, weights: Tensor | None, spread: float, d: int, iterations: int, generator: torch.Generator, where: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Train on x [H, N, D] fp32: codebook [H, 256, S, d] fp16, energy and distortion of each subspace [H, S] fp32.

    ``weights`` [H, N] are those of the rows in k-means, times `spread_weights`; energy and distortion are plain means.
    """
    H, _, D = x.shape
    points = x.unflatten(2, (D // d, d)).transpose(1, 2).flatten(0, 1).contiguous()  # [H * S, N, d]
    of_points = spread_weights(points, spread)
    if weights is not None:
        of_points *= weights.repeat_interleave(D // d, 0)
    centroids = kmeans(points, iterations, generator, of_points).half()
    overflow = centroids.view(H, -1).isinf().any(1)
    if overflow.any():
        head = int(overflow.nonzero()[0])
        raise ValueError(
            f"{where}, KV head {head}: a centroid exceeds fp16's range (largest entry {x[head].abs().max():.3g})"
        )
    energy = (points - points.mean(1, keepdim=True)).square().sum(-1).mean(1).view(H, D // d)
    distortion = assign(points, centroids.float())[1].mean(1).view(H, D // d)
    return centroids.view(H, D // d, -1, d).transpose(1, 2).contiguous(), energy, distortion


def train_layer(
    sample: LayerSample,
    positions: Tensor,
    rotation: Rotation,
    config: PQConfig,
    *,
    iterations: int,
    generator: torch.Generator,
    device: torch.device,
    name: str,
) -> tuple[LayerCodebooks, LayerReport]:
    """Transform and codebooks of one layer.

    Args:
        positions: [N], of the sample's rows.
        generator: on the CPU, so that a seed means the same on every device.
        name: of the layer, for messages.

    Returns:
        Codebooks and report, on the CPU. Raises ValueError when a centroid exceeds fp16's range.
    """
    rotated = rotation.kind in ("half", "interleaved")
    frame_tokens = config.frame_tokens if rotated else 0
    keys, values = sample.keys.to(device).float(), sample.values.to(device).float()
    if frame_tokens:
        offsets = torch.randint(frame_tokens, positions.shape, generator=generator).to(device)
        keys = framed_keys(keys, positions.to(device), offsets, rotation)
    weight = sample.key_moment.to(device)
    if rotated:
        weight = average_over_rotation(weight, 2 * rotation.inv_freq.numel(), rotation.kind == "interleaved")
    centred = keys - keys.mean(1, keepdim=True)
    covariance = centred.transpose(1, 2) @ centred / keys.shape[1]
    transform, inverse = key_transform(covariance, weight, config.k_subspace_dim)
    keys = keys @ transform.transpose(1, 2)
    k_weights = v_weights = None
    if sample.sensitivity is not None:
        # T^T T = W up to scale: this is the gradient's squared norm in the space where codes are made, whatever the frame.
        g = sample.sensitivity.key_gradients.to(device)
        metric = invert(transform.transpose(1, 2) @ transform)
        k_weights = row_weights(((g @ metric) * g).sum(-1).clamp(min=0), KEY_POWER)
        v_weights = row_weights(sample.sensitivity.value_energy.to(device), VALUE_POWER)
    k_codebook, k_energy, k_distortion = _codebook(
        keys, k_weights, KEY_SPREAD, config.k_subspace_dim, iterations, generator, f"{name}, keys"
    )
    v_codebook, v_energy, v_distortion = _codebook(
        values, v_weights, VALUE_SPREAD, config.v_subspace_dim, iterations, generator, f"{name}, values"
    )
    codebooks = LayerCodebooks(
        k_codebook, v_codebook, transform, inverse,
        inv_freq=rotation.inv_freq if rotated else None,
        rope_interleaved=rotation.kind == "interleaved",
        frame_tokens=frame_tokens,
    )  # fmt: skip
    report = LayerReport(*(x.cpu() for x in (k_energy, k_distortion, v_energy, v_distortion)))
    return codebooks.to("cpu"), report
