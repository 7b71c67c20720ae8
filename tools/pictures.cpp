#include "pictures.h"

#include <algorithm>
#include <cmath>

namespace {

constexpr int side = 256;

// Numbers that depend on the seed alone, on every machine (xorshift: Marsaglia 2003).
class randomness {
 public:
  explicit randomness(uint32_t seed) : state_(seed * 2654435761u + 88172645u) {
    for (int i = 0; i < 8; ++i) next();
  }
  uint32_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 17;
    state_ ^= state_ << 5;
    return state_;
  }
  float unit() { return float(next() >> 8) / float(1 << 24); }
  float between(float low, float high) { return low + (high - low) * unit(); }
  int below(int n) { return int(next() % uint32_t(n)); }

 private:
  uint32_t state_;
};

// Smooth noise in [-1, 1]: random values on a grid of `cell` pixels, blended between them; octaves of half the cell and `fall` of
// the height are added.
std::vector<float> noise(randomness *random, int cell, float fall) {
  std::vector<float> sum(size_t(side) * side);
  float height = 1, total = 0;
  for (; cell >= 1; cell /= 2, height *= fall) {
    const int points = side / cell + 2;
    std::vector<float> grid(size_t(points) * size_t(points));
    for (float &v : grid) v = random->between(-1, 1);
    total += height;
    for (int y = 0; y < side; ++y)
      for (int x = 0; x < side; ++x) {
        const int gx = x / cell, gy = y / cell;
        const auto smooth = [](float t) { return t * t * (3 - 2 * t); };
        const float tx = smooth(float(x % cell) / float(cell)), ty = smooth(float(y % cell) / float(cell));
        const float *g = grid.data() + gy * points + gx;
        const float top = g[0] + (g[1] - g[0]) * tx, bottom = g[points] + (g[points + 1] - g[points]) * tx;
        sum[size_t(y) * side + size_t(x)] += height * (top + (bottom - top) * ty);
      }
  }
  for (float &v : sum) v /= total;
  return sum;
}

struct colour {
  float r, g, b;
};

class painter {
 public:
  explicit painter(uint32_t seed) : random_(seed), image_(size_t(side) * side, colour{}) {}

  picture paint() {
    texture all = random_texture();
    for (int y = 0; y < side; ++y)
      for (int x = 0; x < side; ++x) put(all, x, y);
    for (int i = 3 + random_.below(9); i > 0; --i) shape();
    picture result;
    result.width = result.height = side;
    for (const colour &c : image_)
      for (const float v : {c.r, c.g, c.b}) result.rgb.push_back(uint8_t(std::clamp(v * 255, 0.0f, 255.0f)));
    return result;
  }

 private:
  struct texture {
    colour from, to;
    std::vector<float> pattern;
  };

  colour random_colour() {
    const float light = random_.unit(), spread = random_.between(0.05f, 0.4f);
    const auto channel = [&] { return std::clamp(light + random_.between(-spread, spread), 0.0f, 1.0f); };
    return {channel(), channel(), channel()};
  }

  texture random_texture() {
    const int cells[] = {4, 8, 16, 32, 64, 128};
    return {random_colour(), random_colour(), noise(&random_, cells[random_.below(6)], random_.between(0.35f, 0.75f))};
  }

  void put(const texture &t, int x, int y) {
    const float p = std::clamp(0.5f + t.pattern[size_t(y) * side + size_t(x)] * 1.2f, 0.0f, 1.0f);
    const auto mix = [&](float a, float b) { return a + (b - a) * p; };
    image_[size_t(y) * side + size_t(x)] = {mix(t.from.r, t.to.r), mix(t.from.g, t.to.g), mix(t.from.b, t.to.b)};
  }

  // An ellipse, a rectangle or a band, turned.
  void shape() {
    const texture t = random_texture();
    const float cx = random_.between(0, side), cy = random_.between(0, side), turn = random_.between(0, 3.14159265f),
                a = random_.between(6, 90), b = a * random_.between(0.15f, 1), c = std::cos(turn), s = std::sin(turn);
    const int kind = random_.below(3);
    for (int y = 0; y < side; ++y)
      for (int x = 0; x < side; ++x) {
        const float dx = float(x) - cx, dy = float(y) - cy, u = (dx * c + dy * s) / a, v = (dy * c - dx * s) / b;
        const bool inside = kind == 0 ? u * u + v * v < 1 : kind == 1 ? std::fabs(u) < 1 && std::fabs(v) < 1 : std::fabs(v) < 0.3f;
        if (inside) put(t, x, y);
      }
  }

  randomness random_;
  std::vector<colour> image_;
};

}  // namespace

std::vector<picture> make_pictures(size_t n, uint32_t first) {
  std::vector<picture> result;
  for (size_t i = 0; i < n; ++i) result.push_back(painter(first + uint32_t(i)).paint());
  return result;
}

std::vector<rs_image> views_of(const std::vector<picture> &pictures) {
  std::vector<rs_image> views;
  for (const picture &p : pictures) views.push_back(p.view());
  return views;
}
