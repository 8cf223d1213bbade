// Registers the CPU kernels: checks arguments as `million_ops/_checks.py` does, describes tensors as plain structs,
// shares the work items among torch's threads. The only file here that includes torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../common/pq_layout.h"
#include "../common/shapes.h"
#include "kernels.h"

namespace million {

namespace baseline {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Kernels& pick_kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#if defined(__x86_64__)
    const char* limit = std::getenv("MILLION_CPU_ISA");  // for tests: at most this instruction set
    const std::string at_most = limit ? limit : "avx512";
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (at_most == "avx512" && has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vbmi"))
      return avx512::kernels;
    if (at_most != "baseline" && has_avx2) return avx2::kernels;
#endif
    return baseline::kernels;
  }();
  return chosen;
}

// ---- checks ----

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

#define REQUIRE(condition, ...) \
  if (!(condition)) fail(__VA_ARGS__)

constexpr int64_t kAny = -1;

std::string shown(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  for (size_t i = 0; i < sizes.size(); i++) {
    text << (i ? ", " : "[");
    sizes[i] == kAny ? text << "*" : text << sizes[i];
  }
  return text.str() + "]";
}

std::vector<int64_t> sizes_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

const char* shown(ScalarType dtype) {
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

void check_shape(const char* name, const Tensor& x, std::initializer_list<int64_t> want, const char* says) {
  const auto sizes = x.sizes();
  bool ok = sizes.size() == want.size();
  for (size_t i = 0; ok && i < want.size(); i++) ok = want.begin()[i] == kAny || want.begin()[i] == sizes[i];
  REQUIRE(ok, name, " must be ", says, " ", shown(std::vector<int64_t>(want)), ", got ", shown(sizes_of(x)));
}

void check_dtype(const char* name, const Tensor& x, ScalarType want) {
  REQUIRE(x.scalar_type() == want, name, " must be ", shown(want), ", got ", shown(x.scalar_type()));
  REQUIRE(x.is_cpu(), name, " is not on the CPU, the other tensors are");
}

void check_contiguous(const char* name, const Tensor& x) { REQUIRE(x.is_contiguous(), name, " must be contiguous"); }

DType float_dtype(const char* name, ScalarType dtype) {
  if (dtype == ScalarType::Float) return DType::f32;
  if (dtype == ScalarType::BFloat16) return DType::bf16;
  REQUIRE(dtype == ScalarType::Half, name, " must be torch.float32, torch.bfloat16 or torch.float16, got ",
          shown(dtype));
  return DType::f16;
}

void check_head_dim(int64_t D) {
  REQUIRE(D > 0 && D <= kMaxHeadDim && D % kChannelStep == 0, "the CPU kernels need a head_dim that is a multiple of ",
          kChannelStep, " and at most ", kMaxHeadDim, ", got ", D);
}

// Contiguous copies of arguments that were not, alive until the op returns.
using Copies = std::vector<Tensor>;

template <class T>
const T* contiguous_data(const Tensor& x, Copies& copies) {
  if (x.is_contiguous()) return static_cast<const T*>(x.const_data_ptr());
  copies.push_back(torch::stable::contiguous(x));
  return static_cast<const T*>(copies.back().const_data_ptr());
}

Coded coded_of(const char* name, const Tensor& codebook, int64_t H, int64_t D, Copies& copies) {
  check_shape(name, codebook, {H, kCentroids, kAny, kAny}, "[KV heads, centroids, subspaces, channels a subspace]");
  check_dtype(name, codebook, ScalarType::Half);
  const int64_t S = codebook.size(2), d = codebook.size(3);
  REQUIRE(is_subspace_dim(d), name, ": ", d, " channels a subspace, supported are 2, 4 and 8");
  REQUIRE(D == kAny || S * d == D, name, " covers ", S, " x ", d, " = ", S * d, " channels, but head_dim is ", D);
  return {nullptr, contiguous_data<uint16_t>(codebook, copies), S, d, kPlain, 0};
}

// [B, heads, n, D] as it lies in memory, or a copy where its channels are not contiguous.
Strided strided_of(const Tensor& x, int64_t element, Copies& copies) {
  const auto strides = x.strides();
  if (strides[3] == 1)
    return {static_cast<const char*>(x.const_data_ptr()), strides[0] * element, strides[1] * element,
            strides[2] * element};
  const auto sizes = x.sizes();
  const int64_t token = sizes[3] * element, head = sizes[2] * token;
  copies.push_back(torch::stable::contiguous(x));
  return {static_cast<const char*>(copies.back().const_data_ptr()), sizes[1] * head, head, token};
}

// ---- work ----

// Memory that a thread keeps from call to call: no page faults on the way of a decode step.
char* thread_memory(size_t bytes) {
  struct Memory {
    char* data = nullptr;
    size_t size = 0;
    ~Memory() { std::free(data); }
  };
  static thread_local Memory memory;
  if (memory.size < bytes) {
    std::free(memory.data);
    memory.size = (bytes + 4095) / 4096 * 4096;
    memory.data = static_cast<char*>(std::aligned_alloc(4096, memory.size));
    if (!memory.data) memory.size = 0;
    REQUIRE(memory.data, "out of memory: ", bytes, " bytes of scratch");
  }
  return memory.data;
}

template <class F>
void share(int64_t items, int64_t grain, size_t scratch, const F& run) {
  const auto range = [&](int64_t begin, int64_t end) { run(begin, end, thread_memory(scratch)); };
  if (items <= grain)
    range(0, items);
  else
    torch::stable::parallel_for(0, items, grain, range);
}

// Starting threads costs as much as encoding about this many channels.
constexpr int64_t kSerialChannels = 512;

int64_t encode_grain(int64_t tokens, int64_t D) {
  const int64_t channels = (tokens < kBlockTokens ? tokens : kBlockTokens) * D;
  return channels >= kSerialChannels ? 1 : kSerialChannels / channels;
}

// ---- ops ----

Tensor pq_encode(const Tensor& x, const Tensor& codebook) {
  check_shape("x", x, {kAny, kAny, kAny, kAny}, "[B, H, T, D]");
  const DType dtype = float_dtype("x", x.scalar_type());
  const int64_t B = x.size(0), H = x.size(1), T = x.size(2), D = x.size(3);
  Copies copies;
  Encode args{strided_of(x, size_of(dtype), copies), dtype, B, H, T, D, coded_of("codebook", codebook, H, D, copies)};
  Tensor codes = torch::stable::new_empty(x, {B, H, T, args.book.S}, ScalarType::Byte);
  if (codes.numel() == 0) return codes;
  check_head_dim(D);
  args.book.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  const Kernels& kernels = pick_kernels();
  share(B * H * token_blocks(T), encode_grain(T, D), kernels.encode_scratch(D),
        [&](int64_t begin, int64_t end, char* scratch) { kernels.encode(args, begin, end, scratch); });
  return codes;
}

Tensor pq_decode(const Tensor& codes, const Tensor& codebook, ScalarType dtype) {
  check_shape("codes", codes, {kAny, kAny, kAny, kAny}, "[B, H, T, S]");
  check_dtype("codes", codes, ScalarType::Byte);
  const int64_t B = codes.size(0), H = codes.size(1), T = codes.size(2);
  Copies copies;
  const Coded book = coded_of("codebook", codebook, H, kAny, copies);
  REQUIRE(codes.size(3) == book.S, "codes have ", codes.size(3), " subspaces, the codebook ", book.S);
  const int64_t D = book.S * book.d;
  const DType element = float_dtype("dtype", dtype);
  Tensor out = torch::stable::new_empty(codes, {B, H, T, D}, dtype);
  if (out.numel() == 0) return out;
  check_head_dim(D);
  const Decode args{contiguous_data<uint8_t>(codes, copies),   B, H, T, book, element,
                    static_cast<char*>(out.mutable_data_ptr())};
  const Kernels& kernels = pick_kernels();
  share(B * H * token_blocks(T), 4, kernels.encode_scratch(D),
        [&](int64_t begin, int64_t end, char* scratch) { kernels.decode(args, begin, end, scratch); });
  return out;
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
    REQUIRE(layout >= 0 && layout < kLayouts, "unknown layout_id ", layout,
            "; this version knows 0 (plain), 1 (rows64)");
    check_shape(name, codes, {B, H, kAny, tile_tokens(layout) * to.S},
                layout == kRows64 ? "packed as rows64" : "packed as plain");
    check_dtype(name, codes, ScalarType::Byte);
    check_contiguous(name, codes);
    to.codes = static_cast<uint8_t*>(codes.data_ptr());
    to.layout = layout;
    to.slots = codes.size(2) * tile_tokens(layout);
  }

  char* exact(const char* name, const Tensor& x, int64_t B, int64_t H, int64_t tokens, int64_t D, const char* says) {
    check_shape(name, x, {B, H, tokens, D}, says);
    check_dtype(name, x, k.scalar_type());
    check_contiguous(name, x);
    return static_cast<char*>(x.data_ptr());
  }

  template <class T>
  const T* values_of(const char* name, const Tensor& x, ScalarType dtype) {
    check_dtype(name, x, dtype);
    return contiguous_data<T>(x, copies);
  }

  Layer describe() {
    Layer a{};
    check_shape("k", k, {kAny, kAny, kAny, kAny}, "[B, H, n, D]");
    a.B = k.size(0), a.H = k.size(1), a.n = k.size(2), a.D = k.size(3);
    check_shape("v", v, {a.B, a.H, a.n, a.D}, "shaped like k,");
    a.dtype = float_dtype("k", k.scalar_type());
    check_dtype("v", v, k.scalar_type());
    REQUIRE(a.n >= 1, "k holds no token (n = 0)");
    check_head_dim(a.D);
    a.k_new = strided_of(k, size_of(a.dtype), copies);
    a.v_new = strided_of(v, size_of(a.dtype), copies);
    a.k = coded_of("k_codebook", k_codebook, a.H, a.D, copies);
    a.v = coded_of("v_codebook", v_codebook, a.H, a.D, copies);
    if (transform) {
      check_shape("k_transform", *transform, {a.H, a.D, a.D}, "[KV heads, D, D]");
      a.transform = values_of<float>("k_transform", *transform, ScalarType::Float);
    }
    if (inv_freq) {
      REQUIRE(inv_freq->dim() == 1 && inv_freq->size(0) > 0 && 2 * inv_freq->size(0) <= a.D,
              "inv_freq must be [rotary dimensions / 2] with at most ", a.D / 2, " entries, got ",
              shown(sizes_of(*inv_freq)));
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
    const int64_t* time = values_of<int64_t>("clock", clock, ScalarType::Long);
    // A clock that makes no sense must not overflow; slots beyond the buffers are checked where they are used.
    constexpr int64_t kFar = int64_t(1) << 40;
    const auto near = [](int64_t x) { return x < -kFar ? -kFar : x > kFar ? kFar : x; };
    a.first = near(near(time[0]) + near(offset));
    a.ring_lo = near(time[2]);
    a.frame_tokens = near(frame_tokens);
    a.interleaved = interleaved;
    return a;
  }
};

void pq_append_(const Tensor& k, const Tensor& v, const Tensor& k_codebook, const Tensor& v_codebook,
                const std::optional<Tensor>& k_transform, const std::optional<Tensor>& inv_freq, const Tensor& k_codes,
                const Tensor& v_codes, const Tensor& k_ring, const Tensor& v_ring, const Tensor& k_sinks,
                const Tensor& v_sinks, const Tensor& clock, const Tensor& start, const Tensor& origin, int64_t offset,
                int64_t frame_tokens, bool rope_interleaved, int64_t k_layout, int64_t v_layout) {
  LayerTensors tensors{k,       v,      k_codebook,   v_codebook,       k_transform, inv_freq, k_codes,
                       v_codes, k_ring, v_ring,       k_sinks,          v_sinks,     clock,    start,
                       origin,  offset, frame_tokens, rope_interleaved, k_layout,    v_layout};
  const Layer layer = tensors.describe();
  const Kernels& kernels = pick_kernels();
  share(layer.B * layer.H * token_blocks(layer.n), encode_grain(layer.n, layer.D), kernels.encode_scratch(layer.D),
        [&](int64_t begin, int64_t end, char* scratch) { kernels.append(layer, begin, end, scratch); });
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of about 96 rows (queries x heads of a group) amortise decoding a tile; splits of at least 4 tiles fill the
// machine when there are few heads. Neither depends on the number of threads, so results do not either.
void plan(Attention& a) {
  constexpr int64_t kRows = 96, kItems = 64, kSplitTiles = 4;
  const Layer& layer = a.layer;
  const int64_t blocks = std::min(layer.n, ceil_div(layer.n * a.G, kRows));
  a.block_queries = ceil_div(layer.n, blocks);
  a.blocks = ceil_div(layer.n, a.block_queries);
  const int64_t slots = std::max<int64_t>(0, std::min({layer.first, layer.k.slots, layer.v.slots})) + layer.n;
  a.splits = std::max<int64_t>(1, std::min(kItems / a.groups(), slots / (kSplitTiles * kBlockTokens)));
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, LayerTensors tensors, const std::optional<Tensor>& mask,
                                     double scale, bool with_lse) {
  Attention a{};
  a.layer = tensors.describe();
  const Layer& layer = a.layer;
  check_shape("q", q, {layer.B, kAny, layer.n, layer.D}, "[B, query heads, n, D] with the B, n, D of k,");
  check_dtype("q", q, tensors.k.scalar_type());
  const int64_t heads = q.size(1);
  REQUIRE(heads > 0 && layer.H > 0 && heads % layer.H == 0, "q has ", heads, " heads, which is not a multiple of the ",
          layer.H, " KV heads");
  a.G = heads / layer.H;
  a.q = strided_of(q, size_of(layer.dtype), tensors.copies);
  if (mask) {
    check_shape("mask", *mask, {layer.B, 1, layer.n, kAny}, "[B, 1, n, slots]");
    check_dtype("mask", *mask, ScalarType::Bool);
    a.mask = contiguous_data<uint8_t>(*mask, tensors.copies);
    a.mask_slots = mask->size(3);
  }
  a.scale = float(scale);
  Tensor out = torch::stable::new_empty(q, {layer.B, layer.n, heads, layer.D});
  Tensor lse = with_lse ? torch::stable::new_empty(q, {layer.B, heads, layer.n}, ScalarType::Float) : out;
  if (layer.B == 0) return {out, lse};
  a.out = static_cast<char*>(out.mutable_data_ptr());
  a.lse = with_lse ? static_cast<float*>(lse.mutable_data_ptr()) : nullptr;

  plan(a);
  const Kernels& kernels = pick_kernels();
  std::unique_ptr<float[]> partials;
  if (a.splits > 1) partials.reset(new float[a.items() * a.block_rows() * (layer.D + 2)]);
  a.partials = partials.get();
  share(a.items(), 1, kernels.attend_scratch(a),
        [&](int64_t begin, int64_t end, char* scratch) { kernels.attend(a, begin, end, scratch); });
  if (a.splits > 1) share(a.groups(), 16, 0, [&](int64_t begin, int64_t end, char*) { kernels.merge(a, begin, end); });
  return {out, lse};
}

#define ATTENTION_PARAMETERS                                                                                           \
  const Tensor &q, const Tensor &k, const Tensor &v, const Tensor &k_codebook, const Tensor &v_codebook,               \
      const std::optional<Tensor>&k_transform_inv, const std::optional<Tensor>&inv_freq, const Tensor &k_codes,        \
      const Tensor &v_codes, const Tensor &k_ring, const Tensor &v_ring, const Tensor &k_sinks, const Tensor &v_sinks, \
      const Tensor &clock, const Tensor &start, const Tensor &origin, const std::optional<Tensor>&mask, double scale,  \
      int64_t offset, int64_t frame_tokens, bool rope_interleaved, int64_t k_layout, int64_t v_layout
#define LAYER_TENSORS                                                                                            \
  LayerTensors {                                                                                                 \
    k, v, k_codebook, v_codebook, k_transform_inv, inv_freq, k_codes, v_codes, k_ring, v_ring, k_sinks, v_sinks, \
        clock, start, origin, offset, frame_tokens, rope_interleaved, k_layout, v_layout                         \
  }

Tensor pq_attention(ATTENTION_PARAMETERS) { return std::get<0>(attention(q, LAYER_TENSORS, mask, scale, false)); }

std::tuple<Tensor, Tensor> pq_attention_lse(ATTENTION_PARAMETERS) {
  return attention(q, LAYER_TENSORS, mask, scale, true);
}

}  // namespace
}  // namespace million

STABLE_TORCH_LIBRARY_IMPL(million_ops, CPU, m) {
  m.impl("pq_encode", TORCH_BOX(&million::pq_encode));
  m.impl("pq_decode", TORCH_BOX(&million::pq_decode));
  m.impl("pq_append_", TORCH_BOX(&million::pq_append_));
  m.impl("pq_attention", TORCH_BOX(&million::pq_attention));
  m.impl("pq_attention_lse", TORCH_BOX(&million::pq_attention_lse));
}

// Read through ctypes by `million_ops.backends()`.
extern "C" __attribute__((visibility("default"))) const char* million_cpu_isa() { return million::pick_kernels().name; }
