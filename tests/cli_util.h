// Running the program rs and looking at what it says.
#pragma once
#include <nlohmann/json.hpp>

#include <sstream>

#include "test_util.h"

using json = nlohmann::json;
using strings = std::vector<std::string>;

inline strings lines_of(const std::string &text) {
  strings lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  return lines;
}

inline std::vector<json> jsonl(const std::string &text) {
  std::vector<json> objects;
  for (const std::string &line : lines_of(text)) {
    objects.push_back(json::parse(line, nullptr, false));
    EXPECT_FALSE(objects.back().is_discarded()) << line;
  }
  return objects;
}

inline std::vector<float> floats(const json &array) { return array.get<std::vector<float>>(); }

inline run_result rs(strings arguments, const std::string &input = "") {
  arguments.insert(arguments.begin(), program());
  run_options options;
  options.input = input;
  return run(arguments, options);
}

// Exit status 1 or 2 and one line that begins with "rs: " and says `part`; nothing on standard output.
inline void expect_failure(const run_result &r, int code, const std::string &part) {
  EXPECT_EQ(r.code, code) << r;
  EXPECT_EQ(r.out, "") << r;
  EXPECT_EQ(lines_of(r.err).size(), 1u) << r;
  EXPECT_EQ(r.err.compare(0, 4, "rs: "), 0) << r;
  EXPECT_NE(r.err.find(part), std::string::npos) << r << "\nwanted: " << part;
}
