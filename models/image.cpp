// Images, as Pillow and transformers make pixels of them.
//
//   1 the decoder
//   2 EXIF: which way is up
//   3 containers: what stb_image does not look at
//   4 PNM
//   5 decode
//   6 resize
//   7 the image.* metadata
//
// stb_image decodes.  It was not written for hostile files: it reads on past the end, trusts lengths and tables, and says nothing
// of orientation.  So each file is walked first, from chunk to chunk, and stb_image gets it only where the walk found it sound.
#include "image.h"

#include "status.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>

namespace {

// ------------------------------------------------------------------------------------------------ 1 the decoder

// The largest block that stb_image may have for the image at hand: a few kilobytes can unpack to gigabytes.
thread_local size_t largest_block = 0;
thread_local bool over_largest = false;

void *stb_resize(void *memory, size_t bytes) {
  // New memory is zeros: a hostile file can have stb_image read what it never wrote, which should be the same on every run.
  if (bytes <= largest_block) return memory ? realloc(memory, bytes ? bytes : 1) : calloc(1, bytes ? bytes : 1);
  over_largest = true;
  return nullptr;
}

}  // namespace

#define STB_IMAGE_IMPLEMENTATION
#define STB_IMAGE_STATIC
#define STBI_NO_STDIO
#define STBI_NO_LINEAR
#define STBI_NO_HDR
#define STBI_NO_TGA
#define STBI_NO_PSD
#define STBI_NO_PIC
#define STBI_NO_PNM
#define STBI_MALLOC(bytes) stb_resize(nullptr, bytes)
#define STBI_REALLOC(memory, bytes) stb_resize(memory, bytes)
#define STBI_FREE(memory) free(memory)
#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpragmas"
#pragma GCC diagnostic ignored "-Wunknown-warning-option"
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wunused-but-set-variable"
#pragma GCC diagnostic ignored "-Wsign-compare"
#endif
#include <stb/stb_image.h>
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif

namespace {

// Lengths within a file are compared with what is left of it, never added to a position that could overflow.
struct bytes_view {
  const uint8_t *p;
  size_t n;
  bool begins(const char *text, size_t length) const { return n >= length && !memcmp(p, text, length); }
  bytes_view from(size_t at) const { return at < n ? bytes_view{p + at, n - at} : bytes_view{p + n, 0}; }
  bytes_view first(size_t length) const { return {p, std::min(n, length)}; }
  uint32_t be16(size_t at) const { return uint32_t(p[at]) << 8 | p[at + 1]; }
  uint32_t be32(size_t at) const { return be16(at) << 16 | be16(at + 2); }
  uint32_t le16(size_t at) const { return uint32_t(p[at + 1]) << 8 | p[at]; }
  uint32_t le32(size_t at) const { return le16(at + 2) << 16 | le16(at); }
};

// Feeds stb_image, and notes when it asks for more than there is: it goes on with zeros, and a cut photo becomes a grey one.
struct feeder {
  bytes_view left;
  bool starved = false;

