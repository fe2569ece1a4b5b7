// A stack of decoder layers as one call: the new tokens of a few sequences, each a row, go through all steps in one parallel region.
// What takes the time is reading the weights, and with long sequences the keys and values; so each step is cut into pieces of outputs
// (decoder_linear.inl), or into heads, that the threads take in turn, and a step ends when its pieces are done.
//
// An attention piece is one head of one sequence: it norms and turns its queries and keys, writes the new keys and values into the
// cache where it is the first of its group, and reads earlier ones there; those of this call it has itself, so that no barrier stands
// between.

// x [depth] -> to: normed, then its first `turned` features a, b in halves turned to (a cos - b sin, b cos + a sin).
static void turn_head(const RowNorm& norm, const float* x, int64_t depth, int64_t turned, const float* cos, const float* sin, float* to) {
  if (norm.gain) {
    norm_row(norm, x, depth, to);
  } else {
    __builtin_memcpy(to, x, static_cast<size_t>(depth) * sizeof(float));
  }
  const int64_t half = turned / 2;
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const vf a = load(to + i), b = load(to + half + i);
    store(to + i, a * load(cos + i) - b * load(sin + i));
    store(to + half + i, b * load(cos + half + i) + a * load(sin + half + i));
  }
  for (; i < half; ++i) {
    const float a = to[i], b = to[half + i];
    to[i] = a * cos[i] - b * sin[i];
    to[half + i] = b * cos[half + i] + a * sin[half + i];
  }
}

// scores [n] = keys [n][depth] q; eight keys at a time, so that their lanes are summed together.
static void score_keys(const float* q, const float* keys, int64_t n, int64_t depth, float* scores) {
  for (int64_t j = 0; j < n; j += 8) {
    const int here = static_cast<int>(n - j < 8 ? n - j : 8);
    const float* k = keys + j * depth;
    v8 parts[8] = {};
    float rest[8] = {};
    if (here == 8) {
      vf sum[8] = {};
      int64_t d = 0;
      for (; d + kLanes <= depth; d += kLanes) {
        const vf v = load(q + d);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) sum[i] += v * load(k + i * depth + d);
      }
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) parts[i] = halves_sum(sum[i]);
      for (; d < depth; ++d) {
        for (int i = 0; i < 8; ++i) rest[i] += q[d] * k[i * depth + d];
      }
      write(scores + j, lane_sums<8>(parts) + read<v8>(rest));
    } else {
      for (int i = 0; i < here; ++i) {
        vf sum = {};
        int64_t d = 0;
        for (; d + kLanes <= depth; d += kLanes) sum += load(q + d) * load(k + i * depth + d);
        for (; d < depth; ++d) rest[i] += q[d] * k[i * depth + d];
        scores[j + i] = total(sum) + rest[i];
      }
    }
  }
}

// to [depth] += shares [n] values [n][depth].
static void add_values(const float* shares, const float* values, int64_t n, int64_t depth, float* to) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= depth; d += 4 * kLanes) {
    vf even[4], odd[4] = {};
    for (int i = 0; i < 4; ++i) even[i] = load(to + d + i * kLanes);
    int64_t j = 0;
    for (; j + 2 <= n; j += 2) {
      const vf p = splat(shares[j]), q = splat(shares[j + 1]);
      const float* v = values + j * depth + d;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        even[i] += p * load(v + i * kLanes);
        odd[i] += q * load(v + depth + i * kLanes);
      }
    }
    if (j < n) {
      const vf p = splat(shares[j]);
      for (int i = 0; i < 4; ++i) even[i] += p * load(values + j * depth + d + i * kLanes);
    }
    for (int i = 0; i < 4; ++i) store(to + d + i * kLanes, even[i] + odd[i]);
  }
  for (; d + kLanes <= depth; d += kLanes) {
    vf sum = load(to + d);
    for (int64_t j = 0; j < n; ++j) sum += splat(shares[j]) * load(values + j * depth + d);
    store(to + d, sum);
  }
  for (; d < depth; ++d) {
    float sum = to[d];
    for (int64_t j = 0; j < n; ++j) sum += shares[j] * values[j * depth + d];
    to[d] = sum;
  }
}

