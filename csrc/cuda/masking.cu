// Masking in one pass over memory: each element is read and written once, 16 bytes a thread and tensor where the addresses allow.
// Bound by bandwidth alone. A count over all elements is summed in the warp, then in the block, before one atomic a block.
#include <type_traits>

#include "kernels.h"
#include "numeric.cuh"

namespace sparseprune {
namespace {

constexpr int kThreads = 256;
constexpr int kRoundsToCount = 8;  // of a block whose count ends in one atomic: the fewer of those meet, the better

// kCount values of one type that are loaded and stored as one word.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T at[kCount];
};

// Calls body(element, kCount) for runs of kRun neighbouring elements, and one by one for what is left behind the last whole run.
template <int kRun, class Body>
__device__ inline void in_runs(int64_t n, Body body) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t first = thread * kRun; first < n; first += static_cast<int64_t>(gridDim.x) * kThreads * kRun) {
    if (first + kRun <= n) {
      body(first, std::integral_constant<int, kRun>{});
    } else {
      for (int64_t i = first; i < n; ++i) body(i, std::integral_constant<int, 1>{});
    }
  }
}

template <class T, int kCount>
__device__ inline Pack<T, kCount> load(const T* from) {
  return *reinterpret_cast<const Pack<T, kCount>*>(from);
}
template <class T, int kCount>
__device__ inline void store(T* to, const Pack<T, kCount>& pack) {
  *reinterpret_cast<Pack<T, kCount>*>(to) = pack;
}

// out = w where mask is not 0, else 0; out may be w. Word: an unsigned integer of the element's size.
template <class Word, int kRun>
__global__ void __launch_bounds__(kThreads, 4) masked_copy_kernel(const Word* w, const uint8_t* mask, Word* out, int64_t n) {
  in_runs<kRun>(n, [&](int64_t at, auto count) {
    constexpr int kCount = decltype(count)::value;
    Pack<Word, kCount> value = load<Word, kCount>(w + at);
    const Pack<uint8_t, kCount> keep = load<uint8_t, kCount>(mask + at);
#pragma unroll
    for (int i = 0; i < kCount; ++i) value.at[i] = keep.at[i] != 0 ? value.at[i] : Word{0};
    store<Word, kCount>(out + at, value);
  });
}

// Adds up over the block; thread 0 has the sum.
__device__ inline uint32_t sum_block(uint32_t own, uint32_t* scratch) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) own += __shfl_xor_sync(kAllLanes, own, distance);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = own;
  __syncthreads();
  uint32_t total = 0;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < kThreads / 32; ++warp) total += scratch[warp];
  return total;
}

template <class T, int kRun>
__global__ void __launch_bounds__(kThreads, 4)
    threshold_mask_kernel(const T* w, const T* threshold, uint8_t* mask, T* out, unsigned long long* counts, int64_t n) {
  SHARED(uint32_t[2][kThreads / 32], scratch);
  const float cut = widen(*threshold);
  uint32_t kept = 0, nan = 0;
  in_runs<kRun>(n, [&](int64_t at, auto count) {
    constexpr int kCount = decltype(count)::value;
    Pack<T, kCount> value = load<T, kCount>(w + at);
    Pack<uint8_t, kCount> keep;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float wide = widen(value.at[i]), size = wide < 0.0f ? -wide : wide;
      keep.at[i] = size >= cut;
      kept += keep.at[i];
      nan += wide != wide;
      if (keep.at[i] == 0) value.at[i] = T{};
    }
    store<uint8_t, kCount>(mask + at, keep);
    store<T, kCount>(out + at, value);
  });
  const uint32_t all_kept = sum_block(kept, scratch[0]), all_nan = sum_block(nan, scratch[1]);
  if (threadIdx.x != 0) return;
  if (all_kept != 0) atomicAdd(counts, static_cast<unsigned long long>(all_kept));
  if (all_nan != 0) atomicAdd(counts + 1, static_cast<unsigned long long>(all_nan));
}

template <class T, int kRun>
__global__ void __launch_bounds__(kThreads, 4) mask_gradient_kernel(T* grad, const T* w, const uint8_t* mask, float* score_grad, int64_t n) {
  in_runs<kRun>(n, [&](int64_t at, auto count) {
    constexpr int kCount = decltype(count)::value;
    Pack<T, kCount> dense = load<T, kCount>(grad + at);
    if (score_grad != nullptr) {
      const Pack<T, kCount> weight = load<T, kCount>(w + at);
      Pack<float, kCount> score = load<float, kCount>(score_grad + at);
#pragma unroll
      for (int i = 0; i < kCount; ++i) score.at[i] += widen(dense.at[i]) * widen(weight.at[i]);
      store<float, kCount>(score_grad + at, score);
    }
    const Pack<uint8_t, kCount> keep = load<uint8_t, kCount>(mask + at);
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (keep.at[i] == 0) dense.at[i] = T{};
    store<T, kCount>(grad + at, dense);
  });
}

