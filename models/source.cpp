#include "source.h"

#include "status.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

const char *kind_name(rs_meta_kind kind) {
  switch (kind) {
    case RS_META_BOOL:
      return "a boolean";
    case RS_META_I64:
      return "an integer";
    case RS_META_F64:
      return "a number";
    case RS_META_STR:
      return "a string";
    default:
      return "an array";
  }
}

std::string shape_text(int rank, const int64_t *shape) {
  std::string s = "[";
  for (int i = 0; i < rank; i++) s += (i ? "," : "") + std::to_string(shape[i]);
  return s + "]";
}

struct weight_type {
  const char *name;
  rs_type matrix, table;  // of linear layers; of large tables
};
// The token table of q4 stays at 8 bits: see docs/design.md for what 4 would cost.
constexpr weight_type weight_types[] = {
    {"f32", RS_F32, RS_F32}, {"f16", RS_F16, RS_F16}, {"q8", RS_W8, RS_W8}, {"q4", RS_W4, RS_W8}};

const rs_source_tensor *find_tensor(const rs_source *source, const std::string &name) {
  for (size_t i = 0; i < source->n_tensors; i++)
    if (name == source->tensors[i].name) return &source->tensors[i];
  return nullptr;
}

void widen_bf16(const void *src, size_t n, float *dst) {
  for (size_t i = 0; i < n; i++) {
    uint16_t h;
    memcpy(&h, static_cast<const char *>(src) + 2 * i, 2);
    const uint32_t bits = uint32_t(h) << 16;
    memcpy(dst + i, &bits, 4);
  }
}

}  // namespace

rs_importer::rs_importer(const rs_source *source, const rs_convert_params *p, rs_writer *w)
    : source(source), params(), w(w), used(source->n_tensors) {
  if (source->size < sizeof(uint32_t)) {
    type_status = rs_fail(RS_ERR_ARGUMENT, "rs_source.size is %u: set it to sizeof(rs_source)", source->size);
    return;
  }
  if ((type_status = rs_read_params(p, "rs_convert_params", &params)) != RS_OK) return;
  if (!params.type) params.type = "q8";
  type_status = RS_ERR_ARGUMENT;
  for (const weight_type &t : weight_types)
    if (!strcmp(t.name, params.type)) {
      matrix_type = t.matrix, table_type = t.table;
      type_status = w ? rs_writer_set_str(w, "general.weight_type", t.name) : RS_OK;
      return;
    }
  rs_fail(type_status, "type '%s': expected f32, f16, q8 or q4", params.type);
}

const rs_source_value *rs_importer::find_value(const char *key, rs_meta_kind kind, rs_status *status) const {
  *status = type_status;  // a constructor can't fail: the first look-up tells
  if (type_status != RS_OK) return nullptr;
  for (size_t i = 0; i < source->n_config; i++) {
    const rs_source_value &v = source->config[i];
    if (strcmp(v.key, key)) continue;
    if (v.kind == kind || (kind == RS_META_F64 && v.kind == RS_META_I64)) return &v;
    *status = rs_fail(RS_ERR_FORMAT, "config.json: '%s' is %s, expected %s", key, kind_name(v.kind), kind_name(kind));
    return nullptr;
  }
  return nullptr;
}

