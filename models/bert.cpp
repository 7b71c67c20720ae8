// BERT (Devlin et al., arXiv 1810.04805), RoBERTa (Liu et al., arXiv 1907.11692) and DistilBERT (Sanh et al., arXiv 1910.01108): a
// post-norm encoder with learned absolute positions and token types.
//
//   x = LN(word[id] + position[i] + type[t])
//   each layer:  h = LN(x + attn(x));  x = LN(h + W2 act(W1 h))
//
// Tensors of the weight file, C hidden size, F intermediate size:
//   token.weight [V,C]  position.weight [P,C]  type.weight [S,C]  embeddings.norm.{weight,bias} [C]
//   blk.<i>.attn.qkv.{weight [3C,C], bias [3C]}   query, key and value under each other: one product instead of three
//   blk.<i>.attn.out.{weight [C,C], bias}  blk.<i>.attn.norm.{weight,bias}
//   blk.<i>.mlp.up.{weight [F,C], bias [F]}  blk.<i>.mlp.down.{weight [C,F], bias}  blk.<i>.mlp.norm.{weight,bias}
//   pooler.{weight [C,C], bias}  where published
//   classifier.{weight [labels,C], bias}  of a head: labels of a text by act(pooler [CLS]), of each token by its state, or, with
//   two of them, how much each token begins and ends an answer
// The pooler's activation is tanh, or what bert.pooler_act says (DistilBERT: relu).  DistilBERT has no types; its table here has
// one row, of zeros. RoBERTa counts positions from the id of its padding on; rows of the table before that are left out, so that
// they begin at 0 here, too.  A "<pad>" that stands in a text, which it would not count, is a token like any other.
#include "parts.h"

#include <cmath>
#include <cstring>

using namespace parts;

