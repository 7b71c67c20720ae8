#include "tune_journal.h"

#include "datasets.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>
#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>

namespace fs = std::filesystem;
using ordered = nlohmann::ordered_json;

static constexpr int version = 1;
static constexpr size_t most_bytes = size_t(256) << 20;
static constexpr size_t longest_line = 8192;  // also bounds how deep a line can nest
static const char *const mark = "rs tune";

tune_journal::tune_journal(const std::string &path, const ordered &settings, policy how) : path_(path), settings_(settings) {
  fd_ = open(path.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (fd_ < 0) fail_errno("open", path);
  try {
    if (flock(fd_, LOCK_EX | LOCK_NB) != 0) fail(in_quotes(path), ": another rs tune is writing to this journal");
    std::error_code error;
    if (!fs::is_regular_file(path, error)) fail(in_quotes(path), ": not a regular file");
    const size_t good = read(::read_file(path, most_bytes), how);
    if (ftruncate(fd_, off_t(good)) != 0) fail_errno("write", path);
    if (good == 0) append({{mark, version}, {"settings", settings_}});
  } catch (...) {
    close(fd_);
    throw;
  }
}

tune_journal::~tune_journal() { close(fd_); }

size_t tune_journal::read(const std::string &content, policy how) {
  if (content.empty()) return 0;
  size_t at = content.find('\n');
  const json head = at > longest_line ? json() : json::parse(content.substr(0, at), nullptr, false);
  if (!head.is_object() || !head.contains(mark) || !head.contains("settings")) {
    // A first line that was cut off begins like a whole one; nothing else is written over.
    const std::string beginning = join("{\"", mark, "\":");
    if (at == std::string::npos &&
        content.compare(0, beginning.size(), beginning, 0, std::min(content.size(), beginning.size())) == 0)
      return 0;
    fail(in_quotes(path_), ": not a journal of rs tune; give another --journal, or remove it");
  }
  if (how == policy::anew) return 0;
  ordered stored = head["settings"];
  // What a run found out for itself, and goes on with, is no difference.
  ordered comparable = stored, wanted = settings_;
  if (comparable.is_object()) comparable.erase("found");
  wanted.erase("found");
  if (head[mark] != version || json(comparable) != json(wanted)) {
    if (how == policy::resume) fail(in_quotes(path_), ": the journal is of other settings, another model or other data");
    note_ = "the journal " + in_quotes(path_) + " is of other settings, another model or other data: beginning anew";
    return 0;
  }
  settings_ = stored;
  size_t line = 1;
  for (size_t begin = at + 1; begin < content.size(); begin = at + 1) {
    ++line;
    at = content.find('\n', begin);
    if (at == std::string::npos || !take(content.substr(begin, at - begin))) {
      // A line that was cut off is what a kill leaves behind; anything else is worth a word.
      if (at != std::string::npos)
        note_ = join(path_, ":", line, ": not a line of rs tune; what it and the lines behind it say is found again");
      return begin;
    }
  }
  return content.size();
}

bool tune_journal::take(const std::string &line) {
  if (line.size() > longest_line) return false;
  const json object = json::parse(line, nullptr, false);
  if (!object.is_object() || object.size() != 4) return false;
  const auto number = [&](const char *name, size_t most) -> int64_t {
    auto found = object.find(name);
    if (found == object.end() || !found->is_number_unsigned() || found->get<uint64_t>() > most) return -1;
    return found->get<int64_t>();
  };
  constexpr size_t most = 1000;
  const int64_t file = number("file", most), rung = number("rung", most);
  const auto drop = object.find("drop"), quality = object.find("quality");
  if (file < 0 || rung < 0 || drop == object.end() || !drop->is_string() || quality == object.end()) return false;
  if (!quality->is_null() && !quality->is_number()) return false;
  const double value = quality->is_null() ? NAN : quality->get<double>();
  if (std::isinf(value)) return false;
  known_[{size_t(file), size_t(rung), drop->get<std::string>()}] = value;
  ++taken_;
  return true;
}

const double *tune_journal::find(size_t file, size_t rung, const std::string &drop) const {
  auto found = known_.find({file, rung, drop});
  return found == known_.end() ? nullptr : &found->second;
}

void tune_journal::add(size_t file, size_t rung, const std::string &drop, double quality) {
  append({{"file", file}, {"rung", rung}, {"drop", drop}, {"quality", std::isfinite(quality) ? ordered(quality) : ordered()}});
  known_[{file, rung, drop}] = quality;
}

// With one write, so that a kill leaves a line whole, or cut off where its end is missing.
void tune_journal::append(const ordered &object) {
  const std::string line = object.dump(-1, ' ', false, ordered::error_handler_t::replace) + "\n";
  for (size_t done = 0; done < line.size();) {
    const ssize_t n = write(fd_, line.data() + done, line.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_errno("write", path_);
    done += size_t(n);
  }
}

// ---------------------------------------------------------------------------------------------- hashes

namespace {

// FNV-1a over words of 8 bytes: tells files apart, and does not defend against anyone.
class hash {
 public:
  void add(const void *data, size_t bytes) {
    const char *p = static_cast<const char *>(data);
    for (; bytes >= sizeof(uint64_t); p += sizeof(uint64_t), bytes -= sizeof(uint64_t)) {
      uint64_t word;
      memcpy(&word, p, sizeof word);
      mix(word);
    }
    uint64_t rest = uint64_t(bytes) << 56;
    memcpy(&rest, p, bytes);
    mix(rest + (uint64_t(bytes) << 56));
  }
  void add(std::string_view text) { add(text.data(), text.size()); }
  std::string str() const { return format("%016llx", static_cast<unsigned long long>(state_)); }

 private:
  void mix(uint64_t word) {
    state_ = (state_ ^ word) * 0x100000001b3;
    state_ ^= state_ >> 29;
  }
  uint64_t state_ = 0xcbf29ce484222325;
};

void add_file(const std::string &path, hash *h) {
  std::ifstream in(path, std::ios::binary);
  if (!in) fail_errno("open", path);
  std::vector<char> chunk(size_t(1) << 20);
  do {
    in.read(chunk.data(), std::streamsize(chunk.size()));
    h->add(chunk.data(), size_t(in.gcount()));
  } while (in);
  if (in.bad()) fail_errno("read", path);
}

}  // namespace

std::string hash_of_data(const std::string &path, bool of_images) {
  hash h;
  std::error_code error;
  if (!fs::is_directory(path, error)) {
    add_file(path, &h);
    return h.str();
  }
  // What a task reads of a folder, and not what else lies in it: plots, weight files, the journal itself.
  for (const std::string &name : retrieval_files)
    if (fs::is_regular_file(fs::path(path) / name, error)) {
      h.add(name);
      add_file((fs::path(path) / name).string(), &h);
    }
  for (const std::string &file : of_images ? image_files(path) : std::vector<std::string>()) {
    h.add(fs::path(file).lexically_relative(path).string());  // the class is in it
    add_file(file, &h);
  }
  return h.str();
}

std::string hash_of_model(const rs_model *model) {
  hash h;
  for (size_t i = 0; i < rs_model_tensor_count(model); ++i) {
    rs_tensor_info info{};
    check(rs_model_tensor_at(model, i, &info));
    h.add(info.name);
    h.add(info.data, info.bytes);
  }
  for (size_t i = 0; i < rs_model_meta_count(model); ++i) {
    rs_meta meta{};
    check(rs_model_meta_at(model, i, &meta));
    const std::string_view key = meta.key;
    if (key.substr(0, 5) == "drop.") continue;  // what rs tune itself stores
    h.add(key);
    const bool flag = meta.boolean;
    switch (meta.kind) {
      case RS_META_BOOL:
        h.add(&flag, sizeof flag);
        break;
      case RS_META_I64:
        h.add(&meta.i64, sizeof meta.i64);
        break;
      case RS_META_F64:
        h.add(&meta.f64, sizeof meta.f64);
        break;
      case RS_META_STR:
        h.add(meta.str, meta.count);
        break;
      case RS_META_I64S:
        h.add(meta.i64s, meta.count * sizeof *meta.i64s);
        break;
      case RS_META_F32S:
        h.add(meta.f32s, meta.count * sizeof *meta.f32s);
        break;
      case RS_META_STRS:
        for (const std::string &text : strings_of(meta)) h.add(text);
        break;
    }
  }
  return h.str();
}
