// Moving values between canonical and packed order: packed[i] = canonical[perm[i]], and back; and telling whether they changed.

// The place perm gives, or -1 where it lies outside of size: as unsigned numbers negative ones are the largest.
static inline int32_t place(int32_t perm, int64_t size) { return static_cast<uint32_t>(perm) < static_cast<uint64_t>(size) ? perm : -1; }

// perm < 0 gives 0. For n packed places.
static int64_t gather_values(const float* canonical, int64_t size, const int32_t* perm, int64_t n, void* packed, int dtype) {
  const int threads = threads_for_cycles(2 * n);
  int64_t outside = 0;
#pragma omp parallel num_threads(threads) reduction(+ : outside)
  {
    const Range part = share(n, 64, thread_id(), team_size());
    if (dtype == kFloat32) {
      float* to = static_cast<float*>(packed);
      for (int64_t i = part.begin; i < part.end; ++i) {
        const int32_t from = place(perm[i], size);
        outside += from < 0 && perm[i] != -1;
        to[i] = from < 0 ? 0.0f : canonical[from];
      }
    } else {
      uint16_t* to = static_cast<uint16_t*>(packed);
      for (int64_t i = part.begin; i < part.end; ++i) {
        const int32_t from = place(perm[i], size);
        outside += from < 0 && perm[i] != -1;
        Bf16 narrow;
        narrow_one(&narrow, from < 0 ? 0.0f : canonical[from]);
        to[i] = narrow.raw;
      }
    }
  }
  return outside;
}

// canonical[perm[i]] = packed[i] for the places with perm >= 0; no two places share one.
static int64_t scatter_values(const float* packed, const int32_t* perm, int64_t n, float* canonical, int64_t size) {
  const int threads = threads_for_cycles(2 * n);
  int64_t outside = 0;
#pragma omp parallel num_threads(threads) reduction(+ : outside)
  {
    const Range part = share(n, 64, thread_id(), team_size());
    for (int64_t i = part.begin; i < part.end; ++i) {
      const int32_t to = place(perm[i], size);
      outside += to < 0 && perm[i] != -1;
      if (to >= 0) canonical[to] = packed[i];
    }
  }
  return outside;
}

constexpr int64_t kHashed = int64_t(1) << 15;  // bytes of a block: one thread's, and read once
constexpr int kChains = 8;                     // that hide the latency of the multiplications

// One step of a hash: for a given h another word gives another result.
static inline uint64_t mixed(uint64_t h, uint64_t word) {
  h = (h ^ word) * uint64_t(0x9e3779b97f4a7c15);
  return h << 29 | h >> 35;
}

static uint64_t hash_block(const unsigned char* from, int64_t bytes, uint64_t seed) {
  uint64_t h[kChains], word[kChains];
  for (int i = 0; i < kChains; ++i) h[i] = mixed(seed, static_cast<uint64_t>(i));
  int64_t at = 0;
  for (; at + static_cast<int64_t>(sizeof(word)) <= bytes; at += sizeof(word)) {
    __builtin_memcpy(word, from + at, sizeof(word));
#pragma GCC unroll 8
    for (int i = 0; i < kChains; ++i) h[i] = mixed(h[i], word[i]);
  }
  if (at < bytes) {
    for (int i = 0; i < kChains; ++i) word[i] = 0;
    __builtin_memcpy(word, from + at, static_cast<size_t>(bytes - at));
    for (int i = 0; i < kChains; ++i) h[i] = mixed(h[i], word[i]);
  }
  uint64_t all = static_cast<uint64_t>(bytes);
  for (int i = 0; i < kChains; ++i) all = mixed(all, h[i]);
  all = mixed(all ^ all >> 32, seed);
  return all ^ all >> 32;
}

static uint64_t fingerprint(const void* data, int64_t bytes) {
  const int64_t blocks = (bytes + kHashed - 1) / kHashed;
  const int threads = threads_for_cycles(bytes / 8);
  uint64_t sum = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : sum)
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t at = b * kHashed;
    sum += hash_block(static_cast<const unsigned char*>(data) + at, bytes - at < kHashed ? bytes - at : kHashed,
                      mixed(static_cast<uint64_t>(bytes), static_cast<uint64_t>(b)));
  }
  return sum;
}

static PackingKernels packing_kernels() { return {gather_values, scatter_values, fingerprint}; }
