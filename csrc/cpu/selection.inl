// Selection: exact order statistics and the masks they give, over many buffers as if they were one.
//
// k-th largest: a sample of cache lines gives a bracket that holds it almost surely; one pass counts what lies above the bracket and
// collects what lies strictly inside, which settles it exactly. Entries equal to an end of the bracket are never collected, so that
// heavy ties cost a second count, not memory. Where the sample misled, three passes over 11-bit digits settle it: nothing is
// slower than that.

constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;
constexpr int kLine = 16;                    // elements of a sampled run: one cache line of float32
constexpr int64_t kSmall = 1 << 13;          // up to here everything is collected
constexpr int64_t kSelectGrain = 1 << 16;    // elements below which another thread costs more than it gains
constexpr int kMostThreads = 256;
constexpr int32_t kLowest = INT32_MIN, kHighest = INT32_MAX;

// Raw 32 bits of each element; the 16-bit types sit in the upper half, which keeps their order.
static inline vi raw_bits(const float* p) { return *reinterpret_cast<const vi_any*>(p); }
static inline vi raw_bits(const uint16_t* p) {
  return reinterpret_cast<vi>(__builtin_convertvector(*reinterpret_cast<const vh_any*>(p), vu) << 16);
}
static inline int32_t raw_one(const float* p) { return static_cast<int32_t>(bits_of_float(*p)); }
static inline int32_t raw_one(const uint16_t* p) { return static_cast<int32_t>(static_cast<uint32_t>(*p) << 16); }

template <bool M>
static inline vi sort_key(vi raw) {
  if constexpr (M) return raw & 0x7fffffff;
  raw &= ~(raw == kLowest);  // -0 counts as 0
  return raw ^ (raw >> 31 & 0x7fffffff);
}
template <bool M>
static inline int32_t sort_key(int32_t raw) {
  if (M) return raw & 0x7fffffff;
  if (raw == kLowest) raw = 0;
  return raw ^ (raw >> 31 & 0x7fffffff);
}
// A raw value above this, its sign taken off, is NaN.
static inline int32_t nan_limit(Dtype dtype) { return dtype == Dtype::f16 ? 0x7c000000 : 0x7f800000; }

#define SP_FOR_KEYS(pieces, ...)                                                                         \
  if ((pieces).dtype == Dtype::f32) {                                                                    \
    using T = float;                                                                                     \
    if ((pieces).magnitude) { constexpr bool M = true; __VA_ARGS__; } else { constexpr bool M = false; __VA_ARGS__; }  \
  } else {                                                                                               \
    using T = uint16_t;                                                                                  \
    if ((pieces).magnitude) { constexpr bool M = true; __VA_ARGS__; } else { constexpr bool M = false; __VA_ARGS__; }  \
  }

// Calls body(piece, offset, n) for every stretch of `part`, which counts through all pieces.
template <class Body>
static inline void visit(const Pieces& pieces, Range part, Body body) {
  int64_t start = 0;
  for (int64_t i = 0; i < pieces.count && start < part.end; ++i) {
    const int64_t end = start + pieces.sizes[i];
    const int64_t from = part.begin > start ? part.begin : start, to = part.end < end ? part.end : end;
    if (from < to) body(i, from - start, to - from);
    start = end;
  }
}

static inline int64_t total_of(const Pieces& pieces) {
  int64_t total = 0;
  for (int64_t i = 0; i < pieces.count; ++i) total += pieces.sizes[i];
  return total;
}

static inline int select_threads(int64_t total) {
  const int threads = threads_for(total, kSelectGrain);
  return threads < kMostThreads ? threads : kMostThreads;
}

