// What small models with random weights have in common, each as published weights (rs_source) and as a weight file: for tests that
// need a whole model but no real one.
#pragma once
#include "../rs.h"
#include "test_util.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <deque>
#include <map>
#include <random>

struct tiny_source {
  std::map<std::string, std::vector<float>> weights;
  std::map<std::string, std::vector<int64_t>> shapes;
  std::map<std::string, rs_convert_tensor> reported;  // by the last conversion

  virtual ~tiny_source() = default;

  void tensor(const std::string &name, const std::vector<int64_t> &shape, float mean, float sigma) {
    std::normal_distribution<float> d(mean, sigma);
    size_t n = 1;
    for (int64_t s : shape) n *= static_cast<size_t>(s);
    std::vector<float> v(n);
    for (float &x : v) x = d(rng);
    weights[name] = v;
    shapes[name] = shape;
  }

  virtual void fill() = 0;                            // the weights
  virtual void set_metadata(rs_writer *w) const = 0;  // what the convert tool adds: tokenizer, pooling, preparation of images

  // Valid as long as this object is not changed.
  rs_source source() {
    if (weights.empty()) fill();
    config.clear(), tensors.clear(), kept.clear();
    set_config();
    for (const auto &[name, values] : weights) {
      rs_source_tensor t = {};
      t.name = name.c_str(), t.type_name = "F32", t.type = RS_F32, t.data = values.data();
      t.rank = static_cast<int>(shapes[name].size());
      std::copy(shapes[name].begin(), shapes[name].end(), t.shape);
      tensors.push_back(t);
    }
    rs_source s = {};
    s.size = sizeof s;
    s.config = config.data(), s.n_config = config.size(), s.tensors = tensors.data(), s.n_tensors = tensors.size();
    return s;
  }

  // calibration: what weights are rounded by, or nullptr.
  rs_status convert(const std::string &path, const char *type = "f32", rs_calibration *calibration = nullptr) {
    rs_writer *w = nullptr;
    rs_status status = rs_writer_open(path.c_str(), &w);
    if (status != RS_OK) return status;
    set_metadata(w);
    rs_convert_params p = {};
    p.size = sizeof p;
    p.type = type;
    p.calibration = calibration;
    p.ctx = &reported;
    p.on_tensor = [](void *to, const rs_convert_tensor *row) {
      (*static_cast<std::map<std::string, rs_convert_tensor> *>(to))[row->name] = *row;
    };
    const rs_source s = source();
    status = rs_convert(&s, &p, w);
    if (status == RS_OK) status = rs_writer_finish(w);
    rs_writer_free(w);
    return status;
  }

 protected:
  explicit tiny_source(unsigned seed) : rng(seed) {}

  virtual void set_config() = 0;  // config.json, by these
  void number(const std::string &key, int64_t v) {
    config.push_back({keep(key), RS_META_I64, false, v, static_cast<double>(v), nullptr});
  }
  void real(const std::string &key, double v) { config.push_back({keep(key), RS_META_F64, false, 0, v, nullptr}); }
  void string(const std::string &key, const std::string &v) {  // in place of what there was
    config.erase(std::remove_if(config.begin(), config.end(), [&](const rs_source_value &c) { return key == c.key; }),
                 config.end());
    config.push_back({keep(key), RS_META_STR, false, 0, 0, keep(v)});
  }
  void id2label(const std::vector<std::string> &labels) {
    for (size_t i = 0; i < labels.size(); i++) string("id2label." + std::to_string(i), labels[i]);
  }

  static void expect_set(std::initializer_list<rs_status> all) {
    for (rs_status s : all) EXPECT_EQ(s, RS_OK) << rs_last_error();
  }
  static void set_image_metadata(rs_writer *w, int64_t side, const char *resample, const float (&mean)[3],
                                 const float (&deviation)[3]) {
    const int64_t size[] = {side, side};
    expect_set({rs_writer_set_str(w, "image.resize", "exact"), rs_writer_set_i64s(w, "image.resize_size", size, 2),
                rs_writer_set_str(w, "image.resample", resample), rs_writer_set_f64(w, "image.rescale", 1 / 255.),
                rs_writer_set_f32s(w, "image.mean", mean, 3), rs_writer_set_f32s(w, "image.std", deviation, 3)});
  }

