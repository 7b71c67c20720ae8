// rs similarity: the cosine of two texts, or a table of many.
#include "encode.h"
#include "json.h"
#include "options.h"
#include "output.h"
#include "table.h"

#include <algorithm>

namespace {

constexpr size_t max_table = 1000;  // a table grows with the square

const char *const examples =
    "Examples:\n"
    "  rs similarity -m minilm.rsw 'a cat' 'a kitten'\n"
    "  rs similarity -m minilm.rsw --table -f sentences.txt";

struct similarity_options {
  std::string model;
  int threads = 0;
  bool no_check = false, table = false;
  text_options texts;
  encode_options encode;
  std::string format = "text";
};

std::vector<std::string> read_texts(const text_options &options, std::vector<std::string> *places) {
  std::unique_ptr<text_source> source = options.open();
  std::vector<std::string> texts;
  text_item item;
  while (source->next(&item)) {
    if (!item.error.empty()) fail(source->place(item), ": ", item.error);
    if (texts.size() == max_table) fail("more than ", max_table, " texts; rs embed writes their vectors");
    places->push_back(source->place(item));
    texts.push_back(std::move(item.text));
  }
  if (texts.size() < 2) fail_usage("two texts are needed, got ", texts.size());
  return texts;
}

using matrix = std::vector<std::vector<double>>;

matrix all_cosines(const encoded_texts &encoded, size_t n) {
  matrix cosines(n, std::vector<double>(n));
  for (size_t i = 0; i < n; ++i)
    for (size_t j = 0; j <= i; ++j)
      cosines[i][j] = cosines[j][i] = i == j ? 1 : cosine(encoded.row(i), encoded.row(j), size_t(encoded.dim));
  return cosines;
}

// The texts stand at the end of their rows: there they need not be as wide as a terminal counts them.
std::string table_of(const matrix &cosines, const std::vector<std::string> &texts) {
  const size_t digits = std::to_string(texts.size()).size();
  std::string out(digits, ' ');
  for (size_t j = 0; j < texts.size(); ++j) out += format(" %7zu", j + 1);
  out += "\n";
  for (size_t i = 0; i < texts.size(); ++i) {
    out += format("%*zu", int(digits), i + 1);
    for (double value : cosines[i]) out += format(" %7.4f", value);
    out += "  " + one_line(texts[i], 48) + "\n";
  }
  return out;
}

std::string json_of(const matrix &cosines, const std::vector<std::string> &texts) {
  nlohmann::ordered_json root;
  if (texts.size() == 2) root["cosine"] = cosines[0][1];
  root["texts"] = texts;
  root["cosines"] = cosines;
  return root.dump(-1, ' ', false, json::error_handler_t::replace) + "\n";
}

int run_similarity(const similarity_options &options) {
  std::vector<std::string> places, texts = read_texts(options.texts, &places);
  model_ptr model = load_model(options.model, !options.no_check);
  encoding how(options.encode, model.get());
  if (how.per_token()) fail_usage("--pooling none gives no vector to compare");
  session_ptr session = create_session(model.get(), options.threads, false);
  encoded_texts encoded = encode_texts(session.get(), texts, how.params, how.dim, places);
  matrix cosines = all_cosines(encoded, texts.size());
  if (options.format == "json") print(json_of(cosines, texts));
  else if (texts.size() == 2 && !options.table) print(format("%.4f\n", cosines[0][1]));
  else print(table_of(cosines, texts));

  truncation_count truncation;
  for (const rs_text_info &info : encoded.infos) truncation.add(info);
  std::string cut = truncation.summary(how.max_tokens, model_info(model.get()).position_limit);
  if (!cut.empty()) say(cut);
  return 0;
}

}  // namespace

void add_similarity(CLI::App *app, command_line *line) {
  auto options = std::make_shared<similarity_options>();
  CLI::App *sub =
      add_command(app, "similarity", "cosine of two texts, or a table of many", examples, options, run_similarity, line);
  add_model_option(sub, &options->model, false);
  add_text_options(sub, &options->texts, line, "the texts to compare, a line each,");
  sub->add_flag("--table", options->table, "a table even for two texts");
  sub->add_option("--format", options->format, "text or json (default: text)")
      ->type_name("NAME")
      ->check(CLI::IsMember({"text", "json"}));
  add_threads_option(sub, &options->threads);
  add_encode_options(sub, &options->encode, false);
  add_no_check_option(sub, &options->no_check);
}
