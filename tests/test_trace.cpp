// rs trace: what it prints of a trace made by hand, and what the program finds in a tiny model.
#include <algorithm>
#include <cmath>

#include "../tools/colour.h"
#include "../tools/trace.h"
#include "tiny_model.h"

namespace {

// "Über the hill" and an emoji, with a schedule that drops after layers 0 and 2 of four.
traced_text example() {
  traced_text t;
  t.text = "Über  the \xF0\x9F\x9A\x80 hill";
  const auto token = [&](const char *name, uint32_t byte, uint32_t byte_end, uint32_t begin, uint32_t end, int32_t left_at) {
    traced_token made;
    made.id = int32_t(t.tokens.size());
    made.token = name;
    made.bytes = {byte, byte_end};
    made.characters = {begin, end};
    made.left_at = left_at;
    t.tokens.push_back(made);
  };
  token("[CLS]", 0, 0, 0, 0, -1);
  token("uber", 0, 5, 0, 4, 2);
  token("the", 7, 10, 6, 9, 0);
  token("[UNK]", 11, 15, 10, 11, -1);
  token("hill", 16, 20, 12, 16, -1);
  token("[SEP]", 0, 0, 0, 0, 0);
  t.layers.push_back({0, {0, 1, 2, 3, 4, 5}, {3, 2, 0.3f, 5, 4, 0.1f}, {1, 1, 0, 1, 1, 0}, {0, 1, 4, 3, 4, 0}});
  t.layers.push_back({2, {0, 1, 3, 4}, {3, 1, 5, 4}, {1, 0, 1, 1}, {0, 4, 3, 4}});
  t.kept = {0, 3, 4};
  return t;
}

trace_setting setting() {
  trace_setting s;
  s.model = "a & b";
  s.layers = 4;
  s.drops = {0, 2};
  s.schedule = "ratios=0.4,0,0.3 score=-mlp";
  s.json = {{"text", s.schedule}};
  return s;
}

// Of the same shape, with any text, whose tokens are its bytes' halves.
traced_text of_text(const std::string &text, size_t middle) {
  traced_text t = example();
  t.text = text;
  t.tokens[1].bytes = {0, uint32_t(middle)};
  t.tokens[2].bytes = {uint32_t(middle), uint32_t(text.size())};
  t.tokens[3].bytes = t.tokens[4].bytes = {uint32_t(text.size()), uint32_t(text.size())};
  return t;
}

size_t count_of(const std::string &text, const std::string &part) {
  size_t n = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

std::string joined(const std::vector<text_piece> &pieces) {
  std::string text;
  for (const text_piece &piece : pieces) text += piece.text;
  return text;
}

// ------------------------------------------------------------------------------------------------ the data

TEST(Trace, PiecesInARowAreTheText) {
  const traced_text t = example();
  const std::vector<text_piece> pieces = text_pieces(t, 0);
  EXPECT_EQ(joined(pieces), t.text);
  ASSERT_EQ(pieces.size(), 7u);
  EXPECT_EQ(pieces[1].text, "  ");
  EXPECT_EQ(pieces[1].position, -1);
  EXPECT_EQ(pieces[2].position, 2);
}

TEST(Trace, TokensOfOneCharacterShareItsPiece) {
  traced_text t = example();
  t.tokens[2].bytes = {0, 5};  // the same bytes as the token before
  const std::vector<text_piece> pieces = text_pieces(t, 0);
  EXPECT_EQ(joined(pieces), t.text);
  EXPECT_TRUE(std::none_of(pieces.begin(), pieces.end(), [](const text_piece &p) { return p.position == 2; }));
}

TEST(Trace, TextBehindTheLimitIsMarked) {
  traced_text t = example();
  EXPECT_FALSE(text_pieces(t, 0).back().cut);
  t.text += "  \n";
  EXPECT_FALSE(text_pieces(t, 0).back().cut);
  t.text += "and more";
  EXPECT_TRUE(text_pieces(t, 0).back().cut);
  EXPECT_EQ(joined(text_pieces(t, 0)), t.text);
}

TEST(Trace, PairsHaveTheirOwnPieces) {
  traced_text t = example();
  t.pair = "hill top";
  t.has_pair = true;
  t.tokens[4].segment = 1;
  t.tokens[4].bytes = {0, 4};
  EXPECT_EQ(joined(text_pieces(t, 0)), t.text);
  EXPECT_EQ(joined(text_pieces(t, 1)), t.pair);
  EXPECT_EQ(text_pieces(t, 1).front().position, 4);
}

TEST(Trace, CountsAndSaving) {
  const traced_text t = example();
  EXPECT_EQ(t.counts(4), (std::vector<size_t>{6, 4, 4, 3}));
  EXPECT_DOUBLE_EQ(t.saved(4), 1 - 17.0 / 24);
}

// ------------------------------------------------------------------------------------------------ JSON

TEST(Trace, JsonSaysWhatLeftWhereAndWithWhatScore) {
  traced_text t = example();
  t.id = R"({"b": 1.50, "a": 123456789012345678901})";
  const std::string line = trace_json(t, setting());
  EXPECT_EQ(count_of(line, "\n"), 1u);
  EXPECT_NE(line.find("0.3"), std::string::npos);
  EXPECT_EQ(line.find("0.300000"), std::string::npos) << "a float's digits, not a double's";
  const json root = json::parse(line);
  EXPECT_EQ(line.find("{\"id\":" + t.id + ",\"text\":"), 0u) << "as it was given";
  EXPECT_EQ(root["text"], t.text);
  EXPECT_EQ(root["kept"], json({0, 3, 4}));
  ASSERT_EQ(root["tokens"].size(), 6u);
  EXPECT_EQ(root["tokens"][3]["begin"], 10);
  EXPECT_EQ(root["tokens"][3]["bytes"], json({11, 15}));
  EXPECT_EQ(root["tokens"][2]["left_at"], 0);
  EXPECT_TRUE(root["tokens"][3]["left_at"].is_null());
  const json &layer = root["layers"][0];
  EXPECT_EQ(layer["n"], 6);
  EXPECT_EQ(layer["kept"], json({0, 1, 3, 4}));
  EXPECT_EQ(layer["dropped"][0], (json{{"position", 2}, {"token", "the"}, {"score", 0.3}, {"into", 4}}));
  EXPECT_EQ(root["layers"][1]["scores"].size(), 4u);
  EXPECT_EQ(root["schedule"]["text"], "ratios=0.4,0,0.3 score=-mlp");
}

TEST(Trace, JsonLeavesTheExtraTokenOfFoldOutOfThePositions) {
  traced_text t = example();
  t.layers[1].positions.push_back(-1);
  t.layers[1].scores.push_back(9);
  t.layers[1].kept.push_back(1);
  for (traced_layer &layer : t.layers) layer.into.clear();
  const json root = json::parse(trace_json(t, setting()));
  EXPECT_EQ(root["layers"][1]["n"], 5);
  EXPECT_EQ(root["layers"][1]["kept"], json({0, 3, 4}));
  EXPECT_FALSE(root["layers"][0]["dropped"][0].contains("into"));
  EXPECT_NE(trace_html({t}, setting()).find("\"p\":[0,1,3,4,-1]"), std::string::npos);
}

// ------------------------------------------------------------------------------------------------ terminal

TEST(Trace, TerminalIsReadableWithoutColours) {
  const std::string out = trace_terminal(example(), setting(), colours::none);
  EXPECT_EQ(out.substr(0, out.find('\n')), "[CLS] Über₂  the₀ \xF0\x9F\x9A\x80 hill [SEP]₀");
  EXPECT_EQ(out.find('\033'), std::string::npos);
  EXPECT_NE(out.find("layer 0: 6 → 4 tokens"), std::string::npos) << out;
  EXPECT_NE(out.find("layer 2: 4 → 3 tokens"), std::string::npos) << out;
  EXPECT_NE(out.find("3 of 6 tokens left at the end, 29 % of the token-layers saved"), std::string::npos) << out;
}

TEST(Trace, TerminalColoursSayTheLayer) {
  const std::string full = trace_terminal(example(), setting(), colours::full),
                    cube = trace_terminal(example(), setting(), colours::cube);
  const rgb first = ramp(0, 0.65), last = ramp(1, 0.65);
  EXPECT_NE(full.find(format("\033[38;2;%d;%d;%dmthe\033[0m", first.r, first.g, first.b)), std::string::npos) << full;
  EXPECT_NE(full.find(format("\033[38;2;%d;%d;%dmÜber\033[0m", last.r, last.g, last.b)), std::string::npos) << full;
  EXPECT_NE(full.find("\033[1mhill\033[0m"), std::string::npos) << full;
  EXPECT_NE(cube.find(format("\033[38;5;%dmthe\033[0m", terminal_colour(first))), std::string::npos) << cube;
}

TEST(Trace, TextCannotCommandTheTerminal) {
  const std::string out = trace_terminal(of_text("a\033[31mb\r\x07 \x7f", 3), setting(), colours::none);
  for (char c : {'\033', '\r', '\x07', '\x7f'}) EXPECT_EQ(out.find(c), std::string::npos) << int(c);
  EXPECT_NE(out.find("␛"), std::string::npos);
  EXPECT_NE(out.find("␡"), std::string::npos);
}

// ------------------------------------------------------------------------------------------------ HTML

// What the script reads.
json payload_of(const std::string &page) {
  const std::string open = "<script type=\"application/json\" id=\"data\">";
  const size_t begin = page.find(open);
  EXPECT_NE(begin, std::string::npos);
  const size_t end = page.find("</script>", begin);
  return json::parse(page.substr(begin + open.size(), end - begin - open.size()));
}

TEST(Trace, PageIsSafeWhateverTheTextSays) {
  const std::string evil =
      "</script><script>alert('x')</script><!-- <img src=x onerror=\"y\"> &amp; \033[31m \xD7\xA9\xD7\x9C\xD7\x95\xD7\x9D 漢字 😀";
  traced_text t = of_text(evil, 17);
  t.id = R"("<b>id</b>")";
  t.tokens[1].token = "</script>";
  const std::string page = trace_html({t, example()}, setting());
  EXPECT_EQ(count_of(page, "</script>"), 2u);
  EXPECT_EQ(count_of(page, "<script"), 2u);
  EXPECT_EQ(count_of(page, "<!--"), 0u);
  EXPECT_EQ(count_of(page, "<img"), 0u);
  EXPECT_EQ(count_of(page, "<b>id"), 0u);
  EXPECT_EQ(count_of(page, "\033"), 0u);
  EXPECT_NE(page.find("&lt;/script&gt;&lt;script&gt;"), std::string::npos);
  EXPECT_NE(page.find("<p class=\"text\" dir=\"auto\">"), std::string::npos);
  EXPECT_NE(page.find("漢字 😀"), std::string::npos);
  EXPECT_NE(page.find("a &amp; b"), std::string::npos);
  const json data = payload_of(page);
  EXPECT_EQ(data["texts"][0]["tokens"][1][0], "</script>");
}

TEST(Trace, PageNeedsNothingElse) {
  const std::string page = trace_html({example()}, setting());
  for (const char *part : {"http:", "https:", "src=", "href=", "url(", "@import", "<link"})
    EXPECT_EQ(count_of(page, part), 0u) << part;
  EXPECT_NE(page.find("default-src 'none'"), std::string::npos);
  for (const char *part : {"prefers-color-scheme:dark", "type=\"range\"", "<canvas"}) EXPECT_NE(page.find(part), std::string::npos);
}

TEST(Trace, PageHasEveryTokenWithItsLayer) {
  const std::string page = trace_html({example()}, setting());
  EXPECT_NE(page.find("<span class=\"t d1\" data-i=\"1\">Über</span>  <span class=\"t d0\" data-i=\"2\">the</span> "),
            std::string::npos);
  EXPECT_NE(page.find("<bdi dir=\"ltr\" class=\"t sp\" data-i=\"0\">[CLS]</bdi>"), std::string::npos);
  EXPECT_NE(page.find("<bdi dir=\"ltr\" class=\"t sp d0\" data-i=\"5\">[SEP]</bdi></p>"), std::string::npos);
  EXPECT_EQ(count_of(page, " data-i=\""), 6u);
  const json text = payload_of(page)["texts"][0];
  EXPECT_EQ(text["layers"][0]["k"], "110110");
  EXPECT_EQ(text["layers"][0]["s"][2], 0.3);
  EXPECT_EQ(text["tokens"][2], json({"the", 6, 9, 0}));
  EXPECT_EQ(text["tokens"][4], json({"hill", 12, 16, -1}));
}

TEST(Trace, ColoursAreEquallyLightAndOnScreen) {
  const auto luminance = [](const rgb &c) {
    const auto linear = [](double v) { return v / 255 <= 0.04045 ? v / 255 / 12.92 : std::pow((v / 255 + 0.055) / 1.055, 2.4); };
    return 0.2126 * linear(c.r) + 0.7152 * linear(c.g) + 0.0722 * linear(c.b);
  };
  double low = 1, high = 0;
  for (int i = 0; i <= 10; ++i) {
    low = std::min(low, luminance(ramp(i / 10.0, 0.65)));
    high = std::max(high, luminance(ramp(i / 10.0, 0.65)));
  }
  EXPECT_GT(low, 0.18);
  EXPECT_LT(high, 0.36);
  EXPECT_NE(ramp(0, 0.65).hex(), ramp(1, 0.65).hex());
  EXPECT_EQ(ramp(-5, 0.65).hex(), ramp(0, 0.65).hex());
  EXPECT_EQ(terminal_colour({255, 0, 0}), 196);
}

// ------------------------------------------------------------------------------------------------ the program

class TraceProgram : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new temp_dir;
    tiny_options options;
    options.layers = 4;
    tiny_model(options).write(*folder_ / "tiny");
    const run_result r = run({program(), "convert", *folder_ / "tiny", "-o", weights(), "--type", "f32"});
    ASSERT_EQ(r.code, 0) << r;
  }
  static void TearDownTestSuite() {
    delete folder_;
    folder_ = nullptr;
  }
  static std::string weights() { return *folder_ / "tiny.rsw"; }

