// Byte-level BPE as CLIP has it, against the tokenizers library of Hugging Face.
//
// tests/data/bpe.json is what the reference, tokenizers 0.23.3, makes of texts with the first 2,000 merges of CLIP's vocabulary
// (tests/make_bpe.py).  The expressions that find words, and what a word is, are those of the reference as well.
#include "tokenizer_util.h"

#include <functional>
#include <map>
#include <random>
#include <thread>

using namespace std::string_literals;
using namespace std::string_view_literals;

namespace {

// ------------------------------------------------------------------------------------------------ help

const json &golden() {
  static const json all = parse_json(read_file(source_dir() + "/tests/data/bpe.json"), "bpe.json");
  return all;
}

rs_tokenizer_spec spec_of(const json &tokenizer_json) { return ::spec_of(read_tokenizer(tokenizer_json)); }

// CLIP's tokenizer with a small vocabulary.
tokenizer_ptr create_golden() { return create(spec_of(golden()["tokenizer"])); }

rs_tokens expected(const json &row) { return golden_tokens(row["ids"], row["spans"]); }

// The words of a text, put together from the tokens of a vocabulary without merges: "word|word|word".
std::string words_of(const rs_tokenizer_spec &spec, std::string_view text) {
  std::string words;
  bool ended = false;
  for (const int32_t id : encode(create(spec), text).ids) {
    if (ended) words += '|';
    words += static_cast<char>(id % 256);
    ended = id >= 256;
  }
  EXPECT_TRUE(ended || words.empty()) << text;
  return words;
}

// Pairs by rank, the leftmost first, over and over: as slow as it is plain.
class merge_rules {
 public:
  explicit merge_rules(const rs_tokenizer_spec &spec) : tokens_(spec.tokens) {
    for (size_t i = 0; i < tokens_.size(); i++) ids_[tokens_[i]] = static_cast<int32_t>(i);
    for (size_t i = 0; i < spec.merges.size(); i += 2)
      ranks_[{static_cast<int32_t>(spec.merges[i]), static_cast<int32_t>(spec.merges[i + 1])}] = i;
  }

  std::vector<int32_t> merged(const std::string &word) const {
    std::vector<int32_t> ids;
    for (size_t i = 0; i < word.size(); i++) ids.push_back(ids_.at(word.substr(i, 1) + (i + 1 == word.size() ? "</w>" : "")));
    for (;;) {
      size_t best = SIZE_MAX, at = 0;
      for (size_t i = 0; i + 1 < ids.size(); i++) {
        const auto found = ranks_.find({ids[i], ids[i + 1]});
        if (found != ranks_.end() && found->second < best) best = found->second, at = i;
      }
      if (best == SIZE_MAX) return ids;
      ids[at] = ids_.at(text(ids[at]) + text(ids[at + 1]));
      ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(at) + 1);
    }
  }

 private:
  const std::string &text(int32_t id) const { return tokens_[static_cast<size_t>(id)]; }

  std::vector<std::string> tokens_;
  std::map<std::string, int32_t> ids_;
  std::map<std::pair<int32_t, int32_t>, size_t> ranks_;
};

std::string repeat(size_t n, std::string_view s) {
  std::string all;
  while (n--) all += s;
  return all;
}

// ------------------------------------------------------------------------------------------------ golden texts

TEST(Bpe, GoldenTexts) {
  const auto t = create_golden();
  const json &rows = golden()["rows"];
  ASSERT_GT(rows.size(), 200u);
  for (const json &row : rows) EXPECT_EQ(show(encode(t, row["text"].get<std::string>())), show(expected(row))) << row["text"];
}

