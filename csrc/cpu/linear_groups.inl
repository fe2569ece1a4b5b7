// y = epilogue(x W^T) for a packed sparse W [N_out, K] of kind "groups" (sparseprune/packing).
//
// The rows of W come in groups of `height` that share their columns; the columns are cut into K-blocks, the groups into row
// blocks. Entries lie in the order row block, K-block, slot (one group), entry; an entry is a 16-bit column within its K-block and
// `height` values. slots[2 s] is the first entry of slot s, slots[2 s + 1] its group within the row block.
//
// height 1, 2, 4: vectorised over tokens. A tile of T tokens is transposed to a panel [K][T]; an entry is `height` broadcasts and
// T / lanes multiply-adds each. The panel's K-block stays in L1 while the entries of a row block pass, whose sums wait in L2. Slots
// are sorted by their count, so that the loops' ends are predicted.
// height 8, 16, few tokens: vectorised over outputs. A group is one vector of sums a token; an entry is one load of its values and
// a multiply-add with a broadcast x for each token. The sums stay in registers over the whole of K, and y is written as it lies.
// height 8, 16, more tokens: vectorised over tokens again. The sums of 8 rows (AVX2: 4) and two vectors of tokens fill the registers,
// so that a load of x serves 8 multiply-adds: the one plan here that the multiply-adds themselves can bound, not the loads.
// One token, height 1: dot products.

constexpr int64_t kTile = 64;               // tokens of a panel where tokens are vectorised
constexpr int kAhead = 24;                  // entries whose lines of the panel are fetched in advance where it does not fit into L1
constexpr int64_t kAheadBytes = 2048;        // of values, that are fetched in advance
constexpr int64_t kTallTokens = 32;         // from here on heights 8 and 16 are vectorised over tokens too
constexpr int64_t kWriteRows = 128;         // of sums that are written to y at a time
constexpr bool kManyRegisters = SP_LANES == 16;

// x rows [0, n) (n <= T, T a multiple of 8), columns [k0, k1) -> panel [k1 - k0][T]; places without a token are zero.
static void pack_panel(const float* x, int64_t stride, int64_t n, int T, float* panel, int64_t k0, int64_t k1) {
  int64_t k = k0;
  for (; k + 16 <= k1; k += 16) {  // a whole cache line of each token, so that none is fetched twice
    for (int j = 0; j < T; j += 8) {
      for (int half = 0; half < 16; half += 8) {
        v8 r[8];
        for (int i = 0; i < 8; ++i) r[i] = j + i < n ? read<v8>(x + (j + i) * stride + k + half) : v8{};
        transpose8(r);
        for (int i = 0; i < 8; ++i) write(panel + (k - k0 + half + i) * T + j, r[i]);
      }
    }
  }
  for (; k < k1; ++k) {
    for (int j = 0; j < T; ++j) panel[(k - k0) * T + j] = j < n ? x[j * stride + k] : 0.0f;
  }
}

