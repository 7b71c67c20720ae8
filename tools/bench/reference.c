/* The yardstick of tools/bench-check: products of small f32 matrices, in plain C, on as many threads as rs has.  It changes with
 * compiler and CPU, never with rs, so rs's time divided by this one's tells a slower rs from a slower hour of the machine. */
#include <stddef.h>

enum { N = 128 };

static void multiply(const float *a, const float *b, float *c) {
  for (size_t i = 0; i < N; i++) {
    float *row = c + i * N;
    for (size_t j = 0; j < N; j++) row[j] = 0;
    for (size_t k = 0; k < N; k++) {
      float x = a[i * N + k];
      for (size_t j = 0; j < N; j++) row[j] += x * b[k * N + j];
    }
  }
}

/* `repeats` rounds; in each all threads multiply, then meet. Returns a sum, so that nothing can be left out. */
double reference_run(int threads, long repeats) {
  double sum = 0;
  for (long r = 0; r < repeats; r++) {
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) reduction(+ : sum) schedule(static)
#endif
    for (int t = 0; t < threads; t++) {
      float a[N * N], b[N * N], c[N * N];
      for (size_t i = 0; i < (size_t)N * N; i++) a[i] = (float)(i % 7) - 3, b[i] = (float)(i % 5) - 2;
      multiply(a, b, c);
      multiply(c, b, a);
      sum += a[(size_t)(r % (N * N))];
    }
  }
  return sum;
}
