// The selective-scan step in plain C++: the readable form that faster ones are compared with.

#include <cmath>
#include <cstddef>
#include <limits>

#include "affect_native.h"

namespace {

// True when an array of batch * channels * states floats has a size that a pointer difference can hold.
bool fits_in_memory(int64_t batch, int64_t channels, int64_t states) {
    constexpr int64_t limit = std::numeric_limits<std::ptrdiff_t>::max() / static_cast<int64_t>(sizeof(float));
    return channels <= limit / batch && states <= limit / (batch * channels);
}

affect_status check(const affect_scan_step_args *args) {
    if (args == nullptr) {
        return AFFECT_ERROR_NULL;
    }
    // First of all fields: nothing after it can be trusted when the caller's layout is another.
    if (args->struct_size != sizeof(affect_scan_step_args)) {
        return AFFECT_ERROR_STRUCT;
    }
    if (args->batch <= 0 || args->channels <= 0 || args->states <= 0 ||
        !fits_in_memory(args->batch, args->channels, args->states)) {
        return AFFECT_ERROR_SIZE;
    }
    const void *const buffers[] = {args->x, args->delta, args->a, args->b, args->c, args->d, args->state, args->y};
    for (const void *buffer : buffers) {
        if (buffer == nullptr) {
            return AFFECT_ERROR_NULL;
        }
    }
    return AFFECT_OK;
}

}  // namespace

extern "C" int32_t affect_native_abi_version(void) noexcept { return AFFECT_NATIVE_ABI_VERSION; }

extern "C" const char *affect_status_message(affect_status status) noexcept {
    switch (status) {
        case AFFECT_OK:
            return "done";
        case AFFECT_ERROR_NULL:
            return "the argument struct or one of its buffers is NULL";
        case AFFECT_ERROR_SIZE:
            return "batch, channels and states must be at least 1 and their product must fit in memory";
        case AFFECT_ERROR_STRUCT:
            return "struct_size is not the size of the struct that this library was built with";
        default:
            return "unknown status";
    }
}

extern "C" affect_status affect_selective_scan_step(const affect_scan_step_args *args) noexcept {
    const affect_status status = check(args);
    if (status != AFFECT_OK) {
        return status;
    }
    const int64_t channels = args->channels;
    const int64_t states = args->states;
    for (int64_t stream = 0; stream < args->batch; ++stream) {
        const float *const b = args->b + stream * states;
        const float *const c = args->c + stream * states;
        for (int64_t channel = 0; channel < channels; ++channel) {
            const int64_t at = stream * channels + channel;
            const float x = args->x[at];
            const float delta = args->delta[at];
            const float *const a = args->a + channel * states;
            float *const h = args->state + at * states;
            float y = args->d[channel] * x;
            for (int64_t n = 0; n < states; ++n) {
                h[n] = std::exp(delta * a[n]) * h[n] + delta * b[n] * x;
                y += c[n] * h[n];
            }
            args->y[at] = y;
        }
    }
    return AFFECT_OK;
}
