// A small ViT, and a small CLIP, with random weights, as weight files; and images to give them.
#pragma once
#include "tiny_bert.h"

struct tiny_vit {
  int64_t hidden = 32, layers = 3, heads = 4, intermediate = 64, patch = 4, size = 24;
  std::vector<std::string> labels;  // of a head on top
  bool clip = false;                // with a tower for texts, in the words of tiny_bert
  float logit_scale = 2, logit_bias = 0;
  int64_t prefix() const { return 1; }
  int64_t patches() const { return (size / patch) * (size / patch); }
  int64_t tokens() const { return prefix() + patches(); }
  static constexpr int64_t text_hidden = 48, projection = 16, positions = 40;

  rs_status convert(const std::string &path, const char *type = "f32") {
    if (weights.empty()) clip ? fill_clip() : fill_vit();
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
    std::vector<float> &v = weights[name];
    v.resize(n);
    for (float &x : v) x = d(rng);
    shapes[name] = shape;
  }
  void norm(const std::string &name, int64_t c) {
    tensor(name + ".weight", {c}, 1, 0.2f);
    tensor(name + ".bias", {c}, 0, 0.2f);
  }
  void dense(const std::string &name, int64_t n, int64_t k) {
    tensor(name + ".weight", {n, k}, 0, 1.5f / std::sqrt(static_cast<float>(k)));
    tensor(name + ".bias", {n}, 0, 0.2f);
  }

  void fill_vit() {
    const std::string root = labels.empty() ? "" : "vit.", embeddings = root + "embeddings.";
    tensor(embeddings + "patch_embeddings.projection.weight", {hidden, 3, patch, patch}, 0, 0.3f);
    tensor(embeddings + "patch_embeddings.projection.bias", {hidden}, 0, 0.1f);
    tensor(embeddings + "cls_token", {1, 1, hidden}, 0, 0.5f);
    tensor(embeddings + "position_embeddings", {1, tokens(), hidden}, 0, 0.3f);
    for (int64_t i = 0; i < layers; i++) {
      const std::string at = root + "encoder.layer." + std::to_string(i) + ".";
      for (const char *n : {"query", "key", "value"}) dense(at + "attention.attention." + n, hidden, hidden);
      dense(at + "attention.output.dense", hidden, hidden);
      dense(at + "intermediate.dense", intermediate, hidden);
      dense(at + "output.dense", hidden, intermediate);
      norm(at + "layernorm_before", hidden);
      norm(at + "layernorm_after", hidden);
    }
    norm(root + "layernorm", hidden);
    if (!labels.empty()) dense("classifier", static_cast<int64_t>(labels.size()), hidden);
  }

  void fill_layers(const std::string &root, int64_t c) {
    for (int64_t i = 0; i < layers; i++) {
      const std::string at = root + "encoder.layers." + std::to_string(i) + ".";
      for (const char *n : {"q_proj", "k_proj", "v_proj", "out_proj"}) dense(at + "self_attn." + n, c, c);
      dense(at + "mlp.fc1", intermediate, c);
      dense(at + "mlp.fc2", c, intermediate);
      norm(at + "layer_norm1", c);
      norm(at + "layer_norm2", c);
    }
  }

  void fill_clip() {
    const std::string image = "vision_model.", text = "text_model.";
    tensor(image + "embeddings.patch_embedding.weight", {hidden, 3, patch, patch}, 0, 0.3f);
    tensor(image + "embeddings.class_embedding", {hidden}, 0, 0.5f);
    tensor(image + "embeddings.position_embedding.weight", {tokens(), hidden}, 0, 0.3f);
    norm(image + "pre_layrnorm", hidden);
    fill_layers(image, hidden);
    norm(image + "post_layernorm", hidden);
    tensor("visual_projection.weight", {projection, hidden}, 0, 0.3f);
    tensor(text + "embeddings.token_embedding.weight", {static_cast<int64_t>(words.vocab.size()), text_hidden}, 0, 1);
    tensor(text + "embeddings.position_embedding.weight", {positions, text_hidden}, 0, 0.3f);
    fill_layers(text, text_hidden);
    norm(text + "final_layer_norm", text_hidden);
    tensor("text_projection.weight", {projection, text_hidden}, 0, 0.3f);
    tensor("logit_scale", {1}, logit_scale, 0);
    if (logit_bias != 0) tensor("logit_bias", {1}, logit_bias, 0);
  }

