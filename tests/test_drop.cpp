// Token dropping: each operator against a plain f64 version, the golden choices of the reference implementation, and what must hold
// for every schedule: a text's vector does not depend on its neighbours, nothing dropped is nothing changed, and no schedule,
// however odd, does more than give an error.
#include "bert_f64.h"
#include "encoding.h"
#include "graph_harness.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <fstream>
#include <functional>
#include <map>
#include <numeric>
#include <set>

namespace {

using json = nlohmann::json;
using ints = std::vector<int32_t>;

constexpr int64_t T = RS_DIM_TOKENS, S = RS_DIM_CU_SEQLENS;

rs_drop_rule ratio_rule(double ratio) {
  rs_drop_rule rule = {};
  rule.ratio = ratio;
  rule.keep_first = true;
  return rule;
}

// A graph with x [T, c], scores [T, 1] and starts, of sequences of those lengths.
struct drop_harness : harness {
  ints cu = {0};
  int64_t c;
  vec values, score_values;
  rs_tensor *x, *score, *starts;

  drop_harness(const ints &lengths, int64_t c, unsigned seed = 1) : c(c) {
    for (int32_t n : lengths) cu.push_back(cu.back() + n);
    values = normal(static_cast<size_t>(cu.back() * c), seed);
    score_values = normal(static_cast<size_t>(cu.back()), seed + 1);
    x = input("x", RS_F32, {T, c}, values);
    score = input("score", RS_F32, {T, 1}, score_values);
    starts = input("cu", RS_I32, {S}, cu);
  }
  int64_t tokens() const { return cu.back(); }
  int64_t sequences() const { return static_cast<int64_t>(cu.size()) - 1; }
  const float *row(int64_t i) const { return values.data() + i * c; }
  vec all(const std::string &isa, rs_tensor *out, int64_t rows, int64_t cols, int threads = 2) {
    session s(isa, threads);
    return run(s.s, out, tokens(), sequences(), static_cast<size_t>(rows * cols));
  }
  // Rows [begin, end) of x that the rule keeps, by sorting.
  ints kept_of(const rs_drop_rule &rule, const ints &protect = {}) const {
    ints kept;
    for (int64_t b = 0; b < sequences(); b++) {
      const int32_t begin = cu[static_cast<size_t>(b)], n = cu[static_cast<size_t>(b) + 1] - begin;
      ints order(static_cast<size_t>(n));
      std::iota(order.begin(), order.end(), begin);
      const auto stays = [&](int32_t i) {
        return (rule.keep_first && i == begin) || (!protect.empty() && protect[static_cast<size_t>(i)]);
      };
      const auto value = [&](int32_t i) { return score_values[static_cast<size_t>(i)] * (rule.lowest ? -1.0f : 1.0f); };
      std::stable_sort(order.begin(), order.end(),
                       [&](int32_t a, int32_t b) { return stays(a) != stays(b) ? stays(a) : value(a) > value(b); });
      int64_t keep = rule.keep ? rule.keep : n - static_cast<int64_t>(n * rule.ratio);
      keep = std::min<int64_t>(
          n, std::max({keep, int64_t(rule.least), int64_t(std::count_if(order.begin(), order.end(), stays)), int64_t(1)}));
      order.resize(static_cast<size_t>(keep));
      std::sort(order.begin(), order.end());
      kept.insert(kept.end(), order.begin(), order.end());
    }
    return kept;
  }
};

double distance_f64(const float *a, const float *b, int64_t n, rs_distance d) {
  double sum = 0, ab = 0, aa = 0, bb = 0;
  for (int64_t i = 0; i < n; i++) {
    const double x = a[i], y = b ? b[i] : 0;
    sum += d == RS_DISTANCE_L1 ? std::fabs(x - y) : (x - y) * (x - y);
    ab += x * y, aa += x * x, bb += y * y;
  }
  return d == RS_DISTANCE_COS ? 1 - ab / std::sqrt(aa * bb) : d == RS_DISTANCE_L1 ? sum : std::sqrt(sum);
}

const std::vector<ints> length_lists = {{1}, {2, 3, 1}, {0, 5, 0}, {7, 130, 1, 64}, {300, 33}};

// Some roundings of a sum of n numbers near 1, in f32.
float sum_error(int64_t n) { return 4e-7f * static_cast<float>(n); }

// ---- operators

TEST(shift, matches_f64) {
  for (const std::string &isa : isas())
    for (int64_t c : {1, 7, 16, 33, 384})
      for (const auto &[d, from] :
           {std::pair(RS_DISTANCE_L2, false), std::pair(RS_DISTANCE_L2, true), std::pair(RS_DISTANCE_L1, true),
            std::pair(RS_DISTANCE_L1, false), std::pair(RS_DISTANCE_COS, true)}) {
        SCOPED_TRACE(isa + " c " + std::to_string(c) + " distance " + std::to_string(d));
        drop_harness h({70}, c);
        const vec other = normal(static_cast<size_t>(70 * c), 5);
        rs_tensor *y = rs_shift(h.g, h.x, from ? h.input("y", RS_F32, {T, c}, other) : nullptr, d);
        vec wanted;
        for (int64_t i = 0; i < 70; i++)
          wanted.push_back(static_cast<float>(distance_f64(h.row(i), from ? &other[static_cast<size_t>(i * c)] : nullptr, c, d)));
        expect_close(h.all(isa, y, 70, 1), wanted, sum_error(c));
      }
}

TEST(shift, rows_of_zeros) {
  for (const std::string &isa : isas()) {
    drop_harness h({3}, 20);
    const vec y = h.all(isa, rs_shift(h.g, h.x, h.input("zeros", RS_F32, {T, 20}, vec(60)), RS_DISTANCE_COS), 3, 1);
    EXPECT_EQ(y, vec(3, 1.0f)) << isa;
  }
}

TEST(centre_distance, matches_f64) {
  for (const std::string &isa : isas())
    for (const ints &lengths : length_lists) {
      drop_harness h(lengths, 40);
      vec wanted;
      for (int64_t b = 0; b < h.sequences(); b++) {
        const int64_t begin = h.cu[static_cast<size_t>(b)], end = h.cu[static_cast<size_t>(b) + 1];
        vec mean(40);
        for (int64_t j = 0; j < 40; j++) {
          double sum = 0;
          for (int64_t i = begin; i < end; i++) sum += h.row(i)[j];
          mean[static_cast<size_t>(j)] = static_cast<float>(sum / static_cast<double>(end - begin));
        }
        for (int64_t i = begin; i < end; i++)
          wanted.push_back(static_cast<float>(distance_f64(h.row(i), mean.data(), 40, RS_DISTANCE_L2)));
      }
      expect_close(h.all(isa, rs_centre_distance(h.g, h.x, h.starts), h.tokens(), 1), wanted, sum_error(40));
    }
}

TEST(attn_colsum, matches_f64) {
  const int heads = 3;
  const int64_t c = 48, d = c / heads;
  const float scale = 0.25f;
  for (const std::string &isa : isas())
    for (const ints &lengths : length_lists)
      for (const auto &[class_only, sized, window] :
           {std::tuple(false, false, 0), std::tuple(true, false, 0), std::tuple(false, true, 0), std::tuple(false, false, 5),
            std::tuple(true, false, 5), std::tuple(false, true, 70)}) {
        SCOPED_TRACE(isa + " first length " + std::to_string(lengths[0]) + " window " + std::to_string(window));
        drop_harness h(lengths, c);
        const vec keys = normal(h.values.size(), 8);
        vec sizes(static_cast<size_t>(h.tokens()));
        for (size_t i = 0; i < sizes.size(); i++) sizes[i] = static_cast<float>(1 + i % 4);
        vec wanted(static_cast<size_t>(h.tokens()));
        for (int64_t b = 0; b < h.sequences(); b++) {
          const int64_t begin = h.cu[static_cast<size_t>(b)], end = h.cu[static_cast<size_t>(b) + 1];
          const int64_t queries = class_only ? std::min<int64_t>(1, end - begin) : end - begin;
          for (int64_t head = 0; head < heads; head++)
            for (int64_t i = begin; i < begin + queries; i++) {
              std::vector<double> p;
              double sum = 0;
              const int64_t first = window ? std::max(begin, i - window) : begin,
                            last = window ? std::min(end, i + window + 1) : end;
              for (int64_t j = first; j < last; j++) {
                double dot = 0;
                for (int64_t l = head * d; l < (head + 1) * d; l++)
                  dot += double(h.row(i)[l]) * double(keys[static_cast<size_t>(j * c + l)]);
                p.push_back(std::exp(dot * double(scale)) * (sized ? double(sizes[static_cast<size_t>(j)]) : 1));
                sum += p.back();
              }
              for (int64_t j = first; j < last; j++)
                wanted[static_cast<size_t>(j)] +=
                    static_cast<float>(p[static_cast<size_t>(j - first)] / sum / heads / static_cast<double>(queries));
            }
        }
        rs_tensor *k = h.input("k", RS_F32, {T, c}, keys), *counts = sized ? h.input("sizes", RS_F32, {T, 1}, sizes) : nullptr;
        rs_tensor *y = window ? rs_attn_colsum_window(h.g, h.x, k, h.starts, counts, heads, scale, class_only, window)
                              : rs_attn_colsum(h.g, h.x, k, h.starts, counts, heads, scale, class_only);
        expect_close(h.all(isa, y, h.tokens(), 1), wanted, 2e-6f);  // of numbers up to 1
      }
}

TEST(position_score, by_place_and_by_chance) {
  drop_harness first({3, 2}, 1);
  EXPECT_EQ(first.all("", rs_position_score(first.g, first.starts, false, 0), 5, 1), (vec{0, -1, -2, 0, -1}));
  const auto random = [](const ints &lengths, uint64_t seed) {
    drop_harness h(lengths, 1);
    return h.all("", rs_position_score(h.g, h.starts, true, seed), h.tokens(), 1);
  };
  const vec a = random({1000, 50}, 7), alone = random({50}, 7), other = random({50}, 8);
  EXPECT_EQ(vec(a.begin() + 1000, a.end()), alone);  // neighbours do not matter
  EXPECT_NE(alone, other);
  double mean = 0;
  for (size_t i = 0; i < 1000; i++) {
    ASSERT_TRUE(a[i] >= 0 && a[i] < 1);
    mean += double(a[i]) / 1000;
  }
  EXPECT_TRUE(std::fabs(mean - 0.5) < 0.04);  // four deviations of a mean of 1000
  EXPECT_EQ(std::set<float>(a.begin(), a.begin() + 1000).size(), 1000u);
}

TEST(standardize, matches_f64) {
  for (const ints &lengths : length_lists) {
    drop_harness h(lengths, 1);
    vec wanted;
    for (size_t b = 0; b + 1 < h.cu.size(); b++) {
      const double n = h.cu[b + 1] - h.cu[b];
      double mean = 0, squares = 0;
      for (int32_t i = h.cu[b]; i < h.cu[b + 1]; i++) mean += double(h.score_values[static_cast<size_t>(i)]) / n;
      for (int32_t i = h.cu[b]; i < h.cu[b + 1]; i++)
        squares += std::pow(double(h.score_values[static_cast<size_t>(i)]) - mean, 2) / n;
      for (int32_t i = h.cu[b]; i < h.cu[b + 1]; i++)
        wanted.push_back(
            squares > 0 ? static_cast<float>(-2.5 * (double(h.score_values[static_cast<size_t>(i)]) - mean) / std::sqrt(squares))
                        : 0);
    }
    expect_close(h.all("", rs_standardize(h.g, h.score, h.starts, -2.5f), h.tokens(), 1), wanted, 1e-5f);
  }
}

TEST(token_drop, keeps_what_sorting_keeps) {
  std::vector<rs_drop_rule> rules;
  for (double ratio : {0.0, 0.1, 0.3, 0.5, 0.999}) rules.push_back(ratio_rule(ratio));
  rules.push_back(ratio_rule(0.4));
  rules.back().lowest = true;
  rules.push_back(ratio_rule(0.4));
  rules.back().keep_first = false;
  rules.push_back(ratio_rule(0.9));
  rules.back().least = 20;
  rules.push_back(ratio_rule(0.9));
  rules.back().keep = 6;
  for (const ints &lengths : length_lists)
    for (const rs_drop_rule &rule : rules)
      for (bool flags : {false, true}) {
        drop_harness h(lengths, 3);
        for (size_t i = 0; i < h.score_values.size(); i += 3) h.score_values[i] = std::round(h.score_values[i]);  // ties
        memcpy(h.memory[1]->data(), h.score_values.data(), h.score_values.size() * 4);
        ints protect(static_cast<size_t>(h.tokens()));
        for (size_t i = 0; i < protect.size(); i += 5) protect[i] = 1;
        rs_tensor *flag_input = flags ? h.input("protect", RS_I32, {T}, protect) : nullptr;
        const ints kept = h.kept_of(rule, flags ? protect : ints());
        rs_tensor *y = rs_token_gather(h.g, h.x, rs_token_drop(h.g, h.score, h.starts, flag_input, &rule));
        vec wanted;
        for (int32_t i : kept) wanted.insert(wanted.end(), h.row(i), h.row(i) + 3);
        for (int threads : {1, 3}) {
          session s("", threads);
          rs_output(h.g, y);
          ASSERT_EQ(rs_graph_finish(h.g), RS_OK) << rs_last_error();
          ASSERT_EQ(h.again(s.s, y, h.tokens(), h.sequences(), wanted.size()), wanted)
              << "first length " << lengths[0] << " ratio " << rule.ratio;
        }
      }
}

TEST(token_drop, ratios_are_multiplied_as_doubles) {  // as Python does: 10 * 0.7 is 7, 100 * 0.29 is 28.999…
  for (const auto &[n, ratio, kept] :
       {std::tuple(10, 0.7, 3), std::tuple(100, 0.29, 72), std::tuple(10, 0.3, 7), std::tuple(30, 0.1, 27)}) {
    drop_harness h({n}, 1);
    rs_drop_rule rule = ratio_rule(ratio);
    h.all("", rs_token_gather(h.g, h.x, rs_token_drop(h.g, h.score, h.starts, nullptr, &rule)), kept, 1);
  }
}

TEST(token_drop, a_nan_is_an_error) {
  drop_harness h({4, 6}, 1);
  h.score_values[7] = NAN;
  memcpy(h.memory[1]->data(), h.score_values.data(), 40);
  rs_drop_rule rule = ratio_rule(0.5);
  rs_tensor *y = rs_output(h.g, rs_token_gather(h.g, h.x, rs_token_drop(h.g, h.score, h.starts, nullptr, &rule)));
  ASSERT_EQ(rs_graph_finish(h.g), RS_OK);
  session s;
  vec out(5);
  h.bindings.push_back({y, out.data(), 20});
  EXPECT_EQ(rs_graph_run(s.s, h.g, 10, 2, h.bindings.data(), h.bindings.size()), RS_ERR_NUMERIC);
  EXPECT_STREQ(rs_last_error(), "'score': the score of token 3 of sequence 1 is NaN");
}

TEST(token_drop, what_does_not_fit_is_an_error_that_names_it) {
  const auto error_of = [](const std::function<void(drop_harness &)> &build) {
    drop_harness h({5}, 2);
    build(h);
    EXPECT_NE(rs_graph_finish(h.g), RS_OK);
    return std::string(rs_last_error());
  };
  rs_drop_rule rule = ratio_rule(0.5), fold = rule;
  fold.fold = true;
  const auto drop = [&](drop_harness &h) { return rs_token_drop(h.g, h.score, h.starts, nullptr, &rule); };
  EXPECT_NE(error_of([&](drop_harness &h) { rs_token_drop(h.g, h.x, h.starts, nullptr, &rule); }).find("expected [T,1]"),
            std::string::npos);
  EXPECT_NE(
      error_of([&](drop_harness &h) { rs_add(h.g, h.x, rs_token_gather(h.g, h.x, drop(h))); }).find("behind 1 drops, expected 0"),
      std::string::npos);
  EXPECT_NE(
      error_of([&](drop_harness &h) { rs_token_gather(h.g, rs_token_gather(h.g, h.x, drop(h)), drop(h)); }).find("expected 0"),
      std::string::npos);
  EXPECT_NE(error_of([&](drop_harness &h) {
              rs_token_gather(h.g, h.x, rs_token_drop(h.g, h.score, h.starts, nullptr, &fold));
            }).find("folds"),
            std::string::npos);
  EXPECT_NE(error_of([&](drop_harness &h) { rs_token_starts(h.g, h.x); }).find("'x' is not what rs_token_drop"), std::string::npos);
  EXPECT_NE(error_of([&](drop_harness &h) {
              rs_pool(h.g, rs_token_gather(h.g, h.x, drop(h)), h.starts, nullptr, RS_POOL_MEAN, 0);
            }).find("'cu'"),
            std::string::npos);
  // Rows that become others, by other bounds than those that they were chosen by.
  const auto other = [](drop_harness &h) { return h.input("others", RS_I32, {RS_DIM_CU_SEQLENS}, std::vector<int32_t>{0, 5}); };
  EXPECT_NE(error_of([&](drop_harness &h) {
              rs_token_assign(h.g, h.x, other(h), drop(h));
            }).find("cu_seqlens is 'others', but 'token_drop."),
            std::string::npos);
  EXPECT_NE(error_of([&](drop_harness &h) {
              rs_tensor *kept = drop(h), *assign = rs_token_assign(h.g, h.x, h.starts, kept);
              rs_token_sizes(h.g, assign, kept, other(h), nullptr);
            }).find("cu_seqlens is 'others'"),
            std::string::npos);
  EXPECT_NE(error_of([&](drop_harness &h) {
              rs_tensor *kept = drop(h), *assign = rs_token_assign(h.g, h.x, h.starts, kept);
              rs_token_merge(h.g, rs_pool(h.g, h.x, h.starts, nullptr, RS_POOL_MEAN, 0), assign, kept, h.starts, nullptr, nullptr);
            }).find("expected a row a token"),
            std::string::npos);
  EXPECT_NE(error_of([&](drop_harness &h) {
              rs_token_gather(h.g, rs_pool(h.g, h.x, h.starts, nullptr, RS_POOL_MEAN, 0), drop(h));
            }).find("expected a row a token"),
            std::string::npos);
  rule.ratio = 1;
  EXPECT_NE(error_of([&](drop_harness &h) { drop(h); }).find("ratio 1"), std::string::npos);
  rule.ratio = NAN;
  EXPECT_NE(error_of([&](drop_harness &h) { drop(h); }).find("ratio nan"), std::string::npos);
}

TEST(token_gather, twice) {
  drop_harness h({9, 1, 80}, 5);
  rs_drop_rule rule = ratio_rule(0.5);
  rs_tensor *kept = rs_token_drop(h.g, h.score, h.starts, nullptr, &rule), *starts = rs_token_starts(h.g, kept);
  rs_tensor *x = rs_token_gather(h.g, h.x, kept),
            *again = rs_token_drop(h.g, rs_token_gather(h.g, h.score, kept), starts, nullptr, &rule);
  vec wanted;
  const ints once = h.kept_of(rule);
  drop_harness second({5, 1, 40}, 5);
  for (size_t i = 0; i < once.size(); i++) second.score_values[i] = h.score_values[static_cast<size_t>(once[i])];
  for (int32_t i : second.kept_of(rule))
    wanted.insert(wanted.end(), h.row(once[static_cast<size_t>(i)]), h.row(once[static_cast<size_t>(i)]) + 5);
  ASSERT_EQ(wanted.size(), 24u * 5);
  EXPECT_EQ(h.all("", rs_token_gather(h.g, x, again), 24, 5), wanted);
}

TEST(token_restore, puts_every_row_back) {
  for (const ints &lengths : length_lists)
    for (double ratio : {0.3, 0.999})
      for (int threads : {1, 2, 5}) {
        drop_harness h(lengths, 6);
        const rs_drop_rule rule = ratio_rule(ratio);
        rs_tensor *kept = rs_token_drop(h.g, h.score, h.starts, nullptr, &rule), *x = rs_token_gather(h.g, h.x, kept);
        vec wanted = h.values;
        for (int32_t i : h.kept_of(rule))
          for (size_t j = 0; j < 6; j++) wanted[static_cast<size_t>(i) * 6 + j] *= 2;
        EXPECT_EQ(h.all("", rs_token_restore(h.g, rs_add(h.g, x, x), h.x, kept), h.tokens(), 6, threads), wanted);
      }
}

// The row of what stays that is most like row i, by the cosine.
int32_t most_like(const drop_harness &h, int32_t i, const ints &kept, size_t begin, size_t end) {
  double best = -2;
  int32_t found = -1;
  for (size_t j = begin; j < end; j++) {
    const double like = 1 - distance_f64(h.row(i), h.row(kept[j]), h.c, RS_DISTANCE_COS);
    if (like > best) best = like, found = static_cast<int32_t>(j);
  }
  return found;
}

// For each row, the row of what stays that it becomes part of; `starts` receives the starts of what stays.
ints assignment(const drop_harness &h, const ints &kept, ints *starts) {
  ints into(static_cast<size_t>(h.tokens()));
  *starts = {0};
  for (size_t b = 0; b + 1 < h.cu.size(); b++) {
    const auto begin = static_cast<size_t>(starts->back());
    size_t end = begin;
    while (end < kept.size() && kept[end] < h.cu[b + 1]) end++;
    starts->push_back(static_cast<int32_t>(end));
    for (int32_t i = h.cu[b]; i < h.cu[b + 1]; i++) {
      const auto at =
          std::find(kept.begin() + static_cast<std::ptrdiff_t>(begin), kept.begin() + static_cast<std::ptrdiff_t>(end), i);
      into[static_cast<size_t>(i)] = at != kept.begin() + static_cast<std::ptrdiff_t>(end) ? static_cast<int32_t>(at - kept.begin())
                                                                                           : most_like(h, i, kept, begin, end);
    }
  }
  return into;
}

TEST(token_assign, finds_the_most_similar) {
  for (const std::string &isa : isas())
    for (const ints &lengths : length_lists)
      for (double ratio : {0.3, 0.9}) {
        drop_harness h(lengths, 24);
        const rs_drop_rule rule = ratio_rule(ratio);
        rs_tensor *kept = rs_token_drop(h.g, h.score, h.starts, nullptr, &rule);
        const vec bits = h.all(isa, rs_token_assign(h.g, h.x, h.starts, kept), h.tokens(), 1, 3);
        ints got(bits.size()), starts;
        if (!bits.empty()) memcpy(got.data(), bits.data(), bits.size() * 4);
        EXPECT_EQ(got, assignment(h, h.kept_of(rule), &starts)) << isa << " first length " << lengths[0];
      }
}

// Behind a quantized layer likeness is one of bytes: what is found may be a little less like than the best, and is the same on
// every row of kernels, with any number of threads.  Rows without a direction, of zeros, go to the first that stays; NaN is like
// nothing.
TEST(token_assign, by_bytes_finds_what_is_about_as_similar) {
  for (const auto &[lengths, ratio] :
       std::vector<std::pair<ints, double>>{{{1}, 0.5}, {{0, 5, 0}, 0.3}, {{7, 130, 1, 64}, 0.3}, {{300, 33}, 0.9}}) {
    const int64_t c = 70;
    const rs_drop_rule rule = ratio_rule(ratio);
    std::vector<ints> all;
    std::vector<std::pair<std::string, int>> by = {{"", 1}, {"", 5}};
    for (const std::string &isa : isas()) by.emplace_back(isa, 2);
    drop_harness same(lengths, c);  // for its values: those of the layer, whose weight is one
    for (int64_t i = 0; i < same.tokens(); i++)
      if (i % 9 == 4) std::fill_n(same.values.begin() + i * c, c, i % 2 ? 0.0f : NAN);
    for (const auto &[isa, threads] : by) {
      drop_harness h(lengths, c);
      vec one(static_cast<size_t>(c * c));
      for (int64_t i = 0; i < c; i++) one[static_cast<size_t>(i * (c + 1))] = 1;
      rs_tensor *x = rs_linear(h.g, h.input("again", RS_F32, {T, c}, same.values), h.weight("one", RS_W8, RS_PANELS, {c, c}, one),
                               nullptr, RS_ACT_NONE);
      rs_tensor *kept = rs_token_drop(h.g, h.score, h.starts, nullptr, &rule);
      session s(isa, threads, true);
      const vec bits = h.run(s.s, rs_token_assign(h.g, rs_add(h.g, x, x), h.starts, kept), h.tokens(), h.sequences(),
                             static_cast<size_t>(h.tokens()));
      rs_profile_row row = {};
      for (size_t i = 0; i < rs_session_profile_count(s.s) && (!row.op || row.op != std::string("token_assign")); i++)
        EXPECT_EQ(rs_session_profile_at(s.s, i, &row), RS_OK);
      EXPECT_EQ(row.op, std::string("token_assign"));
      EXPECT_EQ(row.type, RS_W8) << isa;
      all.emplace_back(bits.size());
      if (!bits.empty()) memcpy(all.back().data(), bits.data(), bits.size() * 4);
      EXPECT_EQ(all.back(), all.front()) << isa << " " << threads;
    }
    ints starts;
    const ints kept = same.kept_of(rule), best = assignment(same, kept, &starts);
    for (size_t b = 0; b + 1 < same.cu.size(); b++)
      for (int32_t i = same.cu[b]; i < same.cu[b + 1]; i++) {
        const int32_t got = all.front()[static_cast<size_t>(i)], wanted = best[static_cast<size_t>(i)];
        ASSERT_TRUE(got >= starts[b] && got < starts[b + 1]) << i;
        if (i % 9 == 4) {
          const bool stays = std::find(kept.begin(), kept.end(), i) != kept.end();
          EXPECT_EQ(got, stays ? wanted : starts[b]) << i;
          continue;
        }
        const auto like = [&](int32_t j) {
          return 1 - distance_f64(same.row(i), same.row(kept[static_cast<size_t>(j)]), c, RS_DISTANCE_COS);
        };
        EXPECT_FALSE(kept[static_cast<size_t>(got)] % 18 == 4 && wanted != got) << "NaN is like nothing";
        // A byte's error, and that of 7 bits, are up to 0.4 and 0.8 % of a row's largest value, and average out.
        EXPECT_TRUE(wanted < 0 || like(got) >= like(wanted) - 0.02) << i << ": " << like(got) << ", the best is " << like(wanted);
      }
  }
}

TEST(token_assign, of_equal_ones_takes_the_first) {
  for (const std::string &isa : isas())
    for (const ints &lengths : length_lists) {
      drop_harness h(lengths, 24);
      for (size_t i = 24; i < h.values.size(); i++) h.values[i] = h.values[i % 24];
      rs_tensor *alike = h.input("alike", RS_F32, {T, 24}, h.values);
      const rs_drop_rule rule = ratio_rule(0.3);
      rs_tensor *kept = rs_token_drop(h.g, h.score, h.starts, nullptr, &rule);
      const vec bits = h.all(isa, rs_token_assign(h.g, alike, h.starts, kept), h.tokens(), 1, 3);
      ints got(bits.size()), starts;
      if (!bits.empty()) memcpy(got.data(), bits.data(), bits.size() * 4);
      EXPECT_EQ(got, assignment(h, h.kept_of(rule), &starts)) << isa << " first length " << lengths[0];
    }
}

TEST(token_merge, means_by_count_and_sizes) {
  for (const ints &lengths : length_lists)
    for (bool sized : {false, true}) {
      drop_harness h(lengths, 24);
      const rs_drop_rule rule = ratio_rule(0.6);
      vec sizes(static_cast<size_t>(h.tokens()), 1);
      for (size_t i = 0; sized && i < sizes.size(); i++) sizes[i] = static_cast<float>(1 + i % 3);
      rs_tensor *size_input = sized ? h.input("sizes", RS_F32, {T, 1}, sizes) : nullptr;
      const ints kept = h.kept_of(rule);
      ints starts;
      const ints into = assignment(h, kept, &starts);
      vec wanted(kept.size() * 24), weights(kept.size());
      for (size_t i = 0; i < into.size(); i++) weights[static_cast<size_t>(into[i])] += sizes[i];
      for (size_t i = 0; i < into.size(); i++)
        for (size_t j = 0; j < 24; j++)
          wanted[static_cast<size_t>(into[i]) * 24 + j] += h.values[i * 24 + j] * sizes[i] / weights[static_cast<size_t>(into[i])];
      rs_tensor *k = rs_token_drop(h.g, h.score, h.starts, nullptr, &rule), *assign = rs_token_assign(h.g, h.x, h.starts, k);
      rs_tensor *count = rs_output(h.g, rs_token_sizes(h.g, assign, k, h.starts, size_input));
      vec counts(kept.size());
      h.bindings.push_back({count, counts.data(), counts.size() * 4});
      expect_close(
          h.all("", rs_token_merge(h.g, h.x, assign, k, h.starts, size_input, nullptr), static_cast<int64_t>(kept.size()), 24),
          wanted, 2e-5f);
      EXPECT_EQ(counts, weights);
    }
}

TEST(token_merge, folds_into_one_more_token_by_score) {
  for (bool lowest : {false, true}) {
    drop_harness h({10, 2, 1, 40}, 8);
    rs_drop_rule rule = ratio_rule(0.5);
    rule.lowest = lowest;
    rs_drop_rule plain = rule;
    rule.fold = true;
    // 10 -> 5 + 1; of 2, one would be folded into a copy of it: both stay; 1; 40 -> 20 + 1
    ints kept = h.kept_of(plain);
    kept.insert(kept.begin() + 5, -1);  // the extra one
    kept.erase(kept.begin() + 6);       // the second sequence, which kept its first only
    kept.insert(kept.begin() + 6, {10, 11});
    kept.push_back(-1);
    ASSERT_EQ(kept.size(), 6u + 2 + 1 + 21);
    vec wanted, sizes;
    size_t at = 0;
    for (size_t b = 0; b < 4; b++) {
      const int32_t begin = h.cu[b], end = h.cu[b + 1];
      double mean = 0, squares = 0, total = 0;
      for (int32_t i = begin; i < end; i++) mean += double(h.score_values[static_cast<size_t>(i)]) / (end - begin);
      for (int32_t i = begin; i < end; i++)
        squares += std::pow(double(h.score_values[static_cast<size_t>(i)]) - mean, 2) / (end - begin);
      std::vector<double> folded(8);
      float count = 0;
      std::vector<bool> stays(static_cast<size_t>(end));
      const size_t first = at;
      for (; at < kept.size() && kept[at] >= begin && kept[at] < end; at++) stays[static_cast<size_t>(kept[at])] = true;
      for (size_t j = first; j < at; j++) {
        wanted.insert(wanted.end(), h.row(kept[j]), h.row(kept[j]) + 8);
        sizes.push_back(1);
      }
      for (int32_t i = begin; i < end; i++) {
        if (stays[static_cast<size_t>(i)]) continue;
        const double z = (double(h.score_values[static_cast<size_t>(i)]) - mean) / std::sqrt(squares),
                     w = std::exp(lowest ? -z : z);
        for (size_t j = 0; j < 8; j++) folded[j] += w * double(h.row(i)[j]);
        total += w, count++;
      }
      if (at < kept.size() && kept[at] == -1) {
        at++;
        for (double v : folded) wanted.push_back(static_cast<float>(v / total));
        sizes.push_back(count);
      }
    }
    rs_tensor *k = rs_token_drop(h.g, h.score, h.starts, nullptr, &rule), *assign = rs_token_assign(h.g, h.x, h.starts, k);
    rs_tensor *count = rs_output(h.g, rs_token_sizes(h.g, assign, k, h.starts, nullptr));
    vec counts(kept.size());
    h.bindings.push_back({count, counts.data(), counts.size() * 4});
    expect_close(h.all("", rs_token_merge(h.g, h.x, assign, k, h.starts, nullptr, h.score), static_cast<int64_t>(kept.size()), 8),
                 wanted, 1e-5f);
    EXPECT_EQ(counts, sizes);
  }
}

// Of many tokens a score may be so far from the others that the weight of all that is folded would be 0, or infinite.
TEST(token_merge, folds_what_is_far_from_all_others) {
  for (const bool lowest : {false, true}) {
    drop_harness h({30000}, 8);
    vec far(30000);
    for (const size_t i : {100, 200}) far[i] = lowest ? 1000.0f : -1000.0f;
    rs_tensor *score = h.input("far", RS_F32, {T, 1}, far);
    rs_drop_rule rule = ratio_rule(0);
    rule.keep = 29998;
    rule.lowest = lowest;
    rule.fold = true;
    rs_tensor *k = rs_token_drop(h.g, score, h.starts, nullptr, &rule), *assign = rs_token_assign(h.g, h.x, h.starts, k);
    const vec got = h.all("", rs_token_merge(h.g, h.x, assign, k, h.starts, nullptr, score), 29999, 8);
    for (int j = 0; j < 8; j++)
      EXPECT_NEAR(got[29998 * 8 + static_cast<size_t>(j)], (h.row(100)[j] + h.row(200)[j]) / 2, 1e-5f) << j;
  }
}

// Keys that stand for several tokens weigh as much as several equal keys.
TEST(token_sizes, count_in_attention_and_in_means) {
  const int64_t c = 32;
  for (const std::string &isa : isas())
    for (int32_t n : {5, 150}) {  // one block of keys, and more
      const vec some = normal(static_cast<size_t>(n * c), 1);
      vec sizes, repeated;
      std::vector<int32_t> first;
      for (int32_t i = 0; i < n; i++) {
        sizes.push_back(static_cast<float>(1 + i % 3));
        first.push_back(static_cast<int32_t>(repeated.size() / static_cast<size_t>(c)));
        for (int32_t j = 0; j <= i % 3; j++) repeated.insert(repeated.end(), some.begin() + i * c, some.begin() + (i + 1) * c);
      }
      const auto attend = [&](const vec &x, const vec *size) {
        session s(isa);
        harness h;
        const auto t = static_cast<int32_t>(x.size() / static_cast<size_t>(c));
        rs_tensor *in = h.input("x", RS_F32, {T, c}, x), *cu = h.input("cu", RS_I32, {S}, ints{0, t});
        rs_tensor *sz = size ? h.input("sizes", RS_F32, {T, 1}, *size) : nullptr;
        rs_tensor *y = rs_output(h.g, rs_flash_attn(h.g, in, in, in, cu, sz, 2, 0.2f));
        vec rows(x.size());
        h.bindings.push_back({y, rows.data(), rows.size() * 4});
        const vec pooled = h.run(s.s, rs_pool(h.g, in, cu, sz, RS_POOL_MEAN, 0), t, 1, static_cast<size_t>(c));
        rows.insert(rows.end(), pooled.begin(), pooled.end());
        return rows;
      };
      const vec by_size = attend(some, &sizes), by_copies = attend(repeated, nullptr);
      vec wanted;
      for (int32_t i : first) wanted.insert(wanted.end(), by_copies.begin() + i * c, by_copies.begin() + (i + 1) * c);
      wanted.insert(wanted.end(), by_copies.end() - c, by_copies.end());
      expect_close(by_size, wanted, 4e-6f);
    }
}

// Those before "shift" are for test_graph.cpp.
TEST(drop, every_operator_has_a_test) {
  size_t n = 0;
  while (rs_op_name(n) != std::string("shift")) n++;
  for (; rs_op_name(n); n++) {
    bool found = false;
    const auto *unit = testing::UnitTest::GetInstance();
    for (int i = 0; i < unit->total_test_suite_count(); i++) found |= unit->GetTestSuite(i)->name() == std::string(rs_op_name(n));
    EXPECT_TRUE(found) << rs_op_name(n) << " has no test";
  }
}

// ---- schedules

struct schedule {
  rs_drop *drop = nullptr;
  explicit schedule(const std::string &text) { EXPECT_EQ(rs_drop_parse(text.c_str(), &drop), RS_OK) << rs_last_error(); }
  ~schedule() { rs_drop_free(drop); }
  schedule(const schedule &) = delete;
  schedule &operator=(const schedule &) = delete;
};

TEST(drop, text_and_struct_say_the_same) {
  for (const char *text : {"ratios=0,0.3,0,0.3 score=-mlp mode=merge protect=special min=16 seed=7",
                           "keeps=128,0,64 score=norm-0.5mlp:cos mode=prune protect=cls min=0 seed=0",
                           "ratios=0.1 score=mlp,norm,-block:l1 mode=fold protect=none min=3 seed=18446744073709551615"}) {
    const schedule s(text);
    char back[300];
    ASSERT_EQ(rs_drop_format(s.drop, back, sizeof back), RS_OK) << rs_last_error();
    EXPECT_STREQ(back, text);
    EXPECT_EQ(rs_drop_format(s.drop, back, 20), RS_ERR_LIMIT);
  }
  char text[200];
  rs_drop none = {};
  none.size = sizeof none;
  none.mode = static_cast<rs_drop_mode>(9);
  EXPECT_EQ(rs_drop_format(&none, text, sizeof text), RS_ERR_ARGUMENT);
  EXPECT_STREQ(rs_last_error(), "drop mode 9");
  none.mode = RS_DROP_PRUNE;
  none.n_ratios = 2;
  EXPECT_EQ(rs_drop_format(&none, text, sizeof text), RS_ERR_ARGUMENT);
  none.n_ratios = 0;
  ASSERT_EQ(rs_drop_format(&none, text, sizeof text), RS_OK);
  EXPECT_STREQ(text, "ratios=0 score=mlp mode=prune protect=cls min=0 seed=0");
  ASSERT_EQ(rs_drop_format(nullptr, text, sizeof text), RS_OK);
  EXPECT_STREQ(text, "ratios=0 score=mlp mode=prune protect=cls min=0 seed=0");
  // What no model takes would become something else.
  const double ratio = 0.5, most = 1;
  const int32_t keep = 5;
  const auto refused = [&](const rs_drop &drop, const char *error) {
    EXPECT_EQ(rs_drop_format(&drop, text, sizeof text), RS_ERR_ARGUMENT);
    EXPECT_NE(std::string(rs_last_error()).find(error), std::string::npos) << rs_last_error();
  };
  rs_drop wrong = none;
  wrong.ratios = &ratio, wrong.n_ratios = 1, wrong.keeps = &keep, wrong.n_keeps = 1;
  refused(wrong, "ratios or counts, not both");
  wrong.n_keeps = 0;
  wrong.score = "mlp mode=merge";
  refused(wrong, "score 'mlp mode=merge'");
  wrong.score = nullptr;
  wrong.least = -1;
  refused(wrong, "-1 tokens");
  wrong.least = 0;
  wrong.ratios = &most;
  refused(wrong, "ratio 1");
  // An older program's shorter struct, and one that forgot its size.
  none.size = offsetof(rs_drop, seed);
  none.seed = 5;
  ASSERT_EQ(rs_drop_format(&none, text, sizeof text), RS_OK);
  EXPECT_STREQ(text, "ratios=0 score=mlp mode=prune protect=cls min=0 seed=0");
  none.size = 0;
  EXPECT_EQ(rs_drop_format(&none, text, sizeof text), RS_ERR_ARGUMENT);
}

class drop_tiny : public testing::Test {
 protected:
  void SetUp() override {
    tiny.layers = 4;
    ASSERT_EQ(tiny.convert(dir / "tiny.rsw", "f32"), RS_OK) << rs_last_error();
  }
  std::string error_of(const std::string &text) {
    rs_drop *drop = nullptr;
    if (rs_drop_parse(text.c_str(), &drop) != RS_OK) return rs_last_error();
    const loaded m(dir / "tiny.rsw");
    const rs_status status = rs_drop_check(m.model, drop);
    rs_drop_free(drop);
    return status == RS_OK ? "" : rs_last_error();
  }
  temp_dir dir;
  tiny_bert tiny{3};
};

TEST_F(drop_tiny, what_makes_no_sense_is_an_error_that_names_it) {
  EXPECT_EQ(error_of("ratios=0,0.3"), "");
  EXPECT_EQ(error_of("ratios=0,0.3,0,0,0.1"), "the drop schedule is for 5 layers, the model has 4");
  EXPECT_EQ(error_of("ratios=0,1"), "layer 1 of the drop schedule: ratio 1, expected 0 to below 1");
  EXPECT_EQ(error_of("ratios=-0.1"), "layer 0 of the drop schedule: ratio -0.1, expected 0 to below 1");
  EXPECT_EQ(error_of("ratios=nan"), "layer 0 of the drop schedule: ratio nan, expected 0 to below 1");
  EXPECT_EQ(error_of("keeps=-5"), "layer 0 of the drop schedule: keep -5 tokens, expected 0 (all) or more");
  EXPECT_EQ(error_of("keeps=5 ratios=0.5"), "a drop schedule has ratios or counts, not both");
  EXPECT_EQ(error_of("ratios=0.5 ratios=0.5"), "drop schedule: 'ratios' is given twice");
  EXPECT_EQ(error_of("keeps=4 keeps=3"), "drop schedule: 'keeps' is given twice");
  EXPECT_EQ(error_of("ratios=0.5 mode=prune mode=merge"), "drop schedule: 'mode' is given twice");
  EXPECT_EQ(error_of("ratios=0.5 min=-1"), "the least that a drop schedule leaves is -1 tokens, expected 0 or more");
  EXPECT_EQ(error_of("ratios=0.5, "), "drop schedule: ratios: '' is not a number");
  EXPECT_EQ(error_of("ratios=0.5x"), "drop schedule: ratios: '0.5x' is not a number");
  EXPECT_EQ(error_of("keeps=99999999999"), "drop schedule: keeps: '99999999999' is not a number");
  EXPECT_EQ(error_of("mode=cut"), "drop schedule: mode: 'cut', expected prune, restore, merge or fold");
  EXPECT_EQ(error_of("protect=all"), "drop schedule: protect: 'all', expected cls, special, none or prefix");
  EXPECT_EQ(error_of("hello"), "drop schedule: 'hello', expected ratios=, keeps=, score=, mode=, protect=, min= or seed=");
  for (const char *score :
       {"", "-", "+", "mlp-", "mlpnorm", "0mlp", "mlp:l3", "norm:cos", "block:out", "random:l1", "mlp,", "1e3mlp", "--mlp"}) {
    const std::string error = error_of(std::string("ratios=0.5 score=") + score);
    if (*score) EXPECT_EQ(error.rfind("score '", 0), 0u) << score << " -> " << error;
    else EXPECT_EQ(error, "");  // the default
  }
  EXPECT_EQ(error_of("ratios=0,0,0.5 score=mlp,norm"), "layer 2 drops tokens, but 'mlp,norm' has scores for 2 layers only");
}

TEST_F(drop_tiny, counts_follow_the_schedule) {
  const loaded m(dir / "tiny.rsw");
  const auto counts = [&](const char *text, int32_t n, int32_t protect) {
    const schedule s(text);
    std::vector<int32_t> c(5);
    EXPECT_EQ(rs_drop_counts(m.model, s.drop, n, protect, c.data()), RS_OK) << rs_last_error();
    return c;
  };
  EXPECT_EQ(counts("ratios=0,0.3,0,0.3", 11, 1), (ints{11, 11, 8, 8, 6}));
  EXPECT_EQ(counts("ratios=0.5,0.5,0.5,0.5 min=6", 20, 1), (ints{20, 10, 6, 6, 6}));
  EXPECT_EQ(counts("ratios=0.5,0.5,0.5,0.5 min=6", 4, 1), (ints{4, 4, 4, 4, 4}));
  EXPECT_EQ(counts("keeps=12,0,5", 20, 1), (ints{20, 12, 12, 5, 5}));
  EXPECT_EQ(counts("ratios=0.999", 20, 7), (ints{20, 7, 7, 7, 7}));
  EXPECT_EQ(counts("ratios=0.5,0.5 mode=fold", 20, 1), (ints{20, 11, 7, 7, 7}));
  const schedule s("ratios=0.5");
  int32_t c[5];
  EXPECT_EQ(rs_drop_counts(m.model, s.drop, 3, 4, c), RS_ERR_ARGUMENT);
}

const char *const all_schedules[] = {
    "ratios=0,0.3,0,0.3 score=-mlp",
    "ratios=0.25,0.25,0.25,0.25 score=mlp:out",
    "ratios=0.5 score=attention:bare:l1 protect=special",
    "keeps=9,0,5 score=norm,mlp,-block:cos protect=none",
    "ratios=0.999,0.5 score=centre-0.5mlp min=4",
    "ratios=0,0.4,0.4 score=attn-colsum mode=restore",
    "ratios=0.4,0,0.3 score=attn-cls mode=merge",
    "ratios=0.4,0.3,0.3 score=random mode=fold seed=5",
    "ratios=0.4,0.3,0,0.5 score=first mode=restore protect=special",
    "ratios=0.6,0,0,0.5 score=norm mode=merge protect=prefix",
};

std::vector<std::string> some_texts() {
  std::vector<std::string> texts = {"the cat sat on the mat.", "", "hello", "a dog, a cat and a mat",
                                    "the dogs sat sitting on a cat, the world."};
  std::string text;
  for (int i = 0; i < 30; i++) texts.push_back(text += i % 3 ? " cat" : i % 2 ? " the dog." : " a mats,");
  return texts;
}

TEST_F(drop_tiny, batch_equals_single_for_every_schedule_type_mode_and_isa) {
  const std::vector<std::string> texts = some_texts();
  for (const char *type : {"f32", "q8"}) {
    ASSERT_EQ(tiny.convert(dir / "tiny.rsw", type), RS_OK) << rs_last_error();
    for (const std::string &isa : isas()) {
      setenv("RS_ISA", isa.c_str(), 1);
      const loaded one(dir / "tiny.rsw", 1), three(dir / "tiny.rsw", 3, 300), own(dir / "tiny.rsw", 2, 0, RS_THREADS_THROUGHPUT);
      unsetenv("RS_ISA");
      for (const char *text : all_schedules) {
        SCOPED_TRACE(isa + " " + type + " " + text);
        const schedule s(text);
        auto params = sized<rs_encode_params>();
        params.drop = s.drop;
        std::vector<rs_text_info> infos;
        const vec all = encode(three.session, texts, params, 32, &infos);
        EXPECT_EQ(encode(own.session, texts, params, 32), all);
        const std::vector<std::string> backwards(texts.rbegin(), texts.rend());
        const vec reverse = encode(own.session, backwards, params, 32);
        for (size_t i = 0; i < texts.size(); i++) {
          ASSERT_EQ(encode(one.session, {texts[i]}, params, 32), row(all, i, 32)) << "text " << i;
          ASSERT_EQ(row(reverse, texts.size() - 1 - i, 32), row(all, i, 32)) << "text " << i;
          if (s.drop->mode == RS_DROP_RESTORE) {
            ASSERT_EQ(infos[i].kept, infos[i].tokens);
          }
        }
      }
    }
  }
}

// Where all tokens of a run stay, as with a least number that short texts come to, nobody asks for the scores.
TEST_F(drop_tiny, a_layer_that_drops_nothing_makes_no_scores) {
  const loaded m(dir / "tiny.rsw");
  const std::vector<std::string> texts = {some_texts()[0]};
  std::vector<rs_text_info> infos;
  encode(m.session, texts, sized<rs_encode_params>(), 32, &infos);
  const int32_t left = infos[0].tokens - infos[0].tokens / 2;
  ASSERT_GT(left, 3);
  for (const char *mode : {"prune", "restore", "merge", "fold"}) {
    const std::string rest = " score=attn-cls-mlp mode=" + std::string(mode), fold = mode == std::string("fold") ? "+" : "";
    const schedule once("ratios=0.5" + rest),
        often("ratios=0.5,0.5,0,0.5" + rest + " min=" + std::to_string(left + (fold.empty() ? 0 : 1)));
    std::vector<vec> vectors;
    for (const schedule *drop : {&once, &often}) {
      auto params = sized<rs_encode_params>();
      params.drop = drop->drop;
      auto p = sized<rs_session_params>();
      p.profile = true;
      rs_session *s = nullptr;
      ASSERT_EQ(rs_session_create(m.model, &p, &s), RS_OK);
      vectors.push_back(encode(s, texts, params, 32));
      std::map<std::string, uint64_t> calls;
      for (size_t i = 0; i < rs_session_profile_count(s); i++) {
        rs_profile_row row;
        ASSERT_EQ(rs_session_profile_at(s, i, &row), RS_OK);
        calls[row.op] += row.calls;
      }
      EXPECT_EQ(calls["attn_colsum"], 1u) << mode;
      EXPECT_EQ(calls["shift"], 1u) << mode;
      rs_session_free(s);
    }
    if (fold.empty()) {
      EXPECT_EQ(vectors[1], vectors[0]) << mode;
    }
  }
}

TEST_F(drop_tiny, nothing_dropped_is_nothing_changed) {
  const loaded m(dir / "tiny.rsw");
  const std::vector<std::string> texts = some_texts();
  const vec plain = encode(m.session, texts, sized<rs_encode_params>(), 32);
  for (const char *text : {"ratios=0", "ratios=0,0,0,0 score=-mlp mode=merge", "keeps=0,0", "", "ratios=0.5,0.5 min=1000",
                           "keeps=1000,1000", "ratios=0.5 min=1000 mode=restore", "ratios=0.01 min=1000 score=norm+mlp"}) {
    const schedule s(text);
    auto params = sized<rs_encode_params>();
    params.drop = s.drop;
    EXPECT_EQ(encode(m.session, texts, params, 32), plain) << text;
  }
}

TEST_F(drop_tiny, nearly_everything_dropped_leaves_what_is_protected) {
  const loaded m(dir / "tiny.rsw");
  const std::vector<std::string> texts = some_texts();
  for (const auto &[protect, kept] : {std::pair("cls", 1), std::pair("none", 1), std::pair("special", 2)}) {
    const schedule s("ratios=0.9999999,0.9999999,0.9999999,0.9999999 score=-mlp protect=" + std::string(protect));
    auto params = sized<rs_encode_params>();
    params.drop = s.drop;
    std::vector<rs_text_info> infos;
    const vec v = encode(m.session, texts, params, 32, &infos);
    for (float x : v) ASSERT_TRUE(std::isfinite(x));
    for (const rs_text_info &info : infos) EXPECT_EQ(info.kept, kept);
  }
}

// A plain version of prune and restore, from the states of the graph without dropping: one drop behind the last layer.
TEST_F(drop_tiny, a_drop_behind_the_last_layer_is_a_mean_of_some_states) {
  const loaded m(dir / "tiny.rsw");
  const std::string text = "the dogs sat sitting on a cat, the world.";
  auto params = sized<rs_encode_params>();
  params.pooling = RS_POOL_NONE;
  params.normalize = RS_OFF;
  const rs_text view = {text.data(), text.size()};
  rs_text_info info;
  vec states(40 * 32), pooled(32), left(40 * 32);
  ASSERT_EQ(rs_encode(m.session, &view, 1, &params, states.data(), states.size(), &info), RS_OK) << rs_last_error();
  const schedule s("ratios=0,0,0,0.5 score=norm protect=cls");
  params.drop = s.drop;
  rs_trace *trace = nullptr;
  ASSERT_EQ(rs_trace_text(m.session, &view, nullptr, &params, &trace), RS_OK) << rs_last_error();
  const int32_t *positions = nullptr, *ids = nullptr;
  const size_t kept = rs_trace_kept(trace, &positions);
  EXPECT_EQ(rs_trace_tokens(trace, &ids, nullptr, nullptr), static_cast<size_t>(info.tokens));
  ASSERT_EQ(kept, static_cast<size_t>(info.tokens - info.tokens / 2));
  rs_trace_step step;
  ASSERT_EQ(rs_trace_steps(trace), 1u);
  ASSERT_EQ(rs_trace_step_at(trace, 0, &step), RS_OK);
  EXPECT_EQ(rs_trace_step_at(trace, 1, &step), RS_ERR_ARGUMENT);
  EXPECT_EQ(step.layer, 3);
  EXPECT_EQ(step.kept_count, static_cast<int32_t>(kept));
  EXPECT_EQ(step.into, nullptr);
  float lowest_kept = INFINITY, highest_dropped = -INFINITY;
  for (int32_t i = 0; i < step.n; i++) {
    const double norm = distance_f64(&states[static_cast<size_t>(i) * 32], nullptr, 32, RS_DISTANCE_L2);
    EXPECT_TRUE(std::fabs(double(step.scores[i]) - norm) < 1e-4);
    if (i == 0) continue;
    if (step.kept[i]) lowest_kept = std::min(lowest_kept, step.scores[i]);
    else highest_dropped = std::max(highest_dropped, step.scores[i]);
  }
  EXPECT_TRUE(lowest_kept >= highest_dropped);
  ASSERT_EQ(rs_encode(m.session, &view, 1, &params, left.data(), left.size(), &info), RS_OK) << rs_last_error();
  EXPECT_EQ(info.kept, static_cast<int32_t>(kept));
  for (size_t i = 0; i < kept; i++) EXPECT_EQ(row(left, i, 32), row(states, static_cast<size_t>(positions[i]), 32));
  params.pooling = RS_POOL_MEAN;
  ASSERT_EQ(rs_encode(m.session, &view, 1, &params, pooled.data(), pooled.size(), nullptr), RS_OK) << rs_last_error();
  for (size_t j = 0; j < 32; j++) {
    double mean = 0;
    for (size_t i = 0; i < kept; i++)
      mean += double(states[static_cast<size_t>(positions[i]) * 32 + j]) / static_cast<double>(kept);
    EXPECT_TRUE(std::fabs(mean - double(pooled[j])) < 1e-5);
  }
  rs_trace_free(trace);
}

// ---- whole models against f64

using numbers = std::vector<double>;
using score_f64 = std::function<numbers(const layer_f64 &)>;

double length(const numbers &v) {
  double sum = 0;
  for (double x : v) sum += x * x;
  return std::sqrt(sum);
}
numbers minus(numbers a, const numbers &b) {
  for (size_t i = 0; i < a.size(); i++) a[i] -= b[i];
  return a;
}
double cosine_f64(const numbers &a, const numbers &b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); i++) sum += a[i] * b[i];
  return sum / length(a) / length(b);
}
// f(token) for every token of a layer.
score_f64 each(const std::function<double(const layer_f64 &, size_t)> &f) {
  return [f](const layer_f64 &did) {
    numbers values;
    for (size_t i = 0; i < did.y.size(); i++) values.push_back(f(did, i));
    return values;
  };
}
score_f64 shares(bool class_only) {
  return [class_only](const layer_f64 &did) {
    numbers values(did.y.size());
    const size_t queries = class_only ? 1 : values.size();
    for (const matrix64 &p : did.p)
      for (size_t i = 0; i < queries; i++)
        for (size_t j = 0; j < values.size(); j++) values[j] += p[i][j] / static_cast<double>(queries);
    return values;
  };
}
numbers standardized(numbers v) {
  double mean = 0, squares = 0;
  for (double x : v) mean += x / static_cast<double>(v.size());
  for (double x : v) squares += (x - mean) * (x - mean) / static_cast<double>(v.size());
  for (double &x : v) x = (x - mean) / std::sqrt(squares);
  return v;
}
score_f64 sum_of(const std::vector<std::pair<double, score_f64>> &terms) {
  return [terms](const layer_f64 &did) {
    numbers sum(did.y.size());
    for (const auto &[weight, score] : terms) {
      const numbers v = standardized(score(did));
      for (size_t i = 0; i < v.size(); i++) sum[i] += weight * v[i];
    }
    return sum;
  };
}

