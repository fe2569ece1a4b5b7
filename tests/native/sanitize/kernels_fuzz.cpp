// Runs kernels of every tier this CPU has on random sizes, in heap buffers of exactly the size they may touch, against naive loops.
// Compiled with AddressSanitizer and UndefinedBehaviorSanitizer by test_selection_sanitize.py. Arguments: seconds, seed.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace sparseprune {
const Kernels& avx2x16_kernels();
namespace {
const Kernels* current;
}
const Kernels& kernels() { return *current; }  // what cpu/dispatch.cpp chooses elsewhere
}

using namespace sparseprune;

namespace {
std::mt19937_64 random_bits;
int64_t pick(int64_t low, int64_t high) { return low + static_cast<int64_t>(random_bits() % static_cast<uint64_t>(high - low + 1)); }
float normal() { return std::normal_distribution<float>()(random_bits); }

void check(bool good, const char* tier, const char* what, int64_t n) {
  if (good) return;
  std::printf("%s: %s is wrong at size %lld\n", tier, what, static_cast<long long>(n));
  std::exit(1);
}

// Exactly n elements: one step further is another object's memory, and the sanitizer says so.
template <class T>
struct Exact {
  std::unique_ptr<T[]> data;
  int64_t n;
  explicit Exact(int64_t size) : data(new T[static_cast<size_t>(size)]()), n(size) {}
  T& operator[](int64_t i) { return data[static_cast<size_t>(i)]; }
  T* get() { return data.get(); }
};

int64_t some_size() {
  switch (pick(0, 3)) {
    case 0: return pick(0, 40);
    case 1: return pick(1, 1000);
    case 2: return pick(8000, 9000);
    default: return pick(20000, 200000);
  }
}

float some_value(int kind) {
  switch (kind) {
    case 0: return normal();
    case 1: return static_cast<float>(pick(-2, 2));
    case 2: return 1.5f;
    case 3: return pick(0, 3) ? normal() : (pick(0, 1) ? std::numeric_limits<float>::infinity() : -0.0f);
    default: return normal() * std::exp(normal() * 20);
  }
}

int32_t key_of(float v, bool magnitude) {
  int32_t u;
  if (magnitude) v = std::fabs(v);
  if (v == 0) v = 0;
  std::memcpy(&u, &v, 4);
  return u >= 0 ? u : static_cast<int32_t>(static_cast<uint32_t>(u) ^ 0x7fffffffu);
}

void selection(const Kernels& k) {
  const int count = static_cast<int>(pick(1, 5)), kind = static_cast<int>(pick(0, 4));
  std::vector<Exact<float>> pieces;
  std::vector<Exact<uint8_t>> masks;
  std::vector<const void*> data;
  std::vector<uint8_t*> out;
  std::vector<int64_t> sizes;
  std::vector<int32_t> flat;
  const bool magnitude = pick(0, 1);
  for (int i = 0; i < count; ++i) {
    const int64_t n = some_size();
    pieces.emplace_back(n);
    masks.emplace_back(n);
    for (int64_t j = 0; j < n; ++j) flat.push_back(key_of(pieces.back()[j] = some_value(kind), magnitude));
    data.push_back(pieces.back().get());
    out.push_back(masks.back().get());
    sizes.push_back(n);
  }
  const int64_t total = static_cast<int64_t>(flat.size());
  if (total == 0) return;
  const int64_t rank = pick(1, total);
  const Pieces list = {data.data(), sizes.data(), count, Dtype::f32, magnitude};
  Selected found{};
  check(k.selection.kth(list, rank, pick(0, 4) == 0, &found), k.tier, "kth (memory)", total);
  std::vector<int32_t> sorted = flat;
  std::nth_element(sorted.begin(), sorted.begin() + rank - 1, sorted.end(), std::greater<int32_t>());
  const int32_t truth = sorted[static_cast<size_t>(rank - 1)];
  int64_t above = 0, equal = 0;
  for (int32_t key : flat) above += key > truth, equal += key == truth;
  check(found.nans == 0 && found.key == truth && found.above == above && found.equal == equal, k.tier, "kth", total);
  const int64_t ties = pick(0, 1) ? INT64_MAX : rank - above;
  check(k.selection.cut_mask(list, truth, ties, out.data()), k.tier, "cut_mask (NaN)", total);
  int64_t at = 0, left = ties;
  for (auto& mask : masks) {
    for (int64_t j = 0; j < mask.n; ++j, ++at) {
      const int32_t key = flat[static_cast<size_t>(at)];
      check(mask[j] == (key > truth || (key == truth && left-- > 0)), k.tier, "cut_mask", total);
    }
  }
  Exact<int64_t> counts(2048);
  k.selection.histogram(list, 0, 21, 11, counts.get());
  int64_t sum = 0;
  for (int d = 0; d < 2048; ++d) sum += counts[d];
  check(sum == total, k.tier, "histogram", total);
}

void structures(const Kernels& k) {
  const int m = static_cast<int>(pick(1, 33)), n = static_cast<int>(pick(1, m));
  const int64_t groups = pick(0, 300);
  Exact<uint16_t> halves(groups * m);
  Exact<uint8_t> mask(groups * m);
  for (int64_t i = 0; i < halves.n; ++i) halves[i] = static_cast<uint16_t>(pick(0, 0x7f00) | (pick(0, 1) << 15));
  k.selection.nm_mask(halves.get(), Dtype::bf16, groups, n, m, mask.get());
  for (int64_t g = 0; g < groups; ++g) {
    int kept = 0;
    for (int j = 0; j < m; ++j) kept += mask[g * m + j];
    check(kept == n, k.tier, "nm_mask", groups);
  }
  const int64_t r = pick(1, 17), c = pick(1, 9), rows = r * pick(0, 9), cols = c * pick(1, 400);
  Exact<float> scores(rows * cols), sums(rows / r * (cols / c));
  for (int64_t i = 0; i < scores.n; ++i) scores[i] = 1;
  k.selection.block_scores(scores.get(), Dtype::f32, rows, cols, r, c, sums.get());
  for (int64_t i = 0; i < sums.n; ++i) check(sums[i] == static_cast<float>(r * c), k.tier, "block_scores", rows);
}

void masking(const Kernels& k) {
  const int64_t n = some_size();
  Exact<float> w(n), copy(n), grad(n), score(n), m(n), v(n);
  Exact<uint8_t> mask(n), made(n);
  for (int64_t i = 0; i < n; ++i) {
    w[i] = normal();
    grad[i] = normal();
    mask[i] = pick(0, 3) == 0;
  }
  k.masking.masked_copy(w.get(), mask.get(), copy.get(), n, 4);
  for (int64_t i = 0; i < n; ++i) check(copy[i] == (mask[i] ? w[i] : 0), k.tier, "masked_copy", n);
  int64_t nans = 0, kept = 0;
  const int64_t reported = k.masking.threshold_mask(w.get(), Dtype::f32, 0.7f, made.get(), copy.get(), n, &nans);
  for (int64_t i = 0; i < n; ++i) {
    const bool keep = std::fabs(w[i]) >= 0.7f;
    kept += keep;
    check(made[i] == keep && copy[i] == (keep ? w[i] : 0), k.tier, "threshold_mask", n);
  }
  check(kept == reported && nans == 0, k.tier, "threshold_mask count", n);
  k.masking.mask_gradient(grad.get(), w.get(), Dtype::f32, mask.get(), pick(0, 1) ? score.get() : nullptr, n);
  for (int64_t i = 0; i < n; ++i) check(mask[i] || grad[i] == 0, k.tier, "mask_gradient", n);
  const AdamwStep step = {0.9f, 0.1f, 0.99f, 0.01f, 0.999f, 0.01f, 10.0f, 1e-8f};
  k.masking.masked_adamw(w.get(), grad.get(), Dtype::f32, m.get(), v.get(), pick(0, 3) ? mask.get() : nullptr, n, step);
  k.masking.apply_mask(w.get(), mask.get(), n, 4);
  for (int64_t i = 0; i < n; ++i) check(mask[i] ? std::isfinite(w[i]) : w[i] == 0, k.tier, "masked_adamw", n);
  for (Dtype dtype : {Dtype::bf16, Dtype::f16}) {
    Exact<uint16_t> p(n), g(n), out(n);
    for (int64_t i = 0; i < n; ++i) {
      p[i] = static_cast<uint16_t>(pick(0, 0x7bff));
      g[i] = static_cast<uint16_t>(pick(0, 0x7bff));
    }
    k.masking.masked_copy(p.get(), mask.get(), out.get(), n, 2);
    for (int64_t i = 0; i < n; ++i) check(out[i] == (mask[i] ? p[i] : 0), k.tier, "masked_copy of 16 bits", n);
    k.masking.threshold_mask(p.get(), dtype, 0.5f, made.get(), out.get(), n, &nans);
    k.masking.mask_gradient(g.get(), p.get(), dtype, mask.get(), score.get(), n);
    k.masking.masked_adamw(p.get(), g.get(), dtype, m.get(), v.get(), mask.get(), n, step);
    k.masking.apply_mask(p.get(), mask.get(), n, 2);
    for (int64_t i = 0; i < n; ++i) check(mask[i] || p[i] == 0, k.tier, "apply_mask of 16 bits", n);
  }
}

void layer_norm(const Kernels& k) {
  const int64_t n = pick(0, 20), d = pick(1, 200), stride = d + pick(0, 5);
  const bool added = pick(0, 1);
  Exact<float> x(n ? (n - 1) * stride + d : 0), residual(n * d), weight(d), bias(d), y(n * d);
  for (int64_t i = 0; i < x.n; ++i) x[i] = normal();
  for (int64_t i = 0; i < residual.n; ++i) residual[i] = normal();
  for (int64_t i = 0; i < d; ++i) weight[i] = 1;
  k.norms.add_layer_norm(x.get(), stride, added ? residual.get() : nullptr, d, weight.get(), bias.get(), 1e-5f, n, d, y.get());
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < d; ++j) sum += y[i * d + j];
    check(std::fabs(sum) < 1e-3 * static_cast<double>(d), k.tier, "add_layer_norm", d);
  }
  k.norms.rms_norm(x.get(), stride, weight.get(), 1e-5f, n, d, y.get());
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < d; ++j) sum += y[i * d + j] * y[i * d + j];
    check(sum < 1.001 * static_cast<double>(d), k.tier, "rms_norm", d);
  }
}

