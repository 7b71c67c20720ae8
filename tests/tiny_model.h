// A BERT of two layers with random weights, as the folder that a published model would be.  Small enough that every test can have
// one of its own, and there without a network.
#pragma once
#include <nlohmann/json.hpp>

#include <cstring>
#include <map>

#include "test_util.h"

using json = nlohmann::json;

// A safetensors file of any header, right or wrong.
inline std::string safetensors_file_bytes(const std::string &header, const std::string &data) {
  const uint64_t length = header.size();
  return std::string(reinterpret_cast<const char *>(&length), sizeof length) + header + data;
}

struct tiny_tensor {
  std::vector<int64_t> shape;
  std::vector<float> values;
};

struct tiny_options {
  int64_t hidden = 32, intermediate = 64, layers = 2, heads = 4, positions = 64;
  int64_t max_tokens = 32;
  bool prompts = true;
  std::string head;  // "SequenceClassification", "TokenClassification" or "QuestionAnswering"; empty: the bare encoder
  std::vector<std::string> labels;
};

class tiny_model {
 public:
  explicit tiny_model(const tiny_options &options = {}) : options_(options) {
    make_vocabulary();
    make_weights();
  }

  const std::vector<std::string> &tokens() const { return tokens_; }
  std::map<std::string, tiny_tensor> &weights() { return weights_; }

  json config() const {
    json root = encoder_config();
    if (options_.head.empty()) return root;
    root["architectures"] = {"BertFor" + options_.head};
    for (size_t i = 0; i < options_.labels.size(); ++i) root["id2label"][std::to_string(i)] = options_.labels[i];
    return root;
  }

  json encoder_config() const {
    return {{"architectures", {"BertModel"}},
            {"model_type", "bert"},
            {"hidden_act", "gelu"},
            {"hidden_size", options_.hidden},
            {"intermediate_size", options_.intermediate},
            {"num_hidden_layers", options_.layers},
            {"num_attention_heads", options_.heads},
            {"max_position_embeddings", options_.positions},
            {"type_vocab_size", 2},
            {"vocab_size", tokens_.size()},
            {"layer_norm_eps", 1e-12},
            {"pad_token_id", 0}};
  }

  json tokenizer() const {
    json vocab = json::object(), added = json::array(), special = json::object();
    for (size_t i = 0; i < tokens_.size(); ++i) vocab[tokens_[i]] = i;
    for (size_t i = 0; i < 5; ++i)
      added.push_back({{"id", i},
                       {"content", tokens_[i]},
                       {"single_word", false},
                       {"lstrip", false},
                       {"rstrip", false},
                       {"normalized", false},
                       {"special", true}});
    const auto token = [](const char *name, int type) { return json{{"SpecialToken", {{"id", name}, {"type_id", type}}}}; };
    const auto text = [](const char *name, int type) { return json{{"Sequence", {{"id", name}, {"type_id", type}}}}; };
    for (size_t i : {2, 3}) special[tokens_[i]] = {{"id", tokens_[i]}, {"ids", {i}}, {"tokens", {tokens_[i]}}};
    return {{"version", "1.0"},
            {"added_tokens", added},
            {"normalizer",
             {{"type", "BertNormalizer"},
              {"clean_text", true},
              {"handle_chinese_chars", true},
              {"strip_accents", nullptr},
              {"lowercase", true}}},
            {"pre_tokenizer", {{"type", "BertPreTokenizer"}}},
            {"post_processor",
             {{"type", "TemplateProcessing"},
              {"single", {token("[CLS]", 0), text("A", 0), token("[SEP]", 0)}},
              {"pair", {token("[CLS]", 0), text("A", 0), token("[SEP]", 0), text("B", 1), token("[SEP]", 1)}},
              {"special_tokens", special}}},
            {"model",
             {{"type", "WordPiece"},
              {"unk_token", "[UNK]"},
              {"continuing_subword_prefix", "##"},
              {"max_input_chars_per_word", 100},
              {"vocab", vocab}}}};
  }

  static json modules() {
    json list = json::array();
    const char *const parts[][2] = {{"Transformer", ""}, {"Pooling", "1_Pooling"}, {"Normalize", "2_Normalize"}};
    for (size_t i = 0; i < 3; ++i)
      list.push_back({{"idx", i},
                      {"name", std::to_string(i)},
                      {"path", parts[i][1]},
                      {"type", std::string("sentence_transformers.models.") + parts[i][0]}});
    return list;
  }

  // The weights as F32, F16 or BF16.
  std::string safetensors(const std::string &dtype = "F32") const { return safetensors(weights_, dtype); }

  static std::string safetensors(const std::map<std::string, tiny_tensor> &tensors, const std::string &dtype = "F32") {
    json header = {{"__metadata__", {{"format", "pt"}}}};
    std::string data;
    for (const auto &[name, tensor] : tensors) {
      const size_t begin = data.size();
      for (float value : tensor.values) append_value(&data, value, dtype);
      header[name] = {{"dtype", dtype}, {"shape", tensor.shape}, {"data_offsets", {begin, data.size()}}};
    }
    return safetensors_file_bytes(header.dump(), data);
  }

