#include "common.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>

// ---------------------------------------------------------------------------------------------- errors

void fail_errno(const char *action, const std::string &path) {
  std::string reason = strerror(errno);
  fail("cannot ", action, " ", in_quotes(path), ": ", reason);
}

void check(rs_status status) {
  if (status != RS_OK) throw failure(rs_last_error());
}

static std::string escaped(std::string_view text) {
  std::string out;
  for (unsigned char c : text) {
    if (c >= 0x20 && c != 0x7f) out += char(c);
    else if (c == '\n') out += "\\n";
    else out += format("\\x%02x", c);
  }
  return out;
}

void say(const std::string &message) {
  std::string line = "rs: " + escaped(message) + "\n";
  // One write, so that lines of processes that share a terminal do not mix.
  ssize_t ignored = write(STDERR_FILENO, line.data(), line.size());
  (void)ignored;
}

std::string in_quotes(std::string_view name) {
  constexpr size_t readable = 200;
  if (name.size() <= readable) return "'" + escaped(name) + "'";
  size_t cut = readable;
  while (cut > 0 && (static_cast<unsigned char>(name[cut]) & 0xc0) == 0x80) --cut;  // not inside a character
  return "'" + escaped(name.substr(0, cut)) + "…'";
}

// ---------------------------------------------------------------------------------------------- handles

model_ptr load_model(const std::string &path, bool check_data, const char *device) {
  auto params = sized<rs_load_params>();
  params.check_data = check_data;
  params.device = device;
  rs_model *model = nullptr;
  const rs_status status = rs_model_load(path.c_str(), &params, &model);
  // Of --device, only what it may be comes so far.
  if (status == RS_ERR_ARGUMENT && !device && getenv("RS_DEVICE")) fail("RS_DEVICE: ", rs_last_error());
  check(status);
  return model_ptr(model);
}

session_ptr create_session(const rs_model *model, int threads, bool profile, rs_thread_mode mode) {
  auto params = sized<rs_session_params>();
  params.threads = threads;
  params.profile = profile;
  params.thread_mode = mode;
  rs_session *session = nullptr;
  check(rs_session_create(model, &params, &session));
  return session_ptr(session);
}

writer_ptr open_writer(const std::string &path) {
  rs_writer *writer = nullptr;
  check(rs_writer_open(path.c_str(), &writer));
  return writer_ptr(writer);
}

rs_model_info model_info(const rs_model *model) {
  auto info = sized<rs_model_info>();
  check(rs_model_get_info(model, &info));
  return info;
}

bool find_meta(const rs_model *model, const char *key, rs_meta *meta) {
  rs_status status = rs_model_meta(model, key, meta);
  if (status == RS_ERR_NOT_FOUND) return false;
  check(status);
  return true;
}

std::vector<std::string> strings_of(const rs_meta &meta) {
  std::vector<std::string> strings;
  if (meta.kind != RS_META_STRS) return strings;
  for (size_t i = 0; i < meta.count; ++i) {
    size_t length = 0;
    const char *text = rs_meta_string(&meta, i, &length);
    strings.emplace_back(text, length);
  }
  return strings;
}

// ---------------------------------------------------------------------------------------------- files, numbers

std::string read_file(const std::string &path, size_t limit) {
  std::unique_ptr<FILE, releaser<fclose>> file(path == "-" ? fdopen(dup(STDIN_FILENO), "rb") : fopen(path.c_str(), "rb"));
  if (!file) fail_errno("open", path);
  std::string content;
  char chunk[1 << 16];
  for (size_t n; (n = fread(chunk, 1, sizeof chunk, file.get())) > 0;) {
    content.append(chunk, n);
    if (content.size() > limit) fail(in_quotes(path), " is larger than ", human_bytes(double(limit)));
  }
  if (ferror(file.get())) fail_errno("read", path);
  return content;
}

std::string format(const char *pattern, ...) {
  va_list list, again;
  va_start(list, pattern);
  va_copy(again, list);
  int length = vsnprintf(nullptr, 0, pattern, again);
  va_end(again);
  std::string text(length > 0 ? size_t(length) : 0, '\0');
  if (length > 0) vsnprintf(text.data(), text.size() + 1, pattern, list);
  va_end(list);
  return text;
}

std::string one_line(const std::string &text, size_t characters) {
  std::string result;
  size_t count = 0;
  for (char c : text) {
    auto byte = static_cast<unsigned char>(c);
    bool begins = (byte & 0xc0) != 0x80;  // of a character in UTF-8
    if (begins && ++count > characters) return result + "…";
    result += byte < 0x20 || byte == 0x7f ? ' ' : c;
  }
  return result;
}

std::string human_bytes(double bytes) {
  const char *const units[] = {"bytes", "KiB", "MiB", "GiB", "TiB"};
  size_t unit = 0;
  while (bytes >= 1024 && unit + 1 < std::size(units)) {
    bytes /= 1024;
    ++unit;
  }
  return format(unit == 0 ? "%.0f %s" : "%.1f %s", bytes, units[unit]);
}

std::string human_duration(double seconds) {
  if (!(seconds < 360000)) return "days";
  long s = std::lround(seconds);
  if (s < 3600) return format("%ld:%02ld", s / 60, s % 60);
  return format("%ld:%02ld:%02ld", s / 3600, s / 60 % 60, s % 60);
}

double seconds_now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

std::optional<size_t> peak_resident_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string key; status >> key;) {
    size_t kib = 0;
    if (key == "VmHWM:" && status >> kib) return kib * 1024;
  }
  return std::nullopt;
}

double cosine(const float *a, const float *b, size_t n) {
  double dot = 0, aa = 0, bb = 0;
  for (size_t i = 0; i < n; ++i) {
    dot += double(a[i]) * b[i];
    aa += double(a[i]) * a[i];
    bb += double(b[i]) * b[i];
  }
  return dot / std::sqrt(aa * bb);
}
