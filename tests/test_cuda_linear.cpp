// Linear layers of the CUDA backend, on the CPU (cuda_host.h): what a quantized layer computes equals the CPU's in every bit, float
// layers are within what their products of bf16 leave.
#define RS_CUDA_HOST
#include "../rs-cuda.cu"

#include "cuda_ops.h"
#include "graph_harness.h"

namespace {

struct linear_case {
  int64_t rows, capacity, n, k;
};

// Ends of tiles, of panels, of groups, and of steps, and both sizes of tiles.
const linear_case linear_cases[] = {
    {1, 1, 1, 1},     {1, 64, 16, 32},   {3, 70, 17, 33},      {64, 64, 64, 64},    {65, 128, 65, 96},
    {63, 64, 64, 31}, {100, 130, 15, 7}, {130, 256, 144, 160}, {129, 129, 129, 65}, {5, 64, 384, 384},
};

// y = act(x w^T + bias) by the library, all kernels scalar.
vec wanted_by_cpu(const vec &x, const vec &w, const vec &bias, rs_type type, const linear_case &c, rs_activation act) {
  session s("scalar", 1);
  harness h;
  rs_tensor *in = h.input("x", RS_F32, {RS_DIM_TOKENS, c.k}, x);
  rs_tensor *weight = h.weight("w", type, RS_PANELS, {c.n, c.k}, w);
  rs_tensor *b = bias.empty() ? nullptr : h.weight("b", RS_F32, RS_ROWS, {c.n}, bias);
  return h.run(s.s, rs_linear(h.g, in, weight, b, act), c.rows, 1, static_cast<size_t>(c.rows * c.n));
}

struct linear_test {
  linear_case c;
  rs_type type;
  vec x, w, bias;
  on_device<int32_t> rows{1};
  test_call call;
  std::vector<void *> memory;

  linear_test(const linear_case &c, rs_type type, bool with_bias, unsigned seed)
      : c(c),
        type(type),
        x(normal(static_cast<size_t>(c.rows * c.k), seed)),
        w(normal(static_cast<size_t>(c.n * c.k), seed + 1, 0.1f)),
        bias(with_bias ? normal(static_cast<size_t>(c.n), seed + 2) : vec()) {
    rows[0] = static_cast<int32_t>(c.rows);
    call.op.op = OP_LINEAR;
    call.call.multiprocessors = 4;
    call.op.in[1].type = type, call.op.in[1].layout = RS_PANELS;
    call.op.in[1].rows = c.n, call.op.in[1].cols = c.k;
    call.call.in[1].data = to_device(type, RS_PANELS, c.n, c.k, w);
    if (with_bias) call.call.in[2].data = to_device(RS_F32, RS_ROWS, c.n, 1, bias);
  }
  ~linear_test() {
    for (void *p : memory) EXPECT_EQ(cudaFree(p), cudaSuccess);
  }
  linear_test(const linear_test &) = delete;

  void *to_device(rs_type t, rs_layout layout, int64_t n, int64_t k, const vec &values) {
    const int64_t shape[] = {n, k};
    size_t bytes = 0, taken = 0;
    EXPECT_EQ(rs_tensor_bytes(t, layout, 2, shape, &bytes), RS_OK) << rs_last_error();
    std::vector<char> encoded(bytes);
    EXPECT_EQ(rs_tensor_encode(t, layout, 2, shape, values.data(), encoded.data(), bytes), RS_OK) << rs_last_error();
    void *p = nullptr;
    backend_error error = {};
    EXPECT_EQ(upload_weight(nullptr, t, layout, n, k, encoded.data(), bytes, "w", &p, &taken, &error), RS_OK) << error.text;
    memory.push_back(p);
    return p;
  }

  // Rows of x, into what has room for them.
  void fill(const floats &in) const {
    for (int64_t i = 0; i < c.rows; i++)
      for (int64_t j = 0; j < c.k; j++) in(i, j) = x[static_cast<size_t>(i * c.k + j)];
  }

