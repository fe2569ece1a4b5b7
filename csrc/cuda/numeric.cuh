// 16-bit floats as bits, so that one text serves nvcc and the emulator; the tensor core and asynchronous copies.
#pragma once
#include "launch.h"

namespace sparseprune {

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

__device__ inline float widen(float value) { return value; }
#if defined(__CUDACC__)
__device__ inline float widen(Half value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ inline float widen(Bfloat value) { return __bfloat162float(__ushort_as_bfloat16(value.bits)); }
__device__ inline void narrow(float value, float& out) { out = value; }
__device__ inline void narrow(float value, Half& out) { out.bits = __half_as_ushort(__float2half_rn(value)); }
__device__ inline void narrow(float value, Bfloat& out) { out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value)); }

// d += a b: a 16x16 and b 16x8 in 16 bits, d 16x8 in float; fragments as PTX lays them out for mma.m16n8k16.
__device__ inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Bfloat) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 16 bytes from global to shared memory without a register between; both addresses 16-byte aligned.
__device__ inline void copy_async(void* shared, const void* global) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
__device__ inline uint32_t pack_pair(uint32_t low, uint32_t high) { return __byte_perm(low, high, 0x5410); }
// The lower, or the upper, 16 bits of both, the first word's in the lower half.
__device__ inline uint32_t low_halves(uint32_t one, uint32_t other) { return __byte_perm(one, other, 0x5410); }
__device__ inline uint32_t high_halves(uint32_t one, uint32_t other) { return __byte_perm(one, other, 0x7632); }
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kNewestLeft>
__device__ inline void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewestLeft) : "memory");
}
#else
inline float widen(Half value) { return emul::half_to_float(value.bits); }
inline float widen(Bfloat value) { return emul::bfloat_to_float(value.bits); }
inline void narrow(float value, float& out) { out = value; }
inline void narrow(float value, Half& out) { out.bits = emul::float_to_half(value); }
inline void narrow(float value, Bfloat& out) { out.bits = emul::float_to_bfloat(value); }
inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half) { emul::mma(d, a, b, true); }
inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Bfloat) { emul::mma(d, a, b, false); }
inline void copy_async(void* shared, const void* global) { emul::async_copy(shared, global); }
inline uint32_t pack_pair(uint32_t low, uint32_t high) { return low | high << 16; }
inline uint32_t low_halves(uint32_t one, uint32_t other) { return (one & 0xffff) | other << 16; }
inline uint32_t high_halves(uint32_t one, uint32_t other) { return one >> 16 | (other & 0xffff0000u); }
inline void copy_commit() { emul::async_commit(); }
template <int kNewestLeft>
void copy_wait() {
  emul::async_wait(kNewestLeft);
}
#endif

// The epilogue's activation; the codes are sparseprune.activations.ACTIVATION_CODES.
__device__ inline float activate(float y, int activation) {
  switch (activation) {
    case 1: return y < 0.0f ? 0.0f : y;  // keeps NaN
    case 2: return 0.5f * y * (1.0f + erff(y * 0.70710678118654752f));
    case 3: return 0.5f * y * (1.0f + tanhf(0.79788456080286536f * (y + 0.044715f * y * y * y)));
    case 4: return y / (1.0f + expf(-y));
    default: return y;
  }
}

}  // namespace sparseprune
