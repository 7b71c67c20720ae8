// Operators and graphs: every operator on every row of kernels that this CPU has, against a plain f64 version.
// Tolerances: results in f32 may differ from f64 by a few roundings; each test says how many.
#include "graph_harness.h"
#include "tiny_bert.h"

#include <functional>
#include <map>
#include <random>

namespace {

vec linear_f64(const vec &x, const vec &w, const vec &bias, size_t t, size_t n, size_t k) {
  vec y(t * n);
  for (size_t i = 0; i < t; i++)
    for (size_t j = 0; j < n; j++) {
      double sum = bias.empty() ? 0 : bias[j];
      for (size_t l = 0; l < k; l++) sum += double(x[i * k + l]) * w[j * k + l];
      y[i * n + j] = static_cast<float>(sum);
    }
  return y;
}

vec run_linear(const std::string &isa, rs_type type, const vec &x, const vec &w, const vec &bias, int64_t t, int64_t n, int64_t k,
               rs_activation act = RS_ACT_NONE, int threads = 2) {
  session s(isa, threads);
  harness h;
  rs_tensor *in = h.input("x", RS_F32, {RS_DIM_TOKENS, k}, x);
  rs_tensor *y = rs_linear(h.g, in, h.weight("w", type, RS_PANELS, {n, k}, w),
                           bias.empty() ? nullptr : h.weight("b", RS_F32, RS_ROWS, {n}, bias), act);
  return h.run(s.s, y, t, 1, static_cast<size_t>(t * n));
}

const int64_t linear_shapes[][3] = {{1, 1, 1},     {1, 16, 32},  {2, 17, 33},   {3, 5, 7},      {5, 48, 64},
                                    {7, 100, 384}, {49, 33, 96}, {130, 64, 40}, {13, 40, 1536}, {35, 70, 1056}};

TEST(linear, floats_match_f64) {
  for (const std::string &isa : isas())
    for (const auto &s : linear_shapes)
      for (rs_type type : {RS_F32, RS_F16}) {
        SCOPED_TRACE(isa + " " + rs_type_name(type) + " " + std::to_string(s[0]) + "," + std::to_string(s[1]) + "," +
                     std::to_string(s[2]));
        const vec x = normal(static_cast<size_t>(s[0] * s[2]), 1), bias = normal(static_cast<size_t>(s[1]), 3);
        vec w = normal(static_cast<size_t>(s[1] * s[2]), 2);
        if (type == RS_F16)  // so that the weights themselves are exact
          for (float &v : w) v = std::nearbyint(v * 256) / 256;
        const vec y = run_linear(isa, type, x, w, bias, s[0], s[1], s[2]);
        const float tolerance = 4e-7f * static_cast<float>(s[2]);  // K roundings of terms near 1, half an ULP each, and room
        expect_close(y, linear_f64(x, w, bias, static_cast<size_t>(s[0]), static_cast<size_t>(s[1]), static_cast<size_t>(s[2])),
                     std::max(tolerance, 2e-6f));
      }
}

TEST(linear, quantized_is_the_same_on_every_isa_bit_for_bit) {
  for (const auto &s : linear_shapes)
    for (rs_type type : {RS_W8, RS_W4}) {
      const vec x = normal(static_cast<size_t>(s[0] * s[2]), 4), w = normal(static_cast<size_t>(s[1] * s[2]), 5),
                bias = normal(static_cast<size_t>(s[1]), 6);
      const vec oracle = run_linear("scalar", type, x, w, bias, s[0], s[1], s[2]);
      for (const std::string &isa : isas())
        EXPECT_EQ(run_linear(isa, type, x, w, bias, s[0], s[1], s[2]), oracle) << isa << " " << rs_type_name(type);
    }
}

// The largest sums there can be: all activations at the end of their range, all weights at the limit of theirs.
// Whatever the bytes of 4-bit weights are, and at the ends of what they may be: products of a weight and its multiplier from -128
// to 112, at inputs of 0 and 255.
TEST(linear, any_four_bits_are_the_same_on_every_isa_bit_for_bit) {
  const int64_t t = 37, n = 80, k = 544;
  std::mt19937 random(3);
  vec x = normal(t * k, 4);
  for (float &v : x)
    if (random() % 2) v = v < 0 ? -4.0f : 4.0f;
  const auto run = [&](const std::string &isa, unsigned seed) {
    session s(isa, 2);
    harness h;
    rs_tensor *in = h.input("x", RS_F32, {RS_DIM_TOKENS, k}, x);
    rs_tensor *w = h.weight("w", RS_W4, RS_PANELS, {n, k}, normal(n * k, 5));
    auto *nibbles = static_cast<uint8_t *>(h.weights.back()->p), *mult = nibbles + n * k / 2;
    std::mt19937 r(seed);
    for (int64_t i = 0; i < n * k / 2; i++) nibbles[i] = static_cast<uint8_t>(seed ? r() : 0);  // 0: -8
    for (int64_t i = 0; i < n * k / 32; i++) mult[i] = static_cast<uint8_t>(seed ? 1 + r() % 16 : 16);
    return h.run(s.s, rs_linear(h.g, in, w, nullptr, RS_ACT_NONE), t, 1, t * n);
  };
  for (const unsigned seed : {0u, 1u}) {
    const vec oracle = run("scalar", seed);
    for (const std::string &isa : isas()) EXPECT_EQ(run(isa, seed), oracle) << isa << " " << seed;
  }
}

// A scale of inputs in the file is the same, to the bit, as inputs that were multiplied before: also where registers end, and where
// values are NaN, infinite or all zero.
TEST(linear, inputs_are_scaled_as_the_file_says) {
  const std::string name = "blk.0.attn.qkv.weight";
  temp_dir dir;
  for (const int64_t k : {4, 28, 36, 64, 100, 132, 384})
    for (const char *type : {"q8", "q4"}) {
      SCOPED_TRACE(std::string(type) + " " + std::to_string(k));
      tiny_bert tiny;
      tiny.hidden = k;
      ASSERT_EQ(tiny.convert(dir / "plain.rsw", type), RS_OK) << rs_last_error();
      vec scale(static_cast<size_t>(k));
      for (size_t j = 0; j < scale.size(); j++) scale[j] = 0.03f * static_cast<float>(1 + j % 41);
      ASSERT_EQ(add_input_scales(dir / "plain.rsw", dir / "scaled.rsw", {{name, scale}}), RS_OK) << rs_last_error();
      const loaded plain(dir / "plain.rsw"), scaled(dir / "scaled.rsw");
      const int64_t t = 7, n = 3 * k;
      vec x = normal(static_cast<size_t>(t * k), 8), multiplied = x;
      x[0] = NAN, x[static_cast<size_t>(2 * k - 1)] = INFINITY;
      std::fill_n(x.begin() + 2 * k, k, 0.0f);
      for (size_t i = 0; i < x.size(); i++) multiplied[i] = x[i] * scale[i % scale.size()];
      const auto result = [&](const rs_model *model, const std::string &isa, const vec &inputs) {
        const session s(isa);
        harness h(model);
        const int64_t shape[] = {n, k};
        rs_tensor *w = rs_name(h.g, rs_weight(h.g, name.c_str(), 2, shape), "another name");
        return h.run(s.s, rs_linear(h.g, h.input("x", RS_F32, {RS_DIM_TOKENS, k}, inputs), w, nullptr, RS_ACT_NONE), t, 1,
                     static_cast<size_t>(t * n));
      };
      const vec wanted = result(plain.model, "scalar", multiplied), without = result(plain.model, "scalar", x);
      const size_t finite = static_cast<size_t>(2 * n);  // rows from here on are
      EXPECT_TRUE(
          std::all_of(wanted.begin(), wanted.begin() + static_cast<std::ptrdiff_t>(finite), [](float v) { return std::isnan(v); }));
      EXPECT_NE(memcmp(&without[finite], &wanted[finite], (wanted.size() - finite) * 4), 0);
      for (const std::string &isa : isas()) {
        const vec got = result(scaled.model, isa, x);
        EXPECT_TRUE(
            std::all_of(got.begin(), got.begin() + static_cast<std::ptrdiff_t>(finite), [](float v) { return std::isnan(v); }));
        EXPECT_EQ(memcmp(&got[finite], &wanted[finite], (wanted.size() - finite) * 4), 0) << isa;
      }
    }
}

TEST(linear, quantized_sums_do_not_overflow) {
  const int64_t k = 4096, n = 16;
  vec x(k, 1.0f), w(static_cast<size_t>(n * k), 1.0f);
  for (int64_t i = 0; i < n * k; i++)
    if (i / k % 2) w[static_cast<size_t>(i)] = -1;
  for (rs_type type : {RS_W8, RS_W4})
    for (const std::string &isa : isas()) {
      const vec y = run_linear(isa, type, x, w, {}, 1, n, k);
      for (int64_t j = 0; j < n; j++)
        EXPECT_TRUE(std::fabs(std::fabs(y[static_cast<size_t>(j)]) - k) < 0.02 * k) << isa << " " << y[static_cast<size_t>(j)];
    }
}

TEST(linear, quantized_error_is_that_of_its_bits) {
  const int64_t t = 20, n = 64, k = 384;
  const vec x = normal(t * k, 7), w = normal(n * k, 8, 0.05f), exact = linear_f64(x, w, {}, t, n, k);
  for (const auto &[type, most] : std::map<rs_type, double>{{RS_W8, 0.015}, {RS_W4, 0.11}}) {
    const vec y = run_linear("", type, x, w, {}, t, n, k);
    double error = 0, sum = 0;
    for (size_t i = 0; i < y.size(); i++) error += std::pow(double(y[i]) - exact[i], 2), sum += std::pow(exact[i], 2);
    EXPECT_TRUE(std::sqrt(error / sum) < most) << rs_type_name(type) << " " << std::sqrt(error / sum);
  }
}

// An activation may be coarser behind quantized weights than behind floats, but not than this.
TEST(linear, gelu_of_quantized_layers_is_right_to_five_digits) {
  const int64_t t = 67, n = 100, k = 384;
  vec x = normal(t * k, 14);
  const vec w = normal(n * k, 15), bias = normal(n, 16);
  for (size_t i = 0; i < x.size(); i++) x[i] *= i % 3 ? 0.1f : 1e-3f;  // results of up to 6 or so
  x[5] = 1e6f;                                                         // and a row of large ones
  for (const std::string &isa : isas())
    for (rs_type type : {RS_W8, RS_W4}) {
      const vec v = run_linear(isa, type, x, w, bias, t, n, k), y = run_linear(isa, type, x, w, bias, t, n, k, RS_ACT_GELU);
      for (size_t i = 0; i < v.size(); i++) {
        const double exact = v[i] / 2.0 * std::erfc(-v[i] / std::sqrt(2.0));
        ASSERT_NEAR(y[i], exact, 1e-5 * std::fabs(v[i])) << isa << " " << rs_type_name(type) << " gelu(" << v[i] << ")";
      }
    }
}

TEST(linear, a_row_does_not_depend_on_its_neighbours_or_the_threads) {
  const int64_t t = 61, n = 50, k = 100;
  const vec x = normal(t * k, 9), w = normal(n * k, 10), bias = normal(n, 11);
  for (rs_type type : {RS_F32, RS_F16, RS_W8, RS_W4})
    for (const std::string &isa : isas()) {
      const vec all = run_linear(isa, type, x, w, bias, t, n, k, RS_ACT_GELU, 1);
      EXPECT_EQ(run_linear(isa, type, x, w, bias, t, n, k, RS_ACT_GELU, 3), all);
      for (int64_t i : {0, 1, 17, 60}) {
        const vec row(x.begin() + i * k, x.begin() + (i + 1) * k);
        EXPECT_EQ(run_linear(isa, type, row, w, bias, 1, n, k, RS_ACT_GELU), vec(all.begin() + i * n, all.begin() + (i + 1) * n))
            << isa;
      }
    }
}

TEST(linear, nan_shows) {
  for (const std::string &isa : isas())
    for (rs_type type : {RS_F32, RS_F16, RS_W8, RS_W4})
      for (int act = RS_ACT_NONE; act <= RS_ACT_QUICK_GELU; act++)
        for (float bad : {NAN, INFINITY}) {
          if (act != RS_ACT_NONE && !std::isnan(bad)) continue;  // infinity has a value under most activations
          vec x = normal(3 * 40, 12);
          x[40 + 39] = bad;
          const vec y = run_linear(isa, type, x, normal(8 * 40, 13), {}, 3, 8, 40, static_cast<rs_activation>(act));
          for (size_t j = 0; j < 8; j++) {
            EXPECT_TRUE(std::isfinite(y[j]) && std::isfinite(y[16 + j]));
            EXPECT_FALSE(std::isfinite(y[8 + j])) << isa << " " << rs_type_name(type) << " act " << act;
          }
        }
}

TEST(layer_norm, matches_f64) {
  for (const std::string &isa : isas())
    for (int64_t c : {1, 7, 8, 33, 384})
      for (bool with_residual : {false, true}) {
        const int64_t t = 5;
        const vec x = normal(static_cast<size_t>(t * c), 1, 3), r = normal(static_cast<size_t>(t * c), 2),
                  gamma = normal(static_cast<size_t>(c), 3), beta = normal(static_cast<size_t>(c), 4);
        session s(isa);
        harness h;
        rs_tensor *in = h.input("x", RS_F32, {RS_DIM_TOKENS, c}, x), *res = h.input("r", RS_F32, {RS_DIM_TOKENS, c}, r);
        rs_tensor *y = rs_layer_norm(h.g, in, with_residual ? res : nullptr, h.weight("g", RS_F32, RS_ROWS, {c}, gamma),
                                     h.weight("b", RS_F32, RS_ROWS, {c}, beta), 1e-6f);
        const vec got = h.run(s.s, y, t, 1, x.size());
        vec wanted(x.size());
        for (int64_t i = 0; i < t; i++) {
          std::vector<double> v(static_cast<size_t>(c));
          double mean = 0, var = 0;
          for (int64_t j = 0; j < c; j++)
            mean += v[static_cast<size_t>(j)] =
                double(x[static_cast<size_t>(i * c + j)]) + (with_residual ? r[static_cast<size_t>(i * c + j)] : 0);
          mean /= static_cast<double>(c);
          for (double a : v) var += (a - mean) * (a - mean);
          for (int64_t j = 0; j < c; j++)
            wanted[static_cast<size_t>(i * c + j)] =
                static_cast<float>((v[static_cast<size_t>(j)] - mean) / std::sqrt(var / static_cast<double>(c) + 1e-6) *
                                       gamma[static_cast<size_t>(j)] +
                                   beta[static_cast<size_t>(j)]);
        }
        expect_close(got, wanted, c == 1 ? 1e-3f : 4e-6f);  // one channel: mean and value cancel, eps is all that is left
      }
}

// Which keys a query sees: those up to its own place, or those at most `window` places away; 0: all.
struct reach {
  bool causal = false;
  int window = 0;
};
const reach reaches[] = {{}, {true}, {false, 1}, {false, 64}};

std::string show(const reach &r) { return r.causal ? " causal" : r.window ? " window " + std::to_string(r.window) : ""; }

rs_tensor *attend(rs_graph *g, rs_tensor *q, rs_tensor *k, rs_tensor *v, rs_tensor *cu, rs_tensor *sizes, int heads, float scale,
                  const reach &r) {
  if (r.window) return rs_flash_attn_window(g, q, k, v, cu, sizes, heads, scale, r.window);
  return (r.causal ? rs_flash_attn_causal : rs_flash_attn)(g, q, k, v, cu, sizes, heads, scale);
}

// softmax(q k^T scale) v by the definition, accumulated in T.
template <class T>
vec attention_naive(const vec &q, const vec &k, const vec &v, const std::vector<int32_t> &cu, int heads, int64_t c, float scale,
                    const reach &r = {}) {
  vec out(q.size());
  const int64_t d = c / heads;
  for (size_t b = 0; b + 1 < cu.size(); b++)
    for (int head = 0; head < heads; head++)
      for (int64_t i = cu[b]; i < cu[b + 1]; i++) {
        std::vector<T> p;
        T most = -INFINITY, sum = 0;
        const int64_t first = r.window ? std::max<int64_t>(cu[b], i - r.window) : cu[b],
                      end = r.causal   ? i + 1
                            : r.window ? std::min<int64_t>(cu[b + 1], i + r.window + 1)
                                       : cu[b + 1];
        for (int64_t j = first; j < end; j++) {
          T dot = 0;
          for (int64_t l = 0; l < d; l++)
            dot += T(q[static_cast<size_t>(i * c + head * d + l)]) * T(k[static_cast<size_t>(j * c + head * d + l)]);
          p.push_back(dot * T(scale));
          most = std::max(most, p.back());
        }
        for (T &x : p) sum += x = std::exp(x - most);
        for (int64_t l = 0; l < d; l++) {
          T acc = 0;
          for (size_t j = 0; j < p.size(); j++)
            acc += p[j] * T(v[(static_cast<size_t>(first) + j) * static_cast<size_t>(c) + static_cast<size_t>(head * d + l)]);
          out[static_cast<size_t>(i * c + head * d + l)] = static_cast<float>(acc / sum);
        }
      }
  return out;
}

double largest_error(const vec &a, const vec &b) {
  double most = 0;
  for (size_t i = 0; i < a.size(); i++) most = larger_or_nan(most, std::fabs(double(a[i]) - b[i]));
  return most;
}

vec run_attention(const std::string &isa, const vec &q, const vec &k, const vec &v, const std::vector<int32_t> &cu, int heads,
                  int64_t c, float scale, int threads = 2, const reach &r = {}) {
  session s(isa, threads);
  harness h;
  // q, k and v as columns of one tensor, as models have them
  vec all;
  for (size_t i = 0; i < q.size() / static_cast<size_t>(c); i++)
    for (const vec *x : {&q, &k, &v})
      all.insert(all.end(), x->begin() + static_cast<int64_t>(i) * c, x->begin() + static_cast<int64_t>(i + 1) * c);
  rs_tensor *qkv = h.input("qkv", RS_F32, {RS_DIM_TOKENS, 3 * c}, all), *starts = h.input("cu", RS_I32, {RS_DIM_CU_SEQLENS}, cu);
  rs_tensor *y = attend(h.g, rs_columns(h.g, qkv, 0, c), rs_columns(h.g, qkv, c, c), rs_columns(h.g, qkv, 2 * c, c), starts,
                        nullptr, heads, scale, r);
  return h.run(s.s, y, cu.back(), static_cast<int64_t>(cu.size()) - 1, q.size());
}

// The rule of the flash-attention project: at most twice the error of the plain version in the same precision, both against f64.
TEST(flash_attn, error_is_at_most_twice_that_of_the_naive_version) {
  const std::vector<std::vector<int32_t>> lengths = {{1},       {2, 3, 1},     {16, 64, 65}, {127, 128, 129},
                                                     {0, 5, 0}, {256, 1, 300}, {600}};
  for (const auto &[heads, c] : std::vector<std::pair<int, int64_t>>{{1, 32}, {3, 96}, {2, 128}, {1, 80}, {2, 14}, {4, 4}})
    for (const auto &list : lengths)
      for (const reach &r : reaches) {
        std::vector<int32_t> cu = {0};
        for (int32_t n : list) cu.push_back(cu.back() + n);
        SCOPED_TRACE("heads " + std::to_string(heads) + " c " + std::to_string(c) + " first length " + std::to_string(list[0]) +
                     show(r));
        const size_t n = static_cast<size_t>(cu.back()) * static_cast<size_t>(c);
        const vec q = normal(n, 1, 2), k = normal(n, 2, 2), v = normal(n, 3);
        const float scale = 1 / std::sqrt(static_cast<float>(c / heads));
        const vec exact = attention_naive<double>(q, k, v, cu, heads, c, scale, r),
                  naive = attention_naive<float>(q, k, v, cu, heads, c, scale, r);
        for (const std::string &isa : isas()) {
          const double error = largest_error(run_attention(isa, q, k, v, cu, heads, c, scale, 2, r), exact);
          ASSERT_TRUE(error <= 2 * largest_error(naive, exact) + 1e-6)
              << isa << " " << error << " naive " << largest_error(naive, exact);
        }
      }
}

TEST(flash_attn, large_scores_do_not_overflow) {
  const std::vector<int32_t> cu = {0, 300};
  const vec q(300 * 32, 40.0f), v = normal(300 * 32, 3);
  vec k = normal(300 * 32, 2, 20);
  for (const std::string &isa : isas()) {
    const vec y = run_attention(isa, q, k, v, cu, 1, 32, 1);
    EXPECT_TRUE(largest_error(y, attention_naive<double>(q, k, v, cu, 1, 32, 1)) < 0.05)
        << isa;  // scores near 1e4: their f32 step is 1e-3
  }
}

TEST(flash_attn, a_sequence_does_not_depend_on_its_neighbours_or_the_threads) {
  const std::vector<int32_t> cu = {0, 150, 151, 340}, alone = {0, 189};
  const size_t c = 64;
  const vec q = normal(340 * c, 1), k = normal(340 * c, 2), v = normal(340 * c, 3);
  for (const std::string &isa : isas())
    for (const reach &r : reaches) {
      const vec all = run_attention(isa, q, k, v, cu, 2, c, 0.2f, 1, r);
      for (const int threads : {2, 3, 8}) EXPECT_EQ(run_attention(isa, q, k, v, cu, 2, c, 0.2f, threads, r), all) << isa << show(r);
      const auto cut = [&](const vec &x) { return vec(x.begin() + 151 * c, x.end()); };
      EXPECT_EQ(run_attention(isa, cut(q), cut(k), cut(v), alone, 2, c, 0.2f, 2, r), cut(all)) << isa << show(r);
    }
}

// What q, k and v are made of: floats, or the result of a quantized layer, turned by RoPE or not.
enum class kind { floats, quantized, turned };

vec run_window(const std::string &isa, const vec &x, const std::vector<int32_t> &cu, int window, int threads, kind made,
               rs_profile_row *row = nullptr) {
  const int64_t c = 48, t = static_cast<int64_t>(x.size()) / c;
  setenv("RS_ISA", isa.c_str(), 1);
  rs_session_params p = {};
  p.size = sizeof p;
  p.threads = threads, p.profile = row != nullptr;
  rs_session *s = nullptr;
  EXPECT_EQ(rs_session_create(nullptr, &p, &s), RS_OK) << rs_last_error();
  unsetenv("RS_ISA");
  harness h;
  rs_tensor *in = h.input("x", RS_F32, {RS_DIM_TOKENS, c}, x), *starts = h.input("cu", RS_I32, {RS_DIM_CU_SEQLENS}, cu);
  rs_tensor *qkv =
      rs_linear(h.g, in, h.weight("w", made == kind::floats ? RS_F32 : RS_W8, RS_PANELS, {3 * c, c}, normal(3 * c * c, 4, 0.15f)),
                nullptr, RS_ACT_NONE);
  rs_tensor *qk = rs_columns(h.g, qkv, 0, 2 * c);
  if (made == kind::turned) {
    std::vector<int32_t> positions;
    for (size_t b = 0; b + 1 < cu.size(); b++)
      for (int32_t i = 0; i < cu[b + 1] - cu[b]; i++) positions.push_back(i);
    rs_tensor *table = rs_rope_table(h.g, h.input("positions", RS_I32, {RS_DIM_TOKENS}, positions),
                                     h.weight("f", RS_F32, RS_ROWS, {8}, {1, 0.3f, 0.1f, 0.03f, 0.01f, 3e-3f, 1e-3f, 3e-4f}));
    qk = rs_rope(h.g, qk, table, 6);
  }
  rs_tensor *y = rs_name(h.g,
                         attend(h.g, rs_columns(h.g, qk, 0, c), rs_columns(h.g, qk, c, c), rs_columns(h.g, qkv, 2 * c, c), starts,
                                nullptr, 3, 0.3f, {false, window}),
                         "attn");
  vec got = h.run(s, y, t, static_cast<int64_t>(cu.size()) - 1, x.size());
  for (size_t i = 0; row && i < rs_session_profile_count(s); i++) {
    EXPECT_EQ(rs_session_profile_at(s, i, row), RS_OK);
    if (row->name == std::string("attn")) break;
  }
  rs_session_free(s);
  return got;
}

// Bit for bit: a window as wide as the sequence is none, neither neighbours nor threads matter, and what is out of the window has
// no say.
TEST(flash_attn, a_window_is_all_that_counts) {
  const int64_t c = 48, n = 470;
  const vec x = normal(n * c, 3);
  const auto part = [&](const vec &all, int64_t begin, int64_t end) { return vec(all.begin() + begin * c, all.begin() + end * c); };
  for (const std::string &isa : isas())
    for (const kind made : {kind::floats, kind::quantized, kind::turned}) {
      SCOPED_TRACE(isa + " " + std::to_string(static_cast<int>(made)));
      const vec all = run_window(isa, x, {0, n}, 0, 2, made);
      EXPECT_EQ(run_window(isa, x, {0, n}, n, 2, made), all);
      EXPECT_EQ(run_window(isa, x, {0, n}, INT32_MAX, 3, made), all);
      for (const int window : {1, 40, 64, 130}) {
        SCOPED_TRACE(window);
        const vec seen = run_window(isa, x, {0, n}, window, 1, made);
        EXPECT_NE(seen, all);
        for (const int threads : {2, 5, 16}) EXPECT_EQ(run_window(isa, x, {0, n}, window, threads, made), seen);
        const vec pair = run_window(isa, x, {0, 70, n}, window, 3, made);
        EXPECT_EQ(part(pair, 0, 70), run_window(isa, part(x, 0, 70), {0, 70}, window, 2, made));
        EXPECT_EQ(part(pair, 70, n), run_window(isa, part(x, 70, n), {0, n - 70}, window, 2, made));
        vec other = x;
        for (int64_t i = 200 * c; i < 270 * c; i++) other[static_cast<size_t>(i)] = 50 * x[static_cast<size_t>(i)] + 1;
        const vec changed = run_window(isa, other, {0, n}, window, 2, made);
        // Values that attention takes as bytes have the scale of their block of 128 keys.
        const bool blocks = isa == "avx512vnni" && made != kind::floats;
        const int64_t before = std::max(0, (blocks ? 128 : 184) - window), behind = (blocks ? 384 : 286) + window;
        EXPECT_EQ(part(changed, 0, before), part(seen, 0, before));
        if (behind < n) {
          EXPECT_EQ(part(changed, behind, n), part(seen, behind, n));
        }
        EXPECT_NE(part(changed, 200 - window, 200), part(seen, 200 - window, 200));
        EXPECT_NE(part(changed, 270, 270 + window), part(seen, 270, 270 + window));
      }
    }
}

TEST(flash_attn, a_profile_counts_what_is_seen) {
  const vec x = normal(300 * 48, 3);
  const auto macs = [&](int window) {
    rs_profile_row row = {};
    run_window("", x, {0, 1, 1, 101, 300}, window, 2, kind::floats, &row);
    return row.macs;
  };
  EXPECT_EQ(macs(0), 2.0 * 48 * (1 + 100 * 100 + 199 * 199));
  for (const int window : {1, 5, 99, 100, 150, 300}) {
    double pairs = 0;
    for (const int n : {1, 100, 199})
      for (int i = 0; i < n; i++) pairs += std::min(i, window) + std::min(n - 1 - i, window) + 1;
    EXPECT_EQ(macs(window), 2.0 * 48 * pairs) << window;
  }
}

TEST(flash_attn, a_window_has_room_for_a_neighbour) {
  for (const int window : {0, -1}) {
    harness h;
    rs_tensor *x = h.input("x", RS_F32, {RS_DIM_TOKENS, 8}, vec()),
              *cu = h.input("cu", RS_I32, {RS_DIM_CU_SEQLENS}, std::vector<int32_t>());
    rs_flash_attn_window(h.g, x, x, x, cu, nullptr, 2, 1, window);
    EXPECT_NE(rs_graph_finish(h.g), RS_OK);
    EXPECT_EQ(rs_last_error(), "flash_attn: a window of " + std::to_string(window) + " places, expected at least 1");
  }
}

// ---- rotary positions

// To the nearest f32 of cos and sin of the angle in f32, at every position that models have and beyond.
TEST(rope_table, is_cos_and_sin_to_the_last_bit) {
  vec frequencies;
  for (int i = 0; i < 40; i++) frequencies.push_back(1 / static_cast<float>(std::pow(i < 32 ? 160000.0 : 10000.0, i % 32 / 32.0f)));
  std::vector<int32_t> positions;
  for (int32_t i = 0; i < 9000; i++) positions.push_back(i);
  for (const int32_t far : {65537, 1 << 20, (1 << 24) - 1, -1, -4711}) positions.push_back(far);
  const size_t f = frequencies.size(), n = positions.size();
  for (const std::string &isa : isas()) {
    session s(isa);
    harness h;
    rs_tensor *table = rs_rope_table(h.g, h.input("positions", RS_I32, {RS_DIM_TOKENS}, positions),
                                     h.weight("f", RS_F32, RS_ROWS, {static_cast<int64_t>(f)}, frequencies));
    const vec got = h.run(s.s, table, static_cast<int64_t>(n), 1, n * 2 * f);
    size_t differ = 0;
    for (size_t i = 0; i < n; i++)
      for (size_t j = 0; j < f; j++) {
        const float angle = static_cast<float>(positions[i]) * frequencies[j];
        for (const bool sine : {false, true}) {
          const double exact = sine ? std::sin(double(angle)) : std::cos(double(angle));
          const float wanted = static_cast<float>(exact), y = got[i * 2 * f + j + (sine ? f : 0)];
          differ += y != wanted;
          ASSERT_TRUE(std::fabs(y - exact) <= 6e-8 * std::fabs(exact) + 1e-11) << angle << " " << y << " " << wanted;
        }
      }
    EXPECT_LT(differ, n * f / 1000) << isa;  // where the exact value is all but half-way between two floats
  }
}

// An angle beyond all measure spoils no other.
TEST(rope_table, of_angles_without_end) {
  session s;
  harness h;
  const std::vector<int32_t> positions = {INT32_MIN, 1, INT32_MAX};
  const vec got = h.run(s.s,
                        rs_rope_table(h.g, h.input("positions", RS_I32, {RS_DIM_TOKENS}, positions),
                                      h.weight("f", RS_F32, RS_ROWS, {2}, {3e38f, 0.5f})),
                        3, 1, 12);
  EXPECT_EQ(got[5], static_cast<float>(std::cos(0.5)));
  EXPECT_EQ(got[7], static_cast<float>(std::sin(0.5)));
}

// The rotate-half form, to the bit in every row of kernels.
TEST(rope, turns_pairs_of_columns) {
  for (const auto &[heads, d, half] : std::vector<std::tuple<int, int64_t, int64_t>>{
           {1, 2, 1}, {3, 32, 16}, {2, 64, 32}, {5, 30, 15}, {2, 80, 40}, {4, 64, 10}, {1, 9, 3}}) {
    const int64_t t = 300, c = heads * d;
    const vec x = normal(static_cast<size_t>(t * c), 1), table = normal(static_cast<size_t>(t * 2 * half), 2);
    vec wanted = x;
    for (int64_t i = 0; i < t; i++)
      for (int64_t head = 0; head < heads; head++)
        for (int64_t j = 0; j < half; j++) {
          const auto at = static_cast<size_t>(i * c + head * d + j), other = at + static_cast<size_t>(half),
                     angle = static_cast<size_t>(i * 2 * half + j);
          const float cosine = table[angle], sine = table[angle + static_cast<size_t>(half)];
          wanted[at] = x[at] * cosine - x[other] * sine;
          wanted[other] = x[other] * cosine + x[at] * sine;
        }
    for (const std::string &isa : isas())
      for (const int threads : {1, 3}) {
        session s(isa, threads);
        harness h;
        rs_tensor *in = h.input("x", RS_F32, {RS_DIM_TOKENS, c}, x),
                  *rows = h.input("table", RS_F32, {RS_DIM_TOKENS, 2 * half}, table);
        EXPECT_EQ(h.run(s.s, rs_rope(h.g, in, rows, heads), t, 1, wanted.size()), wanted) << isa << " " << d << " " << half;
      }
  }
}

// Columns of a wider tensor, inside of a chain: what is behind them stays as it was.
TEST(rope, of_columns) {
  const int64_t t = 200, c = 24;
  const vec x = normal(t * c, 1), table = normal(t * 8, 2);
  vec results[2];
  for (const bool keep : {false, true}) {
    session s;
    harness h;
    rs_tensor *in = h.input("x", RS_F32, {RS_DIM_TOKENS, c}, x), *rows = h.input("table", RS_F32, {RS_DIM_TOKENS, 8}, table);
    rs_tensor *wide = rs_linear(h.g, in, h.weight("w", RS_F32, RS_PANELS, {3 * c, c}, normal(3 * c * c, 3)), nullptr, RS_ACT_NONE);
    if (keep) rs_output(h.g, wide);
    rs_tensor *turned = rs_rope(h.g, rs_columns(h.g, wide, 0, 2 * c), rows, 6);
    if (keep) rs_output(h.g, turned);
    rs_tensor *y = rs_add(h.g, rs_columns(h.g, turned, c, c), rs_columns(h.g, wide, 2 * c, c));
    results[keep] = h.run(s.s, y, t, 1, t * c);
  }
  EXPECT_EQ(results[0], results[1]);
}

TEST(rope, refuses_what_does_not_fit) {
  const auto error_of = [](int64_t c, int64_t columns, int heads) {
    harness h;
    rs_rope(h.g, h.input("x", RS_F32, {RS_DIM_TOKENS, c}, vec()), h.input("table", RS_F32, {RS_DIM_TOKENS, columns}, vec()), heads);
    EXPECT_NE(rs_graph_finish(h.g), RS_OK);
    return std::string(rs_last_error());
  };
  EXPECT_NE(error_of(32, 17, 2).find("'x' [T,32] by 'table' [T,17]: expected a row of at most 16 columns"), std::string::npos);
  EXPECT_NE(error_of(32, 18, 2).find("at most 16 columns"), std::string::npos);
  EXPECT_NE(error_of(32, 16, 3).find("3 heads do not divide 32"), std::string::npos);
  EXPECT_NE(error_of(32, 16, 0).find("0 heads do not divide 32"), std::string::npos);
  harness h;
  rs_rope_table(h.g, h.input("positions", RS_F32, {RS_DIM_TOKENS}, vec()), h.weight("f", RS_F32, RS_ROWS, {2}, vec(2)));
  EXPECT_NE(rs_graph_finish(h.g), RS_OK);
  EXPECT_NE(std::string(rs_last_error()).find("positions 'positions' is f32"), std::string::npos) << rs_last_error();
}

// A query of one row a sequence, which is the same for all: what attention with that row in front of the keys' own queries gives.
TEST(attn_pool, is_attention_of_one_query) {
  const std::vector<int32_t> cu = {0, 1, 1, 40, 340};
  for (const auto &[heads, c] : std::vector<std::pair<int, int64_t>>{{1, 32}, {3, 96}, {2, 14}})
    for (const bool sized : {false, true}) {
      const auto width = static_cast<size_t>(c);
      const vec k = normal(340 * width, 2), v = normal(340 * width, 3), query = normal(width, 1, 2);
      vec sizes(340);
      for (size_t i = 0; i < sizes.size(); i++) sizes[i] = static_cast<float>(1 + i % 5);
      session s;
      harness h;
      rs_tensor *q = h.weight("query", RS_F32, RS_ROWS, {c}, query), *keys = h.input("k", RS_F32, {RS_DIM_TOKENS, c}, k),
                *values = h.input("v", RS_F32, {RS_DIM_TOKENS, c}, v), *starts = h.input("cu", RS_I32, {RS_DIM_CU_SEQLENS}, cu),
                *counts = sized ? h.input("sizes", RS_F32, {RS_DIM_TOKENS, 1}, sizes) : nullptr;
      const vec got = h.run(s.s, rs_attn_pool(h.g, q, keys, values, starts, counts, heads, 0.3f), 340, 4, 4 * width);
      vec wanted(4 * width);
      const size_t d = width / static_cast<size_t>(heads);
      for (size_t b = 0; b < 4; b++)
        for (size_t head = 0; head < static_cast<size_t>(heads); head++) {
          std::vector<double> weights;
          double sum = 0;
          for (auto i = static_cast<size_t>(cu[b]); i < static_cast<size_t>(cu[b + 1]); i++) {
            double dot = 0;
            for (size_t j = 0; j < d; j++) dot += double(query[head * d + j]) * k[i * width + head * d + j];
            weights.push_back(std::exp(dot * double(0.3f)) * (sized ? double(sizes[i]) : 1));
            sum += weights.back();
          }
          for (size_t j = 0; j < d; j++) {
            double y = 0;
            for (size_t i = 0; i < weights.size(); i++)
              y += weights[i] / sum * v[(static_cast<size_t>(cu[b]) + i) * width + head * d + j];
            wanted[b * width + head * d + j] = static_cast<float>(y);
          }
        }
      expect_close(got, wanted, 1e-5f);  // sums of 300 f32 products of size 1
    }
}

TEST(gate, is_the_activation_of_one_half_times_the_other) {
  for (const std::string &isa : isas())
    for (const int64_t f : {1, 16, 24, 70}) {
      const auto n = static_cast<size_t>(f);
      const vec x = normal(300 * 2 * n, 1, 3);
      session s(isa);
      harness h;
      const vec got = h.run(s.s, rs_gate(h.g, h.input("x", RS_F32, {RS_DIM_TOKENS, 2 * f}, x), RS_ACT_SILU), 300, 1, 300 * n);
      for (size_t i = 0; i < 300; i++)
        for (size_t j = 0; j < n; j++) {
          const double a = x[i * 2 * n + j], wanted = a / (1 + std::exp(-a)) * x[i * 2 * n + n + j];
          ASSERT_TRUE(std::fabs(got[i * n + j] - wanted) <= 1e-5) << isa << " " << f;  // silu within 3 ULP of values below 50
        }
    }
  harness h;
  rs_gate(h.g, h.input("x", RS_F32, {RS_DIM_TOKENS, 5}, vec()), RS_ACT_SILU);
  EXPECT_NE(rs_graph_finish(h.g), RS_OK);
  EXPECT_NE(std::string(rs_last_error()).find("no two halves"), std::string::npos) << rs_last_error();
}

TEST(embed, every_type_of_table) {
  const int64_t rows = 11, c = 70;
  const vec table = normal(rows * c, 1);
  const std::vector<int32_t> ids = {10, 0, 3, 3, 7};
  for (rs_type type : {RS_F32, RS_F16, RS_W8, RS_W4}) {
    session s;
    harness h;
    rs_tensor *in = h.input("ids", RS_I32, {RS_DIM_TOKENS}, ids);
    const vec y = h.run(s.s, rs_embed(h.g, in, h.weight("table", type, RS_ROWS, {rows, c}, table)), 5, 1, ids.size() * c);
    vec decoded(table.size());
    const int64_t shape[] = {rows, c};
    ASSERT_EQ(rs_tensor_decode(type, RS_ROWS, 2, shape, h.weights[0]->p, decoded.data(), decoded.size()), RS_OK);
    for (size_t i = 0; i < ids.size(); i++)
      for (int64_t j = 0; j < c; j++) ASSERT_EQ(y[i * c + static_cast<size_t>(j)], decoded[static_cast<size_t>(ids[i] * c + j)]);
  }
}

TEST(embed, an_id_outside_of_the_table_is_an_error) {
  for (int32_t bad : {-1, 3, 1 << 30})
    for (const auto &[tokens, at] : {std::pair(3, 1), std::pair(700, 500)}) {  // the position is of the batch, not of a block
      session s;
      harness h;
      std::vector<int32_t> ids(static_cast<size_t>(tokens), 1);
      ids[static_cast<size_t>(at)] = bad;
      rs_tensor *y =
          rs_embed(h.g, h.input("ids", RS_I32, {RS_DIM_TOKENS}, ids), h.weight("table", RS_F32, RS_ROWS, {3, 4}, vec(12)));
      rs_output(h.g, y);
      ASSERT_EQ(rs_graph_finish(h.g), RS_OK);
      EXPECT_EQ(rs_graph_run(s.s, h.g, tokens, 1, h.bindings.data(), 1), RS_ERR_ARGUMENT);
      const std::string wanted = "id " + std::to_string(bad) + " at position " + std::to_string(at) + " ";
      EXPECT_NE(std::string(rs_last_error()).find(wanted), std::string::npos) << rs_last_error();
    }
}

// The first tokens left out: the same as of a text that never had them.
TEST(pool, skips_the_first_tokens) {
  const int64_t c = 5;
  const std::vector<int32_t> cu = {0, 3, 3, 5, 16}, without = {0, 1, 1, 1, 10};
  const vec x = normal(16 * c, 1), sizes = [&] {
    vec s(16);
    for (size_t i = 0; i < s.size(); i++) s[i] = static_cast<float>(1 + i % 3);
    return s;
  }();
  const auto cut = [&](const vec &all, int64_t width) {
    vec rest;
    for (size_t b = 0; b < 4; b++)
      for (int32_t i = cu[b] + 2; i < cu[b + 1]; i++)
        rest.insert(rest.end(), all.begin() + i * width, all.begin() + (i + 1) * width);
    return rest;
  };
  const auto pool = [&](const vec &rows, const vec &weights, const std::vector<int32_t> &starts, rs_pooling pooling, int skip) {
    session s;
    harness h;
    rs_tensor *in = h.input("x", RS_F32, {RS_DIM_TOKENS, c}, rows), *at = h.input("cu", RS_I32, {RS_DIM_CU_SEQLENS}, starts);
    const bool mean = pooling == RS_POOL_MEAN || pooling == RS_POOL_MEAN_SQRT_LEN;
    rs_tensor *sz = mean ? h.input("sizes", RS_F32, {RS_DIM_TOKENS, 1}, weights) : nullptr;
    return h.run(s.s, rs_pool(h.g, in, at, sz, pooling, skip), starts.back(), 4, 4 * c);
  };
  for (int pooling = RS_POOL_MEAN; pooling <= RS_POOL_LAST; pooling++)
    EXPECT_EQ(pool(x, sizes, cu, static_cast<rs_pooling>(pooling), 2),
              pool(cut(x, c), cut(sizes, 1), without, static_cast<rs_pooling>(pooling), 0))
        << rs_pooling_name(static_cast<rs_pooling>(pooling));
}

TEST(pool, skipping_more_than_there_is_gives_zeros) {
  const std::vector<int32_t> cu = {0, 2, 4};
  for (int pooling = RS_POOL_MEAN; pooling <= RS_POOL_LAST; pooling++)
    for (const int skip : {2, 3, INT32_MAX}) {
      session s;
      harness h;
      rs_tensor *in = h.input("x", RS_F32, {RS_DIM_TOKENS, 3}, normal(12, 1)), *at = h.input("cu", RS_I32, {RS_DIM_CU_SEQLENS}, cu);
      EXPECT_EQ(h.run(s.s, rs_pool(h.g, in, at, nullptr, static_cast<rs_pooling>(pooling), skip), 4, 2, 6), vec(6)) << skip;
    }
}

// Wherever it is among the tokens.
TEST(pool, nan_shows) {
  for (int pooling = RS_POOL_MEAN; pooling <= RS_POOL_WEIGHTED_MEAN; pooling++)
    for (size_t i = 0; i < 3; i++) {
      if (pooling == RS_POOL_CLS && i > 0) continue;
      vec x = {1, 2, 3};
      x[i] = NAN;
      session s;
      harness h;
      rs_tensor *in = h.input("x", RS_F32, {RS_DIM_TOKENS, 1}, x),
                *at = h.input("cu", RS_I32, {RS_DIM_CU_SEQLENS}, std::vector<int32_t>{0, 3});
      const vec y = h.run(s.s, rs_pool(h.g, in, at, nullptr, static_cast<rs_pooling>(pooling), 0), 3, 1, 1);
      EXPECT_TRUE(std::isnan(y[0])) << rs_pooling_name(static_cast<rs_pooling>(pooling)) << " " << i;
    }
}

TEST(pool, every_way_matches_its_definition) {
  const int64_t c = 5;
  const std::vector<int32_t> cu = {0, 3, 3, 4, 11};
  const vec x = normal(11 * c, 1);
  for (int pooling = RS_POOL_MEAN; pooling <= RS_POOL_LAST; pooling++) {
    session s;
    harness h;
    rs_tensor *in = h.input("x", RS_F32, {RS_DIM_TOKENS, c}, x), *starts = h.input("cu", RS_I32, {RS_DIM_CU_SEQLENS}, cu);
    const vec y = h.run(s.s, rs_pool(h.g, in, starts, nullptr, static_cast<rs_pooling>(pooling), 0), 11, 4, 4 * c);
    for (size_t b = 0; b < 4; b++)
      for (int64_t j = 0; j < c; j++) {
        const int32_t begin = cu[b], n = cu[b + 1] - begin;
        double sum = 0, weighted = 0, most = -INFINITY;
        for (int32_t i = 0; i < n; i++) {
          const double v = x[static_cast<size_t>((begin + i) * c + j)];
          sum += v, weighted += v * (i + 1), most = std::max(most, v);
        }
        double wanted = 0;
        if (n) switch (pooling) {
            case RS_POOL_MEAN:
              wanted = sum / n;
              break;
            case RS_POOL_CLS:
              wanted = x[static_cast<size_t>(begin * c + j)];
              break;
            case RS_POOL_MAX:
              wanted = most;
              break;
            case RS_POOL_MEAN_SQRT_LEN:
              wanted = sum / std::sqrt(n);
              break;
            case RS_POOL_WEIGHTED_MEAN:
              wanted = weighted / (n * (n + 1) / 2);
              break;
            case RS_POOL_LAST:
              wanted = x[static_cast<size_t>((begin + n - 1) * c + j)];
              break;
          }
        ASSERT_TRUE(std::fabs(y[b * c + static_cast<size_t>(j)] - wanted) <= 1e-6)
            << rs_pooling_name(static_cast<rs_pooling>(pooling)) << " sequence " << b;
      }
  }
}

TEST(add, adds) {
  session s;
  harness h;
  const vec a = normal(3 * 7, 1), b = normal(3 * 7, 2);
  rs_tensor *x = h.input("a", RS_F32, {RS_DIM_TOKENS, 7}, a), *y = h.input("b", RS_F32, {RS_DIM_TOKENS, 7}, b);
  const vec sum = h.run(s.s, rs_add(h.g, x, y), 3, 1, 21);
  for (size_t i = 0; i < sum.size(); i++) EXPECT_EQ(sum[i], a[i] + b[i]);
}

TEST(l2_normalize, rows_have_length_one_and_zeros_stay) {
  session s;
  harness h;
  vec x = normal(3 * 9, 1);
  std::fill(x.begin() + 9, x.begin() + 18, 0.0f);
  const vec y = h.run(s.s, rs_l2_normalize(h.g, h.input("x", RS_F32, {RS_DIM_TOKENS, 9}, x)), 3, 1, x.size());
  for (size_t i = 0; i < 3; i++) {
    double sum = 0;
    for (size_t j = 0; j < 9; j++) sum += double(y[i * 9 + j]) * y[i * 9 + j];
    EXPECT_TRUE(std::fabs(sum - (i == 1 ? 0 : 1)) < 1e-6);
  }
}

// The list of operators and this file: an operator that is added must get a test here.  Those from "shift" on are for
// test_drop.cpp.
TEST(graph, every_operator_has_a_test) {
  const std::map<std::string, const char *> tested = {{"embed", "embed"},
                                                      {"add", "add"},
                                                      {"linear", "linear"},
                                                      {"layer_norm", "layer_norm"},
                                                      {"flash_attn", "flash_attn"},
                                                      {"attn_pool", "attn_pool"},
                                                      {"gate", "gate"},
                                                      {"rope_table", "rope_table"},
                                                      {"rope", "rope"},
                                                      {"pool", "pool"},
                                                      {"l2_normalize", "l2_normalize"}};
  size_t n = 0;
  for (; rs_op_name(n) != std::string("shift"); n++) {
    const auto it = tested.find(rs_op_name(n));
    ASSERT_NE(it, tested.end()) << rs_op_name(n) << " has no test";
    bool found = false;
    const auto *unit = testing::UnitTest::GetInstance();
    for (int i = 0; i < unit->total_test_suite_count(); i++) found |= std::string(unit->GetTestSuite(i)->name()) == it->second;
    EXPECT_TRUE(found) << it->second;
  }
  EXPECT_EQ(n, tested.size());
}

// A chain whose intermediate results share memory gives the same as one that keeps them all.
TEST(graph, memory_is_shared_only_between_tensors_that_do_not_meet) {
  const int64_t c = 24, t = 1037;
  const vec x = normal(t * c, 1);
  vec results[2];
  size_t arena[2];
  for (bool keep : {false, true}) {
    session s;
    harness h;
    rs_tensor *in = h.input("x", RS_F32, {RS_DIM_TOKENS, c}, x), *y = in, *before = in;
    for (int i = 0; i < 8; i++) {
      rs_tensor *next = rs_linear(h.g, y,
                                  h.weight(("w" + std::to_string(i)).c_str(), RS_F32, RS_PANELS, {c, c},
                                           normal(c * c, static_cast<unsigned>(10 + i), 0.2f)),
                                  nullptr, RS_ACT_TANH);
      if (keep) rs_output(h.g, next);
      next = rs_add(h.g, next, before);
      if (keep) rs_output(h.g, next);
      before = y, y = next;
    }
    results[keep] = h.run(s.s, y, t, 1, t * c);
    arena[keep] = rs_session_arena_bytes(s.s);
  }
  EXPECT_EQ(results[0], results[1]);
  EXPECT_LT(arena[0] * 3, arena[1]);
}

double rms(const vec &a, const vec &b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); i++) sum += (double(a[i]) - b[i]) * (double(a[i]) - b[i]);
  return std::sqrt(sum / static_cast<double>(a.size()));
}

