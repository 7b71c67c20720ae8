// The program rs, run as a user runs it: what it prints, what it writes, how it ends.  Most tests use a tiny model that is made
// here, so they run anywhere; those that need a real one say so when they skip.
#include "cli_util.h"
#include "tiny_model.h"

#include <sys/file.h>
#include <sys/resource.h>
#include <termios.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <sstream>

#include "rs.h"

namespace {

double cosine_of(const std::vector<float> &a, const std::vector<float> &b) {
  double dot = 0, aa = 0, bb = 0;
  for (size_t i = 0; i < a.size(); ++i) dot += double(a[i]) * b[i], aa += double(a[i]) * a[i], bb += double(b[i]) * b[i];
  return dot / std::sqrt(aa * bb);
}

double norm_of(const std::vector<float> &v) {
  double sum = 0;
  for (float x : v) sum += double(x) * x;
  return std::sqrt(sum);
}

strings files_in(const std::string &folder) {
  strings names;
  for (const auto &entry : std::filesystem::directory_iterator(folder)) names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

// A child that a test talks to while it runs.
class process {
 public:
  process(strings arguments, int output = -1) {
    int in[2], out[2];
    if (pipe2(in, O_CLOEXEC) || pipe2(out, O_CLOEXEC)) ADD_FAILURE() << "pipe";
    arguments.insert(arguments.begin(), program());
    std::vector<char *> argv;
    for (std::string &a : arguments) argv.push_back(a.data());
    argv.push_back(nullptr);
    pid_ = fork();
    if (pid_ == 0) {
      dup2(in[0], 0);
      dup2(output >= 0 ? output : out[1], 1);
      for (int number : {SIGINT, SIGTERM, SIGHUP, SIGPIPE}) signal(number, SIG_DFL);
      execv(argv[0], argv.data());
      _exit(127);
    }
    close(in[0]);
    close(out[1]);
    in_ = in[1];
    out_ = out[0];
  }
  ~process() {
    close_input();
    close(out_);
    if (pid_ > 0) {
      kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
    }
  }
  process(const process &) = delete;
  process &operator=(const process &) = delete;

  bool write_input(const std::string &text) const { return write(in_, text.data(), text.size()) == ssize_t(text.size()); }
  void close_input() {
    if (in_ >= 0) close(in_);
    in_ = -1;
  }
  // A line of its output; what there is when nothing more comes for a long time.
  std::string read_line() const {
    std::string line;
    for (char c;;) {
      pollfd ready = {out_, POLLIN, 0};
      if (poll(&ready, 1, 20000) <= 0 || read(out_, &c, 1) != 1 || c == '\n') return line;
      line += c;
    }
  }
  void signal_it(int number) const { kill(pid_, number); }
  // Exit status as run() gives it, and the most memory it had.
  int wait(long *peak_kb = nullptr) {
    int status = 0;
    rusage usage = {};
    wait4(std::exchange(pid_, -1), &status, 0, &usage);
    if (peak_kb) *peak_kb = usage.ru_maxrss;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }

 private:
  pid_t pid_ = -1;
  int in_ = -1, out_ = -1;
};

// A folder with the tiny model, converted once for each process of tests.
class Cli : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    shared_ = new temp_dir;
    tiny_model().write(*shared_ / "tiny");
    for (const char *type : {"f32", "q8"}) {
      const run_result r = rs({"convert", *shared_ / "tiny", "-o", weights(type), "--type", type});
      ASSERT_EQ(r.code, 0) << r;
    }
  }
  static void TearDownTestSuite() {
    delete shared_;
    shared_ = nullptr;
  }

  static std::string weights(const std::string &type = "q8") { return *shared_ / ("tiny-" + type + ".rsw"); }
  static std::string hf() { return *shared_ / "tiny"; }

  static run_result embed(const strings &arguments, const std::string &input = "") {
    strings all = {"embed", "-m", weights()};
    all.insert(all.end(), arguments.begin(), arguments.end());
    return rs(all, input);
  }
  static run_result tokenize(const strings &arguments, const std::string &input = "") {
    strings all = {"tokenize", "-m", weights()};
    all.insert(all.end(), arguments.begin(), arguments.end());
    return rs(all, input);
  }
  static std::vector<float> vector_of(const std::string &text, const strings &arguments = {}) {
    strings all = arguments;
    all.insert(all.end(), {"--", text});
    const run_result r = embed(all);
    EXPECT_EQ(r.code, 0) << r;
    return floats(jsonl(r.out).at(0).at("embedding"));
  }

  temp_dir dir_;

 private:
  static temp_dir *shared_;
};
temp_dir *Cli::shared_ = nullptr;

// ------------------------------------------------------------------------------------------------ usage

TEST_F(Cli, HelpAndVersion) {
  EXPECT_EQ(rs({"--version"}).out, std::string("rs ") + RS_VERSION + "\n");
  const run_result help = rs({"--help"});
  EXPECT_EQ(help.code, 0);
  for (const char *command : {"convert", "embed", "tokenize", "similarity", "info", "verify", "bench", "eval", "trace", "tune",
                              "classify", "rerank", "answer"}) {
    EXPECT_NE(help.out.find(command), std::string::npos) << command;
    const run_result r = rs({command, "--help"});
    EXPECT_EQ(r.code, 0) << r;
    EXPECT_EQ(r.err, "");
    EXPECT_NE(r.out.find("Example"), std::string::npos) << command;
    for (const std::string &line : lines_of(r.out)) EXPECT_LE(line.size(), 132u) << line;
    const bool refused = !strcmp(command, "similarity") || !strcmp(command, "eval");
    if (refused) {
      EXPECT_EQ(r.out.find("a vector for every token"), std::string::npos) << command;
    }
  }
}

TEST_F(Cli, WrongUsageExitsWithTwo) {
  const std::string m = weights();
  const std::pair<strings, const char *> cases[] = {
      {{}, "a command is missing"},
      {{"embed", "-m", m, "-m", m, "x"}, "--model: is given more than once"},
      {{"embed", "-m"}, "--model: has no value"},
      {{"frob"}, "unknown command 'frob'"},
      {{"--frob"}, "--frob"},
      {{"embed", "x"}, "--model is required"},
      {{"embed", "-m", m, "--frob", "x"}, "unknown option '--frob'"},
      {{"embed", "-m", m, "-t", "0", "x"}, "--threads: wants a whole number from 1 to 1024, got "},
      {{"embed", "-m", m, "-t", "-1", "x"}, "--threads: wants a whole number from 1 to 1024, got "},
      {{"embed", "-m", m, "-t", "1025", "x"}, "--threads: wants a whole number from 1 to 1024, got "},
      {{"embed", "-m", m, "-t", "99999999999999999999", "x"}, "--threads: wants a whole number from 1 to 1024, got "},
      {{"embed", "-m", m, "-t", "two", "x"}, "--threads: wants a whole number from 1 to 1024, got "},
      {{"embed", "-m", m, "-b", "0", "x"}, "wants a whole number from 1 to 65536, got '0'"},
      {{"embed", "-m", m, "--thread-mode", "fast", "x"}, "fast"},
      {{"embed", "-m", m, "--format", "xml", "x"}, "xml"},
      {{"embed", "-m", m, "--input", "xml", "x"}, "xml"},
      {{"embed", "-m", m, "--long", "cut", "x"}, "cut"},
      {{"embed", "-m", m, "--on-error", "cry", "x"}, "cry"},
      {{"embed", "-m", m, "--pooling", "median", "x"}, "'median'"},
      {{"embed", "-m", m, "--max-tokens", "0", "x"}, "--max-tokens: wants a whole number from 1, got '0'; see"},
      {{"embed", "-m", m, "--max-tokens", "2.5", "x"}, "--max-tokens: wants a whole number from 1, got '2.5'"},
      {{"embed", "-m", m, "--max-tokens", "010", "x"}, "--max-tokens: wants a whole number from 1, got '010'"},
      {{"embed", "-m", m, "--max-tokens", "2147483648", "x"}, "from 1 to 2147483647, got '2147483648'"},
      {{"embed", "-m", m, "-o", "", "x"}, "--output: is empty; see 'rs embed --help'"},
      {{"embed", "-m", m, "--output=", "x"}, "--output: is empty"},
      {{"embed", "-m", m, "-f", ""}, "--file: is empty"},
      {{"embed", "-m", m, "--drop=", "0.5", "x"}, "--drop: is empty"},
      {{"embed", "-m", m, "--drop", "0.5", "--drop-score=", "mlp", "x"}, "--drop-score: is empty"},
      {{"embed", "-m", m, "--drop-profile=", "fast"}, "--drop-profile: is empty"},
      {{"embed", "-m", "", "x"}, "--model: is empty"},
      {{"embed", "-m", m, "--device", "foo", "x"}, "--device: wants cpu, cuda, cuda:N or auto, got 'foo'"},
      {{"embed", "-m", m, "--device", "cuda:", "x"}, "got 'cuda:'"},
      {{"embed", "-m", m, "--drop", "0.5", "--drop-seed", "-1", "x"}, "--drop-seed: wants a whole number from 0, got '-1'"},
      {{"embed", "-m", m, "--drop", "0.5", "--drop-seed", "18446744073709551616", "x"}, "from 0 to 18446744073709551615, got"},
      {{"embed", "-m", m, "--drop", "0.5", "--drop-score=-mlp", "--pooling", "none", "x"}, "--drop-mode restore keeps all"},
      {{"info", m, "--tensors", "--plan", "1x8"}, "excludes"},
      {{"embed", "-m", m, "--max-tokens", "2", "x"}, "no room beside the 2 special tokens"},
      {{"embed", "-m", m, "--max-tokens", "65", "x"}, "65 is more than the 64 positions"},
      {{"embed", "-m", m, "--dim", "33", "x"}, "33 is more than the 32 values"},
      {{"embed", "-m", m, "--overlap", "2", "x"}, "--overlap goes with --long chunk"},
      {{"embed", "-m", m, "--long", "chunk", "--pooling", "none", "x"}, "--pooling none"},
      {{"embed", "-m", m, "--long", "chunk", "--overlap", "30", "x"}, "30 is not less than the 30 tokens of text in a window"},
      {{"embed", "-m", m, "--long", "chunk", "--max-tokens", "10", "--overlap", "8", "x"}, "8 is not less than the 8 tokens"},
      {{"embed", "-m", m, "--normalize", "--no-normalize", "x"}, "normalize"},
      {{"embed", "-m", m, "-f", m, "x"}, "both texts and --file"},
      {{"embed", "-m", m, "a", "++"}, "'++'"},
      {{"embed", "-m", m, "--drop", "", "x"}, "--drop: is empty"},
      {{"embed", "-m", m, "--drop", "0.5", "--drop-score", "", "x"}, "--drop-score: is empty"},
      {{"embed", "-m", m, "--drop", "1", "x"}, "ratio 1, expected 0 to below 1"},
      {{"embed", "-m", m, "--drop", "0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1", "x"}, "for 9 layers"},
      {{"embed", "-m", m, "--drop", "half", "x"}, "'half' is not a number"},
      {{"embed", "-m", m, "--drop", "0.5", "--keep", "3", "x"}, "excludes"},
      {{"embed", "-m", m, "--drop-min", "4", "x"}, "goes with --drop or --keep"},
      {{"embed", "-m", m, "--drop", "0.5", "--drop-mode", "hide", "x"}, "hide"},
      {{"embed", "-m", m, "--drop-profile", "fast", "x"}, "no drop schedule 'fast' (stored: none)"},
      {{"info", m, "--drop", "0.5"}, "goes with --plan"},
      {{"info", m, "--plan", "8x"}, "'8x' is not BATCHxTOKENS"},
      {{"info", m, "--plan", "1x65"}, "65 tokens are more than the 64 positions"},
      {{"similarity", "-m", m, "a"}, "two texts are needed, got 1"},
      {{"similarity", "-m", m, "--pooling", "none", "a", "b"}, "--pooling none"},
      {{"convert", hf()}, "--output is required"},
      {{"convert", "-o", "x"}, "is required"},
      {{"convert", hf(), "-o", "x", "--type", "q2"}, "q2"},
      {{"convert", hf(), "-o", dir_ / "x", "--type", "f16", "--calibrate", dir_ / "none"}, "it goes with q8 and q4"},
      {{"convert", hf(), "-o", dir_ / "x", "--max-tokens", "65"}, "65 is more than the 64 positions"},
      {{"info"}, "is required"},
      {{"verify", m, "--frob"}, "--frob"},
  };
  for (const auto &[arguments, part] : cases) {
    expect_failure(rs(arguments), 2, part);
    EXPECT_NE(rs(arguments).err.find("--help"), std::string::npos);
  }
}

