#include "text_run.h"

#include "op_times.h"

#include <algorithm>

static constexpr int text_batch = 64, image_batch = 8;  // by default.  An image is some hundred tokens, a text some dozen
static constexpr size_t batch_bytes = size_t(4) << 20;  // a batch ends here even when it has fewer texts than asked for
static constexpr int patience_ms = 5;                   // for the next text, before what there is gets computed

static const std::map<std::string, rs_thread_mode> thread_modes = {
    {"auto", RS_THREADS_AUTO}, {"latency", RS_THREADS_LATENCY}, {"throughput", RS_THREADS_THROUGHPUT}};

text_run::text_run(const text_run_options &options, std::unique_ptr<text_source> source)
    : text_run(options, load_model(options.model, !options.no_check), std::move(source)) {}

text_run::text_run(const text_run_options &options, model_ptr model, std::unique_ptr<text_source> source)
    : options_(options),
      model_(std::move(model)),
      source_(std::move(source)),
      info_(model_info(model_.get())),
      session_(create_session(model_.get(), options.threads, !options.profile.empty(), thread_modes.at(options.thread_mode))),
      out_(not_the_model(options.output, options.model)),
      progress_(progress::wanted_beside(out_.fd())) {}

void text_run::load_images(const image_size &size) {
  noun_ = inputs_of(info_) == inputs::both ? "input" : "image";
  const int threads = rs_session_threads(session_.get());
  const int ahead = std::max(options_.batch > 0 ? options_.batch : image_batch, threads);
  source_ = std::make_unique<image_loader>(std::move(source_), model_.get(),
                                           image_loader::settings{size.width, size.height, threads, size_t(ahead)});
}

int text_run::run() {
  begin();
  while (!stopped_ && read_batch()) {
    compute_batch();
    write_batch();
    show_progress();
  }
  end();
  out_.commit();
  progress_.clear();
  report();
  return failed_ > 0 ? 1 : 0;
}

size_t text_run::batch_limit(const text_item &item) const {
  if (options_.batch > 0) return size_t(options_.batch);
  return std::min(most_items_, size_t(item.has_image ? image_batch : text_batch));
}

// At least one text; more only as far as they are there already, so that a slow producer gets its answers at once.
bool text_run::read_batch() {
  items_.clear();
  size_t bytes = 0, pixel_bytes = 0, limit = 0;
  do {
    text_item item;
    if (!source_->next(&item)) break;
    bytes += item.text.size() + item.pair.size();
    for (const std::string &text : item.list) bytes += text.size();
    pixel_bytes += item.pixels.size() * sizeof(float);
    limit = batch_limit(item);
    items_.push_back(std::move(item));
  } while (items_.size() < limit && bytes < batch_bytes && pixel_bytes < image_loader::max_pixel_bytes &&
           source_->ready(patience_ms));
  return !items_.empty();
}

// One text that cannot be used makes the whole call fail; it is marked and the others go again.
void text_run::compute_batch() {
  good_.clear();
  for (const text_item &item : items_)
    if (item.error.empty()) good_.push_back(&item);
  while (!good_.empty()) try {
      compute(good_);
      return;
    } catch (const item_failure &e) {
      items_[size_t(good_[e.item] - items_.data())].error = e.what();
      good_.erase(good_.begin() + ptrdiff_t(e.item));
    }
}

void text_run::check_items(rs_status status) const {
  if (status == RS_OK) return;
  size_t culprit = rs_encode_failed(session_.get());
  if (culprit < good_.size()) throw item_failure(culprit, rs_last_error());
  check(status);
}

void text_run::check_items(rs_status status, const std::vector<size_t> &items) const {
  if (status == RS_OK) return;
  size_t culprit = rs_encode_failed(session_.get());
  if (culprit < items.size()) throw item_failure(items[culprit], rs_last_error());
  check(status);
}

void text_run::write_batch() {
  size_t computed = 0;
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
    write(item, computed++);
  }
  out_.flush();
}

void text_run::show_progress() {
  double seconds = progress_.elapsed();
  const double rate = double(texts_seen_) / seconds;
  std::string done = format(rate < 10 ? "%zu %ss, %.1f %ss/s" : "%zu %ss, %.0f %ss/s", texts_seen_, noun_, rate, noun_);
  if (tokens_ > 0) done += format(", %.0f tokens/s", double(tokens_) / seconds);
  progress_.update(source_->bytes_done(), source_->bytes_total(), done);
}

void text_run::report() {
  std::string cut = truncation_.summary(max_tokens(), info_.position_limit, cut_advice());
  if (!cut.empty()) say(cut);
  if (failed_ > 0)
    say(join(failed_, " of ", texts_seen_, " ", noun_, texts_seen_ == 1 ? "" : "s", " failed", stopped_ ? "; stopped there" : ""));
  if (options_.profile.empty()) return;
  peak_rates peaks(model_.get(), rs_session_threads(session_.get()));
  std::string table = op_table(op_times(session_.get(), model_.get()), options_.profile, 1, &peaks);
  fputs((table + peaks.str()).c_str(), stderr);
}

void add_text_run_options(CLI::App *sub, text_run_options *options, const command_line *line, const char *what,
                          const char *members) {
  add_model_option(sub, &options->model, false);
  add_text_options(sub, &options->texts, line, what, members);
  sub->add_option("-o,--output", options->output, "write to this file (default: standard output)")->type_name("FILE");
  sub->add_option(
         "-b,--batch", options->batch,
         "texts, or images, that are computed together, 1 to 65536 (default: 64, of images 8);\ndoes not change the result")
      ->type_name("N")
      ->check(whole_number(1, 65536));
  add_threads_option(sub, &options->threads);
  sub->add_option("--thread-mode", options->thread_mode,
                  "latency: all threads work on the same texts; throughput: each on texts of its own\n"
                  "(default: auto, throughput where a batch can be shared evenly); does not change the result")
      ->type_name("MODE")
      ->check(CLI::IsMember(thread_modes));
  add_error_options(sub, &options->errors);
  add_no_check_option(sub, &options->no_check);
  add_op_times_flag(sub, "--profile", &options->profile, "print the time of each operator at the end, to standard error");
}
