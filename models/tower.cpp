#include "tower.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace parts {

namespace {

constexpr int64_t most_hidden = 65536, most_layers = 1024, most_patch = 256, most_grid = 4096, most_prefix = 64;

std::string layer_at(const tower_settings &s, int64_t i) { return s.at + "blk." + std::to_string(i) + "."; }

rs_status scaled(rs_importer &in, const std::string &name, int64_t rows, int64_t columns, const std::string &scale) {
  const int64_t shape[] = {rows, columns};
  RS_TRY(in.read({scale}, 1, &rows));
  const std::vector<float> factors = in.values();
  RS_TRY(in.read({name}, columns == 1 ? 1 : 2, shape));
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < columns; j++) in.values()[static_cast<size_t>(i * columns + j)] *= factors[static_cast<size_t>(i)];
  return RS_OK;
}

// A linear layer whose result is multiplied by a layer scale.
rs_status convert_scaled(rs_importer &in, const std::string &to, const std::string &from, int64_t n, int64_t k,
                         const std::string &scale) {
  RS_TRY(scaled(in, from + ".weight", n, k, scale));
  RS_TRY(in.put_linear(to + ".weight", n, k));
  RS_TRY(scaled(in, from + ".bias", n, 1, scale));
  return in.put_vector(to + ".bias", n);
}

}  // namespace

// ---------------------------------------------------------------------------------------- layers

rs_status convert_tower_settings(rs_importer &in, tower_settings *s) {
  RS_TRY(find_activation(s->act_name, &s->act));
  if (s->heads < 1 || s->hidden % s->heads)
    return rs_fail(RS_ERR_FORMAT, "config.json: %lld heads do not divide hidden size %lld", static_cast<long long>(s->heads),
                   static_cast<long long>(s->hidden));
  rs_writer *w = in.writer();
  RS_TRY(rs_writer_set_i64(w, (s->key + "hidden_size").c_str(), s->hidden));
  RS_TRY(rs_writer_set_i64(w, (s->key + "intermediate_size").c_str(), s->intermediate));
  RS_TRY(rs_writer_set_i64(w, (s->key + "num_layers").c_str(), s->layers));
  RS_TRY(rs_writer_set_i64(w, (s->key + "num_heads").c_str(), s->heads));
  RS_TRY(rs_writer_set_f64(w, (s->key + "layer_norm_eps").c_str(), s->eps));
  RS_TRY(rs_writer_set_str(w, (s->key + "hidden_act").c_str(), s->act_name));
  RS_TRY(rs_writer_set_bool(w, (s->key + "gated").c_str(), s->gated));
  return rs_writer_set_bool(w, (s->key + "causal").c_str(), s->causal);
}

rs_status convert_bias(rs_importer &in, const std::string &to, const std::string &from, int64_t n, bool biased) {
  if (biased || in.has(from + ".bias")) return in.vector(to + ".bias", {from + ".bias"}, n);
  in.values().assign(static_cast<size_t>(n), 0);
  return in.put_vector(to + ".bias", n);
}

rs_status convert_norm(rs_importer &in, const std::string &to, const std::string &from, int64_t c, bool biased) {
  RS_TRY(in.vector(to + ".weight", {from + ".weight"}, c));
  return convert_bias(in, to, from, c, biased);
}

rs_status convert_linear(rs_importer &in, const std::string &to, const std::string &from, int64_t n, int64_t k, bool biased) {
  RS_TRY(in.linear(to + ".weight", {from + ".weight"}, n, k));
  return convert_bias(in, to, from, n, biased);
}

rs_status convert_qkv(rs_importer &in, const std::string &to, const std::string &q, const std::string &k, const std::string &v,
                      int64_t c) {
  RS_TRY(in.linear(to + ".weight", {q + ".weight", k + ".weight", v + ".weight"}, 3 * c, c));
  std::vector<float> bias(static_cast<size_t>(3 * c));
  const std::string *const names[] = {&q, &k, &v};
  for (size_t i = 0; i < 3; i++) {
    if (!in.has(*names[i] + ".bias")) continue;
    RS_TRY(in.read({*names[i] + ".bias"}, 1, &c));
    std::copy(in.values().begin(), in.values().end(), bias.begin() + static_cast<std::ptrdiff_t>(i) * c);
  }
  in.values() = std::move(bias);
  return in.put_vector(to + ".bias", 3 * c);
}

