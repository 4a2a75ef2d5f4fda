// The C API: what it computes, what it refuses, what outlives what, and that a step allocates nothing.

#include <affect_edge.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>

#include "check.h"
#include "counting.h"
#include "small_bundle.h"

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// A model of the small bundle, and what one stream of it must say.
struct Fixture {
    Fixture() { CHECK_FOR(affect_last_error(), affect_model_open(folder.path.c_str(), &model) == AFFECT_OK); }
    ~Fixture() { affect_model_free(model); }
    affect_stream *stream() const {
        affect_stream *made = nullptr;
        CHECK(affect_stream_create(model, &made) == AFFECT_OK);
        return made;
    }
    small::Folder folder;
    affect_model *model = nullptr;
};

struct Expected {
    float sum[2][4];
    Expected() { std::fill_n(&sum[0][0], 8, 0.5f); }
    void step(const float *features, float dt) {
        for (int i = 0; i < 4; ++i) {
            sum[0][i] += features[i] * dt;
            sum[1][i] += features[i];
        }
    }
    bool agrees(const float *expression, float valence) const {
        double total = 0.0, mean = 0.0;
        for (int i = 0; i < 4; ++i) {
            total += std::exp(static_cast<double>(sum[0][i]));
            mean += static_cast<double>(sum[1][i]) / 4.0;
        }
        bool good = std::fabs(static_cast<double>(valence) - mean) < 1e-6;
        for (int i = 0; i < 4; ++i) {
            good = good && std::fabs(std::exp(static_cast<double>(sum[0][i])) / total -
                                     static_cast<double>(expression[i])) < 1e-6;
        }
        return good;
    }
};

struct Answer {
    float expression[4] = {}, valence = 0.0f;
    float *arrays[2] = {expression, &valence};
};

affect_status step(affect_stream *stream, const float *features, float dt, Answer *answer) {
    return affect_stream_step(stream, &features, dt, answer->arrays);
}

std::string saved(const affect_stream *stream) {
    size_t size = 0;
    CHECK(affect_stream_save(stream, nullptr, 0, &size) == AFFECT_OK);
    std::string bytes(size, '\0');
    CHECK(affect_stream_save(stream, bytes.data(), size, &size) == AFFECT_OK && size == bytes.size());
    return bytes;
}

template <class T>
T sized() {
    T made{};
    made.struct_size = sizeof(T);
    return made;
}

void test_descriptions() {
    const Fixture f;
    auto info = sized<affect_model_info>();
    CHECK(affect_model_describe(f.model, &info) == AFFECT_OK);
    CHECK(info.name == std::string("small") && info.version == std::string("1.2.3") && info.trained == 0);
    CHECK(info.licence == std::string("Apache-2.0") && info.has_encoder == 1 && info.variable_dt == 1);
    CHECK(info.frame_interval_s == 0.03333333333333333 && info.memory_bytes > 0 && info.verified_on_target == 1);
    CHECK(info.instruction_set == std::string(affect_instruction_set()));
    const int32_t counts[] = {1, 2, 1, 2};
    const char *const names[][2] = {{"frame", ""}, {"expression", "valence"}, {"features", ""}, {"sum", "sound"}};
    for (int32_t which = 0; which < 4; ++which) {
        CHECK(affect_model_tensor_count(f.model, which) == counts[which]);
        for (int32_t i = 0; i < counts[which]; ++i) {
            auto tensor = sized<affect_tensor_info>();
            int32_t found = -1;
            CHECK(affect_model_tensor(f.model, which, i, &tensor) == AFFECT_OK &&
                  tensor.name == std::string(names[which][i]));
            CHECK(affect_model_find(f.model, which, tensor.name, &found) == AFFECT_OK && found == i);
        }
        auto tensor = sized<affect_tensor_info>();
        for (const int32_t beyond : {-1, counts[which], std::numeric_limits<int32_t>::max()}) {
            CHECK(affect_model_tensor(f.model, which, beyond, &tensor) == AFFECT_ERROR_NAME);
        }
    }
    auto sum = sized<affect_tensor_info>();
    CHECK(affect_model_tensor(f.model, AFFECT_STATES, 0, &sum) == AFFECT_OK);
    CHECK(sum.rank == 3 && sum.batch_axis == 1 && sum.sizes[0] == 2 && sum.sizes[1] == 1 && sum.sizes[2] == 4 &&
          sum.floats == 8);
    auto output = sized<affect_output_info>();
    CHECK(affect_model_output(f.model, 0, &output) == AFFECT_OK && output.kind == AFFECT_DISTRIBUTION);
    CHECK(output.label_count == 4 && output.labels[3] == std::string("cross") && output.low == 0.0 &&
          output.high == 1.0);
    CHECK(affect_model_output(f.model, 1, &output) == AFFECT_OK && output.kind == AFFECT_REGRESSION);
    CHECK(output.label_count == 0 && output.signal == std::string("proxy") && output.smoothing_s == 0.5);
    CHECK(affect_model_output(f.model, 2, &output) == AFFECT_ERROR_NAME);
    auto image = sized<affect_image_info>();
    CHECK(affect_model_image(f.model, 0, &image) == AFFECT_OK && image.size == 4 && image.align == std::string("eyes"));
    CHECK(affect_model_image(f.model, 1, &image) == AFFECT_ERROR_NAME);
    int32_t none = 7;
    CHECK(affect_model_find(f.model, AFFECT_OUTPUTS, "joy", &none) == AFFECT_ERROR_NAME && none == 7);
    CHECK(affect_model_tensor_count(f.model, 4) == -1 && affect_model_tensor_count(nullptr, 0) == -1);
}

