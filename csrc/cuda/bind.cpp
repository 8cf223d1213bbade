// Registers the CUDA kernels: checks arguments, describes tensors as plain structs, allocates workspaces. Host code
// only, compiled without CUDA's compiler; nothing here waits for the device or reads from it.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <tuple>

#include "../common/arguments.h"
#include "attention_plan.h"
#include "kernels.h"

namespace million {
namespace {

constexpr int64_t kMaxSlots = int64_t(1) << 30;
constexpr int64_t kMaxQueries = 256;                    // new tokens of one launch
constexpr int64_t kWorkspaceFloats = int64_t(1) << 26;  // prepared queries of one launch, 256 MiB, if it has several

cudaStream_t stream_of(const Tensor& x) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char* op, cudaError_t error) {
  REQUIRE(error == cudaSuccess, op, ": CUDA error: ", cudaGetErrorString(error));
}

}  // namespace

std::string device_error() {
  size_t free = 0, total = 0;
  const cudaError_t error = cudaMemGetInfo(&free, &total);  // fails if a kernel has
  return error == cudaSuccess ? "" : std::string("CUDA error: ") + cudaGetErrorString(error);
}

namespace {

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, which, device);
  return value;
}

// Bytes of shared memory that a block can have; fewer if MILLION_GPU_SHARED (KiB) says so, to run on a large GPU what
// smaller ones get.
int shared_limit() {
  static const char* const given = std::getenv("MILLION_GPU_SHARED");
  const int limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return given ? std::min(limit, std::atoi(given) << 10) : limit;
}

// Programmatic dependent launch.
bool can_overlap() { return attribute(cudaDevAttrComputeCapabilityMajor) >= 9; }

// What the current device cannot run is refused before anything is launched.
void check_head_dim(int64_t D) {
  REQUIRE(D > 0 && D <= 256 && D % kChannelStep == 0, "the CUDA kernels need a head_dim that is a multiple of ",
          kChannelStep, " and at most 256, got ", D);
  REQUIRE(attribute(cudaDevAttrComputeCapabilityMajor) >= 8,
          "the CUDA kernels need a GPU of compute capability 8.0 or newer");
  const int shared = shared_limit();
  REQUIRE(D <= 128 || shared >= kWideShared, "head_dim ", D, " needs ", kWideShared >> 10,
          " KiB of shared memory a block, this GPU has ", shared >> 10);
}

// Rows and KV heads are the second dimension of every launch's grid.
void check_grid(int64_t B, int64_t H) {
  REQUIRE(B * H <= 65535, "the CUDA kernels take at most 65535 rows x KV heads, got ", B, " x ", H);
}

// Kernels count slots in 32 bits.
void check_slots(const Layer& layer) {
  for (const Coded* book : {&layer.k, &layer.v})
    REQUIRE(book->slots <= kMaxSlots, "the CUDA kernels take at most 2^30 slots, got ", book->slots);
}

// Whether a layer's codes are the tensor core kernel's. What it cannot run is refused.
bool check_layouts(const Layer& layer) {
  if (layer.k.layout == kRows64 && layer.v.layout == kRows64) return false;
  REQUIRE(layer.k.layout == kMmaK && layer.v.layout == kMmaV,
          "the CUDA kernels read codes of layouts 1 and 1 (rows64) or 2 and 3 (mma_k, mma_v), got k_layout ",
          layer.k.layout, " and v_layout ", layer.v.layout);
  REQUIRE(layer.dtype != DType::f32, "layouts mma_k and mma_v are for 16-bit models; torch.float32 needs rows64");
  const int shared = shared_limit(), tables = attention_mma_tables(layer.D, layer.k.d, layer.v.d, shared);
  REQUIRE(tables > 0, "no tensor core kernel for head_dim ", layer.D, " with ", layer.k.d, " and ", layer.v.d,
          " channels a subspace; use layout rows64 (million_ops.layouts_for chooses)");
  REQUIRE(tables + scratch_bytes(layer.D) <= shared && attribute(cudaDevAttrReservedSharedMemoryPerBlock) == 1024,
          "the tensor core kernel needs ", (tables + scratch_bytes(layer.D)) >> 10,
          " KiB of shared memory a block, this GPU has ", shared >> 10,
          "; use layout rows64 (million_ops.layouts_for chooses)");
  for (const Coded* book : {&layer.k, &layer.v})
    REQUIRE(reinterpret_cast<uintptr_t>(book->codebook) % 16 == 0 && reinterpret_cast<uintptr_t>(book->codes) % 16 == 0,
            "codebooks and codes must be aligned to 16 bytes");
  REQUIRE(reinterpret_cast<uintptr_t>(layer.inverse) % 16 == 0, "the transform's inverse must be aligned to 16 bytes");
  return true;
}

