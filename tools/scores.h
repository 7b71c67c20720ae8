// Logits of a head to scores, for the subcommands that use one.
#pragma once
#include "options.h"

// The model has one of these heads, or the command cannot use it: throws failure, which says what `command` needs.
void need_head(const rs_model *model, std::initializer_list<rs_head> wanted, const char *command, const char *what);

// --activation softmax|sigmoid|none.
void add_activation_option(CLI::App *sub, std::string *name);
rs_head_activation activation_of(const std::string &name, const rs_model_info &info);  // empty: the model's own

// The scores of one row of logits, in place.
void to_scores(rs_head_activation how, float *row, size_t n);

// Indices of the best `most` of n scores, best first; of equal ones the first.
std::vector<size_t> best_first(const float *scores, size_t n, size_t most);
