// rs classify, rs rerank and rs answer, run as a user runs them, on tiny models that are made here.
#include "cli_util.h"
#include "tiny_model.h"

#include <algorithm>
#include <cmath>
#include <set>

namespace {

// Models with a head each, converted once for each process of tests.
class CliHeads : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    shared_ = new temp_dir;
    make("bare", "", {});
    make("sentiment", "SequenceClassification", {"bad", "so so", "good"});
    make("cross", "SequenceClassification", {"LABEL_0"});
    make("ner", "TokenClassification", {"O", "B-PER", "I-PER", "LOC"});
    make("squad", "QuestionAnswering", {});
  }
  static void TearDownTestSuite() {
    delete shared_;
    shared_ = nullptr;
  }

  static void make(const std::string &name, const std::string &head, const strings &labels) {
    tiny_options options;
    options.head = head;
    options.labels = labels;
    tiny_model(options).write(*shared_ / name);
    const run_result r = rs({"convert", *shared_ / name, "-o", file(name), "--type", "f32"});
    ASSERT_EQ(r.code, 0) << r;
    EXPECT_EQ(r.err, "") << r;  // no word on pooling where there is a head
  }

  static std::string file(const std::string &name) { return *shared_ / (name + ".rsw"); }

  static run_result on(const std::string &model, const std::string &command, const strings &arguments,
                       const std::string &input = "") {
    strings all = {command, "-m", file(model)};
    all.insert(all.end(), arguments.begin(), arguments.end());
    return rs(all, input);
  }
  // What it prints, where all goes well.
  static std::vector<json> lines(const run_result &r) {
    EXPECT_EQ(r.code, 0) << r;
    EXPECT_EQ(r.err, "") << r;
    return jsonl(r.out);
  }

  temp_dir dir_;

 private:
  static temp_dir *shared_;
};
temp_dir *CliHeads::shared_ = nullptr;

std::map<std::string, double> scores_of(const json &line) {
  std::map<std::string, double> scores;
  for (const json &s : line.at("scores")) scores[s.at("label")] = s.at("score");
  return scores;
}

// The text from character `begin` to character `end`.
std::string characters(const std::string &text, size_t begin, size_t end) {
  std::string part;
  size_t at = 0;
  for (char c : text) {
    at += (static_cast<unsigned char>(c) & 0xc0) != 0x80;  // the number of this character, from 1
    if (at > begin && at <= end) part += c;
  }
  return part;
}

// ------------------------------------------------------------------------------------------------ usage

TEST_F(CliHeads, Help) {
  for (const char *command : {"classify", "rerank", "answer"}) {
    const run_result r = rs({command, "--help"});
    EXPECT_EQ(r.code, 0) << r;
    EXPECT_EQ(r.err, "");
    EXPECT_NE(r.out.find("Examples"), std::string::npos) << command;
    for (const std::string &line : lines_of(r.out)) EXPECT_LE(line.size(), 136u) << line;
  }
  EXPECT_NE(rs({"rerank", "--help"}).out.find("an object with \"query\" and \"texts\", or with \"text\" for --query"),
            std::string::npos);
  EXPECT_NE(rs({"answer", "--help"}).out.find("an object with \"question\" and \"context\""), std::string::npos);
}

TEST_F(CliHeads, ModelWithoutTheHead) {
  expect_failure(on("bare", "classify", {"a"}), 1, "this model has no classification head: rs classify needs one");
  expect_failure(on("bare", "rerank", {"-q", "a", "b"}), 1, "this model has no classification head: rs rerank needs one");
  expect_failure(on("bare", "answer", {"-q", "a", "b"}), 1, "this model has no question-answering head: rs answer needs one");
  expect_failure(on("squad", "classify", {"a"}), 1, "no classification head, but one of spans: rs answer is for that");
  expect_failure(on("ner", "answer", {"-q", "a", "b"}), 1,
                 "no question-answering head, but one of tokens: rs classify is for that");
  expect_failure(on("ner", "rerank", {"-q", "a", "b"}), 1, "no classification head, but one of tokens");
}

