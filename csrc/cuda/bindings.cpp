// The module sparseprune._cuda: raw device pointers and a stream, both as integers. The Python layer checks every argument.
// Tests build the same file against the emulator (no -DSPARSEPRUNE_CUDART); the module is then called _cuda_emul and takes host pointers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

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
  if (error == kTooManyBlocks)
    throw std::runtime_error("sparseprune._cuda: this call needs a grid of more blocks than a card takes; split it, into fewer tokens each");
  if (error == kTooMuchShared)
    throw std::runtime_error("sparseprune._cuda: this call needs more shared memory than a block of this card may have");
#if defined(SPARSEPRUNE_CUDART)
  const char* from = "";
  if (error == cudaErrorIllegalAddress || error == cudaErrorMisalignedAddress || error == cudaErrorLaunchFailure || error == cudaErrorAssert)
    from = ", here or in any kernel before; CUDA_LAUNCH_BLOCKING=1 tells in which";
  throw std::runtime_error("sparseprune._cuda: " + std::string(cudaGetErrorString(static_cast<cudaError_t>(error))) + from);
#endif
}

template <class Type>
Type* at(uintptr_t address) {
  return reinterpret_cast<Type*>(address);
}

using Listed = std::vector<std::tuple<uintptr_t, int64_t, uintptr_t>>;  // (values, how many, mask) of each tensor

SelectTensors listed(const Listed& tensors, int64_t chunks_before) {
  if (tensors.size() > kSelectTensors)
    throw std::invalid_argument("select: expected at most " + std::to_string(kSelectTensors) + " tensors a launch, got " +
                                std::to_string(tensors.size()));
  SelectTensors found{};
  found.count = static_cast<int>(tensors.size());
  found.chunks_before = chunks_before;
  for (int i = 0; i < found.count; ++i) {
    const auto& [x, n, mask] = tensors[static_cast<size_t>(i)];
    found.x[i] = at<void>(x), found.n[i] = n, found.mask[i] = at<uint8_t>(mask);
    found.first_chunk[i + 1] = found.first_chunk[i] + (n + kSelectChunk - 1) / kSelectChunk;
  }
  return found;
}

// Empty where a device can be used, else why not.
std::string why_no_device() {
#if defined(SPARSEPRUNE_CUDART)
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) (void)cudaGetLastError();  // or the next launch would find it
  if (error == cudaErrorInsufficientDriver || error == cudaErrorStubLibrary) return "no driver";
  if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) return "no device";
  if (error != cudaSuccess) return cudaGetErrorString(error);
#endif
  return "";
}

