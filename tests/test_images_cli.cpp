// Images on the command line: rs embed, rs classify, rs trace and rs info, run as a user runs them, on tiny models and images that
// are made here; and the threads that prepare images.
#include <algorithm>
#include <cmath>
#include <functional>
#include <set>

#include <sys/resource.h>
#include <sys/stat.h>

#include "../models/image.h"
#include "../tools/images.h"
#include "cli_util.h"
#include "tiny_vit.h"

namespace {

class CliImages : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    shared_ = new temp_dir;
    tiny_vit vit, head, clip, biased;
    vit.profile = clip.profile = "ratios=0.25,0.5 score=norm";
    ASSERT_EQ(vit.convert(model("vit")), RS_OK) << rs_last_error();
    head.labels = {"cat", "dog", "boat"};
    ASSERT_EQ(head.convert(model("head")), RS_OK) << rs_last_error();
    clip.clip = biased.clip = true;
    ASSERT_EQ(clip.convert(model("clip")), RS_OK) << rs_last_error();
    biased.logit_bias = -1.5f;
    ASSERT_EQ(biased.convert(model("biased")), RS_OK) << rs_last_error();
    ASSERT_EQ(tiny_bert().convert(model("bert"), "f32"), RS_OK) << rs_last_error();
    std::filesystem::create_directories(*shared_ / "album/sub/deep");
    std::filesystem::create_directories(*shared_ / "album/none");
    const std::pair<const char *, unsigned> photos[] = {
        {"album/a.ppm", 1}, {"album/b b.ppm", 2}, {"album/sub/c.PPM", 3}, {"album/sub/deep/d.ppm", 4}, {"album/.hidden.ppm", 5}};
    for (const auto &[name, seed] : photos) write_file(*shared_ / name, pnm_image(40 + 3 * int(seed), 30, seed));
    write_file(*shared_ / "album/z.bmp", bmp_of(pnm_image(43, 30, 1), 43, 30));  // the pixels of a.ppm
    write_file(*shared_ / "album/notes.txt", "not an image");
  }
  static void TearDownTestSuite() {
    delete shared_;
    shared_ = nullptr;
  }

  static std::string model(const std::string &name) { return *shared_ / (name + ".rsw"); }
  static std::string album(const std::string &name = "") { return *shared_ / ("album" + (name.empty() ? "" : "/" + name)); }

  static run_result on(const std::string &name, const std::string &command, const strings &arguments,
                       const std::string &input = "") {
    strings all = {command, "-m", model(name)};
    all.insert(all.end(), arguments.begin(), arguments.end());
    return rs(all, input);
  }
  // What it prints, where all goes well.
  static std::vector<json> lines(const run_result &r) {
    EXPECT_EQ(r.code, 0) << r;
    EXPECT_EQ(r.err, "") << r;
    return jsonl(r.out);
  }
  static strings paths_of(const run_result &r) {
    strings paths;
    for (const json &line : lines(r)) paths.push_back(line.at("image"));
    return paths;
  }

  // What the library says of an image.
  struct answer {
    std::vector<float> values;
    rs_image_info info;
  };
  static answer encode(const std::string &name, const std::string &path, const rs_encode_params &params, int64_t dim) {
    const loaded l(model(name));
    const std::string bytes = read_file(path);
    const rs_image image = {RS_IMAGE_FILE, bytes.data(), bytes.size(), 0, 0};
    answer a;
    a.values.resize(static_cast<size_t>(4096 * dim));
    EXPECT_EQ(rs_encode_images(l.session, &image, 1, &params, a.values.data(), a.values.size(), &a.info), RS_OK) << rs_last_error();
    a.values.resize(static_cast<size_t>((params.pooling == RS_POOL_NONE ? a.info.kept : 1) * dim));
    return a;
  }
  static rs_encode_params params(rs_pooling pooling = RS_POOL_DEFAULT) {
    rs_encode_params p = {};
    p.size = sizeof p;
    p.pooling = pooling;
    return p;
  }

  temp_dir dir_;

 private:
  static temp_dir *shared_;
};
temp_dir *CliImages::shared_ = nullptr;

// ------------------------------------------------------------------------------------------------ rs embed

TEST_F(CliImages, VectorsAreThoseOfTheLibrary) {
  const std::vector<json> got = lines(on("vit", "embed", {album("a.ppm"), album("z.bmp"), album("b b.ppm")}));
  ASSERT_EQ(got.size(), 3u);
  EXPECT_EQ(floats(got[0].at("embedding")), encode("vit", album("a.ppm"), params(), 32).values);
  EXPECT_EQ(got[0].at("embedding"), got[1].at("embedding"));
  EXPECT_NE(got[0].at("embedding"), got[2].at("embedding"));
  EXPECT_EQ(got[0].at("image"), album("a.ppm"));
  EXPECT_EQ(got[0].at("tokens"), 37);
  EXPECT_EQ(got[0].at("truncated"), false);
  EXPECT_FALSE(got[0].contains("id"));
}

TEST_F(CliImages, FoldersAndPatterns) {
  const strings all = {album("a.ppm"), album("b b.ppm"), album("sub/c.PPM"), album("sub/deep/d.ppm"), album("z.bmp")};
  EXPECT_EQ(paths_of(on("vit", "embed", {album()})), all);
  EXPECT_EQ(paths_of(on("vit", "embed", {album("z.bmp"), album("sub")})), (strings{all[4], all[2], all[3]}));
  EXPECT_EQ(paths_of(on("vit", "embed", {album("?.*p*")})), (strings{all[0], all[4]}));
  EXPECT_EQ(paths_of(on("vit", "embed", {album("[b-z]*.ppm")})), strings{all[1]});
  EXPECT_EQ(paths_of(on("vit", "embed", {album("s*")})), (strings{all[2], all[3]}));  // a folder
  EXPECT_EQ(paths_of(on("vit", "embed", {album("**/*.ppm")})), (strings{all[0], all[1], all[3]}));
  EXPECT_EQ(paths_of(on("vit", "embed", {album("**/deep/*")})), strings{all[3]});
  EXPECT_EQ(paths_of(on("vit", "embed", {album("**")})), all);
  EXPECT_EQ(paths_of(on("vit", "embed", {album("sub/**/c.*")})), strings{all[2]});
  run_options there;
  there.dir = album("sub");
  EXPECT_EQ(paths_of(run({program(), "embed", "-m", model("vit"), "**/d.ppm", "."}, there)),
            (strings{"./deep/d.ppm", "./c.PPM", "./deep/d.ppm"}));
  for (const char *nothing : {"*.png", "**/*.png", "none"}) {
    const run_result r = on("vit", "embed", {album(nothing), album("a.ppm")});
    EXPECT_EQ(r.code, 1) << r;
    EXPECT_EQ(jsonl(r.out).size(), 1u) << r;
    ASSERT_EQ(lines_of(r.err).size(), 2u) << r;
    EXPECT_EQ(lines_of(r.err)[0],
              "rs: " + album(nothing) + (nothing[0] == '*' ? ": no file matches" : ": no image in this folder"));
  }
  // What is there is taken by its name, whatever that looks like.
  write_file(dir_ / "[x]*.ppm", pnm_image(8, 8, 1));
  EXPECT_EQ(paths_of(on("vit", "embed", {dir_ / "[x]*.ppm"})), strings{dir_ / "[x]*.ppm"});
  // A circle of links has an end.
  std::filesystem::create_directories(dir_ / "circle");
  std::filesystem::create_directory_symlink(dir_ / "circle", dir_ / "circle/again");
  write_file(dir_ / "circle/x.ppm", pnm_image(8, 8, 1));
  EXPECT_EQ(paths_of(on("vit", "embed", {dir_ / "circle"})), strings{dir_ / "circle/x.ppm"});
  // Links to folders elsewhere are followed, however one comes to them.
  std::filesystem::create_directories(dir_ / "links");
  std::filesystem::create_directory_symlink(dir_ / "circle", dir_ / "links/to");
  for (const char *way : {"links", "links/to", "links/*", "links/to/*.ppm", "links/**/*.ppm", "**/to/*.ppm"})
    EXPECT_EQ(paths_of(on("vit", "embed", {dir_ / way})), strings{dir_ / "links/to/x.ppm"}) << way;
}

