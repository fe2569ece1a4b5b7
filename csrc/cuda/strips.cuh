// The bitmap format that linear_bitmap.cu describes, as its kernels share it: where a lane's values lie, and how they are expanded.
#pragma once
#include "kernels.h"
#include "numeric.cuh"

namespace sparseprune {

constexpr int kStripRows = 16, kStripColumns = 64;
constexpr int kWordChunks = 8;  // 32 words in 16-byte chunks
constexpr int kChunk = 8;       // 16-bit values in a chunk

struct Strip {
  unsigned first, last;  // its values
};

// How many chunks one stage of a ring holds: the words, and the values with the misalignment of their first.
inline int stage_chunks(int most_in_strip) { return kWordChunks + (most_in_strip + 2 * (kChunk - 1)) / kChunk; }

__device__ inline Strip find_strip(const int32_t* starts, int64_t index, bool exists) {
  if (!exists) return {0, 0};
  return {static_cast<unsigned>(__ldg(starts + index)), static_cast<unsigned>(__ldg(starts + index + 1))};
}

// Starts copying one strip's words and values into a stage; a strip of no values copies no values.
__device__ inline void fetch(uint4* stage, const uint32_t* words, const void* values, int64_t index, Strip strip, int lane) {
  if (lane < kWordChunks) copy_async(stage + lane, reinterpret_cast<const uint4*>(words) + index * kWordChunks + lane);
  const unsigned first = strip.first / kChunk, last = (strip.last + kChunk - 1) / kChunk;
  const uint4* source = static_cast<const uint4*>(values);
  for (unsigned chunk = first + lane; chunk < last; chunk += 32) copy_async(stage + kWordChunks + (chunk - first), source + chunk);
}

// Per nibble group, 8 bits each: how many values lie before this lane's own, and how many the group has. A group has at most 128.
struct Ranks {
  uint32_t upper, lower, upper_total, lower_total;  // rows g, rows g + 8; byte s for the columns 4 s .. 4 s + 3
};

// One scan over the warp; all its lanes take part.
__device__ inline Ranks rank(uint32_t word, int lane) {
  uint32_t bits = word - (word >> 1 & 0x55555555u);
  bits = (bits & 0x33333333u) + (bits >> 2 & 0x33333333u);  // how many bits each nibble has
  const uint32_t own_upper = bits & 0x0f0f0f0fu, own_lower = bits >> 4 & 0x0f0f0f0fu;
  uint32_t upper = own_upper, lower = own_lower;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const uint32_t upper_before = __shfl_up_sync(kAllLanes, upper, delta), lower_before = __shfl_up_sync(kAllLanes, lower, delta);
    if (lane >= delta) upper += upper_before, lower += lower_before;
  }
  const uint32_t upper_total = __shfl_sync(kAllLanes, upper, 31), lower_total = __shfl_sync(kAllLanes, lower, 31);
  return {upper - own_upper, lower - own_lower, upper_total, lower_total};
}

// Two neighbouring columns of one row, expanded: bits `at` and `at + 1` of the word say which are there; moves `from` past them.
__device__ inline uint32_t expand(uint32_t word, int at, const uint16_t*& from) {
  uint32_t low = 0, high = 0;
  if (word & 1u << at) low = *from, ++from;
  if (word & 2u << at) high = *from, ++from;
  return pack_pair(low, high);
}

// The A fragment of columns 4 s .. 4 s + 3 of every lane's run; `place` is where the group's values begin, and moves past them.
__device__ inline void expand_fragment(uint32_t (&a)[4], uint32_t word, const Ranks& ranks, int s, const uint16_t* kept, unsigned& place) {
  const uint16_t* from = kept + place + (ranks.upper >> 8 * s & 0xff);
  a[0] = expand(word, 8 * s, from);
  a[2] = expand(word, 8 * s + 2, from);
  place += ranks.upper_total >> 8 * s & 0xff;
  from = kept + place + (ranks.lower >> 8 * s & 0xff);
  a[1] = expand(word, 8 * s + 4, from);
  a[3] = expand(word, 8 * s + 6, from);
  place += ranks.lower_total >> 8 * s & 0xff;
}

}  // namespace sparseprune
