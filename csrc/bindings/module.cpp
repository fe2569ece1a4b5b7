// The module sparseprune._C: knows nothing of torch, only pointers and sizes. The Python layer checks every argument.
#include <pybind11/stl.h>

#include "bindings.h"

PYBIND11_MODULE(_C, m) {
  using namespace sparseprune;
  kernels();  // an unusable SPARSEPRUNE_CPU fails here, at import, with its reason
  m.def("tier", [] { return kernels().tier; }, "Name of the tier in use.");
  m.def("lanes", [] { return kernels().lanes; }, "Floats in one vector of the tier in use.");
  m.def("runnable_tiers", &runnable_tiers, "Compiled tiers that this CPU can run, slowest first.");
  m.def("use_tier", &use_tier, py::arg("name"), "From here on every call runs this tier.");
#if defined(_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  bind_masking(m);
  bind_selection(m);
  bind_linear(m);
  bind_sddmm(m);
  bind_packing(m);
  bind_norms(m);
  bind_rounded(m);
  bind_encoder(m);
  bind_decoder(m);
  bind_peaks(m);
}