// "--name=" is an option with an empty value, not one whose value comes next.
TEST_F(Cli, AnEmptyValueTakesNothingElse) {
  EXPECT_EQ(embed({"--prompt=", "hello"}).out, embed({"--prompt", "", "hello"}).out);
  EXPECT_EQ(jsonl(embed({"--prompt=", "hello", "world"}).out).size(), 2u);
  EXPECT_EQ(jsonl(tokenize({"--pair=", "hello"}).out).at(0).at("ids"),
            jsonl(tokenize({"--pair", "", "hello"}).out).at(0).at("ids"));
  // Where it is itself a value, or behind "--", it is what it says.
  EXPECT_EQ(embed({"--prompt", "--drop=", "hello"}).out, embed({"--prompt=--drop=", "hello"}).out);
  EXPECT_EQ(jsonl(embed({"--", "--output=", "world"}).out).size(), 2u);
  // No file is written over.
  write_file(dir_ / "notes", "mine");
  expect_failure(embed({"--output=", dir_ / "notes"}), 2, "--output: is empty");
  EXPECT_EQ(read_file(dir_ / "notes"), "mine");
}

// ------------------------------------------------------------------------------------------------ token dropping

TEST_F(Cli, DroppingTokensChangesVectorsAndSaysHowManyAreLeft) {
  const json plain = jsonl(embed({"hello world hello world hello"}).out)[0];
  EXPECT_FALSE(plain.contains("kept"));
  const int tokens = plain["tokens"];
  const auto dropping = [](const strings &options) {
    strings all = options;
    all.push_back("hello world hello world hello");
    const run_result r = embed(all);
    EXPECT_EQ(r.code, 0) << r;
    return jsonl(r.out)[0];
  };
  const json half = dropping({"--drop", "0.5", "--drop-score", "-mlp"});
  EXPECT_EQ(half["kept"], tokens - tokens / 2);
  EXPECT_EQ(half["tokens"], tokens);
  EXPECT_NE(half["embedding"], plain["embedding"]);
  EXPECT_EQ(dropping({"--keep", "3", "--drop-score=norm"})["kept"], 3);
  EXPECT_EQ(dropping({"--drop", "0.9", "--drop-score=norm", "--drop-protect", "special"})["kept"], 2);
  // What is there no more is not kept; what was never dropped is as it was.
  EXPECT_FALSE(dropping({"--drop", "0.5", "--drop-score=norm", "--drop-mode", "restore"}).contains("kept"));
  EXPECT_EQ(dropping({"--drop", "0"}), plain);
  EXPECT_EQ(dropping({"--drop", "0.9", "--drop-score=norm", "--drop-min", "64"}), plain);
  EXPECT_EQ(dropping({"--drop", "0", "--pooling", "none"})["embedding"].size(), size_t(tokens));
  EXPECT_EQ(dropping({"--drop", "0.5", "--drop-score=norm", "--drop-mode", "restore", "--pooling", "none"})["embedding"].size(),
            size_t(tokens));
  // Which score, and which seed, make a difference; a score that does harm is told.
  EXPECT_NE(dropping({"--drop", "0.5", "--drop-score=random"}),
            dropping({"--drop", "0.5", "--drop-score=random", "--drop-seed", "1"}));
  EXPECT_NE(embed({"--drop", "0.5", "x"}).err.find("warning: "), std::string::npos);
  EXPECT_EQ(embed({"--drop", "0.5", "--drop-score=-mlp", "x"}).err, "");
}

TEST_F(Cli, PlansAndBenchesCompareWithAndWithoutDropping) {
  const run_result text = rs({"info", weights(), "--plan", "2x40", "--drop", "0.5", "--drop-score=norm"});
  EXPECT_EQ(text.code, 0) << text;
  EXPECT_NE(text.out.find("dropping: tokens"), std::string::npos) << text;
  const run_result r = rs({"info", weights(), "--json", "--plan", "2x40", "--drop", "0.5", "--drop-score=norm"});
  ASSERT_EQ(r.code, 0) << r;
  const json plan = json::parse(r.out), whole = plan["plan"]["layers"], dropped = plan["dropping"]["layers"];
  EXPECT_EQ(plan["drop"], "ratios=0.5 score=norm mode=prune protect=cls min=0 seed=0");
  EXPECT_EQ(whole[0]["tokens"], 80);
  EXPECT_EQ(whole[1]["tokens"], 80);
  EXPECT_EQ(dropped[0]["tokens"], 80);
  EXPECT_EQ(dropped[1]["tokens"], 40);
  EXPECT_LT(dropped[1]["macs"].get<double>(), 0.5 * whole[1]["macs"].get<double>() + 1);
  EXPECT_LT(dropped[1]["activation_bytes"].get<double>(), 0.6 * whole[1]["activation_bytes"].get<double>());

  const run_result bench =
      rs({"bench", "-m", weights(), "--shapes", "1x16", "--seconds", "0.01", "--json", "--drop", "0.5", "--drop-score=norm"});
  ASSERT_EQ(bench.code, 0) << bench;
  const std::vector<json> rows = jsonl(bench.out);
  ASSERT_EQ(rows.size(), 2u);
  EXPECT_FALSE(rows[0].contains("drop"));
  EXPECT_EQ(rows[1]["drop"], plan["drop"]);
  EXPECT_TRUE(std::fabs(rows[1]["times_as_fast"].get<double>() -
                        rows[0]["median_ms"].get<double>() / rows[1]["median_ms"].get<double>()) < 1e-9);
}

// ------------------------------------------------------------------------------------------------ where texts come from

TEST_F(Cli, TextsAsArgumentsFileAndStream) {
  const std::string expected = embed({"hello world", "a line", ""}).out;
  EXPECT_EQ(jsonl(expected).size(), 3u);
  write_file(dir_ / "texts", "hello world\na line\n\n");
  EXPECT_EQ(embed({"-f", dir_ / "texts"}).out, expected);
  EXPECT_EQ(embed({"-f", "-"}, "hello world\na line\n\n").out, expected);
  EXPECT_EQ(embed({"-"}, "hello world\na line\n\n").out, expected);
  EXPECT_EQ(embed({}, "hello world\na line\n\n").out, expected);
  EXPECT_EQ(embed({}, "{\"text\":\"hello world\"}\n{\"text\":\"a line\"}\n{\"text\":\"\"}\n").out, expected);
}

TEST_F(Cli, ArgumentsAreTakenAsTheyAre) {
  const strings texts = {"[MASK]", "[a,b]", "{}", "{\"text\": 5}", "%s", "a\tb", "info", "-5 degrees", "- item", "%%", "/x"};
  strings arguments = {"--format", "text"};
  arguments.insert(arguments.end(), texts.begin(), texts.end());
  const strings got = lines_of(tokenize(arguments).out);
  ASSERT_EQ(got.size(), texts.size());
  EXPECT_EQ(got[0], "[CLS] [MASK] [SEP]");
  EXPECT_EQ(got[1], "[CLS] [UNK] a , b [UNK] [SEP]");
  EXPECT_EQ(got[6], "[CLS] i ##n ##f ##o [SEP]");
  EXPECT_EQ(got[7], "[CLS] [UNK] 5 d ##e ##g ##r ##e ##e ##s [SEP]");
  EXPECT_EQ(lines_of(tokenize({"--format", "text", "a", "--", "-m", "--", "++"}).out).size(), 4u);
}

