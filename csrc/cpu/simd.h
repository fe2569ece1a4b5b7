// The vector type of the tier being compiled: SP_LANES floats (4, 8 or 16), written with compiler vector extensions so that
// one kernel text serves every instruction set. Included once a tier, inside that tier's anonymous namespace: nothing here may
// leak to another tier, hence no templates of the standard library and no inline functions with external linkage.
//
// Sixteen lanes also compile under AVX2 flags (the compiler splits each vector in two): that is how the text of the AVX-512
// tier is tested on a machine without AVX-512.
#ifndef SP_LANES
#error "a tier defines SP_LANES before it includes simd.h"
#endif

typedef float vf __attribute__((vector_size(SP_LANES * 4), aligned(SP_LANES * 4), may_alias));
typedef float vf_any __attribute__((vector_size(SP_LANES * 4), aligned(4), may_alias));  // the same at any address
typedef int32_t vi __attribute__((vector_size(SP_LANES * 4), aligned(SP_LANES * 4), may_alias));
typedef int32_t vi_any __attribute__((vector_size(SP_LANES * 4), aligned(4), may_alias));
typedef uint8_t vb_any __attribute__((vector_size(SP_LANES), aligned(1), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(SP_LANES * 2), aligned(2), may_alias));

constexpr int kLanes = SP_LANES;

static inline vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
static inline void store(float* p, vf v) { *reinterpret_cast<vf_any*>(p) = v; }
static inline vf splat(float s) { return vf{} + s; }
static inline vi bits(vf v) { return reinterpret_cast<vi>(v); }
static inline vf floats(vi v) { return reinterpret_cast<vf>(v); }
// All bits set where the byte of a bool mask is not zero.
static inline vi widen_bool(const uint8_t* p) { return __builtin_convertvector(*reinterpret_cast<const vb_any*>(p), vi) != 0; }
