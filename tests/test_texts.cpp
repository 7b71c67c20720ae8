// Families that take texts: ModernBERT, RoBERTa and DistilBERT against what transformers answers on tiny models
// (tests/texts/make_fixtures.py says how they were made), and what must hold of rotary positions and windows in a whole model.
#include "cli_util.h"
#include "encoding.h"
#include "fixture.h"
#include "tiny_bert.h"
#include "tiny_model.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>

using namespace std::string_literals;

namespace {

using vec = std::vector<float>;

constexpr size_t width = 32;  // of a state

std::map<std::string, array> expected_of(const std::string &name) {
  return read_arrays(source_dir() + "/tests/texts/" + name + "/expected.safetensors");
}

const strings &texts() {
  static const auto all = json::parse(read_file(source_dir() + "/tests/texts/texts.json")).get<strings>();
  return all;
}

// f32 sums in another order than torch's, four layers deep.
constexpr double f32_error = 3e-5;

std::string folder_of(const std::string &name) { return source_dir() + "/tests/texts/" + name; }

std::string converted(const temp_dir &dir, const std::string &name, const std::string &type) {
  std::string path = dir / (name + "-" + type + ".rsw");
  const run_result r = rs({"convert", folder_of(name), "-o", path, "--type", type, "--calibrate", "none"});
  EXPECT_EQ(r.code, 0) << r;
  return path;
}

const char *const names[] = {
    "modernbert",         "modernbert-bare", "modernbert-classifier", "modernbert-mean",   "modernbert-tokens",
    "modernbert-answers", "roberta",         "roberta-classifier",    "roberta-tokens",    "roberta-answers",
    "distilbert",         "distilbert-bare", "distilbert-classifier", "distilbert-tokens", "distilbert-answers"};

rs_encode_params states_of_tokens(int layer_plus_one = 0) {
  auto p = sized<rs_encode_params>();
  p.pooling = RS_POOL_NONE, p.normalize = RS_OFF, p.layer_plus_one = layer_plus_one;
  return p;
}

vec encode_ids(rs_session *s, const std::vector<int32_t> &ids, const std::vector<int32_t> &lengths, const rs_encode_params &p,
               size_t floats) {
  std::vector<size_t> starts = {0};
  for (const int32_t n : lengths) starts.push_back(starts.back() + static_cast<size_t>(n));
  vec out(floats);
  EXPECT_EQ(rs_encode_ids(s, ids.data(), nullptr, starts.data(), lengths.size(), &p, out.data(), out.size()), RS_OK)
      << rs_last_error();
  return out;
}

vec classify(rs_session *s, const strings &all, const strings *pairs, size_t floats) {
  const std::vector<rs_text> views = views_of(all), others = pairs ? views_of(*pairs) : views;
  vec out(floats);
  EXPECT_EQ(rs_classify(s, views.data(), pairs ? others.data() : nullptr, views.size(), nullptr, out.data(), out.size(), nullptr),
            RS_OK)
      << rs_last_error();
  return out;
}

// States of all tokens that are left.
vec left_of(rs_session *s, const strings &all, const char *drop_text, std::vector<rs_text_info> *infos = nullptr) {
  auto p = states_of_tokens();
  rs_drop *drop = nullptr;
  EXPECT_TRUE(!*drop_text || rs_drop_parse(drop_text, &drop) == RS_OK) << rs_last_error();
  p.drop = drop;
  const std::vector<rs_text> views = views_of(all);
  std::vector<rs_text_info> own;
  if (!infos) infos = &own;
  infos->assign(all.size(), {});
  vec out(all.size() * 128 * width);
  EXPECT_EQ(rs_encode(s, views.data(), views.size(), &p, out.data(), out.size(), infos->data()), RS_OK) << rs_last_error();
  rs_drop_free(drop);
  size_t rows = 0;
  for (const rs_text_info &i : *infos) rows += static_cast<size_t>(i.kept);
  out.resize(rows * width);
  return out;
}

}  // namespace

