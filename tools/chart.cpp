#include "chart.h"

#include "colour.h"
#include "markup.h"

#include <algorithm>
#include <cmath>

namespace {

constexpr int left = 68, right = 26, bottom = 54, top_bare = 20;

struct range {
  double low = INFINITY, high = -INFINITY;
  void add(double v) {
    if (!std::isfinite(v)) return;
    low = std::min(low, v);
    high = std::max(high, v);
  }
  // Some air on both sides, and never empty.
  void widen() {
    if (!(low <= high)) low = 0, high = 1;
    double air = high > low ? (high - low) * 0.06 : std::max(std::fabs(high) * 0.1, 1e-6);
    low -= air;
    high += air;
  }
};

// As many digits as the steps of an axis need.
std::string tick_text(double value, double step) {
  constexpr int most = 9;
  int digits = 0;
  while (digits < most && std::fabs(step - std::round(step)) > 1e-6 * step) step *= 10, ++digits;
  return format("%.*f", digits, value);
}

class plot {
 public:
  explicit plot(const chart &chart) : chart_(chart) {
    for (const chart_series &series : chart.series)
      for (const chart_point &p : series.points)
        if (std::isfinite(p.x) && std::isfinite(p.y)) x_.add(p.x), y_.add(p.y);
    for (const chart_rule &rule : chart.rules) (rule.horizontal ? y_ : x_).add(rule.at);
    x_.widen();
    y_.widen();
    top_ = top_bare + (chart.title.empty() ? 0 : 24) + (chart.subtitle.empty() ? 0 : 18) + (has_legend() ? 26 : 0);
  }

  std::string str() {
    out_ = format("<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" height=\"%d\" role=\"img\">\n",
                  chart_.width, chart_.height, chart_.width, chart_.height);
    out_ += "<title>" + markup(chart_.title) + "</title>\n" + style();
    out_ += format("<rect class=\"page\" width=\"%d\" height=\"%d\"/>\n", chart_.width, chart_.height);
    headings();
    axes();
    for (const chart_rule &rule : chart_.rules) draw(rule);
    for (size_t i = 0; i < chart_.series.size(); ++i) draw(chart_.series[i], i);
    return out_ + "</svg>\n";
  }

 private:
  bool has_legend() const {
    return std::any_of(chart_.series.begin(), chart_.series.end(), [](const chart_series &s) { return !s.name.empty(); });
  }

  double px(double x) const { return left + (x - x_.low) / (x_.high - x_.low) * (chart_.width - left - right); }
  double py(double y) const { return chart_.height - bottom - (y - y_.low) / (y_.high - y_.low) * (chart_.height - bottom - top_); }

  std::string style() const {
    std::string light, dark;
    for (size_t i = 0; i < chart_.series.size(); ++i) {
      const double hue = chart_.series[i].hue;
      light += format(".s%zu{--c:%s}", i, (hue < 0 ? oklch(0.6, 0, 0) : ramp(hue, 0.55)).hex().c_str());
      dark += format(".s%zu{--c:%s}", i, (hue < 0 ? oklch(0.62, 0, 0) : ramp(hue, 0.74)).hex().c_str());
    }
    return "<style>svg{--page:#fffdfa;--ink:#211f1b;--soft:#6f6a60;--line:#e9e4da}" + light +
           "@media(prefers-color-scheme:dark){svg{--page:#1a1a1d;--ink:#f1eee7;--soft:#98938a;--line:#2d2c30}" + dark +
           "}text{font:12px system-ui,-apple-system,\"Segoe UI\",Roboto,\"Noto Sans\",sans-serif;fill:var(--soft)}"
           ".page{fill:var(--page)}.head{font-size:17px;font-weight:600;fill:var(--ink)}.grid{stroke:var(--line)}"
           ".axis{stroke:var(--soft)}.rule{stroke:var(--soft);stroke-dasharray:4 4}.path{fill:none;stroke:var(--c);stroke-width:2;"
           "stroke-linejoin:round}.dot{fill:var(--c);stroke:var(--page);stroke-width:1.5}.faint{opacity:.4}"
           ".label{fill:var(--ink);font-weight:600}</style>\n";
  }

  void text(double x, double y, const char *more, const std::string &what) {
    out_ += format("<text x=\"%.1f\" y=\"%.1f\"%s>", x, y, more) + markup(what) + "</text>\n";
  }

