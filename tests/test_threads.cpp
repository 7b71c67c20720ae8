// How threads share work: whatever the mode and however many threads there are for the CPUs, the same bits, in bounded time and
// memory.
#include "../rs.h"
#include "test_util.h"
#include "tiny_bert.h"

#include <sys/resource.h>

#include <atomic>
#include <thread>

namespace {

using clock_type = std::chrono::steady_clock;

double seconds_since(clock_type::time_point start) { return std::chrono::duration<double>(clock_type::now() - start).count(); }

constexpr rs_thread_mode all_modes[] = {RS_THREADS_AUTO, RS_THREADS_LATENCY, RS_THREADS_THROUGHPUT};

class threads : public testing::Test {
 protected:
  static constexpr size_t dim = 32;

  void SetUp() override { ASSERT_EQ(tiny.convert(path, "q8"), RS_OK) << rs_last_error(); }

  // Sequences of 1 to 40 tokens, as ids.
  void make_sequences(size_t n) {
    std::mt19937 rng(3);
    ids.clear();
    starts.assign(1, 0);
    for (size_t i = 0; i < n; i++) {
      for (size_t tokens = 1 + rng() % 40; tokens > 0; tokens--) ids.push_back(static_cast<int32_t>(rng() % 18));
      starts.push_back(ids.size());
    }
  }

  std::vector<float> encode(rs_session *s, rs_pooling pooling = RS_POOL_DEFAULT) const {
    rs_encode_params p = {};
    p.size = sizeof p;
    p.pooling = pooling;
    std::vector<float> out((pooling == RS_POOL_NONE ? ids.size() : starts.size() - 1) * dim);
    EXPECT_EQ(rs_encode_ids(s, ids.data(), nullptr, starts.data(), starts.size() - 1, &p, out.data(), out.size()), RS_OK)
        << rs_last_error();
    return out;
  }

  const temp_dir dir;
  const std::string path = dir / "tiny.rsw";
  tiny_bert tiny{7};
  std::vector<int32_t> ids;
  std::vector<size_t> starts;
};

TEST_F(threads, modes_give_the_same_bits) {
  const loaded one(path, 1);
  for (size_t n : {1, 2, 3, 7, 64, 500})
    for (rs_pooling pooling : {RS_POOL_DEFAULT, RS_POOL_NONE}) {
      make_sequences(n);
      const std::vector<float> wanted = encode(one.session, pooling);
      for (rs_thread_mode mode : all_modes)
        for (const auto &[count, budget] : {std::pair(2, 0), std::pair(3, 100), std::pair(5, n > 7 ? 200 : 1)}) {
          const loaded m(path, count, budget, mode);
          EXPECT_EQ(encode(m.session, pooling), wanted) << n << " sequences, mode " << mode << ", " << count << " threads";
        }
    }
}

// Four threads for every CPU: none may wait for another by using up the CPU that the other needs.
TEST_F(threads, more_than_there_are_cpus) {
  const int cpus = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  make_sequences(40);
  const loaded one(path, 1);
  const std::vector<float> wanted = encode(one.session);
  const auto start_one = clock_type::now();
  for (int i = 0; i < 50; i++) encode(one.session);
  const double alone = seconds_since(start_one);
  for (rs_thread_mode mode : all_modes) {
    const loaded many(path, std::min(4 * cpus, 64), 0, mode);
    const auto start = clock_type::now();
    for (int i = 0; i < 50; i++) ASSERT_EQ(encode(many.session), wanted);
    const double took = seconds_since(start);
    printf("mode %d: %.1f ms a batch, one thread %.1f ms\n", mode, 20 * took, 20 * alone);
    // A turn of the scheduler, some 4 ms, lost at each of 20 operators or more would come to 4 s at the least.
    EXPECT_LT(took, 2.5 + 20 * alone) << "mode " << mode;
  }
}

TEST_F(threads, memory_is_bounded_in_every_mode) {
  for (rs_thread_mode mode : all_modes) {
    const loaded m(path, 3, 240, mode);
    make_sequences(300);
    encode(m.session);
    const size_t arena = rs_session_arena_bytes(m.session);
    make_sequences(3000);
    encode(m.session);
    EXPECT_LE(rs_session_arena_bytes(m.session), arena + arena / 10) << "mode " << mode;
    // One part of 240 tokens needs as much as three of 80, but for what every thread has for itself (a tenth here); auto may have
    // had both.
    const loaded one(path, 1, 240);
    encode(one.session);
    EXPECT_LT(rs_session_arena_bytes(m.session), 3.3 * static_cast<double>(rs_session_arena_bytes(one.session))) << "mode " << mode;
  }
}

TEST_F(threads, errors_of_other_threads_are_reported) {
  make_sequences(300);
  std::vector<int32_t> types(ids.size());
  types[ids.size() / 2] = 1000;
  std::vector<float> out(300 * dim);
  for (rs_thread_mode mode : all_modes) {
    const loaded m(path, 4, 0, mode);
    EXPECT_EQ(rs_encode_ids(m.session, ids.data(), types.data(), starts.data(), 300, nullptr, out.data(), out.size()),
              RS_ERR_ARGUMENT);
    EXPECT_NE(std::string(rs_last_error()).find("id 1000"), std::string::npos) << rs_last_error();
  }
}

// The caller's allocator need not know of threads.
TEST_F(threads, the_allocator_is_called_on_the_threads_of_the_caller) {
  struct counter {
    std::thread::id caller = std::this_thread::get_id();
    std::atomic<size_t> now{0}, calls{0}, elsewhere{0};
    size_t limit = SIZE_MAX;
  } count;
  const rs_allocator hook = {[](void *ctx, size_t bytes, size_t align) -> void * {
                               auto *c = static_cast<counter *>(ctx);
                               c->elsewhere += std::this_thread::get_id() != c->caller;
                               if (c->calls++ >= c->limit) return nullptr;
                               c->now += bytes;
                               return std::aligned_alloc(align, (bytes + align - 1) / align * align);
                             },
                             [](void *ctx, void *p, size_t bytes) {
                               static_cast<counter *>(ctx)->now -= bytes;
                               std::free(p);
                             },
                             &count};
  const loaded m(path, 1);
  make_sequences(300);
  rs_session_params p = {};
  p.size = sizeof p;
  p.threads = 4;
  p.allocator = &hook;
  p.thread_mode = RS_THREADS_THROUGHPUT;
  rs_session *s = nullptr;
  ASSERT_EQ(rs_session_create(m.model, &p, &s), RS_OK);
  encode(s);
  EXPECT_EQ(count.now, rs_session_arena_bytes(s));
  EXPECT_GE(count.calls, 4u);
  rs_session_free(s);
  EXPECT_EQ(count.now, 0u);
  EXPECT_EQ(count.elsewhere, 0u);

  count.limit = count.calls + 2;  // the third thread gets none
  ASSERT_EQ(rs_session_create(m.model, &p, &s), RS_OK);
  std::vector<float> out(300 * dim);
  EXPECT_EQ(rs_encode_ids(s, ids.data(), nullptr, starts.data(), 300, nullptr, out.data(), out.size()), RS_ERR_MEMORY);
  rs_session_free(s);
  EXPECT_EQ(count.now, 0u);
}

TEST_F(threads, sessions_come_and_go) {
  make_sequences(9);
  const loaded one(path, 1);
  const std::vector<float> wanted = encode(one.session);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; i++)
    callers.emplace_back([&] {
      for (int k = 0; k < 20; k++) {
        const loaded m(path, 3, 0, all_modes[k % 3]);
        if (k % 4 && encode(m.session) != wanted) wrong++;  // every fourth never runs
      }
    });
  for (std::thread &t : callers) t.join();
  EXPECT_EQ(wrong, 0);
}

