// What the subcommands have in common that read texts or images and write something for each, in the order of the input and in
// constant memory, however long it is: options, batches, items that cannot be used, progress, what is said at the end.
#pragma once
#include "encode.h"
#include "options.h"
#include "output.h"
#include "progress.h"

struct text_run_options {
  std::string model;
  int threads = 0;
  std::string thread_mode = "auto";
  bool no_check = false;
  text_options texts;
  error_options errors;
  std::string output;
  int batch = 0;        // 0: by default
  std::string profile;  // how to sum it up; empty: no profile
};

// --model, texts (of which --file holds `what`) and --output, which come first in a subcommand's help; and --batch, threads, errors
// and the like.
void add_text_run_options(CLI::App *sub, text_run_options *options, const command_line *line, const char *what,
                          const char *members = "\"text\"");

// One text of a batch that cannot be used.
struct item_failure : failure {
  size_t item;
  item_failure(size_t item, const std::string &why) : failure(why), item(item) {}
};

class text_run {
 public:
  text_run(const text_run_options &options, std::unique_ptr<text_source> source);
  text_run(const text_run_options &options, model_ptr model, std::unique_ptr<text_source> source);
  virtual ~text_run() = default;
  text_run(const text_run &) = delete;
  text_run &operator=(const text_run &) = delete;
  int run();  // exit status

 protected:
  // For what takes images: they come to compute() with pixels.  Before run().
  void load_images(const image_size &size);
  // Before the first text and after the last one.
  virtual void begin() {}
  virtual void end() {}
  // What the library has to say of these texts.  Throws item_failure where one is at fault; it is then called again without that.
  virtual void compute(const std::vector<const text_item *> &items) = 0;
  // What compute() found for the i-th of them.
  virtual void write(const text_item &item, size_t i) = 0;
  virtual int32_t max_tokens() const = 0;                     // that a text was cut to
  virtual const char *cut_advice() const { return nullptr; }  // what else keeps more of a long text: truncation_count::summary

  // The status of a call of the library for all texts of compute(), or for `items` of them.
  void check_items(rs_status status) const;
  void check_items(rs_status status, const std::vector<size_t> &items) const;
  void count(const rs_text_info &info) {
    truncation_.add(info);
    tokens_ += size_t(info.tokens);
  }
  void count(const rs_image_info &info) { tokens_ += size_t(info.tokens); }
  size_t ordinal() const { return texts_seen_ - 1; }  // in write(): of the text among all

 private:
  const text_run_options &options_;

 protected:
  model_ptr model_;

 private:
  std::unique_ptr<text_source> source_;  // an image_loader needs the model

 protected:
  rs_model_info info_;
  session_ptr session_;
  output_file out_;
  size_t most_items_ = SIZE_MAX;  // of a batch, where --batch says nothing

 private:
  bool read_batch();
  void compute_batch();
  void write_batch();
  void show_progress();
  void report();
  size_t batch_limit(const text_item &item) const;

  const char *noun_ = "text";
  progress progress_;
  std::vector<text_item> items_;         // the batch
  std::vector<const text_item *> good_;  // those of it that are texts
  size_t texts_seen_ = 0, failed_ = 0, tokens_ = 0;
  truncation_count truncation_;
  bool stopped_ = false;
};
