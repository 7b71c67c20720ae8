#include "options.h"

#include "op_times.h"
#include "tokens.h"

#include <unistd.h>
#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <cstdlib>

static constexpr int max_threads = 1024;

CLI::Validator whole_number(uint64_t least, uint64_t most) {
  const auto check = [=](const std::string &value) -> std::string {
    uint64_t number = 0;
    const char *const end = value.data() + value.size();
    const auto [at, error] = std::from_chars(value.data(), end, number);
    // CLI11 would read 010 as eight.
    const bool digits = at == end && !value.empty() && (value[0] != '0' || value.size() == 1);
    const bool large = digits && (error != std::errc() || number > most);
    if (digits && !large && number >= least) return "";
    return join("wants a whole number from ", least, large || most < INT_MAX ? join(" to ", most) : "", ", got ", in_quotes(value));
  };
  return CLI::Validator(check, "");
}

static std::string check_number(const std::string &value, bool above_zero) {
  char *end = nullptr;
  const double number = strtod(value.c_str(), &end);
  if (!value.empty() && *end == '\0' && (number > 0 || !above_zero) && std::isfinite(float(number))) return "";
  return join("wants a number", above_zero ? " above 0" : "", ", got ", in_quotes(value));
}

CLI::Validator above_zero() {
  return CLI::Validator([](const std::string &value) { return check_number(value, true); }, "");
}

CLI::Validator any_number() {
  return CLI::Validator([](const std::string &value) { return check_number(value, false); }, "");
}

void add_model_option(CLI::App *sub, std::string *file, bool positional) {
  const std::string names = positional ? "-m,--model,model" : "-m,--model";
  sub->add_option(names, *file, "weight file, as rs convert writes it")->type_name("FILE")->required();
}

// The library reads RS_DEVICE where a program names none.
static void add_device_option(CLI::App *sub) {
  sub->add_option_function<std::string>(
         "--device", [](const std::string &name) { setenv("RS_DEVICE", name.c_str(), 1); },
         "where the model runs: cpu (default), cuda, cuda:N, or auto: the first card that answers, else the CPU")
      ->type_name("NAME")
      ->check(CLI::Validator(
          [](const std::string &name) -> std::string {
            const bool numbered = name.compare(0, 5, "cuda:") == 0 && whole_number(0, 999)(name.substr(5)).empty();
            if (numbered || name == "cpu" || name == "cuda" || name == "auto") return "";
            return "wants cpu, cuda, cuda:N or auto, got " + in_quotes(name);
          },
          ""));
}

void add_threads_option(CLI::App *sub, int *threads) {
  add_device_option(sub);
  sub->add_option("-t,--threads", *threads,
                  join("threads, 1 to ", max_threads, " (default: OMP_NUM_THREADS, up to that; else the CPUs that there are)"))
      ->type_name("N")
      ->check(whole_number(1, max_threads));
}

void add_no_check_option(CLI::App *sub, bool *no_check) {
  sub->add_flag("--no-check", *no_check, "skip the checksums of the weight file: starts faster");
}

void add_op_times_flag(CLI::App *sub, const std::string &name, std::string *grouping, const std::string &what) {
  sub->add_flag(name + "{op}", *grouping,
                what + "\n" + name + "=op (default): summed by operator\n" + name +
                    "=layer: by what it makes, all layers together\n" + name + "=each: one by one")
      ->check(CLI::IsMember(op_groupings));
}

// ---------------------------------------------------------------------------------------------- texts

void add_text_options(CLI::App *sub, text_options *options, const command_line *line, const char *what, const char *members) {
  sub->allow_extras();
  options->sub = sub;
  options->line = line;
  sub->add_option("-f,--file", options->file, join("read ", what, " from this file\n(no texts, or '-': standard input)"))
      ->type_name("FILE");
  sub->add_option("--input", options->kind,
                  join("text: every line is a text, an empty one the empty text\n"
                       "jsonl: every line that is not blank is an object with ",
                       members,
                       "\n"
                       "auto (default): jsonl if the first line that is not blank is a JSON object"))
      ->type_name("KIND")
      ->check(CLI::IsMember({"auto", "text", "jsonl"}));
}

static bool looks_like_option(const std::string &argument) {
  return argument.size() > 1 && argument[0] == '-' && (isalpha(static_cast<unsigned char>(argument[1])) || argument[1] == '-');
}

std::vector<std::string> text_options::arguments() const {
  std::vector<std::string> texts = sub->remaining();
  for (const std::string &text : texts)
    if (looks_like_option(text)) fail_usage("unknown option ", in_quotes(text), " (a text that begins with '-' goes after '--')");
  texts.insert(texts.end(), line->trailing.begin(), line->trailing.end());
  return texts;
}

static bool is_standard_input(const std::vector<std::string> &texts, const command_line &line) {
  return texts == std::vector<std::string>{"-"} && line.trailing.empty();
}

