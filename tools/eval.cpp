// rs eval: how good a model is at a task and how fast, without and with token dropping.
#include "json.h"
#include "options.h"
#include "output.h"
#include "progress.h"
#include "table.h"
#include "tasks.h"

#include <cmath>

namespace {

const char *const examples =
    "Examples:\n"
    "  rs eval stsb -m minilm.rsw --data stsb-test.csv\n"
    "  rs eval retrieval -m minilm-f32.rsw -m minilm-q8.rsw --data scifact --limit-queries 50\n"
    "  rs eval retrieval -m minilm-q8.rsw --data scifact --drop 0,0.3 --drop-score -mlp\n"
    "  rs eval stsb -m minilm-q8.rsw --data stsb-test.csv --drop-list schedules.txt --json\n"
    "  rs eval cosine -m minilm-q4.rsw --against minilm-f32.rsw --data texts.txt\n"
    "  rs eval images -m cifar.rsw --data test --drop 0,0,0,0,0,0,0.3 --drop-score block --drop-mode merge\n"
    "  rs eval cosine -m dinov2.rsw --data photos --image-size 518 --drop 0,0,0,0.3 --drop-mode restore\n"
    "Tasks, the quality that each is judged by, and what --data is:\n"
    "  stsb       Spearman's correlation x100 of cosines with scores.  Tab-separated as in STS-B (the score in column 5, the "
    "sentences\n"
    "             in 6 and 7; or a heading with score, sentence1, sentence2), or JSON lines with text1, text2, score\n"
    "  retrieval  nDCG@10 x100, gains over log2(rank + 1) as trec_eval has it.  A folder of BEIR (corpus.jsonl, queries.jsonl,\n"
    "             qrels/test.tsv; the scores are gains) or Cranfield (cran.all.1400, cran.qry, cranqrel; codes 1 to 4 are gains 4 "
    "to 1)\n"
    "  sst2       accuracy x100 of a classifier.  Tab-separated with a heading that has sentence and label, or JSON lines with "
    "text\n"
    "             and label, a name of the model's or a number; classification: the same by another name\n"
    "  squad      F1 x100 of extracted answers, as SQuAD's own script has it; exact: how many are right to the letter.  JSON of\n"
    "             SQuAD; where some questions have no answer, \"no answer\" is how many of those the model refuses\n"
    "  nn         accuracy of the k nearest neighbours' votes, weighted by exp(cosine / 0.07).  JSON lines with text and label, "
    "or\n"
    "             tab-separated with a heading; each text by all others, or by those of --train\n"
    "  cosine     mean cosine with the vectors without dropping, or with those of --against.  Texts, plain or JSON lines; or a "
    "folder\n"
    "             of images, where the features of patches are compared too (all of them: with --drop-mode restore)\n"
    "  images     accuracy x100 of a classifier of images.  A folder of folders that are named as the model's labels;\n"
    "             classification: the same, where --data is a folder.  --limit takes as many of every class\n"
    "With a schedule (--drop …) each weight file is judged without and with it; --drop-list: with each of many, written as\n"
    "\"ratios=0,0.3 score=-mlp mode=merge\" (keeps=, protect=, min=, seed=).  Of retrieval, documents lose tokens, and queries "
    "only "
    "with\n"
    "--drop-queries.  Weight files and settings take turns, batch by batch.\n"
    "tokens/s: of the median round, tokenizer included.  images/s: of the encoder; images are prepared outside of the clock, and\n"
    "up to 256 MiB of their pixels kept.  tokens/layer: that enter a layer, mean over layers and texts; left: "
    "their\n"
    "share of all.  arena: memory for activations; peak RSS: of the whole process.\n"
    "--json prints an object a line for each weight file, and for each schedule of it.";

// A schedule of --drop-list.
struct listed_drop {
  std::string place, text;
};

struct eval_options {
  std::string task;
  std::vector<std::string> models;
  std::string against;
  int threads = 0, rounds = 3;
  bool no_check = false, json = false;
  encode_options encode;
  std::string image_size;
  std::string drop_list;
  std::vector<listed_drop> listed;  // what is in it
  bool drop_queries = false;
  std::string query_prompt;
  const CLI::Option *query_prompt_option = nullptr;
  task_options data;
  const CLI::App *sub = nullptr;
  bool of_images() const { return task_of_images(task, data.data); }
};

// ---------------------------------------------------------------------------------------------- a weight file

// A model, and how its texts are encoded: without dropping, and with each schedule that was given.
class eval_case {
 public:
  eval_case(const std::string &file, const eval_options &options)
      : file_(file),
        model_(load_model(file, !options.no_check)),
        info_(checked_info(options)),
        layers_(task_layers(model_.get(), options.of_images())),
        texts_(options.encode, model_.get()),
        queries_(for_queries(options), model_.get()) {
    if (texts_.per_token()) fail_usage("--pooling none gives no vector to compare");
    if (texts_.params.long_text == RS_LONG_CHUNK)
      fail_usage("--long chunk: rs eval counts tokens of sequences, not of windows; it truncates");
    add_setting(options, nullptr);
    if (const rs_drop *drop = texts_.drop.get()) add_setting(options, drop);
    for (const listed_drop &listed : options.listed) {
      listed_.push_back(parse_drop(listed.text, model_.get(), listed.place + ": "));
      add_setting(options, listed_.back().get());
    }
  }