// Attention of quantized layers may be coarser than f32, but by less than their own noise.  bf16 rounds q, k, p and v by 0.1 %
// (RMS), the layers' own rounding of inputs and weights changes q, k and v by four times that: what it adds is held to a third of
// what the layers add, which makes their noise 5 % larger (they are independent: sqrt(1 + 1 / 9)).  Bytes round q, k and v by steps
// of 1/127 of the largest among their neighbours, of normal values by 0.5 to 0.8 %: what they add is held to what the layers add.
TEST(flash_attn, of_quantized_layers_adds_little_to_their_noise) {
  std::map<std::string, double> coarse;  // rows whose attention is not that of floats, and how much they may add
  for (const std::string &isa : isas()) {
    if (isa == "amx") coarse[isa] = 1.0 / 3;
    if (isa == "avx512vnni") coarse[isa] = 1;
  }
  if (coarse.empty()) GTEST_SKIP() << "no row of this CPU has attention of its own for quantized layers";
  for (const auto &size : {std::pair<int64_t, int>(64, 2), {48, 3}, {160, 2}, {300, 2}})
    for (const std::vector<int32_t> &cu : {std::vector<int32_t>{0, 1, 18, 50}, {0, 64, 200}, {0, 300}, {0, 700}})
      for (const reach &r : reaches)
        for (const float sigma : {0.05f, 0.2f}) {  // scores of 1 and of 15
          const int64_t c = size.first, t = cu.back(), b = static_cast<int64_t>(cu.size()) - 1;
          const vec x = normal(static_cast<size_t>(t * c), 3), weights = normal(static_cast<size_t>(3 * c * c), 4, sigma);
          const auto run = [&](const char *isa, rs_type type) {
            session s(isa);
            harness h;
            rs_tensor *in = h.input("x", RS_F32, {RS_DIM_TOKENS, c}, x);
            rs_tensor *starts = h.input("cu", RS_I32, {RS_DIM_CU_SEQLENS}, cu);
            rs_tensor *qkv = rs_linear(h.g, in, h.weight("w", type, RS_PANELS, {3 * c, c}, weights), nullptr, RS_ACT_NONE);
            rs_tensor *y = attend(h.g, rs_columns(h.g, qkv, 0, c), rs_columns(h.g, qkv, c, c), rs_columns(h.g, qkv, 2 * c, c),
                                  starts, nullptr, size.second, 0.3f, r);
            return h.run(s.s, y, t, b, static_cast<size_t>(t * c));
          };
          const vec exact = run("scalar", RS_F32), wanted = run("scalar", RS_W8);
          const double noise = rms(wanted, exact);
          for (const auto &[isa, most] : coarse) {
            const double added = rms(run(isa.c_str(), RS_W8), wanted);
            EXPECT_TRUE(added <= noise * most) << isa << " heads " << size.second << " c " << c << " t " << t << " sigma " << sigma
                                               << show(r) << ": " << added << ", the layers " << noise;
          }
        }
}