 private:
  const char *keep(const std::string &text) { return kept.emplace_back(text).c_str(); }

  std::mt19937 rng;
  std::vector<rs_source_value> config;
  std::vector<rs_source_tensor> tensors;
  std::deque<std::string> kept;  // what config points to
};

// The weight file `from` with scales of inputs, by the name of their weight, as `to`.
inline rs_status add_input_scales(const std::string &from, const std::string &to,
                                  const std::map<std::string, std::vector<float>> &scales) {
  rs_model *model = nullptr;
  rs_writer *w = nullptr;
  rs_status status = rs_model_load(from.c_str(), nullptr, &model);
  if (status == RS_OK) status = rs_writer_open(to.c_str(), &w);
  if (status == RS_OK) status = rs_writer_copy(w, model);
  for (const auto &[name, values] : scales) {
    const auto n = static_cast<int64_t>(values.size());
    if (status == RS_OK)
      status = rs_writer_add(w, (name + ".input_scale").c_str(), RS_F32, RS_ROWS, 1, &n, values.data(), values.size() * 4);
  }
  if (status == RS_OK) status = rs_writer_finish(w);
  rs_writer_free(w);
  rs_model_free(model);
  return status;
}

// ------------------------------------------------------------------------------------------------ images

// A PNM file (P6) with value(x, y) = {red, green, blue}.
template <class F>
std::string pnm_of(int width, int height, const F &value) {
  std::string bytes = "P6\n" + std::to_string(width) + " " + std::to_string(height) + "\n255\n";
  for (int y = 0; y < height; y++)
    for (int x = 0; x < width; x++)
      for (unsigned c : value(x, y)) bytes += static_cast<char>(c);
  return bytes;
}

// Coloured noise over a slope, which `seed` makes its own.
inline std::string pnm_image(int width, int height, unsigned seed) {
  std::mt19937 rng(seed);
  return pnm_of(width, height, [&](int x, int y) {
    const int slope[] = {x * 180 / width, y * 180 / height, (x + y) * 90 / height};
    std::array<unsigned, 3> rgb{};
    for (size_t c = 0; c < 3; c++) rgb[c] = static_cast<unsigned>(slope[c]) % 190 + rng() % 64;
    return rgb;
  });
}

// Blocks of colours that the seed alone decides.
inline std::string tiny_image(unsigned seed, int width = 24, int height = 20) {
  std::mt19937 rng(seed);
  std::array<unsigned, 3> colours[6];
  for (auto &colour : colours)
    for (unsigned &c : colour) c = rng() % 256;
  return pnm_of(width, height, [&](int x, int y) { return colours[(x / 9 + 3 * (y / 9)) % 6]; });
}

// The pixels of such a file as a BMP file of 24 bits.
inline std::string bmp_of(const std::string &pnm, int width, int height) {
  const std::string rgb = pnm.substr(pnm.size() - static_cast<size_t>(3 * width * height));
  const int stride = (3 * width + 3) / 4 * 4;
  std::string out;
  const auto number = [&](int value, int bytes) {
    for (int i = 0; i < bytes; i++) out += static_cast<char>(value >> (8 * i) & 0xff);
  };
  out += "BM", number(54 + stride * height, 4), number(0, 4), number(54, 4), number(40, 4), number(width, 4), number(height, 4);
  number(1, 2), number(24, 2), number(0, 4), number(stride * height, 4), number(2835, 4), number(2835, 4), number(0, 4),
      number(0, 4);
  for (int y = height - 1; y >= 0; y--) {
    for (int x = 0; x < width; x++)
      for (int c = 2; c >= 0; c--) out += rgb[static_cast<size_t>(3 * (y * width + x) + c)];
    for (int i = 3 * width; i < stride; i++) out += '\0';
  }
  return out;
}
