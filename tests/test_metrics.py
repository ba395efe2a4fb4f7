"""The six metrics: against pyldl, against their formulas by hand, at the edges, and over processes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import helo_fast
from helo_fast.train.metrics import FUNCTIONS, HIGHER_IS_BETTER, KL, KL_FLOOR, canberra, clark, emotion_metrics, intersection, kl

PYLDL_NAMES = {name: name for name in FUNCTIONS} | {"kl": "kl_divergence"}


def distributions(rows: int, k: int, seed: int = 0) -> torch.Tensor:
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.dirichlet(np.full(k, 0.7), size=rows)).clamp_min(1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("k", [2, 9, 10])
def test_equals_pyldl(name, k):
    reason = "pip install --no-deps python-ldl (its metrics need numpy, scipy and scikit-learn only)"
    metrics = pytest.importorskip("pyldl.metrics", reason=reason)
    p, q = (x / x.sum(1, keepdim=True) for x in (distributions(200, k, 1), distributions(200, k, 2)))
    expected = getattr(metrics, PYLDL_NAMES[name])(p.numpy(), q.numpy(), reduction=None)
    torch.testing.assert_close(FUNCTIONS[name](p, q), torch.from_numpy(expected), rtol=1e-12, atol=1e-14)
    metric = emotion_metrics()[name]
    for some in (slice(0, 7), slice(7, 200)):
        metric.update(preds=q[some], target=p[some])
    torch.testing.assert_close(metric.compute(), torch.tensor(expected.mean()), rtol=1e-12, atol=0)


def test_by_hand():
    p, q = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64), torch.tensor([0.2, 0.3, 0.1, 0.4], dtype=torch.float64)
    expected = {
        "chebyshev": 0.4,
        "clark": math.sqrt((0.3 / 0.7) ** 2 + (0.1 / 0.3) ** 2 + 1),
        "canberra": 0.3 / 0.7 + 0.1 / 0.3 + 1,
        "kl": 0.5 * math.log(0.5 / 0.2) + 0.2 * math.log(2),
        "cosine": (0.1 + 0.09 + 0.02) / math.sqrt(0.38 * 0.30),
        "intersection": 0.6,
    }
    for name, function in FUNCTIONS.items():
        assert float(function(p, q)) == pytest.approx(expected[name], rel=1e-12), name


def test_zeros():
    p, q = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 0.0])
    assert clark(p, q) == pytest.approx(math.sqrt(2)) and canberra(p, q) == 2  # the 0/0 term counts 0
    assert kl(p, q) == pytest.approx(-math.log(torch.finfo(torch.float32).eps))  # the floor; terms with p = 0 are 0
    assert kl(p.double(), q.double()) == pytest.approx(-math.log(KL_FLOOR), rel=1e-12)  # of float32 in float64 too
    assert kl(p, p) == 0 and clark(p, p) == 0 and intersection(p, p) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_perfect_and_worst(dtype):
    p = torch.eye(4, dtype=dtype)
    for name, function in FUNCTIONS.items():
        same, other = function(p, p), function(p, p.roll(1, 0))
        assert same.dtype == dtype and same.shape == (4,) and torch.isfinite(other).all()
        assert (same == (1 if name in HIGHER_IS_BETTER else 0)).all(), name
        assert (other < same).all() if name in HIGHER_IS_BETTER else (other > same).all(), name


def test_direction_is_declared():
    assert {name for name, metric in emotion_metrics().items() if metric.higher_is_better} == HIGHER_IS_BETTER


def test_leading_axes():
    p, q = distributions(24, 5, 3), distributions(24, 5, 4)
    for function in FUNCTIONS.values():
        torch.testing.assert_close(function(p.view(2, 3, 4, 5), q.view(2, 3, 4, 5)).flatten(), function(p, q))


def test_every_sample_counts_once():
    # Uneven batches: the mean over samples, neither over batches nor over each batch's first sample.
    p, q = distributions(33, 6, 5), distributions(33, 6, 6)
    metrics = emotion_metrics()
    for some in torch.arange(33).split(8):
        metrics.update(preds=q[some], target=p[some])
    for name, value in metrics.compute().items():
        assert value == pytest.approx(float(FUNCTIONS[name](p, q).mean()), rel=1e-12)
    assert set(metrics.keys()) == set(FUNCTIONS)


def test_a_perfect_first_batch_does_not_merge_metrics():
    p, q = distributions(8, 4, 7), distributions(8, 4, 8)
    metrics = emotion_metrics()
    metrics.update(preds=p, target=p)
    metrics.update(preds=q, target=p)
    values = metrics.compute()
    for name in ("chebyshev", "clark", "canberra", "kl"):
        assert values[name] == pytest.approx(float(FUNCTIONS[name](p, q).mean()) / 2, rel=1e-9), name


def test_float64_sum_of_many_float32_samples():
    p, q = torch.tensor([[0.5, 0.5]]).expand(4096, 2), torch.tensor([[0.5 + 1e-4, 0.5 - 1e-4]]).expand(4096, 2)
    metric = emotion_metrics()["chebyshev"]
    for _ in range(64):
        metric.update(preds=q, target=p)
    assert metric.compute().dtype == torch.float64
    assert metric.compute() == pytest.approx(float(q[0, 0].double() - 0.5), rel=1e-12)


def test_prediction_and_label_cannot_be_swapped():
    p, q = distributions(4, 3, 1), distributions(4, 3, 2)
    with pytest.raises(TypeError):
        KL().update(q, p)
    metric = KL()
    metric.update(preds=q, target=p)
    assert metric.compute() == pytest.approx(float(kl(p, q).mean())) != pytest.approx(float(kl(q, p).mean()))


@pytest.mark.parametrize("shapes", [((4, 3), (4, 2)), ((3,), (3,)), ((2, 4, 3), (2, 4, 3))])
def test_wrong_shapes(shapes):
    with pytest.raises(ValueError, match=r"kl: preds and target: expected two \[B, K\]"):
        KL().update(preds=torch.ones(shapes[0]), target=torch.ones(shapes[1]))


PROCESS = """
import json, sys, torch, torch.distributed as dist
from helo_fast.train.metrics import emotion_metrics
rank, store, inputs = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
p, q = torch.load(inputs)
mine = slice(0, 5) if rank == 0 else slice(5, None)  # 5 and 18 samples: a mean of the two means would be wrong
metrics = emotion_metrics()
metrics.update(preds=q[mine], target=p[mine])
print(json.dumps({name: float(value) for name, value in metrics.compute().items()}))
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_agree_with_one(tmp_path):
    p, q = distributions(23, 5, 9), distributions(23, 5, 10)
    torch.save((p, q), tmp_path / "inputs.pt")
    environment = os.environ | {"PYTHONPATH": str(Path(helo_fast.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(tmp_path / "store"), str(tmp_path / "inputs.pt")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, error) in zip(processes, outputs):
        assert process.returncode == 0, error
        values = json.loads(out)
        assert values == {name: pytest.approx(float(function(p, q).mean()), rel=1e-12) for name, function in FUNCTIONS.items()}