// Drop behind a layer as rs.h tells it, the first token protected.  `places`: of the states that are left in the sequence, -1 for a
// folded one; `whole`: of restore, every token's last state.
struct drop_f64 {
  std::map<int64_t, double> ratios;
  score_f64 score;
  rs_drop_mode mode;
  std::vector<int> places;
  matrix64 whole;

  void behind(int64_t layer, const layer_f64 &did, matrix64 *x, numbers *sizes) {
    if (places.empty())
      for (size_t i = 0; i < x->size(); i++) places.push_back(static_cast<int>(i));
    if (whole.empty()) whole = *x;
    for (size_t i = 0; i < x->size(); i++)
      if (places[i] >= 0) whole[static_cast<size_t>(places[i])] = (*x)[i];
    const size_t n = x->size(), keep = n - static_cast<size_t>(static_cast<double>(n) * (ratios.count(layer) ? ratios[layer] : 0));
    if (keep == n || (mode == RS_DROP_FOLD && n - keep < 2)) return;
    const numbers value = score(did);
    std::vector<size_t> order(n);
    std::iota(order.begin(), order.end(), 0u);
    std::stable_sort(order.begin() + 1, order.end(), [&](size_t a, size_t b) { return value[a] > value[b]; });
    std::vector<bool> stays(n);
    for (size_t i = 0; i < keep; i++) stays[order[i]] = true;
    matrix64 next;
    numbers next_sizes;
    std::vector<int> next_places;
    std::vector<size_t> from;
    for (size_t i = 0; i < n; i++)
      if (stays[i]) from.push_back(i);
    const numbers z = standardized(value);
    const auto join = [&](const std::vector<size_t> &rows, const numbers &weights, int place) {
      numbers sum((*x)[0].size());
      double total = 0, count = 0;
      for (size_t r = 0; r < rows.size(); r++) {
        for (size_t j = 0; j < sum.size(); j++) sum[j] += weights[r] * (*x)[rows[r]][j];
        total += weights[r], count += (*sizes)[rows[r]];
      }
      for (double &v : sum) v /= total;
      next.push_back(sum), next_sizes.push_back(count), next_places.push_back(place);
    };
    std::vector<std::vector<size_t>> groups(keep);
    std::vector<size_t> folded;
    for (size_t k = 0; k < keep; k++) groups[k].push_back(from[k]);
    for (size_t i = 0; i < n; i++) {
      if (stays[i]) continue;
      folded.push_back(i);
      const auto like = [&](size_t k) { return cosine_f64((*x)[i], (*x)[from[k]]); };
      size_t best = 0;
      for (size_t k = 1; k < keep; k++) best = like(k) > like(best) ? k : best;
      if (mode == RS_DROP_MERGE) groups[best].push_back(i);
    }
    for (size_t k = 0; k < keep; k++) {
      numbers weights;
      for (size_t i : groups[k]) weights.push_back((*sizes)[i]);
      join(groups[k], weights, places[from[k]]);
    }
    if (mode == RS_DROP_FOLD) {
      numbers weights;
      for (size_t i : folded) weights.push_back((*sizes)[i] * std::exp(z[i]));
      join(folded, weights, -1);
    }
    *x = next, *sizes = next_sizes, places = next_places;
  }
};

