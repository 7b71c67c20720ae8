// How exact the elementary functions are: every row of kernels against f64, over floats of every exponent.  The bounds here are
// those that rs.cpp (section 7) and docs/design.md state: what was measured, rounded up.
#include "../rs.h"
#include "test_util.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <memory>

namespace {

using vec = std::vector<float>;

// Every n-th float, by its bits; odd, so that all low bits occur.
#if defined(RS_EMULATED)
constexpr uint32_t stride = 200003;
#elif defined(__SANITIZE_ADDRESS__)
constexpr uint32_t stride = 20011;
#else
constexpr uint32_t stride = 4001;
#endif

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (size_t i = 0; rs_isa_available(i); i++) names.push_back(rs_isa_available(i));
  return names;
}

float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// Finite floats of both signs and all exponents, padded to whole rows of 16.
const vec &sweep() {
  static const vec all = [] {
    vec v;
    for (uint64_t bits = 0; bits < 0x7f800000; bits += stride)
      for (uint32_t sign : {0u, 0x80000000u}) v.push_back(from_bits(static_cast<uint32_t>(bits) | sign));
    // The ends of ranges: denormals, where exp leaves what a float holds, where erf and tanh are one.
    for (float x : {FLT_TRUE_MIN, FLT_MIN, FLT_MAX, 0.2f, 4 * 1.41421356f, 87.33654f, 88.72284f, 52.13f, 9.02f})
      for (float y : {std::nextafter(x, 0.0f), x}) v.push_back(y), v.push_back(-y);
    v.resize((v.size() + 15) / 16 * 16);
    return v;
  }();
  return all;
}

// act(x) by a linear layer whose weight is the identity: exact, as long as x is finite.
class activation {
 public:
  activation(const std::string &isa, rs_activation act, int64_t width) : width_(width) {
    setenv("RS_ISA", isa.c_str(), 1);
    rs_session_params p = {};
    p.size = sizeof p;
    EXPECT_EQ(rs_session_create(nullptr, &p, &session_), RS_OK) << rs_last_error();
    unsetenv("RS_ISA");
    EXPECT_EQ(rs_graph_create(nullptr, &graph_), RS_OK);
    const int64_t shape[] = {width, width}, rows[] = {RS_DIM_TOKENS, width};
    vec identity(static_cast<size_t>(width * width));
    for (size_t i = 0; i < identity.size(); i += static_cast<size_t>(width) + 1) identity[i] = 1;
    size_t bytes = 0;
    EXPECT_EQ(rs_tensor_bytes(RS_F32, RS_PANELS, 2, shape, &bytes), RS_OK);
    weight_.reset(static_cast<char *>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
    EXPECT_EQ(rs_tensor_encode(RS_F32, RS_PANELS, 2, shape, identity.data(), weight_.get(), bytes), RS_OK);
    x_ = rs_input(graph_, "x", RS_F32, 2, rows);
    y_ = rs_output(graph_,
                   rs_linear(graph_, x_, rs_constant(graph_, "w", RS_F32, RS_PANELS, 2, shape, weight_.get()), nullptr, act));
    EXPECT_EQ(rs_graph_finish(graph_), RS_OK) << rs_last_error();
  }
  ~activation() {
    rs_graph_free(graph_);
    rs_session_free(session_);
  }
  activation(const activation &) = delete;
  activation &operator=(const activation &) = delete;

  vec operator()(const vec &x) {
    vec y(x.size());
    const size_t chunk = size_t{4096} * static_cast<size_t>(width_);
    for (size_t i = 0; i < x.size(); i += chunk) {
      const size_t n = std::min(chunk, x.size() - i);
      const rs_binding bindings[] = {{x_, const_cast<float *>(&x[i]), n * 4}, {y_, &y[i], n * 4}};
      EXPECT_EQ(rs_graph_run(session_, graph_, static_cast<int64_t>(n) / width_, 1, bindings, 2), RS_OK) << rs_last_error();
    }
    return y;
  }

 private:
  struct release {
    void operator()(char *p) const { std::free(p); }
  };
  int64_t width_;
  rs_session *session_ = nullptr;
  rs_graph *graph_ = nullptr;
  rs_tensor *x_, *y_;
  std::unique_ptr<char, release> weight_;
};

double exact(rs_activation act, double x) {
  switch (act) {
    case RS_ACT_GELU:
      return x / 2 * std::erfc(-x / std::sqrt(2.0));
    case RS_ACT_GELU_TANH: {  // x / 2 (1 + tanh u), without its cancellation
      const double u = std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x);
      return x / (1 + std::exp(-2 * u));
    }
    case RS_ACT_RELU:
      return x > 0 ? x : 0;
    case RS_ACT_SILU:
      return x / (1 + std::exp(-x));
    case RS_ACT_TANH:
      return std::tanh(x);
    case RS_ACT_QUICK_GELU:
      return x / (1 + std::exp(-1.702 * x));
    default:
      return x;
  }
}