namespace {

// ---------------------------------------------------------------------------------------- settings

struct bert_settings {
  int64_t hidden, intermediate, layers, heads, vocab, positions;
  int64_t types;           // of a folder: 0 for DistilBERT, which has none; of a file one at least
  int64_t first_position;  // of the published table
  double eps;
  rs_activation act;
};

// ---------------------------------------------------------------------------------------- conversion

rs_status convert_settings(rs_importer &in, bert_settings *s) {
  int64_t pad;
  const char *act, *type;
  RS_TRY(in.config_str("model_type", &type));
  const bool roberta = !strcmp(type, "roberta"), distilbert = !strcmp(type, "distilbert");
  const char *const hidden = distilbert ? "dim" : "hidden_size", *const heads = distilbert ? "n_heads" : "num_attention_heads";
  RS_TRY(in.config_i64(hidden, &s->hidden, 1, 65536));
  RS_TRY(in.config_i64(distilbert ? "hidden_dim" : "intermediate_size", &s->intermediate, 1, 65536));
  RS_TRY(in.config_i64(distilbert ? "n_layers" : "num_hidden_layers", &s->layers, 1, 1024));
  RS_TRY(in.config_i64(heads, &s->heads, 1, s->hidden));
  RS_TRY(in.config_i64("vocab_size", &s->vocab, 1, INT32_MAX));
  RS_TRY(in.config_i64("max_position_embeddings", &s->positions, 1, INT32_MAX));
  s->types = 0;
  if (!distilbert) RS_TRY(in.config_i64("type_vocab_size", &s->types, 1, INT32_MAX, 2));
  RS_TRY(in.config_i64("pad_token_id", &pad, 0, s->vocab - 1, roberta ? 1 : 0));
  RS_TRY(in.config_f64("layer_norm_eps", &s->eps, 1e-12));
  RS_TRY(in.config_str(distilbert ? "activation" : "hidden_act", &act, "gelu"));
  RS_TRY(find_activation(act, &s->act));
  RS_TRY(in.config_must_be("position_embedding_type", "absolute"));
  RS_TRY(in.config_must_be("is_decoder", false));
  RS_TRY(in.config_must_be("add_cross_attention", false));
  if (s->hidden % s->heads)
    return rs_fail(RS_ERR_FORMAT, "config.json: %lld heads do not divide %s %lld", static_cast<long long>(s->heads), hidden,
                   static_cast<long long>(s->hidden));
  s->first_position = roberta ? pad + 1 : 0;
  s->positions -= s->first_position;
  if (s->positions < 1)
    return rs_fail(RS_ERR_FORMAT, "config.json: 'max_position_embeddings' is %lld, of which the first %lld are of no token",
                   static_cast<long long>(s->positions + s->first_position), static_cast<long long>(s->first_position));

  rs_writer *w = in.writer();
  RS_TRY(rs_writer_set_i64(w, "bert.hidden_size", s->hidden));
  RS_TRY(rs_writer_set_i64(w, "bert.intermediate_size", s->intermediate));
  RS_TRY(rs_writer_set_i64(w, "bert.num_layers", s->layers));
  RS_TRY(rs_writer_set_i64(w, "bert.num_heads", s->heads));
  RS_TRY(rs_writer_set_i64(w, "bert.vocab_size", s->vocab));
  RS_TRY(rs_writer_set_i64(w, "bert.max_positions", s->positions));
  RS_TRY(rs_writer_set_i64(w, "bert.type_vocab_size", std::max<int64_t>(s->types, 1)));
  RS_TRY(rs_writer_set_i64(w, "bert.pad_token_id", pad));
  RS_TRY(rs_writer_set_f64(w, "bert.layer_norm_eps", s->eps));
  return rs_writer_set_str(w, "bert.hidden_act", act);
}

// What the parts of a layer are called.
struct layer_names {
  const char *list, *query, *key, *value, *out, *attn_norm, *up, *down, *mlp_norm;
};
constexpr layer_names bert_names = {"encoder.layer.",        "attention.self.query.",   "attention.self.key.",
                                    "attention.self.value.", "attention.output.dense.", "attention.output.LayerNorm.",
                                    "intermediate.dense.",   "output.dense.",           "output.LayerNorm."};
constexpr layer_names distilbert_names = {"transformer.layer.", "attention.q_lin.",   "attention.k_lin.",
                                          "attention.v_lin.",   "attention.out_lin.", "sa_layer_norm.",
                                          "ffn.lin1.",          "ffn.lin2.",          "output_layer_norm."};

rs_status convert_layer(rs_importer &in, const bert_settings &s, const layer_names &names, const std::string &from,
                        const std::string &to) {
  const std::string q = from + names.query, k = from + names.key, v = from + names.value, out = from + names.out,
                    attn_norm = from + names.attn_norm, up = from + names.up, down = from + names.down,
                    mlp_norm = from + names.mlp_norm;
  RS_TRY(in.linear(to + "attn.qkv.weight", {q + "weight", k + "weight", v + "weight"}, 3 * s.hidden, s.hidden));
  RS_TRY(in.vector(to + "attn.qkv.bias", {q + "bias", k + "bias", v + "bias"}, 3 * s.hidden));
  RS_TRY(in.linear(to + "attn.out.weight", {out + "weight"}, s.hidden, s.hidden));
  RS_TRY(in.vector(to + "attn.out.bias", {out + "bias"}, s.hidden));
  RS_TRY(in.vector(to + "attn.norm.weight", {attn_norm + "weight"}, s.hidden));
  RS_TRY(in.vector(to + "attn.norm.bias", {attn_norm + "bias"}, s.hidden));
  RS_TRY(in.linear(to + "mlp.up.weight", {up + "weight"}, s.intermediate, s.hidden));
  RS_TRY(in.vector(to + "mlp.up.bias", {up + "bias"}, s.intermediate));
  RS_TRY(in.linear(to + "mlp.down.weight", {down + "weight"}, s.hidden, s.intermediate));
  RS_TRY(in.vector(to + "mlp.down.bias", {down + "bias"}, s.hidden));
  RS_TRY(in.vector(to + "mlp.norm.weight", {mlp_norm + "weight"}, s.hidden));
  return in.vector(to + "mlp.norm.bias", {mlp_norm + "bias"}, s.hidden);
}

// The head, where there is one: the pooler that it needs and its own layer.
rs_status convert_head(rs_importer &in, const bert_settings &s, const std::string &root) {
  const char *architecture;
  RS_TRY(in.config_str("architectures.0", &architecture, ""));
  // RoBERTa's classifier has its pooler inside; DistilBERT's belongs to the classifier, too, and is by another function.
  const bool inside = in.has("classifier.out_proj.weight"), distilbert = !s.types;
  const std::string pooler = inside       ? "classifier.dense."
                             : distilbert ? "pre_classifier."
                                          : root + "pooler.dense.",
                    last = inside ? "classifier.out_proj." : "classifier.";
  const bool spans = in.has("qa_outputs.weight"), classifier = in.has(last + "weight"), pooled = in.has(pooler + "weight");
  const auto is = [&](const std::string &task) {
    return architecture == "Bert" + task || architecture == "Roberta" + task || architecture == "DistilBert" + task;
  };
  const bool tokens = classifier && (is("ForTokenClassification") || !pooled);
  if (spans && classifier)
    return rs_fail(RS_ERR_UNSUPPORTED, "both 'qa_outputs.weight' and 'classifier.weight' are there; rs takes one head");
  if (classifier && tokens && is("ForSequenceClassification"))
    return rs_fail(RS_ERR_FORMAT, "tensor '%sweight' is missing", pooler.c_str());

  if (inside) in.ignore(root + "pooler.");  // some files have one beside it, of no use to them
  if (pooled) {                             // of use to a classifier of texts; else kept as it is, since others may want it
    RS_TRY(classifier && !tokens ? in.head("pooler.weight", pooler + "weight", s.hidden, s.hidden)
                                 : in.linear("pooler.weight", {pooler + "weight"}, s.hidden, s.hidden));
    RS_TRY(in.vector("pooler.bias", {pooler + "bias"}, s.hidden));
    if (distilbert) RS_TRY(rs_writer_set_str(in.writer(), "bert.pooler_act", "relu"));
  }
  if (!spans && !classifier) return RS_OK;
  rs_writer *w = in.writer();
  const std::string from = spans ? "qa_outputs." : last;
  const int64_t labels = spans ? 2 : in.dim(from + "weight", 0);
  const char *activation = "softmax";
  if (spans) {
    const rs_text names[] = {{"start", RS_NUL_TERMINATED}, {"end", RS_NUL_TERMINATED}};
    RS_TRY(rs_writer_set_strs(w, "head.labels", names, 2));
  } else {
    RS_TRY(convert_labels(in, labels));
    if (!tokens) RS_TRY(find_head_activation(in, labels, &activation));
  }
  RS_TRY(rs_writer_set_str(w, "head.type", rs_head_name(spans ? RS_HEAD_SPANS : tokens ? RS_HEAD_TOKENS : RS_HEAD_SEQUENCE)));
  RS_TRY(rs_writer_set_str(w, "head.activation", activation));
  RS_TRY(in.head("classifier.weight", from + "weight", labels, s.hidden));
  return in.vector("classifier.bias", {from + "bias"}, labels);
}

rs_status bert_inputs(rs_importer &, bool *texts, bool *images) {
  *texts = true, *images = false;
  return RS_OK;
}

rs_status bert_convert(rs_importer &in) {
  bert_settings s = {};
  RS_TRY(convert_settings(in, &s));
  // Published from the bare model, or with a head on top, which puts a prefix in front.
  const std::string table = "embeddings.word_embeddings.weight",
                    root = in.has("bert." + table)         ? "bert."
                           : in.has("roberta." + table)    ? "roberta."
                           : in.has("distilbert." + table) ? "distilbert."
                                                           : "",
                    embeddings = root + "embeddings.";
  // Checkpoints that were converted from TensorFlow name the parameters of a LayerNorm otherwise.
  if (in.has(embeddings + "LayerNorm.gamma"))
    return rs_fail(RS_ERR_UNSUPPORTED,
                   "'%sLayerNorm.gamma': an old naming of parameters; save the model once with a current transformers",
                   embeddings.c_str());

  RS_TRY(in.vector("embeddings.norm.weight", {embeddings + "LayerNorm.weight"}, s.hidden));
  RS_TRY(in.vector("embeddings.norm.bias", {embeddings + "LayerNorm.bias"}, s.hidden));
  const layer_names &names = s.types ? bert_names : distilbert_names;
  for (int64_t i = 0; i < s.layers; i++)
    RS_TRY(convert_layer(in, s, names, root + names.list + std::to_string(i) + ".", "blk." + std::to_string(i) + "."));
  RS_TRY(convert_head(in, s, root));
  in.ignore(embeddings + "position_ids");    // 0, 1, 2 …
  in.ignore(embeddings + "token_type_ids");  // 0, 0, 0 …
  in.ignore("cls.");                         // what pre-training predicted with: words and the next sentence
  in.ignore("lm_head.");
  in.ignore("vocab_");  // DistilBERT's
  if (s.types) {
    RS_TRY(in.table("type.weight", embeddings + "token_type_embeddings.weight", s.types, s.hidden, false));
  } else {
    in.values().assign(static_cast<size_t>(s.hidden), 0);
    RS_TRY(in.put_table("type.weight", 1, s.hidden, false));
  }
  const int64_t positions[] = {s.first_position + s.positions, s.hidden};
  RS_TRY(in.read({embeddings + "position_embeddings.weight"}, 2, positions));
  in.values().erase(in.values().begin(), in.values().begin() + s.first_position * s.hidden);
  RS_TRY(in.put_table("position.weight", s.positions, s.hidden, false));
  return in.table("token.weight", embeddings + "word_embeddings.weight", s.vocab, s.hidden, true);  // last: touched row by row
}

// ---------------------------------------------------------------------------------------- graph

rs_status read_settings(const rs_model *model, bert_settings *s) {
  RS_TRY(read_i64(model, "bert.hidden_size", 1, 65536, &s->hidden));
  RS_TRY(read_i64(model, "bert.intermediate_size", 1, 65536, &s->intermediate));
  RS_TRY(read_i64(model, "bert.num_layers", 1, 1024, &s->layers));
  RS_TRY(read_i64(model, "bert.num_heads", 1, s->hidden, &s->heads));
  RS_TRY(read_i64(model, "bert.vocab_size", 1, INT32_MAX, &s->vocab));
  RS_TRY(read_i64(model, "bert.max_positions", 1, INT32_MAX, &s->positions));
  RS_TRY(read_i64(model, "bert.type_vocab_size", 1, INT32_MAX, &s->types));
  RS_TRY(read_f64(model, "bert.layer_norm_eps", &s->eps));
  return read_activation(model, "bert.hidden_act", &s->act);
}

rs_tensor *layer(rs_graph *g, const bert_settings &s, rs_tensor *x, rs_dropper *dropper, int i) {
  const std::string at = "blk." + std::to_string(i) + ".";
  const int64_t c = s.hidden, head_size = c / s.heads;
  const int heads = static_cast<int>(s.heads);
  rs_tensor *qkv = linear(g, x, at + "attn.qkv", 3 * c, c);
  const auto scale = static_cast<float>(1 / std::sqrt(static_cast<double>(head_size)));
  rs_tensor *q = rs_columns(g, qkv, 0, c), *k = rs_columns(g, qkv, c, c), *v = rs_columns(g, qkv, 2 * c, c);
  rs_tensor *mixed = dropper->attention(i, {q, k, v, heads, scale});
  rs_tensor *attn = linear(g, rs_name(g, mixed, (at + "attn").c_str()), at + "attn.out", c, c);
  rs_tensor *h = norm(g, attn, x, at + "attn.norm", c, s.eps, at + "attn.norm");
  rs_tensor *up = linear(g, h, at + "mlp.up", s.intermediate, c, s.act);
  rs_tensor *down = linear(g, up, at + "mlp.down", c, s.intermediate);
  rs_tensor *y = norm(g, down, h, at + "mlp.norm", c, s.eps, at + "out");
  return dropper->after_layer(i, {x, attn, h, down, y});
}

rs_status bert_shape(const rs_model *model, rs_model_shape *out) {
  bert_settings s = {};
  RS_TRY(read_settings(model, &s));
  out->text = {static_cast<int32_t>(s.hidden), static_cast<int32_t>(s.layers), static_cast<int32_t>(s.heads)};
  out->dim = out->text.hidden;
  out->drops_texts = true;
  out->types = static_cast<int32_t>(s.types);
  out->vocab = static_cast<int32_t>(s.vocab);
  out->positions = static_cast<int32_t>(s.positions);
  return RS_OK;
}

rs_status bert_build(const rs_model *model, rs_graph *g, rs_tower, int layers, const rs_drop_schedule *drop, const rs_image_grid *,
                     rs_states *out) {
  bert_settings s = {};
  RS_TRY(read_settings(model, &s));
  const int64_t tokens = RS_DIM_TOKENS, starts = RS_DIM_CU_SEQLENS;
  rs_tensor *ids = rs_input(g, "ids", RS_I32, 1, &tokens);
  rs_tensor *type_ids = rs_input(g, "type_ids", RS_I32, 1, &tokens);
  rs_tensor *positions = rs_input(g, "positions", RS_I32, 1, &tokens);
  rs_tensor *cu_seqlens = rs_input(g, "cu_seqlens", RS_I32, 1, &starts);

  rs_tensor *word = rs_embed(g, ids, weight2(g, "token.weight", s.vocab, s.hidden));
  rs_tensor *type = rs_embed(g, type_ids, weight2(g, "type.weight", s.types, s.hidden));
  rs_tensor *position = rs_embed(g, positions, weight2(g, "position.weight", s.positions, s.hidden));
  rs_tensor *x = norm(g, rs_add(g, word, type), position, "embeddings.norm", s.hidden, s.eps, "embeddings");
  rs_dropper dropper(g, drop, cu_seqlens);
  for (int i = 0; i < layers; i++) x = layer(g, s, x, &dropper, i);
  *out = dropper.finish(x);
  return RS_OK;
}

// In a post-norm encoder, what changes most are separators, punctuation and function words: the paper's sign keeps these.
const char *bert_drop_warning(const rs_drop_schedule &drop) {
  for (const rs_drop_schedule::layer &l : drop.layers)
    for (const rs_score_term &t : l.score)
      if (l.drops && t.weight > 0 &&
          (t.source == rs_score_source::mlp || t.source == rs_score_source::attention || t.source == rs_score_source::block))
        return "a score that keeps what a layer changes most does harm in post-norm encoders such as BERT: with 30 % of the tokens "
               "dropped behind layer 1 by 'mlp', all-MiniLM-L6-v2 fell from 82.2 to 42.9 on STS-B (Spearman) and from 62.8 to 30.4 "
               "on Cranfield (nDCG@10); by '-mlp', to 80.6 and 62.2";
  return nullptr;
}

rs_status bert_head(const rs_model *model, rs_graph *g, rs_head head, int64_t labels, const rs_states &states, rs_tensor **out) {
  bert_settings s = {};
  RS_TRY(read_settings(model, &s));
  rs_tensor *x = states.x;
  if (head == RS_HEAD_SEQUENCE) {
    rs_activation act = RS_ACT_TANH;
    rs_meta other;
    if (rs_model_meta(model, "bert.pooler_act", &other) == RS_OK) RS_TRY(read_activation(model, "bert.pooler_act", &act));
    x = rs_name(g, rs_pool(g, x, states.cu_seqlens, states.sizes, RS_POOL_CLS, 0), "head.cls");
    x = linear(g, x, "pooler", s.hidden, s.hidden, act);
  }
  *out = linear(g, x, "classifier", labels, s.hidden);
  return RS_OK;
}

const char *const types[] = {"bert", "roberta", "distilbert", nullptr};
const char *const architectures[] = {"BertModel",
                                     "BertForMaskedLM",
                                     "BertForPreTraining",
                                     "BertForSequenceClassification",
                                     "BertForTokenClassification",
                                     "BertForQuestionAnswering",
                                     "RobertaModel",
                                     "RobertaForMaskedLM",
                                     "RobertaForSequenceClassification",
                                     "RobertaForTokenClassification",
                                     "RobertaForQuestionAnswering",
                                     "DistilBertModel",
                                     "DistilBertForMaskedLM",
                                     "DistilBertForSequenceClassification",
                                     "DistilBertForTokenClassification",
                                     "DistilBertForQuestionAnswering",
                                     nullptr};

}  // namespace

extern const rs_family rs_family_bert;
const rs_family rs_family_bert = {"bert",       types,      architectures, bert_inputs,
                                  bert_convert, bert_shape, bert_build,    bert_drop_warning,
                                  bert_head,    nullptr,    nullptr};
