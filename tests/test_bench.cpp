// rs bench, the tables of operators, and the arithmetic peaks that they are compared with.
#include <cmath>
#include <set>

#include "../rs.h"
#include "../tools/op_times.h"
#include "tiny_model.h"

#include "tiny_vit.h"

namespace {

using strings = std::vector<std::string>;

std::vector<json> lines_of_json(const std::string &text) {
  std::vector<json> rows;
  size_t begin = 0;
  for (size_t end; (end = text.find('\n', begin)) != std::string::npos; begin = end + 1) {
    rows.push_back(json::parse(text.substr(begin, end - begin), nullptr, false));
    EXPECT_FALSE(rows.back().is_discarded()) << text;
  }
  EXPECT_EQ(begin, text.size()) << "the last line has no end";
  return rows;
}

std::set<std::string> keys_of(const json &object) {
  std::set<std::string> keys;
  for (const auto &member : object.items()) keys.insert(member.key());
  return keys;
}

strings available_isas() {
  strings names;
  for (size_t i = 0; const char *name = rs_isa_available(i); i++) names.push_back(name);
  return names;
}

// ------------------------------------------------------------------------------------------------ rs_measure_peak

TEST(peak, is_positive_for_every_isa_and_type) {
  for (const std::string &isa : available_isas()) {
    setenv("RS_ISA", isa.c_str(), 1);
    for (const rs_type type : {RS_F32, RS_F16, RS_W8, RS_W4})
      for (const int threads : {1, 2}) {
        double rate = 0;
        EXPECT_EQ(rs_measure_peak(type, threads, &rate), RS_OK) << rs_last_error();
        EXPECT_TRUE(std::isfinite(rate)) << isa << " " << rs_type_name(type);
        EXPECT_GT(rate, 1e7) << isa << " " << rs_type_name(type);   // the scalar row under a sanitizer on an emulator
        EXPECT_LT(rate, 1e15) << isa << " " << rs_type_name(type);  // 60 times two AMX cores: the loop was not optimised away
      }
  }
  unsetenv("RS_ISA");
}

TEST(peak, default_threads_and_more_threads_than_cpus) {
  double rate = 0;
  EXPECT_EQ(rs_measure_peak(RS_W8, 0, &rate), RS_OK) << rs_last_error();
  EXPECT_GT(rate, 0);
  EXPECT_EQ(rs_measure_peak(RS_W8, 9, &rate), RS_OK) << rs_last_error();
  EXPECT_GT(rate, 0);
}

TEST(peak, errors) {
  const auto expect = [](int type, int threads, rs_status status, const std::string &part) {
    double rate = -1;
    EXPECT_EQ(rs_measure_peak(static_cast<rs_type>(type), threads, &rate), status);
    EXPECT_NE(std::string(rs_last_error()).find(part), std::string::npos) << rs_last_error();
    EXPECT_EQ(rate, -1);
  };
  expect(RS_I32, 1, RS_ERR_ARGUMENT, "type is i32 (3), expected");
  expect(6, 1, RS_ERR_ARGUMENT, "(6), expected f32, f16, bf16, w8 or w4");
  expect(RS_W8, -1, RS_ERR_ARGUMENT, "threads is -1");
  expect(RS_W8, 1025, RS_ERR_ARGUMENT, "threads is 1025");
  setenv("RS_ISA", "abacus", 1);
  expect(RS_W8, 1, RS_ERR_UNSUPPORTED, "RS_ISA=abacus");
  unsetenv("RS_ISA");
}

// ------------------------------------------------------------------------------------------------ the program

// The tiny model as f32, q8 and q4, converted once.  It has 40 positions and two special tokens.
class bench : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    shared_ = new temp_dir;
    tiny_bert tiny(3);
    for (const char *type : {"f32", "f16", "q8", "q4"}) ASSERT_EQ(tiny.convert(weights(type), type), RS_OK) << rs_last_error();
  }
  static void TearDownTestSuite() {
    delete shared_;
    shared_ = nullptr;
  }
  static std::string weights(const std::string &type) { return *shared_ / ("tiny-" + type + ".rsw"); }

  static run_result rs(strings arguments, const std::string &isa = "") {
    arguments.insert(arguments.begin(), program());
    run_options options;
    if (!isa.empty()) options.env = {"RS_ISA=" + isa};
    return run(arguments, options);
  }
  static run_result quick(const strings &more, const std::string &isa = "") {
    strings arguments = {"bench", "--seconds", "0.01"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return rs(arguments, isa);
  }
  static void expect_failure(const strings &arguments, int code, const std::string &part) {
    const run_result r = quick(arguments);
    EXPECT_EQ(r.code, code) << r;
    EXPECT_EQ(r.out, "") << r;
    EXPECT_EQ(r.err.compare(0, 4, "rs: "), 0) << r;
    EXPECT_EQ(r.err.find('\n'), r.err.size() - 1) << r;
    EXPECT_NE(r.err.find(part), std::string::npos) << r << "\nwanted: " << part;
  }

 private:
  static temp_dir *shared_;
};
temp_dir *bench::shared_ = nullptr;

