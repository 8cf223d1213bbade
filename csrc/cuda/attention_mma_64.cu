#include "attention_mma.cuh"
#include "attention_mma.h"

namespace million {
namespace mma {

const Instance* instances_64() {
  static constexpr Instance kInstances[] = {
      {64, 2, 2, Shape<64, 2, 2, 4>::kTableBytes, attend<64, 2, 2>},
      {64, 2, 4, Shape<64, 2, 4, 4>::kTableBytes, attend<64, 2, 4>},
      {64, 4, 4, Shape<64, 4, 4, 4>::kTableBytes, attend<64, 4, 4>},
      {64, 4, 8, Shape<64, 4, 8, 4>::kTableBytes, attend<64, 4, 8>},
      {64, 8, 8, Shape<64, 8, 8, 4>::kTableBytes, attend<64, 8, 8>},
      {},
  };
  return kInstances;
}

}  // namespace mma
}  // namespace million