// As sizes say: a key that stands for three tokens is as three keys.
TEST(flash_attn, of_quantized_layers_counts_sizes) {
  const int64_t c = 64;
  const vec x = normal(200 * c, 3), weights = normal(3 * c * c, 4, 0.1f);
  const auto run = [&](const std::string &isa, const vec &rows, const vec *sizes) {
    const auto t = static_cast<int64_t>(rows.size()) / c;
    session s(isa);
    harness h;
    rs_tensor *in = h.input("x", RS_F32, {RS_DIM_TOKENS, c}, rows);
    rs_tensor *starts = h.input("cu", RS_I32, {RS_DIM_CU_SEQLENS}, std::vector<int32_t>{0, static_cast<int32_t>(t)});
    rs_tensor *counts = sizes ? h.input("sizes", RS_F32, {RS_DIM_TOKENS, 1}, *sizes) : nullptr;
    rs_tensor *qkv = rs_linear(h.g, in, h.weight("w", RS_W8, RS_PANELS, {3 * c, c}, weights), nullptr, RS_ACT_NONE);
    rs_tensor *y = rs_flash_attn(h.g, rs_columns(h.g, qkv, 0, c), rs_columns(h.g, qkv, c, c), rs_columns(h.g, qkv, 2 * c, c),
                                 starts, counts, 2, 0.3f);
    return h.run(s.s, y, t, 1, rows.size());
  };
  vec thrice, sizes;
  for (size_t i = 0; i < 200; i++) {
    sizes.push_back(i % 3 ? 1.0f : 3.0f);
    for (int n = 0; n < (i % 3 ? 1 : 3); n++)
      thrice.insert(thrice.end(), x.begin() + static_cast<int64_t>(i) * c, x.begin() + static_cast<int64_t>(i + 1) * c);
  }
  for (const std::string &isa : isas()) {
    const vec got = run(isa, x, &sizes), all = run(isa, thrice, nullptr);
    size_t row = 0;
    for (size_t i = 0; i < 200; row += i % 3 ? 1 : 3, i++)
      for (size_t j = 0; j < static_cast<size_t>(c); j++)
        // Values are near 1, of up to 4: p in 8 bits, or v in steps of 4/127.
        ASSERT_TRUE(std::fabs(got[i * 64 + j] - all[row * 64 + j]) <= (isa == "avx512vnni" ? 0.03f : 0.01f)) << isa << " " << i;
  }
}

