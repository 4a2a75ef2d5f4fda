// Streams: stepping them alone and together, and saving and restoring what they carry.

#include <cinttypes>
#include <cmath>
#include <cstring>

#include "model.h"

using namespace affect;

namespace {

constexpr char kSavedMagic[] = "AFFSTATE";
constexpr size_t kSavedMagicSize = sizeof(kSavedMagic) - 1;
constexpr size_t kSavedStart = kSavedMagicSize + 2 * sizeof(uint32_t);
constexpr uint32_t kSavedVersion = 1;

char *writable(const float *values) noexcept {
    // A binding is for inputs and outputs alike; a program never writes an input.
    return reinterpret_cast<char *>(const_cast<float *>(values));
}

// One step of up to kMostStreams checked streams.
void step_piece(const affect_model &model, Workspace &workspace, affect_stream *const *streams, int count,
                const float *const *features, const float *dt, float *const *outputs) noexcept {
    const size_t per_stream = model.bundle.manifest.features.size(),
                 outputs_each = model.bundle.manifest.outputs.size();
    for (size_t i = 0; i < model.step_inputs.size(); ++i) {
        const Slot &slot = model.step_inputs[i];
        Binding &binding = workspace.inputs[i];
        binding.stride = slot.stride;
        for (int s = 0; s < count; ++s) {
            const auto at = static_cast<size_t>(s);
            if (slot.side == Slot::Side::state) {
                binding.base[s] = reinterpret_cast<char *>(streams[s]->bank(false) + model.places[slot.index]);
            } else {
                binding.base[s] =
                    writable(slot.side == Slot::Side::dt ? dt + s : features[at * per_stream + slot.index]);
            }
        }
    }
    for (size_t i = 0; i < model.step_outputs.size(); ++i) {
        const Slot &slot = model.step_outputs[i];
        Binding &binding = workspace.outputs[i];
        binding.stride = slot.stride;
        for (int s = 0; s < count; ++s) {
            const auto at = static_cast<size_t>(s);
            binding.base[s] = slot.side == Slot::Side::state
                                  ? reinterpret_cast<char *>(streams[s]->bank(true) + model.places[slot.index])
                                  : writable(outputs[at * outputs_each + slot.index]);
        }
    }
    model.step->run(workspace.inputs.data(), workspace.outputs.data(), count, workspace.scratch.data());
    for (int s = 0; s < count; ++s) {
        streams[s]->second = !streams[s]->second;
    }
}

affect_status check_dt(float dt) noexcept {
    if (std::isfinite(dt) && dt > 0.0f) {
        return AFFECT_OK;
    }
    return fail(
        AFFECT_ERROR_VALUE,
        "dt is %g; it is the time since the stream's last step over the trained frame interval, finite and above 0",
        static_cast<double>(dt));
}

affect_status no_state(int32_t index) noexcept {
    return fail(AFFECT_ERROR_NAME,
                "the model has no state %" PRId32 "; affect_model_tensor_count says how many there are", index);
}

affect_status damaged(const char *what) noexcept {
    return fail(AFFECT_ERROR_STATE, "the saved state %s; begin with affect_stream_reset", what);
}

// Finds which state an entry of a saved header is: [name, dtype, sizes, batch axis].
affect_status match_state(const affect_model &model, JsonValue entry, uint32_t *index) noexcept {
    const JsonValue name = entry.first(), dtype = name.next(), sizes = dtype.next(), axis = sizes.next();
    const Array<State> &states = model.bundle.manifest.states;
    for (uint32_t i = 0; i < states.size(); ++i) {
        const Tensor &tensor = states[i].tensor;
        if (name.string() != tensor.name) {
            continue;
        }
        int64_t batch_axis = -1;
        bool good = entry.size() == 4 && dtype.string() == "float32" && axis.whole(&batch_axis) &&
                    batch_axis == tensor.batch_axis && sizes.size() == static_cast<uint32_t>(tensor.rank);
        JsonValue size = sizes.first();
        for (int32_t a = 0; good && a < tensor.rank; ++a, size = size.next()) {
            int64_t found = 0;
            good = size.whole(&found) && found == tensor.sizes[a];
        }
        if (!good) {
            return fail(
                AFFECT_ERROR_STATE,
                "the saved state %s has another shape than this model's, or is of several streams; save one stream",
                tensor.name);
        }
        *index = i;
        return AFFECT_OK;
    }
    return damaged("holds a state that this model does not have");
}

// Where in the saved bytes each state's numbers are; nothing is changed.
affect_status read_saved(const affect_model &model, const char *data, size_t size, Array<size_t> *offsets) noexcept {
    if (size < kSavedStart + Sha256::kBytes || std::memcmp(data, kSavedMagic, kSavedMagicSize) != 0) {
        return damaged("does not begin with AFFSTATE, so it is none, or was cut short");
    }
    const size_t content = size - Sha256::kBytes;
    uint8_t digest[Sha256::kBytes];
    Sha256 hash;
    hash.update(data, content);
    hash.finish(digest);
    if (std::memcmp(digest, data + content, sizeof(digest)) != 0) {
        return damaged("is damaged: its checksum does not match (cut short or changed)");
    }
    uint32_t version = 0, length = 0;
    std::memcpy(&version, data + kSavedMagicSize, sizeof(version));
    std::memcpy(&length, data + kSavedMagicSize + sizeof(version), sizeof(length));
    if (version != kSavedVersion) {
        return damaged("has another version than 1, which this release reads");
    }
    if (length > content - kSavedStart) {
        return damaged("has a header that is longer than itself");
    }
    Json json;
    if (const affect_status status = json.parse(data + kSavedStart, length); status != AFFECT_OK) {
        return status == AFFECT_ERROR_MEMORY ? status : damaged("has a header that is not JSON");
    }
    const JsonValue header = json.root(), batch = header["batch"], arrays = header["arrays"];
    const Manifest &manifest = model.bundle.manifest;
    if (header["model"].string() != manifest.weights_sha256) {
        return fail(AFFECT_ERROR_STATE,
                    "the saved state belongs to the model %.12s..., this one is %.64s %.12s...; begin with "
                    "affect_stream_reset",
                    header["model"].string().data(), manifest.name, manifest.weights_sha256);
    }
    int64_t streams = 1;
    // Release 0.1.0 left the number of streams to the arrays.
    if (!batch.is(JsonValue::Kind::none) && (!batch.whole(&streams) || streams != 1)) {
        return damaged("is of several streams; save one stream");
    }
    if (!arrays.is(JsonValue::Kind::array) || arrays.size() != manifest.states.size()) {
        return damaged("has not as many states as this model");
    }
    if (!offsets->allocate(manifest.states.size())) {
        return out_of_memory(manifest.states.size() * sizeof(size_t));
    }
    size_t at = kSavedStart + length;
    for (JsonValue entry = arrays.first(); !entry.is(JsonValue::Kind::none); entry = entry.next()) {
        uint32_t index = 0;
        if (const affect_status status = match_state(model, entry, &index); status != AFFECT_OK) {
            return status;
        }
        if ((*offsets)[index] != 0 || model.state_bytes(index) > content - at) {
            return damaged("holds a state twice, or fewer numbers than its header says");
        }
        (*offsets)[index] = at;
        at += static_cast<size_t>(model.state_bytes(index));
    }
    return at == content ? AFFECT_OK : damaged("holds more numbers than its header says");
}

}  // namespace

