// Tensors to plain structs, with the checks of `million_ops/_checks.py`. For the bind.cpp of every device; the only
// header that includes torch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "layer.h"
#include "pq_layout.h"
#include "shapes.h"

namespace million {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

#define REQUIRE(condition, ...) \
  if (!(condition)) ::million::fail(__VA_ARGS__)

constexpr int64_t kAny = -1;

inline std::string shown(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  for (size_t i = 0; i < sizes.size(); i++) {
    text << (i ? ", " : "[");
    sizes[i] == kAny ? text << "*" : text << sizes[i];
  }
  return text.str() + "]";
}

inline std::vector<int64_t> sizes_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

inline const char* shown(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::Byte: return "torch.uint8";
    case ScalarType::Bool: return "torch.bool";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Long: return "torch.int64";
    case ScalarType::Double: return "torch.float64";
    default: return "another dtype";
  }
}

inline void check_shape(const char* name, const Tensor& x, std::initializer_list<int64_t> want, const char* says) {
  const auto sizes = x.sizes();
  bool ok = sizes.size() == want.size();
  for (size_t i = 0; ok && i < want.size(); i++) ok = want.begin()[i] == kAny || want.begin()[i] == sizes[i];
  REQUIRE(ok, name, " must be ", says, " ", shown(std::vector<int64_t>(want)), ", got ", shown(sizes_of(x)));
}

// `like`: a tensor of the op's device.
inline void check_dtype(const char* name, const Tensor& x, ScalarType want, const Tensor& like) {
  REQUIRE(x.scalar_type() == want, name, " must be ", shown(want), ", got ", shown(x.scalar_type()));
  REQUIRE(x.is_cpu() == like.is_cpu() && x.get_device() == like.get_device(), name,
          " is on another device than the other tensors");
}

inline void check_contiguous(const char* name, const Tensor& x) {
  REQUIRE(x.is_contiguous(), name, " must be contiguous");
}

inline DType float_dtype(const char* name, ScalarType dtype) {
  if (dtype == ScalarType::Float) return DType::f32;
  if (dtype == ScalarType::BFloat16) return DType::bf16;
  REQUIRE(dtype == ScalarType::Half, name, " must be torch.float32, torch.bfloat16 or torch.float16, got ",
          shown(dtype));
  return DType::f16;
}

// What went wrong on the device before, else an empty string. Of every bind.cpp.
std::string device_error();

// On the device of `like`. PyTorch's shim writes why it failed to stderr and throws without saying so.
inline Tensor allocate(const char* what, const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  try {
    return torch::stable::new_empty(like, sizes, dtype);
  } catch (const std::exception&) {
    const std::string error = device_error();
    fail(error.empty() ? "out of memory" : error, ": ", what, ", ", shown(sizes), " of ", shown(dtype),
         ", cannot be allocated");
  }
}

// Contiguous copies of arguments that were not, alive until the op returns.
using Copies = std::vector<Tensor>;

template <class T>
const T* contiguous_data(const Tensor& x, Copies& copies) {
  if (x.is_contiguous()) return static_cast<const T*>(x.const_data_ptr());
  copies.push_back(torch::stable::contiguous(x));
  return static_cast<const T*>(copies.back().const_data_ptr());
}

inline Coded coded_of(const char* name, const Tensor& codebook, int64_t H, int64_t D, const Tensor& like,
                      Copies& copies) {
  check_shape(name, codebook, {H, kCentroids, kAny, kAny}, "[KV heads, centroids, subspaces, channels a subspace]");
  check_dtype(name, codebook, ScalarType::Half, like);
  const int64_t S = codebook.size(2), d = codebook.size(3);
  REQUIRE(is_subspace_dim(d), name, ": ", d, " channels a subspace, supported are 2, 4 and 8");
  REQUIRE(D == kAny || S * d == D, name, " covers ", S, " x ", d, " = ", S * d, " channels, but head_dim is ", D);
  return {nullptr, contiguous_data<uint16_t>(codebook, copies), S, d, kPlain, 0};
}

// [B, heads, n, D] as it lies in memory, or a copy where its channels are not contiguous or pairs of them not aligned.
inline Strided strided_of(const Tensor& x, int64_t element, Copies& copies) {
  const auto strides = x.strides();
  const bool pairs = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % (2 * element) == 0 && strides[0] % 2 == 0 &&
                     strides[1] % 2 == 0 && strides[2] % 2 == 0;
  if (strides[3] == 1 && pairs)
    return {static_cast<const char*>(x.const_data_ptr()), strides[0] * element, strides[1] * element,
            strides[2] * element};
  const auto sizes = x.sizes();
  const int64_t token = sizes[3] * element, head = sizes[2] * token;
  copies.push_back(torch::stable::contiguous(x));
  return {static_cast<const char*>(copies.back().const_data_ptr()), sizes[1] * head, head, token};
}

