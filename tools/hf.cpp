#include "hf.h"

#include <algorithm>
#include <filesystem>

namespace fs = std::filesystem;

namespace {

constexpr size_t max_json_bytes = size_t(256) << 20;
constexpr int64_t sane_max_tokens = 1'000'000;  // tokenizer_config.json writes 1e30 for "no limit"

// ---------------------------------------------------------------------------------------------- config.json

// Nested values become "outer.inner", elements of an array "outer.0".
class config_flattener {
 public:
  explicit config_flattener(hf_folder *out) : out_(out) {}

  void add(const std::string &key, const json &value) {
    if (value.is_object())
      for (const auto &[name, member] : value.items()) add(key.empty() ? name : key + "." + name, member);
    else if (value.is_array())
      for (size_t i = 0; i < value.size(); ++i) add(key + "." + std::to_string(i), value[i]);
    else if (!value.is_null()) add_scalar(key, value);
  }

 private:
  const char *keep(std::string text) { return out_->strings.emplace_back(std::move(text)).c_str(); }

  void add_scalar(const std::string &key, const json &value) {
    rs_source_value v{};
    v.key = keep(key);
    if (value.is_boolean()) {
      v.kind = RS_META_BOOL;
      v.boolean = value.get<bool>();
    } else if (value.is_string()) {
      v.kind = RS_META_STR;
      v.str = keep(value.get<std::string>());
    } else {
      bool fits = value.is_number_integer() && !(value.is_number_unsigned() && value.get<uint64_t>() > uint64_t(INT64_MAX));
      v.kind = fits ? RS_META_I64 : RS_META_F64;
      v.i64 = fits ? value.get<int64_t>() : 0;
      v.f64 = value.get<double>();
    }
    out_->config.push_back(v);
  }

  hf_folder *out_;
};

// ---------------------------------------------------------------------------------------------- weights

// False for a type that no converter takes.
bool source_type(const std::string &dtype, rs_type *type) {
  struct {
    const char *dtype;
    rs_type type;
  } known[] = {{"F32", RS_F32}, {"F16", RS_F16}, {"BF16", RS_BF16}, {"I64", RS_I32}, {"I32", RS_I32}, {"I16", RS_I32},
               {"I8", RS_I32},  {"U64", RS_I32}, {"U32", RS_I32},   {"U16", RS_I32}, {"U8", RS_I32}};
  for (const auto &k : known) {
    if (dtype != k.dtype) continue;
    *type = k.type;
    return true;
  }
  return false;
}

rs_source_tensor source_tensor(const safetensors_entry &entry, const std::string &file) {
  rs_source_tensor tensor{};
  if (!source_type(entry.dtype, &tensor.type))
    fail(file, ": tensor ", in_quotes(entry.name), " is ", entry.dtype, "; rs converts F32, F16 and BF16");
  if (entry.shape.size() > RS_MAX_RANK)
    fail(file, ": tensor ", in_quotes(entry.name), " has ", entry.shape.size(), " dimensions, at most ", RS_MAX_RANK, " are read");
  tensor.name = entry.name.c_str();
  tensor.type_name = entry.dtype.c_str();
  tensor.rank = int(entry.shape.size());
  std::copy(entry.shape.begin(), entry.shape.end(), tensor.shape);
  tensor.data = entry.data;
  return tensor;
}

// A file name of an index must stay inside of the folder.
bool is_plain_name(const std::string &name) {
  return !name.empty() && name[0] != '.' && name.find('/') == std::string::npos && name.find('\\') == std::string::npos &&
         name.find('\0') == std::string::npos;
}

// The same for a module's path, which may have several components.
bool is_inside(const std::string &path) {
  if (path.find('\0') != std::string::npos || path.find('\\') != std::string::npos || fs::path(path).is_absolute()) return false;
  for (const fs::path &component : fs::path(path))
    if (component == "..") return false;
  return true;
}

// ---------------------------------------------------------------------------------------------- names

std::string trimmed(const std::string &text, const char *what) {
  size_t begin = text.find_first_not_of(what);
  return begin == std::string::npos ? "" : text.substr(begin, text.find_last_not_of(what) - begin + 1);
}

// "org/name" and not somebody's path: the file must not tell where it was made.
bool looks_like_repo_id(const std::string &name) {
  const char *const allowed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./";
  return name.size() <= 128 && name.find_first_not_of(allowed) == std::string::npos &&
         std::count(name.begin(), name.end(), '/') == 1 && name.front() != '/' && name.back() != '/' && name.front() != '.' &&
         name.find("checkpoint") == std::string::npos;
}

// The folder's base name.  A snapshot of the hub's cache is called by its commit; the name is two levels up.
std::string name_of_folder(const std::string &path) {
  std::error_code error;
  fs::path full = fs::canonical(path, error);
  if (error) return "";
  if (full.parent_path().filename() == "snapshots") {
    std::string repo = full.parent_path().parent_path().filename().string();
    size_t last = repo.rfind("--");
    if (last != std::string::npos) return repo.substr(last + 2);
  }
  return full.filename().string();
}

// The value of "license:" in the front matter of a README.  It may be a list.
std::string license_of(const std::string &readme) {
  std::vector<std::string> lines;
  for (size_t begin = 0; begin < readme.size();) {
    size_t end = std::min(readme.find('\n', begin), readme.size());
    lines.push_back(trimmed(readme.substr(begin, end - begin), "\r"));
    begin = end + 1;
  }
  const std::string key = "license:";
  const char *const decoration = " \t\"'[]";
  for (size_t i = 0; i < lines.size() && (i == 0 ? lines[0] == "---" : lines[i] != "---"); ++i) {
    if (lines[i].compare(0, key.size(), key) != 0) continue;
    std::string value = trimmed(lines[i].substr(key.size()), decoration);
    for (size_t j = i + 1; value.empty() && j < lines.size(); ++j) {
      std::string item = trimmed(lines[j], " \t");
      if (item.compare(0, 2, "- ") != 0) break;
      value = trimmed(item.substr(2), decoration);
    }
    return value;
  }
  return "";
}

// ---------------------------------------------------------------------------------------------- the folder

class folder_reader {
 public:
  explicit folder_reader(const std::string &path) : root_(path) {
    std::error_code error;
    fs::file_status status = fs::status(root_, error);
    if (!fs::exists(status)) fail("cannot open ", in_quotes(path), ": No such file or directory");
    if (!fs::is_directory(status))
      fail(in_quotes(path), " is not a folder; rs convert reads a folder with config.json and model.safetensors");
  }