// Bit for bit: neither neighbours nor threads matter, sizes of 1 are as none, and keys that a query does not see weigh nothing.
TEST(flash_attn, of_quantized_layers_depends_on_nothing_else) {
  const int64_t c = 96;
  const vec x = normal(700 * c, 3), weights = normal(3 * c * c, 4, 0.1f);
  const auto run = [&](const std::string &isa, const vec &rows, const std::vector<int32_t> &cu, const reach &r, bool sized,
                       int threads) {
    const auto t = static_cast<int64_t>(rows.size()) / c;
    session s(isa, threads);
    harness h;
    rs_tensor *in = h.input("x", RS_F32, {RS_DIM_TOKENS, c}, rows), *starts = h.input("cu", RS_I32, {RS_DIM_CU_SEQLENS}, cu);
    rs_tensor *ones = sized ? h.input("sizes", RS_F32, {RS_DIM_TOKENS, 1}, vec(static_cast<size_t>(t), 1)) : nullptr;
    rs_tensor *qkv = rs_linear(h.g, in, h.weight("w", RS_W8, RS_PANELS, {3 * c, c}, weights), nullptr, RS_ACT_NONE);
    rs_tensor *y = attend(h.g, rs_columns(h.g, qkv, 0, c), rs_columns(h.g, qkv, c, c), rs_columns(h.g, qkv, 2 * c, c), starts, ones,
                          3, 0.3f, r);
    return h.run(s.s, y, t, static_cast<int64_t>(cu.size()) - 1, rows.size());
  };
  const auto part = [&](const vec &all, int64_t begin, int64_t end) { return vec(all.begin() + begin * c, all.begin() + end * c); };
  for (const std::string &isa : isas())
    for (const reach &r : reaches) {
      const vec all = run(isa, x, {0, 45, 380, 700}, r, false, 2);
      EXPECT_EQ(run(isa, x, {0, 45, 380, 700}, r, false, 1), all) << isa << show(r);
      EXPECT_EQ(run(isa, x, {0, 45, 380, 700}, r, true, 3), all) << isa << show(r);
      EXPECT_EQ(run(isa, part(x, 45, 380), {0, 335}, r, false, 3), part(all, 45, 380)) << isa << show(r);
      if (r.causal) {  // of whole blocks of 128 keys, whose scale values have that attention takes as bytes
        const vec some = run(isa, part(x, 45, 195), {0, 150}, r, false, 2);
        EXPECT_EQ(part(some, 0, 128), part(all, 45, 173)) << isa;
        if (isa != "avx512vnni") {
          EXPECT_EQ(some, part(all, 45, 195)) << isa;
        }
      }
    }
}

