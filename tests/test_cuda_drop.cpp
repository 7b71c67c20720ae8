// Token dropping of rs-cuda.cu, on the CPU, against what rs.cpp does, written plainly: rows and sums in order to the bit.
#define RS_CUDA_HOST
#include "../rs-cuda.cu"

#include "cuda_ops.h"
#include "graph_harness.h"

namespace {

// ---- references

// As drop_rule_count of rs.cpp: with the extra token.
int count_reference(const rs_drop_rule &rule, int64_t n, int64_t protect) {
  if (n == 0) return 0;
  int64_t keep = rule.keep > 0 ? rule.keep : n - static_cast<int64_t>(static_cast<double>(n) * rule.ratio);
  keep = std::min(n, std::max<int64_t>({keep, rule.least, protect, 1}));
  if (!rule.fold) return static_cast<int>(keep);
  return static_cast<int>(n - keep > 1 ? keep + 1 : n);
}

uint64_t order_reference(bool protect, float score, int64_t position) {
  uint32_t bits;
  score += 0.0f;
  std::memcpy(&bits, &score, 4);
  bits = bits >> 31 ? ~bits : bits | 1u << 31;
  return static_cast<uint64_t>(protect) << 63 | static_cast<uint64_t>(bits) << 31 | static_cast<uint64_t>(INT32_MAX - position);
}

// A level, what chooses from it, and the level that this leaves.
struct drop_case {
  rs_drop_rule rule;
  const test_level *before;
  const ints *previous;  // kept rows of the level before, or nullptr
  const int32_t *protect;
  const floats *score;

