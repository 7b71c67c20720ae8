// Options that several subcommands have in common, and what they come to.
#pragma once
#include "drop.h"
#include "images.h"

#include <CLI/CLI.hpp>

#include <climits>
#include <functional>

struct command_line {
  std::function<int()> run;           // what the subcommand that was asked for does; returns the exit status
  std::vector<std::string> trailing;  // arguments after "--", where they are texts
};

// Each adds its subcommand.
void add_answer(CLI::App *app, command_line *line);
void add_bench(CLI::App *app, command_line *line);
void add_classify(CLI::App *app, command_line *line);
void add_convert(CLI::App *app, command_line *line);
void add_embed(CLI::App *app, command_line *line);
void add_eval(CLI::App *app, command_line *line);
void add_info(CLI::App *app, command_line *line);
void add_rerank(CLI::App *app, command_line *line);
void add_similarity(CLI::App *app, command_line *line);
void add_tokenize(CLI::App *app, command_line *line);
void add_trace(CLI::App *app, command_line *line);
void add_tune(CLI::App *app, command_line *line);
void add_verify(CLI::App *app, command_line *line);

// A subcommand with its line of description, examples for its --help, and what it does with `options` once they are parsed.
template <class Options>
CLI::App *add_command(CLI::App *app, const std::string &name, const std::string &what, const std::string &examples,
                      std::shared_ptr<Options> options, int (*execute)(const Options &), command_line *line) {
  CLI::App *sub = app->add_subcommand(name, what);
  sub->footer(examples);
  sub->callback([=] { line->run = [=] { return execute(*options); }; });
  return sub;
}

// Checks of values.  CLI11's own say it at length, clamp what is too large, and let NaN pass.
CLI::Validator whole_number(uint64_t least, uint64_t most = INT_MAX);
CLI::Validator above_zero();
CLI::Validator any_number();

void add_model_option(CLI::App *sub, std::string *file, bool positional);  // positional: `rs info FILE` as well as -m FILE
void add_threads_option(CLI::App *sub, int *threads);                      // and --device
void add_no_check_option(CLI::App *sub, bool *no_check);
// name or name=GROUPING, one of op_groupings; `grouping` stays empty without it.
void add_op_times_flag(CLI::App *sub, const std::string &name, std::string *grouping, const std::string &what);

// Where texts come from.  Texts that are arguments are what CLI11 makes nothing of: its own lists of arguments would take "[MASK]"
// apart, and look for options after "--".
struct text_options {
  const CLI::App *sub = nullptr;
  const command_line *line = nullptr;
  std::string file;
  std::string kind = "auto";
  // keys: of JSON lines.  Where the model takes images, arguments are images, and more_texts follow them.
  std::unique_ptr<text_source> open(const line_keys &keys = {}, const std::vector<std::string> &more_texts = {}) const;
  bool from_arguments() const;  // not from a file or a stream

 private:
  std::vector<std::string> arguments() const;
};
// what: that --file holds; members: of a JSON line.
void add_text_options(CLI::App *sub, text_options *options, const command_line *line, const char *what,
                      const char *members = "\"text\"");
inline bool takes_texts(const CLI::App &sub) { return sub.get_allow_extras(); }

// What to do with a text that cannot be used.
struct error_options {
  std::string on_error = "skip";
  bool stop() const { return on_error == "stop"; }
};
void add_error_options(CLI::App *sub, error_options *options);

void add_max_tokens_option(CLI::App *sub, int *max_tokens);
// The model has so many positions, and its templates take some: of a text, or of a pair.
void check_max_tokens(int max_tokens, const rs_model *model, bool pair);

// What becomes of a text with more tokens than that.
void add_long_options(CLI::App *sub, std::string *what, int *overlap, const char *joined);
int32_t library_overlap(int option);  // of --overlap, -1 where it is not given
void set_long(const std::string &what, int overlap, const rs_model *model, rs_encode_params *params);  // max_tokens is set

// --image-size N or WxH: what images are brought to.
void add_image_size_option(CLI::App *sub, std::string *size);
struct image_size {
  int32_t width = 0, height = 0;  // 0: the model's own
};
image_size image_size_of(const std::string &option, const rs_model *model);  // checked: usage_failure

// Options of texts make no sense for a model that takes none: usage_failure that names the first that is `given`.
void need_texts(const rs_model *model, std::initializer_list<std::pair<const char *, bool>> given);

// How a text or an image becomes a vector.
struct encode_options {
  std::string pooling;
  bool normalize = false, no_normalize = false;
  int max_tokens = 0;
  const CLI::Option *prompt_option = nullptr;
  std::string prompt;
  int dim = 0;
  std::string long_text = "truncate";
  int overlap = -1;  // by default
  std::string image_size;
  drop_options drop;
};
// per_token: --pooling none has a meaning.
void add_encode_options(CLI::App *sub, encode_options *options, bool per_token = true);
// Of these, --max-tokens and --prompt: for what makes sequences, but no vectors.
void add_sequence_options(CLI::App *sub, encode_options *options);

// The same, checked against a model.
struct encoding {
  rs_encode_params params = sized<rs_encode_params>();
  int64_t dim = 0;         // of the vector of a text; of an image, where the model takes no texts
  int64_t image_dim = 0;   // of the vector of an image
  int32_t max_tokens = 0;  // of a sequence
  std::string prompt;      // what params.prompt points to
  drop_choice drop;        // and params.drop
  encoding(const encode_options &options, const rs_model *model);
  encoding(const encoding &) = delete;
  encoding &operator=(const encoding &) = delete;
  bool per_token() const { return params.pooling == RS_POOL_NONE; }

 private:
  void set_prompt(const std::string &wanted, const rs_model *model);
};
