#include "bindings.h"

namespace sparseprune {
void bind_masking(py::module_& m) {
  m.def(
      "apply_mask",
      [](uintptr_t w, uintptr_t mask, int64_t n, int bytes) { kernels().masking.apply_mask(at<void>(w), at<const uint8_t>(mask), n, bytes); },
      ReleaseGil());
}
}  // namespace sparseprune
