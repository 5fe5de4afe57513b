// The library's C ABI: what Python calls through ctypes, without TensorRT.
#include <algorithm>

#include "_plugin.h"

namespace edgetrim {

std::vector<Plugin const*>& plugins() {
    static std::vector<Plugin const*> all;
    return all;
}

Plugin::Plugin() { plugins().push_back(this); }

}  // namespace edgetrim

using namespace edgetrim;

extern "C" {

int32_t edgetrim_count() { return static_cast<int32_t>(plugins().size()); }

char const* edgetrim_name(int32_t plugin) { return plugins()[plugin]->name(); }

// Attribute `i`, null behind the last one.
char const* edgetrim_attribute(int32_t plugin, int32_t i) {
    auto const names = plugins()[plugin]->attributes();
    return i < static_cast<int32_t>(names.size()) ? names[i] : nullptr;
}

int64_t edgetrim_workspace(int32_t plugin, Tensor const* in, int32_t inputs, int64_t const* values, int32_t count) {
    return static_cast<int64_t>(plugins()[plugin]->workspace(Tensors(in, in + inputs), Attributes(values, values + count)));
}

int32_t edgetrim_outputs(int32_t plugin, int64_t const* values, int32_t count) {
    return plugins()[plugin]->outputs(Attributes(values, values + count));
}

// Fills in type, rank and shape of output `i`.
void edgetrim_output(
    int32_t plugin, int32_t i, Tensor const* in, int32_t inputs, int64_t const* values, int32_t count, Tensor* out) {
    Output const found = plugins()[plugin]->output(i, Tensors(in, in + inputs), Attributes(values, values + count));
    out->type = found.type;
    out->rank = static_cast<int32_t>(found.shape.size());
    for (int32_t axis = 0; axis < out->rank; ++axis) {
        Axis const& a = found.shape[axis];
        out->shape[axis] = a.plus + (a.input < 0 ? 0 : in[a.input].shape[a.axis]);
    }
}

int32_t edgetrim_accepts(int32_t plugin, int32_t input, int32_t type) {
    return plugins()[plugin]->accepts(input, static_cast<Type>(type));
}

// Fills in type and rank of output `i`, and where the size of each axis comes from. Of the inputs, types and ranks have to be there.
void edgetrim_axes(int32_t plugin, int32_t i, Tensor const* in, int32_t inputs, int64_t const* values, int32_t count, Tensor* out,
    Axis* axes) {
    Output const found = plugins()[plugin]->output(i, Tensors(in, in + inputs), Attributes(values, values + count));
    out->type = found.type;
    out->rank = static_cast<int32_t>(found.shape.size());
    std::copy(found.shape.begin(), found.shape.end(), axes);
}

// Null, or what is wrong.
char const* edgetrim_run(
    int32_t plugin, Tensor const* in, int32_t inputs, Tensor const* out, int32_t outputs, int64_t const* values,
    int32_t count, void* workspace, void* stream) {
    Plugin const& found = *plugins()[plugin];
    Tensors const given(in, in + inputs);
    for (int32_t i = 0; i < inputs; ++i) {
        if (!found.accepts(i, given[i].type)) return "an input has a type that the plugin does not take";
    }
    return found.run(given, Tensors(out, out + outputs), Attributes(values, values + count), workspace, stream);
}

}  // extern "C"
