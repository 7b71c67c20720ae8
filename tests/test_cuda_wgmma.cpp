// The tests of test_cuda_linear, with the products of four warps that compute capability 9.0 has.
#define RS_CUDA_HOST_WGMMA
#define CudaLinear CudaLinearWgmma
#define CudaWeights CudaWeightsWgmma
#include "test_cuda_linear.cpp"  // NOLINT(bugprone-suspicious-include)
