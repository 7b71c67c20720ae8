// What the pages of texts and of images have in common.
#include "markup.h"
#include "output.h"
#include "trace.h"

#include <cmath>

namespace {

using ordered = nlohmann::ordered_json;

const char *const common_style = R"css(
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;font-variant-numeric:tabular-nums}
header{padding-top:44px;display:flex;gap:24px;align-items:flex-end;flex-wrap:wrap}
h1{font-size:29px;line-height:1.2;font-weight:650;letter-spacing:-.02em;margin:0 0 6px}
header p{margin:0;color:var(--soft)}
.facts{margin:0 0 0 auto;display:flex;gap:30px}
.facts div{text-align:right}
.facts dt,.facts dd{margin:0}
.facts dt{font-size:12px;color:var(--soft)}
.facts dd{font-size:25px;font-weight:600;letter-spacing:-.02em;line-height:1.25}
#tip td{padding:0 14px 0 0}
#tip td+td{text-align:right}
footer{color:var(--soft);font-size:12px;padding-bottom:40px}
)css";

// JSON that may stand in a script element: no "</script>" and no "<!--" is left in it.
std::string script_json(const ordered &value) {
  std::string out;
  for (char c : value.dump(-1, ' ', false, ordered::error_handler_t::replace)) {
    if (c == '<') out += "\\u003c";
    else out += c;
  }
  return out;
}

double rounded(float value) { return std::isfinite(value) ? std::strtod(format("%.4g", double(value)).c_str(), nullptr) : 0; }

}  // namespace

std::string page_begin(const page_frame &frame, const std::vector<const traced_sequence *> &traces, const trace_setting &setting) {
  size_t tokens = 0, kept = 0;
  double computed = 0;
  for (const traced_sequence *trace : traces) {
    tokens += trace->length();
    kept += trace->kept.size();
    for (size_t n : trace->counts(setting.layers)) computed += double(n);
  }
  const double all = double(tokens) * setting.layers;
  std::string out = join(
      "<!doctype html>\n<html lang=\"en\"", frame.attributes,
      ">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" "
      "content=\"width=device-width,initial-scale=1\">\n<meta http-equiv=\"Content-Security-Policy\" "
      "content=\"default-src 'none'; ",
      frame.policy, "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n<title>rs trace: ", markup(setting.model),
      "</title>\n<style>", common_style, frame.style, "</style>\n</head>\n<body>\n<header>\n<div><h1>", frame.heading, "</h1>\n<p>",
      markup(setting.model), "</p>\n<p><code>", markup(setting.schedule), "</code></p></div>\n<dl class=\"facts\">");
  const auto fact = [&](const std::string &name, const std::string &value) {
    out += "<div><dt>" + name + "</dt><dd>" + value + "</dd></div>";
  };
  fact(std::string(frame.noun) + (traces.size() == 1 ? "" : "s"), std::to_string(traces.size()));
  fact("tokens", std::to_string(tokens));
  fact("left at the end", std::to_string(kept));
  fact("token-layers saved", format("%.0f&thinsp;%%", all > 0 ? 100 * (1 - computed / all) : 0));
  return out + "</dl>\n</header>\n";
}

std::string page_end(const page_frame &frame, const ordered &data) {
  return join("</main>\n<footer>", frame.footer,
              "</footer>\n<div id=\"tip\" role=\"tooltip\"></div>\n<script type=\"application/json\" id=\"data\">",
              script_json(data), "</script>\n<script>", frame.script, "</script>\n</body>\n</html>\n");
}

ordered page_layers(const traced_sequence &trace) {
  ordered layers = ordered::array();
  for (const traced_layer &layer : trace.layers) {
    ordered scores = ordered::array();
    for (float score : layer.scores) scores.push_back(rounded(score));
    std::string kept;
    for (uint8_t k : layer.kept) kept += k ? '1' : '0';
    ordered one = {{"layer", layer.layer}, {"p", layer.positions}, {"s", scores}, {"k", kept}};
    if (!layer.into.empty()) one["i"] = layer.into;
    layers.push_back(one);
  }
  return layers;
}
