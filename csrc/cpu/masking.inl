// Masking: one pass over memory each.

static void apply_mask_f32(float* w, const uint8_t* mask, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(w + i, floats(bits(load(w + i)) & widen_bool(mask + i)));
  for (; i < n; ++i) w[i] = mask[i] ? w[i] : 0.0f;
}

static void apply_mask_half(uint16_t* w, const uint8_t* mask, int64_t n) {
  for (int64_t i = 0; i < n; ++i) w[i] = static_cast<uint16_t>(w[i] & -static_cast<int>(mask[i] != 0));
}

static void apply_mask(void* w, const uint8_t* mask, int64_t n, int bytes) {
  const int threads = threads_for(n, 1 << 15);
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

static MaskingKernels masking_kernels() { return {apply_mask}; }
