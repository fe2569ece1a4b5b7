// y = x W^T + bias for a dense W held in bfloat16: for the few tokens of a step, where reading W is what takes the time, as in the
// head of a language model. Sums are float32; each pass over W serves up to four tokens.

#if SP_LANES == 16 && defined(__AVX512F__)
typedef vf RoundedVector;
static inline vf widen_row(const uint16_t* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return reinterpret_cast<vf>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
#else
typedef v8 RoundedVector;
static inline v8 widen_row(const uint16_t* p) { return widen_bf16(p); }
#endif

// Rows [r0, r1), M tokens.
template <int M>
static void rounded_rows(const uint16_t* w, int64_t columns, const float* x, int64_t x_stride, int64_t r0, int64_t r1,
                         const float* bias, float* y, int64_t y_stride) {
  typedef RoundedVector F;
  constexpr int L = lanes_of<F>(), U = 4 / M;
  for (int64_t first = r0; first < r1; first += 8) {
    const int here = static_cast<int>(r1 - first < 8 ? r1 - first : 8);
    v8 parts[M][8] = {};  // of eight rows, so that their lanes are summed together
    float rest[M][8] = {};
    for (int i = 0; i < here; ++i) {
      const uint16_t* row = w + (first + i) * columns;
      F sum[U][M] = {};
      int64_t k = 0;
      for (; k + U * L <= columns; k += U * L) {
        __builtin_prefetch(row + k + 2048);
#pragma GCC unroll 4
        for (int u = 0; u < U; ++u) {
          const F v = widen_row(row + k + u * L);
          for (int m = 0; m < M; ++m) sum[u][m] += v * read<F>(x + m * x_stride + k + u * L);
        }
      }
      for (int m = 0; m < M; ++m) {
        for (int u = 1; u < U; ++u) sum[0][m] += sum[u][m];
        parts[m][i] = halves_sum(sum[0][m]);
      }
      for (; k < columns; ++k) {
        const float v = float_of_bits(static_cast<uint32_t>(row[k]) << 16);
        for (int m = 0; m < M; ++m) rest[m][i] += v * x[m * x_stride + k];
      }
    }
    for (int m = 0; m < M; ++m) {
      const v8 sums = lane_sums<8>(parts[m]) + read<v8>(rest[m]);
      for (int i = 0; i < here; ++i) y[m * y_stride + first + i] = sums[i] + (bias ? bias[first + i] : 0.0f);
    }
  }
}

static void rounded_linear(const uint16_t* w, int64_t rows, int64_t columns, const float* x, int64_t x_stride, int64_t n,
                           const float* bias, float* y) {
  const int threads = threads_for_cycles(rows * columns / 2 * ((n + 3) / 4));
#pragma omp parallel num_threads(threads)
  {
    const Range part = share(rows, 8, thread_id(), team_size());
    int64_t t = 0;
    for (; t + 4 <= n; t += 4) {
      rounded_rows<4>(w, columns, x + t * x_stride, x_stride, part.begin, part.end, bias, y + t * rows, rows);
    }
    if (t + 2 <= n) {
      rounded_rows<2>(w, columns, x + t * x_stride, x_stride, part.begin, part.end, bias, y + t * rows, rows);
      t += 2;
    }
    if (t < n) rounded_rows<1>(w, columns, x + t * x_stride, x_stride, part.begin, part.end, bias, y + t * rows, rows);
  }
}

static DecodeKernels decode_kernels() { return {rms_norm, rounded_linear}; }