void expect_ops(const json &ops, bool named) {
  ASSERT_TRUE(ops.is_array()) << ops;
  EXPECT_GT(ops.size(), 4u) << ops;
  double all = 0;
  for (const json &op : ops) {
    std::set<std::string> keys = {"op", "calls", "ms", "share", "gmacs_per_second", "share_of_peak"};
    if (named) keys.insert("name");
    EXPECT_EQ(keys_of(op), keys);
    EXPECT_GT(op.at("calls").get<double>(), 0) << op;
    EXPECT_GE(op.at("ms").get<double>(), 0) << op;
    EXPECT_GE(op.at("share").get<double>(), 0) << op;
    all += op.at("share").get<double>();
    const bool multiplies = op.at("op") == "linear" || op.at("op") == "flash_attn";
    EXPECT_EQ(op.at("gmacs_per_second").is_number(), multiplies) << op;
    EXPECT_EQ(op.at("share_of_peak").is_number(), multiplies) << op;
    if (!multiplies) continue;
    EXPECT_GT(op.at("gmacs_per_second").get<double>(), 0) << op;
    EXPECT_GT(op.at("share_of_peak").get<double>(), 0) << op;
    EXPECT_LT(op.at("share_of_peak").get<double>(), 1.1) << op;
  }
  EXPECT_NEAR(all, 1, 1e-6);
}

TEST_F(bench, json) {
  const run_result r = quick({"-m", weights("q8"), weights("f32"), "--shapes", "1x2,3x40,2x7", "-t", "2", "--seed", "9", "--json"});
  ASSERT_EQ(r.code, 0) << r;
  EXPECT_EQ(r.err, "");
  const std::vector<json> rows = lines_of_json(r.out);
  ASSERT_EQ(rows.size(), 6u);
  const size_t shapes[][2] = {{1, 2}, {3, 40}, {2, 7}};
  for (size_t i = 0; i < rows.size(); i++) {
    const json &row = rows[i];
    EXPECT_EQ(keys_of(row), (std::set<std::string>{"model", "weight_type", "isa", "threads", "batch", "tokens", "seed", "runs",
                                                   "median_ms", "p10_ms", "p90_ms", "tokens_per_second", "sequences_per_second",
                                                   "arena_bytes", "peak_rss_bytes"}));
    const std::string type = i % 2 ? "f32" : "q8";
    EXPECT_EQ(row.at("model"), weights(type));
    EXPECT_EQ(row.at("weight_type"), type);
    EXPECT_EQ(row.at("isa"), rs_isa());
    EXPECT_GE(row.at("threads"), 1);
    EXPECT_EQ(row.at("batch"), shapes[i / 2][0]);
    EXPECT_EQ(row.at("tokens"), shapes[i / 2][1]);
    EXPECT_EQ(row.at("seed"), 9);
    EXPECT_GE(row.at("runs"), 3);
    const double p10 = row.at("p10_ms"), median = row.at("median_ms"), p90 = row.at("p90_ms");
    EXPECT_GT(p10, 0);
    EXPECT_LE(p10, median);
    EXPECT_LE(median, p90);
    const double batch = row.at("batch"), tokens = row.at("tokens"), per_second = row.at("sequences_per_second");
    EXPECT_NEAR(per_second * median / 1e3, batch, 1e-6 * batch);
    EXPECT_NEAR(row.at("tokens_per_second").get<double>(), per_second * tokens, 1e-6 * per_second * tokens);
    EXPECT_GT(row.at("arena_bytes"), 0);
    EXPECT_GT(row.at("peak_rss_bytes"), 1 << 20);
  }
  EXPECT_GT(rows[2].at("arena_bytes"), rows[0].at("arena_bytes")) << "each case has a session of its own";
  EXPECT_LT(rows[4].at("arena_bytes"), rows[2].at("arena_bytes"));
  for (size_t i : {0, 2, 4}) EXPECT_EQ(rows[i].at("runs"), rows[i + 1].at("runs")) << "files take turns";
}

