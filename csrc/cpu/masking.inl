// Masking: one pass over memory each. Masks are bool bytes, 1 = kept; what is not kept becomes exactly 0, whatever it held.

constexpr int64_t kMaskGrain = 1 << 15;  // elements below which another thread costs more than it gains

static void apply_mask_f32(float* w, const uint8_t* mask, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(w + i, floats(bits(load(w + i)) & widen_bool(mask + i)));
  for (; i < n; ++i) w[i] = mask[i] ? w[i] : 0.0f;
}

static void apply_mask_half(uint16_t* w, const uint8_t* mask, int64_t n) {
  typedef int16_t vs __attribute__((vector_size(SP_LANES * 2), aligned(2), may_alias));
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const vs keep = __builtin_convertvector(*reinterpret_cast<const vb_any*>(mask + i), vs) != 0;
    *reinterpret_cast<vs*>(w + i) &= keep;
  }
  for (; i < n; ++i) w[i] = mask[i] ? w[i] : 0;
}

static void apply_mask(void* w, const uint8_t* mask, int64_t n, int bytes) {
  const int threads = threads_for(n, kMaskGrain);
#pragma omp parallel num_threads(threads)
  {
    const Range part = share(n, 64, thread_id(), team_size());
    const int64_t count = part.end - part.begin;
    if (bytes == 4) {
      apply_mask_f32(static_cast<float*>(w) + part.begin, mask + part.begin, count);
    } else {
      apply_mask_half(static_cast<uint16_t*>(w) + part.begin, mask + part.begin, count);
    }
  }
}

// Outputs too large to be found in a cache afterwards are written past it, which saves reading them first.
constexpr int64_t kStreamBytes = 24 << 20;

static inline void put(float* p, vi v, bool stream) {
#if defined(__AVX512F__) && SP_LANES == 16
  if (stream) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
#elif defined(__AVX2__) && SP_LANES == 8
  if (stream) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
#else
  (void)stream;
#endif
  store(p, floats(v));
}
static inline void put_fence() {
#if defined(__SSE2__)
  __builtin_ia32_sfence();
#endif
}

static void masked_copy(const void* w, const uint8_t* mask, void* out, int64_t n, int bytes) {
  const int threads = threads_for(n, kMaskGrain);
  const bool stream = n * bytes > kStreamBytes && reinterpret_cast<uintptr_t>(out) % 64 == 0;
#pragma omp parallel num_threads(threads)
  {
    const Range part = share(n, 64, thread_id(), team_size());
    int64_t i = part.begin;
    if (bytes == 4) {
      const float* from = static_cast<const float*>(w);
      float* to = static_cast<float*>(out);
      for (; i + kLanes <= part.end; i += kLanes) put(to + i, bits(load(from + i)) & widen_bool(mask + i), stream);
      for (; i < part.end; ++i) to[i] = mask[i] ? from[i] : 0.0f;
      if (stream) put_fence();
    } else if (i < part.end) {  // an empty tensor has no address to copy from
      uint16_t* to = static_cast<uint16_t*>(out) + i;
      memcpy(to, static_cast<const uint16_t*>(w) + i, static_cast<size_t>(part.end - i) * 2);
      apply_mask_half(to, mask + i, part.end - i);
    }
  }
}

// Narrows lanes of 0 and -1 to bytes of 0 and 1.
static inline void store_bool(uint8_t* p, vi keep) {
#if defined(__AVX512F__) && SP_LANES == 16
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_sub_epi32(_mm512_setzero_si512(), reinterpret_cast<__m512i>(keep))));
#elif defined(__AVX2__) && SP_LANES == 8
  const __m256i k = reinterpret_cast<__m256i>(keep);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(k), _mm256_extracti128_si256(k, 1));
  const __m128i bytes = _mm_sub_epi8(_mm_setzero_si128(), _mm_packs_epi16(words, words));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), bytes);
