// What model families share: reading settings back, weights by name, the layers that are alike in all.  Uses rs.h only.
#pragma once
#include "models.h"
#include "source.h"
#include "status.h"

namespace parts {

rs_status find_activation(const char *name, rs_activation *out);  // as config.json names it: "gelu", "gelu_new" …

// Metadata of a weight file: there, of that kind, within bounds, or an error.
rs_status read_i64(const rs_model *model, const std::string &key, int64_t low, int64_t high, int64_t *out);
rs_status read_f64(const rs_model *model, const std::string &key, double *out);
rs_status read_bool(const rs_model *model, const std::string &key, bool *out);
rs_status read_activation(const rs_model *model, const std::string &key, rs_activation *out);

bool has_weight(const rs_model *model, const std::string &name);
rs_tensor *weight1(rs_graph *g, const std::string &name, int64_t n);
rs_tensor *weight2(rs_graph *g, const std::string &name, int64_t n, int64_t k);
// <name>.weight [n, k] and <name>.bias [n]; the result is called <name>.
rs_tensor *linear(rs_graph *g, rs_tensor *x, const std::string &name, int64_t n, int64_t k, rs_activation act = RS_ACT_NONE);
// <name>.weight and <name>.bias [C]; the result is called `result`.
rs_tensor *norm(rs_graph *g, rs_tensor *x, rs_tensor *residual, const std::string &name, int64_t c, double eps,
                const std::string &result);

// Labels of a head with n rows: id2label in the order of the ids, or the names that transformers gives them -> head.labels.
rs_status convert_labels(rs_importer &in, int64_t rows);

// What makes scores of the logits of a sequence, as head.activation names it: what a cross-encoder of sentence-transformers says,
// else what the classification pipelines of transformers do.
rs_status find_head_activation(rs_importer &in, int64_t labels, const char **out);

}  // namespace parts