#if defined(__AVX2__) && !(defined(__AVX512F__) && SP_LANES == 16) && SP_LANES == 8
// For each pattern of 8 kept lanes: the lanes in order, a byte each.
struct CompactTable {
  uint64_t order[256];
  constexpr CompactTable() : order() {
    for (int pattern = 0; pattern < 256; ++pattern) {
      uint64_t packed = 0;
      int at = 0;
      for (int lane = 0; lane < 8; ++lane) {
        if (pattern >> lane & 1) packed |= static_cast<uint64_t>(lane) << 8 * at++;
      }
      order[pattern] = packed;
    }
  }
};
static constexpr CompactTable kCompact;
#endif

// Writes the lanes of v where keep is set, in order, and returns how many. May write kLanes lanes.
static inline int compact(int32_t* out, vi v, vi keep) {
#if defined(__AVX512F__) && SP_LANES == 16
  const __mmask16 m = _mm512_movepi32_mask(reinterpret_cast<__m512i>(keep));
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(m, reinterpret_cast<__m512i>(v)));
  return __builtin_popcount(m);
#elif defined(__AVX2__) && SP_LANES == 8
  const int m = _mm256_movemask_ps(reinterpret_cast<__m256>(keep));
  const __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(kCompact.order[m])));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permutevar8x32_epi32(reinterpret_cast<__m256i>(v), order));
  return __builtin_popcount(static_cast<unsigned>(m));
#else
  int n = 0;
  for (int i = 0; i < kLanes; ++i) {
    out[n] = v[i];
    n -= keep[i];
  }
  return n;
#endif
}

static inline vi larger(vi a, vi b) { return a > b ? a : b; }

static inline int32_t largest_lane(vi v) {
  int32_t most = v[0];
  for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

// What one thread's scan found. Aligned so that threads do not write to one cache line.
struct alignas(64) Scan {
  int64_t reached;  // keys at or above the upper end
  int64_t stored;   // keys strictly inside, collected
  int32_t worst;    // the largest |raw|: NaN shows here
  bool overflow;
};

constexpr int64_t kScanChunk = 4096;

// How a scan makes keys. `positive`: signed values, but lo >= 0, so that every negative one lies below lo however it is read and
// the raw bits serve as keys.
enum class Keys { signed_values, magnitudes, positive };

template <Keys K>
static inline vi scan_key(vi raw) {
  if constexpr (K == Keys::positive) return raw;
  return sort_key<K == Keys::magnitudes>(raw);
}
template <Keys K>
static inline int32_t scan_key(int32_t raw) {
  if constexpr (K == Keys::positive) return raw;
  return sort_key<K == Keys::magnitudes>(raw);
}

// Collects lo < key < hi into out, which has room for `capacity` and kScanChunk + kLanes more.
template <class T, Keys K>
static void scan(const T* data, int64_t n, int32_t lo, int32_t hi, int32_t* out, int64_t capacity, Scan* s) {
  const vi low = vi{} + lo, high = vi{} + hi;
  vi worst = {};
  int64_t i = 0, stored = s->stored, reached = 0;
  if (stored > capacity) s->overflow = true;
  while (!s->overflow && i + kLanes <= n) {
    const int64_t stop = n - i > kScanChunk ? i + kScanChunk : n;
    vi many = {};
    for (; i + 4 * kLanes <= stop; i += 4 * kLanes) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const vi raw = raw_bits(data + i + j * kLanes), key = scan_key<K>(raw);
        worst = larger(worst, K == Keys::magnitudes ? key : raw & 0x7fffffff);
        const vi at = key >= high;
        many -= at;
        stored += compact(out + stored, key, (key > low) & ~at);
      }
    }
    for (; i + kLanes <= stop; i += kLanes) {
      const vi raw = raw_bits(data + i), key = scan_key<K>(raw), at = key >= high;
      worst = larger(worst, raw & 0x7fffffff);
      many -= at;
      stored += compact(out + stored, key, (key > low) & ~at);
    }
    reached += sum_lanes(many);
    s->overflow = stored > capacity;
  }
  if (s->overflow) return;
  int32_t most = largest_lane(worst);
  for (; i < n; ++i) {
    const int32_t raw = raw_one(data + i), key = scan_key<K>(raw), size = raw & 0x7fffffff;
    most = size > most ? size : most;
    reached += key >= hi;
    out[stored] = key;
    stored += key > lo && key < hi;
  }
  s->stored = stored;
  s->reached += reached;
  s->worst = most > s->worst ? most : s->worst;
}

