// The kernel texts compiled for the neon tier: eight lanes are two of its registers, of which there are twice as many as AVX2 has.
#define SP_LANES 8
#define SP_TIER neon
#include "tier.inl"
