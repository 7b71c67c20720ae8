// A trace as JSON and for a terminal.
#include "colour.h"
#include "markup.h"
#include "output.h"
#include "trace.h"

#include <algorithm>
#include <charconv>
#include <cmath>

// ---------------------------------------------------------------------------------------------- the data

size_t traced_layer::kept_count() const { return size_t(std::count(kept.begin(), kept.end(), 1)); }

std::vector<size_t> traced_sequence::counts(int32_t model_layers) const {
  std::vector<size_t> result;
  size_t now = length();
  auto step = layers.begin();
  for (int32_t layer = 0; layer < model_layers; ++layer) {
    if (step != layers.end() && step->layer == layer) now = step->positions.size();
    result.push_back(now);
    // Fold makes its extra token behind the first layer that drops, so the next count is that of the next step where there is one.
    if (step != layers.end() && step->layer == layer) now = (step++)->kept_count();
  }
  return result;
}

double traced_sequence::saved(int32_t model_layers) const {
  double all = double(length()) * model_layers, done = 0;
  for (size_t n : counts(model_layers)) done += double(n);
  return all > 0 ? 1 - done / all : 0;
}

// Tokens of a character that the tokenizer takes apart share its bytes; the first of them gets the piece.
std::vector<text_piece> text_pieces(const traced_text &trace, int32_t segment) {
  std::string_view text = segment == 0 ? trace.text : trace.pair;
  std::vector<text_piece> pieces;
  size_t done = 0;
  for (size_t i = 0; i < trace.tokens.size(); ++i) {
    const traced_token &token = trace.tokens[i];
    size_t begin = std::max<size_t>(token.bytes.begin, done), end = std::min<size_t>(token.bytes.end, text.size());
    if (token.special() || token.segment != segment || begin >= end) continue;
    if (begin > done) pieces.push_back({text.substr(done, begin - done)});
    pieces.push_back({text.substr(begin, end - begin), int32_t(i)});
    done = end;
  }
  if (done < text.size()) {
    std::string_view rest = text.substr(done);
    pieces.push_back({rest, -1, rest.find_first_not_of(" \t\r\n") != std::string_view::npos});
  }
  return pieces;
}

// ---------------------------------------------------------------------------------------------- JSON

namespace {

using ordered = nlohmann::ordered_json;

// The double with the digits that a float needs: 0.3, not 0.30000001192092896.
ordered short_float(float value) {
  if (!std::isfinite(value)) return nullptr;
  std::string digits;
  append_float(&digits, value);
  return std::strtod(digits.c_str(), nullptr);
}

ordered token_json(const traced_token &token, size_t index, bool has_pair) {
  ordered root = {{"index", index}, {"id", token.id}, {"token", token.token}};
  if (has_pair) root["segment"] = token.segment;
  root["begin"] = token.characters.begin;
  root["end"] = token.characters.end;
  root["bytes"] = {token.bytes.begin, token.bytes.end};
  root["left_at"] = token.left_at < 0 ? ordered() : ordered(token.left_at);
  return root;
}

}  // namespace

std::string with_id(const std::string &id, const ordered &object) {
  const std::string text = object.dump(-1, ' ', false, ordered::error_handler_t::replace);
  return id.empty() ? text : "{\"id\":" + id + "," + text.substr(1);
}

ordered layer_json(const traced_layer &layer, const std::vector<traced_token> *tokens) {
  ordered kept = ordered::array(), dropped = ordered::array(), scores = ordered::array();
  for (size_t i = 0; i < layer.positions.size(); ++i) {
    int32_t position = layer.positions[i];
    scores.push_back(short_float(layer.scores[i]));
    if (position < 0) continue;
    if (layer.kept[i]) {
      kept.push_back(position);
      continue;
    }
    ordered one = {{"position", position}};
    if (tokens) one["token"] = (*tokens)[size_t(position)].token;
    one["score"] = scores.back();
    if (!layer.into.empty()) one["into"] = layer.into[i];
    dropped.push_back(one);
  }
  return {{"layer", layer.layer}, {"n", layer.positions.size()},  {"kept", kept},
          {"dropped", dropped},   {"positions", layer.positions}, {"scores", scores}};
}

std::string trace_json(const traced_text &trace, const trace_setting &setting) {
  ordered root;
  root["text"] = trace.text;
  if (trace.has_pair) root["pair"] = trace.pair;
  root["truncated"] = trace.truncated;
  root["tokens"] = ordered::array();
  for (size_t i = 0; i < trace.tokens.size(); ++i) root["tokens"].push_back(token_json(trace.tokens[i], i, trace.has_pair));
  root["kept"] = trace.kept;
  root["layers"] = ordered::array();
  for (const traced_layer &layer : trace.layers) root["layers"].push_back(layer_json(layer, &trace.tokens));
  root["saved"] = trace.saved(setting.layers);
  root["schedule"] = setting.json;
  return with_id(trace.id, root) + "\n";
}

