// The exact k-th largest of any number of tensors, and the mask of the k largest, without sorting, copying or asking the host.
//
// Radix selection over 32-bit keys that sort as the values do, the widest digit first: histogram the digit of the keys that share the
// prefix found so far, take the digit in which the wanted rank falls, go on. float32 needs digits of 11, 11 and 10 bits, so it is read
// three times; 16-bit values fill the upper half of the key and are read twice. Ties go to the lower index: they are counted by
// chunks, the counts are summed in order, and each chunk then knows how many of its own may stay.
//
// Up to kSelectTensors tensors go through one launch: their addresses travel in the kernel's arguments (nothing is copied beforehand,
// so a CUDA graph can record it), a block takes chunks of kSelectChunk values and finds each one's tensor by bisection.
//
// The values of a layer share few exponents, so most lanes of a warp meet in the same few bins: lanes with one digit are counted by
// one atomic (__match_any_sync). Later digits are spread out and mostly filtered by the prefix; a warp without a match goes on.
#include <type_traits>

#include "kernels.h"
#include "launch.h"
#include "numeric.cuh"

namespace sparseprune {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;             // loads in flight a lane
constexpr int kRun = 32 * kUnroll;     // neighbouring entries that a warp takes in one round
constexpr int kRound = kThreads * kUnroll;
constexpr int kBins = kRadixBins;
constexpr uint32_t kNoNumber = 0xffffffffu;  // the key of a NaN

// A value's own bits at the top of 32, and the same for infinity.
__device__ inline uint32_t bits_of(float value) { return __float_as_uint(value); }
__device__ inline uint32_t bits_of(Half value) { return static_cast<uint32_t>(value.bits) << 16; }
__device__ inline uint32_t bits_of(Bfloat value) { return static_cast<uint32_t>(value.bits) << 16; }
template <class T>
constexpr uint32_t kInfinity = 0x7f800000u;
template <>
constexpr uint32_t kInfinity<Half> = 0x7c000000u;

// 32 bits that sort as the values do, -0 counting as 0; a NaN of either sign lies above every number.
template <bool kMagnitude, class T>
__device__ inline uint32_t key_of(T value) {
  const uint32_t bits = bits_of(value), size = bits & 0x7fffffffu;
  if (kMagnitude) return size;
  if (size > kInfinity<T>) return kNoNumber;
  return size == 0 || bits == size ? size | 0x80000000u : ~bits;
}
template <bool kMagnitude, class T>
__device__ inline bool is_nan(uint32_t key) {
  return key > (kMagnitude ? kInfinity<T> : kInfinity<T> | 0x80000000u);
}
template <bool kMagnitude>
__device__ inline uint32_t bits_of_key(uint32_t key) {
  return kMagnitude || key >> 31 ? key & 0x7fffffffu : ~key;
}
__device__ inline void from_bits(uint32_t bits, float& out) { out = __uint_as_float(bits); }
__device__ inline void from_bits(uint32_t bits, Half& out) { out.bits = static_cast<uint16_t>(bits >> 16); }
__device__ inline void from_bits(uint32_t bits, Bfloat& out) { out.bits = static_cast<uint16_t>(bits >> 16); }

// Where a key lies against the key found, both without their bits below `shift`.
struct Cut {
  uint32_t prefix;
  int shift;
  __device__ bool above(uint32_t key) const { return key >> shift > prefix; }
  __device__ bool equal(uint32_t key) const { return key >> shift == prefix; }
};

// The tensor that a chunk, counted over all of them, is part of, and its first value there.
struct Place {
  int tensor;
  int64_t first, n;  // n: of the tensor
};

__device__ inline Place find_place(const SelectTensors& tensors, int64_t chunk) {
  int low = 0, high = tensors.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (tensors.first_chunk[middle] <= chunk)
      low = middle;
    else
      high = middle;
  }
  return {low, (chunk - tensors.first_chunk[low]) * kSelectChunk, tensors.n[low]};
}

