// Runs recorded calls of kernels, whose results are known, on every tier of the CPU it was compiled for; by test_neon.py.
//
// The file is a list of calls: int64 numbers [op, count of numbers, count of buffers], the numbers, then each buffer with
// its bytes before it. Every buffer is copied to memory of exactly its size. The last one is the result that is expected.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <vector>

#include "cpu/kernels.h"

using namespace sparseprune;

static const Kernels* current = nullptr;
namespace sparseprune {
const Kernels& kernels() { return *current; }  // what cpu/dispatch.cpp chooses elsewhere
}

namespace {
enum Op : int64_t { kLinearOp, kSddmmOp, kRoundedOp, kRmsNormOp };
const char* const kNames[] = {"linear", "sddmm", "rounded_linear", "rms_norm"};

struct Buffer {
  std::unique_ptr<char[]> data;
  int64_t bytes = 0;
  template <class T>
  const T* as() const {
    return bytes == 0 ? nullptr : reinterpret_cast<const T*>(data.get());
  }
};

struct Call {
  int64_t op = 0;
  std::vector<int64_t> numbers;
  std::vector<Buffer> buffers;
  const Buffer& expected() const { return buffers.back(); }
};

int64_t number(std::ifstream& in) {
  int64_t v = 0;
  in.read(reinterpret_cast<char*>(&v), sizeof(v));
  if (!in) {
    std::printf("the file ends in the middle of a call\n");
    std::exit(2);
  }
  return v;
}

Call next(std::ifstream& in) {
  Call call;
  call.op = number(in);
  call.numbers.resize(static_cast<size_t>(number(in)));
  call.buffers.resize(static_cast<size_t>(number(in)));
  for (int64_t& v : call.numbers) v = number(in);
  for (Buffer& b : call.buffers) {
    b.bytes = number(in);
    b.data.reset(new char[static_cast<size_t>(b.bytes)]);
    in.read(b.data.get(), b.bytes);
  }
  return call;
}

// numbers: the plan (kind, rows, columns, height, k_block, row_block), the code of the values' dtype, tokens, activation.
Packed packed(const Call& c) {
  const auto& n = c.numbers;
  const int64_t k_block = n[4];
  return {static_cast<int>(n[0]), n[1], n[2], static_cast<int>(n[3]), k_block, k_block > 0 ? (n[2] + k_block - 1) / k_block : 0, n[5],
          c.buffers[0].as<void>(), static_cast<int>(n[6]), c.buffers[1].as<uint16_t>(), c.buffers[2].as<int32_t>(), c.op == kLinearOp ? c.buffers[3].as<float>() : nullptr};
}

// Calls the kernel; y is as long as the result that is expected.
void run(const Kernels& k, const Call& c, float* y) {
  const auto& n = c.numbers;
  const auto buffer = [&](size_t i) { return c.buffers[i].as<float>(); };
  switch (c.op) {
    case kLinearOp: {
      Epilogue e = {};
      e.scale = buffer(3);
      e.bias = buffer(4);
      e.residual = buffer(5);
      e.residual_stride = n[1];
      e.activation = static_cast<int>(n[8]);
      return k.linear.linear(packed(c), buffer(6), n[2], n[7], y, e);
    }
    case kSddmmOp:
      return k.sddmm.sddmm(packed(c), buffer(3), n[2], buffer(4), n[1], n[7], y);
    case kRoundedOp:  // rows, columns, tokens
      return k.rounded.rounded_linear(c.buffers[0].as<uint16_t>(), kBfloat16, nullptr, n[0], n[1], buffer(2), n[1], n[2], buffer(1), y);
    default:  // tokens, features
      return k.norms.rms_norm(buffer(1), n[1], buffer(0), 1e-6f, n[0], n[1], y);
  }
}
}  // namespace

// Arguments: the file, and the error that is allowed, of a result's own size or of one.
int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const double allowed = std::atof(argv[2]);
  std::vector<const Kernels*> tiers = {&generic_kernels()};
#if defined(__aarch64__)
  tiers.push_back(&neon_kernels());
#endif
  std::ifstream in(argv[1], std::ios::binary);
  int64_t calls = 0;
  for (; in.peek() != std::ifstream::traits_type::eof(); ++calls) {
    const Call call = next(in);
    const int64_t n = call.expected().bytes / 4;
    const float* expected = call.expected().as<float>();
    for (const Kernels* k : tiers) {
      std::unique_ptr<float[]> y(new float[static_cast<size_t>(n)]);
      for (int64_t i = 0; i < n; ++i) y[i] = NAN;
      current = k;
      run(*k, call, y.get());
      for (int64_t i = 0; i < n; ++i) {
        if (std::fabs(y[i] - expected[i]) <= allowed * std::fmax(1.0, std::fabs(expected[i]))) continue;
        std::printf("%s: call %lld, %s: place %lld is %g, expected %g\n", k->tier, static_cast<long long>(calls), kNames[call.op],
                    static_cast<long long>(i), static_cast<double>(y[i]), static_cast<double>(expected[i]));
        return 1;
      }
    }
  }
  std::printf("%lld calls on:", static_cast<long long>(calls));
  for (const Kernels* k : tiers) std::printf(" %s", k->tier);
  std::printf("\n");
}
