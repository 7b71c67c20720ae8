// What a model family is to the rest of rs.  A family is one file of models/ (bert.cpp …) that defines one rs_family, and one
// line of the registry in models.cpp.  It uses rs.h only.
#pragma once
#include "drop.h"

class rs_importer;

struct rs_family {
  const char *name;                  // general.architecture in the weight file, and model_type in config.json
  const char *const *architectures;  // class names of config.json that convert() can read; nullptr at the end

  // Published weights -> metadata and tensors (source.h).  Every tensor must be used or known to be of no use.
  rs_status (*convert)(rs_importer &in);

  // Build the encoder.  Inputs by name: "ids", "type_ids", "positions" [T] i32 and "cu_seqlens" [B+1] i32.  States by name:
  // "embeddings" and "blk.<i>.out" for each layer, [T, C].  Shapes are checked against the file's hyper-parameters here.
  // drop: a schedule for every layer of the model, which rs_dropper carries out, or nullptr.
  rs_status (*build)(const rs_model *model, rs_graph *graph, int layers, const rs_drop_schedule *drop, rs_states *out);

  // What is known to go wrong with such a schedule in this family; nullptr when nothing is.
  const char *(*drop_warning)(const rs_drop_schedule &drop);

  // A head on these states: its logits, [B, labels] or [T, labels].  A head that the file lacks the weights of is told by
  // rs_graph_finish; one that the family has none of is an error.
  rs_status (*head)(const rs_model *model, rs_graph *graph, rs_head head, int64_t labels, const rs_states &states, rs_tensor **out);
};

const rs_family *rs_family_find(const char *name);  // nullptr when there is none
