// The module sparseprune._cuda: raw device pointers and a stream, both as integers. The Python layer checks every argument.
// Tests build the same file against the emulator (no -DSPARSEPRUNE_CUDART); the module is then called _cuda_emul and takes host pointers.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "kernels.h"
#if defined(SPARSEPRUNE_CUDART)
#include <cuda_runtime_api.h>
#define MODULE _cuda
#else
#include "emul/cuda_emul.h"
#define MODULE _cuda_emul
#endif

namespace sparseprune {
namespace {

namespace py = pybind11;

void check(int error) {
  if (error == 0) return;
#if defined(SPARSEPRUNE_CUDART)
  throw std::runtime_error("sparseprune._cuda: " + std::string(cudaGetErrorString(static_cast<cudaError_t>(error))));
#endif
}

template <class Type>
Type* at(uintptr_t address) {
  return reinterpret_cast<Type*>(address);
}

// Empty where a device can be used, else why not.
std::string why_no_device() {
#if defined(SPARSEPRUNE_CUDART)
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver || error == cudaErrorStubLibrary) return "no driver";
  if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) return "no device";
  if (error != cudaSuccess) return cudaGetErrorString(error);
#endif
  return "";
}

}  // namespace
}  // namespace sparseprune

PYBIND11_MODULE(MODULE, m) {
  using namespace sparseprune;
  using Address = uintptr_t;
  m.attr("RADIX_BINS") = kRadixBins;
  m.attr("SELECT_CHUNK") = kSelectChunk;
  m.attr("SELECT_STATE_BYTES") = sizeof(SelectState);
  m.def("why_no_device", &why_no_device, "Empty where a device can be used, else why not.");
#if defined(SPARSEPRUNE_CUDART)
  m.attr("runtime_version") = CUDART_VERSION;
#else
  m.def("use_schedule", [](unsigned seed) { emul::schedule = seed; }, "The emulator's schedule from here on; 0 is in order.");
#endif

  m.def("select_begin", [](Address state, Address bins, int64_t k, Address stream) {
    check(select_begin(at<void>(state), at<int64_t>(bins), k, at<void>(stream)));
  });
  m.def("select_histogram", [](Address x, int64_t n, int dtype, bool magnitude, int shift, int width, Address state, uint32_t prefix,
                               bool count_nan, Address bins, Address stream) {
    check(select_histogram(at<void>(x), n, dtype, magnitude, shift, width, at<void>(state), prefix, count_nan, at<int64_t>(bins),
                           at<void>(stream)));
  });
  m.def("select_digit", [](Address state, Address bins, int width, Address stream) {
    check(select_digit(at<void>(state), at<int64_t>(bins), width, at<void>(stream)));
  });
  m.def("select_value", [](Address state, int dtype, bool magnitude, int shift, Address out, Address stream) {
    check(select_value(at<void>(state), dtype, magnitude, shift, at<void>(out), at<void>(stream)));
  });
  m.def("select_from_threshold", [](Address state, Address threshold, int dtype, bool magnitude, int shift, int64_t ties, Address stream) {
    check(select_from_threshold(at<void>(state), at<void>(threshold), dtype, magnitude, shift, ties, at<void>(stream)));
  });
  m.def("select_count_ties", [](Address x, int64_t n, int dtype, bool magnitude, int shift, Address state, Address counts, Address nan,
                                Address stream) {
    check(select_count_ties(at<void>(x), n, dtype, magnitude, shift, at<void>(state), at<int64_t>(counts), at<int64_t>(nan),
                            at<void>(stream)));
  });
  m.def("select_scan", [](Address counts, int64_t n, Address stream) { check(select_scan(at<int64_t>(counts), n, at<void>(stream))); });
  m.def("select_mask", [](Address x, int64_t n, int dtype, bool magnitude, int shift, Address state, Address counts, Address mask,
                          Address stream) {
    check(select_mask(at<void>(x), n, dtype, magnitude, shift, at<void>(state), at<int64_t>(counts), at<uint8_t>(mask), at<void>(stream)));
  });
  m.def("bitmap_linear", [](Address x, Address words, Address starts, Address values, Address bias, Address y, int tokens, int rows,
                            int columns, int most_in_strip, int dtype, int activation, bool vector, Address stream) {
    check(bitmap_linear(at<void>(x), at<uint32_t>(words), at<int32_t>(starts), at<void>(values), at<void>(bias), at<void>(y), tokens, rows,
                        columns, most_in_strip, dtype, activation, vector, at<void>(stream)));
  });
  m.def("csr_linear_few", [](Address x, Address crow, Address col, Address values, Address bias, Address y, int tokens, int rows,
                             int columns, int64_t entries, int dtype, int activation, Address stream) {
    check(csr_linear_few(at<void>(x), at<int32_t>(crow), at<int32_t>(col), at<void>(values), at<void>(bias), at<void>(y), tokens, rows,
                         columns, entries, dtype, activation, at<void>(stream)));
  });
  m.def("csr_linear_many", [](Address xt, int64_t stride, Address crow, Address col, Address values, Address bias, Address y, int tokens,
                              int rows, int64_t entries, int dtype, int activation, Address stream) {
    check(csr_linear_many(at<void>(xt), stride, at<int32_t>(crow), at<int32_t>(col), at<void>(values), at<void>(bias), at<void>(y), tokens,
                          rows, entries, dtype, activation, at<void>(stream)));
  });
}