  hf_folder read() {
    read_modules();
    json config = read_json(transformer_, "config.json", true);
    json_object hyper(config, "config.json");
    config_flattener(&out_).add("", config);
    read_weights();
    const rs_source source = out_.to_source();
    check(rs_source_inputs(&source, &out_.texts, &out_.images));
    read_image_settings(config);
    if (!out_.texts) return finish(hyper);
    check_pooled();
    json sentence;
    for (const char *name : sentence_configs)
      if (sentence.is_null()) sentence = read_json(transformer_, sentence_name_ = name, false);
    json tokenizer_config = read_json(transformer_, "tokenizer_config.json", false);
    take_arguments(sentence, &tokenizer_config);
    read_max_tokens(hyper, sentence, tokenizer_config);
    read_tokenizer(sentence, tokenizer_config);
    read_sentence_transformers();
    return finish(hyper);
  }

 private:
  // What has nothing to do with the kind of model.
  hf_folder finish(const json_object &hyper) {
    out_.name = name_of_folder(root_.string());
    std::string origin = hyper.string("_name_or_path").value_or("");
    if (looks_like_repo_id(origin)) out_.source = origin;
    if (fs::exists(root_ / "README.md")) out_.license = license_of(read(root_, "README.md"));
    return std::move(out_);
  }

  void read_image_settings(const json &config) {
    if (!out_.images) return;
    out_.image = read_hf_image(config, read_json(transformer_, "preprocessor_config.json", false));
    out_.pooling = "cls";
    // Vectors of models that compare texts with images are compared by cosine.
    out_.normalize = out_.texts;
  }

  std::string read(const fs::path &folder, const std::string &name) {
    std::string path = (folder / name).string();
    std::string content = read_file(path, max_json_bytes);
    out_.files.insert(path);
    return content;
  }

  json read_json(const fs::path &folder, const std::string &name, bool required) {
    if (!required && !fs::exists(folder / name)) return json();
    if (!fs::exists(folder / name)) fail(in_quotes(folder.string()), " has no ", name);
    return parse_json(read(folder, name), name);
  }

  // -------------------------------------------------------------------------------------------- modules.json, pooling