TEST_F(drop_tiny, every_score_and_mode_matches_f64) {
  const auto of = [](matrix64 layer_f64::*part) {
    return each([=](const layer_f64 &d, size_t i) { return length((d.*part)[i]); });
  };
  const auto between = [](matrix64 layer_f64::*to, matrix64 layer_f64::*from) {
    return each([=](const layer_f64 &d, size_t i) { return length(minus((d.*to)[i], (d.*from)[i])); });
  };
  const auto turn = [](matrix64 layer_f64::*a, matrix64 layer_f64::*b) {
    return each([=](const layer_f64 &d, size_t i) { return 1 - cosine_f64((d.*a)[i], (d.*b)[i]); });
  };
  const auto magnitudes = [](matrix64 layer_f64::*part) {
    return each([=](const layer_f64 &d, size_t i) {
      double sum = 0;
      for (double v : (d.*part)[i]) sum += std::fabs(v);
      return sum;
    });
  };
  const auto opposite = [](const score_f64 &score) {
    return score_f64([score](const layer_f64 &d) {
      numbers v = score(d);
      for (double &x : v) x = -x;
      return v;
    });
  };
  const score_f64 centre = [](const layer_f64 &d) {
    numbers mean(d.y[0].size()), values;
    for (const numbers &row : d.y)
      for (size_t j = 0; j < mean.size(); j++) mean[j] += row[j] / static_cast<double>(d.y.size());
    for (const numbers &row : d.y) values.push_back(length(minus(row, mean)));
    return values;
  };
  using L = layer_f64;
  const std::vector<std::pair<const char *, score_f64>> scores = {
      {"mlp", of(&L::mlp)},
      {"-mlp", opposite(of(&L::mlp))},
      {"mlp:l1", magnitudes(&L::mlp)},
      {"mlp:out", between(&L::y, &L::h)},
      {"mlp:bare", between(&L::mlp, &L::h)},
      {"mlp:cos", turn(&L::h, &L::y)},
      {"mlp:bare:cos", turn(&L::mlp, &L::h)},
      {"attention", of(&L::attn)},
      {"-attention:out", opposite(between(&L::h, &L::x))},
      {"attention:bare", between(&L::attn, &L::x)},
      {"attention:cos", turn(&L::h, &L::x)},
      {"block", between(&L::y, &L::x)},
      {"-block:cos", opposite(turn(&L::y, &L::x))},
      {"norm", of(&L::y)},
      {"norm:l1", magnitudes(&L::y)},
      {"centre", centre},
      {"attn-colsum", shares(false)},
      {"attn-cls", shares(true)},
      {"first", each([](const L &, size_t i) { return -static_cast<double>(i); })},
      {"centre-0.5mlp:out", sum_of({{1, centre}, {-0.5, between(&L::y, &L::h)}})},
      {"-mlp+2attention-block", sum_of({{-1, of(&L::mlp)}, {2, of(&L::attn)}, {-1, between(&L::y, &L::x)}})},
  };
  const loaded m(dir / "tiny.rsw");
  const std::string text = "the dogs sat sitting on a cat, the world. hello a mat, dog and hello world cats.";
  const rs_text view = {text.data(), text.size()};
  int32_t ids[64];
  size_t n = 0;
  ASSERT_EQ(rs_tokenize(m.model, &view, nullptr, ids, nullptr, nullptr, 64, &n), RS_OK) << rs_last_error();
  ASSERT_GE(n, 20u);
  for (const auto &[name, score] : scores)
    for (const auto &[mode, mode_name] : {std::pair(RS_DROP_PRUNE, "prune"), std::pair(RS_DROP_RESTORE, "restore"),
                                          std::pair(RS_DROP_MERGE, "merge"), std::pair(RS_DROP_FOLD, "fold")}) {
      SCOPED_TRACE(std::string(name) + " " + mode_name);
      drop_f64 reference = {{{0, 0.3}, {2, 0.4}}, score, mode, {}, {}};
      numbers sizes(n, 1);
      const matrix64 left =
          bert_f64(tiny, ints(ids, ids + n), ints(n), [&](int64_t layer, const L &did, matrix64 *x, numbers *size) {
            reference.behind(layer, did, x, size);
            sizes = *size;
          });
      const matrix64 &states = mode == RS_DROP_RESTORE ? reference.whole : left;
      if (mode == RS_DROP_RESTORE || mode == RS_DROP_PRUNE) sizes.assign(states.size(), 1);
      vec wanted(32);
      double total = 0;
      for (double size : sizes) total += size;
      for (size_t j = 0; j < 32; j++) {
        double sum = 0;
        for (size_t i = 0; i < states.size(); i++) sum += sizes[i] * states[i][j];
        wanted[j] = static_cast<float>(sum / total);
      }
      const schedule s("ratios=0.3,0,0.4 score=" + std::string(name) + " mode=" + mode_name);
      auto params = sized<rs_encode_params>();
      params.drop = s.drop;
      params.normalize = RS_OFF;
      rs_trace *trace = nullptr;
      ASSERT_EQ(rs_trace_text(m.session, &view, nullptr, &params, &trace), RS_OK) << rs_last_error();
      const int32_t *positions = nullptr;
      const size_t kept = rs_trace_kept(trace, &positions);
      EXPECT_EQ(ints(positions, positions + kept), ints(reference.places.begin(), reference.places.end()));
      rs_trace_free(trace);
      // f32 through four layers of width 32: a few dozen roundings of numbers near 1.
      expect_close(encode(m.session, {text}, params, 32), wanted, 2e-5f);
    }
}

