// ViT (Dosovitskiy et al., arXiv 2010.11929), DeiT (Touvron et al., arXiv 2012.12877), DINOv2 (Oquab et al., arXiv 2304.07193) and
// its variant with registers (Darcet et al., arXiv 2309.16588): a pre-norm encoder of patches behind a class token.
//
//   x = [class, distillation or registers, W patch + b] + positions;  layers of tower.h;  LN(x)
//
// Tensors of the weight file beside those of tower.h:
//   norm.{weight,bias} [C]
//   classifier.weight [labels,C] of the class token, classifier.distillation.weight of the second token, classifier.mean.weight of
//   the mean of all patches, each where published; classifier.bias [labels]
#include "tower.h"

#include <cmath>
#include <cstring>

using namespace parts;

namespace {

// ---------------------------------------------------------------------------------------- conversion

constexpr layer_names vit_layer = {"layernorm_before",
                                   "attention.attention.query",
                                   "attention.attention.key",
                                   "attention.attention.value",
                                   "attention.output.dense",
                                   "layernorm_after",
                                   "intermediate.dense",
                                   "output.dense",
                                   nullptr,
                                   nullptr};
constexpr layer_names dinov2_layer = {"norm1",
                                      "attention.attention.query",
                                      "attention.attention.key",
                                      "attention.attention.value",
                                      "attention.output.dense",
                                      "norm2",
                                      "mlp.fc1",
                                      "mlp.fc2",
                                      "layer_scale1.lambda1",
                                      "layer_scale2.lambda1"};
constexpr layer_names timm_layer = {"norm1", "attn.qkv", nullptr,   nullptr, "attn.proj",
                                    "norm2", "mlp.fc1",  "mlp.fc2", nullptr, nullptr};

// A side of the images that the position table is for: "image_size" is a number or [height, width].
rs_status config_sides(rs_importer &in, const std::string &key, int64_t otherwise, int64_t *width, int64_t *height) {
  constexpr int64_t most = 65536;
  RS_TRY(in.config_i64((key + ".0").c_str(), height, 1, most, 0));
  if (*height) return in.config_i64((key + ".1").c_str(), width, 1, most);
  RS_TRY(in.config_i64(key.c_str(), width, 1, most, otherwise));
  *height = *width;
  return RS_OK;
}

rs_status convert_grid(rs_importer &in, const std::string &size_key, int64_t size_otherwise, image_settings *image) {
  int64_t width, height, across;
  RS_TRY(config_sides(in, "patch_size", 16, &image->patch, &across));
  if (across != image->patch) return rs_fail(RS_ERR_UNSUPPORTED, "config.json: patches that are not square");
  RS_TRY(config_sides(in, size_key, size_otherwise, &width, &height));
  image->columns = width / image->patch;
  image->rows = height / image->patch;
  return RS_OK;
}

// The rows of the head that are for columns [first, first + C) of what it reads.
rs_status put_columns(rs_importer &in, const std::string &name, const std::vector<float> &all, int64_t labels, int64_t stride,
                      int64_t first, int64_t c, float factor) {
  in.values().resize(static_cast<size_t>(labels * c));
  for (int64_t i = 0; i < labels; i++)
    for (int64_t j = 0; j < c; j++)
      in.values()[static_cast<size_t>(i * c + j)] = factor * all[static_cast<size_t>(i * stride + first + j)];
  return in.put_head(name, labels, c);
}

rs_status convert_head_metadata(rs_importer &in, int64_t labels) {
  const char *activation;
  RS_TRY(convert_labels(in, labels));
  RS_TRY(find_head_activation(in, labels, &activation));
  RS_TRY(rs_writer_set_str(in.writer(), "head.type", rs_head_name(RS_HEAD_SEQUENCE)));
  return rs_writer_set_str(in.writer(), "head.activation", activation);
}

// `classes` on the class token, or on it and the mean of the patches; `distilled` on the distillation token, the mean of both
// counts.
rs_status convert_classifier(rs_importer &in, const tower_settings &s, const std::string &classes, const std::string &distilled) {
  const bool two = !distilled.empty() && in.has(distilled + ".weight");
  const int64_t labels = in.dim(classes + ".weight", 0), k = in.dim(classes + ".weight", 1), c = s.hidden;
  if (labels < 1) return RS_OK;
  if (k != c && k != 2 * c)
    return rs_fail(RS_ERR_UNSUPPORTED, "'%s.weight' reads %lld features, expected %lld (class token) or %lld (and mean of patches)",
                   classes.c_str(), static_cast<long long>(k), static_cast<long long>(c), static_cast<long long>(2 * c));
  const float factor = two ? 0.5f : 1;
  const int64_t shape[] = {labels, k};
  RS_TRY(convert_head_metadata(in, labels));
  RS_TRY(in.read({classes + ".weight"}, 2, shape));
  const std::vector<float> weight = in.values();
  RS_TRY(put_columns(in, "classifier.weight", weight, labels, k, 0, c, factor));
  if (k == 2 * c) RS_TRY(put_columns(in, "classifier.mean.weight", weight, labels, k, c, c, factor));
  RS_TRY(in.read({classes + ".bias"}, 1, &labels));
  std::vector<float> bias = in.values();
  if (two) {
    RS_TRY(in.read({distilled + ".weight"}, 2, shape));
    const std::vector<float> second = in.values();
    RS_TRY(put_columns(in, "classifier.distillation.weight", second, labels, k, 0, c, factor));
    RS_TRY(in.read({distilled + ".bias"}, 1, &labels));
    for (size_t i = 0; i < bias.size(); i++) bias[i] = factor * (bias[i] + in.values()[i]);
  }
  in.values() = std::move(bias);
  return in.put_vector("classifier.bias", labels);
}

rs_status convert_transformers(rs_importer &in, const char *type) {
  const bool dinov2 = !strncmp(type, "dinov2", 6), deit = !strcmp(type, "deit");
  const std::string root = in.has(std::string(type) + ".embeddings.cls_token") ? std::string(type) + "." : "";
  tower_settings s = {};
  s.key = "vit.";
  RS_TRY(in.config_i64("hidden_size", &s.hidden, 1, 65536, 768));
  RS_TRY(in.config_i64("num_hidden_layers", &s.layers, 1, 1024, 12));
  RS_TRY(in.config_i64("num_attention_heads", &s.heads, 1, s.hidden, 12));
  RS_TRY(in.config_str("hidden_act", &s.act_name, "gelu"));
  RS_TRY(in.config_f64("layer_norm_eps", &s.eps, dinov2 ? 1e-6 : 1e-12));
  int64_t channels, ratio;
  RS_TRY(in.config_i64("num_channels", &channels, 1, 65536, 3));
  if (channels != 3)
    return rs_fail(RS_ERR_UNSUPPORTED, "config.json: %lld channels; rs reads RGB", static_cast<long long>(channels));
  RS_TRY(in.config_bool("use_swiglu_ffn", &s.gated, false));
  if (dinov2) {
    RS_TRY(in.config_i64("mlp_ratio", &ratio, 1, 1024, 4));
    s.intermediate = s.hidden * ratio;
    if (s.gated) {
      s.intermediate = (s.intermediate * 2 / 3 + 7) / 8 * 8;
      s.act_name = "silu";
    }
  } else {
    RS_TRY(in.config_i64("intermediate_size", &s.intermediate, 1, 65536, 3072));
  }
  RS_TRY(convert_tower_settings(in, &s));

  image_settings image = {};
  RS_TRY(convert_grid(in, "image_size", 224, &image));
  RS_TRY(in.config_f64("interpolate_offset", &image.offset, 0));
  image.antialias = !strcmp(type, "dinov2_with_registers");
  RS_TRY(in.config_bool("interpolate_antialias", &image.antialias, image.antialias));
  const std::string embeddings = root + "embeddings.";
  image_names names = {
      embeddings + "patch_embeddings.projection", {embeddings + "cls_token"}, 1, embeddings + "position_embeddings"};
  if (deit) names.tokens.push_back(embeddings + "distillation_token"), names.placed = 2;
  if (in.has(embeddings + "register_tokens")) names.tokens.push_back(embeddings + "register_tokens");
  RS_TRY(convert_image_input(in, s, &image, names));
  layer_names layer = dinov2 ? dinov2_layer : vit_layer;
  if (s.gated) layer.up = "mlp.weights_in", layer.down = "mlp.weights_out";
  for (int64_t i = 0; i < s.layers; i++) RS_TRY(convert_layer(in, s, layer, root + "encoder.layer." + std::to_string(i) + ".", i));
  RS_TRY(convert_norm(in, "norm", root + "layernorm", s.hidden));
  in.ignore(embeddings + "mask_token");  // of pre-training
  in.ignore(root + "pooler.");           // not trained in most; the class token's state is what they are used for
  in.ignore("decoder.");                 // of masked image modelling
  const bool teacher = in.has("cls_classifier.weight");
  return convert_classifier(in, s, teacher ? "cls_classifier" : "classifier", teacher ? "distillation_classifier" : "");
}

// How many heads a Vision Transformer of timm has is in no file but in its code: 64 features each, but for the largest.
int64_t timm_heads(int64_t hidden) {
  switch (hidden) {
    case 1152:
    case 1280:
    case 1408:
    case 1664:
      return 16;
    default:
      return hidden % 64 ? 0 : hidden / 64;
  }
}

rs_status convert_timm(rs_importer &in) {
  const char *name, *pool;
  RS_TRY(in.config_str("architecture", &name));
  if (strncmp(name, "vit_", 4) != 0 && strncmp(name, "deit_", 5) != 0)
    return rs_fail(RS_ERR_UNSUPPORTED, "config.json: timm's '%s' is not supported; rs converts vit_… and deit_…", name);
  RS_TRY(in.config_str("global_pool", &pool, "token"));
  if (strcmp(pool, "token") != 0)
    return rs_fail(RS_ERR_UNSUPPORTED, "config.json: 'global_pool' is '%s'; rs supports 'token'", pool);
  tower_settings s = {};
  s.key = "vit.";
  s.eps = 1e-6;
  s.act_name = "gelu";
  s.hidden = in.dim("patch_embed.proj.weight", 0);
  if (s.hidden < 1) return rs_fail(RS_ERR_FORMAT, "tensor 'patch_embed.proj.weight' is missing");
  while (in.has("blocks." + std::to_string(s.layers) + ".norm1.weight")) s.layers++;
  s.intermediate = in.dim("blocks.0.mlp.fc2.weight", 1);
  if (s.intermediate > INT32_MAX) return rs_fail(RS_ERR_FORMAT, "tensor 'blocks.0.mlp.fc2.weight' is too large");
  s.gated = in.dim("blocks.0.mlp.fc1.weight", 0) == 2 * s.intermediate;  // SwiGLU, both halves in one matrix
  if (s.gated) s.act_name = "silu";
  // Another width alone leaves the heads of the architecture that is named.
  int64_t other_width;
  RS_TRY(in.config_i64("model_args.embed_dim", &other_width, 0, INT32_MAX, 0));
  RS_TRY(in.config_i64("model_args.num_heads", &s.heads, 1, s.hidden, other_width ? 0 : timm_heads(s.hidden)));
  if (s.heads < 1)
    return rs_fail(RS_ERR_UNSUPPORTED, "config.json: nothing says how many heads '%s' has (%lld features)", name,
                   static_cast<long long>(s.hidden));
  RS_TRY(convert_tower_settings(in, &s));

  image_settings image = {};
  image.patch = in.dim("patch_embed.proj.weight", 2);
  int64_t height, width;  // [channels, height, width]
  RS_TRY(in.config_i64("pretrained_cfg.input_size.1", &height, 1, 65536));
  RS_TRY(in.config_i64("pretrained_cfg.input_size.2", &width, 1, 65536));
  if (image.patch < 1) return rs_fail(RS_ERR_FORMAT, "'patch_embed.proj.weight' is no convolution");
  image.columns = width / image.patch;
  image.rows = height / image.patch;
  image.antialias = true;
  image_names names = {"patch_embed.proj", {"cls_token"}, 1, "pos_embed"};
  if (in.has("dist_token")) names.tokens.emplace_back("dist_token"), names.placed = 2;
  if (in.has("reg_token")) names.tokens.emplace_back("reg_token");
  if (in.dim("pos_embed", 1) == image.columns * image.rows) names.placed = 0;  // no_embed_class
  RS_TRY(convert_image_input(in, s, &image, names));
  layer_names layer = timm_layer;
  if (in.has("blocks.0.ls1.gamma")) layer.attn_scale = "ls1.gamma", layer.mlp_scale = "ls2.gamma";
  for (int64_t i = 0; i < s.layers; i++) RS_TRY(convert_layer(in, s, layer, "blocks." + std::to_string(i) + ".", i));
  RS_TRY(convert_norm(in, "norm", "norm", s.hidden));
  return convert_classifier(in, s, "head", "head_dist");
}

rs_status vit_inputs(rs_importer &, bool *texts, bool *images) {
  *texts = false, *images = true;
  return RS_OK;
}

rs_status vit_convert(rs_importer &in) {
  const char *type;
  RS_TRY(in.config_str("model_type", &type, "timm"));
  return strncmp(type, "timm", 4) ? convert_transformers(in, type) : convert_timm(in);
}

// ---------------------------------------------------------------------------------------- graph

rs_status read_settings(const rs_model *model, tower_settings *s) {
  s->key = "vit.";
  return read_tower_settings(model, s);
}

rs_status vit_shape(const rs_model *model, rs_model_shape *out) {
  tower_settings s = {};
  image_settings image;
  RS_TRY(read_settings(model, &s));
  RS_TRY(read_image_settings(model, s, &image));
  out->image = {static_cast<int32_t>(s.hidden), static_cast<int32_t>(s.layers), static_cast<int32_t>(s.heads)};
  out->dim = out->image.hidden;
  out->patch = static_cast<int32_t>(image.patch);
  out->prefix = static_cast<int32_t>(image.prefix);
  return RS_OK;
}

rs_status vit_build(const rs_model *model, rs_graph *g, rs_tower, int layers, const rs_drop_schedule *drop,
                    const rs_image_grid *grid, rs_states *out) {
  tower_settings s = {};
  RS_TRY(read_settings(model, &s));
  rs_tensor *cu_seqlens = nullptr, *x = nullptr;
  RS_TRY(build_image_input(model, g, s, *grid, &x, &cu_seqlens));
  x = rs_name(g, x, "embeddings");
  rs_dropper dropper(g, drop, cu_seqlens);
  *out = dropper.finish(build_layers(g, s, x, layers, &dropper));
  if (layers == s.layers) out->x = norm(g, out->x, nullptr, "norm", s.hidden, s.eps, "norm");
  return RS_OK;
}

rs_status vit_head(const rs_model *model, rs_graph *g, rs_head head, int64_t labels, const rs_states &states, rs_tensor **out) {
  tower_settings s = {};
  image_settings image;
  RS_TRY(read_settings(model, &s));
  RS_TRY(read_image_settings(model, s, &image));
  if (head != RS_HEAD_SEQUENCE) return rs_fail(RS_ERR_UNSUPPORTED, "a head of %s on images", rs_head_name(head));
  const auto pooled = [&](rs_pooling pooling, int64_t skip, const char *name) {
    return rs_name(g, rs_pool(g, states.x, states.cu_seqlens, states.sizes, pooling, static_cast<int>(skip)), name);
  };
  *out = linear(g, pooled(RS_POOL_CLS, 0, "head.class"), "classifier", labels, s.hidden);
  const auto add = [&](rs_tensor *x, const std::string &name) {
    rs_tensor *y = rs_linear(g, x, weight2(g, name + ".weight", labels, s.hidden), nullptr, RS_ACT_NONE);
    *out = rs_add(g, *out, rs_name(g, y, name.c_str()));
  };
  if (has_weight(model, "classifier.distillation.weight"))
    add(pooled(RS_POOL_CLS, 1, "head.distillation"), "classifier.distillation");
  if (has_weight(model, "classifier.mean.weight")) add(pooled(RS_POOL_MEAN, image.prefix, "head.mean"), "classifier.mean");
  return RS_OK;
}

rs_status vit_image_rows(const rs_model *model, int32_t columns, int32_t rows, float *added) {
  tower_settings s = {};
  RS_TRY(read_settings(model, &s));
  return image_rows(model, s, columns, rows, added);
}

// Worse than chance on DINOv2: what the MLP changes, whatever the sign, and what matters least by any other score.
const char *vit_drop_warning(const rs_drop_schedule &drop) {
  for (const rs_drop_schedule::layer &l : drop.layers)
    for (const rs_score_term &t : l.score)
      if (l.drops && (t.source == rs_score_source::mlp || (t.weight < 0 && t.source < rs_score_source::random)))
        return "such a score did worse than chance in a vision transformer: with half of the patches dropped behind layer 5, "
               "cifar10-dinov2-s lost 10.4 points of accuracy by 'mlp', 11.2 by '-mlp', 22.5 by '-attention', but 4.4 by 'random' "
               "and 1.1 by 'attn-colsum'";
  return nullptr;
}

const char *const types[] = {"vit", "deit", "dinov2", "dinov2_with_registers", "timm", "timm_wrapper", nullptr};
const char *const architectures[] = {"ViTModel",
                                     "ViTForImageClassification",
                                     "ViTForMaskedImageModeling",
                                     "DeiTModel",
                                     "DeiTForImageClassification",
                                     "DeiTForImageClassificationWithTeacher",
                                     "DeiTForMaskedImageModeling",
                                     "Dinov2Model",
                                     "Dinov2ForImageClassification",
                                     "Dinov2WithRegistersModel",
                                     "Dinov2WithRegistersForImageClassification",
                                     "TimmWrapperModel",
                                     "TimmWrapperForImageClassification",
                                     nullptr};

}  // namespace

extern const rs_family rs_family_vit;
const rs_family rs_family_vit = {"vit",       types,          architectures, vit_inputs,
                                 vit_convert, vit_shape,      vit_build,     vit_drop_warning,
                                 vit_head,    vit_image_rows, nullptr};
