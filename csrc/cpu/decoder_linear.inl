// The products of a decoder's step: a weight with the rows of few tokens, cut into pieces of outputs that a team shares. A thread makes
// x for itself, normed or gated, in the order that the weight's kernel reads: that costs less than waiting for another's.
//
// Weights of each kind use the texts of linear_bitmask.inl, linear_bitmask8.inl, linear_groups.inl and linear_quads.inl, whole ones that
// of rounded.inl.

// How a kernel wants x.
enum class RowOrder {
  plain,    // [n][stride], the columns padded with zeros to 64
  apart2,   // the same, columns 2 apart beside each other (in_order)
  tall,     // panels as pack_rows makes them
  tile,     // one panel [columns][tile_width(n)]
  rounded,  // in 8 bits, as round_rows makes them
  quads,    // a rounded panel of rounded_width(n) tokens
};

static inline int64_t padded(int64_t columns) { return (columns + 63) / 64 * 64; }

static RowOrder order_of(const RowWeight& w, int64_t n) {
  const Packed& p = w.packed;
  if (w.whole) return RowOrder::plain;
  if (p.kind == kBitmask8) return RowOrder::rounded;
  if (p.kind == kQuads) return RowOrder::quads;
  if (p.kind == kBitmask) {
    return p.values_dtype == kBfloat16 && has_narrow_expand() ? RowOrder::apart2 : RowOrder::plain;
  }
  if (n == 1 && (p.height == 1 || p.height >= 8)) return RowOrder::plain;
  return p.height >= 8 ? RowOrder::tall : RowOrder::tile;
}

// Outputs of a piece: a few thousand cycles of work, in whole vectors, groups or row blocks.
static int64_t piece_rows(const RowWeight& w) {
  const Packed& p = w.packed;
  if (!w.whole && (p.kind == kQuads || (p.kind == kGroups && p.height < 8))) return p.row_block;
  const int64_t rows = (int64_t(32768) / p.columns + 15) / 16 * 16;
  return rows < 16 ? 16 : rows;
}
static int64_t pieces_of(const RowWeight& w) { return (w.packed.rows + piece_rows(w) - 1) / piece_rows(w); }

// ---- packed

template <template <int> class By>
static void spread_piece(const Packed& w, const float* x, int64_t x_stride, int64_t n, int64_t r0, int64_t r1, float* y,
                         int64_t y_stride, const Epilogue& e) {
  for (int64_t r = r0; r < r1; r += 16) {  // few at a time, so that their bits and values stay in the cache while the tokens pass
    const int64_t end = r + 16 < r1 ? r + 16 : r1;
    switch (w.values_dtype) {
      case kFloat32: bitmask_tokens<By<kFloat32>>(w, x, x_stride, n, r, end, y, y_stride, 0, e); break;
      case kBfloat16: bitmask_tokens<By<kBfloat16>>(w, x, x_stride, n, r, end, y, y_stride, 0, e); break;
      default: bitmask_tokens<By<kInt8>>(w, x, x_stride, n, r, end, y, y_stride, 0, e);
    }
  }
}

// Floats that run_piece takes beside x.
static int64_t piece_scratch(const RowWeight& w) {
  if (w.whole || (w.packed.kind != kGroups && w.packed.kind != kQuads)) return 0;
  return w.packed.row_block * 16 + w.packed.height * w.packed.k_block + 64;
}

// Piece i of y [n][y_stride] = epilogue(x W^T), x in the order that order_of says; scratch: piece_scratch floats.
static void run_piece(const RowWeight& weight, int64_t i, const float* x, int64_t n, float* y, int64_t y_stride, const Epilogue& e,
                      float* scratch) {
  const Packed& w = weight.packed;
  const int64_t each = piece_rows(weight), r0 = i * each, r1 = r0 + each < w.rows ? r0 + each : w.rows, stride = padded(w.columns);
  if (weight.whole) {
    return whole_piece(w.values, w.values_dtype, w.columns, x, stride, n, r0, r1, y, y_stride, e);
  }
  if (w.kind == kBitmask) {
#if SP_LANES == 16 && defined(__AVX512F__)
    if (w.values_dtype != kBfloat16 || has_narrow_expand()) return spread_piece<ByExpand>(w, x, stride, n, r0, r1, y, y_stride, e);
#endif
    return spread_piece<ByTable>(w, x, stride, n, r0, r1, y, y_stride, e);
  }
  if (w.kind == kBitmask8) {
    const int64_t width = padded(w.columns);
    const RoundedRows rounded = {reinterpret_cast<const uint8_t*>(x), width, x + n * (width / 4),
                                 reinterpret_cast<const int32_t*>(x + n * (width / 4) + n)};
    for (int64_t r = r0; r < r1; r += 16) bitmask8_tokens(w, rounded, n, r, r + 16 < r1 ? r + 16 : r1, y, y_stride, 0, e);
    return;
  }
  if (w.kind == kQuads) {
    Epilogue after = e;
    after.scale = nullptr;  // the products are scaled already
    const int T = rounded_width(n);
    kernels().int8.block(w, i, T, rounded_panel(x, w.columns, T), scratch);
    return write_rows(scratch, T, n, r1 - r0, y, y_stride, 0, r0, after);
  }
  if (w.height >= 8) {
    return rows_groups(w, r0 / w.height, r1 / w.height, x, n == 1, n, scratch, y, y_stride, 0, e);
  }
  float* values = scratch + w.row_block * 16;
  if (n == 1 && w.height == 1) return dot_row_block(w, i, x, scratch, values, y, e);
  run_panel_tile(w, tile_width(n), x, n, scratch, values, i, i + 1, y, y_stride, 0, e);
}