  void read_modules() {
    transformer_ = root_;
    json modules = read_json(root_, "modules.json", false);
    if (modules.is_null()) return;
    has_modules_ = true;
    if (!modules.is_array() || modules.empty()) fail("modules.json: not a list of modules");
    for (size_t i = 0; i < modules.size(); ++i) {
      json_object module(modules[i], "modules.json");
      std::string type = module.string("type").value_or("");
      std::string kind = type.substr(type.rfind('.') + 1);  // whatever the package that it is in
      std::string path = module.string("path").value_or("");
      if (!is_inside(path)) fail("modules.json: path ", in_quotes(path), " leaves the folder");
      if (kind == "Transformer" && i == 0) transformer_ = path.empty() ? root_ : root_ / path;
      else if (kind == "Pooling" && i > 0 && !pooled_) pooled_ = true, read_pooling(path);
      else if (kind == "Normalize" && pooled_) out_.normalize = true;
      else
        fail("modules.json: module ", i, " is ", (in_quotes(type.empty() ? "of no type" : type)),
             "; rs knows Transformer, then Pooling, then Normalize");
    }
  }

  // Only what is made for vectors says how a text becomes one.
  void check_pooled() {
    const std::string architecture = config_string("architectures.0");
    const bool head =
        architecture.find("Classification") != std::string::npos || architecture.find("Answering") != std::string::npos;
    if (pooled_ || head || out_.images) return;
    if (has_modules_) fail("modules.json: no Pooling module, so nothing says how a text becomes one vector");
    // What sentence-transformers does with a plain transformer.
    out_.notes.push_back("no modules.json: vectors are the mean of the token states, not normalised");
  }

  std::string config_string(const std::string &key) const {
    for (const rs_source_value &value : out_.config)
      if (key == value.key && value.kind == RS_META_STR) return value.str;
    return "";
  }

  void read_pooling(const std::string &path) {
    std::string where = path.empty() ? "config.json" : path + "/config.json";
    json config = read_json(root_, where, true);
    json_object pooling(config, where);
    if (!pooling.boolean("include_prompt").value_or(true)) fail(where, ": include_prompt is false, which rs cannot do");
    out_.pooling = pooling_name(pooling, pooling_mode(pooling));
  }

  // The mode that is on, by the name of the newer files.
  static std::string pooling_mode(const json_object &pooling) {
    if (const json *mode = pooling.find("pooling_mode")) {
      bool listed = mode->is_array() && mode->size() == 1;
      if (mode->is_array() && !listed) fail(pooling.where(), ": pooling_mode has ", mode->size(), " modes, rs takes one");
      const json &only = listed ? (*mode)[0] : *mode;
      if (!only.is_string()) fail(pooling.where(), ": pooling_mode is not a string");
      return only.get<std::string>();
    }
    const char *const modes[][2] = {{"pooling_mode_cls_token", "cls"},
                                    {"pooling_mode_max_tokens", "max"},
                                    {"pooling_mode_mean_tokens", "mean"},
                                    {"pooling_mode_mean_sqrt_len_tokens", "mean_sqrt_len_tokens"},
                                    {"pooling_mode_weightedmean_tokens", "weightedmean"},
                                    {"pooling_mode_lasttoken", "lasttoken"}};
    std::string found;
    for (const auto &[key, mode] : modes) {
      if (!pooling.boolean(key).value_or(false)) continue;
      if (!found.empty()) fail(pooling.where(), ": both ", found, " and ", mode, " pooling are on, rs takes one");
      found = mode;
    }
    return found.empty() ? "mean" : found;  // none on: sentence-transformers takes the mean
  }

  static std::string pooling_name(const json_object &pooling, const std::string &mode) {
    const std::pair<const char *, rs_pooling> known[] = {{"mean", RS_POOL_MEAN},
                                                         {"cls", RS_POOL_CLS},
                                                         {"max", RS_POOL_MAX},
                                                         {"mean_sqrt_len_tokens", RS_POOL_MEAN_SQRT_LEN},
                                                         {"weightedmean", RS_POOL_WEIGHTED_MEAN},
                                                         {"lasttoken", RS_POOL_LAST}};
    for (const auto &[name, value] : known)
      if (mode == name) return rs_pooling_name(value);
    fail(pooling.where(), ": unknown pooling_mode ", in_quotes(mode));
  }

  // -------------------------------------------------------------------------------------------- weights

  void read_weights() {
    if (fs::exists(transformer_ / "model.safetensors")) add_weight_file("model.safetensors");
    else if (fs::exists(transformer_ / "model.safetensors.index.json")) read_shards();
    else fail_without_weights();
    std::set<std::string> names;
    for (const rs_source_tensor &tensor : out_.tensors)
      if (!names.insert(tensor.name).second) fail("tensor ", in_quotes(tensor.name), " is in two files");
  }

