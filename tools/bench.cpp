// rs bench: how fast weight files run here, for batches of given shapes.
#include "json.h"
#include "op_times.h"
#include "options.h"
#include "output.h"
#include "progress.h"
#include "shapes.h"
#include "table.h"
#include "tokens.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <random>

namespace {

const char *const examples =
    "Examples:\n"
    "  rs bench -m minilm-q8.rsw\n"
    "  rs bench -m minilm-f32.rsw minilm-q8.rsw minilm-q4.rsw --shapes 1x16,32x128 -t 1\n"
    "  rs bench -m minilm-q8.rsw --shapes 8x128 --ops=layer\n"
    "  rs bench -m minilm-q8.rsw --drop 0,0.45 --drop-score -mlp    # each case without and with dropping, in turns\n"
    "  rs bench -m dinov2.rsw --shapes 1x224,8x224,1x518x392        # images, in pixels\n"
    "A case is a shape and a weight file; 8x128 is 8 sequences of 128 tokens, special tokens included, in one call.\n"
    "The tokens are random, the same for every file with that vocabulary.  Of a model that takes only images, 8x224\n"
    "is 8 images of 224x224 pixels, 8x320x240 of that width and height, as they come from preparation (random too).\n"
    "Of a model that takes both, texts are measured.\n"
    "Files take turns, run by run, so that whatever else the machine does hurts all alike.  Of the runs: median,\n"
    "and the time that a tenth (p10) and nine tenths (p90) stay below; tokens/s and sequences/s are of the median.\n"
    "arena: memory of the session for that shape; peak RSS: the most memory that was resident in the process so\n"
    "far, all weight files together.  of peak: the share of what the multiply-accumulates could do if the CPU did\n"
    "nothing else, which is measured on the spot.\n"
    "On a card: of peak is how much of the time operators would take at the rate of the arithmetic or, of linear layers,\n"
    "at that of the memory, whichever is longer, by the clocks that the card states.  An operator that is done with\n"
    "another has no time of its own.  device memory: of the session for that shape, and the weights.\n"
    "--json prints an object a line for each case, as soon as it is measured; ms of \"ops\" are of one run.";

constexpr int warm_up_runs = 2;   // memory is made, weights are read, the CPU wakes up
constexpr size_t least_runs = 3;  // however long they take

const char *const text_shapes = "1x16,1x128,8x128,32x128";
// On a card, which is at its best with much at once.
const char *const card_text_shapes = "1x16,1x128,1x512,32x16,32x128,32x512,256x16,256x128,256x512";
const char *const card_image_shapes = "1x224,32x224,1x518,32x518";

struct bench_options {
  std::vector<std::string> models;
  std::string shapes;
  const CLI::Option *shapes_option =
      nullptr;  // not given: of texts text_shapes, of images 1 and 8 of the size that the model wants
  int threads = 0;
  double seconds = 1;
  int64_t seed = 1;
  bool json = false, no_check = false;
  std::string ops;  // how to sum up operators; empty: no table of them
  drop_options drop;
};

// ---------------------------------------------------------------------------------------------- a weight file

struct bench_model {
  std::string file;
  model_ptr model;
  rs_model_info info;
  std::vector<int32_t> before, after;  // special tokens around a text
  std::shared_ptr<drop_choice> drop;
  bool of_images() const { return info.text_hidden == 0; }
};

bench_model load(const std::string &file, const bench_options &options) {
  bench_model result{file, load_model(file, !options.no_check), {}, {}, {}, {}};
  result.info = model_info(result.model.get());
  result.drop = std::make_shared<drop_choice>(options.drop, result.model.get());
  if (result.drop->get() && inputs_of(result.info) == inputs::both)
    fail_usage(in_quotes(file), " takes texts and images: rs bench measures its texts, and schedules are for its images");
  std::vector<int32_t> *side = &result.before;
  for (int64_t id : template_of(result.model.get(), false)) {
    if (id < 0) side = &result.after;
    else side->push_back(int32_t(id));
  }
  return result;
}

// ---------------------------------------------------------------------------------------------- what is encoded

class workload {
 public:
  virtual ~workload() = default;
  virtual std::string str() const = 0;
  virtual size_t batch() const = 0;
  virtual size_t tokens() const = 0;  // of a sequence
  virtual void describe(nlohmann::ordered_json *row) const = 0;
  virtual rs_status encode(rs_session *session, const rs_encode_params &params, std::vector<float> *out) const = 0;
};

class text_workload : public workload {
 public:
  text_workload(const bench_model &model, const shape &shape, uint64_t seed) : shape_(shape) {
    if (shape.tokens > size_t(model.info.position_limit))
      fail_usage("--shapes: ", shape.str(), ": ", shape.tokens, " tokens are more than the ", model.info.position_limit,
                 " positions of ", in_quotes(model.file));
    const size_t special = model.before.size() + model.after.size();
    if (shape.tokens < special)
      fail_usage("--shapes: ", shape.str(), ": ", shape.tokens, " tokens leave no room for the ", special, " special tokens of ",
                 in_quotes(model.file));
    std::mt19937_64 random(seed);
    for (size_t i = 0; i < shape.batch; ++i) {
      ids_.insert(ids_.end(), model.before.begin(), model.before.end());
      const size_t end = (i + 1) * shape.tokens - model.after.size();
      while (ids_.size() < end) ids_.push_back(int32_t(random() % uint64_t(model.info.vocab)));
      ids_.insert(ids_.end(), model.after.begin(), model.after.end());
      starts_.push_back(ids_.size());
    }
  }
  std::string str() const override { return shape_.str(); }
  size_t batch() const override { return shape_.batch; }
  size_t tokens() const override { return shape_.tokens; }
  void describe(nlohmann::ordered_json *row) const override {
    (*row)["batch"] = shape_.batch;
    (*row)["tokens"] = shape_.tokens;
  }
  rs_status encode(rs_session *session, const rs_encode_params &params, std::vector<float> *out) const override {
    return rs_encode_ids(session, ids_.data(), nullptr, starts_.data(), shape_.batch, &params, out->data(), out->size());
  }

