// What the CUDA backend keeps between runs, by its own interface: rs-backend.h.
#define RS_CUDA_HOST
#include "../rs-cuda.cu"

#include "cuda_harness.h"

namespace {

// Of 16 rows of 256 as w8 panels, all zeros.
struct zero_weight {
  std::vector<char> data = std::vector<char>(16 * 256 + 16 * 8);
  backend_tensor tensor(int32_t id) const {
    backend_tensor w = {};
    w.place = backend_place::weight, w.type = RS_W8, w.layout = RS_PANELS;
    w.rows = 16, w.cols = w.stride = 256, w.data = data.data(), w.bytes = data.size(), w.id = id, w.name = "w";
    return w;
  }
  rs_tensor_info info() const {
    rs_tensor_info w = {};
    w.name = "w", w.type = RS_W8, w.layout = RS_PANELS;
    w.rank = 2, w.shape[0] = 16, w.shape[1] = 256, w.data = data.data(), w.bytes = data.size();
    return w;
  }
};

// y = x + x of [tokens, cols], n_tokens of a capacity; or x + z, x by a source.
struct sum_graph {
  using ranges = std::vector<std::pair<int64_t, int64_t>>;
  backend_op op = {};
  backend_level level = {};
  backend_input inputs[2] = {};
  backend_output output = {};
  backend_run run = {};
  std::vector<float> x, z, y;
  mutable ranges parts;  // that the source wrote: first row, rows

  sum_graph(uint64_t graph, int64_t tokens, int64_t capacity, int64_t cols)
      : x(normal_values(static_cast<size_t>(tokens * cols), 1)), y(x.size()) {
    backend_tensor t = {};
    t.place = backend_place::input, t.rows_are = backend_rows::tokens, t.type = RS_F32;
    t.rows = capacity, t.cols = t.stride = cols, t.name = "x";
    op.op = OP_ADD;
    op.in[0] = op.in[1] = t;
    t.place = backend_place::result, t.id = 1, t.output = true, t.name = "y";
    op.out = t;
    level = {tokens, capacity, nullptr};
    inputs[0] = {0, RS_F32, x.data(), x.size() * 4, static_cast<size_t>(capacity * cols) * 4, {}};
    output = {1, y.data(), y.size() * 4};
    run.graph = graph;
    run.ops = &op, run.n_ops = 1;
    run.sequence_capacity = 1;
    run.levels = &level, run.n_levels = 1;
    run.inputs = inputs, run.n_inputs = 1;
    run.outputs = &output, run.n_outputs = 1;
    run.starts = -1;
    run.arena_bytes = inputs[0].capacity;
  }
  sum_graph(const sum_graph &) = delete;

  void use_source() {
    z = normal_values(x.size(), 2);
    inputs[1] = inputs[0];
    inputs[1].id = op.in[1].id = 2, inputs[1].data = z.data();
    inputs[0].data = nullptr, inputs[0].source = {write_rows, this, level.tokens};
    run.n_inputs = 2;
  }
  // y = x w, of 256 columns.  w is no model's, but a constant of the graph.
  void multiply(const zero_weight &w) {
    op.op = OP_LINEAR;
    op.in[1] = w.tensor(2);
    op.out.cols = op.out.stride = 16;
    output.bytes = static_cast<size_t>(level.tokens) * 16 * 4;
  }
  static void write_rows(const void *context, void *to, int64_t part, void (*written)(void *, int64_t, int64_t), void *of) {
    const auto &g = *static_cast<const sum_graph *>(context);
    for (int64_t first = 0; first < g.level.tokens; first += part) {
      const int64_t n = std::min(part, g.level.tokens - first), at = first * g.op.out.cols;
      memcpy(static_cast<float *>(to) + at, g.x.data() + at, static_cast<size_t>(n * g.op.out.cols) * 4);
      written(of, first, n);
      g.parts.emplace_back(first, n);
    }
  }