  static run_result trace(std::vector<std::string> arguments, const std::vector<std::string> &env = {}) {
    arguments.insert(arguments.begin(), {program(), "trace", "-m", weights()});
    run_options options;
    options.env = env;
    return run(arguments, options);
  }
  static json object(const std::vector<std::string> &arguments) {
    std::vector<std::string> all = arguments;
    all.insert(all.end(), {"--format", "json", "--", text});
    const run_result r = trace(all);
    EXPECT_EQ(r.code, 0) << r;
    return json::parse(r.out, nullptr, false);
  }

  static constexpr const char *text = "Hello world: find text, read line. A cat, \xC3\xA9 kitten \xE6\xBC\xA2 stock";
  temp_dir dir_;

 private:
  static temp_dir *folder_;
};
temp_dir *TraceProgram::folder_ = nullptr;

// The n-th character on, as UTF-8.
std::string characters(const std::string &text, size_t begin, size_t end) {
  std::string part;
  size_t at = 0;
  for (char c : text) {
    at += (static_cast<unsigned char>(c) & 0xc0) != 0x80;
    if (at > begin && at <= end) part += c;
  }
  return part;
}

TEST_F(TraceProgram, EveryModeTellsOneStory) {
  for (const char *mode : {"prune", "restore", "merge", "fold"}) {
    for (const char *score : {"mlp", "-mlp", "norm", "attn-colsum", "random"}) {
      SCOPED_TRACE(std::string(mode) + " " + score);
      const json root = object({"--drop", "0.3,0,0.4", std::string("--drop-score=") + score, "--drop-mode", mode});
      const size_t n = root["tokens"].size();
      ASSERT_EQ(root["layers"].size(), 2u);
      std::vector<int> left(n, -1), before;
      for (size_t i = 0; i < n; ++i) before.push_back(int(i));
      for (const json &layer : root["layers"]) {
        std::vector<int> positions = layer["positions"], kept = layer["kept"];
        const std::vector<double> scores = layer["scores"];
        const bool extra = !positions.empty() && positions.back() == -1;
        EXPECT_EQ(extra, std::string(mode) == "fold" && layer["layer"] == 2);
        if (extra) positions.pop_back();
        EXPECT_EQ(positions, before);
        EXPECT_EQ(layer["n"], scores.size());
        EXPECT_EQ(kept.size() + layer["dropped"].size(), positions.size());
        EXPECT_EQ(kept[0], 0) << "the class token stays";
        double worst = INFINITY;
        for (size_t i = 1; i < positions.size(); ++i)
          if (std::count(kept.begin(), kept.end(), positions[i])) worst = std::min(worst, scores[i]);
        for (const json &dropped : layer["dropped"]) {
          EXPECT_LE(dropped["score"], worst);
          EXPECT_EQ(dropped["token"], root["tokens"][size_t(dropped["position"])]["token"]);
          EXPECT_EQ(dropped.contains("into"), std::string(mode) == "merge");
          if (dropped.contains("into")) {
            EXPECT_TRUE(std::count(kept.begin(), kept.end(), int(dropped["into"])));
          }
          left[size_t(dropped["position"])] = layer["layer"];
        }
        before = kept;
      }
      EXPECT_EQ(root["layers"][0]["dropped"].size(), size_t(double(n) * 0.3));
      EXPECT_EQ(root["kept"].get<std::vector<int>>(), before);
      for (size_t i = 0; i < n; ++i) EXPECT_EQ(root["tokens"][i]["left_at"], left[i] < 0 ? json() : json(left[i]));
    }
  }
}