void test_steps_and_state() {
    const Fixture f;
    affect_stream *const stream = f.stream();
    Expected expected;
    Answer answer;
    const std::string fresh = saved(stream);
    for (int i = 0; i < 20; ++i) {
        const float features[4] = {0.1f * static_cast<float>(i % 3), -0.2f, 0.05f, 0.3f};
        const float dt = i % 2 == 0 ? 1.0f : 0.5f;
        expected.step(features, dt);
        CHECK(step(stream, features, dt, &answer) == AFFECT_OK && expected.agrees(answer.expression, answer.valence));
    }
    float sum[8];
    CHECK(affect_stream_get_state(stream, 0, sum) == AFFECT_OK && std::memcmp(sum, expected.sum, sizeof(sum)) == 0);
    const float sound[3] = {1.0f, 2.0f, 3.0f};
    CHECK(affect_stream_set_state(stream, 1, sound) == AFFECT_OK);

    // Restored into another stream, it goes on as this one does.
    const std::string bytes = saved(stream);
    affect_stream *const other = f.stream();
    CHECK(affect_stream_restore(other, bytes.data(), bytes.size()) == AFFECT_OK && saved(other) == bytes);
    const float features[4] = {1.0f, 2.0f, 3.0f, 4.0f};
    Answer answer2;
    CHECK(step(stream, features, 1.0f, &answer) == AFFECT_OK && step(other, features, 1.0f, &answer2) == AFFECT_OK);
    CHECK(std::memcmp(answer.expression, answer2.expression, sizeof(answer.expression)) == 0 &&
          saved(stream) == saved(other));
    float heard[3];
    CHECK(affect_stream_get_state(other, 1, heard) == AFFECT_OK && heard[2] == 3.0f);

    // Any damage is refused and changes nothing.
    const std::string before = saved(other);
    for (size_t i = 0; i < bytes.size(); ++i) {
        std::string damaged = bytes;
        damaged[i] = static_cast<char>(damaged[i] ^ 4);
        CHECK(affect_stream_restore(other, damaged.data(), damaged.size()) == AFFECT_ERROR_STATE);
        CHECK(affect_stream_restore(other, bytes.data(), i) == AFFECT_ERROR_STATE);
    }
    CHECK(saved(other) == before);
    // So is what has a fitting checksum and is of something else.
    const struct {
        const char *from, *to;
    } changes[] = {
        {"aaaa", "bbbb"},
        {"\"batch\": 1", "\"batch\": 2"},
        {"\"batch\": 1", "\"batch\": \""},
        {"sum", "mus"},
        {"sound", "sum\", "},
        {"float32", "float16"},
        {"[2, 1, 4]", "[2, 4, 1]"},
        {"[2, 1, 4], 1", "[2, 1, 4], 0"},
        {"AFFSTATE", "AFFSTATF"},
        {"[\"sound\", ", "[ \"soun\", "},
        {"]}", "] "},
    };
    for (const auto &change : changes) {
        std::string text = bytes.substr(0, bytes.size() - 32);
        const size_t at = text.find(change.from);
        text.replace(at, std::strlen(change.from), change.to);
        affect::Sha256 sha;
        uint8_t digest[32];
        sha.update(text.data(), text.size());
        sha.finish(digest);
        text.append(reinterpret_cast<const char *>(digest), sizeof(digest));
        CHECK_FOR(change.to, affect_stream_restore(other, text.data(), text.size()) == AFFECT_ERROR_STATE);
    }
    CHECK(saved(other) == before);
    std::string small(bytes.size() - 1, 'x');
    size_t size = 0;
    CHECK(affect_stream_save(other, small.data(), small.size(), &size) == AFFECT_ERROR_BUFFER && size == bytes.size());
    CHECK(small == std::string(bytes.size() - 1, 'x'));

    CHECK(affect_stream_reset(stream) == AFFECT_OK && saved(stream) == fresh);
    affect_stream_free(stream);
    affect_stream_free(other);
}

