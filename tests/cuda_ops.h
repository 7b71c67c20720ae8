// What the tests of the operators of rs-cuda.cu share.  To be included behind it, which RS_CUDA_HOST makes C++.
#pragma once

#include "cuda_harness.h"

#include <cmath>
#include <cstring>

namespace {

// Memory of the device, which on the CPU can be written through what is const.
template <class T>
class on_device : public device_buffer<T> {
 public:
  explicit on_device(size_t n, T value = {}) : device_buffer<T>(n) { std::fill(this->begin(), this->end(), value); }
  T *data() const { return const_cast<T *>(device_buffer<T>::data()); }
  T &operator[](size_t i) const { return data()[i]; }
};

template <class T>
uint32_t bits_of(T v) {
  static_assert(sizeof v == 4, "an element of 4 bytes");
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline bool same_bits(float a, float b) { return bits_of(a) == bits_of(b); }
inline bool same_bits(const float *a, const float *b, int64_t n) {
  return std::equal(a, a + n, b, [](float x, float y) { return bits_of(x) == bits_of(y); });
}

inline constexpr uint32_t sentinel = 0x7fb0dead;  // as a float NaN

// Where the columns of a tensor are in memory: it begins `first` elements into rows that are `stride` apart.
struct layout_case {
  int64_t cols, stride, first;
};
inline std::vector<layout_case> layout_cases() {
  return {{1, 1, 0},     {1, 5, 2},       {7, 7, 0},       {7, 12, 4},      {33, 40, 4},    {36, 45, 0},
          {128, 128, 0}, {256, 260, 4},   {384, 384, 0},   {384, 392, 8},   {384, 392, 3},  {500, 500, 0},
          {640, 640, 0}, {1000, 1000, 0}, {1000, 1001, 1}, {1536, 1536, 0}, {1030, 1030, 0}};
}

// A tensor of 4-byte elements with more memory than it needs: that of rows that a run does not have, and beside its columns.
template <class T>
struct test_tensor {
  int64_t capacity;
  layout_case at;
  const int32_t *rows;
  on_device<T> memory;

  test_tensor(int64_t capacity, layout_case at, const int32_t *rows)
      : capacity(capacity), at(at), rows(rows), memory(static_cast<size_t>(capacity * at.stride)) {
    for (size_t i = 0; i < memory.size(); i++) std::memcpy(&memory[i], &sentinel, 4);
  }
  test_tensor(int64_t capacity, int64_t cols, const int32_t *rows) : test_tensor(capacity, {cols, cols, 0}, rows) {}

  T *row(int64_t i) const { return memory.data() + i * at.stride + at.first; }
  T &operator()(int64_t i, int64_t j = 0) const { return row(i)[j]; }
  device_value value() const { return {memory.data() + at.first, rows, capacity, at.cols, at.stride, false}; }

  // Normal numbers, in the rows that a run has.
  void fill(uint32_t seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < *rows; i++)
      for (int64_t j = 0; j < at.cols; j++) (*this)(i, j) = static_cast<T>(normal(random));
  }
  void expect_untouched() const {
    int64_t wrong = 0;
    for (int64_t i = 0; i < capacity; i++)
      for (int64_t j = 0; j < at.stride; j++) {
        if (i < *rows && j >= at.first && j < at.first + at.cols) continue;
        wrong += bits_of(memory[static_cast<size_t>(i * at.stride + j)]) != sentinel;
      }
    EXPECT_EQ(wrong, 0) << "elements beside the result";
  }
};
using floats = test_tensor<float>;
using ints = test_tensor<int32_t>;

// Sequences of a level, and how many there may be.
struct test_level {
  std::vector<int> lengths;
  int64_t sequence_capacity, capacity;
  on_device<int32_t> cu, tokens, sequences;

  explicit test_level(std::vector<int> n, int64_t more_sequences = 2, int64_t more_tokens = 37)
      : lengths(std::move(n)),
        sequence_capacity(static_cast<int64_t>(lengths.size()) + more_sequences),
        capacity(more_tokens),
        cu(static_cast<size_t>(sequence_capacity) + 1, -12345),
        tokens(1),
        sequences(1) {
    cu[0] = 0;
    for (size_t b = 0; b < lengths.size(); b++) cu[b + 1] = cu[b] + lengths[b];
    tokens[0] = cu[lengths.size()];
    sequences[0] = static_cast<int32_t>(lengths.size());
    capacity += tokens[0];
  }
  int count() const { return static_cast<int>(lengths.size()); }
  device_value value() const { return {cu.data(), sequences.data(), sequence_capacity + 1, 1, 1, false}; }
};
inline std::vector<int> ragged_lengths() { return {1, 600, 0, 33, 64, 2, 31, 257, 0, 0, 128, 32, 5}; }

// An operator of a run, as the backend would call it.
struct test_call {
  backend_op op = {};
  op_call call = {};
  on_device<run_fault> fault{1};
  on_device<int32_t> no_sequences{1};

  test_call() {
    call.op = &op;
    call.index = 7;
    call.fault = fault.data();
    call.sequences = no_sequences.data();
  }
  test_call &in(int i, const device_value &v) {
    call.in[i] = v;
    op.in[i].rows = v.capacity, op.in[i].cols = v.cols, op.in[i].stride = v.stride;
    op.in[i].place = v.data ? backend_place::result : backend_place::absent;
    return *this;
  }
  test_call &out(const device_value &v) {
    call.out = v;
    op.out.rows = v.capacity, op.out.cols = v.cols, op.out.stride = v.stride;
    return *this;
  }
  test_call &of(const test_level &level) {
    call.sequences = level.sequences.data();
    call.sequence_capacity = level.sequence_capacity;
    return *this;
  }
  void run(cudaError_t (*f)(const op_call &), size_t (*work)(const backend_op &)) {
    on_device<unsigned char> scratch(work(op), 0xee);
    call.scratch = scratch.data();
    ::expect_no_fault(f(call));
  }
  void expect_no_fault() const { EXPECT_EQ(fault[0].status, 0); }
};
#define RUN(call, name) (call).run(name##_cuda, name##_work)

inline device_value absent() { return {}; }

// Every test runs in several orders of threads and blocks.
class Cuda : public ::testing::TestWithParam<int> {
 protected:
  keep_settings kept;
  void SetUp() override { cuda_host::settings.seed = static_cast<uint64_t>(GetParam()); }
};

}  // namespace
