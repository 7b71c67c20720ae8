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

static image_batch parse_image_batch(const std::string &option, std::string_view text) {
  std::string_view rest = text;
  size_t numbers[3] = {}, n = 0;
  bool whole = false;
  while (n < 3) {
    numbers[n] = take_number(&rest);
    if (numbers[n++] == 0) break;
    whole = rest.empty();
    if (whole || rest[0] != 'x') break;
    rest.remove_prefix(1);
  }
  if (!whole || n < 2)
    fail_usage(option, ": ", in_quotes(text), " is not BATCHxSIZE or BATCHxWIDTHxHEIGHT, numbers from 1 to ", most, " as in 8x224");
  return {numbers[0], numbers[1], numbers[n - 1]};
}

template <class T>
static std::vector<T> parse_list(const std::string &option, std::string_view list,
                                 T (*parse)(const std::string &, std::string_view)) {
  std::vector<T> all;
  for (;;) {
    const size_t comma = list.find(',');
    all.push_back(parse(option, list.substr(0, comma)));
    if (comma == std::string_view::npos) return all;
    list.remove_prefix(comma + 1);
  }
}

std::vector<shape> parse_shapes(const std::string &option, std::string_view list) { return parse_list(option, list, parse_shape); }

std::vector<image_batch> parse_image_batches(const std::string &option, std::string_view list) {
  return parse_list(option, list, parse_image_batch);
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
