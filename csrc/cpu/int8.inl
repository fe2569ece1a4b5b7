// Products of int8 weights with activations in 8 bits: sums are exact, so that every tier gives the same bits.
//
// A quad is four neighbouring features in one 32-bit lane: of a token four unsigned bytes (rounding.inl), of an output four signed
// ones. A feature is (u - zero) scale of its token: a sum over u starts at -zero times the sum of the output's weights.
//
// Weights are rounded so that no two of one sign that are neighbours in a quad exceed 128 together: 255 * 128 is within 16 bits, and
// pmaddubsw never saturates. Without K above 65536 nothing leaves 32 bits (sparseprune/packing/quads.py sees to both).
//
// Compiled also by a tier that has no other kernels of its own (tiers/avx512vnni.cpp): of the other texts it needs simd.h alone.

// sum + the four products of each lane's unsigned bytes x and signed bytes w.
static inline vi add_quads(vi sum, vi x, vi w) {
#if SP_LANES == 16 && defined(__AVX512VNNI__)
  return reinterpret_cast<vi>(
      _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(w)));
#elif SP_LANES == 16 && defined(__AVX512BW__)
  const __m512i pairs = _mm512_maddubs_epi16(reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(w));
  return sum + reinterpret_cast<vi>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#elif SP_LANES == 8 && defined(__AVX2__)
  const __m256i pairs = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(x), reinterpret_cast<__m256i>(w));
  return sum + reinterpret_cast<vi>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
  return sum + (x & 255) * (w << 24 >> 24) + (x >> 8 & 255) * (w << 16 >> 24) + (x >> 16 & 255) * (w << 8 >> 24) +
         (x >> 24 & 255) * (w >> 24);
#endif
}

// One row of W against R vectors of lanes, from the first K-block to the last, is a sum of slots. `first` starts the sums, `last`
// turns them into floats times the scales of token and output, in the same place.
struct QuadRow {
  const int32_t* panel;  // [quads of the K-block][T], at the first of the lanes
  const uint16_t* index;
  const int32_t* values;  // quads, `height` an entry
  int height;
  int64_t entries;
  const float* scale;     // of the tokens, [T] at the first of the lanes
  const int32_t* zero;
  const float *row_scale, *row_sum;  // of the outputs
  float* sums;            // [V][T]
  bool first, last;
};

template <int T, int R, int V>
static inline __attribute__((always_inline)) void quad_rows(const QuadRow& s) {
  constexpr int kNeed = 8, U = V * R >= kNeed ? 1 : kNeed / (V * R);  // independent sums that hide the latency
  vi a[U][V][R];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      a[0][v][i] = s.first ? load_ints(s.zero + i * kLanes) * -static_cast<int32_t>(s.row_sum[v]) : load_ints(s.sums + v * T + i * kLanes);
#pragma GCC unroll 8
      for (int u = 1; u < U; ++u) a[u][v][i] = vi{};
    }
  }
  const auto entry = [&](int64_t p, vi(&to)[V][R]) __attribute__((always_inline)) {
    const int32_t* q = s.panel + static_cast<size_t>(s.index[p]) * T;
    vi x[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) x[i] = load_ints(q + i * kLanes);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const vi w = splat_int(s.values[p * s.height + v]);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) to[v][i] = add_quads(to[v][i], x[i], w);
    }
  };
  int64_t p = 0;
  for (; p + U <= s.entries; p += U) {
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) entry(p + u, a[u]);
  }
  if constexpr (U > 1) {
    for (; p < s.entries; ++p) entry(p, a[0]);
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
      for (int u = 1; u < U; ++u) a[0][v][i] += a[u][v][i];
      float* to = s.sums + v * T + i * kLanes;
      if (s.last) {
        store(to, __builtin_convertvector(a[0][v][i], vf) * (load(s.scale + i * kLanes) * splat(s.row_scale[v])));
      } else {
        store_ints(to, a[0][v][i]);
      }
    }
  }
}

// The most vectors of lanes, of n, that are summed at a time beside V rows.
template <int V>
constexpr int vectors_at_once(int n) {
  constexpr int most = kLanes == 16 ? (V >= 8 ? 2 : 4) : (V >= 4 ? 2 : 8);
  return n <= most ? n : n % most == 0 ? most : n % 3 == 0 && most >= 3 ? 3 : n % 2 == 0 ? 2 : 1;
}

template <int T, int V>
static void quad_block(const Packed& w, int64_t b, const RoundedPanel& x, float* sums) {
  constexpr int R = vectors_at_once<V>(T / kLanes);
  const int64_t row = b * w.row_block, rows = row + w.row_block < w.rows ? w.row_block : w.rows - row, groups = rows / w.height;
  const int32_t* slots = w.slots + 2 * (row / w.height * w.k_blocks);
  for (int c = 0; c < T; c += R * kLanes) {
    const int32_t* slot = slots;
    for (int64_t k = 0; k < w.k_blocks; ++k) {
      const int32_t* panel = x.quads + k * (w.k_block / 4) * T + c;
      for (int64_t g = 0; g < groups; ++g, slot += 2) {
        const int64_t begin = slot[0], group = slot[1];
        const int32_t* values = static_cast<const int32_t*>(w.values) + begin * w.height;
        for (int v = 0; v < w.height; v += V) {
          const int64_t r = group * w.height + v;
          quad_rows<T, R, V>({panel, w.index + begin, values + v, w.height, slot[2] - begin, x.scale + c, x.zero + c, w.scale + row + r,
                              w.scale + w.rows + row + r, sums + r * T + c, k == 0, k + 1 == w.k_blocks});
        }
      }
    }
  }
}

template <int T>
static void quad_block(const Packed& w, int64_t b, const RoundedPanel& x, float* sums) {
  constexpr int kTall = kLanes == 16 ? 8 : 4;
  switch (w.height) {
    case 1: return quad_block<T, 1>(w, b, x, sums);
    case 2: return quad_block<T, 2>(w, b, x, sums);
    case 4: return quad_block<T, 4>(w, b, x, sums);
    default: return quad_block<T, kTall>(w, b, x, sums);
  }
}

static void quad_block(const Packed& w, int64_t b, int T, const RoundedPanel& x, float* sums) {
  switch (T) {
#if SP_LANES == 8
    case 8: return quad_block<8>(w, b, x, sums);
#endif
    case 16: return quad_block<16>(w, b, x, sums);
    case 32: return quad_block<32>(w, b, x, sums);
    case 48: return quad_block<48>(w, b, x, sums);
    default: return quad_block<64>(w, b, x, sums);
  }
}
