"""Where does a training step's time go? Read from a trace of torch's profiler, by kind of kernel."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

KINDS = (
    ("attention", ("flash", "fmha", "attention", "sdpa")),
    ("optimizer", ("adam", "multi_tensor_apply", "foreach")),
    ("normalisation", ("norm", "moments", "welford")),
    (
        "matrix products",
        ("gemm", "cutlass", "xmma", "nvjet", "conv", "wgrad", "dgrad", "::mm", "addmm", "bmm"),
    ),
    ("copies", ("copy", "memcpy", "memset", "cat", "transpose", "::fill_", "::zero_")),
)
"""Kinds with what their kernels' names contain, in lower case; the first that matches counts."""
OTHER, IDLE = "other", "idle"


@dataclass(frozen=True, kw_only=True)
class Span:
    """A kernel's time on the device, in microseconds."""

    name: str
    start: float
    end: float


def step_profile(run: Callable[[], None], seconds: float | None = None) -> dict[str, Any]:
    """`busy_share` of a run's time, and its `share_of_time` by kind; with `idle` they sum to 1. Call `run` before.

    On CUDA a span is a kernel, a copy or a fill. Their time is over `seconds`, what a run takes without the profiler:
    it slows the host, so that a device that waits for the host would seem idler than it is. For the same reason it
    traces the device alone. Without CUDA a span is an operator's own time, over the run's within the profiler.
    """
    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as trace:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    if not on_gpu:
        return shares(_operators(trace))
    return shares(_kernels(trace), None if seconds is None else seconds * 1e6)


def shares(spans: Sequence[Span], whole: float | None = None) -> dict[str, Any]:
    """Shares of `whole` microseconds (None: from the first span's start to the last one's end).

    Raises ValueError without spans.
    """
    if not spans:
        raise ValueError("the profiler saw no kernel: is another program profiling on this device?")
    if whole is None:
        whole = max(span.end for span in spans) - min(span.start for span in spans)
    busy = min(1.0, covered(spans) / whole)
    by_kind: defaultdict[str, float] = defaultdict(float)
    for span in spans:
        by_kind[kind_of(span.name)] += span.end - span.start
    # Kernels of two streams overlap: their times sum to more than the time that the device is busy.
    summed = sum(by_kind.values())
    named = {kind: round(busy * by_kind[kind] / summed, 4) for kind in (*(kind for kind, _ in KINDS), OTHER)}
    return {"busy_share": round(busy, 4), "share_of_time": named | {IDLE: round(1 - busy, 4)}}


def covered(spans: Iterable[Span]) -> float:
    """Microseconds in which at least one span runs."""
    total, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return total


def kind_of(name: str) -> str:
    """The kind of a kernel or operator, by its name."""
    lower = name.lower()
    return next((kind for kind, parts in KINDS if any(part in lower for part in parts)), OTHER)


def _kernels(trace: Any) -> list[Span]:
    return [
        _span(event)
        for event in trace.events()
        # Annotations are mirrored on the device and span its pauses.
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]


def _operators(trace: Any) -> list[Span]:
    return [span for event in trace.events() if event.name.startswith("aten::") for span in _own(event)]


def _own(event: Any) -> Iterator[Span]:
    """An operator's time outside the operators that it calls."""
    begun = event.time_range.start
    for called in sorted(event.cpu_children, key=lambda child: child.time_range.start):
        yield Span(name=event.name, start=begun, end=called.time_range.start)
        begun = called.time_range.end
    yield Span(name=event.name, start=begun, end=event.time_range.end)


def _span(event: Any) -> Span:
    return Span(name=event.name, start=event.time_range.start, end=event.time_range.end)
