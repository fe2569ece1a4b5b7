// Runs CUDA kernel text on the CPU, for tests only: the very .cu files that nvcc builds for the card, compiled by g++ or clang++.
//
// One fiber a CUDA thread; the blocks of a grid run one after another. A fiber runs until it meets __syncthreads or a warp
// collective, then the scheduler goes on with another one. The seed picks the schedule, so that an order which happens to work is
// not the only one tried:
//   seed 0       warps, lanes and blocks in order, cp.async copies land when waited for
//   odd seeds    random order, each warp runs as far as it can before the next starts (the largest skew between warps)
//   even seeds   random order, another warp after every collective; cp.async copies land at once
// Errors (a divergent collective, a barrier that some threads never reach, a misaligned vector access) throw std::runtime_error
// out of the launch. Shared memory starts as garbage in every block and lives on the heap, so the address sanitizer guards it.
//
// What this cannot show: speed, the memory model between blocks that run at once, and the rounding inside a tensor core (here a
// product is exact and sums are rounded to float one by one).
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define EMUL_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMUL_ASAN 1
#endif
#endif
#if defined(EMUL_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::max;
using std::min;

namespace emul {

// ---- switching between stacks ----
#if defined(__x86_64__)
extern "C" void sparseprune_emul_switch(void** save, void* load);
// Keeps what the System V ABI says a call preserves: rbx, rbp, r12 to r15 and the stack pointer.
asm(R"(
.text
.weak sparseprune_emul_switch
.hidden sparseprune_emul_switch
.type sparseprune_emul_switch,@function
sparseprune_emul_switch:
  pushq %rbx
  pushq %rbp
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbp
  popq %rbx
  ret
)");
#endif

#if defined(EMUL_ASAN)
inline constexpr size_t kStackBytes = 256 * 1024;  // the sanitizer pads every local
#else
inline constexpr size_t kStackBytes = 64 * 1024;
#endif

struct Fiber {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // the sanitizer's own

  void start(char* base, size_t bytes, void (*entry)()) {
    stack = base;
    stack_bytes = bytes;
    fake_stack = nullptr;
#if defined(EMUL_ASAN)
    __asan_unpoison_memory_region(base, bytes);  // the frames of the fiber that ended here left their red zones behind
#endif
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(base + bytes) & ~uintptr_t(15));
    *--top = nullptr;  // where entry would return to: it never does; it also leaves the stack aligned as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer = top;
#else
    getcontext(&context);
    context.uc_stack.ss_sp = base;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
#endif
  }
};

inline void arrived(Fiber& self, Fiber* from) {
#if defined(EMUL_ASAN)
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(self.fake_stack, &bottom, &bytes);
  if (from != nullptr) from->stack = bottom, from->stack_bytes = bytes;
#else
  (void)self, (void)from;
#endif
}

inline void switch_to(Fiber& from, Fiber& to) {
#if defined(EMUL_ASAN)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
#if defined(__x86_64__)
  sparseprune_emul_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
  arrived(from, nullptr);
}

// ---- one block ----
enum class State : uint8_t { ready, barrier, collective, finished };
enum class Op : uint8_t { shuffle, shuffle_up, shuffle_down, shuffle_xor, ballot, any, all, match_any, sync, mma_half, mma_bfloat };

struct MmaOperands {  // one lane's registers of mma.m16n8k16
  const uint32_t* a;
  const uint32_t* b;
  float* d;
};

struct Request {  // what a thread brings to a collective of its warp
  Op op = Op::sync;
  unsigned mask = 0;
  uint64_t value = 0;
  int argument = 0;
  int width = 32;
  MmaOperands mma{};
};

struct Copy {
  void* to;
  const void* from;
};

struct Thread {
  Fiber fiber;
  State state = State::ready;
  dim3 index;
  unsigned lane = 0;
  Request request;
  uint64_t result = 0;
  std::vector<Copy> open_copies;              // cp.async since the last commit
  std::deque<std::vector<Copy>> open_groups;  // committed, not yet waited for
};

