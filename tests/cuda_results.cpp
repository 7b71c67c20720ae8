// Results of graphs on two libraries of the CUDA backend, for tests/gpu.sh: a card's beside those of the same kernels on the CPU.
// RS_CUDA_LIBRARY is read once a process, so each writes its own and a third run compares.
//
//    cuda_results write FILE      run the graphs on device cuda
//    cuda_results compare A B     integers and what is computed from them alone: the same bits; else within a tolerance
#include "encoding.h"
#include "graph_harness.h"

#include <cstdio>
#include <fstream>

namespace {

constexpr int64_t width = 96, tokens = 430;
const std::vector<int32_t> starts = {0, 1, 70, 70, 103, 230, 430};
constexpr int64_t sequences = 6, channels = 144;

struct result_case {
  const char *name;
  double tolerance;  // of the largest value; 0: the same bits
  rs_tensor *(*build)(harness &h, rs_tensor *x, rs_tensor *cu);
  int64_t cols;
  bool by_sequence;
};

rs_tensor *product(harness &h, rs_tensor *x, rs_type type, rs_activation act) {
  rs_tensor *w = h.weight("w", type, RS_PANELS, {channels, width}, normal(static_cast<size_t>(channels * width), 2, 0.2f));
  return rs_linear(h.g, x, w, h.weight("b", RS_F32, RS_ROWS, {channels}, normal(static_cast<size_t>(channels), 3)), act);
}
rs_tensor *flash(harness &h, rs_tensor *x, rs_tensor *cu) { return rs_flash_attn(h.g, x, x, x, cu, nullptr, 3, 0.2f); }
rs_tensor *normed(harness &h, rs_tensor *x) {
  rs_tensor *gamma = h.weight("g", RS_F32, RS_ROWS, {width}, normal(width, 4));
  return rs_layer_norm(h.g, x, nullptr, gamma, h.weight("n", RS_F32, RS_ROWS, {width}, normal(width, 5)), 1e-5f);
}
// By chance, which is of integers: no last bit decides.
rs_tensor *half_of(harness &h, rs_tensor *cu) {
  rs_drop_rule rule = {};
  rule.ratio = 0.5;
  rule.keep_first = true;
  return rs_token_drop(h.g, rs_position_score(h.g, cu, true, 11), cu, nullptr, &rule);
}
rs_tensor *merged(harness &h, rs_tensor *x, rs_tensor *cu, rs_tensor **sizes, rs_tensor **kept) {
  *kept = half_of(h, cu);
  rs_tensor *assign = rs_token_assign(h.g, x, cu, *kept);
  *sizes = rs_token_sizes(h.g, assign, *kept, cu, nullptr);
  return rs_token_merge(h.g, x, assign, *kept, cu, nullptr, nullptr);
}

const result_case cases[] = {
    {"linear, w8", 0, [](harness &h, rs_tensor *x, rs_tensor *) { return product(h, x, RS_W8, RS_ACT_NONE); }, channels, false},
    {"linear, w8, relu", 0, [](harness &h, rs_tensor *x, rs_tensor *) { return product(h, x, RS_W8, RS_ACT_RELU); }, channels,
     false},
    {"linear, w4", 0, [](harness &h, rs_tensor *x, rs_tensor *) { return product(h, x, RS_W4, RS_ACT_NONE); }, channels, false},
    {"linear, w8, gelu", 1e-6, [](harness &h, rs_tensor *x, rs_tensor *) { return product(h, x, RS_W8, RS_ACT_GELU); }, channels,
     false},
    {"linear, f32", 1e-5, [](harness &h, rs_tensor *x, rs_tensor *) { return product(h, x, RS_F32, RS_ACT_NONE); }, channels,
     false},
    {"linear, f16", 1e-5, [](harness &h, rs_tensor *x, rs_tensor *) { return product(h, x, RS_F16, RS_ACT_SILU); }, channels,
     false},
    {"add", 0, [](harness &h, rs_tensor *x, rs_tensor *) { return rs_add(h.g, x, rs_add(h.g, x, x)); }, width, false},
    {"gate", 1e-6, [](harness &h, rs_tensor *x, rs_tensor *) { return rs_gate(h.g, x, RS_ACT_GELU); }, width / 2, false},
    {"layer_norm", 1e-6, [](harness &h, rs_tensor *x, rs_tensor *) { return normed(h, x); }, width, false},
    {"flash_attn", 1e-3, flash, width, false},
    {"attn_colsum", 1e-3,
     [](harness &h, rs_tensor *x, rs_tensor *cu) { return rs_attn_colsum(h.g, x, x, cu, nullptr, 3, 0.2f, false); }, 1, false},
    {"attn_colsum of class tokens", 1e-5,
     [](harness &h, rs_tensor *x, rs_tensor *cu) { return rs_attn_colsum(h.g, x, x, cu, nullptr, 3, 0.2f, true); }, 1, false},
    {"attn_pool", 1e-5,
     [](harness &h, rs_tensor *x, rs_tensor *cu) {
       return rs_attn_pool(h.g, h.weight("q", RS_F32, RS_ROWS, {width}, normal(width, 6)), x, x, cu, nullptr, 4, 0.3f);
     },
     width, true},
    {"pool", 0, [](harness &h, rs_tensor *x, rs_tensor *cu) { return rs_pool(h.g, x, cu, nullptr, RS_POOL_MEAN, 0); }, width, true},
    {"l2_normalize", 1e-6, [](harness &h, rs_tensor *x, rs_tensor *) { return rs_l2_normalize(h.g, x); }, width, false},
    {"shift", 1e-6, [](harness &h, rs_tensor *x, rs_tensor *) { return rs_shift(h.g, x, normed(h, x), RS_DISTANCE_COS); }, 1,
     false},
    {"centre_distance", 1e-6, [](harness &h, rs_tensor *x, rs_tensor *cu) { return rs_centre_distance(h.g, x, cu); }, 1, false},
    {"position_score", 0, [](harness &h, rs_tensor *, rs_tensor *cu) { return rs_position_score(h.g, cu, true, 7); }, 1, false},
    {"standardize", 1e-6,
     [](harness &h, rs_tensor *, rs_tensor *cu) { return rs_standardize(h.g, rs_position_score(h.g, cu, true, 7), cu, 1); }, 1,
     false},
    {"token_drop, token_gather, token_restore", 0,
     [](harness &h, rs_tensor *x, rs_tensor *cu) {
       rs_tensor *kept = half_of(h, cu), *fewer = rs_token_gather(h.g, x, kept);
       return rs_token_restore(h.g, rs_add(h.g, fewer, fewer), x, kept);
     },
     width, false},
    // Sums of sizes are of whole numbers.
    {"token_assign, token_sizes", 0,
     [](harness &h, rs_tensor *x, rs_tensor *cu) {
       rs_tensor *sizes, *kept;
       (void)merged(h, x, cu, &sizes, &kept);
       return rs_pool(h.g, sizes, rs_token_starts(h.g, kept), nullptr, RS_POOL_MEAN, 0);
     },
     1, true},
    {"token_merge", 1e-5,
     [](harness &h, rs_tensor *x, rs_tensor *cu) {
       rs_tensor *sizes, *kept, *y = merged(h, x, cu, &sizes, &kept);
       return rs_pool(h.g, y, rs_token_starts(h.g, kept), sizes, RS_POOL_MEAN, 0);
     },
     width, true},
    // f16 between them, where only attention reads a product.
    {"linear, flash_attn, linear, layer_norm", 2e-2,
     [](harness &h, rs_tensor *x, rs_tensor *cu) {
       rs_tensor *w = h.weight("v", RS_W8, RS_PANELS, {width, width}, normal(width * width, 8, 0.2f));
       rs_tensor *v = rs_linear(h.g, x, w, nullptr, RS_ACT_NONE);
       return normed(h, rs_linear(h.g, flash(h, v, cu), w, nullptr, RS_ACT_NONE));
     },
     width, false},
};

int write(const char *path) {
  std::ofstream out(path, std::ios::binary);
  auto p = sized<rs_session_params>();
  p.device = "cuda";
  rs_session *s = nullptr;
  if (rs_session_create(nullptr, &p, &s) != RS_OK) {
    std::printf("%s\n", rs_last_error());
    return 1;
  }
  for (const result_case &c : cases) {
    harness h;
    rs_tensor *x = h.input("x", RS_F32, {RS_DIM_TOKENS, width}, normal(static_cast<size_t>(tokens * width), 1));
    rs_tensor *cu = h.input("cu", RS_I32, {RS_DIM_CU_SEQLENS}, starts);
    const vec y =
        h.run(s, c.build(h, x, cu), tokens, sequences, static_cast<size_t>((c.by_sequence ? sequences : tokens) * c.cols));
    out.write(reinterpret_cast<const char *>(y.data()), static_cast<std::streamsize>(y.size() * sizeof(float)));
  }
  rs_session_free(s);
  return out.good() ? 0 : 1;
}

int compare(const char *a_path, const char *b_path) {
  const std::string a = read_file(a_path), b = read_file(b_path);
  size_t at = 0;
  int wrong = 0;
  for (const result_case &c : cases) {
    const auto n = static_cast<size_t>((c.by_sequence ? sequences : tokens) * c.cols);
    vec x(n), y(n);
    if (std::min(a.size(), b.size()) < at + n * sizeof(float)) {
      std::printf("a file is too short\n");
      return 1;
    }
    memcpy(x.data(), a.data() + at, n * sizeof(float));
    memcpy(y.data(), b.data() + at, n * sizeof(float));
    at += n * sizeof(float);
    size_t other = 0;
    double apart = 0, most = 0;
    for (size_t i = 0; i < n; i++) {
      uint32_t x_bits, y_bits;
      memcpy(&x_bits, &x[i], sizeof x_bits);
      memcpy(&y_bits, &y[i], sizeof y_bits);
      other += x_bits != y_bits;
      apart = larger_or_nan(apart, std::fabs(static_cast<double>(x[i]) - static_cast<double>(y[i])));
      most = std::max(most, std::fabs(static_cast<double>(y[i])));
    }
    const bool good = c.tolerance == 0 ? other == 0 : apart <= c.tolerance * most;
    wrong += !good;
    const std::string wanted = c.tolerance == 0 ? "none" : "at most " + std::to_string(c.tolerance);
    std::printf("%-42s %6zu values, %6zu of other bits, at most %.1e of the largest apart (%s): %s\n", c.name, n, other,
                most > 0 ? apart / most : apart, wanted.c_str(), good ? "passed" : "FAILED");
  }
  return wrong != 0;
}

}  // namespace

int main(int argc, char **argv) {
  ::testing::InitGoogleTest(&argc, argv);  // the harness says what is wrong by its macros
  const std::string what = argc > 1 ? argv[1] : "";
  int status = 2;
  if (what == "write" && argc == 3) status = write(argv[2]);
  else if (what == "compare" && argc == 4) status = compare(argv[2], argv[3]);
  else std::printf("usage: cuda_results write FILE | compare A B\n");
  const ::testing::TestResult &all = ::testing::UnitTest::GetInstance()->ad_hoc_test_result();
  return status == 0 && all.Failed() ? 1 : status;
}