  int32_t origin(int64_t row) const { return previous ? (*previous)(row, 1) : static_cast<int32_t>(row); }
  bool stays(int b, int64_t i) const {
    const int32_t at = origin(before->cu[b] + i);
    return (rule.keep_first && i == 0) || (protect && at >= 0 && protect[at]);
  }
  std::vector<int> counts() const {
    std::vector<int> n;
    for (int b = 0; b < before->count(); b++) {
      int64_t protect_count = 0;
      for (int i = 0; i < before->lengths[static_cast<size_t>(b)]; i++) protect_count += stays(b, i);
      n.push_back(count_reference(rule, before->lengths[static_cast<size_t>(b)], protect_count));
    }
    return n;
  }
  // Pairs of rows, as token_drop_cpu.
  std::vector<int32_t> kept(const test_level &after) const {
    std::vector<int32_t> out;
    for (int b = 0; b < before->count(); b++) {
      const int n = before->lengths[static_cast<size_t>(b)], all = after.lengths[static_cast<size_t>(b)];
      const int keep = rule.fold && all < n ? all - 1 : all;
      std::vector<uint64_t> order;
      for (int i = 0; i < n; i++) {
        const float value = (*score)(before->cu[b] + i), known = std::isnan(value) ? 0 : value;
        order.push_back(order_reference(stays(b, i), rule.lowest ? -known : known, i));
      }
      std::sort(order.begin(), order.end(), std::greater<>());
      order.resize(static_cast<size_t>(keep));
      for (uint64_t &o : order) o = INT32_MAX - (o & INT32_MAX);
      std::sort(order.begin(), order.end());
      for (const uint64_t o : order) {
        const int32_t row = before->cu[b] + static_cast<int32_t>(o);
        out.push_back(row), out.push_back(origin(row));
      }
      if (keep < all) out.push_back(-1), out.push_back(-1);
    }
    return out;
  }
  run_fault run(const test_level &after, const ints &result) const {
    test_call c;
    c.op.params.rule = rule;
    c.of(*before).in(0, score->value()).in(1, before->value()).in(4, after.value()).out(result.value());
    if (protect) c.in(2, {const_cast<int32_t *>(protect), before->tokens.data(), before->capacity, 1, 1, false});
    if (previous) c.in(3, previous->value());
    RUN(c, token_drop);
    result.expect_untouched();
    return c.fault[0];
  }
  void expect(const test_level &after, const ints &result) const {
    const std::vector<int32_t> expected = kept(after);
    ASSERT_EQ(static_cast<int32_t>(expected.size()), 2 * after.tokens[0]);
    for (int64_t i = 0; i < after.tokens[0]; i++) {
      ASSERT_EQ(result(i, 0), expected[static_cast<size_t>(2 * i)]) << i;
      ASSERT_EQ(result(i, 1), expected[static_cast<size_t>(2 * i + 1)]) << i;
    }
  }
};

enum score_kind { score_normal, score_ties, score_odd, score_equal, n_score_kinds };
void fill_scores(const floats &score, score_kind kind) {
  std::mt19937 random(17);
  std::normal_distribution<float> normal;
  const float odd[] = {0.0f, -0.0f, INFINITY, -INFINITY, 1e-45f, -1e-45f, FLT_MAX, -FLT_MAX};
  for (int64_t i = 0; i < *score.rows; i++)
    score(i) = kind == score_normal ? normal(random)
               : kind == score_ties ? static_cast<float>(random() % 5) - 2
               : kind == score_odd  ? odd[random() % 8]
                                    : 0.25f;
}

std::vector<rs_drop_rule> rules() {
  std::vector<rs_drop_rule> all;
  for (const bool lowest : {false, true})
    for (const bool first : {false, true})
      for (const bool fold : {false, true}) {
        all.push_back({0.5, 0, 0, lowest, first, fold});
        all.push_back({0, 1, 0, lowest, first, fold});  // all but the class token
        all.push_back({0.9, 0, 20, lowest, first, fold});
        all.push_back({0, 0, 0, lowest, first, fold});  // nothing goes
      }
  all.push_back({0, 100, 0, false, true, false});
  all.push_back({0.01, 0, 0, false, false, true});
  return all;
}

// A drop that was made, for what comes behind it.
struct made_drop {
  test_level after;
  ints kept;
  explicit made_drop(const drop_case &d, int64_t more = 11)
      : after(d.counts(), d.before->sequence_capacity - d.before->count(), more), kept(after.capacity, 2, after.tokens.data()) {
    d.run(after, kept);
    d.expect(after, kept);
  }
};

using Drop = Cuda;
INSTANTIATE_TEST_SUITE_P(Orders, Drop, ::testing::Values(0, 1, 2));

// ---- token_drop

TEST_P(Drop, KeepsWhatTheCpuKeeps) {
  const test_level level(ragged_lengths());
  const std::vector<rs_drop_rule> all = rules();
  for (size_t i = 0; i < all.size(); i++)
    for (int kind = 0; kind < n_score_kinds; kind++)
      for (const int protect : {0, 1, 2}) {  // none, some, all
        if ((i + static_cast<size_t>(kind + protect)) % (GetParam() ? 8 : 2)) continue;
        SCOPED_TRACE("rule " + std::to_string(i) + ", scores " + std::to_string(kind) + ", protect " + std::to_string(protect));
        floats score(level.capacity, {1, 3, 1}, level.tokens.data());
        fill_scores(score, static_cast<score_kind>(kind));
        on_device<int32_t> protect_rows(static_cast<size_t>(level.capacity), 0);
        std::mt19937 random(5);
        for (size_t k = 0; k < protect_rows.size(); k++) protect_rows[k] = protect == 2 || random() % 7 == 0 ? 3 : 0;
        const drop_case d = {all[i], &level, nullptr, protect ? protect_rows.data() : nullptr, &score};
        const made_drop first(d);

        // And again from what that left.
        floats again(first.after.capacity, 1, first.after.tokens.data());
        fill_scores(again, static_cast<score_kind>((kind + 1) % n_score_kinds));
        const drop_case second = {all[(i + 5) % all.size()], &first.after, &first.kept, d.protect, &again};
        const made_drop last(second);
        if (HasFatalFailure()) return;
      }
}

TEST_P(Drop, LongSequences) {
  const test_level level({20000, 3, 1024, 1025, 5000});
  for (int kind = 0; kind < n_score_kinds; kind++)
    for (const double ratio : {0.5, 0.999}) {
      if (GetParam() && kind % 2) continue;
      SCOPED_TRACE(kind);
      floats score(level.capacity, 1, level.tokens.data());
      fill_scores(score, static_cast<score_kind>(kind));
      const drop_case d = {{ratio, 0, 0, false, true, ratio > 0.9}, &level, nullptr, nullptr, &score};
      const made_drop made(d);
    }
}

TEST_P(Drop, TheLongestSequence) {
  if (GetParam()) GTEST_SKIP() << "once is enough";
  const test_level level({1 << 18});
  floats score(level.capacity, 1, level.tokens.data());
  fill_scores(score, score_ties);
  const drop_case d = {{0.3, 0, 0, true, true, false}, &level, nullptr, nullptr, &score};
  const made_drop made(d);
}

TEST_P(Drop, NanIsReported) {
  const test_level level({4, 40, 7});
  floats score(level.capacity, 1, level.tokens.data());
  fill_scores(score, score_normal);
  score(4 + 33) = NAN;
  const drop_case d = {{0.5, 0, 0, false, false, false}, &level, nullptr, nullptr, &score};
  const test_level after(d.counts());
  const ints kept(after.capacity, 2, after.tokens.data());
  const run_fault fault = d.run(after, kept);
  EXPECT_EQ(fault.status, RS_ERR_NUMERIC);
  EXPECT_EQ(fault.op, 7);
  EXPECT_EQ(fault.at, 33);
  EXPECT_EQ(fault.what, 1);
  d.expect(after, kept);  // with 0 in its place
}

// ---- token_gather, token_restore

TEST_P(Drop, GatherAndRestore) {
  for (const bool empty : {false, true}) {
    // The second drop of two: of a kept row, the place at the level before and that in the input differ.
    const test_level input(empty ? std::vector<int>{0, 0} : ragged_lengths());
    floats input_score(input.capacity, 1, input.tokens.data());
    fill_scores(input_score, score_normal);
    const drop_case earlier = {{0.1, 0, 0, false, true, false}, &input, nullptr, nullptr, &input_score};
    const made_drop first(earlier);
    const test_level &level = first.after;
    floats score(level.capacity, 1, level.tokens.data());
    fill_scores(score, score_normal);
    const drop_case d = {{0.6, 0, 0, false, true, false}, &level, &first.kept, nullptr, &score};
    const made_drop made(d);
    for (const layout_case at : layout_cases()) {
      SCOPED_TRACE(std::to_string(at.cols) + " columns, stride " + std::to_string(at.stride));
      floats x(level.capacity, at, level.tokens.data());
      x.fill(3);
      const floats fewer(made.after.capacity, at, made.after.tokens.data());
      test_call gather;
      gather.in(0, x.value()).in(1, made.kept.value()).out(fewer.value());
      RUN(gather, token_gather);
      fewer.expect_untouched();
      for (int64_t i = 0; i < made.after.tokens[0]; i++) ASSERT_TRUE(same_bits(fewer.row(i), x.row(made.kept(i, 0)), at.cols));

      floats changed(made.after.capacity, at, made.after.tokens.data());
      changed.fill(4);
      const floats all(level.capacity, at, level.tokens.data());
      test_call restore;
      restore.in(0, changed.value()).in(1, x.value()).in(2, made.kept.value()).out(all.value());
      RUN(restore, token_restore);
      all.expect_untouched();
      int64_t next = 0;
      for (int64_t i = 0; i < level.tokens[0]; i++) {
        const bool stayed = next < made.after.tokens[0] && made.kept(next, 0) == i;
        ASSERT_TRUE(same_bits(all.row(i), stayed ? changed.row(next++) : x.row(i), at.cols)) << i;
      }
    }
  }
}

// ---- token_assign, token_merge, token_sizes

// What the operators made of a drop.
struct merged {
  ints assign;
  floats rows, sizes;
  merged(const test_level &before, const test_level &after, int64_t cols)
      : assign(before.capacity, 1, before.tokens.data()),
        rows(after.capacity, cols, after.tokens.data()),
        sizes(after.capacity, {1, 3, 1}, after.tokens.data()) {}
};

struct merge_case {
  const drop_case *d;
  const made_drop *made;
  const floats *x, *sizes, *score;  // sizes, score: or nullptr

