// The weight file: what is written is read back, and whatever else is in its place is an error, never a crash.
#include "../rs.h"
#include "test_util.h"
#include "tiny_bert.h"

#include <sys/resource.h>
#include <sys/stat.h>

#include <algorithm>
#include <cmath>
#include <csignal>

namespace {

class weight_file : public testing::Test {
 protected:
  temp_dir dir;
  std::string path = dir / "tiny.rsw", bytes;

  void SetUp() override {
    tiny_bert tiny;
    ASSERT_EQ(tiny.convert(path, "q8"), RS_OK) << rs_last_error();
    bytes = read_file(path);
  }

  // Load these bytes instead; the status, and the message in `error`.
  rs_status load(const std::string &content, bool check_data = false) {
    write_file(dir / "other.rsw", content);
    rs_load_params p = {};
    p.size = sizeof p;
    p.check_data = check_data;
    rs_model *m = nullptr;
    const rs_status status = rs_model_load((dir / "other.rsw").c_str(), &p, &m);
    error = status == RS_OK ? "" : rs_last_error();
    if (status == RS_OK) rs_model_free(m);
    return status;
  }
  std::string error;
};

TEST_F(weight_file, is_read_back_as_it_was_written) {
  const loaded m(path);
  ASSERT_NE(m.model, nullptr);
  rs_model_info info = {};
  info.size = sizeof info;
  ASSERT_EQ(rs_model_get_info(m.model, &info), RS_OK);
  EXPECT_STREQ(info.architecture, "bert");
  EXPECT_STREQ(info.weight_type, "q8");
  EXPECT_EQ(info.dim, 32);
  EXPECT_EQ(info.layers, 2);
  EXPECT_EQ(info.max_tokens, 40);
  EXPECT_EQ(info.file_bytes, bytes.size());
  rs_meta v;
  ASSERT_EQ(rs_model_meta(m.model, "tokenizer.tokens", &v), RS_OK);
  ASSERT_EQ(v.count, 18u);
  size_t n;
  EXPECT_STREQ(rs_meta_string(&v, 12, &n), "##s");
  EXPECT_EQ(n, 3u);
  EXPECT_EQ(rs_meta_string(&v, 18, nullptr), nullptr);
  ASSERT_EQ(rs_model_meta(m.model, "tokenizer.pair", &v), RS_OK);
  EXPECT_EQ(v.i64s[3], -2);
  EXPECT_EQ(rs_model_meta(m.model, "no.such.key", &v), RS_ERR_NOT_FOUND);
  rs_tensor_info t;
  ASSERT_EQ(rs_model_tensor(m.model, "blk.1.attn.qkv.weight", &t), RS_OK);
  EXPECT_EQ(t.type, RS_W8);
  EXPECT_EQ(t.layout, RS_PANELS);
  EXPECT_EQ(t.shape[0], 96);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(t.data) % 64, 0u);
  EXPECT_EQ(rs_model_tensor(m.model, "blk.2.attn.qkv.weight", &t), RS_ERR_NOT_FOUND);
  // The token table is the last of the data.
  rs_tensor_info table;
  ASSERT_EQ(rs_model_tensor(m.model, "token.weight", &table), RS_OK);
  for (size_t i = 0; i < rs_model_tensor_count(m.model); i++) {
    ASSERT_EQ(rs_model_tensor_at(m.model, i, &t), RS_OK);
    EXPECT_LE(t.offset, table.offset);
  }
  EXPECT_EQ(rs_model_verify(m.model), RS_OK) << rs_last_error();
}

TEST_F(weight_file, same_source_same_bytes) {
  tiny_bert tiny;
  ASSERT_EQ(tiny.convert(dir / "again.rsw", "q8"), RS_OK);
  EXPECT_EQ(read_file(dir / "again.rsw"), bytes);
}

