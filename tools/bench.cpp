// rs bench: how fast weight files run here, for batches of given shapes.
#include "json.h"
#include "op_times.h"
#include "options.h"
#include "output.h"
#include "progress.h"
#include "shapes.h"
#include "table.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <random>

namespace {

const char *const examples =
    "Examples:\n"
    "  rs bench -m minilm-q8.rsw\n"
    "  rs bench -m minilm-f32.rsw minilm-q8.rsw minilm-q4.rsw --shapes 1x16,32x128 -t 1\n"
    "  rs bench -m minilm-q8.rsw --shapes 8x128 --ops=layer\n"
    "  rs bench -m minilm-q8.rsw --drop 0,0.45 --drop-score -mlp    # each case without and with dropping, in turns\n"
    "A case is a shape and a weight file; 8x128 is 8 sequences of 128 tokens, special tokens included, in one call.  The tokens "
    "are\n"
    "random, the same for every file with that vocabulary.  Files take turns, run by run, so that whatever else the machine does\n"
    "hurts all alike.  Of the runs: median, and the time that a tenth (p10) and nine tenths (p90) stay below; tokens/s and\n"
    "sequences/s are of the median.  arena: memory of the session for that shape; peak RSS: the most memory that was resident in "
    "the\n"
    "process so far, all weight files together.  of peak: the share of what the multiply-accumulates could do if the CPU did "
    "nothing\n"
    "else, which is measured on the spot.\n"
    "--json prints an object a line for each case, as soon as it is measured; ms of \"ops\" are of one run.";

constexpr int warm_up_runs = 2;   // memory is made, weights are read, the CPU wakes up
constexpr size_t least_runs = 3;  // however long they take

struct bench_options {
  std::vector<std::string> models;
  std::string shapes = "1x16,1x128,8x128,32x128";
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
};

bench_model load(const std::string &file, const bench_options &options) {
  bench_model result{file, load_model(file, !options.no_check), {}, {}, {}, {}};
  result.info = model_info(result.model.get());
  result.drop = std::make_shared<drop_choice>(options.drop, result.model.get());
  rs_meta single;  // token ids, and a negative number where the text goes
  if (!find_meta(result.model.get(), "tokenizer.single", &single)) return result;
  std::vector<int32_t> *side = &result.before;
  for (size_t i = 0; i < single.count; ++i) {
    if (single.i64s[i] < 0) side = &result.after;
    else side->push_back(int32_t(single.i64s[i]));
  }
  return result;
}

void check_shape(const bench_model &model, const shape &shape) {
  if (shape.tokens > size_t(model.info.position_limit))
    fail_usage("--shapes: ", shape.str(), ": ", shape.tokens, " tokens are more than the ", model.info.position_limit,
               " positions of ", in_quotes(model.file));
  size_t special = model.before.size() + model.after.size();
  if (shape.tokens < special)
    fail_usage("--shapes: ", shape.str(), ": ", shape.tokens, " tokens leave no room for the ", special, " special tokens of ",
               in_quotes(model.file));
}

// ---------------------------------------------------------------------------------------------- a case

class bench_case {
 public:
  bench_case(const bench_model &model, const shape &shape, const bench_options &options, const rs_drop *drop)
      : model(model),
        drop(drop),
        shape_(shape),
        session_(create_session(model.model.get(), options.threads, !options.ops.empty())),
        vectors_(shape.batch * size_t(model.info.dim)) {
    std::mt19937_64 random(uint64_t(options.seed));
    for (size_t i = 0; i < shape.batch; ++i) {
      ids_.insert(ids_.end(), model.before.begin(), model.before.end());
      size_t end = (i + 1) * shape.tokens - model.after.size();
      while (ids_.size() < end) ids_.push_back(int32_t(random() % uint64_t(model.info.vocab)));
      ids_.insert(ids_.end(), model.after.begin(), model.after.end());
      starts_.push_back(ids_.size());
    }
  }

  void warm_up() {
    for (int i = 0; i < warm_up_runs; ++i) encode();
    warm_up_ops_ = op_times(session_.get());
  }

  void run() {
    double begin = seconds_now();
    encode();
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
  double sequences_per_second() const { return double(shape_.batch) / quantile(0.5); }
  double tokens_per_second() const { return double(ids_.size()) / quantile(0.5); }
  size_t arena_bytes() const { return rs_session_arena_bytes(session_.get()); }
  std::vector<op_time> ops() const { return op_times_since(session_.get(), warm_up_ops_); }

  const bench_model &model;
  const rs_drop *const drop;  // nullptr: none

 private:
  void encode() {
    auto params = sized<rs_encode_params>();
    params.drop = drop;
    check(rs_encode_ids(session_.get(), ids_.data(), nullptr, starts_.data(), shape_.batch, &params, vectors_.data(),
                        vectors_.size()));
  }

  shape shape_;
  session_ptr session_;
  std::vector<int32_t> ids_;
  std::vector<size_t> starts_ = {0};
  std::vector<float> vectors_;
  std::vector<double> seconds_;  // of each run
  std::vector<op_time> warm_up_ops_;
};

// ---------------------------------------------------------------------------------------------- all of them

class bench {
 public:
  explicit bench(const bench_options &options)
      : options_(options),
        shapes_(parse_shapes("--shapes", options.shapes)),
        threads_(rs_session_threads(create_session(nullptr, options.threads, false).get())),
        peaks_(threads_),
        progress_(progress::wanted_beside(STDOUT_FILENO)) {
    if (!(options.seconds >= 0.001 && options.seconds <= 3600))
      fail_usage("--seconds: ", options.seconds, " is not from 0.001 to 3600");
    for (const std::string &file : options.models) models_.push_back(load(file, options));
    for (const bench_model &model : models_)
      for (const shape &shape : shapes_) check_shape(model, shape);
  }