TEST(texts, every_family_gives_what_its_reference_does) {
  const temp_dir dir;
  for (const std::string name : names) {
    SCOPED_TRACE(name);
    const loaded m(converted(dir, name, "f32"));
    ASSERT_TRUE(m.session);
    auto expected = expected_of(name);
    const std::vector<int32_t> &ids = expected["ids"].ints, &lengths = expected["lengths"].ints;
    size_t at = 0;
    for (size_t i = 0; i < texts().size(); i++) {
      std::vector<int32_t> got(256);
      size_t n = 0;
      const rs_text text = {texts()[i].data(), texts()[i].size()};
      ASSERT_EQ(rs_tokenize(m.model, &text, nullptr, got.data(), nullptr, nullptr, got.size(), &n), RS_OK) << rs_last_error();
      got.resize(n);
      EXPECT_EQ(got, std::vector<int32_t>(ids.begin() + static_cast<std::ptrdiff_t>(at),
                                          ids.begin() + static_cast<std::ptrdiff_t>(at) + lengths[i]))
          << texts()[i];
      at += static_cast<size_t>(lengths[i]);
    }
    for (int layer = 0; expected.count("states." + std::to_string(layer)); layer++) {
      const vec &states = expected["states." + std::to_string(layer)].values;
      EXPECT_LE(relative_error(encode_ids(m.session, ids, lengths, states_of_tokens(layer + 1), states.size()), states), f32_error)
          << "layer " << layer;
      const bool last = !expected.count("states." + std::to_string(layer + 1));
      if (last) {
        EXPECT_LE(relative_error(left_of(m.session, texts(), ""), states), f32_error);
      }
    }
    if (expected.count("logits")) {
      const vec &logits = expected["logits"].values;
      EXPECT_LE(relative_error(classify(m.session, texts(), nullptr, logits.size()), logits), f32_error);
    }
    if (expected.count("pair.logits")) {
      const vec &logits = expected["pair.logits"].values;
      const strings a = {texts()[1]}, b = {texts()[2]};
      EXPECT_LE(relative_error(classify(m.session, a, &b, logits.size()), logits), f32_error);
    }
  }
}

TEST(texts, heads_are_those_of_the_folder) {
  const temp_dir dir;
  const std::map<std::string, rs_head> heads = {{"modernbert", RS_HEAD_NONE},
                                                {"modernbert-mean", RS_HEAD_SEQUENCE},
                                                {"modernbert-tokens", RS_HEAD_TOKENS},
                                                {"modernbert-answers", RS_HEAD_SPANS},
                                                {"roberta-classifier", RS_HEAD_SEQUENCE},
                                                {"roberta-tokens", RS_HEAD_TOKENS},
                                                {"roberta-answers", RS_HEAD_SPANS},
                                                {"distilbert", RS_HEAD_NONE},
                                                {"distilbert-classifier", RS_HEAD_SEQUENCE},
                                                {"distilbert-tokens", RS_HEAD_TOKENS},
                                                {"distilbert-answers", RS_HEAD_SPANS}};
  for (const auto &[name, head] : heads) {
    SCOPED_TRACE(name);
    const loaded m(converted(dir, name, "q8"));
    auto info = sized<rs_model_info>();
    ASSERT_EQ(rs_model_get_info(m.model, &info), RS_OK);
    EXPECT_EQ(info.head, head);
    EXPECT_EQ(info.position_limit, 128);
    if (head == RS_HEAD_SEQUENCE || head == RS_HEAD_TOKENS) {
      EXPECT_STREQ(rs_model_label(m.model, 2), "label 2");
    }
  }
}

// Some files have a pooler beside the head, which has no use for it.
// A token of nothing but spaces has no place in the text, and a label.
TEST(texts, every_token_of_a_text_has_a_label) {
  const temp_dir dir;
  for (const std::string name : {"roberta-tokens", "modernbert-tokens"}) {
    const std::string path = converted(dir, name, "f32");
    const std::string text = "two  words   and spaces ";
    const run_result tokens = rs({"tokenize", "-m", path, "--", text}),
                     labels = rs({"classify", "-m", path, "--tokens", "--", text});
    ASSERT_EQ(labels.code, 0) << labels;
    const json ids = json::parse(tokens.out)["ids"], found = json::parse(labels.out)["token_labels"];
    ASSERT_EQ(found.size(), ids.size() - 2) << labels;
    size_t empty = 0;
    for (const json &label : found) empty += label["begin"] == label["end"];
    if (name == "roberta-tokens") {  // whose places are without spaces
      EXPECT_GT(empty, 0u) << "no such token: " << tokens;
    }
  }
}

