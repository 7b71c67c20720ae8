// rs tune: schedules of token dropping that suit a model, data and a machine.
//
// The data is split in two halves.  The search (tune_search.h) looks at one of them, at small shares first, and by the arithmetic
// that a schedule leaves; what it comes to is timed on this machine, all in turns, and judged on the other half too, so that what
// was chosen by luck shows.
#include "chart.h"
#include "json.h"
#include "metrics.h"
#include "options.h"
#include "output.h"
#include "pareto.h"
#include "progress.h"
#include "table.h"
#include "tasks.h"
#include "tune_journal.h"
#include "tune_search.h"

#include <unistd.h>
#include <algorithm>
#include <cmath>
#include <filesystem>

namespace {

using ordered = nlohmann::ordered_json;

const char *const examples =
    "Examples:\n"
    "  rs tune -m minilm.rsw --data texts.jsonl --max-loss 1% --store fast -o plot.svg\n"
    "  rs tune -m minilm-f32.rsw --also minilm-q8.rsw --metric retrieval --data cranfield --store best=1% --store fast=3%\n"
    "  rs tune -m cifar.rsw --data train --max-loss 1% --store fast          # a folder of images, in a folder a class\n"
    "  rs embed -m minilm.rsw --drop-profile fast -f texts.jsonl\n"
    "The loss is that of the metric, relative to what the first weight file gives without dropping; for cosine, 1 - the mean "
    "cosine\n"
    "with its vectors.  Schedules are chosen on one half of the data, by --seed; 'held out' is the other half.\n"
    "What is found goes into a journal, line by line: the same command goes on where it was cut off; done, it says the same\n"
    "again (or finds more, where --minutes ended it).  In a new journal, the same --seed and --passes find the same schedules\n"
    "and losses; times, and by them the choice, are measured again, as they are with another --batch, --rounds or -t.";

constexpr int most_passes = 1 << 20;

struct tune_options {
  std::vector<std::string> models, also, stores;
  std::string metric, max_loss, output, journal, image_size;
  double budget_ms = 0, minutes = 10;
  int passes = 0, rounds = 0, threads = 0, limit = 0, limit_documents = 0, batch = 64;
  uint64_t seed = 1;
  bool no_check = false, json = false, resume = false, anew = false;
  std::string model, data;
  encode_options encode;
  bool of_images() const { return task_of_images(metric, data); }
  const char *unit() const { return of_images() ? "image" : "text"; }
};

// ---------------------------------------------------------------------------------------------- limits

// What a schedule must keep to.
struct limits {
  double loss = 0, ms = 0;  // 0: none
  bool any() const { return loss > 0 || ms > 0; }
  std::string str() const {
    std::string text;
    if (loss > 0) text = format("a loss of at most %g %%", 100 * loss);
    if (ms > 0) text += (text.empty() ? "" : " and ") + format("at most %g ms", ms);
    return text;
  }
};

double parse_number(const std::string &text, const std::string &option) {
  const std::string wrong = above_zero()(text);
  if (!wrong.empty()) fail_usage(option, ": ", wrong);
  return strtod(text.c_str(), nullptr);
}

bool take_ending(std::string *text, const std::string &ending) {
  if (text->size() <= ending.size() || text->compare(text->size() - ending.size(), ending.size(), ending) != 0) return false;
  text->resize(text->size() - ending.size());
  return true;
}

// "1%", "0.01"
double parse_loss(const std::string &text, const std::string &option) {
  std::string number = text;
  const bool percent = take_ending(&number, "%");
  const double value = parse_number(number, option) / (percent ? 100 : 1);
  if (value >= 1) fail_usage(option, ": ", in_quotes(text), " is all there is or more; write 1% or 0.01");
  return value;
}

// A schedule that is to be stored: NAME, NAME=1%, NAME=5ms.
struct store_request {
  std::string name;
  limits keep_to;
};

store_request parse_store(const std::string &text, const limits &usual) {
  const size_t equals = text.find('=');
  store_request request{text.substr(0, equals), usual};
  if (request.name.empty() || request.name.find_first_of(" \t\n,=") != std::string::npos)
    fail_usage("--store: ", in_quotes(text), " begins with no name (which has no spaces and no commas)");
  if (equals == std::string::npos) {
    if (!usual.any())
      fail_usage("--store ", request.name, ": how good? add --max-loss or --budget-ms, or write ", request.name, "=1%");
    return request;
  }
  std::string limit = text.substr(equals + 1);
  request.keep_to = {};
  if (take_ending(&limit, "ms")) request.keep_to.ms = parse_number(limit, "--store " + request.name);
  else request.keep_to.loss = parse_loss(limit, "--store " + request.name);
  return request;
}

// ---------------------------------------------------------------------------------------------- weight files

class tune_file {
 public:
  tune_file(const std::string &path, const tune_options &options)
      : path_(path),
        threads_(options.threads),
        retrieval_(options.metric == "retrieval"),
        prompt_option_(options.encode.prompt_option),
        model_(load_model(path, !options.no_check)),
        encoding_(options.encode, model_.get()) {
    if (!options.of_images()) check_takes_texts(model_.get(), options.metric);
    if (encoding_.per_token()) fail_usage("rs tune compares vectors of texts, not of tokens");
    const image_size size = image_size_of(options.image_size, model_.get());
    encoding_.params.image_width = size.width;
    encoding_.params.image_height = size.height;
    layers_ = task_layers(model_.get(), options.of_images());
    hash_ = hash_of_model(model_.get());
  }
  const std::string &path() const { return path_; }
  const std::string &hash() const { return hash_; }
  const rs_model *model() const { return model_.get(); }
  rs_model_info info() const { return model_info(model_.get()); }
  int32_t layers() const { return layers_; }  // that the task runs

