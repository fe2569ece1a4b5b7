// The kernel texts compiled for the avx2 tier.
#define SP_LANES 8
#define SP_TIER avx2
#include "tier.inl"
