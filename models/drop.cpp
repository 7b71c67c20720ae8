// Token dropping: schedules as structs and as text, scores, and their operators.
#include "drop.h"

#include "status.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <string_view>

namespace {

// ---------------------------------------------------------------------------------------- names

constexpr const char *mode_names[] = {"prune", "restore", "merge", "fold"};
constexpr const char *protect_names[] = {"cls", "special", "none", "prefix"};
constexpr const char *score_names[] = {"mlp", "attention", "block", "norm", "centre", "attn-colsum", "attn-cls", "random", "first"};
constexpr const char *score_list = "mlp, attention, block, norm, centre, attn-colsum, attn-cls, random, first";

template <size_t n>
int find_name(const char *const (&names)[n], std::string_view name) {
  for (size_t i = 0; i < n; i++)
    if (name == names[i]) return static_cast<int>(i);
  return -1;
}

// ---------------------------------------------------------------------------------------- scores

// "-mlp", "norm-0.5mlp:out:cos": terms with signs between them.
constexpr size_t most_terms = 16;  // more than anybody needs, and little to keep for each layer

class score_parser {
 public:
  score_parser(std::string_view text, std::vector<rs_score_term> *out) : all_(text), left_(text), out_(out) {}

  rs_status parse() {
    while (!left_.empty() || out_->empty()) {
      rs_score_term t;
      RS_TRY(sign(&t));
      RS_TRY(number(&t));
      RS_TRY(source(&t));
      while (take(':')) RS_TRY(option(&t));
      RS_TRY(check(t));
      if (out_->size() == most_terms) return wrong("more than " + std::to_string(most_terms) + " terms");
      out_->push_back(t);
    }
    return RS_OK;
  }

 private:
  bool take(char c) {
    if (left_.empty() || left_[0] != c) return false;
    left_.remove_prefix(1);
    return true;
  }

  rs_status sign(rs_score_term *t) {
    if (take('-')) t->weight = -1;
    else if (!take('+') && !out_->empty()) return wrong("expected + or - between terms");
    return RS_OK;
  }

  rs_status number(rs_score_term *t) {
    if (left_.empty() || (left_[0] != '.' && (left_[0] < '0' || left_[0] > '9'))) return RS_OK;
    float weight = 0;
    const auto [end, error] = std::from_chars(left_.data(), left_.data() + left_.size(), weight, std::chars_format::fixed);
    if (error != std::errc() || !(weight > 0) || !std::isfinite(weight)) return wrong("expected a positive weight");
    left_.remove_prefix(static_cast<size_t>(end - left_.data()));
    t->weight *= weight;
    return RS_OK;
  }

  rs_status source(rs_score_term *t) {
    size_t longest = 0;
    for (size_t i = 0; i < std::size(score_names); i++) {
      const std::string_view name = score_names[i];
      if (left_.substr(0, name.size()) != name || name.size() <= longest) continue;
      longest = name.size();
      t->source = static_cast<rs_score_source>(i);
    }
    if (!longest) return wrong("expected one of " + std::string(score_list));
    left_.remove_prefix(longest);
    return RS_OK;
  }

  rs_status option(rs_score_term *t) {
    const std::string_view word = left_.substr(0, left_.find_first_of(":+-"));
    if (word == "l2") t->distance = RS_DISTANCE_L2;
    else if (word == "l1") t->distance = RS_DISTANCE_L1;
    else if (word == "cos") t->distance = RS_DISTANCE_COS;
    else if (word == "out") t->reading = rs_score_reading::out;
    else if (word == "bare") t->reading = rs_score_reading::bare;
    else return wrong("expected l2, l1, cos, out or bare behind ':'");
    left_.remove_prefix(word.size());
    return RS_OK;
  }

  rs_status check(const rs_score_term &t) const {
    const bool half = t.source == rs_score_source::mlp || t.source == rs_score_source::attention;
    const bool shift = half || t.source == rs_score_source::block;
    if (t.reading != rs_score_reading::added && !half) return wrong("only mlp and attention have :out and :bare");
    if (t.distance == RS_DISTANCE_COS && !shift) return wrong("only mlp, attention and block have :cos");
    if (t.distance == RS_DISTANCE_L1 && !shift && t.source != rs_score_source::norm)
      return wrong("only mlp, attention, block and norm have :l1");
    return RS_OK;
  }