 private:
  shape shape_;
  std::vector<int32_t> ids_;
  std::vector<size_t> starts_ = {0};
};

class image_workload : public workload {
 public:
  image_workload(const bench_model &model, const image_batch &batch, uint64_t seed) : batch_(batch) {
    if (rs_image_get_shape(model.model.get(), int32_t(batch.width), int32_t(batch.height), &shape_) != RS_OK)
      fail_usage("--shapes: ", batch.str(), ": ", rs_last_error(), " (", in_quotes(model.file), ")");
    // One image, every time: what is in it changes nothing of the work.
    constexpr float spread = 2;  // about what normalized pixels have
    std::mt19937_64 random(seed);
    pixels_.resize(3 * batch.width * batch.height);
    for (float &value : pixels_) value = spread * (2 * float(random() >> 40) / float(1 << 24) - 1);
    images_.resize(batch.batch, {RS_IMAGE_PIXELS, pixels_.data(), 0, int32_t(batch.width), int32_t(batch.height)});
  }
  std::string str() const override { return batch_.str(); }
  size_t batch() const override { return batch_.batch; }
  size_t tokens() const override { return size_t(shape_.tokens); }
  void describe(nlohmann::ordered_json *row) const override {
    (*row)["batch"] = batch_.batch;
    (*row)["width"] = batch_.width;
    (*row)["height"] = batch_.height;
    (*row)["tokens"] = shape_.tokens;
  }
  rs_status encode(rs_session *session, const rs_encode_params &params, std::vector<float> *out) const override {
    rs_encode_params sized = params;
    sized.image_width = int32_t(batch_.width);
    sized.image_height = int32_t(batch_.height);
    return rs_encode_images(session, images_.data(), images_.size(), &sized, out->data(), out->size(), nullptr);
  }

