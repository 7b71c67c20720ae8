#include "output.h"
#include "input.h"
#include "json.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <utility>

static constexpr size_t buffer_bytes = size_t(1) << 18;

// ---------------------------------------------------------------------------------------------- output_file

// /dev/stdout is the file that the shell has opened, at whose place it stands: what is there already must not be replaced.
static bool is_file_of_standard_output(const std::string &path) {
  struct stat named {};
  struct stat opened {};
  return stat(path.c_str(), &named) == 0 && fstat(STDOUT_FILENO, &opened) == 0 && S_ISREG(opened.st_mode) &&
         named.st_dev == opened.st_dev && named.st_ino == opened.st_ino;
}

output_file::output_file(const std::string &path) {
  if (path.empty() || path == "-" || is_file_of_standard_output(path)) {
    fd_ = STDOUT_FILENO;
    name_ = "standard output";
  } else {
    name_ = in_quotes(path);
    open_path(path);
  }
  // Only in a plain file that is not appended to can a header be written again at the end.
  struct stat status {};
  bool plain = fstat(fd_, &status) == 0 && S_ISREG(status.st_mode) && (fcntl(fd_, F_GETFL) & O_APPEND) == 0;
  if (plain) start_ = lseek(fd_, 0, SEEK_CUR);
}

void output_file::open_path(const std::string &path) {
  target_ = output_target(path);
  struct stat status {};
  bool exists = stat(target_.c_str(), &status) == 0;
  if (exists && !S_ISREG(status.st_mode)) {  // a device or a pipe: nothing to replace
    fd_ = open(target_.c_str(), O_WRONLY | O_CLOEXEC);
    target_.clear();
    if (fd_ < 0) fail_errno("open", path);
    return;
  }
  temporary_ = temporary_beside(target_);
  held_signals held;
  fd_ = mkostemp(temporary_.data(), O_CLOEXEC);
  if (fd_ < 0) fail_errno("write in", folder_of(target_));
  guard_ = std::make_unique<removed_on_signal>(temporary_);
  mode_t mask = umask(0);
  umask(mask);
  fchmod(fd_, exists ? status.st_mode & 07777 : 0666 & ~mask);
}

output_file::~output_file() {
  if (!temporary_.empty()) unlink(temporary_.c_str());
  if (fd_ > STDERR_FILENO) close(fd_);
}

void output_file::fail_write() {
  if (errno == EPIPE && fd_ == STDOUT_FILENO) throw closed_pipe("");
  std::string reason = strerror(errno);
  fail("cannot write to ", name_, ": ", reason);
}

void output_file::write_through(std::string_view bytes) {
  while (!bytes.empty()) {
    ssize_t n = ::write(fd_, bytes.data(), bytes.size());
    if (n < 0 && errno == EAGAIN) {  // somebody has made the stream non-blocking
      pollfd poll_out{fd_, POLLOUT, 0};
      poll(&poll_out, 1, -1);
    }
    if (n < 0 && (errno == EINTR || errno == EAGAIN)) continue;
    if (n < 0) fail_write();
    bytes.remove_prefix(size_t(n));
  }
}

void output_file::write(std::string_view bytes) {
  buffer_.append(bytes);
  if (buffer_.size() >= buffer_bytes) flush();
}

void output_file::flush() {
  write_through(buffer_);
  buffer_.clear();
}

void output_file::rewrite(std::string_view bytes) {
  flush();
  int64_t end = lseek(fd_, 0, SEEK_CUR);
  if (end < 0 || lseek(fd_, start_, SEEK_SET) < 0) fail_write();
  write_through(bytes);
  if (lseek(fd_, end, SEEK_SET) < 0) fail_write();
}

void output_file::commit() {
  flush();
  if (temporary_.empty()) return;
  if (fsync(fd_) != 0) fail_write();
  if (close(std::exchange(fd_, -1)) != 0) fail_write();
  replace_file(temporary_, target_);
  temporary_.clear();
}