// What f() returns in a child process; one that hangs is ended.
template <class F>
int in_child(F f) {
  fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    alarm(30);
    _exit(f());
  }
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

#ifndef __SANITIZE_THREAD__  // which does not take threads behind a fork

// The threads of the parent are not there.
TEST_F(threads, a_forked_child_does_not_wait_for_them) {
  const loaded m(path, 2, 0, RS_THREADS_LATENCY);
  make_sequences(40);
  const std::vector<float> wanted = encode(m.session);
  EXPECT_EQ(in_child([&] { return encode(m.session) != wanted; }), 0);
  EXPECT_EQ(encode(m.session), wanted);
}

#ifndef __SANITIZE_ADDRESS__  // whose own memory is beyond any limit

// libgomp would end the process.
TEST_F(threads, there_may_be_fewer_than_were_asked_for) {
  constexpr int no_limit = 77, most = 200;
  const loaded one(path, 1), many(path, most, 0, RS_THREADS_LATENCY);
  make_sequences(40);
  const std::vector<float> wanted = encode(one.session);
  for (const bool processes : {true, false}) {
    const int result = in_child([&] {
      int wrong = 1;
      std::thread([&] {  // that OpenMP has not seen
        struct rlimit limit = {1, 1};
        if (processes) {
          if (!getuid() && setuid(65534)) wrong = no_limit;  // root has no limit
          if (setrlimit(RLIMIT_NPROC, &limit)) wrong = no_limit;
        } else {
          long pages = 0;
          FILE *f = fopen("/proc/self/statm", "r");
          if (!f || fscanf(f, "%ld", &pages) != 1) wrong = no_limit;
          if (f) fclose(f);
          limit.rlim_cur = limit.rlim_max = static_cast<rlim_t>(pages * sysconf(_SC_PAGESIZE)) + (100 << 20);
          if (setrlimit(RLIMIT_AS, &limit)) wrong = no_limit;
        }
        if (wrong == no_limit) return;
        for (int i = 0; i < 3; i++)
          if (encode(many.session) != wanted) return;
        std::vector<pthread_t> tried(most);  // is there a limit at all?
        while (!tried.empty() && !pthread_create(
                                     &tried.back(), nullptr, [](void *) -> void * { return pause(), nullptr; }, nullptr))
          tried.pop_back();
        wrong = tried.empty() ? no_limit : 0;
      })
          .join();
      return wrong;
    });
    if (result == no_limit) printf("%s: can't be limited here\n", processes ? "threads" : "memory");
    else EXPECT_EQ(result, 0) << (processes ? "threads" : "memory");
  }
}

#endif
#endif

TEST_F(threads, profiles_are_of_the_latency_mode) {
  const loaded m(path, 1);
  rs_session_params p = {};
  p.size = sizeof p;
  p.threads = 2;
  p.profile = true;
  p.thread_mode = RS_THREADS_THROUGHPUT;
  rs_session *s = nullptr;
  ASSERT_EQ(rs_session_create(m.model, &p, &s), RS_OK);
  make_sequences(100);
  encode(s);
  EXPECT_GT(rs_session_profile_count(s), 0u);
  rs_session_free(s);
  p.thread_mode = static_cast<rs_thread_mode>(7);
  EXPECT_EQ(rs_session_create(m.model, &p, &s), RS_ERR_ARGUMENT);
  EXPECT_STREQ(rs_last_error(), "thread_mode is 7");
}

}  // namespace
