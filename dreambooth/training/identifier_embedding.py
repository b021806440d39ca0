"""The identifier's own token embedding, learnt faster than the text encoder around it.

The base model has hardly seen a rare token and may have learnt to ignore it: then samples with and without it are the
same, and nothing distinguishes the two halves of a batch. A learning rate that moves this embedding within a few steps
would ruin every other weight of the text encoder. So a change is learnt fast and added to the embeddings of the
identifier's tokens alone, as in Textual Inversion (arXiv 2208.01618). The export adds it to the embedding table: the
exported model is an ordinary one.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn


class IdentifierEmbedding(nn.Module):
    """`change` (N, D) is added to the embeddings of N tokens wherever they stand in a prompt.

    A token that the identifier has twice ("x22") is one of the N: there is one row of the table for it. The change
    starts at zero, or with `like` at what makes each of the N embeddings that of the token `like`. `row` reads the
    embedding (D) of a token from the table of a name, where that isn't loaded.
    """

    token_ids: Tensor

    def __init__(
        self,
        text_encoder: nn.Module,
        token_ids: Sequence[int],
        *,
        like: int | None = None,
        row: Callable[[str, int], Tensor] | None = None,
    ) -> None:
        super().__init__()
        token_ids = list(dict.fromkeys(token_ids))
        table = _table_of(text_encoder)
        self.change = nn.Parameter(torch.zeros(len(token_ids), table.embedding_dim))
        self.register_buffer("token_ids", torch.tensor(token_ids), persistent=False)
        self._table_name = next(name for name, weight in text_encoder.named_parameters() if weight is table.weight)
        if like is not None:
            read = row if row is not None and table.weight.is_meta else lambda _, token_id: table.weight[token_id]
            with torch.no_grad():
                like_row = read(self._table_name, like).float()
                for place, token_id in enumerate(token_ids):
                    self.change[place] = like_row - read(self._table_name, token_id).float()
        # T5 has two modules with one weight, and looks up tokens in the second.
        modules = text_encoder.named_modules()
        self._tables = [name for name, one in modules if isinstance(one, nn.Embedding) and one.weight is table.weight]
        for name in self._tables:
            used = text_encoder.get_submodule(name)
            used.register_forward_hook(lambda _, inputs, output: self(inputs[0], output))

    def added_to(self, text_encoder: nn.Module, change: Tensor) -> None:
        """Apply `change` (N, D) to another text encoder of this kind, whose tables may hold one weight as two."""
        ids = self.token_ids.to(change.device)
        for name in self._tables:
            table = text_encoder.get_submodule(name)
            table.register_forward_hook(lambda _, inputs, output: _changed(inputs[0], output, ids, change))

    def forward(self, input_ids: Tensor, embeddings: Tensor) -> Tensor:
        """Embeddings (B, L, D) of input_ids (B, L), changed where a token is the identifier's."""
        return _changed(input_ids, embeddings, self.token_ids, self.change)

    def folded(self, text_encoder: Mapping[str, Tensor], change: Tensor) -> dict[str, Tensor]:
        """The text encoder's weights with the change added to the embedding table."""
        table = text_encoder[self._table_name].clone()
        table[self.token_ids.to(table.device)] += change.to(table.device)
        return {**text_encoder, self._table_name: table}


def _changed(input_ids: Tensor, embeddings: Tensor, token_ids: Tensor, change: Tensor) -> Tensor:
    is_identifier = torch.eq(input_ids.unsqueeze(-1), token_ids)  # (B, L, N)
    return embeddings + is_identifier.to(change.dtype) @ change


def _table_of(text_encoder: nn.Module) -> nn.Embedding:
    table: nn.Embedding = text_encoder.get_input_embeddings()  # type: ignore[operator]
    return table
