// Heads: logits of texts, pairs and tokens against a plain f64 BERT, answers against a search through all spans, what a file and a
// config.json say of a head, and the real classifier against the reference implementation.
#include "bert_f64.h"
#include "encoding.h"
#include "tiny_bert.h"
#include "tiny_vit.h"

#include <nlohmann/json.hpp>

#include <functional>
#include <memory>
#include <set>
#include <tuple>

namespace {

using json = nlohmann::json;
using strings = std::vector<std::string>;
using floats = std::vector<float>;

rs_text view(const std::string &text) { return {text.data(), text.size()}; }

const strings labels_of_three = {"no", "maybe", "yes"};

strings labels_for(rs_head head) { return head == RS_HEAD_SPANS ? strings{"start", "end"} : labels_of_three; }

struct encoded {
  std::vector<int32_t> ids, types;
  std::vector<rs_span> spans;
};

encoded tokenize(const rs_model *m, const std::string &text, const std::string *pair) {
  encoded e;
  e.ids.resize(1000), e.types.resize(1000), e.spans.resize(1000);
  size_t n = 0;
  const rs_text a = view(text), b = pair ? view(*pair) : rs_text{};
  EXPECT_EQ(rs_tokenize(m, &a, pair ? &b : nullptr, e.ids.data(), e.types.data(), e.spans.data(), 1000, &n), RS_OK)
      << rs_last_error();
  e.ids.resize(n), e.types.resize(n), e.spans.resize(n);
  return e;
}

std::vector<double> dense(const tiny_bert &m, const std::string &name, const std::vector<double> &x) {
  const floats &weight = m.weights.at(name + ".weight"), &bias = m.weights.at(name + ".bias");
  std::vector<double> y(bias.begin(), bias.end());
  for (size_t i = 0; i < y.size(); i++)
    for (size_t j = 0; j < x.size(); j++) y[i] += double(weight[i * x.size() + j]) * x[j];
  return y;
}

// Logits of the head as transformers defines it.
std::vector<double> head_f64(tiny_bert &m, rs_head head, const std::vector<int32_t> &ids, const std::vector<int32_t> &types) {
  const matrix64 states = bert_f64(m, ids, types);
  if (head == RS_HEAD_SEQUENCE) {
    std::vector<double> pooled = dense(m, "bert.pooler.dense", states[0]);
    for (double &x : pooled) x = std::tanh(x);
    return dense(m, "classifier", pooled);
  }
  std::vector<double> all;
  for (const auto &state : states)
    for (double x : dense(m, head == RS_HEAD_SPANS ? "qa_outputs" : "classifier", state)) all.push_back(x);
  return all;
}

struct classified {
  rs_status status;
  floats logits;
  std::vector<rs_text_info> infos;
};

classified classify(const loaded &m, const strings &texts, const strings *pairs = nullptr,
                    const rs_encode_params *params = nullptr) {
  classified c;
  auto info = sized<rs_model_info>();
  EXPECT_EQ(rs_model_get_info(m.model, &info), RS_OK);
  const std::vector<rs_text> a = views_of(texts), b = pairs ? views_of(*pairs) : std::vector<rs_text>();
  c.infos.resize(texts.size());
  c.logits.resize(texts.size() * static_cast<size_t>(info.labels) *
                  (info.head == RS_HEAD_SEQUENCE ? 1 : static_cast<size_t>(info.max_tokens)));
  c.status = rs_classify(m.session, a.data(), pairs ? b.data() : nullptr, a.size(), params, c.logits.data(), c.logits.size(),
                         c.infos.data());
  size_t rows = texts.size();
  if (info.head != RS_HEAD_SEQUENCE) {
    rows = 0;
    for (const rs_text_info &i : c.infos) rows += static_cast<size_t>(i.tokens);
  }
  if (c.status == RS_OK) c.logits.resize(rows * static_cast<size_t>(info.labels));
  return c;
}

const strings some_texts = {"the cat sat on the mat", "", "hello world .", "a dog , a cat , unknownword", "cats sitting"};
const strings some_pairs = {"the dog", "world", "", "hello cat the dog sat on a mat .", "a"};

constexpr rs_head all_heads[] = {RS_HEAD_SEQUENCE, RS_HEAD_TOKENS, RS_HEAD_SPANS};

TEST(heads, logits_match_bert_as_it_is_written_down) {
  temp_dir dir;
  for (rs_head head : all_heads) {
    tiny_bert tiny(21);
    tiny.add_head(head, labels_for(head));
    for (const auto &[type, tolerance] : std::vector<std::pair<const char *, double>>{{"f32", 2e-5}, {"f16", 5e-3}, {"q8", 0.15}}) {
      SCOPED_TRACE(std::string(rs_head_name(head)) + " " + type);
      ASSERT_EQ(tiny.convert(dir / "m.rsw", type), RS_OK) << rs_last_error();
      const loaded m(dir / "m.rsw");
      ASSERT_NE(m.session, nullptr);
      auto info = sized<rs_model_info>();
      ASSERT_EQ(rs_model_get_info(m.model, &info), RS_OK);
      EXPECT_EQ(info.head, head);
      EXPECT_EQ(info.labels, static_cast<int32_t>(labels_for(head).size()));
      for (int32_t i = 0; i < info.labels; i++) EXPECT_EQ(rs_model_label(m.model, i), labels_for(head)[static_cast<size_t>(i)]);
      EXPECT_EQ(rs_model_label(m.model, info.labels), nullptr);
      EXPECT_EQ(rs_model_label(m.model, -1), nullptr);
      for (bool with_pairs : {false, true}) {
        const classified got = classify(m, some_texts, with_pairs ? &some_pairs : nullptr);
        ASSERT_EQ(got.status, RS_OK) << rs_last_error();
        size_t at = 0;
        for (size_t i = 0; i < some_texts.size(); i++) {
          const encoded e = tokenize(m.model, some_texts[i], with_pairs ? &some_pairs[i] : nullptr);
          EXPECT_EQ(got.infos[i].tokens, static_cast<int32_t>(e.ids.size()));
          EXPECT_FALSE(got.infos[i].truncated);
          for (double x : head_f64(tiny, head, e.ids, e.types)) {
            ASSERT_LT(at, got.logits.size());
            EXPECT_TRUE(std::fabs(got.logits[at] - x) <= tolerance) << "text " << i << ": " << got.logits[at] << " " << x;
            at++;
          }
        }
        EXPECT_EQ(at, got.logits.size());
      }
    }
  }
}

TEST(heads, batch_equals_single_on_every_type_and_isa) {
  temp_dir dir;
  strings texts, pairs;
  for (int i = 0; i < 30; i++) {
    texts.push_back(some_texts[static_cast<size_t>(i) % 5] + (i % 3 ? " the cat" : ""));
    pairs.push_back(some_pairs[static_cast<size_t>(i) % 4]);
  }
  for (rs_head head : all_heads)
    for (const char *type : {"f32", "q8", "q4"}) {
      tiny_bert tiny(22);
      tiny.add_head(head, labels_for(head));
      ASSERT_EQ(tiny.convert(dir / "m.rsw", type), RS_OK) << rs_last_error();
      for (size_t isa = 0; rs_isa_available(isa); isa++) {
        SCOPED_TRACE(std::string(rs_head_name(head)) + " " + type + " " + rs_isa_available(isa));
        setenv("RS_ISA", rs_isa_available(isa), 1);
        const loaded one(dir / "m.rsw", 1), three(dir / "m.rsw", 3, 40);
        unsetenv("RS_ISA");
        for (const strings *p : {static_cast<const strings *>(nullptr), static_cast<const strings *>(&pairs)}) {
          floats singles;
          for (size_t i = 0; i < texts.size(); i++) {
            const strings pair = {pairs[i]};
            const floats single = classify(one, {texts[i]}, p ? &pair : nullptr).logits;
            singles.insert(singles.end(), single.begin(), single.end());
          }
          EXPECT_EQ(classify(one, texts, p).logits, singles);
          EXPECT_EQ(classify(three, texts, p).logits, singles);
        }
      }
    }
}

TEST(heads, vectors_and_logits_take_turns) {
  temp_dir dir;
  tiny_bert tiny(23);
  tiny.add_head(RS_HEAD_SEQUENCE, labels_of_three);
  ASSERT_EQ(tiny.convert(dir / "m.rsw", "f32"), RS_OK) << rs_last_error();
  const loaded a(dir / "m.rsw"), b(dir / "m.rsw");
  const rs_text text = view(some_texts[0]);
  floats first(32), second(32);
  ASSERT_EQ(rs_encode(a.session, &text, 1, nullptr, first.data(), 32, nullptr), RS_OK) << rs_last_error();
  const floats logits = classify(a, {some_texts[0]}).logits;
  ASSERT_EQ(rs_encode(a.session, &text, 1, nullptr, second.data(), 32, nullptr), RS_OK);
  EXPECT_EQ(first, second);
  EXPECT_EQ(logits, classify(b, {some_texts[0]}).logits);
}

TEST(heads, dropping_keeps_a_row_for_every_token) {
  temp_dir dir;
  strings texts;
  for (int i = 0; i < 12; i++)
    texts.push_back(some_texts[static_cast<size_t>(i) % 5] + " the cat sat on a mat" + (i % 2 ? " ." : ""));
  for (rs_head head : all_heads) {
    tiny_bert tiny(33);
    tiny.add_head(head, labels_for(head));
    ASSERT_EQ(tiny.convert(dir / "m.rsw", "q8"), RS_OK) << rs_last_error();
    const loaded one(dir / "m.rsw", 1), three(dir / "m.rsw", 3, 40);
    const floats without = classify(one, texts).logits;
    for (rs_drop_mode mode : {RS_DROP_PRUNE, RS_DROP_RESTORE, RS_DROP_MERGE, RS_DROP_FOLD}) {
      SCOPED_TRACE(std::string(rs_head_name(head)) + " " + std::to_string(mode));
      double ratios[] = {0.4};
      auto drop = sized<rs_drop>();
      drop.ratios = ratios, drop.n_ratios = 1;
      drop.mode = mode;
      auto params = sized<rs_encode_params>();
      params.drop = &drop;
      const classified all = classify(three, texts, nullptr, &params);
      ASSERT_EQ(all.status, RS_OK) << rs_last_error();
      EXPECT_EQ(all.logits.size(), without.size());  // of a head of tokens: as many rows
      EXPECT_NE(all.logits, without);
      floats singles;
      for (const std::string &text : texts) {
        const floats single = classify(one, {text}, nullptr, &params).logits;
        singles.insert(singles.end(), single.begin(), single.end());
      }
      EXPECT_EQ(all.logits, singles);
      ratios[0] = 0;
      EXPECT_EQ(classify(three, texts, nullptr, &params).logits, without);
    }
  }
}

// What the tokenizers library makes of two lengths.
TEST(heads, pairs_are_cut_the_longer_first) {
  struct lengths {
    size_t text, pair, room, kept_text, kept_pair;
  };
  for (const lengths &l : {lengths{4, 4, 8, 4, 4},
                           {10, 3, 8, 5, 3},
                           {3, 10, 8, 3, 5},
                           {10, 10, 5, 2, 3},
                           {10, 9, 5, 3, 2},
                           {9, 10, 5, 2, 3},
                           {0, 9, 4, 0, 4},
                           {9, 0, 4, 4, 0},
                           {5, 9, 9, 4, 5},
                           {7, 7, 0, 0, 0}}) {
    size_t text = l.text, pair = l.pair;
    rs_cut_pair(&text, &pair, l.room);
    EXPECT_EQ(text, l.kept_text) << l.text << " " << l.pair << " " << l.room;
    EXPECT_EQ(pair, l.kept_pair) << l.text << " " << l.pair << " " << l.room;
  }
  temp_dir dir;
  tiny_bert tiny(24);
  tiny.add_head(RS_HEAD_SEQUENCE, labels_of_three);
  ASSERT_EQ(tiny.convert(dir / "m.rsw", "f32"), RS_OK) << rs_last_error();
  const loaded m(dir / "m.rsw");
  const auto words = [](const char *word, int n) {
    std::string text;
    for (int i = 0; i < n; i++) text += std::string(word) + " ";
    return text;
  };
  auto params = sized<rs_encode_params>();
  params.max_tokens = 20;  // 17 beside the special tokens
  const auto logits = [&](const std::string &text, const std::string &pair, rs_text_info *info = nullptr) {
    const strings pairs = {pair};
    const classified c = classify(m, {text}, &pairs, &params);
    EXPECT_EQ(c.status, RS_OK) << rs_last_error();
    if (info) *info = c.infos[0];
    return c.logits;
  };
  rs_text_info info;
  EXPECT_EQ(logits(words("cat", 30), words("dog", 5), &info), logits(words("cat", 12), words("dog", 5)));
  EXPECT_EQ(info.total, 38);
  EXPECT_EQ(info.tokens, 20);
  EXPECT_TRUE(info.truncated);
  EXPECT_EQ(logits(words("cat", 5), words("dog", 30)), logits(words("cat", 5), words("dog", 12)));
  EXPECT_EQ(logits(words("cat", 30), words("dog", 30)), logits(words("cat", 8), words("dog", 9)));
  params.long_text = RS_LONG_ERROR;
  const strings pairs = {words("dog", 5)};
  EXPECT_EQ(classify(m, {words("cat", 30)}, &pairs, &params).status, RS_ERR_LIMIT);
  EXPECT_STREQ(rs_last_error(), "the pair has 38 tokens, the limit is 20");
  EXPECT_EQ(rs_encode_failed(m.session), 0u);
}

TEST(heads, windows_of_a_long_text_are_averaged) {
  temp_dir dir;
  tiny_bert tiny(25);
  tiny.add_head(RS_HEAD_SEQUENCE, labels_of_three);
  ASSERT_EQ(tiny.convert(dir / "m.rsw", "f32"), RS_OK) << rs_last_error();
  const loaded m(dir / "m.rsw");
  std::string text;
  for (int i = 0; i < 30; i++) text += "cat sat ";  // 60 tokens
  auto params = sized<rs_encode_params>();
  params.long_text = RS_LONG_CHUNK;
  params.chunk_overlap = 8;  // windows of 38 tokens: [0,38) [30,60)
  const classified whole = classify(m, {text}, nullptr, &params);
  ASSERT_EQ(whole.status, RS_OK) << rs_last_error();
  EXPECT_EQ(whole.infos[0].chunks, 2);
  const floats a = classify(m, {text.substr(0, 38 * 4)}).logits, b = classify(m, {text.substr(30 * 4)}).logits;
  for (size_t i = 0; i < 3; i++) EXPECT_TRUE(std::fabs(whole.logits[i] - (40.0 * a[i] + 32.0 * b[i]) / 72) < 1e-5);
  const strings pairs = {"a"};
  EXPECT_EQ(classify(m, {text}, &pairs, &params).status, RS_ERR_ARGUMENT);
  EXPECT_STREQ(rs_last_error(), "windows of pairs can't be joined");
}

TEST(heads, what_cannot_be_done_is_an_error) {
  temp_dir dir;
  tiny_bert bare(26);
  ASSERT_EQ(bare.convert(dir / "bare.rsw", "f32"), RS_OK) << rs_last_error();
  {
    const loaded m(dir / "bare.rsw");
    float out[8];
    const rs_text text = view(some_texts[0]);
    EXPECT_EQ(rs_classify(m.session, &text, nullptr, 1, nullptr, out, 8, nullptr), RS_ERR_ARGUMENT);
    EXPECT_NE(std::string(rs_last_error()).find("the model has no head"), std::string::npos) << rs_last_error();
  }
  tiny_bert tiny(26);
  tiny.add_head(RS_HEAD_TOKENS, labels_of_three);
  ASSERT_EQ(tiny.convert(dir / "m.rsw", "f32"), RS_OK) << rs_last_error();
  const loaded m(dir / "m.rsw");
  const std::string good = "hello", bad = "\xff";
  const rs_text texts[] = {view(good), view(bad), view(good)}, fine[] = {view(good), view(good), view(good)};
  float out[64];
  EXPECT_EQ(rs_classify(m.session, texts, nullptr, 3, nullptr, out, 64, nullptr), RS_ERR_TEXT);
  EXPECT_EQ(rs_encode_failed(m.session), 1u);
  EXPECT_EQ(rs_classify(m.session, fine, texts, 3, nullptr, out, 64, nullptr), RS_ERR_TEXT);
  EXPECT_EQ(rs_encode_failed(m.session), 1u);
  EXPECT_EQ(std::string(rs_last_error()).compare(0, 10, "the pair: "), 0) << rs_last_error();
  EXPECT_EQ(rs_classify(m.session, fine, nullptr, 3, nullptr, out, 26, nullptr), RS_ERR_LIMIT);  // 3 texts, 3 tokens, 3 labels
  EXPECT_EQ(rs_classify(m.session, fine, nullptr, 3, nullptr, out, 27, nullptr), RS_OK) << rs_last_error();
  EXPECT_EQ(rs_classify(m.session, nullptr, nullptr, 0, nullptr, nullptr, 0, nullptr), RS_OK);
  auto params = sized<rs_encode_params>();
  params.long_text = RS_LONG_CHUNK;
  EXPECT_EQ(rs_classify(m.session, fine, nullptr, 1, &params, out, 64, nullptr), RS_ERR_ARGUMENT);
  EXPECT_STREQ(rs_last_error(), "windows of a head of tokens can't be joined");
  params = sized<rs_encode_params>();
  params.layer_plus_one = 1;
  EXPECT_EQ(rs_classify(m.session, fine, nullptr, 1, &params, out, 64, nullptr), RS_ERR_ARGUMENT);
  params = sized<rs_encode_params>();
  params.max_tokens = 3;
  EXPECT_EQ(rs_classify(m.session, fine, fine, 1, &params, out, 64, nullptr), RS_ERR_ARGUMENT);
  rs_answer answer;
  size_t n;
  EXPECT_EQ(rs_answer_question(m.session, &fine[0], &fine[1], nullptr, &answer, 1, &n), RS_ERR_ARGUMENT);
  EXPECT_NE(std::string(rs_last_error()).find("answers need a head of spans, the model's is of tokens"), std::string::npos)
      << rs_last_error();
}

// ---- config.json

TEST(heads, config_says_how_logits_become_scores) {
  temp_dir dir;
  using settings = std::vector<std::pair<std::string, std::string>>;
  const auto activation = [&](const strings &labels, const settings &extra) -> std::string {
    tiny_bert tiny(27);
    tiny.add_head(RS_HEAD_SEQUENCE, labels);
    tiny.extra_strings.insert(tiny.extra_strings.end(), extra.begin(), extra.end());
    if (tiny.convert(dir / "m.rsw", "q8") != RS_OK) return rs_last_error();
    const loaded m(dir / "m.rsw");
    auto info = sized<rs_model_info>();
    EXPECT_EQ(rs_model_get_info(m.model, &info), RS_OK);
    return rs_head_activation_name(info.head_activation);
  };
  EXPECT_EQ(activation(labels_of_three, {}), "softmax");
  EXPECT_EQ(activation({"score"}, {}), "sigmoid");
  EXPECT_EQ(activation(labels_of_three, {{"problem_type", "multi_label_classification"}}), "sigmoid");
  EXPECT_EQ(activation(labels_of_three, {{"problem_type", "single_label_classification"}}), "softmax");
  EXPECT_EQ(activation({"score"}, {{"problem_type", "regression"}}), "none");
  EXPECT_EQ(activation({"score"}, {{"sentence_transformers.activation_fn", "torch.nn.modules.linear.Identity"}}), "none");
  EXPECT_EQ(activation({"score"}, {{"sbert_ce_default_activation_function", "torch.nn.modules.activation.Sigmoid"}}), "sigmoid");
  EXPECT_EQ(activation({"score"}, {{"sentence_transformers.activation_fn", "torch.nn.Mish"}}),
            "config.json: 'sentence_transformers.activation_fn' is 'torch.nn.Mish'; rs supports Identity, Sigmoid and Softmax");
  EXPECT_EQ(activation({"score"}, {{"problem_type", "guessing"}}), "config.json: 'problem_type' is 'guessing', which is not known");
}

// As the image classification pipeline of transformers 5 does it.
TEST(heads, logits_of_images_become_scores_likewise) {
  temp_dir dir;
  const auto activation = [&](const strings &labels, const char *problem) -> std::string {
    tiny_vit tiny(3);
    tiny.labels = labels;
    tiny.problem_type = problem;
    if (tiny.convert(dir / "m.rsw", "q8") != RS_OK) return rs_last_error();
    const loaded m(dir / "m.rsw");
    auto info = sized<rs_model_info>();
    EXPECT_EQ(rs_model_get_info(m.model, &info), RS_OK);
    return rs_head_activation_name(info.head_activation);
  };
  EXPECT_EQ(activation(labels_of_three, ""), "softmax");
  EXPECT_EQ(activation(labels_of_three, "multi_label_classification"), "sigmoid");
  EXPECT_EQ(activation({"score"}, ""), "sigmoid");
  EXPECT_EQ(activation({"score"}, "regression"), "none");
}

TEST(heads, config_and_tensors_must_agree) {
  temp_dir dir;
  const auto error_of = [&](rs_head head, const std::function<void(tiny_bert &)> &change) -> std::string {
    tiny_bert tiny(28);
    tiny.add_head(head, labels_for(head));
    change(tiny);
    const rs_status status = tiny.convert(dir / "m.rsw", "q8");
    EXPECT_EQ(file_exists(dir / "m.rsw"), status == RS_OK);
    std::string error = status == RS_OK ? "" : rs_last_error();
    std::filesystem::remove(dir / "m.rsw");
    return error;
  };
  EXPECT_EQ(error_of(RS_HEAD_SEQUENCE, [](tiny_bert &) {}), "");
  EXPECT_EQ(error_of(RS_HEAD_SEQUENCE, [](tiny_bert &m) { m.extra_strings.emplace_back("id2label.3", "more"); }),
            "config.json: id2label has 4 labels, 'classifier.weight' has 3 rows");
  EXPECT_EQ(error_of(RS_HEAD_SEQUENCE, [](tiny_bert &m) { m.weights.erase("bert.pooler.dense.weight"); }),
            "tensor 'bert.pooler.dense.weight' is missing");
  EXPECT_EQ(error_of(RS_HEAD_TOKENS, [](tiny_bert &m) { m.weights.erase("classifier.bias"); }),
            "tensor 'classifier.bias' is missing");
  EXPECT_EQ(error_of(RS_HEAD_SPANS,
                     [](tiny_bert &m) {
                       m.shapes["qa_outputs.weight"] = {4, 16};
                     }),
            "'qa_outputs.weight': shape [4,16], expected [2,32]");
  EXPECT_EQ(error_of(RS_HEAD_SPANS,
                     [](tiny_bert &m) {
                       m.weights["classifier.weight"] = floats(32), m.shapes["classifier.weight"] = {1, 32};
                     }),
            "both 'qa_outputs.weight' and 'classifier.weight' are there; rs takes one head");
  EXPECT_EQ(error_of(RS_HEAD_TOKENS, [](tiny_bert &m) { m.weights["classifier.weight"][5] = INFINITY; }),
            "'classifier.weight': element 5 is NaN or infinite");
  // Without id2label, labels are called as transformers calls them.
  tiny_bert tiny(28);
  tiny.add_head(RS_HEAD_TOKENS, labels_of_three);
  tiny.extra_strings.resize(1);
  ASSERT_EQ(tiny.convert(dir / "m.rsw", "q8"), RS_OK) << rs_last_error();
  const loaded m(dir / "m.rsw");
  EXPECT_STREQ(rs_model_label(m.model, 2), "LABEL_2");
}

// ---- weight files

// A copy of a file with other metadata; nullptr: without that key.
void copy_with(const std::string &from, const std::string &to, const std::map<std::string, const char *> &strs,
               const strings &labels = {}) {
  rs_model *m = nullptr;
  ASSERT_EQ(rs_model_load(from.c_str(), nullptr, &m), RS_OK) << rs_last_error();
  rs_writer *w = nullptr;
  ASSERT_EQ(rs_writer_open(to.c_str(), &w), RS_OK);
  const auto texts_of = [](const rs_meta &meta) {
    std::vector<rs_text> texts(meta.count);
    for (size_t i = 0; i < meta.count; i++) texts[i].data = rs_meta_string(&meta, i, &texts[i].length);
    return texts;
  };
  for (size_t i = 0; i < rs_model_meta_count(m); i++) {
    rs_meta meta;
    ASSERT_EQ(rs_model_meta_at(m, i, &meta), RS_OK);
    const auto changed = strs.find(meta.key);
    if (changed != strs.end()) {
      if (changed->second) {
        ASSERT_EQ(rs_writer_set_str(w, meta.key, changed->second), RS_OK);
      }
      continue;
    }
    const bool relabel = !labels.empty() && std::string(meta.key) == "head.labels";
    const std::vector<rs_text> texts = relabel                     ? views_of(labels)
                                       : meta.kind == RS_META_STRS ? texts_of(meta)
                                                                   : std::vector<rs_text>();
    const rs_status status = meta.kind == RS_META_BOOL   ? rs_writer_set_bool(w, meta.key, meta.boolean)
                             : meta.kind == RS_META_I64  ? rs_writer_set_i64(w, meta.key, meta.i64)
                             : meta.kind == RS_META_F64  ? rs_writer_set_f64(w, meta.key, meta.f64)
                             : meta.kind == RS_META_STR  ? rs_writer_set_str(w, meta.key, meta.str)
                             : meta.kind == RS_META_I64S ? rs_writer_set_i64s(w, meta.key, meta.i64s, meta.count)
                             : meta.kind == RS_META_F32S ? rs_writer_set_f32s(w, meta.key, meta.f32s, meta.count)
                                                         : rs_writer_set_strs(w, meta.key, texts.data(), texts.size());
    ASSERT_EQ(status, RS_OK) << meta.key;
  }
  for (size_t i = 0; i < rs_model_tensor_count(m); i++) {
    rs_tensor_info t;
    ASSERT_EQ(rs_model_tensor_at(m, i, &t), RS_OK);
    ASSERT_EQ(rs_writer_add(w, t.name, t.type, t.layout, t.rank, t.shape, t.data, t.bytes), RS_OK);
  }
  ASSERT_EQ(rs_writer_finish(w), RS_OK) << rs_last_error();
  rs_writer_free(w);
  rs_model_free(m);
}

TEST(heads, early_files_say_only_labels) {
  temp_dir dir;
  for (rs_head head : {RS_HEAD_SEQUENCE, RS_HEAD_TOKENS}) {
    tiny_bert tiny(29);
    tiny.add_head(head, labels_of_three);
    ASSERT_EQ(tiny.convert(dir / "m.rsw", "f32"), RS_OK) << rs_last_error();
    copy_with(dir / "m.rsw", dir / "early.rsw", {{"head.type", nullptr}, {"head.activation", nullptr}});
    const loaded now(dir / "m.rsw"), early(dir / "early.rsw");
    auto info = sized<rs_model_info>();
    ASSERT_EQ(rs_model_get_info(early.model, &info), RS_OK);
    EXPECT_EQ(info.head, head);
    EXPECT_EQ(info.head_activation, RS_HEAD_SOFTMAX);
    EXPECT_EQ(classify(early, some_texts).logits, classify(now, some_texts).logits);
  }
}

TEST(heads, files_that_lie_are_refused) {
  temp_dir dir;
  tiny_bert tiny(30);
  tiny.add_head(RS_HEAD_TOKENS, labels_of_three);
  ASSERT_EQ(tiny.convert(dir / "m.rsw", "f32"), RS_OK) << rs_last_error();
  const auto error_of = [&](const std::map<std::string, const char *> &strs, const strings &labels = {}) -> std::string {
    copy_with(dir / "m.rsw", dir / "bad.rsw", strs, labels);
    rs_model *m = nullptr;
    const rs_status status = rs_model_load((dir / "bad.rsw").c_str(), nullptr, &m);
    rs_model_free(m);
    return status == RS_OK ? "" : rs_last_error();
  };
  const auto contains = [](const std::string &text, const char *part) { EXPECT_NE(text.find(part), std::string::npos) << text; };
  EXPECT_EQ(error_of({}), "");
  contains(error_of({{"head.type", "oracle"}}), "head.type is 'oracle'");
  contains(error_of({{"head.type", "none"}}), "head.type is 'none'");
  contains(error_of({{"head.activation", "relu"}}), "head.activation is 'relu'");
  contains(error_of({{"head.activation", nullptr}}), "head.activation");
  contains(error_of({{"head.type", "spans"}}), "3 head.labels for the beginning and the end of a span");
  contains(error_of({{"head.type", "sequence"}}), "there is no tensor 'pooler.");  // which a head of tokens has not
  contains(error_of({}, {"one", "two"}), "'classifier.bias': shape [3], expected [2]");
}

// ---- answers

struct plain_answer {
  double logit, score;
  size_t begin, end;
};

// By a look at every span of every window, in f64.
std::vector<plain_answer> answers_f64(tiny_bert &tiny, const rs_model *m, const std::string &question, const std::string &context,
                                      const rs_answer_params &p, double *no_logit, double *no_score) {
  const encoded q = tokenize(m, question, nullptr), c = tokenize(m, context, nullptr);
  const size_t nq = q.ids.size() - 2, n = c.ids.size() - 2, room = static_cast<size_t>(p.max_tokens) - nq - 3;
  const size_t overlap = p.overlap > 0 ? static_cast<size_t>(p.overlap) : p.overlap < 0 ? 0 : std::min<size_t>(128, room / 2);
  const auto longest = static_cast<size_t>(p.max_answer_tokens ? p.max_answer_tokens : 30);
  std::vector<plain_answer> all;
  *no_logit = *no_score = INFINITY;
  for (size_t begin = 0;; begin += room - overlap) {
    const size_t end = std::min(n, begin + room);
    std::vector<int32_t> ids(q.ids), types(q.ids.size(), 0);
    for (size_t i = begin; i < end; i++) ids.push_back(c.ids[i + 1]);
    ids.push_back(3);
    types.resize(ids.size(), 1);
    const std::vector<double> logits = head_f64(tiny, RS_HEAD_SPANS, ids, types);
    const size_t first = nq + 2;
    double sums[2] = {};
    for (size_t k = 0; k < 2; k++) {
      sums[k] = std::exp(logits[k]);
      for (size_t i = first; i + 1 < ids.size(); i++) sums[k] += std::exp(logits[2 * i + k]);
    }
    *no_logit = std::min(*no_logit, logits[0] + logits[1]);
    *no_score = std::min(*no_score, std::exp(logits[0] + logits[1]) / sums[0] / sums[1]);
    for (size_t i = begin; i < end; i++)
      for (size_t j = i; j < end && j - i < longest; j++) {
        const double logit = logits[2 * (first + i - begin)] + logits[2 * (first + j - begin) + 1];
        size_t a = i, b = j;
        const auto continues = [&](size_t at) { return std::string(rs_token(m, c.ids[at + 1])).compare(0, 2, "##") == 0; };
        if (p.whole_words != RS_OFF) {
          while (a > 0 && continues(a)) a--;
          while (b + 1 < n && continues(b + 1)) b++;
        }
        all.push_back({logit, std::exp(logit) / sums[0] / sums[1], c.spans[a + 1].begin, c.spans[b + 1].end});
      }
    if (end == n) break;
  }
  std::sort(all.begin(), all.end(), [](const plain_answer &a, const plain_answer &b) { return a.logit > b.logit; });
  std::vector<plain_answer> distinct;
  for (const plain_answer &a : all)
    if (std::none_of(distinct.begin(), distinct.end(), [&](const plain_answer &d) { return d.begin == a.begin && d.end == a.end; }))
      distinct.push_back(a);
  return distinct;
}

class answers : public testing::Test {
 protected:
  temp_dir dir;
  tiny_bert tiny{31};
  std::unique_ptr<loaded> m;
  rs_answer_params params = sized<rs_answer_params>();

