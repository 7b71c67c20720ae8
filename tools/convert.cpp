// rs convert: a Hugging Face folder to a weight file, with a report of what the conversion cost.
//
// The file carries golden sentences with their f32 vectors, which only f32 weights can give.  So the f32 file is made first, in a
// hidden folder beside the output, then the one of the wanted type, and last the result: that one with the vectors added.
#include "calibration.h"
#include "golden.h"
#include "hf.h"
#include "input.h"
#include "options.h"
#include "output.h"
#include "pictures.h"
#include "progress.h"
#include "scratch.h"
#include "table.h"

#include <cmath>
#include <filesystem>
#include <map>

namespace {

namespace fs = std::filesystem;
using ordered = nlohmann::ordered_json;

const char *const examples =
    "Examples:\n"
    "  rs convert all-MiniLM-L6-v2 -o minilm.rsw\n"
    "  rs convert all-MiniLM-L6-v2 -o minilm-q4.rsw --type q4 --json > report.json\n"
    "DIR needs config.json and model.safetensors (or its shards and index); of a model that takes texts tokenizer.json or what\n"
    "came before it (vocab.txt, or vocab.json and merges.txt), of one that takes images preprocessor_config.json, but where\n"
    "config.json is timm's.  modules.json and what it names say how vectors are pooled.  An f32 copy is kept beside the output\n"
    "while this runs.";

struct convert_options {
  std::string folder, output, type = "q8", name, license, source, calibrate;
  int max_tokens = 0;
  bool json = false;
};

// What a type promises of the cosine with the f32 vectors, on average.
struct type_promise {
  const char *type;
  double cosine;
};
constexpr size_t calibration_pictures = 48, calibration_random = 14;  // the latter: sequences of tokens
constexpr type_promise promises[] = {{"f32", 0.99999}, {"f16", 0.9999}, {"q8", 0.997}, {"q4", 0.97}};

double promise_of(const std::string &type) {
  for (const type_promise &p : promises)
    if (type == p.type) return p.cosine;
  return 0;
}

// ---------------------------------------------------------------------------------------------- metadata

void set_i64s(rs_writer *w, const char *key, const std::vector<int64_t> &values) {
  check(rs_writer_set_i64s(w, key, values.data(), values.size()));
}

void set_strs(rs_writer *w, const char *key, const std::vector<std::string> &values) {
  std::vector<rs_text> views;
  for (const std::string &value : values) views.push_back(view_of(value));
  check(rs_writer_set_strs(w, key, views.data(), views.size()));
}

void set_str(rs_writer *w, const char *key, const std::string &value) {
  if (!value.empty()) check(rs_writer_set_str(w, key, value.c_str()));
}

void set_tokenizer(rs_writer *w, const hf_tokenizer &t) {
  check(rs_writer_set_str(w, "tokenizer.type", t.type.c_str()));
  set_strs(w, "tokenizer.tokens", t.tokens);
  if (t.type == "bpe") {
    set_i64s(w, "tokenizer.merges", t.merges);
    check(rs_writer_set_str(w, "tokenizer.suffix", t.suffix.c_str()));
    if (t.suffix.empty()) {
      check(rs_writer_set_bool(w, "tokenizer.compose", t.compose));
      check(rs_writer_set_bool(w, "tokenizer.prefix_space", t.prefix_space));
      check(rs_writer_set_bool(w, "tokenizer.trim_spans", t.trim_spans));
      check(rs_writer_set_bool(w, "tokenizer.ignore_merges", t.ignore_merges));
    } else {
      check(rs_writer_set_bool(w, "tokenizer.split_special", t.split_special));
    }
  } else {
    check(rs_writer_set_str(w, "tokenizer.unk", t.unk.c_str()));
    check(rs_writer_set_str(w, "tokenizer.prefix", t.prefix.c_str()));
    check(rs_writer_set_i64(w, "tokenizer.max_word_chars", t.max_word_chars));
    check(rs_writer_set_bool(w, "tokenizer.clean_text", t.clean_text));
    check(rs_writer_set_bool(w, "tokenizer.chinese_chars", t.chinese_chars));
    check(rs_writer_set_bool(w, "tokenizer.strip_accents", t.strip_accents));
    check(rs_writer_set_bool(w, "tokenizer.lowercase", t.lowercase));
  }
  set_i64s(w, "tokenizer.added_ids", t.added_ids);
  set_i64s(w, "tokenizer.added_flags", t.added_flags);
  for (const auto &[name, id] : t.special_ids) check(rs_writer_set_i64(w, ("tokenizer." + name + "_id").c_str(), id));
  set_i64s(w, "tokenizer.single", t.single);
  set_i64s(w, "tokenizer.single_types", t.single_types);
  set_i64s(w, "tokenizer.pair", t.pair);
  set_i64s(w, "tokenizer.pair_types", t.pair_types);
}

void set_f32s(rs_writer *w, const char *key, const std::vector<float> &values) {
  check(rs_writer_set_f32s(w, key, values.data(), values.size()));
}

void set_prompts(rs_writer *w, const hf_folder &folder) {
  if (folder.prompts.empty()) return;
  std::vector<std::string> names, texts;
  for (const auto &[name, text] : folder.prompts) {
    names.push_back(name);
    texts.push_back(text);
  }
  set_strs(w, "prompt.names", names);
  set_strs(w, "prompt.texts", texts);
  set_str(w, "prompt.default", folder.default_prompt);
}

void set_metadata(rs_writer *w, const hf_folder &folder) {
  set_str(w, "general.name", folder.name);
  set_str(w, "general.license", folder.license);
  set_str(w, "general.source", folder.source);
  if (folder.texts) set_tokenizer(w, folder.tokenizer);
  if (folder.images) hf_image_metadata(w, folder.image);
  check(rs_writer_set_str(w, "encode.pooling", folder.pooling.c_str()));
  check(rs_writer_set_bool(w, "encode.normalize", folder.normalize));
  if (folder.max_tokens > 0) check(rs_writer_set_i64(w, "encode.max_tokens", folder.max_tokens));
  set_prompts(w, folder);
}

// ---------------------------------------------------------------------------------------------- errors by type

struct error_sum {
  size_t tensors = 0, bytes = 0;
  double max_error = 0, sum_sq_error = 0, sum_sq = 0, count = 0;
  void add(const rs_convert_tensor &row) {
    ++tensors;
    bytes += row.bytes;
    max_error = std::max(max_error, row.max_error);
    sum_sq_error += row.sum_sq_error;
    sum_sq += row.sum_sq;
    count += row.count;
  }
  double rms() const { return count > 0 ? std::sqrt(sum_sq_error / count) : 0; }
  double relative() const { return sum_sq > 0 ? std::sqrt(sum_sq_error / sum_sq) : 0; }
};

using error_table = std::map<std::pair<std::string, std::string>, error_sum>;  // by type and layout

// ---------------------------------------------------------------------------------------------- the conversion

// On the CPU, whatever RS_DEVICE says: what is written must not depend on the machine's card.
static model_ptr load_here(const std::string &path) { return load_model(path, false, "cpu"); }

class converter {
 public:
  explicit converter(const convert_options &options) : options_(options), begin_(seconds_now()), progress_(true) {}

