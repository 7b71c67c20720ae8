// How tensors are stored: every type and layout there and back, sizes, and what the quantizers promise.
#include "../rs.h"
#include "test_util.h"

#include <cmath>
#include <random>

namespace {

std::vector<float> normal(size_t n, unsigned seed, float sigma = 1) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> d(0, sigma);
  std::vector<float> v(n);
  for (float &x : v) x = d(rng);
  return v;
}

struct coded {
  rs_type type;
  rs_layout layout;
  double relative_rms;  // of the error, for normal weights: what the number of steps gives, and a little room
};
const coded all[] = {
    {RS_F32, RS_ROWS, 0},   {RS_F32, RS_PANELS, 0},     {RS_F16, RS_ROWS, 3e-4}, {RS_F16, RS_PANELS, 3e-4},
    {RS_W8, RS_ROWS, 0.01}, {RS_W8, RS_PANELS, 0.0125}, {RS_W4, RS_ROWS, 0.11},  {RS_W4, RS_PANELS, 0.11},
};

std::vector<float> there_and_back(const coded &c, const std::vector<float> &x, int64_t n, int64_t k,
                                  std::vector<char> *stored = nullptr) {
  const int64_t shape[] = {n, k};
  size_t bytes = 0;
  EXPECT_EQ(rs_tensor_bytes(c.type, c.layout, 2, shape, &bytes), RS_OK) << rs_last_error();
  // A sentinel behind: neither the encoder nor the decoder may touch it.
  std::vector<char> memory(bytes + 64, 0x5a);
  EXPECT_EQ(rs_tensor_encode(c.type, c.layout, 2, shape, x.data(), memory.data(), bytes), RS_OK) << rs_last_error();
  for (size_t i = bytes; i < memory.size(); i++) EXPECT_EQ(memory[i], 0x5a) << "written behind the end";
  std::vector<float> y(x.size() + 16, 7.5f);
  EXPECT_EQ(rs_tensor_decode(c.type, c.layout, 2, shape, memory.data(), y.data(), x.size()), RS_OK) << rs_last_error();
  for (size_t i = x.size(); i < y.size(); i++) EXPECT_EQ(y[i], 7.5f) << "written behind the end";
  y.resize(x.size());
  memory.resize(bytes);
  if (stored) *stored = memory;
  return y;
}

double relative_rms(const std::vector<float> &x, const std::vector<float> &y) {
  double error = 0, sum = 0;
  for (size_t i = 0; i < x.size(); i++) error += (double(x[i]) - y[i]) * (double(x[i]) - y[i]), sum += double(x[i]) * x[i];
  return std::sqrt(error / sum);
}

TEST(types, there_and_back_at_every_shape) {
  const int64_t shapes[][2] = {{1, 1}, {1, 7}, {3, 5}, {16, 32}, {17, 33}, {31, 64}, {384, 100}, {5, 1536}};
  for (const coded &c : all)
    for (const auto &s : shapes) {
      SCOPED_TRACE(std::string(rs_type_name(c.type)) + (c.layout == RS_PANELS ? " panels " : " rows ") + std::to_string(s[0]) +
                   "x" + std::to_string(s[1]));
      const std::vector<float> x = normal(static_cast<size_t>(s[0] * s[1]), 1, 0.05f), y = there_and_back(c, x, s[0], s[1]);
      const double error = relative_rms(x, y);
      if (c.relative_rms == 0) EXPECT_EQ(error, 0);
      else EXPECT_TRUE(error <= c.relative_rms) << error;
    }
}

TEST(types, zeros_stay_zeros) {
  for (const coded &c : all) {
    const std::vector<float> x(19 * 40, 0.0f);
    EXPECT_EQ(there_and_back(c, x, 19, 40), x) << rs_type_name(c.type);
  }
}

