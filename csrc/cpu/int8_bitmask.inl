// Products of int8 weights of kind "bitmask8" with activations in 8 bits: for few tokens, where reading W is what takes the time. The
// arithmetic, and the rules that keep it exact, are those of int8.inl; so are the bits.
//
// A row is one bit a column and the kept values in order, as in kind "bitmask". Each step spreads the values of 64 columns to their
// places, as bytes, and multiplies them with the bytes of x in fours. Compiled also by tiers/avx512vnni.cpp, as int8.inl is.

// What 16 columns take of 16 bytes, by their two bytes of bits: the sum of low[first byte] and high[second byte]. Its bytes are places
// of values, or at least 0x80, which shuffles take for zero, where a bit is not set.
struct ByteTables {
  alignas(64) uint8_t low[256][16];
  alignas(64) uint8_t high[256][16];
  constexpr ByteTables() : low(), high() {
    for (int bits = 0; bits < 256; ++bits) {
      uint8_t next = 0;
      for (int i = 0; i < 8; ++i) low[bits][i] = high[bits][8 + i] = bits >> i & 1 ? next++ : uint8_t{0x80};
      for (int i = 0; i < 8; ++i) low[bits][8 + i] = next;
    }
  }
};
static constexpr ByteTables kByteTables;

static inline int count_bits(uint64_t bits) { return __builtin_popcountll(bits); }

constexpr int kByteVectors = 64 / static_cast<int>(sizeof(vi));  // that 64 columns take

// The values from p on at the set bits of 64 columns. Reads up to 64 bytes.
#if defined(__AVX2__)
static inline __m128i table_entry(const uint8_t (&table)[256][16], uint32_t place) {  // of the byte at bit 4 of place
  return _mm_load_si128(reinterpret_cast<const __m128i*>(&table[0][0] + (place & 0xff0)));
}
static inline __m128i spread_16(const int8_t* p, uint32_t bits) {
  const __m128i low = table_entry(kByteTables.low, bits << 4), high = table_entry(kByteTables.high, bits >> 4);
  return _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), _mm_add_epi8(low, high));
}
static inline __m256i spread_32(const int8_t* p, uint32_t bits) {
  const __m256i low = _mm256_set_m128i(table_entry(kByteTables.low, bits >> 12), table_entry(kByteTables.low, bits << 4));
  const __m256i high = _mm256_set_m128i(table_entry(kByteTables.high, bits >> 20), table_entry(kByteTables.high, bits >> 4));
  const __m256i values = _mm256_set_m128i(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + count_bits(bits & 0xffff))),
                                          _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_shuffle_epi8(values, _mm256_add_epi8(low, high));
}
static inline __attribute__((always_inline)) void spread_bytes(const int8_t* p, uint64_t bits, vi* out) {
  const uint32_t first = static_cast<uint32_t>(bits);
  const __m256i a = spread_32(p, first), b = spread_32(p + count_bits(first), static_cast<uint32_t>(bits >> 32));
#if SP_LANES == 8
  out[0] = reinterpret_cast<vi>(a);
  out[1] = reinterpret_cast<vi>(b);
#elif defined(__AVX512F__)
  out[0] = reinterpret_cast<vi>(_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
#else
  const __m256i both[2] = {a, b};
  __builtin_memcpy(out, both, sizeof(both));
#endif
}
#elif defined(__aarch64__)
static inline void spread_bytes(const int8_t* p, uint64_t bits, vi* out) {
  uint8x16_t parts[4];
  for (auto& part : parts) {
    const unsigned first = bits & 0xff, second = bits >> 8 & 0xff;
    part = vqtbl1q_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(p)), vaddq_u8(vld1q_u8(kByteTables.low[first]), vld1q_u8(kByteTables.high[second])));
    p += count_bits(bits & 0xffff);
    bits >>= 16;
  }
  __builtin_memcpy(out, parts, sizeof(parts));
}
#else
static inline void spread_bytes(const int8_t* p, uint64_t bits, vi* out) {
  int8_t bytes[64];
  for (int i = 0; i < 64; ++i) {
    const int kept = static_cast<int>(bits >> i & 1);
    bytes[i] = static_cast<int8_t>(kept ? *p : 0);
    p += kept;
  }
  __builtin_memcpy(out, bytes, sizeof(bytes));
}
#endif