affect_stream::~affect_stream() {
    if (model != nullptr) {
        model->release();
    }
}

affect_batch::~affect_batch() {
    if (model != nullptr) {
        model->release();
    }
}

float *affect_stream::state(uint32_t index) noexcept {
    const bool in_graph = model->bundle.manifest.states[index].in_graph;
    uint8_t *const start = in_graph ? bank(false) : memory.data() + 2 * model->bank_bytes;
    return reinterpret_cast<float *>(start + model->places[index]);
}

void affect_stream::reset() noexcept {
    const Array<State> &states = model->bundle.manifest.states;
    for (uint32_t i = 0; i < states.size(); ++i) {
        float *const values = state(i);
        for (int64_t at = 0; at < states[i].tensor.floats; ++at) {
            values[at] = states[i].initial;
        }
    }
}

extern "C" affect_status affect_stream_create(const affect_model *model, affect_stream **stream) noexcept {
    if (stream == nullptr) {
        return null_argument("stream");
    }
    *stream = nullptr;
    if (model == nullptr) {
        return null_argument("model");
    }
    auto *const made = create<affect_stream>();
    const uint64_t bytes = 2 * model->bank_bytes + model->ring_bytes;
    if (made == nullptr || !made->memory.allocate(bytes)) {
        destroy(made);
        return out_of_memory(bytes);
    }
    if (const affect_status status = made->workspace.allocate(model->step, model->encoder, 1); status != AFFECT_OK) {
        destroy(made);
        return status;
    }
    model->retain();
    made->model = model;
    made->reset();
    *stream = made;
    return AFFECT_OK;
}

