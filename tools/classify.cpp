// rs classify: the labels that a model's head gives texts, pairs of texts, or the words of a text.
#include "scores.h"
#include "text_run.h"
#include "tokens.h"

#include <algorithm>

namespace {

const char *const examples =
    "Examples:\n"
    "  rs classify -m sst2.rsw 'a charming journey'\n"
    "  rs classify -m nli.rsw --pair 'A man sleeps.' 'A man is awake.' --top 3\n"
    "  rs classify -m ner.rsw -f texts.jsonl          # lines may have \"pair\" as well as \"text\"\n"
    "Output, a line for each text; id as the input has it:\n"
    "  of texts   {\"id\": …, \"label\": \"positive\", \"score\": 0.99, \"tokens\": n, \"truncated\": bool}; with --top N\n"
    "             \"scores\": [{\"label\": …, \"score\": …}, …] as well, best first\n"
    "  of tokens  {\"id\": …, \"entities\": [{\"label\": \"PER\", \"score\": …, \"text\": …, \"begin\": …, \"end\": …}, …], …}:\n"
    "             neighbouring tokens of one label joined, B- and I- understood, \"O\" left out (the simple strategy of "
    "transformers);\n"
    "             begin and end count characters.  With --tokens also \"token_labels\", each token by itself";

struct classify_options : text_run_options {
  drop_options drop;
  int max_tokens = 0, overlap = 0, top = 0;
  std::string activation, long_text = "truncate", pair;
  const CLI::Option *pair_option = nullptr;
  bool tokens = false;
};

struct token_label {
  size_t label;
  float score;
  rs_span span;
  int32_t id;
};

class classifier : public text_run {
 public:
  explicit classifier(const classify_options &options)
      : text_run(options, options.texts.open()),
        options_(options),
        how_(activation_of(options.activation, info_)),
        drop_(options.drop, model_.get()) {
    need_head(model_.get(), {RS_HEAD_SEQUENCE, RS_HEAD_TOKENS}, "classify", "classification");
    if (!of_tokens() && options.tokens) fail_usage("--tokens: this model labels texts, not tokens");
    if (of_tokens() && options.top > 0) fail_usage("--top: this model labels tokens, not texts");
    check_max_tokens(options.max_tokens, model_.get(), options.pair_option->count() > 0);
    params_.max_tokens = options.max_tokens;
    params_.drop = drop_.get();
    set_long(options.long_text, options.overlap, &params_);
    if (of_tokens() && params_.long_text == RS_LONG_CHUNK) fail_usage("--long chunk: labels of tokens cannot be averaged");
    truncator_ = std::make_unique<truncator>(model_.get(), size_t(max_tokens()));
    for (int32_t i = 0; i < info_.labels; ++i) labels_.emplace_back(rs_model_label(model_.get(), i));
  }

 private:
  bool of_tokens() const { return info_.head == RS_HEAD_TOKENS; }
  size_t labels() const { return labels_.size(); }
  int32_t max_tokens() const override { return options_.max_tokens > 0 ? options_.max_tokens : info_.max_tokens; }
  const char *cut_advice() const override { return of_tokens() ? nullptr : "--long chunk"; }

  const std::string *pair_of(const text_item &item) const {
    return item.has_pair ? &item.pair : options_.pair_option->count() > 0 ? &options_.pair : nullptr;
  }

  // Texts alone and pairs go in calls of their own.
  void compute(const std::vector<const text_item *> &items) override {
    rows_.assign(items.size(), {});
    infos_.assign(items.size(), rs_text_info());
    for (bool pairs : {false, true}) {
      std::vector<size_t> which;
      std::vector<rs_text> texts, others;
      for (size_t i = 0; i < items.size(); ++i) {
        const std::string *pair = pair_of(*items[i]);
        if ((pair != nullptr) != pairs) continue;
        if (pair && of_tokens()) throw item_failure(i, "a pair, but the model labels the tokens of single texts");
        if (pair && params_.long_text == RS_LONG_CHUNK) throw item_failure(i, "a pair, which --long chunk cannot cut");
        which.push_back(i);
        texts.push_back(view_of(items[i]->text));
        if (pair) others.push_back(view_of(*pair));
      }
      if (!which.empty()) classify(texts, others, which);
    }
  }

  void classify(const std::vector<rs_text> &texts, const std::vector<rs_text> &pairs, const std::vector<size_t> &which) {
    std::vector<rs_text_info> infos(texts.size());
    logits_.resize(texts.size() * labels() * (of_tokens() ? size_t(max_tokens()) : 1));
    check_items(rs_classify(session_.get(), texts.data(), pairs.empty() ? nullptr : pairs.data(), texts.size(), &params_,
                            logits_.data(), logits_.size(), infos.data()),
                which);
    float *next = logits_.data();
    for (size_t i = 0; i < which.size(); ++i) {
      size_t rows = of_tokens() ? size_t(infos[i].tokens) : 1;
      for (size_t row = 0; row < rows; ++row) to_scores(how_, next + row * labels(), labels());
      rows_[which[i]].assign(next, next + rows * labels());
      next += rows * labels();
      infos_[which[i]] = infos[i];
    }
  }

