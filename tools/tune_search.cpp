#include "tune_search.h"

#include "drop.h"
#include "pareto.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <random>
#include <set>

bool drop_candidate::drops() const {
  return std::any_of(percent.begin(), percent.end(), [](int p) { return p > 0; });
}

std::string drop_candidate::score() const {
  std::string text;
  for (const std::string &one : scores) text += (text.empty() ? "" : ",") + one;
  return text;
}

candidate_drop::candidate_drop(const drop_candidate &candidate, uint64_t seed) : score_(candidate.score()) {
  for (int p : candidate.percent) ratios_.push_back(p / 100.0);
  while (!ratios_.empty() && ratios_.back() == 0) ratios_.pop_back();
  drop_.ratios = ratios_.data();
  drop_.n_ratios = ratios_.size();
  drop_.score = score_.c_str();
  drop_.mode = candidate.mode;
  drop_.protect = candidate.protect;
  drop_.least = candidate.least;
  drop_.seed = seed;
}

std::string candidate_drop::text() const { return text_of(drop_); }

std::string candidate_key(const drop_candidate &c) {
  std::string key;
  for (int p : c.percent) key += std::to_string(p) + ",";
  return key + c.score() + join(" ", int(c.mode), " ", int(c.protect), " ", c.least);
}

const std::vector<std::string> tried_scores = {"norm-mlp-attention",
                                               "norm-mlp-attention+first",
                                               "norm-mlp:out-attention:out",
                                               "-mlp:out+0.5first",
                                               "-mlp+norm",
                                               "-mlp",
                                               "mlp",
                                               "norm",
                                               "-mlp+centre",
                                               "centre",
                                               "attn-colsum",
                                               "attn-cls",
                                               "-attention",
                                               "attention",
                                               "-block",
                                               "block",
                                               "-mlp:cos",
                                               "mlp:cos",
                                               "-mlp:out",
                                               "mlp:out",
                                               "-norm",
                                               "-centre",
                                               "norm+attn-colsum",
                                               "attn-colsum+0.5attention",
                                               "attention+centre",
                                               "random",
                                               "first"};

static std::vector<std::string> image_scores() {
  std::vector<std::string> list = {
      "attn-colsum+0.5attention", "attention+centre", "attn-colsum", "attention", "centre", "norm", "random"};
  for (const std::string &score : tried_scores)
    if (std::find(list.begin(), list.end(), score) == list.end()) list.push_back(score);
  return list;
}
const std::vector<std::string> tried_image_scores = image_scores();

// Random permutation of 0 to n - 1, the same on every platform.
static std::vector<size_t> shuffled(size_t n, uint64_t seed) {
  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), size_t(0));
  std::mt19937_64 random(seed);
  for (size_t i = n; i > 1; --i) std::swap(order[i - 1], order[random() % i]);
  return order;
}

drop_candidate simplest(drop_candidate c) {
  if (c.scores.size() == 1) return c;
  std::string last;
  for (size_t i = 0; i < c.percent.size(); ++i)
    if (c.percent[i] > 0 && last.empty()) last = c.scores[i];
  for (size_t i = 0; i < c.percent.size(); ++i) {
    if (c.percent[i] > 0) last = c.scores[i];
    else c.scores[i] = last;
  }
  if (std::adjacent_find(c.scores.begin(), c.scores.end(), std::not_equal_to<>()) == c.scores.end()) c.scores.resize(1);
  return c;
}

namespace {

constexpr int screened = 30;         // percent that are dropped while scores are compared
constexpr size_t least_judged = 6;   // candidates that every rung sees, whatever they cost
constexpr size_t first_choice = 48;  // that go from the first rung to the second; a third of these to the third
constexpr int most_dropped = 90;

// Shares of the work after which each stage ends.
constexpr double screen_end = 0.3, schedules_end = 0.55, halving_end = 0.75;

struct way {  // how tokens are chosen, and what becomes of them
  std::string score;
  rs_drop_mode mode;
};

class search {
 public:
  search(tune_judge *judge, const search_settings &settings, const std::function<void(double, const std::string &)> &on_progress)
      : judge_(judge), settings_(settings), on_progress_(on_progress), last_(judge->rungs() - 1), known_(judge->rungs()) {
    // Behind the last layer nothing is left to save.
    for (int at : {settings.layers / 6, settings.layers / 2, settings.layers * 2 / 3})
      if (at <= settings.layers - 2 && (depths_.empty() || at > depths_.back())) depths_.push_back(at);
  }

