// Every operation of a program: what a batch gives is what each stream alone gives, nothing is allocated on the way,
// and any number of threads may run one graph at once.

#include <affect_edge.h>

#include <cstring>
#include <thread>

#include "check.h"
#include "counting.h"
#include "small_programs.h"

namespace {

// The inputs of a graph for some streams, and room for its outputs.
struct Arrays {
    Arrays(const affect_graph *graph, int64_t streams) {
        for (const int32_t which : {AFFECT_INPUTS, AFFECT_OUTPUTS}) {
            std::vector<std::vector<float>> &arrays = which == AFFECT_INPUTS ? inputs : outputs;
            for (int32_t i = 0; i < affect_graph_tensor_count(graph, which); ++i) {
                affect_tensor_info info{};
                info.struct_size = sizeof(info);
                CHECK(affect_graph_tensor(graph, which, i, &info) == AFFECT_OK);
                arrays.emplace_back(static_cast<size_t>(info.floats * streams));
                int64_t pieces = 1;
                for (int32_t axis = 0; axis < info.batch_axis; ++axis) pieces *= info.sizes[axis];
                if (which == AFFECT_OUTPUTS) output_pieces.push_back(static_cast<size_t>(pieces));
            }
        }
        for (auto &array : inputs) given.push_back(array.data());
        for (auto &array : outputs) made.push_back(array.data());
    }
    // Every stream has numbers of its own; the batch axis of all inputs is the first one.
    void fill(int64_t streams, int64_t first_stream) {
        for (auto &array : inputs) {
            const size_t each = array.size() / static_cast<size_t>(streams);
            for (size_t i = 0; i < array.size(); ++i) {
                const size_t stream = i / each + static_cast<size_t>(first_stream);
                array[i] = 0.05f * static_cast<float>((i % each * 7 + stream * 5) % 37) - 0.7f;
            }
        }
    }
    // What stream `stream` of `streams` has got in output `i`.
    std::vector<float> part(size_t i, size_t stream, size_t streams) const {
        const size_t inner = outputs[i].size() / streams / output_pieces[i];
        std::vector<float> found;
        for (size_t piece = 0; piece < output_pieces[i]; ++piece) {
            const auto from = outputs[i].begin() + static_cast<std::ptrdiff_t>((piece * streams + stream) * inner);
            found.insert(found.end(), from, from + static_cast<std::ptrdiff_t>(inner));
        }
        return found;
    }

    std::vector<std::vector<float>> inputs, outputs;
    std::vector<size_t> output_pieces;
    std::vector<const float *> given;
    std::vector<float *> made;
};

bool same(const std::vector<float> &a, const std::vector<float> &b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

affect_graph *open(const small::Builder &program) {
    const std::string bytes = program.file();
    // One byte off, so that it is copied.
    std::vector<char> room(bytes.size() + 65);
    char *at = room.data();
    while (reinterpret_cast<uintptr_t>(at) % 64 != 1) ++at;
    std::memcpy(at, bytes.data(), bytes.size());
    affect_graph *graph = nullptr;
    const affect_status status = affect_graph_open(at, bytes.size(), program.role, &graph);
    CHECK_FOR((program.name + ": " + affect_last_error()).c_str(), status == AFFECT_OK);
    return graph;
}

void test_every_operation_is_there() {
    std::vector<bool> seen(static_cast<size_t>(affect::Op::count));
    for (const small::Builder &program : small::programs()) {
        for (const affect::Instruction &in : program.instructions) seen[in.op] = true;
    }
    for (size_t op = 1; op < seen.size(); ++op) CHECK_FOR(std::to_string(op).c_str(), seen[op]);
}

void test_a_batch_is_its_streams_and_allocates_nothing() {
    constexpr size_t streams = 21;  // more than go through at a time
    for (const small::Builder &program : small::programs()) {
        affect_graph *const graph = open(program);
        if (graph == nullptr) continue;
        affect_runner *one = nullptr, *many = nullptr;
        CHECK(affect_runner_create(graph, 1, &one) == AFFECT_OK && affect_runner_create(graph, 16, &many) == AFFECT_OK);
        Arrays all(graph, streams);
        all.fill(streams, 0);
#if COUNTS_MEMORY
        const long before = allocations;
#endif
        CHECK(affect_runner_run(many, all.given.data(), all.made.data(), streams) == AFFECT_OK);
#if COUNTS_MEMORY
        CHECK_FOR(program.name.c_str(), allocations == before);
#endif
        for (size_t s = 0; s < streams; ++s) {
            Arrays alone(graph, 1);
            alone.fill(1, static_cast<int64_t>(s));
            CHECK(affect_runner_run(one, alone.given.data(), alone.made.data(), 1) == AFFECT_OK);
            for (size_t i = 0; i < alone.outputs.size(); ++i) {
                CHECK_FOR(program.name.c_str(), same(all.part(i, s, streams), alone.part(i, 0, 1)));
            }
        }
        affect_runner_free(one);
        affect_runner_free(many);
        affect_graph_free(graph);
    }
}

void test_threads() {
    constexpr int64_t streams = 5;
    for (const small::Builder &program : small::programs()) {
        affect_graph *const graph = open(program);
        if (graph == nullptr) continue;
        std::vector<std::vector<float>> results[8];
        std::vector<std::thread> threads;
        for (auto &result : results) {
            threads.emplace_back([graph, &result] {
                affect_runner *runner = nullptr;
                CHECK(affect_runner_create(graph, 3, &runner) == AFFECT_OK);
                Arrays arrays(graph, streams);
                arrays.fill(streams, 0);
                for (int round = 0; round < 5; ++round) {
                    CHECK(affect_runner_run(runner, arrays.given.data(), arrays.made.data(), streams) == AFFECT_OK);
                }
                affect_runner_free(runner);
                result = std::move(arrays.outputs);
            });
        }
        for (std::thread &thread : threads) thread.join();
        for (const auto &result : results) {
            for (size_t i = 0; i < result.size(); ++i) {
                CHECK_FOR(program.name.c_str(), same(result[i], results[0][i]));
            }
        }
        affect_graph_free(graph);
    }
}

}  // namespace

int main() {
    test_every_operation_is_there();
    test_a_batch_is_its_streams_and_allocates_nothing();
    test_threads();
    return finish();
}