template <class T, bool M>
static void count_part(const T* data, int64_t n, int32_t key, int64_t* above, int64_t* equal, int32_t* worst) {
  const vi level = vi{} + key;
  vi most = {};
  int64_t i = 0, over = 0, same = 0;
  while (i + kLanes <= n) {
    const int64_t stop = n - i > (1 << 20) ? i + (1 << 20) : n;
    vi a = {}, e = {};
    for (; i + kLanes <= stop; i += kLanes) {
      const vi raw = raw_bits(data + i), k = sort_key<M>(raw);
      most = larger(most, raw & 0x7fffffff);
      a -= k > level;
      e -= k == level;
    }
    over += sum_lanes(a);
    same += sum_lanes(e);
  }
  int32_t top = largest_lane(most);
  for (; i < n; ++i) {
    const int32_t raw = raw_one(data + i), k = sort_key<M>(raw), size = raw & 0x7fffffff;
    top = size > top ? size : top;
    over += k > key;
    same += k == key;
  }
  *above += over;
  *equal += same;
  *worst = top > *worst ? top : *worst;
}

// How many keys are above `key` and equal to it.
static Selected count_at(const Pieces& pieces, int64_t total, int32_t key) {
  const int threads = select_threads(total);
  int64_t above = 0, equal = 0;
  int32_t worst = 0;
#pragma omp parallel num_threads(threads) reduction(+ : above, equal) reduction(max : worst)
  {
    const Range part = share(total, 64, thread_id(), team_size());
    visit(pieces, part, [&](int64_t i, int64_t offset, int64_t n) {
      SP_FOR_KEYS(pieces, (count_part<T, M>(static_cast<const T*>(pieces.data[i]) + offset, n, key, &above, &equal, &worst)));
    });
  }
  return {key, above, equal, worst > nan_limit(pieces.dtype)};
}

// The digits of `n` keys counted in four tables, so that runs of one digit do not wait for each other.
static inline void count_digits(const int32_t* digits, int64_t n, uint32_t (*table)[kDigits]) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    ++table[0][digits[i]];
    ++table[1][digits[i + 1]];
    ++table[2][digits[i + 2]];
    ++table[3][digits[i + 3]];
  }
  for (; i < n; ++i) ++table[0][digits[i]];
}

// The k-th largest (1-based) of keys[0, n), all in [lo, hi], n < 2^32; reorders and overwrites keys. `above` and `equal` count keys.
static Selected select_among(int32_t* keys, int64_t n, int32_t lo, int32_t hi, int64_t k) {
  uint32_t table[4][kDigits];
  uint32_t base = static_cast<uint32_t>(lo), span = static_cast<uint32_t>(hi) - base;
  int64_t above = 0;
  while (n > 48) {
    int shift = 0;
    while (span >> shift >= kDigits) ++shift;
    memset(table, 0, sizeof table);
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) ++table[j][(static_cast<uint32_t>(keys[i + j]) - base) >> shift];
    }
    for (; i < n; ++i) ++table[0][(static_cast<uint32_t>(keys[i]) - base) >> shift];
    uint32_t digit = span >> shift;
    int64_t inside = 0;
    for (;; --digit) {
      inside = static_cast<int64_t>(table[0][digit]) + table[1][digit] + table[2][digit] + table[3][digit];
      if (above + inside >= k || digit == 0) break;
      above += inside;
    }
    base += digit << shift;
    if (shift == 0) return {static_cast<int32_t>(base), above, inside, 0};
    span = (1u << shift) - 1;
    int64_t left = 0, j = 0;
    const vu first = vu{} + base;
    for (; j + kLanes <= n; j += kLanes) {
      const vi v = *reinterpret_cast<const vi_any*>(keys + j);
      const vu offset = reinterpret_cast<vu>(v) - first;
      left += compact(keys + left, v, reinterpret_cast<vi>(offset <= span));  // never overtakes j: reads are ahead of writes
    }
    for (; j < n; ++j) {
      const int32_t key = keys[j];
      keys[left] = key;
      left += static_cast<uint32_t>(key) - base <= span;
    }
    n = left;
  }
  for (int64_t i = 1; i < n; ++i) {  // insertion, descending
    const int32_t key = keys[i];
    int64_t j = i;
    for (; j > 0 && keys[j - 1] < key; --j) keys[j] = keys[j - 1];
    keys[j] = key;
  }
  const int32_t found = keys[k - above - 1];
  int64_t equal = 0;
  for (int64_t i = 0; i < n; ++i) {
    above += keys[i] > found;
    equal += keys[i] == found;
  }
  return {found, above, equal, 0};
}

