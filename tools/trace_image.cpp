// A trace of an image: as pictures, JSON, a page, and for a terminal.
#include "markup.h"
#include "output.h"
#include "trace.h"

#include <algorithm>
#include <cmath>

std::vector<int32_t> traced_image::left_at() const {
  std::vector<int32_t> left(length(), -1);
  for (const traced_layer &layer : layers)
    for (size_t i = 0; i < layer.positions.size(); ++i)
      if (!layer.kept[i] && layer.positions[i] >= 0) left.at(size_t(layer.positions[i])) = layer.layer;
  return left;
}

namespace {

using ordered = nlohmann::ordered_json;

constexpr rgb ground = {246, 244, 240}, ink = {46, 43, 38}, faint = {122, 116, 106};

// ---------------------------------------------------------------------------------------------- pictures

// Where a token is after a number of layers: its own position, or with merge that of the token that it became part of.
std::vector<int32_t> roots_after(const traced_image &trace, size_t layers) {
  std::vector<int32_t> root(trace.length());
  for (size_t i = 0; i < root.size(); ++i) root[i] = int32_t(i);
  for (size_t k = 0; k < layers; ++k) {
    const traced_layer &layer = trace.layers[k];
    std::vector<int32_t> to(root.size(), -1);
    for (size_t i = 0; i < layer.into.size(); ++i)
      if (layer.positions[i] >= 0) to[size_t(layer.positions[i])] = layer.into[i];
    for (int32_t &r : root)
      if (to[size_t(r)] >= 0) r = to[size_t(r)];
  }
  return root;
}

// Neighbours in the list of positions get hues that are far from each other.
rgb group_colour(int32_t position) { return oklch(0.66, 0.16, std::fmod(40 + 137.508 * position, 360)); }

rgb pixel(const canvas &c, int32_t x, int32_t y) {
  const uint8_t *p = c.at(x, y);
  return {p[0], p[1], p[2]};
}

rgb grey(const rgb &c) {
  const auto v = uint8_t(std::lround(0.299 * c.r + 0.587 * c.g + 0.114 * c.b));
  return {v, v, v};
}

template <class Paint>
void repaint(canvas *panel, int32_t x0, int32_t y0, int32_t side, Paint paint) {
  for (int32_t y = y0; y < y0 + side; ++y) {
    for (int32_t x = x0; x < x0 + side; ++x) {
      const rgb c = paint(pixel(*panel, x, y));
      uint8_t *p = panel->at(x, y);
      p[0] = c.r, p[1] = c.g, p[2] = c.b;
    }
  }
}

int32_t enlargement(const traced_image &trace) {
  constexpr int32_t comfortable = 300;
  const int32_t side = std::max(trace.pixel_width(), trace.pixel_height());
  return std::max(1, (comfortable + side / 2) / side);
}

// The image after `layers` of the layers that drop; of none, as it is.
canvas panel_after(const traced_image &trace, const trace_setting &setting, const canvas &whole, size_t layers) {
  canvas panel = whole;
  if (layers == 0) return panel;
  const traced_layer &last = trace.layers[layers - 1];
  const bool merged = !last.into.empty();
  const std::vector<int32_t> left = trace.left_at(), root = roots_after(trace, layers);
  std::vector<int32_t> members(trace.length(), 0);
  for (int32_t r : root) ++members[size_t(r)];
  const rgb now = ramp(share_of(setting, last.layer), 0.65);
  const int32_t side = trace.patch * (whole.width / trace.pixel_width());
  for (int32_t row = 0; row < trace.shape.rows; ++row) {
    for (int32_t column = 0; column < trace.shape.columns; ++column) {
      const auto token = size_t(trace.shape.prefix + row * trace.shape.columns + column);
      const bool gone = left[token] >= 0 && left[token] <= last.layer;
      const auto paint = [&](auto with) { repaint(&panel, column * side, row * side, side, with); };
      if (merged && members[size_t(root[token])] > 1) {  // what became one has one colour
        const rgb colour = group_colour(root[token]);
        paint([&](const rgb &c) { return mix(c, colour, gone ? 0.62 : 0.38); });
      } else if (gone) {  // what leaves here is told from what left before
        const rgb paper = left[token] == last.layer ? mix(ground, now, 0.3) : mix(ground, ink, 0.06);
        paint([&](const rgb &c) { return mix(grey(c), paper, 0.84); });
      }
    }
  }
  return panel;
}

std::string caption(const traced_image &trace, const traced_layer &layer) {
  return format("layer %d: %zu of %zu", layer.layer, layer.kept_count(), trace.length());
}

std::string file_name(const std::string &path) {
  const size_t slash = path.find_last_of('/', path.size() - 1);
  return slash == std::string::npos || slash + 1 == path.size() ? path : path.substr(slash + 1);
}

canvas whole_panel(const traced_image &trace) {
  return enlarged(trace.rgb.data(), trace.pixel_width(), trace.pixel_height(), enlargement(trace));
}

}  // namespace