  void add_weight_file(const std::string &name) {
    std::string path = (transformer_ / name).string();
    const safetensors_file &file = out_.weights.emplace_back(path, name);
    out_.files.insert(path);
    for (const safetensors_entry &entry : file.entries()) out_.tensors.push_back(source_tensor(entry, name));
  }

  void read_shards() {
    const std::string name = "model.safetensors.index.json";
    json index = read_json(transformer_, name, true);
    const json_object map = json_object(index, name).object("weight_map");
    std::map<std::string, std::set<std::string>> shards;  // file -> tensors that it must have
    for (const auto &[tensor, file] : index["weight_map"].items()) {
      if (!file.is_string()) fail(name, ": the file of tensor ", in_quotes(tensor), " is not a string");
      shards[file.get<std::string>()].insert(tensor);
    }
    if (shards.empty()) fail(name, ": weight_map is empty");
    for (const auto &[file, tensors] : shards) {
      if (!is_plain_name(file)) fail(name, ": ", in_quotes(file), " is not the name of a file in the folder");
      if (!fs::exists(transformer_ / file)) fail(name, " lists ", in_quotes(file), ", which is not there");
      add_weight_file(file);
      std::set<std::string> missing = tensors;
      for (const safetensors_entry &entry : out_.weights.back().entries()) missing.erase(entry.name);
      if (!missing.empty()) fail(name, ": tensor ", in_quotes(*missing.begin()), " should be in ", in_quotes(file), ", but is not");
    }
  }

  [[noreturn]] void fail_without_weights() const {
    std::string folder = in_quotes(transformer_.string());
    std::error_code error;
    for (const fs::directory_entry &entry : fs::directory_iterator(transformer_, error)) {
      std::string name = entry.path().filename().string(), extension = entry.path().extension().string();
      if (extension == ".bin" || extension == ".pt" || extension == ".pth" || extension == ".h5" || extension == ".onnx" ||
          extension == ".msgpack" || extension == ".gguf")
        fail(folder, " has ", name, " only; rs reads safetensors: load it with transformers and save it with save_pretrained()");
    }
    fail(folder, " has no model.safetensors");
  }

  // -------------------------------------------------------------------------------------------- tokenizer, limits, prompts

  // What sentence-transformers gives the tokenizer's class to read the folder with: settings that count for more than its own.
  void take_arguments(const json &sentence, json *tokenizer_config) const {
    if (sentence.is_null()) return;
    for (const char *key : {"tokenizer_args", "processor_kwargs"}) {
      if (!json_object(sentence, sentence_name_).find(key)) continue;
      json_object(sentence, sentence_name_).object(key);
      if (tokenizer_config->is_null()) *tokenizer_config = json::object();
      if (!tokenizer_config->is_object()) fail("tokenizer_config.json: not a JSON object");
      tokenizer_config->update(sentence[key]);
    }
  }

  void read_tokenizer(const json &sentence, const json &tokenizer_config) {
    hf_tokenizer_files files;
    files.config = tokenizer_config;
    files.tokenizer = read_json(transformer_, "tokenizer.json", false);
    files.special_tokens = read_json(transformer_, "special_tokens_map.json", false);
    files.added_tokens = read_json(transformer_, "added_tokens.json", false);
    files.has_vocab = files.tokenizer.is_null() && fs::exists(transformer_ / "vocab.txt");
    if (files.has_vocab) files.vocab = read(transformer_, "vocab.txt");
    files.has_merges = files.tokenizer.is_null() && !files.has_vocab && fs::exists(transformer_ / "merges.txt");
    if (files.has_merges) {
      files.vocab_json = read_json(transformer_, "vocab.json", false);
      files.merges = read(transformer_, "merges.txt");
    }
    if (!sentence.is_null()) files.lower_input = json_object(sentence, sentence_name_).boolean("do_lower_case").value_or(false);
    files.model_class = config_string("tokenizer_class");
    files.model_type = config_string("model_type");
    out_.tokenizer = read_hf_tokenizer(files);
    out_.notes.insert(out_.notes.end(), out_.tokenizer.notes.begin(), out_.tokenizer.notes.end());
    note_truncation(files);
  }

  void note_truncation(const hf_tokenizer_files &files) {
    std::optional<std::string> side;
    std::string place = "tokenizer_config.json: truncation_side";
    if (!files.config.is_null()) side = json_object(files.config, "tokenizer_config.json").string("truncation_side");
    if (!side && files.tokenizer.is_object() && json_object(files.tokenizer, "tokenizer.json").find("truncation")) {
      place = "tokenizer.json: truncation: direction";
      side = json_object(files.tokenizer, "tokenizer.json").object("truncation").string("direction");
    }
    if (side && *side != "right" && *side != "Right")
      out_.notes.push_back(join(place, " is ", in_quotes(*side), ", but rs keeps the beginning of texts that are too long"));
  }

