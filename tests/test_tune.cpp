// rs tune: fronts, plots, the search with a judge that is known, the journal, and the program on a tiny model.
#include <sys/file.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <sstream>
#include <thread>

#include "../tools/chart.h"
#include "../tools/datasets.h"
#include "../tools/pareto.h"
#include "../tools/tune_journal.h"
#include "../tools/tune_search.h"
#include "tiny_model.h"

namespace {

using strings = std::vector<std::string>;

size_t count_of(const std::string &text, const std::string &part) {
  size_t n = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

// ------------------------------------------------------------------------------------------------ fronts

TEST(Pareto, FrontIsWhatNothingBeats) {
  //                                0        1         2         3         4         5
  const std::vector<tradeoff> all = {{5, 10}, {4, 6}, {4, 7}, {2, 3}, {5, 12}, {1, 4}};
  EXPECT_EQ(pareto_front(all), (std::vector<size_t>{3, 1, 0}));
  EXPECT_EQ(pareto_ranks(all), (std::vector<size_t>{0, 0, 1, 0, 1, 1}));
}

TEST(Pareto, EqualOnesAndOddNumbers) {
  EXPECT_TRUE(pareto_front({}).empty());
  EXPECT_EQ(pareto_front({{1, 1}, {1, 1}}), (std::vector<size_t>{0}));
  EXPECT_EQ(pareto_front({{NAN, 1}, {0.5, 2}}), (std::vector<size_t>{0, 1})) << "a cheap one that fails is no better, nor beaten";
  EXPECT_EQ(pareto_front({{NAN, 2}, {0.5, 1}}), (std::vector<size_t>{1}));
  EXPECT_EQ(pareto_front({{2, NAN}, {1, 5}}), (std::vector<size_t>{1, 0}));
  EXPECT_EQ(pareto_ranks({{1, 1}, {1, 1}, {1, 1}}), (std::vector<size_t>{0, 1, 2}));
}

// ------------------------------------------------------------------------------------------------ plots

TEST(Chart, TicksAreRound) {
  EXPECT_EQ(chart_ticks(0, 6), (std::vector<double>{0, 1, 2, 3, 4, 5, 6}));
  EXPECT_TRUE(chart_ticks(1, 1).empty());
  EXPECT_TRUE(chart_ticks(0, INFINITY).empty());
  for (double tick : chart_ticks(-0.05, 3)) EXPECT_FALSE(std::signbit(tick));
  for (double tick : chart_ticks(0.19, 0.33)) EXPECT_NEAR(tick / 0.025, std::round(tick / 0.025), 1e-9);
}

TEST(Chart, SvgIsWellFormedWhateverItIsCalled) {
  chart c;
  c.title = "a <b> & \"c\" \033";
  c.series.push_back({"<&>", 0.5, true, false, {{1, 2, "</title>", "x"}, {NAN, 1, "", ""}, {2, INFINITY, "", ""}, {3, 1, "", ""}}});
  c.rules.push_back({true, 1.5, "limit"});
  const std::string svg = chart_svg(c);
  EXPECT_EQ(svg.compare(0, 5, "<svg "), 0);
  EXPECT_NE(svg.find("a &lt;b&gt; &amp; &quot;c&quot;"), std::string::npos);
  EXPECT_EQ(count_of(svg, "\033"), 0u);
  EXPECT_EQ(count_of(svg, "nan"), 0u);
  EXPECT_EQ(count_of(svg, "inf"), 0u);
  EXPECT_EQ(count_of(svg, "<circle"), 3u) << "two points and one in the legend";
  EXPECT_EQ(count_of(svg, "<title>"), count_of(svg, "</title>"));
  chart_svg(chart());  // nothing to show is no reason to fail
}

TEST(Chart, TickTextsHaveTheDigitsTheyNeed) {
  chart c;
  c.series.push_back({"", 0.5, false, false, {{0.2, 0, "", ""}, {0.325, 6, "", ""}}});
  const std::string svg = chart_svg(c);
  EXPECT_NE(svg.find(">0.225<"), std::string::npos) << svg;
}

// ------------------------------------------------------------------------------------------------ parts of data

TEST(Subset, HalvesAreRandomAndShareNothing) {
  const std::vector<size_t> first = subset{0, 7, 1, 1}.of(101), second = subset{0, 7, 2, 1}.of(101);
  std::set<size_t> all(first.begin(), first.end());
  all.insert(second.begin(), second.end());
  EXPECT_EQ(first.size(), 51u);
  EXPECT_EQ(second.size(), 50u);
  EXPECT_EQ(all.size(), 101u);
  EXPECT_TRUE(std::is_sorted(first.begin(), first.end()));
  EXPECT_NE(first, (subset{0, 8, 1, 1}.of(101)));
  EXPECT_EQ(first, (subset{0, 7, 1, 1}.of(101)));
  EXPECT_LT(first.front(), 20u);
  EXPECT_GT(first.back(), 80u);
}

TEST(Subset, SmallSharesArePartOfLargeOnes) {
  std::vector<size_t> large = subset{0, 3, 1, 1}.of(200);
  for (double share : {0.5, 0.1, 0.001}) {
    const std::vector<size_t> small = subset{0, 3, 1, share}.of(200);
    EXPECT_EQ(small.size(), size_t(std::ceil(100 * share)));
    EXPECT_TRUE(std::includes(large.begin(), large.end(), small.begin(), small.end()));
    large = small;
  }
  EXPECT_EQ((subset{10, 0, 0, 1}.of(20)).back(), 9u) << "the first ones, as before";
}

// ------------------------------------------------------------------------------------------------ the search

// A model of six layers in which "norm" with merging is best, dropping late costs less, and every rung tells the same but for some
// noise that depends on the candidate alone.
class known_judge : public tune_judge {
 public:
  size_t rungs() const override { return 3; }
  double work(size_t rung) const override { return rung == 0 ? 1 : rung == 1 ? 4 : 16; }
  double share(const drop_candidate &c) override {
    double left = 1, sum = 0;
    for (int p : c.percent) {
      sum += left;
      left *= 1 - p / 100.0;
    }
    return sum / double(c.percent.size());
  }
  bool possible(const drop_candidate &c) override { return c.mode != RS_DROP_FOLD; }
  double loss(size_t rung, const drop_candidate &c) override {
    EXPECT_TRUE(c.drops());
    EXPECT_NE(c.mode, RS_DROP_FOLD);
    ++looks[rung];
    spent += work(rung) * share(c);
    double left = 1, loss = 0;
    for (size_t i = 0; i < c.percent.size(); ++i) {
      const std::string &score = c.scores.size() > 1 ? c.scores[i] : c.scores[0];
      const double gone = left * c.percent[i] / 100;
      left -= gone;
      loss += gone * gone * (score == "norm" ? 0.05 : 0.2) * (c.mode == RS_DROP_MERGE ? 1 : 2) / double(i + 1);
    }
    const double noise = double(std::hash<std::string>()(candidate_key(c)) % 1000) / 1000 - 0.5;
    return loss * (1 + 0.3 * noise / double(1 << (2 * rung)));
  }
  size_t looks[3] = {};
  double spent = 0;
};

search_settings usual_settings() {
  search_settings settings;
  settings.layers = 6;
  settings.seed = 1;
  settings.max_loss = 0.01;
  settings.work = 1000;
  return settings;
}

TEST(Search, FindsWhatIsBest) {
  known_judge judge;
  const std::vector<search_result> results = search_schedules(&judge, usual_settings());
  const search_result *best = nullptr;
  for (const search_result &r : results)
    if (r.loss <= 0.01 && (!best || r.share < best->share)) best = &r;
  ASSERT_TRUE(best);
  EXPECT_EQ(best->candidate.mode, RS_DROP_MERGE);
  EXPECT_EQ(best->candidate.score(), "norm");
  // A single layer gives at best sqrt(0.01 (i + 1) / 0.05) for (5 - i) / 6 of the layers: 0.37 at layer 0.
  EXPECT_LT(best->share, 0.64);
}

TEST(Search, LooksAtFewOnAllData) {
  known_judge judge;
  search_schedules(&judge, usual_settings());
  EXPECT_GT(judge.looks[0], 2 * judge.looks[2]);
  EXPECT_GE(judge.looks[2], 6u);
  EXPECT_LT(judge.spent, 1.05 * usual_settings().work);
}

TEST(Search, RepeatsExactly) {
  known_judge first, second, other;
  search_settings changed = usual_settings();
  changed.work = 300;  // too little to look at everything
  const std::vector<search_result> a = search_schedules(&first, changed), b = search_schedules(&second, changed);
  changed.seed = 2;
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) EXPECT_EQ(candidate_key(a[i].candidate), candidate_key(b[i].candidate));
  const std::vector<search_result> c = search_schedules(&other, changed);
  EXPECT_FALSE(a.size() == c.size() && std::equal(a.begin(), a.end(), c.begin(), [](const auto &x, const auto &y) {
                 return candidate_key(x.candidate) == candidate_key(y.candidate);
               }));
}

TEST(Search, LittleWorkIsEnoughForSomething) {
  known_judge judge;
  search_settings settings = usual_settings();
  settings.work = 1;
  EXPECT_GE(search_schedules(&judge, settings).size(), 6u);
  settings.layers = 1;
  EXPECT_THROW(search_schedules(&judge, settings), failure);
}

TEST(Search, EndsWhenTheTimeIsGone) {
  known_judge all, some;
  search_settings settings = usual_settings();
  search_schedules(&all, settings);
  settings.time = [] { return 0.6; };
  search_schedules(&some, settings);
  EXPECT_LT(some.looks[0], all.looks[0]);
  EXPECT_GE(some.looks[2], 6u);
}

TEST(Search, ScoresThatMakeNoDifferenceAreLeftOut) {
  drop_candidate c;
  c.percent = {0, 30, 0, 20, 0, 0};
  c.scores = {"mlp", "norm", "block", "norm", "first", "random"};
  EXPECT_EQ(simplest(c).score(), "norm");
  c.scores[3] = "centre";
  EXPECT_EQ(simplest(c).score(), "norm,norm,norm,centre,centre,centre");
  EXPECT_EQ(candidate_drop(c, 5).text(),
            "ratios=0,0.3,0,0.2 score=mlp,norm,block,centre,first,random mode=prune protect=cls min=0 seed=5")
      << "as it is";
}

// ------------------------------------------------------------------------------------------------ the journal

class Journal : public testing::Test {
 protected:
  using policy = tune_journal::policy;
  std::string path() const { return dir_ / "journal"; }
  // What it takes of a file of two good lines with `bad` behind them, and its note.
  std::pair<size_t, std::string> taken_with(const std::string &bad) {
    write_file(path(), good_ + bad);
    const tune_journal journal(path(), settings_, policy::automatic);
    EXPECT_EQ(read_file(path()), good_) << "what is not taken is gone: " << bad;
    EXPECT_TRUE(journal.find(0, 1, "b"));
    return {journal.taken(), journal.note()};
  }
  std::string refusal(const std::string &content, policy p = policy::automatic) {
    write_file(path(), content);
    try {
      const tune_journal journal(path(), settings_, p);
    } catch (const failure &e) {
      EXPECT_EQ(read_file(path()), content) << "left as it was";
      return e.what();
    }
    return "";
  }

