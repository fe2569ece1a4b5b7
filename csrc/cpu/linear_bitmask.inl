// y = epilogue(x W^T) for a packed W of kind "bitmask": one bit a column and the kept values of a row in order. For densities of
// about 0.25 to 0.75, where the bits cost less than indices, and for few tokens, where reading W is what takes the time.
//
// A row's bits take `row_bytes` (a multiple of 8: 64 columns). Each step spreads the next values to the places of the set bits of a
// vector's worth of columns and multiplies with x. What spreads is a policy with these members:
//   F, kSteps     the vector of columns of one step, and how many make 64 columns
//   kApart        neighbours in a vector are columns that lie kApart apart; in_order lays x out alike
//   kCycles       about how many cycles 16 columns take at one token
//   kBytes        of a value
//   sixty_four    the values from place `at` on, spread to the set bits: kSteps vectors; returns how many values that were

constexpr int value_bytes(int dtype) { return dtype == kFloat32 ? 4 : dtype == kBfloat16 ? 2 : 1; }

// Every tier: a permute whose lanes a table gives for each byte of bits; 0x80 where a bit is not set.
struct SpreadTable {
  uint8_t lane[256][8];
  constexpr SpreadTable() : lane() {
    for (int bits = 0; bits < 256; ++bits) {
      uint8_t next = 0;
      for (int i = 0; i < 8; ++i) lane[bits][i] = bits >> i & 1 ? next++ : uint8_t{0x80};
    }
  }
};
static constexpr SpreadTable kSpreadTable;
static inline v8 spread(v8 packed, unsigned bits) {
#if defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSpreadTable.lane[bits]));
  const __m256i lanes = _mm256_cvtepi8_epi32(bytes);
  const __m256 spreaded = _mm256_permutevar8x32_ps(reinterpret_cast<__m256>(packed), lanes);
  return reinterpret_cast<v8>(_mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(lanes, 31)), spreaded));
#elif defined(__aarch64__)
  // Byte 0 of lane n is byte 4 n of the eight floats; a byte that no float has, as 0x80 gives, is zero.
  const uint8x16x2_t bytes = {{vreinterpretq_u8_f32(half_of<0>(packed)), vreinterpretq_u8_f32(half_of<1>(packed))}};
  const uint8x8_t lanes = vld1_u8(kSpreadTable.lane[bits]);
  const uint8x8_t starts = vorr_u8(vshl_n_u8(lanes, 2), vand_u8(lanes, vdup_n_u8(0x80)));
  const uint8x16_t four = vreinterpretq_u8_u32(vdupq_n_u32(0x03020100));
  const auto four_bytes = [&](uint8x8_t four_lanes) __attribute__((always_inline)) {
    const uint32x4_t wide = vmulq_n_u32(vmovl_u16(vget_low_u16(vmovl_u8(four_lanes))), 0x01010101u);
    return vreinterpretq_f32_u8(vqtbl2q_u8(bytes, vorrq_u8(vreinterpretq_u8_u32(wide), four)));
  };
  return join(four_bytes(starts), four_bytes(vext_u8(starts, starts, 4)));
#else
  v8 out{};
  for (int i = 0, next = 0; i < 8; ++i) {
    if (bits >> i & 1) out[i] = packed[next++];
  }
  return out;
#endif
}

// Narrow values are spread before they are widened: a shuffle of bytes is cheaper than one of floats, and makes zeros itself.
// `entry`: 16 * the byte of bits.
struct WordTable {  // two bytes a column, as kByteTables.low has one
  alignas(64) uint8_t byte[256][16];
  constexpr WordTable() : byte() {
    for (int bits = 0; bits < 256; ++bits) {
      uint8_t next = 0;
      for (int i = 0; i < 8; ++i) {
        const bool kept = bits >> i & 1;
        byte[bits][2 * i] = kept ? next++ : uint8_t{0x80};
        byte[bits][2 * i + 1] = kept ? next++ : uint8_t{0x80};
      }
    }
  }
};
static constexpr WordTable kWordTable;
static inline v8 spread_bf16(const uint16_t* p, unsigned entry) {
  const uint8_t* table = &kWordTable.byte[0][0] + entry;
#if defined(__AVX2__)
  const __m128i lanes = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
  const __m128i words = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), lanes);
  return reinterpret_cast<v8>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
#elif defined(__aarch64__)
  const uint16x8_t words = vreinterpretq_u16_u8(vqtbl1q_u8(vreinterpretq_u8_u16(vld1q_u16(p)), vld1q_u8(table)));
  return join(vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(words), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(words, 16)));
#else
  (void)table;
  return spread(widen_bf16(p), entry / 16);
#endif
}
static inline v8 spread_int8(const int8_t* p, unsigned entry) {
  const uint8_t* table = &kByteTables.low[0][0] + entry;
#if defined(__AVX2__)
  const __m128i lanes = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
  const __m128i bytes = _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), lanes);
  return reinterpret_cast<v8>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
#elif defined(__aarch64__)
  const int16x8_t words = vmovl_s8(vtbl1_s8(vld1_s8(p), vld1_s8(reinterpret_cast<const int8_t*>(table))));
  return join(vcvtq_f32_s32(vmovl_s16(vget_low_s16(words))), vcvtq_f32_s32(vmovl_high_s16(words)));