  static int read(void *user, char *to, int size) {
    feeder &f = *static_cast<feeder *>(user);
    const size_t n = std::min(f.left.n, static_cast<size_t>(std::max(size, 0)));
    if (n == 0 && size > 0) f.starved = true;
    if (n) memcpy(to, f.left.p, n);
    f.left = f.left.from(n);
    return static_cast<int>(n);
  }
  static void skip(void *user, int n) {
    feeder &f = *static_cast<feeder *>(user);
    if (n > 0 && static_cast<size_t>(n) > f.left.n) f.starved = true;
    if (n > 0) f.left = f.left.from(static_cast<size_t>(n));
  }
  static int eof(void *user) { return static_cast<feeder *>(user)->left.n == 0; }
};
const stbi_io_callbacks feeder_calls = {feeder::read, feeder::skip, feeder::eof};

struct stb_release {
  void operator()(uint8_t *p) const { stbi_image_free(p); }
};
using stb_pixels = std::unique_ptr<uint8_t, stb_release>;

// ------------------------------------------------------------------------------------------------ 2 EXIF: which way is up

// Tag 0x0112 of the first directory, 1 to 8; 1 where there is none, or where the block makes no sense.
int exif_orientation(bytes_view b) {
  if (b.n < 8) return 1;
  const bool little = b.begins("II*\0", 4);
  if (!little && !b.begins("MM\0*", 4)) return 1;
  const auto u16 = [&](size_t at) { return little ? b.le16(at) : b.be16(at); };
  const auto u32 = [&](size_t at) { return little ? b.le32(at) : b.be32(at); };
  const size_t at = u32(4);
  if (at > b.n || b.n - at < 2) return 1;
  constexpr size_t entry_bytes = 12;
  const size_t entries = std::min<size_t>(u16(at), (b.n - at - 2) / entry_bytes);
  for (size_t i = 0; i < entries; i++) {
    const size_t e = at + 2 + i * entry_bytes;
    if (u16(e) != 0x0112 || u32(e + 4) != 1) continue;
    const uint32_t type = u16(e + 2);  // of integers: byte, short, long
    const uint32_t value = type == 1 ? b.p[e + 8] : type == 3 ? u16(e + 8) : type == 4 ? u32(e + 8) : 1;
    return value >= 1 && value <= 8 ? static_cast<int>(value) : 1;
  }
  return 1;
}

// Orientation 1 to 8: mirrored, turned, or both.  Every pixel of `out` is fetched from where it lies in `in`.
void turn_upright(const uint8_t *in, int32_t width, int32_t height, int orientation, rs_rgb *out) {
  const bool turned = orientation >= 5;
  out->width = turned ? height : width;
  out->height = turned ? width : height;
  out->data.resize(size_t(3) * static_cast<size_t>(width) * static_cast<size_t>(height));
  if (orientation == 1) {
    memcpy(out->data.data(), in, out->data.size());
    return;
  }
  const bool from_right = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
  const bool from_bottom = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
  const ptrdiff_t column = from_right ? -3 : 3, row = ptrdiff_t(width) * (from_bottom ? -3 : 3);
  const uint8_t *corner = in;
  if (from_right) corner += (size_t(width) - 1) * 3;
  if (from_bottom) corner += (size_t(height) - 1) * size_t(width) * 3;
  uint8_t *to = out->data.data();
  for (int32_t y = 0; y < out->height; y++)
    for (int32_t x = 0; x < out->width; x++, to += 3) memcpy(to, corner + (turned ? x : y) * row + (turned ? y : x) * column, 3);
}

// ------------------------------------------------------------------------------------------------ 3 containers

enum class container { none, jpeg, png, bmp, gif, pnm };
const char *const container_names[] = {"", "JPEG", "PNG", "BMP", "GIF", "PNM"};

container container_of(bytes_view b) {
  if (b.begins("\xFF\xD8\xFF", 3)) return container::jpeg;
  if (b.begins("\x89PNG\r\n\x1A\n", 8)) return container::png;
  if (b.begins("BM", 2)) return container::bmp;
  if (b.begins("GIF87a", 6) || b.begins("GIF89a", 6)) return container::gif;
  if (b.begins("P5", 2) || b.begins("P6", 2)) return container::pnm;
  return container::none;
}

// What else it may be, for the error.
const char *foreign_format(bytes_view b) {
  if (b.begins("RIFF", 4) && b.from(8).begins("WEBP", 4)) return "WebP";
  if (b.begins("II*\0", 4) || b.begins("MM\0*", 4)) return "TIFF";
  if (b.from(4).begins("ftypavif", 8)) return "AVIF";
  if (b.from(4).begins("ftyphei", 7) || b.from(4).begins("ftypmif1", 8)) return "HEIC";
  if (b.begins("\xFF\x0A", 2) || b.from(4).begins("JXL ", 4)) return "JPEG XL";
  if (b.from(4).begins("jP  ", 4)) return "JPEG 2000";
  if (b.begins("8BPS", 4)) return "PSD";
  if (b.begins("%PDF", 4)) return "PDF";
  return nullptr;
}

// Bytes of a file in a message: what is not ASCII escaped.
std::string printable(const uint8_t *bytes, size_t n) {
  std::string text;
  for (; n > 0; n--, bytes++) {
    char one[5];
    snprintf(one, sizeof one, *bytes >= 0x20 && *bytes < 0x7F ? "%c" : "\\x%02X", *bytes);
    text += one;
  }
  return text;
}

rs_status not_an_image(bytes_view b) {
  const char *const known = "rs reads JPEG, PNG, BMP, GIF and PNM (P5, P6)";
  if (b.n == 0) return rs_fail(RS_ERR_FORMAT, "not an image: empty");
  if (const char *name = foreign_format(b)) return rs_fail(RS_ERR_UNSUPPORTED, "%s image; %s", name, known);
  return rs_fail(RS_ERR_FORMAT, "not an image: begins with '%s'; %s", printable(b.p, std::min<size_t>(b.n, 8)).c_str(), known);
}

// What a walk through the file found.
struct facts {
  int64_t width = 0, height = 0;
  int orientation = 1;
  std::vector<uint8_t> patched;  // the file, changed for stb_image; empty where it can have it as it is
  struct {
    int64_t left = 0, top = 0, right = INT64_MAX, bottom = INT64_MAX;
    uint8_t around[3] = {};  // the colour of what lies outside
  } frame;                   // of a GIF
};

// What a JPEG has said of its tables.  stb_image takes it on trust that those that a scan names are there, and of lengths that they
// add up to the 256 codes that it has room for.
class jpeg_tables {
 public:
  bool define_huffman(bytes_view b) {
    while (b.n) {
      if (b.n < 17) return false;
      size_t codes = 0;
      for (size_t i = 1; i <= 16; i++) codes += b.p[i];
      if (codes > 256 || b.n - 17 < codes) return false;
      huffman_ |= 1u << (b.p[0] & 0x1F);  // DC: 0 to 3, AC: 16 to 19
      b = b.from(17 + codes);
    }
    return true;
  }
  void define_quantization(bytes_view b) {
    for (; b.n; b = b.from(b.p[0] >> 4 ? 129 : 65)) quantization_ |= 1u << (b.p[0] & 3);
  }
  bool has_frame() const { return frame_.n > 0; }
  int64_t width() const { return has_frame() ? frame_.be16(3) : 0; }
  int64_t height() const { return has_frame() ? frame_.be16(1) : 0; }
  void define_frame(bytes_view segment, bool progressive) { frame_ = segment, progressive_ = progressive; }
  size_t components() const { return has_frame() ? frame_.p[5] : 0; }

  // A scan: components with two tables each, then which coefficients, then which bits of them.
  bool can_scan(bytes_view b) const {
    if (b.n < 1 || b.n != size_t(4) + 2 * b.p[0]) return false;
    const bytes_view after = b.from(1 + size_t(2) * b.p[0]);
    const bool first_bits = after.p[2] >> 4 == 0;
    const bool dc = progressive_ ? after.p[0] == 0 && first_bits : true, ac = progressive_ ? after.p[0] > 0 : true;
    for (size_t i = 0; i < b.p[0]; i++) {
      const uint8_t tables = b.p[2 + 2 * i];
      if ((dc && !has(tables >> 4)) || (ac && !has(16 | (tables & 15)))) return false;
    }
    return true;
  }
  bool can_dequantize() const {
    for (size_t i = 0; i < components(); i++)
      if (frame_.n < 9 + 3 * i || !(quantization_ >> (frame_.p[8 + 3 * i] & 3) & 1)) return false;
    return true;
  }