  std::vector<search_result> run() {
    scores_ = settings_.scores.empty() ? tried_scores : settings_.scores;
    if (depths_.empty()) fail("token dropping saves nothing in a model of one layer");
    screen();
    schedules();
    halve();
    refine();
    return std::move(found_);
  }

 private:
  // ---------------------------------------------------------------------------------------- judging

  struct judged {
    drop_candidate candidate;
    double loss, share;
  };

  double cutoff() const { return settings_.max_loss > 0 ? 3 * settings_.max_loss + 0.02 : 0.5; }
  bool spent(double share) const { return spent_ >= share * settings_.work || (settings_.time && settings_.time() >= share); }

  const judged *known(size_t rung, const drop_candidate &candidate) const {
    auto found = index_.find({rung, candidate_key(candidate)});
    return found == index_.end() ? nullptr : &known_[rung][found->second];
  }

  // nullptr where the model cannot do it.
  const judged *judge(size_t rung, const drop_candidate &candidate) {
    if (const judged *before = known(rung, candidate)) return before;
    if (!judge_->possible(candidate)) return nullptr;
    judged result{candidate, 0, judge_->share(candidate)};
    result.loss = judge_->loss(rung, candidate);
    if (std::isnan(result.loss)) result.loss = 1;
    spent_ += judge_->work(rung) * result.share;
    if (on_progress_) on_progress_(settings_.work > 0 ? spent_ / settings_.work : 1, stage_);
    index_[{rung, candidate_key(candidate)}] = known_[rung].size();
    known_[rung].push_back(result);
    if (rung == last_) found_.push_back({candidate, result.loss, result.share});
    return &known_[rung].back();
  }

  drop_candidate candidate(const way &how, const std::vector<std::pair<int, int>> &drops) const {
    drop_candidate c;
    c.percent.assign(size_t(settings_.layers), 0);
    for (auto [layer, percent] : drops) c.percent[size_t(layer)] = percent;
    c.scores = {how.score};
    c.mode = how.mode;
    return c;
  }

  // ---------------------------------------------------------------------------------------- which scores and modes

  // Each way on its own at a few depths; restore and fold only for scores that did well.
  void screen() {
    stage_ = "scores";
    for (const std::string &score : scores_)
      for (rs_drop_mode mode : {RS_DROP_PRUNE, RS_DROP_MERGE}) screen({score, mode});
    std::set<std::string> best;
    for (const auto &[how, loss] : ranked())
      if (best.size() < 4) best.insert(how.score);
    for (const std::string &score : scores_)
      if (best.count(score) > 0)
        for (rs_drop_mode mode : {RS_DROP_RESTORE, RS_DROP_FOLD}) screen({score, mode});
    for (const auto &[how, loss] : ranked())
      if (ways_.size() < 5) ways_.push_back(how);
    if (ways_.empty()) fail("none of the scores can be used with this model");
  }

  void screen(const way &how) {
    if (spent(screen_end) && screened_.size() >= 4) return;
    std::vector<double> losses;
    for (int depth : depths_) {
      const judged *result = judge(0, candidate(how, {{depth, screened}}));
      if (!result) return;
      losses.push_back(result->loss);
    }
    screened_.push_back({how, losses});
  }

  struct screened_way {
    way how;
    std::vector<double> losses;  // by depth
  };

  std::vector<std::pair<way, double>> ranked() const {
    std::vector<std::pair<way, double>> list;
    for (const screened_way &s : screened_)
      list.emplace_back(s.how, std::accumulate(s.losses.begin(), s.losses.end(), 0.0) / double(s.losses.size()));
    std::stable_sort(list.begin(), list.end(), [](const auto &a, const auto &b) { return a.second < b.second; });
    return list;
  }

  // For every layer the score that did best at the nearest depth.
  std::vector<std::string> best_scores(rs_drop_mode mode) const {
    std::vector<std::string> by_depth;
    for (size_t d = 0; d < depths_.size(); ++d) {
      const screened_way *best = nullptr;
      for (const screened_way &s : screened_)
        if (s.how.mode == mode && (!best || s.losses[d] < best->losses[d])) best = &s;
      if (!best) return {};
      by_depth.push_back(best->how.score);
    }
    std::vector<std::string> scores;
    for (int layer = 0; layer < settings_.layers; ++layer) {
      size_t nearest = 0;
      for (size_t d = 1; d < depths_.size(); ++d)
        if (std::abs(depths_[d] - layer) < std::abs(depths_[nearest] - layer)) nearest = d;
      scores.push_back(by_depth[nearest]);
    }
    return scores;
  }

