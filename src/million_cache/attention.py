"""The attention and mask functions that make transformers models read codes, and the switch that turns them on.

transformers passes whatever `cache.update` returns to the attention function: `MillionLayer.update` returns `KVHandle`s, and
`million_attention` attends over the layer they name and then appends the new tokens. `million_mask` describes a causal mask
by one int32 pair a row instead of a dense tensor, so that padded and unpadded batches share one graph.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from million_cache import long_chunk
from million_cache.cache import KVHandle, MillionLayer, SlidingLayer
from million_cache.models import check_supported, fingerprint, text_config
from million_cache.state import ATTENTION, Enabled, PaddingCheck, enabled, forget_enabled, record_enabled

# Forwards of up to this many tokens on a non-empty cache take the decode path, where a chunk equals single steps whatever the
# window. A longer one is a prefill: like a prefill into an empty cache it attends to all of its own tokens exactly; where its
# queries times the cached tokens are many, on a GPU (`long_chunk.py`), to the recent tokens before it as well.
DECODE_CHUNK = 64

# What an attention function may be asked for and this one cannot give, by its keyword.
_UNSUPPORTED = {
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks as learned logits",
    "position_bias": "a position bias",
    "sliding_window": "a sliding window on a layer that is cached as full attention",
    "cache": "a paged cache",
}


def _is_sliding_window(mask_function) -> bool:
    """Whether a mask function is transformers' causal sliding window and nothing else (packed sequences, images, ...). It has no name:
    what tells is the code of the functions that it combines."""

    def combined(function):
        return function.__code__, [f.__code__ for cell in function.__closure__ for f in cell.cell_contents]

    try:
        return combined(mask_function) == combined(sliding_window_causal_mask_function(1))
    except (AttributeError, TypeError):
        return False


def million_mask(batch_size, q_length=None, kv_length=None, q_offset=0, kv_offset=0, mask_function=causal_mask_function,
                 attention_mask=None, local_size=None, **kwargs):  # fmt: skip
    """Mask for `million_attention`: int32 ``(start, q_offset)`` [B, 1, 1, 2], None for plain causal, or a dense bool mask.

    Dense where a pair a row cannot say it: sliding or chunked layers, non-causal functions, dynamic caches, and masks with
    holes (padding between turns). Decode steps do not wait for the device: `PaddingCheck`. A ``kv_offset`` that is a tensor is
    a `SlidingLayer`'s: where it is negative, the first keys are none, which `SlidingLayer.mask` hides.

    Raises:
        ValueError: the 2-D mask is longer than the cache.
        RuntimeError: see `PaddingCheck.step`.
    """
    # A window that no token has left, which is plain causal; another cache's full one begins at a later token.
    begins = not isinstance(kv_offset, Tensor) and kv_offset == 0
    covers = begins and local_size is not None and local_size >= kv_length > q_length
    if covers and not torch.compiler.is_compiling() and _is_sliding_window(mask_function):
        mask_function, local_size = causal_mask_function, None
    static = isinstance(q_offset, Tensor) or kv_length != q_offset + q_length
    if static and local_size is None and attention_mask is not None and attention_mask.shape[1] > kv_length:
        raise ValueError(
            f"the attention mask covers {attention_mask.shape[1]} tokens and the cache's max_cache_len is {kv_length}; nothing was written"
        )

    def dense():
        return sdpa_mask(batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
                         mask_function=mask_function, attention_mask=attention_mask, local_size=local_size, **kwargs)  # fmt: skip

    if isinstance(kv_offset, Tensor):
        # Not by transformers' own padding, whose shape would follow from the offset: that would wait for the device.
        columns, q_offset = attention_mask, kv_offset + (kv_length - q_length)
        attention_mask, kwargs["allow_is_causal_skip"] = None, False
        mask = dense()
        if columns is not None:
            kv = torch.arange(kv_length, device=columns.device) + kv_offset.to(columns.device)
            mask = mask & columns.bool()[:, kv.clamp(0, columns.shape[1] - 1)][:, None, None, :]
        return mask
    if local_size is not None and isinstance(q_offset, Tensor) and kv_length == q_length:
        q_offset = 0  # a prefill into a `SlidingLayer` that is empty again: not to be asked of the device
    if local_size is not None or mask_function is not causal_mask_function or not static:
        return dense()
    empty = not isinstance(q_offset, Tensor) and q_offset == 0
    device = kwargs.get("device", "cpu") if attention_mask is None else attention_mask.device
    if attention_mask is None:
        if q_length > 1 and empty:
            return None
        start = torch.zeros(batch_size, dtype=torch.int32, device=device)
    else:
        if torch.compiler.is_compiling():
            return dense()  # whether it has holes cannot be asked while tracing
        valid = attention_mask.bool()
        falls = valid[:, :-1] > valid[:, 1:]  # a masked token behind a valid one: a hole
        # None: not the length of a MillionStaticCache, or moved to another device: nowhere to remember an answer.
        padding: PaddingCheck | None = getattr(q_offset, "padding", None)
        if padding is None:
            holes = bool(falls.any())
        elif q_length > 1 or falls.device.type == "cpu":  # asking a CPU costs nothing
            holes = padding.know(falls)
        else:
            holes = padding.step(falls)
        if holes:
            return dense()
        start = valid.shape[1] - valid.sum(-1, dtype=torch.int32)
        if q_length > 1 and empty and not bool(start.any()):
            return None
    offset = torch.as_tensor(q_offset, dtype=torch.int32, device=device).expand(batch_size)
    return torch.stack((start, offset), -1)[:, None, None, :]


def expand_mask(descriptor: Tensor, q_length: int, kv_length: int) -> Tensor:
    """The dense bool mask [B, 1, q_length, kv_length] of a ``(start, q_offset)`` pair.

    A query before its row's start (left padding) sees itself alone: its output is never used, but must not be NaN, which
    would spread through the values of later layers.
    """
    start, offset = descriptor[..., :1], descriptor[..., 1:]
    kv = torch.arange(kv_length, device=descriptor.device)
    query = torch.arange(q_length, device=descriptor.device)[:, None] + offset
    return ((kv >= start) & (kv <= query)) | (kv == query)


def _bool_mask(mask: Tensor) -> Tensor:
    """An additive float mask that only allows or forbids, as bool. Raises NotImplementedError if it holds a bias."""
    if mask.dtype == torch.bool:
        return mask
    allowed = mask == 0
    if not torch.compiler.is_compiling() and not bool((allowed | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
        raise NotImplementedError("an additive attention mask with a bias (such as ALiBi) cannot be applied to codes")
    return allowed


def million_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Attention function ``"million"``: from codes where the cache is a `MillionStaticCache`, PyTorch's SDPA everywhere else.

    query [B, Hq, n, D]; key and value are `KVHandle`s or tensors [B, H, T, D]. Returns ([B, n, Hq, D], None).

    Raises:
        NotImplementedError: softcap, attention sinks, biases, attention weights, dropout: named in the message.
        RuntimeError, ValueError: the cache is for another model than the one that attends, see `CacheState.check_model`.
    """
    if not isinstance(key, KVHandle):
        if attention_mask is not None and attention_mask.dtype == torch.int32:
            attention_mask = expand_mask(attention_mask, query.shape[2], key.shape[2])
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if isinstance(key.layer, SlidingLayer):
        mask = key.layer.mask(attention_mask if attention_mask is None else _bool_mask(attention_mask), query.shape[2])
        return sdpa_attention_forward(
            module, query, key.new, value.new, mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for name, what in _UNSUPPORTED.items():
        if name == "sliding_window" and (kwargs.get(name) or 0) >= key.layer.max_cache_len:
            continue  # longer than the cache: all of it
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"the million attention function does not support {what} ({name})")
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            "attention from codes forms no attention weights: output_attentions=True is not supported"
        )
    if dropout:
        raise NotImplementedError(f"attention from codes is for inference: dropout must be 0, got {dropout}")
    layer, fresh, n = key.layer, key.fresh, query.shape[2]
    if torch.is_autocast_enabled(query.device.type):
        query = query.to(layer.dtype)  # as the cache's keys and values: see `MillionStaticCache.update`
    if (config := getattr(module, "config", layer.state.config)) is not layer.state.config:
        layer.state.check_model(config)
    is_pair = attention_mask is not None and attention_mask.dtype == torch.int32
    if attention_mask is not None and not is_pair:
        attention_mask = _bool_mask(attention_mask)
    if layer.begins:
        _set_start(layer, attention_mask, is_pair)
    if fresh and n > 1:
        mask = attention_mask
        if is_pair:
            mask = expand_mask(mask, n, n)
        elif mask is not None:
            mask = mask[..., :n] | torch.eye(n, dtype=torch.bool, device=mask.device)
        out, _ = sdpa_attention_forward(module, query, key.new, value.new, mask, dropout=0.0, scaling=scaling, **kwargs)
        layer.append(key.new, value.new)
    else:
        mask = None if is_pair else attention_mask
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        out = None
        if n > DECODE_CHUNK and mask is None and long_chunk.serves(query):
            out = long_chunk.attend_long(layer, query, key.new, value.new, scale)
        if out is not None:
            layer.append(key.new, value.new, after=out)
        else:
            out = _attend_and_append(layer, query, key.new, value.new, mask, scale)
    layer.finish()
    return out, None


