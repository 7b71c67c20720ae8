#include "tokens.h"

#include <algorithm>

rs_status tokenize(const rs_model *model, const text_item &item, tokens *out) {
  rs_text text = view_of(item.text), pair = view_of(item.pair);
  for (size_t n = std::max<size_t>(out->ids.size(), 512);;) {
    out->resize(n);
    rs_status status = rs_tokenize(model, &text, item.has_pair ? &pair : nullptr, out->ids.data(), out->type_ids.data(),
                                   out->spans.data(), out->ids.size(), &n);
    if (status == RS_ERR_LIMIT && n > out->ids.size()) continue;  // room for n then
    out->resize(status == RS_OK ? n : 0);
    return status;
  }
}

size_t count_tokens(const rs_model *model, const std::string &text, const std::string *pair) {
  size_t n = 0;
  const rs_text first = view_of(text), second = pair ? view_of(*pair) : rs_text();
  rs_status status = rs_tokenize(model, &first, pair ? &second : nullptr, nullptr, nullptr, nullptr, 0, &n);
  if (status != RS_ERR_LIMIT) check(status);  // the limit is that of no room for the ids
  return n;
}

std::vector<int64_t> template_of(const rs_model *model, bool pair) {
  rs_meta meta;
  if (!find_meta(model, pair ? "tokenizer.pair" : "tokenizer.single", &meta)) return {};
  if (meta.kind != RS_META_I64S) fail("the template of the tokenizer is not a list of ids");
  return {meta.i64s, meta.i64s + meta.count};
}

size_t special_tokens(const rs_model *model, bool pair) {
  const std::vector<int64_t> parts = template_of(model, pair);
  return size_t(std::count_if(parts.begin(), parts.end(), [](int64_t id) { return id >= 0; }));
}

truncator::truncator(const rs_model *model, size_t max_tokens)
    : model_(model), max_tokens_(max_tokens), template_{template_of(model, false), template_of(model, true)} {}

std::string truncator::cut(const text_item &item, tokens *all) const {
  if (all->ids.size() <= max_tokens_) return "";
  const std::vector<int64_t> &pieces = template_[item.has_pair];
  size_t special = pieces.size() - (item.has_pair ? 2 : 1);
  if (special > max_tokens_) return join("--max-tokens ", max_tokens_, " leaves no room for the ", special, " special tokens");
  size_t a = item.has_pair ? count_tokens(model_, item.text) - (template_[false].size() - 1) : all->ids.size() - special;
  size_t b = all->ids.size() - special - a;
  size_t keep_a = a, keep_b = b;
  rs_cut_pair(&keep_a, &keep_b, max_tokens_ - special);
  tokens kept;
  size_t position = 0;
  for (int64_t piece : pieces) {
    size_t length = piece == -1 ? a : piece == -2 ? b : 1;
    kept.append(*all, position, position + (piece == -1 ? keep_a : piece == -2 ? keep_b : 1));
    position += length;
  }
  *all = std::move(kept);
  return "";
}

std::pair<size_t, size_t> truncator::of_text(size_t count) const {
  const std::vector<int64_t> &pieces = template_[false];
  const size_t before = size_t(std::find(pieces.begin(), pieces.end(), -1) - pieces.begin());
  return {before, count - (pieces.size() - 1 - before)};
}