void test_batches_are_streams_side_by_side() {
    const Fixture f;
    for (const int32_t most : {1, 3, 16, 1000}) {
        affect_batch *batch = nullptr;
        CHECK(affect_batch_create(f.model, most, &batch) == AFFECT_OK);
        constexpr int32_t count = 37;
        std::vector<affect_stream *> together, alone;
        std::vector<Answer> answers(count);
        std::vector<float> features(count * 4), dt(count);
        std::vector<const float *> in;
        std::vector<float *> out;
        for (int32_t i = 0; i < count; ++i) {
            together.push_back(f.stream());
            alone.push_back(f.stream());
            in.push_back(&features[static_cast<size_t>(i) * 4]);
            out.insert(out.end(),
                       {answers[static_cast<size_t>(i)].expression, &answers[static_cast<size_t>(i)].valence});
        }
        for (int round = 0; round < 3; ++round) {
            for (size_t i = 0; i < features.size(); ++i)
                features[i] = std::sin(static_cast<float>(i) + static_cast<float>(round));
            for (size_t i = 0; i < dt.size(); ++i) dt[i] = 1.0f + 0.01f * static_cast<float>(i);
            CHECK_FOR(affect_last_error(),
                      affect_batch_step(batch, together.data(), count, in.data(), dt.data(), out.data()) == AFFECT_OK);
            for (size_t i = 0; i < count; ++i) {
                Answer answer;
                CHECK(step(alone[i], in[i], dt[i], &answer) == AFFECT_OK && answer.valence == answers[i].valence);
                CHECK(std::memcmp(answer.expression, answers[i].expression, sizeof(answer.expression)) == 0);
                CHECK(saved(alone[i]) == saved(together[i]));
            }
        }
        // Refused as a whole: no stream has stepped.
        const std::string before = saved(together[0]);
        std::swap(together[0], together[1]);
        dt[36] = kNaN;
        CHECK(affect_batch_step(batch, together.data(), count, in.data(), dt.data(), out.data()) == AFFECT_ERROR_VALUE);
        dt[36] = 1.0f;
        affect_stream *const last = together[36];
        together[36] = together[0];
        CHECK(affect_batch_step(batch, together.data(), count, in.data(), dt.data(), out.data()) == AFFECT_ERROR_VALUE);
        together[36] = nullptr;
        CHECK(affect_batch_step(batch, together.data(), count, in.data(), dt.data(), out.data()) == AFFECT_ERROR_NULL);
        together[36] = last;
        CHECK(affect_batch_step(batch, together.data(), -1, in.data(), dt.data(), out.data()) == AFFECT_ERROR_SIZE);
        CHECK(affect_batch_step(batch, nullptr, 0, nullptr, nullptr, nullptr) == AFFECT_OK);
        CHECK(saved(together[1]) == before);
        const Fixture other;
        affect_stream *const stranger = other.stream();
        CHECK(affect_batch_step(batch, &stranger, 1, in.data(), dt.data(), out.data()) == AFFECT_ERROR_VALUE);
        affect_stream_free(stranger);
        for (affect_stream *each : together) affect_stream_free(each);
        for (affect_stream *each : alone) affect_stream_free(each);
        affect_batch_free(batch);
    }
}