// q, k and v as they are given, [t][c] each, out of a quantized layer that hands its inputs on: their bits are 8 a row, and then
// what `bias` adds to k.
vec attend_given(const std::string &isa, const vec &q, const vec &k, const vec &v, int64_t c, float scale, float bias = 0) {
  const auto t = static_cast<int64_t>(q.size()) / c;
  vec rows, identity(static_cast<size_t>(9 * c * c)), biases(static_cast<size_t>(3 * c));
  for (int64_t i = 0; i < t; i++)
    for (const vec *x : {&q, &k, &v}) rows.insert(rows.end(), x->begin() + i * c, x->begin() + (i + 1) * c);
  for (int64_t i = 0; i < 3 * c; i++) identity[static_cast<size_t>(i * 3 * c + i)] = 1;
  std::fill(biases.begin() + c, biases.begin() + 2 * c, bias);
  session s(isa);
  harness h;
  rs_tensor *in = h.input("x", RS_F32, {RS_DIM_TOKENS, 3 * c}, rows);
  rs_tensor *starts = h.input("cu", RS_I32, {RS_DIM_CU_SEQLENS}, std::vector<int32_t>{0, static_cast<int32_t>(t)});
  rs_tensor *qkv = rs_linear(h.g, in, h.weight("w", RS_W8, RS_PANELS, {3 * c, 3 * c}, identity),
                             h.weight("b", RS_F32, RS_ROWS, {3 * c}, biases), RS_ACT_NONE);
  rs_tensor *y = rs_flash_attn(h.g, rs_columns(h.g, qkv, 0, c), rs_columns(h.g, qkv, c, c), rs_columns(h.g, qkv, 2 * c, c), starts,
                               nullptr, 1, scale);
  return h.run(s.s, y, t, 1, static_cast<size_t>(t * c));
}