  const std::string &file() const { return file_; }
  const rs_model_info &info() const { return info_; }
  const rs_model *model() const { return model_.get(); }
  int32_t layers() const { return layers_; }                               // that the task runs
  const std::vector<eval_setting> &settings() const { return settings_; }  // without dropping, then with each schedule
  int threads() const { return rs_session_threads(sessions_[0].get()); }

  std::string truncation_summary(const evaluation &result) const {
    return result.truncation.summary(texts_.max_tokens, info_.position_limit, nullptr);
  }

 private:
  // Before the options are looked at: they are those of the task.
  rs_model_info checked_info(const eval_options &options) const {
    if (!options.of_images()) check_takes_texts(model_.get(), options.task);
    return model_info(model_.get());
  }

  static bool given(const CLI::Option *option) { return option && option->count() > 0; }

  static encode_options for_queries(const eval_options &options) {
    encode_options queries = options.encode;
    queries.prompt_option = options.query_prompt_option;
    queries.prompt = options.query_prompt;
    queries.drop = {};  // the documents' own, where queries lose tokens
    return queries;
  }

  // A session of its own, so that each has an arena to be measured.
  void add_setting(const eval_options &options, const rs_drop *drop) {
    sessions_.push_back(create_session(model_.get(), options.threads, false));
    eval_setting setting;
    setting.model = model_.get();
    setting.session = sessions_.back().get();
    setting.texts = texts_.params;
    setting.queries = queries_.params;
    setting.dim = texts_.dim;
    if (options.of_images()) {
      const image_size size = image_size_of(options.image_size, model_.get());
      setting.texts.image_width = size.width;
      setting.texts.image_height = size.height;
      // A pooling that is named is of the states themselves, not of what they are projected to.
      if (texts_.params.pooling != RS_POOL_DEFAULT && texts_.params.dim == 0) setting.dim = info_.image_hidden;
    }
    setting.texts.drop = drop;
    setting.queries.drop = options.drop_queries ? drop : nullptr;
    if (options.task == "retrieval")
      use_stored_prompts(&setting, !given(options.encode.prompt_option), !given(options.query_prompt_option));
    settings_.push_back(setting);
  }

  std::string file_;
  model_ptr model_;
  rs_model_info info_;
  int32_t layers_;
  encoding texts_, queries_;
  std::vector<drop_ptr> listed_;
  std::vector<session_ptr> sessions_;
  std::vector<eval_setting> settings_;
};

// ---------------------------------------------------------------------------------------------- the command

nlohmann::ordered_json number_or_null(double value) {
  if (!std::isfinite(value)) return nullptr;
  return value;
}

// b as a multiple of a; NaN where that says nothing.
double ratio(double b, double a) { return a != 0 ? b / a : std::nan(""); }

class evaluator {
 public:
  explicit evaluator(const eval_options &options) : options_(options), progress_(progress::wanted_beside(STDOUT_FILENO)) {
    for (const std::string &file : options.models) cases_.push_back(std::make_unique<eval_case>(file, options));
    task_ = load_task(options.task, options.data);
    if (const std::string warning = task_->warning(); !warning.empty()) say("warning: " + warning);
    for (const auto &c : cases_) task_->check(c->model());
  }

  int run() {
    prepare();
    std::vector<eval_setting> settings;
    for (const auto &c : cases_) settings.insert(settings.end(), c->settings().begin(), c->settings().end());
    results_ = evaluate(*task_, settings, options_.rounds, [this](double share) { progress_.update(share, 1, options_.task); });
    progress_.clear();
    if (options_.json) print_json();
    else print(heading() + table() + peak());
    say_what_was_cut();
    return 0;
  }

