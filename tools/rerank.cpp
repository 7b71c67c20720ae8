// rs rerank: texts in the order of how well they answer a query, as a cross-encoder scores each pair.
#include "scores.h"
#include "text_run.h"

#include <algorithm>
#include <numeric>

namespace {

const char *const examples =
    "Examples:\n"
    "  rs rerank -m cross.rsw --query 'how to boil an egg' 'Boil water first.' 'Eggs are laid by hens.'\n"
    "  rs rerank -m cross.rsw --query 'how to boil an egg' -f texts.jsonl --top 10\n"
    "  rs rerank -m cross.rsw -f queries.jsonl      # lines {\"id\": …, \"query\": \"…\", \"texts\": [\"…\", …]}, or "
    "\"documents\"\n"
    "Output, best first; of equal scores the first text:\n"
    "  with --query  {\"id\": …, \"index\": i, \"score\": …, \"text\": \"…\"} a line; index: among the texts, from 0\n"
    "  without       {\"id\": …, \"results\": [{\"index\": i, \"score\": …, \"text\": \"…\"}, …]} a line for each query";

struct rerank_options : text_run_options {
  drop_options drop;
  std::string query, label, activation;
  const CLI::Option *query_option = nullptr;
  int top = 0, max_tokens = 0;
  bool no_text = false;
};

struct ranked {
  size_t index;
  float logit, score;
  std::string id, text;
};

bool better(const ranked &a, const ranked &b) { return a.logit != b.logit ? a.logit > b.logit : a.index < b.index; }

line_keys keys_of(const rerank_options &options) {
  line_keys keys;
  if (options.query_option->count() > 0) {
    keys.refused = "query";
    return keys;
  }
  keys.text = {"query"};
  keys.list = {"texts", "documents"};
  keys.needs_list = true;
  return keys;
}

std::unique_ptr<text_source> open_source(const rerank_options &options) {
  if (options.query_option->count() == 0 && options.texts.from_arguments()) fail_usage("texts need --query");
  return options.texts.open(keys_of(options));
}

class reranker : public text_run {
 public:
  explicit reranker(const rerank_options &options)
      : text_run(options, open_source(options)),
        options_(options),
        how_(activation_of(options.activation, info_)),
        drop_(options.drop, model_.get()) {
    need_head(model_.get(), {RS_HEAD_SEQUENCE}, "rerank", "classification");
    check_max_tokens(options.max_tokens, model_.get(), true);
    params_.max_tokens = options.max_tokens;
    params_.drop = drop_.get();
    label_ = find_label();
  }

 private:
  int32_t max_tokens() const override { return options_.max_tokens > 0 ? options_.max_tokens : info_.max_tokens; }
  bool one_query() const { return options_.query_option->count() > 0; }

  // Which logit ranks: the only one, or the one that the user names.
  size_t find_label() const {
    std::string known;
    for (int32_t i = 0; i < info_.labels; ++i) {
      const std::string label = rs_model_label(model_.get(), i);
      if (label == options_.label) return size_t(i);
      known += (i > 0 ? ", " : "") + label;
    }
    if (!options_.label.empty()) fail_usage("--label: there is no label ", in_quotes(options_.label), " (there are: ", known, ")");
    if (info_.labels > 1)
      fail_usage("the model has ", info_.labels, " labels; --label NAME says which one ranks (there are: ", known, ")");
    return 0;
  }

  void compute(const std::vector<const text_item *> &items) override {
    std::vector<rs_text> queries, texts;
    std::vector<size_t> owners;
    for (size_t i = 0; i < items.size(); ++i) {
      const std::string &query = one_query() ? options_.query : items[i]->text;
      for (size_t j = 0; j < (one_query() ? 1 : items[i]->list.size()); ++j) {
        queries.push_back(view_of(query));
        texts.push_back(view_of(one_query() ? items[i]->text : items[i]->list[j]));
        owners.push_back(i);
      }
    }
    logits_.resize(texts.size() * size_t(info_.labels));
    infos_.assign(texts.size(), rs_text_info());
    next_ = 0;
    check_items(rs_classify(session_.get(), queries.data(), texts.data(), texts.size(), &params_, logits_.data(), logits_.size(),
                            infos_.data()),
                owners);
  }

  // The next text that was computed.
  ranked take(size_t index, const std::string &id, const std::string &text) {
    count(infos_[next_]);
    float *row = logits_.data() + next_++ * size_t(info_.labels);
    const float logit = row[label_];
    to_scores(how_, row, size_t(info_.labels));
    return {index, logit, row[label_], id, options_.no_text ? std::string() : text};
  }

  // Keeps the best N in a heap whose front is the worst of them, or all.
  void keep(ranked &&result) {
    best_.push_back(std::move(result));
    if (options_.top == 0) return;
    std::push_heap(best_.begin(), best_.end(), better);
    if (best_.size() <= size_t(options_.top)) return;
    std::pop_heap(best_.begin(), best_.end(), better);
    best_.pop_back();
  }

  std::vector<std::string> take_best() {
    std::sort(best_.begin(), best_.end(), better);
    std::vector<std::string> lines;
    for (const ranked &r : best_) {
      json_line line(r.id);
      line.number("index", r.index).number("score", r.score);
      if (!options_.no_text) line.text("text", r.text);
      lines.push_back(line.str());
    }
    best_.clear();
    return lines;
  }

  void write(const text_item &item, size_t) override {
    if (one_query()) return keep(take(ordinal(), item.id, item.text));
    for (size_t i = 0; i < item.list.size(); ++i) keep(take(i, "", item.list[i]));
    out_.write(json_line(item.id).raw("results", json_list(take_best())).str() + "\n");
  }

  void end() override {
    if (!one_query()) return;
    for (const std::string &line : take_best()) out_.write(line + "\n");
  }

  const rerank_options &options_;
  rs_head_activation how_;
  drop_choice drop_;
  rs_encode_params params_ = sized<rs_encode_params>();
  size_t label_ = 0;
  std::vector<float> logits_;
  std::vector<rs_text_info> infos_;
  size_t next_ = 0;  // of those that are not taken yet
  std::vector<ranked> best_;
};

int run_rerank(const rerank_options &options) { return reranker(options).run(); }

}  // namespace

void add_rerank(CLI::App *app, command_line *line) {
  auto options = std::make_shared<rerank_options>();
  CLI::App *sub =
      add_command(app, "rerank", "texts in the order of how well they answer a query", examples, options, run_rerank, line);
  add_text_run_options(sub, options.get(), line,
                       "the texts that are ranked for --query, a line each, or JSON lines\nwith \"query\" and \"texts\"",
                       "\"query\" and \"texts\", or with \"text\" for --query");
  options->query_option = sub->add_option("-q,--query", options->query, "rank the texts for this query")->type_name("TEXT");
  sub->add_option("--top", options->top, "the best N texts (default: all)")->type_name("N")->check(whole_number(1));
  sub->add_option("--label", options->label, "the label that ranks, of a model that has several")->type_name("NAME");
  sub->add_flag("--no-text", options->no_text, "index and score only");
  add_activation_option(sub, &options->activation);
  add_max_tokens_option(sub, &options->max_tokens);
  add_drop_options(sub, &options->drop);
}
