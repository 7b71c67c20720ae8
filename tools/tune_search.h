// The search for schedules of token dropping: what to try, on how much data, and what to go on with.  Knows nothing of models, data
// or clocks, so that the same judge gives the same result.
#pragma once
#include "common.h"

#include <cstdint>
#include <functional>

struct drop_candidate {
  std::vector<int> percent;         // dropped behind each layer
  std::vector<std::string> scores;  // one for all layers, or one a layer
  rs_drop_mode mode = RS_DROP_PRUNE;
  rs_drop_protect protect = RS_PROTECT_CLS;
  int32_t least = 0;

  bool drops() const;
  std::string score() const;
};

// One score where all layers that drop have the same; else the others have that of the layer before, which makes no difference.
drop_candidate simplest(drop_candidate candidate);

// The same as the library takes it.
class candidate_drop {
 public:
  candidate_drop(const drop_candidate &candidate, uint64_t seed);
  candidate_drop(const candidate_drop &) = delete;
  candidate_drop &operator=(const candidate_drop &) = delete;
  const rs_drop *get() const { return &drop_; }
  std::string text() const;  // as rs_drop_format writes it

 private:
  std::vector<double> ratios_;
  std::string score_;
  rs_drop drop_ = sized<rs_drop>();
};

// What stands for one candidate among others.
std::string candidate_key(const drop_candidate &candidate);

class tune_judge {
 public:
  virtual ~tune_judge() = default;
  virtual size_t rungs() const = 0;                                       // parts of the data, each of them in the next
  virtual double work(size_t rung) const = 0;                             // of a look at it without dropping, in any unit
  virtual double share(const drop_candidate &candidate) = 0;              // of the arithmetic that is left
  virtual bool possible(const drop_candidate &candidate) = 0;             // can the model run it at all?
  virtual double loss(size_t rung, const drop_candidate &candidate) = 0;  // 0: none; NaN counts as all
};

struct search_settings {
  int layers = 0;
  uint64_t seed = 0;
  double max_loss = 0;                   // what is of interest ends not far behind; 0: not known
  double work = 0;                       // that may be spent
  std::vector<std::string> scores = {};  // in the order in which they are tried, for as long as the work lasts; empty: tried_scores
  std::function<double()> time = {};     // the share of the time that is gone, where that is limited too
};

struct search_result {
  drop_candidate candidate;
  double loss;  // on all data
  double share;
};

// Scores that are tried, best guesses first.
extern const std::vector<std::string> tried_scores;
extern const std::vector<std::string> tried_image_scores;  // the same, those first that did well on images

// Every candidate that was judged on all data, in the order in which it was.  `on_progress`: the share of the work that is done,
// and what is being done.
std::vector<search_result> search_schedules(tune_judge *judge, const search_settings &settings,
                                            const std::function<void(double, const std::string &)> &on_progress = {});