TEST_F(drop_tiny, the_first_text_of_a_pair_is_protected) {
  const loaded m(dir / "tiny.rsw");
  const rs_text question = {"the cat sat", RS_NUL_TERMINATED},
                passage = {"a dog. a mat, the world. hello hello hello", RS_NUL_TERMINATED};
  const schedule s("ratios=0.9,0.9,0.9,0.9 score=random protect=prefix");
  auto params = sized<rs_encode_params>();
  params.drop = s.drop;
  for (const bool pair : {true, false}) {
    rs_trace *trace = nullptr;
    ASSERT_EQ(rs_trace_text(m.session, &question, pair ? &passage : nullptr, &params, &trace), RS_OK) << rs_last_error();
    const int32_t *positions = nullptr;
    const size_t kept = rs_trace_kept(trace, &positions);
    const ints got(positions, positions + kept);
    EXPECT_EQ(got, pair ? (ints{0, 1, 2, 3, 4}) : ints{0});
    EXPECT_EQ(rs_trace_pair(trace), 5u);  // without one: the number of tokens
    rs_trace_free(trace);
  }
}

// As encoding it would be.
TEST_F(drop_tiny, a_pair_without_room_has_no_trace) {
  const loaded m(dir / "tiny.rsw");
  const rs_text text = {"the cat sat", RS_NUL_TERMINATED};
  auto params = sized<rs_encode_params>();
  params.max_tokens = 3;
  rs_trace *trace = nullptr;
  ASSERT_EQ(rs_trace_text(m.session, &text, nullptr, &params, &trace), RS_OK) << rs_last_error();
  rs_trace_free(trace);
  EXPECT_EQ(rs_trace_text(m.session, &text, &text, &params, &trace), RS_ERR_ARGUMENT);
  EXPECT_STREQ(rs_last_error(), "max_tokens is 3: no room for a pair beside the special tokens");
  EXPECT_EQ(trace, nullptr);
}