// A dense row of ones, in bfloat16, adds up x.
void rounded(const Kernels& k) {
  const int64_t n = pick(0, 9), rows = pick(0, 40), columns = pick(0, 200), stride = columns + pick(0, 5);
  Exact<float> x(n ? (n - 1) * stride + columns : 0), bias(rows), y(n * rows);
  Exact<uint16_t> w(rows * columns);
  for (int64_t i = 0; i < x.n; ++i) x[i] = static_cast<float>(pick(-8, 8));
  for (int64_t i = 0; i < rows; ++i) bias[i] = static_cast<float>(i);
  for (int64_t i = 0; i < w.n; ++i) w[i] = 0x3f80;
  const bool shifted = pick(0, 1);
  k.rounded.rounded_linear(w.get(), kBfloat16, nullptr, rows, columns, x.get(), stride, n, shifted ? bias.get() : nullptr, y.get());
  for (int64_t t = 0; t < n; ++t) {
    float sum = 0;
    for (int64_t j = 0; j < columns; ++j) sum += x[t * stride + j];
    for (int64_t r = 0; r < rows; ++r) {
      check(y[t * rows + r] == sum + (shifted ? static_cast<float>(r) : 0.0f), k.tier, "rounded_linear", r);
    }
  }
}
// Quads of whole numbers, x on a grid of its own: every product is exact.
void quads(const Kernels& k) {
  const int heights[] = {1, 2, 4, 8, 16};
  const int height = heights[pick(0, 4)];
  const int64_t groups = pick(1, 20), rows = groups * height, columns = 4 * pick(1, 60), n = pick(0, 150), block = 4 * pick(1, 20);
  const int64_t per_block = pick(1, groups), k_blocks = (columns + block - 1) / block;
  std::vector<uint16_t> index;
  std::vector<int8_t> values;
  std::vector<int32_t> slots;
  std::vector<int> dense(static_cast<size_t>(rows * columns), 0);
  for (int64_t first = 0; first < groups; first += per_block) {
    const int64_t here = std::min(per_block, groups - first);
    for (int64_t b = 0; b < k_blocks; ++b) {
      for (int64_t g = 0; g < here; ++g) {
        slots.push_back(static_cast<int32_t>(index.size()));
        slots.push_back(static_cast<int32_t>(g));
        for (int64_t q = 0; q < std::min(block, columns - b * block) / 4; ++q) {
          if (pick(0, 2)) continue;
          index.push_back(static_cast<uint16_t>(q));
          for (int64_t v = 0; v < height; ++v) {
            for (int64_t j = 0; j < 4; ++j) {
              values.push_back(static_cast<int8_t>(pick(-64, 64)));
              dense[static_cast<size_t>(((first + g) * height + v) * columns + b * block + q * 4 + j)] = values.back();
            }
          }
        }
      }
    }
  }
  slots.push_back(static_cast<int32_t>(index.size()));
  slots.push_back(0);
  Exact<uint16_t> held_index(static_cast<int64_t>(index.size()));
  Exact<int8_t> held_values(static_cast<int64_t>(values.size()));
  std::copy(index.begin(), index.end(), held_index.get());
  std::copy(values.begin(), values.end(), held_values.get());
  Exact<float> scale(2 * rows), x(n * columns), y(n * rows), bias(rows);
  for (int64_t r = 0; r < rows; ++r) {
    scale[r] = 1.0f;
    for (int64_t c = 0; c < columns; ++c) scale[rows + r] += static_cast<float>(dense[static_cast<size_t>(r * columns + c)]);
    bias[r] = static_cast<float>(r);
  }
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t c = 0; c < columns; ++c) x[t * columns + c] = static_cast<float>(pick(-100, 155));
    x[t * columns] = -100.0f;
    x[t * columns + columns - 1] = 155.0f;  // steps of one, the zero at 100
  }
  const Packed w = {kQuads, rows, columns, height, block, k_blocks, per_block * height, held_values.get(), kInt8, held_index.get(),
                    slots.data(), scale.get()};
  k.linear.linear(w, x.get(), columns, n, y.get(), {scale.get(), bias.get(), nullptr, 0, 0});
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t r = 0; r < rows; ++r) {
      int64_t sum = 0;
      for (int64_t c = 0; c < columns; ++c) sum += dense[static_cast<size_t>(r * columns + c)] * static_cast<int64_t>(x[t * columns + c]);
      check(y[t * rows + r] == static_cast<float>(sum) + bias[r], k.tier, "a product of quads", r);
    }
  }
}

