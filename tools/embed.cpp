// rs embed: texts and images to vectors.
#include "text_run.h"

#include <algorithm>

namespace {

const char *const examples =
    "Examples:\n"
    "  rs embed -m minilm.rsw 'a text' 'another'\n"
    "  rs embed -m minilm.rsw -f texts.txt -o vectors.npy --format npy\n"
    "  echo '{\"id\": 7, \"text\": \"hello\"}' | rs embed -m minilm.rsw\n"
    "  rs embed -m dinov2.rsw photo.jpg album/ 'scans/**/*.png'   # files, folders with all in them, patterns\n"
    "  rs embed -m clip.rsw photo.jpg --text 'a dog' --text 'a cat'\n"
    "A model that takes images gets these by their paths: arguments, lines of a list (-f), or {\"image\": \"path\", \"id\": …} a "
    "line.\n"
    "In folders, links are followed.\n"
    "Of a model that takes both, --drop and its kin drop tokens of images; texts keep all.\n"
    "Formats:\n"
    "  jsonl  {\"id\": …, \"embedding\": […], \"tokens\": n, \"truncated\": bool} a line; id as the input has it;\n"
    "         of an image also \"image\": its path; with --output patches \"embedding\": [[…], …] and \"grid\": [rows, columns]\n"
    "  json   one array of these objects\n"
    "  csv    a vector a line: numbers only, no heading\n"
    "  npy    NumPy, [texts, dim] float32\n"
    "  raw    float32, little endian, nothing else\n"
    "With -o the file appears whole at the end, or not at all when something fails that --on-error cannot skip.";

struct embed_options : text_run_options {
  encode_options encode;
  std::string format = "jsonl";
  std::vector<std::string> outputs, texts_beside;
  std::string kind;  // of vector: one of `kinds`, or empty
};

// What --output may say of the vector of an image.
const char *const kinds[] = {"cls", "mean", "patches"};

// --output is a file and, where the model takes images, may be one of `kinds` instead, or as well.
void split_outputs(embed_options *options, inputs takes) {
  for (const std::string &output : options->outputs) {
    const bool is_kind = takes != inputs::texts && std::find(std::begin(kinds), std::end(kinds), output) != std::end(kinds);
    std::string &to = is_kind ? options->kind : options->output;
    if (!to.empty()) fail_usage("--output is given twice: ", in_quotes(to), " and ", in_quotes(output));
    to = output;
  }
  if (options->kind.empty()) return;
  if (!options->encode.pooling.empty()) fail_usage("--output ", options->kind, " and --pooling are two ways to say the same");
  if (!options->texts_beside.empty()) fail_usage("--output ", options->kind, " is for images; --text has none");
  options->encode.pooling = options->kind == "patches" ? "none" : options->kind;
}

line_keys keys_for(inputs takes) {
  line_keys keys;
  keys.takes = takes;
  return keys;
}

bool drops_some(const rs_drop &drop) {
  const auto some = [](auto value) { return value > 0; };
  return std::any_of(drop.ratios, drop.ratios + drop.n_ratios, some) || std::any_of(drop.keeps, drop.keeps + drop.n_keeps, some);
}

class embedder : public text_run {
 public:
  embedder(const embed_options &options, model_ptr model, inputs takes)
      : text_run(options, std::move(model), options.texts.open(keys_for(takes), options.texts_beside)),
        options_(options),
        encoding_(options.encode, model_.get()),
        writer_(make_vector_writer(options.format, encoding_.dim, &out_)) {
    // Nothing would tell which tokens the vectors are of.
    const rs_drop *drop = encoding_.params.drop;
    if (encoding_.per_token() && drop && drop->mode != RS_DROP_RESTORE && drops_some(*drop))
      fail_usage(
          "a vector for every token, but dropping leaves only some; --drop-mode restore keeps all (rs trace shows which leave)");
    // Of long texts, the states of a usual batch would be gigabytes.
    constexpr size_t most_states = size_t(256) << 20;
    if (encoding_.per_token() && takes != inputs::images)
      most_items_ = std::max<size_t>(1, most_states / (size_t(encoding_.max_tokens) * size_t(encoding_.dim) * sizeof(float)));
    if (takes == inputs::texts) return;
    const image_size size{encoding_.params.image_width, encoding_.params.image_height};
    check(rs_image_get_shape(model_.get(), size.width, size.height, &shape_));
    if (takes == inputs::both && options.kind.empty() && encoding_.dim != encoding_.image_dim &&
        (options.format == "npy" || options.format == "raw"))
      fail_usage("--pooling ", options.encode.pooling, ": vectors of ", encoding_.dim, " values for texts and ",
                 encoding_.image_dim, " for images, which --format ", options.format, " cannot hold");
    if (!options.kind.empty()) writer_ = make_vector_writer(options.format, encoding_.image_dim, &out_);
    load_images(size);
  }

 private:
  void begin() override { writer_->begin(); }
  void end() override { writer_->end(); }
  int32_t max_tokens() const override { return encoding_.max_tokens; }
  const char *cut_advice() const override { return "--long chunk"; }