// Scales that are denormal numbers are refused when a file is loaded, so none may be written.
TEST(types, what_is_almost_nothing_becomes_zero) {
  for (const float tiny : {1e-44f, 8e-44f, 1e-38f, 1e-37f})
    for (const coded &c : all) {
      if (c.type != RS_W8 && c.type != RS_W4) continue;
      const std::vector<float> y = there_and_back(c, {tiny, 0, -tiny, 0}, 2, 2);
      EXPECT_EQ(y, (std::vector<float>{0, 0, 0, 0})) << tiny;
    }
}

TEST(types, f16_is_exact_for_every_half) {
  // The 63,488 finite halves, as floats, survive encoding bit for bit.
  const int64_t shape[] = {1, 65536};
  std::vector<uint16_t> halves;
  for (uint32_t h = 0; h < 65536; h++)
    if ((h & 0x7c00) != 0x7c00) halves.push_back(static_cast<uint16_t>(h));
  const int64_t n[] = {static_cast<int64_t>(halves.size())};
  std::vector<float> wide(halves.size());
  ASSERT_EQ(rs_tensor_decode(RS_F16, RS_ROWS, 1, n, halves.data(), wide.data(), wide.size()), RS_OK);
  std::vector<uint16_t> again(halves.size());
  ASSERT_EQ(rs_tensor_encode(RS_F16, RS_ROWS, 1, n, wide.data(), again.data(), again.size() * 2), RS_OK) << rs_last_error();
  EXPECT_EQ(again, halves);
  EXPECT_EQ(wide[1], std::ldexp(1.0f, -24));
  EXPECT_EQ(shape[1], 65536);
  // Ties go to even.
  const std::vector<float> ties = {1 + 1.0f / 2048, 1 + 3.0f / 2048, 65519.9f};
  const int64_t three = 3;
  uint16_t out[3];
  ASSERT_EQ(rs_tensor_encode(RS_F16, RS_ROWS, 1, &three, ties.data(), out, sizeof out), RS_OK);
  EXPECT_EQ(out[0], 0x3c00);
  EXPECT_EQ(out[1], 0x3c02);
  EXPECT_EQ(out[2], 0x7bff);
}

// What makes the AVX2 product exact: 255 (w0 + w1) fits 16 bits for every pair of neighbours.
TEST(types, w8_pairs_never_overflow_16_bits) {
  const int64_t n = 33, k = 320;
  std::vector<float> x = normal(n * k, 3);
  for (int i = 0; i < 40; i++) x[static_cast<size_t>(i * 97)] = (i % 2 ? 1.0f : -1.0f) * 6;  // heavy tails
  for (int i = 0; i < 64; i++) x[static_cast<size_t>(k + i)] = 1;                            // all pairs at the limit
  std::vector<char> stored;
  const std::vector<float> y = there_and_back({RS_W8, RS_PANELS, 0}, x, n, k, &stored);
  EXPECT_TRUE(relative_rms(x, y) < 0.02);
  for (int64_t panel = 0; panel < 3; panel++)
    for (int64_t i = 0; i < 16 * k; i += 2) {
      const int a = static_cast<signed char>(stored[static_cast<size_t>(panel * 16 * k + i)]),
                b = static_cast<signed char>(stored[static_cast<size_t>(panel * 16 * k + i + 1)]);
      EXPECT_TRUE(255 * (a + b) <= 32767 && 255 * (a + b) >= -32768) << a << " " << b;
    }
}

// Plain 7 bits, |w| <= 63, are the simple way to an exact product.  Limiting pairs must do better.
TEST(types, w8_beats_seven_bits) {
  const int64_t n = 64, k = 384;
  const std::vector<float> x = normal(n * k, 6);
  std::vector<float> seven(x.size());
  for (size_t row = 0; row < x.size(); row += k) {
    float top = 0;
    for (size_t i = row; i < row + k; i++) top = std::max(top, std::fabs(x[i]));
    for (size_t i = row; i < row + k; i++) seven[i] = std::nearbyint(x[i] * 63 / top) * top / 63;
  }
  EXPECT_TRUE(relative_rms(x, there_and_back({RS_W8, RS_PANELS, 0}, x, n, k)) < 0.85 * relative_rms(x, seven));
}

