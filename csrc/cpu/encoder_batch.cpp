#include "encoder_batch.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>

namespace sparseprune {
namespace {
constexpr int64_t kPanel = 64;             // lanes of a panel, as encoder.inl's kTile
constexpr double kSharing = 1.25;          // what sharing a unit costs over an even split: barriers, and pieces that do not come out even
constexpr int64_t kProductsAThread = 1 << 17;  // about what waking a thread costs

int64_t lanes_of(int64_t tokens, int lanes) {
  const int64_t rest = (tokens - 1) % kPanel + 1;
  const int64_t width = rest > 48 ? 64 : rest > 32 ? 48 : rest > 16 ? 32 : rest > 8 ? 16 : std::max(8, lanes);
  return tokens - rest + width;
}

// Sequences, longest first, each into the first bin it still fits into; a sequence longer than `room` has a bin of its own.
std::vector<std::vector<int64_t>> bins_of(const std::vector<int64_t>& lengths, const std::vector<int64_t>& order, int64_t room) {
  std::vector<std::vector<int64_t>> bins;
  std::vector<int64_t> used;
  size_t open = 0;  // bins before it are full
  for (const int64_t s : order) {
    size_t b = open;
    while (b < bins.size() && used[b] + lengths[s] > room) ++b;
    if (b == bins.size()) {
      bins.emplace_back();
      used.push_back(0);
    }
    bins[b].push_back(s);
    used[b] += lengths[s];
    while (open < bins.size() && used[open] + lengths[order.back()] > room) ++open;
  }
  return bins;
}

struct Split {
  std::vector<std::vector<int64_t>> bins;
  int64_t lanes = 0, longest_share = 0;  // in all, and of the busiest thread where each takes whole bins
};

Split split_of(const std::vector<int64_t>& lengths, const std::vector<int64_t>& order, int64_t room, int lanes, int threads) {
  Split split{bins_of(lengths, order, room), 0, 0};
  std::vector<int64_t> load(static_cast<size_t>(threads), 0);
  for (const auto& bin : split.bins) {
    int64_t tokens = 0;
    for (const int64_t s : bin) tokens += lengths[static_cast<size_t>(s)];
    const int64_t wide = lanes_of(tokens, lanes);
    split.lanes += wide;
    *std::min_element(load.begin(), load.end()) += wide;
  }
  split.longest_share = *std::max_element(load.begin(), load.end());
  return split;
}
}  // namespace

Batch batch_of(const uint8_t* mask, int64_t batch, int64_t length, int lanes, int64_t products, int threads) {
  Batch found;
  std::vector<int64_t> lengths, order;
  std::vector<int64_t> source;
  int64_t tokens = 0;
  for (int64_t b = 0; b < batch; ++b) {
    int64_t n = length;
    if (mask) n = std::count_if(mask + b * length, mask + (b + 1) * length, [](uint8_t m) { return m != 0; });
    if (n == 0) continue;
    lengths.push_back(n);
    source.push_back(b);
    tokens += n;
    found.longest = std::max(found.longest, n);
  }
  if (tokens == 0) return found;
  order.resize(lengths.size());
  std::iota(order.begin(), order.end(), int64_t(0));
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });

  const int64_t vectors = (tokens + lanes - 1) / lanes;
  threads = static_cast<int>(std::clamp<int64_t>(vectors * products / kProductsAThread, 1, threads));
  Split best = split_of(lengths, order, kPanel, lanes, threads);
  double cost = static_cast<double>(best.longest_share);
  // A wider unit may leave fewer lanes empty, a narrower one may come out even between the threads.
  for (const int64_t room : {2 * kPanel, 3 * kPanel, (tokens / threads + lanes) / lanes * lanes}) {
    if (room > 3 * kPanel || room < found.longest) continue;
    Split other = split_of(lengths, order, room, lanes, threads);
    const double its = static_cast<double>(other.longest_share) * (room > kPanel ? 1.05 : 1.0);
    if (its < 0.97 * cost) {
      best = std::move(other);
      cost = its;
    }
  }
  found.threads = threads;
  if (threads > 1) {
    const Split whole = split_of(lengths, order, std::max<int64_t>(tokens, kPanel), lanes, 1);
    const bool idle = best.bins.size() < static_cast<size_t>(threads);  // if each had a unit of its own
    if (static_cast<double>(whole.lanes) / threads * kSharing < cost && (idle || tokens <= 4 * kPanel * threads)) {
      best = whole;
      found.shared = true;
    } else {
      found.threads = static_cast<int>(std::min<int64_t>(threads, static_cast<int64_t>(best.bins.size())));
    }
  }
  found.row.reserve(static_cast<size_t>(tokens));
  found.position.reserve(static_cast<size_t>(tokens));
  found.start.push_back(0);
  for (const auto& bin : best.bins) {
    const int64_t first = found.start.back(), sequence = static_cast<int64_t>(found.start.size()) - 1;
    for (const int64_t s : bin) {
      const int64_t b = source[static_cast<size_t>(s)];
      for (int64_t i = 0; i < length; ++i) {
        if (mask && !mask[b * length + i]) continue;
        found.row.push_back(static_cast<int32_t>(b * length + i));
        found.position.push_back(static_cast<int32_t>(i));
      }
      found.start.push_back(static_cast<int64_t>(found.row.size()));
    }
    found.units.push_back({first, found.start.back() - first, sequence, static_cast<int64_t>(bin.size())});
  }
  return found;
}
}  // namespace sparseprune
