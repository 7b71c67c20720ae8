// The tokenizer of a Hugging Face folder.  tokenizer.json describes it completely; an older folder has vocab.txt (WordPiece), or
// vocab.json and merges.txt (BPE), and a few settings in tokenizer_config.json, which the transformers library turns into the same
// thing, and so does this reader.
#include "hf.h"

#include <algorithm>
#include <unordered_map>

namespace {

// The largest published vocabulary has about a million entries.  An id beyond this is an error, not a reason to allocate.
constexpr int64_t max_vocab = int64_t(1) << 22;

enum added_flag { single_word = 1, lstrip = 2, rstrip = 4, normalized = 8, special = 16, outside_vocab = 32 };

struct token_role {
  const char *name, *key, *usual;
};
constexpr token_role token_roles[] = {{"pad", "pad_token", "[PAD]"},
                                      {"cls", "cls_token", "[CLS]"},
                                      {"sep", "sep_token", "[SEP]"},
                                      {"mask", "mask_token", "[MASK]"},
                                      {"unk", "unk_token", "[UNK]"}};
// Where a token has several of these roles, its flags are those of the first.
constexpr token_role clip_roles[] = {{"pad", "pad_token", "<|endoftext|>"},
                                     {"unk", "unk_token", "<|endoftext|>"},
                                     {"eos", "eos_token", "<|endoftext|>"},
                                     {"bos", "bos_token", "<|startoftext|>"}};

constexpr token_role roberta_roles[] = {
    {"pad", "pad_token", "<pad>"}, {"cls", "cls_token", "<s>"}, {"sep", "sep_token", "</s>"}, {"mask", "mask_token", "<mask>"},
    {"unk", "unk_token", "<unk>"}, {"bos", "bos_token", "<s>"}, {"eos", "eos_token", "</s>"}};

// Any of these, so that what reads them is there once.
struct role_list {
  const token_role *first, *last;
  template <size_t N>
  role_list(const token_role (&roles)[N]) : first(roles), last(roles + N) {}  // NOLINT(google-explicit-constructor)
  const token_role *begin() const { return first; }
  const token_role *end() const { return last; }
};

// How CLIP finds words; newer folders put special tokens before that, which only matters where one is written in capitals.
constexpr const char *clip_special_words = R"(<\|startoftext\|>|<\|endoftext\|>|)";
constexpr const char *clip_words = R"('s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+)";

class tokenizer_reader {
 public:
  explicit tokenizer_reader(const hf_tokenizer_files &files) : files_(files) {}

  hf_tokenizer read() {
    if (setting("split_special_tokens", false))
      fail("tokenizer_config.json: split_special_tokens is true, but rs finds special tokens in texts");
    if (!files_.tokenizer.is_null()) read_tokenizer_json();
    else if (files_.has_vocab) read_vocab_txt();
    else if (!files_.vocab_json.is_null() && files_.has_merges) read_vocab_json();
    else fail("the folder has neither tokenizer.json nor vocab.txt, nor vocab.json and merges.txt");
    find_special_ids(roles());
    if (!is_bpe() && ids_.find(out_.unk) == ids_.end()) fail("the vocabulary has no unknown token ", in_quotes(out_.unk));
    if (is_bpe() && files_.lower_input)
      fail("sentence-transformers' do_lower_case is true, which rs does for WordPiece, not for BPE");
    if (!takes_types())
      for (auto *types : {&out_.single_types, &out_.pair_types}) std::fill(types->begin(), types->end(), 0);
    return std::move(out_);
  }

 private:
  // Where the model's inputs are listed without them, all types are 0.
  bool takes_types() const {
    if (files_.model_type == "distilbert") return false;
    if (!files_.config.is_object() || !files_.config.contains("model_input_names")) return true;
    const json &names = files_.config["model_input_names"];
    return !names.is_array() || std::find(names.begin(), names.end(), "token_type_ids") != names.end();
  }

  // What tokenizer_config.json has of a name.
  std::optional<bool> setting(const char *key) const {
    return files_.config.is_null() ? std::nullopt : json_object(files_.config, "tokenizer_config.json").boolean(key);
  }
  bool setting(const char *key, bool otherwise) const { return setting(key).value_or(otherwise); }