  // A session of its own for each schedule, so that each has an arena to be measured, and goes with all that was made for it.
  session_ptr open(const rs_drop *drop, eval_setting *setting) const {
    session_ptr session = create_session(model_.get(), threads_, false);
    setting->model = model_.get();
    setting->session = session.get();
    setting->texts = setting->queries = encoding_.params;
    setting->texts.drop = drop;
    setting->dim = encoding_.dim;
    if (retrieval_) {
      const bool given = prompt_option_->count() > 0;
      use_stored_prompts(setting, !given, !given);
    }
    return session;
  }

 private:
  std::string path_;
  int threads_;
  bool retrieval_;
  const CLI::Option *prompt_option_;
  model_ptr model_;
  encoding encoding_;
  int32_t layers_ = 0;
  std::string hash_;
};

evaluation evaluate_once(const eval_task &task, const eval_setting &setting) {
  evaluation result;
  std::unique_ptr<eval_run> run = task.begin(setting);
  for (size_t unit = 0; unit < task.units(); ++unit) {
    run->load(unit);
    run->run(unit);
  }
  run->finish(&result);
  return result;
}

// ---------------------------------------------------------------------------------------------- arithmetic

// Multiplications of a text's layers, in units that are the same for all lengths: what a linear layer needs for a token, and what
// attention needs for a pair of tokens.
class cost_model {
 public:
  cost_model(const rs_model *model, bool of_images) : model_(model), layers_(task_layers(model, of_images)) {
    const rs_model_info info = model_info(model);
    const double c = of_images ? info.image_hidden : info.text_hidden;
    double intermediate = 4 * c, matrices = 2;
    const std::string architecture = info.architecture;
    for (const std::string &tower : {architecture + ".", architecture + (of_images ? ".image." : ".text.")}) {
      rs_meta meta;
      if (find_meta(model, (tower + "intermediate_size").c_str(), &meta) && meta.kind == RS_META_I64)
        intermediate = double(meta.i64);
      if (find_meta(model, (tower + "gated").c_str(), &meta) && meta.kind == RS_META_BOOL && meta.boolean) matrices = 3;
    }
    token_ = 4 * c * c + matrices * c * intermediate;
    pair_ = 2 * c;
    if (of_images) prefix_ = image_prefix(model);
  }

  double of(int32_t tokens, const rs_drop *drop) const {
    std::vector<int32_t> counts(size_t(layers_) + 1, tokens);
    const int32_t fixed = std::min(tokens, prefix_ >= 0                                ? prefix_
                                           : !drop || drop->protect == RS_PROTECT_NONE ? 0
                                           : drop->protect == RS_PROTECT_SPECIAL       ? 2
                                                                                       : 1);
    if (drop) check(rs_drop_counts(model_, drop, tokens, fixed, counts.data()));
    double sum = 0;
    for (int32_t layer = 0; layer < layers_; ++layer) {
      const double n = counts[size_t(layer)];
      sum += n * token_ + n * n * pair_;
    }
    return sum;
  }

  double share(const std::map<int32_t, size_t> &lengths, const rs_drop *drop) const {
    double with = 0, without = 0;
    for (auto [tokens, texts] : lengths) {
      with += double(texts) * of(tokens, drop);
      without += double(texts) * of(tokens, nullptr);
    }
    return without > 0 ? with / without : 1;
  }

 private:
  const rs_model *model_;
  int32_t layers_, prefix_ = -1;  // prefix: of images
  double token_, pair_;
};

// ---------------------------------------------------------------------------------------------- judging

// The part of the data that one look takes in.
struct data_part {
  std::unique_ptr<eval_task> task;
  evaluation full;  // by the first weight file, without dropping
};

// "Rungs" of the journal that are none: the other half, and what was timed.
constexpr size_t held_out = 999, timed_ms = 998, timed_speedup = 997;

class data_judge : public tune_judge {
 public:
  data_judge(const tune_options &options, const std::vector<std::unique_ptr<tune_file>> &files)
      : options_(options), files_(files), cost_(files[0]->model(), options.of_images()) {
    // Few texts tell little, so the first look takes in some even of small data.
    data_part all = part(1, 1);
    const double few = options.metric == "cosine" ? 24 : 128;
    for (double share : {1.0 / 16, 1.0 / 4}) {
      const double wanted = std::max(share, few / double(all.full.texts));
      if (wanted < 0.7 && (parts_.empty() || wanted > 2 * last_share_)) parts_.push_back(part(1, last_share_ = wanted));
    }
    parts_.push_back(std::move(all));
    other_ = part(2, 1);
  }