// A bit a column and the kept values in order, whole numbers of each dtype, with the slack that the packing leaves behind them;
// x whole numbers, for bitmask8 on a grid of its own: every sum is exact.
void bitmasks(const Kernels& k) {
  const int dtypes[] = {kFloat32, kBfloat16, kInt8, kInt8};
  const int64_t which = pick(0, 3), rows = pick(0, 40), columns = pick(which == 3 ? 1 : 0, 400), n = pick(0, 70);
  const int64_t row_bytes = (columns + 63) / 64 * 8, keep = pick(0, 9);
  std::vector<int> dense(static_cast<size_t>(rows * columns), 0);
  std::vector<int> values;
  Exact<uint8_t> bits(rows * row_bytes);
  Exact<int32_t> slots(rows + 1);
  Exact<float> scale(2 * rows), x(n * columns), y(n * rows);
  for (int64_t r = 0; r < rows; ++r) {
    slots[r] = static_cast<int32_t>(values.size());
    scale[r] = 1.0f;
    for (int64_t c = 0; c < columns; ++c) {
      if (pick(0, 8) >= keep) continue;
      bits[r * row_bytes + c / 8] |= static_cast<uint8_t>(1 << (c % 8));
      values.push_back(static_cast<int>(pick(-64, 64)));
      dense[static_cast<size_t>(r * columns + c)] = values.back();
      scale[rows + r] += static_cast<float>(values.back());
    }
  }
  slots[rows] = static_cast<int32_t>(values.size());
  const int64_t kept = static_cast<int64_t>(values.size()), held = kept + 64;
  Exact<float> wide(which == 0 ? held : 0);
  Exact<uint16_t> half(which == 1 ? held : 0);
  Exact<int8_t> narrow(which >= 2 ? held : 0);
  for (int64_t i = 0; i < kept; ++i) {
    const float v = static_cast<float>(values[static_cast<size_t>(i)]);
    uint32_t u;
    std::memcpy(&u, &v, 4);
    if (which == 0) wide[i] = v;
    if (which == 1) half[i] = static_cast<uint16_t>(u >> 16);
    if (which >= 2) narrow[i] = static_cast<int8_t>(v);
  }
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t c = 0; c < columns; ++c) x[t * columns + c] = static_cast<float>(pick(-100, 155));
    if (columns > 1) x[t * columns] = -100.0f, x[t * columns + columns - 1] = 155.0f;
    if (columns == 1) x[t] = 255.0f;
  }
  const void* data = which == 0 ? static_cast<void*>(wide.get()) : which == 1 ? static_cast<void*>(half.get()) : narrow.get();
  const Packed w = {which == 3 ? kBitmask8 : kBitmask, rows, columns, 1, columns, columns ? 1 : 0, rows, data, dtypes[which],
                    reinterpret_cast<const uint16_t*>(bits.get()), slots.get(), scale.get()};
  k.linear.linear(w, x.get(), columns, n, y.get(), {which >= 2 ? scale.get() : nullptr, nullptr, nullptr, 0, 0});
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t r = 0; r < rows; ++r) {
      int64_t sum = 0;
      for (int64_t c = 0; c < columns; ++c) sum += dense[static_cast<size_t>(r * columns + c)] * static_cast<int64_t>(x[t * columns + c]);
      check(y[t * rows + r] == static_cast<float>(sum), k.tier, which == 3 ? "a product of bitmask8" : "a product of bits", r);
    }
  }
}
}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 5;
  random_bits.seed(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0);
  std::vector<const Kernels*> tiers = {&generic_kernels()};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    tiers.push_back(&avx2_kernels());
    tiers.push_back(&avx2x16_kernels());
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    tiers.push_back(&avx512_kernels());
    if (__builtin_cpu_supports("avx512vnni")) tiers.push_back(&avx512vnni_kernels());
  }
#endif
#if defined(__aarch64__)
  tiers.push_back(&neon_kernels());
#endif
  const auto start = std::chrono::steady_clock::now();
  int64_t rounds = 0;
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds || rounds < 8) {
    for (const Kernels* k : tiers) {
      current = k;
      selection(*k);
      structures(*k);
      masking(*k);
      layer_norm(*k);
      rounded(*k);
      quads(*k);
      bitmasks(*k);
    }
    ++rounds;
  }
  std::printf("%lld rounds on:", static_cast<long long>(rounds));
  for (const Kernels* k : tiers) std::printf(" %s", k->tier);
  std::printf("\n");
}
