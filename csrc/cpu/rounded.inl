// y = x W^T * scale + bias for a dense W held in float32, bfloat16 or int8: for the few tokens of a step, where reading W is what takes
// the time, as in the head of a language model. Sums are float32; each pass over W serves up to four tokens.

#if SP_LANES == 16 && defined(__AVX512F__)
typedef vf WholeVector;
static inline vf widen_whole(const float* p) { return load(p); }
static inline vf widen_whole(const uint16_t* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return reinterpret_cast<vf>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
static inline vf widen_whole(const int8_t* p) {
  return reinterpret_cast<vf>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
}
#else
typedef v8 WholeVector;
static inline v8 widen_whole(const float* p) { return read<v8>(p); }
static inline v8 widen_whole(const uint16_t* p) { return widen_bf16(p); }
static inline v8 widen_whole(const int8_t* p) { return widen_int8(p); }
#endif
static inline float whole_one(float v) { return v; }
static inline float whole_one(uint16_t v) { return float_of_bits(static_cast<uint32_t>(v) << 16); }
static inline float whole_one(int8_t v) { return static_cast<float>(v); }

// Outputs [r0, r1), r0 a multiple of 8, for M rows of x.
template <class V, int M>
static void whole_rows(const V* w, int64_t columns, const float* x, int64_t x_stride, int64_t r0, int64_t r1, float* y,
                       int64_t y_stride, int64_t token, const Epilogue& e) {
  typedef WholeVector F;
  constexpr int L = lanes_of<F>(), U = M >= 4 ? 1 : 4 / M;
  for (int64_t first = r0; first < r1; first += 8) {
    const int here = static_cast<int>(r1 - first < 8 ? r1 - first : 8);
    v8 parts[M][8] = {};
    float rest[M][8] = {};
    for (int i = 0; i < here; ++i) {
      const V* row = w + (first + i) * columns;
      F sum[U][M] = {};
      int64_t k = 0;
      for (; k + U * L <= columns; k += U * L) {
        __builtin_prefetch(reinterpret_cast<const char*>(row + k) + 4096);
#pragma GCC unroll 4
        for (int u = 0; u < U; ++u) {
          const F v = widen_whole(row + k + u * L);
          for (int m = 0; m < M; ++m) sum[u][m] += v * read<F>(x + m * x_stride + k + u * L);
        }
      }
      for (int m = 0; m < M; ++m) {
        for (int u = 1; u < U; ++u) sum[0][m] += sum[u][m];
        parts[m][i] = halves_sum(sum[0][m]);
      }
      for (; k < columns; ++k) {
        for (int m = 0; m < M; ++m) rest[m][i] += whole_one(row[k]) * x[m * x_stride + k];
      }
    }
    for (int m = 0; m < M; ++m) {
      const v8 sums = lane_sums<8>(parts[m]) + read<v8>(rest[m]);
      if (here == 8) {
        write(y + (token + m) * y_stride + first, finish(sums, e, token + m, first));
      } else {
        for (int i = 0; i < here; ++i) y[(token + m) * y_stride + first + i] = finish_one(sums[i], e, token + m, first + i);
      }
    }
  }
}

template <class V>
static void whole_piece(const V* values, int64_t columns, const float* x, int64_t x_stride, int64_t n, int64_t r0, int64_t r1, float* y,
                        int64_t y_stride, const Epilogue& e) {
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) whole_rows<V, 4>(values, columns, x + j * x_stride, x_stride, r0, r1, y, y_stride, j, e);
  if (j + 2 <= n) whole_rows<V, 2>(values, columns, x + j * x_stride, x_stride, r0, r1, y, y_stride, j, e), j += 2;
  if (j < n) whole_rows<V, 1>(values, columns, x + j * x_stride, x_stride, r0, r1, y, y_stride, j, e);
}

// The same for whatever dtype the values have.
static void whole_piece(const void* w, int dtype, int64_t columns, const float* x, int64_t x_stride, int64_t n, int64_t r0, int64_t r1,
                        float* y, int64_t y_stride, const Epilogue& e) {
  switch (dtype) {
    case kFloat32: return whole_piece(static_cast<const float*>(w), columns, x, x_stride, n, r0, r1, y, y_stride, e);
    case kBfloat16: return whole_piece(static_cast<const uint16_t*>(w), columns, x, x_stride, n, r0, r1, y, y_stride, e);
    default: return whole_piece(static_cast<const int8_t*>(w), columns, x, x_stride, n, r0, r1, y, y_stride, e);
  }
}

static void rounded_linear(const void* w, int dtype, const float* scale, int64_t rows, int64_t columns, const float* x, int64_t x_stride,
                           int64_t n, const float* bias, float* y) {
  const int threads = threads_for_cycles(rows * columns / 2 * ((n + 3) / 4));
  const Epilogue e = {scale, bias, nullptr, 0, kNone};
#pragma omp parallel num_threads(threads)
  {
    const Range part = share(rows, 8, thread_id(), team_size());
    whole_piece(w, dtype, columns, x, x_stride, n, part.begin, part.end, y, rows, e);
  }
}

static RoundedKernels rounded_kernels() { return {rounded_linear}; }
