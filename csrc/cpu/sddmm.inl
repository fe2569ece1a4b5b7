// The gradient of the kept values of a packed weight of kind "groups" (spmm.inl): for each entry and row r of its group,
// grad = sum over tokens of dy[token, r] x[token, column]. x and dy are transposed to panels [K][T] and [N_out][T], a tile of T
// tokens at a time; a K-block of x's panel stays in L1 while the slots of a row block pass.

constexpr int kSddmmTile = 64;

// grad[p * height + r] (+)= for the n entries of one slot and the height rows of its group.
static void sddmm_slot(const uint16_t* index, int64_t n, int height, const float* x_panel, const float* dy_panel, float* grad,
                       bool first) {
  constexpr int R = kSddmmTile / kLanes;
  for (int r = 0; r < height; ++r) {
    vf d[R];
    for (int i = 0; i < R; ++i) d[i] = read<vf>(dy_panel + r * kSddmmTile + i * kLanes);
    for (int64_t p = 0; p < n; p += 8) {
      const int64_t here = n - p < 8 ? n - p : 8;
      v8 s[8];
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        const float* q = x_panel + static_cast<size_t>(index[p + (j < here ? j : 0)]) * kSddmmTile;
        vf sum = d[0] * read<vf>(q);
#pragma GCC unroll 8
        for (int i = 1; i < R; ++i) sum += d[i] * read<vf>(q + i * kLanes);
        s[j] = halves_sum(sum);
      }
      const v8 total = sums_of_eight(s);
      for (int64_t j = 0; j < here; ++j) {
        float* to = grad + (p + j) * height + r;
        *to = first ? total[j] : *to + total[j];
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
  Workspace& shared = shared_workspace();
  float* x_panel = shared.reserve((w.columns + w.rows) * kSddmmTile);
  float* dy_panel = x_panel + w.columns * kSddmmTile;
#pragma omp parallel num_threads(threads)
  {
    const Range columns = share(w.columns, 16, thread_id(), team_size());
    const Range blocks = share(row_blocks, 1, thread_id(), team_size());
    const int64_t row0 = blocks.begin * w.row_block, row1 = blocks.end * w.row_block < w.rows ? blocks.end * w.row_block : w.rows;
    for (int64_t t = 0; t < n; t += kSddmmTile) {
      const int64_t here = n - t < kSddmmTile ? n - t : kSddmmTile;
      pack_panel(x + t * x_stride, x_stride, here, kSddmmTile, x_panel + columns.begin * kSddmmTile, columns.begin, columns.end);
      pack_panel(dy + t * dy_stride, dy_stride, here, kSddmmTile, dy_panel + row0 * kSddmmTile, row0, row1 < row0 ? row0 : row1);
#pragma omp barrier
      for (int64_t b = blocks.begin; b < blocks.end; ++b) {
        const int64_t row = b * w.row_block, rows = row + w.row_block < w.rows ? w.row_block : w.rows - row;
        const int64_t groups = rows / w.height;
        const int32_t* slots = w.slots + 2 * (row / w.height * w.k_blocks);
        for (int64_t k = 0; k < w.k_blocks; ++k, slots += 2 * groups) {
          for (int64_t g = 0; g < groups; ++g) {
            const int64_t begin = slots[2 * g];
            sddmm_slot(w.index + begin, slots[2 * g + 2] - begin, w.height, x_panel + k * w.k_block * kSddmmTile,
                       dy_panel + (row + static_cast<int64_t>(slots[2 * g + 1]) * w.height) * kSddmmTile, grad + begin * w.height,
                       t == 0);
          }
        }
      }
#pragma omp barrier
    }
  }
  shared.trim();
}