#elif defined(__aarch64__) && SP_LANES == 8
  int32x4_t k[2];
  __builtin_memcpy(k, &keep, sizeof(keep));
  const int16x8_t words = vcombine_s16(vmovn_s32(k[0]), vmovn_s32(k[1]));
  vst1_u8(p, vreinterpret_u8_s8(vneg_s8(vmovn_s16(words))));
#else
  *reinterpret_cast<vb_any*>(p) = __builtin_convertvector(keep & 1, vb_any);
#endif
}

static inline int64_t sum_lanes(vi v) {
  int64_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

template <class T>
static void threshold_part(const T* w, float limit, uint8_t* mask, T* out, Range part, bool stream, int64_t* count, int64_t* nans) {
  const vf level = splat(limit);
  int64_t i = part.begin, kept = 0, nan = 0;
  while (i + kLanes <= part.end) {
    vi many = {}, bad = {};
    const int64_t stop = part.end - i > (1 << 20) ? i + (1 << 20) : part.end;  // 32-bit lanes cannot overflow
    for (; i + kLanes <= stop; i += kLanes) {
      const vf v = widen(w + i);
      const vi keep = floats(bits(v) & 0x7fffffff) >= level;
      many -= keep;
      bad -= v != v;
      store_bool(mask + i, keep);
      if constexpr (sizeof(T) == 4) {
        put(out + i, bits(v) & keep, stream);
      } else {
        narrow(out + i, floats(bits(v) & keep));
      }
    }
    kept += sum_lanes(many);
    nan += sum_lanes(bad);
  }
  for (; i < part.end; ++i) {
    const float v = widen_one(w[i]);
    const bool keep = __builtin_fabsf(v) >= limit;
    mask[i] = keep;
    out[i] = keep ? w[i] : T{};
    kept += keep;
    nan += v != v;
  }
  if (stream) put_fence();
  *count = kept;
  *nans = nan;
}

static int64_t threshold_mask(const void* w, Dtype dtype, float threshold, uint8_t* mask, void* out, int64_t n, int64_t* nans) {
  const int threads = threads_for(n, kMaskGrain);
  const bool stream = dtype == Dtype::f32 && n * 4 > kStreamBytes && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  int64_t total = 0, bad = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total, bad)
  {
    const Range part = share(n, 64, thread_id(), team_size());
    int64_t kept = 0, nan = 0;
    SP_FOR_DTYPE(dtype, threshold_part(static_cast<const T*>(w), threshold, mask, static_cast<T*>(out), part, stream, &kept, &nan));
    total += kept;
    bad += nan;
  }
  *nans = bad;
  return total;
}

// score_grad may be null.
template <class T>
static void mask_gradient_part(T* grad, const T* w, const uint8_t* mask, float* score_grad, Range part) {
  int64_t i = part.begin;
  for (; i + kLanes <= part.end; i += kLanes) {
    const vf g = widen(grad + i);
    if (score_grad != nullptr) store(score_grad + i, load(score_grad + i) + g * widen(w + i));
    narrow(grad + i, floats(bits(g) & widen_bool(mask + i)));
  }
  for (; i < part.end; ++i) {
    const float g = widen_one(grad[i]);
    if (score_grad != nullptr) score_grad[i] += g * widen_one(w[i]);
    if (!mask[i]) grad[i] = T{};
  }
}

static void mask_gradient(void* grad, const void* w, Dtype dtype, const uint8_t* mask, float* score_grad, int64_t n) {
  const int threads = threads_for(n, kMaskGrain);
#pragma omp parallel num_threads(threads)
  {
    const Range part = share(n, 64, thread_id(), team_size());
    SP_FOR_DTYPE(dtype, mask_gradient_part(static_cast<T*>(grad), static_cast<const T*>(w), mask, score_grad, part));
  }
}

static MaskingKernels masking_kernels() { return {apply_mask, masked_copy, threshold_mask, mask_gradient, masked_adamw}; }
