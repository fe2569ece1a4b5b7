// y = activation(x W^T + bias) + residual, for a packed sparse W [N_out, K].
//
// Packed form "groups": the rows of W in groups of `height` (1, 2, 4, 8 or 16) that share their columns, the columns cut into
// blocks of `k_block`, the rows into blocks of `row_block`. Order of the entries: row block, K-block, group, entry; an entry is a
// 16-bit column within its K-block and `height` values. offsets[i] is the first entry of the i-th (row block, K-block, group).
//
// Large N, "panel": a tile of T tokens is transposed to [K][T], so that an entry is one broadcast and T / kLanes fused
// multiply-adds; a K-block of the panel stays in L1 while a row block's entries stream past and its sums wait in L2.
// Small N, "rows": x is read as it lies; groups of 8 or 16 rows are one vector of outputs.

// x rows [0, n) (n <= T), columns [k0, k1) -> panel [k1 - k0][T]; places without a token are zero.
static void pack_panel(const float* x, int64_t stride, int n, int T, float* panel, int64_t k0, int64_t k1) {
  for (int j = 0; j < T; j += 8) {
    const int here = n - j < 8 ? (n - j < 0 ? 0 : n - j) : 8;
    int64_t k = k0;
    for (; k + 8 <= k1; k += 8) {
      v8 r[8];
      for (int i = 0; i < 8; ++i) r[i] = i < here ? read<v8>(x + (j + i) * stride + k) : v8{};
      transpose8(r);
      for (int i = 0; i < 8; ++i) write(panel + (k - k0 + i) * T + j, r[i]);
    }
    for (; k < k1; ++k) {
      for (int i = 0; i < 8; ++i) panel[(k - k0) * T + j + i] = i < here ? x[(j + i) * stride + k] : 0.0f;
    }
  }
}

template <class F>
static inline F finish(F sum, const Epilogue& e, int64_t token, int64_t out) {
  if (e.scale) sum *= read<F>(e.scale + out);
  if (e.bias) sum += read<F>(e.bias + out);
  sum = activate<F>(sum, e.activation);
  if (e.residual) sum += read<F>(e.residual + token * e.residual_stride + out);
  return sum;
}

static inline float finish_one(float sum, const Epilogue& e, int64_t token, int64_t out) {
  if (e.scale) sum *= e.scale[out];
  if (e.bias) sum += e.bias[out];
  if (e.activation) sum = activate<v8>(broadcast<v8>(sum), e.activation)[0];
  if (e.residual) sum += e.residual[token * e.residual_stride + out];
  return sum;
}

// sums [rows][T] of outputs [out, out + rows) -> y[token][out ...] for n tokens (n <= T).
static void write_rows(const float* sums, int T, int n, int64_t rows, float* y, int64_t stride, int64_t token, int64_t out,
                       const Epilogue& e) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) {
    for (int j = 0; j < n; j += 8) {
      v8 v[8];
      for (int i = 0; i < 8; ++i) v[i] = read<v8>(sums + (r + i) * T + j);
      transpose8(v);
      const int here = n - j < 8 ? n - j : 8;
      for (int i = 0; i < here; ++i) {
        write(y + (token + j + i) * stride + out + r, finish(v[i], e, token + j + i, out + r));
      }
    }
  }
  for (; r < rows; ++r) {
    for (int j = 0; j < n; ++j) y[(token + j) * stride + out + r] = finish_one(sums[r * T + j], e, token + j, out + r);
  }
}

// One group of V rows (out of `height` interleaved values an entry) against a K-block of the panel: sums [V][T].
template <class F, int R, int V>
static inline __attribute__((always_inline)) void panel_group(const float* panel, const uint16_t* index, const float* values,
                                                              int height, int64_t n, float* sums, bool first) {
  constexpr int L = lanes_of<F>(), T = R * L;
  F a[V][R];
  for (int v = 0; v < V; ++v) {
    for (int i = 0; i < R; ++i) a[v][i] = first ? F{} : read<F>(sums + v * T + i * L);
  }
  int64_t p = 0;
  if constexpr (V * R < 8) {  // a second set of sums hides the latency of the multiply-add
    F b[V][R];
    for (int v = 0; v < V; ++v) {
      for (int i = 0; i < R; ++i) b[v][i] = F{};
    }
    for (; p + 2 <= n; p += 2) {
      const float* q = panel + static_cast<size_t>(index[p]) * T;
      const float* s = panel + static_cast<size_t>(index[p + 1]) * T;
      for (int v = 0; v < V; ++v) {
        const F w = broadcast<F>(values[p * height + v]), z = broadcast<F>(values[(p + 1) * height + v]);
        for (int i = 0; i < R; ++i) a[v][i] += w * read<F>(q + i * L);
        for (int i = 0; i < R; ++i) b[v][i] += z * read<F>(s + i * L);
      }
    }
    for (int v = 0; v < V; ++v) {
      for (int i = 0; i < R; ++i) a[v][i] += b[v][i];
    }
  }
  for (; p < n; ++p) {
    const float* q = panel + static_cast<size_t>(index[p]) * T;
    for (int v = 0; v < V; ++v) {
      const F w = broadcast<F>(values[p * height + v]);
      for (int i = 0; i < R; ++i) a[v][i] += w * read<F>(q + i * L);
    }
  }
  for (int v = 0; v < V; ++v) {
    for (int i = 0; i < R; ++i) write(sums + v * T + i * L, a[v][i]);
  }
}