rs_status convert_layer(rs_importer &in, const tower_settings &s, const layer_names &names, const std::string &from, int64_t i) {
  const std::string to = layer_at(s, i);
  const int64_t c = s.hidden, up = s.gated ? 2 * s.intermediate : s.intermediate;
  const auto scaled_or_not = [&](const char *part, const char *name, int64_t k, const char *scale) {
    if (scale) return convert_scaled(in, to + part, from + name, c, k, from + scale);
    return convert_linear(in, to + part, from + name, c, k, names.biased);
  };
  if (i > 0 || !s.normed_input) RS_TRY(convert_norm(in, to + "attn.norm", from + names.attn_norm, c, names.biased));
  if (names.k) RS_TRY(convert_qkv(in, to + "attn.qkv", from + names.q, from + names.k, from + names.v, c));
  else RS_TRY(convert_linear(in, to + "attn.qkv", from + names.q, 3 * c, c, false));
  RS_TRY(scaled_or_not("attn.out", names.out, c, names.attn_scale));
  RS_TRY(convert_norm(in, to + "mlp.norm", from + names.mlp_norm, c, names.biased));
  RS_TRY(convert_linear(in, to + "mlp.up", from + names.up, up, c, names.biased));
  return scaled_or_not("mlp.down", names.down, s.intermediate, names.mlp_scale);
}

rs_status read_tower_settings(const rs_model *model, tower_settings *s) {
  RS_TRY(read_i64(model, s->key + "hidden_size", 1, most_hidden, &s->hidden));
  RS_TRY(read_i64(model, s->key + "intermediate_size", 1, most_hidden, &s->intermediate));
  RS_TRY(read_i64(model, s->key + "num_layers", 1, most_layers, &s->layers));
  RS_TRY(read_i64(model, s->key + "num_heads", 1, s->hidden, &s->heads));
  RS_TRY(read_f64(model, s->key + "layer_norm_eps", &s->eps));
  RS_TRY(read_activation(model, s->key + "hidden_act", &s->act));
  RS_TRY(read_bool(model, s->key + "gated", &s->gated));
  return read_bool(model, s->key + "causal", &s->causal);
}

rs_tensor *build_layers(rs_graph *g, const tower_settings &s, rs_tensor *x, int layers, rs_dropper *dropper) {
  const int64_t c = s.hidden, head_size = c / s.heads;
  const int heads = static_cast<int>(s.heads);
  const auto scale = static_cast<float>(1 / std::sqrt(static_cast<double>(head_size)));
  for (int i = 0; i < layers; i++) {
    const std::string at = layer_at(s, i);
    rs_tensor *normed = i == 0 && s.normed_input ? x : norm(g, x, nullptr, at + "attn.norm", c, s.eps, at + "attn.norm");
    rs_tensor *qkv = linear(g, normed, at + "attn.qkv", 3 * c, c), *qk = qkv;
    const int window = s.windows.empty() ? 0 : static_cast<int>(s.windows[static_cast<size_t>(i)]);
    if (!s.windows.empty())  // heads of queries and of keys are turned alike
      qk = rs_name(g, rs_rope(g, rs_columns(g, qkv, 0, 2 * c), dropper->carried(window ? 1 : 0), 2 * heads),
                   (at + "attn.rope").c_str());
    rs_tensor *q = rs_columns(g, qk, 0, c), *k = rs_columns(g, qk, c, c), *v = rs_columns(g, qkv, 2 * c, c);
    rs_tensor *mixed = dropper->attention(i, {q, k, v, heads, scale, s.causal, window});
    rs_tensor *attn = linear(g, rs_name(g, mixed, (at + "attn").c_str()), at + "attn.out", c, c);
    rs_tensor *h = rs_name(g, rs_add(g, x, attn), (at + "attn.sum").c_str());
    rs_tensor *up = norm(g, h, nullptr, at + "mlp.norm", c, s.eps, at + "mlp.norm");
    if (s.gated) {
      up = linear(g, up, at + "mlp.up", 2 * s.intermediate, c);
      up = rs_name(g, rs_gate(g, up, s.act), (at + "mlp.gate").c_str());
    } else {
      up = linear(g, up, at + "mlp.up", s.intermediate, c, s.act);
    }
    rs_tensor *down = linear(g, up, at + "mlp.down", c, s.intermediate);
    rs_tensor *y = rs_name(g, rs_add(g, h, down), ("blk." + std::to_string(i) + ".out").c_str());
    x = dropper->after_layer(i, {x, attn, h, down, y});
  }
  return x;
}