  void SetUp() override {
    for (const char *word : {"cafe", "漢", "字", "😀", "sit", "##e"}) tiny.vocab.push_back(word);
    tiny.positions = 64;
    tiny.add_head(RS_HEAD_SPANS, {"start", "end"});
    ASSERT_EQ(tiny.convert(dir / "m.rsw", "f32"), RS_OK) << rs_last_error();
    m = std::make_unique<loaded>(dir / "m.rsw");
    params.max_tokens = 64;
  }

  std::vector<rs_answer> ask(const std::string &question, const std::string &context, size_t most, const loaded *with = nullptr) {
    std::vector<rs_answer> found(most);
    size_t n = 0;
    const rs_text q = view(question), c = view(context);
    EXPECT_EQ(rs_answer_question((with ? with : m.get())->session, &q, &c, &params, found.data(), most, &n), RS_OK)
        << rs_last_error();
    found.resize(n);
    return found;
  }

  void expect_as_plain(const std::string &question, const std::string &context, size_t most) {
    double no_logit, no_score;
    const std::vector<plain_answer> wanted = answers_f64(tiny, m->model, question, context, params, &no_logit, &no_score);
    const std::vector<rs_answer> got = ask(question, context, most);
    ASSERT_EQ(got.size(), std::min(most, wanted.size()));
    for (size_t i = 0; i < got.size(); i++) {
      EXPECT_TRUE(std::fabs(got[i].logit - wanted[i].logit) < 1e-4) << i << ": " << got[i].logit << " " << wanted[i].logit;
      EXPECT_TRUE(std::fabs(got[i].score - wanted[i].score) < 1e-4) << i;
      EXPECT_TRUE(std::fabs(got[i].no_answer_logit - no_logit) < 1e-4);
      EXPECT_TRUE(std::fabs(got[i].no_answer_score - no_score) < 1e-4);
      // Spans of logits that f32 cannot tell apart may come in another order.
      bool found = false;
      for (const plain_answer &w : wanted)
        found |= w.begin == got[i].begin && w.end == got[i].end && std::fabs(w.logit - wanted[i].logit) < 1e-4;
      EXPECT_TRUE(found) << i << ": " << got[i].begin << " " << got[i].end;
    }
  }