extern "C" void affect_stream_free(affect_stream *stream) noexcept { destroy(stream); }

extern "C" affect_status affect_stream_reset(affect_stream *stream) noexcept {
    if (stream == nullptr) {
        return null_argument("stream");
    }
    stream->reset();
    return AFFECT_OK;
}

extern "C" affect_status affect_stream_encode(affect_stream *stream, const float *const *inputs,
                                              float *const *features) noexcept {
    if (stream == nullptr) {
        return null_argument("stream");
    }
    const affect_model &model = *stream->model;
    if (model.encoder == nullptr) {
        return fail(AFFECT_ERROR_NAME,
                    "the bundle has no encoder; make the features elsewhere and call affect_stream_step");
    }
    const Manifest &manifest = model.bundle.manifest;
    if (!all_given(reinterpret_cast<const void *const *>(inputs),
                   static_cast<int64_t>(manifest.encoder.inputs.size())) ||
        !all_given(reinterpret_cast<const void *const *>(features), static_cast<int64_t>(manifest.features.size()))) {
        return null_argument("inputs or features");
    }
    Workspace &workspace = stream->workspace;
    for (size_t i = 0; i < model.encoder_inputs.size(); ++i) {
        const Slot &slot = model.encoder_inputs[i];
        workspace.inputs[i].stride = slot.stride;
        workspace.inputs[i].base[0] = writable(inputs[slot.index]);
    }
    for (size_t i = 0; i < model.encoder_outputs.size(); ++i) {
        const Slot &slot = model.encoder_outputs[i];
        workspace.outputs[i].stride = slot.stride;
        workspace.outputs[i].base[0] = writable(features[slot.index]);
    }
    model.encoder->run(workspace.inputs.data(), workspace.outputs.data(), 1, workspace.scratch.data());
    return AFFECT_OK;
}

extern "C" affect_status affect_stream_step(affect_stream *stream, const float *const *features, float dt,
                                            float *const *outputs) noexcept {
    if (stream == nullptr) {
        return null_argument("stream");
    }
    const Manifest &manifest = stream->model->bundle.manifest;
    if (!all_given(reinterpret_cast<const void *const *>(features), static_cast<int64_t>(manifest.features.size())) ||
        !all_given(reinterpret_cast<const void *const *>(outputs), static_cast<int64_t>(manifest.outputs.size()))) {
        return null_argument("features or outputs");
    }
    if (const affect_status status = check_dt(dt); status != AFFECT_OK) {
        return status;
    }
    step_piece(*stream->model, stream->workspace, &stream, 1, features, &dt, outputs);
    return AFFECT_OK;
}

extern "C" affect_status affect_batch_create(const affect_model *model, int32_t most, affect_batch **batch) noexcept {
    if (batch == nullptr) {
        return null_argument("batch");
    }
    *batch = nullptr;
    if (model == nullptr) {
        return null_argument("model");
    }
    if (most < 1) {
        return fail(AFFECT_ERROR_SIZE, "a batch for %" PRId32 " streams was asked for; it takes at least 1", most);
    }
    auto *const made = create<affect_batch>();
    if (made == nullptr) {
        return out_of_memory(sizeof(affect_batch));
    }
    made->most = most < kMostStreams ? most : kMostStreams;
    if (const affect_status status = made->workspace.allocate(model->step, nullptr, made->most); status != AFFECT_OK) {
        destroy(made);
        return status;
    }
    model->retain();
    made->model = model;
    *batch = made;
    return AFFECT_OK;
}

extern "C" void affect_batch_free(affect_batch *batch) noexcept { destroy(batch); }

