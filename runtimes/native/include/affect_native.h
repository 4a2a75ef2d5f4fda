/* The C API of Affect Edge's native step library.
 *
 * Version    AFFECT_NATIVE_ABI_VERSION names this header's layout and meaning. A caller compares it with
 *            affect_native_abi_version() once, at load, and refuses a library that answers anything else.
 *            Argument structs begin with their own size, so a struct that drifted is refused as well.
 * Ownership  The caller owns every buffer, before, during and after a call. The library allocates nothing,
 *            keeps no pointer after a call returns, and has no state of its own.
 * Threads    Every function may be called from any number of threads at once, as long as no two calls at the
 *            same time share a buffer that one of them writes (`state` and `y`). Inputs may be shared.
 * Aliasing   No buffer that a call writes may overlap any other buffer of that call. This is not checked.
 * Errors     Functions that can fail return an affect_status; on anything but AFFECT_OK no buffer was touched.
 *            No exception leaves the library.
 * Arrays     Dense, row-major (C order), float32. NaN and infinity are not special: they go through.
 */
#ifndef AFFECT_NATIVE_H
#define AFFECT_NATIVE_H

#include <stdint.h>

#ifdef _WIN32
#ifdef AFFECT_NATIVE_BUILD
#define AFFECT_API __declspec(dllexport)
#else
#define AFFECT_API __declspec(dllimport)
#endif
#else
#define AFFECT_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
#define AFFECT_NOEXCEPT noexcept
extern "C" {
#else
#define AFFECT_NOEXCEPT
#endif

/* Raised by one whenever an existing struct or the meaning of an existing function changes. New functions do not
 * raise it. */
#define AFFECT_NATIVE_ABI_VERSION 1

/* Plain ints, not an enum: an enum's size is the compiler's choice, and this is an ABI. */
typedef int32_t affect_status;
#define AFFECT_OK ((affect_status)0)
#define AFFECT_ERROR_NULL ((affect_status)1)   /* the struct or one of its buffers is NULL */
#define AFFECT_ERROR_SIZE ((affect_status)2)   /* a size is not positive, or their product does not fit in memory */
#define AFFECT_ERROR_STRUCT ((affect_status)3) /* struct_size is not the size that this library was built with */

/* One step of the selective scan (Mamba's recurrence) for `batch` independent streams:
 *
 *     state = exp(delta * a) * state + delta * b * x
 *     y     = sum over n of c * state  +  d * x
 *
 * `delta` is the step size after softplus and after any scaling by real elapsed time; `a` is already negative,
 * that is -exp(A_log). */
typedef struct affect_scan_step_args {
    uint64_t struct_size; /* sizeof(affect_scan_step_args) */
    int64_t batch;        /* streams in this step, at least 1 */
    int64_t channels;     /* inner channels of the block, at least 1 */
    int64_t states;       /* state entries per channel (the paper's N), at least 1 */
    const float *x;       /* (batch, channels) */
    const float *delta;   /* (batch, channels) */
    const float *a;       /* (channels, states) */
    const float *b;       /* (batch, states) */
    const float *c;       /* (batch, states) */
    const float *d;       /* (channels) */
    float *state;         /* (batch, channels, states), updated in place */
    float *y;             /* (batch, channels), written */
} affect_scan_step_args;

/* The ABI version that the library was built with. Cannot fail. */
AFFECT_API int32_t affect_native_abi_version(void) AFFECT_NOEXCEPT;

/* One English sentence for a status, a constant string that is never freed. Cannot fail. */
AFFECT_API const char *affect_status_message(affect_status status) AFFECT_NOEXCEPT;

/* Runs one step as described at affect_scan_step_args. Returns AFFECT_OK, or an error with nothing written. */
AFFECT_API affect_status affect_selective_scan_step(const affect_scan_step_args *args) AFFECT_NOEXCEPT;

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* AFFECT_NATIVE_H */