template <class T, bool M>
static void digits_part(const T* data, int64_t n, uint32_t prefix, int shift, int width, uint32_t (*table)[kDigits], int64_t* nans, int32_t limit) {
  constexpr int kBatch = 1024;
  alignas(64) int32_t digits[kBatch + kLanes];
  const uint32_t flip = M ? 0 : 0x80000000u, ones = (1u << width) - 1;
  const bool all = shift + width >= 32;
  int64_t i = 0, bad = 0;
  while (i + kLanes <= n) {
    const int64_t stop = n - i > kBatch ? i + kBatch : n;
    int64_t m = 0;
    vi wrong = {};
    for (; i + kLanes <= stop; i += kLanes) {
      const vi raw = raw_bits(data + i);
      const vu key = reinterpret_cast<vu>(sort_key<M>(raw)) ^ flip;
      wrong -= (raw & 0x7fffffff) > limit;
      const vi digit = reinterpret_cast<vi>((key >> shift) & ones);
      if (all) {
        *reinterpret_cast<vi_any*>(digits + m) = digit;
        m += kLanes;
      } else {
        m += compact(digits + m, digit, reinterpret_cast<vi>((key >> (shift + width)) == prefix));
      }
    }
    bad += sum_lanes(wrong);
    count_digits(digits, m, table);
  }
  for (; i < n; ++i) {
    const int32_t raw = raw_one(data + i);
    const uint32_t key = static_cast<uint32_t>(sort_key<M>(raw)) ^ flip;
    bad += (raw & 0x7fffffff) > limit;
    if (all || key >> (shift + width) == prefix) ++table[0][key >> shift & ones];
  }
  *nans += bad;
}

static int64_t histogram(const Pieces& pieces, uint32_t prefix, int shift, int width, int64_t* counts) {
  const int64_t total = total_of(pieces);
  const int threads = select_threads(total);
  int64_t nans = 0;
#pragma omp parallel num_threads(threads) reduction(+ : nans)
  {
    uint32_t table[4][kDigits];
    const Range part = share(total, 64, thread_id(), team_size());
    for (int64_t begin = part.begin; begin < part.end; begin += 1 << 30) {  // a 32-bit counter cannot overflow
      const Range block = {begin, part.end - begin > 1 << 30 ? begin + (1 << 30) : part.end};
      memset(table, 0, sizeof table);
      visit(pieces, block, [&](int64_t i, int64_t offset, int64_t n) {
        SP_FOR_KEYS(pieces, (digits_part<T, M>(static_cast<const T*>(pieces.data[i]) + offset, n, prefix, shift, width, table, &nans, nan_limit(pieces.dtype))));
      });
#pragma omp critical(sparseprune_histogram)
      for (int d = 0; d < kDigits; ++d) {
        counts[d] += static_cast<int64_t>(table[0][d]) + table[1][d] + table[2][d] + table[3][d];
      }
    }
  }
  return nans;
}

