#include "attention_mma.cuh"
#include "attention_mma.h"

namespace million {
namespace mma {

const Instance* instances_96() {
  static constexpr Instance kInstances[] = {
      {96, 2, 2, Shape<96, 2, 2, 4>::kTableBytes, attend<96, 2, 2>},
      {96, 4, 4, Shape<96, 4, 4, 4>::kTableBytes, attend<96, 4, 4>},
      {},
  };
  return kInstances;
}

}  // namespace mma
}  // namespace million
