// A picture to paint on, written as PNG.
#pragma once
#include "colour.h"

struct canvas {
  int32_t width = 0, height = 0;
  std::vector<uint8_t> pixels;  // [height, width, 3]

  canvas() = default;
  canvas(int32_t width, int32_t height, const rgb &ground);
  const uint8_t *at(int32_t x, int32_t y) const { return &pixels[3 * (size_t(y) * size_t(width) + size_t(x))]; }
  uint8_t *at(int32_t x, int32_t y) { return &pixels[3 * (size_t(y) * size_t(width) + size_t(x))]; }
  void put(const canvas &picture, int32_t x, int32_t y);  // what lies outside is cut
  // In a plain font; what is not ASCII becomes '?'.  size: of a dot of the font, in pixels.
  void write(const std::string &text, int32_t x, int32_t y, int32_t size, const rgb &colour);
  static int32_t text_width(const std::string &text, int32_t size);
  static constexpr int32_t line_height = 12;  // of size 1
};

rgb mix(const rgb &a, const rgb &b, double share_of_b);

// Larger, by a whole factor, without edges between the pixels.
canvas enlarged(const uint8_t *pixels, int32_t width, int32_t height, int32_t factor);

std::string png_of(const canvas &picture);
std::string base64(std::string_view bytes);
