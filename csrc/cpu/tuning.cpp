#include "cpu/tuning.h"

#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <optional>

#include "cpu/registry.h"

namespace fastconv::cpu {
namespace {

using Key = std::array<int64_t, 18>;

Key key_of(const Conv2dProblem& a, Direction direction) {
  return {static_cast<int64_t>(direction),
          static_cast<int64_t>(a.dtype),
          a.n,
          a.c,
          a.h,
          a.w,
          a.k,
          a.r,
          a.s,
          a.stride_h,
          a.stride_w,
          a.pad_top,
          a.pad_bottom,
          a.pad_left,
          a.pad_right,
          a.dilation_h,
          a.dilation_w,
          a.groups};
}

struct Tuning {
  std::string source, isa;
  std::map<Key, std::string> choices;
};

// A call in another thread may be reading the table that a new one replaces, so none is freed: they are small and few.
std::mutex writing;
std::vector<std::unique_ptr<const Tuning>> tables;
std::atomic<const Tuning*> current{nullptr};

thread_local std::optional<std::vector<Recorded>> recording;

}  // namespace

void set_tuning(const std::string& source, const std::string& isa, const std::vector<TunedProblem>& problems) {
  auto table = std::make_unique<Tuning>();
  table->source = source;
  table->isa = isa;
  for (const TunedProblem& one : problems) {
    check_implementation(one.implementation, one.direction);
    table->choices[key_of(one.problem, one.direction)] = one.implementation;
  }
  std::lock_guard<std::mutex> lock(writing);
  current.store(source.empty() ? nullptr : table.get(), std::memory_order_release);
  tables.push_back(std::move(table));
}

std::string tuning_source() {
  const Tuning* tuning = current.load(std::memory_order_acquire);
  return tuning ? tuning->source : "";
}

TunedChoice tuned_implementation(const Conv2dProblem& problem, Direction direction) {
  const Tuning* tuning = current.load(std::memory_order_acquire);
  if (!tuning || tuning->isa != kernels().isa) return {};
  const auto found = tuning->choices.find(key_of(problem, direction));
  if (found == tuning->choices.end()) return {};
  return {found->second, tuning->source};
}

void record(const Conv2dProblem& problem, Direction direction) {
  if (recording) recording->push_back({problem, direction});
}

void start_recording() { recording.emplace(); }

std::vector<Recorded> stop_recording() {
  std::vector<Recorded> problems = recording.value_or(std::vector<Recorded>());
  recording.reset();
  return problems;
}

}  // namespace fastconv::cpu
