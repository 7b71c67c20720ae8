// rs trace: which tokens of a text, or patches of an image, left at which layer, with what score.
#include "trace.h"
#include "encode.h"
#include "options.h"
#include "output.h"
#include "tokens.h"

#include <unistd.h>
#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

constexpr size_t max_page = 500, max_image_page = 100;  // texts and images on a page that a browser still scrolls well
constexpr size_t max_picture_bytes = size_t(96) << 20, max_page_bytes = size_t(384) << 20;  // of pictures, unpacked

const char *const examples =
    "Examples:\n"
    "  rs trace -m minilm.rsw --drop 0,0.3,0,0.3 --drop-score=-mlp 'The cat sat on the mat.'\n"
    "  rs trace -m minilm.rsw --drop-profile fast -f texts.jsonl -o trace.html\n"
    "  rs trace -m dinov2.rsw --drop 0,0,0.2,0,0,0.3 --drop-score attn-colsum photo.jpg -o trace.png\n"
    "Formats:\n"
    "  text  each token in the colour of the layer behind which it left; without colours the layer as an index: the\xe2\x82\x81;\n"
    "        of an image the patches, in a grid\n"
    "  png   of images: each as the model gets it, and what every layer that drops leaves of it\n"
    "  json  an object a line: \"tokens\" with their place in the text (begin, end: characters; bytes), \"kept\": the positions "
    "left\n"
    "        at the end, and \"layers\": what stayed, what left, every score.  Positions count special tokens.\n"
    "        \"truncated\": the text was cut to --max-tokens\n"
    "        of images \"image\", \"grid\": [rows, columns], and \"prefix\": how many tokens are before the patches\n"
    "  html  one page that needs no other file";

struct trace_options {
  std::string model;
  int threads = 0;
  bool no_check = false;
  text_options texts;
  error_options errors;
  encode_options encode;
  std::string format, output, color = "auto";
};

std::string format_of(const trace_options &options) {
  const std::string end = ending_of(options.output);
  // Whoever names such a file does not want text in it.
  if ((ends_as_image(options.output) && end != ".png") || end == ".svg" || end == ".webp")
    fail_usage("--output: ", in_quotes(options.output), ": pictures are written as .png only");
  if (!options.format.empty()) return options.format;
  if (end == ".png") return "png";
  if (end == ".html" || end == ".htm") return "html";
  return end == ".json" || end == ".jsonl" ? "json" : "text";
}

colours colours_of(const std::string &wanted, int fd) {
  const auto variable = [](const char *name) {
    const char *value = getenv(name);
    return std::string(value ? value : "");
  };
  const std::string terminal = variable("TERM"), depth = variable("COLORTERM");
  if (wanted == "never") return colours::none;
  if (wanted == "auto" && (!isatty(fd) || !variable("NO_COLOR").empty() || terminal == "dumb")) return colours::none;
  return depth == "truecolor" || depth == "24bit" ? colours::full : colours::cube;
}

line_keys keys_for(const rs_model *model) {
  line_keys keys;
  keys.take_pairs();
  // Of a model that takes both, schedules are for images.
  if (inputs_of(model_info(model)) != inputs::texts) keys.takes = inputs::images;
  return keys;
}

// A model that takes both would have these for its texts, of which none is traced.
const encode_options &checked(const encode_options &options, const rs_model *model) {
  if (inputs_of(model_info(model)) != inputs::both) return options;
  const char *const of_texts = "is for texts; rs trace shows images of this model";
  if (options.max_tokens > 0) fail_usage("--max-tokens ", of_texts);
  if (options.prompt_option->count() > 0) fail_usage("--prompt ", of_texts);
  return options;
}

class tracer {
 public:
  explicit tracer(const trace_options &options)
      : options_(options),
        model_(load_model(options.model, !options.no_check)),
        source_(options.texts.open(keys_for(model_.get()))),
        encoding_(checked(options.encode, model_.get()), model_.get()),
        session_(create_session(model_.get(), options.threads, false)),
        format_(format_of(options)),
        out_(not_the_model(options.output, options.model)),
        colours_(colours_of(options.color, out_.fd())) {
    const rs_drop *drop = encoding_.params.drop;
    if (!drop) fail_usage("no schedule: give --drop, --keep or --drop-profile");
    const rs_model_info info = model_info(model_.get());
    of_images_ = info.image_hidden > 0;
    if (format_ == "png" && !of_images_) fail_usage("png shows images, but this model takes texts; --format text, json or html");
    if (format_ == "png" && isatty(out_.fd())) fail_usage("png is not for a terminal; give --output FILE");
    setting_.model = info.name;
    setting_.layers = of_images_ ? info.image_layers : info.layers;
    describe(*drop);
    if (of_images_) prepare_images();
    else if (!encoding_.params.prompt) prompt_ = default_prompt();
    else prompt_ = encoding_.prompt;
  }