TEST_F(weight_file, every_truncation_is_an_error) {
  for (size_t n = 0; n < bytes.size(); n += n < 400 ? 1 : 97) {
    ASSERT_NE(load(bytes.substr(0, n)), RS_OK) << n;
    ASSERT_NE(error.find("other.rsw"), std::string::npos) << error;
  }
  EXPECT_EQ(load(bytes + "x"), RS_ERR_FORMAT);
  EXPECT_NE(error.find("appended"), std::string::npos) << error;
}

TEST_F(weight_file, every_flipped_bit_is_found) {
  // All of header, metadata and directory without being asked; data with check_data.
  size_t unseen = 0;
  for (size_t i = 0; i < bytes.size(); i += i < 128 ? 1 : 101) {
    std::string bad = bytes;
    bad[i] = static_cast<char>(bad[i] ^ (1 << i % 8));
    ASSERT_NE(load(bad, true), RS_OK) << "byte " << i;
    if (load(bad) == RS_OK) unseen++;
  }
  EXPECT_GT(unseen, 0u);  // otherwise load reads all data, which is not wanted
}

TEST_F(weight_file, a_damaged_block_is_named) {
  const loaded m(path);
  rs_tensor_info t;
  ASSERT_EQ(rs_model_tensor(m.model, "token.weight", &t), RS_OK);
  std::string bad = bytes;
  bad[t.offset + 5] ^= 1;
  EXPECT_EQ(load(bad, true), RS_ERR_FORMAT);
  EXPECT_NE(error.find("data are damaged within bytes"), std::string::npos) << error;
}

TEST_F(weight_file, foreign_files_are_named) {
  EXPECT_EQ(load(""), RS_ERR_FORMAT);
  EXPECT_NE(error.find("is empty"), std::string::npos) << error;
  EXPECT_EQ(load(std::string(1000, 'x')), RS_ERR_FORMAT);
  EXPECT_NE(error.find("is not a weight file"), std::string::npos) << error;
  EXPECT_EQ(load("GGUF" + std::string(1000, '\0')), RS_ERR_FORMAT);
  std::string text_mode = bytes;
  text_mode.erase(3, 1);  // "\r\n" became "\n"
  EXPECT_EQ(load(text_mode), RS_ERR_FORMAT);
  EXPECT_NE(error.find("text mode"), std::string::npos) << error;
  rs_model *m;
  EXPECT_EQ(rs_model_load(dir.path().c_str(), nullptr, &m), RS_ERR_IO);
  EXPECT_NE(std::string(rs_last_error()).find("is a directory"), std::string::npos);
  EXPECT_EQ(rs_model_load((dir / "missing.rsw").c_str(), nullptr, &m), RS_ERR_IO);
  EXPECT_NE(std::string(rs_last_error()).find("No such file"), std::string::npos);
  ASSERT_EQ(mkfifo((dir / "fifo").c_str(), 0600), 0);
  EXPECT_EQ(rs_model_load((dir / "fifo").c_str(), nullptr, &m), RS_ERR_IO);
  EXPECT_EQ(rs_model_load("/dev/zero", nullptr, &m), RS_ERR_IO);
}

// Checksums stop accidents, not intent.  A hostile file has the right ones: forge them after each change and see that the
// structural checks hold alone.
class hostile_file : public weight_file {
 protected:
  static uint32_t crc32c(const std::string &s, size_t from, size_t n) {  // bit by bit, apart from the library's
    uint32_t c = ~0u;
    for (size_t i = from; i < from + n; i++) {
      c ^= static_cast<unsigned char>(s[i]);
      for (int k = 0; k < 8; k++) c = (c >> 1) ^ (0x82f63b78u & (0u - (c & 1)));
    }
    return ~c;
  }
  template <class T>
  static void put(std::string *s, size_t at, T v) {
    memcpy(&(*s)[at], &v, sizeof v);
  }
  template <class T>
  static T get(const std::string &s, size_t at) {
    T v;
    memcpy(&v, &s[at], sizeof v);
    return v;
  }
  static void forge(std::string *s) {
    const auto meta = get<uint64_t>(*s, 40);
    if (meta <= s->size()) put<uint32_t>(s, 96, crc32c(*s, meta, s->size() - meta));
    put<uint32_t>(s, 124, crc32c(*s, 0, 124));
  }
  size_t directory() const { return get<uint64_t>(bytes, 56); }
  size_t metadata() const { return get<uint64_t>(bytes, 40); }
  size_t entry(const std::string &name) const { return bytes.find(name + std::string(1, '\0'), directory()); }

