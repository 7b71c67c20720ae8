// rs tokenize: texts to token ids, as the model would see them; uncut unless asked, and without its prompts.
#include "json.h"
#include "options.h"
#include "output.h"
#include "tokens.h"

namespace {

const char *const examples =
    "Examples:\n"
    "  rs tokenize -m minilm.rsw 'a text'\n"
    "  rs tokenize -m minilm.rsw -f texts.jsonl --offsets     # lines may have \"pair\" as well as \"text\"\n"
    "Formats:\n"
    "  jsonl  {\"id\": …, \"ids\": […], \"tokens\": […]} a line; \"type_ids\" with pairs, \"offsets\" when asked for\n"
    "  text   the tokens of a text, separated by spaces";

struct tokenize_options {
  std::string model, format = "jsonl", pair;
  const CLI::Option *pair_option = nullptr;
  bool no_check = false, offsets = false;
  int max_tokens = 0;
  text_options texts;
  error_options errors;
};

class tokenizer_run {
 public:
  explicit tokenizer_run(const tokenize_options &options)
      : options_(options), source_(options.texts.open(keys())), model_(load_model(options.model, !options.no_check)), out_("-") {
    if (model_info(model_.get()).text_hidden == 0) fail("this model takes images, not texts: it has no tokenizer");
    if (options.max_tokens > 0) truncator_ = std::make_unique<truncator>(model_.get(), size_t(options.max_tokens));
  }

  int run() {
    text_item item;
    while (!stopped_ && source_->next(&item)) {
      ++seen_;
      if (options_.pair_option->count() > 0 && !item.has_pair) item.pair = options_.pair, item.has_pair = true;
      if (item.error.empty() && tokenize(model_.get(), item, &tokens_) != RS_OK) item.error = rs_last_error();
      if (item.error.empty() && truncator_) item.error = truncator_->cut(item, &tokens_);
      if (item.error.empty()) write(item);
      else report(item);
      if (!source_->ready(0)) out_.flush();
    }
    out_.commit();
    if (failed_ > 0)
      say(join(failed_, " of ", seen_, seen_ == 1 ? " text" : " texts", " failed", stopped_ ? "; stopped there" : ""));
    return failed_ > 0 ? 1 : 0;
  }

 private:
  static line_keys keys() {
    line_keys keys;
    keys.take_pairs();
    return keys;
  }

  void report(const text_item &item) {
    say(source_->place(item) + ": " + item.error);
    ++failed_;
    stopped_ = options_.errors.stop();
  }

  void write(const text_item &item) { out_.write(options_.format == "text" ? as_words() : as_object(item)); }

  const char *name(int32_t id) const {
    const char *token = rs_token(model_.get(), id);
    return token ? token : "";
  }

  std::string as_words() const {
    std::string line;
    for (int32_t id : tokens_.ids) line.append(line.empty() ? "" : " ").append(name(id));
    return line + "\n";
  }

  std::string as_object(const text_item &item) const {
    nlohmann::ordered_json names = nlohmann::ordered_json::array(), offsets = nlohmann::ordered_json::array();
    for (int32_t id : tokens_.ids) names.push_back(name(id));
    for (const rs_span &span : tokens_.spans) offsets.push_back({span.begin, span.end});
    std::string line = "{";
    if (!item.id.empty()) line += "\"id\":" + item.id + ",";
    line += "\"ids\":" + nlohmann::ordered_json(tokens_.ids).dump() +
            ",\"tokens\":" + names.dump(-1, ' ', false, json::error_handler_t::replace);
    if (item.has_pair) line += ",\"type_ids\":" + nlohmann::ordered_json(tokens_.type_ids).dump();
    if (options_.offsets) line += ",\"offsets\":" + offsets.dump();
    return line + "}\n";
  }

  const tokenize_options &options_;
  std::unique_ptr<text_source> source_;
  model_ptr model_;
  output_file out_;
  std::unique_ptr<truncator> truncator_;
  tokens tokens_;
  size_t seen_ = 0, failed_ = 0;
  bool stopped_ = false;
};

int run_tokenize(const tokenize_options &options) { return tokenizer_run(options).run(); }

}  // namespace

void add_tokenize(CLI::App *app, command_line *line) {
  auto options = std::make_shared<tokenize_options>();
  CLI::App *sub = add_command(app, "tokenize", "texts to token ids", examples, options, run_tokenize, line);
  add_model_option(sub, &options->model, false);
  add_text_options(sub, &options->texts, line, "texts, with or without a \"pair\",");
  options->pair_option = sub->add_option("--pair", options->pair, "the second text of every pair")->type_name("TEXT");
  sub->add_option("--format", options->format, "jsonl or text (default: jsonl)")
      ->type_name("NAME")
      ->check(CLI::IsMember({"jsonl", "text"}));
  sub->add_option("--max-tokens", options->max_tokens, "cut to this many, special tokens included (default: no limit)")
      ->type_name("N")
      ->check(whole_number(1));
  sub->add_flag("--offsets", options->offsets, "add where each token is in its text: first byte and the one after it");
  add_error_options(sub, &options->errors);
  add_no_check_option(sub, &options->no_check);
}