TEST_F(bench, ops_of_every_isa) {
  for (const std::string &isa : available_isas()) {
    const run_result r =
        quick({"-m", weights("f32"), weights("f16"), weights("q8"), weights("q4"), "--shapes", "2x16", "--json", "--ops"}, isa);
    ASSERT_EQ(r.code, 0) << r;
    const std::vector<json> rows = lines_of_json(r.out);
    ASSERT_EQ(rows.size(), 4u);
    for (const json &row : rows) {
      EXPECT_EQ(row.at("isa"), isa);
      expect_ops(row.at("ops"), false);
      for (const json &op : row.at("ops"))
        if (op.at("op") == "linear") {
          EXPECT_EQ(op.at("calls"), 8) << "of one run, four in each of two layers";
        }
    }
  }
}

TEST_F(bench, groupings) {
  const auto ops = [](const std::string &flag) {
    const run_result r = quick({"-m", weights("q8"), "--shapes", "1x8", "--json", flag});
    EXPECT_EQ(r.code, 0) << r;
    return lines_of_json(r.out).at(0).at("ops");
  };
  const auto count = [](const json &all, const char *op) {
    size_t n = 0;
    for (const json &one : all) n += one.at("op") == op;
    return n;
  };
  const auto has = [](const json &all, const char *name) {
    for (const json &one : all)
      if (one.at("name") == name) return true;
    return false;
  };
  EXPECT_EQ(count(ops("--ops=op"), "linear"), 1u);
  const json layer = ops("--ops=layer"), each = ops("--ops=each");
  expect_ops(layer, true);
  expect_ops(each, true);
  EXPECT_EQ(count(layer, "linear"), 4u);
  EXPECT_EQ(count(each, "linear"), 8u);
  EXPECT_TRUE(has(layer, "blk.*.mlp.up")) << layer;
  EXPECT_TRUE(has(each, "blk.1.mlp.up")) << each;
}

TEST_F(bench, table) {
  const run_result r = quick({"-m", weights("q8"), "-m", weights("q4"), "--shapes", "2x16", "--ops", "-t", "1"});
  ASSERT_EQ(r.code, 0) << r;
  EXPECT_EQ(r.err, "");
  for (const std::string &part : {std::string("rs ") + RS_VERSION + ", " + rs_isa() + ", 1 thread\n", weights("q8"), weights("q4"),
                                  std::string("2x16"), std::string("p10"), std::string("p90"), std::string("tokens/s"),
                                  std::string("sequences/s"), std::string("arena"), std::string("peak RSS"), std::string("of peak"),
                                  std::string("flash_attn"), std::string("total"), std::string("peak measured now: ")})
    EXPECT_NE(r.out.find(part), std::string::npos) << part << "\n" << r;
  EXPECT_EQ(r.out.find("nan"), std::string::npos) << r;
  EXPECT_EQ(r.out.find("inf"), std::string::npos) << r;
  EXPECT_EQ(quick({"-m", weights("q8"), "--shapes", "2x16"}).out.find("of peak"), std::string::npos) << "only with --ops";
}