  // The result, written where `out` says.
  void run(const floats &in, const device_value &out) {
    call.call.in[0] = in.value();
    call.op.in[0].cols = c.k;
    call.out(out);
    const int64_t kp = quantized_kp(c.k);
    on_device<uint8_t> q(static_cast<size_t>(quantized_bytes(c.capacity, c.k)), 0xee);
    on_device<row_quant> rq(static_cast<size_t>(c.capacity));
    if (is_quantized(type)) {
      call.call.q = q.data(), call.call.rq = rq.data(), call.call.kp = kp;
      ASSERT_EQ(quantize_rows(call.call, call.call.in[0], q.data(), rq.data(), kp), cudaSuccess) << cuda_host::last_fault();
    }
    call.run(linear_cuda, linear_work);
  }
};

class CudaLinear : public Cuda {};
INSTANTIATE_TEST_SUITE_P(Seeds, CudaLinear, ::testing::Values(1, 2));

TEST_P(CudaLinear, QuantizedEqualsTheCpuInEveryBit) {
  for (const linear_case &c : linear_cases)
    for (const rs_type type : {RS_W8, RS_W4})
      for (const bool with_bias : {false, true}) {
        SCOPED_TRACE(std::string(rs_type_name(type)) + " " + std::to_string(c.rows) + "x" + std::to_string(c.n) + "x" +
                     std::to_string(c.k));
        linear_test t(c, type, with_bias, 1);
        const floats in(c.capacity, c.k, t.rows.data());
        t.fill(in);
        const vec y = wanted_by_cpu(t.x, t.w, t.bias, type, c, RS_ACT_NONE);
        for (const layout_case &at : {layout_case{c.n, c.n + 3, 2}, {c.n, round_up(c.n, 4) + 4, 4}}) {  // on 16 bytes and not
          const floats out(c.capacity, at, t.rows.data());
          t.run(in, out.value());
          int64_t wrong = 0;
          for (int64_t i = 0; i < c.rows; i++)
            for (int64_t j = 0; j < c.n; j++) wrong += !same_bits(out(i, j), y[static_cast<size_t>(i * c.n + j)]);
          EXPECT_EQ(wrong, 0) << at.stride;
          out.expect_untouched();
        }
      }
}

// Three products of bf16 leave 2^-16 of each product, sums of f32 about as much again.
TEST_P(CudaLinear, FloatsAreWithinWhatTheirPartsLeave) {
  for (const linear_case &c : linear_cases)
    for (const rs_type type : {RS_F32, RS_F16})
      for (const int64_t more : {0, 1}) {  // rows that are not on 16 bytes
        SCOPED_TRACE(std::string(rs_type_name(type)) + " " + std::to_string(c.rows) + "x" + std::to_string(c.n) + "x" +
                     std::to_string(c.k));
        linear_test t(c, type, true, 3);
        const floats in(c.capacity, {c.k, c.k + more, 0}, t.rows.data()), out(c.capacity, {c.n, c.n + 1, 0}, t.rows.data());
        t.fill(in);
        t.run(in, out.value());
        for (int64_t i = 0; i < c.rows; i++)
          for (int64_t j = 0; j < c.n; j++) {
            double sum = static_cast<double>(t.bias[static_cast<size_t>(j)]), size = std::fabs(sum);
            for (int64_t k = 0; k < c.k; k++) {
              const double w = static_cast<double>(t.w[static_cast<size_t>(j * c.k + k)]);
              const double p = static_cast<double>(t.x[static_cast<size_t>(i * c.k + k)]) * w;
              sum += p, size += std::fabs(p);
            }
            const double tolerance = size * (type == RS_F16 ? 0x1p-11 : 0x1p-15);  // f16: what the weights themselves lost
            ASSERT_TRUE(std::fabs(static_cast<double>(out(i, j)) - sum) <= tolerance) << i << "," << j;
          }
        out.expect_untouched();
      }
}

TEST_P(CudaLinear, ActivationsResidualsAndHalves) {
  const linear_case c = {70, 128, 72, 64};
  for (const rs_type type : {RS_W8, RS_F32})
    for (int act = RS_ACT_NONE; act <= RS_ACT_QUICK_GELU; act++) {
      SCOPED_TRACE(act);
      linear_test t(c, type, true, 5);
      const floats in(c.capacity, c.k, t.rows.data());
      floats out(c.capacity, c.n, t.rows.data());
      const vec y = wanted_by_cpu(t.x, t.w, t.bias, type, c, static_cast<rs_activation>(act));
      t.call.op.params.act = static_cast<rs_activation>(act);
      t.fill(in);
      t.run(in, out.value());
      // Activations of floats that differ by the last bits: as those of the CPU's rows among each other, with room for sums.
      const auto near = [](float a, float b) { return std::fabs(a - b) <= 2e-5f + 2e-5f * std::fabs(b); };
      for (int64_t i = 0; i < c.rows; i++)
        for (int64_t j = 0; j < c.n; j++) ASSERT_TRUE(near(out(i, j), y[static_cast<size_t>(i * c.n + j)])) << i << "," << j;
      for (const layout_case &at : {layout_case{c.n, c.n + 5, 1}, {c.n, c.n + 4, 0}}) {
        floats sum(c.capacity, c.n, t.rows.data()), residual(c.capacity, at, t.rows.data());
        residual.fill(9);
        t.call.call.residual = residual.row(0), t.call.call.residual_stride = at.stride;
        t.run(in, sum.value());
        for (int64_t i = 0; i < c.rows; i++)
          for (int64_t k = 0; k < c.n; k++) ASSERT_TRUE(same_bits(sum(i, k), residual(i, k) + out(i, k))) << i << "," << k;
        sum.expect_untouched();
      }
      t.call.call.residual = nullptr;
      test_tensor<uint32_t> half(c.capacity, c.n / 2, t.rows.data());
      device_value v = half.value();
      v.half = true, v.cols = v.stride = c.n;
      t.run(in, v);
      // GELU of a result of f16 has a polynomial of its own, within 1.4e-5 of |x| < 5.
      for (int64_t i = 0; i < c.rows; i++)
        for (int64_t j = 0; j < c.n; j++) {
          const uint32_t bits = half(i, j / 2) >> j % 2 * 16 & 0xffff;
          if (act == RS_ACT_GELU)
            ASSERT_NEAR(half_value(static_cast<uint16_t>(bits)), out(i, j), 0x1p-11f * std::fabs(out(i, j)) + 7e-5f)
                << i << "," << j;
          else ASSERT_EQ(bits, pack_f16(out(i, j), 0)) << i << "," << j;
        }
      half.expect_untouched();
    }
}

TEST_P(CudaLinear, HalvesStayFinite) {
  const linear_case c = {64, 64, 64, 32};
  linear_test t(c, RS_F32, false, 6);
  for (float &v : t.x) v *= 3e5f;
  t.x[40 * 32 + 1] = NAN;
  const floats in(c.capacity, c.k, t.rows.data());
  t.fill(in);
  test_tensor<uint32_t> half(c.capacity, c.n / 2, t.rows.data());
  device_value v = half.value();
  v.half = true, v.cols = v.stride = c.n;
  t.run(in, v);
  int large = 0;
  for (int64_t i = 0; i < c.rows; i++)
    for (int64_t j = 0; j < c.n / 2; j++)
      for (const uint32_t bits : {half(i, j) & 0x7fff, half(i, j) >> 16 & 0x7fff}) {
        ASSERT_EQ(bits > 0x7c00, i == 40) << i << "," << j;  // NaN
        ASSERT_NE(bits, 0x7c00u) << i << "," << j;
        large += bits == 0x7bff;
      }
  EXPECT_GT(large, 100);
}

TEST_P(CudaLinear, RowsDoNotDependOnOthers) {
  for (const rs_type type : {RS_W8, RS_W4, RS_F32}) {
    const linear_case all = {200, 256, 130, 96};
    linear_test many(all, type, true, 7);
    many.call.op.params.act = RS_ACT_GELU;
    const floats in(all.capacity, all.k, many.rows.data()), out(all.capacity, all.n, many.rows.data());
    many.fill(in);
    many.run(in, out.value());
    for (const int64_t row : {0, 63, 64, 127, 128, 199}) {
      linear_test one({1, 1, all.n, all.k}, type, true, 7);
      one.x.assign(many.x.begin() + row * all.k, many.x.begin() + (row + 1) * all.k);
      one.w = many.w, one.bias = many.bias;
      one.call.op.params.act = RS_ACT_GELU;
      one.call.call.in[1].data = one.to_device(type, RS_PANELS, all.n, all.k, one.w);
      one.call.call.in[2].data = one.to_device(RS_F32, RS_ROWS, all.n, 1, one.bias);
      const floats single(1, all.k, one.rows.data()), y(1, all.n, one.rows.data());
      one.fill(single);
      one.run(single, y.value());
      for (int64_t j = 0; j < all.n; j++) ASSERT_TRUE(same_bits(y(0, j), out(row, j))) << row << "," << j;
    }
  }
}

// The same of a result of f16, in tiles that are all there and in one that is not; and blocks that take several tiles.
TEST_P(CudaLinear, HalvesDoNotDependOnTilesNorBlocks) {
  for (const rs_type type : {RS_W8, RS_W4, RS_F32})
    for (const int64_t k : {int64_t{64}, int64_t{416}}) {
      const linear_case c = {300, 320, 256, k};
      linear_test t(c, type, true, 9);
      t.call.op.params.act = RS_ACT_GELU;
      const floats in(c.capacity, c.k, t.rows.data());
      t.fill(in);
      std::vector<vec> results;
      for (const int multiprocessors : {1, 3, 100}) {  // 100: the small tiles
        t.call.call.multiprocessors = multiprocessors;
        test_tensor<uint32_t> half(c.capacity, c.n / 2, t.rows.data());
        device_value v = half.value();
        v.half = true, v.cols = v.stride = c.n;
        t.run(in, v);
        half.expect_untouched();
        vec all;
        for (int64_t i = 0; i < c.rows; i++)
          for (int64_t j = 0; j < c.n; j++) all.push_back(half_value(static_cast<uint16_t>(half(i, j / 2) >> j % 2 * 16)));
        results.push_back(all);
      }
      EXPECT_EQ(results[0], results[1]);
      EXPECT_EQ(results[0], results[2]);
      // Rows that are the same in a whole tile and in the last one, which is not.
      for (int64_t j = 0; j < k; j++) in(299, j) = in(0, j);
      test_tensor<uint32_t> half(c.capacity, c.n / 2, t.rows.data());
      device_value v = half.value();
      v.half = true, v.cols = v.stride = c.n;
      t.run(in, v);
      for (int64_t j = 0; j < c.n / 2; j++) ASSERT_EQ(half(299, j), half(0, j));
    }
}

// A row that holds NaN shows it, and no other row does.
TEST_P(CudaLinear, NanStaysInItsRow) {
  for (const rs_type type : {RS_W8, RS_W4, RS_F32}) {
    const linear_case c = {20, 64, 32, 64};
    linear_test t(c, type, false, 8);
    t.x[static_cast<size_t>(7 * c.k + 3)] = NAN;
    const floats in(c.capacity, c.k, t.rows.data()), out(c.capacity, c.n, t.rows.data());
    t.fill(in);
    t.run(in, out.value());
    for (int64_t i = 0; i < c.rows; i++)
      for (int64_t j = 0; j < c.n; j++) ASSERT_EQ(std::isnan(out(i, j)), i == 7) << i << "," << j;
  }
}

TEST(CudaWeights, HalvesOfFloatsAreThoseOfTheDevice) {
  for (uint32_t h = 0; h < 65536; h++) {
    const float v = half_value(static_cast<uint16_t>(h)), w = f16_to_float(static_cast<uint16_t>(h));
    ASSERT_TRUE(same_bits(v, w) || (std::isnan(v) && std::isnan(w))) << h;
  }
  std::mt19937 random(1);
  for (int i = 0; i < 100000; i++) {
    const float v = bits_to_float(static_cast<uint32_t>(random()));
    ASSERT_TRUE(std::isnan(v) || bf16_of(v) == static_cast<uint16_t>(pack_bf16(v, 0))) << v;
  }
}

}  // namespace
