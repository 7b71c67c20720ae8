// Byte-level BPE as GPT-2 has it, in the tokenizers of RoBERTa and ModernBERT, against the tokenizers library of Hugging Face.
//
// tests/data/gpt2.json is what the reference, tokenizers 0.23.3, makes of texts with three tokenizers of one small vocabulary
// (tests/make_gpt2.py).
#include "tokenizer_util.h"

#include <functional>
#include <map>
#include <random>

using namespace std::string_literals;
using namespace std::string_view_literals;

namespace {

const json &golden() {
  static const json all = parse_json(read_file(source_dir() + "/tests/data/gpt2.json"), "gpt2.json");
  return all;
}

json tokenizer_of(const json &kind) {
  json tokenizer = kind["tokenizer"];
  tokenizer["model"] = golden()["model"];
  json &merges = tokenizer["model"]["merges"];
  merges = json(merges.begin(), merges.begin() + kind["merges"].get<std::ptrdiff_t>());
  tokenizer["model"]["ignore_merges"] = kind["ignore_merges"];
  return tokenizer;
}

rs_tokenizer_spec golden_spec(const char *kind) { return spec_of(read_tokenizer(tokenizer_of(golden()["kinds"][kind]))); }

rs_tokens expected(const json &row) { return golden_tokens(row[0], row[1]); }

// Tokens of bytes alone, in their order.
rs_tokenizer_spec byte_spec() {
  rs_tokenizer_spec spec = bpe_spec({}, "");
  spec.tokens.erase(spec.tokens.begin() + 256, spec.tokens.begin() + 512);  // those that end a word
  spec.added_ids = {256, 257};
  spec.single = {256, -1, 257}, spec.pair = {256, -1, 257, 257, -2, 257};
  return spec;
}

// The words of a text: a vocabulary that has all of them, by ignore_merges, makes a token of each.
std::string words_of(std::string_view text, const std::vector<std::string> &words) {
  rs_tokenizer_spec spec = byte_spec();
  spec.ignore_merges = true;
  std::map<int32_t, std::string> names;
  for (const std::string &word : words) {
    std::string written;
    for (const char c : word) written += spec.tokens[static_cast<uint8_t>(c)];
    const auto known = std::find(spec.tokens.begin(), spec.tokens.end(), written);
    names[static_cast<int32_t>(known - spec.tokens.begin())] = word;
    if (known == spec.tokens.end()) spec.tokens.push_back(written);
  }
  std::string all;
  for (const int32_t id : encode(create(spec), text).ids) all += (all.empty() ? "" : "|") + (names.count(id) ? names[id] : "?");
  return all;
}

std::vector<std::string> split(const std::string &text) {
  std::vector<std::string> parts;
  for (size_t at = 0;;) {
    const size_t end = text.find('|', at);
    parts.push_back(text.substr(at, end - at));
    if (end == std::string::npos) return parts;
    at = end + 1;
  }
}

}  // namespace

TEST(Gpt2, GoldenTexts) {
  const json &texts = golden()["texts"];
  ASSERT_GT(texts.size(), 200u);
  for (const auto &[name, kind] : golden()["kinds"].items()) {
    SCOPED_TRACE(name);
    const auto t = create(spec_of(read_tokenizer(tokenizer_of(kind))));
    for (size_t i = 0; i < texts.size(); i++)
      EXPECT_EQ(show(encode(t, texts[i].get<std::string>())), show(expected(kind["rows"][i]))) << texts[i];
  }
}

TEST(Gpt2, Templates) {
  for (const auto &[name, kind] : golden()["kinds"].items()) {
    SCOPED_TRACE(name);
    const auto t = create(spec_of(read_tokenizer(tokenizer_of(kind))));
    const rs_tokens a = encode(t, "a photo"), b = encode(t, "of it"), pair = wrap(t, a, &b);
    EXPECT_EQ(pair.ids, kind["pair"]["ids"].get<std::vector<int32_t>>());
    EXPECT_EQ(pair.type_ids, kind["pair"]["type_ids"].get<std::vector<int32_t>>());
  }
}

