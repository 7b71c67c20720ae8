// Published weights as a family's converter reads them: typed access to config.json, tensors by name, and the way from f32 values
// to a tensor of the weight file.  Keeps count of what was used, so that nothing is left behind unseen.
#pragma once
#include "../rs.h"

#include <initializer_list>
#include <string>
#include <vector>

class rs_importer {
 public:
  rs_importer(const rs_source *source, const rs_convert_params *params, rs_writer *w);

  rs_writer *writer() const { return w; }

  // Values of config.json.  Without a default, a key that is missing is an error; of another kind, always.
  rs_status config_str(const char *key, const char **out);
  rs_status config_str(const char *key, const char **out, const char *otherwise);
  rs_status config_i64(const char *key, int64_t *out, int64_t low, int64_t high);
  rs_status config_i64(const char *key, int64_t *out, int64_t low, int64_t high, int64_t otherwise);
  rs_status config_f64(const char *key, double *out, double otherwise);
  rs_status config_bool(const char *key, bool *out, bool otherwise);
  // A setting that has one value here: absent or equal is fine, anything else an error that names it.
  rs_status config_must_be(const char *key, const char *value);
  rs_status config_must_be(const char *key, bool value);

  bool has(const std::string &name) const;
  int64_t dim(const std::string &name, int i) const;  // the i-th of its dimensions; 0 where there is none
  // The tensor `name` of the file from the source's `from`, rows of each appended.  [N, K] weights of linear layers become panels
  // of the wanted type, tables of rows keep one row an index, vectors stay f32.
  rs_status linear(const std::string &name, std::initializer_list<std::string> from, int64_t n,
                   int64_t k);  // [n, k], each of `from` an equal part
  // A small matrix on top of the encoder, which runs once a text or adds little a token: of floats in every type of file.
  rs_status head(const std::string &name, const std::string &from, int64_t n, int64_t k);
  rs_status vector(const std::string &name, std::initializer_list<std::string> from, int64_t n);
  rs_status table(const std::string &name, const std::string &from, int64_t rows, int64_t columns, bool large);
  // The same in two steps, for a converter that changes values between them: `from` into values(), values() into the file.
  rs_status read(std::initializer_list<std::string> from, int rank, const int64_t *shape);
  std::vector<float> &values() { return values_; }
  rs_status put_linear(const std::string &name, int64_t n, int64_t k);
  rs_status put_wide(const std::string &name, int64_t n, int64_t k);  // 8 bits in q4 too: what reads pixels
  rs_status put_head(const std::string &name, int64_t n, int64_t k);
  rs_status put_vector(const std::string &name, int64_t n);
  rs_status put_table(const std::string &name, int64_t rows, int64_t columns, bool large);
  // Known to be of no use: a buffer, or a head that this family leaves out.  `prefix` of tensor names.
  void ignore(const std::string &prefix);

  rs_status finish();  // every tensor of the source was used or ignored; totals

 private:
  const rs_source_value *find_value(const char *key, rs_meta_kind kind, rs_status *status) const;
  rs_status add(const std::string &name, rs_type type, rs_layout layout, int rank, const int64_t *shape);

  const rs_source *source;
  rs_convert_params params;
  rs_writer *w;
  rs_type matrix_type = RS_W8, table_type = RS_W8;
  rs_status type_status;
  std::vector<char> used;  // by tensor of the source
  std::vector<float> values_, decoded;
  std::vector<char> encoded;
  size_t added = 0;
  int64_t parameters = 0;
};
