"""Rows through a transformer without padding: all real tokens form one long row.

Only attention pads them again; every other layer sees the real tokens alone. The mask that the model makes for a layer
carries the layout to that layer's attention: the attention and the mask named `sdpa` are registered again with
transformers, and without such a mask they do what they did.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import masking_utils as masks
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION = "sdpa"
_MASKS = frozenset(
    function.__code__
    for function in (
        masks.causal_mask_function,
        masks.sliding_window_overlay(1),
        masks.chunked_overlay(1, torch.zeros(1)),
        masks.and_masks(masks.causal_mask_function),
    )
)
_PROBE = 32
_FLASH_DTYPES, _FLASH_HEAD = (torch.bfloat16, torch.float16), 192
"""What flash attention takes; wider heads do not train on all cards."""
MISFITS = (TypeError, ValueError, AttributeError, LookupError, AssertionError, RuntimeError)
"""Raised by a model that does not support a call."""


class Layout(NamedTuple):
    """Where the N tokens of a packed row are in the padded `(rows, width)` grid.

    Rows that begin alike share those tokens, which are computed once: a state depends on the tokens before it alone.
    """

    rows: int
    width: int
    cells: Tensor
    """`(N,)` flat index `row * width + position` of every token's first cell."""
    tokens: Tensor
    """`(rows * width,)` index of the token at every cell; any at padding."""
    shared: bool
    """Whether rows share any token."""
    positions: Tensor
    """`(1, N)` position of every token within its own row."""
    keys: Tensor
    """Index of the token at every cell that is no padding, row by row."""
    lengths: Tensor
    """`(2, rows)` tokens of every row whose first cell is in it, the last ones of the row, and all its tokens."""

    def pad(self, packed: Tensor) -> Tensor:
        """`(1, H, N, D)` to `(rows, H, width, D)`; values at padding have no meaning."""
        heads, size = packed.shape[1], packed.shape[3]
        flat = packed[0].transpose(0, 1)
        if self.shared:
            grid = flat.index_select(0, self.tokens)
        else:
            grid = flat.new_zeros(self.rows * self.width, heads, size).index_copy(0, self.cells, flat)
        return grid.view(self.rows, self.width, heads, size).transpose(1, 2)

    def unpad(self, grid: Tensor) -> Tensor:
        """`(rows, H, width, D)` to `(1, N, H, D)`."""
        flat = grid.transpose(1, 2).reshape(self.rows * self.width, grid.shape[1], grid.shape[3])
        return flat.index_select(0, self.cells).unsqueeze(0)


def layout_of(input_ids: Tensor, attention_mask: Tensor) -> Layout:
    """Layout of right-padded rows `(B, T)`; a row shares its first tokens with the row above, as far as they agree."""
    rows, width = input_ids.shape
    real = attention_mask != 0
    same = (input_ids[1:] == input_ids[:-1]) & real[1:] & real[:-1]
    # A token is the one above it where both rows agree up to it.
    repeats = nn.functional.pad(same.long().cumprod(dim=1), (0, 0, 1, 0)).bool()
    first = real & ~repeats
    number = first.reshape(-1).cumsum(dim=0).view(rows, width) - 1
    row = torch.arange(rows, device=input_ids.device).unsqueeze(1).expand(rows, width)
    above = row.masked_fill(repeats, 0).cummax(dim=0).values
    tokens = number.gather(0, above).masked_fill(~real, 0)
    cells = first.reshape(-1).nonzero().squeeze(1)
    shared = len(cells) < int(real.sum())
    positions, lengths = (cells % width).unsqueeze(0), torch.stack([first.sum(dim=1), real.sum(dim=1)])
    return Layout(rows, width, cells, tokens.reshape(-1), shared, positions, tokens[real], lengths)