// Packed codes of a codebook; fills in its layout and slots.
inline void check_codes(const char* name, const Tensor& codes, int64_t layout, int64_t B, int64_t H, Coded& to,
                        const Tensor& like) {
  REQUIRE(layout >= 0 && layout < kLayouts, "unknown layout_id ", layout,
          "; this version knows 0 (plain), 1 (rows64), 2 (mma_k), 3 (mma_v)");
  constexpr const char* kPacked[] = {"packed as plain", "packed as rows64", "packed as mma_k", "packed as mma_v"};
  REQUIRE(to.S % subspace_step(layout) == 0, name, " cannot be ", kPacked[layout], ": ", to.S,
          " subspaces are not a multiple of ", subspace_step(layout));
  check_shape(name, codes, {B, H, kAny, tile_tokens(layout) * to.S}, kPacked[layout]);
  check_dtype(name, codes, ScalarType::Byte, like);
  to.layout = layout;
  to.slots = codes.size(2) * tile_tokens(layout);
}

inline void check_frequencies(const Tensor& inv_freq, int64_t D) {
  REQUIRE(inv_freq.dim() == 1 && inv_freq.size(0) > 0 && 2 * inv_freq.size(0) <= D,
          "inv_freq must be [rotary dimensions / 2] with at most ", D / 2, " entries, got ", shown(sizes_of(inv_freq)));
}

// fp16 [H, D, D] with every matrix column after column, or a copy.
inline const uint16_t* columns_of(const Tensor& x, Copies& copies) {
  const int64_t D = x.size(2);
  const auto strides = x.strides();
  if (strides[0] == D * D && strides[1] == 1 && strides[2] == D)
    return static_cast<const uint16_t*>(x.const_data_ptr());
  copies.push_back(torch::stable::contiguous(torch::stable::transpose(x, 1, 2)));
  return static_cast<const uint16_t*>(copies.back().const_data_ptr());
}

// The arguments that describe a cache layer, in the order of the schemas.
struct LayerTensors {
  const Tensor &k, &v, &k_codebook, &v_codebook;
  const std::optional<Tensor>&transform, &inv_freq;
  const Tensor &k_codes, &v_codes, &k_ring, &v_ring, &k_sinks, &v_sinks, &clock, &start, &origin;
  int64_t offset, frame_tokens;
  bool interleaved;
  int64_t k_layout, v_layout;
  Copies copies = {};

  void attach_codes(const char* name, const Tensor& codes, int64_t layout, int64_t B, int64_t H, Coded& to) {
    check_codes(name, codes, layout, B, H, to, k);
    check_contiguous(name, codes);
    to.codes = static_cast<uint8_t*>(codes.data_ptr());
  }

  char* exact(const char* name, const Tensor& x, int64_t B, int64_t H, int64_t tokens, int64_t D, const char* says) {
    check_shape(name, x, {B, H, tokens, D}, says);
    check_dtype(name, x, k.scalar_type(), k);
    check_contiguous(name, x);
    return static_cast<char*>(x.data_ptr());
  }

  template <class T>
  const T* values_of(const char* name, const Tensor& x, ScalarType dtype) {
    check_dtype(name, x, dtype, k);
    return contiguous_data<T>(x, copies);
  }

