// Optimiser steps: one launch for up to kGroup parameters, a piece of one of them a block. Bound: memory.
#include "device/optimizer.h"

#include <algorithm>
#include <cmath>

#include "core/allocator.h"
#include "cuda/launch.h"
#include "cuda/step_numbers.h"
#include "cuda/training.h"

namespace fastconv::cuda {
namespace {

constexpr int kGroup = 40;  // parameters of a launch: their table travels with the kernel's arguments, at most 4 KiB
constexpr int64_t kPieceElements = 16 * kBlockThreads;

struct Entry {
  void* value;
  const void* gradient;
  void* state[2];
  int64_t n;
  double weight_decay;
  int64_t first_block;
};

struct Group {
  int count = 0;
  int64_t blocks = 0;
  Entry entries[kGroup];

  // Which entry a block works on.
  FC_HOST_DEVICE int find(int64_t block) const {
    int i = count - 1;
    while (entries[i].first_block > block) --i;
    return i;
  }
};

// The factor of all gradients. One that an earlier kernel has computed may be NaN: then nothing is changed.
struct Factor {
  double value;
  const double* place;
  FC_INLINE bool fetch() {
    if (!place) return true;
    value = *place;
    return value == value;
  }
};

template <class T> struct Sgd {
  Numbers<1> lr;
  Factor scale;
  double momentum, dampening;
  bool nesterov, first;
  FC_INLINE bool fetch() {
    lr.fetch();
    return scale.fetch();
  }
  // d = scale g + weight_decay p; m = momentum m + (1 - dampening) d (d itself at first); p -= lr (nesterov ? d +
  // momentum m : m)
  FC_HOST_DEVICE void operator()(const Entry& e, int64_t i) const {
    using A = Acc<T>;
    T &p = static_cast<T*>(e.value)[i], *momenta = static_cast<T*>(e.state[0]);
    const A value = p;
    A d = static_cast<A>(scale.value) * static_cast<A>(static_cast<const T*>(e.gradient)[i]) +
          static_cast<A>(e.weight_decay) * value;
    if (momenta) {
      const A m = first ? d : static_cast<A>(momentum) * static_cast<A>(momenta[i]) + static_cast<A>(1 - dampening) * d;
      momenta[i] = T(m);
      d = nesterov ? d + static_cast<A>(momentum) * m : m;
    }
    p = T(value - static_cast<A>(lr.value[0]) * d);
  }
};

template <class T> struct AdamW {
  Numbers<3> numbers;  // lr; 1 - beta1^step; 1 / sqrt(1 - beta2^step)
  Factor scale;
  double beta1, beta2, eps;
  FC_INLINE bool fetch() {
    numbers.fetch();
    return scale.fetch();
  }
  // g *= scale; p *= 1 - lr weight_decay; m += (1 - beta1) (g - m); v = beta2 v + (1 - beta2) g^2;
  // p -= lr / bias1 m / (sqrt(v) root_scale + eps)
  FC_HOST_DEVICE void operator()(const Entry& e, int64_t i) const {
    using A = Acc<T>;
    T &p = static_cast<T*>(e.value)[i], &mean = static_cast<T*>(e.state[0])[i],
      &square = static_cast<T*>(e.state[1])[i];
    const double lr = numbers.value[0], bias1 = numbers.value[1], root_scale = numbers.value[2];
    const A g = static_cast<A>(scale.value) * static_cast<A>(static_cast<const T*>(e.gradient)[i]);
    const A m = static_cast<A>(mean) + static_cast<A>(1 - beta1) * (g - static_cast<A>(mean));
    const A v = static_cast<A>(beta2) * static_cast<A>(square) + static_cast<A>(1 - beta2) * g * g;
    mean = T(m);
    square = T(v);
    const A kept = static_cast<A>(p) * static_cast<A>(1 - lr * e.weight_decay);
    p = T(kept - static_cast<A>(lr / bias1) * m / (sqrt(v) * static_cast<A>(root_scale) + static_cast<A>(eps)));
  }
};

template <class T> struct MoveTowards {
  Numbers<1> share;
  FC_INLINE bool fetch() {
    share.fetch();
    return true;
  }
  FC_HOST_DEVICE void operator()(const Entry& e, int64_t i) const {
    T& average = static_cast<T*>(e.value)[i];
    const Acc<T> from = average, to = static_cast<const T*>(e.gradient)[i];
    average = T(from + static_cast<Acc<T>>(share.value[0]) * (to - from));
  }
};

template <class Update> struct UpdatePieces {
  static constexpr int kThreads = kBlockThreads, kPhases = 1;
  using Shared = Nothing;
  using Local = Nothing;
  Group group;
  Update update;
  template <int PHASE> FC_HOST_DEVICE void run(int64_t block, int thread, Shared&, Local&) const {
    Update now = update;
    if (!now.fetch()) return;
    const Entry& e = group.entries[group.find(block)];
    const int64_t begin = (block - e.first_block) * kPieceElements;
    const int64_t end = begin + kPieceElements < e.n ? begin + kPieceElements : e.n;
    for (int64_t i = begin + thread; i < end; i += kThreads) now(e, i);
  }
};

// In double, so that no float overflows and rounding does not grow with n.
template <class T> struct SquarePieces {
  static constexpr int kThreads = kBlockThreads, kPhases = 2;
  struct Shared {
    double sums[kThreads];
  };
  using Local = Nothing;
  Group group;
  double* sums;  // one a block
  template <int PHASE> FC_HOST_DEVICE void run(int64_t block, int thread, Shared& shared, Local&) const {
    if constexpr (PHASE == 0) {
      const Entry& e = group.entries[group.find(block)];
      const int64_t begin = (block - e.first_block) * kPieceElements;
      const int64_t end = begin + kPieceElements < e.n ? begin + kPieceElements : e.n;
      double sum = 0;
      for (int64_t i = begin + thread; i < end; i += kThreads) {
        const double g = static_cast<Acc<T>>(static_cast<const T*>(e.gradient)[i]);
        sum += g * g;
      }
      shared.sums[thread] = sum;
    } else if (thread == 0) {
      double sum = 0;
      for (double part : shared.sums) sum += part;
      sums[block] = sum;
    }
  }
};

// The root of the sum, by one block.
struct RootOfSum {
  static constexpr int kThreads = kBlockThreads, kPhases = 2;
  struct Shared {
    double sums[kThreads];
  };
  using Local = Nothing;
  const double* parts;
  int64_t count;
  double* root;
  template <int PHASE> FC_HOST_DEVICE void run(int64_t, int thread, Shared& shared, Local&) const {
    if constexpr (PHASE == 0) {
      double sum = 0;
      for (int64_t i = thread; i < count; i += kThreads) sum += parts[i];
      shared.sums[thread] = sum;
    } else if (thread == 0) {
      double sum = 0;
      for (double part : shared.sums) sum += part;
      *root = sqrt(sum);
    }
  }
};

static_assert(sizeof(UpdatePieces<AdamW<float>>) <= 4096, "arguments of a kernel");

// run(T{}, group) for the parameters of each type in groups of at most kGroup.
template <class Run> void for_groups(const std::vector<Parameter>& parameters, Run&& run) {
  for (DType type : {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16}) {
    Group group;
    const auto flush = [&] {
      if (group.count > 0) dispatch_real(type, [&](auto t) { run(t, group); });
      group = Group{};
    };
    for (const Parameter& p : parameters) {
      if (p.dtype != type || p.n == 0) continue;
      group.entries[group.count++] = {p.value, p.gradient, {p.state[0], p.state[1]}, p.n, p.weight_decay, group.blocks};
      group.blocks += ceil_divide(p.n, kPieceElements);
      if (group.count == kGroup) flush();
    }
    flush();
  }
}

}  // namespace

void sgd_step(const std::vector<Parameter>& parameters, const SgdOptions& o) {
  const auto lr = step_numbers({o.lr});
  for_groups(parameters, [&](auto t, const Group& group) {
    using Update = Sgd<decltype(t)>;
    const Factor scale{o.gradient_scale, o.scale_place};
    launch(UpdatePieces<Update>{group, {lr, scale, o.momentum, o.dampening, o.nesterov, o.first}}, group.blocks);
  });
}

void adamw_step(const std::vector<Parameter>& parameters, const AdamWOptions& o) {
  const double step = static_cast<double>(o.step);
  const double bias1 = 1 - std::pow(o.beta1, step), bias2 = 1 - std::pow(o.beta2, step);
  const auto numbers = step_numbers({o.lr, bias1, 1 / std::sqrt(bias2)});
  for_groups(parameters, [&](auto t, const Group& group) {
    using Update = AdamW<decltype(t)>;
    const Factor scale{o.gradient_scale, o.scale_place};
    launch(UpdatePieces<Update>{group, {numbers, scale, o.beta1, o.beta2, o.eps}}, group.blocks);
  });
}

void store_gradient_norm(const std::vector<Parameter>& parameters, double* norm) {
  int64_t count = 0;
  for (const Parameter& p : parameters) count += ceil_divide(p.n, kPieceElements);
  const Buffer sums(count * sizeof(double));
  int64_t first = 0;
  for_groups(parameters, [&](auto t, const Group& group) {
    launch(SquarePieces<decltype(t)>{group, sums.as<double>() + first}, group.blocks);
    first += group.blocks;
  });
  launch(RootOfSum{sums.as<double>(), count, norm}, 1);
}

double gradient_norm(const std::vector<Parameter>& parameters) {
  const Buffer norm(sizeof(double));
  store_gradient_norm(parameters, norm.as<double>());
  double result = 0;
  copy_bytes(&result, norm.as<double>(), sizeof(result), Copy::kToHost);
  return result;
}

void move_towards(const std::vector<Parameter>& parameters, double share) {
  const auto numbers = step_numbers({share});
  for_groups(parameters, [&](auto t, const Group& group) {
    using Update = MoveTowards<decltype(t)>;
    launch(UpdatePieces<Update>{group, {numbers}}, group.blocks);
  });
}

}  // namespace fastconv::cuda
