#include "attention_mma.cuh"
#include "attention_mma.h"

namespace million {
namespace mma {

const Instance* instances_128() {
  static constexpr Instance kInstances[] = {
      make_instance<128, 2, 2>(), make_instance<128, 2, 4>(), make_instance<128, 4, 4>(),
      make_instance<128, 4, 8>(), make_instance<128, 8, 8>(), {},
  };
  return kInstances;
}

}  // namespace mma
}  // namespace million
