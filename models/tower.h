// A pre-norm transformer (Vaswani et al., arXiv 1706.03762; Xiong et al., arXiv 2002.04745), which ViT, DINOv2, CLIP, SigLIP and
// ModernBERT are made of, and what an image becomes before its first layer.
//
//   each layer:  h = x + Wo attn(LN(x));  x = h + W2 act(W1 LN(h))
//
// Tensors of the weight file, under a prefix where a model has two towers ("text.", "image."), C hidden, F intermediate size:
//   blk.<i>.attn.norm.{weight,bias} [C]   blk.<i>.attn.qkv.{weight [3C,C], bias [3C]}   blk.<i>.attn.out.{weight [C,C], bias}
//   blk.<i>.mlp.norm.{weight,bias}   blk.<i>.mlp.up.{weight [F,C] or, gated, [2F,C], bias}   blk.<i>.mlp.down.{weight [C,F], bias}
//   patch.weight [C, 3PP]  patch.bias [C] where published   prefix.weight [prefix,C]   position.weight [columns*rows,C]
// A layer scale is part of attn.out and mlp.down; the class token's place in the position table is part of prefix.weight; a bias
// that was not published is zeros.
#pragma once
#include "parts.h"

namespace parts {

struct tower_settings {
  std::string at;   // in front of tensor names
  std::string key;  // in front of metadata keys: "vit.", "clip.image."
  int64_t hidden, intermediate, layers, heads;
  double eps;
  const char *act_name;
  rs_activation act;
  bool gated;   // W1 makes two halves: act(first) second
  bool causal;  // a token sees those up to itself
  // Rotary positions: how far a token sees in each layer, 0 being everywhere.  Layers turn queries and keys by what the dropper
  // carries: the angles (rs_rope_table) of layers that see everywhere, then those of the others.  Empty: none of it.
  std::vector<int64_t> windows;
  bool normed_input;  // the first layer has no attn.norm: what comes before it ends with a norm
};

// What a source calls the parts of a layer, behind the layer's own prefix; each has a weight and a bias.
struct layer_names {
  const char *attn_norm;
  const char *q, *k, *v;  // or all of them in q
  const char *out, *mlp_norm, *up, *down;
  const char *attn_scale, *mlp_scale;  // vectors of a layer scale; nullptr: none
  bool biased = true;                  // every part has a bias; else those that are there
};

rs_status convert_tower_settings(rs_importer &in, tower_settings *s);  // checks them, finds act, writes them
rs_status convert_layer(rs_importer &in, const tower_settings &s, const layer_names &names, const std::string &from, int64_t i);
rs_status convert_norm(rs_importer &in, const std::string &to, const std::string &from, int64_t c, bool biased = true);
// <from>.weight [n, k] and its bias, zeros where there may be none and is none.
rs_status convert_linear(rs_importer &in, const std::string &to, const std::string &from, int64_t n, int64_t k, bool biased = true);
rs_status convert_bias(rs_importer &in, const std::string &to, const std::string &from, int64_t n, bool biased);
// As attn.qkv: the three under each other, the biases that are missing zero.
rs_status convert_qkv(rs_importer &in, const std::string &to, const std::string &q, const std::string &k, const std::string &v,
                      int64_t c);

rs_status read_tower_settings(const rs_model *model, tower_settings *s);  // at and key are given
rs_tensor *build_layers(rs_graph *g, const tower_settings &s, rs_tensor *x, int layers, rs_dropper *dropper);

// ---- images

struct image_settings {
  int64_t patch, prefix;
  int64_t columns, rows;  // of the position table
  bool antialias;         // how another grid is interpolated: as torch's bicubic with antialias=True, or without
  double offset;          // added to a grid before it is divided by that of the table: DINOv2's interpolate_offset
};

// Names of the source.  tokens: [.., C] or [.., k, C] in their order before the patches, with their places in the position table in
// front of the patches' where `placed` of them have one.
struct image_names {
  std::string patch;  // convolution: weight [C,3,P,P], bias where there is one
  std::vector<std::string> tokens;
  size_t placed;
  std::string positions;
};

rs_status convert_image_settings(rs_importer &in, const tower_settings &s, const image_settings &image);
rs_status convert_image_input(rs_importer &in, const tower_settings &s, image_settings *image, const image_names &names);
rs_status read_image_settings(const rs_model *model, const tower_settings &s, image_settings *out);
// rs_family.image_rows
rs_status image_rows(const rs_model *model, const tower_settings &s, int32_t columns, int32_t rows, float *added);
// The states before the first layer, and the input "cu_seqlens".
rs_status build_image_input(const rs_model *model, rs_graph *g, const tower_settings &s, const rs_image_grid &grid, rs_tensor **x,
                            rs_tensor **cu_seqlens);

}  // namespace parts
