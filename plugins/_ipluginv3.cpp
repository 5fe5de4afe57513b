// Every plugin of the library as an IPluginV3 of TensorRT 10.3 and newer, and the entry points of IPluginRegistry::loadLibrary.
#include <NvInferRuntime.h>

#include <memory>
#include <string>

#include "_plugin.h"

namespace edgetrim {
namespace {

using namespace nvinfer1;

constexpr char kNamespace[] = "edgetrim";
constexpr char kVersion[] = "1";

ILoggerFinder* finder = nullptr;

void complain(char const* plugin, char const* what) {
    ILogger* const logger = finder == nullptr ? nullptr : finder->findLogger();
    if (logger != nullptr) logger->log(ILogger::Severity::kERROR, (std::string(plugin) + ": " + what).c_str());
}

DataType theirs(Type type) {
    return type == Type::kFloat ? DataType::kFLOAT : type == Type::kHalf ? DataType::kHALF : DataType::kINT64;
}

bool ours(DataType type, Type& found) {
    for (Type known : {Type::kFloat, Type::kHalf, Type::kInt64}) {
        if (theirs(known) != type) continue;
        found = known;
        return true;
    }
    return false;
}

// False if it has a type or a rank that no plugin knows.
bool describe(Dims const& dims, DataType type, void const* data, Tensor& found) {
    if (dims.nbDims < 0 || dims.nbDims > kRank || !ours(type, found.type)) return false;
    found.data = const_cast<void*>(data);
    found.rank = dims.nbDims;
    for (int32_t i = 0; i < dims.nbDims; ++i) found.shape[i] = dims.d[i];
    return true;
}

class Node final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
public:
    Node(Plugin const& plugin, Attributes attributes)
        : mPlugin(plugin), mNames(plugin.attributes()), mAttributes(std::move(attributes)) {
        for (int64_t value : mAttributes) mStored.push_back(static_cast<int32_t>(value));
        for (size_t i = 0; i < mNames.size(); ++i) {
            mFields.emplace_back(mNames[i], &mStored[i], PluginFieldType::kINT32, 1);
        }
        mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
    }

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
            case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
            case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
            case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    IPluginV3* clone() noexcept override {
        try {
            auto copy = std::make_unique<Node>(mPlugin, mAttributes);
            copy->mInputs = mInputs;
            return copy.release();
        } catch (std::exception const& e) {
            complain(mPlugin.name(), e.what());
            return nullptr;
        }
    }

    AsciiChar const* getPluginName() const noexcept override { return mPlugin.name(); }
    AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

    int32_t configurePlugin(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*, int32_t) noexcept override {
        return 0;
    }

    int32_t onShapeChange(PluginTensorDesc const*, int32_t nbInputs, PluginTensorDesc const*, int32_t) noexcept override {
        mInputs = nbInputs;  // enqueue is not told
        return 0;
    }

    int32_t getNbOutputs() const noexcept override { return mPlugin.outputs(mAttributes); }

    int32_t getOutputDataTypes(
        DataType* outputs, int32_t nbOutputs, DataType const* inputs, int32_t nbInputs) const noexcept override {
        try {
            Tensors in(nbInputs);
            for (int32_t i = 0; i < nbInputs; ++i) {
                if (!ours(inputs[i], in[i].type)) return 1;
            }
            for (int32_t i = 0; i < nbOutputs; ++i) outputs[i] = theirs(mPlugin.output(i, in, mAttributes).type);
            return 0;
        } catch (std::exception const& e) {
            complain(mPlugin.name(), e.what());
            return 1;
        }
    }

    int32_t getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t, DimsExprs* outputs,
        int32_t nbOutputs, IExprBuilder& builder) noexcept override {
        try {
            Tensors in(nbInputs);
            for (int32_t i = 0; i < nbInputs; ++i) in[i].rank = inputs[i].nbDims;
            for (int32_t i = 0; i < nbOutputs; ++i) {
                auto const shape = mPlugin.output(i, in, mAttributes).shape;
                outputs[i].nbDims = static_cast<int32_t>(shape.size());
                for (size_t axis = 0; axis < shape.size(); ++axis) {
                    auto const [input, of, plus] = shape[axis];
                    IDimensionExpr const* size = builder.constant(plus);
                    if (input >= 0) {
                        IDimensionExpr const* const given = inputs[input].d[of];
                        size = plus == 0 ? given : builder.operation(DimensionOperation::kSUM, *given, *size);
                    }
                    outputs[i].d[axis] = size;
                }
            }
            return 0;
        } catch (std::exception const& e) {
            complain(mPlugin.name(), e.what());
            return 1;
        }
    }

