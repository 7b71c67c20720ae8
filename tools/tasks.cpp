#include "tasks.h"

#include "metrics.h"
#include "scores.h"
#include "task_parts.h"
#include "tokens.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>
#include <numeric>

static void use_stored_prompt(const rs_model *model, std::initializer_list<const char *> names, rs_encode_params *params) {
  const char *text = nullptr;
  for (const char *name : names) {
    if (rs_model_prompt(model, name, &text) != RS_OK) continue;
    params->prompt = text;
    return;
  }
}

void use_stored_prompts(eval_setting *setting, bool of_texts, bool of_queries) {
  if (of_queries) use_stored_prompt(setting->model, {"query"}, &setting->queries);
  if (of_texts) use_stored_prompt(setting->model, {"passage", "document", "corpus"}, &setting->texts);
}

double evaluation::median_seconds() const { return median(seconds); }

std::vector<evaluation> evaluate(const eval_task &task, const std::vector<eval_setting> &settings, int rounds,
                                 const std::function<void(double)> &on_progress) {
  std::vector<std::unique_ptr<eval_run>> runs;
  for (const eval_setting &setting : settings) runs.push_back(task.begin(setting));
  for (auto &run : runs) {  // memory is made, weights are read, the CPU wakes up
    run->load(0);
    run->run(0);
  }
  std::vector<evaluation> results(settings.size());
  const double steps = double(rounds) * double(task.units());
  double done = 0;
  for (int round = 0; round < rounds; ++round) {
    for (evaluation &result : results) result.seconds.push_back(0);
    for (size_t unit = 0; unit < task.units(); ++unit) {
      for (size_t i = 0; i < runs.size(); ++i) {
        const size_t turn = (unit + i) % runs.size();  // no setting always comes after the same one
        runs[turn]->load(unit);
        const double begin = seconds_now();
        runs[turn]->run(unit);
        results[turn].seconds.back() += seconds_now() - begin;
        if (round == 0) runs[turn]->compare(unit);
      }
      if (on_progress) on_progress(++done / steps);
    }
  }
  for (size_t i = 0; i < runs.size(); ++i) {
    runs[i]->finish(&results[i]);
    results[i].arena_bytes = rs_session_arena_bytes(settings[i].session);
  }
  return results;
}

// ---------------------------------------------------------------------------------------------- counts

bool task_of_images(const std::string &name, const std::string &data) {
  std::error_code ignored;
  return name == "images" || ((name == "classification" || name == "cosine") && std::filesystem::is_directory(data, ignored));
}

void check_takes_texts(const rs_model *model, const std::string &task) {
  if (model_info(model).text_hidden > 0) return;
  if (task == "cosine" || task == "classification") fail("this model takes only images: --data needs to be a folder of them");
  fail("this model takes only images, and ", task, " is a task of texts; of images are images, classification and cosine");
}

int32_t task_layers(const rs_model *model, bool of_images) {
  return of_images ? model_info(model).image_layers : model_info(model).layers;
}

layer_counter::layer_counter(const rs_model *model, bool of_images, evaluation *result)
    : model_(model), layers_(task_layers(model, of_images)), result_(result) {
  if (of_images) prefix_ = image_prefix(model);
  special_ = int32_t(special_tokens(model, false));
  pair_special_ = int32_t(special_tokens(model, true));
}

void layer_counter::add_text(const rs_text_info &info, const rs_drop *drop) {
  ++result_->texts;
  result_->truncation.add(info);
  const int32_t protect = !drop || drop->protect == RS_PROTECT_NONE ? 0 : drop->protect == RS_PROTECT_SPECIAL ? special_ : 1;
  add_sequence(info.tokens, drop, protect);
}

void layer_counter::add_pair(int32_t tokens, int32_t prefix, const rs_drop *drop) {
  add_sequence(tokens, drop,
               !drop || drop->protect == RS_PROTECT_NONE ? 0
               : drop->protect == RS_PROTECT_SPECIAL     ? pair_special_
               : drop->protect == RS_PROTECT_PREFIX      ? prefix
                                                         : 1);
}