template <class F>
static inline F finish(F sum, const Epilogue& e, int64_t token, int64_t out) {
  if (e.scale) sum *= read<F>(e.scale + out);
  if (e.bias) sum += read<F>(e.bias + out);
  if (e.activation) sum = activate<F>(sum, e.activation);
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

// sums [rows][T] of the outputs [out, out + rows) -> y[token + j][out ...] for the tokens j in [0, n), n <= T. Eight tokens at a
// time along their rows of y, which the hardware follows; few enough rows that the sums stay in L1 from one eight to the next.
static void write_rows(const float* sums, int T, int64_t n, int64_t rows, float* y, int64_t stride, int64_t token, int64_t out,
                       const Epilogue& e) {
  for (int64_t r0 = 0; r0 < rows; r0 += kWriteRows) {
    const int64_t r1 = r0 + kWriteRows < rows ? r0 + kWriteRows : rows;
    for (int64_t j = 0; j < n; j += 8) {
      const int here = n - j < 8 ? static_cast<int>(n - j) : 8;
      float* to = y + (token + j) * stride + out;
      int64_t r = r0;
      for (; r + 8 <= r1; r += 8) {
        v8 v[8];
        for (int i = 0; i < 8; ++i) v[i] = read<v8>(sums + (r + i) * T + j);
        transpose8(v);
        if (here == 8) {
          for (int i = 0; i < 8; ++i) write(to + i * stride + r, finish(v[i], e, token + j + i, out + r));
        } else {
          for (int i = 0; i < here; ++i) write(to + i * stride + r, finish(v[i], e, token + j + i, out + r));
        }
      }
      for (; r < r1; ++r) {
        for (int i = 0; i < here; ++i) to[i * stride + r] = finish_one(sums[r * T + j + i], e, token + j + i, out + r);
      }
    }
  }
}

// `count` values from place `begin` on as floats: where they lie, or converted into scratch. The slack behind the last value
// makes reading a whole vector safe.
static inline const float* float_values(const Packed& w, int64_t begin, int64_t count, float* scratch) {
  if (w.values_dtype == kFloat32) return static_cast<const float*>(w.values) + begin;
  for (int64_t i = 0; i < count; i += 8) {
    write(scratch + i, w.values_dtype == kBfloat16 ? widen_bf16(static_cast<const uint16_t*>(w.values) + begin + i)
                                                   : widen_int8(static_cast<const int8_t*>(w.values) + begin + i));
  }
  return scratch;
}

// ---- vectorised over tokens

// V rows of a group (of `height` values an entry) against R vectors of a panel whose rows are T long: sums [V][T], to which bias [V]
// is added where it is not null.
template <class F, int T, int R, int V, bool kFetch = V == 8>
static inline __attribute__((always_inline)) void panel_group(const float* panel, const uint16_t* index, const float* values,
                                                              int height, int64_t n, float* sums, bool first,
                                                              const float* bias = nullptr) {
  constexpr int L = lanes_of<F>();
  constexpr int kNeed = sizeof(F) == 64 ? 4 : 8;  // independent sums that hide the latency of the multiply-adds
  constexpr int U = V * R >= kNeed ? 1 : kNeed / (V * R);
  F a[U][V][R];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {  // unrolled, as all loops over a: else the compiler keeps it in memory before and behind the sums
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      a[0][v][i] = first ? F{} : read<F>(sums + v * T + i * L);
#pragma GCC unroll 8
      for (int u = 1; u < U; ++u) a[u][v][i] = F{};
    }
  }
  if (bias) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const F start = broadcast_at<F>(bias + v);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) a[0][v][i] += start;
    }
  }
  const auto entry = [&](int64_t p, F(&to)[V][R]) __attribute__((always_inline)) {
    const float* q = panel + static_cast<size_t>(index[p]) * T;
    if constexpr (V == 1) {
      const F w = broadcast_at<F>(values + p);
      for (int i = 0; i < R; ++i) to[0][i] += w * read<F>(q + i * L);
    } else {
      if constexpr (kFetch) {  // the registers of 8 rows leave the loads time for this; with fewer rows it costs more than it brings
        const float* ahead = panel + static_cast<size_t>(index[p + kAhead]) * T;
        for (int i = 0; i < R; ++i) __builtin_prefetch(ahead + i * L);
      }
      if constexpr (V >= 4 && !kFetch) __builtin_prefetch(values + (p + 32) * height);
      F x[R];
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) x[i] = read<F>(q + i * L);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const F w = broadcast_at<F>(values + p * height + v);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) to[v][i] += w * x[i];
      }
    }
  };
  int64_t p = 0;
  for (; p + U <= n; p += U) {
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) entry(p + u, a[u]);
  }
  if constexpr (U >= 8) {
    if (n - p >= 4) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) entry(p + u, a[u]);
      p += 4;
    }
  }
  if constexpr (U >= 4) {
    if (n - p >= 2) {
      entry(p, a[0]);
      entry(p + 1, a[1]);
      p += 2;
    }
  }
  if constexpr (U >= 2) {
    if (p < n) entry(p, a[0]);
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
      for (int u = 1; u < U; ++u) a[0][v][i] += a[u][v][i];
      write(sums + v * T + i * L, a[0][v][i]);
    }
  }
}

template <class F, int T, int V>
static void panel_slots(const Packed& w, const int32_t* slots, int64_t groups, const float* panel, float* sums, bool first,
                        float* scratch, const float* bias = nullptr) {
  constexpr int L = lanes_of<F>(), kVectors = T / L;
  constexpr int kMost = V == 1 ? 8 : V == 2 || kManyRegisters ? 4 : 2;
  constexpr int R = kVectors <= kMost ? kVectors : kVectors % kMost == 0 ? kMost : kVectors % 3 == 0 && kMost >= 3 ? 3 : 2;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = slots[2 * g], n = slots[2 * g + 2] - begin;
    const float* values = float_values(w, begin * V, n * V, scratch);
    const int64_t row = static_cast<int64_t>(slots[2 * g + 1]) * V;
    float* to = sums + row * T;
    // The weight passes once and comes from far: a slot fetches as much as it reads, a page ahead.
    for (int64_t line = 0; line < n * V * w.value_bytes(); line += 64) __builtin_prefetch(w.value_at(begin * V) + kAheadBytes + line);
    for (int64_t line = 0; line < 2 * n; line += 64) __builtin_prefetch(reinterpret_cast<const char*>(w.index + begin) + kAheadBytes / 2 + line);
    for (int c = 0; c < T; c += R * L) {
      panel_group<F, T, R, V>(panel + c, w.index + begin, values, V, n, to + c, first, bias ? bias + row : nullptr);
    }
  }
}

