"""Calls that go straight to the implementation, those that must not, and that both give the same."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import helo_fast
from helo_fast.ops import _library
from helo_fast.ops.residual_norm import residual_norm

CALLS: dict[str, Callable[[Tensor], Tensor]] = {  # op: a call of one tensor [1, n, d]
    "sinkhorn_fwd": lambda x: helo_fast.sinkhorn(x, max_iter=3).plan,
    "gromov_wasserstein_fwd": lambda x: helo_fast.gromov_wasserstein(x, x, outer_iter=1).gw_cost,
    "gromov_from_tokens_fwd": lambda x: helo_fast.gromov_from_tokens(x, x, outer_iter=1).gw_cost,
    "lcd_attention_fwd": lambda x: helo_fast.lcd_attention(x[None], x[None], x[None])[0],
    "residual_norm_fwd": lambda x: residual_norm(x, x, x[0, 0], x[0, 1]),
}
EVERY_CALL = pytest.mark.parametrize("op", CALLS)


class Silent(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.ops.append(function)
        return function(*args, **(kwargs or {}))


class Named(Tensor):
    """With torch's own __torch_function__: results are of this class."""


@pytest.fixture
def x():
    return torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def direct(monkeypatch):
    """The ops that ran without the dispatcher, in order."""
    names = []
    for name, implementation in list(_library._implementations.items()):

        def run(*arguments, name=name, implementation=implementation):
            names.append(name)
            return implementation(*arguments)

        monkeypatch.setitem(_library._implementations, name, run)
    return names


def overload(op: str):
    return getattr(torch.ops.helo_fast, op).default


def watched(call: Callable, *arguments: object):
    """The call's result by way of the dispatcher."""
    with Seen():
        return call(*arguments)


@EVERY_CALL
@pytest.mark.parametrize("mode", (contextlib.nullcontext, torch.no_grad, torch.inference_mode))
def test_plain_calls_go_straight(op, mode, x, direct):
    with mode():
        actual = CALLS[op](x)
    assert direct == [op]
    assert type(actual) is Tensor and not actual.requires_grad and torch.equal(actual, watched(CALLS[op], x))
    assert direct == [op]


@EVERY_CALL
@pytest.mark.parametrize("leaf", (lambda x: x.clone().requires_grad_(), torch.nn.Parameter), ids=("tensor", "parameter"))
def test_gradients_are_those_of_the_dispatcher(op, leaf, x, direct):
    x = leaf(x)
    actual, expected = CALLS[op](x), watched(CALLS[op], x)
    weight = torch.rand(actual.shape, generator=torch.Generator().manual_seed(1))
    gradient = torch.autograd.grad(actual, x, weight)[0]
    assert direct[0] == op and len(direct) == 2 and direct[1].endswith("_bwd")
    assert torch.equal(actual, expected) and torch.equal(gradient, watched(torch.autograd.grad, expected, x, weight)[0])
    assert len(direct) == 2
    second = torch.autograd.grad(CALLS[op](x), x, weight, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="no second derivative"):
        second.sum().backward()


@EVERY_CALL
def test_modes_take_the_dispatcher(op, x, direct):
    expected = CALLS[op](x)
    direct.clear()
    with Seen() as seen:
        assert torch.equal(CALLS[op](x), expected)
    assert seen.ops.count(overload(op)) == 1
    with Silent():
        assert torch.equal(CALLS[op](x), expected)
    with torch.profiler.profile() as profile:
        assert torch.equal(CALLS[op](x), expected)
    assert f"helo_fast::{op}" in {event.key for event in profile.key_averages()}
    with FakeTensorMode() as mode:
        assert CALLS[op](mode.from_tensor(x)).shape == expected.shape
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert CALLS[op](x).shape == expected.shape
    with forward_ad.dual_level():
        assert torch.equal(CALLS[op](x), expected)
    assert not direct


@EVERY_CALL
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_transforms_and_tracers_take_the_dispatcher(op, x, direct):
    many = torch.cat((x, x.flip(-1)))
    expected = torch.stack([CALLS[op](each[None]) for each in many])
    direct.clear()
    assert torch.allclose(torch.vmap(lambda each: CALLS[op](each[None]))(many), expected, atol=1e-6)

    traced = make_fx(CALLS[op])(x)
    assert [node.target for node in traced.graph.nodes].count(overload(op)) == 1
    assert torch.equal(traced(x), expected[0])

    graphs = []
    compiled = torch.compile(CALLS[op], fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph)
    assert torch.equal(compiled(x), expected[0])
    (graph,) = graphs
    assert [str(node.target).removesuffix(".default") for node in graph.graph.nodes].count(f"helo_fast.{op}") == 1
    assert not direct


@EVERY_CALL
def test_forward_mode_is_refused(op, x):
    with pytest.raises(NotImplementedError, match=f"{op} has no forward-mode derivative; use reverse mode"):
        torch.func.jvp(CALLS[op], (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        CALLS[op](forward_ad.make_dual(x, x))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jacfwd(CALLS[op])(x)


@pytest.mark.parametrize(
    "call",
    (
        lambda x: helo_fast.sinkhorn(x, x.new_full((4,), 0.25), max_iter=3).plan,
        lambda x: helo_fast.sinkhorn(x, n_rows=torch.full_like(x[:, 0, 0], 3, dtype=torch.int64), max_iter=3).plan,
        lambda x: helo_fast.gromov_wasserstein(x, x, x.new_full((4,), 0.25), outer_iter=1).plan,
    ),
    ids=("marginal", "count", "gromov"),
)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_values_are_checked_where_there_are_any(call, x):
    expected = call(x)
    with FakeTensorMode() as mode:
        assert call(mode.from_tensor(x)).shape == expected.shape
    assert torch.equal(make_fx(call, tracing_mode="fake")(x)(x), expected)
    assert call(x.to("meta")).shape == expected.shape
    assert torch.allclose(torch.vmap(lambda each: call(each[None]))(x), expected[None], atol=1e-6)


@EVERY_CALL
def test_tensors_that_are_more_than_memory_take_the_dispatcher(op, x, direct):
    expected = CALLS[op](x)
    direct.clear()
    named = CALLS[op](x.as_subclass(Named))
    assert type(named) is Named and torch.equal(named.as_subclass(Tensor), expected)
    two = CALLS[op](TwoTensor(x, x.clone()))
    assert type(two) is TwoTensor and torch.equal(two.a, expected)
    assert CALLS[op](x.to("meta")).shape == expected.shape
    negative = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negative.is_neg() and torch.equal(CALLS[op](negative), expected)
    assert not direct


@pytest.mark.parametrize("backend", ("eager", "cpp"))
def test_uniform_marginals_need_not_be_given_to_the_op(backend, x, device_for):
    device_for("sinkhorn", backend)
    given = torch.full((1, 4), 0.25)
    options = (0.1, 5, None, 10, None, None, "implicit", backend)
    results = (torch.ops.helo_fast.sinkhorn_fwd(x, *marginals, *options) for marginals in ((None, None), (given, given)))
    for actual, expected in zip(*results):
        assert torch.equal(actual, expected)
    torch.library.opcheck(overload("sinkhorn_fwd"), (x.requires_grad_(), None, None, *options))