TEST(Bpe, GoldenTextsOfNewerFolders) {
  // transformers 5 looks for special tokens in normalised text too, where it looks for words, instead of among added tokens.
  json tokenizer = golden()["tokenizer"];
  tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = golden()["special_words"];
  for (json &token : tokenizer["added_tokens"]) token["normalized"] = false;
  const auto t = create(spec_of(tokenizer));
  size_t differ = 0;
  for (const json &row : golden()["rows"]) {
    const bool own = row.contains("special");
    differ += own;
    EXPECT_EQ(show(encode(t, row["text"].get<std::string>())), show(expected(own ? row["special"] : row))) << row["text"];
  }
  EXPECT_GE(differ, 5u);
}

TEST(Bpe, Template) {
  const auto t = create_golden();
  const rs_tokens a = encode(t, "a photo"), b = encode(t, "of it"), pair = wrap(t, a, &b);
  EXPECT_EQ(pair.ids, golden()["pair"]["ids"].get<std::vector<int32_t>>());
  EXPECT_EQ(pair.type_ids, golden()["pair"]["type_ids"].get<std::vector<int32_t>>());
  EXPECT_EQ(rs_tokenizer_special(t.get(), false), 2u);
  EXPECT_EQ(rs_tokenizer_special(t.get(), true), 4u);
  // Cut to 8: the first tokens, and the end of the text behind them.
  const rs_tokens text = encode(t, "a photo of a cat and 2024 dogs");
  ASSERT_GT(text.ids.size(), 6u);
  rs_tokens cut;
  rs_tokenizer_template(t.get(), text, 0, 6, nullptr, &cut);
  EXPECT_EQ(cut.ids, golden()["cut"].get<std::vector<int32_t>>());
  EXPECT_TRUE(rs_tokenizer_in_template(t.get(), cut.ids.front()) && rs_tokenizer_in_template(t.get(), cut.ids.back()));
}

// ------------------------------------------------------------------------------------------------ words

TEST(Bpe, Words) {
  const rs_tokenizer_spec spec = bpe_spec({});
  const std::pair<std::string_view, const char *> rows[] = {
      {"a photo of 2 CATS"sv, "a|photo|of|2|cats"},
      {"2024 x1y22"sv, "2|0|2|4|x|1|y|2|2"},
      {"don't DON'T we'll they've I'm you're he'd 'tis"sv, "don|'t|don|'t|we|'ll|they|'ve|i|'m|you|'re|he|'d|'t|is"},
      {"'r 'v 'l 'x 'rx 'la 'vvv"sv, "'|r|'|v|'|l|'|x|'|rx|'|la|'|vvv"},
      {"x's-'s ''s -'ll 's's"sv, "x|'s|-'|s|''|s|-'|ll|'s|'s"},
      {"'"sv, "'"},
      {"'r"sv, "'|r"},
      {"'1 'r1 'r' 'r,"sv, "'|1|'|r|1|'|r|'|'|r|,"},
      {"a\tb\r\nc\u00A0d\u3000e\302\205f"sv, "a|b|c|d|e|f"},
      {"wow!!! (yes) a_b"sv, "wow|!!!|(|yes|)|a|_|b"},
      {"\u00C9t\u00E9 e\u0301te\u0301"sv, "\u00E9t\u00E9|\u00E9t\u00E9"},
      {"x\u0301y"sv, "x|\u0301|y"},                            // nothing composes to x with an accent; a mark is no letter
      {"'s\u0301 's\u0338"sv, "'|\u015B|'s|\u0338"},           // composed first, then a contraction
      {"=\u0338 \u2260"sv, "\u2260|\u2260"},                   // composed over the border to ASCII
      {"\u0130I"sv, "i|\u0307|i"},                             // lower case comes after composition
      {"\u0BC6\u0BBE \u1100\u1161\u11A8"sv, "\u0BCA|\uAC01"},  // starters that compose; the first is a mark
      {"\u4E2D\u65871\u00BD"sv, "\u4E2D\u6587|1|\u00BD"},      // letters of any script are one word
      {"a\u200Db\u00ADc"sv, "a|\u200D|b|\u00AD|c"},
      {"\U0001F468\u200D\U0001F469!"sv, "\U0001F468\u200D\U0001F469!"},
      {"\uA7CE\U000323B0 \U00011DE0 \u1C89"sv,
       "\uA7CF\U000323B0|\U00011DE0|\u1C8A"},  // letters and digits of 17.0 are none; of 16.0
      {""sv, ""},
      {" \t\n\u3000"sv, ""},
  };
  for (const auto &[text, words] : rows) EXPECT_EQ(words_of(spec, text), words) << text;
  EXPECT_EQ(words_of(spec, "a\0b"sv), "a|\0|b"s);
}

