// Texts to vectors in tests.
#pragma once
#include "../rs.h"
#include "../tools/common.h"  // sized
#include "test_util.h"

#include <algorithm>
#include <cmath>

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

// The lowest cosine of rows of n; NaN where one has it.
inline double lowest_cosine(const std::vector<float> &got, const std::vector<float> &wanted, size_t n) {
  EXPECT_EQ(got.size(), wanted.size());
  EXPECT_GT(got.size(), 0u);
  double lowest = 2;
  for (size_t i = 0; i + n <= std::min(got.size(), wanted.size()); i += n)
    lowest = smaller_or_nan(lowest, cosine(got.data() + i, wanted.data() + i, n));
  return lowest;
}

// Largest difference relative to the largest value wanted.
inline double relative_error(const std::vector<float> &got, const std::vector<float> &wanted) {
  EXPECT_EQ(got.size(), wanted.size());
  double error = 0, most = 0;
  for (size_t i = 0; i < std::min(got.size(), wanted.size()); i++) {
    error = larger_or_nan(error, std::fabs(double(got[i]) - wanted[i]));
    most = std::max(most, std::fabs(double(wanted[i])));
  }
  return error / most;
}