void test_pictures() {
    const Fixture f;
    affect_stream *const stream = f.stream();
    uint8_t rgb[4][20];
    float picture[3][4][4], features[4];
    for (int y = 0; y < 4; ++y) {
        for (int x = 0; x < 20; ++x) rgb[y][x] = static_cast<uint8_t>(17 * x + 61 * y);
    }
    const float mean[3] = {0.5f, 0.25f, 0.485f}, std[3] = {0.25f, 0.5f, 0.229f};
    CHECK(affect_image_to_input(f.model, 0, rgb[0], 20, picture[0][0]) == AFFECT_OK);
    float sums[4] = {};
    for (int c = 0; c < 3; ++c) {
        for (int y = 0; y < 4; ++y) {
            for (int x = 0; x < 4; ++x) {
                const float expected = (static_cast<float>(rgb[y][3 * x + c]) / 255.0f - mean[c]) / std[c];
                CHECK(picture[c][y][x] == expected);
                sums[x] += expected;
            }
        }
    }
    const float *in = picture[0][0];
    float *out = features;
    CHECK(affect_stream_encode(stream, &in, &out) == AFFECT_OK);
    for (int x = 0; x < 4; ++x) CHECK(std::fabs(features[x] - sums[x]) < 1e-5f);
    CHECK(affect_image_to_input(f.model, 0, rgb[0], 11, picture[0][0]) == AFFECT_ERROR_SIZE);
    CHECK(affect_image_to_input(f.model, 0, rgb[0], SIZE_MAX, picture[0][0]) == AFFECT_ERROR_SIZE);
    CHECK(affect_image_to_input(f.model, 1, rgb[0], 20, picture[0][0]) == AFFECT_ERROR_NAME);
    CHECK(affect_image_to_input(f.model, 0, nullptr, 20, picture[0][0]) == AFFECT_ERROR_NULL);
    affect_stream_free(stream);
}

void test_graphs_from_memory() {
    const std::string bytes = small::weights();
    std::vector<char> room(bytes.size() + 128);
    const size_t to_aligned = (64 - reinterpret_cast<uintptr_t>(room.data()) % 64) % 64;
    for (const size_t shift : {size_t{0}, size_t{1}, size_t{32}}) {
        char *const at = room.data() + to_aligned + shift;
        std::memcpy(at, bytes.data(), bytes.size());
        affect_graph *graph = nullptr;
        affect_runner *runner = nullptr;
        CHECK_FOR(affect_last_error(), affect_graph_open(at, bytes.size(), "step", &graph) == AFFECT_OK);
        if (shift != 0) std::fill(room.begin(), room.end(), '\0');  // it was copied
        CHECK(affect_graph_tensor_count(graph, AFFECT_INPUTS) == 3 &&
              affect_graph_tensor_count(graph, AFFECT_STATES) == -1);
        auto info = sized<affect_tensor_info>();
        CHECK(affect_graph_tensor(graph, AFFECT_INPUTS, 1, &info) == AFFECT_OK && info.name == std::string("sum"));
        CHECK(info.batch_axis == 1 && info.floats == 8);
        CHECK(affect_graph_tensor(graph, AFFECT_INPUTS, 3, &info) == AFFECT_ERROR_NAME);
        CHECK(affect_runner_create(graph, 4, &runner) == AFFECT_OK);
        affect_graph_free(graph);
        for (const int64_t batch : {1, 4, 5, 21}) {
            const auto n = static_cast<size_t>(batch);
            std::vector<float> dt(n, 2.0f), sum(8 * n), features(4 * n), valence(n), next(8 * n), expression(4 * n);
            for (size_t i = 0; i < sum.size(); ++i) sum[i] = 0.01f * static_cast<float>(i);
            for (size_t i = 0; i < features.size(); ++i) features[i] = 0.02f * static_cast<float>(i % 7);
            const float *const in[] = {dt.data(), sum.data(), features.data()};
            float *const out[] = {valence.data(), next.data(), expression.data()};
            CHECK(affect_runner_run(runner, in, out, batch) == AFFECT_OK);
            for (size_t s = 0; s < n; ++s) {
                for (size_t i = 0; i < 4; ++i) {
                    CHECK(std::fabs(next[s * 4 + i] - (sum[s * 4 + i] + 2.0f * features[s * 4 + i])) < 1e-6f);
                    CHECK(std::fabs(next[(n + s) * 4 + i] - (sum[(n + s) * 4 + i] + features[s * 4 + i])) < 1e-6f);
                }
            }
            CHECK(affect_runner_run(runner, in, out, 0) == AFFECT_ERROR_SIZE);
            CHECK(affect_runner_run(runner, in, out, std::numeric_limits<int64_t>::max()) == AFFECT_ERROR_SIZE);
            CHECK(affect_runner_run(runner, nullptr, out, batch) == AFFECT_ERROR_NULL);
        }
        affect_runner_free(runner);
    }
    affect_graph *graph = nullptr;
    CHECK(affect_graph_open(bytes.data(), bytes.size(), "middle", &graph) == AFFECT_ERROR_NAME && graph == nullptr);
    CHECK(affect_graph_open(bytes.data(), bytes.size(), std::string(1000, 'x').c_str(), &graph) == AFFECT_ERROR_NAME);
    CHECK(affect_graph_open(nullptr, 5, "step", &graph) == AFFECT_ERROR_NULL);
    for (size_t size = 0; size < bytes.size(); size += size < 256 ? 1 : 64) {
        const std::string cut = bytes.substr(0, size);
        CHECK(affect_graph_open(cut.data(), size, "step", &graph) == AFFECT_ERROR_BUNDLE && graph == nullptr);
    }
}

