// Sentences and pictures whose vectors are kept in the weight file, so that it can be checked anywhere: convert writes them, verify
// reads them.
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
// The same of the first n pictures (pictures.h), which are not kept themselves.
constexpr size_t golden_pictures = 12, most_golden_pictures = 256;
std::vector<float> golden_image_embeddings(const rs_model *model, size_t n);
golden_cosines compare_golden(const std::vector<float> &expected, const std::vector<float> &got, size_t n);
