#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace sparseprune {
namespace {

// Every -m flag a tier was compiled with has its check here (setup.py, TIER_FLAGS). __builtin_cpu_supports reads cpuid and,
// for the AVX families, XCR0, so that an operating system that does not save the registers counts as a CPU without them.
std::string missing_features(const std::string& tier) {
  std::string missing;
#if defined(__x86_64__)
  __builtin_cpu_init();
#define SP_NEEDS(feature) \
  if (!__builtin_cpu_supports(feature)) missing += std::string(missing.empty() ? "" : ", ") + feature;
  if (tier != "generic") {
    SP_NEEDS("avx2") SP_NEEDS("fma") SP_NEEDS("f16c") SP_NEEDS("bmi") SP_NEEDS("bmi2") SP_NEEDS("popcnt") SP_NEEDS("lzcnt")
  }
  if (tier == "avx512" || tier == "avx512vnni") {
    SP_NEEDS("avx512f") SP_NEEDS("avx512bw") SP_NEEDS("avx512vl") SP_NEEDS("avx512dq")
  }
  if (tier == "avx512vnni") {
    SP_NEEDS("avx512vnni")
  }
#undef SP_NEEDS
#else
  (void)tier;
#endif
  return missing;
}

struct Tier {
  const char* name;
  const Kernels& (*table)();
};

const Tier kCompiled[] = {
    {"generic", generic_kernels},
#if defined(__x86_64__)
    {"avx2", avx2_kernels},
    {"avx512", avx512_kernels},
    {"avx512vnni", avx512vnni_kernels},
#endif
#if defined(__aarch64__)
    {"neon", neon_kernels},  // every such CPU has it
#endif
};

const Kernels& pick() {
  if (const char* forced = std::getenv("SPARSEPRUNE_CPU"); forced && *forced) return tier_kernels(forced);
  const Kernels* best = nullptr;
  for (const Tier& tier : kCompiled) {
    if (missing_features(tier.name).empty()) best = &tier.table();
  }
  return *best;
}

std::atomic<const Kernels*> chosen{nullptr};
}  // namespace

std::vector<std::string> runnable_tiers() {
  std::vector<std::string> names;
  for (const Tier& tier : kCompiled) {
    if (missing_features(tier.name).empty()) names.push_back(tier.name);
  }
  return names;
}

const Kernels& tier_kernels(const std::string& name) {
  std::string compiled;
  for (const Tier& tier : kCompiled) {
    compiled += std::string(compiled.empty() ? "" : ", ") + tier.name;
    if (name != tier.name) continue;
    const std::string missing = missing_features(name);
    if (!missing.empty()) throw std::runtime_error("SPARSEPRUNE_CPU=" + name + ": this CPU lacks " + missing);
    return tier.table();
  }
  throw std::runtime_error("SPARSEPRUNE_CPU=" + name + ": expected one of " + compiled);
}

const Kernels& kernels() {
  const Kernels* table = chosen.load(std::memory_order_acquire);
  if (table == nullptr) chosen.store(table = &pick(), std::memory_order_release);
  return *table;
}

void use_tier(const std::string& name) { chosen.store(&tier_kernels(name), std::memory_order_release); }
}  // namespace sparseprune
