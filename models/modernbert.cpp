// ModernBERT (Warner et al., arXiv 2412.13663): a pre-norm encoder with rotary positions, of which most layers see a window of
// tokens.
//
//   x = LN(word[id]);  layers of tower.h, gated, the first without a norm before attention;  LN(x)
//
// Tensors of the weight file beside those of tower.h:
//   token.weight [V,C]  embeddings.norm.{weight,bias} [C]  norm.{weight,bias} [C]
//   rope.frequencies [D/2]  rope.window.frequencies [D/2]   of layers that see everywhere, and of those that see a window
//   classifier.dense.{weight [C,C], bias}  classifier.norm.{weight,bias}  classifier.{weight [labels,C], bias}  of a head: labels
//   of a text by the state of its first token or the mean of all, of each token by its own, or how much each begins and ends an
//   answer
#include "tower.h"

#include <algorithm>
#include <cmath>
#include <cstring>

using namespace parts;

namespace {

constexpr int64_t most_window = INT32_MAX;

// ---------------------------------------------------------------------------------------- conversion

constexpr layer_names modernbert_layer = {"attn_norm", "attn.Wqkv", nullptr, nullptr, "attn.Wo", "mlp_norm",
                                          "mlp.Wi",    "mlp.Wo",    nullptr, nullptr, false};

// How far each layer sees, 0 being everywhere.
rs_status convert_windows(rs_importer &in, tower_settings *s) {
  int64_t both_sides, every;
  const char *type;
  RS_TRY(in.config_i64("local_attention", &both_sides, 2, most_window, 128));
  RS_TRY(in.config_i64("global_attn_every_n_layers", &every, 1, most_window, 3));
  RS_TRY(in.config_str("layer_types.0", &type, nullptr));
  const bool listed = type != nullptr;
  for (int64_t i = 0; i < s->layers; i++) {
    bool everywhere = i % every == 0;
    if (listed) {
      const std::string key = "layer_types." + std::to_string(i);
      RS_TRY(in.config_str(key.c_str(), &type));
      everywhere = !strcmp(type, "full_attention");
      if (!everywhere && strcmp(type, "sliding_attention") != 0)
        return rs_fail(RS_ERR_UNSUPPORTED, "config.json: '%s' is '%s'; rs supports 'full_attention' and 'sliding_attention'",
                       key.c_str(), type);
    }
    s->windows.push_back(everywhere ? 0 : both_sides / 2);
  }
  RS_TRY(in.config_str(("layer_types." + std::to_string(s->layers)).c_str(), &type, nullptr));
  if (type)
    return rs_fail(RS_ERR_FORMAT, "config.json: 'layer_types' is of more than %lld layers", static_cast<long long>(s->layers));
  return rs_writer_set_i64s(in.writer(), "modernbert.windows", s->windows.data(), s->windows.size());
}

// theta^(-2i / D), in f32 as the reference has it.  kind: of the layers; key: what older files call their theta.
rs_status convert_frequencies(rs_importer &in, const tower_settings &s, const char *to, const std::string &kind, const char *key,
                              double otherwise) {
  const std::string parameters = "rope_parameters." + kind + ".";
  double theta;
  RS_TRY(in.config_must_be((parameters + "rope_type").c_str(), "default"));
  RS_TRY(in.config_f64(key, &theta, otherwise));
  RS_TRY(in.config_f64((parameters + "rope_theta").c_str(), &theta, theta));
  if (!(theta >= 1e-30 && theta < 1e30))  // beyond, a float of it or of its inverse is 0 or infinite
    return rs_fail(RS_ERR_FORMAT, "config.json: theta of rotary positions in layers of '%s' is %g, expected a positive number",
                   kind.c_str(), theta);
  const int64_t d = s.hidden / s.heads;
  in.values().clear();
  for (int64_t i = 0; i < d; i += 2)
    in.values().push_back(1 / static_cast<float>(std::pow(theta, static_cast<float>(i) / static_cast<float>(d))));
  return in.put_vector(to, d / 2);
}

// The head, where there is one; what was pre-trained with, else.
rs_status convert_head(rs_importer &in, const tower_settings &s) {
  if (!in.has("classifier.weight")) {
    in.ignore("head.");
    in.ignore("decoder.");
    return RS_OK;
  }
  const char *architecture, *pooling, *act_name, *activation = "softmax";
  RS_TRY(in.config_str("architectures.0", &architecture, ""));
  const rs_head head = !strcmp(architecture, "ModernBertForTokenClassification") ? RS_HEAD_TOKENS
                       : !strcmp(architecture, "ModernBertForQuestionAnswering") ? RS_HEAD_SPANS
                                                                                 : RS_HEAD_SEQUENCE;
  const int64_t labels = in.dim("classifier.weight", 0), c = s.hidden;
  rs_writer *w = in.writer();
  rs_activation act;
  RS_TRY(in.config_str("classifier_activation", &act_name, "gelu"));
  RS_TRY(find_activation(act_name, &act));
  RS_TRY(rs_writer_set_str(w, "modernbert.classifier_act", act_name));
  RS_TRY(in.config_str("classifier_pooling", &pooling, "cls"));
  if (strcmp(pooling, "cls") != 0 && strcmp(pooling, "mean") != 0)
    return rs_fail(RS_ERR_UNSUPPORTED, "config.json: 'classifier_pooling' is '%s'; rs supports 'cls' and 'mean'", pooling);
  RS_TRY(rs_writer_set_bool(w, "modernbert.classifier_mean", !strcmp(pooling, "mean")));
  if (head == RS_HEAD_SPANS) {
    const rs_text names[] = {{"start", RS_NUL_TERMINATED}, {"end", RS_NUL_TERMINATED}};
    if (labels != 2)
      return rs_fail(RS_ERR_FORMAT, "'classifier.weight' has %lld rows, of answers 2: where they begin and end",
                     static_cast<long long>(labels));
    RS_TRY(rs_writer_set_strs(w, "head.labels", names, 2));
  } else {
    RS_TRY(convert_labels(in, labels));
    if (head == RS_HEAD_SEQUENCE) RS_TRY(find_head_activation(in, labels, &activation));
  }
  RS_TRY(rs_writer_set_str(w, "head.type", rs_head_name(head)));
  RS_TRY(rs_writer_set_str(w, "head.activation", activation));
  if (head == RS_HEAD_SEQUENCE) {
    RS_TRY(in.head("classifier.dense.weight", "head.dense.weight", c, c));
    RS_TRY(convert_bias(in, "classifier.dense", "head.dense", c, false));
  } else {
    RS_TRY(convert_linear(in, "classifier.dense", "head.dense", c, c, false));  // runs for every token
  }
  RS_TRY(convert_norm(in, "classifier.norm", "head.norm", c, false));
  RS_TRY(in.head("classifier.weight", "classifier.weight", labels, c));
  return in.vector("classifier.bias", {"classifier.bias"}, labels);
}

rs_status modernbert_inputs(rs_importer &, bool *texts, bool *images) {
  *texts = true, *images = false;
  return RS_OK;
}

rs_status modernbert_convert(rs_importer &in) {
  tower_settings s = {};
  s.key = "modernbert.", s.gated = s.normed_input = true;
  int64_t vocab, positions, head_size;
  RS_TRY(in.config_i64("hidden_size", &s.hidden, 1, 65536, 768));
  RS_TRY(in.config_i64("intermediate_size", &s.intermediate, 1, 65536, 1152));
  RS_TRY(in.config_i64("num_hidden_layers", &s.layers, 1, 1024, 22));
  RS_TRY(in.config_i64("num_attention_heads", &s.heads, 1, s.hidden, 12));
  RS_TRY(in.config_i64("vocab_size", &vocab, 1, INT32_MAX, 50368));
  RS_TRY(in.config_i64("max_position_embeddings", &positions, 1, INT32_MAX, 8192));
  RS_TRY(in.config_f64("norm_eps", &s.eps, 1e-5));
  RS_TRY(in.config_str("hidden_activation", &s.act_name, "gelu"));
  RS_TRY(convert_tower_settings(in, &s));
  RS_TRY(in.config_i64("head_dim", &head_size, 1, 65536, s.hidden / s.heads));
  if (head_size % 2 || head_size != s.hidden / s.heads)
    return rs_fail(RS_ERR_UNSUPPORTED, "config.json: heads of %lld columns; rs supports an even %lld / %lld",
                   static_cast<long long>(head_size), static_cast<long long>(s.hidden), static_cast<long long>(s.heads));
  RS_TRY(rs_writer_set_i64(in.writer(), "modernbert.vocab_size", vocab));
  RS_TRY(rs_writer_set_i64(in.writer(), "modernbert.max_positions", positions));
  RS_TRY(convert_windows(in, &s));
  RS_TRY(in.config_must_be("rope_scaling.rope_type", "default"));
  RS_TRY(in.config_must_be("rope_scaling.type", "default"));
  RS_TRY(convert_frequencies(in, s, "rope.frequencies", "full_attention", "global_rope_theta", 160000));
  RS_TRY(convert_frequencies(in, s, "rope.window.frequencies", "sliding_attention", "local_rope_theta", 10000));

  // Published from the bare model, or with a head on top, which puts a prefix in front.
  const std::string root = in.has("model.embeddings.tok_embeddings.weight") ? "model." : "";
  RS_TRY(convert_norm(in, "embeddings.norm", root + "embeddings.norm", s.hidden, false));
  for (int64_t i = 0; i < s.layers; i++)
    RS_TRY(convert_layer(in, s, modernbert_layer, root + "layers." + std::to_string(i) + ".", i));
  RS_TRY(convert_norm(in, "norm", root + "final_norm", s.hidden, false));
  RS_TRY(convert_head(in, s));
  return in.table("token.weight", root + "embeddings.tok_embeddings.weight", vocab, s.hidden, true);  // last: touched row by row
}

// ---------------------------------------------------------------------------------------- graph

rs_status read_settings(const rs_model *model, tower_settings *s) {
  s->key = "modernbert.", s->normed_input = true;
  RS_TRY(read_tower_settings(model, s));
  if (s->causal) return rs_fail(RS_ERR_FORMAT, "metadata 'modernbert.causal' is true: windows see both sides");
  rs_meta windows;
  RS_TRY(rs_model_meta(model, "modernbert.windows", &windows));
  if (windows.kind != RS_META_I64S || windows.count != static_cast<size_t>(s->layers))
    return rs_fail(RS_ERR_FORMAT, "metadata 'modernbert.windows' is not a list of %lld integers",
                   static_cast<long long>(s->layers));
  s->windows.assign(windows.i64s, windows.i64s + windows.count);
  for (const int64_t window : s->windows)
    if (window < 0 || window > most_window)
      return rs_fail(RS_ERR_FORMAT, "metadata 'modernbert.windows' has %lld, expected 0 to %lld", static_cast<long long>(window),
                     static_cast<long long>(most_window));
  if (s->hidden % (2 * s->heads))
    return rs_fail(RS_ERR_FORMAT, "%lld columns in %lld heads: rotary positions turn an even number of columns",
                   static_cast<long long>(s->hidden), static_cast<long long>(s->heads));
  return RS_OK;
}

rs_status modernbert_shape(const rs_model *model, rs_model_shape *out) {
  tower_settings s = {};
  int64_t vocab, positions;
  RS_TRY(read_settings(model, &s));
  RS_TRY(read_i64(model, "modernbert.vocab_size", 1, INT32_MAX, &vocab));
  RS_TRY(read_i64(model, "modernbert.max_positions", 1, INT32_MAX, &positions));
  out->text = {static_cast<int32_t>(s.hidden), static_cast<int32_t>(s.layers), static_cast<int32_t>(s.heads)};
  out->dim = out->text.hidden;
  out->drops_texts = true;
  out->vocab = static_cast<int32_t>(vocab);
  out->positions = static_cast<int32_t>(positions);
  return RS_OK;
}

rs_status modernbert_build(const rs_model *model, rs_graph *g, rs_tower, int layers, const rs_drop_schedule *drop,
                           const rs_image_grid *, rs_states *out) {
  tower_settings s = {};
  rs_model_shape shape;
  RS_TRY(read_settings(model, &s));
  RS_TRY(modernbert_shape(model, &shape));
  const int64_t tokens = RS_DIM_TOKENS, starts = RS_DIM_CU_SEQLENS, half = s.hidden / s.heads / 2;
  rs_tensor *ids = rs_input(g, "ids", RS_I32, 1, &tokens);
  rs_tensor *positions = rs_input(g, "positions", RS_I32, 1, &tokens);
  rs_tensor *cu_seqlens = rs_input(g, "cu_seqlens", RS_I32, 1, &starts);
  rs_tensor *word = rs_embed(g, ids, weight2(g, "token.weight", shape.vocab, s.hidden));
  rs_tensor *x = norm(g, rs_name(g, word, "token"), nullptr, "embeddings.norm", s.hidden, s.eps, "embeddings");
  rs_dropper dropper(g, drop, cu_seqlens);
  for (const bool window : {false, true}) {
    const std::string name = window ? "rope.window" : "rope";
    const bool used = std::any_of(s.windows.begin(), s.windows.begin() + layers, [&](int64_t w) { return (w > 0) == window; });
    dropper.carry(used ? rs_name(g, rs_rope_table(g, positions, weight1(g, name + ".frequencies", half)), name.c_str()) : nullptr);
  }
  *out = dropper.finish(build_layers(g, s, x, layers, &dropper));
  if (layers == s.layers) out->x = norm(g, out->x, nullptr, "norm", s.hidden, s.eps, "norm");
  return RS_OK;
}

rs_status modernbert_head(const rs_model *model, rs_graph *g, rs_head head, int64_t labels, const rs_states &states,
                          rs_tensor **out) {
  tower_settings s = {};
  bool mean;
  rs_activation act;
  RS_TRY(read_settings(model, &s));
  RS_TRY(read_bool(model, "modernbert.classifier_mean", &mean));
  RS_TRY(read_activation(model, "modernbert.classifier_act", &act));
  rs_tensor *x = states.x;
  if (head == RS_HEAD_SEQUENCE)
    x = rs_name(g, rs_pool(g, x, states.cu_seqlens, states.sizes, mean ? RS_POOL_MEAN : RS_POOL_CLS, 0), "head.pooled");
  x = linear(g, x, "classifier.dense", s.hidden, s.hidden, act);
  *out = linear(g, norm(g, x, nullptr, "classifier.norm", s.hidden, s.eps, "classifier.norm"), "classifier", labels, s.hidden);
  return RS_OK;
}

const char *const types[] = {"modernbert", nullptr};
const char *const architectures[] = {"ModernBertModel",
                                     "ModernBertForMaskedLM",
                                     "ModernBertForSequenceClassification",
                                     "ModernBertForTokenClassification",
                                     "ModernBertForQuestionAnswering",
                                     nullptr};

}  // namespace

extern const rs_family rs_family_modernbert;
const rs_family rs_family_modernbert = {
    "modernbert",    types,   architectures, modernbert_inputs, modernbert_convert, modernbert_shape, modernbert_build, nullptr,
    modernbert_head, nullptr, nullptr};
