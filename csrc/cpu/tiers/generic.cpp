// The kernel texts compiled for the generic tier.
#define SP_LANES 8
#define SP_TIER generic
#include "tier.inl"