void test_scans() {
    constexpr int64_t batch = 2, channels = 300, states = 5;
    std::vector<float> x(batch * channels), delta(x), a(channels * states), b(batch * states), c(b), d(channels);
    std::vector<float> state(batch * channels * states), y(x);
    unsigned seed = 1;
    const auto random = [&seed] {
        return static_cast<float>((seed = seed * 1664525u + 1013904223u) >> 8) / 16777216.0f;
    };
    for (auto *each : {&x, &delta, &a, &b, &c, &d, &state}) {
        for (float &value : *each) value = random();
    }
    for (float &value : a) value = -1.0f - value;
    const std::vector<float> before = state;
    affect_scan_step_args args{sizeof(args), batch,    channels, states,   x.data(),     delta.data(),
                               a.data(),     b.data(), c.data(), d.data(), state.data(), y.data()};
    CHECK(affect_selective_scan_step(&args) == AFFECT_OK);
    for (size_t s = 0; s < batch; ++s) {
        for (size_t k = 0; k < channels; ++k) {
            const size_t at = s * channels + k;
            double sum = static_cast<double>(d[k] * x[at]);
            for (size_t n = 0; n < states; ++n) {
                const double h = std::exp(static_cast<double>(delta[at]) * static_cast<double>(a[k * states + n])) *
                                     static_cast<double>(before[at * states + n]) +
                                 static_cast<double>(delta[at] * b[s * states + n] * x[at]);
                CHECK(std::fabs(h - static_cast<double>(state[at * states + n])) < 1e-5);
                sum += static_cast<double>(c[s * states + n]) * h;
            }
            CHECK(std::fabs(sum - static_cast<double>(y[at])) < 1e-5);
        }
    }
    // A sequence of one is a step.
    std::vector<float> after(channels * states), y2(channels);
    affect_scan_args scan{};
    scan.struct_size = sizeof(scan);
    scan.length = 1, scan.channels = channels, scan.states = states, scan.groups = 1;
    scan.x = x.data(), scan.delta = delta.data(), scan.a = a.data(), scan.b = b.data(), scan.c = c.data(),
    scan.skip = d.data();
    scan.before = before.data(), scan.after = after.data(), scan.y = y2.data();
    scan.x_stride = scan.delta_stride = scan.y_stride = channels;
    scan.b_stride = scan.c_stride = states;
    CHECK_FOR(affect_last_error(), affect_selective_scan(&scan) == AFFECT_OK);
    for (size_t i = 0; i < y2.size(); ++i) CHECK(std::fabs(y2[i] - y[i]) < 1e-5f);
    for (size_t i = 0; i < after.size(); ++i) CHECK(std::fabs(after[i] - state[i]) < 1e-5f);

    constexpr int64_t huge = std::numeric_limits<int64_t>::max();
    const auto refuses = [&scan](int64_t affect_scan_args::*field, int64_t value) {
        affect_scan_args wrong = scan;
        wrong.*field = value;
        return affect_selective_scan(&wrong) == AFFECT_ERROR_SIZE;
    };
    using Args = affect_scan_args;
    for (auto field : {&Args::length, &Args::channels, &Args::states, &Args::groups}) {
        CHECK(refuses(field, 0) && refuses(field, -1) && refuses(field, huge));
    }
    CHECK(refuses(&Args::states, 257) && refuses(&Args::groups, 7) && refuses(&Args::rows, 2) &&
          refuses(&Args::rows, -1));
    CHECK(refuses(&Args::y_stride, channels - 1));
    scan.length = 2;
    for (auto field : {&Args::x_stride, &Args::delta_stride, &Args::b_stride, &Args::c_stride, &Args::y_stride}) {
        CHECK(refuses(field, -1) && refuses(field, huge));
    }
    scan.length = 1;
    scan.flags = 8;
    CHECK(affect_selective_scan(&scan) == AFFECT_ERROR_VALUE);
    scan.flags = 0;
    scan.c = nullptr;
    CHECK(affect_selective_scan(&scan) == AFFECT_ERROR_NULL && affect_selective_scan(nullptr) == AFFECT_ERROR_NULL);
    args.batch = huge;
    CHECK(affect_selective_scan_step(&args) == AFFECT_ERROR_SIZE);
    args.struct_size = 8;
    CHECK(affect_selective_scan_step(&args) == AFFECT_ERROR_STRUCT);
    CHECK(affect_selective_scan_step(nullptr) == AFFECT_ERROR_NULL);
}

