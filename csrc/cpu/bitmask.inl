// y = epilogue(x W^T) for a packed W of kind "bitmask": one bit a column and the kept values of a row in order. For densities of
// about 0.25 to 0.75, where the bits cost less than indices, and for few tokens, where reading W is what takes the time.
//
// A row's bits take `row_bytes` (a multiple of 8: 64 columns). Each step spreads the next values to the places of the set bits of a
// vector's worth of columns and multiplies with x as it lies.

// Spreads the leading floats of `packed` to the lanes whose bit is set; the others become 0. Eight lanes in every tier: a permute by
// table measured 5 cycles for 16 columns on a Zen 4, AVX-512's expand 7.
constexpr int kSpread = 8;
// For each byte of bits and each lane, which packed value it takes; 0x80 where its bit is not set.
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
static inline v8 spread_load(const void* values, int64_t at) {
  if constexpr (kDtype == kFloat32) return read<v8>(static_cast<const float*>(values) + at);
  if constexpr (kDtype == kBfloat16) return widen_bf16(static_cast<const uint16_t*>(values) + at);
  return widen_int8(static_cast<const int8_t*>(values) + at);
}

// Rows [r0, r1) against M tokens whose rows of x are `stride` long and zero-padded to 64 columns.
template <int kDtype, int M>
static void bitmask_rows(const Packed& w, const float* x, int64_t stride, int64_t r0, int64_t r1, float* y, int64_t y_stride,
                         int64_t token, const Epilogue& e) {
  constexpr int U = M >= 4 ? 1 : 4 / M;
  const int64_t row_bytes = (w.columns + 63) / 64 * 8;
  v8 parts[M][8];  // of eight rows, so that their lanes are summed together
  for (int64_t r = r0; r < r1; ++r) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(w.index) + r * row_bytes;
    int64_t at = w.slots[r];
    v8 a[U][M];
    for (int u = 0; u < U; ++u) {
      for (int m = 0; m < M; ++m) a[u][m] = v8{};
    }
    for (int64_t k = 0; k < row_bytes * 8; k += 64) {
      uint64_t bits;
      __builtin_memcpy(&bits, bytes + k / 8, 8);
#pragma GCC unroll 8
      for (int c = 0; c < 64 / kSpread; ++c) {
        const unsigned here = static_cast<unsigned>(bits >> (c * kSpread)) & 0xff;
        const v8 v = spread(spread_load<kDtype>(w.values, at), here);
        at += __builtin_popcount(here);
        for (int m = 0; m < M; ++m) a[c % U][m] += v * read<v8>(x + m * stride + k + c * kSpread);
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int u = 1; u < U; ++u) a[0][m] += a[u][m];
      parts[m][(r - r0) & 7] = a[0][m];
    }
    if (((r - r0) & 7) == 7) {
      for (int m = 0; m < M; ++m) {
        const int64_t out = r - 7;
        write(y + (token + m) * y_stride + out, finish(sums_of_eight(parts[m]), e, token + m, out));
      }
    }
  }
  const int64_t done = r0 + (r1 - r0) / 8 * 8;
  for (int m = 0; m < M && done < r1; ++m) {
    for (int64_t i = r1 - done; i < 8; ++i) parts[m][i] = v8{};
    const v8 sums = sums_of_eight(parts[m]);
    for (int64_t r = done; r < r1; ++r) {
      y[(token + m) * y_stride + r] = finish_one(sums[r - done], e, token + m, r);
    }
  }
}

template <int kDtype>
static void bitmask_tokens(const Packed& w, const float* x, int64_t stride, int64_t n, int64_t r0, int64_t r1, float* y,
                           int64_t y_stride, int64_t token, const Epilogue& e) {
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) bitmask_rows<kDtype, 8>(w, x + j * stride, stride, r0, r1, y, y_stride, token + j, e);
  if (j + 4 <= n) bitmask_rows<kDtype, 4>(w, x + j * stride, stride, r0, r1, y, y_stride, token + j, e), j += 4;
  if (j + 2 <= n) bitmask_rows<kDtype, 2>(w, x + j * stride, stride, r0, r1, y, y_stride, token + j, e), j += 2;
  if (j < n) bitmask_rows<kDtype, 1>(w, x + j * stride, stride, r0, r1, y, y_stride, token + j, e);
}

static void spmm_bitmask(const Packed& w, const float* x, int64_t x_stride, int64_t n, float* y, int64_t y_stride,
                         const Epilogue& e) {
  const int64_t width = (w.columns + 63) / 64 * 64, at_once = 64;
  const int threads = threads_for_cycles(w.rows * width / 16 * (n + 4));
  const bool padded = w.columns != width || n > 1;
  Workspace& shared = shared_workspace();
  float* own_x = padded ? shared.reserve(width * (n < at_once ? n : at_once)) : nullptr;
  for (int64_t t = 0; t < n; t += at_once) {
    const int64_t here = n - t < at_once ? n - t : at_once;
    for (int64_t j = 0; padded && j < here; ++j) {
      __builtin_memcpy(own_x + j * width, x + (t + j) * x_stride, static_cast<size_t>(w.columns) * sizeof(float));
      __builtin_memset(own_x + j * width + w.columns, 0, static_cast<size_t>(width - w.columns) * sizeof(float));
    }
    const float* from = padded ? own_x : x;
#pragma omp parallel num_threads(threads)
    {
      const Range part = share(w.rows, 16, thread_id(), team_size());
      // a few rows at a time, so that their bits and values stay in the cache while the tokens pass
      for (int64_t r = part.begin; r < part.end; r += 16) {
        const int64_t end = r + 16 < part.end ? r + 16 : part.end;
        switch (w.values_dtype) {
          case kFloat32: bitmask_tokens<kFloat32>(w, from, width, here, r, end, y, y_stride, t, e); break;
          case kBfloat16: bitmask_tokens<kBfloat16>(w, from, width, here, r, end, y, y_stride, t, e); break;
          default: bitmask_tokens<kInt8>(w, from, width, here, r, end, y, y_stride, t, e);
        }
      }
    }
  }
  shared.trim();
}
