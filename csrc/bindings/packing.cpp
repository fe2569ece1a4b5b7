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
}
}  // namespace sparseprune
