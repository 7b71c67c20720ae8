// rs eval, rs tune and rs bench for images: readers, the commands on a small model, and a real one beside its reference.
#include <cmath>
#include <set>

#include <sys/stat.h>

#include "../tools/datasets.h"
#include "../tools/options.h"
#include "../tools/shapes.h"
#include "../tools/tune_journal.h"
#include "cli_util.h"
#include "tiny_dinov2.h"

namespace {

template <class F>
void expect_error(F f, const std::string &part) {
  try {
    f();
    ADD_FAILURE() << "no error, wanted: " << part;
  } catch (const failure &e) {
    EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what() << "\nwanted: " << part;
  }
}

// ------------------------------------------------------------------------------------------------ sizes

TEST(ImageSize, IsANumberOrTwo) {
  temp_dir dir;
  const std::string path = dir / "tiny.rsw";
  ASSERT_EQ(tiny_dinov2().convert(path, "f32"), RS_OK) << rs_last_error();
  const model_ptr model = load_model(path, true);
  const auto parsed = [&](const char *text) {
    const image_size size = image_size_of(text, model.get());
    return std::make_pair(size.width, size.height);
  };
  EXPECT_EQ(parsed(""), std::make_pair(0, 0));
  EXPECT_EQ(parsed("224"), std::make_pair(224, 224));
  EXPECT_EQ(parsed("320x240"), std::make_pair(320, 240));
  for (const char *wrong : {"x", "0", "224x", "x224", "-1", "224x0", "1x2x3", "1.5", " 8", "8 ", "65537", "99999999999", "8X8"})
    expect_error([&] { image_size_of(wrong, model.get()); }, "--image-size: ");
}

TEST(ImageSize, BatchesOfThem) {
  const std::vector<image_batch> list = parse_image_batches("--shapes", "1x224,8x320x240");
  ASSERT_EQ(list.size(), 2u);
  EXPECT_EQ(list[0].str(), "1x224");
  EXPECT_EQ(list[0].height, 224u);
  EXPECT_EQ(list[1].str(), "8x320x240");
  EXPECT_EQ(list[1].batch, 8u);
  for (const char *wrong : {"", "8", "8x", "0x8", "8x0", "8x8x", "8x8x8x8", "1x8,", "ax8", "8x65537"})
    expect_error([&] { parse_image_batches("--shapes", wrong); }, "is not BATCHxSIZE or BATCHxWIDTHxHEIGHT");
}

// ------------------------------------------------------------------------------------------------ folders

// Classes by their sizes: {3, 2} is 0 0 0 1 1.
std::vector<size_t> classes_of(const std::vector<size_t> &sizes) {
  std::vector<size_t> classes;
  for (size_t c = 0; c < sizes.size(); ++c) classes.insert(classes.end(), sizes[c], c);
  return classes;
}

std::vector<size_t> counts_in(const std::vector<size_t> &classes, const std::vector<size_t> &chosen) {
  std::vector<size_t> counts(*std::max_element(classes.begin(), classes.end()) + 1);
  for (size_t i : chosen) ++counts[classes[i]];
  return counts;
}

TEST(Balanced, LimitsTakeAsManyOfEveryClass) {
  const std::vector<size_t> classes = classes_of({10, 10, 3});
  EXPECT_EQ(counts_in(classes, subset{6}.balanced(classes)), (std::vector<size_t>{2, 2, 2}));
  EXPECT_EQ(subset{6}.balanced(classes), (std::vector<size_t>{0, 1, 10, 11, 20, 21})) << "without a seed, the first";
  EXPECT_EQ(counts_in(classes, subset{8}.balanced(classes)), (std::vector<size_t>{3, 3, 2}));
  EXPECT_EQ(counts_in(classes, subset{15}.balanced(classes)), (std::vector<size_t>{6, 6, 3})) << "of the last there are no more";
  EXPECT_EQ((subset{0}.balanced(classes).size()), 23u);
  const std::vector<size_t> some = subset{6, 5}.balanced(classes);
  EXPECT_EQ(counts_in(classes, some), (std::vector<size_t>{2, 2, 2}));
  EXPECT_EQ(some, (subset{6, 5}.balanced(classes)));
  EXPECT_NE(some, (subset{6, 6}.balanced(classes)));
  EXPECT_TRUE(std::is_sorted(some.begin(), some.end()));
}

TEST(Balanced, HalvesShareNothingAndSmallSharesArePartOfLargeOnes) {
  const std::vector<size_t> classes = classes_of({9, 10, 11});
  const std::vector<size_t> first = subset{0, 3, 1}.balanced(classes), second = subset{0, 3, 2}.balanced(classes);
  std::set<size_t> all(first.begin(), first.end());
  all.insert(second.begin(), second.end());
  EXPECT_EQ(all.size(), 30u);
  EXPECT_EQ(first.size(), 15u);
  EXPECT_EQ(second.size(), 15u);
  std::vector<size_t> large = first;
  for (double share : {0.5, 0.2, 0.01}) {
    const std::vector<size_t> small = subset{0, 3, 1, share}.balanced(classes);
    EXPECT_EQ(small.size(), size_t(std::ceil(15 * share)));
    EXPECT_TRUE(std::includes(large.begin(), large.end(), small.begin(), small.end()));
    large = small;
  }
  EXPECT_EQ(counts_in(classes, subset{0, 3, 1, 0.4}.balanced(classes)), (std::vector<size_t>{2, 2, 2}));
  EXPECT_TRUE((subset{0, 1, 1}.balanced({})).empty());
}

class Folders : public testing::Test {
 protected:
  void write(const std::string &name, const std::string &bytes) const {
    std::filesystem::create_directories(std::filesystem::path(dir_ / name).parent_path());
    write_file(dir_ / name, bytes);
  }
  strings names_of(const std::vector<std::string> &files) const {
    strings names;
    for (const std::string &file : files) names.push_back(std::filesystem::path(file).lexically_relative(dir_.path()).string());
    return names;
  }
  temp_dir dir_;
};

TEST_F(Folders, OfClasses) {
  for (const char *name : {"d/cat/b.png", "d/cat/a.JPG", "d/cat/more/c.ppm", "d/cat/notes.txt", "d/cat/.hidden.png", "d/dog/a.bmp",
                           "d/.git/x.png", "d/readme.md"})
    write(name, "");
  const labelled_images data = read_labelled_images(dir_ / "d", {});
  EXPECT_EQ(names_of(data.files), (strings{"d/cat/a.JPG", "d/cat/b.png", "d/cat/more/c.ppm", "d/dog/a.bmp"}));
  EXPECT_EQ(data.labels, (std::vector<size_t>{0, 0, 0, 1}));
  EXPECT_EQ(data.names, (strings{"cat", "dog"}));
  EXPECT_EQ(read_labelled_images(dir_ / "d", {2}).labels, (std::vector<size_t>{0, 1}));
  EXPECT_EQ(names_of(read_images(dir_ / "d", {}).files), names_of(data.files));
  EXPECT_EQ(names_of(read_images(dir_ / "d", {1}).files), (strings{"d/cat/a.JPG"}));
}

TEST_F(Folders, ThatAreWrong) {
  write("d/cat/a.png", "");
  write("d/b.png", "");
  write("empty/x/notes.txt", "");
  write("plain/notes.txt", "");
  expect_error([&] { read_labelled_images(dir_ / "d", {}); }, "b.png': an image outside of the folders");
  expect_error([&] { read_labelled_images(dir_ / "d/b.png", {}); }, "not a folder");
  expect_error([&] { read_labelled_images(dir_ / "absent", {}); }, "absent': not a folder");
  expect_error([&] { read_labelled_images(dir_ / "empty", {}); }, "empty/x': no images in it");
  expect_error([&] { read_labelled_images(dir_ / "plain", {}); }, "no folders of images in it");
  expect_error([&] { read_images(dir_ / "plain", {}); }, "no images in it");
  expect_error([&] { read_images(dir_ / "absent", {}); }, "absent': cannot read the folder: No such file");
  // A class or an image that is left out would make another number of it.
  write("gone/cat/a.png", "");
  std::filesystem::create_symlink("nowhere", dir_ / "gone/dog");
  expect_error([&] { read_labelled_images(dir_ / "gone", {}); }, "gone/dog': a link to nothing");
  write("pipe/cat/a.png", "");
  ASSERT_EQ(mkfifo((dir_ / "pipe/cat/b.png").c_str(), 0600), 0);
  expect_error([&] { read_labelled_images(dir_ / "pipe", {}); }, "pipe/cat/b.png': not a regular file");
  expect_error([&] { read_images(dir_ / "pipe", {}); }, "pipe/cat/b.png': not a regular file");
}

TEST_F(Folders, LinksAreFollowed) {
  write("cats/a.png", "");
  write("d/dog/b.png", "");
  std::filesystem::create_directory_symlink(dir_ / "cats", dir_ / "d/cat");
  std::filesystem::create_directory_symlink(dir_ / "d", dir_ / "d/dog/circle");
  std::filesystem::create_symlink("nowhere", dir_ / "d/dog/c.png");
  const strings all = {"d/cat/a.png", "d/dog/b.png", "d/dog/c.png"};  // the last fails when it is opened
  EXPECT_EQ(names_of(read_images(dir_ / "d", {}).files), all);
}

// What rs embed takes of a folder, tasks take of it.
TEST_F(Folders, AreThoseOfTheCommandLine) {
  for (const char *name :
       {"d/a.jfif", "d/b.jpe", "d/c.JPEG", "d/c.tga", "d/d.psd", "d/e/f.png", "d/e-g.png", "d/.h.png", "d/.i/j.png"})
    write(name, "");
  std::filesystem::create_directory_symlink(dir_ / "d", dir_ / "d/e/loop");
  write("elsewhere/k.png", "");
  std::filesystem::create_directory_symlink(dir_ / "elsewhere", dir_ / "d/link");
  std::filesystem::create_symlink(dir_ / "elsewhere/k.png", dir_ / "d/l.png");
  const strings wanted = {"d/a.jfif", "d/b.jpe", "d/c.JPEG", "d/e/f.png", "d/e-g.png", "d/l.png", "d/link/k.png"};
  EXPECT_EQ(names_of(read_images(dir_ / "d", {}).files), wanted);
  strings given;
  const std::unique_ptr<text_source> source = images_of_arguments({dir_ / "d"}, {});
  for (text_item item; source->next(&item);) given.push_back(item.image);
  EXPECT_EQ(names_of(given), wanted);
  // The folder itself may be a link.
  std::filesystem::remove(dir_ / "d/e/loop");
  std::filesystem::create_directory_symlink(dir_ / "d/e", dir_ / "to");
  EXPECT_EQ(names_of(read_images(dir_ / "to", {}).files), strings{"to/f.png"});
}

TEST_F(Folders, AreHashedWithTheirImages) {
  write("d/cat/a.png", "one");
  const std::string before = hash_of_data(dir_ / "d", true);
  EXPECT_EQ(hash_of_data(dir_ / "d", true), before);
  write("d/notes.txt", "not an image");
  EXPECT_EQ(hash_of_data(dir_ / "d", true), before);
  write("d/cat/a.png", "two");
  const std::string changed = hash_of_data(dir_ / "d", true);
  EXPECT_NE(changed, before);
  std::filesystem::rename(dir_ / "d/cat", dir_ / "d/dog");
  EXPECT_NE(hash_of_data(dir_ / "d", true), changed) << "the class is the folder's name";
}

// ------------------------------------------------------------------------------------------------ the commands

class EvalImages : public testing::Test {
 protected:
  static constexpr int images = 24;