// scores [n] -> e^(score - the largest), -inf -> 0; returns their sum, 0 where all are -inf, NaN where one is.
static float exponentials(float* scores, int64_t n) {
  const float none = -__builtin_inff();
  vf most = splat(none);
  float top = none, bad = 0.0f;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const vf s = load(scores + j);
    most = choose<vf, vi>(s > most, s, most);
  }
  for (; j < n; ++j) top = scores[j] > top ? scores[j] : top;
  for (int i = 0; i < kLanes; ++i) top = most[i] > top ? most[i] : top;
  if (top == none) {
    for (j = 0; j < n; ++j) bad = scores[j] != scores[j] ? scores[j] : bad;
    return bad;
  }
  vf sum = {};
  float rest = 0.0f;
  for (j = 0; j + kLanes <= n; j += kLanes) {
    const vf s = load(scores + j);
    const vf p = choose<vf, vi>(s == splat(none), vf{}, exponential<vf>(s - top));
    store(scores + j, p);
    sum += p;
  }
  for (; j < n; ++j) {
    scores[j] = scores[j] == none ? 0.0f : exponential<v8>(broadcast<v8>(scores[j] - top))[0];
    rest += scores[j];
  }
  return total(sum) + rest;
}

// Floats that attend takes: the new keys and a query, and the scores.
static int64_t attend_scratch(const RowStep& s, const RowCall& call, int64_t keys) {
  return s.depth * (call.tokens + 1) + keys + 2 * kLanes;
}

// Head h of sequence b. qkv, out: rows [batch * tokens] of their buffers.
static void attend(const RowStep& s, const RowCall& call, int64_t b, int64_t h, const float* qkv, int64_t stride, float* out,
                   int64_t out_stride, float* scratch) {
  const int64_t T = call.tokens, past = call.past, depth = s.depth, group = s.heads / s.kv_heads, kv = h / group;
  const CacheLayer& c = call.cache[s.cache];
  float* keys = c.keys + b * c.key_batch + kv * c.key_head;
  float* values = c.values + b * c.value_batch + kv * c.value_head;
  const float *cos = nullptr, *sin = nullptr;
  int64_t turn = 0;
  if (s.turned) {
    const RotaryTable& t = call.tables[s.table];
    cos = t.cos + b * t.batch, sin = t.sin + b * t.batch, turn = t.token;
  }
  float *fresh = scratch, *q = fresh + T * depth, *scores = q + depth;
  const float* rows = qkv + b * T * stride;
  const auto value_of = [&](int64_t t) { return rows + t * stride + s.v_row + kv * s.v_step; };
  for (int64_t t = 0; t < T; ++t) {
    turn_head(s.key_norm, rows + t * stride + s.k_row + kv * s.k_step, depth, s.turned, cos + t * turn, sin + t * turn,
              fresh + t * depth);
    if (h % group) continue;
    __builtin_memcpy(keys + (past + t) * depth, fresh + t * depth, static_cast<size_t>(depth) * sizeof(float));
    __builtin_memcpy(values + (past + t) * depth, value_of(t), static_cast<size_t>(depth) * sizeof(float));
  }
  for (int64_t t = 0; t < T; ++t) {
    turn_head(s.norm, rows + t * stride + s.q_row + h * s.q_step, depth, s.turned, cos + t * turn, sin + t * turn, q);
    for (int64_t d = 0; d < depth; ++d) q[d] *= s.factor;
    const uint8_t* seen = nullptr;
    int64_t first = 0, end = past + t + 1;
    if (s.mask >= 0 && call.masks[s.mask].seen) {
      const SeenKeys& mask = call.masks[s.mask];
      seen = mask.seen + b * mask.batch + t * mask.token;
      end = mask.length;
      while (end > 0 && !seen[end - 1]) --end;
      while (first < end && !seen[first]) ++first;
    }
    // before, among and behind the tokens of this call
    const int64_t old = end < past ? end : past, now = end < past + T ? end : past + T;
    if (first < old) score_keys(q, keys + first * depth, old - first, depth, scores);
    const int64_t begin = first > past ? first : past, after = first > past + T ? first : past + T;
    if (begin < now) score_keys(q, fresh + (begin - past) * depth, now - begin, depth, scores + (begin - first));
    if (after < end) score_keys(q, keys + after * depth, end - after, depth, scores + (after - first));
    if (seen) {
      for (int64_t j = first; j < end; ++j) scores[j - first] = seen[j] ? scores[j - first] : -__builtin_inff();
    }
    const float sum = first < end ? exponentials(scores, end - first) : 0.0f;
    float* to = out + (b * T + t) * out_stride + s.to_row + h * depth;
    __builtin_memset(to, 0, static_cast<size_t>(depth) * sizeof(float));
    if (sum == 0.0f) continue;
    if (first < old) add_values(scores, values + first * depth, old - first, depth, to);
    for (int64_t j = begin; j < now; ++j) add_values(scores + (j - first), value_of(j - past), 1, depth, to);
    if (after < end) add_values(scores + (after - first), values + after * depth, end - after, depth, to);
    const float share = 1.0f / sum;
    for (int64_t d = 0; d < depth; ++d) to[d] *= share;
  }
}

