// LayerNorm (with the residual before it) and RMSNorm over rows of d floats: one pass over memory, the row staying in L1.

// The mean of (x - middle)^2 over d floats.
static inline float mean_square(const float* x, int64_t d, float middle) {
  vf square[4] = {};
  float rest = 0.0f;
  int64_t i = 0;
  for (; i + 4 * kLanes <= d; i += 4 * kLanes) {
    for (int u = 0; u < 4; ++u) {
      const vf v = load(x + i + u * kLanes) - middle;
      square[u] += v * v;
    }
  }
  for (; i < d; ++i) rest += (x[i] - middle) * (x[i] - middle);
  return (total((square[0] + square[1]) + (square[2] + square[3])) + rest) / static_cast<float>(d);
}

// y = x / sqrt(mean(x^2) + eps) * weight.
static void rms_norm(const float* x, int64_t x_stride, const float* weight, float eps, int64_t n, int64_t d, float* y) {
  const int threads = threads_for_cycles(n * d / 2);
#pragma omp parallel num_threads(threads)
  {
    const Range part = share(n, 1, thread_id(), team_size());
    for (int64_t t = part.begin; t < part.end; ++t) {
      const float* from = x + t * x_stride;
      float* to = y + t * d;
      const float scale = 1.0f / std::sqrt(mean_square(from, d, 0.0f) + eps);
      int64_t i = 0;
      for (; i + kLanes <= d; i += kLanes) store(to + i, load(from + i) * scale * load(weight + i));
      for (; i < d; ++i) to[i] = from[i] * scale * weight[i];
    }
  }
}

// to = LayerNorm(a + b) * weight + bias over d floats; b may be null, and to may be a.
static inline void layer_norm_row(const float* a, const float* b, const float* weight, const float* bias, float eps, int64_t d,
                                  float* to) {
  vf sum[4] = {};
  float rest = 0.0f;
  int64_t i = 0;
  for (; i + 4 * kLanes <= d; i += 4 * kLanes) {
    for (int u = 0; u < 4; ++u) {
      vf v = load(a + i + u * kLanes);
      if (b) v += load(b + i + u * kLanes);
      store(to + i + u * kLanes, v);
      sum[u] += v;
    }
  }
  for (; i < d; ++i) {
    to[i] = b ? a[i] + b[i] : a[i];
    rest += to[i];
  }
  const float mean = (total((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest) / static_cast<float>(d);
  const float scale = 1.0f / std::sqrt(mean_square(to, d, mean) + eps);
  for (i = 0; i + kLanes <= d; i += kLanes) {
    store(to + i, (load(to + i) - mean) * scale * load(weight + i) + load(bias + i));
  }
  for (; i < d; ++i) to[i] = (to[i] - mean) * scale * weight[i] + bias[i];
}

// y = LayerNorm(x + residual) * weight + bias; residual may be null, and y may be x.
static void add_layer_norm(const float* x, int64_t x_stride, const float* residual, int64_t residual_stride, const float* weight,
                           const float* bias, float eps, int64_t n, int64_t d, float* y) {
  const int threads = threads_for_cycles(n * d / 2);
#pragma omp parallel num_threads(threads)
  {
    const Range part = share(n, 1, thread_id(), team_size());
    for (int64_t t = part.begin; t < part.end; ++t) {
      layer_norm_row(x + t * x_stride, residual ? residual + t * residual_stride : nullptr, weight, bias, eps, d, y + t * d);
    }
  }
}

static NormKernels norm_kernels() { return {add_layer_norm, rms_norm}; }