void layer_counter::add_image(int32_t tokens, const rs_drop *drop) {
  ++result_->texts;
  add_sequence(tokens, drop, prefix_);
}

void layer_counter::add_sequence(int32_t tokens, const rs_drop *drop, int32_t protect) {
  const double all = double(tokens) * layers_;
  result_->tokens += size_t(tokens);
  ++result_->lengths[tokens];
  result_->full_token_layers += all;
  if (!drop) {
    result_->token_layers += all;
    return;
  }
  counts_.resize(size_t(layers_) + 1);
  check(rs_drop_counts(model_, drop, tokens, protect, counts_.data()));
  result_->token_layers += std::accumulate(counts_.begin(), counts_.end() - 1, 0.0);
}

// ---------------------------------------------------------------------------------------------- labels

label_finder::label_finder(const rs_model *model) : labels_(std::max(model_info(model).labels, 2)) {
  const int32_t labels = model_info(model).labels;
  bool other_numbers = false;  // names such as "1" to "5", beside which numbers of labels would mean something else
  for (int32_t i = 0; i < labels_; ++i)
    if (const char *name = i < labels && labels > 1 ? rs_model_label(model, i) : nullptr) {
      numbers_[name] = size_t(i);
      names_ += (names_.empty() ? "" : ", ") + std::string(name);
      const bool number = *name && strspn(name, "0123456789") == strlen(name);
      other_numbers |= number && name != std::to_string(i);
    }
  by_number_ = !other_numbers;
  for (int32_t i = 0; i < labels_ && by_number_; ++i) numbers_.emplace(std::to_string(i), size_t(i));
}

size_t label_finder::find(const std::string &name, const std::string &place) const {
  auto found = numbers_.find(name);
  if (found == numbers_.end())
    fail(place, ": the model has no label ", in_quotes(name), " (it has ",
         by_number_ ? join("0 to ", labels_ - 1, names_.empty() ? "" : ": ") : "", one_line(names_, 200), ")");
  return found->second;
}

std::vector<eval_metric> judge_labels(const std::vector<size_t> &wanted, const float *logits, size_t labels) {
  struct class_counts {
    double wanted = 0, found = 0, both = 0;
  };
  std::map<size_t, class_counts> classes;
  double right = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const float *row = logits + i * labels;
    // A single logit is that of label 1.
    const size_t found = labels == 1 ? size_t(row[0] > 0) : best_first(row, labels, 1)[0];
    ++classes[wanted[i]].wanted;
    ++classes[found].found;
    if (found != wanted[i]) continue;
    ++classes[found].both;
    ++right;
  }
  double f1 = 0;
  for (const auto &[label, count] : classes) f1 += 2 * count.both / (count.wanted + count.found);
  return {{"accuracy", 100 * right / double(wanted.size()), 2}, {"macro-F1", 100 * f1 / double(classes.size()), 2}};
}

namespace {

subset part_of(const task_options &options, int limit) { return {size_t(limit), options.seed, options.half, options.share}; }

retrieval_subset documents_and_queries(const task_options &options) {
  return {part_of(options, options.limit_queries), {size_t(options.limit_documents), options.seed, 0, options.share}};
}

// ---------------------------------------------------------------------------------------------- tasks of vectors

struct text_group {
  const text_list *list;
  bool queries;  // how they are encoded
};

struct group_vectors {
  std::vector<float> values;  // [n, dim]
  std::vector<rs_text_info> infos;
  size_t dim = 0;
  vectors_view view() const { return {values.data(), infos.size(), dim}; }
  const float *row(size_t i) const { return values.data() + i * dim; }
};

// Groups of texts, of which every text becomes a vector; what is good is read off the vectors.
class vector_task : public eval_task {
 public:
  size_t units() const override { return batches_.size(); }
  std::unique_ptr<eval_run> begin(const eval_setting &setting) const override;

  virtual std::vector<eval_metric> judge(const eval_setting &setting, const std::vector<group_vectors> &vectors) const = 0;