// ---------------------------------------------------------------------------------------------- terminal

double share_of(const trace_setting &setting, int32_t layer) {
  const auto found = std::find(setting.drops.begin(), setting.drops.end(), layer);
  return setting.drops.size() > 1 ? double(found - setting.drops.begin()) / double(setting.drops.size() - 1) : 0;
}

namespace {

std::string subscript(int32_t number) {
  std::string out;
  for (char digit : std::to_string(number)) out.append("\xe2\x82").append(1, char(0x80 + digit - '0'));
  return out;
}

// Text that left at a layer, or stayed.  Without colours the layer stands behind it as an index.
class painter {
 public:
  painter(const trace_setting &setting, colours how) : setting_(setting), how_(how) {}

  std::string piece(const std::string &text, int32_t left_at) const {
    if (how_ == colours::none) return left_at < 0 ? text : text + subscript(left_at);
    return (left_at < 0 ? "\033[1m" : colour(left_at)) + text + "\033[0m";
  }
  std::string faint(const std::string &text) const { return how_ == colours::none ? text : "\033[2m" + text + "\033[0m"; }

 private:
  std::string colour(int32_t layer) const {
    rgb c = ramp(share_of(setting_, layer), 0.65);
    return how_ == colours::full ? format("\033[38;2;%d;%d;%dm", c.r, c.g, c.b) : format("\033[38;5;%dm", terminal_colour(c));
  }

  const trace_setting &setting_;
  colours how_;
};

std::string bar(double share) {
  constexpr int width = 32;
  int eighths = int(std::lround(std::clamp(share, 0.0, 1.0) * width * 8));
  std::string out;
  for (int i = 0; i < eighths / 8; ++i) out += "\xe2\x96\x88";                      // full block
  if (eighths % 8 > 0) out.append("\xe2\x96").append(1, char(0x90 - eighths % 8));  // U+2589 to U+258F: seven eighths to one
  return out;
}

}  // namespace

std::string trace_legend(const trace_setting &setting, colours how) {
  painter paint(setting, how);
  std::string out = paint.piece("stayed", -1);
  for (int32_t layer : setting.drops)
    out += "  " + paint.piece(how == colours::none ? "left" : "left at layer " + std::to_string(layer), layer);
  if (how == colours::none) out += "  (the index is the layer)";
  return setting.schedule + "\n" + out + "\n";
}

std::string trace_terminal(const traced_text &trace, const trace_setting &setting, colours how) {
  painter paint(setting, how);
  std::string out;
  const size_t n = trace.tokens.size();
  size_t next = 0;   // token
  bool gap = false;  // a special token ends here: a space is due before what follows
  const auto special_tokens = [&](size_t end) {
    for (; next < end; ++next) {
      if (!trace.tokens[next].special()) continue;
      if (gap || (!out.empty() && out.back() != ' ' && out.back() != '\n')) out += ' ';
      out += paint.piece(visible(trace.tokens[next].token), trace.tokens[next].left_at);
      gap = true;
    }
  };
  const auto add = [&](const std::string &text) {
    out += (gap ? " " : "") + text;
    gap = false;
  };
  for (int32_t segment = 0; segment <= int32_t(trace.has_pair); ++segment) {
    for (const text_piece &piece : text_pieces(trace, segment)) {
      if (piece.position >= 0) {
        special_tokens(size_t(piece.position));
        add(paint.piece(visible(piece.text), trace.tokens[size_t(piece.position)].left_at));
      } else {
        add(piece.cut ? paint.faint(visible(piece.text)) : visible(piece.text));
      }
    }
  }
  special_tokens(n);
  return out + "\n\n" + layer_lines(trace, setting);
}

std::string layer_lines(const traced_sequence &trace, const trace_setting &setting) {
  std::string out;
  const size_t n = trace.length();
  const int digits = int(std::to_string(n).size()), layer_digits = int(std::to_string(setting.layers).size());
  for (const traced_layer &layer : trace.layers)
    out += format("layer %*d: %*zu \xe2\x86\x92 %*zu tokens  ", layer_digits, layer.layer, digits, layer.positions.size(), digits,
                  layer.kept_count()) +
           bar(double(layer.kept_count()) / double(n)) + "\n";
  return out + format("%zu of %zu tokens left at the end, %.0f %% of the token-layers saved\n", trace.kept.size(), n,
                      100 * trace.saved(setting.layers));
}
