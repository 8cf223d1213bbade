#include "attention_mma.cuh"
#include "attention_mma.h"

namespace million {
namespace mma {

const Instance* instances_64() {
  static constexpr Instance kInstances[] = {
      make_instance<64, 2, 2>(), make_instance<64, 2, 4>(), make_instance<64, 4, 4>(),
      make_instance<64, 4, 8>(), make_instance<64, 8, 8>(), {},
  };
  return kInstances;
}

}  // namespace mma
}  // namespace million