  static void SetUpTestSuite() {
    shared_ = new temp_dir;
    tiny_dinov2 plain, classifier(2);
    classifier.labels = {"ant", "bee", "cow"};
    ASSERT_EQ(plain.convert(weights("plain"), "f32"), RS_OK) << rs_last_error();
    ASSERT_EQ(classifier.convert(weights("classifier"), "f32"), RS_OK) << rs_last_error();
    ASSERT_EQ(classifier.convert(weights("q8"), "q8"), RS_OK) << rs_last_error();
    // What the model itself says of each image is its class, so that it is always right.
    rs_model *model = nullptr;
    rs_session *session = nullptr;
    ASSERT_EQ(rs_model_load(weights("classifier").c_str(), nullptr, &model), RS_OK) << rs_last_error();
    ASSERT_EQ(rs_session_create(model, nullptr, &session), RS_OK) << rs_last_error();
    for (unsigned i = 0; i < images; ++i) {
      const std::string bytes = tiny_image(i);
      const rs_image image = {RS_IMAGE_FILE, bytes.data(), bytes.size(), 0, 0};
      float logits[3] = {};
      ASSERT_EQ(rs_classify_images(session, &image, 1, nullptr, logits, 3, nullptr), RS_OK) << rs_last_error();
      const auto label = int32_t(std::max_element(logits, logits + 3) - logits);
      found_.push_back(rs_model_label(model, label));
      put(*shared_ / "data/" + found_.back() + "/" + std::to_string(i) + ".ppm", bytes);
    }
    rs_session_free(session);
    rs_model_free(model);
    ASSERT_LT(most_of_one_class(), size_t(images)) << "a model that always says the same tests nothing: another seed";
  }
  static void TearDownTestSuite() {
    delete shared_;
    shared_ = nullptr;
    found_.clear();
  }