  void expect_refused(std::string bad, const std::string &part) {
    forge(&bad);
    ASSERT_NE(load(bad), RS_OK) << part;
    EXPECT_NE(error.find(part), std::string::npos) << error;
    EXPECT_EQ(error.find('\n'), std::string::npos);
  }
};

TEST_F(hostile_file, the_forgery_itself_is_right) {
  std::string same = bytes;
  forge(&same);
  EXPECT_EQ(same, bytes);
  EXPECT_EQ(load(same, true), RS_OK) << error;
}

TEST_F(hostile_file, header_fields_are_checked) {
  for (size_t at = 8; at < 100; at += 4)
    for (uint32_t v : {0u, 1u, 0x7fffffffu, 0x80000000u, 0xffffffffu}) {
      std::string bad = bytes;
      if (get<uint32_t>(bad, at) == v) continue;
      put(&bad, at, v);
      put<uint32_t>(&bad, 124, crc32c(bad, 0, 124));
      ASSERT_NE(load(bad), RS_OK) << "offset " << at << " value " << v;
    }
  std::string bad = bytes;
  put<uint32_t>(&bad, 8, 2);
  expect_refused(bad, "format version 2");
  bad = bytes, put<uint32_t>(&bad, 12, 4);
  expect_refused(bad, "features 0x4");
}

TEST_F(hostile_file, scales_of_inputs_are_checked) {
  const std::string name = "blk.1.mlp.up.weight";
  const auto scaled = [&](const char *type, size_t n, float value) {
    tiny_bert tiny;
    EXPECT_EQ(tiny.convert(path, type), RS_OK) << rs_last_error();
    const rs_status status = add_input_scales(path, dir / "scaled.rsw", {{name, std::vector<float>(n, value)}});
    return status == RS_OK ? read_file(dir / "scaled.rsw") : rs_last_error();
  };
  const std::string good = scaled("q8", 32, 0.5f);
  EXPECT_EQ(load(good, true), RS_OK) << error;
  EXPECT_EQ(get<uint32_t>(good, 12), 1u);
  std::string bad = good;
  put<uint32_t>(&bad, 12, 0);
  expect_refused(bad, "scales of inputs: none by the header, some by the tensors");
  bad = bytes, put<uint32_t>(&bad, 12, 1);
  expect_refused(bad, "scales of inputs: some by the header, none by the tensors");
  bad = good, put<uint32_t>(&bad, 12, 3);
  expect_refused(bad, "features 0x2");
  expect_refused(scaled("q8", 31, 0.5f), "'" + name + ".input_scale': shape [31], expected [32]");
  expect_refused(scaled("f32", 32, 0.5f), "'" + name + "' is f32, but has a scale of inputs");
  EXPECT_NE(scaled("q8", 32, NAN).find("is NaN or infinite"), std::string::npos);
  // A copy is the same file.
  ASSERT_EQ(scaled("q8", 32, 0.5f), good);
  ASSERT_EQ(add_input_scales(dir / "scaled.rsw", dir / "copy.rsw", {}), RS_OK) << rs_last_error();
  EXPECT_EQ(read_file(dir / "copy.rsw"), good);
}

