// y = activation(x W^T + b) for more than 16 tokens and an unstructured W in the strips of linear_bitmap.cu, in 16 bits: read sparse,
// compute dense on tensor cores.
//
// A block makes 128 rows x 32 or 64 tokens: 8 warps, each with its own 16 rows, share a stage of x, 64 columns of every token, in
// shared memory; each expands its strip in registers as linear_bitmap.cu does and multiplies it with all the tokens, so the cost of
// expanding is shared by 4 or 8 instructions a fragment. x and the strips arrive by cp.async, kStages - 1 steps ahead. The pitch of
// 72 values lets the lanes of a quarter warp read their 16 bytes from distinct banks.
//
// Where rows and tokens make too few blocks for the card, K is cut into splits: every split writes its sums in float, and a second
// kernel adds them in order, so a result does not depend on timing.
#include "strips.cuh"

namespace sparseprune {
namespace {

constexpr int kWarps = 8;
constexpr int kStages = 3;
constexpr int kRows = kWarps * kStripRows;
constexpr int kPitch = kStripColumns + 8;      // 16-bit values
constexpr int kSumPitch = kRows + 4;           // floats
constexpr int kTokenChunks = kPitch / kChunk;  // 16-byte chunks a token in shared memory

// Columns `first` .. `first` + 63 of kTokens tokens into a stage; what lies outside of x becomes 0. kVector: rows of x are 16-byte
// aligned.
template <int kTokens, bool kVector, class T>
__device__ inline void fetch_x(uint4* stage, const T* x, int first, int first_token, int tokens, int columns) {
  if constexpr (kVector) {
    constexpr int kChunks = kStripColumns / kChunk;
    for (int i = threadIdx.x; i < kTokens * kChunks; i += kWarps * 32) {
      const int token = first_token + i / kChunks, column = first + i % kChunks * kChunk;
      uint4* const to = stage + i / kChunks * kTokenChunks + i % kChunks;
      if (token < tokens && column < columns)
        copy_async(to, x + static_cast<int64_t>(token) * columns + column);
      else
        *to = uint4{0, 0, 0, 0};
    }
  } else {
    constexpr int kPairs = kStripColumns / 2;
    for (int i = threadIdx.x; i < kTokens * kPairs; i += kWarps * 32) {
      const int token = first_token + i / kPairs, column = first + i % kPairs * 2;
      const T* const at = x + static_cast<int64_t>(token) * columns + column;
      const uint32_t low = token < tokens && column < columns ? at[0].bits : 0;
      const uint32_t high = token < tokens && column + 1 < columns ? at[1].bits : 0;
      reinterpret_cast<uint32_t*>(stage)[i / kPairs * (kPitch / 2) + i % kPairs] = pack_pair(low, high);
    }
  }
}

// kTiles: groups of 8 tokens a block. `sums` null: writes y; else the sums of split blockIdx.z, [split][token][row].
template <class T, int kTiles, bool kVector>
__global__ void __launch_bounds__(kWarps * 32, 2)  // two blocks a multiprocessor: one waits while the other multiplies
    bitmap_tiles_kernel(const T* x, const uint32_t* words, const int32_t* starts, const T* values, const T* bias, T* y, float* sums,
                        int tokens, int rows, int columns, int chunks, int steps_a_split, int activation) {
  constexpr int kTokens = kTiles * 8;
  constexpr int kXChunks = kTokens * kTokenChunks;
  DYNAMIC_SHARED(uint4, memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
  const int across = (columns + kStripColumns - 1) / kStripColumns;
  const int first_token = blockIdx.y * kTokens;
  const int64_t strip_row = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  const bool mine = strip_row * kStripRows < rows;
  const int begin = blockIdx.z * steps_a_split, end = begin + steps_a_split < across ? begin + steps_a_split : across;
  const int stage_size = kXChunks + kWarps * chunks;  // x, then a strip a warp

  float acc[kTiles][4] = {};
#pragma unroll
  for (int ahead = 0; ahead < kStages - 1; ++ahead) {
    const int step = begin + ahead;
    uint4* const stage = memory + ahead * stage_size;
    if (step < end) {
      fetch_x<kTokens, kVector>(stage, x, step * kStripColumns, first_token, tokens, columns);
      if (mine) {
        const int64_t index = strip_row * across + step;
        fetch(stage + kXChunks + warp * chunks, words, values, index, find_strip(starts, index, true), lane);
      }
    }
    copy_commit();
  }
  int turn = 0;
  for (int step = begin; step < end; ++step) {
    const unsigned misaligned = mine ? static_cast<unsigned>(__ldg(starts + strip_row * across + step)) % kChunk : 0;
    const int next = step + kStages - 1;
    const Strip next_strip = find_strip(starts, strip_row * across + next, mine && next < end);
    copy_wait<kStages - 2>();
    __syncthreads();  // this stage has landed for all, and all are done with the one that is filled next
    if (next < end) {
      uint4* const refill = memory + (turn == 0 ? kStages - 1 : turn - 1) * stage_size;
      fetch_x<kTokens, kVector>(refill, x, next * kStripColumns, first_token, tokens, columns);
      if (mine) fetch(refill + kXChunks + warp * chunks, words, values, strip_row * across + next, next_strip, lane);
    }
    copy_commit();
    const uint4* const here = memory + turn * stage_size;
    turn = turn == kStages - 1 ? 0 : turn + 1;
    if (!mine) continue;  // a whole warp: it meets the others at the next barrier

    const uint4* const strip = here + kXChunks + warp * chunks;
    const uint32_t word = reinterpret_cast<const uint32_t*>(strip)[lane];
    const uint16_t* const kept = reinterpret_cast<const uint16_t*>(strip + kWordChunks) + misaligned;
    const Ranks ranks = rank(word, lane);
    uint32_t a[4][4];
    unsigned place = 0;
#pragma unroll
    for (int s = 0; s < 4; ++s) expand_fragment(a[s], word, ranks, s, kept, place);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint4* const run = here + (tile * 8 + group) * kTokenChunks + quad * 2;
      const uint4 low = run[0], high = run[1];
      const uint32_t b[4][2] = {{low.x, low.y}, {low.z, low.w}, {high.x, high.y}, {high.z, high.w}};
#pragma unroll
      for (int s = 0; s < 4; ++s) mma_16x8x16(acc[tile], a[s], b[s], T{});
    }
  }

  __syncthreads();  // the ring is free: the memory now takes the sums, [token][row]
  float* const partial = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      partial[(tile * 8 + quad * 2 + i % 2) * kSumPitch + warp * kStripRows + group + 8 * (i / 2)] = acc[tile][i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTokens * kRows; i += kWarps * 32) {
    const int token = first_token + i / kRows, row = blockIdx.x * kRows + i % kRows;
    if (token >= tokens || row >= rows) continue;
    const float total = partial[i / kRows * kSumPitch + i % kRows];
    const int64_t at = static_cast<int64_t>(token) * rows + row;
    if (sums != nullptr)
      sums[static_cast<int64_t>(blockIdx.z) * tokens * rows + at] = total;
    else
      narrow(activate(total + (bias != nullptr ? widen(bias[row]) : 0.0f), activation), y[at]);
  }
}

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads)
    bitmap_splits_kernel(const float* sums, const T* bias, T* y, int64_t outputs, int rows, int splits, int activation) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= outputs) return;
  float total = 0.0f;
  for (int split = 0; split < splits; ++split) total += sums[split * outputs + at];
  narrow(activate(total + (bias != nullptr ? widen(bias[at % rows]) : 0.0f), activation), y[at]);
}