TEST_F(bench, shapes_that_make_no_sense) {
  const std::string m = weights("q8");
  for (const char *shape : {"0x5", "1x", "axb", "x", "x5", "5", "1x0", "1x5x", "1x5x2", "-1x5", "1x-5", "+1x5", " 1x5", "1 x5",
                            "1X5", "65537x5", "1x65537", "99999999999999999999x5", "1.5x5"}) {
    expect_failure({"-m", m, "--shapes", shape}, 2, "--shapes: '" + std::string(shape) + "' is not BATCHxTOKENS");
  }
  expect_failure({"-m", m, "--shapes", "1x5,,1x6"}, 2, "--shapes: '' is not BATCHxTOKENS");
  expect_failure({"-m", m, "--shapes", "1x5,"}, 2, "--shapes: '' is not BATCHxTOKENS");
  expect_failure({"-m", m, "--shapes", "1x5,7y8"}, 2, "--shapes: '7y8' is not");
  expect_failure({"-m", m, "--shapes", "1x5,1x41"}, 2, "--shapes: 1x41: 41 tokens are more than the 40 positions of '" + m);
  expect_failure({"-m", m, "--shapes", "1x1"}, 2, "--shapes: 1x1: 1 tokens leave no room for the 2 special tokens of '" + m);
}

TEST_F(bench, wrong_usage_and_files) {
  const std::string m = weights("q8");
  expect_failure({}, 2, "--model is required");
  expect_failure({"-m", m, "-t", "0"}, 2, "wants a whole number from 1 to 1024");
  expect_failure({"-m", m, "--ops=size"}, 2, "size");
  for (const char *seconds : {"0", "-1", "nan", "inf", "1e9"}) expect_failure({"-m", m, "--seconds", seconds}, 2, "--seconds: ");
  expect_failure({"-m", m, "--seconds", "long"}, 2, "--seconds");
  for (const char *seed : {"-1", "x", "1.5"}) expect_failure({"-m", m, "--seed", seed}, 2, "--seed");
  expect_failure({"-m", m, "/nonexistent/no.rsw"}, 1, "/nonexistent/no.rsw");
  const run_result isa = quick({"-m", m}, "abacus");
  EXPECT_EQ(isa.code, 1) << isa;
  EXPECT_NE(isa.err.find("RS_ISA=abacus"), std::string::npos) << isa;
}

// A file of images needs no tokenizer, so that nobody has looked at what its metadata say of one.
TEST_F(bench, a_template_that_is_none) {
  const temp_dir dir;
  ASSERT_EQ(tiny_vit().convert(dir / "vit.rsw"), RS_OK) << rs_last_error();
  const loaded vit(dir / "vit.rsw");
  rs_writer *w = nullptr;
  ASSERT_EQ(rs_writer_open((dir / "hostile.rsw").c_str(), &w), RS_OK);
  EXPECT_EQ(rs_writer_set_str(w, "tokenizer.single", "[CLS] $A"), RS_OK);
  EXPECT_EQ(rs_writer_copy(w, vit.model), RS_OK);
  EXPECT_EQ(rs_writer_finish(w), RS_OK) << rs_last_error();
  rs_writer_free(w);
  expect_failure({"-m", dir / "hostile.rsw"}, 1, "the template of the tokenizer is not a list of ids");
}

TEST_F(bench, profile_of_embed_has_the_same_table) {
  const auto embed = [](const std::string &flag) {
    const run_result r = rs({"embed", "-m", weights("q8"), flag, "hello world", "the cat"});
    EXPECT_EQ(r.code, 0) << r;
    EXPECT_EQ(lines_of_json(r.out).size(), 2u) << r;
    return r.err;
  };
  for (const char *part : {"operator", "of time", "of peak", "linear", "total", "peak measured now: ", "w8 "})
    EXPECT_NE(embed("--profile").find(part), std::string::npos) << part;
  EXPECT_EQ(embed("--profile").find("mlp.up"), std::string::npos);
  EXPECT_NE(embed("--profile=layer").find("blk.*.mlp.up"), std::string::npos);
  EXPECT_NE(embed("--profile=each").find("blk.1.mlp.up"), std::string::npos);
}

