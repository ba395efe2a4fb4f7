"""The CUDA kernels of lcd_attention without a GPU: csrc/common compiled for the host, its lanes taking turns, against float64."""

import math

import pytest
import torch

from helo_fast.ops.attention import philox, reference
from helo_fast.testing import ATTENTION_BIASES, assert_close, attention_inputs

SOURCES = ("attention",)
DTYPES = (torch.float32, torch.float64)
HALVES = (torch.float16, torch.bfloat16)
FLAGS = ("plain", "sanitized")
STORAGE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # as cpu/view.h numbers them
P = {"dropkey_p": 0.5, "dropout_p": 0.3}
NONE = {"dropkey_p": 0.0, "dropout_p": 0.0}
SEED = 17


def layout(shape, strides, entries, offset=0):
    """Entries, offset and strides of [B, H, rows, columns], 0 along what is broadcast."""
    return torch.tensor([entries, offset, *(0 if size == 1 else stride for size, stride in zip(shape[:2], strides)), *strides[2:]])


def given(t):
    """A tensor's layout and the storage under it."""
    if t is None:
        return torch.zeros(6, dtype=torch.int64), torch.empty(0)
    t = t.detach()
    memory = t.as_strided((t.untyped_storage().nbytes() // t.itemsize,), (1,), 0)
    return layout(t.shape, t.stride(), memory.numel(), t.storage_offset()), memory.view(torch.uint8)


def wanted(shape, dtype, heads_inside=True):
    """(layout, what the program is asked for) of a result, in the memory of [B, rows, H, columns] or as it stands."""
    B, H, n, d = shape
    strides = (n * H * d, d, H * d, 1) if heads_inside else (H * n * d, n * d, d, 1)
    return layout(shape, strides, B * H * n * d), ((B, n, H, d) if heads_inside else shape, dtype)


class Problem:
    """lcd_attention by the host's program, with the masks and the parts of the gradients that a caller chooses."""

    def __init__(self, program, q, k, v, bias=None, options=NONE, seed=SEED, scale=0.3, blocks=2):
        self.program, self.tensors, self.options, self.seed, self.scale, self.blocks = (
            program,
            (q, k, v, bias),
            options,
            seed,
            scale,
            blocks,
        )
        (self.B, self.H, self.m, self.d), self.n, self.dtype = k.shape, q.shape[2], q.dtype
        self.compute = reference.compute_dtype(q.dtype)

    def reference_arguments(self, dtype):
        tensors = (t if t is None else t.detach().to(dtype) for t in self.tensors)
        return (*tensors, torch.tensor(self.seed), self.scale, *self.options.values())

    def run(self, tensors, results, backward, parts=(1, 1), adds=(False, False, False)):
        drop, cut = philox.dropkey_threshold(self.options["dropkey_p"]), philox.dropout_threshold(self.options["dropout_p"])
        sizes = [self.B, self.H, self.n, self.m, self.d, STORAGE.index(self.dtype), drop + cut > 0, self.seed, drop, cut]
        sizes += [backward, *parts, *adds, self.blocks]
        factors = torch.tensor([self.scale, philox.dropout_rescale(self.options["dropout_p"])], dtype=torch.float64)
        parcels = [part for t in tensors for part in given(t)] + [place for place, _ in results]
        words = (self.compute, (torch.tensor(sizes), factors, *parcels), [asked for _, asked in results])
        return self.program((words[0],), *words[1:])

    def forward(self):
        results = wanted((self.B, self.H, self.n, self.d), self.dtype), wanted((self.B, self.H, self.n, 1), self.compute, False)
        out, lse = self.run(self.tensors, results, False)
        return out.transpose(1, 2), lse.squeeze(-1)

    def backward(self, grad_out, lse, batches=2):
        """dq, dk, dv, dbias; sums over `batches` parts of the batch where something is shared by it."""
        q, k, v, bias = self.tensors
        shared, over_batch, over_heads = (
            q.shape[0] != self.B,
            bias is not None and bias.shape[0] != self.B,
            bias is not None and bias.shape[1] != self.H,
        )
        b_parts = min(batches, self.B) if shared or over_batch else self.B
        h_parts = 1 if over_heads else self.H
        dq = wanted((b_parts if shared else self.B, self.H, self.n, self.d), self.compute if shared else self.dtype)
        dk, dv = (wanted(t.shape, self.dtype) for t in (k, v))
        adds = over_batch or over_heads
        shape = (b_parts if over_batch else self.B, h_parts if adds else self.H, self.n, self.m)
        dbias = (torch.zeros(6, dtype=torch.int64), ((0,), self.dtype))
        if bias is not None:
            dbias = wanted(shape, self.compute if adds else self.dtype, False)
        tensors = (*self.tensors, lse.unsqueeze(-1), grad_out)
        dq, dk, dv, dbias = self.run(tensors, (dq, dk, dv, dbias), True, (b_parts, h_parts), (shared, adds, over_batch))
        dq, dk, dv = (t.transpose(1, 2) for t in (dq, dk, dv))
        dq = dq.sum(0, keepdim=True).to(self.dtype) if shared else dq
        return dq, dk, dv, dbias if bias is None else dbias.sum_to_size(bias.shape).to(self.dtype)

    def compare(self, grad_out, what):
        """Forward and backward, held to twice the error of eager PyTorch in the same dtype."""
        ours, truth, eager = {}, {}, {}
        for results, dtype in ((truth, torch.float64), (eager, self.dtype)):
            arguments = self.reference_arguments(dtype)
            out, lse = reference.fwd(*arguments)
            grads = reference.bwd(grad_out.to(dtype), *arguments[:4], out, lse, *arguments[4:], self.tensors[3] is not None)
            results.update(zip(("out", "lse", "dq", "dk", "dv", "dbias"), (out, lse, *grads)))
        out, lse = self.forward()
        ours.update(zip(("out", "lse", "dq", "dk", "dv", "dbias"), (out, lse, *self.backward(grad_out, lse))))
        flat = truth["lse"] <= reference.DROPPED
        for results in (ours, truth, eager):
            results["lse"] = torch.where(flat, results["lse"] / reference.DROPPED, results["lse"])
        for name, exact in truth.items():
            if exact is not None:
                assert_close(ours[name], exact, eager[name], f"{what} {name}")
        return ours


def problem(program, B, H, n, m, d, bias="B H n m", shared=False, dtype=torch.float32, options=P):
    inputs, grad_out = attention_inputs(B, H, n, m, d, bias, shared, dtype)
    q, k, v, *rest = (t.detach() for t in inputs)
    added = rest[0] if rest else None
    return Problem(program, q, k, v, added if added is None or added.dim() == 4 else added[None, None], options), grad_out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size(dtype, programs):
    """Every grid of lanes, full and with a remainder; head dimensions of whole pieces and not, past one pass of columns, the largest."""
    program = programs("attention", "plain")
    single = dtype == torch.float32
    sizes = [
        (1, 1, 1),
        (5, 5, 8),
        (20, 18, 32),
        (10, 10, 128),
        (24, 3, 7),
        (36, 36, 32),
        (33, 21, 40),
        (37, 35, 5),
        (64, 64, 128),
        (2, 61, 33),
    ]
    for n, m, d in sizes if single else [(1, 1, 1), (36, 36, 32), (56, 56, 64), (3, 51, 33)]:
        case, grad_out = problem(program, 1 if max(n, m) > 36 or not single else 2, 2 if single else 1, n, m, d, dtype=dtype)
        case.compare(grad_out, f"{n} x {m} x {d}")


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("dtype", (*DTYPES, *HALVES), ids=str)
def test_sums_over_what_was_broadcast(dtype, flags, programs):
    """Own and shared queries and biases, in more parts than one and in uneven ones; with and without masks."""
    program = programs("attention", flags)
    quick = dtype != torch.float32 or flags == "sanitized"
    for bias in ("none", "n m", "B 1 n m") if quick else ATTENTION_BIASES:
        for shared in (False, True):
            for options in (P,) if quick else (NONE, P):
                for d in (8,) if dtype == torch.float64 else (6, 8):
                    case, grad_out = problem(program, 3 if d == 6 else 1 + (not quick), 2, 5, 7, d, bias, shared, dtype, options)
                    case.compare(grad_out, f"{bias} {shared} {options} {d}")


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=str)
def test_strides(dtype, flags, programs):
    """Any layout gives the bits of the contiguous one: on odd addresses, every second entry, columns apart, nothing apart."""
    program = programs("attention", flags)
    case, grad_out = problem(program, 2, 2, 5, 6, 8, dtype=dtype)
    out, lse = case.forward()
    expected = [out, *case.backward(grad_out, lse)]

    def sliced(x):
        memory = torch.full([2 * s + 1 for s in x.shape], math.nan, dtype=x.dtype)
        return memory[tuple(slice(1, None, 2) for _ in x.shape)].copy_(x)

    def shifted(x):
        return torch.cat([x.new_full((3,), math.nan), x.flatten()])[3:].view(x.shape)

    for move in (sliced, shifted, lambda x: x.mT.contiguous().mT, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)):
        tensors = [move(t) for t in case.tensors]
        moved = Problem(program, *tensors, case.options)
        for actual, e in zip([moved.forward()[0], *moved.backward(move(grad_out), lse)], expected):
            assert torch.equal(actual, e)
    one = torch.ones(1, 1, 1, 1, dtype=dtype).expand(2, 2, 5, 8)
    assert torch.equal(case.backward(one, lse)[0], case.backward(one.contiguous(), lse)[0])