TEST(Bpe, SpecialWords) {
  // What of "<|endoftext|>" in capitals is left to the expression that finds words.
  rs_tokenizer_spec spec = bpe_spec({});
  const struct {
    std::string_view text;
    const char *without, *with;
  } rows[] = {
      {"<|ENDOFTEXT|>", "<||endoftext||>", "<||endoftext||>"},
      {"<|ENDOFTEXT|>>!", "<||endoftext||>>!", "<||endoftext||>|>!"},
      {"<|StartOfText|><|EndOfText|>", "<||startoftext||><||endoftext||>", "<||startoftext||>|<||endoftext||>"},
      {"-<|ENDOFTEXT|>>", "-<||endoftext||>>", "-<||endoftext||>>"},
      {"<| ENDOFTEXT|>>", "<||endoftext||>>", "<||endoftext||>>"},
      {"<|ENDOFTEXTS|>>", "<||endoftexts||>>", "<||endoftexts||>>"},
      {"<|ENDOFTEXT |>>", "<||endoftext||>>", "<||endoftext||>>"},
      {"<|1ENDOFTEXT|>>", "<||1|endoftext||>>", "<||1|endoftext||>>"},
      {"<|ENDOFTEXT|>'s", "<||endoftext||>'|s", "<||endoftext||>|'s"},
  };
  for (const auto &row : rows) EXPECT_EQ(words_of(spec, row.text), row.without) << row.text;
  spec.split_special = true;
  for (const auto &row : rows) EXPECT_EQ(words_of(spec, row.text), row.with) << row.text;
}

// ------------------------------------------------------------------------------------------------ merges

struct merge_case {
  rs_tokenizer_spec spec;
  std::vector<std::pair<std::string_view, const char *>> rows;  // a text, and what show() should say
};

TEST(Bpe, Merges) {
  // BPE(end_of_word_suffix="</w>") of the reference.  97 is a, 353 a at the end of a word; what merges make begins at 512.
  const merge_case cases[] = {
      // the lowest rank first, wherever it is
      {bpe_spec({{"b", "c</w>"}, {"a", "b"}}), {{"abc", "97:0-1 512:1-3"}, {"abd", "513:0-2 356:2-3"}, {"ab", "97:0-1 354:1-2"}}},
      {bpe_spec({{"a", "b"}, {"b", "c</w>"}}), {{"abc", "512:0-2 355:2-3"}}},
      // of equal ranks the leftmost
      {bpe_spec({{"a", "a"}}),
       {{"aaaa", "512:0-2 97:2-3 353:3-4"}, {"aaaaa", "512:0-2 512:2-4 353:4-5"}, {"aa", "97:0-1 353:1-2"}}},
      {bpe_spec({{"a", "b"}, {"ab", "a"}, {"b", "a"}, {"ab", "ab"}}),
       {{"ababx", "515:0-4 376:4-5"}, {"babax", "98:0-1 513:1-4 376:4-5"}, {"abababx", "515:0-4 512:4-6 376:6-7"}}},
      {bpe_spec({{"x", "y"}, {"a", "b"}, {"b", "a"}}), {{"ababab", "513:0-2 513:2-4 97:4-5 354:5-6"}}},
      {bpe_spec({{"b", "a"}, {"a", "ba"}, {"aba", "b</w>"}}), {{"abab", "514:0-4"}, {"ababa", "513:0-3 98:3-4 353:4-5"}}},
      // the suffix belongs to the token
      {bpe_spec({{"a", "b</w>"}, {"c", "ab</w>"}}), {{"cab cabs", "513:0-3 99:4-5 97:5-6 98:6-7 371:7-8"}}},
      // a word of the vocabulary that merges do not lead to, met more than once
      {bpe_spec({{"b", "c</w>"}, {"a", "b"}, {"ab", "c</w>"}}),
       {{"abc abc abc", "97:0-1 512:1-3 97:4-5 512:5-7 97:8-9 512:9-11"}, {"bc bc", "512:0-2 512:3-5"}}},
      // The texts of tokens decide what they make: here "-$" and "$" the token of - at the end of a word, amid one.
      {bpe_spec({{"-", "$"}, {"-$", "$"}}, "$$"),
       {{"-$$.", "301:0-3 302:3-4"}, {"-$$", "512:0-2 292:2-3"}, {"- -", "301:0-1 301:2-3"}, {"-$", "45:0-1 292:1-2"}}},
  };
  for (size_t i = 0; i < std::size(cases); i++) {
    const auto t = create(cases[i].spec);
    ASSERT_TRUE(t);
    for (const auto &[text, tokens] : cases[i].rows) EXPECT_EQ(show(encode(t, text)), tokens) << "case " << i << ": " << text;
  }
}