  rs_status wrong(const std::string &what) const {
    const std::string text(all_.substr(0, 100)), at(left_.substr(0, 100));
    return rs_fail(RS_ERR_ARGUMENT, "score '%s': at '%s': %s", text.c_str(), at.c_str(), what.c_str());
  }

  std::string_view all_, left_;
  std::vector<rs_score_term> *out_;
};

std::vector<std::string_view> split(std::string_view text, char by) {
  std::vector<std::string_view> parts;
  for (size_t at = 0;;) {
    const size_t end = text.find(by, at);
    parts.push_back(text.substr(at, end == std::string_view::npos ? end : end - at));
    if (end == std::string_view::npos) return parts;
    at = end + 1;
  }
}

// ---------------------------------------------------------------------------------------- text

template <class T>
rs_status parse_number(const char *what, std::string_view text, T *out) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *out);
  if (error == std::errc() && end == text.data() + text.size() && !text.empty()) return RS_OK;
  return rs_fail(RS_ERR_ARGUMENT, "%s: '%s' is not a number", what, std::string(text.substr(0, 40)).c_str());
}

template <class T>
rs_status parse_numbers(const char *what, std::string_view text, std::vector<T> *out) {
  for (const std::string_view part : split(text, ',')) {
    T value;
    RS_TRY(parse_number(what, part, &value));
    out->push_back(value);
  }
  return RS_OK;
}

template <class T>
void append_numbers(std::string *text, const T *values, size_t n) {
  for (size_t i = 0; i < n; i++) {
    char digits[64];
    const auto result = std::to_chars(digits, digits + sizeof digits, values[i]);
    if (i) *text += ',';
    text->append(digits, result.ptr);
  }
}

rs_status parse_word(std::string_view word, rs_owned_drop *d) {
  const size_t equals = word.find('=');
  const std::string_view key = word.substr(0, equals), value = equals == std::string_view::npos ? "" : word.substr(equals + 1);
  const auto choice = [&](const auto &names, const char *known, int *out) {
    *out = find_name(names, value);
    return *out >= 0 ? RS_OK
                     : rs_fail(RS_ERR_ARGUMENT, "%s: '%s', expected %s", std::string(key).c_str(),
                               std::string(value.substr(0, 40)).c_str(), known);
  };
  int i;
  if (key == "ratios") return parse_numbers("ratios", value, &d->ratio_values);
  if (key == "keeps") return parse_numbers("keeps", value, &d->keep_values);
  if (key == "min") return parse_number("min", value, &d->least);
  if (key == "seed") return parse_number("seed", value, &d->seed);
  if (key == "score") {
    d->score_text = value;
    return RS_OK;
  }
  if (key == "mode") {
    RS_TRY(choice(mode_names, "prune, restore, merge or fold", &i));
    d->mode = static_cast<rs_drop_mode>(i);
    return RS_OK;
  }
  if (key == "protect") {
    RS_TRY(choice(protect_names, "cls, special, none or prefix", &i));
    d->protect = static_cast<rs_drop_protect>(i);
    return RS_OK;
  }
  return rs_fail(RS_ERR_ARGUMENT,
                 "'%s', expected ratios=, keeps=, score=, mode=, protect=, min= or seed=", std::string(word.substr(0, 40)).c_str());
}

const char *score_of(const rs_drop &d) { return d.score && *d.score ? d.score : "mlp"; }

}  // namespace

// ---------------------------------------------------------------------------------------- schedules

rs_owned_drop::rs_owned_drop(const rs_drop &drop)
    : rs_drop(drop),
      ratio_values(drop.ratios, drop.ratios + drop.n_ratios),
      keep_values(drop.keeps, drop.keeps + drop.n_keeps),
      score_text(score_of(drop)) {
  point();
}

void rs_owned_drop::point() {
  size = sizeof(rs_drop);
  ratios = ratio_values.data(), n_ratios = ratio_values.size();
  keeps = keep_values.data(), n_keeps = keep_values.size();
  score = score_text.c_str();
}

bool rs_drop_same(const rs_drop &a, const rs_drop &b) {
  return std::equal(a.ratios, a.ratios + a.n_ratios, b.ratios, b.ratios + b.n_ratios) &&
         std::equal(a.keeps, a.keeps + a.n_keeps, b.keeps, b.keeps + b.n_keeps) && !strcmp(score_of(a), score_of(b)) &&
         a.mode == b.mode && a.protect == b.protect && a.least == b.least && a.seed == b.seed;
}

