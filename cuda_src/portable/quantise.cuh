// Blockwise quantisation: the operators of runtime/quantise.py, with which these agree to the last bit.
//
// A group of threads, a power of two and at most 32, takes one block of values: each thread units of eight. Blocks of
// up to 2048 values stay in registers between the search for their largest magnitude and their encoding, so that
// memory is read once; larger ones are read twice, the second time from a cache. Groups lie side by side in a warp,
// and a thread block takes a tile of blocks that lie one after another in one chunk of one tensor: where it is is
// found once a tile. What is quantised is bound by memory: each access is 16 bytes a thread where a tensor's chunk
// begins at a multiple.
//
// Dropped: a table of tensors in device memory, whose upload would cost a copy a call and cannot be captured in a
// graph; it travels with the launch instead, and more tensors take more launches. Dropped: a thread block a block of
// values; small blocks would leave most of it idle, and large ones wait for each other twice. Dropped: the chunk as
// the grid's second dimension, which ends at 65535.
#pragma once

#include "blocks.cuh"
#include "formats.cuh"
#include "tiles.cuh"

namespace dsp {

constexpr int kThreads = 256;
constexpr int kMostLanes = 32;  // of a group: a warp, or, where a wavefront has 64, half of one
constexpr int kMostParts = 64;  // with Work's other fields below the 4 KiB of a launch's arguments

// Blocks of a group in one tile, and from how many tiles on: finding the place then is paid by four blocks, and where
// there are few tiles each would rather have a thread block of its own. The emulator takes both paths in small cases.
constexpr int kRounds = 4;
#if DSP_EMU
constexpr int64_t kManyTiles = 8;
#else
constexpr int64_t kManyTiles = 8192;
#endif

// One tensor of a bucket: of each chunk `size` values in `blocks` blocks, the first of which is number `first_block`.
struct Part {
  void* data;
  int64_t values;  // in all; beyond them there are zeros
  int64_t size;
  int64_t blocks;
  int64_t first_block;
  int64_t first_tile;
  int64_t tiles;  // a chunk
};

struct Work {
  Part parts[kMostParts];
  int64_t tiles;
  int64_t row_blocks;  // of all tensors of the bucket, those of other launches too
  int64_t chunks;
  int64_t nodes;
  int block;
  int lanes;
  int rounds;
  int count;
};
static_assert(sizeof(Work) <= 3900, "a launch's arguments are 4 KiB at most");

// Where a tile lies.
struct Tile {
  int part;
  int64_t chunk;
  int64_t first;  // block in the chunk
};

__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  // A division of 64 bits takes a hundred instructions, one of 32 bits twenty.
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

__device__ __forceinline__ Tile find(const Work& work, int64_t tile) {
  const int part = part_of(work, tile);
  const int64_t local = tile - work.parts[part].first_tile;
  const int64_t tiles = work.parts[part].tiles;
  const int64_t chunk = quotient(local, tiles);
  return {part, chunk, (local - chunk * tiles) * work.rounds * (kThreads / work.lanes)};
}

// Chunk of rank d of node n stands at d * nodes + n.
__device__ __forceinline__ int64_t position(const Work& work, int64_t chunk) {
  if (work.nodes == 1) return chunk;
  const int64_t devices = quotient(work.chunks, work.nodes);
  const int64_t node = quotient(chunk, devices);
  return (chunk - node * devices) * work.nodes + node;
}

__device__ __forceinline__ int64_t at_least_zero(int64_t a) { return a < 0 ? 0 : a; }

// -- values to codes ------------------------------------------------------------------------------------------------

template <class Format>
__device__ __forceinline__ void encode_unit(const float (&values)[kUnit], const Scaling& scaling, uint8_t* codes,
                                            int block, int unit, bool is_aligned) {
  uint32_t found[kUnit];
#pragma unroll
  for (int i = 0; i < kUnit; ++i)
    found[i] = encode<Format>(scaling.is_finite ? multiply(values[i], scaling.inverse) : 0.f);
  store_codes<Format>(codes, block, unit, found, is_aligned);
}

// kUnits are the most units of a thread, which it keeps in registers; 0 for any number, read twice.
template <class Format, class T, int kUnits>
__global__ void __launch_bounds__(kThreads)
    quantise_kernel(DSP_BY_VALUE(Work) work, uint8_t* __restrict__ codes, float* __restrict__ scales) {
  const int block = work.block, lanes = work.lanes;
  const int units = block / kUnit;
  const int groups = kThreads / lanes;
  const int group = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  const bool codes_are_aligned = is_aligned_to(codes, 8);
  for (int64_t number = blockIdx.x; number < work.tiles; number += gridDim.x) {
    const Tile tile = find(work, number);
    const Part& part = work.parts[tile.part];
    const int64_t before = tile.chunk * part.size;
    const T* chunk = static_cast<const T*>(part.data) + before;
    const bool is_aligned = is_aligned_to(chunk, 16);
    const int64_t rest = at_least_zero(part.values - before);
    const int64_t there = rest < part.size ? rest : part.size;
    const int64_t row = position(work, tile.chunk) * work.row_blocks + part.first_block;
    for (int round = 0; round < work.rounds; ++round) {
      // A group without a block goes along: its warp's others wait for it.
      const int64_t index = tile.first + round * groups + group;
      const bool is_block = index < part.blocks;
      const int64_t count = is_block ? there - index * block : 0;
      const T* from = chunk + index * block;
      uint8_t* to = codes + (row + index) * bytes_of_block<Format>(block);
      uint32_t most = 0;
      if constexpr (kUnits > 0) {
        float values[kUnits][kUnit];
        if (is_aligned && count >= block) {
#pragma unroll
          for (int i = 0; i < kUnits; ++i) {
            const int unit = lane + i * lanes;
            if (unit < units) load_whole(from + unit * kUnit, values[i]);
          }
        } else {
#pragma unroll
          for (int i = 0; i < kUnits; ++i) {
            const int unit = lane + i * lanes;
            if (unit < units) load_values(from + unit * kUnit, count - unit * kUnit, is_aligned, values[i]);
          }
        }
#pragma unroll
        for (int i = 0; i < kUnits; ++i)
          if (lane + i * lanes < units) most = larger(most, largest_magnitude(values[i]));
        most = largest_of_group(most, lanes);
        if (!is_block) continue;
        const Scaling scaling = scaling_of<Format>(most);
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
          const int unit = lane + i * lanes;
          if (unit < units) encode_unit<Format>(values[i], scaling, to, block, unit, codes_are_aligned);
        }
        if (lane == 0) scales[row + index] = scaling.scale;
      } else {
        float values[kUnit];
        for (int unit = lane; unit < units; unit += lanes) {
          load_values(from + unit * kUnit, count - unit * kUnit, is_aligned, values);
          most = larger(most, largest_magnitude(values));
        }
        most = largest_of_group(most, lanes);
        if (!is_block) continue;
        const Scaling scaling = scaling_of<Format>(most);
        for (int unit = lane; unit < units; unit += lanes) {
          load_values(from + unit * kUnit, count - unit * kUnit, is_aligned, values);
          encode_unit<Format>(values, scaling, to, block, unit, codes_are_aligned);
        }
        if (lane == 0) scales[row + index] = scaling.scale;
      }
    }
  }
}

