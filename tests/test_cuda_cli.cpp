// The program rs on a card: kernels run on the CPU (cuda_host.h), in a library that RS_CUDA_LIBRARY names.
#include <cmath>
#include <set>

#include "cli_util.h"
#include "cuda_device.h"
#include "tiny_bert.h"
#include "tiny_dinov2.h"

namespace {

const ::testing::Environment *const environment = ::testing::AddGlobalTestEnvironment(new host_environment("check=0"));

class cuda_cli : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    shared_ = new temp_dir;
    tiny_bert tiny(3);
    for (const char *type : {"f32", "q8", "q4"}) ASSERT_EQ(tiny.convert(weights(type), type), RS_OK) << rs_last_error();
    tiny_bert head(5);
    head.add_head(RS_HEAD_SEQUENCE, {"good", "bad"});
    ASSERT_EQ(head.convert(weights("head"), "q8"), RS_OK) << rs_last_error();
    ASSERT_EQ(tiny_dinov2().convert(weights("image"), "q8"), RS_OK) << rs_last_error();
  }
  static void TearDownTestSuite() {
    delete shared_;
    shared_ = nullptr;
  }
  static std::string weights(const std::string &type) { return *shared_ / ("tiny-" + type + ".rsw"); }
  static run_result bench(const strings &more) {
    strings arguments = {"bench", "--seconds", "0.001", "--device", "cuda"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return rs(arguments);
  }

 private:
  static temp_dir *shared_;
};
temp_dir *cuda_cli::shared_ = nullptr;

TEST_F(cuda_cli, bench_table) {
  const run_result r = bench({"-m", weights("q8"), weights("f32"), "--shapes", "1x4,3x9", "--ops=each"});
  ASSERT_EQ(r.code, 0) << r;
  EXPECT_EQ(r.err, "");
  auto info = sized<rs_device_info>();
  ASSERT_EQ(rs_device_get_info("cuda", &info), RS_OK) << rs_last_error();
  for (const std::string &part :
       {std::string("rs ") + RS_VERSION + ", cuda:0, " + info.name + "\n", std::string("device memory"), std::string("peak RSS"),
        std::string("of peak"), std::string("tokens/s"), std::string("flash_attn"),
        std::string("peaks by the clocks that the card states: int8 "), std::string("blk.1.mlp.up")})
    EXPECT_NE(r.out.find(part), std::string::npos) << part << "\n" << r;
  for (const char *part : {"thread", "measured now", "nan", "inf ", rs_isa()})
    EXPECT_EQ(r.out.find(part), std::string::npos) << part << "\n" << r;
}

TEST_F(cuda_cli, bench_json) {
  auto info = sized<rs_device_info>();
  ASSERT_EQ(rs_device_get_info("cuda", &info), RS_OK) << rs_last_error();
  const run_result r = bench({"-m", weights("q8"), weights("q4"), weights("f32"), "--shapes", "1x4", "--json", "--ops"});
  ASSERT_EQ(r.code, 0) << r;
  const std::vector<json> rows = jsonl(r.out);
  ASSERT_EQ(rows.size(), 3u) << r;
  for (const json &row : rows) {
    EXPECT_EQ(row.at("device"), "cuda:0");
    EXPECT_EQ(row.at("device_name"), info.name);
    EXPECT_FALSE(row.contains("threads")) << row;
    EXPECT_FALSE(row.contains("isa")) << row;
    EXPECT_GT(row.at("share_of_peak"), 0) << row;
    EXPECT_LT(row.at("share_of_peak"), 1) << row;
    EXPECT_EQ(row.at("peak_int8_macs_per_second"), info.int8_macs);
    EXPECT_EQ(row.at("peak_f16_macs_per_second"), info.f16_macs);
    EXPECT_EQ(row.at("peak_bytes_per_second"), info.bytes_per_second);
    EXPECT_GT(row.at("weight_bytes"), 1000);
    EXPECT_GT(row.at("arena_bytes"), 0);
    EXPECT_GT(row.at("peak_rss_bytes"), 1 << 20);
    for (const json &op : row.at("ops")) {
      EXPECT_EQ(op.at("with_another"), op.at("ms") == 0) << op;
      EXPECT_EQ(op.at("share_of_peak").is_number(), op.at("op") == "linear" || op.at("op") == "flash_attn") << op;
    }
  }
}

