// Picks a tier: what the CPU and the operating system can run, or what SPARSEPRUNE_CPU asks for.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace sparseprune {
// Names of the tiers that were compiled and that this CPU can run, slowest first.
std::vector<std::string> runnable_tiers();
// The table of one tier; std::runtime_error with the reason where it was not compiled or the CPU lacks something.
const Kernels& tier_kernels(const std::string& name);
// From here on every call runs this tier (tests compare tiers within one process).
void use_tier(const std::string& name);
}  // namespace sparseprune
