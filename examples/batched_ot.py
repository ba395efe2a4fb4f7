"""All pairwise distances between small point clouds in one call, and a gradient step through them.

    python examples/batched_ot.py

Clouds of three shapes are told apart by their Sinkhorn divergence, S(x, y) = W(x, y) - (W(x, x) + W(y, y)) / 2, with W entropic
transport of squared distances (Genevay, Peyré, Cuturi, "Learning Generative Models with Sinkhorn Divergences", AISTATS 2018). Then
the clouds of one shape are moved onto another by descending that divergence.
"""

import math
import time

import torch
from torch import Tensor

from helo_fast import sinkhorn

CLOUDS, POINTS, EPSILON = 60, 32, 0.05


def shapes() -> tuple[Tensor, Tensor]:
    """Circles, crosses and spirals in the plane, noisy and turned at random: ([clouds, points, 2], shape of each)."""
    generator = torch.Generator().manual_seed(0)
    shape = torch.arange(CLOUDS) % 3
    t = torch.rand(CLOUDS, POINTS, generator=generator)
    circle = torch.stack([torch.cos(2 * math.pi * t), torch.sin(2 * math.pi * t)], -1)
    arm, along = torch.randint(2, t.shape, generator=generator).unsqueeze(-1), (2 * t - 1).unsqueeze(-1)
    cross = torch.where(arm == 0, torch.cat([along, 0 * along], -1), torch.cat([0 * along, along], -1))
    spiral = t.unsqueeze(-1) * torch.stack([torch.cos(9 * t), torch.sin(9 * t)], -1)
    clouds = torch.stack([circle, cross, spiral])[shape, torch.arange(CLOUDS)]
    turn = 2 * math.pi * torch.rand(CLOUDS, generator=generator)
    rotation = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], -1).view(-1, 2, 2)
    return clouds @ rotation + 0.05 * torch.randn(clouds.shape, generator=generator), shape


def transport(x: Tensor, y: Tensor) -> Tensor:
    """Entropic transport cost <T, C> of each pair, [B]; its gradient is taken at fixed plan."""
    return sinkhorn(torch.cdist(x, y).square(), epsilon=EPSILON, max_iter=500, tol=1e-3, gradient="envelope").transport_cost


def divergence(x: Tensor, y: Tensor) -> Tensor:
    return transport(x, y) - (transport(x, x) + transport(y, y)) / 2


def main() -> None:
    clouds, shape = shapes()
    start = time.perf_counter()
    first, second = torch.triu_indices(CLOUDS, CLOUDS, 1)
    own = transport(clouds, clouds)
    distance = torch.full((CLOUDS, CLOUDS), math.inf)
    distance[first, second] = transport(clouds[first], clouds[second]) - (own[first] + own[second]) / 2
    distance = torch.minimum(distance, distance.T)
    print(f"{len(first)} pairs of clouds of {POINTS} points: {time.perf_counter() - start:.2f} s")
    nearest = shape[distance.argmin(1)]
    print(f"nearest cloud has the same shape: {(nearest == shape).float().mean():.0%} (chance {1 / 3:.0%})")

    moving, target = clouds[shape == 2].clone(), clouds[shape == 0]
    for step in range(61):
        moving.requires_grad_()
        value = divergence(moving, target)
        if step % 20 == 0:
            print(f"step {step:2d}: mean divergence of the spirals from circles {value.mean():.4f}")
        (gradient,) = torch.autograd.grad(value.sum(), moving)
        moving = moving.detach() - 0.1 * POINTS * gradient


if __name__ == "__main__":
    main()