TEST_F(CliImages, WhatCannotBeReadInAFolderIsNamed) {
  std::filesystem::create_directory(dir_ / "in");
  write_file(dir_ / "in/a.ppm", pnm_image(8, 8, 1));
  std::filesystem::create_symlink("nowhere", dir_ / "in/b.ppm");
  ASSERT_EQ(mkfifo((dir_ / "in/c.ppm").c_str(), 0600), 0);
  std::filesystem::create_symlink("nowhere", dir_ / "in/notes.txt");
  ASSERT_EQ(mkfifo((dir_ / "in/pipe").c_str(), 0600), 0);
  for (const char *way : {"in", "in/*.ppm", "**/*.ppm"}) {
    const run_result r = on("vit", "embed", {dir_ / way});
    EXPECT_EQ(r.code, 1) << r;
    EXPECT_EQ(jsonl(r.out).size(), 1u) << r;
    EXPECT_EQ(lines_of(r.err), (strings{"rs: " + (dir_ / "in/b.ppm") + ": cannot open: No such file or directory",
                                        "rs: " + (dir_ / "in/c.ppm") + ": not a regular file", "rs: 2 of 3 images failed"}))
        << r;
  }
  for (const run_result &r : {on("vit", "embed", {""}), on("vit", "embed", {}, "{\"image\": \"\"}\n")})
    EXPECT_NE(r.err.find(": an empty path\n"), std::string::npos) << r;
}

TEST_F(CliImages, NamesThatAreNotUtf8) {
  const std::string name = dir_ / "\xff.ppm";
  write_file(name, pnm_image(8, 8, 1));
  for (const char *command : {"embed", "classify", "trace"}) {
    strings arguments = {name, name};
    if (!strcmp(command, "trace"))
      arguments.insert(arguments.end(), {"--drop", "0.5", "--drop-score", "random", "--format", "json"});
    const run_result r = on("head", command, arguments);
    EXPECT_EQ(r.code, 0) << r;
    EXPECT_EQ(jsonl(r.out).at(1).at("image"), dir_ / "\xef\xbf\xbd.ppm");
    EXPECT_EQ(r.err, "rs: '" + name + "': this name is not UTF-8; in JSON, U+FFFD stands for what is not\n") << "once";
  }
}

TEST_F(CliImages, ListsAndLines) {
  const strings wanted = {album("z.bmp"), album("a.ppm")};
  const std::string list = wanted[0] + "\n\n" + wanted[1] + "\r\n";
  write_file(dir_ / "list.txt", list);
  EXPECT_EQ(paths_of(on("vit", "embed", {"-f", dir_ / "list.txt"})), wanted);
  EXPECT_EQ(paths_of(on("vit", "embed", {}, list)), wanted);
  EXPECT_EQ(paths_of(on("vit", "embed", {"-"}, list)), wanted);
  run_options there;
  there.dir = album();
  there.input = "sub/c.PPM\n";
  EXPECT_EQ(paths_of(run({program(), "embed", "-m", model("vit")}, there)), strings{"sub/c.PPM"});
  const json first = {{"id", {{"a", 1}}}, {"image", wanted[0]}, {"text", "a caption"}}, second = {{"image", wanted[1]}};
  const std::vector<json> got = lines(on("vit", "embed", {}, first.dump() + "\n" + second.dump() + "\n"));
  ASSERT_EQ(got.size(), 2u);
  EXPECT_EQ(got[0].at("id"), first.at("id"));
  EXPECT_EQ(got[0].at("image"), wanted[0]);
  EXPECT_EQ(got[0].at("embedding"), got[1].at("embedding"));
}

TEST_F(CliImages, KindsOfVectors) {
  const json cls = lines(on("vit", "embed", {album("a.ppm"), "-o", "cls"})).at(0),
             mean = lines(on("vit", "embed", {album("a.ppm"), "--output", "mean"})).at(0),
             patches = lines(on("vit", "embed", {album("a.ppm"), "--output=patches"})).at(0);
  EXPECT_EQ(floats(cls.at("embedding")), encode("vit", album("a.ppm"), params(RS_POOL_CLS), 32).values);
  EXPECT_EQ(floats(mean.at("embedding")), encode("vit", album("a.ppm"), params(RS_POOL_MEAN), 32).values);
  const answer all = encode("vit", album("a.ppm"), params(RS_POOL_NONE), 32);
  ASSERT_EQ(patches.at("embedding").size(), 36u);
  EXPECT_EQ(patches.at("grid"), (json{6, 6}));
  EXPECT_FALSE(cls.contains("grid"));
  for (size_t i = 0; i < 36; ++i)
    EXPECT_EQ(floats(patches.at("embedding")[i]),
              std::vector<float>(all.values.begin() + ptrdiff_t(32 * (i + 1)), all.values.begin() + ptrdiff_t(32 * (i + 2))));
  // A kind and a file.
  const run_result r =
      on("vit", "embed", {album("a.ppm"), album("z.bmp"), "-o", dir_ / "v.npy", "-o", "patches", "--format", "npy"});
  EXPECT_EQ(r.code, 0) << r;
  std::vector<int64_t> shape;
  const std::vector<float> values = read_npy_f32(dir_ / "v.npy", &shape);
  EXPECT_EQ(shape, (std::vector<int64_t>{72, 32}));
  EXPECT_TRUE(std::equal(values.begin(), values.begin() + 36 * 32, all.values.begin() + 32));
  // A file of such a name; and in a model of texts it is nothing else.
  run_options there;
  there.dir = dir_.path();
  EXPECT_EQ(run({program(), "embed", "-m", model("vit"), album("a.ppm"), "-o", "./cls"}, there).out, "");
  EXPECT_EQ(json::parse(read_file(dir_ / "cls")).at("image"), album("a.ppm"));
  EXPECT_EQ(run({program(), "embed", "-m", model("bert"), "the cat", "-o", "mean"}, there).out, "");
  EXPECT_TRUE(json::parse(read_file(dir_ / "mean")).contains("embedding"));
  expect_failure(on("vit", "embed", {album("a.ppm"), "-o", "cls", "-o", "mean"}), 2, "--output is given twice: 'cls' and 'mean'");
  expect_failure(on("vit", "embed", {album("a.ppm"), "-o", "x", "-o", "y"}), 2, "--output is given twice");
  expect_failure(on("bert", "embed", {"a", "-o", "x", "-o", "y"}), 2, "--output is given twice");
  expect_failure(on("vit", "embed", {album("a.ppm"), "-o", "cls", "--pooling", "mean"}), 2, "two ways to say the same");
}

