// The tensor core kernel on the emulated GPU, with a C interface: some of its instances, as each takes seconds to
// compile.
#include "gpu.h"
//
#include "attention_mma.cu"
#include "attention_plan.h"

namespace million {
namespace mma {

const Instance* instances_64() {
  static constexpr Instance kInstances[] = {make_instance<64, 2, 4>(), {}};
  return kInstances;
}
const Instance* instances_96() {
  static constexpr Instance kInstances[] = {{}};
  return kInstances;
}
const Instance* instances_128() {
  static constexpr Instance kInstances[] = {make_instance<128, 2, 2>(), {}};
  return kInstances;
}
const Instance* instances_256() {
  static constexpr Instance kInstances[] = {make_instance<256, 2, 2, true>(), {}};
  return kInstances;
}
const Instance* instances_narrow() {
  static constexpr Instance kInstances[] = {
      make_instance<96, 4, 4, true>(), make_instance<128, 2, 2, true>(), make_instance<128, 4, 8, true>(), {}};
  return kInstances;
}

}  // namespace mma
}  // namespace million

// Of a GPU with 132 multiprocessors: 1000 x query rows of a block + splits.
extern "C" int emulated_plan(int64_t B, int64_t H, int64_t D, int64_t v_dim, int64_t rows, int64_t slots) {
  million::Attention a{};
  a.layer.B = B, a.layer.H = H, a.layer.D = D, a.layer.k.d = 2, a.layer.v.d = v_dim, a.rows = int(rows);
  a.layer.k.slots = a.layer.v.slots = slots;
  a.overlap = true, a.at_once = 132, a.shared = million::kMostShared;
  const million::Plan plan = million::plan_for(a, true);
  return 1000 * plan.rows + plan.splits;
}

extern "C" void emulated_schedule(unsigned seed) { gpu::schedule = seed; }

extern "C" int emulated_scratch_bytes(int64_t head_dim) { return million::scratch_bytes(head_dim); }

// `x`: in the order in which `attend` of test_emulated_kernel.py lists them.
extern "C" int emulated_attention(const int64_t* x, float scale) {
  using namespace million;
  const auto next = [&] { return *x++; };
  const auto pointer = [&](auto& to) { to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(next()); };
  const auto strided = [&](Strided& to) { pointer(to.data), to.row = next(), to.head = next(), to.token = next(); };
  const auto coded = [&](Coded& to) {
    pointer(to.codes), pointer(to.codebook), to.S = next(), to.d = next(), to.layout = next(), to.slots = next();
  };
  Attention a{};
  Layer& layer = a.layer;
  layer.B = next(), layer.H = next(), layer.D = next(), layer.n = next(), layer.dtype = DType(next());
  strided(a.q), strided(layer.k_new), strided(layer.v_new), coded(layer.k), coded(layer.v);
  pointer(layer.inverse), pointer(layer.inv_freq), layer.half = next(), layer.frame_tokens = next();
  layer.interleaved = next(), pointer(layer.k_ring), pointer(layer.v_ring), pointer(layer.k_sinks);
  pointer(layer.v_sinks), layer.R = next(), layer.N = next(), pointer(layer.clock), pointer(layer.start);
  pointer(layer.origin), pointer(a.mask), a.mask_slots = next(), pointer(a.out), pointer(a.lse), a.G = int(next());
  a.splits = int(next()), a.block_rows = int(next()), a.at_once = int(next()), a.frames = int(next()),
  pointer(a.prepared);
  pointer(a.partials);
  a.scale = scale, a.by_heads = 1.f / layer.H, a.by_group = 1.f / a.G, a.rows = int(layer.n * a.G);
  a.overlap = true, a.shared = kMostShared;
  if (attention_mma_rows(a).most < a.block_rows) return 1;
  return attention_mma_launch(a, nullptr);
}