void test_math() {
    double (*const functions[])(double) = {
        [](double v) { return std::exp(v); },
        [](double v) { return 1.0 / (1.0 + std::exp(-v)); },
        [](double v) { return std::log1p(std::exp(v)); },
        [](double v) { return v / (1.0 + std::exp(-v)); },
        [](double v) { return std::tanh(v); },
        [](double v) { return 0.5 * v * (1.0 + std::erf(v / std::sqrt(2.0))); },
    };
    for (int32_t function = 0; function < 6; ++function) {
        float x[41], y[41];
        for (int i = 0; i < 41; ++i) x[i] = 0.2f * static_cast<float>(i - 20);
        CHECK(affect_math(function, x, y, 41) == AFFECT_OK);
        for (int i = 0; i < 41; ++i) {
            const double wanted = functions[function](static_cast<double>(x[i]));
            CHECK(std::fabs(static_cast<double>(y[i]) - wanted) < 1e-6 * (1.0 + std::fabs(wanted)));
        }
        CHECK(affect_math(function, x, x, 41) == AFFECT_OK && std::memcmp(x, y, sizeof(x)) == 0);
    }
    float one = 1.0f;
    CHECK(affect_math(6, &one, &one, 1) == AFFECT_ERROR_VALUE && affect_math(-1, &one, &one, 1) == AFFECT_ERROR_VALUE);
    CHECK(affect_math(0, &one, &one, -1) == AFFECT_ERROR_SIZE && affect_math(0, nullptr, &one, 1) == AFFECT_ERROR_NULL);
    CHECK(affect_math(0, nullptr, nullptr, 0) == AFFECT_OK);
}

