// Many tensors in one launch: thread blocks take tiles, numbered through all tensors, and find the tensor that a tile is of.
#pragma once

#include "../common/gpu.h"

namespace dsp {

// The tensor that has the tile, by bisection. Of Work: `count` parts, at least one, each with the number of its first tile.
template <class Work>
__device__ __forceinline__ int part_of(const Work& work, int64_t tile) {
  int low = 0, high = work.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (work.parts[middle].first_tile <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace dsp
