// A small BERT with random weights and a small vocabulary.
#pragma once
#include "tiny_source.h"

struct tiny_bert : tiny_source {
  int64_t hidden = 32, layers = 2, heads = 4, intermediate = 64, positions = 40, types = 2;
  double eps = 1e-12;
  std::string act = "gelu";
  std::vector<std::string> vocab = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "cat",   "dog",
                                    "sat",   "on",    "mat",   "##s",   "##ing",  ".",   ",", "hello", "world"};
  std::string prefix;  // "bert." where a head is on top
  std::vector<std::pair<std::string, std::string>> extra_strings;

  explicit tiny_bert(unsigned seed = 1) : tiny_source(seed) {}

  void tensor(const std::string &name, const std::vector<int64_t> &shape, float mean, float sigma) {
    tiny_source::tensor(prefix + name, shape, mean, sigma);
  }

  void fill() override {
    const float s = 1 / std::sqrt(static_cast<float>(hidden));
    const auto norm = [&](const std::string &name) {
      tensor(name + ".weight", {hidden}, 1, 0.2f);
      tensor(name + ".bias", {hidden}, 0, 0.2f);
    };
    const auto dense = [&](const std::string &name, int64_t n, int64_t k) {
      tensor(name + ".weight", {n, k}, 0, s);
      tensor(name + ".bias", {n}, 0, 0.1f);
    };
    tensor("embeddings.word_embeddings.weight", {static_cast<int64_t>(vocab.size()), hidden}, 0, 1);
    tensor("embeddings.position_embeddings.weight", {positions, hidden}, 0, 0.5f);
    tensor("embeddings.token_type_embeddings.weight", {types, hidden}, 0, 0.5f);
    norm("embeddings.LayerNorm");
    for (int64_t i = 0; i < layers; i++) {
      const std::string at = "encoder.layer." + std::to_string(i) + ".";
      for (const char *n : {"query", "key", "value"}) dense(at + "attention.self." + n, hidden, hidden);
      dense(at + "attention.output.dense", hidden, hidden);
      norm(at + "attention.output.LayerNorm");
      dense(at + "intermediate.dense", intermediate, hidden);
      dense(at + "output.dense", hidden, intermediate);
      norm(at + "output.LayerNorm");
    }
  }

  // With a head on top, as transformers publishes it.
  void add_head(rs_head head, const std::vector<std::string> &labels) {
    const auto n = static_cast<int64_t>(labels.size());
    prefix = "bert.";
    if (weights.empty()) fill();
    const float s = 1 / std::sqrt(static_cast<float>(hidden));
    if (head == RS_HEAD_SEQUENCE)
      tensor("pooler.dense.weight", {hidden, hidden}, 0, s), tensor("pooler.dense.bias", {hidden}, 0, 0.1f);
    prefix = "";
    const std::string name = head == RS_HEAD_SPANS ? "qa_outputs" : "classifier";
    tensor(name + ".weight", {n, hidden}, 0, 2 * s), tensor(name + ".bias", {n}, 0, 0.5f);
    prefix = "bert.";
    const char *const names[] = {"", "SequenceClassification", "TokenClassification", "QuestionAnswering"};
    extra_strings = {{"architectures.0", std::string("BertFor") + names[head]}};
    for (size_t i = 0; i < labels.size() && head != RS_HEAD_SPANS; i++)
      extra_strings.emplace_back("id2label." + std::to_string(i), labels[i]);
  }

  // Tokenizer, pooling and prompts, as the convert tool sets them.
  void set_metadata(rs_writer *w) const override {
    std::vector<rs_text> tokens;
    for (const std::string &t : vocab) tokens.push_back({t.data(), t.size()});
    const int64_t added[] = {0, 1, 2, 3, 4}, flags[] = {16, 16, 16, 16, 16}, single[] = {2, -1, 3}, zero[] = {0, 0, 0},
                  pair[] = {2, -1, 3, -2, 3}, pair_types[] = {0, 0, 0, 1, 1};
    const rs_text names[] = {{"query", 5}, {"passage", 7}}, texts[] = {{"the ", 4}, {"a ", 2}};
    expect_set({
        rs_writer_set_str(w, "tokenizer.type", "wordpiece"),
        rs_writer_set_strs(w, "tokenizer.tokens", tokens.data(), tokens.size()),
        rs_writer_set_str(w, "tokenizer.unk", "[UNK]"),
        rs_writer_set_str(w, "tokenizer.prefix", "##"),
        rs_writer_set_i64(w, "tokenizer.max_word_chars", 100),
        rs_writer_set_bool(w, "tokenizer.clean_text", true),
        rs_writer_set_bool(w, "tokenizer.chinese_chars", true),
        rs_writer_set_bool(w, "tokenizer.strip_accents", true),
        rs_writer_set_bool(w, "tokenizer.lowercase", true),
        rs_writer_set_i64s(w, "tokenizer.added_ids", added, 5),
        rs_writer_set_i64s(w, "tokenizer.added_flags", flags, 5),
        rs_writer_set_i64s(w, "tokenizer.single", single, 3),
        rs_writer_set_i64s(w, "tokenizer.single_types", zero, 3),
        rs_writer_set_i64s(w, "tokenizer.pair", pair, 5),
        rs_writer_set_i64s(w, "tokenizer.pair_types", pair_types, 5),
        rs_writer_set_str(w, "encode.pooling", "mean"),
        rs_writer_set_bool(w, "encode.normalize", true),
        rs_writer_set_i64(w, "encode.max_tokens", positions),
        rs_writer_set_strs(w, "prompt.names", names, 2),
        rs_writer_set_strs(w, "prompt.texts", texts, 2),
    });
  }

 private:
  void set_config() override {
    string("model_type", "bert");
    string("architectures.0", "BertModel");
    string("hidden_act", act);
    number("hidden_size", hidden), number("num_hidden_layers", layers), number("num_attention_heads", heads),
        number("intermediate_size", intermediate);
    number("max_position_embeddings", positions), number("type_vocab_size", types),
        number("vocab_size", static_cast<int64_t>(vocab.size()));
    real("layer_norm_eps", eps);
    for (const auto &[key, value] : extra_strings) string(key, value);
  }
};

// A model and a session of it, freed at the end of the scope.
struct loaded {
  rs_model *model = nullptr;
  rs_session *session = nullptr;
  explicit loaded(const std::string &path, int threads = 2, int max_batch_tokens = 0, rs_thread_mode mode = RS_THREADS_AUTO) {
    EXPECT_EQ(rs_model_load(path.c_str(), nullptr, &model), RS_OK) << rs_last_error();
    rs_session_params p = {};
    p.size = sizeof p;
    p.threads = threads;
    p.max_batch_tokens = max_batch_tokens;
    p.thread_mode = mode;
    if (model) {
      EXPECT_EQ(rs_session_create(model, &p, &session), RS_OK) << rs_last_error();
    }
  }
  ~loaded() {
    rs_session_free(session);
    rs_model_free(model);
  }
  loaded(const loaded &) = delete;
  loaded &operator=(const loaded &) = delete;
};