// One key has a thousand times the weight of each other: rounded by itself to a byte, each other would be nothing.
TEST(flash_attn, of_quantized_layers_adds_up_small_weights) {
  const int64_t c = 32, n = 128;
  vec q(n * c, 1), k(n * c, 0), v(n * c, -1);
  std::fill(k.begin(), k.begin() + c, 1.0f), std::fill(v.begin(), v.begin() + c, 1.0f);
  const double others = (n - 1) / 1000.0, wanted = (1 - others) / (1 + others);
  for (const std::string &isa : isas()) {
    const vec y = attend_given(isa, q, k, v, c, std::log(1000.0f) / c);
    // 127 * 0.2545 steps of a byte, of which the last of four may be left over; a hundredth in the power for 8 bits of q and k.
    for (const float got : y) ASSERT_NEAR(got, wanted, 0.02) << isa;
  }
}

// What all keys have in common changes no weight, and takes no bits from what they differ by.
TEST(flash_attn, of_quantized_layers_does_not_see_what_keys_have_in_common) {
  const int64_t c = 32, n = 300;
  const vec q = normal(n * c, 1), k = normal(n * c, 2, 0.3f), v = normal(n * c, 3);
  for (const std::string &isa : isas()) {
    const vec plain = attend_given(isa, q, k, v, c, 1);
    // Keys near 3 are bf16 in steps of 1/64, and the rest of them, of up to 1.3, bytes in steps of 1/98: 0.0062 of results of 0.19.
    // Bytes of all of it, in steps of 1/29, would make that 0.0108.
    EXPECT_LE(rms(attend_given(isa, q, k, v, c, 1, 3), plain), 0.0085) << isa;
  }
}

// Scores of up to 10^5: the weights are 1 and 0.
TEST(flash_attn, of_quantized_layers_takes_large_scores) {
  const int64_t c = 32, n = 300;
  vec q(n * c, 100), k(n * c), v = normal(n * c, 3);
  for (int64_t i = 0; i < n; i++) std::fill(k.begin() + i * c, k.begin() + (i + 1) * c, static_cast<float>(i % 97) - 60);
  const vec exact = attend_given("scalar", q, k, v, c, 1);
  for (const std::string &isa : isas()) {
    const vec y = attend_given(isa, q, k, v, c, 1);
    // Of values a step is 1/127 of the largest of a column, of up to 4.
    EXPECT_LE(largest_error(y, exact), 0.03) << isa;
  }
}

// A token that is not a number, or infinite, makes no number of what sees it, and leaves other sequences alone.
TEST(flash_attn, of_quantized_layers_keeps_nan) {
  const int64_t c = 64, t = 330, at = 150;
  const std::vector<int32_t> cu = {0, 30, 330};
  const vec x = normal(t * c, 3), weights = normal(3 * c * c, 4, 0.1f);
  for (const std::string &isa : isas())
    for (const reach &r : reaches) {
      const auto run = [&](float value) {
        session s(isa);
        harness h;
        vec rows = x;
        if (value != 0) rows[at * c + 5] = value;
        rs_tensor *in = h.input("x", RS_F32, {RS_DIM_TOKENS, c}, rows), *starts = h.input("cu", RS_I32, {RS_DIM_CU_SEQLENS}, cu);
        rs_tensor *qkv = rs_linear(h.g, in, h.weight("w", RS_W8, RS_PANELS, {3 * c, c}, weights), nullptr, RS_ACT_NONE);
        rs_tensor *y = attend(h.g, rs_columns(h.g, qkv, 0, c), rs_columns(h.g, qkv, c, c), rs_columns(h.g, qkv, 2 * c, c), starts,
                              nullptr, 2, 0.3f, r);
        return h.run(s.s, y, t, 2, static_cast<size_t>(t * c));
      };
      const vec wanted = run(0);
      for (const float value : {std::nanf(""), INFINITY}) {
        const vec got = run(value);
        for (int64_t i = 0; i < t; i++) {
          const bool sees = i >= 30 && (!r.causal || i >= at) && (r.window == 0 || std::abs(i - at) <= r.window);
          for (int64_t j = 0; j < c; j++) {
            const auto k = static_cast<size_t>(i * c + j);
            if (i < 30) {
              ASSERT_EQ(got[k], wanted[k]) << isa << show(r) << " row " << i;
            }
            if (sees) {
              ASSERT_TRUE(std::isnan(got[k])) << isa << show(r) << " row " << i << " column " << j << ": " << got[k];
            }
          }
        }
      }
    }
}

