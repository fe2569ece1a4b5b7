#include "bindings.h"

namespace sparseprune {
void bind_matmul(py::module_& m) {
  m.def(
      "spmm",
      [](int64_t rows, int64_t columns, int height, int64_t k_block, int64_t row_block, uintptr_t values, int values_dtype,
         uintptr_t index, uintptr_t offsets, uintptr_t scale, uintptr_t bias, uintptr_t residual, int64_t residual_stride,
         int activation, uintptr_t x, int64_t x_stride, int64_t n, uintptr_t y, int64_t y_stride) {
        const Packed w{rows, columns, height, k_block, (columns + k_block - 1) / k_block, row_block,
                       at<const void>(values), values_dtype, at<const uint16_t>(index), at<const int32_t>(offsets)};
        const Epilogue e{at<const float>(scale), at<const float>(bias), at<const float>(residual), residual_stride, activation};
        kernels().matmul.spmm(w, at<const float>(x), x_stride, n, at<float>(y), y_stride, e);
      },
      ReleaseGil());
}
}  // namespace sparseprune