TEST_F(Cli, LineEnds) {
  const std::string expected = embed({}, "a\nb\n\nc").out;
  EXPECT_EQ(jsonl(expected).size(), 4u) << "the last line counts without its newline, the empty line is the empty text";
  EXPECT_EQ(embed({}, "a\r\nb\r\n\r\nc\r\n").out, expected);
  EXPECT_EQ(embed({},
                  "\xef\xbb\xbf"
                  "a\nb\n\nc\n")
                .out,
            expected)
      << "a byte order mark is no text";
  EXPECT_EQ(embed({}, "").out, "");
  EXPECT_EQ(jsonl(embed({}, "\n\n").out).size(), 2u);
  EXPECT_EQ(embed({}, "\n").out, embed({""}).out);
}

TEST_F(Cli, KindOfInput) {
  const std::string object = "{\"text\": \"hello\"}";
  EXPECT_EQ(embed({}, "\n \n" + object + "\n\n" + object + "\n").out, embed({"hello", "hello"}).out)
      << "blank lines are passed over";
  EXPECT_EQ(embed({"--input", "text"}, object + "\n").out, embed({"--", object}).out);
  EXPECT_EQ(embed({}, "hello\n" + object + "\n").out, embed({"--", "hello", object}).out) << "the first line decides";
  const run_result broken = embed({}, "{hello\nworld\n");
  EXPECT_EQ(broken.code, 0);
  EXPECT_EQ(jsonl(broken.out).size(), 2u);
  EXPECT_NE(broken.err.find("--input jsonl"), std::string::npos) << broken;
  EXPECT_EQ(embed({"--input", "jsonl"}, "{hello\n" + object + "\n").code, 1);
  // What is wrong behind the name of a member is wrong in that line, not of the file.
  for (const char *bad : {"{\"id\": 1, \"text\": \"a\", \"w\": NaN}", "{\"text\": \"a\", \"w\": 1e999}", "{\"text\": \"\xff\"}",
                          " { \"text\": \"a\""}) {
    const run_result r = embed({}, bad + ("\n" + object + "\n"));
    EXPECT_EQ(r.code, 1) << r;
    EXPECT_EQ(r.out, embed({"hello"}).out);
    EXPECT_NE(r.err.find("stdin:1: not valid JSON"), std::string::npos) << r;
  }
}

TEST_F(Cli, JsonLines) {
  const run_result r = embed({},
                             "{\"id\": 7, \"text\": \"a\", \"other\": [1, {\"text\": 5}]}\n"
                             "{\"text\": \"b\", \"id\": {\"k\": [1.50, null, true, \"\\u00e9\\n\"], \"e\": {}}}\n"
                             "{\"text\": \"c\", \"id\": 12345678901234567890123}\n"
                             "{\"text\": \"\\u0000\", \"id\": \"x\"}\n"
                             "{\"text\": \"d\"}\n");
  ASSERT_EQ(r.code, 0) << r;
  const strings lines = lines_of(r.out);
  ASSERT_EQ(lines.size(), 5u);
  EXPECT_EQ(lines[0].compare(0, 8, "{\"id\":7,"), 0) << lines[0];
  EXPECT_NE(lines[1].find("\"id\":{\"k\":[1.50,null,true,\"\xc3\xa9\\n\"],\"e\":{}},"), std::string::npos) << lines[1];
  EXPECT_NE(lines[2].find("\"id\":12345678901234567890123,"), std::string::npos) << lines[2];
  EXPECT_FALSE(jsonl(r.out)[4].contains("id"));
  for (const json &object : jsonl(r.out)) {
    EXPECT_EQ(object["embedding"].size(), 32u);
    EXPECT_EQ(object["truncated"], false);
  }
  EXPECT_EQ(jsonl(r.out)[0]["tokens"], 3);
}

// ------------------------------------------------------------------------------------------------ bad lines

TEST_F(Cli, BadJsonLinesAreReportedWithTheirNumber) {
  const std::pair<const char *, const char *> cases[] = {{"{\"id\": 5}", "no \"text\""},
                                                         {"{\"text\": \"a\", \"pair\": \"b\"}", "\"pair\" is not taken here"},
                                                         {"{\"text_pair\": 3}", "\"text_pair\" is not taken here"},
                                                         {"{\"text\" 5}", "not valid JSON: column 9: syntax error"},
                                                         {"{\"text\": 1e999}", "not valid JSON: number overflow parsing '1e999'"},
                                                         {"{\"text\": 5}", "\"text\" is not a string"},
                                                         {"{\"text\": null}", "\"text\" is not a string"},
                                                         {"{\"text\": [\"a\"]}", "\"text\" is not a string"},
                                                         {"{\"text\": {\"text\": \"a\"}}", "\"text\" is not a string"},
                                                         {"{\"text\": \"a\"", "not valid JSON"},
                                                         {"{\"text\": \"a\"} x", "not valid JSON"},
                                                         {"{\"text\": \"\xff\"}", "not valid JSON"},
                                                         {"{\"text\": \"\\ud800\"}", "not valid JSON"},
                                                         {"{text: \"a\"}", "not valid JSON"},
                                                         {"[\"a\"]", "not a JSON object"},
                                                         {"\"a\"", "not a JSON object"},
                                                         {"null", "not a JSON object"},
                                                         {"hello", "not valid JSON"}};
  std::string input = "{\"text\": \"good\", \"id\": 0}\n";
  for (const auto &[line, error] : cases) input += std::string(line) + "\n{\"text\": \"good\", \"id\": 1}\n";
  input += "{\"text\": \"a\", \"id\": " + std::string(100000, '[') + "\n";
  write_file(dir_ / "in.jsonl", input);
  const run_result r = embed({"-f", dir_ / "in.jsonl"});
  EXPECT_EQ(r.code, 1);
  EXPECT_EQ(jsonl(r.out).size(), std::size(cases) + 1) << "the good lines are all there";
  const strings errors = lines_of(r.err);
  ASSERT_EQ(errors.size(), std::size(cases) + 2) << r.err;
  for (size_t i = 0; i < std::size(cases); ++i) {
    const std::string place = "rs: " + (dir_ / "in.jsonl") + ":" + std::to_string(2 * i + 2) + ": ";
    EXPECT_EQ(errors[i].compare(0, place.size(), place), 0) << errors[i];
    EXPECT_NE(errors[i].find(cases[i].second), std::string::npos) << errors[i] << "\nwanted: " << cases[i].second;
  }
  EXPECT_NE(errors[std::size(cases)].find("nested deeper"), std::string::npos);
  EXPECT_EQ(errors.back(), "rs: 19 of 38 texts failed");
}

TEST_F(Cli, InvalidUtf8DoesNotLoseTheOthers) {
  std::string input;
  for (int i = 0; i < 200; ++i) input += i % 3 == 1 ? "bad \xff\xfe\n" : "line " + std::to_string(i) + "\n";
  const run_result r = embed({"-b", "16"}, input);
  EXPECT_EQ(r.code, 1);
  EXPECT_EQ(jsonl(r.out).size(), 133u);
  const strings errors = lines_of(r.err);
  ASSERT_EQ(errors.size(), 68u);
  for (size_t i = 0; i < 67; ++i) EXPECT_EQ(errors[i].find("rs: stdin:" + std::to_string(3 * i + 2) + ": "), 0u) << errors[i];
  EXPECT_NE(errors[0].find("UTF-8"), std::string::npos);
  EXPECT_EQ(errors.back(), "rs: 67 of 200 texts failed");

  std::string good;
  for (int i = 0; i < 200; ++i) good += i % 3 == 1 ? "" : "line " + std::to_string(i) + "\n";
  EXPECT_EQ(r.out, embed({}, good).out) << "the vectors of the others do not depend on the bad ones";
}

TEST_F(Cli, OnErrorStopEndsThere) {
  const std::string input = "one\ntwo\n\xff\nthree\n\xff\n";
  for (const char *batch : {"1", "2", "64"}) {
    const run_result r = embed({"--on-error", "stop", "-b", batch}, input);
    EXPECT_EQ(r.code, 1);
    EXPECT_EQ(r.out, embed({"one", "two"}).out) << "what came before is written";
    EXPECT_EQ(lines_of(r.err).size(), 2u) << r;
    EXPECT_EQ(r.err.find("rs: stdin:3: "), 0u) << r;
  }
  const run_result r = embed({"--on-error", "stop", "--format", "json", "-o", dir_ / "out.json"}, input);
  EXPECT_EQ(r.code, 1);
  EXPECT_EQ(json::parse(read_file(dir_ / "out.json")).size(), 2u) << "and whole";
}

// What is no UTF-8 at all ends the run, whatever --on-error says: what its lines make would be garbage.
TEST_F(Cli, OtherEncodings) {
  for (const char *how : {"skip", "stop"}) {
    expect_failure(embed({"--on-error", how}, std::string("\xff\xfe"
                                                          "a\0\n\0",
                                                          6)),
                   1, "stdin:1: looks like UTF-16; rs reads UTF-8");
    expect_failure(embed({"--on-error", how}, std::string("\xfe\xff\0a\0\n", 6)), 1, "stdin:1: looks like UTF-16");
  }
  write_file(dir_ / "in", std::string("c\na\0b\n", 6));
  const std::string place = (dir_ / "in") + ":2: a NUL byte";
  expect_failure(embed({"-f", dir_ / "in", "-o", dir_ / "out"}), 1, place);
  EXPECT_FALSE(file_exists(dir_ / "out"));
  expect_failure(embed({"-f", dir_ / "in", "--input", "text"}), 1, place);
  EXPECT_NE(tokenize({"--format", "text"}, std::string("c\na\0b\n", 6)).err.find("stdin:2: a NUL byte"), std::string::npos);
  expect_failure(rs({"convert", hf(), "-o", dir_ / "m", "--calibrate", dir_ / "in"}), 1, place);
  // A text of JSON may have one.  The tokenizer drops it.
  EXPECT_EQ(tokenize({"--format", "text"}, "{\"text\": \"a\\u0000b\"}\n").out, tokenize({"--format", "text", "ab"}).out);
}