  // What a text becomes: an embedding, unless a task wants something else.
  virtual size_t width(const eval_setting &setting) const { return size_t(setting.dim); }
  virtual rs_status compute(const eval_setting &setting, const std::vector<rs_text> &texts, const rs_encode_params &params,
                            float *out, rs_text_info *infos) const {
    return rs_encode(setting.session, texts.data(), texts.size(), &params, out, texts.size() * width(setting), infos);
  }

 protected:
  // In the constructor, when the lists are there; they stay where they are.
  void set_groups(std::vector<text_group> groups, int batch) {
    groups_ = std::move(groups);
    for (size_t g = 0; g < groups_.size(); ++g)
      for (size_t begin = 0; begin < groups_[g].list->size(); begin += size_t(batch))
        batches_.push_back({g, begin, std::min(groups_[g].list->size(), begin + size_t(batch))});
  }

 private:
  friend class vector_run;
  struct batch {
    size_t group, begin, end;
  };
  std::vector<text_group> groups_;
  std::vector<batch> batches_;
};

class vector_run : public eval_run {
 public:
  vector_run(const vector_task &task, const eval_setting &setting) : task_(task), setting_(setting) {
    for (const text_group &group : task.groups_) {
      group_vectors vectors;
      vectors.dim = task.width(setting);
      vectors.values.resize(group.list->size() * vectors.dim);
      vectors.infos.resize(group.list->size());
      vectors_.push_back(std::move(vectors));
    }
  }

  void run(size_t unit) override {
    const vector_task::batch &batch = task_.batches_[unit];
    const text_group &group = task_.groups_[batch.group];
    group_vectors &vectors = vectors_[batch.group];
    texts_.clear();
    for (size_t i = batch.begin; i < batch.end; ++i) texts_.push_back(view_of(group.list->texts[i]));
    const rs_encode_params &params = group.queries ? setting_.queries : setting_.texts;
    rs_status status = task_.compute(setting_, texts_, params, vectors.values.data() + batch.begin * vectors.dim,
                                     vectors.infos.data() + batch.begin);
    size_t culprit = rs_encode_failed(setting_.session);
    if (status != RS_OK && culprit < texts_.size()) fail(group.list->place(batch.begin + culprit), ": ", rs_last_error());
    check(status);
  }

  void finish(evaluation *result) override {
    layer_counter counter(setting_.model, false, result);
    for (size_t g = 0; g < vectors_.size(); ++g)
      for (const rs_text_info &info : vectors_[g].infos)
        counter.add_text(info, task_.groups_[g].queries ? setting_.queries.drop : setting_.texts.drop);
    result->metrics = task_.judge(setting_, vectors_);
  }

  std::vector<group_vectors> &vectors() { return vectors_; }

 private:
  const vector_task &task_;
  const eval_setting &setting_;
  std::vector<group_vectors> vectors_;
  std::vector<rs_text> texts_;
};

std::unique_ptr<eval_run> vector_task::begin(const eval_setting &setting) const {
  return std::make_unique<vector_run>(*this, setting);
}

class stsb_task : public vector_task {
 public:
  explicit stsb_task(const task_options &options) : pairs_(read_scored_pairs(options.data, part_of(options, options.limit))) {
    const auto [least, most] = std::minmax_element(pairs_.scores.begin(), pairs_.scores.end());
    if (!(*least < *most)) fail(in_quotes(options.data), ": a correlation needs at least two different scores");
    set_groups({{&pairs_.first, false}, {&pairs_.second, false}}, options.batch);
  }
  std::string what() const override { return join(pairs_.scores.size(), " pairs"); }

  std::vector<eval_metric> judge(const eval_setting &, const std::vector<group_vectors> &vectors) const override {
    std::vector<double> cosines;
    for (size_t i = 0; i < pairs_.scores.size(); ++i)
      cosines.push_back(cosine(vectors[0].row(i), vectors[1].row(i), vectors[0].dim));
    return {{"Spearman", 100 * spearman(cosines, pairs_.scores), 2}, {"Pearson", 100 * pearson(cosines, pairs_.scores), 2}};
  }

