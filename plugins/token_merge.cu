// token_merge: one round of ToMe's bipartite matching and size-weighted merge. The contract is in token_merge.py.
//
// Four launches: lengths, the best partner of every even token, which of them go, the tokens that come out. All sums are taken
// in one order, so that results repeat bit by bit.
#include "_device.h"

namespace edgetrim {
namespace {

constexpr float kSnap = 4096.0f;  // graphs/_blocks.py
constexpr float kTiny = 1e-12f;
constexpr float kNever = -1e9f;  // graphs/_bipartite.py

constexpr int kTile = 32;       // even and odd tokens of a block, and the depth of a step
constexpr int kSide = 16;       // threads along a tile's side: each has 2 by 2 of its products
constexpr int kPick = 512;      // threads that pick
constexpr int kPickItems = 4;   // 2048 even tokens
constexpr int kOut = 128;       // threads of a token that comes out

using Best = unsigned long long;  // the snapped cosine, ordered, then the index of the partner from behind

struct Launch {
    void const* metric;
    void const* hidden;
    float const* size;
    void* tokens;
    int64_t* index;
    float* new_size;
    float* scale;    // [batch, n], 1 / length
    Best* best;      // [batch, even]
    int32_t* fate;   // [batch, even]: the place where a token stays, or -1 - the odd token that it goes to
    int32_t* stays;  // [batch, even - r]
    int32_t n, even, odd, depth, dim, r, guarded;
};

template <typename T>
__global__ void __launch_bounds__(256) measure(Launch p) {
    int const token = blockIdx.x * (256 / kWarp) + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    int64_t const at = static_cast<int64_t>(blockIdx.y) * p.n + token;
    T const* const row = static_cast<T const*>(p.metric) + at * p.depth;
    float sum = 0;
    for (int i = lane; token < p.n && i < p.depth; i += kWarp) {
        float const x = static_cast<float>(row[i]);
        sum += x * x;
    }
    for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(kAll, sum, mask);
    if (lane != 0 || token >= p.n) return;
    p.scale[at] = 1.0f / sqrtf(fmaxf(sum, kTiny));
    if (token % 2 == 0) p.best[static_cast<int64_t>(blockIdx.y) * p.even + token / 2] = 0;
}

template <typename T>
__global__ void __launch_bounds__(kSide * kSide) match(Launch p) {
    __shared__ float a[kTile][kTile + 1], b[kTile][kTile + 1];
    int const tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
    int const even = blockIdx.y * kTile, odd = blockIdx.x * kTile;
    int64_t const sample = static_cast<int64_t>(blockIdx.z) * p.n;
    T const* const metric = static_cast<T const*>(p.metric) + sample * p.depth;
    float const* const scale = p.scale + sample;
    float sum[2][2] = {};
    for (int k = 0; k < p.depth; k += kTile) {
        for (int i = threadIdx.x; i < kTile * kTile; i += kSide * kSide) {
            int const row = i / kTile, column = i % kTile;
            int const from = 2 * (even + row), to = 2 * (odd + row) + 1;
            bool const there = k + column < p.depth;
            a[row][column] = there && from < p.n
                ? static_cast<float>(metric[static_cast<int64_t>(from) * p.depth + k + column]) * scale[from] : 0.0f;
            b[row][column] = there && to < p.n
                ? static_cast<float>(metric[static_cast<int64_t>(to) * p.depth + k + column]) * scale[to] : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < kTile; ++j) {
            for (int y = 0; y < 2; ++y) {
                for (int x = 0; x < 2; ++x) sum[y][x] += a[ty + y * kSide][j] * b[tx + x * kSide][j];
            }
        }
        __syncthreads();
    }
    for (int y = 0; y < 2; ++y) {
        Best best = 0;
        for (int x = 0; x < 2; ++x) {
            int const partner = odd + tx + x * kSide;
            if (partner >= p.odd) continue;
            Best const found = static_cast<Best>(ordered(rintf(sum[y][x] * kSnap))) << 32 | (0xffffffffu - partner);
            if (found > best) best = found;
        }
        for (int mask = kSide / 2; mask > 0; mask /= 2) {
            Best const other = __shfl_xor_sync(kAll, best, mask);
            if (other > best) best = other;
        }
        int const row = even + ty + y * kSide;
        if (tx == 0 && row < p.even) atomicMax(p.best + static_cast<int64_t>(blockIdx.z) * p.even + row, best);
    }
}

__global__ void __launch_bounds__(kPick) pick(Launch p) {
    int64_t const sample = static_cast<int64_t>(blockIdx.x) * p.even;
    uint32_t key[kPickItems];
    for (int i = 0; i < kPickItems; ++i) {
        int const at = threadIdx.x * kPickItems + i;
        key[i] = at >= p.even ? 0 : at < p.guarded ? ordered(kNever) : static_cast<uint32_t>(p.best[sample + at] >> 32);
    }
    uint32_t place;
    uint32_t const selected = select<kPick, kPickItems>(key, p.r, place);
    for (int i = 0; i < kPickItems; ++i) {
        int const at = threadIdx.x * kPickItems + i;
        if (at >= p.even) break;
        if (selected >> i & 1) {
            ++place;
            p.fate[sample + at] = -1 - static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(p.best[sample + at]));
        } else {
            int const stay = at - static_cast<int>(place);
            p.fate[sample + at] = stay;
            p.stays[static_cast<int64_t>(blockIdx.x) * (p.even - p.r) + stay] = at;
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kOut) merge(Launch p) {
    __shared__ uint16_t members[kPick * kPickItems];
    int const out = blockIdx.x, left = p.even - p.r;
    int64_t const sample = blockIdx.y;
    int64_t const at = sample * (p.n - p.r) + out;
    T const* const hidden = static_cast<T const*>(p.hidden) + sample * p.n * p.dim;
    T* const to = static_cast<T*>(p.tokens) + at * p.dim;
    float const* const size = p.size + sample * p.n;
    int const token = out < left ? 2 * p.stays[sample * left + out] : 2 * (out - left) + 1;
    uint32_t count = 0;
    if (out >= left) {  // the same for all threads
        int32_t const wanted = -1 - (out - left);
        for (int base = 0; base < p.even; base += kOut) {
            int const even = base + threadIdx.x;
            bool const mine = even < p.even && p.fate[sample * p.even + even] == wanted;
            uint32_t found;
            uint32_t const before = sum_before<kOut>(mine, found);
            if (mine) members[count + before] = static_cast<uint16_t>(even);
            count += found;
        }
        __syncthreads();
    }
    float gone = 0;
    for (uint32_t m = 0; m < count; ++m) gone += size[2 * members[m]];
    float const whole = size[token] + gone;
    if (threadIdx.x == 0) {
        p.index[at] = token;
        p.new_size[at] = whole;
    }
    for (int i = threadIdx.x; i < p.dim; i += kOut) {
        T const own = hidden[static_cast<int64_t>(token) * p.dim + i];
        if (out < left) {
            to[i] = own;
            continue;
        }
        float sum = 0;
        for (uint32_t m = 0; m < count; ++m) {
            int64_t const even = 2 * members[m];
            sum += static_cast<float>(hidden[even * p.dim + i]) * size[even];
        }
        to[i] = static_cast<T>((static_cast<float>(own) * size[token] + sum) / whole);
    }
}

int64_t aligned(int64_t count) { return (count + 15) / 16 * 16; }

class TokenMerge final : public Plugin {
    char const* name() const override { return "token_merge"; }

    std::vector<char const*> attributes() const override { return {"r", "protected"}; }

    int outputs(Attributes const&) const override { return 3; }

    bool accepts(int input, Type type) const override { return type == Type::kFloat || (type == Type::kHalf && input < 2); }

    Output output(int i, Tensors const& in, Attributes const& a) const override {
        if (i == 0) return {in[1].type, {{1, 0, 0}, {1, 1, -a[0]}, {1, 2, 0}}};
        return {i == 1 ? Type::kInt64 : Type::kFloat, {{1, 0, 0}, {1, 1, -a[0]}}};
    }

    size_t workspace(Tensors const& in, Attributes const&) const override {
        int64_t const tokens = in[0].shape[0] * in[0].shape[1], even = in[0].shape[0] * ((in[0].shape[1] + 1) / 2);
        return 8 * aligned(even) + 4 * aligned(tokens) + 2 * 4 * aligned(even);
    }

    char const* run(
        Tensors const& in, Tensors const& out, Attributes const& a, void* workspace, void* stream) const override {
        Tensor const &metric = in[0], &hidden = in[1], &size = in[2];
        if (in.size() != 3 || metric.rank != 3 || hidden.rank != 3 || size.rank != 2) {
            return "the inputs are not metric [batch, tokens, depth], hidden [batch, tokens, dim], size [batch, tokens]";
        }
        for (int axis = 0; axis < 2; ++axis) {
            if (metric.shape[axis] != hidden.shape[axis] || size.shape[axis] != hidden.shape[axis]) {
                return "metric, hidden and size differ in batch or tokens";
            }
        }
        int64_t const batch = hidden.shape[0];
        Launch p{};
        p.n = static_cast<int32_t>(hidden.shape[1]);
        p.odd = p.n / 2;
        p.even = p.n - p.odd;
        p.r = static_cast<int32_t>(a[0]);
        p.guarded = static_cast<int32_t>(a[1]);
        if (p.n > 2 * kPick * kPickItems) return "more than 4096 tokens";
        if (p.odd < 1 || a[0] < 1 || a[0] > p.even - a[1]) return "`r` is not in 1..the even tokens that are not protected";
        p.depth = static_cast<int32_t>(metric.shape[2]);
        p.dim = static_cast<int32_t>(hidden.shape[2]);
        p.metric = metric.data;
        p.hidden = hidden.data;
        p.size = static_cast<float const*>(size.data);
        p.tokens = out[0].data;
        p.index = static_cast<int64_t*>(out[1].data);
        p.new_size = static_cast<float*>(out[2].data);
        p.best = static_cast<Best*>(workspace);
        p.scale = reinterpret_cast<float*>(p.best + aligned(batch * p.even));
        p.fate = reinterpret_cast<int32_t*>(p.scale + aligned(batch * p.n));
        p.stays = p.fate + aligned(batch * p.even);
        if (batch == 0) return nullptr;
        char const* wrong = metric.type == Type::kHalf ? find<__half>(p, batch, stream) : find<float>(p, batch, stream);
        if (wrong != nullptr) return wrong;
        dim3 const each(static_cast<unsigned>(p.n - p.r), static_cast<unsigned>(batch));
        if (hidden.type == Type::kHalf) return EDGETRIM_LAUNCH(merge<__half>, each, dim3(kOut), stream, p);
        return EDGETRIM_LAUNCH(merge<float>, each, dim3(kOut), stream, p);
    }

    template <typename T>
    static char const* find(Launch const& p, int64_t batch, void* stream) {
        unsigned const samples = static_cast<unsigned>(batch);
        auto const tiles = [](int32_t count) { return static_cast<unsigned>((count + kTile - 1) / kTile); };
        char const* wrong = EDGETRIM_LAUNCH(measure<T>, dim3((p.n + 7) / 8, samples), dim3(256), stream, p);
        if (wrong == nullptr) {
            wrong = EDGETRIM_LAUNCH(match<T>, dim3(tiles(p.odd), tiles(p.even), samples), dim3(kSide * kSide), stream, p);
        }
        return wrong != nullptr ? wrong : EDGETRIM_LAUNCH(pick, dim3(samples), dim3(kPick), stream, p);
    }
};

TokenMerge const plugin;

}  // namespace
}  // namespace edgetrim