TEST_F(TraceProgram, TokensAreWhereTheTextHasThem) {
  const json root = object({"--keep", "0,6"});
  EXPECT_EQ(root["kept"].size(), 6u);
  EXPECT_EQ(root["text"], text);
  size_t found = 0;
  for (const json &token : root["tokens"]) {
    const std::string part = characters(text, token["begin"], token["end"]);
    const size_t begin = token["bytes"][0], end = token["bytes"][1];
    EXPECT_EQ(part, std::string(text).substr(begin, end - begin));
    found += part == token["token"];
  }
  EXPECT_GT(found, 8u);
  EXPECT_EQ(root["schedule"]["keeps"], json({0, 6}));
}

TEST_F(TraceProgram, PromptAndPairAndIdAreThere) {
  const std::string file = dir_ / "in.jsonl";
  write_file(file, R"({"id": [1, "x"], "text": "hello", "pair": "world cat"})"
                   "\n\n"
                   R"({"text": "cat"})"
                   "\n");
  const run_result r = trace({"--drop", "0.4", "--format", "json", "-f", file});
  ASSERT_EQ(r.code, 0) << r;
  const json pair = json::parse(r.out.substr(0, r.out.find('\n')));
  EXPECT_EQ(pair["id"], json({1, "x"}));
  EXPECT_EQ(pair["pair"], "world cat");
  EXPECT_EQ(pair["tokens"][3]["token"], "world");
  EXPECT_EQ(pair["tokens"][3]["segment"], 1);
  EXPECT_EQ(pair["tokens"][3]["begin"], 0);
  const run_result prompted = trace({"--drop", "0.4", "--format", "json", "--prompt", "query", "cat"});
  const json root = json::parse(prompted.out);
  EXPECT_EQ(root["text"], "find: cat");
  EXPECT_EQ(root["tokens"][3]["begin"], 6);
}

