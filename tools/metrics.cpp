#include "metrics.h"

#include <utf8proc.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <utility>

// ---------------------------------------------------------------------------------------------- correlation

std::vector<double> ranks_of(const std::vector<double> &values) {
  std::vector<size_t> order(values.size());
  std::iota(order.begin(), order.end(), size_t(0));
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return values[a] < values[b]; });
  std::vector<double> ranks(values.size());
  for (size_t begin = 0, end; begin < order.size(); begin = end) {
    for (end = begin + 1; end < order.size() && values[order[end]] == values[order[begin]];) ++end;
    for (size_t i = begin; i < end; ++i) ranks[order[i]] = double(begin + 1 + end) / 2;
  }
  return ranks;
}

double pearson(const std::vector<double> &a, const std::vector<double> &b) {
  const auto n = double(a.size());
  const double mean_a = std::accumulate(a.begin(), a.end(), 0.0) / n, mean_b = std::accumulate(b.begin(), b.end(), 0.0) / n;
  double ab = 0, aa = 0, bb = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double x = a[i] - mean_a, y = b[i] - mean_b;
    ab += x * y;
    aa += x * x;
    bb += y * y;
  }
  return aa > 0 && bb > 0 ? ab / std::sqrt(aa * bb) : std::numeric_limits<double>::quiet_NaN();
}

double spearman(const std::vector<double> &a, const std::vector<double> &b) {
  // NaN has no rank, and would get one.
  for (const std::vector<double> *values : {&a, &b})
    for (double value : *values)
      if (std::isnan(value)) return value;
  return pearson(ranks_of(a), ranks_of(b));
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  return n == 0 ? 0 : (values[(n - 1) / 2] + values[n / 2]) / 2;
}

// ---------------------------------------------------------------------------------------------- ranking

static double discounted_gain(size_t k, const std::vector<double> &gains) {
  double sum = 0;
  for (size_t i = 0; i < std::min(k, gains.size()); ++i) sum += gains[i] / std::log2(double(i) + 2);
  return sum;
}

double ndcg_at(size_t k, const std::vector<double> &found, std::vector<double> relevant) {
  std::sort(relevant.begin(), relevant.end(), std::greater<>());
  const double ideal = discounted_gain(k, relevant);
  return ideal > 0 ? discounted_gain(k, found) / ideal : 0;
}

double recall_at(size_t k, const std::vector<double> &found, const std::vector<double> &relevant) {
  const auto useful = [](double gain) { return gain > 0; };
  const auto end = found.begin() + ptrdiff_t(std::min(k, found.size()));
  const auto all = double(std::count_if(relevant.begin(), relevant.end(), useful));
  return all > 0 ? double(std::count_if(found.begin(), end, useful)) / all : 0;
}

// ---------------------------------------------------------------------------------------------- neighbours

static double dot(const float *a, const float *b, size_t n) {
  double sum = 0;
  for (size_t i = 0; i < n; ++i) sum += double(a[i]) * b[i];
  return sum;
}

static std::vector<double> inverse_norms(vectors_view rows) {
  std::vector<double> result(rows.n);
  for (size_t i = 0; i < rows.n; ++i) {
    const float *row = rows.values + i * rows.dim;
    const double square = dot(row, row, rows.dim);
    result[i] = square > 0 ? 1 / std::sqrt(square) : 0;
  }
  return result;
}

// The cosines of one row with all others, and the best of them.
class neighbours {
 public:
  explicit neighbours(vectors_view rows) : rows_(rows), scale_(inverse_norms(rows)), cosines_(rows.n) {}

  // `left_out`: a row that does not count, or SIZE_MAX.
  std::vector<size_t> best(const float *query, size_t k, size_t left_out) {
    const double scale = inverse_norms({query, 1, rows_.dim})[0];
    for (size_t i = 0; i < rows_.n; ++i) cosines_[i] = scale * scale_[i] * dot(query, rows_.values + i * rows_.dim, rows_.dim);
    std::vector<size_t> order;
    for (size_t i = 0; i < rows_.n; ++i)
      if (i != left_out) order.push_back(i);
    k = std::min(k, order.size());
    std::partial_sort(order.begin(), order.begin() + ptrdiff_t(k), order.end(),
                      [&](size_t a, size_t b) { return cosines_[a] != cosines_[b] ? cosines_[a] > cosines_[b] : a < b; });
    order.resize(k);
    return order;
  }
  double cosine(size_t row) const { return cosines_[row]; }

 private:
  vectors_view rows_;
  std::vector<double> scale_, cosines_;
};

std::vector<std::vector<size_t>> nearest_rows(vectors_view queries, vectors_view rows, size_t k,
                                              const std::vector<size_t> &left_out) {
  neighbours all(rows);
  std::vector<std::vector<size_t>> result;
  for (size_t i = 0; i < queries.n; ++i)
    result.push_back(all.best(queries.values + i * queries.dim, k, left_out.empty() ? SIZE_MAX : left_out[i]));
  return result;
}