void test_arguments() {
    const Fixture f;
    affect_stream *const stream = f.stream();
    Answer answer;
    const float features[4] = {};
    for (const float dt : {0.0f, -1.0f, kNaN, std::numeric_limits<float>::infinity()}) {
        CHECK(step(stream, features, dt, &answer) == AFFECT_ERROR_VALUE);
    }
    CHECK(step(stream, nullptr, 1.0f, &answer) == AFFECT_ERROR_NULL &&
          step(nullptr, features, 1.0f, &answer) == AFFECT_ERROR_NULL);
    CHECK(affect_stream_step(stream, nullptr, 1.0f, answer.arrays) == AFFECT_ERROR_NULL);
    affect_model *model = f.model;
    CHECK(affect_model_open(nullptr, &model) == AFFECT_ERROR_NULL && model == nullptr);
    CHECK(affect_model_open("x", nullptr) == AFFECT_ERROR_NULL);
    affect_model_info info{};
    CHECK(affect_model_describe(f.model, &info) == AFFECT_ERROR_STRUCT &&
          affect_model_describe(f.model, nullptr) == AFFECT_ERROR_NULL);
    affect_tensor_info tensor{};
    CHECK(affect_model_tensor(f.model, 0, 0, &tensor) == AFFECT_ERROR_STRUCT &&
          affect_model_tensor(nullptr, 0, 0, &tensor) == AFFECT_ERROR_NULL);
    affect_output_info output{};
    CHECK(affect_model_output(f.model, 0, &output) == AFFECT_ERROR_STRUCT &&
          affect_model_output(nullptr, 0, &output) == AFFECT_ERROR_NULL);
    affect_image_info image{};
    CHECK(affect_model_image(f.model, 0, &image) == AFFECT_ERROR_STRUCT &&
          affect_model_image(nullptr, 0, &image) == AFFECT_ERROR_NULL);
    int32_t index = 0;
    CHECK(affect_model_find(f.model, 0, nullptr, &index) == AFFECT_ERROR_NULL);
    affect_stream *none = nullptr;
    affect_batch *batch = nullptr;
    affect_runner *runner = nullptr;
    CHECK(affect_stream_create(nullptr, &none) == AFFECT_ERROR_NULL &&
          affect_stream_create(f.model, nullptr) == AFFECT_ERROR_NULL);
    CHECK(affect_batch_create(f.model, 0, &batch) == AFFECT_ERROR_SIZE &&
          affect_batch_create(nullptr, 1, &batch) == AFFECT_ERROR_NULL);
    CHECK(affect_batch_step(nullptr, nullptr, 0, nullptr, nullptr, nullptr) == AFFECT_ERROR_NULL);
    CHECK(affect_runner_create(nullptr, 1, &runner) == AFFECT_ERROR_NULL &&
          affect_runner_run(nullptr, nullptr, nullptr, 1) == AFFECT_ERROR_NULL);
    size_t size = 0;
    float values[8];
    CHECK(affect_stream_save(nullptr, nullptr, 0, &size) == AFFECT_ERROR_NULL &&
          affect_stream_save(stream, nullptr, 0, nullptr) == AFFECT_ERROR_NULL);
    CHECK(affect_stream_restore(stream, nullptr, 5) == AFFECT_ERROR_NULL &&
          affect_stream_restore(nullptr, values, 5) == AFFECT_ERROR_NULL);
    CHECK(affect_stream_reset(nullptr) == AFFECT_ERROR_NULL &&
          affect_stream_encode(nullptr, nullptr, nullptr) == AFFECT_ERROR_NULL);
    CHECK(affect_stream_get_state(stream, 2, values) == AFFECT_ERROR_NAME &&
          affect_stream_set_state(stream, -1, values) == AFFECT_ERROR_NAME);
    CHECK(affect_stream_get_state(stream, 0, nullptr) == AFFECT_ERROR_NULL &&
          affect_stream_set_state(nullptr, 0, values) == AFFECT_ERROR_NULL);
    affect_model_free(nullptr);
    affect_stream_free(nullptr);
    affect_batch_free(nullptr);
    affect_graph_free(nullptr);
    affect_runner_free(nullptr);
    affect_stream_free(stream);
    for (affect_status status = -1; status <= 13; ++status) CHECK(std::strlen(affect_status_message(status)) > 3);
    CHECK(affect_edge_abi_version() == AFFECT_EDGE_ABI_VERSION && std::string(affect_edge_version()) == "0.1.0");
}

void test_the_model_outlives_its_handle() {
    auto *const f = new Fixture;
    affect_stream *const stream = f->stream();
    affect_batch *batch = nullptr;
    CHECK(affect_batch_create(f->model, 2, &batch) == AFFECT_OK);
    delete f;  // the files are gone as well
    Answer answer;
    const float features[4] = {0.1f, 0.2f, 0.3f, 0.4f}, dt = 1.0f;
    const float *const in = features;
    Expected expected;
    expected.step(features, 1.0f);
    CHECK(affect_batch_step(batch, &stream, 1, &in, &dt, answer.arrays) == AFFECT_OK);
    CHECK(expected.agrees(answer.expression, answer.valence));
    affect_batch_free(batch);
    CHECK(step(stream, features, 1.0f, &answer) == AFFECT_OK);
    affect_stream_free(stream);
}