TEST(texts, a_pooler_beside_a_head_of_roberta_changes_nothing) {
  for (const auto &[name, head] : {std::pair("roberta-classifier", RS_HEAD_SEQUENCE), {"roberta-tokens", RS_HEAD_TOKENS}}) {
    SCOPED_TRACE(name);
    const temp_dir dir;
    std::filesystem::copy(folder_of(name), dir / "model");
    std::map<std::string, tiny_tensor> tensors;
    {
      const std::string path = dir / "model/model.safetensors";
      const safetensors_file file(path, path);
      for (const safetensors_entry &e : file.entries()) {
        ASSERT_EQ(e.dtype, "F32");
        tiny_tensor &t = tensors[e.name];
        t.shape = e.shape, t.values.resize(e.bytes / 4);
        memcpy(t.values.data(), e.data, e.bytes);
      }
    }
    tensors["roberta.pooler.dense.weight"] = {{width, width}, vec(width * width, 1)};
    tensors["roberta.pooler.dense.bias"] = {{width}, vec(width, 1)};
    write_file(dir / "model/model.safetensors", tiny_model::safetensors(tensors));
    const std::string path = dir / "m.rsw";
    const run_result r = rs({"convert", dir / "model", "-o", path, "--type", "f32"});
    ASSERT_EQ(r.code, 0) << r;
    const std::string plain_path = converted(dir, name, "f32");
    const loaded m(path), plain(plain_path);
    auto info = sized<rs_model_info>();
    ASSERT_EQ(rs_model_get_info(m.model, &info), RS_OK);
    EXPECT_EQ(info.head, head);
    EXPECT_EQ(left_of(m.session, {texts()[1]}, ""), left_of(plain.session, {texts()[1]}, ""));
    if (head == RS_HEAD_SEQUENCE) {
      EXPECT_EQ(classify(m.session, {texts()[1]}, nullptr, 3), classify(plain.session, {texts()[1]}, nullptr, 3));
    }
    const auto labels = [&](const std::string &file) { return rs({"classify", "-m", file, texts()[1]}).out; };
    EXPECT_EQ(labels(path), labels(plain_path));
  }
}

// Families without type ids: where the second text begins, the template knows.
TEST(texts, the_first_text_of_a_pair_is_protected) {
  const temp_dir dir;
  for (const std::string name : {"modernbert-classifier", "roberta-classifier", "distilbert-classifier"}) {
    const loaded m(converted(dir, name, "f32"));
    const rs_text question = {texts()[1].data(), texts()[1].size()}, passage = {texts()[2].data(), texts()[2].size()};
    auto p = sized<rs_encode_params>();
    rs_drop *drop = nullptr;
    ASSERT_EQ(rs_drop_parse("ratios=0.95 score=-first protect=prefix", &drop), RS_OK);
    p.drop = drop;
    rs_trace *trace = nullptr;
    ASSERT_EQ(rs_trace_text(m.session, &question, &passage, &p, &trace), RS_OK) << rs_last_error();
    const int32_t *positions = nullptr;
    const size_t kept = rs_trace_kept(trace, &positions), first = rs_trace_pair(trace);
    ASSERT_GT(first, 4u) << name;
    ASSERT_GE(kept, first) << name;
    for (size_t i = 0; i < first; i++) EXPECT_EQ(positions[i], static_cast<int32_t>(i)) << name;
    EXPECT_LT(kept, rs_trace_tokens(trace, nullptr, nullptr, nullptr)) << name;
    rs_trace_free(trace);
    // rs_classify, whose way is another, protects the same: without, other tokens are left.
    rs_model_info info;
    rs_model_get_info(m.model, &info);
    vec protected_logits(static_cast<size_t>(info.labels)), others(protected_logits);
    const auto logits = [&](rs_drop_protect protect, vec *out) {
      drop->protect = protect;
      return rs_classify(m.session, &question, &passage, 1, &p, out->data(), out->size(), nullptr);
    };
    ASSERT_EQ(logits(RS_PROTECT_PREFIX, &protected_logits), RS_OK) << rs_last_error();
    ASSERT_EQ(logits(RS_PROTECT_CLS, &others), RS_OK) << rs_last_error();
    EXPECT_NE(protected_logits, others) << name;
    rs_drop_free(drop);
  }
}