  temp_dir dir_;
  nlohmann::ordered_json settings_ = {{"seed", 1}, {"model", "abc"}};
  std::string good_ =
      "{\"rs tune\":1,\"settings\":{\"seed\":1,\"model\":\"abc\"}}\n"
      "{\"file\":0,\"rung\":0,\"drop\":\"a\",\"quality\":0.5}\n"
      "{\"file\":0,\"rung\":1,\"drop\":\"b\",\"quality\":null}\n";
};

TEST_F(Journal, KeepsWhatWasFound) {
  {
    tune_journal journal(path(), settings_, policy::automatic);
    EXPECT_FALSE(journal.find(0, 0, "a"));
    journal.add(0, 0, "a", 0.5);
    journal.add(0, 1, "b", NAN);
  }
  EXPECT_EQ(read_file(path()), good_);
  const tune_journal again(path(), settings_, policy::resume);
  EXPECT_EQ(again.taken(), 2u);
  EXPECT_EQ(again.note(), "");
  ASSERT_TRUE(again.find(0, 0, "a"));
  EXPECT_EQ(*again.find(0, 0, "a"), 0.5);
  EXPECT_TRUE(std::isnan(*again.find(0, 1, "b")));
  EXPECT_FALSE(again.find(1, 0, "a"));
}

TEST_F(Journal, ALineThatWasCutOffIsIgnored) {
  for (const char *torn :
       {"{", "{\"file\":0,\"rung\":2,\"drop\":\"c\",\"quality\":0.", "{\"file\":0,\"rung\":2,\"drop\":\"c\",\"quality\":0.7}"})
    EXPECT_EQ(taken_with(torn), std::make_pair(size_t(2), std::string())) << torn;
  for (size_t cut = 0; cut < good_.find('\n'); ++cut) {  // of the first line too: then it begins anew
    write_file(path(), good_.substr(0, cut));
    EXPECT_EQ(tune_journal(path(), settings_, policy::automatic).taken(), 0u);
  }
}

TEST_F(Journal, HostileLinesEndWhatIsTaken) {
  const std::string hostile[] = {"not json",
                                 "[1,2]",
                                 "{\"file\":-1,\"rung\":0,\"drop\":\"x\",\"quality\":1}",
                                 "{\"file\":0,\"rung\":99999999999999999999,\"drop\":\"x\",\"quality\":1}",
                                 "{\"file\":0,\"rung\":0,\"drop\":7,\"quality\":1}",
                                 "{\"file\":0,\"rung\":0,\"drop\":\"x\",\"quality\":\"1\"}",
                                 "{\"file\":0,\"rung\":0,\"drop\":\"x\",\"quality\":1e999}",
                                 "{\"file\":0,\"rung\":0,\"drop\":\"x\",\"quality\":1,\"more\":1}",
                                 "{\"file\":0,\"rung\":0,\"drop\":\"x\"}",
                                 "",
                                 std::string("\0\0\0", 3),
                                 std::string(100000, '['),
                                 "{\"file\":0,\"rung\":0,\"drop\":\"" + std::string(100000, 'x') + "\",\"quality\":1}"};
  for (const std::string &line : hostile) {
    const auto [taken, note] = taken_with(line + "\n{\"file\":0,\"rung\":0,\"drop\":\"late\",\"quality\":1}\n");
    EXPECT_EQ(taken, 2u) << line.substr(0, 80);
    EXPECT_NE(note.find("journal:4: not a line of rs tune"), std::string::npos) << note;
  }
}

TEST_F(Journal, WhatIsNoJournalIsLeftAlone) {
  for (const std::string &content : {std::string("my thesis\n"), std::string("my thesis"), std::string("{\"text\": 1}\n"),
                                     std::string("[[[[\n"), std::string(200000, '[') + "\n", std::string("\0", 1)})
    EXPECT_NE(refusal(content).find("not a journal of rs tune"), std::string::npos) << content.substr(0, 40);
  EXPECT_NE(refusal(good_.substr(0, good_.find('\n') - 1) + "x\n").find("not a journal"), std::string::npos);
}

TEST_F(Journal, OtherSettingsBeginAnewOrAreAnError) {
  settings_["seed"] = 2;
  EXPECT_NE(refusal(good_, policy::resume).find("other settings"), std::string::npos);
  write_file(path(), good_);
  {
    const tune_journal journal(path(), settings_, policy::automatic);
    EXPECT_EQ(journal.taken(), 0u);
    EXPECT_NE(journal.note().find("beginning anew"), std::string::npos);
  }
  EXPECT_EQ(count_of(read_file(path()), "\n"), 1u);
  settings_["seed"] = 1;
  write_file(path(), good_);
  EXPECT_EQ(tune_journal(path(), settings_, policy::anew).taken(), 0u);
}

TEST_F(Journal, WhatARunFoundOutIsKept) {
  settings_["found"] = {{"passes", 64}};
  { const tune_journal journal(path(), settings_, policy::automatic); }
  settings_["found"] = {{"passes", 128}};
  const tune_journal journal(path(), settings_, policy::resume);
  EXPECT_EQ(journal.settings()["found"]["passes"], 64);
}

TEST_F(Journal, IsWrittenByOneAtATime) {
  const tune_journal journal(path(), settings_, policy::automatic);
  EXPECT_THROW(tune_journal(path(), settings_, policy::automatic), failure);
}

// ------------------------------------------------------------------------------------------------ the program

class Tune : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    shared_ = new temp_dir;
    tiny_options options;
    options.layers = 4;  // large enough that dropping pays
    options.hidden = 128;
    options.intermediate = 512;
    options.positions = options.max_tokens = 128;
    tiny_model(options).write(*shared_ / "tiny");
    for (const char *type : {"f32", "q8"}) {
      const run_result r =
          run({program(), "convert", *shared_ / "tiny", "-o", *shared_ / type + std::string(".rsw"), "--type", type});
      ASSERT_EQ(r.code, 0) << r;
    }
    std::string lines;
    const char *const words[] = {"text", "line", "hello", "world", "find", "read", "cat", "kitten", "stock", ".", ",", "a"};
    unsigned state = 1;
    for (int i = 0; i < 120; ++i) {
      std::string line;
      const int n = 20 + i % 80;
      for (int j = 0; j < n; ++j) line += std::string(j > 0 ? " " : "") + words[(state = state * 1103515245 + 12345) / 65536 % 12];
      lines += json{{"text", line}}.dump() + "\n";
    }
    write_file(*shared_ / "data.jsonl", lines);
  }
  static void TearDownTestSuite() {
    delete shared_;
    shared_ = nullptr;
  }
  void SetUp() override {
    std::filesystem::copy_file(*shared_ / "f32.rsw", model());
    std::filesystem::copy_file(*shared_ / "q8.rsw", dir_ / "q8.rsw");
  }

  std::string model() const { return dir_ / "m.rsw"; }
  static std::string data() { return *shared_ / "data.jsonl"; }
  strings command(const strings &more, const std::string &passes = "12") const {
    strings all = {program(), "tune", "-m", model(), "--data", data(), "-t", "1"};
    if (std::count(more.begin(), more.end(), "--rounds") == 0) all.insert(all.end(), {"--rounds", "3"});
    if (!passes.empty()) all.insert(all.end(), {"--passes", passes});
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }
  run_result tune(const strings &more) const { return run(command(more)); }

  // A report without what a clock has told.
  static json timeless(const std::string &text) {
    json root = json::parse(text, nullptr, false);
    for (json &schedule : root["schedules"])
      for (const char *key : {"ms", "speedup", "front", "chosen"}) schedule.erase(key);
    return root;
  }

  // A journal without them.
  static std::string without_times(const std::string &journal) {
    std::string left;
    std::istringstream in(journal);
    for (std::string line; std::getline(in, line);)
      if (line.find("rounds=") == std::string::npos) left += line + "\n";
    return left;
  }

  temp_dir dir_;

 private:
  static temp_dir *shared_;
};
temp_dir *Tune::shared_ = nullptr;