// -- codes to values ------------------------------------------------------------------------------------------------

// Of `chunks` chunks that follow each other the sum of one unit, in their order; of one chunk its values.
template <class Format>
__device__ __forceinline__ void decode_unit(const uint8_t* __restrict__ codes, const float* __restrict__ scales,
                                            int64_t index, int64_t row_blocks, int64_t chunks, int block, int unit,
                                            bool is_aligned, float (&total)[kUnit]) {
#pragma unroll 4
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    uint32_t found[kUnit];
    load_codes<Format>(codes + index * bytes_of_block<Format>(block), block, unit, found, is_aligned);
    const float scale = scales[index];
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const float value = multiply(decode<Format>(found[i]), scale);
      total[i] = chunk == 0 ? value : add(total[i], value);
    }
    index += row_blocks;
  }
}

// With kIsSum one row of values, the sum over all chunks times factor; without it a row a chunk.
template <class Format, class T, bool kIsSum>
__global__ void __launch_bounds__(kThreads)
    dequantise_kernel(DSP_BY_VALUE(Work) work, const uint8_t* __restrict__ codes, const float* __restrict__ scales,
                      float factor, int64_t summed) {
  const int block = work.block, lanes = work.lanes;
  const int units = block / kUnit;
  const int groups = kThreads / lanes;
  const int group = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  const bool codes_are_aligned = is_aligned_to(codes, 8);
  for (int64_t number = blockIdx.x; number < work.tiles; number += gridDim.x) {
    const Tile tile = find(work, number);
    const Part& part = work.parts[tile.part];
    T* chunk = static_cast<T*>(part.data) + tile.chunk * part.size;
    const bool is_aligned = is_aligned_to(chunk, 16);
    const int64_t row = tile.chunk * work.row_blocks + part.first_block;
    for (int round = 0; round < work.rounds; ++round) {
      const int64_t index = tile.first + round * groups + group;
      if (index >= part.blocks) break;
      const int64_t count = part.size - index * block;
      T* to = chunk + index * block;
      for (int unit = lane; unit < units; unit += lanes) {
        if (count <= unit * kUnit) break;
        float values[kUnit];
        decode_unit<Format>(codes, scales, row + index, work.row_blocks, kIsSum ? summed : 1, block, unit,
                            codes_are_aligned, values);
        if constexpr (kIsSum) {
#pragma unroll
          for (int i = 0; i < kUnit; ++i) values[i] = multiply(values[i], factor);
        }
        store_values(to + unit * kUnit, count - unit * kUnit, is_aligned, values);
      }
    }
  }
}