 private:
  scored_pairs pairs_;
};

class retrieval_task : public vector_task {
 public:
  explicit retrieval_task(const task_options &options)
      : set_(read_retrieval(options.data, options.binary, documents_and_queries(options))) {
    set_groups({{&set_.documents, false}, {&set_.queries, true}}, options.batch);
  }
  std::string what() const override { return join(set_.documents.size(), " documents, ", set_.queries.size(), " queries"); }

  std::vector<eval_metric> judge(const eval_setting &, const std::vector<group_vectors> &vectors) const override {
    constexpr size_t deep = 100, shallow = 10;
    double ndcg = 0, recall = 0, recall_deep = 0;
    const std::vector<std::vector<size_t>> ranked = nearest_rows(vectors[1].view(), vectors[0].view(), deep, set_.itself);
    for (size_t query = 0; query < ranked.size(); ++query) {
      std::map<size_t, double> gains;
      std::vector<double> relevant, found;
      for (const judged_document &judged : set_.relevant[query]) {
        gains[judged.document] = judged.gain;
        relevant.push_back(judged.gain);
      }
      for (size_t document : ranked[query]) {
        const auto gain = gains.find(document);
        found.push_back(gain == gains.end() ? 0 : gain->second);
      }
      ndcg += ndcg_at(shallow, found, relevant);
      recall += recall_at(shallow, found, relevant);
      recall_deep += recall_at(deep, found, relevant);
    }
    const double scale = 100 / double(ranked.size());
    return {{"nDCG@10", scale * ndcg, 2}, {"recall@10", scale * recall, 2}, {"recall@100", scale * recall_deep, 2}};
  }

 private:
  retrieval_set set_;
};

class nn_task : public vector_task {
 public:
  explicit nn_task(const task_options &options) : neighbours_(size_t(options.neighbours)) {
    const subset part = part_of(options, options.limit);
    test_ = read_labelled_texts(options.data, part);
    if (!options.train.empty()) train_ = read_labelled_texts(options.train, {});
    else if (test_.labels.size() < 2) fail(in_quotes(options.data), ": a neighbour needs at least two texts");
    const labelled_texts &train = options.train.empty() ? test_ : train_;
    std::map<std::string, int> classes;  // in the order of names
    for (const std::string &label : train.labels) classes.emplace(label, 0);
    int number = 0;
    for (auto &[name, of_class] : classes) of_class = number++;
    const auto numbers = [&](const labelled_texts &data) {
      std::vector<int> result;
      for (size_t i = 0; i < data.labels.size(); ++i) {
        auto found = classes.find(data.labels[i]);
        if (found == classes.end()) fail(data.texts.place(i), ": no training text has the label ", in_quotes(data.labels[i]));
        result.push_back(found->second);
      }
      return result;
    };
    test_classes_ = numbers(test_);
    train_classes_ = numbers(train);
    std::vector<text_group> groups = {{&test_.texts, false}};
    if (!options.train.empty()) groups.push_back({&train_.texts, false});
    set_groups(groups, options.batch);
  }
  std::string what() const override {
    if (train_.labels.empty()) return join(test_.labels.size(), " texts, each by all others");
    return join(test_.labels.size(), " texts by ", train_.labels.size());
  }
  std::string warning() const override {
    const size_t there = train_.labels.empty() ? test_.labels.size() - 1 : train_.labels.size();
    return there < neighbours_ ? join("of ", neighbours_, " neighbours (-k) there are only ", there) : "";
  }

