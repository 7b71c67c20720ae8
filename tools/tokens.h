// The tokens of a text as the model sees them.
#pragma once
#include "input.h"

struct tokens {
  std::vector<int32_t> ids, type_ids;
  std::vector<rs_span> spans;
  void resize(size_t n) {
    ids.resize(n);
    type_ids.resize(n);
    spans.resize(n);
  }
  // A part of another list at the end of this one.
  void append(const tokens &from, size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      ids.push_back(from.ids[i]);
      type_ids.push_back(from.type_ids[i]);
      spans.push_back(from.spans[i]);
    }
  }
};

rs_status tokenize(const rs_model *model, const text_item &item, tokens *out);
size_t count_tokens(const rs_model *model, const std::string &text, const std::string *pair = nullptr);  // special ones too

// The template of a text or of a pair: token ids, -1 and -2 where the texts go; empty where a file of images has none.
std::vector<int64_t> template_of(const rs_model *model, bool pair);
size_t special_tokens(const rs_model *model, bool pair);  // of the template

// Cuts the texts inside of the template and keeps its special tokens.
class truncator {
 public:
  truncator(const rs_model *model, size_t max_tokens);
  // Returns what is wrong when the special tokens alone are too many, else "".
  std::string cut(const text_item &item, tokens *all) const;
  // Where the tokens of a single text of `count` are, [first, second): beside them are the template's.
  std::pair<size_t, size_t> of_text(size_t count) const;

 private:
  const rs_model *model_;
  size_t max_tokens_;
  std::vector<int64_t> template_[2];  // of a single text, of a pair
};
