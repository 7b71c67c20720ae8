// Whole models on the CUDA backend, whose kernels run on the CPU here (cuda_host.h).  That shared memory is used as it should be is
// for the tests of kernels; here it is not looked at, which takes a fraction of the time.
#include "cuda_device.h"

#include <cmath>

using vec = std::vector<float>;

namespace {

const ::testing::Environment *const environment = ::testing::AddGlobalTestEnvironment(new host_environment("check=0"));

const std::vector<std::string> texts = {"The cat sits on the mat.", "Interest rates rose by half a percent.", "a",
                                        "A kitten is napping in the sun, and nobody knows for how long it will go on."};

std::string test_model(const std::string &name) {
  return path_if_exists(env_or("RS_TEST_MODELS", RS_DEFAULT_TEST_MODELS) + "/" + name + ".rsw");
}

vec vectors(const std::string &path, const char *device, const char *drop_text) {
  const loaded_on m(path, device);
  EXPECT_EQ(std::string(rs_model_device(m.model)), std::string(device) == "cpu" ? "cpu" : "cuda:0");
  rs_drop *drop = nullptr;
  EXPECT_TRUE(!*drop_text || rs_drop_parse(drop_text, &drop) == RS_OK) << rs_last_error();
  auto p = sized<rs_encode_params>();
  p.drop = drop;
  vec out = encode(m.session, texts, p, 384);
  rs_drop_free(drop);
  return out;
}

const char *const text_schedules[] = {"", "ratios=0.2,0,0.3,0,0.2", "ratios=0,0.3,0,0.4 mode=merge score=attn-cls",
                                      "ratios=0,0,0.5 mode=fold"};

TEST(model_on_a_card, minilm_of_floats_agrees_with_the_cpu) {
  const std::string path = test_model("minilm-f32");
  if (path.empty()) GTEST_SKIP() << "no minilm-f32.rsw";
  for (const char *drop : text_schedules)
    EXPECT_GE(lowest_cosine(vectors(path, "cuda", drop), vectors(path, "cpu", drop), 384), 0.9999) << drop;
}

// Layers of 8 bits turn a difference in the last bit into one of a step, so that vectors of q8 differ by its own noise from device
// to device, as they do from one row of the CPU's kernels to another.  How far from f32 they are is what counts.
TEST(model_on_a_card, minilm_of_few_bits_is_as_near_to_f32_as_on_the_cpu) {
  const std::string f32 = test_model("minilm-f32");
  if (f32.empty()) GTEST_SKIP() << "no minilm-f32.rsw";
  const vec truth = vectors(f32, "cpu", "");
  for (const char *name : {"minilm-q8", "minilm-q4"}) {
    const std::string path = test_model(name);
    if (path.empty()) GTEST_SKIP() << "no " << name << ".rsw";
    const double card = 1 - lowest_cosine(vectors(path, "cuda", ""), truth, 384);
    const double cpu = 1 - lowest_cosine(vectors(path, "cpu", ""), truth, 384);
    EXPECT_LE(card, 1.25 * cpu + 1e-4) << name;
  }
}

// Of n pictures.
vec image_vectors(const std::string &path, const char *device, const char *drop_text, size_t n = 1) {
  const loaded_on m(path, device);
  constexpr size_t values = 3 * 98 * 98;
  vec pixels(n * values);
  for (size_t k = 0; k < pixels.size(); k++) {
    const size_t i = k % values, picture = k / values;
    pixels[k] = std::sin(static_cast<float>(i % 98) / static_cast<float>(9 + picture)) +
                std::cos(static_cast<float>(i / 98) / static_cast<float>(17 - 3 * picture)) +
                static_cast<float>(k * 2654435761u % 1000) / 1000;
  }
  std::vector<rs_image> all;
  for (size_t k = 0; k < n; k++) all.push_back({RS_IMAGE_PIXELS, pixels.data() + k * values, 0, 98, 98});
  rs_drop *drop = nullptr;
  EXPECT_TRUE(!*drop_text || rs_drop_parse(drop_text, &drop) == RS_OK) << rs_last_error();
  auto p = sized<rs_encode_params>();
  p.drop = drop, p.image_width = p.image_height = 98;
  vec out(n * 384);
  EXPECT_EQ(rs_encode_images(m.session, all.data(), n, &p, out.data(), out.size(), nullptr), RS_OK) << rs_last_error();
  rs_drop_free(drop);
  return out;
}

// 1 - cosine, on average.
double distance(const vec &a, const vec &b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); i += 384) sum += 1 - cosine(a.data() + i, b.data() + i, 384);
  return sum / (static_cast<double>(a.size()) / 384);
}

