// What every tier file includes after it has set SP_LANES and SP_TIER: all kernel texts, inside an anonymous namespace, and the
// one function with external linkage, which returns the tier's table.
#include <sched.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "../kernels.h"

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define SP_JOIN2(a, b) a##b
#define SP_JOIN(a, b) SP_JOIN2(a, b)
#define SP_TEXT2(a) #a
#define SP_TEXT(a) SP_TEXT2(a)

namespace sparseprune {
namespace {
#include "../simd.h"
#include "../threads.h"
#include "../halves.h"
#include "../adamw.inl"
#include "../masking.inl"
#include "../topk.inl"
#include "../peaks.inl"
#include "../workspace.h"
#include "../activations.inl"
#include "../layer_norm.inl"
#include "../spmm.inl"
#include "../bitmask.inl"
#include "../sddmm.inl"
#include "../pack.inl"
#include "../matmul.inl"
#include "../rounded.inl"
}  // namespace

const Kernels& SP_JOIN(SP_TIER, _kernels)() {
  static const Kernels table = {
      SP_TEXT(SP_TIER),
      SP_LANES,
      masking_kernels(),
      selection_kernels(),
      peak_kernels(),
      matmul_kernels(),
      decode_kernels(),
  };
  return table;
}
}  // namespace sparseprune
