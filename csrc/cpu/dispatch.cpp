#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace dfs {
namespace {

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define DFS_CPU_HAS(feature) (__builtin_cpu_supports(feature) != 0)
#else
#define DFS_CPU_HAS(feature) false
#endif

// Of the DFS_HAVE_ISA_* macros, which say what is linked, that of the scalar kernels is always set.
// __builtin_cpu_supports also asks whether the operating system saves the wider registers.
[[maybe_unused]] bool cpu_has_avx2() { return DFS_CPU_HAS("avx2") && DFS_CPU_HAS("fma"); }

[[maybe_unused]] bool cpu_has_avx512_vnni() {
  return cpu_has_avx2() && DFS_CPU_HAS("avx512f") && DFS_CPU_HAS("avx512bw") &&
         DFS_CPU_HAS("avx512dq") && DFS_CPU_HAS("avx512vl") && DFS_CPU_HAS("avx512vnni");
}

[[maybe_unused]] bool cpu_has_avx512_vbmi() {
  return cpu_has_avx512_vnni() && DFS_CPU_HAS("avx512vbmi") && DFS_CPU_HAS("avx512vbmi2");
}

// Slowest first.
std::vector<const KernelTable*> usable_tables() {
  std::vector<const KernelTable*> tables = {&kScalarKernels};
#ifdef DFS_HAVE_ISA_AVX2
  if (cpu_has_avx2()) tables.push_back(&kAvx2Kernels);
#endif
#ifdef DFS_HAVE_ISA_AVX512_VNNI
  if (cpu_has_avx512_vnni()) tables.push_back(&kAvx512VnniKernels);
#endif
#ifdef DFS_HAVE_ISA_AVX512_VBMI
  if (cpu_has_avx512_vbmi()) tables.push_back(&kAvx512VbmiKernels);
#endif
  return tables;
}

std::atomic<const KernelTable*> active{nullptr};

const KernelTable& find_table(const std::string& name, const char* source) {
  const std::vector<const KernelTable*> tables = usable_tables();
  std::string allowed;
  for (const KernelTable* table : tables) {
    if (name == table->name) return *table;
    allowed += (allowed.empty() ? "" : ", ") + std::string(table->name);
  }
  throw std::invalid_argument(std::string(source) + " is '" + name +
                              "', but this build on this machine has only: " + allowed);
}

const KernelTable& choose_table() {
  const char* forced = std::getenv("DFS_CPU_ISA");
  if (forced != nullptr && *forced != '\0') return find_table(forced, "DFS_CPU_ISA");
  return *usable_tables().back();
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : usable_tables()) names.emplace_back(table->name);
  return names;
}

const KernelTable& kernels() {
  const KernelTable* table = active.load(std::memory_order_acquire);
  if (table == nullptr) {
    table = &choose_table();
    active.store(table, std::memory_order_release);
  }
  return *table;
}

void set_isa(const std::string& name) {
  const KernelTable& table =
      name.empty() ? choose_table() : find_table(name, "set_isa (DFS_CPU_ISA)");
  active.store(&table, std::memory_order_release);
}

}  // namespace dfs