// Makes the tensors' device current while an op runs.
struct OnDevice {
  int before = 0;
  explicit OnDevice(const Tensor& x) {
    cudaGetDevice(&before);
    if (x.get_device() != before) cudaSetDevice(x.get_device());
  }
  ~OnDevice() { cudaSetDevice(before); }
};

Tensor pq_encode(const Tensor& x, const Tensor& codebook) {
  check_shape("x", x, {kAny, kAny, kAny, kAny}, "[B, H, T, D]");
  const DType dtype = float_dtype("x", x.scalar_type());
  const int64_t B = x.size(0), H = x.size(1), T = x.size(2), D = x.size(3);
  Copies copies;
  Encode a{strided_of(x, size_of(dtype), copies),          dtype, int(B), int(H), int(T), int(D),
           coded_of("codebook", codebook, H, D, x, copies)};
  Tensor codes = allocate("codes", x, {B, H, T, a.book.S}, ScalarType::Byte);
  if (codes.numel() == 0) return codes;
  const OnDevice guard(x);
  check_head_dim(D);
  check_grid(B, H);
  a.book.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  check_launch("pq_encode", encode_launch(a, stream_of(x)));
  return codes;
}

Tensor pq_decode(const Tensor& codes, const Tensor& codebook, ScalarType dtype) {
  check_shape("codes", codes, {kAny, kAny, kAny, kAny}, "[B, H, T, S]");
  check_dtype("codes", codes, ScalarType::Byte, codes);
  const int64_t B = codes.size(0), H = codes.size(1), T = codes.size(2);
  Copies copies;
  const Coded book = coded_of("codebook", codebook, H, kAny, codes, copies);
  REQUIRE(codes.size(3) == book.S, "codes have ", codes.size(3), " subspaces, the codebook ", book.S);
  const DType element = float_dtype("dtype", dtype);
  Tensor out = allocate("the result", codes, {B, H, T, book.S * book.d}, dtype);
  if (out.numel() == 0) return out;
  const Decode a{contiguous_data<uint8_t>(codes, copies), int(B), int(H), T, book, element, out.mutable_data_ptr()};
  const OnDevice guard(codes);
  check_launch("pq_decode", decode_launch(a, stream_of(codes)));
  return out;
}