size_t picture_bytes(const traced_image &trace) {
  const auto factor = size_t(enlargement(trace));
  return (trace.layers.size() + 1) * trace.rgb.size() * factor * factor;
}

canvas trace_picture(const traced_image &trace, const trace_setting &setting) {
  constexpr int32_t margin = 28, gap = 16, below = 32, font = 2;
  constexpr size_t most_columns = 5;
  const canvas whole = whole_panel(trace);
  const size_t n = trace.layers.size() + 1, rows = (n + most_columns - 1) / most_columns, columns = (n + rows - 1) / rows;
  const int32_t across = whole.width + gap, down = whole.height + below + gap;
  canvas page(2 * margin - gap + across * int32_t(columns), 2 * margin - gap + down * int32_t(rows), ground);
  const auto label = [&](std::string text, int32_t x, int32_t y, const rgb &colour) {
    const int32_t size = canvas::text_width(text, font) <= whole.width ? font : 1;
    while (text.size() > 1 && canvas::text_width(text, size) > whole.width) text.pop_back();
    page.write(text, x, y, size, colour);
  };
  for (size_t i = 0; i < n; ++i) {
    const int32_t x = margin + across * int32_t(i % columns), y = margin + down * int32_t(i / columns);
    page.put(panel_after(trace, setting, whole, i), x, y);
    if (i == 0) label(file_name(trace.path), x, y + whole.height + 8, faint);
    else label(caption(trace, trace.layers[i - 1]), x, y + whole.height + 8, ink);
  }
  return page;
}

// ---------------------------------------------------------------------------------------------- JSON

std::string trace_json(const traced_image &trace, const trace_setting &setting) {
  ordered root;
  warn_of_name(trace.path);
  root["image"] = trace.path;
  root["size"] = {trace.shape.width, trace.shape.height};
  root["patch"] = trace.patch;
  root["grid"] = {trace.shape.rows, trace.shape.columns};
  root["prefix"] = trace.shape.prefix;
  root["left_at"] = ordered::array();
  for (int32_t layer : trace.left_at()) root["left_at"].push_back(layer < 0 ? ordered() : ordered(layer));
  root["kept"] = trace.kept;
  root["layers"] = ordered::array();
  for (const traced_layer &layer : trace.layers) root["layers"].push_back(layer_json(layer, nullptr));
  root["saved"] = trace.saved(setting.layers);
  root["schedule"] = setting.json;
  return with_id(trace.id, root) + "\n";
}

// ---------------------------------------------------------------------------------------------- terminal