 private:
  void prepare() {
    if (options_.against.empty()) return task_->prepare(cases_[0]->settings()[0]);
    eval_options plain = options_;
    plain.encode.drop = {};
    plain.listed = {};
    // What the library says of a file begins with its name.
    const auto place = [&](const failure &e) {
      const bool named = std::string_view(e.what()).find(options_.against) != std::string_view::npos;
      return named ? std::string() : join("--against ", in_quotes(options_.against), ": ");
    };
    try {
      const eval_case reference(options_.against, plain);
      const int64_t dim = reference.settings()[0].dim;
      for (const auto &c : cases_)
        if (c->settings()[0].dim != dim)
          fail("vectors of ", c->settings()[0].dim, " values cannot be compared with vectors of ", dim);
      task_->prepare(reference.settings()[0]);
    } catch (const usage_failure &e) {
      fail_usage(place(e), e.what());
    } catch (const failure &e) {
      fail(place(e), e.what());
    }
  }

  // Calls f(case, results of its settings).
  template <class F>
  void each_case(F f) const {
    const evaluation *next = results_.data();
    for (const auto &c : cases_) {
      f(*c, next);
      next += c->settings().size();
    }
  }

  std::string heading() const {
    const int threads = cases_[0]->threads();
    return join("rs ", rs_version(), ", ", rs_isa(), ", ", threads, threads == 1 ? " thread" : " threads", "; ", options_.task,
                ": ", task_->what(), ", ", options_.rounds, options_.rounds == 1 ? " round" : " rounds", "\n\n");
  }

  std::string table() const {
    std::vector<std::string> head = {"model", "type", "drop"};
    for (const eval_metric &metric : results_[0].metrics) head.push_back(metric.name);
    for (const char *name : {task_->of_images() ? "images/s" : "tokens/s", "tokens/layer", "left", "arena"})
      head.emplace_back(name);
    text_table table(head);
    std::string schedules;
    each_case([&](const eval_case &c, const evaluation *results) {
      table.add(row_of(c, "none", results[0]));
      for (size_t i = 1; i < c.settings().size(); ++i) {
        const std::string number = options_.listed.empty() ? "" : std::to_string(i);
        table.add(row_of(c, number.empty() ? "yes" : number, results[i]));
        table.add(ratio_row(c, results[0], results[i]));
        const std::string schedule =
            join("drop", number.empty() ? "" : " ", number, ": ", text_of(*c.settings()[i].texts.drop), "\n");
        if (schedules.find(schedule) == std::string::npos) schedules += schedule;
      }
    });
    return table.str() + (schedules.empty() ? "" : "\n") + schedules;
  }

  // Images have all the same tokens, so that images say more.
  double rate(const evaluation &result) const {
    return task_->of_images() ? result.texts_per_second() : result.tokens_per_second();
  }

  std::vector<std::string> row_of(const eval_case &c, const std::string &drop, const evaluation &result) const {
    std::vector<std::string> row = {c.file(), c.info().weight_type, drop};
    for (const eval_metric &metric : result.metrics)
      row.push_back(std::isfinite(metric.value) ? format("%.*f", metric.digits, metric.value) : "undefined");
    row.push_back(format(task_->of_images() ? "%.1f" : "%.0f", rate(result)));
    row.push_back(format("%.1f", result.tokens_per_layer(c.layers())));
    row.push_back(format("%.1f %%", 100 * result.share_left()));
    row.push_back(human_bytes(double(result.arena_bytes)));
    return row;
  }

  std::vector<std::string> ratio_row(const eval_case &c, const evaluation &full, const evaluation &dropped) const {
    const auto cell = [](double value) { return std::isfinite(value) ? format("%.3f", value) : std::string(); };
    std::vector<std::string> row = {"", "", "ratio"};
    for (size_t i = 0; i < full.metrics.size(); ++i) row.push_back(cell(ratio(dropped.metrics[i].value, full.metrics[i].value)));
    row.push_back(cell(ratio(rate(dropped), rate(full))));
    row.push_back(cell(ratio(dropped.tokens_per_layer(c.layers()), full.tokens_per_layer(c.layers()))));
    row.emplace_back();
    row.push_back(cell(ratio(double(dropped.arena_bytes), double(full.arena_bytes))));
    return row;
  }

  static std::string peak() {
    auto bytes = peak_resident_bytes();
    return bytes ? "\npeak RSS: " + human_bytes(double(*bytes)) + "\n" : "";
  }

  nlohmann::ordered_json result_json(const eval_case &c, const evaluation &result) const {
    nlohmann::ordered_json metrics;
    for (const eval_metric &metric : result.metrics) metrics[metric.name] = number_or_null(metric.value);
    const bool images = task_->of_images();
    return {{"quality", number_or_null(result.quality())},
            {"metrics", metrics},
            {images ? "images" : "texts", result.texts},
            {"tokens", result.tokens},
            {"seconds", result.seconds},
            {images ? "images_per_second" : "tokens_per_second", rate(result)},
            {"tokens_per_layer", result.tokens_per_layer(c.layers())},
            {"share_left", result.share_left()},
            {"arena_bytes", result.arena_bytes}};
  }

