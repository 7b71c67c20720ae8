// Sessions on a card in tests: kernels run on the CPU (cuda_host.h), in a library that RS_CUDA_LIBRARY names.
#pragma once
#include "encoding.h"
#include "test_util.h"

#include <string>

// Where the build put it.
inline std::string host_library() { return env_or("RS_CUDA_HOST_LIBRARY", ""); }

// RS_CUDA_LIBRARY and RS_CUDA_HOST are read once a process.  settings: cuda_host::settings_of_environment
class host_environment : public ::testing::Environment {
 public:
  explicit host_environment(std::string settings) : settings_(std::move(settings)) {}
  void SetUp() override {
    setenv("RS_CUDA_LIBRARY", host_library().c_str(), 1);
    setenv("RS_CUDA_HOST", settings_.c_str(), 1);
  }

 private:
  std::string settings_;
};

struct loaded_on {
  rs_model *model = nullptr;
  rs_session *session = nullptr;
  loaded_on(const std::string &path, const char *device, bool profile = false) {
    auto load = sized<rs_load_params>();
    load.device = device;
    EXPECT_EQ(rs_model_load(path.c_str(), &load, &model), RS_OK) << rs_last_error();
    auto p = sized<rs_session_params>();
    p.profile = profile;
    EXPECT_EQ(rs_session_create(model, &p, &session), RS_OK) << rs_last_error();
  }
  ~loaded_on() {
    rs_session_free(session);
    rs_model_free(model);
  }
  loaded_on(const loaded_on &) = delete;
};