inline float half_to_float(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}
inline uint16_t float_to_half(float value) {
  const _Float16 narrow = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &narrow, 2);
  return bits;
}
inline float bfloat_to_float(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
inline uint16_t float_to_bfloat(float value) {  // to nearest, ties to even
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

class Block {
 public:
  std::vector<Thread> threads;
  Fiber scheduler;
  Thread* current = nullptr;
  dim3 block_index, block_size, grid_size;
  std::function<void()> body;
  std::vector<char> stacks;
  std::map<const void*, std::unique_ptr<char[]>> shared;  // by the declaration's tag; the null tag is the dynamic one
  size_t dynamic_bytes = 0;
  unsigned seed = 0;
  std::string error;

  unsigned random(unsigned below) {
    state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<unsigned>(state_ >> 33) % below;
  }
  void reseed(unsigned value) { state_ = 0x9e3779b97f4a7c15ull * (value + 1); }

  template <class T>
  void shuffle(std::vector<T>& items) {
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[random(static_cast<unsigned>(i))]);
  }

  void* shared_memory(const void* tag, size_t bytes) {
    std::unique_ptr<char[]>& memory = shared[tag];
    if (memory == nullptr) {
      memory.reset(new char[bytes]);  // exactly this size: one byte further is the sanitizer's
      for (size_t i = 0; i < bytes; ++i) memory[i] = static_cast<char>(0xA5 + 7 * (i & 3));
    }
    return memory.get();
  }

  void wait() { switch_to(current->fiber, scheduler); }

  [[noreturn]] void fail(const std::string& what) {
    if (error.empty()) error = what;
    wait();
    std::abort();  // a failed block is never resumed
  }

  uint64_t collective(const Request& request) {
    Thread* self = current;
    if (!(request.mask >> self->lane & 1)) fail("a warp collective was called by a lane outside its mask");
    self->request = request;
    self->state = State::collective;
    wait();
    return self->result;
  }

  void run();

 private:
  uint64_t state_ = 1;
  bool run_warp(unsigned first);
  bool meet(Thread* warp, unsigned lanes, unsigned mask);
  void exchange(Thread* warp, unsigned lanes, unsigned mask);
  void mma(Thread* warp, bool half);
};

inline Block* active = nullptr;

inline void fiber_entry() {
  Block* block = active;
  arrived(block->current->fiber, &block->scheduler);
  block->body();
  block->current->state = State::finished;
#if defined(EMUL_ASAN)
  __sanitizer_start_switch_fiber(nullptr, block->scheduler.stack, block->scheduler.stack_bytes);
#endif
#if defined(__x86_64__)
  sparseprune_emul_switch(&block->current->fiber.stack_pointer, block->scheduler.stack_pointer);
#else
  setcontext(&block->scheduler.context);
#endif
  std::abort();
}

// Every lane computes its own four results from all lanes' fragments, as PTX lays them out for m16n8k16.
inline void Block::mma(Thread* warp, bool half) {
  const auto value = [half](uint32_t pair, int upper) {
    const uint16_t bits = static_cast<uint16_t>(upper ? pair >> 16 : pair & 0xffff);
    return half ? half_to_float(bits) : bfloat_to_float(bits);
  };
  float results[32][4];
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = (lane % 4) * 2 + i % 2;
      float sum = warp[lane].request.mma.d[i];
      for (int k = 0; k < 16; ++k) {
        const int pair = (k % 8) / 2;
        const uint32_t a = warp[(row % 8) * 4 + pair].request.mma.a[row / 8 + 2 * (k / 8)];
        const uint32_t b = warp[column * 4 + pair].request.mma.b[k / 8];
        sum += value(a, k & 1) * value(b, k & 1);
      }
      results[lane][i] = sum;
    }
  }
  for (int lane = 0; lane < 32; ++lane) std::memcpy(warp[lane].request.mma.d, results[lane], sizeof results[lane]);
}

