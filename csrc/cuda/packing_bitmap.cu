// Cuts a csr weight into the strips that linear_bitmap.cu describes, without any temporary of its size: a warp a strip, a lane its two
// runs of 16 columns, which it finds in the rows' rising columns by bisection. First the words and how many values each strip has;
// then, once the caller has summed those counts, the values. The second is cheap enough to be run at every call while values learn.
#include "strips.cuh"

namespace sparseprune {
namespace {

constexpr int kWarps = 8;

struct Run {  // a lane's entries in one row: from `at`, those below `limit` and before `end`
  int64_t at, end;
  int begin, limit;
};

__device__ inline Run find_run(const int32_t* crow, const int32_t* col, int64_t strip, int across, int half, int rows, int lane) {
  const int64_t row = strip / across * kStripRows + lane / 4 + 8 * half;
  const int begin = static_cast<int>(strip % across) * kStripColumns + lane % 4 * 16;
  if (row >= rows) return {0, 0, begin, begin};
  int64_t low = crow[row], high = crow[row + 1];
  const int64_t end = high;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (col[middle] < begin)
      low = middle + 1;
    else
      high = middle;
  }
  return {low, end, begin, begin + 16};
}

__global__ void __launch_bounds__(kWarps * 32)
    bitmap_words_kernel(const int32_t* crow, const int32_t* col, uint32_t* words, int32_t* counts, int rows, int across, int64_t strips) {
  const int lane = threadIdx.x % 32;
  const int64_t strip = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (strip >= strips) return;  // a whole warp at a time
  uint32_t word = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Run run = find_run(crow, col, strip, across, half, rows, lane);
    for (int64_t at = run.at; at < run.end && col[at] < run.limit; ++at) {
      const int column = col[at] - run.begin;
      word |= 1u << (column / 4 * 8 + half * 4 + column % 4);
    }
  }
  words[strip * 32 + lane] = word;
  int count = __popc(word);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) count += __shfl_xor_sync(kAllLanes, count, distance);
  if (lane == 0) counts[strip] = count;
}

template <class From, class T>
__global__ void __launch_bounds__(kWarps * 32)
    bitmap_values_kernel(const int32_t* crow, const int32_t* col, const int32_t* order, const From* values, const uint32_t* words,
                         const int32_t* starts, T* packed, int rows, int across, int64_t strips) {
  const int lane = threadIdx.x % 32;
  const int64_t strip = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (strip >= strips) return;  // a whole warp at a time
  const uint32_t word = words[strip * 32 + lane];
  const Ranks ranks = rank(word, lane);
  int64_t from[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) from[half] = find_run(crow, col, strip, across, half, rows, lane).at;
  T* const own = packed + starts[strip];
  unsigned place = 0;
#pragma unroll
  for (int s = 0; s < 4; ++s) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t before = half == 0 ? ranks.upper : ranks.lower, total = half == 0 ? ranks.upper_total : ranks.lower_total;
      T* to = own + place + (before >> 8 * s & 0xff);
      const int count = __popc(word >> (8 * s + 4 * half) & 0xfu);
      for (int i = 0; i < count; ++i, ++to, ++from[half])
        narrow(widen(values[order != nullptr ? static_cast<int64_t>(order[from[half]]) : from[half]]), *to);
      place += total >> 8 * s & 0xff;
    }
  }
}

template <class From, class T>
int fill(const int32_t* crow, const int32_t* col, const int32_t* order, const void* values, const uint32_t* words, const int32_t* starts,
         void* packed, int rows, int across, int64_t strips, void* stream) {
  LAUNCH((bitmap_values_kernel<From, T>), dim3(static_cast<unsigned>((strips + kWarps - 1) / kWarps)), dim3(kWarps * 32), 0, stream, crow,
         col, order, static_cast<const From*>(values), words, starts, static_cast<T*>(packed), rows, across, strips);
  return 0;
}

template <class T>
auto choose(int dtype) {
  return dtype == kFloat32 ? fill<float, T> : dtype == kFloat16 ? fill<Half, T> : fill<Bfloat, T>;
}

}  // namespace

int bitmap_words(const int32_t* crow, const int32_t* col, uint32_t* words, int32_t* counts, int rows, int across, int64_t strips,
                 void* stream) {
  LAUNCH(bitmap_words_kernel, dim3(static_cast<unsigned>((strips + kWarps - 1) / kWarps)), dim3(kWarps * 32), 0, stream, crow, col, words,
         counts, rows, across, strips);
  return 0;
}

int bitmap_values(const int32_t* crow, const int32_t* col, const int32_t* order, const void* values, int values_dtype,
                  const uint32_t* words, const int32_t* starts, void* packed, int dtype, int rows, int across, int64_t strips,
                  void* stream) {
  const auto kernel = dtype == kFloat16 ? choose<Half>(values_dtype) : choose<Bfloat>(values_dtype);
  return kernel(crow, col, order, values, words, starts, packed, rows, across, strips, stream);
}

}  // namespace sparseprune