TEST(texts, types_are_as_near_as_their_bits_allow) {
  const temp_dir dir;
  for (const std::string name : {"modernbert", "roberta", "distilbert"}) {
    const loaded f32(converted(dir, name, "f32"));
    auto p = sized<rs_encode_params>();
    p.pooling = RS_POOL_MEAN;
    const std::vector<rs_text> views = views_of(texts());
    const auto encode = [&](rs_session *s) {
      vec out(views.size() * width);
      EXPECT_EQ(rs_encode(s, views.data(), views.size(), &p, out.data(), out.size(), nullptr), RS_OK) << rs_last_error();
      return out;
    };
    const vec wanted = encode(f32.session);
    for (const auto &[type, least] : std::map<std::string, double>{{"f16", 0.99999}, {"q8", 0.995}, {"q4", 0.8}}) {
      const loaded m(converted(dir, name, type));
      const vec got = encode(m.session);
      for (size_t i = 0; i < texts().size(); i++)
        EXPECT_GE(cosine(&got[i * width], &wanted[i * width], width), least) << name << " " << type << " text " << i;
    }
  }
}

// Bit for bit, whatever is beside a text, however many threads there are, and wherever a batch is parted.
TEST(texts, a_text_does_not_depend_on_its_neighbours_or_the_threads) {
  const temp_dir dir;
  strings all = texts();
  std::string longest;
  while (longest.size() < 110) longest += texts()[3].substr(0, 30) + " ";
  all.push_back(longest);
  for (const std::string name : {"modernbert", "roberta", "distilbert"})
    for (const std::string type : {"f32", "q8", "q4"}) {
      const std::string path = converted(dir, name, type);
      for (const char *drop : {"", "ratios=0.3,0.3 score=attn-colsum", "ratios=0,0.5 mode=merge score=-mlp",
                               "ratios=0.4,0 mode=fold score=attn-cls", "ratios=0.5 mode=restore score=centre+norm"}) {
        SCOPED_TRACE(name + " " + type + " " + drop);
        const loaded m(path, 2), parted(path, 3, 64);
        const vec together = left_of(m.session, all, drop);
        EXPECT_EQ(left_of(parted.session, all, drop), together);
        vec alone;
        for (const std::string &text : all) {
          const vec one = left_of(m.session, {text}, drop);
          alone.insert(alone.end(), one.begin(), one.end());
        }
        EXPECT_EQ(alone, together);
      }
    }
}

// ------------------------------------------------------------------------------------------------ token dropping

// Tokens that stay are turned by the angles of the places that they had, and windows count those that are left.
TEST(texts, tokens_that_stay_keep_their_positions) {
  const temp_dir dir;
  const loaded m(converted(dir, "modernbert", "f32"));
  auto expected = expected_of("modernbert");
  EXPECT_LE(relative_error(left_of(m.session, texts(), "ratios=0.4,0,0.5 score=norm"), expected["dropped"].values), f32_error);
  EXPECT_LE(relative_error(left_of(m.session, texts(), "ratios=0.4,0,0.5 score=norm mode=restore"), expected["restored"].values),
            f32_error);
}

TEST(texts, nothing_dropped_is_nothing_changed) {
  const temp_dir dir;
  for (const std::string name : {"modernbert", "roberta", "distilbert"}) {
    const loaded m(converted(dir, name, "q8"));
    const vec all = left_of(m.session, texts(), "");
    for (const char *mode : {"prune", "restore", "merge", "fold"})
      EXPECT_EQ(left_of(m.session, texts(), ("ratios=0,0 score=norm min=0 mode="s + mode).c_str()), all);
    // Where a layer may drop but has too few tokens to, its operators are there.
    for (const char *mode : {"prune", "restore", "merge", "fold"})
      EXPECT_EQ(left_of(m.session, texts(), ("ratios=0.5,0.5 score=norm min=128 mode="s + mode).c_str()), all)
          << name << " " << mode;
  }
}