TEST_F(CliHeads, WrongUsage) {
  expect_failure(on("sentiment", "classify", {"a", "--tokens"}), 2, "this model labels texts, not tokens");
  expect_failure(on("ner", "classify", {"a", "--top", "2"}), 2, "this model labels tokens, not texts");
  expect_failure(on("ner", "classify", {"a", "--long", "chunk"}), 2, "labels of tokens cannot be averaged");
  expect_failure(on("ner", "classify", {"a", "--pair", "b"}), 2, "--pair: this model labels the tokens of single texts");
  expect_failure(on("sentiment", "classify", {"a", "--pair", "b", "--long", "chunk"}), 2, "--long chunk cannot cut pairs");
  expect_failure(on("sentiment", "classify", {"a", "--long", "chunk", "--overlap", "62"}), 2, "62 is not less than");
  expect_failure(on("sentiment", "classify", {"a", "--activation", "relu"}), 2, "--activation");
  expect_failure(on("sentiment", "classify", {"a", "--max-tokens", "65"}), 2, "more than the 64 positions");
  expect_failure(on("sentiment", "classify", {"a", "--max-tokens", "2"}), 2, "leaves no room beside the 2 special tokens");
  expect_failure(on("sentiment", "classify", {"a", "--pair", "b", "--max-tokens", "3"}), 2, "no room beside the 3 special tokens");
  expect_failure(on("sentiment", "classify", {"a", "-o", file("sentiment")}), 1, "is the weight file itself");
  expect_failure(on("sentiment", "classify", {"--frob", "a"}), 2, "unknown option '--frob'");
  expect_failure(on("cross", "rerank", {"a"}), 2, "texts need --query");
  expect_failure(on("sentiment", "rerank", {"-q", "a", "b"}), 2,
                 "the model has 3 labels; --label NAME says which one ranks (there are: bad, so so, good)");
  expect_failure(on("sentiment", "rerank", {"-q", "a", "b", "--label", "great"}), 2, "there is no label 'great'");
  expect_failure(on("squad", "answer", {"a"}), 2, "need --question");
  // Plain lines have no query beside the texts, and no question beside the context.
  expect_failure(on("cross", "rerank", {"--input", "text"}, "hello\nworld\n"), 2, "plain lines have no query, which --query gives");
  expect_failure(on("squad", "answer", {"--input", "text"}, "Where?\n"), 2, "plain lines have no question, which --question gives");
  for (const auto &[model, command] : {std::pair("cross", "rerank"), std::pair("squad", "answer")}) {
    const run_result plain = on(model, command, {}, "hello\n");
    EXPECT_EQ(plain.code, 1) << plain;
    EXPECT_EQ(plain.out, "");
    EXPECT_NE(plain.err.find("stdin:1: not valid JSON"), std::string::npos) << plain;
  }
  expect_failure(on("squad", "answer", {"--context-file", file("squad")}), 2, "--context-file needs --question");
  expect_failure(on("squad", "answer", {"-q", "a", "--context-file", dir_ / "none"}), 1, "No such file");
  for (const char *wrong : {"nan", "-inf", "1e39", "x"})
    expect_failure(on("squad", "answer", {"-q", "a", "--no-answer", wrong, "b"}), 2,
                   std::string("--no-answer: wants a number, got '") + wrong + "'");
  write_file(dir_ / "bad.txt", "a \xff");
  const run_result bad = on("squad", "answer", {"-q", "a", "--context-file", dir_ / "bad.txt"});
  EXPECT_EQ(bad.err.find("rs: " + (dir_ / "bad.txt") + ": "), 0u) << bad;
  for (const auto &[text, what] : {std::pair(std::string("\xff\xfe"
                                                         "a\0b\0",
                                                         6),
                                             ":1: looks like UTF-16"),
                                   std::pair(std::string("a\nb\nc\0", 6), ":3: a NUL byte")}) {
    write_file(dir_ / "bad.txt", text);
    expect_failure(on("squad", "answer", {"-q", "a", "--context-file", dir_ / "bad.txt"}), 1, (dir_ / "bad.txt") + what);
  }
  expect_failure(on("squad", "answer", {"-q", "a", "--top", "0", "b"}), 2, "--top: wants a whole number from 1, got '0'; see");
  expect_failure(on("squad", "answer", {"-q", "a", "--overlap", "-1", "b"}), 2, "--overlap: wants a whole number from 0, got '-1'");
  expect_failure(on("squad", "answer", {"-q", "a", "--context-file", dir_ / "none", "b"}), 2,
                 "both --context-file and other texts");
}

