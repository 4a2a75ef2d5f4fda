#include "model.h"

#include <algorithm>
#include <bit>
#include <cinttypes>
#include <cstdio>
#include <cstring>

static_assert(std::endian::native == std::endian::little, "weights and saved states are little-endian");

namespace affect {
namespace {

constexpr uint64_t kLevels = 256;

uint64_t rounded(uint64_t bytes) noexcept { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Whether a file that cannot be read as a graph is one with other graphs.
bool lacks_role(const uint8_t *data, uint64_t size, const char *role) noexcept {
    FileHeader header;
    if (size < sizeof(header)) {
        return false;
    }
    std::memcpy(&header, data, sizeof(header));
    if (std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0 || header.format != kFormat || header.size != size ||
        header.graphs > (size - sizeof(header)) / sizeof(GraphRecord)) {
        return false;
    }
    for (uint32_t i = 0; i < header.graphs; ++i) {
        GraphRecord graph;
        std::memcpy(&graph, data + sizeof(header) + i * sizeof(graph), sizeof(graph));
        if (std::strncmp(graph.role, role, sizeof(graph.role)) == 0) {
            return false;
        }
    }
    return true;
}

}  // namespace

affect_status null_argument(const char *name) noexcept {
    return fail(AFFECT_ERROR_NULL, "%s is NULL, or holds a NULL", name);
}

bool all_given(const void *const *pointers, int64_t count) noexcept {
    if (count != 0 && pointers == nullptr) {
        return false;
    }
    for (int64_t i = 0; i < count; ++i) {
        if (pointers[i] == nullptr) {
            return false;
        }
    }
    return true;
}

void fill_info(const Tensor &tensor, affect_tensor_info *info) noexcept {
    static_assert(AFFECT_MOST_RANK == kMostRank);
    info->name = tensor.name;
    info->rank = tensor.rank;
    info->batch_axis = tensor.batch_axis;
    std::memcpy(info->sizes, tensor.sizes, sizeof(info->sizes));
    info->floats = tensor.floats;
}

affect_status read_program(const uint8_t *data, uint64_t size, const char *role, Program **program) noexcept {
    char error[256] = "";
    *program = Program::read(data, size, role, error, sizeof(error));
    if (*program != nullptr) {
        return AFFECT_OK;
    }
    // The one thing that is not the file's fault is known by its words alone.
    constexpr char memory[] = "out of memory";
    if (std::strncmp(error, memory, sizeof(memory) - 1) == 0) {
        return fail(AFFECT_ERROR_MEMORY, "%s", error);
    }
    return fail(lacks_role(data, size, role) ? AFFECT_ERROR_NAME : AFFECT_ERROR_BUNDLE, "%s", error);
}

affect_status Workspace::allocate(const Program *first, const Program *second, int streams) noexcept {
    uint64_t bytes = 0;
    uint32_t most_inputs = 0, most_outputs = 0;
    for (const Program *program : {first, second}) {
        if (program != nullptr) {
            bytes = std::max(bytes, program->workspace(streams));
            most_inputs = std::max(most_inputs, program->inputs());
            most_outputs = std::max(most_outputs, program->outputs());
        }
    }
    return scratch.allocate(bytes) && inputs.allocate(most_inputs) && outputs.allocate(most_outputs)
               ? AFFECT_OK
               : out_of_memory(bytes);
}

}  // namespace affect

using namespace affect;

affect_model::~affect_model() {
    Program::free(encoder);
    Program::free(step);
}

void affect_model::release() const noexcept {
    if (references.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        destroy(const_cast<affect_model *>(this));
    }
}

uint64_t affect_model::state_bytes(uint32_t index) const noexcept {
    return static_cast<uint64_t>(bundle.manifest.states[index].tensor.floats) * sizeof(float);
}

const Picture *affect_model::picture(int32_t input, uint32_t *index) const noexcept {
    const Manifest &manifest = bundle.manifest;
    if (input < 0 || static_cast<size_t>(input) >= manifest.encoder.inputs.size()) {
        return nullptr;
    }
    const char *const name = manifest.encoder.inputs[static_cast<size_t>(input)].name;
    for (uint32_t i = 0; i < manifest.pictures.size(); ++i) {
        if (std::strcmp(manifest.pictures[i].name, name) == 0) {
            *index = i;
            return &manifest.pictures[i];
        }
    }
    return nullptr;
}

affect_status affect_model::open(const char *folder) noexcept {
    affect_status status = bundle.open(folder);
    if (status != AFFECT_OK) {
        return status;
    }
    const Manifest &manifest = bundle.manifest;
    const MappedFile &step_file = bundle.step_file;
    const MappedFile &encoder_file = bundle.encoder_file.data() == nullptr ? step_file : bundle.encoder_file;
    status = read_program(step_file.data(), step_file.size(), "step", &step);
    if (status == AFFECT_OK) {
        status = join(*step, manifest.step, &step_inputs, &step_outputs);
    }
    if (status != AFFECT_OK) {
        return add_context(status, manifest.step.file);
    }
    if (manifest.encoder.is_given()) {
        status = read_program(encoder_file.data(), encoder_file.size(), "encoder", &encoder);
        if (status == AFFECT_OK) {
            status = join(*encoder, manifest.encoder, &encoder_inputs, &encoder_outputs);
        }
        if (status != AFFECT_OK) {
            return add_context(status, manifest.encoder.file);
        }
    }
    status = place_states();
    if (status == AFFECT_OK) {
        status = make_levels();
    }
    if (status == AFFECT_OK) {
        status = make_saved_head();
    }
    workspace_bytes = std::max(step->workspace(1), encoder == nullptr ? 0 : encoder->workspace(1));
    return status;
}

bool affect_model::find_slot(const char *name, bool is_input, bool of_encoder, Slot *slot) const noexcept {
    const Manifest &manifest = bundle.manifest;
    const auto found = [slot](Slot::Side side, size_t index) {
        slot->side = side;
        slot->index = static_cast<uint32_t>(index);
        return true;
    };
    if (of_encoder && is_input) {
        const Tensor *const tensor = find(manifest.encoder.inputs, name);
        return tensor != nullptr &&
               found(Slot::Side::input, static_cast<size_t>(tensor - manifest.encoder.inputs.begin()));
    }
    if (of_encoder == !is_input) {  // the encoder's outputs and the step's inputs
        const Tensor *const tensor = find(manifest.features, name);
        if (tensor != nullptr) {
            return found(Slot::Side::feature, static_cast<size_t>(tensor - manifest.features.begin()));
        }
    }
    if (of_encoder) {
        return false;
    }
    if (is_input && std::strcmp(name, "dt") == 0) {
        return found(Slot::Side::dt, 0);
    }
    for (size_t i = 0; !is_input && i < manifest.outputs.size(); ++i) {
        if (std::strcmp(manifest.outputs[i].tensor.name, name) == 0) {
            return found(Slot::Side::output, i);
        }
    }
    constexpr char next[] = "next_";
    const bool prefixed = std::strncmp(name, next, sizeof(next) - 1) == 0;
    const char *const state = is_input ? name : name + sizeof(next) - 1;
    for (size_t i = 0; (is_input || prefixed) && i < manifest.states.size(); ++i) {
        if (manifest.states[i].in_graph && std::strcmp(manifest.states[i].tensor.name, state) == 0) {
            return found(Slot::Side::state, i);
        }
    }
    return false;
}

affect_status affect_model::join(const Program &program, const Graph &graph, Array<Slot> *inputs,
                                 Array<Slot> *outputs) noexcept {
    if (!inputs->allocate(program.inputs()) || !outputs->allocate(program.outputs())) {
        return out_of_memory((uint64_t{program.inputs()} + program.outputs()) * sizeof(Slot));
    }
    for (const bool is_input : {true, false}) {
        const Array<Tensor> &stated = is_input ? graph.inputs : graph.outputs;
        Array<Slot> &slots = is_input ? *inputs : *outputs;
        for (uint32_t i = 0; i < slots.size(); ++i) {
            const Tensor tensor = to_tensor(is_input ? program.input(i) : program.output(i));
            const Tensor *const wanted = find(stated, tensor.name);
            bool good = wanted != nullptr && same_shape(tensor, *wanted) &&
                        find_slot(tensor.name, is_input, &graph == &bundle.manifest.encoder, &slots[i]);
            // As many as the manifest has, and no two alike: then each that it has is here.
            for (uint32_t j = 0; j < i; ++j) {
                good = good && (slots[j].side != slots[i].side || slots[j].index != slots[i].index);
            }
            if (!good || slots.size() != stated.size()) {
                return fail(AFFECT_ERROR_BUNDLE,
                            "its %s %s is not what the manifest says of the graph; export the bundle again",
                            is_input ? "input" : "output", tensor.name);
            }
            slots[i].stride = static_cast<uint64_t>(inner_floats(tensor)) * sizeof(float);
        }
        if (slots.size() != stated.size()) {
            return fail(AFFECT_ERROR_BUNDLE, "has no %s, unlike the manifest; export the bundle again",
                        is_input ? "inputs" : "outputs");
        }
    }
    return AFFECT_OK;
}

affect_status affect_model::place_states() noexcept {
    const Array<State> &states = bundle.manifest.states;
    if (!places.allocate(states.size())) {
        return out_of_memory(states.size() * sizeof(uint64_t));
    }
    for (uint32_t i = 0; i < states.size(); ++i) {
        uint64_t &end = states[i].in_graph ? bank_bytes : ring_bytes;
        places[i] = end;
        end += rounded(state_bytes(i));
    }
    return AFFECT_OK;
}

affect_status affect_model::make_levels() noexcept {
    const Array<Picture> &pictures = bundle.manifest.pictures;
    if (!levels.allocate(pictures.size() * 3 * kLevels)) {
        return out_of_memory(pictures.size() * 3 * kLevels * sizeof(float));
    }
    float *level = levels.begin();
    for (const Picture &picture : pictures) {
        for (int channel = 0; channel < 3; ++channel) {
            for (uint64_t value = 0; value < kLevels; ++value) {
                *level++ = (static_cast<float>(value) / 255.0f - picture.mean[channel]) / picture.std[channel];
            }
        }
    }
    return AFFECT_OK;
}

affect_status affect_model::make_saved_head() noexcept {
    const Manifest &manifest = bundle.manifest;
    // Digest and fixed words; for each state a name, up to 6 sizes of 20 characters, and what stands between them.
    const size_t room = 256 + manifest.states.size() * 320;
    Array<char> text;
    if (!text.allocate(room)) {
        return out_of_memory(room);
    }
    size_t length = 0;
    const auto append = [&text, &length, room](const char *format, auto... values) {
        length += static_cast<size_t>(std::snprintf(text.data() + length, room - length, format, values...));
    };
    // To the letter what Python's json.dumps writes.
    append("{\"model\": \"%s\", \"batch\": 1, \"arrays\": [", manifest.weights_sha256);
    uint64_t body = 0;
    for (uint32_t i = 0; i < manifest.states.size(); ++i) {
        const Tensor &tensor = manifest.states[i].tensor;
        append("%s[\"%s\", \"float32\", [", i == 0 ? "" : ", ", tensor.name);
        for (int32_t axis = 0; axis < tensor.rank; ++axis) {
            append("%s%" PRId64, axis == 0 ? "" : ", ", tensor.sizes[axis]);
        }
        append("], %" PRId32 "]", tensor.batch_axis);
        body += state_bytes(i);
    }
    append("%s", "]}");
    const char magic[] = "AFFSTATE";
    const uint32_t numbers[2] = {1, static_cast<uint32_t>(length)};
    const size_t start = sizeof(magic) - 1 + sizeof(numbers);
    if (!saved_head.allocate(start + length)) {
        return out_of_memory(start + length);
    }
    std::memcpy(saved_head.data(), magic, sizeof(magic) - 1);
    std::memcpy(saved_head.data() + sizeof(magic) - 1, numbers, sizeof(numbers));
    std::memcpy(saved_head.data() + start, text.data(), length);
    saved_size = saved_head.size() + static_cast<size_t>(body) + Sha256::kBytes;
    return AFFECT_OK;
}

extern "C" affect_status affect_model_open(const char *folder, affect_model **model) noexcept {
    if (model == nullptr) {
        return null_argument("model");
    }
    *model = nullptr;
    if (folder == nullptr) {
        return null_argument("folder");
    }
    auto *const opened = create<affect_model>();
    if (opened == nullptr) {
        return out_of_memory(sizeof(affect_model));
    }
    if (const affect_status status = opened->open(folder); status != AFFECT_OK) {
        opened->release();
        return add_context(status, folder);
    }
    *model = opened;
    return AFFECT_OK;
}

extern "C" void affect_model_free(affect_model *model) noexcept {
    if (model != nullptr) {
        model->release();
    }
}

extern "C" affect_status affect_model_describe(const affect_model *model, affect_model_info *info) noexcept {
    if (model == nullptr) {
        return null_argument("model");
    }
    if (const affect_status status = check_struct(info); status != AFFECT_OK) {
        return status;
    }
    const Manifest &manifest = model->bundle.manifest;
    info->name = manifest.name;
    info->version = manifest.version;
    info->licence = manifest.licence;
    info->weights_sha256 = manifest.weights_sha256;
    info->instruction_set = kernels().name;
    info->frame_interval_s = manifest.frame_interval_s;
    info->variable_dt = manifest.variable_dt;
    info->trained = manifest.trained;
    info->has_encoder = model->encoder != nullptr;
    info->verified_on_target = manifest.verified_on_target;
    info->memory_bytes = static_cast<int64_t>(2 * model->bank_bytes + model->ring_bytes + model->workspace_bytes);
    return AFFECT_OK;
}

namespace {

const Tensor *tensor_at(const affect_model *model, int32_t which, size_t index) noexcept {
    const Manifest &manifest = model->bundle.manifest;
    switch (which) {
        case AFFECT_INPUTS:
            return &manifest.encoder.inputs[index];
        case AFFECT_OUTPUTS:
            return &manifest.outputs[index].tensor;
        case AFFECT_FEATURES:
            return &manifest.features[index];
        default:
            return &manifest.states[index].tensor;
    }
}

affect_status no_such(const char *what, int32_t index) noexcept {
    return fail(AFFECT_ERROR_NAME, "the model has no %s %" PRId32 "; affect_model_tensor_count says how many there are",
                what, index);
}

}  // namespace

extern "C" int32_t affect_model_tensor_count(const affect_model *model, int32_t which) noexcept {
    if (model == nullptr) {
        return -1;
    }
    const Manifest &manifest = model->bundle.manifest;
    switch (which) {
        case AFFECT_INPUTS:
            return static_cast<int32_t>(manifest.encoder.inputs.size());
        case AFFECT_OUTPUTS:
            return static_cast<int32_t>(manifest.outputs.size());
        case AFFECT_FEATURES:
            return static_cast<int32_t>(manifest.features.size());
        case AFFECT_STATES:
            return static_cast<int32_t>(manifest.states.size());
        default:
            return -1;
    }
}

extern "C" affect_status affect_model_tensor(const affect_model *model, int32_t which, int32_t index,
                                             affect_tensor_info *info) noexcept {
    if (model == nullptr) {
        return null_argument("model");
    }
    if (const affect_status status = check_struct(info); status != AFFECT_OK) {
        return status;
    }
    if (index < 0 || index >= affect_model_tensor_count(model, which)) {
        return no_such("tensor", index);
    }
    fill_info(*tensor_at(model, which, static_cast<size_t>(index)), info);
    return AFFECT_OK;
}

extern "C" affect_status affect_model_find(const affect_model *model, int32_t which, const char *name,
                                           int32_t *index) noexcept {
    if (model == nullptr || name == nullptr || index == nullptr) {
        return null_argument("model, name or index");
    }
    const int32_t count = affect_model_tensor_count(model, which);
    for (int32_t i = 0; i < count; ++i) {
        if (std::strcmp(tensor_at(model, which, static_cast<size_t>(i))->name, name) == 0) {
            *index = i;
            return AFFECT_OK;
        }
    }
    return fail(AFFECT_ERROR_NAME, "the model has no tensor %.64s of this kind; affect_model_tensor gives their names",
                name);
}

extern "C" affect_status affect_model_output(const affect_model *model, int32_t index,
                                             affect_output_info *info) noexcept {
    if (model == nullptr) {
        return null_argument("model");
    }
    if (const affect_status status = check_struct(info); status != AFFECT_OK) {
        return status;
    }
    const Manifest &manifest = model->bundle.manifest;
    if (index < 0 || static_cast<size_t>(index) >= manifest.outputs.size()) {
        return no_such("output", index);
    }
    const Output &output = manifest.outputs[static_cast<size_t>(index)];
    info->kind = output.kind;
    info->label_count = output.label_count;
    info->labels = manifest.labels.data() + output.labels;
    info->low = output.low;
    info->high = output.high;
    info->signal = output.signal;
    info->smoothing_s = output.smoothing_s;
    return AFFECT_OK;
}

extern "C" affect_status affect_model_image(const affect_model *model, int32_t input,
                                            affect_image_info *info) noexcept {
    if (model == nullptr) {
        return null_argument("model");
    }
    if (const affect_status status = check_struct(info); status != AFFECT_OK) {
        return status;
    }
    uint32_t index = 0;
    const Picture *const picture = model->picture(input, &index);
    if (picture == nullptr) {
        return no_such("picture as its input", input);
    }
    info->size = picture->size;
    info->filters = picture->filters;
    info->align = picture->align;
    info->growth = picture->growth;
    std::memcpy(info->mean, picture->mean, sizeof(info->mean));
    std::memcpy(info->std, picture->std, sizeof(info->std));
    return AFFECT_OK;
}

extern "C" affect_status affect_image_to_input(const affect_model *model, int32_t input, const uint8_t *rgb,
                                               size_t row_bytes, float *out) noexcept {
    if (model == nullptr || rgb == nullptr || out == nullptr) {
        return null_argument("model, rgb or out");
    }
    uint32_t index = 0;
    const Picture *const picture = model->picture(input, &index);
    if (picture == nullptr) {
        return no_such("picture as its input", input);
    }
    if (picture->filters != 0) {
        return fail(
            AFFECT_ERROR_UNSUPPORTED,
            "the bundle wants its pictures filtered first, which this library cannot do; use the Python package");
    }
    const auto size = static_cast<size_t>(picture->size);
    if (row_bytes < 3 * size || row_bytes > PTRDIFF_MAX / size) {
        return fail(AFFECT_ERROR_SIZE, "row_bytes is %zu; a row of %zu pixels has at least %zu bytes", row_bytes, size,
                    3 * size);
    }
    const float *const levels = model->levels.data() + index * 3 * kLevels;
    for (size_t y = 0; y < size; ++y) {
        const uint8_t *const row = rgb + y * row_bytes;
        for (size_t channel = 0; channel < 3; ++channel) {
            float *const to = out + (channel * size + y) * size;
            const float *const level = levels + channel * kLevels;
            for (size_t x = 0; x < size; ++x) {
                to[x] = level[row[3 * x + channel]];
            }
        }
    }
    return AFFECT_OK;
}