rs_status rs_importer::config_str(const char *key, const char **out) {
  RS_TRY(config_str(key, out, nullptr));
  return *out ? RS_OK : rs_fail(RS_ERR_FORMAT, "config.json: '%s' is missing", key);
}
rs_status rs_importer::config_str(const char *key, const char **out, const char *otherwise) {
  rs_status status;
  const rs_source_value *v = find_value(key, RS_META_STR, &status);
  *out = v ? v->str : otherwise;
  return status;
}
rs_status rs_importer::config_i64(const char *key, int64_t *out, int64_t low, int64_t high) {
  RS_TRY(config_i64(key, out, low, high, INT64_MIN));
  return *out != INT64_MIN ? RS_OK : rs_fail(RS_ERR_FORMAT, "config.json: '%s' is missing", key);
}
rs_status rs_importer::config_i64(const char *key, int64_t *out, int64_t low, int64_t high, int64_t otherwise) {
  rs_status status;
  const rs_source_value *v = find_value(key, RS_META_I64, &status);
  *out = v ? v->i64 : otherwise;
  if (v && (*out < low || *out > high))
    return rs_fail(RS_ERR_FORMAT, "config.json: '%s' is %lld, expected %lld to %lld", key, static_cast<long long>(*out),
                   static_cast<long long>(low), static_cast<long long>(high));
  return status;
}
rs_status rs_importer::config_f64(const char *key, double *out, double otherwise) {
  rs_status status;
  const rs_source_value *v = find_value(key, RS_META_F64, &status);
  *out = v ? v->f64 : otherwise;
  return status;
}
rs_status rs_importer::config_bool(const char *key, bool *out, bool otherwise) {
  rs_status status;
  const rs_source_value *v = find_value(key, RS_META_BOOL, &status);
  *out = v ? v->boolean : otherwise;
  return status;
}
rs_status rs_importer::config_must_be(const char *key, const char *value) {
  const char *s;
  RS_TRY(config_str(key, &s, value));
  return strcmp(s, value) ? rs_fail(RS_ERR_UNSUPPORTED, "config.json: '%s' is '%s'; rs supports '%s'", key, s, value) : RS_OK;
}
rs_status rs_importer::config_must_be(const char *key, bool value) {
  bool b;
  RS_TRY(config_bool(key, &b, value));
  return b != value ? rs_fail(RS_ERR_UNSUPPORTED, "config.json: '%s' is %s; rs supports %s", key, b ? "true" : "false",
                              value ? "true" : "false")
                    : RS_OK;
}

bool rs_importer::has(const std::string &name) const { return find_tensor(source, name) != nullptr; }
int64_t rs_importer::dim(const std::string &name, int i) const {
  const rs_source_tensor *t = find_tensor(source, name);
  return t && t->rank > i ? t->shape[i] : 0;
}

rs_status rs_importer::read(std::initializer_list<std::string> from, int rank, const int64_t *shape) {
  size_t bytes;
  RS_TRY(rs_tensor_bytes(RS_F32, RS_ROWS, rank, shape, &bytes));
  values_.resize(bytes / 4);
  int64_t part[RS_MAX_RANK];
  std::copy(shape, shape + rank, part);
  part[0] /= static_cast<int64_t>(from.size());
  const size_t each = values_.size() / from.size();
  float *to = values_.data();
  for (const std::string &name : from) {
    const rs_source_tensor *t = find_tensor(source, name);
    if (!t) return rs_fail(RS_ERR_FORMAT, "tensor '%s' is missing", name.c_str());
    const bool number = t->rank == 0 && rank == 1 && part[0] == 1;
    if (!number && (t->rank != rank || !std::equal(part, part + rank, t->shape)))
      return rs_fail(RS_ERR_FORMAT, "'%s': shape %s, expected %s", name.c_str(), shape_text(t->rank, t->shape).c_str(),
                     shape_text(rank, part).c_str());
    switch (t->type) {
      case RS_F32:
        memcpy(to, t->data, each * 4);
        break;
      case RS_F16: {  // the codec wants aligned memory, which a published file does not promise
        encoded.resize(each * 2);
        memcpy(encoded.data(), t->data, each * 2);
        RS_TRY(rs_tensor_decode(RS_F16, RS_ROWS, rank, part, encoded.data(), to, each));
        break;
      }
      case RS_BF16:
        widen_bf16(t->data, each, to);
        break;
      default:
        return rs_fail(RS_ERR_UNSUPPORTED, "'%s': type %s, expected F32, F16 or BF16", name.c_str(), t->type_name);
    }
    for (size_t i = 0; i < each; i++)
      if (!std::isfinite(to[i])) return rs_fail(RS_ERR_NUMERIC, "'%s': element %zu is NaN or infinite", name.c_str(), i);
    used[static_cast<size_t>(t - source->tensors)] = 1;
    to += each;
  }
  return RS_OK;
}

