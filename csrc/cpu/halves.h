// bfloat16 and float16 as vectors of float: widened on load, rounded to the nearest even on store. Selected by type, so that one
// kernel text serves every storage type: Stored<float>, Stored<Bf16>, Stored<F16>. Included once a tier, after simd.h.

typedef uint32_t vu __attribute__((vector_size(SP_LANES * 4), aligned(SP_LANES * 4), may_alias));

struct Bf16 {
  uint16_t raw;
};
struct F16 {
  uint16_t raw;
};

static inline float float_of_bits(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline uint32_t bits_of_float(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

static inline float widen_one(float v) { return v; }
static inline float widen_one(Bf16 v) { return float_of_bits(static_cast<uint32_t>(v.raw) << 16); }
static inline float widen_one(F16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.raw & 0x8000) << 16, rest = v.raw & 0x7fff;
  if (rest >= 0x7c00) return float_of_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x400) return float_of_bits(sign | ((rest << 13) + 0x38000000));
  const float small = static_cast<float>(rest) * 5.9604644775390625e-8f;  // a subnormal counts steps of 2^-24
  return sign ? -small : small;
}

static inline void narrow_one(float* p, float v) { *p = v; }
static inline void narrow_one(Bf16* p, float v) {
  const uint32_t u = bits_of_float(v);
  const bool nan = (u & 0x7fffffff) > 0x7f800000;
  p->raw = static_cast<uint16_t>(nan ? (u >> 16 | 0x40) : (u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static inline void narrow_one(F16* p, float v) {
  const uint32_t u = bits_of_float(v), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
  uint32_t half;
  if (rest > 0x7f800000) {
    half = 0x7e00;
  } else if (rest >= 0x477ff000) {  // rounds beyond the largest finite value
    half = 0x7c00;
  } else if (rest >= 0x38800000) {
    half = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
  } else {  // adding 1/2 leaves the count of 2^-24 steps, rounded to the nearest even, in the low bits
    half = bits_of_float(float_of_bits(rest) + 0.5f) - 0x3f000000;
  }
  p->raw = static_cast<uint16_t>(sign | half);
}

static inline vf widen(const float* p) { return load(p); }
static inline vf widen(const Bf16* p) {
  return floats(reinterpret_cast<vi>(__builtin_convertvector(*reinterpret_cast<const vh_any*>(p), vu) << 16));
}
static inline vf widen(const F16* p) {
#if defined(__AVX512F__) && SP_LANES == 16
  return reinterpret_cast<vf>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__) && SP_LANES == 8
  return reinterpret_cast<vf>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__aarch64__) && SP_LANES == 8
  const float16x8_t h = vreinterpretq_f16_u16(vld1q_u16(&p->raw));
  return join(vcvt_f32_f16(vget_low_f16(h)), vcvt_high_f32_f16(h));
#else
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = widen_one(p[i]);
  return v;
#endif
}

static inline void narrow(float* p, vf v) { store(p, v); }
static inline void narrow(Bf16* p, vf v) {
  const vu u = reinterpret_cast<vu>(v);
  const vu nan = reinterpret_cast<vu>((u & 0x7fffffffu) > 0x7f800000u);
  const vu rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  *reinterpret_cast<vh_any*>(p) = __builtin_convertvector((nan & (u >> 16 | 0x40u)) | (~nan & rounded), vh_any);
}
static inline void narrow(F16* p, vf v) {
#if defined(__AVX512F__) && SP_LANES == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__) && SP_LANES == 8
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__aarch64__) && SP_LANES == 8
  const float16x8_t h = vcvt_high_f16_f32(vcvt_f16_f32(half_of<0>(v)), half_of<1>(v));
  vst1q_u16(&p->raw, vreinterpretq_u16_f16(h));
#else
  for (int i = 0; i < kLanes; ++i) narrow_one(p + i, v[i]);
#endif
}

static inline vf root(vf v) {
#if defined(__AVX512F__) && SP_LANES == 16
  return reinterpret_cast<vf>(_mm512_sqrt_ps(reinterpret_cast<__m512>(v)));
#elif defined(__AVX__) && SP_LANES == 8
  return reinterpret_cast<vf>(_mm256_sqrt_ps(reinterpret_cast<__m256>(v)));
#elif defined(__aarch64__) && SP_LANES == 8
  return join(vsqrtq_f32(half_of<0>(v)), vsqrtq_f32(half_of<1>(v)));
#else
  vf r;
  for (int i = 0; i < kLanes; ++i) r[i] = __builtin_sqrtf(v[i]);
  return r;
#endif
}

// Runs body<T>(...) for the storage type that a Dtype names.
#define SP_FOR_DTYPE(dtype, call)                         \
  switch (dtype) {                                        \
    case Dtype::f32: { using T = float; call; } break;    \
    case Dtype::bf16: { using T = Bf16; call; } break;    \
    case Dtype::f16: { using T = F16; call; } break;      \
  }
