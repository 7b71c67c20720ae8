// rs embed: texts to vectors, in the order of the input and in constant memory, however long it is.
#include "encode.h"
#include "op_times.h"
#include "options.h"
#include "output.h"
#include "progress.h"

#include <filesystem>

namespace {

constexpr size_t batch_bytes = size_t(4) << 20;  // a batch ends here even when it has fewer texts than asked for
constexpr int patience_ms = 5;                   // for the next text, before what there is gets encoded

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

const std::map<std::string, rs_thread_mode> thread_modes = {
    {"auto", RS_THREADS_AUTO}, {"latency", RS_THREADS_LATENCY}, {"throughput", RS_THREADS_THROUGHPUT}};

struct embed_options {
  std::string model;
  int threads = 0;
  std::string thread_mode = "auto";
  bool no_check = false;
  text_options texts;
  error_options errors;
  encode_options encode;
  std::string output, format = "jsonl";
  int batch = 64;
  std::string profile;  // how to sum it up; empty: no profile
};

class embedder {
 public:
  explicit embedder(const embed_options &options)
      : options_(options),
        source_(options.texts.open()),
        model_(load_model(options.model, !options.no_check)),
        info_(model_info(model_.get())),
        encoding_(options.encode, model_.get()),
        session_(create_session(model_.get(), options.threads, !options.profile.empty(), thread_modes.at(options.thread_mode))),
        out_(checked_output(options)),
        writer_(make_vector_writer(options.format, encoding_.dim, &out_)),
        progress_(progress::wanted_beside(out_.fd())) {}

  int run() {
    writer_->begin();
    while (!stopped_ && read_batch()) {
      encode_batch();
      write_batch();
      show_progress();
    }
    writer_->end();
    out_.commit();
    progress_.clear();
    report();
    return failed_ > 0 ? 1 : 0;
  }

 private:
  static const std::string &checked_output(const embed_options &options) {
    std::error_code error;
    if (std::filesystem::equivalent(options.output, options.model, error)) fail("the output is the weight file itself");
    return options.output;
  }

  // At least one text; more only as far as they are there already, so that a slow producer gets its answers at once.
  bool read_batch() {
    items_.clear();
    size_t bytes = 0;
    do {
      text_item item;
      if (!source_->next(&item)) break;
      bytes += item.text.size();
      items_.push_back(std::move(item));
    } while (items_.size() < size_t(options_.batch) && bytes < batch_bytes && source_->ready(patience_ms));
    return !items_.empty();
  }

  // One invalid text makes the whole call fail; it is marked and the others go again.
  void encode_batch() {
    good_.clear();
    for (size_t i = 0; i < items_.size(); ++i)
      if (items_[i].error.empty()) good_.push_back(i);
    while (!good_.empty()) {
      rs_status status = try_encode();
      if (status == RS_OK) return;
      size_t culprit = rs_encode_failed(session_.get());
      if (culprit >= good_.size()) check(status);
      items_[good_[culprit]].error = rs_last_error();
      good_.erase(good_.begin() + ptrdiff_t(culprit));
    }
  }

  rs_status try_encode() {
    texts_.clear();
    for (size_t i : good_) texts_.push_back(view_of(items_[i].text));
    size_t vectors = good_.size() * (encoding_.per_token() ? size_t(encoding_.max_tokens) : 1);
    values_.resize(vectors * size_t(encoding_.dim));
    infos_.assign(good_.size(), rs_text_info());
    return rs_encode(session_.get(), texts_.data(), texts_.size(), &encoding_.params, values_.data(), values_.size(),
                     infos_.data());
  }

  void write_batch() {
    const float *values = values_.data();
    size_t encoded = 0;
    for (const text_item &item : items_) {
      ++texts_seen_;
      if (!item.error.empty()) {
        progress_.clear();
        say(source_->place(item) + ": " + item.error);
        ++failed_;
        stopped_ = options_.errors.stop();
        if (stopped_) break;
        continue;
      }
      const rs_text_info &info = infos_[encoded++];
      int64_t vectors = encoding_.per_token() ? info.kept : 1;
      writer_->add({item.id, values, vectors, encoding_.dim, encoding_.per_token(), info});
      values += vectors * encoding_.dim;
      truncation_.add(info);
      tokens_ += size_t(info.tokens);
    }
    out_.flush();
  }

  void show_progress() {
    double seconds = progress_.elapsed();
    progress_.update(
        source_->bytes_done(), source_->bytes_total(),
        format("%zu texts, %.0f texts/s, %.0f tokens/s", texts_seen_, double(texts_seen_) / seconds, double(tokens_) / seconds));
  }

  void report() {
    std::string cut = truncation_.summary(encoding_.max_tokens, info_.position_limit);
    if (!cut.empty()) say(cut);
    if (failed_ > 0)
      say(join(failed_, " of ", texts_seen_, texts_seen_ == 1 ? " text" : " texts", " failed", stopped_ ? "; stopped there" : ""));
    if (!options_.profile.empty()) print_profile();
  }

  void print_profile() {
    peak_rates peaks(rs_session_threads(session_.get()));
    std::string table = op_table(op_times(session_.get()), options_.profile, 1, &peaks);
    fputs((table + peaks.str()).c_str(), stderr);
  }

  const embed_options &options_;
  std::unique_ptr<text_source> source_;
  model_ptr model_;
  rs_model_info info_;
  encoding encoding_;
  session_ptr session_;
  output_file out_;
  std::unique_ptr<vector_writer> writer_;
  progress progress_;

  std::vector<text_item> items_;  // the batch
  std::vector<size_t> good_;      // those of it that are texts
  std::vector<rs_text> texts_;
  std::vector<rs_text_info> infos_;
  std::vector<float> values_;

  size_t texts_seen_ = 0, failed_ = 0, tokens_ = 0;
  truncation_count truncation_;
  bool stopped_ = false;
};

int run_embed(const embed_options &options) { return embedder(options).run(); }

}  // namespace

void add_embed(CLI::App *app, command_line *line) {
  auto options = std::make_shared<embed_options>();
  CLI::App *sub = add_command(app, "embed", "texts to vectors", examples, options, run_embed, line);
  add_model_option(sub, &options->model, false);
  add_text_options(sub, &options->texts, line);
  sub->add_option("-o,--output", options->output, "write to this file (default: standard output)")->type_name("FILE");
  sub->add_option("--format", options->format, "jsonl, json, csv, npy or raw (default: jsonl)")
      ->type_name("NAME")
      ->check(CLI::IsMember(vector_formats));
  sub->add_option("-b,--batch", options->batch, "texts that are encoded together (default: 64); does not change the result")
      ->type_name("N")
      ->check(CLI::Range(1, 65536));
  add_threads_option(sub, &options->threads);
  sub->add_option("--thread-mode", options->thread_mode,
                  "latency: all threads work on the same texts; throughput: each on texts of its own\n"
                  "(default: auto, throughput where a batch can be shared evenly); does not change the result")
      ->type_name("MODE")
      ->check(CLI::IsMember(thread_modes));
  add_encode_options(sub, &options->encode);
  add_error_options(sub, &options->errors);
  add_no_check_option(sub, &options->no_check);
  add_op_times_flag(sub, "--profile", &options->profile, "print the time of each operator at the end, to standard error");
}
