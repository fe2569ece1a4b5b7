// The text of the AVX-512 tier, 16 lanes wide, under AVX2 flags: tests only.
#define SP_LANES 16
#define SP_TIER avx2x16
#include "cpu/kernels.h"
namespace sparseprune {
const Kernels& avx2x16_kernels();
}
#include "cpu/tiers/tier.inl"