  void print_json() const {
    each_case([&](const eval_case &c, const evaluation *results) {
      if (c.settings().size() == 1) print_json(c, results[0], nullptr, nullptr);
      for (size_t i = 1; i < c.settings().size(); ++i) print_json(c, results[0], c.settings()[i].texts.drop, &results[i]);
    });
  }

  void print_json(const eval_case &c, const evaluation &full, const rs_drop *drop, const evaluation *dropped) const {
    nlohmann::ordered_json root = {{"task", options_.task},
                                   {"data", options_.data.data},
                                   {"model", c.file()},
                                   {"weight_type", c.info().weight_type},
                                   {"isa", rs_isa()},
                                   {"threads", c.threads()},
                                   {"rounds", options_.rounds},
                                   {"metric", full.metrics[0].name},
                                   {"full", result_json(c, full)}};
    if (dropped) {
      root["drop"] = text_of(*drop);
      root["dropped"] = result_json(c, *dropped);
      root["ratio"] = {
          {"quality", number_or_null(ratio(dropped->quality(), full.quality()))},
          {task_->of_images() ? "images_per_second" : "tokens_per_second", number_or_null(ratio(rate(*dropped), rate(full)))},
          {"token_layers", number_or_null(ratio(dropped->token_layers, full.token_layers))},
          {"arena_bytes", number_or_null(ratio(double(dropped->arena_bytes), double(full.arena_bytes)))}};
    }
    root["peak_rss_bytes"] = nullptr;
    if (auto bytes = peak_resident_bytes()) root["peak_rss_bytes"] = *bytes;
    print(root.dump(-1, ' ', false, json::error_handler_t::replace) + "\n");
  }

  void say_what_was_cut() const {
    each_case([](const eval_case &c, const evaluation *results) {
      if (std::string cut = c.truncation_summary(results[0]); !cut.empty()) say(c.file() + ": " + cut);
    });
  }

  const eval_options &options_;
  std::unique_ptr<eval_task> task_;
  progress progress_;
  std::vector<std::unique_ptr<eval_case>> cases_;
  std::vector<evaluation> results_;  // of all settings of all cases
};

// Options that only some tasks have.
const std::vector<std::string> tasks_of_vectors = {"stsb", "retrieval", "nn", "cosine"};
const std::vector<std::pair<const char *, std::vector<std::string>>> options_of_tasks = {
    {"--train", {"nn"}},
    {"--neighbours", {"nn"}},
    {"--against", {"cosine"}},
    {"--limit", {"stsb", "sst2", "classification", "squad", "nn", "cosine", "images"}},
    {"--image-size", {"images", "classification", "cosine"}},
    {"--limit-docs", {"retrieval"}},
    {"--limit-queries", {"retrieval"}},
    {"--binary", {"retrieval"}},
    {"--query-prompt", {"retrieval"}},
    {"--drop-queries", {"retrieval"}},
    {"--no-answer-threshold", {"squad"}},
    {"--pooling", tasks_of_vectors},
    {"--normalize", tasks_of_vectors},
    {"--no-normalize", tasks_of_vectors},
    {"--dim", tasks_of_vectors},
    {"--prompt", {"stsb", "sst2", "classification", "retrieval", "nn", "cosine"}},
    {"--long", {"stsb", "sst2", "classification", "retrieval", "nn", "cosine"}},
    {"--batch", {"stsb", "sst2", "classification", "retrieval", "nn", "cosine", "images"}},
};
const char *const options_of_texts[] = {"--prompt", "--long", "--overlap", "--max-tokens"};

std::vector<listed_drop> read_drop_list(const std::string &path) {
  std::vector<listed_drop> list;
  const std::unique_ptr<text_source> lines = texts_of_file(path, input_kind::text);
  for (text_item item; lines->next(&item);) {
    if (!item.error.empty()) fail(lines->place(item), ": ", item.error);
    if (!is_blank(item.text)) list.push_back({lines->place(item), item.text});
  }
  if (list.empty()) fail("--drop-list: ", in_quotes(path), " has no schedule");
  return list;
}

int run_eval(const eval_options &options) {
  for (const auto &[option, tasks] : options_of_tasks)
    if (options.sub->count(option) > 0 && std::find(tasks.begin(), tasks.end(), options.task) == tasks.end())
      fail_usage(option, " does not go with ", options.task);
  for (const char *option : options_of_texts)
    if (options.of_images() && options.sub->count(option) > 0) fail_usage(option, " does not go with images");
  if (!options.of_images() && options.sub->count("--image-size") > 0) fail_usage("--image-size goes with a folder of images");
  const std::initializer_list<const char *> schedules = {"--drop", "--keep", "--drop-profile", "--drop-list"};
  if (options.drop_queries &&
      std::none_of(schedules.begin(), schedules.end(), [&](const char *o) { return options.sub->count(o) > 0; }))
    fail_usage("--drop-queries needs a schedule: --drop, --keep, --drop-profile or --drop-list");
  if (options.drop_list.empty()) return evaluator(options).run();
  eval_options listed = options;
  listed.listed = read_drop_list(options.drop_list);
  return evaluator(listed).run();
}

}  // namespace

