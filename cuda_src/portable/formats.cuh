// The formats of runtime/formats.py: what a value is rounded to, and how codes lie in bytes.
//
// A thread handles eight values at once, a unit: 16 bytes of 16-bit values, and whole bytes of codes in every format.
#pragma once

#include "../common/gpu.h"

namespace dsp {

constexpr int kUnit = 8;

// kExponent and kMantissa are bits, 0 where values are integers; kCode is the format's number in the C ABI.
struct Int8 {
  static constexpr int kCode = 0, kBits = 8, kExponent = 0, kMantissa = 0, kLargest = 127;
};
struct Int4 {
  static constexpr int kCode = 1, kBits = 4, kExponent = 0, kMantissa = 0, kLargest = 7;
};
struct Fp8E4M3 {
  static constexpr int kCode = 2, kBits = 8, kExponent = 4, kMantissa = 3, kLargest = 448;
};
struct Fp8E5M2 {
  static constexpr int kCode = 3, kBits = 8, kExponent = 5, kMantissa = 2, kLargest = 57344;
};
struct Fp6E3M2 {
  static constexpr int kCode = 4, kBits = 6, kExponent = 3, kMantissa = 2, kLargest = 28;
};

// Unsigned, and none of runtime/formats.py: for values that are not negative, over nine powers of ten.
struct UnsignedE5M3 {
  static constexpr int kBits = 8, kExponent = 5, kMantissa = 3, kLargest = 122880;
};

// Calls function with the format of that code; answers kInvalidValue where there is none.
template <class Function>
int with_format(int code, Function&& function) {
  switch (code) {
    case Int8::kCode: return function(Int8{});
    case Int4::kCode: return function(Int4{});
    case Fp8E4M3::kCode: return function(Fp8E4M3{});
    case Fp8E5M2::kCode: return function(Fp8E5M2{});
    case Fp6E3M2::kCode: return function(Fp6E3M2{});
    default: return kInvalidValue;
  }
}

// The same for the values' types: 0 fp32, 1 fp16, 2 bf16.
constexpr int kDtypes = 3;
template <class Function>
int with_dtype(int code, Function&& function) {
  switch (code) {
    case 0: return function(float{});
    case 1: return function(f16{});
    case 2: return function(bf16{});
    default: return kInvalidValue;
  }
}

template <class Format>
__host__ __device__ constexpr int64_t bytes_of_block(int64_t block) {
  return block * Format::kBits / 8;
}

// -- values ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float power_of_two(int exponent) {
  return float_of(static_cast<uint32_t>(exponent + 127) << 23);
}

// The code of a value that is scaled already, in a format of floating point; `round` makes whole steps of its magnitude.
//
// Of value v = m * 2**e, 1 <= m < 2: steps of 2**(e - mantissa), e no less than the smallest normal's; a mantissa that
// is rounded up to 2 carries into the exponent by itself.
template <class Format, class Round>
__device__ __forceinline__ uint32_t encode_by(float value, Round round) {
  constexpr int bias = (1 << (Format::kExponent - 1)) - 1;
  const uint32_t bits = bits_of(value);
  const int own = static_cast<int>(bits >> 23 & 0xff) - 127;
  const int exponent = own < 1 - bias ? 1 - bias : own;
  const int steps = round(multiply(float_of(bits & kMagnitude), power_of_two(Format::kMantissa - exponent)));
  const uint32_t magnitude = static_cast<uint32_t>(((exponent + bias - 1) << Format::kMantissa) + steps);
  return magnitude | (bits >> 31) << (Format::kExponent + Format::kMantissa);
}

// The same of any format, to the nearest.
template <class Format>
__device__ __forceinline__ uint32_t encode(float value) {
  if constexpr (Format::kExponent == 0) {
    return static_cast<uint32_t>(nearest(value)) & ((1u << Format::kBits) - 1);
  } else {
    return encode_by<Format>(value, [](float steps) { return nearest(steps); });
  }
}

