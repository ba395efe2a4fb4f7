"""A whole training step of the released preset on a GPU: run plainly, compiled, and as a CUDA graph, in float32 and under bfloat16
autocast; with fused Adam, counted in launches; and the largest batch that trains.

``auto`` holds no GPU back end before a results file is committed, so the package's members here are orders that ``auto`` might get:
"triton first", "cuda first". What serves each operator is recorded.
"""

from __future__ import annotations

import contextlib
import gc
import re
import time
from collections.abc import Callable, Iterable, Iterator
from unittest import mock

import torch
from torch import Tensor

from helo_fast import _registry
from helo_fast.testing import assert_close

from .gpu_ops import brief, failure, peak_bytes, time_ms
from .steps import TrainingStep

PRESET = "released"
ORDERS = {
    "cuda": {"triton first": ("triton", "cuda", "eager"), "cuda first": ("cuda", "triton", "eager")},
    "cpu": {"cpp first": ("cpp", "eager")},
}
CHECKED = 128  # the batch at which a member's answer is held to the reference's; larger ones are the same code
LAUNCHES = re.compile(r"cu(da)?(LaunchKernel|LaunchKernelExC?|LaunchCooperativeKernel|GraphLaunch)$")
ANNOTATION = re.compile(r"Memcpy|Memset|Torch-Compiled Region|## Call|ProfilerStep")
# Between ways of running the same step with the same masks, of the norm of (loss, gradients): rounding in another order.
CLOSE = {"float32": (1e-4, 1e-3), "bfloat16": (1e-2, 5e-2)}
# What matters most comes first; the least seconds that are worth beginning with.
RUNS = (
    ("plain", "float32", 3),
    ("graph", "float32", 3),
    ("plain", "bfloat16", 3),
    ("graph", "bfloat16", 3),
    ("compiled", "float32", 20),
)
SYNCHRONISES = re.compile("synchroniz", re.IGNORECASE)  # in the error that torch raises


@contextlib.contextmanager
def auto_order(member: str, device: str) -> Iterator[None]:
    """Inside, ``auto`` tries back ends in the member's order; "eager" is alone."""
    order = ORDERS[device].get(member, ("eager",))
    with mock.patch.dict(_registry._auto, {op: {**by_device, device: order} for op, by_device in _registry._auto.items()}):
        yield


def choices(member: str, device: str) -> dict[str, str]:
    with auto_order(member, device):
        return {op: _registry.auto_choice(op, torch.empty(0, device=device)) for op in _registry._auto}


def members(device: str) -> Iterator[tuple[str, str | None]]:
    """(member, why it is not measured): one that serves as another does, or on eager alone, is left out."""
    seen: list[tuple[str, dict]] = []
    for member in ORDERS[device]:
        found = choices(member, device)
        same = next((other for other, served in seen if served == found), None)
        seen.append((member, found))
        alone = "no back end but eager serves here" if set(found.values()) == {"eager"} else None
        yield member, alone or (f"it serves as {same} does" if same else None)
    yield "eager", None


def measure(batches: Iterable[int], device: str, seconds: float, quick: bool, most: float) -> Iterator[dict]:
    """A row for each way of running the step, batch size and member.

    Args:
        batches: the sizes.
        device: "cuda" or "cpu".
        seconds: of timing, for each row.
        quick: nothing is compiled.
        most: seconds that there are for all of it.
    """
    end = time.monotonic() + most
    ready = []
    for member, reason in members(device):
        if reason is None:
            reason = wrong(member, device, CHECKED if device == "cuda" else 4)
        if reason is not None:
            yield {"member": member, **reason} if isinstance(reason, dict) else {"member": member, "reason": reason}
        else:
            ready.append(member)
    for mode, dtype, least in RUNS:
        for batch in batches:
            for member in ready:
                row = {"batch": batch, "member": member, "mode": mode, "dtype": dtype}
                if mode == "graph" and device == "cpu":
                    yield row | {"reason": "a CPU has no CUDA graphs"}
                elif mode == "compiled" and quick:
                    yield row | {"reason": "a quick run compiles nothing"}
                elif quick and dtype == "bfloat16" and member == "eager":
                    yield row | {"reason": "a quick run leaves out what some CPUs have no instructions for"}
                elif time.monotonic() > end - least:
                    yield row | {"reason": "the part's time is used up"}
                else:
                    yield row | one(mode, dtype, batch, member, device, seconds)
                gc.collect()
                torch.cuda.empty_cache()


