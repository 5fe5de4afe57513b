// kv_compact: the keys and values of a KV group without the visual tokens that go, all layers in one launch, in place if asked to.
// The contract is in kv_compact.py.
//
// In place is safe because kept indices ascend: what lies at element e behind (in the order of memory) of a column, that is of one
// head of one sample, comes from an element s(e) >= e, and s ascends. A block takes a column from front to back in chunks: all
// of a chunk is read, then a barrier, then it is written. Whatever a later chunk reads lies behind all that has been written.
#include "_device.h"

namespace edgetrim {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;
constexpr int kTensors = 128;

struct Launch {
    int64_t const* index;
    char const* from[kTensors];
    char* to[kTensors];
    int64_t row;  // bytes
    int32_t heads, total, left, tokens, keep;
    int32_t pitch;  // rows between two columns of the output
    bool per_head;
};

template <typename Piece>
__global__ void __launch_bounds__(kThreads) compact(Launch p) {
    int const per_row = static_cast<int>(p.row / sizeof(Piece));
    int const column = blockIdx.y;
    int64_t const* const index = p.index + static_cast<int64_t>(p.per_head ? column : column / p.heads) * p.keep;
    // not __restrict__: they may be the same
    Piece const* const from = reinterpret_cast<Piece const*>(p.from[blockIdx.z]) + static_cast<int64_t>(column) * p.total * per_row;
    Piece* const to = reinterpret_cast<Piece*>(p.to[blockIdx.z]) + static_cast<int64_t>(column) * p.pitch * per_row;
    int const pieces = p.left * per_row, chunk = kThreads * kUnroll;
    for (int base = blockIdx.x * chunk; base < pieces; base += gridDim.x * chunk) {
        Piece held[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            int const i = base + u * kThreads + threadIdx.x;
            if (i >= pieces) continue;
            int const row = i / per_row;
            int64_t source = row < p.keep ? index[row] : row - p.keep + p.tokens;
            if (source < 0) source = 0;
            held[u] = from[source * per_row + i - row * per_row];
        }
        __syncthreads();
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            int const i = base + u * kThreads + threadIdx.x;
            if (i < pieces) to[i] = held[u];
        }
    }
}

class KvCompact final : public Plugin {
    char const* name() const override { return "kv_compact"; }

    std::vector<char const*> attributes() const override { return {"tokens", "keep", "tensors"}; }

    int outputs(Attributes const& a) const override { return static_cast<int>(a[2]); }

    bool accepts(int input, Type type) const override { return (input == 0) == (type == Type::kInt64); }

    Output output(int i, Tensors const& in, Attributes const& a) const override {
        return {in[i + 1].type, {{i + 1, 0, 0}, {i + 1, 1, 0}, {i + 1, 2, a[1] - a[0]}, {i + 1, 3, 0}}};
    }

    size_t workspace(Tensors const&, Attributes const&) const override { return 0; }

    char const* run(
        Tensors const& in, Tensors const& out, Attributes const& a, void*, void* stream) const override {
        Launch p{};
        if (in.size() < 2 || in.size() - 1 > kTensors || a[2] != static_cast<int64_t>(in.size()) - 1) {
            return "`tensors` is not the number of tensors, 128 at most";
        }
        Tensor const &index = in[0], &first = in[1];
        if (first.rank != 4) return "keys and values are not [batch, kv_heads, past, head_dim]";
        int64_t const batch = first.shape[0], heads = first.shape[1];
        p.per_head = index.rank == 3;
        if (index.shape[0] != batch || (p.per_head && index.shape[1] != heads) || index.shape[index.rank - 1] != a[1]) {
            return "the index is neither [batch, keep] nor [batch, kv_heads, keep]";
        }
        if (a[1] < 0 || a[1] > a[0] || a[0] > first.shape[2]) return "0 <= keep <= tokens <= past does not hold";
        bool const in_place = out[0].data == first.data;
        int width = 16;
        for (size_t t = 0; t + 1 < in.size(); ++t) {
            Tensor const& x = in[t + 1];
            bool same = x.rank == 4 && x.type == first.type;
            for (int axis = 0; same && axis < 4; ++axis) same = x.shape[axis] == first.shape[axis];
            if (!same) return "keys and values of a group have one shape and one type";
            if ((x.data == out[t].data) != in_place) return "either all tensors are compacted in place, or none";
            p.from[t] = static_cast<char const*>(x.data);
            p.to[t] = static_cast<char*>(out[t].data);
            width = std::min(width, piece(x.shape[3] * bytes(x.type), x.data, out[t].data));
        }
        p.index = static_cast<int64_t const*>(index.data);
        p.row = first.shape[3] * bytes(first.type);
        p.heads = static_cast<int32_t>(heads);
        p.total = static_cast<int32_t>(first.shape[2]);
        p.tokens = static_cast<int32_t>(a[0]);
        p.keep = static_cast<int32_t>(a[1]);
        p.left = p.total - p.tokens + p.keep;
        p.pitch = in_place ? p.total : p.left;
        int64_t const columns = batch * heads;
        if (columns == 0 || p.left == 0) return nullptr;
        // in place one block takes a whole column, in order
        int64_t const chunks = p.left * p.row / (kThreads * kUnroll * width);
        unsigned const share = in_place ? 1 : blocks(chunks, 4 * multiprocessors() / (columns * a[2]));
        dim3 const grid(share, static_cast<unsigned>(columns), static_cast<unsigned>(a[2]));
        switch (width) {
            case 16: return EDGETRIM_LAUNCH(compact<uint4>, grid, dim3(kThreads), stream, p);
            case 8: return EDGETRIM_LAUNCH(compact<uint2>, grid, dim3(kThreads), stream, p);
            case 4: return EDGETRIM_LAUNCH(compact<uint32_t>, grid, dim3(kThreads), stream, p);
            default: return EDGETRIM_LAUNCH(compact<uint16_t>, grid, dim3(kThreads), stream, p);
        }
    }
};

KvCompact const plugin;

}  // namespace
}  // namespace edgetrim
