// The vector type of the tier being compiled: SP_LANES floats (8 or 16), written with compiler vector extensions so that
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
static inline vi load_ints(const void* p) { return *static_cast<const vi_any*>(p); }
static inline void store_ints(void* p, vi v) { *static_cast<vi_any*>(p) = v; }
static inline vi splat_int(int32_t s) { return vi{} + s; }
static inline vi bits(vf v) { return reinterpret_cast<vi>(v); }
static inline vf floats(vi v) { return reinterpret_cast<vf>(v); }
// All bits set where the byte of a bool mask is not zero.
static inline vi widen_bool(const uint8_t* p) { return __builtin_convertvector(*reinterpret_cast<const vb_any*>(p), vi) != 0; }

// Eight floats in any tier, and reads and writes at any address for kernels that are templates of their vector type.
typedef float v8 __attribute__((vector_size(32), aligned(32), may_alias));
typedef int32_t v8i __attribute__((vector_size(32), aligned(32), may_alias));

#if defined(__aarch64__)
// The two registers that eight lanes are.
template <int which>
static inline float32x4_t half_of(v8 v) {
  float32x4_t h[2];
  __builtin_memcpy(h, &v, sizeof(v));
  return h[which];
}
static inline v8 join(float32x4_t low, float32x4_t high) {
  const float32x4_t h[2] = {low, high};
  v8 v;
  __builtin_memcpy(&v, h, sizeof(v));
  return v;
}
#endif

template <class F>
static inline F read(const float* p) {
  F v;
  __builtin_memcpy(&v, p, sizeof(F));
  return v;
}
template <class F>
static inline void write(float* p, F v) {
  __builtin_memcpy(p, &v, sizeof(F));
}
template <class F>
static inline F broadcast(float s) {
  return F{} + s;
}
// The float at p in every lane: one load, where F{} + *p takes a shuffle too, on the port of a multiply-add.
template <class F>
static inline F broadcast_at(const float* p) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 64) return reinterpret_cast<F>(_mm512_set1_ps(*p));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(F) == 32) return reinterpret_cast<F>(_mm256_broadcast_ss(p));
#endif
  return F{} + *p;
}
template <class F>
constexpr int lanes_of() {
  return static_cast<int>(sizeof(F) / 4);
}

#if defined(__clang__)
#define SP_SHUFFLE8(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SP_SHUFFLE8(a, b, ...) __builtin_shuffle(a, b, v8i{__VA_ARGS__})
#endif