const std::string &not_the_model(const std::string &path, const std::string &model) {
  std::error_code error;
  if (std::filesystem::equivalent(path, model, error)) fail(in_quotes(path), " is the weight file itself");
  return path;
}

void print(const std::string &text) {
  output_file out("-");
  out.write(text);
  out.commit();
}

// ---------------------------------------------------------------------------------------------- text formats

void append_float(std::string *out, float value) {
  if (!std::isfinite(value)) {  // JSON has no other word for it
    *out += "null";
    return;
  }
  char digits[32];
  auto end = std::to_chars(digits, digits + sizeof digits, value).ptr;
  out->append(digits, end);
}

void warn_of_name(std::string_view name) {
  static bool warned = false;
  if (warned || is_utf8(name)) return;
  warned = true;
  say(in_quotes(name) + ": this name is not UTF-8; in JSON, U+FFFD stands for what is not");
}

// Bytes that are not UTF-8, which only names of files may have, become U+FFFD.
static std::string json_string(std::string_view text) {
  warn_of_name(text);
  return nlohmann::ordered_json(text).dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

json_line::json_line(const std::string &id) : text_("{") {
  if (!id.empty()) raw("id", id);
}

json_line &json_line::raw(const char *key, const std::string &value) {
  if (text_.size() > 1) text_ += ',';
  text_.append("\"").append(key).append("\":").append(value);
  return *this;
}

json_line &json_line::text(const char *key, std::string_view value) { return raw(key, json_string(value)); }

json_line &json_line::number(const char *key, float value) {
  std::string digits;
  append_float(&digits, value);
  return raw(key, digits);
}

std::string json_list(const std::vector<std::string> &values) {
  std::string list = "[";
  for (const std::string &value : values) list.append(list.size() > 1 ? "," : "").append(value);
  return list + "]";
}

static void append_floats(std::string *out, const float *values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (i > 0) *out += ',';
    append_float(out, values[i]);
  }
}

// {"id": …, "embedding": […], "tokens": n, "truncated": false}; without pooling "embedding" is a list of vectors.
static void append_object(std::string *out, const vector_row &row) {
  *out += '{';
  if (!row.id.empty()) out->append("\"id\":").append(row.id).append(",");
  if (row.image) out->append("\"image\":").append(json_string(*row.image)).append(",");
  if (row.rows > 0) out->append(join("\"grid\":[", row.rows, ",", row.columns, "],"));
  *out += row.per_token ? "\"embedding\":[" : "\"embedding\":";
  for (int64_t i = 0; i < row.vectors; ++i) {
    *out += i > 0 ? ",[" : "[";
    append_floats(out, row.values + i * row.dim, row.dim);
    *out += ']';
  }
  if (row.per_token) *out += ']';
  out->append(",\"tokens\":").append(std::to_string(row.info.tokens));
  if (row.info.kept != row.info.tokens) out->append(",\"kept\":").append(std::to_string(row.info.kept));
  out->append(",\"truncated\":").append(row.info.truncated ? "true" : "false").append("}");
}

namespace {

class jsonl_writer : public vector_writer {
 public:
  explicit jsonl_writer(output_file *out) : out_(out) {}
  void add(const vector_row &row) override {
    line_.clear();
    append_object(&line_, row);
    line_ += '\n';
    out_->write(line_);
  }

 private:
  output_file *out_;
  std::string line_;
};

class json_writer : public vector_writer {
 public:
  explicit json_writer(output_file *out) : out_(out) {}
  void begin() override { out_->write("["); }
  void add(const vector_row &row) override {
    line_ = first_ ? "\n" : ",\n";
    first_ = false;
    append_object(&line_, row);
    out_->write(line_);
  }
  void end() override { out_->write("\n]\n"); }

 private:
  output_file *out_;
  std::string line_;
  bool first_ = true;
};

// Numbers only, a vector a line: what spreadsheets, R and numpy.loadtxt take without options.
class csv_writer : public vector_writer {
 public:
  explicit csv_writer(output_file *out) : out_(out) {}
  void add(const vector_row &row) override {
    for (int64_t i = 0; i < row.vectors; ++i) {
      line_.clear();
      append_floats(&line_, row.values + i * row.dim, row.dim);
      line_ += '\n';
      out_->write(line_);
    }
  }

