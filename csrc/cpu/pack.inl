// Moving values between canonical and packed order: packed[i] = canonical[perm[i]], and back.

// perm < 0 gives 0. For n packed places.
static void gather_values(const float* canonical, const int32_t* perm, int64_t n, void* packed, int dtype) {
  const int threads = threads_for_cycles(2 * n);
#pragma omp parallel num_threads(threads)
  {
    const Range part = share(n, 64, thread_id(), team_size());
    if (dtype == kFloat32) {
      float* to = static_cast<float*>(packed);
      for (int64_t i = part.begin; i < part.end; ++i) to[i] = perm[i] < 0 ? 0.0f : canonical[perm[i]];
    } else {
      uint16_t* to = static_cast<uint16_t*>(packed);
      for (int64_t i = part.begin; i < part.end; ++i) {
        Bf16 narrow;
        narrow_one(&narrow, perm[i] < 0 ? 0.0f : canonical[perm[i]]);
        to[i] = narrow.raw;
      }
    }
  }
}

// canonical[perm[i]] = packed[i] for the places with perm >= 0; no two places share one.
static void scatter_values(const float* packed, const int32_t* perm, int64_t n, float* canonical) {
  const int threads = threads_for_cycles(2 * n);
#pragma omp parallel num_threads(threads)
  {
    const Range part = share(n, 64, thread_id(), team_size());
    for (int64_t i = part.begin; i < part.end; ++i) {
      if (perm[i] >= 0) canonical[perm[i]] = packed[i];
    }
  }
}
