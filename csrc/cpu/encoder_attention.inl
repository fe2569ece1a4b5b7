// Attention on panels: every sum runs down the lanes, which are tokens, so that nothing is transposed and no sum is horizontal.
//
// For a head and a group of query lanes i: scores S[j][i] = sum over d of K[d][j] Q[d][i], the key broadcast; softmax down the
// column; output O[d][i] = sum over j of V[d][j] P[j][i], the value broadcast. Keys and values of a long sequence lie in several
// panels.

constexpr int kQueryVectors = kManyRegisters ? 4 : 2;  // of query lanes at a time

// Tokens of one buffer of a unit: panels of kTile lanes one behind the other, the last as narrow as a tile may be.
struct Panels {
  float* data;       // of the buffer's first row
  int64_t rows;      // of the whole buffer
  int64_t tokens;    // in the unit
  int last;          // lanes of the last panel
  int64_t count() const { return (tokens + kTile - 1) / kTile; }
  int width(int64_t p) const { return p + 1 < count() ? static_cast<int>(kTile) : last; }
  float* panel(int64_t p) const { return data + p * rows * kTile; }
  float* row(int64_t p, int64_t r) const { return panel(p) + r * width(p); }
};

// Lane numbers 0, 1, ...
static inline vi lane_numbers() {
  vi v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// scores [J][R * lanes] of J keys of one panel (their rows `k_stride` apart) with R vectors of queries.
template <int R, int J>
static inline __attribute__((always_inline)) void score_keys(const float* q, int64_t q_stride, const float* k, int64_t k_stride,
                                                             int64_t depth, float* scores) {
  vf a[J][R];
  for (int j = 0; j < J; ++j) {
    for (int r = 0; r < R; ++r) a[j][r] = vf{};
  }
  for (int64_t d = 0; d < depth; ++d, q += q_stride, k += k_stride) {
    vf x[R];
    for (int r = 0; r < R; ++r) x[r] = load(q + r * kLanes);
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) {
      const vf key = broadcast_at<vf>(k + j);
      for (int r = 0; r < R; ++r) a[j][r] += key * x[r];
    }
  }
  for (int j = 0; j < J; ++j) {
    for (int r = 0; r < R; ++r) store(scores + (j * R + r) * kLanes, a[j][r]);
  }
}

// e^((s - top) * scale) for s <= top, the exponent clamped at 2^-126.
static inline vf softmax_term(vf s, vf top, float scale) {
  const vf low = splat(-126.0f), magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  vf t = (s - top) * (scale * 1.44269504088896341f);
  t = choose<vf, vi>(t < low, low, t);
  const vf shifted = t + magic;
  const vf f = t - (shifted - magic);
  vf p = splat(1.34004322e-3f);  // 2^f on [-1/2, 1/2] to 2.5e-7 of its value
  p = p * f + 9.67603710e-3f;
  p = p * f + 5.55032721e-2f;
  p = p * f + 2.40221074e-1f;
  p = p * f + 6.93147207e-1f;
  p = p * f + 1.00000008f;
  return floats(bits(p) + (bits(shifted) << 23));
}

// What is added to scores beside the product: a bias by place, and -inf outside the window.
struct ScoreTerms {
  const float* bias;        // [length keys][length queries] of this head, or null
  int64_t length;
  int64_t window;           // most places between query and key; -1: any
  bool causal;              // no key behind the query
  const int32_t* position;  // [tokens of the unit]
  float scale;              // scores are multiplied with it later, biases are not
};

template <int R>
static void add_terms(const ScoreTerms& terms, int64_t first_query, int64_t tokens, int64_t first_key, int64_t keys, float* scores) {
  const int64_t lanes = R * kLanes;
  for (int64_t j = 0; j < keys; ++j) {
    const int64_t key = terms.position[first_key + j];
    for (int64_t i = 0; i < lanes && first_query + i < tokens; ++i) {
      const int64_t query = terms.position[first_query + i], apart = query > key ? query - key : key - query;
      float& s = scores[j * lanes + i];
      if (terms.bias) s += terms.bias[key * terms.length + query] / terms.scale;
      if (terms.window >= 0 && apart > terms.window) s = -3.0e38f;
    }
  }
}