TEST_F(drop_tiny, profiles_are_read_from_the_file) {
  const auto with_profiles = [&](const std::vector<rs_text> &names, const std::vector<rs_text> &texts,
                                 const std::vector<rs_text> &notes) {
    const loaded m(dir / "tiny.rsw");
    rs_writer *w = nullptr;
    EXPECT_EQ(rs_writer_open((dir / "with.rsw").c_str(), &w), RS_OK);
    EXPECT_EQ(rs_writer_set_strs(w, "drop.names", names.data(), names.size()), RS_OK);
    EXPECT_EQ(rs_writer_set_strs(w, "drop.texts", texts.data(), texts.size()), RS_OK);
    EXPECT_EQ(rs_writer_set_strs(w, "drop.notes", notes.data(), notes.size()), RS_OK);
    EXPECT_EQ(rs_writer_copy(w, m.model), RS_OK) << rs_last_error();
    EXPECT_EQ(rs_writer_finish(w), RS_OK) << rs_last_error();
    rs_writer_free(w);
    rs_model *model = nullptr;
    return rs_model_load((dir / "with.rsw").c_str(), nullptr, &model) == RS_OK ? model : nullptr;
  };
  const auto text = [](const char *s) { return rs_text{s, RS_NUL_TERMINATED}; };
  rs_model *model = with_profiles({text("fast"), text("exact")}, {text("ratios=0.5 score=-mlp"), text("keeps=8 mode=merge")},
                                  {text("STS-B -1.0"), text("")});
  ASSERT_NE(model, nullptr) << rs_last_error();
  const rs_drop *drop = nullptr;
  const char *note = nullptr;
  ASSERT_EQ(rs_model_drop(model, "exact", &drop, &note), RS_OK) << rs_last_error();
  EXPECT_EQ(drop->keeps[0], 8);
  EXPECT_EQ(drop->mode, RS_DROP_MERGE);
  EXPECT_STREQ(note, "");
  ASSERT_EQ(rs_model_drop(model, "fast", &drop, &note), RS_OK);
  EXPECT_STREQ(note, "STS-B -1.0");
  EXPECT_EQ(rs_model_drop(model, "slow", &drop, &note), RS_ERR_NOT_FOUND);
  EXPECT_STREQ(rs_last_error(), "there is no drop schedule 'slow' (stored: fast, exact)");
  rs_model_free(model);

  EXPECT_EQ(with_profiles({text("a")}, {text("ratios=2")}, {text("")}), nullptr);
  EXPECT_NE(std::string(rs_last_error()).find("drop schedule 'a': layer 0 of the drop schedule: ratio 2"), std::string::npos)
      << rs_last_error();
  std::string terms = "ratios=0.5 score=mlp";
  for (int i = 0; i < 100000; i++) terms += "+mlp";  // which each layer would keep a copy of
  EXPECT_EQ(with_profiles({text("a")}, {text(terms.c_str())}, {text("")}), nullptr);
  EXPECT_NE(std::string(rs_last_error()).find("more than 16 terms"), std::string::npos) << rs_last_error();
  EXPECT_EQ(with_profiles({text("a"), text("b")}, {text("ratios=0")}, {text("")}), nullptr);
  EXPECT_NE(std::string(rs_last_error()).find("2 drop.names, 1 drop.texts"), std::string::npos) << rs_last_error();
}

