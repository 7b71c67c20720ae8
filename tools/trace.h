// What a schedule dropped of a text, as plain data, and the forms in which rs trace shows it.
#pragma once
#include "common.h"
#include "json.h"

struct traced_token {
  int32_t id = 0;
  std::string token;  // as the vocabulary writes it
  int32_t segment = 0;
  rs_span bytes{};       // of the text, or of its pair in segment 1; 0 to 0 for a special token
  rs_span characters{};  // the same in Unicode code points
  int32_t left_at = -1;  // layer; -1: it stayed
  bool special() const { return bytes.begin == bytes.end; }
};

// A layer that drops.  Lists run over the tokens that came to it, in order.
struct traced_layer {
  int32_t layer = 0;
  std::vector<int32_t> positions;  // -1: the extra token of fold
  std::vector<float> scores;
  std::vector<uint8_t> kept;
  std::vector<int32_t> into;  // of merge: the position of the token that took it in; else empty
  size_t kept_count() const;
};

struct traced_text {
  std::string id;  // JSON, or empty
  std::string text, pair;
  bool has_pair = false;
  std::vector<traced_token> tokens;
  std::vector<traced_layer> layers;
  std::vector<int32_t> kept;  // positions left at the end

  // Tokens that each of the model's layers worked on.
  std::vector<size_t> counts(int32_t model_layers) const;
  // Of the token-layers of the text without dropping, the share that was not computed.
  double saved(int32_t model_layers) const;
};

// What all texts of a run have in common.
struct trace_setting {
  std::string model;
  int32_t layers = 0;           // of the model
  std::vector<int32_t> drops;   // layers that drop
  std::string schedule;         // as rs_drop_format writes it
  nlohmann::ordered_json json;  // the same, taken apart
};

// A text cut at the borders of its tokens: the pieces in a row are the text.
struct text_piece {
  std::string_view text;
  int32_t position = -1;  // of the token; -1: between tokens
  bool cut = false;       // behind the last token, and not only white space: the model did not see it
};
std::vector<text_piece> text_pieces(const traced_text &trace, int32_t segment);

std::string trace_json(const traced_text &trace, const trace_setting &setting);  // one line

enum class colours { none, cube, full };  // cube: 256 colours
std::string trace_legend(const trace_setting &setting, colours how);
std::string trace_terminal(const traced_text &trace, const trace_setting &setting, colours how);

std::string trace_html(const std::vector<traced_text> &traces, const trace_setting &setting);
