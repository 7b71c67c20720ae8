// Shapes of batches as options give them: "1x16,8x128".
#pragma once
#include "common.h"

struct shape {
  size_t batch, tokens;
  std::string str() const { return join(batch, "x", tokens); }
};

std::vector<shape> parse_shapes(const std::string &option, std::string_view list);  // throws usage_failure that names the option

// Batches of images: "8x224", "1x320x240" (batch, width, height in pixels).
struct image_batch {
  size_t batch, width, height;
  std::string str() const { return width == height ? join(batch, "x", width) : join(batch, "x", width, "x", height); }
};
std::vector<image_batch> parse_image_batches(const std::string &option, std::string_view list);

// Numbers: "1,8"; `what` they are of, for the error.
std::vector<size_t> parse_counts(const std::string &option, std::string_view list, const char *what);