TEST_F(cuda_cli, the_bound_is_what_the_card_states) {
  auto info = sized<rs_device_info>();
  ASSERT_EQ(rs_device_get_info("cuda", &info), RS_OK) << rs_last_error();
  // Of a model this small, memory is the longer time.
  const double tokens = 12;
  int checked = 0;
  const int64_t shapes[][2] = {{96, 32}, {32, 32}, {64, 32}, {32, 64}};
  for (const bool quantized : {true, false}) {
    const run_result r = bench({"-m", weights(quantized ? "q8" : "f32"), "--shapes", "3x4", "--json", "--ops"});
    ASSERT_EQ(r.code, 0) << r;
    double least = 0;
    for (const auto &s : shapes) {
      size_t bytes = 0;
      ASSERT_EQ(rs_tensor_bytes(quantized ? RS_W8 : RS_F32, RS_PANELS, 2, s, &bytes), RS_OK);
      const auto n = static_cast<double>(s[0]), k = static_cast<double>(s[1]);
      const double memory = (static_cast<double>(bytes) + tokens * (k * (quantized ? 1 : 4) + 2 * n)) / info.bytes_per_second;
      least += 2 * std::max(memory, tokens * n * k / (quantized ? info.int8_macs : info.f16_macs / 3));
    }
    const json ops = jsonl(r.out).at(0).at("ops");
    for (const json &op : ops)
      if (op.at("op") == "linear") {
        const double got = op.at("share_of_peak").get<double>() * op.at("ms").get<double>() / 1000;
        EXPECT_NEAR(got, least, 1e-6 * least) << op;
        checked++;
      }
  }
  EXPECT_EQ(checked, 2);
}

TEST_F(cuda_cli, shapes_of_a_card) {
  const std::string help = rs({"bench", "--help"}).out;
  for (const char *part :
       {"1x16,1x128,1x512,32x16,32x128,32x512,256x16,256x128,256x512", "1x224,32x224,1x518,32x518", "the card states"})
    EXPECT_NE(help.find(part), std::string::npos) << part << "\n" << help;
  // Where there are fewer positions, as many tokens as these.
  tiny_bert short_texts(4);
  short_texts.layers = 1, short_texts.positions = 5;
  ASSERT_EQ(short_texts.convert(weights("short"), "q8"), RS_OK) << rs_last_error();
  const run_result r = bench({"-m", weights("short"), "--json"});
  ASSERT_EQ(r.code, 0) << r;
  const std::vector<json> rows = jsonl(r.out);
  ASSERT_EQ(rows.size(), 3u) << r;
  for (size_t i = 0; i < 3; i++) {
    EXPECT_EQ(rows[i].at("batch"), (std::vector<int>{1, 32, 256})[i]);
    EXPECT_EQ(rows[i].at("tokens"), 5);
  }
}

TEST_F(cuda_cli, images_and_what_is_done_with_another) {
  const run_result r = bench({"-m", weights("image"), "--shapes", "2x32", "--ops=layer"});
  ASSERT_EQ(r.code, 0) << r;
  for (const char *part : {"2x32", "images/s", "with another"}) EXPECT_NE(r.out.find(part), std::string::npos) << part << "\n" << r;
  size_t with_another = 0;
  const json ops = jsonl(bench({"-m", weights("image"), "--shapes", "2x32", "--ops=each", "--json"}).out).at(0).at("ops");
  for (const json &op : ops) {
    with_another += op.at("with_another").get<bool>();
    if (!op.at("with_another").get<bool>()) continue;
    EXPECT_EQ(op.at("op"), "add") << op;
    EXPECT_TRUE(op.at("share_of_peak").is_null()) << op;
  }
  EXPECT_GT(with_another, 0u);
}