TEST_F(Tune, FindsChoosesStoresAndTheProfileIsReadable) {
  const std::string plot = dir_ / "plot.svg";
  std::filesystem::permissions(model(), std::filesystem::perms::owner_read | std::filesystem::perms::owner_write);
  const run_result r = tune({"--store", "loose=50%", "-o", plot, "--rounds", "9"});
  ASSERT_EQ(r.code, 0) << r;
  EXPECT_NE(r.out.find("held out"), std::string::npos) << r;
  EXPECT_NE(r.out.find("no dropping"), std::string::npos) << r;
  EXPECT_NE(r.err.find("stored 'loose'"), std::string::npos) << r;
  EXPECT_EQ(read_file(plot).compare(0, 5, "<svg "), 0);
  EXPECT_EQ(run({program(), "verify", model()}).code, 0);
  EXPECT_EQ(std::filesystem::status(model()).permissions(),
            std::filesystem::perms::owner_read | std::filesystem::perms::owner_write);

  rs_model *m = nullptr;
  ASSERT_EQ(rs_model_load(model().c_str(), nullptr, &m), RS_OK) << rs_last_error();
  const rs_drop *drop = nullptr;
  const char *note = nullptr;
  ASSERT_EQ(rs_model_drop(m, "loose", &drop, &note), RS_OK) << rs_last_error();
  EXPECT_GT(drop->n_ratios, 0u);
  const std::string said = note;
  for (const char *part : {"cosine 0.", "loss ", "held out ", "of the time", "data.jsonl", "seed 1"})
    EXPECT_NE(said.find(part), std::string::npos) << said;
  rs_model_free(m);

  const run_result with = run({program(), "embed", "-m", model(), "--drop-profile", "loose", "hello world find text read line"});
  const run_result without = run({program(), "embed", "-m", model(), "hello world find text read line"});
  EXPECT_EQ(with.code, 0) << with;
  EXPECT_NE(with.out, without.out);
}