// ------------------------------------------------------------------------------------------------ rs classify

TEST_F(CliHeads, LabelsAndScores) {
  const strings texts = {"hello world", "", "cat kitten stock"};
  strings all = {"--top", "3", "--"};
  all.insert(all.end(), texts.begin(), texts.end());
  const std::vector<json> soft = lines(on("sentiment", "classify", all));
  ASSERT_EQ(soft.size(), 3u);
  strings raw_arguments = {"--activation", "none", "--top", "3", "--"},
          sigmoid_arguments = {"--activation", "sigmoid", "--top", "3", "--"};
  raw_arguments.insert(raw_arguments.end(), texts.begin(), texts.end());
  sigmoid_arguments.insert(sigmoid_arguments.end(), texts.begin(), texts.end());
  const std::vector<json> raw = lines(on("sentiment", "classify", raw_arguments)),
                          sigmoid = lines(on("sentiment", "classify", sigmoid_arguments));
  for (size_t i = 0; i < 3; ++i) {
    const auto a = scores_of(soft[i]), logits = scores_of(raw[i]), s = scores_of(sigmoid[i]);
    ASSERT_EQ(a.size(), 3u);
    double sum = 0, best = -1;
    for (const auto &[label, logit] : logits) sum += std::exp(logit);
    for (const auto &[label, logit] : logits) {
      EXPECT_NEAR(a.at(label), std::exp(logit) / sum, 1e-6);
      EXPECT_NEAR(s.at(label), 1 / (1 + std::exp(-logit)), 1e-6);
      best = std::max(best, a.at(label));
    }
    EXPECT_EQ(soft[i].at("score").get<double>(), best);
    EXPECT_EQ(soft[i].at("label"), soft[i].at("scores")[0].at("label"));
    for (size_t k = 1; k < 3; ++k) EXPECT_GE(soft[i].at("scores")[k - 1].at("score"), soft[i].at("scores")[k].at("score"));
    EXPECT_FALSE(soft[i].at("truncated").get<bool>());
  }
  EXPECT_EQ(soft[0].at("tokens"), 4);
  const json one = lines(on("sentiment", "classify", {"hello world"})).at(0);
  EXPECT_FALSE(one.contains("scores"));
  EXPECT_EQ(one.at("score"), soft[0].at("score"));
  EXPECT_EQ(lines(on("sentiment", "classify", {"hello world", "--top", "2"})).at(0).at("scores").size(), 2u);
}

TEST_F(CliHeads, SingleLogitIsASigmoid) {
  const json score = lines(on("cross", "classify", {"hello"})).at(0),
             raw = lines(on("cross", "classify", {"hello", "--activation", "none"})).at(0);
  EXPECT_EQ(score.at("label"), "LABEL_0");
  EXPECT_NEAR(score.at("score").get<double>(), 1 / (1 + std::exp(-raw.at("score").get<double>())), 1e-6);
}

