// Images: from a file's bytes to the pixels that a vision encoder gets, as Pillow and transformers make them.  Internal to the
// library.
#pragma once
#include "../rs.h"

#include <vector>

constexpr int32_t rs_image_most_side = 16384;  // of what an encoder gets: of a size that is asked for, and of a model's own

struct rs_rgb {
  int32_t width = 0, height = 0;
  std::vector<uint8_t> data;  // [height, width, 3]
};

enum class rs_resize {
  none,
  shortest_edge,  // the image covers resize_width x resize_height, its shape kept
  exact           // to resize_width x resize_height, whatever its shape was
};

enum class rs_filter { nearest = 0, lanczos = 1, bilinear = 2, bicubic = 3, box = 4, hamming = 5 };  // as Pillow numbers them

// What a model wants of an image: the image.* metadata as plain data.
struct rs_image_spec {
  rs_resize resize = rs_resize::none;
  int32_t resize_width = 0, resize_height = 0;  // shortest_edge: both the edge
  rs_filter filter = rs_filter::bicubic;
  bool crop = false;  // the middle; zeros around it where the image is smaller
  int32_t crop_width = 0, crop_height = 0;
  bool crop_round = false;    // half of an odd margin: rounded to even, as torchvision and timm do; else down, as transformers
  double rescale = 1 / 255.;  // (value * rescale - mean) / std
  float mean[3] = {0, 0, 0}, std[3] = {1, 1, 1};

  // Of what comes out.
  int32_t width() const { return crop ? crop_width : resize_width; }
  int32_t height() const { return crop ? crop_height : resize_height; }
};

// From the image.* metadata, all of it checked; errors name the key.
rs_status rs_image_spec_load(const rs_model *model, rs_image_spec *out);

// The same preparation for a result of another size.  A crop keeps its share of the image.
rs_status rs_image_spec_resize(rs_image_spec *spec, int32_t width, int32_t height);

// JPEG, PNG, BMP, GIF (its first frame) or PNM (P5, P6) to RGB: upright as EXIF says, alpha dropped, 16 bits cut to 8.  max_pixels:
// a larger image is an error before anything is allocated for it; 0: 100 million.
rs_status rs_image_decode(const void *data, size_t bytes, int64_t max_pixels, rs_rgb *out);

// rgb [height, width, 3] to planar [3, spec.height(), spec.width()].  The resized bytes are those of Pillow, bit for bit.
rs_status rs_image_pixels(const rs_image_spec &spec, const uint8_t *rgb, int32_t width, int32_t height, float *out);
