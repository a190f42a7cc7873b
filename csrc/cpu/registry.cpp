#include "cpu/registry.h"

#include <atomic>
#include <cstdlib>

#include "core/error.h"

namespace fastconv::cpu {

// Each isa_<name>.cpp exports exactly one symbol: its table.
extern const KernelTable table_portable;
#if defined(__x86_64__)
extern const KernelTable table_avx2;
extern const KernelTable table_avx512;
#endif

namespace {

// __builtin_cpu_supports asks CPUID and, for AVX and AVX-512, XGETBV whether the operating system saves the registers.
std::vector<const KernelTable*> supported() {
  std::vector<const KernelTable*> tables;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  if (avx2 && avx512) tables.push_back(&table_avx512);
  if (avx2) tables.push_back(&table_avx2);
#endif
  tables.push_back(&table_portable);
  return tables;
}

const KernelTable* find(const std::string& name) {
  std::string names;
  for (const KernelTable* table : supported()) {
    if (name == table->isa) return table;
    names += (names.empty() ? "" : ", ") + std::string(table->isa);
  }
  throw std::invalid_argument("ISA '" + name + "' is not available here; available: " + names);
}

std::atomic<const KernelTable*> chosen{nullptr};

}  // namespace

const KernelTable& kernels() {
  const KernelTable* table = chosen.load(std::memory_order_acquire);
  if (!table) {
    const char* wanted = std::getenv("FASTCONV_ISA");
    table = wanted && *wanted ? find(wanted) : supported().front();
    chosen.store(table, std::memory_order_release);
  }
  return *table;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : supported()) names.emplace_back(table->isa);
  return names;
}

bool full_width() {
#if defined(__x86_64__)
  static const bool in_halves = __builtin_cpu_is("amdfam19h");
  return &kernels() == &table_avx512 && !in_halves;
#else
  return false;
#endif
}

void set_isa(const std::string& name) { chosen.store(find(name), std::memory_order_release); }

}  // namespace fastconv::cpu