  // Texts and images go in calls of their own.
  void compute(const std::vector<const text_item *> &items) override {
    places_.assign(items.size(), nullptr);
    infos_.assign(items.size(), rs_text_info());
    std::vector<size_t> texts, images;
    for (size_t i = 0; i < items.size(); ++i) {
      if (!items[i]->has_image && !options_.kind.empty())
        throw item_failure(i, "a text, but --output " + options_.kind + " is for images");
      (items[i]->has_image ? images : texts).push_back(i);
    }
    if (!texts.empty()) encode_texts(items, texts);
    if (!images.empty()) encode_images(items, images);
  }

  void encode_texts(const std::vector<const text_item *> &items, const std::vector<size_t> &which) {
    std::vector<rs_text> texts;
    std::vector<rs_text_info> infos(which.size());
    for (size_t i : which) texts.push_back(view_of(items[i]->text));
    rs_encode_params params = encoding_.params;
    if (info_.image_hidden > 0) params.drop = nullptr;  // of a model that takes both, schedules are for images
    text_values_.resize(which.size() * (encoding_.per_token() ? size_t(encoding_.max_tokens) : 1) * size_t(encoding_.dim));
    check_items(
        rs_encode(session_.get(), texts.data(), texts.size(), &params, text_values_.data(), text_values_.size(), infos.data()),
        which);
    place(which, infos, text_values_, encoding_.dim);
  }

  void encode_images(const std::vector<const text_item *> &items, const std::vector<size_t> &which) {
    std::vector<rs_image> images;
    std::vector<rs_image_info> image_infos(which.size());
    for (size_t i : which) images.push_back({RS_IMAGE_PIXELS, items[i]->pixels.data(), 0, shape_.width, shape_.height});
    image_values_.resize(which.size() * (encoding_.per_token() ? size_t(shape_.tokens) : 1) * size_t(encoding_.image_dim));
    check_items(rs_encode_images(session_.get(), images.data(), images.size(), &encoding_.params, image_values_.data(),
                                 image_values_.size(), image_infos.data()),
                which);
    std::vector<rs_text_info> infos;
    for (const rs_image_info &info : image_infos) infos.push_back({info.tokens, info.tokens, 1, false, info.kept});
    place(which, infos, image_values_, encoding_.image_dim);
  }

  // Where the vectors of each begin.
  void place(const std::vector<size_t> &which, const std::vector<rs_text_info> &infos, const std::vector<float> &values,
             int64_t dim) {
    const float *next = values.data();
    for (size_t i = 0; i < which.size(); ++i) {
      places_[which[i]] = next;
      infos_[which[i]] = infos[i];
      next += (encoding_.per_token() ? infos[i].kept : 1) * dim;
    }
  }

  void write(const text_item &item, size_t i) override {
    const int64_t dim = item.has_image ? encoding_.image_dim : encoding_.dim;
    vector_row row = {item.id, places_[i], encoding_.per_token() ? infos_[i].kept : 1, dim, encoding_.per_token(), infos_[i]};
    if (item.has_image) row.image = &item.image;
    if (options_.kind == "patches") {
      row.values += shape_.prefix * dim;
      row.vectors -= shape_.prefix;
      row.rows = shape_.rows, row.columns = shape_.columns;
    }
    writer_->add(row);
    if (item.has_image) count(rs_image_info{0, 0, infos_[i].tokens, infos_[i].kept});
    else count(infos_[i]);
  }

  const embed_options &options_;
  encoding encoding_;
  std::unique_ptr<vector_writer> writer_;
  rs_image_shape shape_{};
  std::vector<float> text_values_, image_values_;
  std::vector<const float *> places_;  // of the first vector of each
  std::vector<rs_text_info> infos_;
};

int run_embed(const embed_options &given) {
  model_ptr model = load_model(given.model, !given.no_check);
  const inputs takes = inputs_of(model_info(model.get()));
  embed_options options = given;
  split_outputs(&options, takes);
  if (!options.texts_beside.empty() && takes == inputs::texts)
    fail_usage("--text goes beside images; for this model, texts are arguments");
  need_texts(model.get(), {{"--text", !options.texts_beside.empty()}});
  return embedder(options, std::move(model), takes).run();
}

}  // namespace

void add_embed(CLI::App *app, command_line *line) {
  auto options = std::make_shared<embed_options>();
  CLI::App *sub = add_command(app, "embed", "texts and images to vectors", examples, options, run_embed, line);
  add_text_run_options(sub, options.get(), line, "texts, or paths of images,");
  sub->remove_option(sub->get_option("--output"));
  sub->add_option("-o,--output", options->outputs,
                  "write to this file (default: standard output).  For images also what the vector\n"
                  "is of: cls, the first token; mean, of the patches; patches, each of them (with\n"
                  "--drop only where --drop-mode restore brings them back).\n"
                  "A file of such a name: ./cls")
      ->type_name("FILE|KIND")
      ->allow_extra_args(false);
  sub->add_option("--text", options->texts_beside, "a text beside the images, of a model that takes both; repeatable")
      ->type_name("TEXT")
      ->allow_extra_args(false);
  sub->add_option("--format", options->format, "jsonl, json, csv, npy or raw (default: jsonl)")
      ->type_name("NAME")
      ->check(CLI::IsMember(vector_formats));
  add_encode_options(sub, &options->encode);
  add_image_size_option(sub, &options->encode.image_size);
}
