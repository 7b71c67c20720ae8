// Tasks that a model is judged by: rs eval prints what they say, rs tune asks them about many settings.
//
//   std::unique_ptr<eval_task> task = load_task("stsb", options);   // reads the data, once
//   task->prepare(setting);                                         // what others are compared with, where the task does that
//   std::vector<evaluation> results = evaluate(*task, settings, 3);  // quality and time of each setting, in turns
#pragma once
#include "datasets.h"
#include "encode.h"

#include <functional>
#include <map>

// How texts or images go through a model.  Everything that is pointed to outlives what uses the setting.
struct eval_setting {
  const rs_model *model = nullptr;
  rs_session *session = nullptr;
  rs_encode_params texts = sized<rs_encode_params>();    // sentences, documents, contexts, images
  rs_encode_params queries = sized<rs_encode_params>();  // of retrieval
  int64_t dim = 0;                                       // of a vector
};

// Of retrieval: what the model's authors meant to stand before a document and before a query, where the file says so.
void use_stored_prompts(eval_setting *setting, bool of_texts, bool of_queries);

struct eval_metric {
  std::string name;  // "nDCG@10"
  double value;      // NaN where it is not defined
  int digits;        // after the point, in a table
};

struct evaluation {
  std::vector<eval_metric> metrics;  // the first is the quality: higher is better
  double quality() const { return metrics[0].value; }

  std::vector<double> seconds;  // that encoding everything took, tokenizer included (of images, pixels only), in each round
  double median_seconds() const;
  double tokens_per_second() const { return double(tokens) / median_seconds(); }
  double texts_per_second() const { return double(texts) / median_seconds(); }

  size_t texts = 0, tokens = 0;       // texts, or images
  std::map<int32_t, size_t> lengths;  // texts by their tokens
  double token_layers = 0;            // tokens that enter each layer, summed over layers
  double full_token_layers = 0;       // the same without dropping
  double tokens_per_layer(int32_t layers) const { return token_layers / (double(texts) * layers); }
  double share_left() const { return token_layers / full_token_layers; }

  size_t arena_bytes = 0;  // of the session, the most so far
  truncation_count truncation;
};

// A task under way with one setting.
class eval_run {
 public:
  virtual ~eval_run() = default;
  virtual void load(size_t) {}                  // what run(unit) needs
  virtual void run(size_t unit) = 0;            // what is timed
  virtual void compare(size_t) {}               // what is to be known of a unit besides, once
  virtual void finish(evaluation *result) = 0;  // after every unit: metrics and counts
};

class eval_task {
 public:
  virtual ~eval_task() = default;
  virtual std::string what() const = 0;  // "1379 pairs"
  virtual bool of_images() const { return false; }
  virtual std::string warning() const { return ""; }  // of its data
  virtual void check(const rs_model *) const {}       // throws usage_failure for a model that cannot do this
  virtual void prepare(const eval_setting &) {}
  virtual size_t units() const = 0;  // parts of the work: a batch of texts, a question
  virtual std::unique_ptr<eval_run> begin(const eval_setting &setting) const = 0;
};

struct task_options {
  std::string data;
  std::string train;               // nn
  int limit = 0;                   // pairs, texts, questions
  int limit_documents = 0;         // retrieval
  int limit_queries = 0;           // retrieval
  uint64_t seed = 0;               // of random parts; 0: the first
  int half = 0;                    // of pairs, texts, queries, questions: 1 or 2, a random half; 0: all
  double share = 1;                // of these, and of documents
  bool binary = false;             // retrieval: gains are 0 or 1
  double no_answer_threshold = 0;  // squad: "" where the logit of no answer is that much higher
  int neighbours = 10;             // nn
  int batch = 64;                  // texts encoded together
};

extern const std::vector<std::string> task_names;
// Is the task one of images?  "images" is; "classification" and "cosine" are where the data is a folder.
bool task_of_images(const std::string &name, const std::string &data);
// Of a task of texts, before it reads its data, which may be a folder of images: failure for a model that takes none.
void check_takes_texts(const rs_model *model, const std::string &task);
int32_t task_layers(const rs_model *model, bool of_images);  // of what a task encodes
std::unique_ptr<eval_task> load_task(const std::string &name, const task_options &options);

// Settings take turns, unit by unit, so that whatever else the machine does hurts all alike.  `on_progress`: the share that is
// done.
std::vector<evaluation> evaluate(const eval_task &task, const std::vector<eval_setting> &settings, int rounds,
                                 const std::function<void(double)> &on_progress = {});
