#include "attention_mma.cuh"
#include "attention_mma.h"

namespace million {
namespace mma {

// Narrow tables: those of keys and of values fill a block each.
const Instance* instances_256() {
  static constexpr Instance kInstances[] = {
      make_instance<256, 2, 2, true>(), make_instance<256, 2, 4, true>(), make_instance<256, 4, 4, true>(),
      make_instance<256, 4, 8, true>(), make_instance<256, 8, 8, true>(), {},
  };
  return kInstances;
}

}  // namespace mma
}  // namespace million