template <class T, int kRun>
__global__ void __launch_bounds__(kThreads, 4)
    masked_adamw_kernel(T* p, const T* grad, float* exp_avg, float* exp_avg_sq, const uint8_t* mask, int64_t n, AdamWStep step) {
  in_runs<kRun>(n, [&](int64_t at, auto count) {
    constexpr int kCount = decltype(count)::value;
    Pack<T, kCount> value = load<T, kCount>(p + at);
    const Pack<T, kCount> gradient = load<T, kCount>(grad + at);
    Pack<float, kCount> first = load<float, kCount>(exp_avg + at), second = load<float, kCount>(exp_avg_sq + at);
    Pack<uint8_t, kCount> keep;
    if (mask != nullptr) keep = load<uint8_t, kCount>(mask + at);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float g = widen(gradient.at[i]);
      const float m = first.at[i] + (g - first.at[i]) * step.rest1, v = second.at[i] * step.beta2 + g * g * step.rest2;
      const float next = widen(value.at[i]) * step.decay - m / (sqrtf(v) * step.root_correction + step.eps) * step.size;
      const bool stays = mask == nullptr || keep.at[i] != 0;
      first.at[i] = stays ? m : 0.0f, second.at[i] = stays ? v : 0.0f;
      narrow(stays ? next : 0.0f, value.at[i]);
    }
    store<T, kCount>(p + at, value);
    store<float, kCount>(exp_avg + at, first);
    store<float, kCount>(exp_avg_sq + at, second);
  });
}

dim3 grid_for(int64_t n, int run) { return dim3(static_cast<unsigned>((n + int64_t{kThreads} * run - 1) / (int64_t{kThreads} * run))); }

// Whether every address is a multiple of what a run of `elements` takes in each tensor: their sizes are powers of two.
template <class... Pointers>
bool aligned(int elements, Pointers... pointers) {
  const auto fits = [elements](auto* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % (elements * sizeof(*pointer)) == 0;
  };
  return (fits(pointers) && ...);
}

template <class Word>
int copy(const void* w, const uint8_t* mask, void* out, int64_t n, void* stream) {
  constexpr int kRun = 16 / sizeof(Word);
  const Word* const from = static_cast<const Word*>(w);
  Word* const to = static_cast<Word*>(out);
  if (aligned(kRun, from, mask, to)) {
    LAUNCH((masked_copy_kernel<Word, kRun>), grid_for(n, kRun), dim3(kThreads), 0, stream, from, mask, to, n);
  } else {
    LAUNCH((masked_copy_kernel<Word, 1>), grid_for(n, 1), dim3(kThreads), 0, stream, from, mask, to, n);
  }
  return 0;
}

template <class Function>
int with_type(int dtype, Function function) {
  return dtype == kFloat32 ? function(float{}) : dtype == kFloat16 ? function(Half{}) : function(Bfloat{});
}

}  // namespace

int masked_copy(const void* w, const uint8_t* mask, void* out, int64_t n, int element_size, void* stream) {
  if (n == 0) return 0;
  return element_size == 1   ? copy<uint8_t>(w, mask, out, n, stream)
         : element_size == 2 ? copy<uint16_t>(w, mask, out, n, stream)
         : element_size == 4 ? copy<uint32_t>(w, mask, out, n, stream)
                             : copy<unsigned long long>(w, mask, out, n, stream);
}

int threshold_mask(const void* w, const void* threshold, int dtype, uint8_t* mask, void* out, int64_t* counts, int64_t n, void* stream) {
  if (n == 0) return 0;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kRun = 16 / sizeof(T);
    const T *const from = static_cast<const T*>(w), *const cut = static_cast<const T*>(threshold);
    T* const to = static_cast<T*>(out);
    const auto sums = reinterpret_cast<unsigned long long*>(counts);
    if (aligned(kRun, from, mask, to)) {
      LAUNCH((threshold_mask_kernel<T, kRun>), grid_for(n, kRun * kRoundsToCount), dim3(kThreads), 0, stream, from, cut, mask, to, sums, n);
    } else {
      LAUNCH((threshold_mask_kernel<T, 1>), grid_for(n, kRoundsToCount), dim3(kThreads), 0, stream, from, cut, mask, to, sums, n);
    }
    return 0;
  });
}

int mask_gradient(void* grad, const void* w, const uint8_t* mask, float* score_grad, int64_t n, int dtype, void* stream) {
  if (n == 0) return 0;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kRun = 4;  // 16 bytes of the float scores
    T* const to = static_cast<T*>(grad);
    const T* const weight = static_cast<const T*>(w);
    if (aligned(kRun, to, weight, mask, score_grad)) {
      LAUNCH((mask_gradient_kernel<T, kRun>), grid_for(n, kRun), dim3(kThreads), 0, stream, to, weight, mask, score_grad, n);
    } else {
      LAUNCH((mask_gradient_kernel<T, 1>), grid_for(n, 1), dim3(kThreads), 0, stream, to, weight, mask, score_grad, n);
    }
    return 0;
  });
}

int masked_adamw(void* p, const void* grad, float* exp_avg, float* exp_avg_sq, const uint8_t* mask, int64_t n, int dtype,
                 const AdamWStep& step, void* stream) {
  if (n == 0) return 0;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kRun = 4;  // 16 bytes of a moment
    T* const to = static_cast<T*>(p);
    const T* const from = static_cast<const T*>(grad);
    if (aligned(kRun, to, from, exp_avg, exp_avg_sq, mask)) {
      LAUNCH((masked_adamw_kernel<T, kRun>), grid_for(n, kRun), dim3(kThreads), 0, stream, to, from, exp_avg, exp_avg_sq, mask, n, step);
    } else {
      LAUNCH((masked_adamw_kernel<T, 1>), grid_for(n, 1), dim3(kThreads), 0, stream, to, from, exp_avg, exp_avg_sq, mask, n, step);
    }
    return 0;
  });
}

}  // namespace sparseprune
