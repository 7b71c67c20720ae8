// A trace as one page that needs nothing else.  The texts are plain HTML, each token a span with the class of the layer that it
// left at, so that the page can be read and searched without its script; that moves through the layers, and draws the scores.
#include "colour.h"
#include "markup.h"
#include "trace.h"

#include <algorithm>
#include <cmath>

namespace {

using ordered = nlohmann::ordered_json;

const char *const style = R"css(
:root{--bg:#fbf9f5;--card:#fffdfa;--ink:#211f1b;--soft:#6f6a60;--line:#e6e1d6;--bar:#cfc8ba;color-scheme:light}
@media(prefers-color-scheme:dark){:root:not([data-theme=light]){--bg:#131315;--card:#1a1a1d;--ink:#f1eee7;--soft:#98938a;--line:#2d2c30;--bar:#4a474d;color-scheme:dark}}
:root[data-theme=dark]{--bg:#131315;--card:#1a1a1d;--ink:#f1eee7;--soft:#98938a;--line:#2d2c30;--bar:#4a474d;color-scheme:dark}
header,main,footer{max-width:1180px;margin:0 auto;padding:0 28px}
header code{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
nav{position:sticky;top:0;z-index:2;margin-top:22px;background:color-mix(in srgb,var(--bg) 88%,transparent);backdrop-filter:blur(10px);border-bottom:1px solid var(--line)}
nav>div{max-width:1180px;margin:0 auto;padding:10px 28px;display:flex;gap:14px;align-items:center;flex-wrap:wrap}
button{font:inherit;color:inherit;background:none;border:1px solid var(--line);border-radius:999px;padding:4px 13px;cursor:pointer}
button:hover{border-color:var(--soft)}
button:focus-visible,input:focus-visible{outline:2px solid var(--ink);outline-offset:2px}
#play{min-width:76px}
#stops{display:flex;flex-wrap:wrap;gap:6px}
#stops button{display:flex;align-items:center;gap:7px;border-color:transparent;color:var(--soft)}
#stops button i{width:10px;height:10px;border-radius:50%;background:var(--c)}
#stops button[aria-pressed=true]{color:var(--ink);border-color:var(--line);background:var(--card);font-weight:600}
#range{width:150px;accent-color:var(--ink)}
#theme{margin-left:auto}
article{margin:30px 0;background:var(--card);border:1px solid var(--line);border-radius:14px;padding:26px 30px 28px;display:grid;grid-template-columns:minmax(0,1fr) 330px;gap:10px 44px}
article>h2{grid-column:1/-1;margin:0;font-size:13px;font-weight:500;color:var(--soft);display:flex;gap:18px;flex-wrap:wrap}
article>h2 b{color:var(--ink);font-weight:600}
.text{font:20px/1.72 "Iowan Old Style","Palatino Linotype",Palatino,Charter,"Source Serif 4","Noto Serif",Georgia,"DejaVu Serif",serif;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext;margin:8px 0 0;max-width:64ch}
.text+.text{border-top:1px solid var(--line);padding-top:12px}
.t{transition:color .35s,background-color .35s;border-radius:3px;cursor:default}
.sp{font:600 11px/1 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;vertical-align:.25em;padding:2px 5px;border:1px solid var(--line);border-radius:5px;margin:0 3px;user-select:none}
.cut{color:var(--soft);opacity:.55;text-decoration:line-through;text-decoration-thickness:1px}
.on{background:color-mix(in srgb,var(--ink) 16%,transparent)!important}
.to{box-shadow:0 2px 0 var(--ink)}
.with{box-shadow:0 2px 0 var(--bar)}
aside{font-size:12px;color:var(--soft);min-width:0}
.stairs{display:flex;gap:4px;height:92px;align-items:flex-end;margin:8px 0 18px}
.stairs div{flex:1;text-align:center;height:100%;display:flex;flex-direction:column;justify-content:flex-end;min-width:0}
.stairs i{display:block;background:var(--bar);border-radius:3px 3px 0 0}
.stairs span{font-size:11px;line-height:17px}
.strip{display:block;width:100%;height:46px;cursor:crosshair}
.strip-name{display:flex;justify-content:space-between;margin:10px 0 3px}
.strip-name b{font-weight:600;color:var(--c)}
#tip{position:fixed;z-index:3;pointer-events:none;background:var(--ink);color:var(--bg);border-radius:9px;padding:9px 13px;font-size:13px;line-height:1.45;max-width:330px;opacity:0;transition:opacity .12s;box-shadow:0 6px 24px #0003}
#tip b{font:600 15px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
#tip table{border-spacing:0;margin-top:3px}
#tip p{margin:0;opacity:.75}
@media(max-width:900px){article{grid-template-columns:minmax(0,1fr);padding:20px}.facts{margin-left:0}.facts div{text-align:left}header,main,footer,nav>div{padding-left:16px;padding-right:16px}}
@media(prefers-reduced-motion:reduce){.t,#tip{transition:none}}
@media print{nav{display:none}article{break-inside:avoid}}
)css";

const char *const script = R"js(
'use strict';
const data = JSON.parse(document.getElementById('data').textContent), root = document.documentElement;
const $ = id => document.getElementById(id), last = data.drops.length + 1, tip = $('tip');
const make = (name, text, parent) => { const e = document.createElement(name); e.textContent = text; if (parent) parent.append(e); return e; };
const colour = name => getComputedStyle(root).getPropertyValue(name).trim();
const articles = [...document.querySelectorAll('article')].map((box, i) => {
  const a = {box, trace: data.texts[i], spans: [], strips: [...box.querySelectorAll('canvas')], drawn: false};
  for (const s of box.querySelectorAll('.t')) (a.spans[s.dataset.i] = s).article = a;
  a.at = a.trace.layers.map(l => { const at = new Map(); l.p.forEach((p, j) => at.set(p, j)); return at; });
  a.rank = a.trace.layers.map(l => { const r = []; l.s.map((v, j) => [v, j]).sort((x, y) => y[0] - x[0]).forEach((x, n) => r[x[1]] = n + 1); return r; });
  return a;
});
let stop = last, timer = 0;

function draw(a, hover) {
  a.drawn = true;
  a.trace.layers.forEach((l, k) => {
    const c = a.strips[k], w = c.clientWidth, h = c.clientHeight, d = devicePixelRatio || 1, n = a.trace.tokens.length;
    if (!w) return;
    c.width = w * d; c.height = h * d;
    const g = c.getContext('2d'), left = colour('--c' + data.drops.indexOf(l.layer)), ink = colour('--bar'), line = colour('--line');
    g.scale(d, d);
    // One token often scores far off, and would flatten all others: the scale ends at six median deviations from the median.
    const mid = list => [...list].sort((x, y) => x - y)[list.length >> 1], m = mid(l.s), far = 6 * mid(l.s.map(v => Math.abs(v - m)));
    const low = Math.max(Math.min(...l.s), m - far), high = Math.min(Math.max(...l.s), m + far), step = w / n;
    const y = v => high > low ? 3 + (h - 7) * Math.max(0, Math.min(1, (v - low) / (high - low))) : h / 2;
    g.fillStyle = line;
    g.fillRect(0, h - 1, w, 1);
    l.p.forEach((p, j) => {
      const top = y(l.s[j]), x = (p < 0 ? n - 1 : p) * step;
      g.globalAlpha = hover === undefined || hover === p ? 1 : .45;
      g.fillStyle = l.k[j] === '1' ? ink : left;
      g.fillRect(x, h - 1 - top, Math.max(step - (step > 3 ? 1 : 0), .6), top);
    });
    g.globalAlpha = 1;
    if (hover !== undefined) { g.fillStyle = colour('--ink'); g.fillRect((hover + .5) * step - .5, 0, 1, h); }
  });
}

function show(k) {
  stop = k;
  root.dataset.stop = k;
  $('range').value = k;
  document.querySelectorAll('#stops button').forEach((b, i) => b.setAttribute('aria-pressed', i === k));
}

function halt() { clearInterval(timer); timer = 0; $('play').textContent = 'Play'; }

$('play').onclick = () => {
  if (timer) return halt();
  $('play').textContent = 'Pause';
  show(stop === last ? 0 : stop + 1);
  timer = setInterval(() => { if (stop < last) show(stop + 1); if (stop >= last) halt(); }, 1300);
};
$('range').oninput = e => { halt(); show(+e.target.value); };
document.querySelectorAll('#stops button').forEach((b, i) => b.onclick = () => { halt(); show(i); });
$('theme').onclick = () => {
  const dark = root.dataset.theme ? root.dataset.theme === 'dark' : matchMedia('(prefers-color-scheme:dark)').matches;
  root.dataset.theme = dark ? 'light' : 'dark';
  articles.forEach(a => a.drawn && draw(a));
};

let marked = [];
function clear(a) {
  marked.forEach(([s, c]) => s.classList.remove(c));
  marked = [];
  tip.style.opacity = 0;
  if (a) draw(a);
}
function mark(s, c) { if (s) { s.classList.add(c); marked.push([s, c]); } }

function point(a, i, x, y) {
  clear();
  const t = a.trace.tokens[i], number = v => (+v).toPrecision(3);
  mark(a.spans[i], 'on');
  tip.textContent = '';
  make('b', t[0], tip);
  make('p', 'position ' + i + (t[2] > t[1] ? ', characters ' + t[1] + ' to ' + t[2] : ''), tip);
  make('div', t[3] < 0 ? 'stayed' : 'left at layer ' + data.drops[t[3]], tip);
  const table = make('table', '', tip);
  a.trace.layers.forEach((l, k) => {
    const j = a.at[k].get(i);
    if (j === undefined) return;
    const row = make('tr', '', table);
    make('td', 'layer ' + l.layer, row);
    make('td', 'score ' + number(l.s[j]), row);
    make('td', a.rank[k][j] + ' of ' + l.p.length, row);
    if (!l.i) return;
    if (l.k[j] === '0') { make('p', 'joined ' + a.trace.tokens[l.i[j]][0] + ' at position ' + l.i[j], tip); mark(a.spans[l.i[j]], 'to'); }
    l.i.forEach((to, m) => { if (to === i && l.p[m] !== i) mark(a.spans[l.p[m]], 'with'); });
  });
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(8, Math.min(x + 14, innerWidth - box.width - 8)) + 'px';
  tip.style.top = (y + 20 + box.height > innerHeight ? y - box.height - 14 : y + 20) + 'px';
  tip.style.opacity = 1;
  draw(a, i);
}

document.addEventListener('pointerover', e => {
  const s = e.target.closest && e.target.closest('.t');
  if (s) point(s.article, +s.dataset.i, e.clientX, e.clientY);
});
document.addEventListener('pointerout', e => {
  const s = e.target.closest && e.target.closest('.t');
  if (s) clear(s.article);
});
articles.forEach(a => a.strips.forEach((c, k) => {
  c.onpointermove = e => {
    const n = a.trace.tokens.length, i = Math.min(n - 1, Math.max(0, Math.floor(e.offsetX / c.clientWidth * n)));
    point(a, i, e.clientX, e.clientY);
  };
  c.onpointerleave = () => clear(a);
  c.onclick = () => { halt(); show(data.drops.indexOf(a.trace.layers[k].layer) + 1); };
}));
const seen = new IntersectionObserver(list => list.forEach(e => { if (e.isIntersecting) draw(articles.find(a => a.box === e.target)); }), {rootMargin: '300px'});
articles.forEach(a => seen.observe(a.box));
matchMedia('(prefers-color-scheme:dark)').addEventListener('change', () => articles.forEach(a => a.drawn && draw(a)));
addEventListener('resize', () => articles.forEach(a => a.drawn && draw(a)));
show(last);
)js";

class page {
 public:
  page(const std::vector<traced_text> &traces, const trace_setting &setting) : traces_(traces), setting_(setting) {}

  std::string str() {
    const std::string attributes = " data-stop=\"" + std::to_string(setting_.drops.size() + 1) + "\"";
    const page_frame frame = {attributes.c_str(),
                              "",
                              style + colour_rules(),
                              "Which tokens left, and when",
                              "text",
                              "Bars: the score of each token, in the order of the text; coloured where it left. A click on them "
                              "goes to that layer.",
                              script};
    out_ = page_begin(frame, sequences_of(traces_), setting_);
    navigation();
    out_ += "<main>\n";
    for (size_t i = 0; i < traces_.size(); ++i) article(traces_[i], i);
    return out_ + page_end(frame, payload());
  }

 private:
  // The index of a layer among those that drop, which names its colour; -1 for tokens that stayed.
  int index_of(int32_t layer) const {
    if (layer < 0) return -1;
    return int(std::find(setting_.drops.begin(), setting_.drops.end(), layer) - setting_.drops.begin());
  }

  std::string colours(double lightness) const {
    std::string rules;
    const size_t n = setting_.drops.size();
    for (size_t i = 0; i < n; ++i)
      rules += format("--c%zu:%s;", i, ramp(n > 1 ? double(i) / double(n - 1) : 0, lightness).hex().c_str());
    return rules;
  }

  std::string colour_rules() const {
    std::string dark = colours(0.72);
    std::string rules = ":root{" + colours(0.56) + "}\n@media(prefers-color-scheme:dark){:root:not([data-theme=light]){" + dark +
                        "}}\n:root[data-theme=dark]{" + dark + "}\n";
    // Behind the last layer comes a view of all that stayed, where no token is leaving any more.
    const size_t drops = setting_.drops.size();
    for (size_t stop = 1; stop <= drops + 1; ++stop) {
      for (size_t i = 0; i < std::min(stop, drops); ++i) {
        std::string who = format("[data-stop=\"%zu\"] .d%zu", stop, i);
        if (i + 1 == stop)
          rules += who + format("{color:var(--c%zu);background:color-mix(in srgb,var(--c%zu) 13%%,transparent)}\n", i, i);
        else rules += who + format("{color:color-mix(in oklab,var(--c%zu) 52%%,var(--card))}\n", i);
      }
    }
    return rules;
  }

  void navigation() {
    const size_t drops = setting_.drops.size(), last = drops + 1;
    out_ += "<nav><div><button id=\"play\">Play</button><input type=\"range\" id=\"range\" min=\"0\" max=\"" +
            std::to_string(last) + "\" value=\"" + std::to_string(last) +
            "\" aria-label=\"layer\"><div id=\"stops\"><button>all tokens</button>";
    for (size_t i = 0; i < drops; ++i)
      out_ += format("<button style=\"--c:var(--c%zu)\"><i></i>layer %d</button>", i, setting_.drops[i]);
    out_ +=
        "<button>what stayed</button></div><button id=\"theme\" aria-label=\"light or dark\">Light / dark</button></div></nav>\n";
  }

  void article(const traced_text &trace, size_t number) {
    std::string name = trace.id.empty() ? std::to_string(number + 1) : trace.id;
    if (!trace.id.empty() && trace.id.front() == '"') name = json::parse(trace.id).get<std::string>();
    out_ += "<article>\n<h2><b>" + markup(one_line(name, 60)) + "</b><span>" +
            format("%zu &rarr; %zu tokens</span><span>%.0f&thinsp;%% of the token-layers saved</span></h2>\n<div>",
                   trace.tokens.size(), trace.kept.size(), 100 * trace.saved(setting_.layers));
    size_t next = 0;  // token
    for (int32_t segment = 0; segment <= int32_t(trace.has_pair); ++segment) {
      bool last = segment == int32_t(trace.has_pair);
      out_ += "<p class=\"text\" dir=\"auto\">";
      for (const text_piece &piece : text_pieces(trace, segment)) {
        if (piece.position >= 0) {
          specials(trace, &next, size_t(piece.position));
          next = size_t(piece.position) + 1;
          token(trace, size_t(piece.position), markup(piece.text));
        } else if (piece.cut) {
          out_ += "<span class=\"cut\" title=\"behind the limit of tokens\">" + markup(piece.text) + "</span>";
        } else {
          out_ += markup(piece.text);
        }
      }
      // What ends the first segment belongs to it, not to the second.
      size_t end = next;
      while (end < trace.tokens.size() && trace.tokens[end].special() && (last || trace.tokens[end].segment == segment)) ++end;
      specials(trace, &next, end);
      out_ += "</p>";
    }
    out_ += "</div>\n<aside>";
    stairs(trace);
    for (const traced_layer &layer : trace.layers)
      out_ += format("<div class=\"strip-name\"><b style=\"--c:var(--c%d)\">layer %d</b><span>%zu &rarr; %zu</span></div>",
                     index_of(layer.layer), layer.layer, layer.positions.size(), layer.kept_count()) +
              "<canvas class=\"strip\"></canvas>";
    out_ += "</aside>\n</article>\n";
  }

  void specials(const traced_text &trace, size_t *next, size_t end) {
    for (; *next < end; ++*next)
      if (trace.tokens[*next].special()) token(trace, *next, markup(trace.tokens[*next].token));
  }

  void token(const traced_text &trace, size_t position, const std::string &html) {
    // A special token is no part of the text, neither for its direction nor for what is copied.
    const bool special = trace.tokens[position].special();
    int index = index_of(trace.tokens[position].left_at);
    out_ += std::string(special ? "<bdi dir=\"ltr\" class=\"t sp" : "<span class=\"t") + (index >= 0 ? format(" d%d", index) : "") +
            format("\" data-i=\"%zu\">", position) + html + (special ? "</bdi>" : "</span>");
  }

  // Tokens a layer.
  void stairs(const traced_text &trace) {
    constexpr double height = 58;
    out_ += "<div>tokens in each layer</div><div class=\"stairs\">";
    std::vector<size_t> counts = trace.counts(setting_.layers);
    for (size_t layer = 0; layer < counts.size(); ++layer)
      out_ += format("<div><span>%zu</span><i style=\"height:%.1fpx\"></i><span>%zu</span></div>", counts[layer],
                     trace.tokens.empty() ? 0 : height * double(counts[layer]) / double(trace.tokens.size()), layer);
    out_ += "</div>";
  }

  ordered payload() const {
    ordered root = {{"drops", setting_.drops}, {"texts", ordered::array()}};
    for (const traced_text &trace : traces_) {
      ordered tokens = ordered::array();
      for (const traced_token &t : trace.tokens)
        tokens.push_back({visible(t.token), t.characters.begin, t.characters.end, index_of(t.left_at)});
      root["texts"].push_back({{"tokens", tokens}, {"layers", page_layers(trace)}});
    }
    return root;
  }

  const std::vector<traced_text> &traces_;
  const trace_setting &setting_;
  std::string out_;
};

}  // namespace

std::string trace_html(const std::vector<traced_text> &traces, const trace_setting &setting) { return page(traces, setting).str(); }