// ---------------------------------------------------------------------------------------- images

rs_status convert_image_settings(rs_importer &in, const tower_settings &s, const image_settings &image) {
  rs_writer *w = in.writer();
  RS_TRY(rs_writer_set_i64(w, (s.key + "patch_size").c_str(), image.patch));
  RS_TRY(rs_writer_set_i64(w, (s.key + "prefix_tokens").c_str(), image.prefix));
  RS_TRY(rs_writer_set_i64(w, (s.key + "position_columns").c_str(), image.columns));
  RS_TRY(rs_writer_set_i64(w, (s.key + "position_rows").c_str(), image.rows));
  RS_TRY(rs_writer_set_bool(w, (s.key + "position_antialias").c_str(), image.antialias));
  return rs_writer_set_f64(w, (s.key + "position_offset").c_str(), image.offset);
}

rs_status read_image_settings(const rs_model *model, const tower_settings &s, image_settings *out) {
  RS_TRY(read_i64(model, s.key + "patch_size", 1, most_patch, &out->patch));
  RS_TRY(read_i64(model, s.key + "prefix_tokens", 0, most_prefix, &out->prefix));
  RS_TRY(read_i64(model, s.key + "position_columns", 1, most_grid, &out->columns));
  RS_TRY(read_i64(model, s.key + "position_rows", 1, most_grid, &out->rows));
  RS_TRY(read_bool(model, s.key + "position_antialias", &out->antialias));
  RS_TRY(read_f64(model, s.key + "position_offset", &out->offset));
  return out->offset >= 0 && out->offset < 1
             ? RS_OK
             : rs_fail(RS_ERR_FORMAT, "metadata '%sposition_offset' is %g, expected 0 to below 1", s.key.c_str(), out->offset);
}

rs_status convert_image_input(rs_importer &in, const tower_settings &s, image_settings *image, const image_names &names) {
  const int64_t c = s.hidden, p = image->patch, patches = image->columns * image->rows;
  if (p < 1 || p > most_patch || image->columns < 1 || image->rows < 1 || image->columns > most_grid || image->rows > most_grid)
    return rs_fail(RS_ERR_FORMAT, "config.json: patches of %lld pixels, %lld by %lld of them", static_cast<long long>(p),
                   static_cast<long long>(image->columns), static_cast<long long>(image->rows));
  const int64_t kernel[] = {c, 3, p, p};
  RS_TRY(in.read({names.patch + ".weight"}, 4, kernel));
  RS_TRY(in.put_wide(s.at + "patch.weight", c, 3 * p * p));
  if (in.has(names.patch + ".bias")) RS_TRY(in.vector(s.at + "patch.bias", {names.patch + ".bias"}, c));

  const auto placed = static_cast<int64_t>(names.placed);
  const std::string &table = names.positions;
  // [1, n, C], or [n, C] of an embedding.
  const bool flat = in.dim(table, 2) == 0;
  const int64_t shape[] = {1, placed + patches, c};
  RS_TRY(in.read({table}, flat ? 2 : 3, flat ? shape + 1 : shape));
  const std::vector<float> positions = in.values();
  std::vector<float> prefix;
  for (const std::string &name : names.tokens) {
    const int rank = in.dim(name, 2) ? 3 : in.dim(name, 1) ? 2 : 1;
    const int64_t count = rank == 3 ? in.dim(name, 1) : 1, token[] = {1, count, c};
    RS_TRY(in.read({name}, rank, rank == 3 ? token : rank == 2 ? token + 1 : token + 2));
    prefix.insert(prefix.end(), in.values().begin(), in.values().end());
  }
  image->prefix = static_cast<int64_t>(prefix.size()) / c;
  if (placed > image->prefix || image->prefix > most_prefix)
    return rs_fail(RS_ERR_FORMAT, "%lld tokens before the patches, %lld of them with positions",
                   static_cast<long long>(image->prefix), static_cast<long long>(placed));
  const auto places = static_cast<size_t>(placed * c);
  for (size_t i = 0; i < places; i++) prefix[i] += positions[i];
  if (image->prefix) {
    in.values() = std::move(prefix);
    RS_TRY(in.put_table(s.at + "prefix.weight", image->prefix, c, false));
  }
  in.values().assign(positions.begin() + static_cast<std::ptrdiff_t>(places), positions.end());
  RS_TRY(in.put_table(s.at + "position.weight", patches, c, false));
  return convert_image_settings(in, s, *image);
}

