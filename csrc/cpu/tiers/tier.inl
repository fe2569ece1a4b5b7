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
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define SP_JOIN2(a, b) a##b
#define SP_JOIN(a, b) SP_JOIN2(a, b)
#define SP_TEXT2(a) #a
#define SP_TEXT(a) SP_TEXT2(a)

namespace sparseprune {
namespace {
#include "../simd.h"
#include "../int8.inl"
#include "../int8_bitmask.inl"
#include "../threads.h"
#include "../halves.h"
#include "../masking_adamw.inl"
#include "../masking.inl"
#include "../selection.inl"
#include "../peaks.inl"
#include "../workspace.h"
#include "../activations.inl"
#include "../norms.inl"
#include "../linear_groups.inl"
#include "../linear_bitmask.inl"
#include "../rounding.inl"
#include "../linear_quads.inl"
#include "../linear_bitmask8.inl"
#include "../linear.inl"
#include "../sddmm.inl"
#include "../packing.inl"
#include "../rounded.inl"
#include "../encoder_attention.inl"
#include "../encoder.inl"
#include "../decoder_linear.inl"
#include "../decoder.inl"
}  // namespace

const Kernels& SP_JOIN(SP_TIER, _kernels)() {
  static const Kernels table = {
      SP_TEXT(SP_TIER),
      SP_LANES,
      masking_kernels(),
      selection_kernels(),
      peak_kernels(),
      linear_kernels(),
      sddmm_kernels(),
      packing_kernels(),
      norm_kernels(),
      rounded_kernels(),
      encoder_kernels(),
      int8_kernels(),
      decoder_kernels(),
  };
  return table;
}
}  // namespace sparseprune
