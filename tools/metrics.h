// How good results are, as the field's own scripts count it.
#pragma once
#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

// Ranks from 1; equal values share the mean of their ranks.
std::vector<double> ranks_of(const std::vector<double> &values);
// NaN where one side does not vary, or there are fewer than two values.
double pearson(const std::vector<double> &a, const std::vector<double> &b);
double median(std::vector<double> values);  // 0 of none
double spearman(const std::vector<double> &a, const std::vector<double> &b);

// `found`: the gain of each result in the order of ranks, 0 where it is of no use; `relevant`: the gains of all that there is to
// find, in any order.  As trec_eval does: the gain itself over log2(rank + 1).  0 when nothing is relevant.
double ndcg_at(size_t k, const std::vector<double> &found, std::vector<double> relevant);
double recall_at(size_t k, const std::vector<double> &found, const std::vector<double> &relevant);

// The class of each test vector by its k nearest neighbours of the training set, votes weighted by exp(cosine / 0.07) as in the
// DINO papers.  Equal cosines: the earlier neighbour; equal votes: the lower class.  No test vectors: each training vector is
// judged by all the others.
struct vectors_view {
  const float *values;  // [n, dim]
  size_t n, dim;
};
std::vector<int> nearest_classes(vectors_view train, const std::vector<int> &classes, vectors_view test, size_t k);

// For each query the k rows that are most like it (cosine), best first; of equal ones the earlier.  `left_out`: for each query a
// row that does not count, or SIZE_MAX; empty: all do.
std::vector<std::vector<size_t>> nearest_rows(vectors_view queries, vectors_view rows, size_t k,
                                              const std::vector<size_t> &left_out = {});

// SQuAD's evaluate-v2.0.py: lower case, no ASCII punctuation, no articles, single spaces.  Two things differ from Python: Σ at the
// end of a word becomes σ, and İ becomes i without its dot.
std::string squad_normalized(std::string_view text);
// 0 or 1, and 0 to 1: the best of `answers`.  Answers that nothing is left of do not count; where there are none, the right answer
// is no answer, "".
struct squad_score {
  double exact, f1;
};
squad_score squad_judge(std::string_view prediction, const std::vector<std::string> &answers);