  // The class of transformers that reads the folder, without its "Fast", and what names it.
  struct class_name {
    std::string name;
    const char *place;
  };
  class_name tokenizer_class() const {
    class_name c = {"", "tokenizer_config.json: tokenizer_class"};
    if (!files_.config.is_null())
      c.name = json_object(files_.config, "tokenizer_config.json").string("tokenizer_class").value_or("");
    if (c.name.empty()) c = {files_.model_class, "config.json: tokenizer_class"};
    for (const auto &[type, usual] :
         {std::pair{"bert", "BertTokenizer"}, {"distilbert", "DistilBertTokenizer"}, {"roberta", "RobertaTokenizer"}})
      if (c.name.empty() && files_.model_type == type) c = {usual, "config.json: model_type stands for"};
    const size_t fast = c.name.size() - std::min<size_t>(c.name.size(), 4);
    if (c.name.compare(fast, 4, "Fast") == 0) c.name.resize(fast);
    return c;
  }
  static bool is_bert(const std::string &class_name) {
    return class_name == "BertTokenizer" || class_name == "DistilBertTokenizer" || class_name == "ElectraTokenizer";
  }
  static bool is_roberta(const std::string &class_name) { return class_name == "RobertaTokenizer"; }
  // That are just a tokenizer.json.
  static bool is_plain(const std::string &class_name) {
    return class_name.empty() || class_name == "PreTrainedTokenizer" || class_name == "TokenizersBackend";
  }

  bool is_bpe() const { return out_.type == "bpe"; }
  // BPE whose tokens have no suffix: words are found as GPT-2 does it.
  bool is_gpt2() const { return is_bpe() && out_.suffix.empty(); }

  role_list roles() const {
    if (!is_bpe() || (is_gpt2() && ids_.find("<s>") == ids_.end())) return token_roles;
    return is_gpt2() ? role_list(roberta_roles) : role_list(clip_roles);
  }

  void find_special_ids(role_list roles) {
    for (const token_role &role : roles) {
      auto id = ids_.find(token_of(role));
      if (id != ids_.end() && std::string(role.name) != "unk") out_.special_ids[role.name] = id->second;
    }
  }

  // -------------------------------------------------------------------------------------------- vocabulary

  void place_token(const std::string &token, int64_t id, const std::string &where) {
    if (id < 0 || id >= max_vocab)
      fail(where, ": token ", in_quotes(token), " has the id ", id, ", allowed are 0 to ", max_vocab - 1);
    if (size_t(id) >= out_.tokens.size()) out_.tokens.resize(size_t(id) + 1);
    std::string &place = out_.tokens[size_t(id)];
    if (!place.empty() && place != token)
      fail(where, ": id ", id, " is given to both ", in_quotes(place), " and ", in_quotes(token));
    auto [known, is_new] = ids_.emplace(token, id);
    if (!is_new && known->second != id) fail(where, ": token ", in_quotes(token), " has the ids ", known->second, " and ", id);
    place = token;
  }

  int64_t id_of(const std::string &token, const std::string &where) const {
    auto found = ids_.find(token);
    if (found == ids_.end()) fail(where, ": token ", in_quotes(token), " is not in the vocabulary");
    return found->second;
  }

  struct special_token {
    std::string text;
    int64_t flags;
  };

  // The files that name special tokens, of which the first counts.
  std::vector<json_object> special_places() const {
    std::vector<json_object> places;
    if (!files_.config.is_null()) places.emplace_back(files_.config, "tokenizer_config.json");
    if (!files_.special_tokens.is_null()) places.emplace_back(files_.special_tokens, "special_tokens_map.json");
    return places;
  }

  // A text, or an AddedToken.
  static std::optional<special_token> special_in(const json &value, const std::string &where) {
    if (value.is_string()) return special_token{value.get<std::string>(), special};
    if (!value.is_object()) fail(where, ": neither a string nor an AddedToken");
    json_object token(value, where);
    const std::optional<std::string> text = token.string("content");
    return text ? std::optional<special_token>({*text, flags_of(token) | special}) : std::nullopt;
  }

  std::optional<special_token> named_special(const token_role &role) const {
    for (const json_object &place : special_places())
      if (const json *value = place.find(role.key))
        if (auto token = special_in(*value, place.where() + ": " + role.key)) return token;
    return std::nullopt;
  }

