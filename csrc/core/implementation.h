// Several implementations of one operation, tried in order. Each declines a problem with a reason or accepts it; the
// last of a list never declines. explain() shows the same walk to the user.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/error.h"

namespace fastconv {

template <class Problem, class Arguments> struct Implementation {
  const char* name;
  const char* (*supports)(const Problem&);  // nullptr: accepts; otherwise why it declines
  void (*run)(const Problem&, const Arguments&);
};

// The first that accepts. A forced name must exist and accept; a preferred one goes first where it accepts.
template <class List, class Problem>
const auto& select(const List& list, const Problem& problem, const std::string& forced,
                   std::string_view preferred = {}) {
  if (forced.empty() && !preferred.empty())
    for (const auto& implementation : list)
      if (preferred == implementation.name && implementation.supports(problem) == nullptr) return implementation;
  for (const auto& implementation : list) {
    if (!forced.empty() && forced != implementation.name) continue;
    const char* reason = implementation.supports(problem);
    if (reason == nullptr) return implementation;
    FC_CHECK(forced.empty(), "algorithm '", forced, "' declines: ", reason);
  }
  throw std::invalid_argument("no algorithm named '" + forced + "' for this direction");
}

// Every one that accepts, in the order of the list.
template <class List, class Problem> std::vector<std::string> candidates(const List& list, const Problem& problem) {
  std::vector<std::string> names;
  for (const auto& implementation : list)
    if (implementation.supports(problem) == nullptr) names.emplace_back(implementation.name);
  return names;
}

using Explanation = std::vector<std::pair<std::string, std::string>>;  // name, reason ("" for the one that runs)

// Where `chooser` prefers one that accepts, it comes last, behind all that it was preferred to.
template <class List, class Problem>
Explanation explain(const List& list, const Problem& problem, std::string_view preferred = {},
                    const std::string& chooser = {}) {
  Explanation rows;
  const auto accepted = candidates(list, problem);
  if (std::find(accepted.begin(), accepted.end(), preferred) != accepted.end()) {
    for (const auto& implementation : list) {
      if (preferred == implementation.name) continue;
      const char* reason = implementation.supports(problem);
      rows.emplace_back(implementation.name, reason ? reason : concat(preferred, " was chosen by ", chooser));
    }
    rows.emplace_back(preferred, "");
    return rows;
  }
  for (const auto& implementation : list) {
    const char* reason = implementation.supports(problem);
    const bool refuses = reason && preferred == implementation.name;
    rows.emplace_back(implementation.name,
                      (refuses ? concat("chosen by ", chooser, ", but ") : "") + (reason ? reason : ""));
    if (!reason) break;
  }
  return rows;
}

}  // namespace fastconv
