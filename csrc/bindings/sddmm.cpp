#include "packed.h"

namespace sparseprune {
void bind_sddmm(py::module_& m) {
  m.def("sddmm", [](const py::tuple& plan, uintptr_t index, uintptr_t slots, uintptr_t x, int64_t x_stride, uintptr_t dy,
                    int64_t dy_stride, int64_t n, uintptr_t grad) {
    const Packed w = packed_of(plan, 0, kFloat32, index, slots, 0, kGroups);
    py::gil_scoped_release release;
    kernels().sddmm.sddmm(w, at<const float>(x), x_stride, at<const float>(dy), dy_stride, n, at<float>(grad));
  });
}
}  // namespace sparseprune