TEST(Gpt2, Words) {
  const std::pair<std::string_view, const char *> rows[] = {
      {"two words"sv, "two| words"},
      {"  a   b "sv, " | a|  | b| "},
      {"a \n b\n\nc"sv, "a| \n| b|\n|\n|c"},
      {"a\t b\u00A0c"sv, "a|\t| b|\u00A0|c"},
      {" \n"sv, " \n"},
      {"don't DON'T it's 's"sv, "don|'t| DON|'|T| it|'s| '|s"},
      {"''s 'll'll 'rx"sv, "''|s| '|ll|'ll| '|rx"},
      {"'ve're'd'm"sv, "'ve|'re|'d|'m"},
      {"'1's'"sv, "'|1|'s|'"},
      {"x1 22 3a\u00BD"sv, "x|1| 22| 3|a|\u00BD"},
      {"a, b!? (c)"sv, "a|,| b|!?| (|c|)"},
      {"caf\u00E9s \u65E5\u672C x\u0301y"sv, "caf\u00E9s| \u65E5\u672C| x|\u0301|y"},
  };
  for (const auto &[text, words] : rows) EXPECT_EQ(words_of(text, split(words)), words) << text;
}

// A text that has no token of normalised text passes by the search for them, one that has may not.
TEST(Gpt2, AddedTokensOfSpaces) {
  rs_tokenizer_spec spec = byte_spec();
  spec.tokens.insert(spec.tokens.end(), {"   ", "\u1EC7"});  // the latter composed of what a text may have
  spec.added_ids.insert(spec.added_ids.end(), {258, 259}), spec.added_flags.insert(spec.added_flags.end(), 2, RS_ADDED_NORMALIZED);
  spec.compose = true;
  const auto t = create(spec);
  EXPECT_EQ(show(encode(t, "a  b")), "97:0-1 32:1-2 32:2-3 98:3-4");
  EXPECT_EQ(show(encode(t, "a    b")), "97:0-1 258:1-4 32:4-5 98:5-6");
  EXPECT_EQ(show(encode(t, "e\u0302\u0323")), "259:0-1");
  spec.added_ids.pop_back(), spec.added_flags.pop_back();
  EXPECT_EQ(show(encode(create(spec), "a   b")), "97:0-1 258:1-4 98:4-5");
}

TEST(Gpt2, Continues) {
  const rs_tokenizer_spec spec = golden_spec("modernbert");
  const auto t = create(spec);
  const auto continues = [&](std::string_view text) {
    std::string all;
    const rs_tokens tokens = encode(t, text);
    for (size_t i = 1; i < tokens.ids.size(); i++)
      all += rs_tokenizer_continues(t.get(), tokens.ids[i - 1], tokens.ids[i]) ? '1' : '0';
    return all;
  };
  EXPECT_EQ(continues("xyz"), "11");
  EXPECT_EQ(continues("x y"), "00");
  EXPECT_EQ(continues("x\ny"), "00");
  EXPECT_EQ(continues("x,y"), "00");
  EXPECT_EQ(continues("x12"), "01");
  EXPECT_EQ(continues("#!x"), "10");
  EXPECT_EQ(continues("\u4E2D\u6587x"), "111111");  // of three bytes each
  EXPECT_EQ(continues("\u3002x"), "0");
  EXPECT_EQ(continues("x[MASK]y"), "00");
}

// No code point is an error, alone or between letters, and places are whole characters in order.
TEST(Gpt2, EveryCodePoint) {
  for (const char *kind : {"modernbert", "roberta", "other"}) {
    const auto t = create(golden_spec(kind));
    for (char32_t c = 0; c <= 0x10FFFF; c++) {
      if (c >= 0xD800 && c <= 0xDFFF) continue;
      if (c > 0x20000 && c % 17) continue;
      const std::string text = "e " + utf8(c) + "x";
      const rs_tokens tokens = encode(t, text);
      ASSERT_GE(tokens.ids.size(), 2u) << kind << " " << static_cast<uint32_t>(c);
      for (size_t i = 0; i < tokens.spans.size(); i++) {
        const rs_span s = tokens.spans[i];
        ASSERT_TRUE(s.begin <= s.end && s.end <= text.size() && (i == 0 || tokens.spans[i - 1].begin <= s.begin));
        for (const uint32_t at : {s.begin, s.end})
          ASSERT_TRUE(at == text.size() || (static_cast<uint8_t>(text[at]) & 0xC0) != 0x80) << static_cast<uint32_t>(c);
      }
    }
  }
}