  // Else what BERT, RoBERTa or CLIP calls it.
  std::string token_of(const token_role &role) const {
    const std::optional<special_token> named = named_special(role);
    return named ? named->text : role.usual;
  }

  void add_token(const std::string &content, int64_t id, int64_t flags, const std::string &where) {
    if (content.empty()) return;  // the tokenizers library drops it as well
    if (ids_.find(content) == ids_.end()) flags |= outside_vocab;
    place_token(content, id, where);
    if (!added_.insert(id).second) return;
    out_.added_ids.push_back(id);
    out_.added_flags.push_back(flags);
  }

  static int64_t flags_of(const json_object &token) {
    struct {
      const char *key;
      added_flag flag;
    } known[] = {
        {"single_word", single_word}, {"lstrip", lstrip}, {"rstrip", rstrip}, {"normalized", normalized}, {"special", special}};
    int64_t flags = 0;
    for (const auto &k : known)
      if (token.boolean(k.key).value_or(false)) flags |= k.flag;
    return flags;
  }

  // -------------------------------------------------------------------------------------------- tokenizer.json

  void read_tokenizer_json() {
    json_object root(files_.tokenizer, "tokenizer.json");
    read_model(root.object("model"));
    if (root.find("added_tokens")) {
      for (const json &item : root.array("added_tokens")) {
        json_object token(item, "tokenizer.json: added_tokens");
        add_token(token.string("content").value_or(""), token.integer("id").value_or(-1), flags_of(token), token.where());
      }
    }
    add_listed_tokens(roles());
    if (is_gpt2()) {
      read_gpt2_normalizer(root.find("normalizer"));
      read_gpt2_pre_tokenizer(root.find("pre_tokenizer"));
    } else if (is_bpe()) {
      check_clip_normalizer(root.find("normalizer"));
      check_clip_pre_tokenizer(root.find("pre_tokenizer"));
    } else {
      read_normalizer(root.find("normalizer"));
      check_pre_tokenizer(root.find("pre_tokenizer"));
    }
    read_post_processor(root.find("post_processor"));
  }

  void read_model(const json_object &model) {
    // Files of before 2021 do not name the type; only WordPiece has this member and no merges.
    bool old_wordpiece = model.find("continuing_subword_prefix") && !model.find("merges");
    std::string type = model.string("type").value_or(old_wordpiece ? "WordPiece" : "");
    if (type.empty() && model.find("merges")) type = "BPE";
    if (type != "WordPiece" && type != "BPE")
      fail("tokenizer.json: the model is of type ", (type.empty() ? "unknown" : in_quotes(type)), ", rs knows WordPiece and BPE");
    if (type == "WordPiece") {
      out_.unk = model.string("unk_token").value_or(out_.unk);
      out_.prefix = model.string("continuing_subword_prefix").value_or(out_.prefix);
      out_.max_word_chars = model.integer("max_input_chars_per_word").value_or(out_.max_word_chars);
    }
    const json *vocab = model.find("vocab");
    if (!vocab || !vocab->is_object()) fail("tokenizer.json: model: no vocab");
    read_vocab(*vocab, "tokenizer.json");
    if (type == "BPE") read_bpe(model);
  }

  void read_vocab(const json &vocab, const std::string &where) {
    for (const auto &[token, id] : vocab.items()) {
      if (!id.is_number_integer()) fail(where, ": the id of token ", in_quotes(token), " is not a whole number");
      place_token(token, id.get<int64_t>(), where);
    }
  }

  // -------------------------------------------------------------------------------------------- BPE

  // Of CLIP's kind, where tokens that end a word have a suffix, or of GPT-2's, where none has.  Every byte has a token (of CLIP's,
  // inside a word and at its end), so there are no unknown ones, and `unk_token`, `fuse_unk` and `byte_fallback` say nothing.
  void read_bpe(const json_object &model) {
    out_.type = "bpe";
    out_.suffix = model.string("end_of_word_suffix").value_or("");
    out_.ignore_merges = model.boolean("ignore_merges").value_or(false);
    if (!model.string("continuing_subword_prefix").value_or("").empty())
      fail(model.where(), ": BPE with a continuing_subword_prefix, those of CLIP and GPT-2 have none");
    if (out_.ignore_merges && !is_gpt2()) fail(model.where(), ": BPE with ignore_merges, CLIP's is without");
    if (const json *dropout = model.find("dropout"))
      if (!dropout->is_number() || dropout->get<double>() != 0)
        fail(model.where(), ": BPE with dropout, those of CLIP and GPT-2 are without");
    for (const json &item : model.array("merges")) {
      const size_t i = merges_.size();
      if (item.is_string()) {
        read_merge(item.get<std::string>(), join("tokenizer.json: merge ", i));
      } else {
        if (!item.is_array() || item.size() != 2 || !item[0].is_string() || !item[1].is_string())
          fail("tokenizer.json: merge ", i, " is not two tokens");
        add_merge(item[0].get<std::string>(), item[1].get<std::string>(), join("tokenizer.json: merge ", i));
      }
    }
    rank_merges();
  }