  // ---------------------------------------------------------------------------------------- which layers, how much

  std::vector<std::vector<std::pair<int, int>>> patterns() const {
    // At most six places, evenly over the layers.
    std::vector<int> places;
    const int usable = settings_.layers - 1, count = std::min(usable, 6);
    for (int i = 0; i < count; ++i) places.push_back(i * usable / count);
    std::vector<std::vector<std::pair<int, int>>> list;
    for (size_t a = 0; a < places.size(); ++a) {
      for (int percent : {15, 30, 45, 60}) list.push_back({{places[a], percent}});
      for (size_t b = a + 1; b < places.size(); ++b)
        for (int percent : {15, 25, 40}) list.push_back({{places[a], percent}, {places[b], percent}});
      for (int percent : {10, 15, 25}) {
        std::vector<std::pair<int, int>> rest;
        for (size_t b = a; b < places.size(); ++b) rest.emplace_back(places[b], percent);
        if (rest.size() > 2) list.push_back(rest);
      }
    }
    return list;
  }

  void schedules() {
    stage_ = "schedules";
    std::vector<drop_candidate> list;
    std::set<rs_drop_mode> modes;
    for (const way &how : ways_) {
      for (const auto &pattern : patterns()) list.push_back(candidate(how, pattern));
      if (!modes.insert(how.mode).second) continue;
      const std::vector<std::string> scores = best_scores(how.mode);
      if (std::adjacent_find(scores.begin(), scores.end(), std::not_equal_to<>()) == scores.end()) continue;
      for (const auto &pattern : patterns()) {
        if (pattern.size() < 2) continue;
        drop_candidate mixed = candidate(how, pattern);
        mixed.scores = scores;
        mixed = simplest(std::move(mixed));
        if (mixed.scores.size() > 1) list.push_back(std::move(mixed));
      }
    }
    for (size_t i : shuffled(list.size(), settings_.seed + 1)) {
      if (spent(schedules_end) && known_[0].size() >= least_judged) return;
      if (!hopeless(list[i])) judge(0, list[i]);
    }
  }

  // Did dropping less in the same way lose too much already?
  bool hopeless(const drop_candidate &c) const {
    return std::any_of(known_[0].begin(), known_[0].end(), [&](const judged &k) {
      if (k.loss <= cutoff() || k.candidate.mode != c.mode || k.candidate.scores != c.scores) return false;
      for (size_t i = 0; i < c.percent.size(); ++i)
        if (k.candidate.percent[i] > c.percent[i]) return false;
      return true;
    });
  }

  // ---------------------------------------------------------------------------------------- successive halving

