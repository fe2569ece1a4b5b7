// Which tokens of a batch run together: the real ones are listed, and sequences laid side by side into units of panels. Compiled
// without a tier's flags.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace sparseprune {
struct Batch {
  std::vector<int32_t> row, position;  // of each token
  std::vector<int64_t> start;          // [sequences + 1]
  std::vector<Unit> units;
  int64_t longest = 0;
  bool shared = false;                 // all threads at one unit
  int threads = 1;
};

// mask [batch, length], 1 where a token is real; null: all are. lanes: of the tier's vectors. products: multiply-adds with one vector
// that a vector of tokens takes; threads: how many there are.
Batch batch_of(const uint8_t* mask, int64_t batch, int64_t length, int lanes, int64_t products, int threads);
}  // namespace sparseprune