template <class T, bool kMagnitude>
__global__ void __launch_bounds__(kThreads)
    histogram_kernel(SelectTensors tensors, int64_t chunks, int shift, int width, const SelectState* state, uint32_t given, bool count_nan,
                     unsigned long long* bins) {
  SHARED(uint32_t[kBins], local);
  SHARED(uint32_t, local_nan);
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) local[bin] = 0;
  if (threadIdx.x == 0) local_nan = 0;
  __syncthreads();

  const int lane = threadIdx.x % 32, above = shift + width;
  const uint32_t prefix = state != nullptr ? state->prefix : given, digits = (1u << width) - 1;
  uint32_t own_nan = 0;
  // Every lane of a warp makes the same number of rounds, so that all can take part in the collectives.
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const Place place = find_place(tensors, chunk);
    const T* const x = static_cast<const T*>(tensors.x[place.tensor]);
    const int64_t end = place.first + kSelectChunk < place.n ? place.first + kSelectChunk : place.n;
    for (int64_t first = place.first + threadIdx.x / 32 * kRun; first < end; first += kRound) {
      T values[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t i = first + u * 32 + lane;
        values[u] = i < end ? x[i] : T{};
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const bool inside = first + u * 32 + lane < end;
        const uint32_t key = key_of<kMagnitude>(values[u]);
        if (inside && is_nan<kMagnitude, T>(key)) ++own_nan;
        const bool wanted = inside && (above == 32 || key >> above == prefix);
        if (!__any_sync(kAllLanes, wanted)) continue;
        const uint32_t digit = wanted ? key >> shift & digits : kBins;
        const unsigned same = __match_any_sync(kAllLanes, digit);
        if (wanted && lane == __ffs(static_cast<int>(same)) - 1) atomicAdd(&local[digit], static_cast<uint32_t>(__popc(same)));
      }
    }
  }
  if (count_nan && own_nan != 0) atomicAdd(&local_nan, own_nan);
  __syncthreads();
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads)
    if (local[bin] != 0) atomicAdd(bins + bin, static_cast<unsigned long long>(local[bin]));
  if (threadIdx.x == 0 && local_nan != 0) atomicAdd(bins + kBins, static_cast<unsigned long long>(local_nan));
}

__global__ void __launch_bounds__(kThreads) begin_kernel(SelectState* state, int64_t* bins, int64_t k) {
  for (int bin = threadIdx.x; bin <= kBins; bin += kThreads) bins[bin] = 0;
  if (threadIdx.x == 0) *state = {0, kFound, k};
}

// Inclusive prefix sum over the block; every thread takes part. `scratch` may be used again after the next barrier.
__device__ inline int64_t scan_block(int64_t value, int64_t* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const int64_t before = __shfl_up_sync(kAllLanes, value, delta);
    if (lane >= delta) value += before;
  }
  if (lane == 31) scratch[warp] = value;
  __syncthreads();
  for (int earlier = 0; earlier < warp; ++earlier) value += scratch[earlier];
  return value;
}

// One block. Thread t holds bins kBins - 1 - 8 t downwards, so its prefix sum counts from the largest digit.
__global__ void __launch_bounds__(kThreads) digit_kernel(SelectState* state, int64_t* bins, int width) {
  constexpr int kOwn = kBins / kThreads;
  SHARED(int64_t[kThreads / 32], scratch);
  const SelectState before = *state;
  int64_t own[kOwn], total = 0;
  const int highest = kBins - 1 - threadIdx.x * kOwn;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) total += own[i] = bins[highest - i];
  const uint32_t special = bins[kBins] != 0 ? kNothing : before.special;
  int64_t seen = scan_block(total, scratch) - total;
  // scan_block's barrier lies between every thread's reading of state and bins and this one's writing of state.
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (seen < before.remaining && seen + own[i] >= before.remaining)
      *state = {before.prefix << width | static_cast<uint32_t>(highest - i), special, before.remaining - seen};
    seen += own[i];
    bins[highest - i] = 0;
  }
}

template <class T, bool kMagnitude>
__global__ void value_kernel(const SelectState* state, int shift, T* out) {
  // The bits below the last digit are 0 in a 16-bit value; in the key of a negative one they are 1.
  uint32_t key = state->prefix << shift;
  if (!kMagnitude && !(key >> 31)) key |= (1u << shift) - 1;
  from_bits(state->special == kNothing ? 0x7fff0000u : bits_of_key<kMagnitude>(key), *out);  // the former is a NaN in all three
}

template <class T, bool kMagnitude>
__global__ void threshold_kernel(SelectState* state, const T* threshold, int shift, int64_t ties) {
  const T value = *threshold;
  // Magnitudes all lie above a negative threshold, and their keys do not know its sign.
  const bool below_all = kMagnitude && widen(value) < 0.0f;
  const uint32_t key = key_of<kMagnitude>(value);
  *state = {key >> shift, is_nan<kMagnitude, T>(key) ? kNothing : below_all ? kEverything : kFound, ties};
}