  // The best of those that a rung has seen: front by front, and of a front first what loses about as much as is allowed.
  std::vector<drop_candidate> best_of(size_t rung, size_t count) const {
    std::vector<const judged *> list;
    for (const judged &k : known_[rung])
      if (k.loss <= cutoff()) list.push_back(&k);
    if (list.size() < least_judged)  // everything loses too much: then what loses least
      for (const judged &k : known_[rung])
        if (k.loss > cutoff()) list.push_back(&k);
    std::vector<tradeoff> tradeoffs;
    for (const judged *k : list) tradeoffs.push_back({-k->loss, k->share});
    const std::vector<size_t> ranks = pareto_ranks(tradeoffs);
    std::vector<size_t> order(list.size());
    std::iota(order.begin(), order.end(), size_t(0));
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
      if (ranks[a] != ranks[b]) return ranks[a] < ranks[b];
      return distance(*list[a]) < distance(*list[b]);
    });
    std::vector<drop_candidate> best;
    for (size_t i : order)
      if (best.size() < count) best.push_back(list[i]->candidate);
    return best;
  }

  double distance(const judged &k) const { return settings_.max_loss > 0 ? std::fabs(k.loss - settings_.max_loss) : k.loss; }

  void halve() {
    size_t count = first_choice;
    for (size_t rung = 1; rung <= last_; ++rung, count = std::max(least_judged, count / 3)) {
      stage_ = rung < last_ ? "halving" : "all data";
      size_t judged_here = 0;
      for (const drop_candidate &c : best_of(rung - 1, count)) {
        if (spent(halving_end) && judged_here >= least_judged) break;
        judge(rung, c);
        ++judged_here;
      }
    }
  }

  // ---------------------------------------------------------------------------------------- refinement

  // What lies beside the front, until nothing there is better or the work is spent.
  void refine() {
    stage_ = "refining";
    constexpr int generations = 8;
    for (int generation = 0; generation < generations; ++generation) {
      bool better = false;
      for (const drop_candidate &c : front()) {
        for (const drop_candidate &neighbour : neighbours(c)) {
          if (spent(1)) return;
          better |= try_out(neighbour);
        }
      }
      if (!better) return;
    }
  }

  std::vector<drop_candidate> front() const {
    std::vector<tradeoff> tradeoffs;
    for (const judged &k : known_[last_]) tradeoffs.push_back({-k.loss, k.share});
    std::vector<const judged *> list;
    for (size_t i : pareto_front(tradeoffs))
      if (known_[last_][i].loss <= cutoff()) list.push_back(&known_[last_][i]);
    std::stable_sort(list.begin(), list.end(), [&](const judged *a, const judged *b) { return distance(*a) < distance(*b); });
    std::vector<drop_candidate> candidates;
    for (const judged *k : list) candidates.push_back(k->candidate);
    return candidates;
  }

  // Is it better than all that is known, first on less data and then on all?
  bool try_out(const drop_candidate &c) {
    if (known(last_, c)) return false;
    if (last_ > 0) {
      const judged *before = judge(last_ - 1, c);
      if (!before || before->loss > cutoff() || beaten(last_ - 1, *before)) return false;
    }
    const judged *result = judge(last_, c);
    return result && !beaten(last_, *result);
  }

  bool beaten(size_t rung, const judged &one) const {
    return std::any_of(known_[rung].begin(), known_[rung].end(), [&](const judged &k) {
      return k.loss <= one.loss && k.share <= one.share && (k.loss < one.loss || k.share < one.share);
    });
  }

  std::vector<drop_candidate> neighbours(const drop_candidate &c) const {
    std::vector<drop_candidate> list;
    const auto add = [&](drop_candidate changed) {
      if (changed.drops()) list.push_back(simplest(std::move(changed)));
    };
    const size_t usable = size_t(settings_.layers - 1);
    for (size_t layer = 0; layer < usable; ++layer) {
      drop_candidate changed = c;
      if (c.percent[layer] == 0) {
        changed.percent[layer] = 10;
        add(changed);
        continue;
      }
      for (int step : {5, -5, 15, -15}) {
        changed.percent[layer] = std::clamp(c.percent[layer] + step, 0, most_dropped);
        if (changed.percent[layer] != c.percent[layer]) add(changed);
      }
      for (size_t other : {layer - 1, layer + 1}) {
        if (other >= usable || c.percent[other] > 0) continue;
        changed = c;
        std::swap(changed.percent[layer], changed.percent[other]);
        add(changed);
      }
      for (const way &how : ways_) {
        changed = c;
        if (changed.scores.size() == 1) changed.scores.assign(size_t(settings_.layers), c.scores[0]);
        if (changed.scores[layer] == how.score) continue;
        changed.scores[layer] = how.score;
        add(changed);
      }
    }
    for (rs_drop_mode mode : {RS_DROP_PRUNE, RS_DROP_RESTORE, RS_DROP_MERGE, RS_DROP_FOLD}) {
      drop_candidate changed = c;
      changed.mode = mode;
      if (mode != c.mode) add(changed);
    }
    for (rs_drop_protect protect : {RS_PROTECT_CLS, RS_PROTECT_SPECIAL}) {
      drop_candidate changed = c;
      changed.protect = protect;
      if (protect != c.protect) add(changed);
    }
    for (int32_t least : {0, 8, 16, 32}) {
      drop_candidate changed = c;
      changed.least = least;
      if (least != c.least) add(changed);
    }
    return list;
  }

  tune_judge *judge_;
  const search_settings &settings_;
  const std::function<void(double, const std::string &)> &on_progress_;
  size_t last_;                                             // rung
  std::vector<int> depths_;                                 // layers behind which scores are compared
  std::vector<std::vector<judged>> known_;                  // by rung
  std::map<std::pair<size_t, std::string>, size_t> index_;  // into known_
  std::vector<std::string> scores_;
  std::vector<screened_way> screened_;
  std::vector<way> ways_;
  std::vector<search_result> found_;
  std::string stage_;
  double spent_ = 0;
};

}  // namespace

std::vector<search_result> search_schedules(tune_judge *judge, const search_settings &settings,
                                            const std::function<void(double, const std::string &)> &on_progress) {
  return search(judge, settings, on_progress).run();
}