def _attend_and_append(
    layer: MillionLayer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """By the ops, in pieces that the window covers if the chunk is short: [B, n, Hq, D]."""
    n, parts = q.shape[2], []
    step = n if n > DECODE_CHUNK else max(1, layer.state.recent_tokens)
    for i in range(0, n, step):
        new = slice(i, i + step)
        rows = None if mask is None else mask[:, :, new]
        parts.append(layer.attend(q[:, :, new], k[:, :, new], v[:, :, new], rows, scale, offset=i))
        layer.append(k[:, :, new], v[:, :, new], offset=i, after=parts[-1])
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _set_start(layer: MillionLayer, mask: Tensor | None, is_pair: bool) -> None:
    """Tell the clock where each row's valid tokens begin, as far as this forward's mask shows it."""
    if mask is None:
        start = torch.zeros_like(layer.clock.start)
    elif is_pair:
        start = mask[:, 0, 0, 0]
    else:
        # Padding is what no query sees but itself: what is hidden from the newest alone may be shown to later ones.
        rows, (n, slots) = mask[:, 0], mask.shape[2:]
        seen = rows[:, -1]
        if n > 1:
            own = layer.clock.time[0] + torch.arange(n, device=mask.device)
            seen = seen | (rows & (torch.arange(slots, device=mask.device) != own[:, None])).any(1)
        start = torch.where(seen.any(-1), seen.to(torch.int32).argmax(-1), layer.clock.time[1]).to(torch.int32)
    layer.clock.set_start(start)


def enable(model: PreTrainedModel) -> None:
    """Make ``model`` attend from codes whenever its cache is a `MillionStaticCache`.

    Measures the model's rotation and fingerprint (one forward of 12 tokens), so that a cache with another model's codebooks
    is refused: call it again after loading other weights. With any other cache the model runs PyTorch's SDPA as before.

    Raises:
        NotImplementedError: an unsupported model, with the reason.
    """
    text = text_config(model.config)
    check_supported(text)
    decoder = next((x for x in model.modules() if getattr(x, "config", None) is text), model)
    if not getattr(decoder, "_supports_sdpa", True):
        raise NotImplementedError(
            f"{text.model_type}: its attention is not PyTorch's scaled_dot_product_attention (transformers says so by _supports_sdpa), and "
            "it cannot be computed from codes"
        )
    before, known = text._attn_implementation, enabled(text)
    if before == ATTENTION:
        before = known.previous_attention if known else "sdpa"
    devices = frozenset(p.device for p in model.parameters())
    record_enabled(text, Enabled(fingerprint(model), before, devices))
    model.set_attn_implementation(ATTENTION)
    if text._attn_implementation != ATTENTION:
        forget_enabled(text)
        raise NotImplementedError(
            f"{text.model_type}: {type(model).__name__} does not hand keys and values to transformers' attention interface, whose function "
            f"{ATTENTION!r} would attend from codes"
        )


def disable(model: PreTrainedModel) -> None:
    """Give ``model`` back the attention implementation it had before `enable`. No-op for a model that is not enabled.

    A `MillionStaticCache` keeps working, dequantising; one that holds tokens must be reset first (RuntimeError at its next use).
    """
    text = model.config.get_text_config(decoder=True)
    previous = forget_enabled(text)
    if previous is not None:
        model.set_attn_implementation(previous)


AttentionInterface.register(ATTENTION, million_attention)
AttentionMaskInterface.register(ATTENTION, million_mask)
