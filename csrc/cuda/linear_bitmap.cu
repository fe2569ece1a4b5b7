// y = activation(x W^T + b) for at most 16 tokens and an unstructured W of 25 to 95 % zeros in 16 bits: read sparse, compute dense.
//
// W is cut into strips of 16 rows x 64 columns. A strip is 32 words, one a lane, and its kept values. Lane 4 g + q owns rows g and
// g + 8 and columns 16 q .. 16 q + 15 of the strip. In its word, nibble 2 s + h has one bit for each of the columns 4 s .. 4 s + 3
// of that run, in row g + 8 h, lowest column in the lowest bit. The values come in the order (s, h, lane, bit), so a warp that
// expands nibble after nibble reads them nearly in sequence: shared memory sees almost no bank conflicts, and a lane needs to know
// only how many values of its nibble's group lie before its own. All eight counts come from one scan over the warp with four 8-bit
// counters a register; no population count is needed (it runs at a quarter of the speed of an addition or slower).
//
// mma.m16n8k16 sums over k in any order, so its k is mapped to the columns that a lane owns: with (2 q, 2 q + 1) = columns
// (4 s, 4 s + 1) of the lane's run and (2 q + 8, 2 q + 9) = (4 s + 2, 4 s + 3), the expanded nibbles are the A fragment as they are,
// and the B fragment is 16 neighbouring entries of a row of x: two 16-byte loads, no staging.
//
// A block of 8 warps takes 16 rows; its warps share out the strips along K. Each warp keeps kStages - 1 strips in flight in a ring
// of its own by cp.async, so the loop has no block-wide barrier. The sums of the warps meet in shared memory in a fixed order:
// results do not depend on timing.
#include "strips.cuh"

namespace sparseprune {
namespace {

constexpr int kWarps = 8;
constexpr int kStages = 4;

// Sixteen neighbouring entries of x from column `begin`, 0 past the end of the row.
template <bool kVector, class T>
__device__ inline void load_run(uint32_t (&run)[8], const T* row, int begin, int columns) {
  if constexpr (kVector) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = begin + half * kChunk;
      uint4 four{0, 0, 0, 0};
      if (column < columns) four = __ldg(reinterpret_cast<const uint4*>(row + column));
      run[half * 4] = four.x, run[half * 4 + 1] = four.y, run[half * 4 + 2] = four.z, run[half * 4 + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int pair = 0; pair < 8; ++pair) {
      const int column = begin + 2 * pair;
      const uint32_t low = column < columns ? row[column].bits : 0, high = column + 1 < columns ? row[column + 1].bits : 0;
      run[pair] = pack_pair(low, high);
    }
  }
}

// kTiles: groups of 8 tokens. kVector: rows of x are 16-byte aligned.
template <class T, int kTiles, bool kVector>
__global__ void __launch_bounds__(kWarps * 32)
    bitmap_linear_kernel(const T* x, const uint32_t* words, const int32_t* starts, const T* values, const T* bias, T* y, int tokens,
                         int rows, int columns, int chunks, int activation) {
  DYNAMIC_SHARED(uint4, memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
  const int strips = (columns + kStripColumns - 1) / kStripColumns;
  const int64_t base = static_cast<int64_t>(blockIdx.x) * strips;
  uint4* const ring = memory + warp * kStages * chunks;

  const T* x_rows[kTiles];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int token = tile * 8 + group;  // past the last token, any row will do: a column of mma's result depends on its own token alone
    x_rows[tile] = x + static_cast<int64_t>(token < tokens ? token : 0) * columns;
  }
  float sums[kTiles][4] = {};
#pragma unroll
  for (int ahead = 0; ahead < kStages - 1; ++ahead) {
    const int strip = warp + ahead * kWarps;
    if (strip < strips) fetch(ring + ahead * chunks, words, values, base + strip, find_strip(starts, base + strip, true), lane);
    copy_commit();
  }
  int next = warp + (kStages - 1) * kWarps;
  Strip next_strip = find_strip(starts, base + next, next < strips);
  int stage = 0;
  for (int strip = warp; strip < strips; strip += kWarps) {
    const unsigned misaligned = static_cast<unsigned>(__ldg(starts + base + strip)) % kChunk;
    uint32_t run[kTiles][8];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) load_run<kVector>(run[tile], x_rows[tile], strip * kStripColumns + quad * 16, columns);

    copy_wait<kStages - 2>();
    __syncwarp();  // this strip has landed for every lane, and every lane is done with the stage that is filled next
    const int refill = stage == 0 ? kStages - 1 : stage - 1;
    if (next < strips) fetch(ring + refill * chunks, words, values, base + next, next_strip, lane);
    copy_commit();
    next += kWarps;
    next_strip = find_strip(starts, base + next, next < strips);

    const uint4* const here = ring + stage * chunks;
    const uint32_t word = reinterpret_cast<const uint32_t*>(here)[lane];
    const uint16_t* const kept = reinterpret_cast<const uint16_t*>(here + kWordChunks) + misaligned;
    stage = stage == kStages - 1 ? 0 : stage + 1;

    const Ranks ranks = rank(word, lane);
    unsigned place = 0;  // of the group's first value
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      uint32_t a[4];
      expand_fragment(a, word, ranks, s, kept, place);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint32_t b[2] = {run[tile][2 * s], run[tile][2 * s + 1]};
        mma_16x8x16(sums[tile], a, b, T{});
      }
    }
  }

  __syncthreads();  // no copy is under way and the rings are free: the memory now takes the partial sums, [warp][token][row]
  float* const partial = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = tile * 8 + quad * 2 + i % 2, row = group + 8 * (i / 2);
      partial[(warp * kTiles * 8 + token) * kStripRows + row] = sums[tile][i];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTiles * 8 * kStripRows; i += kWarps * 32) {
    const int token = i / kStripRows, row = blockIdx.x * kStripRows + i % kStripRows;
    if (token >= tokens || row >= rows) continue;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += partial[w * kTiles * 8 * kStripRows + i];
    if (bias != nullptr) total += widen(bias[row]);
    narrow(activate(total, activation), y[static_cast<int64_t>(token) * rows + row]);
  }
}