TEST_F(Cli, CalibrationNamesTheLine) {
  write_file(dir_ / "in", "a\nb\xff\n");
  expect_failure(rs({"convert", hf(), "-o", dir_ / "m", "--calibrate", dir_ / "in"}), 1, (dir_ / "in") + ":2: not valid UTF-8");
}

TEST_F(Cli, LongLines) {
  std::string line;
  while (line.size() < 10'000'000) line += "text hello ";
  const run_result r = embed({}, "before\n" + line + "\nafter\n");
  EXPECT_EQ(r.code, 0) << r.err;
  const std::vector<json> objects = jsonl(r.out);
  ASSERT_EQ(objects.size(), 3u);
  EXPECT_EQ(objects[1]["tokens"], 32);
  EXPECT_EQ(objects[1]["truncated"], true);
  EXPECT_EQ(objects[0]["truncated"], false);
  EXPECT_NE(r.err.find("1 of 3 texts were cut to 32 tokens (longest: 18"), std::string::npos) << r.err;
  EXPECT_EQ(lines_of(r.err).size(), 1u);
}

TEST_F(Cli, LineOverTheLimit) {
  const std::string line((size_t(64) << 20) + 1, 'a');
  const run_result r = embed({}, "before\n" + line + "\nafter\n");
  EXPECT_EQ(r.code, 1);
  EXPECT_EQ(r.out, embed({"before", "after"}).out);
  EXPECT_EQ(r.err.find("rs: stdin:2: the line is longer than 67108864 bytes\n"), 0u) << r.err;
}

// ------------------------------------------------------------------------------------------------ long texts

TEST_F(Cli, TruncationIsNeverSilent) {
  std::string text = "hello";
  for (int i = 0; i < 50; ++i) text += " hello";  // 51 tokens and two
  run_result r = embed({"a", text});
  EXPECT_EQ(r.code, 0);
  EXPECT_EQ(jsonl(r.out)[1]["truncated"], true);
  EXPECT_EQ(jsonl(r.out)[1]["tokens"], 32);
  EXPECT_EQ(r.err, "rs: 1 of 2 texts were cut to 32 tokens (longest: 53); --max-tokens 53 or --long chunk keeps more\n");

  r = embed({"--max-tokens", "53", text});
  EXPECT_EQ(r.err, "");
  EXPECT_EQ(jsonl(r.out)[0]["tokens"], 53);
  EXPECT_EQ(jsonl(r.out)[0]["truncated"], false);

  r = embed({"--max-tokens", "64", text + " " + text});
  EXPECT_NE(r.err.find("--long chunk keeps all"), std::string::npos) << r.err;

  r = embed({"--long", "error", "a", text});
  EXPECT_EQ(r.code, 1);
  EXPECT_EQ(jsonl(r.out).size(), 1u);
  EXPECT_NE(r.err.find("rs: text 2: "), std::string::npos) << r.err;
  EXPECT_NE(r.err.find("53 tokens"), std::string::npos) << r.err;

  r = embed({"--long", "chunk", "a", text});
  EXPECT_EQ(r.code, 0) << r;
  EXPECT_EQ(r.err, "");
  EXPECT_EQ(jsonl(r.out)[1]["tokens"], 53);
  EXPECT_EQ(jsonl(r.out)[1]["truncated"], false);
  EXPECT_NEAR(norm_of(floats(jsonl(r.out)[1]["embedding"])), 1, 1e-5);
  std::set<std::string> outputs = {embed({"--long", "chunk", text}).out};  // an eighth of a window
  for (const char *overlap : {"0", "1", "10"}) outputs.insert(embed({"--long", "chunk", "--overlap", overlap, text}).out);
  EXPECT_EQ(outputs.size(), 4u);
}

// ------------------------------------------------------------------------------------------------ formats

TEST_F(Cli, FormatsAgree) {
  const strings texts = {"hello", "a cat", "", "stock line 42"};
  const auto as = [&](const std::string &format, const strings &more = {}) {
    strings arguments = {"--format", format};
    arguments.insert(arguments.end(), more.begin(), more.end());
    arguments.push_back("--");
    arguments.insert(arguments.end(), texts.begin(), texts.end());
    const run_result r = embed(arguments);
    EXPECT_EQ(r.code, 0) << r;
    return r.out;
  };
  std::vector<float> expected;
  for (const json &object : jsonl(as("jsonl")))
    for (float value : floats(object["embedding"])) expected.push_back(value);
  ASSERT_EQ(expected.size(), 4u * 32);

  const json array = json::parse(as("json"));
  ASSERT_EQ(array.size(), 4u);
  for (size_t i = 0; i < 4; ++i) EXPECT_EQ(array[i], jsonl(as("jsonl"))[i]);

  std::string raw = as("raw");
  ASSERT_EQ(raw.size(), expected.size() * sizeof(float));
  EXPECT_EQ(std::memcmp(raw.data(), expected.data(), raw.size()), 0) << "decimal digits read back as the same float";

  std::string csv = as("csv");
  EXPECT_EQ(lines_of(csv).size(), 4u);
  std::replace(csv.begin(), csv.end(), ',', ' ');
  std::istringstream numbers(csv);
  for (float value : expected) {
    float got = NAN;
    numbers >> got;
    EXPECT_EQ(got, value);
  }

  as("npy", {"-o", dir_ / "v.npy"});
  std::vector<int64_t> shape;
  EXPECT_EQ(read_npy_f32(dir_ / "v.npy", &shape), expected);
  EXPECT_EQ(shape, (std::vector<int64_t>{4, 32}));
  EXPECT_EQ(read_file(dir_ / "v.npy").size() % 64, expected.size() * 4 % 64) << "data is aligned";
  EXPECT_EQ(as("npy"), read_file(dir_ / "v.npy")) << "through a pipe";
  const std::string shell = "'" + program() + "' embed -m '" + weights() + "' --format npy -- hello 'a cat' '' 'stock line 42'";
  EXPECT_EQ(run(shell + " > '" + (dir_ / "r.npy") + "'").code, 0);
  EXPECT_EQ(read_file(dir_ / "r.npy"), read_file(dir_ / "v.npy")) << "redirected";
  EXPECT_EQ(run("echo x > '" + (dir_ / "a.npy") + "'; " + shell + " >> '" + (dir_ / "a.npy") + "'").code, 0);
  EXPECT_EQ(read_file(dir_ / "a.npy"), "x\n" + read_file(dir_ / "v.npy")) << "appended";
}

TEST_F(Cli, NoTexts) {
  EXPECT_EQ(embed({"--format", "json"}).out, "[\n]\n");
  EXPECT_EQ(embed({"--format", "csv"}).out, "");
  EXPECT_EQ(embed({"--format", "raw"}).out, "");
  EXPECT_EQ(embed({"--format", "npy", "-o", dir_ / "v.npy"}).code, 0);
  std::vector<int64_t> shape;
  EXPECT_TRUE(read_npy_f32(dir_ / "v.npy", &shape).empty());
  EXPECT_EQ(shape, (std::vector<int64_t>{0, 32}));
}

TEST_F(Cli, PerToken) {
  const run_result r = embed({"--pooling", "none", "a cat", "b"});
  ASSERT_EQ(r.code, 0) << r;
  const std::vector<json> objects = jsonl(r.out);
  EXPECT_EQ(objects[0]["embedding"].size(), 4u);
  EXPECT_EQ(objects[1]["embedding"].size(), 3u);
  EXPECT_EQ(objects[0]["embedding"][0].size(), 32u);
  EXPECT_EQ(lines_of(embed({"--pooling", "none", "--format", "csv", "a cat", "b"}).out).size(), 7u);
  embed({"--pooling", "none", "--format", "npy", "-o", dir_ / "t.npy", "a cat", "b"});
  std::vector<int64_t> shape;
  read_npy_f32(dir_ / "t.npy", &shape);
  EXPECT_EQ(shape, (std::vector<int64_t>{7, 32}));
}

// ------------------------------------------------------------------------------------------------ settings of the encoder

TEST_F(Cli, DimCutsAndNormalisesAgain) {
  const std::vector<float> all = vector_of("hello world"), cut = vector_of("hello world", {"--dim", "8"});
  ASSERT_EQ(cut.size(), 8u);
  EXPECT_NEAR(norm_of(all), 1, 1e-5);
  EXPECT_NEAR(norm_of(cut), 1, 1e-5);
  EXPECT_NEAR(cosine_of(cut, {all.begin(), all.begin() + 8}), 1, 1e-6);
}

TEST_F(Cli, PoolingAndNormalize) {
  EXPECT_EQ(vector_of("hello world", {"--pooling", "mean"}), vector_of("hello world"));
  EXPECT_EQ(vector_of("hello world", {"--normalize"}), vector_of("hello world"));
  const std::vector<float> plain = vector_of("hello world", {"--no-normalize"});
  EXPECT_GT(std::fabs(norm_of(plain) - 1), 0.01);
  EXPECT_NEAR(cosine_of(plain, vector_of("hello world")), 1, 1e-6);
  EXPECT_NE(vector_of("hello world", {"--pooling", "cls"}), vector_of("hello world"));
}