  rs_status go(backend_session *s, backend_error *error) {
    std::fill(y.begin(), y.end(), 0.0f);
    return cuda_backend.run(s, &run, error);
  }
  void expect_sum() const {
    const std::vector<float> &other = run.n_inputs == 2 ? z : x;
    for (size_t i = 0; i < y.size(); i++) ASSERT_EQ(y[i], x[i] + other[i]) << i;
  }
};

struct opened {
  backend_model *model = nullptr;
  backend_session *session = nullptr;
  backend_error error = {};
  explicit opened(int device = 0) {
    EXPECT_EQ(cuda_backend.open_model(device, &model, &error), RS_OK) << error.text;
    EXPECT_EQ(cuda_backend.open_session(model, &session, &error), RS_OK) << error.text;
  }
  ~opened() {
    cuda_backend.close_session(session);
    cuda_backend.close_model(model);
  }
  opened(const opened &) = delete;
};

// What was recorded has the addresses of before: where a larger run got some of its memory and not the rest, which the recorded one
// does not even use, they are gone.
TEST(CudaBackend, ARunThatFoundNoMemoryLeavesNoStaleAddresses) {
  const keep_settings kept;
  opened o;
  sum_graph small(1, 60, 64, 16), large(2, 1000, 1024, 256);
  const zero_weight weight;
  large.multiply(weight);
  for (int i = 0; i < 3; i++) {
    ASSERT_EQ(small.go(o.session, &o.error), RS_OK) << o.error.text;
    small.expect_sum();
  }
  size_t unused = 0, all = 0;
  ASSERT_EQ(cudaMemGetInfo(&unused, &all), cudaSuccess);
  // Room for what is copied and for results; not for 256 KiB of rows in 8 bits.
  cuda_host::settings.memory_limit = all - unused + large.inputs[0].capacity + large.run.arena_bytes + 50000;
  EXPECT_EQ(large.go(o.session, &o.error), RS_ERR_MEMORY);
  EXPECT_NE(std::string(o.error.text).find("262144 bytes for quantized activations"), std::string::npos) << o.error.text;
  cuda_host::settings.memory_limit = all;
  for (int i = 0; i < 3; i++) {
    ASSERT_EQ(small.go(o.session, &o.error), RS_OK) << o.error.text;
    small.expect_sum();
  }
  ASSERT_EQ(large.go(o.session, &o.error), RS_OK) << o.error.text;
  for (size_t i = 0; i < 1000 * 16; i++) ASSERT_EQ(large.y[i], 0.0f) << i;
}

// Runs of one capacity share a record; the one that was used longest ago makes room, and a graph that is forgotten leaves none.
TEST(CudaBackend, RecordsAreByCapacityAndBounded) {
  opened o;
  card_session &s = *session_of(o.session);
  for (const int64_t tokens : {60, 5, 64}) {
    sum_graph g(7, tokens, 64, 16);
    ASSERT_EQ(g.go(o.session, &o.error), RS_OK) << o.error.text;
    g.expect_sum();
  }
  ASSERT_EQ(s.recorded.size(), 1u);
  EXPECT_NE(s.recorded[0]->exec, nullptr);
  for (uint64_t graph = 100; graph < 100 + most_recorded; graph++) {
    sum_graph g(graph, 3, 64, 16);
    ASSERT_EQ(g.go(o.session, &o.error), RS_OK) << o.error.text;
  }
  EXPECT_EQ(s.recorded.size(), most_recorded);
  for (const auto &run : s.recorded) EXPECT_NE(run->graph, 7u);
  cuda_backend.forget_graph(o.session, 100);
  EXPECT_EQ(s.recorded.size(), most_recorded - 1);
}

// While a stream of the device records, another thread loads a model and another session has its first run: neither notices.
TEST(CudaBackend, WeightsGoUpWhileAnotherThreadRecords) {
  opened o;
  sum_graph g(1, 60, 64, 16);
  ASSERT_EQ(g.go(o.session, &o.error), RS_OK) << o.error.text;
  int others = 0;
  const auto main_thread = std::this_thread::get_id();
  cuda_host::interfere = [&](const std::string &call) {
    if (call != "cudaLaunchKernelEx" || std::this_thread::get_id() != main_thread || others++ > 0) return cudaSuccess;
    std::thread([] {
      opened other;
      const zero_weight weight;
      const rs_tensor_info info = weight.info();
      EXPECT_EQ(cuda_backend.add_weight(other.model, &info, &other.error), RS_OK) << other.error.text;
      sum_graph linear(2, 50, 64, 256);
      linear.multiply(weight);
      EXPECT_EQ(linear.go(other.session, &other.error), RS_OK) << other.error.text;
    }).join();
    return cudaSuccess;
  };
  EXPECT_EQ(g.go(o.session, &o.error), RS_OK) << o.error.text;
  cuda_host::interfere = nullptr;
  EXPECT_EQ(others, 1);
  g.expect_sum();
  EXPECT_NE(session_of(o.session)->recorded[0]->exec, nullptr);
}

// Of one graph, runs of one capacity may have other operators: they are no runs of one record.
TEST(CudaBackend, RecordsAreByOperators) {
  opened o;
  sum_graph g(1, 60, 64, 16);
  backend_op ops[] = {g.op, g.op, g.op};
  ops[1].out.id = 3, ops[2].out.id = 4;  // which nobody reads
  for (const int i : {1, 2}) ops[i].out.output = false, ops[i].out.offset = static_cast<size_t>(i) * g.run.arena_bytes;
  g.run.arena_bytes *= 3;
  backend_op others[] = {ops[0], ops[2]};
  for (int i = 0; i < 4; i++)
    for (const auto &[first, n] : {std::pair{ops, 1}, {ops, 2}, {others, 2}, {ops, 3}}) {
      g.run.ops = first, g.run.n_ops = static_cast<size_t>(n);
      const uint64_t before = cuda_host::launches();
      ASSERT_EQ(g.go(o.session, &o.error), RS_OK) << o.error.text;
      g.expect_sum();
      EXPECT_EQ(cuda_host::launches() - before, static_cast<uint64_t>(n)) << i;
    }
  EXPECT_EQ(session_of(o.session)->recorded.size(), 4u);
}

// The device of the thread is the caller's: what is on another card leaves it as it was, and all of it is on that card.
TEST(CudaBackend, TheCallersDeviceStaysWhatItWas) {
  const keep_settings kept;
  cuda_host::settings.devices = 2;
  for (const int mine : {0, 1}) {
    ASSERT_EQ(cudaSetDevice(mine), cudaSuccess);
    const size_t before[] = {cuda_host::memory.used[0], cuda_host::memory.used[1]};
    const auto expect_mine = [&](const char *after) {
      int device = -1;
      EXPECT_EQ(cudaGetDevice(&device), cudaSuccess);
      EXPECT_EQ(device, mine) << after;
      EXPECT_EQ(cuda_host::memory.used[0], before[0]) << after;
    };
    backend_model *model = nullptr;
    backend_session *session = nullptr;
    backend_error error = {};
    EXPECT_EQ(cuda_backend.open_model(2, &model, &error), RS_ERR_IO);
    expect_mine("open_model of no card");
    ASSERT_EQ(cuda_backend.open_model(1, &model, &error), RS_OK) << error.text;
    expect_mine("open_model");
    const zero_weight weight;
    const rs_tensor_info info = weight.info();
    ASSERT_EQ(cuda_backend.add_weight(model, &info, &error), RS_OK) << error.text;
    expect_mine("add_weight");
    ASSERT_EQ(cuda_backend.open_session(model, &session, &error), RS_OK) << error.text;
    expect_mine("open_session");
    sum_graph sum(1, 60, 64, 16), product(2, 60, 64, 256), refused(3, 1, 64, 16);
    product.multiply(weight);
    refused.level.tokens = most_tokens + 1;
    for (int i = 0; i < 3; i++) {  // the second is recorded
      ASSERT_EQ(sum.go(session, &error), RS_OK) << error.text;
      sum.expect_sum();
      ASSERT_EQ(product.go(session, &error), RS_OK) << error.text;
      EXPECT_EQ(refused.go(session, &error), RS_ERR_LIMIT);
      expect_mine("run");
    }
    EXPECT_GT(cuda_host::memory.used[1], before[1]);
    cuda_backend.forget_graph(session, 2);
    expect_mine("forget_graph");
    cuda_backend.close_session(session);
    expect_mine("close_session");
    cuda_backend.close_model(model);
    expect_mine("close_model");
    EXPECT_EQ(cuda_host::memory.used[1], before[1]);
  }
  EXPECT_EQ(cudaSetDevice(0), cudaSuccess);
}

// What an application does beside may spoil a recording.  The run goes without, and a later one is recorded.
TEST(CudaBackend, ADisturbedRecordingIsMadeLater) {
  opened o;
  uint64_t graph = 0;
  const auto second_run = [&](const std::string &at, const std::function<cudaError_t()> &what) {
    SCOPED_TRACE(at);
    sum_graph g(++graph, 60, 64, 16);
    EXPECT_EQ(g.go(o.session, &o.error), RS_OK) << o.error.text;
    const auto &run = *session_of(o.session)->recorded.back();
    int times = 0;
    cuda_host::interfere = [&](const std::string &call) { return call == at && times++ == 0 ? what() : cudaSuccess; };
    const rs_status status = g.go(o.session, &o.error);
    EXPECT_GE(times, 1);
    EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess);
    if (status == RS_OK) {
      EXPECT_EQ(run.exec, nullptr);
      g.expect_sum();
    }
    cuda_host::interfere = nullptr;
    for (int i = 0; i < 2; i++) {
      EXPECT_EQ(g.go(o.session, &o.error), RS_OK) << o.error.text;
      EXPECT_NE(run.exec, nullptr);
      g.expect_sum();
    }
    return status;
  };
  for (const char *at : {"cudaStreamBeginCapture", "cudaLaunchKernelEx", "cudaStreamEndCapture", "cudaGraphInstantiate"})
    for (const cudaError_t e : {cudaErrorStreamCaptureUnsupported, cudaErrorStreamCaptureInvalidated})
      EXPECT_EQ(second_run(at, [&] { return cuda_host::failed(e); }), RS_OK) << o.error.text;
  EXPECT_EQ(second_run("cudaLaunchKernelEx",
                       [] {
                         std::thread([] { EXPECT_EQ(cudaDeviceSynchronize(), cudaErrorStreamCaptureUnsupported); }).join();
                         return cudaSuccess;
                       }),
            RS_OK)
      << o.error.text;
  // Other errors are said.
  for (const char *at : {"cudaStreamBeginCapture", "cudaLaunchKernelEx", "cudaStreamEndCapture", "cudaGraphInstantiate"})
    EXPECT_EQ(second_run(at, [] { return cuda_host::failed(cudaErrorMemoryAllocation); }), RS_ERR_MEMORY) << at;
}