TEST(Bpe, PiecesOfACharacterShareItsPlace) {
  const auto t = create(bpe_spec({}));
  EXPECT_EQ(show(encode(t, "\u00E9a")), "195:0-2 169:0-2 353:2-3");
  EXPECT_EQ(show(encode(t, "e\u0301a")), "195:0-1 169:0-1 353:3-4");  // what is composed has the place of its first character
  EXPECT_EQ(show(encode(t, "\u0130")), "361:0-2 204:0-2 391:0-2");
  EXPECT_EQ(show(encode(t, "x\U0001F600")), "376:0-1 240:1-5 159:1-5 152:1-5 384:1-5");
}

TEST(Bpe, LongWordsAreMergedLikeShortOnes) {
  // Both ways to merge, short words and long ones, against the plain one.
  std::vector<std::pair<std::string, std::string>> merges;
  std::vector<std::string> known = {"a", "b", "c", "d"};
  std::mt19937 rng(1);
  for (int i = 0; i < 60; i++) {
    const std::string left = known[rng() % known.size()], right = known[rng() % known.size()];
    if (std::find(merges.begin(), merges.end(), std::pair(left, right)) != merges.end()) continue;
    merges.emplace_back(left, right);
    known.push_back(left + right);
    if (known.back().size() > 6) known.pop_back();
  }
  merges.emplace_back("a", "b</w>");
  merges.emplace_back("c", "ab</w>");
  const rs_tokenizer_spec spec = bpe_spec(merges);
  const auto t = create(spec);
  const merge_rules rules(spec);
  for (const size_t length : {2, 3, 5, 10, 30, 46, 47, 48, 49, 50, 60, 200, 1000})
    for (int i = 0; i < 20; i++) {
      std::string word;
      while (word.size() < length) word += "abcd"[rng() % 4];
      const rs_tokens tokens = encode(t, word);
      EXPECT_EQ(tokens.ids, rules.merged(word)) << word;
      uint32_t end = 0;
      for (const rs_span &span : tokens.spans) {
        EXPECT_EQ(span.begin, end) << word;
        end = span.end;
      }
      EXPECT_EQ(end, length);
    }
}