TEST_F(CliImages, PatchesUnderDropping) {
  const auto patches = [&](const strings &more) {
    strings all = {album("a.ppm"), "--output", "patches", "--drop", "0.25,0.5", "--drop-score=norm"};
    all.insert(all.end(), more.begin(), more.end());
    return on("vit", "embed", all);
  };
  const json restored = lines(patches({"--drop-mode", "restore"})).at(0);
  EXPECT_EQ(restored.at("embedding").size(), 36u);
  EXPECT_EQ(restored.at("grid"), (json{6, 6}));
  // Of fewer nothing would tell which they are.
  for (const char *mode : {"prune", "merge", "fold"})
    expect_failure(patches({"--drop-mode", mode}), 2, "dropping leaves only some; --drop-mode restore keeps all");
  expect_failure(on("vit", "embed", {album("a.ppm"), "--pooling", "none", "--drop-profile", "fast"}), 2,
                 "dropping leaves only some");
}

// SigLIP's first token is a patch like others.
TEST_F(CliImages, WithoutAClassTokenThereIsNothingOfIt) {
  const std::string siglip = dir_ / "siglip.rsw";
  ASSERT_EQ(rs({"convert", source_dir() + "/tests/vision/siglip", "-o", siglip, "--type", "f32"}).code, 0);
  const auto embedded = [&](const strings &more) {
    strings all = {"embed", "-m", siglip, album("a.ppm")};
    all.insert(all.end(), more.begin(), more.end());
    return rs(all);
  };
  EXPECT_EQ(embedded({"-o", "mean"}).code, 0);
  expect_failure(embedded({"-o", "cls"}), 2, "cls: this model has no class token");
  expect_failure(embedded({"--pooling", "cls"}), 2, "cls: this model has no class token");
  EXPECT_EQ(embedded({"--drop", "0.5", "--drop-score", "attn-colsum"}).code, 0);
  for (const char *score : {"attn-cls", "norm-0.5attn-cls"})
    expect_failure(embedded({"--drop", "0.5", "--drop-score", score}), 2, "score attn-cls: this model has no class token");
}

TEST_F(CliImages, AStoredScheduleDropsTheSame) {
  const strings given = {album("a.ppm"), "--drop", "0.25,0.5", "--drop-score=norm"},
                stored = {album("a.ppm"), "--drop-profile", "fast"};
  for (const char *name : {"vit", "clip"}) {
    const json line = lines(on(name, "embed", stored)).at(0);
    EXPECT_EQ(line.at("kept"), 14) << name;
    EXPECT_EQ(line, jsonl(on(name, "embed", given).out).at(0)) << name;
  }
  EXPECT_EQ(lines(on("vit", "trace", {album("a.ppm"), "--format", "json", "--drop-profile", "fast"})).at(0).at("kept").size(), 14u);
  expect_failure(on("vit", "embed", {album("a.ppm"), "--drop-profile", "slow"}), 2, "no drop schedule 'slow' (stored: fast)");
  expect_failure(on("head", "classify", {album("a.ppm"), "--drop-profile", "fast"}), 2, "no drop schedule 'fast' (stored: none)");
}

// Of a model that takes both, schedules are for images; texts beside them go without.
TEST_F(CliImages, TextsBesideImagesKeepTheirTokens) {
  const strings items = {album("a.ppm"), "--text", "a cat", "--text", "the dog"};
  const std::vector<json> plain = lines(on("clip", "embed", items));
  for (const strings &schedule :
       {strings{"--drop", "0.25,0.5", "--drop-score=norm"}, {"--drop-profile", "fast"}, {"--keep", "9"}}) {
    strings all = items;
    all.insert(all.end(), schedule.begin(), schedule.end());
    const run_result r = on("clip", "embed", all);
    EXPECT_EQ(r.code, 0) << r;
    const std::vector<json> got = jsonl(r.out);
    ASSERT_EQ(got.size(), 3u) << r;
    EXPECT_LT(got[0].at("kept"), 37) << r;
    EXPECT_NE(got[0].at("embedding"), plain[0].at("embedding"));
    EXPECT_EQ(got[1], plain[1]);
    EXPECT_EQ(got[2], plain[2]);
  }
}

TEST_F(CliImages, AnyBatchAndThreadsGiveTheSame) {
  strings many;
  for (int i = 0; i < 23; ++i) {
    const std::string path = dir_ / (std::to_string(100 + i) + ".ppm");
    write_file(path, pnm_image(9 + 7 * (i % 5), 200 - 8 * i, unsigned(i)));  // some take longer to prepare than others
    many.push_back(path);
  }
  std::string expected;
  for (const std::string &path : many) expected += on("vit", "embed", {path}).out;
  for (const char *batch : {"1", "5", "64"})
    for (const char *threads : {"1", "3"})
      EXPECT_EQ(on("vit", "embed", {dir_.path(), "-b", batch, "-t", threads}).out, expected) << batch << " " << threads;
}