  void open_journal(tune_journal *journal) { journal_ = journal; }

  size_t rungs() const override { return parts_.size(); }
  double work(size_t rung) const override { return parts_[rung].full.full_token_layers; }
  double share(const drop_candidate &candidate) override {
    return cost_.share(parts_.back().full.lengths, candidate_drop(candidate, options_.seed).get());
  }
  bool possible(const drop_candidate &candidate) override {
    return drop_error(files_[0]->model(), *candidate_drop(candidate, options_.seed).get()).empty();
  }
  double loss(size_t rung, const drop_candidate &candidate) override { return loss_of(0, rung, &candidate); }

  // candidate nullptr: without dropping; rung held_out: the other half.
  double loss_of(size_t file, size_t rung, const drop_candidate *candidate) {
    const double value = quality(file, rung, candidate);
    return std::isfinite(value) ? 1 - value / part_of(rung).full.quality() : 1;
  }

  double quality(size_t file, size_t rung, const drop_candidate *candidate) {
    const data_part &part = part_of(rung);
    if (file == 0 && !candidate) return part.full.quality();
    std::unique_ptr<candidate_drop> drop;
    if (candidate) drop = std::make_unique<candidate_drop>(*candidate, options_.seed);
    const std::string text = drop ? drop->text() : "";
    if (const double *known = journal_->find(file, rung, text)) return *known;
    eval_setting setting;
    session_ptr session = files_[file]->open(drop ? drop->get() : nullptr, &setting);
    const double value = evaluate_once(*part.task, setting).quality();
    journal_->add(file, rung, text, value);
    return value;
  }

  const data_part &chosen_on() const { return parts_.back(); }
  // Large enough to be timed, small enough to be timed often.
  const data_part &timed() const {
    constexpr size_t enough = 100;
    for (const data_part &part : parts_)
      if (part.full.texts >= enough) return part;
    return parts_.back();
  }
  const data_part &other() const { return other_; }
  double seconds_of_a_pass() const { return seconds_; }

 private:
  const data_part &part_of(size_t rung) const { return rung == held_out ? other_ : parts_[rung]; }

  data_part part(int half, double share) {
    task_options options;
    options.data = options_.data;
    options.limit = options.limit_queries = options_.limit;
    options.limit_documents = options_.limit_documents;
    options.seed = options_.seed;
    options.half = half;
    options.share = share;
    options.batch = options_.batch;
    data_part result;
    result.task = load_task(options_.metric, options);
    result.task->check(files_[0]->model());
    eval_setting setting;
    session_ptr session = files_[0]->open(nullptr, &setting);
    result.task->prepare(setting);
    const double begin = seconds_now();
    result.full = evaluate_once(*result.task, setting);
    seconds_ = seconds_now() - begin;
    if (!(result.full.quality() > 0))
      fail(in_quotes(options_.data), ": ", result.full.metrics[0].name, " without dropping is ", result.full.quality(),
           "; a relative loss needs more than 0 (is there enough data?)");
    return result;
  }

  const tune_options &options_;
  const std::vector<std::unique_ptr<tune_file>> &files_;
  cost_model cost_;
  std::vector<data_part> parts_;
  data_part other_;
  tune_journal *journal_ = nullptr;
  double last_share_ = 0, seconds_ = 0;
};

// ---------------------------------------------------------------------------------------------- the command

struct timed_schedule {
  size_t file;
  bool drops;
  drop_candidate candidate;
  std::string text;  // of the schedule; empty: none
  double quality, loss, held_out_quality, held_out_loss;
  double share;        // of the arithmetic, predicted
  double ms = 0;       // a text
  double speedup = 0;  // over the first file without dropping: median of the ratios of each round
  bool on_front = false;
};

class tuner {
 public:
  explicit tuner(const tune_options &options) : options_(options), progress_(true) {
    if (!options.max_loss.empty()) usual_.loss = parse_loss(options.max_loss, "--max-loss");
    usual_.ms = options.budget_ms;
    for (const std::string &text : options.stores) stores_.push_back(parse_store(text, usual_));
    for (size_t i = 0; i < stores_.size(); ++i)
      for (size_t j = 0; j < i; ++j)
        if (stores_[i].name == stores_[j].name) fail_usage("--store: ", in_quotes(stores_[i].name), " is given twice");
    files_.push_back(std::make_unique<tune_file>(options.model, options));
    for (const std::string &path : options.also) {
      std::error_code error;
      for (const auto &file : files_)
        if (std::filesystem::equivalent(path, file->path(), error)) fail_usage("--also: ", in_quotes(path), " is given twice");
      files_.push_back(std::make_unique<tune_file>(path, options));
      if (files_.back()->info().dim != files_[0]->info().dim || files_.back()->layers() != files_[0]->layers())
        fail(in_quotes(path), ": not the same model as ", in_quotes(options.model));
    }
    check_outputs();
  }