template <class T, bool kMagnitude>
__global__ void __launch_bounds__(kThreads)
    count_ties_kernel(SelectTensors tensors, int shift, const SelectState* state, int64_t* counts, unsigned long long* nan) {
  SHARED(uint32_t[kThreads / 32], warps);
  const Cut cut{state->prefix, shift};
  const Place place = find_place(tensors, blockIdx.x);
  const T* const x = static_cast<const T*>(tensors.x[place.tensor]);
  const int64_t end = place.first + kSelectChunk < place.n ? place.first + kSelectChunk : place.n;
  uint32_t own = 0;  // ties, at most 4096 a block, and NaN above them
#pragma unroll 4
  for (int64_t i = place.first + threadIdx.x; i < end; i += kThreads) {
    const uint32_t key = key_of<kMagnitude>(x[i]);
    own += static_cast<uint32_t>(cut.equal(key)) + (is_nan<kMagnitude, T>(key) ? 1u << 16 : 0);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) own += __shfl_xor_sync(kAllLanes, own, distance);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = own;
  __syncthreads();
  if (threadIdx.x != 0) return;
  uint32_t total = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) total += warps[warp];
  counts[tensors.chunks_before + blockIdx.x] = total & 0xffff;
  if (total >> 16 != 0) atomicAdd(nan, static_cast<unsigned long long>(total >> 16));
}

// One block.
__global__ void __launch_bounds__(kThreads) scan_kernel(int64_t* counts, int64_t n) {
  SHARED(int64_t[kThreads / 32], scratch);
  SHARED(int64_t, carry);
  if (threadIdx.x == 0) carry = 0;
  __syncthreads();
  for (int64_t first = 0; first < n; first += kThreads) {
    const int64_t i = first + threadIdx.x, own = i < n ? counts[i] : 0, before = carry;
    const int64_t upto = scan_block(own, scratch);
    if (i < n) counts[i] = before + upto - own;
    if (threadIdx.x == kThreads - 1) carry = before + upto;  // all have read the last one before scan_block's barrier
    __syncthreads();
  }
}

template <class T, bool kMagnitude>
__global__ void __launch_bounds__(kThreads)
    mask_kernel(SelectTensors tensors, int shift, const SelectState* state, const int64_t* counts) {
  SHARED(uint32_t[2][kThreads / 32], warps);
  const SelectState found = *state;
  const Cut cut{found.prefix, shift};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Place place = find_place(tensors, blockIdx.x);
  const T* const x = static_cast<const T*>(tensors.x[place.tensor]);
  uint8_t* const mask = tensors.mask[place.tensor];
  const int64_t begin = place.first, n = place.n;
  int64_t ties = counts[tensors.chunks_before + blockIdx.x];  // before this round's first entry
  int turn = 0;
  for (int64_t first = begin; first < begin + kSelectChunk && first < n; first += kRound, turn ^= 1) {
    uint32_t keys[kUnroll];
    unsigned votes[kUnroll];
    uint32_t own = 0;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = first + warp * kRun + u * 32 + lane;
      keys[u] = i < n ? key_of<kMagnitude>(x[i]) : kNoNumber;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      votes[u] = __ballot_sync(kAllLanes, !is_nan<kMagnitude, T>(keys[u]) && found.special == kFound && cut.equal(keys[u]));
      own += static_cast<uint32_t>(__popc(votes[u]));
    }
    if (lane == 0) warps[turn][warp] = own;
    __syncthreads();  // one barrier a round is enough: the other half of `warps` is written next
    int64_t rank = ties;
    for (int other = 0; other < kThreads / 32; ++other) {
      if (other < warp) rank += warps[turn][other];
      ties += warps[turn][other];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = first + warp * kRun + u * 32 + lane;
      const bool stays = votes[u] >> lane & 1 && rank + __popc(votes[u] & ((1u << lane) - 1)) < found.remaining;
      const bool over = found.special == kEverything || (found.special == kFound && cut.above(keys[u]));
      if (i < n) mask[i] = stays || (over && !is_nan<kMagnitude, T>(keys[u]));
      rank += __popc(votes[u]);
    }
  }
}

// Calls function(T{}, std::bool_constant) for the dtype and the kind of key.
template <class Function>
int with_types(int dtype, bool magnitude, Function function) {
  const auto with_key = [&](auto type) { return magnitude ? function(type, std::true_type{}) : function(type, std::false_type{}); };
  if (dtype == kFloat32) return with_key(float{});
  if (dtype == kFloat16) return with_key(Half{});
  return with_key(Bfloat{});
}

