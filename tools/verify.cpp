// rs verify: that a weight file is as it was written, and that it still gives the vectors it gave when it was made.
#include "golden.h"
#include "json.h"
#include "options.h"
#include "output.h"

namespace {

const char *const examples =
    "Example:\n"
    "  rs verify minilm.rsw\n"
    "Checks every checksum, every weight, and the cosine of the vectors of the sentences, or pictures, that the file brings along\n"
    "with those of the unquantized model.  Exit status 1 when anything is wrong.";

constexpr double tolerance = 0.001;  // other CPUs sum floats in another order; a damaged model is off by far more

struct verify_options {
  std::string model;
  bool json = false;
};

// Vectors of one kind of input: sentences, or pictures.
struct golden_set {
  const char *key, *one, *many;    // in JSON; in text
  std::vector<std::string> names;  // of each input
  std::vector<float> cosines;      // of this file's weights when it was made
  golden_cosines now;

  // The first input whose vector is not what it was; how many there are when all are.
  size_t first_bad() const {
    size_t i = 0;
    while (i < names.size() && double(now.each[i]) >= double(cosines[i]) - tolerance) ++i;  // false for NaN
    return i;
  }
  bool ok() const { return first_bad() == names.size(); }
};

std::vector<float> floats_of(const rs_model *model, const std::string &key, size_t expected) {
  rs_meta meta;
  if (!find_meta(model, key.c_str(), &meta)) fail(key, " is missing");
  if (meta.kind != RS_META_F32S) fail(key, " is not a list of floats");
  if (meta.count != expected) fail(key, " has ", meta.count, " values, expected ", expected);
  return {meta.f32s, meta.f32s + meta.count};
}

// got: the vectors that the file gives now; prefix: of the keys of those that it brings along.
void compare(const rs_model *model, const std::string &prefix, const std::vector<float> &got, golden_set *set) {
  const size_t n = set->names.size();
  set->cosines = floats_of(model, prefix + "cosine", n);
  set->now = compare_golden(floats_of(model, prefix + "embeddings", n * size_t(model_info(model).dim)), got, n);
}

golden_set sentences_of(const rs_model *model) {
  golden_set set{"golden", "golden sentence", "golden sentences", {}, {}, {}};
  rs_meta texts;
  if (!find_meta(model, "golden.texts", &texts)) return set;
  if (texts.kind != RS_META_STRS) fail("golden.texts is not a list of strings");
  set.names = strings_of(texts);
  if (set.names.empty()) return set;
  compare(model, "golden.", golden_embeddings(model, set.names), &set);
  return set;
}

golden_set pictures_of(const rs_model *model) {
  golden_set set{"golden_images", "golden picture", "golden pictures", {}, {}, {}};
  rs_meta cosines;
  if (!find_meta(model, "golden.image_cosine", &cosines)) return set;
  if (cosines.count == 0 || cosines.count > most_golden_pictures)
    fail("golden.image_cosine has ", cosines.count, " values, expected 1 to ", most_golden_pictures);
  for (size_t i = 0; i < cosines.count; ++i) set.names.push_back(join("picture ", i + 1));
  compare(model, "golden.image_", golden_image_embeddings(model, cosines.count), &set);
  return set;
}

std::string as_text(const golden_set &set) {
  if (set.names.empty()) return "";
  std::string out = join(set.many, ", cosine with the f32 vectors:\n  stored     now\n");
  for (size_t i = 0; i < set.names.size(); ++i)
    out +=
        format("  %8.6f  %8.6f  ", double(set.cosines[i]), double(set.now.each[i])) + in_quotes(one_line(set.names[i], 60)) + "\n";
  return out + format("mean %.6f, lowest %.6f\n", set.now.mean, set.now.lowest);
}

int run_verify(const verify_options &options) {
  model_ptr model = load_model(options.model, false);
  check(rs_model_verify(model.get()));
  const golden_set sets[] = {sentences_of(model.get()), pictures_of(model.get())};
  const rs_model_info info = model_info(model.get());
  const size_t tensors = rs_model_tensor_count(model.get());
  nlohmann::ordered_json root = {{"ok", sets[0].ok() && sets[1].ok()}, {"file_bytes", info.file_bytes}, {"tensors", tensors}};
  std::string text = join("file: OK, ", info.file_bytes, " bytes, ", tensors, " tensors, all checksums and ranges\n"), vectors;
  root["golden"] = {{"texts", sets[0].names.size()}};
  for (const golden_set &set : sets) {
    vectors += as_text(set);
    if (!set.names.empty())
      root[set.key].update(
          {{"cosine_mean", set.now.mean}, {"cosine_min", set.now.lowest}, {"cosine", set.now.each}, {"stored", set.cosines}});
  }
  if (vectors.empty()) vectors = "golden sentences: none in this file\n";
  print(options.json ? root.dump(1) + "\n" : text + vectors);
  for (const golden_set &set : sets)
    if (const size_t bad = set.first_bad(); !set.ok())
      fail(in_quotes(options.model), ": ", set.one, " ", bad + 1, " has cosine ", set.now.each[bad], ", it had ", set.cosines[bad],
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