TEST_F(drop_tiny, the_sign_that_does_harm_gets_a_warning) {
  const loaded m(dir / "tiny.rsw");
  for (const char *text : {"ratios=0.5", "ratios=0,0.5 score=norm,mlp", "ratios=0.5 score=norm+block"})
    EXPECT_NE(rs_drop_warning(m.model, schedule(text).drop), nullptr) << text;
  for (const char *text : {"ratios=0", "ratios=0,0.5 score=mlp,norm", "ratios=0.5 score=-mlp"})
    EXPECT_EQ(rs_drop_warning(m.model, schedule(text).drop), nullptr) << text;
}

TEST_F(drop_tiny, a_schedule_that_is_not_there_is_an_error) {
  const loaded m(dir / "tiny.rsw");
  const schedule s("ratios=0.5,0.3");
  auto params = sized<rs_encode_params>();
  params.drop = s.drop;
  encode(m.session, {"hello"}, params, 32);  // a graph of as many ratios is known from here on
  rs_drop broken = *s.drop;
  broken.ratios = nullptr;
  params.drop = &broken;
  const rs_text text = {"hello", 5};
  float v[32];
  EXPECT_EQ(rs_encode(m.session, &text, 1, &params, v, 32, nullptr), RS_ERR_ARGUMENT);
  EXPECT_STREQ(rs_last_error(), "a drop schedule of 2 ratios and 0 counts that are not there");
  broken = *s.drop;
  broken.size = 0;
  EXPECT_EQ(rs_encode(m.session, &text, 1, &params, v, 32, nullptr), RS_ERR_ARGUMENT);
  EXPECT_STREQ(rs_last_error(), "rs_drop.size is 0: set it to sizeof(rs_drop)");
}

