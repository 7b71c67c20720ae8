#include "json.h"
#include "common.h"

#include <set>

std::string json_error_text(const char *what, bool one_line) {
  std::string text = what;
  size_t id = text.find("] ");  // "[json.exception.parse_error.101] "
  if (text[0] == '[' && id != std::string::npos) text.erase(0, id + 2);
  const std::string_view first_line = "parse error at line 1, ";
  if (one_line && text.compare(0, first_line.size(), first_line) == 0) text.erase(0, first_line.size());
  size_t quote = text.find("; last read: ");  // repeats the input, which may be long and is seldom a help
  if (quote != std::string::npos) {
    size_t expected = text.rfind("; expected ");
    text.replace(quote, std::string::npos, expected != std::string::npos && expected > quote ? text.substr(expected) : "");
  }
  constexpr size_t readable = 200;
  if (text.size() > readable) text = text.substr(0, readable) + "…";
  return text;
}

namespace {

// Watches a parse: depth, and keys of each object that is open.
class parse_guard {
 public:
  parse_guard(const std::string &name, json_keys keys) : name_(name), keys_(keys) {}

  bool operator()(int depth, json::parse_event_t event, json &value) {
    using event_t = json::parse_event_t;
    if (depth >= max_json_depth) fail(name_, ": nested deeper than ", max_json_depth, " levels");
    if (keys_ == json_keys::any) return true;
    if (event == event_t::object_start) seen_.emplace_back();
    if (event == event_t::object_end) seen_.pop_back();
    if (event == event_t::key && !seen_.back().insert(value.get<std::string>()).second)
      fail(name_, ": ", in_quotes(value.get<std::string>()), " appears twice");
    return true;
  }

 private:
  const std::string &name_;
  json_keys keys_;
  std::vector<std::set<std::string>> seen_;
};

}  // namespace

json parse_json(std::string_view text, const std::string &name, json_keys keys) {
  parse_guard guard(name, keys);
  try {
    return json::parse(text.begin(), text.end(),
                       [&guard](int depth, json::parse_event_t event, json &value) { return guard(depth, event, value); });
  } catch (const json::exception &e) {
    fail(name, ": not valid JSON: ", json_error_text(e.what(), text.find('\n') == std::string_view::npos));
  }
}

// ---------------------------------------------------------------------------------------------- json_object

json_object::json_object(const json &value, std::string where) : value_(value), where_(std::move(where)) {
  if (!value_.is_object()) fail(where_, ": not a JSON object");
}

void json_object::wrong(const char *key, const char *wanted) const {
  fail(where_, ": '", key, "' is ", (value_.contains(key) ? value_[key].type_name() : "absent"), ", expected ", wanted);
}

const json *json_object::find(const char *key) const {
  auto found = value_.find(key);
  return found == value_.end() || found->is_null() ? nullptr : &*found;
}

std::optional<bool> json_object::boolean(const char *key) const {
  const json *value = find(key);
  if (!value) return std::nullopt;
  if (!value->is_boolean()) wrong(key, "true or false");
  return value->get<bool>();
}

std::optional<int64_t> json_object::integer(const char *key) const {
  const json *value = find(key);
  if (!value) return std::nullopt;
  if (!value->is_number_integer() || (value->is_number_unsigned() && value->get<uint64_t>() > uint64_t(INT64_MAX)))
    wrong(key, "a whole number");
  return value->get<int64_t>();
}

std::optional<double> json_object::number(const char *key) const {
  const json *value = find(key);
  if (!value) return std::nullopt;
  if (!value->is_number()) wrong(key, "a number");
  return value->get<double>();
}

std::optional<std::string> json_object::string(const char *key) const {
  const json *value = find(key);
  if (!value) return std::nullopt;
  if (!value->is_string()) wrong(key, "a string");
  return value->get<std::string>();
}

json_object json_object::object(const char *key) const {
  const json *value = find(key);
  if (!value || !value->is_object()) wrong(key, "an object");
  return json_object(*value, where_ + ": " + key);
}

const json &json_object::array(const char *key) const {
  const json *value = find(key);
  if (!value || !value->is_array()) wrong(key, "an array");
  return *value;
}
