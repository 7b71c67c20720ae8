// The size in pixels that images are brought to, as options give it.
#pragma once
#include "common.h"

#include <CLI/CLI.hpp>

struct image_size {
  int32_t width = 0, height = 0;  // 0, 0: the model's own
};

// "224" or "320x240" (width x height); empty: the model's own.  Throws usage_failure that names the option.
image_size parse_image_size(const std::string &option, std::string_view text);
void add_image_size_option(CLI::App *sub, std::string *text);
