// The tokenizer against the tokenizers library of Hugging Face.
//
// "The reference" is tokenizers 0.23.3.  Its answers stand in the tables below as a Python program printed them; its places are in
// characters and were turned into bytes.  Golden files hold thousands more for the real vocabulary.
#include "tokenizer_util.h"

#include <functional>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>

using namespace std::string_literals;
using namespace std::string_view_literals;

namespace {

// ------------------------------------------------------------------------------------------------ help

// A vocabulary of a few pieces.
rs_tokenizer_spec small_spec() {
  rs_tokenizer_spec spec;
  spec.tokens = {"[PAD]",    "[UNK]",  "[CLS]",    "[SEP]", "[MASK]", "un",  "##aff", "##able",    "aff",
                 "able",     "a",      "##a",      "foo",   "##foo",  "bar", "##bar", "caf\u00E9", "cafe",
                 "##\u0301", "\u4E2D", "##\u4E2D", ",",     "##,",    ".",   "#",     "##"};
  spec.single = {2, -1, 3};
  spec.single_types = {0, 0, 0};
  spec.pair = {2, -1, 3, -2, 3};
  spec.pair_types = {0, 0, 0, 1, 1};
  return spec;
}

rs_tokenizer_spec cased(rs_tokenizer_spec spec) {
  spec.lowercase = spec.strip_accents = false;
  return spec;
}

rs_tokenizer_spec with_prefix(const char *prefix) {
  rs_tokenizer_spec spec = small_spec();
  spec.prefix = prefix;
  return spec;
}

// The small vocabulary with added tokens; those that it lacks come after it.
rs_tokenizer_spec with_added(const std::vector<std::pair<const char *, int64_t>> &added) {
  rs_tokenizer_spec spec = small_spec();
  for (const auto &[token, flags] : added) {
    auto at = std::find(spec.tokens.begin(), spec.tokens.end(), token);
    const bool outside = at == spec.tokens.end();
    spec.added_ids.push_back(at - spec.tokens.begin());
    spec.added_flags.push_back(flags | (outside ? RS_ADDED_OUTSIDE : 0));
    if (outside) spec.tokens.emplace_back(token);
  }
  return spec;
}

// "" when the weights are not there.
std::string minilm_vocab() { return model_dir().empty() ? "" : path_if_exists(model_dir() + "/vocab.txt"); }

tokenizer_ptr create_minilm() {
  rs_tokenizer_spec spec;
  std::ifstream in(minilm_vocab());
  for (std::string line; std::getline(in, line);) spec.tokens.push_back(line);
  spec.added_ids = {0, 100, 101, 102, 103};
  spec.added_flags.assign(5, RS_ADDED_SPECIAL);
  spec.single = {101, -1, 102};
  spec.single_types = {0, 0, 0};
  spec.pair = {101, -1, 102, -2, 102};
  spec.pair_types = {0, 0, 0, 1, 1};
  return create(spec);
}

#define RS_NEED_VOCAB() \
  if (minilm_vocab().empty()) GTEST_SKIP() << "needs vocab.txt of all-MiniLM-L6-v2 in $RS_TEST_MODEL_DIR, which is not there"

std::vector<std::string> characters(std::string_view s) {
  std::vector<std::string> all;
  for (const char byte : s) {
    if ((static_cast<unsigned char>(byte) & 0xC0) != 0x80) all.emplace_back();
    all.back() += byte;
  }
  return all;
}

// ------------------------------------------------------------------------------------------------ golden files

TEST(Tokenizer, GoldenTexts) {
  RS_NEED_SHARED("golden/wordpiece.jsonl");
  RS_NEED_VOCAB();
  const auto t = create_minilm();
  std::ifstream in(shared_file("golden/wordpiece.jsonl"));
  size_t lines = 0;
  for (std::string line; std::getline(in, line); lines++) {
    const auto row = nlohmann::json::parse(line);
    const auto text = row["text"].get<std::string>();
    EXPECT_EQ(wrap(t, encode(t, text)).ids, row["ids"].get<std::vector<int32_t>>()) << line;
  }
  EXPECT_GT(lines, 3000u);
}

TEST(Tokenizer, GoldenPairs) {
  RS_NEED_SHARED("golden/wordpiece_pairs.jsonl");
  RS_NEED_VOCAB();
  const auto t = create_minilm();
  std::ifstream in(shared_file("golden/wordpiece_pairs.jsonl"));
  size_t lines = 0;
  for (std::string line; std::getline(in, line); lines++) {
    const auto row = nlohmann::json::parse(line);
    const rs_tokens b = encode(t, row["b"].get<std::string>());
    const rs_tokens both = wrap(t, encode(t, row["a"].get<std::string>()), &b);
    EXPECT_EQ(both.ids, row["ids"].get<std::vector<int32_t>>()) << line;
    EXPECT_EQ(both.type_ids, row["type_ids"].get<std::vector<int32_t>>()) << line;
  }
  EXPECT_GT(lines, 100u);
}

TEST(Tokenizer, RealVocabulary) {
  RS_NEED_VOCAB();
  const auto t = create_minilm();
  // tokenizers.Tokenizer.from_file("tokenizer.json").encode(text).ids
  const struct {
    std::string_view text;
    std::vector<int32_t> ids;
  } rows[] = {
      {"The quick brown fox jumps over the lazy dog."sv, {101, 1996, 4248, 2829, 4419, 14523, 2058, 1996, 13971, 3899, 1012, 102}},
      {"Donaudampfschifffahrtsgesellschaft unaffable playing"sv,
       {101, 24260, 14066, 8737, 10343, 5428, 4246, 7011, 8093, 3215, 8449, 5349, 26527, 14477, 20961, 3468, 2652, 102}},
      {"na\u00EFve caf\u00E9 \u0130stanbul \u1E9E"sv, {101, 15743, 7668, 9960, 1096, 102}},
      {"\u65E5\u672C\u8A9E\u306E\u30C6\u30AD\u30B9\u30C8\u3067\u3059\u3002"sv,
       {101, 1864, 1876, 1950, 1671, 30239, 30227, 30233, 30240, 30191, 30184, 1636, 102}},
      {"\uD55C\uAD6D\uC5B4 \uBB38\uC7A5"sv,
       {101, 1469, 30006, 30021, 29991, 30014, 30020, 29999, 30008, 1459, 30014, 30021, 30000, 30006, 30025, 102}},
      {"\u041F\u0440\u0438\u0432\u0435\u0442, \u043C\u0438\u0440"sv,
       {101, 1194, 16856, 10325, 25529, 15290, 22919, 1010, 1191, 10325, 16856, 102}},
      {"I [MASK] you[SEP]and [mask]"sv, {101, 1045, 103, 2017, 102, 1998, 1031, 7308, 1033, 102}},
      {"$1,234.56 (50%) \u2014 e=mc\u00B2"sv,
       {101, 1002, 1015, 1010, 22018, 1012, 5179, 1006, 2753, 1003, 1007, 1517, 1041, 1027, 11338, 10701, 102}},
      {"\U0001F468\u200D\U0001F469 \u2764\uFE0F ok"sv, {101, 100, 100, 7929, 102}},
      {"a\000b\uFFFDc\u00ADd"sv, {101, 5925, 2094, 102}},
      {"https://example.org/a_b?c=d&e=%20"sv, {101,  16770, 1024, 1013, 1013, 2742, 1012, 8917, 1013, 1037, 1035,
                                               1038, 1029,  1039, 1027, 1040, 1004, 1041, 1027, 1003, 2322, 102}},
      {""sv, {101, 102}},
  };
  for (const auto &row : rows) EXPECT_EQ(wrap(t, encode(t, row.text)).ids, row.ids) << row.text;
}

// ------------------------------------------------------------------------------------------------ normalisation

// Unknown words hide what became of their characters.  So this vocabulary has every character of the words that should come out,
// at the beginning of a word and inside, and the words are put together again.
struct word {
  std::string text;
  uint32_t begin, end;
};

std::vector<word> words_of(const rs_tokenizer_spec &settings, std::string_view text, const std::vector<word> &expected) {
  rs_tokenizer_spec spec = settings;
  spec.tokens = {"[UNK]"};
  for (const word &w : expected)
    for (const std::string &c : characters(w.text)) {
      spec.tokens.push_back(c);
      spec.tokens.push_back("##" + c);
    }
  const auto t = create(spec);
  const rs_tokens tokens = encode(t, text);
  std::vector<word> words;
  for (size_t i = 0; i < tokens.ids.size(); i++) {
    const int32_t id = tokens.ids[i];
    if (id == 0) {
      words.push_back({"[UNK]", tokens.spans[i].begin, tokens.spans[i].end});
    } else if (id % 2) {
      words.push_back({spec.tokens[static_cast<size_t>(id)], tokens.spans[i].begin, tokens.spans[i].end});
    } else {
      words.back().text += spec.tokens[static_cast<size_t>(id)].substr(2);
      words.back().end = tokens.spans[i].end;
    }
  }
  return words;
}

std::string show(const std::vector<word> &words) {
  std::string s;
  for (const word &w : words) s += "'" + w.text + "' " + std::to_string(w.begin) + "-" + std::to_string(w.end) + "  ";
  return s;
}

TEST(Tokenizer, NormalizedWords) {
  // BertNormalizer and BertPreTokenizer of the reference.  Settings: c clean_text, z chinese_chars, a strip_accents, l lowercase.
  const struct {
    std::string_view settings, text;
    std::vector<word> words;
  } rows[] = {
      // accents
      {"czal",
       "Caf\u00E9 \u00DCn\u00EF\u00E7\u00F6d\u00E9 r\u00E9sum\u00E9s"sv,
       {{"cafe", 0, 5}, {"unicode", 6, 18}, {"resumes", 19, 28}}},
      {"czl", "Caf\u00E9 e\u0301A\u0301"sv, {{"caf\u00E9", 0, 5}, {"e\u0301a\u0301", 6, 12}}},
      {"cz", "Caf\u00E9 \u0130"sv, {{"Caf\u00E9", 0, 5}, {"\u0130", 6, 8}}},
      {"cza", "Caf\u00E9 \u0130 e\u0301A\u0301"sv, {{"Cafe", 0, 5}, {"I", 6, 8}, {"eA", 9, 13}}},
      // the letter that becomes two
      {"czl", "x\u0130I\u0131\u00DF\u1E9E"sv, {{"xi\u0307i\u0131\u00DF\u00DF", 0, 11}}},
      {"czal", "x\u0130I\u0131\u00DF\u1E9E"sv, {{"xii\u0131\u00DF\u00DF", 0, 11}}},
      // no final sigma
      {"czal",
       "\u03A3\u0399\u03A3\u03A5\u03A6\u039F\u03A3 \u038F"sv,
       {{"\u03C3\u03B9\u03C3\u03C5\u03C6\u03BF\u03C3", 0, 14}, {"\u03C9", 15, 17}}},
      {"czl", "\u01C5\u2160\u24B6\u212A\u2126"sv, {{"\u01C6\u2170\u24D0k\u03C9", 0, 14}}},
      // capitals of Unicode 16 and 17
      {"czl", "\u1C89\uA7CB\uA7DC\U00010D50\U00016EA0"sv, {{"\u1C8A\u0264\u019B\U00010D70\U00016EBB", 0, 17}}},
      {"czal",
       "\uD55C\uAD6D\uC5B4 \uAC00"sv,
       {{"\u1112\u1161\u11AB\u1100\u116E\u11A8\u110B\u1165", 0, 9}, {"\u1100\u1161", 10, 13}}},
      // Chinese characters stand alone
      {"czal",
       "\u4E2D\u6587ab\u3400\u3042\U00020000c"sv,
       {{"\u4E2D", 0, 3},
        {"\u6587", 3, 6},
        {"ab", 6, 8},
        {"\u3400", 8, 11},
        {"\u3042", 11, 14},
        {"\U00020000", 14, 18},
        {"c", 18, 19}}},
      {"cal", "\u4E2D\u6587ab"sv, {{"\u4E2D\u6587ab", 0, 8}}},
      // they are set apart first, then decomposed
      {"czal", "x\uF900y\U0002F800z"sv, {{"x", 0, 1}, {"\u8C48", 1, 4}, {"y", 4, 5}, {"\u4E3D", 5, 9}, {"z", 9, 10}}},
      // what counts as Chinese has holes
      {"czal",
       "a\U0002B820b\U0002CEB0c\U00030000d\u9FFFe\u4DC0f"sv,
       {{"a\U0002B820b\U0002CEB0c\U00030000d", 0, 16}, {"\u9FFF", 16, 19}, {"e\u4DC0f", 19, 24}}},
      // dropped, and the word goes on
      {"czal", "a\000b\u00ADc\u200Bd\uFEFFe\uFFFDf\302\205g\013h\177i\uE000j\U000F0000k"sv, {{"abcdefghijk", 0, 34}}},
      {"zal", "a\000b\u00ADc\u200Bd\uFFFDf"sv, {{"a\000b\u00ADc\u200Bd\uFFFDf"s, 0, 14}}},
      // whitespace either way
      {"zal",
       "a\011b\013c\302\205d\u2028e\u3000f\034g"sv,
       {{"a", 0, 1}, {"b", 2, 3}, {"c", 4, 5}, {"d", 7, 8}, {"e", 11, 12}, {"f\034g", 15, 18}}},
      {"czal",
       "a\011b\u00A0c\u2028d\u2009e\u3000f\u1680g\u180Eh"sv,
       {{"a", 0, 1}, {"b", 2, 3}, {"c", 5, 6}, {"d", 9, 10}, {"e", 13, 14}, {"f", 17, 18}, {"gh", 21, 26}}},
      // not assigned is a letter, private use is not; so are the format characters of after Unicode 8.0
      {"czal", "a\u0378b\U000E0FFFc\U0010FFFFd\u0605e\u08E2f"sv, {{"a\u0378b\U000E0FFFc\U0010FFFFde\u08E2f", 0, 21}}},
      {"czal",
       "don't x_y $5<=6^7`8|9~ #a@b"sv,
       {{"don", 0, 3}, {"'", 3, 4},   {"t", 4, 5},   {"x", 6, 7},   {"_", 7, 8},   {"y", 8, 9},   {"$", 10, 11}, {"5", 11, 12},
        {"<", 12, 13}, {"=", 13, 14}, {"6", 14, 15}, {"^", 15, 16}, {"7", 16, 17}, {"`", 17, 18}, {"8", 18, 19}, {"|", 19, 20},
        {"9", 20, 21}, {"~", 21, 22}, {"#", 23, 24}, {"a", 24, 25}, {"@", 25, 26}, {"b", 26, 27}}},
      {"czal",
       "\u00ABx\u00BB\u2026\u2014y\uFF01\uFF08z\uFF09\u3001\u30FB\u00B0\u00A7\u00B6\u20AC"sv,
       {{"\u00AB", 0, 2},
        {"x", 2, 3},
        {"\u00BB", 3, 5},
        {"\u2026", 5, 8},
        {"\u2014", 8, 11},
        {"y", 11, 12},
        {"\uFF01", 12, 15},
        {"\uFF08", 15, 18},
        {"z", 18, 19},
        {"\uFF09", 19, 22},
        {"\u3001", 22, 25},
        {"\u30FB", 25, 28},
        {"\u00B0", 28, 30},
        {"\u00A7", 30, 32},
        {"\u00B6", 32, 34},
        {"\u20AC", 34, 37}}},
      // punctuation of Unicode 8.0, not of later
      {"czal",
       "a\u166Db\U000111C9c\u2E43d\u0A76e\U0001E95Ef"sv,
       {{"a", 0, 1}, {"\u166D", 1, 4}, {"b", 4, 5}, {"\U000111C9", 5, 9}, {"c\u2E43d\u0A76e\U0001E95Ef", 9, 23}}},
      // nonspacing marks of Unicode 8.0, not of later
      {"czal", "a\u1734b\U0001171Ec\u1ABFd\U0001E944e\u08D4f"sv, {{"abc\u1ABFd\U0001E944e\u08D4f", 0, 23}}},
      // decomposed into punctuation
      {"czal", "\u2260\u037E\u1FEF\u226F"sv, {{"=", 0, 3}, {";", 3, 5}, {"`", 5, 8}, {">", 8, 11}}},
      // marks change their order, places do not
      {"czal", "q\u0307\u0323\U0001D165\u0334x\u0301"sv, {{"q\U0001D165x", 0, 12}}},
      {"cza", "\u1EAD\u0344\u0323\U0001D165\u0F73\u0F71"sv, {{"a\U0001D165", 0, 11}}},
      // what is dropped does not keep marks apart
      {"czal", "a\u0301\u200D\U0001D165\000\u0323\U0001D16Eb"sv, {{"a\U0001D165\U0001D16Eb", 0, 18}}},
      {"czal", "\u0301 \u0301\u0302\U0001D165 \u3099"sv, {{"\U0001D165", 3, 5}}},
      {"czal",
       "\U0001F468\u200D\U0001F469\u200D\U0001F467 \U0001F1E9\U0001F1EA 1\uFE0F\u20E3 \u2764\uFE0F"sv,
       {{"\U0001F468\U0001F469\U0001F467", 0, 18}, {"\U0001F1E9\U0001F1EA", 19, 27}, {"1\u20E3", 28, 35}, {"\u2764", 36, 39}}},
      // no compatibility decomposition
      {"czal", "\uFB01\u00BD\u2122\u2460"sv, {{"\uFB01\u00BD\u2122\u2460", 0, 11}}},
      {"czal",
       "\u0E20\u0E32\u0E29\u0E32\u0E44\u0E17\u0E22 \u0939\u093F\u0928\u094D\u0926\u0940 \u05E9\u05B8\u05C1"sv,
       {{"\u0E20\u0E32\u0E29\u0E32\u0E44\u0E17\u0E22", 0, 21}, {"\u0939\u093F\u0928\u0926\u0940", 22, 40}, {"\u05E9", 41, 43}}},
      {"czal", ""sv, {}},
      {"czal", " \011\015\012 \000\u0301"sv, {}},
      {"", "\u4E2D \u00C9\000\u0301 A"sv, {{"\u4E2D", 0, 3}, {"\u00C9\000\u0301"s, 4, 9}, {"A", 10, 11}}},
  };
  for (const auto &row : rows) {
    rs_tokenizer_spec spec = small_spec();
    spec.single = {-1}, spec.single_types = {0}, spec.pair = {-1, -2}, spec.pair_types = {0, 0};
    spec.clean_text = row.settings.find('c') != std::string::npos;
    spec.chinese_chars = row.settings.find('z') != std::string::npos;
    spec.strip_accents = row.settings.find('a') != std::string::npos;
    spec.lowercase = row.settings.find('l') != std::string::npos;
    EXPECT_EQ(show(words_of(spec, row.text, row.words)), show(row.words)) << row.settings << ": " << row.text;
  }
}

// ------------------------------------------------------------------------------------------------ pieces, added tokens

struct small_case {
  rs_tokenizer_spec spec;
  std::vector<std::pair<std::string_view, const char *>> rows;  // a text, and what show() should say
};

void check(const std::vector<small_case> &cases) {
  for (size_t i = 0; i < cases.size(); i++) {
    const auto t = create(cases[i].spec);
    ASSERT_TRUE(t);
    for (const auto &[text, expected] : cases[i].rows) EXPECT_EQ(show(encode(t, text)), expected) << "case " << i << ": " << text;
  }
}

TEST(Tokenizer, Pieces) {
  // Encoding.ids and .offsets of the reference.
  check({
      {small_spec(),
       {
           {"unaffable"sv, "5:0-2 6:2-5 7:5-9"},
           {"UNAFFABLE, affable."sv, "5:0-2 6:2-5 7:5-9 21:9-10 8:11-14 7:14-18 23:18-19"},
           {"unaffablex"sv, "1:0-10"},
           {"ununun"sv, "1:0-6"},
           {"aaa aab"sv, "10:0-1 11:1-2 11:2-3 1:4-7"},
           {"un\000aff\u00ADable"sv, "5:0-2 6:3-6 7:8-12"},
           {"fo\u0301o caf\u00E9s \u00E9"sv, "12:0-5 1:6-12 1:13-15"},
           {"##"sv, "24:0-1 24:1-2"},
           {"#"sv, "24:0-1"},
           {"un##able"sv, "5:0-2 24:2-3 24:3-4 9:4-8"},
           {",,"sv, "21:0-1 21:1-2"},
           {"a\u4E2Db\u4E2D\u4E2D"sv, "10:0-1 19:1-4 1:4-5 19:5-8 19:8-11"},
           {"f\u0300oo\u0327bar"sv, "12:0-5 15:7-10"},
       }},
      {cased(small_spec()),
       {
           {"Caf\u00E9 caf\u00E9 cafe\u0301 cafe"sv, "1:0-5 16:6-11 17:12-16 18:16-18 17:19-23"},
       }},
      {with_prefix(""),
       {
           {"unaffable fooable affun"sv, "5:0-2 8:2-5 9:5-9 12:10-13 9:13-17 8:18-21 5:21-23"},
       }},
      {with_prefix("a"),
       {
           {"aff unff foofoo aaa"sv, "8:0-3 5:4-6 8:6-8 1:9-15 1:16-19"},
       }},
  });
}

TEST(Tokenizer, AddedTokens) {
  // Encoding.ids and .offsets of the reference.
  check({
      {with_added({{"[PAD]", 16}, {"[UNK]", 16}, {"[CLS]", 16}, {"[SEP]", 16}, {"[MASK]", 16}}),
       {
           {"a [MASK] a"sv, "10:0-1 4:2-8 10:9-10"},
           {"a[MASK]a[SEP]"sv, "10:0-1 4:1-7 10:7-8 3:8-13"},
           {"[mask] [MASK ] [[MASK]]"sv, "1:0-1 1:1-5 1:5-6 1:7-8 1:8-12 1:13-14 1:15-16 4:16-22 1:22-23"},
           {"un[MASK]able"sv, "5:0-2 4:2-8 9:8-12"},
           {"[MASK"sv, "1:0-1 1:1-5"},
           {"caf\u00E9[CLS]\u0301a"sv, "17:0-5 2:5-10 10:12-13"},
           {""sv, ""},
           {"[MASK][MASK]"sv, "4:0-6 4:6-12"},
       }},
      {with_added({{"qux", RS_ADDED_SINGLE_WORD}}),
       {
           {"qux quxbar barqux qux, \u00E9qux qux_a qux\u0301 (qux) qux\u200D \u2160qux \u24B6qux"sv,
            "26:0-3 1:4-10 1:11-17 26:18-21 21:21-22 1:23-28 1:29-32 1:32-33 10:33-34 1:35-38 1:41-42 26:42-45 1:45-46 1:47-50 "
            "1:54-60 1:61-67"},
       }},
      {with_added({{"foo", RS_ADDED_LSTRIP | RS_ADDED_RSTRIP}}),
       {
           {"a  foo \u3000 bar"sv, "10:0-1 12:1-11 14:11-14"},
           {"foo foo  foo"sv, "12:0-4 12:4-9 12:9-12"},
           {"a\302\205foo\u200Bfoo"sv, "10:0-1 12:1-6 12:9-12"},
       }},
      {with_added({{"foo", RS_ADDED_LSTRIP}}),
       {
           {"a  foo \u3000 bar"sv, "10:0-1 12:1-6 14:11-14"},
       }},
      {with_added({{"foo", RS_ADDED_RSTRIP}}),
       {
           {"a  foo \u3000 bar"sv, "10:0-1 12:3-11 14:11-14"},
       }},
      {with_added({{"Foo", RS_ADDED_NORMALIZED}}),
       {
           {"F\u00D3O foo fo\000o barFoobar"sv, "26:0-4 26:5-8 26:9-13 14:14-17 26:17-20 14:20-23"},
           {"a \u3000FOO  a"sv, "10:0-1 26:5-8 10:10-11"},
       }},
      {with_added({{"FOO", RS_ADDED_NORMALIZED | RS_ADDED_LSTRIP | RS_ADDED_RSTRIP}}),
       {
           {"a\u0301  fo\u0301o\000  a FO\u00D3"sv, "10:0-1 26:3-13 10:13-14 26:14-19"},
       }},
      {with_added({{"a b", RS_ADDED_NORMALIZED}}),
       {
           {"A\011B a b"sv, "26:0-3 26:4-7"},
       }},
      {with_added({{"\u4E2D", RS_ADDED_NORMALIZED}}),
       {
           {"a\u4E2Da"sv, "10:0-1 19:1-4 10:4-5"},
       }},
      // Leftmost first, then the longest; one that is refused for its neighbours still takes its place.
      {with_added({{"xx", 0}, {"xxx", 0}, {"axx", 0}}),
       {
           {"xx xxx xxxx axx"sv, "26:0-2 27:3-6 27:7-10 1:10-11 28:12-15"},
           {"axxxx"sv, "28:0-3 26:3-5"},
       }},
      {with_added({{"xx", 0}, {"xxx", RS_ADDED_SINGLE_WORD}}),
       {
           {"a xxxx xxx"sv, "10:0-1 1:2-6 27:7-10"},
       }},
      // What is not in the vocabulary of the model is no piece of a word.
      {with_added({{"newword", RS_ADDED_SINGLE_WORD}, {"##newable", 0}}),
       {
           {"newwordable newword a"sv, "1:0-11 26:12-19 10:20-21"},
       }},
      // The whitespace that one has taken may begin the next.
      {with_added({{"xx", RS_ADDED_RSTRIP}, {" yy", 0}}),
       {
           {"a xx yy a"sv, "10:0-1 26:2-5 27:4-7 10:8-9"},
           {"a xx   yy a"sv, "10:0-1 26:2-7 27:6-9 10:10-11"},
       }},
      // What is behind such a one is text again.
      {with_added({{"xx", RS_ADDED_RSTRIP}, {"\n", 0}, {"yy", RS_ADDED_LSTRIP}}),
       {
           {"a xx\n\ta"sv, "10:0-1 26:2-6 27:4-5 10:6-7"},
           {"xx\n\tyy a"sv, "26:0-4 27:2-3 28:3-6 10:7-8"},
           {"xx \n yy"sv, "26:0-5 27:3-4 28:4-7"},
       }},
  });
}

TEST(Tokenizer, OfEqualTokensTheLastCounts) {
  rs_tokenizer_spec spec = small_spec();
  spec.tokens.insert(spec.tokens.end(), {"foo", "##able"});
  EXPECT_EQ(show(encode(create(spec), "foo unable")), "26:0-3 5:4-6 27:6-10");
}

TEST(Tokenizer, LongWords) {
  rs_tokenizer_spec spec = small_spec();
  spec.tokens.insert(spec.tokens.end(), {"\u00E9", "##\u00E9", "\u1100", "##\u1161"});
  const auto repeat = [](size_t n, std::string_view s) {
    std::string all;
    while (n--) all += s;
    return all;
  };
  const auto lower = create(spec), accents = create(cased(spec));
  EXPECT_EQ(encode(lower, repeat(99, "a")).ids.size(), 99u);
  EXPECT_EQ(encode(lower, repeat(100, "A")).ids.size(), 100u);
  EXPECT_EQ(show(encode(lower, repeat(101, "a"))), "1:0-101");
  EXPECT_EQ(show(encode(lower, repeat(101, "a") + " a, a" + repeat(100, "\u00E0") + "a")),
            "1:0-101 10:102-103 21:103-104 1:105-307");
  // The limit counts characters, after normalisation.
  EXPECT_EQ(encode(accents, repeat(100, "\u00E9")).ids.size(), 100u);
  EXPECT_EQ(show(encode(accents, repeat(101, "\u00E9"))), "1:0-202");
  EXPECT_EQ(encode(lower, repeat(100, "a\u0301\u200B")).ids.size(), 100u);
  EXPECT_EQ(show(encode(lower, repeat(51, "\uAC00") + " a")), "1:0-153 10:154-155");
  // Words of megabytes, in every way that there is to read them.
  const size_t n = 3000000;
  for (const char *unit : {"a", "\u00E9", "a\u200B", "\uAC00", "a\u4E01\u0301\u0316"}) {
    const std::string text = repeat(n / std::strlen(unit), unit);
    EXPECT_FALSE(encode(lower, text + " a").ids.empty());
    EXPECT_FALSE(encode(accents, text + " a").ids.empty());
  }
  EXPECT_EQ(show(encode(lower, repeat(n, "a") + "\u00E9" + repeat(n, "a"))), "1:0-" + std::to_string(2 * n + 2));
  spec.max_word_chars = 2;
  EXPECT_EQ(show(encode(create(spec), "aa aaa a")), "10:0-1 11:1-2 1:3-6 10:7-8");
}

TEST(Tokenizer, SpansOfReorderedMarks) {
  // Marks that stay: U+1D165 is spacing (combining class 216); the reference knows the class of U+1E94A (7), of Unicode 9.0, but
  // not that it is a mark.  The second line is what its offsets say: places keep their order while the marks change theirs.
  rs_tokenizer_spec spec = small_spec();
  spec.tokens = {"[UNK]", "q", "##\U0001D165", "##\U0001E94A", "a"};
  spec.single = {-1}, spec.single_types = {0}, spec.pair = {-1, -2}, spec.pair_types = {0, 0};
  EXPECT_EQ(show(encode(create(spec), "q\U0001D165\U0001E94A")), "1:0-1 3:1-5 2:5-9");
  EXPECT_EQ(show(encode(create(spec), "\u00E1\U0001D165\u0334\U0001E94A")), "4:0-2 3:6-8 2:8-12");
}

TEST(Tokenizer, NoTokenWithoutText) {
  const auto t = create(small_spec());
  for (const std::string_view text : {""sv, " "sv, "\t\r\n\u3000"sv, "\0\0"sv, "\uFFFD\u200B\u0301"sv})
    EXPECT_EQ(show(encode(t, text)), "");
  rs_tokens tokens;
  const auto scratch = rs_tokenizer_scratch_new();
  EXPECT_EQ(rs_tokenizer_encode(t.get(), scratch.get(), {nullptr, 0}, &tokens), RS_OK);
  EXPECT_EQ(rs_tokenizer_encode(t.get(), scratch.get(), {nullptr, 1}, &tokens), RS_ERR_ARGUMENT);
  EXPECT_EQ(rs_tokenizer_encode(t.get(), scratch.get(), {nullptr, RS_NUL_TERMINATED}, &tokens), RS_ERR_ARGUMENT);
  EXPECT_EQ(rs_tokenizer_encode(t.get(), scratch.get(), {"foo bar\0foo", RS_NUL_TERMINATED}, &tokens), RS_OK);
  EXPECT_EQ(show(tokens), "12:0-3 14:4-7");
}

// ------------------------------------------------------------------------------------------------ properties

// Text in several scripts, with marks, controls, added tokens and long words in it.
std::string random_text(std::mt19937 &rng) {
  const auto below = [&](size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(rng); };
  const std::vector<std::pair<char32_t, char32_t>> blocks = {
      {0x20, 0x7E},     {0x20, 0x7E},     {0, 0x1F},        {0x80, 0x24F},    {0x300, 0x36F},    {0x400, 0x4FF},
      {0x1E00, 0x1FFF}, {0x2000, 0x206F}, {0x4E00, 0x4E20}, {0xAC00, 0xAC80}, {0x1D158, 0x1D190}};
  const std::string_view parts[] = {"foo", "bar", "unaffable ", "[MASK]", " ", "caf\u00E9", "\u0344\u0323", "aaa", "\u0130"};
  std::string s;
  for (size_t n = below(30); n > 0; n--) {
    if (below(2)) {
      s += parts[below(std::size(parts))];
    } else {
      const auto &[first, last] = blocks[below(blocks.size())];
      s += utf8(first + static_cast<char32_t>(below(last - first + 1)));
    }
  }
  return s;
}

TEST(Tokenizer, TextsDoNotDependOnEachOther) {
  const auto t = create(with_added({{"[MASK]", 16}, {"foo", RS_ADDED_NORMALIZED | RS_ADDED_SINGLE_WORD}}));
  const auto scratch = rs_tokenizer_scratch_new();
  std::mt19937 rng(1);
  for (int i = 0; i < 2000; i++) {
    const std::string text = random_text(rng);
    rs_tokens reused;
    ASSERT_EQ(rs_tokenizer_encode(t.get(), scratch.get(), as_text(text), &reused), RS_OK);
    EXPECT_EQ(show(reused), show(encode(t, text))) << text;
    for (const rs_span &span : reused.spans) EXPECT_TRUE(span.begin < span.end && span.end <= text.size()) << text;
  }
}

TEST(Tokenizer, LinesAreTokenizedAsOne) {
  const auto t = create(with_added({{"[MASK]", 16}}));
  std::mt19937 rng(2);
  for (int i = 0; i < 2000; i++) {
    const std::string a = random_text(rng), b = random_text(rng);
    const rs_tokens of_a = encode(t, a), of_b = encode(t, b), both = encode(t, a + "\n" + b);
    rs_tokens expected = of_a;
    for (size_t k = 0; k < of_b.ids.size(); k++) {
      const auto shift = static_cast<uint32_t>(a.size() + 1);
      expected.ids.push_back(of_b.ids[k]);
      expected.spans.push_back({of_b.spans[k].begin + shift, of_b.spans[k].end + shift});
    }
    EXPECT_EQ(show(both), show(expected)) << a << "\n" << b;
  }
}

TEST(Tokenizer, WhatItSaysIsTokenizedTheSame) {
  // Words that are all known, put together from their tokens and tokenized again.
  const rs_tokenizer_spec spec = small_spec();
  const auto t = create(spec);
  std::mt19937 rng(3);
  for (int i = 0; i < 2000; i++) {
    const rs_tokens tokens = encode(t, random_text(rng));
    std::string text;
    for (const int32_t id : tokens.ids) {
      const std::string token = rs_tokenizer_token(t.get(), id);
      if (id == 1) text += " \u0378";  // a word that is unknown again
      else text += token.size() > 2 && token.compare(0, 2, "##") == 0 ? token.substr(2) : " " + token;
    }
    EXPECT_EQ(encode(t, text).ids, tokens.ids) << text;
  }
}

TEST(Tokenizer, SharedByThreads) {
  const auto t = create(with_added({{"[MASK]", 16}}));
  const auto work = [&t](std::string *shown) {
    std::mt19937 rng(4);
    for (int i = 0; i < 500; i++) *shown += show(encode(t, random_text(rng))) + "\n";
  };
  std::string alone, first, second;
  work(&alone);
  std::thread a(work, &first), b(work, &second);
  a.join();
  b.join();
  EXPECT_EQ(first, alone);
  EXPECT_EQ(second, alone);
}

// ------------------------------------------------------------------------------------------------ UTF-8

TEST(Tokenizer, InvalidUtf8) {
  const struct {
    std::string_view text;
    const char *error;
  } rows[] = {
      {"foo \xFF", "invalid UTF-8 at byte 4 (0xff)"},
      {"\x80", "invalid UTF-8 at byte 0 (0x80)"},  // no lead byte
      {"a\xBF\xBF", "invalid UTF-8 at byte 1 (0xbf)"},
      {"a\xC3", "invalid UTF-8 at byte 1 (0xc3)"},  // cut off
      {"\xC3(", "invalid UTF-8 at byte 0 (0xc3)"},
      {"\u00E9\xE2\x82", "invalid UTF-8 at byte 2 (0xe2)"},
      {"\xE2\x82 ", "invalid UTF-8 at byte 0 (0xe2)"},
      {"\xF0\x9F\x98", "invalid UTF-8 at byte 0 (0xf0)"},
      {"\xF0\x9F\x98z", "invalid UTF-8 at byte 0 (0xf0)"},
      {"\xC0\x80", "invalid UTF-8 at byte 0 (0xc0)"},  // longer than need be
      {"\xC1\xBF", "invalid UTF-8 at byte 0 (0xc1)"},
      {"\xE0\x9F\xBF", "invalid UTF-8 at byte 0 (0xe0)"},
      {"\xF0\x8F\xBF\xBF", "invalid UTF-8 at byte 0 (0xf0)"},
      {"\xED\xA0\x80", "invalid UTF-8 at byte 0 (0xed)"},  // surrogates
      {"\xED\xBF\xBF", "invalid UTF-8 at byte 0 (0xed)"},
      {"\xF4\x90\x80\x80", "invalid UTF-8 at byte 0 (0xf4)"},  // beyond U+10FFFF
      {"\xF5\x80\x80\x80", "invalid UTF-8 at byte 0 (0xf5)"},
      {"\xF8\x88\x80\x80\x80", "invalid UTF-8 at byte 0 (0xf8)"},
      {"0123456789abcdef\xFE", "invalid UTF-8 at byte 16 (0xfe)"},
      {"[MASK] 0123456789\xC3", "invalid UTF-8 at byte 17 (0xc3)"},
  };
  const auto t = create(with_added({{"[MASK]", 16}}));
  const auto scratch = rs_tokenizer_scratch_new();
  rs_tokens tokens = encode(t, "foo");
  for (const auto &row : rows) {
    // The text ends where its memory does, so that a sanitizer sees every byte that is read beyond.
    const std::vector<char> memory(row.text.begin(), row.text.end());
    EXPECT_EQ(rs_tokenizer_encode(t.get(), scratch.get(), {memory.data(), memory.size()}, &tokens), RS_ERR_TEXT);
    EXPECT_STREQ(rs_last_error(), row.error);
    EXPECT_EQ(show(tokens), "12:0-3");
  }
  EXPECT_EQ(rs_tokenizer_encode(t.get(), scratch.get(), as_text("bar"), &tokens), RS_OK);
  EXPECT_EQ(show(tokens), "12:0-3 14:0-3");
}

TEST(Tokenizer, EveryCodePoint) {
  const auto lower = create(with_added({{"qux", RS_ADDED_SINGLE_WORD}})), accents = create(cased(small_spec()));
  const auto scratch = rs_tokenizer_scratch_new();
  rs_tokens tokens;
  for (char32_t c = 0; c < 0x110000; c++) {
    const std::string text = "a" + utf8(c) + "a qux" + utf8(c);
    const rs_status expected = c >= 0xD800 && c < 0xE000 ? RS_ERR_TEXT : RS_OK;
    for (const auto *t : {&lower, &accents}) {
      tokens.clear();
      ASSERT_EQ(rs_tokenizer_encode(t->get(), scratch.get(), as_text(text), &tokens), expected) << static_cast<uint32_t>(c);
    }
  }
}

TEST(Tokenizer, RandomBytes) {
  const auto t = create(with_added({{"[MASK]", 16}, {"foo", RS_ADDED_NORMALIZED}}));
  const auto scratch = rs_tokenizer_scratch_new();
  std::mt19937 rng(5);
  rs_tokens tokens;
  for (int i = 0; i < 20000; i++) {
    std::string text = random_text(rng);
    for (int k = 0; k < 2 && !text.empty(); k++) text[rng() % text.size()] = static_cast<char>(rng());
    const std::vector<char> memory(text.begin(), text.end());
    tokens.clear();
    const rs_status status = rs_tokenizer_encode(t.get(), scratch.get(), {memory.data(), memory.size()}, &tokens);
    EXPECT_TRUE(status == RS_OK || (status == RS_ERR_TEXT && tokens.ids.empty()));
  }
}

// ------------------------------------------------------------------------------------------------ template

TEST(Tokenizer, Template) {
  const auto t = create(small_spec());
  const rs_tokens a = encode(t, "foo bar"), b = encode(t, "unable");
  const rs_tokens single = wrap(t, a), pair = wrap(t, a, &b);
  EXPECT_EQ(show(single), "2:0-0 12:0-3 14:4-7 3:0-0");
  EXPECT_EQ(single.type_ids, (std::vector<int32_t>{0, 0, 0, 0}));
  EXPECT_EQ(show(pair), "2:0-0 12:0-3 14:4-7 3:0-0 5:0-2 7:2-6 3:0-0");
  EXPECT_EQ(pair.type_ids, (std::vector<int32_t>{0, 0, 0, 0, 1, 1, 1}));
  EXPECT_EQ(rs_tokenizer_special(t.get(), false), 2u);
  EXPECT_EQ(rs_tokenizer_special(t.get(), true), 3u);
  rs_tokens window = single;  // what is there stays
  rs_tokenizer_template(t.get(), a, 1, 2, nullptr, &window);
  EXPECT_EQ(show(window), "2:0-0 12:0-3 14:4-7 3:0-0 2:0-0 14:4-7 3:0-0");
}

TEST(Tokenizer, TemplateOfAnyForm) {
  rs_tokenizer_spec spec = small_spec();
  spec.single = {-1, 3}, spec.single_types = {1, 2};
  spec.pair = {-2, 4, 4, -1}, spec.pair_types = {3, 0, 4, 5};
  const auto t = create(spec);
  const rs_tokens a = encode(t, "foo"), b = encode(t, "bar");
  EXPECT_EQ(wrap(t, a).ids, (std::vector<int32_t>{12, 3}));
  EXPECT_EQ(wrap(t, a).type_ids, (std::vector<int32_t>{1, 2}));
  EXPECT_EQ(wrap(t, a, &b).ids, (std::vector<int32_t>{14, 4, 4, 12}));
  EXPECT_EQ(wrap(t, a, &b).type_ids, (std::vector<int32_t>{3, 0, 4, 5}));
}

TEST(Tokenizer, TokensById) {
  const auto t = create(small_spec());
  EXPECT_EQ(rs_tokenizer_vocab(t.get()), 26u);
  EXPECT_STREQ(rs_tokenizer_token(t.get(), 0), "[PAD]");
  EXPECT_STREQ(rs_tokenizer_token(t.get(), 25), "##");
  EXPECT_EQ(rs_tokenizer_token(t.get(), 26), nullptr);
  EXPECT_EQ(rs_tokenizer_token(t.get(), -1), nullptr);
}

// ------------------------------------------------------------------------------------------------ loading

TEST(Tokenizer, RefusesWhatMakesNoSense) {
  using spec_type = rs_tokenizer_spec;
  const struct {
    std::function<void(spec_type &)> spoil;
    rs_status status;
    const char *error;
  } rows[] = {
      {[](spec_type &s) { s.type = "unigram"; }, RS_ERR_UNSUPPORTED, "tokenizer.type: 'unigram'"},
      {[](spec_type &s) { s.tokens.clear(); }, RS_ERR_FORMAT, "the vocabulary is empty"},
      {[](spec_type &s) { s.tokens.assign(1000, ""); }, RS_ERR_FORMAT, "tokenizer.unk: '[UNK]' is not in the vocabulary"},
      {[](spec_type &s) { s.tokens[7] = "ab\xC3("; }, RS_ERR_FORMAT, "tokenizer.tokens[7]: invalid UTF-8 at byte 2 (0xc3)"},
      {[](spec_type &s) { s.unk = "[unk]"; }, RS_ERR_FORMAT, "tokenizer.unk: '[unk]' is not in the vocabulary"},
      {[](spec_type &s) { s.unk = ""; }, RS_ERR_FORMAT, "tokenizer.unk: '' is not in the vocabulary"},
      {[](spec_type &s) { s.prefix = "\xFF"; }, RS_ERR_FORMAT, "tokenizer.prefix: invalid UTF-8"},
      {[](spec_type &s) { s.max_word_chars = 0; }, RS_ERR_FORMAT, "tokenizer.max_word_chars: 0"},
      {[](spec_type &s) { s.max_word_chars = INT64_MIN; }, RS_ERR_FORMAT, "tokenizer.max_word_chars: -9223372036854775808"},
      {[](spec_type &s) { s.max_word_chars = INT64_MAX; }, RS_ERR_FORMAT, "tokenizer.max_word_chars: 9223372036854775807"},
      {[](spec_type &s) {
         s.added_ids = {1, 2}, s.added_flags = {16};
       },
       RS_ERR_FORMAT, "tokenizer.added_flags: 1 values for 2 ids"},
      {[](spec_type &s) { s.added_ids = {-1}, s.added_flags = {16}; }, RS_ERR_FORMAT, "tokenizer.added_ids: token id -1 outside"},
      {[](spec_type &s) { s.added_ids = {26}, s.added_flags = {16}; }, RS_ERR_FORMAT,
       "token id 26 outside of the vocabulary of 26"},
      {[](spec_type &s) { s.added_ids = {INT64_MAX}, s.added_flags = {0}; }, RS_ERR_FORMAT, "token id 9223372036854775807 outside"},
      {[](spec_type &s) {
         s.added_ids = {1, 1}, s.added_flags = {0, 0};
       },
       RS_ERR_FORMAT, "tokenizer.added_ids: token id 1 twice"},
      {[](spec_type &s) { s.added_ids = {1}, s.added_flags = {64}; }, RS_ERR_UNSUPPORTED, "tokenizer.added_flags[0]: 64"},
      {[](spec_type &s) { s.added_ids = {1}, s.added_flags = {-1}; }, RS_ERR_UNSUPPORTED, "tokenizer.added_flags[0]: -1"},
      {[](spec_type &s) { s.added_ids = {1}, s.added_flags = {RS_ADDED_OUTSIDE}; }, RS_ERR_FORMAT, "tokenizer.unk: '[UNK]' is not"},
      {[](spec_type &s) { s.tokens[9] = "", s.added_ids = {9}, s.added_flags = {0}; }, RS_ERR_FORMAT,
       "token 9 is the empty string"},
      {[](spec_type &s) { s.tokens[9] = "\u0301", s.added_ids = {9}, s.added_flags = {RS_ADDED_NORMALIZED}; }, RS_ERR_UNSUPPORTED,
       "nothing is left of token 9 when normalised"},
      {[](spec_type &s) { s.single = {}, s.single_types = {}; }, RS_ERR_FORMAT, "tokenizer.single: has the text 0 times"},
      {[](spec_type &s) {
         s.single = {2, -1, 3, -1}, s.single_types.push_back(0);
       },
       RS_ERR_FORMAT, "tokenizer.single: has the text 2"},
      {[](spec_type &s) { s.single[1] = -2; }, RS_ERR_FORMAT, "tokenizer.single: token id -2 outside"},
      {[](spec_type &s) { s.single[0] = 26; }, RS_ERR_FORMAT, "tokenizer.single: token id 26 outside"},
      {[](spec_type &s) { s.single[0] = INT64_MIN; }, RS_ERR_FORMAT, "tokenizer.single: token id -9223372036854775808 outside"},
      {[](spec_type &s) { s.single_types.pop_back(); }, RS_ERR_FORMAT, "tokenizer.single_types: 2 values for 3 tokens"},
      {[](spec_type &s) { s.single_types[2] = -1; }, RS_ERR_FORMAT, "tokenizer.single_types[2]: -1 is no type id"},
      {[](spec_type &s) { s.pair = s.single, s.pair_types = s.single_types; }, RS_ERR_FORMAT,
       "tokenizer.pair: has the text 1 times and its pair 0"},
      {[](spec_type &s) { s.pair[3] = -1; }, RS_ERR_FORMAT, "tokenizer.pair: has the text 2 times"},
      {[](spec_type &s) { s.pair[3] = -3; }, RS_ERR_FORMAT, "tokenizer.pair: token id -3 outside"},
      {[](spec_type &s) { s.pair_types.push_back(0); }, RS_ERR_FORMAT, "tokenizer.pair_types: 6 values for 5 tokens"},
      {[](spec_type &s) { s.pair_types[0] = INT64_MAX; }, RS_ERR_FORMAT, "tokenizer.pair_types[0]: 9223372036854775807"},
  };
  for (const auto &row : rows) {
    rs_tokenizer_spec spec = small_spec();
    row.spoil(spec);
    auto *t = reinterpret_cast<rs_tokenizer *>(&spec);  // must not be left as it was
    EXPECT_EQ(rs_tokenizer_create(spec, &t), row.status) << row.error;
    EXPECT_EQ(t, nullptr);
    EXPECT_NE(std::string(rs_last_error()).find(row.error), std::string::npos) << rs_last_error() << "\nexpected: " << row.error;
  }
}

TEST(Tokenizer, RefusesTokensMadeToCollide) {
  // The polynomial hash of a Thue-Morse sequence of 1024 is that of its complement whatever the factor, so that 11 of them in a row
  // make 2048 tokens with one hash.
  std::string even, odd;
  for (unsigned i = 0; i < 1024; i++) {
    unsigned bits = 0;
    for (unsigned k = i; k; k &= k - 1) bits++;
    even += bits % 2 ? 'b' : 'a';
    odd += bits % 2 ? 'a' : 'b';
  }
  rs_tokenizer_spec spec = small_spec();
  for (unsigned i = 0; i < 2048; i++) {
    std::string token;
    for (unsigned k = 0; k < 11; k++) token += i >> k & 1 ? odd : even;
    spec.tokens.push_back(token);
  }
  rs_tokenizer *t = nullptr;
  EXPECT_EQ(rs_tokenizer_create(spec, &t), RS_ERR_FORMAT);
  EXPECT_NE(std::string(rs_last_error()).find("hashes like too many"), std::string::npos) << rs_last_error();
  spec.tokens.resize(500);
  EXPECT_TRUE(create(spec));
}

TEST(Tokenizer, ManyAddedTokens) {
  rs_tokenizer_spec spec = small_spec();
  std::string text;
  for (int i = 0; i < 5000; i++) {
    const std::string token = "<" + std::to_string(i) + ">";
    spec.added_ids.push_back(static_cast<int64_t>(spec.tokens.size()));
    spec.added_flags.push_back(RS_ADDED_SPECIAL | RS_ADDED_OUTSIDE);
    spec.tokens.push_back(token);
    text += token;
  }
  const rs_tokens tokens = encode(create(spec), text + "<5000");
  ASSERT_EQ(tokens.ids.size(), 5002u);
  for (int32_t i = 0; i < 5000; i++) EXPECT_EQ(tokens.ids[static_cast<size_t>(i)], 26 + i);
}

TEST(Tokenizer, FromAWeightFile) {
  const temp_dir dir;
  rs_tokenizer_spec spec = with_added({{"[MASK]", RS_ADDED_SPECIAL}, {"qux", RS_ADDED_SINGLE_WORD}});
  spec.tokens.emplace_back("foo");  // of the two this one counts
  spec.lowercase = false;
  write_model(dir / "tiny.rsw", spec);
  rs_model *model = nullptr;
  ASSERT_EQ(rs_model_load((dir / "tiny.rsw").c_str(), nullptr, &model), RS_OK) << rs_last_error();
  const rs_text text = as_text("foo Bar [MASK]qux caf\u00E9"), pair = as_text("unable");
  int32_t ids[16], types[16];
  rs_span spans[16];
  size_t n = 0;
  ASSERT_EQ(rs_tokenize(model, &text, &pair, ids, types, spans, 16, &n), RS_OK) << rs_last_error();
  EXPECT_EQ(show(rs_tokens{{ids, ids + n}, {}, {spans, spans + n}}),
            "2:0-0 27:0-3 1:4-7 4:8-14 26:14-17 17:18-23 3:0-0 5:0-2 7:2-6 3:0-0");
  EXPECT_EQ(std::vector<int32_t>(types, types + n), (std::vector<int32_t>{0, 0, 0, 0, 0, 0, 0, 1, 1, 1}));
  EXPECT_STREQ(rs_token(model, 26), "qux");

  // Each key of the wrong kind, and some with values that make no sense.
  const int64_t three[] = {0, 0, 0}, far[] = {99, -1};
  const struct {
    std::function<rs_status(rs_writer *)> set;
    const char *error;
  } rows[] = {
      {[](rs_writer *w) { return rs_writer_set_i64(w, "tokenizer.type", 1); }, "tokenizer.type is not a string"},
      {[](rs_writer *w) { return rs_writer_set_str(w, "tokenizer.type", "unigram"); }, "tokenizer.type: 'unigram'"},
      {[](rs_writer *w) { return rs_writer_set_str(w, "tokenizer.tokens", "a"); }, "tokenizer.tokens is not a list of strings"},
      {[](rs_writer *w) { return rs_writer_set_bool(w, "tokenizer.unk", true); }, "tokenizer.unk is not a string"},
      {[](rs_writer *w) { return rs_writer_set_bool(w, "tokenizer.prefix", true); }, "tokenizer.prefix is not a string"},
      {[](rs_writer *w) { return rs_writer_set_str(w, "tokenizer.max_word_chars", "9"); },
       "tokenizer.max_word_chars is not an integer"},
      {[](rs_writer *w) { return rs_writer_set_i64(w, "tokenizer.clean_text", 1); }, "tokenizer.clean_text is not true or false"},
      {[](rs_writer *w) { return rs_writer_set_i64(w, "tokenizer.lowercase", 1); }, "tokenizer.lowercase is not true or false"},
      {[](rs_writer *w) { return rs_writer_set_i64(w, "tokenizer.added_ids", 1); },
       "tokenizer.added_ids is not a list of integers"},
      {[&](rs_writer *w) { return rs_writer_set_i64s(w, "tokenizer.added_flags", three, 3); },
       "tokenizer.added_flags: 3 values for 2"},
      {[&](rs_writer *w) { return rs_writer_set_i64s(w, "tokenizer.single", far, 2); }, "tokenizer.single"},
      {[](rs_writer *w) { return rs_writer_set_i64s(w, "tokenizer.pair", nullptr, 0); }, "tokenizer.pair"},
      {[](rs_writer *w) { return rs_writer_set_i64(w, "tokenizer.pad_id", 28); }, "tokenizer.pad_id: token id 28 outside"},
      {[](rs_writer *w) { return rs_writer_set_str(w, "tokenizer.mask_id", "4"); }, "tokenizer.mask_id is not an integer"},
  };
  for (const auto &row : rows) {
    const std::string path = dir / "spoilt.rsw";
    rs_writer *w = nullptr;
    ASSERT_EQ(rs_writer_open(path.c_str(), &w), RS_OK) << rs_last_error();
    EXPECT_EQ(row.set(w), RS_OK) << rs_last_error();
    EXPECT_EQ(rs_writer_copy(w, model), RS_OK) << rs_last_error();
    EXPECT_EQ(rs_writer_finish(w), RS_OK) << rs_last_error();
    rs_writer_free(w);
    rs_model *spoilt = nullptr;
    EXPECT_NE(rs_model_load(path.c_str(), nullptr, &spoilt), RS_OK) << row.error;
    EXPECT_NE(std::string(rs_last_error()).find(row.error), std::string::npos) << rs_last_error() << "\nexpected: " << row.error;
    rs_model_free(spoilt);
  }
  rs_model_free(model);
}

}  // namespace
