// rs classify: the labels that a model's head gives texts, pairs of texts, the words of a text, or images; and which of some words
// suits an image best, by a model that compares images with texts.
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
    "  rs classify -m cifar.rsw photo.jpg album/ --top 5\n"
    "  rs classify -m clip.rsw photo.jpg --labels 'a cat,a dog' --template 'a photo of {}'\n"
    "Output, a line for each text or image; id as the input has it, and \"image\": the path of an image:\n"
    "  of texts   {\"id\": …, \"label\": \"positive\", \"score\": 0.99, \"tokens\": n, \"truncated\": bool}; with --top N\n"
    "             \"scores\": [{\"label\": …, \"score\": …}, …] as well, best first\n"
    "  of tokens  {\"id\": …, \"entities\": [{\"label\": \"PER\", \"score\": …, \"text\": …, \"begin\": …, \"end\": …}, …], …}:\n"
    "             neighbouring tokens of one label joined, B- and I- understood, \"O\" left out (the simple strategy of "
    "transformers);\n"
    "             begin and end count characters.  With --tokens also \"token_labels\", each token by itself";

struct classify_options : text_run_options {
  drop_options drop;
  int max_tokens = 0, overlap = -1, top = 0;
  std::string activation, long_text = "truncate", pair;
  const CLI::Option *pair_option = nullptr;
  bool tokens = false;
  std::string image_size, label_template = "{}";
  std::vector<std::string> labels;  // that images are compared with
  const CLI::Option *template_option = nullptr;
};

std::string trimmed(std::string_view text) {
  const size_t begin = text.find_first_not_of(" \t"), end = text.find_last_not_of(" \t");
  return begin == std::string_view::npos ? "" : std::string(text.substr(begin, end + 1 - begin));
}

// "a cat, a dog" apart.
std::vector<std::string> split_labels(const std::vector<std::string> &lists) {
  std::vector<std::string> labels;
  for (const std::string &list : lists) {
    for (size_t begin = 0; begin <= list.size();) {
      const size_t comma = std::min(list.find(',', begin), list.size());
      labels.push_back(trimmed(std::string_view(list).substr(begin, comma - begin)));
      if (labels.back().empty()) fail_usage("--labels: ", in_quotes(list), " has an empty label");
      begin = comma + 1;
    }
  }
  return labels;
}

// The vectors of the labels, each put into the template, and what makes scores of cosines with them.
class zero_shot {
 public:
  zero_shot(rs_session *session, const rs_model_info &info, const std::vector<std::string> &labels, const std::string &pattern)
      : dim_(info.dim), scale_(info.logit_scale), bias_(info.logit_bias) {
    if (pattern.find("{}") == std::string::npos) fail_usage("--template: ", in_quotes(pattern), " has no {}, where the label goes");
    std::vector<std::string> texts, places;
    for (const std::string &label : labels) {
      texts.push_back(pattern);
      std::string &text = texts.back();
      for (size_t hole = 0; (hole = text.find("{}", hole)) != std::string::npos; hole += label.size()) text.replace(hole, 2, label);
      places.push_back("label " + in_quotes(label));
    }
    auto params = sized<rs_encode_params>();
    params.normalize = RS_ON;
    params.long_text = RS_LONG_ERROR;
    vectors_ = ::encode_texts(session, texts, params, dim_, places);
  }
  rs_head_activation activation() const { return bias_ != 0 ? RS_HEAD_SIGMOID : RS_HEAD_SOFTMAX; }
  int64_t dim() const { return dim_; }
  // Of a vector of length 1.
  void logits(const float *image, float *out) const {
    for (size_t label = 0; label < vectors_.infos.size(); ++label) {
      double dot = 0;
      for (int64_t i = 0; i < dim_; ++i) dot += double(image[i]) * vectors_.row(label)[i];
      out[label] = float(scale_ * dot + bias_);
    }
  }

 private:
  int64_t dim_;
  double scale_, bias_;
  encoded_texts vectors_;
};

