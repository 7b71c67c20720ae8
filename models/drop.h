// Token dropping in the graph of any family: what a schedule (rs_drop) means, and the operators that carry it out.  Uses rs.h only.
#pragma once
#include "../rs.h"

#include <string>
#include <vector>

// An rs_drop that owns what it points to.
struct rs_owned_drop : rs_drop {
  std::vector<double> ratio_values;
  std::vector<int32_t> keep_values;
  std::string score_text;
  rs_owned_drop() : rs_drop{} {}
  explicit rs_owned_drop(const rs_drop &drop);
  rs_owned_drop(const rs_owned_drop &other) : rs_owned_drop(static_cast<const rs_drop &>(other)) {}
  rs_owned_drop &operator=(const rs_owned_drop &) = delete;
  void point();  // the pointers of rs_drop to the values here
};
rs_status rs_drop_check_fields(const rs_drop &drop);    // what must hold before any of it is used
bool rs_drop_same(const rs_drop &a, const rs_drop &b);  // allocates nothing

enum class rs_score_source { mlp, attention, block, norm, centre, attn_colsum, attn_cls, random, first };
enum class rs_score_reading { added, out, bare };  // of mlp and attention: rs.h
struct rs_score_term {
  rs_score_source source = rs_score_source::mlp;
  rs_score_reading reading = rs_score_reading::added;
  rs_distance distance = RS_DISTANCE_L2;
  float weight = 1;
};

// A schedule that was checked against a number of layers.
struct rs_drop_schedule {
  struct layer {
    bool drops = false;
    rs_drop_rule rule = {};
    std::vector<rs_score_term> score;
  };
  std::vector<layer> layers;
  rs_drop_mode mode = RS_DROP_PRUNE;
  rs_drop_protect protect = RS_PROTECT_CLS;
  uint64_t seed = 0;

  bool drops() const;  // anywhere
  // Protected tokens are told by the input "protect", not only by place.
  bool needs_flags() const { return protect == RS_PROTECT_SPECIAL || protect == RS_PROTECT_PREFIX; }
};
rs_status rs_drop_resolve(const rs_drop &drop, int layers, rs_drop_schedule *out);

// The states of one layer, [T, C] each; what is not there may be nullptr, and a score that needs it then fails the graph.
struct rs_layer_states {
  rs_tensor *x;     // what goes in
  rs_tensor *attn;  // what attention adds
  rs_tensor *h;     // after attention, with its residual (and norm, where that comes after)
  rs_tensor *mlp;   // what the MLP adds
  rs_tensor *y;     // what comes out
};

// What rs_flash_attn is of, but for which tokens there are: q, k, v [T, C].
struct rs_attention {
  rs_tensor *q, *k, *v;
  int heads;
  float scale;
  bool causal = false;
  int window = 0;  // 0: all; or how far away what is seen may be, and then causal is false
};

// What an encoder ends with.  What fails on the way is told by rs_graph_finish, so that tensors may be nullptr.
struct rs_states {
  rs_tensor *x;           // [T, C]
  rs_tensor *cu_seqlens;  // [B + 1]
  rs_tensor *sizes;       // [T, 1] how many tokens each stands for; nullptr: one
};

// Goes along while a family builds its layers.  With a schedule that drops nothing, or nullptr, it adds nothing.
class rs_dropper {
 public:
  rs_dropper(rs_graph *graph, const rs_drop_schedule *schedule, rs_tensor *cu_seqlens);
  // Attention of a layer, among the tokens that are left.  What the layer's score takes of it is made here, so that q and k need
  // not be kept any longer.
  rs_tensor *attention(int layer, const rs_attention &a);
  // What else belongs to the tokens, [T, ..], and is of use to the layers that follow: it loses those that are dropped, too. Tokens
  // that became one keep the row of the one that stays; a further token of RS_DROP_FOLD has the mean of those that it is made of.
  // nullptr: nothing, but a place among the others.
  void carry(rs_tensor *x) { carried_.push_back(x); }
  rs_tensor *carried(size_t i) const { return carried_[i]; }  // in the order of carry()
  // The states that the next layer gets, after attention() of this one.  Names what it finds: drop.<layer>.score, .kept, .into.
  rs_tensor *after_layer(int layer, const rs_layer_states &states);
  rs_states finish(rs_tensor *x) const;

 private:
  rs_tensor *cu_seqlens() const { return now_.cu_seqlens; }
  rs_tensor *sizes() const { return now_.sizes; }
  const rs_drop_schedule::layer *dropping(int layer) const;  // nullptr: that layer drops nothing
  rs_tensor *term(int layer, const rs_score_term &t, const rs_layer_states &s);
  rs_tensor *score(int layer, const std::vector<rs_score_term> &terms, const rs_layer_states &s, bool *lowest);

  rs_graph *g_;
  const rs_drop_schedule *schedule_;
  rs_tensor *protect_ = nullptr;
  rs_states all_, now_;
  std::vector<rs_tensor *> carried_;
  std::vector<rs_tensor *> of_attention_;  // the terms of the layer's score that are; nullptr where one is not
  struct dropped {
    rs_tensor *kept, *before;
  };
  std::vector<dropped> dropped_;  // to be restored
};
