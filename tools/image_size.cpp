#include "image_size.h"

#include <charconv>

// What a model can do is the library's to say; this only keeps numbers within its types.
static constexpr int32_t most = 65536;

static int32_t take_side(std::string_view *text) {
  int32_t side = 0;
  const auto [end, error] = std::from_chars(text->data(), text->data() + text->size(), side);
  if (error != std::errc() || side < 1 || side > most) return 0;
  text->remove_prefix(size_t(end - text->data()));
  return side;
}

image_size parse_image_size(const std::string &option, std::string_view text) {
  if (text.empty()) return {};
  std::string_view rest = text;
  image_size size;
  size.width = size.height = take_side(&rest);
  if (size.width > 0 && !rest.empty() && rest[0] == 'x') {
    rest.remove_prefix(1);
    size.height = take_side(&rest);
  }
  if (size.width == 0 || size.height == 0 || !rest.empty())
    fail_usage(option, ": ", in_quotes(text), " is not N or WIDTHxHEIGHT, numbers of pixels from 1 to ", most);
  return size;
}

void add_image_size_option(CLI::App *sub, std::string *text) {
  sub->add_option("--image-size", *text, "pixels that images are brought to: N or WIDTHxHEIGHT (default: the model's)")
      ->type_name("N|WxH")
      ->check([](const std::string &value) { return value.empty() ? std::string("is empty") : std::string(); });
}