// The groups of a row block of height 8 or 16 against one tile: V rows and R vectors of tokens are summed in registers at a time.
template <class F, int T>
static void tall_groups(const Packed& w, int64_t row, int64_t rows, const float* panel, int64_t n, float* sums, float* scratch,
                        float* y, int64_t y_stride, int64_t token, const Epilogue& e) {
  constexpr int L = lanes_of<F>(), V = kManyRegisters ? 8 : 4, R = T / L % 2 == 0 ? 2 : T / L;  // 1, 2 or 3
  const int64_t groups = rows / w.height, at_once = kWriteRows / w.height;
  const int32_t* slots = w.slots + 2 * (row / w.height * w.k_blocks);
  for (int64_t g0 = 0; g0 < groups; g0 += at_once) {
    const int64_t g1 = g0 + at_once < groups ? g0 + at_once : groups;
    for (int64_t g = g0; g < g1; ++g) {
      float* to = sums + (g - g0) * w.height * T;
      for (int64_t k = 0; k < w.k_blocks; ++k) {
        const int32_t* slot = slots + 2 * (k * groups + g);
        const int64_t begin = slot[0], count = slot[2] - begin;
        const float* values = float_values(w, begin * w.height, count * w.height, scratch);
        for (int v = 0; v < w.height; v += V) {
          for (int c = 0; c < T; c += R * L) {
            panel_group<F, T, R, V>(panel + k * w.k_block * T + c, w.index + begin, values + v, w.height, count, to + v * T + c,
                                    k == 0);
          }
        }
      }
    }
    write_rows(sums, T, n, (g1 - g0) * w.height, y, y_stride, token, row + g0 * w.height, e);
  }
}

// The row blocks [b0, b1) against one tile of n <= T tokens, whose panel is packed.
template <class F, int T>
static void panel_tile(const Packed& w, const float* panel, int64_t n, float* sums, float* scratch, int64_t b0, int64_t b1,
                       float* y, int64_t y_stride, int64_t token, const Epilogue& e) {
  for (int64_t b = b0; b < b1; ++b) {
    const int64_t row = b * w.row_block, rows = row + w.row_block < w.rows ? w.row_block : w.rows - row;
    if (w.height >= 8) {
      tall_groups<F, T>(w, row, rows, panel, n, sums, scratch, y, y_stride, token, e);
      continue;
    }
    const int64_t groups = rows / w.height;
    const int32_t* slots = w.slots + 2 * (row / w.height * w.k_blocks);
    for (int64_t k = 0; k < w.k_blocks; ++k, slots += 2 * groups) {
      const float* block = panel + k * w.k_block * T;
      if (w.height == 1) {
        panel_slots<F, T, 1>(w, slots, groups, block, sums, k == 0, scratch);
      } else if (w.height == 2) {
        panel_slots<F, T, 2>(w, slots, groups, block, sums, k == 0, scratch);
      } else {
        panel_slots<F, T, 4>(w, slots, groups, block, sums, k == 0, scratch);
      }
    }
    write_rows(sums, T, n, rows, y, y_stride, token, row, e);
  }
}

static int tile_width(int64_t n) { return n > 48 ? 64 : n > 32 ? 48 : n > 16 ? 32 : n > 8 ? 16 : 8; }

static __attribute__((noinline)) void run_panel_tile(const Packed& w, int T, const float* panel, int64_t n, float* sums,
                                                     float* scratch, int64_t b0, int64_t b1, float* y, int64_t y_stride,
                                                     int64_t token, const Epilogue& e) {
  switch (T) {
    case 8: return panel_tile<v8, 8>(w, panel, n, sums, scratch, b0, b1, y, y_stride, token, e);
    case 16: return panel_tile<vf, 16>(w, panel, n, sums, scratch, b0, b1, y, y_stride, token, e);
    case 32: return panel_tile<vf, 32>(w, panel, n, sums, scratch, b0, b1, y, y_stride, token, e);
    case 48: return panel_tile<vf, 48>(w, panel, n, sums, scratch, b0, b1, y, y_stride, token, e);
    default: return panel_tile<vf, 64>(w, panel, n, sums, scratch, b0, b1, y, y_stride, token, e);
  }
}

