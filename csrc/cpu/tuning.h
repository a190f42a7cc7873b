// What a tuning file says: which implementation runs a convolution, instead of the first of its list that accepts. And
// the record of the convolutions that a thread runs, from which such a file is made.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "core/problem.h"
#include "cpu/conv2d.h"

namespace fastconv::cpu {

struct TunedProblem {
  Conv2dProblem problem;
  Direction direction;
  std::string implementation;
};

// Takes the place of what was set before, in the whole process. `source` names the file, "" sets nothing. The choices
// hold while `isa` is in use, for exactly these problems. Throws where there is no such implementation.
void set_tuning(const std::string& source, const std::string& isa, const std::vector<TunedProblem>& problems);
std::string tuning_source();

// Both are "" where the file says nothing. They stay valid for ever.
struct TunedChoice {
  std::string_view name, source;
};
TunedChoice tuned_implementation(const Conv2dProblem&, Direction);

struct Recorded {
  Conv2dProblem problem;
  Direction direction;
};
void record(const Conv2dProblem&, Direction);  // where this thread records
void start_recording();
std::vector<Recorded> stop_recording();  // in the order of the calls, each as often as it ran

}  // namespace fastconv::cpu
