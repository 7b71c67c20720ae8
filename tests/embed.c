/* A program in C99 that uses the library as its users do.
 *
 *   embed                    check what needs no model: version, names, errors
 *   embed MODEL TEXT...      encode the texts; a line each with their tokens, the length of their vectors and their first values
 */
#include <math.h>
#include <rs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int fail(const char *what) {
  fprintf(stderr, "embed: %s: %s\n", what, rs_last_error());
  return 1;
}

static int without_model(void) {
  rs_model *model = NULL;
  rs_status status = rs_model_load("/nonexistent/no.rsw", NULL, &model);
  if (strcmp(rs_version(), RS_VERSION) != 0) return fail("header and library are of different versions");
  if (status == RS_OK || model != NULL) return fail("a file that is not there was loaded");
  if (strstr(rs_last_error(), "/nonexistent/no.rsw") == NULL) return fail("the error does not name the file");
  printf("rs %s, kernels: %s\n%s: %s\n", rs_version(), rs_isa(), rs_status_name(status), rs_last_error());
  return 0;
}

static int encode(const rs_model *model, rs_session *session, char **words, size_t n) {
  rs_model_info info = {0};
  rs_encode_params params = {0};
  rs_text *texts;
  rs_text_info *infos;
  float *vectors;
  size_t i, dim;
  int status = 0;

  info.size = sizeof info;
  params.size = sizeof params;
  params.normalize = RS_ON;
  if (rs_model_get_info(model, &info) != RS_OK) return fail("info");
  dim = (size_t)info.dim;
  texts = calloc(n, sizeof *texts);
  infos = calloc(n, sizeof *infos);
  vectors = calloc(n * dim, sizeof *vectors);
  if (texts == NULL || infos == NULL || vectors == NULL) {
    fprintf(stderr, "embed: out of memory\n");
    status = 1;
  } else {
    for (i = 0; i < n; ++i) {
      texts[i].data = words[i];
      texts[i].length = RS_NUL_TERMINATED;
    }
    if (rs_encode(session, texts, n, &params, vectors, n * dim, infos) != RS_OK) status = fail("encode");
  }
  for (i = 0; status == 0 && i < n; ++i) {
    const float *v = vectors + i * dim;
    double square = 0;
    size_t j;
    for (j = 0; j < dim; ++j) square += (double)v[j] * v[j];
    printf("tokens %d norm %.4f dim %lu: %.6f %.6f %.6f\n", (int)infos[i].tokens, sqrt(square), (unsigned long)dim, v[0], v[1],
           v[2]);
    if (!(fabs(sqrt(square) - 1) < 1e-3)) status = fail("a vector that is not normalised");
  }
  free(vectors);
  free(infos);
  free(texts);
  return status;
}

int main(int argc, char **argv) {
  rs_model *model = NULL;
  rs_session *session = NULL;
  int status;

  if (argc == 1) return without_model();
  if (argc == 2) {
    fprintf(stderr, "usage: embed [MODEL TEXT...]\n");
    return 2;
  }
  if (rs_model_load(argv[1], NULL, &model) != RS_OK) return fail("load");
  if (rs_session_create(model, NULL, &session) != RS_OK) status = fail("session");
  else status = encode(model, session, argv + 2, (size_t)argc - 2);
  rs_session_free(session);
  rs_model_free(model);
  return status;
}