static inline int32_t total_of(vi v) {
#if SP_LANES == 16 && defined(__AVX512F__)
  return _mm512_reduce_add_epi32(reinterpret_cast<__m512i>(v));
#else
  int32_t lanes[kLanes];
  store_ints(lanes, v);
  for (int half = kLanes / 2; half >= 1; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
#endif
}

// kExpand: one instruction spreads 64 columns, which the CPU must have.
template <bool kExpand, int M>
static void byte_rows(const Packed& w, int64_t r0, int64_t r1, const RoundedRows& x, float* sums) {
  const int64_t row_bytes = x.width / 8, count = r1 - r0;
  const int8_t* values = static_cast<const int8_t*>(w.values);
  int32_t totals[M][16];
  for (int64_t r = r0; r < r1; ++r) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(w.index) + r * row_bytes;
    const int8_t* p = values + w.slots[r];
    vi a[M][kByteVectors] = {};
    for (int64_t k = 0; k < x.width; k += 64) {
      uint64_t bits;
      __builtin_memcpy(&bits, bytes + k / 8, 8);
      if ((k & 448) == 0) __builtin_prefetch(bytes + k / 8 + 512);  // as linear_bitmask.inl
      __builtin_prefetch(p + 2048);
      vi v[kByteVectors];
#if SP_LANES == 16 && defined(__AVX512F__)
      if constexpr (kExpand) v[0] = reinterpret_cast<vi>(expand_bytes(bits, _mm512_loadu_si512(p)));
#endif
      if constexpr (!kExpand) {
        if (bits == ~uint64_t{0}) {  // as in a weight that keeps its zeros
          __builtin_memcpy(v, p, sizeof(v));
        } else {
          spread_bytes(p, bits, v);
        }
      }
      p += count_bits(bits);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int i = 0; i < kByteVectors; ++i) {
          a[m][i] = add_quads(a[m][i], load_ints(x.bytes + m * x.width + k + i * static_cast<int>(sizeof(vi))), v[i]);
        }
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int i = 1; i < kByteVectors; ++i) a[m][0] += a[m][i];
      totals[m][r - r0] = total_of(a[m][0]);
    }
  }
  const float *scale = w.scale + r0, *row_sum = w.scale + w.rows + r0;
  for (int m = 0; m < M; ++m) {
    for (int64_t i = 0; i < count; ++i) {
      const int32_t sum = totals[m][i] - x.zero[m] * static_cast<int32_t>(row_sum[i]);
      sums[m * count + i] = static_cast<float>(sum) * (x.scale[m] * scale[i]);
    }
  }
}

template <bool kExpand>
static void byte_rows(const Packed& w, int64_t r0, int64_t r1, int tokens, const RoundedRows& x, float* sums) {
  switch (tokens) {
    case 1: return byte_rows<kExpand, 1>(w, r0, r1, x, sums);
    case 2: return byte_rows<kExpand, 2>(w, r0, r1, x, sums);
    case 4: return byte_rows<kExpand, 4>(w, r0, r1, x, sums);
    default: return byte_rows<kExpand, 8>(w, r0, r1, x, sums);
  }
}

static void byte_rows(const Packed& w, int64_t r0, int64_t r1, int tokens, const RoundedRows& x, float* sums) {
#if SP_LANES == 16 && defined(__AVX512F__)
  if (has_narrow_expand()) return byte_rows<true>(w, r0, r1, tokens, x, sums);
#endif
  byte_rows<false>(w, r0, r1, tokens, x, sums);
}

static Int8Kernels int8_kernels() { return {quad_block, byte_rows}; }