extern "C" affect_status affect_batch_step(affect_batch *batch, affect_stream *const *streams, int32_t count,
                                           const float *const *features, const float *dt,
                                           float *const *outputs) noexcept {
    // Marks that no other call has given tell a stream that comes twice in this one, without comparing all pairs.
    static constinit std::atomic<uint64_t> marks{0};

    if (batch == nullptr) {
        return null_argument("batch");
    }
    if (count < 0) {
        return fail(AFFECT_ERROR_SIZE, "%" PRId32 " streams cannot be stepped; their number is at least 0", count);
    }
    const Manifest &manifest = batch->model->bundle.manifest;
    const auto given = static_cast<int64_t>(manifest.features.size()),
               made = static_cast<int64_t>(manifest.outputs.size());
    if (!all_given(reinterpret_cast<const void *const *>(streams), count) || (count != 0 && dt == nullptr) ||
        !all_given(reinterpret_cast<const void *const *>(features), count * given) ||
        !all_given(reinterpret_cast<const void *const *>(outputs), count * made)) {
        return null_argument("streams, features, dt or outputs");
    }
    const uint64_t mark = marks.fetch_add(1, std::memory_order_relaxed) + 1;
    for (int32_t i = 0; i < count; ++i) {
        if (streams[i]->model != batch->model) {
            return fail(AFFECT_ERROR_VALUE,
                        "stream %" PRId32 " is of another model than the batch; make a batch for each model", i);
        }
        if (streams[i]->mark == mark) {
            return fail(AFFECT_ERROR_VALUE, "stream %" PRId32 " is there twice; a step takes each stream once", i);
        }
        streams[i]->mark = mark;
        if (const affect_status status = check_dt(dt[i]); status != AFFECT_OK) {
            return status;
        }
    }
    for (int32_t at = 0; at < count; at += batch->most) {
        const int32_t piece = count - at < batch->most ? count - at : batch->most;
        step_piece(*batch->model, batch->workspace, streams + at, piece, features + at * given, dt + at,
                   outputs + at * made);
    }
    return AFFECT_OK;
}

extern "C" affect_status affect_stream_get_state(const affect_stream *stream, int32_t index, float *values) noexcept {
    if (stream == nullptr || values == nullptr) {
        return null_argument("stream or values");
    }
    if (index < 0 || static_cast<size_t>(index) >= stream->model->places.size()) {
        return no_state(index);
    }
    const auto at = static_cast<uint32_t>(index);
    std::memcpy(values, stream->state(at), static_cast<size_t>(stream->model->state_bytes(at)));
    return AFFECT_OK;
}

extern "C" affect_status affect_stream_set_state(affect_stream *stream, int32_t index, const float *values) noexcept {
    if (stream == nullptr || values == nullptr) {
        return null_argument("stream or values");
    }
    if (index < 0 || static_cast<size_t>(index) >= stream->model->places.size()) {
        return no_state(index);
    }
    const auto at = static_cast<uint32_t>(index);
    std::memcpy(stream->state(at), values, static_cast<size_t>(stream->model->state_bytes(at)));
    return AFFECT_OK;
}

extern "C" affect_status affect_stream_save(const affect_stream *stream, void *buffer, size_t capacity,
                                            size_t *size) noexcept {
    if (stream == nullptr || size == nullptr) {
        return null_argument("stream or size");
    }
    const affect_model &model = *stream->model;
    *size = model.saved_size;
    if (buffer == nullptr) {
        return AFFECT_OK;
    }
    if (capacity < model.saved_size) {
        return fail(AFFECT_ERROR_BUFFER, "the buffer has %zu bytes; a saved state of this model has %zu", capacity,
                    model.saved_size);
    }
    auto *const bytes = static_cast<uint8_t *>(buffer);
    size_t at = model.saved_head.size();
    std::memcpy(bytes, model.saved_head.data(), at);
    for (uint32_t i = 0; i < model.places.size(); ++i) {
        const auto taken = static_cast<size_t>(model.state_bytes(i));
        std::memcpy(bytes + at, stream->state(i), taken);
        at += taken;
    }
    Sha256 hash;
    hash.update(bytes, at);
    hash.finish(bytes + at);
    return AFFECT_OK;
}

extern "C" affect_status affect_stream_restore(affect_stream *stream, const void *data, size_t size) noexcept {
    if (stream == nullptr || data == nullptr) {
        return null_argument("stream or data");
    }
    const auto *const bytes = static_cast<const char *>(data);
    Array<size_t> offsets;
    if (const affect_status status = read_saved(*stream->model, bytes, size, &offsets); status != AFFECT_OK) {
        return status;
    }
    for (uint32_t i = 0; i < offsets.size(); ++i) {
        std::memcpy(stream->state(i), bytes + offsets[i], static_cast<size_t>(stream->model->state_bytes(i)));
    }
    return AFFECT_OK;
}
