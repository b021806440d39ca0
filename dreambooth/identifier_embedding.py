"""The identifier's own token embedding, learnt faster than the text encoder around it.

Why apart? A rare token is one that the base model has hardly seen, and may have learnt to pass over: then the samples
with it are the samples without it, and nothing tells the two halves of a batch apart. A rate at which the one
embedding leaves its place within a few steps would ruin every other weight of the text encoder. So what is learnt fast
is a change that is added to the embeddings of the identifier's tokens alone, as Textual Inversion (arXiv 2208.01618)
learns them, and at the end it is put into the table of embeddings: the exported model is an ordinary one.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class IdentifierEmbedding(nn.Module):
    """`change` (N, D) is added to the embeddings of N tokens wherever they stand in a prompt.

    It starts at zero, or with `like` at what makes each of the N embeddings that of the token `like`.
    """

    token_ids: Tensor

    def __init__(self, text_encoder: nn.Module, token_ids: Sequence[int], *, like: int | None = None) -> None:
        super().__init__()
        table: nn.Embedding = text_encoder.get_input_embeddings()  # type: ignore[operator]
        self.change = nn.Parameter(torch.zeros(len(token_ids), table.embedding_dim))
        if like is not None:
            with torch.no_grad():
                self.change.copy_(table.weight[like] - table.weight[list(token_ids)])
        self.register_buffer("token_ids", torch.tensor(token_ids), persistent=False)
        self._table_name = next(name for name, weight in text_encoder.named_parameters() if weight is table.weight)
        table.register_forward_hook(lambda _, inputs, output: self(inputs[0], output))

    def forward(self, input_ids: Tensor, embeddings: Tensor) -> Tensor:
        """Embeddings (B, L, D) of input_ids (B, L), changed where a token is the identifier's."""
        is_identifier = torch.eq(input_ids.unsqueeze(-1), self.token_ids)  # (B, L, N)
        changed: Tensor = embeddings + is_identifier.to(self.change.dtype) @ self.change
        return changed

    def folded(self, text_encoder: Mapping[str, Tensor], change: Tensor) -> dict[str, Tensor]:
        """The text encoder's weights with the change put into the table."""
        table = text_encoder[self._table_name].clone()
        table[self.token_ids.to(table.device)] += change.to(table.device)
        return {**text_encoder, self._table_name: table}