  // `attends`: for attention, which takes the transform's inverse.
  Layer describe(bool attends = false) {
    Layer a{};
    check_shape("k", k, {kAny, kAny, kAny, kAny}, "[B, H, n, D]");
    a.B = k.size(0), a.H = k.size(1), a.n = k.size(2), a.D = k.size(3);
    check_shape("v", v, {a.B, a.H, a.n, a.D}, "shaped like k,");
    a.dtype = float_dtype("k", k.scalar_type());
    check_dtype("v", v, k.scalar_type(), k);
    REQUIRE(a.n >= 1, "k holds no token (n = 0)");
    a.k_new = strided_of(k, size_of(a.dtype), copies);
    a.v_new = strided_of(v, size_of(a.dtype), copies);
    a.k = coded_of("k_codebook", k_codebook, a.H, a.D, k, copies);
    a.v = coded_of("v_codebook", v_codebook, a.H, a.D, k, copies);
    if (transform) {
      const char* name = attends ? "k_transform_inv" : "k_transform";
      check_shape(name, *transform, {a.H, a.D, a.D}, "[KV heads, D, D]");
      if (attends && k_layout == kMmaK) {
        check_dtype("k_transform_inv of codes packed as mma_k", *transform, ScalarType::Half, k);
        a.inverse = columns_of(*transform, copies);
      } else {
        a.transform = values_of<float>(name, *transform, ScalarType::Float);
      }
    }
    if (inv_freq) {
      check_frequencies(*inv_freq, a.D);
      const float* frequencies = values_of<float>("inv_freq", *inv_freq, ScalarType::Float);
      a.inv_freq = frame_tokens > 0 ? frequencies : nullptr;
      a.half = inv_freq->size(0);
    }
    attach_codes("k_codes", k_codes, k_layout, a.B, a.H, a.k);
    attach_codes("v_codes", v_codes, v_layout, a.B, a.H, a.v);
    a.k_ring = exact("k_ring", k_ring, a.B, a.H, kAny, a.D, "[B, H, recent tokens, D]");
    a.R = k_ring.size(2);
    a.v_ring = exact("v_ring", v_ring, a.B, a.H, a.R, a.D, "shaped like k_ring,");
    a.k_sinks = exact("k_sinks", k_sinks, a.B, a.H, kAny, a.D, "[B, H, sink tokens, D]");
    a.N = k_sinks.size(2);
    a.v_sinks = exact("v_sinks", v_sinks, a.B, a.H, a.N, a.D, "shaped like k_sinks,");
    check_shape("clock", clock, {3}, "(past, total, ring_lo)");
    check_shape("start", start, {a.B}, "[B]");
    check_shape("origin", origin, {a.B}, "[B]");
    a.start = values_of<int32_t>("start", start, ScalarType::Int);
    a.origin = values_of<int32_t>("origin", origin, ScalarType::Int);
    REQUIRE(offset >= 0, "offset must not be negative, got ", offset);
    REQUIRE(frame_tokens >= 0, "frame_tokens must not be negative, got ", frame_tokens);
    a.clock = values_of<int64_t>("clock", clock, ScalarType::Long);
    a.offset = offset < kFarSlot ? offset : kFarSlot;
    a.frame_tokens = frame_tokens < kFarSlot ? frame_tokens : kFarSlot;
    a.interleaved = interleaved;
    return a;
  }
};

#define MILLION_APPEND_PARAMETERS                                                                                      \
  const Tensor &k, const Tensor &v, const Tensor &k_codebook, const Tensor &v_codebook,                                \
      const std::optional<Tensor>&k_transform, const std::optional<Tensor>&inv_freq, const Tensor &k_codes,            \
      const Tensor &v_codes, const Tensor &k_ring, const Tensor &v_ring, const Tensor &k_sinks, const Tensor &v_sinks, \
      const Tensor &clock, const Tensor &start, const Tensor &origin, int64_t offset, int64_t frame_tokens,            \
      bool rope_interleaved, int64_t k_layout, int64_t v_layout, [[maybe_unused]] const std::optional<Tensor>&after
#define MILLION_ATTENTION_PARAMETERS                                                                                   \
  const Tensor &q, const Tensor &k, const Tensor &v, const Tensor &k_codebook, const Tensor &v_codebook,               \
      const std::optional<Tensor>&k_transform, const std::optional<Tensor>&inv_freq, const Tensor &k_codes,            \
      const Tensor &v_codes, const Tensor &k_ring, const Tensor &v_ring, const Tensor &k_sinks, const Tensor &v_sinks, \
      const Tensor &clock, const Tensor &start, const Tensor &origin, const std::optional<Tensor>&mask, double scale,  \
      int64_t offset, int64_t frame_tokens, bool rope_interleaved, int64_t k_layout, int64_t v_layout
#define MILLION_LAYER_TENSORS                                                                                       \
  ::million::LayerTensors {                                                                                         \
    k, v, k_codebook, v_codebook, k_transform, inv_freq, k_codes, v_codes, k_ring, v_ring, k_sinks, v_sinks, clock, \
        start, origin, offset, frame_tokens, rope_interleaved, k_layout, v_layout                                   \
  }

// Query heads a KV head, after checking q against the layer.
inline int64_t check_query(const Tensor& q, const Tensor& k) {
  check_shape("q", q, {k.size(0), kAny, k.size(2), k.size(3)}, "[B, query heads, n, D] with the B, n, D of k,");
  check_dtype("q", q, k.scalar_type(), k);
  const int64_t heads = q.size(1), H = k.size(1);
  REQUIRE(heads > 0 && H > 0 && heads % H == 0, "q has ", heads, " heads, which is not a multiple of the ", H,
          " KV heads");
  return heads / H;
}

// Data of a mask [B, 1, n, slots] bool, null for none.
inline const uint8_t* mask_data(const std::optional<Tensor>& mask, const Layer& layer, const Tensor& like,
                                Copies& copies) {
  if (!mask) return nullptr;
  check_shape("mask", *mask, {layer.B, 1, layer.n, kAny}, "[B, 1, n, slots]");
  check_dtype("mask", *mask, ScalarType::Bool, like);
  return contiguous_data<uint8_t>(*mask, copies);
}

}  // namespace million