// Each thread begins with its own tiles, then helps with the row blocks that are left of the others'. Whoever works at a tile packs a
// panel of its own: that costs less than waiting for another's, or than fetching it from another core.
static void linear_tokens(const Packed& w, const float* x, int64_t x_stride, int64_t n, float* y, int64_t y_stride,
                        const Epilogue& e, int threads) {
  const int64_t row_blocks = (w.rows + w.row_block - 1) / w.row_block, tiles = (n + kTile - 1) / kTile;
  const int64_t sums_size = w.row_block * kTile, scratch_size = w.height * w.k_block + 64;
  Workspace& shared = shared_workspace();
  Turns* turns = turns_in(shared, tiles);
  Ending ending;
#pragma omp parallel num_threads(threads)
  {
    Workspace& own = workspace();
    float* sums = own.reserve(sums_size + scratch_size + w.columns * kTile);
    float *scratch = sums + sums_size, *panel = scratch + scratch_size;
    const Range mine = share(tiles, 1, thread_id(), team_size());
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t t = (mine.begin + i) % tiles, token = t * kTile;
      if (turns[t].taken() >= row_blocks - (t >= mine.begin && t < mine.end ? 0 : 1)) continue;
      const int64_t here = n - token < kTile ? n - token : kTile;
      const int T = tile_width(here);
      pack_panel(x + token * x_stride, x_stride, here, T, panel, 0, w.columns);
      turns[t].take(row_blocks, [&](int64_t b) {
        run_panel_tile(w, T, panel, here, sums, scratch, b, b + 1, y, y_stride, token, e);
        if (!e.gain || !turns[t].last(row_blocks)) return;
        for (int64_t j = token; j < token + here; ++j) {  // still in L2 for the most part
          float* row = y + j * y_stride;
          layer_norm_row(row, nullptr, e.gain, e.shift, e.eps, w.rows, row);
        }
      });
    }
    own.trim();
    ending.leave();
  }
  shared.trim();
}

// ---- vectorised over outputs

// One group of G vectors of outputs against M tokens (n of them real) of a panel whose rows are T long.
template <class F, int G, int M, int T>
static inline void rows_group(const Packed& w, const int32_t* slots, int64_t groups, const float* panel, int64_t n,
                              float* scratch, float* y, int64_t y_stride, int64_t token, int64_t out, const Epilogue& e) {
  constexpr int L = lanes_of<F>(), H = G * L;
  constexpr int U = M * G >= 8 ? 1 : M * G >= 4 ? 2 : M * G >= 2 ? 4 : 8;
  F a[U][M][G];
  for (int u = 0; u < U; ++u) {
    for (int m = 0; m < M; ++m) {
      for (int g = 0; g < G; ++g) a[u][m][g] = F{};
    }
  }
  for (int64_t k = 0; k < w.k_blocks; ++k, slots += 2 * groups, panel += w.k_block * T) {
    const int64_t begin = slots[0], count = slots[2] - begin;
    const float* values = float_values(w, begin * H, count * H, scratch);
    const uint16_t* index = w.index + begin;
    const auto entry = [&](int64_t p, F(&to)[M][G]) __attribute__((always_inline)) {
      const float* q = panel + static_cast<size_t>(index[p]) * T;
      F v[G];
      for (int g = 0; g < G; ++g) v[g] = read<F>(values + p * H + g * L);
#pragma GCC unroll 24
      for (int m = 0; m < M; ++m) {
        const F s = broadcast_at<F>(q + m);
        for (int g = 0; g < G; ++g) to[m][g] += s * v[g];
      }
    };
    int64_t p = 0;
    for (; p + U <= count; p += U) {
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) entry(p + u, a[u]);
    }
    for (; p < count; ++p) entry(p, a[0]);
  }
  alignas(64) float sums[M][H];
#pragma GCC unroll 24
  for (int m = 0; m < M; ++m) {
    for (int g = 0; g < G; ++g) {
#pragma GCC unroll 8
      for (int u = 1; u < U; ++u) a[0][m][g] += a[u][m][g];
      write(sums[m] + g * L, a[0][m][g]);
    }
  }