namespace {

// One place of the new grid as a sum of places of the table, along one side.
struct taps {
  std::vector<int64_t> at;
  std::vector<double> weight;
};

// Cubic convolution (Keys 1981), a being the slope at 1.
double cubic(double x, double a) {
  x = std::fabs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? ((a * x - 5 * a) * x + 8 * a) * x - 4 * a : 0;
}

// As torch.nn.functional.interpolate(mode="bicubic", align_corners=False): four taps of a = -0.75, the border repeated.
// antialias=True: as Pillow, a = -0.5, the support grows as the grid shrinks, the border is left out.
std::vector<taps> cubic_taps(int64_t from, int64_t to, double scale, bool antialias) {
  std::vector<taps> all(static_cast<size_t>(to));
  for (int64_t i = 0; i < to; i++) {
    taps &t = all[static_cast<size_t>(i)];
    if (antialias) {
      const double wide = std::max(scale, 1.0), support = 2 * wide, centre = scale * (static_cast<double>(i) + 0.5);
      const auto first = std::max<int64_t>(0, static_cast<int64_t>(std::floor(centre - support + 0.5))),
                 last = std::min(from, static_cast<int64_t>(std::floor(centre + support + 0.5)));
      double sum = 0;
      for (int64_t j = first; j < last; j++) {
        t.at.push_back(j);
        t.weight.push_back(cubic((static_cast<double>(j) - centre + 0.5) / wide, -0.5));
        sum += t.weight.back();
      }
      for (double &w : t.weight) w /= sum;
    } else {
      const double x = scale * (static_cast<double>(i) + 0.5) - 0.5, floor = std::floor(x);
      for (int64_t j = -1; j <= 2; j++) {
        t.at.push_back(std::clamp<int64_t>(static_cast<int64_t>(floor) + j, 0, from - 1));
        t.weight.push_back(cubic(x - floor - static_cast<double>(j), -0.75));
      }
    }
  }
  return all;
}

rs_status find_table(const rs_model *model, const std::string &name, int64_t rows, int64_t columns, rs_tensor_info *out) {
  rs_tensor_info &t = *out;
  RS_TRY(rs_model_tensor(model, name.c_str(), &t));
  if (t.layout != RS_ROWS || t.rank != 2 || t.shape[0] != rows || t.shape[1] != columns || (t.type != RS_F32 && t.type != RS_F16))
    return rs_fail(RS_ERR_FORMAT, "'%s' is not a table of floats [%lld,%lld]", name.c_str(), static_cast<long long>(rows),
                   static_cast<long long>(columns));
  return RS_OK;
}

rs_status read_table(const rs_model *model, const std::string &name, int64_t rows, int64_t columns, float *out) {
  const int64_t shape[] = {rows, columns};
  rs_tensor_info t;
  RS_TRY(find_table(model, name, rows, columns, &t));
  return rs_tensor_decode(t.type, t.layout, 2, shape, t.data, out, static_cast<size_t>(rows * columns));
}

// *out: nullptr where the file has none.
rs_status find_bias(const rs_model *model, const std::string &name, int64_t n, const float **out) {
  *out = nullptr;
  if (!has_weight(model, name)) return RS_OK;
  rs_tensor_info t;
  RS_TRY(rs_model_tensor(model, name.c_str(), &t));
  if (t.type != RS_F32 || t.layout != RS_ROWS || t.rank != 1 || t.shape[0] != n)
    return rs_fail(RS_ERR_FORMAT, "'%s' is not a vector of %lld floats", name.c_str(), static_cast<long long>(n));
  *out = static_cast<const float *>(t.data);
  return RS_OK;
}

}  // namespace

