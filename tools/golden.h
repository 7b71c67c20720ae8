// Sentences whose vectors are kept in the weight file, so that it can be checked anywhere: convert writes them, verify reads them.
#pragma once
#include "common.h"

#include <limits>

extern const std::vector<std::string> golden_texts;

struct golden_cosines {
  std::vector<float> each;
  double mean = 0, lowest = std::numeric_limits<double>::quiet_NaN();
};

// [texts, dim], with the settings that a user gets without options, and no prompt.
std::vector<float> golden_embeddings(const rs_model *model, const std::vector<std::string> &texts);
golden_cosines compare_golden(const std::vector<float> &expected, const std::vector<float> &got, size_t texts);
