// Rows to experts and back: the operators of runtime/experts.py, with which these agree to the last bit.
//
// Assignments, a token with one of its experts each, are sorted by counting, in three launches. A thread block takes a
// tile of them, one a thread: it counts each expert's in every warp (sort_kernel, kIsCount); one block adds up all
// counts, expert by expert and tile by tile (scan_kernel), which gives each tile's first row of each expert; and a tile
// is gone through once more to number its own (sort_kernel). A warp finds who has the same expert by ballots, so that
// a thread's number is how many come before it, and no atomic operation decides an order. What is dropped has an expert
// of its own, the last, so that each assignment has a row, and all rows are written.
//
// Rows are moved by a token's thread block: what it reads once it writes for each of the token's experts, or the other
// way round. That is bound by memory; each access is 16 bytes a thread where rows begin at multiples of it.
//
// Dropped: a radix sort, which moves keys several times. Dropped: one row a thread block when rows are made, which reads
// a token once for each of its experts. Dropped: counts in global memory by atomics, whose order differs between runs.
#pragma once

#include "formats.cuh"

namespace dsp {
namespace experts {

// The emulator takes small tiles, so that small cases take several.
#if DSP_EMU
constexpr int kMostThreads = 128;
#else
constexpr int kMostThreads = 1024;
#endif
constexpr int kRowThreads = 256;
constexpr int64_t kSharedBytes = 48 << 10;  // that a thread block has without asking
constexpr int64_t kMostExperts = 8192;      // runtime/experts.py
constexpr int64_t kMostRows = 0x7fffffff;

__host__ __device__ inline int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

// -- sorting --------------------------------------------------------------------------------------------------------

struct Routing {
  const void* experts;
  bool is_wide;  // int64 instead of int32
  int64_t count;
  int num_experts;
  int64_t tiles;
};

// Its expert, or, where it is dropped, the one behind all.
__device__ __forceinline__ int bin_of(const Routing& routing, int64_t index) {
  const int64_t expert = routing.is_wide ? static_cast<const int64_t*>(routing.experts)[index]
                                         : static_cast<const int32_t*>(routing.experts)[index];
  return expert >= 0 && expert < routing.num_experts ? static_cast<int>(expert) : routing.num_experts;
}

// How many threads of the warp before this one have the same bin, and in counts[bin] how many have it in all. Threads
// without an assignment take part, with a bin below 0.
__device__ __forceinline__ int rank_in_warp(int bin, uint16_t* counts) {
  const int lane = static_cast<int>(threadIdx.x) % DSP_WARP;
  int rank = 0;
  uint64_t rest = ballot(bin >= 0);
  while (rest != 0) {
    const int first = lowest(rest);
    const int its_bin = shuffle(bin, first);
    const uint64_t same = ballot(bin == its_bin);
    if (bin == its_bin) rank = ones(same & ((uint64_t{1} << lane) - 1));
    if (lane == first) counts[its_bin] = static_cast<uint16_t>(ones(same));
    rest &= ~same;
  }
  return rank;
}

// table[bin * tiles + tile]: with kIsCount receives how many of the tile are of that bin, otherwise holds their first row.
template <bool kIsCount>
__global__ void __launch_bounds__(kMostThreads)
    sort_kernel(DSP_BY_VALUE(Routing) routing, int32_t* __restrict__ table, int32_t* __restrict__ positions) {
  DSP_DYNAMIC_SHARED(uint16_t, counts);  // [warps][bins]
  const int thread = threadIdx.x, threads = blockDim.x;
  const int warp = thread / DSP_WARP, warps = threads / DSP_WARP;
  const int bins = routing.num_experts + 1;
  for (int64_t tile = blockIdx.x; tile < routing.tiles; tile += gridDim.x) {
    for (int i = thread; i < warps * bins; i += threads) counts[i] = 0;
    __syncthreads();
    const int64_t index = tile * threads + thread;
    const int bin = index < routing.count ? bin_of(routing, index) : -1;
    const int rank = rank_in_warp(bin, counts + warp * bins);
    __syncthreads();
    // Of each bin, how many there are in the warps before.
    for (int i = thread; i < bins; i += threads) {
      int before = 0;
      for (int w = 0; w < warps; ++w) {
        const int own = counts[w * bins + i];
        counts[w * bins + i] = static_cast<uint16_t>(before);
        before += own;
      }
      if (kIsCount) table[i * routing.tiles + tile] = before;
    }
    __syncthreads();
    if (!kIsCount && bin >= 0) {
      const int row = table[bin * routing.tiles + tile] + counts[warp * bins + bin] + rank;
      positions[index] = bin < routing.num_experts ? row : -1 - row;
    }
    __syncthreads();  // the next tile begins with other counts
  }
}

// Each count becomes the sum of those before it, by one thread block. ends[bin] is that of the next bin's first tile.
__global__ void __launch_bounds__(kMostThreads)
    scan_kernel(int32_t* __restrict__ table, int64_t tiles, int64_t bins, int32_t* __restrict__ ends) {
  __shared__ int32_t totals[kMostThreads / DSP_SMALLEST_WARP];
  const int thread = threadIdx.x;
  const int warp = thread / DSP_WARP, lane = thread % DSP_WARP;
  int before = 0;
  for (int64_t first = 0; first < tiles * bins; first += kMostThreads) {
    const int64_t index = first + thread;
    const int own = index < tiles * bins ? table[index] : 0;
    int sum = own;  // of this thread and those of its warp before it
    for (int distance = 1; distance < DSP_WARP; distance *= 2) {
      const int other = shuffle(sum, lane < distance ? lane : lane - distance);
      if (lane >= distance) sum += other;
    }
    if (lane == DSP_WARP - 1) totals[warp] = sum;
    __syncthreads();
    int row = before + sum - own;
    for (int w = 0; w < kMostThreads / DSP_WARP; ++w) {
      if (w < warp) row += totals[w];
      before += totals[w];
    }
    if (index < tiles * bins) {
      table[index] = row;
      if (index > 0 && index % tiles == 0) ends[index / tiles - 1] = row;
    }
    __syncthreads();  // the next ones have other totals
  }
}

// -- rows -----------------------------------------------------------------------------------------------------------

// Of each assignment, or null.
struct Weights {
  const void* data;
  int dtype;