// -- launches -------------------------------------------------------------------------------------------------------

constexpr int64_t kGrain = 16;          // of blocks: runtime/formats.py
constexpr int64_t kMostBlock = 1 << 30;  // positions inside of a block are 32 bit

inline int lanes_of(int64_t block) {
  int lanes = 1;
  while (lanes < kMostLanes && lanes < block / kUnit) lanes *= 2;
  return lanes;
}

inline int64_t blocks_of(int64_t values, int64_t block) { return (values + block - 1) / block; }

// Tensors of a bucket. `values` is null where each has chunks * size; `dtypes` where all are to be taken, otherwise
// those of `dtype` are.
struct Bucket {
  void* const* data;
  const int64_t* values;
  const int64_t* sizes;
  const int* dtypes;
  int dtype;
  int64_t count;
  int64_t chunks;
  int64_t nodes;
  int64_t block;

  bool is_valid() const {
    if (block < kGrain || block % kGrain || block > kMostBlock || count < 0 || chunks < 0) return false;
    if (nodes < 1 || chunks % nodes) return false;
    for (int64_t i = 0; i < count; ++i) {
      if (sizes[i] < 0 || (values && values[i] < 0)) return false;
      if (dtypes && (dtypes[i] < 0 || dtypes[i] >= kDtypes)) return false;
    }
    return true;
  }
};

// Calls launch(work) for as many tensors at a time as travel with a launch. Tensors without values take no part.
template <class Launch>
int for_each_launch(const Bucket& bucket, Launch&& launch) {
  Work work;
  work.block = static_cast<int>(bucket.block);
  work.lanes = lanes_of(bucket.block);
  work.chunks = bucket.chunks;
  work.nodes = bucket.nodes;
  work.row_blocks = 0;
  for (int64_t i = 0; i < bucket.count; ++i) work.row_blocks += blocks_of(bucket.sizes[i], bucket.block);
  if (work.row_blocks == 0 || bucket.chunks == 0) return 0;
  const int groups = kThreads / work.lanes;
  work.rounds = blocks_of(work.row_blocks * bucket.chunks, groups) >= kManyTiles ? kRounds : 1;

  int64_t first_block = 0;
  work.count = 0;
  work.tiles = 0;
  for (int64_t i = 0; i < bucket.count; ++i) {
    const int64_t blocks = blocks_of(bucket.sizes[i], bucket.block);
    if (blocks > 0 && (!bucket.dtypes || bucket.dtypes[i] == bucket.dtype)) {
      Part& part = work.parts[work.count++];
      part.data = bucket.data[i];
      part.values = bucket.values ? bucket.values[i] : bucket.chunks * bucket.sizes[i];
      part.size = bucket.sizes[i];
      part.blocks = blocks;
      part.first_block = first_block;
      part.first_tile = work.tiles;
      part.tiles = blocks_of(blocks, static_cast<int64_t>(work.rounds) * groups);
      work.tiles += part.tiles * bucket.chunks;
    }
    first_block += blocks;
    if (work.count == kMostParts || (i == bucket.count - 1 && work.count > 0)) {
      if (const int error = launch(work)) return error;
      work.count = 0;
      work.tiles = 0;
    }
  }
  return 0;
}

template <class Format, class T, int kUnits>
int launch_quantise(const Work& work, void* codes, void* scales, void* stream) {
  auto kernel = quantise_kernel<Format, T, kUnits>;
  return DSP_LAUNCH(kernel, grid_of(work.tiles), kThreads, 0, stream, work, static_cast<uint8_t*>(codes),
                    static_cast<float*>(scales));
}

