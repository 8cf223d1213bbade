// Registers the CPU kernels: checks arguments as `million_ops/_checks.py` does, describes tensors as plain structs,
// shares the work items among torch's threads. The only file here that includes torch.
#include <torch/headeronly/util/Half.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <tuple>

#include "../common/arguments.h"
#include "kernels.h"

namespace million {

std::string device_error() { return ""; }

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

void check_head_dim(int64_t D) {
  REQUIRE(D > 0 && D <= kMaxHeadDim && D % kChannelStep == 0, "the CPU kernels need a head_dim that is a multiple of ",
          kChannelStep, " and at most ", kMaxHeadDim, ", got ", D);
}

// What the CPU kernels need beside the tensors: the time, which they may read.
Layer with_time(Layer layer) {
  check_head_dim(layer.D);
  const auto near = [](int64_t x) { return x < -kFarSlot ? -kFarSlot : x > kFarSlot ? kFarSlot : x; };
  layer.first = near(near(layer.clock[0]) + layer.offset);
  layer.ring_lo = near(layer.clock[2]);
  return layer;
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
  Encode args{strided_of(x, size_of(dtype), copies),          dtype, B, H, T, D,
              coded_of("codebook", codebook, H, D, x, copies)};
  Tensor codes = allocate("codes", x, {B, H, T, args.book.S}, ScalarType::Byte);
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
  check_dtype("codes", codes, ScalarType::Byte, codes);
  const int64_t B = codes.size(0), H = codes.size(1), T = codes.size(2);
  Copies copies;
  const Coded book = coded_of("codebook", codebook, H, kAny, codes, copies);
  REQUIRE(codes.size(3) == book.S, "codes have ", codes.size(3), " subspaces, the codebook ", book.S);
  const int64_t D = book.S * book.d;
  const DType element = float_dtype("dtype", dtype);
  Tensor out = allocate("the result", codes, {B, H, T, D}, dtype);
  if (out.numel() == 0) return out;
  check_head_dim(D);
  const Decode args{contiguous_data<uint8_t>(codes, copies),   B, H, T, book, element,
                    static_cast<char*>(out.mutable_data_ptr())};
  const Kernels& kernels = pick_kernels();
  share(B * H * token_blocks(T), 4, kernels.encode_scratch(D),
        [&](int64_t begin, int64_t end, char* scratch) { kernels.decode(args, begin, end, scratch); });
  return out;
}

void pq_append_(MILLION_APPEND_PARAMETERS) {
  LayerTensors tensors = MILLION_LAYER_TENSORS;
  const Layer layer = with_time(tensors.describe());
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

// `Layer::inverse` as the kernels here read a transform: fp32, row after row.
std::vector<float> rows_of_inverse(const Layer& layer) {
  if (!layer.inverse) return {};
  const int64_t D = layer.D;
  std::vector<float> rows(layer.H * D * D);
  for (int64_t i = 0; i < layer.H * D; i++)
    for (int64_t column = 0; column < D; column++)
      rows[i * D + column] = c10::Half(layer.inverse[i / D * D * D + column * D + i % D], c10::Half::from_bits());
  return rows;
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, LayerTensors tensors, const std::optional<Tensor>& mask,
                                     double scale, bool with_lse) {
  Attention a{};
  a.layer = with_time(tensors.describe(true));
  const Layer& layer = a.layer;
  const std::vector<float> inverse = rows_of_inverse(layer);
  if (layer.inverse) a.layer.transform = inverse.data();
  a.G = check_query(q, tensors.k);
  const int64_t heads = layer.H * a.G;
  a.q = strided_of(q, size_of(layer.dtype), tensors.copies);
  a.mask = mask_data(mask, layer, q, tensors.copies);
  a.mask_slots = mask ? mask->size(3) : 0;
  a.scale = float(scale);
  Tensor out = allocate("the result", q, {layer.B, layer.n, heads, layer.D}, q.scalar_type());
  Tensor lse = with_lse ? allocate("lse", q, {layer.B, heads, layer.n}, ScalarType::Float) : out;
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

Tensor pq_attention(MILLION_ATTENTION_PARAMETERS) {
  return std::get<0>(attention(q, MILLION_LAYER_TENSORS, mask, scale, false));
}

std::tuple<Tensor, Tensor> pq_attention_lse(MILLION_ATTENTION_PARAMETERS) {
  return attention(q, MILLION_LAYER_TENSORS, mask, scale, true);
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