  int run() {
    data_judge judge(options_, files_);
    constexpr size_t few = 10;
    if (judge.chosen_on().full.texts < few)
      say("warning: schedules are judged by " + judge.chosen_on().task->what() + " only: chance decides");
    progress_.update(0, 1, "opening the journal");
    const std::string journal_path = journal_name();
    ordered settings = journal_settings();
    settings["found"] = {{"passes", passes(judge)}, {"minutes", options_.minutes}};
    const auto policy = options_.anew     ? tune_journal::policy::anew
                        : options_.resume ? tune_journal::policy::resume
                                          : tune_journal::policy::automatic;
    tune_journal journal(journal_path, settings, policy);
    tell(journal);
    judge.open_journal(&journal);
    passes_ = stored_passes(journal, settings["found"]["passes"].get<int>());
    std::vector<search_result> results = search(&judge);
    finalists(results, &judge);
    if (!times_of(journal)) {
      time_all(judge);
      for (const timed_schedule &s : schedules_) {
        journal.add(s.file, timed_ms, timing(s), s.ms);
        journal.add(s.file, timed_speedup, timing(s), s.speedup);
      }
    }
    mark_front();
    progress_.clear();
    for (const store_request &request : stores_) chosen_.push_back(choose(request.keep_to));
    if (stores_.empty() && usual_.any()) chosen_.push_back(choose(usual_));
    print(options_.json ? report_json(judge) : report_text(judge, journal_path));
    write_plot(judge, results);
    return store(judge);
  }

 private:
  // ------------------------------------------------------------------------------------------ what is where

  void check_outputs() const {
    for (const auto &file : files_)
      for (const std::string &path : {options_.output, options_.journal}) not_the_model(path, file->path());
    std::error_code error;
    for (const std::string &path : {options_.output, options_.journal})
      if (std::filesystem::equivalent(path, options_.data, error)) fail(in_quotes(path), " is the data itself");
    if (!options_.output.empty() &&
        (options_.output == options_.journal || std::filesystem::equivalent(options_.output, options_.journal, error)))
      fail_usage("the plot and the journal are both ", in_quotes(options_.output));
    if (!options_.output.empty() && ending_of(options_.output) != ".svg")
      fail_usage("--output: ", in_quotes(options_.output), ": the plot is an SVG, whose name ends in .svg");
    if (!options_.output.empty()) output_target(options_.output);
  }

  // Beside what is written.
  std::string journal_name() const {
    if (!options_.journal.empty()) return options_.journal;
    return (options_.output.empty() ? output_target(options_.model) : output_target(options_.output)) + ".journal";
  }

  ordered journal_settings() const {
    ordered models = ordered::array();
    for (const auto &file : files_) models.push_back(file->hash());
    return {{"version", rs_version()},
            {"models", models},
            {"device", rs_model_device(files_[0]->model())},
            {"isa", rs_isa()},
            {"data", hash_of_data(options_.data, options_.of_images())},
            {"metric", options_.metric},
            {"seed", options_.seed},
            {"limit", options_.limit},
            {"limit_documents", options_.limit_documents},
            {"max_tokens", options_.encode.max_tokens},
            {"prompt", options_.encode.prompt_option->count() > 0 ? ordered(options_.encode.prompt) : ordered()},
            {"image_size", options_.image_size}};
  }

  void tell(const tune_journal &journal) {
    if (journal.note().empty() && journal.taken() == 0) return;
    progress_.clear();
    if (!journal.note().empty()) say(journal.note());
    if (journal.taken() > 0) say(join("going on with ", journal.taken(), " results of the journal"));
  }

  // How often the data may be gone through, from the time that it takes.  A power of two, so that it comes out the same in
  // most runs.
  int passes(const data_judge &judge) const {
    if (options_.passes > 0) return options_.passes;
    const double many = options_.minutes * 60 / std::max(judge.seconds_of_a_pass(), 1e-4);
    return int(std::exp2(std::clamp(std::round(std::log2(many)), 0.0, std::log2(double(most_passes)))));
  }

  // A run that goes on keeps to the effort that it was begun with, unless it is given another time.
  int stored_passes(const tune_journal &journal, int otherwise) const {
    if (options_.passes > 0 || !journal.settings().contains("found")) return otherwise;
    const ordered &found = journal.settings()["found"];
    if (!found.is_object() || !found.contains("passes") || !found["passes"].is_number_unsigned() || !found.contains("minutes") ||
        found["minutes"] != ordered(options_.minutes))
      return otherwise;
    const auto passes = found["passes"].get<uint64_t>();
    return passes >= 1 && passes <= most_passes ? int(passes) : otherwise;
  }

  // ------------------------------------------------------------------------------------------ search

  std::vector<search_result> search(data_judge *judge) {
    search_settings settings;
    settings.layers = files_[0]->layers();
    settings.seed = options_.seed;
    if (options_.of_images()) settings.scores = tried_image_scores;
    settings.max_loss = usual_.loss;
    for (const store_request &request : stores_) settings.max_loss = std::max(settings.max_loss, request.keep_to.loss);
    settings.work = passes_ * judge->chosen_on().full.full_token_layers;
    // Passes are counted from what one took at the beginning.  A machine that has other things to do since is no reason to go on
    // for hours.
    constexpr double patience = 1.5;
    const double begin = seconds_now();
    if (options_.passes == 0) settings.time = [=] { return (seconds_now() - begin) / (patience * options_.minutes * 60); };
    return search_schedules(judge, settings,
                            [this](double share, const std::string &stage) { progress_.update(std::min(share, 1.0), 1, stage); });
  }