 private:
  bool has(int table) const { return table < 20 && huffman_ >> table & 1; }
  uint32_t huffman_ = 0, quantization_ = 0;
  bytes_view frame_ = {nullptr, 0};
  bool progressive_ = false;
};

rs_status walk_jpeg(bytes_view b, facts *out) {
  // Each scan of a progressive file may touch every block of the image, for a handful of bytes.  Encoders write some ten.
  constexpr int most_scans = 200;
  int scans = 0;
  jpeg_tables tables;
  bool adobe = false, exif = false;
  for (b = b.from(2);;) {
    const void *found = b.n ? memchr(b.p, 0xFF, b.n) : nullptr;
    if (!found) return rs_fail(RS_ERR_FORMAT, "truncated JPEG: no end marker");
    b = b.from(static_cast<size_t>(static_cast<const uint8_t *>(found) - b.p) + 1);
    if (b.n == 0) continue;
    const uint8_t marker = b.p[0];
    if (marker == 0xFF) continue;  // fill
    b = b.from(1);
    if (marker == 0xD9) break;
    if (marker < 0xC0 || (marker >= 0xD0 && marker <= 0xD8)) continue;  // within a scan, or of no length
    if (b.n < 2 || b.be16(0) > b.n) return rs_fail(RS_ERR_FORMAT, "truncated JPEG: a segment goes past the end");
    const size_t length = b.be16(0);
    if (length < 2) return rs_fail(RS_ERR_FORMAT, "corrupt JPEG: a segment of %zu bytes", length);
    const bytes_view segment = b.from(2).first(length - 2);
    b = b.from(length);
    if (marker == 0xC4) {
      if (!tables.define_huffman(segment)) return rs_fail(RS_ERR_FORMAT, "corrupt JPEG: bad Huffman table");
    } else if (marker == 0xDB) {
      tables.define_quantization(segment);
    } else if (marker == 0xDA) {
      if (!tables.can_scan(segment)) return rs_fail(RS_ERR_FORMAT, "corrupt JPEG: a scan without its Huffman tables");
      if (++scans > most_scans) return rs_fail(RS_ERR_LIMIT, "JPEG of more than %d scans", most_scans);
    } else if (marker >= 0xC0 && marker <= 0xCF && marker != 0xC8 && marker != 0xCC) {
      if (marker > 0xC2)
        return rs_fail(RS_ERR_UNSUPPORTED, "%s JPEG; rs reads baseline and progressive ones",
                       marker > 0xC8 ? "arithmetic-coded" : "lossless or hierarchical");
      if (segment.n < 6) return rs_fail(RS_ERR_FORMAT, "corrupt JPEG: short frame header");
      if (segment.p[0] != 8) return rs_fail(RS_ERR_UNSUPPORTED, "JPEG of %d bits; rs reads 8", segment.p[0]);
      if (tables.has_frame()) return rs_fail(RS_ERR_FORMAT, "corrupt JPEG: two frames");
      tables.define_frame(segment, marker == 0xC2);
    } else if (marker == 0xEE && segment.n >= 12 && segment.begins("Adobe", 5)) {
      adobe = segment.p[11] == 0 || segment.p[11] == 2;
    } else if (marker == 0xE1 && !exif && segment.begins("Exif\0", 6)) {
      exif = true;
      out->orientation = exif_orientation(segment.from(6));
    }
  }
  out->width = tables.width(), out->height = tables.height();
  if (!tables.can_dequantize()) return rs_fail(RS_ERR_FORMAT, "corrupt JPEG: no quantization table");
  if (tables.components() == 4 && !adobe)
    return rs_fail(RS_ERR_UNSUPPORTED, "JPEG of 4 channels that does not say which (no Adobe marker)");
  return RS_OK;
}

rs_status walk_png(bytes_view file, facts *out) {
  size_t at = 8, palette_at = 0;
  uint32_t palette = 0;
  bool indexed = false;
  for (bool last = false; !last;) {
    const bytes_view b = file.from(at);
    if (b.n < 12 || b.be32(0) > b.n - 12) return rs_fail(RS_ERR_FORMAT, "truncated PNG: a chunk goes past the end");
    const uint32_t length = b.be32(0);
    const bytes_view type = b.from(4), data = b.from(8).first(length);
    if (at == 8) {
      if (!type.begins("IHDR", 4) || length != 13) return rs_fail(RS_ERR_FORMAT, "corrupt PNG: it does not begin with a header");
      out->width = data.be32(0), out->height = data.be32(4);
      indexed = data.p[9] == 3;
    }
    if (type.begins("CgBI", 4)) return rs_fail(RS_ERR_UNSUPPORTED, "PNG in Apple's own way (CgBI)");
    if (type.begins("PLTE", 4)) palette_at = at, palette = length;
    if (type.begins("eXIf", 4)) out->orientation = exif_orientation(data);
    last = type.begins("IEND", 4);
    at += size_t(12) + length;
  }
  // Indices beyond a short palette would give what happens to lie behind it; black, as for Pillow.  Checksums nobody reads.
  constexpr uint32_t whole = 256 * 3;
  if (indexed && palette_at && palette < whole) {
    const auto palette_end = file.p + palette_at + 8 + palette;
    out->patched.reserve(file.n + whole);
    out->patched.assign(file.p, palette_end);
    out->patched.resize(out->patched.size() + whole - palette, 0);
    out->patched.insert(out->patched.end(), palette_end, file.p + file.n);
    out->patched[palette_at + 2] = whole >> 8, out->patched[palette_at + 3] = whole & 0xFF;
  }
  return RS_OK;
}

rs_status walk_gif(bytes_view file, facts *out) {
  const auto no_image = [] { return rs_fail(RS_ERR_FORMAT, "truncated GIF: no image in it"); };
  if (file.n < 13) return no_image();
  out->width = file.le16(6), out->height = file.le16(8);
  const auto table_bytes = [](uint8_t flags) { return flags & 0x80 ? size_t(3) << ((flags & 7) + 1) : 0; };
  bytes_view palette = file.from(13).first(table_bytes(file.p[10]));
  bytes_view b = file.from(13 + table_bytes(file.p[10]));
  size_t transparent = 0;
  while (b.n >= 2 && b.p[0] == 0x21) {
    if (b.p[1] == 0xF9 && b.n >= 7 && b.p[2] == 4) {
      transparent = b.p[3] & 1 ? b.p[6] : 0;
      // Alpha is dropped, so what is transparent has the colour that it was given.
      if (b.p[3] & 1) {
        if (out->patched.empty()) out->patched.assign(file.p, file.p + file.n);
        out->patched[static_cast<size_t>(b.p + 3 - file.p)] &= 0xFE;
      }
    }
    b = b.from(2);
    while (b.n && b.p[0]) b = b.from(size_t(1) + b.p[0]);
    b = b.from(1);
  }
  if (b.n < 10) return no_image();
  if (b.p[0] != 0x2C) return rs_fail(RS_ERR_FORMAT, "corrupt GIF: no image in it");
  if (b.p[9] & 0x80) palette = b.from(10).first(table_bytes(b.p[9]));
  out->frame.left = b.le16(1), out->frame.top = b.le16(3);
  out->frame.right = out->frame.left + b.le16(5), out->frame.bottom = out->frame.top + b.le16(7);
  if (3 * transparent + 3 <= palette.n) memcpy(out->frame.around, palette.p + 3 * transparent, 3);
  return RS_OK;
}

// Pillow lays the first frame on its transparent colour, or else on colour 0, whatever the background is said to be.
void fill_around(const facts &f, rs_rgb *image) {
  for (int64_t y = 0, i = 0; y < image->height; y++)
    for (int64_t x = 0; x < image->width; x++, i += 3)
      if (x < f.frame.left || x >= f.frame.right || y < f.frame.top || y >= f.frame.bottom)
        memcpy(&image->data[static_cast<size_t>(i)], f.frame.around, 3);
}

rs_status walk_bmp(bytes_view b, facts *out) {
  const bool core = b.n >= 18 && b.le32(14) == 12;
  if (b.n < (core ? 26 : 30)) return rs_fail(RS_ERR_FORMAT, "truncated BMP: no header");
  const auto number = [&](size_t at) { return int64_t(static_cast<int32_t>(b.le32(at))); };
  out->width = core ? b.le16(18) : number(18);
  out->height = core ? b.le16(20) : std::abs(number(22));  // negative: its first row is the top one
  const auto bits = core ? b.le16(24) : b.le16(28);
  if (out->width < 1 || out->height < 1 || out->height > INT32_MAX)  // INT32_MIN has no positive
    return rs_fail(RS_ERR_FORMAT, "corrupt BMP: %" PRId64 "x%" PRId64 " pixels", out->width, out->height);
  if (static_cast<uint64_t>(out->width) * bits / 8 > b.n / static_cast<uint64_t>(out->height))
    return rs_fail(RS_ERR_FORMAT, "truncated BMP: %zu bytes for %" PRId64 "x%" PRId64 " pixels of %u bits", b.n, out->width,
                   out->height, bits);
  if (bits >= 16) return RS_OK;
  // stb_image miscounts the palette of these, and colours beyond a short palette are what happens to lie behind it.
  if (core) return rs_fail(RS_ERR_UNSUPPORTED, "BMP with a palette and a header of OS/2");
  const size_t at = b.le32(10), palette_at = 14 + size_t(b.le32(14));
  const size_t colours = at > palette_at ? (at - palette_at) / 4 : 0;
  if (bits == 0 || 8 % bits || colours >= size_t(1) << bits) return RS_OK;
  const size_t stride = (static_cast<size_t>(out->width) * bits + 31) / 32 * 4;
  if (b.from(at).n / stride < static_cast<size_t>(out->height)) return rs_fail(RS_ERR_FORMAT, "truncated BMP: rows are missing");
  for (int64_t y = 0; y < out->height; y++)
    for (size_t x = 0; x < static_cast<size_t>(out->width); x++) {
      const uint8_t byte = b.p[at + stride * static_cast<size_t>(y) + x * bits / 8];
      if ((byte >> (8 - bits - x * bits % 8) & ((1 << bits) - 1)) >= int(colours))
        return rs_fail(RS_ERR_FORMAT, "corrupt BMP: a colour that is not in its palette of %zu", colours);
    }
  return RS_OK;
}

// ------------------------------------------------------------------------------------------------ 4 PNM

rs_status check_size(int64_t width, int64_t height, int64_t max_pixels) {
  if (width < 1 || height < 1) return rs_fail(RS_ERR_FORMAT, "image of %" PRId64 "x%" PRId64 " pixels", width, height);
  if (width > max_pixels / height)
    return rs_fail(RS_ERR_LIMIT, "%" PRId64 "x%" PRId64 " pixels, the limit is %" PRId64, width, height, max_pixels);
  return RS_OK;
}

rs_status decode_pnm(bytes_view b, int64_t max_pixels, rs_rgb *out) {
  const size_t channels = b.p[1] == '6' ? 3 : 1;
  b = b.from(2);
  int64_t numbers[3];  // width, height, largest value
  for (int64_t &number : numbers) {
    const auto space = [](uint8_t c) { return c == ' ' || (c >= '\t' && c <= '\r'); };
    const uint8_t *const begin = b.p;
    while (b.n && (space(b.p[0]) || b.p[0] == '#')) {
      if (b.p[0] == '#')
        while (b.n && b.p[0] != '\n') b = b.from(1);
      b = b.from(1);
    }
    if (b.n == 0) return rs_fail(RS_ERR_FORMAT, "truncated PNM: no header");
    if (b.p == begin || b.p[0] < '0' || b.p[0] > '9') return rs_fail(RS_ERR_FORMAT, "corrupt PNM: not a number in its header");
    number = 0;
    for (; b.n && b.p[0] >= '0' && b.p[0] <= '9'; b = b.from(1)) number = std::min<int64_t>(number * 10 + b.p[0] - '0', INT32_MAX);
  }
  const auto [width, height, most] = numbers;
  if (most < 1 || most > 65535) return rs_fail(RS_ERR_FORMAT, "corrupt PNM: largest value %" PRId64 ", expected 1 to 65535", most);
  RS_TRY(check_size(width, height, max_pixels));
  b = b.from(1);
  const size_t n = static_cast<size_t>(width) * static_cast<size_t>(height), wide = most > 255 ? 2 : 1;
  if (b.n / (channels * wide) < n) return rs_fail(RS_ERR_FORMAT, "truncated PNM");

  std::vector<uint8_t> scaled(wide == 2 ? 65536 : 256, 255);
  for (int64_t v = 0; v <= most; v++) scaled[size_t(v)] = uint8_t(std::nearbyint(double(v) / double(most) * 255));
  out->width = static_cast<int32_t>(width), out->height = static_cast<int32_t>(height);
  out->data.resize(n * 3);
  const auto value = [&](size_t i) { return scaled[wide == 2 ? b.be16(2 * i) : b.p[i]]; };
  for (size_t i = 0; i < n * 3; i++) out->data[i] = value(channels == 3 ? i : i / 3);
  return RS_OK;
}

// ------------------------------------------------------------------------------------------------ 5 decode

rs_status decode(bytes_view b, int64_t max_pixels, rs_rgb *out) {
  const container kind = container_of(b);
  const char *const name = container_names[static_cast<int>(kind)];
  if (max_pixels <= 0) max_pixels = 100'000'000;
  facts found;
  switch (kind) {
    case container::none:
      return not_an_image(b);
    case container::pnm:
      return decode_pnm(b, max_pixels, out);
    case container::jpeg:
      RS_TRY(walk_jpeg(b, &found));
      break;
    case container::png:
      RS_TRY(walk_png(b, &found));
      break;
    case container::gif:
      RS_TRY(walk_gif(b, &found));
      break;
    case container::bmp:
      RS_TRY(walk_bmp(b, &found));
      break;
  }
  const bytes_view file = found.patched.empty() ? b : bytes_view{found.patched.data(), found.patched.size()};
  over_largest = false;
  const auto failed = [&](const feeder &f) {
    if (over_largest) return rs_fail(RS_ERR_FORMAT, "corrupt %s: unpacks to more than its pixels", name);
    if (f.starved) return rs_fail(RS_ERR_FORMAT, "truncated %s", name);
    const char *reason = stbi_failure_reason();
    if (reason && !strcmp(reason, "outofmem")) return rs_fail(RS_ERR_MEMORY, "no memory for the pixels of the %s", name);
    if (!reason) reason = "cannot be decoded";
    // It may quote the file, as the name of a chunk.
    return rs_fail(RS_ERR_FORMAT, "corrupt %s: %s", name,
                   printable(reinterpret_cast<const uint8_t *>(reason), strlen(reason)).c_str());
  };

  RS_TRY(check_size(found.width, found.height, max_pixels));
  // deflate makes at most 1032 bytes of one.
  const auto pixels_of_file = static_cast<size_t>(found.width) * static_cast<size_t>(found.height);
  if (kind == container::png && pixels_of_file / 8 / 1032 > file.n)
    return rs_fail(RS_ERR_FORMAT, "corrupt PNG: %zu bytes cannot hold %" PRId64 "x%" PRId64 " pixels", file.n, found.width,
                   found.height);

  // 16 bytes a pixel: RGBA of 16 bits, in a buffer that grows by doubling; with blocks of up to 32 pixels that stick out.  And the
  // compressed bytes of a PNG, in another; and tables.
  largest_block = 16 * (size_t(found.width) + 64) * (size_t(found.height) + 64) + 2 * file.n + (1 << 16);
  feeder body = {file};
  int width = 0, height = 0, channels = 0;
  const stb_pixels pixels(stbi_load_from_callbacks(&feeder_calls, &body, &width, &height, &channels, 3));
  if (!pixels || body.starved) return failed(body);
  if (width != found.width || height != found.height) return rs_fail(RS_ERR_FORMAT, "corrupt %s: two sizes", name);
  turn_upright(pixels.get(), width, height, found.orientation, out);
  if (kind == container::gif) fill_around(found, out);
  return RS_OK;
}

}  // namespace