// The row blocks [b0, b1) of one tile whose panel is packed.
template <class F, int R>
static void panel_blocks(const Packed& w, const float* panel, int n, float* sums, int64_t b0, int64_t b1, float* y,
                         int64_t y_stride, int64_t token, const Epilogue& e) {
  constexpr int T = R * lanes_of<F>();
  const int H = w.height;
  for (int64_t b = b0; b < b1; ++b) {
    const int64_t row0 = b * w.row_block, rows = row0 + w.row_block < w.rows ? w.row_block : w.rows - row0, groups = rows / H;
    const int32_t* offsets = w.offsets + row0 / H * w.k_blocks;
    for (int64_t kb = 0; kb < w.k_blocks; ++kb) {
      const float* block = panel + kb * w.k_block * T;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t begin = offsets[kb * groups + g], count = offsets[kb * groups + g + 1] - begin;
        const uint16_t* index = w.index + begin;
        const float* values = static_cast<const float*>(w.values) + begin * H;
        float* out = sums + g * H * T;
        switch (H) {
          case 1: panel_group<F, R, 1>(block, index, values, 1, count, out, kb == 0); break;
          case 2: panel_group<F, R, 2>(block, index, values, 2, count, out, kb == 0); break;
          default:
            for (int v = 0; v < H; v += 4) panel_group<F, R, 4>(block, index, values + v, H, count, out + v * T, kb == 0);
        }
      }
    }
    write_rows(sums, T, n, rows, y, y_stride, token, row0, e);
  }
}

template <class F, int R>
static void panel_tile(const Packed& w, const float* panel, int n, float* sums, int64_t b0, int64_t b1, float* y,
                       int64_t y_stride, int64_t token, const Epilogue& e) {
  panel_blocks<F, R>(w, panel, n, sums, b0, b1, y, y_stride, token, e);
}

static void run_tile(const Packed& w, int T, const float* panel, int n, float* sums, int64_t b0, int64_t b1, float* y,
                     int64_t y_stride, int64_t token, const Epilogue& e) {
  switch (T) {
    case 8: panel_tile<v8, 1>(w, panel, n, sums, b0, b1, y, y_stride, token, e); break;
    case 16: panel_tile<vf, 16 / kLanes>(w, panel, n, sums, b0, b1, y, y_stride, token, e); break;
    case 32: panel_tile<vf, 32 / kLanes>(w, panel, n, sums, b0, b1, y, y_stride, token, e); break;
    default: panel_tile<vf, 64 / kLanes>(w, panel, n, sums, b0, b1, y, y_stride, token, e); break;
  }
}

static int tile_width(int64_t n) { return n > 32 ? 64 : n > 16 ? 32 : n > 8 ? 16 : 8; }

static void spmm_groups(const Packed& w, const float* x, int64_t x_stride, int64_t n, float* y, int64_t y_stride,
                        const Epilogue& e) {
  const int64_t entries = w.offsets[w.rows / w.height * w.k_blocks];
  const int64_t row_blocks = (w.rows + w.row_block - 1) / w.row_block;
  const int64_t tiles = (n + 63) / 64;
  const int threads = threads_for(entries * w.height * n + w.rows * n + w.columns * n, 1 << 15);
  const bool by_tokens = tiles % threads == 0 || tiles >= 8 * threads;
  if (by_tokens) {
#pragma omp parallel num_threads(threads)
    {
      Workspace& own = workspace();
      float* panel = own.reserve((w.columns + w.row_block) * 64);
      float* sums = panel + w.columns * 64;
      const Range part = share(tiles, 1, thread_id(), team_size());
      for (int64_t t = part.begin; t < part.end; ++t) {
        const int64_t token = t * 64;
        const int here = n - token < 64 ? static_cast<int>(n - token) : 64, T = tile_width(here);
        pack_panel(x + token * x_stride, x_stride, here, T, panel, 0, w.columns);
        run_tile(w, T, panel, here, sums, 0, row_blocks, y, y_stride, token, e);
      }
      own.trim();
    }
    return;
  }
  Workspace& shared = workspace();
  float* panel = shared.reserve(w.columns * 64);
  for (int64_t token = 0; token < n; token += 64) {
    const int here = n - token < 64 ? static_cast<int>(n - token) : 64, T = tile_width(here);
#pragma omp parallel num_threads(threads)
    {
      const Range part = share(w.columns, 8, thread_id(), team_size());
      pack_panel(x + token * x_stride, x_stride, here, T, panel + part.begin * T, part.begin, part.end);
#pragma omp barrier
      Workspace& own = sums_workspace();
      float* sums = own.reserve(w.row_block * 64);
      const Range blocks = share(row_blocks, 1, thread_id(), team_size());
      run_tile(w, T, panel, here, sums, blocks.begin, blocks.end, y, y_stride, token, e);
      own.trim();
    }
  }
  shared.trim();
}

static MatmulKernels matmul_kernels() { return {spmm_groups}; }
