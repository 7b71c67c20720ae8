// What tests of tokenizers share.
#pragma once
#include "../models/text.h"
#include "../tools/hf.h"
#include "test_util.h"

#include <algorithm>
#include <memory>

// What a folder's tokenizer.json becomes.
inline hf_tokenizer read_tokenizer(const json &tokenizer_json) {
  hf_tokenizer_files files;
  files.tokenizer = tokenizer_json;
  return read_hf_tokenizer(files);
}
inline rs_tokenizer_spec spec_of(const hf_tokenizer &t) {  // of BPE
  rs_tokenizer_spec spec;
  spec.type = t.type, spec.tokens = t.tokens, spec.merges = t.merges, spec.suffix = t.suffix, spec.split_special = t.split_special;
  spec.compose = t.compose, spec.prefix_space = t.prefix_space, spec.trim_spans = t.trim_spans;
  spec.ignore_merges = t.ignore_merges;
  spec.added_ids = t.added_ids, spec.added_flags = t.added_flags;
  spec.single = t.single, spec.single_types = t.single_types, spec.pair = t.pair, spec.pair_types = t.pair_types;
  return spec;
}

// Of a golden file: spans are begin, end, begin, end …
inline rs_tokens golden_tokens(const json &ids, const json &spans) {
  rs_tokens tokens;
  tokens.ids = ids.get<std::vector<int32_t>>();
  const auto all = spans.get<std::vector<uint32_t>>();
  for (size_t i = 0; i < all.size(); i += 2) tokens.spans.push_back({all[i], all[i + 1]});
  return tokens;
}

struct tokenizer_free {
  void operator()(rs_tokenizer *t) const { rs_tokenizer_free(t); }
};
using tokenizer_ptr = std::unique_ptr<rs_tokenizer, tokenizer_free>;

inline tokenizer_ptr create(const rs_tokenizer_spec &spec) {
  rs_tokenizer *t = nullptr;
  EXPECT_EQ(rs_tokenizer_create(spec, &t), RS_OK) << rs_last_error();
  return tokenizer_ptr(t);
}

inline rs_text as_text(std::string_view s) { return {s.data(), s.size()}; }

// The tokens of a text, with working memory of their own.
inline rs_tokens encode(const tokenizer_ptr &t, std::string_view text) {
  rs_tokens tokens;
  const auto scratch = rs_tokenizer_scratch_new();
  EXPECT_EQ(rs_tokenizer_encode(t.get(), scratch.get(), as_text(text), &tokens), RS_OK) << rs_last_error();
  EXPECT_EQ(tokens.type_ids, std::vector<int32_t>(tokens.ids.size(), 0));
  EXPECT_EQ(tokens.spans.size(), tokens.ids.size());
  return tokens;
}

// "id:begin-end id:begin-end"
inline std::string show(const rs_tokens &tokens) {
  std::string s;
  for (size_t i = 0; i < tokens.ids.size(); i++)
    s += (i ? " " : "") + std::to_string(tokens.ids[i]) + ":" + std::to_string(tokens.spans[i].begin) + "-" +
         std::to_string(tokens.spans[i].end);
  return s;
}

inline rs_tokens wrap(const tokenizer_ptr &t, const rs_tokens &a, const rs_tokens *b = nullptr) {
  rs_tokens out;
  rs_tokenizer_template(t.get(), a, 0, a.ids.size(), b, &out);
  return out;
}

inline std::string utf8(char32_t c) {
  std::string s;
  const auto put = [&](char32_t byte) { s.push_back(static_cast<char>(byte)); };
  if (c < 0x80) {
    put(c);
  } else if (c < 0x800) {
    put(0xC0 | c >> 6), put(0x80 | (c & 0x3F));
  } else if (c < 0x10000) {
    put(0xE0 | c >> 12), put(0x80 | (c >> 6 & 0x3F)), put(0x80 | (c & 0x3F));
  } else {
    put(0xF0 | c >> 18), put(0x80 | (c >> 12 & 0x3F)), put(0x80 | (c >> 6 & 0x3F)), put(0x80 | (c & 0x3F));
  }
  return s;
}

