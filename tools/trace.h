// What a schedule dropped of a text or an image, as plain data, and the forms in which rs trace shows it.
#pragma once
#include "canvas.h"
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

struct traced_sequence {
  std::string id;  // JSON, or empty
  std::vector<traced_layer> layers;
  std::vector<int32_t> kept;  // positions left at the end

  virtual ~traced_sequence() = default;
  virtual size_t length() const = 0;  // in tokens
  // Tokens that each of the model's layers worked on.
  std::vector<size_t> counts(int32_t model_layers) const;
  // Of the token-layers of the sequence without dropping, the share that was not computed.
  double saved(int32_t model_layers) const;
};

struct traced_text : traced_sequence {
  std::string text, pair;
  bool has_pair = false, truncated = false;
  std::vector<traced_token> tokens;
  size_t length() const override { return tokens.size(); }
};

struct traced_image : traced_sequence {
  std::string path;
  rs_image_shape shape{};
  int32_t patch = 0;         // pixels of its side
  std::vector<uint8_t> rgb;  // [rows * patch, columns * patch, 3]: what the patches are of
  size_t length() const override { return size_t(shape.tokens); }
  int32_t pixel_width() const { return shape.columns * patch; }
  int32_t pixel_height() const { return shape.rows * patch; }
  // Of each token the layer that it left at; -1: it stayed.
  std::vector<int32_t> left_at() const;
};

// What all texts or images of a run have in common.
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

// The same of images.
std::string trace_json(const traced_image &trace, const trace_setting &setting);
std::string trace_legend_of_images(const trace_setting &setting, colours how);
std::string trace_terminal(const traced_image &trace, const trace_setting &setting, colours how);
std::string trace_html(const std::vector<traced_image> &traces, const trace_setting &setting);
// A row of pictures an image: itself, then what each layer leaves of it.
canvas trace_picture(const traced_image &trace, const trace_setting &setting);
size_t picture_bytes(const traced_image &trace);  // that its pictures take together

// What both have in common: a layer as JSON, with the names of tokens where there are any; lines of the terminal, a layer each; the
// index of a layer among those that drop, as a share of them.
// An object as text, its "id" first and as it was written, unless it is empty.
std::string with_id(const std::string &id, const nlohmann::ordered_json &object);
nlohmann::ordered_json layer_json(const traced_layer &layer, const std::vector<traced_token> *tokens);
std::string layer_lines(const traced_sequence &trace, const trace_setting &setting);
double share_of(const trace_setting &setting, int32_t layer);

// And of the pages: all before what is shown, with a heading and sums over the texts or images; all behind it, with the data and
// the script; the layers of one in these data.
template <class T>
std::vector<const traced_sequence *> sequences_of(const std::vector<T> &traces) {
  std::vector<const traced_sequence *> all;
  for (const T &trace : traces) all.push_back(&trace);
  return all;
}
struct page_frame {
  const char *attributes, *policy;  // of the element html; what may be loaded, beside the page's own style and script
  std::string style;
  const char *heading, *noun, *footer, *script;
};
std::string page_begin(const page_frame &frame, const std::vector<const traced_sequence *> &traces, const trace_setting &setting);
std::string page_end(const page_frame &frame, const nlohmann::ordered_json &data);
nlohmann::ordered_json page_layers(const traced_sequence &trace);
