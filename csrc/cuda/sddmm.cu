// The gradient of the kept weights only: out[e] = sum over tokens of dy[token, row(e)] x[token, column(e)], W in csr. Sums in float.
//
// 16 bits, on tensor cores: a block makes a dense tile of 64 rows x 64 columns of dy^T x, leaves it in shared memory and writes what
// the structure keeps. From about 3 % density on that is less work than fetching operands entry by entry; no dense gradient is
// ever written. `edges` says where each row's entries cross from one tile to the next, so that no block has to search.
// mma sums over its k in any order and takes rows in any order. A lane reads rows 2 g and 2 g + 1 of one token as one 32-bit word and
// the same of another token, and two byte permutations make of them the pairs (token, token) that the fragments want: rows 2 g and
// 2 g + 1 play the fragment's g and g + 8, tokens q and q + 4 its 2 q and 2 q + 1. The pitch of 40 words spreads a warp's words, 8
// neighbours in each of 4 tokens, over all 32 banks.
//
// float32, on the other cores: a warp takes 32 entries of one row, its lanes are tokens (so dy and x come transposed); the 32 sums
// over the lanes are formed together by 31 shuffles.
#include "kernels.h"
#include "numeric.cuh"

namespace sparseprune {
namespace {

constexpr int kWarps = 4;
constexpr int kTile = kSddmmTile;  // rows and columns of a block
constexpr int kStep = 32;          // tokens a stage
constexpr int kStages = 3;
constexpr int kPitch = 40;         // words a token in shared memory
constexpr int kTileWords = kStep * kPitch;
constexpr int kSumPitch = kTile + 1;

// kStep tokens of dy or x, 64 neighbouring features from `feature`, into a stage. Features past the end and tokens past the last give
// zeros. kVector: rows are 16-byte aligned.
template <bool kVector, class T>
__device__ inline void fetch(uint32_t* stage, const T* from, int features, int feature, int token, int tokens) {
  if constexpr (kVector) {
    constexpr int kChunks = kTile / 8;
    for (int i = threadIdx.x; i < kStep * kChunks; i += kWarps * 32) {
      const int row = i / kChunks, column = feature + i % kChunks * 8;
      uint4* const to = reinterpret_cast<uint4*>(stage + row * kPitch) + i % kChunks;
      if (token + row < tokens && column < features)
        copy_async(to, from + static_cast<int64_t>(token + row) * features + column);
      else
        *to = uint4{0, 0, 0, 0};
    }
  } else {
    constexpr int kPairs = kTile / 2;
    for (int i = threadIdx.x; i < kStep * kPairs; i += kWarps * 32) {
      const int row = i / kPairs, column = feature + i % kPairs * 2;
      const T* const at = from + static_cast<int64_t>(token + row) * features + column;
      const bool here = token + row < tokens;
      const uint32_t low = here && column < features ? at[0].bits : 0, high = here && column + 1 < features ? at[1].bits : 0;
      stage[row * kPitch + i % kPairs] = pack_pair(low, high);
    }
  }
}

template <class T, bool kVector>
__global__ void __launch_bounds__(kWarps * 32)
    sddmm_tiles_kernel(const T* dy, const T* x, const int32_t* edges, const int32_t* col, float* out, int tokens, int rows, int columns,
                       int across) {
  DYNAMIC_SHARED(uint4, memory);
  uint32_t* const ring = reinterpret_cast<uint32_t*>(memory);  // [stage][dy, x][token][word]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
  const int tile = static_cast<int>(blockIdx.x % across), first_row = static_cast<int>(blockIdx.x / across) * kTile;
  const int first_column = tile * kTile, steps = (tokens + kStep - 1) / kStep;
  const int own_row = warp / 2 * 32, own_column = warp % 2 * 32;  // of the tile: 32 x 32 a warp

  float sums[2][4][4] = {};  // [16 rows][8 columns][fragment]
#pragma unroll
  for (int ahead = 0; ahead < kStages - 1; ++ahead) {
    uint32_t* const stage = ring + ahead * 2 * kTileWords;
    if (ahead < steps) {
      fetch<kVector>(stage, dy, rows, first_row, ahead * kStep, tokens);
      fetch<kVector>(stage + kTileWords, x, columns, first_column, ahead * kStep, tokens);
    }
    copy_commit();
  }
  int stage = 0;
  for (int step = 0; step < steps; ++step) {
    copy_wait<kStages - 2>();
    __syncthreads();  // this stage has landed for all, and all are done with the one that is filled next
    const int ahead = step + kStages - 1;
    if (ahead < steps) {
      uint32_t* const refill = ring + (stage == 0 ? kStages - 1 : stage - 1) * 2 * kTileWords;
      fetch<kVector>(refill, dy, rows, first_row, ahead * kStep, tokens);
      fetch<kVector>(refill + kTileWords, x, columns, first_column, ahead * kStep, tokens);
    }
    copy_commit();
    const uint32_t* const from_dy = ring + stage * 2 * kTileWords + own_row / 2 + group;
    const uint32_t* const from_x = ring + stage * 2 * kTileWords + kTileWords + own_column / 2 + group;
    stage = stage == kStages - 1 ? 0 : stage + 1;
#pragma unroll
    for (int half = 0; half < kStep; half += 16) {
      uint32_t a[2][4], b[4][2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {  // the fragment's lower and upper eight of k
        const int low = (half + 8 * k + quad) * kPitch, high = low + 4 * kPitch;
#pragma unroll
        for (int block = 0; block < 2; ++block) {
          const uint32_t one = from_dy[low + 8 * block], other = from_dy[high + 8 * block];
          a[block][2 * k] = low_halves(one, other), a[block][2 * k + 1] = high_halves(one, other);
        }
#pragma unroll
        for (int block = 0; block < 2; ++block) {
          const uint32_t one = from_x[low + 8 * block], other = from_x[high + 8 * block];
          b[2 * block][k] = low_halves(one, other), b[2 * block + 1][k] = high_halves(one, other);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) mma_16x8x16(sums[i][j], a[i], b[j], T{});
      }
    }
  }

  __syncthreads();  // the ring is free: the memory now takes the sums, [row][column]
  float* const dense = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        // Fragment row g of block i is row 16 i + 2 g, g + 8 its neighbour; column c of fragment j is column 16 (j / 2) + 2 c + j % 2.
        const int row = own_row + 16 * i + 2 * group + k / 2;
        const int column = own_column + 16 * (j / 2) + 2 * (quad * 2 + k % 2) + j % 2;
        dense[row * kSumPitch + column] = sums[i][j][k];
      }
    }
  }
  __syncthreads();
  for (int local = warp; local < kTile && first_row + local < rows; local += kWarps) {
    const int32_t* const edge = edges + static_cast<int64_t>(first_row + local) * across + tile;
    const int64_t end = edge[1];
    for (int64_t entry = edge[0] + lane; entry < end; entry += 32)
      out[entry] = dense[local * kSumPitch + col[entry] - first_column];
  }
}

