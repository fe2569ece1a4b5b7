// A stack of encoder layers, or of decoder layers that get a prompt, as one call: steps on panels [feature][token] that a thread takes its
// sequences through from the first step to the last, so that activations stay in its L2, or that all threads share where there are few
// sequences.
//
// A unit is some sequences side by side, its tokens in panels of kTile lanes; lanes without a token hold anything and are never read
// into another lane. Every step works on buffers of the unit, named by number; sparseprune/encoder_program.py lists the steps.

// x rows of these tokens, columns [0, columns) -> panel [columns][T]; lanes without a token are zero.
static void gather_panel(const float* x, int64_t x_stride, const int32_t* row, int64_t n, int T, float* panel, int64_t columns) {
  int64_t k = 0;
  for (; k + 16 <= columns; k += 16) {  // a whole cache line of each token, so that none is fetched twice
    for (int j = 0; j < T; j += 8) {
      for (int part = 0; part < 16; part += 8) {
        v8 r[8];
        for (int i = 0; i < 8; ++i) r[i] = j + i < n ? read<v8>(x + row[j + i] * x_stride + k + part) : v8{};
        transpose8(r);
        for (int i = 0; i < 8; ++i) write(panel + (k + part + i) * T + j, r[i]);
      }
    }
  }
  for (; k < columns; ++k) {
    for (int j = 0; j < T; ++j) panel[k * T + j] = j < n ? x[row[j] * x_stride + k] : 0.0f;
  }
}

// The other way: n tokens of panel [columns][T], token j to `columns` floats at place(j).
template <class Place>
static void scatter_panel(const float* panel, int T, int64_t n, int64_t columns, Place place) {
  for (int64_t j = 0; j < n; j += 8) {
    const int here = n - j < 8 ? static_cast<int>(n - j) : 8;
    int64_t k = 0;
    for (; k + 8 <= columns; k += 8) {
      v8 v[8];
      for (int i = 0; i < 8; ++i) v[i] = read<v8>(panel + (k + i) * T + j);
      transpose8(v);
      for (int i = 0; i < here; ++i) write(place(j + i) + k, v[i]);
    }
    for (; k < columns; ++k) {
      for (int i = 0; i < here; ++i) place(j + i)[k] = panel[k * T + j + i];
    }
  }
}

// Rows [row, row + depth) of panel p, a head of keys or values, to a cache: each token's one behind the other from `to` on, a sequence
// `batch` floats behind the one before. number: the token's in [batch][length]; position: its place in its sequence.
static void keep_head(const Panels& from, int64_t p, int64_t row, int64_t depth, int64_t n, const int32_t* number,
                      const int32_t* position, int64_t length, float* to, int64_t batch) {
  scatter_panel(from.row(p, row), from.width(p), n, depth, [&](int64_t j) {
    return to + number[j] / length * batch + position[j] * depth;
  });
}

// ---- linear

// Adds the products of row block b of a packed weight to `sums` [rows of the block][T], or starts them; and bias [rows of the block],
// where it is not null.
template <class F, int T>
static void add_row_block(const Packed& w, int64_t b, const float* panel, float* sums, bool first, const float* bias, float* scratch) {
  const int64_t row = b * w.row_block, rows = row + w.row_block < w.rows ? w.row_block : w.rows - row, groups = rows / w.height;
  const int32_t* slots = w.slots + 2 * (row / w.height * w.k_blocks);
  if (w.height >= 8) {
    constexpr int L = lanes_of<F>(), V = kManyRegisters ? 8 : 4, R = T / L % 2 == 0 ? 2 : T / L;
    for (int c = 0; c < T; c += R * L) {  // these lanes of a K-block stay in L1 while the groups pass
      for (int64_t k = 0; k < w.k_blocks; ++k) {
        const float* block = panel + k * w.k_block * T + c;
        const int32_t* slot = slots + 2 * k * groups;
        const float* start = k == 0 ? bias : nullptr;
        for (int64_t g = 0; g < groups; ++g, slot += 2) {
          const int64_t begin = slot[0], count = slot[2] - begin;
          const float* values = float_values(w, begin * w.height, count * w.height, scratch);
          for (int v = 0; v < w.height; v += V) {
            const int64_t at = g * w.height + v;
            panel_group<F, T, R, V, false>(block, w.index + begin, values + v, w.height, count, sums + at * T + c, first && k == 0,
                                           start ? start + at : nullptr);
          }
        }
      }
    }
    return;
  }
  for (int64_t k = 0; k < w.k_blocks; ++k, slots += 2 * groups) {
    const float *block = panel + k * w.k_block * T, *start = k == 0 ? bias : nullptr;
    const bool fresh = first && k == 0;
    if (w.height == 1) {
      panel_slots<F, T, 1>(w, slots, groups, block, sums, fresh, scratch, start);
    } else if (w.height == 2) {
      panel_slots<F, T, 2>(w, slots, groups, block, sums, fresh, scratch, start);
    } else {
      panel_slots<F, T, 4>(w, slots, groups, block, sums, fresh, scratch, start);
    }
  }
}