TEST_F(Tune, StoringKeepsOtherProfilesAndReplacesItsOwn) {
  ASSERT_EQ(tune({"--store", "a=50%", "--store", "b=30%"}).code, 0);
  const run_result again = tune({"--store", "b=60%"});
  ASSERT_EQ(again.code, 0) << again;
  EXPECT_NE(again.err.find("going on with"), std::string::npos) << "what is stored does not make it another model: " << again;
  rs_model *m = nullptr;
  ASSERT_EQ(rs_model_load(model().c_str(), nullptr, &m), RS_OK) << rs_last_error();
  rs_meta names, texts, notes;
  ASSERT_EQ(rs_model_meta(m, "drop.names", &names), RS_OK);
  ASSERT_EQ(rs_model_meta(m, "drop.texts", &texts), RS_OK);
  ASSERT_EQ(rs_model_meta(m, "drop.notes", &notes), RS_OK);
  ASSERT_EQ(names.count, 2u);
  EXPECT_EQ(texts.count, 2u);
  EXPECT_EQ(notes.count, 2u);
  EXPECT_STREQ(rs_meta_string(&names, 0, nullptr), "a");
  EXPECT_STREQ(rs_meta_string(&names, 1, nullptr), "b");
  rs_model_free(m);
}

TEST_F(Tune, TheSameSeedFindsTheSame) {
  const run_result first = tune({"--json", "--journal", dir_ / "1", "--max-loss", "20%"});
  const run_result second = tune({"--json", "--journal", dir_ / "2", "--max-loss", "20%", "-b", "7"});
  ASSERT_EQ(first.code, 0) << first;
  ASSERT_EQ(second.code, 0) << second;
  EXPECT_EQ(timeless(first.out), timeless(second.out));
  EXPECT_EQ(without_times(read_file(dir_ / "1")), without_times(read_file(dir_ / "2")));
  const run_result other = tune({"--json", "--journal", dir_ / "3", "--max-loss", "20%", "--seed", "2"});
  EXPECT_NE(timeless(first.out)["schedules"], timeless(other.out)["schedules"]);
}

