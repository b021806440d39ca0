"""Steps of a denoiser that a GPU replays: captured once for each shape of a batch, and kept from batch to batch.

A step launches some thousand kernels, and a small batch leaves each too little to do for the host to prepare the next
meanwhile. A graph launches them at once. It reads and writes the addresses it was captured with, so inputs are copied
into tensors that stay, as keys and values of the text are, and weights have to be where they were: else it is captured
anew. On a CPU steps are called in place of a replay, with the same inputs: the same pictures, to the last bit.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.config.bounds import Graph
from dreambooth.fixed_tensors import CaptureMemory, FixedTensors, Replayed
from dreambooth.models.families import Family
from dreambooth.models.families.computed_once import KeptText

MOST_SHAPES = 4
"""Captures kept of a denoiser: of whole batches and the last one, with and without guidance. The oldest goes first."""


def graphs_for(wanted: Graph, device: str, say: Callable[[str], None]) -> "Graphs | None":
    """Graphs by a setting; None, after a word to `say` if they are wanted, where there can be none."""
    if wanted == "off":
        return None
    if not device.startswith("cuda"):
        say("there is no CUDA device")
        return None
    return Graphs(device, say)


class Graphs:
    """Captured steps of the denoisers of a process, for `sample`; `say` takes the reason of each failed capture.

    Captures share memory, as one replay ends before the next: so of two threads that sample at once, one has none. They
    go with their denoiser. `captures` counts steps made anew.
    """

    def __init__(
        self, device: str, say: Callable[[str], None] = lambda reason: None, replayed: type[Replayed] = Replayed
    ) -> None:
        self.captures = 0
        self._device, self._say, self._replayed = device, say, replayed
        self._memory = CaptureMemory(device)
        self._of: weakref.WeakKeyDictionary[nn.Module, _StepsOf] = weakref.WeakKeyDictionary()
        self._in_use = threading.Lock()

    @property
    def captured(self) -> int:
        """How many of the steps there are have been captured."""
        return sum(step.replayed.captured for of in self._of.values() for step in of.steps.values())

    def forget(self) -> None:
        """Free the memory of all captures."""
        self._of.clear()

    @contextmanager
    def replaying(self, family: Family, denoiser: nn.Module, *, guided: bool) -> Iterator[None]:
        """Within this context, of one batch, calls of `denoiser` are replays, and its text is computed once.

        `guided` as in `Family.computed_once`. Autocast, if it is on, has to be without its cache, whose casts of the
        weights a graph would read after they are gone.
        """
        if not self._in_use.acquire(blocking=False):
            with family.computed_once(denoiser, guided=guided):
                yield
            return
        plain, of = denoiser.forward, self._steps_of(denoiser)

        def forward(*arguments: Any, **named: Any) -> Any:
            if named.get("return_dict") is not False or not _is_plain((arguments, named)):
                return plain(*arguments, **named)
            kind = self._device.partition(":")[0]
            autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
            key = repr((guided, *autocast, _mapped((arguments, named), _described)))
            if (step := of.steps.pop(key, None)) is None:
                step, self.captures = self._new_step(family, guided), self.captures + 1
            of.steps[key] = step  # the last one used is last
            while len(of.steps) > MOST_SHAPES:
                of.steps.popitem(last=False)
            return (step(denoiser, plain, arguments, named),)

        try:
            denoiser.forward = forward
            yield
        finally:
            del denoiser.forward
            for step in of.steps.values():
                step.end_batch()
            self._in_use.release()

    def _steps_of(self, denoiser: nn.Module) -> "_StepsOf":
        """The steps of a denoiser whose weights lie where they did; else none."""
        weights = chain(denoiser.parameters(), denoiser.buffers())
        addresses = tuple((weight.data_ptr(), weight.stride()) for weight in weights)
        known = self._of.get(denoiser)
        if known is None or known.addresses != addresses:
            known = self._of[denoiser] = _StepsOf(addresses)
        return known

    def _new_step(self, family: Family, guided: bool) -> "_Step":
        return _Step(family, guided, self._device, lambda call: self._replayed(call, self._say, self._memory))


class _StepsOf:
    """A denoiser's steps by their inputs, with the addresses of its weights."""

    def __init__(self, addresses: tuple[Any, ...]) -> None:
        self.addresses = addresses
        self.steps: OrderedDict[str, _Step] = OrderedDict()


class _Step:
    """One call of a denoiser with inputs of certain shapes, all at fixed addresses."""

    def __init__(
        self, family: Family, guided: bool, device: str, replayed: Callable[[Callable[[], None]], Replayed]
    ) -> None:
        self._family, self._guided = family, guided
        self._tensors = FixedTensors(device)
        self._kept = KeptText()
        self._text: Tensor | None = None  # that the kept is of
        self._output: Tensor | None = None
        self._called: Callable[[], Tensor] | None = None  # none in between, as it holds the denoiser
        self.replayed = replayed(self._call)

    def __call__(
        self, denoiser: nn.Module, plain: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> Tensor:
        """The denoiser's output; the first step of a text computes what the others read."""
        names = (f"input {number}" for number in range(10_000))
        inputs, by_name = _mapped((arguments, named), lambda tensor: self._tensors.keep(next(names), tensor))
        text = named.get("encoder_hidden_states")
        first = self._output is None or (self._text is not text and self._kept.anything)
        self._kept.begin(by_name.get("encoder_hidden_states"), reading=not first)

        def called() -> Tensor:
            with self._family.computed_once(denoiser, guided=self._guided, kept=self._kept):
                [output] = plain(*inputs, **by_name)
            return output  # type: ignore[no-any-return]

        self._called = called
        try:
            if first:
                self._call()
            else:
                self.replayed()
        finally:
            self._called = None
        self._text = text
        assert self._output is not None
        return self._output.clone()  # which a scheduler may keep

    def _call(self) -> None:
        assert self._called is not None
        self._output = self._tensors.keep("output", self._called())

    def end_batch(self) -> None:
        """Forget the text: the next one may lie where it did."""
        self._text = None


def _mapped(value: Any, each: Callable[[Tensor], Any]) -> Any:
    """Arguments with every tensor replaced."""
    if isinstance(value, Tensor):
        return each(value)
    if isinstance(value, dict):
        return {name: _mapped(part, each) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(part, each) for part in value)
    return value


def _is_plain(value: Any) -> bool:
    """Whether arguments are tensors and constants that their text tells apart."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, Tensor | bool | int | float | str)


def _described(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype
