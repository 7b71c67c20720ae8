// Images that nobody meant to be images, through the decoder and the resizer: a libFuzzer target (`make fuzz`).  test_image.cpp
// calls it too, with images of its own that it spoils, so that it is built and right in every ordinary build.
#include "../models/image.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

namespace {

// Not an assertion, which a release build leaves out.
void need(bool truth, const char *what) {
  if (truth) return;
  fprintf(stderr, "fuzz_image: not so: %s\n", what);
  abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  constexpr int64_t max_pixels = 1 << 18;  // enough for every path, and quick
  rs_rgb image;
  const rs_status status = rs_image_decode(data, size, max_pixels, &image);
  if (status != RS_OK) {
    need(status == RS_ERR_FORMAT || status == RS_ERR_UNSUPPORTED || status == RS_ERR_LIMIT, "a bad image is nothing else");
    need(*rs_last_error(), "the error says something");
    return 0;
  }
  need(image.width > 0 && image.height > 0 && int64_t(image.width) * image.height <= max_pixels, "the limit holds");
  need(image.data.size() == size_t(3) * size_t(image.width) * size_t(image.height), "all pixels are there");
  unsigned sum = 0;
  for (const uint8_t v : image.data) sum += v;

  // The image chooses how it is resized.
  rs_image_spec spec;
  spec.resize = static_cast<rs_resize>(sum % 3);
  spec.filter = static_cast<rs_filter>(sum / 3 % 6);
  spec.crop = spec.resize != rs_resize::exact || sum / 18 % 2;
  spec.crop_round = sum / 36 % 2;
  spec.resize_width = 1 + int32_t(sum / 72 % 40), spec.resize_height = spec.resize == rs_resize::exact ? 13 : spec.resize_width;
  spec.crop_width = 11, spec.crop_height = 16;
  std::vector<float> pixels(3 * size_t(spec.width()) * size_t(spec.height()), NAN);
  need(rs_image_pixels(spec, image.data.data(), image.width, image.height, pixels.data()) == RS_OK,
       "what was decoded can be resized");
  for (const float v : pixels) need(v >= 0 && v <= 1, "every pixel was set");
  return 0;
}
