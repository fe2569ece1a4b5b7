// y = activation(x W^T + b), W in csr: for weights so sparse (from about 90 % zeros) that even one index an entry costs less than
// reading the zeros. Sums in float, in an order that depends on nothing but the shape and the structure.
//
// Few tokens: a warp a row. The warp reads its row's indices and values four at a time, each lane gathers from x, which stays in L1
// and L2 (x is at most 8 rows), and the lanes' sums meet by shuffles. Bound by reading W once.
// Many tokens: the lanes of a warp are tokens, so that x has to be read transposed, [columns, tokens]: an entry of W is broadcast to
// the warp (all lanes load the same four indices and values at once) and multiplies a line of neighbouring tokens. A block makes a
// tile of 32 rows and turns it in shared memory, so that y, too, is written in runs.
#include "kernels.h"
#include "numeric.cuh"

namespace sparseprune {
namespace {

constexpr int kWarps = 8;

template <class T>
struct Quad {  // four values, loaded at once
  T at[4];
};

__device__ inline Quad<int> load_quad(const int32_t* from) {
  const int4 four = __ldg(reinterpret_cast<const int4*>(from));
  return {{four.x, four.y, four.z, four.w}};
}
__device__ inline Quad<float> load_quad(const float* from) {
  const float4 four = __ldg(reinterpret_cast<const float4*>(from));
  return {{four.x, four.y, four.z, four.w}};
}
template <class T>
__device__ inline Quad<float> load_halves(const T* from) {
  const uint2 four = __ldg(reinterpret_cast<const uint2*>(from));
  const auto value = [](uint32_t bits) { return widen(T{static_cast<uint16_t>(bits)}); };
  return {{value(four.x & 0xffff), value(four.x >> 16), value(four.y & 0xffff), value(four.y >> 16)}};
}
__device__ inline Quad<float> load_quad(const Half* from) { return load_halves(from); }
__device__ inline Quad<float> load_quad(const Bfloat* from) { return load_halves(from); }

struct Entries {  // four neighbouring entries of W
  Quad<int> col;
  Quad<float> value;
};

// at is a multiple of 4: what lies before or behind the row comes along. The whole weight has `entries`.
template <class T>
__device__ inline Entries load_entries(const int32_t* col, const T* values, int64_t at, int64_t entries) {
  Entries four;
  if (at + 4 <= entries) {
    four = {load_quad(col + at), load_quad(values + at)};
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      four.col.at[i] = at + i < entries ? col[at + i] : 0;
      four.value.at[i] = at + i < entries ? widen(values[at + i]) : 0.0f;
    }
  }
  return four;
}

template <class T, int kTokens>
__global__ void __launch_bounds__(kWarps * 32)
    csr_linear_few_kernel(const T* x, const int32_t* crow, const int32_t* col, const T* values, const T* bias, T* y, int tokens, int rows,
                          int columns, int64_t entries, int activation) {
  const int lane = threadIdx.x % 32, row = blockIdx.x * kWarps + threadIdx.x / 32;
  if (row >= rows) return;  // a whole warp at a time
  const int64_t begin = crow[row], end = crow[row + 1];
  float sums[kTokens] = {};
  for (int64_t at = begin / 4 * 4 + lane * 4; at < end; at += 32 * 4) {
    const Entries four = load_entries(col, values, at, entries);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (at + i < begin || at + i >= end) continue;  // not of this row
#pragma unroll
      for (int token = 0; token < kTokens; ++token)
        if (token < tokens) sums[token] += four.value.at[i] * widen(x[static_cast<int64_t>(token) * columns + four.col.at[i]]);
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
    const float total = sums[token] + (bias != nullptr ? widen(bias[row]) : 0.0f);
    narrow(activate(total, activation), y[static_cast<int64_t>(token) * rows + row]);
  }
}

constexpr int kTileRows = 32;
constexpr int kRowsAWarp = kTileRows / kWarps;
constexpr int kTileTokens = 128;  // four a lane

template <class T>
__global__ void __launch_bounds__(kWarps * 32)
    csr_linear_many_kernel(const T* xt, int64_t stride, const int32_t* crow, const int32_t* col, const T* values, const T* bias, T* y,
                           int tokens, int rows, int64_t entries, int activation) {
  SHARED(float[kTileTokens][kTileRows + 1], tile);  // the odd width keeps both ways of reading free of bank conflicts
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_row = blockIdx.x * kTileRows, first_token = blockIdx.y * kTileTokens, token = first_token + lane * 4;
  const T* const mine = xt + (token < stride ? token : 0);  // past the end any token will do: it is not written
  for (int i = 0; i < kRowsAWarp; ++i) {
    const int local = warp * kRowsAWarp + i, row = first_row + local;
    float sums[4] = {};
    if (row < rows) {
      const int64_t begin = crow[row], end = crow[row + 1];
      for (int64_t at = begin / 4 * 4; at < end; at += 4) {
        const Entries four = load_entries(col, values, at, entries);
#pragma unroll
        for (int entry = 0; entry < 4; ++entry) {
          if (at + entry < begin || at + entry >= end) continue;  // not of this row, for any lane
          const Quad<float> line = load_quad(mine + four.col.at[entry] * stride);
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[j] += four.value.at[entry] * line.at[j];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) tile[lane * 4 + j][local] = sums[j];
  }
  __syncthreads();
  const int row = first_row + lane;
  if (row >= rows) return;
  const float shift = bias != nullptr ? widen(bias[row]) : 0.0f;
  for (int i = warp; i < kTileTokens && first_token + i < tokens; i += kWarps)
    narrow(activate(tile[i][lane] + shift, activation), y[static_cast<int64_t>(first_token + i) * rows + row]);
}

template <class T, int kTokens>
int few(const void* x, const int32_t* crow, const int32_t* col, const void* values, const void* bias, void* y, int tokens, int rows,
        int columns, int64_t entries, int activation, void* stream) {
  LAUNCH((csr_linear_few_kernel<T, kTokens>), dim3((rows + kWarps - 1) / kWarps), dim3(kWarps * 32), 0, stream, static_cast<const T*>(x),
         crow, col, static_cast<const T*>(values), static_cast<const T*>(bias), static_cast<T*>(y), tokens, rows, columns, entries,
         activation);
  return 0;
}

template <class T>
auto choose_few(int tokens) {
  return tokens == 1 ? few<T, 1> : tokens == 2 ? few<T, 2> : tokens <= 4 ? few<T, 4> : few<T, 8>;
}

template <class T>
int many(const void* xt, int64_t stride, const int32_t* crow, const int32_t* col, const void* values, const void* bias, void* y, int tokens,
         int rows, int64_t entries, int activation, void* stream) {
  const dim3 grid((rows + kTileRows - 1) / kTileRows, (tokens + kTileTokens - 1) / kTileTokens);
  LAUNCH((csr_linear_many_kernel<T>), grid, dim3(kWarps * 32), 0, stream, static_cast<const T*>(xt), stride, crow, col,
         static_cast<const T*>(values), static_cast<const T*>(bias), static_cast<T*>(y), tokens, rows, entries, activation);
  return 0;
}

}  // namespace

int csr_linear_few(const void* x, const int32_t* crow, const int32_t* col, const void* values, const void* bias, void* y, int tokens,
                   int rows, int columns, int64_t entries, int dtype, int activation, void* stream) {
  const auto kernel = dtype == kFloat32   ? choose_few<float>(tokens)
                      : dtype == kFloat16 ? choose_few<Half>(tokens)
                                          : choose_few<Bfloat>(tokens);
  return kernel(x, crow, col, values, bias, y, tokens, rows, columns, entries, activation, stream);
}

int csr_linear_many(const void* xt, int64_t stride, const int32_t* crow, const int32_t* col, const void* values, const void* bias, void* y,
                    int tokens, int rows, int64_t entries, int dtype, int activation, void* stream) {
  const auto kernel = dtype == kFloat32 ? many<float> : dtype == kFloat16 ? many<Half> : many<Bfloat>;
  return kernel(xt, stride, crow, col, values, bias, y, tokens, rows, entries, activation, stream);
}

}  // namespace sparseprune
