#include "attention_mma.cuh"
#include "attention_mma.h"

namespace million {
namespace mma {

// Those that take less shared memory than with wide tables: at most 163 KiB, head_dim 64 99 KiB, with up to eight query
// rows in a block; sixteen, for which wide tables would leave no room, up to 188 KiB.
const Instance* instances_narrow() {
  static constexpr Instance kInstances[] = {
      make_instance<64, 2, 2, true>(),  make_instance<64, 2, 4, true>(),  make_instance<64, 4, 4, true>(),
      make_instance<64, 4, 8, true>(),  make_instance<64, 8, 8, true>(),  make_instance<96, 2, 2, true>(),
      make_instance<96, 4, 4, true>(),  make_instance<128, 2, 2, true>(), make_instance<128, 2, 4, true>(),
      make_instance<128, 4, 8, true>(), make_instance<128, 8, 8, true>(), {},
  };
  return kInstances;
}

}  // namespace mma
}  // namespace million