  // The front by arithmetic, and without dropping; of each, all weight files.
  void finalists(const std::vector<search_result> &results, data_judge *judge) {
    const size_t last = judge->rungs() - 1;
    std::vector<tradeoff> tradeoffs;
    for (const search_result &r : results) tradeoffs.push_back({-r.loss, r.share});
    const std::vector<size_t> front = thinned(results, pareto_front(tradeoffs));
    size_t done = 0;
    for (size_t file = 0; file < files_.size(); ++file) {
      for (size_t i = 0; i <= front.size(); ++i) {
        progress_.update(double(done++), double(files_.size() * (front.size() + 1)), "the other half of the data");
        timed_schedule s;
        s.file = file;
        s.drops = i > 0;
        if (s.drops) {
          s.candidate = results[front[i - 1]].candidate;
          s.text = candidate_drop(s.candidate, options_.seed).text();
        }
        const drop_candidate *candidate = s.drops ? &s.candidate : nullptr;
        s.share = s.drops ? results[front[i - 1]].share : 1;
        s.quality = judge->quality(file, last, candidate);
        s.loss = judge->loss_of(file, last, candidate);
        s.held_out_quality = judge->quality(file, held_out, candidate);
        s.held_out_loss = judge->loss_of(file, held_out, candidate);
        schedules_.push_back(std::move(s));
      }
    }
  }

  // A dozen, by rising cost: those of most use under each limit, and of the rest evenly.
  std::vector<size_t> thinned(const std::vector<search_result> &results, std::vector<size_t> front) const {
    constexpr size_t most = 12, near = 3;
    if (front.size() <= most) return front;
    std::vector<size_t> kept;
    const auto keep = [&](size_t i) {
      if (std::find(kept.begin(), kept.end(), front[i]) == kept.end()) kept.push_back(front[i]);
    };
    std::vector<double> losses = {usual_.loss};
    for (const store_request &request : stores_) losses.push_back(request.keep_to.loss);
    for (double loss : losses)
      for (size_t i = 0, found = 0; i < front.size() && found < near && kept.size() < most; ++i)
        if (loss > 0 && results[front[i]].loss <= loss) keep(i), ++found;
    const size_t room = most > kept.size() ? most - kept.size() : 0;
    for (size_t i = 0; i < room; ++i) keep(room > 1 ? i * (front.size() - 1) / (room - 1) : 0);
    std::sort(kept.begin(), kept.end(), [&](size_t a, size_t b) { return results[a].share < results[b].share; });
    return kept;
  }

  // ------------------------------------------------------------------------------------------ times

  // What was timed, where and how: in the journal, it stands for its times.
  std::string timing(const timed_schedule &s) const {
    char host[256] = "";
    gethostname(host, sizeof host - 1);
    return join(s.text, " batch=", options_.batch, " threads=", options_.threads, " rounds=", options_.rounds, " host=", host);
  }

  // Those of an earlier run, so that this one chooses the same; only all together, since what counts are ratios within a round.
  bool times_of(const tune_journal &journal) {
    for (timed_schedule &s : schedules_) {
      const double *ms = journal.find(s.file, timed_ms, timing(s)), *speedup = journal.find(s.file, timed_speedup, timing(s));
      if (!ms || !speedup) return false;
      s.ms = *ms, s.speedup = *speedup;
    }
    return true;
  }

  void time_all(const data_judge &judge) {
    std::vector<std::unique_ptr<candidate_drop>> drops;
    std::vector<session_ptr> sessions;
    std::vector<eval_setting> settings;
    for (const timed_schedule &s : schedules_) {
      drops.push_back(s.drops ? std::make_unique<candidate_drop>(s.candidate, options_.seed) : nullptr);
      settings.emplace_back();
      sessions.push_back(files_[s.file]->open(s.drops ? drops.back()->get() : nullptr, &settings.back()));
    }
    const data_part &part = judge.timed();
    const std::vector<evaluation> results =
        evaluate(*part.task, settings, rounds(judge), [this](double share) { progress_.update(share, 1, "times"); });
    for (size_t i = 0; i < schedules_.size(); ++i) {
      std::vector<double> ratios;
      for (size_t round = 0; round < results[i].seconds.size(); ++round)
        ratios.push_back(results[0].seconds[round] / results[i].seconds[round]);
      schedules_[i].speedup = median(std::move(ratios));
      // By the ratio too: medians of rounds that were slow for all differ more than the schedules.
      schedules_[i].ms = 1000 * results[0].median_seconds() / double(results[0].texts) / schedules_[i].speedup;
    }
  }

  // As many as fit into a fifth of the time, at least five.
  int rounds(const data_judge &judge) const {
    if (options_.rounds > 0) return options_.rounds;
    const evaluation &all = judge.chosen_on().full, &some = judge.timed().full;
    const double seconds = judge.seconds_of_a_pass() * some.full_token_layers / all.full_token_layers * double(schedules_.size());
    return int(std::clamp(options_.minutes * 60 / 5 / std::max(seconds, 1e-4), 5.0, 201.0));
  }

