"""Points of turned and shuffled shapes matched by their inner distances alone: Gromov-Wasserstein transport, a batch at once.

    python examples/shape_matching.py

The two copies of a shape share no coordinates, so no cost between their points exists; what they share is each one's matrix of
distances (Mémoli, "Gromov-Wasserstein Distances and the Metric Approach to Object Matching", 2011).
"""

import time

import torch

from helo_fast.pot import solve_gromov_batch

SHAPES, POINTS = 64, 24


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(SHAPES, POINTS, 3, generator=generator) * torch.tensor([1.0, 0.6, 0.3])
    order = torch.rand(SHAPES, POINTS, generator=generator).argsort(-1)  # the copy's point i is the original's order[i]
    rotation = torch.linalg.qr(torch.randn(SHAPES, 3, 3, generator=generator)).Q
    for noise in (0.0, 0.02, 0.05):
        copy = torch.gather(points, 1, order.unsqueeze(-1).expand(-1, -1, 3)) @ rotation
        copy = copy + noise * torch.randn(copy.shape, generator=generator)
        start = time.perf_counter()
        result = solve_gromov_batch(torch.cdist(copy, copy), torch.cdist(points, points), reg=0.05, max_iter=100, max_iter_inner=100)
        right = (result.plan.argmax(-1) == order).float().mean()
        seconds = time.perf_counter() - start
        print(
            f"noise {noise:.2f}: {right:.0%} of the points matched right, mean distortion {result.value.mean():.4f}, {1e3 * seconds:.0f} ms"
        )


if __name__ == "__main__":
    main()