  int run() {
    if (format_ == "text") out_.write(of_images_ ? trace_legend_of_images(setting_, colours_) : trace_legend(setting_, colours_));
    text_item item;
    while (!stopped_ && source_->next(&item)) {
      ++seen_;
      if (item.error.empty()) of_images_ ? trace_an_image(&item) : trace_a_text(&item);
      if (!item.error.empty()) report(item);
      if (!source_->ready(0)) out_.flush();
    }
    if (format_ == "html") out_.write(of_images_ ? trace_html(images_, setting_) : trace_html(page_, setting_));
    if (format_ == "png" && !pictures_.empty()) out_.write(png_of(stacked()));
    if (format_ == "png" && pictures_.empty()) {  // an empty file would be no picture
      if (seen_ == 0)
        fail("nothing to trace: no image in ", options_.texts.file.empty() ? "standard input" : in_quotes(options_.texts.file));
      return report_failures();
    }
    out_.commit();
    return report_failures();
  }

 private:
  void describe(const rs_drop &drop) {
    setting_.schedule = text_of(drop);
    nlohmann::ordered_json ratios = nlohmann::ordered_json::array(), keeps = nlohmann::ordered_json::array();
    for (size_t i = 0; i < drop.n_ratios; ++i) {
      ratios.push_back(drop.ratios[i]);
      if (drop.ratios[i] > 0) setting_.drops.push_back(int32_t(i));
    }
    for (size_t i = 0; i < drop.n_keeps; ++i) {
      keeps.push_back(drop.keeps[i]);
      if (drop.keeps[i] > 0) setting_.drops.push_back(int32_t(i));
    }
    if (setting_.drops.empty()) fail_usage("the schedule drops nothing");
    const auto word = [&](const std::string &key) {  // of the schedule as the library writes it
      const size_t begin = setting_.schedule.find(" " + key + "=") + key.size() + 2;
      return setting_.schedule.substr(begin, setting_.schedule.find(' ', begin) - begin);
    };
    setting_.json = {
        {"text", setting_.schedule}, {"ratios", ratios},           {"keeps", keeps},    {"score", drop.score ? drop.score : "mlp"},
        {"mode", word("mode")},      {"protect", word("protect")}, {"min", drop.least}, {"seed", drop.seed}};
  }

  std::string default_prompt() const {
    rs_meta name;
    const char *text = nullptr;
    if (!find_meta(model_.get(), "prompt.default", &name) || name.kind != RS_META_STR) return "";
    return rs_model_prompt(model_.get(), name.str, &text) == RS_OK ? text : "";
  }

  int report_failures() const {
    const std::string cut = truncation_.summary(encoding_.max_tokens, model_info(model_.get()).position_limit, nullptr);
    if (!cut.empty()) say(cut);
    const char *const noun = of_images_ ? " image" : " text";
    if (failed_ > 0) say(join(failed_, " of ", seen_, noun, seen_ == 1 ? "" : "s", " failed", stopped_ ? "; stopped there" : ""));
    return failed_ > 0 ? 1 : 0;
  }

  // -------------------------------------------------------------------------------------------- images

  void prepare_images() {
    check(rs_image_get_shape(model_.get(), encoding_.params.image_width, encoding_.params.image_height, &shape_));
    patch_ = patch_of(model_.get());
    const auto channels = [&](const char *key, float *to) {
      rs_meta meta;
      check(rs_model_meta(model_.get(), key, &meta));
      if (meta.kind != RS_META_F32S || meta.count != 3) fail(key, " is not a list of three numbers");
      std::copy_n(meta.f32s, 3, to);
    };
    channels("image.mean", mean_);
    channels("image.std", std_);
    rs_meta meta;
    check(rs_model_meta(model_.get(), "image.rescale", &meta));
    if (meta.kind != RS_META_F64) fail("image.rescale is not a number");
    rescale_ = meta.f64;
  }

