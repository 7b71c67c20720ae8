// From image files to pixels: what Pillow makes of them (tests/images, by make_images.py), what nobody should make of others, and
// the metadata that say what a model wants.
#include "../models/image.h"
#include "../tools/common.h"
#include "../tools/hf.h"
#include "test_util.h"
#include "tiny_bert.h"

#include <algorithm>
#include <array>
#include <functional>
#include <numeric>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

namespace {

std::string image_path(const std::string &name) { return source_dir() + "/tests/images/" + name; }
std::string image_file(const std::string &name) { return ::read_file(image_path(name)); }

const json &manifest() {
  static const json m = parse_json(image_file("manifest.json"), "manifest.json");
  return m;
}

rs_status decode(const std::string &bytes, rs_rgb *out, int64_t max_pixels = 0) {
  // Memory of just that size, so that reading on is seen by AddressSanitizer.
  const std::vector<char> exact(bytes.begin(), bytes.end());
  return rs_image_decode(exact.data(), exact.size(), max_pixels, out);
}

rs_rgb decoded(const std::string &bytes) {
  rs_rgb image;
  EXPECT_EQ(decode(bytes, &image), RS_OK) << rs_last_error();
  return image;
}

void expect_error(const std::string &bytes, rs_status status, const std::string &part) {
  rs_rgb image;
  EXPECT_EQ(decode(bytes, &image), status) << part;
  EXPECT_NE(std::string(rs_last_error()).find(part), std::string::npos) << "got: " << rs_last_error() << "\nwanted: " << part;
}

// make_images.py makes the same.
std::vector<uint8_t> noise(size_t count) {
  uint32_t state = 1;
  std::vector<uint8_t> out(count);
  for (uint8_t &v : out) {
    state = state * 1664525 + 1013904223;
    v = static_cast<uint8_t>(state >> 24);
  }
  return out;
}

uint32_t crc32(const std::vector<uint8_t> &bytes) {
  uint32_t crc = ~0u;
  for (const uint8_t b : bytes) {
    crc ^= b;
    for (int i = 0; i < 8; i++) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
  }
  return ~crc;
}

std::string be32(uint32_t v) {
  return {static_cast<char>(v >> 24), static_cast<char>(v >> 16), static_cast<char>(v >> 8), static_cast<char>(v)};
}
std::string chunk(const std::string &name, const std::string &data) {
  return be32(static_cast<uint32_t>(data.size())) + name + data + be32(0);
}

// A PNG whose data are stored, not compressed.  `scanlines` have their filter bytes.
std::string png(uint32_t width, uint32_t height, int depth, int colour, const std::string &scanlines,
                const std::string &extra = "") {
  const auto n = static_cast<uint16_t>(scanlines.size());
  const std::string head = be32(width) + be32(height) + std::string{char(depth), char(colour), 0, 0, 0};
  const std::string data =
      std::string{'\x78', '\x01', '\x01', char(n & 0xFF), char(n >> 8), char(~n & 0xFF), char(~n >> 8 & 0xFF)} + scanlines +
      be32(0);
  return std::string("\x89PNG\r\n\x1A\n", 8) + chunk("IHDR", head) + extra + chunk("IDAT", data) + chunk("IEND", "");
}

std::string with(std::string text, size_t at, const std::string &bytes) { return text.replace(at, bytes.size(), bytes); }

// Where a marker of a JPEG is, other than in entropy-coded data.
size_t marker(const std::string &jpeg, int code) {
  const size_t at = jpeg.find(std::string{'\xFF', char(code)});
  EXPECT_NE(at, std::string::npos) << code;
  return at;
}

// ------------------------------------------------------------------------------------------------ decode

TEST(image_decode, as_pillow) {
  const std::string expected = image_file("expected.bin");
  size_t at = 0;
  for (const json &entry : manifest()["images"]) {
    const std::string name = entry["name"];
    SCOPED_TRACE(name);
    const rs_rgb image = decoded(image_file(name));
    ASSERT_EQ(image.width, entry["width"].get<int>());
    ASSERT_EQ(image.height, entry["height"].get<int>());
    ASSERT_LE(at + image.data.size(), expected.size());
    int worst = 0;
    for (size_t i = 0; i < image.data.size(); i++)
      worst = std::max(worst, std::abs(int(image.data[i]) - int(static_cast<uint8_t>(expected[at + i]))));
    EXPECT_LE(worst, entry["tolerance"].get<int>());
    at += image.data.size();
  }
  EXPECT_EQ(at, expected.size());
  EXPECT_GT(at, 0u);
}

// Pillow clips grey of 16 bits at 255, which nobody can want; the high byte is what it takes of colours.
TEST(image_decode, sixteen_bits_of_grey) {
  const std::string row("\0\x12\x34\xFF\xFF\x00\x80\xA0\x00", 9);
  const rs_rgb image = decoded(png(4, 1, 16, 0, row));
  EXPECT_EQ(image.data, (std::vector<uint8_t>{0x12, 0x12, 0x12, 0xFF, 0xFF, 0xFF, 0, 0, 0, 0xA0, 0xA0, 0xA0}));
  const rs_rgb pgm = decoded(std::string("P5 2 1 65535\n\x12\x34\xFF\xFF", 17));
  EXPECT_EQ(pgm.data, (std::vector<uint8_t>{18, 18, 18, 255, 255, 255}));
}

TEST(image_decode, palette_that_is_too_short_is_black_behind_it) {
  const rs_rgb image = decoded(png(3, 1, 8, 3, std::string("\0\0\1\xFF", 4), chunk("PLTE", "\x10\x20\x30\x40\x50\x60")));
  EXPECT_EQ(image.data, (std::vector<uint8_t>{0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0, 0, 0}));
}

TEST(image_decode, bmp_with_colours_that_it_does_not_have) {
  const std::string bmp = image_file("indexed.bmp");  // 8 bits, 11 colours; rows of 24 bytes at the end
  expect_error(with(bmp, bmp.size() - 24, "\x0B"), RS_ERR_FORMAT, "not in its palette of 11");
  EXPECT_EQ(decoded(with(bmp, bmp.size() - 24, "\x0A")).width, 23);
  const std::string core = with(with(bmp, 14, std::string("\x0C\0\0\0\1\0\1\0\1\0\x08", 11)), 25, std::string(1, 0));
  expect_error(core, RS_ERR_UNSUPPORTED, "OS/2");
}

TEST(image_decode, bmp_from_the_top) {
  const std::string bmp = image_file("rgb.bmp");
  const rs_rgb upright = decoded(bmp), flipped = decoded(with(bmp, 22, std::string("\xEF\xFF\xFF\xFF", 4)));  // height -17
  ASSERT_EQ(flipped.height, 17);
  for (size_t y = 0; y < 17; y++)
    EXPECT_TRUE(std::equal(&upright.data[y * 69], &upright.data[y * 69] + 69, &flipped.data[(16 - y) * 69])) << y;
  expect_error(with(bmp, 22, std::string("\0\0\0\x80", 4)), RS_ERR_FORMAT, "corrupt BMP: 23x2147483648 pixels");  // INT_MIN
}

// ------------------------------------------------------------------------------------------------ orientation

std::string exif(bool little, uint32_t value, uint32_t type = 3, uint32_t count = 1) {
  const auto number = [&](uint32_t v, size_t bytes) {
    std::string s(bytes, 0);
    for (size_t i = 0; i < bytes; i++) s[little ? i : bytes - 1 - i] = static_cast<char>(v >> (8 * i));
    return s;
  };
  const std::string other = number(0x010F, 2) + number(2, 2) + number(4, 4) + "abc" + std::string(1, 0);  // Make: "abc"
  std::string field = type == 3 ? number(value, 2) : type == 1 ? number(value, 1) : number(value, 4);
  field.resize(4);
  return (little ? "II" : "MM") + number(42, 2) + number(8, 4) + number(2, 2) + other + number(0x0112, 2) + number(type, 2) +
         number(count, 4) + field + number(0, 4);
}

std::string jpeg_with_exif(const std::string &block) {
  const std::string jpeg = image_file("rgb.jpg"), body = std::string("Exif\0\0", 6) + block;
  const size_t length = body.size() + 2;
  return jpeg.substr(0, 2) + std::string{'\xFF', '\xE1', char(length >> 8), char(length & 0xFF)} + body + jpeg.substr(2);
}
std::string png_with_exif(const std::string &block, bool at_end) {
  const std::string file = image_file("rgb.png");
  const size_t at = at_end ? file.size() - 12 : 8 + 25;  // before IEND, behind IHDR
  return file.substr(0, at) + chunk("eXIf", block) + file.substr(at);
}

// What the eight values mean, said as Pillow says it: what was in the first row and column.
rs_rgb transposed(const rs_rgb &in, int orientation) {
  rs_rgb out;
  const bool swap = orientation >= 5;
  out.width = swap ? in.height : in.width, out.height = swap ? in.width : in.height;
  for (int y = 0; y < out.height; y++)
    for (int x = 0; x < out.width; x++) {
      int from_x = x, from_y = y;
      switch (orientation) {
        case 2:
          from_x = in.width - 1 - x;
          break;  // mirrored
        case 3:
          from_x = in.width - 1 - x, from_y = in.height - 1 - y;
          break;  // by 180 degrees
        case 4:
          from_y = in.height - 1 - y;
          break;  // upside down
        case 5:
          from_x = y, from_y = x;
          break;  // along the diagonal
        case 6:
          from_x = y, from_y = in.height - 1 - x;
          break;  // clockwise
        case 7:
          from_x = in.width - 1 - y, from_y = in.height - 1 - x;
          break;  // along the other diagonal
        case 8:
          from_x = in.width - 1 - y, from_y = x;
          break;  // anticlockwise
        default:
          break;
      }
      for (int c = 0; c < 3; c++) out.data.push_back(in.data[size_t((from_y * in.width + from_x) * 3 + c)]);
    }
  return out;
}

TEST(image_orientation, all_values_in_both_orders_of_bytes) {
  const rs_rgb jpeg = decoded(image_file("rgb.jpg")), png = decoded(image_file("rgb.png"));
  for (int value = 1; value <= 8; value++)
    for (const bool little : {true, false})
      for (const uint32_t type : {1u, 3u, 4u}) {
        SCOPED_TRACE(testing::Message() << value << (little ? " II " : " MM ") << type);
        const std::string block = exif(little, static_cast<uint32_t>(value), type);
        const rs_rgb wanted = transposed(jpeg, value), got = decoded(jpeg_with_exif(block));
        EXPECT_EQ(got.width, wanted.width);
        EXPECT_EQ(got.data, wanted.data);
        EXPECT_EQ(decoded(png_with_exif(block, false)).data, transposed(png, value).data);
        EXPECT_EQ(decoded(png_with_exif(block, true)).data, transposed(png, value).data);
      }
}

TEST(image_orientation, nonsense_is_ignored) {
  const rs_rgb upright = decoded(image_file("rgb.jpg"));
  const auto ignored = [&](const std::string &block) { EXPECT_EQ(decoded(jpeg_with_exif(block)).data, upright.data); };
  for (const uint32_t value : {0u, 9u, 255u, 65535u}) ignored(exif(true, value)), ignored(exif(false, value));
  ignored(exif(true, 6, 2));
  ignored(exif(true, 6, 5));
  ignored(exif(true, 6, 3, 2));
  ignored(exif(true, 6, 3, 0xFFFFFFFF));
  const std::string good = exif(true, 6);
  for (size_t n = 0; n + 8 < good.size(); n++) ignored(good.substr(0, n));  // the entry is the last but for 8 bytes
  ignored(with(good, 4, "\xFF\xFF\xFF\xFF"));
  ignored(with(good, 4, std::string("\x29\0\0\0", 4)));
  ignored(with(good, 0, "XX"));
  ignored(with(good, 2, std::string("\0\0", 2)));
  // More entries than there are: what is there counts.
  EXPECT_EQ(decoded(jpeg_with_exif(with(good, 8, "\xFF\xFF"))).data, transposed(upright, 6).data);
}

// ------------------------------------------------------------------------------------------------ what is no image

TEST(image_decode, says_what_it_is_not) {
  expect_error("", RS_ERR_FORMAT, "not an image: empty");
  expect_error("a text, though its name ends in .jpg", RS_ERR_FORMAT, "not an image: begins with 'a text, '; rs reads JPEG, PNG");
  expect_error("\xFF\xD8", RS_ERR_FORMAT, "not an image: begins with '\\xFF\\xD8'");
  expect_error(std::string("RIFF\x10\0\0\0WEBPVP8 ", 16), RS_ERR_UNSUPPORTED, "WebP image; rs reads JPEG");
  expect_error(std::string("II*\0\x08\0\0\0", 8), RS_ERR_UNSUPPORTED, "TIFF");
  expect_error(std::string("\0\0\0\x20"
                           "ftypavif",
                           12),
               RS_ERR_UNSUPPORTED, "AVIF");
  expect_error(std::string("\0\0\0\x20"
                           "ftypheic",
                           12),
               RS_ERR_UNSUPPORTED, "HEIC");
  expect_error("8BPS", RS_ERR_UNSUPPORTED, "PSD");
}

TEST(image_decode, truncated_at_every_byte) {
  for (const json &entry : manifest()["images"]) {
    const std::string name = entry["name"], bytes = image_file(name);
    SCOPED_TRACE(name);
    const rs_rgb whole = decoded(bytes);
    const bool gif = name.find(".gif") != std::string::npos;
    size_t errors = 0;
    for (size_t n = 0; n < bytes.size(); n++) {
      rs_rgb image;
      const rs_status status = decode(bytes.substr(0, n), &image);
      if (status == RS_OK) {
        // Of a GIF only the first frame is read: what is cut off behind it is not missed.
        EXPECT_TRUE(gif) << n;
        EXPECT_EQ(image.data, whole.data) << n;
      } else {
        EXPECT_EQ(status, RS_ERR_FORMAT) << n;
        errors++;
        const std::string error = rs_last_error();
        EXPECT_TRUE(error.find("truncated ") == 0 || (n < 8 && error.find("not an image") == 0)) << n << ": " << error;
      }
    }
    EXPECT_GE(errors, gif ? bytes.size() / 3 : bytes.size());
  }
}

TEST(image_decode, size_is_checked_first) {
  rs_rgb image;
  const std::string small = image_file("rgb.png");
  EXPECT_EQ(decode(small, &image, 23 * 17), RS_OK);
  EXPECT_EQ(decode(small, &image, 23 * 17 - 1), RS_ERR_LIMIT);
  EXPECT_STREQ(rs_last_error(), "23x17 pixels, the limit is 390");

  const std::string limit = " pixels, the limit is 100000000";
  expect_error(png(20000, 20000, 8, 2, std::string(1, 0)), RS_ERR_LIMIT, "20000x20000" + limit);
  const std::string jpeg = image_file("rgb.jpg");
  const std::string size = "\xFF\xFF\xFF\xFF";
  expect_error(with(jpeg, marker(jpeg, 0xC0) + 5, size), RS_ERR_LIMIT, "65535x65535" + limit);
  expect_error(with(image_file("indexed.gif"), 6, size), RS_ERR_LIMIT, "65535x65535" + limit);
  expect_error("P6 20000 20000 255\n", RS_ERR_LIMIT, "20000x20000" + limit);
  expect_error("P6 99999999999999999999 2 255\n", RS_ERR_LIMIT, "2147483647x2" + limit);
  expect_error(with(image_file("rgb.bmp"), 18, std::string("\x20\x4E\0\0\x20\x4E\0\0", 8)), RS_ERR_FORMAT, "truncated BMP");

  // Within the limit, but beyond what so few bytes can hold.
  expect_error(png(9000, 9000, 8, 2, std::string(1, 0)), RS_ERR_FORMAT, "cannot hold 9000x9000 pixels");
  expect_error(png(0, 5, 8, 2, std::string(1, 0)), RS_ERR_FORMAT, "image of 0x5 pixels");
  expect_error("P6 0 5 255\n", RS_ERR_FORMAT, "0x5");
}

// 4 MB of zeros in 4 KB, for one pixel.
TEST(image_decode, what_unpacks_to_too_much_is_stopped) {
  // What a chunk is called goes into the message as what can be read.
  expect_error(png(1, 1, 8, 0, std::string("\0\0", 2), chunk("\xDF\nB\x1B", "")), RS_ERR_FORMAT,
               "corrupt PNG: \\xDF\\x0AB\\x1B PNG chunk not known");
  expect_error(image_file("bomb.png"), RS_ERR_FORMAT, "corrupt PNG: unpacks to more than its pixels");
}

TEST(image_decode, jpegs_that_it_does_not_read) {
  const std::string jpeg = image_file("rgb.jpg");
  const size_t frame = marker(jpeg, 0xC0);
  expect_error(with(jpeg, frame + 1, "\xC9"), RS_ERR_UNSUPPORTED, "arithmetic-coded JPEG");
  expect_error(with(jpeg, frame + 1, "\xC3"), RS_ERR_UNSUPPORTED, "lossless");
  expect_error(with(jpeg, frame + 4, "\x0C"), RS_ERR_UNSUPPORTED, "JPEG of 12 bits");
  const std::string cmyk = image_file("cmyk.jpg");
  expect_error(with(cmyk, marker(cmyk, 0xEE) + 4, "X"), RS_ERR_UNSUPPORTED, "no Adobe marker");
  // Scans that cost a handful of bytes and a walk over the image each.
  const std::string progressive = image_file("progressive.jpg");
  const size_t scan = marker(progressive, 0xDA);
  std::string scans;
  for (int i = 0; i < 300; i++) scans += std::string("\xFF\xDA\0\x08\1\1\0\0\0\x10", 10);
  expect_error(progressive.substr(0, scan) + scans + progressive.substr(scan), RS_ERR_LIMIT, "200 scans");
}

// A table of 16 x 255 codes; decoders have room for 256.
TEST(image_decode, huffman_table_larger_than_any) {
  const std::string jpeg = image_file("rgb.jpg");
  const size_t at = marker(jpeg, 0xC4);
  const std::string codes = std::string(1, 0) + std::string(16, '\xFF') + std::string(size_t(16) * 255, '\1');
  const size_t length = codes.size() + 2;
  expect_error(jpeg.substr(0, at) + std::string{'\xFF', '\xC4', char(length >> 8), char(length & 0xFF)} + codes + jpeg.substr(at),
               RS_ERR_FORMAT, "bad Huffman table");
}

TEST(image_decode, spoilt_files_give_an_image_or_an_error) {
  uint32_t state = 7;
  const auto random = [&](size_t below) {
    state = state * 1664525 + 1013904223;
    return static_cast<size_t>(uint64_t(state) * below >> 32);
  };
  size_t runs = 0;
  for (const json &entry : manifest()["images"]) {
    const std::string bytes = image_file(entry["name"]);
    for (int i = 0; i < 200; i++, runs++) {
      std::string spoilt = bytes;
      for (size_t n = 1 + random(4); n-- > 0;) spoilt[random(spoilt.size())] = static_cast<char>(random(256));
      if (i % 4 == 1) spoilt.erase(random(spoilt.size()), 1 + random(8));
      if (i % 4 == 2) spoilt.insert(random(spoilt.size()), bytes.substr(random(bytes.size()), 1 + random(40)));
      if (i % 4 == 3) spoilt[random(std::min<size_t>(spoilt.size(), 64))] = i % 8 == 3 ? '\xFF' : '\0';
      const std::vector<uint8_t> exact(spoilt.begin(), spoilt.end());
      ASSERT_EQ(LLVMFuzzerTestOneInput(exact.data(), exact.size()), 0);
    }
  }
  EXPECT_GT(runs, 5000u);
}

// ------------------------------------------------------------------------------------------------ resize

constexpr rs_filter all_filters[] = {rs_filter::nearest, rs_filter::lanczos, rs_filter::bilinear,
                                     rs_filter::bicubic, rs_filter::box,     rs_filter::hamming};

rs_image_spec exact_spec(int32_t width, int32_t height, rs_filter filter) {
  rs_image_spec s;
  s.resize = rs_resize::exact, s.resize_width = width, s.resize_height = height;
  s.filter = filter, s.rescale = 1;
  return s;
}
rs_image_spec shortest_spec(int32_t edge, int32_t crop_width, int32_t crop_height, rs_filter filter) {
  rs_image_spec s = exact_spec(edge, edge, filter);
  s.resize = rs_resize::shortest_edge;
  s.crop = true, s.crop_width = crop_width, s.crop_height = crop_height;
  return s;
}

std::vector<float> pixels(const rs_image_spec &spec, const std::vector<uint8_t> &rgb, int32_t width, int32_t height) {
  std::vector<float> out(3 * size_t(spec.width()) * size_t(spec.height()), NAN);
  EXPECT_EQ(rs_image_pixels(spec, rgb.data(), width, height, out.data()), RS_OK) << rs_last_error();
  return out;
}

// Bytes [height, width, 3] of pixels that were neither rescaled nor normalised.
std::vector<uint8_t> bytes_of(const std::vector<float> &planes) {
  const size_t n = planes.size() / 3;
  std::vector<uint8_t> out(planes.size());
  for (size_t i = 0; i < n; i++)
    for (size_t c = 0; c < 3; c++) {
      const float v = planes[c * n + i];
      EXPECT_TRUE(v >= 0 && v <= 255 && v == std::floor(v)) << v;
      out[3 * i + c] = v >= 0 && v <= 255 ? static_cast<uint8_t>(v) : 0;
    }
  return out;
}

TEST(image_resize, bit_for_bit_as_pillow) {
  const std::vector<uint8_t> source = noise(size_t(3) * 640 * 480);
  std::vector<uint8_t> hard = source;
  for (uint8_t &v : hard) v = v > 127 ? 255 : 0;
  size_t cases = 0;
  for (const json &row : manifest()["resized"]) {
    const auto v = row.get<std::vector<int64_t>>();
    SCOPED_TRACE(row.dump());
    const auto n = static_cast<ptrdiff_t>(3 * v[0] * v[1]);
    const std::vector<uint8_t> &from = v[2] ? hard : source;
    const rs_image_spec spec = exact_spec(int32_t(v[3]), int32_t(v[4]), static_cast<rs_filter>(v[5]));
    EXPECT_EQ(crc32(bytes_of(pixels(spec, {from.begin(), from.begin() + n}, int32_t(v[0]), int32_t(v[1])))), v[6]);
    cases++;
  }
  EXPECT_GE(cases, 60u);
}

TEST(image_resize, a_constant_stays_and_the_same_size_is_the_same_image) {
  for (const rs_filter filter : all_filters) {
    for (const auto &[width, height] : {std::pair<int32_t, int32_t>{5, 9}, {40, 31}, {1, 1}, {3, 500}})
      for (const int value : {0, 1, 128, 255}) {
        const std::vector<uint8_t> flat(size_t(3 * width * height), static_cast<uint8_t>(value));
        for (const float v : pixels(exact_spec(19, 22, filter), flat, width, height)) ASSERT_EQ(v, float(value));
      }
    const std::vector<uint8_t> image = noise(size_t(3) * 21 * 13);
    EXPECT_EQ(bytes_of(pixels(exact_spec(21, 13, filter), image, 21, 13)), image);
  }
}

// Window of an image that was resized as a whole.
std::vector<uint8_t> window(const std::vector<uint8_t> &image, int width, int height, int left, int top, int w, int h) {
  std::vector<uint8_t> out;
  for (int y = top; y < top + h; y++)
    for (int x = left; x < left + w; x++)
      for (int c = 0; c < 3; c++)
        out.push_back(x < 0 || y < 0 || x >= width || y >= height ? uint8_t(0) : image[size_t((y * width + x) * 3 + c)]);
  return out;
}

TEST(image_crop, is_a_window_of_the_whole) {
  struct {
    int32_t width, height, edge, to_width, to_height, crop_width, crop_height, floor_x, floor_y, round_x, round_y;
  } const cases[] = {
      {50, 37, 25, 33, 25, 22, 22, 5, 1, 6, 2},  // margins 11 and 3: 5.5 and 1.5, to even 6 and 2
      {37, 50, 25, 25, 33, 22, 22, 1, 5, 2, 6},     {50, 37, 25, 33, 25, 24, 20, 4, 2, 4, 2},  // 4.5 to even 4, 2.5 to even 2
      {40, 40, 20, 20, 20, 27, 20, -4, 0, -3, 0},  // smaller: transformers pads 4 to the left of 7, torchvision 3
      {40, 30, 15, 20, 15, 30, 30, -5, -8, -5, -7}, {30, 90, 20, 20, 60, 24, 24, -2, 18, -2, 18},
  };
  for (const auto &c : cases)
    for (const rs_filter filter : all_filters)
      for (const bool round : {false, true}) {
        SCOPED_TRACE(testing::Message() << c.width << "x" << c.height << " filter " << int(filter)
                                        << (round ? " round" : " floor"));
        const std::vector<uint8_t> image = noise(size_t(3 * c.width * c.height));
        const auto whole = bytes_of(pixels(exact_spec(c.to_width, c.to_height, filter), image, c.width, c.height));
        rs_image_spec spec = shortest_spec(c.edge, c.crop_width, c.crop_height, filter);
        spec.crop_round = round;
        EXPECT_EQ(bytes_of(pixels(spec, image, c.width, c.height)),
                  window(whole, c.to_width, c.to_height, round ? c.round_x : c.floor_x, round ? c.round_y : c.floor_y, c.crop_width,
                         c.crop_height));
      }
}

TEST(image_crop, without_a_resize) {
  const std::vector<uint8_t> image = noise(size_t(3) * 9 * 7);
  rs_image_spec spec = shortest_spec(1, 4, 12, rs_filter::bicubic);
  spec.resize = rs_resize::none;
  EXPECT_EQ(bytes_of(pixels(spec, image, 9, 7)), window(image, 9, 7, 2, -3, 4, 12));
}

// Resized as a whole these would be 256 x 7,680,000 pixels.
TEST(image_crop, of_the_narrowest_images) {
  std::vector<uint8_t> ramp(size_t(3) * 30000);
  for (size_t i = 0; i < ramp.size(); i++) ramp[i] = static_cast<uint8_t>(i / 3 / 128);
  for (const rs_filter filter : all_filters)
    for (const bool tall : {false, true}) {
      SCOPED_TRACE(testing::Message() << int(filter) << tall);
      const double begin = seconds_now();
      const std::vector<float> out = pixels(shortest_spec(256, 224, 224, filter), ramp, tall ? 1 : 30000, tall ? 30000 : 1);
      EXPECT_LT(seconds_now() - begin, 5);  // some milliseconds; the whole would take minutes
      // The window lies on one pixel of the middle: 224 of 256 columns to a pixel, at 30000 / 2.
      for (const float v : out) ASSERT_EQ(v, 15000 / 128);
    }
}

TEST(image_pixels, have_the_floats_of_the_reference) {
  std::vector<uint8_t> all(3 * 256);
  for (size_t i = 0; i < all.size(); i++) all[i] = static_cast<uint8_t>(i / 3);
  rs_image_spec spec = exact_spec(256, 1, rs_filter::bicubic);
  spec.rescale = 1 / 255.;
  const float mean[] = {0.485f, 0.456f, 0.406f}, std[] = {0.229f, 0.224f, 0.225f};
  std::copy_n(mean, 3, spec.mean), std::copy_n(std, 3, spec.std);
  const std::vector<float> out = pixels(spec, all, 256, 1);
  for (size_t c = 0; c < 3; c++)
    for (size_t v = 0; v < 256; v++) {
      // transformers: the product in double, rounded to f32, then f32 all the way.
      const auto rescaled = static_cast<float>(double(v) * (1 / 255.));
      ASSERT_EQ(out[c * 256 + v], (rescaled - mean[c]) / std[c]);
      ASSERT_NEAR(out[c * 256 + v], (double(v) / 255 - double(mean[c])) / double(std[c]), 1e-6);
    }
  // Around a smaller image is what a zero becomes.
  spec.resize = rs_resize::none, spec.crop = true, spec.crop_width = 258, spec.crop_height = 3;
  const std::vector<float> padded = pixels(spec, all, 256, 1);
  EXPECT_EQ(padded[0], (0.f - mean[0]) / std[0]);
  EXPECT_EQ(padded.back(), (0.f - mean[2]) / std[2]);
}

TEST(image_pixels, refuse_what_makes_no_sense) {
  const uint8_t pixel[3] = {};
  std::vector<float> out(3);
  const auto refused = [&](const std::function<void(rs_image_spec *)> &change, const char *part) {
    rs_image_spec spec = exact_spec(1, 1, rs_filter::box);
    change(&spec);
    EXPECT_EQ(rs_image_pixels(spec, pixel, 1, 1, out.data()), RS_ERR_ARGUMENT) << part;
    EXPECT_NE(std::string(rs_last_error()).find(part), std::string::npos) << rs_last_error();
  };
  refused([](rs_image_spec *s) { s->resize = rs_resize::none; }, "image.crop_size is missing");
  refused([](rs_image_spec *s) { s->resize_width = 0; }, "image.resize_size");
  refused([](rs_image_spec *s) { s->resize_height = 100000; }, "image.resize_size");
  refused([](rs_image_spec *s) { s->std[1] = 0; }, "image.std[1]");
  refused([](rs_image_spec *s) { s->std[1] = NAN; }, "image.std[1]");
  refused([](rs_image_spec *s) { s->mean[2] = INFINITY; }, "image.mean[2]");
  refused([](rs_image_spec *s) { s->rescale = NAN; }, "image.rescale");
  refused([](rs_image_spec *s) { s->rescale = 1e300; }, "infinite pixels");
  refused([](rs_image_spec *s) { s->filter = static_cast<rs_filter>(6); }, "image.resample");
  EXPECT_EQ(rs_image_pixels(exact_spec(1, 1, rs_filter::box), pixel, 0, 1, out.data()), RS_ERR_ARGUMENT);
}

// JPEG decoders round the transform and the colours each in their own way: up to 3 levels in a photo.  Of these a resize to half
// leaves 2 at a few places.  With the RGB of Pillow instead of our own the pixels are those of the reference.
TEST(image_pixels, of_photos_as_the_reference) {
  RS_NEED_SHARED("golden/dinov2_pixels_first6.npy");
  RS_NEED_SHARED("golden/dinov2_photos.json");
  RS_NEED_SHARED("data/photos");
  std::vector<int64_t> shape;
  const std::vector<float> golden = read_npy_f32(shared_file("golden/dinov2_pixels_first6.npy"), &shape);
  ASSERT_EQ(shape, (std::vector<int64_t>{6, 3, 224, 224}));
  const json names = parse_json(::read_file(shared_file("golden/dinov2_photos.json")), "dinov2_photos.json");
  const json &list = names.is_array() ? names : names["photos"];
  rs_image_spec spec = shortest_spec(256, 224, 224, rs_filter::bicubic);
  spec.rescale = 1 / 255.;
  const float mean[] = {0.485f, 0.456f, 0.406f}, std[] = {0.229f, 0.224f, 0.225f};
  std::copy_n(mean, 3, spec.mean), std::copy_n(std, 3, spec.std);
  double worst = 0, sum = 0;
  const size_t plane = size_t(224) * 224;
  for (size_t i = 0; i < 6; i++) {
    const rs_rgb photo = decoded(::read_file(shared_file("data/photos") + "/" + list[i].get<std::string>()));
    ASSERT_FALSE(photo.data.empty());
    const std::vector<float> out = pixels(spec, photo.data, photo.width, photo.height);
    for (size_t j = 0; j < out.size(); j++) {
      const double levels = std::fabs(double(out[j]) - double(golden[i * out.size() + j])) * double(std[j / plane]) * 255;
      ASSERT_TRUE(std::isfinite(levels));
      worst = std::max(worst, levels);
      sum += levels;
    }
  }
  const double average = sum / double(golden.size());
  EXPECT_LE(worst, 3) << "levels of 255";
  EXPECT_LE(average, 0.04) << "levels of 255; measured: 0.023";
  RecordProperty("worst_levels", std::to_string(worst));
  RecordProperty("mean_levels", std::to_string(average));
  std::printf("photos: at most %.2f, on average %.4f levels of 255 from the reference\n", worst, average);
}

// ------------------------------------------------------------------------------------------------ another size

TEST(image_spec, for_another_size) {
  rs_image_spec s = shortest_spec(256, 224, 224, rs_filter::bicubic);
  ASSERT_EQ(rs_image_spec_resize(&s, 518, 518), RS_OK);
  EXPECT_EQ(s.resize_width, 592);  // 256 * 518 / 224
  EXPECT_EQ(s.resize_height, 592);
  EXPECT_EQ(s.width(), 518);
  ASSERT_EQ(rs_image_spec_resize(&s, 224, 224), RS_OK);
  EXPECT_EQ(s.resize_width, 256);

  // Not square: 400x200 covers 320x160 at once, and 300x300 after its height.
  s = shortest_spec(256, 224, 224, rs_filter::box);
  ASSERT_EQ(rs_image_spec_resize(&s, 280, 140), RS_OK);
  EXPECT_EQ(s.resize_width, 320);
  EXPECT_EQ(s.resize_height, 160);
  const std::vector<uint8_t> wide = noise(size_t(3) * 400 * 200), square = noise(size_t(3) * 300 * 300);
  EXPECT_EQ(bytes_of(pixels(s, wide, 400, 200)),
            window(bytes_of(pixels(exact_spec(320, 160, s.filter), wide, 400, 200)), 320, 160, 20, 10, 280, 140));
  EXPECT_EQ(bytes_of(pixels(s, square, 300, 300)),
            window(bytes_of(pixels(exact_spec(320, 320, s.filter), square, 300, 300)), 320, 320, 20, 90, 280, 140));

  s = exact_spec(224, 224, rs_filter::bilinear);
  ASSERT_EQ(rs_image_spec_resize(&s, 100, 60), RS_OK);
  EXPECT_EQ(s.width(), 100);
  EXPECT_EQ(s.height(), 60);
  s.crop = true, s.crop_width = 50, s.crop_height = 30;
  ASSERT_EQ(rs_image_spec_resize(&s, 25, 60), RS_OK);
  EXPECT_EQ(s.resize_width, 50);
  EXPECT_EQ(s.resize_height, 120);
  EXPECT_EQ(s.crop_width, 25);

  const rs_image_spec before = s;
  EXPECT_EQ(rs_image_spec_resize(&s, 0, 60), RS_ERR_ARGUMENT);
  EXPECT_EQ(rs_image_spec_resize(&s, 60, 100000), RS_ERR_ARGUMENT);
  // What the result is cut from may be larger than a result: only what is cut is computed.
  rs_image_spec large = shortest_spec(256, 224, 224, rs_filter::bicubic);
  ASSERT_EQ(rs_image_spec_resize(&large, rs_image_most_side, 1), RS_OK);
  EXPECT_EQ(large.resize_width, 18725);
  const std::vector<uint8_t> dot = noise(3);
  EXPECT_EQ(pixels(large, dot, 1, 1).size(), size_t(3) * rs_image_most_side);
  EXPECT_EQ(rs_image_spec_resize(&large, rs_image_most_side + 1, 1), RS_ERR_ARGUMENT);
  s.resize_width = 500000;
  EXPECT_EQ(rs_image_spec_resize(&s, 60, 60), RS_ERR_LIMIT);
  EXPECT_EQ(s.crop_width, before.crop_width);
}

// ------------------------------------------------------------------------------------------------ metadata

// A model with these image.* keys, and what rs_image_spec_load says to it.
rs_status load_spec(const std::function<void(rs_writer *)> &set, rs_image_spec *out) {
  const temp_dir dir;
  const std::string path = dir / "image.rsw";
  rs_writer *w = nullptr;
  EXPECT_EQ(rs_writer_open(path.c_str(), &w), RS_OK);
  tiny_bert tiny;
  tiny.set_metadata(w);
  set(w);
  const rs_source source = tiny.source();
  EXPECT_EQ(rs_convert(&source, nullptr, w), RS_OK) << rs_last_error();
  EXPECT_EQ(rs_writer_finish(w), RS_OK) << rs_last_error();
  rs_writer_free(w);
  rs_model *model = nullptr;
  EXPECT_EQ(rs_model_load(path.c_str(), nullptr, &model), RS_OK) << rs_last_error();
  const rs_status status = rs_image_spec_load(model, out);
  rs_model_free(model);
  return status;
}

rs_image_spec converted(const char *config, const char *preprocessor) {
  rs_image_spec spec;
  const json file = preprocessor ? parse_json(preprocessor, "preprocessor_config.json") : json();
  const hf_image image = read_hf_image(parse_json(config, "config.json"), file);
  EXPECT_EQ(load_spec([&](rs_writer *w) { hf_image_metadata(w, image); }, &spec), RS_OK) << rs_last_error();
  return spec;
}

TEST(image_metadata, of_dinov2) {
  const rs_image_spec s = converted(R"({"model_type": "dinov2"})", R"({
    "crop_size": {"height": 224, "width": 224}, "do_center_crop": true, "do_convert_rgb": true, "do_normalize": true,
    "do_rescale": true, "do_resize": true, "image_mean": [0.485, 0.456, 0.406], "image_processor_type": "BitImageProcessor",
    "image_std": [0.229, 0.224, 0.225], "resample": 3, "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": 256}})");
  EXPECT_EQ(s.resize, rs_resize::shortest_edge);
  EXPECT_EQ(s.resize_width, 256);
  EXPECT_EQ(s.resize_height, 256);
  EXPECT_EQ(s.filter, rs_filter::bicubic);
  EXPECT_TRUE(s.crop);
  EXPECT_FALSE(s.crop_round);
  EXPECT_EQ(s.width(), 224);
  EXPECT_EQ(s.height(), 224);
  EXPECT_EQ(s.rescale, 1 / 255.);
  EXPECT_EQ(s.mean[0], 0.485f);
  EXPECT_EQ(s.std[2], 0.225f);
}

TEST(image_metadata, of_other_processors) {
  // An early file of ViT: one number is a square, and nothing is said of rescaling.
  rs_image_spec s = converted("{}", R"({"do_normalize": true, "do_resize": true, "feature_extractor_type": "ViTFeatureExtractor",
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 2, "size": 384})");
  EXPECT_EQ(s.resize, rs_resize::exact);
  EXPECT_EQ(s.width(), 384);
  EXPECT_FALSE(s.crop);
  EXPECT_EQ(s.filter, rs_filter::bilinear);
  EXPECT_EQ(s.rescale, 1 / 255.);
  // An early file of CLIP: one number is the shortest edge.
  s = converted("{}", R"({"feature_extractor_type": "CLIPFeatureExtractor", "size": 240, "crop_size": 224, "resample": 1})");
  EXPECT_EQ(s.resize, rs_resize::shortest_edge);
  EXPECT_EQ(s.resize_width, 240);
  EXPECT_EQ(s.width(), 224);
  EXPECT_EQ(s.filter, rs_filter::lanczos);
  EXPECT_EQ(s.mean[1], 0.4578275f);
  // The same with a word of its own on what a number is, and a size that is not square.
  s = converted("{}", R"({"image_processor_type": "CLIPImageProcessorFast", "size": 240, "default_to_square": true,
    "crop_size": {"height": 100, "width": 120}})");
  EXPECT_EQ(s.resize, rs_resize::exact);
  EXPECT_EQ(s.crop_width, 120);
  EXPECT_EQ(s.crop_height, 100);
  s = converted("{}", R"({"image_processor_type": "SiglipImageProcessor", "size": {"height": 384, "width": 256}, "resample": 3,
    "do_pad": false, "pad_size": null})");
  EXPECT_EQ(s.width(), 256);
  EXPECT_EQ(s.height(), 384);
  EXPECT_EQ(s.mean[0], 0.5f);
  // Nothing but the model's name, and all off.
  s = converted(R"({"model_type": "deit"})", "{}");
  EXPECT_EQ(s.resize_width, 256);
  EXPECT_EQ(s.width(), 224);
  s = converted("{}", R"({"image_processor_type": "BitImageProcessor", "do_resize": false, "do_rescale": false,
    "do_normalize": false, "crop_size": 90})");
  EXPECT_EQ(s.resize, rs_resize::none);
  EXPECT_EQ(s.width(), 90);
  EXPECT_EQ(s.rescale, 1);
  EXPECT_EQ(s.mean[0], 0);
  EXPECT_EQ(s.std[0], 1);
}

TEST(image_metadata, of_timm) {
  rs_image_spec s = converted(R"({"architecture": "vit_small_patch14_dinov2", "pretrained_cfg": {"input_size": [3, 224, 224],
    "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}})",
                              nullptr);
  EXPECT_EQ(s.resize, rs_resize::shortest_edge);
  EXPECT_EQ(s.resize_width, 248);  // floor(224 / 0.9)
  EXPECT_EQ(s.width(), 224);
  EXPECT_TRUE(s.crop_round);
  EXPECT_EQ(s.mean[2], 0.3f);
  s = converted(R"({"pretrained_cfg": {"input_size": [3, 518, 518], "crop_pct": 1.0}})", nullptr);
  EXPECT_EQ(s.resize_width, 518);
  EXPECT_EQ(s.width(), 518);
  EXPECT_EQ(s.mean[0], 0.485f);
}

TEST(image_metadata, what_is_not_understood_is_named) {
  const auto refused = [](const std::string &config, const std::string &preprocessor, const std::string &part) {
    try {
      read_hf_image(parse_json(config, "config.json"), preprocessor.empty() ? json() : parse_json(preprocessor, "p"));
      ADD_FAILURE() << "wanted: " << part;
    } catch (const failure &e) {
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what() << "\nwanted: " << part;
    }
  };
  const auto clip = [&](const std::string &more, const std::string &part) {
    refused("{}", R"({"image_processor_type": "CLIPImageProcessor", )" + more + "}", part);
  };
  clip(R"("do_pad": true)", "'do_pad' is true");
  clip(R"("crop_pct": 0.9)", "'crop_pct' is 0.9");
  clip(R"("size": {"longest_edge": 5})", R"('size' is {"longest_edge":5})");
  clip(R"("size": {"shortest_edge": 5, "longest_edge": 7})", "'size'");
  clip(R"("size": 0)", "'size' is 0");
  clip(R"("size": {"height": 5, "width": "6"})", "'size' is \"6\"");
  clip(R"("size": 1e30)", "'size'");
  clip(R"("size": 18446744073709551615)", "'size'");
  clip(R"("resample": 6)", "'resample' is 6");
  clip(R"("resample": -1)", "'resample' is -1");
  clip(R"("resample": "bicubic")", "'resample'");
  clip(R"("crop_size": {"shortest_edge": 224})", "'crop_size'");
  clip(R"("crop_size": [224, 224])", "'crop_size'");
  clip(R"("do_center_crop": false)", "neither a crop nor");
  clip(R"("do_resize": 1)", "'do_resize'");
  clip(R"("rescale_factor": 0)", "'rescale_factor' is 0");
  clip(R"("image_mean": [1, 2])", "'image_mean' is [1,2]");
  clip(R"("image_mean": 0.5)", "'image_mean'");
  clip(R"("image_std": [1, 0, 1])", "'image_std' is [1,0,1]");
  clip(R"("image_std": [1, "x", 1])", "'image_std'");
  clip(R"("data_format": "channels_last")", "'data_format'");
  refused("{}", R"({"image_processor_type": "ConvNextImageProcessor"})", "ConvNextImageProcessor");
  refused("{}", R"({"image_processor_type": "ViTImageProcessor", "do_center_crop": true})", "'do_center_crop' is true");
  refused(R"({"model_type": "bert"})", "{}", "bert");
  refused("{}", "[]", "not a JSON object");
  refused("{}", "", "nothing says how an image becomes pixels");
  const auto timm = [&](const std::string &cfg, const std::string &part) {
    refused(R"({"pretrained_cfg": )" + cfg + "}", "", part);
  };
  timm("5", "'pretrained_cfg'");
  timm("{}", "'input_size'");
  timm(R"({"input_size": [1, 28, 28]})", "'input_size'");
  timm(R"({"input_size": [3, 28, 30]})", "'input_size'");
  timm(R"({"input_size": [3, 28, 28], "crop_mode": "squash"})", "'crop_mode' is \"squash\"");
  timm(R"({"input_size": [3, 28, 28], "crop_pct": 0})", "'crop_pct' is 0");
  timm(R"({"input_size": [3, 28, 28], "crop_pct": 1.1})", "'crop_pct'");
  timm(R"({"input_size": [3, 28, 28], "interpolation": "random"})", "'interpolation' is \"random\"");
}

struct keys {  // as good as can be, until a test changes one
  std::string resize = "shortest_edge", resample = "bicubic", rounding = "floor";
  std::vector<int64_t> resize_size = {20, 20}, crop_size = {16, 16};
  double rescale = 1;
  std::vector<float> mean = {0, 0, 0}, std = {1, 1, 1};
  std::string without;

  void set(rs_writer *w) const {
    const auto wanted = [&](const char *key) { return without != key; };
    if (wanted("image.resize")) rs_writer_set_str(w, "image.resize", resize.c_str());
    if (wanted("image.resize_size")) rs_writer_set_i64s(w, "image.resize_size", resize_size.data(), resize_size.size());
    if (wanted("image.resample")) rs_writer_set_str(w, "image.resample", resample.c_str());
    if (wanted("image.crop_size")) rs_writer_set_i64s(w, "image.crop_size", crop_size.data(), crop_size.size());
    if (wanted("image.crop_rounding")) rs_writer_set_str(w, "image.crop_rounding", rounding.c_str());
    if (wanted("image.rescale")) rs_writer_set_f64(w, "image.rescale", rescale);
    if (wanted("image.mean")) rs_writer_set_f32s(w, "image.mean", mean.data(), mean.size());
    if (wanted("image.std")) rs_writer_set_f32s(w, "image.std", std.data(), std.size());
  }
};