// -inf where the key stands behind the query: the keys from `key` on against R vectors of queries from token `first` on.
template <int R>
static void hide_later(int64_t first, int64_t key, int64_t end, float* scores) {
  for (; key < end; ++key, scores += R * kLanes) {
    for (int r = 0; r < R; ++r) {
      const vi query = lane_numbers() + static_cast<int32_t>(first + r * kLanes);
      store(scores + r * kLanes, choose<vf, vi>(query < static_cast<int32_t>(key), splat(-3.0e38f), load(scores + r * kLanes)));
    }
  }
}

// O[d][i] for four d from `out` on and R vectors of queries: the sum over the keys [begin, end) of V[d][j] P[j][i] / sum[i].
template <int R, int D>
static inline __attribute__((always_inline)) void weigh_values(const Panels& v, int64_t v_row, int64_t begin, int64_t end,
                                                               const float* weights, vf (&a)[D][R]) {
  for (int d = 0; d < D; ++d) {
    for (int r = 0; r < R; ++r) a[d][r] = vf{};
  }
  for (int64_t j = begin; j < end;) {
    const int64_t p = j / kTile, stop = (p + 1) * kTile < end ? (p + 1) * kTile : end;
    const int64_t stride = v.width(p);
    const float* value = v.row(p, v_row) + (j - p * kTile);
    for (; j < stop; ++j, ++value, weights += R * kLanes) {
      vf x[R];
      for (int r = 0; r < R; ++r) x[r] = load(weights + r * kLanes);
#pragma GCC unroll 4
      for (int d = 0; d < D; ++d) {
        const vf s = broadcast_at<vf>(value + d * stride);
        for (int r = 0; r < R; ++r) a[d][r] += s * x[r];
      }
    }
  }
}

struct Head {
  int64_t q_row, k_row, v_row, o_row, depth;
};

// One head of one sequence, the tokens [begin, end) of a unit: R vectors of queries, column c of panel p.
template <int R>
static void attend(const Panels& qkv, const Panels& out, const Head& head, int64_t begin, int64_t end, int64_t p, int c,
                   const ScoreTerms& terms, float* scores) {
  constexpr int64_t kRow = R * kLanes;
  const float* q = qkv.row(p, head.q_row) + c;
  const int64_t q_stride = qkv.width(p), first = p * kTile + c;
  const int64_t seen = terms.causal && first + kRow < end ? first + kRow : end;  // keys from here on are behind every query
  float* s = scores;
  for (int64_t j = begin; j < seen;) {
    const int64_t kp = j / kTile, stop = (kp + 1) * kTile < seen ? (kp + 1) * kTile : seen, k_stride = qkv.width(kp);
    const float* k = qkv.row(kp, head.k_row) - kp * kTile;
    for (; j + 4 <= stop; j += 4, s += 4 * kRow) score_keys<R, 4>(q, q_stride, k + j, k_stride, head.depth, s);
    for (; j + 2 <= stop; j += 2, s += 2 * kRow) score_keys<R, 2>(q, q_stride, k + j, k_stride, head.depth, s);
    for (; j < stop; ++j, s += kRow) score_keys<R, 1>(q, q_stride, k + j, k_stride, head.depth, s);
  }
  const int64_t keys = seen - begin;
  if (terms.causal) {
    const int64_t key = begin > first ? begin : first;
    hide_later<R>(first, key, seen, scores + (key - begin) * kRow);
  }
  if (terms.bias || terms.window >= 0) add_terms<R>(terms, first, qkv.tokens, begin, keys, scores);
  vf top[R], sum[R];
  for (int r = 0; r < R; ++r) {
    top[r] = load(scores + r * kLanes);
    sum[r] = vf{};
  }
  for (int64_t j = 1; j < keys; ++j) {
    for (int r = 0; r < R; ++r) {
      const vf x = load(scores + j * kRow + r * kLanes);
      top[r] = choose<vf, vi>(x > top[r], x, top[r]);
    }
  }
  for (int64_t j = 0; j < keys; ++j) {
    for (int r = 0; r < R; ++r) {
      float* at = scores + j * kRow + r * kLanes;
      const vf e = softmax_term(load(at), top[r], terms.scale);
      store(at, e);
      sum[r] += e;
    }
  }
  for (int r = 0; r < R; ++r) sum[r] = 1.0f / sum[r];
  const int64_t o_stride = out.width(p);
  float* to = out.row(p, head.o_row) + c;
  vi mine[R];
  bool whole = true;
  for (int r = 0; r < R; ++r) {
    const vi token = lane_numbers() + static_cast<int32_t>(first + r * kLanes);
    mine[r] = (token >= static_cast<int32_t>(begin)) & (token < static_cast<int32_t>(end));
  }
  whole = first >= begin && first + kRow <= end;
  const auto put = [&](int64_t d, const vf* a) __attribute__((always_inline)) {
    for (int r = 0; r < R; ++r) {
      float* at = to + d * o_stride + r * kLanes;
      const vf x = a[r] * sum[r];
      store(at, whole ? x : choose<vf, vi>(mine[r], x, load(at)));
    }
  };
  int64_t d = 0;
  for (; d + 4 <= head.depth; d += 4) {
    vf a[4][R];
    weigh_values<R, 4>(qkv, head.v_row + d, begin, seen, scores, a);
    for (int i = 0; i < 4; ++i) put(d + i, a[i]);
  }
  for (; d < head.depth; ++d) {
    vf a[1][R];
    weigh_values<R, 1>(qkv, head.v_row + d, begin, seen, scores, a);
    put(d, a[0]);
  }
}

