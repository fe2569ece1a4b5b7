// y = epilogue(x W^T) for a packed W of kind "bitmask8": each token of x is rounded to 8 bits, then threads take rows of W;
// int8_bitmask.inl has the arithmetic.

// Rounds n tokens of x; memory: rounded_rows_floats.
static int64_t rounded_rows_floats(int64_t columns, int64_t n) { return n * ((columns + 63) / 64 * 16 + 2); }
static RoundedRows round_rows(const float* x, int64_t stride, int64_t n, int64_t columns, float* memory) {
  const int64_t width = (columns + 63) / 64 * 64;
  uint8_t* bytes = reinterpret_cast<uint8_t*>(memory);
  float* scale = memory + n * (width / 4);
  int32_t* zero = reinterpret_cast<int32_t*>(scale + n);
  for (int64_t j = 0; j < n; ++j) round_row(x + j * stride, columns, width, bytes + j * width, scale + j, zero + j);
  return {bytes, width, scale, zero};
}

// Outputs [r0, r1), at most 16, of n tokens of y, the first of which is `token` of the residual.
static void bitmask8_tokens(const Packed& w, const RoundedRows& x, int64_t n, int64_t r0, int64_t r1, float* y, int64_t y_stride,
                            int64_t token, const Epilogue& e) {
  const Int8Kernels& products = kernels().int8;  // of the tier in use, which may know more instructions than this text
  Epilogue after = e;
  after.scale = nullptr;  // the products are scaled already
  const int64_t rows = r1 - r0;
  float sums[kMostRoundedRows * 16];
  for (int64_t j = 0; j < n;) {
    const int64_t left = n - j, tokens = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    products.rows(w, r0, r1, static_cast<int>(tokens), {x.bytes + j * x.width, x.width, x.scale + j, x.zero + j}, sums);
    for (const float* from = sums; from < sums + tokens * rows; from += rows, ++j) {
      float* to = y + (token + j) * y_stride + r0;
      int64_t i = 0;
      for (; i + 8 <= rows; i += 8) write(to + i, finish(read<v8>(from + i), after, token + j, r0 + i));
      for (; i < rows; ++i) to[i] = finish_one(from[i], after, token + j, r0 + i);
    }
  }
}

static void linear_bitmask8(const Packed& w, const float* x, int64_t x_stride, int64_t n, float* y, int64_t y_stride, const Epilogue& e) {
  constexpr int64_t kRows = 16, kAtOnce = 64;
  constexpr int64_t kCycles = kLanes == 16 ? 4 : 12;  // about, that 64 columns take at one token; another one takes a third
  const int64_t units = (w.rows + kRows - 1) / kRows;
  const int threads = threads_for_cycles(w.rows * ((w.columns + 63) / 64) * kCycles * (n + 2) / 3);
  Workspace& shared = shared_workspace();
  for (int64_t t = 0; t < n; t += kAtOnce) {
    const int64_t here = n - t < kAtOnce ? n - t : kAtOnce;
    Turns* turns = turns_in(shared, threads, rounded_rows_floats(w.columns, here));
    const RoundedRows rounded = round_rows(x + t * x_stride, x_stride, here, w.columns, reinterpret_cast<float*>(turns + threads));
    Ending ending;
#pragma omp parallel num_threads(threads)
    {
      take_runs(turns, units, [&](int64_t u) {
        const int64_t r0 = u * kRows, r1 = r0 + kRows < w.rows ? r0 + kRows : w.rows;
        bitmask8_tokens(w, rounded, here, r0, r1, y, y_stride, t, e);
      });
      ending.leave();
    }
  }
  shared.trim();
}