TEST_F(CliHeads, PairsFromLinesAndOptions) {
  const std::string input =
      "{\"id\": 1, \"text\": \"hello\", \"pair\": \"world\"}\n{\"id\": \"x\", \"text\": \"hello\"}\n"
      "{\"id\": [2], \"text_pair\": \"cat\", \"text\": \"hello\"}\n";
  const std::vector<json> got = lines(on("sentiment", "classify", {}, input));
  ASSERT_EQ(got.size(), 3u);
  EXPECT_EQ(got[0].at("id"), 1);
  EXPECT_EQ(got[1].at("id"), "x");
  EXPECT_EQ(got[2].at("id"), json::array({2}));
  EXPECT_EQ(got[0].at("score"), lines(on("sentiment", "classify", {"hello", "--pair", "world"})).at(0).at("score"));
  EXPECT_EQ(got[1].at("score"), lines(on("sentiment", "classify", {"hello"})).at(0).at("score"));
  EXPECT_EQ(got[2].at("score"), lines(on("sentiment", "classify", {"hello", "--pair", "cat"})).at(0).at("score"));
  EXPECT_NE(got[0].at("score"), got[1].at("score"));
  // --pair is for lines without one of their own.
  const std::vector<json> filled = lines(on("sentiment", "classify", {"--pair", "cat"}, input));
  EXPECT_EQ(filled[0].at("score"), got[0].at("score"));
  EXPECT_EQ(filled[1].at("score"), got[2].at("score"));
}

TEST_F(CliHeads, BatchAndThreadsDoNotChangeTheResult) {
  std::string input;
  for (int i = 0; i < 150; ++i)
    input += "{\"text\": \"text " + std::to_string(i * 7919) + " hello\"" + (i % 3 ? "" : ", \"pair\": \"world\"") + "}\n";
  for (const char *model : {"sentiment", "ner"}) {
    std::string texts = input;
    if (std::string(model) == "ner")
      for (size_t at; (at = texts.find(", \"pair\": \"world\"")) != std::string::npos;) texts.erase(at, 17);
    const run_result one = on(model, "classify", {"-b", "1", "-t", "1"}, texts);
    EXPECT_EQ(lines(one).size(), 150u);
    EXPECT_EQ(on(model, "classify", {"-b", "150", "-t", "2"}, texts).out, one.out);
    EXPECT_EQ(on(model, "classify", {"-b", "7", "--thread-mode", "throughput", "--no-check"}, texts).out, one.out);
  }
}

TEST_F(CliHeads, BadLinesAreReportedAndTheOthersGoOn) {
  const std::string input =
      "{\"text\": \"hello\"}\n{\"text\": 5}\n{\"text\": \"hello\", \"pair\": []}\n{\"no\": 1}\n{\"text\": \"world\"}\n{\"text\":\n";
  const run_result r = on("sentiment", "classify", {}, input);
  EXPECT_EQ(r.code, 1);
  EXPECT_EQ(jsonl(r.out).size(), 2u) << r;
  const strings said = lines_of(r.err);
  ASSERT_EQ(said.size(), 5u) << r;
  EXPECT_EQ(said[0], "rs: stdin:2: \"text\" is not a string");
  EXPECT_EQ(said[1], "rs: stdin:3: the pair of \"text\" is not a string");
  EXPECT_EQ(said[2], "rs: stdin:4: no \"text\"");
  EXPECT_EQ(said[4], "rs: 4 of 6 texts failed");
  const run_result stop = on("sentiment", "classify", {"--on-error", "stop"}, input);
  EXPECT_EQ(stop.code, 1);
  EXPECT_EQ(jsonl(stop.out).size(), 1u) << stop;
  const run_result utf8 = on("sentiment", "classify", {"--", "hello", "caf\xc3", "world"});
  EXPECT_EQ(utf8.code, 1);
  EXPECT_EQ(jsonl(utf8.out).size(), 2u) << utf8;
  EXPECT_NE(utf8.err.find("text 2: "), std::string::npos) << utf8;
  // Labels of tokens are of single texts.
  const run_result pair = on("ner", "classify", {}, "{\"text\": \"a\", \"pair\": \"b\"}\n{\"text\": \"a\"}\n");
  EXPECT_EQ(pair.code, 1);
  EXPECT_EQ(jsonl(pair.out).size(), 1u) << pair;
  EXPECT_NE(pair.err.find("stdin:1: a pair, but the model labels the tokens of single texts"), std::string::npos) << pair;
}