TEST(types, w4_beats_the_naive_scale) {
  // max / 7 for each group of 32, what the reference measurements call 4 bits.
  const int64_t n = 64, k = 384;
  const std::vector<float> x = normal(n * k, 5);
  std::vector<float> naive(x.size());
  for (size_t g = 0; g < x.size(); g += 32) {
    float top = 0;
    for (size_t i = g; i < g + 32; i++) top = std::max(top, std::fabs(x[i]));
    for (size_t i = g; i < g + 32; i++) naive[i] = std::nearbyint(x[i] * 7 / top) * top / 7;
  }
  EXPECT_TRUE(relative_rms(x, there_and_back({RS_W4, RS_PANELS, 0}, x, n, k)) < 0.95 * relative_rms(x, naive));
}

TEST(types, what_cannot_be_stored_is_an_error) {
  const int64_t shape[] = {2, 4}, huge[] = {1 << 20, 65537}, negative[] = {-1, 4}, deep[] = {1 << 30, 1 << 30, 1 << 30, 1 << 30};
  size_t bytes;
  char memory[4096];
  std::vector<float> x(8, 1.0f);
  EXPECT_EQ(rs_tensor_bytes(RS_W8, RS_PANELS, 2, huge, &bytes), RS_ERR_ARGUMENT);
  EXPECT_EQ(rs_tensor_bytes(RS_W8, RS_PANELS, 1, shape, &bytes), RS_ERR_ARGUMENT);
  EXPECT_EQ(rs_tensor_bytes(RS_F32, RS_ROWS, 2, negative, &bytes), RS_ERR_ARGUMENT);
  EXPECT_EQ(rs_tensor_bytes(RS_F32, RS_ROWS, 4, deep, &bytes), RS_ERR_ARGUMENT);
  const int64_t wraps[] = {1722007169, 2142470067, 5, 1};  // 2^64 - 1 rows, which rounding up would make 0
  EXPECT_EQ(rs_tensor_bytes(RS_F32, RS_ROWS, 4, wraps, &bytes), RS_ERR_ARGUMENT);
  EXPECT_EQ(rs_tensor_bytes(RS_F32, RS_ROWS, 5, deep, &bytes), RS_ERR_ARGUMENT);
  EXPECT_EQ(rs_tensor_bytes(RS_F32, RS_ROWS, 0, deep, &bytes), RS_ERR_ARGUMENT);
  EXPECT_EQ(rs_tensor_bytes(RS_I32, RS_PANELS, 2, shape, &bytes), RS_ERR_ARGUMENT);
  EXPECT_EQ(rs_tensor_bytes(static_cast<rs_type>(99), RS_ROWS, 2, shape, &bytes), RS_ERR_ARGUMENT);
  EXPECT_EQ(rs_tensor_encode(RS_F32, RS_ROWS, 2, shape, x.data(), memory, 31), RS_ERR_LIMIT);
  EXPECT_EQ(rs_tensor_decode(RS_F32, RS_ROWS, 2, shape, memory, x.data(), 7), RS_ERR_LIMIT);
  for (const coded &c : all) {
    x[5] = NAN;
    EXPECT_EQ(rs_tensor_encode(c.type, c.layout, 2, shape, x.data(), memory, sizeof memory), RS_ERR_NUMERIC);
    x[5] = INFINITY;
    EXPECT_EQ(rs_tensor_encode(c.type, c.layout, 2, shape, x.data(), memory, sizeof memory), RS_ERR_NUMERIC);
  }
  x[5] = 70000;
  EXPECT_EQ(rs_tensor_encode(RS_F16, RS_ROWS, 2, shape, x.data(), memory, sizeof memory), RS_ERR_NUMERIC);
}

}  // namespace