TEST(texts, every_score_and_mode_drops) {
  const temp_dir dir;
  for (const std::string name : {"modernbert", "modernbert-bare", "roberta"}) {
    const loaded m(converted(dir, name, "q8"));
    std::vector<rs_text_info> whole, infos;
    left_of(m.session, texts(), "", &whole);
    for (const char *score : {"mlp", "-mlp", "attention:cos", "block:l1", "norm", "centre", "attn-colsum", "attn-cls", "random",
                              "first", "norm-0.5mlp+attn-colsum"})
      for (const char *mode : {"prune", "restore", "merge", "fold"}) {
        SCOPED_TRACE(name + " " + score + " " + mode);
        const vec states = left_of(m.session, texts(), ("ratios=0.25,0.25 score="s + score + " mode=" + mode).c_str(), &infos);
        for (const float v : states) ASSERT_TRUE(std::isfinite(v));
        for (size_t i = 0; i < texts().size(); i++) {
          EXPECT_EQ(infos[i].tokens, whole[i].tokens);
          if (whole[i].tokens > 8 && mode != "restore"s) {
            EXPECT_LT(infos[i].kept, whole[i].kept);
          }
        }
      }
  }
}

TEST(texts, a_plan_has_less_to_do_for_windows_and_drops) {
  const temp_dir dir;
  const loaded m(converted(dir, "modernbert", "q8"));
  const int32_t lengths[] = {128, 128};
  rs_plan_layer layers[5];
  size_t arena;
  ASSERT_EQ(rs_plan(m.session, lengths, 2, nullptr, layers, &arena), RS_OK) << rs_last_error();
  EXPECT_GT(layers[0].macs, layers[1].macs);  // everywhere, and a window of 8 on either side
  const double pairs = 128.0 * 128, seen = 128 * 17 - 8 * 9;
  EXPECT_DOUBLE_EQ(layers[0].macs - layers[1].macs, 2 * 2 * width * (pairs - seen));
  auto p = sized<rs_encode_params>();
  rs_drop *drop = nullptr;
  ASSERT_EQ(rs_drop_parse("ratios=0.5", &drop), RS_OK);
  p.drop = drop;
  rs_plan_layer fewer[5];
  ASSERT_EQ(rs_plan(m.session, lengths, 2, &p, fewer, &arena), RS_OK) << rs_last_error();
  rs_drop_free(drop);
  EXPECT_EQ(fewer[1].tokens, 128);
  EXPECT_LT(fewer[3].macs, layers[3].macs / 2 + 1);
}

// ------------------------------------------------------------------------------------------------ what is refused