TEST(Bpe, WordsOfMegabytes) {
  // With n² steps these would take hours.
  const auto t = create_golden();
  std::mt19937 rng(2);
  std::string letters;
  while (letters.size() < 2000000) letters += static_cast<char>('a' + rng() % 26);
  for (const std::string &text :
       {letters, repeat(2000000, "a"), repeat(1000000, "in"), repeat(500000, "\u00E9"), repeat(1000000, "-="),
        repeat(700000, "\u0301"), repeat(400000, "\u0316\u0301"), repeat(300000, "\u1100\u1161\u11A8"), repeat(2000000, "'"),
        repeat(1000000, "<|"), repeat(1000000, "5")}) {
    const rs_tokens tokens = encode(t, text);
    ASSERT_FALSE(tokens.ids.empty());
    EXPECT_EQ(tokens.spans.front().begin, 0u);
    EXPECT_TRUE(std::is_sorted(tokens.spans.begin(), tokens.spans.end(),
                               [](const rs_span &a, const rs_span &b) { return a.begin < b.begin; }));
  }
}

// ------------------------------------------------------------------------------------------------ added tokens, continuation

TEST(Bpe, AddedTokens) {
  rs_tokenizer_spec spec = bpe_spec({});  // 512 and 513 are the special tokens
  auto t = create(spec);
  EXPECT_EQ(show(encode(t, "a<|endoftext|>b <|startoftext|> ")), "353:0-1 513:1-14 354:14-15 512:16-31");
  // A mark is not composed over an added token, and a word does not go on.
  EXPECT_EQ(show(encode(t, "e<|endoftext|>\u0301")), "357:0-1 513:1-14 204:14-16 385:14-16");
  EXPECT_EQ(show(encode(t, "'<|endoftext|>s")), "295:0-1 513:1-14 371:14-15");
  // Sought in the normalised text, whatever it is written like; with and without a byte that tells it cannot be there.
  for (const char *text : {"<|startoftext|>", "foo"}) {
    spec.tokens[512] = text;
    spec.added_flags[0] = RS_ADDED_SPECIAL | RS_ADDED_NORMALIZED | RS_ADDED_OUTSIDE;
    t = create(spec);
    std::string capitals = text;
    for (char &c : capitals) c = static_cast<char>(std::toupper(c));
    const auto n = static_cast<uint32_t>(capitals.size());
    const rs_tokens tokens = encode(t, "a " + capitals + "b");
    EXPECT_EQ(show(tokens), show(rs_tokens{{353, 512, 354}, {}, {{0, 1}, {2, 2 + n}, {2 + n, 3 + n}}}));
    EXPECT_EQ(show(encode(t, "a  \u3000" + capitals)), show(rs_tokens{{353, 512}, {}, {{0, 1}, {6, 6 + n}}}));
  }
  // Of the whitespace that one takes, a run is one space at the place of its last character.
  spec.added_flags[0] |= RS_ADDED_LSTRIP | RS_ADDED_RSTRIP;
  EXPECT_EQ(show(encode(create(spec), "a  \u3000FOO \t b")), "353:0-1 512:3-12 354:12-13");
}

TEST(Bpe, Continues) {
  const rs_tokenizer_spec spec = bpe_spec({{"a", "b</w>"}, {"a", "b"}});
  const auto t = create(spec);
  EXPECT_TRUE(rs_tokenizer_continues(t.get(), 'a', 'b'));
  EXPECT_TRUE(rs_tokenizer_continues(t.get(), 513, 256 + 'b'));   // ab, b</w>
  EXPECT_FALSE(rs_tokenizer_continues(t.get(), 256 + 'a', 'b'));  // a</w>, b
  EXPECT_FALSE(rs_tokenizer_continues(t.get(), 512, 'b'));        // ab</w>, b
  EXPECT_FALSE(rs_tokenizer_continues(t.get(), 514, 'b'));        // <|startoftext|>, b
  EXPECT_FALSE(rs_tokenizer_continues(t.get(), 'a', 515));
  EXPECT_FALSE(rs_tokenizer_continues(t.get(), -1, 'b'));
  EXPECT_FALSE(rs_tokenizer_continues(t.get(), 'a', 516));
  rs_tokenizer_spec wordpiece;
  wordpiece.tokens = {"[UNK]", "a", "##a", "##"};
  wordpiece.single = {-1}, wordpiece.single_types = {0}, wordpiece.pair = {-1, -2}, wordpiece.pair_types = {0, 0};
  const auto other = create(wordpiece);
  EXPECT_TRUE(rs_tokenizer_continues(other.get(), 1, 2));
  EXPECT_FALSE(rs_tokenizer_continues(other.get(), 2, 1));
  EXPECT_FALSE(rs_tokenizer_continues(other.get(), 1, 3));
}