// Its rows go to the card in parts, of as many rows as fit or of one, and are new in each run: the first, the one that is recorded,
// and those that replay it.
TEST(CudaBackend, RowsOfASourceGoUpInParts) {
  const keep_settings kept;
  cuda_host::settings.check = false;
  constexpr int64_t part = upload_part;
  struct {
    int64_t tokens, capacity, cols;
    sum_graph::ranges parts;
  } const cases[] = {
      {2 * part / 4096 + 7, 2 * part / 4096 + 64, 1024, {{0, part / 4096}, {part / 4096, part / 4096}, {2 * part / 4096, 7}}},
      {part / 4096, 2 * part / 4096, 1024, {{0, part / 4096}}},
      {3, 4, part / 4 + 4, {{0, 1}, {1, 1}, {2, 1}}},
      {0, 64, 16, {}}};
  opened o;
  for (const auto &c : cases) {
    SCOPED_TRACE(c.tokens);
    sum_graph g(static_cast<uint64_t>(c.tokens) + 1, c.tokens, c.capacity, c.cols);
    g.use_source();
    for (int i = 0; i < 4; i++) {
      for (float &v : g.x) v += 1;
      g.parts.clear();
      ASSERT_EQ(g.go(o.session, &o.error), RS_OK) << o.error.text;
      g.expect_sum();
      EXPECT_EQ(g.parts, c.parts) << i;
    }
  }
}

