#include <pybind11/stl.h>

#include <array>

#include "cpu/structure.h"
#include "packed.h"

namespace sparseprune {
void bind_packing(py::module_& m) {
  m.def(
      "gather_values",
      [](uintptr_t canonical, int64_t size, uintptr_t perm, int64_t n, uintptr_t packed, int dtype) {
        return kernels().packing.gather_values(at<const float>(canonical), size, at<const int32_t>(perm), n, at<void>(packed), dtype);
      },
      ReleaseGil());
  m.def(
      "scatter_values",
      [](uintptr_t packed, uintptr_t perm, int64_t n, uintptr_t canonical, int64_t size) {
        return kernels().packing.scatter_values(at<const float>(packed), at<const int32_t>(perm), n, at<float>(canonical), size);
      },
      ReleaseGil());
  m.def(
      "fingerprint",
      [](uintptr_t data, int64_t bytes) { return kernels().packing.fingerprint(at<const void>(data), bytes); }, ReleaseGil());
  m.def(
      "count_kept",
      [](uintptr_t mask, int64_t rows, int64_t columns, uintptr_t crow) {
        return count_kept(at<const uint8_t>(mask), rows, columns, at<int32_t>(crow));
      },
      ReleaseGil());
  m.def(
      "list_kept",
      [](uintptr_t mask, int64_t rows, int64_t columns, uintptr_t crow, uintptr_t col, uintptr_t place) {
        list_kept(at<const uint8_t>(mask), rows, columns, at<const int32_t>(crow), at<int32_t>(col), at<int64_t>(place));
      },
      ReleaseGil());
  m.def(
      "pack_groups",
      [](uintptr_t crow, uintptr_t col, std::array<int64_t, 5> sizes, std::array<int64_t, 5> plan, bool transpose, uintptr_t index,
         uintptr_t offsets, uintptr_t perm) {
        const auto [block_rows, blocks, block_columns, r, c] = sizes;
        const auto [rows, columns, height, k_block, row_block] = plan;
        pack_groups({at<const int32_t>(crow), at<const int32_t>(col), block_rows, blocks, block_columns, r, c},
                    {rows, columns, height, k_block, row_block, transpose}, at<uint16_t>(index), at<int32_t>(offsets), at<int32_t>(perm));
      },
      ReleaseGil());
}
}  // namespace sparseprune