rs_status rs_image_decode(const void *data, size_t bytes, int64_t max_pixels, rs_rgb *out) {
  try {
    return decode({static_cast<const uint8_t *>(data), bytes}, max_pixels, out);
  } catch (const std::bad_alloc &) {
    return rs_fail(RS_ERR_MEMORY, "no memory for the pixels of an image of %zu bytes", bytes);
  }
}

// ------------------------------------------------------------------------------------------------ 6 resize
// Pillow's resize, computed only where the crop looks.  In Pillow an image is resized along its rows, rounded to bytes, then along
// its columns.  Here a block of source rows goes through the first pass, and its bytes are added at once to the sums of those
// output rows that they are part of: integers, so the order of a sum does not matter, and neither image between the passes nor more
// than the crop is ever in memory.

namespace {

constexpr int weight_bits = 32 - 8 - 2;  // of Pillow's fixed point: 8 of a byte, 2 of head room
constexpr int32_t half = 1 << (weight_bits - 1);

double sinc(double x) { return x == 0 ? 1 : std::sin(x * M_PI) / (x * M_PI); }

struct filter_row {
  const char *name;
  rs_filter filter;
  double support;
  double (*weight)(double x);
};
const filter_row filters[] = {
    {"nearest", rs_filter::nearest, 0, nullptr},
    {"box", rs_filter::box, 0.5, [](double x) { return x > -0.5 && x <= 0.5 ? 1. : 0.; }},
    {"bilinear", rs_filter::bilinear, 1, [](double x) { return std::fabs(x) < 1 ? 1 - std::fabs(x) : 0; }},
    {"hamming", rs_filter::hamming, 1,  // Pillow's constants are floats
     [](double x) { return std::fabs(x) < 1 ? sinc(x) * (double(0.54f) + double(0.46f) * std::cos(x * M_PI)) : 0; }},
    {"bicubic", rs_filter::bicubic, 2,
     [](double x) {
       constexpr double a = -0.5;
       x = std::fabs(x);
       if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
       return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
     }},
    {"lanczos", rs_filter::lanczos, 3, [](double x) { return x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0; }},
};
const filter_row *find_filter(rs_filter filter) {
  for (const filter_row &f : filters)
    if (f.filter == filter) return &f;
  return nullptr;
}

// One direction: outputs [begin, end) of the window that lie on the image, and the sources that each is made of.
struct axis {
  int64_t begin = 0, end = 0;
  struct taps {
    int32_t first, count;
    size_t weights;
  };
  std::vector<taps> outputs;
  std::vector<int32_t> weights;
  bool same = false;  // not resized: output i is source outputs[i].first