inline void Block::exchange(Thread* warp, unsigned lanes, unsigned mask) {
  const auto in = [mask](int lane) { return (mask >> lane & 1) != 0; };
  for (int lane = 0; lane < static_cast<int>(lanes); ++lane) {
    if (!in(lane)) continue;
    const Request& mine = warp[lane].request;
    const int base = lane / mine.width * mine.width, end = base + mine.width;
    int source = lane;
    uint64_t votes = 0, matches = 0;
    switch (mine.op) {
      case Op::shuffle: source = base + (mine.argument & (mine.width - 1)); break;
      case Op::shuffle_up: source = lane - mine.argument >= base ? lane - mine.argument : lane; break;
      case Op::shuffle_down: source = lane + mine.argument < end ? lane + mine.argument : lane; break;
      case Op::shuffle_xor: source = (lane ^ mine.argument) < end ? lane ^ mine.argument : lane; break;
      default:
        for (int other = 0; other < static_cast<int>(lanes); ++other) {
          if (!in(other)) continue;
          if (warp[other].request.value != 0) votes |= uint64_t(1) << other;
          if (warp[other].request.value == mine.value) matches |= uint64_t(1) << other;
        }
    }
    switch (mine.op) {
      case Op::ballot: warp[lane].result = votes; break;
      case Op::any: warp[lane].result = votes != 0; break;
      case Op::all: warp[lane].result = votes == mask; break;
      case Op::match_any: warp[lane].result = matches; break;
      case Op::sync: break;
      default:
        if (source >= static_cast<int>(lanes) || !in(source)) {
          error = "a shuffle reads a lane outside its mask";
          return;
        }
        warp[lane].result = warp[source].request.value;
    }
  }
}

// Lets a collective happen when every lane of the mask has come to the same one; false while some have not.
inline bool Block::meet(Thread* warp, unsigned lanes, unsigned mask) {
  const unsigned present = lanes == 32 ? ~0u : (1u << lanes) - 1;
  const unsigned wanted = mask & present;
  const Op op = warp[std::countr_zero(wanted)].request.op;
  for (unsigned lane = 0; lane < lanes; ++lane) {
    if (!(wanted >> lane & 1)) continue;
    if (warp[lane].state == State::finished) {
      error = "a warp collective waits for a lane that has exited";
      return true;
    }
    if (warp[lane].state != State::collective) return false;
  }
  for (unsigned lane = 0; lane < lanes; ++lane) {
    if (!(wanted >> lane & 1)) continue;
    if (warp[lane].request.op != op || warp[lane].request.mask != mask) {
      error = "lanes of one mask met in different warp collectives";
      return true;
    }
  }
  if (op == Op::mma_half || op == Op::mma_bfloat) {
    if (mask != ~0u || lanes != 32) {
      error = "mma needs all 32 lanes";
      return true;
    }
    mma(warp, op == Op::mma_half);
  } else {
    exchange(warp, lanes, wanted);
  }
  for (unsigned lane = 0; lane < lanes; ++lane)
    if (wanted >> lane & 1) warp[lane].state = State::ready;
  return true;
}

inline bool Block::run_warp(unsigned first) {
  const unsigned lanes = std::min<unsigned>(32, static_cast<unsigned>(threads.size()) - first);
  std::vector<unsigned> order(lanes);
  for (unsigned i = 0; i < lanes; ++i) order[i] = i;
  bool progress = false;
  for (;;) {
    bool ran = false, met = false;
    if (seed != 0) shuffle(order);
    for (unsigned lane : order) {
      Thread& thread = threads[first + lane];
      if (thread.state != State::ready) continue;
      current = &thread;
      switch_to(scheduler, thread.fiber);
      ran = true;
      if (!error.empty()) return true;
    }
    for (unsigned lane = 0; lane < lanes; ++lane) {
      if (threads[first + lane].state != State::collective) continue;
      met |= meet(&threads[first], lanes, threads[first + lane].request.mask);
      if (!error.empty()) return true;
    }
    if (!ran && !met) return progress;
    progress = true;
    if (seed != 0 && seed % 2 == 0 && met) return true;
  }
}

inline void Block::run() {
  const unsigned count = block_size.x * block_size.y * block_size.z;
  threads.assign(count, Thread{});
  stacks.resize(count * kStackBytes);
  shared.clear();
  active = this;
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.index = dim3(i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y);
    thread.lane = i % 32;
    thread.fiber.start(stacks.data() + i * kStackBytes, kStackBytes, fiber_entry);
  }
  std::vector<unsigned> warps;
  for (unsigned first = 0; first < count; first += 32) warps.push_back(first);
  while (error.empty()) {
    bool progress = false;
    if (seed != 0) shuffle(warps);
    for (unsigned first : warps) {
      progress |= run_warp(first);
      if (!error.empty()) break;
    }
    unsigned alive = 0, at_barrier = 0;
    for (const Thread& thread : threads) {
      alive += thread.state != State::finished;
      at_barrier += thread.state == State::barrier;
    }
    if (alive == 0 || !error.empty()) break;
    if (at_barrier == alive) {
      if (alive != count) {
        error = "__syncthreads was reached after some threads had exited";
      } else {
        for (Thread& thread : threads) thread.state = State::ready;
      }
    } else if (!progress) {
      error = "deadlock: some threads wait in __syncthreads or a warp collective that the others never reach";
    }
  }
  active = nullptr;
  if (!error.empty()) throw std::runtime_error("cuda_emul: " + error);
}