def stacked(layouts: Sequence[Layout]) -> Layout:
    """Layout of the rows of several layouts, one below the other, without a wait for a GPU."""
    if len(layouts) == 1:
        return layouts[0]
    width, rows, size = max(layout.width for layout in layouts), 0, 0
    cells, tokens, keys = [], [], []
    for layout in layouts:
        positions = layout.positions[0]
        cells.append((rows + (layout.cells - positions) // layout.width) * width + positions)
        grid = layout.tokens.view(layout.rows, layout.width) + size
        tokens.append(nn.functional.pad(grid, (0, width - layout.width)).reshape(-1))
        keys.append(layout.keys + size)
        rows, size = rows + layout.rows, size + len(layout.cells)
    shared = any(layout.shared for layout in layouts)
    positions = torch.cat([layout.positions for layout in layouts], dim=1)
    lengths = torch.cat([layout.lengths for layout in layouts], dim=1)
    return Layout(rows, width, torch.cat(cells), torch.cat(tokens), shared, positions, torch.cat(keys), lengths)


_current: ContextVar[Layout | None] = ContextVar("layout of the packed pass", default=None)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """In a packed pass a mask of one cell that carries the layout to the attention; else transformers' own."""
    layout = _current.get()
    if layout is None:
        padding = kwargs.get("attention_mask")
        if kwargs.get("q_length") == 1 and padding is not None and padding.device.type != "cpu":
            # Whether there is padding is a question for which the host would wait at every generated token.
            kwargs["allow_is_causal_skip"] = False
        return masks.sdpa_mask(*args, **kwargs)
    function, local = kwargs["mask_function"], kwargs.get("local_size")
    if not _is_known(function):
        raise ValueError("its attention mask is not known")
    # `(width, width)`, which keys a query of the same row attends to; None for all up to its own.
    allowed = None
    if function is not masks.causal_mask_function and (local is None or local < layout.width):
        width, device = layout.width, layout.cells.device
        grid = masks.sdpa_mask(1, width, width, mask_function=function, allow_is_causal_skip=False, device=device)
        assert grid is not None
        allowed = grid[0, 0]
    carrier: Any = layout.cells.new_zeros(1, 1, 1, 1, dtype=torch.bool)
    starts = None
    # For rows of one token the kernel expects one query each, which shared ones lack.
    if allowed is None and layout.width > 1 and _has_flash(layout.cells.device):
        starts = F.pad(layout.lengths.cumsum(dim=1), (1, 0)).int()
    carrier.packed = layout, allowed, starts
    return carrier


def _has_flash(device: torch.device) -> bool:
    """Whether torch has flash attention for rows of several lengths on a device."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.backends.cuda.flash_sdp_enabled():
        return False
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def _is_known(function: Any) -> bool:
    """Whether a mask function is causal, with or without a window or chunks."""
    if getattr(function, "__code__", None) not in _MASKS:
        return False
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    return all(_is_known(part) for parts in held if isinstance(parts, tuple) for part in parts)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each packed row where the mask is one of a packed pass; else ordinary sdpa."""
    packed: tuple[Layout, Tensor | None, Tensor | None] | None = getattr(attention_mask, "packed", None)
    if packed is None and _current.get() is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if packed is None or kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None:
        raise ValueError("its attention depends on more than a mask of positions")
    layout, allowed, starts = packed
    if not query.shape[2] == key.shape[2] == len(layout.cells):
        raise ValueError("its attention sees more than the tokens of a row")
    device, size = query.device.type, query.shape[3]
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    fits = dtype in _FLASH_DTYPES and size == key.shape[3] == value.shape[3] and size <= _FLASH_HEAD and size % 8 == 0
    if starts is not None and fits and not dropout:
        return _by_row(query, key, value, dtype, layout, starts, scaling), None
    groups, key, value = query.shape[1] // key.shape[1], layout.pad(key), layout.pad(value)
    # Flash attention, which reads each key once for its group of queries, takes 16 bits and no mask.
    by_group = query.device.type != "cpu" and allowed is None and query.dtype in _FLASH_DTYPES
    if not by_group:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    output = F.scaled_dot_product_attention(
        layout.pad(query),
        key,
        value,
        attn_mask=allowed,
        dropout_p=dropout,
        scale=scaling,
        is_causal=allowed is None,
        enable_gqa=by_group,
    )
    return layout.unpad(output), None


def _by_row(
    query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype, layout: Layout, starts: Tensor, scale: float | None
) -> Tensor:
    """Attention of packed tokens by flash attention, without padding: `(1, N, H, D)`."""
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    if layout.shared:
        # Before they are rounded, as the sum of their gradients is.
        key, value = (x.index_select(0, layout.keys) for x in (key, value))
    flat = (x.to(dtype) for x in (query, key, value))
    # A row's last query is matched with its last key. `varlen_attn` calls this, but with other options in each version.
    rows = (starts[0], starts[1], layout.width, layout.width)
    return torch.ops.aten._flash_attention_forward(*flat, *rows, 0.0, True, False, scale=scale)[0].unsqueeze(0)


# cuDNN's attention, which torch prefers on newer GPUs, first makes a plan for every new shape, for 0.04 to 0.9 seconds:
# shapes change with every batch, and with every generated token.
torch.backends.cuda.enable_cudnn_sdp(False)
AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)


def raise_if_machine(error: Exception) -> None:
    """Raise errors that are not the model's: out of memory, a fault of the device or between processes."""
    machine = isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError | torch.distributed.DistError)
    # A CPU out of memory raises a plain RuntimeError.
    if machine or "DefaultCPUAllocator" in str(error):
        raise error


def packed_hidden(body: Callable[..., Any], input_ids: Tensor, layout: Layout) -> Tensor:
    """Last hidden states `(N, D)`, one for each token of the layout of right-padded ids `(B, T)`.

    Raises:
        ValueError: The model's attention is not one that packed rows support.
    """
    ids = input_ids.reshape(-1)[layout.cells].unsqueeze(0)
    before = _current.set(layout)
    try:
        # With a mask, models do not look for packed rows in the positions.
        found = body(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=layout.positions, use_cache=False)
    finally:
        _current.reset(before)
    return found.last_hidden_state[0]


def why_not_packed(model: Any, body: Callable[..., Any]) -> str | None:
    """Why the rows of a model cannot be packed; None where they can.

    They can where tokens mix in attention alone, and all masks depend on nothing but positions within rows. To find
    out, each token is run as its own row, one of them NaN: no other may become NaN.
    """
    config = model.config.get_text_config()
    if config._attn_implementation != ATTENTION:
        return f"its attention is {config._attn_implementation}, not {ATTENTION}"
    embedding = model.get_input_embeddings()
    count = min(_PROBE, getattr(config, "max_position_embeddings", None) or _PROBE)
    numbers = torch.arange(count, device=next(model.parameters()).device)
    layout = layout_of(numbers.unsqueeze(1), torch.ones_like(numbers).unsqueeze(1))

    def poison(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.index_fill(1, numbers[1:2], torch.nan)

    handle = embedding.register_forward_hook(poison)
    try:
        # Two ids: any vocabulary has them.
        hidden = packed_hidden(body, (numbers % 2).unsqueeze(1), layout)
    except MISFITS as error:
        raise_if_machine(error)
        return str(error).partition("\n")[0]
    finally:
        handle.remove()
    reached = hidden.isnan().any(dim=-1).tolist()
    return None if reached == [n == 1 for n in range(count)] else "its tokens mix outside attention, too"
