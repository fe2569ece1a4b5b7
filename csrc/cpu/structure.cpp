#include "structure.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace sparseprune {
namespace {
// The bytes of a row that are not 0, eight at a time: where little is kept most of eight are skipped at once.
template <class F>
void each_kept(const uint8_t* row, int64_t columns, F found) {
  int64_t k = 0;
  for (; k + 8 <= columns; k += 8) {
    uint64_t eight;
    std::memcpy(&eight, row + k, 8);
    if (eight == 0) continue;
    for (int64_t i = k; i < k + 8; ++i) {
      if (row[i]) found(i);
    }
  }
  for (; k < columns; ++k) {
    if (row[k]) found(k);
  }
}

void check(const Blocks& from) {
  const auto refuse = [](const std::string& what) { throw std::invalid_argument("pack: " + what); };
  if (from.crow[0] != 0 || from.crow[from.block_rows] != from.blocks) {
    refuse("crow_indices expected from 0 to " + std::to_string(from.blocks) + ", got " + std::to_string(from.crow[0]) + " to " +
           std::to_string(from.crow[from.block_rows]));
  }
  for (int64_t row = 0; row < from.block_rows; ++row) {
    if (from.crow[row + 1] < from.crow[row]) refuse("crow_indices expected to rise, falls in row " + std::to_string(row));
  }
  int32_t low = 0, high = -1;
  for (int64_t e = 0; e < from.blocks; ++e) {
    low = std::min(low, from.col[e]);
    high = std::max(high, from.col[e]);
  }
  if (low < 0 || high >= from.block_columns) {
    refuse("col_indices expected in [0, " + std::to_string(from.block_columns) + "), got " +
           std::to_string(low < 0 ? low : high));
  }
}

// Where the slot (group, K-block) lies: the K-blocks of a row block follow one another, each with a slot a group.
class Slots {
 public:
  explicit Slots(const GroupsPlan& plan)
      : groups_(plan.rows / plan.height), k_blocks_((plan.columns + plan.k_block - 1) / plan.k_block),
        per_block_(plan.row_block / plan.height), first_(static_cast<size_t>(groups_)), step_(static_cast<size_t>(groups_)),
        k_of_(static_cast<size_t>(plan.columns)), within_(static_cast<size_t>(plan.columns)) {
    for (int64_t g = 0; g < groups_; ++g) {
      const int64_t block = g / per_block_;
      first_[g] = block * per_block_ * k_blocks_ + (g - block * per_block_);
      step_[g] = width(block);
    }
    for (int64_t k = 0; k < plan.columns; ++k) {
      k_of_[k] = k / plan.k_block;
      within_[k] = static_cast<uint16_t>(k % plan.k_block);
    }
  }
  int64_t size() const { return groups_ * k_blocks_; }
  int64_t of(int64_t group, int64_t column) const { return first_[group] + k_of_[column] * step_[group]; }
  uint16_t within(int64_t column) const { return within_[column]; }  // its K-block

  // found(first slot, how many) for every (row block, K-block), in order.
  template <class F>
  void each_segment(F found) const {
    int64_t slot = 0;
    for (int64_t block = 0; block * per_block_ < groups_; ++block) {
      for (int64_t k = 0; k < k_blocks_; ++k, slot += width(block)) found(slot, width(block));
    }
  }

 private:
  int64_t width(int64_t block) const { return std::min(per_block_, groups_ - block * per_block_); }  // the last may be short

  int64_t groups_, k_blocks_, per_block_;
  std::vector<int64_t> first_, step_, k_of_;
  std::vector<uint16_t> within_;
};

// found(group, column, flat place of the first row's value) for every entry, in the canonical order.
template <class F>
void each_entry(const Blocks& from, const GroupsPlan& plan, F found) {
  const int64_t height = plan.height, area = from.r * from.c;
  const int64_t tall = plan.transpose ? from.c : from.r, wide = plan.transpose ? from.r : from.c;
  const int64_t row_step = plan.transpose ? 1 : from.c, column_step = plan.transpose ? from.c : 1;
  for (int64_t row = 0; row < from.block_rows; ++row) {
    for (int64_t e = from.crow[row]; e < from.crow[row + 1]; ++e) {
      const int64_t to_row = plan.transpose ? from.col[e] : row, to_column = plan.transpose ? row : from.col[e];
      for (int64_t sub = 0; sub < tall / height; ++sub) {
        for (int64_t within = 0; within < wide; ++within) {
          found(to_row * (tall / height) + sub, to_column * wide + within,
                e * area + sub * height * row_step + within * column_step);
        }
      }
    }
  }
}
}  // namespace

int64_t count_kept(const uint8_t* mask, int64_t rows, int64_t columns, int32_t* crow) {
  int64_t kept = 0;
  crow[0] = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* of = mask + row * columns;
    kept += std::accumulate(of, of + columns, int64_t(0), [](int64_t sum, uint8_t byte) { return sum + (byte != 0); });
    crow[row + 1] = static_cast<int32_t>(kept);
  }
  return kept;
}

void list_kept(const uint8_t* mask, int64_t rows, int64_t columns, const int32_t* crow, int32_t* col, int64_t* place) {
  for (int64_t row = 0; row < rows; ++row) {
    int64_t to = crow[row];
    each_kept(mask + row * columns, columns, [&](int64_t column) {
      col[to] = static_cast<int32_t>(column);
      place[to++] = row * columns + column;
    });
  }
}

void pack_groups(const Blocks& from, const GroupsPlan& plan, uint16_t* index, int32_t* offsets, int32_t* perm) {
  check(from);
  const Slots slots(plan);
  const size_t size = static_cast<size_t>(slots.size());
  std::vector<int64_t> next(size, 0);  // counts first, then where the slot's next entry goes
  each_entry(from, plan, [&](int64_t group, int64_t column, int64_t) { ++next[slots.of(group, column)]; });
  std::vector<int32_t> order;
  int64_t to = 0, entries = 0;
  slots.each_segment([&](int64_t first, int64_t count) {
    order.resize(static_cast<size_t>(count));
    std::iota(order.begin(), order.end(), 0);
    if (plan.height < 8) {  // equal counts follow one another, so that the end of a kernel's loop is predicted
      std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return next[first + a] < next[first + b]; });
    }
    for (const int32_t within : order) {
      offsets[2 * to] = static_cast<int32_t>(entries);
      offsets[2 * to++ + 1] = within;
      const int64_t own = next[first + within];
      next[first + within] = entries;
      entries += own;
    }
  });
  offsets[2 * to] = static_cast<int32_t>(entries);
  offsets[2 * to + 1] = 0;
  const int64_t row_step = plan.transpose ? 1 : from.c;
  each_entry(from, plan, [&](int64_t group, int64_t column, int64_t first) {
    const int64_t at = next[slots.of(group, column)]++;
    index[at] = slots.within(column);
    for (int64_t row = 0; row < plan.height; ++row) perm[at * plan.height + row] = static_cast<int32_t>(first + row * row_step);
  });
}
}  // namespace sparseprune