def one(mode: str, dtype: str, batch: int, member: str, device: str, seconds: float) -> dict:
    """The times of one way of running the step, and its kernels; a failure counts where the member is the package's own."""
    own = member != "eager"
    try:
        with auto_order(member, device):
            step = TrainingStep(PRESET, f"auto{' bfloat16' if dtype == 'bfloat16' else ''}", batch, device)
            run = MODES[mode](step, dtype, own)
            loss = run()
            assert loss.isfinite().item(), f"the loss is {loss.item()}"
            row = {"loss": loss.item(), **time_ms(run, device, seconds), "peak_bytes": peak_bytes(run, device)}
            row |= {**kernels_a_step(run, device), "serves": choices(member, device)}
            training = with_adam(step, mode)
            row |= {f"{name}_with_adam": number for name, number in kernels_a_step(training, device).items()}
            return row | (synchronisation(training, device, own) if mode == "plain" else {})
    except Exception as error:
        return {"reason": brief(error)} if not own and mode != "plain" else failure(error)


def plain(step: TrainingStep, dtype: str, compared: bool) -> Callable[[], Tensor]:
    return step


def compiled(step: TrainingStep, dtype: str, compared: bool) -> Callable[[], Tensor]:
    # fallback_random: the seeds that torch's own generator gives, so that the answers can be compared
    expected = step.answer() if compared else None
    step.loss = torch.compile(step.model.loss, dynamic=False, options={"fallback_random": True})
    if compared:
        close(step.answer(), expected, dtype)
    return step


def graph(step: TrainingStep, dtype: str, compared: bool) -> Callable[[], Tensor]:
    """Zeroed gradients, forward and backward, replayed."""
    if compared:
        expected = step.answer()
        replay = capture(lambda: step._step(label_embedding=step.label_embedding))
        torch.manual_seed(2)
        loss = replay()
        close((loss, torch.cat([p.grad.flatten() for p in step.model.parameters() if p.grad is not None])), expected, dtype)
    return capture(step)


MODES = {"plain": plain, "graph": graph, "compiled": compiled}


def with_adam(step: TrainingStep, mode: str) -> Callable[[], Tensor]:
    """The step and the optimiser's; in one graph if mode is "graph". Run once already, and it has moved the parameters."""
    parameters = [p for p in step.model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, fused=True, capturable=parameters[0].is_cuda)

    def both() -> Tensor:
        loss = step()
        optimiser.step()
        return loss

    run = capture(both) if mode == "graph" else both
    before = parameters[0].detach().clone()
    run()
    assert not torch.equal(parameters[0], before), "Adam leaves the parameters as they are"
    return run


def synchronisation(run: Callable[[], object], device: str, required: bool) -> dict:
    """Whether the CPU never waits for the GPU in ``run``; where it does and must not, that is a failure, with torch's message."""
    if device == "cpu":
        return {"synchronises": None}
    run()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if not SYNCHRONISES.search(str(error)):
            raise
        found = {"synchronises": True, "message": brief(error)}
        return found | {"failed": True, "reason": f"a step synchronises: {brief(error)}"} if required else found
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return {"synchronises": False}


