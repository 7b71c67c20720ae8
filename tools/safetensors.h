// Reader of safetensors files: a length of 8 bytes, a JSON header of that length, then the data of all tensors without a gap.
// Published files are untrusted input: every number is checked against the file before it is used.
#pragma once
#include "common.h"

// A file mapped for reading.
class mapped_file {
 public:
  explicit mapped_file(const std::string &path);
  ~mapped_file();
  mapped_file(mapped_file &&other) noexcept;
  mapped_file(const mapped_file &) = delete;
  mapped_file &operator=(const mapped_file &) = delete;
  mapped_file &operator=(mapped_file &&) = delete;
  const unsigned char *data() const { return data_; }
  size_t size() const { return size_; }

 private:
  const unsigned char *data_ = nullptr;
  size_t size_ = 0;
};

struct safetensors_entry {
  std::string name;
  std::string dtype;  // as published: "F16"
  std::vector<int64_t> shape;
  const unsigned char *data;
  size_t bytes;
};

class safetensors_file {
 public:
  // `name` is what errors call the file.  Throws failure.
  safetensors_file(const std::string &path, const std::string &name);
  const std::vector<safetensors_entry> &entries() const { return entries_; }  // in the order of their data

 private:
  void read_header(const std::string &name);
  mapped_file file_;
  std::vector<safetensors_entry> entries_;
};
