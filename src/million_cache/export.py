"""A decode step with the cache as its state, for `torch.export`.

    step = DecodeStep(model, cache)
    program = torch.export.export(step, (input_ids, position_ids), strict=True)
    torch.export.save(program, "step.pt2")

The program holds the model's weights, the codebooks and everything the cache held when it was exported; each call of
``program.module()`` appends a token. In the process that exported it, the module and the cache share their tensors, so a
prompt can be prefilled through the cache; a loaded program has its own, and takes a prompt token by token.

A program can be compiled further, by AOTInductor for example (`torch._inductor.aoti_compile_and_package`; tried on a CPU with
torch 2.13). Its packages do not check strides: give them contiguous tensors, not slices of a longer prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from million_cache.cache import MillionLayer, MillionStaticCache, SlidingLayer
from million_cache.models import cache_argument
from million_cache.state import ATTENTION


class DecodeStep(nn.Module):
    """``forward(input_ids, position_ids) -> logits``: one token a row through ``model``, appended to ``cache``.

    Every tensor of the cache is a buffer of the module, which is how `torch.export` knows that it is state. Export with
    ``strict=True``: the tracer of ``strict=False`` does not see that a layer's tensor and the buffer are one, makes the tensor a
    constant, and then refuses to decompose the program because a constant is mutated.

    Args:
        model: after `enable`.
        cache: allocated (``batch_size=`` given, or used before); the program is for its batch size.

    Raises:
        RuntimeError: the model is not enabled, or the cache has no buffers yet.
        NotImplementedError: a layer of transformers' own, which may count its tokens in Python: an exported graph would hold the
            count fixed, so that every later step would be wrong.
    """

    def __init__(self, model: PreTrainedModel, cache: MillionStaticCache):
        super().__init__()
        if model.config.get_text_config(decoder=True)._attn_implementation != ATTENTION:
            raise RuntimeError("call million_cache.enable(model) before exporting: the step attends from codes")
        others = sorted(
            {type(layer).__name__ for layer in cache.layers if not isinstance(layer, MillionLayer | SlidingLayer)}
        )
        if others:
            raise NotImplementedError(
                f"a cache with layers of type {', '.join(others)} cannot be exported: an exported graph would hold fixed what they count in "
                "Python"
            )
        if not all(layer.is_initialized for layer in cache.layers):
            raise RuntimeError("the cache has no buffers yet: give it batch_size=, device= and dtype=")
        self.model, self.cache = model, cache
        (self._argument,) = cache_argument(model, cache)
        for name, tensor in cache.named_tensors().items():
            self.register_buffer(name, tensor)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """input_ids, position_ids [B, 1] int64 (a padded row's position is its slot less its padding); logits [B, 1, vocabulary]."""
        return self.model(input_ids, position_ids=position_ids, **{self._argument: self.cache}).logits

    def example(self) -> tuple[Tensor, Tensor]:
        """Arguments of the right shape for `torch.export.export`."""
        layer = self.cache.layers[0]
        return tuple(torch.zeros(layer.batch_size, 1, dtype=torch.int64, device=layer.device) for _ in range(2))
