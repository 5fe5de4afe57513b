// Plays TensorRT: takes a plugin of the library from the list of creators through build, serialization and a run, on host memory.
#include <NvInferRuntime.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "_plugin.h"

using namespace nvinfer1;

extern "C" IPluginCreatorInterface* const* getCreators(int32_t&);
extern "C" void setLoggerFinder(ILoggerFinder*);

namespace {

struct Size final : IDimensionExpr, apiv::VDimensionExpr {
    int64_t value;
    explicit Size(int64_t value) : value(value) { mImpl = this; }
    bool isConstant() const override { return true; }
    int64_t getConstantValue() const override { return value; }
    bool isSizeTensor() const override { return false; }
};

struct Sizes final : IExprBuilder, apiv::VExprBuilder {
    std::vector<std::unique_ptr<Size>> made;
    Sizes() { mImpl = this; }
    IDimensionExpr const* constant(int64_t value) override {
        made.push_back(std::make_unique<Size>(value));
        return made.back().get();
    }
    IDimensionExpr const* operation(DimensionOperation op, IDimensionExpr const& a, IDimensionExpr const& b) override {
        return op == DimensionOperation::kSUM ? constant(a.getConstantValue() + b.getConstantValue()) : nullptr;
    }
    IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override { return nullptr; }
};

struct Heard final : ILogger, ILoggerFinder {
    std::string text;
    void log(Severity, AsciiChar const* line) noexcept override { text += line; }
    ILogger* findLogger() override { return this; }
} heard;

DynamicPluginTensorDesc described(edgetrim::Tensor const& x) {
    DynamicPluginTensorDesc out{};
    out.desc.dims.nbDims = x.rank;
    for (int i = 0; i < x.rank; ++i) out.desc.dims.d[i] = x.shape[i];
    out.desc.type = x.type == edgetrim::Type::kFloat ? DataType::kFLOAT
        : x.type == edgetrim::Type::kHalf            ? DataType::kHALF
                                                     : DataType::kINT64;
    out.desc.format = TensorFormat::kLINEAR;
    out.min = out.opt = out.max = out.desc.dims;
    return out;
}

std::string wrong;

}  // namespace

// Null, or what went wrong. `out`: the outputs as the C ABI describes them, with memory.
extern "C" char const* drive(char const* name, edgetrim::Tensor const* in, int32_t inputs, edgetrim::Tensor const* out,
    int32_t outputs, char const* const* keys, int32_t const* values, int32_t count) {
    setLoggerFinder(&heard);
    heard.text.clear();
    int32_t creators = 0;
    auto const* all = getCreators(creators);
    IPluginCreatorV3One* creator = nullptr;
    for (int32_t i = 0; i < creators; ++i) {
        auto* one = static_cast<IPluginCreatorV3One*>(all[i]);
        if (std::strcmp(one->getPluginName(), name) == 0 && std::strcmp(one->getPluginNamespace(), "edgetrim") == 0) creator = one;
    }
    if (creator == nullptr) return "no creator of that name";
    if (creator->getFieldNames()->nbFields != count) return "another number of attributes";
    std::vector<PluginField> fields;
    for (int32_t i = 0; i < count; ++i) fields.emplace_back(keys[i], values + i, PluginFieldType::kINT32, 1);
    PluginFieldCollection given{count, fields.data()};
    std::unique_ptr<IPluginV3> first(creator->createPlugin("node", &given, TensorRTPhase::kBUILD));
    if (first == nullptr) return (wrong = "not created: " + heard.text).c_str();
    std::unique_ptr<IPluginV3> plugin(first->clone());
    first.reset();
    auto* build = static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
    if (build->getNbOutputs() != outputs) return "another number of outputs";

    std::vector<DynamicPluginTensorDesc> descs;
    for (int32_t i = 0; i < inputs; ++i) descs.push_back(described(in[i]));
    for (int32_t i = 0; i < outputs; ++i) descs.push_back(described(out[i]));
    for (int32_t i = 0; i < inputs + outputs; ++i) {
        if (!build->supportsFormatCombination(i, descs.data(), inputs, outputs)) return "a type or format is not supported";
        auto other = descs;
        other[i].desc.type = DataType::kINT8;
        if (build->supportsFormatCombination(i, other.data(), inputs, outputs)) return "INT8 is supported";
        other = descs;
        other[i].desc.format = TensorFormat::kCHW32;
        if (build->supportsFormatCombination(i, other.data(), inputs, outputs)) return "CHW32 is supported";
    }
    std::vector<DataType> types, found(outputs);
    for (int32_t i = 0; i < inputs; ++i) types.push_back(descs[i].desc.type);
    if (build->getOutputDataTypes(found.data(), outputs, types.data(), inputs) != 0) return "no output types";
    Sizes sizes;
    std::vector<DimsExprs> shapes(inputs), results(outputs);
    for (int32_t i = 0; i < inputs; ++i) {
        shapes[i].nbDims = in[i].rank;
        for (int axis = 0; axis < in[i].rank; ++axis) shapes[i].d[axis] = sizes.constant(in[i].shape[axis]);
    }
    if (build->getOutputShapes(shapes.data(), inputs, nullptr, 0, results.data(), outputs, sizes) != 0) return "no output shapes";
    for (int32_t i = 0; i < outputs; ++i) {
        if (found[i] != descs[inputs + i].desc.type) return "another output type";
        if (results[i].nbDims != out[i].rank) return "another output rank";
        for (int axis = 0; axis < out[i].rank; ++axis) {
            if (results[i].d[axis]->getConstantValue() != out[i].shape[axis]) return "another output shape";
        }
    }
    if (build->configurePlugin(descs.data(), inputs, descs.data() + inputs, outputs) != 0) return "not configured";
    size_t const scratch = build->getWorkspaceSize(descs.data(), inputs, descs.data() + inputs, outputs);
    std::vector<std::max_align_t> workspace(scratch / sizeof(std::max_align_t) + 1);

    // as an engine is read: from the fields that were stored
    auto* stored = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    std::unique_ptr<IPluginV3> read(creator->createPlugin("node", stored->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
    if (read == nullptr) return "not created from what it stored";
    plugin.reset();
    auto* source = static_cast<IPluginV3OneRuntime*>(read->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    std::unique_ptr<IPluginV3> attached(source->attachToContext(nullptr));
    auto* runtime = static_cast<IPluginV3OneRuntime*>(attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    std::vector<PluginTensorDesc> plain;
    std::vector<void const*> from;
    std::vector<void*> to;
    for (auto const& desc : descs) plain.push_back(desc.desc);
    for (int32_t i = 0; i < inputs; ++i) from.push_back(in[i].data);
    for (int32_t i = 0; i < outputs; ++i) to.push_back(out[i].data);
    if (runtime->onShapeChange(plain.data(), inputs, plain.data() + inputs, outputs) != 0) return "shapes are refused";
    if (runtime->enqueue(plain.data(), plain.data() + inputs, from.data(), to.data(), workspace.data(), nullptr) != 0) {
        return (wrong = "not run: " + heard.text).c_str();
    }
    return nullptr;
}
