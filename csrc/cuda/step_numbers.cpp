#include "cuda/step_numbers.h"

#include "core/error.h"
#include "cuda/device.h"

namespace fastconv::cuda {
namespace {

constexpr size_t kMost = 1024, kRandom = 2;  // places; those of seed and offset come first
thread_local StepNumbers* current = nullptr;

}  // namespace

StepNumbers* current_step_numbers() { return current; }

StepNumbers::StepNumbers() : place_(kMost * sizeof(uint64_t)), bits_(kRandom) {}

StepNumbers::~StepNumbers() {
  if (current == this) current = nullptr;
}

void StepNumbers::record() {
  bits_.resize(kRandom);
  current = this;
}

void StepNumbers::collect() {
  taken_ = kRandom;
  collecting_ = true;
  current = this;
}

void StepNumbers::done() {
  const bool complete = !collecting_ || taken_ == bits_.size();
  current = nullptr;
  collecting_ = false;
  FC_CHECK(complete, "this step has ", taken_ - kRandom, " changing numbers, the one that was recorded has ",
           bits_.size() - kRandom);
}

const double* StepNumbers::take(const double* values, size_t count) {
  size_t& at = taken_;
  if (!collecting_) {
    at = bits_.size();
    FC_CHECK(at + count <= kMost, "a step may have at most ", kMost - kRandom, " changing numbers");
    bits_.resize(at + count);
  }
  if (at + count <= bits_.size()) std::memcpy(&bits_[at], values, count * sizeof(double));
  const double* place = place_.as<double>() + at;
  if (collecting_) at += count;
  return place;
}

void StepNumbers::upload(uint64_t seed, uint64_t offset) {
  bits_[0] = seed;
  bits_[1] = offset;
  copy_bytes(place_.as<void>(), bits_.data(), bits_.size() * sizeof(uint64_t), Copy::kToDevice);
}

}  // namespace fastconv::cuda