TEST_F(hostile_file, directory_entries_are_checked) {
  const size_t at = entry("blk.0.attn.qkv.weight");
  ASSERT_NE(at, std::string::npos);
  std::string bad = bytes;
  const auto change = [&](size_t field, auto v, const char *part) {
    bad = bytes;
    put(&bad, at + field, v);
    expect_refused(bad, part);
  };
  change(64, uint32_t{99}, "unknown type 99");
  change(64, uint32_t{RS_BF16}, "unknown type 2");
  change(68, uint32_t{7}, "layout 7");
  change(72, uint32_t{0}, "rank 0");
  change(72, uint32_t{5}, "rank 5");
  change(72, uint32_t{3}, "dimension 2 is 0");
  change(80, uint64_t{0}, "dimension 0 is 0");
  change(80, uint64_t{1} << 40, "dimension 0 is");
  change(80, ~uint64_t{0}, "dimension 0 is");
  change(80, uint64_t{1} << 31, "bytes");
  change(80, uint64_t{97}, "bytes");  // one more channel than there are bytes
  change(88, uint64_t{70000}, "K <= 65536");
  change(112, uint64_t{64}, "not within the data");
  change(112, ~uint64_t{0} - 63, "not within the data");
  change(112, get<uint64_t>(bytes, at + 112) + 64, "expected");  // a hole before, an overlap behind
  change(120, ~uint64_t{0}, "bytes");
  change(0, uint64_t{0}, "malformed");
  change(0, char{'\n'}, "malformed");
  change(0, char{'~'}, "not in order");
  bad = bytes;
  memset(&bad[at], 'x', 64);  // no NUL
  expect_refused(bad, "malformed");
  bad = bytes;
  memcpy(&bad[at + 128], &bad[at], 128);  // twice the same
  expect_refused(bad, "not in order");
}

TEST_F(hostile_file, shapes_must_fit_the_hyper_parameters) {
  // [96, 32] -> [48, 64]: as many bytes but for scales, so put together a consistent lie: hidden_size in the metadata instead.
  const auto meta_i64 = [&](const std::string &key) {
    size_t at = bytes.find(key, metadata());
    EXPECT_NE(at, std::string::npos);
    return at + (key.size() / 8 + 1) * 8;
  };
  std::string bad = bytes;
  for (const auto &[key, value, part] :
       std::vector<std::tuple<const char *, int64_t, const char *>>{{"bert.hidden_size", 64, "expected ["},
                                                                    {"bert.hidden_size", 0, "'bert.hidden_size' is 0"},
                                                                    {"bert.hidden_size", int64_t{1} << 40, "'bert.hidden_size' is"},
                                                                    {"bert.num_layers", 3, "blk.2."},
                                                                    {"bert.num_heads", 5, "5 heads do not divide"},
                                                                    {"bert.intermediate_size", 32, "expected [32"},
                                                                    {"bert.max_positions", 80, "expected [80"},
                                                                    {"bert.vocab_size", 17, "expected [17"},
                                                                    {"encode.max_tokens", 41, "more than the 40 positions"},
                                                                    {"encode.max_tokens", 2, "no room for text"},
                                                                    {"encode.max_tokens", -1, "is -1"}}) {
    bad = bytes;
    put(&bad, meta_i64(key), value);
    expect_refused(bad, part);
  }
}

