// Pictures that stand for photographs where there are none: for rounding quantized weights (rs_calibrate) and for the vectors that
// a weight file brings along.  Made by arithmetic alone, so that they are the same everywhere.
#pragma once
#include "common.h"

struct picture {
  int32_t width = 0, height = 0;
  std::vector<uint8_t> rgb;  // [height, width, 3]
  rs_image view() const { return {RS_IMAGE_RGB, rgb.data(), 0, width, height}; }
};

// n of them, a seed each: `first`, `first` + 1 …  Noise whose octaves fall off as those of photographs do (power 1 / f^2: Field
// 1987), with shapes of other colours and textures on it.
std::vector<picture> make_pictures(size_t n, uint32_t first);
std::vector<rs_image> views_of(const std::vector<picture> &pictures);