  void run(const merged &m) const {
    const device_value kept = made->kept.value(), from = d->before->value(), to = made->after.value();
    test_call a, b, c;
    a.op.params.rule = b.op.params.rule = c.op.params.rule = d->rule;
    a.of(*d->before).in(0, x->value()).in(1, kept).in(2, from).in(3, to).out(m.assign.value());
    RUN(a, token_assign);
    b.of(*d->before).in(0, x->value()).in(1, kept).in(2, from).in(3, to).in(4, m.assign.value());
    b.in(5, sizes ? sizes->value() : absent()).in(6, score ? score->value() : absent()).out(m.rows.value());
    RUN(b, token_merge);
    c.of(*d->before).in(0, m.assign.value()).in(1, kept).in(2, from).in(3, to).in(4, sizes ? sizes->value() : absent());
    c.out(m.sizes.value());
    RUN(c, token_sizes);
    m.assign.expect_untouched(), m.rows.expect_untouched(), m.sizes.expect_untouched();
  }

  double likeness(int64_t row, int64_t key) const {
    double ab = 0, bb = 0;
    const float *a = x->row(row), *b = x->row(made->kept(key, 0));
    for (int64_t j = 0; j < x->at.cols; j++)
      ab += static_cast<double>(a[j]) * static_cast<double>(b[j]), bb += static_cast<double>(b[j]) * static_cast<double>(b[j]);
    return bb > 0 ? ab / std::sqrt(bb) : ab;
  }
  double norm(int64_t row) const {
    double aa = 0;
    for (int64_t j = 0; j < x->at.cols; j++) aa += static_cast<double>((*x)(row, j)) * static_cast<double>((*x)(row, j));
    return std::sqrt(aa);
  }