  int run() {
    target_ = checked_target();
    folder_ = read_hf_folder(options_.folder);
    apply_options();
    for (const std::string &note : folder_.notes) say(note);
    check_not_input();
    scratch_folder scratch(target_);
    convert(scratch / "f32", "f32");
    const golden_vectors expected = embed(scratch / "f32");
    bool quantized = options_.type != "f32";
    if (options_.type == "q8" || options_.type == "q4") calibrate(scratch / "f32");
    if (quantized) convert(scratch / "typed", options_.type);
    std::string typed = scratch / (quantized ? "typed" : "f32");
    const golden_vectors got = quantized ? embed(typed) : expected;
    cosines_ = compare_golden(expected.texts, got.texts, folder_.texts ? golden_texts.size() : 0);
    image_cosines_ = compare_golden(expected.images, got.images, folder_.images ? golden_pictures : 0);
    if (!std::isfinite(cosines_.mean) || !std::isfinite(image_cosines_.mean))
      fail("the converted model gives vectors that are not numbers");
    write_result(scratch / "result", typed, expected);
    replace_file(scratch / "result", target_);
    progress_.clear();
    print(options_.json ? report_json() : report_text());
    warn();
    return 0;
  }

 private:
  std::string checked_target() const {
    std::string target = output_target(options_.output);
    std::error_code error;
    if (fs::exists(target, error) && !fs::is_regular_file(target, error))
      fail("cannot write ", in_quotes(options_.output), ": it is not a regular file");
    return target;
  }

  void check_not_input() const {
    for (const std::string &file : folder_.files) {
      std::error_code error;
      if (fs::equivalent(file, target_, error))
        fail("the output ", in_quotes(options_.output), " is a file of the model that is read");
    }
  }

