// What a plugin is to everything around it: the C ABI (_library.cpp) and TensorRT (_ipluginv3.cpp). Plain C++, no CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace edgetrim {

enum class Type : int32_t { kFloat = 0, kHalf = 1, kInt64 = 2 };

inline int64_t bytes(Type type) { return type == Type::kFloat ? 4 : type == Type::kHalf ? 2 : 8; }

constexpr int kRank = 4;

// Row-major and contiguous. Mirrored by `plugins/_library.py`.
struct Tensor {
    void* data;
    int64_t shape[kRank];
    int32_t rank;
    Type type;
};

// The size of an output's axis: that of axis `axis` of input `input`, and `plus`. Input -1: `plus` alone.
struct Axis {
    int32_t input;
    int32_t axis;
    int64_t plus;
};

struct Output {
    Type type;
    std::vector<Axis> shape;
};

using Attributes = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;

class Plugin {
public:
    Plugin();  // registers itself
    Plugin(Plugin const&) = delete;
    Plugin& operator=(Plugin const&) = delete;

    // Operator name; the domain is "edgetrim".
    virtual char const* name() const = 0;

    // Names of the node's attributes, all integers; values come in this order.
    virtual std::vector<char const*> attributes() const = 0;

    virtual int outputs(Attributes const& attributes) const = 0;

    virtual bool accepts(int input, Type type) const = 0;

    // Output `i`. Of the inputs, types and ranks are known, shapes perhaps not yet.
    virtual Output output(int i, Tensors const& inputs, Attributes const& attributes) const = 0;

    // Bytes of scratch memory, for the largest shapes.
    virtual size_t workspace(Tensors const& inputs, Attributes const& attributes) const = 0;

    // Enqueues on a cudaStream_t. Null, or what is wrong.
    virtual char const* run(
        Tensors const& in, Tensors const& out, Attributes const& attributes, void* workspace, void* stream) const = 0;

protected:
    ~Plugin() = default;
};

// All plugins of this library.
std::vector<Plugin const*>& plugins();

}  // namespace edgetrim