bool rs_drop_schedule::drops() const {
  return std::any_of(layers.begin(), layers.end(), [](const layer &l) { return l.drops; });
}

rs_status rs_drop_check_fields(const rs_drop &d) {
  if ((d.n_ratios && !d.ratios) || (d.n_keeps && !d.keeps))
    return rs_fail(RS_ERR_ARGUMENT, "a drop schedule of %zu ratios and %zu counts that are not there", d.n_ratios, d.n_keeps);
  if (d.mode < RS_DROP_PRUNE || d.mode > RS_DROP_FOLD) return rs_fail(RS_ERR_ARGUMENT, "drop mode %d", static_cast<int>(d.mode));
  if (d.protect < RS_PROTECT_CLS || d.protect > RS_PROTECT_PREFIX)
    return rs_fail(RS_ERR_ARGUMENT, "drop protect %d", static_cast<int>(d.protect));
  return RS_OK;
}

rs_status rs_drop_resolve(const rs_drop &d, int layers, rs_drop_schedule *out) {
  RS_TRY(rs_drop_check_fields(d));
  if (d.n_ratios && d.n_keeps) return rs_fail(RS_ERR_ARGUMENT, "a drop schedule has ratios or counts, not both");
  const size_t n = std::max(d.n_ratios, d.n_keeps);
  if (n > static_cast<size_t>(layers))
    return rs_fail(RS_ERR_ARGUMENT, "the drop schedule is for %zu layers, the model has %d", n, layers);
  if (d.least < 0)
    return rs_fail(RS_ERR_ARGUMENT, "the least that a drop schedule leaves is %d tokens, expected 0 or more", d.least);
  const std::vector<std::string_view> scores = split(score_of(d), ',');
  *out = {};
  out->mode = d.mode, out->protect = d.protect, out->seed = d.seed;
  out->layers.resize(static_cast<size_t>(layers));
  for (size_t i = 0; i < n; i++) {
    rs_drop_schedule::layer &l = out->layers[i];
    if (i < d.n_ratios) {
      if (!(d.ratios[i] >= 0 && d.ratios[i] < 1))
        return rs_fail(RS_ERR_ARGUMENT, "layer %zu of the drop schedule: ratio %g, expected 0 to below 1", i, d.ratios[i]);
      l.rule.ratio = d.ratios[i];
    } else {
      if (d.keeps[i] < 0)
        return rs_fail(RS_ERR_ARGUMENT, "layer %zu of the drop schedule: keep %d tokens, expected 0 (all) or more", i, d.keeps[i]);
      l.rule.keep = d.keeps[i];
    }
    l.drops = l.rule.ratio > 0 || l.rule.keep > 0;
    l.rule.least = d.least;
    l.rule.keep_first = d.protect == RS_PROTECT_CLS;
    l.rule.fold = d.mode == RS_DROP_FOLD;
    if (!l.drops) continue;
    if (scores.size() > 1 && i >= scores.size())
      return rs_fail(RS_ERR_ARGUMENT, "layer %zu drops tokens, but '%.100s' has scores for %zu layers only", i, score_of(d),
                     scores.size());
  }
  if (scores.size() > static_cast<size_t>(layers))
    return rs_fail(RS_ERR_ARGUMENT, "'%.100s' has scores for %zu layers, the model has %d", score_of(d), scores.size(), layers);
  for (size_t i = 0; i < scores.size(); i++) {  // all of them, so that none is wrong unseen
    std::vector<rs_score_term> terms;
    RS_TRY(score_parser(scores[i], &terms).parse());
    for (size_t j = 0; j < out->layers.size(); j++)
      if ((scores.size() == 1 || j == i) && out->layers[j].drops) out->layers[j].score = terms;
  }
  return RS_OK;
}

rs_status rs_drop_format(const rs_drop *drop, char *text, size_t capacity) {
  return rs_guarded([&] {
    rs_drop d;
    RS_TRY(rs_read_params(drop, "rs_drop", &d));
    RS_TRY(rs_drop_check_fields(d));
    // What no model takes has no text either, or another schedule's.
    rs_drop_schedule unused;
    RS_TRY(rs_drop_resolve(d, static_cast<int>(std::max({d.n_ratios, d.n_keeps, split(score_of(d), ',').size()})), &unused));
    std::string s;
    if (d.n_keeps) append_numbers(&(s = "keeps="), d.keeps, d.n_keeps);
    else if (d.n_ratios) append_numbers(&(s = "ratios="), d.ratios, d.n_ratios);
    else s = "ratios=0";
    s += std::string(" score=") + score_of(d) + " mode=" + mode_names[d.mode] + " protect=" + protect_names[d.protect] +
         " min=" + std::to_string(d.least) + " seed=" + std::to_string(d.seed);
    if (s.size() >= capacity)
      return rs_fail(RS_ERR_LIMIT, "the text of the drop schedule has %zu bytes, the output holds %zu", s.size() + 1, capacity);
    memcpy(text, s.c_str(), s.size() + 1);
    return RS_OK;
  });
}

