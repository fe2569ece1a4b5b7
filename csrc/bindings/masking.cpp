#include <cmath>
#include <utility>

#include "bindings.h"

namespace sparseprune {
void bind_masking(py::module_& m) {
  m.def(
      "apply_mask",
      [](uintptr_t w, uintptr_t mask, int64_t n, int bytes) { kernels().masking.apply_mask(at<void>(w), at<const uint8_t>(mask), n, bytes); },
      ReleaseGil());
  m.def(
      "masked_copy",
      [](uintptr_t w, uintptr_t mask, uintptr_t out, int64_t n, int bytes) {
        kernels().masking.masked_copy(at<const void>(w), at<const uint8_t>(mask), at<void>(out), n, bytes);
      },
      ReleaseGil());
  m.def(
      "threshold_mask",
      [](uintptr_t w, int dtype, float threshold, uintptr_t mask, uintptr_t out, int64_t n) {
        int64_t nans = 0;
        const int64_t count = kernels().masking.threshold_mask(at<const void>(w), static_cast<Dtype>(dtype), threshold, at<uint8_t>(mask), at<void>(out), n, &nans);
        return std::make_pair(count, nans);
      },
      ReleaseGil(), "(how many are kept, how many are NaN).");
  m.def(
      "mask_gradient",
      [](uintptr_t grad, uintptr_t w, int dtype, uintptr_t mask, uintptr_t score_grad, int64_t n) {
        kernels().masking.mask_gradient(at<void>(grad), at<const void>(w), static_cast<Dtype>(dtype), at<const uint8_t>(mask), at<float>(score_grad), n);
      },
      ReleaseGil());
  m.def(
      "masked_adamw",
      [](uintptr_t p, uintptr_t grad, int dtype, uintptr_t exp_avg, uintptr_t exp_avg_sq, uintptr_t mask, int64_t n, int64_t step, double lr,
         double beta1, double beta2, double eps, double weight_decay) {
        const double steps = static_cast<double>(step);
        const AdamwStep s = {static_cast<float>(beta1),
                             static_cast<float>(1 - beta1),
                             static_cast<float>(beta2),
                             static_cast<float>(1 - beta2),
                             static_cast<float>(1 - lr * weight_decay),
                             static_cast<float>(lr / (1 - std::pow(beta1, steps))),
                             static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, steps))),
                             static_cast<float>(eps)};
        kernels().masking.masked_adamw(at<void>(p), at<const void>(grad), static_cast<Dtype>(dtype), at<float>(exp_avg), at<float>(exp_avg_sq),
                                       at<const uint8_t>(mask), n, s);
      },
      ReleaseGil());
}
}  // namespace sparseprune
