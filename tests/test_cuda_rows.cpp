// The operators on rows of rs-cuda.cu, on the CPU, against plain C++: floats against f64, integers and what is said to have the
// bits of rs.cpp exactly.
#define RS_CUDA_HOST
#include "../rs-cuda.cu"

#include "cuda_ops.h"

namespace {

// ---- references

// As quantize_scalar of rs.cpp.
row_quant quantize_reference(const float *inputs, const float *factors, size_t k, size_t kp, uint8_t *q) {
  std::vector<float> x(inputs, inputs + k);
  for (size_t i = 0; factors && i < k; i++) x[i] *= factors[i];
  float low = 0, high = 0;
  bool nan = false;
  for (size_t i = 0; i < k; i++) low = std::min(low, x[i]), high = std::max(high, x[i]), nan |= std::isnan(x[i]);
  float scale = (high - low) / 255;
  int32_t zero = 0;
  if (nan || !std::isfinite(scale)) {
    std::memset(q, 0, kp);
    return {NAN, 0};
  }
  if (scale < FLT_MIN) scale = FLT_MIN;
  else zero = static_cast<int32_t>(std::lrint(-low / scale));
  const float inverse = 1 / scale;
  for (size_t i = 0; i < k; i++) {
    const float v = std::min(std::max(std::nearbyint(x[i] * inverse), -256.0f), 256.0f);
    q[i] = static_cast<uint8_t>(std::min(std::max(static_cast<int32_t>(v) + zero, 0), 255));
  }
  std::memset(q + k, zero, kp - k);
  return {scale, zero};
}

// What a quantized layer behind an operator needs: rows of q, with sentinels behind those that a run has.
struct quantized {
  int64_t capacity, kp;
  on_device<uint8_t> q;
  on_device<row_quant> rq;
  quantized(int64_t capacity, int64_t cols)
      : capacity(capacity),
        kp(quantized_kp(cols)),
        q(static_cast<size_t>(quantized_bytes(capacity, cols)), 0xcd),
        rq(static_cast<size_t>(capacity), {-3, -77}) {}
  std::vector<uint8_t> row(int64_t i) const {
    std::vector<uint8_t> v;
    for (int64_t j = 0; j < kp; j++) {
      const int64_t tile = i / 128 * (kp / 64) + j / 64, chunk = j / 16 % 4 ^ i / 2 % 4;
      v.push_back(q[static_cast<size_t>(tile * 128 * 64 + i % 128 * 64 + chunk * 16 + j % 16)]);
    }
    return v;
  }
  void expect_of(const floats &x, const float *scale = nullptr) const {
    std::vector<uint8_t> expected(static_cast<size_t>(kp));
    for (int64_t i = 0; i < capacity; i++) {
      row_quant r = {-3, -77};
      std::fill(expected.begin(), expected.end(), uint8_t{0xcd});
      if (i < *x.rows)
        r = quantize_reference(x.row(i), scale, static_cast<size_t>(x.at.cols), static_cast<size_t>(kp), expected.data());
      const row_quant got = rq[static_cast<size_t>(i)];
      ASSERT_TRUE(std::isnan(r.scale) ? std::isnan(got.scale) : same_bits(got.scale, r.scale)) << "row " << i;
      ASSERT_EQ(got.zero, r.zero) << "row " << i;
      ASSERT_EQ(row(i), expected) << "row " << i;
    }
  }
};

// What inputs of a quantized layer may be multiplied by: another factor each.
struct factors_of : on_device<float> {
  explicit factors_of(int64_t cols) : on_device<float>(static_cast<size_t>(cols)) {
    for (size_t j = 0; j < static_cast<size_t>(cols); j++) (*this)[j] = static_cast<float>(j % 29 + 1) * (j % 3 ? 0.125f : 1.75f);
  }
};

double activation_reference(rs_activation act, double x) {
  switch (act) {
    case RS_ACT_NONE:
      return x;
    case RS_ACT_GELU:
      return x / 2 * std::erfc(-x / std::sqrt(2.0));
    case RS_ACT_GELU_TANH:
      return x / 2 * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
    case RS_ACT_RELU:
      return std::max(x, 0.0);
    case RS_ACT_SILU:
      return x / (1 + std::exp(-x));
    case RS_ACT_TANH:
      return std::tanh(x);
    case RS_ACT_QUICK_GELU:
      return x / (1 + std::exp(-1.702 * x));
  }
  return NAN;
}

double distance_reference(const float *to, const float *from, int64_t n, rs_distance distance) {
  double ab = 0, aa = 0, bb = 0, l1 = 0, l2 = 0;
  for (int64_t i = 0; i < n; i++) {
    const double a = to[i], b = from ? from[i] : 0;
    ab += a * b, aa += a * a, bb += b * b, l1 += std::fabs(a - b), l2 += (a - b) * (a - b);
  }
  if (distance == RS_DISTANCE_L1) return l1;
  if (distance == RS_DISTANCE_L2) return std::sqrt(l2);
  return aa == 0 || bb == 0 ? 1 : 1 - ab / std::sqrt(aa) / std::sqrt(bb);
}

struct Rows : Cuda {
  on_device<int32_t> rows{1, 29};
  static constexpr int64_t capacity = 37;
};
INSTANTIATE_TEST_SUITE_P(Orders, Rows, ::testing::Values(0, 1, 2));

// ---- embed

int64_t reference_stride(rs_type type, int64_t k) {
  const int64_t kp = (k + 31) / 32 * 32;
  return type == RS_F32 ? 4 * k : type == RS_F16 ? 2 * k : type == RS_W8 ? 4 + k : 4 + kp / 32 + kp / 2;
}
float reference_column(rs_type type, const uint8_t *row, int64_t k, int64_t j) {
  float scale;
  std::memcpy(&scale, row, 4);
  switch (type) {
    case RS_F32:
      std::memcpy(&scale, row + 4 * j, 4);
      return scale;
    case RS_F16: {
      uint16_t h;
      std::memcpy(&h, row + 2 * j, 2);
      const int exponent = h >> 10 & 31, mantissa = h & 1023;
      const float v = std::ldexp(static_cast<float>(exponent ? mantissa + 1024 : mantissa), std::max(exponent, 1) - 25);
      return h & 0x8000 ? -v : v;
    }
    case RS_W8:
      return scale * static_cast<float>(static_cast<int8_t>(row[4 + j]));
    default: {
      const int64_t groups = (k + 31) / 32;
      const int nibble = row[4 + groups + j / 2] >> (j % 2 * 4) & 15;
      return scale * static_cast<float>(row[4 + j / 32]) * static_cast<float>(nibble - 8);
    }
  }
}

TEST_P(Rows, EmbedTakesRowsOfTables) {
  for (const rs_type type : {RS_F32, RS_F16, RS_W8, RS_W4})
    for (const layout_case at : layout_cases()) {
      if (at.cols > 1000) continue;
      SCOPED_TRACE(std::string("type ") + std::to_string(type) + ", columns " + std::to_string(at.cols));
      const int64_t stride = reference_stride(type, at.cols);
      constexpr int64_t ids = 50;
      std::mt19937 random(3);
      on_device<uint8_t> table(static_cast<size_t>(stride * ids));
      for (size_t i = 0; i < table.size(); i++) table[i] = static_cast<uint8_t>(random());
      for (int64_t i = 0; i < ids; i++) {
        uint8_t *row = table.data() + i * stride;
        const float scale = 0.01f + static_cast<float>(i) / 7;
        if (type == RS_F32)
          for (int64_t j = 0; j < at.cols; j++) row[4 * j + 3] &= 0xbf;  // finite
        if (type == RS_F16)
          for (int64_t j = 0; j < at.cols; j++) row[2 * j + 1] &= 0xbf;
        if (type == RS_W8 || type == RS_W4) std::memcpy(row, &scale, 4);
      }
      ints tokens(capacity, 1, rows.data());
      for (int i = 0; i < rows[0]; i++) tokens(i) = static_cast<int32_t>(random() % ids);
      tokens(1) = 0, tokens(2) = ids - 1;
      const floats y(capacity, at, rows.data());
      test_call c;
      c.in(0, tokens.value()).in(1, {table.data(), nullptr, ids, at.cols, at.cols, false}).out(y.value());
      c.op.in[1].type = type;
      RUN(c, embed);
      c.expect_no_fault();
      y.expect_untouched();
      for (int64_t i = 0; i < rows[0]; i++)
        for (int64_t j = 0; j < at.cols; j++)
          ASSERT_TRUE(same_bits(y(i, j), reference_column(type, table.data() + tokens(i) * stride, at.cols, j))) << i << " " << j;
    }
}

TEST_P(Rows, EmbedReportsAnIdOutside) {
  for (const int32_t id : {-1, 10, INT32_MAX, INT32_MIN}) {
    on_device<float> table(10 * 8, 1.5f);
    ints tokens(capacity, 1, rows.data());
    for (int i = 0; i < rows[0]; i++) tokens(i) = 3;
    tokens(17) = id;
    const floats y(capacity, 8, rows.data());
    test_call c;
    c.in(0, tokens.value()).in(1, {table.data(), nullptr, 10, 8, 8, false}).out(y.value());
    c.op.in[1].type = RS_F32;
    RUN(c, embed);
    EXPECT_EQ(c.fault[0].status, RS_ERR_ARGUMENT);
    EXPECT_EQ(c.fault[0].op, 7);
    EXPECT_EQ(c.fault[0].at, 17);
    EXPECT_EQ(c.fault[0].what, id);
    for (int64_t i = 0; i < rows[0]; i++)
      for (int64_t j = 0; j < 8; j++) ASSERT_EQ(y(i, j), i == 17 ? 0 : 1.5f);
    y.expect_untouched();
  }
}

// ---- add, gate

TEST_P(Rows, Add) {
  for (const layout_case at : layout_cases()) {
    SCOPED_TRACE(at.cols);
    floats a(capacity, at, rows.data()), b(capacity, {at.cols, at.cols + 3, 1}, rows.data());
    floats aligned(capacity, at.cols, rows.data());
    a.fill(1), b.fill(2), aligned.fill(3);
    for (const floats *other : {&b, &aligned}) {
      const floats y(capacity, at, rows.data());
      test_call c;
      c.in(0, a.value()).in(1, other->value()).out(y.value());
      RUN(c, add);
      y.expect_untouched();
      for (int64_t i = 0; i < rows[0]; i++)
        for (int64_t j = 0; j < at.cols; j++) ASSERT_TRUE(same_bits(y(i, j), a(i, j) + (*other)(i, j)));
    }
  }
}

TEST_P(Rows, Gate) {
  for (const rs_activation act :
       {RS_ACT_NONE, RS_ACT_GELU, RS_ACT_GELU_TANH, RS_ACT_RELU, RS_ACT_SILU, RS_ACT_TANH, RS_ACT_QUICK_GELU})
    for (const layout_case at : {layout_case{1, 1, 0}, {7, 8, 1}, {33, 33, 0}, {384, 384, 0}, {1000, 1004, 4}}) {
      SCOPED_TRACE(std::string("activation ") + std::to_string(act) + ", columns " + std::to_string(at.cols));
      floats x(capacity, {2 * at.cols, 2 * at.stride, at.first}, rows.data());
      x.fill(4);
      x(0, 0) = 30, x(1, 0) = -30, x(2, 0) = 0, x(3, 0) = NAN, x(4, 0) = 4;
      const floats y(capacity, at, rows.data());
      test_call c;
      c.op.params.act = act;
      c.in(0, x.value()).out(y.value());
      RUN(c, gate);
      y.expect_untouched();
      for (int64_t i = 0; i < rows[0]; i++)
        for (int64_t j = 0; j < at.cols; j++) {
          const double expected = activation_reference(act, x(i, j)) * x(i, at.cols + j);
          if (i == 3 && j == 0) ASSERT_TRUE(std::isnan(y(i, j)));
          else ASSERT_NEAR(y(i, j), expected, 1e-6 * (1 + std::fabs(expected)) * (1 + std::fabs(x(i, at.cols + j))));
        }
    }
}

// ---- rope_table, rope

// What is rounded to f32 is exact in all but a few cases, where the nearest f32 is next to it.
TEST_P(Rows, RopeTable) {
  for (const int64_t half : {1, 7, 32, 40}) {
    SCOPED_TRACE(half);
    ints positions(capacity, 1, rows.data());
    on_device<float> frequencies(static_cast<size_t>(half));
    for (int64_t j = 0; j < half; j++)
      frequencies[static_cast<size_t>(j)] = 1 / std::pow(10000.0f, static_cast<float>(j) / static_cast<float>(half));
    for (int32_t i = 0; i < rows[0]; i++) positions(i, 0) = i < 20 ? i : i < 28 ? 997 * i : -i;
    const floats y(capacity, {2 * half, 2 * half + 3, 1}, rows.data());
    test_call c;
    c.in(0, positions.value()).in(1, {frequencies.data(), nullptr, half, 1, 1, false}).out(y.value());
    RUN(c, rope_table);
    y.expect_untouched();
    for (int64_t i = 0; i < rows[0]; i++)
      for (int64_t j = 0; j < half; j++) {
        const double angle = static_cast<float>(positions(i, 0)) * frequencies[static_cast<size_t>(j)];
        ASSERT_NEAR(y(i, j), std::cos(angle), 6e-8 * std::fabs(std::cos(angle)) + 1e-11) << i;
        ASSERT_NEAR(y(i, half + j), std::sin(angle), 6e-8 * std::fabs(std::sin(angle)) + 1e-11) << i;
      }
  }
}

TEST_P(Rows, RopeHasTheBitsOfTheCpu) {
  struct shape {
    int heads;
    int64_t d, half, stride, first;
  };
  for (const shape &s : {shape{1, 2, 1, 2, 0},
                         {3, 64, 32, 192, 0},
                         {2, 64, 32, 132, 4},
                         {2, 64, 32, 131, 3},
                         {4, 30, 15, 120, 0},
                         {3, 80, 12, 240, 0},
                         {5, 9, 3, 48, 0}}) {
    SCOPED_TRACE(std::to_string(s.heads) + " heads of " + std::to_string(s.d));
    const int64_t cols = s.heads * s.d;
    floats x(capacity, {cols, s.stride, s.first}, rows.data()), table(capacity, 2 * s.half, rows.data());
    x.fill(5), table.fill(6);
    const floats y(capacity, {cols, s.stride, s.first}, rows.data());
    test_call c;
    c.op.params.heads = s.heads;
    c.in(0, x.value()).in(1, table.value()).out(y.value());
    RUN(c, rope);
    y.expect_untouched();
    for (int64_t i = 0; i < rows[0]; i++)
      for (int64_t head = 0; head < s.heads; head++)
        for (int64_t j = 0; j < s.d; j++) {
          const auto at = [&](int64_t column) { return x(i, head * s.d + column); };
          float expected = at(j);
          if (j < s.half) expected = at(j) * table(i, j) - at(j + s.half) * table(i, s.half + j);
          else if (j < 2 * s.half) expected = at(j) * table(i, j - s.half) + at(j - s.half) * table(i, j);
          ASSERT_TRUE(same_bits(y(i, head * s.d + j), expected)) << i << " " << j;
        }
    // The same as f16, as attention reads it; what is beyond becomes the largest that there is.
    x(1, 0) = 1e6f, table(1, 0) = 1, x(1, s.half) = 0;
    const on_device<uint16_t> halves(static_cast<size_t>(capacity * s.stride), 0xdead);
    RUN(c, rope);
    c.out({halves.data() + s.first, rows.data(), capacity, cols, s.stride, true});
    RUN(c, rope);
    for (int64_t i = 0; i < capacity; i++)
      for (int64_t j = 0; j < s.stride; j++) {
        const uint16_t got = halves[static_cast<size_t>(i * s.stride + j)];
        if (i >= rows[0] || j < s.first || j >= s.first + cols) ASSERT_EQ(got, 0xdead) << i << " " << j;
        else
          ASSERT_EQ(got, static_cast<uint16_t>(pack_f16(std::clamp(y(i, j - s.first), -65504.0f, 65504.0f), 0))) << i << " " << j;
      }
  }
}

// ---- layer_norm, quantize

void expect_norm(const floats &y, const floats &x, const floats *residual, const float *gamma, const float *beta, float eps) {
  for (int64_t i = 0; i < *x.rows; i++) {
    double mean = 0, squares = 0;
    const auto v = [&](int64_t j) { return residual ? static_cast<double>(x(i, j) + (*residual)(i, j)) : x(i, j); };
    for (int64_t j = 0; j < x.at.cols; j++) mean += v(j);
    mean /= static_cast<double>(x.at.cols);
    for (int64_t j = 0; j < x.at.cols; j++) squares += (v(j) - mean) * (v(j) - mean);
    const double factor = 1 / std::sqrt(squares / static_cast<double>(x.at.cols) + eps);
    for (int64_t j = 0; j < x.at.cols; j++) {
      const double expected = (v(j) - mean) * factor * gamma[j] + beta[j];
      if (std::isnan(expected)) ASSERT_TRUE(std::isnan(y(i, j)));
      else ASSERT_NEAR(y(i, j), expected, 3e-6 * (1 + std::fabs(expected)) + 1e-6 * std::fabs(mean) * factor) << i << " " << j;
    }
  }
}

TEST_P(Rows, LayerNorm) {
  std::vector<layout_case> cases = layout_cases();
  cases.push_back({3072, 3072, 0});
  for (const layout_case at : cases)
    for (int kind = 0; kind < 8; kind++) {
      const bool with_residual = kind & 1, with_q = kind & 2, with_shift = kind & 4;
      if (GetParam() && kind != 0 && kind != 7) continue;
      SCOPED_TRACE(std::to_string(at.cols) + " columns, stride " + std::to_string(at.stride) + ", kind " + std::to_string(kind));
      floats x(capacity, at, rows.data()), residual(capacity, at, rows.data()), weights(2, at.cols, rows.data());
      x.fill(1), residual.fill(2);
      on_device<int32_t> two(1, 2);
      weights.rows = two.data();
      weights.fill(3);
      for (int64_t j = 0; j < at.cols; j++) x(1, j) = 0, residual(1, j) = 0, x(2, j) += 50;
      x(5, at.cols - 1) = NAN;
      const floats y(capacity, at, rows.data()), shift(capacity, {1, 3, 1}, rows.data());
      const quantized q(capacity, at.cols);
      test_call c;
      c.op.params.eps = 1e-5f;
      c.in(0, x.value()).in(1, with_residual ? residual.value() : absent()).out(y.value());
      on_device<float> gamma(static_cast<size_t>(at.cols)), beta(static_cast<size_t>(at.cols));
      for (int64_t j = 0; j < at.cols; j++)
        gamma[static_cast<size_t>(j)] = weights(0, j), beta[static_cast<size_t>(j)] = weights(1, j);
      c.in(2, {gamma.data(), nullptr, at.cols, 1, 1, false}).in(3, {beta.data(), nullptr, at.cols, 1, 1, false});
      const factors_of factors(at.cols);
      const float *scale = with_q && !with_shift ? factors.data() : nullptr;
      if (with_q) c.call.q = q.q.data(), c.call.rq = q.rq.data(), c.call.kp = q.kp, c.call.scale = scale;
      if (with_shift) c.call.shift = shift.row(0), c.call.shift_stride = shift.at.stride;
      RUN(c, layer_norm);
      y.expect_untouched(), shift.expect_untouched();
      expect_norm(y, x, with_residual ? &residual : nullptr, gamma.data(), beta.data(), 1e-5f);
      if (with_q) q.expect_of(y, scale);
      for (int64_t i = 0; with_shift && i < rows[0]; i++) {
        const double expected = distance_reference(x.row(i), nullptr, at.cols, RS_DISTANCE_L2);
        if (std::isnan(expected)) ASSERT_TRUE(std::isnan(shift(i)));
        else ASSERT_NEAR(shift(i), expected, 1e-6 * expected);
      }
      if (HasFatalFailure()) return;
      if (!with_q || at.cols > 3072) continue;

      // Nobody reads the floats.
      const quantized alone(capacity, at.cols);
      c.call.out.data = nullptr;
      c.call.q = alone.q.data(), c.call.rq = alone.rq.data();
      RUN(c, layer_norm);
      ASSERT_EQ(alone.q.values(), q.q.values());
    }
}

TEST_P(Rows, RowsThatNoMemoryHolds) {
  if (GetParam()) GTEST_SKIP() << "once is enough";
  for (const int64_t cols : {12300, 24580, 24581, 65536}) {
    SCOPED_TRACE(cols);
    const on_device<int32_t> three(1, 3);
    floats x(4, cols, three.data());
    x.fill(9);
    const floats y(4, cols, three.data());
    const on_device<float> gamma(static_cast<size_t>(cols), 1.25f), beta(static_cast<size_t>(cols), 0.5f);
    const quantized q(4, cols), of_x(4, cols);
    test_call c;
    c.op.params.eps = 1e-5f;
    c.in(0, x.value()).out(y.value());
    c.in(2, {gamma.data(), nullptr, cols, 1, 1, false}).in(3, {beta.data(), nullptr, cols, 1, 1, false});
    c.call.q = q.q.data(), c.call.rq = q.rq.data(), c.call.kp = q.kp;
    RUN(c, layer_norm);
    y.expect_untouched();
    expect_norm(y, x, nullptr, gamma.data(), beta.data(), 1e-5f);
    q.expect_of(y);
    const factors_of factors(cols);
    for (const float *scale : {static_cast<const float *>(nullptr), static_cast<const float *>(factors.data())}) {
      c.call.scale = scale;
      expect_no_fault(quantize_rows(c.call, x.value(), of_x.q.data(), of_x.rq.data(), of_x.kp));
      of_x.expect_of(x, scale);
    }
  }
}

// What a kernel may take of shared memory is one number for all threads: another one, whose rows are shorter, may set it between
// what this one sets and its launch.
TEST_P(Rows, ShorterRowsOfOtherThreadsTakeNoSharedMemory) {
  if (GetParam()) GTEST_SKIP() << "once is enough";
  const on_device<int32_t> three(1, 3);
  const auto run = [&](int64_t cols, bool quantize) {
    floats x(4, cols, three.data());
    x.fill(9);
    const floats y(4, cols, three.data());
    const on_device<float> ones(static_cast<size_t>(cols), 1.0f);
    const quantized q(4, cols);
    test_call c;
    c.in(0, x.value()).out(y.value());
    for (const int i : {2, 3}) c.in(i, {ones.data(), nullptr, cols, 1, 1, false});
    return quantize ? quantize_rows(c.call, x.value(), q.q.data(), q.rq.data(), q.kp) : layer_norm_cuda(c.call);
  };
  for (const bool quantize : {false, true})
    for (const int64_t columns : {24572, 24571}) {  // by fours, and one by one
      int others = 0;
      cuda_host::interfere = [&](const std::string &call) {
        const bool first = call == "cudaLaunchKernelEx" && others++ == 0;
        return first ? run(columns / 24 * 12 + 16 + columns % 4, quantize) : cudaSuccess;
      };
      EXPECT_EQ(run(columns, quantize), cudaSuccess) << quantize << " " << columns;
      cuda_host::interfere = nullptr;
      EXPECT_EQ(others, 2);
    }
}

TEST_P(Rows, QuantizeHasTheBitsOfTheReference) {
  std::vector<layout_case> cases = layout_cases();
  cases.push_back({3072, 3072, 0});
  cases.push_back({4096, 4100, 4});
  for (const layout_case at : cases) {
    SCOPED_TRACE(std::to_string(at.cols) + " columns, stride " + std::to_string(at.stride));
    floats x(capacity, at, rows.data());
    x.fill(5);
    const int64_t last = at.cols - 1;
    for (int64_t j = 0; j < at.cols; j++) {
      x(0, j) = 0, x(1, j) = -0.0f, x(2, j) = 1e-40f, x(3, j) = std::fabs(x(3, j)), x(4, j) = -std::fabs(x(4, j));
      x(5, j) *= 1e30f, x(6, j) *= 1e-37f;
      x(7, j) = static_cast<float>(j % 256) - 128;  // halves of steps
      x(8, j) = (static_cast<float>(j % 511) / 2 - 64);
    }
    x(9, last) = NAN, x(10, 0) = INFINITY, x(11, last) = -INFINITY;
    x(12, 0) = FLT_MAX, x(12, last) = at.cols > 1 ? -FLT_MAX : FLT_MAX;
    const factors_of factors(at.cols);
    for (const float *scale : {static_cast<const float *>(nullptr), static_cast<const float *>(factors.data())}) {
      const quantized q(capacity, at.cols);
      test_call c;
      c.call.scale = scale;
      expect_no_fault(quantize_rows(c.call, x.value(), q.q.data(), q.rq.data(), q.kp));
      q.expect_of(x, scale);
      if (HasFatalFailure()) return;
    }
  }
}

// What is stored as f16 is quantized as if its values were floats.
TEST_P(Rows, QuantizeOfHalves) {
  for (const int64_t cols : {8, 40, 256, 264, 512, 768, 1000, 1024, 1536, 2048, 2056, 3072, 3080, 4096})
    for (const int64_t more : {0, 8}) {
      SCOPED_TRACE(cols);
      floats x(capacity, cols, rows.data());
      x.fill(6);
      x(1, cols - 1) = NAN, x(2, 0) = 65504, x(2, cols - 1) = -65504;
      for (int64_t j = 0; j < cols; j++) x(3, j) = 0, x(4, j) = std::fabs(x(4, j)), x(5, j) = x(5, j) * 1e-6f;
      test_tensor<uint32_t> halves(capacity, {cols / 2, (cols + more) / 2, 0}, rows.data());
      for (int64_t i = 0; i < rows[0]; i++)
        for (int64_t j = 0; j < cols; j += 2) {
          const uint32_t pair = pack_f16(x(i, j), x(i, j + 1));
          halves(i, j / 2) = pair;
          x(i, j) = half_value(static_cast<uint16_t>(pair)), x(i, j + 1) = half_value(static_cast<uint16_t>(pair >> 16));
        }
      device_value v = halves.value();
      v.half = true, v.cols = cols, v.stride = cols + more;
      const factors_of factors(cols);
      for (const float *scale : {static_cast<const float *>(nullptr), static_cast<const float *>(factors.data())}) {
        const quantized q(capacity, cols);
        test_call c;
        c.call.scale = scale;
        expect_no_fault(quantize_rows(c.call, v, q.q.data(), q.rq.data(), q.kp));
        q.expect_of(x, scale);
        if (HasFatalFailure()) return;
      }
    }
}

// ---- l2_normalize, shift

TEST_P(Rows, L2Normalize) {
  for (const layout_case at : layout_cases()) {
    SCOPED_TRACE(at.cols);
    floats x(capacity, at, rows.data());
    x.fill(6);
    for (int64_t j = 0; j < at.cols; j++) x(0, j) = 0, x(2, j) *= 1e25f, x(3, j) *= 1e-30f;
    x(1, at.cols - 1) = NAN;
    const floats y(capacity, at, rows.data());
    test_call c;
    c.in(0, x.value()).out(y.value());
    RUN(c, l2_normalize);
    y.expect_untouched();
    for (int64_t i = 0; i < rows[0]; i++) {
      const double norm = distance_reference(x.row(i), nullptr, at.cols, RS_DISTANCE_L2);
      for (int64_t j = 0; j < at.cols; j++) {
        if (i == 1) ASSERT_TRUE(std::isnan(y(i, j)));
        else ASSERT_NEAR(y(i, j), norm > 0 ? x(i, j) / norm : 0, 2e-7) << i;
      }
    }
  }
}

TEST_P(Rows, Shift) {
  for (const layout_case at : layout_cases())
    for (int kind = 0; kind < 5; kind++) {
      const auto distance = static_cast<rs_distance>(kind % 3);
      const bool with_from = kind < 3;
      SCOPED_TRACE(std::to_string(at.cols) + " columns, kind " + std::to_string(kind));
      floats to(capacity, at, rows.data()), from(capacity, at, rows.data());
      to.fill(7), from.fill(8);
      for (int64_t j = 0; j < at.cols; j++) to(0, j) = 0, from(1, j) = to(1, j), from(2, j) = 2 * to(2, j);
      to(3, 0) = NAN;
      const floats y(capacity, {1, 2, 1}, rows.data());
      test_call c;
      c.op.params.distance = distance;
      c.in(0, to.value()).in(1, with_from ? from.value() : absent()).out(y.value());
      RUN(c, shift);
      y.expect_untouched();
      for (int64_t i = 0; i < rows[0]; i++) {
        const double expected = distance_reference(to.row(i), with_from ? from.row(i) : nullptr, at.cols, distance);
        if (i == 3) ASSERT_TRUE(std::isnan(y(i)));
        else ASSERT_NEAR(y(i), expected, 1e-6 * (1 + expected)) << i;
      }
    }
}

// A row's bits are the same whichever block and place it comes into.
TEST_P(Rows, ARowDependsOnNoOther) {
  for (const int64_t cols : {7, 384, 1030, 1536}) {
    floats x(capacity, cols, rows.data());
    x.fill(11);
    const on_device<float> gamma(static_cast<size_t>(cols), 1.25f), beta(static_cast<size_t>(cols), 0.5f);
    const auto norm = [&](const floats &in, const floats &y, const quantized &q) {
      test_call c;
      c.op.params.eps = 1e-12f;
      c.in(0, in.value()).out(y.value());
      c.in(2, {gamma.data(), nullptr, cols, 1, 1, false}).in(3, {beta.data(), nullptr, cols, 1, 1, false});
      c.call.q = q.q.data(), c.call.rq = q.rq.data(), c.call.kp = q.kp;
      RUN(c, layer_norm);
    };
    const floats y(capacity, cols, rows.data());
    const quantized q(capacity, cols);
    norm(x, y, q);
    const on_device<int32_t> one(1, 1);
    for (int64_t i = 0; i < rows[0]; i += 5) {
      floats x1(3, cols, one.data());
      std::copy(x.row(i), x.row(i) + cols, x1.row(0));
      const floats y1(3, cols, one.data());
      const quantized q1(3, cols);
      norm(x1, y1, q1);
      ASSERT_TRUE(same_bits(y.row(i), y1.row(0), cols));
      ASSERT_EQ(q.row(i), q1.row(0));
    }
  }
}

// ---- pool and others of whole sequences

using Sequences = Cuda;
INSTANTIATE_TEST_SUITE_P(Orders, Sequences, ::testing::Values(0, 1, 2));

// As pool_cpu.
std::vector<float> pool_reference(const floats &x, const floats *sizes, const int32_t *cu, int b, rs_pooling pooling, int skip) {
  const int64_t cols = x.at.cols, first = static_cast<int64_t>(cu[b]) + skip, n = cu[b + 1] - first;
  std::vector<float> y(static_cast<size_t>(cols));
  for (int64_t j = 0; n > 0 && j < cols; j++) {
    float &v = y[static_cast<size_t>(j)];
    double count = 0;
    if (pooling == RS_POOL_CLS || pooling == RS_POOL_MAX) v = x(first, j);
    if (pooling == RS_POOL_LAST) v = x(first + n - 1, j);
    if (pooling == RS_POOL_CLS || pooling == RS_POOL_LAST) continue;
    for (int64_t i = 0; i < n; i++) {
      const float here = x(first + i, j);
      if (pooling == RS_POOL_MAX) {
        v = here > v || std::isnan(here) ? here : v;
        continue;
      }
      const float weight = pooling == RS_POOL_WEIGHTED_MEAN ? static_cast<float>(i + 1) : sizes ? (*sizes)(first + i) : 1;
      v += weight * here;
      count += static_cast<double>(weight);
    }
    if (pooling != RS_POOL_MAX) v *= static_cast<float>(1 / (pooling == RS_POOL_MEAN_SQRT_LEN ? std::sqrt(count) : count));
  }
  return y;
}

TEST_P(Sequences, Pool) {
  const test_level level(ragged_lengths());
  for (const rs_pooling pooling :
       {RS_POOL_MEAN, RS_POOL_CLS, RS_POOL_MAX, RS_POOL_MEAN_SQRT_LEN, RS_POOL_WEIGHTED_MEAN, RS_POOL_LAST})
    for (const layout_case at : {layout_case{1, 1, 0}, {7, 12, 4}, {33, 33, 0}, {384, 384, 0}, {1000, 1001, 1}})
      for (const int skip : {0, 1, 5, INT_MAX})
        for (const bool sized : {false, true}) {
          if (skip != 1 && (GetParam() || at.cols > 100)) continue;
          SCOPED_TRACE(std::to_string(pooling) + ", columns " + std::to_string(at.cols) + ", skip " + std::to_string(skip));
          floats x(level.capacity, at, level.tokens.data()), sizes(level.capacity, {1, 3, 2}, level.tokens.data());
          x.fill(1), sizes.fill(2);
          for (int64_t i = 0; i < level.tokens[0]; i++) sizes(i) = 1 + std::fabs(sizes(i));
          x(level.cu[3] + 2, 0) = NAN;
          const floats y(level.sequence_capacity, at, level.sequences.data());
          test_call c;
          c.op.params.pooling = pooling;
          c.op.params.skip = skip;
          c.of(level).in(0, x.value()).in(1, level.value()).in(2, sized ? sizes.value() : absent()).out(y.value());
          RUN(c, pool);
          y.expect_untouched();
          for (int b = 0; b < level.count(); b++) {
            const std::vector<float> expected = pool_reference(x, sized ? &sizes : nullptr, level.cu.data(), b, pooling, skip);
            for (int64_t j = 0; j < at.cols; j++) {
              const float e = expected[static_cast<size_t>(j)];
              ASSERT_TRUE(std::isnan(e) ? std::isnan(y(b, j)) : same_bits(e, y(b, j))) << b << " " << j;
            }
          }
        }
}

TEST_P(Sequences, CentreDistance) {
  const test_level level(ragged_lengths());
  for (const layout_case at : {layout_case{1, 1, 0}, {7, 12, 4}, {33, 33, 0}, {384, 384, 0}, {1000, 1001, 1}}) {
    SCOPED_TRACE(at.cols);
    floats x(level.capacity, at, level.tokens.data());
    x.fill(3);
    const floats y(level.capacity, {1, 2, 0}, level.tokens.data());
    test_call c;
    c.of(level).in(0, x.value()).in(1, level.value()).out(y.value());
    RUN(c, centre_distance);
    y.expect_untouched();
    for (int b = 0; b < level.count(); b++) {
      std::vector<float> mean(static_cast<size_t>(at.cols));
      for (int64_t j = 0; j < at.cols; j++) {
        for (int64_t i = level.cu[b]; i < level.cu[b + 1]; i++) mean[static_cast<size_t>(j)] += x(i, j);
        mean[static_cast<size_t>(j)] *= 1 / static_cast<float>(level.lengths[static_cast<size_t>(b)]);
      }
      for (int64_t i = level.cu[b]; i < level.cu[b + 1]; i++) {
        const double expected = distance_reference(x.row(i), mean.data(), at.cols, RS_DISTANCE_L2);
        ASSERT_NEAR(y(i), expected, 1e-6 * (1 + expected));
      }
    }
  }
}

uint64_t splitmix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

TEST_P(Sequences, PositionScore) {
  const test_level level(ragged_lengths());
  for (const bool random : {false, true}) {
    const floats y(level.capacity, {1, 2, 1}, level.tokens.data());
    test_call c;
    c.op.params.random = random;
    c.op.params.seed = 0x123456789abcdefu;
    c.of(level).in(0, level.value()).out(y.value());
    RUN(c, position_score);
    y.expect_untouched();
    for (int b = 0; b < level.count(); b++) {
      const auto n = static_cast<uint64_t>(level.lengths[static_cast<size_t>(b)]);
      for (uint64_t i = 0; i < n; i++) {
        const uint64_t bits = splitmix(splitmix(splitmix(c.op.params.seed) + n) + i) >> 40;
        ASSERT_EQ(y(level.cu[b] + static_cast<int64_t>(i)), random ? static_cast<float>(bits) * 0x1p-24f : -static_cast<float>(i));
      }
    }
  }
}

TEST_P(Sequences, Standardize) {
  const test_level level(ragged_lengths());
  floats x(level.capacity, {1, 3, 1}, level.tokens.data());
  x.fill(4);
  for (int64_t i = level.cu[3]; i < level.cu[4]; i++) x(i) = 2.5f;  // no deviation
  for (int64_t i = level.cu[1]; i < level.cu[2]; i++) x(i) = 1000 + x(i);
  x(level.cu[4] + 60) = NAN;
  const floats y(level.capacity, {1, 2, 1}, level.tokens.data());
  test_call c;
  c.op.params.weight = 0.7f;
  c.of(level).in(0, x.value()).in(1, level.value()).out(y.value());
  RUN(c, standardize);
  y.expect_untouched();
  for (int b = 0; b < level.count(); b++) {
    const double n = level.lengths[static_cast<size_t>(b)];
    double mean = 0, squares = 0;
    for (int64_t i = level.cu[b]; i < level.cu[b + 1]; i++) mean += x(i) / n;
    for (int64_t i = level.cu[b]; i < level.cu[b + 1]; i++) squares += (x(i) - mean) * (x(i) - mean) / n;
    for (int64_t i = level.cu[b]; i < level.cu[b + 1]; i++) {
      if (b == 4) ASSERT_TRUE(std::isnan(y(i)));
      else ASSERT_NEAR(y(i), squares > 1e-20 ? static_cast<double>(0.7f) * (x(i) - mean) / std::sqrt(squares) : 0, 1e-6) << b;
    }
  }
}

// A sequence has the bits that it has alone, whatever the capacity.
TEST_P(Sequences, ABatchIsItsSequences) {
  const test_level level(ragged_lengths());
  constexpr int64_t cols = 36;
  floats x(level.capacity, cols, level.tokens.data()), score(level.capacity, 1, level.tokens.data());
  x.fill(5), score.fill(6);
  const auto run = [](const test_level &l, const floats &of_x, const floats &of_score, const floats &pooled, const floats &far,
                      const floats &even, const floats &place) {
    test_call pooling, distance, standard, position;
    pooling.op.params.pooling = RS_POOL_MEAN;
    pooling.of(l).in(0, of_x.value()).in(1, l.value()).in(2, of_score.value()).out(pooled.value());
    RUN(pooling, pool);
    distance.of(l).in(0, of_x.value()).in(1, l.value()).out(far.value());
    RUN(distance, centre_distance);
    standard.op.params.weight = 2;
    standard.of(l).in(0, of_score.value()).in(1, l.value()).out(even.value());
    RUN(standard, standardize);
    position.op.params.random = true;
    position.of(l).in(0, l.value()).out(place.value());
    RUN(position, position_score);
  };
  const floats pooled(level.sequence_capacity, cols, level.sequences.data()), far(level.capacity, 1, level.tokens.data()),
      even(level.capacity, 1, level.tokens.data()), place(level.capacity, 1, level.tokens.data());
  run(level, x, score, pooled, far, even, place);
  for (int b = 0; b < level.count(); b++) {
    const int n = level.lengths[static_cast<size_t>(b)];
    const test_level one({n}, b % 3, 3 * b);
    const int64_t capacity = one.capacity;
    floats x1(capacity, cols, one.tokens.data()), score1(capacity, 1, one.tokens.data());
    for (int64_t i = 0; i < n; i++) {
      std::copy(x.row(level.cu[b] + i), x.row(level.cu[b] + i) + cols, x1.row(i));
      score1(i) = score(level.cu[b] + i);
    }
    const floats pooled1(one.sequence_capacity, cols, one.sequences.data()), far1(capacity, 1, one.tokens.data()),
        even1(capacity, 1, one.tokens.data()), place1(capacity, 1, one.tokens.data());
    run(one, x1, score1, pooled1, far1, even1, place1);
    ASSERT_TRUE(same_bits(pooled.row(b), pooled1.row(0), cols));
    for (int64_t i = 0; i < n; i++) {
      ASSERT_TRUE(same_bits(far(level.cu[b] + i), far1(i)));
      ASSERT_TRUE(same_bits(even(level.cu[b] + i), even1(i)));
      ASSERT_TRUE(same_bits(place(level.cu[b] + i), place1(i)));
    }
  }
}

TEST_P(Sequences, NothingToDo) {
  const test_level level({}, 3, 5), none({}, 0, 0);
  for (const test_level *l : {&level, &none}) {
    const floats x(l->capacity, 8, l->tokens.data()), y(l->capacity, 8, l->tokens.data()), score(l->capacity, 1, l->tokens.data()),
        pooled(l->sequence_capacity, 8, l->sequences.data());
    test_call c;
    c.op.params.pooling = RS_POOL_MEAN;
    c.of(*l).in(0, x.value()).in(1, l->value()).out(pooled.value());
    RUN(c, pool);
    c.out(score.value());
    RUN(c, centre_distance);
    c.in(1, x.value()).out(y.value());
    RUN(c, add);
    pooled.expect_untouched(), score.expect_untouched(), y.expect_untouched();
  }
}

}  // namespace