struct Call {
  const void *x, *values, *bias;
  const uint32_t* words;
  const int32_t* starts;
  void* y;
  float* sums;
  int tokens, rows, columns, most_in_strip, splits, activation;
  void* stream;
};

template <class T, int kTiles, bool kVector>
int run(const Call& c) {
  const int chunks = stage_chunks(c.most_in_strip);
  const int ring_bytes = kStages * (kTiles * 8 * kTokenChunks + kWarps * chunks) * static_cast<int>(sizeof(uint4));
  const int sum_bytes = kTiles * 8 * kSumPitch * static_cast<int>(sizeof(float));
  const int bytes = ring_bytes > sum_bytes ? ring_bytes : sum_bytes;
  const int across = (c.columns + kStripColumns - 1) / kStripColumns;
  const dim3 grid((c.rows + kRows - 1) / kRows, (c.tokens + kTiles * 8 - 1) / (kTiles * 8), c.splits);
  ALLOW_SHARED((bitmap_tiles_kernel<T, kTiles, kVector>), bytes);
  LAUNCH((bitmap_tiles_kernel<T, kTiles, kVector>), grid, dim3(kWarps * 32), bytes, c.stream, static_cast<const T*>(c.x), c.words, c.starts,
         static_cast<const T*>(c.values), static_cast<const T*>(c.bias), static_cast<T*>(c.y), c.sums, c.tokens, c.rows, c.columns, chunks,
         (across + c.splits - 1) / c.splits, c.activation);
  if (c.sums == nullptr) return 0;
  const int64_t outputs = static_cast<int64_t>(c.tokens) * c.rows;
  LAUNCH((bitmap_splits_kernel<T>), dim3(static_cast<unsigned>((outputs + kThreads - 1) / kThreads)), dim3(kThreads), 0, c.stream, c.sums,
         static_cast<const T*>(c.bias), static_cast<T*>(c.y), outputs, c.rows, c.splits, c.activation);
  return 0;
}

template <class T>
auto choose(bool vector, int tokens) {
  if (vector) return tokens <= 32 ? run<T, 4, true> : run<T, 8, true>;
  return tokens <= 32 ? run<T, 4, false> : run<T, 8, false>;
}

}  // namespace

int bitmap_tiles(const void* x, const uint32_t* words, const int32_t* starts, const void* values, const void* bias, void* y, float* sums,
                 int tokens, int rows, int columns, int most_in_strip, int splits, int dtype, int activation, bool vector, void* stream) {
  const Call call{x, values, bias, words, starts, y, sums, tokens, rows, columns, most_in_strip, splits, activation, stream};
  return dtype == kFloat16 ? choose<Half>(vector, tokens)(call) : choose<Bfloat>(vector, tokens)(call);
}

}  // namespace sparseprune