  void apply_options() {
    if (!options_.name.empty()) folder_.name = options_.name;
    if (!options_.license.empty()) folder_.license = options_.license;
    if (!options_.source.empty()) folder_.source = options_.source;
    if (!folder_.texts && options_.max_tokens > 0) fail_usage("--max-tokens: this model takes no texts");
    const bool calibrates = !options_.calibrate.empty() && options_.calibrate != "none";
    if (calibrates && options_.type != "q8" && options_.type != "q4")
      fail_usage("--calibrate: weights of type ", options_.type, " are not rounded by texts; it goes with q8 and q4");
    if (!folder_.texts && calibrates)
      fail_usage("--calibrate: a file of texts, but this model takes none; images are calibrated on built-in pictures");
    if (options_.max_tokens == 0) return;
    if (folder_.position_limit > 0 && options_.max_tokens > folder_.position_limit)
      fail_usage("--max-tokens: ", options_.max_tokens, " is more than the ", folder_.position_limit, " positions of this model");
    folder_.max_tokens = options_.max_tokens;
  }

  void convert(const std::string &path, const std::string &type) {
    type_ = type;
    errors_.clear();
    writer_ptr writer = open_writer(path);
    set_metadata(writer.get(), folder_);
    rs_source source = folder_.to_source();
    auto params = sized<rs_convert_params>();
    params.type = type.c_str();
    params.calibration = calibration_.get();
    params.ctx = this;
    params.on_tensor = [](void *self, const rs_convert_tensor *row) { static_cast<converter *>(self)->on_tensor(*row); };
    check(rs_convert(&source, &params, writer.get()));
    check(rs_writer_finish(writer.get()));
  }

  // What the layers see on texts and images like those that the model will be used on.
  void calibrate(const std::string &f32) {
    if (options_.calibrate == "none") return;
    progress_.update(1, 1, "f32: calibration");
    std::vector<std::string> texts;
    if (folder_.texts) texts = options_.calibrate.empty() ? calibration_texts : read_calibration(options_.calibrate);
    std::vector<rs_text> views;
    for (const std::string &text : texts) views.push_back(view_of(text));
    std::vector<picture> pictures;
    if (folder_.images) pictures = make_pictures(calibration_pictures, 1001);
    const std::vector<rs_image> images = views_of(pictures);
    model_ptr model = load_here(f32);
    session_ptr session = create_session(model.get(), 0, false);
    rs_calibration *result = nullptr;
    const size_t random = folder_.texts ? calibration_random : 0;
    check(rs_calibrate(session.get(), views.data(), views.size(), random, images.data(), images.size(), &result));
    calibration_.reset(result);
  }

  static std::vector<std::string> read_calibration(const std::string &path) {
    std::unique_ptr<text_source> source = texts_of_file(path, input_kind::automatic);
    std::vector<std::string> texts;
    for (text_item item; source->next(&item);) {
      if (!item.error.empty()) fail(source->place(item), ": ", item.error);
      if (!is_utf8(item.text)) fail(source->place(item), ": not valid UTF-8");
      texts.push_back(item.text);
    }
    if (texts.empty()) fail("no texts to calibrate with in ", in_quotes(path));
    return texts;
  }

  void on_tensor(const rs_convert_tensor &row) {
    errors_[{rs_type_name(row.type), row.layout == RS_PANELS ? "panels" : "rows"}].add(row);
    progress_.update(double(row.index + 1), double(row.total), type_ + ": " + row.name);
  }

  struct golden_vectors {
    std::vector<float> texts, images;
  };

  golden_vectors embed(const std::string &path) {
    progress_.update(1, 1, type_ + ": golden vectors");
    golden_vectors result;
    model_ptr model = load_here(path);
    if (folder_.texts) result.texts = golden_embeddings(model.get(), golden_texts);
    if (folder_.images) result.images = golden_image_embeddings(model.get(), golden_pictures);
    return result;
  }

  void write_result(const std::string &path, const std::string &typed, const golden_vectors &expected) {
    model_ptr model = load_here(typed);
    writer_ptr writer = open_writer(path);
    if (folder_.texts) {
      set_strs(writer.get(), "golden.texts", golden_texts);
      set_f32s(writer.get(), "golden.embeddings", expected.texts);
      set_f32s(writer.get(), "golden.cosine", cosines_.each);
    }
    if (folder_.images) {
      set_f32s(writer.get(), "golden.image_embeddings", expected.images);
      set_f32s(writer.get(), "golden.image_cosine", image_cosines_.each);
    }
    check(rs_writer_copy(writer.get(), model.get()));
    check(rs_writer_finish(writer.get()));
  }

  // -------------------------------------------------------------------------------------------- report