static Selected select_radix(const Pieces& pieces, int64_t k) {
  const int shifts[3] = {21, 10, 0}, widths[3] = {11, 11, 10};
  uint32_t prefix = 0;
  int64_t above = 0, equal = 0;
  for (int level = 0; level < 3; ++level) {
    int64_t counts[kDigits] = {};
    const int64_t nans = histogram(pieces, prefix, shifts[level], widths[level], counts);
    if (nans > 0) return {0, 0, 0, nans};
    uint32_t digit = (1u << widths[level]) - 1;
    while (digit > 0 && above + counts[digit] < k) above += counts[digit--];
    prefix = prefix << widths[level] | digit;
    equal = counts[digit];
  }
  return {static_cast<int32_t>(pieces.magnitude ? prefix : prefix ^ 0x80000000u), above, equal, 0};
}

// The keys of n consecutive elements from flat position `at` on.
static void gather_keys(const Pieces& pieces, int64_t at, int64_t n, int32_t* out, int32_t* worst) {
  visit(pieces, {at, at + n}, [&](int64_t i, int64_t offset, int64_t m) {
    SP_FOR_KEYS(pieces, {
      const T* data = static_cast<const T*>(pieces.data[i]) + offset;
      for (int64_t j = 0; j < m; ++j) {
        const int32_t raw = raw_one(data + j), size = raw & 0x7fffffff;
        *worst = size > *worst ? size : *worst;
        *out++ = sort_key<M>(raw);
      }
    });
  });
}

struct Bracket {
  int32_t lo, hi;    // open ends
  double inside;     // expected share of all keys strictly between
};

// Ranks of the ends in a sample of `size`, 1-based from the top, `sd` standard deviations away from rank r.
struct Ranks {
  int64_t upper, lower;
};
static inline Ranks ranks_around(double r, double sd) {
  const double reach = 4.5 * sd + 2;
  return {static_cast<int64_t>(r - reach), static_cast<int64_t>(r + reach) + 1};
}

// keys [lines * kLine], spare of the same length.
static Bracket bracket(const Pieces& pieces, int64_t total, int64_t k, int64_t lines, int32_t* keys, int32_t* spare) {
  const int64_t size = lines * kLine, stratum = total / lines;
  uint64_t random = 0x9e3779b97f4a7c15ull;
  int64_t piece = 0, start = 0;
  for (int64_t line = 0; line < lines; ++line) {
    random = random * 6364136223846793005ull + 1442695040888963407ull;
    int64_t at = line * stratum + static_cast<int64_t>((random >> 33) % static_cast<uint64_t>(stratum));
    at = at > total - kLine ? total - kLine : at;
    while (at >= start + pieces.sizes[piece]) start += pieces.sizes[piece++];
    at = start + (at - start) / kLine * kLine;
    if (at > total - kLine) at = total - kLine;
    int32_t unused = 0;
    if (at >= start && at + kLine <= start + pieces.sizes[piece]) {
      const Pieces one = {pieces.data + piece, pieces.sizes + piece, 1, pieces.dtype, pieces.magnitude};
      gather_keys(one, at - start, kLine, keys + line * kLine, &unused);
    } else {
      gather_keys(pieces, at, kLine, keys + line * kLine, &unused);
    }
  }
  const double share_above = static_cast<double>(k) / static_cast<double>(total), r = share_above * static_cast<double>(size);
  double sd = sqrt(r * (1 - share_above));
  Bracket found = {kLowest, kHighest, 1};
  for (int attempt = 0; attempt < 2; ++attempt) {
    const Ranks ranks = ranks_around(r, sd);
    found.lo = kLowest;
    found.hi = kHighest;
    if (ranks.lower <= size) {
      memcpy(spare, keys, static_cast<size_t>(size) * 4);
      found.lo = select_among(spare, size, kLowest, kHighest, ranks.lower).key;
    }
    if (ranks.upper >= 1) {
      memcpy(spare, keys, static_cast<size_t>(size) * 4);
      found.hi = select_among(spare, size, kLowest, kHighest, ranks.upper).key;
    }
    const int64_t upper = ranks.upper < 0 ? 0 : ranks.upper, lower = ranks.lower > size ? size : ranks.lower;
    found.inside = static_cast<double>(lower - upper) / static_cast<double>(size);
    if (attempt == 1) break;
    // Neighbours may be alike, so a line is worth less than kLine draws: the counts of successive lines tell by how much.
    const int32_t level = found.lo != kLowest ? found.lo : found.hi;
    double squares = 0;
    int last = 0;
    for (int64_t line = 0; line < lines; ++line) {
      int count = 0;
      for (int j = 0; j < kLine; ++j) count += keys[line * kLine + j] >= level;
      if (line > 0) squares += static_cast<double>((count - last) * (count - last));
      last = count;
    }
    const double measured = sqrt(squares / 2);
    if (measured < 1.3 * sd) break;
    sd = measured;
  }
  return found;
}