TEST_F(cuda_cli, vectors_and_labels_are_those_of_the_cpu) {
  const auto rows = [](const std::string &device, strings arguments) {
    arguments.insert(arguments.end(), {"--device", device});
    const run_result r = rs(arguments, "hello world\nthe cat sat on the mat.\na dog\n");
    EXPECT_EQ(r.code, 0) << r;
    return jsonl(r.out);
  };
  for (const char *type : {"f32", "q8", "q4"}) {
    const std::vector<json> cpu = rows("cpu", {"embed", "-m", weights(type)}), card = rows("cuda", {"embed", "-m", weights(type)});
    ASSERT_EQ(card.size(), 3u);
    ASSERT_EQ(cpu.size(), 3u);
    for (size_t i = 0; i < 3; i++) {
      const std::vector<float> a = floats(cpu[i].at("embedding")), b = floats(card[i].at("embedding"));
      EXPECT_EQ(cpu[i].at("tokens"), card[i].at("tokens"));
      EXPECT_GT(lowest_cosine(a, b, a.size()), 0.9999) << type;
    }
  }
  const std::vector<json> cpu = rows("cpu", {"classify", "-m", weights("head")}),
                          card = rows("cuda", {"classify", "-m", weights("head")});
  ASSERT_EQ(card.size(), 3u);
  for (size_t i = 0; i < 3; i++) {
    EXPECT_EQ(cpu[i].at("label"), card[i].at("label")) << card[i];
    EXPECT_NEAR(cpu[i].at("score").get<double>(), card[i].at("score").get<double>(), 1e-2) << card[i];
  }
}

TEST_F(cuda_cli, profile_of_embed) {
  const run_result r = rs({"embed", "-m", weights("q8"), "--device", "cuda", "--profile", "hello"});
  ASSERT_EQ(r.code, 0) << r;
  for (const char *part : {"linear", "flash_attn", "the card states"}) EXPECT_NE(r.err.find(part), std::string::npos) << r;
}

TEST_F(cuda_cli, info) {
  const run_result text = rs({"info", weights("q8"), "--device", "cuda"}), cpu = rs({"info", weights("q8"), "--device", "cpu"});
  EXPECT_NE(text.out.find("cuda:0, "), std::string::npos) << text;
  EXPECT_NE(cpu.out.find(std::string("cpu, ") + rs_isa()), std::string::npos) << cpu;
  const json device = json::parse(rs({"info", weights("q8"), "--device", "auto", "--json"}).out);
  EXPECT_EQ(device.at("device"), "cuda:0");
  EXPECT_NE(device.at("device_name").get<std::string>().find("compute capability"), std::string::npos) << device;
}

// A graph of one call leaves nothing on the card: not what it added to the tokens of its image, either.
TEST_F(cuda_cli, traces_leave_nothing_on_the_card) {
  const loaded_on card(weights("image"), "cuda");
  auto info = sized<rs_model_info>();
  ASSERT_EQ(rs_model_get_info(card.model, &info), RS_OK);
  const std::vector<float> pixels(static_cast<size_t>(3 * info.image_width * info.image_height), 0.25f);
  const rs_image image = {RS_IMAGE_PIXELS, pixels.data(), 0, info.image_width, info.image_height};
  rs_drop *drop = nullptr;
  ASSERT_EQ(rs_drop_parse("ratios=0.5", &drop), RS_OK);
  auto p = sized<rs_encode_params>();
  p.drop = drop;
  size_t bytes = 0;
  for (int i = 0; i < 4; i++) {
    rs_trace *trace = nullptr;
    ASSERT_EQ(rs_trace_image(card.session, &image, &p, &trace), RS_OK) << rs_last_error();
    rs_trace_free(trace);
    if (i == 0) bytes = rs_session_arena_bytes(card.session);
    EXPECT_EQ(rs_session_arena_bytes(card.session), bytes) << i;
  }
  EXPECT_GT(bytes, 0u);
  rs_drop_free(drop);
}

// What rs convert writes does not depend on the machine's card.
TEST_F(cuda_cli, convert_is_the_cpus) {
  const run_result r = rs({"bench", "-m", weights("q8"), "--device", "tpu"});
  EXPECT_EQ(r.code, 2) << r;  // such a device is an error where one is asked for
  run_options options;
  options.env = {"RS_DEVICE=tpu"};
  const std::string folder = source_dir() + "/tests/vision/vit";
  temp_dir out;
  const run_result converted = run({program(), "convert", folder, "-o", out / "vit.rsw", "--type", "q8"}, options);
  EXPECT_EQ(converted.code, 0) << converted;
}

}  // namespace
