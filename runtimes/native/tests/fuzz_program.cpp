// Fuzzes weights files: whatever `Program::read` accepts must run within its memory, which the sanitizers watch.
//
// Plain mutation would seldom get past the header, so what a header says of the file's size is made true first, unless
// its last byte asks for it to be left as it is.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "fuzz.h"
#include "kernels.h"
#include "program.h"

namespace {

using affect::Binding, affect::FileHeader, affect::GraphRecord, affect::Instruction, affect::Program,
    affect::TensorRecord;

constexpr uint64_t kMostWork = 1000000, kMostBytes = 1 << 22;
constexpr size_t kGap = 64;

void correct(uint8_t *data, size_t size) {
    FileHeader header;
    if (size < sizeof(header)) {
        return;
    }
    std::memcpy(&header, data, sizeof(header));
    if (header.zero[sizeof(header.zero) - 1] & 1) {
        return;
    }
    std::memcpy(header.magic, affect::kMagic, sizeof(header.magic));
    header.format = affect::kFormat;
    header.size = size;
    header.constants = header.constants / affect::kAlignment * affect::kAlignment;
    // To the file's very end, where an access beyond it is seen.
    header.constants_size = header.constants <= size ? size - header.constants : 0;
    std::memcpy(data, &header, sizeof(header));
    for (uint32_t i = 0; i < header.graphs && (i + 2) * sizeof(GraphRecord) <= size; ++i) {
        GraphRecord record;
        uint8_t *const at = data + sizeof(header) + i * sizeof(record);
        std::memcpy(&record, at, sizeof(record));
        // An odd number of cache lines is a stream's whole part of the workspace: nothing unused lies behind it.
        record.arena = (record.arena / affect::kAlignment | 1) * affect::kAlignment;
        std::memcpy(at, &record, sizeof(record));
    }
}

// The arrays of one run: each piece of each stream with a gap behind it that nothing may touch.
class Tensors {
  public:
    Tensors(const Program &program, bool inputs, int streams) {
        const uint32_t count = inputs ? program.inputs() : program.outputs();
        for (uint32_t i = 0; i < count; ++i) {
            const TensorRecord &record = inputs ? program.input(i) : program.output(i);
            const uint64_t pieces = Program::pieces(record), bytes = Program::floats(record) / pieces * sizeof(float);
            const uint64_t pitch = bytes + kGap, all = pieces * static_cast<uint64_t>(streams);
            char *const memory = static_cast<char *>(std::malloc(all * pitch));
            for (uint64_t piece = 0; piece < all; ++piece) {
                fill(memory + piece * pitch, bytes);
                AFFECT_POISON(memory + piece * pitch + bytes, kGap);
            }
            Binding binding{};
            for (int s = 0; s < streams; ++s) {
                binding.base[s] = memory + static_cast<uint64_t>(s) * pitch;
            }
            binding.stride = static_cast<uint64_t>(streams) * pitch;
            bindings_.push_back(binding);
            sizes_.push_back(all * pitch);
        }
    }
    ~Tensors() {
        for (size_t i = 0; i < bindings_.size(); ++i) {
            AFFECT_UNPOISON(bindings_[i].base[0], sizes_[i]);
            std::free(bindings_[i].base[0]);
        }
    }
    Tensors(const Tensors &) = delete;
    Tensors &operator=(const Tensors &) = delete;
    const Binding *bindings() const { return bindings_.data(); }

  private:
    // Ordinary numbers, and among them those at which conversions and comparisons go wrong.
    static void fill(char *memory, uint64_t bytes) {
        static const uint32_t numbers[] = {0x3f000000, 0xbf800000, 0x3e99999a, 0x40a00000, 0x7fc00000,
                                           0xc2c80000, 0x7f800000, 0x80000000, 0x00000001, 0xff7fffff,
                                           0x4f000000, 0xff800000, 0x33d6bf95};
        for (uint64_t i = 0; i < bytes / sizeof(float); ++i) {
            std::memcpy(memory + i * sizeof(float), &numbers[i % (sizeof(numbers) / sizeof(numbers[0]))],
                        sizeof(float));
        }
    }

    std::vector<Binding> bindings_;
    std::vector<uint64_t> sizes_;
};

bool is_small(const Program &program) {
    uint64_t floats = 0;
    for (uint32_t i = 0; i < program.inputs() + program.outputs(); ++i) {
        floats += Program::floats(i < program.inputs() ? program.input(i) : program.output(i - program.inputs()));
    }
    return program.work() <= kMostWork && floats * sizeof(float) <= kMostBytes && program.workspace(3) <= kMostBytes;
}

void run(const Program &program, int streams) {
    const Tensors inputs(program, true, streams), outputs(program, false, streams);
    void *workspace = nullptr;
    const uint64_t bytes = program.workspace(streams);
    if (posix_memalign(&workspace, affect::kAlignment, bytes) != 0) {
        std::abort();
    }
    std::memset(workspace, 0, bytes);
    program.run(inputs.bindings(), outputs.bindings(), streams, workspace);
    std::free(workspace);
}

}  // namespace

