#include "attention_mma.cuh"
#include "attention_mma.h"

namespace million {
namespace mma {

const Instance* instances_96() {
  static constexpr Instance kInstances[] = {
      make_instance<96, 2, 2>(),
      make_instance<96, 4, 4>(),
      {},
  };
  return kInstances;
}

}  // namespace mma
}  // namespace million