bool text_options::from_arguments() const {
  std::vector<std::string> texts = arguments();
  return !texts.empty() && !is_standard_input(texts, *line);
}

std::unique_ptr<text_source> text_options::open(const line_keys &keys, const std::vector<std::string> &more_texts) const {
  const bool images = keys.takes != inputs::texts;
  std::vector<std::string> given = arguments();
  bool standard_input = is_standard_input(given, *line);
  if (!given.empty() && !file.empty()) fail_usage("both ", images ? "images" : "texts", " and --file are given");
  if (!more_texts.empty() && (standard_input || !file.empty()))
    fail_usage("both --text and ", standard_input ? "'-'" : "--file", " are given");
  if (!more_texts.empty() || (images && !given.empty() && !standard_input))
    return images_of_arguments(std::move(given), more_texts);
  if (!given.empty() && !standard_input) return texts_of_arguments(std::move(given));
  if (given.empty() && file.empty() && isatty(STDIN_FILENO)) {
    if (images) fail_usage("no image: give images, folders or patterns as arguments, --file LIST, or a pipe of paths");
    fail_usage("no text: give texts as arguments, --file FILE, or a pipe ('-' reads from the terminal)");
  }
  input_kind wanted = kind == "text" ? input_kind::text : kind == "jsonl" ? input_kind::jsonl : input_kind::automatic;
  if (keys.needs_list || keys.needs_pair) {
    if (wanted == input_kind::text)
      fail_usage("--input text: plain lines have no ", keys.text.front(), ", which --", keys.text.front(), " gives");
    wanted = input_kind::jsonl;
  }
  return texts_of_file(file.empty() ? "-" : file, wanted, keys);
}

void add_error_options(CLI::App *sub, error_options *options) {
  sub->add_option("--on-error", options->on_error,
                  "a line that cannot be used makes the exit status 1, and\n"
                  "skip (default): is reported, left out, and the others go on\n"
                  "stop: is reported and ends the run, after writing what came before\n"
                  "UTF-16, and NUL bytes, end it in any case")
      ->type_name("WHAT")
      ->check(CLI::IsMember({"skip", "stop"}));
}

// ---------------------------------------------------------------------------------------------- encoding

void add_max_tokens_option(CLI::App *sub, int *max_tokens) {
  sub->add_option("--max-tokens", *max_tokens, "limit of a text, special tokens included (default: the model's)")
      ->type_name("N")
      ->check(whole_number(1));
}

void check_max_tokens(int max_tokens, const rs_model *model, bool pair) {
  const int32_t limit = model_info(model).position_limit;
  if (max_tokens > limit) fail_usage("--max-tokens: ", max_tokens, " is more than the ", limit, " positions of this model");
  const size_t special = special_tokens(model, pair);
  if (max_tokens > 0 && size_t(max_tokens) <= special)
    fail_usage("--max-tokens: ", max_tokens, " leaves no room beside the ", special, " special tokens");
}

void add_long_options(CLI::App *sub, std::string *what, int *overlap, const char *joined) {
  sub->add_option("--long", *what,
                  std::string("a text with more tokens than that:\n"
                              "truncate (default): keep the first; a summary says how many were cut\n"
                              "error: it cannot be used\n"
                              "chunk: overlapping windows, ") +
                      joined)
      ->type_name("WHAT")
      ->check(CLI::IsMember({"truncate", "error", "chunk"}));
  sub->add_option("--overlap", *overlap, "tokens that two windows of --long chunk share\n(default: an eighth of a window)")
      ->type_name("N")
      ->check(whole_number(0));
}

int32_t library_overlap(int option) { return option > 0 ? option : option == 0 ? -1 : 0; }

void set_long(const std::string &what, int overlap, const rs_model *model, rs_encode_params *params) {
  if (what == "error") params->long_text = RS_LONG_ERROR;
  if (what == "chunk") params->long_text = RS_LONG_CHUNK;
  if (overlap >= 0 && params->long_text != RS_LONG_CHUNK) fail_usage("--overlap goes with --long chunk");
  const int64_t window = params->max_tokens > 0 ? params->max_tokens : model_info(model).max_tokens,
                room = window - int64_t(special_tokens(model, false));
  if (overlap > 0 && overlap >= room)
    fail_usage("--overlap: ", overlap, " is not less than the ", room, " tokens of text in a window");
  params->chunk_overlap = library_overlap(overlap);
}

void add_sequence_options(CLI::App *sub, encode_options *options) {
  add_max_tokens_option(sub, &options->max_tokens);
  options->prompt_option = sub->add_option("--prompt", options->prompt,
                                           "put in front of every text: the name of a stored prompt, or the\n"
                                           "prompt itself; '' for none (default: the model's)")
                               ->type_name("PROMPT");
}

void add_image_size_option(CLI::App *sub, std::string *size) {
  sub->add_option("--image-size", *size, "pixels that images are brought to (default: the model's)")->type_name("N|WxH");
}