  // "left right"
  void read_merge(const std::string &text, const std::string &where) {
    const size_t space = text.find(' ');
    if (space == std::string::npos || space != text.rfind(' ')) fail(where, ": ", in_quotes(text), " is not two tokens");
    add_merge(text.substr(0, space), text.substr(space + 1), where);
  }

  void add_merge(const std::string &left, const std::string &right, const std::string &where) {
    merges_.emplace_back(id_of(left, where), id_of(right, where));
  }

  // Of equal ones the last counts, as in the tokenizers library.
  void rank_merges() {
    std::set<std::pair<int64_t, int64_t>> seen;
    std::vector<bool> counts(merges_.size());
    for (size_t i = merges_.size(); i-- > 0;) counts[i] = seen.insert(merges_[i]).second;
    for (size_t i = 0; i < merges_.size(); i++)
      if (counts[i]) out_.merges.insert(out_.merges.end(), {merges_[i].first, merges_[i].second});
  }

  static const json *member(const json *value, const char *list, size_t i) {
    return value && value->is_object() && value->contains(list) && (*value)[list].is_array() && i < (*value)[list].size()
               ? &(*value)[list][i]
               : nullptr;
  }

  // The string value[a], or value[a][b].
  static std::string text_of(const json &value, const char *a, const char *b = nullptr) {
    const json inner = value.is_object() ? value.value(a, json()) : json();
    if (b) return text_of(inner, b);
    return inner.is_string() ? inner.get<std::string>() : "";
  }

  // What `list` of a Sequence must have, in order.
  static void check_sequence(const json *value, const char *where, const char *list, const std::vector<std::string> &types) {
    std::string got;
    for (size_t i = 0; const json *item = member(value, list, i); i++) got += (i ? ", " : "") + type_of(item, where);
    std::string wanted;
    for (const std::string &type : types) wanted += (wanted.empty() ? "" : ", ") + type;
    if (type_of(value, where) != "Sequence" || got != wanted)
      fail("tokenizer.json: the ", where, " is ", type_of(value, where), (got.empty() ? "" : " of " + got),
           ", CLIP's is Sequence of ", wanted);
  }

  static void check_clip_normalizer(const json *value) {
    const char *const where = "normalizer";
    check_sequence(value, where, "normalizers", {"NFC", "Replace", "Lowercase"});
    const json &replace = *member(value, "normalizers", 1);
    const std::string pattern = text_of(replace, "pattern", "Regex"), content = text_of(replace, "content");
    if (pattern != R"(\s+)" || content != " ")
      fail("tokenizer.json: normalizer: Replace makes ", in_quotes(content), " of ", in_quotes(pattern),
           R"(, CLIP's ' ' of '\s+')");
  }

  void check_clip_pre_tokenizer(const json *value) {
    const char *const where = "pre_tokenizer";
    check_sequence(value, where, "pretokenizers", {"Split", "ByteLevel"});
    json_object split(*member(value, "pretokenizers", 0), "tokenizer.json: pre_tokenizer: Split");
    const std::string words = text_of(*member(value, "pretokenizers", 0), "pattern", "Regex");
    out_.split_special = words == std::string(clip_special_words) + clip_words;
    if (!out_.split_special && words != clip_words) fail(split.where(), ": the pattern ", in_quotes(words), " is not CLIP's");
    if (split.string("behavior").value_or("") != "Removed" || !split.boolean("invert").value_or(false))
      fail(split.where(), ": CLIP's has the behavior Removed, inverted");
    json_object bytes(*member(value, "pretokenizers", 1), "tokenizer.json: pre_tokenizer: ByteLevel");
    if (bytes.boolean("add_prefix_space").value_or(true)) fail(bytes.where(), ": adds a space before the text, CLIP's does not");
    if (!bytes.boolean("use_regex").value_or(true)) fail(bytes.where(), ": without use_regex, CLIP's has it");
  }

