// What a tier offers: one table of function pointers a family of kernels. Only pointers and sizes cross this line.
// Strides and lengths count elements unless a comment says bytes. Every kernel may be called from many threads at once.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparseprune {

// Element types of buffers passed as void*.
enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

struct MaskingKernels {
  // w[i] = mask[i] ? w[i] : 0, for n elements of `bytes` (2 or 4) each; mask: n bool bytes.
  void (*apply_mask)(void* w, const uint8_t* mask, int64_t n, int bytes);
};

// The machine's limits, for the benchmarks. Each returns the work done: floating point operations or bytes, over all threads.
struct PeakKernels {
  double (*fma)(int64_t rounds);      // multiply-adds on registers
  double (*l1_fma)(int64_t rounds);   // multiply-adds fed by one L1 vector load each
  double (*read)(const float* data, int64_t n, int64_t repeats);
  double (*update)(float* data, int64_t n);  // data[i] *= 1
};

// A packed sparse weight [rows, columns]; spmm.inl and sparseprune/native/matmul.py say in which order.
struct Packed {
  int64_t rows, columns;
  int height;                 // rows that share their columns: 1, 2, 4, 8 or 16
  int64_t k_block, k_blocks;  // columns of a K-block (a multiple of 8, at most 65536), and how many
  int64_t row_block;          // rows of a row block: a multiple of height
  const void* values;
  int values_dtype;           // Dtype, or 3: int8
  const uint16_t* index;
  const int32_t* offsets;
};

// What happens to each sum before it is written: * scale, + bias, activation, + residual.
struct Epilogue {
  const float* scale;     // [rows] or null
  const float* bias;      // [rows] or null
  const float* residual;  // [tokens, rows] or null
  int64_t residual_stride;
  int activation;         // activations.inl
};

struct MatmulKernels {
  // y [n, rows] = epilogue(x [n, columns] W^T); rows of x, y and residual are dense, strides count floats between them.
  void (*spmm)(const Packed& w, const float* x, int64_t x_stride, int64_t n, float* y, int64_t y_stride, const Epilogue& e);
};

struct Kernels {
  const char* tier;
  int lanes;
  MaskingKernels masking;
  PeakKernels peaks;
  MatmulKernels matmul;
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
