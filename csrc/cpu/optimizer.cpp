#include "device/optimizer.h"

#include <cmath>
#include <numeric>

#include "cpu/parallel.h"
#include "cpu/registry.h"

namespace fastconv::cpu {
namespace {

constexpr int64_t kPieceElements = 16 * 1024;

struct Piece {
  const Parameter* parameter;
  int64_t begin, count;
};

std::vector<Piece> pieces_of(const std::vector<Parameter>& parameters) {
  std::vector<Piece> pieces;
  for (const Parameter& p : parameters)
    for (int64_t i = 0; i < p.n; i += kPieceElements) pieces.push_back({&p, i, std::min(kPieceElements, p.n - i)});
  return pieces;
}

// body(number of the piece) in parallel. Many small parameters make one chunk.
template <class Body> void parallel_pieces(const std::vector<Piece>& pieces, Body&& body) {
  parallel_ranges(static_cast<int64_t>(pieces.size()), 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

// body(parameter, begin, count) in parallel over all elements of all parameters.
template <class Body> void parallel_parts(const std::vector<Parameter>& parameters, Body&& body) {
  const std::vector<Piece> pieces = pieces_of(parameters);
  parallel_pieces(pieces, [&](int64_t i) { body(*pieces[i].parameter, pieces[i].begin, pieces[i].count); });
}

template <class T> T* at(void* base, int64_t offset) { return base ? static_cast<T*>(base) + offset : nullptr; }
template <class T> const T* at(const void* base, int64_t offset) { return static_cast<const T*>(base) + offset; }

}  // namespace

void sgd_step(const std::vector<Parameter>& parameters, const SgdOptions& o) {
  parallel_parts(parameters, [&](const Parameter& p, int64_t begin, int64_t count) {
    dispatch_float(p.dtype, [&](auto t) {
      using T = decltype(t);
      const SgdSettings<T> s{static_cast<T>(o.lr),
                             static_cast<T>(o.momentum),
                             static_cast<T>(1 - o.dampening),
                             static_cast<T>(p.weight_decay),
                             static_cast<T>(o.gradient_scale),
                             o.nesterov,
                             o.first};
      kernels().optimizer.of<T>().sgd(at<T>(p.value, begin), at<T>(p.gradient, begin), at<T>(p.state[0], begin), count,
                                      s);
    });
  });
}

void adamw_step(const std::vector<Parameter>& parameters, const AdamWOptions& o) {
  const double step = static_cast<double>(o.step);
  const double bias1 = 1 - std::pow(o.beta1, step), bias2 = 1 - std::pow(o.beta2, step);
  parallel_parts(parameters, [&](const Parameter& p, int64_t begin, int64_t count) {
    dispatch_float(p.dtype, [&](auto t) {
      using T = decltype(t);
      const AdamWSettings<T> s{static_cast<T>(1 - o.beta1),  static_cast<T>(o.beta2),
                               static_cast<T>(1 - o.beta2),  static_cast<T>(1 - o.lr * p.weight_decay),
                               static_cast<T>(o.lr / bias1), static_cast<T>(1 / std::sqrt(bias2)),
                               static_cast<T>(o.eps),        static_cast<T>(o.gradient_scale)};
      kernels().optimizer.of<T>().adamw(at<T>(p.value, begin), at<T>(p.gradient, begin), at<T>(p.state[0], begin),
                                        at<T>(p.state[1], begin), count, s);
    });
  });
}

double gradient_norm(const std::vector<Parameter>& parameters) {
  const std::vector<Piece> pieces = pieces_of(parameters);
  std::vector<double> sums(pieces.size());
  parallel_pieces(pieces, [&](int64_t i) {
    const Piece& piece = pieces[i];
    dispatch_float(piece.parameter->dtype, [&](auto t) {
      using T = decltype(t);
      sums[i] = kernels().optimizer.of<T>().sum_of_squares(at<T>(piece.parameter->gradient, piece.begin), piece.count);
    });
  });
  return std::sqrt(std::accumulate(sums.begin(), sums.end(), 0.0));
}

void move_towards(const std::vector<Parameter>& parameters, double share) {
  parallel_parts(parameters, [&](const Parameter& p, int64_t begin, int64_t count) {
    dispatch_float(p.dtype, [&](auto t) {
      using T = decltype(t);
      kernels().optimizer.of<T>().move_towards(at<T>(p.value, begin), at<T>(p.gradient, begin), count,
                                               static_cast<T>(share));
    });
  });
}

}  // namespace fastconv::cpu