// More schedules than a session keeps graphs for, back and forth.
TEST_F(drop_tiny, many_schedules_take_turns) {
  const loaded m(dir / "tiny.rsw"), throughput(dir / "tiny.rsw", 2, 0, RS_THREADS_THROUGHPUT);
  const std::vector<std::string> texts = some_texts();
  std::vector<vec> first;
  for (int round = 0; round < 3; round++)
    for (int i = 0; i < 40; i++) {
      const int k = round == 1 ? 39 - i : i;
      const schedule s("ratios=0.5,0.3 score=random seed=" + std::to_string(k));
      auto params = sized<rs_encode_params>();
      params.drop = s.drop;
      const vec v = encode((k % 2 ? m : throughput).session, texts, params, 32);
      if (round == 0) first.push_back(v);
      else ASSERT_EQ(v, first[static_cast<size_t>(k)]) << k;
    }
  EXPECT_NE(first[0], first[1]);
}

TEST_F(drop_tiny, a_plan_tells_what_dropping_saves) {
  const loaded m(dir / "tiny.rsw");
  const ints lengths = {40, 40, 10};
  const auto plan = [&](const char *text) {
    const schedule s(text);
    auto params = sized<rs_encode_params>();
    params.drop = s.drop;
    std::vector<rs_plan_layer> layers(5);
    size_t arena = 0;
    EXPECT_EQ(rs_plan(m.session, lengths.data(), 3, &params, layers.data(), &arena), RS_OK) << rs_last_error();
    EXPECT_GT(arena, 0u);
    return layers;
  };
  // Of a layer: the linear layers (12 C^2 with an MLP of 2 C are 8 C^2) and attention.
  const auto macs = [](const ints &n) {
    double sum = 0;
    for (int32_t t : n) sum += 8.0 * 32 * 32 * t + 2.0 * 32 * t * t;
    return sum;
  };
  const auto whole = plan(""), dropped = plan("ratios=0,0.5,0,0 score=norm min=8");
  for (size_t i = 0; i < 4; i++) {
    EXPECT_EQ(whole[i].tokens, 90);
    EXPECT_EQ(whole[i].macs, macs(lengths));
    EXPECT_EQ(dropped[i].tokens, i < 2 ? 90 : 48);
    EXPECT_EQ(dropped[i].macs, macs(i < 2 ? lengths : ints{20, 20, 8}));
  }
  EXPECT_EQ(dropped[1].bytes, whole[1].bytes);
  EXPECT_LT(dropped[3].bytes, whole[3].bytes * 6 / 10);
  const int32_t none = 0, many = 41;
  size_t arena;
  rs_plan_layer layers[5];
  EXPECT_EQ(rs_plan(m.session, &none, 1, nullptr, layers, &arena), RS_ERR_LIMIT);
  EXPECT_EQ(rs_plan(m.session, &many, 1, nullptr, layers, &arena), RS_ERR_LIMIT);
}