__device__ inline float4 load_four(const float* from) { return __ldg(reinterpret_cast<const float4*>(from)); }

// Lanes kHalf apart exchange sums, so that each holds half as many, of twice as many lanes. From 16 down to 1, lane e ends with sum e.
template <int kHalf>
__device__ inline void halve(float (&sums)[32], int lane) {
  const bool upper = (lane & kHalf) != 0;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float given = upper ? sums[i] : sums[i + kHalf], kept = upper ? sums[i + kHalf] : sums[i];
    sums[i] = kept + __shfl_xor_sync(kAllLanes, given, kHalf);
  }
}

constexpr int kRowWarps = 8;

__global__ void __launch_bounds__(kRowWarps * 32)
    sddmm_rows_kernel(const float* dyt, const float* xt, int64_t stride, const int32_t* crow, const int32_t* col, float* out, int rows) {
  const int lane = threadIdx.x % 32, row = static_cast<int>(blockIdx.x) * kRowWarps + threadIdx.x / 32;
  if (row >= rows) return;  // a whole warp at a time
  const int64_t begin = crow[row], end = crow[row + 1];
  const float* const own = dyt + row * stride;
  for (int64_t first = begin + static_cast<int64_t>(blockIdx.y) * 32; first < end; first += static_cast<int64_t>(gridDim.y) * 32) {
    const int count = static_cast<int>(end - first < 32 ? end - first : 32);
    const int column = lane < count ? col[first + lane] : 0;
    float sums[32] = {};
    for (int64_t token = lane * 4; token - lane * 4 < stride; token += 128) {
      const bool here = token < stride;
      float4 left{0.0f, 0.0f, 0.0f, 0.0f};
      if (here) left = load_four(own + token);
#pragma unroll
      for (int entry = 0; entry < 32; ++entry) {
        if (entry < count) {  // for all lanes or none
          const int64_t at = __shfl_sync(kAllLanes, column, entry) * stride + token;
          if (here) {
            const float4 right = load_four(xt + at);
            sums[entry] += left.x * right.x + left.y * right.y + left.z * right.z + left.w * right.w;
          }
        }
      }
    }
    halve<16>(sums, lane), halve<8>(sums, lane), halve<4>(sums, lane), halve<2>(sums, lane), halve<1>(sums, lane);
    if (lane < count) out[first + lane] = sums[0];
  }
}

template <class T, bool kVector>
int tiles(const void* dy, const void* x, const int32_t* edges, const int32_t* col, float* out, int tokens, int rows, int columns,
          void* stream) {
  const int across = (columns + kTile - 1) / kTile, down = (rows + kTile - 1) / kTile;
  const int ring_bytes = kStages * 2 * kTileWords * static_cast<int>(sizeof(uint32_t));
  const int sum_bytes = kTile * kSumPitch * static_cast<int>(sizeof(float));
  const int bytes = ring_bytes > sum_bytes ? ring_bytes : sum_bytes;
  LAUNCH((sddmm_tiles_kernel<T, kVector>), dim3(static_cast<unsigned>(static_cast<int64_t>(across) * down)), dim3(kWarps * 32), bytes,
         stream, static_cast<const T*>(dy), static_cast<const T*>(x), edges, col, out, tokens, rows, columns, across);
  return 0;
}

}  // namespace

int sddmm_tiles(const void* dy, const void* x, const int32_t* edges, const int32_t* col, float* out, int tokens, int rows, int columns,
                int dtype, bool vector, void* stream) {
  const auto kernel = dtype == kFloat16 ? (vector ? tiles<Half, true> : tiles<Half, false>)
                                        : (vector ? tiles<Bfloat, true> : tiles<Bfloat, false>);
  return kernel(dy, x, edges, col, out, tokens, rows, columns, stream);
}

int sddmm_rows(const float* dyt, const float* xt, int64_t stride, const int32_t* crow, const int32_t* col, float* out, int rows,
               int splits, void* stream) {
  LAUNCH(sddmm_rows_kernel, dim3((rows + kRowWarps - 1) / kRowWarps, splits), dim3(kRowWarps * 32), 0, stream, dyt, xt, stride, crow, col,
         out, rows);
  return 0;
}

}  // namespace sparseprune