TEST_F(CliHeads, LongTextsAreCutAndSaidToBe) {
  std::string text;
  for (int i = 0; i < 100; ++i) text += "cat ";
  const run_result r = on("sentiment", "classify", {"--", text, "a"});
  EXPECT_EQ(r.code, 0);
  EXPECT_TRUE(jsonl(r.out).at(0).at("truncated").get<bool>());
  EXPECT_EQ(r.err, "rs: 1 of 2 texts were cut to 64 tokens (longest: 102); --long chunk keeps all\n");
  EXPECT_EQ(on("sentiment", "classify", {"--long", "error", "--", text}).code, 1);
  const run_result chunked = on("sentiment", "classify", {"--long", "chunk", "--", text});
  EXPECT_EQ(chunked.err, "");
  EXPECT_FALSE(jsonl(chunked.out).at(0).at("truncated").get<bool>());
  const run_result ner = on("ner", "classify", {"--tokens", "--max-tokens", "10", "--", text});
  EXPECT_EQ(jsonl(ner.out).at(0).at("token_labels").size(), 8u) << ner;
  EXPECT_NE(ner.err.find("cut to 10 tokens (longest: 102)"), std::string::npos);
}

TEST_F(CliHeads, Dropping) {
  const std::string text = "hello world cat kitten stock find read text line";
  for (const auto &[model, command, arguments] :
       std::vector<std::tuple<std::string, std::string, strings>>{{"sentiment", "classify", {"--top", "3", "--", text}},
                                                                  {"ner", "classify", {"--tokens", "--", text}},
                                                                  {"cross", "rerank", {"-q", "hello", "--", text}},
                                                                  {"squad", "answer", {"-q", "hello", "--", text}}}) {
    const auto with = [&, command = command, model = model, arguments = arguments](const std::string &ratios) {
      strings all = {"--drop", ratios};
      all.insert(all.end(), arguments.begin(), arguments.end());
      return on(model, command, all);
    };
    const run_result plain = on(model, command, arguments), zero = with("0,0"), half = with("0.5");
    EXPECT_EQ(plain.code, 0) << plain;
    EXPECT_EQ(zero.out, plain.out) << zero;
    EXPECT_EQ(half.code, 0) << half;
    EXPECT_NE(half.out, plain.out) << half;
    EXPECT_EQ(with("1").code, 2);
  }
}

// ------------------------------------------------------------------------------------------------ labels of tokens

TEST_F(CliHeads, EntitiesAreNeighboursOfOneLabel) {
  // Every script that offsets could stumble over: é in one character and in two, wide ones, an emoji.
  strings texts = {"hello world cat kitten stock find read text line", "Caf\xc3\xa9 hello caf\x65\xcc\x81, 漢字 cat 😀 world!", "",
                   "   "};
  for (int i = 0; i < 30; ++i)
    texts.push_back("text " + std::to_string(i * 7919) + " hello é " + std::to_string(i * i) + " world cat");
  strings arguments = {"--tokens", "--"};
  arguments.insert(arguments.end(), texts.begin(), texts.end());
  const std::vector<json> got = lines(on("ner", "classify", arguments));
  ASSERT_EQ(got.size(), texts.size());
  std::set<std::string> seen;
  for (size_t i = 0; i < texts.size(); ++i) {
    // As group_entities of transformers does it.
    struct group {
      std::string tag;
      double sum;
      size_t count, begin, end;
    };
    std::vector<group> groups;
    std::string last;
    for (const json &t : got[i].at("token_labels")) {
      EXPECT_EQ(t.at("text"), characters(texts[i], t.at("begin"), t.at("end")));
      const std::string label = t.at("label"), tag = label.find('-') == 1 ? label.substr(2) : label;
      if (groups.empty() || tag != last || label.compare(0, 2, "B-") == 0) groups.push_back({tag, 0, 0, t.at("begin"), 0});
      group &g = groups.back();
      g.sum += t.at("score").get<double>();
      ++g.count;
      g.end = t.at("end");
      last = tag;
      seen.insert(label);
    }
    groups.erase(std::remove_if(groups.begin(), groups.end(), [](const group &g) { return g.tag == "O"; }), groups.end());
    const json &entities = got[i].at("entities");
    ASSERT_EQ(entities.size(), groups.size()) << got[i];
    for (size_t k = 0; k < groups.size(); ++k) {
      EXPECT_EQ(entities[k].at("label"), groups[k].tag);
      EXPECT_NEAR(entities[k].at("score").get<double>(), groups[k].sum / double(groups[k].count), 1e-6);
      EXPECT_EQ(entities[k].at("begin"), groups[k].begin);
      EXPECT_EQ(entities[k].at("end"), groups[k].end);
      EXPECT_EQ(entities[k].at("text"), characters(texts[i], groups[k].begin, groups[k].end));
    }
  }
  EXPECT_EQ(seen.size(), 4u) << "the test sees not all labels";
  EXPECT_FALSE(lines(on("ner", "classify", {"hello"})).at(0).contains("token_labels"));
}