inline unsigned schedule = 0;  // the seed of the next launches
inline constexpr int kMostShared = 99 << 10;  // bytes a block may ask for on the smallest card that is supported (sm_86, 89, 120)

template <class Body>
void launch(dim3 grid, dim3 block, size_t dynamic_bytes, Body body) {
  if (block.x * block.y * block.z == 0 || block.x * block.y * block.z > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0)
    throw std::runtime_error("cuda_emul: invalid launch: a grid of 0 blocks, or a block of 0 or over 1024 threads");
  Block run;
  run.block_size = block;
  run.grid_size = grid;
  run.dynamic_bytes = dynamic_bytes;
  run.seed = schedule;
  run.body = body;
  run.reseed(schedule);
  std::vector<unsigned> blocks(static_cast<size_t>(grid.x) * grid.y * grid.z);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<unsigned>(i);
  if (schedule != 0) run.shuffle(blocks);
  for (unsigned i : blocks) {
    run.block_index = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    run.run();
  }
}

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint64_t ask(Op op, unsigned mask, uint64_t value, int argument = 0, int width = 32) {
  return active->collective(Request{op, mask, value, argument, width, {}});
}
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool half) {
  active->collective(Request{half ? Op::mma_half : Op::mma_bfloat, ~0u, 0, 0, 32, {a, b, d}});
}
template <class T>
void check_aligned(const T* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % sizeof(T)) active->fail("a vector access is not aligned to its size");
}

// cp.async of 16 bytes: lands at once under even seeds, else when its group is waited for; between the two anything is allowed.
inline void async_copy(void* to, const void* from) {
  check_aligned(static_cast<const uint4*>(to));
  check_aligned(static_cast<const uint4*>(from));
  if (active->seed != 0 && active->seed % 2 == 0) {
    std::memcpy(to, from, 16);
  } else {
    active->current->open_copies.push_back({to, from});
  }
}
inline void async_commit() {
  active->current->open_groups.push_back(std::move(active->current->open_copies));
  active->current->open_copies.clear();
}
inline void async_wait(size_t newest_left) {
  auto& groups = active->current->open_groups;
  while (groups.size() > newest_left) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
    groups.pop_front();
  }
}
}  // namespace emul

#define threadIdx (emul::active->current->index)
#define blockIdx (emul::active->block_index)
#define blockDim (emul::active->block_size)
#define gridDim (emul::active->grid_size)

inline void __syncthreads() {
  emul::active->current->state = emul::State::barrier;
  emul::active->wait();
}
inline void __syncwarp(unsigned mask = ~0u) { emul::ask(emul::Op::sync, mask, 0); }
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return emul::from_bits<T>(emul::ask(emul::Op::shuffle, mask, emul::to_bits(value), lane, width));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emul::from_bits<T>(emul::ask(emul::Op::shuffle_up, mask, emul::to_bits(value), static_cast<int>(delta), width));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emul::from_bits<T>(emul::ask(emul::Op::shuffle_down, mask, emul::to_bits(value), static_cast<int>(delta), width));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  return emul::from_bits<T>(emul::ask(emul::Op::shuffle_xor, mask, emul::to_bits(value), lane_mask, width));
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(emul::ask(emul::Op::ballot, mask, predicate != 0));
}
inline int __any_sync(unsigned mask, int predicate) { return static_cast<int>(emul::ask(emul::Op::any, mask, predicate != 0)); }
inline int __all_sync(unsigned mask, int predicate) { return static_cast<int>(emul::ask(emul::Op::all, mask, predicate != 0)); }
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  return static_cast<unsigned>(emul::ask(emul::Op::match_any, mask, emul::to_bits(value)));
}
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
template <class T>
T __ldg(const T* pointer) {
  emul::check_aligned(pointer);
  return *pointer;
}
template <class T, class U>
T atomicAdd(T* address, U value) {
  const T old = *address;
  *address = static_cast<T>(old + static_cast<T>(value));
  return old;
}
template <class T, class U>
T atomicOr(T* address, U value) {
  const T old = *address;
  *address = static_cast<T>(old | static_cast<T>(value));
  return old;
}
