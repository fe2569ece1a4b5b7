// Loops that do nothing but reach a limit of the machine; the benchmarks compare every kernel with them. Each runs on the whole
// thread pool, returns the work done by all threads (floating point operations or bytes) and leaves the timing to its caller.

#if defined(__FMA__)
constexpr int kPeakChains = 12;  // independent sums: enough to hide the latency of an FMA, and they fit 16 registers
#else
constexpr int kPeakChains = 6;
#endif

// A value that the compiler must compute, and whose origin it cannot see.
static inline void keep(vf& v) { asm volatile("" : "+m"(v)); }

static vf fma_chains(int64_t rounds, vf x, vf y) {
  vf sum[kPeakChains];
  for (int c = 0; c < kPeakChains; ++c) sum[c] = splat(1e-3f * static_cast<float>(c));
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
    for (int c = 0; c < kPeakChains; ++c) sum[c] = sum[c] * x + y;
  }
  for (int c = 1; c < kPeakChains; ++c) sum[0] += sum[c];
  return sum[0];
}

// Multiply and add from registers only.
static double peak_fma(int64_t rounds) {
  int64_t team = 1;
#pragma omp parallel num_threads(max_threads())
  {
    vf x = splat(0.999f), y = splat(1e-6f);
    keep(x);
    keep(y);
    vf sum = fma_chains(rounds, x, y);
    keep(sum);
#pragma omp master
    team = team_size();
  }
  return 2.0 * kPeakChains * kLanes * static_cast<double>(rounds) * static_cast<double>(team);
}

// Every operand of the multiply comes from L1: one vector load a multiply-add and one broadcast for eight of them, which is the
// inner loop of an unstructured sparse product whose x panel lies in L1.
static vf load_chains(int64_t rounds, const float* panel, const float* values) {
  vf sum[8];
  for (int c = 0; c < 8; ++c) sum[c] = splat(0.0f);
  for (int64_t r = 0; r < rounds; ++r) {
    const float* row = panel + (r & 7) * 8 * kLanes;
    const vf value = splat(values[r & 255]);
#pragma GCC unroll 8
    for (int c = 0; c < 8; ++c) sum[c] += value * load(row + c * kLanes);
  }
  for (int c = 1; c < 8; ++c) sum[0] += sum[c];
  return sum[0];
}

static double peak_l1_fma(int64_t rounds) {
  int64_t team = 1;
#pragma omp parallel num_threads(max_threads())
  {
    alignas(64) float panel[8 * 8 * kLanes], values[256];
    for (float& p : panel) p = 1e-6f;
    for (float& v : values) v = 1e-6f;
    vf sum = load_chains(rounds, panel, values);
    keep(sum);
#pragma omp master
    team = team_size();
  }
  return 2.0 * 8 * kLanes * static_cast<double>(rounds) * static_cast<double>(team);
}

// Reads n floats, split between the threads, `repeats` times over.
static double peak_read(const float* data, int64_t n, int64_t repeats) {
#pragma omp parallel num_threads(max_threads())
  {
    const Range part = share(n, 8 * kLanes, thread_id(), team_size());
    vf sum[8];
    for (int c = 0; c < 8; ++c) sum[c] = splat(0.0f);
    for (int64_t q = 0; q < repeats; ++q) {
      for (int64_t i = part.begin; i + 8 * kLanes <= part.end; i += 8 * kLanes) {
#pragma GCC unroll 8
        for (int c = 0; c < 8; ++c) sum[c] += load(data + i + c * kLanes);
      }
      asm volatile("" ::: "memory");
    }
    for (int c = 1; c < 8; ++c) sum[0] += sum[c];
    keep(sum[0]);
  }
  return 4.0 * static_cast<double>(n) * static_cast<double>(repeats);
}

// Reads and rewrites n floats in place: the least that a kernel which updates weights moves.
static double peak_update(float* data, int64_t n) {
#pragma omp parallel num_threads(max_threads())
  {
    const Range part = share(n, kLanes, thread_id(), team_size());
    vf one = splat(1.0f);
    keep(one);
    for (int64_t i = part.begin; i + kLanes <= part.end; i += kLanes) store(data + i, load(data + i) * one);
  }
  return 8.0 * static_cast<double>(n);
}

static PeakKernels peak_kernels() { return {peak_fma, peak_l1_fma, peak_read, peak_update}; }
