// The avx512 tier, its products of int8 compiled for AVX-512 VNNI; nothing else gains from these instructions.
#define SP_LANES 16
#include <cstdint>

#include <immintrin.h>

#include "../kernels.h"

namespace sparseprune {
namespace {
#include "../simd.h"
#include "../int8.inl"
#include "../int8_bitmask.inl"
}  // namespace

const Kernels& avx512vnni_kernels() {
  static const Kernels table = [] {
    Kernels made = avx512_kernels();
    made.tier = "avx512vnni";
    made.int8 = int8_kernels();
    return made;
  }();
  return table;
}
}  // namespace sparseprune
