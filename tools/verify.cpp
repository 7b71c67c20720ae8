// rs verify: that a weight file is as it was written, and that it still gives the vectors it gave when it was made.
#include "golden.h"
#include "json.h"
#include "options.h"
#include "output.h"

namespace {

const char *const examples =
    "Example:\n"
    "  rs verify minilm.rsw\n"
    "Checks every checksum, every weight, and the cosine of the vectors of the sentences that the file brings along with those of\n"
    "the unquantized model.  Exit status 1 when anything is wrong.";

constexpr double tolerance = 0.001;  // other CPUs sum floats in another order; a damaged model is off by far more

struct verify_options {
  std::string model;
  bool json = false;
};

struct golden {
  std::vector<std::string> texts;
  std::vector<float> embeddings;  // of the f32 weights, [texts, dim]
  std::vector<float> cosines;     // of this file's weights when it was made, [texts]
};

std::vector<float> floats_of(const rs_model *model, const char *key, size_t expected) {
  rs_meta meta;
  if (!find_meta(model, key, &meta)) fail(key, " is missing");
  if (meta.kind != RS_META_F32S) fail(key, " is not a list of floats");
  if (meta.count != expected) fail(key, " has ", meta.count, " values, expected ", expected);
  return {meta.f32s, meta.f32s + meta.count};
}

golden read_golden(const rs_model *model) {
  golden result;
  rs_meta texts;
  if (!find_meta(model, "golden.texts", &texts)) return result;
  if (texts.kind != RS_META_STRS) fail("golden.texts is not a list of strings");
  result.texts = strings_of(texts);
  result.embeddings = floats_of(model, "golden.embeddings", result.texts.size() * size_t(model_info(model).dim));
  result.cosines = floats_of(model, "golden.cosine", result.texts.size());
  return result;
}

// The first text whose vector is not what it was; the number of texts when all are.
size_t first_bad(const golden &stored, const golden_cosines &now) {
  size_t i = 0;
  while (i < stored.texts.size() && double(now.each[i]) >= double(stored.cosines[i]) - tolerance) ++i;  // false for NaN
  return i;
}

std::string as_text(const rs_model *model, const golden &stored, const golden_cosines &now) {
  rs_model_info info = model_info(model);
  std::string out =
      join("file: OK, ", info.file_bytes, " bytes, ", rs_model_tensor_count(model), " tensors, all checksums and ranges\n");
  if (stored.texts.empty()) return out + "golden sentences: none in this file\n";
  out += "golden sentences, cosine with the f32 vectors:\n  stored     now\n";
  for (size_t i = 0; i < stored.texts.size(); ++i)
    out += format("  %8.6f  %8.6f  ", double(stored.cosines[i]), double(now.each[i])) + in_quotes(one_line(stored.texts[i], 60)) +
           "\n";
  return out + format("mean %.6f, lowest %.6f\n", now.mean, now.lowest);
}

std::string as_json(const rs_model *model, const golden &stored, const golden_cosines &now, bool ok) {
  nlohmann::ordered_json root = {{"ok", ok},
                                 {"file_bytes", model_info(model).file_bytes},
                                 {"tensors", rs_model_tensor_count(model)},
                                 {"golden", {{"texts", stored.texts.size()}}}};
  if (!stored.texts.empty())
    root["golden"].update(
        {{"cosine_mean", now.mean}, {"cosine_min", now.lowest}, {"cosine", now.each}, {"stored", stored.cosines}});
  return root.dump(1) + "\n";
}

int run_verify(const verify_options &options) {
  model_ptr model = load_model(options.model, false);
  check(rs_model_verify(model.get()));
  golden stored = read_golden(model.get());
  golden_cosines now;
  if (!stored.texts.empty())
    now = compare_golden(stored.embeddings, golden_embeddings(model.get(), stored.texts), stored.texts.size());
  size_t bad = first_bad(stored, now);
  bool ok = bad == stored.texts.size();
  print(options.json ? as_json(model.get(), stored, now, ok) : as_text(model.get(), stored, now));
  if (!ok)
    fail(in_quotes(options.model), ": golden sentence ", bad + 1, " has cosine ", now.each[bad], ", it had ", stored.cosines[bad],
         " when the file was made");
  if (!options.json) print("OK\n");
  return 0;
}

}  // namespace

void add_verify(CLI::App *app, command_line *line) {
  auto options = std::make_shared<verify_options>();
  CLI::App *sub = add_command(app, "verify", "check a weight file", examples, options, run_verify, line);
  add_model_option(sub, &options->model, true);
  sub->add_flag("--json", options->json, "the result as JSON");
}