// For each width of a panel; a new kind of weight gets a function like the above and its line here.
static __attribute__((noinline)) void add_row_block(const Packed& w, int T, int64_t b, const float* panel, float* sums, bool first,
                                                    const float* bias, float* scratch) {
  switch (T) {
#if SP_LANES == 8
    case 8: return add_row_block<vf, 8>(w, b, panel, sums, first, bias, scratch);
#endif
    case 16: return add_row_block<vf, 16>(w, b, panel, sums, first, bias, scratch);
    case 32: return add_row_block<vf, 32>(w, b, panel, sums, first, bias, scratch);
    case 48: return add_row_block<vf, 48>(w, b, panel, sums, first, bias, scratch);
    default: return add_row_block<vf, 64>(w, b, panel, sums, first, bias, scratch);
  }
}

// The same of a dense weight, [rows][columns] in any dtype of values: pieces of it are turned into entries of kWholeRows values, as a
// packed one of that height has them. scratch: kWholeScratch floats.
constexpr int kWholeRows = 16, kWholeColumns = 256;
static_assert(kWholeRows * kWholeColumns + 8 * kTile <= kWholeScratch);
struct WholePlaces {
  uint16_t at[kWholeColumns];
  constexpr WholePlaces() : at() {
    for (int i = 0; i < kWholeColumns; ++i) at[i] = static_cast<uint16_t>(i);
  }
};
static constexpr WholePlaces kWholePlaces;

static inline v8 widen_eight(const float* p) { return read<v8>(p); }
static inline v8 widen_eight(const uint16_t* p) { return widen_bf16(p); }
static inline v8 widen_eight(const int8_t* p) { return widen_int8(p); }

template <class V>
static void turn_whole(const V* w, int64_t columns, int64_t rows, int64_t n, float* to) {
  for (int64_t r = 0; r < kWholeRows; r += 8) {
    int64_t k = 0;
    for (; k + 8 <= n; k += 8) {
      v8 v[8];
      for (int i = 0; i < 8; ++i) v[i] = r + i < rows ? widen_eight(w + (r + i) * columns + k) : v8{};
      transpose8(v);
      for (int i = 0; i < 8; ++i) write(to + (k + i) * kWholeRows + r, v[i]);
    }
    for (; k < n; ++k) {
      for (int i = 0; i < 8; ++i) to[k * kWholeRows + r + i] = r + i < rows ? whole_one(w[(r + i) * columns + k]) : 0.0f;
    }
  }
}

