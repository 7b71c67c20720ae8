// Writers of vectors: JSON, JSON lines, CSV, NumPy, raw floats.
#pragma once
#include "common.h"
#include "scratch.h"

// Standard output, a device or pipe as it is, or a file that appears whole at commit() and not at all without it.
class output_file {
 public:
  explicit output_file(const std::string &path);  // "" or "-": standard output
  ~output_file();
  output_file(const output_file &) = delete;
  output_file &operator=(const output_file &) = delete;

  void write(std::string_view bytes);
  void flush();
  bool can_rewrite() const { return start_ >= 0; }
  void rewrite(std::string_view bytes);  // over the first bytes that were written
  void commit();
  int fd() const { return fd_; }

 private:
  void open_path(const std::string &path);
  void write_through(std::string_view bytes);
  [[noreturn]] void fail_write();

  int fd_ = -1;
  std::string name_;       // for errors
  std::string target_;     // where a temporary file goes; empty: none is used
  std::string temporary_;  // its name until then
  std::unique_ptr<removed_on_signal> guard_;
  int64_t start_ = -1;  // where in the file this output begins; -1 where nothing can be rewritten
  std::string buffer_;
};

// What belongs to one text or image.
struct vector_row {
  std::string_view id;  // JSON, or empty
  const float *values;  // [vectors, dim]
  int64_t vectors;      // 1, or one a token without pooling
  int64_t dim;
  bool per_token;
  rs_text_info info;
  const std::string *image = nullptr;  // its path; nullptr: a text
  int32_t rows = 0, columns = 0;       // of patches, where vectors are of these
};

class vector_writer {
 public:
  virtual ~vector_writer() = default;
  virtual void begin() {}
  virtual void add(const vector_row &row) = 0;
  virtual void end() {}
};

extern const std::vector<std::string> vector_formats;  // "jsonl", "json", "csv", "npy", "raw"
std::unique_ptr<vector_writer> make_vector_writer(const std::string &format, int64_t dim, output_file *out);

// `path`, which is not the weight file `model`: throws failure where they are the same file.
const std::string &not_the_model(const std::string &path, const std::string &model);

void print(const std::string &text);  // to standard output, all of it

// Says, once, that JSON has this name otherwise.
void warn_of_name(std::string_view name);

// The fewest digits that read back as the same float.
void append_float(std::string *out, float value);

// An object on one line, member by member; a value may be an object or a list that has been written before.
class json_line {
 public:
  // Beginning with this id, JSON as text_item has it, unless it is empty.
  explicit json_line(const std::string &id = "");
  json_line &raw(const char *key, const std::string &value);  // JSON
  json_line &text(const char *key, std::string_view value);   // bytes that are not UTF-8 become U+FFFD
  json_line &number(const char *key, float value);
  json_line &number(const char *key, size_t value) { return raw(key, std::to_string(value)); }
  json_line &truth(const char *key, bool value) { return raw(key, value ? "true" : "false"); }
  std::string str() const { return text_ + "}"; }

 private:
  std::string text_;
};
std::string json_list(const std::vector<std::string> &values);  // of JSON