  std::string words(size_t n, unsigned seed) const {
    std::mt19937 rng(seed);
    std::string text;
    for (size_t i = 0; i < n; i++) text += tiny.vocab[5 + rng() % 7] + (rng() % 4 ? " " : "s ");
    return text;
  }
};

TEST_F(answers, are_the_best_of_all_spans) {
  for (unsigned seed = 1; seed <= 6; seed++) {
    SCOPED_TRACE(seed);
    params = sized<rs_answer_params>();
    params.max_tokens = 64;
    expect_as_plain(words(4, seed), words(20, 10 + seed), 5);
    params.max_answer_tokens = 3;
    expect_as_plain(words(4, seed), words(20, 10 + seed), 5);
    params.whole_words = RS_OFF;
    expect_as_plain(words(4, seed), words(20, 10 + seed), 5);
    // In windows.
    params.max_tokens = 30;
    expect_as_plain(words(4, seed), words(100, 20 + seed), 5);
    params.whole_words = RS_ON;
    params.overlap = 5;
    expect_as_plain(words(4, seed), words(100, 20 + seed), 5);
    params.overlap = -1;
    params.max_answer_tokens = 0;
    expect_as_plain(words(4, seed), words(100, 20 + seed), 3);
  }
}

TEST_F(answers, all_of_them_fit_in_a_list_that_is_long_enough) {
  params.max_answer_tokens = 2;
  params.whole_words = RS_OFF;
  expect_as_plain("the cat", "a dog sat on the mat", 100);  // 6 of one token, 5 of two
  EXPECT_EQ(ask("the cat", "a dog sat on the mat", 100).size(), 11u);
}

TEST_F(answers, do_not_depend_on_threads_or_parts) {
  const std::string context = words(300, 7);
  params.max_tokens = 40;
  const std::vector<rs_answer> wanted = ask("the cat", context, 10);
  ASSERT_EQ(wanted.size(), 10u);
  for (int threads : {1, 3}) {
    const loaded other(dir / "m.rsw", threads, 45);
    const std::vector<rs_answer> got = ask("the cat", context, 10, &other);
    ASSERT_EQ(got.size(), wanted.size());
    EXPECT_EQ(memcmp(got.data(), wanted.data(), wanted.size() * sizeof wanted[0]), 0);
  }
}

TEST_F(answers, may_be_where_tokens_were_dropped) {
  const std::string context = words(40, 9);
  const std::vector<rs_answer> wanted = ask("the cat", context, 10);
  double ratios[] = {0};
  auto drop = sized<rs_drop>();
  drop.ratios = ratios, drop.n_ratios = 1;
  params.drop = &drop;
  const std::vector<rs_answer> none = ask("the cat", context, 10);
  ASSERT_EQ(none.size(), wanted.size());
  EXPECT_EQ(memcmp(none.data(), wanted.data(), wanted.size() * sizeof wanted[0]), 0);
  ratios[0] = 0.6;
  params.max_answer_tokens = 1;
  params.whole_words = RS_OFF;
  EXPECT_EQ(ask("the cat", context, 1000).size(), tokenize(m->model, context, nullptr).ids.size() - 2);  // every token is one
}

TEST_F(answers, are_bytes_of_the_context_whatever_it_is_written_in) {
  // é in one character and in two, wide characters, an emoji, marks.
  const std::string context =
      "Caf\xc3\xa9 漢字 😀 cafe\xcc\x81 the \xc3\x89"
      "cats 字.";
  params.max_answer_tokens = 1;
  params.whole_words = RS_OFF;
  const std::vector<rs_answer> found = ask("the cat", context, 50);
  const encoded e = tokenize(m->model, context, nullptr);
  ASSERT_EQ(found.size(), e.ids.size() - 2);
  std::set<std::string> seen;
  for (const rs_answer &a : found) {
    ASSERT_LT(a.begin, a.end);
    ASSERT_LE(a.end, context.size());
    EXPECT_NE(static_cast<unsigned char>(context[a.begin]) & 0xc0, 0x80);  // whole characters
    EXPECT_TRUE(a.end == context.size() || (static_cast<unsigned char>(context[a.end]) & 0xc0) != 0x80 ||
                context[a.end - 1] == 'e');
    seen.insert(context.substr(a.begin, a.end - a.begin));
  }
  for (const char *part : {"Caf\xc3\xa9", "漢", "字", "😀", "the", "."}) EXPECT_EQ(seen.count(part), 1u) << part;
}

TEST_F(answers, take_whole_words) {
  // "sitsing": sit ##s ##ing
  const std::string context = "a sitsing cat";
  params.max_answer_tokens = 1;
  const std::vector<rs_answer> words = ask("the", context, 50);
  ASSERT_EQ(words.size(), 3u);
  for (const rs_answer &a : words) EXPECT_NE(context.substr(a.begin, a.end - a.begin).find_first_of("ag"), std::string::npos);
  params.whole_words = RS_OFF;
  const std::vector<rs_answer> pieces = ask("the", context, 50);
  ASSERT_EQ(pieces.size(), 5u);
  float best = -INFINITY;
  for (const rs_answer &a : pieces)
    if (a.begin >= 2 && a.end <= 9) best = std::max(best, a.logit);
  for (const rs_answer &a : words)
    if (a.begin == 2) {  // of the spans that come to one word the best counts
      EXPECT_EQ(a.logit, best);
    }
}

TEST_F(answers, limits_and_errors) {
  EXPECT_EQ(ask("the cat", "", 5).size(), 0u);
  EXPECT_EQ(ask("", "the cat", 50).size(), 3u);
  EXPECT_EQ(ask("the cat", "a dog", 0).size(), 0u);
  const auto error_of = [&](const std::string &question, const std::string &context) -> std::string {
    rs_answer a;
    size_t n;
    const rs_text q = view(question), c = view(context);
    return rs_answer_question(m->session, &q, &c, &params, &a, 1, &n) == RS_OK ? "" : rs_last_error();
  };
  EXPECT_EQ(error_of(words(62, 1), "cat").find("the question has "), 0u);
  EXPECT_EQ(rs_encode_failed(m->session), 0u);
  EXPECT_NE(std::string(rs_last_error()).find("leaves no room for the context in windows of 64"), std::string::npos);
  EXPECT_EQ(error_of("\xff", "cat").find("the question: "), 0u);
  EXPECT_EQ(rs_encode_failed(m->session), 0u);
  EXPECT_EQ(error_of("cat", "\xff").find("the context: "), 0u);
  EXPECT_EQ(rs_encode_failed(m->session), 1u);
  params.overlap = 60;
  EXPECT_EQ(error_of("cat", "dog"), "overlap is 60, but the question leaves room for 60 tokens of the context in a window");
  params.overlap = -2;
  EXPECT_EQ(error_of("cat", "dog"), "overlap is -2");
  EXPECT_EQ(rs_encode_failed(m->session), SIZE_MAX);
  params.overlap = 0;
  params.whole_words = static_cast<rs_tristate>(7);
  EXPECT_EQ(error_of("cat", "dog"), "whole_words is 7, expected -1 to 1");
  params.whole_words = RS_DEFAULT;
  params.max_answer_tokens = -1;
  EXPECT_EQ(error_of("cat", "dog"), "max_answer_tokens is -1");
  params.max_answer_tokens = 0;
  params.max_tokens = 65;
  EXPECT_NE(error_of("cat", "dog"), "");
  // A question of as many tokens as there is room for leaves one for the context, and every token of it is looked at.
  params.max_tokens = 7;
  params.max_answer_tokens = 1;
  EXPECT_EQ(ask("the cat sat", "a dog on a mat", 50).size(), 5u);
}

// ---- the real classifier

TEST(sst2, logits_match_the_reference) {
  RS_NEED_SHARED("golden/sst2_logits.jsonl");
  strings texts;
  std::vector<size_t> labels;
  floats wanted;
  std::ifstream in(shared_file("golden/sst2_logits.jsonl"));
  for (std::string line; std::getline(in, line);) {
    const json row = json::parse(line);
    texts.push_back(row["text"]);
    labels.push_back(row["label"]);
    for (float x : row["logits"]) wanted.push_back(x);
  }
#if defined(__SANITIZE_ADDRESS__)
  texts.resize(20);  // some twenty times slower
#endif
  ASSERT_EQ(wanted.size(), 2 * labels.size());
  // From the issue: f32 within 1e-3 and as accurate as the reference, q8 within half a point.
  for (const auto &[type, tolerance, points] :
       std::vector<std::tuple<std::string, double, double>>{{"f32", 1e-3, 0}, {"q8", 0.5, 0.5}, {"q4", 2, 1.5}}) {
    const std::string path = path_if_exists(env_or("RS_TEST_MODELS", RS_DEFAULT_TEST_MODELS) + "/sst2-" + type + ".rsw");
    if (path.empty()) GTEST_SKIP() << "needs sst2-minilm as " << type << ", which could not be made";
    const loaded m(path);
    auto params = sized<rs_encode_params>();
    params.max_tokens = 128;
    const classified got = classify(m, texts, nullptr, &params);
    ASSERT_EQ(got.status, RS_OK) << rs_last_error();
    double most = 0;
    size_t right = 0, right_reference = 0;
    for (size_t i = 0; i < texts.size(); i++) {
      for (size_t k = 0; k < 2; k++) most = std::max(most, std::fabs(double(got.logits[2 * i + k]) - wanted[2 * i + k]));
      right += (got.logits[2 * i + 1] > got.logits[2 * i]) == (labels[i] == 1);
      right_reference += (wanted[2 * i + 1] > wanted[2 * i]) == (labels[i] == 1);
    }
    const auto n = static_cast<double>(texts.size());
    printf("SST-2, %s: %zu of %zu right, largest difference of a logit %.2g\n", type.c_str(), right, texts.size(), most);
    EXPECT_TRUE(most <= tolerance) << type << ": " << most;
    // Of the few texts under sanitizers, one is more than that already.
    const double texts_off = points > 0 ? std::max(1.0, points * n / 100) : 0;
    EXPECT_TRUE(std::fabs(double(right) - double(right_reference)) <= texts_off) << type;
    if (texts.size() == 872 && type == "f32") {
      EXPECT_EQ(right, 783u);
    }
  }
}

}  // namespace