TEST_F(hostile_file, values_are_checked) {
  const size_t at = entry("blk.0.attn.qkv.weight");
  const auto offset = get<uint64_t>(bytes, at + 112);
  for (float scale : {0.0f, -1.0f, NAN, INFINITY}) {
    std::string bad = bytes;
    put(&bad, offset + 96 * 32, scale);
    expect_refused(bad, "a scale is not finite and positive");
  }
  std::string bad = bytes;
  put(&bad, get<uint64_t>(bytes, entry("blk.0.mlp.norm.bias") + 112), NAN);
  expect_refused(bad, "NaN");
  // Deep checks are rs_model_verify's: weights out of their range, column sums that lie.
  const auto verify = [&](std::string b, const char *part) {
    forge(&b);
    // the block's own checksum as well: all data of this file are in few blocks
    const auto data = get<uint64_t>(b, 24), size = get<uint64_t>(b, 32), crcs = get<uint64_t>(b, 72);
    for (uint64_t i = 0; i * 65536 < size; i++)
      put<uint32_t>(&b, crcs + 4 * i, crc32c(b, data + i * 65536, std::min<uint64_t>(65536, size - i * 65536)));
    forge(&b);
    write_file(dir / "other.rsw", b);
    rs_model *m = nullptr;
    ASSERT_EQ(rs_model_load((dir / "other.rsw").c_str(), nullptr, &m), RS_OK) << rs_last_error();
    EXPECT_EQ(rs_model_verify(m), RS_ERR_FORMAT) << part;
    EXPECT_NE(std::string(rs_last_error()).find(part), std::string::npos) << rs_last_error();
    rs_model_free(m);
  };
  // 4-bit weights: their nibbles, then the multipliers.
  {
    tiny_bert tiny;
    ASSERT_EQ(tiny.convert(path, "q4"), RS_OK) << rs_last_error();
    const std::string four = read_file(path);
    const size_t mult =
        get<uint64_t>(four, four.find(std::string("blk.0.attn.qkv.weight") + '\0', get<uint64_t>(four, 56)) + 112) + 96 * 32 / 2;
    bad = four, bad[mult + 95] = 16;
    forge(&bad);
    EXPECT_EQ(load(bad), RS_OK) << error;
    bad[mult + 95] = 17;
    expect_refused(bad, "blk.0.attn.qkv.weight': a multiplier of a group is above 16");
    bad[mult + 95] = '\xff';
    expect_refused(bad, "above 16");
  }
  bad = bytes, bad[offset] = 127, bad[offset + 1] = 127;
  verify(bad, "pair of weights is over the limit");
  bad = bytes, put<int32_t>(&bad, offset + 96 * 32 + 96 * 4, get<int32_t>(bytes, offset + 96 * 32 + 96 * 4) + 1);
  verify(bad, "column sum");
}

TEST_F(hostile_file, metadata_are_checked) {
  std::string bad = bytes;
  put<uint32_t>(&bad, metadata(), 0xffffffffu);
  expect_refused(bad, "metadata entry 0");
  bad = bytes, put<uint32_t>(&bad, metadata() + 4, 77);
  expect_refused(bad, "unknown kind 77");
  bad = bytes, put<uint64_t>(&bad, metadata() + 8, ~uint64_t{0});
  expect_refused(bad, "metadata entry 0");
  bad = bytes, put<uint32_t>(&bad, 88, get<uint32_t>(bytes, 88) + 1);
  expect_refused(bad, "metadata end within entry");
  bad = bytes, put<uint32_t>(&bad, 88, get<uint32_t>(bytes, 88) - 1);
  expect_refused(bad, "behind the last metadata entry");
  // An array of strings whose offsets run backwards, or out.
  const size_t tokens = bytes.find("tokenizer.tokens", metadata()) + 24;
  ASSERT_EQ(get<uint64_t>(bytes, tokens), 18u);
  for (uint32_t v : {0u, 3u, 0xffffffffu}) {
    bad = bytes, put<uint32_t>(&bad, tokens + 8 + 4 * 3, v);
    expect_refused(bad, "'tokenizer.tokens': the value is malformed");
  }
  bad = bytes, put<uint64_t>(&bad, tokens, uint64_t{1} << 61);
  expect_refused(bad, "'tokenizer.tokens': the value is malformed");
}

// Thousands of random changes with right checksums: no crash, under the sanitizers too, and always one line.
TEST_F(hostile_file, random_changes_never_crash) {
  std::mt19937 rng(7);
  const size_t tail = metadata();
  for (int i = 0; i < 1500; i++) {
    std::string bad = bytes;
    for (unsigned n = 1 + rng() % 3; n; n--) {
      const size_t at = rng() % 4 ? tail + rng() % (bad.size() - tail) : rng() % 128;
      bad[at] = static_cast<char>(rng() % 3 ? rng() : bad[at] ^ (1 << rng() % 8));
    }
    forge(&bad);
    if (load(bad) != RS_OK) {
      ASSERT_EQ(error.find('\n'), std::string::npos);
    }
  }
}

