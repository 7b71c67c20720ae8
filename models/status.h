#pragma once
#include "../rs.h"

#include <algorithm>
#include <cstring>

// Sets the text of rs_last_error() and returns `status`, so that errors read `return rs_fail(RS_ERR_FORMAT, "'%s': …", name);`.
rs_status rs_fail(rs_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

// The C++ library may throw (std::bad_alloc above all); nothing leaves the API.  What looks for something that need not be there
// leaves no text in rs_last_error() either, where the whole succeeds.
rs_status rs_guarded_call(rs_status (*call)(void *), void *what);
template <class F>
rs_status rs_guarded(F f) {  // all but the call is there once
  return rs_guarded_call([](void *what) -> rs_status { return (*static_cast<F *>(what))(); }, &f);
}

// Parameter structs of callers: copy the fields that the caller's version of the struct has, leave the others at zero.
template <class P>
rs_status rs_read_params(const P *params, const char *what, P *out) {
  memset(static_cast<void *>(out), 0, sizeof *out);
  out->size = sizeof *out;
  if (!params) return RS_OK;
  if (params->size < sizeof(uint32_t))
    return rs_fail(RS_ERR_ARGUMENT, "%s.size is %u: set it to sizeof(%s)", what, params->size, what);
  memcpy(static_cast<void *>(out), params, std::min<size_t>(params->size, sizeof *out));
  return RS_OK;
}

// Return from the caller with the status of a call that failed.
#define RS_TRY(call) \
  do { \
    const rs_status status_ = (call); \
    if (status_ != RS_OK) return status_; \
  } while (0)
