// The seam between the kernel text and what runs it: nvcc and the card, or g++ and the emulator (csrc/emul/cuda_emul.h).
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

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
    kernel<<<(grid), (block), (bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);         \
    if (const cudaError_t launch_error = cudaGetLastError()) return static_cast<int>(launch_error); \
  } while (0)
// Above 48 KiB a kernel has to ask for its dynamic shared memory.
#define ALLOW_SHARED(kernel, bytes)                                                                                       \
  do {                                                                                                                    \
    if (const cudaError_t allow_error =                                                                                   \
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)))           \
      return static_cast<int>(allow_error);                                                                               \
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
    emul::launch((grid), (block), (bytes), [&] { kernel(__VA_ARGS__); }); \
  } while (0)
#define ALLOW_SHARED(kernel, bytes) (void)(bytes)
#endif

namespace sparseprune {
constexpr unsigned kAllLanes = 0xffffffffu;
}