// Bit for bit: q, k and v that somebody else reads too are f32, where they would else be what attention, and scores by it, round
// them to.
TEST(flash_attn, of_quantized_layers_rounds_the_same_wherever_it_does) {
  const auto t = int64_t(333);
  const std::vector<int32_t> cu = {0, 1, 34, 333};
  enum reader { attention, sums_of_columns, of_first_queries };
  for (const std::string &isa : isas())
    for (const rs_type type : {RS_W8, RS_W4})
      for (const auto &size :
           {std::pair<int64_t, int>(64, 2), {60, 3}, {40, 5}, {128, 1}})  // 60: 120 and 60 channels, a part of a panel
        for (const int threads : {1, 3}) {
          const int64_t c = size.first;
          const vec x = normal(static_cast<size_t>(t * c), 3);
          // q and k in one tensor, v in another; kept & 1: the first is read by others, kept & 2: the second.
          const auto run = [&](const std::string &kernels, reader reads, int kept) {
            session s(kernels, threads);
            harness h;
            rs_tensor *in = h.input("x", RS_F32, {RS_DIM_TOKENS, c}, x), *starts = h.input("cu", RS_I32, {RS_DIM_CU_SEQLENS}, cu);
            const auto linear = [&](const char *name, int64_t n, unsigned seed) {
              rs_tensor *bias =
                  h.weight((std::string(name) + ".bias").c_str(), RS_F32, RS_ROWS, {n}, normal(static_cast<size_t>(n), seed));
              return rs_linear(h.g, in, h.weight(name, type, RS_PANELS, {n, c}, normal(static_cast<size_t>(n * c), seed + 1, 0.1f)),
                               bias, RS_ACT_NONE);
            };
            rs_tensor *qk = linear("qk", 2 * c, 5), *v = linear("v", c, 7);
            if (kept & 1) rs_output(h.g, qk);
            if (kept & 2) rs_output(h.g, rs_add(h.g, v, v));
            rs_tensor *q = rs_columns(h.g, qk, 0, c), *k = rs_columns(h.g, qk, c, c);
            rs_tensor *y = reads == attention
                               ? rs_flash_attn(h.g, q, k, v, starts, nullptr, size.second, 0.3f)
                               : rs_attn_colsum(h.g, q, k, starts, nullptr, size.second, 0.3f, reads == of_first_queries);
            return h.run(s.s, y, t, 3, static_cast<size_t>(reads == attention ? t * c : t));
          };
          for (const reader reads : {attention, sums_of_columns, of_first_queries}) {
            const vec all = run(isa, reads, 3);
            for (int kept = 0; kept < 3; kept++)
              EXPECT_EQ(run(isa, reads, kept), all) << isa << " " << rs_type_name(type) << " " << c << " " << reads << kept;
            // Values of q and k have the variance 1 + c / 100 and are rounded to bf16, by 2^-9 at most and evenly: a score, of d
            // products times 0.3, is off by 4.5 deviations of that among 600,000; so is a weight, of itself, and the sum under it.
            const auto d = static_cast<float>(c / size.second), variance = 1 + 0.01f * static_cast<float>(c);
            const float off = 2 * 4.5f * 0.3f * std::sqrt(d * 2 / 3) * variance / 512;
            const vec exact = run("scalar", reads, 0);
            for (size_t i = 0; reads != attention && i < all.size(); i++)
              ASSERT_LE(std::fabs(all[i] - exact[i]), off * exact[i]) << isa << " " << c << " " << reads << " at " << i;
          }
        }
}

// Blocks of rows are at different operators of a chain at one time: what one block still reads must not be another's result. `wide`
// would fit where `narrow` was, whose rows lie closer together: its first rows would hit those that later blocks have yet to read.
TEST(graph, blocks_of_a_chain_do_not_write_over_each_other) {
  const int64_t c = 32, t = 700;
  const vec x = normal(t * c, 1);
  const std::vector<int32_t> cu = {0, 100, 350, 700};
  const auto columns = [&](harness &h, rs_tensor *from, int64_t i) { return rs_columns(h.g, from, i * c, c); };
  for (int threads : {1, 3}) {
    vec results[2];
    for (bool keep : {false, true}) {
      session s("", threads);
      harness h;
      rs_tensor *in = h.input("x", RS_F32, {RS_DIM_TOKENS, c}, x), *starts = h.input("cu", RS_I32, {RS_DIM_CU_SEQLENS}, cu);
      const auto linear = [&](const char *name, rs_tensor *from, int64_t out) {
        return rs_linear(h.g, from, h.weight(name, RS_W8, RS_PANELS, {out, c}, normal(static_cast<size_t>(out * c), 2, 0.2f)),
                         nullptr, RS_ACT_NONE);
      };
      rs_tensor *narrow = linear("narrow", in, c);
      rs_tensor *mixed = rs_flash_attn(h.g, in, in, in, starts, nullptr, 2, 0.25f);
      rs_tensor *wide = linear("wide", rs_add(h.g, narrow, mixed), 3 * c);
      for (rs_tensor *kept : {narrow, mixed, wide})
        if (keep) rs_output(h.g, kept);
      rs_tensor *y = rs_flash_attn(h.g, columns(h, wide, 0), columns(h, wide, 1), columns(h, wide, 2), starts, nullptr, 2, 0.25f);
      results[keep] = h.run(s.s, y, t, 3, t * c);
    }
    EXPECT_EQ(results[0], results[1]) << threads << " threads";
  }
}

// Columns of what exists a block at a time.
TEST(graph, views_inside_of_a_chain) {
  const int64_t c = 20, t = 300;
  const vec x = normal(t * c, 1);
  vec results[2];
  for (bool keep : {false, true}) {
    session s;
    harness h;
    rs_tensor *in = h.input("x", RS_F32, {RS_DIM_TOKENS, c}, x);
    rs_tensor *w = h.weight("w", RS_F32, RS_PANELS, {3 * c, c}, normal(3 * c * c, 2));
    rs_tensor *three = rs_linear(h.g, in, w, nullptr, RS_ACT_NONE);
    if (keep) rs_output(h.g, three);
    rs_tensor *y = rs_add(h.g, rs_columns(h.g, three, c, c), rs_columns(h.g, rs_columns(h.g, three, c, 2 * c), c, c));
    results[keep] = h.run(s.s, y, t, 1, t * c);
  }
  EXPECT_EQ(results[0], results[1]);
}

// What lives until when, and what is as wide as its readers take it, is settled when the graph is finished.
TEST(graph, a_finished_graph_gets_no_further_output) {
  const int64_t c = 16;
  session s;
  harness h;
  rs_tensor *x = h.input("x", RS_F32, {RS_DIM_TOKENS, c}, normal(c, 1)), *middle = rs_add(h.g, x, x), *end = rs_add(h.g, middle, x);
  EXPECT_EQ(rs_name(h.g, middle, "middle"), middle);
  EXPECT_EQ(rs_name(h.g, middle, "middle"), middle) << "it is its own";
  const vec wanted = h.run(s.s, end, 1, 1, c);
  EXPECT_EQ(rs_output(h.g, end), end) << "it is one";
  EXPECT_EQ(rs_output(h.g, middle), nullptr);
  EXPECT_EQ(std::string(rs_last_error()), "output 'middle': the graph is finished");
  // No builder that fails changes what works.
  EXPECT_EQ(rs_name(h.g, end, "z"), nullptr);
  EXPECT_STREQ(rs_last_error(), "name 'z': the graph is finished");
  EXPECT_EQ(rs_add(h.g, x, nullptr), nullptr);
  EXPECT_EQ(rs_input(h.g, "more", RS_I32, 1, &c), nullptr);
  EXPECT_STREQ(rs_last_error(), "the graph is finished: nothing can be added");
  EXPECT_EQ(rs_graph_finish(h.g), RS_OK) << rs_last_error();
  EXPECT_EQ(rs_output(h.g, end), end) << rs_last_error();
  EXPECT_EQ(h.again(s.s, end, 1, 1, c), wanted);
}

// The next graph may lie where the last one did.
TEST(graph, a_session_forgets_a_freed_graph) {
  session s;
  for (int depth : {1, 12, 2, 30}) {
    harness h;
    const vec x = normal(40 * 8, 1);
    rs_tensor *in = h.input("x", RS_F32, {RS_DIM_TOKENS, 8}, x), *y = in;
    for (int i = 0; i < depth; i++) y = rs_add(h.g, y, in);
    const vec got = h.run(s.s, y, 40, 1, 40 * 8);
    for (size_t i = 0; i < got.size(); i++) ASSERT_TRUE(std::fabs(got[i] - float(depth + 1) * x[i]) <= 1e-5f * float(depth)) << i;
  }
}

TEST(graph, one_plan_serves_changing_sizes) {
  const int64_t c = 20;
  const vec w = normal(c * c, 1);
  session s;
  harness h;
  const vec x = normal(50 * c, 2);
  rs_tensor *in = h.input("x", RS_F32, {RS_DIM_TOKENS, c}, x);
  rs_tensor *y = rs_linear(h.g, in, h.weight("w", RS_W8, RS_PANELS, {c, c}, w), nullptr, RS_ACT_NONE);
  const vec all = h.run(s.s, y, 50, 1, 50 * c);
  for (int64_t t : {3, 50, 0, 1, 49}) {
    h.bindings[0].bytes = static_cast<size_t>(t * c) * 4;
    EXPECT_EQ(h.again(s.s, y, t, 1, static_cast<size_t>(t * c)), vec(all.begin(), all.begin() + t * c)) << t;
  }
}

TEST(graph, errors_name_what_was_wrong) {
  const auto error_of = [](const std::function<void(harness &)> &build) {
    harness h;
    build(h);
    const rs_status status = rs_graph_finish(h.g);
    EXPECT_NE(status, RS_OK);
    return std::string(rs_last_error());
  };
  const auto x = [](harness &h, int64_t c) { return h.input("x", RS_F32, {RS_DIM_TOKENS, c}, vec()); };
  const auto contains = [](const std::string &text, const char *part) { EXPECT_NE(text.find(part), std::string::npos) << text; };

  contains(error_of([&](harness &h) { x(h, 4); }), "no output");
  contains(error_of([&](harness &h) {
             rs_linear(h.g, x(h, 4), h.weight("w", RS_F32, RS_PANELS, {3, 5}, vec(15)), nullptr, RS_ACT_NONE);
           }),
           "'x' [T,4] times 'w' [3,5]");
  contains(error_of([&](harness &h) {
             rs_linear(h.g, x(h, 5), h.weight("w", RS_F32, RS_ROWS, {3, 5}, vec(15)), nullptr, RS_ACT_NONE);
           }),
           "panels");
  contains(error_of([&](harness &h) { rs_linear(h.g, nullptr, nullptr, nullptr, RS_ACT_NONE); }), "input 0 is NULL");
  contains(error_of([&](harness &h) {
             rs_add(h.g, x(h, 4), h.input("y", RS_F32, {RS_DIM_TOKENS, 5}, vec()));
           }),
           "'x' [T,4] and 'y' [T,5] differ");
  contains(error_of([&](harness &h) { rs_columns(h.g, x(h, 4), 3, 2); }), "2 columns from 3 on of 'x' [T,4]");
  contains(error_of([&](harness &h) { rs_columns(h.g, x(h, 4), INT64_MAX, INT64_MAX); }), "9223372036854775807 on of 'x'");
  contains(error_of([&](harness &h) { x(h, 4), x(h, 4); }), "two tensors of the graph are named 'x'");
  contains(error_of([&](harness &h) { rs_shift(h.g, x(h, 4), nullptr, static_cast<rs_distance>(7)); }),
           "shift: distance is 7, expected 0 to 1");
  contains(error_of([&](harness &h) {
             rs_tensor *a = x(h, 10), *cu = h.input("cu", RS_I32, {RS_DIM_CU_SEQLENS}, std::vector<int32_t>());
             rs_flash_attn(h.g, a, a, a, cu, nullptr, 3, 1);
           }),
           "3 heads do not divide 10");
  for (const float scale : {0.0f, -1.0f, NAN, INFINITY})
    contains(error_of([&](harness &h) {
               rs_tensor *a = x(h, 10), *cu = h.input("cu", RS_I32, {RS_DIM_CU_SEQLENS}, std::vector<int32_t>());
               rs_flash_attn_causal(h.g, a, a, a, cu, nullptr, 2, scale);
             }),
             "expected a positive one");
  contains(error_of([&](harness &h) { rs_weight(h.g, "w", 1, nullptr); }), "no model");
  // What goes by the bounds of sequences has a row a token.
  const auto starts = [](harness &h) { return h.input("cu", RS_I32, {RS_DIM_CU_SEQLENS}, std::vector<int32_t>()); };
  for (const int64_t rows : {int64_t(RS_DIM_SEQUENCES), int64_t(7)}) {
    const auto y = [&](harness &h) { return h.input("y", RS_F32, {rows, 4}, vec()); };
    const std::string got = "'y' is [" + std::string(rows == 7 ? "7" : "B") + ",4], expected a row a token";
    contains(error_of([&](harness &h) {
               rs_tensor *a = y(h);
               rs_flash_attn(h.g, a, a, a, starts(h), nullptr, 2, 1);
             }),
             got.c_str());
    contains(error_of([&](harness &h) {
               rs_tensor *a = y(h);
               rs_attn_colsum(h.g, a, a, starts(h), nullptr, 2, 1, false);
             }),
             got.c_str());
    contains(error_of([&](harness &h) {
               rs_tensor *a = y(h);
               rs_attn_pool(h.g, h.weight("q", RS_F32, RS_ROWS, {4}, vec(4)), a, a, starts(h), nullptr, 2, 1);
             }),
             got.c_str());
    contains(error_of([&](harness &h) { rs_pool(h.g, y(h), starts(h), nullptr, RS_POOL_MEAN, 0); }), got.c_str());
    contains(error_of([&](harness &h) { rs_centre_distance(h.g, y(h), starts(h)); }), got.c_str());
  }
  for (const int act : {-1, 99}) {
    contains(error_of([&](harness &h) {
               rs_linear(h.g, x(h, 5), h.weight("w", RS_F32, RS_PANELS, {3, 5}, vec(15)), nullptr, static_cast<rs_activation>(act));
             }),
             ("linear: activation " + std::to_string(act)).c_str());
    contains(error_of([&](harness &h) { rs_gate(h.g, x(h, 4), static_cast<rs_activation>(act)); }),
             ("gate: activation " + std::to_string(act)).c_str());
  }
  contains(error_of([&](harness &h) { h.input("x", RS_F32, {int64_t(1) << 31, int64_t(1) << 31}, vec()); }), "rows of more than");
  harness other;
  rs_tensor *foreign = x(other, 4);
  contains(error_of([&](harness &h) { rs_columns(h.g, foreign, 0, 2); }), "'x' belongs to another graph");
  contains(error_of([&](harness &h) { rs_output(h.g, foreign); }), "'x' belongs to another graph");
  contains(error_of([&](harness &h) { rs_name(h.g, foreign, "z"); }), "'x' belongs to another graph");
  contains(error_of([&](harness &h) { rs_input(h.g, "x", RS_W8, 1, nullptr); }), "is w8");
  const int64_t shape[] = {1, 1};
  contains(error_of([&](harness &h) { rs_constant(h.g, "c", RS_F32, RS_ROWS, 2, shape, nullptr); }), "constant 'c' is NULL");
  contains(error_of([&](harness &h) { rs_token_drop(h.g, x(h, 1), nullptr, nullptr, nullptr); }), "rule is NULL");
  EXPECT_EQ(rs_token_starts(nullptr, foreign), nullptr);
}

