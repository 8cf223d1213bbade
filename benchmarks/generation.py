"""What the benchmarks of whole models share: random models of real shapes, every kind of cache filled without a prefill, and
one decode step that can be repeated.

A step is repeated **at a fixed length**: the caches with buffers of fixed size hold exactly ``tokens`` tokens after it, and
taking the newest back is part of the repeated step (one small kernel). Compiled steps are ``torch.compile(fullgraph=True)``
captured in one CUDA graph, for every kind alike: that is ``mode="reduce-overhead"`` without the time Python needs between
steps, so the fastest that each kind can be.
"""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import config as inductor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AttentionInterface,
    Cache,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    QuantizedCache,
    StaticCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from benchmarks.timing import replayed, synchronize
from million_cache import PRESETS, Codebooks, MillionStaticCache, PQConfig, disable, enable
from million_cache.cache import KVHandle
from million_cache.codebook import LayerCodebooks
from million_cache.models import cache_argument, fingerprint, head_dim, kv_heads, measure_rotations
from million_ops.layout import CENTROIDS

FILL_TOKENS = 8192  # random tokens appended at a time, over all rows

SHAPES = {
    "llama3-8b": dict(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128, intermediate_size=14336,
        vocab_size=128256, max_position_embeddings=131072, rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "llama2-7b": dict(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, head_dim=128, intermediate_size=11008,
        vocab_size=32000, max_position_embeddings=4096, rms_norm_eps=1e-5,
    ),
    "tiny": dict(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=256,
        vocab_size=512, max_position_embeddings=8192,
    ),
}  # fmt: skip


# -- models ----------------------------------------------------------------------------------------------------------------


def model_config(shape: str, layers: int | None = None) -> LlamaConfig:
    """Config of a shape in `SHAPES`, with ``layers`` layers instead of all if given."""
    known = SHAPES[shape]
    return LlamaConfig(**{**known, "num_hidden_layers": layers or known["num_hidden_layers"]}, pad_token_id=None)


def build_model(config: LlamaConfig, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """The model with transformers' own random weights (normal, std 0.02: activations stay finite), made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    model.requires_grad_(False)
    return model


# Quantisation of weights by torchao, weights alone: bytes an element of the decoder layers' matrices. int8: an fp32 scale a row;
# int4: a 16-bit scale and zero point for every 128, in the format that needs no other package.
WEIGHTS = ("bf16", "int8", "int4")
INT4_GROUP = 128


def quantise_weights(model: LlamaForCausalLM, weights: str) -> None:
    """The decoder layers' matrices to ``weights``, in place; embedding and vocabulary projection stay. "bf16": nothing.

    Raises ImportError without torchao, NotImplementedError for int4 without a GPU, ValueError for an unknown kind.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    if weights == "bf16":
        return
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    if weights == "int8":
        config = Int8WeightOnlyConfig(set_inductor_config=False)
    elif model.device.type != "cuda":
        raise NotImplementedError("torchao's int4 format that needs no other package, tile_packed_to_4d, is for GPUs")
    else:
        config = Int4WeightOnlyConfig(
            group_size=INT4_GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
    quantize_(model.model, config)


def compiling(weights: str) -> AbstractContextManager:
    """Options of inductor for such weights. Of those that torchao sets by itself, for the whole process, int8 needs this one: with it the
    product of one row is a kernel that reads int8; without, weights are written out in 16 bit first."""
    return inductor.patch(coordinate_descent_tuning=True) if weights == "int8" else nullcontext()


@cache
def weight_bytes(shape: str, layers: int | None = None, itemsize: int = 2, weights: str = "bf16") -> int:
    """Bytes of a shape's weights, without making them. ``itemsize``: of those that are not quantised, and of int4's scales."""
    with torch.device("meta"):
        model = LlamaForCausalLM(model_config(shape, layers))
    total = itemsize * sum(x.numel() for x in model.parameters())
    if weights == "bf16":
        return total
    for layer in model.model.layers.modules():
        if isinstance(layer, torch.nn.Linear):
            count, rows = layer.weight.numel(), layer.weight.shape[0]
            quantised = count + 4 * rows if weights == "int8" else count // 2 + 2 * itemsize * count // INT4_GROUP
            total += quantised - itemsize * count
    return total


def random_codebooks(model: LlamaForCausalLM, pq: PQConfig) -> Codebooks:
    """Codebooks of the model's own rotation and fingerprint, on its device, with random centroids and orthogonal transforms.

    Keys and values of the random models have a standard deviation near 1, like these centroids.
    """
    rotations = measure_rotations(model)
    H, D, device = kv_heads(model.config), head_dim(model.config), model.device
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    layers = {}
    for i, rotation in rotations.items():
        transform = torch.linalg.qr(normal(H, D, D))[0].contiguous()
        layers[i] = LayerCodebooks(
            k_codebook=normal(H, CENTROIDS, D // pq.k_subspace_dim, pq.k_subspace_dim).half(),
            v_codebook=normal(H, CENTROIDS, D // pq.v_subspace_dim, pq.v_subspace_dim).half(),
            k_transform=transform,
            k_transform_inv=transform.mT.contiguous(),
            inv_freq=rotation.inv_freq,
            rope_interleaved=rotation.kind == "interleaved",
            frame_tokens=0 if rotation.inv_freq is None else pq.frame_tokens,
        )
    return Codebooks(pq, fingerprint(model, rotations), layers, provenance={"random": True})


# -- the strongest 16-bit attention ------------------------------------------------------------------------------------------

# Valid tokens of a StaticCache: known on the host, a constant in the graph.
_prefix: dict[str, int | None] = {"tokens": None}


def _prefix_attention(backend: SDPBackend) -> Callable:
    """Attention function for transformers: at one query token, one kernel of ``backend`` over the valid prefix, without a mask
    and without repeating KV heads."""

    def attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
        if query.shape[2] > 1:
            return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        key, value = key[:, :, : _prefix["tokens"]], value[:, :, : _prefix["tokens"]]
        # These kernels exist on GPUs; elsewhere, for tests, PyTorch chooses.
        with sdpa_kernel(backend) if query.device.type == "cuda" else nullcontext():
            out = F.scaled_dot_product_attention(
                query, key, value, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
            )
        return out.transpose(1, 2).contiguous(), None

    return attention


def _prefix_mask(batch_size, q_length=None, **kwargs):
    """No mask for one query token: every token of the valid prefix may be seen."""
    return None if q_length == 1 else sdpa_mask(batch_size=batch_size, q_length=q_length, **kwargs)


# -- kinds of cache ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A way to cache and to attend.

    Attributes:
        name: as on the command line.
        attention: the attention implementation it runs with, by transformers' name.
        compiled: whether the decode step is compiled; else it runs eager.
        pq: of a `MillionStaticCache`.
        package: that a `QuantizedCache` needs, and its ``backend`` there.
    """

    name: str
    attention: str = "sdpa"
    compiled: bool = True
    pq: PQConfig | None = None
    package: str | None = None
    backend: str | None = None

    @property
    def grows(self) -> bool:
        """Whether a step makes the cache longer, instead of writing into buffers of fixed size."""
        return not self.compiled

    def missing(self) -> str | None:
        """The package that is needed and not installed."""
        try:
            found = self.package is None or importlib.util.find_spec(self.package) is not None
        except ModuleNotFoundError:  # the parent of a dotted name
            found = False
        return None if found else self.package

    def cache_bytes(self, config: LlamaConfig, tokens: int, batch: int, dtype: torch.dtype, device: str) -> int:
        """Bytes of the cache alone, codebooks apart. Of a `QuantizedCache` by its format: bits and, of every 64, scale and shift."""
        if self.pq is not None:
            return MillionStaticCache.required_bytes(config, self.pq, tokens, batch, dtype, device)
        elements = 2 * config.num_hidden_layers * batch * kv_heads(config) * tokens * head_dim(config)
        return elements * (64 * 4 + 2 * 16) // (64 * 8) if self.backend else elements * dtype.itemsize

    def codebook_bytes(self, config: LlamaConfig) -> int:
        """Bytes of codebooks and transforms of all layers; 0 where there are none."""
        H, D = kv_heads(config), head_dim(config)
        return 0 if self.pq is None else config.num_hidden_layers * H * (2 * CENTROIDS * D * 2 + 2 * D * D * 4)

    def workspace_bytes(self, config: LlamaConfig, tokens: int, batch: int, dtype: torch.dtype) -> int:
        """Least bytes that a step needs besides: what a layer's attention makes of its keys and values."""
        group = config.num_attention_heads // kv_heads(config)
        layer = 2 * batch * kv_heads(config) * tokens * head_dim(config) * dtype.itemsize
        if self.name == "static" and group > 1:
            return group * layer  # transformers repeats KV heads when there is a mask
        return layer if self.grows else 0  # concatenated or dequantised anew in every step

    def make(self, model: LlamaForCausalLM, tokens: int, batch: int) -> Cache:
        """An empty cache for ``tokens`` tokens a row; of fixed size: allocated. The model must be `attending` to this kind."""
        config = model.config
        if self.pq is not None:
            books = random_codebooks(model, self.pq)
            return MillionStaticCache(config, books, tokens, batch, model.device, model.dtype)
        if self.backend is not None:
            axis = {"quanto": 0, "hqq": 1}[self.backend]  # transformers' documented choice
            return QuantizedCache(self.backend, config, nbits=4, axis_key=axis, axis_value=axis)
        if self.grows:
            return DynamicCache(config=config)
        cache = StaticCache(config=config, max_cache_len=tokens)
        cache.early_initialization(batch, kv_heads(config), head_dim(config), model.dtype, model.device)
        return cache


KINDS = {
    kind.name: kind
    for kind in (
        Kind("static"),
        Kind("static-cudnn", attention="prefix_cudnn"),
        Kind("static-flash", attention="prefix_fa"),
        Kind("dynamic", compiled=False),
        Kind("quanto-4bit", compiled=False, package="optimum.quanto", backend="quanto"),
        Kind("hqq-4bit", compiled=False, package="hqq", backend="hqq"),
        *(Kind(f"million-{name}", attention="million", pq=pq) for name, pq in PRESETS.items()),
    )
}

# No name with "flash" in it: transformers would look for FlashAttention's own package.
for _name, _backend in (("prefix_cudnn", SDPBackend.CUDNN_ATTENTION), ("prefix_fa", SDPBackend.FLASH_ATTENTION)):
    AttentionInterface.register(_name, _prefix_attention(_backend))
    AttentionMaskInterface.register(_name, _prefix_mask)


@contextmanager
def attending(model: LlamaForCausalLM, kind: Kind, tokens: int) -> Iterator[None]:
    """The model runs with the kind's attention over ``tokens`` tokens; afterwards with "sdpa" again, and forgets compiled code."""
    torch._dynamo.reset()
    _prefix["tokens"] = tokens
    if kind.pq is not None:
        enable(model)
    else:
        model.set_attn_implementation(kind.attention)
    try:
        yield
    finally:
        disable(model)
        model.set_attn_implementation("sdpa")
        torch._dynamo.reset()


# -- steps -------------------------------------------------------------------------------------------------------------------


def append(cache: Cache, k: Tensor, v: Tensor, layer_idx: int) -> None:
    """Keys and values [B, H, n, D] to the end of a layer, the layers in order: what a forward does, without attending.

    A `MillionStaticCache` encodes them with `million_ops.pq_append_`; it must belong to an enabled model.
    """
    key, value = cache.update(k, v, layer_idx)
    if isinstance(key, KVHandle):
        key.layer.append(key.new, value.new)
        key.layer.finish()


@torch.no_grad()
def fill(cache: Cache, model: LlamaForCausalLM, tokens: int, batch: int) -> None:
    """`append` ``tokens`` random keys and values a row to every layer: no prefill is run."""
    config = model.config
    fixed = isinstance(cache, StaticCache)
    chunk = max(1, FILL_TOKENS // batch) if fixed else tokens
    for begin in range(0, tokens, chunk):
        shape = batch, kv_heads(config), min(chunk, tokens - begin), head_dim(config)
        k, v = (torch.randn(shape, device=model.device, dtype=model.dtype) for _ in range(2))
        for i in range(config.num_hidden_layers):
            append(cache, k, v, i)


def rewinder(cache: Cache) -> Callable[[], None]:
    """A function that takes the newest token back without waiting for the device; for caches that grow it does nothing."""
    if isinstance(cache, MillionStaticCache):
        clocks = [(clock.time, clock.time.clone()) for clock in cache.state.clocks]

        def rewind() -> None:
            for now, before in clocks:
                now.copy_(before)

        return rewind
    if isinstance(cache, StaticCache):
        lengths = [layer.cumulative_length for layer in cache.layers]
        return lambda: torch._foreach_sub_(lengths, 1)  # one kernel for all layers
    return lambda: None


def decode_step(model: LlamaForCausalLM, kind: Kind, cache: Cache, batch: int, backend: str) -> Callable[[], Tensor | None]:  # fmt: skip
    """One decode step over a filled cache, to be called again and again; compiled with ``backend`` and captured if the kind is.

    Returns logits [B, 1, vocabulary], or None from a CUDA graph. Raises RuntimeError when logits are not finite or the step
    was compiled more than once.
    """
    token = torch.randint(model.config.vocab_size, (batch, 1), device=model.device)
    forward = torch.compile(model, fullgraph=True, backend=backend) if kind.compiled else model
    rewind, taken = rewinder(cache), cache_argument(model, cache)

    @torch.no_grad()
    def step() -> Tensor:
        logits = forward(token, use_cache=True, **taken).logits
        rewind()
        return logits

    if not bool(step().isfinite().all()):
        raise RuntimeError("logits are not finite")
    if not kind.compiled:
        return step
    with torch.compiler.set_stance("fail_on_recompile"):
        step()
        return replayed(step) if model.device.type == "cuda" else step


def mean_seconds(step: Callable, device: str, steps: int = 20, repeats: int = 3, limit: float = 10.0) -> float:
    """Seconds of one call: the fastest mean of ``steps`` calls in a row; fewer calls where those would take over ``limit`` seconds.

    On a GPU by its own clock.
    """
    synchronize(device)
    begin = time.perf_counter()
    step()
    synchronize(device)
    steps = max(1, min(steps, int(limit / repeats / (time.perf_counter() - begin))))
    best = float("inf")
    for _ in range(repeats):
        if device == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            for _ in range(steps):
                step()
            last.record()
            last.synchronize()
            seconds = first.elapsed_time(last) / 1e3
        else:
            begin = time.perf_counter()
            for _ in range(steps):
                step()
            seconds = time.perf_counter() - begin
        best = min(best, seconds / steps)
    return best


@torch.no_grad()
def head_seconds(model: LlamaForCausalLM, batch: int, device: str) -> float:
    """Seconds of what a decode step does once and not in every layer: embedding, last norm and vocabulary projection."""
    token = torch.zeros(batch, 1, dtype=torch.long, device=model.device)

    def head() -> Tensor:
        return model.lm_head(model.model.norm(model.model.embed_tokens(token)))

    return mean_seconds(replayed(head) if device == "cuda" else head, device)


def extrapolated(seconds: float, head: float, factor: float) -> float:
    """Seconds of a step of ``factor`` times the layers, ``head`` of which are not a layer's. Raises RuntimeError if that is all of it."""
    if head >= seconds:
        raise RuntimeError(
            f"a step took {seconds * 1e3:.3g} ms, its head alone {head * 1e3:.3g}: too noisy to extrapolate"
        )
    return head + (seconds - head) * factor


@torch.no_grad()
def prefill_seconds(model: LlamaForCausalLM, make_cache: Callable[[], Cache], tokens: int, batch: int, repeats: int) -> float:  # fmt: skip
    """Time to the first token, seconds: an eager prefill (as `generate` runs it) into an empty cache and the choice of the
    token. The fastest of ``repeats``, after a short one."""
    device = model.device.type
    ids = torch.randint(model.config.vocab_size, (batch, tokens), device=model.device)
    best = float("inf")
    for i in range(1 + repeats):
        prompt = ids[:, : min(tokens, 1024)] if i == 0 else ids
        cache = make_cache()
        synchronize(device)
        begin = time.perf_counter()
        model(prompt, use_cache=True, logits_to_keep=1, **cache_argument(model, cache)).logits.argmax(-1).cpu()
        seconds = time.perf_counter() - begin
        del cache  # before the next is made
        if i > 0:
            best = min(best, seconds)
    return best


def free_memory(device: str) -> None:
    """Give back what nobody holds."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(device: str) -> int | None:
    """Most bytes of tensors at a time since `reset_peak`; None where nobody counts them."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else None


def device_bytes(device: str) -> int | None:
    """Memory of the GPU; None elsewhere."""
    return torch.cuda.get_device_properties(0).total_memory if device == "cuda" else None


def largest(fits: Callable[[int], bool], step: int = 1024, start: int = 1 << 17) -> int:
    """The largest multiple of ``step`` that ``fits`` (which must be monotonous), 0 if none does. Doubling, then bisection."""
    low, high = 0, start // step
    while fits(high * step):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