  void headings() {
    double y = top_bare + 6;
    if (!chart_.title.empty()) text(left, y, " class=\"head\"", chart_.title), y += 20;
    if (!chart_.subtitle.empty()) text(left, y, "", chart_.subtitle), y += 20;
    if (!has_legend()) return;
    // Letters of this size are seven pixels wide, more or less.
    double x = left;
    for (size_t i = 0; i < chart_.series.size(); ++i) {
      const std::string &name = chart_.series[i].name;
      if (name.empty()) continue;
      out_ += format("<circle class=\"dot s%zu\" cx=\"%.1f\" cy=\"%.1f\" r=\"4.5\"/>\n", i, x + 4, y);
      text(x + 14, y + 4, "", name);
      x += 34 + 7 * double(name.size());
    }
  }

  void axes() {
    const double base = chart_.height - bottom;
    std::vector<double> xs = chart_ticks(x_.low, x_.high), ys = chart_ticks(y_.low, y_.high);
    for (double y : ys) {
      out_ += format("<path class=\"grid\" d=\"M%d %.1fH%d\"/>\n", left, py(y), chart_.width - right);
      text(left - 9, py(y) + 4, " text-anchor=\"end\"", tick_text(y, ys.size() > 1 ? ys[1] - ys[0] : 0));
    }
    for (double x : xs) {
      out_ += format("<path class=\"axis\" d=\"M%.1f %.1fv5\"/>\n", px(x), base);
      text(px(x), base + 19, " text-anchor=\"middle\"", tick_text(x, xs.size() > 1 ? xs[1] - xs[0] : 0));
    }
    out_ += format("<path class=\"axis\" d=\"M%d %.1fH%d\"/>\n", left, base, chart_.width - right);
    text((left + chart_.width - right) / 2.0, chart_.height - 14, " text-anchor=\"middle\"", chart_.x_label);
    const double middle = (top_ + base) / 2;
    out_ += format("<text text-anchor=\"middle\" transform=\"translate(18 %.1f) rotate(-90)\">", middle) + markup(chart_.y_label) +
            "</text>\n";
  }

  void draw(const chart_rule &rule) {
    if (!std::isfinite(rule.at)) return;
    const double base = chart_.height - bottom;
    if (rule.horizontal) {
      out_ += format("<path class=\"rule\" d=\"M%d %.1fH%d\"/>\n", left, py(rule.at), chart_.width - right);
      text(chart_.width - right, py(rule.at) - 6, " text-anchor=\"end\"", rule.label);
    } else {
      out_ += format("<path class=\"rule\" d=\"M%.1f %dV%.1f\"/>\n", px(rule.at), top_, base);
      text(px(rule.at) + 6, top_ + 12, "", rule.label);
    }
  }

  void draw(const chart_series &series, size_t number) {
    std::string path;
    for (const chart_point &p : series.points)
      if (std::isfinite(p.x) && std::isfinite(p.y)) path += format("%c%.1f %.1f", path.empty() ? 'M' : 'L', px(p.x), py(p.y));
    const char *faint = series.faint ? " faint" : "";
    if (series.line && !path.empty()) out_ += format("<path class=\"path s%zu%s\" d=\"", number, faint) + path + "\"/>\n";
    for (const chart_point &p : series.points) {
      if (!std::isfinite(p.x) || !std::isfinite(p.y)) continue;
      out_ += format("<circle class=\"dot s%zu%s\" cx=\"%.1f\" cy=\"%.1f\" r=\"%s\"><title>", number, faint, px(p.x), py(p.y),
                     series.faint ? "3.5" : "5.5") +
              markup(p.title) + "</title></circle>\n";
      if (!p.label.empty()) text(px(p.x) - 9, py(p.y) + 18, " text-anchor=\"end\" class=\"label\"", p.label);
    }
  }

  const chart &chart_;
  range x_, y_;
  int top_;
  std::string out_;
};

}  // namespace

std::vector<double> chart_ticks(double low, double high) {
  std::vector<double> ticks;
  if (!std::isfinite(low) || !std::isfinite(high) || !(high > low)) return ticks;
  constexpr int wanted = 6;
  const double rough = (high - low) / wanted, power = std::pow(10, std::floor(std::log10(rough)));
  double step = 10 * power;
  for (double nice : {1.0, 2.0, 2.5, 5.0}) {
    if (nice * power >= rough) {
      step = nice * power;
      break;
    }
  }
  for (double i = std::ceil(low / step); i * step <= high; ++i) ticks.push_back(i * step + 0.0);  // one zero
  return ticks;
}

std::string chart_svg(const chart &chart) { return plot(chart).str(); }
