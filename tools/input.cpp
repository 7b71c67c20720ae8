#include "input.h"
#include "json.h"

#include <utf8proc.h>

#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

void line_keys::take_pairs() { pair = {"pair", "text_pair"}; }

static constexpr size_t read_bytes = size_t(1) << 16;

// ---------------------------------------------------------------------------------------------- file_descriptor

file_descriptor::file_descriptor(const std::string &path)
    : fd_(path == "-" ? STDIN_FILENO : open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
  if (fd_ < 0) fail_errno("open", path);
}

file_descriptor::~file_descriptor() {
  if (fd_ != STDIN_FILENO) close(fd_);
}

// ---------------------------------------------------------------------------------------------- line_reader

bool line_reader::fill() {
  if (at_end_) return false;
  if (begin_ > 0 && (begin_ == end_ || buffer_.size() - end_ < read_bytes)) {  // make room by moving what is left to the front
    memmove(buffer_.data(), buffer_.data() + begin_, end_ - begin_);
    end_ -= begin_;
    begin_ = 0;
  }
  if (buffer_.size() - end_ < read_bytes) buffer_.resize(std::max(2 * buffer_.size(), 2 * read_bytes));
  ssize_t n;
  while ((n = read(fd_, buffer_.data() + end_, read_bytes)) < 0) {
    if (errno != EINTR && errno != EAGAIN) fail_errno("read", name_);
    pollfd poll_in{fd_, POLLIN, 0};
    if (errno == EAGAIN) poll(&poll_in, 1, -1);  // somebody has made the stream non-blocking
  }
  end_ += size_t(n);
  bytes_read_ += size_t(n);
  at_end_ = n == 0;
  return n > 0;
}

// Sets scanned_ to the length of the first line when it is there.
bool line_reader::find_newline() {
  const char *from = buffer_.data() + begin_ + scanned_;
  const void *found = begin_ + scanned_ < end_ ? memchr(from, '\n', end_ - begin_ - scanned_) : nullptr;
  scanned_ = found ? size_t(static_cast<const char *>(found) - buffer_.data()) - begin_ : end_ - begin_;
  return found != nullptr;
}

line_reader::result line_reader::take(size_t length, size_t skip, std::string_view *line) {
  *line = {buffer_.data() + begin_, length};
  begin_ += length + skip;
  scanned_ = 0;
  check_encoding(*line, name_, ++line_);
  return result::line;
}

// A wrong encoding is no matter of single lines: what could be made of the others would be garbage.
void check_encoding(std::string_view text, const std::string &file, size_t line) {
  const std::string_view mark = text.substr(0, 2);
  if (line == 1 && (mark == "\xff\xfe" || mark == "\xfe\xff")) fail(file, ":1: looks like UTF-16; rs reads UTF-8");
  const size_t nul = text.find('\0');
  if (nul == std::string_view::npos) return;
  line += static_cast<size_t>(std::count(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(nul), '\n'));
  fail(file, ":", line, ": a NUL byte, so this is no text in UTF-8 (UTF-16, or a binary file?)");
}

line_reader::result line_reader::next(std::string_view *line) {
  bool too_long = false;
  for (;;) {
    bool found = find_newline();
    too_long |= scanned_ > max_line_bytes;
    if (found) {
      take(scanned_, 1, line);
      return too_long ? result::too_long : result::line;
    }
    if (too_long) {  // forget what there is and wait for the line's end
      begin_ = end_;
      scanned_ = 0;
    }
    if (fill()) continue;
    if (too_long) {
      ++line_;
      return result::too_long;
    }
    return begin_ < end_ ? take(end_ - begin_, 0, line) : result::end;
  }
}

bool line_reader::ready(int milliseconds) {
  while (!at_end_ && !find_newline()) {
    pollfd poll_in{fd_, POLLIN, 0};
    if (poll(&poll_in, 1, milliseconds) <= 0) return false;
    if (scanned_ > max_line_bytes) return true;  // let next() deal with it
    fill();
  }
  return true;
}

// ---------------------------------------------------------------------------------------------- JSON lines

namespace {

// Reads one line without building a tree: keeps text, pair, list and id of the outermost object and passes over the rest.
// Numbers of an id are kept as they are written, so that 20-digit ids survive.
class line_handler : public nlohmann::json_sax<json> {
 public:
  line_handler(text_item *item, const line_keys &keys) : item_(item), keys_(keys) {}