  void read_gpt2_normalizer(const json *value) {
    const std::string type = type_of(only_member(value, "normalizers"), "normalizer");
    out_.compose = type == "NFC";
    if (type != "none" && type != "NFC")
      fail("tokenizer.json: the normalizer is of type ", in_quotes(type),
           ", rs knows none and NFC for BPE without end_of_word_suffix");
  }

  void read_gpt2_pre_tokenizer(const json *value) {
    value = only_member(value, "pretokenizers");
    const std::string type = type_of(value, "pre_tokenizer");
    if (type != "ByteLevel")
      fail("tokenizer.json: the pre_tokenizer is of type ", in_quotes(type),
           ", rs knows ByteLevel for BPE without end_of_word_suffix");
    json_object bytes(*value, "tokenizer.json: pre_tokenizer");
    out_.prefix_space = bytes.boolean("add_prefix_space").value_or(true);
    // RobertaTokenizer replaces both, by what it has where tokenizer_config.json says nothing.
    if (is_roberta(tokenizer_class().name)) out_.prefix_space = setting("add_prefix_space", false);
    if (!bytes.boolean("use_regex").value_or(true)) fail(bytes.where(), ": ByteLevel without use_regex, rs knows GPT-2's words");
  }

  // What a post-processor says of spaces is about places; CLIP's tokens have none.
  void read_trimming(const json_object &processor) {
    if (!is_gpt2()) return;
    if (is_roberta(tokenizer_class().name)) {
      out_.trim_spans = setting("trim_offsets", true);
      return;
    }
    out_.trim_spans = processor.boolean("trim_offsets").value_or(true);
    if (out_.trim_spans && processor.boolean("add_prefix_space").value_or(true) != out_.prefix_space)
      fail(processor.where(), ": add_prefix_space is not that of the pre_tokenizer");
  }

  // <s> a </s>, <s> a </s></s> b </s>.
  void set_roberta_template(int64_t cls, int64_t sep) {
    out_.single = {cls, -1, sep};
    out_.single_types = {0, 0, 0};
    out_.pair = {cls, -1, sep, sep, -2, sep};
    out_.pair_types = {0, 0, 0, 0, 0, 0};
  }

  // As CLIPTokenizer and RobertaTokenizer of transformers 5 put it together.
  void read_vocab_json() {
    const class_name named = tokenizer_class();
    const bool roberta = is_roberta(named.name);
    if (!roberta && !named.name.empty() && named.name != "CLIPTokenizer")
      fail(named.place, " ", in_quotes(named.name),
           " and no tokenizer.json; rs reads vocab.json and merges.txt of CLIPTokenizer and RobertaTokenizer");
    out_.prefix_space = roberta && setting("add_prefix_space", false);
    if (!files_.vocab_json.is_object()) fail("vocab.json is not an object");
    read_vocab(files_.vocab_json, "vocab.json");
    out_.type = "bpe";
    out_.suffix = roberta ? "" : "</w>";
    out_.split_special = !roberta;
    out_.trim_spans = roberta && setting("trim_offsets", true);
    for (size_t begin = 0; begin < files_.merges.size();) {
      const size_t end = std::min(files_.merges.find('\n', begin), files_.merges.size());
      const bool cr = end > begin && files_.merges[end - 1] == '\r';
      const std::string line = files_.merges.substr(begin, end - begin - (cr ? 1 : 0));
      begin = end + 1;
      if (line.empty() || line.compare(0, 8, "#version") == 0) continue;
      read_merge(line, join("merges.txt: merge ", merges_.size()));
    }
    rank_merges();
    add_listed_tokens(roberta ? role_list(roberta_roles) : role_list(clip_roles));
    const token_role &begin = roberta ? roberta_roles[1] : clip_roles[3], &end = roberta ? roberta_roles[2] : clip_roles[2];
    const int64_t bos = id_of(token_of(begin), "vocab.json"), eos = id_of(token_of(end), "vocab.json");
    set_roberta_template(bos, eos);
  }

