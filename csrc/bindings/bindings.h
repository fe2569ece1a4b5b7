// Shared by the binding files: pointers arrive as integers (tensor.data_ptr()), the GIL is released around every kernel.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

#include "cpu/dispatch.h"
#include "cpu/kernels.h"

namespace sparseprune {
namespace py = pybind11;
using ReleaseGil = py::call_guard<py::gil_scoped_release>;

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_masking(py::module_& m);
void bind_selection(py::module_& m);
void bind_linear(py::module_& m);
void bind_sddmm(py::module_& m);
void bind_packing(py::module_& m);
void bind_norms(py::module_& m);
void bind_rounded(py::module_& m);
void bind_encoder(py::module_& m);
void bind_decoder(py::module_& m);
void bind_peaks(py::module_& m);
}  // namespace sparseprune
