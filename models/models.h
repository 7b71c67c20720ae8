// What a model family is to the rest of rs.  A family is one file of models/ (bert.cpp …) that defines one rs_family, and one
// line of the registry in models.cpp.  It uses rs.h only.
#pragma once
#include "drop.h"

class rs_importer;

// A model has one or two towers, each an encoder of one kind of input.
enum class rs_tower { text, image };

struct rs_tower_shape {
  int32_t hidden = 0;  // of a state; 0: the model has no such tower
  int32_t layers = 0, heads = 0;
};
struct rs_model_shape {
  rs_tower_shape text, image;
  int32_t dim = 0;                        // of an embedding
  bool drops_texts = false;               // build() takes a schedule for the text tower
  int32_t vocab = 0, positions = 0;       // of the text tower
  int32_t types = 0;                      // the same; 0: it takes no type ids
  int32_t patch = 0, prefix = 0;          // of the image tower: pixels along a patch; tokens before the patches
  float logit_scale = 0, logit_bias = 0;  // of models that compare texts with images
  const rs_tower_shape &of(rs_tower t) const { return t == rs_tower::text ? text : image; }
};

// Patches of an image, and what is added to each token, which depends on them: rows [prefix + columns * rows, C] f32, 64-byte
// aligned, longer-lived than the graph.
struct rs_image_grid {
  int32_t columns, rows;
  const float *added;
};

struct rs_family {
  const char *name;                  // general.architecture in the weight file
  const char *const *types;          // model_type of config.json; nullptr at the end
  const char *const *architectures;  // class names of config.json that convert() can read; nullptr at the end

  // What the converted model will take.
  rs_status (*inputs)(rs_importer &in, bool *texts, bool *images);

  // Published weights -> metadata and tensors (source.h).  Every tensor must be used or known to be of no use.
  rs_status (*convert)(rs_importer &in);

  // What the metadata of a file say, checked.
  rs_status (*shape)(const rs_model *model, rs_model_shape *out);

  // Build a tower.  Inputs by name: "positions" [T] i32 and "cu_seqlens" [B+1] i32; for texts, "ids" and "type_ids" [T] i32; for
  // images, "pixels" [T, 3 patch patch] f32: of a patch all channels, each row by row; zeros for tokens before the patches.
  // States by name: "embeddings" and "blk.<i>.out" for each layer, [T, C].  Shapes are checked against the file's
  // hyper-parameters here.  drop: a schedule for every layer of the tower, which rs_dropper carries out, or nullptr.
  rs_status (*build)(const rs_model *model, rs_graph *graph, rs_tower tower, int layers, const rs_drop_schedule *drop,
                     const rs_image_grid *grid, rs_states *out);

  // What is known to go wrong with such a schedule in this family; nullptr when nothing is, and no function where
  // nothing ever is.
  const char *(*drop_warning)(const rs_drop_schedule &drop);

  // A head on these states: its logits, [B, labels] or [T, labels].  A head that the file lacks the weights of is told by
  // rs_graph_finish; one that the family has none of is an error.
  rs_status (*head)(const rs_model *model, rs_graph *graph, rs_head head, int64_t labels, const rs_states &states, rs_tensor **out);

  // The rows of rs_image_grid for so many columns and rows.  nullptr where there is no image tower.
  rs_status (*image_rows)(const rs_model *model, int32_t columns, int32_t rows, float *added);

  // The model's own embedding of these states, [B, dim], where it is more than a pooling; nullptr where it never is.
  rs_tensor *(*embed)(const rs_model *model, rs_graph *graph, rs_tower tower, const rs_states &states);
};

const rs_family *rs_family_find(const char *name);  // nullptr when there is none
