// A small DINOv2 with random weights, as published weights (rs_source) and as a weight file, and small images: for tests that need
// a whole vision model but no real one.
#pragma once
#include "../rs.h"
#include "test_util.h"

#include <cmath>
#include <map>
#include <random>

struct tiny_dinov2 {
  int64_t hidden = 32, layers = 4, heads = 4, ratio = 2, side = 32, patch = 8;
  std::vector<std::string> labels;  // of a head on the class token and the mean of the patches; none: no head
  std::map<std::string, std::vector<float>> weights;
  std::map<std::string, std::vector<int64_t>> shapes;

  explicit tiny_dinov2(unsigned seed = 1) : rng(seed) {}

  rs_status convert(const std::string &path, const char *type) {
    rs_writer *w = nullptr;
    rs_status status = rs_writer_open(path.c_str(), &w);
    if (status != RS_OK) return status;
    set_metadata(w);
    rs_convert_params p = {};
    p.size = sizeof p;
    p.type = type;
    const rs_source s = source();
    status = rs_convert(&s, &p, w);
    if (status == RS_OK) status = rs_writer_finish(w);
    rs_writer_free(w);
    return status;
  }

 private:
  void tensor(const std::string &name, const std::vector<int64_t> &shape, float mean, float sigma) {
    std::normal_distribution<float> d(mean, sigma);
    size_t n = 1;
    for (int64_t s : shape) n *= static_cast<size_t>(s);
    std::vector<float> v(n);
    for (float &x : v) x = d(rng);
    weights[name] = v;
    shapes[name] = shape;
  }

  void fill() {
    const std::string root = labels.empty() ? "" : "dinov2.";
    const float s = 1 / std::sqrt(static_cast<float>(hidden));
    const auto norm = [&](const std::string &name) {
      tensor(name + ".weight", {hidden}, 1, 0.2f);
      tensor(name + ".bias", {hidden}, 0, 0.2f);
    };
    const auto dense = [&](const std::string &name, int64_t n, int64_t k) {
      tensor(name + ".weight", {n, k}, 0, s);
      tensor(name + ".bias", {n}, 0, 0.1f);
    };
    const int64_t patches = (side / patch) * (side / patch);
    const std::string e = root + "embeddings.";
    tensor(e + "cls_token", {1, 1, hidden}, 0, 0.5f);
    tensor(e + "mask_token", {1, hidden}, 0, 0.5f);
    tensor(e + "position_embeddings", {1, 1 + patches, hidden}, 0, 0.3f);
    tensor(e + "patch_embeddings.projection.weight", {hidden, 3, patch, patch}, 0, 0.1f);
    tensor(e + "patch_embeddings.projection.bias", {hidden}, 0, 0.1f);
    for (int64_t i = 0; i < layers; i++) {
      const std::string at = root + "encoder.layer." + std::to_string(i) + ".";
      norm(at + "norm1");
      for (const char *n : {"query", "key", "value"}) dense(at + "attention.attention." + n, hidden, hidden);
      dense(at + "attention.output.dense", hidden, hidden);
      tensor(at + "layer_scale1.lambda1", {hidden}, 1, 0.1f);
      norm(at + "norm2");
      dense(at + "mlp.fc1", ratio * hidden, hidden);
      dense(at + "mlp.fc2", hidden, ratio * hidden);
      tensor(at + "layer_scale2.lambda1", {hidden}, 1, 0.1f);
    }
    norm(root + "layernorm");
    if (!labels.empty()) dense("classifier", static_cast<int64_t>(labels.size()), 2 * hidden);
  }

  // Valid as long as this object is not changed.
  rs_source source() {
    if (weights.empty()) fill();
    config.clear(), tensors.clear(), label_keys.clear();
    const auto number = [&](const char *key, int64_t v) {
      config.push_back({key, RS_META_I64, false, v, static_cast<double>(v), nullptr});
    };
    const auto string = [&](const char *key, const char *v) { config.push_back({key, RS_META_STR, false, 0, 0, v}); };
    string("model_type", "dinov2");
    string("architectures.0", labels.empty() ? "Dinov2Model" : "Dinov2ForImageClassification");
    number("hidden_size", hidden), number("num_hidden_layers", layers), number("num_attention_heads", heads);
    number("mlp_ratio", ratio), number("image_size", side), number("patch_size", patch);
    label_keys.reserve(labels.size());
    for (size_t i = 0; i < labels.size(); i++) {
      label_keys.push_back("id2label." + std::to_string(i));
      string(label_keys.back().c_str(), labels[i].c_str());
    }
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

  // Pooling and image preparation, as the convert tool sets them.
  void set_metadata(rs_writer *w) const {
    const int64_t size[] = {side, side};
    const float mean[] = {0.5f, 0.45f, 0.4f}, deviation[] = {0.25f, 0.25f, 0.25f};
    const rs_status all[] = {
        rs_writer_set_str(w, "encode.pooling", "cls"),     rs_writer_set_bool(w, "encode.normalize", false),
        rs_writer_set_str(w, "image.resize", "exact"),     rs_writer_set_i64s(w, "image.resize_size", size, 2),
        rs_writer_set_str(w, "image.resample", "bicubic"), rs_writer_set_f64(w, "image.rescale", 1 / 255.),
        rs_writer_set_f32s(w, "image.mean", mean, 3),      rs_writer_set_f32s(w, "image.std", deviation, 3),
    };
    for (rs_status s : all) EXPECT_EQ(s, RS_OK) << rs_last_error();
  }

  std::mt19937 rng;
  std::vector<rs_source_value> config;
  std::vector<std::string> label_keys;
  std::vector<rs_source_tensor> tensors;
};

// The bytes of a PNM file: blocks of colours that the seed alone decides.
inline std::string tiny_image(unsigned seed, int width = 24, int height = 20) {
  std::mt19937 rng(seed);
  unsigned char colours[6][3];
  for (auto &colour : colours)
    for (unsigned char &c : colour) c = static_cast<unsigned char>(rng() % 256);
  std::string bytes = "P6\n" + std::to_string(width) + " " + std::to_string(height) + "\n255\n";
  for (int y = 0; y < height; y++)
    for (int x = 0; x < width; x++)
      for (unsigned char c : colours[(x / 9 + 3 * (y / 9)) % 6]) bytes += static_cast<char>(c);
  return bytes;
}