TEST_F(Cli, Prompts) {
  EXPECT_EQ(vector_of("hello", {"--prompt", "query"}), vector_of("find: hello")) << "by name";
  EXPECT_EQ(vector_of("hello", {"--prompt", "line: "}), vector_of("line: hello")) << "as it is";
  EXPECT_EQ(vector_of("hello", {"--prompt", ""}), vector_of("hello"));
  EXPECT_EQ(embed({"--prompt", "query", "hello"}).err, "");
  const run_result r = embed({"--prompt", "querry", "hello"});
  EXPECT_EQ(r.code, 0);
  EXPECT_NE(r.err.find("passage, query"), std::string::npos) << r;
}

TEST_F(Cli, BatchAndThreadsDoNotChangeTheResult) {
  std::string input;
  for (int i = 0; i < 100; ++i) input += std::string(size_t(i % 40), 'a' + char(i % 26)) + " line " + std::to_string(i * i) + "\n";
  const std::string expected = embed({"-b", "1", "-t", "1"}, input).out;
  EXPECT_EQ(lines_of(expected).size(), 100u);
  for (const char *batch : {"2", "7", "64", "65536"})
    for (const char *threads : {"1", "2", "3"})
      EXPECT_EQ(embed({"-b", batch, "-t", threads}, input).out, expected) << batch << " " << threads;
}

TEST_F(Cli, Profile) {
  const run_result r = embed({"--profile", "hello"});
  EXPECT_EQ(r.code, 0);
  EXPECT_EQ(jsonl(r.out).size(), 1u);
  for (const char *word : {"operator", "calls", "GMAC/s", "linear", "flash_attn"})
    EXPECT_NE(r.err.find(word), std::string::npos) << r.err;
}

// ------------------------------------------------------------------------------------------------ streams

TEST_F(Cli, LongInputKeepsItsOrderAndLittleMemory) {
  const auto write_input = [this](int lines) {
    std::ofstream out(dir_ / "in.jsonl");
    for (int i = 0; i < lines; ++i) {
      if (i % 1000 == 999) out << "{\"id\": " << i << "}\n";
      else out << "{\"id\": " << i << ", \"text\": \"line " << i % 97 << "\"}\n";
    }
  };
  const auto embed_input = [this](long *peak_kb) {
    const int out = open((dir_ / "out.jsonl").c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    process p({"embed", "-m", weights(), "-f", dir_ / "in.jsonl", "--dim", "2"}, out);
    close(out);
    return p.wait(peak_kb);
  };
  long small = 0, large = 0;
  write_input(1000);
  testing::internal::CaptureStderr();
  EXPECT_EQ(embed_input(&small), 1);
  write_input(20000);
  EXPECT_EQ(embed_input(&large), 1);
  const strings errors = lines_of(testing::internal::GetCapturedStderr());
  ASSERT_EQ(errors.size(), 2u + 21u);
  EXPECT_EQ(errors.back(), "rs: 20 of 20000 texts failed");

  int expected = 0;
  std::ifstream in(dir_ / "out.jsonl");
  for (std::string line; std::getline(in, line); ++expected) {
    if (expected % 1000 == 999) ++expected;
    const std::string id = "{\"id\":" + std::to_string(expected) + ",";
    ASSERT_EQ(line.compare(0, id.size(), id), 0) << line;
  }
  EXPECT_EQ(expected, 19999);
#if defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "memory is not compared: AddressSanitizer keeps what is freed";
#else
  EXPECT_LT(large, small + 8 * 1024) << "kilobytes: 20 times the input takes no more memory";
#endif
}

TEST_F(Cli, SlowProducerGetsItsAnswersAtOnce) {
  for (const char *format : {"jsonl", "csv", "json"}) {
    process p({"embed", "-m", weights(), "--format", format});
    if (std::string(format) == "json") {
      ASSERT_TRUE(p.write_input("hello\n"));
      EXPECT_EQ(p.read_line(), "[");
    } else {
      for (const char *line : {"hello\n", "a cat\n", "\n"}) {
        ASSERT_TRUE(p.write_input(line));
        EXPECT_FALSE(p.read_line().empty()) << format;
      }
    }
    p.close_input();
    EXPECT_EQ(p.wait(), 0);
  }
  process p({"tokenize", "-m", weights(), "--format", "text"});
  ASSERT_TRUE(p.write_input("hello\n"));
  EXPECT_EQ(p.read_line(), "[CLS] hello [SEP]");
}

TEST_F(Cli, ClosedPipeEndsQuickly) {
  for (const char *command : {"embed", "tokenize"}) {
    const run_result r =
        run("yes hello | '" + program() + "' " + command + " -m '" + weights() + "' | head -n 2; echo ${PIPESTATUS:-}");
    EXPECT_EQ(lines_of(r.out).size(), 3u) << r;
    EXPECT_EQ(r.err, "") << r;
  }
  int closed[2];
  ASSERT_EQ(pipe2(closed, O_CLOEXEC), 0);
  close(closed[0]);
  testing::internal::CaptureStderr();
  process p({"embed", "-m", weights(), "hello"}, closed[1]);
  EXPECT_EQ(p.wait(), 1);
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "") << "whoever reads has enough";
  close(closed[1]);
}

TEST_F(Cli, FullDisk) {
  if (!file_exists("/dev/full")) GTEST_SKIP() << "needs /dev/full";
  expect_failure(embed({"-o", "/dev/full", "hello"}), 1, "cannot write to '/dev/full': No space left on device");
  for (const std::string format : {"jsonl", "json", "csv", "npy", "raw"})
    expect_failure(run("'" + program() + "' embed -m '" + weights() + "' hello --format " + format + " > /dev/full"), 1,
                   "No space left on device");
  for (const std::string command : {"info", "verify"})
    expect_failure(run("'" + program() + "' " + command + " '" + weights() + "' > /dev/full"), 1, "No space left on device");
  for (const std::string command : {"tokenize", "similarity"})
    expect_failure(run("'" + program() + "' " + command + " -m '" + weights() + "' a b > /dev/full"), 1, "No space left on device");
  expect_failure(rs({"convert", hf(), "-o", "/dev/full"}), 1, "not a regular file");
  for (const std::string what : {"--help", "--version", "embed --help"})
    expect_failure(run("'" + program() + "' " + what + " > /dev/full"), 1, "cannot write to standard output: No space left");
}

TEST_F(Cli, LargestFileLeavesNothingBehind) {
  std::string texts;
  for (int i = 0; i < 100; ++i) texts += "hello\n";
  write_file(dir_ / "in", texts);
  std::filesystem::create_directory(dir_ / "out");
  const std::string limited = "ulimit -f 1; '" + program() + "' ";
  expect_failure(run(limited + "embed -m '" + weights() + "' -f '" + (dir_ / "in") + "' -o '" + (dir_ / "out/v") + "'"), 1,
                 "File too large");
  const run_result converted = run(limited + "convert '" + hf() + "' -o '" + (dir_ / "out/m.rsw") + "'");
  EXPECT_EQ(converted.code, 1) << converted;
  EXPECT_NE(converted.err.find("File too large"), std::string::npos) << converted;
  EXPECT_EQ(files_in(dir_ / "out"), strings());
}

// ------------------------------------------------------------------------------------------------ files that are written

TEST_F(Cli, OutputAppearsWholeOrNotAtAll) {
  const std::string out = dir_ / "out.jsonl";
  write_file(out, "old");
  EXPECT_EQ(rs({"embed", "-m", dir_ / "absent.rsw", "-o", out, "hello"}).code, 1);
  EXPECT_EQ(embed({"-o", out, "-f", dir_ / "absent.txt"}).code, 1);
  EXPECT_EQ(embed({"-o", out, "-f", dir_.path()}).code, 1);
  EXPECT_EQ(read_file(out), "old");
  EXPECT_EQ(files_in(dir_.path()), strings{"out.jsonl"});

  EXPECT_EQ(embed({"-o", out}, "a\n\xff\nb\n").code, 1) << "a bad line is no reason to lose the good ones";
  EXPECT_EQ(jsonl(read_file(out)).size(), 2u);
  EXPECT_EQ(files_in(dir_.path()), strings{"out.jsonl"});

  std::filesystem::permissions(out, std::filesystem::perms::owner_read | std::filesystem::perms::owner_write);
  EXPECT_EQ(embed({"-o", out, "-f", out, "--input", "text"}).code, 0) << "even from the file itself";
  EXPECT_EQ(std::filesystem::status(out).permissions(), std::filesystem::perms::owner_read | std::filesystem::perms::owner_write);

  // What the shell has opened is standard output, by whatever name.
  const std::string to_stdout = "'" + program() + "' embed -m '" + weights() + "' hello -o /dev/stdout";
  write_file(dir_ / "log", "before\n");
  EXPECT_EQ(run({"/bin/sh", "-c", "(" + to_stdout + "; echo behind) >> '" + (dir_ / "log") + "'"}).code, 0);
  EXPECT_EQ(read_file(dir_ / "log"), "before\n" + embed({"hello"}).out + "behind\n");
  std::filesystem::remove(dir_ / "log");

  std::filesystem::create_symlink("out.jsonl", dir_ / "link");
  EXPECT_EQ(embed({"-o", dir_ / "link", "hello"}).code, 0);
  EXPECT_TRUE(std::filesystem::is_symlink(dir_ / "link"));
  EXPECT_EQ(read_file(out), embed({"hello"}).out);
  // One to a file that is not there yet, too.
  std::filesystem::create_directory(dir_ / "later");
  std::filesystem::create_symlink("later/out", dir_ / "first");
  std::filesystem::create_symlink("first", dir_ / "second");
  EXPECT_EQ(embed({"-o", dir_ / "second", "hello"}).code, 0);
  EXPECT_TRUE(std::filesystem::is_symlink(dir_ / "second") && std::filesystem::is_symlink(dir_ / "first"));
  EXPECT_EQ(read_file(dir_ / "later/out"), read_file(out));
  std::filesystem::create_symlink("circle", dir_ / "circle");
  expect_failure(embed({"-o", dir_ / "circle", "hello"}), 1, "Too many levels of symbolic links");
}

