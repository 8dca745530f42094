// How arrays come in from Python.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstring>

namespace tempo {

// As `nb::ndarray`, and made of a tensor by PyTorch's function in C: nanobind by itself asks `Tensor.__dlpack__`,
// which is Python and takes far longer.
template <typename... Args>
struct Array : nanobind::ndarray<Args...> {
    Array() = default;
    explicit Array(nanobind::ndarray<Args...> array) : nanobind::ndarray<Args...>(std::move(array)) {}
};

// A capsule of a tensor, which nanobind takes as it is, with a gradient or without; invalid for all else.
inline nanobind::object capsule_of(nanobind::handle array) noexcept {
    const char *type = Py_TYPE(array.ptr())->tp_name;  // nothing is imported for others
    if (std::strcmp(type, "Tensor") != 0 && std::strcmp(type, "Parameter") != 0) return {};
    static const nanobind::handle to_dlpack =
        nanobind::object(nanobind::module_::import_("torch.utils.dlpack").attr("to_dlpack")).release();
    nanobind::object capsule = nanobind::steal(PyObject_CallOneArg(to_dlpack.ptr(), array.ptr()));
    if (!capsule.is_valid()) PyErr_Clear();
    return capsule;
}

}  // namespace tempo

namespace nanobind::detail {

template <typename... Args>
struct type_caster<tempo::Array<Args...>> {
    using Inner = make_caster<ndarray<Args...>>;
    NB_TYPE_CASTER(tempo::Array<Args...>, Inner::Name)

    template <typename Flags>
    bool from_python(handle src, Flags flags, cleanup_list *cleanup) noexcept {
        const object capsule = tempo::capsule_of(src);
        const bool converts = flags & Flags(cast_flags::convert);  // by copying, from another dtype or layout
        Inner inner;
        if (!(capsule.is_valid() && inner.from_python(capsule, flags, cleanup)) &&
            !((converts || !capsule.is_valid()) && inner.from_python(src, flags, cleanup)))
            return false;
        value = tempo::Array<Args...>(std::move(inner.value));
        return true;
    }

    static handle from_cpp(const tempo::Array<Args...> &array, rv_policy policy, cleanup_list *cleanup) noexcept {
        return Inner::from_cpp(array, policy, cleanup);
    }
};

}  // namespace nanobind::detail