TEST_F(drop_tiny, a_plan_counts_tokens_as_the_schedule_does) {
  const loaded m(dir / "tiny.rsw");
  std::vector<std::string> all(std::begin(all_schedules), std::end(all_schedules));
  for (const char *mode : {"prune", "restore", "merge", "fold"})
    all.push_back(std::string("ratios=0.2,0.3,0.3,0.3 score=norm-mlp-attention+first mode=") + mode);
  for (const std::string &text : all) {
    if (text.find("prefix") != std::string::npos) continue;  // a plan has no pairs
    const schedule s(text);
    auto params = sized<rs_encode_params>();
    params.drop = s.drop;
    const int32_t length = 37, protect = s.drop->protect == RS_PROTECT_NONE ? 0 : s.drop->protect == RS_PROTECT_SPECIAL ? 2 : 1;
    std::vector<rs_plan_layer> layers(5);
    std::vector<int32_t> counts(5);
    size_t arena = 0;
    ASSERT_EQ(rs_plan(m.session, &length, 1, &params, layers.data(), &arena), RS_OK) << rs_last_error();
    ASSERT_EQ(rs_drop_counts(m.model, s.drop, length, protect, counts.data()), RS_OK) << rs_last_error();
    for (size_t i = 0; i < 4; i++) {
      EXPECT_EQ(layers[i].tokens, counts[i]) << text << ", layer " << i;
      EXPECT_LE(layers[i].bytes, arena) << text << ", layer " << i;
    }
    EXPECT_EQ(layers[4].tokens, counts[4]) << text << ", what comes behind them";
  }
}

// Tokens that leave behind the first layer take their part of the largest moment with them, whatever the score is made of.
TEST(minilm_drop, the_arena_shrinks) {
  for (const char *type : {"f32", "q8"}) {
    RS_NEED_MODEL(type);
    const loaded m(model_path(type));
    const std::vector<int32_t> lengths(8, 512);
    const auto arena_of = [&](const rs_drop *drop) {
      auto params = sized<rs_encode_params>();
      params.drop = drop;
      rs_plan_layer layers[7];
      size_t arena = 0;
      EXPECT_EQ(rs_plan(m.session, lengths.data(), lengths.size(), &params, layers, &arena), RS_OK) << rs_last_error();
      return arena;
    };
    const size_t all = arena_of(nullptr);
    for (const char *score : {"-mlp", "norm-mlp+first", "centre-mlp", "first+norm-mlp"}) {
      const schedule s(std::string("ratios=0.5 score=") + score);
      EXPECT_LE(static_cast<double>(arena_of(s.drop)), 0.87 * static_cast<double>(all)) << type << " " << score;
    }
    if (std::string(type) == "f32") {  // what attention tells is made before q and k would have to be kept beside the MLP's
      EXPECT_LT(arena_of(schedule("ratios=0.5 score=attn-cls").drop), all);
    }
  }
}

// A plan's layers count what lives as places do, whether chains run by blocks or operator by operator.
TEST(minilm_drop, no_layer_has_more_than_the_arena) {
  for (const char *type : {"f32", "q8"}) {
    RS_NEED_MODEL(type);
    const loaded m(model_path(type));
    for (const int32_t length : {2, 32, 100}) {
      rs_plan_layer layers[7];
      size_t arena = 0;
      ASSERT_EQ(rs_plan(m.session, &length, 1, nullptr, layers, &arena), RS_OK) << rs_last_error();
      for (const rs_plan_layer &l : layers) EXPECT_LE(l.bytes, arena) << type << " " << length;
    }
  }
}

// ---- the reference implementation

// Scores that lie within 1e-4 of each other may be ordered by either sum: the README of the golden files says so.
TEST(minilm_drop, keeps_what_the_reference_keeps) {
  RS_NEED_SHARED("golden/drop_minilm.jsonl");
  RS_NEED_MODEL("f32");
  const loaded m(model_path("f32"));
  std::ifstream in(shared_file("golden/drop_minilm.jsonl"));
  size_t cases = 0, other = 0;
  for (std::string line; std::getline(in, line);) {
    const json g = json::parse(line);
#if defined(__SANITIZE_ADDRESS__)
    if (cases == 24) break;
#endif
    cases++;
    std::string score = g["score"], text = "ratios=";
    for (const json &r : g["schedule"]) text += (text.back() == '=' ? "" : ",") + r.dump();
    score = score == "attn" ? "attention" : score == "mlp_ln" ? "mlp:out" : score;
    const std::string content = g["text"];
    const rs_text view = {content.data(), content.size()};
    auto params = sized<rs_encode_params>();
    params.normalize = RS_OFF;
    params.max_tokens = 512;
    for (const char *mode : {"prune", "restore"}) {
      const schedule s(text + " score=" + score + " mode=" + mode);
      params.drop = s.drop;
      rs_trace *trace = nullptr;
      ASSERT_EQ(rs_trace_text(m.session, &view, nullptr, &params, &trace), RS_OK) << rs_last_error();
      const int32_t *positions = nullptr;
      const size_t n = rs_trace_kept(trace, &positions);
      const ints kept(positions, positions + n);
      rs_trace_free(trace);
      if (kept != g["kept"].get<ints>()) {
        other += mode == std::string("prune");
        continue;
      }
      vec v(384);
      ASSERT_EQ(rs_encode(m.session, &view, 1, &params, v.data(), v.size(), nullptr), RS_OK) << rs_last_error();
      const vec wanted = g[mode == std::string("prune") ? "mean_kept" : "mean_restored"];
      EXPECT_TRUE(cosine(v.data(), wanted.data(), 384) >= 0.9999) << line.substr(0, 80);
    }
  }
  EXPECT_GE(cases, 24u);
  EXPECT_LE(other, cases / 100) << "texts keep other tokens than the reference";
  printf("%zu of %zu keep the same tokens\n", cases - other, cases);
}

TEST(minilm_drop, batch_equals_single) {
  RS_NEED_MODEL("q8");
  const loaded one(model_path("q8"), 1), two(model_path("q8"), 2);
  std::vector<std::string> texts;
  for (int i = 1; i < 12; i++) {
    std::string text;
    for (int j = 0; j < i * i; j++) text += "token " + std::to_string(i * j) + (j % 7 ? " of the text, " : ". ");
    texts.push_back(text);
  }
  for (const char *text :
       {"ratios=0,0.45 score=-mlp", "ratios=0,0.3,0,0.3 score=norm mode=merge", "ratios=0,0.3,0,0.3 score=norm-mlp mode=fold",
        "ratios=0.2,0.2,0.2,0.2,0.2,0.2 score=attn-colsum mode=restore"}) {
    const schedule s(text);
    auto params = sized<rs_encode_params>();
    params.drop = s.drop;
    const vec all = encode(two.session, texts, params, 384);
    for (size_t i = 0; i < texts.size(); i++)
      EXPECT_EQ(encode(one.session, {texts[i]}, params, 384), row(all, i)) << text << " text " << i;
  }
}

}  // namespace