// What the model can do with these options; failure or usage_failure where that is nothing.
void check_task(const classify_options &options, const rs_model *model) {
  const rs_model_info info = model_info(model);
  const inputs takes = inputs_of(info);
  const bool labels = !options.labels.empty();
  if (labels && takes != inputs::both)
    fail_usage("--labels is for models that take images and texts; this one takes only ",
               takes == inputs::texts ? "texts" : "images");
  if (labels && info.head != RS_HEAD_NONE) fail_usage("--labels: this model has labels of its own");
  if (!labels && options.template_option->count() > 0) fail_usage("--template goes with --labels");
  if (!labels && takes == inputs::both && info.head == RS_HEAD_NONE)
    fail("this model has no classification head; with --labels it compares images with words of yours");
  if (!labels) need_head(model, {RS_HEAD_SEQUENCE, RS_HEAD_TOKENS}, "classify", "classification");
  if (takes == inputs::texts) return;
  const char *const of_texts = "is for texts; rs classify gives this model images";
  if (options.pair_option->count() > 0) fail_usage("--pair ", of_texts);
  if (options.max_tokens > 0) fail_usage("--max-tokens ", of_texts);
  if (options.long_text != "truncate") fail_usage("--long ", of_texts);
  if (options.overlap > 0) fail_usage("--overlap ", of_texts);
  if (options.tokens) fail_usage("--tokens ", of_texts);
}

line_keys keys_for(const rs_model *model) {
  line_keys keys;
  keys.take_pairs();
  keys.takes = inputs_of(model_info(model));
  if (keys.takes == inputs::both) keys.takes = inputs::images;
  return keys;
}

struct token_label {
  size_t label;
  float score;
  rs_span span;
  int32_t id;
};

class classifier : public text_run {
 public:
  classifier(const classify_options &options, model_ptr model, const line_keys &keys)
      : text_run(options, std::move(model), options.texts.open(keys)), options_(options), drop_(options.drop, model_.get()) {
    if (of_tokens() && options.top > 0) fail_usage("--top: this model labels tokens, not texts");
    params_.drop = drop_.get();
    if (keys.takes == inputs::texts) prepare_texts();
    else prepare_images();
    how_ = options.activation.empty() && words_ ? words_->activation() : activation_of(options.activation, info_);
    for (int32_t i = 0; i < info_.labels && !words_; ++i) labels_.emplace_back(rs_model_label(model_.get(), i));
  }

 private:
  void prepare_texts() {
    if (!of_tokens() && options_.tokens) fail_usage("--tokens: this model labels texts, not tokens");
    image_size_of(options_.image_size, model_.get());
    check_max_tokens(options_.max_tokens, model_.get(), options_.pair_option->count() > 0);
    params_.max_tokens = options_.max_tokens;
    set_long(options_.long_text, options_.overlap, model_.get(), &params_);
    const bool chunks = params_.long_text == RS_LONG_CHUNK;
    if (of_tokens() && chunks) fail_usage("--long chunk: labels of tokens cannot be averaged");
    if (options_.pair_option->count() > 0 && of_tokens()) fail_usage("--pair: this model labels the tokens of single texts");
    if (options_.pair_option->count() > 0 && chunks) fail_usage("--pair: --long chunk cannot cut pairs");
    truncator_ = std::make_unique<truncator>(model_.get(), size_t(classifier::max_tokens()));
  }

  void prepare_images() {
    const image_size size = image_size_of(options_.image_size, model_.get());
    params_.image_width = size.width, params_.image_height = size.height;
    check(rs_image_get_shape(model_.get(), size.width, size.height, &shape_));
    if (!options_.labels.empty()) {
      labels_ = split_labels(options_.labels);
      words_ = std::make_unique<zero_shot>(session_.get(), info_, labels_, options_.label_template);
      params_.normalize = RS_ON;
    }
    load_images(size);
  }

  bool of_tokens() const { return info_.head == RS_HEAD_TOKENS; }
  size_t labels() const { return labels_.size(); }
  int32_t max_tokens() const override { return options_.max_tokens > 0 ? options_.max_tokens : info_.max_tokens; }
  const char *cut_advice() const override { return of_tokens() ? nullptr : "--long chunk"; }

  const std::string *pair_of(const text_item &item) const {
    return item.has_pair ? &item.pair : options_.pair_option->count() > 0 ? &options_.pair : nullptr;
  }

