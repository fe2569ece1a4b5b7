#include "packed.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sparseprune {
namespace {
// Bytes from which on glibc takes memory from the system anew for every call, at a page fault for each 4 KiB.
constexpr size_t kMappedAnew = size_t(32) << 20;

// Asks for huge pages, of 2 MiB, wherever a whole one fits into this memory; a kernel without them gives small ones.
void use_huge_pages(uintptr_t address, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const uintptr_t begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
  if (begin < end) madvise(at<void>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// The pointers of a packed weight, read once; whoever holds it holds the tensors too.
struct Weight {
  Packed packed;
  const float* scale;

  void linear(uintptr_t x, int64_t x_stride, int64_t n, uintptr_t y, const Epilogue& e) const {
    py::gil_scoped_release release;
    const size_t bytes = static_cast<size_t>(n * packed.rows) * sizeof(float);
    if (bytes >= kMappedAnew) use_huge_pages(y, bytes);
    kernels().linear.linear(packed, at<const float>(x), x_stride, n, at<float>(y), e);
  }
};
}  // namespace

void bind_linear(py::module_& m) {
  py::class_<Weight>(m, "Weight")
      .def(py::init([](const py::tuple& plan, uintptr_t values, int dtype, uintptr_t index, uintptr_t slots, uintptr_t scale) {
        return Weight{packed_of(plan, values, dtype, index, slots, scale), at<const float>(scale)};
      }))
      .def("linear", [](const Weight& w, uintptr_t bias, uintptr_t residual, int64_t residual_stride, int activation, uintptr_t x,
                      int64_t x_stride, int64_t n, uintptr_t y) {
        w.linear(x, x_stride, n, y, {w.scale, at<const float>(bias), at<const float>(residual), residual_stride, known_activation(activation)});
      })
      .def("linear_norm", [](const Weight& w, uintptr_t gain, uintptr_t shift, float eps, uintptr_t bias, uintptr_t residual,
                           int64_t residual_stride, int activation, uintptr_t x, int64_t x_stride, int64_t n, uintptr_t y) {
        w.linear(x, x_stride, n, y,
               {w.scale, at<const float>(bias), at<const float>(residual), residual_stride, known_activation(activation), at<const float>(gain),
                at<const float>(shift), eps});
      });
}
}  // namespace sparseprune
