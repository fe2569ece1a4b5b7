// A packed weight as the Python layer hands it over.
#pragma once
#include <stdexcept>
#include <string>

#include "bindings.h"

namespace sparseprune {
// ValueError in Python unless the kind is one that linear.inl chooses a kernel for, or the one that is asked for.
inline int known_kind(int64_t kind, int only = -1) {
  if (only >= 0 && kind != only) {
    throw std::invalid_argument("packed weight: kind expected " + std::to_string(only) + ", which alone this kernel reads, got " +
                                std::to_string(kind));
  }
  if (kind < kGroups || kind > kBitmask8) {
    throw std::invalid_argument("packed weight: kind expected 0 (groups), 1 (bitmask), 2 (quads) or 3 (bitmask8), got " + std::to_string(kind) +
                                "; if it is new, build the compiled core again");
  }
  return static_cast<int>(kind);
}

// ValueError in Python unless the code is one of kernels.h.
inline int known_activation(int activation) {
  if (activation < 0 || activation >= kActivations) {
    throw std::invalid_argument("activation: code expected in [0, " + std::to_string(kActivations - 1) + "], got " +
                                std::to_string(activation) + "; if it is new, build the compiled core again");
  }
  return activation;
}

// plan = (kind, rows, columns, height, k_block, row_block), as sparseprune/packing makes it.
inline Packed packed_of(const py::tuple& plan, uintptr_t values, int dtype, uintptr_t index, uintptr_t slots,
                        uintptr_t scale = 0, int only = -1) {
  const auto part = [&](size_t i) { return plan[i].cast<int64_t>(); };
  const int64_t columns = part(2), k_block = part(4);
  return {known_kind(part(0), only), part(1), columns, static_cast<int>(part(3)), k_block,
          k_block > 0 ? (columns + k_block - 1) / k_block : 0, part(5), at<const void>(values), dtype,
          at<const uint16_t>(index), at<const int32_t>(slots), at<const float>(scale)};
}
}  // namespace sparseprune