TEST(texts, settings_that_make_no_sense_are_errors_that_name_them) {
  const struct {
    const char *name;
    std::function<void(json &)> spoil;
    const char *error;
  } rows[] = {
      {"modernbert", [](json &c) { c["num_attention_heads"] = 3; }, "3 heads do not divide"},
      {"modernbert", [](json &c) { c["num_attention_heads"] = 32; }, "heads of 1 columns; rs supports an even 32 / 32"},
      {"modernbert", [](json &c) { c["head_dim"] = 8; }, "heads of 8 columns; rs supports an even 32 / 2"},
      {"modernbert", [](json &c) { c["local_attention"] = 1; }, "'local_attention' is 1, expected 2 to"},
      {"modernbert", [](json &c) { c["local_attention"] = -128; }, "'local_attention' is -128"},
      {"modernbert", [](json &c) { c["layer_types"][2] = "linear_attention"; },
       "'layer_types.2' is 'linear_attention'; rs supports"},
      {"modernbert", [](json &c) { c["layer_types"].erase(3); }, "'layer_types.3' is missing"},
      {"modernbert", [](json &c) { c["layer_types"].push_back("full_attention"); }, "'layer_types' is of more than 4 layers"},
      {"modernbert", [](json &c) { c["layer_types"] = nullptr, c["global_attn_every_n_layers"] = 0; },
       "'global_attn_every_n_layers' is 0"},
      {"modernbert", [](json &c) { c["rope_parameters"]["full_attention"]["rope_type"] = "yarn"; },
       "'rope_parameters.full_attention.rope_type' is 'yarn'; rs supports 'default'"},
      {"modernbert", [](json &c) { c["rope_parameters"]["sliding_attention"]["rope_theta"] = 0; },
       "theta of rotary positions in layers of 'sliding_attention' is 0"},
      {"modernbert", [](json &c) { c["rope_parameters"]["full_attention"]["rope_theta"] = -1.5; }, "'full_attention' is -1.5"},
      {"modernbert", [](json &c) { c["rope_parameters"]["full_attention"]["rope_theta"] = 1e-60; }, "'full_attention' is 1e-60"},
      {"modernbert-classifier", [](json &c) { c["global_rope_theta"] = "much"; },
       "'global_rope_theta' is a string, expected a number"},
      {"modernbert-classifier",
       [](json &c) {
         c["rope_scaling"] = {{"rope_type", "linear"}};
       },
       "'rope_scaling.rope_type' is 'linear'"},
      {"modernbert-classifier", [](json &c) { c["classifier_pooling"] = "max"; }, "'classifier_pooling' is 'max'; rs supports"},
      {"modernbert-classifier", [](json &c) { c["classifier_activation"] = "mish"; }, "'mish' is not supported"},
      {"modernbert-classifier", [](json &c) { c["id2label"].erase("2"); }, "id2label has 2 labels, 'classifier.weight' has 3 rows"},
      {"modernbert-classifier", [](json &c) { c["architectures"] = {"ModernBertForQuestionAnswering"}; },
       "'classifier.weight' has 3 rows, of answers 2"},
      {"modernbert", [](json &c) { c["architectures"] = {"ModernBertForMultipleChoice"}; },
       "architecture 'ModernBertForMultipleChoice' is not supported"},
      {"modernbert", [](json &c) { c["hidden_activation"] = "mish"; }, "'mish' is not supported"},
      {"modernbert", [](json &c) { c["num_hidden_layers"] = 5, c["layer_types"].push_back("full_attention"); },
       "tensor 'model.layers.4.attn_norm.weight' is missing"},
      {"modernbert", [](json &c) { c["num_hidden_layers"] = 3, c["layer_types"].erase(3); }, "is not known to this architecture"},
      {"modernbert", [](json &c) { c["intermediate_size"] = 47; }, "shape [96,32], expected [94,32]"},
      {"distilbert", [](json &c) { c["n_heads"] = 3; }, "3 heads do not divide dim 32"},
      {"distilbert", [](json &c) { c.erase("hidden_dim"); }, "'hidden_dim' is missing"},
      {"distilbert", [](json &c) { c["n_layers"] = 3; },
       "tensor 'distilbert.transformer.layer.2.attention.q_lin.weight' is missing"},
      {"distilbert", [](json &c) { c["activation"] = "mish"; }, "'mish' is not supported"},
      {"distilbert-classifier", [](json &c) { c["architectures"] = {"DistilBertForMultipleChoice"}; },
       "architecture 'DistilBertForMultipleChoice' is not supported"},
      {"distilbert-tokens", [](json &c) { c["architectures"] = {"DistilBertForSequenceClassification"}; },
       "tensor 'pre_classifier.weight' is missing"},
      {"roberta", [](json &c) { c["pad_token_id"] = INT64_MAX; }, "'pad_token_id' is 9223372036854775807"},
      {"roberta", [](json &c) { c["max_position_embeddings"] = 8; }, "is 8, of which the first 8 are of no token"},
      {"roberta", [](json &c) { c["position_embedding_type"] = "relative_key"; }, "'position_embedding_type' is 'relative_key'"},
      {"roberta", [](json &c) { c["model_type"] = "xlm-roberta"; }, "model_type 'xlm-roberta'"},
  };
  const temp_dir dir;
  for (const auto &row : rows) {
    std::filesystem::remove_all(dir / "model");
    std::filesystem::copy(folder_of(row.name), dir / "model");
    json config = json::parse(read_file(dir / "model/config.json"));
    row.spoil(config);
    write_file(dir / "model/config.json", config.dump());
    const run_result r = rs({"convert", dir / "model", "-o", dir / "x.rsw", "--type", "f32"});
    EXPECT_EQ(r.code, 1) << r;
    EXPECT_NE(r.err.find(row.error), std::string::npos) << r << "\nexpected: " << row.error;
  }
}

