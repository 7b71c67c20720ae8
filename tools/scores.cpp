#include "scores.h"

#include <algorithm>
#include <cmath>
#include <numeric>

void need_head(const rs_model *model, std::initializer_list<rs_head> wanted, const char *command, const char *what) {
  const rs_model_info info = model_info(model);
  const rs_head head = info.head;
  if (std::find(wanted.begin(), wanted.end(), head) != wanted.end()) return;
  const std::string name = in_quotes(info.name);  // there may be several
  if (head == RS_HEAD_NONE)
    fail(name, ": this model has no ", what, " head: rs ", command, " needs one that was published with the weights");
  fail(name, ": this model has no ", what, " head, but one of ", rs_head_name(head), ": rs ",
       head == RS_HEAD_SPANS ? "answer" : "classify", " is for that");
}

void add_activation_option(CLI::App *sub, std::string *name) {
  sub->add_option("--activation", *name,
                  "what makes scores of logits: softmax, sigmoid (each label for itself)\n"
                  "or none: the logits themselves (default: the model's)")
      ->type_name("NAME")
      ->check(CLI::IsMember({"softmax", "sigmoid", "none"}));
}

rs_head_activation activation_of(const std::string &name, const rs_model_info &info) {
  for (rs_head_activation how : {RS_HEAD_RAW, RS_HEAD_SOFTMAX, RS_HEAD_SIGMOID})
    if (name == rs_head_activation_name(how)) return how;
  return info.head_activation;
}

void to_scores(rs_head_activation how, float *row, size_t n) {
  if (how == RS_HEAD_SIGMOID)
    for (size_t i = 0; i < n; ++i) row[i] = float(1 / (1 + std::exp(-double(row[i]))));
  if (how != RS_HEAD_SOFTMAX) return;
  const double most = *std::max_element(row, row + n);
  double sum = 0;
  for (size_t i = 0; i < n; ++i) sum += std::exp(row[i] - most);
  for (size_t i = 0; i < n; ++i) row[i] = float(std::exp(row[i] - most) / sum);
}

std::vector<size_t> best_first(const float *scores, size_t n, size_t most) {
  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), size_t(0));
  most = std::min(most, n);
  std::partial_sort(order.begin(), order.begin() + ptrdiff_t(most), order.end(),
                    [&](size_t a, size_t b) { return scores[a] != scores[b] ? scores[a] > scores[b] : a < b; });
  order.resize(most);
  return order;
}