  __device__ __forceinline__ float at(int64_t index) const {
    if (dtype == 0) return to_float(static_cast<const float*>(data)[index]);
    if (dtype == 1) return to_float(static_cast<const f16*>(data)[index]);
    return to_float(static_cast<const bf16*>(data)[index]);
  }
};

struct Shape {
  int64_t tokens;
  int64_t top_k;
  int64_t hidden;
};

// kIsSpread: from tokens to rows; without it from rows to tokens.
template <class T, bool kIsSpread>
__global__ void __launch_bounds__(kRowThreads)
    row_kernel(const T* __restrict__ from, const int32_t* __restrict__ positions, DSP_BY_VALUE(Weights) weights,
               T* __restrict__ to, DSP_BY_VALUE(Shape) shape) {
  const int64_t width = static_cast<int64_t>(blockDim.x) * kUnit;
  const int64_t parts = ceiling(shape.hidden, width);
  for (int64_t number = blockIdx.x; number < shape.tokens * parts; number += gridDim.x) {
    const int64_t token = number / parts;
    const int64_t column = (number - token * parts) * width + threadIdx.x * kUnit;
    const int64_t there = shape.hidden - column;
    if (there <= 0) continue;
    const int64_t own = token * shape.hidden + column;
    float values[kUnit];
    if constexpr (kIsSpread) {
      load_values(from + own, there, is_aligned_to(from + own, 16), values);
    } else {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) values[i] = 0.f;
    }
    for (int64_t k = token * shape.top_k; k < (token + 1) * shape.top_k; ++k) {
      const int position = positions[k];
      const int64_t row = position < 0 ? -1 - position : position;
      const int64_t other = row * shape.hidden + column;
      float one[kUnit];
      if constexpr (kIsSpread) {
#pragma unroll
        for (int i = 0; i < kUnit; ++i) one[i] = position < 0 ? 0.f : values[i];
      } else {
        if (position < 0) continue;
        load_values(from + other, there, is_aligned_to(from + other, 16), one);
      }
      if (weights.data && position >= 0) {
        const float weight = weights.at(k);
#pragma unroll
        for (int i = 0; i < kUnit; ++i) one[i] = multiply(one[i], weight);
      }
      if constexpr (kIsSpread) {
        store_values(to + other, there, is_aligned_to(to + other, 16), one);
      } else {
#pragma unroll
        for (int i = 0; i < kUnit; ++i) values[i] = add(values[i], one[i]);
      }
    }
    if constexpr (!kIsSpread) store_values(to + own, there, is_aligned_to(to + own, 16), values);
  }
}

// -- launches -------------------------------------------------------------------------------------------------------

inline int64_t shared_bytes(int threads, int64_t bins) { return threads / DSP_SMALLEST_WARP * bins * sizeof(uint16_t); }

// Of a tile: as many as shared memory has counts for. Two warps of 32 have room for kMostExperts.
inline int threads_of(int64_t bins) {
  int threads = kMostThreads;
  while (threads > 64 && shared_bytes(threads, bins) > kSharedBytes) threads /= 2;
  return threads;
}

inline bool can_sort(int64_t count, int64_t num_experts) {
  return count >= 0 && count <= kMostRows && num_experts >= 1 && num_experts <= kMostExperts;
}

// At least one, which then finds that there is nothing to count.
inline int64_t tiles_of(int64_t count, int64_t bins) { return count ? ceiling(count, threads_of(bins)) : 1; }

inline int sort(const void* ids, int is_wide, int64_t count, int64_t num_experts, int32_t* table, int32_t* positions,
                int32_t* ends, void* stream) {
  if (!can_sort(count, num_experts)) return kInvalidValue;
  const int64_t bins = num_experts + 1;
  const int threads = threads_of(bins);
  const Routing routing{ids, is_wide != 0, count, static_cast<int>(num_experts), tiles_of(count, bins)};
  const int64_t grid = grid_of(routing.tiles);
  const int64_t shared = shared_bytes(threads, bins);
  auto counting = sort_kernel<true>;
  if (const int error = DSP_LAUNCH(counting, grid, threads, shared, stream, routing, table, positions)) return error;
  if (const int error = DSP_LAUNCH(scan_kernel, 1, kMostThreads, 0, stream, table, routing.tiles, bins, ends))
    return error;
  auto placing = sort_kernel<false>;
  return DSP_LAUNCH(placing, grid, threads, shared, stream, routing, table, positions);
}

template <bool kIsSpread>
int move_rows(const void* from, const void* positions, Weights weights, void* to, Shape shape, int dtype, void* stream) {
  if (shape.tokens < 0 || shape.top_k < 0 || shape.hidden < 0) return kInvalidValue;
  if (weights.dtype < 0 || weights.dtype >= kDtypes) return kInvalidValue;
  return with_dtype(dtype, [&](auto value) {
    using T = decltype(value);
    if (shape.tokens == 0 || shape.hidden == 0) return 0;
    int threads = kRowThreads;  // none without values, but for what fills a warp of either size
    while (threads > 64 && threads / 2 * kUnit >= shape.hidden) threads /= 2;
    const int64_t blocks = shape.tokens * ceiling(shape.hidden, static_cast<int64_t>(threads) * kUnit);
    auto kernel = row_kernel<T, kIsSpread>;
    return DSP_LAUNCH(kernel, grid_of(blocks), threads, 0, stream, static_cast<const T*>(from),
                      static_cast<const int32_t*>(positions), weights, static_cast<T*>(to), shape);
  });
}

}  // namespace experts
}  // namespace dsp