  void mark_front() {
    std::vector<tradeoff> tradeoffs;
    for (const timed_schedule &s : schedules_) tradeoffs.push_back({-s.loss, s.ms});
    for (size_t i : pareto_front(tradeoffs)) schedules_[i].on_front = true;
  }

  // ------------------------------------------------------------------------------------------ choice

  // Within limits: the fastest where only the loss is limited, else the best.  What is as fast within the error of measuring is as
  // good as the fastest, so that chance does not choose.  nullptr: none.
  const timed_schedule *choose(const limits &keep_to) const {
    constexpr double same = 1.02;
    std::vector<const timed_schedule *> list;
    for (const timed_schedule &s : schedules_)
      if ((keep_to.loss <= 0 || s.loss <= keep_to.loss) && (keep_to.ms <= 0 || s.ms <= keep_to.ms)) list.push_back(&s);
    if (list.empty()) return nullptr;
    double limit = INFINITY;
    if (keep_to.ms <= 0)
      for (const timed_schedule *s : list) limit = std::min(limit, s->ms * same);
    const timed_schedule *best = nullptr;
    for (const timed_schedule *s : list)
      if (s->ms <= limit && (!best || s->loss < best->loss || (s->loss == best->loss && s->share < best->share))) best = s;
    return best;
  }

  bool is_chosen(const timed_schedule &s) const { return std::find(chosen_.begin(), chosen_.end(), &s) != chosen_.end(); }

  std::vector<const timed_schedule *> by_time() const {
    std::vector<const timed_schedule *> list;
    for (const timed_schedule &s : schedules_)
      if (s.on_front || is_chosen(s) || !s.drops) list.push_back(&s);
    std::stable_sort(list.begin(), list.end(), [](const auto *a, const auto *b) { return a->ms > b->ms; });
    return list;
  }

  // ------------------------------------------------------------------------------------------ report

  std::string metric_name(const data_judge &judge) const { return judge.chosen_on().full.metrics[0].name; }

  std::string file_name(const timed_schedule &s) const { return std::filesystem::path(files_[s.file]->path()).filename().string(); }

  std::string heading(const data_judge &judge) const {
    return join("rs ", rs_version(), ", ", rs_isa(), "; ", options_.metric, " of ", one_line(data_name(), 60), ": chosen on ",
                judge.chosen_on().task->what(), ", held out ", judge.other().task->what(), "; seed ", options_.seed, ", ", passes_,
                passes_ == 1 ? " pass" : " passes");
  }

  std::string data_name() const {
    const std::filesystem::path path(options_.data);
    return (path.has_filename() ? path : path.parent_path()).filename().string();
  }

  static std::string percent(double share) { return format("%.2f %%", 100 * share); }

  std::string report_text(const data_judge &judge, const std::string &journal) const {
    const bool several = files_.size() > 1;
    std::vector<std::string> head = {"",      metric_name(judge), "loss", "held out", join("ms/", options_.unit()),
                                     "speed", "arithmetic"};
    if (several) head.push_back("weights");
    text_table table(head);
    std::string schedules;
    size_t number = 0;
    for (const timed_schedule *s : by_time()) {
      std::vector<std::string> row = {join(++number, is_chosen(*s) ? "*"
                                                     : s->on_front ? ""
                                                                   : "-"),
                                      format("%.*f", judge.chosen_on().full.metrics[0].digits, s->quality),
                                      percent(s->loss),
                                      percent(s->held_out_loss),
                                      format("%.3f", s->ms),
                                      format("%.2fx", s->speedup),
                                      format("%.0f %%", 100 * s->share)};
      if (several) row.push_back(file_name(*s));
      table.add(row);
      schedules += format("%2zu  ", number) + (s->drops ? s->text : "no dropping") + "\n";
    }
    return heading(judge) + "\n\n" + table.str() + "\n" + schedules +
           "\n*: chosen; -: something else is better and faster.  All that was found is in " + in_quotes(journal) + "\n";
  }

  ordered json_of(const timed_schedule &s) const {
    return {{"model", files_[s.file]->path()},
            {"schedule", s.drops ? ordered(s.text) : ordered()},
            {"quality", s.quality},
            {"loss", s.loss},
            {"held_out_quality", s.held_out_quality},
            {"held_out_loss", s.held_out_loss},
            {"ms", s.ms},
            {"speedup", s.speedup},
            {"arithmetic", s.share},
            {"front", s.on_front},
            {"chosen", is_chosen(s)}};
  }

  std::string report_json(const data_judge &judge) const {
    ordered root = {{"metric", options_.metric},
                    {"quality", metric_name(judge)},
                    {"data", options_.data},
                    {"seed", options_.seed},
                    {"passes", passes_},
                    {"isa", rs_isa()},
                    {"schedules", ordered::array()}};
    for (const timed_schedule &s : schedules_) root["schedules"].push_back(json_of(s));
    return root.dump(1, ' ', false, ordered::error_handler_t::replace) + "\n";
  }