template <class T, int kTiles, bool kVector>
int run(const void* x, const uint32_t* words, const int32_t* starts, const void* values, const void* bias, void* y, int tokens, int rows,
        int columns, int most_in_strip, int activation, void* stream) {
  const int chunks = stage_chunks(most_in_strip);
  const int ring_bytes = kWarps * kStages * chunks * static_cast<int>(sizeof(uint4));
  const int sum_bytes = kWarps * kTiles * 8 * kStripRows * static_cast<int>(sizeof(float));
  const int bytes = ring_bytes > sum_bytes ? ring_bytes : sum_bytes;
  ALLOW_SHARED((bitmap_linear_kernel<T, kTiles, kVector>), bytes);
  LAUNCH((bitmap_linear_kernel<T, kTiles, kVector>), dim3((rows + kStripRows - 1) / kStripRows), dim3(kWarps * 32), bytes, stream,
         static_cast<const T*>(x), words, starts, static_cast<const T*>(values), static_cast<const T*>(bias), static_cast<T*>(y), tokens,
         rows, columns, chunks, activation);
  return 0;
}

template <class T>
auto choose(bool vector, int tokens) {
  if (vector) return tokens <= 8 ? run<T, 1, true> : run<T, 2, true>;
  return tokens <= 8 ? run<T, 1, false> : run<T, 2, false>;
}

}  // namespace

int bitmap_linear(const void* x, const uint32_t* words, const int32_t* starts, const void* values, const void* bias, void* y, int tokens,
                  int rows, int columns, int most_in_strip, int dtype, int activation, bool vector, void* stream) {
  const auto kernel = dtype == kFloat16 ? choose<Half>(vector, tokens) : choose<Bfloat>(vector, tokens);
  return kernel(x, words, starts, values, bias, y, tokens, rows, columns, most_in_strip, activation, stream);
}

}  // namespace sparseprune