// The distance between neighbouring floats at x.
double ulp(double x) { return std::ldexp(1.0, std::max(std::ilogb(std::max(std::fabs(x), double(FLT_MIN))) - 23, -149)); }

struct bound {
  rs_activation act;
  const char *name;
  double positive, negative;  // ULP for x >= 0 and x < 0
  bool of_terms;              // for x < 0: of x / 2, the terms that cancel, not of what they leave
};
// Those of the vector rows; the scalar row, which asks libm, is within them too.
const bound bounds[] = {
    {RS_ACT_NONE, "none", 0, 0, false},
    {RS_ACT_RELU, "relu", 0, 0, false},
    {RS_ACT_TANH, "tanh", 7.3, 10.2, false},
    {RS_ACT_GELU, "gelu", 2.3, 4, true},
    {RS_ACT_SILU, "silu", 2, 3, false},
    {RS_ACT_GELU_TANH, "gelu_tanh", 2.1, 3.3, true},
    {RS_ACT_QUICK_GELU, "quick_gelu", 2, 82, false},
};

// Where e^-x overflows, silu and quick_gelu give zero: that much may be lost.
double flushed(rs_activation act) {
  if (act == RS_ACT_SILU) return 2.7e-37;
  return act == RS_ACT_QUICK_GELU ? 1.6e-37 : 0;
}

// All vector rows compute the same bits: their code is one, and fused operations are written where they are meant.  So it is enough
// to measure one of them, and the scalar row.
TEST(ulp, activations_hold_their_bounds) {
  const vec &x = sweep();
  for (const bound &b : bounds) {
    std::vector<double> wanted(x.size());
    for (size_t i = 0; i < x.size(); i++) wanted[i] = exact(b.act, x[i]);
    vec first;
    for (const std::string &isa : isas()) {
      const vec y = activation(isa, b.act, 16)(x);
      if (isa != "scalar" && !first.empty()) {
        EXPECT_EQ(memcmp(y.data(), first.data(), y.size() * 4), 0) << b.name << ": " << isa << " differs from " << isas()[0];
        continue;
      }
      first = y;
      double most[2] = {0, 0};
      float at[2] = {0, 0};
      for (size_t i = 0; i < x.size(); i++) {
        const double error = std::fabs(y[i] - wanted[i]);
        if (std::isinf(y[i]) && std::fabs(wanted[i]) > FLT_MAX) continue;
        if (y[i] == 0 && error <= flushed(b.act)) continue;
        const bool negative = x[i] < 0;
        const double unit = ulp(b.of_terms && negative ? x[i] / 2.0 : wanted[i]);
        // Once NaN, it stays.
        if (!(std::isnan(most[negative]) || error <= most[negative] * unit)) most[negative] = error / unit, at[negative] = x[i];
      }
      printf("%-10s %-10s x >= 0: %.2f ULP at %.9g   x < 0: %.2f ULP at %.9g\n", b.name, isa.c_str(), most[0], at[0], most[1],
             at[1]);
      EXPECT_TRUE(most[0] <= b.positive) << b.name << " " << isa << " at " << at[0];
      EXPECT_TRUE(most[1] <= b.negative) << b.name << " " << isa << " at " << at[1];
    }
  }
}

TEST(ulp, activations_of_nan_and_infinity) {
  for (const bound &b : bounds)
    for (const std::string &isa : isas()) {
      const vec y = activation(isa, b.act, 1)({NAN, -NAN, INFINITY, -INFINITY, FLT_MAX, -FLT_MAX});
      SCOPED_TRACE(b.name + (" " + isa));
      EXPECT_TRUE(std::isnan(y[0]) && std::isnan(y[1]));
      EXPECT_EQ(y[2], b.act == RS_ACT_TANH ? 1 : INFINITY);
      // Infinity times zero is NaN, as in f64: an overflow shows, on whichever side.
      if (b.act == RS_ACT_NONE || b.act == RS_ACT_RELU || b.act == RS_ACT_TANH) {
        EXPECT_EQ(y[3], static_cast<float>(exact(b.act, -INFINITY)));
      } else {
        EXPECT_TRUE(std::isnan(y[3])) << y[3];
      }
      EXPECT_EQ(y[4], b.act == RS_ACT_TANH ? 1 : FLT_MAX);
      EXPECT_EQ(y[5], static_cast<float>(exact(b.act, -FLT_MAX)));
    }
}