 private:
  image_batch batch_;
  rs_image_shape shape_ = {};
  std::vector<float> pixels_;
  std::vector<rs_image> images_;
};

using workloads = std::vector<std::unique_ptr<workload>>;

// Those of a list, for models of so many positions.
std::vector<shape> shapes_within(const char *shapes, size_t positions) {
  std::vector<shape> list;
  for (shape one : parse_shapes("--shapes", shapes)) {
    one.tokens = std::min(one.tokens, positions);
    if (list.empty() || one.str() != list.back().str()) list.push_back(one);
  }
  return list;
}

// positions: that all the models have.
workloads workloads_of(const bench_model &model, const bench_options &options, bool on_card, size_t positions) {
  const auto seed = uint64_t(options.seed);
  workloads list;
  if (!model.of_images()) {
    for (const shape &shape : options.shapes_option->count() == 0
                                  ? shapes_within(on_card ? card_text_shapes : text_shapes, positions)
                                  : parse_shapes("--shapes", options.shapes))
      list.push_back(std::make_unique<text_workload>(model, shape, seed));
    return list;
  }
  std::string shapes = options.shapes;
  const int32_t w = model.info.image_width, h = model.info.image_height;
  if (options.shapes_option->count() == 0) shapes = on_card ? card_image_shapes : join("1x", w, "x", h, ",8x", w, "x", h);
  for (const image_batch &batch : parse_image_batches("--shapes", shapes))
    list.push_back(std::make_unique<image_workload>(model, batch, seed));
  return list;
}

// ---------------------------------------------------------------------------------------------- a case

class bench_case {
 public:
  bench_case(const bench_model &model, const workload &work, const bench_options &options, const rs_drop *drop)
      : model(model),
        work(work),
        drop(drop),
        threads_(options.threads),
        session_(create_session(model.model.get(), options.threads, !options.ops.empty())),
        vectors_(work.batch() * size_t(model.info.dim)) {}

  void warm_up(peak_rates *peaks) {
    if (peaks->on_card()) {  // in a session of its own, since timing operators costs much there
      const session_ptr session = create_session(model.model.get(), threads_, true);
      encode(session.get());
      for (const op_time &time : op_times(session.get(), model.model.get())) least_ += peaks->least(time);
    }
    for (int i = 0; i < warm_up_runs; ++i) encode(session_.get());
    warm_up_ops_ = op_times(session_.get(), model.model.get());
  }

  void run() {
    double begin = seconds_now();
    encode(session_.get());
    seconds_.push_back(seconds_now() - begin);
  }

  void finish() { std::sort(seconds_.begin(), seconds_.end()); }

  // After finish(): the time that a share of the runs stays below, between two runs in proportion.
  double quantile(double share) const {
    double at = share * double(seconds_.size() - 1);
    auto low = size_t(at);
    size_t high = std::min(low + 1, seconds_.size() - 1);
    return seconds_[low] + (at - double(low)) * (seconds_[high] - seconds_[low]);
  }

  size_t runs() const { return seconds_.size(); }
  double sequences_per_second() const { return double(work.batch()) / quantile(0.5); }
  double tokens_per_second() const { return double(work.batch() * work.tokens()) / quantile(0.5); }
  size_t arena_bytes() const { return rs_session_arena_bytes(session_.get()); }
  double share_of_peak() const { return least_ / quantile(0.5); }  // on a card; 0: not known
  std::vector<op_time> ops() const { return op_times_since(session_.get(), model.model.get(), warm_up_ops_); }

  const bench_model &model;
  const workload &work;
  const rs_drop *const drop;  // nullptr: none

 private:
  void encode(rs_session *session) {
    auto params = sized<rs_encode_params>();
    params.drop = drop;
    check(work.encode(session, params, &vectors_));
  }

  int threads_;
  session_ptr session_;
  std::vector<float> vectors_;
  double least_ = 0;             // seconds that a run takes on a card at its peaks
  std::vector<double> seconds_;  // of each run
  std::vector<op_time> warm_up_ops_;
};

// ---------------------------------------------------------------------------------------------- all of them

class bench {
 public:
  explicit bench(const bench_options &options) : options_(options), progress_(progress::wanted_beside(STDOUT_FILENO)) {
    if (!(options.seconds >= 0.001 && options.seconds <= 3600))
      fail_usage("--seconds: ", options.seconds, " is not from 0.001 to 3600");
    size_t positions = SIZE_MAX;
    for (const std::string &file : options.models) {
      models_.push_back(load(file, options));
      if (!models_.back().of_images()) positions = std::min(positions, size_t(models_.back().info.position_limit));
    }
    on_card_ = strcmp(rs_model_device(models_[0].model.get()), "cpu") != 0;
    if (!on_card_) threads_ = rs_session_threads(create_session(nullptr, options.threads, false).get());
    peaks_.emplace(models_[0].model.get(), threads_);
    for (const bench_model &model : models_) {
      if (model.of_images() != models_[0].of_images())
        fail_usage(in_quotes(model.file), " and ", in_quotes(models_[0].file),
                   ": one takes images, the other texts; measure them one by one");
      work_.push_back(workloads_of(model, options, on_card_, positions));
      // Models of other sizes, where no shapes are given: each row has to be of one.
      for (size_t i = 0; i < work_[0].size(); ++i)
        if (work_.back()[i]->str() != work_[0][i]->str())
          fail_usage(in_quotes(model.file), " wants images of another size than ", in_quotes(models_[0].file), ": give --shapes");
    }
  }