    bool supportsFormatCombination(
        int32_t position, DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t) noexcept override {
        try {
            PluginTensorDesc const& asked = inOut[position].desc;
            Type type;
            if (asked.format != TensorFormat::kLINEAR || asked.dims.nbDims > kRank || !ours(asked.type, type)) return false;
            if (position < nbInputs) return mPlugin.accepts(position, type);
            Tensors in(nbInputs);
            for (int32_t i = 0; i < nbInputs; ++i) {
                if (!ours(inOut[i].desc.type, in[i].type)) return false;
                in[i].rank = inOut[i].desc.dims.nbDims;
            }
            return mPlugin.output(position - nbInputs, in, mAttributes).type == type;
        } catch (std::exception const& e) {
            complain(mPlugin.name(), e.what());
            return false;
        }
    }

    size_t getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t nbInputs, DynamicPluginTensorDesc const*,
        int32_t) const noexcept override {
        try {
            Tensors in(nbInputs);
            for (int32_t i = 0; i < nbInputs; ++i) {
                if (!describe(inputs[i].max, inputs[i].desc.type, nullptr, in[i])) return 0;  // enqueue complains
            }
            return mPlugin.workspace(in, mAttributes);
        } catch (std::exception const& e) {
            complain(mPlugin.name(), e.what());
            return 0;
        }
    }

    int32_t enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const* outputDesc, void const* const* inputs,
        void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
        try {
            Tensors in(mInputs), out(getNbOutputs());
            bool known = mInputs > 0;
            for (size_t i = 0; i < in.size(); ++i) {
                known = known && describe(inputDesc[i].dims, inputDesc[i].type, inputs[i], in[i]);
            }
            for (size_t i = 0; i < out.size(); ++i) {
                known = known && describe(outputDesc[i].dims, outputDesc[i].type, outputs[i], out[i]);
            }
            char const* const wrong =
                known ? mPlugin.run(in, out, mAttributes, workspace, stream) : "a tensor of an unknown type, or of more than 4 axes";
            if (wrong != nullptr) complain(mPlugin.name(), wrong);
            return wrong == nullptr ? 0 : 1;
        } catch (std::exception const& e) {
            complain(mPlugin.name(), e.what());
            return 1;
        }
    }

    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

    PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &mCollection; }

private:
    Plugin const& mPlugin;
    int32_t mInputs = 0;
    std::vector<char const*> mNames;
    Attributes mAttributes;
    std::vector<int32_t> mStored;
    std::vector<PluginField> mFields;
    PluginFieldCollection mCollection{};
};

class Creator final : public IPluginCreatorV3One {
public:
    explicit Creator(Plugin const& plugin) : mPlugin(plugin) {
        for (char const* name : plugin.attributes()) mFields.emplace_back(name, nullptr, PluginFieldType::kINT32, 1);
        mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
    }

    IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const* given, TensorRTPhase) noexcept override {
        try {
            Attributes values;
            for (char const* name : mPlugin.attributes()) {
                bool found = false;
                for (int32_t i = 0; i < given->nbFields && !found; ++i) {
                    PluginField const& field = given->fields[i];
                    if (std::string(field.name) != name || field.data == nullptr || field.length != 1) continue;
                    found = field.type == PluginFieldType::kINT32 || field.type == PluginFieldType::kINT64;
                    if (field.type == PluginFieldType::kINT32) values.push_back(*static_cast<int32_t const*>(field.data));
                    if (field.type == PluginFieldType::kINT64) values.push_back(*static_cast<int64_t const*>(field.data));
                }
                if (!found) {
                    complain(mPlugin.name(), (std::string("the node has no integer `") + name + "`").c_str());
                    return nullptr;
                }
            }
            return new Node(mPlugin, std::move(values));
        } catch (std::exception const& e) {
            complain(mPlugin.name(), e.what());
            return nullptr;
        }
    }

    PluginFieldCollection const* getFieldNames() noexcept override { return &mCollection; }
    AsciiChar const* getPluginName() const noexcept override { return mPlugin.name(); }
    AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

private:
    Plugin const& mPlugin;
    std::vector<PluginField> mFields;
    PluginFieldCollection mCollection{};
};

}  // namespace
}  // namespace edgetrim

extern "C" TENSORRTAPI void setLoggerFinder(nvinfer1::ILoggerFinder* found) { edgetrim::finder = found; }

extern "C" TENSORRTAPI nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static std::vector<std::unique_ptr<edgetrim::Creator>> creators;
    static std::vector<nvinfer1::IPluginCreatorInterface*> all;
    if (all.empty()) {
        for (edgetrim::Plugin const* plugin : edgetrim::plugins()) {
            creators.push_back(std::make_unique<edgetrim::Creator>(*plugin));
            all.push_back(creators.back().get());
        }
    }
    count = static_cast<int32_t>(all.size());
    return all.data();
}