Tensor pq_dequantize(const Tensor& codes, const Tensor& codebook, const std::optional<Tensor>& transform_inv,
                     const std::optional<Tensor>& inv_freq, const Tensor& origin, int64_t layout, ScalarType dtype,
                     int64_t frame_tokens, bool rope_interleaved, int64_t first) {
  check_shape("codes", codes, {kAny, kAny, kAny, kAny}, "[B, H, tiles, bytes of a tile]");
  const int64_t B = codes.size(0), H = codes.size(1);
  Copies copies;
  Dequantize a{};
  a.book = coded_of("codebook", codebook, H, kAny, codes, copies);
  check_codes("codes", codes, layout, B, H, a.book, codes);
  const int64_t D = a.book.S * a.book.d;
  a.B = int(B), a.H = int(H), a.D = int(D), a.T = a.book.slots, a.dtype = float_dtype("dtype", dtype);
  const bool split = transform_inv && transform_inv->scalar_type() == ScalarType::Float;
  if (transform_inv) {
    check_shape("transform_inv", *transform_inv, {H, D, D}, "[KV heads, D, D]");
    REQUIRE(split || transform_inv->scalar_type() == ScalarType::Half,
            "transform_inv must be torch.float16 or torch.float32, got ", shown(transform_inv->scalar_type()));
    check_dtype("transform_inv", *transform_inv, split ? ScalarType::Float : ScalarType::Half, codes);
    if (split)
      a.inverse = contiguous_data<float>(*transform_inv, copies);
    else
      a.inverse = columns_of(*transform_inv, copies);
  }
  check_shape("origin", origin, {B}, "[B]");
  check_dtype("origin", origin, ScalarType::Int, codes);
  REQUIRE(frame_tokens >= 0, "frame_tokens must not be negative, got ", frame_tokens);
  REQUIRE(first >= 0, "first_slot must not be negative, got ", first);
  if (inv_freq) {
    check_frequencies(*inv_freq, D);
    check_dtype("inv_freq", *inv_freq, ScalarType::Float, codes);
    a.inv_freq = frame_tokens > 0 ? contiguous_data<float>(*inv_freq, copies) : nullptr;
    a.half = int(inv_freq->size(0));
  }
  a.origin = contiguous_data<int32_t>(origin, copies);
  a.frame_tokens = int(std::min(frame_tokens, kMaxSlots));
  a.first_slot = int(first);
  a.interleaved = rope_interleaved;
  Tensor out = allocate("the result", codes, {B, H, a.T, D}, dtype);
  if (out.numel() == 0) return out;
  const OnDevice guard(codes);
  check_head_dim(D);
  check_grid(B, H);
  REQUIRE(first <= kMaxSlots - a.T, "the CUDA kernels take at most 2^30 slots, got ", a.T, " from slot ", first, " on");
  for (const void* x : {static_cast<const void*>(a.book.codebook), a.inverse})
    REQUIRE(reinterpret_cast<uintptr_t>(x) % 16 == 0, "codebook and transform_inv must be aligned to 16 bytes");
  const auto strides = codes.strides();
  if (strides[3] == 1 && strides[2] == codes.size(3)) {
    a.book.codes = static_cast<uint8_t*>(const_cast<void*>(codes.const_data_ptr()));
    a.row = strides[0], a.head = strides[1];
  } else {
    a.book.codes = const_cast<uint8_t*>(contiguous_data<uint8_t>(codes, copies));
    a.head = codes.size(2) * codes.size(3), a.row = H * a.head;
  }
  a.aligned = (reinterpret_cast<uintptr_t>(a.book.codes) | a.row | a.head) % 4 == 0;
  a.out = out.mutable_data_ptr();
  check_launch("pq_dequantize", dequantize_launch(a, split, attribute(cudaDevAttrMultiProcessorCount), shared_limit(),
                                                  stream_of(codes)));
  return out;
}