  static void put(const std::string &path, const std::string &bytes) {
    std::filesystem::create_directories(std::filesystem::path(path).parent_path());
    write_file(path, bytes);
  }
  static std::string weights(const std::string &name) { return *shared_ / (name + ".rsw"); }
  static std::string data() { return *shared_ / "data"; }
  static size_t most_of_one_class() {
    std::map<std::string, size_t> counts;
    for (const std::string &label : found_) ++counts[label];
    size_t most = 0;
    for (const auto &[label, count] : counts) most = std::max(most, count);
    return most;
  }

  static run_result eval(strings arguments) {
    arguments.insert(arguments.begin(), "eval");
    return rs(arguments);
  }
  static json eval_json(strings arguments) {
    arguments.emplace_back("--json");
    const run_result r = eval(arguments);
    EXPECT_EQ(r.code, 0) << r;
    EXPECT_EQ(r.err, "");
    const std::vector<json> rows = jsonl(r.out);
    return rows.empty() ? json() : rows[0];
  }
  // With these options behind the usual ones.
  static json images_json(strings more, const std::string &model = "classifier") {
    more.insert(more.begin(), {"images", "-m", weights(model), "--data", data(), "--rounds", "1"});
    return eval_json(more);
  }
  static json cosine_json(strings more) {
    more.insert(more.begin(), {"cosine", "-m", weights("plain"), "--data", data(), "--rounds", "1"});
    return eval_json(more);
  }

