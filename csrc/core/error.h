// Errors that a caller can cause. FC_CHECK becomes Python's ValueError, FC_CHECK_TYPE a TypeError; both print the
// values that offend. Kernels never check: everything is checked once, where the problem is made.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace fastconv {

struct TypeError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

template <class... Parts> std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace fastconv

#define FC_CHECK(condition, ...) \
  do { \
    if (!(condition)) throw std::invalid_argument(::fastconv::concat(__VA_ARGS__)); \
  } while (0)

#define FC_CHECK_TYPE(condition, ...) \
  do { \
    if (!(condition)) throw ::fastconv::TypeError(::fastconv::concat(__VA_ARGS__)); \
  } while (0)