  bool null() override { return value("null", nullptr); }
  bool boolean(bool v) override { return value(v ? "true" : "false", nullptr); }
  bool number_integer(number_integer_t v) override { return value(std::to_string(v), nullptr); }
  bool number_unsigned(number_unsigned_t v) override { return value(std::to_string(v), nullptr); }
  bool number_float(number_float_t, const string_t &written) override { return value(written, nullptr); }
  bool string(string_t &v) override {
    return key_ == wanted::id ? value(nlohmann::ordered_json(v).dump(), nullptr) : value("", &v);
  }
  bool binary(binary_t &) override { return false; }
  bool start_object(size_t) override { return open('{'); }
  bool end_object() override { return close('}'); }
  bool start_array(size_t) override {
    if (depth_ == 1 && key_ == wanted::list) {
      item_->list.clear();
      list_seen_ = true;
      ++depth_;
      return true;
    }
    return open('[');
  }
  bool end_array() override { return close(']'); }

  bool key(string_t &name) override {
    if (depth_ == 1) {
      const auto is_one_of = [&](const std::vector<std::string> &names) {
        return std::find(names.begin(), names.end(), name) != names.end();
      };
      key_ = is_one_of(keys_.text)   ? wanted::text
             : name == "id"          ? wanted::id
             : is_one_of(keys_.pair) ? wanted::pair
             : is_one_of(keys_.list) ? wanted::list
             : name == "image"       ? wanted::image
                                     : wanted::nothing;
      if (key_ == wanted::text || key_ == wanted::list) {  // by one of its names, or which counts?
        std::string &seen = key_ == wanted::text ? text_name_ : list_name_;
        if (!seen.empty() && seen != name) return stop("both \"" + seen + "\" and \"" + name + "\"");
        seen = name;
      }
      if (key_ == wanted::id) item_->id.clear();
      if (name == keys_.refused) return stop("\"" + name + "\", but --" + name + " is given, which is for lines without one");
      const bool no_pair = key_ == wanted::nothing && takes_texts() && (name == "pair" || name == "text_pair");
      if (no_pair) return stop("\"" + name + "\" is not taken here");
      // Captions beside images, or the other way round, are no error.
      const bool foreign = key_ == wanted::text ? !takes_texts() : key_ == wanted::image && !takes_images();
      if (foreign) foreign_seen_ = true, key_ = wanted::nothing;
    } else if (key_ == wanted::id) {
      separate();
      item_->id += nlohmann::ordered_json(name).dump() + ":";
      fresh_ = true;
    }
    return true;
  }

  bool parse_error(size_t, const std::string &, const nlohmann::detail::exception &e) override {
    return stop("not valid JSON: " + json_error_text(e.what(), true));
  }

  void finish() {
    if (!item_->error.empty()) return;
    if (text_seen_ && item_->has_image) stop("both \"" + keys_.text[0] + "\" and \"image\"");
    else if (!takes_texts() && !item_->has_image)
      stop(std::string("no \"image\"") + (foreign_seen_ ? ", but a text, which is not taken here" : ""));
    else if (item_->has_image) return;
    else if (takes_images() && !text_seen_) stop("neither \"" + keys_.text[0] + "\" nor \"image\"");
    else if (!text_seen_) stop("no \"" + keys_.text[0] + "\"" + (foreign_seen_ ? ", but an image, which is not taken here" : ""));
    else if (keys_.needs_pair && !item_->has_pair) stop("no \"" + keys_.pair[0] + "\"");
    else if (keys_.needs_list && !list_seen_) stop("no \"" + keys_.list[0] + "\"");
  }

 private:
  enum class wanted { nothing, text, pair, list, image, id };

  bool takes_texts() const { return keys_.takes != inputs::images; }
  bool takes_images() const { return keys_.takes != inputs::texts; }

  bool stop(std::string error) {
    item_->error = std::move(error);
    return false;
  }

