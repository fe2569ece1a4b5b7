#include "bindings.h"

namespace sparseprune {
void bind_peaks(py::module_& m) {
  m.def("peak_fma", [](int64_t rounds) { return kernels().peaks.fma(rounds); }, ReleaseGil(), "Floating point operations done.");
  m.def("peak_l1_fma", [](int64_t rounds) { return kernels().peaks.l1_fma(rounds); }, ReleaseGil(), "Floating point operations done.");
  m.def(
      "peak_read", [](uintptr_t data, int64_t n, int64_t repeats) { return kernels().peaks.read(at<const float>(data), n, repeats); },
      ReleaseGil(), "Bytes read.");
  m.def(
      "peak_update", [](uintptr_t data, int64_t n) { return kernels().peaks.update(at<float>(data), n); }, ReleaseGil(),
      "Bytes read and written.");
}
}  // namespace sparseprune
