#include "parts.h"

#include <cmath>
#include <cstring>

namespace {

struct activation_name {
  const char *name;
  rs_activation act;
};
constexpr activation_name activations[] = {
    {"gelu", RS_ACT_GELU},
    {"gelu_new", RS_ACT_GELU_TANH},
    {"gelu_pytorch_tanh", RS_ACT_GELU_TANH},
    {"gelu_fast", RS_ACT_GELU_TANH},
    {"gelu_python", RS_ACT_GELU},
    {"relu", RS_ACT_RELU},
    {"silu", RS_ACT_SILU},
    {"swish", RS_ACT_SILU},
    {"tanh", RS_ACT_TANH},
    {"quick_gelu", RS_ACT_QUICK_GELU},
};

rs_status read_meta(const rs_model *model, const std::string &key, rs_meta_kind kind, const char *what, rs_meta *out) {
  RS_TRY(rs_model_meta(model, key.c_str(), out));
  return out->kind == kind ? RS_OK : rs_fail(RS_ERR_FORMAT, "metadata '%s' is not %s", key.c_str(), what);
}

}  // namespace

namespace parts {

rs_status find_activation(const char *name, rs_activation *out) {
  for (const activation_name &a : activations)
    if (!strcmp(a.name, name)) {
      *out = a.act;
      return RS_OK;
    }
  return rs_fail(RS_ERR_UNSUPPORTED, "hidden_act '%s' is not supported", name);
}

rs_status read_i64(const rs_model *model, const std::string &key, int64_t low, int64_t high, int64_t *out) {
  rs_meta v;
  RS_TRY(read_meta(model, key, RS_META_I64, "an integer", &v));
  if (v.i64 < low || v.i64 > high)
    return rs_fail(RS_ERR_FORMAT, "metadata '%s' is %lld, expected %lld to %lld", key.c_str(), static_cast<long long>(v.i64),
                   static_cast<long long>(low), static_cast<long long>(high));
  *out = v.i64;
  return RS_OK;
}

rs_status read_f64(const rs_model *model, const std::string &key, double *out) {
  rs_meta v;
  RS_TRY(read_meta(model, key, RS_META_F64, "a number", &v));
  if (!std::isfinite(v.f64)) return rs_fail(RS_ERR_FORMAT, "metadata '%s' is %g", key.c_str(), v.f64);
  *out = v.f64;
  return RS_OK;
}

rs_status read_bool(const rs_model *model, const std::string &key, bool *out) {
  rs_meta v;
  RS_TRY(read_meta(model, key, RS_META_BOOL, "true or false", &v));
  *out = v.boolean;
  return RS_OK;
}

rs_status read_activation(const rs_model *model, const std::string &key, rs_activation *out) {
  rs_meta v;
  RS_TRY(read_meta(model, key, RS_META_STR, "a string", &v));
  return find_activation(v.str, out);
}

bool has_weight(const rs_model *model, const std::string &name) {
  rs_tensor_info info;
  return rs_model_tensor(model, name.c_str(), &info) == RS_OK;
}

rs_tensor *weight1(rs_graph *g, const std::string &name, int64_t n) { return rs_weight(g, name.c_str(), 1, &n); }

rs_tensor *weight2(rs_graph *g, const std::string &name, int64_t n, int64_t k) {
  const int64_t shape[] = {n, k};
  return rs_weight(g, name.c_str(), 2, shape);
}

rs_tensor *linear(rs_graph *g, rs_tensor *x, const std::string &name, int64_t n, int64_t k, rs_activation act) {
  return rs_name(g, rs_linear(g, x, weight2(g, name + ".weight", n, k), weight1(g, name + ".bias", n), act), name.c_str());
}

rs_tensor *norm(rs_graph *g, rs_tensor *x, rs_tensor *residual, const std::string &name, int64_t c, double eps,
                const std::string &result) {
  rs_tensor *y =
      rs_layer_norm(g, x, residual, weight1(g, name + ".weight", c), weight1(g, name + ".bias", c), static_cast<float>(eps));
  return rs_name(g, y, result.c_str());
}

rs_status convert_labels(rs_importer &in, int64_t rows) {
  std::vector<std::string> names;
  for (int64_t i = 0;; i++) {
    const char *label;
    RS_TRY(in.config_str(("id2label." + std::to_string(i)).c_str(), &label, nullptr));
    if (!label) RS_TRY(in.config_str(("label_names." + std::to_string(i)).c_str(), &label, nullptr));  // timm
    if (!label) break;
    names.emplace_back(label);
  }
  if (names.empty())
    for (int64_t i = 0; i < rows; i++) names.push_back("LABEL_" + std::to_string(i));
  if (static_cast<int64_t>(names.size()) != rows)
    return rs_fail(RS_ERR_FORMAT, "config.json: id2label has %zu labels, 'classifier.weight' has %lld rows", names.size(),
                   static_cast<long long>(rows));
  std::vector<rs_text> labels;
  for (const std::string &name : names) labels.push_back({name.data(), name.size()});
  return rs_writer_set_strs(in.writer(), "head.labels", labels.data(), labels.size());
}

// What makes scores of the logits of a sequence: what a cross-encoder of sentence-transformers says, else what the text
// classification pipeline of transformers does.
rs_status find_head_activation(rs_importer &in, int64_t labels, const char **out) {
  const char *key = "sentence_transformers.activation_fn", *name;
  RS_TRY(in.config_str(key, &name, nullptr));
  if (!name) RS_TRY(in.config_str(key = "sbert_ce_default_activation_function", &name, nullptr));
  if (name) {
    const char *last = strrchr(name, '.');  // "torch.nn.modules.linear.Identity"
    last = last ? last + 1 : name;
    *out = !strcmp(last, "Identity")  ? "none"
           : !strcmp(last, "Sigmoid") ? "sigmoid"
           : !strcmp(last, "Softmax") ? "softmax"
                                      : nullptr;
    return *out ? RS_OK
                : rs_fail(RS_ERR_UNSUPPORTED, "config.json: '%s' is '%s'; rs supports Identity, Sigmoid and Softmax", key, name);
  }
  const char *problem;
  RS_TRY(in.config_str("problem_type", &problem, ""));
  const bool single = !strcmp(problem, "single_label_classification"), multi = !strcmp(problem, "multi_label_classification"),
             regression = !strcmp(problem, "regression");
  if (*problem && !single && !multi && !regression)
    return rs_fail(RS_ERR_UNSUPPORTED, "config.json: 'problem_type' is '%s', which is not known", problem);
  *out = regression ? "none" : multi || labels == 1 ? "sigmoid" : "softmax";
  return RS_OK;
}

}  // namespace parts
