"""Decoding steps that a CUDA graph repeats: the host launches their kernels more slowly than a GPU runs them."""

from contextlib import suppress
from functools import cache as once
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer

_stream = once(torch.cuda.Stream)
_uncaptured: "WeakSet[Any]" = WeakSet()
"""Models with a step that no graph can hold, for example one in which the host waits for the device."""


class _Fixed(DynamicLayer):
    """Keys and values of `width` tokens: the next is written at `place` `(1,)`, and a mask has to hide the rest."""

    keys: Any
    values: Any

    def __init__(self, layer: Any, width: int, place: Tensor) -> None:
        super().__init__()
        self.is_initialized, self.place = True, place
        # Zeros: what is masked counts 0 times, and 0 times NaN is NaN.
        self.keys, self.values = (F.pad(x, (0, 0, 0, width - x.shape[-2])) for x in (layer.keys, layer.values))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.keys.index_copy_(-2, self.place, key_states), self.values.index_copy_(-2, self.place, value_states)

    def get_seq_length(self) -> int:
        return int(self.keys.shape[-2]) - 1


class Repeated:
    """Decoding steps of the same kernels on the same memory: on CUDA the second and later ones are a graph's.

    Args:
        model: In eval mode.
        cache: By its name in the model's call, see `suits`.
        mask: `(R, T)` of the tokens in the cache.
        positions: `(R, 1)` of the last of them.
        width: Largest number of tokens in the cache.
        last: Largest position that any row needs; rows that have ended go no further.
    """

    def __init__(
        self, model: Any, cache: dict[str, Any], mask: Tensor, positions: Tensor, width: int, last: int
    ) -> None:
        self.model, self.cache, self.last = model, cache, last
        self.place = mask.new_full((1,), mask.shape[1])
        for each in cache.values():
            for n, layer in enumerate(each.layers):
                each.layers[n] = _Fixed(layer, width, self.place)
        mask = F.pad(mask, (0, width - mask.shape[1]))
        self.inputs = {"attention_mask": mask, "position_ids": positions + 1, "input_ids": torch.zeros_like(positions)}
        self.captures, self.calls, self.logits = mask.is_cuda, 0, mask
        self.graph: Any = None

    @staticmethod
    def suits(model: Any, cache: Any) -> bool:
        """Whether all that a model keeps of the tokens before are keys and values."""
        plain = all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers)
        return plain and model not in _uncaptured

    def reorder_cache(self, kept: Tensor) -> None:
        for cache in self.cache.values():
            cache.reorder_cache(kept)
        self.inputs = {name: x[kept] for name, x in self.inputs.items()}
        self.calls = 0

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits `(R, 1, V)` after one more token `(R, 1)` of each row."""
        self.inputs["input_ids"].copy_(ids)
        self.calls += 1
        # In the first, libraries take their memory and choose their kernels.
        if self.captures and self.calls == 2:
            self._capture()
        if not self.captures or self.calls == 1:
            return self._step()
        self.graph.replay()
        # The next replay overwrites it.
        return self.logits.clone()

    def _step(self) -> Tensor:
        self.inputs["attention_mask"].index_fill_(1, self.place, 1)
        logits: Tensor = self.model(**self.inputs, **self.cache, use_cache=True, logits_to_keep=1).logits
        self.inputs["position_ids"].add_(1).clamp_(max=self.last)
        self.place += 1
        return logits

    def _capture(self) -> None:
        graph: Any = torch.cuda.CUDAGraph()
        # That of the graph for more rows, which has ended.
        memory, device = self.graph.pool() if self.graph else torch.cuda.graph_pool_handle(), self.place.device
        if torch.cuda.mem_get_info(device)[0] < 2**32:
            # A capture takes new memory, and cannot have torch give back what it keeps.
            torch.cuda.empty_cache()
        try:
            # `torch.cuda.graph` would always give it back, and forbid calls of other threads.
            with torch.cuda.stream(_stream(device)):
                graph.capture_begin(memory, capture_error_mode="thread_local")
                try:
                    self.logits = self._step()
                finally:
                    graph.capture_end()
            self.graph = graph
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            # Nothing has run. For torch's memory and, before 2.12, for its random numbers the capture goes on.
            random = torch.cuda.default_generators[device.index]
            random.graphsafe_set_state(random.clone_state())
            with suppress(RuntimeError, AttributeError):
                torch._C._cuda_endAllocateToPool(device.index, memory)
                torch._C._cuda_releasePool(device.index, memory)
            self.captures = False
            _uncaptured.add(self.model)
