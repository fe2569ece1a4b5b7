// What a tier offers: one table of function pointers a family of kernels. Only pointers and sizes cross this line.
// Strides and lengths count elements unless a comment says bytes. Every kernel may be called from many threads at once.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparseprune {

// Element types of buffers passed as void*.
enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

// The scalars of one AdamW step, worked out in double: p = decay * p - rate * m / (sqrt(v) * scale + eps), where
// m = beta1 * m + new1 * g, v = beta2 * v + new2 * g^2, decay = 1 - lr * weight_decay, rate = lr / (1 - beta1^step),
// scale = 1 / sqrt(1 - beta2^step), new = 1 - beta.
struct AdamwStep {
  float beta1, new1, beta2, new2, decay, rate, scale, eps;
};

// Masks: n bool bytes, each 0 or 1.
struct MaskingKernels {
  // w[i] = mask[i] ? w[i] : 0, for n elements of `bytes` (2 or 4) each.
  void (*apply_mask)(void* w, const uint8_t* mask, int64_t n, int bytes);
  // The same into out [n].
  void (*masked_copy)(const void* w, const uint8_t* mask, void* out, int64_t n, int bytes);
  // mask[i] = |w[i]| >= threshold and out[i] = mask[i] ? w[i] : 0; returns how many, and in *nans how many w[i] are NaN.
  int64_t (*threshold_mask)(const void* w, Dtype dtype, float threshold, uint8_t* mask, void* out, int64_t n, int64_t* nans);
  // score_grad[i] += grad[i] * w[i] (score_grad may be null), then grad[i] = mask[i] ? grad[i] : 0.
  void (*mask_gradient)(void* grad, const void* w, Dtype dtype, const uint8_t* mask, float* score_grad, int64_t n);
  // One AdamW step on p with its gradient and moments m, v; mask may be null; where it is 0 p, m and v become 0.
  void (*masked_adamw)(void* p, const void* grad, Dtype dtype, float* m, float* v, const uint8_t* mask, int64_t n, const AdamwStep& step);
};

// Buffers of one dtype that are selected from as if they were one: data[i] holds sizes[i] elements. Values are compared through
// int32 keys that sort as the values do: magnitude ? |x| : x.
struct Pieces {
  const void* const* data;
  const int64_t* sizes;
  int64_t count;
  Dtype dtype;
  bool magnitude;
};

struct Selected {
  int32_t key;     // of the k-th largest value
  int64_t above;   // how many are larger
  int64_t equal;   // how many are equal to it, itself included
  int64_t nans;    // above 0: nothing else is valid
};

struct SelectionKernels {
  // The k-th largest, 1 <= k <= total. force_radix: skip the sample and count digits, which is what a misleading sample ends in.
  // Returns false where memory ran out.
  bool (*kth)(const Pieces& pieces, int64_t k, bool force_radix, Selected* out);
  // masks[i][j]: the value's key is larger than `key`, or equal to it and among the first `ties` such ones
  // (INT64_MAX: all). Returns false where a value is NaN.
  bool (*cut_mask)(const Pieces& pieces, int32_t key, int64_t ties, uint8_t* const* masks);
  // counts [2048] += how many 32-bit keys (unsigned order) begin with `prefix` and have this digit at [shift, shift + width);
  // returns how many values are NaN.
  int64_t (*histogram)(const Pieces& pieces, uint32_t prefix, int shift, int width, int64_t* counts);
  // scores [groups, m]; mask keeps the n largest of each group, ties to the lower index; m <= 256. Returns how many are NaN.
  int64_t (*nm_mask)(const void* scores, Dtype dtype, int64_t groups, int n, int m, uint8_t* mask);
  // scores [rows, cols], out [rows / r, cols / c]: the sum of each block.
  void (*block_scores)(const void* scores, Dtype dtype, int64_t rows, int64_t cols, int64_t r, int64_t c, float* out);
};

// The machine's limits, for the benchmarks. Each returns the work done: floating point operations or bytes, over all threads.
struct PeakKernels {
  double (*fma)(int64_t rounds);      // multiply-adds on registers
  double (*l1_fma)(int64_t rounds);   // multiply-adds fed by one L1 vector load each
  double (*read)(const float* data, int64_t n, int64_t repeats);
  double (*update)(float* data, int64_t n);  // data[i] *= 1
};

// Codes shared with sparseprune/native/matmul.py.
constexpr int kGroups = 0, kBitmask = 1;                 // Packed.kind
constexpr int kFloat32 = 0, kBfloat16 = 1, kInt8 = 3;    // Packed.values_dtype

// A packed sparse weight [rows, columns]; spmm.inl and bitmask.inl say in which order.
struct Packed {
  int kind;
  int64_t rows, columns;
  int height;                 // rows that share their columns: 1, 2, 4, 8 or 16
  int64_t k_block, k_blocks;  // columns of a K-block (at most 65536), and how many
  int64_t row_block;          // rows of a row block: a multiple of height
  const void* values;
  int values_dtype;
  const uint16_t* index;      // groups: [entries]; bitmask: the bits
  const int32_t* slots;       // groups: [slots + 1][2]; bitmask: [rows + 1], the first value of each row
};

// What happens to each sum before it is written: * scale, + bias, activation, + residual. And to each finished row of y: LayerNorm.
struct Epilogue {
  const float* scale;     // [rows] or null
  const float* bias;      // [rows] or null
  const float* residual;  // [tokens, rows] or null
  int64_t residual_stride;
  int activation;         // activations.inl
  const float* gain = nullptr;   // [rows] of a LayerNorm, or null
  const float* shift = nullptr;  // [rows], its bias, where gain is not null
  float eps = 0.0f;
};

struct MatmulKernels {
  // y [n, rows] = epilogue(x [n, columns] W^T); rows of x and residual are dense, strides count floats between them.
  void (*spmm)(const Packed& w, const float* x, int64_t x_stride, int64_t n, float* y, const Epilogue& e);
  // grad [entries * height], packed order: the gradient of the values; x [n, columns], dy [n, rows]. Kind "groups" only.
  void (*sddmm)(const Packed& w, const float* x, int64_t x_stride, const float* dy, int64_t dy_stride, int64_t n, float* grad);
  void (*gather_values)(const float* canonical, const int32_t* perm, int64_t n, void* packed, int dtype);
  void (*scatter_values)(const float* packed, const int32_t* perm, int64_t n, float* canonical);
  // y [n, d] = LayerNorm(x + residual) * weight + bias; residual may be null.
  void (*add_layer_norm)(const float* x, int64_t x_stride, const float* residual, int64_t residual_stride, const float* weight,
                         const float* bias, float eps, int64_t n, int64_t d, float* y);
};

// What a step of a language model does beside its sparse weights.
struct DecodeKernels {
  // y [n, d] = x / sqrt(mean(x^2) + eps) * weight.
  void (*rms_norm)(const float* x, int64_t x_stride, const float* weight, float eps, int64_t n, int64_t d, float* y);
  // y [n, rows] = x [n, columns] W^T + bias, W bfloat16 [rows, columns]; bias may be null.
  void (*rounded_linear)(const uint16_t* w, int64_t rows, int64_t columns, const float* x, int64_t x_stride, int64_t n,
                         const float* bias, float* y);
};

struct Kernels {
  const char* tier;
  int lanes;
  MaskingKernels masking;
  SelectionKernels selection;
  PeakKernels peaks;
  MatmulKernels matmul;
  DecodeKernels decode;
};

// The table of each tier that was compiled (tiers/*.cpp).
const Kernels& generic_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

// The table picked at load; see dispatch.cpp.
const Kernels& kernels();
}  // namespace sparseprune