static bool kth(const Pieces& pieces, int64_t k, bool force_radix, Selected* out) {
  const int64_t total = total_of(pieces);
  if (force_radix) {
    *out = select_radix(pieces, k);
    return true;
  }
  if (total <= kSmall) {
    int32_t keys[kSmall], worst = 0;
    gather_keys(pieces, 0, total, keys, &worst);
    *out = {0, 0, 0, 1};
    if (worst <= nan_limit(pieces.dtype)) *out = select_among(keys, total, kLowest, kHighest, k);
    return true;
  }
  int64_t lines = static_cast<int64_t>(cbrt(static_cast<double>(total)) * cbrt(static_cast<double>(total))) / kLine;
  lines = lines > total / (8 * kLine) ? total / (8 * kLine) : lines;
  lines = lines > 16384 ? 16384 : lines;
  int32_t* sample = static_cast<int32_t*>(malloc(static_cast<size_t>(lines) * kLine * 2 * 4));
  if (sample == nullptr) return false;
  const Bracket b = bracket(pieces, total, k, lines, sample, sample + lines * kLine);
  free(sample);
  if (b.lo == b.hi) {
    *out = count_at(pieces, total, b.lo);
    if (out->nans > 0 || (out->above < k && k <= out->above + out->equal)) return true;
    *out = select_radix(pieces, k);
    return true;
  }
  const int threads = select_threads(total);
  // All of it may lie in one thread's part (sorted data), so each gets room for everything; what is not used is never touched.
  const int64_t capacity = static_cast<int64_t>(1.5 * b.inside * static_cast<double>(total)) + 4 * kScanChunk;
  const int64_t room = capacity + kScanChunk + 64;
  int32_t* found = static_cast<int32_t*>(malloc(static_cast<size_t>(room) * threads * 4));
  if (found == nullptr) return false;
  Scan scans[kMostThreads];
  memset(static_cast<void*>(scans), 0, sizeof(Scan) * static_cast<size_t>(threads));
#pragma omp parallel num_threads(threads)
  {
    Scan mine = {};
    int32_t* own = found + room * thread_id();
    visit(pieces, share(total, 64, thread_id(), team_size()), [&](int64_t i, int64_t offset, int64_t n) {
      if (mine.overflow) return;
      SP_FOR_KEYS(pieces, {
        const T* data = static_cast<const T*>(pieces.data[i]) + offset;
        if (M || b.lo < 0) {
          scan<T, M ? Keys::magnitudes : Keys::signed_values>(data, n, b.lo, b.hi, own, capacity, &mine);
        } else {
          scan<T, Keys::positive>(data, n, b.lo, b.hi, own, capacity, &mine);
        }
      });
    });
    scans[thread_id()] = mine;
  }
  int64_t reached = 0, inside = 0;
  int32_t worst = 0;
  bool overflow = false;
  for (int t = 0; t < threads; ++t) {
    const Scan& s = scans[t];
    reached += s.reached;
    worst = s.worst > worst ? s.worst : worst;
    overflow |= s.overflow;
    if (!overflow && inside != room * t) memmove(found + inside, found + room * t, static_cast<size_t>(s.stored) * 4);
    inside += s.stored;
  }
  if (overflow) {
    *out = select_radix(pieces, k);
  } else if (worst > nan_limit(pieces.dtype)) {
    *out = {0, 0, 0, 1};
  } else if (k > reached && k <= reached + inside) {
    *out = select_among(found, inside, b.lo, b.hi, k - reached);
    out->above += reached;
  } else {
    *out = count_at(pieces, total, k <= reached ? b.hi : b.lo);
    if (out->above >= k || k > out->above + out->equal) *out = select_radix(pieces, k);
  }
  free(found);
  return true;
}