// The softmax of two keys of scores 0 and x is 1 / (1 + e^x) and e^x / (1 + e^x).  Their quotient is e^x, with two roundings of
// results, a half ULP each; below -17 the second is e^x itself.
TEST(ulp, exp_holds_its_bound) {
  std::vector<float> x;
  for (uint64_t bits = 0; bits <= 0x43000000; bits += uint64_t{stride} * 5) x.push_back(-from_bits(static_cast<uint32_t>(bits)));
  for (float end : {17.0f, 87.0f, 87.33654f, 88.0f, 103.0f, 104.0f, 1000.0f, FLT_MAX})
    x.push_back(-end), x.push_back(-std::nextafter(end, 0.0f));
  const auto tokens = static_cast<int64_t>(2 * x.size());
  vec q, k, v;
  std::vector<int32_t> starts = {0};
  for (float value : x) {
    for (float a : {value, 0.0f, value, 0.0f}) q.push_back(a);
    for (float a : {0.0f, 0.0f, 1.0f, 0.0f}) k.push_back(a);
    for (float a : {1.0f, 0.0f, 0.0f, 1.0f}) v.push_back(a);
    starts.push_back(starts.back() + 2);
  }
  for (const std::string &isa : isas()) {
    setenv("RS_ISA", isa.c_str(), 1);
    rs_session *s = nullptr;
    rs_session_params p = {};
    p.size = sizeof p;
    ASSERT_EQ(rs_session_create(nullptr, &p, &s), RS_OK) << rs_last_error();
    unsetenv("RS_ISA");
    rs_graph *g = nullptr;
    ASSERT_EQ(rs_graph_create(nullptr, &g), RS_OK);
    const int64_t rows[] = {RS_DIM_TOKENS, 2}, ends[] = {RS_DIM_CU_SEQLENS};
    rs_tensor *in[] = {rs_input(g, "q", RS_F32, 2, rows), rs_input(g, "k", RS_F32, 2, rows), rs_input(g, "v", RS_F32, 2, rows),
                       rs_input(g, "cu", RS_I32, 1, ends)};
    rs_tensor *out = rs_output(g, rs_flash_attn(g, in[0], in[1], in[2], in[3], nullptr, 1, 1));
    ASSERT_EQ(rs_graph_finish(g), RS_OK) << rs_last_error();
    vec y(q.size());
    const rs_binding bindings[] = {{in[0], q.data(), q.size() * 4},
                                   {in[1], k.data(), k.size() * 4},
                                   {in[2], v.data(), v.size() * 4},
                                   {in[3], starts.data(), starts.size() * 4},
                                   {out, y.data(), y.size() * 4}};
    ASSERT_EQ(rs_graph_run(s, g, tokens, static_cast<int64_t>(x.size()), bindings, 5), RS_OK) << rs_last_error();
    rs_graph_free(g);
    rs_session_free(s);
    double most = 0, most_alone = 0;
    for (size_t i = 0; i < x.size(); i++) {
      const double got = double(y[4 * i + 1]) / y[4 * i], wanted = std::exp(double(x[i])),
                   error = std::fabs(got - wanted) / ulp(wanted);
      if (x[i] < -87.33654f && isa != "scalar") {
        EXPECT_EQ(y[4 * i + 1], 0) << x[i];  // no denormals
      } else if (x[i] < -17) {
        most_alone = std::max(most_alone, std::isnan(error) ? INFINITY : error);
      } else {
        most = std::max(most, std::isnan(error) ? INFINITY : error);
      }
    }
    printf("exp %-10s x < -17: %.2f ULP   else, by a quotient: %.2f ULP\n", isa.c_str(), most_alone, most);
    EXPECT_TRUE(most_alone <= 1.3) << isa;
    EXPECT_TRUE(most <= 1.3 + 2) << isa;
  }
}

}  // namespace