 private:
  output_file *out_;
  std::string line_;
};

// ---------------------------------------------------------------------------------------------- binary formats

std::string_view bytes_of(const vector_row &row) {
  return {reinterpret_cast<const char *>(row.values), size_t(row.vectors * row.dim) * sizeof(float)};
}

class raw_writer : public vector_writer {
 public:
  explicit raw_writer(output_file *out) : out_(out) {}
  void add(const vector_row &row) override { out_->write(bytes_of(row)); }

 private:
  output_file *out_;
};

// A file without a name, in $TMPDIR or /tmp.
class spool {
 public:
  spool() {
    const char *folder = getenv("TMPDIR");
    std::string path = std::string(folder && *folder ? folder : "/tmp") + "/rs-XXXXXX";
    int fd = mkostemp(path.data(), O_CLOEXEC);
    if (fd < 0) fail_errno("write in", folder_of(path));
    unlink(path.c_str());
    file_.reset(fdopen(fd, "w+b"));
    if (!file_) fail_errno("open", path);
  }
  void write(std::string_view bytes) {
    if (fwrite(bytes.data(), 1, bytes.size(), file_.get()) != bytes.size()) fail_spool();
  }
  void copy_to(output_file *out) {
    if (fflush(file_.get()) != 0 || fseek(file_.get(), 0, SEEK_SET) != 0) fail_spool();
    std::vector<char> chunk(buffer_bytes);
    for (size_t n; (n = fread(chunk.data(), 1, chunk.size(), file_.get())) > 0;) out->write({chunk.data(), n});
    if (ferror(file_.get())) fail_spool();
  }

 private:
  [[noreturn]] static void fail_spool() { fail("cannot keep the vectors in a temporary file: ", strerror(errno)); }
  std::unique_ptr<FILE, releaser<fclose>> file_;
};

// NumPy's format 1.0.  The header holds the number of rows, which is known only at the end: there it is written again, or, where
// the output is a pipe, everything waits for it in a temporary file.
class npy_writer : public vector_writer {
 public:
  npy_writer(int64_t dim, output_file *out) : dim_(dim), out_(out) {
    if (!out_->can_rewrite()) spool_ = std::make_unique<spool>();
  }
  void begin() override {
    if (!spool_) out_->write(header());
  }
  void add(const vector_row &row) override {
    rows_ += row.vectors;
    if (spool_) spool_->write(bytes_of(row));
    else out_->write(bytes_of(row));
  }
  void end() override {
    if (!spool_) return out_->rewrite(header());
    out_->write(header());
    spool_->copy_to(out_);
  }

 private:
  std::string header() const {
    constexpr size_t total = 128;  // fixed, so that the second one fits over the first; data begins at a multiple of 64
    const std::string magic("\x93NUMPY\x01\x00", 8);
    size_t length = total - magic.size() - 2;
    std::string text = join("{'descr': '<f4', 'fortran_order': False, 'shape': (", rows_, ", ", dim_, "), }");
    text.resize(length - 1, ' ');
    return magic + char(length & 0xff) + char(length >> 8) + text + '\n';
  }

  int64_t dim_, rows_ = 0;
  output_file *out_;
  std::unique_ptr<spool> spool_;
};

}  // namespace

const std::vector<std::string> vector_formats = {"jsonl", "json", "csv", "npy", "raw"};

std::unique_ptr<vector_writer> make_vector_writer(const std::string &format, int64_t dim, output_file *out) {
  if (format == "json") return std::make_unique<json_writer>(out);
  if (format == "csv") return std::make_unique<csv_writer>(out);
  if (format == "npy") return std::make_unique<npy_writer>(dim, out);
  if (format == "raw") return std::make_unique<raw_writer>(out);
  return std::make_unique<jsonl_writer>(out);
}