rs_status rs_drop_parse(const char *text, rs_drop **out) {
  return rs_guarded([&]() -> rs_status {
    *out = nullptr;
    auto d = std::make_unique<rs_owned_drop>();
    std::vector<std::string_view> keys;
    for (const std::string_view word : split(text, ' ')) {
      if (word.empty()) continue;
      const std::string_view key = word.substr(0, word.find('='));
      if (std::find(keys.begin(), keys.end(), key) != keys.end())
        return rs_fail(RS_ERR_ARGUMENT, "drop schedule: '%s' is given twice", std::string(key).c_str());
      keys.push_back(key);
      if (const rs_status status = parse_word(word, d.get()))
        return rs_fail(status, "drop schedule: %s", std::string(rs_last_error()).c_str());
    }
    d->point();
    *out = d.release();
    return RS_OK;
  });
}

void rs_drop_free(rs_drop *drop) { delete static_cast<rs_owned_drop *>(drop); }

// ---------------------------------------------------------------------------------------- graph

rs_dropper::rs_dropper(rs_graph *graph, const rs_drop_schedule *schedule, rs_tensor *cu_seqlens)
    : g_(graph), schedule_(schedule && schedule->drops() ? schedule : nullptr), all_{nullptr, cu_seqlens, nullptr}, now_(all_) {
  const int64_t tokens = RS_DIM_TOKENS;
  if (schedule_ && schedule_->needs_flags()) protect_ = rs_input(g_, "protect", RS_I32, 1, &tokens);
}

const rs_drop_schedule::layer *rs_dropper::dropping(int layer) const {
  const rs_drop_schedule::layer *l = schedule_ ? &schedule_->layers[static_cast<size_t>(layer)] : nullptr;
  return l && l->drops ? l : nullptr;
}

rs_tensor *rs_dropper::attention(int layer, const rs_attention &a) {
  of_attention_.clear();
  if (const rs_drop_schedule::layer *l = dropping(layer))
    for (const rs_score_term &t : l->score) {
      const auto sums = [&](bool of_first) {
        if (!a.window) return rs_attn_colsum(g_, a.q, a.k, cu_seqlens(), sizes(), a.heads, a.scale, of_first);
        return rs_attn_colsum_window(g_, a.q, a.k, cu_seqlens(), sizes(), a.heads, a.scale, of_first, a.window);
      };
      of_attention_.push_back(t.source == rs_score_source::attn_cls      ? sums(true)
                              : t.source == rs_score_source::attn_colsum ? sums(false)
                                                                         : nullptr);
    }
  if (a.window) return rs_flash_attn_window(g_, a.q, a.k, a.v, cu_seqlens(), sizes(), a.heads, a.scale, a.window);
  return (a.causal ? rs_flash_attn_causal : rs_flash_attn)(g_, a.q, a.k, a.v, cu_seqlens(), sizes(), a.heads, a.scale);
}

// Is a score made row by row?
static bool is_by_rows(rs_score_source source) {
  return source == rs_score_source::mlp || source == rs_score_source::attention || source == rs_score_source::block ||
         source == rs_score_source::norm;
}

