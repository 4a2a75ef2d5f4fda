/* The C API of Affect Edge: runs the recurrent step, and small encoders, of affect models on a device.
 *
 * Two ways in. A program on a device opens a bundle (affect_model_open), makes a stream for each face or voice, and
 * steps it frame by frame. A binding that has read and verified a bundle itself, such as the Python package, opens one
 * graph from memory (affect_graph_open) and runs it on whole arrays.
 *
 * Version    AFFECT_EDGE_ABI_VERSION names this header's layout and meaning. A caller compares it with
 *            affect_edge_abi_version() once, at load, and refuses a library that answers anything else.
 *            Structs begin with their own size, which the caller sets, so a struct that drifted is refused as well.
 * Ownership  What a function named _open or _create gives belongs to the caller, who gives it back with the matching
 *            _free; each _free accepts NULL. A stream, a batch and a runner keep alive what they were made from, so
 *            the order in which things are freed does not matter. Strings and arrays that a description points to
 *            belong to the graph or model and live as long as it does. Other buffers stay the caller's, and no pointer
 *            to them is kept after a call, but for the memory that affect_graph_open borrows.
 * Threads    Models and graphs never change: any number of threads may use one at once. A stream, a batch or a runner
 *            is for one thread at a time; different ones are independent. Functions that take only buffers may run at
 *            once as long as no two calls share a buffer that one of them writes.
 * Aliasing   No buffer that a call writes may overlap any other buffer of that call, unless it says so. This is not
 *            checked.
 * Errors     Functions that can fail return an affect_status. On anything but AFFECT_OK nothing was written to the
 *            caller's buffers and nothing changed, and affect_last_error() says what was found and what would work.
 *            No exception leaves the library, and no signal handler or floating-point setting of the caller changes.
 * Memory     Allocated by the functions named _open and _create, and for the time of the call by _restore. What runs
 *            a step allocates nothing and takes no lock.
 * Arrays     Dense, row-major (C order), float32, aligned as floats are. NaN and infinity are not special: they go
 *            through, and one in a feature stays in the stream's state until it is reset. Subnormal numbers count as 0.
 */
#ifndef AFFECT_EDGE_H
#define AFFECT_EDGE_H

#include <stddef.h>
#include <stdint.h>

#define AFFECT_API __attribute__((visibility("default")))

