// rs answer: where in a context the answer to a question is, as a model trained on that finds it.
#include "scores.h"
#include "text_run.h"

#include <algorithm>
#include <optional>
#include <utility>

namespace {

const char *const examples =
    "Examples:\n"
    "  rs answer -m squad.rsw --question 'Where is the tower?' 'The tower is in Paris.'\n"
    "  rs answer -m squad.rsw --question 'Where is the tower?' --context-file page.txt --top 3\n"
    "  rs answer -m squad.rsw -f questions.jsonl     # lines {\"id\": …, \"question\": \"…\", \"context\": \"…\"}\n"
    "Output, a line for each question and context:\n"
    "  {\"id\": …, \"answer\": \"Paris\", \"score\": …, \"logit\": …, \"begin\": 16, \"end\": 21, \"begin_byte\": 16, "
    "\"end_byte\": 21,\n"
    "  \"no_answer_score\": …, \"no_answer_logit\": …}; with --top N also \"answers\", best first.\n"
    "begin and end count characters of the context.  logit: start logit + end logit, by which answers are ranked (SQuAD script of\n"
    "transformers); score: the product of their softmaxes over a window (its question-answering pipeline).";

struct answer_options : text_run_options {
  drop_options drop;
  std::string question, context_file;
  const CLI::Option *question_option = nullptr;
  int max_tokens = 0, overlap = -1, longest = 0, top = 0;
  bool no_word_alignment = false;
  std::optional<float> no_answer;
};

std::unique_ptr<text_source> open_source(const answer_options &options) {
  const bool one = options.question_option->count() > 0;
  if (!options.context_file.empty()) {
    if (!one) fail_usage("--context-file needs --question");
    if (options.texts.from_arguments() || !options.texts.file.empty()) fail_usage("both --context-file and other texts are given");
    const std::string file = options.context_file == "-" ? "stdin" : options.context_file;
    std::string context = read_file(options.context_file, max_line_bytes);
    check_encoding(context, file, 1);
    return texts_of_arguments({std::move(context)}, file);
  }
  if (!one && options.texts.from_arguments()) fail_usage("texts, which are contexts, need --question");
  line_keys keys;
  if (one) keys.text = {"context", "text"}, keys.pair = {"question"};
  else keys.text = {"question"}, keys.pair = {"context"}, keys.needs_pair = true;
  return options.texts.open(keys);
}

class answerer : public text_run {
 public:
  explicit answerer(const answer_options &options)
      : text_run(options, open_source(options)), options_(options), drop_(options.drop, model_.get()) {
    need_head(model_.get(), {RS_HEAD_SPANS}, "answer", "question-answering");
    check_max_tokens(options.max_tokens, model_.get(), true);
    params_.max_tokens = options.max_tokens;
    params_.drop = drop_.get();
    params_.overlap = library_overlap(options.overlap);
    params_.max_answer_tokens = options.longest;
    if (options.no_word_alignment) params_.whole_words = RS_OFF;
  }

 private:
  int32_t max_tokens() const override { return 0; }  // nothing is cut
  bool one_question() const { return options_.question_option->count() > 0; }
  const std::string &question_of(const text_item &item) const {
    return !one_question() ? item.text : item.has_pair ? item.pair : options_.question;
  }
  const std::string &context_of(const text_item &item) const { return one_question() ? item.text : item.pair; }

  void compute(const std::vector<const text_item *> &items) override {
    answers_.assign(items.size(), {});
    counts_.assign(items.size(), 0);
    for (size_t i = 0; i < items.size(); ++i) {
      rs_text question = view_of(question_of(*items[i])), context = view_of(context_of(*items[i]));
      std::vector<rs_answer> &found = answers_[i];
      found.resize(size_t(std::max(1, options_.top)));
      size_t n = 0;
      rs_status status = rs_answer_question(session_.get(), &question, &context, &params_, found.data(), found.size(), &n);
      if (status != RS_OK && rs_encode_failed(session_.get()) != SIZE_MAX) throw item_failure(i, rs_last_error());
      check(status);
      counts_[i] = n;
    }
  }

  void write(const text_item &item, size_t i) override {
    const std::vector<rs_answer> &found = answers_[i];
    const std::string &context = context_of(item);
    json_line line(item.id);
    // Without an answer the scores are those of that.
    rs_answer best = found[0];
    if (counts_[i] == 0 || (options_.no_answer && best.no_answer_logit - best.logit > *options_.no_answer)) {
      best.logit = best.no_answer_logit;
      best.score = best.no_answer_score;
      best.begin = best.end = 0;
    }
    add_answer(context, best, &line);
    line.number("no_answer_score", best.no_answer_score).number("no_answer_logit", best.no_answer_logit);
    if (options_.top > 0) {
      std::vector<std::string> list;
      for (size_t k = 0; k < counts_[i]; ++k) {
        json_line one;
        add_answer(context, found[k], &one);
        list.push_back(one.str());
      }
      line.raw("answers", json_list(list));
    }
    out_.write(line.str() + "\n");
  }

  static void add_answer(const std::string &context, const rs_answer &a, json_line *line) {
    character_counter counter(context);
    line->text("answer", std::string_view(context).substr(a.begin, a.end - a.begin))
        .number("score", a.score)
        .number("logit", a.logit);
    line->number("begin", counter.before(a.begin)).number("end", counter.before(a.end));
    line->number("begin_byte", a.begin).number("end_byte", a.end);
  }

  const answer_options &options_;
  drop_choice drop_;
  rs_answer_params params_ = sized<rs_answer_params>();
  std::vector<std::vector<rs_answer>> answers_;  // room for the best, and how many there are
  std::vector<size_t> counts_;
};

int run_answer(const answer_options &options) { return answerer(options).run(); }

}  // namespace

void add_answer(CLI::App *app, command_line *line) {
  auto options = std::make_shared<answer_options>();
  CLI::App *sub = add_command(app, "answer", "where in a context the answer to a question is", examples, options, run_answer, line);
  add_text_run_options(sub, options.get(), line,
                       "contexts of --question, a line each, or JSON lines\nwith \"question\" and \"context\"",
                       "\"question\" and \"context\"");
  options->question_option =
      sub->add_option("-q,--question", options->question, "every text is a context of this question, but where a line has its own")
          ->type_name("TEXT");
  sub->add_option("--context-file", options->context_file, "the whole file is one context ('-': standard input)")
      ->type_name("FILE");
  sub->add_option("--top", options->top, "the best N answers")->type_name("N")->check(whole_number(1));
  sub->add_option("--no-answer", options->no_answer,
                  "answer \"\" where no_answer_logit is more than this above the logit of the\n"
                  "best answer; 0 for a model trained on SQuAD 2 (default: always answer)")
      ->type_name("THRESHOLD")
      ->check(any_number());
  sub->add_option("--max-answer-tokens", options->longest, "limit of an answer (default: 30)")
      ->type_name("N")
      ->check(whole_number(1));
  sub->add_option("--max-tokens", options->max_tokens,
                  "of a window: the question, and as much of the context as fits\n(default: the model's, at most 384)")
      ->type_name("N")
      ->check(whole_number(1));
  sub->add_option("--overlap", options->overlap, "tokens of the context that two windows share (default: 128, at most half)")
      ->type_name("N")
      ->check(whole_number(0));
  sub->add_flag("--no-word-alignment", options->no_word_alignment, "an answer may begin or end inside of a word");
  add_drop_options(sub, &options->drop);
}