TEST_F(CliImages, TextsBesideImages) {
  const std::vector<json> got =
      lines(on("clip", "embed", {album("a.ppm"), "--text", "a cat", "--text", "the dog", album("z.bmp")}));
  ASSERT_EQ(got.size(), 4u);
  EXPECT_EQ(got[0].at("image"), album("a.ppm"));
  EXPECT_EQ(got[1].at("image"), album("z.bmp"));
  EXPECT_FALSE(got[2].contains("image"));
  EXPECT_EQ(got[2].at("tokens"), 4);
  for (const json &line : got) EXPECT_EQ(line.at("embedding").size(), 16u);
  EXPECT_EQ(floats(got[0].at("embedding")), encode("clip", album("a.ppm"), params(), 16).values);
  // As lines, in any order, and together in one batch.
  const std::string input = json{{"text", "the dog"}}.dump() + "\n" + json{{"image", album("a.ppm")}, {"id", 5}}.dump() + "\n" +
                            json{{"text", "a cat"}}.dump() + "\n";
  const std::vector<json> mixed = lines(on("clip", "embed", {}, input));
  ASSERT_EQ(mixed.size(), 3u);
  EXPECT_EQ(mixed[0].at("embedding"), got[3].at("embedding"));
  EXPECT_EQ(mixed[1].at("embedding"), got[0].at("embedding"));
  EXPECT_EQ(mixed[1].at("id"), 5);
  EXPECT_EQ(mixed[2].at("embedding"), got[2].at("embedding"));
  EXPECT_EQ(lines(on("clip", "embed", {"--text", "a cat"})).at(0).at("embedding"), got[2].at("embedding"));
  // With a pooling that is named, both are states of their own width.
  const std::vector<json> pooled = lines(on("clip", "embed", {album("a.ppm"), "--text", "a cat", "--pooling", "mean"}));
  EXPECT_EQ(pooled[0].at("embedding").size(), 32u);
  EXPECT_EQ(pooled[1].at("embedding").size(), 48u);
  expect_failure(on("clip", "embed", {album("a.ppm"), "--pooling", "mean", "--format", "npy"}), 2,
                 "which --format npy cannot hold");
  EXPECT_EQ(lines(on("clip", "embed", {album("a.ppm"), "-o", "mean"})).at(0).at("embedding").size(), 32u);

  expect_failure(on("clip", "embed", {"--text", "a", "-f", dir_ / "x"}), 2, "both --text and --file are given");
  expect_failure(on("clip", "embed", {"--text", "a", "-o", "cls", album("a.ppm")}), 2, "--output cls is for images");
  expect_failure(on("vit", "embed", {"--text", "a", album("a.ppm")}), 2, "--text: this model takes no texts");
  expect_failure(on("bert", "embed", {"--text", "a"}), 2, "--text goes beside images; for this model, texts are arguments");
}

TEST_F(CliImages, LinesOfTheWrongKind) {
  const auto said = [&](const std::string &name, const std::string &line, const strings &arguments = {}) {
    const run_result r = on(name, "embed", arguments, line + "\n");
    EXPECT_EQ(r.code, 1) << r;
    EXPECT_EQ(r.out, "") << r;
    return lines_of(r.err).at(0);
  };
  EXPECT_EQ(said("bert", R"({"image": "x.jpg"})"), "rs: stdin:1: no \"text\", but an image, which is not taken here");
  EXPECT_EQ(lines(on("bert", "embed", {}, "{\"text\": \"a\", \"image\": [1]}\n")).size(), 1u);
  EXPECT_EQ(said("vit", R"({"text": "x"})"), "rs: stdin:1: no \"image\", but a text, which is not taken here");
  EXPECT_EQ(said("vit", R"({"id": 3})"), "rs: stdin:1: no \"image\"");
  EXPECT_EQ(said("vit", R"({"image": 3})"), "rs: stdin:1: \"image\" is not a string");
  EXPECT_EQ(said("vit", R"({"image": ["x"]})"), "rs: stdin:1: \"image\" is not a string");
  EXPECT_EQ(said("clip", R"({"image": "x", "text": "y"})"), "rs: stdin:1: both \"text\" and \"image\"");
  EXPECT_EQ(said("clip", R"({"id": 1})"), "rs: stdin:1: neither \"text\" nor \"image\"");
  EXPECT_EQ(said("clip", R"({"text": "y"})", {"-o", "cls"}), "rs: stdin:1: a text, but --output cls is for images");
  EXPECT_NE(said("vit", R"({"image": "x\u0000y"})").find("cannot open: a NUL in the path"), std::string::npos);
}

TEST_F(CliImages, BrokenImagesAreNamed) {
  const std::string good = album("a.ppm"), whole = pnm_image(20, 20, 1);
  write_file(dir_ / "cut.ppm", whole.substr(0, whole.size() / 2));
  write_file(dir_ / "empty.png", "");
  write_file(dir_ / "text.jpg", "hello");
  write_file(dir_ / "huge.ppm", "P6\n2000000 2000000\n255\n");
  write_file(dir_ / "bad.bmp", bmp_of(whole, 20, 20).substr(0, 300));
  write_file(dir_ / "line\nfeed.ppm", "x");
  std::string png = "\x89PNG\r\n\x1a\n";
  png.append("\0\0\0\rIHDR\0\0\0", 11);
  write_file(dir_ / "cut.png", png);
  write_file(dir_ / "cut.jpg", "\xff\xd8\xff\xe0");
  const std::pair<std::string, std::string> broken[] = {{dir_ / "cut.ppm", ""},
                                                        {dir_ / "empty.png", "not an image: empty"},
                                                        {dir_ / "text.jpg", "not an image: begins with 'hello'"},
                                                        {dir_ / "huge.ppm", "the limit is"},
                                                        {dir_ / "bad.bmp", ""},
                                                        {dir_ / "cut.png", "truncated PNG"},
                                                        {dir_ / "cut.jpg", "truncated JPEG"},
                                                        {dir_ / "absent.jpg", "cannot open: No such file or directory"}};
  std::string list = good + "\n";
  for (const auto &[path, why] : broken) list += path + "\n" + good + "\n";
  list += dir_.path() + "\n";
  for (const char *command : {"embed", "classify"}) {
    const run_result r = on("head", command, {}, list);
    EXPECT_EQ(r.code, 1) << r;
    EXPECT_EQ(jsonl(r.out).size(), 9u) << r;
    const strings said = lines_of(r.err);
    ASSERT_EQ(said.size(), 10u) << r;
    for (size_t i = 0; i < 8; ++i) {
      EXPECT_EQ(said[i].rfind("rs: " + broken[i].first + ": ", 0), 0u) << said[i];
      EXPECT_NE(said[i].find(broken[i].second), std::string::npos) << said[i];
      EXPECT_LT(said[i].size(), 400u);
    }
    EXPECT_EQ(said[8], "rs: " + dir_.path() + ": cannot read: Is a directory");
    EXPECT_EQ(said[9], "rs: 9 of 18 images failed");
  }
  EXPECT_NE(on("vit", "embed", {dir_ / "line\nfeed.ppm"}).err.find("line\\nfeed.ppm: "), std::string::npos);
  // --on-error stop writes what came before, and no more.
  for (const char *batch : {"1", "4", "64"}) {
    const run_result r = on("vit", "embed", {"--on-error", "stop", "-b", batch, good, good, dir_ / "text.jpg", good});
    EXPECT_EQ(r.code, 1) << r;
    EXPECT_EQ(jsonl(r.out).size(), 2u) << r;
    EXPECT_EQ(lines_of(r.err).back(), "rs: 1 of 3 images failed; stopped there");
  }
  // An output file is there all the same, with what could be used.
  EXPECT_EQ(on("vit", "embed", {good, dir_ / "text.jpg", "-o", dir_ / "out.jsonl"}).code, 1);
  EXPECT_EQ(jsonl(read_file(dir_ / "out.jsonl")).size(), 1u);
}