#pragma GCC unroll 1
  for (int64_t m = 0; m < n; ++m) {  // one copy of the epilogue, whatever M is
    for (int g = 0; g < G; ++g) {
      write(y + (token + m) * y_stride + out + g * L, finish(read<F>(sums[m] + g * L), e, token + m, out + g * L));
    }
  }
}

// How many tokens the next tile takes of `left`, and how long its panel's rows are.
struct RowsTile {
  int64_t tokens;
  int T;
};
static RowsTile rows_tile(int64_t left) {
  if (kManyRegisters && left >= 24) return {24, 24};
  if (kManyRegisters && left >= 16) return {16, 16};
  return {left < 8 ? left : 8, 8};
}

template <class F, int G>
static void rows_run(const Packed& w, const int32_t* slots, int64_t groups, const float* panel, RowsTile tile, float* scratch,
                     float* y, int64_t y_stride, int64_t token, int64_t out, const Epilogue& e) {
  const int64_t n = tile.tokens;
  if constexpr (kManyRegisters) {
    if (tile.T == 24) return rows_group<F, G, 24, 24>(w, slots, groups, panel, n, scratch, y, y_stride, token, out, e);
    if (tile.T == 16) return rows_group<F, G, 16, 16>(w, slots, groups, panel, n, scratch, y, y_stride, token, out, e);
  }
  if constexpr (G == 1) {
    if (n > 4) return rows_group<F, G, 8, 8>(w, slots, groups, panel, n, scratch, y, y_stride, token, out, e);
  } else if (n > 4) {
    rows_group<F, G, 4, 8>(w, slots, groups, panel, 4, scratch, y, y_stride, token, out, e);
    return rows_group<F, G, 4, 8>(w, slots, groups, panel + 4, n - 4, scratch, y, y_stride, token + 4, out, e);
  }
  if (n > 2) return rows_group<F, G, 4, 8>(w, slots, groups, panel, n, scratch, y, y_stride, token, out, e);
  if (n == 2) return rows_group<F, G, 2, 8>(w, slots, groups, panel, n, scratch, y, y_stride, token, out, e);
  return rows_group<F, G, 1, 8>(w, slots, groups, panel, n, scratch, y, y_stride, token, out, e);
}

// The groups [g0, g1) of the whole weight against the tokens [token, token + n), whose panels lie one behind the other.
static void rows_groups(const Packed& w, int64_t g0, int64_t g1, const float* panels, bool one, int64_t n, float* scratch,
                        float* y, int64_t y_stride, int64_t token, const Epilogue& e) {
  const int64_t per_block = w.row_block / w.height, all = w.rows / w.height;
  for (int64_t g = g0; g < g1; ++g) {
    const int64_t first = g / per_block * per_block, groups = all - first < per_block ? all - first : per_block;
    const int32_t* slots = w.slots + 2 * (first * w.k_blocks + (g - first));
    const float* panel = panels;
    for (int64_t j = 0; j < n;) {
      const RowsTile tile = rows_tile(n - j);
      if (one) {  // the single token's row of x serves as its panel
        if (w.height == 8) {
          rows_group<v8, 1, 1, 1>(w, slots, groups, panel, 1, scratch, y, y_stride, token, g * 8, e);
        } else {
          rows_group<vf, 16 / kLanes, 1, 1>(w, slots, groups, panel, 1, scratch, y, y_stride, token, g * 16, e);
        }
      } else if (w.height == 8) {
        rows_run<v8, 1>(w, slots, groups, panel, tile, scratch, y, y_stride, token + j, g * 8, e);
      } else {
        rows_run<vf, 16 / kLanes>(w, slots, groups, panel, tile, scratch, y, y_stride, token + j, g * 16, e);
      }
      panel += w.columns * tile.T;
      j += tile.tokens;
    }
  }
}

static void pack_rows(const float* x, int64_t x_stride, int64_t n, float* panels, int64_t columns, int64_t k0, int64_t k1) {
  for (int64_t j = 0; j < n;) {
    const RowsTile tile = rows_tile(n - j);
    pack_panel(x + j * x_stride, x_stride, tile.tokens, tile.T, panels + k0 * tile.T, k0, k1);
    panels += columns * tile.T;
    j += tile.tokens;
  }
}