TEST_F(Cli, ClosedStandardStreams) {
  const std::string rs_embed = "'" + program() + "' embed -m '" + weights() + "' ";
  expect_failure(run(rs_embed + "<&-"), 1, "cannot read 'stdin': Bad file descriptor");
  expect_failure(run(rs_embed + "hello >&-"), 1, "cannot write to standard output: Bad file descriptor");
  EXPECT_EQ(run("printf 'a\\377\\nb\\n' | " + rs_embed + "-o '" + (dir_ / "out") + "' >&- 2>&-").code, 1);
  EXPECT_EQ(read_file(dir_ / "out"), embed({"b"}).out) << "and no messages in it";
}

TEST_F(Cli, OutputThatCannotBe) {
  expect_failure(embed({"-o", dir_.path(), "hello"}), 1, "it is a folder");
  expect_failure(embed({"-o", dir_ / "absent/out", "hello"}), 1, "absent");
  const std::string copy = dir_ / "copy.rsw";
  std::filesystem::copy_file(weights(), copy);
  expect_failure(rs({"embed", "-m", copy, "-o", copy, "hello"}), 1, "is the weight file itself");
  EXPECT_EQ(read_file(copy), read_file(weights()));
}

TEST_F(Cli, SignalLeavesNothingBehind) {
  for (int number : {SIGINT, SIGTERM, SIGHUP}) {
    process p({"embed", "-m", weights(), "-o", dir_ / "out.jsonl"});
    ASSERT_TRUE(p.write_input("hello\n"));
    for (int i = 0; i < 2000 && files_in(dir_.path()).empty(); ++i) usleep(10000);
    EXPECT_EQ(files_in(dir_.path()).size(), 1u) << "the temporary file";
    usleep(100000);
    p.signal_it(number);
    EXPECT_EQ(p.wait(), 128 + number);
    EXPECT_EQ(files_in(dir_.path()), strings());
  }
}

// ------------------------------------------------------------------------------------------------ weight files

TEST_F(Cli, BadWeightFiles) {
  const std::string good = read_file(weights());
  write_file(dir_ / "empty", "");
  write_file(dir_ / "text", "this is not a weight file, but it is long enough to be one at first glance: 0123456789 0123456789\n");
  write_file(dir_ / "npy", std::string("\x93NUMPY\x01\0v\0", 10) + std::string(118, ' '));
  write_file(dir_ / "longer", good + "x");
  for (const std::string command : {"embed", "tokenize", "info", "verify"}) {
    const auto with = [&command](const std::string &file) {
      return command == "embed" || command == "tokenize" ? rs({command, "-m", file, "hello"}) : rs({command, file});
    };
    expect_failure(with(dir_ / "absent"), 1, "absent");
    expect_failure(with(dir_.path()), 1, dir_.path());
    for (const char *name : {"empty", "text", "npy", "longer"}) expect_failure(with(dir_ / name), 1, name);
    expect_failure(with(hf() + "/model.safetensors"), 1, "model.safetensors");
  }
  for (size_t i = 1; i <= 24; ++i) {
    write_file(dir_ / "short", std::string_view(good).substr(0, good.size() * i / 25));
    expect_failure(rs({"embed", "-m", dir_ / "short", "hello"}), 1, "short");
  }
}

TEST_F(Cli, FlippedBitIsFoundWhereverItIs) {
  const std::string good = read_file(weights());
  uint64_t state = 3;
  for (int i = 0; i < 64; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const size_t at = i < 16 ? size_t(i) * 4 : size_t(state >> 20) % good.size();
    std::string bad = good;
    bad[at] = char(bad[at] ^ (1 << (state >> 60) % 8));
    write_file(dir_ / "flipped", bad);
    const run_result r = rs({"embed", "-m", dir_ / "flipped", "hello"});
    expect_failure(r, 1, "flipped");
    EXPECT_EQ(rs({"verify", dir_ / "flipped"}).code, 1) << "byte " << at;
  }
}

TEST_F(Cli, SameAnswerAfterMove) {
  std::filesystem::create_directory(dir_ / "elsewhere");
  std::filesystem::copy_file(weights(), dir_ / "a.rsw");
  const std::string before = rs({"embed", "-m", dir_ / "a.rsw", "hello"}).out;
  std::filesystem::rename(dir_ / "a.rsw", dir_ / "elsewhere/b");
  EXPECT_EQ(rs({"embed", "-m", dir_ / "elsewhere/b", "hello"}).out, before);
  EXPECT_EQ(rs({"embed", "-m", dir_ / "elsewhere/b", "--no-check", "hello"}).out, before);
}

TEST_F(Cli, UnknownIsaIsAnError) {
  run_options options;
  options.env = {"RS_ISA=abacus"};
  expect_failure(run({program(), "embed", "-m", weights(), "hello"}, options), 1, "abacus");
}

TEST_F(Cli, UnknownDeviceIsAnError) {
  run_options options;
  options.env = {"RS_DEVICE=foo"};
  expect_failure(run({program(), "embed", "-m", weights(), "hello"}, options), 1, "RS_DEVICE: device 'foo': expected cpu, cuda,");
}

// ------------------------------------------------------------------------------------------------ tokenize

TEST_F(Cli, TokenizePairsAndOffsets) {
  run_result r = tokenize({"--offsets", "--pair", "cat", "hello \xc3\xa9 [MASK]"});
  ASSERT_EQ(r.code, 0) << r;
  json object = jsonl(r.out)[0];
  EXPECT_EQ(object["tokens"], json::parse(R"(["[CLS]","hello","e","[MASK]","[SEP]","cat","[SEP]"])"));
  EXPECT_EQ(object["type_ids"], json::parse("[0,0,0,0,0,1,1]"));
  EXPECT_EQ(object["offsets"], json::parse("[[0,0],[0,5],[6,8],[9,15],[0,0],[0,3],[0,0]]"));
  EXPECT_EQ(object["ids"].size(), 7u);

  r = tokenize({},
               "{\"id\": 1, \"text\": \"a\", \"pair\": \"b\"}\n{\"text\": \"a\", \"text_pair\": \"b\"}\n{\"text\": "
               "\"a\"}\n{\"text\": \"a\", \"pair\": 5}\n");
  EXPECT_EQ(r.code, 1);
  EXPECT_NE(r.err.find("rs: stdin:4: the pair of \"text\" is not a string\n"), std::string::npos) << r.err;
  const std::vector<json> objects = jsonl(r.out);
  ASSERT_EQ(objects.size(), 3u);
  EXPECT_EQ(objects[0]["id"], 1);
  EXPECT_EQ(objects[0]["ids"], objects[1]["ids"]);
  EXPECT_EQ(objects[0]["ids"].size(), 5u);
  EXPECT_FALSE(objects[2].contains("type_ids"));
}

TEST_F(Cli, TokenizeCutsOnlyWhenAsked) {
  std::string text;
  for (int i = 0; i < 1000; ++i) text += "hello ";
  EXPECT_EQ(jsonl(tokenize({text}).out)[0]["ids"].size(), 1002u);
  EXPECT_EQ(lines_of(tokenize({"--format", "text", "--max-tokens", "4", text}).out)[0], "[CLS] hello hello [SEP]");
  // The longer of two goes first.
  EXPECT_EQ(lines_of(tokenize({"--format", "text", "--max-tokens", "7", "--pair", "a b c d e", "hello"}).out)[0],
            "[CLS] hello [SEP] a b c [SEP]");
  EXPECT_EQ(lines_of(tokenize({"--format", "text", "--max-tokens", "8", "--pair", "a b c d e", "hello hello hello hello"}).out)[0],
            "[CLS] hello hello [SEP] a b c [SEP]");
  const run_result r = tokenize({"--max-tokens", "2", "--pair", "b", "a"});
  EXPECT_EQ(r.code, 1);
  EXPECT_NE(r.err.find("no room for the 3 special tokens"), std::string::npos) << r;
}

TEST_F(Cli, TokenizeBadLines) {
  const run_result r = tokenize({"--format", "text"}, "a\n\xff\nb\n");
  EXPECT_EQ(r.code, 1);
  EXPECT_EQ(lines_of(r.out).size(), 2u);
  EXPECT_EQ(r.err.find("rs: stdin:2: "), 0u) << r;
  EXPECT_EQ(lines_of(tokenize({"--format", "text", "--on-error", "stop"}, "a\n\xff\nb\n").out).size(), 1u);
}

// ------------------------------------------------------------------------------------------------ similarity

TEST_F(Cli, Similarity) {
  const auto similarity = [](strings arguments, const std::string &input = "") {
    arguments.insert(arguments.begin(), {"similarity", "-m", weights()});
    return rs(arguments, input);
  };
  const double expected = cosine_of(vector_of("a cat"), vector_of("a kitten"));
  run_result r = similarity({"a cat", "a kitten"});
  EXPECT_EQ(r.code, 0) << r;
  EXPECT_NEAR(std::stod(r.out), expected, 1e-4);
  r = similarity({"--format", "json", "a cat", "a kitten", "stock"});
  const json object = json::parse(r.out);
  EXPECT_NEAR(object["cosines"][0][1].get<double>(), expected, 1e-6);
  EXPECT_EQ(object["cosines"][2][2], 1);
  EXPECT_EQ(object["texts"][2], "stock");
  r = similarity({}, "a cat\na kitten\nstock\n");
  ASSERT_EQ(lines_of(r.out).size(), 4u) << r;
  EXPECT_NE(lines_of(r.out)[1].find("1.0000"), std::string::npos);
  EXPECT_NE(lines_of(r.out)[2].find("a kitten"), std::string::npos);
  EXPECT_EQ(lines_of(similarity({"--table", "a", "b"}).out).size(), 3u);
  expect_failure(similarity({}, "a\nb\n\xff\n"), 1, "rs: stdin:3: invalid UTF-8");
  expect_failure(similarity({"a", "\xff"}), 1, "rs: text 2: invalid UTF-8");
}