template <class F, int T>
static void add_whole_block(const Packed& w, int64_t b, const float* panel, float* sums, bool first, const float* bias, float* scratch) {
  constexpr int L = lanes_of<F>(), V = kManyRegisters ? 8 : 4, R = T / L % 2 == 0 ? 2 : T / L;
  const int64_t row = b * w.row_block, rows = row + w.row_block < w.rows ? w.row_block : w.rows - row;
  float *values = scratch, *rest = values + kWholeRows * kWholeColumns;  // rest: the last rows, fewer than V
  for (int64_t r = 0; r < rows; r += kWholeRows) {
    const int64_t here = rows - r < kWholeRows ? rows - r : kWholeRows;
    for (int64_t k = 0; k < w.columns; k += kWholeColumns) {
      const int64_t n = w.columns - k < kWholeColumns ? w.columns - k : kWholeColumns, at = (row + r) * w.columns + k;
      switch (w.values_dtype) {
        case kFloat32: turn_whole(static_cast<const float*>(w.values) + at, w.columns, here, n, values); break;
        case kBfloat16: turn_whole(static_cast<const uint16_t*>(w.values) + at, w.columns, here, n, values); break;
        default: turn_whole(static_cast<const int8_t*>(w.values) + at, w.columns, here, n, values);
      }
      const bool fresh = first && k == 0;
      for (int64_t v = 0; v < here; v += V) {
        const bool all = v + V <= here;
        float* to = all ? sums + (r + v) * T : rest;
        if (!all && !fresh) __builtin_memcpy(rest, sums + (r + v) * T, static_cast<size_t>(here - v) * T * sizeof(float));
        for (int c = 0; c < T; c += R * L) {
          panel_group<F, T, R, V, false>(panel + k * T + c, kWholePlaces.at, values + v, kWholeRows, n, to + c, fresh);
        }
        if (!all) __builtin_memcpy(sums + (r + v) * T, rest, static_cast<size_t>(here - v) * T * sizeof(float));
      }
    }
    for (int64_t i = r; bias && i < r + here; ++i) {
      for (int c = 0; c < T; c += kLanes) store(sums + i * T + c, load(sums + i * T + c) + bias[i]);
    }
  }
}

static __attribute__((noinline)) void add_whole_block(const Packed& w, int T, int64_t b, const float* panel, float* sums, bool first,
                                                      const float* bias, float* scratch) {
  switch (T) {
#if SP_LANES == 8
    case 8: return add_whole_block<vf, 8>(w, b, panel, sums, first, bias, scratch);
#endif
    case 16: return add_whole_block<vf, 16>(w, b, panel, sums, first, bias, scratch);
    case 32: return add_whole_block<vf, 32>(w, b, panel, sums, first, bias, scratch);
    case 48: return add_whole_block<vf, 48>(w, b, panel, sums, first, bias, scratch);
    default: return add_whole_block<vf, 64>(w, b, panel, sums, first, bias, scratch);
  }
}

// One function an activation, so that no lane asks again which it is.
template <int kind>
static void activate_rows(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(x + i, activate<vf>(load(x + i), kind));
}
static void activate_rows(float* x, int64_t n, int activation) {
  static_assert(kActivations == 5, "activate_rows: a new activation needs a case here");
  switch (activation) {
    case kNone: return;
    case kRelu: return activate_rows<kRelu>(x, n);
    case kGelu: return activate_rows<kGelu>(x, n);
    case kGeluTanh: return activate_rows<kGeluTanh>(x, n);
    case kSilu: return activate_rows<kSilu>(x, n);
    default: __builtin_trap();  // bindings let no other code in
  }
}

// The same for a weight of kind "quads", whose step reads a rounded panel.
static void quads_block(const Step& s, const Panels& from, const Panels& to, int64_t b, int64_t p, float* scratch) {
  const Packed& w = *s.weight;
  const int T = from.width(p);
  const int64_t row = b * w.row_block, rows = row + w.row_block < w.rows ? w.row_block : w.rows - row;
  float* y = to.row(p, s.to_row + row);
  float* sums = s.combine == kReplace ? y : scratch;
  kernels().int8.block(w, b, T, rounded_panel(from.panel(p), w.columns, T), sums);
  if (s.bias) {
    for (int64_t r = 0; r < rows; ++r) {
      const vf bias = splat(s.bias[row + r]);
      for (int i = 0; i < T; i += kLanes) store(sums + r * T + i, load(sums + r * T + i) + bias);
    }
  }
  activate_rows(sums, rows * T, s.activation);
  if (s.combine == kReplace) return;
  for (int64_t i = 0; i < rows * T; i += kLanes) {
    const vf was = load(y + i), sum = load(sums + i);
    store(y + i, s.combine == kAdd ? was + sum : was * sum);
  }
}

