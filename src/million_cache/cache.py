"""`MillionStaticCache`: a `StaticCache` whose full-attention layers hold product-quantised codes.

Design: every buffer is allocated once and keeps its address; one device-side clock for all layers; every token is encoded at
once and also written to a ring of recent tokens and to the sinks, so no step branches on a length, re-quantises or flushes.

With the attention function of `million_cache.attention` (after `enable(model)`) `update` returns `KVHandle`s and the attention
function attends and appends. With any other attention function `update` appends and returns dequantised keys and values:
slow, but every model keeps working.
"""

from __future__ import annotations

import copy
import math
import warnings
from bisect import bisect_right
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, StaticCache, StaticLayer, StaticSlidingWindowLayer

import million_ops
from million_cache.codebook import Codebooks, LayerCodebooks
from million_cache.config import PRESETS, PQConfig
from million_cache.models import (
    check_length,
    check_supported,
    fingerprint,
    full_attention_layers,
    head_dim,
    kv_heads,
)
from million_cache.state import ATTENTION, CacheState, enabled, refuse_other_model
from million_ops._checks import FLOATS

CROP_KEEPS = tuple(map(int, transformers.__version__.split(".")[:2])) < (
    5,
    17,
)  # there crop(n > 0) means "keep n tokens"


LENGTH_STEP = 64  # lengths that messages suggest are multiples of it


class KVHandle:
    """What `update` returns in place of keys or values: the layer that has the codes, and the new tokens [B, H, n, D]; of a
    `SlidingLayer` all tokens to attend to."""

    __slots__ = ("fresh", "layer", "new")

    def __init__(self, layer: MillionLayer | SlidingLayer, new: Tensor, fresh: bool):
        self.layer, self.new, self.fresh = layer, new, fresh

    def __getattr__(self, name: str):
        raise AttributeError(
            f"no {name!r} of keys or values that are codes: the model that called does not run the million attention function, and the config "
            "that the cache was made with, or a copy of it, says so: enable(model) first, and make the cache with this model"
        )


