#include "safetensors.h"
#include "json.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <algorithm>
#include <cstring>

mapped_file::mapped_file(const std::string &path) {
  int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail_errno("open", path);
  struct stat status;
  bool regular = fstat(fd, &status) == 0 && S_ISREG(status.st_mode);
  void *map = MAP_FAILED;
  if (regular && status.st_size > 0) map = mmap(nullptr, size_t(status.st_size), PROT_READ, MAP_PRIVATE, fd, 0);
  close(fd);
  if (!regular) fail(in_quotes(path), " is not a regular file");
  if (status.st_size == 0) return;
  if (map == MAP_FAILED) fail_errno("map", path);
  data_ = static_cast<const unsigned char *>(map);
  size_ = size_t(status.st_size);
}

mapped_file::mapped_file(mapped_file &&other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

mapped_file::~mapped_file() {
  if (data_) munmap(const_cast<unsigned char *>(data_), size_);
}

namespace {

constexpr size_t max_header_bytes = 100'000'000;  // the limit of the safetensors library itself
constexpr size_t max_rank = 32;                   // before multiplication; a family of models needs far less

struct dtype_size {
  const char *name;
  size_t bytes;
};
constexpr dtype_size dtype_sizes[] = {
    {"F64", 8}, {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"I64", 8}, {"I32", 4},     {"I16", 2},     {"I8", 1},      {"U64", 8},
    {"U32", 4}, {"U16", 2}, {"U8", 1},  {"BOOL", 1}, {"C64", 8}, {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F8_E8M0", 1},
};

// One tensor's entry of the header, read and checked.  `where` begins each error: "model.safetensors: tensor 'x'".
class entry_reader {
 public:
  entry_reader(const std::string &where, const json &header) : where_(where), header_(header) {}

  safetensors_entry read(const std::string &name, const unsigned char *data, size_t data_bytes) {
    if (!header_.is_object()) bad("is not described by an object");
    safetensors_entry entry{name, dtype(), shape(), nullptr, 0};
    size_t begin = 0, end = 0;
    read_offsets(&begin, &end);
    if (begin > end || end > data_bytes)
      fail(where_, ": data_offsets [", begin, ", ", end, "], but the file has ", data_bytes, " bytes of data");
    size_t expected = bytes_of(entry);
    if (end - begin != expected)
      fail(where_, ": data_offsets span ", end - begin, " bytes, ", entry.dtype, " of shape ",
           nlohmann::ordered_json(entry.shape).dump(), " takes ", expected);
    entry.data = data + begin;
    entry.bytes = expected;
    return entry;
  }

 private:
  [[noreturn]] void bad(const char *what) { fail(where_, " ", what); }

  const json &member(const char *key) {
    auto found = header_.find(key);
    if (found == header_.end()) fail(where_, " has no ", key);
    return *found;
  }

  std::string dtype() {
    const json &value = member("dtype");
    if (!value.is_string()) bad("has a dtype that is not a string");
    return value.get<std::string>();
  }

  std::vector<int64_t> shape() {
    const json &value = member("shape");
    if (!value.is_array()) bad("has a shape that is not an array");
    if (value.size() > max_rank) fail(where_, " has ", value.size(), " dimensions, at most ", RS_MAX_RANK, " are read");
    std::vector<int64_t> shape;
    for (const json &dim : value) {
      if (!dim.is_number_unsigned() || dim.get<uint64_t>() > uint64_t(INT64_MAX)) bad("has a shape that is not of whole numbers");
      shape.push_back(dim.get<int64_t>());
    }
    return shape;
  }

  void read_offsets(size_t *begin, size_t *end) {
    const json &value = member("data_offsets");
    if (!value.is_array() || value.size() != 2 || !value[0].is_number_unsigned() || !value[1].is_number_unsigned())
      bad("has data_offsets that are not two whole numbers");
    *begin = value[0].get<size_t>();
    *end = value[1].get<size_t>();
  }

  size_t bytes_of(const safetensors_entry &entry) {
    size_t bytes = 0;
    for (const dtype_size &known : dtype_sizes)
      if (entry.dtype == known.name) bytes = known.bytes;
    if (bytes == 0) fail(where_, " has the unknown dtype ", in_quotes(entry.dtype));
    for (int64_t dim : entry.shape)
      if (__builtin_mul_overflow(bytes, size_t(dim), &bytes)) bad("has a shape whose size overflows");
    return bytes;
  }

  const std::string &where_;
  const json &header_;
};

// The data of all tensors must cover the rest of the file exactly: no overlap, no hole where something else could hide.
void check_coverage(const std::vector<safetensors_entry> &entries, const unsigned char *data, size_t bytes,
                    const std::string &name) {
  size_t position = 0;
  for (const safetensors_entry &entry : entries) {
    size_t begin = size_t(entry.data - data);
    if (begin < position) fail(name, ": tensor ", in_quotes(entry.name), " overlaps the one before it");
    if (begin > position) fail(name, ": ", begin - position, " bytes before tensor ", in_quotes(entry.name), " belong to none");
    position = begin + entry.bytes;
  }
  if (position != bytes) fail(name, ": ", bytes - position, " bytes at the end belong to no tensor");
}

}  // namespace

safetensors_file::safetensors_file(const std::string &path, const std::string &name) : file_(path) { read_header(name); }

void safetensors_file::read_header(const std::string &name) {
  uint64_t header_bytes = 0;
  const size_t prefix = sizeof header_bytes;
  if (file_.size() < prefix) fail(name, ": ", file_.size(), " bytes are too few for a safetensors file");
  memcpy(&header_bytes, file_.data(), prefix);
  if (header_bytes > max_header_bytes)
    fail(name, ": a header of ", header_bytes, " bytes, at most ", max_header_bytes, " are allowed; not a safetensors file?");
  if (header_bytes > file_.size() - prefix) fail(name, ": a header of ", header_bytes, " bytes, but the file has ", file_.size());

  const unsigned char *text = file_.data() + prefix;
  json header = parse_json({reinterpret_cast<const char *>(text), size_t(header_bytes)}, name + ": header", json_keys::unique);
  if (!header.is_object()) fail(name, ": header: not a JSON object");
  const unsigned char *data = text + header_bytes;
  size_t data_bytes = file_.size() - prefix - size_t(header_bytes);
  for (const auto &[key, value] : header.items()) {
    if (key == "__metadata__") continue;
    std::string where = name + ": tensor " + in_quotes(key);
    entries_.push_back(entry_reader(where, value).read(key, data, data_bytes));
  }
  std::sort(entries_.begin(), entries_.end(), [](const safetensors_entry &a, const safetensors_entry &b) {
    return a.data != b.data ? a.data < b.data : a.bytes < b.bytes;  // an empty tensor goes before what begins where it lies
  });
  check_coverage(entries_, data, data_bytes, name);
}
