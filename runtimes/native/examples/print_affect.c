/* Prints what a model says of each frame: print_affect BUNDLE FEATURES.f32
 *
 * FEATURES.f32 holds, frame after frame, as many little-endian float32 numbers as the model's features have together. A
 * real program makes them from pictures with affect_stream_encode. To build it:
 *
 *     cc print_affect.c $(pkg-config --cflags --libs affect-edge)
 */
#include <stdio.h>
#include <stdlib.h>

#include "affect_edge.h"

#define MOST 64 /* features or outputs that this example has room for */

static int failed(void) {
    fprintf(stderr, "print_affect: %s\n", affect_last_error());
    return 1;
}

/* Lays the tensors of one kind into one block, which the caller frees. Returns their floats together, 0 on failure. */
static size_t lay_out(const affect_model *model, int32_t which, float **block, float *arrays[MOST]) {
    const int32_t count = affect_model_tensor_count(model, which);
    affect_tensor_info info = {sizeof(info), NULL, 0, 0, {0}, 0};
    size_t offsets[MOST], floats = 0;
    if (count < 1 || count > MOST) return 0;
    for (int32_t i = 0; i < count; ++i) {
        if (affect_model_tensor(model, which, i, &info) != AFFECT_OK) return 0;
        offsets[i] = floats;
        floats += (size_t)info.floats;
    }
    *block = malloc(floats * sizeof(float));
    if (*block == NULL) return 0;
    for (int32_t i = 0; i < count; ++i) arrays[i] = *block + offsets[i];
    return floats;
}

static void print_outputs(const affect_model *model, float *const *outputs) {
    affect_tensor_info tensor = {sizeof(tensor), NULL, 0, 0, {0}, 0};
    affect_output_info about = {sizeof(about), 0, 0, NULL, 0, 0, NULL, 0};
    for (int32_t i = 0; i < affect_model_tensor_count(model, AFFECT_OUTPUTS); ++i) {
        if (affect_model_tensor(model, AFFECT_OUTPUTS, i, &tensor) || affect_model_output(model, i, &about)) return;
        printf("%s%s", i == 0 ? "" : "  ", tensor.name);
        int64_t likely = 0;
        for (int64_t k = 0; k < tensor.floats; ++k) {
            if (about.kind != AFFECT_DISTRIBUTION) printf(" %.3f", outputs[i][k]);
            if (outputs[i][k] > outputs[i][likely]) likely = k;
        }
        if (about.kind == AFFECT_DISTRIBUTION) printf(" %s (%.2f)", about.labels[likely], outputs[i][likely]);
    }
    printf("\n");
}

int main(int count, char **words) {
    affect_model *model = NULL;
    affect_stream *stream = NULL;
    affect_model_info info = {.struct_size = sizeof(info)};
    float *in = NULL, *out = NULL, *features[MOST], *outputs[MOST];
    if (count != 3) {
        fprintf(stderr, "usage: print_affect BUNDLE FEATURES.f32\n");
        return 2;
    }
    if (affect_edge_abi_version() != AFFECT_EDGE_ABI_VERSION) {
        fprintf(stderr, "print_affect: the library is of version %s; compile with its own header\n",
                affect_edge_version());
        return 1;
    }
    if (affect_model_open(words[1], &model) || affect_stream_create(model, &stream)) return failed();
    if (affect_model_describe(model, &info)) return failed();
    if (!info.trained) fprintf(stderr, "print_affect: %s is not trained, its answers mean nothing\n", info.name);
    FILE *file = fopen(words[2], "rb");
    const size_t floats = lay_out(model, AFFECT_FEATURES, &in, features);
    if (file == NULL || floats == 0 || lay_out(model, AFFECT_OUTPUTS, &out, outputs) == 0) {
        fprintf(stderr, "print_affect: %s cannot be opened, or the model does not fit into this example\n", words[2]);
        return 1;
    }
    while (fread(in, sizeof(float), floats, file) == floats) {
        if (affect_stream_step(stream, (const float *const *)features, 1.0f, outputs)) return failed();
        print_outputs(model, outputs);
    }
    fclose(file);
    free(in);
    free(out);
    affect_stream_free(stream);
    affect_model_free(model);
    return 0;
}
