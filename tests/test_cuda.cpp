// Graphs and models on the CUDA backend, by the API alone: kernels run on the CPU (cuda_host.h), in a library that RS_CUDA_LIBRARY
// names.  The kernels have tests of their own, test_cuda_*.cpp.
#include "cli_util.h"
#include "cuda_device.h"
#include "graph_harness.h"
#include "tiny_bert.h"
#include "tiny_dinov2.h"

#include <set>

namespace {

const ::testing::Environment *const environment = ::testing::AddGlobalTestEnvironment(new host_environment(""));

struct device_session {
  rs_session *s = nullptr;
  explicit device_session(const char *device, bool profile = false) {
    auto p = sized<rs_session_params>();
    p.device = device;
    p.profile = profile;
    p.threads = 2;
    // What a card is held against has attention in floats: other rows of kernels may be coarser behind quantized layers.
    const bool on_cpu = device == std::string("cpu");
    if (on_cpu) setenv("RS_ISA", "scalar", 1);
    EXPECT_EQ(rs_session_create(nullptr, &p, &s), RS_OK) << rs_last_error();
    if (on_cpu) unsetenv("RS_ISA");
  }
  ~device_session() { rs_session_free(s); }
  device_session(const device_session &) = delete;
};

// ------------------------------------------------------------------------------------------------ devices

TEST(device, names) {
  for (const char *bad : {"gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:0 ", "CUDA"}) {
    auto info = sized<rs_device_info>();
    EXPECT_EQ(rs_device_get_info(bad, &info), RS_ERR_ARGUMENT) << bad;
    EXPECT_NE(std::string(rs_last_error()).find("expected cpu, cuda, cuda:N or auto"), std::string::npos) << rs_last_error();
  }
  auto info = sized<rs_device_info>();
  EXPECT_EQ(rs_device_get_info("cuda:7", &info), RS_ERR_NOT_FOUND);
  EXPECT_NE(std::string(rs_last_error()).find("cuda:7: this machine has 1 such device"), std::string::npos) << rs_last_error();
  for (const char *good : {"cuda", "cuda:0", "auto"}) {
    ASSERT_EQ(rs_device_get_info(good, &info), RS_OK) << rs_last_error();
    EXPECT_STREQ(info.device, "cuda:0");
    EXPECT_GT(info.memory_bytes, 0u);
    EXPECT_GT(info.int8_macs, 0);
    EXPECT_NE(std::string(info.name).find("compute capability 8.0"), std::string::npos) << info.name;
  }
  ASSERT_EQ(rs_device_get_info("cpu", &info), RS_OK);
  EXPECT_STREQ(info.device, "cpu");
  EXPECT_EQ(rs_device_get_info(nullptr, &info), RS_OK);
  EXPECT_STREQ(info.device, "cpu") << "RS_DEVICE is not set";
}

run_result rs_with(const std::vector<std::string> &environment, strings arguments) {
  arguments.insert(arguments.begin(), program());
  run_options options;
  options.env = environment;
  return run(arguments, options);
}

TEST(device, a_missing_library_or_card_is_an_error_that_says_so) {
  const std::string missing = "RS_CUDA_LIBRARY=/nowhere/librs-cuda.so", library = "RS_CUDA_LIBRARY=" + host_library();
  temp_dir dir;
  write_file(dir / "x.rsw", "no weights");
  expect_failure(rs_with({missing}, {"embed", "-m", dir / "x.rsw", "--device", "gpu", "a"}), 2, "wants cpu, cuda, cuda:N or auto");
  const std::string model = model_path("q8");
  if (model.empty()) GTEST_SKIP() << "no minilm-q8.rsw";
  expect_failure(rs_with({missing}, {"embed", "-m", model, "--device", "cuda", "a"}), 1, "/nowhere/librs-cuda.so");
  EXPECT_EQ(rs_with({missing}, {"embed", "-m", model, "--device", "auto", "a"}).code, 0);
  expect_failure(rs_with({library, "RS_CUDA_HOST=devices=0"}, {"embed", "-m", model, "--device", "cuda", "a"}), 1, "device");
  EXPECT_EQ(rs_with({library, "RS_CUDA_HOST=devices=0"}, {"embed", "-m", model, "--device", "auto", "a"}).code, 0);
  // A card that is too old is none for auto.
  expect_failure(rs_with({library, "RS_CUDA_HOST=capability=75"}, {"embed", "-m", model, "--device", "cuda", "a"}), 1,
                 "at least 8.0 is needed");
  EXPECT_EQ(rs_with({library, "RS_CUDA_HOST=capability=75"}, {"embed", "-m", model, "--device", "auto", "a"}).code, 0);
  // Nor is one that the library has no code for, or PTX that the driver does not compile.
  for (const char *error : {"98", "209", "221", "222", "223"}) {
    const std::string no_code = std::string("RS_CUDA_HOST=cudaFuncGetAttributes=") + error;
    expect_failure(rs_with({library, no_code}, {"embed", "-m", model, "--device", "cuda", "a"}), 1,
                   "no code for compute capability 8.0");
    EXPECT_EQ(rs_with({library, no_code}, {"embed", "-m", model, "--device", "auto", "a"}).code, 0);
  }
  expect_failure(rs_with({library, "RS_CUDA_HOST=cudaFuncGetAttributes=719"}, {"embed", "-m", model, "--device", "cuda", "a"}), 1,
                 "code: unspecified launch failure");
  expect_failure(rs_with({library, "RS_CUDA_HOST=memory_limit=100000"}, {"embed", "-m", model, "--device", "cuda", "a"}), 1,
                 "bytes for");
  // Another library is none of ours.
  expect_failure(rs_with({"RS_CUDA_LIBRARY=libm.so.6"}, {"embed", "-m", model, "--device", "cuda", "a"}), 1, "not of this version");
}

TEST(device, info_says_where_a_model_runs) {
  const std::string model = model_path("q8");
  if (model.empty()) GTEST_SKIP() << "no minilm-q8.rsw";
  const run_result r = rs_with({"RS_CUDA_LIBRARY=" + host_library()}, {"info", "-m", model, "--device", "auto"});
  EXPECT_EQ(r.code, 0) << r;
  EXPECT_NE(r.out.find("cuda:0"), std::string::npos) << r;
}

TEST(device, no_page_locked_memory_is_an_error) {
  temp_dir dir;
  ASSERT_EQ(tiny_dinov2().convert(dir / "image.rsw", "q8"), RS_OK) << rs_last_error();
  write_file(dir / "a.ppm", pnm_image(40, 30, 1));
  const strings embed = {"embed", "-m", dir / "image.rsw", "--device", "cuda", dir / "a.ppm"};
  const std::string library = "RS_CUDA_LIBRARY=" + host_library();
  EXPECT_EQ(rs_with({library}, embed).code, 0);
  expect_failure(rs_with({library, "RS_CUDA_HOST=pinned_limit=1000"}, embed), 1, "bytes of page-locked memory for inputs");
  expect_failure(rs_with({library, "RS_CUDA_HOST=memory_limit=60000"}, embed), 1, "bytes for");
}

// ------------------------------------------------------------------------------------------------ graphs

// Each operator that the library has, on a card and on the CPU, in graphs of some lengths.
struct graph_case {
  const char *name;
  rs_tensor *(*build)(harness &h, rs_tensor *x, rs_tensor *cu);
  int64_t cols;  // of the result
  bool by_sequence, quantized;
};

constexpr int64_t width = 48;

rs_tensor *weight(harness &h, const char *name, rs_type type, int64_t n, int64_t k, unsigned seed) {
  return h.weight(name, type, RS_PANELS, {n, k}, normal(static_cast<size_t>(n * k), seed, 0.2f));
}
rs_tensor *vector(harness &h, const char *name, int64_t n, unsigned seed) {
  return h.weight(name, RS_F32, RS_ROWS, {n}, normal(static_cast<size_t>(n), seed));
}
rs_tensor *norm(harness &h, rs_tensor *x, rs_tensor *residual, const char *name) {
  return rs_layer_norm(h.g, x, residual, vector(h, (std::string(name) + ".g").c_str(), width, 3),
                       vector(h, (std::string(name) + ".b").c_str(), width, 4), 1e-5f);
}
// A post-norm layer whose products follow norms, so that the backend does several operators at a time.
rs_tensor *layer(harness &h, rs_tensor *x, rs_tensor *cu, rs_type type, rs_tensor **mlp) {
  rs_tensor *qkv = rs_linear(h.g, x, weight(h, "qkv", type, 3 * width, width, 11), vector(h, "qkv.b", 3 * width, 12), RS_ACT_NONE);
  rs_tensor *a = rs_flash_attn(h.g, rs_columns(h.g, qkv, 0, width), rs_columns(h.g, qkv, width, width),
                               rs_columns(h.g, qkv, 2 * width, width), cu, nullptr, 3, 0.25f);
  a = norm(h, rs_linear(h.g, a, weight(h, "o", type, width, width, 13), vector(h, "o.b", width, 14), RS_ACT_NONE), x, "n1");
  rs_tensor *up = rs_linear(h.g, a, weight(h, "up", type, 2 * width, width, 15), nullptr, RS_ACT_GELU);
  *mlp = rs_linear(h.g, up, weight(h, "down", type, width, 2 * width, 16), nullptr, RS_ACT_NONE);
  return norm(h, *mlp, a, "n2");
}
rs_drop_rule half_rule(bool fold = false) {
  rs_drop_rule rule = {};
  rule.ratio = 0.5;
  rule.least = 2;
  rule.keep_first = true;
  rule.fold = fold;
  return rule;
}

const graph_case graph_cases[] = {
    {"post-norm layer, w8",
     [](harness &h, rs_tensor *x, rs_tensor *cu) {
       rs_tensor *m;
       return layer(h, x, cu, RS_W8, &m);
     },
     width, false, true},
    {"post-norm layer, w4",
     [](harness &h, rs_tensor *x, rs_tensor *cu) {
       rs_tensor *m;
       return layer(h, x, cu, RS_W4, &m);
     },
     width, false, true},
    {"post-norm layer, f32",
     [](harness &h, rs_tensor *x, rs_tensor *cu) {
       rs_tensor *m;
       return layer(h, x, cu, RS_F32, &m);
     },
     width, false, false},
    {"post-norm layer, f16",
     [](harness &h, rs_tensor *x, rs_tensor *cu) {
       rs_tensor *m;
       return layer(h, x, cu, RS_F16, &m);
     },
     width, false, false},
    {"residual behind a product, w8",
     [](harness &h, rs_tensor *x, rs_tensor *) {
       rs_tensor *y = rs_linear(h.g, x, weight(h, "w", RS_W8, width, width, 1), vector(h, "b", width, 2), RS_ACT_RELU);
       return rs_add(h.g, x, y);
     },
     width, false, true},
    {"residual behind a product, f32",
     [](harness &h, rs_tensor *x, rs_tensor *) {
       rs_tensor *y = rs_add(h.g, x, x);
       return rs_add(h.g, rs_linear(h.g, y, weight(h, "w", RS_F32, width, width, 1), nullptr, RS_ACT_NONE), y);
     },
     width, false, false},
    // What is done together, where it must not be.
    {"a product that two read",
     [](harness &h, rs_tensor *x, rs_tensor *) {
       rs_tensor *y = rs_linear(h.g, x, weight(h, "w", RS_W8, width, width, 1), nullptr, RS_ACT_NONE);
       return rs_add(h.g, rs_add(h.g, x, y), y);
     },
     width, false, true},
    {"a sum in the place of a product's input",
     [](harness &h, rs_tensor *x, rs_tensor *) {
       // y is wider than the sum, which takes its place, and the sum is of several tiles.
       rs_tensor *a = rs_linear(h.g, x, weight(h, "a", RS_F32, 128, width, 1), nullptr, RS_ACT_NONE);
       rs_tensor *y = rs_linear(h.g, x, weight(h, "y", RS_F32, 192, width, 2), nullptr, RS_ACT_NONE);
       return rs_add(h.g, a, rs_linear(h.g, y, weight(h, "b", RS_F32, 128, 192, 3), nullptr, RS_ACT_NONE));
     },
     128, false, false},
    {"a norm read behind another product",
     [](harness &h, rs_tensor *x, rs_tensor *) {
       rs_tensor *n = norm(h, x, nullptr, "n");
       rs_tensor *a = rs_linear(h.g, rs_add(h.g, x, x), weight(h, "a", RS_W8, width, width, 1), nullptr, RS_ACT_NONE);
       return rs_add(h.g, rs_linear(h.g, n, weight(h, "b", RS_W8, width, width, 2), nullptr, RS_ACT_NONE), a);
     },
     width, false, true},
    {"heads of 4 columns behind a product",
     [](harness &h, rs_tensor *x, rs_tensor *cu) {
       rs_tensor *y = rs_linear(h.g, x, weight(h, "w", RS_F32, width, width, 1), nullptr, RS_ACT_NONE);
       return rs_flash_attn(h.g, y, y, y, cu, nullptr, 12, 0.3f);
     },
     width, false, false},
    {"causal attention",
     [](harness &h, rs_tensor *x, rs_tensor *cu) { return rs_flash_attn_causal(h.g, x, x, x, cu, nullptr, 2, 0.2f); }, width, false,
     false},
    {"embed",
     [](harness &h, rs_tensor *x, rs_tensor *) {
       const int64_t tokens = RS_DIM_TOKENS;
       rs_tensor *ids = rs_input(h.g, "ids", RS_I32, 1, &tokens);
       return rs_add(h.g, x, rs_embed(h.g, ids, h.weight("table", RS_W8, RS_ROWS, {7, width}, normal(7 * width, 8))));
     },
     width, false, false},
    {"gate", [](harness &h, rs_tensor *x, rs_tensor *) { return rs_gate(h.g, x, RS_ACT_SILU); }, width / 2, false, false},
    {"a window over keys turned by RoPE, dropped with their angles",
     [](harness &h, rs_tensor *x, rs_tensor *cu) {
       const int64_t tokens = RS_DIM_TOKENS;
       rs_tensor *positions = rs_input(h.g, "ids", RS_I32, 1, &tokens);
       rs_tensor *table = rs_rope_table(h.g, positions, h.weight("f", RS_F32, RS_ROWS, {6}, {1, 0.5f, 0.2f, 0.1f, 0.05f, 0.02f}));
       const auto attention = [&](const char *name, rs_type type, rs_tensor *in, rs_tensor *angles, rs_tensor *starts, int window) {
         rs_tensor *qkv = rs_linear(h.g, in, weight(h, name, type, 3 * width, width, 11), nullptr, RS_ACT_NONE);
         rs_tensor *qk = rs_rope(h.g, rs_columns(h.g, qkv, 0, 2 * width), angles, 6);
         return rs_flash_attn_window(h.g, rs_columns(h.g, qk, 0, width), rs_columns(h.g, qk, width, width),
                                     rs_columns(h.g, qkv, 2 * width, width), starts, nullptr, 3, 0.3f, window);
       };
       rs_tensor *y = attention("a", RS_W8, x, table, cu, 9);
       const rs_drop_rule rule = half_rule();
       rs_tensor *kept = rs_token_drop(h.g, rs_attn_colsum_window(h.g, x, x, cu, nullptr, 3, 0.2f, false, 7), cu, nullptr, &rule);
       rs_tensor *z = attention("b", RS_F32, rs_token_gather(h.g, rs_add(h.g, x, y), kept), rs_token_gather(h.g, table, kept),
                                rs_token_starts(h.g, kept), 4);
       return rs_token_restore(h.g, z, y, kept);
     },
     width, false, true},
    {"attn_pool",
     [](harness &h, rs_tensor *x, rs_tensor *cu) {
       return rs_attn_pool(h.g, vector(h, "q", width, 1), x, x, cu, nullptr, 4, 0.3f);
     },
     width, true, false},
    {"pool and normalize",
     [](harness &h, rs_tensor *x, rs_tensor *cu) { return rs_l2_normalize(h.g, rs_pool(h.g, x, cu, nullptr, RS_POOL_MEAN, 0)); },
     width, true, false},
    {"score of Representation Shift beside the norm",
     [](harness &h, rs_tensor *x, rs_tensor *cu) {
       rs_tensor *mlp, *y = layer(h, x, cu, RS_W8, &mlp);
       return rs_pool(h.g, y, cu, rs_shift(h.g, mlp, nullptr, RS_DISTANCE_L2), RS_POOL_MEAN, 0);
     },
     width, true, true},
    // By scores of the input: of a layer's result, the last bits may decide between two tokens.
    {"dropped, gathered, restored",
     [](harness &h, rs_tensor *x, rs_tensor *cu) {
       const rs_drop_rule rule = half_rule();
       rs_tensor *kept = rs_token_drop(h.g, rs_shift(h.g, x, nullptr, RS_DISTANCE_L2), cu, nullptr, &rule);
       rs_tensor *mlp, *z = layer(h, rs_token_gather(h.g, x, kept), rs_token_starts(h.g, kept), RS_W8, &mlp);
       return rs_token_restore(h.g, z, x, kept);
     },
     width, false, true},
    {"attention of the class token and of all, position, standardized, merged",
     [](harness &h, rs_tensor *x, rs_tensor *cu) {
       rs_tensor *score = rs_add(h.g, rs_standardize(h.g, rs_attn_colsum(h.g, x, x, cu, nullptr, 2, 0.2f, true), cu, 1),
                                 rs_standardize(h.g, rs_centre_distance(h.g, x, cu), cu, 0.5f));
       score = rs_add(h.g, score, rs_standardize(h.g, rs_attn_colsum(h.g, x, x, cu, nullptr, 2, 0.2f, false), cu, 0.25f));
       score = rs_add(h.g, score, rs_standardize(h.g, rs_position_score(h.g, cu, true, 5), cu, 0.5f));
       const rs_drop_rule rule = half_rule();
       rs_tensor *kept = rs_token_drop(h.g, score, cu, nullptr, &rule), *starts = rs_token_starts(h.g, kept);
       rs_tensor *assign = rs_token_assign(h.g, x, cu, kept), *sizes = rs_token_sizes(h.g, assign, kept, cu, nullptr);
       rs_tensor *y = rs_token_merge(h.g, x, assign, kept, cu, nullptr, nullptr);
       y = rs_flash_attn(h.g, y, y, y, starts, sizes, 2, 0.2f);
       return rs_pool(h.g, y, starts, sizes, RS_POOL_MEAN, 0);
     },
     width, true, false},
    {"folded",
     [](harness &h, rs_tensor *x, rs_tensor *cu) {
       rs_drop_rule rule = half_rule(true);
       rule.lowest = true;
       rs_tensor *score = rs_shift(h.g, x, nullptr, RS_DISTANCE_L1);
       rs_tensor *kept = rs_token_drop(h.g, score, cu, nullptr, &rule), *starts = rs_token_starts(h.g, kept);
       rs_tensor *assign = rs_token_assign(h.g, x, cu, kept), *sizes = rs_token_sizes(h.g, assign, kept, cu, nullptr);
       return rs_pool(h.g, rs_token_merge(h.g, x, assign, kept, cu, nullptr, score), starts, sizes, RS_POOL_MEAN, 0);
     },
     width, true, false},
};

struct built {
  harness h;
  rs_tensor *out = nullptr, *x = nullptr, *cu = nullptr;
  explicit built(const graph_case &c) {
    const int64_t shape[] = {RS_DIM_TOKENS, width}, starts = RS_DIM_CU_SEQLENS;
    x = rs_input(h.g, "x", RS_F32, 2, shape), cu = rs_input(h.g, "cu", RS_I32, 1, &starts);
    out = rs_output(h.g, c.build(h, x, cu));
    EXPECT_EQ(rs_graph_finish(h.g), RS_OK) << rs_last_error();
  }
  vec run(rs_session *s, const graph_case &c, const std::vector<int32_t> &lengths, unsigned seed) {
    std::vector<int32_t> starts = {0};
    for (const int32_t n : lengths) starts.push_back(starts.back() + n);
    vec in = normal(static_cast<size_t>(starts.back()) * width, seed);
    return run(s, c, starts, in);
  }
  vec run(rs_session *s, const graph_case &c, std::vector<int32_t> &starts, vec &in) {
    const int64_t tokens = starts.back(), sequences = static_cast<int64_t>(starts.size()) - 1;
    const size_t floats = static_cast<size_t>((c.by_sequence ? sequences : tokens) * c.cols);
    h.bindings = {{x, in.data(), in.size() * 4}, {cu, starts.data(), starts.size() * 4}};
    std::vector<int32_t> ids(static_cast<size_t>(tokens));
    for (size_t b = 0; b + 1 < starts.size(); b++)  // as positions are: counted from the start of the sequence
      for (int32_t i = starts[b]; i < starts[b + 1]; i++) ids[static_cast<size_t>(i)] = (i - starts[b]) % 7;
    if (rs_tensor *input = rs_graph_tensor(h.g, "ids")) h.bindings.push_back({input, ids.data(), ids.size() * 4});
    return h.again(s, out, tokens, sequences, floats);
  }
};

TEST(graph_on_a_card, agrees_with_the_cpu) {
  const device_session card("cuda"), cpu("cpu", true);
  for (const graph_case &c : graph_cases) {
    SCOPED_TRACE(c.name);
    built b(c);
    for (const std::vector<int32_t> &lengths : {std::vector<int32_t>{5}, {1, 70, 33}, {130}, {64, 3, 1, 20}}) {
      const vec got = b.run(card.s, c, lengths, 1), wanted = b.run(cpu.s, c, lengths, 1);
      ASSERT_EQ(got.size(), wanted.size());
      // Attention on a card has weights and values of 11 bits; quantized layers make steps of what that leaves.
      EXPECT_GE(lowest_cosine(got, wanted, static_cast<size_t>(c.cols)), c.quantized ? 0.999 : 0.9999) << lengths.size();
    }
  }
  // What ran: every operator of the library is in one of the graphs.
  std::set<std::string> ran;
  for (size_t i = 0; i < rs_session_profile_count(cpu.s); i++) {
    rs_profile_row row;
    ASSERT_EQ(rs_session_profile_at(cpu.s, i, &row), RS_OK);
    ran.insert(row.op);
  }
  for (size_t i = 0; rs_op_name(i); i++) EXPECT_EQ(ran.count(rs_op_name(i)), 1u) << rs_op_name(i) << " is in no graph of this test";
}

// Layers that read the same rows, of a norm or not, with scales of inputs of their own and without: rows are quantized for each.
TEST(graph_on_a_card, scales_of_inputs) {
  const device_session card("cuda"), cpu("cpu");
  temp_dir dir;
  tiny_bert tiny;
  tiny.hidden = width;
  for (const char *type : {"q8", "q4"}) {
    ASSERT_EQ(tiny.convert(dir / "plain.rsw", type), RS_OK) << rs_last_error();
    std::map<std::string, vec> scales;
    for (const char *layer : {"blk.0.attn.qkv.weight", "blk.1.attn.qkv.weight"}) {
      vec &scale = scales[layer];
      for (int64_t j = 0; j < width; j++)
        scale.push_back(layer[4] == '0' ? 0.1f * static_cast<float>(1 + j) : 3 / static_cast<float>(1 + j));
    }
    ASSERT_EQ(add_input_scales(dir / "plain.rsw", dir / "scaled.rsw", scales), RS_OK) << rs_last_error();
    const loaded m(dir / "scaled.rsw");
    for (const bool of_norm : {false, true})
      for (const std::vector<std::string> &layers :
           std::vector<std::vector<std::string>>{{"blk.0.attn.qkv", "blk.1.attn.qkv", "blk.0.mlp.up", "blk.0.attn.qkv"},
                                                 {"blk.0.mlp.up", "blk.1.attn.qkv", "blk.1.mlp.up"}}) {
        SCOPED_TRACE(type);
        harness h(m.model);
        rs_tensor *x = h.input("x", RS_F32, {RS_DIM_TOKENS, width}, normal(37 * width, 7)), *y = nullptr;
        if (of_norm) x = norm(h, x, nullptr, "n");
        for (const std::string &layer : layers) {
          const int64_t n = layer.substr(6) == "mlp.up" ? tiny.intermediate : 3 * width, shape[] = {n, width};
          rs_tensor *one = rs_linear(h.g, x, rs_weight(h.g, (layer + ".weight").c_str(), 2, shape), nullptr, RS_ACT_NONE);
          one = rs_columns(h.g, one, 0, width);
          y = y ? rs_add(h.g, y, one) : one;
        }
        const vec wanted = h.run(cpu.s, y, 37, 1, 37 * width), got = h.again(card.s, y, 37, 1, 37 * width);
        EXPECT_GE(lowest_cosine(got, wanted, width), 0.9999) << layers.size() << " " << of_norm;
      }
  }
}

// The second run of a capacity is recorded, the third is the record: other lengths within it, other values.
TEST(graph_on_a_card, recorded_runs_are_as_others) {
  for (const graph_case &c : graph_cases) {
    SCOPED_TRACE(c.name);
    built b(c);
    const device_session kept("cuda");
    unsigned seed = 1;
    for (const std::vector<int32_t> &lengths : {std::vector<int32_t>{60, 4}, {1, 63}, {32, 30}, {64, 1}, {10, 11}, {60, 4}, {7}}) {
      const device_session fresh("cuda");
      ++seed;
      EXPECT_EQ(b.run(kept.s, c, lengths, seed), b.run(fresh.s, c, lengths, seed)) << seed;
    }
  }
}

TEST(graph_on_a_card, sequences_do_not_depend_on_others) {
  const device_session card("cuda");
  for (const graph_case &c : graph_cases) {
    SCOPED_TRACE(c.name);
    built b(c);
    std::vector<int32_t> starts = {0, 9, 80, 81, 150};
    vec in = normal(static_cast<size_t>(starts.back()) * width, 3);
    const vec all = b.run(card.s, c, starts, in);
    for (size_t i = 0; i + 1 < starts.size(); i++) {
      std::vector<int32_t> one = {0, starts[i + 1] - starts[i]};
      vec rows(in.begin() + starts[i] * width, in.begin() + starts[i + 1] * width);
      if (std::string(c.name).find("position") != std::string::npos)
        continue;  // chance depends on the seed and the length alone: below
      const vec got = b.run(card.s, c, one, rows);
      const size_t at = static_cast<size_t>((c.by_sequence ? static_cast<int64_t>(i) : starts[i]) * c.cols);
      EXPECT_EQ(got, vec(all.begin() + static_cast<std::ptrdiff_t>(at), all.begin() + static_cast<std::ptrdiff_t>(at + got.size())))
          << i;
    }
  }
}

TEST(graph_on_a_card, errors_are_those_of_the_cpu) {
  const device_session card("cuda"), cpu("cpu");
  const auto error_of = [&](rs_session *s, bool nan) {
    harness h;
    vec rows(16, 1);
    if (nan) rows[2 * 4 + 1] = NAN;
    rs_tensor *ids = h.input("ids", RS_I32, {RS_DIM_TOKENS}, std::vector<int32_t>{1, 2, nan ? 3 : 9, 0});
    rs_tensor *cu = h.input("cu", RS_I32, {RS_DIM_CU_SEQLENS}, std::vector<int32_t>{0, 1, 4});
    rs_tensor *x = rs_embed(h.g, ids, h.weight("table", RS_F32, RS_ROWS, {4, 4}, vec(16, 1)));
    x = rs_add(h.g, x, h.input("x", RS_F32, {RS_DIM_TOKENS, 4}, rows));
    const rs_drop_rule rule = half_rule();
    rs_tensor *score = rs_name(h.g, rs_shift(h.g, x, nullptr, RS_DISTANCE_L2), "score");
    rs_tensor *kept = rs_token_drop(h.g, score, cu, nullptr, &rule);
    rs_tensor *y =
        rs_output(h.g, rs_pool(h.g, rs_token_gather(h.g, x, kept), rs_token_starts(h.g, kept), nullptr, RS_POOL_MEAN, 0));
    EXPECT_EQ(rs_graph_finish(h.g), RS_OK) << rs_last_error();
    vec out(8);
    h.bindings.push_back({y, out.data(), out.size() * 4});
    EXPECT_NE(rs_graph_run(s, h.g, 4, 2, h.bindings.data(), h.bindings.size()), RS_OK);
    return std::string(rs_last_error());
  };
  for (const bool nan : {false, true}) {
    const std::string said = error_of(cpu.s, nan);
    EXPECT_EQ(error_of(card.s, nan), said);
    EXPECT_NE(said.find(nan ? "NaN" : "id 9 at position 2"), std::string::npos) << said;
  }
  // Heads that no kernel is made for.
  harness h;
  rs_tensor *x = h.input("x", RS_F32, {RS_DIM_TOKENS, 256}, normal(256, 1));
  rs_tensor *cu = h.input("cu", RS_I32, {RS_DIM_CU_SEQLENS}, std::vector<int32_t>{0, 1});
  rs_tensor *y = rs_output(h.g, rs_flash_attn(h.g, x, x, x, cu, nullptr, 1, 1));
  EXPECT_EQ(rs_graph_finish(h.g), RS_OK);
  vec out(256);
  h.bindings.push_back({y, out.data(), out.size() * 4});
  EXPECT_EQ(rs_graph_run(card.s, h.g, 1, 1, h.bindings.data(), h.bindings.size()), RS_ERR_UNSUPPORTED);
  EXPECT_NE(std::string(rs_last_error()).find("heads of 256 columns, at most 128"), std::string::npos) << rs_last_error();
}

// What the backend has no place for is refused, not computed wrong.
TEST(graph_on_a_card, what_it_cannot_run_is_an_error) {
  const device_session card("cuda");
  {
    harness h;
    const int64_t shape[] = {7, 16};
    rs_tensor *x = rs_input(h.g, "x", RS_F32, 2, shape);
    rs_tensor *y = rs_output(h.g, rs_add(h.g, x, x));
    ASSERT_EQ(rs_graph_finish(h.g), RS_OK) << rs_last_error();
    vec in(7 * 16), out(7 * 16);
    const rs_binding all[] = {{x, in.data(), in.size() * 4}, {y, out.data(), out.size() * 4}};
    EXPECT_EQ(rs_graph_run(card.s, h.g, 1, 1, all, 2), RS_ERR_UNSUPPORTED);
    EXPECT_NE(std::string(rs_last_error()).find("[7,16]: on cuda:0, results have a row a token or a sequence"), std::string::npos)
        << rs_last_error();
  }
  harness h;
  rs_tensor *x = h.input("x", RS_F32, {RS_DIM_TOKENS, 16}, normal(4 * 16, 1));
  rs_tensor *a = h.input("a", RS_I32, {RS_DIM_CU_SEQLENS}, std::vector<int32_t>{0, 1, 4});
  rs_tensor *b = h.input("b", RS_I32, {RS_DIM_CU_SEQLENS}, std::vector<int32_t>{0, 3, 4});
  rs_tensor *y = rs_flash_attn(h.g, x, x, x, a, nullptr, 1, 1);
  y = rs_output(h.g, rs_flash_attn(h.g, y, y, y, b, nullptr, 1, 1));
  ASSERT_EQ(rs_graph_finish(h.g), RS_OK) << rs_last_error();
  vec out(4 * 16);
  h.bindings.push_back({y, out.data(), out.size() * 4});
  EXPECT_EQ(rs_graph_run(card.s, h.g, 4, 2, h.bindings.data(), h.bindings.size()), RS_ERR_UNSUPPORTED);
  EXPECT_NE(std::string(rs_last_error()).find("attention by 'b'"), std::string::npos) << rs_last_error();
}

// Where all tokens stay nothing chooses, and no scores are made, on a card as on the CPU.  Runs with and without are of one
// capacity.
TEST(graph_on_a_card, scores_that_choose_nothing_are_not_made) {
  rs_drop_rule rule = {};
  rule.keep = 40;
  for (const bool fold : {false, true}) {
    SCOPED_TRACE(fold);
    rule.fold = fold;
    harness h;
    const int64_t shape[] = {RS_DIM_TOKENS, width}, starts = RS_DIM_CU_SEQLENS;
    rs_tensor *x = rs_input(h.g, "x", RS_F32, 2, shape), *cu = rs_input(h.g, "cu", RS_I32, 1, &starts);
    // The norm would give the shift, too, and the product take the sum.
    rs_tensor *y = norm(h, x, nullptr, "n"), *shift = rs_shift(h.g, x, nullptr, RS_DISTANCE_L2);
    rs_tensor *product = rs_linear(h.g, x, weight(h, "w", RS_F32, 1, width, 1), nullptr, RS_ACT_NONE);
    rs_tensor *score = rs_add(h.g, product, shift);
    score = rs_add(h.g, score, rs_standardize(h.g, rs_attn_colsum(h.g, x, x, cu, nullptr, 2, 0.2f, true), cu, 1));
    rs_tensor *kept = rs_token_drop(h.g, score, cu, nullptr, &rule), *assign = rs_token_assign(h.g, y, cu, kept);
    rs_tensor *merged = fold ? rs_token_merge(h.g, y, assign, kept, cu, nullptr, score) : rs_token_gather(h.g, y, kept);
    rs_tensor *out = rs_output(h.g, rs_pool(h.g, merged, rs_token_starts(h.g, kept), nullptr, RS_POOL_MEAN, 0));
    ASSERT_EQ(rs_graph_finish(h.g), RS_OK) << rs_last_error();
    const auto run = [&](rs_session *s, const std::vector<int32_t> &lengths, unsigned seed) {
      std::vector<int32_t> at = {0};
      for (const int32_t n : lengths) at.push_back(at.back() + n);
      const vec in = normal(static_cast<size_t>(at.back()) * width, seed);
      h.bindings = {{x, const_cast<float *>(in.data()), in.size() * 4}, {cu, at.data(), at.size() * 4}};
      return h.again(s, out, at.back(), static_cast<int64_t>(lengths.size()), lengths.size() * width);
    };
    const device_session card("cuda"), cpu("cpu");
    unsigned seed = 0;
    for (const std::vector<int32_t> &lengths : {std::vector<int32_t>{30}, {60}, {40}, {25}, {60}, {41}, {30}, {64}}) {
      ++seed;
      EXPECT_GE(lowest_cosine(run(card.s, lengths, seed), run(cpu.s, lengths, seed), width), 0.9999) << seed;
    }
    // Sequences of which some lose tokens need all scores.
    EXPECT_GE(lowest_cosine(run(card.s, {10, 60}, 1), run(cpu.s, {10, 60}, 1), width), 0.9999);
    const device_session timed("cuda", true), counted("cpu", true);
    const auto rows = [&](const device_session &on, const std::vector<int32_t> &lengths) {
      run(on.s, lengths, 1);
      std::vector<std::pair<std::string, uint64_t>> all;
      for (size_t i = 0; i < rs_session_profile_count(on.s); i++) {
        rs_profile_row row;
        EXPECT_EQ(rs_session_profile_at(on.s, i, &row), RS_OK);
        all.emplace_back(row.op, row.calls);
      }
      return all;
    };
    const auto without = rows(counted, {30});
    EXPECT_EQ(without.size(), 5u);
    EXPECT_EQ(rows(timed, {30}), without);
    const auto with = rows(counted, {60});
    EXPECT_EQ(with.size(), 5u + 6);
    EXPECT_EQ(rows(timed, {60}), with);
  }
}

// Capacities go in eighths, but no further than a card does: what it has too little memory for is not too many tokens.
TEST(graph_on_a_card, as_many_tokens_as_it_takes) {
  constexpr int64_t most = 65535 * 64, cols = 1 << 16;
  const device_session card("cuda");
  harness h;
  const int64_t shape[] = {RS_DIM_TOKENS, 1}, starts = RS_DIM_CU_SEQLENS;
  rs_tensor *x = rs_input(h.g, "x", RS_F32, 2, shape), *cu = rs_input(h.g, "cu", RS_I32, 1, &starts);
  rs_tensor *wide = rs_linear(h.g, x, h.weight("w", RS_F32, RS_PANELS, {cols, 1}, vec(cols)), nullptr, RS_ACT_NONE);
  rs_tensor *y = rs_output(h.g, rs_pool(h.g, wide, cu, nullptr, RS_POOL_MEAN, 0));
  ASSERT_EQ(rs_graph_finish(h.g), RS_OK) << rs_last_error();
  vec in(most + 1), out(cols);
  for (const int64_t tokens : {int64_t{4000000}, most, most + 1}) {
    const std::vector<int32_t> cu_seqlens = {0, static_cast<int32_t>(tokens)};
    const rs_binding all[] = {{x, in.data(), static_cast<size_t>(tokens) * 4},
                              {cu, const_cast<int32_t *>(cu_seqlens.data()), 8},
                              {y, out.data(), out.size() * 4}};
    const bool fits = tokens <= most;
    EXPECT_EQ(rs_graph_run(card.s, h.g, tokens, 1, all, 3), fits ? RS_ERR_MEMORY : RS_ERR_LIMIT) << tokens;
    const std::string said = rs_last_error();
    const std::string bytes = std::to_string((most + 1) * cols * 4);  // the pooled row, too
    const std::string wanted = fits ? bytes + " bytes for activations" : "4194241 tokens, at most 4194240";
    EXPECT_NE(said.find(wanted), std::string::npos) << said;
  }
}

// What only attention reads is stored in another type, but not where the caller reads it, too.
TEST(graph_on_a_card, outputs_are_floats) {
  const device_session card("cuda"), cpu("cpu");
  const auto run = [](rs_session *s) {
    harness h;
    rs_tensor *x = h.input("x", RS_F32, {RS_DIM_TOKENS, width}, normal(9 * width, 1));
    rs_tensor *cu = h.input("cu", RS_I32, {RS_DIM_CU_SEQLENS}, std::vector<int32_t>{0, 4, 9});
    rs_tensor *y = rs_output(h.g, rs_linear(h.g, x, weight(h, "w", RS_F32, width, width, 1), nullptr, RS_ACT_NONE));
    vec read(9 * width);
    h.bindings.push_back({y, read.data(), read.size() * 4});
    h.run(s, rs_flash_attn(h.g, y, y, y, cu, nullptr, 3, 0.3f), 9, 2, 9 * width);
    return read;
  };
  EXPECT_GE(lowest_cosine(run(card.s), run(cpu.s), width), 0.9999);
}

// Scores of a norm's input twice, one of two column sums' tensors read by the caller, and a weight that is no model's.
TEST(graph_on_a_card, uncommon_readers) {
  const device_session card("cuda"), cpu("cpu");
  const auto run = [&](rs_session *s) {
    harness h;
    rs_tensor *x = h.input("x", RS_F32, {RS_DIM_TOKENS, width}, normal(9 * width, 1));
    rs_tensor *cu = h.input("cu", RS_I32, {RS_DIM_CU_SEQLENS}, std::vector<int32_t>{0, 4, 9});
    rs_tensor *q = rs_linear(h.g, x, weight(h, "q", RS_F32, width, width, 5), nullptr, RS_ACT_NONE);
    rs_tensor *k = rs_output(h.g, rs_linear(h.g, x, weight(h, "k", RS_F32, width, width, 6), nullptr, RS_ACT_NONE));
    rs_tensor *y = norm(h, k, nullptr, "n");
    rs_tensor *scores = rs_add(h.g, rs_shift(h.g, k, nullptr, RS_DISTANCE_L2), rs_shift(h.g, k, nullptr, RS_DISTANCE_L2));
    scores = rs_add(h.g, scores, rs_attn_colsum(h.g, q, k, cu, nullptr, 3, 0.2f, true));
    return h.run(s, rs_pool(h.g, y, cu, scores, RS_POOL_MEAN, 0), 9, 2, 2 * width);
  };
  EXPECT_GE(lowest_cosine(run(card.s), run(cpu.s), width), 0.9999);
}

// Sequences of no tokens beside one of three, alone, and no sequence at all: each twice, so that the second is recorded.
TEST(graph_on_a_card, empty_runs) {
  const device_session card("cuda"), cpu("cpu");
  for (const graph_case &c : graph_cases) {
    SCOPED_TRACE(c.name);
    built b(c);
    for (std::vector<int32_t> starts : {std::vector<int32_t>{0, 0, 3, 3}, {0, 0}, {0, 0, 0, 0}, {0}}) {
      SCOPED_TRACE(::testing::PrintToString(starts));
      vec in = normal(static_cast<size_t>(starts.back()) * width, 1);
      in.reserve(1);  // there is a place, of nothing
      const vec wanted = b.run(cpu.s, c, starts, in);
      for (int i = 0; i < 3; i++) {
        const vec got = b.run(card.s, c, starts, in);
        ASSERT_EQ(got.size(), wanted.size());
        const float tolerance = c.quantized ? 0.1f : 0.01f;  // of what a sequence of no tokens gives, zeros, none
        for (size_t j = 0; j < got.size(); j++)
          ASSERT_NEAR(got[j], wanted[j], wanted[j] == 0 ? 0 : tolerance * (1 + std::fabs(wanted[j]))) << j;
      }
    }
  }
}

// A session does not grow with each graph that it ever ran: what it keeps of one, its constants on the card among it, goes when
// many others ran since.
TEST(graph_on_a_card, of_many_graphs_the_last_ones_stay) {
  const device_session card("cuda");
  const graph_case &c =
      *std::find_if(std::begin(graph_cases), std::end(graph_cases), [](const graph_case &g) { return g.quantized; });
  std::vector<int32_t> starts = {0, 4};
  vec in = normal(4 * width, 1);
  std::vector<std::unique_ptr<built>> graphs;  // all there, so that none has the address of one that was
  std::vector<vec> results;
  size_t bytes = 0;
  for (int i = 0; i < 80; i++) {
    graphs.push_back(std::make_unique<built>(c));
    results.push_back(graphs.back()->run(card.s, c, starts, in));
    if (i == 39) bytes = rs_session_arena_bytes(card.s);
  }
  EXPECT_EQ(rs_session_arena_bytes(card.s), bytes);
  // One that went comes back.
  for (int i = 0; i < 80; i++)
    EXPECT_EQ(graphs[static_cast<size_t>(i)]->run(card.s, c, starts, in), results[static_cast<size_t>(i)]);
  EXPECT_EQ(rs_session_arena_bytes(card.s), bytes);
}

// ------------------------------------------------------------------------------------------------ images

rs_session *image_session(const rs_model *model, int32_t threads, int32_t tokens) {
  auto p = sized<rs_session_params>();
  p.threads = threads, p.max_batch_tokens = tokens;
  rs_session *s = nullptr;
  EXPECT_EQ(rs_session_create(model, &p, &s), RS_OK) << rs_last_error();
  return s;
}

// Pixels are written where the card copies from, by one thread or several, whatever the batch: all at once, in parts of few images,
// each alone.
TEST(images_on_a_card, do_not_depend_on_the_batch_or_the_threads) {
  temp_dir dir;
  for (const int64_t patch : {8, 14, 16}) {
    SCOPED_TRACE(patch);
    tiny_dinov2 tiny;
    tiny.layers = 1, tiny.patch = patch, tiny.side = 4 * patch;
    ASSERT_EQ(tiny.convert(dir / "image.rsw", "f32"), RS_OK) << rs_last_error();
    const loaded_on card(dir / "image.rsw", "cuda"), cpu(dir / "image.rsw", "cpu");
    const auto side = static_cast<int32_t>(tiny.side);
    const size_t dim = static_cast<size_t>(tiny.hidden), n = 14, floats = static_cast<size_t>(3 * side * side);
    const vec pixels = normal(5 * floats, 3);
    const std::string file = pnm_image(50, 40, 1), other = pnm_image(60, 70, 2);
    std::vector<rs_image> images;
    for (size_t i = 0; i < n; i++) {
      images.push_back({RS_IMAGE_PIXELS, pixels.data() + i % 5 * floats, 0, side, side});
      if (i % 3 == 1) images.back() = {RS_IMAGE_FILE, i % 2 ? file.data() : other.data(), i % 2 ? file.size() : other.size(), 0, 0};
    }
    const auto encode = [&](rs_session *s, size_t first, size_t count) {
      vec out(count * dim);
      EXPECT_EQ(rs_encode_images(s, images.data() + first, count, nullptr, out.data(), out.size(), nullptr), RS_OK)
          << rs_last_error();
      return out;
    };
    vec alone;
    for (size_t i = 0; i < n; i++) {
      const vec one = encode(card.session, i, 1);
      alone.insert(alone.end(), one.begin(), one.end());
    }
    EXPECT_GE(lowest_cosine(alone, encode(cpu.session, 0, n), dim), 0.9999);
    for (const int32_t threads : {1, 3})
      for (const int32_t tokens : {0, 40}) {
        rs_session *s = image_session(card.model, threads, tokens);
        for (int i = 0; i < 3; i++) EXPECT_EQ(encode(s, 0, n), alone) << threads << " threads, " << tokens << " tokens";
        rs_session_free(s);
      }
  }
}

// An image of another size is its own fault, and the session goes on.
TEST(images_on_a_card, of_another_size_are_refused) {
  temp_dir dir;
  ASSERT_EQ(tiny_dinov2().convert(dir / "image.rsw", "q8"), RS_OK) << rs_last_error();
  const loaded_on card(dir / "image.rsw", "cuda");
  const vec pixels = normal(3 * 48 * 48, 3);
  const rs_image good = {RS_IMAGE_PIXELS, pixels.data(), 0, 32, 32}, wide = {RS_IMAGE_PIXELS, pixels.data(), 0, 48, 32},
                 none = {RS_IMAGE_PIXELS, nullptr, 0, 32, 32};
  const auto p = sized<rs_encode_params>();
  vec first(32), out(3 * 32);
  ASSERT_EQ(rs_encode_images(card.session, &good, 1, &p, first.data(), first.size(), nullptr), RS_OK) << rs_last_error();
  for (const rs_image &bad : {wide, none}) {
    const rs_image images[] = {good, good, bad};
    EXPECT_EQ(rs_encode_images(card.session, images, 3, &p, out.data(), out.size(), nullptr), RS_ERR_ARGUMENT);
    EXPECT_EQ(rs_encode_failed(card.session), 2u);
  }
  const rs_image images[] = {good, good, good};
  ASSERT_EQ(rs_encode_images(card.session, images, 3, &p, out.data(), out.size(), nullptr), RS_OK) << rs_last_error();
  for (size_t i = 0; i < 3; i++) EXPECT_EQ(row(out, i, 32), first);
}

}  // namespace