// ------------------------------------------------------------------------------------------------ rs rerank

const strings documents = {"hello world", "cat", "kitten stock", "a text of some words", "line 42", "cat"};

TEST_F(CliHeads, RerankSortsByWhatClassifySays) {
  std::vector<std::pair<double, size_t>> wanted;
  for (size_t i = 0; i < documents.size(); ++i)
    wanted.emplace_back(-lines(on("cross", "classify", {"find cat", "--pair", documents[i]})).at(0).at("score").get<double>(), i);
  std::sort(wanted.begin(), wanted.end());  // of equal ones the first
  strings arguments = {"--query", "find cat", "--"};
  arguments.insert(arguments.end(), documents.begin(), documents.end());
  const std::vector<json> got = lines(on("cross", "rerank", arguments));
  ASSERT_EQ(got.size(), documents.size());
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_EQ(got[i].at("index"), wanted[i].second);
    EXPECT_EQ(got[i].at("score").get<double>(), -wanted[i].first);
    EXPECT_EQ(got[i].at("text"), documents[wanted[i].second]);
  }
  arguments.insert(arguments.begin(), {"--top", "2", "--no-text", "-b", "1"});
  const std::vector<json> top = lines(on("cross", "rerank", arguments));
  ASSERT_EQ(top.size(), 2u);
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(top[i].at("index"), got[i].at("index"));
    EXPECT_FALSE(top[i].contains("text"));
  }
  // Which of two lists is meant nobody knows.
  const run_result two = on("cross", "rerank", {}, "{\"query\": \"x\", \"documents\": [\"a\"], \"texts\": [\"b\"]}\n");
  EXPECT_EQ(two.code, 1) << two;
  EXPECT_EQ(two.out, "");
  EXPECT_NE(two.err.find("stdin:1: both \"documents\" and \"texts\""), std::string::npos) << two;
  // The same from lines with a query each, and from a file of documents.
  const json line = {{"id", "q1"}, {"query", "find cat"}, {"texts", documents}};
  json other = {{"query", "find cat"}, {"documents", documents}}, empty = {{"query", "x"}, {"texts", json::array()}};
  const std::vector<json> lists = lines(on("cross", "rerank", {}, line.dump() + "\n" + empty.dump() + "\n" + other.dump() + "\n"));
  ASSERT_EQ(lists.size(), 3u);
  EXPECT_EQ(lists[0].at("id"), "q1");
  EXPECT_EQ(lists[0].at("results"), json(got));
  EXPECT_EQ(lists[1].at("results"), json::array());
  EXPECT_EQ(lists[2].at("results"), json(got));
  EXPECT_FALSE(lists[2].contains("id"));
  std::string file_lines;
  for (size_t i = 0; i < documents.size(); ++i) file_lines += json{{"id", 100 + i}, {"text", documents[i]}}.dump() + "\n";
  write_file(dir_ / "documents.jsonl", file_lines);
  const std::vector<json> from_file = lines(on("cross", "rerank", {"-q", "find cat", "-f", dir_ / "documents.jsonl"}));
  ASSERT_EQ(from_file.size(), got.size());
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_EQ(from_file[i].at("index"), got[i].at("index"));
    EXPECT_EQ(from_file[i].at("id"), 100 + got[i].at("index").get<size_t>());
  }
}

