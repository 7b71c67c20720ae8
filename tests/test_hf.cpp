// The reader of Hugging Face folders: what it makes of good ones, and that bad ones end in one clear error.
#include "../tools/hf.h"
#include "../tools/safetensors.h"
#include "tiny_model.h"

namespace {

// A folder with the tiny model, of which a test replaces what it is about.
class folder {
 public:
  folder() { tiny_model().write(path()); }
  std::string path() const { return dir_.path(); }
  void put(const std::string &name, const std::string &content) const { write_file(dir_ / name, content); }
  void put(const std::string &name, const json &content) const { put(name, content.dump()); }
  void remove(const std::string &name) const { std::filesystem::remove_all(dir_ / name); }
  hf_folder read() const { return read_hf_folder(path()); }

  // The error that reading ends in; "" when there is none.
  std::string error() const {
    try {
      read();
      return "";
    } catch (const failure &e) {
      return e.what();
    }
  }

 private:
  temp_dir dir_;
};

void expect_error(const folder &f, const std::string &part) {
  const std::string error = f.error();
  EXPECT_NE(error.find(part), std::string::npos) << "got: " << error << "\nwanted: " << part;
  EXPECT_EQ(error.find('\n'), std::string::npos) << error;
}

json with(json object, const std::string &pointer, const json &value) {
  object[json::json_pointer(pointer)] = value;
  return object;
}

json without(json object, const std::string &key) {
  object.erase(key);
  return object;
}

const rs_source_value *find_value(const hf_folder &f, const std::string &key) {
  for (const rs_source_value &value : f.config)
    if (key == value.key) return &value;
  return nullptr;
}

const rs_source_tensor *find_tensor(const hf_folder &f, const std::string &name) {
  for (const rs_source_tensor &tensor : f.tensors)
    if (name == tensor.name) return &tensor;
  return nullptr;
}

// ------------------------------------------------------------------------------------------------ whole folders

TEST(HfFolder, ReadsEverything) {
  folder f;
  const hf_folder got = f.read();
  EXPECT_EQ(got.pooling, "mean");
  EXPECT_TRUE(got.normalize);
  EXPECT_EQ(got.max_tokens, 32);
  EXPECT_EQ(got.position_limit, 64);
  EXPECT_EQ(got.license, "apache-2.0");
  EXPECT_EQ(got.name, std::filesystem::path(f.path()).filename().string());
  EXPECT_TRUE(got.notes.empty());
  EXPECT_EQ(got.prompts.size(), 2u);
  EXPECT_EQ(got.files.count(f.path() + "/model.safetensors"), 1u);

  tiny_model model;
  ASSERT_EQ(got.tensors.size(), model.weights().size());
  const rs_source_tensor *word = find_tensor(got, "embeddings.word_embeddings.weight");
  ASSERT_NE(word, nullptr);
  EXPECT_EQ(word->type, RS_F32);
  EXPECT_STREQ(word->type_name, "F32");
  ASSERT_EQ(word->rank, 2);
  const tiny_tensor &expected = model.weights()[word->name];
  EXPECT_EQ(word->shape[0], expected.shape[0]);
  EXPECT_EQ(std::memcmp(word->data, expected.values.data(), expected.values.size() * sizeof(float)), 0);
}

TEST(HfFolder, FlattensConfig) {
  folder f;
  f.put("config.json",
        with(with(with(tiny_model().config(), "/id2label", {{"0", "no"}, {"1", "yes"}}), "/nothing", nullptr), "/flag", false));
  const hf_folder got = f.read();
  const rs_source_value *label = find_value(got, "id2label.1");
  ASSERT_NE(label, nullptr);
  EXPECT_EQ(label->kind, RS_META_STR);
  EXPECT_STREQ(label->str, "yes");
  ASSERT_NE(find_value(got, "architectures.0"), nullptr);
  EXPECT_EQ(find_value(got, "nothing"), nullptr);
  EXPECT_EQ(find_value(got, "flag")->kind, RS_META_BOOL);
  EXPECT_EQ(find_value(got, "hidden_size")->kind, RS_META_I64);
  EXPECT_EQ(find_value(got, "hidden_size")->f64, 32);
  EXPECT_EQ(find_value(got, "layer_norm_eps")->kind, RS_META_F64);
}

TEST(HfFolder, NamesWhatIsNotThere) {
  temp_dir dir;
  const auto error = [](const std::string &path) -> std::string {
    try {
      read_hf_folder(path);
    } catch (const failure &e) {
      return e.what();
    }
    return "";
  };
  EXPECT_NE(error(dir / "absent").find("absent"), std::string::npos);
  write_file(dir / "file", "x");
  EXPECT_NE(error(dir / "file").find("is not a folder"), std::string::npos);
  EXPECT_NE(error(dir.path()).find("has no config.json"), std::string::npos);

  folder f;
  f.remove("model.safetensors");
  expect_error(f, "has no model.safetensors");
  f.put("pytorch_model.bin", std::string("x"));
  expect_error(f, "has pytorch_model.bin only; rs reads safetensors");
  f.put("model.safetensors", std::string());
  f.remove("tokenizer.json");
  expect_error(f, "too few");
  f.put("model.safetensors", tiny_model().safetensors());
  expect_error(f, "neither tokenizer.json nor vocab.txt");
}

TEST(HfFolder, NamesBrokenJson) {
  for (const char *name : {"config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "modules.json",
                           "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json"}) {
    folder f;
    f.put(name, std::string("{\"a\": "));
    expect_error(f, std::string(name) + ": not valid JSON");
    f.put(name, std::string(1000, '['));
    expect_error(f, std::string(name) + ": nested deeper");
    f.put(name, std::string("5"));
    expect_error(f, std::string(name) + ": not a");
    f.put(name, std::string("\"\xff\""));
    expect_error(f, std::string(name) + ": not valid JSON");
  }
}

TEST(HfFolder, SourceIsARepositoryOrNothing) {
  folder f;
  const auto source = [&f](const std::string &origin) {
    f.put("config.json", with(tiny_model().config(), "/_name_or_path", origin));
    return f.read().source;
  };
  EXPECT_EQ(source("nreimers/MiniLM-L6-H384-uncased"), "nreimers/MiniLM-L6-H384-uncased");
  for (const char *path :
       {"/home/somebody/model", "./model/x", "../model", "out/checkpoint-500", "C:\\models\\x", "a/b/c", "/model", "model/", ""})
    EXPECT_EQ(source(path), "") << path;
}

TEST(HfFolder, NameOfASnapshotIsThatOfTheRepository) {
  temp_dir dir;
  const std::string path = dir / "models--org--some-model/snapshots/0123456789abcdef";
  tiny_model().write(path);
  EXPECT_EQ(read_hf_folder(path).name, "some-model");
  EXPECT_EQ(read_hf_folder(path + "/").name, "some-model");
}

TEST(HfFolder, LicenseOfFrontMatter) {
  const std::pair<const char *, const char *> cases[] = {{"---\nlicense: mit\n---\n", "mit"},
                                                         {"---\r\nlicense: \"cc-by-4.0\"\r\n---\r\n", "cc-by-4.0"},
                                                         {"---\nlicense: [mit]\n---\n", "mit"},
                                                         {"---\nlicense:\n- apache-2.0\n---\n", "apache-2.0"},
                                                         {"---\nlanguage: en\n---\nlicense: mit\n", ""},
                                                         {"license: mit\n", ""},
                                                         {"---\nlicense:", ""},
                                                         {"", ""}};
  for (const auto &[readme, license] : cases) {
    folder f;
    f.put("README.md", std::string(readme));
    EXPECT_EQ(f.read().license, license) << readme;
  }
}

// ------------------------------------------------------------------------------------------------ safetensors

std::string one_tensor(const json &entry, size_t data_bytes) {
  return safetensors_file_bytes(json{{"a", entry}}.dump(), std::string(data_bytes, '\0'));
}

json entry(const json &dtype, const json &shape, const json &offsets) {
  return {{"dtype", dtype}, {"shape", shape}, {"data_offsets", offsets}};
}

std::string with_length(uint64_t length, const std::string &rest) {
  return std::string(reinterpret_cast<const char *>(&length), sizeof length) + rest;
}

TEST(HfSafetensors, RefusesHostileFiles) {
  struct {
    std::string bytes, error;
  } cases[] = {
      {"", "too few"},
      {"1234567", "too few"},
      {with_length(100, "{}"), "a header of 100 bytes, but the file has 10"},
      {with_length(UINT64_MAX, "{}"), "a header of 18446744073709551615 bytes"},
      {with_length(100'000'001, "{}"), "at most 100000000"},
      {safetensors_file_bytes("", ""), "not valid JSON"},
      {safetensors_file_bytes("{\"a\":", ""), "not valid JSON"},
      {safetensors_file_bytes("[]", ""), "not a JSON object"},
      {safetensors_file_bytes(std::string(100'000, '['), ""), "nested deeper"},
      {safetensors_file_bytes("{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\"}}", ""), "'dtype' appears twice"},
      {safetensors_file_bytes("{\"a\":{},\"a\":{}}", ""), "'a' appears twice"},
      {safetensors_file_bytes("{\"a\":5}", ""), "tensor 'a' is not described by an object"},
      {one_tensor(without(entry("F32", {1}, {0, 4}), "dtype"), 4), "tensor 'a' has no dtype"},
      {one_tensor(without(entry("F32", {1}, {0, 4}), "shape"), 4), "tensor 'a' has no shape"},
      {one_tensor(without(entry("F32", {1}, {0, 4}), "data_offsets"), 4), "tensor 'a' has no data_offsets"},
      {one_tensor(entry(5, {1}, {0, 4}), 4), "dtype that is not a string"},
      {one_tensor(entry("F31", {1}, {0, 4}), 4), "unknown dtype 'F31'"},
      {one_tensor(entry("F32", 1, {0, 4}), 4), "shape that is not an array"},
      {one_tensor(entry("F32", {-1}, {0, 4}), 4), "shape that is not of whole numbers"},
      {one_tensor(entry("F32", {1.5}, {0, 4}), 4), "shape that is not of whole numbers"},
      {one_tensor(entry("F32", {uint64_t(1) << 63}, {0, 4}), 4), "shape that is not of whole numbers"},
      {one_tensor(entry("F32", {int64_t(1) << 62, 4}, {0, 4}), 4), "overflows"},
      {one_tensor(entry("F32", {int64_t(1) << 31, int64_t(1) << 31}, {0, 0}), 0), "overflows"},
      {one_tensor(entry("F32", std::vector<int>(33, 1), {0, 4}), 4), "33 dimensions"},
      {one_tensor(entry("F32", {1, 1, 1, 1, 1}, {0, 4}), 4), "5 dimensions, at most 4"},
      {one_tensor(entry("F32", {1}, {0, 8}), 8), "data_offsets span 8 bytes, F32 of shape [1] takes 4"},
      {one_tensor(entry("F32", {1}, {0, 8}), 4), "data_offsets [0, 8], but the file has 4"},
      {one_tensor(entry("F32", {1}, {4, 0}), 4), "data_offsets [4, 0]"},
      {one_tensor(entry("F32", {1}, {0}), 4), "not two whole numbers"},
      {one_tensor(entry("F32", {1}, {-4, 0}), 4), "not two whole numbers"},
      {one_tensor(entry("F32", {1}, {0.0, 4.0}), 4), "not two whole numbers"},
      {one_tensor(entry("F32", {1}, {4, 8}), 8), "4 bytes before tensor 'a' belong to none"},
      {one_tensor(entry("F32", {1}, {0, 4}), 9), "5 bytes at the end belong to no tensor"},
      {one_tensor(entry("F64", {1}, {0, 8}), 8), "tensor 'a' is F64; rs converts F32, F16 and BF16"},
      {one_tensor(entry("BOOL", {1}, {0, 1}), 1), "tensor 'a' is BOOL"},
      {one_tensor(entry("F8_E4M3", {1}, {0, 1}), 1), "tensor 'a' is F8_E4M3"},
      {safetensors_file_bytes(json{{"a", entry("F32", {2}, {0, 8})}, {"b", entry("F32", {2}, {4, 12})}}.dump(),
                              std::string(12, '\0')),
       "tensor 'b' overlaps"},
      {safetensors_file_bytes(json{{"a", entry("F32", {2}, {0, 8})}, {"b", entry("F32", {2}, {0, 8})}}.dump(),
                              std::string(8, '\0')),
       "overlaps"},
      {one_tensor(entry("F32\n\x1b[31m", {1}, {0, 4}), 4), "unknown dtype 'F32\\n\\x1b[31m'"},
  };
  for (const auto &c : cases) {
    folder f;
    f.put("model.safetensors", c.bytes);
    expect_error(f, c.error);
    expect_error(f, "model.safetensors");
  }
}

TEST(HfSafetensors, ReadsEveryUsableType) {
  std::string data;
  json header;
  size_t size = 8;
  for (const char *dtype : {"I64", "U64", "F32", "I32", "U32", "F16", "BF16", "I16", "U16", "I8", "U8"}) {
    size = std::string(dtype).find("64") != std::string::npos   ? 8
           : std::string(dtype).find("32") != std::string::npos ? 4
           : std::string(dtype).find('8') != std::string::npos  ? 1
                                                                : 2;
    header[dtype] = entry(dtype, {3}, {data.size(), data.size() + 3 * size});
    data.append(3 * size, '\1');
  }
  header["scalar"] = entry("F32", json::array(), {data.size(), data.size() + 4});
  data.append(4, '\0');
  header["empty"] = entry("F32", {0, 7}, {data.size(), data.size()});
  folder f;
  f.put("model.safetensors", safetensors_file_bytes(header.dump() + "   ", data));
  const hf_folder got = f.read();
  ASSERT_EQ(got.tensors.size(), header.size());
  EXPECT_EQ(find_tensor(got, "F16")->type, RS_F16);
  EXPECT_EQ(find_tensor(got, "BF16")->type, RS_BF16);
  EXPECT_EQ(find_tensor(got, "I64")->type, RS_I32);
  EXPECT_STREQ(find_tensor(got, "U8")->type_name, "U8");
  EXPECT_EQ(find_tensor(got, "scalar")->rank, 0);
  EXPECT_EQ(find_tensor(got, "empty")->shape[1], 7);
}

// The model cut in two, and its index.
json write_shards(const folder &f) {
  std::map<std::string, tiny_tensor> parts[2];
  json map;
  tiny_model model;
  for (const auto &[name, tensor] : model.weights()) {
    const size_t part = map.size() % 2;
    parts[part][name] = tensor;
    map[name] = part ? "model-2.safetensors" : "model-1.safetensors";
  }
  f.put("model-1.safetensors", tiny_model::safetensors(parts[0]));
  f.put("model-2.safetensors", tiny_model::safetensors(parts[1]));
  f.remove("model.safetensors");
  json index = {{"metadata", {{"total_size", 1}}}, {"weight_map", map}};
  f.put("model.safetensors.index.json", index);
  return index;
}

TEST(HfSafetensors, ReadsShards) {
  folder f;
  write_shards(f);
  EXPECT_EQ(f.read().tensors.size(), tiny_model().weights().size());
}

TEST(HfSafetensors, RefusesBadIndex) {
  folder f;
  const json index = write_shards(f);
  const std::string name = "model.safetensors.index.json";
  const auto with_file = [&](const json &file) { return with(index, "/weight_map/embeddings.LayerNorm.bias", file); };
  f.put(name, with_file("model-3.safetensors"));
  expect_error(f, "lists 'model-3.safetensors', which is not there");
  for (const char *escape : {"../model-1.safetensors", "/etc/passwd", "sub/model-1.safetensors", "..", "", ".hidden", "a\\b"}) {
    f.put(name, with_file(escape));
    expect_error(f, "is not the name of a file in the folder");
  }
  f.put(name, with_file(std::string("model-1.safetensors\0", 20)));
  expect_error(f, "is not the name of a file in the folder");
  f.put(name, with_file(5));
  expect_error(f, "is not a string");
  f.put(name, json{{"weight_map", json::object()}});
  expect_error(f, "weight_map is empty");
  f.put(name, json::object());
  expect_error(f, "weight_map");
  f.put(name, with(index, "/weight_map/absent", "model-1.safetensors"));
  expect_error(f, "tensor 'absent' should be in 'model-1.safetensors', but is not");
  f.put(name, index);
  f.put("model-2.safetensors", tiny_model().safetensors());
  expect_error(f, "is in two files");
}

// ------------------------------------------------------------------------------------------------ modules, pooling

TEST(HfPooling, WithoutModulesItIsTheMean) {
  folder f;
  f.remove("modules.json");
  const hf_folder got = f.read();
  EXPECT_EQ(got.pooling, "mean");
  EXPECT_FALSE(got.normalize);
  ASSERT_EQ(got.notes.size(), 1u);
  EXPECT_NE(got.notes[0].find("modules.json"), std::string::npos);
}

// A classifier has no vectors to speak of: neither modules nor a word on pooling are missed.
TEST(HfPooling, HeadsNeedNone) {
  folder f;
  json config = tiny_model().config();
  config["architectures"] = {"BertForSequenceClassification"};
  f.put("config.json", config);
  f.put("modules.json", json::array({tiny_model::modules()[0]}));
  EXPECT_TRUE(f.read().notes.empty());
  f.remove("modules.json");
  EXPECT_TRUE(f.read().notes.empty());
}

TEST(HfPooling, ActivationOfACrossEncoder) {
  const auto activation = [](const hf_folder &got) -> std::string {
    std::string found;
    for (const rs_source_value &value : got.config)
      if (value.key == std::string("sentence_transformers.activation_fn")) found += value.str;
    return found;
  };
  folder f;
  EXPECT_EQ(activation(f.read()), "");
  f.put("config_sentence_transformers.json", json{{"activation_fn", "torch.nn.modules.linear.Identity"}});
  EXPECT_EQ(activation(f.read()), "torch.nn.modules.linear.Identity");
  json config = tiny_model().config();
  config["sentence_transformers"] = {{"activation_fn", "Sigmoid"}};
  f.put("config.json", config);
  EXPECT_EQ(activation(f.read()), "Sigmoid");  // config.json counts
  f.put("config_sentence_transformers.json", json{{"activation_fn", 5}});
  expect_error(f, "'activation_fn' is number, expected a string");
}

TEST(HfPooling, KnowsEveryMode) {
  const std::pair<json, const char *> cases[] = {{{{"pooling_mode_cls_token", true}}, "cls"},
                                                 {{{"pooling_mode_max_tokens", true}}, "max"},
                                                 {{{"pooling_mode_mean_sqrt_len_tokens", true}}, "mean_sqrt_len"},
                                                 {{{"pooling_mode_weightedmean_tokens", true}}, "weighted_mean"},
                                                 {{{"pooling_mode_lasttoken", true}}, "last"},
                                                 {{{"pooling_mode_mean_tokens", false}}, "mean"},
                                                 {{{"pooling_mode", "cls"}}, "cls"},
                                                 {{{"pooling_mode", {"lasttoken"}}}, "last"},
                                                 {{{"pooling_mode", "mean"}, {"include_prompt", true}}, "mean"}};
  for (const auto &[config, pooling] : cases) {
    folder f;
    f.put("1_Pooling/config.json", config);
    EXPECT_EQ(f.read().pooling, pooling) << config;
  }
}

TEST(HfPooling, RefusesWhatItCannotDo) {
  const std::pair<json, const char *> cases[] = {
      {{{"pooling_mode_cls_token", true}, {"pooling_mode_mean_tokens", true}}, "both cls and mean pooling are on"},
      {{{"pooling_mode", {"cls", "mean"}}}, "pooling_mode has 2 modes"},
      {{{"pooling_mode", "sum"}}, "unknown pooling_mode 'sum'"},
      {{{"pooling_mode", 5}}, "pooling_mode is not a string"},
      {{{"pooling_mode_cls_token", "yes"}}, "expected true or false"},
      {{{"include_prompt", false}}, "include_prompt is false"}};
  for (const auto &[config, error] : cases) {
    folder f;
    f.put("1_Pooling/config.json", config);
    expect_error(f, error);
    expect_error(f, "1_Pooling/config.json");
  }
  folder f;
  f.remove("1_Pooling/config.json");
  expect_error(f, "has no 1_Pooling/config.json");
}

TEST(HfModules, RefusesWhatItDoesNotKnow) {
  const json good = tiny_model::modules();
  const auto module = [](const char *type, const char *path) { return json{{"type", type}, {"path", path}}; };
  const json t = module("sentence_transformers.models.Transformer", ""),
             p = module("sentence_transformers.models.Pooling", "1_Pooling"),
             n = module("sentence_transformers.models.Normalize", "2_Normalize"),
             d = module("sentence_transformers.models.Dense", "2_Dense");
  const std::pair<json, const char *> cases[] = {
      {{t, p, d}, "module 2 is 'sentence_transformers.models.Dense'; rs knows Transformer, then Pooling, then Normalize"},
      {{t, n, p}, "module 1 is"},
      {{p, t}, "module 0 is"},
      {{t, p, p}, "module 2 is"},
      {json::array({t}), "no Pooling"},
      {json::array(), "not a list"},
      {json::object(), "not a list"},
      {{5}, "not a JSON object"},
      {{t, module("x.Pooling", "../1_Pooling")}, "path '../1_Pooling' leaves the folder"},
      {{t, module("x.Pooling", "/etc")}, "path '/etc' leaves the folder"},
      {{t, module("x.Pooling", "1_Pooling/../../x")}, "leaves the folder"}};
  for (const auto &[modules, error] : cases) {
    folder f;
    f.put("modules.json", modules);
    expect_error(f, error);
  }
}

TEST(HfModules, TransformerInAFolderOfItsOwn) {
  folder f;
  tiny_model().write(f.path() + "/0_Transformer");
  for (const char *name :
       {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "sentence_bert_config.json"})
    f.remove(name);
  json modules = tiny_model::modules();
  modules[0]["path"] = "0_Transformer";
  f.put("modules.json", modules);
  EXPECT_EQ(f.read().max_tokens, 32);
}

// ------------------------------------------------------------------------------------------------ limits, prompts

TEST(HfLimits, MaxTokens) {
  struct {
    json sentence, tokenizer;
    int64_t expected;
  } cases[] = {{{{"max_seq_length", 16}}, {{"model_max_length", 20}}, 16},
               {{{"max_seq_length", nullptr}}, {{"model_max_length", 20}}, 20},
               {json::object(), {{"model_max_length", 20}}, 20},
               {json::object(), {{"model_max_length", 1e30}}, 64},
               {json::object(), {{"model_max_length", 512}}, 64},
               {json::object(), {{"max_len", 20}}, 20},  // as transformers wrote it first
               {json::object(), {{"model_max_length", 30}, {"max_len", 20}}, 30},
               {{{"tokenizer_args", {{"model_max_length", 12}}}}, {{"model_max_length", 20}}, 12},
               {{{"processor_kwargs", {{"model_max_length", 12}}}}, json::object(), 12},
               {{{"max_seq_length", 512}}, json::object(), 64},
               {json::object(), json::object(), 64}};
  for (const auto &c : cases) {
    folder f;
    f.put("sentence_bert_config.json", c.sentence);
    f.put("tokenizer_config.json", c.tokenizer);
    EXPECT_EQ(f.read().max_tokens, c.expected) << c.sentence << c.tokenizer;
  }
  // By other names too, but the first counts.
  folder named;
  named.put("sentence_roberta_config.json", json{{"max_seq_length", 9}});
  std::filesystem::remove(named.path() + "/sentence_bert_config.json");
  EXPECT_EQ(named.read().max_tokens, 9);
  named.put("sentence_bert_config.json", json{{"max_seq_length", 8}});
  EXPECT_EQ(named.read().max_tokens, 8);
  // rs keeps the beginning of long texts, and says so where a model keeps the end.
  EXPECT_TRUE(named.read().notes.empty());
  named.put("tokenizer_config.json", json{{"truncation_side", "left"}});
  ASSERT_EQ(named.read().notes.size(), 1u);
  EXPECT_NE(named.read().notes[0].find("truncation_side"), std::string::npos);
  named.remove("tokenizer_config.json");
  json whole = tiny_model().tokenizer();
  whole["truncation"] = {{"direction", "Left"}, {"max_length", 9}};
  named.put("tokenizer.json", whole);
  ASSERT_EQ(named.read().notes.size(), 1u);
  EXPECT_EQ(named.read().notes[0].find("tokenizer.json: truncation: direction is 'Left'"), 0u) << named.read().notes[0];
  named.put("tokenizer_config.json", json{{"truncation_side", "right"}});
  EXPECT_TRUE(named.read().notes.empty());
  named.put("sentence_bert_config.json", json{{"tokenizer_args", 5}});
  expect_error(named, "'tokenizer_args' is number, expected an object");
  for (const json &bad : {json(0), json(-5), json("many"), json(true)}) {
    folder f;
    f.put("sentence_bert_config.json", json{{"max_seq_length", bad}});
    expect_error(f, "'max_seq_length' is ");
  }
}

TEST(HfPrompts, NamesAndDefault) {
  folder f;
  f.put("config_sentence_transformers.json",
        json{{"prompts", {{"query", "q: "}, {"passage", ""}}}, {"default_prompt_name", "query"}});
  hf_folder got = f.read();
  ASSERT_EQ(got.prompts.size(), 2u);
  EXPECT_EQ(got.default_prompt, "query");
  EXPECT_TRUE(got.notes.empty());
  f.put("config_sentence_transformers.json", json{{"truncate_dim", 16}});
  ASSERT_EQ(f.read().notes.size(), 1u);
  EXPECT_NE(f.read().notes[0].find("truncate_dim is 16"), std::string::npos) << f.read().notes[0];
  f.put("config_sentence_transformers.json", json{{"prompts", {{"query", "q: "}}}, {"default_prompt_name", "other"}});
  expect_error(f, "default_prompt_name 'other' is not among the prompts");
  f.put("config_sentence_transformers.json", json{{"prompts", {{"query", 5}}}});
  expect_error(f, "prompt 'query' is not a string");
  f.put("config_sentence_transformers.json", json{{"prompts", {"query"}}});
  expect_error(f, "'prompts' is array, expected an object");
}

// ------------------------------------------------------------------------------------------------ tokenizer

hf_tokenizer read_tokenizer(const json &tokenizer, const json &config = json(), bool lower_input = false) {
  hf_tokenizer_files files;
  files.tokenizer = tokenizer;
  files.config = config;
  files.lower_input = lower_input;
  return read_hf_tokenizer(files);
}

std::string tokenizer_error(const json &tokenizer) {
  try {
    read_tokenizer(tokenizer);
  } catch (const failure &e) {
    return e.what();
  }
  return "";
}

TEST(HfTokenizer, ReadsTokenizerJson) {
  const tiny_model model;
  const hf_tokenizer t = read_tokenizer(model.tokenizer());
  EXPECT_EQ(t.tokens, model.tokens());
  EXPECT_EQ(t.unk, "[UNK]");
  EXPECT_EQ(t.prefix, "##");
  EXPECT_EQ(t.max_word_chars, 100);
  EXPECT_TRUE(t.clean_text && t.chinese_chars && t.strip_accents && t.lowercase);
  EXPECT_EQ(t.added_ids, (std::vector<int64_t>{0, 1, 2, 3, 4}));
  EXPECT_EQ(t.added_flags, (std::vector<int64_t>{16, 16, 16, 16, 16}));
  EXPECT_EQ(t.special_ids, (std::map<std::string, int64_t>{{"pad", 0}, {"cls", 2}, {"sep", 3}, {"mask", 4}}));
  EXPECT_EQ(t.single, (std::vector<int64_t>{2, -1, 3}));
  EXPECT_EQ(t.single_types, (std::vector<int64_t>{0, 0, 0}));
  EXPECT_EQ(t.pair, (std::vector<int64_t>{2, -1, 3, -2, 3}));
  EXPECT_EQ(t.pair_types, (std::vector<int64_t>{0, 0, 0, 1, 1}));
}

TEST(HfTokenizer, AddedTokensHaveFlagsAndMayLeaveHoles) {
  json file = tiny_model().tokenizer();
  const size_t n = tiny_model().tokens().size();
  file["added_tokens"].push_back({{"id", n + 2},
                                  {"content", "<x>"},
                                  {"single_word", true},
                                  {"lstrip", true},
                                  {"rstrip", true},
                                  {"normalized", true},
                                  {"special", false}});
  const hf_tokenizer t = read_tokenizer(file);
  ASSERT_EQ(t.tokens.size(), n + 3);
  EXPECT_EQ(t.tokens[n], "");
  EXPECT_EQ(t.tokens[n + 2], "<x>");
  EXPECT_EQ(t.added_flags.back(), 1 | 2 | 4 | 8 | 32) << "32: the vocabulary of the model does not have it";
}

TEST(HfTokenizer, NormalizerIsResolved) {
  struct {
    json strip, lower;
    bool expected_strip, expected_lower;
  } cases[] = {{nullptr, true, true, true}, {nullptr, false, false, false}, {true, false, true, false}, {false, true, false, true}};
  for (const auto &c : cases) {
    const json file = with(with(tiny_model().tokenizer(), "/normalizer/strip_accents", c.strip), "/normalizer/lowercase", c.lower);
    const hf_tokenizer t = read_tokenizer(file);
    EXPECT_EQ(t.strip_accents, c.expected_strip) << file["normalizer"];
    EXPECT_EQ(t.lowercase, c.expected_lower) << file["normalizer"];
  }
  const hf_tokenizer none = read_tokenizer(with(tiny_model().tokenizer(), "/normalizer", nullptr));
  EXPECT_FALSE(none.clean_text || none.chinese_chars || none.strip_accents || none.lowercase);
  json nested = tiny_model().tokenizer();
  nested["normalizer"] = {{"type", "Sequence"}, {"normalizers", {nested["normalizer"]}}};
  EXPECT_TRUE(read_tokenizer(nested).lowercase);
}

TEST(HfTokenizer, TokenizerConfigOverridesTheNormalizer) {
  const json file = tiny_model().tokenizer();
  const hf_tokenizer cased = read_tokenizer(file, {{"do_lower_case", false}, {"tokenizer_class", "BertTokenizer"}});
  EXPECT_FALSE(cased.lowercase || cased.strip_accents);
  EXPECT_FALSE(read_tokenizer(file, {{"tokenize_chinese_chars", false}}).chinese_chars);
  EXPECT_FALSE(read_tokenizer(file, {{"strip_accents", false}}).strip_accents);
  EXPECT_TRUE(read_tokenizer(with(file, "/normalizer/strip_accents", false), {{"strip_accents", nullptr}}).strip_accents);
  EXPECT_TRUE(read_tokenizer(file, {{"do_lower_case", false}, {"tokenizer_class", "PreTrainedTokenizerFast"}}).lowercase);
}

// Whatever tokenizer.json says, BertTokenizer of transformers has these where tokenizer_config.json does not name them.
TEST(HfTokenizer, BertTokenizerHasSettingsOfItsOwn) {
  hf_tokenizer_files files;
  files.tokenizer = tiny_model().tokenizer();
  files.tokenizer["normalizer"].update(
      json{{"lowercase", false}, {"strip_accents", true}, {"handle_chinese_chars", false}, {"clean_text", false}});
  const auto settings = [&] {
    const hf_tokenizer t = read_hf_tokenizer(files);
    return std::vector<bool>{t.lowercase, t.strip_accents, t.chinese_chars, t.clean_text};
  };
  const std::vector<bool> of_the_file = {false, true, false, false}, of_the_class = {true, true, true, false};
  EXPECT_EQ(settings(), of_the_file);
  files.model_type = "bert";
  EXPECT_EQ(settings(), of_the_class);
  for (const char *name : {"BertTokenizer", "BertTokenizerFast", "DistilBertTokenizerFast", "ElectraTokenizer"}) {
    files.config = {{"tokenizer_class", name}};
    EXPECT_EQ(settings(), of_the_class) << name;
  }
  files.config["do_lower_case"] = false;
  EXPECT_EQ(settings(), (std::vector<bool>{false, false, true, false})) << "accents go with capitals";
  for (const char *name : {"PreTrainedTokenizerFast", "TokenizersBackend"}) {
    files.config = {{"tokenizer_class", name}};
    EXPECT_EQ(settings(), of_the_file) << name;
  }
}

TEST(HfTokenizer, TokensThatTokenizerJsonDoesNotList) {
  hf_tokenizer_files files;
  files.tokenizer = tiny_model().tokenizer();
  files.tokenizer["added_tokens"] = json::array();
  EXPECT_TRUE(read_hf_tokenizer(files).added_ids.empty());
  const auto id = [&](const char *token) {
    const std::vector<std::string> tokens = tiny_model().tokens();
    return int64_t(std::find(tokens.begin(), tokens.end(), token) - tokens.begin());
  };
  // Of a class of its own, those that it knows; of others, those that are named.
  files.model_type = "bert";
  EXPECT_EQ(read_hf_tokenizer(files).added_ids, (std::vector<int64_t>{0, 2, 3, 4, 1}));
  files.model_type = "";
  files.config = {{"mask_token", {{"content", "[MASK]"}, {"lstrip", true}}},
                  {"additional_special_tokens", {"text", {{"content", "[CLS]"}, {"rstrip", true}}}}};
  files.special_tokens = {{"extra_special_tokens", {{"name", "b"}}}};
  files.added_tokens = {{"a", id("a")}};
  hf_tokenizer t = read_hf_tokenizer(files);
  EXPECT_EQ(t.added_ids, (std::vector<int64_t>{4, id("a"), id("text"), 2, id("b")}));
  EXPECT_EQ(t.added_flags, (std::vector<int64_t>{16 + 2, 8, 16, 16 + 4, 16}));
  EXPECT_TRUE(t.notes.empty());
  files.added_tokens = json();
  files.config = {{"added_tokens_decoder", {{"4", {{"content", "[MASK]"}, {"rstrip", true}}}}}, {"mask_token", "[MASK]"}};
  files.special_tokens = {{"additional_special_tokens", {"xyzzy"}}};
  t = read_hf_tokenizer(files);
  EXPECT_EQ(t.added_ids, (std::vector<int64_t>{4}));
  EXPECT_EQ(t.added_flags, (std::vector<int64_t>{4}));
  ASSERT_EQ(t.notes.size(), 1u);
  EXPECT_NE(t.notes[0].find("additional_special_tokens: token 'xyzzy' is not in the vocabulary"), std::string::npos) << t.notes[0];
  const std::pair<json, const char *> bad[] = {
      {{{"additional_special_tokens", 5}}, "additional_special_tokens is neither an array nor an object"},
      {{{"additional_special_tokens", {5}}}, "additional_special_tokens: neither a string nor an AddedToken"},
      {{{"mask_token", 5}}, "mask_token: neither a string nor an AddedToken"},
      {{{"split_special_tokens", true}}, "split_special_tokens is true, but rs finds special tokens in texts"}};
  for (const auto &[config, error] : bad) {
    files.config = config;
    try {
      read_hf_tokenizer(files);
      ADD_FAILURE() << config;
    } catch (const failure &e) {
      EXPECT_NE(std::string(e.what()).find(error), std::string::npos) << e.what();
    }
  }
}

TEST(HfTokenizer, LowerCasedInputKeepsAccents) {
  const hf_tokenizer t = read_tokenizer(with(tiny_model().tokenizer(), "/normalizer/lowercase", false), json(), true);
  EXPECT_TRUE(t.lowercase);
  EXPECT_FALSE(t.strip_accents);
}

TEST(HfTokenizer, TypesAreZeroWhereTheInputsHaveNone) {
  const json file = tiny_model().tokenizer();
  const std::vector<int64_t> with = read_tokenizer(file, {}).pair_types;
  EXPECT_NE(with, std::vector<int64_t>(with.size()));
  EXPECT_EQ(read_tokenizer(file, {{"model_input_names", {"input_ids", "token_type_ids", "attention_mask"}}}).pair_types, with);
  EXPECT_EQ(read_tokenizer(file, {{"model_input_names", {"input_ids", "attention_mask"}}}).pair_types,
            std::vector<int64_t>(with.size()));
}

TEST(HfTokenizer, Templates) {
  json file = tiny_model().tokenizer();
  file["post_processor"] = {{"type", "BertProcessing"}, {"sep", {"[SEP]", 3}}, {"cls", {"[CLS]", 2}}};
  EXPECT_EQ(read_tokenizer(file).pair, (std::vector<int64_t>{2, -1, 3, -2, 3}));
  EXPECT_EQ(read_tokenizer(file).pair_types, (std::vector<int64_t>{0, 0, 0, 1, 1}));
  file["post_processor"] = nullptr;
  EXPECT_EQ(read_tokenizer(file).single, (std::vector<int64_t>{-1}));
  EXPECT_EQ(read_tokenizer(file).pair, (std::vector<int64_t>{-1, -2}));
  EXPECT_EQ(read_tokenizer(file).pair_types, (std::vector<int64_t>{0, 1}));
  file = tiny_model().tokenizer();  // a special token of two ids
  file["post_processor"]["special_tokens"]["[SEP]"]["ids"] = {3, 4};
  EXPECT_EQ(read_tokenizer(file).single, (std::vector<int64_t>{2, -1, 3, 4}));
}

TEST(HfTokenizer, RefusesWhatItDoesNotKnow) {
  const json good = tiny_model().tokenizer();
  const std::pair<json, const char *> cases[] = {
      {with(good, "/model/type", "Unigram"), "the model is of type 'Unigram', rs knows WordPiece and BPE"},
      {with(good, "/model/vocab", json::array()), "no vocab"},
      {without(good, "model"), "'model' is absent"},
      {with(good, "/model/vocab/text", "x"), "the id of token 'text' is not a whole number"},
      {with(good, "/model/vocab/text", 1.5), "is not a whole number"},
      {with(good, "/model/vocab/text", -1), "token 'text' has the id -1"},
      {with(good, "/model/vocab/text", int64_t(1) << 40), "token 'text' has the id 1099511627776"},
      {with(good, "/model/vocab/text", UINT64_MAX), "token 'text' has the id -1"},
      {with(good, "/model/vocab/text", 2), "id 2 is given to both"},
      {with(good, "/model/unk_token", "<unk>"), "no unknown token '<unk>'"},
      {with(good, "/model/unk_token", 5), "'unk_token' is number, expected a string"},
      {with(good, "/added_tokens/0/id", 500), "token '[PAD]' has the ids 0 and 500"},
      {with(good, "/added_tokens/0/id", 1), "id 1 is given to both '[UNK]' and '[PAD]'"},
      {with(good, "/added_tokens/0/id", nullptr), "has the id -1"},
      {with(good, "/added_tokens/0/content", "other"), "id 0 is given to both '[PAD]' and 'other'"},
      {with(good, "/added_tokens/0/special", "yes"), "expected true or false"},
      {with(good, "/added_tokens", 5), "'added_tokens' is number, expected an array"},
      {with(good, "/normalizer/type", "NFC"), "normalizer is of type 'NFC'"},
      {with(good, "/normalizer", {{"type", "Sequence"}, {"normalizers", {good["normalizer"], {{"type", "NFC"}}}}}),
       "normalizer is of type 'Sequence'"},
      {with(good, "/pre_tokenizer/type", "Whitespace"), "pre_tokenizer is of type 'Whitespace'"},
      {with(good, "/pre_tokenizer", nullptr), "pre_tokenizer is of type 'none'"},
      {with(good, "/post_processor/type", "RobertaProcessing"), "post_processor is of type 'RobertaProcessing'"},
      {with(good, "/post_processor/single/0/SpecialToken/id", "[XXX]"), "'[XXX]' is absent"},
      {with(good, "/post_processor/special_tokens/[CLS]/ids", {100000}), "id 100000 is not in the vocabulary"},
      {with(good, "/post_processor/single/1/Sequence/id", "C"), "sequence 'C' is neither A nor B"},
      {with(good, "/post_processor/single/1/Sequence/id", "B"), "must have the sequence A and no B once"},
      {with(good, "/post_processor/pair/3/Sequence/id", "A"), "must have the sequence A and B once"},
      {with(good, "/post_processor/single/0", json::object()), "expected an object"}};
  for (const auto &[file, error] : cases)
    EXPECT_NE(tokenizer_error(file).find(error), std::string::npos) << tokenizer_error(file) << "\nwanted: " << error;
}

// CLIP's tokenizer with a small vocabulary: tests/make_bpe.py.
json clip_tokenizer() {
  static const json file = parse_json(read_file(source_dir() + "/tests/data/bpe.json"), "bpe.json")["tokenizer"];
  return file;
}

TEST(HfBpe, ReadsTokenizerJson) {
  const hf_tokenizer t = read_tokenizer(clip_tokenizer());
  EXPECT_EQ(t.type, "bpe");
  EXPECT_EQ(t.suffix, "</w>");
  EXPECT_FALSE(t.split_special);
  ASSERT_EQ(t.tokens.size(), 2514u);
  EXPECT_EQ(t.tokens[512], "in");
  ASSERT_EQ(t.merges.size(), 4000u);
  EXPECT_EQ(t.tokens[size_t(t.merges[0])] + t.tokens[size_t(t.merges[1])], "in");
  EXPECT_EQ(t.added_ids, (std::vector<int64_t>{2512, 2513}));
  EXPECT_EQ(t.added_flags, (std::vector<int64_t>{16 + 8, 16}));
  EXPECT_EQ(t.special_ids, (std::map<std::string, int64_t>{{"pad", 2513}, {"bos", 2512}, {"eos", 2513}}));
  EXPECT_EQ(t.single, (std::vector<int64_t>{2512, -1, 2513}));
  EXPECT_EQ(t.pair, (std::vector<int64_t>{2512, -1, 2513, 2513, -2, 2513}));
  EXPECT_EQ(t.pair_types, (std::vector<int64_t>(6, 0)));
  try {
    read_tokenizer(clip_tokenizer(), json(), true);
    ADD_FAILURE() << "texts would not be lower-cased";
  } catch (const failure &e) {
    EXPECT_NE(std::string(e.what()).find("do_lower_case"), std::string::npos) << e.what();
  }
  // Merges as pairs; of equal ones the last counts.
  json file = clip_tokenizer();
  json pairs = json::array({{"t", "h"}});
  for (const json &merge : file["model"]["merges"]) {
    const auto text = merge.get<std::string>();
    pairs.push_back({text.substr(0, text.find(' ')), text.substr(text.find(' ') + 1)});
  }
  file["model"]["merges"] = pairs;
  EXPECT_EQ(read_tokenizer(file).merges, t.merges);
  const std::string words = file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"];
  file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "<\\|startoftext\\|>|<\\|endoftext\\|>|" + words;
  EXPECT_TRUE(read_tokenizer(file).split_special);
}

TEST(HfBpe, RefusesOtherKinds) {
  const json good = clip_tokenizer();
  const std::string split = "/pre_tokenizer/pretokenizers/0", bytes = "/pre_tokenizer/pretokenizers/1";
  const std::pair<json, const char *> cases[] = {
      {with(good, "/model/end_of_word_suffix", nullptr), "BPE without end_of_word_suffix"},
      {with(good, "/model/end_of_word_suffix", ""), "BPE without end_of_word_suffix"},
      {with(good, "/model/continuing_subword_prefix", "##"), "BPE with a continuing_subword_prefix"},
      {with(good, "/model/ignore_merges", true), "BPE with ignore_merges"},
      {with(good, "/model/dropout", 0.1), "BPE with dropout"},
      {with(good, "/model/merges", nullptr), "'merges' is null, expected an array"},
      {with(good, "/model/merges/3", "a"), "merge 3: 'a' is not two tokens"},
      {with(good, "/model/merges/3", "a b c"), "merge 3: 'a b c' is not two tokens"},
      {with(good, "/model/merges/3", {"a"}), "merge 3 is not two tokens"},
      {with(good, "/model/merges/3", {"a", 1}), "merge 3 is not two tokens"},
      {with(good, "/model/merges/3", 5), "merge 3 is not two tokens"},
      {with(good, "/model/merges/3", "a xyzzy"), "merge 3: token 'xyzzy' is not in the vocabulary"},
      {with(good, "/normalizer", nullptr), "the normalizer is none, CLIP's is Sequence of NFC, Replace, Lowercase"},
      {with(good, "/normalizer", {{"type", "NFC"}}), "the normalizer is NFC, CLIP's"},
      {with(good, "/normalizer/normalizers/0/type", "NFD"), "the normalizer is Sequence of NFD, Replace, Lowercase, CLIP's"},
      {with(good, "/normalizer/normalizers/1/content", ""), "Replace makes '' of '\\s+'"},
      {with(good, "/normalizer/normalizers/1/pattern", {{"String", " "}}), "Replace makes ' ' of ''"},
      {with(good, "/pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}}),
       "the pre_tokenizer is ByteLevel, CLIP's"},
      {with(good, "/pre_tokenizer", nullptr), "the pre_tokenizer is none"},
      {with(good, split + "/pattern/Regex", "\\w+"), "the pattern '\\w+' is not CLIP's"},
      {with(good, split + "/pattern", "\\w+"), "the pattern '' is not CLIP's"},
      {with(good, split + "/behavior", "Isolated"), "CLIP's has the behavior Removed, inverted"},
      {with(good, split + "/invert", false), "CLIP's has the behavior Removed, inverted"},
      {with(good, bytes + "/add_prefix_space", true), "adds a space before the text"},
      {with(good, bytes + "/use_regex", false), "without use_regex"},
      {with(good, "/post_processor/type", "ByteLevel"),
       "post_processor is of type 'ByteLevel', rs knows TemplateProcessing and Roberta"},
      {with(good, "/post_processor/cls", {"<|startoftext|>", 2514}), "id 2514 is not in the vocabulary"}};
  for (const auto &[file, error] : cases)
    EXPECT_NE(tokenizer_error(file).find(error), std::string::npos) << tokenizer_error(file) << "\nwanted: " << error;
}

TEST(HfBpe, ReadsOlderFolders) {
  const json file = clip_tokenizer();
  hf_tokenizer_files files;
  files.vocab_json = file["model"]["vocab"];
  files.has_merges = true;
  files.merges = "#version: 0.2\n";
  for (const json &merge : file["model"]["merges"]) files.merges += merge.get<std::string>() + "\r\n";
  const hf_tokenizer wanted = read_tokenizer(file);
  hf_tokenizer t = read_hf_tokenizer(files);
  EXPECT_EQ(t.type, "bpe");
  EXPECT_EQ(t.suffix, "</w>");
  EXPECT_TRUE(t.split_special);
  EXPECT_EQ(t.tokens, wanted.tokens);
  EXPECT_EQ(t.merges, wanted.merges);
  EXPECT_EQ(t.single, wanted.single);
  EXPECT_EQ(t.pair, wanted.pair);
  EXPECT_EQ(t.special_ids, wanted.special_ids);
  EXPECT_EQ(t.added_ids, (std::vector<int64_t>{2513, 2512}));
  EXPECT_EQ(t.added_flags, (std::vector<int64_t>{16, 16}));
  // As OpenAI's folders have it: what the padding token says counts for <|endoftext|>.
  const json added = {{"content", "<|startoftext|>"}, {"normalized", true}, {"lstrip", false}};
  files.config = {{"tokenizer_class", "CLIPTokenizer"},
                  {"bos_token", added},
                  {"eos_token", with(added, "/content", "<|endoftext|>")},
                  {"pad_token", "<|endoftext|>"}};
  t = read_hf_tokenizer(files);
  EXPECT_EQ(t.added_ids, (std::vector<int64_t>{2513, 2512}));
  EXPECT_EQ(t.added_flags, (std::vector<int64_t>{16, 16 + 8}));

  const auto error = [](const hf_tokenizer_files &f) -> std::string {
    try {
      read_hf_tokenizer(f);
    } catch (const failure &e) {
      return e.what();
    }
    return "";
  };
  files.config["tokenizer_class"] = "GPT2Tokenizer";
  EXPECT_NE(error(files).find("'GPT2Tokenizer' and no tokenizer.json; rs reads vocab.json and merges.txt of CLIPTokenizer"),
            std::string::npos);
  files.config = json();
  files.merges = "i n\nq\n";
  EXPECT_NE(error(files).find("merges.txt: merge 1: 'q' is not two tokens"), std::string::npos);
  files.merges = "";
  files.vocab_json = json::array({1});
  EXPECT_NE(error(files).find("vocab.json is not an object"), std::string::npos);
  files.vocab_json = {{"a", "b"}};
  EXPECT_NE(error(files).find("vocab.json: the id of token 'a' is not a whole number"), std::string::npos);
  files.vocab_json = {{"a", 0}};
  EXPECT_NE(error(files).find("vocab.json: token '<|startoftext|>' is not in the vocabulary"), std::string::npos);
  files.vocab_json = json();
  EXPECT_NE(error(files).find("nor vocab.json and merges.txt"), std::string::npos);
}

TEST(HfBpe, IsFoundInAFolder) {
  folder f;
  const json file = clip_tokenizer();
  f.remove("tokenizer.json");
  f.put("tokenizer_config.json", json{{"tokenizer_class", "CLIPTokenizer"}});
  f.put("vocab.json", file["model"]["vocab"]);
  f.put("merges.txt", std::string("#version: 0.2\ni n\n"));
  EXPECT_EQ(f.read().tokenizer.merges, (std::vector<int64_t>{72, 77}));
  f.remove("vocab.json");
  expect_error(f, "nor vocab.json and merges.txt");
}

hf_tokenizer read_vocab(const std::string &vocab, const json &config = json(), const json &special = json(),
                        const json &added = json()) {
  hf_tokenizer_files files;
  files.vocab = vocab;
  files.has_vocab = true;
  files.config = config;
  files.special_tokens = special;
  files.added_tokens = added;
  return read_hf_tokenizer(files);
}

const char *const small_vocab = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb";

TEST(HfVocab, ReadsOlderFolders) {
  hf_tokenizer t = read_vocab(small_vocab);
  EXPECT_EQ(t.tokens, (std::vector<std::string>{"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"}));
  EXPECT_TRUE(t.clean_text && t.chinese_chars && t.strip_accents && t.lowercase);
  EXPECT_EQ(t.pair, (std::vector<int64_t>{2, -1, 3, -2, 3}));
  EXPECT_EQ(t.added_ids, (std::vector<int64_t>{0, 2, 3, 4, 1}));
  t = read_vocab(small_vocab, {{"do_lower_case", false}, {"tokenize_chinese_chars", false}});
  EXPECT_FALSE(t.lowercase || t.strip_accents || t.chinese_chars);
}

TEST(HfVocab, LineEndsAndDuplicates) {
  EXPECT_EQ(read_vocab("[UNK]\r\n[CLS]\r\n[SEP]\r\na\r\n").tokens, (std::vector<std::string>{"[UNK]", "[CLS]", "[SEP]", "a"}));
  // The last of equal lines counts; an empty one is a hole.
  EXPECT_EQ(read_vocab("a\n[UNK]\n[CLS]\n\n[SEP]\na\n").tokens, (std::vector<std::string>{"", "[UNK]", "[CLS]", "", "[SEP]", "a"}));
}

TEST(HfVocab, SpecialTokensByOtherNames) {
  const std::string vocab = "<pad>\n<unk>\n<s>\n</s>\n[MASK]\na";
  const json config = {{"cls_token", {{"content", "<s>"}, {"lstrip", false}}}, {"sep_token", "</s>"}};
  hf_tokenizer t = read_vocab(vocab, config, {{"unk_token", "<unk>"}, {"pad_token", {{"content", "<pad>"}}}});
  EXPECT_EQ(t.unk, "<unk>");
  EXPECT_EQ(t.single, (std::vector<int64_t>{2, -1, 3}));
  EXPECT_EQ(t.special_ids["pad"], 0);
}

TEST(HfVocab, AddedTokens) {
  hf_tokenizer t = read_vocab(small_vocab, json(), json(), {{"<x>", 7}});
  EXPECT_EQ(t.tokens.back(), "<x>");
  EXPECT_EQ(t.added_flags.back(), 8 | 32);
  t = read_vocab(small_vocab, {{"added_tokens_decoder", {{"4", {{"content", "[MASK]"}, {"lstrip", true}, {"special", true}}}}}});
  EXPECT_EQ(t.added_ids.front(), 4);
  EXPECT_EQ(t.added_flags.front(), 16 | 2);
}

TEST(HfVocab, Refuses) {
  const auto error = [](const std::string &vocab, const json &config, const json &added = json()) -> std::string {
    try {
      read_vocab(vocab, config, json(), added);
    } catch (const failure &e) {
      return e.what();
    }
    return "";
  };
  EXPECT_NE(error("", json()).find("not in the vocabulary"), std::string::npos);
  EXPECT_NE(error("[CLS]\n[SEP]", json()).find("no unknown token '[UNK]'"), std::string::npos);
  EXPECT_NE(error("[UNK]\n[SEP]", json()).find("token '[CLS]' is not in the vocabulary"), std::string::npos);
  EXPECT_NE(error(small_vocab, {{"tokenizer_class", "BertJapaneseTokenizer"}}).find("'BertJapaneseTokenizer'"), std::string::npos);
  EXPECT_NE(error(small_vocab, {{"word_tokenizer_type", "mecab"}}).find("word_tokenizer_type"), std::string::npos);
  // Where tokenizer_config.json names no class, or is not there, config.json's counts.
  for (const json &config : {json(), json{{"do_lower_case", false}}}) {
    hf_tokenizer_files files;
    files.config = config;
    files.has_vocab = true;
    files.vocab = small_vocab;
    files.model_class = "BertTokenizer";
    EXPECT_EQ(read_hf_tokenizer(files).unk, "[UNK]");
    files.model_class = "BertJapaneseTokenizer";
    std::string said;
    try {
      read_hf_tokenizer(files);
    } catch (const failure &e) {
      said = e.what();
    }
    EXPECT_EQ(said.find("config.json: tokenizer_class 'BertJapaneseTokenizer'"), 0u) << said;
  }
  EXPECT_NE(error(small_vocab, json(), {{"<x>", "y"}}).find("expected a whole number"), std::string::npos);
  EXPECT_NE(error(small_vocab, json(), {{"<x>", int64_t(1) << 40}}).find("has the id"), std::string::npos);
  EXPECT_NE(error(small_vocab, {{"added_tokens_decoder", {{"-1", json::object()}}}}).find("'-1' is not an id"), std::string::npos);
}

// ------------------------------------------------------------------------------------------------ damage

// Whatever a file is turned into, reading ends well or in one line.
void damage(const std::string &name, int rounds) {
  folder f;
  const std::string good = read_file(f.path() + "/" + name);
  uint64_t state = 7;
  const auto random = [&state](size_t below) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return size_t(state >> 33) % below;
  };
  for (int i = 0; i < rounds; ++i) {
    std::string bad = good;
    const size_t header = std::min<size_t>(bad.size(), 6000);  // of the weights, only the header decides anything
    if (i % 4 == 0) bad.resize(random(bad.size()));
    else
      for (size_t n = 1 + random(4); n > 0; --n)
        bad[random(header)] = i % 2 ? char(random(256)) : "0123456789{}[]\",:-e\\"[random(20)];
    f.put(name, bad);
    EXPECT_EQ(f.error().find('\n'), std::string::npos) << f.error();
  }
}

TEST(HfDamage, Safetensors) { damage("model.safetensors", 300); }
TEST(HfDamage, Tokenizer) { damage("tokenizer.json", 300); }
TEST(HfDamage, Config) { damage("config.json", 300); }
TEST(HfDamage, Modules) { damage("modules.json", 300); }

}  // namespace
