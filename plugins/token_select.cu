// token_select: a row of scores → the indices of the `keep` largest, ascending, and those rows of several tensors, in one launch.
// The contract is in token_select.py.
//
// Selecting takes microseconds and reads 16 KB at most, gathering is bound by memory. So every block selects for itself,
// and gathers its share of the rows: no second launch, no waiting of blocks for one another.
#include "_device.h"

namespace edgetrim {
namespace {

constexpr int kThreads = 512;  // three such blocks fit on an SM of Orin
constexpr int kItems = 8;
constexpr int kMost = kThreads * kItems;
constexpr int kTensors = 8;

struct Rows {
    char const* from;
    char* to;
    int64_t bytes;  // of a row
    int32_t rows;   // of one sample
    int32_t piece;
};

struct Launch {
    float const* score;
    int64_t* index;
    Rows tensor[kTensors];
    int32_t n, keep, tensors;
};

template <typename Piece>
__device__ void gather(Rows const& x, uint16_t const* chosen, int n, int keep) {
    int const per_row = static_cast<int>(x.bytes / sizeof(Piece));
    int64_t const pieces = static_cast<int64_t>(x.rows - n + keep) * per_row;
    Piece const* __restrict__ const from =
        reinterpret_cast<Piece const*>(x.from) + static_cast<int64_t>(blockIdx.y) * x.rows * per_row;
    Piece* __restrict__ const to = reinterpret_cast<Piece*>(x.to) + blockIdx.y * pieces;
#pragma unroll 4
    for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < pieces; i += gridDim.x * kThreads) {
        int const row = static_cast<int>(i / per_row), column = static_cast<int>(i - static_cast<int64_t>(row) * per_row);
        int const source = row < keep ? chosen[row] : row - keep + n;  // what follows the candidates stays
        to[i] = from[static_cast<int64_t>(source) * per_row + column];
    }
}

__global__ void __launch_bounds__(kThreads) select_and_gather(Launch p) {
    __shared__ uint16_t chosen[kMost];
    float const* const score = p.score + static_cast<int64_t>(blockIdx.y) * p.n;
    uint32_t key[kItems];
    for (int i = 0; i < kItems; ++i) {
        int const at = threadIdx.x * kItems + i;
        key[i] = at < p.n ? ordered(score[at]) : 0;
    }
    uint32_t place;
    uint32_t const selected = select<kThreads, kItems>(key, p.keep, place);
    for (int i = 0; i < kItems; ++i) {
        if (selected >> i & 1) chosen[place++] = static_cast<uint16_t>(threadIdx.x * kItems + i);
    }
    __syncthreads();
    if (blockIdx.x == 0) {
        for (int i = threadIdx.x; i < p.keep; i += kThreads) p.index[static_cast<int64_t>(blockIdx.y) * p.keep + i] = chosen[i];
    }
    for (int t = 0; t < p.tensors; ++t) {
        Rows const& x = p.tensor[t];
        switch (x.piece) {
            case 16: gather<uint4>(x, chosen, p.n, p.keep); break;
            case 8: gather<uint2>(x, chosen, p.n, p.keep); break;
            case 4: gather<uint32_t>(x, chosen, p.n, p.keep); break;
            default: gather<uint16_t>(x, chosen, p.n, p.keep);
        }
    }
}

class TokenSelect final : public Plugin {
    char const* name() const override { return "token_select"; }

    std::vector<char const*> attributes() const override { return {"tokens", "keep", "tensors"}; }

    int outputs(Attributes const& a) const override { return static_cast<int>(1 + a[2]); }

    bool accepts(int input, Type type) const override { return input > 0 || type == Type::kFloat; }

    Output output(int i, Tensors const& in, Attributes const& a) const override {
        if (i == 0) return {Type::kInt64, {{0, 0, 0}, {-1, 0, a[1]}}};
        Output out{in[i].type, {{i, 0, 0}, {i, 1, a[1] - a[0]}}};
        for (int32_t axis = 2; axis < in[i].rank; ++axis) out.shape.push_back({i, axis, 0});
        return out;
    }

    size_t workspace(Tensors const&, Attributes const&) const override { return 0; }

    char const* run(
        Tensors const& in, Tensors const& out, Attributes const& a, void*, void* stream) const override {
        Launch p{};
        int64_t const batch = in[0].shape[0];
        if (in[0].rank != 2 || in[0].shape[1] != a[0]) return "the scores are not [batch, tokens]";
        if (a[0] > kMost) return "more than 4096 scores in a row";
        if (a[1] < 1 || a[1] > a[0]) return "`keep` is not in 1..tokens";
        if (a[2] != static_cast<int64_t>(in.size()) - 1 || a[2] > kTensors) return "`tensors` is not the number of tensors, 8 at most";
        p.score = static_cast<float const*>(in[0].data);
        p.index = static_cast<int64_t*>(out[0].data);
        p.n = static_cast<int32_t>(a[0]);
        p.keep = static_cast<int32_t>(a[1]);
        p.tensors = static_cast<int32_t>(a[2]);
        int64_t total = 0;
        for (int t = 0; t < p.tensors; ++t) {
            Tensor const& x = in[t + 1];
            if (x.rank < 2 || x.shape[0] != batch || x.shape[1] < a[0]) return "a tensor is not [batch, tokens or more, …]";
            int64_t row = bytes(x.type);
            for (int axis = 2; axis < x.rank; ++axis) row *= x.shape[axis];
            p.tensor[t] = {static_cast<char const*>(x.data), static_cast<char*>(out[t + 1].data), row,
                static_cast<int32_t>(x.shape[1]), piece(row, x.data, out[t + 1].data)};
            total += row * (x.shape[1] - a[0] + a[1]);
        }
        if (batch == 0) return nullptr;
        // four pieces of 16 bytes for every thread, and no more blocks than run at once
        unsigned const share = blocks(total / (kThreads * 64), 2 * multiprocessors() / batch);
        return EDGETRIM_LAUNCH(select_and_gather, dim3(share, static_cast<unsigned>(batch)), dim3(kThreads), stream, p);
    }
};

TokenSelect const plugin;

}  // namespace
}  // namespace edgetrim
