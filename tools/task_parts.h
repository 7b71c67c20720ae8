// What tasks have in common: counts of tokens, names of labels, accuracy.
#pragma once
#include "tasks.h"

// Tokens that enter each layer, summed over what a setting encodes.
class layer_counter {
 public:
  layer_counter(const rs_model *model, bool of_images, evaluation *result);
  void add_text(const rs_text_info &info, const rs_drop *drop);
  // `prefix`: tokens of the first text and the special tokens around it.
  void add_pair(int32_t tokens, int32_t prefix, const rs_drop *drop);
  void add_image(int32_t tokens, const rs_drop *drop);

 private:
  void add_sequence(int32_t tokens, const rs_drop *drop, int32_t protect);  // protect: tokens that may not leave

  const rs_model *model_;
  int32_t layers_, special_ = 0, pair_special_ = 0, prefix_ = 0;
  evaluation *result_;
  std::vector<int32_t> counts_;
};

// Labels as data has them: what the model calls them, or their numbers, unless it calls them by other numbers.
class label_finder {
 public:
  explicit label_finder(const rs_model *model);
  size_t find(const std::string &name,
              const std::string &place) const;  // throws failure, which names the label and those there are

 private:
  std::map<std::string, size_t> numbers_;
  std::string names_;
  int32_t labels_;
  bool by_number_;
};

// Accuracy and macro-F1 of logits [n, labels].
std::vector<eval_metric> judge_labels(const std::vector<size_t> &wanted, const float *logits, size_t labels);

std::unique_ptr<eval_task> load_image_task(const std::string &name, const task_options &options);