TEST_F(TraceProgram, WhatWasCutIsSaid) {
  const std::vector<std::string> schedule = {"--drop", "0.4", "--drop-score=-mlp", "--format", "json"};
  const auto with = [&](std::vector<std::string> more) {
    more.insert(more.begin(), schedule.begin(), schedule.end());
    return trace(more);
  };
  const run_result whole = with({"cat cat cat cat"});
  EXPECT_EQ(whole.err, "");
  EXPECT_EQ(json::parse(whole.out)["truncated"], false);
  const run_result cut = with({"--max-tokens", "5", "--prompt", "query", "cat cat cat cat"});
  EXPECT_EQ(cut.code, 0);
  EXPECT_EQ(cut.err, "rs: 1 of 1 text was cut to 5 tokens (longest: 8); --max-tokens 8 keeps more\n");
  EXPECT_EQ(json::parse(cut.out)["truncated"], true);
  write_file(dir_ / "pair", R"({"text": "cat cat", "pair": "cat cat cat"})");
  const run_result pair = with({"--max-tokens", "7", "-f", dir_ / "pair"});
  EXPECT_EQ(pair.err, "rs: 1 of 1 text was cut to 7 tokens (longest: 8); --max-tokens 8 keeps more\n");
  EXPECT_EQ(json::parse(pair.out)["truncated"], true);
}

