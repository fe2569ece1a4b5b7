#include "bindings.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sparseprune {
namespace {
// plan = (kind, rows, columns, height, k_block, row_block), as sparseprune/native/matmul.py makes it.
Packed packed_of(const py::tuple& plan, uintptr_t values, int dtype, uintptr_t index, uintptr_t slots) {
  const auto part = [&](size_t i) { return plan[i].cast<int64_t>(); };
  const int64_t columns = part(2), k_block = part(4);
  return {static_cast<int>(part(0)), part(1), columns, static_cast<int>(part(3)), k_block,
          k_block > 0 ? (columns + k_block - 1) / k_block : 0, part(5), at<const void>(values), dtype,
          at<const uint16_t>(index), at<const int32_t>(slots)};
}

// Asks for huge pages, of 2 MiB, wherever a whole one fits into this memory; false where there are none.
bool use_huge_pages(uintptr_t address, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const uintptr_t begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
  return begin < end && madvise(at<void>(begin), end - begin, MADV_HUGEPAGE) == 0;
#else
  return false;
#endif
}

// Bytes from which on glibc takes memory from the system anew for every call, at a page fault for each 4 KiB.
constexpr size_t kMappedAnew = size_t(32) << 20;

// The pointers of a packed weight, read once; whoever holds it holds the tensors too.
struct Weight {
  Packed packed;
  const float* scale;

  void spmm(uintptr_t x, int64_t x_stride, int64_t n, uintptr_t y, const Epilogue& e) const {
    py::gil_scoped_release release;
    const size_t bytes = static_cast<size_t>(n * packed.rows) * sizeof(float);
    if (bytes >= kMappedAnew) use_huge_pages(y, bytes);
    kernels().matmul.spmm(packed, at<const float>(x), x_stride, n, at<float>(y), e);
  }
};
}  // namespace

void bind_matmul(py::module_& m) {
  py::class_<Weight>(m, "Weight")
      .def(py::init([](const py::tuple& plan, uintptr_t values, int dtype, uintptr_t index, uintptr_t slots, uintptr_t scale) {
        return Weight{packed_of(plan, values, dtype, index, slots), at<const float>(scale)};
      }))
      .def("spmm", [](const Weight& w, uintptr_t bias, uintptr_t residual, int64_t residual_stride, int activation, uintptr_t x,
                      int64_t x_stride, int64_t n, uintptr_t y) {
        w.spmm(x, x_stride, n, y, {w.scale, at<const float>(bias), at<const float>(residual), residual_stride, activation});
      })
      .def("spmm_norm", [](const Weight& w, uintptr_t gain, uintptr_t shift, float eps, uintptr_t bias, uintptr_t residual,
                           int64_t residual_stride, int activation, uintptr_t x, int64_t x_stride, int64_t n, uintptr_t y) {
        w.spmm(x, x_stride, n, y,
               {w.scale, at<const float>(bias), at<const float>(residual), residual_stride, activation, at<const float>(gain),
                at<const float>(shift), eps});
      });
  m.def("sddmm", [](const py::tuple& plan, uintptr_t index, uintptr_t slots, uintptr_t x, int64_t x_stride, uintptr_t dy,
                    int64_t dy_stride, int64_t n, uintptr_t grad) {
    const Packed w = packed_of(plan, 0, kFloat32, index, slots);
    py::gil_scoped_release release;
    kernels().matmul.sddmm(w, at<const float>(x), x_stride, at<const float>(dy), dy_stride, n, at<float>(grad));
  });
  m.def(
      "gather_values",
      [](uintptr_t canonical, uintptr_t perm, int64_t n, uintptr_t packed, int dtype) {
        kernels().matmul.gather_values(at<const float>(canonical), at<const int32_t>(perm), n, at<void>(packed), dtype);
      },
      ReleaseGil());
  m.def(
      "scatter_values",
      [](uintptr_t packed, uintptr_t perm, int64_t n, uintptr_t canonical) {
        kernels().matmul.scatter_values(at<const float>(packed), at<const int32_t>(perm), n, at<float>(canonical));
      },
      ReleaseGil());
  m.def("use_huge_pages", use_huge_pages);
  m.def(
      "add_layer_norm",
      [](uintptr_t x, int64_t x_stride, uintptr_t residual, int64_t residual_stride, uintptr_t weight, uintptr_t bias, float eps,
         int64_t n, int64_t d, uintptr_t y) {
        kernels().matmul.add_layer_norm(at<const float>(x), x_stride, at<const float>(residual), residual_stride,
                                        at<const float>(weight), at<const float>(bias), eps, n, d, at<float>(y));
      },
      ReleaseGil());
}
}  // namespace sparseprune