TEST_F(CliImages, ImageSize) {
  const json wide = lines(on("vit", "embed", {album("a.ppm"), "--image-size", "32x16", "-o", "patches"})).at(0);
  EXPECT_EQ(wide.at("grid"), (json{4, 8}));
  rs_encode_params p = params(RS_POOL_NONE);
  p.image_width = 32, p.image_height = 16;
  const answer all = encode("vit", album("a.ppm"), p, 32);
  EXPECT_EQ(floats(wide.at("embedding")[31]), std::vector<float>(all.values.end() - 32, all.values.end()));
  EXPECT_EQ(lines(on("head", "classify", {album("a.ppm"), "--image-size", "8"})).at(0).at("tokens"), 5);
  for (const char *bad : {"0", "-4", "4x", "x4", "1e3", "24x24x24", "24 ", "99999999999"})
    expect_failure(on("vit", "embed", {album("a.ppm"), std::string("--image-size=") + bad}), 2,
                   "is neither a number of pixels nor");
  expect_failure(on("vit", "embed", {album("a.ppm"), "--image-size", "3"}), 2, "--image-size: ");
  // What is taken can be prepared, too.
  EXPECT_EQ(lines(on("vit", "embed", {album("a.ppm"), "--image-size", "16384x4"})).at(0).at("tokens"), 4097);
  expect_failure(on("vit", "embed", {album("a.ppm"), "--image-size", "16385x4"}), 2,
                 "--image-size: an image of 16385x4 pixels, expected 4 (a patch) to 16384 on each side");
  expect_failure(on("bert", "embed", {"a", "--image-size", "24"}), 2, "--image-size: this model takes no images");
  for (const strings &option : {strings{"--max-tokens", "9"}, strings{"--prompt", "x"}, strings{"--long", "error"}}) {
    strings all_options = {album("a.ppm")};
    all_options.insert(all_options.end(), option.begin(), option.end());
    expect_failure(on("vit", "embed", all_options), 2, option[0] + ": this model takes no texts");
  }
}

// ------------------------------------------------------------------------------------------------ rs classify

TEST_F(CliImages, LabelsOfAHead) {
  const loaded l(model("head"));
  const std::string bytes = read_file(album("a.ppm"));
  const rs_image image = {RS_IMAGE_FILE, bytes.data(), bytes.size(), 0, 0};
  float logits[3];
  ASSERT_EQ(rs_classify_images(l.session, &image, 1, nullptr, logits, 3, nullptr), RS_OK) << rs_last_error();
  const json got = lines(on("head", "classify", {album("a.ppm"), "--top", "5"})).at(0);
  double sum = 0;
  for (float logit : logits) sum += std::exp(double(logit));
  const char *const names[] = {"cat", "dog", "boat"};
  ASSERT_EQ(got.at("scores").size(), 3u);
  std::set<std::string> seen;
  double last = INFINITY;
  for (const json &score : got.at("scores")) {
    const auto label = size_t(std::find(names, names + 3, score.at("label").get<std::string>()) - names);
    ASSERT_LT(label, 3u);
    EXPECT_NEAR(score.at("score").get<double>(), std::exp(double(logits[label])) / sum, 1e-6);
    EXPECT_LE(score.at("score").get<double>(), last);
    last = score.at("score");
    seen.insert(score.at("label"));
  }
  EXPECT_EQ(seen.size(), 3u);
  EXPECT_EQ(got.at("label"), got.at("scores")[0].at("label"));
  EXPECT_EQ(got.at("image"), album("a.ppm"));
  EXPECT_FALSE(lines(on("head", "classify", {album("a.ppm")})).at(0).contains("scores"));
  const std::vector<json> all = lines(on("head", "classify", {album(), "-b", "2", "--top", "5"}));
  ASSERT_EQ(all.size(), 5u);
  EXPECT_EQ(all[0], got);
}

TEST_F(CliImages, LabelsOfYours) {
  const strings labels = {"a cat", "the dog", "hello"};
  std::vector<float> image = floats(lines(on("clip", "embed", {album("a.ppm")})).at(0).at("embedding"));
  const auto cosine_with = [&](const std::string &text) {
    const std::vector<float> v = floats(lines(on("clip", "embed", {"--text", text})).at(0).at("embedding"));
    double dot = 0;
    for (size_t i = 0; i < v.size(); ++i) dot += double(v[i]) * image[i];
    return dot;  // both have length 1
  };
  const auto expect_scores = [&](const json &line, const std::function<double(const std::string &)> &wanted) {
    ASSERT_EQ(line.at("scores").size(), 3u);
    for (const json &score : line.at("scores"))
      EXPECT_NEAR(score.at("score").get<double>(), wanted(score.at("label")), 2e-5) << line;
  };
  const double scale = std::exp(2.0);
  double sum = 0;
  for (const std::string &label : labels) sum += std::exp(scale * cosine_with(label));
  const json soft = lines(on("clip", "classify", {album("a.ppm"), "--labels", "a cat, the dog ,hello", "--top", "3"})).at(0);
  expect_scores(soft, [&](const std::string &label) { return std::exp(scale * cosine_with(label)) / sum; });
  const json patterned = lines(on("clip", "classify",
                                  {album("a.ppm"), "--labels", "a cat,the dog,hello", "--template", "a mat {} on.", "--activation",
                                   "none", "--top", "3"}))
                             .at(0);
  expect_scores(patterned, [&](const std::string &label) { return scale * cosine_with("a mat " + label + " on."); });
  const json twice = lines(on("clip", "classify",
                              {album("a.ppm"), "--labels", "a cat,the dog,hello", "--template", "{} on {}.", "--activation", "none",
                               "--top", "3"}))
                         .at(0);
  expect_scores(twice, [&](const std::string &label) { return scale * cosine_with(label + " on " + label + "."); });
  // With a bias each label is judged for itself.
  image = floats(lines(on("biased", "embed", {album("a.ppm")})).at(0).at("embedding"));
  const json each =
      lines(on("biased", "classify", {album("a.ppm"), "--labels", "a cat,the dog", "--labels", "hello", "--top", "3"})).at(0);
  const auto vector = [&](const std::string &text) {
    return floats(lines(on("biased", "embed", {"--text", text})).at(0).at("embedding"));
  };
  expect_scores(each, [&](const std::string &label) {
    const std::vector<float> v = vector(label);
    double dot = 0;
    for (size_t i = 0; i < v.size(); ++i) dot += double(v[i]) * image[i];
    return 1 / (1 + std::exp(-(scale * dot - 1.5)));
  });
  EXPECT_EQ(lines(on("clip", "classify", {album(), "--labels", "a cat"})).size(), 5u);

  const std::string photo = album("a.ppm");
  expect_failure(on("clip", "classify", {photo}), 1, "with --labels it compares images with words of yours");
  expect_failure(on("clip", "classify", {photo, "--labels", "a,,b"}), 2, "has an empty label");
  expect_failure(on("clip", "classify", {photo, "--labels", "a", "--template", "a photo"}), 2, "has no {}, where the label goes");
  expect_failure(on("head", "classify", {photo, "--labels", "a"}), 2, "takes only images");
  expect_failure(on("bert", "classify", {"a", "--labels", "a"}), 2, "takes only texts");
  expect_failure(on("vit", "classify", {photo}), 1, "this model has no classification head");
  expect_failure(on("head", "classify", {photo, "--template", "{}"}), 2, "--template goes with --labels");
  expect_failure(on("head", "classify", {photo, "--pair", "x"}), 2, "--pair is for texts");
  expect_failure(on("head", "classify", {photo, "--tokens"}), 2, "--tokens is for texts");
  expect_failure(on("head", "classify", {photo, "--max-tokens", "9"}), 2, "--max-tokens is for texts");
  expect_failure(on("head", "classify", {photo, "--long", "error"}), 2, "--long is for texts");
  expect_failure(on("head", "classify", {photo, "--overlap", "4"}), 2, "--overlap is for texts");
  expect_failure(on("clip", "classify", {photo, "--labels", "a", "--overlap", "4"}), 2, "--overlap is for texts");
  std::string long_label;
  for (int i = 0; i < 60; ++i) long_label += "cat ";
  const run_result r = on("clip", "classify", {photo, "--labels", long_label});
  EXPECT_EQ(r.code, 1) << r;
  EXPECT_NE(r.err.find("the limit is 40"), std::string::npos) << r;
}

