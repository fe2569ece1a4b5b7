// The seam between the kernel text and what runs it: nvcc and the card, or g++ and the emulator (csrc/emul/cuda_emul.h).
#pragma once
#include <cstdint>

#include "kernels.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>

namespace sparseprune {
// A failed call's error, which would else be found by the next launch, a good one.
inline int cleared(cudaError_t error) {
  (void)cudaGetLastError();
  return static_cast<int>(error);
}

// Above 48 KiB a kernel has to ask for its dynamic shared memory: once a device, for all that the device has.
template <auto kKernel>
int allow_shared(int bytes) {
  constexpr int kUnasked = 48 << 10, kMostDevices = 64;
  static std::atomic<int> allowed[kMostDevices];
  if (bytes <= kUnasked) return 0;
  int device = 0, most = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return cleared(error);
  if (device < kMostDevices && (most = allowed[device].load(std::memory_order_acquire)) != 0) return bytes > most ? kTooMuchShared : 0;
  if (const cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) return cleared(error);
  if (bytes > most) return kTooMuchShared;
  if (const cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most)) return cleared(error);
  if (device < kMostDevices) allowed[device].store(most, std::memory_order_release);
  return 0;
}
}  // namespace sparseprune

// Shared memory declared where it is used. The type may be an array: SHARED(uint32_t[2048], bins).
#define SHARED(type, name)        \
  using name##_shared_t = type;   \
  __shared__ name##_shared_t name
// The launch's dynamic shared memory, seen as an array of `type`; one declaration a kernel.
#define DYNAMIC_SHARED(type, name)                          \
  extern __shared__ __align__(16) unsigned char name##_raw[]; \
  type* const name = reinterpret_cast<type*>(name##_raw)

// Queues kernel<<<grid, block, bytes, stream>>>(arguments...) and returns the launch's error from the enclosing function.
#define LAUNCH(kernel, grid, block, bytes, stream, ...)                                           \
  do {                                                                                            \
    const dim3 launch_grid = (grid);                                                              \
    CHECK_GRID(launch_grid);                                                                      \
    kernel<<<launch_grid, (block), (bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);    \
    if (const cudaError_t launch_error = cudaGetLastError()) return static_cast<int>(launch_error); \
  } while (0)
#define ALLOW_SHARED(kernel, bytes)                                                        \
  do {                                                                                     \
    if (const int allow_error = sparseprune::allow_shared<kernel>(bytes)) return allow_error; \
  } while (0)
#else
#include "emul/cuda_emul.h"

#define SHARED(type, name)                \
  static const char name##_tag = 0;       \
  using name##_shared_t = type;           \
  name##_shared_t& name = *static_cast<name##_shared_t*>(emul::active->shared_memory(&name##_tag, sizeof(name##_shared_t)))
#define DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(emul::active->shared_memory(nullptr, emul::active->dynamic_bytes))
#define LAUNCH(kernel, grid, block, bytes, stream, ...) \
  do {                                                  \
    (void)(stream);                                     \
    const dim3 launch_grid = (grid);                    \
    CHECK_GRID(launch_grid);                            \
    emul::launch(launch_grid, (block), (bytes), [&] { kernel(__VA_ARGS__); }); \
  } while (0)
#define ALLOW_SHARED(kernel, bytes)                            \
  do {                                                         \
    if ((bytes) > emul::kMostShared) return sparseprune::kTooMuchShared; \
  } while (0)
#endif

// Returns from the enclosing function where a grid has more blocks than any card takes.
#define CHECK_GRID(grid)                                                                                                     \
  do {                                                                                                                       \
    if ((grid).x > sparseprune::kMostBlocksX || (grid).y > sparseprune::kMostBlocksYZ || (grid).z > sparseprune::kMostBlocksYZ) \
      return sparseprune::kTooManyBlocks;                                                                                    \
  } while (0)

namespace sparseprune {
constexpr unsigned kAllLanes = 0xffffffffu;
}
