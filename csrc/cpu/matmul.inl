// The sparse matmul kernels of a tier, and which of them runs.

static void spmm(const Packed& w, const float* x, int64_t x_stride, int64_t n, float* y, const Epilogue& e) {
  if (n <= 0 || w.rows <= 0) return;
  const int64_t y_stride = w.rows;
  const auto normalise = [&] {  // where a kernel does not see whole rows of y
    if (e.gain) add_layer_norm(y, y_stride, nullptr, 0, e.gain, e.shift, e.eps, n, w.rows, y);
  };
  if (w.kind == kBitmask) {
    spmm_bitmask(w, x, x_stride, n, y, y_stride, e);
    return normalise();
  }
  const int64_t entries = w.slots[2 * (w.rows / w.height * w.k_blocks)];
  // an entry costs a cycle and more, however few the tokens, of one alone a little less; x and y a cycle every four floats
  const int64_t products = entries * w.height * (w.height >= 8 ? n + 1 : n == 1 ? 9 : n < 8 ? 12 : n + 4) / 10;
  const int threads = threads_for_cycles(products + (w.rows + w.columns) * n / 4);
  if (w.height >= 8 && n < kTallTokens) {
    spmm_rows(w, x, x_stride, n, y, y_stride, e, threads);
    return normalise();
  }
  if (n == 1 && w.height == 1) {
    spmm_dot(w, x, y, e, threads);
    return normalise();
  }
  spmm_tokens(w, x, x_stride, n, y, y_stride, e, threads);
}

static MatmulKernels matmul_kernels() { return {spmm, sddmm, gather_values, scatter_values, add_layer_norm}; }