TEST(Gpt2, FromAWeightFile) {
  const temp_dir dir;
  for (const char *kind : {"modernbert", "roberta", "other"}) {
    SCOPED_TRACE(kind);
    const rs_tokenizer_spec spec = golden_spec(kind);
    write_model(dir / "tiny.rsw", spec);
    rs_model *model = nullptr;
    ASSERT_EQ(rs_model_load((dir / "tiny.rsw").c_str(), nullptr, &model), RS_OK) << rs_last_error();
    const std::string_view words = " It's  caf\u00E9 [MASK]";
    const rs_text text = as_text(words);
    int32_t ids[64], types[64];
    rs_span spans[64];
    size_t n = 0;
    ASSERT_EQ(rs_tokenize(model, &text, nullptr, ids, types, spans, 64, &n), RS_OK) << rs_last_error();
    const auto t = create(spec);
    EXPECT_EQ(show(rs_tokens{{ids, ids + n}, {}, {spans, spans + n}}), show(wrap(t, encode(t, words))));
    for (const char *key : {"tokenizer.compose", "tokenizer.prefix_space", "tokenizer.trim_spans", "tokenizer.ignore_merges"}) {
      rs_writer *w = nullptr;
      ASSERT_EQ(rs_writer_open((dir / "spoilt.rsw").c_str(), &w), RS_OK) << rs_last_error();
      EXPECT_EQ(rs_writer_set_i64(w, key, 1), RS_OK);
      EXPECT_EQ(rs_writer_copy(w, model), RS_OK) << rs_last_error();
      EXPECT_EQ(rs_writer_finish(w), RS_OK) << rs_last_error();
      rs_writer_free(w);
      rs_model *spoilt = nullptr;
      EXPECT_NE(rs_model_load((dir / "spoilt.rsw").c_str(), nullptr, &spoilt), RS_OK);
      EXPECT_NE(std::string(rs_last_error()).find(key + " is not true or false"s), std::string::npos) << rs_last_error();
      rs_model_free(spoilt);
    }
    rs_model_free(model);
  }
}

TEST(Gpt2, RefusesWhatMakesNoSense) {
  const struct {
    std::function<void(rs_tokenizer_spec &)> spoil;
    const char *error;
  } rows[] = {
      {[](rs_tokenizer_spec &s) { s.tokens['x'] = ""; }, "tokenizer.tokens: the one of byte 0x78 is missing"},
      {[](rs_tokenizer_spec &s) { s.tokens['x'] = "\u4E2D"; }, "tokenizer.tokens: the one of byte 0x78 is missing"},
      {[](rs_tokenizer_spec &s) { s.tokens.push_back("x"); }, "tokenizer.tokens[258]: 'x' has the id 120 too"},
      {[](rs_tokenizer_spec &s) {
         s.merges = {97, 98};
       },
       "tokenizer.merges[0]: makes 'ab', which is not in the vocabulary"},
  };
  for (const auto &row : rows) {
    rs_tokenizer_spec spec = byte_spec();
    row.spoil(spec);
    rs_tokenizer *t = nullptr;
    EXPECT_EQ(rs_tokenizer_create(spec, &t), RS_ERR_FORMAT) << row.error;
    EXPECT_EQ(t, nullptr);
    EXPECT_NE(std::string(rs_last_error()).find(row.error), std::string::npos) << rs_last_error();
  }
}

// ------------------------------------------------------------------------------------------------ tokenizer.json and older files