namespace {

// The layers that drop as a letter each, which no one takes for the layer's number.
char mark_of(const trace_setting &setting, int32_t layer) {
  const auto index = std::find(setting.drops.begin(), setting.drops.end(), layer) - setting.drops.begin();
  const std::string marks = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
  return marks[std::min(size_t(index), marks.size() - 1)];
}

std::string terminal_rgb(const rgb &c, colours how, bool behind) {
  const int what = behind ? 48 : 38;
  return how == colours::full ? format("\033[%d;2;%d;%d;%dm", what, c.r, c.g, c.b)
                              : format("\033[%d;5;%dm", what, terminal_colour(c));
}

// The mean of a part of the image.
rgb mean_colour(const traced_image &trace, int32_t x0, int32_t x1, int32_t y0, int32_t y1) {
  double sum[3] = {0, 0, 0};
  for (int32_t y = y0; y < y1; ++y)
    for (int32_t x = x0; x < x1; ++x)
      for (size_t c = 0; c < 3; ++c) sum[c] += trace.rgb[3 * (size_t(y) * size_t(trace.pixel_width()) + size_t(x)) + c];
  const double n = double(x1 - x0) * (y1 - y0);
  const auto byte = [&](size_t c) { return uint8_t(std::lround(sum[c] / n)); };
  return {byte(0), byte(1), byte(2)};
}

// Two dots a line and patch: the upper half of a character is its own colour, the lower one that behind it.
std::string painted_grid(const traced_image &trace, const trace_setting &setting, colours how) {
  const std::vector<int32_t> left = trace.left_at();
  const int32_t dots = trace.shape.columns > 32 ? 1 : 2;  // of a patch, across and down
  const int32_t columns = trace.shape.columns * dots, rows = trace.shape.rows * dots;
  const auto dot = [&](int32_t x, int32_t y, bool dropped) {
    const int32_t layer = left[size_t(trace.shape.prefix + y / dots * trace.shape.columns + x / dots)];
    if (dropped && layer >= 0) return ramp(share_of(setting, layer), 0.65);
    const auto edge = [&](int32_t i) { return i * trace.patch / dots; };
    return mean_colour(trace, edge(x), std::max(edge(x + 1), edge(x) + 1), edge(y), std::max(edge(y + 1), edge(y) + 1));
  };
  std::string out;
  for (int32_t y = 0; y < rows; y += 2) {
    for (bool dropped : {false, true}) {
      for (int32_t x = 0; x < columns; ++x) {
        out += terminal_rgb(dot(x, y, dropped), how, false);
        if (y + 1 < rows) out += terminal_rgb(dot(x, y + 1, dropped), how, true);
        out += "\xe2\x96\x80";
        if (y + 1 == rows) out += "\033[0m";
      }
      out += dropped ? "\033[0m\n" : "\033[0m  ";
    }
  }
  return out;
}

std::string plain_grid(const traced_image &trace, const trace_setting &setting) {
  const std::vector<int32_t> left = trace.left_at();
  std::string out;
  for (int32_t row = 0; row < trace.shape.rows; ++row) {
    for (int32_t column = 0; column < trace.shape.columns; ++column) {
      const int32_t layer = left[size_t(trace.shape.prefix + row * trace.shape.columns + column)];
      if (column > 0) out += ' ';
      if (layer < 0) out += "\xe2\x96\xa0";  // a black square
      else out += mark_of(setting, layer);
    }
    out += '\n';
  }
  return out;
}

}  // namespace

std::string trace_legend_of_images(const trace_setting &setting, colours how) {
  std::string out = how == colours::none ? "\xe2\x96\xa0 stayed" : "as it is: stayed";
  for (int32_t layer : setting.drops) {
    const std::string name = "left at layer " + std::to_string(layer);
    if (how == colours::none) out += std::string("  ") + mark_of(setting, layer) + " " + name;
    else out += "  " + terminal_rgb(ramp(share_of(setting, layer), 0.65), how, false) + name + "\033[0m";
  }
  return setting.schedule + "\n" + out + "\n";
}

std::string trace_terminal(const traced_image &trace, const trace_setting &setting, colours how) {
  const std::string grid = how == colours::none ? plain_grid(trace, setting) : painted_grid(trace, setting, how);
  return visible(one_line(trace.path, 200)) + "\n" + grid + "\n" + layer_lines(trace, setting);
}

// ---------------------------------------------------------------------------------------------- page