  // -------------------------------------------------------------------------------------------- the rest of tokenizer.json

  // {"type": "Sequence", "<members>": [x]} stands for x.
  static const json *only_member(const json *value, const char *members) {
    while (value && value->is_object() && value->value("type", json()) == "Sequence" && value->contains(members)) {
      const json &list = (*value)[members];
      if (!list.is_array() || list.size() != 1) return value;
      value = &list[0];
    }
    return value;
  }

  static std::string type_of(const json *value, const char *where) {
    if (!value) return "none";
    return json_object(*value, std::string("tokenizer.json: ") + where).string("type").value_or("none");
  }

  void read_normalizer(const json *value) {
    value = only_member(value, "normalizers");
    if (!value) {
      out_.clean_text = out_.chinese_chars = out_.strip_accents = false;
      out_.lowercase = files_.lower_input;
      return;
    }
    std::string type = type_of(value, "normalizer");
    if (type != "BertNormalizer") fail("tokenizer.json: the normalizer is of type ", in_quotes(type), ", rs knows BertNormalizer");
    json_object normalizer(*value, "tokenizer.json: normalizer");
    out_.clean_text = normalizer.boolean("clean_text").value_or(true);
    set_normalizer(normalizer.boolean("handle_chinese_chars").value_or(true), normalizer.boolean("strip_accents"),
                   normalizer.boolean("lowercase").value_or(true));
  }

  // Settings of the normalizer with all that overrides them.
  void set_normalizer(bool chinese_chars, std::optional<bool> strip_accents, bool lowercase) {
    // transformers' BertTokenizer replaces what tokenizer.json says, by what it has where tokenizer_config.json says nothing. Other
    // classes replace what is named there; those that are just a tokenizer.json nothing.
    const std::string name = tokenizer_class().name;
    const bool bert = is_bert(name);
    if (bert || !is_plain(name) || name.empty()) {
      lowercase = setting("do_lower_case", bert || lowercase);
      chinese_chars = setting("tokenize_chinese_chars", bert || chinese_chars);
      const bool says = !files_.config.is_null() && files_.config.contains("strip_accents");  // null counts
      if (bert || says) strip_accents = setting("strip_accents");
    }
    out_.chinese_chars = chinese_chars;
    out_.strip_accents = strip_accents.value_or(lowercase);  // as in the original BERT
    // sentence-transformers' do_lower_case puts lower-casing in front of the tokenizer and leaves the rest as it is.  So it does
    // not bring stripped accents with it.  (It also lower-cases what looks like a special token; those are matched first here.)
    out_.lowercase = lowercase || files_.lower_input;
  }

  static void check_pre_tokenizer(const json *value) {
    std::string type = type_of(only_member(value, "pretokenizers"), "pre_tokenizer");
    if (type != "BertPreTokenizer")
      fail("tokenizer.json: the pre_tokenizer is of type ", in_quotes(type), ", rs knows BertPreTokenizer");
  }

  void read_post_processor(const json *value) {
    value = only_member(value, "processors");
    if (type_of(value, "post_processor") == "Sequence" && is_gpt2()) {  // of ByteLevel, which trims, and a template
      const json *first = member(value, "processors", 0), *second = member(value, "processors", 1);
      if (type_of(first, "post_processor") == "ByteLevel" && second && !member(value, "processors", 2)) {
        read_trimming(json_object(*first, "tokenizer.json: post_processor"));
        value = second;
      }
    }
    if (value && is_gpt2() && type_of(value, "post_processor") == "ByteLevel") {
      read_trimming(json_object(*value, "tokenizer.json: post_processor"));
      value = nullptr;
    }
    if (!value) {  // the text alone
      out_.single = {-1};
      out_.single_types = {0};
      out_.pair = {-1, -2};
      out_.pair_types = {0, 1};
      return;
    }
    std::string type = type_of(value, "post_processor");
    json_object processor(*value, "tokenizer.json: post_processor");
    if (type == "BertProcessing") {
      set_bert_template(named_id(processor, "cls"), named_id(processor, "sep"));
    } else if (type == "RobertaProcessing" && is_bpe()) {
      set_roberta_template(named_id(processor, "cls"), named_id(processor, "sep"));
      read_trimming(processor);
    } else if (type == "TemplateProcessing") {
      read_template(processor, "single", false, &out_.single, &out_.single_types);
      read_template(processor, "pair", true, &out_.pair, &out_.pair_types);
    } else {
      fail("tokenizer.json: the post_processor is of type ", in_quotes(type), ", rs knows TemplateProcessing and ",
           (is_bpe() ? "RobertaProcessing" : "BertProcessing"));
    }
  }