  void write(const text_item &item, size_t i) override {
    json_line line(item.id);
    if (of_tokens()) add_entities(item, rows_[i], &line);
    else add_labels(rows_[i], &line);
    line.number("tokens", size_t(infos_[i].tokens)).truth("truncated", infos_[i].truncated);
    out_.write(line.str() + "\n");
    count(infos_[i]);
  }

  void add_labels(const std::vector<float> &scores, json_line *line) const {
    std::vector<size_t> order = best_first(scores.data(), labels(), size_t(std::max(1, options_.top)));
    line->text("label", labels_[order[0]]).number("score", scores[order[0]]);
    if (options_.top == 0) return;
    std::vector<std::string> list;
    for (size_t label : order) list.push_back(json_line().text("label", labels_[label]).number("score", scores[label]).str());
    line->raw("scores", json_list(list));
  }

  // -------------------------------------------------------------------------------------------- labels of tokens

  // The tokens of the text itself, each with its best label.
  std::vector<token_label> best_labels(const text_item &item, const std::vector<float> &scores) {
    check(tokenize(model_.get(), item, &tokens_));
    truncator_->cut(item, &tokens_);
    std::vector<token_label> found;
    for (size_t i = 0; i < tokens_.ids.size(); ++i) {
      const rs_span &span = tokens_.spans[i];
      if (span.begin == span.end) continue;  // special tokens
      const float *row = scores.data() + i * labels();
      size_t best = best_first(row, labels(), 1)[0];
      found.push_back({best, row[best], span, tokens_.ids[i]});
    }
    return found;
  }

  // "B-PER" begins an entity, "I-PER" and "PER" go on with one.
  static bool begins(const std::string &label) { return label.compare(0, 2, "B-") == 0; }
  static std::string entity_of(const std::string &label) {
    return begins(label) || label.compare(0, 2, "I-") == 0 ? label.substr(2) : label;
  }

  void add_entities(const text_item &item, const std::vector<float> &scores, json_line *line) {
    std::vector<token_label> found = best_labels(item, scores);
    std::vector<std::string> entities, pieces;
    character_counter counter(item.text);
    for (size_t begin = 0, end; begin < found.size(); begin = end) {
      std::string entity = entity_of(labels_[found[begin].label]);
      double sum = found[begin].score;
      for (end = begin + 1; end < found.size(); ++end) {
        const std::string &label = labels_[found[end].label];
        if (begins(label) || entity_of(label) != entity) break;
        sum += found[end].score;
      }
      if (entity == "O") continue;
      rs_span span = {found[begin].span.begin, found[end - 1].span.end};
      entities.push_back(
          placed(item, &counter, json_line().text("label", entity).number("score", float(sum / double(end - begin))), span));
    }
    line->raw("entities", json_list(entities));
    if (!options_.tokens) return;
    for (const token_label &t : found) {
      const char *token = rs_token(model_.get(), t.id);
      pieces.push_back(
          placed(item, &counter,
                 json_line().text("token", token ? token : "").text("label", labels_[t.label]).number("score", t.score), t.span));
    }
    line->raw("token_labels", json_list(pieces));
  }

  static std::string placed(const text_item &item, character_counter *counter, json_line line, const rs_span &span) {
    line.text("text", std::string_view(item.text).substr(span.begin, span.end - span.begin));
    const size_t begin = counter->before(span.begin), end = counter->before(span.end);
    return line.number("begin", begin).number("end", end).str();
  }

  const classify_options &options_;
  rs_head_activation how_;
  drop_choice drop_;
  rs_encode_params params_ = sized<rs_encode_params>();
  std::unique_ptr<truncator> truncator_;
  std::vector<std::string> labels_;
  std::vector<float> logits_;
  std::vector<std::vector<float>> rows_;  // scores of the texts of a batch
  std::vector<rs_text_info> infos_;
  tokens tokens_;
};

int run_classify(const classify_options &options) { return classifier(options).run(); }

}  // namespace

void add_classify(CLI::App *app, command_line *line) {
  auto options = std::make_shared<classify_options>();
  CLI::App *sub = add_command(app, "classify", "labels of texts, or of the words in them", examples, options, run_classify, line);
  add_text_run_options(sub, options.get(), line);
  options->pair_option =
      sub->add_option("--pair", options->pair, "the second text of every pair, but where a line has its own")->type_name("TEXT");
  sub->add_option("--top", options->top, "the scores of the best N labels")->type_name("N")->check(CLI::PositiveNumber);
  sub->add_flag("--tokens", options->tokens, "the label of each token as well, of a model that labels tokens");
  add_activation_option(sub, &options->activation);
  add_max_tokens_option(sub, &options->max_tokens);
  add_long_options(sub, &options->long_text, &options->overlap, "their logits averaged");
  add_drop_options(sub, &options->drop);
}