  size_t size() const { return outputs.size(); }
  int32_t source_begin() const { return outputs.front().first; }
  int32_t source_end() const { return outputs.back().first + outputs.back().count; }
};

// `window` outputs from `start` on, of `source` pixels that are resized to `size`.
axis plan_axis(const filter_row &filter, int64_t source, int64_t size, int64_t start, int64_t window) {
  axis a;
  a.begin = std::clamp<int64_t>(-start, 0, window);
  a.end = std::clamp<int64_t>(size - start, a.begin, window);
  const int64_t n = a.end - a.begin, first = start + a.begin;
  a.outputs.reserve(static_cast<size_t>(n));
  a.same = source == size || filter.filter == rs_filter::nearest;
  const double scale = double(source) / double(size);
  if (source == size) {
    for (int64_t i = 0; i < n; i++) a.outputs.push_back({int32_t(first + i), 1, 0});
  } else if (filter.filter == rs_filter::nearest) {
    // Pillow adds up the steps, with the rounding that this brings.  Longer ways than its images can have need no such care.
    constexpr int64_t longest = 1 << 26;
    double at = scale * 0.5;
    if (first > longest) at += scale * double(first);
    else
      for (int64_t i = 0; i < first; i++) at += scale;
    for (int64_t i = 0; i < n; i++, at += scale) a.outputs.push_back({int32_t(std::min<int64_t>(int64_t(at), source - 1)), 1, 0});
  } else {
    const double shrink = std::max(scale, 1.0), support = filter.support * shrink, inverse = 1.0 / shrink;
    std::vector<double> w;
    for (int64_t i = 0; i < n; i++) {
      const double center = (double(first + i) + 0.5) * scale;
      const int64_t low = std::max<int64_t>(int64_t(std::floor(center - support + 0.5)), 0);
      const int64_t high = std::min<int64_t>(int64_t(std::floor(center + support + 0.5)), source);
      w.clear();
      double sum = 0;
      for (int64_t x = low; x < high; x++) {
        w.push_back(filter.weight((double(x) - center + 0.5) * inverse));
        sum += w.back();
      }
      a.outputs.push_back({int32_t(low), int32_t(high - low), a.weights.size()});
      for (double v : w) {
        if (sum != 0) v /= sum;
        a.weights.push_back(int32_t(v * (1 << weight_bits) + (v < 0 ? -0.5 : 0.5)));
      }
    }
  }
  return a;
}

// n outputs that are the sources from `first` on.
axis whole_axis(int32_t first, int32_t n) {
  axis a;
  a.end = n;
  a.same = true;
  for (int32_t i = 0; i < n; i++) a.outputs.push_back({first + i, 1, 0});
  return a;
}

uint8_t to_byte(int32_t sum) { return uint8_t(std::clamp(sum >> weight_bits, 0, 255)); }

// A block of rows side by side: [column][row][channel], so that one weight multiplies a whole run of bytes.
constexpr int block_rows = 16, block_lanes = 3 * block_rows;

#define RS_INLINE inline __attribute__((always_inline))

RS_INLINE void sum_columns(const uint8_t *block, const int32_t *weights, int32_t count, uint8_t *out) {
  int32_t sums[block_lanes];
  for (int32_t &s : sums) s = half;
  for (int32_t k = 0; k < count; k++, block += block_lanes) {
    const int32_t weight = weights[k];
    for (int i = 0; i < block_lanes; i++) sums[i] += block[i] * weight;
  }
  for (int i = 0; i < block_lanes; i++) out[i] = to_byte(sums[i]);
}
RS_INLINE void add_row(const uint8_t *row, int32_t weight, size_t n, int32_t *sums) {
  for (size_t i = 0; i < n; i++) sums[i] += row[i] * weight;
}

// The same code for the compiler's target and for AVX2, whose multiplication of 32 bits is most of the work.
struct kernels {
  void (*sum_columns)(const uint8_t *block, const int32_t *weights, int32_t count, uint8_t *out);
  void (*add_row)(const uint8_t *row, int32_t weight, size_t n, int32_t *sums);
};
void sum_columns_plain(const uint8_t *block, const int32_t *weights, int32_t count, uint8_t *out) {
  sum_columns(block, weights, count, out);
}
void add_row_plain(const uint8_t *row, int32_t weight, size_t n, int32_t *sums) { add_row(row, weight, n, sums); }
#if defined(__x86_64__)
__attribute__((target("avx2"))) void sum_columns_avx2(const uint8_t *block, const int32_t *weights, int32_t count, uint8_t *out) {
  sum_columns(block, weights, count, out);
}
__attribute__((target("avx2"))) void add_row_avx2(const uint8_t *row, int32_t weight, size_t n, int32_t *sums) {
  add_row(row, weight, n, sums);
}
kernels pick_kernels() {
  if (__builtin_cpu_supports("avx2")) return {sum_columns_avx2, add_row_avx2};
  return {sum_columns_plain, add_row_plain};
}
#else
kernels pick_kernels() { return {sum_columns_plain, add_row_plain}; }
#endif

struct source_image {
  const uint8_t *rgb;
  size_t width, height;
  const uint8_t *row(size_t y) const { return rgb + y * width * 3; }
};

// `rows` rows from y on, columns [x, end), as a block.  Four bytes at a time: the last lands where the next pixel goes.
void gather_block(const source_image &in, size_t y, int rows, size_t x, size_t end, uint8_t *block) {
  const uint8_t *from[block_rows];
  for (int r = 0; r < rows; r++) from[r] = in.row(y + size_t(r)) + 3 * x;
  const size_t n = end - x;
  for (size_t i = 0; i + 1 < n; i++, block += block_lanes)
    for (int r = 0; r < rows; r++) memcpy(block + 3 * r, from[r] + 3 * i, 4);
  for (int r = 0; r < rows; r++) memcpy(block + 3 * r, from[r] + 3 * (n - 1), 3);
}

// Rows of the first pass: out[r] has the window's columns of source row y + r.
class row_pass {
 public:
  row_pass(const source_image &in, const axis &x, kernels k)
      : in_(in), x_(x), k_(k), stride_(3 * x.size()), rows_(x.same ? 0 : stride_ * block_rows) {}