// Transposes 8 x 8 in registers.
#if defined(__aarch64__)  // GCC makes single moves of a shuffle that is wider than a register
static inline void transpose4(float32x4_t* r) {
  const float32x4_t a = vtrn1q_f32(r[0], r[1]), b = vtrn2q_f32(r[0], r[1]), c = vtrn1q_f32(r[2], r[3]), d = vtrn2q_f32(r[2], r[3]);
  const auto pairs = [](float32x4_t v) { return vreinterpretq_f64_f32(v); };
  r[0] = vreinterpretq_f32_f64(vtrn1q_f64(pairs(a), pairs(c)));
  r[1] = vreinterpretq_f32_f64(vtrn1q_f64(pairs(b), pairs(d)));
  r[2] = vreinterpretq_f32_f64(vtrn2q_f64(pairs(a), pairs(c)));
  r[3] = vreinterpretq_f32_f64(vtrn2q_f64(pairs(b), pairs(d)));
}
static inline void transpose8(v8* r) {
  float32x4_t quarter[2][2][4];  // rows, then columns, four at a time
  for (int i = 0; i < 8; ++i) {
    quarter[i / 4][0][i % 4] = half_of<0>(r[i]);
    quarter[i / 4][1][i % 4] = half_of<1>(r[i]);
  }
  for (auto& rows : quarter) {
    for (auto& block : rows) transpose4(block);
  }
  for (int i = 0; i < 8; ++i) r[i] = join(quarter[0][i / 4][i % 4], quarter[1][i / 4][i % 4]);
}
#else
static inline void transpose8(v8* r) {
  v8 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = SP_SHUFFLE8(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    t[i + 1] = SP_SHUFFLE8(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) {
    u[i] = SP_SHUFFLE8(t[i], t[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    u[i + 1] = SP_SHUFFLE8(t[i], t[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    u[i + 2] = SP_SHUFFLE8(t[i + 1], t[i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
    u[i + 3] = SP_SHUFFLE8(t[i + 1], t[i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = SP_SHUFFLE8(u[i], u[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    r[i + 4] = SP_SHUFFLE8(u[i], u[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}
#endif

// Eight bfloat16 (as their bits) or int8 values as floats.
typedef uint16_t v8_u16 __attribute__((vector_size(16), aligned(2), may_alias));
typedef int8_t v8_i8 __attribute__((vector_size(8), aligned(1), may_alias));
#if defined(__AVX2__)  // the compiler's own conversions take twenty instructions
static inline v8 widen_bf16(const uint16_t* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<v8>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
static inline v8 widen_int8(const int8_t* p) {
  const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<v8>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(raw)));
}
#elif defined(__aarch64__)
static inline v8 widen_bf16(const uint16_t* p) {
  const uint16x8_t raw = vld1q_u16(p);
  return join(vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(raw), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(raw, 16)));
}
static inline v8 widen_int8(const int8_t* p) {
  const int16x8_t words = vmovl_s8(vld1_s8(p));
  return join(vcvtq_f32_s32(vmovl_s16(vget_low_s16(words))), vcvtq_f32_s32(vmovl_high_s16(words)));
}
#else
static inline v8 widen_bf16(const uint16_t* p) {
  return reinterpret_cast<v8>(__builtin_convertvector(*reinterpret_cast<const v8_u16*>(p), v8i) << 16);
}
static inline v8 widen_int8(const int8_t* p) {
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const v8_i8*>(p), v8i), v8);
}
#endif
static inline v8 halves_sum(v8 v) { return v; }
#if SP_LANES == 16
static inline v8 halves_sum(vf v) {
  v8 half[2];
  __builtin_memcpy(half, &v, sizeof(v));
  return half[0] + half[1];
}
#endif

// Lane i of a, or of b where the bit h of i is set; and the same from the lane i ^ h.
#define SP_LANE(i) ((i) & h ? (i) + L : (i))
#define SP_OTHER(i) (SP_LANE(i) ^ h)
#define SP_EIGHT(f, i) f(i), f(i + 1), f(i + 2), f(i + 3), f(i + 4), f(i + 5), f(i + 6), f(i + 7)
#if defined(__clang__)
#define SP_SHUFFLE(ints, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SP_SHUFFLE(ints, ...) __builtin_shuffle(a, b, ints{__VA_ARGS__})
#endif
template <int h>
static inline v8 folded(v8 a, v8 b) {
#if defined(__aarch64__)
  const float32x4_t a0 = half_of<0>(a), a1 = half_of<1>(a), b0 = half_of<0>(b), b1 = half_of<1>(b);
  if constexpr (h == 4) {
    return join(vaddq_f32(a0, a1), vaddq_f32(b0, b1));
  } else {
    const auto fold_half = [](float32x4_t x, float32x4_t y) __attribute__((always_inline)) {
      if constexpr (h == 1) return vaddq_f32(vtrn1q_f32(x, y), vtrn2q_f32(x, y));
      const float64x2_t p = vreinterpretq_f64_f32(x), q = vreinterpretq_f64_f32(y);
      return vaddq_f32(vreinterpretq_f32_f64(vtrn1q_f64(p, q)), vreinterpretq_f32_f64(vtrn2q_f64(p, q)));
    };
    return join(fold_half(a0, b0), fold_half(a1, b1));
  }
#endif
  constexpr int L = 8;
  return SP_SHUFFLE(v8i, SP_EIGHT(SP_LANE, 0)) + SP_SHUFFLE(v8i, SP_EIGHT(SP_OTHER, 0));
}
#if SP_LANES == 16
template <int h>
static inline vf folded(vf a, vf b) {
  constexpr int L = 16;
  return SP_SHUFFLE(vi, SP_EIGHT(SP_LANE, 0), SP_EIGHT(SP_LANE, 8)) +
         SP_SHUFFLE(vi, SP_EIGHT(SP_OTHER, 0), SP_EIGHT(SP_OTHER, 8));
}
#endif
#undef SP_LANE
#undef SP_OTHER
#undef SP_EIGHT
#undef SP_SHUFFLE
// One step of lane_sums: pairs of the n / h vectors left become one each; the last one left folds onto itself.
template <int h, int n, class F>
static inline void fold(F* v) {
  constexpr int left = n / h;
  if constexpr (left <= 1) {
    v[0] = folded<h>(v[0], v[0]);
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < left / 2; ++i) v[i] = folded<h>(v[2 * i], v[2 * i + 1]);
  }
}
// out[i] = the sum of v[i]'s lanes for i < n, 8 or as many as there are lanes; further lanes mean nothing; v is lost.
template <int n, class F>
static inline F lane_sums(F* v) {
  fold<1, n>(v);
  fold<2, n>(v);
  fold<4, n>(v);
  if constexpr (lanes_of<F>() == 16) fold<8, n>(v);
  return v[0];
}
// The sum of a vector's lanes.
static inline float total(vf v) {
  float s[kLanes];
  write(s, v);
  for (int half = kLanes / 2; half >= 1; half /= 2) {
    for (int i = 0; i < half; ++i) s[i] += s[i + half];
  }
  return s[0];
}

#if SP_LANES == 16 && defined(__AVX512F__)
// The lowest elements of `from` at the set bits, zero elsewhere. The two instructions are VBMI2, which no tier asks for: written as
// assembly they need no flag, and who calls them asks the CPU (has_narrow_expand).
static inline __m512i expand_words(__mmask32 to, __m512i from) {
  __m512i out;
  asm("vpexpandw %1, %0%{%2%}%{z%}" : "=v"(out) : "v"(from), "Yk"(to));
  return out;
}
static inline __m512i expand_bytes(__mmask64 to, __m512i from) {
  __m512i out;
  asm("vpexpandb %1, %0%{%2%}%{z%}" : "=v"(out) : "v"(from), "Yk"(to));
  return out;
}
static inline bool has_narrow_expand() {
  static const bool has = __builtin_cpu_supports("avx512vbmi2") != 0;
  return has;
}
#else
static inline bool has_narrow_expand() { return false; }
#endif