TEST_F(CliHeads, RerankByOneOfSeveralLabels) {
  const json a = lines(on("sentiment", "rerank", {"-q", "hello", "--label", "good", "world"})).at(0);
  EXPECT_EQ(a.at("score").get<double>(),
            scores_of(lines(on("sentiment", "classify", {"hello", "--pair", "world", "--top", "3"})).at(0)).at("good"));
}

TEST_F(CliHeads, RerankBadLines) {
  const run_result r = on(
      "cross", "rerank", {},
      "{\"query\": \"a\", \"texts\": [\"b\", 5]}\n{\"query\": \"a\"}\n{\"texts\": [\"a\"]}\n{\"query\": \"a\", \"texts\": \"b\"}\n"
      "{\"query\": \"a\", \"texts\": [[\"b\"]]}\n{\"query\": \"a\", \"texts\": [{\"text\": \"b\"}]}\n{\"query\": \"a\", \"texts\": "
      "[\"b\"]}\n");
  EXPECT_EQ(r.code, 1);
  EXPECT_EQ(jsonl(r.out).size(), 1u) << r;
  const strings said = lines_of(r.err);
  ASSERT_EQ(said.size(), 7u) << r;
  EXPECT_EQ(said[0], "rs: stdin:1: \"texts\" is not a list of strings");
  EXPECT_EQ(said[1], "rs: stdin:2: no \"texts\"");
  EXPECT_EQ(said[2], "rs: stdin:3: no \"query\"");
  for (size_t i = 3; i < 6; ++i) EXPECT_NE(said[i].find("\"texts\" is not a list of strings"), std::string::npos) << said[i];
  const run_result both = on("cross", "rerank", {"-q", "a"}, "{\"query\": \"a\", \"texts\": [\"b\"]}\n{\"text\": \"b\"}\n");
  EXPECT_EQ(both.code, 1);
  EXPECT_EQ(jsonl(both.out).size(), 1u) << both;
  EXPECT_EQ(lines_of(both.err).at(0), "rs: stdin:1: \"query\", but --query is given, which is for lines without one");
  // The index counts texts that could not be used.
  const run_result skipped = on("cross", "rerank", {"-q", "a", "--", "\xff", "b"});
  EXPECT_EQ(skipped.code, 1);
  EXPECT_EQ(jsonl(skipped.out).at(0).at("index"), 1) << skipped;
}

// ------------------------------------------------------------------------------------------------ rs answer

TEST_F(CliHeads, AnswersArePartsOfTheContext) {
  const std::string context = "Caf\xc3\xa9 hello 漢字 caf\x65\xcc\x81 cat 😀 world. find the kitten";
  const json got = lines(on("squad", "answer", {"--question", "find what", "--top", "8", "--", context})).at(0);
  EXPECT_EQ(got.at("answers").size(), 8u);
  EXPECT_EQ(got.at("answer"), got.at("answers")[0].at("answer"));
  double last = INFINITY;
  for (const json &a : got.at("answers")) {
    const std::string text = a.at("answer");
    EXPECT_EQ(text, characters(context, a.at("begin"), a.at("end")));
    EXPECT_EQ(text, context.substr(a.at("begin_byte"), a.at("end_byte").get<size_t>() - a.at("begin_byte").get<size_t>()));
    EXPECT_FALSE(text.empty());
    EXPECT_LE(a.at("logit").get<double>(), last);
    last = a.at("logit");
    EXPECT_GT(a.at("score").get<double>(), 0);
    EXPECT_LT(a.at("score").get<double>(), 1);
  }
  // The same as a line, and as a file.
  const json line = {{"id", 9}, {"question", "find what"}, {"context", context}};
  json from_line = lines(on("squad", "answer", {"--top", "8"}, line.dump() + "\n")).at(0);
  EXPECT_EQ(from_line.at("id"), 9);
  from_line.erase("id");
  EXPECT_EQ(from_line, got);
  write_file(dir_ / "context.txt", context);
  const strings from_file = {"-q", "find what", "--top", "8", "--context-file"};
  strings named = from_file, piped = from_file;
  named.push_back(dir_ / "context.txt"), piped.push_back("-");
  EXPECT_EQ(lines(on("squad", "answer", named)).at(0), got);
  EXPECT_EQ(lines(on("squad", "answer", piped, context)).at(0), got);
  // -q is for lines without a question of their own.
  const std::string own = json{{"context", context}, {"question", "find what"}}.dump() + "\n",
                    none = json{{"context", context}}.dump() + "\n";
  const std::vector<json> filled = lines(on("squad", "answer", {"-q", "line 42?", "--top", "8"}, own + none));
  EXPECT_EQ(filled.at(0), got);
  EXPECT_NE(filled.at(1).at("logit"), got.at("logit"));
  // Windows.
  std::string text;
  for (int i = 0; i < 200; ++i) text += context + " ";
  const json far = lines(on("squad", "answer", {"-q", "find what", "--", text})).at(0);
  EXPECT_EQ(far.at("answer"), characters(text, far.at("begin"), far.at("end")));
}