class MillionLayer(StaticLayer):
    """One full-attention layer: codes, ring and sinks of its keys and values. Tensor shapes: `million_ops.ops`."""

    is_croppable = True

    def __init__(self, max_cache_len: int, state: CacheState, layer_idx: int, is_last: bool):
        CacheLayerMixin.__init__(self)  # not StaticLayer's: the clock is shared
        self.max_cache_len, self.state, self.layer_idx, self.is_last = max_cache_len, state, layer_idx, is_last

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch size, dtype and device of ``key_states`` [B, H, n, D]. Raises ValueError if they do not fit the codebooks."""
        books = self.state.codebooks.layers[self.layer_idx]
        for name, x in (("keys", key_states), ("values", value_states)):
            if (x.shape[1], x.shape[3]) != (books.kv_heads, books.head_dim):
                raise ValueError(
                    f"layer {self.layer_idx}: {name} have {x.shape[1]} KV heads of {x.shape[3]} channels, "
                    f"the codebooks are for {books.kv_heads} of {books.head_dim}"
                )
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "MillionStaticCache has no buffers yet and the forward is being compiled; give batch_size=, device= and dtype= to "
                "the constructor (or call early_initialization), so that its buffers exist, at fixed addresses, before tracing"
            )
        with torch.inference_mode(False):  # else nothing outside of it could write to the buffers
            self._allocate(key_states)

    def _allocate(self, key_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads, _, D = key_states.shape
        self.books: LayerCodebooks = self.state.codebooks.to(self.device)[self.layer_idx]
        codebooks = self.books.k_codebook, self.books.v_codebook
        layouts = million_ops.layouts_for(self.device, D, *(x.shape[3] for x in codebooks), self.dtype)
        self.k_transform_inv = self.books.inverse_for(layouts[0])
        shapes = [
            layout.packed_shape(self.batch_size, self.num_heads, self.max_cache_len, codebook.shape[2])
            for layout, codebook in zip(layouts, codebooks)
        ]
        self.codes = [torch.zeros(shape, dtype=torch.uint8, device=self.device) for shape in shapes]

        def rows(tokens: int) -> Tensor:
            return torch.zeros(self.batch_size, self.num_heads, tokens, D, dtype=self.dtype, device=self.device)

        self.ring = [rows(self.state.recent_tokens), rows(self.state.recent_tokens)]
        self.sinks = [rows(self.state.sink_tokens), rows(self.state.sink_tokens)]
        self.geometry = {
            "frame_tokens": self.books.frame_tokens,
            "rope_interleaved": self.books.rope_interleaved,
            "k_layout": layouts[0].id,
            "v_layout": layouts[1].id,
        }
        # Last, so that running out of memory above leaves no clock that nobody begins.
        self.clock, self.begins = self.state.clock(self.batch_size, self.device)
        self.mark_static()
        self.is_initialized = True

    def mark_static(self) -> None:
        """Tell dynamo that these addresses never change: CUDA graphs then use the buffers in place, without copies."""
        books = self.books
        for x in (
            *self.buffers(),
            books.k_codebook,
            books.v_codebook,
            books.k_transform,
            self.k_transform_inv,
            books.inv_freq,
        ):
            if x is not None:
                torch._dynamo.mark_static_address(x)

    def buffers(self) -> tuple[Tensor, ...]:
        """Every tensor that holds this layer's tokens."""
        return (*self.codes, *self.ring, *self.sinks)

    def _layer_state(self) -> tuple[Tensor, ...]:
        return (*self.codes, *self.ring, *self.sinks, *self.clock.tensors())

    def append(self, k: Tensor, v: Tensor, offset: int = 0, after: Tensor | None = None) -> None:
        """Encode and store tokens k, v [B, H, n, D] behind the ``offset`` tokens of this forward that are stored already.

        ``after``: their attention's result, if they have attended to this layer (see `million_ops.pq_append_`).
        """
        b = self.books
        million_ops.pq_append_(
            k, v, b.k_codebook, b.v_codebook, b.k_transform, b.inv_freq, *self._layer_state(), offset=offset, after=after,
            **self.geometry,
        )  # fmt: skip

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, offset: int = 0) -> Tensor:
        """`million_ops.pq_attention` of the not yet appended tokens q, k, v over this layer: [B, n, Hq, D]."""
        b = self.books
        return million_ops.pq_attention(
            q, k, v, b.k_codebook, b.v_codebook, self.k_transform_inv, b.inv_freq, *self._layer_state(), mask,
            scale=scale, offset=offset, **self.geometry,
        )  # fmt: skip

    def finish(self) -> None:
        """To be called when this layer has appended a forward's tokens: the model's last layer commits the clocks."""
        if self.is_last:
            self.state.commit()

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Handles for the million attention function, or dequantised keys and values [B, H, max_cache_len, D] for any other.

        Raises ValueError for another batch size, dtype or device than the cache's, RuntimeError when the attention function
        changed while the cache holds tokens. Whether the tokens fit, `MillionStaticCache.update` has asked before.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.batch_size:
            raise ValueError(f"the cache was made for batch size {self.batch_size}, got {key_states.shape[0]}")
        if key_states.dtype != self.dtype or key_states.device != self.device:
            raise ValueError(
                f"layer {self.layer_idx} of the cache holds {self.dtype} on {self.device}, got {key_states.dtype} on {key_states.device}"
            )
        state = self.state
        million = state.config._attn_implementation == ATTENTION
        fresh = state.empty
        if self.begins:
            if fresh:
                state.million = million
            self.clock.begin(key_states.shape[2])
        if million != state.million:
            raise RuntimeError(
                f"the cache holds tokens of attention implementation {'million' if state.million else 'other than million'}, and the "
                f"model now runs {state.config._attn_implementation!r}: reset() the cache before enable(model) or disable(model)"
            )
        if million:
            state.check_model(state.config)
            return KVHandle(self, key_states, fresh), KVHandle(self, value_states, fresh)
        result = self._update_dequantised(key_states, value_states, fresh)
        self.finish()
        return result

    def _update_dequantised(self, k: Tensor, v: Tensor, fresh: bool) -> tuple[Tensor, Tensor]:
        """Append, and rebuild the whole cache in full precision, with every token that is held exactly overlaid exactly."""
        if not fresh:
            _warn_dequantising(self.state)
        elif self.begins:  # only the attention function knows of padding
            self.clock.set_start(torch.zeros_like(self.clock.start))
        past, _, ring_lo = self.clock.time.unbind()
        R, sinks = self.state.recent_tokens, self.state.sink_tokens
        slots = torch.arange(self.max_cache_len, device=self.device)
        in_ring = ((slots < past) & (slots >= torch.maximum(ring_lo, past - R)))[:, None]
        # The ring as it stood before this forward; what the append below overwrites is new and overlaid from k and v.
        old = [ring[:, :, slots % R] if R > 0 else None for ring in self.ring]
        self.append(k, v)
        b = self.books
        rope = (b.inv_freq, self.clock.origin)
        parts = (
            (k, self.codes[0], b.k_codebook, b.k_transform_inv, rope, self.geometry["k_layout"]),
            (v, self.codes[1], b.v_codebook, None, (None, self.clock.origin), self.geometry["v_layout"]),
        )
        results = []
        for i, (new, codes, codebook, transform_inv, (inv_freq, origin), layout) in enumerate(parts):
            if fresh:  # a prefill into an empty cache is exact
                x = new.new_zeros(self.batch_size, self.num_heads, self.max_cache_len, new.shape[3])
            else:
                x = million_ops.pq_dequantize(
                    codes,
                    codebook,
                    transform_inv,
                    inv_freq,
                    origin,
                    layout,
                    self.dtype,
                    b.frame_tokens,
                    b.rope_interleaved,
                )[:, :, : self.max_cache_len]
                if R > 0:
                    x = torch.where(in_ring, old[i], x)
                kept = min(sinks, self.max_cache_len)
                x[:, :, :kept] = self.sinks[i][:, :, :kept]
            x.index_copy_(2, past + torch.arange(new.shape[2], device=self.device), new)
            results.append(x)
        return results[0], results[1]

    def get_seq_length(self) -> int | Tensor:
        """Tokens of all finished forwards: int 0 while the cache is empty, else a tensor, so that compiled code does not specialise on it."""
        if not self.is_initialized or self.state.empty:
            return 0
        return self.clock.time[0].clone()

    def reset(self) -> None:
        """Forget all tokens. Codes need no zeroing: nothing reads beyond the clock."""
        if self.is_initialized and self.begins:
            self.clock.reset()
        self.state.recount(0)
        self.state.padding.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens (transformers before 5.17: a positive value is how many to keep)."""
        if not (self.is_initialized and self.begins) or tokens_to_remove == 0:
            return
        past = int(self.clock.time[0])
        drop = _dropped(tokens_to_remove, past)
        self.clock.crop(drop)
        self.state.padding.reset()
        self.state.recount(past - drop)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes row ``beam_idx[b]``, in place: addresses stay."""
        if not self.is_initialized:
            return
        index = beam_idx.to(self.device)
        own = (self.clock.start, self.clock.origin) if self.begins else ()
        for x in (*self.buffers(), *own):
            x.copy_(x.index_select(0, index))

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise NotImplementedError("the batch size of MillionStaticCache is fixed: make a cache for the larger batch")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise NotImplementedError("the batch size of MillionStaticCache is fixed: make a cache for the smaller batch")

    def offload(self) -> None:
        raise NotImplementedError("MillionStaticCache keeps its codes on the device: their addresses are fixed")

    prefetch = offload


