// y = epilogue(x W^T) for a packed W: which kernel runs.

static void linear(const Packed& w, const float* x, int64_t x_stride, int64_t n, float* y, const Epilogue& e) {
  if (n <= 0 || w.rows <= 0) return;
  const int64_t y_stride = w.rows;
  const auto normalise = [&] {  // where a kernel does not see whole rows of y
    if (e.gain) add_layer_norm(y, y_stride, nullptr, 0, e.gain, e.shift, e.eps, n, w.rows, y);
  };
  if (w.kind < kGroups || w.kind > kBitmask8) __builtin_trap();  // else read as groups, out of bounds
  if (w.kind == kBitmask) {
    linear_bitmask(w, x, x_stride, n, y, y_stride, e);
    return normalise();
  }
  if (w.kind == kBitmask8) {
    linear_bitmask8(w, x, x_stride, n, y, y_stride, e);
    return normalise();
  }
  if (w.columns <= 0) {  // no K-block begins the sums
    for (int64_t i = 0; i < n * w.rows; ++i) y[i] = finish_one(0.0f, e, i / w.rows, i % w.rows);
    return normalise();
  }
  if (w.kind == kQuads) {  // a quarter of the multiply-adds, and x read twice more to be rounded
    const int64_t quads = w.slots[2 * (w.rows / w.height * w.k_blocks)] * w.height;
    linear_quads(w, x, x_stride, n, y, y_stride, e, threads_for_cycles(quads * (n + 4) / 10 + (w.rows + 2 * w.columns) * n / 4));
    return normalise();
  }
  const int64_t entries = w.slots[2 * (w.rows / w.height * w.k_blocks)];
  // an entry costs a cycle and more, however few the tokens, of one alone a little less; x and y a cycle every four floats
  const int64_t products = entries * w.height * (w.height >= 8 ? n + 1 : n == 1 ? 9 : n < 8 ? 12 : n + 4) / 10;
  const int threads = threads_for_cycles(products + (w.rows + w.columns) * n / 4);
  if (w.height >= 8 && n < kTallTokens) {
    linear_rows(w, x, x_stride, n, y, y_stride, e, threads);
    return normalise();
  }
  if (n == 1 && w.height == 1) {
    linear_dot(w, x, y, e, threads);
    return normalise();
  }
  linear_tokens(w, x, x_stride, n, y, y_stride, e, threads);
}

static LinearKernels linear_kernels() { return {linear}; }