// -- the C ABI ------------------------------------------------------------------------------------------------------
//
// Dtypes are numbered as in formats.cuh. All tensors are contiguous and on one device. Each answers the driver's error
// code, 0 for none.

// How many int32 dsp_sort_experts works in.
DSP_EXPORT int dsp_sort_experts_space(int64_t count, int64_t num_experts, int64_t* values) {
  if (!dsp::experts::can_sort(count, num_experts)) return dsp::kInvalidValue;
  *values = dsp::experts::tiles_of(count, num_experts + 1) * (num_experts + 1);
  return 0;
}

// Of `count` experts, int64 where is_wide and otherwise int32: int32 positions, as many, and num_experts int32 ends.
DSP_EXPORT int dsp_sort_experts(const void* experts, int is_wide, int64_t count, int64_t num_experts, void* space,
                                void* positions, void* ends, void* stream) {
  return dsp::experts::sort(experts, is_wide, count, num_experts, static_cast<int32_t*>(space),
                            static_cast<int32_t*>(positions), static_cast<int32_t*>(ends), stream);
}

// Of [tokens, hidden] values [tokens * top_k, hidden] rows. Weights are null for none.
DSP_EXPORT int dsp_spread_experts(const void* x, const void* positions, const void* weights, int weights_dtype,
                                  void* rows, int64_t tokens, int64_t top_k, int64_t hidden, int dtype, void* stream) {
  return dsp::experts::move_rows<true>(x, positions, {weights, weights_dtype}, rows, {tokens, top_k, hidden}, dtype,
                                       stream);
}

DSP_EXPORT int dsp_unpermute_experts(const void* rows, const void* positions, const void* weights, int weights_dtype,
                                     void* x, int64_t tokens, int64_t top_k, int64_t hidden, int dtype, void* stream) {
  return dsp::experts::move_rows<false>(rows, positions, {weights, weights_dtype}, x, {tokens, top_k, hidden}, dtype,
                                        stream);
}