// ---- x

// to = the norm of d floats; to may be x.
static void norm_row(const RowNorm& m, const float* x, int64_t d, float* to) {
  float middle = 0.0f;
  if (m.centred) {
    vf sum[4] = {};
    float rest = 0.0f;
    int64_t i = 0;
    for (; i + 4 * kLanes <= d; i += 4 * kLanes) {
      for (int u = 0; u < 4; ++u) sum[u] += load(x + i + u * kLanes);
    }
    for (; i < d; ++i) rest += x[i];
    middle = (total((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest) / static_cast<float>(d);
  }
  const float scale = 1.0f / std::sqrt(mean_square(x, d, middle) + m.eps);
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    const vf v = (load(x + i) - middle) * scale * load(m.gain + i);
    store(to + i, m.shift ? v + load(m.shift + i) : v);
  }
  for (; i < d; ++i) to[i] = (x[i] - middle) * scale * m.gain[i] + (m.shift ? m.shift[i] : 0.0f);
}

// One thread's x of the steps that follow each other without a barrier.
class RowInput {
 public:
  // memory: 2 * floats(widest).
  RowInput(float* memory, int64_t widest, int64_t n) : plain_(memory), ordered_(memory + floats(widest, n)), n_(n) {}
  static int64_t floats(int64_t widest, int64_t n) { return padded(widest) * (n + 8) + 64; }

  // x of step s from its buffer, whose rows are `stride` long. fresh: what was made before is no longer what the buffer holds.
  const float* of(const RowStep& s, const float* buffer, int64_t stride, bool fresh) {
    const int64_t columns = s.weight->packed.columns, width = padded(columns);
    const bool same = !fresh && made_ && made_->from == s.from && made_->from_row == s.from_row && made_->gated == s.gated &&
                      made_->norm.gain == s.norm.gain && made_->norm.shift == s.norm.shift && made_->norm.eps == s.norm.eps &&
                      made_->norm.centred == s.norm.centred && made_->weight->packed.columns == columns;
    if (!same) {
      for (int64_t j = 0; j < n_; ++j) {
        const float* from = buffer + j * stride + s.from_row;
        float* to = plain_ + j * width;
        if (s.gated) {
          int64_t k = 0;
          for (; k + kLanes <= columns; k += kLanes) store(to + k, load(from + k) * load(from + columns + k));
          for (; k < columns; ++k) to[k] = from[k] * from[columns + k];
        } else if (s.norm.gain) {
          norm_row(s.norm, from, columns, to);
        } else {
          __builtin_memcpy(to, from, static_cast<size_t>(columns) * sizeof(float));
        }
        __builtin_memset(to + columns, 0, static_cast<size_t>(width - columns) * sizeof(float));
      }
      has_ordered_ = false;
    }
    made_ = &s;
    const RowOrder order = order_of(*s.weight, n_);
    if (order == RowOrder::plain) return plain_;
    if (has_ordered_ && order_ == order) return ordered_;
    order_ = order;
    has_ordered_ = true;
    switch (order) {
      case RowOrder::tall: pack_rows(plain_, width, n_, ordered_, columns, 0, columns); break;
      case RowOrder::quads: round_panel(plain_, width, n_, rounded_width(n_), columns, ordered_); break;
      case RowOrder::rounded: round_rows(plain_, width, n_, columns, ordered_); break;
      case RowOrder::tile: pack_panel(plain_, width, n_, tile_width(n_), ordered_, 0, columns); break;
      default:
        __builtin_memcpy(ordered_, plain_, static_cast<size_t>(width * n_) * sizeof(float));
#if SP_LANES == 16 && defined(__AVX512F__)
        if (order == RowOrder::apart2) in_order<ByExpand<kBfloat16>>(ordered_, width * n_);
#endif
    }
    return ordered_;
  }

 private:
  float *plain_, *ordered_;
  int64_t n_;
  const RowStep* made_ = nullptr;
  RowOrder order_ = RowOrder::plain;
  bool has_ordered_ = false;
};
