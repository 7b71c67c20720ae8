// What the reference implementations answered, as safetensors files of F32 and I32.
#pragma once
#include "../tools/safetensors.h"
#include "test_util.h"

#include <map>

struct array {
  std::vector<int64_t> shape;
  std::vector<float> values;  // of F32
  std::vector<int32_t> ints;  // of I32
};

inline std::map<std::string, array> read_arrays(const std::string &path) {
  std::map<std::string, array> all;
  const safetensors_file file(path, path);
  for (const safetensors_entry &e : file.entries()) {
    array &a = all[e.name];
    a.shape = e.shape;
    if (e.dtype == "F32") {
      a.values.resize(e.bytes / 4);
      memcpy(a.values.data(), e.data, e.bytes);
    } else {
      EXPECT_EQ(e.dtype, "I32") << e.name;
      a.ints.resize(e.bytes / 4);
      memcpy(a.ints.data(), e.data, e.bytes);
    }
  }
  return all;
}