  void trace_an_image(text_item *item) {
    traced_image traced;
    item->error = load_image(model_.get(), item->image, shape_.width, shape_.height, &item->pixels);
    if (!item->error.empty()) return;
    const rs_image image = {RS_IMAGE_PIXELS, item->pixels.data(), 0, shape_.width, shape_.height};
    rs_trace *handle = nullptr;
    if (rs_trace_image(session_.get(), &image, &encoding_.params, &handle) != RS_OK) {
      item->error = rs_last_error();
      return;
    }
    std::unique_ptr<rs_trace, releaser<rs_trace_free>> owned(handle);
    traced.id = item->id;
    traced.path = item->image;
    traced.shape = shape_;
    traced.patch = patch_;
    traced.rgb = bytes_of(item->pixels, traced);
    take_steps(handle, &traced);
    write(std::move(traced));
  }

  // What the patches show, from the pixels that the model gets.
  std::vector<uint8_t> bytes_of(const std::vector<float> &pixels, const traced_image &traced) const {
    const auto width = size_t(traced.pixel_width()), height = size_t(traced.pixel_height()), across = size_t(shape_.width);
    std::vector<uint8_t> rgb(3 * width * height);
    for (size_t c = 0; c < 3; ++c) {
      for (size_t y = 0; y < height; ++y) {
        for (size_t x = 0; x < width; ++x) {
          const float pixel = pixels[(c * size_t(shape_.height) + y) * across + x];
          const double value = (double(pixel) * std_[c] + mean_[c]) / rescale_;
          rgb[3 * (y * width + x) + c] = uint8_t(std::lround(std::clamp(value, 0.0, 255.0)));
        }
      }
    }
    return rgb;
  }

  void write(traced_image traced) {
    if (format_ == "json") return out_.write(trace_json(traced, setting_));
    if (format_ == "text") return out_.write("\n" + trace_terminal(traced, setting_, colours_));
    const bool page = format_ == "html";
    const size_t most = page ? max_page_bytes : max_picture_bytes;
    picture_bytes_ += picture_bytes(traced);
    if (picture_bytes_ > most || (page && images_.size() == max_image_page))
      fail(in_quotes(traced.path), ": there is no room for its pictures beside those of the images before it (at most ",
           human_bytes(double(most)), page ? join(", and ", max_image_page, " images") : "", "); --format json has no limit");
    if (page) images_.push_back(std::move(traced));
    else pictures_.push_back(trace_picture(traced, setting_));
  }

  // The pictures of all images, one below the other.
  canvas stacked() const {
    int32_t height = 0, width = 0;
    for (const canvas &picture : pictures_) height += picture.height, width = std::max(width, picture.width);
    canvas all(width, height, {0, 0, 0});
    int32_t y = 0;
    for (const canvas &picture : pictures_) all.put(picture, 0, y), y += picture.height;
    return all;
  }

  // -------------------------------------------------------------------------------------------- texts

  void trace_a_text(text_item *item) {
    traced_text traced;
    if (trace(item, &traced)) write(std::move(traced));
  }

  bool trace(text_item *item, traced_text *out) {
    rs_text text = view_of(item->text), pair = view_of(item->pair);
    rs_trace *handle = nullptr;
    if (rs_trace_text(session_.get(), &text, item->has_pair ? &pair : nullptr, &encoding_.params, &handle) != RS_OK) {
      item->error = rs_last_error();
      return false;
    }
    std::unique_ptr<rs_trace, releaser<rs_trace_free>> owned(handle);
    out->id = item->id;
    out->text = prompt_ + item->text;
    out->pair = item->pair;
    out->has_pair = item->has_pair;
    take_tokens(handle, out);
    rs_text_info info{};
    info.total = int32_t(count_tokens(model_.get(), out->text, item->has_pair ? &item->pair : nullptr));
    info.truncated = out->truncated = out->tokens.size() < size_t(info.total);
    truncation_.add(info);
    take_steps(handle, out);
    for (const traced_layer &layer : out->layers)
      for (size_t i = 0; i < layer.positions.size(); ++i)
        if (!layer.kept[i] && layer.positions[i] >= 0) out->tokens.at(size_t(layer.positions[i])).left_at = layer.layer;
    return true;
  }