TEST(Gpt2, ReadsWhatItKnowsAndNoMore) {
  const auto error_of = [](const json &tokenizer) {
    try {
      read_tokenizer(tokenizer);
      return "none"s;
    } catch (const std::exception &e) {
      return std::string(e.what());
    }
  };
  const json &kinds = golden()["kinds"];
  const struct {
    const char *kind;
    std::function<void(json &)> spoil;
    const char *error;
  } rows[] = {
      {"modernbert",
       [](json &t) {
         t["normalizer"] = {{"type", "NFKC"}};
       },
       "the normalizer is of type 'NFKC', rs knows none and NFC"},
      {"modernbert", [](json &t) { t["normalizer"] = nullptr; }, "none"},
      {"modernbert",
       [](json &t) {
         t["normalizer"] = {{"type", "Sequence"}, {"normalizers", {{{"type", "NFC"}}}}};
       },
       "none"},
      {"modernbert",
       [](json &t) {
         t["pre_tokenizer"] = {{"type", "Whitespace"}};
       },
       "the pre_tokenizer is of type 'Whitespace'"},
      {"modernbert", [](json &t) { t["pre_tokenizer"] = nullptr; }, "the pre_tokenizer is of type 'none'"},
      {"modernbert", [](json &t) { t["pre_tokenizer"]["use_regex"] = false; }, "ByteLevel without use_regex"},
      {"modernbert", [](json &t) { t["model"]["continuing_subword_prefix"] = "##"; }, "BPE with a continuing_subword_prefix"},
      {"modernbert", [](json &t) { t["model"]["dropout"] = 0.1; }, "BPE with dropout"},
      {"modernbert",
       [](json &t) {
         t["post_processor"] = {{"type", "Nothing"}};
       },
       "the post_processor is of type 'Nothing'"},
      {"modernbert", [](json &t) { t["model"]["merges"][3] = "x y z"; }, "merge 3: 'x y z' is not two tokens"},
      {"roberta", [](json &t) { t["post_processor"]["add_prefix_space"] = true; },
       "add_prefix_space is not that of the pre_tokenizer"},
      {"other",
       [](json &t) {
         t["post_processor"]["processors"].push_back({{"type", "ByteLevel"}});
       },
       "the post_processor is of type 'Sequence'"},
  };
  for (const auto &row : rows) {
    json tokenizer = tokenizer_of(kinds[row.kind]);
    row.spoil(tokenizer);
    EXPECT_NE(error_of(tokenizer).find(row.error), std::string::npos) << error_of(tokenizer) << "\nexpected: " << row.error;
  }
  EXPECT_TRUE(read_tokenizer(tokenizer_of(kinds["modernbert"])).compose);
  EXPECT_FALSE(read_tokenizer(tokenizer_of(kinds["roberta"])).compose);
  EXPECT_EQ(read_tokenizer(tokenizer_of(kinds["modernbert"])).special_ids.count("cls"), 1u);
  EXPECT_EQ(read_tokenizer(tokenizer_of(kinds["roberta"])).special_ids.count("pad"), 1u);
}

// A folder without tokenizer.json, as RoBERTa was first published.
TEST(Gpt2, VocabularyAndMergesOfRoberta) {
  const json &kind = golden()["kinds"]["roberta"];
  const json whole = tokenizer_of(kind);
  hf_tokenizer_files files;
  files.vocab_json = whole["model"]["vocab"];
  for (const json &token : whole["added_tokens"]) files.vocab_json[token["content"].get<std::string>()] = token["id"];
  files.has_merges = true;
  files.merges = "#version: 0.2\n";
  for (const json &merge : whole["model"]["merges"]) files.merges += merge.get<std::string>() + "\n";
  files.config = {{"tokenizer_class", "RobertaTokenizer"},
                  {"mask_token", {{"content", "<mask>"}, {"lstrip", true}, {"__type", "AddedToken"}}}};
  const auto t = create(spec_of(read_hf_tokenizer(files)));
  const json &texts = golden()["texts"];
  for (size_t i = 0; i < texts.size(); i++)
    EXPECT_EQ(show(encode(t, texts[i].get<std::string>())), show(expected(kind["rows"][i]))) << texts[i];
  files.config["trim_offsets"] = false;
  EXPECT_FALSE(read_hf_tokenizer(files).trim_spans);
  const rs_tokens a = encode(t, "a photo"), b = encode(t, "of it");
  EXPECT_EQ(wrap(t, a, &b).ids, kind["pair"]["ids"].get<std::vector<int32_t>>());
}

// Whatever tokenizer.json says, RobertaTokenizer of transformers adds no space and trims, but where tokenizer_config.json says so.
TEST(Gpt2, RobertaTokenizerHasSettingsOfItsOwn) {
  hf_tokenizer_files files;
  files.tokenizer = tokenizer_of(golden()["kinds"]["roberta"]);
  const auto settings = [&] {
    const hf_tokenizer t = read_hf_tokenizer(files);
    return std::pair(t.prefix_space, t.trim_spans);
  };
  files.tokenizer["pre_tokenizer"]["add_prefix_space"] = files.tokenizer["post_processor"]["add_prefix_space"] = true;
  files.tokenizer["post_processor"]["trim_offsets"] = false;
  EXPECT_EQ(settings(), std::pair(true, false));
  files.model_type = "roberta";
  EXPECT_EQ(settings(), std::pair(false, true));
  files.config = {{"tokenizer_class", "RobertaTokenizerFast"}, {"add_prefix_space", true}, {"trim_offsets", false}};
  EXPECT_EQ(settings(), std::pair(true, false));
  files.tokenizer["pre_tokenizer"]["add_prefix_space"] = false;
  EXPECT_EQ(settings(), std::pair(true, false));
  files.config["tokenizer_class"] = "PreTrainedTokenizerFast";
  files.tokenizer["post_processor"]["add_prefix_space"] = false;
  EXPECT_EQ(settings(), std::pair(false, false));
}