TEST(image_metadata, every_key_is_checked) {
  const auto refused = [](const keys &k, const std::string &part) {
    rs_image_spec spec;
    EXPECT_EQ(load_spec([&](rs_writer *w) { k.set(w); }, &spec), RS_ERR_FORMAT) << part;
    EXPECT_NE(std::string(rs_last_error()).find(part), std::string::npos) << rs_last_error() << "\nwanted: " << part;
  };
  rs_image_spec spec;
  keys k;
  ASSERT_EQ(load_spec([&](rs_writer *w) { k.set(w); }, &spec), RS_OK) << rs_last_error();
  EXPECT_EQ(spec.width(), 16);
  k.without = "image.crop_rounding";
  EXPECT_EQ(load_spec([&](rs_writer *w) { k.set(w); }, &spec), RS_OK) << rs_last_error();
  for (const char *key :
       {"image.resize", "image.resize_size", "image.resample", "image.crop_size", "image.rescale", "image.mean", "image.std"}) {
    k.without = key;
    refused(k, std::string(key) + " is missing");
  }
  const auto changed = [&](const std::function<void(keys *)> &change, const std::string &part) {
    keys other;
    change(&other);
    refused(other, part);
  };
  changed([](keys *o) { o->resize = "stretch"; }, "image.resize is 'stretch', expected 'none', 'shortest_edge' or 'exact'");
  changed([](keys *o) { o->resample = "cubic"; }, "image.resample is 'cubic', expected 'nearest'");
  changed([](keys *o) { o->rounding = "up"; }, "image.crop_rounding is 'up'");
  changed([](keys *o) { o->resize_size = {20}; }, "image.resize_size has 1 values");
  changed([](keys *o) { o->resize_size = {20, -1}; }, "image.resize_size[1] is -1");
  changed([](keys *o) { o->resize_size = {int64_t(1) << 40, 20}; }, "image.resize_size[0] is 1099511627776");
  changed([](keys *o) { o->crop_size = {0, 16}; }, "image.crop_size[0] is 0");
  changed([](keys *o) { o->crop_size = {16, 16, 16}; }, "image.crop_size has 3 values");
  changed([](keys *o) { o->rescale = 0; }, "image.rescale is 0");
  changed([](keys *o) { o->mean = {1, 2}; }, "image.mean has 2 values");
  changed([](keys *o) { o->std = {1, -1, 1}; }, "image.std[1] is -1");
  // Of another kind.
  for (const char *key : {"image.resize", "image.resize_size", "image.resample", "image.crop_size", "image.crop_rounding",
                          "image.rescale", "image.mean", "image.std"}) {
    keys other;
    other.without = key;
    const auto set = [&](rs_writer *w) {
      other.set(w);
      rs_writer_set_bool(w, key, true);
    };
    EXPECT_EQ(load_spec(set, &spec), RS_ERR_FORMAT) << key;
    EXPECT_NE(std::string(rs_last_error()).find(std::string(key) + " is not "), std::string::npos) << rs_last_error();
  }
}

}  // namespace
