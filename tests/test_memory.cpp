// No allocation in a run after warm-up.  A program of its own, since it replaces operator new.
#include "../rs.h"
#include "test_util.h"
#include "tiny_bert.h"
#include "tokenizer_util.h"

#include <atomic>
#include <cstdlib>
#include <new>

static std::atomic<size_t> allocations{0};

// Not inlined: the compiler would see free() of what it thinks came from the usual operator new.
__attribute__((noinline)) void *operator new(size_t bytes) {
  allocations++;
  if (void *p = std::malloc(bytes)) return p;
  throw std::bad_alloc();
}
__attribute__((noinline)) void *operator new(size_t bytes, const std::nothrow_t &) noexcept {
  allocations++;
  return std::malloc(bytes);
}
__attribute__((noinline)) void operator delete(void *p) noexcept { std::free(p); }
__attribute__((noinline)) void operator delete(void *p, size_t) noexcept { std::free(p); }

namespace {

TEST(memory, nothing_is_allocated_after_warm_up) {
  const temp_dir dir;
  tiny_bert tiny(6);
  const double ratios[] = {0.3, 0.5};
  rs_drop drop = {};
  drop.size = sizeof drop;
  drop.ratios = ratios, drop.n_ratios = 2;
  drop.protect = RS_PROTECT_SPECIAL;
  for (const auto &[type, mode, score, drop_mode] :
       {std::tuple("f32", RS_THREADS_AUTO, "", RS_DROP_PRUNE), std::tuple("f16", RS_THREADS_LATENCY, "", RS_DROP_PRUNE),
        std::tuple("q8", RS_THREADS_THROUGHPUT, "", RS_DROP_PRUNE), std::tuple("q4", RS_THREADS_THROUGHPUT, "", RS_DROP_PRUNE),
        std::tuple("q8", RS_THREADS_THROUGHPUT, "norm-mlp", RS_DROP_PRUNE),
        std::tuple("q8", RS_THREADS_LATENCY, "mlp", RS_DROP_MERGE)}) {
    ASSERT_EQ(tiny.convert(dir / "tiny.rsw", type), RS_OK) << rs_last_error();
    const loaded m(dir / "tiny.rsw", 2, 0, mode);
    const std::string long_text(900, '.');
    const rs_text texts[] = {
        {"the cat sat on the mat", RS_NUL_TERMINATED}, {"", 0}, {"hello", 5}, {long_text.data(), long_text.size()}};
    std::vector<float> out(4 * 32);
    rs_text_info infos[4];
    rs_encode_params params = {};
    params.size = sizeof params;
    params.prompt = "a ";
    params.long_text = RS_LONG_CHUNK;
    drop.score = score, drop.mode = drop_mode;
    params.drop = *score ? &drop : nullptr;
    const auto run = [&] { return rs_encode(m.session, texts, 4, &params, out.data(), out.size(), infos); };
    ASSERT_EQ(run(), RS_OK) << rs_last_error();
    ASSERT_EQ(run(), RS_OK) << rs_last_error();
    const size_t before = allocations, arena = rs_session_arena_bytes(m.session);
    for (int i = 0; i < 3; i++) ASSERT_EQ(run(), RS_OK) << rs_last_error();
    EXPECT_EQ(allocations, before) << type << " " << score;
    EXPECT_EQ(rs_session_arena_bytes(m.session), arena) << type << " " << score;
  }
}

TEST(memory, bpe_allocates_nothing_after_warm_up) {
  rs_tokenizer_spec spec = bpe_spec({{"a", "b"}, {"ab", "ab"}, {"a", "b</w>"}});
  spec.added_flags[0] |= RS_ADDED_NORMALIZED;
  const auto t = create(spec);
  const auto scratch = rs_tokenizer_scratch_new();
  std::string long_word;
  for (int i = 0; i < 5000; i++) long_word += i % 3 ? "ab" : "c";
  rs_tokens tokens;
  size_t before = 0;
  for (int i = 0; i < 4; i++) {
    if (i == 2) before = allocations;
    for (const std::string_view text :
         {std::string_view("a ab abab don't 2024!!"), std::string_view("e\u0301\u0323 \uAC00 \U0001F600"),
          std::string_view("x <|STARTOFTEXT|>y <|endoftext|>"), std::string_view(long_word)}) {
      tokens.clear();
      ASSERT_EQ(rs_tokenizer_encode(t.get(), scratch.get(), as_text(text), &tokens), RS_OK) << rs_last_error();
    }
  }
  EXPECT_EQ(allocations, before);
}

}  // namespace