  void compute(const std::vector<const text_item *> &items) override {
    rows_.assign(items.size(), {});
    infos_.assign(items.size(), rs_text_info());
    if (truncator_) classify_texts(items);
    else classify_images(items);
  }

  void classify_images(const std::vector<const text_item *> &items) {
    const size_t n = items.size(), width = words_ ? size_t(words_->dim()) : labels();
    std::vector<rs_image> images;
    for (const text_item *item : items) images.push_back({RS_IMAGE_PIXELS, item->pixels.data(), 0, shape_.width, shape_.height});
    std::vector<rs_image_info> infos(n);
    logits_.resize(n * width);
    const auto call = words_ ? rs_encode_images : rs_classify_images;
    check_items(call(session_.get(), images.data(), n, &params_, logits_.data(), logits_.size(), infos.data()));
    for (size_t i = 0; i < n; ++i) {
      const float *row = logits_.data() + i * width;
      rows_[i].assign(row, row + (words_ ? 0 : labels()));
      rows_[i].resize(labels());
      if (words_) words_->logits(row, rows_[i].data());
      to_scores(how_, rows_[i].data(), labels());
      infos_[i] = {infos[i].tokens, infos[i].tokens, 1, false, infos[i].kept};
    }
  }

  // Texts alone and pairs go in calls of their own.
  void classify_texts(const std::vector<const text_item *> &items) {
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
    if (item.has_image) line.text("image", item.image);
    if (of_tokens()) add_entities(item, rows_[i], &line);
    else add_labels(rows_[i], &line);
    line.number("tokens", size_t(infos_[i].tokens)).truth("truncated", infos_[i].truncated);
    out_.write(line.str() + "\n");
    if (item.has_image) count(rs_image_info{0, 0, infos_[i].tokens, infos_[i].kept});
    else count(infos_[i]);
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
    const auto [begin, end] = truncator_->of_text(tokens_.ids.size());
    for (size_t i = begin; i < end; ++i) {
      const rs_span &span = tokens_.spans[i];
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
  drop_choice drop_;
  rs_head_activation how_ = RS_HEAD_RAW;
  rs_encode_params params_ = sized<rs_encode_params>();
  std::unique_ptr<truncator> truncator_;  // of what labels texts
  std::unique_ptr<zero_shot> words_;      // of what compares images with words
  rs_image_shape shape_{};
  std::vector<std::string> labels_;
  std::vector<float> logits_;
  std::vector<std::vector<float>> rows_;  // scores of the texts of a batch
  std::vector<rs_text_info> infos_;
  tokens tokens_;
};

int run_classify(const classify_options &options) {
  model_ptr model = load_model(options.model, !options.no_check);
  check_task(options, model.get());
  const line_keys keys = keys_for(model.get());
  return classifier(options, std::move(model), keys).run();
}

}  // namespace

void add_classify(CLI::App *app, command_line *line) {
  auto options = std::make_shared<classify_options>();
  CLI::App *sub =
      add_command(app, "classify", "labels of texts, of the words in them, or of images", examples, options, run_classify, line);
  add_text_run_options(sub, options.get(), line, "texts, with or without a \"pair\", or paths of images,");
  options->pair_option =
      sub->add_option("--pair", options->pair, "the second text of every pair, but where a line has its own")->type_name("TEXT");
  sub->add_option("--top", options->top, "the scores of the best N labels")->type_name("N")->check(whole_number(1));
  sub->add_flag("--tokens", options->tokens, "the label of each token as well, of a model that labels tokens");
  add_activation_option(sub, &options->activation);
  sub->add_option("--labels", options->labels,
                  "of a model that takes images and texts: what images may show, 'a cat,a dog';\n"
                  "scored by how well each suits, together 1 where the model was trained so")
      ->type_name("LABEL,...")
      ->allow_extra_args(false);
  options->template_option =
      sub->add_option("--template", options->label_template, "what is made of a label, in place of each {}: 'a photo of {}'")
          ->type_name("TEXT");
  add_image_size_option(sub, &options->image_size);
  add_max_tokens_option(sub, &options->max_tokens);
  add_long_options(sub, &options->long_text, &options->overlap, "their logits averaged");
  add_drop_options(sub, &options->drop);
}
