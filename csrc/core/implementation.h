// Several implementations of one operation, tried in order. Each declines a problem with a reason or accepts it; the
// last of a list never declines. explain() shows the same walk to the user.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "core/error.h"

namespace fastconv {

template <class Problem, class Arguments> struct Implementation {
  const char* name;
  const char* (*supports)(const Problem&);  // nullptr: accepts; otherwise why it declines
  void (*run)(const Problem&, const Arguments&);
};

// The first that accepts; a forced name must exist and accept.
template <class List, class Problem>
const auto& select(const List& list, const Problem& problem, const std::string& forced) {
  for (const auto& implementation : list) {
    if (!forced.empty() && forced != implementation.name) continue;
    const char* reason = implementation.supports(problem);
    if (reason == nullptr) return implementation;
    FC_CHECK(forced.empty(), "algorithm '", forced, "' declines: ", reason);
  }
  throw std::invalid_argument("no algorithm named '" + forced + "' for this direction");
}

using Explanation = std::vector<std::pair<std::string, std::string>>;  // name, reason ("" for the one that runs)

template <class List, class Problem> Explanation explain(const List& list, const Problem& problem) {
  Explanation rows;
  for (const auto& implementation : list) {
    const char* reason = implementation.supports(problem);
    rows.emplace_back(implementation.name, reason ? reason : "");
    if (reason == nullptr) break;
  }
  return rows;
}

}  // namespace fastconv