TEST(model_on_a_card, dinov2_agrees_with_the_cpu) {
  const std::string f32 = test_model("dinov2-f32"), q8 = test_model("dinov2-q8");
  if (f32.empty() || q8.empty()) GTEST_SKIP() << "no dinov2-f32.rsw or dinov2-q8.rsw";
  for (const char *drop : {"", "ratios=0,0,0,0.3,0,0,0.3", "ratios=0,0,0,0,0,0.35,0,0,0.4 score=centre mode=merge"})
    EXPECT_GE(lowest_cosine(image_vectors(f32, "cuda", drop), image_vectors(f32, "cpu", drop), 384), 0.9999) << drop;
  // Of one picture the noise of 8 bits is 1e-4 to 1e-3, whatever computes it.
  const vec truth = image_vectors(f32, "cpu", "", 4);
  EXPECT_LE(distance(image_vectors(q8, "cuda", "", 4), truth), 1.5 * distance(image_vectors(q8, "cpu", "", 4), truth) + 1e-4);
}

// A tiny one, of random weights: rotary positions and windows, and both behind drops.
TEST(model_on_a_card, modernbert_agrees_with_the_cpu) {
  const temp_dir dir;
  const std::string folder = source_dir() + "/tests/texts/modernbert";
  const auto states = [&](const std::string &path, const char *device, const char *drop_text) {
    const loaded_on m(path, device);
    rs_drop *drop = nullptr;
    EXPECT_TRUE(!*drop_text || rs_drop_parse(drop_text, &drop) == RS_OK) << rs_last_error();
    auto p = sized<rs_encode_params>();
    p.drop = drop, p.pooling = RS_POOL_MEAN;
    vec out = encode(m.session, texts, p, 32);
    rs_drop_free(drop);
    return out;
  };
  for (const auto &[type, least] : {std::pair("f32", 0.9999), std::pair("q8", 0.99)}) {
    const std::string path = dir / type;
    const run_result r = run({program(), "convert", folder, "-o", path, "--type", type, "--calibrate", "none"}, {});
    ASSERT_EQ(r.code, 0) << r;
    // Scores that no last bit decides.
    for (const char *drop :
         {"", "ratios=0.4,0,0.5 score=first", "ratios=0.5 score=random mode=restore", "ratios=0.3,0.3 score=first mode=fold"})
      EXPECT_GE(lowest_cosine(states(path, "cuda", drop), states(path, "cpu", drop), 32), least) << type << " " << drop;
  }
}

TEST(model_on_a_card, profile_has_every_operator) {
  const std::string path = test_model("minilm-q8");
  if (path.empty()) GTEST_SKIP() << "no minilm-q8.rsw";
  loaded_on card(path, "cuda", true);
  const auto p = sized<rs_encode_params>();
  encode(card.session, {"a cat"}, p, 384);
  ASSERT_GT(rs_session_profile_count(card.session), 20u);
  double seconds = 0, macs = 0;
  for (size_t i = 0; i < rs_session_profile_count(card.session); i++) {
    rs_profile_row row;
    ASSERT_EQ(rs_session_profile_at(card.session, i, &row), RS_OK);
    EXPECT_EQ(row.calls, 1u) << row.name;
    seconds += row.seconds, macs += row.macs;
  }
  EXPECT_GT(seconds, 0);
  EXPECT_GT(macs, 1e7);
}

TEST(model_on_a_card, a_session_is_where_its_model_is) {
  const std::string path = test_model("minilm-q8");
  if (path.empty()) GTEST_SKIP() << "no minilm-q8.rsw";
  loaded_on card(path, "cuda");
  auto p = sized<rs_session_params>();
  p.device = "cpu";
  rs_session *s = nullptr;
  EXPECT_EQ(rs_session_create(card.model, &p, &s), RS_ERR_ARGUMENT);
  EXPECT_NE(std::string(rs_last_error()).find("the model is on cuda:0"), std::string::npos) << rs_last_error();
}

}  // namespace