// Times are in the journal too, so that what a run that is done says, and chooses, it says again.
TEST_F(Tune, AJournalThatIsWholeRepeats) {
  const strings arguments = {"--json", "--journal", dir_ / "j", "--max-loss", "20%"};
  const run_result first = tune(arguments);
  ASSERT_EQ(first.code, 0) << first;
  const std::string journal = read_file(dir_ / "j");
  const run_result again = tune(arguments);
  EXPECT_EQ(again.out, first.out);
  EXPECT_EQ(read_file(dir_ / "j"), journal);
  // Timed in another way, they are other times, and the rest is as it was.
  strings other = arguments;
  other.insert(other.end(), {"--rounds", "2"});
  const run_result timed = tune(other);
  EXPECT_EQ(timeless(timed.out), timeless(first.out));
  const std::string more = read_file(dir_ / "j");
  EXPECT_EQ(more.compare(0, journal.size(), journal), 0);
  EXPECT_EQ(count_of(more, "rounds=2"), count_of(journal, "rounds=3"));
  EXPECT_EQ(count_of(more, "\n"), count_of(journal, "\n") + count_of(journal, "rounds=3"));
}

TEST_F(Tune, GoesOnAfterAKill) {
  const run_result whole = tune({"--json", "--journal", dir_ / "whole", "--max-loss", "20%"});
  ASSERT_EQ(whole.code, 0) << whole;
  // Killed when the journal has some lines.
  strings arguments = command({"--json", "--journal", dir_ / "cut", "--max-loss", "20%"});
  std::vector<char *> argv;
  for (std::string &a : arguments) argv.push_back(a.data());
  argv.push_back(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    const int null = open("/dev/null", O_WRONLY);
    dup2(null, 1);
    dup2(null, 2);
    execv(argv[0], argv.data());
    _exit(127);
  }
  for (int i = 0; i < 20000 && (!file_exists(dir_ / "cut") || count_of(read_file(dir_ / "cut"), "\n") < 20); ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  const size_t before = count_of(read_file(dir_ / "cut"), "\n");
  ASSERT_GE(before, 20u);
  EXPECT_LT(before, count_of(read_file(dir_ / "whole"), "\n"));
  const run_result rest = tune({"--json", "--journal", dir_ / "cut", "--max-loss", "20%", "--resume"});
  ASSERT_EQ(rest.code, 0) << rest;
  EXPECT_NE(rest.err.find(join("going on with ", before - 1, " results")), std::string::npos) << rest;
  EXPECT_EQ(timeless(rest.out), timeless(whole.out));
  EXPECT_EQ(without_times(read_file(dir_ / "cut")), without_times(read_file(dir_ / "whole")));
}

TEST_F(Tune, ChoosesAmongWeightFiles) {
  const run_result r = tune({"--json", "--also", dir_ / "q8.rsw", "--max-loss", "50%"});
  ASSERT_EQ(r.code, 0) << r;
  std::set<std::string> models;
  size_t chosen = 0;
  const json report = json::parse(r.out);
  for (const json &schedule : report["schedules"]) {
    models.insert(schedule["model"]);
    chosen += bool(schedule["chosen"]);
    if (schedule["schedule"].is_null() && schedule["model"] == dir_ / "q8.rsw") {
      EXPECT_GT(schedule["loss"], 1e-6) << "what the weight type loses counts";
    }
  }
  EXPECT_EQ(models.size(), 2u);
  EXPECT_EQ(chosen, 1u);
}

TEST_F(Tune, FewTextsTellLittle) {
  const run_result r = tune({"--limit", "6"});
  EXPECT_NE(r.err.find("warning: schedules are judged by 3 texts only: chance decides"), std::string::npos) << r;
}

TEST_F(Tune, WhatCannotBeFoundIsNotStored) {
  const std::string before = read_file(model());
  const run_result r = tune({"--store", "x=0.00001ms"});
  EXPECT_EQ(r.code, 1);
  EXPECT_NE(r.err.find("nothing found for x: at most 1e-05 ms"), std::string::npos) << r;
  EXPECT_EQ(read_file(model()), before);
}

// What was found out about other data, or another model, is not taken for this one.
TEST_F(Tune, AJournalBelongsToItsDataAndItsModel) {
  const std::string mine = dir_ / "mine.jsonl", journal = dir_ / "j";
  std::string lines = read_file(data());
  write_file(mine, lines);
  const auto tune_with = [&](const std::string &file) {
    return run({program(), "tune", "-m", file, "--data", mine, "-t", "1", "--passes", "1", "--rounds", "1", "--max-loss", "50%",
                "--journal", journal, "--resume"});
  };
  EXPECT_EQ(tune_with(model()).code, 0);
  EXPECT_EQ(tune_with(model()).code, 0);
  const std::string kept = read_file(journal);
  const run_result model_differs = tune_with(dir_ / "q8.rsw");
  EXPECT_EQ(model_differs.code, 1) << model_differs;
  lines.replace(lines.find("hello"), 5, "jello");
  write_file(mine, lines);
  const run_result data_differ = tune_with(model());
  EXPECT_EQ(data_differ.code, 1) << data_differ;
  lines.replace(lines.find("jello"), 5, "hello");
  write_file(mine, lines);
  setenv("RS_ISA", "scalar", 1);  // whose vectors differ a little
  const run_result kernels_differ = tune_with(model());
  unsetenv("RS_ISA");
  EXPECT_EQ(kernels_differ.code, 1) << kernels_differ;
  for (const run_result &r : {model_differs, data_differ, kernels_differ})
    EXPECT_NE(r.err.find("the journal is of other settings, another model or other data"), std::string::npos) << r;
  EXPECT_EQ(read_file(journal), kept);
}

TEST_F(Tune, WhatIsWrongIsSaidInOneLine) {
  write_file(dir_ / "few.jsonl", "{\"text\": \"cat\"}\n");
  write_file(dir_ / "bad.jsonl", "{\"text\": \"cat\"}\n{\"text\": 7}\n");
  write_file(dir_ / "thesis", "my thesis\n");
  const std::tuple<strings, int, const char *> cases[] = {
      {{"--max-loss", "150%"}, 2, "--max-loss: '150%' is all there is or more"},
      {{"--max-loss", "1"}, 2, "write 1% or 0.01"},
      {{"--max-loss", "-1%"}, 2, "--max-loss: wants a number above 0, got '-1'"},
      {{"--max-loss", "nan"}, 2, "wants a number above 0, got 'nan'"},
      {{"--budget-ms", "0"}, 2, "--budget-ms: wants a number above 0, got '0'"},
      {{"--budget-ms", "nan"}, 2, "--budget-ms: wants a number above 0, got 'nan'"},
      {{"--minutes", "inf"}, 2, "--minutes: wants a number above 0, got 'inf'"},
      {{"--seed", "-1"}, 2, "--seed: wants a whole number from 0, got '-1'"},
      {{"-o", dir_ / "plot.png"}, 2, "the plot is an SVG, whose name ends in .svg"},
      {{"-o", ""}, 2, "--output: is empty"},
      {{"--also", model()}, 2, "is given twice"},
      {{"-o", dir_ / "one", "--journal", dir_ / "one"}, 2, "the plot and the journal are both"},
      {{"--store", "fast"}, 2, "how good? add --max-loss or --budget-ms"},
      {{"--store", "=1%"}, 2, "begins with no name"},
      {{"--store", "a b=1%"}, 2, "'a b=1%' begins with no name (which has no spaces and no commas)"},
      {{"--store", "a=1%", "--store", "a=2%"}, 2, "'a' is given twice"},
      {{"--store", "a=x"}, 2, "'x'"},
      {{"--metric", "magic"}, 2, "magic"},
      {{"--limit-docs", "5"}, 2, "--limit-docs does not go with cosine"},
      {{"--metric", "sst2", "--data", data()}, 2, "--data"},
      {{"--resume", "--no-resume"}, 2, "--resume"},
      {{"--journal", model()}, 1, "is the weight file itself"},
      {{"-o", model()}, 1, "is the weight file itself"},
      {{"--journal", dir_ / "thesis"}, 1, "not a journal of rs tune"},
      {{"--journal", dir_ / "no/where"}, 1, "No such file"},
  };
  for (const auto &[arguments, code, part] : cases) {
    const run_result r = tune(arguments);
    EXPECT_EQ(r.code, code) << r;
    EXPECT_EQ(r.out, "");
    EXPECT_EQ(count_of(r.err, "\n"), 1u) << r;
    EXPECT_NE(r.err.find(part), std::string::npos) << r << part;
  }
  const auto with_data = [&](const std::string &file, const strings &more = {}) {
    strings arguments = {program(), "tune", "-m", model(), "--data", file, "--passes", "1"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    run_result r = run(arguments);
    EXPECT_EQ(count_of(r.err, "\n"), 1u) << r;
    return r;
  };
  for (const auto &[file, part] : {std::pair("few.jsonl", "two halves need at least two texts; there is only one"),
                                   {"bad.jsonl", "bad.jsonl:2: "},
                                   {"missing.jsonl", "No such file"}}) {
    const run_result r = with_data(dir_ / file);
    EXPECT_EQ(r.code, 1) << r;
    EXPECT_NE(r.err.find(part), std::string::npos) << r;
  }
  for (const char *stream : {"-", "/dev/null"}) {
    const run_result r = with_data(stream);
    EXPECT_EQ(r.code, 2) << r;
    EXPECT_NE(r.err.find("so it needs to be a regular file, or a folder"), std::string::npos) << r;
  }
  // Neither plot nor journal goes over the data.
  std::filesystem::copy_file(data(), dir_ / "texts.svg");
  for (const char *option : {"-o", "--journal"}) {
    const run_result r = with_data(dir_ / "texts.svg", {option, dir_ / "texts.svg"});
    EXPECT_EQ(r.code, 1) << r;
    EXPECT_NE(r.err.find("is the data itself"), std::string::npos) << r;
  }
  EXPECT_EQ(read_file(dir_ / "texts.svg"), read_file(data()));
  EXPECT_EQ(read_file(dir_ / "thesis"), "my thesis\n");
}

}  // namespace