  static std::optional<int64_t> limit_in(const json &file, const char *name, const char *key) {
    if (file.is_null()) return std::nullopt;
    const json *value = json_object(file, name).find(key);
    if (!value) return std::nullopt;
    if (!value->is_number()) fail(name, ": '", key, "' is not a number");
    double limit = value->get<double>();
    if (!(limit >= 1)) fail(name, ": '", key, "' is ", limit, ", expected 1 or more");
    return limit <= double(sane_max_tokens) ? std::optional<int64_t>(int64_t(limit)) : std::nullopt;
  }

  void read_max_tokens(const json_object &hyper, const json &sentence, const json &tokenizer_config) {
    // Of a model of two halves, in the half's own settings; 77 is what CLIP's class has where they are left out.
    int64_t positions = hyper.integer("max_position_embeddings").value_or(0);
    for (const rs_source_value &value : out_.config)
      if (std::string(value.key) == "text_config.max_position_embeddings" && value.kind == RS_META_I64) positions = value.i64;
    if (out_.images && positions == 0) positions = 77;
    // Positions of RoBERTa begin behind the id of its padding.
    const int64_t padding =
        hyper.integer("pad_token_id").value_or(1);  // of any size here; the converter says what is wrong with it
    if (hyper.string("model_type").value_or("") == "roberta" && padding >= 0)
      positions = padding < positions ? positions - padding - 1 : 0;
    out_.position_limit = std::max<int64_t>(positions, 0);
    std::optional<int64_t> limit = limit_in(sentence, sentence_name_.c_str(), "max_seq_length");
    for (const char *key : {"model_max_length", "max_len"})  // the second of before 2020
      if (!limit) limit = limit_in(tokenizer_config, "tokenizer_config.json", key);
    out_.max_tokens = limit.value_or(out_.position_limit);
    if (out_.position_limit > 0) out_.max_tokens = std::min(out_.max_tokens, out_.position_limit);
  }

  void read_sentence_transformers() {
    const std::string name = "config_sentence_transformers.json";
    json config = read_json(root_, name, false);
    if (config.is_null()) return;
    json_object settings(config, name);
    // A cross-encoder may have its activation here instead of in config.json.
    const std::string key = "sentence_transformers.activation_fn";
    const std::optional<std::string> activation = settings.string("activation_fn");
    if (activation && config_string(key).empty()) config_flattener(&out_).add(key, *activation);
    if (settings.find("prompts")) {
      settings.object("prompts");
      for (const auto &[prompt, text] : config["prompts"].items()) {
        if (!text.is_string()) fail(name, ": prompt ", in_quotes(prompt), " is not a string");
        out_.prompts.emplace_back(prompt, text.get<std::string>());
      }
    }
    if (const auto dim = settings.integer("truncate_dim"))
      out_.notes.push_back(join(name, ": truncate_dim is ", *dim, ", but vectors are whole; rs embed --dim ", *dim,
                                " cuts them, and brings them back to length 1 if the model does"));
    out_.default_prompt = settings.string("default_prompt_name").value_or("");
    bool known = out_.default_prompt.empty();
    for (const auto &prompt : out_.prompts) known |= prompt.first == out_.default_prompt;
    if (!known) fail(name, ": default_prompt_name ", in_quotes(out_.default_prompt), " is not among the prompts");
  }

  // As sentence-transformers looks for them.
  static constexpr const char *sentence_configs[] = {"sentence_bert_config.json",       "sentence_roberta_config.json",
                                                     "sentence_distilbert_config.json", "sentence_camembert_config.json",
                                                     "sentence_albert_config.json",     "sentence_xlm-roberta_config.json",
                                                     "sentence_xlnet_config.json"};

  fs::path root_, transformer_;
  std::string sentence_name_;
  bool has_modules_ = false, pooled_ = false;
  hf_folder out_;
};

}  // namespace

rs_source hf_folder::to_source() const {
  auto result = sized<rs_source>();
  result.config = config.data();
  result.n_config = config.size();
  result.tensors = tensors.data();
  result.n_tensors = tensors.size();
  return result;
}

hf_folder read_hf_folder(const std::string &path) { return folder_reader(path).read(); }