  // "cls": ["[CLS]", 101]
  int64_t named_id(const json_object &processor, const char *key) const {
    const json &entry = processor.array(key);
    if (entry.size() != 2 || !entry[0].is_string() || !entry[1].is_number_integer())
      fail(processor.where(), ": '", key, "' is not a token and its id");
    return checked_id(entry[1].get<int64_t>(), processor.where());
  }

  int64_t checked_id(int64_t id, const std::string &where) const {
    if (id < 0 || size_t(id) >= out_.tokens.size()) fail(where, ": id ", id, " is not in the vocabulary of ", out_.tokens.size());
    return id;
  }

  void set_bert_template(int64_t cls, int64_t sep) {
    out_.single = {cls, -1, sep};
    out_.single_types = {0, 0, 0};
    out_.pair = {cls, -1, sep, -2, sep};
    out_.pair_types = {0, 0, 0, 1, 1};
  }

  void read_template(const json_object &processor, const char *key, bool pair, std::vector<int64_t> *ids,
                     std::vector<int64_t> *types) {
    std::string where = processor.where() + ": " + key;
    for (const json &item : processor.array(key)) {
      json_object piece(item, where);
      bool text = piece.find("Sequence") != nullptr;
      json_object body = piece.object(text ? "Sequence" : "SpecialToken");
      std::string name = body.string("id").value_or("");
      if (text && name != "A" && name != "B") fail(where, ": sequence ", in_quotes(name), " is neither A nor B");
      std::vector<int64_t> piece_ids{name == "A" ? -1 : -2};
      if (!text) piece_ids = special_token_ids(processor, name);
      for (int64_t id : piece_ids) {
        ids->push_back(id);
        types->push_back(body.integer("type_id").value_or(0));
      }
    }
    if (std::count(ids->begin(), ids->end(), -1) != 1 || std::count(ids->begin(), ids->end(), -2) != (pair ? 1 : 0))
      fail(where, ": must have the sequence A", (pair ? " and B" : " and no B"), " once");
  }

  // A special token of a template may stand for several ids.
  std::vector<int64_t> special_token_ids(const json_object &processor, const std::string &name) const {
    json_object token = processor.object("special_tokens").object(name.c_str());
    std::vector<int64_t> ids;
    for (const json &id : token.array("ids")) {
      if (!id.is_number_integer()) fail(token.where(), ": an id is not a whole number");
      ids.push_back(checked_id(id.get<int64_t>(), token.where()));
    }
    return ids;
  }

  // -------------------------------------------------------------------------------------------- vocab.txt

  void read_vocab_txt() {
    check_tokenizer_class();
    read_vocab_lines();
    for (const token_role &role : token_roles)
      if (std::string(role.name) == "unk") out_.unk = token_of(role);
    out_.clean_text = true;
    set_normalizer(true, std::nullopt, true);
    set_bert_template(id_of(token_of(token_roles[1]), "vocab.txt"), id_of(token_of(token_roles[2]), "vocab.txt"));
    add_listed_tokens(token_roles);
  }

  // vocab.txt alone does not say how words are found.  BertJapaneseTokenizer, for one, uses a dictionary.
  void check_tokenizer_class() const {
    if (!files_.config.is_null()) {
      json_object config(files_.config, "tokenizer_config.json");
      for (const char *kind : {"word_tokenizer_type", "subword_tokenizer_type"})
        if (config.find(kind))
          fail("tokenizer_config.json: ", kind, ", which BertJapaneseTokenizer has; rs reads vocab.txt of BertTokenizer");
    }
    const class_name named = tokenizer_class();
    if (!named.name.empty() && !is_bert(named.name))
      fail(named.place, " ", in_quotes(named.name), " and no tokenizer.json; rs reads vocab.txt of BertTokenizer");
  }

