// rs eval: metrics against values of the field's own scripts, readers on good and hostile files, the command as a user runs it.
#include <cmath>

#include "cli_util.h"
#include "tiny_model.h"
#include "tools/datasets.h"
#include "tools/metrics.h"
#include "tools/tasks.h"

namespace {

// ------------------------------------------------------------------------------------------------ metrics

TEST(metrics, ranks_share_ties) {
  EXPECT_EQ(ranks_of({}), std::vector<double>{});
  EXPECT_EQ(ranks_of({1, 2, 2, 3, 5, 5, 5, 0}), (std::vector<double>{2, 3.5, 3.5, 5, 7, 7, 7, 1}));
  EXPECT_EQ(ranks_of({4, 4, 4}), (std::vector<double>{2, 2, 2}));
}

TEST(metrics, correlations) {
  const std::vector<double> a = {1, 2, 2, 3, 5, 5, 5, 0}, b = {2, 1, 4, 4, 9, 8, 8, -1};
  EXPECT_NEAR(spearman(a, b), 0.925626545313669, 1e-12);  // scipy.stats.spearmanr
  EXPECT_NEAR(pearson(a, b), 0.9631008508984569, 1e-12);
  EXPECT_NEAR(spearman({1, 2, 3}, {10, 20, 1000}), 1, 1e-12);
  EXPECT_NEAR(spearman({1, 2, 3}, {3, 2, 1}), -1, 1e-12);
  EXPECT_TRUE(std::isnan(spearman({1, 2, 3}, {4, 4, 4})));
  EXPECT_TRUE(std::isnan(spearman({NAN, NAN, NAN}, {1, 2, 3})));
  EXPECT_TRUE(std::isnan(spearman({1, 2, 3}, {1, NAN, 3})));
  EXPECT_EQ(median({}), 0);
  EXPECT_EQ(median({5, 1, 2, 9}), 3.5);
  EXPECT_TRUE(std::isnan(pearson({}, {})));
  EXPECT_TRUE(std::isnan(pearson({1}, {1})));
}

TEST(metrics, ndcg_and_recall) {
  const std::vector<double> found = {3, 0, 2, 1, 0, 0, 0, 0, 0, 0, 4};
  const std::vector<double> relevant = {1, 3, 4, 3, 2, 1};
  EXPECT_NEAR(ndcg_at(10, found, relevant), 0.4924504724106388, 1e-12);
  EXPECT_NEAR(ndcg_at(2, {0, 1}, {1}), 1 / std::log2(3.0), 1e-12);
  EXPECT_NEAR(ndcg_at(10, {2, 1}, {1, 2}), 1, 1e-12);
  EXPECT_EQ(ndcg_at(10, {0, 0}, {1}), 0);
  EXPECT_EQ(ndcg_at(10, {}, {1}), 0);
  EXPECT_EQ(ndcg_at(10, {}, {}), 0);
  EXPECT_NEAR(recall_at(10, found, relevant), 3.0 / 6, 1e-12);
  EXPECT_NEAR(recall_at(11, found, relevant), 4.0 / 6, 1e-12);
  EXPECT_NEAR(recall_at(100, found, relevant), 4.0 / 6, 1e-12);
  EXPECT_EQ(recall_at(10, {}, {}), 0);
}

TEST(metrics, nearest_rows_and_classes) {
  const float rows[] = {1, 0, 0, 2, 3, 3, -1, 0, 0, 0};  // the last has no direction
  const float query[] = {5, 0.1F};
  const vectors_view all = {rows, 5, 2};
  EXPECT_EQ(nearest_rows({query, 1, 2}, all, 2), (std::vector<std::vector<size_t>>{{0, 2}}));
  EXPECT_EQ(nearest_rows({query, 1, 2}, all, 9), (std::vector<std::vector<size_t>>{{0, 2, 1, 4, 3}}));
  EXPECT_EQ(nearest_rows({query, 1, 2}, all, 2, {0}), (std::vector<std::vector<size_t>>{{2, 1}}));
  EXPECT_EQ(nearest_rows({query, 1, 2}, all, 2, {SIZE_MAX}), (std::vector<std::vector<size_t>>{{0, 2}}));
  const float same[] = {1, 1, 2, 2, 4, 4};  // equal cosines: the earlier first
  EXPECT_EQ(nearest_rows({query, 1, 2}, {same, 3, 2}, 2), (std::vector<std::vector<size_t>>{{0, 1}}));

  // Leave one out: each text's nearest is its twin; with all votes, the nearer pair still weighs more.
  const float pairs[] = {1, 0, 1, 0.1F, 0, 1, 0.1F, 1};
  EXPECT_EQ(nearest_classes({pairs, 4, 2}, {0, 0, 1, 1}, {nullptr, 0, 2}, 1), (std::vector<int>{0, 0, 1, 1}));
  EXPECT_EQ(nearest_classes({pairs, 4, 2}, {0, 0, 1, 1}, {nullptr, 0, 2}, 3), (std::vector<int>{0, 0, 1, 1}));
  EXPECT_EQ(nearest_classes({pairs, 4, 2}, {0, 1, 0, 1}, {nullptr, 0, 2}, 1), (std::vector<int>{1, 0, 1, 0}));
  EXPECT_EQ(nearest_classes({pairs, 4, 2}, {0, 0, 1, 1}, {query, 1, 2}, 2), std::vector<int>{0});
  // A tie of votes: the lower class.
  EXPECT_EQ(nearest_classes({same, 2, 2}, {1, 0}, {query, 1, 2}, 2), std::vector<int>{0});
}

// Right-hand sides: normalize_answer of SQuAD's evaluate-v2.0.py, run in Python.
TEST(metrics, squad_normalization_is_the_official_one) {
  const std::pair<const char *, const char *> cases[] = {
      {"The Cat", "cat"},
      {"a  the an", ""},
      {"U.S.A.", "usa"},
      {"an-other the_a", "another thea"},
      {"Ünïcode À LA Carte", "ünïcode à la carte"},
      {"x€the€y", "x€ €y"},
      {"the€5", "€5"},
      {"a\u0301 b", "\u0301 b"},
      {"e\u0301a the", "e\u0301"},
      {"theatre a1 1a", "theatre a1 1a"},
      {"\u2003the\u00a0end\u3000", "end"},
      {"—The—", "— —"},
      {"A’s the", "’s"},
      {"don't", "dont"},
      {"Ｔｈｅ the", "ｔｈｅ"},
      {"５ a ５", "５ ５"},
      {"ΑΒΓ the", "αβγ"},
      {"²the", "²the"},
      {"東京the 東京 the", "東京the 東京"},
      {"a\u200bthe", "\u200b"},
      {"", ""},
      {" \t\n", ""},
  };
  for (const auto &[text, wanted] : cases) EXPECT_EQ(squad_normalized(text), wanted) << text;
  EXPECT_EQ(squad_normalized("a\xff\xfe b"), "b");  // no UTF-8: passed over, not read beyond
  EXPECT_EQ(squad_normalized(std::string_view("x\xe2\x82", 3)), "x");
}

TEST(metrics, squad_scores) {
  const auto judge = [](const char *prediction, const strings &answers) {
    const squad_score s = squad_judge(prediction, answers);
    return std::make_pair(s.exact, s.f1);
  };
  using pair = std::pair<double, double>;
  EXPECT_EQ(judge("the big red dog.", {"Big red dog"}), (pair{1, 1}));
  EXPECT_EQ(judge("cat", {"dog", "the Cat"}), (pair{1, 1}));
  EXPECT_NEAR(judge("a red red dog barks", {"the big red dog"}).second, 0.5714285714285715, 1e-12);
  EXPECT_EQ(judge("a red red dog barks", {"the big red dog"}).first, 0);
  EXPECT_EQ(judge("", {"dog"}), (pair{0, 0}));
  EXPECT_EQ(judge("", {}), (pair{1, 1}));     // nothing is the answer
  EXPECT_EQ(judge("the", {}), (pair{1, 1}));  // as the script has it: nothing is left
  EXPECT_EQ(judge("dog", {}), (pair{0, 0}));
  EXPECT_EQ(judge("dog", {"the", "dog"}), (pair{1, 1}));  // an answer of nothing but an article does not count
  EXPECT_EQ(judge("", {"the", "dog"}), (pair{0, 0}));
}

// ------------------------------------------------------------------------------------------------ readers

class Readers : public testing::Test {
 protected:
  std::string write(const std::string &name, const std::string &text) {
    std::filesystem::create_directories(std::filesystem::path(dir_ / name).parent_path());
    write_file(dir_ / name, text);
    return dir_ / name;
  }
  template <class Read>
  void expect_error(Read read, const std::string &part) {
    try {
      read();
      ADD_FAILURE() << "no error, wanted: " << part;
    } catch (const failure &e) {
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what() << "\nwanted: " << part;
    }
  }
  temp_dir dir_;
};

TEST_F(Readers, ScoredPairs) {
  const std::string bench = "g\tf\ty\t1\t2.5\tone\ttwo\n\ng\tf\ty\t2\t-1\tthree\tfour\tsource\tsource\r\n";
  scored_pairs pairs = read_scored_pairs(write("a.csv", bench), {});
  EXPECT_EQ(pairs.scores, (std::vector<double>{2.5, -1}));
  EXPECT_EQ(pairs.first.texts, (strings{"one", "three"}));
  EXPECT_EQ(pairs.second.texts, (strings{"two", "four"}));
  EXPECT_EQ(pairs.second.place(1), dir_ / "a.csv:3");

  pairs = read_scored_pairs(write("b.tsv", "\xef\xbb\xbfscore\tid\tsentence2\tsentence1\n3\tx\tb\ta\n"), {});
  EXPECT_EQ(pairs.scores, std::vector<double>{3});
  EXPECT_EQ(pairs.first.texts, strings{"a"});

  pairs = read_scored_pairs(write("c.jsonl",
                                  "{\"text1\":\"a\",\"text2\":\"b\",\"score\":1}\n"
                                  "{\"sentence1\":\"c\",\"sentence2\":\"d\",\"score\":0.5,\"more\":[]}\n"),
                            {});
  EXPECT_EQ(pairs.first.texts, (strings{"a", "c"}));
  EXPECT_EQ(pairs.scores, (std::vector<double>{1, 0.5}));
}

TEST_F(Readers, ScoredPairsThatAreWrong) {
  const std::pair<std::string, const char *> cases[] = {
      {"", "no pairs in it"},
      {"\n\n", "no pairs in it"},
      {"a\tb\tc\n", "x:1: 3 columns between tabs, expected at least 7"},
      {"g\tf\ty\t1\t2\ta\tb\ng\tf\ty\t1\t2\ta\n", "x:2: 6 columns"},
      {"g\tf\ty\t1\tgood\ta\tb\n", "x:1: the score 'good' is not a number"},
      {"g\tf\ty\t1\t\ta\tb\n", "the score '' is not a number"},
      {"g\tf\ty\t1\t1e999\ta\tb\n", "the score '1e999' is not a number"},
      {"g\tf\ty\t1\tnan\ta\tb\n", "the score 'nan' is not a number"},
      {"g\tf\ty\t1\t1 \ta\tb\n", "the score '1 ' is not a number"},
      {"g\tf\ty\t1\t1\t\xff\tb\n", "x:1: not valid UTF-8"},
      {"g\tf\ty\t1\t1\t\xed\xa0\x80\tb\n", "x:1: not valid UTF-8"},
      {"{\"text1\":\"a\",\"text2\":\"b\"}\n", "x:1: no \"score\""},
      {"{\"text1\":\"a\",\"score\":1}\n", "x:1: no \"text2\" or \"sentence2\""},
      {"{\"text1\":\"a\",\"text2\":7,\"score\":1}\n", "'text2' is number, expected a string"},
      {"{\"text1\":\"a\",\"text2\":\"b\",\"score\":\"1\"}\n", "'score' is string, expected a number"},
      {"{\"text1\":\"a\",\"text2\":\"b\",\"score\":1}\n[1]\n", "x:2: not a JSON object"},
      {"{\"text1\":\"a\"\n", "x:1: not valid JSON"},
      {"{\"a\":" + std::string(1000, '[') + std::string(1000, ']') + "}\n", "nested deeper"},
  };
  for (const auto &wrong : cases) expect_error([&] { read_scored_pairs(write("x", wrong.first), {}); }, wrong.second);
  expect_error([&] { read_scored_pairs(dir_ / "absent", {}); }, "cannot open");
  expect_error([&] { read_scored_pairs(dir_.path(), {}); }, "cannot read");
  expect_error([&] { read_scored_pairs(write("x", std::string((size_t(64) << 20) + 1, 'a')), {}); }, "x:1: the line is longer");
}

TEST_F(Readers, LabelledTexts) {
  labelled_texts data = read_labelled_texts(write("a.tsv", "sentence\tlabel\none \t1\ntwo\t0\n"), {});
  EXPECT_EQ(data.texts.texts, (strings{"one ", "two"}));
  EXPECT_EQ(data.labels, (strings{"1", "0"}));
  EXPECT_EQ(data.texts.place(0), dir_ / "a.tsv:2");
  data = read_labelled_texts(write("b.tsv", "label\ttext\nx\ty\n"), {});
  EXPECT_EQ(data.labels, strings{"x"});
  data = read_labelled_texts(write("c.tsv", "one\tx\n"), {});
  EXPECT_EQ(data.labels, strings{"x"});
  data = read_labelled_texts(write("d.jsonl", "{\"text\":\"a\",\"label\":3}\n{\"sentence\":\"b\",\"label\":\"x\"}\n"), {});
  EXPECT_EQ(data.labels, (strings{"3", "x"}));

  expect_error([&] { read_labelled_texts(write("x", "text only\n"), {}); }, "x:1: 1 columns");
  expect_error([&] { read_labelled_texts(write("x", "text\t\n"), {}); }, "x:1: the label is empty");
  expect_error([&] { read_labelled_texts(write("x", "sentence\tlabel\n"), {}); }, "no texts in it");
  expect_error([&] { read_labelled_texts(write("x", "{\"text\":\"a\"}\n"), {}); }, "x:1: no \"label\"");
  expect_error([&] { read_labelled_texts(write("x", "{\"text\":\"a\",\"label\":1.5}\n"), {}); }, "'label' is number, expected");
  expect_error([&] { read_labelled_texts(write("x", "{\"text\":\"a\",\"label\":true}\n"), {}); }, "'label' is boolean, expected");
}

TEST_F(Readers, Subsets) {
  EXPECT_EQ((subset{0, 0}.of(3)), (std::vector<size_t>{0, 1, 2}));
  EXPECT_EQ((subset{2, 0}.of(3)), (std::vector<size_t>{0, 1}));
  EXPECT_EQ((subset{9, 5}.of(3)), (std::vector<size_t>{0, 1, 2}));
  const std::vector<size_t> some = subset{10, 1}.of(1000);
  EXPECT_EQ(some, (subset{10, 1}.of(1000)));
  EXPECT_NE(some, (subset{10, 2}.of(1000)));
  EXPECT_TRUE(std::is_sorted(some.begin(), some.end()));
  EXPECT_EQ(std::adjacent_find(some.begin(), some.end()), some.end());
  EXPECT_EQ(some.size(), 10u);
  const text_list texts = read_texts(write("t.txt", "a\nb\n\nc\n"), {3, 0});
  EXPECT_EQ(texts.texts, (strings{"a", "b", ""}));
  expect_error([&] { read_texts(write("t.txt", ""), {}); }, "no texts in it");
  expect_error([&] { read_texts(write("t.txt", "a\n\xff\n"), {}); }, "t.txt:2: not valid UTF-8");
}

class Beir : public Readers {
 protected:
  void SetUp() override {
    write("corpus.jsonl",
          "{\"_id\":\"d1\",\"title\":\"One\",\"text\":\"first\"}\n{\"_id\":\"d2\",\"title\":\"\",\"text\":\"second\"}\n"
          "{\"_id\":3,\"text\":\"third\"}\n");
    write("queries.jsonl",
          "{\"_id\":\"q1\",\"text\":\"who\"}\n{\"_id\":\"q2\",\"text\":\"what\"}\n{\"_id\":\"q3\",\"text\":\"why\"}\n");
    write("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td2\t2\nq1\td1\t0\nq3\t3\t1\nq3\td1\t3\n");
  }
  retrieval_set read(bool binary = false, const retrieval_subset &part = {}) { return read_retrieval(dir_.path(), binary, part); }
};

TEST_F(Beir, IsRead) {
  const retrieval_set set = read();
  EXPECT_EQ(set.documents.texts, (strings{"One first", "second", "third"}));
  EXPECT_EQ(set.queries.texts, (strings{"who", "why"}));  // nothing is known of q2
  ASSERT_EQ(set.relevant.size(), 2u);
  ASSERT_EQ(set.relevant[0].size(), 1u);
  EXPECT_EQ(set.relevant[0][0].document, 1u);
  EXPECT_EQ(set.relevant[0][0].gain, 2);
  EXPECT_EQ(set.relevant[1][1].gain, 3);
  EXPECT_EQ(read(true).relevant[1][1].gain, 1);
}

// A query that is a document does not find itself.
TEST_F(Beir, QueriesAmongTheDocuments) {
  const size_t none = retrieval_set::no_document;
  EXPECT_EQ(read().itself, (std::vector<size_t>{none, none}));
  write("queries.jsonl",
        "{\"_id\":\"d2\",\"text\":\"second\"}\n{\"_id\":\"3\",\"text\":\"third\"}\n{\"_id\":\"d1\",\"text\":\"other\"}\n");
  write("qrels/test.tsv", "query-id\tcorpus-id\tscore\nd2\td1\t1\n3\t3\t1\nd1\td2\t1\n");
  EXPECT_EQ(read().itself, (std::vector<size_t>{1, none, none})) << "3 is said to be relevant, d1 is another text";
  write("qrels/test.tsv", "query-id\tcorpus-id\tscore\nd2\td1\t1\nd1\td1\t1\n");
  const retrieval_set set = read(false, {{0, 0}, {1, 0}});  // d1 alone is left of the documents
  EXPECT_EQ(set.itself, (std::vector<size_t>{none, none}));
}

TEST_F(Beir, Subsets) {
  const auto documents = [&](size_t queries, size_t limit) { return read(false, {{queries, 0}, {limit, 0}}); };
  retrieval_set set = documents(1, 1);
  EXPECT_EQ(set.queries.texts, strings{"who"});
  EXPECT_EQ(set.documents.texts, strings{"second"});  // the relevant one first
  EXPECT_EQ(set.relevant[0][0].document, 0u);
  set = documents(1, 2);
  EXPECT_EQ(set.documents.texts, (strings{"One first", "second"}));
  EXPECT_EQ(set.relevant[0][0].document, 1u);
  set = documents(0, 1);  // no room for what is relevant to the other query, which goes
  EXPECT_EQ(set.queries.texts, strings{"who"});
  EXPECT_EQ(documents(0, 3).documents.size(), 3u);
}

TEST_F(Beir, ThatIsWrong) {
  const std::string corpus = read_file(dir_ / "corpus.jsonl"), qrels = read_file(dir_ / "qrels/test.tsv");
  const auto with = [&](const char *file, const std::string &text, const char *part) {
    const std::string before = read_file(dir_ / file);
    write(file, text);
    expect_error([&] { read(); }, part);
    write(file, before);
  };
  with("corpus.jsonl", corpus + "{\"_id\":\"d1\",\"text\":\"again\"}\n", "corpus.jsonl:4: a second document 'd1'");
  with("corpus.jsonl", corpus + "{\"text\":\"x\"}\n", "corpus.jsonl:4: no \"_id\"");
  with("corpus.jsonl", corpus + "{\"_id\":\"\",\"text\":\"x\"}\n", "the id of a document is empty");
  with("corpus.jsonl", corpus + "{\"_id\":\"x\"}\n", "corpus.jsonl:4: no \"text\"");
  with("corpus.jsonl", corpus + "{\"_id\":[1],\"text\":\"\"}\n", "'_id' is array, expected a string");
  with("corpus.jsonl", "", "no documents in it");
  with("queries.jsonl", "{\"_id\":\"q1\",\"text\":\"a\"}\n{\"_id\":\"q1\",\"text\":\"b\"}\n", "a second query 'q1'");
  with("qrels/test.tsv", qrels + "q1\tnone\t1\n", "test.tsv:6: no document has the id 'none'");
  with("qrels/test.tsv", qrels + "q9\td1\t1\n", "test.tsv:6: no query has the id 'q9'");
  with("qrels/test.tsv", qrels + "q1\td2\t1\n", "query 'q1' and document 'd2' are judged twice");
  with("qrels/test.tsv", qrels + "q1\td2\n", "test.tsv:6: 2 columns");
  with("qrels/test.tsv", qrels + "q2\td2\tgood\n", "the score 'good' is not a number");
  with("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td2\t0\n", "no queries with a relevant document");
  std::filesystem::remove(dir_ / "qrels/test.tsv");
  expect_error([&] { read(); }, "cannot open");
  expect_error([&] { read_retrieval(dir_ / "corpus.jsonl", false, {}); }, "not a folder");
  expect_error([&] { read_retrieval(dir_ / "qrels", false, {}); }, "neither corpus.jsonl (BEIR) nor cran.all.1400 (Cranfield)");
}

class Cranfield : public Readers {
 protected:
  void SetUp() override {
    write(
        "cran.all.1400",
        ".I 1\n.T\na title\n of two lines .\n.A\nsomebody\n.B\nsomewhere\n.W\n  the text .\n.w\n.I 2\n.T\n.A\n.B\n.W\n.I 78888\n");
    write("cran.qry", ".I 001\r\n.W\r\nfirst\r\nquestion .\r\n.I 004\r\n.W\r\nsecond .\r\n.I\r\n");
    write("cranqrel", "1 2 1\n1 1 4\n2 1 -1\n2 2 3 \n");
  }
};

TEST_F(Cranfield, IsRead) {
  const retrieval_set set = read_retrieval(dir_.path(), false, {});
  EXPECT_EQ(set.documents.texts, (strings{"a title of two lines . the text . .w", ""}));
  EXPECT_EQ(set.queries.texts, (strings{"first question .", "second ."}));
  ASSERT_EQ(set.relevant[0].size(), 2u);
  EXPECT_EQ(set.relevant[0][0].gain, 4);  // code 1: the best
  EXPECT_EQ(set.relevant[0][1].gain, 1);
  ASSERT_EQ(set.relevant[1].size(), 1u);  // code -1: of no interest
  EXPECT_EQ(set.relevant[1][0].document, 1u);
  EXPECT_EQ(set.relevant[1][0].gain, 2);
}

TEST_F(Cranfield, ThatIsWrong) {
  const auto with = [&](const char *file, const std::string &text, const char *part) {
    const std::string before = read_file(dir_ / file);
    write(file, text);
    expect_error([&] { read_retrieval(dir_.path(), false, {}); }, part);
    write(file, before);
  };
  with("cran.all.1400", "text\n", "cran.all.1400:1: got 'text', expected '.I' and a number");
  with("cran.all.1400", ".I 1\ntext\n", "cran.all.1400:2: text before a line '.T'");
  with("cran.all.1400", ".I one\n.W\n", "the number of a document 'one' is not a whole number");
  with("cran.all.1400", ".I 1\n.W\na\n.I 1\n.W\nb\n", "cran.all.1400:4: a second document '1'");
  with("cran.all.1400", "", "no documents in it");
  with("cranqrel", "1 2\n", "cranqrel:1: 2 numbers, expected query, document and code");
  with("cranqrel", "1 2 9\n", "the code 9 is not -1 or from 1 to 5");
  with("cranqrel", "1 2 x\n", "the code 'x' is not a whole number");
  with("cranqrel", "3 2 1\n", "no query has the id '3'");
  with("cranqrel", "1 3 1\n", "no document has the id '3'");
  with("cranqrel", "", "no queries with a relevant document");
}

TEST_F(Readers, Squad) {
  const auto file = [](const std::string &qas) {
    return "{\"version\":\"x\",\"data\":[{\"title\":\"t\",\"paragraphs\":[{\"context\":\"A cat sat.\",\"qas\":[" + qas + "]}]}]}";
  };
  const std::string first = R"({"id":"1","question":"Who?","answers":[{"text":"A cat","answer_start":0},{"text":"cat"}]})";
  const std::string none = R"({"id":"2","question":"Why?","is_impossible":true,"answers":[],"plausible_answers":[]})";
  const squad_set set = read_squad(write("x.json", file(first + "," + none)), {});
  ASSERT_EQ(set.questions.size(), 2u);
  EXPECT_EQ(set.contexts, strings{"A cat sat."});
  EXPECT_EQ(set.questions[0].answers, (strings{"A cat", "cat"}));
  EXPECT_TRUE(set.questions[1].answers.empty());

  const auto wrong = [&](const std::string &text, const char *part) {
    expect_error([&] { read_squad(write("x.json", text), {}); }, part);
  };
  wrong("", "x.json: not valid JSON");
  wrong("[]", "x.json: not a JSON object");
  wrong("{}", "'data' is absent, expected an array");
  wrong("{\"data\":[{}]}", "article 1: 'paragraphs' is absent");
  wrong("{\"data\":[]}", "no questions in it");
  wrong(file(R"({"id":"1","answers":[]})"), "paragraph 1, question 1: no \"question\"");
  wrong(file(R"({"id":"1","question":"Who?"})"), "'answers' is absent, expected an array");
  wrong(file(R"({"id":"1","question":"Who?","answers":[{}]})"), "question 1: answers: no \"text\"");
  wrong(file(R"({"id":1,"question":"Who?","answers":[]})"), "'id' is number, expected a string");
  wrong(file(first + "," + first), "question 2: a second question '1'");
}

// ------------------------------------------------------------------------------------------------ the command

class Eval : public Readers {
 protected:
  static void SetUpTestSuite() {
    shared_ = new temp_dir;
    tiny_model().write(*shared_ / "tiny");
    tiny_options small;
    small.hidden = 16;
    small.heads = 2;
    small.prompts = false;
    tiny_model(small).write(*shared_ / "small");
    write_head("classifier", "SequenceClassification", {"no", "yes"});
    write_head("rating", "SequenceClassification", {"1", "2"});
    write_head("answerer", "QuestionAnswering", {"start", "end"});
    for (const auto &[name, folder, type] : {std::tuple("f32", "tiny", "f32"),
                                             {"q8", "tiny", "q8"},
                                             {"small", "small", "f32"},
                                             {"classifier", "classifier", "f32"},
                                             {"rating", "rating", "f32"},
                                             {"answerer", "answerer", "f32"}}) {
      const run_result r = rs({"convert", *shared_ / folder, "-o", weights(name), "--type", type});
      ASSERT_EQ(r.code, 0) << r;
    }
  }
  static void TearDownTestSuite() {
    delete shared_;
    shared_ = nullptr;
  }
  static std::string weights(const std::string &name) { return *shared_ / (name + ".rsw"); }
  static void write_head(const std::string &name, const std::string &head, const strings &labels) {
    tiny_options options;
    options.head = head;
    options.labels = labels;
    tiny_model(options).write(*shared_ / name);
  }