typedef void AddBlock(const Packed&, int, int64_t, const float*, float*, bool, const float*, float*);

// Row block b of a linear step for panel p. scratch: row_block * kTile floats and those that the values need.
static void linear_block(const Step& s, const Panels& from, const Panels& to, int64_t b, int64_t p, float* scratch) {
  const Packed& w = *s.weight;
  if (w.kind == kQuads) return quads_block(s, from, to, b, p, scratch);
  const int T = from.width(p);
  const int64_t row = b * w.row_block, rows = row + w.row_block < w.rows ? w.row_block : w.rows - row;
  const float* x = from.row(p, s.from_row);
  float* y = to.row(p, s.to_row + row);
  float* values = scratch + w.row_block * kTile;
  const float* bias = s.bias ? s.bias + row : nullptr;
  const auto add = s.whole ? static_cast<AddBlock*>(add_whole_block) : static_cast<AddBlock*>(add_row_block);
  if (s.combine == kReplace || (s.combine == kAdd && !s.activation && !s.scale)) {  // summed where the result belongs
    const bool fresh = s.combine == kReplace;
    add(w, T, b, x, y, fresh, s.scale ? nullptr : bias, values);
    if (s.scale) {
      for (int64_t r = 0; r < rows; ++r) {
        const float scale = s.scale[row + r], shift = bias ? bias[r] : 0.0f;
        for (int i = 0; i < T; i += kLanes) store(y + r * T + i, load(y + r * T + i) * scale + shift);
      }
    }
    return activate_rows(y, rows * T, s.activation);
  }
  add(w, T, b, x, scratch, true, nullptr, values);
  for (int64_t r = 0; r < rows; ++r) {
    const float scale = s.scale ? s.scale[row + r] : 1.0f, shift = bias ? bias[r] : 0.0f;
    for (int i = 0; i < T; i += kLanes) store(scratch + r * T + i, load(scratch + r * T + i) * scale + shift);
  }
  activate_rows(scratch, rows * T, s.activation);
  for (int64_t i = 0; i < rows * T; i += kLanes) {
    const vf was = load(y + i), sum = load(scratch + i);
    store(y + i, s.combine == kAdd ? was + sum : was * sum);
  }
}

// ---- norms

// One vector of lanes, column c of panel p: LayerNorm, or RMSNorm where s.centred is false.
static void norm_lanes(const Step& s, const Panels& from, const Panels& to, int64_t p, int c) {
  const int64_t stride = from.width(p), n = s.rows;
  const float* x = from.row(p, s.from_row) + c;
  float* y = to.row(p, s.to_row) + c;
  const float share = 1.0f / static_cast<float>(n);
  vf middle = vf{};
  if (s.centred) {
    vf sum[4] = {};
    int64_t k = 0;
    for (; k + 4 <= n; k += 4) {
      for (int u = 0; u < 4; ++u) sum[u] += load(x + (k + u) * stride);
    }
    for (; k < n; ++k) sum[0] += load(x + k * stride);
    middle = ((sum[0] + sum[1]) + (sum[2] + sum[3])) * share;
  }
  vf square[4] = {};
  int64_t k = 0;
  for (; k + 4 <= n; k += 4) {
    for (int u = 0; u < 4; ++u) {
      const vf v = load(x + (k + u) * stride) - middle;
      square[u] += v * v;
    }
  }
  for (; k < n; ++k) {
    const vf v = load(x + k * stride) - middle;
    square[0] += v * v;
  }
  const vf variance = ((square[0] + square[1]) + (square[2] + square[3])) * share + s.eps;
  vf scale;
  for (int i = 0; i < kLanes; ++i) scale[i] = 1.0f / std::sqrt(variance[i]);
  for (k = 0; k < n; ++k) {
    const vf v = (load(x + k * stride) - middle) * scale * s.gain[k];
    store(y + k * stride, s.shift ? v + s.shift[k] : v);
  }
}

