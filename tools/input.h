// Texts and images from arguments, a file or a stream, one at a time: plain text or a path a line, or JSON lines.
#pragma once
#include "common.h"

constexpr size_t max_line_bytes = size_t(64) << 20;

enum class inputs { texts, images, both };  // that a model takes

// What the members of a JSON line are called, the first of each list in errors; an image is always "image".
struct line_keys {
  std::vector<std::string> text = {"text"};
  std::vector<std::string> pair;  // empty: a pair is an error
  void take_pairs();              // by their usual names
  std::vector<std::string> list;  // a list of texts; empty: not looked for
  bool needs_pair = false, needs_list = false;
  // Of "text" and "image", what the model does not take is passed over.  Lines that are not JSON are paths where it takes images.
  inputs takes = inputs::texts;
  std::string refused;  // a member that an option stands for already
};

struct text_item {
  size_t line = 0;  // of the input, from 1; the number of the argument for texts that are arguments
  std::string text;
  std::string pair;  // JSON lines only
  bool has_pair = false;
  std::vector<std::string> list;  // JSON lines only
  std::string id;                 // JSON lines only: the value of "id" as JSON; empty when there is none
  bool has_image = false;         // instead of a text
  std::string image;              // its path
  std::vector<float> pixels;      // as the model wants them, once image_loader has seen to it
  std::string error;              // why this line gives no text; empty when it does
};

// A file that is open for reading; "-" stands for standard input.
class file_descriptor {
 public:
  explicit file_descriptor(const std::string &path);
  ~file_descriptor();
  file_descriptor(const file_descriptor &) = delete;
  file_descriptor &operator=(const file_descriptor &) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

// Throws failure where this is plainly no text in UTF-8; `line`: of the file that text begins in, from 1.
void check_encoding(std::string_view text, const std::string &file, size_t line);

// Lines of a stream, in constant memory apart from the longest line.  Throws failure where it is plainly no text in UTF-8.
class line_reader {
 public:
  line_reader(int fd, std::string name) : fd_(fd), name_(std::move(name)) {}
  enum class result { line, too_long, end };
  result next(std::string_view *line);  // without its newline; valid until the next call
  // Whether next() would return at once, after waiting at most that long for more to arrive.
  bool ready(int milliseconds);
  size_t bytes_read() const { return bytes_read_; }

 private:
  bool fill();  // false at the end
  bool find_newline();
  result take(size_t length, size_t skip, std::string_view *line);

  int fd_;
  std::string name_;
  std::vector<char> buffer_;
  size_t begin_ = 0, end_ = 0;  // of what is not taken yet
  size_t scanned_ = 0;          // bytes from begin_ that hold no newline
  size_t bytes_read_ = 0;
  size_t line_ = 0;  // that was taken last, from 1
  bool at_end_ = false;
};

class text_source {
 public:
  virtual ~text_source() = default;
  virtual bool next(text_item *item) = 0;  // false at the end
  virtual bool ready(int milliseconds) = 0;
  virtual std::string place(const text_item &item) const = 0;  // "texts.txt:12", or the path of an image
  // Of the input, for progress; total 0 where it is not known.
  virtual double bytes_done() const = 0;
  virtual double bytes_total() const = 0;
};

enum class input_kind { automatic, text, jsonl };

// file: that a text is all of.
std::unique_ptr<text_source> texts_of_arguments(std::vector<std::string> texts, const std::string &file = "");
// `path` "-" stands for standard input.
std::unique_ptr<text_source> texts_of_file(const std::string &path, input_kind kind, const line_keys &keys = {});

bool is_blank(std::string_view line);
bool is_utf8(std::string_view text);
// One JSON line.  Sets text, pair, list and id, or error.
void parse_json_line(std::string_view line, text_item *item, const line_keys &keys = {});

// How many characters of a text are before a byte of it; fast for bytes in ascending order.
class character_counter {
 public:
  explicit character_counter(std::string_view text) : text_(text) {}
  size_t before(size_t byte) {
    if (byte < byte_) byte_ = characters_ = 0;
    for (; byte_ < byte; ++byte_) characters_ += (static_cast<unsigned char>(text_[byte_]) & 0xc0) != 0x80;
    return characters_;
  }

 private:
  std::string_view text_;
  size_t byte_ = 0, characters_ = 0;
};