// Byte-level BPE as CLIP has it: token b is byte b, token 256 + b the same at the end of a word; then what merges make, in their
// order, and the two special tokens.
inline rs_tokenizer_spec bpe_spec(const std::vector<std::pair<std::string, std::string>> &merges,
                                  const std::string &suffix = "</w>") {
  rs_tokenizer_spec spec;
  spec.type = "bpe";
  spec.suffix = suffix;
  char32_t unseen = 0x100;
  for (char32_t b = 0; b < 256; b++) {
    const bool seen = (b > 0x20 && b < 0x7F) || (b > 0xA0 && b != 0xAD);
    spec.tokens.push_back(utf8(seen ? b : unseen++));
  }
  for (size_t b = 0; b < 256; b++) spec.tokens.push_back(spec.tokens[b] + suffix);
  const auto id_of = [&](const std::string &token) {
    const auto at = std::find(spec.tokens.begin(), spec.tokens.end(), token);
    EXPECT_NE(at, spec.tokens.end()) << token;
    return at - spec.tokens.begin();
  };
  for (const auto &[left, right] : merges) {
    spec.merges.insert(spec.merges.end(), {id_of(left), id_of(right)});
    if (std::find(spec.tokens.begin(), spec.tokens.end(), left + right) == spec.tokens.end()) spec.tokens.push_back(left + right);
  }
  const auto bos = static_cast<int64_t>(spec.tokens.size()), eos = bos + 1;
  spec.tokens.insert(spec.tokens.end(), {"<|startoftext|>", "<|endoftext|>"});
  spec.added_ids = {bos, eos}, spec.added_flags = {RS_ADDED_SPECIAL, RS_ADDED_SPECIAL};
  spec.single = {bos, -1, eos}, spec.single_types = {0, 0, 0};
  spec.pair = {bos, -1, eos, eos, -2, eos}, spec.pair_types = {0, 0, 0, 0, 0, 0};
  return spec;
}