image_size image_size_of(const std::string &option, const rs_model *model) {
  if (option.empty()) return {};
  if (model_info(model).image_hidden == 0) fail_usage("--image-size: this model takes no images");
  image_size size;
  const char *const end = option.data() + option.size();
  auto [at, error] = std::from_chars(option.data(), end, size.width);
  size.height = size.width;
  if (error == std::errc() && at != end && *at == 'x') {
    const auto second = std::from_chars(at + 1, end, size.height);
    at = second.ptr, error = second.ec;
  }
  if (error != std::errc() || at != end || size.width < 1 || size.height < 1)
    fail_usage("--image-size: ", in_quotes(option), " is neither a number of pixels nor WIDTHxHEIGHT, as in 224 or 320x240");
  rs_image_shape shape{};
  if (rs_image_get_shape(model, size.width, size.height, &shape) != RS_OK) fail_usage("--image-size: ", rs_last_error());
  return size;
}

void need_texts(const rs_model *model, std::initializer_list<std::pair<const char *, bool>> given) {
  if (model_info(model).text_hidden > 0) return;
  for (const auto &[name, is_given] : given)
    if (is_given) fail_usage(name, ": this model takes no texts");
}

void add_encode_options(CLI::App *sub, encode_options *options, bool per_token) {
  sub->add_option("--pooling", options->pooling,
                  per_token ? "mean, cls, max, mean_sqrt_len, weighted_mean, last,\n"
                              "or none: a vector for every token (default: the model's)"
                            : "mean, cls, max, mean_sqrt_len, weighted_mean or last (default: the model's)")
      ->type_name("NAME");
  CLI::Option *on = sub->add_flag("--normalize", options->normalize, "divide by the L2 norm (default: what the model does)");
  sub->add_flag("--no-normalize", options->no_normalize, "do not")->excludes(on);
  add_sequence_options(sub, options);
  sub->add_option("--dim", options->dim, "keep the first N values and normalise again (Matryoshka)")
      ->type_name("N")
      ->check(whole_number(1));
  add_long_options(sub, &options->long_text, &options->overlap, "averaged");
  add_drop_options(sub, &options->drop);
}

encoding::encoding(const encode_options &options, const rs_model *model) : drop(options.drop, model) {
  params.drop = drop.get();
  rs_model_info info = model_info(model);
  if (!options.pooling.empty() && rs_pooling_parse(options.pooling.c_str(), &params.pooling) != RS_OK)
    fail_usage("--pooling: ", rs_last_error());
  if (params.pooling == RS_POOL_CLS && lacks_class_token(model))
    fail_usage("cls: this model has no class token, only patches; mean is of these");
  params.normalize = options.normalize ? RS_ON : options.no_normalize ? RS_OFF : RS_DEFAULT;

  const bool prompted = options.prompt_option && options.prompt_option->count() > 0;
  need_texts(model,
             {{"--max-tokens", options.max_tokens > 0}, {"--prompt", prompted}, {"--long", options.long_text != "truncate"}});
  if (info.text_hidden > 0) check_max_tokens(options.max_tokens, model, false);
  params.max_tokens = options.max_tokens;
  max_tokens = options.max_tokens > 0 ? options.max_tokens : info.max_tokens;
  const image_size size = image_size_of(options.image_size, model);
  params.image_width = size.width;
  params.image_height = size.height;

  // A pooling that is named is of the states, before they are brought to what texts and images have in common.
  const bool own = params.pooling == RS_POOL_DEFAULT;
  const int32_t of_texts = own && info.text_hidden > 0 ? info.dim : info.text_hidden;
  const int32_t of_images = own && info.image_hidden > 0 ? info.dim : info.image_hidden;
  const int32_t most = of_texts > 0 && of_images > 0 ? std::min(of_texts, of_images) : std::max(of_texts, of_images);
  if (options.dim > most) fail_usage("--dim: ", options.dim, " is more than the ", most, " values of this model's vectors");
  params.dim = options.dim;
  image_dim = options.dim > 0 ? options.dim : of_images;
  dim = of_texts == 0 ? image_dim : options.dim > 0 ? options.dim : of_texts;

  set_long(options.long_text, options.overlap, model, &params);
  if (params.long_text == RS_LONG_CHUNK && per_token())
    fail_usage("--long chunk averages vectors of windows; --pooling none has none");
  if (prompted) set_prompt(options.prompt, model);
}

void encoding::set_prompt(const std::string &wanted, const rs_model *model) {
  prompt = wanted;
  const char *stored = nullptr;
  rs_meta names;
  if (!wanted.empty() && rs_model_prompt(model, wanted.c_str(), &stored) == RS_OK) {
    prompt = stored;
  } else if (!wanted.empty() && find_meta(model, "prompt.names", &names)) {
    std::string known;
    for (const std::string &name : strings_of(names)) known += (known.empty() ? "" : ", ") + name;
    say("no stored prompt is called " + in_quotes(wanted) + " (there are: " + known + "); taking it for the prompt itself");
  }
  params.prompt = prompt.c_str();
}