// ---- writing

TEST_F(weight_file, the_writer_checks_its_input) {
  rs_writer *w;
  ASSERT_EQ(rs_writer_open((dir / "new.rsw").c_str(), &w), RS_OK);
  const int64_t two = 2;
  const float values[2] = {1, 2};
  EXPECT_EQ(rs_writer_add(w, "", RS_F32, RS_ROWS, 1, &two, values, 8), RS_ERR_ARGUMENT);
  EXPECT_EQ(rs_writer_add(w, "with space", RS_F32, RS_ROWS, 1, &two, values, 8), RS_ERR_ARGUMENT);
  EXPECT_EQ(rs_writer_add(w, std::string(64, 'x').c_str(), RS_F32, RS_ROWS, 1, &two, values, 8), RS_ERR_ARGUMENT);
  EXPECT_EQ(rs_writer_add(w, "x", RS_F32, RS_ROWS, 1, &two, values, 7), RS_ERR_ARGUMENT);
  EXPECT_EQ(rs_writer_add(w, "x", RS_F32, RS_ROWS, 1, &two, values, 8), RS_OK);
  EXPECT_EQ(rs_writer_add(w, "x", RS_F32, RS_ROWS, 1, &two, values, 8), RS_ERR_ARGUMENT);
  EXPECT_STREQ(rs_last_error(), "tensor 'x' is added twice");
  EXPECT_EQ(rs_writer_set_i64(w, "key", 1), RS_OK);
  EXPECT_EQ(rs_writer_set_str(w, "key", "again"), RS_ERR_ARGUMENT);
  EXPECT_EQ(rs_writer_set_f64(w, "nan", NAN), RS_ERR_NUMERIC);
  const rs_text none = {nullptr, RS_NUL_TERMINATED};
  EXPECT_EQ(rs_writer_set_strs(w, "none", &none, 1), RS_ERR_ARGUMENT);
  EXPECT_STREQ(rs_last_error(), "metadata 'none': text 0 is NULL");
  const float holes[] = {1, NAN, -INFINITY};
  EXPECT_EQ(rs_writer_set_f32s(w, "holes", holes, 3), RS_ERR_NUMERIC);
  EXPECT_STREQ(rs_last_error(), "metadata 'holes': value 1 is NaN or infinite");
  EXPECT_EQ(rs_writer_add(w, "holes", RS_F32, RS_ROWS, 1, &two, holes + 1, 8), RS_ERR_NUMERIC);
  EXPECT_STREQ(rs_last_error(), "tensor 'holes': value 0 is NaN or infinite");
  EXPECT_EQ(rs_writer_set_str(w, "latin", "caf\xe9"), RS_ERR_TEXT);
  EXPECT_STREQ(rs_last_error(), "metadata 'latin': text 0: invalid UTF-8 at byte 3");
  const rs_text latin[] = {{"fine", 4}, {"\xe9", 1}};
  EXPECT_EQ(rs_writer_set_strs(w, "latin", latin, 2), RS_ERR_TEXT);
  EXPECT_STREQ(rs_last_error(), "metadata 'latin': text 1: invalid UTF-8 at byte 0");
  rs_writer_free(w);
  EXPECT_FALSE(file_exists(dir / "new.rsw"));
  size_t left = 0;
  for (const auto &f : std::filesystem::directory_iterator(dir.path())) left += f.path().filename().string().find("new.rsw") == 0;
  EXPECT_EQ(left, 0u) << "the temporary file stays";
  EXPECT_EQ(rs_writer_open(dir.path().c_str(), &w), RS_ERR_IO);
  EXPECT_EQ(rs_writer_open((dir / "no/such/folder.rsw").c_str(), &w), RS_ERR_IO);
}