// Stochastically: up with the probability of what would be cut off; `noise` is at least 0 and below 1.
template <class Format>
__device__ __forceinline__ uint32_t encode(float value, float noise) {
  return encode_by<Format>(value, [noise](float steps) { return static_cast<int>(add(steps, noise)); });
}

// The value of a code, before it is scaled.
template <class Format>
__device__ __forceinline__ float decode(uint32_t code) {
  if constexpr (Format::kExponent == 0) {
    constexpr int half = 1 << (Format::kBits - 1);
    return static_cast<float>((static_cast<int>(code) ^ half) - half);  // the sign bit extended
  } else {
    constexpr int bias = (1 << (Format::kExponent - 1)) - 1;
    constexpr int sign = Format::kExponent + Format::kMantissa;
    constexpr uint32_t one = 1u << Format::kMantissa;
    const uint32_t magnitude = code & ((1u << sign) - 1);
    const int exponent = static_cast<int>(magnitude >> Format::kMantissa);
    const uint32_t steps = (magnitude & (one - 1)) + (exponent > 0 ? one : 0);
    const int scale = (exponent > 1 ? exponent : 1) - bias - Format::kMantissa;
    const float value = multiply(static_cast<float>(static_cast<int>(steps)), power_of_two(scale));
    return float_of(bits_of(value) | (code >> sign) << 31);
  }
}

// -- units of codes -------------------------------------------------------------------------------------------------

template <int kBytes>
__device__ __forceinline__ void store_bytes(uint8_t* to, uint64_t bits, bool is_aligned) {
  if (is_aligned) {
    if constexpr (kBytes == 8) *reinterpret_cast<uint64_t*>(to) = bits;
    if constexpr (kBytes == 4) *reinterpret_cast<uint32_t*>(to) = static_cast<uint32_t>(bits);
    if constexpr (kBytes == 2) *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(bits);
  } else {
    for (int i = 0; i < kBytes; ++i) to[i] = static_cast<uint8_t>(bits >> 8 * i);
  }
}

template <int kBytes>
__device__ __forceinline__ uint64_t load_bytes(const uint8_t* from, bool is_aligned) {
  if (is_aligned) {
    if constexpr (kBytes == 8) return *reinterpret_cast<const uint64_t*>(from);
    if constexpr (kBytes == 4) return *reinterpret_cast<const uint32_t*>(from);
    if constexpr (kBytes == 2) return *reinterpret_cast<const uint16_t*>(from);
  }
  uint64_t bits = 0;
  for (int i = 0; i < kBytes; ++i) bits |= static_cast<uint64_t>(from[i]) << 8 * i;
  return bits;
}

// Unit number `unit` of a block of `block` values, whose codes begin at `codes`. Aligned means to 8 bytes at the
// start of the buffer: blocks are multiples of 16 values, so that each access then is aligned to its own size.
template <class Format>
__device__ __forceinline__ void store_codes(uint8_t* codes, int block, int unit, const uint32_t (&values)[kUnit],
                                            bool is_aligned) {
  constexpr int high_bits = Format::kBits == 8 ? 8 : 4;
  constexpr int low_bits = Format::kBits == 6 ? 2 : 0;  // mantissas of six bits lie behind all of the block's high bits
  uint64_t high = 0;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) high |= static_cast<uint64_t>(values[i] >> low_bits) << high_bits * i;
  store_bytes<high_bits>(codes + high_bits * unit, high, is_aligned);
  if constexpr (low_bits > 0) {
    uint32_t low = 0;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) low |= (values[i] & 3) << 2 * i;
    store_bytes<2>(codes + block / 2 + 2 * unit, low, is_aligned);
  }
}

