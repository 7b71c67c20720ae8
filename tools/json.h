// JSON files of a model folder, checked for what a reader must not trip over.
#pragma once
#include <nlohmann/json.hpp>

#include <optional>
#include <string>
#include <string_view>

using json = nlohmann::json;

// No published file nests deeper than a handful of levels; a hostile one could exhaust the stack of whoever walks it.
constexpr int max_json_depth = 64;

enum class json_keys {
  any,    // the last of equal keys counts, as in Python
  unique  // two equal keys in one object are an error
};

// Throws failure: "<name>: not valid JSON: …".
json parse_json(std::string_view text, const std::string &name, json_keys keys = json_keys::any);

// What nlohmann::json says about a parse error, cut down to place and reason; of the place only the column in what is one line.
std::string json_error_text(const char *what, bool one_line);

// An object whose members are read with their type checked.  A member that is null counts as absent.
class json_object {
 public:
  json_object(const json &value, std::string where);  // throws failure when `value` is not an object; it must outlive this
  const json *find(const char *key) const;            // nullptr when absent or null
  std::optional<bool> boolean(const char *key) const;
  std::optional<int64_t> integer(const char *key) const;
  std::optional<double> number(const char *key) const;
  std::optional<std::string> string(const char *key) const;
  json_object object(const char *key) const;  // must be there
  const json &array(const char *key) const;   // must be there
  const std::string &where() const { return where_; }

 private:
  [[noreturn]] void wrong(const char *key, const char *wanted) const;
  const json &value_;
  std::string where_;  // begins every error: "config.json"
};