// ties: how many equal keys of this stretch are still kept; returns how many of them it holds.
template <class T, bool M>
static int64_t cut_part(const T* data, int64_t n, int32_t level, int64_t ties, uint8_t* mask, int32_t* worst) {
  const vi key_level = vi{} + level;
  vi most = {};
  int64_t i = 0, seen = 0;
  while (i + kLanes <= n) {
    const int64_t stop = n - i > 4096 ? i + 4096 : n, begin = i;
    vi same = {};
    for (; i + kLanes <= stop; i += kLanes) {  // as if all equal ones were kept
      const vi raw = raw_bits(data + i), key = sort_key<M>(raw);
      most = larger(most, raw & 0x7fffffff);
      same -= key == key_level;
      store_bool(mask + i, key >= key_level);
    }
    const int64_t here = sum_lanes(same);
    if (here > 0 && seen + here > ties) {
      int64_t left = ties > seen ? ties - seen : 0;
      for (int64_t j = begin; j < i; ++j) {
        if (sort_key<M>(raw_one(data + j)) != level) continue;
        mask[j] = left > 0;
        left -= left > 0;
      }
    }
    seen += here;
  }
  int32_t top = largest_lane(most);
  for (; i < n; ++i) {
    const int32_t raw = raw_one(data + i), key = sort_key<M>(raw), size = raw & 0x7fffffff;
    top = size > top ? size : top;
    mask[i] = key > level || (key == level && seen < ties);
    seen += key == level;
  }
  *worst = top > *worst ? top : *worst;
  return seen;
}

static bool cut_mask(const Pieces& pieces, int32_t key, int64_t ties, uint8_t* const* masks) {
  const int64_t total = total_of(pieces);
  const int threads = select_threads(total);
  const bool keep_all = ties == INT64_MAX;
  int64_t before[kMostThreads + 1] = {};
  int32_t worst = 0;
  if (!keep_all) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; ++t) {
      int64_t above = 0, equal = 0;
      int32_t most = 0;
      visit(pieces, share(total, 64, t, threads), [&](int64_t i, int64_t offset, int64_t n) {
        SP_FOR_KEYS(pieces, (count_part<T, M>(static_cast<const T*>(pieces.data[i]) + offset, n, key, &above, &equal, &most)));
      });
      before[t + 1] = equal;
    }
    for (int t = 0; t < threads; ++t) before[t + 1] += before[t];
  }
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(max : worst)
  for (int t = 0; t < threads; ++t) {
    int64_t left = keep_all ? INT64_MAX : ties - before[t];
    visit(pieces, share(total, 64, t, threads), [&](int64_t i, int64_t offset, int64_t n) {
      SP_FOR_KEYS(pieces, {
        const int64_t seen = cut_part<T, M>(static_cast<const T*>(pieces.data[i]) + offset, n, key, left < 0 ? 0 : left, masks[i] + offset, &worst);
        if (!keep_all) left -= seen;
      });
    });
  }
  return worst <= nan_limit(pieces.dtype);
}