std::vector<int> nearest_classes(vectors_view train, const std::vector<int> &classes, vectors_view test, size_t k) {
  constexpr double temperature = 0.07;
  const bool leave_one_out = test.n == 0;
  if (leave_one_out) test = train;
  neighbours all(train);
  std::vector<int> result;
  for (size_t i = 0; i < test.n; ++i) {
    std::map<int, double> votes;
    for (size_t row : all.best(test.values + i * test.dim, k, leave_one_out ? i : SIZE_MAX))
      votes[classes[row]] += std::exp(all.cosine(row) / temperature);
    const auto most =
        std::max_element(votes.begin(), votes.end(), [](const auto &a, const auto &b) { return a.second < b.second; });
    result.push_back(most == votes.end() ? -1 : most->first);
  }
  return result;
}

// ---------------------------------------------------------------------------------------------- SQuAD

namespace {

// \w of Python's re, less '_', which is punctuation here.
bool is_word(utf8proc_int32_t c) {
  switch (utf8proc_category(c)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_NO:
      return true;
    default:
      return false;
  }
}

// What Python's str.split() parts at.
bool is_space(utf8proc_int32_t c) {
  return (c >= 0x09 && c <= 0x0d) || (c >= 0x1c && c <= 0x20) || c == 0x85 || c == 0x2028 || c == 0x2029 ||
         utf8proc_category(c) == UTF8PROC_CATEGORY_ZS;
}

bool is_ascii_punctuation(utf8proc_int32_t c) {
  return (c >= '!' && c <= '/') || (c >= ':' && c <= '@') || (c >= '[' && c <= '`') || (c >= '{' && c <= '~');
}

bool is_article(std::string_view word) { return word == "a" || word == "an" || word == "the"; }

std::vector<std::string> squad_words(std::string_view text) {
  std::vector<std::string> words;
  std::string normalized = squad_normalized(text);
  for (size_t begin = 0; begin < normalized.size();) {
    size_t end = std::min(normalized.find(' ', begin), normalized.size());
    words.push_back(normalized.substr(begin, end - begin));
    begin = end + 1;
  }
  return words;
}

double squad_f1(const std::vector<std::string> &prediction, const std::vector<std::string> &answer) {
  if (prediction.empty() || answer.empty()) return prediction.empty() && answer.empty() ? 1 : 0;
  std::map<std::string, int> left;
  for (const std::string &word : answer) ++left[word];
  double same = 0;
  for (const std::string &word : prediction)
    if (left[word]-- > 0) ++same;
  if (same == 0) return 0;
  const double precision = same / double(prediction.size()), recall = same / double(answer.size());
  return 2 * precision * recall / (precision + recall);
}

}  // namespace

std::string squad_normalized(std::string_view text) {
  std::string out;
  std::string run;  // of word characters: an article goes only where it is all of it
  bool gap = false;
  const auto end_run = [&] {
    if (is_article(run)) {
      run.clear();
      gap = true;  // the script puts a space in its place
    }
    if (run.empty()) return;
    if (gap && !out.empty()) out += ' ';
    gap = false;
    out += std::exchange(run, std::string());
  };
  const auto append = [](std::string *to, utf8proc_int32_t c) {
    utf8proc_uint8_t bytes[4];
    to->append(reinterpret_cast<const char *>(bytes), size_t(utf8proc_encode_char(c, bytes)));
  };
  for (size_t at = 0; at < text.size();) {
    utf8proc_int32_t c = -1;
    const utf8proc_ssize_t length =
        utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t *>(text.data()) + at, utf8proc_ssize_t(text.size() - at), &c);
    at += length > 0 ? size_t(length) : 1;
    if (length <= 0 || is_ascii_punctuation(c)) continue;
    if (is_space(c)) {
      end_run();
      gap = true;
    } else if (is_word(c)) {
      append(&run, utf8proc_tolower(c));
    } else {  // a sign: neither parts words nor belongs to one, but an article ends before it
      end_run();
      if (gap && !out.empty()) out += ' ';
      gap = false;
      append(&out, c);
    }
  }
  end_run();
  return out;
}

squad_score squad_judge(std::string_view prediction, const std::vector<std::string> &answers) {
  std::vector<std::vector<std::string>> right;
  for (const std::string &answer : answers)
    if (std::vector<std::string> words = squad_words(answer); !words.empty()) right.push_back(std::move(words));
  if (right.empty()) right.emplace_back();
  const std::vector<std::string> words = squad_words(prediction);
  squad_score best{0, 0};
  for (const auto &answer : right) {
    best.exact = std::max(best.exact, words == answer ? 1.0 : 0.0);
    best.f1 = std::max(best.f1, squad_f1(words, answer));
  }
  return best;
}
