// y = activation(x W^T + b) for at most 8 tokens and a very sparse W (about 90 to 98 % zeros): csr with one byte an entry instead of a
// 32-bit index, which in 16 bits halves what is read.
//
// A row is a run of entries, a byte and a value each, padded to a multiple of 8. The byte is the distance from the column before (at
// first from -1): 1 to 254. 255 stands for a step of 254 columns without a value, 0 for nothing at all: neither reads x.
//
// A warp takes 4 rows one after another, a lane 8 neighbouring entries at a time: one load of 8 bytes and one or two of 16. The columns
// come back as a sum over the lane's own bytes, a scan over the warp and a carry from the 256 entries before.
//
// The columns that a warp reads at once lie far apart, 32 lines of L1 for one instruction; from shared memory they cost only what falls
// on one bank. So a block copies x there, where it has room.
#include "kernels.h"
#include "numeric.cuh"

namespace sparseprune {
namespace {

constexpr int kWarps = 8;
constexpr int kRun = 8;  // entries a lane
constexpr int kRowsAWarp = 4;
constexpr int kMostShared = 48 << 10;  // bytes of x: what every kernel may have without asking

__device__ inline void load_run(const float* from, float (&values)[kRun]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4 four = __ldg(reinterpret_cast<const float4*>(from) + half);
    values[4 * half] = four.x, values[4 * half + 1] = four.y, values[4 * half + 2] = four.z, values[4 * half + 3] = four.w;
  }
}
template <class T>
__device__ inline void load_run(const T* from, float (&values)[kRun]) {
  const uint4 four = __ldg(reinterpret_cast<const uint4*>(from));
  const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = widen(T{static_cast<uint16_t>(words[i] & 0xffff)});
    values[2 * i + 1] = widen(T{static_cast<uint16_t>(words[i] >> 16)});
  }
}

// kStaged: x fits into shared memory.
template <class T, int kTokens, bool kStaged>
__global__ void __launch_bounds__(kWarps * 32, 4)
    delta_linear_kernel(const T* x, const int32_t* starts, const uint8_t* deltas, const T* values, const T* bias, T* y, int tokens,
                        int rows, int columns, int activation) {
  DYNAMIC_SHARED(T, staged);
  if constexpr (kStaged) {
    for (int i = threadIdx.x; i < tokens * columns; i += kWarps * 32) staged[i] = x[i];
    __syncthreads();
  }
  const int lane = threadIdx.x % 32, first_row = (static_cast<int>(blockIdx.x) * kWarps + threadIdx.x / 32) * kRowsAWarp;
  for (int row = first_row; row < first_row + kRowsAWarp && row < rows; ++row) {
    const int64_t begin = static_cast<int64_t>(starts[row]) * kRun, end = static_cast<int64_t>(starts[row + 1]) * kRun;
    float sums[kTokens] = {};
    int carry = -1;
    for (int64_t first = begin; first < end; first += 32 * kRun) {  // every lane makes the same number of rounds
      const int64_t at = first + lane * kRun;
      uint2 bytes{0, 0};
      float own[kRun] = {};
      if (at < end) {
        bytes = __ldg(reinterpret_cast<const uint2*>(deltas + at));
        load_run(values + at, own);
      }
      int column[kRun], total = 0;
      bool there[kRun];
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const int delta = static_cast<int>((i < 4 ? bytes.x : bytes.y) >> 8 * (i % 4) & 0xff);
        there[i] = delta != 0 && delta != 255;
        total += delta == 255 ? 254 : delta;
        column[i] = total;
      }
      int upto = total;
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const int before = __shfl_up_sync(kAllLanes, upto, distance);
        if (lane >= distance) upto += before;
      }
      const int base = carry + upto - total;
      carry += __shfl_sync(kAllLanes, upto, 31);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (!there[i]) continue;
#pragma unroll
        for (int token = 0; token < kTokens; ++token) {
          if (token >= tokens) continue;
          if constexpr (kStaged)
            sums[token] += own[i] * widen(staged[token * columns + base + column[i]]);
          else
            sums[token] += own[i] * widen(x[static_cast<int64_t>(token) * columns + base + column[i]]);
        }
      }
    }
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) sums[token] += __shfl_xor_sync(kAllLanes, sums[token], distance);
    }
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      if (lane != token || token >= tokens) continue;
      const float whole = sums[token] + (bias != nullptr ? widen(bias[row]) : 0.0f);
      narrow(activate(whole, activation), y[static_cast<int64_t>(token) * rows + row]);
    }
  }
}

template <class T, int kTokens, bool kStaged>
int launch(const void* x, const int32_t* starts, const uint8_t* deltas, const void* values, const void* bias, void* y, int tokens,
           int rows, int columns, int activation, int bytes, void* stream) {
  constexpr int kRows = kWarps * kRowsAWarp;
  LAUNCH((delta_linear_kernel<T, kTokens, kStaged>), dim3((rows + kRows - 1) / kRows), dim3(kWarps * 32), bytes, stream,
         static_cast<const T*>(x), starts, deltas, static_cast<const T*>(values), static_cast<const T*>(bias), static_cast<T*>(y), tokens,
         rows, columns, activation);
  return 0;
}

template <class T, int kTokens>
int run(const void* x, const int32_t* starts, const uint8_t* deltas, const void* values, const void* bias, void* y, int tokens, int rows,
        int columns, int activation, void* stream) {
  const int64_t bytes = static_cast<int64_t>(tokens) * columns * static_cast<int64_t>(sizeof(T));
  if (bytes > kMostShared) return launch<T, kTokens, false>(x, starts, deltas, values, bias, y, tokens, rows, columns, activation, 0, stream);
  return launch<T, kTokens, true>(x, starts, deltas, values, bias, y, tokens, rows, columns, activation, static_cast<int>(bytes), stream);
}

template <class T>
auto choose(int tokens) {
  return tokens == 1 ? run<T, 1> : tokens == 2 ? run<T, 2> : tokens <= 4 ? run<T, 4> : run<T, 8>;
}

}  // namespace

int delta_linear(const void* x, const int32_t* starts, const uint8_t* deltas, const void* values, const void* bias, void* y, int tokens,
                 int rows, int columns, int dtype, int activation, void* stream) {
  const auto kernel = dtype == kFloat32 ? choose<float>(tokens) : dtype == kFloat16 ? choose<Half>(tokens) : choose<Bfloat>(tokens);
  return kernel(x, starts, deltas, values, bias, y, tokens, rows, columns, activation, stream);
}

}  // namespace sparseprune