  // One token a line, the line's number its id.  Of equal lines the last counts, as in transformers.
  void read_vocab_lines() {
    const std::string &text = files_.vocab;
    for (size_t begin = 0; begin < text.size();) {
      size_t end = std::min(text.find('\n', begin), text.size());
      size_t length = end - begin - (end > begin && text[end - 1] == '\r' ? 1 : 0);
      if (int64_t(out_.tokens.size()) >= max_vocab) fail("vocab.txt has more than ", max_vocab, " lines");
      out_.tokens.push_back(text.substr(begin, length));
      begin = end + 1;
    }
    for (size_t id = out_.tokens.size(); id-- > 0;) {
      if (out_.tokens[id].empty()) continue;
      if (!ids_.emplace(out_.tokens[id], int64_t(id)).second) out_.tokens[id].clear();
    }
  }

  // Tokens that are matched in the text before it is cut into words: the special ones, and what a user added.  A token keeps what
  // the first of these places says of it.  A tokenizer.json should have listed them all; beside it, those count that it has.
  void add_listed_tokens(role_list roles) {
    const bool again = !files_.tokenizer.is_null();
    const auto add = [&](const std::string &content, int64_t id, int64_t flags, const std::string &where) {
      if (again) list_again(content, flags, where);
      else add_token(content, id, flags, where);
    };
    if (!files_.config.is_null() && files_.config.contains("added_tokens_decoder")) {
      json_object decoder = json_object(files_.config, "tokenizer_config.json").object("added_tokens_decoder");
      std::map<int64_t, const json *> in_order;
      for (const auto &[key, value] : files_.config["added_tokens_decoder"].items())
        in_order[parse_id(key, decoder.where())] = &value;
      for (const auto &[id, value] : in_order) {
        json_object token(*value, decoder.where());
        add(token.string("content").value_or(""), id, flags_of(token), decoder.where());
      }
    }
    for (const token_role &role : roles) {
      const std::optional<special_token> named = named_special(role);
      if (again && !named && is_plain(tokenizer_class().name)) continue;
      const special_token token = named.value_or(special_token{role.usual, special});
      auto found = ids_.find(token.text);
      if (found == ids_.end() && again && named) list_again(token.text, token.flags, role.key);  // which notes it
      // The reader of vocab.txt always knew them as plain ones.
      if (found != ids_.end()) add_token(found->first, found->second, is_bpe() || again ? token.flags : int64_t(special), role.key);
    }
    if (!files_.added_tokens.is_null()) {
      json_object added(files_.added_tokens, "added_tokens.json");
      for (const auto &[token, value] : files_.added_tokens.items())
        add(token, added.integer(token.c_str()).value_or(-1), normalized, added.where());
    }
    list_more_special();
  }

  // A token outside of the vocabulary would get an id for which the model has no row.
  void list_again(const std::string &content, int64_t flags, const std::string &where) {
    auto found = ids_.find(content);
    if (found != ids_.end()) add_token(found->first, found->second, flags, where);
    else if (!content.empty())
      out_.notes.push_back(join(where, ": token ", in_quotes(content), " is not in the vocabulary, so it is read as other text"));
  }

  // What has no role: a list, or an object of names and tokens.
  void list_more_special() {
    for (const json_object &place : special_places())
      for (const char *key : {"additional_special_tokens", "extra_special_tokens"}) {
        const std::string where = place.where() + ": " + key;
        const json *tokens = place.find(key);
        if (tokens && !tokens->is_array() && !tokens->is_object()) fail(where, " is neither an array nor an object");
        for (const json &value : tokens ? *tokens : json::array())
          if (const auto token = special_in(value, where)) list_again(token->text, token->flags, where);
      }
  }

  static int64_t parse_id(const std::string &text, const std::string &where) {
    bool digits = !text.empty() && text.size() <= 9 && text.find_first_not_of("0123456789") == std::string::npos;
    if (!digits) fail(where, ": ", in_quotes(text), " is not an id");
    return std::stoll(text);
  }

  const hf_tokenizer_files &files_;
  hf_tokenizer out_;
  std::unordered_map<std::string, int64_t> ids_;
  std::set<int64_t> added_;
  std::vector<std::pair<int64_t, int64_t>> merges_;  // ids
};

}  // namespace

hf_tokenizer read_hf_tokenizer(const hf_tokenizer_files &files) { return tokenizer_reader(files).read(); }