  void run(size_t y, int rows) {
    // As many columns at a time as stay in the first cache; wide filters take more for a single output.
    constexpr int32_t columns = 512;
    const std::vector<axis::taps> &outputs = x_.outputs;
    for (size_t i = 0; i < outputs.size();) {
      size_t end = i + 1;
      const int32_t first = outputs[i].first;
      while (end < outputs.size() && outputs[end].first + outputs[end].count - first <= columns) end++;
      const int32_t last = outputs[end - 1].first + outputs[end - 1].count;
      block_.resize(size_t(last - first) * block_lanes + 4);
      gather_block(in_, y, rows, size_t(first), size_t(last), block_.data());
      for (; i < end; i++) {
        uint8_t sums[block_lanes];
        k_.sum_columns(block_.data() + size_t(outputs[i].first - first) * block_lanes, x_.weights.data() + outputs[i].weights,
                       outputs[i].count, sums);
        for (int r = 0; r < rows; r++) memcpy(rows_.data() + stride_ * size_t(r) + 3 * i, sums + 3 * r, 3);
      }
    }
  }
  const uint8_t *row(size_t r) const { return rows_.data() + stride_ * r; }

 private:
  const source_image &in_;
  const axis &x_;
  kernels k_;
  size_t stride_;
  std::vector<uint8_t> rows_, block_;
};

// What becomes of a byte in each channel.  A table has the reference's own floats: rescaled and rounded, then normalised in f32.
struct value_table {
  float of[3][256];
  explicit value_table(const rs_image_spec &spec) {
    for (int c = 0; c < 3; c++)
      for (int v = 0; v < 256; v++) of[c][v] = (float(v * spec.rescale) - spec.mean[c]) / spec.std[c];
  }
};

// A row of the window to the planes of the result.
void put_row(const value_table &values, const uint8_t *row, size_t n, float *out, size_t plane) {
  for (size_t c = 0; c < 3; c++)
    for (size_t i = 0; i < n; i++) out[c * plane + i] = values.of[c][row[3 * i + c]];
}

// The rows of the window that lie on the image, each given to sink(row, bytes).
template <class Sink>
void resize_rows(const source_image &in, const axis &x, const axis &y, const Sink &sink) {
  const kernels k = pick_kernels();
  const size_t n = 3 * x.size();
  row_pass pass(in, x, k);
  std::vector<uint8_t> bytes(n);
  // A row of the first pass.  Where nothing is resized along it, the source has it already, or with gaps.
  const auto first_pass = [&](size_t source_row, size_t r) -> const uint8_t * {
    if (!x.same) return pass.row(r);
    for (size_t i = 0; i < x.size(); i++) memcpy(&bytes[3 * i], in.row(source_row) + 3 * size_t(x.outputs[i].first), 3);
    return bytes.data();
  };

  if (y.same) {  // each output row is one source row: the next one, or where x.same too, any
    for (size_t i = 0; i < y.size(); i++) {
      const auto from = size_t(y.outputs[i].first), r = i % block_rows;
      if (!x.same && r == 0) pass.run(from, int(std::min<size_t>(block_rows, y.size() - i)));
      sink(i, first_pass(from, r));
    }
    return;
  }
  std::vector<int32_t> sums(n * y.size(), half);
  const auto begin = size_t(y.source_begin()), end = size_t(y.source_end());
  size_t oldest = 0;  // the first output row that still waits for source rows
  for (size_t at = begin; at < end; at += block_rows) {
    const int rows = int(std::min<size_t>(block_rows, end - at));
    if (!x.same) pass.run(at, rows);
    for (size_t r = 0; r < size_t(rows); r++) {
      const auto source_row = int32_t(at + r);
      const uint8_t *row = first_pass(at + r, r);
      const auto done = [&](const axis::taps &t) { return t.first + t.count <= source_row; };
      while (oldest < y.size() && done(y.outputs[oldest])) oldest++;
      for (size_t i = oldest; i < y.size() && y.outputs[i].first <= source_row; i++)
        if (!done(y.outputs[i]))
          k.add_row(row, y.weights[y.outputs[i].weights + size_t(source_row - y.outputs[i].first)], n, &sums[i * n]);
    }
  }
  for (size_t i = 0; i < y.size(); i++) {
    for (size_t j = 0; j < n; j++) bytes[j] = to_byte(sums[i * n + j]);
    sink(i, bytes.data());
  }
}

void resize_to_pixels(const rs_image_spec &spec, source_image in, axis x, axis y, bool columns_first, float *out) {
  const auto width = size_t(spec.width()), plane = width * size_t(spec.height());
  const value_table values(spec);
  if (x.size() < width || y.size() < size_t(spec.height()))
    for (size_t c = 0; c < 3; c++) std::fill_n(out + c * plane, plane, values.of[c][0]);
  if (x.size() == 0 || y.size() == 0) return;
  float *const corner = out + size_t(y.begin) * width + size_t(x.begin);

  std::vector<uint8_t> between;
  if (columns_first) {
    const int32_t first = x.source_begin(), n = x.source_end() - first;
    between.resize(size_t(3) * size_t(n) * y.size());
    resize_rows(in, whole_axis(first, n), y,
                [&](size_t i, const uint8_t *row) { memcpy(&between[size_t(3) * size_t(n) * i], row, size_t(3) * size_t(n)); });
    in = {between.data(), size_t(n), y.size()};
    for (axis::taps &t : x.outputs) t.first -= first;
    y = whole_axis(0, int32_t(y.size()));
  }
  resize_rows(in, x, y, [&](size_t i, const uint8_t *row) { put_row(values, row, x.size(), corner + i * width, plane); });
}

// Where the middle `window` of `size` begins; negative where the image is the smaller one.
int64_t crop_start(int64_t size, int64_t window, bool round) {
  const int64_t margin = size - window;
  if (!round) return margin >= 0 ? margin / 2 : -((-margin + 1) / 2);
  if (margin < 0) return -(-margin / 2);
  return margin / 2 + (margin % 2 && margin / 2 % 2);  // half to even
}

// Of what a result is cut from, which costs nothing: only what is cut is computed.
constexpr int32_t max_whole = 1 << 20;

rs_status check_spec(const rs_image_spec &s, rs_status status) {
  const auto check_box = [status](const char *key, int32_t width, int32_t height, int32_t most) {
    if (width >= 1 && width <= most && height >= 1 && height <= most) return RS_OK;
    return rs_fail(status, "%s is %dx%d, expected 1 to %d each", key, width, height, most);
  };
  if (s.resize != rs_resize::none)
    RS_TRY(check_box("image.resize_size", s.resize_width, s.resize_height, s.crop ? max_whole : rs_image_most_side));
  if (s.crop) RS_TRY(check_box("image.crop_size", s.crop_width, s.crop_height, rs_image_most_side));
  if (!s.crop && s.resize != rs_resize::exact)
    return rs_fail(status, "image.crop_size is missing: without it, image.resize must be 'exact', or results differ in size");
  if (!find_filter(s.filter)) return rs_fail(status, "image.resample is %d, which is no filter", static_cast<int>(s.filter));
  if (!std::isfinite(s.rescale) || s.rescale <= 0) return rs_fail(status, "image.rescale is %g, expected more than 0", s.rescale);
  for (int c = 0; c < 3; c++) {
    if (!std::isfinite(s.mean[c])) return rs_fail(status, "image.mean[%d] is NaN or infinite", c);
    if (!std::isfinite(s.std[c]) || s.std[c] <= 0)
      return rs_fail(status, "image.std[%d] is %g, expected more than 0", c, double(s.std[c]));
    for (const double v : {0., 255.})
      if (!std::isfinite((float(v * s.rescale) - s.mean[c]) / s.std[c]))
        return rs_fail(status, "image.rescale, .mean and .std give infinite pixels");
  }
  return RS_OK;
}

}  // namespace