  // Everything that a sentence-transformers folder has, or what transformers writes where there is a head.
  void write(const std::string &folder) const {
    std::filesystem::create_directories(folder + "/1_Pooling");
    write_file(folder + "/config.json", config().dump());
    write_file(folder + "/tokenizer.json", tokenizer().dump());
    write_file(folder + "/tokenizer_config.json", json{{"do_lower_case", true}, {"model_max_length", 512}}.dump());
    write_file(folder + "/model.safetensors", safetensors());
    if (!options_.head.empty()) return;
    write_file(folder + "/modules.json", modules().dump());
    write_file(folder + "/1_Pooling/config.json",
               json{{"pooling_mode_mean_tokens", true}, {"pooling_mode_cls_token", false}}.dump());
    write_file(folder + "/sentence_bert_config.json",
               json{{"max_seq_length", options_.max_tokens}, {"do_lower_case", false}}.dump());
    if (options_.prompts)
      write_file(folder + "/config_sentence_transformers.json",
                 json{{"prompts", {{"query", "find: "}, {"passage", "read: "}}}}.dump());
    write_file(folder + "/README.md", "---\nlanguage: en\nlicense: apache-2.0\n---\n# a model\nlicense: mit\n");
  }

 private:
  void make_vocabulary() {
    tokens_ = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"};
    for (const char *prefix : {"", "##"})
      for (char c = 'a'; c <= 'z'; ++c) tokens_.push_back(prefix + std::string(1, c));
    for (char c = '0'; c <= '9'; ++c) tokens_.push_back(std::string(1, c));
    for (char c = '0'; c <= '9'; ++c) tokens_.push_back("##" + std::string(1, c));
    for (const char *word : {"text", "line", "hello", "world", "find", "read", "cat", "kitten", "stock", ":", ".", ",", "é"})
      tokens_.push_back(word);
  }

  void add(const std::string &name, std::vector<int64_t> shape, float scale, float offset = 0) {
    size_t count = 1;
    for (int64_t n : shape) count *= size_t(n);
    tiny_tensor &tensor = weights_[name];
    tensor.shape = std::move(shape);
    for (size_t i = 0; i < count; ++i) {
      state_ = state_ * 6364136223846793005u + 1442695040888963407u;
      tensor.values.push_back(offset + scale * (float(state_ >> 40) / float(1 << 23) - 1));
    }
  }

  void add_linear(const std::string &name, int64_t n, int64_t k) {
    add(name + ".weight", {n, k}, 0.3f);
    add(name + ".bias", {n}, 0.1f);
  }

  void add_norm(const std::string &name) {
    add(name + ".weight", {options_.hidden}, 0.1f, 1);
    add(name + ".bias", {options_.hidden}, 0.1f);
  }

  void make_weights() {
    const int64_t c = options_.hidden;
    add("embeddings.word_embeddings.weight", {int64_t(tokens_.size()), c}, 1);
    add("embeddings.position_embeddings.weight", {options_.positions, c}, 0.3f);
    add("embeddings.token_type_embeddings.weight", {2, c}, 0.3f);
    add_norm("embeddings.LayerNorm");
    for (int64_t i = 0; i < options_.layers; ++i) {
      const std::string layer = "encoder.layer." + std::to_string(i) + ".";
      for (const char *part : {"query", "key", "value"}) add_linear(layer + "attention.self." + part, c, c);
      add_linear(layer + "attention.output.dense", c, c);
      add_norm(layer + "attention.output.LayerNorm");
      add_linear(layer + "intermediate.dense", options_.intermediate, c);
      add_linear(layer + "output.dense", c, options_.intermediate);
      add_norm(layer + "output.LayerNorm");
    }
    if (options_.head == "SequenceClassification") add_linear("pooler.dense", c, c);
    if (!options_.head.empty()) put_on_head();
  }

  void put_on_head() {
    std::map<std::string, tiny_tensor> encoder = std::move(weights_);
    weights_.clear();
    for (auto &[name, tensor] : encoder) weights_["bert." + name] = std::move(tensor);
    const bool spans = options_.head == "QuestionAnswering";
    add_linear(spans ? "qa_outputs" : "classifier", spans ? 2 : int64_t(options_.labels.size()), options_.hidden);
  }

  static void append_value(std::string *data, float value, const std::string &dtype) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (dtype == "F32") data->append(reinterpret_cast<const char *>(&bits), 4);
    else if (dtype == "BF16") data->append(reinterpret_cast<const char *>(&bits) + 2, 2);  // cut, not rounded
    else {  // F16, cut: all values are far from its limits
      const uint32_t exponent = bits >> 23 & 0xff;
      const auto half = uint16_t(exponent < 113 ? 0 : (bits >> 16 & 0x8000) | (exponent - 112) << 10 | (bits >> 13 & 0x3ff));
      data->append(reinterpret_cast<const char *>(&half), 2);
    }
  }

  tiny_options options_;
  std::vector<std::string> tokens_;
  std::map<std::string, tiny_tensor> weights_;
  uint64_t state_ = 1;
};