// ------------------------------------------------------------------------------------------------ properties

std::string random_text(std::mt19937 &rng) {
  const auto below = [&](size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(rng); };
  const std::vector<std::pair<char32_t, char32_t>> blocks = {
      {0x20, 0x7E},     {0x20, 0x7E},     {0, 0x1F},        {0x80, 0x24F},    {0x300, 0x36F},    {0x900, 0xD7F},
      {0x1E00, 0x1FFF}, {0x2000, 0x206F}, {0x4E00, 0x4E20}, {0x1100, 0x11FF}, {0x1D158, 0x1D190}};
  const std::string_view parts[] = {
      "the", "photo", "<|endoftext|>", "<|STARTOFTEXT|>", " ", "caf\u00E9", "\u0323\u0301", "'s", "'re", "\u0130", "2024",
      "!!",  "'",     "\uAC00"};
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

TEST(Bpe, TextsDoNotDependOnEachOther) {
  const auto t = create_golden();
  const auto scratch = rs_tokenizer_scratch_new();
  std::mt19937 rng(3);
  for (int i = 0; i < 3000; i++) {
    const std::string text = random_text(rng);
    rs_tokens reused;
    ASSERT_EQ(rs_tokenizer_encode(t.get(), scratch.get(), as_text(text), &reused), RS_OK);
    EXPECT_EQ(show(reused), show(encode(t, text))) << text;
    rs_span before = {0, 0};
    for (const rs_span &span : reused.spans) {
      EXPECT_TRUE(span.begin < span.end && span.end <= text.size()) << text;
      EXPECT_TRUE(span.begin >= before.begin && span.end >= before.end) << text;
      before = span;
    }
  }
}

TEST(Bpe, LinesAreTokenizedAsOne) {
  const auto t = create_golden();
  std::mt19937 rng(4);
  for (int i = 0; i < 3000; i++) {
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

TEST(Bpe, SharedByThreads) {
  const auto t = create_golden();  // fresh: what it finds out about words is found out by both
  const auto work = [&t](std::string *shown) {
    std::mt19937 rng(5);
    for (int i = 0; i < 500; i++) *shown += show(encode(t, random_text(rng))) + "\n";
  };
  std::string first, second, alone;
  std::thread a(work, &first), b(work, &second);
  a.join();
  b.join();
  work(&alone);
  EXPECT_EQ(first, alone);
  EXPECT_EQ(second, alone);
}

// ------------------------------------------------------------------------------------------------ hostile text

TEST(Bpe, InvalidUtf8) {
  const auto t = create_golden();
  const auto scratch = rs_tokenizer_scratch_new();
  rs_tokens tokens = encode(t, "a");
  const std::string before = show(tokens);
  const std::pair<std::string_view, const char *> rows[] = {{"a photo \xFF", "invalid UTF-8 at byte 8 (0xff)"},
                                                            {"\xC3(", "invalid UTF-8 at byte 0 (0xc3)"},
                                                            {"e\xCC", "invalid UTF-8 at byte 1 (0xcc)"},  // half a mark
                                                            {"\xED\xA0\x80", "invalid UTF-8 at byte 0 (0xed)"},
                                                            {"<|endoftext|>\xF4\x90\x80\x80", "invalid UTF-8 at byte 13 (0xf4)"}};
  for (const auto &[text, error] : rows) {
    const std::vector<char> memory(text.begin(), text.end());
    EXPECT_EQ(rs_tokenizer_encode(t.get(), scratch.get(), {memory.data(), memory.size()}, &tokens), RS_ERR_TEXT);
    EXPECT_STREQ(rs_last_error(), error);
    EXPECT_EQ(show(tokens), before);
  }
}

TEST(Bpe, EveryCodePoint) {
  const auto t = create_golden();
  const auto scratch = rs_tokenizer_scratch_new();
  rs_tokens tokens;
  for (char32_t c = 0; c < 0x110000; c++) {
    const std::string text = "a" + utf8(c) + "'" + utf8(c) + "s";
    tokens.clear();
    const bool surrogate = c >= 0xD800 && c < 0xE000;
    ASSERT_EQ(rs_tokenizer_encode(t.get(), scratch.get(), as_text(text), &tokens), surrogate ? RS_ERR_TEXT : RS_OK)
        << static_cast<uint32_t>(c);
    ASSERT_EQ(tokens.ids.empty(), surrogate) << static_cast<uint32_t>(c);
  }
}

TEST(Bpe, RandomBytes) {
  const auto t = create_golden();
  const auto scratch = rs_tokenizer_scratch_new();
  std::mt19937 rng(6);
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

// ------------------------------------------------------------------------------------------------ loading

TEST(Bpe, RefusesWhatMakesNoSense) {
  using spec_type = rs_tokenizer_spec;
  const struct {
    std::function<void(spec_type &)> spoil;
    rs_status status;
    const char *error;
  } rows[] = {
      {[](spec_type &s) { s.tokens.clear(); }, RS_ERR_FORMAT, "the vocabulary is empty"},
      {[](spec_type &s) { s.tokens['x'] = ""; }, RS_ERR_FORMAT, "tokenizer.tokens: the one of byte 0x78 is missing"},
      {[](spec_type &s) { s.tokens[256] = "x"; }, RS_ERR_FORMAT, "tokenizer.tokens[256]: 'x' has the id 120 too"},
      {[](spec_type &s) { s.tokens[256] = "\u4E2D"; }, RS_ERR_FORMAT, "the one of byte 0x00 at the end of a word is missing"},
      {[](spec_type &s) { s.tokens[512] = "ab</w>", s.tokens[513] = "ab</w>"; }, RS_ERR_FORMAT,
       "tokenizer.tokens[513]: 'ab</w>' has the id 512 too"},
      {[](spec_type &s) { s.tokens[7] = "\xC3("; }, RS_ERR_FORMAT, "tokenizer.tokens[7]: invalid UTF-8"},
      {[](spec_type &s) { s.tokens.push_back(std::string(513, 'x')); }, RS_ERR_LIMIT, "has 513 bytes, allowed are 512"},
      {[](spec_type &s) { s.suffix = "\xFF"; }, RS_ERR_FORMAT, "tokenizer.suffix: invalid UTF-8"},
      {[](spec_type &s) { s.suffix = " "; }, RS_ERR_UNSUPPORTED, "tokenizer.suffix: ' ' has characters that stand for no byte"},
      {[](spec_type &s) { s.suffix = "</x>"; }, RS_ERR_FORMAT, "the one of byte 0x00 at the end of a word is missing"},
      {[](spec_type &s) { s.merges.pop_back(); }, RS_ERR_FORMAT, "tokenizer.merges: 3 ids make no pairs"},
      {[](spec_type &s) { s.merges[0] = -1; }, RS_ERR_FORMAT, "tokenizer.merges: token id -1 outside"},
      {[](spec_type &s) { s.merges[3] = 516; }, RS_ERR_FORMAT, "tokenizer.merges: token id 516 outside of the vocabulary of 516"},
      {[](spec_type &s) { s.merges[3] = INT64_MAX; }, RS_ERR_FORMAT, "token id 9223372036854775807 outside"},
      {[](spec_type &s) { s.merges[0] = 'q'; }, RS_ERR_FORMAT, "tokenizer.merges[0]: makes 'qb', which is not in the vocabulary"},
      {[](spec_type &s) { s.merges[2] = 'a', s.merges[3] = 'b'; }, RS_ERR_FORMAT,
       "tokenizer.merges[1]: tokens 97 and 98 for the second time"},
      {[](spec_type &s) { s.added_flags[0] |= RS_ADDED_OUTSIDE, s.merges[0] = 514; }, RS_ERR_FORMAT,
       "tokenizer.merges[0]: token 514 is no part of words"},
      {[](spec_type &s) { s.tokens.push_back(""), s.merges[1] = 516; }, RS_ERR_FORMAT, "token 516 is no part of words"},
      {[](spec_type &s) { s.added_flags.pop_back(); }, RS_ERR_FORMAT, "tokenizer.added_flags: 1 values for 2 ids"},
      {[](spec_type &s) { s.single[0] = 516; }, RS_ERR_FORMAT, "tokenizer.single: token id 516 outside"},
  };
  for (const auto &row : rows) {
    rs_tokenizer_spec spec = bpe_spec({{"a", "b"}, {"ab", "c</w>"}});
    ASSERT_EQ(spec.tokens.size(), 516u);
    row.spoil(spec);
    auto *t = reinterpret_cast<rs_tokenizer *>(&spec);  // must not be left as it was
    EXPECT_EQ(rs_tokenizer_create(spec, &t), row.status) << row.error;
    EXPECT_EQ(t, nullptr);
    EXPECT_NE(std::string(rs_last_error()).find(row.error), std::string::npos) << rs_last_error() << "\nexpected: " << row.error;
  }
}

TEST(Bpe, FromAWeightFile) {
  const temp_dir dir;
  write_model(dir / "tiny.rsw", bpe_spec({{"a", "b"}, {"ab", "c</w>"}}));
  rs_model *model = nullptr;
  ASSERT_EQ(rs_model_load((dir / "tiny.rsw").c_str(), nullptr, &model), RS_OK) << rs_last_error();
  const rs_text text = as_text("ABC'll<|endoftext|>ab"), pair = as_text("x");
  int32_t ids[16], types[16];
  rs_span spans[16];
  size_t n = 0;
  ASSERT_EQ(rs_tokenize(model, &text, &pair, ids, types, spans, 16, &n), RS_OK) << rs_last_error();
  EXPECT_EQ(show(rs_tokens{{ids, ids + n}, {}, {spans, spans + n}}),
            "514:0-0 513:0-3 39:3-4 108:4-5 364:5-6 515:6-19 97:19-20 354:20-21 515:0-0 515:0-0 376:0-1 515:0-0");
  EXPECT_STREQ(rs_token(model, 513), "abc</w>");

  const int64_t three[] = {97, 98, 99}, unknown[] = {97, 120};
  const struct {
    std::function<rs_status(rs_writer *)> set;
    const char *error;
  } rows[] = {
      {[](rs_writer *w) { return rs_writer_set_str(w, "tokenizer.type", "wordpiece"); }, "tokenizer.unk is missing"},
      {[](rs_writer *w) { return rs_writer_set_str(w, "tokenizer.merges", "a b"); }, "tokenizer.merges is not a list of integers"},
      {[&](rs_writer *w) { return rs_writer_set_i64s(w, "tokenizer.merges", three, 3); }, "tokenizer.merges: 3 ids make no pairs"},
      {[&](rs_writer *w) { return rs_writer_set_i64s(w, "tokenizer.merges", unknown, 2); }, "tokenizer.merges[0]: makes 'ax'"},
      {[](rs_writer *w) { return rs_writer_set_i64(w, "tokenizer.suffix", 1); }, "tokenizer.suffix is not a string"},
      {[](rs_writer *w) { return rs_writer_set_i64(w, "tokenizer.split_special", 1); },
       "tokenizer.split_special is not true or false"},
      {[](rs_writer *w) { return rs_writer_set_i64(w, "tokenizer.eos_id", 516); }, "tokenizer.eos_id: token id 516 outside"},
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