  void write_plot(const data_judge &judge, const std::vector<search_result> &results) const {
    if (options_.output.empty()) return;
    chart c;
    c.title = join(metric_name(judge), " lost and time saved: ", files_[0]->info().name);
    c.subtitle = join(data_name(), ", ", judge.chosen_on().task->what(), ", seed ", options_.seed, "; times on ", rs_isa());
    c.x_label = join("ms ", options_.of_images() ? "an " : "a ", options_.unit());
    c.y_label = "loss, %";
    // How far times keep to the arithmetic shows by how far the front is from the others.
    chart_series tried{"tried, time by arithmetic", -1, false, true, {}};
    double most = 0;
    for (const timed_schedule &s : schedules_) most = std::max(most, s.loss);
    for (const search_result &r : results)
      if (r.loss <= std::max(1.5 * most, 0.001))
        tried.points.push_back({r.share * schedules_[0].ms, 100 * r.loss, candidate_drop(r.candidate, options_.seed).text(), ""});
    c.series.push_back(tried);
    for (bool other : {true, false}) {
      chart_series front{other ? "held out" : "chosen on", other ? 0.15 : 0.75, true, false, {}};
      for (const timed_schedule *s : by_time())
        if (s->on_front)
          front.points.push_back({s->ms, 100 * (other ? s->held_out_loss : s->loss),
                                  join(file_name(*s), ": ", s->drops ? s->text : std::string("no dropping")),
                                  other ? "" : label(*s)});
      c.series.push_back(front);
    }
    if (usual_.loss > 0) c.rules.push_back({true, 100 * usual_.loss, "largest loss"});
    if (usual_.ms > 0) c.rules.push_back({false, usual_.ms, "budget"});
    output_file out(options_.output);
    out.write(chart_svg(c));
    out.commit();
  }

  std::string label(const timed_schedule &s) const {
    for (size_t i = 0; i < stores_.size(); ++i)
      if (chosen_[i] == &s) return stores_[i].name;
    return is_chosen(s) ? "chosen" : "";
  }

  // ------------------------------------------------------------------------------------------ storing

  int store(const data_judge &judge) const {
    int status = 0;
    for (size_t file = 0; file < files_.size(); ++file) {
      std::vector<std::array<std::string, 3>> profiles;
      for (size_t i = 0; i < stores_.size(); ++i)
        if (chosen_[i] && chosen_[i]->drops && chosen_[i]->file == file)
          profiles.push_back({stores_[i].name, chosen_[i]->text, note(*chosen_[i], judge)});
      if (!profiles.empty()) write_profiles(file, profiles);
    }
    for (size_t i = 0; i < stores_.size(); ++i) {
      const std::string what = stores_[i].name + ": " + stores_[i].keep_to.str();
      if (!chosen_[i]) say("nothing found for " + what), status = 1;
      else if (!chosen_[i]->drops)
        say("nothing stored for " + what + ": no schedule beats " + file_name(*chosen_[i]) + " without one"), status = 1;
      else warn(*chosen_[i], stores_[i]);
    }
    if (stores_.empty() && usual_.any() && !chosen_[0]) say("nothing found for " + usual_.str()), status = 1;
    return status;
  }

  void warn(const timed_schedule &s, const store_request &request) const {
    say(join("stored ", in_quotes(request.name), " in ", in_quotes(files_[s.file]->path())));
    if (request.keep_to.loss > 0 && s.held_out_loss > request.keep_to.loss)
      say(join("warning: ", request.name, " loses ", percent(s.held_out_loss),
               " on the half that it was not chosen on; more data, or less loss, is safer"));
  }

  // Rounded as far as it repeats, and without a date.
  std::string note(const timed_schedule &s, const data_judge &judge) const {
    return join(metric_name(judge), format(" %.*f", judge.chosen_on().full.metrics[0].digits, s.quality), ", loss ",
                percent(s.loss), ", held out ", percent(s.held_out_loss), format(", %.0f %% of the time", 100 / s.speedup), " of ",
                files_.size() > 1 ? std::filesystem::path(files_[0]->path()).filename().string() : "that", " without; ",
                data_name(), ", seed ", options_.seed);
  }

  static std::vector<std::string> stored(const rs_model *model, const char *key) {
    rs_meta meta;
    return find_meta(model, key, &meta) ? strings_of(meta) : std::vector<std::string>();
  }

  static void set(rs_writer *w, const char *key, const std::vector<std::string> &values) {
    std::vector<rs_text> views;
    for (const std::string &value : values) views.push_back(view_of(value));
    check(rs_writer_set_strs(w, key, views.data(), views.size()));
  }

  void write_profiles(size_t file, const std::vector<std::array<std::string, 3>> &profiles) const {
    const rs_model *model = files_[file]->model();
    std::vector<std::string> names = stored(model, "drop.names"), texts = stored(model, "drop.texts"),
                             notes = stored(model, "drop.notes");
    texts.resize(names.size());
    notes.resize(names.size());
    for (const auto &[name, text, note] : profiles) {
      const auto at = size_t(std::find(names.begin(), names.end(), name) - names.begin());
      if (at == names.size()) names.push_back(name), texts.emplace_back(), notes.emplace_back();
      texts[at] = text;
      notes[at] = note;
    }
    const std::string target = output_target(files_[file]->path());
    scratch_folder scratch(target);
    writer_ptr writer = open_writer(scratch / "result");
    set(writer.get(), "drop.names", names);
    set(writer.get(), "drop.texts", texts);
    set(writer.get(), "drop.notes", notes);
    check(rs_writer_copy(writer.get(), model));
    check(rs_writer_finish(writer.get()));
    replace_file(scratch / "result", target);
  }

