// Weights files of one small graph each, which together have every operation and every choice that one of them has:
// what the fuzzers begin with, and what shows that a step allocates nothing whatever is in it.
#ifndef AFFECT_SMALL_PROGRAMS_H
#define AFFECT_SMALL_PROGRAMS_H

#include <cstring>
#include <string>
#include <vector>

#include "program.h"
#include "small_bundle.h"

namespace small {

using affect::Activation, affect::BinaryOp, affect::Op, affect::PoolOp, affect::ReduceOp, affect::UnaryOp;

// One graph while it grows. Operands are handed out side by side, each on a multiple of 64 bytes.
struct Builder {
    explicit Builder(const char *its_name, const char *its_role = "step") : name(its_name), role(its_role) {}

    static int64_t bits(float value) {
        uint32_t found;
        std::memcpy(&found, &value, sizeof(found));
        return found;
    }
    int64_t input(std::vector<uint64_t> sizes, uint32_t batch_axis = 0) {
        inputs.push_back(tensor(("in" + std::to_string(inputs.size())).c_str(), std::move(sizes), batch_axis));
        return operand(Place::input, static_cast<int>(inputs.size()) - 1, 0);
    }
    int64_t output(std::vector<uint64_t> sizes, uint32_t batch_axis = 0) {
        outputs.push_back(tensor(("out" + std::to_string(outputs.size())).c_str(), std::move(sizes), batch_axis));
        return operand(Place::output, static_cast<int>(outputs.size()) - 1, 0);
    }
    int64_t scratch(int64_t bytes) {
        const int64_t at = arena;
        arena += (bytes + 63) / 64 * 64;
        return operand(Place::arena, 0, at);
    }
    // Weights that follow no pattern a kernel could be right with by accident: from `low` to 1 above.
    int64_t weights(int64_t floats, float low = -0.5f) {
        const int64_t at = place();
        for (int64_t i = 0; i < floats; ++i) {
            append(&constants, low + static_cast<float>(next() % 1000) / 1000.0f);
        }
        return operand(Place::constant, 0, at);
    }
    int64_t codes(int64_t bytes) {
        const int64_t at = place();
        for (int64_t i = 0; i < bytes; ++i) {
            constants += static_cast<char>(next());
        }
        return operand(Place::constant, 0, at);
    }
    // Sums of codes; they need not be right for the arithmetic to be the same everywhere.
    int64_t sums(int64_t count) {
        const int64_t at = place();
        for (int64_t i = 0; i < count; ++i) {
            append(&constants, static_cast<int32_t>(next() % 200) - 100);
        }
        return operand(Place::constant, 0, at);
    }
    void add(Op op, std::vector<int64_t> fields, uint32_t flags = 0) {
        instructions.push_back(instruction(op, std::move(fields)));
        instructions.back().flags = flags;
    }
    std::string file() const {
        affect::GraphRecord record{};
        std::strncpy(record.role, role, sizeof(record.role) - 1);
        record.inputs = static_cast<uint32_t>(inputs.size());
        record.outputs = static_cast<uint32_t>(outputs.size());
        record.instructions = static_cast<uint32_t>(instructions.size());
        record.tensors = sizeof(affect::FileHeader) + sizeof(record);
        record.instructions_at = record.tensors + (inputs.size() + outputs.size()) * sizeof(affect::TensorRecord);
        record.arena = static_cast<uint64_t>(arena);
        affect::FileHeader header{};
        std::memcpy(header.magic, affect::kMagic, sizeof(header.magic));
        header.format = affect::kFormat;
        header.graphs = 1;
        header.constants = record.instructions_at + instructions.size() * sizeof(affect::Instruction);
        header.constants_size = constants.size();
        header.size = header.constants + header.constants_size;
        std::string bytes;
        append(&bytes, header);
        append(&bytes, record);
        for (const auto &each : inputs) append(&bytes, each);
        for (const auto &each : outputs) append(&bytes, each);
        for (const auto &each : instructions) append(&bytes, each);
        return bytes + constants;
    }

    std::string name;
    const char *role;
    std::vector<affect::TensorRecord> inputs, outputs;
    std::vector<affect::Instruction> instructions;
    std::string constants;
    int64_t arena = 0;