inline int quantise(Bucket bucket, int format, void* codes, void* scales, void* stream) {
  if (!bucket.is_valid()) return kInvalidValue;
  const auto with_both = [&](auto format_tag, auto value) {
    using Format = decltype(format_tag);
    using T = decltype(value);
    return for_each_launch(bucket, [&](const Work& work) {
      const int64_t units = blocks_of(bucket.block / kUnit, work.lanes);
      if (units == 1) return launch_quantise<Format, T, 1>(work, codes, scales, stream);
      if (units <= 4) return launch_quantise<Format, T, 4>(work, codes, scales, stream);
      if (units <= 8) return launch_quantise<Format, T, 8>(work, codes, scales, stream);
      return launch_quantise<Format, T, 0>(work, codes, scales, stream);
    });
  };
  for (int dtype = 0; dtype < kDtypes; ++dtype) {
    bucket.dtype = dtype;
    const int error = with_format(format, [&](auto format_tag) {
      return with_dtype(dtype, [&](auto value) { return with_both(format_tag, value); });
    });
    if (error) return error;
  }
  return 0;
}

template <bool kIsSum>
int dequantise(const Bucket& bucket, int format, int dtype, float factor, int64_t summed, const void* codes,
               const void* scales, void* stream) {
  if (!bucket.is_valid()) return kInvalidValue;
  return with_format(format, [&](auto format_tag) {
    return with_dtype(dtype, [&](auto value) {
      return for_each_launch(bucket, [&](const Work& work) {
        auto kernel = dequantise_kernel<decltype(format_tag), decltype(value), kIsSum>;
        return DSP_LAUNCH(kernel, grid_of(work.tiles), kThreads, 0, stream, work, static_cast<const uint8_t*>(codes),
                          static_cast<const float*>(scales), factor, summed);
      });
    });
  });
}

}  // namespace dsp

// -- the C ABI ------------------------------------------------------------------------------------------------------
//
// Formats and dtypes are numbered as in formats.cuh. All tensors are contiguous and on one device; lists are the
// host's and are read before the call returns. Each answers the driver's error code, 0 for none.

// `values` values become ceil(values / block) blocks.
DSP_EXPORT int dsp_quantise(const void* data, int64_t values, int dtype, void* codes, void* scales, int64_t block,
                            int format, void* stream) {
  void* const parts[1] = {const_cast<void*>(data)};
  return dsp::quantise({parts, &values, &values, &dtype, 0, 1, 1, 1, block}, format, codes, scales, stream);
}

DSP_EXPORT int dsp_dequantise(const void* codes, const void* scales, void* data, int64_t values, int dtype,
                              int64_t block, int format, void* stream) {
  return dsp::dequantise<false>({&data, nullptr, &values, nullptr, 0, 1, 1, 1, block}, format, dtype, 1.f, 1, codes,
                                scales, stream);
}

// Of tensor i `values[i]` values of dtype `dtypes[i]`, of which each chunk holds `sizes[i]`.
DSP_EXPORT int dsp_quantise_bucket(const void* const* data, const int64_t* values, const int64_t* sizes,
                                   const int* dtypes, int64_t count, int64_t chunks, int64_t nodes, void* codes,
                                   void* scales, int64_t block, int format, void* stream) {
  return dsp::quantise({const_cast<void* const*>(data), values, sizes, dtypes, 0, count, chunks, nodes, block}, format,
                       codes, scales, stream);
}

// Tensor i receives chunks * sizes[i] values.
DSP_EXPORT int dsp_dequantise_bucket(const void* codes, const void* scales, void* const* data, const int64_t* sizes,
                                     int64_t count, int64_t chunks, int dtype, int64_t block, int format,
                                     void* stream) {
  return dsp::dequantise<false>({data, nullptr, sizes, nullptr, 0, count, chunks, 1, block}, format, dtype, 1.f, 1,
                                codes, scales, stream);
}

// Tensor i receives sizes[i] values: the sum over chunks, times factor.
DSP_EXPORT int dsp_dequantise_sum(const void* codes, const void* scales, void* const* data, const int64_t* sizes,
                                  int64_t count, int64_t chunks, float factor, int dtype, int64_t block, int format,
                                  void* stream) {
  if (chunks < 1) return dsp::kInvalidValue;
  return dsp::dequantise<true>({data, nullptr, sizes, nullptr, 0, count, 1, 1, block}, format, dtype, factor, chunks,
                               codes, scales, stream);
}
