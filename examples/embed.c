// Embed a sentence: embed minilm-q8.rsw "How are you?"
#include <stdio.h>

#include "rs.h"

int main(int argc, char **argv) {
  rs_model *model = NULL;
  rs_session *session = NULL;
  rs_text text = {argc == 3 ? argv[2] : "How are you?", RS_NUL_TERMINATED};
  float v[384];
  bool ok = rs_model_load(argc > 1 ? argv[1] : "minilm-q8.rsw", NULL, &model) == RS_OK &&
            rs_session_create(model, NULL, &session) == RS_OK && rs_encode(session, &text, 1, NULL, v, 384, NULL) == RS_OK;
  if (ok) printf("%g %g %g ...\n", v[0], v[1], v[2]);
  else fprintf(stderr, "%s\n", rs_last_error());
  rs_session_free(session);
  rs_model_free(model);
  return !ok;
}
