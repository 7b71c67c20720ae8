// The shim that runs kernels on the CPU: that it finds what it promises to find, and nothing in what is right.
#define RS_CUDA_HOST_WGMMA
#include "tests/cuda_harness.h"

#include <array>
#include <cfenv>
#include <limits>

namespace {

constexpr int block = 128;  // four warps

// The kernels here follow no other.
const bool no_waits = cuda_host::settings.waits = false;

// A launch of one block of `block` threads.
template <class... P, class... A>
cudaError_t run(size_t bytes, void (*kernel)(P...), A... args) {
  return launch(nullptr, 1, block, bytes, kernel, args...);
}

// The broken form of a kernel is a fault in every order of threads, the right one in none.
template <class... P, class... A>
void expect_found(size_t bytes, std::initializer_list<const char *> parts, void (*kernel)(bool, P...), A... args) {
  for_seeds(20, [&] {
    expect_fault(run(bytes, kernel, true, args...), parts);
    expect_no_fault(run(bytes, kernel, false, args...));
  });
}

// A fault of one of these kinds: which one, the order of threads decides.
void expect_one_of(cudaError_t e, std::initializer_list<const char *> kinds) {
  ASSERT_EQ(e, cudaErrorLaunchFailure);
  const std::string text = cuda_host::last_fault();
  bool any = false;
  for (const char *kind : kinds) any |= text.find(kind) != std::string::npos;
  EXPECT_TRUE(any) << text;
}

// ---------------------------------------------------------------------------------------------------- races

RS_KERNEL(block, 1) reverse(bool broken, int *out) {
  const shared<int> s = block_memory<int>(0);
  const int i = thread_index();
  s[i] = i;
  if (!broken) block_sync();
  out[i] = s[block - 1 - i];
}

TEST(cuda_host, a_missing_barrier_is_a_fault) {
  device_buffer<int> out(block);
  for_seeds(20, [&] {
    expect_one_of(run(block * sizeof(int), reverse, true, out.data()), {"uninitialised", "race on byte"});
    out.poison();
    expect_no_fault(run(block * sizeof(int), reverse, false, out.data()));
    for (int i = 0; i < block; ++i) EXPECT_EQ(out[static_cast<size_t>(i)], block - 1 - i);
  });
}

int read_line = 0, write_line = 0;

RS_KERNEL(block, 1) overwrite(bool broken, int *out) {
  const shared<int> s = block_memory<int>(0);
  const int i = thread_index();
  s[i] = i;
  block_sync();
  if (i == 0) read_line = __LINE__ + 2, write_line = __LINE__ + 4;
  // The lines of both are said.
  const int v = s[(i + 32) % block];
  if (!broken) block_sync();
  s[i] = v;
  out[i] = v;
}

TEST(cuda_host, a_write_over_what_another_warp_reads_is_a_race) {
  device_buffer<int> out(block);
  for_seeds(20, [&] {
    expect_fault(run(block * sizeof(int), overwrite, true, out.data()), {"race on byte", "and no barrier between"});
    const std::string text = cuda_host::last_fault();
    const auto has = [&](const std::string &part) { return text.find(part) != std::string::npos; };
    const std::string read = " it at line " + std::to_string(read_line), write = " it at line " + std::to_string(write_line);
    EXPECT_TRUE((has("writes" + write) && has("read" + read)) || (has("reads" + read) && has("wrote" + write))) << text;
    expect_no_fault(run(block * sizeof(int), overwrite, false, out.data()));
  });
}

RS_KERNEL(block, 1) neighbour(bool broken, int *out) {
  const shared<int> s = block_memory<int>(0);
  const int i = thread_index();
  s[i] = -1;
  warp_sync();
  s[i] = i;
  if (!broken) warp_sync();
  // This keeps the warp together, but orders no memory.
  const int sum = shuffle_xor(i, 1);
  out[i] = s[i ^ 1] + sum;
}

TEST(cuda_host, a_missing_warp_sync_is_a_race) {
  device_buffer<int> out(block);
  expect_found(block * sizeof(int), {"race on byte", "reads it", "wrote it"}, neighbour, out.data());
}

RS_KERNEL(block, 1) across_warps(bool broken, int *out) {
  const shared<int> s = block_memory<int>(0);
  const int i = thread_index();
  s[i] = i;
  block_sync();
  s[i] = i + 1;
  if (broken) warp_sync();
  else block_sync();
  out[i] = s[(i + 32) % block];
}

TEST(cuda_host, a_warp_sync_orders_nothing_between_warps) {
  device_buffer<int> out(block);
  expect_found(block * sizeof(int), {"race on byte"}, across_warps, out.data());
}

RS_KERNEL(block, 1) two_writers(bool broken, int *out) {
  const shared<uint8_t> s = block_memory<uint8_t>(0);
  const int i = thread_index();
  s[broken ? i / 2 : i] = 7;  // of the same value too
  block_sync();
  out[i] = s[broken ? i / 2 : i];
}

TEST(cuda_host, bytes_of_a_word_are_apart) {
  device_buffer<int> out(block);
  expect_found(block, {"race on byte", "writes it", "wrote it"}, two_writers, out.data());
}

RS_KERNEL(block, 1) mixed_sizes(bool broken, uint32_t *out) {
  const shared<uint8_t> s = block_memory<uint8_t>(0);
  const int i = thread_index();
  for (int k = 0; k < 4; ++k) s[4 * i + k] = static_cast<uint8_t>(i);
  block_sync();
  if (i % 4 == 0) {
    const uint4 v = (s + 4 * i).as<uint4>()[0];
    out[i / 4] = v.x + v.w;
  }
  if (!broken) block_sync();
  s.as<uint32_t>()[(i + 4) % block] = 1;
  block_sync();
  s[4 * i + 3] = 2;
  const uint32_t whole = s.as<uint32_t>()[i];
  out[block / 4 + i] = whole;
}

TEST(cuda_host, accesses_of_different_sizes_meet) {
  device_buffer<uint32_t> out(block / 4 + block);
  expect_found(4 * block, {"race on byte"}, mixed_sizes, out.data());
  EXPECT_EQ(out[1], 4 * 0x01010101u + 7 * 0x01010101u - 0 * out[0]);
  EXPECT_EQ(out[block / 4 + 5], 0x02000001u);
}

RS_KERNEL(block, 1) count(bool broken, int *out) {
  const shared<int> s = block_memory<int>(0);
  const int i = thread_index();
  if (i == 0) s[0] = 0;
  block_sync();
  shared_add(s, i);
  if (!broken) block_sync();
  out[i] = s[0];
}

TEST(cuda_host, atomic_additions_race_with_reads_but_not_with_each_other) {
  device_buffer<int> out(block);
  expect_found(sizeof(int), {"race on byte 0", "add"}, count, out.data());
  EXPECT_EQ(out[5], block * (block - 1) / 2);
}

// ---------------------------------------------------------------------------------------------------- what has no memory behind it

RS_KERNEL(block, 1) outside(bool broken, int *out) {
  const shared<int> s = block_memory<int>(0);
  const int i = thread_index();
  s[i] = i;
  if (broken && i == 77) s[block] = 1;
  out[i] = s[i];
}

TEST(cuda_host, an_access_outside_of_shared_memory_is_a_fault) {
  device_buffer<int> out(block);
  expect_found(block * sizeof(int), {"outside of shared memory", "thread 77"}, outside, out.data());
}

RS_KERNEL(block, 1) before_begin(bool broken, int *out) {
  const shared<int> s = block_memory<int>(0);
  const int i = thread_index();
  s[i] = i;
  if (broken && i == 3) s[-1] = 1;
  out[i] = s[i];
}

TEST(cuda_host, an_access_before_shared_memory_is_a_fault) {
  device_buffer<int> out(block);
  expect_found(block * sizeof(int), {"outside of shared memory", "thread 3"}, before_begin, out.data());
}

RS_KERNEL(block, 1) misaligned(bool broken, int *out) {
  const shared<float> s = block_memory<float>(0);
  const int i = thread_index();
  if (i == 0) (s + (broken ? 2 : 4)).as<float4>()[0] = make_float4(1, 2, 3, 4);
  out[i] = 0;
}

TEST(cuda_host, a_misaligned_access_is_a_fault) {
  device_buffer<int> out(block);
  expect_found(block * sizeof(int), {"misaligned", "byte 8", "alignment 16"}, misaligned, out.data());
}

RS_KERNEL(block, 1) unwritten(bool broken, int *out) {
  const shared<int> s = block_memory<int>(0);
  const int i = thread_index();
  if (!broken || i != 40) s[i] = i;
  block_sync();
  out[i] = s[i];
}

TEST(cuda_host, a_read_of_uninitialised_shared_memory_is_a_fault) {
  device_buffer<int> out(block);
  expect_found(block * sizeof(int), {"uninitialised", "thread 40", "byte 160"}, unwritten, out.data());
}

RS_KERNEL(block, 1) leaves_memory(int *out) {
  const shared<int> s = block_memory<int>(0);
  const int i = thread_index();
  if (block_x() == 0) s[i] = i;
  out[grid_x() * block_y() + block_x()] = s[i];
}

TEST(cuda_host, a_block_does_not_see_what_another_one_left) {
  const keep_settings kept;
  cuda_host::settings.threads = 1;
  device_buffer<int> out(2);
  expect_fault(launch(nullptr, 2, block, block * sizeof(int), leaves_memory, out.data()), {"block (1, 0)", "uninitialised"});
}

RS_KERNEL(block, 1) beside(bool broken, int *out) {
  const int i = thread_index();
  if (broken || i < block - 1) out[i + 1] = i;
}

TEST(cuda_host, a_write_beside_device_memory_is_a_fault) {
  device_buffer<int> out(block);
  expect_found(0, {"write outside of device memory", "offset 512", "512 bytes"}, beside, out.data());
  int *p = nullptr;
  ASSERT_EQ(cudaMalloc(&p, 3), cudaSuccess);
  reinterpret_cast<char *>(p)[-5] = 0;
  expect_fault(cudaFree(p), {"offset -5", "3 bytes"});
}

RS_KERNEL(block, 1) arithmetic(int *out, float4 *vectors) {
  const shared<int> s = block_memory<int>(0);
  const shared<float4> v = block_memory<float4>(16);
  if (thread_index() != 0) return;
  s[0] = 5;
  s[1] = s[0];
  s[1] += 2;
  s[1] -= 1;
  s[1] *= 3;
  s[1] |= 1 << 8;
  out[0] = s[1];
  out[1] = s[0]++;
  out[2] = ++s[0];
  out[3] = std::min<int>(s[0], 100) + -s[0] * 2 + (s[0] > 6 ? 1 : 0);
  (s + 2)[1] = static_cast<int>(fmaxf(static_cast<float>(s[0]), 8.5f));
  out[4] = s[3];
  v[0] = make_float4(1, 2, 3, 4);
  v[1] = v[0];
  const float4 copy = v[1];
  out[5] = static_cast<int>(copy.w);
  vectors[0] = v[1];
}

TEST(cuda_host, elements_are_used_as_on_the_device) {
  device_buffer<int> out(6);
  device_buffer<float4> vectors(1);
  expect_no_fault(run(64, arithmetic, out.data(), vectors.data()));
  EXPECT_EQ(out.values(), (std::vector<int>{18 | 256, 5, 7, 7 - 14 + 1, 8, 4}));
  EXPECT_EQ(vectors[0].z, 3);
  static_assert(std::is_convertible_v<decltype(shared<int>{nullptr}[0]), int>);
  static_assert(!std::is_convertible_v<decltype(shared<int>{nullptr}[0]) &, int>);  // auto v = s[i], and then v
}

// ---------------------------------------------------------------------------------------------------- who comes to what

int other_line = 0;

RS_KERNEL(block, 1) two_barriers(bool broken) {
  if (broken && thread_index() == 5) {
    other_line = __LINE__ + 1;
    block_sync();
  } else {
    block_sync();
  }
  if (!broken) block_sync();
}

RS_KERNEL(block, 1) one_barrier(bool broken) {
  if (broken && thread_index() == 5) {
    block_sync();
    return;
  }
  block_sync();
}

TEST(cuda_host, a_divergent_barrier_is_a_fault) {
  for_seeds(20, [] {
    expect_fault(run(0, one_barrier, true), {"divergent barrier at line", "thread 5"});
    expect_no_fault(run(0, one_barrier, false));
    expect_fault(run(0, two_barriers, true), {"divergent barrier at line", "waits at line"});
    EXPECT_NE(cuda_host::last_fault().find("line " + std::to_string(other_line)), std::string::npos) << cuda_host::last_fault();
  });
}

RS_KERNEL(block, 1) returned_before_barrier(bool broken) {
  if (broken && thread_index() == 70) return;
  block_sync();
}

TEST(cuda_host, a_thread_that_returned_does_not_come_to_a_barrier) {
  expect_found(0, {"divergent barrier", "thread 70 has returned"}, returned_before_barrier);
}

RS_KERNEL(block, 1) two_collectives(bool broken, int *out) {
  const int i = thread_index();
  if (broken && i == 35) out[i] = static_cast<int>(ballot(true));
  else out[i] = shuffle_xor(i, 1);
}

TEST(cuda_host, mismatched_collectives_are_a_fault) {
  device_buffer<int> out(block);
  expect_found(0, {"mismatched collectives in warp 1", "lane 3 ", "ballot line", "shuffle_xor line"}, two_collectives, out.data());
}

RS_KERNEL(block, 1) two_lines(bool broken, int *out) {
  const int i = thread_index();
  int v = 0;
  if (broken && i == 35) v = shuffle_xor(i, 1);
  else v = shuffle_xor(i, 2);
  out[i] = v;
}

TEST(cuda_host, the_same_collective_elsewhere_is_another_one) {
  device_buffer<int> out(block);
  expect_found(0, {"mismatched collectives in warp 1", "shuffle_xor line"}, two_lines, out.data());
}

RS_KERNEL(block, 1) returned_before_collective(bool broken, int *out) {
  const int i = thread_index();
  if (broken && i == 9) return;
  out[i] = shuffle(i, 4);
}

TEST(cuda_host, a_lane_that_returned_does_not_come_to_a_collective) {
  device_buffer<int> out(block);
  expect_found(0, {"mismatched collectives", "at shuffle line", "lane 9 has returned"}, returned_before_collective, out.data());
}

RS_KERNEL(32, 1) barrier_and_collective(bool broken, int *out) {
  const int i = thread_index();
  if (broken && i == 9) block_sync();
  out[i] = shuffle(i, 4);
}

TEST(cuda_host, a_lane_at_a_barrier_does_not_come_to_a_collective) {
  device_buffer<int> out(block);
  for_seeds(20, [&] {
    expect_fault(launch(nullptr, 1, 32, 0, barrier_and_collective, true, out.data()),
                 {"mismatched collectives", "at shuffle line", "lane 9 at block_sync line"});
    expect_no_fault(launch(nullptr, 1, 32, 0, barrier_and_collective, false, out.data()));
  });
}

RS_KERNEL(block, 1) any_threads(int *out) {
  const int i = thread_index();
  block_sync();
  out[i] = shuffle(i, 0);
}

TEST(cuda_host, a_collective_needs_a_whole_warp) {
  device_buffer<int> out(block);
  expect_fault(launch(nullptr, 1, 48, 0, any_threads, out.data()), {"shuffle", "warp 1, which has only 16 threads"});
  expect_no_fault(launch(nullptr, 1, 96, 0, any_threads, out.data()));
}

RS_KERNEL(block, 1) collectives(int *out, float *sums, uint32_t *votes, int64_t *wide) {
  const int i = thread_index();
  out[i] = shuffle(i, 7);
  float v = static_cast<float>(i);
  for (int mask = 16; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  sums[i] = v;
  votes[i] = ballot(i % 3 == 0);
  wide[i] = shuffle_xor(static_cast<int64_t>(i) << 40, 31);
}

TEST(cuda_host, shuffles_and_ballots) {
  device_buffer<int> out(block);
  device_buffer<float> sums(block);
  device_buffer<uint32_t> votes(block);
  device_buffer<int64_t> wide(block);
  for_seeds(20, [&] {
    expect_no_fault(run(0, collectives, out.data(), sums.data(), votes.data(), wide.data()));
    for (size_t i = 0; i < block; ++i) {
      const int first = static_cast<int>(i) / 32 * 32;
      EXPECT_EQ(out[i], first + 7);
      EXPECT_EQ(sums[i], static_cast<float>(32 * first + 31 * 16));
      for (int lane = 0; lane < 32; ++lane) EXPECT_EQ(votes[i] >> lane & 1, (first + lane) % 3 == 0 ? 1u : 0u);
      EXPECT_EQ(wide[i], static_cast<int64_t>(i ^ 31) << 40);
    }
  });
}

// ---------------------------------------------------------------------------------------------------- cp_async16

enum class mistake { none, no_wait, no_barrier, still_read, never_waits, not_committed, wrong_group };

// Copies two tiles of `block` words, one behind the other, and passes them on.
RS_KERNEL(block, 1) stages(mistake m, const uint32_t *in, uint32_t *out) {
  const shared<uint32_t> s = block_memory<uint32_t>(0);
  const int i = thread_index();
  for (int k = 0; k < 2; ++k) {
    if (i < block / 4) cp_async16(s + k * block + 4 * i, in + k * block + 4 * i, 16);
    if (m != mistake::not_committed || k == 0) cp_async_commit();
  }
  if (m != mistake::no_wait) {
    if (m == mistake::wrong_group) cp_async_wait<2>();
    else cp_async_wait<1>();
  }
  if (m != mistake::no_barrier) block_sync();
  out[i] = s[block - 1 - i];
  if (m != mistake::still_read) block_sync();
  if (i < block / 4) cp_async16(s + 4 * i, in + 2 * block + 4 * i, i % 2 ? 16 : 4);
  cp_async_commit();
  cp_async_wait<1>();
  block_sync();
  out[block + i] = s[2 * block - 1 - i];
  if (m == mistake::never_waits) return;
  cp_async_wait<0>();
  block_sync();
  out[2 * block + i] = s[i];
}

TEST(cuda_host, copies_land_when_they_are_waited_for) {
  device_buffer<uint32_t> in(3 * block), out(3 * block);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint32_t>(i);
  constexpr size_t bytes = 2 * block * sizeof(uint32_t);
  for_seeds(20, [&] {
    out.poison();
    expect_no_fault(run(bytes, stages, mistake::none, in.data(), out.data()));
    for (size_t i = 0; i < block; ++i) {
      EXPECT_EQ(out[i], block - 1 - i);
      EXPECT_EQ(out[block + i], 2 * block - 1 - i);
      EXPECT_EQ(out[2 * block + i], i / 4 % 2 || i % 4 == 0 ? 2 * block + i : 0);  // zeros behind what was asked for
    }
    expect_fault(run(bytes, stages, mistake::no_wait, in.data(), out.data()), {"read of shared memory in flight"});
    expect_fault(run(bytes, stages, mistake::wrong_group, in.data(), out.data()), {"read of shared memory in flight"});
    expect_one_of(run(bytes, stages, mistake::still_read, in.data(), out.data()), {"in flight", "race on byte"});
    expect_fault(run(bytes, stages, mistake::never_waits, in.data(), out.data()), {"returns with a cp_async16"});
    expect_fault(run(bytes, stages, mistake::not_committed, in.data(), out.data()), {"in flight"});
    expect_one_of(run(bytes, stages, mistake::no_barrier, in.data(), out.data()), {"in flight", "race on byte", "uninitialised"});
  });
}

RS_KERNEL(block, 1) odd_copy(const char *in, int to, int from, int bytes) {
  if (thread_index() == 0) cp_async16(block_memory<char>(0) + to, in + from, bytes);
  cp_async_commit();
  cp_async_wait<0>();
}

TEST(cuda_host, copies_are_aligned_and_of_no_more_than_16_bytes) {
  device_buffer<char> in(64);
  expect_no_fault(run(64, odd_copy, in.data(), 48, 16, 0));
  expect_fault(run(64, odd_copy, in.data(), 8, 16, 16), {"misaligned"});
  expect_fault(run(64, odd_copy, in.data(), 16, 8, 16), {"cp_async16", "multiple of 16"});
  expect_fault(run(64, odd_copy, in.data(), 16, 16, 17), {"cp_async16", "17 bytes"});
  expect_fault(run(64, odd_copy, in.data(), 64, 16, 16), {"outside of shared memory"});
}

// ---------------------------------------------------------------------------------------------------- matrices

// c [16][8] += a [16][k] times b; both lie row by row, and b by columns: [8][k], or as it is: [k][8].
template <class A, class C>
RS_KERNEL(32, 1)
product(const A *a, const A *b, C *c, bool transposed) {
  constexpr int k = 32 / sizeof(A), row = 32 + 16;  // bytes, of which 16 keep rows of a and b apart
  const shared<uint8_t> as = block_memory<uint8_t>(0), bs = block_memory<uint8_t>(16 * row);
  const int lane = thread_index(), g = lane / 4, t = lane % 4;
  const int b_rows = transposed ? k : 8, b_cols = transposed ? 8 : k;
  for (int i = lane; i < 16 * k; i += 32) (as + i / k * row).template as<A>()[i % k] = a[i];
  for (int i = lane; i < 8 * k; i += 32) (bs + i / b_cols * row).template as<A>()[i % b_cols] = b[i];
  for (int i = lane; !transposed && i < 8; i += 32) {  // the rows that ldmatrix_x4 reads beyond these
    for (int j = 0; j < 32; ++j) bs[(8 + i) * row + j] = 0;
  }
  warp_sync();
  uint32_t af[4], bf[4];
  // Matrices of a: rows 0 to 7, rows 8 to 15, and the same of the second half of k.
  ldmatrix_x4(af, as + lane % 16 * row + lane / 16 * 16);
  if (transposed) ldmatrix_x4_transposed(bf, bs + lane % 16 % b_rows * row);
  else ldmatrix_x4(bf, bs + (lane % 8 + lane / 16 * 8) * row + lane / 8 % 2 * 16);
  const uint32_t b2[2] = {bf[0], bf[1]};
  C acc[4];
  for (int i = 0; i < 4; ++i) acc[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  if constexpr (std::is_same_v<A, uint8_t>) mma_s8u8(acc, af, b2);
  else if constexpr (std::is_same_v<A, uint16_t>) mma_f16(acc, af, b2);
  else mma_bf16(acc, af, b2);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = acc[i];
}

TEST(cuda_host, products_of_integers_are_exact_and_wrap) {
  std::mt19937 rng(1);
  for_seeds(20, [&] {
    device_buffer<uint8_t> a(16 * 32), b(8 * 32);
    device_buffer<int32_t> c(16 * 8);
    for (uint8_t &v : a) v = static_cast<uint8_t>(rng() % 3 ? rng() : 128);
    for (uint8_t &v : b) v = static_cast<uint8_t>(rng() % 3 ? rng() : 255);
    for (int32_t &v : c) v = rng() % 2 ? std::numeric_limits<int32_t>::min() + 5 : static_cast<int32_t>(rng());
    std::vector<int32_t> wanted = c.values();
    for (size_t i = 0; i < 16; ++i) {
      for (size_t j = 0; j < 8; ++j) {
        int64_t sum = wanted[8 * i + j];
        for (size_t k = 0; k < 32; ++k) sum += static_cast<int8_t>(a[32 * i + k]) * static_cast<int>(b[32 * j + k]);
        wanted[8 * i + j] = static_cast<int32_t>(static_cast<uint32_t>(sum));
      }
    }
    expect_no_fault(launch(nullptr, 1, 32, 2048, product<uint8_t, int32_t>, a.data(), b.data(), c.data(), false));
    EXPECT_EQ(c.values(), wanted);
  });
}

// What may be wrong with a product of four warps.
enum class spoilt { nothing, begin, end, early, fence, place };

// c [64][64] += a [64][32] times b [32][64], whose 64 rows of 64 bytes are copied from `b` as they are to lie: the second half is
// used.
RS_KERNEL(block, 1) product_of_four_warps(spoilt how, const int8_t *a, const uint8_t *b, int32_t *c) {
  const shared<uint8_t> bs = block_memory<uint8_t>(0);
  const int i = thread_index(), row = i / 32 * 16 + i % 32 / 4, t = i % 4;
  for (int chunk = i; chunk < 256; chunk += block) cp_async16(bs + chunk * 16, b + chunk * 16, 16);
  cp_async_commit();
  cp_async_wait<0>();
  if (how != spoilt::fence) fence_shared();
  block_sync();
  uint32_t af[4];
  for (int j = 0; j < 4; ++j) std::memcpy(&af[j], a + (row + j % 2 * 8) * 32 + t * 4 + j / 2 * 16, 4);
  int32_t acc[8][4];
  const auto at = [&](int j, int k) { return (row + k / 2 * 8) * 64 + j * 8 + t * 2 + k % 2; };
  for (int j = 0; j < 8; ++j)
    for (int k = 0; k < 4; ++k) acc[j][k] = c[at(j, k)];
  if (how != spoilt::begin) multiply_begin(acc);
  multiply_s8u8(acc, af, bs + (how == spoilt::place ? 16 : 32));
  if (how != spoilt::end && how != spoilt::early) multiply_end(acc);
  for (int j = 0; j < 8; ++j)
    for (int k = 0; k < 4; ++k) c[at(j, k)] = acc[j][k];
  if (how == spoilt::early) multiply_end(acc);
}

TEST(cuda_host, products_of_four_warps) {
  std::mt19937 rng(2);
  for_seeds(20, [&] {
    device_buffer<int8_t> a(64 * 32);
    device_buffer<uint8_t> b(64 * 64);
    device_buffer<int32_t> c(64 * 64);
    for (int8_t &v : a) v = static_cast<int8_t>(rng());
    for (uint8_t &v : b) v = static_cast<uint8_t>(rng());
    for (int32_t &v : c) v = static_cast<int32_t>(rng());
    const std::vector<int32_t> before = c.values();
    std::vector<int32_t> wanted = before;
    for (size_t i = 0; i < 64; ++i)
      for (size_t j = 0; j < 64; ++j)
        for (size_t k = 0; k < 32; ++k) {
          const size_t chunk = (2 + k / 16) ^ (j / 2 % 4);
          wanted[i * 64 + j] = static_cast<int32_t>(static_cast<uint32_t>(wanted[i * 64 + j]) +
                                                    static_cast<uint32_t>(a[i * 32 + k] * b[j * 64 + chunk * 16 + k % 16]));
        }
    const auto with = [&](spoilt how) { return run(64 * 64, product_of_four_warps, how, a.data(), b.data(), c.data()); };
    expect_no_fault(with(spoilt::nothing));
    EXPECT_EQ(c.values(), wanted);
    expect_fault(with(spoilt::begin), {"no multiply_begin"});
    expect_fault(with(spoilt::end), {"multiply_s8u8 that it did not wait for"});
    expect_fault(with(spoilt::fence), {"has no fence_shared behind it"});
    expect_fault(with(spoilt::place), {"not in a row of 512"});
    std::copy(before.begin(), before.end(), c.begin());
    expect_no_fault(with(spoilt::early));
    EXPECT_NE(c.values(), wanted);  // what is read before the end is of no use
  });
}

RS_KERNEL(block, 1) follow(bool broken) {
  if (!broken || thread_index() != 77) wait_for_previous();
}

TEST(cuda_host, a_kernel_that_does_not_wait_for_the_one_before_is_a_fault) {
  cuda_host::settings.waits = true;
  expect_found(0, {"thread 77 returns without wait_for_previous"}, follow);
  cuda_host::settings.waits = false;
}

// int16_t stands for bf16.
template <class A>
void test_product_of_16_bits(bool transposed) {
  const bool half = std::is_same_v<A, uint16_t>;
  unsigned seed = 1;
  for_seeds(20, [&] {
    const std::vector<float> values = normal_values(16 * 16 + 16 * 8 + 16 * 8, seed++);
    device_buffer<A> a(16 * 16), b(8 * 16);
    device_buffer<float> c(16 * 8);
    const auto pack = [&](float v) { return static_cast<A>(half ? pack_f16(v, 0) : pack_bf16(v, 0)); };
    const auto unpack = [&](A v) {
      const uint16_t bits = static_cast<uint16_t>(v);
      return half ? f16_to_float(bits) : bits_to_float(static_cast<uint32_t>(bits) << 16);
    };
    for (size_t i = 0; i < a.size(); ++i) a[i] = pack(values[i]);
    for (size_t i = 0; i < b.size(); ++i) b[i] = pack(values[a.size() + i]);
    for (size_t i = 0; i < c.size(); ++i) c[i] = values[a.size() + b.size() + i];
    std::vector<float> wanted = c.values();
    for (size_t i = 0; i < 16; ++i) {
      for (size_t j = 0; j < 8; ++j) {
        for (size_t k = 0; k < 16; ++k) wanted[8 * i + j] += unpack(a[16 * i + k]) * unpack(b[transposed ? 8 * k + j : 16 * j + k]);
      }
    }
    expect_no_fault(launch(nullptr, 1, 32, 2048, product<A, float>, a.data(), b.data(), c.data(), transposed));
    EXPECT_EQ(c.values(), wanted);
  });
}

TEST(cuda_host, products_of_f16) { test_product_of_16_bits<uint16_t>(false); }
TEST(cuda_host, products_of_bf16) { test_product_of_16_bits<int16_t>(false); }
TEST(cuda_host, products_of_transposed_f16) { test_product_of_16_bits<uint16_t>(true); }
TEST(cuda_host, products_of_transposed_bf16) { test_product_of_16_bits<int16_t>(true); }

// ---------------------------------------------------------------------------------------------------- conversions

TEST(cuda_host, all_values_of_f16_and_bf16) {
  for (uint32_t h = 0; h < 65536; ++h) {
    const uint16_t bits = static_cast<uint16_t>(h);
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const float v = f16_to_float(bits);
    if (exponent == 31 && mantissa) {
      ASSERT_TRUE(std::isnan(v)) << h;
      ASSERT_EQ(pack_f16(v, 0), 0x7fffu);
    } else {
      const double magnitude = exponent == 31 ? std::numeric_limits<double>::infinity()
                               : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                                              : std::ldexp(mantissa, -24);
      ASSERT_EQ(v, bits & 0x8000 ? -magnitude : magnitude) << h;
      ASSERT_EQ(std::signbit(v), (bits & 0x8000) != 0) << h;
      ASSERT_EQ(pack_f16(v, 0), h);
      ASSERT_EQ(pack_f16(0, v), h << 16);
    }
    const float b = bits_to_float(h << 16);
    ASSERT_EQ(pack_bf16(b, 0), std::isnan(b) ? 0x7fffu : h);
    ASSERT_EQ(pack_bf16(0, b), std::isnan(b) ? 0x7fff0000u : h << 16);
    ASSERT_EQ(float_to_bits(b), h << 16);
  }
}

// Between each value and the next one: the middle goes to the even one, what is beside it to the nearer.
TEST(cuda_host, conversions_round_to_nearest_even) {
  const auto between = [](float low, float high, uint32_t h, uint32_t (*pack)(float, float)) {
    const float middle = static_cast<float>((static_cast<double>(low) + high) / 2);
    const float inf = std::numeric_limits<float>::infinity();
    for (const float sign : {1.0f, -1.0f}) {
      const uint32_t s = sign < 0 ? 0x8000 : 0;
      ASSERT_EQ(pack(sign * middle, 0), s | (h + h % 2)) << h;
      ASSERT_EQ(pack(sign * std::nextafter(middle, 0.0f), 0), s | h) << h;
      ASSERT_EQ(pack(sign * std::nextafter(middle, inf), 0), s | (h + 1)) << h;
    }
  };
  for (uint32_t h = 0; h < 0x7c00; ++h) {
    const float high = h == 0x7bff ? 65536 : f16_to_float(static_cast<uint16_t>(h + 1));
    between(f16_to_float(static_cast<uint16_t>(h)), high, h, pack_f16);
  }
  for (uint32_t h = 1; h < 0x7f7f; ++h) between(bits_to_float(h << 16), bits_to_float((h + 1) << 16), h, pack_bf16);
  EXPECT_EQ(pack_f16(65519.99f, 65520), 0x7c007bffu);
  EXPECT_EQ(pack_f16(-1e30f, std::numeric_limits<float>::infinity()), 0x7c00fc00u);
  EXPECT_EQ(pack_bf16(std::numeric_limits<float>::max(), 0), 0x7f80u);
  EXPECT_EQ(pack_f16(0x1p-25f, 0x1.8p-24f), 0x00020000u);
  EXPECT_EQ(pack_f16(std::numeric_limits<float>::denorm_min(), -std::numeric_limits<float>::min()), 0x80000000u);
}

TEST(cuda_host, powers_of_two) {
  EXPECT_EQ(power_of_two(-std::numeric_limits<float>::infinity()), 0);
  EXPECT_EQ(power_of_two(std::numeric_limits<float>::infinity()), std::numeric_limits<float>::infinity());
  EXPECT_TRUE(std::isnan(power_of_two(std::numeric_limits<float>::quiet_NaN())));
  EXPECT_EQ(power_of_two(-126), std::numeric_limits<float>::min());
  EXPECT_EQ(power_of_two(-127), 0);
  EXPECT_EQ(power_of_two(10), 1024);
  EXPECT_NEAR(power_of_two(0.3f), std::exp2(0.3), 1e-6);
  EXPECT_EQ(fused(1 + 0x1p-12f, 1 + 0x1p-12f, -1 - 0x1p-11f), 0x1p-24f);  // not rounded before the sum
}

// ---------------------------------------------------------------------------------------------------- grids

RS_KERNEL(block, 1) tickets(int *next, int *first, int *who) {
  const int i = thread_index();
  if (global_exchange_if(first, -1, grid_x() * block_y() + block_x()) == -1) global_add(first + 1, 1);
  who[global_add(next, 1)] = (grid_x() * block_y() + block_x()) * 64 + i;
}

TEST(cuda_host, blocks_run_in_any_order_on_several_cpus) {
  const keep_settings kept;
  std::vector<std::vector<int>> orders;
  for (const uint64_t seed : {1, 1, 2}) {
    for (const unsigned threads : {1u, 3u}) {
      cuda_host::settings.seed = seed;
      cuda_host::settings.threads = threads;
      device_buffer<int> next{0}, first{-1, 0}, who(15 * 64);
      expect_no_fault(launch(nullptr, dim3(5, 3), 64, 0, tickets, next.data(), first.data(), who.data()));
      EXPECT_EQ(next[0], 15 * 64);
      EXPECT_EQ(first[1], 1);
      std::vector<int> all = who.values();
      if (threads == 1) orders.push_back(all);
      std::sort(all.begin(), all.end());
      for (int i = 0; i < 15 * 64; ++i) ASSERT_EQ(all[static_cast<size_t>(i)], i);
    }
  }
  EXPECT_EQ(orders[0], orders[1]);
  EXPECT_NE(orders[0], orders[2]);
}

RS_KERNEL(1024, 1) large_block(int *out) {
  const shared<int> s = block_memory<int>(0);
  const int i = thread_index();
  s[i] = i;
  block_sync();
  out[i] = s[1023 - i];
}

TEST(cuda_host, blocks_of_one_and_of_1024_threads) {
  device_buffer<int> out(1024);
  expect_no_fault(launch(nullptr, 1, 1024, 4096, large_block, out.data()));
  EXPECT_EQ(out[1000], 23);
  expect_fault(launch(nullptr, 1, 1, 4096, large_block, out.data()), {"uninitialised"});
}

RS_KERNEL(block, 1) nothing() {}

TEST(cuda_host, launches_that_no_card_takes) {
  const uint64_t before = cuda_host::launches();
  EXPECT_EQ(launch(nullptr, 0, block, 0, nothing), cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch(nullptr, dim3(1, 65536), block, 0, nothing), cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch(nullptr, 1, 1025, 0, nothing), cudaErrorInvalidConfiguration);
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidConfiguration);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  // More than 48 KiB is to be asked for, and there is an end to it.
  const auto ask = [](int bytes) {
    return cudaFuncSetAttribute(reinterpret_cast<const void *>(nothing), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  };
  EXPECT_EQ(launch(nullptr, 1, block, 160 * 1024, nothing), cudaErrorInvalidValue);
  EXPECT_EQ(ask(200 * 1024), cudaErrorInvalidValue);
  expect_no_fault(ask(160 * 1024));
  EXPECT_EQ(launch(nullptr, 1, block, 161 * 1024, nothing), cudaErrorInvalidValue);
  EXPECT_EQ(cuda_host::launches(), before);
  expect_no_fault(launch(nullptr, 2, block, 160 * 1024, nothing));
  EXPECT_EQ(cuda_host::launches(), before + 1);
  expect_no_fault(ask(48 * 1024));
  EXPECT_EQ(launch(nullptr, 1, block, 160 * 1024, nothing), cudaErrorInvalidValue);
  cudaGetLastError();
}

TEST(cuda_host, without_checks_kernels_compute_the_same) {
  const keep_settings kept;
  cuda_host::settings.check = false;
  device_buffer<uint32_t> in(3 * block), out(3 * block);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint32_t>(i);
  expect_no_fault(run(2 * block * sizeof(uint32_t), stages, mistake::none, in.data(), out.data()));
  for (size_t i = 0; i < block; ++i) EXPECT_EQ(out[block + i], 2 * block - 1 - i);
  expect_fault(run(0, one_barrier, true), {"divergent barrier"});  // what would not end is found all the same
}

// ---------------------------------------------------------------------------------------------------- the runtime

RS_KERNEL(block, 1) increment(int *p) { p[thread_index()] += 1; }

TEST(cuda_host, a_graph_runs_what_was_recorded_when_it_is_launched) {
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  device_buffer<int> p(block);
  std::vector<int> from(block, 5), to(block, 0);
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  expect_no_fault(cudaMemcpyAsync(p.data(), from.data(), block * sizeof(int), cudaMemcpyHostToDevice, stream));
  const uint64_t before = cuda_host::launches();
  expect_no_fault(launch(stream, 1, block, 0, increment, p.data()));
  expect_no_fault(launch(stream, 1, block, 0, increment, p.data()));
  expect_no_fault(cudaMemcpyAsync(to.data(), p.data(), block * sizeof(int), cudaMemcpyDeviceToHost, stream));
  cudaGraph_t graph = nullptr;
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  cudaGraphExec_t exec = nullptr;
  ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
  EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  EXPECT_EQ(p[0], -1);
  EXPECT_EQ(cuda_host::launches(), before);
  for (int i = 0; i < 3; ++i) {
    from[7] = 10 * i;
    expect_no_fault(cudaGraphLaunch(exec, stream));
    expect_no_fault(cudaStreamSynchronize(stream));
    EXPECT_EQ(to[0], 7);
    EXPECT_EQ(to[7], 10 * i + 2);
  }
  EXPECT_EQ(cuda_host::launches(), before + 6);
  EXPECT_EQ(cudaGraphExecDestroy(exec), cudaSuccess);

  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed), cudaSuccess);
  EXPECT_EQ(cudaStreamSynchronize(stream), cudaErrorStreamCaptureUnsupported);
  EXPECT_EQ(launch(stream, 1, block, 0, increment, p.data()), cudaErrorStreamCaptureInvalidated);
  EXPECT_EQ(cudaStreamEndCapture(stream, &graph), cudaErrorStreamCaptureInvalidated);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
  cudaGetLastError();
}

// What a capture forbids spoils it.  Memory is the affair of its mode; to wait for the device is forbidden to all.
TEST(cuda_host, what_may_not_be_called_while_a_stream_captures) {
  const keep_settings kept;
  cuda_host::settings.devices = 2;
  const auto allocate = [] {
    void *p = nullptr;
    const cudaError_t e = cudaMalloc(&p, 16);
    return e == cudaSuccess ? cudaFree(p) : e;
  };
  const auto wait_for = [](int device) {
    EXPECT_EQ(cudaSetDevice(device), cudaSuccess);
    const cudaError_t e = cudaDeviceSynchronize();
    EXPECT_EQ(cudaSetDevice(0), cudaSuccess);
    return e;
  };
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  const auto fails = [&](cudaStreamCaptureMode mode, bool other_thread, const std::function<cudaError_t()> &call) {
    cudaError_t e = cudaErrorUnknown;
    EXPECT_EQ(cudaStreamBeginCapture(stream, mode), cudaSuccess);
    if (other_thread) std::thread([&] { e = call(); }).join();
    else e = call();
    cudaGraph_t graph = nullptr;
    EXPECT_EQ(cudaStreamEndCapture(stream, &graph), e == cudaSuccess ? cudaSuccess : cudaErrorStreamCaptureInvalidated);
    EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
    EXPECT_TRUE(e == cudaSuccess || e == cudaErrorStreamCaptureUnsupported) << e;
    return e != cudaSuccess;
  };
  for (const bool other : {false, true}) {
    EXPECT_TRUE(fails(cudaStreamCaptureModeGlobal, other, allocate)) << other;
    EXPECT_EQ(fails(cudaStreamCaptureModeThreadLocal, other, allocate), !other);
    EXPECT_FALSE(fails(cudaStreamCaptureModeRelaxed, other, allocate)) << other;
    for (const auto mode : {cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed}) {
      EXPECT_TRUE(fails(mode, other, [&] { return wait_for(0); })) << mode;
      EXPECT_FALSE(fails(mode, other, [&] { return wait_for(1); })) << mode;
    }
  }
  EXPECT_EQ(allocate(), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
  cudaGetLastError();
}

// A stream is of a device: launches want that it is the thread's, copies that the memory is of it.
TEST(cuda_host, streams_and_memory_are_of_a_device) {
  const keep_settings kept;
  cuda_host::settings.devices = 2;
  device_buffer<int> first(block);
  cudaStream_t stream = nullptr;
  int *second = nullptr;
  std::vector<int> values(block, 5);
  const size_t bytes = block * sizeof(int);
  ASSERT_EQ(cudaSetDevice(1), cudaSuccess);
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  ASSERT_EQ(cudaMalloc(&second, bytes), cudaSuccess);
  const auto copy = [&](int *to) { return cudaMemcpyAsync(to, values.data(), bytes, cudaMemcpyHostToDevice, stream); };
  for (const int device : {0, 1}) {
    ASSERT_EQ(cudaSetDevice(device), cudaSuccess);
    EXPECT_EQ(copy(second), cudaSuccess);
    EXPECT_EQ(copy(first.data()), cudaErrorInvalidValue);
    EXPECT_EQ(cudaMemsetAsync(first.data(), 0, bytes, stream), cudaErrorInvalidValue);
    EXPECT_EQ(launch(stream, 1, block, 0, increment, second), device == 1 ? cudaSuccess : cudaErrorInvalidResourceHandle);
  }
  EXPECT_EQ(cudaMemcpyAsync(first.data(), values.data(), bytes, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
  EXPECT_EQ(second[0], 6);
  ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
  EXPECT_EQ(cudaFree(second), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
  cudaGetLastError();
}

TEST(cuda_host, calls_fail_where_a_test_wants_it) {
  const keep_settings kept;
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  cuda_host::settings.fails["cudaLaunchKernelEx"] = cudaErrorNoKernelImageForDevice;
  EXPECT_EQ(launch(nullptr, 1, block, 0, nothing), cudaErrorNoKernelImageForDevice);
  cuda_host::settings.fails.clear();
  std::vector<std::string> calls;
  cuda_host::interfere = [&](const std::string &call) {
    calls.push_back(call);
    return call == "cudaGraphInstantiate" ? cudaErrorMemoryAllocation : cudaSuccess;
  };
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  EXPECT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  EXPECT_EQ(launch(stream, 1, block, 0, nothing), cudaSuccess);
  EXPECT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  EXPECT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaErrorMemoryAllocation);
  cuda_host::interfere = nullptr;
  EXPECT_EQ(calls, (std::vector<std::string>{"cudaStreamBeginCapture", "cudaLaunchKernelEx", "cudaStreamEndCapture",
                                             "cudaGraphInstantiate"}));
  EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
  cudaGetLastError();
}

TEST(cuda_host, a_fault_in_a_graph_is_of_its_launch) {
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
  expect_no_fault(launch(stream, 1, block, 0, one_barrier, true));
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
  expect_fault(cudaGraphLaunch(exec, stream), {"divergent barrier"});
  EXPECT_EQ(cudaGraphExecDestroy(exec), cudaSuccess);
  EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

TEST(cuda_host, memory_runs_out_at_the_limit) {
  const keep_settings kept;
  size_t unused = 0, total = 0;
  ASSERT_EQ(cudaMemGetInfo(&unused, &total), cudaSuccess);
  cuda_host::settings.memory_limit = total - unused + 1000;
  void *a = nullptr, *b = nullptr;
  EXPECT_EQ(cudaMalloc(&a, 1001), cudaErrorMemoryAllocation);
  volatile size_t huge = std::numeric_limits<size_t>::max() - 10;  // g++ would warn of what is then not done with so much
  EXPECT_EQ(cudaMalloc(&a, huge), cudaErrorMemoryAllocation);
  EXPECT_EQ(cudaMalloc(&a, 600), cudaSuccess);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(a) % 256, 0u);
  EXPECT_EQ(cudaMalloc(&b, 600), cudaErrorMemoryAllocation);
  EXPECT_STREQ(cudaGetErrorString(cudaGetLastError()), "out of memory");
  EXPECT_EQ(b, nullptr);
  ASSERT_EQ(cudaMemGetInfo(&unused, &total), cudaSuccess);
  EXPECT_EQ(unused, 400u);
  EXPECT_EQ(static_cast<unsigned char *>(a)[599], 0xff);
  EXPECT_EQ(cudaFree(a), cudaSuccess);
  EXPECT_EQ(cudaMalloc(&b, 600), cudaSuccess);
  EXPECT_EQ(cudaFree(b), cudaSuccess);
  EXPECT_EQ(cudaFree(nullptr), cudaSuccess);
  EXPECT_EQ(cudaFree(&unused), cudaErrorInvalidValue);
}

TEST(cuda_host, copies_are_between_what_they_say_they_are) {
  device_buffer<int> p(4), q(4);
  std::vector<int> v = {1, 2, 3, 4}, w(4);
  expect_no_fault(cudaMemcpy(p.data(), v.data(), 16, cudaMemcpyHostToDevice));
  expect_no_fault(cudaMemcpy(q.data(), p.data(), 16, cudaMemcpyDeviceToDevice));
  expect_no_fault(cudaMemcpy(w.data(), q.data(), 16, cudaMemcpyDeviceToHost));
  EXPECT_EQ(v, w);
  expect_no_fault(cudaMemset(p.data() + 1, 0, 8));
  EXPECT_EQ(p.values(), (std::vector<int>{1, 0, 0, 4}));
  EXPECT_EQ(cudaMemcpy(p.data(), v.data(), 16, cudaMemcpyDeviceToHost), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemcpy(p.data() + 1, v.data(), 16, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemset(p.data() + 1, 0, 16), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemset(v.data(), 0, 16), cudaErrorInvalidValue);
  cudaGetLastError();
  int *host = nullptr;
  EXPECT_EQ(cudaMallocHost(&host, 16), cudaSuccess);
  expect_no_fault(cudaMemcpy(host, q.data(), 16, cudaMemcpyDeviceToHost));
  EXPECT_EQ(host[3], 4);
  EXPECT_EQ(cudaFreeHost(host), cudaSuccess);
}

TEST(cuda_host, events_and_the_device) {
  cudaEvent_t a = nullptr, b = nullptr;
  ASSERT_EQ(cudaEventCreate(&a), cudaSuccess);
  ASSERT_EQ(cudaEventCreate(&b), cudaSuccess);
  float ms = -1;
  EXPECT_EQ(cudaEventElapsedTime(&ms, a, b), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(cudaEventRecord(a, nullptr), cudaSuccess);
  expect_no_fault(run(0, nothing));
  EXPECT_EQ(cudaEventRecord(b, nullptr), cudaSuccess);
  EXPECT_EQ(cudaEventSynchronize(b), cudaSuccess);
  EXPECT_EQ(cudaEventElapsedTime(&ms, a, b), cudaSuccess);
  EXPECT_GT(ms, 0);
  EXPECT_EQ(cudaEventDestroy(a), cudaSuccess);
  EXPECT_EQ(cudaEventDestroy(b), cudaSuccess);

  const keep_settings kept;
  int n = 0, version = 0, clock = 0;
  EXPECT_EQ(cudaGetDeviceCount(&n), cudaSuccess);
  EXPECT_EQ(n, 1);
  cudaDeviceProp properties;
  EXPECT_EQ(cudaGetDeviceProperties(&properties, 0), cudaSuccess);
  EXPECT_STREQ(properties.name, "host shim");
  EXPECT_EQ(properties.major, 8);
  EXPECT_EQ(cudaDeviceGetAttribute(&clock, cudaDevAttrClockRate, 0), cudaSuccess);
  EXPECT_GT(clock, 0);
  EXPECT_EQ(cudaDriverGetVersion(&version), cudaSuccess);
  EXPECT_EQ(cudaSetDevice(1), cudaErrorInvalidDevice);
  EXPECT_EQ(cudaSetDevice(0), cudaSuccess);
  cuda_host::settings.devices = 0;
  EXPECT_EQ(cudaGetDeviceCount(&n), cudaErrorNoDevice);
  EXPECT_STREQ(cudaGetErrorName(cudaGetLastError()), "cudaErrorNoDevice");
}

TEST(cuda_host, settings_come_from_the_environment) {
  const char *before = std::getenv("RS_CUDA_HOST");
  const std::string kept = before ? before : "";
  setenv("RS_CUDA_HOST", "seed=3,check=0,threads=2,cudaFuncGetAttributes=209", 1);
  const cuda_host::settings_type s = cuda_host::settings_of_environment();
  if (before) setenv("RS_CUDA_HOST", kept.c_str(), 1);
  else unsetenv("RS_CUDA_HOST");
  EXPECT_EQ(s.seed, 3u);
  EXPECT_FALSE(s.check);
  EXPECT_EQ(s.threads, 2u);
  EXPECT_EQ(s.fails, (std::map<std::string, cudaError_t>{{"cudaFuncGetAttributes", cudaErrorNoKernelImageForDevice}}));
}

TEST(cuda_host, buffers_of_tests_see_writes_beside_them) {
  EXPECT_EQ(cu_seqlens({3, 1, 4}), (std::vector<int32_t>{0, 3, 4, 8}));
  device_count rows(7);
  rows.set(8);
  EXPECT_EQ(rows.value(), 8);
  device_buffer<float> p(3);
  EXPECT_TRUE(std::isnan(p[0]) && std::isnan(p.data()[3]) && std::isnan(p.data()[-1]));
  p.check();
  const float before = p.data()[3];
  std::memset(&p.data()[3], 0, 1);
  {
    const std::lock_guard<std::mutex> guard(cuda_host::memory.lock);
    EXPECT_NE(cuda_host::look_around(cuda_host::memory.all.at(reinterpret_cast<uintptr_t>(p.data()))), "");
  }
  std::memcpy(&p.data()[3], &before, 4);
}

}  // namespace
