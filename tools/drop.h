// Options of token dropping, and the schedule that they come to.
#pragma once
#include "common.h"

#include <CLI/CLI.hpp>

using drop_ptr = std::unique_ptr<rs_drop, releaser<rs_drop_free>>;

struct drop_options {
  std::string ratios, keeps, profile, score = "mlp", mode = "prune", protect = "cls";
  int least = 0;
  uint64_t seed = 0;
};
void add_drop_options(CLI::App *sub, drop_options *options);

// What the options say for a model; checked.
class drop_choice {
 public:
  drop_choice(const drop_options &options, const rs_model *model);
  const rs_drop *get() const { return drop_; }  // nullptr: none; lives as long as this and the model

 private:
  drop_ptr own_;
  const rs_drop *drop_ = nullptr;
};

// A schedule as rs_drop_parse reads it, that the model can run; what is wrong with it is a usage_failure that begins with `place`.
drop_ptr parse_drop(const std::string &text, const rs_model *model, const std::string &place = "");
// What keeps the model from it; empty: nothing.
std::string drop_error(const rs_model *model, const rs_drop &drop);
std::string text_of(const rs_drop &drop);  // as rs_drop_format writes it