class SlidingLayer(StaticSlidingWindowLayer):
    """One sliding-window layer: dense keys and values of the last W tokens, [B, H, W, D], token p in slot ``p % W``.

    transformers' own layer counts its tokens in a Python integer, which an exported step would hold fixed and a compiled one
    recompiles for, and moves its whole window in every step. Here the count ``cumulative_length`` is a tensor, a step writes
    one slot, and nothing branches on a length.

    With the million attention function the keys to attend to are the tokens ``past - W + 1 ..``, those before the first among
    them (`mask` hides them); with any other they lie at their slots of a full-length tensor, like those of `MillionLayer`.

    Args:
        max_cache_len: tokens a row of the cache can hold.
        window: W; at most that.
    """

    def __init__(self, max_cache_len: int, window: int, state: CacheState):
        with torch.inference_mode(False):  # as `MillionLayer`: it makes a counter
            super().__init__(max_cache_len=max_cache_len, sliding_window=window)  # its max_cache_len is then W
        self.capacity, self.state = max_cache_len, state
        self.empty = True  # not the state's, which flips in the last quantised layer of a forward

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch size, dtype and device of ``key_states`` [B, H, n, D]."""
        with torch.inference_mode(False):  # as `MillionLayer`
            super().lazy_initialization(key_states, value_states)

    @property
    def is_croppable(self) -> bool:
        """Whether no token is ever overwritten."""
        return self.max_cache_len == self.capacity

    @property
    def _million(self) -> bool:
        return self.state.config._attn_implementation == ATTENTION

    def get_seq_length(self) -> int | Tensor:
        """As `MillionLayer.get_seq_length`."""
        return 0 if not self.is_initialized or self.empty else self.cumulative_length.clone()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int | Tensor]:
        """Keys to attend to, and the slot of the first: a tensor, negative while the window is not full, see `million_mask`."""
        if not self._million:
            return self.capacity, 0
        if self.empty and query_length > 1:
            return query_length, 0
        return self.max_cache_len - 1 + query_length, self.cumulative_length - (self.max_cache_len - 1)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Store tokens [B, H, n, D]. Returns what the million attention function attends to (`KVHandle`s; the tokens themselves in a
        prefill into an empty cache), or for any other keys and values [B, H, max_cache_len, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        n, W, past = key_states.shape[2], self.max_cache_len, self.cumulative_length.clone()
        stored = past + torch.arange(n, device=self.device)
        rings, results = (self.keys, self.values), []
        if not self._million:
            slots = torch.arange(W, device=self.device)
            held = slots + (past - 1 - slots) // W * W  # negative where nothing is held yet
            held = torch.where(held < 0, slots, held)
        for ring, new in zip(rings, (key_states, value_states)):
            if not self._million:
                x = new.new_zeros(*new.shape[:2], self.capacity, new.shape[3])
                results.append(x.index_copy_(2, held, ring).index_copy_(2, stored, new))
            elif self.empty and n > 1:
                results.append(new)
            elif n > 1:
                before = (past + torch.arange(1, W, device=self.device)) % W  # slots of past - W + 1 .. past - 1
                results.append(KVHandle(self, torch.cat((ring.index_select(2, before), new), 2), False))
            else:
                results.append(KVHandle(self, ring, False))
            ring.index_copy_(2, stored[-W:] % W, new[:, :, -W:].detach())
        self.cumulative_length.add_(n)
        if self.empty:
            self.empty = False
        return results[0], results[1]

    def mask(self, mask: Tensor | None, n: int) -> Tensor:
        """Bool mask [B, 1, n, T] for the T keys that `update` gave for the last n tokens, in their order.

        mask: bool, the same for T keys in the order of their slots, as `million_mask` makes it; None for causal. Padding is
        hidden here as well: a step without a 2-D mask knows of it only from the clock.
        """
        W, past = self.max_cache_len, self.cumulative_length - n
        query = past + torch.arange(n, device=self.device)[:, None]
        kv = past - (W - 1) + torch.arange(W - 1 + n, device=self.device)
        if n == 1:
            order = (torch.arange(W, device=self.device) - past - 1) % W
            kv = kv[order]
            mask = mask if mask is None else mask.index_select(3, order)
        if mask is None:
            mask = (kv <= query) & (kv > query - W)
        start = self.state.start(self.device)[:, None, None, None]
        return mask & (kv >= start) | (kv == query)

    def crop(self, tokens_to_remove: int) -> None:
        """As `MillionLayer.crop`; only if `is_croppable`."""
        if self.is_initialized and tokens_to_remove != 0:
            past = int(self.cumulative_length)
            drop = _dropped(tokens_to_remove, past)
            self.cumulative_length.sub_(drop)
            self.empty = drop == past

    def reset(self) -> None:
        """Forget all tokens: nothing reads what lies beyond the count."""
        if self.is_initialized:
            self.cumulative_length.zero_()
        self.empty = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As `MillionLayer.reorder_cache`."""
        if self.is_initialized:
            for x in (self.keys, self.values):
                x.copy_(x.index_select(0, beam_idx.to(self.device)))