  std::vector<eval_metric> judge(const eval_setting &, const std::vector<group_vectors> &vectors) const override {
    const auto accuracy = [&](size_t k) {
      const bool leave_one_out = vectors.size() == 1;
      const std::vector<int> found = leave_one_out
                                         ? nearest_classes(vectors[0].view(), train_classes_, {nullptr, 0, vectors[0].dim}, k)
                                         : nearest_classes(vectors[1].view(), train_classes_, vectors[0].view(), k);
      size_t right = 0;
      for (size_t i = 0; i < found.size(); ++i) right += found[i] == test_classes_[i];
      return 100 * double(right) / double(found.size());
    };
    std::vector<eval_metric> metrics = {{join("accuracy@", neighbours_), accuracy(neighbours_), 2}};
    if (neighbours_ != 1) metrics.push_back({"accuracy@1", accuracy(1), 2});
    return metrics;
  }

 private:
  size_t neighbours_;
  labelled_texts test_, train_;
  std::vector<int> test_classes_, train_classes_;
};

class cosine_task : public vector_task {
 public:
  explicit cosine_task(const task_options &options) : texts_(read_texts(options.data, part_of(options, options.limit))) {
    set_groups({{&texts_, false}}, options.batch);
  }
  std::string what() const override { return join(texts_.size(), texts_.size() == 1 ? " text" : " texts"); }

  void prepare(const eval_setting &reference) override {
    vector_run run(*this, reference);
    for (size_t unit = 0; unit < units(); ++unit) run.run(unit);
    reference_ = std::move(run.vectors()[0]);
  }

  std::vector<eval_metric> judge(const eval_setting &, const std::vector<group_vectors> &vectors) const override {
    if (vectors[0].dim != reference_.dim)
      fail("vectors of ", vectors[0].dim, " values cannot be compared with vectors of ", reference_.dim);
    double sum = 0, least = 1;
    for (size_t i = 0; i < texts_.size(); ++i) {
      const double value = cosine(vectors[0].row(i), reference_.row(i), reference_.dim);
      sum += value;
      least = std::min(least, value);
    }
    return {{"cosine", sum / double(texts_.size()), 5}, {"lowest", least, 5}};
  }

 private:
  text_list texts_;
  group_vectors reference_;
};

// ---------------------------------------------------------------------------------------------- tasks of heads

class classification_task : public vector_task {
 public:
  explicit classification_task(const task_options &options)
      : data_(read_labelled_texts(options.data, part_of(options, options.limit))) {
    set_groups({{&data_.texts, false}}, options.batch);
  }
  std::string what() const override { return join(data_.labels.size(), " texts"); }

  void check(const rs_model *model) const override {
    need_head(model, {RS_HEAD_SEQUENCE}, "eval", "classification");
    labels_of(model);
  }

  size_t width(const eval_setting &setting) const override { return size_t(model_info(setting.model).labels); }
  rs_status compute(const eval_setting &setting, const std::vector<rs_text> &texts, const rs_encode_params &params, float *out,
                    rs_text_info *infos) const override {
    return rs_classify(setting.session, texts.data(), nullptr, texts.size(), &params, out, texts.size() * width(setting), infos);
  }

  std::vector<eval_metric> judge(const eval_setting &setting, const std::vector<group_vectors> &logits) const override {
    return judge_labels(labels_of(setting.model), logits[0].values.data(), logits[0].dim);
  }

 private:
  std::vector<size_t> labels_of(const rs_model *model) const {
    const label_finder finder(model);
    std::vector<size_t> result;
    for (size_t i = 0; i < data_.labels.size(); ++i) result.push_back(finder.find(data_.labels[i], data_.texts.place(i)));
    return result;
  }

  labelled_texts data_;
};

class squad_task : public eval_task {
 public:
  explicit squad_task(const task_options &options)
      : set_(read_squad(options.data, part_of(options, options.limit))), threshold_(options.no_answer_threshold) {
    for (const squad_question &question : set_.questions) unanswerable_ += question.answers.empty();
  }
  std::string what() const override {
    const std::string count = join(set_.questions.size(), " questions");
    return unanswerable_ == 0 ? count : join(count, ", ", unanswerable_, " without an answer");
  }
  void check(const rs_model *model) const override { need_head(model, {RS_HEAD_SPANS}, "eval", "question-answering"); }
  size_t units() const override { return set_.questions.size(); }
  std::unique_ptr<eval_run> begin(const eval_setting &setting) const override;