#else
  (void)table;
  return spread(widen_int8(p), entry / 16);
#endif
}

template <int kDtype>
struct ByTable {
  typedef v8 F;
  static constexpr int kSteps = 8, kApart = 1, kCycles = 6, kBytes = value_bytes(kDtype);
  static inline int64_t sixty_four(const void* values, int64_t at, uint64_t bits, F* out) {
    const int64_t first = at;
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      if constexpr (kDtype == kFloat32) {
        const unsigned here = static_cast<unsigned>(bits >> (i * 8)) & 0xff;
        out[i] = spread(read<v8>(static_cast<const float*>(values) + at), here);
        at += __builtin_popcount(here);
      } else {
        const unsigned entry = static_cast<unsigned>(i == 0 ? bits << 4 : bits >> (i * 8 - 4)) & 0xff0;
        if constexpr (kDtype == kBfloat16) out[i] = spread_bf16(static_cast<const uint16_t*>(values) + at, entry);
        if constexpr (kDtype == kInt8) out[i] = spread_int8(static_cast<const int8_t*>(values) + at, entry);
        at += __builtin_popcount(entry);
      }
    }
    return at - first;
  }
};

// Rows [r0, r1) against M tokens whose rows of x are `stride` long, zero-padded to 64 columns and in the policy's order.
template <class Spread, int M>
static void bitmask_rows(const Packed& w, const float* x, int64_t stride, int64_t r0, int64_t r1, float* y, int64_t y_stride,
                         int64_t token, const Epilogue& e) {
  typedef typename Spread::F F;
  constexpr int L = lanes_of<F>(), U = M >= 4 ? 1 : 4 / M, kBytes = Spread::kBytes;
  const int64_t row_bytes = (w.columns + 63) / 64 * 8;
  v8 parts[M][8];  // of eight rows, so that their lanes are summed together
  for (int64_t r = r0; r < r1; ++r) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(w.index) + r * row_bytes;
    int64_t at = w.slots[r];
    F a[U][M];
    for (int u = 0; u < U; ++u) {
      for (int m = 0; m < M; ++m) a[u][m] = F{};
    }
    for (int64_t k = 0; k < row_bytes * 8; k += 64) {
      uint64_t bits;
      __builtin_memcpy(&bits, bytes + k / 8, 8);
      // the hardware stops at each page, and a row's end is no end of the values
      if ((k & 448) == 0) __builtin_prefetch(bytes + k / 8 + 512);
      const char* ahead = static_cast<const char*>(w.values) + at * kBytes + 2048;
      __builtin_prefetch(ahead);
      if constexpr (kBytes == 4) __builtin_prefetch(ahead + 64);
      F v[Spread::kSteps];
      at += Spread::sixty_four(w.values, at, bits, v);
#pragma GCC unroll 8
      for (int i = 0; i < Spread::kSteps; ++i) {
        for (int m = 0; m < M; ++m) a[i % U][m] += v[i] * read<F>(x + m * stride + k + i * L);
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int u = 1; u < U; ++u) a[0][m] += a[u][m];
      parts[m][(r - r0) & 7] = halves_sum(a[0][m]);
    }
    if (((r - r0) & 7) == 7) {
      for (int m = 0; m < M; ++m) {
        const int64_t out = r - 7;
        write(y + (token + m) * y_stride + out, finish(lane_sums<8>(parts[m]), e, token + m, out));
      }
    }
  }
  const int64_t done = r0 + (r1 - r0) / 8 * 8;
  for (int m = 0; m < M && done < r1; ++m) {
    for (int64_t i = r1 - done; i < 8; ++i) parts[m][i] = v8{};
    const v8 sums = lane_sums<8>(parts[m]);
    for (int64_t r = done; r < r1; ++r) {
      y[(token + m) * y_stride + r] = finish_one(sums[r - done], e, token + m, r);
    }
  }
}

// Puts `count` floats of x into the policy's order: of each kApart vectors, the first gets the columns 0, kApart, 2 kApart ...
template <class Spread>
static void in_order(float* x, int64_t count) {
  if constexpr (Spread::kApart > 1) {
    constexpr int A = Spread::kApart, L = lanes_of<typename Spread::F>();
    float old[A * L];
    for (int64_t i = 0; i < count; i += A * L) {
      __builtin_memcpy(old, x + i, sizeof(old));
      for (int j = 0; j < A * L; ++j) x[i + j] = old[j % L * A + j / L];
    }
  }
}

template <class Spread>
static void bitmask_tokens(const Packed& w, const float* x, int64_t stride, int64_t n, int64_t r0, int64_t r1, float* y,
                           int64_t y_stride, int64_t token, const Epilogue& e) {
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) bitmask_rows<Spread, 8>(w, x + j * stride, stride, r0, r1, y, y_stride, token + j, e);
  if (j + 4 <= n) bitmask_rows<Spread, 4>(w, x + j * stride, stride, r0, r1, y, y_stride, token + j, e), j += 4;
  if (j + 2 <= n) bitmask_rows<Spread, 2>(w, x + j * stride, stride, r0, r1, y, y_stride, token + j, e), j += 2;
  if (j < n) bitmask_rows<Spread, 1>(w, x + j * stride, stride, r0, r1, y, y_stride, token + j, e);
}