TEST_F(bench, profile_rows_know_the_type_of_their_arithmetic) {
  const loaded m(weights("q4"), 1);
  rs_session_params params = {};
  params.size = sizeof params;
  params.profile = true;
  rs_session *session = nullptr;
  ASSERT_EQ(rs_session_create(m.model, &params, &session), RS_OK) << rs_last_error();
  const rs_text text = {"hello", RS_NUL_TERMINATED};
  float vector[32];
  EXPECT_EQ(rs_encode(session, &text, 1, nullptr, vector, 32, nullptr), RS_OK) << rs_last_error();
  size_t linear = 0;
  for (size_t i = 0; i < rs_session_profile_count(session); i++) {
    rs_profile_row row;
    ASSERT_EQ(rs_session_profile_at(session, i, &row), RS_OK);
    const bool is_linear = std::string(row.op) == "linear";
    // Attention of quantized layers may be in bf16 or bytes.
    const bool coarse = std::string(row.op) == "flash_attn" && (row.type == RS_BF16 || row.type == RS_W8);
    EXPECT_TRUE(coarse || row.type == (is_linear ? RS_W4 : RS_F32)) << row.name;
    linear += is_linear;
  }
  EXPECT_EQ(linear, 8u);
  rs_session_free(session);
}

TEST_F(bench, peaks_of_a_card) {
  const loaded m(weights("q8"), 1);
  peak_rates peaks(m.model, 1);
  EXPECT_FALSE(peaks.on_card());
  peaks.device.memory_bytes = 1;
  peaks.device.int8_macs = 1e12, peaks.device.f16_macs = 6e11, peaks.device.bytes_per_second = 1e9;
  const op_time linear = {"linear", "a", RS_W8, 1, 2, 1e12, 0}, floats = {"linear", "b", RS_F32, 1, 8, 1e12, 0},
                attention = {"flash_attn", "c", RS_F32, 1, 1, 6e11, 0}, much = {"linear", "d", RS_W4, 1, 1, 1e12, 3e9};
  const auto share = [&](const op_time &time) { return op_json({time}, "op", 1, &peaks).at(0).at("share_of_peak"); };
  EXPECT_NEAR(share(linear).get<double>(), 0.5, 1e-9);
  EXPECT_NEAR(share(floats).get<double>(), 5 / 8.0, 1e-9);
  EXPECT_NEAR(share(attention).get<double>(), 1, 1e-9);
  EXPECT_NEAR(share(much).get<double>(), 3, 1e-9);
  EXPECT_NE(peaks.str().find("int8 1.0, f16 0.6 TMAC/s (floats: three products in bf16), memory 1.0 GB/s\n"), std::string::npos);
  peaks.device.bytes_per_second = 0;
  EXPECT_NEAR(share(much).get<double>(), 1, 1e-9);
  peaks.device.int8_macs = peaks.device.f16_macs = 0;
  for (const op_time &time : {linear, floats, attention}) EXPECT_TRUE(share(time).is_null()) << time.name;
  EXPECT_NE(peaks.str().find("int8 -, f16 - TMAC/s (floats: three products in bf16), memory - GB/s\n"), std::string::npos)
      << peaks.str();
  const std::string table = op_table({linear}, "op", 1, &peaks);
  EXPECT_NE(table.find("-\n"), std::string::npos) << table;
}

TEST(bench_model, a_real_one_stays_below_the_peak) {
  RS_NEED_MODEL("q8");
  const run_result r =
      run({program(), "bench", "-m", model_path("q8"), "--shapes", "8x128", "--seconds", "0.2", "--json", "--ops=layer"});
  ASSERT_EQ(r.code, 0) << r;
  expect_ops(lines_of_json(r.out).at(0).at("ops"), true);
}

}  // namespace
