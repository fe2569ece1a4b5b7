// The gradient of the kept values of a packed weight of kind "groups" (linear_groups.inl): for each entry and row r of its group,
// grad = sum over tokens of dy[token, r] x[token, column]. A tile of T tokens at a time: x is transposed to a panel [K][T], whose
// K-block stays in L1 while the slots of a row block pass.
//
// height 1, 2, 4: vectorised over tokens. dy is transposed to [rows][T]; a sum takes T / lanes multiply-adds, and as many sums as a
// vector has lanes are added up across their lanes together, for each such step takes the ports of a multiply-add.
// height 8, 16: vectorised over the rows of a group, so that nothing is added across lanes. dy is copied to [group][T][height]; its
// vector of a token meets that token's x of several columns.

constexpr int kSddmmTile = 64;

// grad[i] (+)= sums[i] for i < n.
template <class F>
static inline void add_to(float* grad, F sums, int64_t n, bool first) {
  if (n >= lanes_of<F>()) {
    write(grad, first ? sums : read<F>(grad) + sums);
  } else {
    for (int64_t i = 0; i < n; ++i) grad[i] = first ? sums[i] : grad[i] + sums[i];
  }
}

// The n entries of one slot whose groups have H rows.
template <int H>
static void sddmm_slot(const uint16_t* index, int64_t n, const float* x_panel, const float* dy_panel, float* grad, bool first) {
  constexpr int R = kSddmmTile / kLanes, E = kLanes / H;
  vf d[H][R];
  for (int r = 0; r < H; ++r) {
    for (int i = 0; i < R; ++i) d[r][i] = read<vf>(dy_panel + r * kSddmmTile + i * kLanes);
  }
  const auto entry = [&](int64_t p, vf* s) __attribute__((always_inline)) {
    const float* q = x_panel + static_cast<size_t>(index[p]) * kSddmmTile;
#pragma GCC unroll 4
    for (int r = 0; r < H; ++r) {
      s[r] = d[r][0] * read<vf>(q);
#pragma GCC unroll 8
      for (int i = 1; i < R; ++i) s[r] += d[r][i] * read<vf>(q + i * kLanes);
    }
  };
  int64_t p = 0;
  for (; p + E <= n; p += E) {
    vf s[kLanes];
#pragma GCC unroll 16
    for (int j = 0; j < E; ++j) entry(p + j, s + j * H);
    add_to(grad + p * H, lane_sums<kLanes>(s), kLanes, first);
  }
  if (p == n) return;
  vf s[kLanes] = {};
  switch (n - p) {  // a jump into the unrolled loop leaves the sums in registers
#define SP_ENTRY(j) \
  case j + 1: \
    if constexpr (j < E) entry(p + j, s + j * H); \
    [[fallthrough]]
    SP_ENTRY(14);
    SP_ENTRY(13);
    SP_ENTRY(12);
    SP_ENTRY(11);
    SP_ENTRY(10);
    SP_ENTRY(9);
    SP_ENTRY(8);
    SP_ENTRY(7);
    SP_ENTRY(6);
    SP_ENTRY(5);
    SP_ENTRY(4);
    SP_ENTRY(3);
    SP_ENTRY(2);
    SP_ENTRY(1);
    SP_ENTRY(0);
#undef SP_ENTRY
    default: break;
  }
  const int64_t left = (n - p) * H;
  add_to(grad + p * H, left <= 8 ? lane_sums<8>(s) : lane_sums<kLanes>(s), left, first);
}

// The same for groups of G vectors of rows; dy_panel is the group's [T][height].
template <class F, int G>
static void sddmm_tall_slot(const uint16_t* index, int64_t n, const float* x_panel, const float* dy_panel, float* grad, bool first) {
  constexpr int L = lanes_of<F>(), H = G * L, C = 8 / G;
  for (int64_t p = 0; p < n; p += C) {
    const int64_t here = n - p < C ? n - p : C;
    const float* q[C];
    F s[C][G];
    for (int c = 0; c < C; ++c) {
      q[c] = x_panel + static_cast<size_t>(index[p + (c < here ? c : 0)]) * kSddmmTile;
      for (int g = 0; g < G; ++g) s[c][g] = F{};
    }
    for (int t = 0; t < kSddmmTile; ++t) {
      F d[G];
      for (int g = 0; g < G; ++g) d[g] = read<F>(dy_panel + t * H + g * L);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        const F x = broadcast_at<F>(q[c] + t);
        for (int g = 0; g < G; ++g) s[c][g] += x * d[g];
      }
    }
    for (int64_t c = 0; c < here; ++c) {
      for (int g = 0; g < G; ++g) add_to(grad + (p + c) * H + g * L, s[c][g], L, first);
    }
  }
}