def test_philox_words(programs):
    """Of the common header, those of the layout in Python, whatever the index."""
    cases = [(seed, p) for seed in (0, -1, 2**63 - 1, 0x123456789ABCDEF) for p in (0, 7, 2**32 - 1, 2**40 + 3)]
    counters = torch.tensor([(seed, p, row, block) for seed, p in cases for row in range(3) for block in range(2)])
    program = programs("attention", "plain")
    (found,) = program(("philox",), (torch.tensor([len(counters)]), counters), [((len(cases), 3, 2, 4), torch.int32)])
    for (seed, p), words in zip(cases, found):
        expected = torch.stack(philox.words(torch.tensor(seed), torch.tensor([p]), 3, 8), -1)[0]
        assert torch.equal(words.long() & 0xFFFFFFFF, expected)


@pytest.mark.parametrize("n, m, dtype", ((5, 7, torch.float32), (36, 36, torch.float32), (64, 64, torch.float32), (9, 33, torch.float64)))
def test_masks_are_those_of_the_layout_bit_for_bit(n, m, dtype, programs):
    """Equal logits and v = 1: a weight shows in the output, and in the gradient of v, as 0 or not."""
    B, H, seed, options = 2, 2, 0x123456789ABCDEF, {"dropkey_p": 0.37, "dropout_p": 0.41}
    drop, keep = philox.masks(torch.tensor(seed), philox.problems(range(B), range(H), H, torch.device("cpu")), n, m, *options.values())
    flat = drop.all(-1, keepdim=True)
    expected = (~drop | flat) & keep
    zeros, eye = torch.zeros(B, H, max(n, m), m, dtype=dtype), torch.eye(m, dtype=dtype).expand(B, H, m, m)
    case = Problem(programs("attention", "plain"), zeros[:, :, :n], zeros[:, :, :m], eye, None, options, seed)
    out, lse = case.forward()
    assert torch.equal(out != 0, expected)
    if n <= m:
        dv = case.backward(torch.eye(n, m, dtype=dtype).expand(B, H, n, m), lse)[2]
        assert torch.equal(dv[..., :n] != 0, expected.mT)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf, -1e12, -3e38))