def _dropped(tokens_to_remove: int, past: int) -> int:
    """How many of ``past`` tokens a `crop` drops. Raises ValueError if there are fewer, or for a number of the wrong sign."""
    if tokens_to_remove > 0 and not CROP_KEEPS:
        raise ValueError(f"crop takes the negative number of tokens to drop, got {tokens_to_remove}")
    drop = -tokens_to_remove if tokens_to_remove < 0 else max(0, past - tokens_to_remove)
    if drop > past:
        raise ValueError(f"the cache holds {past} tokens, {drop} cannot be dropped")
    return drop


def _warn_dequantising(state: CacheState) -> None:
    if not state.warned_dequantising:
        state.warned_dequantising = True
        warnings.warn(
            f"attention implementation {state.config._attn_implementation!r} reads dequantised keys and values: slow, at full memory, and "
            "with left padding less exact; call million_cache.enable(model), and make the cache from that model or its own config object, to "
            "attend from the codes",
            stacklevel=2,
        )


class MillionStaticCache(StaticCache):
    """A static KV cache of product-quantised codes, for ``model.generate(..., past_key_values=cache)`` and ``torch.compile``.

    Full-attention layers are quantised; sliding-window layers keep their window in the model's dtype.

    Args:
        config: the model's config, or the model itself, also one that `torch.compile` or peft wraps (then its weights are checked
            against the codebooks at once; with a config that happens when `enable` has been called).
        codebooks: from `calibrate` or `Codebooks.from_pretrained`.
        max_cache_len: tokens a row can hold.
        batch_size, device, dtype: allocate now instead of at the first forward; needed before a forward that is itself
            compiled. ``device`` defaults to the CPU, ``dtype`` to the config's (under `torch.autocast` any will do).
        recent_tokens, sink_tokens: override the codebooks' `PQConfig`; fewer than they were trained for bring a warning.
        first_position: position of a row's first valid token; not 0 only when ``position_ids`` are shifted.

    Raises:
        ValueError: codebooks of another model, an impossible length.
        NotImplementedError: a model whose attention cannot be computed from codes (MLA, softcap, attention sinks, ...).
        torch.cuda.OutOfMemoryError: it does not fit the GPU; says what would, and nothing was allocated. Without
            ``batch_size`` the first forward asks that, unless the model is spread over several devices.
    """

    def __init__(
        self, config: PreTrainedConfig | PreTrainedModel, codebooks: Codebooks, max_cache_len: int, batch_size: int | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, *, recent_tokens: int | None = None,
        sink_tokens: int | None = None, first_position: int = 0,
    ):  # fmt: skip
        model = _unwrapped(config)
        config = config if model is None else model.config
        text = config.get_text_config(decoder=True)
        _check_max_cache_len(max_cache_len)
        _check_arguments(batch_size, dtype, first_position)
        check_supported(text)
        check_length(text, max_cache_len)
        differences = codebooks.fingerprint.config_differences(text)
        if differences:
            raise ValueError("these codebooks were calibrated for another model: " + "; ".join(differences))
        # PQConfig checks the values
        trained = codebooks.config
        pq = PQConfig(**{**trained.to_dict(), **_given(recent_tokens=recent_tokens, sink_tokens=sink_tokens)})
        if pq.recent_tokens < trained.recent_tokens or pq.sink_tokens < trained.sink_tokens:
            warnings.warn(
                f"these codebooks were trained for the last {trained.recent_tokens} and the first {trained.sink_tokens} tokens exact; "
                f"with {pq.recent_tokens} and {pq.sink_tokens} they lose quality, at 3 bits and fewer sometimes most of it: calibrate for "
                "the window that you use",
                stacklevel=2,
            )
        super().__init__(config=config, max_cache_len=max_cache_len)
        window = min(pq.recent_tokens, max_cache_len), min(pq.sink_tokens, max_cache_len)
        state = CacheState(text, codebooks, *window, first_position)
        if model is not None:
            refuse_other_model(codebooks, fingerprint(model))
            state.fingerprint_seen = True
        elif enabled(text) is not None:
            state.check_model(text)
        quantised = full_attention_layers(text)
        if sorted(codebooks.layers) != quantised:
            raise ValueError(
                f"the codebooks cover layers {sorted(codebooks.layers)}, the model's full-attention layers are {quantised}"
            )
        for i, layer in enumerate(self.layers):
            if i in quantised:
                self.layers[i] = MillionLayer(max_cache_len, state, i, is_last=i == quantised[-1])
            elif type(layer) is StaticSlidingWindowLayer:
                self.layers[i] = SlidingLayer(max_cache_len, layer.max_cache_len, state)
        self.state = state
        state.rolls_back = len(quantised) == len(self.layers)
        device = torch.device("cpu" if device is None else device)
        _warn_without_kernels(device)
        if batch_size is not None:
            self.early_initialization(
                batch_size,
                kv_heads(text),
                head_dim(text),
                dtype or getattr(config, "dtype", None) or torch.get_default_dtype(),
                device,
            )

    def early_initialization(
        self, batch_size: int, num_heads: int | list[int], head_dim: int | list[int], dtype: torch.dtype, device: torch.device
    ) -> None:  # fmt: skip
        """Allocate every layer on one device. Raises as the constructor."""
        if not self.layers[min(self.state.codebooks.layers)].is_initialized:
            self._check_memory(batch_size, dtype, torch.device(device))
        super().early_initialization(batch_size, num_heads, head_dim, dtype, device)

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def _check_memory(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raise torch.cuda.OutOfMemoryError if the whole cache does not fit the device. To be called before anything is allocated."""
        available = free_bytes(device)
        if available is None:
            return
        state, length = self.state, self.layers[max(self.state.codebooks.layers)].max_cache_len

        def need(pq: PQConfig, max_cache_len: int) -> int:
            pq = replace(pq, recent_tokens=state.recent_tokens, sink_tokens=state.sink_tokens)
            return self.required_bytes(state.config, pq, max_cache_len, batch_size, dtype, device.type)

        own = state.codebooks.config
        needed = need(own, length)
        if needed <= available:
            return
        fits = bisect_right(range(1, length), available, key=lambda n: need(own, n))
        fits -= fits % LENGTH_STEP
        ways = [f"max_cache_len {fits} with these codebooks"] if fits else []
        sizes = {name: need(pq, length) for name, pq in PRESETS.items() if pq.bits_per_element < own.bits_per_element}
        ways += [
            f"{length} tokens with codebooks of preset {name} ({gb(x)})" for name, x in sizes.items() if x <= available
        ]
        raise torch.cuda.OutOfMemoryError(
            f"the cache needs {gb(needed)} on {device} for {batch_size} x {length} tokens at {own.bits_per_element:g} bits, and "
            f"{gb(available)} are free; nothing was allocated. "
            + (f"These fit: {'; '.join(ways)}." if ways else "No shorter length and no preset fits.")
        )

    @classmethod
    def required_bytes(
        cls, config: PreTrainedConfig, pq: PQConfig | Codebooks, max_cache_len: int, batch_size: int = 1,
        dtype: torch.dtype = torch.bfloat16, device_type: str = "cpu",
    ) -> int:  # fmt: skip
        """Bytes that a cache will allocate, codebooks apart: codes, rings, sinks, clock, and dense layers that stay dense."""
        text = config.get_text_config(decoder=True)
        check_supported(text)
        _check_max_cache_len(max_cache_len)
        pq = pq.config if isinstance(pq, Codebooks) else pq
        H, D, B = kv_heads(text), head_dim(text), batch_size
        quantised = full_attention_layers(text)
        exact = min(pq.recent_tokens, max_cache_len) + min(pq.sink_tokens, max_cache_len)
        total = 3 * 8 + 2 * 4 * B  # clock, start, origin
        for dims in pq.subspace_dims(len(quantised)):
            # fp32: the choice between the layouts of one device does not change their size, and needs the device.
            for layout, d in zip(million_ops.layouts_for(device_type, D, *dims, torch.float32), dims):
                total += math.prod(layout.packed_shape(B, H, max_cache_len, D // d))
                total += B * H * D * exact * dtype.itemsize
        for i, layer in enumerate(StaticCache(config=config, max_cache_len=max_cache_len).layers):
            if i not in quantised and isinstance(layer, StaticLayer):
                total += 2 * B * H * D * layer.max_cache_len * dtype.itemsize + 8
        return total

    def named_tensors(self) -> dict[str, Tensor]:
        """Every tensor that holds tokens, by name: codes, rings, sinks, clocks, and dense layers. Empty before allocation."""
        named = {}
        for i, clock in enumerate(self.state.clocks):
            named |= {f"clock{i}_{name}": x for name, x in zip(("time", "start", "origin"), clock.tensors())}
        for i, layer in enumerate(self.layers):
            if not layer.is_initialized:
                continue
            if isinstance(layer, MillionLayer):
                names = (f"{kv}_{what}" for what in ("codes", "ring", "sinks") for kv in "kv")
                own = dict(zip(names, layer.buffers()))
            else:
                own = {"keys": layer.keys, "values": layer.values, "length": layer.cumulative_length}
            named |= {f"layer{i}_{name}": x for name, x in own.items()}
        return named

    @property
    def cache_bytes(self) -> int:
        """Bytes of `named_tensors`."""
        return sum(_bytes(x) for x in self.named_tensors().values())

    @property
    def codebook_bytes(self) -> int:
        """Bytes of codebooks, transforms and frequencies; shared by all caches of a model on one device."""
        return self.state.codebooks.nbytes

    @property
    def bits_per_element(self) -> float:
        """Bits of codes an element of the quantised layers."""
        return self.state.codebooks.config.bits_per_element

    @property
    def bits_per_element_total(self) -> float:
        """``8 cache_bytes / elements``, with everything that `cache_bytes` counts, at full length. 0 before allocation."""
        elements = sum(
            2
            * x.batch_size
            * x.num_heads
            * x.max_cache_len
            * (x.ring[0].shape[3] if isinstance(x, MillionLayer) else x.k_head_dim)
            for x in self.layers
            if x.is_initialized
        )
        return 8 * self.cache_bytes / elements if elements else 0.0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """See `MillionLayer.update`. In the model's first layer, before any has written: ValueError for more tokens than fit,
        another batch size, dtype or device, torch.cuda.OutOfMemoryError if the cache is not allocated and does not fit, RuntimeError
        after a forward that died where sliding-window layers cannot take its tokens back."""
        if torch.is_autocast_enabled(
            key_states.device.type
        ):  # keys that were rotated are in fp32 there, values are not
            held = _held(self.layers[layer_idx])
            dtype = torch.get_autocast_dtype(key_states.device.type) if held is None else held.dtype
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        if layer_idx == 0 and not torch.compiler.is_compiling():
            quantised = self.layers[min(self.state.codebooks.layers)]
            held = _held(self.layers[0])
            if held is not None and (key_states.dtype, key_states.device) != (held.dtype, held.device):
                raise ValueError(
                    f"the cache holds {held.dtype} on {held.device}, got {key_states.dtype} on {key_states.device}; nothing was written: give "
                    "MillionStaticCache the model's device= and dtype="
                )
            if held is None and not self._is_spread():
                self._check_memory(key_states.shape[0], key_states.dtype, key_states.device)
            if quantised.is_initialized and key_states.shape[0] != quantised.batch_size:
                raise ValueError(
                    f"the cache was made for batch size {quantised.batch_size}, got {key_states.shape[0]}; nothing was written"
                )
            self.state.announce(key_states.shape[2], quantised.max_cache_len)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _is_spread(self) -> bool:
        """Whether the model may lie on several devices, so that layers will be allocated on more than the first one's: that of a
        model that is not enabled is not known."""
        record = enabled(self.state.config)
        return record is None or len(record.devices) > 1

    # -- life ----------------------------------------------------------------------------------------------------------

    def forget_mask(self) -> None:
        """Look at the whole padding mask of the next forward. On a GPU a forward of one token takes it for the last forward's mask
        and one column: call this before one whose mask hides tokens that the last mask showed, such as that of a new turn."""
        self.check()
        self.state.padding.reset()

    def check(self) -> None:
        """Wait for the device and raise RuntimeError if text is wrong: a compiled step ran past ``max_cache_len`` and dropped tokens, or
        the mask of the last decode step changed under tokens that were cached (`PaddingCheck`)."""
        self.state.padding.arrived()
        for clock in self.state.clocks:
            past = int(clock.time[0])
            length = self.layers[max(self.state.codebooks.layers)].max_cache_len
            if past > length:
                raise RuntimeError(
                    f"{past} tokens were given to a cache of max_cache_len {length}: those beyond it were dropped, and what was generated "
                    "after them is wrong; reset() the cache and use a longer one"
                )

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:
        """Tokens in the cache: int 0 while empty, else a tensor. On the CPU, where it costs nothing, an overflow raises here."""
        if not torch.compiler.is_compiling() and all(c.time.device.type == "cpu" for c in self.state.clocks):
            self.check()
        first = min(self.state.codebooks.layers)
        length = super().get_seq_length(first if layer_idx == 0 else layer_idx)
        if isinstance(length, Tensor) and not torch.compiler.is_compiling():
            length.padding = self.state.padding  # for `million_mask`, which is given this tensor and no cache
        return length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int | Tensor]:
        """Columns of a mask for ``query_length`` more tokens, and the position of its first. ValueError if they do not fit: `generate` asks
        for the mask of a compiled step outside of it, and that is all that Python sees of the step."""
        sizes = super().get_mask_sizes(query_length, layer_idx)
        if torch.compiler.is_compiling():
            self.state.counted = None  # of a step that makes its mask itself Python sees nothing
        elif layer_idx < len(self.layers) and isinstance(layer := self.layers[layer_idx], MillionLayer):
            self.state.announce_mask(query_length, layer.max_cache_len)
        return sizes

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens of every row. Raises as `check`, and ValueError if there are fewer."""
        if tokens_to_remove == 0:
            return  # nothing to do, and nothing worth waiting for the device for
        self.check()
        # Not Cache.is_croppable, which the oldest supported transformers lack.
        kinds = sorted({type(x).__name__ for x in self.layers if not getattr(x, "is_croppable", False)})
        if kinds:
            raise NotImplementedError(f"layers of type {', '.join(kinds)} cannot be cropped")
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget all tokens, keep all buffers. Raises as `check`, after the reset is done, if text was lost before."""
        try:
            self.check()
        finally:
            super().reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> MillionStaticCache:
        """A cache with its own tokens that shares config and codebooks: how a prefilled prefix is reused."""
        state = self.state
        memo[id(state.config)], memo[id(state.codebooks)] = state.config, state.codebooks
        for layer in self.layers:
            if isinstance(layer, MillionLayer) and layer.is_initialized:
                memo[id(layer.books)] = layer.books
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        with torch.inference_mode(False):  # as `MillionLayer`
            twin.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items()})
        for clock in twin.state.clocks:
            clock.mark_static()
        for layer in twin.layers:
            if layer.is_initialized:
                layer.mark_static() if isinstance(layer, MillionLayer) else _mark_static(layer)
        return twin


def _held(layer: CacheLayerMixin) -> MillionLayer | Tensor | None:
    """What has the dtype and device of a layer's buffers; None before they are allocated."""
    if not layer.is_initialized:
        return None
    return layer if isinstance(layer, MillionLayer) else layer.keys


def free_bytes(device: torch.device) -> int | None:
    """Bytes that tensors can still take on a GPU: what the driver has free and what PyTorch's allocator holds unused. None elsewhere.

    Unused memory in PyTorch's hands can be in pieces too small for a buffer, so less may fit, never more.
    """
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def gb(count: int) -> str:
    """Bytes as text, in units of 10^9."""
    return f"{count / 1e9:.2f} GB"


def _mark_static(layer: StaticLayer) -> None:
    for x in (layer.keys, layer.values, layer.cumulative_length):
        torch._dynamo.mark_static_address(x)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _given(**values) -> dict[str, Any]:
    return {k: v for k, v in values.items() if v is not None}


def _check_max_cache_len(max_cache_len: int) -> None:
    if not isinstance(max_cache_len, int) or isinstance(max_cache_len, bool) or max_cache_len < 1:
        raise ValueError(f"max_cache_len must be a positive integer, got {max_cache_len!r}")


def _check_arguments(batch_size: int | None, dtype: torch.dtype | None, first_position: int) -> None:
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
    if dtype not in (None, *FLOATS):
        raise ValueError(f"dtype must be {', '.join(map(str, FLOATS))}, got {dtype!r}")
    if type(first_position) is not int:
        raise ValueError(f"first_position must be an integer, got {first_position!r}")


def _unwrapped(model: object) -> PreTrainedModel | None:
    """The model itself of one that `torch.compile` or peft wraps; None for what is no model."""
    model = getattr(model, "_orig_mod", model)
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model if isinstance(model, PreTrainedModel) else None


def _warn_without_kernels(device: torch.device) -> None:
    backends = million_ops.backends()
    triton_runs = device.type == "cuda" and backends["triton"].startswith("available:")
    if not million_ops.has_kernels(device.type) and not triton_runs:
        warnings.warn(
            f"no compiled kernels for {device.type!r}: {backends.get(device.type, 'unknown device')}. The PyTorch reference "
            "runs: right, and slow",
            stacklevel=3,
        )
