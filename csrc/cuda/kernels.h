// Every launcher of csrc/cuda. Each queues its kernels on `stream` and returns at once: 0, or the CUDA error of a launch.
// Pointers are device pointers; `dtype` is a Dtype; nothing here allocates, copies or waits, so all of it can be captured in a graph.
#pragma once
#include <cstdint>

namespace sparseprune {

enum Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };  // the codes of csrc/cpu/kernels.h

constexpr int kRadixBins = 2048;

enum Special : uint32_t { kFound = 0, kNothing = 1, kEverything = 2 };

// A selection's state in device memory, written only by kernels.
struct SelectState {
  uint32_t prefix;    // the digits of the wanted key found so far; in the end the key, without the bits below `shift`
  uint32_t special;   // kNothing where a NaN was counted or is the threshold, kEverything where every number lies above it
  int64_t remaining;  // rank of the wanted key among the keys that begin with prefix, 1-based; in the end how many ties are kept
};

// state: one SelectState, remaining = k; bins: int64 [kRadixBins + 1], zeroed; the last one counts NaN.
int select_begin(void* state, int64_t* bins, int64_t k, void* stream);
// Adds to bins the next digit (`width` bits at `shift`) of each key of x [n] that begins with state's prefix, or with `prefix`
// where state is null. count_nan: also counts NaN into the last bin.
int select_histogram(const void* x, int64_t n, int dtype, bool magnitude, int shift, int width, const void* state, uint32_t prefix,
                     bool count_nan, int64_t* bins, void* stream);
// Takes the digit in which the wanted rank falls, counted from the largest, and zeroes the bins for the next digit.
int select_digit(void* state, int64_t* bins, int width, void* stream);
// out: 0-dim of dtype: the value of the key found, NaN where one was counted. shift: the lowest bit that was looked at.
int select_value(const void* state, int dtype, bool magnitude, int shift, void* out, void* stream);
// Makes the state of a finished selection from a threshold of dtype and how many entries equal to it are kept.
int select_from_threshold(void* state, const void* threshold, int dtype, bool magnitude, int shift, int64_t ties, void* stream);
// How many entries a block of the next two kernels reads.
constexpr int kSelectChunk = 4096;
// counts [ceil(n / kSelectChunk)]: how many keys of each chunk equal the threshold; nan: one is added for every NaN.
int select_count_ties(const void* x, int64_t n, int dtype, bool magnitude, int shift, const void* state, int64_t* counts, int64_t* nan,
                      void* stream);
// counts [n]: exclusive prefix sums in place, over the chunks of all tensors in order.
int select_scan(int64_t* counts, int64_t n, void* stream);
// mask [n] bytes: 1 above the threshold and for the first `remaining` equal to it (counts: the ties before each chunk); NaN gives 0.
int select_mask(const void* x, int64_t n, int dtype, bool magnitude, int shift, const void* state, const int64_t* counts, uint8_t* mask,
                void* stream);

// y [tokens, rows] = activation(x [tokens, columns] W^T + bias); W in strips of 16 rows x 64 columns (bitmap_linear.cu has the
// format); dtype is that of x, values, bias and y: kBfloat16 or kFloat16. tokens <= 16. bias may be null.
// vector: x is 16-byte aligned and columns is a multiple of 8.
int bitmap_linear(const void* x, const uint32_t* words, const int32_t* starts, const void* values, const void* bias, void* y, int tokens,
                  int rows, int columns, int most_in_strip, int dtype, int activation, bool vector, void* stream);

// y [tokens, rows] = activation(x W^T + bias), W in csr with `entries` values of x's dtype. x [tokens, columns], tokens <= 8.
int csr_linear_few(const void* x, const int32_t* crow, const int32_t* col, const void* values, const void* bias, void* y, int tokens,
                   int rows, int columns, int64_t entries, int dtype, int activation, void* stream);
// The same for many tokens, from x transposed: xt [columns, stride], stride >= tokens a multiple of 4, xt 16-byte aligned.
int csr_linear_many(const void* xt, int64_t stride, const int32_t* crow, const int32_t* col, const void* values, const void* bias, void* y,
                    int tokens, int rows, int64_t entries, int dtype, int activation, void* stream);

}  // namespace sparseprune