  const tune_options &options_;
  progress progress_;
  limits usual_;
  std::vector<store_request> stores_;
  std::vector<std::unique_ptr<tune_file>> files_;
  int passes_ = 1;
  std::vector<timed_schedule> schedules_;       // the first: the first file without dropping
  std::vector<const timed_schedule *> chosen_;  // for each of stores_, or one for the usual limits; nullptr: none
};

// What is judged by where nothing else is asked for: by the head of a classifier of images where the data is images.
std::string usual_metric(const tune_options &options) {
  std::error_code ignored;
  if (!std::filesystem::is_directory(options.data, ignored)) return "cosine";
  const rs_model_info info = model_info(load_model(options.model, false).get());
  return info.image_hidden > 0 && info.head == RS_HEAD_SEQUENCE ? "images" : "cosine";
}

int run_tune(const tune_options &options) {
  tune_options all = options;
  std::error_code error;
  if (all.data == "-" || std::filesystem::is_other(all.data, error))
    fail_usage("--data: ", in_quotes(all.data), ": the data is read several times, so it needs to be a regular file, or a folder");
  if (all.metric.empty()) all.metric = usual_metric(all);
  if (!all.of_images() && !all.image_size.empty()) fail_usage("--image-size goes with a folder of images");
  if (all.metric != "retrieval" && all.limit_documents > 0) fail_usage("--limit-docs does not go with ", all.metric);
  if (all.of_images() && all.encode.prompt_option->count() > 0) fail_usage("--prompt does not go with images");
  if (all.of_images() && all.encode.max_tokens > 0) fail_usage("--max-tokens does not go with images");
  return tuner(all).run();
}

}  // namespace

void add_tune(CLI::App *app, command_line *line) {
  auto options = std::make_shared<tune_options>();
  CLI::App *sub =
      add_command(app, "tune", "find schedules of token dropping that suit your data", examples, options, run_tune, line);
  add_model_option(sub, &options->model, false);
  sub->add_option("--also", options->also, "another weight file of the same model, to choose from (may be repeated)")
      ->type_name("FILE");
  sub->add_option("--data", options->data, "what the schedules are judged on; what it is depends on --metric: rs eval --help")
      ->type_name("FILE")
      ->required();
  sub->add_option("--metric", options->metric,
                  "a task of rs eval (default: cosine; of a classifier and a folder of images: images)")
      ->type_name("TASK")
      ->check(CLI::IsMember(task_names));
  sub->add_option("--max-loss", options->max_loss, "choose the fastest that loses at most so much: 1% or 0.01")->type_name("LOSS");
  sub->add_option("--budget-ms", options->budget_ms,
                  "choose the best that takes at most so much time a text (or image), on average\n(--batch 1: of texts that come "
                  "one by one)")
      ->type_name("MS")
      ->check(above_zero());
  sub->add_option("--store", options->stores,
                  "keep what is chosen in its weight file, for --drop-profile NAME; may be\n"
                  "repeated, with a limit of its own: fast=3%, best=0.5%, small=2ms")
      ->type_name("NAME");
  sub->add_option("-o,--output", options->output, "write a plot to this file, whose name ends in .svg")->type_name("FILE");
  sub->add_option("--minutes", options->minutes, "time that the search may take, more or less (default: 10)")
      ->type_name("N")
      ->check(above_zero());
  sub->add_option("--passes", options->passes, "or how often it may go through the data, for a search that repeats exactly")
      ->type_name("N")
      ->check(whole_number(1, most_passes));
  sub->add_option("--seed", options->seed, "of halves, shares and the order of the search (default: 1)")
      ->type_name("N")
      ->check(whole_number(0, UINT64_MAX));
  sub->add_option("--limit", options->limit, "so much of the data at most (default: all)")->type_name("N")->check(whole_number(1));
  sub->add_option("--limit-docs", options->limit_documents, "of retrieval: so many documents at most (default: all)")
      ->type_name("N")
      ->check(whole_number(1));
  sub->add_option("-b,--batch", options->batch, "texts or images that are encoded together, 1 to 65536 (default: 64)")
      ->type_name("N")
      ->check(whole_number(1, 65536));
  sub->add_option("--rounds", options->rounds, "of timing (default: what fits into a fifth of --minutes, 5 to 201)")
      ->type_name("N")
      ->check(whole_number(1, 1000));
  sub->add_option("--journal", options->journal, "where results are kept (default: beside --output, else beside the weight file)")
      ->type_name("FILE");
  CLI::Option *resume =
      sub->add_flag("--resume", options->resume, "an error where the journal is of something else (default: begin anew)");
  sub->add_flag("--no-resume", options->anew, "begin anew in any case")->excludes(resume);
  sub->add_flag("--json", options->json, "the table as JSON");
  add_image_size_option(sub, &options->image_size);
  add_threads_option(sub, &options->threads);
  add_sequence_options(sub, &options->encode);
  add_no_check_option(sub, &options->no_check);
}
