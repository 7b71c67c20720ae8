#include "canvas.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#define STB_IMAGE_WRITE_IMPLEMENTATION
#define STB_IMAGE_WRITE_STATIC
#define STBI_WRITE_NO_STDIO
#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpragmas"
#pragma GCC diagnostic ignored "-Wunknown-warning-option"
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#pragma GCC diagnostic ignored "-Wsign-compare"
#pragma GCC diagnostic ignored "-Wwrite-strings"
#endif
#include <stb/stb_easy_font.h>
#ifdef __clang_analyzer__  // what it finds in there is not ours to mend
unsigned char *stbi_write_png_to_mem(const unsigned char *pixels, int stride, int width, int height, int channels, int *length);
#else
#include <stb/stb_image_write.h>
#endif
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif

canvas::canvas(int32_t width, int32_t height, const rgb &ground)
    : width(width), height(height), pixels(size_t(3) * size_t(width) * size_t(height)) {
  for (size_t i = 0; i < pixels.size(); i += 3) pixels[i] = ground.r, pixels[i + 1] = ground.g, pixels[i + 2] = ground.b;
}

void canvas::put(const canvas &picture, int32_t x, int32_t y) {
  const int32_t left = std::max(0, -x), right = std::min(picture.width, width - x);
  for (int32_t row = std::max(0, -y); row < std::min(picture.height, height - y) && left < right; ++row)
    memcpy(at(x + left, y + row), picture.at(left, row), size_t(3) * size_t(right - left));
}

static std::string ascii(const std::string &text) {
  std::string out;
  for (unsigned char c : text) {
    if (c >= 0x20 && c < 0x7f) out += char(c);
    else if ((c & 0xc0) != 0x80) out += '?';  // once a character
  }
  return out;
}

int32_t canvas::text_width(const std::string &text, int32_t size) {
  std::string plain = ascii(text);
  return stb_easy_font_width(plain.data()) * size;
}

void canvas::write(const std::string &text, int32_t x, int32_t y, int32_t size, const rgb &colour) {
  struct corner {
    float x, y, z;
    uint8_t colour[4];
  };
  std::string plain = ascii(text);
  constexpr size_t most_quads = 40;  // of a character
  std::vector<corner> corners(4 * most_quads * (plain.size() + 1));
  const int quads = stb_easy_font_print(0, 0, plain.data(), nullptr, corners.data(), int(corners.size() * sizeof(corner)));
  for (int i = 0; i < quads; ++i) {
    const corner &first = corners[size_t(i) * 4], &last = corners[size_t(i) * 4 + 2];  // of a rectangle
    for (int32_t row = int32_t(first.y) * size; row < int32_t(last.y) * size; ++row) {
      for (int32_t column = int32_t(first.x) * size; column < int32_t(last.x) * size; ++column) {
        if (x + column < 0 || y + row < 0 || x + column >= width || y + row >= height) continue;
        uint8_t *p = at(x + column, y + row);
        p[0] = colour.r, p[1] = colour.g, p[2] = colour.b;
      }
    }
  }
}

rgb mix(const rgb &a, const rgb &b, double share) {
  const auto between = [&](uint8_t from, uint8_t to) { return uint8_t(std::lround(from + share * (to - from))); };
  return {between(a.r, b.r), between(a.g, b.g), between(a.b, b.b)};
}

canvas enlarged(const uint8_t *pixels, int32_t width, int32_t height, int32_t factor) {
  canvas out(width * factor, height * factor, {0, 0, 0});
  // The pixel that a place is behind the middle of, and how far.
  const auto place = [&](int32_t at, int32_t size, int32_t *low, int32_t *high) {
    const double from = std::clamp((at + 0.5) / factor - 0.5, 0.0, double(size - 1));
    *low = int32_t(from);
    *high = std::min(*low + 1, size - 1);
    return from - *low;
  };
  const auto value = [&](int32_t x, int32_t y, int c) {
    return double(pixels[3 * (size_t(y) * size_t(width) + size_t(x)) + size_t(c)]);
  };
  for (int32_t y = 0; y < out.height; ++y) {
    int32_t y0, y1, x0, x1;
    const double v = place(y, height, &y0, &y1);
    for (int32_t x = 0; x < out.width; ++x) {
      const double u = place(x, width, &x0, &x1);
      for (int c = 0; c < 3; ++c) {
        const double top = value(x0, y0, c) * (1 - u) + value(x1, y0, c) * u,
                     bottom = value(x0, y1, c) * (1 - u) + value(x1, y1, c) * u;
        out.at(x, y)[c] = uint8_t(std::lround(top * (1 - v) + bottom * v));
      }
    }
  }
  return out;
}

std::string png_of(const canvas &picture) {
  if (picture.width < 1 || picture.height < 1) fail("a picture without pixels");
  int length = 0;
  std::unique_ptr<uint8_t, releaser<free>> bytes(
      stbi_write_png_to_mem(picture.pixels.data(), 3 * picture.width, picture.width, picture.height, 3, &length));
  if (!bytes) throw std::bad_alloc();
  return {reinterpret_cast<const char *>(bytes.get()), size_t(length)};
}

std::string base64(std::string_view bytes) {
  const char *const digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    const size_t n = std::min<size_t>(3, bytes.size() - i);
    uint32_t group = 0;
    for (size_t j = 0; j < 3; ++j) group = group << 8 | (j < n ? uint32_t(static_cast<unsigned char>(bytes[i + j])) : 0);
    for (size_t j = 0; j < 4; ++j) out += j <= n ? digits[group >> (18 - 6 * j) & 63] : '=';
  }
  return out;
}