  // What is kept is itself; the rest the last one, or one that is as like as any, of equal ones the first.
  void expect_assign(const ints &assign) const {
    for (int s = 0; s < d->before->count(); s++) {
      const int64_t begin = made->after.cu[s], end = made->after.cu[s + 1];
      const bool extra = end > begin && made->kept(end - 1, 0) < 0;
      int64_t next = begin;
      for (int64_t i = d->before->cu[s]; i < d->before->cu[s + 1]; i++) {
        if (next < end && made->kept(next, 0) == i) {
          ASSERT_EQ(assign(i), next++);
          continue;
        }
        if (extra) {
          ASSERT_EQ(assign(i), end - 1);
          continue;
        }
        ASSERT_TRUE(assign(i) >= begin && assign(i) < end) << i;
        const double got = likeness(i, assign(i)), slack = 1e-6 * norm(i) * std::sqrt(static_cast<double>(x->at.cols));
        for (int64_t key = begin; key < end; key++) {
          const bool twin = key < assign(i) && same_bits(x->row(made->kept(key, 0)), x->row(made->kept(assign(i), 0)), x->at.cols);
          ASSERT_TRUE(!twin && likeness(i, key) <= got + slack) << i << " became " << assign(i) << ", not " << key;
        }
      }
    }
  }