template <class Format>
__device__ __forceinline__ void load_codes(const uint8_t* codes, int block, int unit, uint32_t (&values)[kUnit],
                                           bool is_aligned) {
  constexpr int high_bits = Format::kBits == 8 ? 8 : 4;
  constexpr int low_bits = Format::kBits == 6 ? 2 : 0;
  const uint64_t high = load_bytes<high_bits>(codes + high_bits * unit, is_aligned);
  uint32_t low = 0;
  if constexpr (low_bits > 0) low = static_cast<uint32_t>(load_bytes<2>(codes + block / 2 + 2 * unit, is_aligned));
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    values[i] = static_cast<uint32_t>(high >> high_bits * i) & ((1u << high_bits) - 1);
    if constexpr (low_bits > 0) values[i] = values[i] << 2 | (low >> 2 * i & 3);
  }
}

// -- pieces of codes ------------------------------------------------------------------------------------------------
//
// Sixteen codes, which every block is a multiple of, in whole words: for kernels that would be bound by decode's dozen
// operations a value, not by memory. The values are decode's, to the last bit, in three to six operations.

constexpr int kPiece = 16;

template <class Format>
struct Piece {
  uint32_t words[Format::kBits / 2];
};

// Where a piece lies, in bytes from the first block's first code; of six bits the low ones lie apart.
struct PiecePlace {
  int64_t first;
  int to_low;
  bool is_even;  // a multiple of 8
};

// Of piece number `piece` of blocks of `block` values each that follow each other; it is in block number `index`.
template <class Format>
__device__ __forceinline__ PiecePlace place_of_piece(int block, int index, int piece) {
  if constexpr (Format::kBits == 6) {
    const int own = piece - index * (block / kPiece);
    return {index * bytes_of_block<Format>(block) + 8 * own, block / 2 - 4 * own, block % (2 * kPiece) == 0};
  } else {
    return {static_cast<int64_t>(piece) * (2 * Format::kBits), 0, true};
  }
}

// The first block is at an address that the bytes of a piece divide, of six bits 8.
template <class Format>
__device__ __forceinline__ Piece<Format> load_piece(const uint8_t* __restrict__ codes, const PiecePlace& place) {
  Piece<Format> found;
  codes += place.first;
  if constexpr (Format::kBits == 8) {
    const uint4 words = *reinterpret_cast<const uint4*>(codes);
    found.words[0] = words.x, found.words[1] = words.y, found.words[2] = words.z, found.words[3] = words.w;
  } else if (Format::kBits == 4 || place.is_even) {
    const uint2 words = *reinterpret_cast<const uint2*>(codes);
    found.words[0] = words.x, found.words[1] = words.y;
  } else {  // blocks of an odd number of pieces begin at multiples of 4
    found.words[0] = reinterpret_cast<const uint32_t*>(codes)[0];
    found.words[1] = reinterpret_cast<const uint32_t*>(codes)[1];
  }
  if constexpr (Format::kBits == 6) found.words[2] = *reinterpret_cast<const uint32_t*>(codes + place.to_low);
  return found;
}

// The number in byte kByte of a word, a signed one of kBits bits whose sign bit has been changed. As the mantissa of
// 2**23, whose lowest bit is worth 1, it takes a subtraction instead of a conversion, which is slow.
template <int kBits, int kByte>
__device__ __forceinline__ float integer_at(uint32_t word) {
  constexpr float zero = static_cast<float>((1 << 23) + (1 << (kBits - 1)));
  return add(float_of(byte_below<kByte>(word, 0x4b000000u)), -zero);
}

// Of a format of floating point: sign and exponent at the top of `word`, behind them other bits; `low` are those of the
// mantissa which do not follow, in their place. With fp32's bias the value is too small by a power of two.
template <class Format>
__device__ __forceinline__ float float_at_top(uint32_t word, uint32_t low) {
  constexpr int bias = (1 << (Format::kExponent - 1)) - 1, shift = 8 - Format::kExponent;
  constexpr int follow = Format::kBits == 6 ? 0 : Format::kMantissa;
  constexpr uint32_t magnitude = ((1u << (Format::kExponent + follow)) - 1) << (23 - follow);
  const uint32_t placed = static_cast<uint32_t>(static_cast<int32_t>(word) >> shift) & (0x80000000u | magnitude);
  return multiply(float_of(placed | low), power_of_two(127 - bias));
}

