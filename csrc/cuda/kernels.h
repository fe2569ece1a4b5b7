// Every launcher of csrc/cuda. Each queues its kernels on `stream` and returns at once: 0, the CUDA error of a launch, or one of ours.
// Pointers are device pointers; `dtype` is a Dtype; nothing here allocates, copies or waits, so all of it can be captured in a graph.
#pragma once
#include <cstdint>

namespace sparseprune {

// Returned where a launch cannot fit any card, or this one; CUDA's own errors are positive.
constexpr int kTooManyBlocks = -1;
constexpr int kTooMuchShared = -2;
constexpr unsigned kMostBlocksX = 0x7fffffffu, kMostBlocksYZ = 65535;

enum Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };  // the codes of csrc/cpu/kernels.h

// 0 where this module has code that the current device can run, and a driver that its runtime can use; else CUDA's error.
int why_not_loaded();

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
// How many values a block of the next kernels takes at a time: a chunk of one tensor.
constexpr int kSelectChunk = 4096;
// Tensors of one launch, handed over by value: within the 4 KiB that a kernel's arguments may take.
constexpr int kSelectTensors = 120;
struct SelectTensors {
  int64_t first_chunk[kSelectTensors + 1];  // counted over the tensors of this launch; the last one: how many there are
  int64_t n[kSelectTensors];
  const void* x[kSelectTensors];
  uint8_t* mask[kSelectTensors];
  int64_t chunks_before;  // of the tensors of earlier launches
  int count;
};
// Adds to bins the next digit (`width` bits at `shift`) of each key that begins with state's prefix, or with `prefix` where state is
// null. count_nan: also counts NaN into the last bin.
int select_histogram(const SelectTensors& tensors, int dtype, bool magnitude, int shift, int width, const void* state, uint32_t prefix,
                     bool count_nan, int64_t* bins, void* stream);
// Takes the digit in which the wanted rank falls, counted from the largest, and zeroes the bins for the next digit.
int select_digit(void* state, int64_t* bins, int width, void* stream);
// out: 0-dim of dtype: the value of the key found, NaN where one was counted. shift: the lowest bit that was looked at.
int select_value(const void* state, int dtype, bool magnitude, int shift, void* out, void* stream);
// Makes the state of a finished selection from a threshold of dtype and how many entries equal to it are kept.
int select_from_threshold(void* state, const void* threshold, int dtype, bool magnitude, int shift, int64_t ties, void* stream);
// counts [chunks of all launches]: how many keys of each chunk equal the threshold; nan: one is added for every NaN.
int select_count_ties(const SelectTensors& tensors, int dtype, bool magnitude, int shift, const void* state, int64_t* counts, int64_t* nan,
                      void* stream);
// counts [n]: exclusive prefix sums in place, over the chunks of all tensors in order.
int select_scan(int64_t* counts, int64_t n, void* stream);
// The masks, bytes: 1 above the threshold and for the first `remaining` equal to it (counts: the ties before each chunk); NaN gives 0.
int select_mask(const SelectTensors& tensors, int dtype, bool magnitude, int shift, const void* state, const int64_t* counts,
                void* stream);

// y [tokens, rows] = activation(x [tokens, columns] W^T + bias); W in strips of 16 rows x 64 columns (linear_bitmap.cu has the
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

// out [entries] float: the sum over tokens of dy [tokens, rows] x [tokens, columns] at the entries of a csr structure.
// 16 bits: edges [rows * ceil(columns / kSddmmTile) + 1]: where the entries of each row and tile of columns begin.
// vector: dy and x are 16-byte aligned, rows and columns multiples of 8.
constexpr int kSddmmTile = 64;
int sddmm_tiles(const void* dy, const void* x, const int32_t* edges, const int32_t* col, float* out, int tokens, int rows, int columns,
                int dtype, bool vector, void* stream);
// float32, from both transposed: dyt [rows, stride], xt [columns, stride]; stride a multiple of 4, zeros past the last token, both
// 16-byte aligned. splits: how many blocks share a row's entries.
int sddmm_rows(const float* dyt, const float* xt, int64_t stride, const int32_t* crow, const int32_t* col, float* out, int rows,
               int splits, void* stream);

// Cuts a csr structure [rows, columns] into strips; across = ceil(columns / 64), strips = ceil(rows / 16) * across.
// words [strips * 32]; counts [strips]: how many values each has.
int bitmap_words(const int32_t* crow, const int32_t* col, uint32_t* words, int32_t* counts, int rows, int across, int64_t strips,
                 void* stream);
// packed, in dtype (kBfloat16 or kFloat16): the values in the strips' order. order: where each entry's value lies in values, or null.
int bitmap_values(const int32_t* crow, const int32_t* col, const int32_t* order, const void* values, int values_dtype,
                  const uint32_t* words, const int32_t* starts, void* packed, int dtype, int rows, int across, int64_t strips,
                  void* stream);
// As bitmap_linear, for any number of tokens. splits: parts that K is cut into; sums: float [splits, tokens, rows], null for one.
int bitmap_tiles(const void* x, const uint32_t* words, const int32_t* starts, const void* values, const void* bias, void* y, float* sums,
                 int tokens, int rows, int columns, int most_in_strip, int splits, int dtype, int activation, bool vector, void* stream);

// out [n] = w where mask (bytes) is not 0, else 0; element_size 1, 2, 4 or 8 bytes; out may be w.
int masked_copy(const void* w, const uint8_t* mask, void* out, int64_t n, int element_size, void* stream);
// mask [n] = |w| >= *threshold; out [n] = w there, else 0; counts [2] += kept, NaN. threshold: one value of dtype.
int threshold_mask(const void* w, const void* threshold, int dtype, uint8_t* mask, void* out, int64_t* counts, int64_t n, void* stream);
// All [n]: score_grad += grad * w, grad still dense (null: not wanted); then grad becomes 0 where mask is 0.
int mask_gradient(void* grad, const void* w, const uint8_t* mask, float* score_grad, int64_t n, int dtype, void* stream);

// decay = 1 - lr * weight_decay; rest = 1 - beta; size = lr / (1 - beta1^step); root_correction = 1 / sqrt(1 - beta2^step).
struct AdamWStep {
  float decay, rest1, beta2, rest2, eps, size, root_correction;
};
// All [n]: one AdamW step in float; p and both moments become 0 where mask is 0. mask may be null.
int masked_adamw(void* p, const void* grad, float* exp_avg, float* exp_avg_sq, const uint8_t* mask, int64_t n, int dtype,
                 const AdamWStep& step, void* stream);

// y [tokens, rows] = activation(x [tokens, columns] W^T + bias), tokens <= 8. deltas and values [starts[rows] * 8] as linear_delta.cu
// says, starts [rows + 1] in runs of 8 entries; deltas 8-byte, values 16-byte aligned.
int delta_linear(const void* x, const int32_t* starts, const uint8_t* deltas, const void* values, const void* bias, void* y, int tokens,
                 int rows, int columns, int dtype, int activation, void* stream);

}  // namespace sparseprune