namespace {

const char *const style = R"css(
:root{--bg:#fbf9f5;--card:#fffdfa;--ink:#211f1b;--soft:#6f6a60;--line:#e6e1d6;color-scheme:light}
@media(prefers-color-scheme:dark){:root{--bg:#131315;--card:#1a1a1d;--ink:#f1eee7;--soft:#98938a;--line:#2d2c30;color-scheme:dark}}
header,main,footer{max-width:1400px;margin:0 auto;padding:0 28px}
code{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
article{margin:30px 0;background:var(--card);border:1px solid var(--line);border-radius:14px;padding:26px 30px 28px}
h2{margin:0 0 14px;font-size:13px;font-weight:500;color:var(--soft);display:flex;gap:18px;flex-wrap:wrap}
h2 b{color:var(--ink);font-weight:600}
.row{display:flex;flex-wrap:wrap;gap:18px}
figure{margin:0;width:232px}
figcaption{font-size:13px;margin:6px 0 10px;display:flex;justify-content:space-between}
figcaption b{font-weight:600;color:var(--c)}
figcaption span{color:var(--soft)}
.pic{position:relative;line-height:0;cursor:crosshair}
.pic img{width:100%;border-radius:5px;display:block}
.heat img{image-rendering:pixelated}
.pic i{position:absolute;display:none;outline:2px solid #fff;box-shadow:0 0 0 3px #0009;pointer-events:none}
.scale{display:flex;align-items:center;gap:8px;color:var(--soft);font-size:12px;margin-top:4px}
.scale i{flex:1;height:5px;border-radius:3px}
#tip{position:fixed;z-index:3;pointer-events:none;background:var(--ink);color:var(--bg);border-radius:9px;padding:9px 13px;font-size:13px;line-height:1.45;opacity:0;transition:opacity .12s;box-shadow:0 6px 24px #0003}
@media(max-width:700px){article{padding:18px}.facts{margin-left:0}.facts div{text-align:left}}
@media print{article{break-inside:avoid}}
)css";

const char *const script = R"js(
'use strict';
const data = JSON.parse(document.getElementById('data').textContent), tip = document.getElementById('tip');
const make = (name, text, parent) => { const e = document.createElement(name); e.textContent = text; parent.append(e); return e; };
document.querySelectorAll('article').forEach((box, n) => {
  const t = data.images[n], pics = [...box.querySelectorAll('.pic')];
  const at = t.layers.map(l => new Map(l.p.map((p, j) => [p, j])));
  const rank = t.layers.map(l => { const r = []; l.s.map((v, j) => [v, j]).sort((x, y) => y[0] - x[0]).forEach((x, k) => r[x[1]] = k + 1); return r; });
  const name = p => p < t.prefix ? 'token ' + p : 'row ' + Math.floor((p - t.prefix) / t.columns) + ', column ' + (p - t.prefix) % t.columns;
  const hide = () => { tip.style.opacity = 0; pics.forEach(p => p.lastElementChild.style.display = 'none'); };
  pics.forEach(pic => {
    pic.onpointerleave = hide;
    pic.onpointermove = e => {
      const b = pic.getBoundingClientRect(), clip = (v, m) => Math.max(0, Math.min(m - 1, Math.floor(v)));
      const x = clip((e.clientX - b.left) / b.width * t.columns, t.columns), y = clip((e.clientY - b.top) / b.height * t.rows, t.rows);
      const p = t.prefix + y * t.columns + x;
      for (const other of pics) {
        const s = other.lastElementChild.style;
        s.display = 'block'; s.left = 100 * x / t.columns + '%'; s.top = 100 * y / t.rows + '%';
        s.width = 100 / t.columns + '%'; s.height = 100 / t.rows + '%';
      }
      tip.textContent = '';
      make('b', name(p), tip);
      make('div', t.left[p] < 0 ? 'stayed' : 'left at layer ' + t.left[p], tip);
      const table = make('table', '', tip);
      t.layers.forEach((l, k) => {
        const j = at[k].get(p);
        if (j === undefined) return;
        const row = make('tr', '', table);
        make('td', 'layer ' + l.layer, row);
        make('td', 'score ' + (+l.s[j]).toPrecision(3), row);
        make('td', rank[k][j] + ' of ' + l.p.length, row);
        if (l.i && l.k[j] === '0') make('td', 'joined ' + name(l.i[j]), row);
      });
      const size = tip.getBoundingClientRect();
      tip.style.left = Math.max(8, Math.min(e.clientX + 16, innerWidth - size.width - 8)) + 'px';
      tip.style.top = (e.clientY + 22 + size.height > innerHeight ? e.clientY - size.height - 14 : e.clientY + 22) + 'px';
      tip.style.opacity = 1;
    };
  });
});
)js";

// A dot a patch: from indigo, the lowest score, to amber; patches that are gone already have no colour.  One patch often scores far
// off, and would flatten all others: the scale goes by ranks.
canvas heat_map(const traced_image &trace, const traced_layer &layer) {
  canvas map(trace.shape.columns, trace.shape.rows, {128, 128, 128});
  std::vector<std::pair<float, int32_t>> order;
  for (size_t i = 0; i < layer.positions.size(); ++i)
    if (layer.positions[i] >= trace.shape.prefix) order.emplace_back(layer.scores[i], layer.positions[i] - trace.shape.prefix);
  std::sort(order.begin(), order.end());
  for (size_t i = 0; i < order.size(); ++i) {
    const rgb c = ramp(order.size() > 1 ? double(i) / double(order.size() - 1) : 0, 0.65);
    uint8_t *p = map.at(order[i].second % trace.shape.columns, order[i].second / trace.shape.columns);
    p[0] = c.r, p[1] = c.g, p[2] = c.b;
  }
  return map;
}

class image_page {
 public:
  image_page(const std::vector<traced_image> &traces, const trace_setting &setting) : traces_(traces), setting_(setting) {}

  std::string str() {
    const page_frame frame = {"",
                              "img-src data:; ",
                              style,
                              "Which patches left, and when",
                              "image",
                              "Above: what each layer leaves; with merge, patches that became one have one colour. Below: the "
                              "scores that decided, by rank.",
                              script};
    out_ = page_begin(frame, sequences_of(traces_), setting_) + "<main>\n";
    for (const traced_image &trace : traces_) article(trace);
    return out_ + page_end(frame, payload());
  }

 private:
  void picture(const char *kind, const canvas &panel, const std::string &what) {
    out_ += std::string("<div class=\"pic") + kind + "\"><img alt=\"" + markup(what) + "\" src=\"data:image/png;base64," +
            base64(png_of(panel)) + "\"><i></i></div>";
  }

  void article(const traced_image &trace) {
    out_ += "<article>\n<h2><b>" + markup(one_line(trace.path, 80)) + "</b><span>" +
            format(
                "%d&times;%d patches of %d</span><span>%zu &rarr; %zu tokens</span><span>%.0f&thinsp;%% of the token-layers "
                "saved</span></h2>\n<div class=\"row\">\n",
                trace.shape.columns, trace.shape.rows, trace.patch, trace.length(), trace.kept.size(),
                100 * trace.saved(setting_.layers));
    const canvas whole = whole_panel(trace);
    out_ += "<figure>";
    picture("", whole, "the image as the model gets it");
    out_ +=
        format("<figcaption>as the model gets it<span>%d&times;%d</span></figcaption>", trace.pixel_width(), trace.pixel_height()) +
        "<div class=\"scale\">low<i style=\"background:linear-gradient(90deg";
    constexpr int steps = 8;
    for (int i = 0; i <= steps; ++i) out_ += "," + ramp(double(i) / steps, 0.65).hex();
    out_ += ")\"></i>high score</div></figure>\n";
    for (size_t i = 0; i < trace.layers.size(); ++i) {
      const traced_layer &layer = trace.layers[i];
      out_ += "<figure>";
      picture("", panel_after(trace, setting_, whole, i + 1), caption(trace, layer));
      out_ += format("<figcaption><b style=\"--c:%s\">layer %d</b><span>%zu of %zu</span></figcaption>",
                     ramp(share_of(setting_, layer.layer), 0.65).hex().c_str(), layer.layer, layer.kept_count(), trace.length());
      picture(" heat", heat_map(trace, layer), "scores");
      out_ += "</figure>\n";
    }
    out_ += "</div>\n</article>\n";
  }

  ordered payload() const {
    ordered root = {{"images", ordered::array()}};
    for (const traced_image &trace : traces_) {
      root["images"].push_back({{"columns", trace.shape.columns},
                                {"rows", trace.shape.rows},
                                {"prefix", trace.shape.prefix},
                                {"left", trace.left_at()},
                                {"layers", page_layers(trace)}});
    }
    return root;
  }

  const std::vector<traced_image> &traces_;
  const trace_setting &setting_;
  std::string out_;
};

}  // namespace

std::string trace_html(const std::vector<traced_image> &traces, const trace_setting &setting) {
  return image_page(traces, setting).str();
}
