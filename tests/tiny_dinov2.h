// A small DINOv2 with random weights: for tests that need a whole vision model but no real one.
#pragma once
#include "tiny_source.h"

struct tiny_dinov2 : tiny_source {
  int64_t hidden = 32, layers = 4, heads = 4, ratio = 2, side = 32, patch = 8;
  std::vector<std::string> labels;  // of a head on the class token and the mean of the patches; none: no head

  explicit tiny_dinov2(unsigned seed = 1) : tiny_source(seed) {}

  void fill() override {
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

  void set_metadata(rs_writer *w) const override {
    expect_set({rs_writer_set_str(w, "encode.pooling", "cls"), rs_writer_set_bool(w, "encode.normalize", false)});
    set_image_metadata(w, side, "bicubic", {0.5f, 0.45f, 0.4f}, {0.25f, 0.25f, 0.25f});
  }

 private:
  void set_config() override {
    string("model_type", "dinov2");
    string("architectures.0", labels.empty() ? "Dinov2Model" : "Dinov2ForImageClassification");
    number("hidden_size", hidden), number("num_hidden_layers", layers), number("num_attention_heads", heads);
    number("mlp_ratio", ratio), number("image_size", side), number("patch_size", patch);
    id2label(labels);
  }
};