// One head of the sequence [begin, end) for its queries in panel p; scores holds kQueryVectors vectors for every key.
static void attend_panel(const Panels& qkv, const Panels& out, const Head& head, int64_t begin, int64_t end, int64_t p,
                         const ScoreTerms& terms, float* scores) {
  const int64_t stop = (p + 1) * kTile < end ? (p + 1) * kTile : end;
  for (int64_t i = begin > p * kTile ? begin / kLanes * kLanes : p * kTile; i < stop;) {
    const int c = static_cast<int>(i - p * kTile);
    const int64_t vectors = (stop - i + kLanes - 1) / kLanes;
    if (kManyRegisters && vectors >= 4) {
      attend<kQueryVectors>(qkv, out, head, begin, end, p, c, terms, scores);
      i += kQueryVectors * kLanes;
    } else if (vectors >= 2) {
      attend<2>(qkv, out, head, begin, end, p, c, terms, scores);
      i += 2 * kLanes;
    } else {
      attend<1>(qkv, out, head, begin, end, p, c, terms, scores);
      i += kLanes;
    }
  }
}

// Rotary places on the first `depth` rows of each of `heads` heads, `every` rows apart from `row` on, one vector of lanes from column c
// of panel p: the halves (a, b) of them become a cos - b sin, b cos + a sin (Su et al., 2021). place_of: each token's row in cos and
// sin [places, depth].
static void rotate_lanes(const Panels& x, int64_t row, int64_t heads, int64_t depth, int64_t every, int64_t p, int c,
                         const int32_t* place_of, const float* cos, const float* sin) {
  const int64_t stride = x.width(p), first = p * kTile + c, half = depth / 2;
  float turn[4][kLanes];
  for (int64_t d = 0; d < half; ++d) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t place = first + i < x.tokens ? place_of[first + i] * depth : 0;
      turn[0][i] = cos[place + d];
      turn[1][i] = sin[place + d];
      turn[2][i] = cos[place + d + half];
      turn[3][i] = sin[place + d + half];
    }
    const vf cos_a = load(turn[0]), sin_a = load(turn[1]), cos_b = load(turn[2]), sin_b = load(turn[3]);
    float* at = x.row(p, row) + c + d * stride;
    for (int64_t h = 0; h < heads; ++h, at += every * stride) {
      const vf a = load(at), b = load(at + half * stride);
      store(at, a * cos_a - b * sin_a);
      store(at + half * stride, b * cos_b + a * sin_b);
    }
  }
}
