// A small ViT, and a small CLIP, with random weights.
#pragma once
#include "tiny_bert.h"

struct tiny_vit : tiny_source {
  int64_t hidden = 32, layers = 3, heads = 4, intermediate = 64, patch = 4, size = 24;
  std::vector<std::string> labels;  // of a head on top
  std::string problem_type;         // of that head
  bool clip = false;                // with a tower for texts, in the words of tiny_bert
  float logit_scale = 2, logit_bias = 0;
  std::string profile;  // a schedule that is stored by the name "fast"

  explicit tiny_vit(unsigned seed = 7) : tiny_source(seed) { words.positions = positions; }
  int64_t prefix() const { return 1; }
  int64_t patches() const { return (size / patch) * (size / patch); }
  int64_t tokens() const { return prefix() + patches(); }
  static constexpr int64_t text_hidden = 48, projection = 16, positions = 40;

  void fill() override { clip ? fill_clip() : fill_vit(); }

  void set_metadata(rs_writer *w) const override {
    if (clip) words.set_metadata(w);
    else expect_set({rs_writer_set_str(w, "encode.pooling", "cls"), rs_writer_set_bool(w, "encode.normalize", false)});
    expect_set({rs_writer_set_str(w, "general.name", "tiny")});
    set_image_metadata(w, size, "bilinear", {0.5f, 0.4f, 0.3f}, {0.25f, 0.3f, 0.35f});
    if (profile.empty()) return;
    const rs_text name = {"fast", 4}, text = {profile.data(), profile.size()}, note = {"", 0};
    expect_set({rs_writer_set_strs(w, "drop.names", &name, 1), rs_writer_set_strs(w, "drop.texts", &text, 1),
                rs_writer_set_strs(w, "drop.notes", &note, 1)});
  }

 private:
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

  void set_config() override {
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
      id2label(labels);
      if (!problem_type.empty()) string("problem_type", problem_type);
    }
  }

  tiny_bert words;
};
