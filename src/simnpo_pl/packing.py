"""Rows through a transformer without padding: all real tokens form one long row.

Only attention needs to know where rows begin, so it alone re-pads them; every other layer
sees just the real tokens. Registered with transformers as the attention named `packed_rows`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "packed_rows"


class Layout(NamedTuple):
    """Where the N tokens of a packed row stand in the padded `(rows, width)` grid.

    A token stands in several rows where these begin alike: what the model makes of it depends on what comes before it
    alone, so it is computed once.
    """

    rows: int
    width: int
    cells: Tensor
    """`(N,)` flat index `row * width + position` of every token's first place."""
    tokens: Tensor
    """`(rows * width,)` number of the token at every cell; 0 at padding."""
    shared: bool
    """Whether any token stands in more than one row."""

    @property
    def positions(self) -> Tensor:
        """`(1, N)` position of every token within its own row."""
        return (self.cells % self.width).unsqueeze(0)

    def pad(self, packed: Tensor) -> Tensor:
        """Spread `(1, H, N, D)` over `(rows, H, width, D)`; what stands at padding has no meaning."""
        heads, size = packed.shape[1], packed.shape[3]
        flat = packed[0].transpose(0, 1)
        if self.shared:
            grid = flat.index_select(0, self.tokens)
        else:
            grid = flat.new_zeros(self.rows * self.width, heads, size).index_copy(0, self.cells, flat)
        return grid.view(self.rows, self.width, heads, size).transpose(1, 2)

    def unpad(self, grid: Tensor) -> Tensor:
        """Collect `(rows, H, width, D)` into `(1, N, H, D)`."""
        flat = grid.transpose(1, 2).reshape(self.rows * self.width, grid.shape[1], grid.shape[3])
        return flat.index_select(0, self.cells).unsqueeze(0)


def layout_of(input_ids: Tensor, attention_mask: Tensor) -> Layout:
    """Layout of right-padded rows.

    Rows share their first tokens with the row above them, as far as both have the same.

    Args:
        input_ids: `(B, T)`.
        attention_mask: `(B, T)`, 1 on a row's own tokens.
    """
    rows, width = input_ids.shape
    real = attention_mask != 0
    same = (input_ids[1:] == input_ids[:-1]) & real[1:] & real[:-1]
    # A token is the one above it where the whole rows up to it are alike.
    repeats = nn.functional.pad(same.long().cumprod(dim=1), (0, 0, 1, 0)).bool()
    first = real & ~repeats
    number = first.reshape(-1).cumsum(dim=0).view(rows, width) - 1
    row = torch.arange(rows, device=input_ids.device).unsqueeze(1).expand(rows, width)
    above = row.masked_fill(repeats, 0).cummax(dim=0).values
    tokens = number.gather(0, above).masked_fill(~real, 0)
    cells = first.reshape(-1).nonzero().squeeze(1)
    return Layout(rows, width, cells, tokens.reshape(-1), len(cells) < int(real.sum()))


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each packed row; ordinary sdpa where no layout is passed."""
    if packed_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    window = kwargs.get("sliding_window")
    mask = None
    if window is not None and packed_layout.width > window:
        distance = torch.arange(packed_layout.width, device=query.device)
        distance = distance[:, None] - distance[None, :]
        mask = (distance >= 0) & (distance < window)
    groups = query.shape[1] // key.shape[1]
    output = F.scaled_dot_product_attention(
        packed_layout.pad(query),
        packed_layout.pad(key).repeat_interleave(groups, dim=1),
        packed_layout.pad(value).repeat_interleave(groups, dim=1),
        attn_mask=mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=mask is None,
    )
    return packed_layout.unpad(output), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def packed_hidden(body: nn.Module, input_ids: Tensor, layout: Layout) -> Tensor:
    """Last hidden states of the real tokens of padded rows.

    Args:
        body: Transformer without its head, whose attention is `packed_rows`.
        input_ids: Right-padded ids `(B, T)`.
        layout: Of these rows.

    Returns:
        `(N, D)` hidden states, one for each token of the layout.
    """
    output = body(
        input_ids=input_ids.reshape(-1)[layout.cells].unsqueeze(0),
        # A four-dimensional mask is handed through as it stands: no (N, N) mask is built.
        attention_mask=layout.cells.new_zeros(1, 1, 1, 1, dtype=torch.bool),
        position_ids=layout.positions,
        use_cache=False,
        packed_layout=layout,
    )
    return output.last_hidden_state[0]
