#pragma once
#include "../rs.h"

// Sets the text of rs_last_error() and returns `status`, so that errors read `return rs_fail(RS_ERR_FORMAT, "'%s': …", name);`.
rs_status rs_fail(rs_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

// Return from the caller with the status of a call that failed.
#define RS_TRY(call) \
  do { \
    const rs_status status_ = (call); \
    if (status_ != RS_OK) return status_; \
  } while (0)
