// The kernel texts compiled for the avx512 tier.
#define SP_LANES 16
#define SP_TIER avx512
#include "tier.inl"
