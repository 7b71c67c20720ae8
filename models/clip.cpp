// CLIP (Radford et al., arXiv 2103.00020) and the image half of SigLIP (Zhai et al., arXiv 2303.15343): towers for images and texts
// whose embeddings are comparable by cosine.
//
//   CLIP, image:   x = LN([class, W patch] + positions);  layers of tower.h;  embedding = P LN(class)
//   CLIP, text:    x = word + position;  causal layers;  LN;  embedding = P (state of the last token)
//   SigLIP, image: x = W patch + b + positions;  layers;  LN;  z = attention of a learned query;  embedding = z + MLP(LN(z))
//
// Tensors of the weight file beside those of tower.h, under "image." and "text.":
//   image.embeddings.norm.{weight,bias}, image.norm, image.projection.weight [dim,C]
//   text.token.weight [V,C], text.position.weight [P,C], text.norm, text.projection.weight [dim,C]
//   image.pool.query [C]: Wq probe + bq;  image.pool.kv.{weight [2C,C], bias}, .out, .norm, .up, .down
#include "tower.h"

#include <cfloat>
#include <cmath>
#include <cstring>

using namespace parts;

namespace {

// ---------------------------------------------------------------------------------------- conversion

constexpr layer_names clip_layer = {"layer_norm1",
                                    "self_attn.q_proj",
                                    "self_attn.k_proj",
                                    "self_attn.v_proj",
                                    "self_attn.out_proj",
                                    "layer_norm2",
                                    "mlp.fc1",
                                    "mlp.fc2",
                                    nullptr,
                                    nullptr};

struct defaults {  // of the reference's configuration classes, which published files leave out
  int64_t hidden, intermediate, heads, image, patch;
  const char *act;
  double eps;
};
constexpr defaults clip_image = {768, 3072, 12, 224, 32, "quick_gelu", 1e-5}, clip_text = {512, 2048, 8, 0, 0, "quick_gelu", 1e-5},
                   siglip_image = {768, 3072, 12, 224, 16, "gelu_pytorch_tanh", 1e-6};

// at: where the tower's settings are in config.json: "vision_config.", or "" of a tower that was published alone.
rs_status convert_settings(rs_importer &in, const std::string &at, const defaults &d, tower_settings *s) {
  RS_TRY(in.config_i64((at + "hidden_size").c_str(), &s->hidden, 1, 65536, d.hidden));
  RS_TRY(in.config_i64((at + "intermediate_size").c_str(), &s->intermediate, 1, 65536, d.intermediate));
  RS_TRY(in.config_i64((at + "num_hidden_layers").c_str(), &s->layers, 1, 1024, 12));
  RS_TRY(in.config_i64((at + "num_attention_heads").c_str(), &s->heads, 1, s->hidden, d.heads));
  RS_TRY(in.config_f64((at + "layer_norm_eps").c_str(), &s->eps, d.eps));
  RS_TRY(in.config_str((at + "hidden_act").c_str(), &s->act_name, d.act));
  return convert_tower_settings(in, s);
}

rs_status convert_layers(rs_importer &in, const tower_settings &s, const std::string &root) {
  for (int64_t i = 0; i < s.layers; i++)
    RS_TRY(convert_layer(in, s, clip_layer, root + "encoder.layers." + std::to_string(i) + ".", i));
  return RS_OK;
}

// The learned query of SigLIP's pooling, as what its projection makes of it.
rs_status convert_attention_pool(rs_importer &in, const tower_settings &s, const std::string &from) {
  const int64_t c = s.hidden, rows = 3 * c, matrix[] = {rows, c}, probe_shape[] = {1, 1, c};
  const auto n = static_cast<size_t>(c);
  RS_TRY(in.read({from + "probe"}, 3, probe_shape));
  const std::vector<float> probe = in.values();
  RS_TRY(in.read({from + "attention.in_proj_bias"}, 1, &rows));
  const std::vector<float> bias = in.values();
  RS_TRY(in.read({from + "attention.in_proj_weight"}, 2, matrix));
  std::vector<float> weight = in.values(), query(n);
  for (size_t i = 0; i < n; i++) {
    double sum = bias[i];
    for (size_t j = 0; j < n; j++) sum += static_cast<double>(weight[i * n + j]) * probe[j];
    query[i] = static_cast<float>(sum);
  }
  in.values() = query;
  RS_TRY(in.put_vector("image.pool.query", c));
  in.values().assign(weight.begin() + static_cast<std::ptrdiff_t>(n * n), weight.end());
  RS_TRY(in.put_linear("image.pool.kv.weight", 2 * c, c));
  in.values().assign(bias.begin() + static_cast<std::ptrdiff_t>(n), bias.end());
  RS_TRY(in.put_vector("image.pool.kv.bias", 2 * c));
  RS_TRY(in.head("image.pool.out.weight", from + "attention.out_proj.weight", c, c));
  RS_TRY(in.vector("image.pool.out.bias", {from + "attention.out_proj.bias"}, c));
  RS_TRY(convert_norm(in, "image.pool.norm", from + "layernorm", c));
  RS_TRY(in.head("image.pool.up.weight", from + "mlp.fc1.weight", s.intermediate, c));
  RS_TRY(in.vector("image.pool.up.bias", {from + "mlp.fc1.bias"}, s.intermediate));
  RS_TRY(in.head("image.pool.down.weight", from + "mlp.fc2.weight", c, s.intermediate));
  return in.vector("image.pool.down.bias", {from + "mlp.fc2.bias"}, c);
}

rs_status convert_image_tower(rs_importer &in, bool siglip, const std::string &config, int64_t dim) {
  const defaults &d = siglip ? siglip_image : clip_image;
  tower_settings s = {};
  s.at = "image.", s.key = "clip.image.";
  RS_TRY(convert_settings(in, config, d, &s));
  image_settings image = {};
  int64_t size, channels;
  RS_TRY(in.config_i64((config + "image_size").c_str(), &size, 1, 65536, d.image));
  RS_TRY(in.config_i64((config + "patch_size").c_str(), &image.patch, 1, 65536, d.patch));
  RS_TRY(in.config_i64((config + "num_channels").c_str(), &channels, 1, 65536, 3));
  if (channels != 3)
    return rs_fail(RS_ERR_UNSUPPORTED, "config.json: %lld channels; rs reads RGB", static_cast<long long>(channels));
  image.columns = image.rows = size / image.patch;
  const std::string root = "vision_model.", embeddings = root + "embeddings.";
  image_names names = {embeddings + "patch_embedding", {}, 0, embeddings + "position_embedding.weight"};
  if (!siglip) names.tokens.push_back(embeddings + "class_embedding"), names.placed = 1;
  RS_TRY(convert_image_input(in, s, &image, names));
  in.ignore(embeddings + "position_ids");  // 0, 1, 2 …
  RS_TRY(convert_layers(in, s, root));
  RS_TRY(convert_norm(in, "image.norm", root + "post_layernorm", s.hidden));
  if (siglip) return convert_attention_pool(in, s, root + "head.");
  RS_TRY(convert_norm(in, "image.embeddings.norm", root + "pre_layrnorm", s.hidden));
  return in.head("image.projection.weight", "visual_projection.weight", dim, s.hidden);
}

rs_status convert_text_tower(rs_importer &in, const std::string &config, int64_t dim) {
  tower_settings s = {};
  s.at = "text.", s.key = "clip.text.", s.causal = true;
  RS_TRY(convert_settings(in, config, clip_text, &s));
  int64_t vocab, positions;
  RS_TRY(in.config_i64((config + "vocab_size").c_str(), &vocab, 1, INT32_MAX, 49408));
  RS_TRY(in.config_i64((config + "max_position_embeddings").c_str(), &positions, 1, INT32_MAX, 77));
  RS_TRY(rs_writer_set_i64(in.writer(), "clip.text.vocab_size", vocab));
  RS_TRY(rs_writer_set_i64(in.writer(), "clip.text.max_positions", positions));
  const std::string root = "text_model.", embeddings = root + "embeddings.";
  in.ignore(embeddings + "position_ids");
  RS_TRY(convert_layers(in, s, root));
  RS_TRY(convert_norm(in, "text.norm", root + "final_layer_norm", s.hidden));
  RS_TRY(in.head("text.projection.weight", "text_projection.weight", dim, s.hidden));
  RS_TRY(in.table("text.position.weight", embeddings + "position_embedding.weight", positions, s.hidden, false));
  return in.table("text.token.weight", embeddings + "token_embedding.weight", vocab, s.hidden, true);  // last: touched row by row
}

// A single number; exp is what the reference takes of a logit scale.
rs_status convert_number(rs_importer &in, const char *name, bool exponent, double *out) {
  if (!in.has(name)) return RS_OK;
  const int64_t one = 1;
  RS_TRY(in.read({name}, 1, &one));
  *out = exponent ? std::exp(static_cast<double>(in.values()[0])) : in.values()[0];
  return RS_OK;
}

rs_status clip_inputs(rs_importer &in, bool *texts, bool *images) {
  const char *type;
  RS_TRY(in.config_str("model_type", &type));
  *images = in.has("vision_model.embeddings.patch_embedding.weight");
  // Tokens of SigLIP are made by SentencePiece, which is not read.
  *texts = in.has("text_model.embeddings.token_embedding.weight") && strncmp(type, "siglip", 6) != 0;
  return *images || *texts ? RS_OK : rs_fail(RS_ERR_FORMAT, "tensor 'vision_model.embeddings.patch_embedding.weight' is missing");
}

rs_status clip_convert(rs_importer &in) {
  const char *type;
  RS_TRY(in.config_str("model_type", &type));
  const bool siglip = !strncmp(type, "siglip", 6), whole = !strcmp(type, "clip") || !strcmp(type, "siglip");
  bool image, text;
  RS_TRY(clip_inputs(in, &text, &image));
  rs_writer *w = in.writer();
  double scale = 0, bias = 0;
  RS_TRY(convert_number(in, "logit_scale", true, &scale));
  RS_TRY(convert_number(in, "logit_bias", false, &bias));
  RS_TRY(rs_writer_set_f64(w, "clip.logit_scale", scale));
  RS_TRY(rs_writer_set_f64(w, "clip.logit_bias", bias));
  RS_TRY(rs_writer_set_bool(w, "clip.image_tower", image));
  RS_TRY(rs_writer_set_bool(w, "clip.text_tower", text));
  int64_t dim;
  RS_TRY(in.config_i64("projection_dim", &dim, 1, 65536, 512));
  if (siglip) dim = in.dim("vision_model.embeddings.patch_embedding.weight", 0);
  RS_TRY(rs_writer_set_i64(w, "clip.projection_dim", dim));
  if (siglip) in.ignore("text_model.");  // clip_inputs
  if (image) RS_TRY(convert_image_tower(in, siglip, whole ? "vision_config." : "", dim));
  return text ? convert_text_tower(in, whole ? "text_config." : "", dim) : RS_OK;
}

// ---------------------------------------------------------------------------------------- graph

rs_status read_settings(const rs_model *model, rs_tower tower, tower_settings *s) {
  s->at = tower == rs_tower::image ? "image." : "text.";
  s->key = "clip." + s->at;
  return read_tower_settings(model, s);
}

rs_tower_shape shape_of(const tower_settings &s) {
  return {static_cast<int32_t>(s.hidden), static_cast<int32_t>(s.layers), static_cast<int32_t>(s.heads)};
}

rs_status clip_shape(const rs_model *model, rs_model_shape *out) {
  bool image, text;
  int64_t dim, vocab, positions;
  double scale, bias;
  RS_TRY(read_bool(model, "clip.image_tower", &image));
  RS_TRY(read_bool(model, "clip.text_tower", &text));
  RS_TRY(read_i64(model, "clip.projection_dim", 1, 65536, &dim));
  RS_TRY(read_f64(model, "clip.logit_scale", &scale));
  RS_TRY(read_f64(model, "clip.logit_bias", &bias));
  if (!(std::fabs(scale) <= FLT_MAX && std::fabs(bias) <= FLT_MAX))
    return rs_fail(RS_ERR_FORMAT, "clip.logit_scale %g, clip.logit_bias %g: no finite floats", scale, bias);
  out->dim = static_cast<int32_t>(dim);
  out->logit_scale = static_cast<float>(scale);
  out->logit_bias = static_cast<float>(bias);
  if (!image && !text) return rs_fail(RS_ERR_FORMAT, "neither clip.image_tower nor clip.text_tower");
  if (text) {
    tower_settings s = {};
    RS_TRY(read_settings(model, rs_tower::text, &s));
    RS_TRY(read_i64(model, "clip.text.vocab_size", 1, INT32_MAX, &vocab));
    RS_TRY(read_i64(model, "clip.text.max_positions", 1, INT32_MAX, &positions));
    out->text = shape_of(s);
    out->vocab = static_cast<int32_t>(vocab);
    out->positions = static_cast<int32_t>(positions);
  }
  if (image) {
    tower_settings s = {};
    image_settings settings;
    RS_TRY(read_settings(model, rs_tower::image, &s));
    RS_TRY(read_image_settings(model, s, &settings));
    out->image = shape_of(s);
    out->patch = static_cast<int32_t>(settings.patch);
    out->prefix = static_cast<int32_t>(settings.prefix);
  }
  return RS_OK;
}

rs_status build_text(const rs_model *model, rs_graph *g, const tower_settings &s, int layers, rs_states *out) {
  rs_model_shape shape;
  RS_TRY(clip_shape(model, &shape));
  const int64_t tokens = RS_DIM_TOKENS, starts = RS_DIM_CU_SEQLENS;
  rs_tensor *ids = rs_input(g, "ids", RS_I32, 1, &tokens);
  rs_tensor *positions = rs_input(g, "positions", RS_I32, 1, &tokens);
  rs_tensor *cu_seqlens = rs_input(g, "cu_seqlens", RS_I32, 1, &starts);
  rs_tensor *word = rs_embed(g, ids, weight2(g, "text.token.weight", shape.vocab, s.hidden));
  rs_tensor *position = rs_embed(g, positions, weight2(g, "text.position.weight", shape.positions, s.hidden));
  rs_tensor *x = rs_name(g, rs_add(g, word, position), "embeddings");
  rs_dropper dropper(g, nullptr, cu_seqlens);
  *out = dropper.finish(build_layers(g, s, x, layers, &dropper));
  if (layers == s.layers) out->x = norm(g, out->x, nullptr, "text.norm", s.hidden, s.eps, "norm");
  return RS_OK;
}

rs_status clip_build(const rs_model *model, rs_graph *g, rs_tower tower, int layers, const rs_drop_schedule *drop,
                     const rs_image_grid *grid, rs_states *out) {
  tower_settings s = {};
  RS_TRY(read_settings(model, tower, &s));
  if (tower == rs_tower::text) return build_text(model, g, s, layers, out);
  rs_tensor *cu_seqlens = nullptr, *x = nullptr;
  RS_TRY(build_image_input(model, g, s, *grid, &x, &cu_seqlens));
  const bool siglip = has_weight(model, "image.pool.query");
  x = siglip ? rs_name(g, x, "embeddings")
             : norm(g, rs_name(g, x, "embeddings.sum"), nullptr, "image.embeddings.norm", s.hidden, s.eps, "embeddings");
  rs_dropper dropper(g, drop, cu_seqlens);
  *out = dropper.finish(build_layers(g, s, x, layers, &dropper));
  if (siglip && layers == s.layers) out->x = norm(g, out->x, nullptr, "image.norm", s.hidden, s.eps, "norm");
  return RS_OK;
}

rs_tensor *project(rs_graph *g, rs_tensor *x, const std::string &name, int64_t dim, int64_t c) {
  return rs_name(g, rs_linear(g, x, weight2(g, name + ".weight", dim, c), nullptr, RS_ACT_NONE), name.c_str());
}

rs_tensor *pool_by_attention(rs_graph *g, const tower_settings &s, const rs_states &states) {
  const int64_t c = s.hidden, head_size = c / s.heads;
  rs_tensor *kv = linear(g, states.x, "image.pool.kv", 2 * c, c);
  const auto scale = static_cast<float>(1 / std::sqrt(static_cast<double>(head_size)));
  rs_tensor *mixed = rs_attn_pool(g, weight1(g, "image.pool.query", c), rs_columns(g, kv, 0, c), rs_columns(g, kv, c, c),
                                  states.cu_seqlens, states.sizes, static_cast<int>(s.heads), scale);
  rs_tensor *z = linear(g, rs_name(g, mixed, "image.pool"), "image.pool.out", c, c);
  rs_tensor *up = norm(g, z, nullptr, "image.pool.norm", c, s.eps, "image.pool.norm");
  up = linear(g, up, "image.pool.up", s.intermediate, c, s.act);
  return rs_add(g, z, linear(g, up, "image.pool.down", c, s.intermediate));
}

rs_tensor *clip_embed(const rs_model *model, rs_graph *g, rs_tower tower, const rs_states &states) {
  tower_settings s = {};
  rs_model_shape shape;
  if (read_settings(model, tower, &s) != RS_OK || clip_shape(model, &shape) != RS_OK) return nullptr;
  if (tower == rs_tower::text) {
    rs_tensor *last = rs_pool(g, states.x, states.cu_seqlens, states.sizes, RS_POOL_LAST, 0);
    return project(g, rs_name(g, last, "last"), "text.projection", shape.dim, s.hidden);
  }
  if (has_weight(model, "image.pool.query")) return pool_by_attention(g, s, states);
  rs_tensor *first = rs_name(g, rs_pool(g, states.x, states.cu_seqlens, states.sizes, RS_POOL_CLS, 0), "class");
  return project(g, norm(g, first, nullptr, "image.norm", s.hidden, s.eps, "norm"), "image.projection", shape.dim, s.hidden);
}

rs_status clip_head(const rs_model *, rs_graph *, rs_head head, int64_t, const rs_states &, rs_tensor **) {
  return rs_fail(RS_ERR_UNSUPPORTED, "a head of %s on a model that compares images with texts", rs_head_name(head));
}

rs_status clip_image_rows(const rs_model *model, int32_t columns, int32_t rows, float *added) {
  tower_settings s = {};
  RS_TRY(read_settings(model, rs_tower::image, &s));
  return image_rows(model, s, columns, rows, added);
}

const char *const types[] = {"clip", "clip_vision_model", "clip_text_model", "siglip", "siglip_vision_model", nullptr};
const char *const architectures[] = {
    "CLIPModel", "CLIPVisionModelWithProjection", "CLIPTextModelWithProjection", "SiglipModel", "SiglipVisionModel", nullptr};

}  // namespace

extern const rs_family rs_family_clip;
const rs_family rs_family_clip = {"clip",     types,   architectures, clip_inputs,     clip_convert, clip_shape,
                                  clip_build, nullptr, clip_head,     clip_image_rows, clip_embed};
