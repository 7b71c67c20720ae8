// What tests of kernels share: memory of the device that is looked at for writes beside it, lengths of sequences, and runs in many
// orders of threads.
#pragma once
#include "cuda_host.h"

#include <gtest/gtest.h>

#include <initializer_list>
#include <random>
#include <string>
#include <vector>

// Puts settings back.
struct keep_settings {
  cuda_host::settings_type before;
  keep_settings() : before(cuda_host::settings) {}  // its own, for members that are const
  ~keep_settings() { cuda_host::settings = before; }
  keep_settings(const keep_settings &) = delete;
  keep_settings &operator=(const keep_settings &) = delete;
};

inline void expect_no_fault(cudaError_t e) { EXPECT_EQ(e, cudaSuccess) << cudaGetErrorString(e); }
// A fault whose text has all of these parts.
inline void expect_fault(cudaError_t e, std::initializer_list<const char *> parts) {
  ASSERT_EQ(e, cudaErrorLaunchFailure) << cudaGetErrorString(e);
  const std::string text = cuda_host::last_fault();
  for (const char *part : parts) EXPECT_TRUE(text.find(part) != std::string::npos) << text << "\n  lacks: " << part;
  EXPECT_NE(std::string(cudaGetErrorString(e)).find(text), std::string::npos);
  cudaGetLastError();
}

// body() under each of `seeds` orders of threads, warps and blocks.
template <class F>
void for_seeds(int seeds, F body) {
  const keep_settings kept;
  for (int seed = 1; seed <= seeds; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    cuda_host::settings.seed = static_cast<uint64_t>(seed);
    body();
  }
}

// n elements on the device, 0xff in all bytes (NaN) if not given.  Around them is what reads as NaN, and must stay as it is:
// launches look at it, and so do check() and the end.
template <class T>
class device_buffer {
 public:
  explicit device_buffer(size_t n) : n_(n) {
    EXPECT_EQ(cudaMalloc(&p_, std::max<size_t>(n * sizeof(T), 1)), cudaSuccess) << "no memory of the device is left";
  }
  explicit device_buffer(const std::vector<T> &values) : device_buffer(values.size()) { set(values); }
  device_buffer(std::initializer_list<T> values) : device_buffer(std::vector<T>(values)) {}
  device_buffer(const device_buffer &) = delete;
  device_buffer &operator=(const device_buffer &) = delete;
  ~device_buffer() { expect_no_fault(cudaFree(p_)); }

  T *data() { return p_; }
  const T *data() const { return p_; }
  size_t size() const { return n_; }
  T &operator[](size_t i) { return p_[i]; }
  const T &operator[](size_t i) const { return p_[i]; }
  T *begin() { return p_; }
  T *end() { return p_ + n_; }
  const T *begin() const { return p_; }
  const T *end() const { return p_ + n_; }

  void set(const std::vector<T> &values) {
    ASSERT_EQ(values.size(), n_);
    std::copy(values.begin(), values.end(), p_);
  }
  void poison() { std::memset(static_cast<void *>(p_), 0xff, n_ * sizeof(T)); }
  std::vector<T> values() const { return std::vector<T>(begin(), end()); }
  void check() const {
    const std::lock_guard<std::mutex> guard(cuda_host::memory.lock);
    EXPECT_EQ(cuda_host::look_around(cuda_host::memory.all.at(reinterpret_cast<uintptr_t>(p_))), "");
  }

 private:
  size_t n_;
  T *p_ = nullptr;
};

// A number on the device: rows or sequences of a run, tiles.
class device_count {
 public:
  explicit device_count(int32_t n) : memory_{n} {}
  void set(int32_t n) { memory_[0] = n; }
  int32_t *data() { return memory_.data(); }
  int32_t value() const { return memory_[0]; }

 private:
  device_buffer<int32_t> memory_;
};

// Where sequences of these lengths begin, and the end.
inline std::vector<int32_t> cu_seqlens(const std::vector<int32_t> &lengths) {
  std::vector<int32_t> cu = {0};
  for (const int32_t n : lengths) cu.push_back(cu.back() + n);
  return cu;
}

// Values in tests, from a seed.
inline std::vector<float> normal_values(size_t n, unsigned seed, float sigma = 1) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> d(0, sigma);
  std::vector<float> v(n);
  for (float &x : v) x = d(rng);
  return v;
}