// ------------------------------------------------------------------------------------------------ info, verify

TEST_F(Cli, Info) {
  const json info = json::parse(rs({"info", weights(), "--json"}).out);
  EXPECT_EQ(info["name"], "tiny");
  EXPECT_EQ(info["architecture"], "bert");
  EXPECT_EQ(info["weight_type"], "q8");
  EXPECT_EQ(info["dim"], 32);
  EXPECT_EQ(info["layers"], 2);
  EXPECT_EQ(info["max_tokens"], 32);
  EXPECT_EQ(info["position_limit"], 64);
  EXPECT_EQ(info["file_bytes"], std::filesystem::file_size(weights()));
  EXPECT_EQ(info["metadata"]["tokenizer.tokens"].size(), tiny_model().tokens().size());
  EXPECT_EQ(info["metadata"]["general.license"], "apache-2.0");
  EXPECT_EQ(info["metadata"]["encode.pooling"], "mean");
  EXPECT_EQ(info["metadata"]["prompt.names"], json::parse(R"(["passage","query"])"));
  EXPECT_FALSE(info["tensors"].empty());
  EXPECT_TRUE(info["tensors"][0].contains("offset"));

  const std::string table = rs({"info", "-m", weights()}).out;
  for (const char *word : {"tiny", "bert", "q8", "encode.pooling", "w8", "panels"})
    EXPECT_NE(table.find(word), std::string::npos) << table;
  for (const std::string &line : lines_of(table)) EXPECT_LE(line.size(), 200u) << line;
  EXPECT_NE(rs({"info", weights(), "--tensors"}).out.find(info["tensors"][0]["name"].get<std::string>()), std::string::npos);
}

// The weight file with other golden values.
void rewrite_golden(const std::string &from, const std::string &to, const char *key, float value) {
  rs_model *model = nullptr;
  ASSERT_EQ(rs_model_load(from.c_str(), nullptr, &model), RS_OK) << rs_last_error();
  rs_meta meta;
  ASSERT_EQ(rs_model_meta(model, key, &meta), RS_OK);
  const std::vector<float> values(meta.count, value);
  rs_writer *writer = nullptr;
  ASSERT_EQ(rs_writer_open(to.c_str(), &writer), RS_OK) << rs_last_error();
  EXPECT_EQ(rs_writer_set_f32s(writer, key, values.data(), values.size()), RS_OK);
  EXPECT_EQ(rs_writer_copy(writer, model), RS_OK);
  EXPECT_EQ(rs_writer_finish(writer), RS_OK) << rs_last_error();
  rs_writer_free(writer);
  rs_model_free(model);
}

TEST_F(Cli, Verify) {
  const run_result r = rs({"verify", weights()});
  EXPECT_EQ(r.code, 0) << r;
  EXPECT_EQ(lines_of(r.out).back(), "OK");
  const json report = json::parse(rs({"verify", weights(), "--json"}).out);
  EXPECT_EQ(report["ok"], true);
  EXPECT_GT(report["golden"]["texts"], 8);
  EXPECT_GT(report["golden"]["cosine_mean"], 0.99);
  EXPECT_EQ(report["golden"]["cosine"].size(), report["golden"]["texts"]);

  rewrite_golden(weights(), dir_ / "other.rsw", "golden.cosine", 1.1f);
  const run_result worse = rs({"verify", dir_ / "other.rsw"});
  EXPECT_EQ(worse.code, 1) << worse;
  EXPECT_NE(worse.err.find("golden sentence 1 has cosine"), std::string::npos) << worse;
  rewrite_golden(weights(), dir_ / "nan.rsw", "golden.embeddings", 0);  // of which a cosine is NaN, or no better
  EXPECT_EQ(rs({"verify", dir_ / "nan.rsw"}).code, 1);
}

// ------------------------------------------------------------------------------------------------ convert

TEST_F(Cli, ConvertReports) {
  for (const std::string type : {"f32", "f16", "q8", "q4"}) {
    const std::string out = dir_ / ("m-" + type);
    const run_result r = rs({"convert", hf(), "-o", out, "--type", type, "--json"});
    ASSERT_EQ(r.code, 0) << r;
    const json report = json::parse(r.out);
    EXPECT_EQ(report["type"], type);
    EXPECT_EQ(report["file_bytes"], std::filesystem::file_size(out));
    EXPECT_FALSE(report["types"].empty());
    EXPECT_LE(report["golden"]["cosine_mean"], 1.000001);
    EXPECT_GT(report["golden"]["cosine_mean"], type == "f32" ? 0.999999 : 0.5);
    EXPECT_EQ(rs({"verify", out}).code, 0);
  }
  const run_result r = rs({"convert", hf(), "-o", dir_ / "m"});
  EXPECT_EQ(r.code, 0);
  for (const char *word : {"type", "max error", "RMS error", "w8", "panels", "cosine", " s\n"})
    EXPECT_NE(r.out.find(word), std::string::npos) << r.out;
  EXPECT_EQ(files_in(dir_.path()), (strings{"m", "m-f16", "m-f32", "m-q4", "m-q8"})) << "nothing else is left";
}

TEST_F(Cli, ConvertedFileTellsNoPaths) {
  ASSERT_EQ(rs({"convert", hf() + "/", "-o", dir_ / "m.rsw", "--source", "org/model", "--license", "mit", "--name", "N",
                "--max-tokens", "20"})
                .code,
            0);
  const std::string file = read_file(dir_ / "m.rsw");
  EXPECT_EQ(file.find(std::filesystem::path(hf()).parent_path().string()), std::string::npos);
  const json info = json::parse(rs({"info", dir_ / "m.rsw", "--json"}).out);
  EXPECT_EQ(info["name"], "N");
  EXPECT_EQ(info["max_tokens"], 20);
  EXPECT_EQ(info["metadata"]["general.source"], "org/model");
  EXPECT_EQ(info["metadata"]["general.license"], "mit");
}

TEST_F(Cli, ConvertIsReproducible) {
  for (const char *name : {"a", "b"}) ASSERT_EQ(rs({"convert", hf(), "-o", dir_ / name}).code, 0);
  EXPECT_EQ(read_file(dir_ / "a"), read_file(dir_ / "b"));
}

TEST_F(Cli, ConvertShardsAndHalfFloats) {
  tiny_model model;
  std::map<std::string, tiny_tensor> parts[2];
  json map;
  for (const auto &[name, tensor] : model.weights()) {
    const size_t part = map.size() % 2;
    parts[part][name] = tensor;
    map[name] = part ? "part-2.safetensors" : "part-1.safetensors";
  }
  const std::string sharded = dir_ / "tiny";
  model.write(sharded);
  std::filesystem::remove(sharded + "/model.safetensors");
  write_file(sharded + "/part-1.safetensors", tiny_model::safetensors(parts[0]));
  write_file(sharded + "/part-2.safetensors", tiny_model::safetensors(parts[1]));
  write_file(sharded + "/model.safetensors.index.json", json{{"weight_map", map}}.dump());
  ASSERT_EQ(rs({"convert", sharded, "-o", dir_ / "sharded.rsw"}).code, 0);
  EXPECT_EQ(read_file(dir_ / "sharded.rsw"), read_file(weights())) << "the same file as from one";

  std::filesystem::remove(sharded + "/model.safetensors.index.json");
  for (const char *dtype : {"F16", "BF16"}) {
    write_file(sharded + "/model.safetensors", model.safetensors(dtype));
    ASSERT_EQ(rs({"convert", sharded, "-o", dir_ / "half.rsw", "--type", "f32"}).code, 0);
    const run_result r = rs({"embed", "-m", dir_ / "half.rsw", "hello"}), full = rs({"embed", "-m", weights("f32"), "hello"});
    EXPECT_GT(cosine_of(floats(jsonl(r.out)[0]["embedding"]), floats(jsonl(full.out)[0]["embedding"])), 0.999);
  }
}

TEST_F(Cli, ConvertRefusesAndLeavesWhatWasThere) {
  const std::string folder = dir_ / "in";
  tiny_model().write(folder);
  std::filesystem::create_directory(dir_ / "out");
  const std::string out = dir_ / "out/m.rsw";
  write_file(out, "old");
  const auto expect = [&](const std::string &part) {
    expect_failure(rs({"convert", folder, "-o", out}), 1, part);
    EXPECT_EQ(read_file(out), "old");
    EXPECT_EQ(files_in(dir_ / "out"), strings{"m.rsw"});
  };
  const auto config = [&](const char *key, const json &value) {
    json c = tiny_model().config();
    c[key] = value;
    write_file(folder + "/config.json", c.dump());
  };
  config("model_type", "gpt2");
  expect("gpt2");
  config("architectures", {"BertForPigs"});
  expect("BertForPigs");
  config("hidden_act", "frob");
  expect("frob");
  config("hidden_size", 64);
  expect("embeddings");
  config("vocab_size", 50);
  expect("50");
  config("position_embedding_type", "relative_key");
  expect("relative_key");
  write_file(folder + "/config.json", tiny_model().config().dump());

  tiny_model more;
  more.weights()["encoder.frob.weight"] = {{1}, {1}};
  write_file(folder + "/model.safetensors", more.safetensors());
  expect("encoder.frob.weight");
  tiny_model less;
  less.weights().erase("encoder.layer.1.output.dense.bias");
  write_file(folder + "/model.safetensors", less.safetensors());
  expect("encoder.layer.1.output.dense.bias");
  tiny_model nan;
  nan.weights()["encoder.layer.1.output.dense.weight"].values[5] = NAN;
  write_file(folder + "/model.safetensors", nan.safetensors());
  expect("encoder.layer.1.output.dense.weight");
  write_file(folder + "/model.safetensors", "x");
  expect("model.safetensors");
}