  // As token_merge_cpu and token_sizes_cpu, given the assignment.  With scores, whose moments may differ in the last bits, nearly.
  void expect(const merged &m) const {
    expect_assign(m.assign);
    if (::testing::Test::HasFatalFailure()) return;
    const test_level &before = *d->before, &after = made->after;
    const int64_t cols = x->at.cols;
    std::vector<float> row(static_cast<size_t>(cols));
    for (int s = 0; s < before.count(); s++) {
      const int64_t end = after.cu[s + 1], n = before.lengths[static_cast<size_t>(s)];
      const int64_t extra = end > after.cu[s] && made->kept(end - 1, 0) < 0 ? end - 1 : -1;
      double mean = 0, deviation = 0;
      for (int64_t i = before.cu[s]; score && i < before.cu[s + 1]; i++)
        mean += static_cast<double>((*score)(i)) / static_cast<double>(n);
      for (int64_t i = before.cu[s]; score && i < before.cu[s + 1]; i++)
        deviation += std::pow(static_cast<double>((*score)(i)) - mean, 2) / static_cast<double>(n);
      deviation = std::sqrt(deviation);
      const auto weight = [&](int64_t i) {
        float w = sizes ? (*sizes)(i) : 1;
        if (score && m.assign(i) == extra) {
          const double z = deviation > 1e-12 ? (static_cast<double>((*score)(i)) - mean) / deviation : 0;
          w *= static_cast<float>(std::exp(d->rule.lowest ? -z : z));
        }
        return w;
      };
      for (int64_t j = after.cu[s]; j < end; j++) {
        float sum = 0, size = 0;
        for (int64_t i = before.cu[s]; i < before.cu[s + 1]; i++)
          if (m.assign(i) == j) sum += weight(i), size += sizes ? (*sizes)(i) : 1;
        ASSERT_TRUE(same_bits(m.sizes(j), size)) << j;
        const int64_t own = made->kept(j, 0);
        std::fill(row.begin(), row.end(), 0.0f);
        const auto add = [&](int64_t i, bool first) {
          const float share = weight(i) / sum;
          for (int64_t k = 0; k < cols; k++) {
            float &y = row[static_cast<size_t>(k)];
            y = first ? (*x)(i, k) * share : y + (*x)(i, k) * share;
          }
        };
        if (own >= 0) add(own, true);
        for (int64_t i = before.cu[s]; i < before.cu[s + 1]; i++)
          if (m.assign(i) == j && i != own) add(i, false);
        for (int64_t k = 0; k < cols; k++) {
          if (score) ASSERT_NEAR(m.rows(j, k), row[static_cast<size_t>(k)], 2e-6) << j << " " << k;
          else ASSERT_TRUE(same_bits(m.rows(j, k), row[static_cast<size_t>(k)])) << j << " " << k;
        }
      }
    }
  }
};

TEST_P(Drop, AssignMergeAndSizes) {
  const test_level level({1, 150, 0, 33, 64, 2, 0, 0, 130, 5});
  for (const layout_case at : {layout_case{1, 1, 0}, {7, 12, 4}, {33, 33, 0}, {64, 65, 1}, {300, 304, 4}})
    for (const bool fold : {false, true})
      for (int kind = 0; kind < 4; kind++) {
        const bool sized = kind & 1, scored = kind & 2;
        if (GetParam() ? kind != 3 : kind % 2 != (at.cols % 2 != 0)) continue;
        for (const double ratio : {0.5, 0.95}) {
          SCOPED_TRACE(std::to_string(at.cols) + " columns, fold " + std::to_string(fold) + ", kind " + std::to_string(kind));
          floats x(level.capacity, at, level.tokens.data()), score(level.capacity, 1, level.tokens.data()),
              sizes(level.capacity, {1, 2, 1}, level.tokens.data());
          x.fill(1), sizes.fill(2);
          fill_scores(score, score_normal);
          for (int64_t i = 0; i < level.tokens[0]; i++) sizes(i) = 1 + std::fabs(sizes(i));
          for (int64_t i = 0; i < level.tokens[0]; i += 4) std::copy(x.row(i / 9), x.row(i / 9) + at.cols, x.row(i));  // twins
          for (int64_t j = 0; j < at.cols; j++) x(10, j) = 0;
          const drop_case d = {{ratio, 0, 0, kind == 2, true, fold}, &level, nullptr, nullptr, &score};
          const made_drop made(d);
          const merged m(level, made.after, at.cols);
          const merge_case c = {&d, &made, &x, sized ? &sizes : nullptr, scored ? &score : nullptr};
          c.run(m);
          c.expect(m);
          if (HasFatalFailure()) return;
        }
      }
}

// What rs.cpp assigns, of one sequence.
std::vector<int32_t> assign_of_the_cpu(const floats &x, const floats &score, const rs_drop_rule &rule) {
  const session cpu;
  harness h;
  const auto input = [&](const char *name, const floats &v) {
    return h.input(name, RS_F32, {RS_DIM_TOKENS, v.at.cols}, std::vector<float>(v.row(0), v.row(0) + *v.rows * v.at.cols));
  };
  rs_tensor *cu = h.input("cu", RS_I32, {RS_DIM_CU_SEQLENS}, std::vector<int32_t>{0, *x.rows});
  rs_tensor *kept = rs_token_drop(h.g, input("score", score), cu, nullptr, &rule);
  const vec bits = h.run(cpu.s, rs_token_assign(h.g, input("x", x), cu, kept), *x.rows, 1, static_cast<size_t>(*x.rows));
  std::vector<int32_t> out(bits.size());
  std::memcpy(out.data(), bits.data(), bits.size() * 4);
  return out;
}

// A likeness that is NaN, or the least that there is, is no one's best; where there is no other, the first that stays takes the
// row.
TEST_P(Drop, AssignOfWhatIsNan) {
  const test_level level({70});
  floats x(level.capacity, 8, level.tokens.data()), score(level.capacity, 1, level.tokens.data());
  for (int i = 0; i < 70; i++) score(i) = static_cast<float>(-i);  // the first 35 stay
  struct {
    int first, last;  // that are NaN, of what stays
    bool negative;    // what is no NaN is like -inf: the product is beyond floats
  } const cases[] = {{0, 0, false}, {1, 1, false}, {0, 20, false}, {0, 34, false}, {0, 3, true}, {5, 7, true}};
  for (const auto &nan : cases) {
    SCOPED_TRACE(std::to_string(nan.first) + " to " + std::to_string(nan.last));
    x.fill(1);
    for (int i = nan.first; i <= nan.last; i++) x(i, 3) = NAN;
    x(60, 2) = NAN;  // of what goes
    for (int i = 0; nan.negative && i < 70; i++)
      for (int j = 4; j < 8; j++) x(i, j) = i < 35 ? 100 : -3e38f;
    const drop_case d = {{0.5, 0, 0, false, true, false}, &level, nullptr, nullptr, &score};
    const made_drop made(d);
    const merged m(level, made.after, 8);
    merge_case{&d, &made, &x, nullptr, nullptr}.run(m);
    const std::vector<int32_t> wanted = assign_of_the_cpu(x, score, d.rule);
    for (int i = 0; i < 70; i++) ASSERT_EQ(m.assign(i), wanted[static_cast<size_t>(i)]) << i;
    ASSERT_EQ(m.assign(60), 0);
    ASSERT_TRUE(m.assign(50) > nan.last || nan.first > 0 || nan.last == 34 || nan.negative);
  }
}

// A sequence has the bits that it has alone, whatever the capacity.
TEST_P(Drop, ABatchIsItsSequences) {
  const test_level level(ragged_lengths());
  constexpr int64_t cols = 36;
  floats x(level.capacity, cols, level.tokens.data()), score(level.capacity, 1, level.tokens.data());
  x.fill(1);
  fill_scores(score, score_normal);
  for (const bool fold : {false, true}) {
    const drop_case d = {{0.7, 0, 0, false, true, fold}, &level, nullptr, nullptr, &score};
    const made_drop made(d);
    const merged m(level, made.after, cols);
    merge_case{&d, &made, &x, nullptr, &score}.run(m);
    for (int b = 0; b < level.count(); b++) {
      const int n = level.lengths[static_cast<size_t>(b)];
      const test_level one({n}, b % 3, 3 * b);
      floats x1(one.capacity, cols, one.tokens.data()), score1(one.capacity, 1, one.tokens.data());
      for (int64_t i = 0; i < n; i++) {
        std::copy(x.row(level.cu[b] + i), x.row(level.cu[b] + i) + cols, x1.row(i));
        score1(i) = score(level.cu[b] + i);
      }
      const drop_case d1 = {d.rule, &one, nullptr, nullptr, &score1};
      const made_drop made1(d1, b);
      const merged m1(one, made1.after, cols);
      merge_case{&d1, &made1, &x1, nullptr, &score1}.run(m1);
      const int64_t first = made.after.cu[b];
      for (int64_t i = 0; i < n; i++) ASSERT_EQ(m.assign(level.cu[b] + i) - first, m1.assign(i));
      for (int64_t j = 0; j < made1.after.tokens[0]; j++) {
        ASSERT_TRUE(same_bits(m.rows.row(first + j), m1.rows.row(j), cols));
        ASSERT_TRUE(same_bits(m.sizes(first + j), m1.sizes(j)));
      }
    }
  }
}

}  // namespace