rs_status rs_importer::add(const std::string &name, rs_type type, rs_layout layout, int rank, const int64_t *shape) {
  size_t bytes;
  RS_TRY(rs_tensor_bytes(type, layout, rank, shape, &bytes));
  encoded.resize(bytes);
  std::vector<float> scale(static_cast<size_t>(shape[rank - 1]), 1);  // of inputs
  const rs_status status = params.calibration
                               ? rs_tensor_encode_calibrated(params.calibration, name.c_str(), type, layout, rank, shape,
                                                             values_.data(), encoded.data(), bytes, scale.data())
                               : rs_tensor_encode(type, layout, rank, shape, values_.data(), encoded.data(), bytes);
  if (status != RS_OK) return rs_fail(status, "'%s': %s", name.c_str(), std::string(rs_last_error()).c_str());
  RS_TRY(rs_writer_add(w, name.c_str(), type, layout, rank, shape, encoded.data(), bytes));
  if (std::any_of(scale.begin(), scale.end(), [](float f) { return f != 1; }))
    RS_TRY(rs_writer_add(w, (name + ".input_scale").c_str(), RS_F32, RS_ROWS, 1, &shape[rank - 1], scale.data(), scale.size() * 4));
  parameters += static_cast<int64_t>(values_.size());
  added++;
  if (!params.on_tensor) return RS_OK;

  rs_convert_tensor row = {};
  row.name = name.c_str(), row.type = type, row.layout = layout, row.rank = rank, row.bytes = bytes;
  std::copy(shape, shape + rank, row.shape);
  decoded.resize(values_.size());
  RS_TRY(rs_tensor_decode(type, layout, rank, shape, encoded.data(), decoded.data(), decoded.size()));
  for (size_t i = 0; i < values_.size(); i++) {
    const double error = std::fabs(double(values_[i]) - double(decoded[i]) * scale[i % scale.size()]);
    row.max_error = std::max(row.max_error, error);
    row.sum_sq_error += error * error;
    row.sum_sq += double(values_[i]) * values_[i];
  }
  row.count = static_cast<double>(values_.size());
  row.index = static_cast<size_t>(std::count(used.begin(), used.end(), 1));
  row.total = used.size();
  params.on_tensor(params.ctx, &row);
  return RS_OK;
}

rs_status rs_importer::linear(const std::string &name, std::initializer_list<std::string> from, int64_t n, int64_t k) {
  const int64_t shape[] = {n, k};
  RS_TRY(read(from, 2, shape));
  return put_linear(name, n, k);
}
rs_status rs_importer::put_linear(const std::string &name, int64_t n, int64_t k) {
  const int64_t shape[] = {n, k};
  return add(name, matrix_type, RS_PANELS, 2, shape);
}
rs_status rs_importer::put_wide(const std::string &name, int64_t n, int64_t k) {
  const int64_t shape[] = {n, k};
  return add(name, table_type, RS_PANELS, 2, shape);
}

rs_status rs_importer::head(const std::string &name, const std::string &from, int64_t n, int64_t k) {
  const int64_t shape[] = {n, k};
  RS_TRY(read({from}, 2, shape));
  return put_head(name, n, k);
}
rs_status rs_importer::put_head(const std::string &name, int64_t n, int64_t k) {
  const int64_t shape[] = {n, k};
  return add(name, matrix_type == RS_F32 ? RS_F32 : RS_F16, RS_PANELS, 2, shape);
}

rs_status rs_importer::vector(const std::string &name, std::initializer_list<std::string> from, int64_t n) {
  RS_TRY(read(from, 1, &n));
  return put_vector(name, n);
}
rs_status rs_importer::put_vector(const std::string &name, int64_t n) { return add(name, RS_F32, RS_ROWS, 1, &n); }

rs_status rs_importer::table(const std::string &name, const std::string &from, int64_t rows, int64_t columns, bool large) {
  const int64_t shape[] = {rows, columns};
  RS_TRY(read({from}, 2, shape));
  return put_table(name, rows, columns, large);
}
rs_status rs_importer::put_table(const std::string &name, int64_t rows, int64_t columns, bool large) {
  const int64_t shape[] = {rows, columns};
  const rs_type small_type = matrix_type == RS_F32 ? RS_F32 : RS_F16;
  return add(name, large ? table_type : small_type, RS_ROWS, 2, shape);
}

void rs_importer::ignore(const std::string &prefix) {
  for (size_t i = 0; i < source->n_tensors; i++)
    if (!strncmp(source->tensors[i].name, prefix.c_str(), prefix.size())) used[i] = 1;
}

rs_status rs_importer::finish() {
  for (size_t i = 0; i < used.size(); i++)
    if (!used[i])
      return rs_fail(RS_ERR_UNSUPPORTED, "tensor '%s' %s %s is not known to this architecture", source->tensors[i].name,
                     source->tensors[i].type_name, shape_text(source->tensors[i].rank, source->tensors[i].shape).c_str());
  return rs_writer_set_i64(w, "general.parameters", parameters);
}
