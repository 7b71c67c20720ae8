// Whole models: the real all-MiniLM-L6-v2 against the vectors and states of the reference implementation, a small one against a
// plain f64 BERT, and what must hold for every model: a text's vector does not depend on what else is in the batch.
#include "bert_f64.h"
#include "encoding.h"
#include "graph_harness.h"
#include "tiny_vit.h"

#include <nlohmann/json.hpp>

#include <cmath>
#include <fstream>
#include <functional>
#include <numeric>
#include <thread>

namespace {

using json = nlohmann::json;

// ---- the real model

// Under sanitizers the real model is some twenty times slower: quality is measured on fewer texts there.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t most_golden_texts = 12;
#else
constexpr size_t most_golden_texts = SIZE_MAX;
#endif

std::vector<std::string> golden_texts() {
  std::vector<std::string> texts;
  std::ifstream in(shared_file("golden/minilm_texts.jsonl"));
  for (std::string line; std::getline(in, line) && texts.size() < most_golden_texts;) texts.push_back(json::parse(line)["text"]);
  return texts;
}

TEST(minilm, vectors_match_the_reference) {
  RS_NEED_SHARED("golden/minilm_embeddings_f32.npy");
  std::vector<int64_t> shape;
  const std::vector<float> wanted = read_npy_f32(shared_file("golden/minilm_embeddings_f32.npy"), &shape);
  const std::vector<std::string> texts = golden_texts();
  ASSERT_TRUE(shape.size() == 2 && shape[1] == 384);
  ASSERT_EQ(texts.size(), std::min(static_cast<size_t>(shape[0]), most_golden_texts));
  // From the issue: f32 each text, the others on average.
  for (const auto &[type, mean, least] : std::vector<std::tuple<std::string, double, double>>{
           {"f32", 0.99999, 0.99999}, {"f16", 0.9999, 0.9999}, {"q8", 0.997, 0.98}, {"q4", 0.97, 0.9}}) {
    RS_NEED_MODEL(type);
    const loaded m(model_path(type));
    auto params = sized<rs_encode_params>();
    params.max_tokens = 512;
    const std::vector<float> got = encode(m.session, texts, params, 384);
    double sum = 0, lowest = 1;
    for (size_t i = 0; i < texts.size(); i++) {
      const double c = cosine(&got[i * 384], &wanted[i * 384], 384);
      EXPECT_TRUE(c >= least) << type << " text " << i << ": " << c;
      sum += c, lowest = std::min(lowest, c);
    }
    EXPECT_TRUE(sum / static_cast<double>(texts.size()) >= mean) << type;
    printf("%s: cosine mean %.6f, lowest %.6f\n", type.c_str(), sum / static_cast<double>(texts.size()), lowest);
  }
}

TEST(minilm, states_match_layer_by_layer) {
  RS_NEED_SHARED("golden/minilm_hidden_f32.npy");
  RS_NEED_MODEL("f32");
  std::vector<int64_t> shape;
  const std::vector<float> wanted = read_npy_f32(shared_file("golden/minilm_hidden_f32.npy"), &shape);
  const std::string text = json::parse(read_file(shared_file("golden/minilm_hidden.json")))["text"];
  ASSERT_EQ(shape.size(), 3u);
  const auto tokens = static_cast<size_t>(shape[1]);
  for (size_t isa = 0; rs_isa_available(isa); isa++) {
    setenv("RS_ISA", rs_isa_available(isa), 1);
    const loaded m(model_path("f32"));
    unsetenv("RS_ISA");
    for (int layer = 0; layer <= 6; layer++) {
      auto params = sized<rs_encode_params>();
      params.pooling = RS_POOL_NONE;
      params.normalize = RS_OFF;
      params.max_tokens = 128;
      params.layer_plus_one = layer + 1;
      std::vector<float> got(tokens * 384);
      const rs_text view = {text.data(), text.size()};
      ASSERT_EQ(rs_encode(m.session, &view, 1, &params, got.data(), got.size(), nullptr), RS_OK) << rs_last_error();
      double most = 0;
      for (size_t i = 0; i < got.size(); i++)
        most = larger_or_nan(most, std::fabs(double(got[i]) - wanted[static_cast<size_t>(layer) * got.size() + i]));
      EXPECT_TRUE(most <= 1e-4) << rs_isa_available(isa) << " layer " << layer << ": " << most;  // from the issue
    }
  }
}

// Ranks with ties shared, then Pearson's correlation of the ranks.
double spearman(const std::vector<double> &a, const std::vector<double> &b) {
  const auto ranks = [](const std::vector<double> &v) {
    std::vector<size_t> order(v.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::sort(order.begin(), order.end(), [&](size_t i, size_t j) { return v[i] < v[j]; });
    std::vector<double> r(v.size());
    for (size_t i = 0; i < order.size();) {
      size_t j = i;
      while (j < order.size() && v[order[j]] == v[order[i]]) j++;
      for (size_t k = i; k < j; k++) r[order[k]] = (static_cast<double>(i) + static_cast<double>(j - 1)) / 2;
      i = j;
    }
    return r;
  };
  const std::vector<double> x = ranks(a), y = ranks(b);
  const auto n = static_cast<double>(x.size());
  const double mx = std::accumulate(x.begin(), x.end(), 0.0) / n, my = std::accumulate(y.begin(), y.end(), 0.0) / n;
  double xy = 0, xx = 0, yy = 0;
  for (size_t i = 0; i < x.size(); i++)
    xy += (x[i] - mx) * (y[i] - my), xx += (x[i] - mx) * (x[i] - mx), yy += (y[i] - my) * (y[i] - my);
  return xy / std::sqrt(xx * yy);
}

TEST(minilm, quantized_ranks_as_f32_does) {
  if (most_golden_texts < SIZE_MAX) GTEST_SKIP() << "8,274 vectors take too long under sanitizers; the plain build measures it";
  RS_NEED_SHARED("data/stsb-test.csv");
  std::vector<std::string> texts;
  std::vector<double> scores;
  std::ifstream in(shared_file("data/stsb-test.csv"));
  for (std::string line; std::getline(in, line);) {
    std::vector<std::string> columns(1);
    for (char c : line)
      if (c == '\t') columns.emplace_back();
      else columns.back() += c;
    ASSERT_GE(columns.size(), 7u) << line;
    scores.push_back(std::stod(columns[4]));
    texts.push_back(columns[5]), texts.push_back(columns[6]);
  }
  std::map<std::string, double> result;
  for (const char *type : {"f32", "q8", "q4"}) {
    RS_NEED_MODEL(type);
    const loaded m(model_path(type));
    const std::vector<float> v = encode(m.session, texts, sized<rs_encode_params>(), 384);
    std::vector<double> cosines;
    for (size_t i = 0; i < scores.size(); i++) cosines.push_back(cosine(&v[2 * i * 384], &v[(2 * i + 1) * 384], 384));
    result[type] = 100 * spearman(cosines, scores);
    printf("STS-B test, %s: Spearman %.2f\n", type, result[type]);
  }
  EXPECT_TRUE(std::fabs(result["f32"] - 82.03) < 0.01);  // the reference's value
  EXPECT_TRUE(result["q8"] >= result["f32"] - 0.2);      // from the issue
  EXPECT_TRUE(result["q4"] >= result["f32"] - 1.0);
}

TEST(minilm, batch_equals_single_on_every_type_isa_and_thread_count) {
  RS_NEED_SHARED("golden/minilm_texts.jsonl");
  std::vector<std::string> texts = golden_texts();
  texts.resize(std::min<size_t>(texts.size(), 40));
  texts.push_back("");
  texts.push_back(std::string(3000, 'x') + " and a lot of words" + std::string(900, '.'));
  for (const char *type : {"f32", "f16", "q8", "q4"}) {
    RS_NEED_MODEL(type);
    for (size_t isa = 0; rs_isa_available(isa); isa++) {
      if (std::string(rs_isa_available(isa)) == "scalar" && std::string(type) != "q8") continue;  // slow, and the same driver
      setenv("RS_ISA", rs_isa_available(isa), 1);
      const loaded one(model_path(type), 1), three(model_path(type), 3, 700);
      unsetenv("RS_ISA");
      const auto params = sized<rs_encode_params>();
      const size_t n = std::string(rs_isa_available(isa)) == "scalar" ? 8 : texts.size();
      const std::vector<std::string> some(texts.end() - static_cast<std::ptrdiff_t>(n), texts.end());
      const std::vector<float> all = encode(three.session, some, params, 384);
      const std::vector<std::string> backwards(some.rbegin(), some.rend());
      const std::vector<float> reverse = encode(one.session, backwards, params, 384);
      for (size_t i = 0; i < n; i++) {
        EXPECT_EQ(row(all, i), row(reverse, n - 1 - i)) << type << " " << rs_isa_available(isa) << " text " << i;
        const std::vector<float> single = encode(one.session, {some[i]}, params, 384);
        EXPECT_EQ(row(all, i), single) << type << " " << rs_isa_available(isa) << " text " << i;
      }
    }
  }
}

TEST(minilm, sessions_run_in_parallel_on_one_model) {
  RS_NEED_MODEL("q8");
  const loaded m(model_path("q8"), 1);
  const std::vector<std::string> texts = {"The first text.", "A second one, somewhat longer than the first.", "Third"};
  const std::vector<float> wanted = encode(m.session, texts, sized<rs_encode_params>(), 384);
  std::vector<std::thread> threads;
  threads.reserve(4);
  std::atomic<int> wrong{0};
  for (int i = 0; i < 4; i++)
    threads.emplace_back([&] {
      rs_session *s = nullptr;
      auto p = sized<rs_session_params>();
      p.threads = 2;
      if (rs_session_create(m.model, &p, &s) != RS_OK) wrong++;
      for (int k = 0; k < 5; k++)
        if (encode(s, texts, sized<rs_encode_params>(), 384) != wanted) wrong++;
      rs_session_free(s);
    });
  for (std::thread &t : threads) t.join();
  EXPECT_EQ(wrong, 0);
}

TEST(minilm, the_arena_stays_small) {
  RS_NEED_MODEL("q8");
  const loaded m(model_path("q8"));
  auto params = sized<rs_encode_params>();
  params.max_tokens = 512;
  encode(m.session, {std::string(4000, '.')}, params, 384);
  // 512 tokens: 4.9 MiB where attention is in bf16, and q, k, v are, else 6.
  const bool narrow = std::string(rs_isa()) == "amx" || std::string(rs_isa()) == "avx512vnni";
  EXPECT_LE(static_cast<double>(rs_session_arena_bytes(m.session)), (narrow ? 5.2 : 6.5) * (1 << 20));
  // However large the batch, memory is that of max_batch_tokens.
  const std::vector<std::string> many(200, "How large is a batch of many texts allowed to be, in memory?");
  encode(m.session, many, params, 384);
  const size_t arena = rs_session_arena_bytes(m.session);
  std::vector<std::string> more;
  for (int i = 0; i < 5; i++) more.insert(more.end(), many.begin(), many.end());
  encode(m.session, more, params, 384);
  EXPECT_EQ(rs_session_arena_bytes(m.session), arena);
}

// A file in the page cache is mapped, not read.  The best of several: other programs may be running.
TEST(minilm, loads_within_twenty_milliseconds) {
  if (most_golden_texts < SIZE_MAX) GTEST_SKIP() << "times mean little under sanitizers; the plain build measures it";
  RS_NEED_MODEL("q8");
  double best = INFINITY;
  for (int i = 0; i < 20; i++) {
    const auto start = std::chrono::steady_clock::now();
    rs_model *m = nullptr;
    ASSERT_EQ(rs_model_load(model_path("q8").c_str(), nullptr, &m), RS_OK) << rs_last_error();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    rs_model_free(m);
  }
  printf("loading q8: %.1f ms\n", 1e3 * best);
  EXPECT_LE(best, 0.020);
}

// ---- a small model against BERT as it is written down

TEST(bert, every_setting_is_honoured) {
  temp_dir dir;
  struct variant {
    const char *what;
    std::function<void(tiny_bert &)> set;
  };
  const std::vector<variant> variants = {
      {"as it is", [](tiny_bert &) {}},
      {"relu", [](tiny_bert &m) { m.act = "relu"; }},
      {"gelu_new", [](tiny_bert &m) { m.act = "gelu_new"; }},
      {"silu", [](tiny_bert &m) { m.act = "silu"; }},
      {"tanh", [](tiny_bert &m) { m.act = "tanh"; }},
      {"quick_gelu", [](tiny_bert &m) { m.act = "quick_gelu"; }},
      {"a large eps", [](tiny_bert &m) { m.eps = 0.3; }},
      {"one head", [](tiny_bert &m) { m.heads = 1; }},
      {"heads of 4", [](tiny_bert &m) { m.heads = 8; }},
      {"sizes that fill no panel", [](tiny_bert &m) { m.hidden = 36, m.heads = 3, m.intermediate = 50, m.layers = 1; }},
      {"one token type", [](tiny_bert &m) { m.types = 1; }},
      {"three token types", [](tiny_bert &m) { m.types = 3; }},
      {"a prefix", [](tiny_bert &m) { m.prefix = "bert."; }},
  };
  for (const variant &v : variants) {
    SCOPED_TRACE(v.what);
    tiny_bert tiny(3);
    v.set(tiny);
    ASSERT_EQ(tiny.convert(dir / "tiny.rsw", "f32"), RS_OK) << rs_last_error();
    const loaded m(dir / "tiny.rsw");
    ASSERT_NE(m.session, nullptr);
    const std::vector<int32_t> ids = {2, 5, 7, 9, 16, 3, 6, 8, 3},
                               types = {
                                   0, 0, 0, 0, 0, 0, static_cast<int32_t>(tiny.types) - 1, static_cast<int32_t>(tiny.types) - 1, 0};
    const size_t starts[] = {0, ids.size()};
    auto params = sized<rs_encode_params>();
    params.pooling = RS_POOL_NONE;
    params.normalize = RS_OFF;
    std::vector<float> got(ids.size() * static_cast<size_t>(tiny.hidden));
    ASSERT_EQ(rs_encode_ids(m.session, ids.data(), types.data(), starts, 1, &params, got.data(), got.size()), RS_OK)
        << rs_last_error();
    const matrix64 wanted = bert_f64(tiny, ids, types);
    for (size_t i = 0; i < ids.size(); i++)
      for (size_t j = 0; j < wanted[i].size(); j++)
        ASSERT_TRUE(std::fabs(got[i * wanted[i].size() + j] - wanted[i][j]) <= 2e-5)
            << i << " " << j;  // values near 1, some thousand f32 roundings
  }
}

TEST(bert, half_precision_sources_are_read) {
  temp_dir dir;
  tiny_bert tiny(4);
  tiny.fill();
  std::vector<std::vector<uint16_t>> halves;
  for (rs_type type : {RS_F16, RS_BF16}) {
    for (auto &[name, values] : tiny.weights)  // so that narrowing loses nothing
      for (float &x : values) {
        uint32_t bits;
        memcpy(&bits, &x, 4);
        bits &= 0xffff0000;
        memcpy(&x, &bits, 4);
        if (std::fabs(x) < 1e-3f) x = 0;
      }
    ASSERT_EQ(tiny.convert(dir / "wide.rsw", "f32"), RS_OK) << rs_last_error();
    rs_source s = tiny.source();
    std::vector<rs_source_tensor> tensors(s.tensors, s.tensors + s.n_tensors);
    halves.clear();
    for (rs_source_tensor &t : tensors) {
      const std::vector<float> &values = tiny.weights.at(t.name);
      halves.emplace_back(values.size());
      const auto n = static_cast<int64_t>(values.size());
      if (type == RS_F16) {
        ASSERT_EQ(rs_tensor_encode(RS_F16, RS_ROWS, 1, &n, values.data(), halves.back().data(), values.size() * 2), RS_OK);
      } else {
        for (size_t i = 0; i < values.size(); i++) memcpy(&halves.back()[i], reinterpret_cast<const char *>(&values[i]) + 2, 2);
      }
      t.type = type, t.data = halves.back().data();
    }
    s.tensors = tensors.data();
    rs_writer *w;
    ASSERT_EQ(rs_writer_open((dir / "narrow.rsw").c_str(), &w), RS_OK);
    tiny.set_metadata(w);
    rs_convert_params params = {};
    params.type = "f32";
    EXPECT_EQ(rs_convert(&s, &params, w), RS_ERR_ARGUMENT);  // which would have been q8
    EXPECT_NE(std::string(rs_last_error()).find("rs_convert_params.size is 0"), std::string::npos) << rs_last_error();
    params.size = sizeof params;
    rs_source unsized = s;
    unsized.size = 0;
    EXPECT_EQ(rs_convert(&unsized, &params, w), RS_ERR_ARGUMENT);
    EXPECT_NE(std::string(rs_last_error()).find("rs_source.size is 0"), std::string::npos) << rs_last_error();
    rs_writer_free(w);
    ASSERT_EQ(rs_writer_open((dir / "narrow.rsw").c_str(), &w), RS_OK);
    tiny.set_metadata(w);
    ASSERT_EQ(rs_convert(&s, &params, w), RS_OK) << rs_last_error();
    ASSERT_EQ(rs_writer_finish(w), RS_OK);
    rs_writer_free(w);
    EXPECT_EQ(read_file(dir / "narrow.rsw"), read_file(dir / "wide.rsw")) << rs_type_name(type);
  }
}

TEST(bert, what_it_does_not_know_is_an_error_that_names_it) {
  temp_dir dir;
  const auto error_of = [&](const std::function<void(tiny_bert &)> &change) {
    tiny_bert tiny;
    tiny.fill();
    change(tiny);
    EXPECT_NE(tiny.convert(dir / "bad.rsw", "q8"), RS_OK);
    EXPECT_FALSE(file_exists(dir / "bad.rsw"));
    return std::string(rs_last_error());
  };
  const auto contains = [](const std::string &text, const char *part) { EXPECT_NE(text.find(part), std::string::npos) << text; };
  contains(error_of([](tiny_bert &m) { m.extra_strings = {{"model_type", "mamba"}}; }), "model_type 'mamba'");
  contains(error_of([](tiny_bert &m) { m.extra_strings = {{"architectures.0", "BertForQuantumChess"}}; }), "BertForQuantumChess");
  contains(error_of([](tiny_bert &m) {
             m.extra_strings = {{"position_embedding_type", "relative_key"}};
           }),
           "'position_embedding_type' is 'relative_key'");
  contains(error_of([](tiny_bert &m) { m.act = "gelu_10"; }), "hidden_act 'gelu_10'");
  contains(error_of([](tiny_bert &m) {
             m.tensor("encoder.layer.0.adapter.weight", {4, 4}, 0, 1);
           }),
           "tensor 'encoder.layer.0.adapter.weight' F32 [4,4] is not known");
  contains(error_of([](tiny_bert &m) { m.layers = 1; }), "tensor 'encoder.layer.1.");
  contains(error_of([](tiny_bert &m) { m.layers = 3; }), "tensor 'encoder.layer.2.attention.self.query.weight' is missing");
  contains(error_of([](tiny_bert &m) { m.intermediate = 63; }),
           "'encoder.layer.0.intermediate.dense.weight': shape [64,32], expected [63,32]");
  contains(error_of([](tiny_bert &m) { m.heads = 5; }), "5 heads do not divide hidden_size 32");
  contains(error_of([](tiny_bert &m) { m.weights["embeddings.LayerNorm.bias"][3] = NAN; }),
           "'embeddings.LayerNorm.bias': element 3 is NaN");
  contains(error_of([](tiny_bert &m) {
             m.extra_strings = {{"hidden_size", "many"}};
           }),
           "'hidden_size' is a string, expected an integer");
  tiny_bert tiny;
  EXPECT_EQ(tiny.convert(dir / "bad.rsw", "q3"), RS_ERR_ARGUMENT);
  contains(rs_last_error(), "type 'q3'");
}

// ---- rounding with calibration

TEST(calibration, makes_the_error_of_a_layer_smaller) {
  temp_dir dir;
  tiny_bert tiny(5);
  tiny.hidden = 64, tiny.intermediate = 256;
  ASSERT_EQ(tiny.convert(dir / "f32.rsw", "f32"), RS_OK) << rs_last_error();
  const loaded exact(dir / "f32.rsw");
  std::mt19937 rng(1);
  const auto texts = [&](size_t n) {
    std::vector<std::string> list(n);
    for (std::string &t : list)
      for (unsigned words = 3 + rng() % 20; words; words--) t += tiny.vocab[5 + rng() % 13] + " ";
    return list;
  };
  const std::vector<std::string> calibration_texts = texts(200), test_texts = texts(100);
  const std::vector<rs_text> views = views_of(calibration_texts);
  rs_calibration *c = nullptr;
  ASSERT_EQ(rs_calibrate(exact.session, views.data(), views.size(), 0, nullptr, 0, &c), RS_OK) << rs_last_error();
  const std::vector<float> wanted = encode(exact.session, test_texts, sized<rs_encode_params>(), 64);
  double error[2];
  for (bool calibrated : {false, true}) {
    ASSERT_EQ(tiny.convert(dir / "q4.rsw", "q4", calibrated ? c : nullptr), RS_OK) << rs_last_error();
    const loaded m(dir / "q4.rsw");
    EXPECT_EQ(rs_model_verify(m.model), RS_OK) << rs_last_error();
    const std::vector<float> got = encode(m.session, test_texts, sized<rs_encode_params>(), 64);
    error[calibrated] = 0;
    for (size_t i = 0; i < test_texts.size(); i++) error[calibrated] += 1 - cosine(&got[i * 64], &wanted[i * 64], 64);
  }
  rs_calibration_free(c);
  EXPECT_TRUE(error[1] < 0.8 * error[0]) << error[1] << " " << error[0];
}

// Two channels are large in every row, as they are in published models: without a scale of inputs the others get few steps.
TEST(calibration, scales_inputs_where_a_few_channels_are_large) {
  temp_dir dir;
  tiny_bert tiny(5);
  tiny.hidden = 64, tiny.intermediate = 256;
  tiny.fill();
  for (const size_t channel : {7, 41}) tiny.weights["encoder.layer.0.output.LayerNorm.weight"][channel] = 25;
  ASSERT_EQ(tiny.convert(dir / "f32.rsw", "f32"), RS_OK) << rs_last_error();
  const loaded exact(dir / "f32.rsw");
  rs_calibration *c = nullptr;
  ASSERT_EQ(rs_calibrate(exact.session, nullptr, 0, 42, nullptr, 0, &c), RS_OK) << rs_last_error();

  // What goes into that layer, on other tokens, and what comes out, quantized without and with it.
  const std::string name = "blk.1.attn.qkv.weight";
  const size_t k = 64, n = 3 * k, tokens = 40;
  std::vector<int32_t> ids(tokens);
  for (size_t i = 0; i < tokens; i++) ids[i] = static_cast<int32_t>(5 + i * 7 % 13);
  const size_t starts[] = {0, tokens};
  auto params = sized<rs_encode_params>();
  params.pooling = RS_POOL_NONE, params.normalize = RS_OFF, params.layer_plus_one = 2;
  std::vector<float> x(tokens * k), w(n * k);
  ASSERT_EQ(rs_encode_ids(exact.session, ids.data(), nullptr, starts, 1, &params, x.data(), x.size()), RS_OK) << rs_last_error();
  rs_tensor_info t;
  ASSERT_EQ(rs_model_tensor(exact.model, name.c_str(), &t), RS_OK);
  ASSERT_EQ(rs_tensor_decode(t.type, t.layout, t.rank, t.shape, t.data, w.data(), w.size()), RS_OK);
  for (const rs_type type : {RS_W8, RS_W4}) {
    double error[2];
    std::vector<float> scale(k);
    for (const bool scales : {false, true}) {
      harness h;
      size_t bytes;
      ASSERT_EQ(rs_tensor_bytes(type, RS_PANELS, 2, t.shape, &bytes), RS_OK);
      const aligned encoded(bytes);
      ASSERT_EQ(rs_tensor_encode_calibrated(c, name.c_str(), type, RS_PANELS, 2, t.shape, w.data(), encoded.p, bytes,
                                            scales ? scale.data() : nullptr),
                RS_OK)
          << rs_last_error();
      std::vector<float> scaled = x;
      for (size_t i = 0; scales && i < scaled.size(); i++) scaled[i] *= scale[i % k];
      rs_tensor *in = h.input("x", RS_F32, {RS_DIM_TOKENS, 64}, scaled);
      rs_tensor *y = rs_linear(h.g, in, rs_constant(h.g, "w", type, RS_PANELS, 2, t.shape, encoded.p), nullptr, RS_ACT_NONE);
      const std::vector<float> got = h.run(exact.session, y, tokens, 1, tokens * n);
      error[scales] = 0;
      for (size_t i = 0; i < tokens; i++)
        for (size_t j = 0; j < n; j++) {
          double wanted = 0;
          for (size_t l = 0; l < k; l++) wanted += double(x[i * k + l]) * w[j * k + l];
          error[scales] += (got[i * n + j] - wanted) * (got[i * n + j] - wanted);
        }
    }
    EXPECT_TRUE(error[1] < (type == RS_W8 ? 0.2 : 0.6) * error[0]) << rs_type_name(type) << " " << error[1] << " " << error[0];
    std::vector<float> sorted = scale;
    std::sort(sorted.begin(), sorted.end());
    EXPECT_LT(std::max(scale[7], scale[41]), 0.5f * sorted[2]) << rs_type_name(type);
  }

  // A converted file has it, and says of its weights how far they are from the published ones.
  ASSERT_EQ(tiny.convert(dir / "q8.rsw", "q8", c), RS_OK) << rs_last_error();
  EXPECT_GT(tiny.reported.at(name).sum_sq, 0);
  EXPECT_LT(tiny.reported.at(name).sum_sq_error, 1e-3 * tiny.reported.at(name).sum_sq);
  const loaded m(dir / "q8.rsw");
  EXPECT_EQ(rs_model_verify(m.model), RS_OK) << rs_last_error();
  ASSERT_EQ(rs_model_tensor(m.model, (name + ".input_scale").c_str(), &t), RS_OK);
  EXPECT_EQ(t.shape[0], 64);
  // What it is of no use to has none: the inputs of attention's last layer are alike.
  EXPECT_EQ(rs_model_tensor(m.model, "blk.0.attn.out.weight.input_scale", &t), RS_ERR_NOT_FOUND);
  rs_calibration_free(c);
}

TEST(calibration, draws_the_same_tokens_each_time_and_as_many_as_asked_for) {
  temp_dir dir;
  tiny_bert tiny(5);
  ASSERT_EQ(tiny.convert(dir / "f32.rsw", "f32"), RS_OK) << rs_last_error();
  const loaded exact(dir / "f32.rsw");
  const rs_text text = {"the cat sat on the mat", RS_NUL_TERMINATED};
  std::string files[4];
  const std::pair<size_t, size_t> sequences[] = {{1, 9}, {1, 9}, {1, 8}, {1, 0}};
  for (size_t i = 0; i < 4; i++) {
    rs_calibration *c = nullptr;
    ASSERT_EQ(rs_calibrate(exact.session, &text, sequences[i].first, sequences[i].second, nullptr, 0, &c), RS_OK)
        << rs_last_error();
    ASSERT_EQ(tiny.convert(dir / "q4.rsw", "q4", c), RS_OK) << rs_last_error();
    files[i] = read_file(dir / "q4.rsw");
    rs_calibration_free(c);
  }
  EXPECT_EQ(files[0], files[1]);
  EXPECT_NE(files[0], files[2]);
  EXPECT_NE(files[2], files[3]);
}

TEST(calibration, makes_the_error_of_layers_of_images_smaller) {
  temp_dir dir;
  tiny_vit tiny(5);
  tiny.hidden = 64, tiny.intermediate = 256;
  ASSERT_EQ(tiny.convert(dir / "f32.rsw", "f32"), RS_OK) << rs_last_error();
  std::vector<std::string> files;
  for (unsigned i = 0; i < 60; i++) files.push_back(i % 2 ? pnm_image(24, 24, i) : tiny_image(i, 24, 24));
  std::vector<rs_image> images;
  for (const std::string &file : files) images.push_back({RS_IMAGE_FILE, file.data(), file.size(), 0, 0});
  const size_t calibrating = 40, n = images.size() - calibrating;  // others are looked at
  const auto encode = [&](rs_session *session) {
    std::vector<float> out(n * 64);
    EXPECT_EQ(rs_encode_images(session, images.data() + calibrating, n, nullptr, out.data(), out.size(), nullptr), RS_OK)
        << rs_last_error();
    return out;
  };
  const loaded exact(dir / "f32.rsw");
  rs_calibration *c = nullptr;
  ASSERT_EQ(rs_calibrate(exact.session, nullptr, 0, 0, images.data(), calibrating, &c), RS_OK) << rs_last_error();
  const std::vector<float> wanted = encode(exact.session);
  double error[2];
  for (bool calibrated : {false, true}) {
    ASSERT_EQ(tiny.convert(dir / "q4.rsw", "q4", calibrated ? c : nullptr), RS_OK) << rs_last_error();
    const loaded m(dir / "q4.rsw");
    EXPECT_EQ(rs_model_verify(m.model), RS_OK) << rs_last_error();
    const std::vector<float> got = encode(m.session);
    error[calibrated] = 0;
    for (size_t i = 0; i < n; i++) error[calibrated] += 1 - cosine(&got[i * 64], &wanted[i * 64], 64);
  }
  rs_calibration_free(c);
  EXPECT_TRUE(error[1] < 0.8 * error[0]) << error[1] << " " << error[0];
}

// ---- encode: settings, limits, errors

class encode_tiny : public testing::Test {
 protected:
  temp_dir dir;
  tiny_bert tiny{6};
  std::unique_ptr<loaded> m;
  rs_encode_params params = sized<rs_encode_params>();

  void SetUp() override {
    ASSERT_EQ(tiny.convert(dir / "tiny.rsw", "f32"), RS_OK) << rs_last_error();
    m = std::make_unique<loaded>(dir / "tiny.rsw");
  }
  std::vector<float> one(const std::string &text, rs_text_info *info = nullptr) {
    std::vector<rs_text_info> infos;
    std::vector<float> v = encode(m->session, {text}, params, static_cast<size_t>(params.dim ? params.dim : 32), &infos);
    if (info) *info = infos[0];
    return v;
  }
  rs_status status_of(const std::string &text) {
    const rs_text view = {text.data(), text.size()};
    float out[32];
    return rs_encode(m->session, &view, 1, &params, out, 32, nullptr);
  }
};

TEST_F(encode_tiny, texts_and_ids_agree) {
  const std::vector<int32_t> ids = {2, 5, 7, 9, 10, 5, 11, 14, 3};
  const size_t starts[] = {0, ids.size()};
  std::vector<float> from_ids(32);
  ASSERT_EQ(rs_encode_ids(m->session, ids.data(), nullptr, starts, 1, nullptr, from_ids.data(), 32), RS_OK);
  rs_text_info info;
  EXPECT_EQ(one("The cat sat on the mat.", &info), from_ids);
  EXPECT_EQ(info.tokens, 9);
  EXPECT_EQ(info.total, 9);
  EXPECT_FALSE(info.truncated);
  int32_t got[16], types[16];
  size_t n;
  const rs_text text = {"The cat sat on the mat.", RS_NUL_TERMINATED}, pair = {"a dog", RS_NUL_TERMINATED};
  ASSERT_EQ(rs_tokenize(m->model, &text, nullptr, got, types, nullptr, 16, &n), RS_OK);
  EXPECT_EQ(std::vector<int32_t>(got, got + n), ids);
  ASSERT_EQ(rs_tokenize(m->model, &text, &pair, got, types, nullptr, 16, &n), RS_OK);
  EXPECT_EQ(n, 12u);
  EXPECT_EQ(types[8], 0);
  EXPECT_EQ(types[9], 1);
  EXPECT_EQ(rs_tokenize(m->model, &text, &pair, got, types, nullptr, 11, &n), RS_ERR_LIMIT);
  EXPECT_EQ(n, 12u);
  EXPECT_STREQ(rs_token(m->model, 12), "##s");
  EXPECT_EQ(rs_token(m->model, 18), nullptr);
  EXPECT_EQ(rs_token(m->model, -1), nullptr);
}

TEST_F(encode_tiny, dim_cuts_and_normalizes_again) {
  const std::vector<float> all = one("hello world");
  params.dim = 8;
  const std::vector<float> cut = one("hello world");
  double norm = 0;
  for (int i = 0; i < 8; i++) norm += double(all[static_cast<size_t>(i)]) * all[static_cast<size_t>(i)];
  for (size_t i = 0; i < 8; i++) EXPECT_TRUE(std::fabs(cut[i] - all[i] / std::sqrt(norm)) < 1e-6);
  params.normalize = RS_OFF;
  const std::vector<float> raw = one("hello world");
  params.dim = 0;
  const std::vector<float> raw_all = one("hello world");
  EXPECT_TRUE(std::equal(raw.begin(), raw.end(), raw_all.begin()));
}

TEST_F(encode_tiny, long_texts_are_cut_refused_or_chunked) {
  std::string text;
  for (int i = 0; i < 30; i++) text += "cat sat ";  // 60 tokens and 2
  rs_text_info info;
  const std::vector<float> cut = one(text, &info);
  EXPECT_EQ(info.total, 62);
  EXPECT_EQ(info.tokens, 40);
  EXPECT_TRUE(info.truncated);
  EXPECT_EQ(one(text.substr(0, 38 * 4)), cut);  // what is left is the first 38 words
  params.long_text = RS_LONG_ERROR;
  EXPECT_EQ(status_of(text), RS_ERR_LIMIT);
  EXPECT_STREQ(rs_last_error(), "the text has 62 tokens, the limit is 40");
  EXPECT_EQ(rs_encode_failed(m->session), 0u);

  params.long_text = RS_LONG_CHUNK;
  params.chunk_overlap = 8;
  const std::vector<float> chunked = one(text, &info);  // windows of 38 tokens: [0,38) [30,60)
  EXPECT_EQ(info.chunks, 2);
  EXPECT_EQ(info.tokens, 62);
  EXPECT_FALSE(info.truncated);
  params.long_text = RS_LONG_TRUNCATE;
  params.normalize = RS_OFF;
  const std::vector<float> a = one(text.substr(0, 38 * 4)), b = one(text.substr(30 * 4));
  std::vector<double> mean(32);
  double norm = 0;
  for (size_t i = 0; i < 32; i++) mean[i] = (40.0 * a[i] + 32.0 * b[i]) / 72, norm += mean[i] * mean[i];
  for (size_t i = 0; i < 32; i++) EXPECT_TRUE(std::fabs(chunked[i] - mean[i] / std::sqrt(norm)) < 1e-6);
  params.max_tokens = 20;
  one(text, &info);
  EXPECT_EQ(info.tokens, 20);
}

TEST_F(encode_tiny, windows_overlap_as_they_are_asked_to) {
  std::string text;
  for (int i = 0; i < 38; i++) text += "cat sat ";  // 76 tokens: two windows of 38
  params.long_text = RS_LONG_CHUNK;
  rs_text_info info;
  params.chunk_overlap = -1;
  one(text, &info);
  EXPECT_EQ(info.chunks, 2);
  EXPECT_EQ(info.tokens, 78);
  EXPECT_EQ(info.kept, 80) << "special tokens of each";
  params.chunk_overlap = 0;
  one(text, &info);
  EXPECT_EQ(info.chunks, 3);
  EXPECT_EQ(info.kept, 76 + 2 * 4 + 3 * 2);
  params.chunk_overlap = -2;
  EXPECT_EQ(status_of(text), RS_ERR_ARGUMENT);
  EXPECT_STREQ(rs_last_error(), "chunk_overlap is -2, expected -1 (none) to 37");
}

// What a call looks for in vain that need not be there is no error of it.
TEST_F(encode_tiny, a_call_that_succeeds_leaves_the_last_error_alone) {
  rs_model *model = nullptr;
  EXPECT_EQ(rs_model_load((dir / "none.rsw").c_str(), nullptr, &model), RS_ERR_IO);
  const std::string before = rs_last_error();
  ASSERT_EQ(rs_model_load((dir / "tiny.rsw").c_str(), nullptr, &model), RS_OK);
  EXPECT_EQ(rs_last_error(), before);
  rs_model_free(model);
  one("hello");
  EXPECT_EQ(rs_last_error(), before);
}

// So that a caller may free it whatever came of it.
TEST_F(encode_tiny, nothing_is_made_where_a_call_fails) {
  rs_load_params old_load = {};  // of size 0
  rs_session_params old_session = {};
  const auto is_null = [](auto *object, auto make, auto free) {
    auto *made = reinterpret_cast<decltype(object)>(1);
    EXPECT_NE(make(&made), RS_OK);
    EXPECT_EQ(made, nullptr);
    free(made);
  };
  const rs_text bad = {"\xff", 1};
  const rs_image none = {RS_IMAGE_FILE, nullptr, 0, 0, 0};
  old_load.size = old_session.size = 1;
  is_null(
      static_cast<rs_model *>(nullptr), [&](rs_model **x) { return rs_model_load("", &old_load, x); }, rs_model_free);
  is_null(
      static_cast<rs_session *>(nullptr), [&](rs_session **x) { return rs_session_create(m->model, &old_session, x); },
      rs_session_free);
  is_null(
      static_cast<rs_writer *>(nullptr), [&](rs_writer **x) { return rs_writer_open("", x); }, rs_writer_free);
  is_null(
      static_cast<rs_drop *>(nullptr), [&](rs_drop **x) { return rs_drop_parse("none", x); }, rs_drop_free);
  is_null(
      static_cast<rs_trace *>(nullptr), [&](rs_trace **x) { return rs_trace_text(m->session, &bad, nullptr, nullptr, x); },
      rs_trace_free);
  is_null(
      static_cast<rs_trace *>(nullptr), [&](rs_trace **x) { return rs_trace_image(m->session, &none, nullptr, x); }, rs_trace_free);
  is_null(
      static_cast<rs_calibration *>(nullptr),
      [&](rs_calibration **x) { return rs_calibrate(m->session, &bad, 1, 0, nullptr, 0, x); }, rs_calibration_free);
}

TEST_F(encode_tiny, chunks_across_batches_are_joined) {
  std::string text;
  for (int i = 0; i < 500; i++) text += "the dog sat on a mat. ";
  params.long_text = RS_LONG_CHUNK;
  const std::vector<float> wanted = one(text);
  const loaded small(dir / "tiny.rsw", 2, 50);
  EXPECT_EQ(encode(small.session, {"hello", text, "world"}, params, 32), encode(m->session, {"hello", text, "world"}, params, 32));
  EXPECT_EQ(encode(small.session, {text}, params, 32), wanted);
}

TEST_F(encode_tiny, prompts_go_in_front) {
  const char *text;
  ASSERT_EQ(rs_model_prompt(m->model, "query", &text), RS_OK);
  EXPECT_STREQ(text, "the ");
  params.prompt = text;
  const std::vector<float> with = one("cat");
  params.prompt = "";
  EXPECT_EQ(one("the cat"), with);
  EXPECT_EQ(rs_model_prompt(m->model, "qeury", &text), RS_ERR_NOT_FOUND);
  EXPECT_STREQ(rs_last_error(), "there is no prompt 'qeury' (stored: query, passage)");
}

TEST_F(encode_tiny, poolings_differ_as_they_should) {
  params.normalize = RS_OFF;
  params.pooling = RS_POOL_NONE;
  const std::string text = "the cat sat";
  std::vector<float> states(5 * 32);
  const rs_text view = {text.data(), text.size()};
  ASSERT_EQ(rs_encode(m->session, &view, 1, &params, states.data(), states.size(), nullptr), RS_OK);
  EXPECT_EQ(rs_encode(m->session, &view, 1, &params, states.data(), states.size() - 1, nullptr), RS_ERR_LIMIT);
  params.pooling = RS_POOL_CLS;
  EXPECT_EQ(one(text), std::vector<float>(states.begin(), states.begin() + 32));
  params.pooling = RS_POOL_LAST;
  EXPECT_EQ(one(text), std::vector<float>(states.end() - 32, states.end()));
  for (int p = RS_POOL_DEFAULT; p <= RS_POOL_NONE; p++) {
    rs_pooling back;
    EXPECT_EQ(rs_pooling_parse(rs_pooling_name(static_cast<rs_pooling>(p)), &back), RS_OK);
    EXPECT_EQ(back, p);
  }
  rs_pooling none;
  EXPECT_EQ(rs_pooling_parse("median", &none), RS_ERR_ARGUMENT);
}

TEST_F(encode_tiny, bad_arguments_and_texts_are_errors) {
  EXPECT_EQ(status_of("caf\xc3"), RS_ERR_TEXT);
  EXPECT_NE(std::string(rs_last_error()).find("invalid UTF-8 at byte 3"), std::string::npos) << rs_last_error();
  const std::string good = "hello", bad = "\xff";
  const rs_text texts[] = {{good.data(), 5}, {good.data(), 5}, {bad.data(), 1}, {good.data(), 5}};
  float out[4 * 32];
  EXPECT_EQ(rs_encode(m->session, texts, 4, &params, out, 128, nullptr), RS_ERR_TEXT);
  EXPECT_EQ(rs_encode_failed(m->session), 2u);
  EXPECT_EQ(rs_encode(m->session, texts, 2, &params, out, 63, nullptr), RS_ERR_LIMIT);
  EXPECT_EQ(rs_encode_failed(m->session), SIZE_MAX);
  EXPECT_EQ(rs_encode(m->session, texts, 0, &params, nullptr, 0, nullptr), RS_OK);
  // A call that fails before any text is looked at is no text's fault; calls that encode nothing do not say whose it was.
  EXPECT_EQ(rs_encode(m->session, texts, 4, &params, out, 128, nullptr), RS_ERR_TEXT);
  const int32_t length = 5;
  rs_plan_layer layers[8];
  size_t arena;
  ASSERT_EQ(rs_plan(m->session, &length, 1, nullptr, layers, &arena), RS_OK) << rs_last_error();
  rs_trace *trace = nullptr;
  ASSERT_EQ(rs_trace_text(m->session, &texts[0], nullptr, nullptr, &trace), RS_OK) << rs_last_error();
  rs_trace_free(trace);
  EXPECT_EQ(rs_encode_failed(m->session), 2u);
  params.pooling = static_cast<rs_pooling>(99);
  EXPECT_EQ(rs_encode(m->session, texts, 2, &params, out, 128, nullptr), RS_ERR_ARGUMENT);
  EXPECT_EQ(rs_encode_failed(m->session), SIZE_MAX);
  params = sized<rs_encode_params>();
  for (const char *prompt : {"", "the "}) {
    params.prompt = prompt;
    for (const size_t length : {size_t(5), RS_NUL_TERMINATED}) {
      const rs_text none = {nullptr, length};
      EXPECT_EQ(rs_encode(m->session, &none, 1, &params, out, 32, nullptr), RS_ERR_ARGUMENT) << prompt;
      EXPECT_STREQ(rs_last_error(), "the text is NULL");
    }
    EXPECT_EQ(status_of("caf\xc3"), RS_ERR_TEXT);
    EXPECT_NE(std::string(rs_last_error()).find("invalid UTF-8 at byte 3"), std::string::npos) << rs_last_error();
  }
  params.prompt = "\xff";
  EXPECT_EQ(status_of("a"), RS_ERR_TEXT);
  EXPECT_NE(std::string(rs_last_error()).find("behind the prompt: invalid UTF-8 at byte 0"), std::string::npos) << rs_last_error();
  params = sized<rs_encode_params>();
  params.max_tokens = 41;
  EXPECT_EQ(status_of("a"), RS_ERR_ARGUMENT);
  params.max_tokens = 2;
  EXPECT_EQ(status_of("a"), RS_ERR_ARGUMENT);
  params = sized<rs_encode_params>();
  params.normalize = static_cast<rs_tristate>(7);
  EXPECT_EQ(status_of("a"), RS_ERR_ARGUMENT);
  EXPECT_STREQ(rs_last_error(), "normalize is 7, expected -1 to 1");
  params = sized<rs_encode_params>();
  params.dim = 33;
  EXPECT_EQ(status_of("a"), RS_ERR_ARGUMENT);
  params = sized<rs_encode_params>();
  params.layer_plus_one = 4;
  EXPECT_EQ(status_of("a"), RS_ERR_ARGUMENT);
  params = sized<rs_encode_params>();
  params.size = 2;
  EXPECT_EQ(status_of("a"), RS_ERR_ARGUMENT);
  // An older program's shorter struct: what it lacks is at its default.
  params = sized<rs_encode_params>();
  params.size = offsetof(rs_encode_params, dim);
  params.dim = 12345;
  EXPECT_EQ(status_of("a"), RS_OK) << rs_last_error();
  const int32_t ids[] = {2, 18, 3};
  const size_t starts[] = {0, 3}, backwards[] = {3, 0};
  EXPECT_EQ(rs_encode_ids(m->session, ids, nullptr, starts, 1, nullptr, out, 32), RS_ERR_ARGUMENT);
  EXPECT_NE(std::string(rs_last_error()).find("sequence 0: id 18 at position 1, expected 0 to 17"), std::string::npos)
      << rs_last_error();
  EXPECT_EQ(rs_encode_failed(m->session), 0u);
  const int32_t good_ids[] = {2, 17, 3, 2, 3}, types[] = {0, 0, 0, 0, 7};
  const size_t two[] = {0, 3, 5};
  EXPECT_EQ(rs_encode_ids(m->session, good_ids, types, two, 2, nullptr, out, 64), RS_ERR_ARGUMENT);
  EXPECT_NE(std::string(rs_last_error()).find("sequence 1: type id 7 at position 1, expected 0 to 1"), std::string::npos)
      << rs_last_error();
  EXPECT_EQ(rs_encode_failed(m->session), 1u);
  EXPECT_EQ(rs_encode_ids(m->session, ids, nullptr, backwards, 1, nullptr, out, 32), RS_ERR_LIMIT);
}

TEST_F(encode_tiny, profile_counts_calls_and_work) {
  auto p = sized<rs_session_params>();
  p.profile = true;
  rs_session *s;
  ASSERT_EQ(rs_session_create(m->model, &p, &s), RS_OK);
  encode(s, {"the cat"}, params, 32);
  encode(s, {"hello world", "a"}, params, 32);
  bool found = false;
  for (size_t i = 0; i < rs_session_profile_count(s); i++) {
    rs_profile_row row;
    ASSERT_EQ(rs_session_profile_at(s, i, &row), RS_OK);
    EXPECT_EQ(row.calls, 2u);
    EXPECT_TRUE(row.seconds >= 0);
    if (std::string(row.name) != "blk.1.mlp.up") continue;
    found = true;
    EXPECT_STREQ(row.op, "linear");
    EXPECT_EQ(row.macs, (4 + 7) * 32 * 64);
  }
  EXPECT_TRUE(found);
  rs_session_free(s);
}

}  // namespace