// A file that was spoilt is refused when it is loaded, not when it runs.
TEST(texts, files_that_make_no_sense_are_refused) {
  const temp_dir dir;
  const std::string path = converted(dir, "modernbert", "f32");
  rs_model *model = nullptr;
  ASSERT_EQ(rs_model_load(path.c_str(), nullptr, &model), RS_OK) << rs_last_error();
  const int64_t few[] = {0, 8, 8}, negative[] = {0, 8, -1, 0}, far[] = {0, 8, INT64_MAX, 0};
  const struct {
    std::function<rs_status(rs_writer *)> set;
    const char *error;
  } rows[] = {
      {[&](rs_writer *w) { return rs_writer_set_i64s(w, "modernbert.windows", few, 3); }, "is not a list of 4 integers"},
      {[&](rs_writer *w) { return rs_writer_set_i64s(w, "modernbert.windows", negative, 4); }, "'modernbert.windows' has -1"},
      {[&](rs_writer *w) { return rs_writer_set_i64s(w, "modernbert.windows", far, 4); }, "has 9223372036854775807"},
      {[](rs_writer *w) { return rs_writer_set_str(w, "modernbert.windows", "8"); }, "is not a list of 4 integers"},
      {[](rs_writer *w) { return rs_writer_set_bool(w, "modernbert.causal", true); }, "windows see both sides"},
      {[](rs_writer *w) { return rs_writer_set_i64(w, "modernbert.num_heads", 32); },
       "rotary positions turn an even number of columns"},
      {[](rs_writer *w) { return rs_writer_set_i64(w, "modernbert.num_heads", 4); }, "'rope.frequencies': shape [8], expected [4]"},
      {[](rs_writer *w) { return rs_writer_set_i64(w, "modernbert.vocab_size", 5); }, "'token.weight': shape"},
  };
  for (const auto &row : rows) {
    rs_writer *w = nullptr;
    ASSERT_EQ(rs_writer_open((dir / "spoilt.rsw").c_str(), &w), RS_OK) << rs_last_error();
    EXPECT_EQ(row.set(w), RS_OK) << rs_last_error();
    EXPECT_EQ(rs_writer_copy(w, model), RS_OK) << rs_last_error();
    EXPECT_EQ(rs_writer_finish(w), RS_OK) << rs_last_error();
    rs_writer_free(w);
    rs_model *spoilt = nullptr;
    EXPECT_NE(rs_model_load((dir / "spoilt.rsw").c_str(), nullptr, &spoilt), RS_OK) << row.error;
    EXPECT_NE(std::string(rs_last_error()).find(row.error), std::string::npos) << rs_last_error() << "\nexpected: " << row.error;
    rs_model_free(spoilt);
  }
  rs_model_free(model);
}

// ------------------------------------------------------------------------------------------------ the program

TEST(texts, the_program_takes_them) {
  const temp_dir dir;
  const std::string path = dir / "m.rsw";
  ASSERT_EQ(rs({"convert", folder_of("modernbert"), "-o", path, "--type", "q8"}).code, 0);  // with calibration
  const run_result good = rs({"verify", path});
  EXPECT_EQ(good.code, 0) << good;
  const json info = json::parse(rs({"info", path, "--json"}).out);
  EXPECT_EQ(info.dump().find("\"modernbert\"") != std::string::npos, true) << info.dump();
  const run_result embedded = rs({"embed", "-m", path, "--drop", "0.5", "--pooling", "mean", "The quick brown fox jumps."});
  EXPECT_EQ(embedded.code, 0) << embedded;
  EXPECT_EQ(jsonl(embedded.out)[0]["embedding"].size(), width);
  const run_result profile = rs({"bench", "-m", path, "--shapes", "2x100", "--seconds", "0.1", "--ops", "--json"});
  EXPECT_EQ(profile.code, 0) << profile;
  EXPECT_NE(profile.out.find("\"rope\""), std::string::npos) << profile;
}