  int run() {
    for (; done_ < shapes_.size(); ++done_) {
      std::vector<std::unique_ptr<bench_case>> cases = measure(shapes_[done_]);
      std::optional<size_t> peak = peak_resident_bytes();
      for (size_t i = 0; i < cases.size(); ++i) {  // each with a schedule stands behind the same without
        const double gain = cases[i]->drop ? cases[i - 1]->quantile(0.5) / cases[i]->quantile(0.5) : 1;
        if (options_.json) print_json(*cases[i], shapes_[done_], peak, gain);
        else add_row(*cases[i], shapes_[done_], peak, gain);
      }
    }
    progress_.clear();
    if (!options_.json) print(heading() + table_.str() + op_tables_ + (op_tables_.empty() ? "" : "\n") + peaks_.str());
    return 0;
  }

 private:
  std::string heading() const {
    return join("rs ", rs_version(), ", ", rs_isa(), ", ", threads_, threads_ == 1 ? " thread\n\n" : " threads\n\n");
  }

  std::vector<std::unique_ptr<bench_case>> measure(const shape &shape) {
    std::vector<std::unique_ptr<bench_case>> cases;
    for (const bench_model &model : models_) {
      cases.push_back(std::make_unique<bench_case>(model, shape, options_, nullptr));
      if (const rs_drop *drop = model.drop->get()) cases.push_back(std::make_unique<bench_case>(model, shape, options_, drop));
    }
    for (auto &c : cases) c->warm_up();
    double begin = seconds_now(), wanted = options_.seconds * double(cases.size());
    for (double spent = 0; spent < wanted || cases[0]->runs() < least_runs; spent = seconds_now() - begin) {
      progress_.update(double(done_) + std::min(1.0, spent / wanted), double(shapes_.size()), shape.str());
      for (auto &c : cases) c->run();
    }
    for (auto &c : cases) c->finish();
    return cases;
  }

  void add_row(const bench_case &c, const shape &shape, std::optional<size_t> peak, double gain) {
    const auto ms = [&](double share) { return format("%.3f", 1e3 * c.quantile(share)); };
    table_.add({c.model.file, c.model.info.weight_type, shape.str() + (c.drop ? format(" drop %.2fx", gain) : ""),
                std::to_string(c.runs()), ms(0.5), ms(0.1), ms(0.9), format("%.0f", c.tokens_per_second()),
                format("%.1f", c.sequences_per_second()), human_bytes(double(c.arena_bytes())),
                peak ? human_bytes(double(*peak)) : ""});
    if (!options_.ops.empty())
      op_tables_ += join("\n", c.model.file, ", ", shape.str(), c.drop ? ", dropping" : "", ", one run\n",
                         op_table(c.ops(), options_.ops, c.runs(), &peaks_));
  }

  void print_json(const bench_case &c, const shape &shape, std::optional<size_t> peak, double gain) {
    nlohmann::ordered_json row = {{"model", c.model.file},
                                  {"weight_type", c.model.info.weight_type},
                                  {"isa", rs_isa()},
                                  {"threads", threads_},
                                  {"batch", shape.batch},
                                  {"tokens", shape.tokens},
                                  {"seed", options_.seed},
                                  {"runs", c.runs()},
                                  {"median_ms", 1e3 * c.quantile(0.5)},
                                  {"p10_ms", 1e3 * c.quantile(0.1)},
                                  {"p90_ms", 1e3 * c.quantile(0.9)},
                                  {"tokens_per_second", c.tokens_per_second()},
                                  {"sequences_per_second", c.sequences_per_second()},
                                  {"arena_bytes", c.arena_bytes()},
                                  {"peak_rss_bytes", nullptr}};
    if (peak) row["peak_rss_bytes"] = *peak;
    if (c.drop) row["drop"] = text_of(*c.drop), row["times_as_fast"] = gain;
    if (!options_.ops.empty()) row["ops"] = op_json(c.ops(), options_.ops, c.runs(), &peaks_);
    progress_.clear();
    print(row.dump(-1, ' ', false, json::error_handler_t::replace) + "\n");
  }

  const bench_options &options_;
  std::vector<shape> shapes_;
  int threads_;
  peak_rates peaks_;
  progress progress_;
  std::vector<bench_model> models_;
  size_t done_ = 0;  // shapes
  std::string op_tables_;
  text_table table_ =
      text_table({"model", "type", "shape", "runs", "ms", "p10", "p90", "tokens/s", "sequences/s", "arena", "peak RSS"});
};

int run_bench(const bench_options &options) { return bench(options).run(); }

}  // namespace

void add_bench(CLI::App *app, command_line *line) {
  auto options = std::make_shared<bench_options>();
  CLI::App *sub = add_command(app, "bench", "how fast weight files run here", examples, options, run_bench, line);
  sub->add_option("-m,--model", options->models, "weight files, as rs convert writes them")->type_name("FILE...")->required();
  sub->add_option("--shapes", options->shapes, "sequences by tokens, a list (default: " + options->shapes + ")")
      ->type_name("BxT,...");
  add_threads_option(sub, &options->threads);
  sub->add_option("--seconds", options->seconds, "time for each case (default: 1)")->type_name("S");
  sub->add_option("--seed", options->seed, "of the random tokens (default: 1)")->type_name("N")->check(CLI::NonNegativeNumber);
  sub->add_flag("--json", options->json, "one JSON object a line for each case");
  add_drop_options(sub, &options->drop);
  add_op_times_flag(sub, "--ops", &options->ops, "where the time goes, operator by operator (timing them costs a little)");
  add_no_check_option(sub, &options->no_check);
}
