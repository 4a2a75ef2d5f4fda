// A bundle of a few numbers, written as an export writes one, for tests to open and to spoil.
//
// The model takes a picture of 4 x 4 pixels. features (4) = sums over the picture's 12 rows. State `sum` (2, batch, 4):
// sum[0] += features * dt, sum[1] += features. expression = softmax(sum[0]); valence = mean(sum[1]). The state `sound`
// is kept by the runtime. In the step's file tensors are not in the manifest's order.
#ifndef AFFECT_SMALL_BUNDLE_H
#define AFFECT_SMALL_BUNDLE_H

#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "program.h"
#include "sha256.h"

namespace small {

using affect::operand;
using affect::Place;

inline std::string sha256(const std::string &bytes) {
    affect::Sha256 sha;
    sha.update(bytes.data(), bytes.size());
    uint8_t digest[affect::Sha256::kBytes];
    sha.finish(digest);
    char hex[2 * affect::Sha256::kBytes + 1];
    affect::to_hex(digest, hex);
    return hex;
}

inline affect::TensorRecord tensor(const char *name, std::vector<uint64_t> sizes, uint32_t batch_axis) {
    affect::TensorRecord record{};
    std::strncpy(record.name, name, sizeof(record.name) - 1);
    record.rank = static_cast<uint32_t>(sizes.size());
    record.batch_axis = batch_axis;
    std::copy(sizes.begin(), sizes.end(), record.sizes);
    return record;
}

inline affect::Instruction instruction(affect::Op op, std::vector<int64_t> fields) {
    affect::Instruction made{};
    made.op = static_cast<uint32_t>(op);
    std::copy(fields.begin(), fields.end(), made.v);
    return made;
}

struct GraphParts {
    const char *role;
    std::vector<affect::TensorRecord> inputs, outputs;
    std::vector<affect::Instruction> instructions;
};

template <class T>
void append(std::string *bytes, const T &value) {
    bytes->append(reinterpret_cast<const char *>(&value), sizeof(value));
}

inline std::string weights() {
    using affect::BinaryOp, affect::Op, affect::ReduceOp;
    const int64_t features = operand(Place::input, 2, 0), dt = operand(Place::input, 0, 0);
    const int64_t sum0 = operand(Place::input, 1, 0), sum1 = operand(Place::input, 1, 16);
    const int64_t valence = operand(Place::output, 0, 0), expression = operand(Place::output, 2, 0);
    const int64_t next0 = operand(Place::output, 1, 0), next1 = operand(Place::output, 1, 16);
    const int64_t arena = operand(Place::arena, 0, 0);
    const auto binary = [](int64_t a, int64_t b, int64_t y, BinaryOp op, int64_t b_stride) {
        return instruction(Op::binary, {a, b, y, static_cast<int64_t>(op), 1, 1, 1, 4, 0, 0, 0, 1, 0, 0, 0, b_stride});
    };
    const std::vector<GraphParts> graphs = {
        {"encoder",
         {tensor("frame", {1, 3, 4, 4}, 0)},
         {tensor("features", {1, 4}, 0)},
         {instruction(Op::reduce, {operand(Place::input, 0, 0), operand(Place::output, 0, 0),
                                   static_cast<int64_t>(ReduceOp::sum), 1, 12, 4})}},
        {"step",
         {tensor("dt", {1}, 0), tensor("sum", {2, 1, 4}, 1), tensor("features", {1, 4}, 0)},
         {tensor("valence", {1}, 0), tensor("next_sum", {2, 1, 4}, 1), tensor("expression", {1, 4}, 0)},
         {binary(features, dt, arena, BinaryOp::mul, 0), binary(sum0, arena, next0, BinaryOp::add, 1),
          binary(sum1, features, next1, BinaryOp::add, 1), instruction(Op::softmax, {next0, expression, 1, 4}),
          instruction(Op::reduce, {next1, valence, static_cast<int64_t>(ReduceOp::mean), 1, 4, 1})}},
    };
    std::string body;
    const size_t start = sizeof(affect::FileHeader) + graphs.size() * sizeof(affect::GraphRecord);
    std::string records;
    for (const GraphParts &graph : graphs) {
        affect::GraphRecord record{};
        std::strncpy(record.role, graph.role, sizeof(record.role) - 1);
        record.inputs = static_cast<uint32_t>(graph.inputs.size());
        record.outputs = static_cast<uint32_t>(graph.outputs.size());
        record.instructions = static_cast<uint32_t>(graph.instructions.size());
        record.tensors = start + body.size();
        for (const auto &each : graph.inputs) append(&body, each);
        for (const auto &each : graph.outputs) append(&body, each);
        record.instructions_at = start + body.size();
        for (const auto &each : graph.instructions) append(&body, each);
        record.arena = 64;
        append(&records, record);
    }
    affect::FileHeader header{};
    std::memcpy(header.magic, affect::kMagic, sizeof(header.magic));
    header.format = affect::kFormat;
    header.graphs = static_cast<uint32_t>(graphs.size());
    header.constants = start + body.size();
    header.constants_size = 64;
    header.size = header.constants + header.constants_size;
    std::string bytes;
    append(&bytes, header);
    return bytes + records + body + std::string(64, '\0');
}

inline const char *machine() {
#if defined(__x86_64__)
    return "x86_64";
#else
    return "aarch64";
#endif
}

// Without the digest of its own, which `sealed` adds.
inline std::string manifest(const std::string &weights_sha256) {
    const auto tensor = [](const char *name, const char *shape) {
        return std::string("{\"name\": \"") + name + "\", \"shape\": " + shape + ", \"dtype\": \"float32\"";
    };
    const std::string digest = "\"sha256\": \"" + weights_sha256 + "\"",
                      frame = tensor("frame", "[\"batch\", 3, 4, 4]");
    const std::string features = tensor("features", "[\"batch\", 4]") + "}", sum = tensor("sum", "[2, \"batch\", 4]");
    return std::string("{\n \"schema\": 2,\n") +
           " \"model\": {\"name\": \"small\", \"version\": \"1.2.3\", \"weights_sha256\": \"" + std::string(64, 'a') +
           "\", \"trained\": false, \"licence\": \"Apache-2.0\"},\n" + " \"inputs\": [" + frame +
           ", \"kind\": \"image\", \"colour\": \"rgb\", \"mean\": [0.5, 0.25, 0.485], \"std\": [0.25, 0.5, 0.229], "
           "\"align\": \"eyes\"}],\n"
           " \"outputs\": [{\"name\": \"expression\", \"kind\": \"distribution\", \"range\": [0, 1], \"labels\": "
           "[\"calm\", "
           "\"glad\", \"sad\", \"cross\"], \"signal\": \"label\"}, {\"name\": \"valence\", \"kind\": \"regression\", "
           "\"range\": "
           "[-1, 1], \"signal\": \"proxy\", \"smoothing_s\": 0.5}],\n"
           " \"states\": [" +
           sum + ", \"init\": 0.5}, " + tensor("sound", "[\"batch\", 3]") +
           ", \"init\": 0.0, \"kept_by\": \"runtime\"}],\n"
           " \"clock\": {\"frame_interval_s\": 0.03333333333333333, \"variable_dt\": true},\n"
           " \"graphs\": [{\"role\": \"encoder\", \"file\": \"model.native\", " +
           digest + ", \"precision\": {}, \"inputs\": [" + frame + "}], \"outputs\": [" + features +
           "]}, {\"role\": \"step\", \"file\": \"model.native\", " + digest + ", \"precision\": {}, \"inputs\": [" +
           features + ", " + tensor("dt", "[\"batch\"]") + "}, " + sum + "}], \"outputs\": [" +
           tensor("expression", "[\"batch\", 4]") + "}, " + tensor("valence", "[\"batch\"]") + "}, " +
           tensor("next_sum", "[2, \"batch\", 4]") +
           "}]}],\n"
           " \"target\": {\"name\": \"native\", \"engine\": \"native\", \"arch\": [\"" +
           machine() +
           "\"], \"made_with\": {}, \"verified_on_target\": true},\n"
           " \"files\": {\"verify.npz\": \"" +
           sha256("replay") + "\", \"parity.json\": \"" + sha256("{}") + "\"}";
}

inline std::string sealed(const std::string &manifest) {
    return manifest + ",\n \"manifest_sha256\": \"" + sha256(manifest + "\n}") + "\"\n}\n";
}

// A folder with the bundle in it, removed at the end.
class Folder {
  public:
    Folder() {
        const char *const base = std::getenv("TMPDIR");
        path = std::string(base == nullptr ? "/tmp" : base) + "/affect-edge-XXXXXX";
        if (mkdtemp(path.data()) == nullptr) {
            std::perror("mkdtemp");
            std::abort();
        }
        write("model.native", weights());
        write("verify.npz", "replay");
        write("parity.json", "{}");
        write("manifest.json", sealed(manifest(sha256(weights()))));
    }
    ~Folder() {
        const std::string command = "rm -rf '" + path + "'";
        if (std::system(command.c_str()) != 0) {
            std::perror("rm");
        }
    }
    void write(const char *name, const std::string &content) const {
        remove(name);
        std::FILE *const file = std::fopen(at(name).c_str(), "wb");
        if (file == nullptr || std::fwrite(content.data(), 1, content.size(), file) != content.size()) {
            std::perror(name);
            std::abort();
        }
        std::fclose(file);
    }
    void remove(const char *name) const { ::unlink(at(name).c_str()); }
    std::string at(const char *name) const { return path + "/" + name; }
    std::string path;
};

}  // namespace small

#endif