  bool stop_at_text() { return stop("\"" + keys_.text[0] + "\" is not a string"); }
  bool stop_at_pair() {
    return stop(keys_.pair.size() == 1 ? "\"" + keys_.pair[0] + "\" is not a string"
                                       : "the pair of \"" + keys_.text[0] + "\" is not a string");
  }
  bool stop_at_image() { return stop("\"image\" is not a string"); }
  bool stop_at_list() { return stop("\"" + keys_.list[0] + "\" is not a list of strings"); }

  void separate() {
    if (!fresh_) item_->id += ',';
  }

  // A value that is not an object or array; `text` when it is a string.
  bool value(const std::string &written, string_t *text) {
    if (depth_ == 0) return stop("not a JSON object");
    if (key_ == wanted::id) {
      separate();
      item_->id += written;
      fresh_ = false;
    } else if (depth_ == 1 && key_ == wanted::text) {
      if (!text) return stop_at_text();
      item_->text = std::move(*text);
      text_seen_ = true;
    } else if (depth_ == 1 && key_ == wanted::pair) {
      if (!text) return stop_at_pair();
      item_->pair = std::move(*text);
      item_->has_pair = true;
    } else if (depth_ == 1 && key_ == wanted::image) {
      if (!text) return stop_at_image();
      item_->image = std::move(*text);
      item_->has_image = true;
    } else if (key_ == wanted::list) {
      if (!text || depth_ != 2) return stop_at_list();
      item_->list.push_back(std::move(*text));
    }
    return end_value();
  }

  bool open(char bracket) {
    if (depth_ == 0 && bracket != '{') return stop("not a JSON object");
    if (depth_ == max_json_depth) return stop(join("nested deeper than ", max_json_depth, " levels"));
    if (depth_ == 1 && key_ == wanted::text) return stop_at_text();
    if (depth_ == 1 && key_ == wanted::pair) return stop_at_pair();
    if (depth_ == 1 && key_ == wanted::image) return stop_at_image();
    if (key_ == wanted::list) return stop_at_list();
    if (key_ == wanted::id && depth_ > 0) {
      separate();
      item_->id += bracket;
    }
    fresh_ = true;
    ++depth_;
    return true;
  }

  bool close(char bracket) {
    --depth_;
    if (key_ == wanted::id && depth_ > 0) item_->id += bracket;
    fresh_ = false;
    return end_value();
  }

  bool end_value() {
    if (depth_ <= 1) {
      key_ = wanted::nothing;
      fresh_ = true;
    }
    return true;
  }

  text_item *item_;
  const line_keys &keys_;
  wanted key_ = wanted::nothing;  // of the outermost object
  int depth_ = 0;
  bool fresh_ = true;  // no comma is due
  bool text_seen_ = false, list_seen_ = false;
  std::string text_name_, list_name_;  // that they came by
  bool foreign_seen_ = false;          // what the model does not take
};

}  // namespace

bool is_utf8(std::string_view text) {
  const auto *bytes = reinterpret_cast<const utf8proc_uint8_t *>(text.data());
  for (size_t at = 0; at < text.size();) {
    utf8proc_int32_t c = 0;
    utf8proc_ssize_t length = bytes[at] < 0x80 ? 1 : utf8proc_iterate(bytes + at, utf8proc_ssize_t(text.size() - at), &c);
    if (length <= 0) return false;
    at += size_t(length);
  }
  return true;
}

bool is_blank(std::string_view line) { return line.find_first_not_of(" \t\r") == std::string_view::npos; }

void parse_json_line(std::string_view line, text_item *item, const line_keys &keys) {
  line_handler handler(item, keys);
  json::sax_parse(line.begin(), line.end(), &handler);
  handler.finish();
}

// ---------------------------------------------------------------------------------------------- sources

namespace {

class argument_source : public text_source {
 public:
  argument_source(std::vector<std::string> texts, std::string file) : texts_(std::move(texts)), file_(std::move(file)) {}
  bool next(text_item *item) override {
    if (next_ == texts_.size()) return false;
    *item = text_item();
    item->text = texts_[next_++];
    item->line = next_;
    return true;
  }
  bool ready(int) override { return true; }
  std::string place(const text_item &item) const override { return file_.empty() ? join("text ", item.line) : file_; }
  double bytes_done() const override { return 0; }
  double bytes_total() const override { return 0; }

