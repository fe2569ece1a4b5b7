#include "bindings.h"

namespace sparseprune {
void bind_decode(py::module_& m) {
  m.def(
      "rms_norm",
      [](uintptr_t x, int64_t x_stride, uintptr_t weight, float eps, int64_t n, int64_t d, uintptr_t y) {
        kernels().decode.rms_norm(at<const float>(x), x_stride, at<const float>(weight), eps, n, d, at<float>(y));
      },
      ReleaseGil());
  m.def(
      "rounded_linear",
      [](uintptr_t w, int64_t rows, int64_t columns, uintptr_t x, int64_t x_stride, int64_t n, uintptr_t bias, uintptr_t y) {
        kernels().decode.rounded_linear(at<const uint16_t>(w), rows, columns, at<const float>(x), x_stride, n,
                                        at<const float>(bias), at<float>(y));
      },
      ReleaseGil());
}
}  // namespace sparseprune