// Empty where the kernels can run on the current device, else why not.
std::string why_not_here() {
#if defined(SPARSEPRUNE_CUDART)
  if (const int error = why_not_loaded()) return cudaGetErrorString(static_cast<cudaError_t>(error));
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
  m.attr("SELECT_TENSORS") = kSelectTensors;
  m.attr("SELECT_STATE_BYTES") = sizeof(SelectState);
  m.def("why_no_device", &why_no_device, "Empty where a device can be used, else why not.");
  m.def("why_not_here", &why_not_here, "Empty where the kernels can run on the current device, else why not.");
#if defined(SPARSEPRUNE_CUDART)
  m.attr("runtime_version") = CUDART_VERSION;
#else
  m.def("use_schedule", [](unsigned seed) { emul::schedule = seed; }, "The emulator's schedule from here on; 0 is in order.");
#endif

  m.def("select_begin", [](Address state, Address bins, int64_t k, Address stream) {
    check(select_begin(at<void>(state), at<int64_t>(bins), k, at<void>(stream)));
  });
  m.def("select_histogram", [](const Listed& tensors, int dtype, bool magnitude, int shift, int width, Address state, uint32_t prefix,
                               bool count_nan, Address bins, Address stream) {
    check(select_histogram(listed(tensors, 0), dtype, magnitude, shift, width, at<void>(state), prefix, count_nan, at<int64_t>(bins),
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
  m.def("select_count_ties", [](const Listed& tensors, int64_t chunks_before, int dtype, bool magnitude, int shift, Address state,
                                Address counts, Address nan, Address stream) {
    check(select_count_ties(listed(tensors, chunks_before), dtype, magnitude, shift, at<void>(state), at<int64_t>(counts), at<int64_t>(nan),
                            at<void>(stream)));
  });
  m.def("select_scan", [](Address counts, int64_t n, Address stream) { check(select_scan(at<int64_t>(counts), n, at<void>(stream))); });
  m.def("select_mask", [](const Listed& tensors, int64_t chunks_before, int dtype, bool magnitude, int shift, Address state, Address counts,
                          Address stream) {
    check(select_mask(listed(tensors, chunks_before), dtype, magnitude, shift, at<void>(state), at<int64_t>(counts), at<void>(stream)));
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
  m.attr("SDDMM_TILE") = kSddmmTile;
  m.def("sddmm_tiles", [](Address dy, Address x, Address edges, Address col, Address out, int tokens, int rows, int columns, int dtype,
                          bool vector, Address stream) {
    check(sddmm_tiles(at<void>(dy), at<void>(x), at<int32_t>(edges), at<int32_t>(col), at<float>(out), tokens, rows, columns, dtype, vector,
                      at<void>(stream)));
  });
  m.def("sddmm_rows", [](Address dyt, Address xt, int64_t stride, Address crow, Address col, Address out, int rows, int splits,
                         Address stream) {
    check(sddmm_rows(at<float>(dyt), at<float>(xt), stride, at<int32_t>(crow), at<int32_t>(col), at<float>(out), rows, splits,
                     at<void>(stream)));
  });
  m.def("bitmap_words", [](Address crow, Address col, Address words, Address counts, int rows, int across, int64_t strips, Address stream) {
    check(bitmap_words(at<int32_t>(crow), at<int32_t>(col), at<uint32_t>(words), at<int32_t>(counts), rows, across, strips,
                       at<void>(stream)));
  });
  m.def("bitmap_values", [](Address crow, Address col, Address order, Address values, int values_dtype, Address words, Address starts,
                            Address packed, int dtype, int rows, int across, int64_t strips, Address stream) {
    check(bitmap_values(at<int32_t>(crow), at<int32_t>(col), at<int32_t>(order), at<void>(values), values_dtype, at<uint32_t>(words),
                        at<int32_t>(starts), at<void>(packed), dtype, rows, across, strips, at<void>(stream)));
  });
  m.def("bitmap_tiles", [](Address x, Address words, Address starts, Address values, Address bias, Address y, Address sums, int tokens,
                           int rows, int columns, int most_in_strip, int splits, int dtype, int activation, bool vector, Address stream) {
    check(bitmap_tiles(at<void>(x), at<uint32_t>(words), at<int32_t>(starts), at<void>(values), at<void>(bias), at<void>(y), at<float>(sums),
                       tokens, rows, columns, most_in_strip, splits, dtype, activation, vector, at<void>(stream)));
  });
  m.def("masked_copy", [](Address w, Address mask, Address out, int64_t n, int element_size, Address stream) {
    check(masked_copy(at<void>(w), at<uint8_t>(mask), at<void>(out), n, element_size, at<void>(stream)));
  });
  m.def("threshold_mask", [](Address w, Address threshold, int dtype, Address mask, Address out, Address counts, int64_t n,
                             Address stream) {
    check(threshold_mask(at<void>(w), at<void>(threshold), dtype, at<uint8_t>(mask), at<void>(out), at<int64_t>(counts), n,
                         at<void>(stream)));
  });
  m.def("mask_gradient", [](Address grad, Address w, Address mask, Address score_grad, int64_t n, int dtype, Address stream) {
    check(mask_gradient(at<void>(grad), at<void>(w), at<uint8_t>(mask), at<float>(score_grad), n, dtype, at<void>(stream)));
  });
  m.def("masked_adamw", [](Address p, Address grad, Address exp_avg, Address exp_avg_sq, Address mask, int64_t n, int dtype, float decay,
                           float rest1, float beta2, float rest2, float eps, float size, float root_correction, Address stream) {
    check(masked_adamw(at<void>(p), at<void>(grad), at<float>(exp_avg), at<float>(exp_avg_sq), at<uint8_t>(mask), n, dtype,
                       AdamWStep{decay, rest1, beta2, rest2, eps, size, root_correction}, at<void>(stream)));
  });
  m.def("delta_linear", [](Address x, Address starts, Address deltas, Address values, Address bias, Address y, int tokens, int rows,
                           int columns, int dtype, int activation, Address stream) {
    check(delta_linear(at<void>(x), at<int32_t>(starts), at<uint8_t>(deltas), at<void>(values), at<void>(bias), at<void>(y), tokens, rows,
                       columns, dtype, activation, at<void>(stream)));
  });
}