 private:
  std::vector<std::string> texts_;
  std::string file_;
  size_t next_ = 0;
};

class stream_source : public text_source {
 public:
  stream_source(const std::string &path, input_kind kind, line_keys keys)
      : file_(path), name_(path == "-" ? "stdin" : path), reader_(file_.get(), name_), kind_(kind), keys_(std::move(keys)) {
    struct stat status {};
    if (fstat(file_.get(), &status) == 0 && S_ISREG(status.st_mode)) total_ = double(status.st_size);
  }

  bool next(text_item *item) override {
    if (kind_ == input_kind::automatic) detect();
    for (;;) {
      std::string_view line;
      line_reader::result result = next_line(&line);
      if (result == line_reader::result::end) return false;
      ++line_;
      const bool paths = kind_ != input_kind::jsonl && keys_.takes != inputs::texts;
      if ((kind_ == input_kind::jsonl || paths) && result == line_reader::result::line && is_blank(line)) continue;
      *item = text_item();
      item->line = line_;
      if (result == line_reader::result::too_long) item->error = join("the line is longer than ", max_line_bytes, " bytes");
      else if (kind_ == input_kind::jsonl) parse_json_line(line, item, keys_);
      else (paths ? item->image : item->text) = line.substr(0, line.size() - (!line.empty() && line.back() == '\r' ? 1 : 0));
      item->has_image = item->error.empty() && (item->has_image || paths);
      return true;
    }
  }

  bool ready(int milliseconds) override { return blank_ > 0 || has_first_ || reader_.ready(milliseconds); }
  std::string place(const text_item &item) const override {
    return item.has_image && !item.image.empty() ? item.image : join(name_, ":", item.line);
  }
  double bytes_done() const override { return double(reader_.bytes_read()); }
  double bytes_total() const override { return total_; }

 private:
  // Lines that detect() has read come first.
  line_reader::result next_line(std::string_view *line) {
    if (blank_ > 0) {
      --blank_;
      *line = {};
      return line_reader::result::line;
    }
    if (!has_first_) return read_line(line);
    has_first_ = false;
    *line = first_;
    return first_result_;
  }

  line_reader::result read_line(std::string_view *line) {
    line_reader::result result = reader_.next(line);
    // A byte order mark is no part of the first text.
    if (std::exchange(at_start_, false) && line->substr(0, 3) == "\xef\xbb\xbf") line->remove_prefix(3);
    return result;
  }

  // The first line that is not blank tells which kind this is.  A stream of nothing but blank lines is taken for text in time, so
  // that its reader does not wait for ever.
  void detect() {
    constexpr size_t patience = 1000;
    kind_ = input_kind::text;
    while (blank_ < patience) {
      std::string_view line;
      first_result_ = read_line(&line);
      if (first_result_ == line_reader::result::end) return;
      if (first_result_ == line_reader::result::line && is_blank(line)) {
        ++blank_;
        continue;
      }
      first_ = line;
      has_first_ = true;
      break;
    }
    if (!has_first_ || first_result_ != line_reader::result::line) return;
    const size_t brace = first_.find_first_not_of(" \t");
    if (first_[brace] != '{') return;
    // What is wrong behind the name of a member is an error of that line, not another kind of file.
    const size_t next = first_.find_first_not_of(" \t\r", brace + 1);
    if (next != std::string::npos && (first_[next] == '"' || first_[next] == '}')) kind_ = input_kind::jsonl;
    else say(name_ + ": the first line begins with '{' but is not JSON; reading plain text (--input jsonl reads JSON lines)");
  }

  file_descriptor file_;
  std::string name_;
  line_reader reader_;
  input_kind kind_;
  line_keys keys_;
  double total_ = 0;
  size_t line_ = 0;
  bool at_start_ = true;
  size_t blank_ = 0;  // lines before `first_`, which hold nothing but spaces
  std::string first_;
  line_reader::result first_result_ = line_reader::result::end;
  bool has_first_ = false;
};

}  // namespace

std::unique_ptr<text_source> texts_of_arguments(std::vector<std::string> texts, const std::string &file) {
  return std::make_unique<argument_source>(std::move(texts), file);
}

std::unique_ptr<text_source> texts_of_file(const std::string &path, input_kind kind, const line_keys &keys) {
  return std::make_unique<stream_source>(path, kind, keys);
}