  int run() {
    std::vector<std::string> head = {"model",
                                     "type",
                                     "shape",
                                     "runs",
                                     "ms",
                                     "p10",
                                     "p90",
                                     "tokens/s",
                                     models_[0].of_images() ? "images/s" : "sequences/s",
                                     on_card_ ? "device memory" : "arena",
                                     "peak RSS"};
    if (on_card_) head.emplace_back("of peak");
    table_ = text_table(head);
    for (; done_ < shapes(); ++done_) {
      std::vector<std::unique_ptr<bench_case>> cases = measure();
      std::optional<size_t> peak = peak_resident_bytes();
      for (size_t i = 0; i < cases.size(); ++i) {  // each with a schedule stands behind the same without
        const double gain = cases[i]->drop ? cases[i - 1]->quantile(0.5) / cases[i]->quantile(0.5) : 1;
        if (options_.json) print_json(*cases[i], peak, gain);
        else add_row(*cases[i], peak, gain);
      }
    }
    progress_.clear();
    if (!options_.json)
      print(heading() + table_->str() + op_tables_ + (on_card_ || !op_tables_.empty() ? "\n" : "") + peaks_->str());
    return 0;
  }

 private:
  std::string heading() const {
    if (on_card_) return format("rs %s, %s, %s\n\n", rs_version(), peaks_->device.device, peaks_->device.name);
    return join("rs ", rs_version(), ", ", rs_isa(), ", ", threads_, threads_ == 1 ? " thread\n\n" : " threads\n\n");
  }

  size_t shapes() const { return work_[0].size(); }

  std::vector<std::unique_ptr<bench_case>> measure() {
    std::vector<std::unique_ptr<bench_case>> cases;
    for (size_t m = 0; m < models_.size(); ++m) {
      const bench_model &model = models_[m];
      const workload &work = *work_[m][done_];
      cases.push_back(std::make_unique<bench_case>(model, work, options_, nullptr));
      if (const rs_drop *drop = model.drop->get()) cases.push_back(std::make_unique<bench_case>(model, work, options_, drop));
    }
    for (auto &c : cases) c->warm_up(&*peaks_);
    double begin = seconds_now(), wanted = options_.seconds * double(cases.size());
    for (double spent = 0; spent < wanted || cases[0]->runs() < least_runs; spent = seconds_now() - begin) {
      progress_.update(double(done_) + std::min(1.0, spent / wanted), double(shapes()), cases[0]->work.str());
      for (auto &c : cases) c->run();
    }
    for (auto &c : cases) c->finish();
    return cases;
  }

  void add_row(const bench_case &c, std::optional<size_t> peak, double gain) {
    const auto ms = [&](double share) { return format("%.3f", 1e3 * c.quantile(share)); };
    const size_t weights = on_card_ ? c.model.info.file_bytes : 0;
    std::vector<std::string> row = {c.model.file,
                                    c.model.info.weight_type,
                                    c.work.str() + (c.drop ? format(" drop %.2fx", gain) : ""),
                                    std::to_string(c.runs()),
                                    ms(0.5),
                                    ms(0.1),
                                    ms(0.9),
                                    format("%.0f", c.tokens_per_second()),
                                    format("%.1f", c.sequences_per_second()),
                                    human_bytes(double(c.arena_bytes() + weights)),
                                    peak ? human_bytes(double(*peak)) : ""};
    if (on_card_) row.push_back(c.share_of_peak() > 0 ? format("%.1f %%", 100 * c.share_of_peak()) : "-");
    table_->add(row);
    if (!options_.ops.empty())
      op_tables_ += join("\n", c.model.file, ", ", c.work.str(), c.drop ? ", dropping" : "", ", one run\n",
                         op_table(c.ops(), options_.ops, c.runs(), &*peaks_));
  }