TEST_F(CliHeads, NoAnswer) {
  const strings ask = {"-q", "find what", "--top", "1", "--", "hello world cat"};
  const json got = lines(on("squad", "answer", ask)).at(0);
  const double margin = got.at("no_answer_logit").get<double>() - got.at("logit").get<double>();
  const auto with = [&](double threshold) {
    strings all = {"--no-answer", std::to_string(threshold)};
    all.insert(all.end(), ask.begin(), ask.end());
    return lines(on("squad", "answer", all)).at(0);
  };
  EXPECT_EQ(with(margin + 0.01), got);
  const json none = with(margin - 0.01);
  EXPECT_EQ(none.at("answer"), "");
  EXPECT_EQ(none.at("begin"), 0);
  EXPECT_EQ(none.at("end"), 0);
  EXPECT_EQ(none.at("score"), got.at("no_answer_score"));
  EXPECT_EQ(none.at("logit"), got.at("no_answer_logit"));
  EXPECT_EQ(none.at("answers"), got.at("answers"));
  const json empty = lines(on("squad", "answer", {"-q", "find what", "--top", "3", "--", ""})).at(0);
  EXPECT_EQ(empty.at("answer"), "");
  EXPECT_EQ(empty.at("answers"), json::array());
  EXPECT_NE(empty.at("no_answer_logit"), 0.0);
}

TEST_F(CliHeads, AnswerBadLines) {
  std::string question;
  for (int i = 0; i < 100; ++i) question += "cat ";
  const json good = {{"question", "find"}, {"context", "a cat"}}, too_long = {{"question", question}, {"context", "a cat"}};
  const run_result r = on("squad", "answer", {},
                          good.dump() + "\n{\"question\": \"a\"}\n{\"context\": \"a\"}\n{\"question\": \"a\", \"context\": 1}\n" +
                              too_long.dump() + "\n" + good.dump() + "\n");
  EXPECT_EQ(r.code, 1);
  EXPECT_EQ(jsonl(r.out).size(), 2u) << r;
  const strings said = lines_of(r.err);
  ASSERT_EQ(said.size(), 5u) << r;
  EXPECT_EQ(said[0], "rs: stdin:2: no \"context\"");
  EXPECT_EQ(said[1], "rs: stdin:3: no \"question\"");
  EXPECT_EQ(said[2], "rs: stdin:4: \"context\" is not a string");
  EXPECT_EQ(said[3], "rs: stdin:5: the question has 100 tokens, which leaves no room for the context in windows of 64");
}

TEST_F(CliHeads, InfoNamesTheHead) {
  EXPECT_EQ(json::parse(rs({"info", file("ner"), "--json"}).out).at("head"), "tokens");
  EXPECT_EQ(json::parse(rs({"info", file("ner"), "--json"}).out).at("labels"), 4);
  EXPECT_NE(rs({"info", file("cross")}).out.find("sequence, 1 label\n"), std::string::npos);
  EXPECT_EQ(json::parse(rs({"info", file("bare"), "--json"}).out).at("head"), "none");
}

}  // namespace