rs_status image_rows(const rs_model *model, const tower_settings &s, int32_t columns, int32_t rows, float *added) {
  image_settings image;
  RS_TRY(read_image_settings(model, s, &image));
  const int64_t c = s.hidden;
  const auto width = static_cast<size_t>(c);
  if (image.prefix) RS_TRY(read_table(model, s.at + "prefix.weight", image.prefix, c, added));
  float *out = added + image.prefix * c;
  if (columns == image.columns && rows == image.rows) {
    RS_TRY(read_table(model, s.at + "position.weight", image.columns * image.rows, c, out));
  } else {
    std::vector<float> table(static_cast<size_t>(image.columns * image.rows) * width);
    RS_TRY(read_table(model, s.at + "position.weight", image.columns * image.rows, c, table.data()));
    const auto scale = [&](int64_t from, int64_t to) {
      return static_cast<double>(from) / (static_cast<double>(to) + image.offset);
    };
    const std::vector<taps> across = cubic_taps(image.columns, columns, scale(image.columns, columns), image.antialias),
                            down = cubic_taps(image.rows, rows, scale(image.rows, rows), image.antialias);
    std::vector<double> sums(static_cast<size_t>(columns) * width);
    for (int32_t y = 0; y < rows; y++) {
      std::fill(sums.begin(), sums.end(), 0.0);
      const taps &v = down[static_cast<size_t>(y)];
      for (size_t i = 0; i < v.at.size(); i++)
        for (int32_t x = 0; x < columns; x++) {
          const taps &h = across[static_cast<size_t>(x)];
          double *sum = sums.data() + static_cast<size_t>(x) * width;
          for (size_t j = 0; j < h.at.size(); j++) {
            const float *from = table.data() + static_cast<size_t>(v.at[i] * image.columns + h.at[j]) * width;
            const double weight = v.weight[i] * h.weight[j];
            for (size_t k = 0; k < width; k++) sum[k] += weight * static_cast<double>(from[k]);
          }
        }
      float *to = out + static_cast<size_t>(y) * static_cast<size_t>(columns) * width;
      for (size_t i = 0; i < sums.size(); i++) to[i] = static_cast<float>(sums[i]);
    }
  }
  const float *b;
  RS_TRY(find_bias(model, s.at + "patch.bias", c, &b));
  for (int64_t i = 0; b && i < static_cast<int64_t>(columns) * rows; i++)
    for (int64_t k = 0; k < c; k++) out[i * c + k] += b[k];
  return RS_OK;
}

// The patch embedding is a convolution whose stride is its size: a linear layer of rows that hold the pixels of a patch.  They come
// as these rows, so that nothing is rearranged here.  Tokens before the patches have pixels of 0, which come to 0 without a bias;
// the bias, positions and those tokens are the rows that are added.
rs_status build_image_input(const rs_model *model, rs_graph *g, const tower_settings &s, const rs_image_grid &grid, rs_tensor **x,
                            rs_tensor **cu_seqlens) {
  image_settings image;
  RS_TRY(read_image_settings(model, s, &image));
  // What image_rows reads is of no operator, but a file where it does not fit is refused all the same.
  rs_tensor_info table;
  const float *bias;
  if (image.prefix) RS_TRY(find_table(model, s.at + "prefix.weight", image.prefix, s.hidden, &table));
  RS_TRY(find_table(model, s.at + "position.weight", image.columns * image.rows, s.hidden, &table));
  RS_TRY(find_bias(model, s.at + "patch.bias", s.hidden, &bias));
  const int64_t tokens = RS_DIM_TOKENS, starts = RS_DIM_CU_SEQLENS, k = 3 * image.patch * image.patch;
  const int64_t pixels_shape[] = {tokens, k},
                added_shape[] = {image.prefix + static_cast<int64_t>(grid.columns) * grid.rows, s.hidden};
  rs_tensor *pixels = rs_input(g, "pixels", RS_F32, 2, pixels_shape);
  rs_tensor *positions = rs_input(g, "positions", RS_I32, 1, &tokens);
  *cu_seqlens = rs_input(g, "cu_seqlens", RS_I32, 1, &starts);
  rs_tensor *patches = rs_linear(g, pixels, weight2(g, s.at + "patch.weight", s.hidden, k), nullptr, RS_ACT_NONE);
  rs_tensor *added = rs_embed(g, positions, rs_constant(g, "added", RS_F32, RS_ROWS, 2, added_shape, grid.added));
  *x = rs_add(g, rs_name(g, patches, "patches"), rs_name(g, added, "positions.rows"));
  return RS_OK;
}

}  // namespace parts