static void run_rows(const RowProgram& program, const RowCall& call, float* const* buffer, float* x_memory, float* scratch, Team team) {
  const int64_t n = call.batch * call.tokens;
  RowInput input(x_memory, program.widest, n);
  bool fresh = true;
  for (int64_t i = 0; i < program.steps; ++i) {
    const RowStep& s = program.step[i];
    const float* from = buffer[s.from];
    float* to = buffer[s.to];
    const int64_t from_stride = program.rows[s.from], to_stride = program.rows[s.to];
    switch (s.kind) {
      case kRowLinear: {
        float* y = to + s.to_row;
        const Epilogue e = {s.weight->scale, s.bias, s.add ? y : nullptr, to_stride, s.activation};
        const float* x = nullptr;
        team.each(pieces_of(*s.weight), !s.together, [&](int64_t p) {
          if (x == nullptr) x = input.of(s, from, from_stride, fresh);
          run_piece(*s.weight, p, x, n, y, to_stride, e, scratch);
        });
        if (x != nullptr) fresh = false;  // else what was made is older than this step
        break;
      }
      case kRowAttention:
        team.each(call.batch * s.heads, !s.together, [&](int64_t p) {
          attend(s, call, p / s.heads, p % s.heads, from, from_stride, to, to_stride, scratch);
        });
        break;
      case kRowNorm:
        team.each(n, !s.together, [&](int64_t j) { norm_row(s.norm, from + j * from_stride + s.from_row, s.rows, to + j * to_stride + s.to_row); });
        break;
    }
    if (!s.together) fresh = true;
  }
}

static void decoder(const RowProgram& program, const RowCall& call, int threads) {
  const int64_t n = call.batch * call.tokens;
  int64_t floats = 0, scratch = 0;
  for (int64_t b = 0; b < program.buffers; ++b) floats += b == program.result ? 0 : (program.rows[b] * n + 15) / 16 * 16;
  for (int64_t i = 0; i < program.steps; ++i) {
    const RowStep& s = program.step[i];
    int64_t needed = 0;
    if (s.kind == kRowLinear) needed = piece_scratch(*s.weight);
    if (s.kind == kRowAttention) {
      const int64_t seen = s.mask < 0 ? 0 : call.masks[s.mask].length, all = call.past + call.tokens;
      needed = attend_scratch(s, call, seen > all ? seen : all);
    }
    scratch = needed > scratch ? needed : scratch;
  }
  Workspace& common = shared_workspace();
  Turns* turns = turns_in(common, program.steps, floats);
  float *place = reinterpret_cast<float*>(turns + program.steps), *buffer[kMostBuffers];
  for (int64_t b = 0; b < program.buffers; ++b) {
    buffer[b] = b == program.result ? call.y : place;
    if (b != program.result) place += (program.rows[b] * n + 15) / 16 * 16;
  }
  for (int64_t j = 0; j < n; ++j) {
    __builtin_memcpy(buffer[0] + j * program.rows[0], call.x + j * call.x_stride, static_cast<size_t>(program.rows[0]) * sizeof(float));
  }
  Ending ending;
  const int64_t x_floats = 2 * RowInput::floats(program.widest, n);
#pragma omp parallel num_threads(threads)
  {
    Workspace& own = workspace();
    float* mine = own.reserve(x_floats + scratch);
    run_rows(program, call, buffer, mine, mine + x_floats, team_size() > 1 ? Team(turns) : Team());
    own.trim();
    ending.leave();
  }
  common.trim();
}

static DecoderKernels decoder_kernels() { return {decoder}; }