// The first (half 0) or the last (half 1) eight of a piece, before they are scaled.
template <class Format>
__device__ __forceinline__ void decode_half(const Piece<Format>& piece, int half, float (&values)[kUnit]) {
  constexpr int kWords = Format::kBits == 8 ? 2 : 1;  // of a half, without low bits that lie apart
  uint32_t words[kWords];  // chosen, not indexed: what is indexed at run time is no register
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = half == 0 ? piece.words[i] : piece.words[kWords + i];
  if constexpr (Format::kExponent == 0 && Format::kBits == 8) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t word = words[i] ^ 0x80808080u;
      values[4 * i] = integer_at<8, 0>(word);
      values[4 * i + 1] = integer_at<8, 1>(word);
      values[4 * i + 2] = integer_at<8, 2>(word);
      values[4 * i + 3] = integer_at<8, 3>(word);
    }
  } else if constexpr (Format::kExponent == 0) {
    const uint32_t changed = words[0] ^ 0x88888888u;
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // every second one
      const uint32_t word = changed >> 4 * i & 0x0f0f0f0fu;
      values[i] = integer_at<4, 0>(word);
      values[i + 2] = integer_at<4, 1>(word);
      values[i + 4] = integer_at<4, 2>(word);
      values[i + 6] = integer_at<4, 3>(word);
    }
  } else if constexpr (Format::kBits == 8) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i)
      values[i] = float_at_top<Format>(words[i / 4] << (24 - 8 * (i % 4)), 0);
  } else {
    const uint32_t lows = piece.words[2] >> 16 * half;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const uint32_t low = lows << (21 - 2 * i) & 3u << 21;
      values[i] = float_at_top<Format>(words[0] << (28 - 4 * i), low);
    }
  }
}

// -- units of values ------------------------------------------------------------------------------------------------

template <class T>
union UnitBytes {
  static constexpr int kVectors = kUnit * sizeof(T) / 16;
  uint4 vectors[kVectors];
  T values[kUnit];
  __device__ UnitBytes() {}
};

__device__ __forceinline__ bool is_aligned_to(const void* address, int bytes) {
  return (reinterpret_cast<uintptr_t>(address) & (bytes - 1)) == 0;
}

// All eight, from an address that 16 bytes divide.
template <class T>
__device__ __forceinline__ void load_whole(const T* from, float (&values)[kUnit]) {
  UnitBytes<T> unit;
#pragma unroll
  for (int i = 0; i < UnitBytes<T>::kVectors; ++i) unit.vectors[i] = reinterpret_cast<const uint4*>(from)[i];
#pragma unroll
  for (int i = 0; i < kUnit; ++i) values[i] = to_float(unit.values[i]);
}

// The first `count`, any number, and zeros beyond.
template <class T>
__device__ __forceinline__ void load_values(const T* from, int64_t count, bool is_aligned, float (&values)[kUnit]) {
  if (is_aligned && count >= kUnit) {
    load_whole(from, values);
  } else {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) values[i] = i < count ? to_float(from[i]) : 0.f;
  }
}

template <class T>
__device__ __forceinline__ void store_values(T* to, int64_t count, bool is_aligned, const float (&values)[kUnit]) {
  if (is_aligned && count >= kUnit) {
    UnitBytes<T> unit;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) unit.values[i] = from_float<T>(values[i]);
#pragma unroll
    for (int i = 0; i < UnitBytes<T>::kVectors; ++i) reinterpret_cast<uint4*>(to)[i] = unit.vectors[i];
  } else {
#pragma unroll
    for (int i = 0; i < kUnit; ++i)
      if (i < count) to[i] = from_float<T>(values[i]);
  }
}

}  // namespace dsp