// ---- running the steps

// The threads that work at one unit: a thread alone, or all of them, who take the pieces of a step in turn. A step is over when its
// pieces are, whoever did them: a thread that wakes late, or is put aside between two pieces, keeps no one waiting.
class Team {
 public:
  Team() = default;
  explicit Team(Turns* turns) : turns_(turns) {}

  // Runs piece(i) for every i in [0, n), some of them here; no one goes on before all are done, unless `wait` is false.
  template <class F>
  void each(int64_t n, bool wait, F piece) {
    if (turns_ == nullptr) {
      for (int64_t i = 0; i < n; ++i) piece(i);
      return;
    }
    Turns& mine = turns_[step_];
    mine.take(n, [&](int64_t i) {
      piece(i);
      mine.last(n);
    });
    pieces_[open_++] = n;
    ++step_;
    if (!wait && open_ < kMostOpen) return;
    for (int i = 0; i < open_; ++i) turns_[step_ - open_ + i].wait(pieces_[i]);
    open_ = 0;
  }

 private:
  static constexpr int kMostOpen = 8;
  Turns* turns_ = nullptr;    // one a step
  int64_t step_ = 0;
  int64_t pieces_[kMostOpen]; // of the steps that no one has waited for
  int open_ = 0;
};

// Floats that a unit of this many tokens takes in all buffers, and what one thread needs beside them.
static int64_t lanes_for(int64_t tokens) {
  const int64_t whole = (tokens - 1) / kTile * kTile, rest = tokens - whole;
  const int width = tile_width(rest);
  return whole + (width < kLanes ? kLanes : width);
}
static int64_t scratch_for(const Program& program, int64_t longest) {
  return (program.scratch + longest * kQueryVectors * kLanes + 127) / 64 * 64;
}