TEST_F(Cli, ConvertOutputThatCannotBe) {
  const std::string folder = dir_ / "in";
  tiny_model().write(folder);
  expect_failure(rs({"convert", folder, "-o", folder}), 1, "it is a folder");
  expect_failure(rs({"convert", folder, "-o", dir_ / "absent/m.rsw"}), 1, "absent");
  expect_failure(rs({"convert", folder, "-o", "/dev/null"}), 1, "not a regular file");
  for (const char *input : {"model.safetensors", "config.json", "tokenizer.json", "1_Pooling/config.json"}) {
    const std::string before = read_file(folder + "/" + input);
    expect_failure(rs({"convert", folder, "-o", folder + "/" + input}), 1, "is a file of the model that is read");
    EXPECT_EQ(read_file(folder + "/" + input), before);
  }
  EXPECT_EQ(rs({"convert", folder, "-o", folder + "/new.rsw"}).code, 0);
  expect_failure(rs({"convert", folder + "/config.json", "-o", dir_ / "m.rsw"}), 1, "is not a folder");
  expect_failure(rs({"convert", dir_ / "absent", "-o", dir_ / "m.rsw"}), 1, "absent");
}

TEST_F(Cli, ConvertEndedBySignalLeavesNothing) {
  tiny_options big;
  big.hidden = 256;
  big.intermediate = 1024;
  big.layers = 4;
  tiny_model(big).write(dir_ / "in");
  std::filesystem::create_directory(dir_ / "out");
  for (int wait_ms : {0, 5, 20, 60}) {
    process p({"convert", dir_ / "in", "-o", dir_ / "out/m.rsw"});
    // Not before there is something to leave behind.
    for (int i = 0; i < 5000 && files_in(dir_ / "out").empty(); ++i) usleep(1000);
    usleep(useconds_t(wait_ms) * 1000);
    p.signal_it(SIGTERM);
    p.wait();
    // The result may be in its place already: the signal can come while the report is printed.
    strings left = files_in(dir_ / "out");
    left.erase(std::remove(left.begin(), left.end(), "m.rsw"), left.end());
    EXPECT_EQ(left, strings()) << "after " << wait_ms << " ms";
    std::filesystem::remove(dir_ / "out/m.rsw");
  }
}

// SIGKILL leaves a folder behind; the next run for the same file removes it, but none that is anything else.
TEST_F(Cli, ConvertRemovesWhatWasAbandoned) {
  const std::string out = dir_ / "out/m.rsw";
  const auto folder = [&](const std::string &name, const std::string &file, int minutes) {
    std::filesystem::create_directories(dir_ / ("out/" + name));
    write_file(dir_ / ("out/" + name + "/" + file), "x");
    std::filesystem::permissions(dir_ / ("out/" + name), std::filesystem::perms::owner_all);
    std::filesystem::last_write_time(dir_ / ("out/" + name),
                                     std::filesystem::file_time_type::clock::now() - std::chrono::minutes(minutes));
  };
  folder(".m.rsw.aB3dE6", "f32.1a-0", 10);
  folder(".m.rsw.backup", "mine", 10);  // somebody's own
  folder(".m.rsw.hidden", ".mine", 10);
  folder(".m.rsw.inUse1", "typed", 10);
  folder(".m.rsw.justNw", "f32", 0);  // another run may be about to lock it
  folder(".n.rsw.aB3dE6", "f32", 10);
  const int held = open((dir_ / "out/.m.rsw.inUse1").c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  ASSERT_EQ(flock(held, LOCK_EX | LOCK_NB), 0);
  EXPECT_EQ(rs({"convert", hf(), "-o", out}).code, 0);
  close(held);
  EXPECT_EQ(files_in(dir_ / "out"),
            (strings{".m.rsw.backup", ".m.rsw.hidden", ".m.rsw.inUse1", ".m.rsw.justNw", ".n.rsw.aB3dE6", "m.rsw"}));
}

// ------------------------------------------------------------------------------------------------ terminals

// A program whose three streams are a terminal, but for standard output where `output` is given.
std::string on_terminal(strings arguments, int *code) {
  const int master = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
  if (master < 0 || grantpt(master) != 0 || unlockpt(master) != 0) return "";
  const std::string name = ptsname(master);
  arguments.insert(arguments.begin(), program());
  std::vector<char *> argv;
  for (std::string &a : arguments) argv.push_back(a.data());
  argv.push_back(nullptr);
  const int terminal = open(name.c_str(), O_RDWR | O_NOCTTY | O_CLOEXEC);
  const pid_t child = fork();
  if (child == 0) {
    for (int fd = 0; fd < 3; ++fd) dup2(terminal, fd);
    execv(argv[0], argv.data());
    _exit(127);
  }
  close(terminal);
  std::string text;
  char buffer[4096];
  for (ssize_t n; (n = read(master, buffer, sizeof buffer)) > 0;) text.append(buffer, size_t(n));
  close(master);
  int status = 0;
  waitpid(child, &status, 0);
  *code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return text;
}

TEST_F(Cli, TerminalGetsAHintAndABar) {
  int code = -1;
  const std::string hint = on_terminal({"embed", "-m", weights()}, &code);
  if (code < 0) GTEST_SKIP() << "needs a pseudo terminal";
  EXPECT_EQ(code, 2);
  EXPECT_NE(hint.find("rs: no text: give texts as arguments"), std::string::npos) << hint;

  std::string input;
  for (int i = 0; i < 300; ++i) input += "line\n";
  write_file(dir_ / "in", input);
  const std::string bar = on_terminal({"embed", "-m", weights(), "-f", dir_ / "in", "-o", dir_ / "out"}, &code);
  EXPECT_EQ(code, 0);
  EXPECT_NE(bar.find("texts/s"), std::string::npos) << bar;
  EXPECT_NE(bar.find('%'), std::string::npos) << bar;
  const std::string results = on_terminal({"embed", "-m", weights(), "-f", dir_ / "in"}, &code);
  EXPECT_EQ(results.find("texts/s"), std::string::npos) << "no bar between the results";
}

// ------------------------------------------------------------------------------------------------ the real model

TEST(CliModel, ConvertsAndKeepsItsPromise) {
  RS_NEED_MODEL_DIR();
  temp_dir dir;
  const run_result r = rs({"convert", model_dir(), "-o", dir / "m.rsw", "--json"});
  ASSERT_EQ(r.code, 0) << r;
  const json report = json::parse(r.out);
  EXPECT_GE(report["golden"]["cosine_mean"], 0.997);
  EXPECT_EQ(report["parameters"], 22713216);
  EXPECT_EQ(r.err, "");
  const json info = json::parse(rs({"info", dir / "m.rsw", "--json"}).out);
  EXPECT_EQ(info["max_tokens"], 256);
  EXPECT_EQ(info["metadata"]["encode.normalize"], true);
}

TEST(CliModel, EmbedsTheGoldenTexts) {
  RS_NEED_MODEL("f32");
  RS_NEED_SHARED("golden/minilm_texts.jsonl");
  temp_dir dir;
  const run_result r = rs({"embed", "-m", model_path("f32"), "-f", shared_file("golden/minilm_texts.jsonl"), "--max-tokens", "512",
                           "--format", "npy", "-o", dir / "v.npy"});
  ASSERT_EQ(r.code, 0) << r;
  std::vector<int64_t> shape, expected_shape;
  const std::vector<float> got = read_npy_f32(dir / "v.npy", &shape);
  const std::vector<float> expected = read_npy_f32(shared_file("golden/minilm_embeddings_f32.npy"), &expected_shape);
  ASSERT_EQ(shape, expected_shape);
  const size_t dim = size_t(shape[1]);
  for (size_t i = 0; i < size_t(shape[0]); ++i) {
    const auto row = [&](const std::vector<float> &all) {
      return std::vector<float>(all.begin() + ptrdiff_t(i * dim), all.begin() + ptrdiff_t((i + 1) * dim));
    };
    EXPECT_GE(cosine_of(row(got), row(expected)), 0.99999) << "text " << i;
  }
}

TEST(CliModel, TokenizesTheGoldenTexts) {
  RS_NEED_MODEL("q8");
  RS_NEED_SHARED("golden/wordpiece.jsonl");
  const run_result r = rs({"tokenize", "-m", model_path("q8"), "-f", shared_file("golden/wordpiece.jsonl")});
  ASSERT_EQ(r.code, 0) << r.err;
  const std::vector<json> got = jsonl(r.out), expected = jsonl(read_file(shared_file("golden/wordpiece.jsonl")));
  ASSERT_EQ(got.size(), expected.size());
  for (size_t i = 0; i < got.size(); ++i) EXPECT_EQ(got[i]["ids"], expected[i]["ids"]) << expected[i]["text"];
}

TEST(CliModel, TokenizesTheGoldenPairs) {
  RS_NEED_MODEL("q8");
  RS_NEED_SHARED("golden/wordpiece_pairs.jsonl");
  const std::vector<json> expected = jsonl(read_file(shared_file("golden/wordpiece_pairs.jsonl")));
  std::string input;
  for (const json &pair : expected) input += json{{"text", pair["a"]}, {"pair", pair["b"]}}.dump() + "\n";
  const std::vector<json> got = jsonl(rs({"tokenize", "-m", model_path("q8")}, input).out);
  ASSERT_EQ(got.size(), expected.size());
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_EQ(got[i]["ids"], expected[i]["ids"]) << expected[i]["a"];
    EXPECT_EQ(got[i]["type_ids"], expected[i]["type_ids"]) << expected[i]["a"];
  }
}

}  // namespace
