// Texts to vectors in tests.
#pragma once
#include "../rs.h"
#include "test_util.h"

#include <cmath>

template <class P>
P sized() {
  P p = {};
  p.size = sizeof p;
  return p;
}

inline std::vector<rs_text> views_of(const std::vector<std::string> &texts) {
  std::vector<rs_text> views(texts.size());
  for (size_t i = 0; i < texts.size(); i++) views[i] = {texts[i].data(), texts[i].size()};
  return views;
}

// The vector of text i.
inline std::vector<float> row(const std::vector<float> &all, size_t i, size_t dim = 384) {
  return {all.begin() + static_cast<std::ptrdiff_t>(i * dim), all.begin() + static_cast<std::ptrdiff_t>((i + 1) * dim)};
}

inline std::vector<float> encode(rs_session *s, const std::vector<std::string> &texts, const rs_encode_params &params, size_t dim,
                                 std::vector<rs_text_info> *infos = nullptr) {
  const std::vector<rs_text> views = views_of(texts);
  std::vector<float> out(texts.size() * dim);
  if (infos) infos->resize(texts.size());
  EXPECT_EQ(rs_encode(s, views.data(), views.size(), &params, out.data(), out.size(), infos ? infos->data() : nullptr), RS_OK)
      << rs_last_error();
  return out;
}

inline double cosine(const float *a, const float *b, size_t n) {
  double ab = 0, aa = 0, bb = 0;
  for (size_t i = 0; i < n; i++) ab += double(a[i]) * b[i], aa += double(a[i]) * a[i], bb += double(b[i]) * b[i];
  return ab / std::sqrt(aa * bb);
}