static void linear_rows(const Packed& w, const float* x, int64_t x_stride, int64_t n, float* y, int64_t y_stride, const Epilogue& e,
                      int threads) {
  const int64_t groups = w.rows / w.height, scratch_size = w.height * w.k_block + 64;
  const int64_t each = threads == 1 ? groups : (groups + 16 * threads - 1) / (16 * threads);
  const bool one = n == 1;
  Turns turns;
  Ending ending;
#pragma omp parallel num_threads(threads)
  {
    Workspace& own = workspace();
    float* scratch = own.reserve(scratch_size + (one ? 0 : w.columns * (n + 8)));
    float* panels = scratch + scratch_size;
    if (!one) pack_rows(x, x_stride, n, panels, w.columns, 0, w.columns);
    turns.take((groups + each - 1) / each, [&](int64_t u) {
      const int64_t g = u * each, end = g + each < groups ? g + each : groups;
      rows_groups(w, g, end, one ? x : panels, one, n, scratch, y, y_stride, 0, e);
    });
    own.trim();
    ending.leave();
  }
}

// ---- one token, height 1

static inline float dot(const uint16_t* index, const float* values, int64_t n, const float* x) {
  int64_t p = 0;
  float sum = 0.0f;
#if defined(__AVX2__)
  // four loads and three inserts beat a hardware gather; one 64-bit load brings four indices
  const auto four = [&](const uint16_t* from) __attribute__((always_inline)) {
    uint64_t i;
    __builtin_memcpy(&i, from, 8);
    __m128 g = _mm_load_ss(x + (i & 0xffff));
    g = _mm_insert_ps(g, _mm_load_ss(x + (i >> 16 & 0xffff)), 0x10);
    g = _mm_insert_ps(g, _mm_load_ss(x + (i >> 32 & 0xffff)), 0x20);
    return _mm_insert_ps(g, _mm_load_ss(x + (i >> 48)), 0x30);
  };
  __m128 a = _mm_setzero_ps(), b = a;
  for (; p + 8 <= n; p += 8) {
    a = _mm_fmadd_ps(_mm_loadu_ps(values + p), four(index + p), a);
    b = _mm_fmadd_ps(_mm_loadu_ps(values + p + 4), four(index + p + 4), b);
  }
  if (p + 4 <= n) {
    a = _mm_fmadd_ps(_mm_loadu_ps(values + p), four(index + p), a);
    p += 4;
  }
  a = _mm_add_ps(a, b);
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  sum = _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps(a, a, 1)));
#else
  float s[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (; p + 4 <= n; p += 4) {
    for (int j = 0; j < 4; ++j) s[j] += values[p + j] * x[index[p + j]];
  }
  sum = (s[0] + s[1]) + (s[2] + s[3]);
#endif
  for (; p < n; ++p) sum += values[p] * x[index[p]];
  return sum;
}

static void write_one(const float* sums, int64_t rows, float* y, int64_t out, const Epilogue& e) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) write(y + out + r, finish(read<v8>(sums + r), e, 0, out + r));
  for (; r < rows; ++r) y[out + r] = finish_one(sums[r], e, 0, out + r);
}

// Row block b of one token. A function of its own, for the compiler keeps in registers what a lambda reads through its captures.
static __attribute__((noinline)) void dot_row_block(const Packed& w, int64_t b, const float* x, float* sums, float* scratch, float* y,
                                                    const Epilogue& e) {
  const int64_t row = b * w.row_block, rows = row + w.row_block < w.rows ? w.row_block : w.rows - row;
  const int32_t* slots = w.slots + 2 * row * w.k_blocks;
  for (int64_t k = 0; k < w.k_blocks; ++k, slots += 2 * rows) {
    for (int64_t g = 0; g < rows; ++g) {
      const int64_t begin = slots[2 * g], n = slots[2 * g + 2] - begin;
      const float s = dot(w.index + begin, float_values(w, begin, n, scratch), n, x + k * w.k_block);
      float* to = sums + slots[2 * g + 1];
      *to = k == 0 ? s : *to + s;
    }
  }
  write_one(sums, rows, y, row, e);
}

static void linear_dot(const Packed& w, const float* x, float* y, const Epilogue& e, int threads) {
  Turns blocks;
  Ending ending;
#pragma omp parallel num_threads(threads)
  {
    Workspace& own = workspace();
    float* sums = own.reserve(w.row_block + w.k_block + 64);
    float* scratch = sums + w.row_block;
    blocks.take((w.rows + w.row_block - 1) / w.row_block, [&](int64_t b) { dot_row_block(w, b, x, sums, scratch, y, e); });
    own.trim();
    ending.leave();
  }
}