void pq_append_(MILLION_APPEND_PARAMETERS) {
  LayerTensors tensors = MILLION_LAYER_TENSORS;
  const Layer layer = tensors.describe();
  const OnDevice guard(k);
  check_head_dim(layer.D);
  check_grid(layer.B, layer.H);
  check_slots(layer);
  if (layer.B * layer.H == 0) return;
  // Copies that were made here of k or v are not what its attention has waited for.
  const bool early = can_overlap() && layer.n == 1 && after.has_value() && tensors.copies.empty();
  check_launch("pq_append_", append_launch(layer, early, stream_of(k)));
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, LayerTensors tensors, const std::optional<Tensor>& mask,
                                     double scale, bool with_lse) {
  const Layer layer = tensors.describe(true);
  const int64_t G = check_query(q, tensors.k), heads = layer.H * G;
  const OnDevice guard(q);
  check_head_dim(layer.D);
  check_grid(layer.B, layer.H);
  check_slots(layer);
  const bool tensor_cores = check_layouts(layer);
  const Strided queries = strided_of(q, size_of(layer.dtype), tensors.copies);
  const uint8_t* mask_bits = mask_data(mask, layer, q, tensors.copies);
  Tensor out = allocate("the result", q, {layer.B, layer.n, heads, layer.D}, q.scalar_type());
  Tensor lse = with_lse ? allocate("lse", q, {layer.B, heads, layer.n}, ScalarType::Float) : out;
  if (layer.B == 0) return {out, lse};
  Attention a{};
  a.layer = layer;
  a.q = queries;
  a.G = int(G);
  a.by_heads = 1.f / layer.H;
  a.by_group = 1.f / G;
  a.mask = mask_bits;
  a.mask_slots = mask ? mask->size(3) : 0;
  a.scale = float(scale);
  a.out = out.mutable_data_ptr();
  a.lse = with_lse ? static_cast<float*>(lse.mutable_data_ptr()) : nullptr;
  const int64_t slots = std::min(layer.k.slots, layer.v.slots);
  a.frames = layer.inv_freq ? int(std::max<int64_t>(1, (slots + layer.frame_tokens - 1) / layer.frame_tokens)) : 1;

  // Many new tokens go in blocks, so that the workspaces do not grow with their number.
  const int64_t query_floats = layer.B * heads * a.frames * layer.D;
  const int64_t block = std::min({layer.n, kMaxQueries, std::max<int64_t>(1, kWorkspaceFloats / query_floats)});
  a.rows = int(block * G);
  a.overlap = can_overlap();
  a.at_once = attribute(cudaDevAttrMultiProcessorCount);
  a.shared = shared_limit();
  const Plan plan = plan_for(a, tensor_cores);
  a.block_rows = plan.rows, a.splits = plan.splits;
  const int64_t units = (a.rows + plan.rows - 1) / plan.rows;
  const auto floats = [&](int64_t count) { return allocate("a workspace", q, {count}, ScalarType::Float); };
  Tensor prepared =
      floats(tensor_cores ? layer.B * layer.H * a.frames * units * rows_of_operands(plan.rows) * layer.D / 2
                          : query_floats * block);
  Tensor partials = floats(layer.B * heads * block * a.splits * (layer.D + 2));
  a.prepared = prepared.mutable_data_ptr();
  a.partials = static_cast<float*>(partials.mutable_data_ptr());
  for (int64_t first = 0; first < layer.n; first += block) {
    a.query0 = int(first);
    a.rows = int(std::min(block, layer.n - first) * G);
    const auto launch = tensor_cores ? attention_mma_launch : attention_rows_launch;
    check_launch("pq_attention", launch(a, stream_of(q)));
  }
  return {out, lse};
}

Tensor pq_attention(MILLION_ATTENTION_PARAMETERS) {
  return std::get<0>(attention(q, MILLION_LAYER_TENSORS, mask, scale, false));
}

std::tuple<Tensor, Tensor> pq_attention_lse(MILLION_ATTENTION_PARAMETERS) {
  return attention(q, MILLION_LAYER_TENSORS, mask, scale, true);
}

}  // namespace
}  // namespace million

STABLE_TORCH_LIBRARY_IMPL(million_ops, CUDA, m) {
  m.impl("pq_encode", TORCH_BOX(&million::pq_encode));
  m.impl("pq_decode", TORCH_BOX(&million::pq_decode));
  m.impl("pq_dequantize", TORCH_BOX(&million::pq_dequantize));
  m.impl("pq_append_", TORCH_BOX(&million::pq_append_));
  m.impl("pq_attention", TORCH_BOX(&million::pq_attention));
  m.impl("pq_attention_lse", TORCH_BOX(&million::pq_attention_lse));
}