  void take_tokens(const rs_trace *handle, traced_text *out) const {
    const int32_t *ids = nullptr;
    const rs_span *spans = nullptr;
    const size_t n = rs_trace_tokens(handle, &ids, nullptr, &spans);
    character_counter characters[] = {character_counter(out->text), character_counter(out->pair)};
    for (size_t i = 0; i < n; ++i) {
      traced_token token;
      token.id = ids[i];
      const char *name = rs_token(model_.get(), ids[i]);
      token.token = name ? name : "";
      token.segment = int32_t(i >= rs_trace_pair(handle));
      token.bytes = spans[i];
      if (!token.special()) {
        character_counter &counter = characters[token.segment];
        token.characters.begin = uint32_t(counter.before(spans[i].begin));
        token.characters.end = uint32_t(counter.before(spans[i].end));
      }
      out->tokens.push_back(std::move(token));
    }
  }

  static void take_steps(const rs_trace *handle, traced_sequence *out) {
    for (size_t i = 0; i < rs_trace_steps(handle); ++i) {
      rs_trace_step step{};
      check(rs_trace_step_at(handle, i, &step));
      traced_layer layer;
      layer.layer = step.layer;
      layer.positions.assign(step.positions, step.positions + step.n);
      layer.scores.assign(step.scores, step.scores + step.n);
      layer.kept.assign(step.kept, step.kept + step.n);
      if (step.into) layer.into.assign(step.into, step.into + step.n);
      out->layers.push_back(std::move(layer));
    }
    const int32_t *kept = nullptr;
    const size_t n = rs_trace_kept(handle, &kept);
    for (size_t i = 0; i < n; ++i)
      if (kept[i] >= 0) out->kept.push_back(kept[i]);
  }

  void report(const text_item &item) {
    say(source_->place(item) + ": " + item.error);
    ++failed_;
    stopped_ = options_.errors.stop();
  }

  void write(traced_text traced) {
    if (format_ == "json") return out_.write(trace_json(traced, setting_));
    if (format_ == "text") return out_.write("\n" + trace_terminal(traced, setting_, colours_));
    if (page_.size() == max_page) fail("more than ", max_page, " texts on a page; --format json has no limit");
    page_.push_back(std::move(traced));
  }

  const trace_options &options_;
  model_ptr model_;
  std::unique_ptr<text_source> source_;
  encoding encoding_;
  session_ptr session_;
  std::string format_;
  output_file out_;
  colours colours_;
  trace_setting setting_;
  std::string prompt_;  // stands in front of every text
  std::vector<traced_text> page_;
  truncation_count truncation_;
  bool of_images_ = false;
  rs_image_shape shape_{};
  int32_t patch_ = 0;
  float mean_[3] = {}, std_[3] = {};  // of the pixels
  double rescale_ = 1;
  std::vector<traced_image> images_;
  std::vector<canvas> pictures_;
  size_t picture_bytes_ = 0;
  size_t seen_ = 0, failed_ = 0;
  bool stopped_ = false;
};

int run_trace(const trace_options &options) { return tracer(options).run(); }

}  // namespace

void add_trace(CLI::App *app, command_line *line) {
  auto options = std::make_shared<trace_options>();
  CLI::App *sub = add_command(app, "trace", "which tokens of a text, or patches of an image, leave at which layer", examples,
                              options, run_trace, line);
  add_model_option(sub, &options->model, false);
  add_text_options(sub, &options->texts, line, "texts, or paths of images,");
  add_drop_options(sub, &options->encode.drop);
  sub->add_option("--format", options->format,
                  "text, json, html or png (default: by the ending of --output: .png,\n.html, .htm, .json or .jsonl; else text)")
      ->type_name("NAME")
      ->check(CLI::IsMember({"text", "json", "html", "png"}));
  sub->add_option("-o,--output", options->output, "write to this file (default: standard output)")->type_name("FILE");
  sub->add_option("--color", options->color, "auto (default: on a terminal, unless NO_COLOR is set), always or never")
      ->type_name("WHEN")
      ->check(CLI::IsMember({"auto", "always", "never"}));
  add_threads_option(sub, &options->threads);
  add_sequence_options(sub, &options->encode);
  add_image_size_option(sub, &options->encode.image_size);
  add_error_options(sub, &options->errors);
  add_no_check_option(sub, &options->no_check);
}