// kLanes groups at a time, transposed: an entry is kept when fewer than n of its group come before it.
template <class T>
static int64_t nm_part(const T* scores, int64_t groups, int n, int m, uint8_t* mask, int32_t limit) {
  alignas(64) int32_t keys[256 * kLanes];
  int64_t bad = 0;
  for (int64_t g = 0; g < groups; g += kLanes) {
    const int many = groups - g < kLanes ? static_cast<int>(groups - g) : kLanes;
    const T* from = scores + g * m;
    for (int lane = 0; lane < many; ++lane) {
      for (int j = 0; j < m; ++j) {
        const int32_t raw = raw_one(from + lane * m + j);
        bad += (raw & 0x7fffffff) > limit;
        keys[j * kLanes + lane] = sort_key<false>(raw);
      }
    }
    for (int lane = many; lane < kLanes; ++lane) {
      for (int j = 0; j < m; ++j) keys[j * kLanes + lane] = 0;
    }
    const vi* column = reinterpret_cast<const vi*>(keys);
    uint8_t* to = mask + g * m;
    for (int j = 0; j < m; ++j) {
      const vi own = column[j];
      vi ahead = {};
      for (int i = 0; i < j; ++i) ahead -= column[i] >= own;
      for (int i = j + 1; i < m; ++i) ahead -= column[i] > own;
      const vi keep = ahead < n;
      for (int lane = 0; lane < many; ++lane) to[lane * m + j] = static_cast<uint8_t>(keep[lane] & 1);
    }
  }
  return bad;
}

static int64_t nm_mask(const void* scores, Dtype dtype, int64_t groups, int n, int m, uint8_t* mask) {
  const int threads = threads_for(groups * m, 1 << 14);
  int64_t bad = 0;
#pragma omp parallel num_threads(threads) reduction(+ : bad)
  {
    const Range part = share(groups, kLanes, thread_id(), team_size());
    const int64_t at = part.begin * m;
    if (dtype == Dtype::f32) {
      bad += nm_part(static_cast<const float*>(scores) + at, part.end - part.begin, n, m, mask + at, nan_limit(dtype));
    } else {
      bad += nm_part(static_cast<const uint16_t*>(scores) + at, part.end - part.begin, n, m, mask + at, nan_limit(dtype));
    }
  }
  return bad;
}

template <class T>
static void block_rows(const T* scores, int64_t cols, int64_t r, int64_t c, float* out) {
  constexpr int64_t kColumns = 1024;
  alignas(64) float sums[kColumns];
  for (int64_t k = 0; k < cols; k += kColumns) {
    const int64_t many = cols - k < kColumns ? cols - k : kColumns;
    for (int64_t row = 0; row < r; ++row) {
      const T* from = scores + row * cols + k;
      int64_t j = 0;
      for (; j + kLanes <= many; j += kLanes) {
        const vf v = widen(from + j);
        store(sums + j, row == 0 ? v : load(sums + j) + v);
      }
      for (; j < many; ++j) sums[j] = row == 0 ? widen_one(from[j]) : sums[j] + widen_one(from[j]);
    }
    if (c == 1) {
      memcpy(out + k, sums, static_cast<size_t>(many) * 4);
      continue;
    }
    for (int64_t j = 0; j < many; ++j) {
      const int64_t block = (k + j) / c;
      out[block] = (k + j) % c == 0 ? sums[j] : out[block] + sums[j];
    }
  }
}

static void block_scores(const void* scores, Dtype dtype, int64_t rows, int64_t cols, int64_t r, int64_t c, float* out) {
  const int threads = threads_for(rows * cols, kMaskGrain);
#pragma omp parallel num_threads(threads)
  {
    const Range part = share(rows / r, 1, thread_id(), team_size());
    for (int64_t b = part.begin; b < part.end; ++b) {
      SP_FOR_DTYPE(dtype, block_rows(static_cast<const T*>(scores) + b * r * cols, cols, r, c, out + b * (cols / c)));
    }
  }
}

static SelectionKernels selection_kernels() { return {kth, cut_mask, histogram, nm_mask, block_scores}; }
