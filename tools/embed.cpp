// rs embed: texts to vectors.
#include "text_run.h"

namespace {

const char *const examples =
    "Examples:\n"
    "  rs embed -m minilm.rsw 'a text' 'another'\n"
    "  rs embed -m minilm.rsw -f texts.txt -o vectors.npy --format npy\n"
    "  echo '{\"id\": 7, \"text\": \"hello\"}' | rs embed -m minilm.rsw\n"
    "Formats:\n"
    "  jsonl  {\"id\": …, \"embedding\": […], \"tokens\": n, \"truncated\": bool} a line; id as the input has it\n"
    "  json   one array of these objects\n"
    "  csv    a vector a line: numbers only, no heading\n"
    "  npy    NumPy, [texts, dim] float32\n"
    "  raw    float32, little endian, nothing else\n"
    "With -o the file appears whole at the end, or not at all when something fails that --on-error cannot skip.";

struct embed_options : text_run_options {
  encode_options encode;
  std::string format = "jsonl";
};

class embedder : public text_run {
 public:
  explicit embedder(const embed_options &options)
      : text_run(options, options.texts.open()),
        encoding_(options.encode, model_.get()),
        writer_(make_vector_writer(options.format, encoding_.dim, &out_)) {}

 private:
  void begin() override { writer_->begin(); }
  void end() override { writer_->end(); }
  int32_t max_tokens() const override { return encoding_.max_tokens; }
  const char *cut_advice() const override { return "--long chunk"; }

  void compute(const std::vector<const text_item *> &items) override {
    texts_.clear();
    for (const text_item *item : items) texts_.push_back(view_of(item->text));
    size_t vectors = items.size() * (encoding_.per_token() ? size_t(encoding_.max_tokens) : 1);
    values_.resize(vectors * size_t(encoding_.dim));
    infos_.assign(items.size(), rs_text_info());
    next_ = values_.data();
    check_items(
        rs_encode(session_.get(), texts_.data(), texts_.size(), &encoding_.params, values_.data(), values_.size(), infos_.data()));
  }

  void write(const text_item &item, size_t i) override {
    int64_t vectors = encoding_.per_token() ? infos_[i].kept : 1;
    writer_->add({item.id, next_, vectors, encoding_.dim, encoding_.per_token(), infos_[i]});
    next_ += vectors * encoding_.dim;
    count(infos_[i]);
  }

  encoding encoding_;
  std::unique_ptr<vector_writer> writer_;
  std::vector<rs_text> texts_;
  std::vector<rs_text_info> infos_;
  std::vector<float> values_;
  const float *next_ = nullptr;  // of those that are not written yet
};

int run_embed(const embed_options &options) { return embedder(options).run(); }

}  // namespace

void add_embed(CLI::App *app, command_line *line) {
  auto options = std::make_shared<embed_options>();
  CLI::App *sub = add_command(app, "embed", "texts to vectors", examples, options, run_embed, line);
  add_text_run_options(sub, options.get(), line);
  sub->add_option("--format", options->format, "jsonl, json, csv, npy or raw (default: jsonl)")
      ->type_name("NAME")
      ->check(CLI::IsMember(vector_formats));
  add_encode_options(sub, &options->encode);
}