 private:
  friend class squad_run;
  squad_set set_;
  double threshold_;
  size_t unanswerable_ = 0;
};

class squad_run : public eval_run {
 public:
  squad_run(const squad_task &task, const eval_setting &setting) : task_(task), setting_(setting), found_(task.units()) {
    params_.max_tokens = setting.texts.max_tokens;
    params_.drop = setting.texts.drop;
  }

  void run(size_t unit) override {
    const squad_question &question = task_.set_.questions[unit];
    const rs_text asked = view_of(question.text), context = view_of(task_.set_.contexts[question.context]);
    size_t n = 0;  // none in a context without a token: then the answer is ""
    if (rs_answer_question(setting_.session, &asked, &context, &params_, &found_[unit], 1, &n) != RS_OK)
      fail("question ", in_quotes(question.id), ": ", rs_last_error());
  }

  void finish(evaluation *result) override {
    layer_counter counter(setting_.model, false, result);
    double exact = 0, f1 = 0, right_to_refuse = 0;
    for (size_t i = 0; i < found_.size(); ++i) {
      const squad_question &question = task_.set_.questions[i];
      const std::string prediction = prediction_of(i);
      const squad_score score = squad_judge(prediction, question.answers);
      exact += score.exact;
      f1 += score.f1;
      if (question.answers.empty()) right_to_refuse += score.exact;
      count(question, found_[i], &counter);
    }
    result->texts = found_.size();
    const double scale = 100 / double(found_.size());
    result->metrics = {{"F1", scale * f1, 2}, {"exact", scale * exact, 2}};
    if (task_.unanswerable_ > 0) result->metrics.push_back({"no answer", 100 * right_to_refuse / double(task_.unanswerable_), 2});
  }

 private:
  // Data in which every question has an answer is that of SQuAD 1.1, whose models know no better than to answer.
  std::string prediction_of(size_t i) const {
    const rs_answer &answer = found_[i];
    if (task_.unanswerable_ > 0 && answer.no_answer_logit - answer.logit > task_.threshold_) return "";
    const std::string &context = task_.set_.contexts[task_.set_.questions[i].context];
    return context.substr(answer.begin, answer.end - answer.begin);
  }

  // Of several windows only their sum is known; they are about equally long.
  void count(const squad_question &question, const rs_answer &answer, layer_counter *counter) const {
    const rs_text asked = view_of(question.text);
    size_t prefix = 0;
    const rs_status status = rs_tokenize(setting_.model, &asked, nullptr, nullptr, nullptr, nullptr, SIZE_MAX, &prefix);
    ::check(status);
    int32_t left = answer.tokens;
    for (int32_t window = answer.windows; window > 0; --window) {
      const int32_t tokens = (left + window - 1) / window;
      counter->add_pair(tokens, int32_t(prefix), setting_.texts.drop);
      left -= tokens;
    }
  }

  const squad_task &task_;
  const eval_setting &setting_;
  rs_answer_params params_ = sized<rs_answer_params>();
  std::vector<rs_answer> found_;
};

std::unique_ptr<eval_run> squad_task::begin(const eval_setting &setting) const {
  return std::make_unique<squad_run>(*this, setting);
}

}  // namespace

const std::vector<std::string> task_names = {"stsb", "sst2", "classification", "retrieval", "squad", "nn", "cosine", "images"};

std::unique_ptr<eval_task> load_task(const std::string &name, const task_options &options) {
  if (task_of_images(name, options.data)) return load_image_task(name, options);
  if (name == "stsb") return std::make_unique<stsb_task>(options);
  if (name == "sst2" || name == "classification") return std::make_unique<classification_task>(options);
  if (name == "squad") return std::make_unique<squad_task>(options);
  if (name == "retrieval") return std::make_unique<retrieval_task>(options);
  if (name == "nn") return std::make_unique<nn_task>(options);
  if (name == "cosine") return std::make_unique<cosine_task>(options);
  fail_usage("unknown task ", in_quotes(name));
}