  private:
    int64_t place() {
        constants.resize((constants.size() + 63) / 64 * 64);
        return static_cast<int64_t>(constants.size());
    }
    uint32_t next() { return (seed = seed * 1664525 + 1013904223) >> 16; }
    uint32_t seed = 1;
};

inline std::vector<Builder> programs() {
    const auto bits = Builder::bits;
    std::vector<Builder> all;
    const auto begin = [&all](const char *name, const char *role = "step") -> Builder & {
        return all.emplace_back(name, role);
    };
    for (int64_t act = 0; act < static_cast<int64_t>(Activation::count); ++act) {
        // Strips of 16 outputs in groups of 4: 83 outputs are one whole group and a rest.
        Builder &b = begin(("linear-" + std::to_string(act)).c_str());
        const int64_t n = act == 2 ? 83 : 20, wide = (n + 15) / 16 * 16, k = 5, rows = 3;
        const int64_t x = b.input({1, 3, 5}), y = b.output({1, 3, static_cast<uint64_t>(n)}),
                      more = b.scratch(rows * n * 4);
        b.add(Op::fill, {more, rows * n, bits(0.25f)});
        const bool rich = act % 2 == 0;
        b.add(Op::linear,
              {x, y, b.weights(k * wide), rich ? b.weights(wide) : 0, rich ? more : 0, rows, k, n, k, n, act});
    }
    for (const bool rich : {false, true}) {
        Builder &b = begin(rich ? "linear-int8-rich" : "linear-int8");
        const int64_t n = rich ? 70 : 17, wide = (n + 15) / 16 * 16, k = 6, rows = 2;
        const int64_t x = b.input({1, 2, 6}), y = b.output({1, 2, static_cast<uint64_t>(n)}),
                      more = b.scratch(rows * n * 4);
        b.add(Op::fill, {more, rows * n, bits(-0.5f)});
        b.add(Op::linear,
              {x, y, b.codes(8 * wide), rich ? b.weights(wide) : 0, rich ? more : 0, rows, k, n, k, n, rich ? 1 : 0,
               b.weights(wide, 0.01f), b.sums(wide), bits(0.02f), 128, b.scratch(rows * 8)},
              1);
    }
    for (const uint32_t flags : {0u, 1u}) {
        Builder &b = begin(flags == 0 ? "norm" : "norm-rms", "encoder");
        const int64_t x = b.input({1, 3, 19}), y = b.output({1, 3, 19});
        b.add(Op::norm, {x, y, flags == 0 ? b.weights(19) : 0, flags == 0 ? b.weights(19) : 0, 3, 19, bits(1e-5f)},
              flags);
    }
    {
        Builder &b = begin("conv-step");
        const int64_t x = b.input({1, 21}), state = b.input({1, 21, 3}), y = b.output({1, 21}),
                      next = b.output({1, 21, 3});
        b.add(Op::conv_step, {x, state, y, next, b.weights(21 * 4), b.weights(21), 21, 4, 2});
        b.add(Op::conv_step, {x, state, y, 0, b.weights(21 * 4), 0, 21, 4, 0});
    }
    for (uint32_t flags = 0; flags < 4; ++flags) {
        Builder &b = begin(("scan-step-" + std::to_string(flags)).c_str());
        const int64_t d = flags == 3 ? 19 : 5, n = flags == 0 ? 16 : 4;
        const auto channels = static_cast<uint64_t>(d), states = static_cast<uint64_t>(n);
        const int64_t x = b.input({1, channels}), delta = b.input({1, channels}), dt = b.input({1});
        const int64_t in_b = b.input({1, states}), in_c = b.input({1, states}), gate = b.input({1, channels});
        const int64_t h = b.input({1, channels, states}), next = b.output({1, channels, states});
        const int64_t y = b.output({1, channels});
        const bool rich = flags % 2 == 0;
        b.add(Op::scan_step,
              {x, delta, rich ? dt : 0, b.weights(d * n, -1.5f), in_b, in_c, rich ? b.weights(d) : 0, rich ? gate : 0,
               h, next, y, d, n, b.scratch(2 * d * 4)},
              flags);
    }
    for (uint32_t flags = 0; flags < 16; flags += 2) {
        Builder &b = begin(("scan-" + std::to_string(flags)).c_str(), "encoder");
        const int64_t l = 6, d = flags == 2 ? 34 : 6, n = flags == 4 ? 16 : 4, g = 2;
        const auto channels = static_cast<uint64_t>(d), states = static_cast<uint64_t>(n);
        const int64_t x = b.input({1, 6, channels}), delta = b.input({1, 6, channels}),
                      in_b = b.input({1, 6, 2, states});
        const int64_t in_c = b.input({1, 6, 2, states}), before = b.input({1, channels, states});
        const int64_t after = b.output({1, channels, states}), y = b.output({1, 6, channels});
        const bool rich = flags % 4 == 0;
        b.add(Op::fill, {y, l * d, bits(1.0f)});
        b.add(Op::scan,
              {x,
               delta,
               b.weights(d * n, -1.5f),
               in_b,
               in_c,
               rich ? b.weights(d) : 0,
               rich ? before : 0,
               rich ? after : 0,
               y,
               l,
               d,
               n,
               g,
               d,
               d,
               g * n,
               g * n,
               d,
               n,
               n,
               flags >= 8 ? 3 : 0},
              flags);
    }
    {
        Builder &b = begin("unary");
        const int64_t count = static_cast<int64_t>(UnaryOp::count), x = b.input({1, 37});
        const int64_t y = b.output({static_cast<uint64_t>(count), 1, 37}, 1);
        for (int64_t op = 0; op < count; ++op) {
            b.add(Op::unary, {x, y + op * 37 * 4, 37, op, bits(0.5f), bits(0.75f)});
        }
    }
    for (int shape = 0; shape < 3; ++shape) {
        Builder &b = begin(("binary-" + std::to_string(shape)).c_str());
        const int64_t count = static_cast<int64_t>(BinaryOp::count), x = b.input({1, 2, 18}), other = b.input({1, 18});
        const int64_t y = b.output({static_cast<uint64_t>(count), 1, 36}, 1);
        for (int64_t op = 0; op < count; ++op) {
            // A whole second array, a row that is repeated, a number that is repeated.
            b.add(Op::binary, {x, shape == 0 ? x : other, y + op * 36 * 4, op, 1, 1, 2, 18, 0, 0, 18, 1, 0, 0,
                               shape == 0 ? 18 : 0, shape == 2 ? 0 : 1});
        }
    }
    {
        Builder &b = begin("select");
        const int64_t c = b.input({1, 5}), x = b.input({1, 3, 5}), y = b.output({1, 3, 5});
        b.add(Op::select, {c, x, b.weights(1), y, 1, 1, 3, 5, 0, 0, 0, 1, 0, 0, 5, 1, 0, 0, 0, 0});
    }
    {
        Builder &b = begin("copy", "encoder");
        const int64_t x = b.input({1, 3, 4}), y = b.output({1, 4, 3}), z = b.output({2, 1, 3, 4}, 1);
        b.add(Op::copy, {x, y, 4, 0, 1, 1, 1, 1, 4, 3, 0, 0, 0, 0, 1, 4, 0, 0, 0, 0, 3, 1});
        b.add(Op::copy, {x, z, 4, 0, 1, 1, 1, 1, 3, 4, 0, 0, 0, 0, 4, 1, 0, 0, 0, 0, 4, 1});
        // Last row first.
        b.add(Op::copy, {x + 8 * 4, z + 12 * 4, 4, 0, 1, 1, 1, 1, 3, 4, 0, 0, 0, 0, -4, 1, 0, 0, 0, 0, 4, 1});
        const int64_t from = b.scratch(24), to = b.scratch(24);
        b.add(Op::pad, {x, from, 1, 3, 4, 4, 0, 0, 0, 0, bits(0.1f), 3});
        b.add(Op::copy, {from, to, 1, 0, 1, 1, 1, 1, 4, 3, 0, 0, 0, 0, 1, 4, 0, 0, 0, 0, 3, 1});
    }
    {
        Builder &b = begin("reduce");
        const int64_t x = b.input({1, 2, 5, 18}), y = b.output({static_cast<uint64_t>(ReduceOp::count), 1, 36}, 1);
        const int64_t rows = b.output({1, 10});
        for (int64_t op = 0; op < static_cast<int64_t>(ReduceOp::count); ++op) {
            b.add(Op::reduce, {x, y + op * 36 * 4, op, 2, 5, 18});
            b.add(Op::reduce, {x, rows, op, 10, 18, 1});
        }
        b.add(Op::softmax, {rows, rows, 2, 5});
    }
    {
        Builder &b = begin("matmul", "encoder");
        const int64_t x = b.input({1, 2, 3, 4}), other = b.input({1, 2, 4, 18}), y = b.output({1, 2, 3, 18});
        const int64_t square = b.output({1, 2, 3, 3});
        b.add(Op::matmul, {x, other, y, bits(0.5f), 1, 2, 0, 12, 4, 1, 0, 72, 18, 1, 3, 4, 18});
        b.add(Op::matmul, {x, x, square, bits(1.0f), 1, 2, 0, 12, 4, 1, 0, 12, 1, 4, 3, 4, 3});
    }
    for (const bool wide_outputs : {false, true}) {
        // A picture with its planes apart, rounded to 8 bits; a convolution of it to 8 bits; one of that to floats.
        Builder &b = begin(wide_outputs ? "conv-int8-wide" : "conv-int8", "encoder");
        const int64_t n = wide_outputs ? 70 : 3, wide = (n + 15) / 16 * 16, q = (n + 3) / 4 * 4;
        const int64_t x = b.input({1, 3, 4, 5}), y = b.output({1, 4, 5, 2});
        const int64_t padded = b.scratch(6 * 7 * 4), codes = b.scratch(6 * 7 * q), more = b.scratch(4 * 5 * n * 4);
        b.add(Op::pad, {x, padded, 4, 5, 3, 4, 1, 1, 1, 1, bits(0.02f), 7}, 1);
        b.add(Op::fill, {more, 4 * 5 * n, bits(0.125f)});
        b.add(Op::conv, {padded,
                         b.codes(36 * wide),
                         b.weights(wide),
                         6,
                         7,
                         4,
                         3,
                         3,
                         1,
                         1,
                         1,
                         1,
                         4,
                         5,
                         n,
                         1,
                         0,
                         more,
                         b.weights(wide, 0.01f),
                         b.sums(wide),
                         bits(0.02f),
                         7,
                         codes,
                         1,
                         1,
                         1,
                         1,
                         q,
                         bits(0.05f),
                         9},
              1);
        b.add(Op::conv, {codes, b.codes(9 * q * 16),  0,          6,           7, q, 3, 3, 1, 1, 1, 1, 4, 5, 2, 0, y,
                         0,     b.weights(16, 0.01f), b.sums(16), bits(0.05f), 9},
              1);
    }
    {
        Builder &b = begin("conv", "encoder");
        const int64_t x = b.input({1, 4, 5, 3}), y = b.output({1, 2, 3, 18}), padded = b.scratch(6 * 7 * 4 * 4);
        b.add(Op::pad, {x, padded, 4, 5, 3, 4, 1, 1, 1, 1, 0, 0}, 2);
        b.add(Op::conv, {padded, b.weights(9 * 4 * 32), b.weights(32), 6, 7, 4, 3, 3, 2, 2, 1, 1, 2, 3, 18, 6, y});
        b.add(Op::conv, {padded, b.weights(4 * 4 * 32), 0, 6, 7, 4, 2, 2, 2, 2, 3, 1, 2, 3, 18, 0, y, y});
    }
    {
        Builder &b = begin("depthwise", "encoder");
        const int64_t x = b.input({1, 5, 6, 19}), y = b.output({1, 2, 3, 19});
        b.add(Op::depthwise, {x, b.weights(4 * 19), b.weights(19), 5, 6, 19, 2, 2, 2, 2, 1, 1, 2, 3, 1, y});
        b.add(Op::depthwise, {x, b.weights(4 * 19), 0, 5, 6, 19, 2, 2, 1, 1, 3, 3, 2, 3, 0, y});
    }
    {
        Builder &b = begin("pool", "encoder");
        const int64_t count = static_cast<int64_t>(PoolOp::count), x = b.input({1, 5, 6, 3});
        const int64_t y = b.output({static_cast<uint64_t>(count), 1, 27}, 1);
        for (int64_t op = 0; op < count; ++op) {
            b.add(Op::pool, {x, y + op * 27 * 4, 5, 6, 3, 3, 3, 2, 2, 1, 1, 3, 3, op});
        }
    }
    return all;
}

}  // namespace small

#endif
