// AdamW over dense weights under a mask, one pass over memory: the gradient is masked, the step taken, the weight and both moments
// masked. Arithmetic in float32 whatever the weights are stored in.

template <class T>
static void adamw_part(T* p, const T* grad, float* m, float* v, const uint8_t* mask, Range part, const AdamwStep& s) {
  const vf keep_m = splat(s.beta1), new_m = splat(s.new1), keep_v = splat(s.beta2), new_v = splat(s.new2);
  const vf decay = splat(s.decay), scale = splat(s.scale), rate = splat(s.rate), eps = splat(s.eps);
  int64_t i = part.begin;
  for (; i + kLanes <= part.end; i += kLanes) {
    const vi kept = mask != nullptr ? widen_bool(mask + i) : ~vi{};
    const vf g = floats(bits(widen(grad + i)) & kept);
    const vf first = floats(bits(keep_m * load(m + i) + new_m * g) & kept);
    const vf second = floats(bits(keep_v * load(v + i) + new_v * g * g) & kept);
    store(m + i, first);
    store(v + i, second);
    const vf moved = decay * widen(p + i) - rate * first / (root(second) * scale + eps);
    narrow(p + i, floats(bits(moved) & kept));
  }
  for (; i < part.end; ++i) {
    if (mask != nullptr && !mask[i]) {
      p[i] = T{};
      m[i] = v[i] = 0;
      continue;
    }
    const float g = widen_one(grad[i]);
    m[i] = s.beta1 * m[i] + s.new1 * g;
    v[i] = s.beta2 * v[i] + s.new2 * g * g;
    narrow_one(p + i, s.decay * widen_one(p[i]) - s.rate * m[i] / (__builtin_sqrtf(v[i]) * s.scale + s.eps));
  }
}

static void masked_adamw(void* p, const void* grad, Dtype dtype, float* m, float* v, const uint8_t* mask, int64_t n, const AdamwStep& step) {
  const int threads = threads_for(n, 1 << 14);
#pragma omp parallel num_threads(threads)
  {
    const Range part = share(n, 64, thread_id(), team_size());
    SP_FOR_DTYPE(dtype, adamw_part(static_cast<T*>(p), static_cast<const T*>(grad), m, v, mask, part, step));
  }
}