  rs_source source() {
    config.clear(), tensors.clear(), keys.clear();
    keys.reserve(64);  // config points to them
    const auto key = [&](const std::string &k) { return keys.emplace_back(k).c_str(); };
    const auto number = [&](const std::string &k, int64_t v) {
      config.push_back({key(k), RS_META_I64, false, v, static_cast<double>(v), nullptr});
    };
    const auto string = [&](const std::string &k, const char *v) { config.push_back({key(k), RS_META_STR, false, 0, 0, v}); };
    const auto tower = [&](const std::string &at, int64_t c) {
      number(at + "hidden_size", c), number(at + "num_hidden_layers", layers), number(at + "num_attention_heads", heads);
      number(at + "intermediate_size", intermediate);
    };
    if (clip) {
      string("model_type", "clip"), string("architectures.0", "CLIPModel");
      tower("vision_config.", hidden), tower("text_config.", text_hidden);
      number("vision_config.image_size", size), number("vision_config.patch_size", patch), number("projection_dim", projection);
      number("text_config.vocab_size", static_cast<int64_t>(words.vocab.size()));
      number("text_config.max_position_embeddings", positions);
    } else {
      string("model_type", "vit"), string("architectures.0", labels.empty() ? "ViTModel" : "ViTForImageClassification");
      tower("", hidden), number("image_size", size), number("patch_size", patch);
      for (size_t i = 0; i < labels.size(); i++) string("id2label." + std::to_string(i), labels[i].c_str());
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

  void set_metadata(rs_writer *w) {
    const int64_t to[] = {size, size};
    const float mean[] = {0.5f, 0.4f, 0.3f}, deviation[] = {0.25f, 0.3f, 0.35f};
    if (clip) {
      words.positions = positions;
      words.set_metadata(w);
    } else {
      EXPECT_EQ(rs_writer_set_str(w, "encode.pooling", "cls"), RS_OK) << rs_last_error();
      EXPECT_EQ(rs_writer_set_bool(w, "encode.normalize", false), RS_OK) << rs_last_error();
    }
    const rs_status all[] = {
        rs_writer_set_str(w, "general.name", "tiny"),      rs_writer_set_str(w, "image.resize", "exact"),
        rs_writer_set_i64s(w, "image.resize_size", to, 2), rs_writer_set_str(w, "image.resample", "bilinear"),
        rs_writer_set_f64(w, "image.rescale", 1 / 255.0),  rs_writer_set_f32s(w, "image.mean", mean, 3),
        rs_writer_set_f32s(w, "image.std", deviation, 3),
    };
    for (rs_status s : all) EXPECT_EQ(s, RS_OK) << rs_last_error();
  }

  std::mt19937 rng{7};
  tiny_bert words;
  std::map<std::string, std::vector<float>> weights;
  std::map<std::string, std::vector<int64_t>> shapes;
  std::vector<std::string> keys;
  std::vector<rs_source_value> config;
  std::vector<rs_source_tensor> tensors;
};

// A PNM file (P6) of coloured noise over a slope, which `seed` makes its own.
inline std::string pnm_image(int width, int height, unsigned seed) {
  std::string bytes = "P6\n" + std::to_string(width) + " " + std::to_string(height) + "\n255\n";
  std::mt19937 rng(seed);
  for (int y = 0; y < height; y++)
    for (int x = 0; x < width; x++)
      for (unsigned c = 0; c < 3; c++) {
        const unsigned slope = static_cast<unsigned>(c == 0 ? x * 180 / width : c == 1 ? y * 180 / height : (x + y) * 90 / height);
        bytes += static_cast<char>(slope % 190 + rng() % 64);
      }
  return bytes;
}

// The same pixels as a BMP file of 24 bits.
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