TEST(CudaBackend, ASourceIsNotAskedWhereThereIsNoMemory) {
  const keep_settings kept;
  opened o;
  sum_graph g(1, 60, 64, 16);
  g.use_source();
  const auto refused = [&](const char *part) {
    EXPECT_EQ(g.go(o.session, &o.error), RS_ERR_MEMORY);
    EXPECT_NE(std::string(o.error.text).find(part), std::string::npos) << o.error.text;
    EXPECT_EQ(g.parts.size(), 0u);
  };
  cuda_host::settings.memory_limit = 5000;
  refused("bytes for inputs");
  cuda_host::settings.memory_limit = kept.before.memory_limit;
  cuda_host::settings.pinned_limit = 5000;
  refused("bytes of page-locked memory for inputs");
  cuda_host::settings.pinned_limit = kept.before.pinned_limit;
  for (int i = 0; i < 3; i++) {
    ASSERT_EQ(g.go(o.session, &o.error), RS_OK) << o.error.text;
    g.expect_sum();
  }
}

TEST(CudaBackend, MoreTokensThanAGridHasAreAnError) {
  opened o;
  sum_graph g(1, 1, 64, 16);
  g.level = {most_tokens + 1, 65536 * 64, nullptr};
  EXPECT_EQ(g.go(o.session, &o.error), RS_ERR_LIMIT);
  EXPECT_NE(std::string(o.error.text).find("4194241 tokens, at most 4194240"), std::string::npos) << o.error.text;
}

}  // namespace