static void sddmm_any_slot(int height, const uint16_t* index, int64_t n, const float* x_panel, const float* dy_panel, float* grad,
                           bool first) {
  switch (height) {
    case 1: return sddmm_slot<1>(index, n, x_panel, dy_panel, grad, first);
    case 2: return sddmm_slot<2>(index, n, x_panel, dy_panel, grad, first);
    case 4: return sddmm_slot<4>(index, n, x_panel, dy_panel, grad, first);
    case 8: return sddmm_tall_slot<v8, 1>(index, n, x_panel, dy_panel, grad, first);
    default: return sddmm_tall_slot<vf, 16 / kLanes>(index, n, x_panel, dy_panel, grad, first);
  }
}

// dy rows [0, n) of the outputs [row0, row1) -> panel [(row1 - row0) / height][T][height]; places without a token are zero.
static void copy_groups(const float* dy, int64_t stride, int64_t n, int height, float* panel, int64_t row0, int64_t row1) {
  for (int64_t row = row0; row < row1; row += height) {
    for (int64_t t = 0; t < kSddmmTile; ++t, panel += height) {
      if (t < n) {
        __builtin_memcpy(panel, dy + t * stride + row, static_cast<size_t>(height) * sizeof(float));
      } else {
        __builtin_memset(panel, 0, static_cast<size_t>(height) * sizeof(float));
      }
    }
  }
}

static void sddmm(const Packed& w, const float* x, int64_t x_stride, const float* dy, int64_t dy_stride, int64_t n, float* grad) {
  const int64_t row_blocks = (w.rows + w.row_block - 1) / w.row_block;
  const int64_t entries = w.slots[2 * (w.rows / w.height * w.k_blocks)];
  if (n <= 0) {
    __builtin_memset(grad, 0, static_cast<size_t>(entries * w.height) * sizeof(float));
    return;
  }
  const int threads = threads_for_cycles(entries * w.height * (n + 8) / 8 + (w.rows + w.columns) * n / 4);
  Ending ending;
#pragma omp parallel num_threads(threads)
  {
    // every thread packs all of x for itself: that costs less than waiting for the others at each tile, asleep or not
    const Range blocks = share(row_blocks, 1, thread_id(), team_size());
    const int64_t row0 = blocks.begin * w.row_block, row1 = blocks.end * w.row_block < w.rows ? blocks.end * w.row_block : w.rows;
    Workspace& own = workspace();
    float* x_panel = own.reserve((w.columns + w.row_block * (blocks.end - blocks.begin)) * kSddmmTile);
    float* dy_panel = x_panel + w.columns * kSddmmTile;
    for (int64_t t = 0; t < n && row0 < row1; t += kSddmmTile) {
      const int64_t here = n - t < kSddmmTile ? n - t : kSddmmTile;
      pack_panel(x + t * x_stride, x_stride, here, kSddmmTile, x_panel, 0, w.columns);
      if (w.height >= 8) {
        copy_groups(dy + t * dy_stride, dy_stride, here, w.height, dy_panel, row0, row1);
      } else {
        pack_panel(dy + t * dy_stride, dy_stride, here, kSddmmTile, dy_panel, row0, row1);
      }
      for (int64_t b = blocks.begin; b < blocks.end; ++b) {
        const int64_t row = b * w.row_block, rows = row + w.row_block < w.rows ? w.row_block : w.rows - row;
        const int64_t groups = rows / w.height;
        const int32_t* slots = w.slots + 2 * (row / w.height * w.k_blocks);
        for (int64_t k = 0; k < w.k_blocks; ++k, slots += 2 * groups) {
          for (int64_t g = 0; g < groups; ++g) {
            const int64_t begin = slots[2 * g];
            sddmm_any_slot(w.height, w.index + begin, slots[2 * g + 2] - begin, x_panel + k * w.k_block * kSddmmTile,
                           dy_panel + (row - row0 + static_cast<int64_t>(slots[2 * g + 1]) * w.height) * kSddmmTile,
                           grad + begin * w.height, t == 0);
          }
        }
      }
    }
    own.trim();
    ending.leave();
  }
}

static SddmmKernels sddmm_kernels() { return {sddmm}; }