void add_eval(CLI::App *app, command_line *line) {
  auto options = std::make_shared<eval_options>();
  CLI::App *sub = add_command(app, "eval", "how good a model is at a task, and how fast", examples, options, run_eval, line);
  options->sub = sub;
  sub->add_option("task", options->task, "stsb, sst2, classification, retrieval, squad, nn, cosine or images")
      ->type_name("TASK")
      ->required()
      ->check(CLI::IsMember(task_names));
  sub->add_option("-m,--model", options->models, "weight file, as rs convert writes it; more than one: each after its own -m")
      ->type_name("FILE")
      ->required()
      ->allow_extra_args(false);
  sub->add_option("--data", options->data.data, "what to judge by")->type_name("PATH")->required();
  sub->add_option("--train", options->data.train, "nn: the neighbours, a file like --data")->type_name("FILE");
  sub->add_option("-k,--neighbours", options->data.neighbours, "nn: how many of them vote (default: 10)")
      ->type_name("K")
      ->check(whole_number(1, 10000));
  sub->add_option("--against", options->against,
                  "cosine: the weight file to compare with (default: the first -m, without dropping)")
      ->type_name("FILE");
  const auto add_count = [&](const char *name, int *value, const char *what) {
    sub->add_option(name, *value, what)->type_name("N")->check(whole_number(1));
  };
  add_count("--limit", &options->data.limit, "only so many pairs, texts, images or questions");
  add_count("--limit-queries", &options->data.limit_queries, "retrieval: only so many of the queries that have judgements");
  add_count("--limit-docs", &options->data.limit_documents,
            "retrieval: only so many documents; those that are relevant to a query first");
  sub->add_option("--seed", options->data.seed,
                  "of --half, and of limits, which take a random part (default: 0: of limits the first)")
      ->type_name("N")
      ->check(whole_number(0, UINT64_MAX));
  sub->add_option("--half", options->data.half,
                  "only one of two random halves of pairs, texts, queries or questions, as rs tune splits\n"
                  "them by the same --seed (its default is 1): choose by one, judge by the other")
      ->type_name("1|2")
      ->check(CLI::IsMember({1, 2}));
  sub->add_flag("--binary", options->data.binary, "retrieval: all that is relevant has the same gain");
  sub->add_option("--no-answer-threshold", options->data.no_answer_threshold,
                  "squad, where some questions have no answer: refuse where the logit of no answer is\n"
                  "higher than that of the answer by more than this (default: 0)")
      ->type_name("X")
      ->check(any_number());
  add_count("--rounds", &options->rounds, "how often everything is encoded (default: 3); for tokens/s only");
  add_image_size_option(sub, &options->image_size);
  sub->add_option("-b,--batch", options->data.batch,
                  "texts or images that are encoded together, 1 to 65536 (default: 64); does not change the quality")
      ->type_name("N")
      ->check(whole_number(1, 65536));
  add_threads_option(sub, &options->threads);
  add_encode_options(sub, &options->encode, false);
  options->query_prompt_option =
      sub->add_option("--query-prompt", options->query_prompt,
                      "retrieval: --prompt for queries.  Without either, the stored prompts \"query\", and \"passage\" or\n"
                      "\"document\", where the model has them")
          ->type_name("PROMPT");
  CLI::Option *list =
      sub->add_option("--drop-list", options->drop_list, "judge each of these schedules: one a line, as rs info shows stored ones")
          ->type_name("FILE");
  for (const char *name : {"--drop", "--keep", "--drop-profile"}) list->excludes(sub->get_option(name));
  sub->add_flag("--drop-queries", options->drop_queries, "retrieval: drop tokens of queries too");
  sub->add_flag("--json", options->json, "one JSON object a line for each weight file");
  add_no_check_option(sub, &options->no_check);
}