// ------------------------------------------------------------------------------------------------ rs trace

const strings schedule = {"--drop", "0.25,0,0.5", "--drop-score=centre+norm"};
strings with(strings arguments, const strings &more) {
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

TEST_F(CliImages, TraceAsJson) {
  const json got = lines(on("vit", "trace", with({album("a.ppm"), "--format", "json"}, schedule))).at(0);
  EXPECT_EQ(got.at("image"), album("a.ppm"));
  EXPECT_EQ(got.at("grid"), (json{6, 6}));
  EXPECT_EQ(got.at("prefix"), 1);
  EXPECT_EQ(got.at("patch"), 4);
  ASSERT_EQ(got.at("layers").size(), 2u);
  const json &first = got.at("layers")[0], &second = got.at("layers")[1];
  EXPECT_EQ(first.at("layer"), 0);
  EXPECT_EQ(second.at("layer"), 2);
  EXPECT_EQ(first.at("n"), 37);
  EXPECT_EQ(second.at("n"), 28);
  EXPECT_EQ(first.at("kept").size(), 28u);
  EXPECT_EQ(second.at("kept"), got.at("kept"));
  EXPECT_EQ(got.at("kept").size(), 14u);
  EXPECT_EQ(got.at("kept")[0], 0);  // the class token
  // What left has no higher score than what stayed, but for the class token.
  std::map<int, double> score;
  for (size_t i = 0; i < 37; ++i) score[first.at("positions")[i]] = first.at("scores")[i];
  double lowest_kept = INFINITY, highest_left = -INFINITY;
  for (const json &p : first.at("kept"))
    if (p != 0) lowest_kept = std::min(lowest_kept, score[p]);
  for (const json &d : first.at("dropped")) highest_left = std::max(highest_left, d.at("score").get<double>());
  EXPECT_GE(lowest_kept, highest_left);
  EXPECT_NEAR(got.at("saved").get<double>(), 1 - (37 + 28 + 28) / (3.0 * 37), 1e-9);
  size_t left_first = 0;
  for (const json &l : got.at("left_at")) left_first += l == 0;
  EXPECT_EQ(left_first, 9u);
}

TEST_F(CliImages, TraceAsPicture) {
  for (const strings &mode : {strings{}, strings{"--drop-mode", "merge"}}) {
    const run_result r = on("vit", "trace", with(with({album("a.ppm"), "-o", dir_ / "t.png"}, schedule), mode));
    EXPECT_EQ(r.code, 0) << r;
    const std::string bytes = read_file(dir_ / "t.png");
    rs_rgb picture;
    ASSERT_EQ(rs_image_decode(bytes.data(), bytes.size(), 0, &picture), RS_OK) << rs_last_error();
    // 24 pixels, enlarged to some 300, three times beside each other.
    const int side = 24 * 13, gap = 16, margin = 28, patch = 4 * 13;
    EXPECT_EQ(picture.width, 2 * margin + 3 * side + 2 * gap);
    EXPECT_GT(picture.height, margin + side);
    const json trace = lines(on("vit", "trace", with(with({album("a.ppm"), "--format", "json"}, schedule), mode))).at(0);
    const auto patch_of_panel = [&](int panel, int token) {  // its pixels
      std::vector<uint8_t> pixels;
      const int x0 = margin + panel * (side + gap) + (token - 1) % 6 * patch, y0 = margin + (token - 1) / 6 * patch;
      for (int y = y0; y < y0 + patch; ++y) {
        const uint8_t *row = &picture.data[3 * (size_t(y) * size_t(picture.width) + size_t(x0))];
        pixels.insert(pixels.end(), row, row + 3 * patch);
      }
      return pixels;
    };
    std::set<int> targets;
    for (size_t panel = 1; panel <= 2; ++panel) {
      const json &layer = trace.at("layers")[panel - 1];
      for (const json &d : layer.at("dropped")) {
        EXPECT_NE(patch_of_panel(int(panel), d.at("position")), patch_of_panel(0, d.at("position")));
        EXPECT_EQ(d.contains("into"), !mode.empty());
        if (d.contains("into")) targets.insert(d.at("into").get<int>());
      }
      for (const json &k : layer.at("kept")) {
        if (k == 0) continue;
        const bool same = patch_of_panel(int(panel), k) == patch_of_panel(0, k);
        EXPECT_EQ(same, targets.count(k.get<int>()) == 0) << "panel " << panel << ", token " << k;
      }
    }
    // What is shown is the image: its upper left is dark, its lower right is not.
    const std::vector<uint8_t> dark = patch_of_panel(0, 1), light = patch_of_panel(0, 36);
    EXPECT_LT(dark[0] + 80, light[light.size() - 3]);
  }
  // Several below each other; a failure among them leaves the others.
  write_file(dir_ / "no.jpg", "no");
  const run_result r =
      on("vit", "trace", with({album("a.ppm"), dir_ / "no.jpg", album("z.bmp"), "-o", dir_ / "two.png"}, schedule));
  EXPECT_EQ(r.code, 1) << r;
  const std::string bytes = read_file(dir_ / "two.png"), one = read_file(dir_ / "t.png");
  rs_rgb two, single;
  ASSERT_EQ(rs_image_decode(bytes.data(), bytes.size(), 0, &two), RS_OK) << rs_last_error();
  ASSERT_EQ(rs_image_decode(one.data(), one.size(), 0, &single), RS_OK) << rs_last_error();
  EXPECT_EQ(two.height, 2 * single.height);
  // Any shape has a picture; what is too much for one is an error before it is painted.
  const run_result large =
      on("vit", "trace",
         {album("a.ppm"), "-o", dir_ / "large.png", "--image-size", "8000x4", "--drop", "0.5", "--drop-score", "norm"});
  EXPECT_EQ(large.code, 0) << large;
  std::string list;
  for (int i = 0; i < 150; ++i) list += album("a.ppm") + "\n";
  write_file(dir_ / "list", list);
  const run_result many = on("vit", "trace", with({"-f", dir_ / "list", "-o", dir_ / "many.png"}, schedule));
  EXPECT_EQ(many.code, 1) << many;
  EXPECT_NE(many.err.find("there is no room for its pictures"), std::string::npos) << many;
  EXPECT_FALSE(file_exists(dir_ / "many.png"));
  // No image at all: no file.
  EXPECT_EQ(on("vit", "trace", with({dir_ / "no.jpg", "-o", dir_ / "none.png"}, schedule)).code, 1);
  expect_failure(on("vit", "trace", with({"-f", "/dev/null", "-o", dir_ / "none.png"}, schedule)), 1,
                 "nothing to trace: no image in '/dev/null'");
  expect_failure(on("vit", "trace", with({"-", "-o", dir_ / "none.png"}, schedule)), 1,
                 "nothing to trace: no image in standard input");
  EXPECT_FALSE(file_exists(dir_ / "none.png"));
}

size_t count_of(const std::string &text, const std::string &part) {
  size_t n = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

TEST_F(CliImages, TraceAsPage) {
  const std::string evil = dir_ / "<script>&\"x\".ppm";
  write_file(evil, pnm_image(24, 24, 1));
  const run_result r = on("vit", "trace", with({album("a.ppm"), evil, "-o", dir_ / "t.html"}, schedule));
  EXPECT_EQ(r.code, 0) << r;
  const std::string page = read_file(dir_ / "t.html");
  EXPECT_EQ(count_of(page, "src=\"data:image/png;base64,"), 2u * (3 + 2));  // pictures, and the scores of two layers
  EXPECT_EQ(count_of(page, "<article>"), 2u);
  EXPECT_EQ(count_of(page, "<script"), 2u) << "a name became markup";
  EXPECT_NE(page.find("&lt;script&gt;&amp;&quot;x&quot;"), std::string::npos);
  EXPECT_NE(page.find("default-src 'none'; img-src data:"), std::string::npos);
  EXPECT_EQ(page.find("http"), page.find("http-equiv")) << "something is loaded from elsewhere";
  const size_t begin = page.find("id=\"data\">") + 10;
  const json data = json::parse(page.substr(begin, page.find("</script>", begin) - begin));
  ASSERT_EQ(data.at("images").size(), 2u);
  EXPECT_EQ(data.at("images")[0].at("left").size(), 37u);
  EXPECT_EQ(data.at("images")[0].at("layers")[1].at("p").size(), 28u);
}

TEST_F(CliImages, TraceInATerminal) {
  const run_result r = on("vit", "trace", with({album("a.ppm")}, schedule));
  EXPECT_EQ(r.code, 0) << r;
  const json trace = lines(on("vit", "trace", with({album("a.ppm"), "--format", "json"}, schedule))).at(0);
  const strings said = lines_of(r.out);
  ASSERT_GE(said.size(), 14u) << r;
  EXPECT_NE(said[1].find("a left at layer 0  b left at layer 2"), std::string::npos) << said[1];
  EXPECT_EQ(said[3], album("a.ppm"));
  for (size_t row = 0; row < 6; ++row) {
    std::string wanted;
    for (size_t column = 0; column < 6; ++column) {
      const json &left = trace.at("left_at")[1 + 6 * row + column];
      wanted += std::string(column ? " " : "") + (left.is_null() ? "\xe2\x96\xa0" : left == 0 ? "a" : "b");
    }
    EXPECT_EQ(said[4 + row], wanted);
  }
  EXPECT_NE(r.out.find("layer 0: 37 \xe2\x86\x92 28 tokens"), std::string::npos) << r;
  EXPECT_NE(r.out.find("14 of 37 tokens left at the end"), std::string::npos) << r;
  const run_result painted = on("vit", "trace", with({album("a.ppm"), "--color", "always"}, schedule));
  EXPECT_EQ(count_of(painted.out, "\xe2\x96\x80"), 6u * (12 + 12)) << "two pictures of 12 by 12 dots";
}

TEST_F(CliImages, TraceUsage) {
  expect_failure(on("bert", "trace", with({"the cat", "--format", "png"}, {"--drop", "0.5", "--drop-score=-mlp"})), 2,
                 "png shows images");
  expect_failure(on("vit", "trace", {album("a.ppm")}), 2, "no schedule");
  expect_failure(on("vit", "trace", {album("a.ppm"), "--drop", "0,0"}), 2, "the schedule drops nothing");
  expect_failure(on("vit", "trace", {album("a.ppm"), "--drop", "0,0,0,0.5"}), 2, "layers");
  EXPECT_EQ(lines(on("clip", "trace", with({album("a.ppm"), "--format", "json"}, schedule))).size(), 1u);
  for (const strings &option : {strings{"--prompt", "a"}, {"--prompt", ""}, {"--max-tokens", "9"}}) {
    expect_failure(on("clip", "trace", with(with({album("a.ppm")}, schedule), option)), 2,
                   option[0] + " is for texts; rs trace shows images of this model");
    expect_failure(on("vit", "trace", with(with({album("a.ppm")}, schedule), option)), 2,
                   option[0] + ": this model takes no texts");
  }
  const json small = lines(on("vit", "trace", with({album("a.ppm"), "--format", "json", "--image-size", "20x10"}, schedule))).at(0);
  EXPECT_EQ(small.at("grid"), (json{2, 5}));
  EXPECT_EQ(on("vit", "trace", with({album("a.ppm"), "-o", dir_ / "s.png", "--image-size", "22x10"}, schedule)).code, 0);
}

// ------------------------------------------------------------------------------------------------ rs info, rs tokenize

TEST_F(CliImages, InfoAndPlans) {
  const std::string text = rs({"info", model("vit")}).out;
  EXPECT_NE(text.find("24x24"), std::string::npos) << text;
  EXPECT_NE(text.find("6x6 of 4x4 pixels"), std::string::npos) << text;
  EXPECT_NE(text.find("37, 1 of them before the patches"), std::string::npos) << text;
  EXPECT_NE(text.find("to 24x24 (bilinear)"), std::string::npos) << text;
  EXPECT_EQ(text.find("vocabulary"), std::string::npos);
  const json all = json::parse(rs({"info", model("clip"), "--json"}).out);
  EXPECT_EQ(all.at("image").at("tokens"), 37);
  EXPECT_EQ(all.at("image").at("patch"), 4);
  EXPECT_EQ(all.at("takes"), "texts and images");
  EXPECT_FALSE(json::parse(rs({"info", model("bert"), "--json"}).out).contains("image"));

  const std::vector<json> plans = lines(
      rs({"info", model("vit"), "--json", "--plan", "1,8", "--image-size", "32x16", "--drop", "0.5", "--drop-score", "norm"}));
  ASSERT_EQ(plans.size(), 2u);
  EXPECT_EQ(plans[1].at("batch"), 8);
  EXPECT_EQ(plans[1].at("tokens"), 33);
  EXPECT_EQ(plans[1].at("plan").at("layers")[0].at("tokens"), 8 * 33);
  EXPECT_EQ(plans[1].at("dropping").at("layers")[1].at("tokens"), 8 * 17);
  EXPECT_NE(rs({"info", model("vit"), "--plan", "8"}).out.find("8 images of 24x24"), std::string::npos);
  EXPECT_NE(rs({"info", model("clip"), "--plan", "8"}).out.find("8 images of 24x24"), std::string::npos) << "not of its texts";
  expect_failure(rs({"info", model("vit"), "--plan", "8x128"}), 2, "of images; --image-size says how large they are");
  expect_failure(rs({"info", model("bert"), "--plan", "8x16", "--image-size", "24"}), 2, "this model takes no images");
  expect_failure(rs({"info", model("vit"), "--image-size", "24"}), 2, "--image-size goes with --plan");
  expect_failure(on("vit", "tokenize", {"a"}), 1, "this model takes images, not texts: it has no tokenizer");
}

// ------------------------------------------------------------------------------------------------ rs bench, rs eval, --help

TEST_F(CliImages, BenchMeasuresTheTextsOfAModelOfBoth) {
  const auto bench = [&](const strings &models, const strings &more) {
    strings all = {"bench", "--seconds", "0.001", "-t", "1", "--json"};
    for (const std::string &name : models) all.insert(all.end(), {"-m", model(name)});
    all.insert(all.end(), more.begin(), more.end());
    return rs(all);
  };
  // As many tokens as it has positions.
  const std::vector<json> rows = lines(bench({"clip"}, {}));
  ASSERT_EQ(rows.size(), 4u);
  const std::pair<int, int> shapes[] = {{1, 16}, {1, 40}, {8, 40}, {32, 40}};
  for (size_t i = 0; i < 4; ++i)
    EXPECT_EQ(std::make_pair(rows[i].at("batch").get<int>(), rows[i].at("tokens").get<int>()), shapes[i]);
  EXPECT_TRUE(rows[0].contains("sequences_per_second"));
  EXPECT_EQ(lines(bench({"clip", "bert"}, {})).size(), 8u);
  EXPECT_EQ(lines(bench({"clip"}, {"--shapes", "2x20"})).size(), 1u);
  expect_failure(bench({"clip"}, {"--shapes", "1x41"}), 2, "41 tokens are more than the 40 positions");
  expect_failure(bench({"clip"}, {"--drop", "0.5"}), 2, "rs bench measures its texts, and schedules are for its images");
  expect_failure(bench({"clip", "vit"}, {}), 2, "one takes images, the other texts");
  // Its images, as README.md says.
  const run_result r = rs({"eval", "cosine", "-m", model("clip"), "--data", album(), "--rounds", "1", "--json"});
  EXPECT_EQ(r.code, 0) << r;
  EXPECT_EQ(jsonl(r.out).at(0).at("full").at("images"), 5) << r;
}

TEST_F(CliImages, HelpSaysWhatIsTaken) {
  const std::pair<const char *, std::vector<const char *>> said[] = {
      {"embed", {"read texts, or paths of images, from this file", "texts keep all"}},
      {"classify", {"read texts, with or without a \"pair\", or paths of images, from this file"}},
      {"similarity", {"read the texts to compare, a line each, from this file"}},
      {"tokenize", {"read texts, with or without a \"pair\", from this file"}},
      {"rerank", {"read the texts that are ranked for --query", "with \"query\" and \"texts\" from this file"}},
      {"answer", {"read contexts of --question", "with \"question\" and \"context\" from this file"}},
      {"convert", {"preprocessor_config.json", "Images are always the built-in pictures"}},
      {"tune", {"texts or images that are encoded together"}},
      {"bench", {"Of a model that takes both, texts are measured"}},
      {"info", {"alone or beside texts, how many of these"}}};
  for (const auto &[command, parts] : said) {
    std::string help, out = rs({command, "--help"}).out;
    for (char c : out)  // however it is broken into lines
      if (c != '\n' && (c != ' ' || help.empty() || help.back() != ' ')) help += c;
      else if (c == '\n' && !help.empty() && help.back() != ' ') help += ' ';
    for (const char *part : parts) EXPECT_NE(help.find(part), std::string::npos) << command << ": " << part << "\n" << out;
  }
}

// ------------------------------------------------------------------------------------------------ the threads that prepare images

// Images without end, and how many were taken of them.
class endless_source : public text_source {
 public:
  endless_source(std::vector<std::string> paths, size_t *taken) : paths_(std::move(paths)), taken_(taken) {}
  bool next(text_item *item) override {
    *item = text_item();
    item->has_image = true;
    item->image = paths_[*taken_ % paths_.size()];
    item->line = ++*taken_;
    return true;
  }
  bool ready(int) override { return true; }
  std::string place(const text_item &item) const override { return item.image; }
  double bytes_done() const override { return 0; }
  double bytes_total() const override { return 0; }

 private:
  std::vector<std::string> paths_;
  size_t *taken_;
};

TEST_F(CliImages, TheWindowIsBoundedAndInOrder) {
  const loaded l(model("vit"));
  const strings paths = {album("a.ppm"), album("notes.txt"), album("b b.ppm"), dir_ / "absent"};
  for (int threads : {1, 4}) {
    // 512 x 512 pixels take 3 MiB; of 1600 x 1600 a second one is too many.
    for (const auto &[side, most] : {std::pair<int32_t, size_t>{24, 7}, {512, 7}, {1600, 1}}) {
      size_t taken = 0;
      image_loader loader(std::make_unique<endless_source>(paths, &taken), l.model, {side, side, threads, 7});
      for (size_t i = 1; i <= 12; ++i) {
        text_item item;
        ASSERT_TRUE(loader.next(&item));
        EXPECT_EQ(item.line, i);
        EXPECT_LE(taken, i + most);
        if (i > 1) {
          EXPECT_EQ(taken, i + most) << "no image was taken in advance";
        }
        EXPECT_EQ(item.error.empty(), i % 2 == 1) << item.error;
        EXPECT_EQ(item.pixels.size(), i % 2 == 1 ? size_t(3) * size_t(side) * size_t(side) : 0);
      }
    }
  }
}

TEST_F(CliImages, MemoryDoesNotGrowWithTheFolder) {
#if defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "AddressSanitizer keeps freed memory";
#endif
  // 600 images of 500 x 400 come to 343 MiB decoded.
  const std::string image = pnm_image(500, 400, 3);
  write_file(dir_ / "0.ppm", image);
  std::string few, many;
  for (int i = 0; i < 600; ++i) (i < 20 ? few : many) += dir_ / "0.ppm\n";
  many += few;
  const auto peak = [&](const std::string &list) {
    write_file(dir_ / "list", list);
    const run_result r = on("vit", "embed", {"-f", dir_ / "list", "-t", "2", "-o", "/dev/null"});
    EXPECT_EQ(r.code, 0) << r;
    rusage usage = {};
    getrusage(RUSAGE_CHILDREN, &usage);
    return usage.ru_maxrss;  // of the largest child so far, in KiB
  };
  const long before = peak(few), after = peak(many);
  EXPECT_LT(after, before + 16 * 1024) << "KiB: " << before << ", then " << after;
}

}  // namespace
