// What rs.cpp and a backend know of each other.  A backend is a library of its own (librs-cuda.so, made of rs-cuda.cu) that is
// looked for at run time.  This is no part of the API and is not installed: both sides are of one version of rs, which
// backend.version checks.
#pragma once

#include "rs.h"

#include <cstddef>
#include <cstdint>

// Every operator: X(ENUM, name, inputs, by rows: whether row i of the result needs no more than row i of those inputs that have the
// tokens of its level; one level: whether all its tensors have, else it looks for itself).  The list makes the enum, the names and
// the table of functions; section 10 of rs.cpp has one block for each, with name##_infer, name##_work, name##_macs and name##_cpu.
#define RS_OPS(X) \
  X(EMBED, embed, 2, true, true) \
  X(ADD, add, 2, true, true) \
  X(LINEAR, linear, 4, true, true) \
  X(LAYER_NORM, layer_norm, 4, true, true) \
  X(FLASH_ATTN, flash_attn, 5, false, true) \
  X(ATTN_POOL, attn_pool, 5, false, true) \
  X(GATE, gate, 1, true, true) \
  X(ROPE_TABLE, rope_table, 2, true, true) \
  X(ROPE, rope, 2, true, true) \
  X(POOL, pool, 3, false, true) \
  X(L2_NORMALIZE, l2_normalize, 1, true, true) \
  X(SHIFT, shift, 2, true, true) \
  X(CENTRE_DISTANCE, centre_distance, 2, false, true) \
  X(ATTN_COLSUM, attn_colsum, 4, false, true) \
  X(POSITION_SCORE, position_score, 1, false, true) \
  X(STANDARDIZE, standardize, 2, false, true) \
  X(TOKEN_DROP, token_drop, 5, false, false) \
  X(TOKEN_GATHER, token_gather, 2, true, false) \
  X(TOKEN_RESTORE, token_restore, 3, false, false) \
  X(TOKEN_ASSIGN, token_assign, 4, false, false) \
  X(TOKEN_MERGE, token_merge, 7, false, false) \
  X(TOKEN_SIZES, token_sizes, 5, false, false)

enum op_code {
#define X(op, name, n, by_rows, one_level) OP_##op,
  RS_OPS(X)
#undef X
      op_count
};

constexpr int max_sources = 7;  // inputs of an operator

struct op_params {  // each operator uses its own
  rs_activation act;
  rs_pooling pooling;
  float eps, scale, weight;
  int heads;
  int window;  // of attention: how far from a query the keys are that it sees; 0: any
  rs_distance distance;
  bool first_only, random, causal;
  int skip;
  uint64_t seed;
  rs_drop_rule rule;
};

// Tensors of a run are made for a capacity, of which a run uses the first rows.  Runs of one capacity have the same addresses.
enum class backend_place : uint8_t {
  absent,  // an optional input that is left out
  weight,
  input,   // bound by the caller
  starts,  // cu_seqlens of a level behind a drop
  result   // of an operator
};
enum class backend_rows : uint8_t { fixed, tokens, sequences, starts };

struct backend_tensor {
  backend_place place;
  backend_rows rows_are;
  rs_type type;
  rs_layout layout;
  int32_t id;            // in the graph, of what holds the elements: of a view, that of its base
  int32_t level;         // of its tokens, or cu_seqlens: 0 all, k those that the k-th drop leaves
  bool output;           // the caller reads it
  bool of_model;         // weight: lives as long as the model; else as the graph
  int64_t rows;          // capacity
  int64_t cols, stride;  // in elements.  A vector [n] is n rows of one
  int64_t first;         // column of the storage where it begins
  size_t offset;         // result: of the storage in the arena
  const void *data;      // weight: in the caller's memory
  size_t bytes;          // of it
  const char *name;
};

struct backend_op {
  op_code op;
  op_params params;
  backend_tensor out, in[max_sources];
};

struct backend_level {
  int64_t tokens, capacity;
  const int32_t *cu;  // [sequences + 1]; of level 0: of the first input that is one
};
// An input that is not there yet: it is written to where the backend wants it, and nowhere else on the way.  An input of a graph
// has a source in all of its runs, or in none.
struct backend_source {
  // Writes all rows to `to`, `part` at a time, and calls written(of, first, n) when one is there, on the thread that called.
  void (*write)(const void *context, void *to, int64_t part, void (*written)(void *of, int64_t first, int64_t n), void *of);
  const void *context;
  int64_t rows;  // in all
};
struct backend_input {
  int32_t id;
  rs_type type;
  const void *data;  // nullptr: `source` has it
  size_t bytes, capacity;
  backend_source source;
};
struct backend_output {
  int32_t id;
  void *data;
  size_t bytes;
};

// A standardized score of n tokens may be as far from 0 as the root of n, and exp of that no float.
constexpr double fold_z = 64;

struct backend_run {
  uint64_t graph;         // no two graphs have the same
  const backend_op *ops;  // in order: the graph's, but for those of scores where all tokens stay
  size_t n_ops;
  int64_t sequences, sequence_capacity;
  const backend_level *levels;
  size_t n_levels;
  const backend_input *inputs;
  size_t n_inputs;
  const backend_output *outputs;
  size_t n_outputs;
  int32_t starts;  // the input that levels[0].cu is, or -1
  size_t arena_bytes;
  float *seconds;  // [n_ops], of each operator, or nullptr.  An operator that is done together with another one has 0
};

struct backend_error {
  char text[480];
};

struct backend_model;    // weights on a device
struct backend_session;  // a stream, memory, and what is known of graphs

struct backend_device_info {
  char name[128];  // "NVIDIA H100 80GB HBM3, 81,116 MiB, compute capability 9.0, CUDA 13.0"
  size_t memory_bytes;
  double int8_macs, f16_macs, bytes_per_second;  // peaks by the clocks that the device states; 0 where they are not known
};

struct backend {
  uint32_t version, ops;  // backend_version, op_count
  const char *library;    // RS_VERSION
  const char *name;
  int64_t most_tokens;  // of a run, and of the capacity of one that has no more
  rs_status (*count_devices)(int *n, backend_error *error);
  rs_status (*describe)(int device, backend_device_info *out, backend_error *error);
  rs_status (*open_model)(int device, backend_model **out, backend_error *error);
  // Copies a tensor of the file to the device.
  rs_status (*add_weight)(backend_model *model, const rs_tensor_info *tensor, backend_error *error);
  void (*close_model)(backend_model *model);
  rs_status (*open_session)(backend_model *model, backend_session **out, backend_error *error);
  rs_status (*run)(backend_session *session, const backend_run *run, backend_error *error);
  void (*forget_graph)(backend_session *session, uint64_t graph);
  size_t (*session_bytes)(const backend_session *session);
  void (*close_session)(backend_session *session);
};

constexpr uint32_t backend_version = 4;

// The only symbol of a backend's library.
extern "C" const backend *rs_backend_get(void);
