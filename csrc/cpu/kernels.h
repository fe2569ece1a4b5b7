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

struct Kernels {
  const char* tier;
  int lanes;
  MaskingKernels masking;
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