TEST_F(TraceProgram, EndingsSayTheFormat) {
  ASSERT_EQ(trace({"--drop", "0.3", "-o", dir_ / "P.HTML", "cat"}).code, 0);
  EXPECT_EQ(count_of(read_file(dir_ / "P.HTML"), "<article>"), 1u);
  EXPECT_NE(trace({"--drop", "0.3", "-o", dir_ / "X.PNG", "cat"}).err.find("png shows images"), std::string::npos);
  EXPECT_EQ(trace({"--drop", "0.3", "-o", dir_ / "t.x", "cat"}).code, 0);
  EXPECT_NE(read_file(dir_ / "t.x").find("token-layers saved"), std::string::npos);
  for (const char *name : {"a.jpg", "a.JPEG", "a.svg", "a.gif", "a.webp"}) {
    const run_result r = trace({"--drop", "0.3", "-o", dir_ / name, "cat"});
    EXPECT_EQ(r.code, 2) << r;
    EXPECT_NE(r.err.find("pictures are written as .png only"), std::string::npos) << r;
    EXPECT_FALSE(file_exists(dir_ / name));
  }
}

TEST_F(TraceProgram, ColoursOnlyWhereTheyAreWanted) {
  const std::vector<std::string> schedule = {"--drop", "0.3"};
  const auto coloured = [&](std::vector<std::string> more, const std::vector<std::string> &env) {
    more.insert(more.begin(), schedule.begin(), schedule.end());
    more.insert(more.end(), {"--", text});
    const run_result r = trace(more, env);
    EXPECT_EQ(r.code, 0) << r;
    return r.out.find('\033') != std::string::npos;
  };
  EXPECT_FALSE(coloured({}, {}));  // a pipe
  EXPECT_FALSE(coloured({"--color", "never"}, {}));
  EXPECT_TRUE(coloured({"--color", "always"}, {}));
  EXPECT_TRUE(coloured({"--color", "always"}, {"NO_COLOR=1"}));
  const run_result cube = trace({"--drop", "0.3", "--color", "always", "cat cat cat cat"}, {"COLORTERM="});
  EXPECT_NE(cube.out.find("\033[38;5;"), std::string::npos) << cube;
  const run_result full = trace({"--drop", "0.3", "--color", "always", "cat cat cat cat"}, {"COLORTERM=truecolor"});
  EXPECT_NE(full.out.find("\033[38;2;"), std::string::npos) << full;
}