#ifdef __cplusplus
#define AFFECT_NOEXCEPT noexcept
extern "C" {
#else
#define AFFECT_NOEXCEPT
#endif

/* Of this header. The library's own is affect_edge_version(). */
#define AFFECT_EDGE_VERSION_MAJOR 0
#define AFFECT_EDGE_VERSION_MINOR 1
#define AFFECT_EDGE_VERSION_PATCH 0

/* Raised by one whenever an existing struct or the meaning of an existing function changes. New functions do not
 * raise it. */
#define AFFECT_EDGE_ABI_VERSION 2

/* ---- Status --------------------------------------------------------------------------------------------------- */

/* Plain ints, not an enum: an enum's size is the compiler's choice, and this is an ABI. */
typedef int32_t affect_status;
#define AFFECT_OK ((affect_status)0)
#define AFFECT_ERROR_NULL ((affect_status)1)         /* an argument, or one of the buffers it names, is NULL */
#define AFFECT_ERROR_SIZE ((affect_status)2)         /* a size is not positive, or does not fit in memory */
#define AFFECT_ERROR_STRUCT ((affect_status)3)       /* struct_size is not the size this library was built with */
#define AFFECT_ERROR_MEMORY ((affect_status)4)       /* there is not enough memory */
#define AFFECT_ERROR_FILE ((affect_status)5)         /* a file or folder cannot be read */
#define AFFECT_ERROR_BUNDLE ((affect_status)6)       /* a bundle or graph is malformed */
#define AFFECT_ERROR_INTEGRITY ((affect_status)7)    /* a file is not the one that was exported */
#define AFFECT_ERROR_STATE ((affect_status)8)        /* a saved state is damaged or of another model */
#define AFFECT_ERROR_NAME ((affect_status)9)         /* there is no graph, tensor or index of that name */
#define AFFECT_ERROR_BUFFER ((affect_status)10)      /* the caller's buffer is too small */
#define AFFECT_ERROR_VALUE ((affect_status)11)       /* a number is outside its range, or streams do not go together */
#define AFFECT_ERROR_UNSUPPORTED ((affect_status)12) /* a sound bundle, for another machine, engine or release */

/* The ABI version that the library was built with. Cannot fail. */
AFFECT_API int32_t affect_edge_abi_version(void) AFFECT_NOEXCEPT;

/* The library's version, such as "0.1.0"; a constant string. Cannot fail. */
AFFECT_API const char *affect_edge_version(void) AFFECT_NOEXCEPT;

/* What the library's arithmetic was compiled for, such as "avx2": the best that this processor can run. A constant
 * string. Cannot fail. Every instruction set gives the same numbers. */
AFFECT_API const char *affect_instruction_set(void) AFFECT_NOEXCEPT;

/* One English sentence for a status, a constant string. Cannot fail. */
AFFECT_API const char *affect_status_message(affect_status status) AFFECT_NOEXCEPT;

/* What went wrong in the calling thread's last call that failed: a sentence, empty before the first failure. It stays
 * until the next failure in this thread. Cannot fail. */
AFFECT_API const char *affect_last_error(void) AFFECT_NOEXCEPT;

/* ---- Tensors -------------------------------------------------------------------------------------------------- */

#define AFFECT_MOST_RANK 6

/* Which tensors a question is about. A graph has inputs and outputs; a model has all four. */
#define AFFECT_INPUTS ((int32_t)0)   /* of a graph, or of a model's encoder; a model without encoder has none */
#define AFFECT_OUTPUTS ((int32_t)1)  /* of a graph, or what a model says at each step, such as "valence" */
#define AFFECT_FEATURES ((int32_t)2) /* what a model's encoder gives and its step takes */
#define AFFECT_STATES ((int32_t)3)   /* what a stream carries from step to step */

typedef struct affect_tensor_info {
    uint64_t struct_size; /* sizeof(affect_tensor_info), set by the caller */
    const char *name;
    int32_t rank;
    int32_t batch_axis;              /* the axis along which streams lie; its size is given as 1 */
    int64_t sizes[AFFECT_MOST_RANK]; /* `rank` of them, the others 0 */
    int64_t floats;                  /* of one stream: the product of the sizes */
} affect_tensor_info;

/* ---- Models and streams --------------------------------------------------------------------------------------- */

typedef struct affect_model affect_model;
typedef struct affect_stream affect_stream;
typedef struct affect_batch affect_batch;

/* Opens a bundle that affect-export wrote for the engine "native".
 *
 * Every file that the manifest lists is hashed and compared before anything in it is used. The file of the weights
 * stays mapped while the model lives: it may be renamed or deleted meanwhile, but must not be written to or cut short,
 * which would change the model's answers or end the program. Install a new bundle beside an old one, never over it. A
 * bundle holds plain files: a symbolic link in it is refused, one to it is not.
 *
 * folder  the bundle's path, in the file system's encoding
 * model   receives the model; NULL on failure
 */
AFFECT_API affect_status affect_model_open(const char *folder, affect_model **model) AFFECT_NOEXCEPT;
AFFECT_API void affect_model_free(affect_model *model) AFFECT_NOEXCEPT;

typedef struct affect_model_info {
    uint64_t struct_size; /* sizeof(affect_model_info), set by the caller */
    const char *name;     /* such as "student" */
    const char *version;
    const char *licence;
    const char *weights_sha256;  /* what a saved state is tied to, in hex */
    const char *instruction_set; /* see affect_instruction_set */
    double frame_interval_s;     /* seconds between frames for which dt is 1 */
    int32_t variable_dt;         /* 1: trained for varying dt; 0: resample frames to the interval and leave dt at 1 */
    int32_t trained;             /* 0: random weights, for measuring time; its answers mean nothing */
    int32_t has_encoder;         /* 0: features are made elsewhere */
    int32_t verified_on_target;  /* 1: the export compared the bundle with the float model on such a machine */
    int64_t memory_bytes;        /* that each stream takes */
} affect_model_info;

AFFECT_API affect_status affect_model_describe(const affect_model *model, affect_model_info *info) AFFECT_NOEXCEPT;

/* How many tensors of a kind there are; -1 where `model` is NULL or `which` is none of the four. */
AFFECT_API int32_t affect_model_tensor_count(const affect_model *model, int32_t which) AFFECT_NOEXCEPT;
AFFECT_API affect_status affect_model_tensor(const affect_model *model, int32_t which, int32_t index,
                                             affect_tensor_info *info) AFFECT_NOEXCEPT;
/* The index of a tensor by its name. Indices stay the same as long as the bundle does. */
AFFECT_API affect_status affect_model_find(const affect_model *model, int32_t which, const char *name,
                                           int32_t *index) AFFECT_NOEXCEPT;

#define AFFECT_REGRESSION ((int32_t)0)   /* values in the range */
#define AFFECT_DISTRIBUTION ((int32_t)1) /* a probability for each label; they add up to 1 */
#define AFFECT_MULTILABEL ((int32_t)2)   /* a value in the range for each label */
#define AFFECT_FACES ((int32_t)3)        /* rows of 15: score, box (x, y, width, height), five points; fractions */
#define AFFECT_POINTS ((int32_t)4)       /* rows of (x, y), in fractions of the crop */

typedef struct affect_output_info {
    uint64_t struct_size; /* sizeof(affect_output_info), set by the caller */
    int32_t kind;         /* AFFECT_REGRESSION and so on */
    int32_t label_count;
    const char *const *labels; /* UTF-8, label_count of them */
    double low, high;          /* the range */
    const char *signal;        /* what it was taught from: "label", or the word for a substitute */
    double smoothing_s;        /* time constant of the filter recommended for it, in seconds; 0 for none */
} affect_output_info;

AFFECT_API affect_status affect_model_output(const affect_model *model, int32_t index,
                                             affect_output_info *info) AFFECT_NOEXCEPT;

typedef struct affect_image_info {
    uint64_t struct_size;  /* sizeof(affect_image_info), set by the caller */
    int32_t size;          /* side of the square crop in pixels */
    int32_t filters;       /* picture filters that the bundle wants first; affect_image_to_input takes only 0 */
    const char *align;     /* how a face is cut out: "eyes", "box", "points" or "picture" */
    double growth;         /* border around the box or points, a fraction of it on each side */
    float mean[3], std[3]; /* per channel, on the [0, 1] scale */
} affect_image_info;

/* Describes the encoder's input `input` where it is a picture; AFFECT_ERROR_NAME where it is not. */
AFFECT_API affect_status affect_model_image(const affect_model *model, int32_t input,
                                            affect_image_info *info) AFFECT_NOEXCEPT;

/* Turns an aligned crop into the encoder's picture, (pixel / 255 - mean) / std, to the last bit as in Python.
 *
 * rgb        `size` rows of `size` pixels of 3 bytes, red first
 * row_bytes  from one row to the next, at least 3 * size
 * out        (3, size, size), written
 */
AFFECT_API affect_status affect_image_to_input(const affect_model *model, int32_t input, const uint8_t *rgb,
                                               size_t row_bytes, float *out) AFFECT_NOEXCEPT;

/* A new stream, which has seen and heard nothing. */
AFFECT_API affect_status affect_stream_create(const affect_model *model, affect_stream **stream) AFFECT_NOEXCEPT;
AFFECT_API void affect_stream_free(affect_stream *stream) AFFECT_NOEXCEPT;

/* Back to what it was when it was made. */
AFFECT_API affect_status affect_stream_reset(affect_stream *stream) AFFECT_NOEXCEPT;

/* The memoryless half of a step: does not change the stream.
 *
 * inputs    one array for each of the model's AFFECT_INPUTS, in their order
 * features  one array for each of AFFECT_FEATURES, in their order, written
 */
AFFECT_API affect_status affect_stream_encode(affect_stream *stream, const float *const *inputs,
                                              float *const *features) AFFECT_NOEXCEPT;

/* One step of one stream.
 *
 * features  one array for each of AFFECT_FEATURES, in their order
 * dt        time since the stream's last step over frame_interval_s; finite and above 0
 * outputs   one array for each of AFFECT_OUTPUTS, in their order, written
 */
AFFECT_API affect_status affect_stream_step(affect_stream *stream, const float *const *features, float dt,
                                            float *const *outputs) AFFECT_NOEXCEPT;

/* What it takes to step several streams together, which costs much less than stepping each alone.
 *
 * most  streams that go through the model at a time, at least 1; more than 16 are treated as 16. A call may bring any
 *       number: they are taken in pieces.
 */
AFFECT_API affect_status affect_batch_create(const affect_model *model, int32_t most,
                                             affect_batch **batch) AFFECT_NOEXCEPT;
AFFECT_API void affect_batch_free(affect_batch *batch) AFFECT_NOEXCEPT;

/* One step of each of `count` streams, with the very numbers that affect_stream_step gives. Every argument is checked
 * before the first stream steps.
 *
 * streams   different ones, all of the batch's model
 * features  F arrays of the first stream, then F of the second, ...: feature f of stream i is features[i * F + f]
 * dt        one for each stream
 * outputs   likewise: output o of stream i is outputs[i * O + o]
 */
AFFECT_API affect_status affect_batch_step(affect_batch *batch, affect_stream *const *streams, int32_t count,
                                           const float *const *features, const float *dt,
                                           float *const *outputs) AFFECT_NOEXCEPT;

/* Copies one of the stream's AFFECT_STATES out, or in. A state that the runtime keeps, the last samples of a sound,
 * changes by this alone; the step takes care of the others. */
AFFECT_API affect_status affect_stream_get_state(const affect_stream *stream, int32_t index,
                                                 float *values) AFFECT_NOEXCEPT;
AFFECT_API affect_status affect_stream_set_state(affect_stream *stream, int32_t index,
                                                 const float *values) AFFECT_NOEXCEPT;

/* Saves the stream's state, to be restored into any stream of the same model here or in Python
 * (affect_runtimes.State.from_bytes).
 *
 * buffer    `capacity` bytes, or NULL to ask for the size only
 * size      receives how many bytes a saved state has, which never changes for a model; also where the buffer is too
 *           small
 */
AFFECT_API affect_status affect_stream_save(const affect_stream *stream, void *buffer, size_t capacity,
                                            size_t *size) AFFECT_NOEXCEPT;

/* Goes on from a saved state, of affect_stream_save or of Python's State.to_bytes for one stream. Its checksum and the
 * model it belongs to are checked; a stream that is refused one stays as it was. */
AFFECT_API affect_status affect_stream_restore(affect_stream *stream, const void *data, size_t size) AFFECT_NOEXCEPT;

/* ---- Graphs from memory ---------------------------------------------------------------------------------------- */

typedef struct affect_graph affect_graph;
typedef struct affect_runner affect_runner;

/* Opens one graph of a weights file that the caller has in memory.
 *
 * data   `size` bytes. At an address that is a multiple of 64 they are borrowed: they must stay as they are until the
 *        graph and its runners are freed. Elsewhere they are copied.
 * role   "encoder" or "step"
 * graph  receives the graph; NULL on failure
 */
AFFECT_API affect_status affect_graph_open(const void *data, size_t size, const char *role,
                                           affect_graph **graph) AFFECT_NOEXCEPT;
AFFECT_API void affect_graph_free(affect_graph *graph) AFFECT_NOEXCEPT;

/* How many inputs (AFFECT_INPUTS) or outputs (AFFECT_OUTPUTS) there are; -1 where an argument is wrong. */
AFFECT_API int32_t affect_graph_tensor_count(const affect_graph *graph, int32_t which) AFFECT_NOEXCEPT;
AFFECT_API affect_status affect_graph_tensor(const affect_graph *graph, int32_t which, int32_t index,
                                             affect_tensor_info *info) AFFECT_NOEXCEPT;

/* What runs a graph.
 *
 * streams  that go through it at a time, at least 1; more than 16 are treated as 16
 */
AFFECT_API affect_status affect_runner_create(const affect_graph *graph, int32_t streams,
                                              affect_runner **runner) AFFECT_NOEXCEPT;
AFFECT_API void affect_runner_free(affect_runner *runner) AFFECT_NOEXCEPT;

/* Runs the graph for `batch` streams side by side, in pieces where they are more than go through at a time.
 *
 * inputs   one whole array for each input, of the sizes that affect_graph_tensor gives with `batch` on the batch axis
 * outputs  likewise, written
 */
AFFECT_API affect_status affect_runner_run(affect_runner *runner, const float *const *inputs, float *const *outputs,
                                           int64_t batch) AFFECT_NOEXCEPT;

/* ---- The selective scan alone ---------------------------------------------------------------------------------- */

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

AFFECT_API affect_status affect_selective_scan_step(const affect_scan_step_args *args) AFFECT_NOEXCEPT;

#define AFFECT_SCAN_SOFTPLUS ((uint32_t)1)  /* delta is taken before softplus */
#define AFFECT_SCAN_BACKWARDS ((uint32_t)2) /* from the last position to the first */
#define AFFECT_SCAN_ADD ((uint32_t)4)       /* y is added to, not replaced */

/* The same recurrence over the L positions of a whole sequence. Channels are in G groups of D / G, and those of one
 * group share b and c. Strides count floats. */
typedef struct affect_scan_args {
    uint64_t struct_size; /* sizeof(affect_scan_args) */
    int64_t length;       /* L, at least 1 */
    int64_t channels;     /* D, at least 1 */
    int64_t states;       /* N, 1 to 256 */
    int64_t groups;       /* G, at least 1, a divisor of D */
    int64_t rows;         /* 0; or a divisor R of L, to scan a grid of R rows and L / R columns by columns: the l-th
                             position is the one stored at (l % R) * (L / R) + l / R */
    const float *x;       /* (L, D) */
    const float *delta;   /* (L, D) */
    const float *a;       /* (D, N) dense */
    const float *b;       /* (L, G, N) */
    const float *c;       /* (L, G, N) */
    const float *skip;    /* (D) dense, or NULL for none */
    const float *before;  /* (D, N) dense, or NULL for zeros */
    float *after;         /* (D, N) dense, written, or NULL; may be the array `before` */
    float *y;             /* (L, D), written */
    int64_t x_stride;     /* from one position to the next; of y at least D, of the others at least 0 */
    int64_t delta_stride;
    int64_t b_stride;
    int64_t c_stride;
    int64_t y_stride;
    int64_t b_group; /* from one group to the next, at least 0 */
    int64_t c_group;
    uint32_t flags; /* AFFECT_SCAN_... */
    uint32_t zero;  /* 0 */
} affect_scan_args;

AFFECT_API affect_status affect_selective_scan(const affect_scan_args *args) AFFECT_NOEXCEPT;

#define AFFECT_EXP ((int32_t)0)
#define AFFECT_SIGMOID ((int32_t)1)
#define AFFECT_SOFTPLUS ((int32_t)2)
#define AFFECT_SILU ((int32_t)3)
#define AFFECT_TANH ((int32_t)4)
#define AFFECT_GELU ((int32_t)5) /* the exact one, with erf */

/* y = function(x), as the graphs compute it; n is at least 0, and y may be the array x. */
AFFECT_API affect_status affect_math(int32_t function, const float *x, float *y, int64_t n) AFFECT_NOEXCEPT;

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* AFFECT_EDGE_H */
