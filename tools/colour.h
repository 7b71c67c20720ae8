// Colours that are told apart by eye: equal steps of a ramp look equally far from each other.
#pragma once
#include "common.h"

#include <array>
#include <cstdint>

struct rgb {
  uint8_t r, g, b;
  std::string hex() const { return format("#%02x%02x%02x", r, g, b); }
};

// A colour by lightness (0 to 1), chroma and hue in degrees of OKLCH; chroma is lowered until a screen can show it.
rgb oklch(double lightness, double chroma, double hue);

// From indigo (0) over magenta to amber (1), all of the same lightness: readable on a dark ground where that is high, on a light
// one where it is low, and on both at about 0.65.
rgb ramp(double share, double lightness);

// The nearest colour of the 6 x 6 x 6 cube that terminals of 256 colours have.
int terminal_colour(const rgb &colour);
