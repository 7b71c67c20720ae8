#include "colour.h"

#include <algorithm>
#include <cmath>

namespace {

using triple = std::array<double, 3>;

// Björn Ottosson's OKLab, to linear sRGB.
triple linear_srgb(double lightness, double a, double b) {
  double l = lightness + 0.3963377774 * a + 0.2158037573 * b;
  double m = lightness - 0.1055613458 * a - 0.0638541728 * b;
  double s = lightness - 0.0894841775 * a - 1.2914855480 * b;
  l = l * l * l, m = m * m * m, s = s * s * s;
  return {4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s, -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
          -0.0041960863 * l - 0.7034186147 * m + 1.7076147010 * s};
}

bool shown(const triple &colour) {
  constexpr double slack = 1e-4;
  return std::all_of(colour.begin(), colour.end(), [](double v) { return v >= -slack && v <= 1 + slack; });
}

uint8_t encoded(double v) {
  v = std::clamp(v, 0.0, 1.0);
  v = v <= 0.0031308 ? 12.92 * v : 1.055 * std::pow(v, 1 / 2.4) - 0.055;
  return uint8_t(std::lround(v * 255));
}

}  // namespace

rgb oklch(double lightness, double chroma, double hue) {
  const double angle = hue * 3.14159265358979323846 / 180;
  triple colour = linear_srgb(lightness, chroma * std::cos(angle), chroma * std::sin(angle));
  while (!shown(colour) && chroma > 0.001) {
    chroma *= 0.97;
    colour = linear_srgb(lightness, chroma * std::cos(angle), chroma * std::sin(angle));
  }
  return {encoded(colour[0]), encoded(colour[1]), encoded(colour[2])};
}

rgb ramp(double share, double lightness) {
  constexpr double indigo = 278, amber = 360 + 68, chroma = 0.17;
  return oklch(lightness, chroma, indigo + std::clamp(share, 0.0, 1.0) * (amber - indigo));
}

int terminal_colour(const rgb &colour) {
  const int steps[] = {0, 95, 135, 175, 215, 255};
  const auto nearest = [&](int v) {
    return int(
        std::min_element(std::begin(steps), std::end(steps), [v](int a, int b) { return std::abs(a - v) < std::abs(b - v); }) -
        std::begin(steps));
  };
  return 16 + 36 * nearest(colour.r) + 6 * nearest(colour.g) + nearest(colour.b);
}
