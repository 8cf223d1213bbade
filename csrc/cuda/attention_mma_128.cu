#include "attention_mma.cuh"
#include "attention_mma.h"

namespace million {
namespace mma {

const Instance* instances_128() {
  static constexpr Instance kInstances[] = {
      {128, 2, 2, Shape<128, 2, 2, 4>::kTableBytes, attend<128, 2, 2>},
      {128, 2, 4, Shape<128, 2, 4, 4>::kTableBytes, attend<128, 2, 4>},
      {128, 4, 4, Shape<128, 4, 4, 4>::kTableBytes, attend<128, 4, 4>},
      {128, 4, 8, Shape<128, 4, 8, 4>::kTableBytes, attend<128, 4, 8>},
      {128, 8, 8, Shape<128, 8, 8, 4>::kTableBytes, attend<128, 8, 8>},
      {},
  };
  return kInstances;
}

}  // namespace mma
}  // namespace million