// A weight file of the smallest BERT there can be, all zeros, with this tokenizer.
inline void write_model(const std::string &path, const rs_tokenizer_spec &spec) {
  const int64_t vocab = static_cast<int64_t>(spec.tokens.size()), hidden = 32, positions = 16;
  std::vector<rs_source_value> config;
  const auto text = [&](const char *key, const char *value) { config.push_back({key, RS_META_STR, false, 0, 0, value}); };
  const auto number = [&](const char *key, int64_t value) {
    config.push_back({key, RS_META_I64, false, value, static_cast<double>(value), nullptr});
  };
  text("model_type", "bert"), text("architectures.0", "BertModel"), text("hidden_act", "gelu");
  number("hidden_size", hidden), number("intermediate_size", hidden), number("num_hidden_layers", 1);
  number("num_attention_heads", 1), number("max_position_embeddings", positions), number("type_vocab_size", 2);
  number("vocab_size", vocab), number("pad_token_id", 0);
  config.push_back({"layer_norm_eps", RS_META_F64, false, 0, 1e-12, nullptr});

  const std::vector<float> zeros(static_cast<size_t>(std::max({vocab, hidden, positions}) * hidden));
  std::vector<rs_source_tensor> tensors;
  const auto tensor = [&](const char *name, int64_t rows, int64_t columns) {
    rs_source_tensor t = {};
    t.name = name, t.type_name = "F32", t.type = RS_F32, t.data = zeros.data();
    t.rank = columns ? 2 : 1, t.shape[0] = rows, t.shape[1] = columns;
    tensors.push_back(t);
  };
  tensor("embeddings.word_embeddings.weight", vocab, hidden);
  tensor("embeddings.position_embeddings.weight", positions, hidden);
  tensor("embeddings.token_type_embeddings.weight", 2, hidden);
  for (const char *name : {"encoder.layer.0.attention.self.query.weight", "encoder.layer.0.attention.self.key.weight",
                           "encoder.layer.0.attention.self.value.weight", "encoder.layer.0.attention.output.dense.weight",
                           "encoder.layer.0.intermediate.dense.weight", "encoder.layer.0.output.dense.weight"})
    tensor(name, hidden, hidden);
  for (const char *name :
       {"embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias", "encoder.layer.0.attention.self.query.bias",
        "encoder.layer.0.attention.self.key.bias", "encoder.layer.0.attention.self.value.bias",
        "encoder.layer.0.attention.output.dense.bias", "encoder.layer.0.attention.output.LayerNorm.weight",
        "encoder.layer.0.attention.output.LayerNorm.bias", "encoder.layer.0.intermediate.dense.bias",
        "encoder.layer.0.output.dense.bias", "encoder.layer.0.output.LayerNorm.weight", "encoder.layer.0.output.LayerNorm.bias"})
    tensor(name, hidden, 0);

  rs_source source = {};
  source.size = sizeof source;
  source.config = config.data(), source.n_config = config.size();
  source.tensors = tensors.data(), source.n_tensors = tensors.size();
  rs_convert_params params = {};
  params.size = sizeof params;
  params.type = "f32";
  std::vector<rs_text> tokens;
  for (const std::string &token : spec.tokens) tokens.push_back({token.data(), token.size()});
  const auto list = [](const std::vector<int64_t> &values, const char *key, rs_writer *w) {
    return rs_writer_set_i64s(w, key, values.data(), values.size());
  };

  const auto set_kind = [&](rs_writer *w) {
    std::vector<rs_status> all;
    if (spec.type == "bpe") {
      all = {list(spec.merges, "tokenizer.merges", w), rs_writer_set_str(w, "tokenizer.suffix", spec.suffix.c_str())};
      if (spec.suffix.empty()) {  // as rs convert: the settings of its kind alone
        all.push_back(rs_writer_set_bool(w, "tokenizer.compose", spec.compose));
        all.push_back(rs_writer_set_bool(w, "tokenizer.prefix_space", spec.prefix_space));
        all.push_back(rs_writer_set_bool(w, "tokenizer.trim_spans", spec.trim_spans));
        all.push_back(rs_writer_set_bool(w, "tokenizer.ignore_merges", spec.ignore_merges));
      } else {
        all.push_back(rs_writer_set_bool(w, "tokenizer.split_special", spec.split_special));
      }
    } else {
      all = {rs_writer_set_str(w, "tokenizer.unk", spec.unk.c_str()),
             rs_writer_set_str(w, "tokenizer.prefix", spec.prefix.c_str()),
             rs_writer_set_i64(w, "tokenizer.max_word_chars", spec.max_word_chars),
             rs_writer_set_bool(w, "tokenizer.clean_text", spec.clean_text),
             rs_writer_set_bool(w, "tokenizer.chinese_chars", spec.chinese_chars),
             rs_writer_set_bool(w, "tokenizer.strip_accents", spec.strip_accents),
             rs_writer_set_bool(w, "tokenizer.lowercase", spec.lowercase)};
    }
    return *std::max_element(all.begin(), all.end());
  };

  rs_writer *w = nullptr;
  ASSERT_EQ(rs_writer_open(path.c_str(), &w), RS_OK) << rs_last_error();
  for (const rs_status status :
       {rs_writer_set_str(w, "tokenizer.type", spec.type.c_str()),
        rs_writer_set_strs(w, "tokenizer.tokens", tokens.data(), tokens.size()), set_kind(w),
        list(spec.added_ids, "tokenizer.added_ids", w), list(spec.added_flags, "tokenizer.added_flags", w),
        list(spec.single, "tokenizer.single", w), list(spec.single_types, "tokenizer.single_types", w),
        list(spec.pair, "tokenizer.pair", w), list(spec.pair_types, "tokenizer.pair_types", w),
        rs_writer_set_str(w, "encode.pooling", "mean"), rs_writer_set_bool(w, "encode.normalize", true),
        rs_writer_set_i64(w, "encode.max_tokens", positions), rs_convert(&source, &params, w), rs_writer_finish(w)})
    EXPECT_EQ(status, RS_OK) << rs_last_error();
  rs_writer_free(w);
}
