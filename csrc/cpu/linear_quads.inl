// y = epilogue(x W^T) for a packed W of kind "quads": x is rounded to 8 bits a token where its panel is made; int8.inl has the
// arithmetic. Tiles of kTile tokens, as linear_groups.inl takes them.

// x rows [0, n), n <= T -> a rounded panel; places without a token are zero.
static void round_panel(const float* x, int64_t stride, int64_t n, int T, int64_t columns, float* panel) {
  constexpr int kColumns = 32;
  alignas(64) float part[kColumns * kLanes];
  float *scale = panel + columns / 4 * T, *zero = scale + T;
  for (int j = 0; j < T; j += kLanes) {
    float low[kLanes] = {}, high[kLanes] = {}, bad[kLanes] = {};
    const float* rows = x + j * stride;
    const int64_t here = n - j < kLanes ? n - j : kLanes;
    for (int64_t i = 0; i < here; ++i) {
      const float* row = rows + i * stride;
      vf l = {}, h = {}, b = {};
      int64_t k = 0;
      for (; k + kLanes <= columns; k += kLanes) {
        const vf v = load(row + k);
        l = least(v, l);
        h = largest(v, h);
        b += v * 0.0f;
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        low[i] = l[lane] < low[i] ? l[lane] : low[i];
        high[i] = h[lane] > high[i] ? h[lane] : high[i];
      }
      bad[i] = total(b);
      for (; k < columns; ++k) {
        low[i] = row[k] < low[i] ? row[k] : low[i];
        high[i] = row[k] > high[i] ? row[k] : high[i];
        bad[i] += row[k] * 0.0f;
      }
    }
    const Rounding r = rounding(load(low), load(high), load(bad));
    store(scale + j, r.scale);
    store_ints(zero + j, r.zero);
    for (int64_t k0 = 0; k0 < columns; k0 += kColumns) {
      const int64_t k1 = k0 + kColumns < columns ? k0 + kColumns : columns;
      pack_panel(rows, stride, here, kLanes, part, k0, k1);
      for (int64_t k = k0; k < k1; k += 4) {
        const float* from = part + (k - k0) * kLanes;
        store_ints(panel + k / 4 * T + j, rounded_quad(from, kLanes, r));
      }
    }
  }
}

static int rounded_width(int64_t n) {
  const int width = tile_width(n);
  return width < kLanes ? kLanes : width;
}

static void linear_quads(const Packed& w, const float* x, int64_t x_stride, int64_t n, float* y, int64_t y_stride, const Epilogue& e,
                         int threads) {
  const Int8Kernels& products = kernels().int8;  // of the tier in use, which may know more instructions than this text
  Epilogue after = e;
  after.scale = nullptr;  // the products are scaled already
  const int64_t row_blocks = (w.rows + w.row_block - 1) / w.row_block, tiles = (n + kTile - 1) / kTile;
  const int64_t sums_size = w.row_block * kTile;
  Workspace& shared = shared_workspace();
  Turns* turns = turns_in(shared, tiles);
  Ending ending;
#pragma omp parallel num_threads(threads)
  {
    Workspace& own = workspace();
    float* sums = own.reserve(sums_size + rounded_floats(w.columns, static_cast<int>(kTile)));
    float* panel = sums + sums_size;
    const Range mine = share(tiles, 1, thread_id(), team_size());
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t t = (mine.begin + i) % tiles, token = t * kTile;
      if (turns[t].taken() >= row_blocks - (t >= mine.begin && t < mine.end ? 0 : 1)) continue;
      const int64_t here = n - token < kTile ? n - token : kTile;
      const int T = rounded_width(here);
      round_panel(x + token * x_stride, x_stride, here, T, w.columns, panel);
      const RoundedPanel rounded = rounded_panel(panel, w.columns, T);
      turns[t].take(row_blocks, [&](int64_t b) {
        const int64_t row = b * w.row_block, rows = row + w.row_block < w.rows ? w.row_block : w.rows - row;
        products.block(w, b, T, rounded, sums);
        write_rows(sums, T, here, rows, y, y_stride, token, row, after);
      });
    }
    own.trim();
    ending.leave();
  }
  shared.trim();
}