rs_status rs_image_pixels(const rs_image_spec &spec, const uint8_t *rgb, int32_t width, int32_t height, float *out) {
  RS_TRY(check_spec(spec, RS_ERR_ARGUMENT));
  if (width < 1 || height < 1) return rs_fail(RS_ERR_ARGUMENT, "image of %dx%d pixels", width, height);
  int64_t w = width, h = height;
  if (spec.resize == rs_resize::exact) {
    w = spec.resize_width, h = spec.resize_height;
  } else if (spec.resize == rs_resize::shortest_edge) {
    // The other edge as Python has it: an exact product, a division in double, cut.
    const int64_t to_width = spec.resize_width, to_height = spec.resize_height;
    if (to_width * height >= to_height * width) w = to_width, h = int64_t(double(to_width * height) / width);
    else w = int64_t(double(to_height * width) / height), h = to_height;
  }
  const int64_t left = spec.crop ? crop_start(w, spec.crop_width, spec.crop_round) : 0;
  const int64_t top = spec.crop ? crop_start(h, spec.crop_height, spec.crop_round) : 0;
  const filter_row &filter = *find_filter(spec.filter);
  try {
    const axis x = plan_axis(filter, width, w, left, spec.width());
    const axis y = plan_axis(filter, height, h, top, spec.height());
    // Pillow takes the columns of very tall images first.  (So does Pillow 13 where the height shrinks by more than twice as many
    // pixels as the width: other roundings, by a level or two.  What models were trained with is older.)
    const bool columns_first = height > int64_t(width) * 100 && h < height;
    resize_to_pixels(spec, {rgb, size_t(width), size_t(height)}, x, y, columns_first, out);
    return RS_OK;
  } catch (const std::bad_alloc &) {
    return rs_fail(RS_ERR_MEMORY, "no memory to resize an image of %dx%d pixels", width, height);
  }
}