  temp_dir dir_;
  static temp_dir *shared_;
  static strings found_;
};
temp_dir *EvalImages::shared_ = nullptr;
strings EvalImages::found_;

TEST_F(EvalImages, AccuracyIsThatOfTheModel) {
  const json row = images_json({});
  EXPECT_EQ(row["task"], "images");
  EXPECT_EQ(row["metric"], "accuracy");
  const json &full = row["full"];
  EXPECT_EQ(full["quality"], 100.0);
  EXPECT_EQ(full["images"], images);
  EXPECT_EQ(full["tokens"], images * 17);
  EXPECT_EQ(full["tokens_per_layer"], 17.0);
  EXPECT_GT(full["images_per_second"], 0);
  EXPECT_GT(full["arena_bytes"], 0);
  EXPECT_FALSE(full.contains("texts"));

  // One image in a folder of another class.
  const std::string other = found_[0] == "ant" ? "bee" : "ant";
  std::filesystem::copy(data(), dir_ / "d", std::filesystem::copy_options::recursive);
  std::filesystem::create_directories(dir_ / "d/" + other);
  std::filesystem::rename(dir_ / "d/" + found_[0] + "/0.ppm", dir_ / "d/" + other + "/x.ppm");
  for (const char *task : {"images", "classification"})
    EXPECT_NEAR(eval_json({task, "-m", weights("classifier"), "--data", dir_ / "d", "--rounds", "1"})["full"]["quality"],
                100.0 * (images - 1) / images, 1e-9);
}

TEST_F(EvalImages, TableAndFilesInTurns) {
  const run_result r = eval({"images", "-m", weights("classifier"), "-m", weights("q8"), "--data", data(), "--rounds", "2", "-t",
                             "1", "--drop", "0,0.5", "--drop-score", "norm"});
  EXPECT_EQ(r.code, 0) << r;
  EXPECT_EQ(r.err, "");
  const strings lines = lines_of(r.out);
  ASSERT_EQ(lines.size(), 13u) << r;
  EXPECT_NE(lines[0].find("1 thread; images: 24 images, 2 rounds"), std::string::npos) << r;
  for (const char *name : {"accuracy", "macro-F1", "images/s", "tokens/layer", "left", "arena"})
    EXPECT_NE(lines[2].find(name), std::string::npos) << r;
  EXPECT_EQ(lines[2].find("tokens/s"), std::string::npos) << r;
  EXPECT_NE(lines[5].find("ratio"), std::string::npos) << r;
  EXPECT_EQ(lines[10].find("drop: ratios=0,0.5"), 0u) << r;
  EXPECT_EQ(lines[12].find("peak RSS: "), 0u) << r;
}

TEST_F(EvalImages, DroppingCountsTokensAndSparesTheClassToken) {
  const json row = images_json({"--drop", "0.5,0,0.9", "--drop-score", "norm"});
  // 17 tokens, then 17 - 8 = 9, 9, then all but the class token and one: 9 - 8.
  const double counts[] = {17, 9, 9, 9 - 8};
  EXPECT_NEAR(row["dropped"]["tokens_per_layer"], (counts[0] + counts[1] + counts[2] + counts[3]) / 4, 1e-12);
  EXPECT_NEAR(row["ratio"]["token_layers"], (counts[0] + counts[1] + counts[2] + counts[3]) / (4 * 17), 1e-12);
  EXPECT_EQ(row["full"]["quality"], 100.0);
  const json none = images_json({"--drop", "0,0"});
  EXPECT_EQ(none["dropped"]["metrics"], none["full"]["metrics"]);
  EXPECT_EQ(none["ratio"]["token_layers"], 1.0);
}

TEST_F(EvalImages, QualityDependsOnNothingElse) {
  json first;
  for (const strings &more : {strings{}, {"-t", "1"}, {"-b", "1"}, {"-b", "5", "-t", "2"}}) {
    strings arguments = {"--drop", "0,0.4", "--drop-score", "random", "--drop-mode", "merge"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const json metrics = images_json(arguments)["dropped"]["metrics"];
    if (first.is_null()) first = metrics;
    EXPECT_EQ(metrics, first);
  }
}

TEST_F(EvalImages, HalvesAndLimits) {
  const int first = images_json({"--half", "1"})["full"]["images"], second = images_json({"--half", "2"})["full"]["images"];
  EXPECT_EQ(first + second, images);
  EXPECT_EQ(images_json({"--limit", "6"})["full"]["images"], 6);
  EXPECT_EQ(images_json({"--limit", "6", "--seed", "3"})["full"]["images"], 6);
}

TEST_F(EvalImages, CosineOfVectorsAndPatches) {
  const json none = cosine_json({});
  EXPECT_NEAR(none["full"]["metrics"]["cosine"], 1, 1e-6);
  EXPECT_NEAR(none["full"]["metrics"]["patches"], 1, 1e-6);

  const json restored = cosine_json({"--drop", "0.5", "--drop-score", "norm", "--drop-mode", "restore"});
  EXPECT_NEAR(restored["full"]["metrics"]["patches"], 1, 1e-6);
  const json &metrics = restored["dropped"]["metrics"];
  for (const char *name : {"cosine", "lowest", "patches", "lowest image"}) {
    EXPECT_LT(metrics[name], 0.99999) << name;
    EXPECT_GT(metrics[name], -1) << name;
  }
  EXPECT_LE(metrics["lowest"], metrics["cosine"]);
  EXPECT_LE(metrics["lowest image"], metrics["patches"]);

  // Patches that are gone cannot be compared, which does not count as like or unlike.
  for (const char *mode : {"prune", "merge", "fold"})
    EXPECT_TRUE(
        cosine_json({"--drop", "0.5", "--drop-score", "norm", "--drop-mode", mode})["dropped"]["metrics"]["patches"].is_null())
        << mode;
  // More patches: 6 x 4 of 8 pixels.
  EXPECT_EQ(cosine_json({"--image-size", "48x32"})["full"]["tokens"], images * 25);
  EXPECT_NEAR(cosine_json({"--pooling", "mean", "--drop", "0,0"})["dropped"]["quality"], 1, 1e-6);
}

// The features themselves, computed here by the library.
TEST_F(EvalImages, PatchesAreThoseBehindTheClassToken) {
  rs_model *model = nullptr;
  rs_session *session = nullptr;
  ASSERT_EQ(rs_model_load(weights("plain").c_str(), nullptr, &model), RS_OK) << rs_last_error();
  ASSERT_EQ(rs_session_create(model, nullptr, &session), RS_OK) << rs_last_error();
  rs_drop *drop = nullptr;
  ASSERT_EQ(rs_drop_parse("ratios=0,0.5 score=norm mode=restore", &drop), RS_OK);
  double vectors = 0, patches = 0;
  for (unsigned i = 0; i < images; ++i) {
    const std::string bytes = tiny_image(i);
    const rs_image image = {RS_IMAGE_FILE, bytes.data(), bytes.size(), 0, 0};
    std::vector<float> all[2];
    for (int dropping = 0; dropping < 2; ++dropping) {
      rs_encode_params params = {};
      params.size = sizeof params;
      params.pooling = RS_POOL_NONE;
      params.drop = dropping ? drop : nullptr;
      all[dropping].resize(size_t(17) * 32);
      ASSERT_EQ(rs_encode_images(session, &image, 1, &params, all[dropping].data(), all[dropping].size(), nullptr), RS_OK)
          << rs_last_error();
    }
    const auto similarity = [&](size_t token) { return cosine(&all[0][token * 32], &all[1][token * 32], 32); };
    vectors += similarity(0) / images;
    for (size_t token = 1; token < 17; ++token) patches += similarity(token) / 16 / images;
  }
  const json metrics =
      cosine_json({"--drop", "0,0.5", "--drop-score=norm", "--drop-mode", "restore", "-b", "7"})["dropped"]["metrics"];
  EXPECT_NEAR(metrics["cosine"], vectors, 1e-6);
  EXPECT_NEAR(metrics["patches"], patches, 1e-6);
  rs_drop_free(drop);
  rs_session_free(session);
  rs_model_free(model);
}

TEST_F(EvalImages, AgainstAnotherWeightFile) {
  const json row =
      eval_json({"cosine", "-m", weights("q8"), "--against", weights("classifier"), "--data", data(), "--rounds", "1"});
  EXPECT_GT(row["full"]["metrics"]["cosine"], 0.98);
  EXPECT_LT(row["full"]["metrics"]["cosine"], 1);
  EXPECT_GT(row["full"]["metrics"]["patches"], 0.98);
  EXPECT_LT(row["full"]["metrics"]["patches"], 1);
}

TEST_F(EvalImages, WrongUse) {
  const std::string m = weights("classifier");
  const auto wrong = [&](const strings &arguments, int code, const std::string &part) {
    expect_failure(eval(arguments), code, part);
  };
  put(dir_ / "d/yak/a.ppm", tiny_image(1));
  wrong({"images", "-m", m, "--data", dir_ / "d"}, 1, "d/yak: the model has no label 'yak' (it has 0 to 2: ant, bee, cow)");
  wrong({"images", "-m", m, "--data", dir_ / "none"}, 1, "none': not a folder");
  wrong({"images", "-m", weights("plain"), "--data", data()}, 1, "no classification head");
  // Tasks of texts: said of the model, whatever the data is.
  for (const char *task : {"stsb", "sst2", "retrieval", "squad", "nn"})
    for (const std::string &path : {data(), dir_ / "none"})
      wrong({task, "-m", m, "--data", path}, 1,
            std::string("this model takes only images, and ") + task +
                " is a task of texts; of images are images, classification and cosine");
  expect_failure(rs({"tune", "-m", m, "--metric", "stsb", "--data", data(), "--no-resume"}), 1, "stsb is a task of texts");
  expect_failure(rs({"tune", "-m", m, "--data", data(), "--prompt", "x"}), 2, "--prompt does not go with images");
  expect_failure(rs({"tune", "-m", m, "--data", data(), "--max-tokens", "9"}), 2, "--max-tokens does not go with images");
  write_file(dir_ / "texts.txt", "a text\n");
  wrong({"cosine", "-m", m, "--data", dir_ / "texts.txt"}, 1, "takes only images");
  wrong({"cosine", "-m", m, "--data", dir_ / "texts.txt", "--image-size", "32"}, 2, "--image-size goes with a folder of images");
  wrong({"images", "-m", m, "--data", data(), "--image-size", "0"}, 2,
        "--image-size: '0' is neither a number of pixels nor WIDTHxHEIGHT");
  wrong({"images", "-m", m, "--data", data(), "--image-size", "x"}, 2, "--image-size");
  wrong({"images", "-m", m, "--data", data(), "--image-size", "7"}, 2, "7x7 pixels");
  wrong({"images", "-m", m, "--data", data(), "--pooling", "cls"}, 2, "--pooling does not go with images");
  wrong({"cosine", "-m", m, "--data", data(), "--prompt", "x"}, 2, "--prompt does not go with images");
  wrong({"images", "-m", m, "--data", data(), "--drop", "0,0,0,0,0.5"}, 2, "layers");
  // A file that is no image is named, whatever stands in it.
  for (const std::string &bytes : {std::string("not an image"), std::string(), tiny_image(1).substr(0, 90)}) {
    put(dir_ / "b/ant/a.ppm", tiny_image(1));
    put(dir_ / "b/ant/broken.ppm", bytes);
    wrong({"images", "-m", m, "--data", dir_ / "b"}, 1, "b/ant/broken.ppm: ");
  }
}

TEST_F(EvalImages, TuneFindsAndStores) {
  std::filesystem::copy_file(weights("classifier"), dir_ / "m.rsw");
  const strings command = {"tune", "-m", dir_ / "m.rsw", "--data", data(), "-t", "1", "--passes", "6", "--rounds", "3"};
  strings all = command;
  all.insert(all.end(), {"--store", "loose=90%", "--json"});
  const run_result r = rs(all);
  ASSERT_TRUE(r.code == 0 || r.code == 1) << r;  // 1: nothing was faster on so small a model
  const json report = json::parse(r.out, nullptr, false);
  ASSERT_FALSE(report.is_discarded()) << r;
  EXPECT_EQ(report["metric"], "images") << "a classifier and a folder need no --metric";
  EXPECT_EQ(report["quality"], "accuracy");
  EXPECT_GT(report["schedules"].size(), 1u);
  EXPECT_EQ(report["schedules"][0]["quality"], 100.0);
  EXPECT_EQ(r.code == 0, r.err.find("stored 'loose'") != std::string::npos) << r;
  // Again from its journal, and the table.
  const run_result table = rs(command);
  EXPECT_EQ(table.code, 0) << table;
  EXPECT_NE(table.out.find("ms/image"), std::string::npos) << table;
  EXPECT_NE(table.err.find("going on with"), std::string::npos) << table;

  std::filesystem::copy_file(weights("plain"), dir_ / "plain.rsw");
  const run_result cosine = rs({"tune", "-m", dir_ / "plain.rsw", "--data", data(), "-t", "1", "--passes", "2", "--rounds", "1",
                                "--image-size", "48", "--json"});
  EXPECT_EQ(cosine.code, 0) << cosine;
  EXPECT_EQ(json::parse(cosine.out, nullptr, false)["metric"], "cosine") << cosine;
  write_file(dir_ / "texts.txt", "a text\n");
  expect_failure(rs({"tune", "-m", dir_ / "m.rsw", "--data", dir_ / "texts.txt", "--image-size", "48"}), 2,
                 "--image-size goes with");
}

TEST_F(EvalImages, Bench) {
  const auto bench = [&](strings more) {
    more.insert(more.begin(), {"bench", "-m", weights("plain"), "--seconds", "0.001", "-t", "1"});
    return rs(more);
  };
  const run_result r = bench({"--shapes", "1x32,3x48x32", "--json", "--ops", "--drop", "0.5", "--drop-score", "norm"});
  ASSERT_EQ(r.code, 0) << r;
  const std::vector<json> rows = jsonl(r.out);
  ASSERT_EQ(rows.size(), 4u);
  EXPECT_EQ(rows[0]["tokens"], 17);
  EXPECT_EQ(rows[2]["tokens"], 25);
  EXPECT_EQ(rows[2]["batch"], 3);
  EXPECT_EQ(rows[2]["width"], 48);
  EXPECT_EQ(rows[2]["height"], 32);
  for (const json &row : rows) {
    const double images_per_second = row["images_per_second"], ms = row["median_ms"], batch = row["batch"], tokens = row["tokens"];
    EXPECT_NEAR(images_per_second * ms / 1e3, batch, 1e-6 * batch);
    EXPECT_NEAR(row["tokens_per_second"], images_per_second * tokens, 1e-6 * images_per_second * tokens);
    EXPECT_FALSE(row["ops"].empty());
  }
  EXPECT_GT(rows[1]["times_as_fast"], 0);
  const run_result table = bench({});
  EXPECT_EQ(table.code, 0) << table;
  EXPECT_NE(table.out.find("images/s"), std::string::npos) << table;
  EXPECT_NE(table.out.find(" 8x32 "), std::string::npos) << table;
  expect_failure(bench({"--shapes", "8"}), 2, "'8' is not BATCHxSIZE");
  expect_failure(bench({"--shapes", ""}), 2, "--shapes: is empty");
  expect_failure(bench({"--shapes", "1x7"}), 2, "--shapes: 1x7: an image of 7x7 pixels");
}

// ------------------------------------------------------------------------------------------------ a real model, real data

TEST(eval_images_real, cifar10_agrees_with_the_reference) {
  RS_NEED_SHARED("golden/cifar10_logits.jsonl");
  RS_NEED_SHARED("data/cifar-subset/test");
  const std::string models = env_or("RS_TEST_MODELS", RS_DEFAULT_TEST_MODELS);
  for (const char *type : {"f32", "q8"})
    if (!file_exists(models + "/cifar10-" + type + ".rsw"))
      GTEST_SKIP() << "needs cifar10-dinov2-s as " << type << ", which could not be made";
  // The images that --limit takes: the first ten of each class.
  size_t right = 0, all = 0;
  for (const json &row : jsonl(read_file(shared_file("golden/cifar10_logits.jsonl")))) {
    const std::string image = row["image"];
    if (std::stoi(image.substr(image.find('/') + 1)) >= 10) continue;
    static const strings names = {"airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"};
    const std::vector<float> logits = floats(row["logits"]);
    right += names[size_t(std::max_element(logits.begin(), logits.end()) - logits.begin())] == std::string(row["label"]);
    ++all;
  }
  ASSERT_EQ(all, 100u);
  for (const std::string type : {"f32", "q8"}) {
    const std::string path = models + "/cifar10-" + type + ".rsw";
    const run_result r = rs({"eval", "images", "-m", path, "--data", shared_file("data/cifar-subset/test"), "--limit", "100",
                             "--rounds", "1", "--json"});
    ASSERT_EQ(r.code, 0) << r;
    const json row = jsonl(r.out).at(0);
    EXPECT_EQ(row["full"]["images"], 100);
    // f32: a logit within 1e-3 of another could change places, but none here is that near; q8 rounds, two images of 100.
    EXPECT_NEAR(row["full"]["quality"], double(right), type == "f32" ? 1e-9 : 2) << path;
  }
}

}  // namespace