TEST_F(weight_file, nothing_goes_into_a_finished_one) {
  const int64_t two = 2;
  const float values[2] = {1, 2};
  rs_writer *w;
  ASSERT_EQ(rs_writer_open((dir / "new.rsw").c_str(), &w), RS_OK);
  ASSERT_EQ(rs_writer_finish(w), RS_OK) << rs_last_error();
  const std::string finished = dir / "new.rsw" + " is finished already";
  EXPECT_EQ(rs_writer_set_i64(w, "late", 1), RS_ERR_ARGUMENT);
  EXPECT_EQ(rs_last_error(), finished);
  EXPECT_EQ(rs_writer_add(w, "late", RS_F32, RS_ROWS, 1, &two, values, 8), RS_ERR_ARGUMENT);
  EXPECT_EQ(rs_last_error(), finished);
  EXPECT_EQ(rs_writer_finish(w), RS_ERR_ARGUMENT);
  rs_writer_free(w);
  EXPECT_TRUE(file_exists(dir / "new.rsw"));

  // Nor into one that could not be.
  ASSERT_EQ(rs_writer_open((dir / "taken").c_str(), &w), RS_OK);
  std::filesystem::create_directory(dir / "taken");
  for (const char *error : {"taken: rename: ", "taken: an earlier write failed"}) {
    EXPECT_EQ(rs_writer_finish(w), RS_ERR_IO);
    EXPECT_NE(std::string(rs_last_error()).find(error), std::string::npos) << rs_last_error();
  }
  EXPECT_EQ(rs_writer_set_i64(w, "late", 1), RS_ERR_IO);
  rs_writer_free(w);
}

TEST_F(weight_file, is_written_where_its_path_was_when_it_was_opened) {
  temp_dir elsewhere;
  const std::filesystem::path before = std::filesystem::current_path();
  for (const bool finish : {true, false}) {
    std::filesystem::current_path(dir.path());
    rs_writer *w;
    ASSERT_EQ(rs_writer_open(finish ? "new.rsw" : "./left.rsw", &w), RS_OK) << rs_last_error();
    std::filesystem::current_path(elsewhere.path());
    const rs_status status = finish ? rs_writer_finish(w) : RS_OK;
    EXPECT_EQ(status, RS_OK) << rs_last_error();
    rs_writer_free(w);
  }
  std::filesystem::current_path(before);
  std::vector<std::string> names;
  for (const auto &f : std::filesystem::directory_iterator(dir.path())) names.push_back(f.path().filename());
  std::sort(names.begin(), names.end());
  EXPECT_EQ(names, (std::vector<std::string>{"new.rsw", "tiny.rsw"}));
  EXPECT_TRUE(std::filesystem::is_empty(elsewhere.path()));
}

// As any other program does it: by the umask, or as the file was before.
TEST_F(weight_file, has_the_mode_that_files_have) {
  const auto mode_of_new = [&](const std::string &name) {
    EXPECT_EQ(tiny_bert(2).convert(dir / name, "f32"), RS_OK) << rs_last_error();
    struct stat st = {};
    EXPECT_EQ(stat((dir / name).c_str(), &st), 0);
    return st.st_mode & 07777;
  };
  for (const mode_t mask : {022, 077, 0}) {
    const mode_t before = umask(mask);
    EXPECT_EQ(mode_of_new("of" + std::to_string(mask)), 0666 & ~mask);
    EXPECT_EQ(umask(before), mask);
  }
  ASSERT_EQ(chmod(path.c_str(), 0640), 0);
  EXPECT_EQ(mode_of_new("tiny.rsw"), 0640u);
}