bool fuzz_one(const uint8_t *data, size_t size) {
    // Aligned as a mapped file is, and not a byte longer.
    void *memory = nullptr;
    if (size == 0 || posix_memalign(&memory, affect::kAlignment, size) != 0) {
        return false;
    }
    auto *const bytes = static_cast<uint8_t *>(memory);
    std::memcpy(bytes, data, size);
    correct(bytes, size);
    bool accepted = false;
    for (const char *const role : {"step", "encoder"}) {
        char error[256];
        Program *const program = Program::read(bytes, size, role, error, sizeof(error));
        if (program == nullptr) {
            continue;
        }
        accepted = true;
        if (is_small(*program)) {
            run(*program, 1);
            run(*program, 3);
        }
        Program::free(program);
    }
    std::free(memory);
    return accepted;
}

#if defined(AFFECT_LIBFUZZER)
// Half of the time, one field of one record becomes a number that could matter there; otherwise bytes change anyhow.
extern "C" size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most);
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned int seed);
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned int seed) {
    uint64_t state = seed * 6364136223846793005u + 1442695040888963407u;
    const auto random = [&state](uint64_t below) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return (state >> 33) % below;
    };
    FileHeader header;
    GraphRecord record;
    if (size < sizeof(header) + sizeof(record) || random(2) == 0) {
        return LLVMFuzzerMutate(data, size, most);
    }
    std::memcpy(&header, data, sizeof(header));
    const uint64_t graphs = (size - sizeof(header)) / sizeof(record);
    const uint64_t at =
        sizeof(header) + random(header.graphs < graphs && header.graphs > 0 ? header.graphs : 1) * sizeof(record);
    std::memcpy(&record, data + at, sizeof(record));
    const auto number = [&]() -> uint64_t {
        switch (random(6)) {
            case 0:
                return random(8);
            case 1:
                return random(100);
            case 2:
                return uint64_t{1} << random(64);
            case 3:
                return (uint64_t{1} << random(64)) - 1;
            case 4:
                return uint64_t{0} - random(8);
            default:
                return static_cast<uint64_t>(
                    affect::operand(static_cast<affect::Place>(random(6)), static_cast<int>(random(4)),
                                    static_cast<int64_t>(random(2) == 0 ? random(8) * 64 : random(4096) * 4)));
        }
    };
    const uint64_t rounds = 1 + random(3);
    for (uint64_t round = 0; round < rounds; ++round) {
        const uint64_t place = random(10);
        if (place == 0) {
            const uint64_t tensors = uint64_t{record.inputs} + record.outputs;
            const uint64_t from = record.tensors + random(tensors == 0 ? 1 : tensors) * sizeof(TensorRecord);
            if (from < size && size - from >= sizeof(TensorRecord)) {
                TensorRecord tensor;
                std::memcpy(&tensor, data + from, sizeof(tensor));
                switch (random(3)) {
                    case 0:
                        tensor.rank = static_cast<uint32_t>(random(8));
                        break;
                    case 1:
                        tensor.batch_axis = static_cast<uint32_t>(random(6));
                        break;
                    default:
                        tensor.sizes[random(affect::kMostRank)] = number();
                        break;
                }
                std::memcpy(data + from, &tensor, sizeof(tensor));
            }
            continue;
        }
        const uint64_t from =
            record.instructions_at + random(record.instructions == 0 ? 1 : record.instructions) * sizeof(Instruction);
        if (from >= size || size - from < sizeof(Instruction)) {
            continue;
        }
        Instruction in;
        std::memcpy(&in, data + from, sizeof(in));
        int64_t &field = in.v[random(affect::kFields)];
        switch (place) {
            case 1:
                in.op = static_cast<uint32_t>(random(static_cast<uint64_t>(affect::Op::count) + 1));
                break;
            case 2:
                in.flags ^= 1u << random(4);
                break;
            case 3:
            case 4:
                field = static_cast<int64_t>(static_cast<uint64_t>(field) + random(9) - 4);
                break;
            case 5:
                field = in.v[random(affect::kFields)];
                break;
            default:
                field = static_cast<int64_t>(number());
                break;
        }
        std::memcpy(data + from, &in, sizeof(in));
    }
    return size;
}
#endif
