#include "shapes.h"

#include <algorithm>
#include <charconv>

static constexpr size_t most = 65536;

// A number from 1 to `most` at the front of `text`, which is cut off; 0 when there is none.
static size_t take_number(std::string_view *text) {
  size_t number = 0;
  auto [end, error] = std::from_chars(text->data(), text->data() + text->size(), number);
  if (error != std::errc() || number > most) return 0;
  text->remove_prefix(size_t(end - text->data()));
  return number;
}

static shape parse_shape(const std::string &option, std::string_view text) {
  std::string_view rest = text;
  shape result{};
  result.batch = take_number(&rest);
  bool has_x = !rest.empty() && rest[0] == 'x';
  if (has_x) rest.remove_prefix(1);
  result.tokens = take_number(&rest);
  if (result.batch == 0 || !has_x || result.tokens == 0 || !rest.empty())
    fail_usage(option, ": ", in_quotes(text), " is not BATCHxTOKENS, two numbers from 1 to ", most, " as in 8x128");
  return result;
}

std::vector<shape> parse_shapes(const std::string &option, std::string_view list) {
  std::vector<shape> shapes;
  for (;;) {
    size_t comma = list.find(',');
    shapes.push_back(parse_shape(option, list.substr(0, comma)));
    if (comma == std::string_view::npos) return shapes;
    list.remove_prefix(comma + 1);
  }
}

std::vector<size_t> parse_counts(const std::string &option, std::string_view list, const char *what) {
  std::vector<size_t> counts;
  for (;;) {
    const size_t comma = std::min(list.find(','), list.size());
    std::string_view rest = list.substr(0, comma);
    counts.push_back(take_number(&rest));
    if (counts.back() == 0 || !rest.empty())
      fail_usage(option, ": ", in_quotes(list.substr(0, comma)), " is not a number, 1 to ", most, ", of ", what);
    if (comma == list.size()) return counts;
    list.remove_prefix(comma + 1);
  }
}