def test_special_biases_as_in_the_reference(value, flags, programs):
    """One entry of row 0, most of row 1, all of row 2; every key dropped."""
    case, grad_out = problem(programs("attention", flags), 1, 2, 5, 6, 4)
    q, k, v, bias = case.tensors
    bias[:, :, 0, 2] = bias[:, :, 1, :5] = bias[:, :, 2] = value
    for options in (NONE, P, {"dropkey_p": 1.0, "dropout_p": 0.0}):
        case = Problem(case.program, q, k, v, bias, options)
        arguments = case.reference_arguments(torch.float32)
        out, lse = reference.fwd(*arguments)
        expected = out, lse, *reference.bwd(grad_out, *arguments[:4], out, lse, *arguments[4:], True)
        actual = case.forward()
        for a, e in zip((*actual, *case.backward(grad_out, actual[1])), expected, strict=True):
            torch.testing.assert_close(a, e, equal_nan=True, rtol=1e-4, atol=1e-5)
        if options["dropkey_p"] == 1.0 and not math.isfinite(value):
            continue
        assert options["dropkey_p"] < 1 or not any(t[..., 3:, :].any() for t in case.backward(grad_out, actual[1])[:1])


def test_heads_are_apart(programs):
    """The share of a block changes nothing; nor, where nothing is shared, do the other heads."""
    program = programs("attention", "plain")
    case, grad_out = problem(program, 3, 2, 19, 17, 12, "n m", True)
    out, lse = case.forward()
    expected = [out, lse, *case.backward(grad_out, lse)]
    for blocks in (1, 5, 7):
        case.blocks = blocks
        out, lse = case.forward()
        assert all(map(torch.equal, expected, [out, lse, *case.backward(grad_out, lse)]))