  void print_json(const bench_case &c, std::optional<size_t> peak, double gain) {
    nlohmann::ordered_json row = {{"model", c.model.file}, {"weight_type", c.model.info.weight_type}};
    if (on_card_) row["device"] = peaks_->device.device, row["device_name"] = peaks_->device.name;
    else row["isa"] = rs_isa(), row["threads"] = threads_;
    c.work.describe(&row);
    row["seed"] = options_.seed;
    row["runs"] = c.runs();
    row["median_ms"] = 1e3 * c.quantile(0.5);
    row["p10_ms"] = 1e3 * c.quantile(0.1);
    row["p90_ms"] = 1e3 * c.quantile(0.9);
    row["tokens_per_second"] = c.tokens_per_second();
    row[c.model.of_images() ? "images_per_second" : "sequences_per_second"] = c.sequences_per_second();
    if (on_card_) {
      const rs_device_info &d = peaks_->device;
      const std::pair<const char *, double> rates[] = {{"share_of_peak", c.share_of_peak()},
                                                       {"peak_int8_macs_per_second", d.int8_macs},
                                                       {"peak_f16_macs_per_second", d.f16_macs},
                                                       {"peak_bytes_per_second", d.bytes_per_second}};
      for (const auto &[key, rate] : rates) row[key] = rate > 0 ? nlohmann::ordered_json(rate) : nullptr;
      row["weight_bytes"] = c.model.info.file_bytes;
    }
    row["arena_bytes"] = c.arena_bytes();
    row["peak_rss_bytes"] = nullptr;
    if (peak) row["peak_rss_bytes"] = *peak;
    if (c.drop) row["drop"] = text_of(*c.drop), row["times_as_fast"] = gain;
    if (!options_.ops.empty()) row["ops"] = op_json(c.ops(), options_.ops, c.runs(), &*peaks_);
    progress_.clear();
    print(row.dump(-1, ' ', false, json::error_handler_t::replace) + "\n");
  }

  const bench_options &options_;
  bool on_card_ = false;
  int threads_ = 0;  // of the CPU
  std::optional<peak_rates> peaks_;
  progress progress_;
  std::vector<bench_model> models_;
  std::vector<workloads> work_;  // of each model
  size_t done_ = 0;              // shapes
  std::string op_tables_;
  std::optional<text_table> table_;
};

int run_bench(const bench_options &options) { return bench(options).run(); }

}  // namespace

void add_bench(CLI::App *app, command_line *line) {
  auto options = std::make_shared<bench_options>();
  CLI::App *sub = add_command(app, "bench", "how fast weight files run here", examples, options, run_bench, line);
  sub->add_option("-m,--model", options->models, "weight files, as rs convert writes them")->type_name("FILE...")->required();
  options->shapes_option = sub->add_option("--shapes", options->shapes,
                                           join("sequences by tokens, a list (default: ", text_shapes,
                                                ",\nor as many tokens as the model has positions);\nof models that take only "
                                                "images, images by pixels (default: 1 and 8 of the size that the model wants);\n"
                                                "on a card by default ",
                                                card_text_shapes, ";\nof images ", card_image_shapes))
                               ->type_name("BxT,...");
  add_threads_option(sub, &options->threads);
  sub->add_option("--seconds", options->seconds, "time for each case (default: 1)")->type_name("S");
  sub->add_option("--seed", options->seed, "of the random tokens (default: 1)")->type_name("N")->check(whole_number(0, INT64_MAX));
  sub->add_flag("--json", options->json, "one JSON object a line for each case");
  add_drop_options(sub, &options->drop);
  add_op_times_flag(sub, "--ops", &options->ops, "where the time goes, operator by operator (timing them costs a little)");
  add_no_check_option(sub, &options->no_check);
}
