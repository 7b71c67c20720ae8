// Plots as SVG: points and lines over two axes, for light and dark pages.
#pragma once
#include "common.h"

#include <cstdint>

struct chart_point {
  double x, y;
  std::string title;  // shown where the pointer rests on it
  std::string label;  // written beside it; empty: nothing
};

struct chart_series {
  std::string name;  // in the legend; empty: not there
  double hue = 0;    // 0 to 1 along the ramp of colour.h; below 0: grey
  bool line = false, faint = false;
  std::vector<chart_point> points;
};

struct chart_rule {  // a dashed line across
  bool horizontal;
  double at;
  std::string label;
};

struct chart {
  std::string title, subtitle, x_label, y_label;
  std::vector<chart_series> series;
  std::vector<chart_rule> rules;
  int width = 760, height = 460;
};

// Points that are not numbers are left out.
std::string chart_svg(const chart &chart);

// Round numbers from `low` to `high`, some five of them.
std::vector<double> chart_ticks(double low, double high);