  std::string report_text() const {
    text_table table({"type", "layout", "tensors", "MiB", "max error", "RMS error", "relative RMS"});
    for (const auto &[key, sum] : errors_)
      table.add({key.first, key.second, std::to_string(sum.tensors), format("%.2f", double(sum.bytes) / (1 << 20)),
                 format("%.3g", sum.max_error), format("%.3g", sum.rms()), format("%.3g", sum.relative())});
    return table.str() + golden_line("sentences", cosines_) + golden_line("pictures", image_cosines_) + in_quotes(options_.output) +
           format(": %s, ", human_bytes(double(fs::file_size(target_))).c_str()) + options_.type + ", " +
           format("%.1f s\n", seconds_now() - begin_);
  }

  static std::string golden_line(const char *what, const golden_cosines &c) {
    if (c.each.empty()) return "";
    return format("golden %s: %zu, cosine with the f32 vectors: mean %.6f, lowest %.6f\n", what, c.each.size(), c.mean, c.lowest);
  }

  ordered golden_json(const char *what, const golden_cosines &c) const {
    return {{what, c.each.size()}, {"cosine_mean", c.mean}, {"cosine_min", c.lowest}, {"promise", promise_of(options_.type)}};
  }

  std::string report_json() const {
    model_ptr model = load_here(target_);
    rs_model_info info = model_info(model.get());
    ordered root = {{"output", options_.output},         {"name", info.name},
                    {"architecture", info.architecture}, {"type", options_.type},
                    {"parameters", info.parameters},     {"file_bytes", info.file_bytes},
                    {"seconds", seconds_now() - begin_}, {"types", ordered::array()}};
    for (const auto &[key, sum] : errors_)
      root["types"].push_back({{"type", key.first},
                               {"layout", key.second},
                               {"tensors", sum.tensors},
                               {"bytes", sum.bytes},
                               {"max_error", sum.max_error},
                               {"rms_error", sum.rms()},
                               {"relative_rms_error", sum.relative()}});
    if (folder_.texts) root["golden"] = golden_json("texts", cosines_);
    if (folder_.images) root["golden_images"] = golden_json("images", image_cosines_);
    root["notes"] = folder_.notes;
    return root.dump(1, ' ', false, ordered::error_handler_t::replace) + "\n";
  }

  void warn() const {
    warn("sentences", cosines_);
    warn("pictures", image_cosines_);
  }

  void warn(const char *what, const golden_cosines &c) const {
    double promise = promise_of(options_.type);
    if (!c.each.empty() && c.mean < promise)
      say(format("warning: cosine %.6f on the golden %s; %s usually keeps %g or more", c.mean, what, options_.type.c_str(),
                 promise));
  }

  const convert_options &options_;
  double begin_;
  progress progress_;
  std::string target_;
  hf_folder folder_;
  calibration_ptr calibration_;
  std::string type_;    // being written
  error_table errors_;  // of the type written last
  golden_cosines cosines_, image_cosines_;
};

int run_convert(const convert_options &options) { return converter(options).run(); }

}  // namespace

void add_convert(CLI::App *app, command_line *line) {
  auto options = std::make_shared<convert_options>();
  CLI::App *sub = add_command(app, "convert", "a Hugging Face folder to a weight file", examples, options, run_convert, line);
  sub->add_option("folder", options->folder, "the model's folder")->type_name("DIR")->required();
  sub->add_option("-o,--output", options->output, "the weight file to write")->type_name("FILE")->required();
  sub->add_option("--type", options->type, "of the matrices: f32, f16, q8 (8 bits) or q4 (4 bits) (default: q8)")
      ->type_name("TYPE")
      ->check(CLI::IsMember({"f32", "f16", "q8", "q4"}));
  sub->add_option("--name", options->name, "name of the model in the file (default: the folder's)")->type_name("NAME");
  sub->add_option("--license", options->license, "its license (default: what README.md says)")->type_name("NAME");
  sub->add_option("--source", options->source, "where it came from (default: what config.json says)")->type_name("ID");
  sub->add_option("--calibrate", options->calibrate,
                  "texts like those the model will see, a line each, to round the weights of\n"
                  "q8 and q4 by (default: built-in ones), besides sequences of random tokens.\n"
                  "Images are always the built-in pictures.  \"none\" rounds each weight for itself,\n"
                  "of either")
      ->type_name("FILE");
  sub->add_option("--max-tokens", options->max_tokens, "default limit of a text (default: what the folder says)")
      ->type_name("N")
      ->check(whole_number(1));
  sub->add_flag("--json", options->json, "the report as JSON");
}