static void run_unit(const Program& program, const Sequences& batch, const Unit& unit, const float* x, int64_t x_stride, float* y,
                     float* buffers, float* scratch, Team team) {
  const int64_t lanes = lanes_for(unit.tokens);
  const int last = static_cast<int>(lanes - (unit.tokens - 1) / kTile * kTile);
  Panels buffer[kMostBuffers];
  for (int64_t b = 0, place = 0; b < program.buffers; place += program.rows[b] * lanes, ++b) {
    buffer[b] = {buffers + place, program.rows[b], unit.tokens, last};
  }
  const int32_t *row = batch.row + unit.first, *position = batch.position + unit.first;
  const int64_t panels = buffer[0].count(), vectors = lanes / kLanes;
  const auto tokens_in = [&](int64_t p) { return p + 1 < panels ? kTile : unit.tokens - p * kTile; };
  team.each(panels, true, [&](int64_t p) {
    gather_panel(x, x_stride, row + p * kTile, tokens_in(p), buffer[0].width(p), buffer[0].panel(p), program.rows[0]);
  });
  for (int64_t i = 0; i < program.steps; ++i) {
    const Step& s = program.step[i];
    const Panels &from = buffer[s.from], &to = buffer[s.to];
    switch (s.kind) {
      case kLinear: {
        const int64_t blocks = (s.weight->rows + s.weight->row_block - 1) / s.weight->row_block;
        team.each(blocks * panels, !s.together, [&](int64_t n) { linear_block(s, from, to, n / panels, n % panels, scratch); });
        break;
      }
      case kNorm:
        team.each(vectors, !s.together, [&](int64_t v) {
          norm_lanes(s, from, to, v * kLanes / kTile, static_cast<int>(v * kLanes % kTile));
        });
        break;
      case kRound:
        team.each(vectors, !s.together, [&](int64_t v) {
          const int64_t p = v * kLanes / kTile, c = v * kLanes % kTile;
          const int T = from.width(p);
          round_lanes(from.row(p, s.from_row) + c, T, s.rows, T, to.panel(p) + c);
        });
        break;
      case kRotary:
        team.each(vectors, !s.together, [&](int64_t v) {
          rotate_lanes(to, s.to_row, s.heads, s.depth, s.every, v * kLanes / kTile, static_cast<int>(v * kLanes % kTile),
                       s.each ? row : position, batch.tables[s.table], batch.tables[s.table + 1]);
        });
        break;
      case kAttention:  // panels are shared, not sequences: two of these may meet in one vector of lanes
        team.each(s.heads * panels, !s.together, [&](int64_t n) {
          const int64_t h = n % s.heads, kv = h / (s.heads / s.kv_heads), p = panels - 1 - n / s.heads;  // where causal, the last see most
          const Head head = {s.from_row + h * s.every, s.k_row + kv * s.every, s.v_row + kv * s.every, s.to_row + h * s.depth, s.depth};
          const float* bias = s.table < 0 ? nullptr : batch.tables[s.table] + h * batch.length * batch.length;
          const ScoreTerms terms = {bias, batch.length, s.window, s.causal, position, s.factor};
          for (int64_t q = unit.sequence; q < unit.sequence + unit.sequences; ++q) {
            const int64_t begin = batch.start[q] - unit.first, end = batch.start[q + 1] - unit.first;
            if (begin < (p + 1) * kTile && p * kTile < end) attend_panel(from, to, head, begin, end, p, terms, scratch);
          }
        });
        break;
      case kKeep: {
        if (batch.cache == nullptr) break;
        const CacheLayer& c = batch.cache[s.cache];
        team.each(2 * s.kv_heads * panels, !s.together, [&](int64_t n) {
          const int64_t p = n / (2 * s.kv_heads), kv = n / 2 % s.kv_heads;
          const int32_t *number = row + p * kTile, *place = position + p * kTile;
          if (n % 2) {
            keep_head(from, p, s.v_row + kv * s.every, s.depth, tokens_in(p), number, place, batch.length, c.values + kv * c.value_head, c.value_batch);
          } else {
            keep_head(from, p, s.k_row + kv * s.every, s.depth, tokens_in(p), number, place, batch.length, c.keys + kv * c.key_head, c.key_batch);
          }
        });
        break;
      }
    }
  }
  const Panels& result = buffer[program.result];
  team.each(panels, true, [&](int64_t p) {
    const int32_t* mine = row + p * kTile;
    scatter_panel(result.panel(p), result.width(p), tokens_in(p), result.rows, [&](int64_t j) { return y + mine[j] * result.rows; });
  });
}

static void encoder(const Program& program, const Sequences& batch, const float* x, int64_t x_stride, float* y, int threads,
                    bool shared) {
  int64_t floats = 0, most = 0;
  for (int64_t b = 0; b < program.buffers; ++b) floats += program.rows[b];
  for (int64_t u = 0; u < batch.units; ++u) most = batch.unit[u].tokens > most ? batch.unit[u].tokens : most;
  if (most == 0) return;
  const int64_t scratch = scratch_for(program, batch.longest), room = floats * lanes_for(most);
  Workspace& common = shared_workspace();
  Turns next;
  Ending ending;
  const int64_t each = program.steps + 2;  // steps of a unit, with x going in and y coming out
  Turns* turns = nullptr;
  float* together = nullptr;
  if (shared) {  // one unit after the other, each by all threads
    turns = turns_in(common, each * batch.units, room);
    together = reinterpret_cast<float*>(turns + each * batch.units);
  }
#pragma omp parallel num_threads(threads)
  {
    Workspace& own = workspace();
    if (shared) {
      float* mine = own.reserve(scratch);
      for (int64_t u = 0; u < batch.units; ++u) {
        run_unit(program, batch, batch.unit[u], x, x_stride, y, together, mine, Team(turns + u * each));
      }
    } else {
      float* mine = own.reserve(scratch + room);
      next.take(batch.units, [&](int64_t u) { run_unit(program, batch, batch.unit[u], x, x_stride, y, mine + scratch, mine, Team()); });
    }
    own.trim();
    ending.leave();
  }
  common.trim();
}

static EncoderKernels encoder_kernels() { return {encoder}; }
