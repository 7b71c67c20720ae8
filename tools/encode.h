// Texts to vectors with one call, for the subcommands that need a few of them.
#pragma once
#include "common.h"

struct encoded_texts {
  std::vector<float> values;  // [n, dim]
  std::vector<rs_text_info> infos;
  int64_t dim = 0;
  const float *row(size_t i) const { return values.data() + i * size_t(dim); }
};

// With pooling.  Throws failure, which begins with what `places` calls the text at fault, or with its number where `places` is
// empty.
encoded_texts encode_texts(rs_session *session, const std::vector<std::string> &texts, const rs_encode_params &params, int64_t dim,
                           const std::vector<std::string> &places = {});

// What was cut, for standard error: empty when nothing was.
struct truncation_count {
  size_t texts = 0, cut = 0;
  int32_t longest = 0;
  void add(const rs_text_info &info);
  // advice: what else keeps more of a text, or nullptr.
  std::string summary(int32_t max_tokens, int32_t position_limit, const char *advice = "--long chunk") const;
};
