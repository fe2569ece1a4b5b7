// Activations in 8 bits, with a scale and a zero a token. With lo and hi the least and the largest feature of a token, 0 among them:
// inverse = 255 / (hi - lo), scale = (hi - lo) / 255, zero = rint(-lo inverse), u = min(rint(x inverse) + zero, 255); x is about
// (u - zero) scale.
// A rounded panel is [K / 4][T] quads, the scales [T], the zeros [T]; a quad is the bytes u of four neighbouring features, the first
// the lowest. Every tier gives the same bits.

// The floats that a rounded panel of T tokens takes.
static int64_t rounded_floats(int64_t columns, int T) { return (columns / 4 + 2) * T; }
static RoundedPanel rounded_panel(const float* data, int64_t columns, int T) {
  const float* scale = data + columns / 4 * T;
  return {reinterpret_cast<const int32_t*>(data), scale, reinterpret_cast<const int32_t*>(scale + T)};
}

// The nearest integers, ties to the even one. v is within 32 bits, or what comes out means nothing.
static inline vi nearest(vf v) {
#if SP_LANES == 16 && defined(__AVX512F__)
  return reinterpret_cast<vi>(_mm512_cvtps_epi32(reinterpret_cast<__m512>(v)));
#elif SP_LANES == 8 && defined(__AVX2__)
  return reinterpret_cast<vi>(_mm256_cvtps_epi32(reinterpret_cast<__m256>(v)));
#else
  vi n;
  for (int i = 0; i < kLanes; ++i) n[i] = static_cast<int32_t>(__builtin_lrintf(v[i]));
  return n;
#endif
}

// min and max as x86 has them: b where a or b is NaN.
static inline vf least(vf a, vf b) { return floats((bits(a) & (a < b)) | (bits(b) & ~(a < b))); }
static inline vf largest(vf a, vf b) { return floats((bits(a) & (a > b)) | (bits(b) & ~(a > b))); }

// How the lanes' tokens are rounded. A range too small for its inverse counts as none; a token with a feature that is not finite has
// a scale that is NaN, and so have its results.
struct Rounding {
  vf inverse, scale;
  vi zero;
};
static inline Rounding rounding(vf low, vf high, vf not_finite) {
  const vf range = high - low;
  const vi usable = range >= splat(1e-30f);
  Rounding r;
  r.inverse = floats(bits(splat(255.0f) / range) & usable);
  r.scale = floats(bits(range / splat(255.0f)) & usable) + not_finite;
  r.zero = nearest(-low * r.inverse);
  return r;
}

static inline vi rounded(vf x, const Rounding& r) {
  const vi u = nearest(x * r.inverse) + r.zero, over = u > 255;
  return (u & ~over) | (over & 255);
}

// The quads of four rows of floats, `stride` apart.
static inline vi rounded_quad(const float* x, int64_t stride, const Rounding& r) {
  return rounded(load(x), r) | rounded(load(x + stride), r) << 8 | rounded(load(x + 2 * stride), r) << 16 |
         rounded(load(x + 3 * stride), r) << 24;
}

// One vector of lanes: x [columns][stride] -> a rounded panel of T tokens, from its first lane on.
static void round_lanes(const float* x, int64_t stride, int64_t columns, int T, float* panel) {
  vf low[2] = {}, high[2] = {}, bad[2] = {};
  for (int64_t k = 0; k < columns; k += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const vf v = load(x + (k + i) * stride);
      low[i & 1] = least(v, low[i & 1]);
      high[i & 1] = largest(v, high[i & 1]);
      bad[i & 1] += v * 0.0f;
    }
  }
  const Rounding r = rounding(least(low[0], low[1]), largest(high[0], high[1]), bad[0] + bad[1]);
  for (int64_t k = 0; k < columns; k += 4) store_ints(panel + k / 4 * T, rounded_quad(x + k * stride, stride, r));
  store(panel + columns / 4 * T, r.scale);
  store_ints(panel + (columns / 4 + 1) * T, r.zero);
}

// The integers, which are within [0, 255], as bytes.
static inline void store_bytes(uint8_t* p, vi v) {
#if SP_LANES == 8 && defined(__AVX2__)
  const __m256i whole = reinterpret_cast<__m256i>(v);
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
#else
  *reinterpret_cast<vb_any*>(p) = __builtin_convertvector(v, vb_any);
#endif
}

// One token: x [columns] -> bytes [width], its scale and its zero. width: a multiple of 64; what is behind the columns is zero.
static void round_row(const float* x, int64_t columns, int64_t width, uint8_t* bytes, float* scale, int32_t* zero) {
  const int64_t whole = columns / kLanes * kLanes;
  float rest[kLanes] = {};
  for (int64_t k = whole; k < columns; ++k) rest[k - whole] = x[k];
  const vf last = load(rest);
  vf low = least(last, vf{}), high = largest(last, vf{}), bad = last * 0.0f;
  for (int64_t k = 0; k < whole; k += kLanes) {
    const vf v = load(x + k);
    low = least(v, low);
    high = largest(v, high);
    bad += v * 0.0f;
  }
  float least_one = 0.0f, largest_one = 0.0f;
  for (int i = 0; i < kLanes; ++i) {
    least_one = low[i] < least_one ? low[i] : least_one;
    largest_one = high[i] > largest_one ? high[i] : largest_one;
  }
  const Rounding r = rounding(splat(least_one), splat(largest_one), splat(total(bad)));
  for (int64_t k = 0; k < whole; k += kLanes) store_bytes(bytes + k, rounded(load(x + k), r));
  if (whole < width) __builtin_memset(bytes + whole, 0, static_cast<size_t>(width - whole));
  if (whole < columns) {
    uint8_t few[kLanes];
    store_bytes(few, rounded(last, r));
    __builtin_memcpy(bytes + whole, few, static_cast<size_t>(columns - whole));
  }
  *scale = r.scale[0];
  *zero = r.zero[0];
}
