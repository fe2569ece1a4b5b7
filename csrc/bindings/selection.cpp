#include <pybind11/stl.h>

#include <new>
#include <tuple>
#include <vector>

#include "bindings.h"

namespace sparseprune {
namespace {
// Addresses and sizes of the buffers of one list, kept alive for one call.
struct List {
  std::vector<const void*> data;
  const std::vector<int64_t>& sizes;
  List(const std::vector<uintptr_t>& addresses, const std::vector<int64_t>& lengths) : sizes(lengths) {
    for (uintptr_t address : addresses) data.push_back(at<const void>(address));
  }
  Pieces pieces(int dtype, bool magnitude) const {
    return {data.data(), sizes.data(), static_cast<int64_t>(data.size()), static_cast<Dtype>(dtype), magnitude};
  }
};
}  // namespace

void bind_selection(py::module_& m) {
  m.def(
      "kth",
      [](const std::vector<uintptr_t>& data, const std::vector<int64_t>& sizes, int dtype, bool magnitude, int64_t k, bool force_radix) {
        Selected found{};
        if (!kernels().selection.kth(List(data, sizes).pieces(dtype, magnitude), k, force_radix, &found)) throw std::bad_alloc();
        return std::make_tuple(found.key, found.above, found.equal, found.nans);
      },
      ReleaseGil(), "(key, above, equal, nans) of the k-th largest over the buffers.");
  m.def(
      "cut_mask",
      [](const std::vector<uintptr_t>& data, const std::vector<int64_t>& sizes, int dtype, bool magnitude, int32_t key, int64_t ties,
         const std::vector<uintptr_t>& masks) {
        std::vector<uint8_t*> out;
        for (uintptr_t address : masks) out.push_back(at<uint8_t>(address));
        return kernels().selection.cut_mask(List(data, sizes).pieces(dtype, magnitude), key, ties, out.data());
      },
      ReleaseGil());
  m.def(
      "radix_histogram",
      [](const std::vector<uintptr_t>& data, const std::vector<int64_t>& sizes, int dtype, bool magnitude, uint32_t prefix, int shift, int width,
         uintptr_t counts) {
        return kernels().selection.histogram(List(data, sizes).pieces(dtype, magnitude), prefix, shift, width, at<int64_t>(counts));
      },
      ReleaseGil());
  m.def(
      "nm_mask",
      [](uintptr_t scores, int dtype, int64_t groups, int n, int m, uintptr_t mask) {
        return kernels().selection.nm_mask(at<const void>(scores), static_cast<Dtype>(dtype), groups, n, m, at<uint8_t>(mask));
      },
      ReleaseGil());
  m.def(
      "block_scores",
      [](uintptr_t scores, int dtype, int64_t rows, int64_t cols, int64_t r, int64_t c, uintptr_t out) {
        kernels().selection.block_scores(at<const void>(scores), static_cast<Dtype>(dtype), rows, cols, r, c, at<float>(out));
      },
      ReleaseGil());
}
}  // namespace sparseprune