rs_tensor *rs_dropper::term(int layer, const rs_score_term &t, const rs_layer_states &s) {
  const bool cosine = t.distance == RS_DISTANCE_COS;
  // Where a part adds `added` to `before`, which makes it `after`.
  const auto half = [&](rs_tensor *added, rs_tensor *before, rs_tensor *after) {
    if (t.reading == rs_score_reading::bare) return rs_shift(g_, added, before, t.distance);
    if (t.reading == rs_score_reading::out || cosine) return rs_shift(g_, after, before, t.distance);
    return rs_shift(g_, added, nullptr, t.distance);
  };
  switch (t.source) {
    case rs_score_source::mlp:
      return half(s.mlp, s.h, s.y);
    case rs_score_source::attention:
      return half(s.attn, s.x, s.h);
    case rs_score_source::block:
      return rs_shift(g_, s.y, s.x, t.distance);
    case rs_score_source::norm:
      return rs_shift(g_, s.y, nullptr, t.distance);
    case rs_score_source::centre:
      return rs_centre_distance(g_, s.y, cu_seqlens());
    case rs_score_source::attn_colsum:
    case rs_score_source::attn_cls:
      break;
    case rs_score_source::random:
      return rs_position_score(g_, cu_seqlens(), true, schedule_->seed * 1024 + static_cast<uint64_t>(layer));
    case rs_score_source::first:
      return rs_position_score(g_, cu_seqlens(), false, 0);
  }
  return nullptr;
}

rs_tensor *rs_dropper::score(int layer, const std::vector<rs_score_term> &terms, const rs_layer_states &s, bool *lowest) {
  *lowest = terms.size() == 1 && terms[0].weight < 0;
  const auto value = [&](size_t i) { return of_attention_[i] ? of_attention_[i] : term(layer, terms[i], s); };
  if (terms.size() == 1) return value(0);
  // Every operator of a drop has a name that begins with "drop.": rs_plan counts them among the layer that drops.  What is made row
  // by row comes first: it then belongs to the layer's chain of such operators, and what it reads need not outlive a block of rows.
  const auto name = [&](size_t i) { return "drop." + std::to_string(layer) + ".term." + std::to_string(i); };
  std::vector<rs_tensor *> values(terms.size());
  for (const bool by_rows : {true, false})
    for (size_t i = 0; i < terms.size(); i++)
      if (is_by_rows(terms[i].source) == by_rows) values[i] = rs_name(g_, value(i), name(i).c_str());
  rs_tensor *sum = nullptr;
  for (size_t i = 0; i < terms.size(); i++) {
    rs_tensor *part = rs_name(g_, rs_standardize(g_, values[i], cu_seqlens(), terms[i].weight), (name(i) + ".standard").c_str());
    sum = sum ? rs_name(g_, rs_add(g_, sum, part), (name(i) + ".sum").c_str()) : part;
  }
  return sum;
}

rs_tensor *rs_dropper::after_layer(int layer, const rs_layer_states &s) {
  const rs_drop_schedule::layer *l = dropping(layer);
  if (!l) return s.y;
  const std::string name = "drop." + std::to_string(layer);
  rs_drop_rule rule = l->rule;
  rs_tensor *chosen_by = rs_name(g_, score(layer, l->score, s, &rule.lowest), (name + ".score").c_str());
  rs_tensor *kept = rs_name(g_, rs_token_drop(g_, chosen_by, cu_seqlens(), protect_, &rule), (name + ".kept").c_str());
  rs_tensor *x, *into = nullptr;
  const auto merged = [&](rs_tensor *rows) {
    return rs_token_merge(g_, rows, into, kept, cu_seqlens(), sizes(), rule.fold ? chosen_by : nullptr);
  };
  if (schedule_->mode == RS_DROP_MERGE || schedule_->mode == RS_DROP_FOLD) {
    into = rs_name(g_, rs_token_assign(g_, s.y, cu_seqlens(), kept), (name + ".into").c_str());
    x = merged(s.y);
  } else {
    x = rs_token_gather(g_, s.y, kept);
    if (schedule_->mode == RS_DROP_RESTORE) dropped_.push_back({kept, s.y});
  }
  for (size_t i = 0; i < carried_.size(); i++)
    if (rs_tensor *&rows = carried_[i])
      rows =
          rs_name(g_, rule.fold ? merged(rows) : rs_token_gather(g_, rows, kept), (name + ".carried." + std::to_string(i)).c_str());
  if (into) {
    now_.sizes = rs_name(g_, rs_token_sizes(g_, into, kept, cu_seqlens(), sizes()), (name + ".sizes").c_str());
  }
  now_.cu_seqlens = rs_token_starts(g_, kept);
  return rs_name(g_, x, (name + ".out").c_str());
}

rs_states rs_dropper::finish(rs_tensor *x) const {
  for (size_t i = dropped_.size(); i-- > 0;) x = rs_token_restore(g_, x, dropped_[i].before, dropped_[i].kept);
  const rs_states &end = schedule_ && schedule_->mode == RS_DROP_RESTORE ? all_ : now_;
  return {x, end.cu_seqlens, end.sizes};
}
