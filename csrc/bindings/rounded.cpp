#include <stdexcept>

#include "bindings.h"

namespace sparseprune {
void bind_rounded(py::module_& m) {
  m.def(
      "rounded_linear",
      [](uintptr_t w, int dtype, uintptr_t scale, int64_t rows, int64_t columns, uintptr_t x, int64_t x_stride, int64_t n, uintptr_t bias, uintptr_t y) {
        if (dtype != kFloat32 && dtype != kBfloat16 && dtype != kInt8) throw std::invalid_argument("rounded_linear: a weight's dtype");
        kernels().rounded.rounded_linear(at<const void>(w), dtype, at<const float>(scale), rows, columns, at<const float>(x), x_stride, n,
                                        at<const float>(bias), at<float>(y));
      },
      ReleaseGil());
}
}  // namespace sparseprune