def capture(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Replays what the function does; what it returned is written anew by every replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is made once, is made before
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        result = function()

    def replay() -> Tensor:
        captured.replay()
        return result

    return replay


def close(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: str) -> None:
    for what, x, y, most in zip(("loss", "gradients"), actual, expected, CLOSE[dtype]):
        error = ((x.double() - y.double()).norm() / y.double().norm()).item()
        assert error <= most, f"{what} differ by {error:.3g} of their norm from those of the step run plainly"


def wrong(member: str, device: str, batch: int) -> dict | None:
    """A failure where the loss or the gradients are not the reference's, with masks by Philox, which are the same on every back end."""
    # Some layers' dropout is torch's on a GPU, whose draws differ between dtypes.
    options = {"rng": "philox", **({"dropout": 0.0} if device == "cuda" else {})}

    def answer(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        with auto_order(name, device):
            return TrainingStep(PRESET, "auto", batch, device, dtype=dtype, **options).answer()

    try:
        exact, eager, actual = answer("eager", torch.float64), answer("eager"), answer(member)
        torch.testing.assert_close(actual[0].double(), exact[0], rtol=1e-6, atol=0)
        assert_close(actual[1], exact[1], eager[1], what="gradients")
    except Exception as error:
        return failure(error)
    return None


def kernels_a_step(run: Callable[[], object], device: str, steps: int = 3) -> dict[str, float | None]:
    """Kernels that ran on the GPU, and launches that the CPU made (a graph is one), a step."""
    if device == "cpu":
        run()
        return {"kernels": None, "launches": None}
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            run()
        torch.cuda.synchronize()
    return count(((event.name, event.device_type == DeviceType.CUDA) for event in found.events()), steps)


def count(events: Iterable[tuple[str, bool]], steps: int) -> dict[str, float]:
    """From (name, whether it ran on the GPU) of each event."""
    kernels = launches = 0
    for name, on_gpu in events:
        kernels += on_gpu and not ANNOTATION.match(name)
        launches += not on_gpu and LAUNCHES.match(name) is not None
    return {"kernels": kernels / steps, "launches": launches / steps}


def largest(fits: Callable[[int], bool], start: int, cap: int, end: float) -> tuple[int, int | None, str]:
    """(largest batch that fits, smallest that does not, why the search ended): doubled from ``start``, then halved in to 3 %.

    Args:
        fits: tries a batch size.
        start: the first.
        cap: none above it is tried.
        end: time.monotonic() after which no other is tried.
    """
    good, bad, batch = 0, None, start
    while True:
        if time.monotonic() > end:
            return good, bad, "time used up"
        if fits(batch):
            good = batch
        else:
            bad = batch
        if bad is None:
            if good >= cap:
                return good, bad, "cap reached"
            batch = min(2 * good, cap)
        elif bad - good <= max(0.03 * bad, 1):
            return good, bad, "found"
        else:
            batch = (good + bad) // 2


def largest_batches(device: str, seconds: float, quick: bool) -> Iterator[dict]:
    """A row for each member: the largest batch whose step runs in the GPU's memory."""
    start, cap = (2, 8) if quick else (1024, 2**24)
    ready = [member for member, reason in members(device) if reason is None]
    for member in ready:
        try:
            with auto_order(member, device):
                step = TrainingStep(PRESET, "auto", start, device)
                good, bad, stopped = largest(
                    lambda batch, step=step: trains(step, batch), start, cap, time.monotonic() + seconds / len(ready)
                )
            yield {"member": member, "largest": good, "too_large": bad, "stopped": stopped}
        except Exception as error:
            yield {"member": member, **failure(error)}


def trains(step: TrainingStep, batch: int) -> bool:
    """One step with the inputs repeated to ``batch``; False where the GPU's memory does not hold it."""
    whole = step.batch
    try:
        step.batch = [t.repeat(-(-batch // len(t)), *[1] * (t.dim() - 1))[:batch] for t in whole]
        loss = step()
        return bool(loss.isfinite())
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error):
            return False
        raise
    finally:
        step.batch = whole
        step.model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