TEST_F(weight_file, a_full_disk_leaves_the_old_file) {
  // RLIMIT_FSIZE makes write() fail as a full disk does.
  struct rlimit before, small = {};
  getrlimit(RLIMIT_FSIZE, &before);
  small.rlim_cur = 20000, small.rlim_max = before.rlim_max;
  signal(SIGXFSZ, SIG_IGN);
  setrlimit(RLIMIT_FSIZE, &small);
  tiny_bert other(2);
  EXPECT_EQ(other.convert(path, "f32"), RS_ERR_IO);
  setrlimit(RLIMIT_FSIZE, &before);
  EXPECT_NE(std::string(rs_last_error()).find("tiny.rsw: write: File too large"), std::string::npos) << rs_last_error();
  EXPECT_EQ(read_file(path), bytes);
  size_t files = 0;
  for (const auto &f : std::filesystem::directory_iterator(dir.path())) files += f.is_regular_file();
  EXPECT_EQ(files, 1u);
}

TEST_F(weight_file, a_copy_differs_only_in_the_metadata_that_were_set) {
  const loaded m(path);
  rs_writer *w;
  ASSERT_EQ(rs_writer_open((dir / "copy.rsw").c_str(), &w), RS_OK);
  ASSERT_EQ(rs_writer_set_i64(w, "encode.max_tokens", 20), RS_OK);
  ASSERT_EQ(rs_writer_set_str(w, "extra", "yes"), RS_OK);
  ASSERT_EQ(rs_writer_copy(w, m.model), RS_OK) << rs_last_error();
  ASSERT_EQ(rs_writer_finish(w), RS_OK) << rs_last_error();
  rs_writer_free(w);
  const loaded copy(dir / "copy.rsw");
  ASSERT_NE(copy.model, nullptr);
  EXPECT_EQ(rs_model_verify(copy.model), RS_OK);
  EXPECT_EQ(rs_model_meta_count(copy.model), rs_model_meta_count(m.model) + 1);
  rs_meta v;
  ASSERT_EQ(rs_model_meta(copy.model, "encode.max_tokens", &v), RS_OK);
  EXPECT_EQ(v.i64, 20);
  for (size_t i = 0; i < rs_model_tensor_count(m.model); i++) {
    rs_tensor_info a, b;
    ASSERT_EQ(rs_model_tensor_at(m.model, i, &a), RS_OK);
    ASSERT_EQ(rs_model_tensor_at(copy.model, i, &b), RS_OK);
    EXPECT_STREQ(a.name, b.name);
    EXPECT_EQ(memcmp(a.data, b.data, a.bytes), 0) << a.name;
  }
}

TEST_F(weight_file, type_ids_of_its_template_are_those_of_the_model) {
  const loaded m(path);
  rs_writer *w;
  const int64_t types[] = {0, 5, 0};
  ASSERT_EQ(rs_writer_open((dir / "bad.rsw").c_str(), &w), RS_OK);
  ASSERT_EQ(rs_writer_set_i64s(w, "tokenizer.single_types", types, 3), RS_OK);
  ASSERT_EQ(rs_writer_copy(w, m.model), RS_OK) << rs_last_error();
  ASSERT_EQ(rs_writer_finish(w), RS_OK) << rs_last_error();
  rs_writer_free(w);
  rs_model *bad = nullptr;
  EXPECT_EQ(rs_model_load((dir / "bad.rsw").c_str(), nullptr, &bad), RS_ERR_FORMAT);
  EXPECT_NE(std::string(rs_last_error()).find("type ids up to 5, the model 2 of them"), std::string::npos) << rs_last_error();
  rs_model_free(bad);
}

TEST_F(weight_file, may_be_moved_and_deleted_while_in_use) {
  const loaded m(path);
  rs_text text = {"hello world", RS_NUL_TERMINATED};
  std::vector<float> before(32), after(32);
  ASSERT_EQ(rs_encode(m.session, &text, 1, nullptr, before.data(), 32, nullptr), RS_OK) << rs_last_error();
  std::filesystem::rename(path, dir / "moved.rsw");
  std::filesystem::remove(dir / "moved.rsw");
  ASSERT_EQ(rs_encode(m.session, &text, 1, nullptr, after.data(), 32, nullptr), RS_OK) << rs_last_error();
  EXPECT_EQ(before, after);
}

}  // namespace