// ------------------------------------------------------------------------------------------------ 7 the image.* metadata

namespace {

// Found, and of that kind; *found is false where the key is absent and may be.
rs_status read_meta(const rs_model *model, const char *key, rs_meta_kind kind, const char *kind_name, bool optional, rs_meta *out,
                    bool *found) {
  *found = rs_model_meta(model, key, out) == RS_OK;
  if (!*found) return optional ? RS_OK : rs_fail(RS_ERR_FORMAT, "%s is missing", key);
  return out->kind == kind ? RS_OK : rs_fail(RS_ERR_FORMAT, "%s is not %s", key, kind_name);
}

// One of `names`, into *out its index.
rs_status read_name(const rs_model *model, const char *key, const std::vector<const char *> &names, bool optional, size_t *out) {
  rs_meta meta;
  bool found;
  RS_TRY(read_meta(model, key, RS_META_STR, "a string", optional, &meta, &found));
  if (!found) return RS_OK;
  std::string all;
  for (size_t i = 0; i < names.size(); i++) {
    if (!strcmp(meta.str, names[i]) && strlen(meta.str) == meta.count) return *out = i, RS_OK;
    all += (i == 0 ? "'" : i + 1 < names.size() ? ", '" : " or '") + std::string(names[i]) + "'";
  }
  return rs_fail(RS_ERR_FORMAT, "%s is '%.40s', expected %s", key, meta.str, all.c_str());
}

rs_status read_size(const rs_model *model, const char *key, bool optional, int32_t *width, int32_t *height, bool *found) {
  rs_meta meta;
  RS_TRY(read_meta(model, key, RS_META_I64S, "a list of integers", optional, &meta, found));
  if (!*found) return RS_OK;
  if (meta.count != 2) return rs_fail(RS_ERR_FORMAT, "%s has %zu values, expected width and height", key, meta.count);
  for (size_t i = 0; i < 2; i++)
    if (meta.i64s[i] < 1 || meta.i64s[i] > rs_image_most_side)
      return rs_fail(RS_ERR_FORMAT, "%s[%zu] is %" PRId64 ", expected 1 to %d", key, i, meta.i64s[i], rs_image_most_side);
  *width = int32_t(meta.i64s[0]), *height = int32_t(meta.i64s[1]);
  return RS_OK;
}

rs_status read_channels(const rs_model *model, const char *key, float *out) {
  rs_meta meta;
  bool found;
  RS_TRY(read_meta(model, key, RS_META_F32S, "a list of floats", false, &meta, &found));
  if (meta.count != 3) return rs_fail(RS_ERR_FORMAT, "%s has %zu values, expected 3", key, meta.count);
  std::copy_n(meta.f32s, 3, out);
  return RS_OK;
}

rs_status load_spec(const rs_model *model, rs_image_spec *out) {
  rs_image_spec s;
  size_t resize = 0, rounding = 0, filter = 0;
  bool found;
  RS_TRY(read_name(model, "image.resize", {"none", "shortest_edge", "exact"}, false, &resize));
  s.resize = static_cast<rs_resize>(resize);
  if (s.resize != rs_resize::none) {
    RS_TRY(read_size(model, "image.resize_size", false, &s.resize_width, &s.resize_height, &found));
    std::vector<const char *> names;
    for (const filter_row &f : filters) names.push_back(f.name);
    RS_TRY(read_name(model, "image.resample", names, false, &filter));
    s.filter = filters[filter].filter;
  }
  RS_TRY(read_size(model, "image.crop_size", true, &s.crop_width, &s.crop_height, &s.crop));
  RS_TRY(read_name(model, "image.crop_rounding", {"floor", "round"}, true, &rounding));
  s.crop_round = rounding == 1;
  rs_meta rescale;
  RS_TRY(read_meta(model, "image.rescale", RS_META_F64, "a number", false, &rescale, &found));
  s.rescale = rescale.f64;
  RS_TRY(read_channels(model, "image.mean", s.mean));
  RS_TRY(read_channels(model, "image.std", s.std));
  RS_TRY(check_spec(s, RS_ERR_FORMAT));
  *out = s;
  return RS_OK;
}

}  // namespace

rs_status rs_image_spec_load(const rs_model *model, rs_image_spec *out) {
  try {
    return load_spec(model, out);
  } catch (const std::bad_alloc &) {
    return rs_fail(RS_ERR_MEMORY, "no memory for the image.* metadata");
  }
}

rs_status rs_image_spec_resize(rs_image_spec *spec, int32_t width, int32_t height) {
  RS_TRY(check_spec(*spec, RS_ERR_ARGUMENT));
  if (width < 1 || height < 1 || width > rs_image_most_side || height > rs_image_most_side)
    return rs_fail(RS_ERR_ARGUMENT, "image size %dx%d, expected 1 to %d each", width, height, rs_image_most_side);
  rs_image_spec s = *spec;
  const auto scaled = [](int64_t edge, int64_t to, int64_t from) {
    return int32_t(std::min<int64_t>((2 * edge * to + from) / (2 * from), INT32_MAX));
  };
  if (s.resize != rs_resize::none && s.crop) {
    s.resize_width = std::max(scaled(s.resize_width, width, s.crop_width), 1);
    s.resize_height = std::max(scaled(s.resize_height, height, s.crop_height), 1);
    if (s.resize_width > max_whole || s.resize_height > max_whole)
      return rs_fail(RS_ERR_LIMIT, "image size %dx%d: cut from %dx%d, the limit is %d", width, height, s.resize_width,
                     s.resize_height, max_whole);
  } else {
    s.resize_width = width, s.resize_height = height;
  }
  if (s.crop) s.crop_width = width, s.crop_height = height;
  *spec = s;
  return RS_OK;
}