TEST_F(TraceProgram, PageIsWrittenWholeOrNotAtAll) {
  const std::string page = dir_ / "page.html";
  ASSERT_EQ(trace({"--drop", "0.3", "-o", page, "--", text, "second"}).code, 0);
  EXPECT_EQ(count_of(read_file(page), "<article>"), 2u);
  EXPECT_EQ(payload_of(read_file(page))["texts"].size(), 2u);
  write_file(dir_ / "many", std::string(2 * 501, '\n'));
  const run_result r = trace({"--drop", "0.3", "--drop-score=-mlp", "-o", page, "-f", dir_ / "many"});
  EXPECT_EQ(r.code, 1);
  EXPECT_EQ(r.err, "rs: more than 500 texts on a page; --format json has no limit\n");
  EXPECT_EQ(count_of(read_file(page), "<article>"), 2u) << "the old page is still there";
}

TEST_F(TraceProgram, WhatIsWrongIsSaidInOneLine) {
  const std::pair<std::vector<std::string>, const char *> cases[] = {{{"x"}, "no schedule: give --drop, --keep or --drop-profile"},
                                                                     {{"--drop", "0,0", "x"}, "the schedule drops nothing"},
                                                                     {{"--drop", "1.5", "x"}, "1.5"},
                                                                     {{"--drop", "0.1,0.1,0.1,0.1,0.1", "x"}, "5"},
                                                                     {{"--drop", "0.3", "--drop-score", "magic", "x"}, "magic"},
                                                                     {{"--drop", "0.3", "--color", "pink", "x"}, "pink"},
                                                                     {{"--drop", "0.3", "--format", "xml", "x"}, "xml"},
                                                                     {{"--drop-profile", "fast", "x"}, "fast"}};
  for (const auto &[arguments, part] : cases) {
    const run_result r = trace(arguments);
    EXPECT_EQ(r.code, 2) << r;
    EXPECT_EQ(r.out, "");
    EXPECT_EQ(count_of(r.err, "\n"), 1u) << r;
    EXPECT_NE(r.err.find(part), std::string::npos) << r;
  }
  const std::string model = read_file(weights());
  const run_result over = trace({"--drop", "0.3", "--drop-score=-mlp", "-o", weights(), "x"});
  EXPECT_EQ(over.code, 1);
  EXPECT_NE(over.err.find("is the weight file itself"), std::string::npos) << over;
  EXPECT_TRUE(read_file(weights()) == model);
  const run_result bad = trace({"--drop", "0.3", "--drop-score=-mlp", "--format", "json", "good", "bad \xff", "good"});
  EXPECT_EQ(bad.code, 1);
  EXPECT_EQ(count_of(bad.out, "\n"), 2u) << bad;
  EXPECT_NE(bad.err.find("text 2: "), std::string::npos) << bad;
}

}  // namespace