// How many blocks take one chunk each; more than a grid has are refused by the launch.
unsigned chunks_of(const SelectTensors& tensors) {
  const int64_t chunks = tensors.first_chunk[tensors.count];
  return chunks > kMostBlocksX ? kMostBlocksX + 1 : static_cast<unsigned>(chunks);
}

}  // namespace

int select_begin(void* state, int64_t* bins, int64_t k, void* stream) {
  LAUNCH(begin_kernel, dim3(1), dim3(kThreads), 0, stream, static_cast<SelectState*>(state), bins, k);
  return 0;
}

int select_histogram(const SelectTensors& tensors, int dtype, bool magnitude, int shift, int width, const void* state, uint32_t prefix,
                     bool count_nan, int64_t* bins, void* stream) {
  const int64_t chunks = tensors.first_chunk[tensors.count];
  if (chunks == 0) return 0;
  // Enough blocks to fill any card; each flushes 2048 bins, so a block should read well over that many values.
  const int64_t wanted = (chunks + 7) / 8;
  const unsigned blocks = static_cast<unsigned>(wanted < 1024 ? wanted : 1024);
  return with_types(dtype, magnitude, [&](auto type, auto kind) {
    using T = decltype(type);
    LAUNCH((histogram_kernel<T, decltype(kind)::value>), dim3(blocks), dim3(kThreads), 0, stream, tensors, chunks, shift, width,
           static_cast<const SelectState*>(state), prefix, count_nan, reinterpret_cast<unsigned long long*>(bins));
    return 0;
  });
}

int select_digit(void* state, int64_t* bins, int width, void* stream) {
  LAUNCH(digit_kernel, dim3(1), dim3(kThreads), 0, stream, static_cast<SelectState*>(state), bins, width);
  return 0;
}

int select_value(const void* state, int dtype, bool magnitude, int shift, void* out, void* stream) {
  return with_types(dtype, magnitude, [&](auto type, auto kind) {
    using T = decltype(type);
    LAUNCH((value_kernel<T, decltype(kind)::value>), dim3(1), dim3(1), 0, stream, static_cast<const SelectState*>(state), shift,
           static_cast<T*>(out));
    return 0;
  });
}

int select_from_threshold(void* state, const void* threshold, int dtype, bool magnitude, int shift, int64_t ties, void* stream) {
  return with_types(dtype, magnitude, [&](auto type, auto kind) {
    using T = decltype(type);
    LAUNCH((threshold_kernel<T, decltype(kind)::value>), dim3(1), dim3(1), 0, stream, static_cast<SelectState*>(state),
           static_cast<const T*>(threshold), shift, ties);
    return 0;
  });
}

int select_count_ties(const SelectTensors& tensors, int dtype, bool magnitude, int shift, const void* state, int64_t* counts, int64_t* nan,
                      void* stream) {
  if (chunks_of(tensors) == 0) return 0;
  return with_types(dtype, magnitude, [&](auto type, auto kind) {
    using T = decltype(type);
    LAUNCH((count_ties_kernel<T, decltype(kind)::value>), dim3(chunks_of(tensors)), dim3(kThreads), 0, stream, tensors, shift,
           static_cast<const SelectState*>(state), counts, reinterpret_cast<unsigned long long*>(nan));
    return 0;
  });
}

int select_scan(int64_t* counts, int64_t n, void* stream) {
  LAUNCH(scan_kernel, dim3(1), dim3(kThreads), 0, stream, counts, n);
  return 0;
}

int select_mask(const SelectTensors& tensors, int dtype, bool magnitude, int shift, const void* state, const int64_t* counts,
                void* stream) {
  if (chunks_of(tensors) == 0) return 0;
  return with_types(dtype, magnitude, [&](auto type, auto kind) {
    using T = decltype(type);
    LAUNCH((mask_kernel<T, decltype(kind)::value>), dim3(chunks_of(tensors)), dim3(kThreads), 0, stream, tensors, shift,
           static_cast<const SelectState*>(state), counts);
    return 0;
  });
}

int why_not_loaded() {
#if defined(__CUDACC__)
  cudaFuncAttributes found;
  if (const cudaError_t error = cudaFuncGetAttributes(&found, begin_kernel)) return cleared(error);
#endif
  return 0;
}

}  // namespace sparseprune