template <class Spread>
static void linear_spread(const Packed& w, const float* x, int64_t x_stride, int64_t n, float* y, int64_t y_stride,
                        const Epilogue& e) {
  const int64_t width = (w.columns + 63) / 64 * 64, at_once = 64;
  const int threads = threads_for_cycles(w.rows * width / 16 * (n + Spread::kCycles - 1));
  const bool copied = w.columns != width || n > 1 || Spread::kApart > 1;
  const int64_t units = (w.rows + 15) / 16;
  Workspace& shared = shared_workspace();
  for (int64_t t = 0; t < n; t += at_once) {
    const int64_t here = n - t < at_once ? n - t : at_once;
    Turns* turns = turns_in(shared, threads, copied ? here * width : 0);
    float* own_x = reinterpret_cast<float*>(turns + threads);
    for (int64_t j = 0; copied && j < here; ++j) {
      __builtin_memcpy(own_x + j * width, x + (t + j) * x_stride, static_cast<size_t>(w.columns) * sizeof(float));
      __builtin_memset(own_x + j * width + w.columns, 0, static_cast<size_t>(width - w.columns) * sizeof(float));
    }
    if (copied) in_order<Spread>(own_x, here * width);
    const float* from = copied ? own_x : x;
    Ending ending;
#pragma omp parallel num_threads(threads)
    {
      // a few rows at a time, so that their bits and values stay in the cache while the tokens pass
      take_runs(turns, units, [&](int64_t u) {
        const int64_t r = u * 16, end = r + 16 < w.rows ? r + 16 : w.rows;
        bitmask_tokens<Spread>(w, from, width, here, r, end, y, y_stride, t, e);
      });
      ending.leave();
    }
  }
  shared.trim();
}

#if SP_LANES == 16 && defined(__AVX512F__)
// AVX-512: one expand instruction spreads 16 floats or 32 bfloat16, which shifts then widen where they are, so that a vector's columns
// lie 2 apart. 64 int8 would take fourteen more to be widened; spread by tables, 16 at a time, they take eight. linear_bitmask asks
// the CPU whether it expands bfloat16.
template <int kDtype>
struct ByExpand {
  typedef vf F;
  static constexpr int kSteps = 4, kApart = kDtype == kBfloat16 ? 2 : 1;
  static constexpr int kCycles = 2, kBytes = value_bytes(kDtype);
  static inline __attribute__((always_inline)) int64_t sixty_four(const void* values, int64_t at, uint64_t bits, F* out) {
    if constexpr (kDtype == kFloat32) {
      const float* from = static_cast<const float*>(values) + at;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const unsigned here = static_cast<unsigned>(bits >> (i * 16)) & 0xffff;
        out[i] = reinterpret_cast<F>(_mm512_maskz_expand_ps(static_cast<__mmask16>(here), _mm512_loadu_ps(from)));
        from += __builtin_popcount(here);
      }
    } else if constexpr (kDtype == kBfloat16) {
      const uint16_t* from = static_cast<const uint16_t*>(values) + at;
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const uint32_t here = static_cast<uint32_t>(bits >> (i * 32));
        const __m512i all = expand_words(here, _mm512_loadu_si512(from));
        out[2 * i] = reinterpret_cast<F>(_mm512_slli_epi32(all, 16));
        out[2 * i + 1] = reinterpret_cast<F>(_mm512_and_si512(all, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
        from += __builtin_popcount(here);
      }
    } else {
      const int8_t* from = static_cast<const int8_t*>(values) + at;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const uint32_t here = static_cast<uint32_t>(bits >> (i * 16));
        out[i] = reinterpret_cast<F>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(spread_16(from, here))));
        from += count_bits(here & 0xffff);
      }
    }
    return __builtin_popcountll(bits);
  }
};
#endif

template <template <int> class By>
static void linear_spread_dtype(const Packed& w, const float* x, int64_t x_stride, int64_t n, float* y, int64_t y_stride,
                              const Epilogue& e) {
  switch (w.values_dtype) {
    case kFloat32: return linear_spread<By<kFloat32>>(w, x, x_stride, n, y, y_stride, e);
    case kBfloat16: return linear_spread<By<kBfloat16>>(w, x, x_stride, n, y, y_stride, e);
    default: return linear_spread<By<kInt8>>(w, x, x_stride, n, y, y_stride, e);
  }
}

static void linear_bitmask(const Packed& w, const float* x, int64_t x_stride, int64_t n, float* y, int64_t y_stride,
                         const Epilogue& e) {
#if SP_LANES == 16 && defined(__AVX512F__)
  if (w.values_dtype != kBfloat16 || has_narrow_expand()) return linear_spread_dtype<ByExpand>(w, x, x_stride, n, y, y_stride, e);
#endif
  linear_spread_dtype<ByTable>(w, x, x_stride, n, y, y_stride, e);
}
