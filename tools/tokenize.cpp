// rs tokenize: texts to token ids, as the model would see them; uncut unless asked.
#include "json.h"
#include "options.h"
#include "output.h"

#include <algorithm>

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

struct tokens {
  std::vector<int32_t> ids, type_ids;
  std::vector<rs_span> spans;
  void resize(size_t n) {
    ids.resize(n);
    type_ids.resize(n);
    spans.resize(n);
  }
  // A part of another list at the end of this one.
  void append(const tokens &from, size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      ids.push_back(from.ids[i]);
      type_ids.push_back(from.type_ids[i]);
      spans.push_back(from.spans[i]);
    }
  }
};

rs_status tokenize(const rs_model *model, const text_item &item, tokens *out) {
  rs_text text = view_of(item.text), pair = view_of(item.pair);
  for (size_t n = std::max<size_t>(out->ids.size(), 512);;) {
    out->resize(n);
    rs_status status = rs_tokenize(model, &text, item.has_pair ? &pair : nullptr, out->ids.data(), out->type_ids.data(),
                                   out->spans.data(), out->ids.size(), &n);
    if (status == RS_ERR_LIMIT && n > out->ids.size()) continue;  // room for n then
    out->resize(status == RS_OK ? n : 0);
    return status;
  }
}

// Lengths that two texts are cut to so that together they have `room` tokens, the longer one first: what the tokenizers library
// calls LongestFirst.
std::pair<size_t, size_t> longest_first(size_t a, size_t b, size_t room) {
  if (a + b <= room) return {a, b};
  size_t shorter = std::min(a, b), longer = shorter > room ? shorter : std::max(shorter, room - shorter);
  if (shorter + longer > room) {
    shorter = room / 2;
    longer = shorter + room % 2;
  }
  return a > b ? std::make_pair(longer, shorter) : std::make_pair(shorter, longer);
}

// Cuts the texts inside of the template and keeps its special tokens.
class truncator {
 public:
  truncator(const rs_model *model, size_t max_tokens) : model_(model), max_tokens_(max_tokens) {
    for (bool pair : {false, true}) {
      rs_meta meta;
      check(rs_model_meta(model, pair ? "tokenizer.pair" : "tokenizer.single", &meta));
      if (meta.kind != RS_META_I64S) fail("the template of the tokenizer is not a list of ids");
      template_[pair].assign(meta.i64s, meta.i64s + meta.count);
    }
  }

  // Sets item->error when the special tokens alone are too many.
  void cut(text_item *item, tokens *all) const {
    if (all->ids.size() <= max_tokens_) return;
    const std::vector<int64_t> &pieces = template_[item->has_pair];
    size_t special = pieces.size() - (item->has_pair ? 2 : 1);
    if (special > max_tokens_) {
      item->error = join("--max-tokens ", max_tokens_, " leaves no room for the ", special, " special tokens");
      return;
    }
    size_t a = item->has_pair ? length_alone(*item) : all->ids.size() - special;
    size_t b = all->ids.size() - special - a;
    auto [keep_a, keep_b] = longest_first(a, b, max_tokens_ - special);
    tokens kept;
    size_t position = 0;
    for (int64_t piece : pieces) {
      size_t length = piece == -1 ? a : piece == -2 ? b : 1;
      kept.append(*all, position, position + (piece == -1 ? keep_a : piece == -2 ? keep_b : 1));
      position += length;
    }
    *all = std::move(kept);
  }

 private:
  // Tokens of the first text of a pair.
  size_t length_alone(const text_item &item) const {
    size_t n = 0;
    rs_text text = view_of(item.text);
    rs_status status = rs_tokenize(model_, &text, nullptr, nullptr, nullptr, nullptr, 0, &n);
    if (status != RS_ERR_LIMIT) check(status);  // the limit is that of no room for the ids
    return n - (template_[false].size() - 1);
  }

  const rs_model *model_;
  size_t max_tokens_;
  std::vector<int64_t> template_[2];  // of a single text, of a pair
};

class tokenizer_run {
 public:
  explicit tokenizer_run(const tokenize_options &options)
      : options_(options), source_(options.texts.open()), model_(load_model(options.model, !options.no_check)), out_("-") {
    if (options.max_tokens > 0) truncator_ = std::make_unique<truncator>(model_.get(), size_t(options.max_tokens));
  }

  int run() {
    text_item item;
    while (!stopped_ && source_->next(&item)) {
      ++seen_;
      if (options_.pair_option->count() > 0 && !item.has_pair) item.pair = options_.pair, item.has_pair = true;
      if (item.error.empty() && tokenize(model_.get(), item, &tokens_) != RS_OK) item.error = rs_last_error();
      if (item.error.empty() && truncator_) truncator_->cut(&item, &tokens_);
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
    line += "\"ids\":" + json(tokens_.ids).dump() + ",\"tokens\":" + names.dump(-1, ' ', false, json::error_handler_t::replace);
    if (item.has_pair) line += ",\"type_ids\":" + json(tokens_.type_ids).dump();
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
  add_text_options(sub, &options->texts, line);
  options->pair_option = sub->add_option("--pair", options->pair, "the second text of every pair")->type_name("TEXT");
  sub->add_option("--format", options->format, "jsonl or text (default: jsonl)")
      ->type_name("NAME")
      ->check(CLI::IsMember({"jsonl", "text"}));
  sub->add_option("--max-tokens", options->max_tokens, "cut to this many, special tokens included (default: no limit)")
      ->type_name("N")
      ->check(CLI::PositiveNumber);
  sub->add_flag("--offsets", options->offsets, "add where each token is in its text: first byte and the one after it");
  add_error_options(sub, &options->errors);
  add_no_check_option(sub, &options->no_check);
}