TEST(graph, bindings_are_checked) {
  session s;
  harness h;
  const vec x = normal(3 * 4, 1);
  const std::vector<int32_t> cu = {0, 3};
  rs_tensor *in = h.input("x", RS_F32, {RS_DIM_TOKENS, 4}, x), *starts = h.input("cu", RS_I32, {RS_DIM_CU_SEQLENS}, cu);
  rs_tensor *y = rs_pool(h.g, in, starts, nullptr, RS_POOL_MEAN, 0);
  EXPECT_EQ(rs_graph_run(s.s, h.g, 3, 1, h.bindings.data(), 2), RS_ERR_ARGUMENT);  // not finished
  rs_output(h.g, y);
  ASSERT_EQ(rs_graph_finish(h.g), RS_OK);
  EXPECT_EQ(rs_graph_run(s.s, h.g, 3, 1, h.bindings.data(), 2), RS_OK) << rs_last_error();  // an output need not be bound
  EXPECT_EQ(rs_graph_run(s.s, h.g, 3, 1, h.bindings.data(), 1), RS_ERR_ARGUMENT);
  EXPECT_STREQ(rs_last_error(), "input 'cu' is not bound");
  EXPECT_EQ(rs_graph_run(s.s, h.g, 4, 1, h.bindings.data(), 2), RS_ERR_ARGUMENT);
  EXPECT_STREQ(rs_last_error(), "'x' has 48 bytes, expected 64");
  EXPECT_EQ(rs_graph_run(s.s, h.g, -1, 1, h.bindings.data(), 2), RS_ERR_ARGUMENT);
  const std::vector<std::vector<int32_t>> wrong = {{1, 3}, {0, 2}, {0, 4}, {-1, 3}};
  for (std::vector<int32_t> bad : wrong) {
    rs_binding b[] = {h.bindings[0], {starts, bad.data(), 8}};
    EXPECT_EQ(rs_graph_run(s.s, h.g, 3, 1, b, 2), RS_ERR_ARGUMENT);
    EXPECT_STREQ(rs_last_error(), "'cu' must rise from 0 to 3");
  }
  std::vector<int32_t> falls = {0, 3, 1, 3};
  rs_binding b[] = {h.bindings[0], {starts, falls.data(), 16}};
  EXPECT_EQ(rs_graph_run(s.s, h.g, 3, 3, b, 2), RS_ERR_ARGUMENT);
  // Nothing at all may be NULL, and what is not there may not.
  std::vector<int32_t> none = {0, 0};
  rs_binding empty[] = {{in, nullptr, 0}, {starts, none.data(), 8}};
  EXPECT_EQ(rs_graph_run(s.s, h.g, 0, 1, empty, 2), RS_OK) << rs_last_error();
  vec out(4);
  rs_binding twice[] = {h.bindings[0], h.bindings[1], {y, out.data(), 16}, h.bindings[0]};
  EXPECT_EQ(rs_graph_run(s.s, h.g, 3, 1, twice, 4), RS_ERR_ARGUMENT);
  EXPECT_STREQ(rs_last_error(), "'x' is bound twice");
  twice[3] = twice[2];
  rs_name(h.g, y, "y");
  EXPECT_EQ(rs_graph_run(s.s, h.g, 3, 1, twice, 4), RS_ERR_ARGUMENT);
  EXPECT_NE(std::string(rs_last_error()).find("is bound twice"), std::string::npos) << rs_last_error();
  rs_binding missing[] = {{in, nullptr, 48}, h.bindings[1]};
  EXPECT_EQ(rs_graph_run(s.s, h.g, 3, 1, missing, 2), RS_ERR_ARGUMENT);
  EXPECT_STREQ(rs_last_error(), "'x' is bound to NULL");
}

// RS_TEST_ISAS: the rows that must be there, for builds that are meant to run a certain one.
TEST(session, rows_of_kernels_are_those_expected) {
  std::string names;
  for (const std::string &isa : isas()) {
    names += (names.empty() ? "" : " ") + isa;
    setenv("RS_ISA", isa.c_str(), 1);
    EXPECT_EQ(rs_isa(), isa);
    unsetenv("RS_ISA");
  }
  printf("rows of kernels: %s\n", names.c_str());
  EXPECT_EQ(isas().back(), "scalar");
  EXPECT_EQ(names, env_or("RS_TEST_ISAS", names));
}

TEST(session, rs_isa_is_obeyed) {
  setenv("RS_ISA", "scalar", 1);
  EXPECT_STREQ(rs_isa(), "scalar");
  setenv("RS_ISA", "warp-drive", 1);
  rs_session *s;
  EXPECT_EQ(rs_session_create(nullptr, nullptr, &s), RS_ERR_UNSUPPORTED);
  EXPECT_NE(std::string(rs_last_error()).find("RS_ISA=warp-drive: this build on this CPU has"), std::string::npos);
  unsetenv("RS_ISA");
  EXPECT_STREQ(rs_isa(), rs_isa_available(0));
}

TEST(session, threads_follow_the_environment) {
  rs_session *s;
  rs_session_params p = {};
  p.size = sizeof p;
  setenv("OMP_NUM_THREADS", "1", 1);
  ASSERT_EQ(rs_session_create(nullptr, &p, &s), RS_OK);
  EXPECT_EQ(rs_session_threads(s), 1);
  rs_session_free(s);
  unsetenv("OMP_NUM_THREADS");
  // One CPU of affinity leaves one thread.
  cpu_set_t before, one;
  ASSERT_EQ(sched_getaffinity(0, sizeof before, &before), 0);
  CPU_ZERO(&one);
  for (int i = 0; i < CPU_SETSIZE; i++)
    if (CPU_ISSET(i, &before)) {
      CPU_SET(i, &one);
      break;
    }
  ASSERT_EQ(sched_setaffinity(0, sizeof one, &one), 0);
  ASSERT_EQ(rs_session_create(nullptr, &p, &s), RS_OK);
  EXPECT_EQ(rs_session_threads(s), 1);
  rs_session_free(s);
  sched_setaffinity(0, sizeof before, &before);
  p.threads = 2000;
  EXPECT_EQ(rs_session_create(nullptr, &p, &s), RS_ERR_ARGUMENT);
  p.threads = -1;
  EXPECT_EQ(rs_session_create(nullptr, &p, &s), RS_ERR_ARGUMENT);
  p.size = 0;
  EXPECT_EQ(rs_session_create(nullptr, &p, &s), RS_ERR_ARGUMENT);
}

// The allocator hook sees every activation byte, and gets all of it back.
TEST(session, the_allocator_hook_is_used) {
  struct counter {
    size_t now = 0, calls = 0;
  } count;
  const rs_allocator hook = {[](void *ctx, size_t bytes, size_t align) {
                               auto *c = static_cast<counter *>(ctx);
                               c->now += bytes, c->calls++;
                               return std::aligned_alloc(align, (bytes + align - 1) / align * align);
                             },
                             [](void *ctx, void *p, size_t bytes) {
                               static_cast<counter *>(ctx)->now -= bytes;
                               std::free(p);
                             },
                             &count};
  rs_session_params p = {};
  p.size = sizeof p;
  p.allocator = &hook;
  rs_session *s;
  ASSERT_EQ(rs_session_create(nullptr, &p, &s), RS_OK);
  harness h;
  rs_tensor *in = h.input("x", RS_F32, {RS_DIM_TOKENS, 8}, normal(80, 1));
  h.run(s, rs_l2_normalize(h.g, rs_add(h.g, in, in)), 10, 1, 80);
  EXPECT_EQ(count.now, rs_session_arena_bytes(s));
  EXPECT_GT(count.now, 0u);
  rs_session_free(s);
  EXPECT_EQ(count.now, 0u);

  const rs_allocator refuses = {[](void *, size_t, size_t) -> void * { return nullptr; }, [](void *, void *, size_t) {}, nullptr};
  p.allocator = &refuses;
  ASSERT_EQ(rs_session_create(nullptr, &p, &s), RS_OK);
  EXPECT_EQ(rs_graph_run(s, h.g, 10, 1, h.bindings.data(), 1), RS_ERR_MEMORY);
  rs_session_free(s);
}

}  // namespace