  static run_result eval(const strings &arguments) {
    strings all = {"eval"};
    all.insert(all.end(), arguments.begin(), arguments.end());
    return rs(all);
  }
  static std::vector<json> eval_json(strings arguments) {
    arguments.emplace_back("--json");
    const run_result r = eval(arguments);
    EXPECT_EQ(r.code, 0) << r;
    return jsonl(r.out);
  }
  std::string pairs_file() {
    return write("pairs.jsonl",
                 "{\"text1\":\"a cat\",\"text2\":\"a cat\",\"score\":5}\n"
                 "{\"text1\":\"hello world\",\"text2\":\"stock line 7\",\"score\":0}\n"
                 "{\"text1\":\"a kitten\",\"text2\":\"a cat\",\"score\":4}\n");
  }

  static temp_dir *shared_;
};
temp_dir *Eval::shared_ = nullptr;

TEST_F(Eval, StsbOfTwoFilesInTurns) {
  const std::string data = pairs_file();
  const run_result r = eval({"stsb", "-m", weights("f32"), "-m", weights("q8"), "--data", data, "--rounds", "2", "-t", "1"});
  EXPECT_EQ(r.code, 0) << r;
  EXPECT_EQ(r.err, "");
  const strings lines = lines_of(r.out);
  ASSERT_EQ(lines.size(), 7u) << r;
  EXPECT_NE(lines[0].find("1 thread; stsb: 3 pairs, 2 rounds"), std::string::npos) << r;
  for (const char *name : {"model", "type", "Spearman", "Pearson", "tokens/s", "tokens/layer", "arena"})
    EXPECT_NE(lines[2].find(name), std::string::npos) << r;
  EXPECT_EQ(lines[3].find(weights("f32")), 0u) << r;
  EXPECT_EQ(lines[4].find(weights("q8")), 0u) << r;
  EXPECT_EQ(lines[6].find("peak RSS: "), 0u) << r;

  const std::vector<json> rows = eval_json({"stsb", "-m", weights("f32"), "-m", weights("q8"), "--data", data, "--rounds", "2"});
  ASSERT_EQ(rows.size(), 2u);
  const json &row = rows[0];
  EXPECT_EQ(row["task"], "stsb");
  EXPECT_EQ(row["metric"], "Spearman");
  EXPECT_EQ(row["model"], weights("f32"));
  EXPECT_EQ(rows[1]["weight_type"], "q8");
  const json &full = row["full"];
  EXPECT_EQ(full["texts"], 6);
  EXPECT_EQ(full["seconds"].size(), 2u);
  EXPECT_GT(full["tokens_per_second"], 0);
  EXPECT_GT(full["arena_bytes"], 0);
  EXPECT_EQ(full["share_left"], 1.0);
  EXPECT_EQ(full["quality"], full["metrics"]["Spearman"]);
  EXPECT_NEAR(double(full["tokens_per_layer"]) * 6, double(full["tokens"]), 1e-9);
}

// The cosines that rs similarity gives, and their correlation.
TEST_F(Eval, QualityIsThatOfTheVectors) {
  const std::string data = pairs_file();
  std::vector<double> cosines;
  for (const auto &[a, b] : {std::pair("a cat", "a cat"), {"hello world", "stock line 7"}, {"a kitten", "a cat"}})
    cosines.push_back(jsonl(rs({"similarity", "-m", weights("f32"), "--format", "json", a, b}).out).at(0).at("cosine"));
  const json row = eval_json({"stsb", "-m", weights("f32"), "--data", data}).at(0);
  EXPECT_NEAR(row["full"]["metrics"]["Spearman"], 100 * spearman(cosines, {5, 0, 4}), 1e-9);
  EXPECT_NEAR(row["full"]["metrics"]["Pearson"], 100 * pearson(cosines, {5, 0, 4}), 1e-9);
}

TEST_F(Eval, IsDeterministic) {
  const std::string data = pairs_file();
  json first;
  for (const strings &more : {strings{}, {"-t", "1"}, {"-b", "1"}, {"-b", "2", "-t", "2", "--rounds", "1"}}) {
    strings arguments = {"stsb", "-m", weights("q8"), "--data", data};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const json metrics = eval_json(arguments).at(0)["full"]["metrics"];
    if (first.is_null()) first = metrics;
    EXPECT_EQ(metrics, first);
  }
}

TEST_F(Eval, Retrieval) {
  write("r/corpus.jsonl",
        "{\"_id\":\"1\",\"text\":\"a cat\"}\n{\"_id\":\"2\",\"text\":\"hello world\"}\n{\"_id\":\"3\",\"text\":\"stock\"}\n");
  write("r/queries.jsonl", "{\"_id\":\"1\",\"text\":\"a cat\"}\n{\"_id\":\"2\",\"text\":\"hello world\"}\n");
  write("r/qrels/test.tsv", "query-id\tcorpus-id\tscore\n1\t1\t1\n2\t2\t1\n");
  const strings base = {"retrieval", "-m", weights("small"), "--data", dir_ / "r"};
  const json row = eval_json(base).at(0);  // without prompts a query is its document
  EXPECT_EQ(row["full"]["metrics"], (json{{"nDCG@10", 100.0}, {"recall@10", 100.0}, {"recall@100", 100.0}}));
  EXPECT_EQ(row["full"]["texts"], 5);

  // Stored prompts stand before queries and documents: as if they had been written there.
  const auto tokens = [&](const strings &more) {
    strings all = {"retrieval", "-m", weights("f32"), "--data", dir_ / "r"};
    all.insert(all.end(), more.begin(), more.end());
    return int64_t(eval_json(all).at(0)["full"]["tokens"]);
  };
  const int64_t plain = tokens({"--prompt", "", "--query-prompt", ""});
  EXPECT_EQ(plain, int64_t(row["full"]["tokens"]));
  EXPECT_EQ(tokens({}), plain + 5 * 2);  // "find :" and "read :"
  EXPECT_EQ(tokens({"--prompt", ""}), plain + 2 * 2);
  EXPECT_EQ(tokens({"--query-prompt", ""}), plain + 3 * 2);
  EXPECT_EQ(tokens({"--prompt", "hello ", "--query-prompt", "hello world "}), plain + 3 * 1 + 2 * 2);

  // The same texts, but what is relevant is another document: found first, since none finds itself.
  write("r/qrels/test.tsv", "query-id\tcorpus-id\tscore\n1\t2\t1\n1\t3\t1\n2\t1\t1\n2\t3\t1\n");
  EXPECT_EQ(eval_json(base).at(0)["full"]["metrics"]["nDCG@10"], 100.0);

  strings part = base;
  part.insert(part.end(), {"--limit-queries", "1", "--limit-docs", "2"});
  EXPECT_EQ(eval_json(part).at(0)["full"]["texts"], 3);
}

TEST_F(Eval, NearestNeighbour) {
  const std::string data = write("l.jsonl",
                                 "{\"text\":\"a cat\",\"label\":\"x\"}\n{\"text\":\"a cat\",\"label\":\"x\"}\n"
                                 "{\"text\":\"hello world\",\"label\":\"y\"}\n{\"text\":\"hello world\",\"label\":\"y\"}\n");
  json row = eval_json({"nn", "-m", weights("f32"), "--data", data, "-k", "1"}).at(0);
  EXPECT_EQ(row["full"]["metrics"], (json{{"accuracy@1", 100.0}}));
  const std::string test = write("t.tsv", "text\tlabel\nhello world\tx\na cat\tx\n");
  const run_result few = eval({"nn", "-m", weights("f32"), "--data", data, "--limit", "3"});
  EXPECT_EQ(few.code, 0) << few;
  EXPECT_EQ(few.err, "rs: warning: of 10 neighbours (-k) there are only 2\n");
  row = eval_json({"nn", "-m", weights("f32"), "--data", test, "--train", data, "-k", "2"}).at(0);
  EXPECT_EQ(row["full"]["metrics"], (json{{"accuracy@2", 50.0}, {"accuracy@1", 50.0}}));
  EXPECT_EQ(row["full"]["texts"], 6);
  expect_failure(eval({"nn", "-m", weights("f32"), "--data", write("u.tsv", "a\tz\n"), "--train", data}), 1,
                 "u.tsv:1: no training text has the label 'z'");
  expect_failure(eval({"nn", "-m", weights("f32"), "--data", write("u.tsv", "a\tz\n")}), 1, "a neighbour needs at least two texts");
}

TEST_F(Eval, Cosine) {
  const std::string data = write("texts.txt", "a cat\nhello world, stock 7\n");
  json row = eval_json({"cosine", "-m", weights("f32"), "--data", data}).at(0);
  EXPECT_NEAR(row["full"]["metrics"]["cosine"], 1, 1e-9);
  EXPECT_NEAR(row["full"]["metrics"]["lowest"], 1, 1e-9);
  row = eval_json({"cosine", "-m", weights("q8"), "--against", weights("f32"), "--data", data}).at(0);
  const double mean = row["full"]["metrics"]["cosine"], lowest = row["full"]["metrics"]["lowest"];
  EXPECT_GT(mean, 0.99);
  EXPECT_LT(mean, 1);
  EXPECT_LE(lowest, mean);
  expect_failure(eval({"cosine", "-m", weights("small"), "--against", weights("f32"), "--data", data}), 1,
                 "--against '" + weights("f32") + "': vectors of 16 values cannot be compared with vectors of 32");
}

TEST_F(Eval, WithoutAndWithDropping) {
  const std::string data = write("texts.txt", "a cat , a kitten . hello world\nhello\n");
  const strings base = {"cosine", "-m", weights("f32"), "--data", data, "--rounds", "1"};
  const auto with = [&](strings more) {
    more.insert(more.begin(), base.begin(), base.end());
    return eval_json(more).at(0);
  };
  json row = with({"--drop", "0.5", "--drop-score=-mlp", "--drop-min", "4"});
  EXPECT_NE(std::string(row["drop"]).find("ratios=0.5 score=-mlp mode=prune protect=cls min=4"), std::string::npos) << row;
  EXPECT_NEAR(row["full"]["quality"], 1, 1e-9);
  EXPECT_LT(row["dropped"]["metrics"]["lowest"], 0.9999);
  EXPECT_EQ(row["full"]["tokens"], 10 + 3);
  EXPECT_EQ(row["dropped"]["tokens"], 10 + 3);
  // Two layers: 10 and 3 tokens enter the first, 5 and 3 the second.
  EXPECT_NEAR(row["dropped"]["share_left"], 21.0 / 26, 1e-12);
  EXPECT_NEAR(row["dropped"]["tokens_per_layer"], 21.0 / 4, 1e-12);
  EXPECT_NEAR(row["ratio"]["token_layers"], 21.0 / 26, 1e-12);
  EXPECT_NEAR(row["ratio"]["quality"], double(row["dropped"]["quality"]) / double(row["full"]["quality"]), 1e-12);
  EXPECT_EQ(with({"--keep", "4", "--drop-protect", "special"})["dropped"]["share_left"], (10 + 4 + 3 + 3) / 26.0);
  EXPECT_EQ(with({"--drop", "0.9", "--drop-protect", "special"})["dropped"]["share_left"], (10 + 2 + 3 + 2) / 26.0);
  EXPECT_EQ(with({"--drop", "0.95", "--drop-protect", "none"})["dropped"]["share_left"], (10 + 1 + 3 + 1) / 26.0);
  row = with({"--drop", "0,0"});  // nothing leaves: the same vectors
  EXPECT_EQ(row["dropped"]["metrics"], row["full"]["metrics"]);
  EXPECT_EQ(row["ratio"]["token_layers"], 1.0);
  EXPECT_FALSE(with({}).contains("dropped"));

  strings table = base;
  table.insert(table.end(), {"--drop", "0.5", "--drop-score=-mlp"});
  const run_result r = eval(table);
  EXPECT_EQ(r.code, 0) << r;
  const strings lines = lines_of(r.out);
  ASSERT_EQ(lines.size(), 10u) << r;
  EXPECT_NE(lines[3].find("none"), std::string::npos) << r;
  EXPECT_NE(lines[4].find("yes"), std::string::npos) << r;
  EXPECT_NE(lines[5].find("ratio"), std::string::npos) << r;
  EXPECT_EQ(lines[7].find("drop: ratios=0.5"), 0u) << r;

  // Queries lose tokens only where asked for.
  write("r/corpus.jsonl", "{\"_id\":\"1\",\"text\":\"a cat hello\"}\n");
  write("r/queries.jsonl", "{\"_id\":\"1\",\"text\":\"a cat hello\"}\n");
  write("r/qrels/test.tsv", "1\t1\t1\n");
  const strings retrieval = {"retrieval", "-m", weights("small"), "--data", dir_ / "r", "--drop", "0.4"};
  EXPECT_EQ(eval_json(retrieval).at(0)["dropped"]["share_left"], (5 + 3 + 5 + 5) / 20.0);
  strings both = retrieval;
  both.emplace_back("--drop-queries");
  EXPECT_EQ(eval_json(both).at(0)["dropped"]["share_left"], (5 + 3 + 5 + 3) / 20.0);
  expect_failure(eval({"cosine", "-m", weights("f32"), "--data", data, "--drop", "2"}), 2, "ratio");
}

TEST_F(Eval, HalvesAreAll) {
  std::string texts;
  for (int i = 0; i < 9; ++i) texts += "hello " + std::string(size_t(i), 'a') + " world\n";
  const std::string data = write("texts.txt", texts);
  const auto half = [&](const strings &more) {
    strings command = {"cosine", "-m", weights("f32"), "--data", data, "--rounds", "1"};
    command.insert(command.end(), more.begin(), more.end());
    return int(eval_json(command).at(0)["full"]["tokens"]);
  };
  const int all = half({}), first = half({"--half", "1"}), second = half({"--half", "2"});
  EXPECT_EQ(first + second, all);
  EXPECT_GT(first, 0);
  EXPECT_GT(second, 0);
  expect_failure(eval({"cosine", "-m", weights("f32"), "--data", data, "--half", "3"}), 2, "--half");
  // One text has one half only; the other is an error, not an empty list that is read.
  size_t empty = 0;
  for (const char *one : {"1", "2"}) {
    const run_result r = eval({"cosine", "-m", weights("f32"), "--data", data, "--limit", "1", "--half", one, "--rounds", "1"});
    if (r.code == 0) continue;
    ++empty;
    expect_failure(r, 1, "two halves need at least two texts; there is only one, in all or by --limit");
  }
  EXPECT_EQ(empty, 1u);
}

TEST_F(Eval, ListOfSchedules) {
  const std::string data = write("texts.txt", "a cat , a kitten . hello world\nhello\n");
  const std::string list = write("list.txt", "ratios=0.5 score=-mlp\n\nkeeps=4 score=norm mode=merge\nscore=first ratios=0,0\n");
  const strings base = {"cosine", "-m", weights("f32"), "--data", data, "--rounds", "1"};
  strings listed = base;
  listed.insert(listed.end(), {"--drop-list", list});
  const std::vector<json> rows = eval_json(listed);
  ASSERT_EQ(rows.size(), 3u);
  EXPECT_EQ(rows[1]["drop"], "keeps=4 score=norm mode=merge protect=cls min=0 seed=0");
  EXPECT_EQ(rows[2]["dropped"]["metrics"], rows[2]["full"]["metrics"]);
  // The same as one at a time.
  strings alone = base;
  alone.insert(alone.end(), {"--drop", "0.5", "--drop-score=-mlp"});
  const json one = eval_json(alone).at(0);
  for (const char *key : {"metrics", "share_left", "arena_bytes"}) {
    EXPECT_EQ(rows[0]["dropped"][key], one["dropped"][key]) << key;
    EXPECT_EQ(rows[0]["full"][key], one["full"][key]) << key;
  }
  EXPECT_EQ(rows[0]["drop"], one["drop"]);

  const run_result r = eval(listed);
  EXPECT_EQ(r.code, 0) << r;
  EXPECT_NE(r.out.find("\ndrop 2: keeps=4 score=norm mode=merge"), std::string::npos) << r;

  const auto failing = [&](const std::string &path, int code, const std::string &words) {
    strings command = base;
    command.insert(command.end(), {"--drop-list", path});
    expect_failure(eval(command), code, words);
  };
  failing(write("empty.txt", "\n \n"), 1, "empty.txt' has no schedule");
  failing(write("bad.txt", "ratios=0.5\nratios=2\n"), 2, "bad.txt:2: ");
  failing(write("deep.txt", "ratios=0,0,0.5\n"), 2, "deep.txt:1: ");  // the model has two layers
  failing(dir_ / "nowhere.txt", 1, "nowhere.txt");
  listed.insert(listed.end(), {"--drop", "0.5"});
  expect_failure(eval(listed), 2, "--drop");
}

TEST_F(Eval, Classification) {
  const strings texts = {"a cat", "hello world", "stock line 7 .", "kitten", "find text", "read"};
  std::string named, numbered;
  size_t yes = 0;
  for (size_t i = 0; i < texts.size(); ++i) {
    const json found = jsonl(rs({"classify", "-m", weights("classifier"), texts[i]}).out).at(0);
    const std::string label = found["label"];
    ASSERT_TRUE(label == "yes" || label == "no") << found;
    yes += label == "yes";
    const bool wrong = i == 0;  // one is said to be what it is not
    named += texts[i] + "\t" + ((label == "yes") != wrong ? "yes" : "no") + "\n";
    numbered += json{{"text", texts[i]}, {"label", int((label == "yes") != wrong)}}.dump() + "\n";
  }
  for (const char *task : {"sst2", "classification"})
    for (const std::string &data : {write("n.tsv", "sentence\tlabel\n" + named), write("n.jsonl", numbered)}) {
      const json row = eval_json({task, "-m", weights("classifier"), "--data", data, "--rounds", "1", "-b", "4"}).at(0);
      EXPECT_EQ(row["metric"], "accuracy");
      EXPECT_NEAR(row["full"]["quality"], 100 * 5 / 6.0, 1e-9);
      EXPECT_EQ(row["full"]["texts"], 6);
    }
  EXPECT_LE(yes, 6u);
  const std::string data = write("n.tsv", "sentence\tlabel\na cat\tmaybe\n");
  expect_failure(eval({"sst2", "-m", weights("classifier"), "--data", data}), 1,
                 "n.tsv:2: the model has no label 'maybe' (it has 0 to 1: no, yes)");
  expect_failure(eval({"sst2", "-m", weights("f32"), "--data", data}), 1, "no classification head");
  expect_failure(eval({"sst2", "-m", weights("f32"), "-m", weights("rating"), "--data", data}), 1,
                 "': this model has no classification head");
  // Where names are other numbers, numbers are names.
  const auto rated = [&](int label) {
    return eval(
        {"sst2", "-m", weights("rating"), "--data", write("r.jsonl", json{{"text", "a cat"}, {"label", label}}.dump() + "\n")});
  };
  EXPECT_EQ(rated(1).code, 0);
  EXPECT_EQ(rated(2).code, 0);
  expect_failure(rated(0), 1, "the model has no label '0' (it has 1, 2)");
  expect_failure(eval({"sst2", "-m", weights("answerer"), "--data", data}), 1, "no classification head");
  expect_failure(eval({"sst2", "-m", weights("classifier"), "--data", data, "--pooling", "cls"}), 2,
                 "--pooling does not go with sst2");
}

TEST_F(Eval, Squad) {
  const std::string context = "the cat , hello world . a kitten find text 7 line stock";
  const strings questions = {"hello ?", "find a cat", "stock line"};
  json qas = json::array();
  for (const std::string &question : questions) {
    const json found = jsonl(rs({"answer", "-m", weights("answerer"), "--question", question, context}).out).at(0);
    qas.push_back({{"id", question}, {"question", question}, {"answers", {{{"text", found["answer"]}}}}});
  }
  const auto file = [&](const json &list) {
    return write("s.json", json{{"data", {{{"paragraphs", {{{"context", context}, {"qas", list}}}}}}}}.dump());
  };
  const strings base = {"squad", "-m", weights("answerer"), "--rounds", "1", "--data"};
  const auto with = [&](const json &list, strings more = {}) {
    strings all = base;
    all.push_back(file(list));
    all.insert(all.end(), more.begin(), more.end());
    return eval_json(all).at(0);
  };
  json row = with(qas);
  EXPECT_EQ(row["metric"], "F1");
  EXPECT_EQ(row["full"]["metrics"], (json{{"F1", 100.0}, {"exact", 100.0}}));
  EXPECT_EQ(row["full"]["texts"], 3);
  // What the windows have, special tokens included.
  size_t tokens = 0;
  for (const std::string &question : questions) {
    const json pair = {{"text", question}, {"pair", context}};
    const run_result r = rs({"tokenize", "-m", weights("answerer")}, pair.dump() + "\n");
    tokens += jsonl(r.out).at(0)["ids"].size();
  }
  EXPECT_EQ(row["full"]["tokens"], tokens);

  qas[1]["answers"] = json::array();  // a question without an answer, which only a threshold finds
  expect_failure(eval({"squad", "-m", "x", "--data", "x", "--no-answer-threshold", "nan"}), 2, "wants a number, got 'nan'");
  row = with(qas, {"--no-answer-threshold", "1000"});
  EXPECT_NEAR(row["full"]["metrics"]["F1"], 200.0 / 3, 1e-9);
  EXPECT_EQ(row["full"]["metrics"]["no answer"], 0.0);
  row = with(qas, {"--no-answer-threshold", "-1000"});
  EXPECT_NEAR(row["full"]["metrics"]["exact"], 100.0 / 3, 1e-9);
  EXPECT_EQ(row["full"]["metrics"]["no answer"], 100.0);

  row = with(qas, {"--drop", "0.3", "--drop-protect", "prefix", "--drop-mode", "restore", "--limit", "2"});
  EXPECT_EQ(row["full"]["texts"], 2);
  EXPECT_LT(row["dropped"]["share_left"], 1);
  EXPECT_GT(row["dropped"]["share_left"], 0.8);
  expect_failure(eval({"squad", "-m", weights("classifier"), "--data", file(qas)}), 1, "no question-answering head");
  expect_failure(eval({"squad", "-m", weights("answerer"), "--data", file(qas), "--dim", "4"}), 2, "--dim does not go with squad");
}

TEST_F(Eval, WrongUse) {
  const std::string m = weights("f32"), data = pairs_file();
  expect_failure(eval({}), 2, "task is required");
  expect_failure(eval({"dance", "-m", m, "--data", data}), 2, "dance not in");
  expect_failure(eval({"stsb", "--data", data}), 2, "--model is required");
  expect_failure(eval({"stsb", "-m", m}), 2, "--data is required");
  expect_failure(eval({"stsb", "-m", m, "--data", data, "--rounds", "0"}), 2, "--rounds");
  expect_failure(eval({"stsb", "-m", m, "--data", data, "--limit", "-1"}), 2, "--limit");
  expect_failure(eval({"stsb", "-m", m, "--data", data, "--train", data}), 2, "--train does not go with stsb");
  expect_failure(eval({"stsb", "-m", m, "--data", data, "--limit-docs", "3"}), 2, "--limit-docs does not go with stsb");
  expect_failure(eval({"retrieval", "-m", m, "--data", data, "--limit", "3"}), 2, "--limit does not go with retrieval");
  expect_failure(eval({"retrieval", "-m", m, "--data", data, "--drop-queries"}), 2, "--drop-queries needs a schedule");
  expect_failure(eval({"stsb", "-m", m, "--data", data, "--pooling", "none"}), 2, "gives no vector to compare");
  expect_failure(eval({"stsb", "-m", m, "--data", data, "--long", "chunk"}), 2, "--long chunk");
  expect_failure(eval({"stsb", "-m", m, "--data", data, "--seed", "-1"}), 2, "--seed: wants a whole number from 0, got '-1'");
  expect_failure(eval({"stsb", "-m", m, "--data", dir_ / "absent"}), 1, "cannot open");
  expect_failure(eval({"stsb", "-m", dir_ / "absent", "--data", data}), 1, "absent");
  expect_failure(eval({"stsb", "-m", m, "--data", data, "--limit", "1"}), 1, "at least two different scores");
  const std::string long_text =
      write("long.txt", "a cat\n" + std::string(200, 'a') + " a a a a a a a a a a a a a a a a a a a a a a a a a a a a a a a\n");
  expect_failure(eval({"cosine", "-m", m, "--data", long_text, "--long", "error"}), 1, "long.txt:2: ");
  const run_result cut = eval({"cosine", "-m", m, "--data", long_text});
  EXPECT_EQ(cut.code, 0) << cut;
  EXPECT_NE(cut.err.find("1 of 2 texts were cut to 32 tokens"), std::string::npos) << cut;
  EXPECT_EQ(cut.err.find("chunk"), std::string::npos) << cut;
}

TEST_F(Eval, TasksJudgeManySettingsOfOneModel) {
  task_options options;
  options.data = pairs_file();
  options.batch = 2;
  const std::unique_ptr<eval_task> task = load_task("stsb", options);
  EXPECT_EQ(task->units(), 4u);
  const model_ptr model = load_model(weights("f32"), true);
  const session_ptr a = create_session(model.get(), 1, false), b = create_session(model.get(), 1, false);
  eval_setting mean, cls;
  mean.model = cls.model = model.get();
  mean.dim = cls.dim = model_info(model.get()).dim;
  mean.session = a.get();
  cls.session = b.get();
  cls.texts.pooling = RS_POOL_CLS;
  double last = 0;
  const std::vector<evaluation> both = evaluate(*task, {mean, cls}, 2, [&](double share) {
    EXPECT_GT(share, last);
    last = share;
  });
  EXPECT_EQ(last, 1);
  ASSERT_EQ(both.size(), 2u);
  EXPECT_EQ(both[0].metrics[1].name, "Pearson");
  EXPECT_NE(both[0].metrics[1].value, both[1].metrics[1].value);
  EXPECT_EQ(both[0].seconds.size(), 2u);
  // Alone, each comes to the same.
  EXPECT_EQ(evaluate(*task, {cls}, 1)[0].metrics[1].value, both[1].metrics[1].value);
  EXPECT_EQ(evaluate(*task, {mean}, 1)[0].metrics[1].value, both[0].metrics[1].value);
}

// ------------------------------------------------------------------------------------------------ real models, real data

TEST(eval_real, stsb_spearman_is_the_reference_s) {
  RS_NEED_SHARED("data/stsb-test.csv");
  RS_NEED_MODEL("f32");
  const run_result r =
      rs({"eval", "stsb", "-m", model_path("f32"), "--data", shared_file("data/stsb-test.csv"), "--rounds", "1", "--json"});
  ASSERT_EQ(r.code, 0) << r;
  EXPECT_NEAR(jsonl(r.out).at(0)["full"]["quality"], 82.03, 0.01);
}

TEST(eval_real, cranfield_subset) {
  RS_NEED_SHARED("data/cran.all.1400");
  RS_NEED_MODEL("q8");
  const retrieval_set set = read_retrieval(shared_dir() + "/data", false, {});
  EXPECT_EQ(set.documents.size(), 1400u);
  EXPECT_EQ(set.queries.size(), 225u);
  size_t judged = 0;
  for (const auto &relevant : set.relevant) judged += relevant.size();
  EXPECT_EQ(judged, 1837u);
  EXPECT_EQ(set.queries.texts[2], "what problems of heat conduction in composite slabs have been solved so far .");

  const run_result r = rs({"eval", "retrieval", "-m", model_path("q8"), "--data", shared_dir() + "/data", "--limit-queries", "20",
                           "--limit-docs", "150", "--rounds", "1", "--json"});
  ASSERT_EQ(r.code, 0) << r;
  const json row = jsonl(r.out).at(0);
  EXPECT_EQ(row["full"]["texts"], 170);
  EXPECT_NEAR(row["full"]["metrics"]["recall@100"], 100, 15);
}

TEST(eval_real, sst2_accuracy) {
  RS_NEED_SHARED("data/sst2-validation.tsv");
  const std::string file = env_or("RS_TEST_MODELS", RS_DEFAULT_TEST_MODELS) + "/sst2-q8.rsw";
  if (!file_exists(file)) GTEST_SKIP() << "needs sst2-minilm as q8, which could not be made";
  const run_result r =
      rs({"eval", "sst2", "-m", file, "--data", shared_file("data/sst2-validation.tsv"), "--rounds", "1", "--json"});
  ASSERT_EQ(r.code, 0) << r;
  const json row = jsonl(r.out).at(0);
  EXPECT_EQ(row["full"]["texts"], 872);
  EXPECT_NEAR(row["full"]["quality"], 89.79, 0.5);  // the reference's, in f32
}

TEST(eval_real, xquad_is_read) {
  RS_NEED_SHARED("data/xquad-en.json");
  const squad_set set = read_squad(shared_file("data/xquad-en.json"), {});
  EXPECT_EQ(set.questions.size(), 1190u);
  for (const squad_question &q : set.questions) {
    ASSERT_FALSE(q.answers.empty()) << q.id;
    EXPECT_EQ(squad_judge(q.answers[0], q.answers).exact, 1) << q.id;
    EXPECT_NE(set.contexts[q.context].find(q.answers[0]), std::string::npos) << q.id;
  }
}

}  // namespace
