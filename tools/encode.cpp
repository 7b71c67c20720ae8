#include "encode.h"

#include <algorithm>

encoded_texts encode_texts(rs_session *session, const std::vector<std::string> &texts, const rs_encode_params &params, int64_t dim,
                           const std::vector<std::string> &places) {
  std::vector<rs_text> views;
  for (const std::string &text : texts) views.push_back(view_of(text));
  encoded_texts result;
  result.dim = dim;
  result.values.resize(texts.size() * size_t(dim));
  result.infos.resize(texts.size());
  rs_status status =
      rs_encode(session, views.data(), views.size(), &params, result.values.data(), result.values.size(), result.infos.data());
  size_t culprit = rs_encode_failed(session);
  if (status != RS_OK && culprit < places.size()) fail(places[culprit], ": ", rs_last_error());
  check(status);
  return result;
}

void truncation_count::add(const rs_text_info &info) {
  ++texts;
  if (!info.truncated) return;
  ++cut;
  longest = std::max(longest, info.total);
}

std::string truncation_count::summary(int32_t max_tokens, int32_t position_limit, const char *advice) const {
  if (cut == 0) return "";
  std::string text = join(cut, " of ", texts, texts == 1 ? " text was" : " texts were", " cut to ", max_tokens,
                          " tokens (longest: ", longest, ")");
  int32_t more = std::min(longest, position_limit);
  if (more > max_tokens) return join(text, "; --max-tokens ", more, advice ? join(" or ", advice) : "", " keeps more");
  return advice ? join(text, "; ", advice, " keeps all") : text;
}
