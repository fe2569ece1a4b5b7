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
#else
  v8 out{};
  for (int i = 0, next = 0; i < 8; ++i) {
    if (bits >> i & 1) out[i] = packed[next++];
  }
  return out;
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
      const unsigned here = static_cast<unsigned>(bits >> (i * 8)) & 0xff;
      if constexpr (kDtype == kFloat32) out[i] = spread(read<v8>(static_cast<const float*>(values) + at), here);
      if constexpr (kDtype == kBfloat16) out[i] = spread(widen_bf16(static_cast<const uint16_t*>(values) + at), here);
      if constexpr (kDtype == kInt8) out[i] = spread(widen_int8(static_cast<const int8_t*>(values) + at), here);
      at += __builtin_popcount(here);
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
static void spmm_spread(const Packed& w, const float* x, int64_t x_stride, int64_t n, float* y, int64_t y_stride,
                        const Epilogue& e) {
  const int64_t width = (w.columns + 63) / 64 * 64, at_once = 64;
  const int threads = threads_for_cycles(w.rows * width / 16 * (n + Spread::kCycles - 1));
  const bool copied = w.columns != width || n > 1 || Spread::kApart > 1;
  Workspace& shared = shared_workspace();
  float* own_x = copied ? shared.reserve(width * (n < at_once ? n : at_once)) : nullptr;
  for (int64_t t = 0; t < n; t += at_once) {
    const int64_t here = n - t < at_once ? n - t : at_once;
    for (int64_t j = 0; copied && j < here; ++j) {
      __builtin_memcpy(own_x + j * width, x + (t + j) * x_stride, static_cast<size_t>(w.columns) * sizeof(float));
      __builtin_memset(own_x + j * width + w.columns, 0, static_cast<size_t>(width - w.columns) * sizeof(float));
    }
    if (copied) in_order<Spread>(own_x, here * width);
    const float* from = copied ? own_x : x;
#pragma omp parallel num_threads(threads)
    {
      const Range part = share(w.rows, 16, thread_id(), team_size());
      // a few rows at a time, so that their bits and values stay in the cache while the tokens pass
      for (int64_t r = part.begin; r < part.end; r += 16) {
        const int64_t end = r + 16 < part.end ? r + 16 : part.end;
        bitmask_tokens<Spread>(w, from, width, here, r, end, y, y_stride, t, e);
      }
    }
  }
  shared.trim();
}

#if SP_LANES == 16 && defined(__AVX512F__)
// AVX-512: one expand instruction spreads 16 floats, 32 bfloat16 or 64 int8. Shifts then widen the narrow values where they are, so
// that a vector's columns lie 2 or 4 apart. The two narrow instructions are VBMI2, which the tier does not ask for: written as
// assembly they need no flag, and spmm_bitmask asks the CPU.
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

template <int kDtype>
struct ByExpand {
  typedef vf F;
  static constexpr int kSteps = 4, kApart = kDtype == kFloat32 ? 1 : kDtype == kBfloat16 ? 2 : 4;
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
      const __m512i all = expand_bytes(bits, _mm512_loadu_si512(static_cast<const int8_t*>(values) + at));
      out[0] = reinterpret_cast<F>(_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(all, 24), 24)));
      out[1] = reinterpret_cast<F>(_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(all, 16), 24)));
      out[2] = reinterpret_cast<F>(_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(all, 8), 24)));
      out[3] = reinterpret_cast<F>(_mm512_cvtepi32_ps(_mm512_srai_epi32(all, 24)));
    }
    return __builtin_popcountll(bits);
  }
};
#endif

template <template <int> class By>
static void spmm_spread_dtype(const Packed& w, const float* x, int64_t x_stride, int64_t n, float* y, int64_t y_stride,
                              const Epilogue& e) {
  switch (w.values_dtype) {
    case kFloat32: return spmm_spread<By<kFloat32>>(w, x, x_stride, n, y, y_stride, e);
    case kBfloat16: return spmm_spread<By<kBfloat16>>(w, x, x_stride, n, y, y_stride, e);
    default: return spmm_spread<By<kInt8>>(w, x, x_stride, n, y, y_stride, e);
  }
}

static void spmm_bitmask(const Packed& w, const float* x, int64_t x_stride, int64_t n, float* y, int64_t y_stride,
                         const Epilogue& e) {
#if SP_LANES == 16 && defined(__AVX512F__)
  static const bool narrow = __builtin_cpu_supports("avx512vbmi2") != 0;
  if (narrow || w.values_dtype == kFloat32) return spmm_spread_dtype<ByExpand>(w, x, x_stride, n, y, y_stride, e);
#endif
  spmm_spread_dtype<ByTable>(w, x, x_stride, n, y, y_stride, e);
}