void test_threads() {
    const Fixture f;
    std::string ends[8];
    std::vector<std::thread> threads;
    for (std::string &end : ends) {
        threads.emplace_back([&f, &end] {
            for (int round = 0; round < 20; ++round) {
                affect_stream *const stream = f.stream();
                Answer answer;
                for (int i = 0; i < 50; ++i) {
                    const float features[4] = {0.1f, 0.01f * static_cast<float>(i), -0.1f, 0.0f};
                    CHECK(step(stream, features, 1.0f, &answer) == AFFECT_OK);
                }
                CHECK(step(stream, nullptr, 1.0f, &answer) == AFFECT_ERROR_NULL);
                end = saved(stream);
                affect_stream_free(stream);
            }
        });
    }
    for (std::thread &thread : threads) thread.join();
    for (const std::string &end : ends) CHECK(end == ends[0]);
}

void test_memory() {
#if COUNTS_MEMORY
    const Fixture f;
    affect_stream *const stream = f.stream();
    affect_batch *batch = nullptr;
    CHECK(affect_batch_create(f.model, 16, &batch) == AFFECT_OK);
    Answer answer;
    const float features[4] = {}, dt = 1.0f, picture[48] = {};
    const float *in = features, *pixels = picture;
    float made[4], *encoded = made;
    std::string bytes = saved(stream);
    size_t size = 0;
    const long before = allocations;
    CHECK(affect_stream_encode(stream, &pixels, &encoded) == AFFECT_OK &&
          step(stream, features, 1.0f, &answer) == AFFECT_OK);
    CHECK(affect_batch_step(batch, &stream, 1, &in, &dt, answer.arrays) == AFFECT_OK);
    CHECK(step(stream, features, kNaN, &answer) == AFFECT_ERROR_VALUE && affect_stream_reset(stream) == AFFECT_OK);
    CHECK(affect_stream_save(stream, bytes.data(), bytes.size(), &size) == AFFECT_OK);
    CHECK(allocations == before);

    // Each allocation in turn fails: that is said, and nothing is lost (a sanitizer's run looks for that, too).
    const std::string weights = small::weights();
    const auto survives = [](const char *what, auto &&call) {
        long most = 0;
        for (affect_status status = AFFECT_ERROR_MEMORY; status != AFFECT_OK; ++most) {
            remaining = most;
            status = call();
            remaining = std::numeric_limits<long>::max();
            if (!CHECK_FOR(what, status == AFFECT_OK || status == AFFECT_ERROR_MEMORY)) {
                std::fprintf(stderr, "%s: %s\n", what, affect_last_error());
                break;
            }
        }
        CHECK_FOR(what, most > 1);
    };
    survives("open", [&f] {
        affect_model *model = nullptr;
        const affect_status status = affect_model_open(f.folder.path.c_str(), &model);
        affect_model_free(model);
        return status;
    });
    survives("stream", [&f] {
        affect_stream *made_stream = nullptr;
        const affect_status status = affect_stream_create(f.model, &made_stream);
        affect_stream_free(made_stream);
        return status;
    });
    survives("batch", [&f] {
        affect_batch *made_batch = nullptr;
        const affect_status status = affect_batch_create(f.model, 4, &made_batch);
        affect_batch_free(made_batch);
        return status;
    });
    survives("restore", [&] { return affect_stream_restore(stream, bytes.data(), bytes.size()); });
    survives("graph", [&weights] {
        affect_graph *graph = nullptr;
        affect_runner *runner = nullptr;
        affect_status status = affect_graph_open(weights.data(), weights.size(), "encoder", &graph);
        if (status == AFFECT_OK) status = affect_runner_create(graph, 3, &runner);
        affect_runner_free(runner);
        affect_graph_free(graph);
        return status;
    });
    affect_batch_free(batch);
    affect_stream_free(stream);
#endif
}

}  // namespace

int main() {
    test_descriptions();
    test_steps_and_state();
    test_batches_are_streams_side_by_side();
    test_pictures();
    test_graphs_from_memory();
    test_scans();
    test_math();
    test_arguments();
    test_the_model_outlives_its_handle();
    test_threads();
    test_memory();
    return finish();
}
