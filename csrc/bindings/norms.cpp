#include "bindings.h"

namespace sparseprune {
void bind_norms(py::module_& m) {
  m.def(
      "add_layer_norm",
      [](uintptr_t x, int64_t x_stride, uintptr_t residual, int64_t residual_stride, uintptr_t weight, uintptr_t bias, float eps,
         int64_t n, int64_t d, uintptr_t y) {
        kernels().norms.add_layer_norm(at<const float>(x), x_stride, at<const float>(residual), residual_stride,
                                        at<const float>(weight), at<const float>(bias), eps, n, d, at<float>(y));
      },
      ReleaseGil());
  m.def(
      "rms_norm",
      [](uintptr_t x, int64_t x_stride, uintptr_t weight, float eps, int64_t n, int64_t d, uintptr_t y) {
        kernels().norms.rms_norm(at<const float>(x), x_stride, at<const float>(weight), eps, n, d, at<float>(y));
      },
      ReleaseGil());
}
}  // namespace sparseprune
