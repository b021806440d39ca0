"""Hidden states of a few prompts by the trained text encoder, kept beside its weights to verify the export.

Weights are no proof of each other: the change of the identifier's embedding is added in training and put into the table
at the export, and a table that is written wrong is stored, read again and compared without a difference. So the
hidden states travel with the weights.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from dreambooth.config.subject import PromptTemplates, Subject
from dreambooth.models.building import BUILDING
from dreambooth.models.families import Family, Tensors
from dreambooth.models.tied_weights import load_parameters

_TOKENS, _ENCODED = "probe.tokens.", "probe.encoded."


class Identifier(Protocol):
    """The identifier's embedding, as training has it."""

    def added_to(self, text_encoder: nn.Module, change: Tensor) -> None:
        """Add `change` to the embeddings of another text encoder of this kind."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Tokens of prompts, and what the trained text encoders make of them (`Family.encode_with`)."""

    tokens: Tensors
    encoded: Tensors


class Trained(dict[str, Tensor]):
    """Trained weights by name with a probe; `probe` is None if training runs no text encoder."""

    probe: Probe | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a plain dict without the probe, which `torch.load` accepts with weights_only."""
        return OrderedDict, (), None, None, iter(self.items())

    def as_tensors(self) -> dict[str, Tensor]:
        """Weights and probe as named tensors for a file; `from_tensors` is the inverse."""
        if self.probe is None:
            return self
        tokens = {f"{_TOKENS}{name}": tensor for name, tensor in self.probe.tokens.items()}
        return {**self, **tokens, **{f"{_ENCODED}{name}": tensor for name, tensor in self.probe.encoded.items()}}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `as_tensors`."""
        trained = cls({name: one for name, one in tensors.items() if not name.startswith((_TOKENS, _ENCODED))})
        if encoded := _below(_ENCODED, tensors):
            trained.probe = Probe(tokens=_below(_TOKENS, tensors), encoded=encoded)
        return trained


def _below(start: str, tensors: Mapping[str, Tensor]) -> Tensors:
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 3e-1}
"""The largest relative difference of a hidden state that rounding the weights to a dtype may make. On the miniature it
makes less than 1e-6, 6e-4 and 6e-3, and deeper encoders more; a change that is folded wrong is seen before rounding."""


def probe_prompts(subject: Subject, templates: PromptTemplates) -> list[str]:
    """The two prompts of training, and the identifier in two other places; without one the class prompt alone."""
    identifier = subject.identifier
    if identifier is None:
        return [templates.class_prompt(subject)]
    return [
        templates.instance_prompt(subject),
        templates.class_prompt(subject),
        identifier,
        f"a {subject.class_noun} on the beach and {identifier} in the snow",
    ]


def encoded_text(
    family: Family,
    folder: str,
    text_encoder: nn.Module,
    weights: Mapping[str, Tensor],
    tokens: Tensors,
    embedding: tuple[Identifier, Tensor] | None = None,
) -> Tensors:
    """What a text encoder like the one given, with these fp32 weights, makes of tokens (`Family.encode_with`).

    `embedding` is the identifier's and the change that it adds. The given module isn't run: its own weights may be
    sharded over ranks. The copy shares the memory of `weights`.
    """
    with BUILDING, torch.device("meta"):
        copy = type(text_encoder)(text_encoder.config)
    load_parameters(copy, weights, assign=True)
    for name, buffer in text_encoder.named_buffers():  # such as the positions, which no weights hold
        owner, _, own_name = name.rpartition(".")
        setattr(copy.get_submodule(owner), own_name, buffer.cpu())
    if embedding is not None:
        identifier, change = embedding
        identifier.added_to(copy, change)
    with torch.no_grad():
        return family.encode_with(folder, copy.eval(), tokens)


def largest_difference(found: Tensors, expected: Tensors) -> float:
    """Largest relative norm of a difference, over states (N, L, D) and pooled text (N, D)."""

    def of_one(found: Tensor, expected: Tensor) -> float:
        difference = (found.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1).clamp(min=1e-12)
        return float(difference.max())

    return max(of_one(found[name], tensor) for name, tensor in expected.items())
